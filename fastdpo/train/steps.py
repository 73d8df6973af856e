"""The steps of a round: which pairs a process takes, their loss, and one optimizer step.

A step is the mean over its pairs, however they are packed and on however many processes: each
process takes its share of the pairs, and gradients and metrics are summed over all.
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.data.batch import (
    PackedPairs,
    TokenizedPair,
    pack_pairs,
    padded_tokens,
    plan_batches,
    plan_steps,
    share_step,
)
from fastdpo.errors import ModelError
from fastdpo.loss.ops import PreferenceLoss
from fastdpo.model.adapters import reference_mode
from fastdpo.model.noise import random_state_kept
from fastdpo.model.prepare import packed_loss
from fastdpo.progress import parts
from fastdpo.train.config import TrainConfig

COVARIANCE = "covariance"  # of margins and lengths, for alpha=auto


@dataclass(frozen=True)
class Setup:
    """What stays the same from step to step.

    Attributes:
        accelerator: of accelerate; the processes and their device.
        out: folder of the run.
        reference: folder or hub name of another reference than the start.
        progress: whether this process shows how far it is.
        pairs: all pairs of the round; once a model is known, those that it gets.
        keep_checkpoint: whether the state after the last step is left, for more epochs.
        name: of the pairs, where they are not those of training.
        layout: of the micro-batches; None until a model is known, as are the fields below.
        lengths: tokens of each pair in that layout.
        too_long: how many pairs were dropped and truncated.
        aux_loss_coef: of a mixture's balancing loss; 0 is none.
    """

    accelerator: Any
    config: TrainConfig
    out: Path
    reference: str | Path | None
    progress: bool
    pairs: Sequence[TokenizedPair]
    keep_checkpoint: bool = True
    name: str = ""
    layout: Any = None
    lengths: Sequence[int] = ()
    too_long: dict[str, int] = field(default_factory=dict)
    aux_loss_coef: float = 0.0

    def tokens(self, index: list[int]) -> int:
        """Tokens that a micro-batch of these pairs computes."""
        lengths = [self.lengths[i] for i in index]
        if self.layout != "padded":
            return sum(lengths)
        return padded_tokens(lengths, [self.pairs[i].num_computed for i in index])

    def routed(self, index: list[int]) -> int:
        """Tokens that a micro-batch sends through routers, padding left out."""
        layout = "packed" if self.layout == "padded" else self.layout
        return sum(self.pairs[i].num_tokens(layout) for i in index)

    def batch(self, index: list[int]) -> PackedPairs:
        """The micro-batch of these pairs, on the device."""
        batch = pack_pairs([self.pairs[i] for i in index], index, layout=self.layout)
        return batch.to(self.accelerator.device)


def plan_epoch(setup: Setup, epoch: int) -> list[list[list[int]]]:
    """Micro-batches of pair indices for each step of an epoch, of this process.

    It has none in a step of fewer pairs than processes.
    """
    config, lengths, world = setup.config, setup.lengths, setup.accelerator.num_processes
    fit = {"max_tokens": config.max_tokens, "padded": setup.layout == "padded"}
    counts = [pair.num_computed for pair in setup.pairs]
    size, seed = config.batch_size, config.seed
    steps = plan_steps(lengths, batch_pairs=size, seed=seed, epoch=epoch, sequences=counts, **fit)
    if world == 1:
        return steps
    own = []
    for step in steps:
        pairs = list(chain.from_iterable(step))
        mine = share_step(pairs, lengths, world)[setup.accelerator.process_index]
        of_mine = [lengths[i] for i in mine], [counts[i] for i in mine]
        plan = plan_batches(of_mine[0], sequences=of_mine[1], **fit)
        own.append([[mine[i] for i in batch] for batch in plan])
    return own


def batch_loss(
    setup: Setup, model: nn.Module, batch: PackedPairs, ref_logp_S: Tensor, **options: Any
) -> PreferenceLoss:
    """The loss of a micro-batch; ``options`` are the others of `packed_loss`."""
    config = setup.config
    # Autocast's cache would keep a copy of every weight until the loss; each is used once.
    kind = batch.target_N.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=config.bf16, cache_enabled=False):
        return packed_loss(
            model,
            batch,
            ref_logp_S,
            beta=config.beta,
            workspace_mib=config.workspace_mib,
            impl=config.impl,
            **options,
        )


def reference_logp(setup: Setup, model: nn.Module, batch: PackedPairs) -> Tensor:
    """Log-prob sums of a batch under the reference, on the route that training takes; (S,) fp64.

    ``model`` is the reference, or has adapters that are switched off for it.
    """
    zeros_S = torch.zeros(2 * batch.num_pairs, dtype=torch.float64, device=batch.target_N.device)
    plain = setup.accelerator.unwrap_model(model)
    adapters_off = setup.config.use_peft and setup.reference is None
    with torch.no_grad(), reference_mode(plain) if adapters_off else nullcontext():
        return batch_loss(setup, plain, batch, zeros_S, alpha=0.0).logp_S


def take_step(
    setup: Setup,
    model: nn.Module,
    optimizer: Any,
    batches: list[list[int]],
    alpha: float,
    ref_logp_P2: Tensor | None,
    reference: nn.Module | None,
) -> dict[str, float]:
    """One optimizer step over this process's micro-batches; metrics averaged over all pairs.

    The reference is known (``ref_logp_P2``), another model, or ``model`` with adapters off.

    Raises:
        ModelError: the loss or a gradient is not finite.
    """
    accelerator, started = setup.accelerator, time.perf_counter()
    row, totals = _over_pairs(setup, model, batches, alpha, ref_logp_P2, reference, learn=True)
    step_pairs, all_tokens, all_batches = totals
    norm = accelerator.clip_grad_norm_(model.parameters(), setup.config.max_grad_norm)
    row["grad_norm"] = float(norm)
    if not all(map(math.isfinite, row.values())):
        raise ModelError(
            f"training left the finite range (loss {row['loss']}, gradient norm "
            f"{row['grad_norm']}); lower learning_rate ({setup.config.learning_rate}) or set "
            "bf16=false. The last checkpoint is kept"
        )
    optimizer.step()
    optimizer.zero_grad()
    return {
        **row,
        "pairs": step_pairs,
        "num_tokens": all_tokens,
        "fill_rate": all_tokens / (all_batches * setup.config.max_tokens),
        "pairs_per_second": step_pairs / (time.perf_counter() - started),
    }


def measure(
    setup: Setup,
    model: nn.Module,
    batches: list[list[int]],
    alpha: float,
    ref_logp_P2: Tensor | None,
    reference: nn.Module | None,
) -> dict[str, float]:
    """The metrics of `take_step`, without the step, and the seconds it took; names with "eval_"."""
    started, plain = time.perf_counter(), setup.accelerator.unwrap_model(model)
    with random_state_kept():  # a model may draw, in training mode, to skip a layer
        row, totals = _over_pairs(setup, plain, batches, alpha, ref_logp_P2, reference, learn=False)
    del row[COVARIANCE]
    pairs, took = totals[0], time.perf_counter() - started
    row |= {"pairs": pairs, "runtime": took, "samples_per_second": pairs / took}
    return {f"eval_{name}": value for name, value in row.items()}


def _over_pairs(
    setup: Setup,
    model: nn.Module,
    batches: list[list[int]],
    alpha: float,
    ref_logp_P2: Tensor | None,
    reference: nn.Module | None,
    *,
    learn: bool,
) -> tuple[dict[str, float], tuple[int, int, int]]:
    """Metrics averaged over the pairs of all processes, each in its micro-batches once.

    With ``learn`` the gradients of the mean loss are left in the parameters.

    Returns:
        The metrics, and how many pairs, tokens and micro-batches they are of.
    """
    accelerator = setup.accelerator
    world, own_pairs = accelerator.num_processes, sum(map(len, batches))
    tokens, routed = (sum(map(count, batches)) for count in (setup.tokens, setup.routed))
    counts = torch.tensor([own_pairs, tokens, len(batches), routed], device=accelerator.device)
    totals = accelerator.reduce(counts, "sum").tolist()
    step_pairs, all_tokens, all_batches, all_routed = totals
    sums: dict[str, Tensor] = {}
    # Every process takes part in the sum of gradients: one without a pair adds zeros to it.
    idle = not batches
    if idle:
        batches = [[min(range(len(setup.pairs)), key=setup.lengths.__getitem__)]]
    for position, index in enumerate(parts(batches)):
        batch = setup.batch(index)
        if ref_logp_P2 is not None:
            ref_logp_S = ref_logp_P2[index].reshape(-1).to(batch.target_N.device)
        else:
            ref_logp_S = reference_logp(setup, reference or model, batch)
        sums_up = learn and position < len(batches) - 1
        # The balancing loss of a step is the mean over its tokens.
        weight = setup.routed(index) * world / all_routed
        with (
            accelerator.no_sync(model) if sums_up else nullcontext(),
            torch.set_grad_enabled(learn),
        ):
            result = batch_loss(
                setup,
                model,
                batch,
                ref_logp_S,
                alpha=alpha,
                num_pairs=step_pairs / world,  # gradients are averaged over processes
                router_aux_loss_coef=setup.aux_loss_coef * weight,
            )
            loss = 0.0 * result.loss if idle else result.loss
            if learn:
                accelerator.backward(loss)
        metrics = {"loss": loss.detach(), **result.metrics}
        metrics[COVARIANCE] = _covariance(result, ref_logp_S)
        # A loss is scaled by the processes already, the others are means over the batch's pairs.
        shares: dict[str, float] = {"loss": 1, "preference_loss": 1, "aux_loss": weight}
        for name, value in metrics.items():
            share = shares[name] / world if name in shares else len(index) / step_pairs
            # An evaluation may sum thousands of micro-batches, too many for fp32.
            value = value if learn else value.double()
            sums[name] = sums.get(name, 0.0) + value * (0.0 if idle else share)
    values = accelerator.reduce(torch.stack([x.double() for x in sums.values()]), "sum")
    return dict(zip(sums, values.tolist())), (step_pairs, all_tokens, all_batches)


def _covariance(result: PreferenceLoss, ref_logp_S: Tensor) -> Tensor:
    """Mean over a batch's pairs of the log-ratio margin times the length difference."""
    ratio_P2 = (result.logp_S.detach().double() - ref_logp_S).view(-1, 2)
    lengths_P2 = result.lengths_S.double().view(-1, 2)
    return ((ratio_P2[:, 0] - ratio_P2[:, 1]) * (lengths_P2[:, 0] - lengths_P2[:, 1])).mean()
