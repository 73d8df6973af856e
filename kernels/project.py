"""The projection fused with the fold: logits stay in registers.

One program makes a tile of ``h @ w.T`` with the tensor cores, fed by tensor descriptors (the bulk
copy engine where there is one), and folds it as `kernels.fold` does, without statistics.  Its tile
is the fold's tile: `Partials.width` is the tile's width.  bf16 and fp16; rows must start at 16-byte
boundaries.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .fold import HeadShape, Partials
from .pointwise import LOWEST, OPTIONS, kept, logits, row_shift


class Tile(NamedTuple):
    """Shape of a program's tile and how it is compiled."""

    m: int
    v: int
    k: int
    warps: int
    stages: int
    registers: int | None = None  # at most, a thread; NVIDIA only


# The largest tiles that compile without spills.
HOPPER = Tile(128, 128, 64, 8, 4)
AMPERE = Tile(128, 64, 32, 8, 3)
AMD = Tile(128, 64, 32, 4, 2)
INTERPRETED = Tile(32, 64, 32, 4, 1)
GROUP_M = 8  # row blocks that share a pass over the vocabulary, so that both stay in the L2 cache


def tile_for(device: torch.device) -> Tile:
    """The shipped tile of a device."""
    if device.type != "cuda":
        return INTERPRETED
    if torch.version.hip is not None:
        return AMD
    return HOPPER if torch.cuda.get_device_capability(device)[0] in (9, 10) else AMPERE


def feeds_from_descriptors(device: torch.device) -> bool:
    """Whether a copy engine serves descriptors: elsewhere their loads are not pipelined."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def half_logits(a, bias_ptr, first_v, c, V, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits of the columns ``c`` of a tile; -inf beyond the V columns that are left."""
    if bias_ptr is not None:
        a += tl.load(bias_ptr + first_v + c, mask=c < V, other=0.0).to(tl.float32)[None, :]
    return tl.where((c < V)[None, :], logits(a, scale, softcap, HAS_SOFTCAP), float("-inf"))


@triton.jit
def project_kernel(
    h_desc,
    w_desc,
    stash_desc,
    bias_ptr,
    target_ptr,
    lse_ptr,
    shift_ptr,
    rest_ptr,
    target_z_ptr,
    N,
    V,
    D,
    first_column,
    first_tile,
    num_tiles,
    scale,
    softcap,
    limit,
    HAS_SOFTCAP: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``num_tiles`` tiles from ``first_tile``, of the ``V`` columns from ``first_column``.

    With ``lse`` the rows are finished: their probabilities are kept and nothing is folded.
    """
    HALF: tl.constexpr = BLOCK_V // 2
    num_m = tl.cdiv(N, BLOCK_M)
    unit = tl.program_id(0)
    group = unit // (GROUP * num_tiles)
    first_m = group * GROUP
    group_m = tl.minimum(num_m - first_m, GROUP)
    inner = unit % (GROUP * num_tiles)
    m0 = (first_m + inner % group_m) * BLOCK_M
    tile = first_tile + inner // group_m
    v0 = tile * BLOCK_V

    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for k in tl.range(0, tl.cdiv(D, BLOCK_K)):
        h = h_desc.load([m0, k * BLOCK_K])
        w = w_desc.load([first_column + v0, k * BLOCK_K])
        acc = tl.dot(h, w.T, acc)

    # In halves, so that what is made of a tile takes half the registers.
    a0, a1 = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    n = m0 + tl.arange(0, BLOCK_M)
    row = n < N
    target = tl.load(target_ptr + n, mask=row, other=-1)
    # A column of this tile, or none; 32 bits are enough for it.
    own_c = tl.where(target < 0, -1, target - first_column - v0).to(tl.int32)
    c0 = tl.arange(0, HALF)
    z0 = half_logits(a0, bias_ptr, first_column + v0, c0, V - v0, scale, softcap, HAS_SOFTCAP)
    c1 = HALF + tl.arange(0, HALF)
    z1 = half_logits(a1, bias_ptr, first_column + v0, c1, V - v0, scale, softcap, HAS_SOFTCAP)
    own0 = c0[None, :] == own_c[:, None]
    own1 = c1[None, :] == own_c[:, None]
    scored = (target >= 0)[:, None]
    if lse_ptr is not None:
        shift_N = tl.load(lse_ptr + n, mask=row, other=0.0)
        e0 = tl.where(own0, 0.0, tl.exp(z0 - shift_N[:, None]))
        stash_desc.store([m0, v0], kept(e0, z0, scored, softcap, HAS_SOFTCAP).to(stash_desc.dtype))
        e1 = tl.where(own1, 0.0, tl.exp(z1 - shift_N[:, None]))
        e1 = kept(e1, z1, scored, softcap, HAS_SOFTCAP)
        stash_desc.store([m0, v0 + HALF], e1.to(stash_desc.dtype))
    else:
        top_N = tl.maximum(tl.maximum(tl.max(z0, 1), tl.max(z1, 1)), LOWEST)
        shift_N = row_shift(top_N, shift_ptr, n, row, limit, FIRST)
        e0 = tl.where(own0, 0.0, tl.exp(z0 - shift_N[:, None]))
        rest_N = tl.sum(e0, 1)
        own_z_N = tl.sum(tl.where(own0, z0, 0.0), 1)
        if stash_desc is not None:
            e0 = kept(e0, z0, scored, softcap, HAS_SOFTCAP)
            stash_desc.store([m0, v0], e0.to(stash_desc.dtype))
        e1 = tl.where(own1, 0.0, tl.exp(z1 - shift_N[:, None]))
        rest_N += tl.sum(e1, 1)
        own_z_N += tl.sum(tl.where(own1, z1, 0.0), 1)
        if stash_desc is not None:
            e1 = kept(e1, z1, scored, softcap, HAS_SOFTCAP)
            stash_desc.store([m0, v0 + HALF], e1.to(stash_desc.dtype))
        at = tile.to(tl.int64) * N + n
        tl.store(shift_ptr + at, shift_N, mask=row)
        tl.store(rest_ptr + at, rest_N, mask=row)
        tl.store(
            target_z_ptr + n, own_z_N, mask=(own_c >= 0) & (own_c < V - v0) & (own_c < BLOCK_V)
        )


def can_project(h_ND: Tensor, w_VD: Tensor) -> bool:
    """Whether `project` takes these operands: bf16 or fp16 with rows at 16-byte boundaries."""
    return all(
        x.dtype in (torch.bfloat16, torch.float16)
        and x.stride(1) == 1
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        for x in (h_ND, w_VD)
    )


def project(
    h_ND: Tensor,
    w_VD: Tensor,
    bias_V: Tensor | None,
    head: HeadShape,
    target_N: Tensor,
    *,
    tile: Tile,
    columns: tuple[int, int] | None = None,
    partials: Partials | None = None,
    lse_N: Tensor | None = None,
    stash_NC: Tensor | None = None,
    limit: float = 0.0,
) -> None:
    """Project rows onto the columns of the head (all, or a range) and fold, keep, or both.

    With ``partials`` the tiles are folded into them; with ``lse_N`` the probabilities of finished
    rows are kept.  ``stash_NC`` takes what is kept.
    """
    N, D = h_ND.shape
    first, last = columns or (0, w_VD.shape[0])
    V, K = last - first, triton.cdiv(last - first, tile.v)
    h_desc = TensorDescriptor.from_tensor(h_ND, [tile.m, tile.k])
    w_desc = TensorDescriptor.from_tensor(w_VD, [tile.v, tile.k])
    stash_desc = None
    if stash_NC is not None:
        stash_desc = TensorDescriptor.from_tensor(stash_NC, [tile.m, tile.v // 2])

    limits = {} if tile.registers is None else {"maxnreg": tile.registers}

    def launch(first_tile: int, num_tiles: int) -> None:
        if num_tiles == 0:
            return
        project_kernel[(triton.cdiv(N, tile.m) * num_tiles,)](
            h_desc, w_desc, stash_desc, bias_V, target_N, lse_N,
            None if partials is None else partials.shift_KN,
            None if partials is None else partials.rest_KN,
            None if partials is None else partials.target_z_N,
            N, V, D, first, first_tile, num_tiles, *head.arguments, limit,
            HAS_SOFTCAP=head.softcap is not None, FIRST=first_tile == 0, BLOCK_M=tile.m,
            BLOCK_V=tile.v, BLOCK_K=tile.k, GROUP=GROUP_M, num_warps=tile.warps,
            num_stages=tile.stages, **limits, **OPTIONS,
        )  # fmt: skip

    if lse_N is not None:
        launch(0, K)
    else:  # the first tile gives the other ones the shift of their rows
        launch(0, 1)
        launch(1, K - 1)
