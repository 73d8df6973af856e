"""Run the command line again and again, and kill it (SIGKILL) at random moments of every stage.

    python random_kills.py SEED KILLS OUT iterate ...

First OUT/whole is left to end, to learn how long each stage takes. Then OUT/killed is killed KILLS
times in each stage, after a random part of that time, and at last left to end. Each attempt is
forked from this process, which has everything imported, so that moments fall into the work and not
into imports. Prints a JSON object: the stages, where each kill fell, whether files of samples and
scores that were there were written again, and the exit codes of the two that ended.
"""

import importlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

WORK = ("candidates/part-*.jsonl", "scores*/part-*.jsonl")


def attempt(argv: list[str], run: Path, stage: int | None, delay: float = 0.0) -> int:
    """Exit code of the command; it is killed some seconds into a stage, unless it ended by then."""
    pid = os.fork()
    if pid == 0:
        with run.with_suffix(".log").open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        watch(run.with_suffix(".seconds"), stage, delay)
        from fastdpo.cli import main

        os._exit(main([*argv, f"--output_dir={run}"]))
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def watch(times: Path, target: int | None, delay: float) -> None:
    """In this process, note how long stages take, and set the clock of the end in one of them."""
    from fastdpo.rounds.resume import Stages

    run_stage = Stages.run

    def stage(self, name, work, **options):
        if len(self.done) == target and name not in self.done:
            timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        before, started = len(self.done), time.perf_counter()
        run_stage(self, name, work, **options)
        if len(self.done) > before:
            with times.open("a") as file:
                file.write(f"{time.perf_counter() - started}\n")

    Stages.run = stage  # type: ignore[method-assign]


def stages(run: Path) -> list[str]:
    """The stages that are done."""
    state = run / "state.json"
    return json.loads(state.read_text())["done"] if state.exists() else []


def work(run: Path) -> dict[str, list[int]]:
    """The files that cost samples and scores, and what would change if they were written again."""
    return {
        str(path): [path.stat().st_ino, path.stat().st_mtime_ns]
        for pattern in WORK
        for path in sorted(run.glob(f"**/{pattern}"))
    }


def main() -> None:
    seed, kills, out, argv = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    for name in (
        "fastdpo.cli",
        "fastdpo.rounds.run",
        "transformers.generation.utils",
        "accelerate",
    ):
        importlib.import_module(name)
    rng, whole, run = random.Random(seed), out / "whole", out / "killed"
    codes = [attempt(argv, whole, None)]
    seconds = [float(x) for x in whole.with_suffix(".seconds").read_text().split()]
    names = stages(whole)
    places, again = [], []
    known: dict[str, list[int]] = {}
    for stage, took in enumerate(seconds):
        for _ in range(kills):
            if attempt(argv, run, stage, rng.uniform(0, took)) != -signal.SIGKILL:
                continue
            places.append(dict(enumerate(names)).get(len(stages(run)), "the end"))
            found = work(run)
            again += [path for path, value in known.items() if found.get(path) != value]
            known = found
    codes.append(attempt(argv, run, None))
    found = work(run)
    again += [path for path, value in known.items() if found.get(path) != value]
    print(json.dumps({"stages": names, "places": places, "again": again, "codes": codes}))


if __name__ == "__main__":
    main()
