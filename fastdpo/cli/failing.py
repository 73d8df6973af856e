"""How a command that failed ends: its error is printed once, whichever of its processes had it."""

import json
import os
import sys
from contextlib import suppress
from datetime import timedelta
from typing import Any

from fastdpo.cli.datasets import is_first

_PATIENCE = timedelta(seconds=5)  # for the first process to print what it knows too
_TIMEOUT = timedelta(seconds=10)  # for the store of the launch to answer


def in_several() -> bool:
    """Whether this is one of several processes of a launch."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def fail(text: str, status: int) -> int:
    """Print why the command failed, and return the status that its process is to end with.

    Of several processes the first prints it.  Where that knows nothing of it, and waits for the
    others in an exchange, the one that failed does; the launcher ends the rest when it has ended.
    What others fail with for want of it is not printed.  They hear of each other from the store by
    which they found each other, or will.
    """
    if not in_several():
        print(text, file=sys.stderr)
        return status
    from torch.distributed import is_initialized
    from torch.distributed.rendezvous import rendezvous

    name = f"fastdpo/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
    store: Any = None
    prints = True
    with suppress(RuntimeError, ValueError):  # it is gone, and nobody left to ask
        store = next(rendezvous("env://", timeout=_TIMEOUT))[0]
        text, status = json.loads(store.compare_set(f"{name}/why", "", json.dumps([text, status])))
        prints = is_first() or not _comes(store, f"{name}/told")
        prints = prints and store.add(f"{name}/claims", 1) == 1
    if prints:
        print(text, file=sys.stderr, flush=True)
        with suppress(RuntimeError):
            if store is not None:
                store.set(f"{name}/told", "")
                store.wait([f"{name}/told"], _PATIENCE)  # it has it before this process ends
    if is_initialized():
        sys.stdout.flush()
        os._exit(status)
    return status


def _comes(store: Any, name: str) -> bool:
    """Whether something is in the store, now or soon."""
    try:
        store.wait([name], _PATIENCE)
    except RuntimeError:
        return False
    return True
