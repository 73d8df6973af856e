"""Run the command line again and again, and kill it (SIGKILL) at random moments.

    python random_kills.py SEED KILLS OUT iterate ...

Runs go to OUT/run-0, OUT/run-1, ...: when one ends before its moment comes, the next begins.  Each
attempt is forked from this process, which has everything imported, so that moments fall into the
work and not into imports.  Prints a JSON object: where each kill fell, and whether files that were
there were written again.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

WORK = ("candidates/part-*.jsonl", "scores*/part-*.jsonl")


def attempt(argv: list[str], log: Path, seconds: float | None) -> int | None:
    """Exit code of the command, or None where it was killed after some seconds."""
    pid = os.fork()
    if pid == 0:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        from fastdpo.cli import main

        os._exit(main(argv))
    end = time.monotonic() + (seconds if seconds is not None else 1e9)
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGKILL else code


def place(run: Path) -> str:
    """The stage that a run was in."""
    state = run / "state.json"
    if not state.exists():
        return "start"
    done = json.loads(state.read_text())["done"]
    after = done[-1] if done else "nothing"
    folder = run / "round-01" / "checkpoint"
    training = after.endswith("/pair") and folder.is_dir()
    return f"after {after}" + (", with a checkpoint" if training else "")


def work(run: Path) -> dict[str, list[int]]:
    """The files that cost samples and scores, and what would change if they were written again."""
    return {
        str(path): [path.stat().st_ino, path.stat().st_mtime_ns]
        for pattern in WORK
        for path in sorted(run.glob(f"round-*/**/{pattern}"))
    }


def main() -> None:
    seed, kills, out, argv = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    for name in ("fastdpo.cli", "fastdpo.rounds", "transformers.generation.utils", "accelerate"):
        importlib.import_module(name)
    rng = random.Random(seed)

    def command(run: Path) -> list[str]:
        return [*argv, f"--output_dir={run}"]

    started = time.monotonic()
    code = attempt(command(out / "whole"), out / "whole.log", None)
    whole = time.monotonic() - started
    places, again, runs, codes = [], [], 0, [code]
    known: dict[str, list[int]] = {}
    while len(places) < kills or known:
        run = out / f"run-{runs}"
        last = len(places) >= kills
        code = attempt(
            command(run), out / f"run-{runs}.log", None if last else rng.uniform(0, whole)
        )
        found = work(run)
        again += [path for path, value in known.items() if found.get(path) != value]
        known = found
        if code is None:
            places.append(place(run))
        else:
            codes.append(code)
            runs, known = runs + 1, {}
    print(json.dumps({"places": places, "again": again, "runs": runs, "codes": codes}))


if __name__ == "__main__":
    main()
