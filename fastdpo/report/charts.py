"""Charts as inline SVG for the report page.

Written by hand rather than by matplotlib: text stays text, and every colour is a class of the
page's style sheet, so that one drawing is right in the light, the dark and the printed scheme.
Coordinates are rounded to a tenth, so the same numbers give the same bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastdpo.report.evaluation import Estimate

MAX_BINS = 200  # of a chart by step


class Mark(NamedTuple):
    """A value at a place, with half the width of its interval where that is known."""

    x: float
    value: float
    half: float | None = None


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


@dataclass(frozen=True)
class Axis:
    """Maps `low` to `high` onto the pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> str:
        share = (value - self.low) / (self.high - self.low)
        return pixels(self.start + share * (self.end - self.start))

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


def pixels(value: float) -> str:
    return f"{round(value, 1) + 0.0:g}"


def axis(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis over all values with some air around them."""
    low, high = min(values), max(values)
    size, air = max(abs(low), abs(high)), 0.06 * (high - low)
    if air <= 1e-6 * size or size < 1e-12:  # all the same: rounding must not fill the axis
        air = 0.05 * size if size >= 1e-12 else 0.5
    return Axis(low - air, high + air, start, end)


def by_round(name: str, marks: Sequence[Mark], rounds: Sequence[int], *, line: float | None) -> str:
    """A value by round with its intervals; `line` is a level drawn across, to compare with."""
    width, height, left, bottom = 360, 210, 44, 24
    ends = [m.value + sign * (m.half or 0) for m in marks for sign in (-1, 1)]
    y = axis(ends if line is None else [*ends, line], height - bottom, 8)
    x = Axis(min(rounds) - 0.35, max(rounds) + 0.35, left, width - 8)
    parts = [_levels(y, left, width - 8)]
    every = math.ceil(len(rounds) / 10)
    for index in rounds[::every]:
        text = "start" if index == 0 else str(index)
        parts.append(_text(x(index), height - 6, text, "mid"))
    if line is not None:
        parts.append(_path("level", f"M{pixels(left)} {y(line)}H{pixels(width - 8)}"))
    parts.append(_path("line", _polyline((x(m.x), y(m.value)) for m in marks)))
    for mark in marks:
        parts.append(f"<g><title>{_spoken(mark)}</title>{_error_bar(mark, x, y)}</g>")
    spoken = "; ".join(_spoken(mark) for mark in marks)
    return _svg(width, height, f"{name} by round. {spoken}.", parts)


def by_step(name: str, lines: Sequence[tuple[int, list[Bin]]]) -> str:
    """A metric of training over the optimizer steps of all rounds; the band is a bin's range.

    `lines` has the number of each round and its bins.
    """
    width, height, left, bottom, top = 360, 190, 44, 24, 22
    bins = [one for _, of_round in lines for one in of_round]
    y = axis([x for one in bins for x in (one.low, one.high)], height - bottom, top)
    last = max(one.x for one in bins)
    x = Axis(0, max(last, 1) * 1.02, left, width - 8)
    parts = [_levels(y, left, width - 8)]
    for tick, text in x.ticks():
        if tick == round(tick):
            parts.append(_text(x(tick), height - 6, text.split(".")[0], "mid"))
    for i, (index, of_round) in enumerate(lines):
        begins = x(of_round[0].x)
        if i:
            parts.append(_path("border", f"M{begins} {top - 14}V{height - bottom}"))
        after = lines[i + 1][1][0].x if i + 1 < len(lines) else last
        if after - of_round[0].x >= 0.16 * last:  # or there is no room for its name
            parts.append(_text(begins, 12, f"round {index}", "first", dx=4))
        if any(one.high > one.low for one in of_round):
            back = [(x(one.x), y(one.low)) for one in reversed(of_round)]
            around = [*((x(one.x), y(one.high)) for one in of_round), *back]
            parts.append(_path("band", _polyline(around) + "Z"))
        points = [(x(one.x), y(one.mean)) for one in of_round]
        parts.append(_path("line", _polyline(points) + ("h0" if len(points) == 1 else "")))
    first, final = bins[0].mean, bins[-1].mean
    spoken = f"{name} by optimizer step: {short(first)} at first, {short(final)} at last."
    return _svg(width, height, spoken, parts)


def binned(values: Sequence[tuple[int, float]], size: int) -> list[Bin]:
    """Neighbouring (step, value) taken together, `size` at a time."""
    bins = []
    for i in range(0, len(values), size):
        steps, ys = zip(*values[i : i + size])
        bins.append(Bin(sum(steps) / len(steps), math.fsum(ys) / len(ys), min(ys), max(ys)))
    return bins


def scatter(clouds: Sequence[Cloud], *, limit: float | None) -> str:
    """Score over length in tokens, a colour and a shape for each policy, with lines fitted by
    least squares and the means; `limit` is the length at which responses are cut, drawn where some
    come near it.
    """
    width, height, left, bottom, right, top = 760, 420, 56, 46, 14, 22
    points = [point for cloud in clouds for point in cloud.points]
    longest = max(p[0] for p in points)
    near = [limit] if limit is not None and 0.8 * limit <= longest <= limit else []
    x = axis([*near, *(p[0] for p in points)], left, width - right)
    y = axis([p[1] for p in points], height - bottom, top)
    parts = [_levels(y, left, width - right, 6)]
    parts += [_text(x(tick), height - bottom + 18, text, "mid") for tick, text in x.ticks(6)]
    parts.append(_text(pixels((left + width) / 2), height - 6, "response length, tokens", "mid"))
    parts.append(_text(pixels(left), 12, "score", "first"))
    for length in near:
        parts.append(_path("level", f"M{x(length)} {top}V{height - bottom}"))
        parts.append(_text(x(length), 12, f"max_new_tokens = {length:g}", "last"))
    for i, cloud in enumerate(clouds):
        # Apart by their own width: those cut at the limit all have one length.
        beside = Axis(x.low, x.high, x.start + 6 * i - 3, x.end + 6 * i - 3)
        dots = "".join(f"M{beside(px)} {y(py)}h0" for px, py in cloud.points)
        parts.append(_path(f"dots c{i}", dots))
    for i, cloud in enumerate(clouds):
        line = fitted(cloud.points)
        if line is not None:
            ends = [min(p[0] for p in cloud.points), max(p[0] for p in cloud.points)]
            fit = _polyline((x(e), y(line[0] + line[1] * e)) for e in ends)
            parts.append(_path(f"fit c{i}", fit))
    for i, cloud in enumerate(clouds):
        parts.append(_mean(cloud, x, y, f"c{i}"))
    spoken = "; ".join(
        f"{c.name}: {len(c.points)} responses, mean length {short(c.x.value)} tokens, mean score "
        f"{short(c.y.value)}"
        for c in clouds
    )
    return _svg(width, height, f"Score over length of held-out responses. {spoken}.", parts)


def fitted(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Intercept and slope by least squares, None where all x are the same."""
    n = len(points)
    mx, my = math.fsum(p[0] for p in points) / n, math.fsum(p[1] for p in points) / n
    spread = math.fsum((px - mx) ** 2 for px, _ in points)
    if spread <= 1e-12 * max(mx * mx, 1):
        return None
    slope = math.fsum((px - mx) * (py - my) for px, py in points) / spread
    return my - slope * mx, slope


def _mean(cloud: Cloud, x: Axis, y: Axis, kind: str) -> str:
    (mx, hx), (my, hy) = ((e.value, e.half or 0) for e in (cloud.x, cloud.y))
    cross = f"M{x(mx - hx)} {y(my)}H{x(mx + hx)}M{x(mx)} {y(my - hy)}V{y(my + hy)}"
    text = f"{cloud.name}, means: {short(mx)} ± {short(hx)} tokens, score {short(my)} ± "
    return (
        f"<g><title>{text}{short(hy)}</title>{_path('halo', cross)}{_path(f'mean {kind}', cross)}"
        f'<circle class="mean {kind}" cx="{x(mx)}" cy="{y(my)}" r="5"/></g>'
    )


def _error_bar(mark: Mark, x: Axis, y: Axis) -> str:
    dot = f'<circle class="dot" cx="{x(mark.x)}" cy="{y(mark.value)}" r="4"/>'
    if not mark.half:
        return dot
    low, high = y(mark.value - mark.half), y(mark.value + mark.half)
    caps = f"m-4 0h8M{x(mark.x)} {high}m-4 0h8"
    return _path("bar", f"M{x(mark.x)} {high}V{low}{caps}") + dot


def _levels(y: Axis, left: float, right: float, count: int = 4) -> str:
    """Horizontal grid lines with their values."""
    ticks = y.ticks(count)
    grid = "".join(f"M{pixels(left)} {y(tick)}H{pixels(right)}" for tick, _ in ticks)
    labels = [_text(pixels(left - 7), y(tick), text, "last", dy=4) for tick, text in ticks]
    return _path("grid", grid) + "".join(labels)


def _spoken(mark: Mark) -> str:
    where = "start" if mark.x == 0 else f"round {mark.x:.0f}"
    interval = f" ± {short(mark.half)}" if mark.half is not None else ""
    return f"{where}: {short(mark.value)}{interval}"


def short(value: float) -> str:
    """Three significant digits, with a real minus sign."""
    return f"{value + 0.0:.3g}".replace("-", "−")


def _polyline(points) -> str:
    return "M" + "L".join(f"{px} {py}" for px, py in points)


def _path(kind: str, d: str) -> str:
    return f'<path class="{kind}" d="{d}"/>'


def _text(x: str, y: float | str, text: str, anchor: str, *, dx: int = 0, dy: int = 0) -> str:
    shift = (f' dx="{dx}"' if dx else "") + (f' dy="{dy}"' if dy else "")
    return f'<text class="{anchor}" x="{x}" y="{y}"{shift}>{text}</text>'


def _svg(width: int, height: int, spoken: str, parts: Sequence[str]) -> str:
    """The drawing; `spoken` is what a screen reader says in its place."""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{spoken}">'
        f"{''.join(parts)}</svg>"
    )
