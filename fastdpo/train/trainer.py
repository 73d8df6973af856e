"""One round of training: pairs in, a policy in Hugging Face format out.

The reference is the policy at the start.  Its log-probs are computed once, on the packed rows of
the first epoch and by the instructions that training uses, so at ``alpha = 0`` the first loss is
log 2 to the bit (to rounding where an earlier run packed the pairs otherwise).  Then every
optimizer step takes ``batch_size`` pairs, split into packed micro-batches of at most ``max_tokens``
tokens; the loss is the mean over the step's pairs on all processes, however they were packed.

A run that was interrupted goes on from its last checkpoint and ends in the same weights.
"""

import copy
import gc
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdpo.data.batch import (
    Layout,
    PackedPairs,
    TokenizedPair,
    pack_pairs,
    plan_batches,
    plan_steps,
    share_step,
)
from fastdpo.data.budget import counted, fit_to_budget
from fastdpo.errors import ConfigError, ModelError
from fastdpo.loss.ops import PreferenceLoss
from fastdpo.model import balance
from fastdpo.model.adapters import (
    add_lora,
    load_4bit,
    merged,
    merged_in_place,
    reference_mode,
    save_adapter,
    trainable_share,
)
from fastdpo.model.attention import has_flash_attn, use_own_attention
from fastdpo.model.load import (
    check_generation_config,
    check_start,
    load_causal_lm,
    refuse_quantized,
    save_policy,
    weights_digest,
)
from fastdpo.model.prepare import check_range, layout_of, packed_loss, prepare_model
from fastdpo.storage import read_json, write_json_atomic
from fastdpo.train import ref_logps
from fastdpo.train.checkpoint import load_checkpoint, save_checkpoint
from fastdpo.train.config import FREE, TrainConfig, check_control
from fastdpo.train.control import LengthController
from fastdpo.train.metrics import MetricsLog, read_metrics
from fastdpo.train.ref_logps import cache_key, pairs_digest

_log = logging.getLogger(__name__)
CONTROL = "control.json"  # the state of alpha=auto at the end
_SUMS = ("loss", "preference_loss")  # metrics that are a step's share of a sum over pairs
_COVARIANCE = "covariance"  # of margins and lengths, for alpha=auto
FITTED = "fitted.json"  # how many pairs were too long


def check_model(
    name: str,
    tokenizer: Any,
    config: TrainConfig,
    tokens: Iterable[tuple[str, Sequence[int]]],
) -> None:
    """Refuse a model or options that `train` would refuse, before samples are drawn for it.

    Args:
        tokens: what training will see beside samples, with its places. It is looked at only where
            the tokenizer has tokens that the model has not: nothing is wrong if none occurs.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = prepare_policy(load_start(name, config, device), config)
    check_range(model, 0, config.max_length, "", "max_length")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        for where, ids in tokens:
            check_range(model, max(ids, default=0), 0, f"{where}: the", "")


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


def with_adapters(model: Any, config: TrainConfig) -> Any:
    """The model, or with ``use_peft`` its new adapters around it."""
    if not config.use_peft:
        return model
    return add_lora(
        model,
        r=config.lora_r,
        alpha=config.lora_alpha,
        target_modules=config.lora_target_modules,
        target_parameters=config.lora_target_parameters,
        seed=config.seed,
    )


def prepare_policy(model: Any, config: TrainConfig) -> nn.Module:
    """Everything that the options patch onto a model: adapters, layout, head, memory."""
    model = with_adapters(model, config)
    if config.dtype == "bfloat16" and not config.use_peft:
        _log.warning("dtype=bfloat16 without use_peft: steps under 1/500 of a weight are lost")
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(f"this {type(model).__name__} is frozen: no parameter requires_grad")
    added = balance.coefficient(model, config.router_aux_loss_coef)
    model = prepare_model(
        model,
        layout=config.layout,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=config.bf16,
        impl=config.impl,
        activation_offloading=config.activation_offloading,
        mlp_tile_tokens=config.mlp_tile_tokens,
        use_liger_kernel=config.use_liger_kernel,
    )
    if added:
        balance.check_balance(model)
    return model


def train(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[TokenizedPair],
    config: TrainConfig,
    out: Path,
    *,
    reference: str | Path | None = None,
    control: LengthController | None = None,
    lengths: Sequence[Sequence[int]] | None = None,
    progress: bool = True,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Train a policy on pairs and leave it in ``out/policy``.

    Args:
        model: folder or hub name of the start, which is also the reference; or a transformers model
            in memory, which is trained in place while its reference is what it was.  With adapters
            it ends merged, in fp32 on the CPU.
        tokenizer: saved beside the policy.
        pairs: tokenized pairs; ``config.overlong`` says what becomes of those that do not fit
            ``config.max_tokens``.
        out: gets ``ref_logps/``, ``checkpoint/``, ``metrics/`` and ``policy/``; with adapters also
            ``adapter/``.
        reference: folder or hub name of another reference than the start.
        control, lengths: of ``alpha="auto"``: the state that the round before left in
            ``control.json`` (default: none before), and tokens of each response sampled from the
            start, a list a prompt (default: no samples, the length is held where it is).
        on_step: called after each optimizer step with its metrics.

    Returns:
        The metrics of all steps, averaged over pairs.

    Raises:
        ModelError: the model cannot be trained on pairs, or the loss left the finite range.
        DataError: a pair does not fit, and ``config.overlong`` is "stop".
        ConfigError: ``out`` holds another run, or the options do not go together.
    """
    check_control(config, reference)
    return _Round(
        model, tokenizer, pairs, config, Path(out), reference, control, lengths, progress, on_step
    ).run()


class _Round:
    """The state of one round; `run` reads from top to bottom."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pairs: Sequence[TokenizedPair],
        config: TrainConfig,
        out: Path,
        reference: str | Path | None,
        control: LengthController | None,
        lengths: Sequence[Sequence[int]] | None,
        progress: bool,
        on_step: Callable[[dict[str, float]], None] | None,
    ) -> None:
        from accelerate import Accelerator

        # Its precision belongs to the process, so autocast is entered here instead (see _loss).
        self.accelerator = _check_accelerator(Accelerator())
        self.start, self.tokenizer, self.config, self.out = model, tokenizer, config, out
        self.pairs, self.other_reference, self.on_step = pairs, reference, on_step
        self.progress = progress and self.accelerator.is_main_process
        self.control = control or LengthController(config.target_length)
        self.response_lengths = lengths
        self.too_long = {"pairs_dropped": 0, "pairs_truncated": 0}
        self.layout: Any = None
        self.alpha = 0.0 if config.alpha == "auto" else float(config.alpha)

    def run(self) -> dict[str, float]:
        with _repeatable(self.accelerator.device):
            return self._run()

    def _run(self) -> dict[str, float]:
        self._claim_folder()
        if (self.out / "policy").is_dir():
            if not isinstance(self.start, str | Path):
                raise ConfigError(f"{self.out} holds a finished run; load its policy instead")
            return self._metrics()
        config, accelerator = self.config, self.accelerator
        reference, ref_logp_P2 = self._load_reference(), None
        if reference is not None and config.precompute_ref_log_probs:
            ref_logp_P2, reference = self._reference(reference), None
        model = load_start(self.start, config, accelerator.device)
        if self.other_reference is None:
            # Of the start itself, before there are adapters.
            self.weights = weights_digest(model) if accelerator.is_main_process else ""
        model = prepare_policy(model, config)
        self.aux_loss_coef = balance.coefficient(model, config.router_aux_loss_coef)
        self._fit_pairs(model)
        steps = list(chain.from_iterable(map(self._plan, range(config.num_train_epochs))))
        self._tell_plan(model, steps)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        scheduler = _cosine(optimizer, config, len(steps))
        start_is_reference = self.other_reference is None
        if start_is_reference and not config.precompute_ref_log_probs and not config.use_peft:
            reference = copy.deepcopy(model).requires_grad_(False).eval()
        model, optimizer = accelerator.prepare(model, optimizer)
        if start_is_reference and config.precompute_ref_log_probs:
            ref_logp_P2 = self._reference(model)
        checkpoints = self.out / "checkpoint"
        plain = accelerator.unwrap_model(model)
        done, state = load_checkpoint(checkpoints, plain, optimizer.optimizer, scheduler)
        self._begin_control(state)
        log = MetricsLog(self.out / "metrics", done) if accelerator.is_main_process else None
        bar = tqdm(total=len(steps), initial=done, desc="train", disable=not self.progress)
        for index in range(done, len(steps)):
            row = self._step(model, optimizer, steps[index], ref_logp_P2, reference)
            row |= self._after_step(row, (index + 1) / len(steps))
            row["learning_rate"] = scheduler.get_last_lr()[0]
            scheduler.step()
            if log is not None:
                log.add({"step": index + 1, **row})
            bar.set_postfix(loss=f"{row['loss']:.4f}", margin=f"{row['rewards/margins']:.4f}")
            bar.update()
            due = (index + 1) % config.save_steps == 0 or index + 1 == len(steps)
            if due and accelerator.is_main_process:
                save_checkpoint(
                    checkpoints,
                    index + 1,
                    plain,
                    optimizer.optimizer,
                    scheduler,
                    extra=self.control.to_dict() if config.alpha == "auto" else None,
                )
            if self.on_step is not None:
                self.on_step(row)
        bar.close()
        if log is not None:
            log.close()
            if config.alpha == "auto":
                write_json_atomic(self.out / CONTROL, self.control.to_dict(), checksum=True)
            self._save(plain)
        accelerator.wait_for_everyone()
        if not isinstance(self.start, str | Path) and not config.use_peft:
            use_own_attention(plain.eval())  # the caller's model generates again
        del model, plain, optimizer, scheduler, reference  # the patched forwards are a cycle
        gc.collect()
        return self._metrics()

    def _metrics(self) -> dict[str, float]:
        """Of a finished run: means over its pairs, and how many of them were too long."""
        means = _mean_metrics(self.out / "metrics" / "metrics.jsonl")
        return {**means, **read_json(self.out / FITTED)}

    def _begin_control(self, state: dict[str, Any] | None) -> None:
        """Where alpha is found on the way: the controller of this round, or as it was left."""
        config = self.config
        if config.alpha != "auto":
            return
        if state is not None:
            self.control = LengthController.from_dict(state)
        else:
            differences = [len(x.chosen_ids) - len(x.rejected_ids) for x in self.pairs]
            self.control = self.control.begin_round(
                differences, beta=config.beta, lengths=self.response_lengths
            )
        self.alpha = self.control.alpha

    def _after_step(self, row: dict[str, float], progress: float) -> dict[str, float]:
        """Let a step's pairs correct alpha; returns what the step was done with."""
        covariance = row.pop(_COVARIANCE)
        if self.config.alpha != "auto":
            return {}
        facts = self.control.step_facts()
        self.control = self.control.after_step(covariance, progress)
        self.alpha = self.control.alpha
        return facts

    def _load_reference(self) -> nn.Module | None:
        """The reference where it is another model than the start, ready for the same pairs."""
        if self.other_reference is None:
            return None
        off: dict[str, Any] = {
            field.name: field.default
            for field in fields(TrainConfig)
            if field.name in ("use_peft", "load_in_4bit") or field.name.startswith("lora_")
        }
        off["router_aux_loss_coef"] = 0.0
        config = replace(self.config, **off)
        device = self.accelerator.device
        model = load_start(self.other_reference, config, device)
        self.weights = weights_digest(model) if self.accelerator.is_main_process else ""
        model = prepare_policy(model, config).requires_grad_(False).eval()
        self._fit_pairs(model)
        return model

    def _fit_pairs(self, model: nn.Module) -> None:
        """Bring every pair within the budget, by the rule of the config."""
        config, before = self.config, self.layout
        self.layout = layout_of(model)
        fitted = fit_to_budget(
            self.pairs, config.max_tokens, layout=self.layout, overlong=config.overlong
        )
        changed = bool(fitted.dropped_at or fitted.truncated_at)
        if before is not None and before.key != self.layout.key:
            self._check_reference_layout(before, changed)
        if self.accelerator.is_main_process:
            # Called twice where the reference is another model; what fits it fits the policy.
            self.too_long["pairs_dropped"] += len(fitted.dropped_at)
            self.too_long["pairs_truncated"] += len(fitted.truncated_at)
            write_json_atomic(self.out / FITTED, self.too_long)
        if self.accelerator.is_main_process and changed:
            print(
                f"over max_tokens={config.max_tokens}: {counted(fitted.dropped_at)} dropped, "
                f"{counted(fitted.truncated_at)} truncated"
            )
        self.pairs = fitted.pairs
        self.lengths = [pair.num_tokens(self.layout) for pair in self.pairs]
        sides = [
            pair.prompt_ids + x for pair in self.pairs for x in (pair.chosen_ids, pair.rejected_ids)
        ]
        what = "a response with its prompt"
        check_range(model, max(map(max, sides)), max(map(len, sides)), "the pairs'", what)

    def _check_reference_layout(self, reference: Layout, changed: bool) -> None:
        """Refuse another reference that computed other pairs than the policy gets, or would have
        to compute them in a layout that is not its own."""
        if changed or not self.config.precompute_ref_log_probs:
            raise ConfigError(
                f"reference={self.other_reference} computes pairs as {reference.key} and the model "
                f"as {self.layout.key}, which "
                + (
                    f"fit max_tokens={self.config.max_tokens} otherwise; raise max_tokens, or set "
                    "layout=padded"
                    if changed
                    else "one batch cannot be; set precompute_ref_log_probs=true"
                )
            )

    def _tell_plan(self, model: nn.Module, steps: list[list[list[int]]]) -> None:
        if not self.progress:
            return
        print(trainable_share(model))
        batches = [index for step in steps for index in step]
        fill = sum(map(self._tokens, batches)) / (len(batches) * self.config.max_tokens)
        print(
            f"{len(self.pairs)} pairs, {self.layout}: {len(steps)} steps in {len(batches)} "
            f"micro-batches that fill {fill:.0%} of max_tokens={self.config.max_tokens}"
        )

    def _save(self, model: nn.Module) -> None:
        """Leave the policy as a whole model; adapters are merged in fp32 and kept beside it.

        Merged in bf16, most of a small change would be rounded away.
        """
        config, whole = self.config, model
        if config.use_peft:
            save_adapter(model, self.out / "adapter")
            # Neither way needs room for an fp32 model on the device.
            if isinstance(self.start, str | Path):
                whole = merged(str(self.start), self.out / "adapter", torch.float32)
            else:
                whole = merged_in_place(model.cpu(), torch.float32)
        start: Any = self.start
        start = start if isinstance(start, str | Path) else start.name_or_path
        save_policy(whole, self.tokenizer, self.out / "policy", start=str(start))

    def _claim_folder(self) -> None:
        """Write what this run is, or refuse a folder that holds another one."""
        names = {field.name for field in fields(TrainConfig)} - FREE
        run = {name: value for name, value in asdict(self.config).items() if name in names}
        named = isinstance(self.start, str | Path)
        run["model"] = str(self.start) if named else weights_digest(self.start)
        run["pairs"] = pairs_digest(self.pairs)
        run["reference"] = None if self.other_reference is None else str(self.other_reference)
        path = self.out / "run.json"
        if self.accelerator.is_main_process and not path.exists():
            write_json_atomic(path, run)
        # Every process waits, whether or not it could already see the file.
        self.accelerator.wait_for_everyone()
        before = read_json(path)
        for name, value in run.items():
            if before.get(name) != value:
                what = (
                    "other pairs" if name == "pairs" else f"{name}={before.get(name)}, not {value}"
                )
                raise ConfigError(
                    f"{self.out} holds a run with {what}; give the same options and data to go on, "
                    "or another output_dir to start anew"
                )

    def _plan(self, epoch: int) -> list[list[list[int]]]:
        """Micro-batches of pair indices for each step of an epoch, of this process.

        It has none in a step of fewer pairs than processes.
        """
        config, world = self.config, self.accelerator.num_processes
        fit = {"max_tokens": config.max_tokens, "padded": self.layout == "padded"}
        steps = plan_steps(
            self.lengths, batch_pairs=config.batch_size, seed=config.seed, epoch=epoch, **fit
        )
        if world == 1:
            return steps
        own = []
        for step in steps:
            pairs = list(chain.from_iterable(step))
            mine = share_step(pairs, self.lengths, world)[self.accelerator.process_index]
            plan = plan_batches([self.lengths[i] for i in mine], **fit)
            own.append([[mine[i] for i in batch] for batch in plan])
        return own

    def _batch(self, index: list[int]) -> PackedPairs:
        batch = pack_pairs([self.pairs[i] for i in index], index, layout=self.layout)
        return batch.to(self.accelerator.device)

    def _loss(
        self,
        model: nn.Module,
        batch: PackedPairs,
        ref_logp_S: Tensor,
        num_pairs: float | None = None,
        router_aux_loss_coef: float = 0.0,
    ) -> PreferenceLoss:
        config = self.config
        # Its cache would keep a copy of every weight until the loss; each is used once.
        kind = batch.target_N.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=config.bf16, cache_enabled=False):
            return packed_loss(
                model,
                batch,
                ref_logp_S,
                beta=config.beta,
                alpha=self.alpha,
                num_pairs=num_pairs,
                workspace_mib=config.workspace_mib,
                impl=config.impl,
                router_aux_loss_coef=router_aux_loss_coef,
            )

    def _reference_logp(self, model: nn.Module, batch: PackedPairs) -> Tensor:
        """Log-prob sums of a batch under the reference, on the route that training takes."""
        zeros_S = torch.zeros(
            2 * batch.num_pairs, dtype=torch.float64, device=batch.target_N.device
        )
        plain = self.accelerator.unwrap_model(model)
        adapters_off = self.config.use_peft and self.other_reference is None
        with torch.no_grad(), reference_mode(plain) if adapters_off else nullcontext():
            return self._loss(plain, batch, zeros_S).logp_S

    def _reference(self, model: nn.Module) -> Tensor:
        """Log-prob sums of each pair under the reference, (pairs, 2) fp64, kept on disk."""
        from accelerate.utils import gather_object
        from safetensors import safe_open

        config, accelerator = self.config, self.accelerator
        own, logp_P2 = self.out / "ref_logps" / "ref_logps.safetensors", None
        if self.layout.classes:
            self.weights = cache_key(weights=self.weights, layout=self.layout.key)
        if accelerator.is_main_process:
            logp_P2 = ref_logps.load(own, len(self.pairs), self.weights)
        [known, *_] = gather_object([logp_P2 is not None])
        if not known and config.reference_cache is not None:
            device = accelerator.device.type
            key = cache_key(
                weights=self.weights,
                pairs=pairs_digest(self.pairs),
                layout=self.layout.key,
                device=[device, has_flash_attn() if device == "cuda" else False],
                bf16=config.bf16,
                impl=config.impl,
                liger=config.use_liger_kernel,
            )
            shared = Path(config.reference_cache).expanduser() / f"{key}.safetensors"
            if accelerator.is_main_process:
                logp_P2 = ref_logps.load(shared, len(self.pairs), self.weights)
            [known, *_] = gather_object([logp_P2 is not None])
            if logp_P2 is not None:
                ref_logps.save(own, logp_P2, self.weights)
        if not known:
            logp_P2 = self._compute_reference(model)
            if accelerator.is_main_process:
                ref_logps.save(own, logp_P2, self.weights)
                if config.reference_cache is not None:
                    self._share(shared, logp_P2)
        accelerator.wait_for_everyone()
        if logp_P2 is None:  # every process reads what the first one found
            with safe_open(own, "pt") as file:
                logp_P2 = file.get_tensor("logp_P2")
        return logp_P2

    def _share(self, path: Path, logp_P2: Tensor) -> None:
        try:
            ref_logps.save(path, logp_P2, self.weights)
        except OSError as error:
            _log.warning(
                "reference_cache: %s cannot be written, other runs will not find it: %s",
                path,
                error,
            )

    def _compute_reference(self, model: nn.Module) -> Tensor:
        from accelerate.utils import gather_object

        found: list[tuple[int, list[float]]] = []
        batches = list(chain.from_iterable(self._plan(epoch=0)))
        for index in tqdm(batches, desc="reference", disable=not self.progress):
            logp_S = self._reference_logp(model, self._batch(index))
            found += zip(index, logp_S.view(-1, 2).tolist())
        found = gather_object(found)
        logp_P2 = torch.full((len(self.pairs), 2), float("nan"), dtype=torch.float64)
        for pair, sums in found:
            logp_P2[pair] = torch.tensor(sums, dtype=torch.float64)
        bad = logp_P2.isfinite().all(1).logical_not().nonzero()
        if len(bad):
            raise ModelError(
                f"the reference gives pair {int(bad[0])} ({self.pairs[int(bad[0])].where}) a "
                "log-prob that is not finite; the model is broken or overflows in bf16 (try "
                "bf16=false)"
            )
        return logp_P2

    def _step(
        self,
        model: nn.Module,
        optimizer: Any,
        batches: list[list[int]],
        ref_logp_P2: Tensor | None,
        reference: nn.Module | None,
    ) -> dict[str, float]:
        """One optimizer step over this process's micro-batches; metrics averaged over all pairs.

        The reference is known (``ref_logp_P2``), another model, or ``model`` with adapters off.
        """
        config, accelerator = self.config, self.accelerator
        started = time.perf_counter()
        own_pairs = sum(map(len, batches))
        own_tokens = sum(self._tokens(index) for index in batches)
        routed = sum(map(self._routed, batches))
        counts = torch.tensor(
            [own_pairs, own_tokens, len(batches), routed], device=accelerator.device
        )
        step_pairs, all_tokens, all_batches, all_routed = accelerator.reduce(counts, "sum").tolist()  # type: ignore[union-attr]
        sums: dict[str, Tensor] = {}
        # Every process takes part in the sum of gradients: one without a pair adds zeros to it.
        idle = [] if batches else [[min(range(len(self.pairs)), key=self.lengths.__getitem__)]]
        for position, index in enumerate(batches or idle):
            batch = self._batch(index)
            if ref_logp_P2 is not None:
                ref_logp_S = ref_logp_P2[index].reshape(-1).to(batch.target_N.device)
            else:
                ref_logp_S = self._reference_logp(reference or model, batch)
            last = position == len(batches or idle) - 1
            with accelerator.no_sync(model) if not last else nullcontext():
                # Gradients are averaged over processes, so each divides by its share.
                share = step_pairs / accelerator.num_processes
                # The balancing loss of a step is the mean over its tokens.
                weight = self._routed(index) * accelerator.num_processes / all_routed
                coef = self.aux_loss_coef * weight
                result = self._loss(model, batch, ref_logp_S, share, coef)
                loss = 0.0 * result.loss if idle else result.loss
                accelerator.backward(loss)
            metrics = {"loss": loss.detach(), **result.metrics}
            metrics[_COVARIANCE] = _covariance(result, ref_logp_S)
            of_pairs = len(index) / max(own_pairs, 1)
            for name, value in metrics.items():
                factor = 1.0 if name in _SUMS else weight if name == "aux_loss" else of_pairs
                sums[name] = sums.get(name, 0.0) + value * (0.0 if idle else factor)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        row = {name: float(value) for name, value in sums.items()}
        row["grad_norm"] = float(norm)  # type: ignore[arg-type]
        if not all(map(math.isfinite, row.values())):
            raise ModelError(
                f"training left the finite range (loss {row['loss']}, gradient norm "
                f"{row['grad_norm']}); lower learning_rate ({config.learning_rate}) or set "
                "bf16=false. The last checkpoint is kept"
            )
        optimizer.step()
        optimizer.zero_grad()
        row = self._average(row, own_pairs, step_pairs)
        seconds = time.perf_counter() - started
        speed = {
            "num_tokens": all_tokens,
            "fill_rate": all_tokens / (all_batches * config.max_tokens),
            "pairs_per_second": step_pairs / seconds,
        }
        return {**row, "pairs": step_pairs, **speed}

    def _tokens(self, index: list[int]) -> int:
        """Tokens that a micro-batch computes."""
        lengths = [self.lengths[i] for i in index]
        return len(lengths) * max(lengths) if self.layout == "padded" else sum(lengths)

    def _routed(self, index: list[int]) -> int:
        """Tokens that a micro-batch sends through routers, padding left out."""
        layout = "packed" if self.layout == "padded" else self.layout
        return sum(self.pairs[i].num_tokens(layout) for i in index)

    def _average(self, row: dict[str, float], own: int, total: int) -> dict[str, float]:
        """Weight each process's metrics by its pairs."""
        if self.accelerator.num_processes == 1:
            return row
        share = own / total
        # Losses are already scaled by the processes; their plain mean is the step's.
        weights: dict[str, float] = dict.fromkeys(
            (*_SUMS, "aux_loss"), 1 / self.accelerator.num_processes
        )
        values = torch.tensor([value * weights.get(name, share) for name, value in row.items()])
        values = self.accelerator.reduce(values.to(self.accelerator.device), "sum")
        return dict(zip(row, values.tolist()))  # type: ignore[union-attr]


def _covariance(result: PreferenceLoss, ref_logp_S: Tensor) -> Tensor:
    """Mean over a batch's pairs of the log-ratio margin times the length difference."""
    ratio_P2 = (result.logp_S.detach().double() - ref_logp_S).view(-1, 2)
    lengths_P2 = result.lengths_S.double().view(-1, 2)
    return ((ratio_P2[:, 0] - ratio_P2[:, 1]) * (lengths_P2[:, 0] - lengths_P2[:, 1])).mean()


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


def _check_accelerator(accelerator: Any) -> Any:
    """Refuse launch settings that would change what a step means."""
    from accelerate.utils import DistributedType

    plain = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if accelerator.distributed_type not in plain:
        raise ConfigError(
            f"accelerate is set to {accelerator.distributed_type.value}; each process holds a "
            "whole model here, so launch with --multi_gpu, --cpu or one process"
        )
    if accelerator.mixed_precision != "no":
        raise ConfigError(
            f"accelerate's mixed_precision is {accelerator.mixed_precision!r}; set it to 'no', the "
            "option bf16 says what is computed in bf16"
        )
    accelerator.gradient_accumulation_steps = 1  # micro-batches are accumulated in _step
    return accelerator


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


def _mean_metrics(path: Path) -> dict[str, float]:
    """Metrics of all steps, averaged over pairs."""
    rows = read_metrics(path)
    total = sum(row["pairs"] for row in rows)
    names = [name for name in rows[0] if name not in {"step", "pairs"}] if rows else []
    return {name: sum(row[name] * row["pairs"] for row in rows) / total for name in names}
