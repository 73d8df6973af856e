"""The Triton kernels against fp64, each by itself and then in the ops, under the interpreter.

The gold value of every check is made in fp64 from the same rounded inputs.  Bounds count roundings
of the dtype, or are the error PyTorch makes with the same inputs; nothing else is allowed.

Legend: T hidden rows, N targets, D hidden, V vocabulary, C columns of a tile, K tiles, I rows of a
sum, P pairs, S = 2P sequences.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from checks import (
    BETA,
    ROUTES,
    Formula,
    Problem,
    apo_zero_formula,
    gold_logp,
    gold_loss,
    grad,
    hinge_formula,
    ipo_formula,
    make_problem,
    max_error,
    nca_pair_formula,
    preference,
    relative_error,
    sigmoid_formula,
    sigmoid_norm_formula,
)
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdpo import LinearDPOLoss, linear_logp, linear_preference_loss
from fastdpo.kernels import fold, kl, pair, pointwise, project, scatter, support
from fastdpo.kernels.fold import HeadShape, Partials
from fastdpo.loss import module, reference
from fastdpo.loss.examples import Examples
from fastdpo.loss.objectives import (
    KERNEL_FORMULAS,
    SIGMOID,
    apo_down,
    apo_zero,
    as_objective,
    bco_pair,
    cdpo,
    discopop,
    exo_pair,
    hinge,
    ipo,
    length_normalized_dpo,
    lr_dpo,
    nca_pair,
    robust,
    simpo,
    sppo_hard,
)
from fastdpo.loss.plan import MIB, Plan, make_plan
from fastdpo.loss.reference import IGNORE
from fastdpo.loss.result import METRICS, PreferenceLoss

pytestmark = [
    pytest.mark.skipif(not support.is_interpreted(), reason="written for the interpreter"),
    # exp(-inf), log(0), inf * 0 outside of masks: a GPU does not warn of them
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
U = 2.0**-24  # largest relative error of one rounding to fp32
NAN = float("nan")
PLAIN = HeadShape()
INF = float("inf")


# ------------------------------------------------------------------------------------------ helpers
def rounding(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype) -> float:
    """Largest error of rounding a number below the normal range: half the smallest number."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


def assert_within(found: Tensor, gold: Tensor, allowed: Tensor | float, what: str = "") -> None:
    """``|found - gold| <= allowed`` everywhere; equal infinities are equal, a NaN is an error."""
    error = torch.where(found.double() == gold, 0.0, (found.double() - gold).abs())
    excess = (error - allowed).max()
    assert (error <= allowed).all(), f"{what}: {excess:.2e} over what is allowed"


def spaced(x: Tensor, gap: int = 3, between: float = NAN) -> Tensor:
    """The same matrix with NaN, or another number, between its rows."""
    wide = torch.full((x.shape[0], x.shape[1] + gap), between, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def output(rows: int, columns: int, dtype: torch.dtype, gap: int = 3) -> Tensor:
    """A matrix to write to, rows apart."""
    return spaced(torch.full((rows, columns), NAN, dtype=dtype), gap, between=7.0)


def assert_gaps_untouched(x: Tensor) -> None:
    assert x._base is not None
    assert (x._base[:, x.shape[1] :] == 7).all()


def blank_partials(target_N: Tensor, V: int, width: int, stats=frozenset()) -> Partials:
    """`Partials.empty` with NaN instead of what was in memory."""
    partials = Partials.empty(target_N, V, width, stats)
    for x in (partials.shift_KN, partials.rest_KN, partials.target_z_N, *partials.stats.values()):
        x.fill_(NAN)
    return partials


def gold_logits(product_NC: Tensor, bias_C: Tensor | None, head: HeadShape) -> Tensor:
    z_NC = product_NC.double()
    if bias_C is not None:
        z_NC = z_NC + bias_C.double()
    z_NC = z_NC * head.scale
    return z_NC if head.softcap is None else head.softcap * torch.tanh(z_NC / head.softcap)


def slope_of(z_NC: Tensor, head: HeadShape) -> Tensor:
    """d logit / d uncapped logit."""
    if head.softcap is None:
        return torch.ones_like(z_NC)
    return 1 - (z_NC / head.softcap).square()


@dataclass
class Shape:
    """A head and how often its logits are rounded before they are exponentials.

    A product is exact here.  Rounded are: its difference to the shift and the log-sum-exp; the sum
    with a bias, the scale and the product with it; the quotient by the cap, its tanh (three times)
    and the product with the cap.
    """

    head: HeadShape
    has_bias: bool
    roundings: int

    def tolerance(self, z: Tensor) -> float:
        """Relative error of an exponential, so absolute error of a log-sum-exp.

        Beside the roundings of logits up to the largest, that of exp, of log and of a sum in pairs
        of up to 4096 numbers.
        """
        largest = z[z.isfinite()].abs().max()
        if self.head.softcap is not None:
            largest = largest.clamp(min=self.head.softcap)
        return float(U * (self.roundings * largest + 16))


SHAPES = {
    "plain": Shape(HeadShape(), False, 2),
    "bias": Shape(HeadShape(scale=-0.7), True, 5),
    "softcap": Shape(HeadShape(scale=1.3, softcap=12.0), True, 10),
}


# ----------------------------------------------------------------------------- elementary functions
@triton.jit
def functions_kernel(x_ptr, tanh_ptr, log1p_ptr, softplus_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(tanh_ptr + i, pointwise.tanh(x), mask=i < n)
    tl.store(log1p_ptr + i, pointwise.log1p(tl.exp(x)), mask=i < n)
    tl.store(softplus_ptr + i, pointwise.softplus(x), mask=i < n)


def test_pointwise_functions_against_fp64():
    x = torch.cat([torch.linspace(-90, 90, 1801), torch.linspace(-9, 2, 700), torch.randn(300) / 9])
    tanh, log1p, softplus = (torch.empty_like(x) for _ in range(3))
    block = triton.next_power_of_2(len(x))
    functions_kernel[(1,)](x, tanh, log1p, softplus, len(x), BLOCK=block)  # pyright: ignore
    gold = x.double()
    # exp(-2|x|) is rounded once, and so are sum, difference and quotient of numbers of at most 2.
    assert_within(tanh, torch.tanh(gold), 4 * U, "tanh")
    u = x.exp().double()  # given with its rounding
    finite = u.isfinite()
    # Where u is small the series has all its digits; elsewhere 1 + u is rounded first.
    allowed = torch.where(u < 0.01, 5 * U * u + smallest(torch.float32), 3 * U + U * gold.abs())
    assert_within(log1p[finite], torch.log1p(u)[finite], allowed[finite], "log1p")
    value = torch.nn.functional.softplus(gold, threshold=200)
    allowed = torch.where(
        gold < -5, 8 * U * value + 2 * smallest(torch.float32), 6 * U + U * gold.abs()
    )
    assert_within(softplus, value, allowed, "softplus")


# -------------------------------------------------------------------------------------- fold, merge
def fold_all(
    product_NV: Tensor,
    bias_V: Tensor | None,
    head: HeadShape,
    target_N: Tensor,
    width: int,
    *,
    stash_NV: Tensor | None = None,
    stats: frozenset[str] = frozenset(),
    limit: float = 30.0,
    rows: int = 50,
) -> Partials:
    """Fold every tile: `width` columns and `rows` rows at a time."""
    N, V = product_NV.shape
    partials = blank_partials(target_N, V, width, stats)
    for n0 in range(0, N, rows):
        part = slice(n0, min(n0 + rows, N))
        for v0 in range(0, V, width):
            c = slice(v0, min(v0 + width, V))
            fold.fold(
                product_NV[part, c], None if bias_V is None else bias_V[c], head, target_N[part],
                v0, partials, part, None if stash_NV is None else stash_NV[part, c], limit,
            )  # fmt: skip
    return partials


def assert_merged(
    merged: fold.Merged,
    z_NV: Tensor,
    target_N: Tensor,
    tolerance: float,
    terms: int = 16,
    head: HeadShape = PLAIN,
) -> None:
    """Everything `merge` returns, against the logits in fp64.

    ``terms`` counts the roundings of a sum of logits, made in pairs and then tile by tile.
    """
    scored_N = target_N != IGNORE
    lse_N = torch.logsumexp(z_NV, 1)
    index_N1 = target_N.clamp(min=0)[:, None]
    own_N = z_NV.gather(1, index_N1)[:, 0]
    rest_N = torch.logsumexp(z_NV.scatter(1, index_N1, -INF), 1)
    logp_N = torch.where(scored_N, -torch.nn.functional.softplus(rest_N - own_N, threshold=200), 0)
    miss_N = torch.where(scored_N, torch.sigmoid(rest_N - own_N), 0)
    assert_within(merged.lse_N, lse_N, tolerance, "lse")
    # An error of the log-odds is a relative error of 1 - p and, of a likely target, of its logp.
    assert_within(merged.logp_N, logp_N, 2 * tolerance * (-logp_N).clamp(max=1), "logp")
    slope_N = slope_of(own_N, head)  # near 0 it has the error of the logit, not a relative one
    allowed_N = 2 * tolerance * miss_N * slope_N.abs().clamp(min=0 if head.softcap is None else 1)
    assert_within(merged.own_N, miss_N * slope_N, allowed_N, "own")
    gold = reference.token_stats(z_NV, target_N)
    allowed = {
        "mean_logit": tolerance + U * terms * z_NV.abs().mean(1),
        # sum p (z - lse) has the relative errors of p and the absolute ones of z - lse
        "entropy": 3 * tolerance * (1 + gold["entropy"]),
        "log_sum_sq_probs": 4 * tolerance,
        "top1": 0.0,
    }
    for name, value_N in merged.stats.items():
        assert_within(value_N, gold[name], allowed[name], name)


def tile_problem(shape: Shape, dtype: torch.dtype, N: int, V: int, peak: float = 30.0):
    """fp32 products, a bias of a dtype, targets of which every fifth is ignored."""
    product_NV = torch.randn(N, V) * (peak / 4)
    product_NV.clamp_(-peak, peak)
    bias_V = torch.randn(V).to(dtype) if shape.has_bias else None
    target_N = torch.randint(V, (N,))
    z_NV = gold_logits(product_NV, bias_V, shape.head)
    target_N[2::6] = z_NV.argmax(1)[2::6]
    target_N[1::5] = IGNORE
    target_N[0], target_N[-1] = V - 1, 0
    return spaced(product_NV), bias_V, target_N, z_NV


def gold_stash(z_NV: Tensor, shift_N: Tensor, target_N: Tensor | None, head: HeadShape):
    """Exponentials that are kept, and what they are without the cap's slope."""
    e_NV = (z_NV - shift_N.double()[:, None]).exp()
    kept_NV = e_NV * slope_of(z_NV, head)
    if target_N is not None:
        kept_NV = kept_NV.scatter(1, target_N.clamp(min=0)[:, None], 0.0)
        kept_NV[target_N == IGNORE] = 0.0
    return kept_NV, e_NV


def assert_stash(stash_NV: Tensor, kept_NV: Tensor, e_NV: Tensor, tolerance: float, times: int = 1):
    """Rounded ``times`` to its dtype; a slope near 0 has the error of the logits, not a relative
    one."""
    dtype = stash_NV.dtype
    allowed = times * (rounding(dtype) * kept_NV.abs() + smallest(dtype)) + 3 * tolerance * e_NV
    assert_within(stash_NV, kept_NV, allowed, "stash")
    assert ((stash_NV == 0) | (kept_NV != 0)).all()
    assert_gaps_untouched(stash_NV)


SIZES = {"narrow": (70, 101, 40), "wide": (5, 3700, 1500)}  # rows, vocabulary, width of a tile


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_fold_against_fp64(name, dtype, size):
    shape, (N, V, width) = SHAPES[name], SIZES[size]
    product_NV, bias_V, target_N, z_NV = tile_problem(shape, dtype, N, V)
    stash_NV, limit = output(N, V, dtype), fold.LIMITS[dtype]
    partials = fold_all(
        product_NV, bias_V, shape.head, target_N, width,
        stash_NV=stash_NV, stats=frozenset(fold.STATS), limit=limit,
    )  # fmt: skip
    merged = fold.merge(partials, target_N, V, shape.head, stash_NV)
    tolerance = shape.tolerance(product_NV * shape.head.scale)
    assert_merged(merged, z_NV, target_N, tolerance, head=shape.head)
    assert merged.stats.keys() == set(fold.STATS)
    assert 0 < merged.stats["top1"].sum() < (target_N != IGNORE).sum()
    kept_NV, e_NV = gold_stash(z_NV, merged.shift_N, target_N, shape.head)
    assert_stash(stash_NV, kept_NV, e_NV, tolerance, times=2)
    # Nothing asked for changes nothing.
    plain = fold_all(product_NV, bias_V, shape.head, target_N, width, limit=limit)
    assert not plain.stats
    for found, wanted in ((plain.shift_KN, partials.shift_KN), (plain.rest_KN, partials.rest_KN)):
        assert torch.equal(found, wanted)
    assert torch.equal(fold.merge(plain, target_N, V).logp_N, merged.logp_N)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_fold_of_tiles_that_are_minus_infinity(empty):
    """A padded vocabulary: a bias of -inf over a whole tile, the first one included."""
    shape, width = Shape(HeadShape(), True, 3), 40
    product_NV, bias_V, target_N, _ = tile_problem(shape, torch.bfloat16, 9, 3 * width)
    assert bias_V is not None
    hidden = torch.arange(3 * width) // width == empty
    bias_V[hidden] = -INF
    z_NV = gold_logits(product_NV, bias_V, shape.head)
    seen = (~hidden).nonzero()[:, 0]
    target_N = torch.where(target_N == IGNORE, IGNORE, seen[target_N % len(seen)])
    target_N[3] = int(hidden.nonzero()[0])  # of no probability at all
    stash_NV = output(9, 3 * width, torch.bfloat16)
    stats = frozenset({"entropy", "log_sum_sq_probs", "top1"})
    partials = fold_all(
        product_NV, bias_V, shape.head, target_N, width, stash_NV=stash_NV, stats=stats
    )
    merged = fold.merge(partials, target_N, 3 * width, stash_NV=stash_NV)
    finite_NV = z_NV.clamp(min=-1e4)  # the oracle's 0 * inf
    tolerance = shape.tolerance(z_NV)
    others = torch.arange(9) != 3
    lse_N = torch.logsumexp(z_NV, 1)
    assert_within(merged.lse_N, lse_N, tolerance)
    assert merged.logp_N[3] == -INF and merged.own_N[3] == 1 and merged.stats["top1"][3] == 0
    picked = fold.Merged(
        merged.lse_N[others], merged.logp_N[others], merged.own_N[others],
        merged.shift_N[others], {name: x[others] for name, x in merged.stats.items()},
    )  # fmt: skip
    assert_merged(picked, finite_NV[others], target_N[others], tolerance)
    gold = reference.token_stats(finite_NV, target_N)
    entropy_N = merged.stats["entropy"]
    assert_within(entropy_N, gold["entropy"], 3 * tolerance * (1 + gold["entropy"]), "entropy")
    kept_NV, e_NV = gold_stash(z_NV, merged.shift_N, target_N, shape.head)
    assert_stash(stash_NV, kept_NV, e_NV, tolerance, times=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_settles_rows_whose_later_tiles_are_larger(dtype):
    """Later tiles above the first by less than the limit, by more, and by over a thousand."""
    limit, width = fold.LIMITS[dtype], 20
    steps = [
        (0.0, 0.0), (limit - 0.5, 0.0), (0.0, limit - 0.5), (limit + 0.5, 0.0), (40.0, 80.0),
        (-50.0, 2000.0), (1500.0, -1500.0), (-1e4, -1e4), (3000.0, 6000.0),
    ]  # fmt: skip
    first_NC = torch.rand(len(steps), width) * 5 - 5
    first_NC[:, 3] = 0.0
    rest = [first_NC + torch.tensor(step)[:, None] for step in zip(*steps)]
    product_NV = spaced(torch.cat([first_NC, *rest], 1)[:, : 3 * width - 7])
    target_N = torch.arange(len(steps)) * 6
    z_NV = product_NV.double()
    stash_NV = output(len(steps), 3 * width - 7, dtype)
    partials = fold_all(
        product_NV, None, HeadShape(), target_N, width, stash_NV=stash_NV, limit=limit
    )
    top_KN = torch.stack([part.amax(1) for part in product_NV.split(width, 1)])
    wanted_KN = torch.where(top_KN > top_KN[:1] + limit, top_KN, top_KN[:1])
    assert torch.equal(partials.shift_KN, wanted_KN)
    assert (wanted_KN != wanted_KN[:1]).any(0).tolist() == [False] * 3 + [True] * 4 + [False, True]
    before = stash_NV.clone()
    assert before.isfinite().all()
    merged = fold.merge(partials, target_N, z_NV.shape[1], stash_NV=stash_NV)
    assert torch.equal(merged.shift_N, wanted_KN.amax(0))
    tolerance = SHAPES["plain"].tolerance(z_NV)
    assert_merged(merged, z_NV, target_N, tolerance)
    one_shift = (wanted_KN == wanted_KN[:1]).all(0)
    assert torch.equal(stash_NV[one_shift], before[one_shift])
    kept_NV, e_NV = gold_stash(z_NV, merged.shift_N, target_N, HeadShape())
    # The exponents are differences of numbers that are exact here.
    assert_stash(stash_NV, kept_NV, e_NV, U * 100, times=2)


def test_merge_settles_a_stash():
    """More rows, tiles and columns than one block; NaN where nothing may be read."""
    N, V, width = 35, 2501, 2
    K = triton.cdiv(V, width)
    target_N = torch.zeros(N, dtype=torch.int64)
    partials = Partials.empty(target_N, V, width, frozenset())
    partials.shift_KN.fill_(1.0)
    partials.shift_KN[K - 1, 1] = -0.5  # the very last tile alone
    partials.shift_KN[5, 2] = 3.0
    partials.shift_KN[:, 4] = torch.randn(K)
    partials.shift_KN[3, 34] = 1.5
    partials.rest_KN.fill_(1.0)
    partials.target_z_N.fill_(0.0)
    top_N = partials.shift_KN.amax(0)
    before = torch.rand(N, V).bfloat16()
    stash_NV = spaced(before, between=7.0)
    fold.merge(partials, target_N, V, stash_NV=stash_NV)
    down_KN = (partials.shift_KN.double() - top_N.double()).exp()
    gold = before.double() * down_KN.repeat_interleave(width, 0)[:V].T
    assert_within(stash_NV, gold, gold * (rounding(torch.bfloat16) + 8 * U), "settled")
    one_shift = (partials.shift_KN == top_N).all(0)
    assert one_shift.sum() == N - 4
    assert torch.equal(stash_NV[one_shift], before[one_shift])
    assert_gaps_untouched(stash_NV)


def test_fold_of_confident_targets():
    """Where p is near 1, logp and 1 - p keep all their digits."""
    gaps = torch.tensor([1.0, 6.0, 9.0, 13.5, 17.0, 25.0, 50.0, 80.0])
    product_NV = torch.randn(len(gaps), 50)
    target_N = torch.arange(len(gaps)) * 6
    others = product_NV.scatter(1, target_N[:, None], -INF)
    own_N = torch.logsumexp(others, 1) + gaps
    product_NV.scatter_(1, target_N[:, None], own_N[:, None])
    partials = fold_all(product_NV, None, HeadShape(), target_N, 20, limit=100.0)
    merged = fold.merge(partials, target_N, 50)
    z_NV = product_NV.double()
    rest_N = torch.logsumexp(z_NV.scatter(1, target_N[:, None], -INF), 1)
    against_N = rest_N - own_N.double()
    logp_N = -torch.nn.functional.softplus(against_N, threshold=200)
    miss_N = torch.sigmoid(against_N)
    assert -2e-6 < logp_N[3] < -1e-6
    # The log-odds are rounded as a difference and as a sum; exp and series a few times more.
    allowed = U * (2 * gaps + 12)
    relative = torch.where(gaps > 5, 0.0, 3 * U)  # 1 + u is rounded where u is no small number
    assert_within(merged.logp_N / logp_N - 1, torch.zeros(8), allowed + relative, "logp")
    assert_within(merged.own_N / miss_N - 1, torch.zeros(8), allowed, "miss")


def test_merge_of_many_tiles():
    """More rows and more tiles than one block; partials as given, shifts up to 1e3 apart."""
    K, N, V = 37, 35, 1031
    partials = Partials.empty(torch.zeros(N, dtype=torch.int64), V, 28, frozenset(fold.STATS))
    partials.shift_KN.copy_(torch.randn(K, N) * 5)
    partials.shift_KN[:, 3] = 0.5  # as usual: one shift
    partials.shift_KN[20, 4] = 800.0
    partials.shift_KN[:, 5] -= 900.0
    partials.shift_KN[0, 6] = -3e38  # a first tile that is -inf throughout
    partials.shift_KN[17:, 7] = -3e38
    partials.shift_KN[:, 8] -= 40.0  # of an ignored target: all logits are below zero
    partials.rest_KN.copy_(torch.rand(K, N) * 9)
    partials.rest_KN[partials.shift_KN == -3e38] = 0.0
    stats = partials.stats
    stats["mean_logit"].copy_(torch.randn(K, N) * 100)
    stats["entropy"].copy_(-torch.rand(K, N) * partials.rest_KN)
    stats["log_sum_sq_probs"].copy_(torch.rand(K, N) * partials.rest_KN)
    stats["top1"].copy_(partials.shift_KN + 1)
    target_N = torch.arange(N)
    target_N[1::7] = IGNORE
    scored_N = target_N >= 0
    top_N = partials.shift_KN.amax(0)
    partials.target_z_N.copy_(top_N + torch.randn(N) * 2)
    ignored = (~scored_N).nonzero()[:, 0]
    partials.target_z_N[ignored[::2]], partials.target_z_N[ignored[1::2]] = NAN, INF  # not written
    partials.target_z_N[9] = float(top_N[9] + 1)  # as large as the largest

    merged = fold.merge(partials, target_N, V)
    shift, rest, t = (
        x.double() for x in (partials.shift_KN, partials.rest_KN, partials.target_z_N)
    )
    rest_N = torch.logsumexp(shift + rest.log(), 0)
    own_N = torch.where(scored_N, t, -INF)
    lse_N = torch.logaddexp(rest_N, own_N)
    zero_N = torch.zeros(N, dtype=torch.float64)
    largest_N = shift.where(shift > -1e38, 0).abs().amax(0)
    # Differences to the shift and sums with it are rounded; then exp, sums in order, log.
    tolerance_N = U * (3 * largest_N + K + 8)
    assert torch.equal(merged.shift_N, top_N)
    assert_within(merged.lse_N, lse_N, tolerance_N, "lse")
    logp_N = torch.where(scored_N, -torch.nn.functional.softplus(rest_N - t, threshold=2000), 0)
    assert_within(merged.logp_N, logp_N, 2 * tolerance_N * (-logp_N).clamp(max=1), "logp")
    miss_N = torch.where(scored_N, torch.sigmoid(rest_N - t), 0)
    assert_within(merged.own_N, miss_N, 2 * tolerance_N * miss_N, "miss")
    sums = {name: x.double() for name, x in stats.items()}
    mean_N = torch.where(scored_N, sums["mean_logit"].sum(0) / V, zero_N)
    allowed_N = U * (K + 2) * sums["mean_logit"].abs().sum(0) / V
    assert_within(merged.stats["mean_logit"], mean_N, allowed_N, "mean_logit")
    p_KN = (shift - lse_N).exp()
    moved_KN = sums["entropy"] + rest * torch.where(p_KN > 0, shift - lse_N, 0.0)
    own = torch.where(scored_N, (own_N - lse_N).exp() * (t - lse_N), 0.0)
    entropy_N = torch.where(scored_N, -(p_KN * moved_KN).sum(0) - own, zero_N)
    terms_N = (p_KN * moved_KN.abs()).sum(0) + own.abs() + 1
    assert_within(merged.stats["entropy"], entropy_N, 3 * tolerance_N * terms_N, "entropy")
    squares_N = (p_KN.square() * sums["log_sum_sq_probs"]).sum(0).log()
    squares_N = torch.where(scored_N, squares_N, zero_N)
    assert_within(merged.stats["log_sum_sq_probs"], squares_N, 4 * tolerance_N, "squares")
    top1_N = (scored_N & (t >= sums["top1"].amax(0))).double()
    assert 0 < top1_N.sum() < scored_N.sum()
    assert torch.equal(merged.stats["top1"].double(), top1_N)


# -------------------------------------------------------------------------------------- keep, cross
@pytest.mark.parametrize("has_ref", [False, True])
@pytest.mark.parametrize("has_target", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_keep_against_fp64(name, has_target, has_ref):
    """Probabilities of some columns, or their mixtures with a reference's."""
    shape, (N, V, first), dtype = SHAPES[name], (70, 101, 40), torch.float16
    product_NV, bias_V, target_N, z_NV = tile_problem(shape, dtype, N, V)
    ref_product_NV, ref_bias_V, _, ref_z_NV = tile_problem(shape, dtype, N, V)
    lse_N, ref_lse_N = (torch.logsumexp(x, 1).float() for x in (z_NV, ref_z_NV))
    columns = slice(first, V)
    stash_NC = output(N, V - first, dtype)

    def part(x: Tensor | None) -> Any:
        return None if x is None else x[..., columns]

    ref, shares_2N = None, 2 * torch.rand(2, N) - 1
    if has_ref:
        ref = fold.RefTile(part(ref_product_NV), part(ref_bias_V), ref_lse_N, *shares_2N)
    target = target_N if has_target else None
    fold.keep(part(product_NV), part(bias_V), shape.head, target, lse_N, first, stash_NC, ref)
    kept_NV = both_NV = (z_NV - lse_N.double()[:, None]).exp()
    if has_ref:
        ref_p_NV = (ref_z_NV - ref_lse_N.double()[:, None]).exp()
        own_N1, ref_N1 = shares_2N.double()[:, :, None]
        kept_NV = own_N1 * kept_NV + ref_N1 * ref_p_NV
        both_NV = own_N1.abs() * both_NV + ref_N1.abs() * ref_p_NV
    if has_target:
        kept_NV = kept_NV.scatter(1, target_N.clamp(min=0)[:, None], 0.0)
    kept_NV = kept_NV * slope_of(z_NV, shape.head)
    if has_target:
        kept_NV[target_N == IGNORE] = 0.0
    tolerance = shape.tolerance(torch.cat([product_NV, ref_product_NV]) * shape.head.scale)
    assert_stash(stash_NC, kept_NV[:, columns], both_NV[:, columns], tolerance)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keeps", [False, True])
def test_cross_against_fp64(name, size, keeps):
    """The cross term of KL(reference || policy), and what is kept of the reference beside it."""
    shape, (N, V, width) = SHAPES[name], SIZES[size]
    product_NV, bias_V, target_N, _ = tile_problem(shape, torch.float32, N, V)
    ref_product_NV, ref_bias_V, _, _ = tile_problem(shape, torch.float32, N, V)
    ref_bias_V = None if name == "softcap" else ref_bias_V
    if bias_V is not None and ref_bias_V is not None:
        bias_V[3:7] = ref_bias_V[3:7] = INF  # with a negative scale: no probability in either
        ref_bias_V[7:9] = INF  # nor in the reference alone
    z_NV = gold_logits(product_NV, bias_V, shape.head)
    ref_z_NV = gold_logits(ref_product_NV, ref_bias_V, shape.head)
    partials = fold_all(ref_product_NV, ref_bias_V, shape.head, target_N, width, limit=10.0)
    cross_KN = torch.full_like(partials.shift_KN, NAN)
    stash_NV = output(N, V, torch.float16)
    for k, v0 in enumerate(range(0, V, width)):
        c = slice(v0, v0 + width)
        kl.cross(
            product_NV[:, c], None if bias_V is None else bias_V[c], ref_product_NV[:, c],
            None if ref_bias_V is None else ref_bias_V[c], shape.head, partials.shift_KN[k],
            cross_KN[k], (target_N, v0, stash_NV[:, c]) if keeps else None,
        )  # fmt: skip
    e_NV = (ref_z_NV - partials.shift_KN.repeat_interleave(width, 0)[:V].T.double()).exp()
    terms_NV = torch.where(e_NV > 0, e_NV * (ref_z_NV - z_NV), 0.0)
    gold_KN = torch.stack([part.sum(1) for part in terms_NV.split(width, 1)])
    total_KN = torch.stack([part.sum(1) for part in e_NV.split(width, 1)])
    size_KN = torch.stack([part.abs().sum(1) for part in terms_NV.split(width, 1)])
    products = torch.cat([product_NV, ref_product_NV]) * shape.head.scale
    tolerance = shape.tolerance(products)
    # Relative errors of the exponentials, absolute ones of the two logits.
    assert_within(cross_KN, gold_KN, tolerance * (size_KN + 2 * total_KN), "cross")
    if keeps:
        kept_NV = e_NV.scatter(1, target_N.clamp(min=0)[:, None], 0.0) * slope_of(z_NV, shape.head)
        kept_NV[target_N == IGNORE] = 0.0
        assert_stash(stash_NV, kept_NV, e_NV, tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mix_against_fp64(dtype):
    """Two stashes become one, row by row; a row of shares 1 and 0 keeps its bits."""
    N, V = 9, 2100
    kept_NV, ref_NV = (spaced(torch.rand(N, V).to(dtype), between=7.0) for _ in range(2))
    own_N, ref_N = 2 * torch.rand(2, N) - 1
    own_N[3], ref_N[3], own_N[4], ref_N[4] = 1.0, 0.0, 0.0, 1.0
    terms = kept_NV.double() * own_N.double()[:, None], ref_NV.double() * ref_N.double()[:, None]
    wanted = kept_NV[3].clone(), ref_NV[4].clone()
    kl.mix(kept_NV, ref_NV, own_N, ref_N)
    allowed = rounding(dtype) * sum(terms).abs() + rounding(torch.float32) * 3  # type: ignore[union-attr]
    assert_within(kept_NV, sum(terms), allowed + smallest(dtype), "mix")  # type: ignore[arg-type]
    assert torch.equal(kept_NV[3], wanted[0])
    assert torch.equal(kept_NV[4], wanted[1])
    assert_gaps_untouched(kept_NV)


# ------------------------------------------------------------------------------------------ project
ONE_EACH = project.Tile(16, 32, 16, 4, 1)  # a program a tile
# In the first, programs that take turns make a row's tiles out of order.
PROJECTS = {"shipped": (50, 230, 40, project.INTERPRETED), "groups": (150, 70, 24, ONE_EACH)}


def head_problem(shape: Shape, dtype: torch.dtype, N: int, V: int, D: int, peak: float = 30.0):
    """Hidden rows, a head and its targets; logits in fp64, and an error that fp32 products have.

    The error is twice what PyTorch's fp32 product of the same operands has at most.
    """
    generator = torch.Generator().manual_seed(0)
    h_ND = torch.randn(N, D, generator=generator)
    w_VD = torch.randn(V, D, generator=generator)
    w_VD *= peak / (h_ND @ w_VD.T).abs().max()
    h_ND, w_VD = h_ND.to(dtype), w_VD.to(dtype)
    bias_V = torch.randn(V, generator=generator).to(dtype) if shape.has_bias else None
    target_N = torch.randint(V, (N,), generator=generator)
    target_N[1::5] = IGNORE
    target_N[0], target_N[-1] = V - 1, 0
    exact_NV = h_ND.double() @ w_VD.double().T
    product_NV = h_ND.float() @ w_VD.float().T
    error = 2 * abs(shape.head.scale) * float((product_NV - exact_NV).abs().max())
    z_NV = gold_logits(exact_NV, bias_V, shape.head)
    tolerance = error + shape.tolerance(exact_NV * shape.head.scale)
    return h_ND, w_VD, bias_V, target_N, product_NV, z_NV, tolerance


@pytest.mark.parametrize("V", [150, 64, 20])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_shifts_are_the_largest_of_columns_all_over_the_head(name, dtype, V):
    shape, count = SHAPES[name], project.INTERPRETED_SHIFT.v
    h_ND, w_VD, bias_V, _, _, z_NV, tolerance = head_problem(shape, dtype, 70, V, 40)
    h_ND, w_VD = spaced(h_ND, 8), spaced(w_VD, 8)
    shift_N = project.row_shifts(h_ND, w_VD, bias_V, shape.head)
    columns = torch.arange(V)[:: max(1, V // count)][:count]
    assert len(columns) == min(V, count)
    assert_within(shift_N, z_NV[:, columns].amax(1), tolerance, "shift")
    if bias_V is not None:  # columns of no probability alone
        bias_V[columns] = -INF if shape.head.scale > 0 else INF
        shift_N = project.row_shifts(h_ND, w_VD, bias_V, shape.head._replace(softcap=None))
        assert (shift_N == torch.tensor(-3e38)).all()


@pytest.mark.parametrize("size", PROJECTS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_project_against_fp64(name, dtype, size):
    shape, (N, V, D, tile) = SHAPES[name], PROJECTS[size]
    h_ND, w_VD, bias_V, target_N, _, z_NV, tolerance = head_problem(shape, dtype, N, V, D)
    h_ND = spaced(h_ND, 8)  # rows have to start at 16 bytes
    limit, stats = fold.LIMITS[dtype], frozenset(fold.STATS)
    stash_NV = output(N, V, dtype, 24 - V % 8)
    given_N = project.row_shifts(h_ND, w_VD, bias_V, shape.head)

    def partials_of(stats: frozenset[str], stash_NV: Tensor | None) -> Partials:
        found = blank_partials(target_N, V, tile.v, stats)
        project.project(
            h_ND, w_VD, bias_V, shape.head, target_N, given_N, tile=tile, partials=found,
            stash_NC=stash_NV, limit=limit,
        )  # fmt: skip
        return found

    found = partials_of(stats, stash_NV)
    top_KN = torch.stack([part.amax(1) for part in z_NV.split(tile.v, 1)])
    wanted_KN = torch.where(top_KN > given_N + limit, top_KN, given_N.double())
    assert_within(found.shift_KN, wanted_KN, tolerance, "shift")
    merged = fold.merge(found, target_N, V, shape.head, stash_NV)
    assert_merged(merged, z_NV, target_N, tolerance, head=shape.head)
    assert merged.stats.keys() == stats
    kept_NV, e_NV = gold_stash(z_NV, merged.shift_N, target_N, shape.head)
    assert_stash(stash_NV, kept_NV, e_NV, tolerance, times=2)
    # Nothing asked for changes no bit of the rest.
    for wanted, stash in (
        (frozenset(), None), (stats, None), (frozenset(), output(N, V, dtype, 24 - V % 8)),
    ):  # fmt: skip
        plain = partials_of(wanted, stash)
        assert torch.equal(plain.shift_KN, found.shift_KN)
        assert torch.equal(plain.rest_KN, found.rest_KN)
        assert torch.equal(fold.merge(plain, target_N, V).logp_N, merged.logp_N)


@pytest.mark.parametrize("columns", [None, (0, 64), (37, 150), (90, 101)])
@pytest.mark.parametrize("name", SHAPES)
def test_project_keeps_columns_of_finished_rows(name, columns):
    shape, (N, V, D), dtype = SHAPES[name], (45, 150, 40), torch.bfloat16
    h_ND, w_VD, bias_V, target_N, _, z_NV, tolerance = head_problem(shape, dtype, N, V, D)
    first, last = columns or (0, V)
    target_N[:6] = torch.tensor([first, last - 1, first - 1, last, IGNORE, first]) % V
    lse_N = torch.logsumexp(z_NV, 1).float()
    stash_NC = output(N, last - first, dtype, 24 - (last - first) % 8)
    project.project(
        h_ND, w_VD, bias_V, shape.head, target_N, lse_N, tile=project.INTERPRETED, columns=columns,
        stash_NC=stash_NC,
    )  # fmt: skip
    kept_NV, e_NV = gold_stash(z_NV, lse_N, target_N, shape.head)
    assert_stash(stash_NC, kept_NV[:, first:last], e_NV[:, first:last], tolerance)


def test_project_gives_larger_tiles_their_own_shift():
    """Tiles above the columns of the shift by more than the limit."""
    dtype, tile, V = torch.float16, project.INTERPRETED, 150
    steps = torch.tensor([0.0, 9.0, 11.0, 500.0, -500.0])
    h_ND = torch.zeros(5, 8, dtype=dtype)
    h_ND[:, 0], h_ND[:, 1] = 1.0, steps.to(dtype)
    w_VD = torch.zeros(V, 8, dtype=dtype)
    w_VD[:, 0] = -torch.rand(V).to(dtype)
    w_VD[8, 0] = w_VD[71, 0] = 0.0
    w_VD[65:128:2, 1] = 1.0  # not the columns of the shift
    step = V // project.INTERPRETED_SHIFT.v
    assert step == 4
    target_N = torch.tensor([3, 81, 140, 8, 71])
    z_NV = h_ND.double() @ w_VD.double().T
    stash_NV = output(5, V, dtype, 10)
    partials = blank_partials(target_N, V, tile.v)
    given_N = project.row_shifts(h_ND, w_VD, None, HeadShape())
    assert not given_N.any()
    project.project(
        h_ND, w_VD, None, HeadShape(), target_N, given_N, tile=tile, partials=partials,
        stash_NC=stash_NV, limit=fold.LIMITS[dtype],
    )  # fmt: skip
    own = torch.where(steps > 10.0, steps, 0.0)
    own = torch.where(steps < 0, 0.0, own)
    assert torch.equal(partials.shift_KN, torch.stack([torch.zeros(5), own, torch.zeros(5)]))
    assert stash_NV.isfinite().all()
    merged = fold.merge(partials, target_N, V, stash_NV=stash_NV)
    tolerance = SHAPES["plain"].tolerance(z_NV)
    assert_merged(merged, z_NV, target_N, tolerance)
    kept_NV, e_NV = gold_stash(z_NV, merged.shift_N, target_N, HeadShape())
    assert_stash(stash_NV, kept_NV, e_NV, tolerance, times=2)


def test_project_takes_rows_at_16_bytes():
    good = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert project.can_project(good, good[:, :40])
    assert TensorDescriptor.from_tensor(good[:, :40], [4, 32])
    for bad in (good.float(), good[:, 1:], good.T, torch.zeros(4, 36).half()):
        assert not project.can_project(good, bad)
        assert not project.can_project(bad, good)


# ------------------------------------------------------------------------------------------ scatter
def random_rows(N: int, D: int, dtype: torch.dtype, between: float = NAN) -> Tensor:
    return spaced(torch.randn(N, D).to(dtype), 5, between)


def gold_terms(x_ND: Tensor, scale_N: Tensor) -> Tensor:
    """Scaled rows in fp64; a row with a scale of 0 is 0 whatever it holds."""
    scaled_ND = x_ND.double() * scale_N.double()[:, None]
    return torch.where(scale_N[:, None] == 0, 0.0, scaled_ND)


def index_sum(rows: int, index_N: Tensor, x_ND: Tensor) -> Tensor:
    inside = index_N >= 0
    total = torch.zeros(rows, x_ND.shape[1], dtype=torch.float64)
    return total.index_add_(0, index_N[inside], x_ND[inside])


@pytest.mark.parametrize("by_sorting", [False, True])
def test_order_of_segments(by_sorting, monkeypatch):
    """Tokens in the stable order of their rows, by comparing each with each or by a sort."""
    if by_sorting:
        monkeypatch.setattr(scatter, "MOST_COMPARED", 10)
    N, I = 150, 70  # noqa: E741
    index_N = torch.randint(I, (N,))
    index_N[index_N == 4], index_N[3::6], index_N[40:90] = 2, IGNORE, 7
    index_N[5], index_N[6] = 0, I - 1
    segments = scatter.TokenGroups.of(index_N, I)
    assert torch.equal(segments.order_N.long(), index_N.sort(stable=True).indices)
    for i in range(I):
        place = int(segments.start_I[i])
        known = 0 <= place < N and index_N[segments.order_N[place]] == i
        tokens = segments.order_N[place:][: segments.size_N[place]].tolist() if known else []
        assert tokens == (index_N == i).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("start", [-(2**31), -1, 2, 2**31 - 1])
def test_row_sums_need_no_cleared_starts(start):
    """Whatever is in memory where a row has no tokens, its sum is empty."""
    index_N = torch.tensor([3, 3, 0, -100, 5])
    a_ND = random_rows(5, 21, torch.float32)
    segments = scatter.TokenGroups.of(index_N, 7)
    segments.start_I[[1, 2, 4, 6]] = start
    out_ID = output(7, 21, torch.float32)
    scatter.row_sums(out_ID, segments=segments, a_ND=a_ND)
    assert_within(out_ID, index_sum(7, index_N, a_ND.double()), U * 10)
    assert not out_ID[[1, 2, 4, 6]].any()
    before = out_ID.clone()
    before[[1, 2, 4, 6]] = out_ID[[1, 2, 4, 6]] = NAN
    scatter.row_sums(out_ID, segments=segments, a_ND=a_ND, accumulate=True)
    assert out_ID[[1, 2, 4, 6]].isnan().all()
    assert_within(out_ID[[0, 3, 5]], 2 * before[[0, 3, 5]].double(), U * 10)


@pytest.mark.parametrize("D", [37, 2100])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("accumulate_", [False, True])
def test_row_sums_of_segments(D, out_dtype, accumulate_):
    """Repeats, empty rows, rows of many tokens; scaled rows of two tensors, and a scaled base."""
    N, I, dtype = 41, 9, torch.bfloat16  # noqa: E741
    index_N = torch.randint(I, (N,))
    index_N[index_N == 4] = 2  # none there
    index_N[3::6] = IGNORE
    index_N[8:19] = 7
    a_ND, b_ND, base_ID = (random_rows(n, D, dtype) for n in (N, N, I))
    a_scale_N, b_scale_N = torch.randn(N), torch.randn(N)
    a_scale_N[::9] = b_scale_N[4::9] = 0.0
    a_ND[::9], b_ND[4::9] = INF, NAN
    base_factor = torch.tensor(-1.3)
    out_ID = spaced(torch.randn(I, D).to(out_dtype), between=7.0)
    before = out_ID.double()
    segments = scatter.TokenGroups.of(index_N, I)
    scatter.row_sums(
        out_ID, segments=segments, base_ID=base_ID, base_factor=base_factor, a_ND=a_ND,
        a_scale_N=a_scale_N, b_ND=b_ND, b_scale_N=b_scale_N, accumulate=accumulate_,
    )  # fmt: skip
    a, b = gold_terms(a_ND, a_scale_N), gold_terms(b_ND, b_scale_N)
    kept = before if accumulate_ else torch.zeros_like(before)
    base = base_ID.double() * base_factor.double()
    gold = kept + base + index_sum(I, index_N, a + b)
    size = kept.abs() + base.abs() + index_sum(I, index_N, a.abs() + b.abs())
    terms = int(torch.bincount(index_N.clamp(min=0)).max()) + 4
    assert_within(out_ID, gold, U * terms * size + rounding(out_dtype) * gold.abs(), "row sums")
    assert_gaps_untouched(out_ID)
    if not accumulate_:
        assert torch.equal(out_ID[4], (base_ID[4].float() * base_factor).to(out_dtype))


def test_row_sums_of_some_segments():
    """`offset`: a part of the result at a time gives the bits of the whole."""
    N, I, D = 30, 11, 19  # noqa: E741
    index_N = torch.randint(-2, I, (N,))
    a_ND = random_rows(N, D, torch.float32)
    segments = scatter.TokenGroups.of(index_N, I)
    whole_ID, parts_ID = torch.full((I, D), NAN), torch.full((I, D), NAN)
    scatter.row_sums(whole_ID, segments=segments, a_ND=a_ND)
    for rows in (slice(0, 4), slice(4, 5), slice(5, 11)):
        scatter.row_sums(parts_ID[rows], segments=segments, offset=rows.start, a_ND=a_ND)
    assert torch.equal(whole_ID, parts_ID)
    terms = index_sum(I, index_N, a_ND.double().abs())
    assert_within(whole_ID, index_sum(I, index_N, a_ND.double()), 12 * U * terms)


def test_row_sums_of_rows_far_apart():
    """Over 2**31 elements from the first: only the pages that are read come to be."""
    wide = torch.empty(3 * 2**30 + 16, dtype=torch.bfloat16)
    b_ND = wide.as_strided((4, 16), (2**30, 1))
    for n in range(4):
        b_ND[n] = 2.0**n
    out_ID = output(2, 16, torch.float32)
    segments = scatter.TokenGroups.of(torch.tensor([1, 0, 1, 1]), 2)
    scatter.row_sums(out_ID, segments=segments, b_ND=b_ND, b_scale_N=torch.ones(4))
    assert torch.equal(out_ID, torch.tensor([[2.0], [13.0]]).expand(2, 16))


def test_row_sums_of_a_column():
    """The targets' part of a bias gradient: rows of one element."""
    N, V = 50, 23
    index_N, own_N = torch.randint(-1, V, (N,)), torch.randn(N)
    out_V = torch.randn(V)
    gold = out_V.double() + index_sum(V, index_N, own_N.double()[:, None])[:, 0]
    scatter.row_sums(
        out_V[:, None], segments=scatter.TokenGroups.of(index_N, V), accumulate=True,
        b_ND=torch.ones(N, 1), b_scale_N=own_N,
    )  # fmt: skip
    assert_within(out_V, gold, U * 12 * (out_V.abs() + 10))


@pytest.mark.parametrize("accumulate_", [False, True])
@pytest.mark.parametrize("D", [37, 2100])
def test_row_sums_of_single_tokens(D, accumulate_):
    """``row * product + own * w[target]`` in place, an ignored target having a scale of zero."""
    N, V = 13, 7
    product_ND, w_VD = random_rows(N, D, torch.float32, 7.0), random_rows(V, D, torch.float16)
    target_N = torch.randint(V, (N,))
    target_N[2::4] = IGNORE
    row_N, own_N = torch.randn(N), torch.randn(N)
    row_N[2::4] = own_N[2::4] = 0.0
    product_ND[2::4], w_VD[0] = NAN, INF
    target_N[target_N == 0] = 1
    before = product_ND.double()
    out_ND = product_ND if not accumulate_ else random_rows(N, D, torch.float32, 7.0)
    kept = out_ND.double() if accumulate_ else torch.zeros(N, D)
    scatter.row_sums(
        out_ND, a_ND=product_ND, a_scale_N=row_N, b_ND=w_VD, b_scale_N=own_N, b_index_N=target_N,
        accumulate=accumulate_,
    )  # fmt: skip
    a = gold_terms(before, row_N)
    b = gold_terms(w_VD[target_N.clamp(min=0)], own_N)
    size = kept.abs() + a.abs() + b.abs()
    assert_within(out_ND, kept + a + b, 4 * U * size)
    assert_gaps_untouched(out_ND)


def test_row_sums_without_scales():
    """`a` as it is, and a base without a factor."""
    a_ND, base_ND = random_rows(6, 21, torch.float32), random_rows(6, 21, torch.float32)
    out_ND = output(6, 21, torch.float32)
    scatter.row_sums(out_ND, a_ND=a_ND)
    assert torch.equal(out_ND, a_ND)
    scatter.row_sums(out_ND, a_ND=a_ND, base_ID=base_ND)
    assert_within(out_ND, base_ND + a_ND.double(), U * (base_ND.abs() + a_ND.abs()))


@pytest.mark.parametrize("D", [37, 2100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_rows(dtype, D):
    x_ND = random_rows(5, D, dtype)
    scale_N = torch.tensor([3.7e-5, -1e-4, 0.0, 9e-6, -2.2e-4])
    x_ND[2] = INF
    gain = scatter.gain_of(scale_N)
    found = scatter.scaled_rows(x_ND, scale_N, gain)
    assert found.dtype == dtype and found.is_contiguous()
    gold = gold_terms(x_ND, scale_N) / gain.double()
    # One product in fp32 (the gain is a power of two), one rounding.
    allowed = (rounding(dtype) + 2 * U) * gold.abs() + smallest(dtype)
    assert_within(found, gold, allowed, "scaled rows")


@pytest.mark.parametrize("top", [1.0, 1.999, 2.0, 3e-30, 7e8, 0.0])
def test_scaled_rows_have_a_gain_that_is_a_power_of_two(top):
    gain = float(scatter.gain_of(torch.tensor([0.0, -top, top / 3])))
    assert torch.frexp(torch.tensor(gain)).mantissa == 0.5
    assert top == 0 or 1 <= top / gain < 2


@pytest.mark.parametrize("D", [37, 2100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("finished", [False, True])
def test_factors_of_tokens(finished, dtype, D):
    """Of rows relative to a shift with their targets' own, and of finished rows by themselves."""
    N, scale, upstream = 9, -0.7, torch.tensor(1.7)
    x_ND, coef_N, own_N = random_rows(N, D, dtype), torch.randn(N), torch.rand(N)
    target_N = torch.arange(N)
    target_N[[2, 5]] = IGNORE
    shift_N, lse_N = torch.randn(N), torch.randn(N) + 9
    coef_N[3] = 0.0
    x_ND[2], x_ND[3], shift_N[2], lse_N[3], own_N[5] = NAN, INF, NAN, INF, NAN
    more = (None, None, None) if finished else (shift_N, lse_N, own_N)
    row_N, found_N, scaled_ND = scatter.factors(target_N, coef_N, upstream, *more, scale, x_ND)
    coef = torch.where(target_N < 0, 0.0, coef_N.double() * upstream.double() * scale)
    down = torch.ones(N) if finished else (shift_N.double() - lse_N.double()).exp()
    gold_N = torch.where(coef == 0, 0.0, -coef * down)
    assert_within(row_N, gold_N, 40 * U * gold_N.abs(), "row")
    assert scaled_ND is not None and (found_N is None) == finished
    if found_N is not None:
        own = torch.where(coef == 0, 0.0, own_N * coef)
        assert_within(found_N, own, 4 * U * own.abs(), "own")
    gold = gold_terms(x_ND, row_N)
    assert_within(scaled_ND, gold, (rounding(dtype) + U) * gold.abs() + smallest(dtype), "scaled")
    again_N, _, nothing = scatter.factors(target_N, coef_N * 1.7, None, *more, scale, None)
    assert nothing is None
    assert_within(again_N, row_N.double(), 4 * U * row_N.abs(), "without an upstream scalar")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_rows(dtype):
    x_TD, rows_N = random_rows(7, 2100, dtype), torch.tensor([6, 0, 0, 3, 5])
    assert torch.equal(scatter.gather(x_TD, rows_N), x_TD[rows_N])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_sums(dtype):
    x_NV, scale_N = random_rows(70, 301, dtype), torch.randn(70)
    scale_N[3::8] = 0.0
    x_NV[3::8] = NAN
    out_V = torch.randn(301)
    terms_NV = gold_terms(x_NV, scale_N)
    gold = out_V.double() + terms_NV.sum(0)
    size = out_V.abs() + terms_NV.abs().sum(0)
    scatter.add_column_sums(out_V, x_NV, scale_N)
    # Three blocks of 32 rows, each in pairs.
    assert_within(out_V, gold, U * 12 * size, "column sums")


# --------------------------------------------------------------------------------------------- pair
OBJECTIVES: dict[str, tuple[Any, Formula, float]] = {
    "lr_dpo": (lr_dpo(BETA, 0.02), sigmoid_formula, 0.02),
    "length_normalized_dpo": (length_normalized_dpo(BETA, 0.02), sigmoid_norm_formula, 0.02),
    "hinge": (hinge(BETA, 0.02), hinge_formula, 0.02),
    "ipo": (ipo(BETA), ipo_formula, 0.0),
    "apo_zero": (apo_zero(BETA), apo_zero_formula, 0.0),
    "nca_pair": (nca_pair(BETA), nca_pair_formula, 0.0),
}
PAIR_OBJECTIVES = {
    "lr_dpo": lr_dpo(0.1, 0.01),
    "length_normalized_dpo": length_normalized_dpo(0.1, 0.01),
    "hinge": hinge(0.1, 0.01),
    "ipo": ipo(0.1),
    "apo_zero": apo_zero(0.1),
    "nca_pair": nca_pair(0.1),
    "exo_pair": exo_pair(0.1, 0.003, 0.01),
    "robust": robust(0.1, 0.2, 0.01),
    "discopop": discopop(0.1, 0.07, 0.01),
    "discopop_wide": discopop(0.1, 0.7, 0.01),
    "bco_pair": bco_pair(0.1),
    "sppo_hard": sppo_hard(0.1),
    "apo_down": apo_down(0.1),
    "cdpo": cdpo(0.1, 0.15, target_margin=0.3),
    "scaled": hinge(0.1, 0.01, reference_scale=1.3),
    "scaled_sides": bco_pair(0.1, reference_scale=0.7),
    "simpo": simpo(0.3, 0.9),
}
# One token, many, more than a block of the kernel.
PAIR_LENGTHS = (1, 5, 7, 1, 1100, 30, 2, 1030, 4, 4, 1, 1, 9, 3)


def pair_tokens(lengths: tuple[int, ...], ignored: bool):
    """Log-probs of policy and reference, targets, bounds and scored tokens of each sequence."""
    N = sum(lengths)
    target_N = torch.randint(50, (N,))
    bounds_S1 = torch.tensor([0, *accumulate(lengths)])
    if ignored:
        target_N[::3] = IGNORE
        target_N[bounds_S1[1:] - 1] = 3  # every sequence has a scored one
    scored_N = target_N != IGNORE
    noise = torch.randn(len(lengths)).repeat_interleave(torch.tensor(lengths))
    per_token = noise * 9 / bounds_S1.diff().float().repeat_interleave(torch.tensor(lengths))
    ref_N = torch.where(scored_N, -5 * torch.rand(N) - 1, 0.0)
    logp_N = torch.where(scored_N, ref_N + per_token + 0.1 * torch.randn(N), 0.0)
    lengths_S = reference.sequence_sums(scored_N.long(), bounds_S1)
    return logp_N, ref_N, target_N, bounds_S1, lengths_S


def assert_pairs(
    found: pair.PairResult,
    objective: Any,
    tokens: tuple[Tensor, ...],
    num_pairs: float,
    lost: float = 0.0,
    **extra,
) -> None:
    """Loss, slopes, coefficients and metrics in fp64 from the sums that the kernel returned.

    ``lost`` is what PyTorch loses where its terms cancel.
    """
    logp_N, _, target_N, bounds_S1, lengths_S = tokens
    zeros = torch.zeros(len(lengths_S) // 2, dtype=torch.float64)
    margin_P, smoothing_P, weight_P = (
        zeros + extra.get(name, neutral)
        for name, neutral in (("margin_P", 0), ("smoothing_P", 0), ("weight_P", 1))
    )
    logp_S = found.logp_S.double().requires_grad_()
    ref_S, n_S = found.ref_logp_S.double(), lengths_S.double()
    x = Examples(logp_S, ref_S, n_S, tuple(range(0, len(n_S) + 1, 2)), margin_P, smoothing_P)
    loss_P = objective.losses(x)
    ratio_S = logp_S - ref_S
    loss = (loss_P * weight_P).sum() / num_pairs
    (slope_S,) = torch.autograd.grad(loss, logp_S)
    # Triton passes numbers as fp32; in two parts each keeps all digits.
    torch.testing.assert_close(found.totals[0], loss.detach(), rtol=1e-12, atol=lost)
    torch.testing.assert_close(found.slope_S, slope_S, rtol=1e-12, atol=1e-300 + lost)
    ratio_S, logp_S = ratio_S.detach(), logp_S.detach()
    if objective.mean_rewards:
        ratio_S = ratio_S / n_S
    reward_S = objective.beta * ratio_S
    wanted = {
        "rewards/chosen": reward_S[0::2],
        "rewards/rejected": reward_S[1::2],
        "rewards/accuracies": (ratio_S[0::2] > ratio_S[1::2]).double(),
        "rewards/margins": reward_S[0::2] - reward_S[1::2],
        "logps/chosen": logp_S[0::2],
        "logps/rejected": logp_S[1::2],
        "lengths/chosen": n_S[0::2],
        "lengths/rejected": n_S[1::2],
        "length_margin": objective.alpha * (n_S[0::2] - n_S[1::2]),
    }
    assert ("loss", *wanted) == pair.TOTALS
    assert torch.equal(found.lengths_S, lengths_S)
    assert torch.equal(found.loss, found.totals[0].float())
    assert torch.equal(found.means, (found.totals[1:] / len(loss_P)).float())
    for total, (name, value_P) in zip(found.totals[1:], wanted.items()):
        allowed = 1e-12 * (value_P.abs().sum() + reward_S.abs().sum() * ("margins" in name))
        assert_within(total, value_P.sum(), allowed, name)
    if found.coef_N is not None:
        coef_N = slope_S.repeat_interleave(bounds_S1.diff())
        coef_N = torch.where(target_N == IGNORE, 0.0, coef_N)
        allowed = U * coef_N.abs() + smallest(torch.float32) + lost
        assert_within(found.coef_N, coef_N, allowed, "coef")
        assert found.coef_N.dtype == logp_N.dtype


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("name", PAIR_OBJECTIVES)
def test_pair_of_each_kind(name, ignored):
    """Margins, smoothing and weights; fp64 sums of the reference."""
    objective, tokens = PAIR_OBJECTIVES[name], pair_tokens(PAIR_LENGTHS, ignored)
    logp_N, ref_N, target_N, bounds_S1, lengths_S = tokens
    P = len(lengths_S) // 2
    extra: dict[str, Any] = {"weight_P": torch.rand(P).double() + 0.5}
    if objective.by_margin:
        extra["margin_P"] = torch.randn(P).double()
        extra["smoothing_P"] = torch.rand(P).double() / (4 if name == "robust" else 2)
    ref_S = reference.sequence_sums(ref_N.double(), bounds_S1)
    found = pair.pair_losses(
        logp_N, target_N, bounds_S1, objective, ref_logp_S=ref_S,
        num_pairs=7.3, want_coef=True, **extra,
    )  # fmt: skip
    assert found.logp_S.dtype == found.ref_logp_S.dtype == torch.float64
    sums = reference.sequence_sums(logp_N.double(), bounds_S1)
    torch.testing.assert_close(found.logp_S, sums, rtol=1e-13, atol=0)
    assert torch.equal(found.ref_logp_S, ref_S)
    assert_pairs(found, objective, tokens, 7.3, **extra)


@pytest.mark.parametrize("name", [name for name in PAIR_OBJECTIVES if name != "simpo"])
def test_pair_with_a_reference_of_tokens(name):
    """Sums in fp32, rounded once; no options and no coefficients."""
    objective, tokens = PAIR_OBJECTIVES[name], pair_tokens(PAIR_LENGTHS, True)
    logp_N, ref_N, target_N, bounds_S1, _ = tokens
    found = pair.pair_losses(
        logp_N, target_N, bounds_S1, objective, ref_logp_N=ref_N,
        num_pairs=7.0, want_coef=False,
    )  # fmt: skip
    assert found.coef_N is None
    for sums, x_N in ((found.logp_S, logp_N), (found.ref_logp_S, ref_N)):
        assert sums.dtype == torch.float32
        gold = reference.sequence_sums(x_N.double(), bounds_S1)
        assert_within(sums, gold, 1.0001 * U * gold.abs())
    assert_pairs(found, objective, tokens, 7.0)


def test_pair_without_a_reference():
    objective, tokens = simpo(0.3, 0.9), pair_tokens(PAIR_LENGTHS, True)
    logp_N, _, target_N, bounds_S1, _ = tokens
    found = pair.pair_losses(logp_N, target_N, bounds_S1, objective, num_pairs=7.0, want_coef=True)
    assert not found.ref_logp_S.any() and found.logp_S.dtype == torch.float64
    sums = reference.sequence_sums(logp_N.double(), bounds_S1)
    torch.testing.assert_close(found.logp_S, sums, rtol=1e-13, atol=0)
    assert_pairs(found, objective, tokens, 7.0)


def test_pair_of_few_among_many():
    """Hundreds of pairs of one token, fp32 sums of the reference."""
    objective, tokens = lr_dpo(0.1, 0.01), pair_tokens((1,) * 300, False)
    logp_N, ref_N, target_N, bounds_S1, _ = tokens
    found = pair.pair_losses(
        logp_N, target_N, bounds_S1, objective, ref_logp_S=ref_N,
        num_pairs=150.0, want_coef=True,
    )  # fmt: skip
    assert torch.equal(found.logp_S, logp_N) and torch.equal(found.ref_logp_S, ref_N)
    assert_pairs(found, objective, tokens, 150.0)


@pytest.mark.parametrize("z", [-700.0, -40.0, 0.0, 9.5, 12.0, 20.0, 40.0, 700.0])
@pytest.mark.parametrize(
    "name", [name for name in PAIR_OBJECTIVES if "scaled" not in name and name != "simpo"]
)
def test_pair_of_extreme_margins(name, z):
    """A loss of 1e-5 or 1e-17 has all its digits, and nothing overflows."""
    objective, tokens = PAIR_OBJECTIVES[name], pair_tokens((2, 3), False)
    logp_N, _, target_N, bounds_S1, _ = tokens
    ref_S = reference.sequence_sums(logp_N.double(), bounds_S1)
    ref_S -= torch.tensor([z / 0.1, -1.5 * z / 0.1])
    found = pair.pair_losses(
        logp_N, target_N, bounds_S1, objective, ref_logp_S=ref_S,
        num_pairs=1.0, want_coef=True,
    )  # fmt: skip
    lost = 1e-13 if name in ("apo_zero", "apo_down", "exo_pair") else 0.0
    assert_pairs(found, objective, tokens, 1.0, lost)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("given", ["sums", "tokens", "nothing"])
def test_sums_of_an_odd_number_of_sequences(given, dtype):
    """Those that the kernel of pairs takes, rounded once; means of what is given beside them."""
    lengths = PAIR_LENGTHS[:7]
    logp_N, ref_N, target_N, bounds_S1, lengths_S = pair_tokens(lengths, True)
    gap_N = torch.where(target_N == IGNORE, 0.0, torch.randn(len(target_N)).double())
    ref_S = reference.sequence_sums(ref_N.double(), bounds_S1)
    options: dict[str, Any] = {
        "sums": {"ref_logp_S": ref_S.to(dtype)},
        "tokens": {"ref_logp_N": ref_N},
    }
    found = pair.sequence_sums(
        logp_N, target_N, bounds_S1, dtype, gap_N=None if given == "nothing" else gap_N,
        **options.get(given, {}),
    )  # fmt: skip
    gold_S = reference.sequence_sums(logp_N.double(), bounds_S1)
    for sums, gold in ((found.logp_S, gold_S), (found.ref_logp_S, ref_S * (given != "nothing"))):
        assert sums.dtype == dtype and sums.shape == (7,)
        unit = 1.0001 * U if dtype == torch.float32 else 1e-14
        assert_within(sums, gold, unit * gold.abs())
    if given == "nothing":
        assert found.gap_S is None
        return
    means_S = reference.sequence_sums(gap_N, bounds_S1) / lengths_S
    torch.testing.assert_close(found.gap_S, means_S, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------- ops
# dtype, and whether the projection is fused, or tiles of it are folded.
WAYS = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, True),
    "bf16-tiles": (torch.bfloat16, False),
    "fp16": (torch.float16, True),
    "fp16-tiles": (torch.float16, False),
}
FROZEN = {
    "forward": lambda plan: plan.route == "forward" and len(list(plan.spans)) > 2,
    "frozen": lambda plan: (
        plan.route == "frozen" and not plan.in_place and len(list(plan.spans)) > 2
    ),
    "frozen-in-place": lambda plan: plan.in_place and len(list(plan.spans)) > 2,
}
ALL_ROUTES: dict[str, Callable[[Plan], bool]] = {**ROUTES, **FROZEN}
# Only wide hidden rows, each of one token, have their unit gradients in the gradient's memory.
WIDE = 64
OP_SIZES = (4, 3, 13, 10, 1, 2, 6, 5)
OP_CASES = {
    "everything": {
        "masked": True, "repeats": True, "bias": True, "softcap": 12.0, "scale": -0.7,
    },
    "plain": {"masked": True},
}  # fmt: skip


def op_case(name: str, dtype: torch.dtype, D: int = 24) -> Problem:
    options = {**OP_CASES[name]}
    if D == WIDE:
        options["repeats"] = False
    p = make_problem(OP_SIZES, D, 101, dtype=dtype, peak=30.0, seed=3, **options)
    p.ref_logp_S = p.ref_logp_S.double()
    return p


def hidden_of(route: str) -> int:
    return WIDE if route == "frozen-in-place" else 24


def wanted_by(route: str) -> str:
    return {"forward": ""}.get(route, "h" if route in FROZEN else "h w bias")


def fused_workspace(p: Problem, route: str, buffers: int = 1) -> float:
    """A workspace in MiB with which the kernels take a route; ignored targets stay in the call."""
    (V, D), found, size = p.w_VD.shape, None, 256
    while size < 2**32:
        try:
            plan = make_plan(
                p.bounds_S1.tolist(),
                D,
                V,
                itemsize=4,
                workspace_bytes=size,
                need_head="w" in wanted_by(route),
                need_h=wanted_by(route) != "",
                T=p.h_TD.shape[0],
                unit_buffers=buffers,
                fused_itemsize=p.h_TD.itemsize,
                gathered=p.rows_N is not None,
            )
        except ValueError:
            plan = None
        if plan is not None and ALL_ROUTES[route](plan):
            found = size / MIB
        if plan is not None and len(list(plan.spans)) == 1:
            break
        size += max(size // 40, 1)
    assert found is not None, f"no workspace gives the route {route}"
    return found


def assert_route(result: PreferenceLoss, route: str) -> None:
    assert result.plan is not None
    assert ALL_ROUTES[route](result.plan), f"took {result.plan}"


@contextmanager
def way_of(projects: bool) -> Iterator[None]:
    """Which way the projection goes; folded tiles are narrow, so that a head has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(project, "feeds_from_descriptors", lambda device: projects)
        patch.setattr(fold, "MAX_TILE_COLUMNS", 48)
        yield


# fp16 gradients below 6e-5 lose digits; training multiplies the loss to avoid that.
FACTORS = {torch.float16: 1024.0}


def grads_of(p: Problem, loss: Tensor) -> dict[str, Tensor]:
    (loss * FACTORS.get(p.h_TD.dtype, 1.0)).backward()
    return p.grads()


@dataclass
class Outcome:
    """What a call returned, and its gradients."""

    result: Any
    grads: dict[str, Tensor]


def run(
    p: Problem, route: str, projects: bool, impl: str = "triton", objective: Any = None, **options
) -> Outcome:
    """One call by one route, and its backward."""
    objective = lr_dpo(BETA, 0.02) if objective is None else objective
    q = p.leaves(wanted_by(route))
    if impl == "triton":
        buffers = 1 if as_objective(objective).by_margin else 2
        options["workspace_mib"] = fused_workspace(p, route, buffers)
    with way_of(projects):
        result = preference(q, objective, impl=impl, **options)
        grads = grads_of(q, result.loss) if wanted_by(route) else {}
    if impl == "triton":
        assert_route(result, route)
    return Outcome(result, grads)


def first_run(case: str, way: str, route: str) -> Outcome:
    """With non-finite hidden rows where no scored target reads."""
    dtype, projects = WAYS[way]
    p = op_case(case, dtype, hidden_of(route))
    if p.rows_N is None:
        p.h_TD[p.target_N == IGNORE] = (
            torch.tensor([NAN, INF]).repeat(p.h_TD.shape[1] // 2).to(dtype)
        )
    return run(p, route, projects)


outcome = cache(first_run)


@cache
def gold_outcome(case: str, dtype: torch.dtype, D: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients in fp64 of the inputs in a dtype."""
    p = op_case(case, dtype, D).to(torch.float64).leaves()
    loss = gold_loss(p, sigmoid_formula, alpha=0.02)
    (loss * FACTORS.get(dtype, 1.0)).backward()
    return loss.detach(), p.grads()


@cache
def torch_outcome(case: str, dtype: torch.dtype, D: int, wanted: str) -> Outcome:
    """PyTorch's with the same inputs."""
    return run(op_case(case, dtype, D), "stash" if "w" in wanted else "frozen", False, impl="torch")


def assert_gradients(
    found, gold, eager, z_max: float = 30.0, roundings: int = 4, route: str = ""
) -> None:
    """At most one and a half times the error of PyTorch.

    PyTorch keeps fp32 numbers on a CPU where the kernels keep the operands' dtype; both round the
    result, and unit gradients in the memory of the gradient are rounded before they are scaled and
    rounded again.  In fp32 the error is that of the logits: they are rounded as often as `Shape`
    counts, and an absolute error of a logit is a relative one of its probability.
    """
    times = 2**0.5 if route == "frozen-in-place" else 1.0  # of independent errors
    assert found.keys() == eager.keys()
    for name, x in found.items():
        assert x.dtype == eager[name].dtype
        bound = 1.5 * times * relative_error(eager[name], gold[name])
        if x.dtype == torch.float32:
            bound = max(bound, roundings * U * z_max)
        error = relative_error(x, gold[name])
        assert error <= bound, f"gradient of {name}: {error:.2e} > {bound:.2e}"


OP_GRID = [("everything", way, route) for way in WAYS for route in ALL_ROUTES]
OP_GRID = [x for x in OP_GRID if x[1] != "fp16-tiles" or "recompute" in x[2] or x[2] == "stash"]
PLAIN_ROUTES = [route for route in ALL_ROUTES if route not in ("forward", "grouped")]
OP_GRID += [("plain", way, route) for way in ("fp32", "bf16") for route in PLAIN_ROUTES]


@pytest.mark.parametrize(("case", "way", "route"), OP_GRID)
def test_op_of_every_route_against_fp64(case, way, route):
    dtype, D = WAYS[way][0], hidden_of(route)
    p = op_case(case, dtype, D)
    found = outcome(case, way, route)
    gold_value, gold = gold_outcome(case, dtype, D)
    longest = max(OP_SIZES)
    sums_S = reference.sequence_sums(gold_logp(p), p.bounds_S1)
    # 2e-5 a log-prob is what the project promises for logits up to 30.
    assert max_error(found.result.logp_S, sums_S) <= 2e-5 * longest
    assert found.result.loss.dtype == torch.float32
    assert max_error(found.result.loss.detach(), gold_value) <= 2 * BETA * 2e-5 * longest
    assert torch.equal(found.result.ref_logp_S, p.ref_logp_S)
    eager = torch_outcome(case, dtype, D, wanted_by(route))
    for name, value in eager.result.metrics.items():
        assert max_error(found.result.metrics[name], value) <= 2 * 2e-5 * longest, name
    assert torch.equal(found.result.lengths_S, eager.result.lengths_S)
    if route == "forward":
        return
    z_max, roundings = (12.0, 10) if case == "everything" else (30.0, 2)
    assert_gradients(found.grads, gold, eager.grads, z_max, roundings, route)
    if case == "plain":
        assert not found.grads["h"][p.target_N == IGNORE].any()


@pytest.mark.parametrize("way", ["fp32", "bf16"])
def test_op_routes_agree(way):
    """The same numbers by other ways: log-probs to fp32, gradients to their dtype."""
    dtype, _ = WAYS[way]
    wanted = outcome("everything", way, "stash")
    for route in ALL_ROUTES.keys() - {"frozen-in-place"}:
        found = outcome("everything", way, route)
        # A block of other rows may sum its tiles in another order.
        allowed = 20 * U * wanted.result.logp_S.abs()
        assert_within(found.result.logp_S, wanted.result.logp_S, allowed, route)
        for name, x in found.grads.items():
            # twice the rounding of the result, and that of the logits
            bound = 2 * rounding(dtype) + 2 * 10 * U * 12.0
            assert relative_error(x, wanted.grads[name]) <= bound, f"{route}: {name}"


@pytest.mark.parametrize("route", ROUTES)
def test_op_gives_the_same_bits_again(route):
    wanted, found = outcome("everything", "bf16", route), first_run("everything", "bf16", route)
    assert torch.equal(found.result.loss, wanted.result.loss)
    assert torch.equal(found.result.logp_S, wanted.result.logp_S)
    assert all(torch.equal(x, wanted.grads[name]) for name, x in found.grads.items())


@pytest.mark.parametrize("way", ["fp32", "bf16"])
def test_op_first_loss_is_log_2(way):
    """The reference saw the same rows: the same instructions, so the same bits, on every route."""
    dtype, projects = WAYS[way]
    log_2 = torch.tensor(2.0).log()
    for route in ALL_ROUTES:
        p = op_case("everything", dtype, hidden_of(route))
        workspace = fused_workspace(p, route)
        options = {"impl": "triton", "workspace_mib": workspace}
        with way_of(projects):
            with torch.no_grad():
                seen = preference(p, lr_dpo(BETA), **options)
            q = p.leaves(wanted_by(route))
            first = preference(q, lr_dpo(BETA), ref_logp_S=seen.logp_S, **options)
        assert seen.plan is not None and seen.plan.route == "forward"
        assert_route(first, route)
        assert torch.equal(first.logp_S, seen.logp_S), route
        assert torch.equal(first.loss.detach(), log_2), route
        assert first.metrics["rewards/margins"] == 0


def custom(c, r, nw, nl, *_, **__):
    """Both sides on their own, and the lengths."""
    return (c - 0.1).square() / nw + torch.exp(0.1 * r) + 0.1 * c * r / nl


@pytest.mark.parametrize("route", ["stash", "unit", "forward"])
@pytest.mark.parametrize("name", [*OBJECTIVES, "custom"])
def test_op_of_every_objective(name, route):
    objective, formula, alpha = OBJECTIVES.get(name, (custom, custom, 0.0))
    p = make_problem((2, 4, 1, 3, 14, 16), 8, 67, dtype=torch.float32, masked=True, seed=1)
    P = p.num_pairs
    p.extra = {"weight_P": torch.rand(P).double() + 0.5, "num_pairs": 7.3}
    if as_objective(objective).by_margin:
        p.extra["margin_P"] = 0.3 * torch.randn(P).double()
        p.extra["smoothing_P"] = torch.rand(P).double() / 2
    found = run(p, route, False, objective=objective)
    gold_p = p.to(torch.float64).leaves()
    gold_value = gold_loss(gold_p, formula, alpha=alpha)
    eager = run(p, route, False, impl="torch", objective=objective)
    error = relative_error(eager.result.loss.detach(), gold_value.detach())
    allowed = max(1.5 * error, 10 * U * 6)  # log-ratios of about 1 from logits of 6
    assert relative_error(found.result.loss.detach(), gold_value.detach()) <= allowed
    if found.grads:
        gold_value.backward()
        assert_gradients(found.grads, gold_p.grads(), eager.grads, 6.0, 10)


@pytest.mark.parametrize("route", ["stash", "grouped", "frozen"])
@pytest.mark.parametrize("way", ["fp32", "bf16"])
def test_op_with_a_reference_of_hidden_rows(way, route):
    dtype, projects = WAYS[way]
    p = op_case("everything", dtype)
    other = make_problem(
        OP_SIZES, 16, 101, dtype=dtype, peak=30.0, seed=4, **OP_CASES["everything"]
    )
    other.target_N, other.rows_N = p.target_N, p.rows_N
    gold_ref_S = reference.sequence_sums(gold_logp(other), p.bounds_S1)
    found = run(
        p, route, projects, ref_logp_S=None, ref_h_TD=other.h_TD, ref_w_VD=other.w_VD,
        ref_bias_V=other.bias_V,
    )  # fmt: skip
    assert max_error(found.result.ref_logp_S, gold_ref_S) <= 2e-5 * max(OP_SIZES)
    p.ref_logp_S = gold_ref_S
    gold_p = p.to(torch.float64).leaves()
    gold_value = gold_loss(gold_p, sigmoid_formula, alpha=0.02)
    assert max_error(found.result.loss.detach(), gold_value.detach()) <= 2 * 2 * BETA * 2e-5 * 13
    gold = grads_of(replace(gold_p), gold_value)
    eager = run(p, route, False, impl="torch")
    assert_gradients(found.grads, gold, eager.grads, 12.0, 10)


@pytest.mark.parametrize("route", ["forward", "frozen", "unit"])
@pytest.mark.parametrize("softcap", [None, 12.0])
def test_op_statistics(softcap, route):
    """All of them, those of ignored targets being zero."""
    names = ("entropy", "mean_logit", "top1", "log_sum_sq_probs", "kl_ref")
    options = {**OP_CASES["everything"], "softcap": softcap}
    p, other = (
        make_problem(OP_SIZES, 24, 101, dtype=torch.bfloat16, peak=30.0, seed=i, **options)
        for i in (3, 4)
    )
    other.target_N, other.rows_N = p.target_N, p.rows_N
    p64, other64 = p.to(torch.float64), other.to(torch.float64)
    z_NV, ref_z_NV = (reference.linear_logits(q.h_TD, q.w_VD, **q.head) for q in (p64, other64))
    p.target_N[::5] = z_NV.argmax(1)[::5]
    gold = reference.token_stats(z_NV, p.target_N, ref_z_NV)
    found = run(
        p, route, True, ref_logp_S=None, ref_h_TD=other.h_TD, ref_w_VD=other.w_VD,
        ref_bias_V=other.bias_V, stats=names,
    ).result.stats  # fmt: skip

    assert found.keys() == set(names)
    assert 0 < gold["top1"].sum() < (p.target_N != IGNORE).sum()
    # Errors of the logits and of the exponentials, as `Shape` counts them, and those of a product
    # in fp32; sums of p * (z - lse) have both.
    tolerance = 2 * product_error(p, other) + SHAPES["softcap"].tolerance(torch.tensor(30.0))
    allowed = {"top1": 0.0, "mean_logit": tolerance, "log_sum_sq_probs": 4 * tolerance}
    for name in names:
        within = allowed.get(name, 3 * tolerance * (1 + gold[name]))
        assert_within(found[name], gold[name], within, name)
        assert not found[name][p.target_N == IGNORE].any()


def product_error(*problems: Problem) -> float:
    """Largest error of PyTorch's fp32 product of the hidden rows and the head."""
    return max(
        max_error(p.h_TD.float() @ p.w_VD.float().T, p.h_TD.double() @ p.w_VD.double().T)
        for p in problems
    )


@pytest.mark.parametrize("route", ["stash", "recompute", "frozen-in-place"])
@pytest.mark.parametrize("which", ["h", "w", "columns"])
def test_op_of_strided_inputs(which, route):
    """Hidden rows further apart or with gaps between elements, a head stored by columns."""
    D = hidden_of(route)
    p = op_case("everything", torch.bfloat16, D)
    q = p.leaves(wanted_by(route))
    if which == "h":
        strided = torch.cat([p.h_TD, p.h_TD], 1)[:, :D]
        q.h_TD = strided.detach().requires_grad_()
    elif which == "columns":
        q.h_TD = torch.stack([p.h_TD, p.h_TD], 2)[:, :, 0].detach().requires_grad_()
    else:
        strided = p.w_VD.T.contiguous().T.detach()
        q.w_VD = strided.requires_grad_("w" in wanted_by(route))
    assert not (q.h_TD.is_contiguous() and q.w_VD.is_contiguous())
    with way_of(True):
        result = preference(
            q, lr_dpo(BETA, 0.02), impl="triton", workspace_mib=fused_workspace(p, route)
        )
        found = grads_of(q, result.loss)
    assert_route(result, route)
    gold_value, gold = gold_outcome("everything", torch.bfloat16, D)
    assert max_error(result.loss.detach(), gold_value) <= 2 * BETA * 2e-5 * max(OP_SIZES)
    eager = torch_outcome("everything", torch.bfloat16, D, wanted_by(route))
    assert_gradients(found, gold, eager.grads)


def test_op_of_a_head_whose_rows_are_no_descriptors():
    """D = 21: the rows do not start at 16 bytes, so tiles are folded."""
    p = make_problem(OP_SIZES, 21, 101, dtype=torch.float16, peak=30.0, masked=True)
    assert not project.can_project(p.h_TD, p.w_VD)
    found, eager = run(p, "stash", True), run(p, "stash", False, impl="torch")
    gold_p = p.to(torch.float64).leaves()
    gold_value = gold_loss(gold_p, sigmoid_formula, alpha=0.02)
    (gold_value * FACTORS[torch.float16]).backward()
    assert_gradients(found.grads, gold_p.grads(), eager.grads)


LOGP_ROUTES = ["stash", "recompute", "forward", "frozen", "frozen-in-place"]


@pytest.mark.parametrize("route", LOGP_ROUTES)
@pytest.mark.parametrize("way", ["fp32", "bf16"])
def test_op_linear_logp_against_fp64(way, route):
    """Any upstream gradient, also at ignored targets; one list of tokens instead of pairs."""
    dtype, projects = WAYS[way]
    p = op_case("everything", dtype, hidden_of(route))
    p.bounds_S1 = torch.tensor([0, sum(OP_SIZES)])
    upstream_N = torch.randn(p.target_N.shape[0], dtype=torch.float64)
    upstream_N[5] = 0.0

    def both(q: Problem, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        head = {**q.head, **options}
        logp_N = (linear_logp if options else reference.linear_logp)(
            q.h_TD, q.w_VD, q.target_N, **head
        )
        if logp_N.requires_grad:
            (logp_N * upstream_N.to(logp_N.dtype)).sum().backward()
        return logp_N.detach(), q.grads()

    wanted = wanted_by(route)
    workspace = fused_workspace(p, route)
    with way_of(projects):
        found_N, found = both(p.leaves(wanted), impl="triton", workspace_mib=workspace)
    gold_N, gold = both(p.to(torch.float64).leaves(wanted))
    _, eager = both(p.leaves(wanted), impl="torch")
    assert found_N.dtype == torch.float32
    assert max_error(found_N, gold_N) <= 2e-5
    assert not found_N[p.target_N == IGNORE].any()
    assert_gradients(found, gold, eager, 12.0, 10)


@pytest.mark.parametrize("peak", [80.0, 1000.0])
@pytest.mark.parametrize("way", ["fp32", "bf16", "bf16-tiles", "fp16"])
def test_op_linear_logp_of_extreme_logits(way, peak):
    """Nothing overflows; errors stay relative to the logits."""
    dtype, projects = WAYS[way]
    p = make_problem(OP_SIZES, 24, 101, dtype=dtype, peak=peak)
    z_NV = p.h_TD.double() @ p.w_VD.double().T
    p.target_N[::3] = z_NV.argmax(1)[::3]  # some are certain
    with way_of(projects):
        q = p.leaves()
        logp_N = linear_logp(q.h_TD, q.w_VD, q.target_N, impl="triton")
        logp_N.sum().backward()
    gold_p = p.to(torch.float64).leaves()
    gold_N = reference.linear_logp(gold_p.h_TD, gold_p.w_VD, p.target_N)
    gold_N.sum().backward()
    # The error of an fp32 product, and the roundings of `Shape`.
    product_NV = p.h_TD.float() @ p.w_VD.float().T
    error = 2 * max_error(product_NV, z_NV) + SHAPES["plain"].tolerance(z_NV)
    assert max_error(logp_N.detach(), gold_N.detach()) <= 2 * error
    for name, gold in gold_p.grads().items():
        # An error of the logits is a relative one of the probabilities; those kept, the scaled
        # hidden rows and the result are each rounded to the dtype.
        bound = 2 * error + 3 * rounding(dtype)
        assert relative_error(q.grads()[name], gold) <= bound, name


@pytest.mark.parametrize("wanted", ["h w bias", "h", ""])
@pytest.mark.parametrize("way", ["fp32", "bf16"])
def test_op_linear_logp_of_ignored_targets_alone(way, wanted):
    """Zeros and zero gradients, whatever the hidden rows hold."""
    dtype, projects = WAYS[way]
    p = make_problem([35], 16, 70, dtype=dtype, bias=True, softcap=9.0).leaves(wanted)
    with torch.no_grad():
        p.h_TD[::2] = NAN
        p.h_TD[1::2] = INF
    target_N = torch.full((35,), IGNORE)
    with way_of(projects):
        logp_N = linear_logp(p.h_TD, p.w_VD, target_N, impl="triton", **p.head)
    assert logp_N.tolist() == [0.0] * 35
    if wanted:
        logp_N.sum().backward()
        assert p.grads().keys() == set(wanted.split())
    assert not any(dx.any() for dx in p.grads().values())


@pytest.mark.parametrize("V", [1, 2])
def test_op_of_the_smallest_vocabularies(V):
    """The only token has probability 1 and no gradient; of two, each is the other's rest."""
    p = make_problem([2, 1], 8, V, dtype=torch.bfloat16)
    q, gold_p = p.leaves(), p.to(torch.float64).leaves()
    logp_N = linear_logp(q.h_TD, q.w_VD, q.target_N, impl="triton")
    gold_N = reference.linear_logp(gold_p.h_TD, gold_p.w_VD, p.target_N)
    assert max_error(logp_N.detach(), gold_N.detach()) <= 2e-5
    logp_N.sum().backward()
    gold_N.sum().backward()
    for name, gold in gold_p.grads().items():
        # The kept probabilities, the scaled hidden rows and the result are rounded.
        bound = 3 * rounding(torch.bfloat16) * float(gold.norm())
        assert float((q.grads()[name].double() - gold).norm()) <= bound


@pytest.mark.parametrize("objective", ["lr_dpo", "nca_pair"])
def test_op_of_one_token_sides(objective):
    p = make_problem([1, 1, 1, 2], 8, 67, dtype=torch.float32)
    chosen, formula, alpha = OBJECTIVES[objective]
    found, eager = (run(p, "stash", False, impl, chosen) for impl in ("triton", "torch"))
    gold_p = p.to(torch.float64).leaves()
    gold_loss(gold_p, formula, alpha=alpha).backward()
    assert_gradients(found.grads, gold_p.grads(), eager.grads, 6.0, 10)


def test_op_of_the_padded_layout():
    """`LinearDPOLoss` on TRL's layout, prompts and padding being ignored in the kernels."""
    B, L, D, V = 3, 7, 8, 53
    p = make_problem([L] * (2 * B), D, V, dtype=torch.float32)
    target_BL = p.target_N.view(2 * B, L).clone()
    for b in range(2 * B):
        target_BL[b, : 1 + b % 3] = IGNORE
        target_BL[b, L - b % 2 :] = IGNORE
    ref_logp_B = -torch.rand(2 * B, dtype=torch.float64) * 10 - 15
    module = LinearDPOLoss(beta=BETA, alpha=0.05)

    def both(dtype: torch.dtype, impl: str):
        h_BLD, w_VD = (
            x.detach().clone().to(dtype).requires_grad_()
            for x in (p.h_TD.view(2 * B, L, D), p.w_VD)
        )
        stats = ("entropy",)
        result = module(h_BLD, w_VD, target_BL, ref_logp_S=ref_logp_B, impl=impl, stats=stats)
        result.loss.backward()
        return result, {"h": grad(h_BLD), "w": grad(w_VD)}

    found, grads = both(torch.float32, "triton")
    gold_, gold = both(torch.float64, "torch")
    _, eager = both(torch.float32, "torch")
    assert_gradients(grads, gold, eager, 6.0, 10)
    assert not grads["h"][target_BL == IGNORE].any()
    assert_within(found.logp_S, gold_.logp_S, 2e-5 * L)
    assert_within(found.stats["entropy"], gold_.stats["entropy"], 2e-5)
    assert torch.equal(found.lengths_S, (target_BL != IGNORE).sum(1))
    assert torch.equal(found.ref_logp_S, ref_logp_B)


# ---------------------------------------------------------------------------- what must not be lost
@pytest.mark.parametrize("way", [False, True], ids=["fold", "project"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_op_a_number_that_is_none_is_not_certainty(monkeypatch, way, bad):
    """A NaN among the logits once read as probability 1, a loss that looks fine."""
    monkeypatch.setattr(project, "feeds_from_descriptors", lambda device: way)
    h, w = torch.randn(8, 16).abs().bfloat16(), torch.randn(70, 16).bfloat16()
    w[41, 3] = bad
    logp_N = linear_logp(h, w, torch.arange(8), impl="triton")
    assert logp_N.isnan().all()
    for objective in (lr_dpo(0.1), hinge(0.1), ipo(0.1), nca_pair(0.1)):
        leaf = h.clone().requires_grad_()
        result = linear_preference_loss(
            leaf, w, torch.arange(8), torch.tensor([0, 5, 8]), torch.zeros(2), objective,
            impl="triton",
        )  # fmt: skip
        result.loss.backward()
        assert result.loss.isnan()
        assert leaf.grad is not None and leaf.grad.isnan().all()


def spread(x: Tensor) -> Tensor:
    """The same numbers, not side by side in memory."""
    return torch.stack([x, x], -1)[..., 0]


def test_op_inputs_need_not_be_contiguous():
    h, w, bias, target = torch.randn(8, 16), torch.randn(70, 16), torch.randn(70), torch.arange(8)
    bounds, ref_logp, margin = torch.tensor([0, 5, 8]), -torch.rand(2) * 50, torch.randn(1)
    rows = torch.randperm(8)

    def loss(move):
        return linear_preference_loss(
            h, w, move(target), bounds, move(ref_logp), lr_dpo(0.1), rows_N=move(rows),
            bias_V=move(bias), margin_P=move(margin.double()), impl="triton",
        ).loss  # fmt: skip

    assert torch.equal(loss(spread), loss(lambda x: x))
    assert torch.equal(loss(lambda x: x), loss(lambda x: x.clone()))


def test_the_kernel_numbers_the_formulas_as_they_are():
    assert tuple(formula.name for formula in KERNEL_FORMULAS) == pair.KINDS


def test_the_kernel_sums_the_metrics_in_their_order():
    assert ("loss", *METRICS) == pair.TOTALS


@pytest.mark.parametrize("workspace_mib", [0.022, 0.05, 1.0])
def test_op_gradients_of_transposed_operands(workspace_mib):
    """Their gradients are made of whole rows all the same."""
    p = make_problem(D=16, V=296, dtype=torch.float32)
    grads = []
    for move in (lambda x: x.detach().clone(), lambda x: x.detach().T.contiguous().T):
        h, w = (move(x).requires_grad_() for x in (p.h_TD, p.w_VD))
        result = linear_preference_loss(
            h, w, p.target_N, p.bounds_S1, p.ref_logp_S, lr_dpo(BETA), rows_N=p.rows_N,
            workspace_mib=workspace_mib, impl="triton",
        )  # fmt: skip
        result.loss.backward()
        grads.append((h.grad, w.grad))
    for plain, moved in zip(*grads):
        assert relative_error(moved, plain) <= 1e-6


def test_op_an_objective_is_known_by_its_function():
    """One with another function is the caller's own, whatever it was made from."""
    p = make_problem(D=16, V=70, dtype=torch.float32)
    own = replace(lr_dpo(BETA), formula=SIGMOID._replace(f=lambda z_P, _: (1 - z_P).square()))
    losses = [
        linear_preference_loss(
            p.h_TD, p.w_VD, p.target_N, p.bounds_S1, p.ref_logp_S, own, rows_N=p.rows_N, impl=impl
        ).loss
        for impl in ("torch", "triton")
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_op_a_padded_batch_that_may_be_looked_at_gives_the_same(monkeypatch, impl):
    """As on a GPU: prompts and padding are left out before anything is computed."""
    h = torch.randn(4, 6, 16, requires_grad=True)
    w = torch.randn(70, 16, requires_grad=True)
    target = torch.randint(70, (4, 6))
    target[0, :3] = target[2, 4:] = target[3, 0] = IGNORE
    found = []
    for looks in (False, True):
        monkeypatch.setattr(module, "_may_wait_for", lambda target, looks=looks: looks)
        loss = LinearDPOLoss(BETA, 0.02, impl=impl, stats=("entropy",))
        result = loss(h, w, target, ref_logp_S=-torch.ones(4) * 20)
        grads = torch.autograd.grad(result.loss, (h, w))
        values = (result.loss, result.logp_S, result.lengths_S, result.stats["entropy"])
        found.append([*(x.detach() for x in values), *grads])
    for plain, packed in zip(*found):
        torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-6)


def test_op_unit_gradients_in_the_gradients_memory_survive_a_kept_graph():
    """A second backward gives the same bits; the last one uses the memory for its result."""
    p = op_case("plain", torch.bfloat16, WIDE).leaves("h")
    workspace_mib = fused_workspace(p, "frozen-in-place")
    result = preference(p, lr_dpo(BETA), impl="triton", workspace_mib=workspace_mib)
    assert_route(result, "frozen-in-place")
    first, second = (
        torch.autograd.grad(result.loss, p.h_TD, retain_graph=keep)[0].clone()
        for keep in (True, False)
    )
    assert torch.equal(first, second) and first.any()
