"""How everything here is measured: a row for each, checked before it is timed, timed in turns.

A row is a dict whose `note` says why there is nothing more to measure: an attempt that fails writes
it, a check that finds an error may. What has no note is warmed up, and then takes turns in rounds,
each in a new order, so that what slows a machine for a while slows all. What is timed is a call of
this process (`interleaved_ms`) or whatever answers to a name, as a worker in another process does
(`take_turns`).
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

SLOW_MS = 10_000.0
SHORT_MS, MOST_CALLS = 2.0, 20  # a sample is several calls where one is shorter
OUT_OF_MEMORY, BROKE = "out of memory", "broke the device"
POINTS = {"median": 0.5, "min": 0.0, "p20": 0.2, "p80": 0.8}

T = TypeVar("T")
Row = dict[str, Any]
Call = Callable[[], object]


class Failed(Exception):
    """A worker gave up; the message is why."""


class DeviceBroken(RuntimeError):
    """A call left the device unusable; `row` is what is known of it."""

    def __init__(self, row: Row) -> None:
        named = (row.get(name) for name in ("head", "case", "variant", "pass"))
        super().__init__(f"{', '.join(filter(None, named))}: {row['note']}")
        self.row = row


# --- attempts -------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """The allocator's own error, or a library's word for it."""
    words = ("out of memory", "alloc_failed", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        word in str(error).lower() for word in words
    )


def note_of(error: Exception) -> str:
    """A failure in a line."""
    if isinstance(error, Failed):
        return str(error)
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def attempt(row: Row, call: Callable[[], T]) -> T | None:
    """The call's result; a failure is the row's note, and leaves nothing allocated behind.

    Raises:
        DeviceBroken: where no later call can succeed.
    """
    try:
        return call()
    except Exception as error:
        row["note"] = note_of(error)
    # Outside the handler: the traceback would keep the failed call's tensors.
    if device_is_broken():
        row["note"] = f"{BROKE}: {row['note']}"
        raise DeviceBroken(row)
    release()
    return None


def each(rows: Mapping[str, Row], call: Callable[[str], T]) -> Iterator[tuple[str, T]]:
    """What a call gives for the name of each row without a note; a failure becomes its note."""
    for name, row in rows.items():
        if row["note"] is None and (found := attempt(row, partial(call, name))) is not None:
            yield name, found


def device_is_broken() -> bool:
    """After a device assert or an illegal access every later call fails, this one too."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception:
        return True
    return False


def release() -> None:
    """Give back what nothing holds, so that one variant's leftovers are not another's limit."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


# --- turns ----------------------------------------------------------------------------------------


def take_turns(
    rows: Mapping[str, Row],
    samples: Mapping[str, list[T]],
    sample: Callable[[str], T],
    rounds: int,
    *,
    turn: int = 1,
    slow: Callable[[T], bool] = lambda warm_up: False,
    after: Callable[[str], object] = lambda name: None,
) -> None:
    """Append `rounds` samples to each one's warm-up, `turn` of them at a time, in a new order.

    One whose warm-up was slow has a single turn, so it holds up no run. One that fails has its note
    in `rows`, and no more turns. `after` is told whose turn ended.
    """
    order, shuffle = list(samples), random.Random(0).shuffle
    for start in range(0, rounds, turn):
        shuffle(order)
        for name in order:
            if rows[name]["note"] is not None or (start and slow(samples[name][0])):
                continue
            for _ in range(min(turn, rounds - start)):
                if (found := attempt(rows[name], partial(sample, name))) is None:
                    break
                samples[name].append(found)
            after(name)


def ratios(base: Sequence[float], own: Sequence[float]) -> list[float]:
    """Of each round, the base's over its own: what slows a round slows both."""
    return [theirs / ours for theirs, ours in zip(base, own)]


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, least and spread of samples, and how many there are."""
    x = torch.tensor(samples, dtype=torch.float64)
    points = x.quantile(torch.tensor([*POINTS.values()], dtype=torch.float64)).tolist()
    return {**{name: round(p, 4) for name, p in zip(POINTS, points)}, "samples": len(samples)}


# --- calls of this process ------------------------------------------------------------------------


def timed_ms(call: Call, device: torch.device, calls: int = 1) -> float:
    """Time of one call, the mean of `calls`; on a GPU by events, so that a queue of launches isn't
    counted as work.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / calls
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) * 1e3 / calls


def warm_ms(call: Call, device: torch.device) -> float:
    """A warm-up's time; where that is short, the first call's is mostly something else."""
    ms = timed_ms(call, device)
    return ms if ms > 50 * SHORT_MS else timed_ms(call, device)


def interleaved_ms(
    rows: Mapping[str, Row], calls: Mapping[str, Call], rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Milliseconds of a call for each row without a note: their summary, and the calls of a sample.

    One whose warm-up takes over `SLOW_MS` is in the first round only.
    """
    samples = {name: [ms] for name, ms in each(rows, lambda name: warm_ms(calls[name], device))}
    count = {
        name: min(MOST_CALLS, math.ceil(SHORT_MS / max(ms, SHORT_MS / MOST_CALLS)))
        for name, (ms,) in samples.items()
    }

    def sample(name: str) -> float:
        return timed_ms(calls[name], device, count[name])

    take_turns(rows, samples, sample, rounds, slow=lambda ms: ms > SLOW_MS)
    return {
        name: {**summary(found[1:]), "calls": count[name]}
        for name, found in samples.items()
        if rows[name]["note"] is None
    }
