"""Examples within a number of tokens: what happens to those that are too long."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastdpo.data.examples import (
    TokenizedExample,
    TokenizedList,
    TokenizedPair,
    classes_of,
    tokens_of,
)
from fastdpo.errors import DataError

OVERLONG = ("truncate", "drop", "stop")  # what can be done with a pair that is too long
_NAMED_ROWS = 3  # of those dropped or truncated; the rest are counted


def counted(places: Sequence[str]) -> str:
    """How many rows, and the first of them by name."""
    if not places:
        return "0"
    more = ", ..." if len(places) > _NAMED_ROWS else ""
    return f"{len(places)} ({', '.join(places[:_NAMED_ROWS])}{more})"


def check_overlong(overlong: str) -> None:
    """Raise ValueError where it is none of `OVERLONG`."""
    if overlong not in OVERLONG:
        raise ValueError(f"overlong must be truncate, drop or stop, got {overlong!r}")


@dataclass(frozen=True)
class Fitted:
    """What `fit_to_budget` made of pairs: `pairs[i]` was number `kept[i]` of those given."""

    pairs: list[Any]  # of the kind of those given
    kept: list[int]
    dropped_at: list[str]  # the rows left out
    truncated_at: list[str]  # rows kept with a response cut


def fit_to_budget(
    pairs: Sequence[TokenizedExample], max_tokens: int, *, layout: str, overlong: str
) -> Fitted:
    """Make every pair, list or single response fit a micro-batch of `max_tokens` tokens in a
    layout, in order.

    One that fits is returned as it is, the same object. `overlong` says what happens to any other:

    - "truncate": its responses are cut at the end to one common cap, the largest at which it fits;
      a response within the cap stays whole. It is dropped when not even one token of each response
      fits, or when all its sequences are the same tokens after the cut.
    - "drop": it is dropped.
    - "stop": the first such one raises DataError.

    Raises DataError when none is left, and ValueError when `overlong` is none of the three.
    """
    check_overlong(overlong)
    if not pairs:
        raise DataError("there are no pairs to fit to max_tokens. Give at least one pair.")
    sizes = [pair.num_tokens(layout) for pair in pairs]
    fitted = Fitted([], [], [], [])
    for i, pair in enumerate(pairs):
        fitting: TokenizedExample | None = pair
        if sizes[i] > max_tokens:
            if overlong == "stop":
                raise DataError(
                    f"{_place(pairs, i)}: the {pair.name} takes {sizes[i]} tokens, max_tokens is "
                    f"{max_tokens}. Raise max_tokens to at least {max(sizes)}, the longest "
                    f"{pair.name}, or set overlong=truncate or overlong=drop."
                )
            fitting = _cut(pair, max_tokens, layout) if overlong == "truncate" else None
        if fitting is None:
            fitted.dropped_at.append(_place(pairs, i))
            continue
        fitted.pairs.append(fitting)
        fitted.kept.append(i)
        if fitting is not pair:
            fitted.truncated_at.append(_place(pairs, i))
    if not fitted.pairs:
        choice = ", or set overlong=truncate" if overlong == "drop" else ""
        raise DataError(
            f"{_place(pairs, 0)} to {_place(pairs, len(pairs) - 1)}: no {pairs[0].name} is left: "
            f"all {len(pairs)} take more than max_tokens = {max_tokens} tokens. "
            f"Raise max_tokens to at least {max(sizes)}, the longest {pairs[0].name}{choice}."
        )
    return fitted


def _place(pairs: Sequence[TokenizedExample], i: int) -> str:
    return pairs[i].where or f"{pairs[i].name} {i} (counting from 0)"


def _cut(pair: TokenizedExample, max_tokens: int, layout: str) -> TokenizedExample | None:
    """The example within `max_tokens`, its responses under one cap; None if that leaves nothing."""
    prompts, lengths = pair.prompts[: pair.num_computed], [*map(len, pair.responses)]
    lengths = lengths[: pair.num_computed]

    def fits(cap: int) -> bool:
        return tokens_of(prompts, [min(length, cap) for length in lengths], layout) <= max_tokens

    caps = range(1, min(max(lengths), max_tokens) + 1)
    if classes_of(layout):
        # Not by halves: where not all can share the prompt, a longer cap may take fewer tokens.
        cap = next(filter(fits, reversed(caps)), 0)
    else:
        cap = bisect_left(caps, True, key=lambda cap: not fits(cap))
    return _cut_to(pair, cap)


def _cut_to(pair: TokenizedExample, cap: int) -> TokenizedExample | None:
    """The example with its responses cut to `cap` tokens; None if that makes all of them alike."""
    if cap < 1:
        return None
    if isinstance(pair, TokenizedPair):
        chosen_ids, rejected_ids = pair.chosen_ids[:cap], pair.rejected_ids[:cap]
        alike = pair.rejected_prompt_ids is None and chosen_ids == rejected_ids
        return None if alike else replace(pair, chosen_ids=chosen_ids, rejected_ids=rejected_ids)
    if isinstance(pair, TokenizedList):
        responses = [ids[:cap] for ids in pair.responses_ids]
        alike = all(ids == responses[0] for ids in responses)
        return None if alike else replace(pair, responses_ids=responses)
    return replace(pair, response_ids=pair.response_ids[:cap])
