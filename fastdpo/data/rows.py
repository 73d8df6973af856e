"""Raw preference datasets -> checked rows.

    rows = preference_rows(read_rows("pairs.jsonl"))
    result = tokenize_dataset(rows, tokenizer, max_length=2048)

The formats are those of TRL's DPOTrainer: `prompt`, `chosen` and `rejected` as strings or as
message lists, the prompt explicit or the shared beginning of both responses, with optional `tools`
and `chat_template_kwargs`. A row with `append_eos: false` has responses that don't end. Every other
column is kept in `extra`.

Messages can stand as JSON text in a string, as in a CSV cell: a string is messages when it is a
JSON list of one or more objects with a `role`, each with `content` or `tool_calls`.

A mistake in the data raises one DataError that names the place, what is wrong and the fix.
"""

import ast
import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from fastdpo.data.records import PreferenceRow, Prompt, Text, placed
from fastdpo.data.rendering import named
from fastdpo.errors import DataError
from fastdpo.storage import json_lines, read_text

_FILE_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet"}
_OTHER_SUFFIXES = {".txt", ".tsv", ".arrow", ".gz", ".zip", ".zst", ".xz", ".ndjson", ".yaml"}
Checked = TypeVar("Checked", PreferenceRow, Prompt)
_TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Rows:
    """Raw rows and where they came from.

    `lines[i]` is the 1-based line on which row i starts; None for sources without lines.
    """

    source: str
    rows: list[dict[str, Any]]
    lines: list[int] | None = None

    def where(self, i: int) -> str:
        """The place of row i, for error messages."""
        if self.lines is None:
            return f"{self.source}, row {i} (counting from 0)"
        return f"{self.source}:{self.lines[i]}"


def read_rows(
    path_or_name: str | Path,
    split: str | None = None,
    *,
    default: str = "train",
    option: str = "split",
) -> Rows:
    """Read all rows of a dataset.

    `path_or_name` is a `.jsonl`, `.json` (list of objects), `.csv` or `.parquet` file, a directory
    written by `datasets.save_to_disk`, or the name of a dataset on the Hugging Face hub. `split`
    selects from a directory with several and from the hub, by default `default`; errors call it
    `option`.

    Arrow gives every struct the keys that any row has, with null for those that a row lacks. From
    Parquet, directories and the hub, keys of structs that are null are left out, so that rows are
    those of a JSON file; a null that was written there is left out as well. Columns of the type
    `datasets.Json` are as they were written.

    Raises DataError when there is nothing there, nothing in it, or it can't be read, and when a
    split is given of what has none.
    """
    name = str(path_or_name)
    path = Path(name).expanduser()
    if path.is_dir():
        rows = Rows(name, _read_saved(path, split, default, option))
    elif path.exists():
        if split is not None:
            raise DataError(_no_split(name, split, "a file", option))
        rows = _read_file(path, name)
    elif _looks_like_a_path(name):
        raise DataError(f"{name}: no such file or directory. Check the path.")
    else:
        rows = Rows(name, _read_hub(name, split or default, option))
    if not rows.rows:
        raise DataError(f"{name}: there are no rows in it. Write one object per row.")
    return rows


def _looks_like_a_path(name: str) -> bool:
    is_hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name)
    return not is_hub_name or Path(name).suffix.lower() in _FILE_SUFFIXES | _OTHER_SUFFIXES


def _read_file(path: Path, name: str) -> Rows:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return Rows(name, _read_parquet(path))
    if suffix not in _FILE_SUFFIXES:
        raise DataError(
            f"{name}: unknown file type {suffix!r}. Convert it to .jsonl, .json, .csv or .parquet."
        )
    text = read_text(path, name)
    if suffix == ".json":
        return _parse_json(text, name)
    numbered = list(json_lines(text, name) if suffix == ".jsonl" else _csv_lines(text, name))
    return Rows(name, [row for _, row in numbered], [line for line, _ in numbered])


def _parse_json(text: str, name: str) -> Rows:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name}: not valid JSON ({error}). If it holds one object per line, name it .jsonl; "
            "otherwise it may be cut short: write it again."
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{name}: a JSON {type(rows).__name__}. Write a list of objects.")
    found = Rows(name, rows)
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(
                f"{found.where(i)}: a JSON {type(row).__name__}, not an object. "
                "Write a list of objects."
            )
    return found


def _csv_lines(text: str, name: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows and the lines that they start on.

    Every value stays a string: inferred types would turn the answers 42 and null into others.
    """
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    field_limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        header = next(reader)
        line = reader.line_num + 1
        for values in reader:
            if values and len(values) != len(header):
                raise DataError(
                    f"{name}:{line}: {len(values)} fields, the header has {len(header)}. "
                    "Quote fields that hold commas or line breaks."
                )
            if values:
                yield line, dict(zip(header, values))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name}:{reader.line_num}: not valid CSV ({error}). Fix the quotes or the cut-off row."
        ) from error
    finally:
        csv.field_size_limit(field_limit)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    from datasets import Dataset

    # The library copies what it reads into its cache; this copy goes when it was read.
    told = _told(f"{path}: can't be read as Parquet", "Write the file again.")
    with told, TemporaryDirectory() as cache:
        return _arrow_rows(Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True))


def _read_saved(path: Path, split: str | None, default: str, option: str) -> list[dict[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    with _told(
        f"{path}: not a readable dataset directory",
        "Name a file in it, or a directory written by datasets.save_to_disk.",
    ):
        dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        split = split or default
        if split not in dataset:
            raise DataError(
                f"{path}: no split {split!r}. Choose one of {sorted(dataset)} ({option})."
            )
        dataset = dataset[split]
    elif split is not None:
        raise DataError(_no_split(str(path), split, "a folder of one dataset", option))
    return _arrow_rows(dataset)


def _read_hub(name: str, split: str, option: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    with _told(
        f"{name}: no such file, and split {split!r} can't be loaded from the Hugging Face hub",
        f"Check the name, {option} and the network, or download the dataset and give a local file.",
    ):
        return _arrow_rows(load_dataset(name, split=split))


@contextmanager
def _told(what: str, mend: str) -> Iterator[None]:
    """Make of whatever a library raises a DataError."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{what} ({named(error)}). {mend}") from error


def _arrow_rows(dataset: Any) -> list[dict[str, Any]]:
    """The rows as they were before Arrow, less the null keys that it gave their structs."""
    features = dataset.features
    rows = [{k: _as_written(v, features[k]) for k, v in row.items()} for row in dataset.to_list()]
    for row in rows:
        # A prompt that another row has, and this one within its conversations.
        within = all(isinstance(row.get(side), list) for side in ("chosen", "rejected"))
        if within and row.get("prompt", "") is None:
            del row["prompt"]
    return rows


def _as_written(value: Any, feature: Any) -> Any:
    if isinstance(feature, dict) and isinstance(value, dict):
        return {k: _as_written(v, feature[k]) for k, v in value.items() if v is not None}
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if inner is not None and isinstance(value, list):
        return [_as_written(x, inner) for x in value]
    return value


def _no_split(name: str, split: str, what: str, option: str) -> str:
    return f"{name}: {what} has no splits, but {option}={split!r} is given. Leave {option} out."


def preference_rows(rows: Rows) -> list[PreferenceRow]:
    """Check preference data and bring it to one form.

    Without a prompt column the prompt is what both responses begin with, as in TRL's
    `extract_prompt`: whole messages, or characters less a trailing space. The same holds for a
    string prompt beside whole conversations, which must repeat it in a message. A pair of equal
    responses passes, and one with an empty response: `tokenize_dataset` drops and counts them.

    Raises DataError at the first malformed row.
    """
    return _checked(rows, _preference_row)


def prompt_rows(rows: Rows) -> list[Prompt]:
    """Check prompts: a `prompt` column of strings or message lists, all other columns kept.

    Raises DataError at the first malformed row.
    """
    return _checked(
        rows,
        lambda row, where: Prompt(where, _text_column(row, "prompt"), *_others(row, "prompt")),
    )


def _checked(rows: Rows, check: Callable[[dict[str, Any], str], Checked]) -> list[Checked]:
    result = []
    for i, row in enumerate(rows.rows):
        with placed(rows.where(i)):
            result.append(check(row, rows.where(i)))
    return result


def _preference_row(row: dict[str, Any], where: str) -> PreferenceRow:
    chosen = _text_column(row, "chosen", may_be_empty=True)
    rejected = _text_column(row, "rejected", may_be_empty=True)
    prompt = _text_column(row, "prompt") if "prompt" in row else None
    if not chosen or not rejected:
        prompt = prompt or chosen or rejected  # dropped later, whatever the prompt
    else:
        prompt, chosen, rejected = _explicit(prompt, chosen, rejected)
    others = _others(row, "prompt", "chosen", "rejected", "append_eos")
    return PreferenceRow(where, prompt, chosen, rejected, *others, _append_eos(row))


def _explicit(prompt: Text | None, chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Prompt and responses of one format, the prompt taken out of the responses."""
    conversational = isinstance(chosen, list)
    if conversational != isinstance(rejected, list):
        raise DataError(
            "one response is a string and the other a message list. Write both in the same format."
        )
    if prompt is None or (conversational and isinstance(prompt, str)):
        given, (prompt, chosen, rejected) = prompt, _extract_prompt(chosen, rejected)
        if given is not None and given not in [m.get("content") for m in prompt]:  # type: ignore[union-attr]
            raise DataError(
                "prompt is a string, the responses are message lists that don't begin "
                "with it. Write the prompt as a message list too."
            )
    elif isinstance(prompt, list) != conversational:
        raise DataError(
            "prompt is a message list, the responses are strings. "
            "Write all three in the same format."
        )
    elif conversational and chosen[: len(prompt)] == prompt:
        raise DataError(
            "the responses repeat the messages of the prompt. "
            "Remove the prompt column, or these messages from the responses."
        )
    return prompt, chosen, rejected  # type: ignore[return-value]


def _extract_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split two conversations or strings at their first difference."""
    # Where one is the beginning of the other, the last element still belongs to the response.
    limit = min(len(chosen), len(rejected)) - 1
    split = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    differs = chosen[split] != rejected[split]
    if differs and split > 0 and chosen[split - 1] == " ":
        split -= 1
    if split == 0:
        raise DataError(
            "no prompt column, and the responses have no common beginning. Add a prompt column."
        )
    return chosen[:split], chosen[split:], rejected[split:]


def _text_column(row: dict[str, Any], column: str, *, may_be_empty: bool = False) -> Text:
    """A string or list of messages."""
    if column not in row:
        raise DataError(f"column {column!r} is missing; it has {sorted(row)}. Add it.")
    value = row[column]
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


def _append_eos(row: dict[str, Any]) -> bool:
    value = row.get("append_eos")
    known = {None: True, True: True, False: False, "true": True, "false": False, "": True}
    value = value.lower() if isinstance(value, str) else value  # a CSV cell
    if not isinstance(value, bool | str | None) or value not in known:
        raise DataError(f"append_eos is {value!r}. Write true or false.")
    return known[value]


def _others(
    row: dict[str, Any], *used: str
) -> tuple[list[Any] | None, dict[str, Any], dict[str, Any]]:
    """The tools and keyword arguments for the chat template, each as it is or as JSON; and the
    columns that are neither these nor `used`."""
    tools, template_kwargs = (_parsed(row, column) for column in _TEMPLATE_COLUMNS)
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"tools is {_kind(tools)}. Write a list, or a list as JSON.")
    if template_kwargs is not None and not isinstance(template_kwargs, dict):
        raise DataError(f"chat_template_kwargs is {_kind(template_kwargs)}. Write an object.")
    for column in ("image", "images"):
        if row.get(column):
            raise DataError(f"images can't be trained on. Remove the column {column!r}.")
    extra = {k: v for k, v in row.items() if k not in used and k not in _TEMPLATE_COLUMNS}
    return tools, template_kwargs or {}, extra


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
