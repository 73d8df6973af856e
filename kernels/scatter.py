"""Sums of rows by index, in a fixed order and without atomics; and the row scales of the backward.

N tokens, D hidden, I rows of the result.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pointwise import OPTIONS


@dataclass
class Segments:
    """Which tokens belong to each of I rows: ``order_N[start_I1[i] : start_I1[i + 1]]``, stable.

    Tokens with a negative index belong to none.
    """

    order_N: Tensor
    start_I1: Tensor

    @classmethod
    def of(cls, index_N: Tensor, I: int) -> "Segments":  # noqa: E741
        """Group tokens by index, without a synchronization."""
        sorted_N, order_N = index_N.sort(stable=True)
        edges_I1 = torch.arange(I + 1, device=index_N.device)
        return cls(order_N, torch.searchsorted(sorted_N, edges_I1))


@triton.jit
def scaled(x, scale):
    """In fp32; a scale of zero gives zero whatever x is, as the row of an ignored target may be."""
    return tl.where(scale == 0.0, 0.0, x.to(tl.float32) * scale)


@triton.jit
def row_sums_kernel(
    out_ptr,
    base_ptr,
    base_factor_ptr,
    order_ptr,
    start_ptr,
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    b_index_ptr,
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

    over the tokens n of row i; without segments token i alone.  ``j(n)`` is ``b_index[n]`` or n.
    """
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    column = d < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    if order_ptr is None:
        first = i
        last = i + 1
    else:
        first = tl.load(start_ptr + i)
        last = tl.load(start_ptr + i + 1)
    for j0 in tl.range(first, last, TOKENS):
        j = j0 + tl.arange(0, TOKENS)
        token = j < last
        n = j if order_ptr is None else tl.load(order_ptr + j, mask=token, other=0)
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


def _blocks(D: int) -> tuple[int, int]:
    block = min(2048, max(16, triton.next_power_of_2(D)))
    return triton.cdiv(D, block), block


def row_sums(
    out_ID: Tensor,
    *,
    segments: Segments | None = None,
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
    grid_d, block = _blocks(D)
    order = None if segments is None else segments.order_N
    start = None if segments is None else segments.start_I1[offset:]
    stride = [0 if x is None else x.stride(0) for x in (base_ID, a_ND, b_ND)]
    row_sums_kernel[(rows, grid_d)](
        out_ID, base_ID, base_factor, order, start, a_ND, a_scale_N, b_ND, b_scale_N, b_index_N,
        D, out_ID.stride(0), *stride,
        ACCUMULATE=accumulate, TOKENS=1 if segments is None else 4, BLOCK_D=block,
        num_warps=4, **OPTIONS,
    )  # fmt: skip


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
    column_sums_kernel[(triton.cdiv(V, 128),)](
        out_V, x_NV, scale_N, N, V, x_NV.stride(0), BLOCK_N=32, BLOCK_V=128, num_warps=4, **OPTIONS,
    )  # fmt: skip


def gain_of(scale_N: Tensor) -> Tensor:
    """A power of two that brings the largest of ``scale_N`` to [1, 2): fp16 has few exponents."""
    top = scale_N.abs().amax().clamp(min=1e-37)
    return torch.exp2(torch.floor(torch.log2(top)))
