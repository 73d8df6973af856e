"""The projection fused with the fold: logits stay in registers.

A program makes tiles of ``h @ w.T`` with the tensor cores, fed by tensor descriptors (the bulk
copy engine), and folds them as `kernels.fold` does.  Its tile is the fold's tile: `Partials.width`
is the tile's width.  On Hopper one program a multiprocessor takes tile after tile, so that the next
one's operands arrive while this one is folded.  bf16 and fp16; rows must start at 16-byte
boundaries.

What is kept of a row is relative to one shift, which has to be known before its first tile is
folded: `shift_kernel` makes it from some columns all over the head, since the first ones of a
vocabulary are often special tokens with small logits.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import capability_of
from .fold import HeadShape, Partials
from .pointwise import LOWEST, OPTIONS, kept, logits, row_shift
from .support import cdiv


class Tile(NamedTuple):
    """Shape of a program's tile and how it is compiled."""

    m: int
    v: int
    k: int
    warps: int
    stages: int
    persistent: bool = False  # a program a multiprocessor, or one a tile


# Chosen among ten by the times of a sketch of this kernel on an H100, for all widths: a row must
# not depend on what is kept of it.  Its spills are bounded in tests/kernels/test_aot.py.
HOPPER = Tile(128, 256, 64, 8, 3, persistent=True)
# Where a tile's logits need more registers: for statistics, and for a bias and a softcap together.
HOPPER_NARROW = Tile(128, 128, 64, 8, 4, persistent=True)
BLACKWELL = Tile(128, 128, 64, 8, 4)  # in a loop over tiles a softcap does not compile there
SMALL = Tile(128, 64, 32, 8, 3)  # for 99 KiB of shared memory
INTERPRETED = Tile(32, 64, 32, 4, 1, persistent=True)
SHIFT = Tile(64, 128, 64, 4, 4)
INTERPRETED_SHIFT = Tile(32, 32, 32, 4, 1)


def tile_for(device: torch.device, *, narrow: bool = False) -> Tile:
    """The shipped tile of a device; ``narrow`` for what takes more registers."""
    capability = capability_of(device)
    if capability is None:
        return INTERPRETED
    family = capability[0]
    if family == 9:
        return HOPPER_NARROW if narrow else HOPPER
    return BLACKWELL if family == 10 else SMALL


def feeds_from_descriptors(device: torch.device) -> bool:
    """Whether a copy engine serves descriptors: elsewhere their loads are not pipelined."""
    capability = capability_of(device)
    return capability is None or (torch.version.hip is None and capability[0] >= 9)


@cache
def multiprocessors(device: torch.device) -> int:
    """Programs of a persistent kernel."""
    if device.type != "cuda":
        return 3  # as few as give a program of the interpreter several tiles
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def half_logits(a, bias_ptr, first_v, c, V, scale, softcap):
    """Logits of the columns ``c`` of a tile; -inf beyond the V columns that are left."""
    if bias_ptr is not None:
        a += tl.load(bias_ptr + first_v + c, mask=c < V, other=0.0).to(tl.float32)[None, :]
    return tl.where((c < V)[None, :], logits(a, scale, softcap), float("-inf"))


@triton.jit
def shift_kernel(
    h_desc,
    w_desc,
    bias_ptr,
    shift_ptr,
    N,
    V,
    D,
    step,
    scale,
    softcap,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The largest logit of BLOCK_M rows in BLOCK_V columns of the head, ``step`` apart."""
    m0 = tl.program_id(0) * BLOCK_M
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for k in tl.range(0, tl.cdiv(D, BLOCK_K)):
        acc = tl.dot(h_desc.load([m0, k * BLOCK_K]), w_desc.load([0, k * BLOCK_K]).T, acc)
    c = tl.arange(0, BLOCK_V) * step
    z = half_logits(acc, bias_ptr, 0, c, V, scale, softcap)
    n = m0 + tl.arange(0, BLOCK_M)
    tl.store(shift_ptr + n, tl.maximum(tl.max(z, 1), LOWEST), mask=n < N)


@triton.jit
def fold_half(z, c, own_c, shift_N, left, stash_desc, m0, v0, scored, softcap, stats):
    """Sums over the columns ``c`` of a tile; what is kept of them goes to the stash."""
    mean_ptr, entropy_ptr, squares_ptr = stats
    own = c[None, :] == own_c[:, None]
    e = tl.exp(z - shift_N[:, None])
    squares_N = tl.sum(e * e, 1) if squares_ptr is not None else 0.0
    e = tl.where(own, 0.0, e)
    rest_N = tl.sum(e, 1)
    own_z_N = tl.sum(tl.where(own, z, 0.0), 1)
    mean_N = 0.0
    if mean_ptr is not None:
        mean_N = tl.sum(tl.where((c < left)[None, :], z, 0.0), 1)
    entropy_N = 0.0
    if entropy_ptr is not None:  # an exponential of 0 may have a logit of -inf
        entropy_N = tl.sum(tl.where(e > 0.0, e * (z - shift_N[:, None]), 0.0), 1)
    if stash_desc is not None:
        e = kept(e, z, scored, softcap)
        stash_desc.store([m0, v0], e.to(stash_desc.dtype))
    return rest_N, own_z_N, mean_N, entropy_N, squares_N


@triton.jit
def project_tile(
    unit, operands, sums, sizes, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One of all tiles, some blocks of rows at a time; the tuples are of `project_kernel`."""
    h_desc, w_desc, stash_desc, bias_ptr, target_ptr, given_ptr = operands
    shift_ptr, rest_ptr, target_z_ptr, top_ptr, stats = sums
    mean_ptr, entropy_ptr, squares_ptr = stats
    N, V, D, first_column, num_tiles, scale, softcap, limit = sizes
    HALF: tl.constexpr = BLOCK_V // 2
    # Row blocks that share a pass over the vocabulary, so that both stay in the L2 cache.
    GROUP: tl.constexpr = 8
    group = unit // (GROUP * num_tiles)
    first_m = group * GROUP
    group_m = tl.minimum(tl.cdiv(N, BLOCK_M) - first_m, GROUP)
    inner = unit % (GROUP * num_tiles)
    m0 = (first_m + inner % group_m) * BLOCK_M
    tile = inner // group_m
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
    scored = (target >= 0)[:, None]
    first_v = first_column + v0
    c0 = tl.arange(0, HALF)
    c1 = HALF + tl.arange(0, HALF)
    z0 = half_logits(a0, bias_ptr, first_v, c0, V - v0, scale, softcap)
    z1 = half_logits(a1, bias_ptr, first_v, c1, V - v0, scale, softcap)
    if shift_ptr is None:
        shift_N = tl.load(given_ptr + n, mask=row, other=0.0)
        e0 = tl.where(c0[None, :] == own_c[:, None], 0.0, tl.exp(z0 - shift_N[:, None]))
        stash_desc.store([m0, v0], kept(e0, z0, scored, softcap).to(stash_desc.dtype))
        e1 = tl.where(c1[None, :] == own_c[:, None], 0.0, tl.exp(z1 - shift_N[:, None]))
        e1 = kept(e1, z1, scored, softcap)
        stash_desc.store([m0, v0 + HALF], e1.to(stash_desc.dtype))
    else:
        top_N = tl.maximum(tl.maximum(tl.max(z0, 1), tl.max(z1, 1)), LOWEST)
        shift_N = row_shift(top_N, given_ptr, n, row, limit, False)
        rest0, own0, mean0, entropy0, squares0 = fold_half(
            z0, c0, own_c, shift_N, V - v0, stash_desc, m0, v0, scored, softcap, stats
        )
        rest1, own1, mean1, entropy1, squares1 = fold_half(
            z1, c1, own_c, shift_N, V - v0, stash_desc, m0, v0 + HALF, scored, softcap, stats
        )
        at = tile.to(tl.int64) * N + n
        tl.store(shift_ptr + at, shift_N, mask=row)
        tl.store(rest_ptr + at, rest0 + rest1, mask=row)
        owner = (own_c >= 0) & (own_c < V - v0) & (own_c < BLOCK_V)
        tl.store(target_z_ptr + n, own0 + own1, mask=owner)
        if mean_ptr is not None:
            tl.store(mean_ptr + at, mean0 + mean1, mask=row)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + at, entropy0 + entropy1, mask=row)
        if squares_ptr is not None:
            tl.store(squares_ptr + at, squares0 + squares1, mask=row)
        if top_ptr is not None:
            tl.store(top_ptr + at, top_N, mask=row)


@triton.jit
def project_kernel(
    h_desc,
    w_desc,
    stash_desc,
    bias_ptr,
    target_ptr,
    given_ptr,
    shift_ptr,
    rest_ptr,
    target_z_ptr,
    mean_ptr,
    entropy_ptr,
    squares_ptr,
    top_ptr,
    N,
    V,
    D,
    first_column,
    num_tiles,
    scale,
    softcap,
    limit,
    PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The ``num_tiles`` tiles of each row, of the ``V`` columns from ``first_column``.

    ``given`` has the shift of each row; without ``shift`` the rows are finished, ``given`` is their
    log-sum-exp, and their probabilities are kept and nothing is folded.
    """
    operands = h_desc, w_desc, stash_desc, bias_ptr, target_ptr, given_ptr
    stats = mean_ptr, entropy_ptr, squares_ptr
    sums = shift_ptr, rest_ptr, target_z_ptr, top_ptr, stats
    sizes = N, V, D, first_column, num_tiles, scale, softcap, limit
    if PERSISTENT:
        units = tl.cdiv(N, BLOCK_M) * num_tiles
        for unit in tl.range(tl.program_id(0), units, tl.num_programs(0), flatten=True):
            project_tile(unit, operands, sums, sizes, BLOCK_M, BLOCK_V, BLOCK_K)
    else:
        unit = tl.program_id(0)
        project_tile(unit, operands, sums, sizes, BLOCK_M, BLOCK_V, BLOCK_K)


def can_project(h_ND: Tensor, w_VD: Tensor) -> bool:
    """Whether `project` takes these operands: bf16 or fp16 with rows at 16-byte boundaries."""
    return all(
        x.dtype in (torch.bfloat16, torch.float16)
        and x.stride(1) == 1
        and x.stride(0) >= x.shape[1]
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        for x in (h_ND, w_VD)
    )


def row_shifts(h_ND: Tensor, w_VD: Tensor, bias_V: Tensor | None, head: HeadShape) -> Tensor:
    """What the exponentials of each row are relative to, from some columns all over the head."""
    (N, D), V = h_ND.shape, w_VD.shape[0]
    tile = INTERPRETED_SHIFT if h_ND.device.type == "cpu" else SHIFT
    step = max(1, V // tile.v)
    shift_N = torch.empty(N, dtype=torch.float32, device=h_ND.device)
    shift_kernel[(cdiv(N, tile.m),)](
        TensorDescriptor.from_tensor(h_ND, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(w_VD[::step], [tile.v, tile.k]), bias_V, shift_N, N, V, D,
        step, *head, BLOCK_M=tile.m, BLOCK_V=tile.v,
        BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
    )  # fmt: skip
    return shift_N


def project(
    h_ND: Tensor,
    w_VD: Tensor,
    bias_V: Tensor | None,
    head: HeadShape,
    target_N: Tensor,
    given_N: Tensor,
    *,
    tile: Tile,
    columns: tuple[int, int] | None = None,
    partials: Partials | None = None,
    stash_NC: Tensor | None = None,
    limit: float = 0.0,
) -> None:
    """Project rows onto the columns of the head (all, or a range) and fold, keep, or both.

    With ``partials`` the tiles are folded into them and ``given_N`` has the `row_shifts`; without,
    it has the log-sum-exps of finished rows, whose probabilities are kept.  ``stash_NC`` takes what
    is kept.
    """
    N, D = h_ND.shape
    first, last = columns or (0, w_VD.shape[0])
    V, K = last - first, cdiv(last - first, tile.v)
    stash_desc = None
    if stash_NC is not None:
        stash_desc = TensorDescriptor.from_tensor(stash_NC, [tile.m, tile.v // 2])
    programs = cdiv(N, tile.m) * K
    if tile.persistent:
        programs = min(programs, multiprocessors(h_ND.device))
    folded = (None,) * 7
    if partials is not None:
        folded = partials.shift_KN, partials.rest_KN, partials.target_z_N, *partials.stat_list()
    project_kernel[(programs,)](
        TensorDescriptor.from_tensor(h_ND, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(w_VD, [tile.v, tile.k]), stash_desc, bias_V, target_N, given_N,
        *folded, N, V, D, first, K, *head, limit,
        PERSISTENT=tile.persistent, BLOCK_M=tile.m,
        BLOCK_V=tile.v, BLOCK_K=tile.k, num_warps=tile.warps,
        num_stages=tile.stages, **OPTIONS,
    )  # fmt: skip
