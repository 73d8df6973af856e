"""What travels through a call: its arguments in two bundles, then the same checked and planned.

Legend: T hidden rows, N scored tokens, D hidden, V vocabulary, P pairs, S = 2P sequences.
"""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import Block, Head, Needs, TokenRows
from .checks import check_pair_losses
from .objectives import Objective
from .plan import Plan


class HeadInputs(NamedTuple):
    """What goes through a head, as the caller gave it: the arguments of `ops.linear_logp`.

    Those of the reference come last; the first three may have a gradient.
    """

    h_TD: Tensor
    w_VD: Tensor
    bias_V: Tensor | None
    target_N: Any  # a tensor; None for a KL, which has no targets
    rows_N: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    workspace_mib: float | None = None
    impl: str = "auto"
    stats: tuple[str, ...] = ()
    ref_h_TD: Tensor | None = None
    ref_w_VD: Tensor | None = None
    ref_bias_V: Tensor | None = None


class PairInputs(NamedTuple):
    """What makes tokens pairs, as the caller gave it: see `ops.linear_preference_loss`."""

    bounds_S1: Tensor
    ref_logp_S: Tensor | None = None
    margin_P: Tensor | None = None
    smoothing_P: Tensor | None = None
    weight_P: Tensor | None = None
    num_pairs: float | None = None


@dataclass
class Call:
    """One checked call: what the autograd functions need beside the differentiable tensors."""

    scale: float
    softcap: float | None
    rows_N: Tensor | None
    target_N: Tensor
    keep_N: Tensor | None  # positions of the scored targets, where ignored ones were left out
    num_targets: int
    needs: Needs
    plan: Plan
    edges: list[int]
    fused: bool  # by the Triton kernels
    streamer: Any  # `streaming.Streamer` or `fused.FusedStreamer`
    stats: frozenset[str] = frozenset()
    ref: tuple[Tensor, Tensor, Tensor | None] | None = None  # hidden rows, weight and bias
    of_kl: bool = False  # tokens have a KL to the reference, not a log-prob
    blocks: list[Block] = field(default_factory=list)

    def open(self, h_TD: Tensor, w_VD: Tensor, bias_V: Tensor | None) -> Any:
        """A streamer of the policy's head over its rows."""
        head = Head(w_VD, bias_V, self.scale, self.softcap)
        rows = TokenRows(h_TD, self.rows_N, self.target_N)
        return self.streamer(head, rows, self.needs, self.plan)

    def open_reference(self) -> Any:
        """The same of the reference, if it comes as a head."""
        return None if self.ref is None else self.open(*self.ref)

    def full(self, x_N: Tensor) -> Tensor:
        """Put values of the scored targets back among the ignored ones."""
        if self.keep_N is None:
            return x_N
        return x_N.new_zeros(self.num_targets).index_copy_(0, self.keep_N, x_N)

    def token_values(self) -> Tensor:
        """What an op of tokens returns."""
        if self.of_kl:
            return self.token_stats()["kl_ref"]
        return self.full(collect(self.blocks, "logp_N"))

    def token_values_kl(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of an op of both: log-probs, KLs, the reference's log-probs."""
        names = "logp_N", "ref_logp_N"
        logp_N, ref_logp_N = (self.full(collect(self.blocks, name)) for name in names)
        return logp_N, self.token_stats()["kl_ref"], ref_logp_N

    def token_stats(self) -> dict[str, Tensor]:
        return {
            name: self.full(join([block.stats[name] for block in self.blocks]))
            for name in sorted(self.stats)
        }


@dataclass
class Pairs:
    """The per-pair side of a call: everything the objective reads beside the log-probs.

    ``lengths_S``, and margin, smoothing and weight with their neutral values, are None where only
    a kernel would read them; ``bounds_S1`` are the edges on the device, for kernels.
    """

    objective: Objective
    edges: list[int]
    bounds_S1: Any
    lengths_S: Any
    ref_logp_S: Tensor | None
    margin_P: Any
    smoothing_P: Any
    weight_P: Any
    num_pairs: float
    results: list[Any] = field(default_factory=list)  # what a kernel found of some pairs each

    @property
    def sizes(self) -> list[int]:
        return [stop - start for start, stop in pairwise(self.edges)]

    @property
    def by_kernel(self) -> bool:
        """Whether a kernel computed losses and metrics, not only sums."""
        return bool(self.results) and self.objective.code is not None

    def part(self, first: int, last: int) -> "Pairs":
        """Some of the pairs; what a kernel finds of them is left with that of the others."""

        def of(x: Any, each: int = 1) -> Any:
            return None if x is None else x[each * first : each * last]

        return replace(
            self, edges=self.edges[2 * first : 2 * last + 1], lengths_S=of(self.lengths_S, 2),
            bounds_S1=None if self.bounds_S1 is None else self.bounds_S1[2 * first : 2 * last + 1],
            ref_logp_S=of(self.ref_logp_S, 2), margin_P=of(self.margin_P),
            smoothing_P=of(self.smoothing_P), weight_P=of(self.weight_P),
        )  # fmt: skip

    def sums(self, logp_N: Tensor) -> Tensor:
        """Sum over each sequence, in the reference's precision and at least in fp32."""
        ref = logp_N if self.ref_logp_S is None else self.ref_logp_S
        dtype = torch.promote_types(ref.dtype, torch.float32)
        return torch.stack([part.sum(dtype=dtype) for part in logp_N.split(self.sizes)])

    def loss(self, logp_S: Tensor, ref_logp_S: Tensor) -> Tensor:
        """Summed loss over ``num_pairs``, fp64: few numbers, and sums are large."""
        ratio_S, lengths_S = logp_S.double() - ref_logp_S.double(), self.lengths_S.double()
        sides = ratio_S[0::2], ratio_S[1::2], lengths_S[0::2], lengths_S[1::2]
        loss_P = self.objective(*sides, self.margin_P, self.smoothing_P)
        check_pair_losses(loss_P, len(self.edges) // 2)
        return (loss_P * self.weight_P).sum() / self.num_pairs

    def loss_and_slope(self, logp_S: Tensor, ref_logp_S: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and its derivative by each sequence's sum."""
        with torch.enable_grad():
            leaf_S = logp_S.detach().double().requires_grad_()
            loss = self.loss(leaf_S, ref_logp_S)
            if not loss.requires_grad:
                raise ValueError(
                    "objective must return a function of the log-ratios; it has no gradient"
                )
            (slope_S,) = torch.autograd.grad(loss, leaf_S)
        return loss.detach(), slope_S


def join(parts: list[Tensor]) -> Tensor:
    """One after the other; of a single one no copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def collect(blocks: list[Block], name: str) -> Any:
    """A field of some blocks, one after the other; None if they have none."""
    parts = [getattr(block, name) for block in blocks]
    return None if parts[0] is None else join(parts)
