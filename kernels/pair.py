"""One launch for the pairs: sums, reference log-ratios, length penalty, loss, metrics, slopes.

And one for the sums alone of any sequences, whose objective PyTorch computes.

P pairs, S = 2P sequences (2i chosen, 2i+1 rejected), N tokens.
"""

import struct
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pointwise import ASSERTING
from .support import METRICS

# Objectives by number, the KIND below, each a function of the margin z or of the two sides.
KINDS = (
    "sigmoid", "hinge", "ipo", "apo_zero", "nca_pair", "exo_pair", "robust", "discopop", "bco_pair",
    "sppo_hard", "apo_down",
)  # fmt: skip
TOTALS = ("loss", *METRICS)  # what the kernel sums over pairs, in this order


@triton.jit
def _softplus(x):
    """In fp64, with all digits where it is small."""
    u = tl.exp(-tl.abs(x))
    series = u * (1.0 - u * (0.5 - u * (0.3333333333333333 - u * 0.25)))
    return tl.maximum(x, 0.0) + tl.where(u < 1e-4, series, tl.log(1.0 + u))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


@triton.jit
def _margin_loss(z, beta, parameter, KIND: tl.constexpr):
    """f(z) and its derivative; of robust its f, that of the sigmoid."""
    if KIND == 0 or KIND == 6:
        value = _softplus(-z)
        slope = -_sigmoid(-z)
    elif KIND == 1:
        value = tl.where(z < 1.0, 1.0 - z, 0.0 * z)  # of NaN both stay NaN
        slope = tl.where(z < 1.0, -1.0, 0.0 * z)
    elif KIND == 2:
        value = ((z - 0.5) / beta) * ((z - 0.5) / beta)
        slope = 2.0 * (z - 0.5) / (beta * beta)
    else:
        tl.static_assert(KIND == 7)
        share = z / parameter
        logistic = _sigmoid(-share)  # what the logistic loss counts; the exponential has the rest
        grown = tl.exp(-z - _softplus(-share))
        value = logistic * _softplus(-z)
        slope = (grown * logistic - value * _sigmoid(share)) / parameter
        slope -= grown + logistic * _sigmoid(-z)
        value += grown
    return value, slope


@triton.jit
def _label_loss(z, eps):
    """exo_pair and its derivative by z."""
    q = _sigmoid(z)
    rest = _sigmoid(-z)
    log_right = tl.log(1.0 - eps)
    log_flipped = tl.log(eps)
    value = q * (-_softplus(-z) - log_right) + rest * (-_softplus(z) - log_flipped)
    return value, q * rest * (z - (log_right - log_flipped))


@triton.jit
def _smoothed_loss(z, beta, parameter, eps, KIND: tl.constexpr, SMOOTHED: tl.constexpr):
    """Of a label that is flipped with probability eps, and the derivative by z."""
    if KIND == 5:
        value, slope = _label_loss(z, eps)
    else:
        value, slope = _margin_loss(z, beta, parameter, KIND)
        if SMOOTHED:
            share = eps
            if KIND == 6:
                tl.device_assert(eps < 0.5, "smoothing_P must be < 0.5 for robust")
                share = -eps / (1.0 - 2.0 * eps)
            flipped, flipped_slope = _margin_loss(-z, beta, parameter, KIND)
            value = (1.0 - share) * value + share * flipped
            slope = (1.0 - share) * slope - share * flipped_slope
    return value, slope


@triton.jit
def _separate_loss(w, l, beta, KIND: tl.constexpr):  # noqa: E741
    """f(w, l) of the two sides' rewards and its derivatives."""
    if KIND == 3:
        a = _sigmoid(-w)
        b = _sigmoid(l)
        value = a + b
        slope_w = -a * (1.0 - a)
        slope_l = b * (1.0 - b)
    elif KIND == 4:
        # softplus(-w) + softplus(w) / 2 + softplus(l) / 2, with softplus(-w) = softplus(w) - w
        value = 1.5 * _softplus(w) - w + 0.5 * _softplus(l)
        slope_w = 1.5 * _sigmoid(w) - 1.0
        slope_l = 0.5 * _sigmoid(l)
    elif KIND == 8:
        value = _softplus(-w) + _softplus(l)
        slope_w = -_sigmoid(-w)
        slope_l = _sigmoid(l)
    elif KIND == 9:
        off_w = (w - 0.5) / beta
        off_l = (l + 0.5) / beta
        value = off_w * off_w + off_l * off_l
        slope_w = 2.0 * off_w / beta
        slope_l = 2.0 * off_l / beta
    else:
        tl.static_assert(KIND == 10)
        a = _sigmoid(w)
        b = _sigmoid(l - w)
        value = a + b
        slope_l = b * _sigmoid(w - l)
        slope_w = a * _sigmoid(-w) - slope_l
    return value, slope_w, slope_l


@triton.jit
def _sequence(logp_ptr, ref_ptr, target_ptr, start, stop, BLOCK: tl.constexpr):
    """Sum of log-probs of one sequence, of the reference's, and the number of scored tokens."""
    total = tl.zeros((BLOCK,), tl.float64)
    ref = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int64)
    for i in tl.range(start, stop, BLOCK):
        n = i + tl.arange(0, BLOCK)
        inside = n < stop
        total += tl.load(logp_ptr + n, mask=inside, other=0.0).to(tl.float64)
        count += (tl.load(target_ptr + n, mask=inside, other=-1) >= 0).to(tl.int64)
        if ref_ptr is not None:
            ref += tl.load(ref_ptr + n, mask=inside, other=0.0).to(tl.float64)
    length = tl.sum(count, 0)
    tl.device_assert(length > 0, "a response is empty: all its targets are -100")
    return tl.sum(total, 0), tl.sum(ref, 0), length


@triton.jit
def _spread(coef_ptr, target_ptr, start, stop, value, BLOCK: tl.constexpr):
    for i in tl.range(start, stop, BLOCK):
        n = i + tl.arange(0, BLOCK)
        inside = n < stop
        scored = tl.load(target_ptr + n, mask=inside, other=-1) >= 0
        tl.store(coef_ptr + n, tl.where(scored, value, 0.0).to(tl.float32), mask=inside)


@triton.jit
def _number(high, low, neutral: tl.constexpr):
    """A number in two parts, in fp64."""
    zero = tl.full((), 0.0, tl.float64)
    if high is not None:
        return zero + high + low
    else:
        return zero + neutral


@triton.jit
def _total(totals_ptr, means_ptr, i: tl.constexpr, total, P):
    tl.store(totals_ptr + i, total)
    tl.store(means_ptr + i - 1, (total / P).to(tl.float32))


@triton.jit
def pair_kernel(
    logp_ptr,
    ref_token_ptr,
    ref_ptr,
    target_ptr,
    bounds_ptr,
    length_ptr,
    margin_ptr,
    smoothing_ptr,
    weight_ptr,
    logp_sum_ptr,
    ref_sum_ptr,
    slope_ptr,
    coef_ptr,
    totals_ptr,
    loss_ptr,
    means_ptr,
    P,
    beta_high,
    beta_low,
    alpha_high,
    alpha_low,
    num_pairs_high,
    num_pairs_low,
    flip_high,
    flip_low,
    target_high,
    target_low,
    scale_high,
    scale_low,
    parameter_high,
    parameter_low,
    KIND: tl.constexpr,
    BY_MARGIN: tl.constexpr,
    NORMALIZED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    MEAN_REWARDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All pairs in one program, in fp64 and in order, so that the totals need no atomics.

    ``slope[s]`` is the derivative of the loss by the log-prob sum of sequence s, ``coef[n]`` that
    of its tokens.  The numbers before ``KIND`` are None where they would change nothing.
    """
    zero = tl.full((), 0.0, tl.float64)
    beta = zero + beta_high + beta_low
    alpha = zero + alpha_high + alpha_low
    num_pairs = zero + num_pairs_high + num_pairs_low
    flip = _number(flip_high, flip_low, 0.0)
    scale = _number(scale_high, scale_low, 1.0)
    parameter = _number(parameter_high, parameter_low, 0.0)
    target = _number(target_high, target_low, 0.0)
    loss = zero
    chosen = zero
    rejected = zero
    right = zero
    logp_w = zero
    logp_l = zero
    tokens_w = zero
    tokens_l = zero
    for p in tl.range(0, P):
        start = tl.load(bounds_ptr + 2 * p)
        middle = tl.load(bounds_ptr + 2 * p + 1)
        stop = tl.load(bounds_ptr + 2 * p + 2)
        lw, rw, length_w = _sequence(logp_ptr, ref_token_ptr, target_ptr, start, middle, BLOCK)
        ll, rl, length_l = _sequence(logp_ptr, ref_token_ptr, target_ptr, middle, stop, BLOCK)
        tl.store(length_ptr + 2 * p, length_w)
        tl.store(length_ptr + 2 * p + 1, length_l)
        if ref_ptr is not None:
            rw = tl.load(ref_ptr + 2 * p).to(tl.float64)
            rl = tl.load(ref_ptr + 2 * p + 1).to(tl.float64)
            finite = (tl.abs(rw) < float("inf")) & (tl.abs(rl) < float("inf"))
            tl.device_assert(finite, "ref_logp_S must be finite")
        # rounded to the precision the sums are returned in, which is the reference's
        lw = lw.to(logp_sum_ptr.dtype.element_ty)
        ll = ll.to(logp_sum_ptr.dtype.element_ty)
        rw = rw.to(logp_sum_ptr.dtype.element_ty)
        rl = rl.to(logp_sum_ptr.dtype.element_ty)
        tl.store(logp_sum_ptr + 2 * p, lw)
        tl.store(logp_sum_ptr + 2 * p + 1, ll)
        tl.store(ref_sum_ptr + 2 * p, rw)
        tl.store(ref_sum_ptr + 2 * p + 1, rl)
        ratio_w = lw.to(tl.float64) - rw.to(tl.float64)
        ratio_l = ll.to(tl.float64) - rl.to(tl.float64)
        count_w = length_w.to(tl.float64)
        count_l = length_l.to(tl.float64)
        scored_w = ratio_w
        scored_l = ratio_l
        if scale_high is not None:
            scored_w = lw.to(tl.float64) - scale * rw.to(tl.float64)
            scored_l = ll.to(tl.float64) - scale * rl.to(tl.float64)
        share_w = beta
        share_l = beta
        if NORMALIZED:
            share_w = beta / count_w
            share_l = beta / count_l
        if BY_MARGIN:
            z = share_w * scored_w - share_l * scored_l + alpha * (count_w - count_l)
            if margin_ptr is not None:
                z += tl.load(margin_ptr + p)
            if target_high is not None:
                z -= target
            eps = flip
            if smoothing_ptr is not None:
                own = tl.load(smoothing_ptr + p)
                eps += own - 2.0 * flip * own
            value, slope = _smoothed_loss(z, beta, parameter, eps, KIND, SMOOTHED)
            slope_w = slope * share_w
            slope_l = -slope * share_l
        else:
            value, slope_w, slope_l = _separate_loss(
                share_w * scored_w, share_l * scored_l, beta, KIND
            )
            slope_w *= share_w
            slope_l *= share_l
        factor = 1.0 / num_pairs
        if weight_ptr is not None:
            factor *= tl.load(weight_ptr + p)
        slope_w *= factor
        slope_l *= factor
        tl.store(slope_ptr + 2 * p, slope_w)
        tl.store(slope_ptr + 2 * p + 1, slope_l)
        if coef_ptr is not None:
            _spread(coef_ptr, target_ptr, start, middle, slope_w, BLOCK)
            _spread(coef_ptr, target_ptr, middle, stop, slope_l, BLOCK)
        loss += value * factor
        if MEAN_REWARDS:
            ratio_w /= count_w
            ratio_l /= count_l
        chosen += beta * ratio_w
        rejected += beta * ratio_l
        right += (ratio_w > ratio_l).to(tl.float64)
        logp_w += lw.to(tl.float64)
        logp_l += ll.to(tl.float64)
        tokens_w += count_w
        tokens_l += count_l
    _total(totals_ptr, means_ptr, 1, chosen, P)
    _total(totals_ptr, means_ptr, 2, rejected, P)
    _total(totals_ptr, means_ptr, 3, right, P)
    _total(totals_ptr, means_ptr, 4, chosen - rejected, P)
    _total(totals_ptr, means_ptr, 5, logp_w, P)
    _total(totals_ptr, means_ptr, 6, logp_l, P)
    _total(totals_ptr, means_ptr, 7, tokens_w, P)
    _total(totals_ptr, means_ptr, 8, tokens_l, P)
    _total(totals_ptr, means_ptr, 9, alpha * (tokens_w - tokens_l), P)
    tl.store(totals_ptr, loss)
    tl.store(loss_ptr, loss.to(tl.float32))


@triton.jit
def sums_kernel(
    logp_ptr,
    ref_token_ptr,
    ref_ptr,
    gap_ptr,
    target_ptr,
    bounds_ptr,
    logp_sum_ptr,
    ref_sum_ptr,
    gap_mean_ptr,
    BLOCK: tl.constexpr,
):
    """One sequence in a program: its sums, and the mean of its gaps, in fp64 and in order."""
    s = tl.program_id(0)
    start = tl.load(bounds_ptr + s)
    stop = tl.load(bounds_ptr + s + 1)
    total, ref, length = _sequence(logp_ptr, ref_token_ptr, target_ptr, start, stop, BLOCK)
    if ref_ptr is not None:
        ref = tl.load(ref_ptr + s).to(tl.float64)
        tl.device_assert(tl.abs(ref) < float("inf"), "ref_logp_S must be finite")
    tl.store(logp_sum_ptr + s, total.to(logp_sum_ptr.dtype.element_ty))
    tl.store(ref_sum_ptr + s, ref.to(ref_sum_ptr.dtype.element_ty))
    if gap_ptr is not None:
        gaps, _, _ = _sequence(gap_ptr, None, target_ptr, start, stop, BLOCK)
        tl.store(gap_mean_ptr + s, gaps / length.to(tl.float64))


def _two(x: float) -> tuple[float, float]:
    """A number as the sum of two fp32 ones, the type in which Triton passes it."""
    if abs(x) > 3e38:
        raise ValueError(
            f"numbers of an objective and num_pairs must fit fp32 in the kernels, got {x:g}"
        )
    high = struct.unpack("f", struct.pack("f", x))[0]
    return high, x - high


def _unless(x: float, neutral: float) -> tuple[float, float] | tuple[None, None]:
    """The same, if it changes anything."""
    return (None, None) if x == neutral else _two(x)


@dataclass
class PairResult:
    """Sums of each sequence, the loss's derivatives; ``coef_N`` is None if not asked for.

    ``totals`` has one fp64 entry a name of `TOTALS`: the loss, and each metric's sum over pairs;
    ``loss`` and ``means`` are those in fp32, the metrics over the number of pairs.  ``lengths_S``
    counts the scored tokens.
    """

    loss: Tensor
    means: Tensor
    lengths_S: Tensor
    totals: Tensor
    logp_S: Tensor
    ref_logp_S: Tensor
    slope_S: Tensor
    coef_N: Tensor | None


def pair_losses(
    logp_N: Tensor,
    target_N: Tensor,
    bounds_S1: Tensor,
    objective: Any,
    *,
    ref_logp_S: Tensor | None = None,
    ref_logp_N: Tensor | None = None,
    margin_P: Tensor | None = None,
    smoothing_P: Tensor | None = None,
    weight_P: Tensor | None = None,
    num_pairs: float,
    want_coef: bool,
) -> PairResult:
    """Score the pairs.

    ``objective`` is one of ``loss/objectives.py`` that has its place in `KINDS` as ``code``.
    ``bounds_S1`` lies on the device and counts from the first token of ``logp_N``; ``margin_P``,
    ``smoothing_P`` and ``weight_P`` are fp64.  Sums are in the dtype of the reference, without one
    in fp64.  A sequence without a scored token, and a reference that is no number, trip a device
    assert.
    """
    S = bounds_S1.shape[0] - 1
    device = logp_N.device
    dtype = torch.float32 if objective.needs_reference else torch.float64
    dtype = dtype if ref_logp_S is None else ref_logp_S.dtype
    logp_S, ref_S = (torch.empty(S, dtype=dtype, device=device) for _ in range(2))
    slope_S = torch.empty(S, dtype=torch.float64, device=device)
    coef_N = torch.empty_like(logp_N) if want_coef else None
    totals = torch.empty(len(TOTALS), dtype=torch.float64, device=device)
    loss, means = (torch.empty(n, device=device) for n in ((), len(TOTALS) - 1))
    lengths_S = torch.empty(S, dtype=torch.int64, device=device)
    pair_kernel[(1,)](
        logp_N, ref_logp_N, ref_logp_S, target_N, bounds_S1, lengths_S, margin_P, smoothing_P,
        weight_P, logp_S, ref_S, slope_S, coef_N, totals, loss, means, S // 2,
        *_two(objective.beta), *_two(objective.alpha), *_two(num_pairs),
        *_unless(objective.label_smoothing, 0.0), *_unless(objective.target_margin, 0.0),
        *_unless(objective.reference_scale, 1.0), *_unless(objective.parameter, 0.0),
        KIND=objective.code, BY_MARGIN=objective.by_margin, NORMALIZED=objective.length_normalized,
        SMOOTHED=smoothing_P is not None or objective.label_smoothing != 0,
        MEAN_REWARDS=objective.mean_rewards, BLOCK=1024, num_warps=4, **ASSERTING,
    )  # fmt: skip
    return PairResult(loss, means, lengths_S, totals, logp_S, ref_S, slope_S, coef_N)


@dataclass
class SequenceSums:
    """Sums of each sequence; ``gap_S`` has the means of its gaps in fp64, None without them."""

    logp_S: Tensor
    ref_logp_S: Tensor
    gap_S: Tensor | None


def sequence_sums(
    logp_N: Tensor,
    target_N: Tensor,
    bounds_S1: Tensor,
    dtype: torch.dtype,
    *,
    ref_logp_S: Tensor | None = None,
    ref_logp_N: Tensor | None = None,
    gap_N: Tensor | None = None,
) -> SequenceSums:
    """The sums that `pair_losses` takes, of any number of sequences, rounded once to ``dtype``.

    ``gap_N`` are numbers whose mean over the scored tokens is wanted; they are zero elsewhere.
    Without a reference its sums are zero.  Errors as in `pair_losses`.
    """
    S, device = bounds_S1.shape[0] - 1, logp_N.device
    logp_S, ref_S = (torch.empty(S, dtype=dtype, device=device) for _ in range(2))
    gap_S = None if gap_N is None else torch.empty(S, dtype=torch.float64, device=device)
    sums_kernel[(S,)](
        logp_N, ref_logp_N, ref_logp_S, gap_N, target_N, bounds_S1, logp_S, ref_S, gap_S,
        BLOCK=1024, num_warps=4, **ASSERTING,
    )  # fmt: skip
    return SequenceSums(logp_S, ref_S, gap_S)
