"""Train on several processes again and again, and kill them (SIGKILL) at random moments.

    python launch_kills.py SEED EARLY KILLS PROCESSES FEWER OUT train ...

First OUT/whole is left to end, to learn how long the work takes. A launch is that of ``torchrun``,
but for its processes, which are forked from this one, so that moments fall into the work and not
into imports. Then OUT/killed is started again and again by the same command: each time, at a random
moment, either the launcher and all processes are killed, or one of them, for whose end the launcher
has to end the rest. EARLY moments are spread over what comes before training: the processes join
each other, load and prove the model, compute the reference. KILLS come a random way further in
training; a run that ends before its kill is begun anew in its place. At last it is left to end, and
a copy of it, taken after a kill, on FEWER processes. Prints a JSON object: where each kill fell,
the seconds in which the rest ended where one was killed, and the exit codes of the three that
ended.
"""

import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

_LIMIT = 300.0  # seconds for a launch to begin, or to end when one of its processes is dead


def command(argv: list[str]) -> None:
    from fastdpo.cli import main

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the launcher's, of which it is a fork
    sys.exit(main(argv))


def agent(count: int, argv: list[str], log: Path) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.setsid()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", run_id="kills", monitor_interval=0.1, start_method="fork",
        max_restarts=0,
    )  # fmt: skip
    elastic_launch(config, command)(argv)


def launch(count: int, argv: list[str], run: Path) -> Any:
    given = count, [*argv, f"--output_dir={run}"], run.with_suffix(".log")
    launched = multiprocessing.get_context("fork").Process(target=agent, args=given)
    launched.start()
    return launched


def ended(launched: Any, limit: float | None = None) -> int | None:
    """Its exit code, None where it has none within the limit."""
    launched.join(limit)
    return launched.exitcode


def workers(launcher: int) -> list[int]:
    """The processes that a launcher started."""
    tasks = Path(f"/proc/{launcher}/task").glob("*/children")
    return [int(x) for task in tasks for x in task.read_text().split()]


def begun(launched: Any, run: Path) -> float:
    """When the work of a launch began: the first process took the folder."""
    owner, started = run / ".lock.owner", time.monotonic()
    while time.monotonic() - started < _LIMIT:
        held = owner.read_text().split()[1:2] if owner.is_file() else []
        if held and int(held[0]) in workers(launched.pid):
            return time.monotonic()
        if launched.exitcode is not None:
            raise RuntimeError(f"a launch ended with {launched.exitcode} before it began")
        time.sleep(0.01)
    raise RuntimeError("a launch did not begin")


def kill(launched: Any, victim: int | None) -> float:
    """Kill one process, or all; returns the seconds until nothing was left of the launch."""
    found, started = workers(launched.pid), time.monotonic()
    pids = [launched.pid, *found] if victim is None else [found[victim]]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    ended(launched, _LIMIT)
    while any(Path(f"/proc/{pid}").exists() for pid in found):
        if time.monotonic() - started > _LIMIT:
            raise RuntimeError("a process outlived the launch")
        time.sleep(0.05)
    return time.monotonic() - started


def rows(run: Path) -> int:
    """How many steps and evaluations a run has logged."""
    log = run / "metrics" / "metrics.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0


def since(file: Path, moment: float) -> bool:
    """Whether a file was written since a moment, in seconds as `time.time` has them."""
    return file.is_file() and file.stat().st_mtime >= moment


def part(run: Path, launched_at: float) -> str:
    """What a launch was doing, as the files tell that it wrote or has left to write."""
    if since(run / "metrics" / "metrics.jsonl", launched_at):
        return "training"
    if since(run / "fitted.json", launched_at):
        has = (run / "ref_logps" / "ref_logps.safetensors").is_file()
        return "beginning to train" if has else "computing the reference"
    return "loading" if since(run / "run.json", launched_at) else "joining or loading"


def place(run: Path) -> str:
    """What of a run is on the disk: rows of its log, checkpoints, and unfinished folders."""
    names = [x.name for x in (*run.glob("checkpoint/*step*"), *run.glob("best/.step*"))]
    names += [x.name for x in run.glob(".*.partial")]
    return f"{rows(run)} rows, {' '.join(sorted(names)) or 'no checkpoint'}"


def main() -> None:
    seed, early, kills, count, fewer = map(int, sys.argv[1:6])
    out, argv = Path(sys.argv[6]), sys.argv[7:]
    for name in ("fastdpo.cli", "transformers", "accelerate", "torch.distributed.run"):
        importlib.import_module(name)
    rng, whole, run = random.Random(seed), out / "whole", out / "killed"
    launched = launch(count, argv, whole)
    started = begun(launched, whole)
    while rows(whole) == 0 and ended(launched, 0.01) is None:
        pass
    before_training = time.monotonic() - started
    codes = [ended(launched)]
    work = time.monotonic() - started
    places, seconds = [], []
    while len(places) < early + kills:
        if len(places) < early and (run / "ref_logps").exists():
            shutil.rmtree(run)  # or it would not be computed again
        launched, launched_at = launch(count, argv, run), time.time()
        begun(launched, run)
        victim = rng.choice([None, rng.randrange(count)])
        if len(places) < early:
            pause = (len(places) + rng.random()) / early * before_training
        else:
            # Some way on from where it began, in rows of its log, whatever else a machine does.
            wanted, pause = rows(run) + rng.randrange(5), rng.uniform(0, work / 8)
            while rows(run) < wanted and ended(launched, 0.02) is None:
                pass
        if ended(launched, pause) is not None or not workers(launched.pid):
            ended(launched)
            shutil.rmtree(run)
            continue
        took = kill(launched, victim)
        seconds += [took] if victim is not None else []
        who = "all" if victim is None else f"process {victim}"
        places.append(f"{who}, {part(run, launched_at)}: {place(run)}")
        told = f"{len(places)} of {early + kills}: {places[-1]} ({took:.1f} s)"
        print(told, file=sys.stderr, flush=True)
        if list(run.glob("checkpoint/step-*")) and not (run / "policy").exists():
            shutil.rmtree(out / "fewer", ignore_errors=True)
            shutil.copytree(run, out / "fewer")
    codes += [ended(launch(count, argv, run)), ended(launch(fewer, argv, out / "fewer"))]
    print(json.dumps({"work": work, "places": places, "seconds": seconds, "codes": codes}))


if __name__ == "__main__":
    main()
