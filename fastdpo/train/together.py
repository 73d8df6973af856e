"""What one process cannot do, none of them goes on from."""

import time
from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar

from torch.distributed import group

from fastdpo.errors import ConfigError, DataError, ModelError

Result = TypeVar("Result")
_calls = count()  # as many on each process

_KINDS = {kind.__name__: kind for kind in (ConfigError, DataError, ModelError, OSError)}


def together(accelerator: Any, work: Callable[[], Result]) -> list[Result]:
    """Do something on each process, and wait for all; where one fails, all raise its error.

    Between others' exchanges, none of which may be in ``work`` unless it fails on all alike: a
    process that left one in the middle would answer the next with something else.

    Args:
        work: takes nothing; what it returns can be pickled.

    Returns:
        What it returned on each process, in their order.

    Raises:
        Exception: the process's own; on the others that of the first that failed, of its class
            where that is one of `fastdpo.errors` or OSError.
    """
    from accelerate.utils import gather_object

    own, result = None, None
    try:
        result = work()
    except Exception as error:
        own = error
    _await(accelerator.num_processes)
    told = None if own is None else (type(own).__name__, str(own))
    found: list[Any] = gather_object([(told, result)])
    failed = {rank: error for rank, (error, _) in enumerate(found) if error is not None}
    if own is not None:
        raise own
    for rank, (kind, text) in failed.items():
        if kind in _KINDS:
            raise _KINDS[kind](text)
        raise RuntimeError(f"process {rank} of {len(found)}: {kind}: {text}")
    return [result for _, result in found]


def _await(world: int) -> None:
    """Return when all processes are here, however long one takes.

    An exchange has a limit, of ten minutes on GPUs, and a large policy takes longer to write and to
    sum up.
    """
    if world == 1:
        return
    store: Any = group.WORLD.get_group_store()  # type: ignore[union-attr]
    name = f"fastdpo/here-{next(_calls)}"
    store.add(name, 1)
    pause = 0.001
    while store.add(name, 0) < world:
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def of_first(engine: Any, work: Callable[[], Result]) -> Result:
    """What the first process makes, for all of them; they wait for it, and fail with it."""
    found: list[Any] = together(engine.accelerator, lambda: work() if engine.is_main else None)
    return found[0]
