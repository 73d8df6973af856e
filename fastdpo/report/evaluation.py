"""Held-out responses of a policy: what they score, how long they are, how often they win.

    start, now = (heldout(out / f"round-{i:02d}" / "eval") for i in (0, 3))
    win_rate(start, now)

Responses to one prompt are not independent, so every mean is first taken over a prompt's responses
and then over prompts, and so is its interval: Student's, with a prompt as the independent unit.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from fastdpo.data.parts import read_scored
from fastdpo.data.records import Candidate, Scored
from fastdpo.errors import DataError, is_number

NORMAL = 1.959964  # quantile of many degrees of freedom
Row = TypeVar("Row", bound=Candidate)
Measure = Callable[[Scored], float]


class Estimate(NamedTuple):
    """A value and half the width of its 95% interval, None where there is none."""

    value: float
    half: float | None = None


def by_score(response: Scored) -> float:
    return response.score


def by_length(response: Scored) -> float:
    """In tokens."""
    return float(len(response.response_ids))


def heldout(folder: Path) -> list[Scored]:
    """The responses in an evaluation's `candidates` with their `scores`, in order of the prompts.

    Raises DataError as `read_scored`, and for a row that can't be shown.
    """
    rows = read_scored(folder / "candidates", [folder / "scores"])
    for row in rows:
        texts = isinstance(row.prompt, str | list) and isinstance(row.response, str)
        if not (texts and isinstance(row.response_ids, list)) or number(row.score) is None:
            raise DataError(f"{folder}: {row.name} is malformed. Write the stage again.")
    return rows


def number(value: Any) -> float | None:
    """A JSON number as a float; None for all else, NaN, and what is too large to compute with."""
    return float(value) if is_number(value) and abs(value) < 1e30 else None


@lru_cache
def quantile(degrees: int) -> float:
    """Student's t that 95% of values lie within on both sides, for 1 degree of freedom and more.

    For whole degrees the probability within t is a finite sum in the angle whose tangent is
    t / sqrt(degrees) (Abramowitz and Stegun, 26.7.3 and 26.7.4); it is inverted by bisection.
    Above 1000 the first term of the series in 1 / degrees does (26.7.5), to five digits.
    """
    if degrees > 1000:
        return NORMAL + (NORMAL**3 + NORMAL) / (4 * degrees)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _within(angle: float, degrees: int) -> float:
    """Probability of a value within the t of this angle."""
    odd, square = degrees % 2, math.cos(angle) ** 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for i in range(odd + 1, degrees, 2):
        total += term
        term *= square * i / (i + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def half_width(error: float, count: int | None) -> float | None:
    """Half of the 95% interval of a mean of so many values, from its standard error.

    A count that is not known is 0 or None, and taken to be large. None where the error says
    nothing: of a single value, or of values that are all the same, it is 0.
    """
    if error <= 0 or count == 1:
        return None
    return error * (quantile(count - 1) if count else NORMAL)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; 0 for a single one, and where all are the same."""
    n, mean = len(values), fmean(values)
    error = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n) if n > 1 else 0.0
    # What rounding leaves of equal values is no spread.
    return error if error > 1e-12 * max(map(abs, values)) else 0.0


def interval(values: Sequence[float]) -> Estimate:
    """Mean of independent values, with Student's interval; none where all values are the same."""
    return Estimate(fmean(values), half_width(standard_error(values), len(values)))


def by_prompt(rows: Iterable[Row]) -> dict[int, list[Row]]:
    """The rows of each prompt, in order."""
    groups: dict[int, list[Row]] = {}
    for one in rows:
        groups.setdefault(one.prompt_index, []).append(one)
    return groups


def over_prompts(held: Sequence[Scored], what: Measure) -> Estimate:
    """Mean of `what` over responses of a prompt, then over prompts."""
    return interval(means_by_prompt(held, what))


def means_by_prompt(held: Sequence[Scored], what: Measure) -> list[float]:
    """Mean of `what` over the responses of each prompt."""
    return [_mean(group, what) for group in by_prompt(held).values()]


def change(start: Sequence[Scored], now: Sequence[Scored], what: Measure) -> Estimate | None:
    """Mean difference of `what` to the start, prompt by prompt; None where they share no prompt."""
    before, after = by_prompt(start), by_prompt(now)
    shared = [index for index in after if index in before]
    if not shared:
        return None
    return interval([_mean(after[i], what) - _mean(before[i], what) for i in shared])


def win_rate(start: Sequence[Scored], now: Sequence[Scored]) -> Estimate | None:
    """How often a response scores higher than one of the start to the same prompt; a tie is half.

    Over all pairs of a prompt, then over prompts; None where they share no prompt.
    """
    rates = win_rates(start, now)
    return interval(rates) if rates else None


def win_rates(start: Sequence[Scored], now: Sequence[Scored]) -> list[float]:
    """The win rate of each prompt that both have."""
    before, after = by_prompt(start), by_prompt(now)
    return [_wins(after[i], before[i]) for i in after if i in before]


def _wins(group: Sequence[Scored], others: Sequence[Scored]) -> float:
    points = ((a.score > b.score) + 0.5 * (a.score == b.score) for a in group for b in others)
    return sum(points) / (len(group) * len(others))


def correlation(held: Sequence[Scored]) -> Estimate | None:
    """Pearson's, of score and length over all responses; None where one of them is constant.

    Its interval is Student's, of the jackknife that leaves out a prompt at a time.
    """
    # About the means, so that the sums below don't cancel.
    center = _mean(held, by_score), _mean(held, by_length)
    parts = [_sums(group, *center) for group in by_prompt(held).values()]
    total = [math.fsum(column) for column in zip(*parts)]
    whole = _pearson(total)
    without = (_pearson([t - x for t, x in zip(total, part)]) for part in parts)
    known = [r for r in without if r is not None]
    if whole is None or len(known) < max(len(parts), 2):
        return None if whole is None else Estimate(whole)
    middle = fmean(known)
    spread = math.fsum((r - middle) ** 2 for r in known)
    error = math.sqrt(spread * (len(known) - 1) / len(known))
    return Estimate(whole, quantile(len(known) - 1) * error)


def _sums(group: Sequence[Scored], score: float, length: float) -> list[float]:
    """Number, sums, sums of squares and of products of a prompt's scores and lengths."""
    pairs = [(by_score(r) - score, by_length(r) - length) for r in group]
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


def _mean(group: Sequence[Scored], what: Measure) -> float:
    return fmean(map(what, group))
