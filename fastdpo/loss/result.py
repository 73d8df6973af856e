"""What a preference loss returns, and its metrics."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from ..kernels.support import METRICS
from .call import Pairs
from .plan import Plan


class PreferenceLoss(dict[str, Tensor]):
    """What a preference loss returns: a mapping of tensors; only ``loss`` carries a gradient.

    Its entries are attributes too, and an index or a slice counts them, as in a model's output.
    PyTorch's pytrees know it.  What rebuilds it from its entries alone, as accelerate's conversion
    of a model's outputs does, leaves ``metrics`` and ``stats`` empty.

    Entries:
        loss: scalar, the summed loss of the pairs divided by ``num_pairs``.
        logp_S: summed log-probs of each sequence under the policy, in the dtype of the reference.
        ref_logp_S: those of the reference.
        lengths_S: scored tokens of each sequence, int64.

    Attributes:
        metrics: detached scalars averaged over the call's pairs, under TRL's names, and
            ``lengths/chosen``, ``lengths/rejected``, ``length_margin`` (``alpha * (nw - nl)``).
        stats: the requested per-token statistics, each (N,).
        plan: the route taken, its workspace and its accumulators; None under torch.compile.
    """

    def __init__(
        self,
        entries: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        metrics: dict[str, Tensor] | None = None,
        stats: dict[str, Tensor] | None = None,
        plan: Plan | None = None,
    ) -> None:
        super().__init__(entries)
        self.metrics = {} if metrics is None else metrics
        self.stats = {} if stats is None else stats
        self.plan: Any = plan

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
    lambda result: ([dict(result), result.metrics, result.stats], result.plan),
    lambda parts, plan: PreferenceLoss(*parts, plan=plan),  # type: ignore[call-arg]
)


@torch.no_grad()
def metrics_of(pairs: Pairs, logp_S: Tensor, ref_S: Tensor) -> dict[str, Tensor]:
    """`METRICS` of the call's pairs, as a kernel left them if it computed them."""
    if pairs.by_kernel:
        means = pairs.results[0].means
        if len(pairs.results) > 1:
            totals = torch.stack([result.totals for result in pairs.results]).sum(0)
            means = (totals[1:] / (len(pairs.edges) // 2)).float()
        return dict(zip(METRICS, means.unbind()))
    objective, lengths_S, logp_S = pairs.objective, pairs.lengths_S.double(), logp_S.double()
    reward_S = objective.beta * (logp_S - ref_S.double())
    chosen_P, rejected_P = reward_S[0::2], reward_S[1::2]
    values = (
        chosen_P.mean(),
        rejected_P.mean(),
        (chosen_P > rejected_P).double().mean(),
        (chosen_P - rejected_P).mean(),
        logp_S[0::2].mean(),
        logp_S[1::2].mean(),
        lengths_S[0::2].mean(),
        lengths_S[1::2].mean(),
        objective.alpha * (lengths_S[0::2] - lengths_S[1::2]).mean(),
    )
    return {name: x.float() for name, x in zip(METRICS, values)}
