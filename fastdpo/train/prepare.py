"""What is done before the first step: the start is loaded and patched, the pairs are fitted to it.

Whatever cannot be trained, in a model, its options or the pairs, is refused here.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdpo.data.budget import counted, fit_to_budget
from fastdpo.data.examples import Layout
from fastdpo.errors import ConfigError, ModelError
from fastdpo.model import balance, head
from fastdpo.model.adapters import add_lora, load_4bit
from fastdpo.model.load import (
    check_generation_config,
    check_start,
    load_causal_lm,
    load_in_pieces,
    refuse_quantized,
    weights_digest,
)
from fastdpo.model.pieces import Pieces
from fastdpo.model.prepare import check_range, layout_of, prepare_model
from fastdpo.storage import read_json, settle_directory, write_json_atomic
from fastdpo.train.config import FREE, EvalConfig, TrainConfig
from fastdpo.train.coupling import mismatched
from fastdpo.train.reference import pairs_digest
from fastdpo.train.steps import Setup
from fastdpo.train.together import of_first

_RUN = "run.json"
# In it: the epochs and steps of the policy, where it is saved, and when that was.
_FINISHED, _STEPS, _ENDED = "policy_epochs", "policy_steps", "policy_ended"
_PAIRS = {"pairs": "other pairs", "eval_pairs": "other pairs in eval_dataset"}
FITTED = "fitted.json"  # how many pairs were too long
# Of a subclass too: what it adds says nothing of the weights.
_MEANING = {field.name for field in fields(TrainConfig)} - FREE
_log = logging.getLogger(__name__)


def check_model(
    model: Any,
    tokenizer: Any,
    config: TrainConfig,
    tokens: Iterable[tuple[str, Sequence[int]]],
) -> None:
    """Refuse tokens or lengths that `train` would refuse, before samples are drawn for it.

    Args:
        model: as an engine loads it.
        tokens: what training will see beside samples, with its places. It is looked at only where
            the tokenizer has tokens that the model has not: nothing is wrong if none occurs.
    """
    check_range(model, 0, config.max_length, "", "max_length")
    if len(tokenizer) > head.table_rows(model.get_input_embeddings()):
        for where, ids in tokens:
            check_range(model, max(ids, default=0), 0, f"{where}: the", "")


def start_in_pieces(name: str, config: TrainConfig) -> tuple[Any, Pieces]:
    """`load_start` of a model that is to be sharded: its parameters have no content yet.

    Returns:
        The model, on the meta device, and what reads its weights once it is sharded.
    """
    check_start(name)
    model, pieces = load_in_pieces(name, dtype=getattr(torch, config.dtype))
    check_generation_config(model)
    return model, pieces


def load_start(start: Any, config: TrainConfig, device: torch.device) -> Any:
    """The model that training starts from, on its device, as the options have its weights.

    Raises:
        ModelError: it cannot be loaded, is quantized or could not be saved; or, in memory, has
            adapters or another dtype.
    """
    dtype = getattr(torch, config.dtype)
    if isinstance(start, str | Path):
        check_start(str(start))
        load = load_4bit if config.load_in_4bit else load_causal_lm
        model = load(str(start), dtype=dtype)
        check_generation_config(model)
        return model.to(device)
    if config.load_in_4bit:
        raise ConfigError("load_in_4bit=True needs a model by name, not one in memory")
    refuse_quantized(start.config, type(start).__name__)
    check_generation_config(start)
    if getattr(start, "peft_config", None):
        raise ModelError(
            f"this {type(start).__name__} has adapters; merge them (peft's merge_and_unload), and "
            "set use_peft=True to train new ones"
        )
    others = {p.dtype for p in start.parameters()} - {dtype}
    if others:
        raise ModelError(
            f"this {type(start).__name__} has weights in {others.pop()}, but dtype={config.dtype}; "
            "cast it, or set dtype"
        )
    return start.to(device)


def prepare_policy(
    model: Any,
    config: TrainConfig,
    *,
    place: Callable[[Any], None] | None = None,
    prove: bool = True,
) -> nn.Module:
    """Everything that the options patch onto a model: adapters, layout, head, memory.

    Args:
        place: called where all parameters are there, adapters too, and before the first forward; it
            may shard them over processes.
        prove: without it nothing is run, as for a model whose tensors have no content.
    """
    if config.use_peft:
        model = add_lora(
            model,
            r=config.lora_r,
            alpha=config.lora_alpha,
            target_modules=config.lora_target_modules,
            target_parameters=config.lora_target_parameters,
            seed=config.seed,
        )
    if prove and config.dtype == "bfloat16" and not config.use_peft:
        _log.warning("dtype=bfloat16 without use_peft: steps under 1/500 of a weight are lost")
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(f"this {type(model).__name__} is frozen: no parameter requires_grad")
    added = balance.coefficient(model, config.router_aux_loss_coef)
    if place is not None:
        place(model)
    model = prepare_model(
        model,
        layout=config.layout,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=config.bf16,
        impl=config.impl,
        activation_offloading=config.activation_offloading,
        mlp_tile_tokens=config.mlp_tile_tokens,
        use_liger_kernel=config.use_liger_kernel,
        prove=prove,
    )
    if added and prove:
        balance.check_balance(model)
    return model


def load_reference(setup: Setup) -> tuple[nn.Module, str, Setup]:
    """The reference where it is another model than the start.

    Returns:
        The model, the digest of its weights ("" on all but the first process), and ``setup`` with
        the pairs that it can compute.
    """
    off = {x.name: x.default for x in fields(TrainConfig) if x.name.startswith("lora_")}
    config = replace(
        setup.config, **off, use_peft=False, load_in_4bit=False, router_aux_loss_coef=0.0
    )
    model, weights = setup.engine.load(setup.reference, config, digest=True)
    model = model.requires_grad_(False).eval()
    return model, weights, fit_pairs(setup, model)


def fit_pairs(setup: Setup, model: nn.Module) -> Setup:
    """Bring every pair within the budget of a model's layout, by the rule of the config.

    It is called twice where the reference is another model: what fits that one is fitted to the
    policy.
    """
    config, name, before, layout = setup.config, setup.name, setup.layout, layout_of(model)
    fitted = fit_to_budget(setup.pairs, config.max_tokens, layout=layout, overlong=config.overlong)
    changed = bool(fitted.dropped_at or fitted.truncated_at)
    if before is not None and before.key != layout.key:
        _check_reference_layout(setup, before, layout, changed)
    found = {"pairs_dropped": fitted.dropped_at, "pairs_truncated": fitted.truncated_at}
    too_long = {why: setup.too_long.get(why, 0) + len(at) for why, at in found.items()}
    if setup.is_main:
        write_json_atomic(setup.out / FITTED, too_long)
        if changed:
            print(
                f"{name and f'{name}: '}over max_tokens={config.max_tokens}: "
                f"{counted(fitted.dropped_at)} dropped, {counted(fitted.truncated_at)} truncated"
            )
    setup = replace(setup, too_long=too_long)
    setup = _laid_out(setup, fitted.pairs, model)
    if config.objective.shift_is != "kl":
        return setup
    others = mismatched(setup.pairs, min(config.max_length, config.max_tokens), setup.name)
    named = replace(setup, name=f"{name} mismatched".lstrip(), logps_name="mismatched")
    return replace(setup, mismatched=_laid_out(named, others, model))


def _laid_out(setup: Setup, examples: Sequence[Any], model: nn.Module) -> Setup:
    """The setup with these examples, in the layout of a model that has their tokens."""
    ids = [ids for x in examples for ids in (*x.prompts, *x.responses)]
    what = "a response with its prompt"
    check_range(
        model, max(map(max, ids)), max(x.longest for x in examples), f"the {setup.noun}'", what
    )
    layout = layout_of(model)
    lengths = [x.num_tokens(layout) for x in examples]
    return replace(setup, pairs=examples, layout=layout, lengths=lengths)


def _check_reference_layout(setup: Setup, reference: Layout, policy: Layout, changed: bool) -> None:
    """Refuse another reference that computed other pairs than the policy gets, or would have to
    compute them in a layout that is not its own."""
    config = setup.config
    if not changed and config.precompute_ref_log_probs:
        return
    raise ConfigError(
        f"reference={setup.reference} computes pairs as {reference.key} and the model as "
        f"{policy.key}, which "
        + (
            f"fit max_tokens={config.max_tokens} otherwise; raise max_tokens, or set layout=padded"
            if changed
            else "one batch cannot be; set precompute_ref_log_probs=true"
        )
    )


def claim_folder(setup: Setup, start: Any, facts: Mapping[str, Any] = {}) -> None:
    """Write what this run is, or refuse a folder that holds another one.

    More epochs than the run had are no other run: it goes on. Nor are those of its policy, where
    more were begun: it is finished as it was.

    Args:
        facts: what else the run is; what is not given is None.
    """
    run = {name: value for name, value in asdict(setup.config).items() if name in _MEANING}
    run["model"] = str(start) if isinstance(start, str | Path) else weights_digest(start)
    run["pairs"] = pairs_digest(setup.pairs)
    run["reference"] = None if setup.reference is None else str(setup.reference)
    run |= facts
    path = setup.out / _RUN

    def claim() -> None:
        for name in ("policy", "adapter"):
            settle_directory(setup.out / name)
        if not path.exists():
            write_json_atomic(path, run)

    # Every process waits, whether or not it could already see the file.
    of_first(setup.engine, claim)
    # An option that is newer than the run had its default's meaning.
    known = asdict(TrainConfig()) | asdict(EvalConfig())
    recorded = read_json(path)
    before = known | recorded
    asked, had = run["num_train_epochs"], before["num_train_epochs"]
    if asked < had and not _has_policy_of(setup, recorded, asked):
        finished = recorded.get(_FINISHED) or had
        back = f", {finished} to have its policy of so many back" if finished < had else ""
        raise ConfigError(
            f"num_train_epochs={asked} is fewer than the {had} of the run in {setup.out}; give "
            f"{had} or more to go on{back}, or another output_dir to start anew"
        )
    for name, value in {**run, "num_train_epochs": had}.items():
        if before.get(name) != value:
            what = _PAIRS.get(name, f"{name}={before.get(name)}, not {value}")
            raise ConfigError(
                f"{setup.out} holds a run with {what}; give the same options and data to go on, "
                "or another output_dir to start anew"
            )
    if asked != had:
        _change_epochs(setup, {**recorded, **run}, had)


def _change_epochs(setup: Setup, run: dict[str, Any], before: int) -> None:
    """Note that a run is to have other epochs than it had, ``run`` being what it is now.

    Raises:
        ConfigError: it is finished, and what it would go on from is gone.
    """
    more = run["num_train_epochs"]
    told = (
        f"goes on to num_train_epochs={more}, after {before} before; from its last checkpoint on, "
        f"the learning rate is that of the schedule of all {more}"
    )
    if more < before:
        told = (
            f"is finished, with num_train_epochs={more}; of the {before} that it was to go on to, "
            f"what is done is kept: num_train_epochs={before} goes on"
        )
    elif (setup.out / "policy").is_dir():
        if not list((setup.out / "checkpoint").glob("step-*")):
            raise ConfigError(
                f"num_train_epochs={more}, but {setup.out} holds a finished run of {before}, and "
                "the checkpoint that more epochs go on from is gone; train its policy in another "
                "output_dir"
            )
        run.setdefault(_FINISHED, before)
    setup.engine.accelerator.wait_for_everyone()  # all have read what was there
    of_first(setup.engine, lambda: write_json_atomic(setup.out / _RUN, run))
    if setup.progress:
        print(f"{setup.out} {told}")


def _has_policy_of(setup: Setup, run: Mapping[str, Any], epochs: int) -> bool:
    return (setup.out / "policy").is_dir() and run.get(_FINISHED) == epochs


def is_finished(setup: Setup) -> bool:
    """Whether the policy is there, of all the epochs that are asked for."""
    epochs = setup.config.num_train_epochs
    return _has_policy_of(setup, {_FINISHED: epochs, **read_json(setup.out / _RUN)}, epochs)


def note_saving(setup: Setup) -> None:
    """Note that a policy of fewer epochs, where there is one, is about to be replaced.

    Killed before `note_finished`, the folder does not say which of the two is there.
    """
    if (setup.out / "policy").is_dir():
        _note(setup.out, {_FINISHED: None})


def note_finished(setup: Setup, steps: int) -> None:
    """Note that the policy is of all the epochs, how many steps they are, and when it was saved."""
    ended = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
    epochs = setup.config.num_train_epochs
    _note(setup.out, {_FINISHED: epochs, _STEPS: steps, _ENDED: ended})


def _note(out: Path, facts: Mapping[str, Any]) -> None:
    write_json_atomic(out / _RUN, read_json(out / _RUN) | facts)


def steps_and_end(out: Path) -> tuple[int | None, str | None]:
    """The steps of a run's policy, and the time at which it was saved, UTC in ISO 8601; None where
    an older run did not note them."""
    run = read_json(out / _RUN)
    return run.get(_STEPS), run.get(_ENDED)
