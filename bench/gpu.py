"""`python -m bench.gpu`: the evidence of a GPU in one command, as far as its minutes go.

    python -m bench.gpu --out FOLDER --minutes 5
    python -m bench.report FOLDER

In the order of what they are worth: a smoke of every op on every route, the rows of the targets,
whole steps against TRL on lengths of real pairs, the longest pair within 24 and 80 GiB, a profile
by kernel, the wider grid. FOLDER has a file of rows for each and a log; what it has of the same
device, versions, commit and local changes is not measured again, so the same command goes on where
it stopped.

Nothing is started whose estimate is over the time that is left, and a stage that runs past it is
stopped with all its processes; every row is in its file when it is known. It needs no network, and
without a repository `--commit` says what it measures. Without a GPU it prints what it would do.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch

from . import profile, smoke, step, step_crew, step_tables
from .__main__ import jobs_of, line, parse, remaining
from .measure import run
from .rows import ROOT, append, command_line, matching, resume, this_device, where
from .targets import GPU_DTYPE, LLAMA, SMALL_HEADS, Job, gpu_jobs, gpu_target_lines
from .turns import BROKE, DeviceBroken
from .variants import FASTDPO_LARGE, FASTDPO_MIDDLE, TRAIN, Shape, Variant

LOG, SCRATCH = "log.txt", ".scratch"
LENGTHS = ROOT / "bench" / "lengths.json"
FAILED, BROKEN = 1, 3  # exit codes of a stage; a broken one can go on in another process only
# Rough estimates, in seconds, with room for compilation. They decide what is started, not for how
# long it may run.
START_S = 15  # a process, its imports, the device
SMOKE_S, JOB_S, PROFILE_S, LONGEST_S = 10, 25, 10, 60
STEPS_START_S, STEPS_S = 60, 25
GRID_TOKEN_S = 1.5e-3  # beyond JOB_S, for each token of a head of LLAMA's size


@dataclass(frozen=True)
class Work:
    """What is to be measured."""

    device: torch.device
    commit: str | None
    heads: tuple[smoke.Head, ...]
    targets: list[Job]
    steps: list[list[str]]  # each the arguments of `python -m bench.step`
    longest: list[str]  # likewise
    budgets_gib: tuple[int, ...]
    profiles: list[tuple[Shape, Variant]]
    grid: list[Job]
    impl: str = "triton"
    worker: Callable[[str, Path], Any] = step_crew.Worker

    @cached_property
    def here(self) -> dict[str, Any]:
        return where(self.device, self.commit)


def gpu_work(commit: str | None = None) -> Work:
    """What `python -m bench.gpu` measures."""
    model = ["--shape", "llama-3.2-1b", "--variants", "trl,fastdpo", "--max-length", "2048"]
    # Without checkpointing TRL's padded activations of more pairs may fill a card of 80 GB alone.
    saving = ["--gradient-checkpointing"]
    cells = (8, "short", []), (8, "long", saving), (32, "short", saving), (32, "long", saving)
    steps = [
        [*model, "--lengths", f"{LENGTHS}:{name}", "--batch-size", str(pairs), *more]
        for pairs, name, more in cells
    ]
    heads = [LLAMA, *SMALL_HEADS.values()]
    return Work(
        device=this_device(),
        commit=commit,
        heads=smoke.HEADS,
        targets=gpu_jobs(),
        steps=steps,
        longest=["--shape", "llama-3-8b", "--longest"],
        budgets_gib=(24, 80),
        profiles=[(head, variant) for head in heads for variant in (FASTDPO_LARGE, FASTDPO_MIDDLE)],
        grid=jobs_of(parse(["--grid", "--out", os.devnull, "--device", "cuda"])),
    )


class Item(NamedTuple):
    """A part of a stage."""

    what: str
    seconds: float  # an estimate
    rows: Callable[[], Iterator[dict]]


Crew = Callable[[], step_crew.Crew]  # made where it is needed first


def smoke_items(work: Work, known: list[dict], crew: Crew) -> list[Item]:
    items = []
    for head in work.heads:
        same = matching(known, work.here, head=head.name, dtype=head.dtype)
        broke = any((row["note"] or "").startswith(BROKE) for row in same)
        if not broke and not any(row["case"] == smoke.LAST_CASE for row in same):
            what = f"{head.name} head, {head.dtype}"
            rows = partial(smoke.run, head, work.device, work.here, work.impl)
            items.append(Item(what, SMOKE_S, rows))
    return items


def loss_items(jobs: list[Job], work: Work, known: list[dict], per_token: float = 0) -> list[Item]:
    items = []
    for job in jobs:
        job = remaining(job, known, work.here)
        if not job.passes:
            continue
        size = job.shape.N * job.shape.D * job.shape.V / (LLAMA.D * LLAMA.V)
        rows = partial(
            run, job.shape, job.dtype, job.variants, passes=job.passes, device=work.device,
            leave_out=job.leave_out, commit=work.commit,
            memory=work.device.type == "cuda",  # there the allocator keeps the books at no cost
        )  # fmt: skip
        N, D, V, *_ = job.shape
        what = f"N={N}, D={D}, V={V}: {', '.join(job.passes)}"
        items.append(Item(what, JOB_S + per_token * size, rows))
    return items


def parse_step(work: Work, arguments: list[str]) -> argparse.Namespace:
    return step.parse([*arguments, *(["--commit", work.commit] if work.commit else [])])


def step_items(work: Work, known: list[dict], crew: Crew) -> list[Item]:
    """Cells whose variants have no row each; the first has the processes to start and to check."""
    items, checks = [], {}
    for arguments in work.steps:
        args = parse_step(work, arguments)
        wanted = step.common_fields(args, args.shape or args.model, [])
        del wanted["utc"], wanted["mean_sequence"]
        found = {row["variant"] for row in matching(known, work.here, op=step_tables.OP, **wanted)}
        if not found >= set(step.names_of(args)):
            what = f"{wanted['data']}, {args.batch_size} pairs a step"
            seconds = STEPS_S + (0 if items else STEPS_START_S)
            items.append(Item(what, seconds, lambda args=args: step.run(args, crew(), checks)))
    return items


def longest_items(work: Work, known: list[dict], crew: Crew) -> list[Item]:
    """A search that was stopped goes on from the longest pair that it had found."""
    if not work.longest:
        return []
    args, items = parse_step(work, work.longest), []

    def rows(name: str, budget: int, good: int) -> Iterator[dict]:
        crew().warm([name])  # it imports while the weights are made
        job = step.job_of(args, step.model_of(args))
        yield from step.longest_rows(args, job, crew().start, name, budget, good)

    model = Path(args.shape or args.model).name
    versions = step.common_fields(args, model, [])["versions"]
    for budget in work.budgets_gib:
        for name in step.LONGEST_VARIANTS:
            wanted = {"versions": versions, "model": model, "variant": name, "budget_gib": budget}
            found = matching(known, work.here, op=step_tables.LONGEST, **wanted)
            good = found[-1]["longest"] if found else 0
            if not found or found[-1]["note"] == step.SO_FAR:
                what = f"{name} within {budget} GiB"
                items.append(Item(what, LONGEST_S, partial(rows, name, budget, good)))
    return items


def profile_items(work: Work, known: list[dict], crew: Crew) -> list[Item]:
    items = []
    for shape, variant in work.profiles:
        wanted = {**shape._asdict(), "dtype": GPU_DTYPE, "variant": variant.name, "kernel": None}
        if not matching(known, work.here, op=profile.OP, **wanted):
            what = f"N={shape.N}, D={shape.D}, V={shape.V}: {variant.name}"
            job = shape, GPU_DTYPE, variant, TRAIN, work.device, work.here
            items.append(Item(what, PROFILE_S, partial(profile.run, *job)))
    return items


class Stage(NamedTuple):
    """A file of rows; `items` are those that it doesn't have yet."""

    what: str
    items: Callable[[Work, list[dict], Crew], list[Item]]


STAGES = {
    "smoke": Stage("every op on every route against fp64", smoke_items),
    "targets": Stage(
        "the loss, its peers and the bare products: the targets",
        lambda work, known, crew: loss_items(work.targets, work, known),
    ),
    "step": Stage("whole training steps, fastdpo and TRL", step_items),
    "longest": Stage("the longest pair that trains within a memory", longest_items),
    "profile": Stage("the loss by kernel", profile_items),
    "grid": Stage(
        "the loss over heads and tokens",
        lambda work, known, crew: loss_items(work.grid, work, known, GRID_TOKEN_S),
    ),
}


# --- one stage, in a process of its own -----------------------------------------------------------


def run_stage(
    name: str, work: Work, out: Path, deadline: float, clock: Callable[[], float] = time.monotonic
) -> int:
    """Measure what fits; the exit code. A part that fails costs no other."""
    path, started, code = out / f"{name}.jsonl", clock(), 0

    def write(row: dict) -> None:
        print(line_of(append(path, row)), flush=True)

    with ExitStack() as stack:
        stack.callback(shutil.rmtree, out / SCRATCH, ignore_errors=True)
        crew = cache(lambda: stack.enter_context(step_crew.crew_of(work.worker, out / SCRATCH)))
        items = STAGES[name].items(work, resume(path), crew)
        for i, item in enumerate(items):
            left = deadline - clock()
            about = f"[{i + 1}/{len(items)}] {clock() - started:.0f} s  {item.what}"
            if item.seconds > left:
                print(f"{about}: not started, wants {item.seconds:.0f} s of {left:.0f} s")
                continue
            print(about, flush=True)
            try:
                for row in item.rows():
                    write(row)
            except DeviceBroken as error:
                if "op" in error.row:  # else it is written
                    write(error.row)
                print(f"stopped: {error}", flush=True)
                return BROKEN
            except Exception:
                traceback.print_exc(file=sys.stdout)
                code = FAILED
    return code


def line_of(row: dict) -> str:
    lines = {smoke.OP: smoke.line, profile.OP: profile.line}
    lines |= {step_tables.OP: step.line, step_tables.LONGEST: step.line}
    return lines.get(row["op"], line)(row)


def child(name: str, plan: Callable[[], Work], out: Path, deadline: float, output: Any) -> None:
    """A stage's process, the first of a group, so that all of them can be stopped."""
    os.setsid()
    signal.setitimer(signal.ITIMER_REAL, max(1.0, deadline - time.monotonic() + 5))  # come what may
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    # Nothing is asked of a hub.
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    sys.exit(run_stage(name, plan(), out, deadline))


def in_process(
    name: str,
    plan: Callable[[], Work],
    out: Path,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
) -> int | None:
    """Run a stage to its end or to the deadline; its exit code, None where it was stopped."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(name, plan, out, deadline, theirs))
    process.start()
    theirs.close()
    reader = Thread(target=tee, args=(ours, out / LOG), daemon=True)
    reader.start()
    try:
        while process.is_alive() and clock() < deadline:
            process.join(0.2)
        return process.exitcode
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()
        reader.join(2)  # a process of another group may hold the pipe
        shutil.rmtree(out / SCRATCH, ignore_errors=True)


def tee(ours: Any, log: Path) -> None:
    with os.fdopen(os.dup(ours.fileno()), errors="replace") as lines, log.open("a") as file:
        for text in lines:
            print(text, end="", flush=True)
            file.write(text)
            file.flush()


# --- all stages -----------------------------------------------------------------------------------

Start = Callable[[str, Callable[[], Work], Path, float], int | None]


def measure(
    out: Path,
    minutes: float,
    plan: Callable[[], Work],
    start: Start = in_process,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run the stages that fit, in order."""
    started = clock()
    deadline = started + 60 * minutes
    work = plan()
    out.mkdir(parents=True, exist_ok=True)

    def tell(text: str) -> None:
        text = f"{clock() - started:4.0f} s  {text}"
        print(text, flush=True)
        with (out / LOG).open("a") as file:
            file.write(text + "\n")

    place = work.here
    tell(f"{place['device']}, {place['git'] or 'no commit'}, {minutes:g} minutes, {place['utc']}")
    for name, stage in STAGES.items():
        path, before = out / f"{name}.jsonl", -1
        while True:
            known = resume(path)
            items = stage.items(work, known, no_crew)
            left = deadline - clock()
            if not items:
                tell(f"{name}: all {len(known)} rows are there")
                break
            if len(known) == before:  # it broke the device and has no row that says so
                tell(f"{name}: given up")
                break
            if (least := START_S + min(item.seconds for item in items)) > left:
                tell(f"{name}: not started, wants {least:.0f} s of {left:.0f} s")
                break
            tell(f"{name}: {stage.what}")
            code, before = start(name, plan, out, deadline), len(known)
            if code is None:
                tell(f"{name}: stopped, its rows so far are in {path.name}")
            elif code not in (0, BROKEN):
                tell(f"{name}: failed, exit code {code}")
            if code != BROKEN:
                break
    if rows := matching(resume(out / "targets.jsonl"), work.here):
        tell("\n".join(["targets:", *gpu_target_lines(rows)]))
    tell(f"the end; tables and plots: python -m bench.report {out}")


def no_crew() -> step_crew.Crew:
    raise RuntimeError("only a stage's own process has others")


def outline(work: Work) -> str:
    """What would be measured, where it can't be."""
    lines = ["There is no CUDA device here. On one, as far as --minutes go and in this order:"]
    for number, (name, stage) in enumerate(STAGES.items(), 1):
        items = stage.items(work, [], no_crew)
        seconds = START_S + sum(item.seconds for item in items)
        lines.append(f"{number}. {name}.jsonl: {stage.what}; about {seconds:,.0f} s")
        lines += [f"     {item.what}" for item in items]
    return "\n".join([*lines, "Estimates, none of them measured."])


def default_folder(here: dict[str, Any]) -> Path:
    device = re.sub("[^a-z0-9]+", "-", here["device"].lower()).strip("-")
    return ROOT / "bench" / "results" / f"{device}-{(here['git'] or 'no-commit')[:12]}"


def main(arguments: list[str] | None = None) -> int:
    """Measure, or say what would be."""
    parser = command_line("bench.gpu", __doc__)
    parser.add_argument("--out", type=Path, help="a folder (bench/results/DEVICE-COMMIT)")
    parser.add_argument("--minutes", type=float, default=5)
    args = parser.parse_args(arguments)
    plan = partial(gpu_work, args.commit)
    if not torch.cuda.is_available():
        print(outline(plan()))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a stage ends with it
    measure(args.out or default_folder(plan().here), args.minutes, plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
