"""The columns of a row of preference data: texts, numbers, labels and scores, each checked.

A cell of a CSV file is a string; numbers, labels and lists are read out of it.  Errors name the
column, and the caller the row (`fastdpo.data.records.placed`).
"""

import ast
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from fastdpo.data.records import OLD_SMOOTHING, Text
from fastdpo.errors import DataError, is_number

_TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# What an example counts beside its tokens, by the names of `fastdpo.data.examples`.
COUNTS = ("weight", "label_smoothing", "margin")
_RANGES = {"weight": (0.0, float("inf")), "label_smoothing": (0.0, 1.0)}


def require_column(row: dict[str, Any], column: str) -> None:
    """Refuse a row without the column."""
    if column not in row:
        raise DataError(f"column {column!r} is missing; it has {sorted(row)}. Add it.")


def text_column(row: dict[str, Any], column: str, *, may_be_empty: bool = False) -> Text:
    """A string or list of messages."""
    require_column(row, column)
    return _text(row[column], column, may_be_empty=may_be_empty)


def texts_column(row: dict[str, Any], column: str) -> list[Text]:
    """A list of strings, or of lists of messages."""
    values = _list_column(row, column)
    names = (f"{column}[{i}]" for i in range(len(values)))
    return [_text(value, name, may_be_empty=True) for value, name in zip(values, names)]


def numbers(row: dict[str, Any], columns: tuple[str, ...]) -> dict[str, float]:
    """Those of the columns that have a number; null and an empty cell are none."""
    found = {}
    for column in columns:
        value = _number(row.get(column))
        if value is None or value == "":
            continue
        low, high = _RANGES.get(column, (float("-inf"), float("inf")))
        if not is_number(value) or not low <= value <= high:
            wanted = "a finite number" + (f" >= {low:g}" if low > -1e300 else "")
            wanted = f"a number from {low:g} to {high:g}" if high < 1e300 else wanted
            raise DataError(f"{column} is {row[column]!r}. Write {wanted}, or leave it out.")
        found[column] = float(value)
    return found


def scores_column(row: dict[str, Any], count: int) -> list[float]:
    """The scores of `count` responses, higher is better: `scores`, `rewards`, or by `ranks`.

    Rank 1 is the best; of n responses it scores n - 1, and the last 0.
    """
    given = [name for name in ("scores", "rewards", "ranks") if row.get(name) is not None]
    if len(given) != 1:
        has = f"it has {' and '.join(given)}" if given else f"it has {sorted(row)}"
        raise DataError(
            "a list needs one of the columns scores, rewards (both: higher is better) and ranks (1 "
            f"is the best); {has}. Write one number a response."
        )
    column = given[0]
    values = [_number(value) for value in _list_column(row, column)]
    if len(values) != count:
        raise DataError(
            f"{column} has {len(values)} entries for {count} responses. Write one for each."
        )
    if not all(map(is_number, values)):
        wrong = next(value for value in values if not is_number(value))
        raise DataError(f"{column} has {wrong!r} among its entries. Write finite numbers.")
    if column != "ranks":
        return [float(value) for value in values]
    if sorted(values) != list(range(1, count + 1)):
        ties = len(set(values)) < count
        raise DataError(
            f"ranks are {values}{', with ties' if ties else ''}. Write each of 1 to {count} once, "
            "1 for the best, or give scores, which may be equal."
        )
    return [float(count - rank) for rank in values]


def flag(row: dict[str, Any], column: str, default: bool | None = None) -> bool:
    """True or false, `default` where nothing is there."""
    value = row.get(column)
    known = {None: default, True: True, False: False, "true": True, "false": False, "": default}
    value = value.lower() if isinstance(value, str) else value  # a CSV cell
    if not isinstance(value, bool | str | None) or known.get(value) is None:
        raise DataError(f"{column} is {value!r}. Write true or false.")
    return known[value]  # type: ignore[return-value]


def others(row: dict[str, Any], *used: str) -> dict[str, Any]:
    """The tools and keyword arguments for the chat template, each as it is or as JSON; and as
    `extra` the columns that are neither these nor `used`."""
    tools, template_kwargs = (_parsed(row, column) for column in _TEMPLATE_COLUMNS)
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"tools is {_kind(tools)}. Write a list, or a list as JSON.")
    if template_kwargs is not None and not isinstance(template_kwargs, dict):
        raise DataError(f"chat_template_kwargs is {_kind(template_kwargs)}. Write an object.")
    for column in ("image", "images"):
        if row.get(column):
            raise DataError(f"images can't be trained on. Remove the column {column!r}.")
    extra = {k: v for k, v in row.items() if k not in used and k not in _TEMPLATE_COLUMNS}
    return {"tools": tools, "chat_template_kwargs": template_kwargs or {}, "extra": extra}


def refuse_old_names(row: dict[str, Any]) -> None:
    """Refuse a value by a name that a column had before, and which no longer counts."""
    if row.get(OLD_SMOOTHING) not in (None, ""):
        raise DataError(
            f"{OLD_SMOOTHING} is no column that is read. Rename it to label_smoothing, or remove "
            "it."
        )


def warn_of_near_names(source: str, rows: Iterable[Mapping[str, Any]], read: Iterable[str]) -> None:
    """Warn once for each column that is not read but called nearly as one of `read` that is not
    there: `weights`, `chosen_score`, `lable_smoothing`. Columns without a value do not count."""
    given = {name for row in rows for name, value in row.items() if value not in (None, "")}
    missing = {name: _letters(name) for name in read if name not in given}
    for name in sorted(given.difference(read)):
        same = [x for x, letters in missing.items() if letters == _letters(name)]
        near = same or get_close_matches(name.lower(), missing, 1, cutoff=0.88)
        if near:
            warnings.warn(
                f"{source}: the column {name!r} is not read; {near[0]!r} would be. Rename it if "
                "that is what it holds.",
                stacklevel=4,
            )


def _letters(name: str) -> list[str]:
    """What stays the same of a name with its words in another order, in the plural, in another
    case, or with two letters exchanged."""
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+", name)
    return sorted("".join(word.lower().removesuffix("s") for word in words))


def _text(value: Any, column: str, *, may_be_empty: bool) -> Text:
    if isinstance(value, str):
        value = _messages_in(value, column) or value
    if not isinstance(value, str | list):
        raise DataError(f"{column} is {_kind(value)}. Write a string or a list of messages.")
    if not value and not may_be_empty:
        raise DataError(f"{column} is empty. Fill it in or remove the row.")
    if isinstance(value, str):
        return value
    for message in value:
        problem = _message_problem(message)
        if problem:
            raise DataError(
                f"a message in {column} {problem}. "
                'Write every message as {"role": ..., "content": ...}.'
            )
    # A call of a tool without content: some templates ask whether the content is none.
    return [message if "content" in message else {**message, "content": None} for message in value]


def _messages_in(text: str, column: str) -> list[dict[str, Any]] | None:
    """The messages that a string holds as JSON; None where it is a text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        if _is_python(text):
            raise DataError(
                f"{column} is a list of messages as Python prints it. Write it as JSON, "
                "by json.dumps."
            ) from None
        return None
    return found if _are_messages(found) else None


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and not any(map(_message_problem, value))


def _is_python(text: str) -> bool:
    """Whether a string is what str() makes of messages; arrays of NumPy have no commas."""
    try:
        return _are_messages(ast.literal_eval(re.sub(r"\}\s*\{", "}, {", text.strip())))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False


def _message_problem(message: Any) -> str | None:
    if not isinstance(message, dict):
        return f"is {_kind(message)}, not an object"
    if not isinstance(message.get("role"), str):
        return "has no role" if message.get("role") is None else "has a role that is not a string"
    content = message.get("content")
    if content is None:
        # A call of a tool stands in for the content.
        return None if message.get("tool_calls") else "has no content"
    if not isinstance(content, str | list):
        return f"has {_kind(content)} as its content"
    kinds = [x.get("type") for x in content if isinstance(x, dict)]  # type: ignore[union-attr]
    media = next((x for x in kinds if re.search("image|audio|video", str(x))), None)
    return None if media is None else f"has a part of type {media!r}, which can't be trained on"


def _list_column(row: dict[str, Any], column: str) -> list[Any]:
    """A list, as it is or as JSON."""
    require_column(row, column)
    value = _parsed(row, column)
    if not isinstance(value, list):
        raise DataError(f"{column} is {_kind(value)}. Write a list, or a list as JSON.")
    return value


def _number(value: Any) -> Any:
    """A CSV cell as the number that it holds; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) and value.strip() else value
    except ValueError:
        return value


def _parsed(row: dict[str, Any], column: str) -> Any:
    value = row.get(column)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise DataError(f"{column} is not valid JSON ({error}). Fix it.") from error


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
