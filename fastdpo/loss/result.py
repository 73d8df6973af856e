"""What a preference loss returns, and its metrics."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from ..kernels.support import METRICS
from .call import Scoring, join
from .examples import Rows
from .plan import Plan


class PreferenceLoss(dict[str, Tensor]):
    """What a preference loss returns: a mapping of tensors; only ``loss`` carries a gradient.

    Its entries are attributes too, and an index or a slice counts them, as in a model's output.
    PyTorch's pytrees know it.  What rebuilds it from its entries alone, as accelerate's conversion
    of a model's outputs does, leaves ``metrics`` and ``stats`` empty.

    Entries:
        loss: scalar, the summed loss of the examples divided by ``num_pairs``.
        logp_S: summed log-probs of each sequence under the policy, in the dtype of the reference;
            in fp64 if the objective needs none.
        ref_logp_S: those of the reference; zeros for an objective that needs none.
        lengths_S: scored tokens of each sequence, int64.

    Attributes:
        metrics: detached scalars averaged over the call's examples, under TRL's names, and
            ``lengths/chosen``, ``lengths/rejected``, ``length_margin`` (``alpha * (nw - nl)``).
            Of a list "chosen" is the response with the highest score and "rejected" that with the
            lowest, and ``rewards/accuracies`` the share of its ordered pairs whose rewards are
            ordered alike.  Of single responses "chosen" are the desirable ones and "rejected" the
            others; a margin of theirs is the difference of means over a whole step.
        counts: what some of the metrics are averaged over, by name; the others over all examples of
            the call.  A metric of nothing is 0 and its count too.
        stats: the requested per-token statistics, each (N,).
        plan: the route taken, its workspace and its accumulators; None under torch.compile.
    """

    def __init__(
        self,
        entries: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        metrics: dict[str, Tensor] | None = None,
        stats: dict[str, Tensor] | None = None,
        plan: Plan | None = None,
        counts: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(entries)
        self.metrics = {} if metrics is None else metrics
        self.stats = {} if stats is None else stats
        self.plan: Any = plan
        self.counts = {} if counts is None else counts

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    @property
    def loss(self) -> Tensor:
        return self["loss"]

    @property
    def logp_S(self) -> Tensor:
        return self["logp_S"]

    @property
    def ref_logp_S(self) -> Tensor:
        return self["ref_logp_S"]

    @property
    def lengths_S(self) -> Tensor:
        return self["lengths_S"]


# Hooks of DDP and FSDP2 look for the outputs that carry a gradient in a pytree's leaves.
register_pytree_node(
    PreferenceLoss,
    lambda result: ([dict(result), result.metrics, result.stats, result.counts], result.plan),
    lambda parts, plan: PreferenceLoss(*parts[:3], plan, parts[3]),  # type: ignore[call-arg]
)


@torch.no_grad()
def metrics_of(
    scoring: Scoring, logp_S: Tensor, ref_S: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Metrics of the call's examples, as a kernel left them if it computed them, and their counts.

    The names are `METRICS` of pairs and of lists that have scores.
    """
    if scoring.results:
        means = scoring.results[0].means
        if len(scoring.results) > 1:
            totals = torch.stack([result.totals for result in scoring.results]).sum(0)
            means = (totals[1:] / scoring.count).float()
        return dict(zip(METRICS, means.unbind())), {}
    logp_S, lengths_S = logp_S.double(), scoring.lengths_S.double()
    reward_S = scoring.objective.beta * (logp_S - ref_S.double())
    if scoring.objective.mean_rewards:
        reward_S = reward_S / lengths_S
    seen = _Seen(reward_S, logp_S, lengths_S)
    rows = scoring.rows
    if scoring.desirable_P is not None:
        return _of_singles(seen, scoring.desirable_P)
    shape = scoring.objective.shape
    counts: dict[str, Tensor] = {}
    if shape == "pairs":
        best, worst = ([rows.of(x_S)[:, k] for x_S in seen] for k in (0, 1))
        right = (best[0] > worst[0]).double().mean()
    elif scoring.scores_S is not None:
        best, worst, right, ordered = _of_lists(seen, scoring.scores_S, rows)
        counts["rewards/accuracies"] = ordered
    else:
        return {f"{name}/mean": x_S.mean().float() for name, x_S in seen._asdict().items()}, {}
    values = (
        best[0].mean(),
        worst[0].mean(),
        right,
        (best[0] - worst[0]).mean(),
        best[1].mean(),
        worst[1].mean(),
        best[2].mean(),
        worst[2].mean(),
        scoring.objective.alpha * (best[2] - worst[2]).mean(),
    )
    return dict(zip(METRICS, torch.stack(values).float().unbind())), counts


@torch.no_grad()
def kl_metrics(scoring: Scoring) -> dict[str, Tensor]:
    """Means of the sequences' KL to the reference: ``kl/chosen`` and ``kl/rejected`` of pairs."""
    kl_S = join(scoring.kl_sums)
    if scoring.objective.shape != "pairs":
        return {"kl/mean": kl_S.mean().float()}
    sides = ("chosen", 0), ("rejected", 1)
    return {f"kl/{side}": scoring.rows.of(kl_S)[:, k].mean().float() for side, k in sides}


class _Seen(NamedTuple):
    """What metrics say of each sequence, (S,) fp64."""

    rewards: Tensor
    logps: Tensor
    lengths: Tensor


def _of_lists(
    seen: _Seen, scores_S: Tensor, rows: Rows
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """What is seen of the best and the worst of each list; share of ordered pairs, their number.

    A pair is ordered if its scores differ, and it counts as right if its rewards do likewise.
    """
    best_P1 = rows.of(scores_S, -torch.inf).argmax(1, keepdim=True)
    worst_P1 = rows.of(scores_S, torch.inf).argmin(1, keepdim=True)
    seen_PL = [rows.of(x_S) for x_S in seen]
    best, worst = ([x.gather(1, i)[:, 0] for x in seen_PL] for i in (best_P1, worst_P1))
    scores_PL = rows.of(scores_S, torch.nan)
    above_PLL = scores_PL[:, :, None] > scores_PL[:, None]  # of NaN nothing is
    right_PLL = above_PLL & (seen_PL[0][:, :, None] > seen_PL[0][:, None])
    ordered = above_PLL.sum().double()
    return best, worst, right_PLL.sum() / ordered.clamp(min=1), ordered


def _of_singles(seen: _Seen, desirable_P: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Means over the desirable and over the undesirable responses, TRL's names of KTO."""
    metrics, counts = {}, {}
    for side, weight_P in (("chosen", desirable_P), ("rejected", 1 - desirable_P)):
        count = weight_P.sum()
        for name, x_P in seen._asdict().items():
            metrics[f"{name}/{side}"] = ((weight_P * x_P).sum() / count.clamp(min=1)).float()
            counts[f"{name}/{side}"] = count
    return metrics, counts
