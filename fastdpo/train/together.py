"""What one process cannot do, none of them goes on from."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

from torch import distributed

from fastdpo.errors import ConfigError, DataError, ModelError

Result = TypeVar("Result")
_count = {"works": 0, "calls": 0}  # of `telling`, and of `together` in it; alike on each process

_KINDS = {kind.__name__: kind for kind in (ConfigError, DataError, ModelError, OSError)}


@contextmanager
def telling() -> Iterator[None]:
    """Around a work of all processes: the error that one ends with is told to the others.

    Those that wait for it in `together` raise it too, instead of waiting for good.  All processes
    enter it equally often.
    """
    _count.update(works=_count["works"] + 1, calls=0)
    word = _word()
    try:
        yield
    except BaseException as error:
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            told = distributed.get_rank(), *_told(error)
            with suppress(RuntimeError):  # the store is gone, and the others know it
                _store().compare_set(word, "", json.dumps(told))
        raise


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
    found: list[Any] = gather_object([(None if own is None else _told(own), result)])
    if own is not None:
        raise own
    for rank, (error, _) in enumerate(found):
        if error is not None:
            _fail(rank, *error)
    return [result for _, result in found]


def _told(error: BaseException) -> tuple[str, str]:
    return type(error).__name__, str(error)


def _fail(rank: int, kind: str, text: str) -> NoReturn:
    """Raise another process's error."""
    if kind in _KINDS:
        raise _KINDS[kind](text)
    raise RuntimeError(f"process {rank} of {distributed.get_world_size()}: {kind}: {text}")


def _store() -> Any:
    return distributed.group.WORLD.get_group_store()  # type: ignore[union-attr]


def _word() -> str:
    """Where in the store the error of a process is that ended."""
    return f"fastdpo/{_count['works']}/failed"


def _await(world: int) -> None:
    """Return when all processes are here, however long one takes.

    An exchange has a limit, of ten minutes on GPUs, and a large policy takes longer to write and to
    sum up.  A process that has ended with an error doesn't come: its error is raised.
    """
    if world == 1:
        return
    store, name = _store(), f"fastdpo/{_count['works']}/here-{_count['calls']}"
    _count["calls"] += 1
    store.add(name, 1)
    pause = 0.001
    while store.add(name, 0) < world:
        # It may have ended since, after it was here.
        if store.check([_word()]) and store.add(name, 0) < world:
            _fail(*json.loads(store.get(_word())))
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def of_first(engine: Any, work: Callable[[], Result]) -> Result:
    """What the first process makes, for all of them; they wait for it, and fail with it."""
    found: list[Any] = together(engine.accelerator, lambda: work() if engine.is_main else None)
    return found[0]
