"""The rows that go from stage to stage, and the one place that knows their columns.

    Prompt -> Candidate (a sampled response) -> Scored -> PairRow, ListRow (what training reads)

Each is written as a line of JSON by its `to_json` and read, and checked, by its `from_json`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fastdpo.errors import DataError, is_number

if TYPE_CHECKING:
    from fastdpo.loss.examples import Shape  # which loads torch

Text = str | list[dict[str, Any]]  # a string, or messages
# What a prompt that is a string is taken as: a message of the user, or text without a template.
STRING_PROMPTS = ("chat", "text")


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
class Prompted:
    """A prompt and responses to it by the names of their columns: what a chat template renders.

    With a `prefix` the responses go on after it, in a message of the assistant that it begins; they
    are strings then, which no template sees.
    """

    where: str
    prompt: Text
    responses: dict[str, Text]
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    append_eos: bool = True
    prefix: str | None = None


@dataclass(frozen=True, kw_only=True)
class _TextRow:
    """What a row has beside its prompt and its responses.

    Without `append_eos` the responses are unfinished and needn't end in an end token.  `numbers`
    are those that an example counts beside its tokens, by their names in `fastdpo.data.examples`.
    """

    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    append_eos: bool = True
    numbers: dict[str, float] = field(default_factory=dict)

    def _prompted(self, prompt: Text, **responses: Text) -> Prompted:
        names = ("where", "tools", "chat_template_kwargs", "append_eos", "prefix")
        rest = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return Prompted(prompt=prompt, responses=responses, **rest)


@dataclass(frozen=True)
class PreferenceRow(_TextRow):
    """A preference pair with an explicit prompt: all texts are strings or all are messages.

    Attributes:
        rejected_prompt: another prompt of the rejected response; None: the same.
        prefix: what is right of the answer so far, of which the responses are the next step
            (Step-DPO).  The prompt may be messages then, and the responses are strings.
    """

    where: str
    prompt: Text
    chosen: Text
    rejected: Text
    rejected_prompt: Text | None = field(default=None, kw_only=True)
    prefix: str | None = field(default=None, kw_only=True)

    shape: ClassVar["Shape"] = "pairs"

    @property
    def prompted(self) -> list[Prompted]:
        """Its prompts, each with the responses to it."""
        if self.rejected_prompt is None:
            return [self._prompted(self.prompt, chosen=self.chosen, rejected=self.rejected)]
        return [
            self._prompted(self.prompt, chosen=self.chosen),
            self._prompted(self.rejected_prompt, rejected=self.rejected),
        ]


@dataclass(frozen=True)
class RankedRow(_TextRow):
    """Responses to one prompt with their scores: all texts are strings or all are messages."""

    where: str
    prompt: Text
    responses: list[Text]
    scores: list[float]

    shape: ClassVar["Shape"] = "lists"

    @property
    def prompted(self) -> list[Prompted]:
        """Its prompt with all responses."""
        responses = {f"responses[{i}]": text for i, text in enumerate(self.responses)}
        return [self._prompted(self.prompt, **responses)]


@dataclass(frozen=True)
class LabeledRow(_TextRow):
    """A response that is desirable (label true) or not: both texts are strings or messages."""

    where: str
    prompt: Text
    completion: Text
    label: bool

    shape: ClassVar["Shape"] = "singles"

    @property
    def prompted(self) -> list[Prompted]:
        """Its prompt with the response."""
        return [self._prompted(self.prompt, completion=self.completion)]


TextRow = PreferenceRow | RankedRow | LabeledRow


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
    def from_json(
        cls, row: Mapping[str, Any], where: str, *, text_only: bool = False
    ) -> "Candidate":
        """Of a row of JSON; with `text_only` it may lack tokens and finish reason, left empty then.

        Raises DataError, naming the place and the column, when one is missing.
        """
        spare = {"prompt_ids": [], "response_ids": [], "finish_reason": ""} if text_only else {}
        row = {**spare, **row}
        names = [name for name in cls.__dataclass_fields__ if name != "extra"]
        missing = [name for name in names if name not in row]
        if missing:
            raise DataError(f"{where}: {missing[0]!r} is missing. Sample it again.")
        return cls(**{name: row[name] for name in names}, extra=row.get("extra") or {})

    @property
    def place(self) -> tuple[int, int]:
        """What tells it from the other candidates of a stage."""
        return self.prompt_index, self.sample_index


@dataclass(frozen=True)
class Scored(Candidate):
    """A candidate and what it scored. Raises DataError unless its score is a finite number.

    Attributes:
        score: what pairs are made by, after shaping.
        scores: each scorer's own, before.
        unshaped: the weighted sum of these, which ranks those whose scores shaping made equal; 0
            where nothing was shaped.
        penalized: whether length was taken off the score.
    """

    score: float = field(kw_only=True)
    scores: list[float] = field(kw_only=True)
    unshaped: float = field(default=0.0, kw_only=True)
    penalized: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not is_number(self.score):
            raise DataError(
                f"{self.name}: the score is {self.score!r}, not a finite number. Score it again."
            )

    @classmethod
    def of(cls, candidate: Candidate, scores: list[float]) -> "Scored":
        """A candidate with the scores of all scorers, of which the first one counts."""
        return cls(**vars(candidate), score=scores[0], scores=scores)

    @property
    def name(self) -> str:
        """Its place, for messages."""
        return f"candidate (prompt {self.prompt_index}, sample {self.sample_index})"

    @property
    def rank(self) -> tuple[float, float]:
        """What it is ranked by: its score, and among equal ones its score before shaping."""
        return self.score, self.unshaped


@dataclass(frozen=True)
class PairRow:
    """A preference pair in tokens, as `pair` writes it and training reads it.

    Attributes:
        prompt_index: place of the prompt; of an offline pair that of its row.
        score_chosen, score_rejected: after shaping; None of an offline pair without scores.
        chosen_finish, rejected_finish: the finish reasons of the two candidates.
        scores_chosen, scores_rejected: of several scorers, each one's own.
        stage: of a curriculum, from 0.
        flipped: whether the two sides were turned round.
        label_smoothing, weight, margin: of the pair's loss.
        source: "sampled" or "offline", where both are there.
        origin: of an offline pair, its prompt with all that sampling takes; not written.
    """

    prompt_index: int
    prompt: Text
    prompt_ids: list[int]
    chosen: str
    rejected: str
    chosen_ids: list[int]
    rejected_ids: list[int]
    score_chosen: float | None
    score_rejected: float | None
    chosen_finish: str
    rejected_finish: str
    scores_chosen: list[float] | None = None
    scores_rejected: list[float] | None = None
    stage: int | None = None
    flipped: bool | None = None
    label_smoothing: float | None = None
    source: str | None = None
    weight: float | None = None
    margin: float | None = None
    origin: Prompt | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, chosen: Scored, rejected: Scored) -> "PairRow":
        """Two responses to one prompt."""
        sides: dict[str, Any] = {}
        for name, columns in _SIDES.items():
            sides |= zip(columns, (getattr(chosen, name), getattr(rejected, name)))
        if len(chosen.scores) < 2:
            sides |= {"scores_chosen": None, "scores_rejected": None}
        return cls(chosen.prompt_index, chosen.prompt, chosen.prompt_ids, **sides)

    @property
    def key(self) -> str:
        """What tells its prompt from others: see `prompt_key`."""
        return prompt_key(self.prompt)

    def turned(self) -> "PairRow":
        """The pair with chosen and rejected exchanged."""
        turned: dict[str, Any] = {"flipped": True}
        for chosen, rejected in _SIDES.values():
            turned |= {chosen: getattr(self, rejected), rejected: getattr(self, chosen)}
        return replace(self, **turned)

    def candidates(self) -> tuple[Candidate, Candidate]:
        """Both sides as responses to the prompt, sample 0 the chosen one."""
        index, prompt, ids = self.prompt_index, self.prompt, self.prompt_ids
        extra = self.origin.extra if self.origin else {}
        chosen = self.chosen, self.chosen_ids, self.chosen_finish
        rejected = self.rejected, self.rejected_ids, self.rejected_finish
        return (
            Candidate(index, 0, prompt, ids, *chosen, extra),
            Candidate(index, 1, prompt, ids, *rejected, extra),
        )

    def to_json(self) -> dict[str, Any]:
        """Without the columns that nothing set."""
        row = {name: value for name, value in vars(self).items() if name != "origin"}
        return {name: x for name, x in row.items() if x is not None or name not in _OPTIONAL}

    @classmethod
    def from_json(cls, row: Mapping[str, Any], where: str) -> "PairRow":
        """Texts may be left out. Raises DataError, naming the place and the column, when another
        column is missing, or a number is out of its range.
        """
        row = {"prompt": "", "chosen": "", "rejected": "", **row}
        if OLD_SMOOTHING in row:
            row.setdefault("label_smoothing", row.pop(OLD_SMOOTHING))
        names = [x.name for x in fields(cls) if x.name in row or x.name not in _OPTIONAL]
        for name in names:
            if name not in row:
                raise DataError(f"{where}: {name!r} is missing. Pair again.")
            if not _CHECKS.get(name, lambda value: True)(row[name]):
                raise DataError(f"{where}: {name} is {row[name]!r}. Pair again.")
        return cls(**{name: row[name] for name in names})


_SIDES = {  # what a pair has of its two candidates, and the columns of chosen and rejected
    "response": ("chosen", "rejected"),
    "response_ids": ("chosen_ids", "rejected_ids"),
    "score": ("score_chosen", "score_rejected"),
    "finish_reason": ("chosen_finish", "rejected_finish"),
    "scores": ("scores_chosen", "scores_rejected"),
}
OLD_SMOOTHING = "smoothing"  # the name of label_smoothing in files of older runs
_OPTIONAL = {x.name for x in fields(PairRow) if x.default is None}
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "score_chosen": lambda x: x is None or is_number(x),
    "score_rejected": lambda x: x is None or is_number(x),
    "weight": lambda x: is_number(x) and x >= 0,
    "margin": is_number,
    "label_smoothing": lambda x: is_number(x) and 0 <= x <= 1,
    "stage": lambda x: type(x) is int and x >= 0,
    "source": lambda x: x in ("sampled", "offline"),
}


@dataclass(frozen=True)
class ListRow:
    """Responses to one prompt and their scores in tokens, as `pair` writes them.

    Attributes:
        prompt_index: place of the prompt.
        responses, responses_ids: texts and tokens, best first.
        scores: after shaping, one for each.
        finish_reasons: of each.
    """

    prompt_index: int
    prompt: Text
    prompt_ids: list[int]
    responses: list[str]
    responses_ids: list[list[int]]
    scores: list[float]
    finish_reasons: list[str]

    @classmethod
    def of(cls, rows: "Sequence[Scored]") -> "ListRow":
        """Responses to one prompt."""
        first = rows[0]
        return cls(
            first.prompt_index, first.prompt, first.prompt_ids,
            [row.response for row in rows], [row.response_ids for row in rows],
            [row.score for row in rows], [row.finish_reason for row in rows],
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, row: Mapping[str, Any], where: str) -> "ListRow":
        """Texts and finish reasons may be left out. Raises DataError, naming the place and the
        column, when another column is missing, or is no list of as many as there are responses.
        """
        row = {"prompt": "", "responses": [], "finish_reasons": [], **row}
        for name in (x.name for x in fields(cls)):
            if name not in row:
                raise DataError(f"{where}: {name!r} is missing. Pair again.")
        scores, responses = row["scores"], row["responses_ids"]
        if not isinstance(responses, list) or len(responses) < 2:
            raise DataError(f"{where}: responses_ids must be at least two lists. Pair again.")
        if not isinstance(scores, list) or len(scores) != len(responses):
            raise DataError(
                f"{where}: scores must be a list of {len(responses)} numbers, one for each of "
                f"responses_ids, not {scores!r}. Pair again."
            )
        return cls(**{x.name: row[x.name] for x in fields(cls)})


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Within it, errors in a row name its place."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def prompt_key(prompt: Text) -> str:
    """What tells two prompts apart: their messages, a string being one message of the user, and
    parts of text one text."""
    messages = [_joined(message) for message in messages_of(prompt)]
    return json.dumps(messages, sort_keys=True, default=str)


def messages_of(prompt: Text, response: str | None = None) -> list[dict[str, Any]]:
    """A prompt as messages, a string being one of the user; with the response, if one is given."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return messages if response is None else [*messages, {"role": "assistant", "content": response}]


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(x, dict) and x.keys() == {"type", "text"} for x in content
    ):
        return {**message, "content": "".join(x["text"] for x in content)}
    return message
