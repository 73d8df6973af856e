"""`python -m bench.parallel`: training on several processes against one.

    python -m bench.parallel --out parallel.jsonl
    python -m bench.parallel --out parallel.jsonl --only fsdp2 --ranks 2
    python -m bench.parallel --report parallel.jsonl

Each case is a run of `fastdpo.train.trainer.train` on CPU processes that talk by gloo: an engine,
a number of processes, where the head is, which way through the head is taken, and whether all
weights or adapters are trained.  Three optimizer steps, all of them clipped; the last has one pair,
and in the others processes have different numbers of micro-batches.  What is compared with a run of
one process: losses and log-probs, the norm of the gradient, the gradient of every weight before and
after clipping, every weight after three steps, and every weight of the saved policy.  A difference
is relative: of a number to itself, of a weight's tensor the norm to the tensor's norm.

What a difference may be is measured too.  The same run on one process, with its micro-batches
packed otherwise, sums in another order, and so it does by another way through a head that is
trained: the largest difference of such runs is what rounding makes in this dtype, and a run on
several processes may have `WITHIN` times as much.  In bf16 what is computed is another number, so
there the measure is how far one process in bf16 is from fp32, of which they keep as far away.

Weights are random, so the tables say nothing of speed.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import multiprocessing
import queue
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.train.config import TrainConfig

from .parallel_run import CONFIG, Found, Job, process, save_model
from .parallel_tables import MEASURES, OP, markdown
from .rows import append, command_line, load, matching, resume, where

WITHIN = 4.0  # times what another packing does on one process
PATIENCE_S = 900  # for one run, of a few seconds where nothing else runs
PACKAGES = ("accelerate", "peft", "deepspeed")


class Engine(NamedTuple):
    """How processes hold a model.

    Attributes:
        options: of training.
        ranks: numbers of processes.
        units: whether embeddings and head are units, or may be in the root.
        environment: of the processes, as accelerate's launch sets it.
        extras: which other runs, and models of other families.
    """

    options: Mapping[str, Any]
    ranks: tuple[int, ...] = (2, 4)
    units: bool = False
    environment: Mapping[str, str] = {}
    extras: bool = True

    @property
    def splits_tokens(self) -> bool:
        return "sp_size" in self.options


def _fsdp2(*ranks: int, extras: bool = True, **options: Any) -> Engine:
    return Engine({"engine": "fsdp2", **options}, ranks or (2, 4), units=True, extras=extras)


def _zero(stage: int, *ranks: int, extras: bool = True, **options: Any) -> Engine:
    # By itself it would shard none of a small model's weights.
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    settings = base64.urlsafe_b64encode(json.dumps({"zero_optimization": zero}).encode()).decode()
    launched = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": settings,
    }
    options["engine"] = "deepspeed"
    return Engine(options, ranks or (2, 4), environment=launched, extras=extras)


ENGINES = {
    "ddp": Engine({}),
    "fsdp2": _fsdp2(),
    "fsdp2, 2 replicas": _fsdp2(4, extras=False, dp_replicate_size=2),
    "fsdp2, kept after forward": _fsdp2(extras=False, reshard_after_forward=False),
    "fsdp2, offloaded": _fsdp2(extras=False, offload_params=True),
    "zero 2": _zero(2),
    "zero 3": _zero(3),
    "ddp, sp 2": Engine({"sp_size": 2}),
    "ddp, sp 4": Engine({"sp_size": 4}, (4,), extras=False),
    "fsdp2, sp 2": _fsdp2(sp_size=2),
    "fsdp2, sp 4": _fsdp2(4, extras=False, sp_size=4),
    "zero 3, sp 2": _zero(3, 2, extras=False, sp_size=2),
}
# Workspaces in which this model's micro-batches take a route, where the head is trained.
WORKSPACES = {"stash": None, "grouped": 0.04, "recompute": 0.015}
ROUTES = (*WORKSPACES, "frozen")
TIED, OWN, ROOT, UNTIED = "tied, in the root", "own unit", "untied, in the root", "untied"
STEPWISE = {"precompute_ref_log_probs": False}
EXTRAS: dict[str, dict[str, Any]] = {
    "": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "reference in each step": STEPWISE,
    "kto": {"loss_type": "kto", "alpha": 0.0},
    "bco": {"loss_type": "bco", "alpha": 0.0},
    "aot": {"loss_type": "aot", "alpha": 0.0},
    "tdpo2": {"loss_type": "tdpo2", **STEPWISE},
    "evaluation": {},
    "bf16": {"bf16": True},
}
ADAPTED = ("tdpo2", "reference in each step", "bf16")  # with LoRA too
EVALUATED = {"evaluation", "kto", "aot", "reference in each step"}
# What is run once: packed otherwise, or in fp32.
PACKED = (
    {"max_tokens": 2000},
    {"layout": "packed", "max_tokens": 170},
    {"layout": "padded", "max_tokens": 300},
)


class Case(NamedTuple):
    """A line of the table; ``extra`` is one of `EXTRAS`."""

    engine: str
    ranks: int
    head: str
    route: str
    extra: str = ""
    family: str = "llama"

    @property
    def trains(self) -> str:
        return "LoRA" if self.route == "frozen" else "full"

    @property
    def goes(self) -> str:
        """The way through the head: a KL of tokens that are split is always recomputed."""
        split = ENGINES[self.engine].splits_tokens and self.extra == "tdpo2"
        return "recompute" if split else self.route

    @property
    def alone(self) -> Job:
        """The same on one process."""
        options: dict[str, Any] = dict(EXTRAS[self.extra])
        if self.route == "frozen":
            options["use_peft"] = True
        elif WORKSPACES[self.route] is not None:
            options["workspace_mib"] = WORKSPACES[self.route]
        return Job(self.family, self.head == TIED, options, evaluates=self.extra in EVALUATED)

    @property
    def in_bf16(self) -> bool:
        return bool(EXTRAS[self.extra].get("bf16"))

    @property
    def others(self) -> list[Job]:
        """Runs that differ from that on one process as much as this one may."""
        job = self.alone
        if self.in_bf16:
            return [job._replace(options={**job.options, "bf16": False})]
        jobs = [job]
        if self.route in WORKSPACES:
            jobs = [self._replace(route=route).alone for route in WORKSPACES]
        return [x._replace(options={**x.options, **way}) for x in jobs for way in PACKED]

    @property
    def job(self) -> Job:
        engine = ENGINES[self.engine]
        options = {**self.alone.options, **engine.options}
        return self.alone._replace(
            options=options, environment=engine.environment, root=self.head == ROOT
        )


def cases() -> list[Case]:
    """All lines of the table, those first that say most."""
    found = []
    for name, engine in ENGINES.items():
        heads = (TIED, OWN, ROOT) if engine.units else (TIED, UNTIED)
        for ranks, head, route in product(engine.ranks, heads, ROUTES):
            # Sums of whole sequences come late where their tokens are split: nothing is grouped.
            if route != "grouped" or not engine.splits_tokens:
                found.append(Case(name, ranks, head, route))
        for extra in [*EXTRAS][1:] if engine.extras else ["evaluation", "bf16"]:
            found.append(Case(name, engine.ranks[0], heads[1], "stash", extra))
            if extra in ADAPTED and engine.extras:
                found.append(Case(name, engine.ranks[0], TIED, "frozen", extra))
        if engine.extras:
            for family in ("qwen3", "gemma3", "qwen3_moe"):
                found.append(Case(name, engine.ranks[-1], TIED, "stash", family=family))
    return sorted(found, key=lambda x: (x.ranks, x.route != "stash", x.route != "frozen"))


# ------------------------------------------------------------------------------------- differences
def relative(found: Tensor, wanted: Tensor) -> float:
    off, size = (float(x.double().norm()) for x in (found.double() - wanted.double(), wanted))
    return off / size if off else 0.0


def largest(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Of all tensors, which have to be the same ones."""
    if found.keys() != wanted.keys():
        raise ValueError(f"not the same weights: {sorted(found.keys() ^ wanted.keys())}")
    return max(relative(x, wanted[name]) for name, x in found.items())


def differences(found: Found, wanted: Found) -> dict[str, float]:
    """Each of `MEASURES`, the largest of all steps."""

    def values(x: Found, norm: bool) -> list[float]:
        return [v for name, of in x.values.items() if (name == "grad_norm") == norm for v in of]

    def numbers(norm: bool) -> float:
        pairs = zip(values(found, norm), values(wanted, norm), strict=True)
        return max(abs(a - b) / abs(b) if a != b else 0.0 for a, b in pairs)

    def gradients(mine: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> float:
        return max(largest(a, b) for a, b in zip(mine, others, strict=True))

    if found.values.keys() != wanted.values.keys():
        raise ValueError(f"not the same metrics: {found.values.keys() ^ wanted.values.keys()}")
    off = {
        "losses": numbers(norm=False),
        "norm": numbers(norm=True),
        "gradients": gradients(found.gradients, wanted.gradients),
        "weights": largest(found.weights, wanted.weights),
        "policy": largest(found.policy, wanted.policy),
    }
    return off | ({"clipped": gradients(found.clipped, wanted.clipped)} if found.clipped else {})


class Baselines:
    """Runs of one process, each done once: with what a case is compared, and the measure of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, Any] = {}

    def prepare(self, cases: Iterable[Case]) -> None:
        jobs = {repr(job): job for case in cases for job in (case.alone, *case.others)}
        new = [job for key, job in jobs.items() if key not in self.known]
        for job, found, why in in_processes(1, new, self.folder):
            if why is not None:
                raise RuntimeError(f"one process alone: {job}\n{why}")
            self.known[repr(job)] = found

    def of(self, case: Case) -> tuple[Found, dict[str, float], Found | None]:
        """What `compared` gets."""
        alone = read(self.known[repr(case.alone)])
        others = [read(self.known[repr(x)]) for x in case.others]
        return alone, rounding_of(alone, others), others[0] if case.in_bf16 else None


def rounding_of(alone: Found, others: Iterable[Found]) -> dict[str, float]:
    """The largest difference of runs of one process from another one."""
    found = [differences(x, alone) for x in others]
    return {name: max(x[name] for x in found) for name in MEASURES}


def read(path: Path) -> Found:
    return torch.load(path, weights_only=False)


# --------------------------------------------------------------------------------------- processes
def in_processes(
    world: int, jobs: Sequence[Job], folder: Path
) -> Iterator[tuple[Job, Path | None, str | None]]:
    """Run jobs on so many processes; for each the file of what was `Found`, or why there is none.

    The processes go from one job to the next. After one that fails or hangs new ones are started.
    """
    context = multiprocessing.get_context("spawn")
    left = list(jobs)
    while left:
        models = [(job, str(save_model(job.family, job.tied, folder))) for job in left]
        runs = Path(tempfile.mkdtemp(dir=folder))
        answers = context.Queue()
        given = world, free_port(), models, str(runs), answers
        crew = [context.Process(target=process, args=(rank, *given)) for rank in range(world)]
        for each in crew:
            each.start()
        why = None
        try:
            while left and why is None:
                try:
                    found, why = answers.get(timeout=PATIENCE_S)
                except queue.Empty:
                    found, why = None, f"nothing came for {PATIENCE_S} s"
                yield left.pop(0), found, why
        finally:
            for each in crew:
                if why is not None or left:
                    each.kill()
                each.join()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# -------------------------------------------------------------------------------------------- rows
def run(
    wanted: Sequence[Case], folder: Path, done: Sequence[Mapping[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """A row for each case; ``done`` are rows of before."""
    known = {tuple(row[name] for name in Case._fields) for row in done}
    left = [case for case in wanted if tuple(case) not in known]
    baselines = Baselines(folder)
    for mine in crews(left):
        baselines.prepare(mine)
        started, runs = time.perf_counter(), [case.job for case in mine]
        for case, (_, path, why) in zip(mine, in_processes(mine[0].ranks, runs, folder)):
            took, started = time.perf_counter() - started, time.perf_counter()
            row = {"op": OP, **case._asdict(), "seconds": round(took, 2)}
            row |= {"trains": case.trains, "tied": case.alone.tied, "evaluated": case.job.evaluates}
            if path is None:
                yield {**row, "note": (why or "").strip().splitlines()[-1], "why": why}
            else:
                yield row | compared(case, read(path), *baselines.of(case))


def crews(cases: Sequence[Case]) -> list[list[Case]]:
    """Those that the same processes run one after the other: DeepSpeed sets its own up."""
    found: dict[Any, list[Case]] = {}
    for case in cases:
        of_heads = not case.extra and case.family == "llama"
        key = case.ranks, bool(case.job.environment), of_heads
        found.setdefault(key, []).append(case)
    return [*found.values()]


def compared(
    case: Case,
    found: Found,
    alone: Found,
    rounding: Mapping[str, float],
    exact: Found | None = None,
) -> dict[str, Any]:
    """What a row says of a run: differences, what they are measured by, and what is wrong.

    Args:
        exact: of a run in bf16, what one process finds in fp32.
    """
    off = differences(found, alone)
    norms, limit = found.values["grad_norm"], TrainConfig(**CONFIG).max_grad_norm
    row = {
        "differences": off,
        "rounding": dict(rounding),
        "routes": dict(found.routes),
        "batches": found.batches,
        "fillers": found.fillers,
        "grad_norms": norms,
    }
    problems = [f"{x} off by {y:.1e}" for x, y in off.items() if y > WITHIN * rounding[x]]
    least = rounding["gradients"] / WITHIN
    if exact is not None and differences(found, exact)["gradients"] < least:
        problems.append("computed in fp32")
    if found.counts != alone.counts:
        problems.append(f"counts {found.counts}, not {alone.counts}")
    if max(found.routes, key=found.routes.__getitem__) != case.goes:
        problems.append(f"took {dict(found.routes)}")
    if min(norms) <= limit:
        problems.append(f"clipped nothing, norms {norms}")
    options = ENGINES[case.engine].options
    if case.ranks > options.get("sp_size", 1):
        if len({*map(tuple, found.batches)}) == 1:
            problems.append("all processes have as many micro-batches")
        if "engine" in options and not any(found.fillers):
            problems.append("none was topped up")
    return {**row, "note": "; ".join(problems) or None}


def line(row: Mapping[str, Any]) -> str:
    """A row in a line."""
    what = ", ".join(str(row[name]) for name in Case._fields if row[name] != "")
    told = row["note"] or "  ".join(f"{x} {y:.1e}" for x, y in row["differences"].items())
    return f"{row['seconds']:6.1f} s  {what}: {told}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line("bench.parallel", __doc__)
    parser.add_argument("--out", type=Path, help="file of rows; what it has is not run again")
    parser.add_argument("--report", type=Path, help="print the tables of a file and run nothing")
    parser.add_argument("--ranks", type=int, nargs="+", help="of these numbers of processes")
    for name, known in (("engine", ENGINES), ("route", ROUTES), ("extra", EXTRAS)):
        parser.add_argument(f"--{name}", nargs="+", choices=[*known], help="of these alone")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run and write, or report; 1 where a run differs."""
    args = parse(arguments)
    if args.report:
        print(markdown(load([args.report]), []))
        return 0
    wanted = [
        case
        for case in cases()
        if all(
            getattr(args, name) is None or getattr(case, name) in getattr(args, name)
            for name in ("ranks", "engine", "route", "extra")
        )
    ]
    if importlib.util.find_spec("deepspeed") is None:
        print("deepspeed is not installed: without its engine")
        wanted = [case for case in wanted if not case.job.environment]
    here = where(torch.device("cpu"), args.commit, *PACKAGES) | {"threads": 1}
    done = matching(resume(args.out), here) if args.out else []
    started, failed = time.perf_counter(), 0
    with tempfile.TemporaryDirectory(prefix="fastdpo-bench-") as folder:
        for row in run(wanted, Path(folder), done):
            failed += bool(row["note"])
            print(line(append(args.out, {**row, **here})), flush=True)
    print(f"{time.perf_counter() - started:.0f} s, {failed} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
