"""What every kernel does to a tile of raw products: logits, their fold, and the kept exponentials.

A row's exponentials are taken relative to its *shift*, the largest logit of its first tile (`fold`)
or of some columns all over the head (`project`), and not to each tile's own maximum: one scale a
row is then enough for the matrix products of the backward.  Only a tile that exceeds the shift by
more than `limit` gets a shift of its own, so nothing overflows whatever the logits;
`kernels.fold.merge` brings such rows to one scale.

N rows of the tile, C columns (vocabulary entries), K tiles of a row.
"""

import triton
import triton.language as tl

# Multiply-adds as one instruction, whatever a Triton version's default: the speed of every kernel,
# and the bits that policy and reference share, depend on it.
OPTIONS = {"enable_fp_fusion": True}
# A kernel that checks what it reads: its asserts name a wrong value without a wait for it.
ASSERTING = {**OPTIONS, "debug": True, "sanitize_overflow": False}

IGNORE = tl.constexpr(-100)  # the target of a token that is not scored
LOWEST = tl.constexpr(-3.0e38)  # stands for the maximum of a tile that is -inf throughout


@triton.jit
def tanh(x):
    """From exp, which every backend and the interpreter have; absolute error of fp32 rounding."""
    t = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - t) / (1.0 + t)
    return tl.where(x < 0, -y, y)


@triton.jit
def log1p(u):
    """log(1 + u) for u >= 0, with all digits where u is small."""
    series = u * (1.0 - u * (0.5 - u * (0.3333333333 - u * 0.25)))
    return tl.where(u < 0.01, series, tl.log(1.0 + u))


@triton.jit
def softplus(x):
    """log(1 + exp(x))."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def logits(a, scale, softcap):
    """Logits of the biased products ``a``: scaled, then capped."""
    z = a * scale
    if softcap is not None:  # a product, since a division takes registers
        z = softcap * tanh(z * (1.0 / softcap))
    return z


@triton.jit
def slope(z, softcap):
    """d logit / d (uncapped logit) of a capped logit."""
    u = z * (1.0 / softcap)
    return 1.0 - u * u


@triton.jit
def row_shift(top_N, first_shift_ptr, n, row, limit, FIRST: tl.constexpr):
    """The shift of a tile's rows, from their maxima there."""
    if FIRST:
        shift_N = top_N
    else:
        first_N = tl.load(first_shift_ptr + n, mask=row, other=0.0)
        shift_N = tl.where(top_N > first_N + limit, top_N, first_N)
    return shift_N


@triton.jit
def kept(e, z, scored, softcap):
    """What the backward reads: exponentials times the cap's slope, zeros in ignored rows."""
    if softcap is not None:
        e *= slope(z, softcap)
    return tl.where(scored, e, 0.0)
