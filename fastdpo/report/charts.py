"""Charts of the report page: what they show and where; `templates/charts.svg.jinja` draws them.

As inline SVG rather than by matplotlib: text stays text, and every colour is a class of the page's
style sheet, so that one drawing is right in the light, the dark and the printed scheme.
Coordinates are rounded to a tenth, so the same numbers give the same bytes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, linear_regression
from typing import Any, NamedTuple

from fastdpo.report.evaluation import Estimate
from fastdpo.report.text import short

MAX_BINS = 200  # of a chart by step
LINES = 4  # of a chart by round, each with a colour and a dash in charts.css


class Mark(NamedTuple):
    """A value at a round, with half the width of its interval where that is known."""

    x: float
    value: float
    half: float | None = None

    @property
    def spoken(self) -> str:
        where = "start" if self.x == 0 else f"round {self.x:.0f}"
        interval = f" ± {short(self.half)}" if self.half is not None else ""
        return f"{where}: {short(self.value)}{interval}"


class Bin(NamedTuple):
    """Neighbouring steps: their middle, and mean, least and greatest of their values."""

    x: float
    mean: float
    low: float
    high: float


class Cloud(NamedTuple):
    """Points (x, y) of one policy, and the mean of each with its interval."""

    name: str
    points: list[tuple[float, float]]
    x: Estimate
    y: Estimate

    @property
    def means(self) -> str:
        (mx, hx), (my, hy) = ((short(e.value), short(e.half or 0)) for e in (self.x, self.y))
        return f"{self.name}, means: {mx} ± {hx} tokens, score {my} ± {hy}"

    @property
    def fit(self) -> list[tuple[float, float]]:
        """The ends of the line fitted by least squares, none where all x are the same."""
        xs, ys = zip(*self.points)
        if len(set(xs)) < 2:
            return []
        slope, intercept = linear_regression(xs, ys)
        return [(x, intercept + slope * x) for x in (min(xs), max(xs))]


@dataclass(frozen=True)
class Axis:
    """Maps `low` to `high` onto the pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> str:
        share = (value - self.low) / (self.high - self.low)
        return f"{round(self.start + share * (self.end - self.start), 1) + 0.0:g}"

    def ticks(self, count: int = 4) -> list[tuple[float, str]]:
        """About `count` round numbers within the range, with their texts."""
        raw = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(raw))
        factor = next((m for m in (1, 2, 2.5, 5) if m * power >= raw), 10)
        step = factor * power
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        digits = max(0, (factor == 2.5) - math.floor(math.log10(power * max(factor, 1)) + 1e-9))
        large = step < 1e-4 or max(abs(self.low), abs(self.high)) >= 1e6
        form = ".3g" if large else f".{digits}f"
        values = [i * step for i in range(first, last + 1)]
        return [(x, f"{x:{form}}".replace("-", "−")) for x in values]


def axis(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis over all values with some air around them."""
    low, high = min(values), max(values)
    size, air = max(abs(low), abs(high)), 0.06 * (high - low)
    if air <= 1e-6 * size or size < 1e-12:  # all the same: rounding must not fill the axis
        air = 0.05 * size if size >= 1e-12 else 0.5
    return Axis(low - air, high + air, start, end)


class Series(NamedTuple):
    """A named line through marks; the name is empty where it is the only one. `aside` is how many
    pixels it is drawn to the right, so that the intervals of several stand beside one another.
    """

    name: str
    marks: Sequence[Mark]
    aside: float = 0


class Stretch(NamedTuple):
    """A round in a chart by step: where it begins, its line, and the range of its bins if any.
    `named` says that there is room for its name.
    """

    index: int | None
    begins: str
    named: bool
    line: str
    band: str


@dataclass(frozen=True)
class Chart:
    """Two axes and what is drawn: series, stretches or clouds. `level` is a value to compare with,
    and `rounds` are those named below; `spoken` is what a screen reader says in place of all.
    `over` is drawn over the stretches, and `names` are those of the lines, where there are several.
    """

    x: Axis
    y: Axis
    spoken: str
    drawn: Sequence[Any]
    level: float | None = None
    rounds: Sequence[int] = ()
    over: Sequence[Series] = ()
    names: Sequence[str] = ()

    def path(self, points: Iterable[Sequence[float]], aside: float = 0) -> str:
        """A line through the points (x, y, ...), so many pixels to the right."""
        x = self.aside(aside)
        return "M" + "L".join(f"{x(px)} {self.y(py)}" for px, py, *_ in points)

    def aside(self, pixels: float) -> Axis:
        """The horizontal axis, so many pixels to the right."""
        return replace(self.x, start=self.x.start + pixels, end=self.x.end + pixels)


def by_round(
    name: str, series: Mapping[str, Sequence[Mark]], rounds: Sequence[int], *, line: float | None
) -> Chart:
    """A value by round with its intervals, of one run or of several by their names; `line` is a
    level drawn across.
    """
    known = {key: marks for key, marks in series.items() if marks}
    every = [mark for marks in known.values() for mark in marks]
    ends = [m.value + sign * (m.half or 0) for m in every for sign in (-1, 1)]
    names = list(known) if len(known) > 1 else []
    y = axis(ends if line is None else [*ends, line], 186, 22 if names else 8)
    x = Axis(min(rounds) - 0.35, max(rounds) + 0.35, 44, 352)
    told = (
        f"{f'{key}: ' if names else ''}{'; '.join(mark.spoken for mark in marks)}."
        for key, marks in known.items()
    )
    spoken = f"{name} by round. {' '.join(told)}"
    drawn = [
        Series(key, marks, 6 * (i - (len(known) - 1) / 2))
        for i, (key, marks) in enumerate(known.items())
    ]
    named = rounds[:: math.ceil(len(rounds) / 10)]
    return Chart(x, y, spoken, drawn, line, named, names=names)


def by_step(
    name: str,
    lines: Sequence[tuple[int | None, list[Bin]]],
    over: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Chart:
    """A metric of training over the optimizer steps of all rounds.

    `lines` has the number of each round and its bins, None for a training that is no round; `over`
    has further lines by their names, of steps and values.
    """
    bins = [one for _, of_round in lines for one in of_round]
    above = [Series(key, [Mark(*p) for p in points]) for key, points in (over or {}).items()]
    marks = [mark for one in above for mark in one.marks]
    last = max([one.x for one in bins] + [mark.x for mark in marks])
    x = Axis(0, max(last, 1) * 1.02, 44, 352)
    ends = [x for one in bins for x in (one.low, one.high)] + [mark.value for mark in marks]
    y = axis(ends, 166, 22)
    first, final = short(bins[0].mean), short(bins[-1].mean)
    spoken = f"{name} by optimizer step: {first} at first, {final} at last."
    for one in above:
        first, final = short(one.marks[0].value), short(one.marks[-1].value)
        spoken += f" {one.name.capitalize()}: {first} at first, {final} at last."
    names = ["training", *(one.name for one in above)] if above else []
    chart, stretches = Chart(x, y, spoken, [], over=above, names=names), []
    ends = [*(of_round[0].x for _, of_round in lines[1:]), last]
    for (index, of_round), end in zip(lines, ends):
        line, band = chart.path(of_round), ""
        if any(one.high > one.low for one in of_round):
            back = [(one.x, one.low) for one in reversed(of_round)]
            band = chart.path([*((one.x, one.high) for one in of_round), *back]) + "Z"
        begin = of_round[0].x
        line += "h0" if len(of_round) == 1 else ""
        named = index is not None and not names and end - begin >= 0.16 * last
        stretches.append(Stretch(index, x(begin), named, line, band))
    return replace(chart, drawn=stretches)


def binned(values: Sequence[tuple[int, float]], size: int) -> list[Bin]:
    """Neighbouring (step, value) taken together, `size` at a time."""
    groups = (zip(*values[i : i + size]) for i in range(0, len(values), size))
    return [Bin(fmean(steps), fmean(ys), min(ys), max(ys)) for steps, ys in groups]


def scatter(clouds: Sequence[Cloud], *, limit: float | None) -> Chart:
    """Score over length in tokens, a colour and a shape for each policy, with lines fitted by
    least squares and the means. `limit` is the length at which responses are cut, drawn where some
    come near it.
    """
    points = [point for cloud in clouds for point in cloud.points]
    longest = max(length for length, _ in points)
    near = limit if limit is not None and 0.8 * limit <= longest <= limit else None
    x = axis([length for length, _ in points] + ([] if near is None else [near]), 56, 746)
    y = axis([score for _, score in points], 374, 22)
    means = (
        f"{c.name}: {len(c.points)} responses, mean length {short(c.x.value)} tokens, mean score "
        f"{short(c.y.value)}"
        for c in clouds
    )
    spoken = f"Score over length of held-out responses. {'; '.join(means)}."
    return Chart(x, y, spoken, clouds, near)
