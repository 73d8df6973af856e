"""The rows that go from stage to stage, and the one place that knows their columns.

    Prompt -> Candidate (a sampled response) -> Scored -> PairRow (what training reads)

Each is written as a line of JSON by its `to_json` and read, and checked, by its `from_json`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastdpo.errors import DataError

Text = str | list[dict[str, Any]]  # a string, or messages


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample from. `where` names its place in the source."""

    where: str
    prompt: Text
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells it from other prompts: see `prompt_key`."""
        return prompt_key(self.prompt)


@dataclass(frozen=True)
class PreferenceRow:
    """A preference pair with an explicit prompt: all three are strings or all are messages.

    Without `append_eos` the responses are unfinished and needn't end in an end token.
    """

    where: str
    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    append_eos: bool = True


@dataclass(frozen=True)
class Candidate:
    """A response to a prompt, as sampling writes it.

    Attributes:
        prompt_index, sample_index: place of the prompt, and of the response among its own.
        prompt, prompt_ids: as given, and the tokens that the model saw.
        response, response_ids: text without special tokens, up to a stop string; tokens up to and
            with the end token, or the one that completes the stop string.
        finish_reason: "stop" at either, "length" when cut at ``max_new_tokens``.
        extra: the other columns of the prompt.
    """

    prompt_index: int
    sample_index: int
    prompt: Text
    prompt_ids: list[int]
    response: str
    response_ids: list[int]
    finish_reason: str
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, row: Mapping[str, Any], where: str) -> "Candidate":
        """Raises DataError, naming the place and the column, when one is missing."""
        names = [name for name in cls.__dataclass_fields__ if name != "extra"]
        missing = [name for name in names if name not in row]
        if missing:
            raise DataError(f"{where}: {missing[0]!r} is missing. Sample it again.")
        return cls(**{name: row[name] for name in names}, extra=row.get("extra") or {})

    @property
    def place(self) -> tuple[int, int]:
        """What tells it from the other candidates of a stage."""
        return self.prompt_index, self.sample_index


def prompt_key(prompt: Text) -> str:
    """What tells two prompts apart: their messages, a string being one message of the user, and
    parts of text one text."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return json.dumps([_joined(message) for message in messages], sort_keys=True, default=str)


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(x, dict) and x.keys() == {"type", "text"} for x in content
    ):
        return {**message, "content": "".join(x["text"] for x in content)}
    return message
