"""One optimizer step, and the same without it.

A step is the mean over its examples, however they are packed and on however many processes: each
process takes its share of them, and gradients and metrics are summed over all.
"""

import math
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.errors import ModelError
from fastdpo.loss.examples import BaseObjective, Rows
from fastdpo.loss.ops import PreferenceLoss
from fastdpo.loss.singles import RunningMean
from fastdpo.model.noise import random_state_kept
from fastdpo.progress import parts
from fastdpo.train.coupling import couple
from fastdpo.train.steps import Reference, Setup, Totals, batch_loss, of_reference, totals_of

COVARIANCE = "covariance"  # of margins and lengths, for alpha=auto
_COUNT = "/count"  # of what a metric is averaged over, where it is not all examples


def take_step(
    setup: Setup,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[list[int]],
    objective: BaseObjective,
    reference: Reference,
    running: RunningMean,
) -> dict[str, float]:
    """One optimizer step over this process's micro-batches; metrics averaged over all examples.

    Raises:
        ModelError: the loss or a gradient is not finite.
    """
    engine, started = setup.engine, time.perf_counter()
    step = _over_examples(setup, model, batches, objective, reference, running, learn=True)
    row, totals = step
    row["grad_norm"] = engine.clip(model, setup.config.max_grad_norm)
    if not all(map(math.isfinite, row.values())):
        raise ModelError(
            f"training left the finite range (loss {row['loss']}, gradient norm "
            f"{row['grad_norm']}); lower learning_rate ({setup.config.learning_rate}) or set "
            "bf16=false. The last checkpoint is kept"
        )
    engine.step(model, optimizer)
    return {
        **row,
        "pairs": totals.examples,
        "num_tokens": totals.tokens,
        "fill_rate": totals.tokens / (totals.batches * setup.config.max_tokens),
        "pairs_per_second": totals.examples / (time.perf_counter() - started),
    }


def measure(
    setup: Setup,
    model: nn.Module,
    batches: list[list[int]],
    objective: BaseObjective,
    reference: Reference,
    running: RunningMean,
) -> dict[str, float]:
    """The metrics of `take_step`, without the step, and the seconds it took; names with "eval_"."""
    started, plain = time.perf_counter(), setup.engine.plain(model)
    with random_state_kept():  # a model may draw, in training mode, to skip a layer
        row, totals = _over_examples(
            setup, plain, batches, objective, reference, running, learn=False
        )
    count, took = totals.examples, time.perf_counter() - started
    row |= {"pairs": count, "runtime": took, "samples_per_second": count / took}
    return {f"eval_{name}": value for name, value in row.items()}


def _over_examples(
    setup: Setup,
    model: nn.Module,
    batches: list[list[int]],
    objective: BaseObjective,
    reference: Reference,
    running: RunningMean,
    *,
    learn: bool,
) -> tuple[dict[str, float], Totals]:
    """Metrics averaged over the examples of all processes, each in its micro-batches once.

    With ``learn`` the gradients of the mean loss are left in the parameters.
    """
    engine, world = setup.engine, setup.engine.world
    totals = totals_of(setup, batches, objective)
    shared = couple(setup, model, batches, objective, reference, running, totals, learn=learn)
    sums: dict[str, Tensor] = {}
    # Every process takes part in the sum of gradients: one without an example adds zeros to it.
    planned = list(engine.forwards(batches, setup.filler, least=1))
    for position, (index, real) in enumerate(parts(planned), start=1):
        batch = setup.batch(index)
        given = of_reference(setup, model, batch, objective, reference)
        last = not learn or position == len(planned)
        # The balancing loss of a step is the mean over its tokens.
        weight = setup.routed(index) * world / totals.routed
        with (
            nullcontext() if last else engine.accumulates(model),
            torch.set_grad_enabled(learn),
        ):
            result = batch_loss(
                setup,
                model,
                shared.batch(batch),
                **given,
                objective=shared.objective,
                num_pairs=totals.examples / world,  # gradients are averaged over processes
                mean_chosen_length=totals.chosen / totals.examples,
                shift=shared.shift,
                router_aux_loss_coef=setup.aux_loss_coef * weight,
            )
            loss = result.loss if real else 0.0 * result.loss
            if learn:
                engine.backward(model, loss)
        if reference.model is not None:  # some losses and their backwards read its head
            engine.release(reference.model)
        metrics = {"loss": loss.detach(), **result.metrics}
        if learn and setup.config.alpha == "auto":
            metrics[COVARIANCE] = _covariance(result, batch.firsts)
        # A loss is scaled by the processes already, the others are means over the batch's examples,
        # or over as many as `counts` says.
        shares: dict[str, float] = {"loss": 1, "preference_loss": 1, "aux_loss": weight}
        for name, value in metrics.items():
            share: Any = shares[name] / world if name in shares else len(index) / totals.examples
            if name in result.counts:
                share = result.counts[name]
                counted = f"{name}{_COUNT}"
                sums[counted] = sums.get(counted, 0.0) + share * float(real)
            # An evaluation may sum thousands of micro-batches, too many for fp32.
            value = value if learn else value.double()
            # A filler's may be infinite, which times 0 is none.
            sums[name] = sums.get(name, 0.0) + (value * share if real else torch.zeros_like(value))
    values = engine.sum(torch.stack([x.double() for x in sums.values()]))
    row = _means(dict(zip(sums, values.tolist())))
    if shared.loss is not None:
        row["loss"] = shared.loss + setup.aux_loss_coef * row.get("aux_loss", 0.0)
        row |= {"preference_loss": shared.loss} if "preference_loss" in row else {}
    return row | shared.metrics, totals


def _means(sums: dict[str, float]) -> dict[str, float]:
    """Each metric over what was counted for it; one of nothing is left out.

    Of single responses the margin is the difference of the two means.
    """
    counts = {x.removesuffix(_COUNT): n for x, n in sums.items() if x.endswith(_COUNT)}
    row = {}
    for name, value in sums.items():
        if not name.endswith(_COUNT) and counts.get(name, 1) > 0:
            row[name] = value / counts.get(name, 1)
    if "rewards/chosen" in counts and "rewards/margins" not in row:
        chosen, rejected = row.get("rewards/chosen"), row.get("rewards/rejected")
        if chosen is not None and rejected is not None:
            row["rewards/margins"] = chosen - rejected
    return row


def _covariance(result: PreferenceLoss, firsts: tuple[int, ...]) -> Tensor:
    """Mean over a batch's pairs of the log-ratio margin times the length difference."""
    ratio_S = result.logp_S.detach().double() - result.ref_logp_S
    lengths_S = result.lengths_S.double()
    rows = Rows(firsts, ratio_S.device)
    margin_P, longer_P = (x[:, 0] - x[:, 1] for x in map(rows.of, (ratio_S, lengths_S)))
    return (margin_P * longer_P).mean()
