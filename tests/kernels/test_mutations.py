"""Mutations of the kernels' source, each of which a test of the kernels has to catch.

A mutation breaks a mask, a scale or a sign.  It is made in a copy of the checkout, where the tests
that belong to the kernel then have to fail.
"""

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("mask", "scale", "sign")


class Mutation(NamedTuple):
    """One change of a kernel's text, which must occur once in its file."""

    kind: str
    before: str
    after: str


class Kernel(NamedTuple):
    """A function of a file, and the tests that belong to it (an expression of pytest's ``-k``)."""

    file: str
    tests: str
    mutations: list[Mutation]


def mask(before: str, after: str) -> Mutation:
    return Mutation("mask", before, after)


def scale(before: str, after: str) -> Mutation:
    return Mutation("scale", before, after)


def sign(before: str, after: str) -> Mutation:
    return Mutation("sign", before, after)


KERNELS = {
    # ------------------------------------------------------------------------------ pointwise.py
    "tanh": Kernel(
        "pointwise.py",
        "test_pointwise_",
        [
            mask("tl.where(x < 0, -y, y)", "tl.where(x > 0, -y, y)"),
            scale("t = tl.exp(-2.0 * tl.abs(x))", "t = tl.exp(-tl.abs(x))"),
            sign("y = (1.0 - t) / (1.0 + t)", "y = (1.0 + t) / (1.0 + t)"),
        ],
    ),
    "log1p": Kernel(
        "pointwise.py",
        "test_pointwise_",
        [
            mask("u < 0.01, series", "u < 1.0, series"),
            mask("u < 0.01, series", "u < 0.0, series"),
            scale("u * (0.5 - u *", "u * (0.25 - u *"),
            scale("- u * 0.25", "- u * 25.0"),
            sign("u * (1.0 - u *", "u * (1.0 + u *"),
        ],
    ),
    "softplus": Kernel(
        "pointwise.py",
        "test_pointwise_",
        [
            mask("return tl.maximum(x, 0.0) +", "return x +"),
            scale("log1p(tl.exp(-tl.abs(x)))", "log1p(tl.exp(-0.5 * tl.abs(x)))"),
            sign("tl.maximum(x, 0.0) + log1p", "tl.maximum(x, 0.0) - log1p"),
        ],
    ),
    "logits": Kernel(
        "pointwise.py",
        "test_fold_against",
        [
            mask("if softcap is not None:  # a product", "if softcap is None:  # a product"),
            scale("z = a * scale", "z = a"),
            scale("z = softcap * tanh(", "z = tanh("),
            sign("z = a * scale", "z = -a * scale"),
        ],
    ),
    "slope": Kernel(
        "pointwise.py",
        "test_fold_against or test_keep_",
        [
            mask("return 1.0 - u * u", "return tl.where(z > 0.0, 1.0 - u * u, 1.0)"),
            scale("u = z * (1.0 / softcap)", "u = z"),
            sign("return 1.0 - u * u", "return 1.0 + u * u"),
        ],
    ),
    "row_shift": Kernel(
        "pointwise.py",
        "test_fold_settles or test_project_gives or test_project_against",
        [
            mask("top_N > first_N + limit", "top_N > first_N"),
            mask("tl.where(top_N > first_N + limit, top_N, first_N)", "first_N"),
            scale("first_N + limit", "first_N + 1.2 * limit"),
            sign("first_N + limit", "first_N - limit"),
        ],
    ),
    "kept": Kernel(
        "pointwise.py",
        "test_fold_against or test_keep_",
        [
            mask("return tl.where(scored, e, 0.0)", "return e"),
            mask("if softcap is not None:\n        e *=", "if softcap is None:\n        e *="),
            scale("e *= slope(z, softcap)", "e *= 2.0 * slope(z, softcap)"),
            sign("e *= slope(z, softcap)", "e *= -slope(z, softcap)"),
        ],
    ),
    # ----------------------------------------------------------------------------------- fold.py
    "places": Kernel(
        "fold.py",
        "test_fold_against or test_keep_ or test_cross_",
        [
            mask("row[:, None] & (c < C)[None, :]", "row[:, None] & (c >= 0)[None, :]"),
            scale("tl.program_id(0) * ROWS", "tl.program_id(0)"),
            sign("row = n < R", "row = n >= R"),
        ],
    ),
    "load_logits": Kernel(
        "fold.py",
        "test_fold_against",
        [
            mask("tl.where(inside, logits(a,", "tl.where(a == a, logits(a,"),
            mask("c, mask=c < C, other=0.0)", "c)"),
            mask("c[None, :], mask=inside, other=0.0)", "c[None, :])"),
            scale("a += tl.load(bias_ptr", "a += 2.0 * tl.load(bias_ptr"),
            sign("a += tl.load(bias_ptr", "a -= tl.load(bias_ptr"),
        ],
    ),
    "fold_kernel": Kernel(
        "fold.py",
        "test_fold_",
        [
            mask("    e = tl.where(own, 0.0, e)\n", ""),
            mask("row & (column >= 0) & (column < C)", "row & (column < C)"),
            mask("tl.where(inside, z, 0.0), 1)", "z, 1)"),
            mask("(column >= -first_column)[:, None]", "(column >= 0)[:, None]"),
            mask("(column >= -first_column)[:, None]", "row[:, None]"),
            mask(
                "tl.where(e > 0.0, e * (z - shift_N[:, None]), 0.0)", "e * (z - shift_N[:, None])"
            ),
            mask("tl.sum(e, 1), mask=row)", "tl.sum(e, 1))"),
            mask(
                "        tl.store(at, e.to(stash_ptr.dtype.element_ty), mask=inside)\n\n\n"
                "@triton.jit\ndef keep_kernel",
                "        tl.store(at, e.to(stash_ptr.dtype.element_ty), mask=row[:, None])\n\n\n"
                "@triton.jit\ndef keep_kernel",
            ),
            scale("tl.sum(e * e, 1)", "tl.sum(e, 1)"),
            scale(
                "    e = tl.exp(z - shift_N[:, None])\n", "    e = tl.exp2(z - shift_N[:, None])\n"
            ),
            scale("tl.max(z, 1), LOWEST)", "2.0 * tl.max(z, 1), LOWEST)"),
            sign("mask=row, other=-1) - first_column", "mask=row, other=-1) + first_column"),
            sign(
                "    e = tl.exp(z - shift_N[:, None])\n", "    e = tl.exp(shift_N[:, None] - z)\n"
            ),
            sign("e * (z - shift_N[:, None]), 0.0)", "e * (z + shift_N[:, None]), 0.0)"),
        ],
    ),
    "keep_kernel": Kernel(
        "fold.py",
        "test_keep_",
        [
            mask("scored = target >= 0\n        e =", "scored = row\n        e ="),
            mask("== (target - first_column)[:, None], 0.0, e)", "== target[:, None], 0.0, e)"),
            mask(
                "mask=inside)\n\n\n@triton.jit\ndef merge_kernel",
                "mask=row[:, None])\n\n\n@triton.jit\ndef merge_kernel",
            ),
            scale("e = tl.exp(z - tl.load(lse_ptr", "e = 2.0 * tl.exp(z - tl.load(lse_ptr"),
            scale("ref_e = tl.exp(ref_z", "ref_e = 2.0 * tl.exp(ref_z"),
            scale("e *= tl.load(own_share_ptr", "e *= 2.0 * tl.load(own_share_ptr"),
            mask("own_share_ptr + n, mask=row, other=0.0)", "own_share_ptr)"),
            mask("ref_share_ptr + n, mask=row, other=0.0)", "ref_share_ptr)"),
            sign("e += tl.load(ref_share_ptr", "e -= tl.load(ref_share_ptr"),
            sign("e = tl.exp(z - tl.load(lse_ptr", "e = tl.exp(z + tl.load(lse_ptr"),
        ],
    ),
    "merge_kernel": Kernel(
        "fold.py",
        "test_merge_ or test_fold_",
        [
            mask(
                "inside = (k < K)[:, None] & row[None, :]",
                "inside = (k >= 0)[:, None] & row[None, :]",
            ),
            mask("own = tl.where(scored, tl.exp(t - shift), 0.0)", "own = tl.exp(t - shift)"),
            mask("tl.where(scored, -softplus(against), 0.0)", "-softplus(against)"),
            mask("tl.where(scored & (t >= top), 1.0, 0.0)", "tl.where(t >= top, 1.0, 0.0)"),
            mask("tl.where(scored, mean / V, 0.0)", "mean / V"),
            mask("tl.where(own > 0.0, own * (t - shift), 0.0)", "own * (t - shift)"),
            mask("tl.where(scored, miss, 0.0)", "miss"),
            mask("moved = row & (lowest < shift)", "moved = row & (lowest > shift)"),
            mask("if softcap is not None:\n        miss", "if softcap is None:\n        miss"),
            mask(
                "inside = moved[:, None] & (v < V)[None, :]",
                "inside = moved[:, None] & (v < V + 1)[None, :]",
            ),
            scale("tile = (v // width)", "tile = (v // BLOCK_V)"),
            scale(
                "* tl.exp(s - shift[:, None])\n                tl.store",
                "* 2.0 * tl.exp(s - shift[:, None])\n                tl.store",
            ),
            sign(
                "* tl.exp(s - shift[:, None])\n                tl.store",
                "* tl.exp(shift[:, None] - s)\n                tl.store",
            ),
            scale("miss *= slope(t, softcap)", "miss *= 2.0 * slope(t, softcap)"),
            scale("mean / V", "mean"),
            scale("squares * down * down", "squares * down"),
            scale("q * factor * factor", "q * factor"),
            scale("2.0 * tl.log(total)", "tl.log(total)"),
            scale("rest = rest * down +", "rest = rest +"),
            scale("entropy = down * (entropy", "entropy = (entropy"),
            sign("down = tl.exp(shift - shift_new)", "down = tl.exp(shift_new - shift)"),
            sign("(shift - t) + tl.log(rest)", "(shift + t) + tl.log(rest)"),
            sign("tl.log(total) - entropy / total", "tl.log(total) + entropy / total"),
            sign("own * (t - shift), 0.0)", "own * (shift - t), 0.0)"),
            sign("tl.exp(-against)", "tl.exp(against)"),
            sign("lse = shift + tl.log(total)", "lse = shift - tl.log(total)"),
        ],
    ),
    # ------------------------------------------------------------------------------------- kl.py
    "cross_kernel": Kernel(
        "kl.py",
        "test_cross_",
        [
            mask("tl.where(e > 0.0, e * (ref_z - z), 0.0)", "e * (ref_z - z)"),
            mask(
                "e * (ref_z - z), 0.0), 1), mask=row)",
                "e * (ref_z - z), 0.0), 1))",
            ),
            scale(
                "e = tl.exp(ref_z - tl.load(ref_shift", "e = 2.0 * tl.exp(ref_z - tl.load(ref_shift"
            ),
            sign("e * (ref_z - z)", "e * (z - ref_z)"),
            sign("tl.exp(ref_z - tl.load(ref_shift", "tl.exp(ref_z + tl.load(ref_shift"),
            mask("kept(tl.where(own, 0.0, e), z", "kept(e, z"),
            mask("z, (target >= 0)[:, None], softcap)", "z, row[:, None], softcap)"),
            scale("kept(tl.where(own, 0.0, e), z", "kept(tl.where(own, 0.0, e), ref_z"),
            mask(
                "mask=inside)\n\n\n@triton.jit\ndef mix_kernel",
                "mask=row[:, None])\n\n\n@triton.jit\ndef mix_kernel",
            ),
        ],
    ),
    "mix_kernel": Kernel(
        "kl.py",
        "test_mix_",
        [
            mask("inside = v < V", "inside = v < V + 1"),
            mask(
                "ref_ptr + n * ref_stride + v, mask=inside", "ref_ptr + n * ref_stride, mask=inside"
            ),
            scale("* tl.load(own_ptr + n)", ""),
            scale("tl.load(ref_share_ptr + n)", "tl.load(ref_share_ptr)"),
            sign("e += ref_e *", "e -= ref_e *"),
        ],
    ),
    # -------------------------------------------------------------------------------- project.py
    "half_logits": Kernel(
        "project.py",
        "test_project_",
        [
            mask("(c < V)[None, :], logits", "(c >= 0)[None, :], logits"),
            mask("first_v + c, mask=c < V, other=0.0)", "first_v + c)"),
            scale("bias_ptr + first_v + c", "bias_ptr + c"),
            sign("a += tl.load(bias_ptr", "a -= tl.load(bias_ptr"),
        ],
    ),
    "shift_kernel": Kernel(
        "project.py",
        "test_shifts_",
        [
            mask("LOWEST), mask=n < N)", "LOWEST))"),
            mask("tl.maximum(tl.max(z, 1), LOWEST)", "tl.max(z, 1)"),
            scale(
                "acc = tl.dot(h_desc.load([m0, k * BLOCK_K])", "acc = tl.dot(h_desc.load([m0, 0])"
            ),
            scale("w_desc.load([0, k * BLOCK_K]).T", "w_desc.load([BLOCK_V, k * BLOCK_K]).T"),
            scale("c = tl.arange(0, BLOCK_V) * step", "c = tl.arange(0, BLOCK_V)"),
            sign("tl.maximum(tl.max(z, 1), LOWEST)", "tl.maximum(-tl.min(z, 1), LOWEST)"),
        ],
    ),
    "fold_half": Kernel(
        "project.py",
        "test_project_",
        [
            mask("    e = tl.where(own, 0.0, e)\n", ""),
            mask("tl.where((c < left)[None, :], z, 0.0)", "z"),
            mask("tl.where(e > 0.0, e * (z - shift_N[:, None]), 0.0)", "e"),
            scale("tl.sum(e * e, 1)", "tl.sum(e, 1)"),
            scale("e = tl.exp(z - shift_N[:, None])", "e = tl.exp2(z - shift_N[:, None])"),
            scale("stash_desc.store([m0, v0], e.to(", "stash_desc.store([m0, v0], 2.0 * e.to("),
            sign("rest_N = tl.sum(e, 1)", "rest_N = -tl.sum(e, 1)"),
            sign("e * (z - shift_N[:, None]), 0.0)", "e * (z + shift_N[:, None]), 0.0)"),
            sign("own_z_N = tl.sum(", "own_z_N = -tl.sum("),
        ],
    ),
    "project_tile": Kernel(
        "project.py",
        "test_project_",
        [
            mask("scored = (target >= 0)[:, None]", "scored = row[:, None]"),
            mask("(own_c >= 0) & (own_c < V - v0)", "row & (own_c < V - v0)"),
            mask("& (own_c < BLOCK_V)", ""),
            mask(
                "e1 = tl.where(c1[None, :] == own_c[:, None]",
                "e1 = tl.where(c0[None, :] == own_c[:, None]",
            ),
            mask("rest0 + rest1, mask=row)", "rest0 + rest1)"),
            mask("mean0 + mean1, mask=row)", "mean0 + mean1)"),
            mask("squares0 + squares1, mask=row)", "squares0)"),
            mask("entropy0 + entropy1, mask=row)", "entropy0)"),
            mask("group_m = tl.minimum(tl.cdiv(N, BLOCK_M) - first_m, GROUP)", "group_m = GROUP"),
            scale("c1 = HALF + tl.arange(0, HALF)", "c1 = tl.arange(0, HALF)"),
            scale("h = h_desc.load([m0, k * BLOCK_K])", "h = h_desc.load([m0, 0])"),
            scale("w_desc.load([first_column + v0,", "w_desc.load([v0,"),
            scale(
                "e0 = tl.where(c0[None, :] == own_c[:, None], 0.0, tl.exp(",
                "e0 = tl.where(c0[None, :] == own_c[:, None], 0.0, tl.exp2(",
            ),
            scale("stash_desc.store([m0, v0 + HALF], e1", "stash_desc.store([m0, v0], e1"),
            scale("stash_desc, m0, v0 + HALF, scored", "stash_desc, m0, v0, scored"),
            scale("tl.store(top_ptr + at, top_N", "tl.store(top_ptr + at, 2.0 * top_N"),
            sign("acc = tl.dot(h, w.T, acc)", "acc = tl.dot(h, w.T, -acc)"),
            sign("target - first_column - v0", "target + first_column - v0"),
            sign("tl.max(z0, 1), tl.max(z1, 1))", "tl.max(z0, 1), -tl.min(z1, 1))"),
        ],
    ),
    "project_kernel": Kernel(
        "project.py",
        "test_project_",
        [
            mask(
                "tl.range(tl.program_id(0), units, tl.num_programs(0), flatten=True)",
                "tl.range(tl.program_id(0), units - 1, tl.num_programs(0), flatten=True)",
            ),
            scale(
                "tl.range(tl.program_id(0), units, tl.num_programs(0), flatten=True)",
                "tl.range(tl.program_id(0), units, 2 * tl.num_programs(0), flatten=True)",
            ),
            sign("unit = tl.program_id(0)", "unit = tl.num_programs(0) - tl.program_id(0)"),
        ],
    ),
    # -------------------------------------------------------------------------------- scatter.py
    "scaled": Kernel(
        "scatter.py",
        "test_row_sums_ or test_scaled_rows",
        [
            mask(
                "tl.where(scale == 0.0, 0.0, x.to(tl.float32) * scale)", "x.to(tl.float32) * scale"
            ),
            scale("x.to(tl.float32) * scale)", "x.to(tl.float32))"),
            sign("x.to(tl.float32) * scale)", "-x.to(tl.float32) * scale)"),
        ],
    ),
    "order_kernel": Kernel(
        "scatter.py",
        "test_order_",
        [
            mask("same = (m < N)[None, :] & (other == own)", "same = other == own"),
            mask("mask=(before == 0) & (index >= 0))", "mask=before == 0)"),
            mask("tl.store(order_ptr + place, n, mask=inside)", "tl.store(order_ptr + place, n)"),
            mask("(m < N)[None, :] & (other < own) | earlier", "(other < own) | earlier"),
            scale("tl.store(size_ptr + place, size", "tl.store(size_ptr + place, before"),
            sign("m[None, :] < n[:, None]", "m[None, :] > n[:, None]"),
            sign("(other < own) | earlier", "(other > own) | earlier"),
        ],
    ),
    "row_sums_kernel": Kernel(
        "scatter.py",
        "test_row_sums_",
        [
            mask("token = j < last", "token = j < last + 1"),
            mask("known = (first >= 0) & (first < N)", "known = first < N"),
            mask("known = (first >= 0) & (first < N)", "known = first >= 0"),
            mask("mask=known, other=-1) == offset + i", "mask=known, other=-1) >= 0"),
            mask("        if ACCUMULATE and base_ptr is None:", "        if ACCUMULATE:"),
            scale("n = n.to(tl.int64)", "n = n.to(tl.int32)"),
            scale("tl.load(start_ptr + offset + i)", "tl.load(start_ptr + i)"),
            mask(
                "tile = token[:, None] & column[None, :]", "tile = token[:, None] & (column | True)"
            ),
            mask("element_ty), mask=column)", "element_ty))"),
            mask(
                "row = tl.maximum(tl.load(b_index_ptr + n, mask=token, other=0), 0)",
                "row = tl.load(b_index_ptr + n, mask=token, other=0)",
            ),
            mask("if ACCUMULATE:", "if not ACCUMULATE:"),
            scale("scale = token.to(tl.float32)", "scale = 2.0 * token.to(tl.float32)"),
            scale("base *= tl.load(base_factor_ptr)", "base /= tl.load(base_factor_ptr)"),
            scale("scale = tl.load(b_scale_ptr + n,", "scale = tl.load(b_scale_ptr + i + 0 * n,"),
            sign("total += base", "total -= base"),
            sign("total += tl.sum(scaled(a,", "total -= tl.sum(scaled(a,"),
            sign("total += tl.sum(scaled(b,", "total -= tl.sum(scaled(b,"),
            sign("total += tl.load(at,", "total -= tl.load(at,"),
        ],
    ),
    "scale_rows_kernel": Kernel(
        "scatter.py",
        "test_scaled_rows",
        [
            mask("element_ty), mask=d < D)", "element_ty))"),
            mask("x_stride + d, mask=d < D, other=0.0)", "x_stride + d)"),
            scale(
                "tl.load(scale_ptr + n) / tl.load(gain_ptr)",
                "tl.load(scale_ptr + n) * tl.load(gain_ptr)",
            ),
            sign("scaled(x, tl.load(scale_ptr + n)", "scaled(x, -tl.load(scale_ptr + n)"),
        ],
    ),
    "factors_kernel": Kernel(
        "scatter.py",
        "test_factors_",
        [
            mask(
                "tl.load(target_ptr + n) < 0, 0.0, coef)",
                "tl.load(target_ptr + n) < -200, 0.0, coef)",
            ),
            mask("tl.where(coef == 0.0, 0.0, row * down)", "row * down"),
            mask("x.to(out_ptr.dtype.element_ty), mask=inside)", "x.to(out_ptr.dtype.element_ty))"),
            scale("coef *= tl.load(upstream_ptr)", "coef += tl.load(upstream_ptr)"),
            scale("0.0, coef) * scale", "0.0, coef)"),
            scale("other=0.0), row)", "other=0.0), coef)"),
            sign("row = -coef", "row = coef"),
            sign(
                "tl.load(shift_ptr + n) - tl.load(lse_ptr + n)",
                "tl.load(lse_ptr + n) - tl.load(shift_ptr + n)",
            ),
        ],
    ),
    "gather_kernel": Kernel(
        "scatter.py",
        "test_gathered",
        [
            mask("inside = (d < D) & valid", "inside = (d < D - 1) & valid"),
            scale("x_ptr + row * x_stride", "x_ptr + n * x_stride"),
            sign("row = tl.load(rows_ptr + n)", "row = T - 1 - tl.load(rows_ptr + n)"),
        ],
    ),
    "column_sums_kernel": Kernel(
        "scatter.py",
        "test_column_sums",
        [
            mask(
                "tile = (n < N)[:, None] & (v < V)[None, :]",
                "tile = (n >= 0)[:, None] & (v < V)[None, :]",
            ),
            mask("tl.store(out_ptr + v, total, mask=v < V)", "tl.store(out_ptr + v, total)"),
            scale(
                "scale_ptr + n, mask=n < N, other=0.0)",
                "scale_ptr + n - n0, mask=n < N, other=0.0)",
            ),
            sign("    total += tl.load(out_ptr + v", "    total -= tl.load(out_ptr + v"),
            sign(
                "total += tl.sum(scaled(x, scale[:, None]), 0)\n    total",
                "total -= tl.sum(scaled(x, scale[:, None]), 0)\n    total",
            ),
        ],
    ),
    # ----------------------------------------------------------------------------------- pair.py
    "pair_functions": Kernel(
        "pair.py",
        "test_pair_",
        [
            mask("u < 1e-4, series", "u < 1.0, series"),
            mask("u < 1e-4, series", "u < 0.0, series"),
            mask("x >= 0, 1.0 / (1.0 + e)", "x <= 0, 1.0 / (1.0 + e)"),
            mask(
                "slope = tl.where(z < 1.0, -1.0, 0.0 * z)",
                "slope = tl.where(z < 0.0, -1.0, 0.0 * z)",
            ),
            mask("inside = n < stop\n        total", "inside = n < stop + 1\n        total"),
            mask(
                "(tl.load(target_ptr + n, mask=inside, other=-1) >= 0).to(tl.int64)",
                "inside.to(tl.int64)",
            ),
            scale("(total / P).to(tl.float32)", "total.to(tl.float32)"),
            mask("scored = tl.load(target_ptr + n, mask=inside, other=-1) >= 0", "scored = inside"),
            scale("slope = 2.0 * (z - 0.5)", "slope = (z - 0.5)"),
            scale("slope_w = -a * (1.0 - a)", "slope_w = -a"),
            sign("slope = -_sigmoid(-z)", "slope = _sigmoid(-z)"),
            sign("value = _softplus(-z)", "value = _softplus(z)"),
            sign("slope_l = b * (1.0 - b)", "slope_l = -b * (1.0 - b)"),
            mask("if KIND == 0 or KIND == 6:", "if KIND == 0:"),
            scale("share = z / parameter", "share = z"),
            scale("grown = tl.exp(-z - _softplus(-share))", "grown = tl.exp(-z)"),
            scale("value * _sigmoid(share)) / parameter", "value * _sigmoid(share))"),
            sign("grown * logistic - value *", "grown * logistic + value *"),
            sign("slope -= grown + logistic", "slope -= logistic - grown"),
            scale("log_right = tl.log(1.0 - eps)", "log_right = tl.log(1.0 + eps)"),
            sign("(z - (log_right - log_flipped))", "(z + (log_right - log_flipped))"),
            sign("value = _softplus(-w) + _softplus(l)", "value = _softplus(-w) - _softplus(l)"),
            scale("slope_w = -_sigmoid(-w)", "slope_w = -0.5 * _sigmoid(-w)"),
            sign("off_l = (l + 0.5) / beta", "off_l = (l - 0.5) / beta"),
            scale("slope_w = 2.0 * off_w / beta", "slope_w = 2.0 * off_w"),
            sign("b = _sigmoid(l - w)", "b = _sigmoid(w - l)"),
            sign("slope_w = a * _sigmoid(-w) - slope_l", "slope_w = a * _sigmoid(-w) + slope_l"),
            scale("share = -eps / (1.0 - 2.0 * eps)", "share = -eps"),
            mask("if SMOOTHED:", "if not SMOOTHED:"),
            scale("return zero + high + low", "return zero + high"),
        ],
    ),
    "pair_kernel": Kernel(
        "pair.py",
        "test_pair_",
        [
            mask("(ratio_w > ratio_l)", "(ratio_w > 0.0)"),
            mask("if MEAN_REWARDS:", "if not MEAN_REWARDS:"),
            mask("if NORMALIZED:", "if not NORMALIZED:"),
            scale("beta = zero + beta_high + beta_low", "beta = zero + beta_high"),
            scale("alpha = zero + alpha_high + alpha_low", "alpha = zero + alpha_high"),
            scale(
                "num_pairs = zero + num_pairs_high + num_pairs_low",
                "num_pairs = zero + num_pairs_high",
            ),
            scale("factor *= tl.load(weight_ptr + p)", "factor = tl.load(weight_ptr + p)"),
            scale("slope_l *= share_l", "slope_l *= 2.0 * share_l"),
            scale("share_l = beta / count_l", "share_l = beta / count_w"),
            scale("z += tl.load(margin_ptr + p)", "z += 2.0 * tl.load(margin_ptr + p)"),
            sign("- share_l * scored_l + alpha", "+ share_l * scored_l + alpha"),
            sign(
                "alpha * (count_w - count_l)\n            if",
                "alpha * (count_l - count_w)\n            if",
            ),
            sign("(1.0 - share) * slope - share", "(1.0 - share) * slope + share"),
            scale("eps += own - 2.0 * flip * own", "eps += own"),
            scale("lw.to(tl.float64) - scale * rw", "lw.to(tl.float64) - rw"),
            sign("z -= target", "z += target"),
            sign("slope_l = -slope * share_l", "slope_l = slope * share_l"),
            sign("chosen - rejected, P)", "chosen + rejected, P)"),
            sign("alpha * (tokens_w - tokens_l)", "alpha * (tokens_w + tokens_l)"),
            sign("(ratio_w > ratio_l)", "(ratio_w < ratio_l)"),
        ],
    ),
    "sums_kernel": Kernel(
        "pair.py",
        "test_sums_",
        [
            mask("stop = tl.load(bounds_ptr + s + 1)", "stop = tl.load(bounds_ptr + s + 1) - 1"),
            scale("gaps / length.to(tl.float64)", "gaps"),
            sign("ref = tl.load(ref_ptr + s).to(tl.float64)", "ref = -tl.load(ref_ptr + s)"),
            sign("logp_sum_ptr + s, total.to", "logp_sum_ptr + s, -total.to"),
        ],
    ),
}
MUTATIONS = [
    pytest.param(kernel, mutation, id=f"{name}-{mutation.kind}-{i}")
    for name, kernel in KERNELS.items()
    for i, mutation in enumerate(kernel.mutations)
]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the tests of the kernels need."""
    for name in ("fastdpo", "kernels", "tests"):
        source, copy = ROOT / name, tmp_path / name
        shutil.copytree(
            source, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "test_[!k]*")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert (tmp_path / "fastdpo" / "kernels").resolve() == tmp_path / "kernels"
    return tmp_path


def run_tests(checkout: Path, tests: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "tests/kernels/test_kernels.py", "-k", tests],
        cwd=checkout,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_every_kernel_has_a_mutation_of_each_kind():
    defined = set()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        lines = path.read_text().splitlines()
        defined |= {
            (path.name, line.removeprefix("def ").split("(")[0])
            for before, line in pairwise(lines)
            if before == "@triton.jit"
        }
    private = {("pair.py", name) for _, name in defined if name.startswith("_")}
    named = {(kernel.file, name) for name, kernel in KERNELS.items()} - {
        ("pair.py", "pair_functions")
    }
    assert named == defined - private
    for kernel in KERNELS.values():
        assert {mutation.kind for mutation in kernel.mutations} == set(KINDS)
        text = (ROOT / "kernels" / kernel.file).read_text()
        for mutation in kernel.mutations:
            assert text.count(mutation.before) == 1, f"{mutation.before!r} must occur once"


@pytest.mark.slow
def test_the_copy_without_a_mutation_passes(checkout):
    result = run_tests(checkout, "not test_op_")
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "mutation"), MUTATIONS)
def test_mutation_is_caught(kernel, mutation, checkout):
    path = checkout / "kernels" / kernel.file
    text = path.read_text()
    path.write_text(text.replace(mutation.before, mutation.after))
    result = run_tests(checkout, kernel.tests)
    # 1: tests ran and failed; a syntax error or an empty selection has another code
    assert result.returncode == 1, f"survived:\n{result.stdout[-2000:]}"
