"""Errors first, then time, all variants interleaved; one row (a dict) a variant and pass.

Errors are against fp64 on the inputs as rounded to the tested dtype. A variant that is off by more
than `LOSS_LIMIT` or `GRADIENT_LIMIT` gets a row that says so, and no time.
"""

from __future__ import annotations

import platform
import random
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from fastdpo import reference

from .peak import ROOT, cuda_peak_mib, peaks_mib
from .variants import (
    FORWARD,
    MATMULS,
    PASSES,
    WITH_REFERENCE,
    Out,
    Problem,
    Shape,
    Variant,
    floor_step,
    from_padded,
    make_problem,
    pair_loss,
    step,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOSS_LIMIT = 0.05  # relative
GRADIENT_LIMIT = 0.2  # relative, Frobenius norm
SLOW_MS = 10_000.0
GOLD_BYTES = 64 * 2**20  # an fp64 tile of the oracle's logits


@dataclass
class Gold:
    """What a variant should have given, in fp64."""

    loss: Tensor
    logp_N: Tensor
    logp_S: Tensor
    dh_ND: Tensor
    dw_VD: Tensor


def fp64_gold(problem: Problem, pass_: str) -> Gold:
    """The oracle, a few rows at a time: log-probs, the loss's slope in each of them, gradients."""
    N, _, V, pairs = problem.shape
    rows = max(1, GOLD_BYTES // (8 * V))
    h, w = problem.h_ND.detach().double(), problem.w_VD.detach().double()
    target = problem.target_N

    def token_logp(hidden: Tensor) -> Tensor:
        parts = zip(hidden.split(rows), target.split(rows))
        return torch.cat([reference.linear_logp(x, w, y) for x, y in parts])

    def sums(logp_N: Tensor) -> Tensor:
        return logp_N.view(2 * pairs, -1).sum(1)

    ref_logp_S = problem.ref_logp_S.double()
    if pass_ == WITH_REFERENCE:
        ref_logp_S = sums(token_logp(problem.ref_h_ND.double()))
    logp_N = token_logp(h).requires_grad_()
    loss = pair_loss(sums(logp_N), ref_logp_S, problem.beta)
    (slope_N,) = torch.autograd.grad(loss, logp_N)

    w.requires_grad_()
    dh, dw = torch.empty_like(h), torch.zeros_like(w)
    for n in range(0, N, rows):
        part = slice(n, n + rows)
        x = h[part].detach().requires_grad_()
        logp = reference.linear_logp(x, w, target[part])
        dh[part], dw_part = torch.autograd.grad(logp, (x, w), slope_N[part])
        dw += dw_part
    logp_N = logp_N.detach()
    return Gold(loss.detach(), logp_N, sums(logp_N), dh, dw)


def relative(x: Tensor, gold: Tensor) -> float:
    return ((x.double() - gold).norm() / gold.norm()).item()


def errors(variant: Variant, problem: Problem, pass_: str, gold: Gold) -> tuple[Out, dict]:
    """One checked call and its errors; what a variant or a pass doesn't give is None."""
    out, dh, dw = step(variant, problem, pass_)
    logp_N = None
    if variant.token_logp is not None:
        with torch.no_grad():
            logp_N = variant.token_logp(problem.h_ND, problem.w_VD, problem.target_N)
    if dh is not None and variant.padded:
        dh = from_padded(dh, problem.shape.pairs)
    return out, {
        "loss_rel_err": relative(out.loss.detach(), gold.loss),
        "logp_max_err": None if logp_N is None else (logp_N - gold.logp_N).abs().max().item(),
        "logp_sum_max_err": (out.logp_S.double() - gold.logp_S).abs().max().item(),
        "dh_rel_err": None if dh is None else relative(dh, gold.dh_ND),
        "dw_rel_err": None if dw is None else relative(dw, gold.dw_VD),
    }


def refusal(found: dict) -> str | None:
    """Why a variant with these errors is not timed. NaN is never within a limit."""
    limits = {
        "loss_rel_err": LOSS_LIMIT,
        "dh_rel_err": GRADIENT_LIMIT,
        "dw_rel_err": GRADIENT_LIMIT,
    }
    for name, limit in limits.items():
        if found[name] is not None and not found[name] <= limit:
            return f"wrong: {name} {found[name]:.2g} is over {limit}"
    return None


def timed_ms(call: Callable[[], object], device: torch.device) -> float:
    """One call; on a GPU by events, so that a queue of launches isn't counted as work."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def interleaved_ms(
    calls: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Warm each up, then every round runs all of them once, in a new order.

    One whose warm-up takes over `SLOW_MS` is in the first round only, so it holds up no run.
    """
    slow = {name for name, call in calls.items() if timed_ms(call, device) > SLOW_MS}
    times = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            if name not in slow or not times[name]:
                times[name].append(timed_ms(calls[name], device))
    return {name: summary(samples) for name, samples in times.items()}


def summary(samples: list[float]) -> dict[str, float]:
    x = torch.tensor(samples, dtype=torch.float64)
    points = x.quantile(torch.tensor([0.5, 0.0, 0.2, 0.8], dtype=torch.float64)).tolist()
    named = zip(("median", "min", "p20", "p80"), points)
    return {**{name: round(p, 4) for name, p in named}, "samples": len(samples)}


def run(
    shape: Shape,
    dtype_name: str,
    variants: Iterable[Variant],
    *,
    passes: Iterable[str] = PASSES,
    rounds: int = 7,
    memory: bool = True,
    device: torch.device | str = "cpu",
) -> Iterator[dict]:
    """Rows of one shape and dtype."""
    device, dtype, variants = torch.device(device), DTYPES[dtype_name], list(variants)
    common = {**where(device), "op": "dpo_loss", **shape._asdict(), "dtype": dtype_name}
    peaks = {}
    if memory and device.type == "cpu":
        for variant in variants:
            if variant.loss is not None:
                threads = torch.get_num_threads()
                peaks[variant.name] = peaks_mib(variant, shape, dtype, tuple(passes), threads)
    problem = make_problem(shape, dtype, device)
    for pass_ in passes:
        todo = [variant for variant in variants if pass_ in variant.passes]
        rows, calls = check_all(todo, problem, pass_)
        for variant in todo:
            row = rows[variant.name]
            if memory and variant.name in calls and variant.loss is not None:
                row["peak_mib"] = (
                    cuda_peak_mib(variant, problem, pass_)
                    if device.type == "cuda"
                    else peaks[variant.name].get(pass_)
                )
        times = interleaved_ms(calls, rounds, device)
        floor = next((times[v.name]["median"] for v in todo if v.loss is None), None)
        for variant in todo:
            row = rows[variant.name]
            if variant.name in times:
                row["time_ms"] = times[variant.name]
                row["x_floor"] = row["time_ms"]["median"] / floor if floor else None
            yield {**common, **row, "rounds": rounds}


def check_all(
    variants: list[Variant], problem: Problem, pass_: str
) -> tuple[dict[str, dict], dict[str, Callable[[], object]]]:
    """A row for each variant, and a call for each that may be timed."""
    gold = fp64_gold(problem, pass_)
    rows, calls = {}, {}
    for variant in variants:
        row = rows[variant.name] = blank_row(variant, pass_)
        if variant.loss is None:
            calls[variant.name] = floor_step(problem, pass_)
            row["route"] = f"{MATMULS[pass_]} matmuls"
            continue
        # A peer that can't run here is a result, not an error of the benchmark.
        try:
            out, found = errors(variant, problem, pass_, gold)
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[0]
            row["note"] = f"{type(error).__name__}: {reason}"
            continue
        row.update(found, route=out.route, note=refusal(found))
        row["workspace_mib"] = mib(out.workspace_bytes)
        # Where there is no backward there is nothing to accumulate.
        row["accumulators_mib"] = 0.0 if pass_ == FORWARD else mib(out.accumulator_bytes)
        if row["note"] is None:
            calls[variant.name] = lambda variant=variant: step(variant, problem, pass_)
    return rows, calls


def blank_row(variant: Variant, pass_: str) -> dict:
    unknown = dict.fromkeys(
        (
            "time_ms",
            "x_floor",
            "peak_mib",
            "workspace_mib",
            "accumulators_mib",
            "route",
            "loss_rel_err",
            "logp_max_err",
            "logp_sum_max_err",
            "dh_rel_err",
            "dw_rel_err",
            "note",
        )
    )
    kind = "floor" if variant.loss is None else "fastdpo" if variant.ours else "peer"
    return {"variant": variant.name, "kind": kind, "pass": pass_, **unknown}


def mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def where(device: torch.device) -> dict:
    """The machine, the versions, the commit and the time of a run."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{
                name: installed(name)
                for name in (
                    "torch",
                    "triton",
                    "transformers",
                    "trl",
                    "liger-kernel",
                    "cut-cross-entropy",
                )
            },
        },
        "git": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "fastdpo", "kernels", "bench/*.py")),
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """None outside a repository, or without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
