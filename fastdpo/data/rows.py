"""Raw preference datasets -> checked rows.

    rows = example_rows(read_rows("pairs.jsonl"))
    result = tokenize_dataset(rows, tokenizer, max_length=2048)

A dataset is of one shape, told by its columns: preference pairs, also with a prompt for each side
or of next steps, lists of responses with scores, or single responses with a label. The README of
this room has a table of them. Every column that is not used is kept in `extra`.

Messages can stand as JSON text in a string, as in a CSV cell: a string is messages when it is a
JSON list of one or more objects with a `role`, each with `content` or `tool_calls`.

A mistake in the data raises one DataError that names the place, what is wrong and the fix.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from fastdpo.data.columns import (
    COUNTS,
    flag,
    numbers,
    others,
    refuse_old_names,
    require_column,
    scores_column,
    text_column,
    texts_column,
    warn_of_near_names,
)
from fastdpo.data.records import LabeledRow, PreferenceRow, Prompt, RankedRow, Text, TextRow, placed
from fastdpo.data.rendering import named
from fastdpo.errors import DataError
from fastdpo.storage import json_lines, read_text

_FILE_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet"}
_OTHER_SUFFIXES = {".txt", ".tsv", ".arrow", ".gz", ".zip", ".zst", ".xz", ".ndjson", ".yaml"}
Checked = TypeVar("Checked", bound=TextRow | Prompt)
_PROMPTS = ("prompt_chosen", "prompt_rejected")
_SCORES = ("score_chosen", "score_rejected")
# Columns that a row of any shape may have, and those that a pair may have.
_OPTIONAL = (*COUNTS, "tools", "chat_template_kwargs", "append_eos")
_OF_PAIRS = (*_OPTIONAL, *_SCORES, "prompt", "initial_reason_steps")
# DOVE's columns, and those that they stand for.
_DOVE = {
    "i_chosen": "prompt_chosen", "r_chosen": "chosen",
    "i_reject": "prompt_rejected", "r_reject": "rejected",
}  # fmt: skip


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
    if _by_prompt(rows):
        rows = [{"prompt": prompt, **row} for prompt, row in rows.items()]
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


def _by_prompt(value: Any) -> bool:
    """Whether JSON is an object of lists of responses by their prompts, as ODPO publishes them."""
    return isinstance(value, dict) and all(
        isinstance(row, dict) and "responses" in row for row in value.values()
    )


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


def example_rows(rows: Rows) -> Sequence[TextRow]:
    """Check a dataset of any shape, told by the columns of its first row.

    Raises DataError at the first malformed row.
    """
    columns = rows.rows[0].keys()
    pairs = {"chosen", "rejected"} <= columns or _DOVE.keys() <= columns
    if pairs or not columns & {"responses", "completion"}:
        return preference_rows(rows)
    warn_of_near_names(rows.source, rows.rows, _OPTIONAL)
    return _checked(rows, _ranked_row if "responses" in columns else _labeled_row)


def preference_rows(rows: Rows) -> list[PreferenceRow]:
    """Check preference pairs and bring them to one form.

    Without a prompt column the prompt is what both responses begin with, as in TRL's
    `extract_prompt`: whole messages, or characters less a trailing space. The same holds for a
    string prompt beside whole conversations, which must repeat it in a message. A pair of equal
    responses passes, and one with an empty response: `tokenize_dataset` drops and counts them.

    Raises DataError at the first malformed row.
    """
    warn_of_near_names(rows.source, rows.rows, _OF_PAIRS)
    return _checked(rows, _preference_row)


def prompt_rows(rows: Rows) -> list[Prompt]:
    """Check prompts: a `prompt` column of strings or message lists, all other columns kept.

    Raises DataError at the first malformed row.
    """
    return _checked(
        rows,
        lambda row, where: Prompt(where, text_column(row, "prompt"), **others(row, "prompt")),
    )


def _checked(rows: Rows, check: Callable[[dict[str, Any], str], Checked]) -> list[Checked]:
    result = []
    for i, row in enumerate(rows.rows):
        with placed(rows.where(i)):
            result.append(check(row, rows.where(i)))
    return result


def _preference_row(row: dict[str, Any], where: str) -> PreferenceRow:
    if _DOVE.keys() <= row.keys():
        row = {_DOVE.get(name, name): value for name, value in row.items()}
    chosen = text_column(row, "chosen", may_be_empty=True)
    rejected = text_column(row, "rejected", may_be_empty=True)
    prompt = text_column(row, "prompt") if "prompt" in row else None
    more: dict[str, Any] = {}
    if "prompt_chosen" in row or "prompt_rejected" in row:
        prompt, more["rejected_prompt"] = _two_prompts(row, chosen, rejected)
    elif "initial_reason_steps" in row:
        prompt, chosen, rejected, more["prefix"] = _next_steps(row, prompt, chosen, rejected)
    elif not chosen or not rejected:
        prompt = prompt or chosen or rejected  # dropped later, whatever the prompt
    else:
        prompt, chosen, rejected = _explicit(prompt, chosen, rejected)
    used = ("chosen", "rejected", *_PROMPTS, "initial_reason_steps", *_SCORES)
    more |= _rest(row, *used, ends="prefix" not in more)
    return PreferenceRow(where, prompt, chosen, rejected, **more)


def _ranked_row(row: dict[str, Any], where: str) -> RankedRow:
    prompt, responses = text_column(row, "prompt"), texts_column(row, "responses")
    for i, response in enumerate(responses):
        _check_format(prompt, response, f"responses[{i}]")
    scores = scores_column(row, len(responses))
    rest = _rest(row, "responses", "scores", "rewards", "ranks")
    return RankedRow(where, prompt, responses, scores, **rest)


def _labeled_row(row: dict[str, Any], where: str) -> LabeledRow:
    prompt = text_column(row, "prompt")
    completion = text_column(row, "completion", may_be_empty=True)
    _check_format(prompt, completion, "completion")
    require_column(row, "label")
    return LabeledRow(
        where, prompt, completion, flag(row, "label"), **_rest(row, "completion", "label")
    )


def _rest(row: dict[str, Any], *used: str, ends: bool = True) -> dict[str, Any]:
    """What of a row is the same in all shapes, and the numbers among `used`."""
    refuse_old_names(row)
    counts = (*COUNTS, *(name for name in used if name in _SCORES))
    return {
        **others(row, "prompt", "append_eos", *used, *counts),
        "append_eos": flag(row, "append_eos", default=ends),
        "numbers": numbers(row, counts),
    }


def _check_format(prompt: Text, response: Text, name: str) -> None:
    """Refuse a response that is not written as its prompt is, or repeats it."""
    if isinstance(prompt, list) != isinstance(response, list) and response:
        kinds = ("a message list", "a string")
        ours, theirs = kinds if isinstance(prompt, list) else kinds[::-1]
        raise DataError(f"its prompt is {ours} and {name} {theirs}. Write both in the same format.")
    if isinstance(prompt, list) and response and response[: len(prompt)] == prompt:
        raise DataError(f"{name} repeats the messages of its prompt. Remove them from it.")


def _two_prompts(row: dict[str, Any], chosen: Text, rejected: Text) -> tuple[Text, Text]:
    """A prompt for each side of a pair."""
    more = [name for name in ("prompt", "initial_reason_steps") if row.get(name) is not None]
    if more:
        raise DataError(
            f"{more[0]} is beside prompt_chosen and prompt_rejected, which are the prompts of the "
            f"two responses. Remove {more[0]}, or both of them."
        )
    prompts = [text_column(row, name) for name in _PROMPTS]
    for prompt, response, name in zip(prompts, (chosen, rejected), ("chosen", "rejected")):
        _check_format(prompt, response, name)
    if isinstance(prompts[0], list) != isinstance(prompts[1], list):
        raise DataError(
            "one prompt is a string and the other a message list. Write both in the same format."
        )
    return prompts[0], prompts[1]


def _next_steps(
    row: dict[str, Any], prompt: Text | None, chosen: Text, rejected: Text
) -> tuple[Text, str, str, str]:
    """A prompt, two next steps and the steps before them."""
    if prompt is None:
        raise DataError("initial_reason_steps needs a prompt before it. Add a prompt column.")
    steps = row["initial_reason_steps"]
    if not isinstance(steps, str | None):
        raise DataError(f"initial_reason_steps is of type {type(steps).__name__}. Write a string.")
    return prompt, _spoken(chosen, "chosen"), _spoken(rejected, "rejected"), steps or ""


def _spoken(response: Text, name: str) -> str:
    """The text of a response that no template is to see."""
    if isinstance(response, str):
        return response
    content = response[0].get("content") if len(response) == 1 else None
    if not isinstance(content, str) or response[0]["role"] != "assistant":
        raise DataError(
            f"{name} goes on after initial_reason_steps. Write a string, or one message of the "
            "assistant with a string."
        )
    return content


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
