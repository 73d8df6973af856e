"""Held-out responses of a policy: what they score, how long they are, how often they win.

    start, now = (heldout(out / f"round-{i:02d}" / "eval") for i in (0, 3))
    win_rate(start, now)

Responses to one prompt are not independent, so every mean is first taken over a prompt's responses
and then over prompts, and so is its interval: 1.96 standard errors over prompts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastdpo.data import DataError, Text
from fastdpo.storage import read_parts


class Estimate(NamedTuple):
    """A value and half the width of its 95% interval, None where there is none."""

    value: float
    half: float | None = None


@dataclass(frozen=True)
class Response:
    """A scored response; `length` is in tokens, `cut` says that it reached max_new_tokens."""

    prompt_index: int
    prompt: Text
    text: str
    length: int
    score: float
    cut: bool


def by_score(response: Response) -> float:
    return response.score


def by_length(response: Response) -> float:
    return float(response.length)


def heldout(folder: Path) -> list[Response]:
    """The responses in an evaluation's `candidates` with their `scores`, in order of the prompts.

    Raises DataError when parts are missing, a row is malformed, or the two don't belong together.
    """
    scores = {_key(row, folder): row.get("score") for row in read_parts(folder / "scores")}
    found: dict[tuple[int, int], Response] = {}
    for row in read_parts(folder / "candidates"):
        key = _key(row, folder)
        response = _response(row, number(scores.get(key)))
        if response is None or key in found:
            raise DataError(
                f"{folder}: prompt {key[0]}, sample {key[1]} is malformed, there twice or without "
                "a score. Write the stage again."
            )
        found[key] = response
    if found.keys() != scores.keys():
        raise DataError(f"{folder}: there are scores of no candidate. Score it again.")
    return [found[key] for key in sorted(found)]


def _response(row: dict[str, Any], score: float | None) -> Response | None:
    prompt, text, ids = row.get("prompt"), row.get("response"), row.get("response_ids")
    if score is None or not isinstance(prompt, str | list):
        return None
    if not isinstance(text, str) or not isinstance(ids, list):
        return None
    cut = row.get("finish_reason") == "length"
    return Response(row["prompt_index"], prompt, text, len(ids), score, cut)


def _key(row: dict[str, Any], folder: Path) -> tuple[int, int]:
    prompt_index, sample_index = row.get("prompt_index"), row.get("sample_index")
    if type(prompt_index) is not int or type(sample_index) is not int:
        raise DataError(f"{folder}: a row has no prompt_index or sample_index. Write it again.")
    return prompt_index, sample_index


def number(value: Any) -> float | None:
    """A JSON number as a float; None for all else, NaN, and what is too large to compute with."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        return None
    return float(value)


def interval(values: Sequence[float]) -> Estimate:
    """Mean of independent values and 1.96 standard errors; none where all values are the same."""
    n = len(values)
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n) if n > 1 else 0.0
    # What rounding leaves of equal values is no spread.
    return Estimate(mean, 1.96 * error if error > 1e-12 * max(map(abs, values)) else None)


def by_prompt(held: Sequence[Response]) -> dict[int, list[Response]]:
    groups: dict[int, list[Response]] = {}
    for one in held:
        groups.setdefault(one.prompt_index, []).append(one)
    return groups


def over_prompts(held: Sequence[Response], what: Callable[[Response], float]) -> Estimate:
    """Mean of `what` over responses of a prompt, then over prompts."""
    return interval([_mean(group, what) for group in by_prompt(held).values()])


def change(
    start: Sequence[Response], now: Sequence[Response], what: Callable[[Response], float]
) -> Estimate | None:
    """Mean difference of `what` to the start, prompt by prompt; None where they share no prompt."""
    before, after = by_prompt(start), by_prompt(now)
    shared = [index for index in after if index in before]
    if not shared:
        return None
    return interval([_mean(after[i], what) - _mean(before[i], what) for i in shared])


def win_rate(start: Sequence[Response], now: Sequence[Response]) -> Estimate | None:
    """How often a response scores higher than one of the start to the same prompt; a tie is half.

    Over all pairs of a prompt, then over prompts; None where they share no prompt.
    """
    before, after = by_prompt(start), by_prompt(now)
    shared = [index for index in after if index in before]
    if not shared:
        return None
    return interval([_wins(after[i], before[i]) for i in shared])


def _wins(group: Sequence[Response], others: Sequence[Response]) -> float:
    points = ((a.score > b.score) + 0.5 * (a.score == b.score) for a in group for b in others)
    return sum(points) / (len(group) * len(others))


def correlation(held: Sequence[Response]) -> Estimate | None:
    """Pearson's, of score and length over all responses; None where one of them is constant.

    Its interval is 1.96 standard errors of the jackknife that leaves out a prompt at a time.
    """
    groups = list(by_prompt(held).values())
    # About the means, so that the sums below don't cancel.
    center = _mean(held, by_score), _mean(held, by_length)
    parts = [_sums(group, *center) for group in groups]
    total = [math.fsum(column) for column in zip(*parts)]
    whole = _pearson(total)
    without = [_pearson([t - x for t, x in zip(total, part)]) for part in parts]
    known = [r for r in without if r is not None]
    if whole is None or len(known) < max(len(groups), 2):
        return None if whole is None else Estimate(whole)
    middle = math.fsum(known) / len(known)
    spread = math.fsum((r - middle) ** 2 for r in known)
    return Estimate(whole, 1.96 * math.sqrt(spread * (len(known) - 1) / len(known)))


def _sums(group: Sequence[Response], score: float, length: float) -> list[float]:
    """Number, sums, sums of squares and of products of a prompt's scores and lengths."""
    pairs = [(r.score - score, r.length - length) for r in group]
    sums = ((1.0, x, y, x * x, y * y, x * y) for x, y in pairs)
    return [math.fsum(column) for column in zip(*sums)]


def _pearson(sums: Sequence[float]) -> float | None:
    n, x, y, xx, yy, xy = sums
    if n < 2:
        return None
    var_x, var_y = xx - x * x / n, yy - y * y / n
    if var_x <= 1e-12 * xx or var_y <= 1e-12 * yy:
        return None
    return max(-1.0, min(1.0, (xy - x * y / n) / math.sqrt(var_x * var_y)))


def _mean(group: Sequence[Response], what: Callable[[Response], float]) -> float:
    return math.fsum(map(what, group)) / len(group)
