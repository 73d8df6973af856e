"""Errors first, then time, all variants interleaved; one row (a dict) a variant and pass.

Errors are against fp64 on the inputs as rounded to the tested dtype (`bench.oracle`). A variant
that is off by more than `LOSS_LIMIT` or `GRADIENT_LIMIT` gets a row that says so, and no time. So
does one that fails or runs out of memory, at any stage. One that breaks the device ends the run.

The errors of the bare matmuls' row are what is asked of the others: log-probs from a matmul with an
fp32 result, and the exact gradients rounded to the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import product

import torch
from torch import Tensor

from .oracle import Gold, Oracle, plain_logp
from .peak import cuda_peak_mib, peaks_mib
from .rows import where
from .turns import (
    OUT_OF_MEMORY,
    DeviceBroken,
    attempt,
    each,
    interleaved_ms,
    is_out_of_memory,
    release,
)
from .variants import (
    FORWARD,
    MATMULS,
    PASSES,
    Out,
    Problem,
    Shape,
    Variant,
    beta_of,
    floor_step,
    from_padded,
    make_problem,
    step,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOSS_LIMIT = 0.05  # relative
GRADIENT_LIMIT = 0.2  # relative, Frobenius norm


def relative(x: Tensor, gold: Tensor) -> float:
    """Error in the Frobenius norm, a part at a time: an fp64 copy of a head is large."""
    error = size = torch.zeros((), dtype=torch.float64, device=gold.device)
    for a, b in zip(x.reshape(-1).split(2**24), gold.reshape(-1).split(2**24)):
        error = error + (a.double() - b).square().sum()
        size = size + b.square().sum()
    return (error / size).sqrt().item()


def max_error(x: Tensor, gold: Tensor) -> float:
    return (x.double() - gold).abs().max().item()


def errors(variant: Variant, problem: Problem, pass_: str, gold: Gold) -> tuple[Out, dict]:
    """One checked call and its errors; what a variant or a pass doesn't give is None."""
    logp_N = None
    if variant.token_logp is not None:
        inputs = problem.h_ND, problem.w_VD, problem.target_N
        with torch.no_grad():
            logp_N = variant.token_logp(*inputs, problem.shape.softcap)
    out, dh, dw = step(variant, problem, pass_)
    grads_bytes = sum(x.nbytes for x in (dh, dw) if x is not None)
    if dh is not None and variant.padded:
        dh = from_padded(dh, problem.shape.pairs)
    return out, {
        "loss_rel_err": relative(out.loss.detach(), gold.loss),
        "logp_max_err": None if logp_N is None else max_error(logp_N[gold.tokens], gold.logp_N),
        "logp_sum_max_err": max_error(out.logp_S, gold.logp_S),
        "dh_rel_err": gradient_error(dh, gold.tokens, gold.dh_ND),
        "dw_rel_err": gradient_error(dw, gold.vocab, gold.dw_VD),
        "grads_mib": mib(grads_bytes),
    }


def gradient_error(x: Tensor | None, rows: Tensor | slice, gold: Tensor | None) -> float | None:
    return None if x is None or gold is None else relative(x[rows], gold)


def floor_errors(problem: Problem, gold: Gold) -> dict:
    """What no 16-bit result can beat by much: see the file's docstring."""
    dtype = problem.h_ND.dtype

    def rounding(x: Tensor | None) -> float | None:
        return None if x is None else relative(x.to(dtype), x)

    return {
        "logp_max_err": max_error(plain_logp(problem, gold.tokens), gold.logp_N),
        "dh_rel_err": rounding(gold.dh_ND),
        "dw_rel_err": rounding(gold.dw_VD),
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


def run(
    shape: Shape,
    dtype_name: str,
    variants: Iterable[Variant],
    *,
    passes: Iterable[str] = PASSES,
    rounds: int = 7,
    memory: bool = True,
    device: torch.device | str = "cpu",
    leave_out: Collection[tuple[str, str]] = (),
    commit: str | None = None,
) -> Iterator[dict]:
    """Rows of one shape and dtype; `leave_out` has (pass, variant's name).

    Raises:
        DeviceBroken: after the row of the variant that did it.
    """
    place, dtype = torch.device(device), DTYPES[dtype_name]
    variants, passes = list(variants), list(passes)
    common = {**where(place, commit), "op": "dpo_loss", **shape._asdict(), "dtype": dtype_name}
    common |= {"beta": beta_of(shape), "rounds": rounds}
    if place.index is not None:  # the allocator's books and the events are the current device's
        torch.cuda.set_device(place)
    problem = inputs(shape, dtype, place)
    if problem is None:
        for variant, pass_ in product(variants, passes):
            if pass_ in variant.passes:
                note = f"the inputs alone: {OUT_OF_MEMORY}"
                yield {**common, **blank_row(variant, pass_), "note": note}
        return
    peaks = {}
    if memory and place.type == "cpu":
        job = shape, dtype, tuple(passes), torch.get_num_threads()
        peaks = {v.name: peaks_mib(v, *job) for v in variants if v.loss is not None}

    def peak_mib(variant: Variant, pass_: str) -> float | None:
        if not memory or variant.loss is None:
            return None
        if place.type == "cuda":
            return cuda_peak_mib(variant, problem, pass_)
        return peaks[variant.name].get(pass_)

    oracle = Oracle(problem)
    for pass_ in passes:
        todo = [v for v in variants if pass_ in v.passes and (pass_, v.name) not in leave_out]
        if any(variant.compiled for variant in todo):
            torch.compiler.reset()
        try:
            for row in measured(todo, problem, oracle, pass_, peak_mib, rounds):
                yield {**common, **row}
        except DeviceBroken as broken:
            yield {**common, **broken.row}
            raise
        release()


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem | None:
    """None where there is no room for them."""
    try:
        return make_problem(shape, dtype, device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release()
    return None


def measured(
    variants: list[Variant],
    problem: Problem,
    oracle: Oracle,
    pass_: str,
    peak_mib: Callable[[Variant, str], float | None],
    rounds: int,
) -> list[dict]:
    """Rows of one pass: every variant is checked, then weighed, then all are timed."""
    release()
    by_name = {variant.name: variant for variant in variants}
    rows = {variant.name: blank_row(variant, pass_) for variant in variants}
    failed: dict = {"variant": "fp64 check", "pass": pass_, "note": None}
    gold = attempt(failed, lambda: oracle.gold(pass_))
    if gold is None:
        return [{**row, "note": f"not checked: {failed['note']}"} for row in rows.values()]
    calls = dict(each(rows, lambda x: checked(rows[x], by_name[x], problem, pass_, gold)))
    release()
    for name, peak in each(rows, lambda x: peak_mib(by_name[x], pass_)):
        rows[name]["peak_mib"] = peak
    times = interleaved_ms(rows, calls, rounds, problem.h_ND.device)
    floor = next((times[v.name]["median"] for v in variants if not v.loss and v.name in times), 0)
    for name, time_ms in times.items():
        rows[name]["time_ms"] = time_ms
        rows[name]["x_floor"] = time_ms["median"] / floor if floor else None
    return list(rows.values())


def checked(
    row: dict, variant: Variant, problem: Problem, pass_: str, gold: Gold
) -> Callable[[], object]:
    """Fill in the errors and what is known of the memory; the call to be timed."""
    row["checked_tokens"] = gold.logp_N.shape[0]
    row["checked_vocab"] = None if gold.dw_VD is None else gold.dw_VD.shape[0]
    if variant.loss is None:
        row.update(floor_errors(problem, gold), route=f"{MATMULS[pass_]} matmuls")
        return floor_step(problem, pass_)
    out, found = errors(variant, problem, pass_, gold)
    row.update(found, route=out.route, note=refusal(found))
    row["workspace_mib"] = mib(out.workspace_bytes)
    # Where there is no backward there is nothing to accumulate.
    row["accumulators_mib"] = 0.0 if pass_ == FORWARD else mib(out.accumulator_bytes)
    return lambda: step(variant, problem, pass_)


def blank_row(variant: Variant, pass_: str) -> dict:
    unknown = dict.fromkeys(
        (
            "time_ms",
            "x_floor",
            "peak_mib",
            "grads_mib",
            "workspace_mib",
            "accumulators_mib",
            "route",
            "loss_rel_err",
            "logp_max_err",
            "logp_sum_max_err",
            "dh_rel_err",
            "dw_rel_err",
            "checked_tokens",
            "checked_vocab",
            "note",
        )
    )
    kind = "floor" if variant.loss is None else "fastdpo" if variant.ours else "peer"
    return {"variant": variant.name, "kind": kind, "pass": pass_, **unknown}


def mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20
