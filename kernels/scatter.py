"""Sums of rows by index, in a fixed order and without atomics; and the factors of the backward.

N tokens, D hidden, I rows of the result, T hidden rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pointwise import ASSERTING, OPTIONS
from .support import cdiv, power_of_2

# Tokens that are put in order by comparing each with each, in one launch; a sort takes many.  An
# estimate that no GPU has confirmed.
MOST_COMPARED = 32768


@triton.jit
def order_kernel(
    index_ptr, order_ptr, size_ptr, start_ptr, N, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr
):
    """Places of BLOCK_N tokens in the stable order of their indices; see `TokenGroups`."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    own = tl.load(index_ptr + n, mask=inside, other=-1).to(tl.int32)[:, None]
    place = tl.zeros((BLOCK_N,), tl.int32)
    before = tl.zeros((BLOCK_N,), tl.int32)
    size = tl.zeros((BLOCK_N,), tl.int32)
    for m0 in tl.range(0, N, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        other = tl.load(index_ptr + m, mask=m < N, other=0).to(tl.int32)[None, :]
        same = (m < N)[None, :] & (other == own)
        earlier = same & (m[None, :] < n[:, None])
        place += tl.sum(((m < N)[None, :] & (other < own) | earlier).to(tl.int32), 1)
        before += tl.sum(earlier.to(tl.int32), 1)
        size += tl.sum(same.to(tl.int32), 1)
    tl.store(order_ptr + place, n, mask=inside)
    tl.store(size_ptr + place, size, mask=inside)
    index = tl.load(index_ptr + n, mask=inside, other=-1)
    tl.store(start_ptr + index, place, mask=(before == 0) & (index >= 0))


class TokenGroups(NamedTuple):
    """Which tokens belong to each of I rows, in their order; those of a negative index to none.

    The tokens of row i are the ``size_N[p]`` from ``order_N[p]`` on, ``p = start_I[i]``.  If a row
    has none, ``start_I`` is whatever was in memory, so nothing need be cleared: the token at
    its place, if it is one, has another index (Briggs and Torczon 1993).
    """

    index_N: Tensor
    order_N: Tensor
    size_N: Tensor
    start_I: Tensor

    @classmethod
    def of(cls, index_N: Tensor, I: int) -> "TokenGroups":  # noqa: E741
        """Group tokens by index, without a synchronization."""
        N, device = index_N.shape[0], index_N.device
        if N > MOST_COMPARED:
            sorted_N, order_N = index_N.sort(stable=True)
            first_N = torch.searchsorted(sorted_N, sorted_N)
            size_N = torch.searchsorted(sorted_N, sorted_N, right=True) - first_N
            start_I = torch.searchsorted(sorted_N, torch.arange(I, device=device))
            return cls(index_N, order_N.int(), size_N.int(), start_I.int())
        order_N, size_N = (torch.empty(N, dtype=torch.int32, device=device) for _ in range(2))
        start_I = torch.empty(I, dtype=torch.int32, device=device)
        order_kernel[(cdiv(N, 32),)](
            index_N, order_N, size_N, start_I, N, BLOCK_N=32, BLOCK=128, num_warps=4, **OPTIONS
        )  # fmt: skip
        return cls(index_N, order_N, size_N, start_I)


@triton.jit
def scaled(x, scale):
    """In fp32; a scale of zero gives zero whatever x is, as the row of an ignored target may be."""
    return tl.where(scale == 0.0, 0.0, x.to(tl.float32) * scale)


@triton.jit
def row_sums_kernel(
    out_ptr,
    base_ptr,
    base_factor_ptr,
    index_ptr,
    order_ptr,
    size_ptr,
    start_ptr,
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    b_index_ptr,
    N,
    offset,
    D,
    out_stride,
    base_stride,
    a_stride,
    b_stride,
    ACCUMULATE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``out[i] (+)= base[i] * base_factor + sum_n (a_scale[n] a[n] + b_scale[n] b[j(n)])``

    over the tokens n of row ``offset + i``; without segments token i alone.  ``j(n)`` is
    ``b_index[n]`` or n.
    """
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    column = d < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    if order_ptr is None:
        first = i
        last = i + 1
    else:
        first = tl.load(start_ptr + offset + i)
        known = (first >= 0) & (first < N)
        leader = tl.load(order_ptr + first, mask=known, other=0)
        known &= tl.load(index_ptr + leader, mask=known, other=-1) == offset + i
        last = first + tl.load(size_ptr + first, mask=known, other=0)
        if ACCUMULATE and base_ptr is None:  # a row to which nothing is added is left alone
            column &= known
    for j0 in tl.range(first, last, TOKENS):
        j = j0 + tl.arange(0, TOKENS)
        token = j < last
        n = j if order_ptr is None else tl.load(order_ptr + j, mask=token, other=0)
        n = n.to(tl.int64)  # before any product with a stride
        tile = token[:, None] & column[None, :]
        if a_ptr is not None:
            scale = token.to(tl.float32)
            if a_scale_ptr is not None:
                scale = tl.load(a_scale_ptr + n, mask=token, other=0.0)
            a = tl.load(a_ptr + n[:, None] * a_stride + d[None, :], mask=tile, other=0.0)
            total += tl.sum(scaled(a, scale[:, None]), 0)
        if b_ptr is not None:
            scale = tl.load(b_scale_ptr + n, mask=token, other=0.0)
            if b_index_ptr is None:
                row = n
            else:  # an ignored target has a scale of zero
                row = tl.maximum(tl.load(b_index_ptr + n, mask=token, other=0), 0)
            b = tl.load(b_ptr + row[:, None] * b_stride + d[None, :], mask=tile, other=0.0)
            total += tl.sum(scaled(b, scale[:, None]), 0)
    if base_ptr is not None:
        base = tl.load(base_ptr + i * base_stride + d, mask=column, other=0.0).to(tl.float32)
        if base_factor_ptr is not None:
            base *= tl.load(base_factor_ptr).to(tl.float32)
        total += base
    at = out_ptr + i * out_stride + d
    if ACCUMULATE:
        total += tl.load(at, mask=column, other=0.0).to(tl.float32)
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=column)


@triton.jit
def factors_kernel(
    target_ptr,
    coef_ptr,
    upstream_ptr,
    shift_ptr,
    lse_ptr,
    own_ptr,
    row_out_ptr,
    own_out_ptr,
    x_ptr,
    out_ptr,
    scale,
    D,
    x_stride,
    out_stride,
    BLOCK_D: tl.constexpr,
):
    """``row = -scale * coef * exp(shift - lse)`` and ``own * coef * scale`` of a token.

    Both are zeros where the target is ignored.  ``out[n] = x[n] * row[n]``, rounded once.
    """
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    coef = tl.load(coef_ptr + n)
    if upstream_ptr is not None:
        coef *= tl.load(upstream_ptr).to(tl.float32)
    coef = tl.where(tl.load(target_ptr + n) < 0, 0.0, coef) * scale
    row = -coef
    if shift_ptr is not None:  # an ignored row may not be finite
        down = tl.exp(tl.load(shift_ptr + n) - tl.load(lse_ptr + n))
        row = tl.where(coef == 0.0, 0.0, row * down)
    here = tl.program_id(1) == 0
    tl.store(row_out_ptr + n, row, mask=here)
    if own_ptr is not None:
        tl.store(own_out_ptr + n, scaled(tl.load(own_ptr + n), coef), mask=here)
    if out_ptr is not None:
        inside = d < D
        x = scaled(tl.load(x_ptr + n * x_stride + d, mask=inside, other=0.0), row)
        tl.store(out_ptr + n * out_stride + d, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_rows_kernel(
    out_ptr, x_ptr, scale_ptr, gain_ptr, D, out_stride, x_stride, BLOCK_D: tl.constexpr
):
    """``out[n] = x[n] * scale[n] / gain``, rounded once."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + n * x_stride + d, mask=d < D, other=0.0)
    x = scaled(x, tl.load(scale_ptr + n) / tl.load(gain_ptr))
    tl.store(out_ptr + n * out_stride + d, x.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def gather_kernel(out_ptr, x_ptr, rows_ptr, T, D, out_stride, x_stride, BLOCK_D: tl.constexpr):
    """``out[n] = x[rows[n]]``."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(rows_ptr + n)
    valid = (row >= 0) & (row < T)
    tl.device_assert(valid, "rows_N must be 0 <= row < T")
    inside = (d < D) & valid
    x = tl.load(x_ptr + row * x_stride + d, mask=inside)
    tl.store(out_ptr + n * out_stride + d, x, mask=inside)


@triton.jit
def column_sums_kernel(
    out_ptr, x_ptr, scale_ptr, N, V, x_stride, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr
):
    """``out[v] += sum_n scale[n] x[n, v]``, for the gradient of a bias."""
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for n0 in tl.range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        tile = (n < N)[:, None] & (v < V)[None, :]
        x = tl.load(x_ptr + n.to(tl.int64)[:, None] * x_stride + v[None, :], mask=tile, other=0.0)
        scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
        total += tl.sum(scaled(x, scale[:, None]), 0)
    total += tl.load(out_ptr + v, mask=v < V, other=0.0)
    tl.store(out_ptr + v, total, mask=v < V)


def _blocks(D: int, most: int = 2048) -> tuple[int, int]:
    block = min(most, max(16, power_of_2(D)))
    return cdiv(D, block), block


def row_sums(
    out_ID: Tensor,
    *,
    segments: TokenGroups | None = None,
    base_ID: Tensor | None = None,
    base_factor: Tensor | None = None,
    a_ND: Tensor | None = None,
    a_scale_N: Tensor | None = None,
    b_ND: Tensor | None = None,
    b_scale_N: Tensor | None = None,
    b_index_N: Tensor | None = None,
    offset: int = 0,
    accumulate: bool = False,
) -> None:
    """Write (or add to) rows: see `row_sums_kernel`.  ``offset`` is the first row's segment."""
    rows, D = out_ID.shape
    # Several rows of fp32 numbers at a time take the registers of a wide block.
    in_fp32 = any(x is not None and x.dtype == torch.float32 for x in (a_ND, b_ND))
    grid_d, block = _blocks(D, 1024 if segments is not None and in_fp32 else 2048)
    stride = [0 if x is None else x.stride(0) for x in (base_ID, a_ND, b_ND)]
    row_sums_kernel[(rows, grid_d)](
        out_ID, base_ID, base_factor, *(segments or (None,) * 4), a_ND, a_scale_N, b_ND, b_scale_N,
        b_index_N, 0 if segments is None else len(segments.order_N), offset, D, out_ID.stride(0),
        *stride, ACCUMULATE=accumulate, TOKENS=1 if segments is None else 4, BLOCK_D=block,
        num_warps=4, **OPTIONS,
    )  # fmt: skip


def factors(
    target_N: Tensor,
    coef_N: Tensor,
    upstream: Tensor | None,
    shift_N: Tensor | None,
    lse_N: Tensor | None,
    own_N: Tensor | None,
    scale: float,
    x_ND: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a token's kept row and its target's own entry count, and scaled rows of ``x_ND``.

    See `factors_kernel`; ``upstream`` is a scalar that multiplies all ``coef_N``.
    """
    N = coef_N.shape[0]
    row_N = torch.empty_like(coef_N)
    own_out_N = None if own_N is None else torch.empty_like(coef_N)
    out_ND, D, stride = None, 1, 0
    if x_ND is not None:
        out_ND = torch.empty(x_ND.shape, dtype=x_ND.dtype, device=x_ND.device)
        D, stride = x_ND.shape[1], x_ND.stride(0)
    grid_d, block = _blocks(D)
    factors_kernel[(N, grid_d)](
        target_N, coef_N, upstream, shift_N, lse_N, own_N, row_N, own_out_N, x_ND, out_ND, scale,
        D, stride, D, BLOCK_D=block, num_warps=4, **OPTIONS,
    )  # fmt: skip
    return row_N, own_out_N, out_ND


def gather(x_TD: Tensor, rows_N: Tensor) -> Tensor:
    """Rows by number; a number that is none trips a device assert."""
    (T, D), N = x_TD.shape, rows_N.shape[0]
    out_ND = torch.empty((N, D), dtype=x_TD.dtype, device=x_TD.device)
    grid_d, block = _blocks(D)
    gather_kernel[(N, grid_d)](
        out_ND, x_TD, rows_N, T, D, out_ND.stride(0), x_TD.stride(0), BLOCK_D=block, num_warps=4,
        **ASSERTING,
    )  # fmt: skip
    return out_ND


def scaled_rows(x_ND: Tensor, scale_N: Tensor, gain: Tensor) -> Tensor:
    """``x * scale / gain`` row by row, in the dtype of ``x``."""
    N, D = x_ND.shape
    out_ND = torch.empty((N, D), dtype=x_ND.dtype, device=x_ND.device)
    grid_d, block = _blocks(D)
    scale_rows_kernel[(N, grid_d)](
        out_ND, x_ND, scale_N, gain, D, out_ND.stride(0), x_ND.stride(0), BLOCK_D=block,
        num_warps=4, **OPTIONS,
    )  # fmt: skip
    return out_ND


def add_column_sums(out_V: Tensor, x_NV: Tensor, scale_N: Tensor) -> None:
    """``out += x.T @ scale`` in fp32."""
    N, V = x_NV.shape
    column_sums_kernel[(cdiv(V, 128),)](
        out_V, x_NV, scale_N, N, V, x_NV.stride(0), BLOCK_N=32, BLOCK_V=128, num_warps=4, **OPTIONS,
    )  # fmt: skip


def gain_of(scale_N: Tensor) -> Tensor:
    """A power of two that brings the largest of ``scale_N`` to [1, 2): fp16 has few exponents."""
    top = scale_N.abs().amax().clamp(min=1e-37)
    return torch.exp2(torch.floor(torch.log2(top)))
