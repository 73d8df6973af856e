"""The fold of logits into log-sum-exps, from tiles of products that a matrix library made.

`fold` takes a tile and leaves, for each of its rows, a shift and the sum of exponentials without
the target's; `merge` turns the sums of all tiles into log-probs.  On request the fold also keeps
the exponentials for the backward (the *stash*) and sums statistics.

R rows of a tile, C columns of a tile, N rows, K tiles of a row, V vocabulary.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pointwise import (
    ASSERTING,
    IGNORE,
    LOWEST,
    OPTIONS,
    kept,
    logits,
    row_shift,
    slope,
    softplus,
)
from .support import cdiv, power_of_2

# Logits above a row's shift that are still taken relative to it: exponentials, their squares and
# the sums of either stay finite in fp32, and the kept ones in the stash's dtype.
LIMITS = {torch.float16: 10.0, torch.bfloat16: 30.0, torch.float32: 30.0}
STATS = ("mean_logit", "entropy", "log_sum_sq_probs", "top1")
MAX_TILE_COLUMNS = 4096  # wider ones spill registers on some chips
_TILE_NUMEL = 4096  # elements a program holds
TWO_HEADS_WARPS = 8  # with the logits of two heads, four spill registers


@dataclass
class Partials:
    """What the tiles of a block of rows leave; ``width`` columns a tile, the last may be short.

    ``target_z_N`` is not written where the target is ignored.
    """

    width: int
    shift_KN: Tensor
    rest_KN: Tensor
    target_z_N: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, target_N: Tensor, V: int, width: int, stats: frozenset[str]) -> "Partials":
        N, device = target_N.shape[0], target_N.device
        new = partial(torch.empty, cdiv(V, width), N, dtype=torch.float32, device=device)
        target_z_N = torch.empty(N, dtype=torch.float32, device=device)
        stats_KN = {name: new() for name in STATS if name in stats}
        return cls(width, new(), new(), target_z_N, stats_KN)

    def stat_list(self) -> list[Tensor | None]:
        """One entry a name of `STATS`."""
        return [self.stats.get(name) for name in STATS]


@triton.jit
def places(R, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's rows and columns of a tile (R, C), and which of them there are."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    row = n < R
    return n, c, row, row[:, None] & (c < C)[None, :]


@triton.jit
def load_logits(product_ptr, bias_ptr, n, c, inside, C, stride, scale, softcap):
    """A tile of logits from a tile of products; -inf outside."""
    a = tl.load(product_ptr + n.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0)
    if bias_ptr is not None:
        a += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    return tl.where(inside, logits(a, scale, softcap), float("-inf"))


@triton.jit
def fold_kernel(
    product_ptr,
    bias_ptr,
    target_ptr,
    shift_ptr,
    rest_ptr,
    first_shift_ptr,
    target_z_ptr,
    stash_ptr,
    mean_ptr,
    entropy_ptr,
    squares_ptr,
    top_ptr,
    R,
    C,
    first_column,
    product_stride,
    stash_stride,
    scale,
    softcap,
    limit,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fold ROWS rows of a tile of products (R, C)."""
    n, c, row, inside = places(R, C, ROWS, BLOCK)
    z = load_logits(product_ptr, bias_ptr, n, c, inside, C, product_stride, scale, softcap)
    column = tl.load(target_ptr + n, mask=row, other=-1) - first_column
    own = c[None, :] == column[:, None]
    owner = row & (column >= 0) & (column < C)
    top_N = tl.maximum(tl.max(z, 1), LOWEST)
    shift_N = row_shift(top_N, first_shift_ptr, n, row, limit, FIRST)
    e = tl.exp(z - shift_N[:, None])
    if squares_ptr is not None:
        tl.store(squares_ptr + n, tl.sum(e * e, 1), mask=row)
    e = tl.where(own, 0.0, e)
    tl.store(shift_ptr + n, shift_N, mask=row)
    tl.store(rest_ptr + n, tl.sum(e, 1), mask=row)
    tl.store(target_z_ptr + n, tl.sum(tl.where(own, z, 0.0), 1), mask=owner)
    if mean_ptr is not None:
        tl.store(mean_ptr + n, tl.sum(tl.where(inside, z, 0.0), 1), mask=row)
    if entropy_ptr is not None:  # an exponential of 0 may have a logit of -inf
        weighted = tl.where(e > 0.0, e * (z - shift_N[:, None]), 0.0)
        tl.store(entropy_ptr + n, tl.sum(weighted, 1), mask=row)
    if top_ptr is not None:
        tl.store(top_ptr + n, top_N, mask=row)
    if stash_ptr is not None:
        e = kept(e, z, (column >= -first_column)[:, None], softcap)
        at = stash_ptr + n.to(tl.int64)[:, None] * stash_stride + c[None, :]
        # Four at a time, as the products are read: a wider store would lay the tile out anew, and
        # its rows would be summed in another order with a stash than without.
        at = tl.max_contiguous(at, [1, 4])
        tl.store(at, e.to(stash_ptr.dtype.element_ty), mask=inside)


@triton.jit
def keep_kernel(
    product_ptr,
    bias_ptr,
    target_ptr,
    lse_ptr,
    ref_product_ptr,
    ref_bias_ptr,
    ref_lse_ptr,
    own_share_ptr,
    ref_share_ptr,
    stash_ptr,
    R,
    C,
    first_column,
    product_stride,
    ref_stride,
    stash_stride,
    scale,
    softcap,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Probabilities from products once the log-sum-exps are known, zero for the target.

    With a reference's products, the mixture ``own * p + ref * p_ref`` by the shares of the row.
    """
    n, c, row, inside = places(R, C, ROWS, BLOCK)
    z = load_logits(product_ptr, bias_ptr, n, c, inside, C, product_stride, scale, softcap)
    e = tl.exp(z - tl.load(lse_ptr + n, mask=row, other=0.0)[:, None])
    if ref_product_ptr is not None:
        ref_z = load_logits(
            ref_product_ptr, ref_bias_ptr, n, c, inside, C, ref_stride, scale, softcap
        )
        ref_e = tl.exp(ref_z - tl.load(ref_lse_ptr + n, mask=row, other=0.0)[:, None])
        e *= tl.load(own_share_ptr + n, mask=row, other=0.0)[:, None]
        e += tl.load(ref_share_ptr + n, mask=row, other=0.0)[:, None] * ref_e
    scored = row
    if target_ptr is not None:
        target = tl.load(target_ptr + n, mask=row, other=-1)
        scored = target >= 0
        e = tl.where(c[None, :] == (target - first_column)[:, None], 0.0, e)
    e = kept(e, z, scored[:, None], softcap)
    at = stash_ptr + n.to(tl.int64)[:, None] * stash_stride + c[None, :]
    tl.store(at, e.to(stash_ptr.dtype.element_ty), mask=inside)


@triton.jit
def merge_kernel(
    shift_ptr,
    rest_ptr,
    target_z_ptr,
    target_ptr,
    lse_ptr,
    logp_ptr,
    own_ptr,
    top_shift_ptr,
    stash_ptr,
    mean_ptr,
    entropy_ptr,
    squares_ptr,
    top_ptr,
    mean_out_ptr,
    entropy_out_ptr,
    squares_out_ptr,
    top_out_ptr,
    N,
    K,
    V,
    width,
    stash_stride,
    softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sums of all tiles of BLOCK_N rows, in a fixed order.

    The tiles of a stash are brought to their row's largest shift.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n < N
    target = tl.load(target_ptr + n, mask=row, other=IGNORE)
    valid = ((target >= 0) & (target < V)) | (target == IGNORE)
    tl.device_assert(valid, "target_N must be 0 <= target < V or -100")
    shift = tl.full((BLOCK_N,), LOWEST, tl.float32)
    lowest = tl.full((BLOCK_N,), float("inf"), tl.float32)
    top = tl.full((BLOCK_N,), LOWEST, tl.float32)
    rest = tl.zeros((BLOCK_N,), tl.float32)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    entropy = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for k0 in tl.range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = (k < K)[:, None] & row[None, :]
        at = k.to(tl.int64)[:, None] * N + n[None, :]
        s = tl.load(shift_ptr + at, mask=inside, other=LOWEST)
        shift_new = tl.maximum(shift, tl.max(s, 0))
        lowest = tl.minimum(lowest, tl.min(tl.where(inside, s, float("inf")), 0))
        down = tl.exp(shift - shift_new)
        factor = tl.exp(s - shift_new[None, :])
        r = tl.load(rest_ptr + at, mask=inside, other=0.0)
        if mean_ptr is not None:
            mean += tl.sum(tl.load(mean_ptr + at, mask=inside, other=0.0), 0)
        if squares_ptr is not None:
            q = tl.load(squares_ptr + at, mask=inside, other=0.0)
            squares = squares * down * down + tl.sum(q * factor * factor, 0)
        if entropy_ptr is not None:  # sum e * (z - shift), moved to the new shift
            q = tl.load(entropy_ptr + at, mask=inside, other=0.0)
            entropy = down * (entropy + tl.where(down > 0.0, rest * (shift - shift_new), 0.0))
            moved = tl.where(factor > 0.0, r * (s - shift_new[None, :]), 0.0)
            entropy += tl.sum(factor * (q + moved), 0)
        if top_ptr is not None:
            top = tl.maximum(top, tl.max(tl.load(top_ptr + at, mask=inside, other=LOWEST), 0))
        rest = rest * down + tl.sum(r * factor, 0)
        shift = shift_new
    t = tl.load(target_z_ptr + n, mask=row, other=0.0)
    scored = target >= 0
    own = tl.where(scored, tl.exp(t - shift), 0.0)
    total = rest + own
    lse = shift + tl.log(total)
    # Log-odds against the target.  Only a sum of exactly zero makes it certain: NaN stays NaN.
    against = tl.where(rest == 0.0, float("-inf"), (shift - t) + tl.log(rest))
    tl.store(lse_ptr + n, lse, mask=row)
    tl.store(logp_ptr + n, tl.where(scored, -softplus(against), 0.0), mask=row)
    miss = 1.0 / (1.0 + tl.exp(-against))
    if softcap is not None:
        miss *= slope(t, softcap)
    tl.store(own_ptr + n, tl.where(scored, miss, 0.0), mask=row)
    tl.store(top_shift_ptr + n, shift, mask=row)
    if mean_out_ptr is not None:
        tl.store(mean_out_ptr + n, tl.where(scored, mean / V, 0.0), mask=row)
    if entropy_out_ptr is not None:  # -sum p (z - lse)
        entropy += tl.where(own > 0.0, own * (t - shift), 0.0)
        value = tl.log(total) - entropy / total
        tl.store(entropy_out_ptr + n, tl.where(scored, value, 0.0), mask=row)
    if squares_out_ptr is not None:
        value = tl.log(squares) - 2.0 * tl.log(total)
        tl.store(squares_out_ptr + n, tl.where(scored, value, 0.0), mask=row)
    if top_out_ptr is not None:
        tl.store(top_out_ptr + n, tl.where(scored & (t >= top), 1.0, 0.0), mask=row)
    if stash_ptr is not None:
        moved = row & (lowest < shift)  # a row with one shift, as nearly all, is left
        if tl.max(moved.to(tl.int32), 0) > 0:
            for v0 in tl.range(0, V, BLOCK_V):
                v = v0 + tl.arange(0, BLOCK_V)
                inside = moved[:, None] & (v < V)[None, :]
                tile = (v // width).to(tl.int64)[None, :]
                s = tl.load(shift_ptr + tile * N + n[:, None], mask=inside, other=0.0)
                at = stash_ptr + n.to(tl.int64)[:, None] * stash_stride + v[None, :]
                e = tl.load(at, mask=inside, other=0.0).to(tl.float32) * tl.exp(s - shift[:, None])
                tl.store(at, e.to(stash_ptr.dtype.element_ty), mask=inside)


def launch(R: int, C: int, warps: int = 4) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and block sizes of a kernel over whole rows of a tile (R, C)."""
    block = max(16, power_of_2(C))
    rows = max(1, _TILE_NUMEL // block)
    return (cdiv(R, rows),), {"ROWS": rows, "BLOCK": block, "num_warps": warps, **OPTIONS}


class HeadShape(NamedTuple):
    """What turns products into logits beside a bias."""

    scale: float = 1.0
    softcap: float | None = None


PLAIN = HeadShape()


class RefTile(NamedTuple):
    """The reference's part of a mixture: its products, biases and log-sum-exps, and both shares."""

    product_RC: Tensor
    bias_C: Tensor | None
    lse_R: Tensor
    own_share_R: Tensor
    ref_share_R: Tensor


def fold(
    product_RC: Tensor,
    bias_C: Tensor | None,
    head: HeadShape,
    target_R: Tensor,
    first_column: int,
    partials: Partials,
    rows: slice,
    stash_RC: Tensor | None,
    limit: float,
) -> None:
    """Fold a tile of fp32 products, ``rows`` of the block and one tile of columns.

    ``stash_RC`` takes the exponentials if given; its rows may be strided.
    """
    R, C = product_RC.shape
    k = first_column // partials.width
    stats = (x_KN if x_KN is None else x_KN[k, rows] for x_KN in partials.stat_list())
    grid, blocks = launch(R, C)
    fold_kernel[grid](
        product_RC, bias_C, target_R,
        partials.shift_KN[k, rows], partials.rest_KN[k, rows], partials.shift_KN[0, rows],
        partials.target_z_N[rows], stash_RC, *stats, R, C, first_column,
        product_RC.stride(0), 0 if stash_RC is None else stash_RC.stride(0),
        *head, limit, FIRST=k == 0, **blocks,
    )  # fmt: skip


def keep(
    product_RC: Tensor,
    bias_C: Tensor | None,
    head: HeadShape,
    target_R: Tensor | None,
    lse_R: Tensor,
    first_column: int,
    stash_RC: Tensor,
    ref: RefTile | None = None,
) -> None:
    """Probabilities of a tile, or their mixtures with those of ``ref``."""
    R, C = product_RC.shape
    grid, blocks = launch(R, C, 4 if ref is None else TWO_HEADS_WARPS)
    keep_kernel[grid](
        product_RC, bias_C, target_R, lse_R, *(ref or (None,) * 5), stash_RC, R, C,
        first_column, product_RC.stride(0), 0 if ref is None else ref.product_RC.stride(0),
        stash_RC.stride(0), *head, **blocks,
    )  # fmt: skip


@dataclass
class Merged:
    """Finished rows: ``own`` is the derivative of the log-prob by its uncapped logit.

    That is 1 - p(target), with all its digits, times the cap's slope.  Log-prob, ``own`` and
    statistics of an ignored row are zeros.
    """

    lse_N: Tensor
    logp_N: Tensor
    own_N: Tensor
    shift_N: Tensor
    stats: dict[str, Tensor]


def merge(
    partials: Partials,
    target_N: Tensor,
    V: int,
    head: HeadShape = PLAIN,
    stash_NV: Tensor | None = None,
) -> Merged:
    """Log-sum-exp, log-prob and statistics of each row from the partials of all its tiles.

    Every row of a stash is brought to one scale, ``exp(z - shift_N)``, in place.  A target that is
    no token trips a device assert.
    """
    K, N = partials.shift_KN.shape
    lse_N, logp_N, own_N, shift_N = (torch.empty_like(partials.target_z_N) for _ in range(4))
    out = {name: torch.empty_like(lse_N) for name in partials.stats}
    merge_kernel[(cdiv(N, 32),)](
        partials.shift_KN, partials.rest_KN, partials.target_z_N, target_N, lse_N, logp_N, own_N,
        shift_N, stash_NV, *partials.stat_list(), *(out.get(name) for name in STATS),
        N, K, V, partials.width, 0 if stash_NV is None else stash_NV.stride(0), head.softcap,
        BLOCK_N=32, BLOCK_K=16, BLOCK_V=256, num_warps=4,
        **ASSERTING,
    )  # fmt: skip
    return Merged(lse_N, logp_N, own_N, shift_N, out)
