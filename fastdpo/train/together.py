"""What one process cannot do, none of them goes on from."""

from collections.abc import Callable
from typing import Any, TypeVar

from fastdpo.errors import ConfigError, DataError, ModelError

Result = TypeVar("Result")

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


def of_first(engine: Any, work: Callable[[], Result]) -> Result:
    """What the first process makes, for all of them; they wait for it, and fail with it."""
    found: list[Any] = together(engine.accelerator, lambda: work() if engine.is_main else None)
    return found[0]
