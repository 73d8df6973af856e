"""The command line on several processes, as a launcher starts them, forked from one that has
everything imported.

    python launched.py '[{"argv": [...], "log": "FOLDER", "count": 2, "before": "module:function"}]'

Runs the launches one after the other, and prints a JSON list of their exit codes, of each process
in its order. A launch may name a function that each process calls with its rank before it begins,
and whether the others are ended where one has failed (``"ends_others": true``), as torchrun does.
Output goes to FOLDER/0.out, FOLDER/0.err, FOLDER/1.out, ...
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HEAVY = ("fastdpo.cli", "fastdpo.rounds.run", "transformers.generation.utils", "accelerate")


def warm_up() -> None:
    for name in HEAVY:
        importlib.import_module(name)


def launch(
    argv: Sequence[str],
    log: Path,
    count: int = 2,
    before: Callable[[int, dict[int, int]], Any] = lambda rank, others: None,
    *,
    ends_others: bool = False,
) -> list[int]:
    """Exit codes of the processes; ``before`` gets the rank, and of later ones the processes with
    their ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.mkdir(parents=True, exist_ok=True)
    pids: dict[int, int] = {}
    for rank in reversed(range(count)):  # the first one last, which knows the others then
        pid = os.fork()
        if pid == 0:
            _be(rank, count, port, argv, log, lambda rank=rank: before(rank, pids))
        pids[pid] = rank
    codes: dict[int, int] = {}
    while len(codes) < count:
        pid, status = os.wait()
        codes[pids[pid]] = os.waitstatus_to_exitcode(status)
        if codes[pids[pid]] and ends_others:
            time.sleep(0.1)
            for other, rank in pids.items():
                if rank not in codes:
                    os.kill(other, signal.SIGTERM)
    return [codes[rank] for rank in range(count)]


def _be(rank: int, count: int, port: int, argv: Sequence[str], log: Path, before: Any) -> None:
    """Become one of the processes."""
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            with (log / f"{rank}.{name}").open("wb") as file:
                os.dup2(file.fileno(), number)
        if count > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
        before()
        from fastdpo.cli import main

        code = main(argv)
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    warm_up()
    found = []
    for given in json.loads(sys.argv[1]):
        place = given.pop("before", None)
        if place is not None:
            module, name = place.split(":")
            given["before"] = getattr(importlib.import_module(module), name)
        found.append(launch(given.pop("argv"), Path(given.pop("log")), **given))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
