"""Run the command line again and again, and kill it (SIGKILL) at random moments of every stage.

    python random_kills.py SEED KILLS COUNT OUT iterate ...

First OUT/whole is left to end, to learn how long each stage takes. Then OUT/killed is killed KILLS
times in each stage, after a random part of that time, and at last left to end. Where the command is
launched as COUNT processes over 1, now all of them are killed and now one, after which the others
are ended as a launcher does. Each attempt is forked from this process, which has everything
imported, so that moments fall into the work and not into imports. Prints a JSON object: the stages,
where each kill fell, whether files of samples and scores that were there were written again, and
the exit codes of the two that ended.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

from launched import launch, warm_up

WORK = ("candidates/part-*.jsonl", "scores*/part-*.jsonl")


def attempt(
    argv: list[str], run: Path, count: int, stage: int | None, delay: float = 0.0, victim: int = -1
) -> int:
    """Exit code of the command; it is killed some seconds into a stage, unless it ended by then:
    all of its processes, or one of them."""

    def before(rank: int, others: dict[int, int]) -> None:
        if rank == 0:
            pids = {**others, os.getpid(): 0}
            victims = [pid for pid, rank in pids.items() if victim in (-1, rank)]
            watch(run.with_suffix(".seconds"), stage, delay, victims)

    argv = [*argv, f"--output_dir={run}"]
    codes = launch(argv, run.with_suffix(".log"), count, before, ends_others=True)
    return next((code for code in codes if code == -signal.SIGKILL), codes[0])


def watch(times: Path, target: int | None, delay: float, victims: list[int]) -> None:
    """In this process, note how long stages take, and set the clock of the end in one of them."""
    from fastdpo.rounds.resume import Stages

    def kill() -> None:
        for pid in victims:  # this process is the last
            os.kill(pid, signal.SIGKILL)

    run_stage, clocks = Stages.run, []

    def stage(self, name, work, **options):
        # Where an earlier kill came after its stage, this one is of the next.
        if not clocks and target is not None and len(self.done) >= target and name not in self.done:
            clocks.append(threading.Timer(delay, kill))
            clocks[0].daemon = True
            clocks[0].start()
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
    seed, kills, count = map(int, sys.argv[1:4])
    out, argv = Path(sys.argv[4]), sys.argv[5:]
    warm_up()
    rng, whole, run = random.Random(seed), out / "whole", out / "killed"
    codes = [attempt(argv, whole, count, None)]
    seconds = [float(x) for x in whole.with_suffix(".seconds").read_text().split()]
    names = stages(whole)
    places, again = [], []
    known: dict[str, list[int]] = {}
    for stage, took in enumerate(seconds):
        for _ in range(kills):
            victim = rng.randrange(-1, count) if count > 1 else -1
            delay = rng.uniform(0, took)
            if attempt(argv, run, count, stage, delay, victim) != -signal.SIGKILL:
                continue
            places.append(dict(enumerate(names)).get(len(stages(run)), "the end"))
            found = work(run)
            again += [path for path, value in known.items() if found.get(path) != value]
            known = found
    codes.append(attempt(argv, run, count, None))
    found = work(run)
    again += [path for path, value in known.items() if found.get(path) != value]
    print(json.dumps({"stages": names, "places": places, "again": again, "codes": codes}))


if __name__ == "__main__":
    main()
