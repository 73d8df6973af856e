"""Examples as token ids, and how many tokens each takes in a layout.

An example is what one loss is made of: a pair of responses, a list of them, or a single one.  Its
sequences, a prompt and a response each, follow one another as in `fastdpo.loss.examples`.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastdpo.errors import is_number
from fastdpo.loss.examples import Shape

NAMES: dict[str, str] = {"pairs": "pair", "lists": "list", "singles": "response"}  # of one
LAYOUTS = ("shared", "packed", "padded")


@dataclass(frozen=True)
class LengthClasses:
    """Which lengths of a sequence have the same rotary frequencies in a model.

    The class changes after each of ``steps``, and with every token after ``grows_from``.
    """

    steps: tuple[int, ...] = ()
    grows_from: int | None = None

    def of(self, length: int) -> tuple[int, int]:
        """The class of a length."""
        grown = self.grows_from is not None and length > self.grows_from
        return bisect_left(self.steps, length), length if grown else 0

    @property
    def last(self) -> int:
        """The last length of which the class is given by ``steps``."""
        return max(*self.steps, self.grows_from or 0, 0)

    def __bool__(self) -> bool:
        return bool(self.steps) or self.grows_from is not None

    def __or__(self, other: "LengthClasses") -> "LengthClasses":
        """Lengths that are of one class in both."""
        steps = tuple(sorted({*self.steps, *other.steps}))
        grows = [x.grows_from for x in (self, other) if x.grows_from is not None]
        return LengthClasses(steps, min(grows, default=None))


ANY_LENGTH = LengthClasses()


class Layout(str):
    """One of `LAYOUTS` for a certain model: with the lengths at which its frequencies change."""

    classes: LengthClasses

    def __new__(cls, name: str, classes: LengthClasses = ANY_LENGTH) -> "Layout":
        layout = super().__new__(cls, name)
        layout.classes = classes
        return layout

    @property
    def key(self) -> Any:
        """What names it where values that were computed in it are kept."""
        if not self.classes:
            return str(self)
        return [str(self), list(self.classes.steps), self.classes.grows_from]


def check_layout(layout: str) -> None:
    """Raise ValueError where it is none of `LAYOUTS`."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}")


def classes_of(layout: str) -> LengthClasses:
    """The length classes that a layout has, of a bare name none."""
    return layout.classes if isinstance(layout, Layout) else ANY_LENGTH


def shared_prompts(
    prompts: Sequence[list[int]], lengths: Sequence[int], layout: str
) -> list[list[int]]:
    """Sequences by number, in groups for which a prompt is computed once.

    Of an example with these prompts and so many tokens in its responses.  A group has one prompt,
    and in the shared layout one length class; in the others each sequence is a group.
    """
    if layout != "shared":
        return [[s] for s in range(len(lengths))]
    classes, groups = classes_of(layout), []
    kinds: list[tuple[list[int], tuple[int, int]]] = []
    for s, (prompt, length) in enumerate(zip(prompts, lengths)):
        kind = prompt, classes.of(len(prompt) + length)
        place = next((i for i, known in enumerate(kinds) if known == kind), len(kinds))
        if place == len(kinds):
            kinds.append(kind)
            groups.append([])
        groups[place].append(s)
    return groups


def tokens_of(prompts: Sequence[list[int]], lengths: Sequence[int], layout: str) -> int:
    """Tokens that an example with these prompts and lengths of responses takes in a layout."""
    check_layout(layout)
    if layout == "padded":
        return len(lengths) * max(len(prompt) + n for prompt, n in zip(prompts, lengths))
    groups = shared_prompts(prompts, lengths, layout)
    return sum(len(prompts[group[0]]) for group in groups) + sum(lengths)


@dataclass(frozen=True, kw_only=True)
class _Example:
    """What examples of all shapes have.

    Attributes:
        extra: other columns of the row.
        where: the row it came from, for messages.
        weight: a factor on its loss.
        label_smoothing: the probability that its label is flipped.
        margin: an offset of the argument of its loss.

    Raises:
        ValueError: a prompt or a response is empty or holds anything but ints >= 0, ``weight`` is
            negative or infinite, ``label_smoothing`` outside [0, 1], or ``margin`` not finite.
    """

    extra: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)
    weight: float = 1.0
    label_smoothing: float = 0.0
    margin: float = 0.0

    shape: ClassVar[Shape]

    def __post_init__(self) -> None:
        for name, ids in self._named():
            if not ids:
                raise ValueError(f"{name} is empty: it needs at least one token")
            if set(map(type, ids)) != {int} or min(ids) < 0:
                raise ValueError(f"{name} must be a list of ints >= 0, got {ids[:8]}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be finite and >= 0, got {self.weight!r}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing!r}")
        if not is_number(self.margin):
            raise ValueError(f"margin must be a finite number, got {self.margin!r}")

    def _named(self) -> list[tuple[str, list[int]]]:
        """Its lists of token ids, by their names."""
        raise NotImplementedError

    @property
    def prompts(self) -> list[list[int]]:
        """The prompt of each sequence: tokens that are seen and not scored."""
        raise NotImplementedError

    @property
    def responses(self) -> list[list[int]]:
        """The scored tokens of each sequence."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return NAMES[self.shape]

    @property
    def num_computed(self) -> int:
        """How many of its sequences are computed; those after are within the first one."""
        return len(self.responses)

    def num_tokens(self, layout: str = "shared") -> int:
        """Tokens it takes in a batch of a layout: the length to plan batches with.

        In a padded batch a sequence takes a row as long as the batch's longest; this is what the
        example takes alone.
        """
        count = self.num_computed
        return tokens_of(self.prompts[:count], list(map(len, self.responses[:count])), layout)

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence, prompt included."""
        return max(len(prompt) + len(ids) for prompt, ids in zip(self.prompts, self.responses))


@dataclass(frozen=True)
class TokenizedPair(_Example):
    """One preference pair, already truncated.

    Attributes:
        rejected_prompt_ids: another prompt of the rejected response; None: the same.
        score_chosen, score_rejected: of both responses, where they are known.
        prompt_nll: whether the tokens of the prompt but its first are a third sequence, scored as
            they stand before the chosen response (ORPO's and CPO's likelihood of whole sequences).

    Raises ValueError as every example, when a score is not finite, and when a prompt that
    is scored has one token.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    rejected_prompt_ids: list[int] | None = field(default=None, kw_only=True)
    score_chosen: float | None = field(default=None, kw_only=True)
    score_rejected: float | None = field(default=None, kw_only=True)
    prompt_nll: bool = field(default=False, kw_only=True)

    shape: ClassVar[Shape] = "pairs"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("score_chosen", "score_rejected"):
            score = getattr(self, name)
            if score is not None and not is_number(score):
                raise ValueError(f"{name} must be a finite number, got {score!r}")
        if self.prompt_nll and len(self.prompt_ids) < 2:
            raise ValueError("prompt_ids has one token: a prompt that is scored needs two")

    def _named(self) -> list[tuple[str, list[int]]]:
        names = ["prompt_ids", "chosen_ids", "rejected_ids"]
        names += [] if self.rejected_prompt_ids is None else ["rejected_prompt_ids"]
        return [(name, getattr(self, name)) for name in names]

    @property
    def prompts(self) -> list[list[int]]:
        rejected = self.rejected_prompt_ids
        sides = [self.prompt_ids, self.prompt_ids if rejected is None else rejected]
        return [*sides, self.prompt_ids[:1]] if self.prompt_nll else sides

    @property
    def responses(self) -> list[list[int]]:
        sides = [self.chosen_ids, self.rejected_ids]
        return [*sides, self.prompt_ids[1:]] if self.prompt_nll else sides

    @property
    def num_computed(self) -> int:
        return 2

    @property
    def scores(self) -> list[float] | None:
        """Of each sequence; None unless those of both responses are known."""
        if self.score_chosen is None or self.score_rejected is None:
            return None
        # Nothing reads that of the prompt.
        return [self.score_chosen, self.score_rejected, *([0.0] if self.prompt_nll else [])]


@dataclass(frozen=True)
class TokenizedList(_Example):
    """Responses to one prompt with their scores, higher is better.

    Raises ValueError as every example, and when there are not two responses or as many finite
    scores.
    """

    prompt_ids: list[int]
    responses_ids: list[list[int]]
    scores: list[float]

    shape: ClassVar[Shape] = "lists"

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.responses_ids)
        if count < 2:
            raise ValueError(f"responses_ids has {count} responses: a list needs at least 2")
        if len(self.scores) != count or not all(map(is_number, self.scores)):
            raise ValueError(f"scores must be {count} finite numbers, got {self.scores!r}")

    def _named(self) -> list[tuple[str, list[int]]]:
        responses = ((f"responses_ids[{i}]", x) for i, x in enumerate(self.responses_ids))
        return [("prompt_ids", self.prompt_ids), *responses]

    @property
    def prompts(self) -> list[list[int]]:
        return [self.prompt_ids] * len(self.responses_ids)

    @property
    def responses(self) -> list[list[int]]:
        return self.responses_ids


@dataclass(frozen=True)
class TokenizedSingle(_Example):
    """One response that is desirable, or not.

    Raises ValueError as every example, and when ``desirable`` is neither True nor False.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    desirable: bool

    shape: ClassVar[Shape] = "singles"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.desirable) is not bool:
            raise ValueError(f"desirable must be True or False, got {self.desirable!r}")

    def _named(self) -> list[tuple[str, list[int]]]:
        return [("prompt_ids", self.prompt_ids), ("response_ids", self.response_ids)]

    @property
    def prompts(self) -> list[list[int]]:
        return [self.prompt_ids]

    @property
    def responses(self) -> list[list[int]]:
        return [self.response_ids]

    @property
    def scores(self) -> None:
        """A single response has none."""


TokenizedExample = TokenizedPair | TokenizedList | TokenizedSingle
