"""What a KL to a reference takes beside the fold: tiles of both heads' logits, and two stashes.

R rows of a tile, C columns of a tile, V vocabulary.
"""

import triton
import triton.language as tl
from torch import Tensor

from .fold import TWO_HEADS_WARPS, HeadShape, launch, load_logits, places
from .pointwise import OPTIONS, kept
from .support import cdiv


@triton.jit
def cross_kernel(
    product_ptr,
    bias_ptr,
    ref_product_ptr,
    ref_bias_ptr,
    ref_shift_ptr,
    cross_ptr,
    target_ptr,
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
    """``sum exp(z_ref - shift_ref) * (z_ref - z)`` of each row of two tiles, for the KL.

    A stash takes the exponentials, as the policy's takes its own: zero for the target, and times
    the slope of the policy's cap.
    """
    n, c, row, inside = places(R, C, ROWS, BLOCK)
    z = load_logits(product_ptr, bias_ptr, n, c, inside, C, product_stride, scale, softcap)
    ref_z = load_logits(ref_product_ptr, ref_bias_ptr, n, c, inside, C, ref_stride, scale, softcap)
    e = tl.exp(ref_z - tl.load(ref_shift_ptr + n, mask=row, other=0.0)[:, None])
    # Where the reference gives no probability there is no term, even if both logits are -inf.
    tl.store(cross_ptr + n, tl.sum(tl.where(e > 0.0, e * (ref_z - z), 0.0), 1), mask=row)
    if stash_ptr is not None:
        target = tl.load(target_ptr + n, mask=row, other=-1)
        own = c[None, :] == (target - first_column)[:, None]
        e = kept(tl.where(own, 0.0, e), z, (target >= 0)[:, None], softcap)
        at = stash_ptr + n.to(tl.int64)[:, None] * stash_stride + c[None, :]
        tl.store(at, e.to(stash_ptr.dtype.element_ty), mask=inside)


@triton.jit
def mix_kernel(
    stash_ptr,
    ref_ptr,
    own_ptr,
    ref_share_ptr,
    V,
    stash_stride,
    ref_stride,
    BLOCK: tl.constexpr,
):
    """``stash = own * stash + ref_share * ref`` in a row, rounded once."""
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = v < V
    at = stash_ptr + n * stash_stride + v
    e = tl.load(at, mask=inside, other=0.0).to(tl.float32) * tl.load(own_ptr + n)
    ref_e = tl.load(ref_ptr + n * ref_stride + v, mask=inside, other=0.0).to(tl.float32)
    e += ref_e * tl.load(ref_share_ptr + n)
    tl.store(at, e.to(stash_ptr.dtype.element_ty), mask=inside)


def cross(
    product_RC: Tensor,
    bias_C: Tensor | None,
    ref_product_RC: Tensor,
    ref_bias_C: Tensor | None,
    head: HeadShape,
    ref_shift_R: Tensor,
    cross_R: Tensor,
    kept: tuple[Tensor, int, Tensor] | None = None,
) -> None:
    """Each row's share of the cross term of KL(reference || policy) from two tiles.

    To keep the reference's exponentials, ``kept`` has the targets, the tile's first column and the
    stash that takes them.
    """
    R, C = product_RC.shape
    target_R, first_column, stash_RC = kept or (None, 0, None)
    grid, blocks = launch(R, C, TWO_HEADS_WARPS)
    cross_kernel[grid](
        product_RC, bias_C, ref_product_RC, ref_bias_C, ref_shift_R, cross_R, target_R, stash_RC,
        R, C, first_column, product_RC.stride(0), ref_product_RC.stride(0),
        0 if stash_RC is None else stash_RC.stride(0), *head, **blocks,
    )  # fmt: skip


def mix(stash_RV: Tensor, ref_RV: Tensor, own_R: Tensor, ref_share_R: Tensor) -> None:
    """``stash = own * stash + ref_share * ref`` row by row, in place."""
    R, V = stash_RV.shape
    mix_kernel[(R, cdiv(V, 2048))](
        stash_RV, ref_RV, own_R, ref_share_R, V, stash_RV.stride(0), ref_RV.stride(0),
        BLOCK=2048, num_warps=4, **OPTIONS,
    )  # fmt: skip
