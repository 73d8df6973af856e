"""Variants that take turns at training steps, compared with TRL before and while they are timed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .step_pairs import lengths
from .step_worker import GOLD, VARIANTS, planned
from .turns import OUT_OF_MEMORY, Failed, Row, attempt, ratios, take_turns

WARM_UP = 1
TURN = 4  # steps; the first after others had theirs finds nothing of its own in caches
YARDSTICK = "trl"
# Limits of a loss's distance, and of relative ones of log-probs and gradient norms. In fp32 they
# are over 20 times what tests find between TRL and fastdpo. In bf16 every log-prob of hundreds in a
# sum was rounded to 8 bits somewhere, and so was every update of the weights.
EXACT = {"loss": 2e-4, "logps": 1e-4, "grad_norm": 1e-3}
ROUNDED = {"loss": 1e-1, "logps": 1e-2, "grad_norm": 1e-1}
CHECK_STEPS, CHECK_PAIRS = 1, 2  # of the comparison in fp32, after the warm-up
LOG_2_LIMIT = 1e-3
SPARE = 0.9  # share of the memory that waiting processes may fill


class Result(NamedTuple):
    """What is known of a variant: its steps, the warm-up first, and why it has no speed."""

    variant: str
    steps: list[dict[str, Any]]
    note: str | None
    ratios: list[float]  # of TRL's seconds to its own, for each step
    interleaved: bool | None  # with TRL, in one group
    off: dict[str, float] | None  # the largest distances from the yardstick's steps
    check: dict[str, float] | None = {}  # noqa: RUF012 - the same in fp32


def measure(
    job: dict[str, Any],
    variants: Sequence[str],
    rounds: int,
    *,
    at_once: int,
    start: Callable[[dict[str, Any]], Any],
    checks: dict[str, Result] | None = None,
) -> Iterator[Result]:
    """Check, then time, as many at once as memory has room for; yields groups as they end.

    `checks` are the results in fp32 of a job before on the same model, and become this one's.
    """
    checks = {} if checks is None else checks
    gold = None
    if limits_of(job) is EXACT:
        gold = first_steps(job, start) if variants else None
    elif missing := [name for name in variants if name not in checks]:
        small = check_job(job)
        first = first_steps(small, start)
        for result in in_groups(small, missing, CHECK_STEPS, first, at_once=at_once, start=start):
            checks[result.variant] = result
            said = result.note or "agrees"
            print(f"... {result.variant}: in fp32 {said}", file=sys.stderr, flush=True)
    wrong = [name for name in variants if name in checks and checks[name].note is not None]
    for name in wrong:
        yield checks[name]._replace(steps=[], note=f"in fp32: {checks[name].note}", off={})
    right = [name for name in variants if name not in wrong]
    for result in in_groups(job, right, rounds, gold, at_once=at_once, start=start):
        yield result._replace(check=checks.get(result.variant, result).off)


def in_groups(
    job: dict[str, Any],
    variants: Sequence[str],
    rounds: int,
    gold: dict[str, Any] | None,
    *,
    at_once: int,
    start: Callable[[dict[str, Any]], Any],
) -> Iterator[Result]:
    """Where not all fit, each group has the first variant again, as the yardstick of its ratios.

    What runs out of memory beside others is tried by itself.
    """
    yardstick = YARDSTICK if YARDSTICK in variants else next(iter(variants), YARDSTICK)
    waiting = sorted(variants, key=lambda name: name != yardstick)
    known: list[dict[str, Any]] = []  # the yardstick's steps
    while waiting:
        again = [yardstick] if known and at_once > 1 else []
        waiting = again + waiting
        group = Group(job, gold, start)
        while waiting and (room := group.room(at_once)):
            group.add(waiting[:room])
            waiting = waiting[room:]
        group.run(rounds)
        for result in group.results(yardstick, known):
            if result.variant in again:
                continue
            if result.note == OUT_OF_MEMORY and len(group.steps) > 1:
                # It may fit by itself; from then on nothing is beside another.
                at_once, waiting = 1, [*waiting, result.variant]
                continue
            if result.variant == yardstick and result.note is None:
                known = result.steps
            yield result


def check_job(job: dict[str, Any]) -> dict[str, Any]:
    """The job in fp32, with few pairs of few tokens."""
    count = (WARM_UP + CHECK_STEPS + 1) * CHECK_PAIRS
    short = sorted(job["pairs"], key=lambda pair: sum(lengths(pair)))
    exact = {"dtype": "float32", "autocast": False, "batch_size": CHECK_PAIRS}
    return {**job, **exact, "pairs": short[:count]}


def first_steps(
    job: dict[str, Any], start: Callable[[dict[str, Any]], Any]
) -> dict[str, Any] | None:
    """What the first step should give; None where there is no room to find out."""
    worker = start({**job, "variant": GOLD})
    try:
        return worker.receive()
    except Failed as error:
        print(f"not compared with {GOLD}: {error}", flush=True)
        return None
    finally:
        worker.stop()


class Group:
    """Variants that are alive together and take turns."""

    def __init__(
        self,
        job: dict[str, Any],
        gold: dict[str, Any] | None,
        start: Callable[[dict[str, Any]], Any],
    ) -> None:
        self.job, self.gold, self.start = job, gold, start
        self.workers: dict[str, Any] = {}
        self.steps: dict[str, list[dict[str, Any]]] = {}
        self.rows: dict[str, Row] = {}
        self.capacity_mib = capacity_mib()

    def add(self, names: Sequence[str]) -> None:
        """Start variants side by side, to their warm-up; one that fails or differs is stopped."""
        started = {name: self.start({**self.job, "variant": name}) for name in names}
        for name, worker in started.items():
            row = self.rows[name] = {"note": None}
            self.steps[name] = []
            if (first := attempt(row, worker.receive)) is not None:
                self.steps[name].append(first)
                row["note"] = first_refusal(first, self.gold, limits_of(self.job))
            self._tell(name, "loaded, first")
            if row["note"] is None:
                self.workers[name] = worker
            else:
                worker.stop()

    def _tell(self, name: str, what: str) -> None:
        what = self.rows[name]["note"] or what
        seconds = ", ".join(f"{step['seconds']:.2f} s" for step in self.steps[name][-TURN:])
        line = f"... {name}, {self.job['dtype']}: {what} {seconds}"
        print(line, file=sys.stderr, flush=True)

    def room(self, at_once: int) -> int:
        """How many more have room, were each like the largest and all at their longest step.

        What an allocator holds stays its own while others take their turn, so peaks add up. The
        first is alone, to know its size, and one beside it is always tried.
        """
        first = [self.steps[name][0] for name in self.workers]
        if not first:
            return 1
        cuda = torch.cuda.is_available()
        peaks = [x["held_mib"] if cuda else x["peak_mib"] for x in first]
        space = SPARE * self.capacity_mib / self.growth() - sum(peaks)
        room = int(min(space / max(peaks), len(VARIANTS)))
        return min(max(room, int(len(first) < 2)), at_once - len(first))

    def growth(self) -> float:
        """The longest step's tokens over those of the warm-up."""
        pairs, size = self.job["pairs"], self.job["batch_size"]
        tokens = [
            max(max(lengths(pairs[i])) for i in step)
            for step in planned(pairs, size, self.job["seed"])
        ]
        return max(1.0, max(tokens) / tokens[0])

    def run(self, rounds: int) -> None:
        """All of them `rounds` steps, in turns; then they are stopped."""
        take_turns(
            self.rows,
            {name: self.steps[name] for name in self.workers},
            lambda name: self.workers[name].step(),
            rounds,
            turn=TURN,
            after=lambda name: self._tell(name, f"step {len(self.steps[name])},"),
        )
        for worker in self.workers.values():
            worker.stop()

    def results(self, yardstick: str, known: list[dict[str, Any]]) -> list[Result]:
        """Losses of all steps are compared before anyone has a ratio.

        `known` are the yardstick's steps from a group before, on the same pairs.
        """
        limits, found = limits_of(self.job), []
        alive = [name for name, row in self.rows.items() if row["note"] is None]
        here = yardstick in alive
        beside = self.steps[yardstick] if here else known
        other = known or beside or (self.steps[alive[0]] if alive else [])
        for name, steps in self.steps.items():
            off = distances(steps, other)
            note = self.rows[name]["note"] or refusal(off, limits)
            x_trl = []
            if note is None and yardstick == YARDSTICK:
                x_trl = ratios(*(seconds_of(taken) for taken in (beside, steps)))
            found.append(Result(name, steps, note, x_trl, here, off))
        return found


def seconds_of(steps: list[dict[str, Any]]) -> list[float]:
    """Of the timed ones."""
    return [step["seconds"] for step in steps[WARM_UP:]]


def capacity_mib() -> float:
    """Memory for all workers together, before any has started."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 2**20
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return math.inf
    line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) / 2**10


def limits_of(job: dict[str, Any]) -> dict[str, float]:
    return EXACT if job["dtype"] == "float32" and not job["autocast"] else ROUNDED


LIMITED = {
    "loss": "loss", "logps/chosen": "logps", "logps/rejected": "logps", "grad_norm": "grad_norm",
}  # fmt: skip


def distances(steps: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, float]:
    """The largest distance of each number from another's at the same step."""
    found = dict.fromkeys(LIMITED.values(), 0.0)
    for step, wanted in zip(steps, other):
        for name, kind in LIMITED.items():
            scale = 1.0 if kind == "loss" else abs(wanted[name]) or 1.0
            error = abs(step[name] - wanted[name]) / scale
            # NaN is larger than any number here, and max would lose it.
            found[kind] = max(found[kind], math.inf if math.isnan(error) else error)
    return found


def refusal(off: dict[str, float], limits: dict[str, float]) -> str | None:
    """Why a variant so far off gets no speed."""
    for name, error in off.items():
        if not error <= limits[name]:
            return f"disagrees: {name} is off by {error:.2g}, over {limits[name]:g}"
    return None


def first_refusal(
    step: dict[str, Any], gold: dict[str, Any] | None, limits: dict[str, float]
) -> str | None:
    """Why a variant with this first step is not timed."""
    if not abs(step["loss"] - math.log(2)) <= LOG_2_LIMIT:
        return f"disagrees: the first loss is {step['loss']:.5f}, not log 2"
    return refusal(distances([step], [gold]), limits) if gold else None
