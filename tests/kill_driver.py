"""Run the command line, and kill this process (SIGKILL) at the n-th call of one function.

    python kill_driver.py module:function N command ...

``os:replace`` and ``pathlib:Path.rename`` kill between a temporary name and the final one.
"""

import importlib
import os
import signal
import sys


def arm(place: str, countdown: int) -> None:
    module_name, name = place.split(":")
    owner = importlib.import_module(module_name)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, name)
    calls = [0]

    def deadly(*args, **kwargs):
        calls[0] += 1
        if calls[0] == countdown:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, deadly)


if __name__ == "__main__":
    if sys.argv[1] != "none":
        arm(sys.argv[1], int(sys.argv[2]))
    from fastdpo.cli import main

    sys.exit(main(sys.argv[3:]))
