"""A preference loss of sequences whose tokens are spread over processes (sequence parallel).

Each process streams its own tokens through the head, by a route of tokens (frozen, stash or
recompute).  Their sums over each sequence are added up over the group in fp64, so every process has
the sums of whole sequences and with them the same loss.  The derivative of that loss by a process's
own part of a sum is the derivative by the sum, so the way back needs no collective, and every
process has the gradient of its own tokens: summed over the group, that of one process.

Each sequence's tokens lie in the order of the ranks.  Here ``bounds_S1`` are those of this
process's, so a sequence may have none; a process without any gives one target of -100, to take part
in the sums.  What is of a sequence or an example, in and out, is of the whole one and the same on
all processes; so are the loss and the metrics.

Objectives are computed by PyTorch on the sums.  One that reads a KL recomputes in its backward.

Legend: N scored tokens of this process, T its hidden rows, P examples, S sequences.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks, eager
from .call import ExampleInputs, HeadInputs, Scoring, Sums, collect
from .checks import IGNORE
from .examples import BaseObjective
from .objectives import as_objective
from .passes import sequence_sums, tail_weights
from .result import PreferenceLoss, kl_metrics, metrics_of


class _Added(torch.autograd.Function):
    """The sum over a group, of which each process has the whole: its parts have its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Tokens(NamedTuple):
    """What the head gives for this process's targets, zeros where one is ignored; each (N,)."""

    logp_N: Tensor
    ref_logp_N: Tensor | None
    kl_N: Tensor | None
    stats: dict[str, Tensor]
    plan: Any


def preference(
    given: HeadInputs, inputs: ExampleInputs, objective: BaseObjective | Callable, group: Any
) -> PreferenceLoss:
    """`ops.linear_preference_loss` with a ``group``."""
    rank = _rank_in(group)
    given, fused = eager.check_head(given)
    eager.check_targets(given, fused)
    objective = as_objective(objective)
    edges, firsts, stats, ref = eager.check_examples(given, inputs, objective, fused, empty=True)
    values = eager.check_values(objective, inputs, firsts, given.h_TD.device, True)
    sizes = [stop - start for start, stop in pairwise(edges)]
    here_RS = _scored_tokens(given.target_N, sizes, group)
    lengths_S = here_RS.sum(0)
    if lengths_S.device.type == "cpu":
        checks.check_lengths(lengths_S.tolist(), firsts)
    else:
        checks.check_device_lengths(lengths_S)
    scoring = Scoring(
        objective, edges, firsts, None, lengths_S, inputs.ref_logp_S, **values, shift=inputs.shift
    )
    if objective.needs_mean_length and scoring.mean_chosen_length is None:
        scoring.mean_chosen_length = eager.mean_length(scoring)
    if objective.ld_alpha is not None:
        here = here_RS[rank], here_RS[:rank].sum(0)
        scoring.token_weight_N = tail_weights(given.target_N, scoring, here)
    tokens = _of_head(given, fused, objective, stats | eager.stats_of(objective), ref)
    sums = _sums(tokens, scoring, group)
    loss = scoring.loss(sums)
    if tokens.logp_N.requires_grad and not loss.requires_grad:
        raise ValueError("objective must return a function of the log-ratios; it has no gradient")
    logp_S, ref_S = sums.logp_S.detach(), sums.ref_logp_S
    entries = {
        "loss": loss.to(tokens.logp_N.dtype), "logp_S": logp_S, "ref_logp_S": ref_S,
        "lengths_S": lengths_S,
    }  # fmt: skip
    metrics, counts = metrics_of(scoring, logp_S, ref_S)
    if objective.needs_kl:
        metrics |= kl_metrics(scoring)
    wanted = {name: x_N for name, x_N in tokens.stats.items() if name in stats}
    return PreferenceLoss(entries, metrics, wanted, tokens.plan, counts)


def _rank_in(group: Any) -> int:
    """This process's rank in the group."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed process group, got {type(group).__name__}"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: this process is not in it; pass the group that it is in")
    return rank


def _scored_tokens(target_N: Tensor, sizes: list[int], group: Any) -> Tensor:
    """Scored tokens of each sequence that each process has, (R, S) int64."""
    here_S = torch.stack([part.sum() for part in (target_N != IGNORE).long().split(sizes)])
    here_RS = [torch.empty_like(here_S) for _ in range(dist.get_world_size(group))]
    dist.all_gather(here_RS, here_S, group=group)
    return torch.stack(here_RS)


def _of_head(
    given: HeadInputs, fused: bool, objective: BaseObjective, stats: frozenset[str], ref: Any
) -> _Tokens:
    """The tokens' way through the head."""
    if eager.nothing_scored(given, fused):  # the kernels find zeros themselves
        zeros_N = eager.zeros(given)
        none_N = zeros_N.detach()
        ref_N, kl_N = None if ref is None else none_N, zeros_N if objective.needs_kl else None
        return _Tokens(zeros_N, ref_N, kl_N, dict.fromkeys(stats, none_N), None)
    kl_N = ref_N = None
    if objective.needs_kl:
        call = eager.call_of_both(given, fused)
        call.stats |= stats - {"logp"}
        logp_N, kl_N, ref_N = eager.of_tokens_kl(call, given)
    else:
        call = eager.make_call(given, fused=fused)
        call.ref, call.stats = ref, stats - {"logp"}
        logp_N = eager.of_tokens(call, given)
        if ref is not None:
            ref_N = call.full(collect(call.blocks, "ref_logp_N"))
    found = {"logp": logp_N.detach(), **call.token_stats()}
    return _Tokens(logp_N, ref_N, kl_N, found, call.plan)


def _sums(tokens: _Tokens, scoring: Scoring, group: Any) -> Sums:
    """Of whole sequences: what `passes.score` gives the objective of one process."""
    objective, weight_N = scoring.objective, scoring.token_weight_N
    columns: list[Tensor | None] = [tokens.logp_N, tokens.ref_logp_N, None, None]
    if weight_N is not None:
        columns = [None if x is None else x * weight_N for x in columns]
    columns[2] = tokens.kl_N
    if objective.needs_alignment:
        logp_N = tokens.logp_N.detach().double()
        columns[3] = logp_N - tokens.stats["log_sum_sq_probs"]
    here = [sequence_sums(x, scoring, torch.float64) for x in columns if x is not None]
    whole = iter(_Added.apply(torch.stack(here), group).unbind())  # type: ignore[attr-defined]
    logp_S, ref_S, kl_S, gap_S = (None if x is None else next(whole) for x in columns)
    assert logp_S is not None
    dtype = scoring.sum_dtype(tokens.logp_N.dtype)
    if ref_S is None:
        ref_S = scoring.ref_logp_S
    # A policy that is its own reference has the reference's sums to the bit: both are rounded once.
    ref_S = torch.zeros_like(logp_S, dtype=dtype) if ref_S is None else ref_S.detach().to(dtype)
    if kl_S is not None:
        scoring.kl_sums.append(kl_S.detach())
    if gap_S is not None:
        gap_S = gap_S.detach() / scoring.lengths_S
    return Sums(logp_S.to(dtype), ref_S, kl_S, gap_S)
