"""What is imported only when it is asked for, and packages that needn't be there."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any


def lazy(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package (PEP 562).

    Args:
        package: its ``__name__``.
        names: the module, relative to the package, that each name comes from.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{names[name]}", package), name)

    return get


@cache
def installed(package: str, extra: str, otherwise: str) -> bool:
    """Whether a package of one of our extras is installed; where not, says once what that means."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(
            f"fastdpo: {otherwise}: {package} is not installed (pip install {package}, or the "
            f"extra {extra!r})",
            file=sys.stderr,
        )
    return found
