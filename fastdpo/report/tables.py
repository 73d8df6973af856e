"""Tables and charts of a run's quantities, as plain data, for the page and for model cards."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from fastdpo.report import charts
from fastdpo.report.evaluation import Estimate, number
from fastdpo.report.runfiles import Numbers, Round, Run, measured
from fastdpo.report.text import Told, digits_of, fixed, short, told

EVALUATIONS = 24  # of one training that a table shows

Row = dict[str, Estimate]
Cell = str | Told
Table = tuple[Sequence[str], Sequence[Sequence[Cell]]]  # its head, and rows with their names first
Figure = tuple[str, str, charts.Chart]  # its title, and where its values were measured


class Quantity(NamedTuple):
    """A column of the table by round, and a chart. `percent` tells its unit, `line` a level that
    means something, and a `signed` one is a difference.
    """

    key: str
    name: str
    percent: bool = False
    line: float | None = None
    signed: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}, %" if self.percent else self.name


HELD = (
    Quantity("score", "Score"),
    Quantity("length", "Length, tokens"),
    Quantity("win_rate", "Win rate", percent=True, line=50.0),
    Quantity("kl", "KL from the start, nats"),
)
TRAINED = (
    Quantity("rewards/margins", "Margin"),
    Quantity("rewards/accuracies", "Accuracy", percent=True, line=50.0),
)
COLUMNS = (
    *HELD,
    Quantity("truncated", "Cut off", percent=True),
    *TRAINED,
    Quantity("loss", "Loss"),
    Quantity("alpha", "α"),
    Quantity("alpha/bound", "|α| at most"),
    Quantity("length/target", "Target, tokens"),
    Quantity("pairs", "Pairs"),
)
STEPS = (
    Quantity("loss", "Loss"),
    *TRAINED,
    Quantity("rewards/chosen", "Reward of chosen"),
    Quantity("rewards/rejected", "Reward of rejected"),
    Quantity("length gap", "Chosen − rejected, tokens"),
    Quantity("grad_norm", "Gradient norm"),
    Quantity("learning_rate", "Learning rate"),
    Quantity("alpha", "α"),
    Quantity("length_tilt", "Tilt to length, nats/token"),
)
EVALUATED = (
    Quantity("loss", "Loss"),
    *TRAINED,
    Quantity("rewards/chosen", "Reward of chosen"),
    Quantity("rewards/rejected", "Reward of rejected"),
)


def rows_of(run: Run) -> dict[int, Row]:
    """What was measured of each round."""
    return {one.index: measured(run, one) for one in run.rounds}


def by_round_table(run: Run, rows: Mapping[int, Row]) -> Table | None:
    """A row for each round, of what is known of any."""
    columns = [named(run, q) for q in COLUMNS if any(q.key in row for row in rows.values())]
    cells = [_column(quantity, rows) for quantity in columns]
    body = [[one.name, *row] for one, *row in zip(run.rounds, *cells)]
    return ([quantity.name for quantity in columns], body) if columns else None


def named(run: Run, quantity: Quantity) -> Quantity:
    """The quantity by the name that it has in this run."""
    if quantity.key == "kl" and other_sampling(run):
        return quantity._replace(name="Log-ratio to the start, nats")
    return quantity


def other_sampling(run: Run) -> str:
    """How responses were sampled, where not from the policy's own distribution."""
    known = {name: number(run.option(f"sample.{name}")) for name in ("temperature", "top_p")}
    if any("kl_temperature" in one.numbers for one in run.rounds):  # taken at theirs
        del known["temperature"]
    return " and ".join(f"{name} {x:g}" for name, x in known.items() if x not in (None, 1.0))


def _column(quantity: Quantity, rows: Mapping[int, Row]) -> list[Cell]:
    """A quantity's cell for each round, with its change to the start."""
    values, change = by_round(quantity, rows), f"{quantity.key} change"
    moves = {index: row[change] for index, row in rows.items() if change in row}
    cells = cells_of(quantity, values, list(rows))
    for i, index in enumerate(rows):
        if index in moves and isinstance(cell := cells[i], Told):
            moved = told(moves[index], digits_of(list(moves.values())), signed=True)
            cells[i] = cell._replace(moved=moved)
    return cells


def cells_of(
    quantity: Quantity, values: Mapping[int, Estimate], places: Sequence[int]
) -> list[Cell]:
    """The values at the places, a dash where there is none, to the same digits."""
    digits = 0 if quantity.key == "pairs" else digits_of(list(values.values()))
    digits = min(digits, 1) if quantity.percent else digits
    unit = "%" if quantity.percent else ""
    return [
        told(values[place], digits, unit=unit, signed=quantity.signed)
        if place in values
        else Told("–")
        for place in places
    ]


def by_round(quantity: Quantity, rows: Mapping[int, Row]) -> dict[int, Estimate]:
    """The rounds that have a quantity, in its unit."""
    scale = 100 if quantity.percent else 1
    found = {i: row[quantity.key] for i, row in rows.items() if quantity.key in row}
    return {i: Estimate(scale * x, half and scale * half) for i, (x, half) in found.items()}


def by_round_charts(
    runs: Mapping[str, tuple[Run, Mapping[int, Row]]],
    quantities: Sequence[Quantity] = (*HELD, *TRAINED),
) -> list[Figure]:
    """A chart by round of each quantity that is known, with a line for each run by its name."""
    figures = []
    for quantity in quantities:
        known = {name: by_round(quantity, rows) for name, (_, rows) in runs.items()}
        if not any(known.values()):
            continue
        run, rows = next(iter(runs.values()))
        label, line = named(run, quantity), quantity.line
        where = "held-out" if quantity in HELD else "training"
        targets = [row["length/target"].value for row in rows.values() if "length/target" in row]
        if quantity.key == "length" and targets and len(runs) == 1:
            line, where = targets[-1], f"{where}; dashed: the target, {short(targets[-1])}"
        series = {
            name: [charts.Mark(i, *estimate) for i, estimate in values.items()]
            for name, values in known.items()
        }
        indices = sorted({index for _, rows in runs.values() for index in rows})
        chart = charts.by_round(label.name, series, indices, line=line)
        figures.append((label.label, where, chart))
    return figures


def by_step_charts(run: Run) -> tuple[list[Figure], int]:
    """A chart by step for each quantity that training logged, with the evaluations of a training
    on pairs that it held out, and how many steps a point of training is.
    """
    size = math.ceil(sum(len(one.steps) for one in run.rounds) / charts.MAX_BINS) or 1
    figures = []
    for quantity in STEPS:
        lines, marks = [], []
        starts = accumulate((len(one.steps) for one in run.rounds), initial=1)
        for one, start in zip(run.rounds, starts):
            found = ((i, _step_value(quantity, step)) for i, step in enumerate(one.steps, start))
            if values := [(i, value) for i, value in found if value is not None]:
                lines.append((None if run.alone else one.index, charts.binned(values, size)))
            after = evaluated(quantity, one)
            marks += [(start - 1 + step, estimate.value) for step, estimate in after.items()]
        if lines:
            chart = charts.by_step(quantity.name, lines, {"evaluation": marks} if marks else {})
            figures.append((quantity.label, "", chart))
    return figures, size


def step_values(quantity: Quantity, one: Round) -> list[float]:
    """What the steps of a round logged of a quantity, in its unit."""
    found = (_step_value(quantity, step) for step in one.steps)
    return [value for value in found if value is not None]


def _step_value(quantity: Quantity, step: Numbers) -> float | None:
    if quantity.key == "length gap" and {"lengths/chosen", "lengths/rejected"} <= step.keys():
        return step["lengths/chosen"] - step["lengths/rejected"]
    value = step.get(quantity.key)
    return value and (100 if quantity.percent else 1) * value


def evaluated(quantity: Quantity, one: Round) -> dict[int, Estimate]:
    """The steps after which a round's evaluations in training have a quantity, in its unit."""
    scale, key = (100 if quantity.percent else 1), f"eval_{quantity.key}"
    return {step: Estimate(scale * row[key]) for step, row in one.evaluations if key in row}


def evaluation_table(run: Run) -> Table | None:
    """A row for each evaluation in a training; of many some, evenly spaced, and the kept one."""
    rounds = [one for one in run.rounds if one.evaluations]
    if not run.alone or not rounds:
        return None
    [one] = rounds
    steps = sorted({step for step, _ in one.evaluations})
    shown = spread(steps, EVALUATIONS)
    if run.kept is not None and run.kept in steps:
        shown = sorted({*shown, run.kept})
    columns = [quantity for quantity in EVALUATED if evaluated(quantity, one)]
    cells = [cells_of(quantity, evaluated(quantity, one), shown) for quantity in columns]
    names = [f"{step:,}{' (kept)' if step == run.kept else ''}" for step in shown]
    body = [[name, *row] for name, *row in zip(names, *cells)]
    return ([quantity.name for quantity in columns], body) if columns else None


def spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, evenly spaced, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def entries(found: Sequence[Numbers], key: str, digits: int) -> list[str]:
    """A number of each, a dash where there is none."""
    return [fixed(numbers[key], digits) if key in numbers else "–" for numbers in found]
