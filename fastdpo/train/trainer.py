"""One round of training: pairs in, a policy in Hugging Face format out.

The reference is the policy at the start.  Its log-probs are computed once, on the packed rows of
the first epoch and by the instructions that training uses, so at ``alpha = 0`` the first loss is
log 2 to the bit (to rounding where an earlier run packed the pairs otherwise).  Then every
optimizer step takes ``batch_size`` pairs, split into packed micro-batches of at most ``max_tokens``
tokens; the loss is the mean over the step's pairs on all processes, however they were packed.

A run that was interrupted goes on from its last checkpoint and ends in the same weights.  So does
one that is finished, where more epochs are asked for.
"""

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdpo.errors import ConfigError
from fastdpo.loss.singles import RunningMean
from fastdpo.model import balance
from fastdpo.model.adapters import trainable_share
from fastdpo.model.attention import use_own_attention
from fastdpo.progress import bar
from fastdpo.storage import read_json, write_json_atomic
from fastdpo.train.checkpoint import load_checkpoint, remove_checkpoint, save_checkpoint
from fastdpo.train.config import EvalConfig, TrainConfig, check_control
from fastdpo.train.control import LengthController
from fastdpo.train.evaluate import Evaluator
from fastdpo.train.examples import as_trained, warn_of_ties
from fastdpo.train.launch import launched
from fastdpo.train.metrics import MetricsLog, mean_metrics
from fastdpo.train.prepare import (
    FITTED,
    claim_folder,
    fit_pairs,
    is_finished,
    load_reference,
    note_finished,
    note_saving,
    steps_and_end,
)
from fastdpo.train.reference import known_reference
from fastdpo.train.steps import Reference, Setup, plan_epoch
from fastdpo.train.together import telling
from fastdpo.train.update import COVARIANCE, take_step

CONTROL = "control.json"  # the state of alpha=auto at the end
_SHOWN = {"loss": "loss", "rewards/margins": "margin"}
_FEW_STEPS = 5  # fewer are too few to learn from
_log = logging.getLogger(__name__)


@telling()
def train(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Any],
    config: TrainConfig,
    out: Path,
    *,
    reference: str | Path | None = None,
    control: LengthController | None = None,
    lengths: Sequence[Sequence[int]] | None = None,
    eval_pairs: Sequence[Any] = (),
    evaluation: EvalConfig | None = None,
    keep_checkpoint: bool = True,
    progress: bool = True,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Train a policy on pairs and leave it in ``out/policy``.

    Args:
        model: folder or hub name of the start, which is also the reference; or a transformers model
            in memory, which is trained in place while its reference is what it was.  With adapters
            it ends merged, in fp32 on the CPU; under FSDP2 it ends sharded over the processes,
            and of no more use.
        tokenizer: saved beside the policy.
        pairs: tokenized pairs, lists or single responses, as the objective takes them;
            ``config.overlong`` says what becomes of those that do not fit ``config.max_tokens``.
        out: gets ``ref_logps/``, ``checkpoint/``, ``metrics/`` and ``policy/``; with adapters also
            ``adapter/``.
        reference: folder or hub name of another reference than the start.
        control, lengths: of ``alpha="auto"``: the state that the round before left in
            ``control.json`` (default: none before), and tokens of each response sampled from the
            start, a list a prompt (default: no samples, the length is held where it is).
        eval_pairs, evaluation: pairs to evaluate on, and when; by default there is no evaluation.
        keep_checkpoint: leave the state after the last step, from which more epochs can go on;
            otherwise none is left once the policy is saved.
        on_step: called after each optimizer step with its metrics.

    Returns:
        The metrics of all steps, averaged over pairs, and those of the policy's evaluation.

    Raises:
        ModelError: the model cannot be trained on pairs, or the loss left the finite range.
        DataError: a pair does not fit, and ``config.overlong`` is "stop".
        ConfigError: ``out`` holds another run, or the options do not go together.
    """
    check_control(config, reference)
    given = pairs
    pairs, eval_pairs = as_trained(pairs, config), as_trained(eval_pairs, config, "eval_dataset")
    engine, out = launched(config), Path(out)
    progress = progress and engine.is_main
    setup = Setup(engine, config, out, reference, progress, pairs, keep_checkpoint)
    setup = replace(setup, unpaired=len(pairs) > len(given))
    evaluator = Evaluator(setup, eval_pairs, evaluation or EvalConfig())
    with closing(engine), _repeatable(setup.device):
        claim_folder(setup, model, evaluator.facts())
        if not is_finished(setup):
            if engine.is_main:
                warn_of_ties(pairs, config)
            begun = control or LengthController(config.target_length)
            control = begun if config.alpha == "auto" else None
            _train(setup, model, tokenizer, control, lengths, evaluator, on_step)
            gc.collect()  # the patched forwards are a cycle
        elif not isinstance(model, str | Path):
            raise ConfigError(
                f"{out} holds a finished run; load its policy instead, or give a larger "
                "num_train_epochs to go on"
            )
    if engine.is_main and not keep_checkpoint:
        remove_checkpoint(out / "checkpoint")
        remove_checkpoint(evaluator.best)
    steps, _ = steps_and_end(out)
    metrics = mean_metrics(out / "metrics" / "metrics.jsonl", steps)
    return metrics | read_json(out / FITTED) | evaluator.of_policy(steps)


def _train(
    setup: Setup,
    start: Any,
    tokenizer: Any,
    control: LengthController | None,
    response_lengths: Sequence[Sequence[int]] | None,
    evaluator: Evaluator,
    on_step: Callable[[dict[str, float]], None] | None,
) -> None:
    """From the start to the saved policy; ``control`` is None where alpha is a number."""
    config, engine, out = setup.config, setup.engine, setup.out
    reference = Reference()
    if setup.reference is not None:  # it comes first, so that its memory is free again
        reference, setup = _other_reference(setup, evaluator)

    # The policy, and the plan of its steps.
    of_start = setup.reference is None and config.objective.needs_reference
    model, weights = engine.load(start, config, digest=of_start)
    coefficient = balance.coefficient(model, config.router_aux_loss_coef)
    setup = replace(fit_pairs(setup, model), aux_loss_coef=coefficient)
    evaluator.fit(model, coefficient)
    epochs = [plan_epoch(setup, epoch) for epoch in range(config.num_train_epochs)]
    steps = list(chain.from_iterable(epochs))
    _tell_plan(setup, model, steps)
    optimizer, scheduler = _optimizer(model, config, len(steps))

    # The start as the reference: its log-probs, its copy, or the model without its adapters.
    if of_start and not config.precompute_ref_log_probs and not config.use_peft:
        reference = Reference(model=engine.frozen_copy(model, start, config))
    model, optimizer = engine.prepare(model, optimizer)
    plain = engine.plain(model)
    if of_start and config.precompute_ref_log_probs:
        reference = known_reference(setup, model, weights)
        evaluator.refer(model, weights)

    # Where an earlier run left off.
    done, state = _restore(setup, plain, optimizer, scheduler, len(steps))
    running = RunningMean(**(state or {})) if control is None else RunningMean()
    if control is not None:
        control = _begin_control(setup, control, state, response_lengths, done / len(steps))
    objective = config.objective if control is None else config.objective_at(control.alpha)
    log = MetricsLog(out / "metrics", done) if engine.is_main else None
    evaluator.begin([len(epoch) for epoch in epochs], done)
    evaluator.after(done, plain, objective, reference.model, running, log)
    with bar("training", len(steps), "step", done=done, shown=setup.progress) as shown:
        for step, batches in enumerate(steps[done:], start=done + 1):
            with shown.part():
                row = take_step(setup, model, optimizer, batches, objective, reference, running)
            if control is not None:
                row |= control.step_facts()
                control = control.after_step(row.pop(COVARIANCE), step / len(steps))
                objective = config.objective_at(control.alpha)
            row["learning_rate"] = scheduler.get_last_lr()[0]
            scheduler.step()
            if log is not None:
                log.add({"step": step, **row})
            shown.note(", ".join(f"{name} {row[x]:.4f}" for x, name in _SHOWN.items() if x in row))
            evaluator.after(step, plain, objective, reference.model, running, log)
            due = setup.keep_checkpoint if step == len(steps) else step % config.save_steps == 0
            if due:
                kept, extra = (engine, plain, optimizer, scheduler), _state(control, running)
                save_checkpoint(out / "checkpoint", step, *kept, extra=extra)
                evaluator.saved(step)
            if on_step is not None:
                on_step(row)

    if log is not None:
        log.close()
        note_saving(setup)
    evaluator.finish(plain, len(steps))
    _save(setup, plain, start, tokenizer, control, len(steps))
    engine.accelerator.wait_for_everyone()
    if not isinstance(start, str | Path) and not config.use_peft:
        use_own_attention(plain.eval())  # the caller's model generates again


def _other_reference(setup: Setup, evaluator: Evaluator) -> tuple[Reference, Setup]:
    """Another reference than the start, and the examples that it can compute."""
    reference, weights, setup = load_reference(setup)
    evaluator.fit(reference)
    if not setup.config.precompute_ref_log_probs:
        return Reference(model=reference), setup
    evaluator.refer(reference, weights)
    return known_reference(setup, reference, weights), setup


def _state(control: LengthController | None, running: RunningMean) -> dict[str, Any] | None:
    """What a checkpoint keeps for the next step, beside weights and optimizer."""
    if control is not None:
        return control.to_dict()
    return running.state() if running.count else None


def _restore(
    setup: Setup, model: Any, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int
) -> tuple[int, Any]:
    """As `load_checkpoint`; one that is beyond the last of the steps is refused.

    A run has one that went on to more epochs and was stopped.
    """
    done, state = load_checkpoint(
        setup.out / "checkpoint", setup.engine, model, optimizer, scheduler
    )
    if done > steps:
        raise ConfigError(
            f"num_train_epochs={setup.config.num_train_epochs} is {steps} steps, and the "
            f"checkpoint in {setup.out} is of step {done}; give a larger num_train_epochs"
        )
    return done, state


def _begin_control(
    setup: Setup,
    control: LengthController,
    state: dict[str, Any] | None,
    response_lengths: Sequence[Sequence[int]] | None,
    progress: float,
) -> LengthController:
    """The controller of this round, as a checkpoint has it (``state``) or at its beginning.

    A share of the steps is done (``progress``); where epochs were added, it is less than it was.
    """
    if state is not None:
        return replace(LengthController.from_dict(state), progress=progress)
    differences = [len(x.chosen_ids) - len(x.rejected_ids) for x in setup.pairs]
    return control.begin_round(differences, beta=setup.config.beta, lengths=response_lengths)


def _tell_plan(setup: Setup, model: nn.Module, steps: list[list[list[int]]]) -> None:
    if len(steps) < _FEW_STEPS and setup.is_main:
        _warn_of_few_steps(setup, len(steps))
    if not setup.progress:
        return
    print(trainable_share(model))
    print(f"loss: {setup.config.told_loss}")
    batches = list(chain.from_iterable(steps))
    max_tokens = setup.config.max_tokens
    fill = sum(map(setup.tokens, batches)) / (len(batches) * max_tokens)
    print(
        f"{len(setup.pairs)} {setup.noun}{' (two of each pair)' if setup.unpaired else ''}, "
        f"{setup.layout}: {len(steps)} steps in {len(batches)} "
        f"micro-batches that fill {fill:.0%} of max_tokens={max_tokens}"
    )


def _warn_of_few_steps(setup: Setup, steps: int) -> None:
    config, pairs = setup.config, len(setup.pairs)
    smaller = pairs // math.ceil(_FEW_STEPS / config.num_train_epochs)
    way = f"a smaller batch_size, as {smaller}, or " if smaller else ""
    _log.warning(
        "%d %s with batch_size=%d and num_train_epochs=%d make %d optimizer %s, too few to "
        "learn much: a step moves no weight by more than about learning_rate=%g. Set %smore "
        "num_train_epochs",
        pairs, setup.noun, config.batch_size, config.num_train_epochs, steps,
        "steps" if steps > 1 else "step", config.learning_rate, way,
    )  # fmt: skip


def _save(
    setup: Setup,
    model: Any,
    start: Any,
    tokenizer: Any,
    control: LengthController | None,
    steps: int,
) -> None:
    """Leave the policy, and the state of alpha=auto; all processes call it."""
    if control is not None and setup.is_main:
        write_json_atomic(setup.out / CONTROL, control.to_dict(), checksum=True)
    setup.engine.save_policy(model, start, setup.config, tokenizer, setup.out)
    if setup.is_main:
        note_finished(setup, steps)


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """On a GPU, deterministic algorithms where there are any (attention's backward is one)."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _optimizer(model: nn.Module, config: TrainConfig, steps: int) -> tuple[Any, Any]:
    """AdamW, and the schedule of its learning rate."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    return optimizer, _cosine(optimizer, config, steps)


def _cosine(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> Any:
    """Linear warm-up to the peak, then half a cosine.

    The first step is at ``peak / warmup`` rather than at zero, so that no step is wasted and a run
    of a single step trains.
    """
    warmup = min(math.ceil(config.warmup_ratio * steps), steps - 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
