"""What travels through a call: its arguments in two bundles, then the same checked and planned.

Legend: T hidden rows, N scored tokens, D hidden, V vocabulary, P examples, S sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import Block, Head, Needs, Shares, TokenRows
from .checks import check_losses
from .examples import BaseObjective, Examples, Rows
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


class ExampleInputs(NamedTuple):
    """What makes tokens examples, as the caller gave it: see `ops.linear_preference_loss`."""

    bounds_S1: Tensor
    ref_logp_S: Tensor | None = None
    margin_P: Tensor | None = None
    smoothing_P: Tensor | None = None
    weight_P: Tensor | None = None
    num_pairs: float | None = None
    firsts_P1: Sequence[int] | None = None
    scores_S: Tensor | None = None
    desirable_P: Tensor | None = None
    mean_chosen_length: float | None = None
    shift: float = 0.0


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
    shares: Shares | None = None  # of a log-prob and a known multiple of the KL, a token
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


class Sums(NamedTuple):
    """Numbers of each sequence that an objective reads; `Examples` says which."""

    logp_S: Tensor
    ref_logp_S: Tensor
    kl_S: Tensor | None = None
    alignment_S: Tensor | None = None


@dataclass
class Scoring:
    """The side of a call that scores examples: what an objective reads beside the log-probs.

    ``lengths_S``, and margin, smoothing and weight with their neutral values, are None where only
    a kernel would read them; ``bounds_S1`` are the edges on the device, for kernels.
    """

    objective: BaseObjective
    edges: list[int]
    firsts: tuple[int, ...]  # the first sequence of each example, and the end
    bounds_S1: Any
    lengths_S: Any
    ref_logp_S: Tensor | None
    margin_P: Any
    smoothing_P: Any
    weight_P: Any
    num_pairs: float
    scores_S: Tensor | None = None
    desirable_P: Tensor | None = None
    mean_chosen_length: Any = None
    shift: float = 0.0
    token_weight_N: Tensor | None = None  # of each token in its sequence's sum; None for 1
    # What was found of some examples each: by the pair kernel, or the sequences' KLs in fp64.
    results: list[Any] = field(default_factory=list)
    kl_sums: list[Tensor] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each sequence."""
        return [stop - start for start, stop in pairwise(self.edges)]

    @property
    def count(self) -> int:
        """Examples."""
        return len(self.firsts) - 1

    @cached_property
    def rows(self) -> Rows:
        """How the examples lie one below the other."""
        return Rows(self.firsts, self.lengths_S.device)

    def part(self, first: int, last: int) -> "Scoring":
        """Some of the examples; what is found of them is left with that of the others."""
        s0, s1 = self.firsts[first], self.firsts[last]
        tokens = [self.edges[s] - self.edges[0] for s in (s0, s1)]

        def of(x: Any, start: int, stop: int) -> Any:
            return None if x is None else x[start:stop]

        return replace(
            self, edges=self.edges[s0 : s1 + 1],
            firsts=tuple(s - s0 for s in self.firsts[first : last + 1]),
            bounds_S1=of(self.bounds_S1, s0, s1 + 1), lengths_S=of(self.lengths_S, s0, s1),
            ref_logp_S=of(self.ref_logp_S, s0, s1), margin_P=of(self.margin_P, first, last),
            smoothing_P=of(self.smoothing_P, first, last),
            weight_P=of(self.weight_P, first, last), scores_S=of(self.scores_S, s0, s1),
            desirable_P=of(self.desirable_P, first, last),
            token_weight_N=of(self.token_weight_N, *tokens),
        )  # fmt: skip

    def sum_dtype(self, acc: torch.dtype) -> torch.dtype:
        """Sums are taken in the reference's precision and at least in fp32; in fp64 without one."""
        if not self.objective.needs_reference:
            return torch.float64
        return torch.promote_types(getattr(self.ref_logp_S, "dtype", acc), torch.float32)

    def loss(self, sums: Sums) -> Tensor:
        """Summed loss over ``num_pairs``, fp64: few numbers, and sums are large."""
        numbers = (None if x is None else x.double() for x in sums)
        logp_S, ref_logp_S, kl_S, alignment_S = numbers
        assert logp_S is not None and ref_logp_S is not None
        x = Examples(
            logp_S, ref_logp_S, self.lengths_S.double(), self.firsts, self.margin_P,
            self.smoothing_P, self.scores_S, self.desirable_P, kl_S, alignment_S,
            self.mean_chosen_length, self.shift,
        )  # fmt: skip
        loss_P = self.objective.losses(x)
        check_losses(loss_P, self.count)
        return (loss_P * self.weight_P).sum() / self.num_pairs

    def loss_and_slopes(self, sums: Sums) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss, and its derivatives by each sequence's sums of log-probs and of KLs."""
        with torch.enable_grad():
            leaf_S, kl_S = sums.logp_S.detach().double().requires_grad_(), sums.kl_S
            if kl_S is not None:
                kl_S = kl_S.detach().double().requires_grad_()
            loss = self.loss(sums._replace(logp_S=leaf_S, kl_S=kl_S))
            if not loss.requires_grad:
                raise ValueError(
                    "objective must return a function of the log-ratios; it has no gradient"
                )
            leaves = [leaf_S] if kl_S is None else [leaf_S, kl_S]
            slopes = torch.autograd.grad(loss, leaves, materialize_grads=True)
        return loss.detach(), slopes[0], None if kl_S is None else slopes[1]


def join(parts: list[Tensor]) -> Tensor:
    """One after the other; of a single one no copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def collect(blocks: list[Block], name: str) -> Any:
    """A field of some blocks, one after the other; None if they have none."""
    parts = [getattr(block, name) for block in blocks]
    return None if parts[0] is None else join(parts)
