"""One round of training: pairs in, a policy in Hugging Face format out.

The reference is the policy at the start.  Its log-probs are computed once, on the packed rows of
the first epoch and by the instructions that training uses, so at ``alpha = 0`` the first loss is
log 2 to the bit.  Then every optimizer step takes ``batch_size`` pairs, split into packed
micro-batches of at most ``max_tokens`` tokens; the loss is the mean over the step's pairs on all
processes, however they were packed.

A run that was interrupted goes on from its last checkpoint and ends in the same weights.
"""

import gc
import hashlib
import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdpo import attention, head
from fastdpo.batch import PackedPairs, TokenizedPair, pack_pairs, plan_batches, plan_steps
from fastdpo.checkpoint import atomic_directory, load_checkpoint, save_checkpoint
from fastdpo.metrics import MetricsLog, read_metrics
from fastdpo.models import ModelError, load_causal_lm, save_policy
from fastdpo.objectives import lr_dpo
from fastdpo.ops import PreferenceLoss, linear_preference_loss
from fastdpo.storage import read_json, write_json_atomic


class ConfigError(ValueError):
    """An option with an impossible value."""


@dataclass
class TrainingConfig:
    """Hyper-parameters of a round; names are TRL's where TRL has them.

    Attributes:
        beta: strength of the KL penalty.
        alpha: length penalty per token, not multiplied by beta; 0 is plain DPO.
        learning_rate: peak of the cosine schedule.
        warmup_ratio: share of the steps that warm up linearly.
        weight_decay: AdamW's.
        max_grad_norm: gradient norm that is clipped to.
        num_train_epochs: passes over the pairs.
        batch_size: pairs of an optimizer step, over all processes and micro-batches.
        max_length: tokens of prompt and response kept, from the start.
        max_tokens: packed tokens of a micro-batch; at least 2 * max_length.
        gradient_checkpointing: recompute activations in the backward.
        bf16: compute in bf16 under autocast; weights and optimizer stay fp32.
        save_steps: optimizer steps between checkpoints.
        workspace_mib: bound on the head's tiles and stash; default 1024 on a GPU, 256 on a CPU.
        seed: order of the pairs.
    """

    beta: float = 0.1
    alpha: float = 0.01
    learning_rate: float = 1e-6
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    num_train_epochs: int = 1
    batch_size: int = 32
    max_length: int = 1024
    max_tokens: int = 4096
    gradient_checkpointing: bool = True
    bf16: bool = True
    save_steps: int = 50
    workspace_mib: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("beta", "learning_rate", "max_grad_norm"):
            require(self, name, getattr(self, name) > 0, "> 0")
        for name in ("num_train_epochs", "batch_size", "save_steps"):
            require(self, name, getattr(self, name) >= 1, ">= 1")
        for name in ("weight_decay", "seed"):
            require(self, name, getattr(self, name) >= 0, ">= 0")
        require(self, "alpha", math.isfinite(self.alpha), "finite")
        require(self, "warmup_ratio", 0 <= self.warmup_ratio <= 1, "in [0, 1]")
        require(self, "max_length", self.max_length >= 2, ">= 2 (a prompt and a response token)")
        require(
            self,
            "max_tokens",
            self.max_tokens >= 2 * self.max_length,
            f">= 2 * max_length = {2 * self.max_length}, so that any pair fits a micro-batch",
        )
        if self.workspace_mib is not None:
            require(self, "workspace_mib", self.workspace_mib > 0, "> 0")


def require(config: Any, name: str, holds: bool, wanted: str) -> None:
    """Raise a `ConfigError` unless the option holds; NaN and infinity never do."""
    value = getattr(config, name)
    finite = not isinstance(value, float) or math.isfinite(value)
    if not (holds and finite):
        raise ConfigError(f"{name}={value} must be {wanted}")


def packed_loss(
    model: nn.Module,
    batch: PackedPairs,
    ref_logp_S: Tensor,
    *,
    beta: float,
    alpha: float,
    num_pairs: float | None = None,
    workspace_mib: float | None = None,
) -> PreferenceLoss:
    """Length-regularized DPO loss of a packed batch under a model prepared by `prepare_model`."""

    def loss(h_TD: Tensor, **parameters: Any) -> PreferenceLoss:
        return linear_preference_loss(
            h_TD,
            target_N=batch.target_N,
            bounds_S1=batch.bounds_S1,
            ref_logp_S=ref_logp_S,
            objective=lr_dpo(beta, alpha),
            rows_N=batch.rows_N,
            num_pairs=num_pairs,
            workspace_mib=workspace_mib,
            **parameters,
        )

    return head.packed_forward(model, batch, loss)


def prepare_model(model: nn.Module, *, gradient_checkpointing: bool = False) -> nn.Module:
    """Packed attention, the fused head, no dropout, in training mode.

    Raises:
        ModelError: the model cannot keep packed pairs apart, has a head that the fused one does not
            reproduce, or is not deterministic.
    """

    def body(*packed: Tensor) -> Tensor:
        return head.hidden_states(model, *packed)

    try:
        head.attach(model)
        attention.use_packed_attention(model)
        attention.check_isolation(model.eval(), body)
        head.check(model)
    except ValueError as error:
        raise ModelError(str(error)) from error
    _disable_dropout(model)
    if gradient_checkpointing:
        # transformers renames it between 5.0 and 6.0
        new = getattr(model, "activation_checkpointing_enable", None)
        (new or model.gradient_checkpointing_enable)()  # type: ignore[operator]
    model.train()
    with torch.no_grad():
        probe = attention.probe(model)
        if not torch.equal(body(*probe), body(*probe)):
            raise ModelError(
                f"{type(model).__name__} gives two forward passes different hidden states: it has "
                "noise or dropout that cannot be switched off; policy and reference would differ"
            )
    return model


def _disable_dropout(model: nn.Module) -> None:
    """Zero every dropout, also those that models keep as plain numbers (attention, layerdrop)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)


def check_model(name: str, tokenizer: Any, max_length: int) -> None:
    """Refuse a model that `train` would refuse, before samples are drawn for it."""
    model = prepare_model(load_causal_lm(name))
    _check_range(model, len(tokenizer) - 1, max_length, "the tokenizer's", "max_length")


def _check_range(model: nn.Module, token: int, length: int, whose: str, what: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if token >= rows:
        raise ModelError(
            f"{whose} token ids go up to {token}, but {type(model).__name__} has {rows} "
            "embeddings; use the tokenizer that belongs to the model"
        )
    positions = getattr(model.config, "max_position_embeddings", None)  # type: ignore[union-attr]
    if positions is not None and length > positions:
        raise ModelError(
            f"{what}={length} is over the {positions} positions of {type(model).__name__}; "
            "lower max_length"
        )


def train(
    model_name: str,
    tokenizer: Any,
    pairs: Sequence[TokenizedPair],
    config: TrainingConfig,
    out: Path,
    *,
    progress: bool = True,
) -> dict[str, float]:
    """Train a policy on pairs and leave it in ``out/policy``.

    Args:
        model_name: folder or hub name of the start, which is also the reference.
        tokenizer: saved beside the policy.
        pairs: tokenized pairs, none longer than ``config.max_tokens`` packed tokens.
        out: gets ``ref_logps/``, ``checkpoint/``, ``metrics/`` and ``policy/``.

    Returns:
        The metrics of all steps, averaged over pairs.

    Raises:
        ModelError: the model cannot be trained on packed pairs, or the loss left the finite range.
    """
    return _Round(model_name, tokenizer, pairs, config, Path(out), progress).run()


class _Round:
    """The state of one round; `run` reads from top to bottom."""

    def __init__(
        self,
        model_name: str,
        tokenizer: Any,
        pairs: Sequence[TokenizedPair],
        config: TrainingConfig,
        out: Path,
        progress: bool,
    ) -> None:
        from accelerate import Accelerator

        # Its precision belongs to the process, so autocast is entered here instead (see _loss).
        self.accelerator = _check_accelerator(Accelerator())
        self.model_name, self.tokenizer, self.config, self.out = model_name, tokenizer, config, out
        self.pairs = pairs
        self.lengths = [pair.num_tokens for pair in pairs]
        self.progress = progress and self.accelerator.is_main_process

    def run(self) -> dict[str, float]:
        self._claim_folder()
        if (self.out / "policy").is_dir():
            return _mean_metrics(self.out / "metrics" / "metrics.jsonl")
        config, accelerator = self.config, self.accelerator
        steps = list(chain.from_iterable(map(self._plan, range(config.num_train_epochs))))
        model = prepare_model(
            load_causal_lm(self.model_name), gradient_checkpointing=config.gradient_checkpointing
        )
        sides = [
            pair.prompt_ids + x for pair in self.pairs for x in (pair.chosen_ids, pair.rejected_ids)
        ]
        longest = max(map(len, sides))
        _check_range(
            model, max(map(max, sides)), longest, "the pairs'", "a response with its prompt"
        )
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        scheduler = _cosine(optimizer, config, len(steps))
        model, optimizer = accelerator.prepare(model, optimizer)
        ref_logp_P2 = self._reference(model)
        checkpoints = self.out / "checkpoint"
        plain = accelerator.unwrap_model(model)
        done = load_checkpoint(checkpoints, plain, optimizer.optimizer, scheduler)
        log = MetricsLog(self.out / "metrics", done) if accelerator.is_main_process else None
        bar = tqdm(total=len(steps), initial=done, desc="train", disable=not self.progress)
        for index in range(done, len(steps)):
            row = self._step(model, optimizer, steps[index], ref_logp_P2)
            row["learning_rate"] = scheduler.get_last_lr()[0]
            scheduler.step()
            if log is not None:
                log.add({"step": index + 1, **row})
            bar.set_postfix(loss=f"{row['loss']:.4f}", margin=f"{row['rewards/margins']:.4f}")
            bar.update()
            due = (index + 1) % config.save_steps == 0 or index + 1 == len(steps)
            if due and accelerator.is_main_process:
                save_checkpoint(checkpoints, index + 1, plain, optimizer.optimizer, scheduler)
        bar.close()
        if log is not None:
            log.close()
            save_policy(plain, self.tokenizer, self.out / "policy")
        accelerator.wait_for_everyone()
        del model, plain, optimizer, scheduler  # the patched forwards are a cycle
        gc.collect()
        return _mean_metrics(self.out / "metrics" / "metrics.jsonl")

    def _claim_folder(self) -> None:
        """Write what this run is, or refuse a folder that holds another one."""
        names = {field.name for field in fields(TrainingConfig)} - {"save_steps"}
        run = {name: value for name, value in asdict(self.config).items() if name in names}
        run |= {"model": str(self.model_name), "pairs": _digest(self.pairs)}
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
        """Micro-batches of pair indices for each step of an epoch, of this process."""
        config, world = self.config, self.accelerator.num_processes
        steps = plan_steps(
            self.lengths,
            batch_pairs=config.batch_size,
            max_tokens=config.max_tokens,
            seed=config.seed,
            epoch=epoch,
        )
        if world == 1:
            return steps
        own = []
        for step in steps:
            mine = sorted(chain.from_iterable(step))[self.accelerator.process_index :: world]
            if not mine:
                raise ConfigError(
                    f"a step of {sum(map(len, step))} pairs leaves one of {world} processes "
                    "without a pair; use fewer processes or more pairs"
                )
            plan = plan_batches([self.lengths[i] for i in mine], max_tokens=config.max_tokens)
            own.append([[mine[i] for i in batch] for batch in plan])
        return own

    def _batch(self, index: list[int]) -> PackedPairs:
        batch = pack_pairs([self.pairs[i] for i in index], index)
        return batch.to(self.accelerator.device)

    def _loss(
        self,
        model: nn.Module,
        batch: PackedPairs,
        ref_logp_S: Tensor,
        num_pairs: float | None = None,
    ) -> PreferenceLoss:
        config = self.config
        with torch.autocast(batch.target_N.device.type, torch.bfloat16, enabled=config.bf16):
            return packed_loss(
                model,
                batch,
                ref_logp_S,
                beta=config.beta,
                alpha=config.alpha,
                num_pairs=num_pairs,
                workspace_mib=config.workspace_mib,
            )

    def _reference(self, model: nn.Module) -> Tensor:
        """Log-prob sums of each pair under the reference, (pairs, 2) fp64, kept on disk."""
        from accelerate.utils import gather_object
        from safetensors.torch import load_file, save_file

        folder = self.out / "ref_logps"
        if folder.is_dir():
            return load_file(folder / "ref_logps.safetensors")["logp_P2"]
        found: list[tuple[int, list[float]]] = []
        batches = list(chain.from_iterable(self._plan(epoch=0)))
        for index in tqdm(batches, desc="reference", disable=not self.progress):
            batch = self._batch(index)
            zeros_S = torch.zeros(2 * len(index), dtype=torch.float64, device=batch.target_N.device)
            with torch.no_grad():
                result = self._loss(model, batch, zeros_S)
            found += zip(index, result.logp_S.view(-1, 2).tolist())
        found = gather_object(found)
        logp_P2 = torch.full((len(self.pairs), 2), float("nan"), dtype=torch.float64)
        for pair, sums in found:
            logp_P2[pair] = torch.tensor(sums, dtype=torch.float64)
        bad = logp_P2.isfinite().all(1).logical_not().nonzero()
        if len(bad):
            raise ModelError(
                f"the reference {self.model_name!r} gives pair {int(bad[0])} a log-prob that is "
                "not finite; the model is broken or overflows in bf16 (try bf16=false)"
            )
        if self.accelerator.is_main_process:
            with atomic_directory(folder) as scratch:
                save_file({"logp_P2": logp_P2}, scratch / "ref_logps.safetensors")
        self.accelerator.wait_for_everyone()
        return logp_P2

    def _step(
        self, model: nn.Module, optimizer: Any, batches: list[list[int]], ref_logp_P2: Tensor
    ) -> dict[str, float]:
        """One optimizer step over this process's micro-batches; metrics averaged over all pairs."""
        config, accelerator = self.config, self.accelerator
        started = time.perf_counter()
        own_pairs = sum(map(len, batches))
        own_tokens = sum(self.lengths[i] for index in batches for i in index)
        counts = torch.tensor([own_pairs, own_tokens], device=accelerator.device)
        step_pairs, all_tokens = accelerator.reduce(counts, "sum").tolist()  # type: ignore[union-attr]
        sums: dict[str, Tensor] = {}
        for position, index in enumerate(batches):
            batch = self._batch(index)
            ref_logp_S = ref_logp_P2[index].reshape(-1).to(batch.target_N.device)
            last = position == len(batches) - 1
            with accelerator.no_sync(model) if not last else nullcontext():
                # Gradients are averaged over processes, so each divides by its share.
                share = step_pairs / accelerator.num_processes
                result = self._loss(model, batch, ref_logp_S, num_pairs=share)
                accelerator.backward(result.loss)
            sums["loss"] = sums.get("loss", 0.0) + result.loss.detach()
            for name, value in result.metrics.items():
                sums[name] = sums.get(name, 0.0) + value * (len(index) / own_pairs)
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
        speed = {"num_tokens": all_tokens, "pairs_per_second": step_pairs / seconds}
        return {**row, "pairs": step_pairs, **speed}

    def _average(self, row: dict[str, float], own: int, total: int) -> dict[str, float]:
        """Weight each process's metrics by its pairs."""
        if self.accelerator.num_processes == 1:
            return row
        share = own / total
        # The loss is already scaled by the processes; its plain mean is the step's.
        weights = {"loss": 1 / self.accelerator.num_processes}
        values = torch.tensor([value * weights.get(name, share) for name, value in row.items()])
        values = self.accelerator.reduce(values.to(self.accelerator.device), "sum")
        return dict(zip(row, values.tolist()))  # type: ignore[union-attr]


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


def _cosine(optimizer: torch.optim.Optimizer, config: TrainingConfig, steps: int) -> Any:
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


def _digest(pairs: Sequence[TokenizedPair]) -> str:
    """Which tokens reference log-probs belong to."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]).encode())
    return digest.hexdigest()


def _mean_metrics(path: Path) -> dict[str, float]:
    """Metrics of all steps, averaged over pairs."""
    rows = read_metrics(path)
    total = sum(row["pairs"] for row in rows)
    names = [name for name in rows[0] if name not in {"step", "pairs"}] if rows else []
    return {name: sum(row[name] * row["pairs"] for row in rows) / total for name in names}
