"""The examples that `fastdpo train` reads: texts to be tokenized, or what `fastdpo pair` wrote."""

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastdpo.data.columns import warn_of_near_names
from fastdpo.data.records import ListRow, PairRow, TextRow
from fastdpo.data.rendering import takes_as_chat
from fastdpo.data.rows import Rows, example_rows
from fastdpo.data.scored import from_first_difference, with_scored_prompt
from fastdpo.data.tokenize import Tokenized, tokenize_dataset
from fastdpo.errors import ConfigError, is_default, require
from fastdpo.model.load import stop_ids
from fastdpo.pair.stage import load_lists, load_pairs, split_stages

_LISTS = {"prompt_ids", "responses_ids"}  # columns of lists that `fastdpo pair` wrote, and of pairs
_PAIRS = {"prompt_ids", "chosen_ids", "rejected_ids"}


def is_first() -> bool:
    """Whether this is the first process of a launch, which alone writes and says things."""
    return int(os.environ.get("RANK", "0")) == 0


def has_tokens(rows: Rows) -> bool:
    """Whether they are what ``fastdpo pair`` wrote."""
    columns = rows.rows[0].keys()
    return columns >= _PAIRS or columns >= _LISTS


def read_examples(config: Any, name: str, rows: Rows, tokenizer: Any) -> Tokenized:
    """The examples of ``dataset`` or ``eval_dataset``, which are tokenized or to be.

    All are of one shape, which each of them says.

    Args:
        config: the options of ``fastdpo train``.
        name: of the option that names the dataset.

    Raises:
        DataError: a row is none of the shape of the first, or cannot be tokenized.
        ConfigError: an option that the examples have no use for.
    """
    if has_tokens(rows):
        return _scored(config, name, Tokenized(_tokenized(config, name, rows), {}, []))
    given = example_rows(rows)
    _tell_of_strings(config, given, tokenizer)
    found = tokenize_dataset(
        given,
        tokenizer,
        max_length=config.max_length,
        overlong=config.overlong,
        stop_ids=stop_ids(config.model, tokenizer),
        string_prompts=config.string_prompts,
        progress=is_first(),
    )
    if is_first():
        print(found if name == "dataset" else f"{name}: {found}")
    return _scored(config, name, found)


def _scored(config: Any, name: str, found: Tokenized) -> Tokenized:
    """The examples with those of their tokens scored that the options say."""
    examples = found.examples
    if config.from_first_difference:
        shape, given = examples[0].shape, f"{name}={getattr(config, name)}"
        wanted = f"left out: pairs alone have a first difference, and {given} has {shape}"
        require(config, "from_first_difference", shape == "pairs", wanted)
        examples = [from_first_difference(pair) for pair in examples]
    if config.prompt_in_likelihood:
        examples = [with_scored_prompt(example) for example in examples]
    return replace(found, examples=examples)


def _tell_of_strings(config: Any, rows: Sequence[TextRow], tokenizer: Any) -> None:
    """Say how prompts are taken that are strings, where a chat template could take them otherwise.

    Raises ConfigError where they can't be taken as the option says.
    """
    as_chat = config.string_prompts == "chat"
    if as_chat and tokenizer.chat_template is None:
        raise ConfigError(
            f"string_prompts=chat needs a chat template, which model={config.model} has not; give "
            "one (chat_template), or leave string_prompts out"
        )
    strings = (x for x in rows if isinstance(x.prompt, str))
    first = next((x for x in strings if takes_as_chat(str(x.prompt), tokenizer)), None)
    if first is not None and is_first():
        how, other = (
            ("messages of the user, as in sampling", "string_prompts=text takes them as text")
            if as_chat
            else (
                "text, without the model's chat template, as in TRL",
                "string_prompts=chat takes them as messages of the user, as fastdpo sample does",
            )
        )
        print(f"prompts that are strings, first at {first.where}, are taken as {how}; {other}")


def _tokenized(config: Any, name: str, rows: Rows) -> list[Any]:
    """What ``fastdpo pair`` wrote."""
    path = getattr(config, name)
    examples: list[Any]
    of_pairs = rows.rows[0].keys() >= _PAIRS
    columns = [field.name for field in fields(PairRow if of_pairs else ListRow)]
    warn_of_near_names(rows.source, rows.rows, columns)
    if of_pairs:
        examples = load_pairs(Path(path))
        if len(stages := split_stages(examples)) > 1:
            raise ConfigError(
                f"{name}={path} is a curriculum of {len(stages)} stages, each of which "
                "starts where the one before ended; use fastdpo iterate"
            )
    else:
        examples = load_lists(Path(path))
    longest = max(example.longest for example in examples)
    if config.max_length < longest and not is_default(config, "max_length"):
        raise ConfigError(
            f"max_length={config.max_length}, but {name}={path} has a sequence of "
            f"{longest} tokens: what fastdpo pair wrote is taken as it is. Leave max_length "
            "out, or give it to fastdpo sample"
        )
    return examples
