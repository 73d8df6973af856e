"""The errors that a user can mend, and the checks of options that raise them.

Each says in one line which argument, option, file or row is wrong, its value, and what to do. Where
that is code of the user's own, its lines follow.
"""

import math
from collections.abc import Sequence
from dataclasses import MISSING, fields
from numbers import Real
from typing import Any, TypeGuard


class DataError(ValueError):
    """Something is wrong with the data; the message says where, what, and how to fix it."""


class ModelError(ValueError):
    """A model or tokenizer that cannot be loaded or used."""


class ConfigError(ValueError):
    """An option with an impossible value; the message begins with ``name=value``."""


class ProcessError(RuntimeError):
    """One of several processes failed, and not the first one; the message begins with which."""


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first of them, for a message, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def one_line(error: object, most: int = 300) -> str:
    """The first of an error's text, in one line."""
    return " ".join(str(error).split())[:most]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number that a float can hold; True and False are none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int above the largest float
        return False


def require(config: Any, name: str, holds: bool, wanted: str) -> None:
    """Raise a `ConfigError` unless the option holds; NaN and infinity never do."""
    value = getattr(config, name)
    finite = not isinstance(value, float) or math.isfinite(value)
    if not (holds and finite):
        raise ConfigError(f"{name}={value} must be {wanted}")


def require_used(config: Any, name: str, used: bool, otherwise: str) -> None:
    """Raise a `ConfigError` where an option that nothing uses is not at its default."""
    idle = not used and not is_default(config, name)
    require(config, name, not idle, f"left out, where it has no effect, or {otherwise}")


def is_default(config: Any, name: str) -> bool:
    """Whether a field of a dataclass has its default value, as one that nothing uses must."""
    field = next(field for field in fields(config) if field.name == name)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return getattr(config, name) == default
