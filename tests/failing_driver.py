"""One process of a launch, of which the second fails in a way of its own.

    torchrun --nproc-per-node 2 failing_driver.py HOW command ...

HOW is "disk" (no file of it grows beyond 4 KiB), "model" or "bug" (its third step raises an error a
user can mend, or another), "killed" (then it dies), or "none".
"""

import os
import resource
import signal
import sys


def fail_in_step(how: str) -> None:
    from fastdpo.errors import ModelError
    from fastdpo.train import trainer

    real, calls = trainer.take_step, []

    def take_step(*args):
        calls.append(1)
        if len(calls) == 3:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise (
                ModelError("the second is broken") if how == "model" else KeyError("of the second")
            )
        return real(*args)

    trainer.take_step = take_step


if __name__ == "__main__":
    from fastdpo.cli import main

    how, argv = sys.argv[1], sys.argv[2:]
    if os.environ["RANK"] == "1" and how == "disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    elif os.environ["RANK"] == "1" and how != "none":
        fail_in_step(how)
    sys.exit(main(argv))
