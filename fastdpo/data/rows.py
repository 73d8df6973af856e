"""Raw preference datasets -> tokenized pairs.

    rows = read_rows("pairs.jsonl")
    result = tokenize_dataset(preference_rows(rows), tokenizer, max_length=2048)

The formats and the token ids are those of TRL's DPOTrainer: `prompt`, `chosen` and `rejected` as
strings or as message lists, the prompt explicit or the shared beginning of both responses, with
optional `tools` and `chat_template_kwargs`. A row with `append_eos: false` has responses that don't
end. Every other column is kept in `extra`.

Messages can stand as JSON text in a string, as in a CSV cell: a string is messages when it is a
JSON list of one or more objects with a `role`, each with `content` or `tool_calls`.

A mistake in the data raises one DataError that names the place, what is wrong and the fix.
"""

import ast
import csv
import json
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fastdpo.data.batch import TokenizedPair, tokens_of_pair
from fastdpo.data.records import PreferenceRow, Prompt, Text
from fastdpo.data.rendering import (
    Lost,
    cause,
    is_empty,
    is_in,
    last_token,
    once,
    own_prefix,
    raw_part,
    special_ids,
    texts,
    trace,
)
from fastdpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NAMED_ROWS = 3  # of those dropped or truncated; the rest are counted
OVERLONG = ("truncate", "drop", "stop")  # what can be done with a pair that is too long

_FILE_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet"}
_OTHER_SUFFIXES = {".txt", ".tsv", ".arrow", ".gz", ".zip", ".zst", ".xz", ".ndjson", ".yaml"}
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


def read_rows(path_or_name: str | Path, split: str | None = None) -> Rows:
    """Read all rows of a dataset.

    `path_or_name` is a `.jsonl`, `.json` (list of objects), `.csv` or `.parquet` file, a directory
    written by `datasets.save_to_disk`, or the name of a dataset on the Hugging Face hub. `split`
    selects from a directory with several and from the hub, by default "train".

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
        rows = Rows(name, _read_saved(path, split))
    elif path.exists():
        if split is not None:
            raise DataError(_no_split(name, split, "a file"))
        rows = _read_file(path, name)
    elif _looks_like_a_path(name):
        raise DataError(f"{name}: no such file or directory. Check the path.")
    else:
        rows = Rows(name, _read_hub(name, split or "train"))
    if not rows.rows:
        raise DataError(f"{name}: there are no rows in it. Write one object per row.")
    return rows


def _looks_like_a_path(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    is_hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name)
    return not is_hub_name or suffix in _FILE_SUFFIXES | _OTHER_SUFFIXES


def _read_file(path: Path, name: str) -> Rows:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return Rows(name, _read_parquet(path))
    if suffix not in _FILE_SUFFIXES:
        raise DataError(
            f"{name}: unknown file type {suffix!r}. Convert it to .jsonl, .json, .csv or .parquet."
        )
    text = _read_text(path, name)
    if suffix == ".jsonl":
        return _parse_jsonl(text, name)
    if suffix == ".csv":
        return _parse_csv(text, name)
    return _parse_json(text, name)


def _read_text(path: Path, name: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{name}: can't be read ({error.strerror}). Check permissions.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8. Save the file with UTF-8 encoding.") from error
    if not text.strip():
        raise DataError(f"{name}: the file is empty. Write one object per row.")
    return text


def _parse_jsonl(text: str, name: str) -> Rows:
    rows, lines = [], []
    # Only "\n" ends a line: str.splitlines also breaks at separators that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{name}:{number}: not valid JSON ({error}). "
                "Fix or remove the line; at the end of a file it is often cut short."
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{name}:{number}: a JSON {type(row).__name__}, not an object. "
                'Write one object per line, {"prompt": ..., ...}.'
            )
        rows.append(row)
        lines.append(number)
    return Rows(name, rows, lines)


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
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(
                f"{Rows(name, rows).where(i)}: a JSON {type(row).__name__}, not an object. "
                "Write a list of objects."
            )
    return Rows(name, rows)


def _parse_csv(text: str, name: str) -> Rows:
    """Every value stays a string: inferred types would turn the answers 42 and null into others."""
    rows, lines = [], []
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
                rows.append(dict(zip(header, values)))
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name}:{reader.line_num}: not valid CSV ({error}). Fix the quotes or the cut-off row."
        ) from error
    finally:
        csv.field_size_limit(field_limit)
    return Rows(name, rows, lines)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    from datasets import Dataset

    try:
        # The library copies what it reads into its cache; this copy goes when it was read.
        with TemporaryDirectory() as cache:
            dataset = Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
            return _arrow_rows(dataset)
    except Exception as error:
        raise DataError(
            f"{path}: can't be read as Parquet ({_first_line(error)}). Write the file again."
        ) from error


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


def _no_split(name: str, split: str, what: str) -> str:
    return f"{name}: {what} has no splits, but split={split!r} is given. Leave split out."


def _read_saved(path: Path, split: str | None) -> list[dict[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"{path}: not a readable dataset directory ({_first_line(error)}). Name a file in it, "
            "or a directory written by datasets.save_to_disk."
        ) from error
    if isinstance(dataset, DatasetDict):
        split = split or "train"
        if split not in dataset:
            raise DataError(f"{path}: no split {split!r}. Choose one of {sorted(dataset)}.")
        dataset = dataset[split]
    elif split is not None:
        raise DataError(_no_split(str(path), split, "a folder of one dataset"))
    return _arrow_rows(dataset)


def _read_hub(name: str, split: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return _arrow_rows(load_dataset(name, split=split))
    except Exception as error:
        raise DataError(
            f"{name}: no such file, and split {split!r} can't be loaded from the Hugging Face hub "
            f"({type(error).__name__}: {_first_line(error)}). Check the name, the split and the "
            "network, or download the dataset and give a local file."
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def preference_rows(rows: Rows) -> list[PreferenceRow]:
    """Check preference data and bring it to one form.

    Without a prompt column the prompt is what both responses begin with, as in TRL's
    `extract_prompt`: whole messages, or characters less a trailing space. The same holds for a
    string prompt beside whole conversations, which must repeat it in a message. A pair of equal
    responses passes, and one with an empty response: `tokenize_dataset` drops and counts them.

    Raises DataError at the first malformed row.
    """
    return [_preference_row(row, rows.where(i)) for i, row in enumerate(rows.rows)]


def prompt_rows(rows: Rows) -> list[Prompt]:
    """Check prompts: a `prompt` column of strings or message lists, all other columns kept.

    Raises DataError at the first malformed row.
    """
    result = []
    for i, row in enumerate(rows.rows):
        where = rows.where(i)
        prompt = _text_column(row, "prompt", where)
        result.append(Prompt(where, prompt, *_template_options(row, where), _extra(row, "prompt")))
    return result


def _preference_row(row: dict[str, Any], where: str) -> PreferenceRow:
    chosen = _text_column(row, "chosen", where, may_be_empty=True)
    rejected = _text_column(row, "rejected", where, may_be_empty=True)
    prompt = _text_column(row, "prompt", where) if "prompt" in row else None
    if not chosen or not rejected:
        prompt = prompt or chosen or rejected  # dropped later, whatever the prompt
    else:
        prompt, chosen, rejected = _explicit(prompt, chosen, rejected, where)
    tools, template_kwargs = _template_options(row, where)
    extra = _extra(row, "prompt", "chosen", "rejected", "append_eos")
    append_eos = _append_eos(row, where)
    return PreferenceRow(where, prompt, chosen, rejected, tools, template_kwargs, extra, append_eos)


def _explicit(
    prompt: Text | None, chosen: Text, rejected: Text, where: str
) -> tuple[Text, Text, Text]:
    """Prompt and responses of one format, the prompt taken out of the responses."""
    conversational = isinstance(chosen, list)
    if conversational != isinstance(rejected, list):
        raise DataError(
            f"{where}: one response is a string and the other a message list. "
            "Write both in the same format."
        )
    if prompt is None or (conversational and isinstance(prompt, str)):
        given, (prompt, chosen, rejected) = prompt, _extract_prompt(chosen, rejected, where)
        if given is not None and given not in [m.get("content") for m in prompt]:  # type: ignore[union-attr]
            raise DataError(
                f"{where}: prompt is a string, the responses are message lists that don't begin "
                "with it. Write the prompt as a message list too."
            )
    elif isinstance(prompt, list) != conversational:
        raise DataError(
            f"{where}: prompt is a message list, the responses are strings. "
            "Write all three in the same format."
        )
    elif conversational and chosen[: len(prompt)] == prompt:
        raise DataError(
            f"{where}: the responses repeat the messages of the prompt. "
            "Remove the prompt column, or these messages from the responses."
        )
    return prompt, chosen, rejected  # type: ignore[return-value]


def _extract_prompt(chosen: Any, rejected: Any, where: str) -> tuple[Any, Any, Any]:
    """Split two conversations or strings at their first difference."""
    # Where one is the beginning of the other, the last element still belongs to the response.
    limit = min(len(chosen), len(rejected)) - 1
    split = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    differs = chosen[split] != rejected[split]
    if differs and split > 0 and chosen[split - 1] == " ":
        split -= 1
    if split == 0:
        raise DataError(
            f"{where}: no prompt column, and the responses have no common beginning. "
            "Add a prompt column."
        )
    return chosen[:split], chosen[split:], rejected[split:]


def _text_column(
    row: dict[str, Any], column: str, where: str, *, may_be_empty: bool = False
) -> Text:
    """A string or list of messages."""
    if column not in row:
        raise DataError(f"{where}: column {column!r} is missing; it has {sorted(row)}. Add it.")
    value = row[column]
    if isinstance(value, str):
        value = _messages_in(value, column, where) or value
    if not isinstance(value, str | list):
        raise DataError(
            f"{where}: {column} is {_kind(value)}. Write a string or a list of messages."
        )
    if not value and not may_be_empty:
        raise DataError(f"{where}: {column} is empty. Fill it in or remove the row.")
    if isinstance(value, str):
        return value
    for message in value:
        problem = _message_problem(message)
        if problem:
            raise DataError(
                f"{where}: a message in {column} {problem}. "
                'Write every message as {"role": ..., "content": ...}.'
            )
    # A call of a tool without content: some templates ask whether the content is none.
    return [message if "content" in message else {**message, "content": None} for message in value]


def _messages_in(text: str, column: str, where: str) -> list[dict[str, Any]] | None:
    """The messages that a string holds as JSON; None where it is a text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        if _is_python(text):
            raise DataError(
                f"{where}: {column} is a list of messages as Python prints it. Write it as JSON, "
                "by json.dumps."
            ) from None
        return None
    return found if _are_messages(found) else None


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(x, dict) and isinstance(x.get("role"), str) and _message_problem(x) is None
            for x in value
        )
    )


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


def _append_eos(row: dict[str, Any], where: str) -> bool:
    value = row.get("append_eos")
    known = {None: True, True: True, False: False, "true": True, "false": False, "": True}
    value = value.lower() if isinstance(value, str) else value  # a CSV cell
    if not isinstance(value, bool | str | None) or value not in known:
        raise DataError(f"{where}: append_eos is {value!r}. Write true or false.")
    return known[value]


def _template_options(row: dict[str, Any], where: str) -> tuple[list[Any] | None, dict[str, Any]]:
    """The tools and keyword arguments for the chat template, each as it is or as JSON."""
    tools, template_kwargs = (_parsed(row, column, where) for column in _TEMPLATE_COLUMNS)
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: tools is {_kind(tools)}. Write a list, or a list as JSON.")
    if template_kwargs is not None and not isinstance(template_kwargs, dict):
        raise DataError(
            f"{where}: chat_template_kwargs is {_kind(template_kwargs)}. Write an object."
        )
    for column in ("image", "images"):
        if row.get(column):
            raise DataError(f"{where}: images can't be trained on. Remove the column {column!r}.")
    return tools, template_kwargs or {}


def _parsed(row: dict[str, Any], column: str, where: str) -> Any:
    value = row.get(column)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise DataError(f"{where}: {column} is not valid JSON ({error}). Fix it.") from error


def _extra(row: dict[str, Any], *used: str) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in used and k not in _TEMPLATE_COLUMNS}


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


@dataclass(frozen=True)
class TokenizedPairs:
    """What `tokenize_dataset` made of a dataset."""

    pairs: list[TokenizedPair]
    dropped_at: dict[str, list[str]]  # reason -> the rows left out
    truncated_at: list[str]  # rows kept with a response cut at max_length

    @property
    def dropped(self) -> dict[str, int]:
        return {reason: len(rows) for reason, rows in self.dropped_at.items()}

    @property
    def truncated(self) -> int:
        return len(self.truncated_at)

    def __str__(self) -> str:
        """One line for what was kept, and one a reason for what was not."""
        lines = [f"{len(self.pairs)} pairs, {counted(self.truncated_at)} truncated to max_length"]
        lines += [f"dropped {counted(at)}: {reason}" for reason, at in self.dropped_at.items()]
        return "\n".join(lines)


def counted(places: Sequence[str]) -> str:
    """How many rows, and the first of them by name."""
    if not places:
        return "0"
    more = ", ..." if len(places) > _NAMED_ROWS else ""
    return f"{len(places)} ({', '.join(places[:_NAMED_ROWS])}{more})"


def render_prompt(
    prompt: Text,
    tokenizer: "PreTrainedTokenizerBase",
    tools: list[Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    *,
    as_chat: bool = False,
) -> list[int]:
    """Token ids of a prompt, to sample a response after it.

    Messages go through the chat template with its generation prompt; a string stays as it is, or
    with `as_chat` becomes one user message where `takes_as_chat` says so. Training tokenizes
    prompts by this function too. A string gets the beginning token of tokenizers that put one,
    unless it has it already, and never an end token.

    Raises DataError when the tokenizer or its chat template can't render the prompt.
    """
    if as_chat and isinstance(prompt, str) and takes_as_chat(prompt, tokenizer):
        prompt = [{"role": "user", "content": prompt}]
    options = {"tools": tools, **(chat_template_kwargs or {})}
    return _Renderer(tokenizer).ids(prompt, options, add_generation_prompt=True)


def takes_as_chat(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether sampling takes a string as a message of the user: not where there is no chat
    template, nor where the string was rendered before, and begins with a special token that the
    template writes too."""
    if tokenizer.chat_template is None:
        return False
    try:
        first = tokenizer(text=prompt[:64], add_special_tokens=False)["input_ids"][:1]
        if not first or first[0] not in special_ids(tokenizer):
            return True
        own = tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
    except Exception:  # told of by the rendering
        return True
    chat = _Renderer(tokenizer).ids([{"role": "user", "content": prompt}], {})
    return chat.count(first[0]) == own.count(first[0])  # type: ignore[index,union-attr]


def tokenize_pair(
    row: PreferenceRow, tokenizer: "PreTrainedTokenizerBase", max_length: int | None
) -> TokenizedPair | str:
    """Tokenize one pair; returns the reason, a string, when it has to be dropped.

    Token ids are those of TRL's DPOTrainer. Messages go through the chat template; string
    responses get the end token unless they end in it. The responses begin where the tokens of the
    prompt alone and those of prompt + response first differ, on whichever side that comes first,
    so a prompt can lose its last tokens.

    Other than in TRL, a text begins with one beginning token and a response ends in one end token,
    whatever the tokenizer adds and the text brings: where several stand there, the first one at
    which the model stops. Responses that a chat template doesn't end get
    the tokenizer's end token, with a warning. A special token that the template writes after the
    response, other than those that begin a turn, is an end; whitespace after it is kept, as in TRL.
    With `append_eos` false in the row, responses end as they are written or rendered.

    Truncation keeps the first `max_length` tokens of prompt + response on each side (None: all).
    A pair is dropped when a response is empty, when no token is left of the prompt or of a
    response, or when both responses are the same tokens.

    Raises DataError, naming the row, when the tokenizer can't render it and when the chat template
    leaves out text of a response, and ValueError when `max_length` < 2.
    """
    _check_max_length(max_length)
    split = _split_pair(row, _Renderer(tokenizer))
    if isinstance(split, str):
        return split
    if split.ended:
        _warn_of_ends([row.where], 1, tokenizer)
    return _truncate(split, max_length)


def tokenize_dataset(
    rows: Sequence[PreferenceRow],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    overlong: str = "truncate",
    stop_ids: Collection[int] | None = None,
    progress: bool = True,
) -> TokenizedPairs:
    """Tokenize all pairs, in order, by the rules of `tokenize_pair`.

    `stop_ids` are the tokens that end the model's generation (`fastdpo.model.load.stop_ids`); None:
    not known, and not compared with what ends the responses.

    `overlong` says what happens to a pair with a side, prompt + response, over `max_length` tokens:

    - "truncate": the first `max_length` tokens of each side are kept. A prompt that leaves no room
      for a token of a response can't be truncated so; its pair is dropped.
    - "drop": the pair is dropped.
    - "stop": the first such pair raises DataError.

    The last two leave pairs aside that are dropped whatever their length (no prompt token, empty or
    identical responses): those count by that reason and don't stop anything.

    Dropped and truncated pairs are named by their rows. One warning each tells of prompts that lost
    tokens, of messages that the chat template gave no beginning token or left out, and of responses
    that it didn't end or ended in none of `stop_ids`.

    Raises DataError when a row can't be rendered or no pair is left, and ValueError when
    `max_length` < 2 or `overlong` is none of the three.
    """
    from tqdm import tqdm

    _check_max_length(max_length)
    _check_overlong(overlong)
    if not rows:
        raise DataError("there are no rows to tokenize. Give at least one preference pair.")
    pairs: list[TokenizedPair] = []
    dropped_at: dict[str, list[str]] = {}
    truncated_at: list[str] = []
    lost_at: list[str] = []
    ended_at: list[str] = []
    unbegun_at: list[str] = []
    kept: list[PreferenceRow] = []
    renderer = _Renderer(tokenizer, stop_ids)
    for row in tqdm(rows, desc="tokenizing", unit="pair", disable=not progress):
        split = _split_pair(row, renderer)
        pair = split if isinstance(split, str) else _within(split, max_length, overlong)
        if isinstance(split, str) or isinstance(pair, str):
            dropped_at.setdefault(str(pair), []).append(row.where)
            continue
        pairs.append(pair)
        kept.append(row)
        if split.ended:
            ended_at.append(row.where)
        if isinstance(row.prompt, list) and not _starts_with(split.prompt_ids, renderer.prefix):
            unbegun_at.append(row.where)
        if max_length is not None and split.num_tokens > max_length:
            truncated_at.append(row.where)
        if split.lost_ids:
            lost_at.append(f"{row.where}: {tokenizer.decode(split.lost_ids)!r}")
    if not pairs:
        reasons = ", ".join(f"{reason}: {len(at)}" for reason, at in dropped_at.items())
        choice = ", set overlong=truncate" if overlong == "drop" else ""
        raise DataError(
            f"{rows[0].where} to {rows[-1].where}: no pair is left to train on ({reasons}). "
            f"Raise max_length{choice}, or check that chosen and rejected differ."
        )
    if lost_at:
        warnings.warn(
            f"{len(lost_at)} of {len(pairs)} prompts lose their last tokens, which render or merge "
            f"differently before a response; the first is {lost_at[0]}. Training then sees "
            "another context than sampling. End prompts on a token boundary, or use a chat "
            "template that renders a prompt alike with and without a response.",
            stacklevel=2,
        )
    if ended_at:
        _warn_of_ends(ended_at, len(pairs), tokenizer)
    if unbegun_at:
        begin = tokenizer.decode(renderer.prefix)
        warnings.warn(
            f"{len(unbegun_at)} of {len(pairs)} pairs: the chat template doesn't begin with "
            f"{begin!r}, which the tokenizer puts before every text; the first is {unbegun_at[0]}. "
            "They are trained on as rendered, as chats are generated. Where the model was made "
            f"with {begin!r}, give a template that writes it (chat_template).",
            stacklevel=2,
        )
    warn_of_unread(kept, [pair.prompt_ids for pair in pairs], tokenizer)
    if stop_ids is not None:
        _warn_of_stops(renderer.ends, stop_ids, tokenizer)
    return TokenizedPairs(pairs, dropped_at, truncated_at)


@dataclass(frozen=True)
class Fitted:
    """What `fit_to_budget` made of pairs: `pairs[i]` was number `kept[i]` of those given."""

    pairs: list[TokenizedPair]
    kept: list[int]
    dropped_at: list[str]  # the rows left out
    truncated_at: list[str]  # rows kept with a response cut


def fit_to_budget(
    pairs: Sequence[TokenizedPair], max_tokens: int, *, layout: str, overlong: str
) -> Fitted:
    """Make every pair fit a micro-batch of `max_tokens` tokens in a layout, in order.

    One that fits is returned as it is, the same object. `overlong` says what happens to any other:

    - "truncate": both responses are cut at the end to one common cap, the largest at which the pair
      fits; a response within the cap stays whole. The pair is dropped when not even one token of
      each fits, or when both are the same tokens after the cut.
    - "drop": the pair is dropped.
    - "stop": the first such pair raises DataError.

    Raises DataError when no pair is left, and ValueError when `overlong` is none of the three.
    """
    _check_overlong(overlong)
    if not pairs:
        raise DataError("there are no pairs to fit to max_tokens. Give at least one pair.")
    sizes = [pair.num_tokens(layout) for pair in pairs]
    result: list[TokenizedPair] = []
    kept: list[int] = []
    dropped_at: list[str] = []
    truncated_at: list[str] = []
    for i, pair in enumerate(pairs):
        fitting: TokenizedPair | None = pair
        if sizes[i] > max_tokens:
            if overlong == "stop":
                raise DataError(
                    f"{_place(pairs, i)}: the pair takes {sizes[i]} tokens, max_tokens is "
                    f"{max_tokens}. Raise max_tokens to at least {max(sizes)}, the longest pair, "
                    "or set overlong=truncate or overlong=drop."
                )
            fitting = _cut(pair, max_tokens, layout) if overlong == "truncate" else None
        if fitting is None:
            dropped_at.append(_place(pairs, i))
            continue
        result.append(fitting)
        kept.append(i)
        if fitting is not pair:
            truncated_at.append(_place(pairs, i))
    if not result:
        choice = ", or set overlong=truncate" if overlong == "drop" else ""
        raise DataError(
            f"{_place(pairs, 0)} to {_place(pairs, len(pairs) - 1)}: no pair is left to train on: "
            f"all {len(pairs)} take more than max_tokens = {max_tokens} tokens. "
            f"Raise max_tokens to at least {max(sizes)}, the longest pair{choice}."
        )
    return Fitted(result, kept, dropped_at, truncated_at)


def _place(pairs: Sequence[TokenizedPair], i: int) -> str:
    return pairs[i].where or f"pair {i} (counting from 0)"


def _cut(pair: TokenizedPair, max_tokens: int, layout: str) -> TokenizedPair | None:
    """The pair within `max_tokens`, its responses under one cap; None if that leaves nothing."""
    prompt, chosen, rejected = map(len, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))

    def fits(cap: int) -> bool:
        return tokens_of_pair(prompt, min(chosen, cap), min(rejected, cap), layout) <= max_tokens

    # Not by halves: where both sides can't share the prompt, a longer cap may take fewer tokens.
    cap = next(filter(fits, range(min(max(chosen, rejected), max_tokens), 0, -1)), 0)
    if cap < 1:
        return None
    chosen_ids, rejected_ids = pair.chosen_ids[:cap], pair.rejected_ids[:cap]
    if chosen_ids == rejected_ids:
        return None
    return replace(pair, chosen_ids=chosen_ids, rejected_ids=rejected_ids)


def _warn_of_ends(places: list[str], total: int, tokenizer: Any) -> None:
    warnings.warn(
        f"{len(places)} of {total} pairs: the chat template ends a turn of the assistant with no "
        f"token that stops generation, so {tokenizer.eos_token!r} was put after the responses; the "
        f"first is {places[0]}. Give a template that ends its turns (chat_template), or set "
        "append_eos to false in rows that are not to end.",
        stacklevel=3,
    )


def _warn_of_stops(ends: dict[int, str], stop_ids: Collection[int], tokenizer: Any) -> None:
    for token, where in ends.items():
        if token in stop_ids or not where:
            continue
        stops = ", ".join(repr(tokenizer.decode([x])) for x in stop_ids)
        warnings.warn(
            f"responses end with {tokenizer.decode([token])!r} (token {token}), at which the model "
            f"doesn't stop to generate, by its generation config ({stops}); the first such row is "
            f"{where}. Add {token} to eos_token_id in the generation_config.json of the model, or "
            "give a template that ends turns with what stops it (chat_template).",
            stacklevel=3,
        )


def warn_of_unread(
    rows: Sequence[PreferenceRow | Prompt], ids: Sequence[list[int]], tokenizer: Any
) -> None:
    """Warn once of messages and tools of prompts that the chat template left out of their `ids`."""
    renderer = _Renderer(tokenizer)
    found = ((row.where, renderer.unread(row, x)) for row, x in zip(rows, ids))
    places = [f"{where}: {unread}" for where, unread in found if unread]
    if places:
        warnings.warn(
            f"{len(places)} of {len(rows)} prompts: the chat template leaves out what they say; "
            f"the first is {places[0]}. The model never sees it. Give a template that renders it "
            "(chat_template), or write the rows without it.",
            stacklevel=3,
        )


@dataclass(frozen=True)
class _SplitPair:
    """Token ids before truncation. `lost_ids` ended the prompt alone, but not within a side;
    `ended` says that a response got its end token although a template rendered it."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    lost_ids: list[int]
    extra: dict[str, Any]
    where: str
    ended: bool

    @property
    def num_tokens(self) -> int:
        """Tokens of the longer side."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def _split_pair(row: PreferenceRow, renderer: "_Renderer") -> _SplitPair | str:
    """The tokens of a pair, checked, or the reason to drop it."""
    marks = (renderer.tokenizer.bos_token, renderer.tokenizer.eos_token)
    if is_empty(row.chosen, marks) or is_empty(row.rejected, marks):
        return "empty response"
    options = {"tools": row.tools, **row.chat_template_kwargs}
    responses = {"chosen": row.chosen, "rejected": row.rejected}
    try:
        prompt = renderer.ids(row.prompt, options, add_generation_prompt=True)
        sides = [renderer.ids(renderer.join(row, x), options) for x in responses.values()]
        split = min(_common_prefix_length(prompt, side) for side in sides)
        found = [
            renderer.checked(row, options, name, prompt, side[split:])
            for name, side in zip(responses, sides)
        ]
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from error
    (chosen, chosen_ended), (rejected, rejected_ended) = found
    ended = chosen_ended or rejected_ended
    return _SplitPair(prompt[:split], chosen, rejected, prompt[split:], row.extra, row.where, ended)


def _within(split: _SplitPair, max_length: int | None, overlong: str) -> TokenizedPair | str:
    """The pair within `max_length` tokens a side by the choice `overlong`, or why to drop it."""
    if overlong == "truncate":
        return _truncate(split, max_length)
    pair = _truncate(split, None)
    # What no length would save is no matter of length.
    if isinstance(pair, str) or max_length is None or split.num_tokens <= max_length:
        return pair
    if overlong == "drop":
        return "longer than max_length"
    sides = {"chosen": len(split.chosen_ids), "rejected": len(split.rejected_ids)}
    side = max(sides, key=lambda name: sides[name])
    raise DataError(
        f"{split.where}: prompt and {side} response have {split.num_tokens} tokens "
        f"({len(split.prompt_ids)} + {sides[side]}), max_length is {max_length}. Raise max_length "
        f"to at least {split.num_tokens}, or set overlong=truncate or overlong=drop."
    )


def _truncate(split: _SplitPair, max_length: int | None) -> TokenizedPair | str:
    """The pair with both sides cut to `max_length` tokens, or the reason to drop it."""
    if not split.prompt_ids:
        return "no prompt token"
    if max_length is not None and len(split.prompt_ids) >= max_length:
        return "responses truncated to nothing"
    room = None if max_length is None else max_length - len(split.prompt_ids)
    chosen, rejected = split.chosen_ids[:room], split.rejected_ids[:room]
    if not chosen or not rejected:
        return "empty response"
    if split.chosen_ids == split.rejected_ids:
        return "identical responses"
    if chosen == rejected:
        return "identical responses after truncation"
    return TokenizedPair(split.prompt_ids, chosen, rejected, split.extra, split.where)


class _Renderer:
    """Texts to token ids by one tokenizer, and what was found out about it on the way."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", stop_ids: Collection[int] | None = None
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.stop_ids = frozenset(stop_ids or ())

    @cached_property
    def prefix(self) -> list[int]:
        return own_prefix(self.tokenizer)

    @cached_property
    def special(self) -> set[int]:
        return special_ids(self.tokenizer)

    @cached_property
    def ends(self) -> dict[int, str]:
        """Tokens known to end a response, and the first row that ends in each."""
        return {x: "" for x in [self.tokenizer.eos_token_id] if x is not None}

    def ids(self, text: Text, options: dict[str, Any], **extra: bool) -> list[int]:
        """Ids of a string, or of messages through the chat template with `options`.

        One beginning token at most; of a string no end token but its own.
        """
        if isinstance(text, str):
            ids = self._call(lambda: self._plain(text))
            return ids if _starts_with(ids, self.prefix) else self.prefix + ids
        encoded = self._template(text, options, tokenize=True, return_dict=True, **extra)
        ids = encoded["input_ids"]
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            ids = ids[1:]
        if any(isinstance(message.get("content"), list) for message in text):
            raw = raw_part(text, self._decode(ids))
            if raw is not None:
                raise DataError(
                    "the chat template doesn't take a list of parts as content: it writes "
                    f"{_short(raw)}. Write the content as one string, or give a template that "
                    "reads parts (chat_template)."
                )
        return ids

    def join(self, row: PreferenceRow, response: Text) -> Text:
        """Prompt and response as one text; a string response ends in the end token."""
        prompt = row.prompt
        if isinstance(prompt, list) and isinstance(response, list):
            return prompt + response
        if not isinstance(prompt, str) or not isinstance(response, str):
            raise DataError("prompt and responses have different formats. Use strings or messages.")
        begin, end = self.tokenizer.bos_token, self.tokenizer.eos_token
        if begin and begin != end:  # a response that was rendered alone
            response = response.removeprefix(begin)
        if not row.append_eos:
            return prompt + response
        if not isinstance(end, str):
            raise DataError("the tokenizer has no end token. Set tokenizer.eos_token.")
        return prompt + (response if response.rstrip().endswith(end) else response + end)

    def checked(
        self,
        row: PreferenceRow,
        options: dict[str, Any],
        name: str,
        prompt: list[int],
        ids: list[int],
    ) -> tuple[list[int], bool]:
        """A response's ids, all text in them and ended once; and whether its end was added here.

        `prompt` are the ids of the prompt alone, `name` is that of the response's column.
        """
        after = ""
        if isinstance(row.prompt, list):
            after = self._after_text(row, options, name, ids)
        if not row.append_eos:
            return ids, False
        last = last_token(ids, self.tokenizer)
        if last >= 0 and self._is_end(ids[last], row, options, prompt, after):
            ids = once(ids, self.tokenizer, self.ends, self.stop_ids)
            end = ids[last_token(ids, self.tokenizer)]
            self.ends[end] = self.ends.get(end) or row.where
            return ids, False
        if after.strip() and self._decode(prompt).rstrip().endswith(after.strip()):
            raise DataError(
                f"the chat template writes {_short(after)} after {name} as it does before it, "
                "which begins another turn. Give a template that does so with "
                "add_generation_prompt only (chat_template)."
            )
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end token. Set tokenizer.eos_token.")
        end = self.tokenizer.eos_token_id
        self.ends[end] = self.ends[end] or row.where
        return [*ids, end], True

    def unread(self, row: PreferenceRow | Prompt, ids: list[int]) -> str | None:
        """What a template leaves out of a prompt: a message, or a tool; None: nothing.

        Turns of the assistant are not looked at: templates cut the reasoning off earlier ones.
        """
        if isinstance(row.prompt, str):
            return None
        given = [
            ("content", text)
            for message in row.prompt
            if message.get("role") != "assistant"
            for name, text in texts(message)
            if name == "content"
        ]
        for tool in row.tools or ():
            function = tool.get("function", tool) if isinstance(tool, dict) else None
            if isinstance(function, dict) and isinstance(function.get("name"), str):
                given.append(("tools", function["name"]))
        rendered = self._decode(ids)
        lost = next((x for x in given if not is_in(x[1], rendered)), None)
        if lost is None:
            return None
        # A tokenizer may not give the text back: ask the text.
        options = {"tools": row.tools, **row.chat_template_kwargs}
        rendered = self._template(row.prompt, options, tokenize=False, add_generation_prompt=True)
        lost = next((x for x in given if not is_in(x[1], rendered)), None)
        if lost is None:
            return None
        reason = cause(Lost(0, *lost), str(self.tokenizer.chat_template))
        return f"{lost[0]} {_short(lost[1])} ({reason})"

    def _after_text(
        self, row: PreferenceRow, options: dict[str, Any], name: str, ids: list[int]
    ) -> str:
        """What a template wrote after the text of a response; DataError where text is lost."""
        response: Any = getattr(row, name)
        lost, after = trace(response, "", self._decode(ids))
        if lost is None:
            return after
        # A beginning in the prompt, or a tokenizer that doesn't give the text back: ask the text.
        prompt = self._template(row.prompt, options, tokenize=False, add_generation_prompt=True)
        side = self._template([*row.prompt, *response], options, tokenize=False)
        split = _common_prefix_length(prompt, side)
        given = [text.strip() for message in row.prompt for _, text in texts(message)]  # type: ignore[arg-type]
        opening = prompt[:split]
        if given and given[-1] in opening:
            opening = opening[opening.rindex(given[-1]) + len(given[-1]) :]
        lost, after = trace(response, opening, side[split:])
        if lost is not None:
            raise DataError(self._told(lost, name, side[split:]))
        return after

    def _told(self, lost: Lost, name: str, rendered: str) -> str:
        template = str(self.tokenizer.chat_template)
        return (
            f"{lost.name} {_short(lost.text)} of message {lost.index} of {name} is not in what the "
            f"chat template renders, {_short(rendered)}: {cause(lost, template)}. Give a template "
            "that keeps it (chat_template), or write the row without it."
        )

    def _is_end(
        self,
        token: int,
        row: PreferenceRow,
        options: dict[str, Any],
        prompt: list[int],
        after: str,
    ) -> bool:
        """Whether a token ends a turn: a special one that the template wrote `after` the text of
        the response, unless it begins turns with it."""
        if token in self.ends or token not in self.special or isinstance(row.prompt, str):
            return token in self.ends
        tokenizer = self.tokenizer
        others = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
        if token in others or self._decode([token]).strip() not in after:
            return False
        alone = self.ids(row.prompt, options, add_generation_prompt=False)
        opening = prompt[_common_prefix_length(alone, prompt) :]
        if token in (opening or prompt[last_token(prompt, self.tokenizer) :]):
            return False
        self.ends[token] = row.where
        return True

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(text=text, add_special_tokens=False)["input_ids"]

    def _template(self, messages: Any, options: dict[str, Any], **settings: Any) -> Any:
        if not (self.tokenizer.chat_template or options.get("chat_template")):
            raise DataError(
                "the tokenizer has no chat template for message lists. Use the tokenizer of a chat "
                "model, give one (chat_template), or write strings."
            )
        return self._call(
            lambda: self.tokenizer.apply_chat_template(messages, **settings, **options)
        )

    def _call(self, render: Callable[[], Any]) -> Any:
        try:
            return render()
        except Exception as error:  # a template is a program of its own and can raise anything
            raise DataError(
                f"the tokenizer can't render this ({type(error).__name__}: {_first_line(error)}). "
                "Fix the row, or use a chat template that accepts it."
            ) from error


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:45]} ... {text[-10:]}")


def _starts_with(ids: Sequence[int], prefix: Sequence[int]) -> bool:
    return ids[: len(prefix)] == prefix


def _common_prefix_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _check_max_length(max_length: int | None) -> None:
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2 (prompt and response), got {max_length}")


def _check_overlong(overlong: str) -> None:
    if overlong not in OVERLONG:
        raise ValueError(f"overlong must be truncate, drop or stop, got {overlong!r}")
