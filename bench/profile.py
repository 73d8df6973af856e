"""Where the time of the loss goes: kernels by name, and the host's share.

A row a kernel: launches and milliseconds of one call, the mean of several under torch's profiler.
The row without a kernel has their sums, the time of a call by events or clock, and the time that
the host takes to enqueue one, both without the profiler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .measure import DTYPES, inputs
from .tables import grouped, latest_build, markdown_table, setting
from .turns import attempt, timed_ms, warm_ms
from .variants import Shape, Variant, step

OP = "profile"
CALLS = 5
SHOWN = 10  # kernels in a table; the rest is one line


def run(
    shape: Shape,
    dtype: str,
    variant: Variant,
    pass_: str,
    device: torch.device,
    common: dict[str, Any],
) -> Iterator[dict]:
    """Rows of one call: the largest kernel first, all together last.

    Raises:
        DeviceBroken: after which nothing runs in this process; its row is not among these.
    """
    common = {**common, "op": OP, **shape._asdict(), "dtype": dtype}
    row = {**common, "variant": variant.name, "pass": pass_, "kernel": None, "launches": None}
    row |= {"ms": None, "call_ms": None, "host_ms": None, "route": None, "note": None}
    problem = inputs(shape, DTYPES[dtype], device)
    if problem is None:
        yield {**row, "note": "the inputs alone: out of memory"}
        return

    def call() -> None:
        row["route"] = step(variant, problem, pass_)[0].route

    found = attempt(row, lambda: kernels(call, device))
    if found is None:
        yield row
        return
    row |= {"call_ms": timed_ms(call, device, CALLS), "host_ms": host_ms(call, device)}
    for name, (launches, ms) in sorted(found.items(), key=lambda x: -x[1][1]):
        yield {**row, "kernel": name, "launches": launches, "ms": ms}
    launches, ms = (sum(x[i] for x in found.values()) for i in (0, 1))
    yield {**row, "launches": launches, "ms": ms}


def kernels(call: Callable[[], None], device: torch.device) -> dict[str, tuple[float, float]]:
    """Launches and milliseconds of one call by kernel; of PyTorch's operators on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    warm_ms(call, device)
    with profile(activities=activities) as profiled:
        for _ in range(CALLS):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    found = {}
    for event in profiled.key_averages():
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if us > 0 and (event.device_type.name == "CUDA") == on_gpu:
            found[event.key] = event.count / CALLS, us / 1e3 / CALLS
    return found


def host_ms(call: Callable[[], None], device: torch.device) -> float:
    """The least time in which a call returns, with nothing queued before it."""
    times = []
    for _ in range(CALLS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return min(times)


def line(row: dict) -> str:
    """A row for the eye."""
    if row["note"]:
        return f"{row['variant']}: {row['note']}"
    name = row["kernel"] or (
        f"all of D={row['D']}, {row['variant']}: {row['call_ms']:.2f} ms a call, "
        f"{row['host_ms']:.2f} ms of the host"
    )
    return f"{row['ms']:9.3f} ms in {row['launches']:4g} launches  {name[:90]}"


def markdown(rows: list[dict], plots: list[str]) -> str:
    """A table for each head and variant, the largest kernel first."""
    rows, parts = latest_build(rows), []
    key = ("N", "D", "V", "softcap", "dtype", "variant", "pass")
    for found in grouped(rows, key).values():
        *kernels, total = {row["kernel"]: row for row in found}.values()
        if total["kernel"] is not None:  # it was stopped before the end
            continue
        what = f"{total['variant']}, {total['dtype']}, {total['pass']}, N = {total['N']:,}, "
        what += f"D = {total['D']:,}, V = {total['V']:,}"
        if total["note"]:
            parts.append(f"**{what}**: {total['note']}")
            continue
        parts.append(
            f"**{what}: {total['call_ms']:.3g} ms a call, kernels {total['ms']:.3g} ms in "
            f"{total['launches']:g} launches, host {total['host_ms']:.3g} ms** {setting(total)}"
        )
        body = [
            [row["kernel"], f"{row['launches']:g}", f"{row['ms']:.3g}"] for row in kernels[:SHOWN]
        ]
        if rest := kernels[SHOWN:]:
            sums = (sum(row[name] for row in rest) for name in ("launches", "ms"))
            body.append([f"{len(rest)} others", *(f"{x:.3g}" for x in sums)])
        parts.append(markdown_table(["kernel", "launches", "ms"], ["---", "---:", "---:"], body))
    return "\n\n".join(parts)
