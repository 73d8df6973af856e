"""What goes through a head block by block: rows and targets, what is kept of them, their gradients.

Legend: N rows of a block, T hidden rows, D hidden, V vocabulary, C a vocabulary chunk, K chunks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .checks import IGNORE


class Head(NamedTuple):
    """What turns hidden rows into logits."""

    w_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    h: bool
    w: bool
    bias: bool


@dataclass
class Grads:
    """Gradient accumulators in fp32; ``w`` is in the result's dtype where one product gives it."""

    h: Tensor | None = None
    w: Tensor | None = None
    bias: Tensor | None = None


class Tokens(NamedTuple):
    """The hidden rows of a block, and their targets."""

    h_ND: Tensor
    target_N: Tensor

    def rows(self, rows: slice) -> "Tokens":
        """Some of them."""
        return Tokens(self.h_ND[rows], self.target_N[rows])


class Shares(NamedTuple):
    """How the probabilities of policy and reference are mixed in a token's gradient.

    That of a target's log-prob by the logits is ``onehot - p``, that of KL(reference || policy) is
    ``p - p_ref``.  A combination of the two, ``coef_logp`` and ``coef_kl``, is therefore
    ``unit * (onehot_part - own * p - ref * p_ref)``: two numbers a row, whatever the objective.
    """

    own_N: Tensor
    ref_N: Tensor

    @classmethod
    def of(cls, coef_N: Tensor, kl_coef_N: Tensor) -> "tuple[Tensor, Shares]":
        """The unit of each token and its shares, which are then at most 1."""
        own_N, ref_N = coef_N - kl_coef_N, kl_coef_N
        unit_N = torch.maximum(own_N.abs(), ref_N.abs())
        safe_N = torch.where(unit_N == 0, 1.0, unit_N)
        return unit_N, cls(own_N / safe_N, ref_N / safe_N)

    @classmethod
    def of_kl(cls, like_N: Tensor) -> "Shares":
        """Those of a KL alone."""
        ones_N = torch.ones_like(like_N)
        return cls(-ones_N, ones_N)

    def rows(self, rows: slice) -> "Shares":
        """Those of some tokens."""
        return Shares(self.own_N[rows], self.ref_N[rows])


class TokenRows(NamedTuple):
    """Scored tokens: which hidden row predicts which target."""

    h_TD: Tensor
    rows_N: Tensor | None
    target_N: Tensor

    def block(self, start: int, stop: int) -> Tokens:
        """Hidden rows and targets of a block."""
        rows = slice(start, stop) if self.rows_N is None else self.rows_N[start:stop]
        return Tokens(self.h_TD[rows], self.target_N[start:stop])

    def scatter(self, total_TD: Tensor, start: int, stop: int, dh_ND: Tensor) -> None:
        """Add a block's gradient to the hidden rows it came from, in a fixed order."""
        if self.rows_N is None:
            total_TD[start:stop].add_(dh_ND)
        else:
            add_rows(total_TD, self.rows_N[start:stop], dh_ND)


class Stash:
    """What a block keeps for its backward: a chunk-major (N, V) buffer, bounded by the workspace.

    On a CPU the buffer is lent again to the next stash of like size.  Otherwise the system takes
    its pages back after every step, and each of them faults again in the next.
    """

    _idle: ClassVar[list[Tensor]] = []

    def __init__(self, target_N: Tensor, chunks: list[tuple[int, int]], dtype: torch.dtype) -> None:
        N, V = target_N.shape[0], chunks[-1][1]
        self._buffer = self._take(N * V, dtype, target_N.device)
        self.chunks = [self._buffer[N * v0 : N * v1].view(N, v1 - v0) for v0, v1 in chunks]

    @classmethod
    def _take(cls, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type == "cpu" and cls._idle:
            buffer = cls._idle.pop()
            if buffer.dtype == dtype and numel <= buffer.numel() <= 2 * numel:
                return buffer
        return torch.empty(numel, dtype=dtype, device=device)

    @classmethod
    @contextmanager
    def apart(cls) -> Iterator[None]:
        """Within it, buffers are lent among its own calls alone; they may have no content."""
        before, cls._idle = cls._idle, []
        try:
            yield
        finally:
            cls._idle = before

    def __del__(self) -> None:
        if self._buffer.device.type == "cpu" and not self._idle:
            self._idle.append(self._buffer)


@dataclass
class Block:
    """The forward of the block of rows ``span``; ``stash`` holds what its backward reads.

    ``own_N`` is the derivative of each log-prob by its target's uncapped logit, and ``ref_own_N``
    what that would be with the reference's probability of the target.
    """

    span: tuple[int, int]
    tokens: Tokens | None  # as the backward reads them; None to fetch them again
    logp_N: Tensor
    lse_N: Tensor
    max_KN: Tensor
    stash: Any
    own_N: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    ref_logp_N: Tensor | None = None
    ref_lse_N: Tensor | None = None
    ref_own_N: Tensor | None = None
    ref_max_KN: Tensor | None = None  # until a stash is mixed

    def own(self, shares: Shares | None) -> Tensor:
        """The target's entry of the gradient whose other ones ``shares`` mix."""
        if shares is None:
            return self.own_N
        assert self.ref_own_N is not None
        return shares.own_N * self.own_N + shares.ref_N * self.ref_own_N

    @classmethod
    def joined(cls, parts: "list[Block]", tokens: Tokens, stash: Any) -> "Block":
        """Blocks that follow one another as one, with the stash that they share."""
        span = parts[0].span[0], parts[-1].span[1]
        names = [f.name for f in fields(cls) if f.name not in ("span", "tokens", "stash", "stats")]
        columns = ([getattr(part, name) for part in parts] for name in names)
        joined = {n: None if x[0] is None else torch.cat(x, -1) for n, x in zip(names, columns)}
        stats = {n: torch.cat([part.stats[n] for part in parts]) for n in parts[0].stats}
        return cls(span=span, tokens=tokens, stash=stash, stats=stats, **joined)  # type: ignore[arg-type]

    def free(self) -> None:
        """Let go of what only the backward reads and a whole call cannot keep."""
        self.tokens = self.stash = None


def coefficients(
    target_N: Tensor, coef_N: Tensor, upstream: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What multiplies each token's log-prob, zero where it is ignored."""
    coef_N = coef_N if upstream is None else coef_N * upstream
    return torch.where(target_N == IGNORE, 0.0, coef_N).to(dtype)


def add_rows(total: Tensor, index_N: Tensor, rows_N: Tensor) -> None:
    """``total[index] += rows`` in a fixed order; repeats are summed in the rows' dtype first."""
    if total.dtype != rows_N.dtype:
        index_N, inverse_N = index_N.unique(return_inverse=True)
        sums = rows_N.new_zeros(index_N.shape[0], *rows_N.shape[1:])
        add_rows(sums, inverse_N, rows_N)
        total[index_N] = (total[index_N].to(rows_N.dtype) + sums).to(total.dtype)
    elif total.device.type == "cpu":
        total.index_add_(0, index_N, rows_N)
    else:  # index_add_ uses atomics there; index_put_ sorts
        total.index_put_((index_N,), rows_N, accumulate=True)
