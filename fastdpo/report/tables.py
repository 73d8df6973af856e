"""Tables and charts of a run's quantities, as plain data, for the page and for model cards."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from fastdpo.errors import DataError
from fastdpo.report import charts
from fastdpo.report.evaluation import Estimate, number
from fastdpo.report.runfiles import KEPT, Numbers, Round, Run, measured
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
    Quantity("kl", "KL from the start, nats"),  # `distance` has its name in a run
)
_HELD_KEYS = {*(quantity.key for quantity in HELD), "truncated"}
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
    *(Quantity(key, name) for key, name in KEPT.items()),
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
    if quantity.key == "kl":
        return quantity._replace(name=f"{distance(run).name}, nats")
    return quantity


class Distance(NamedTuple):
    """What the distance of policies from the start is called in a run, and what it is, in words."""

    name: str
    words: str


def distance(run: Run) -> Distance:
    """That which the rounds measured, from the responses that the policies gave.

    It is a KL divergence where the probabilities are those that the responses were drawn by, and a
    log-ratio elsewhere. Rounds of before took them at temperature 1.
    """
    words = "the mean of log(policy/start) over whole responses of the policy, in nats"
    drawn, taken = _drawn(run), _taken(run)
    if not other_sampling(run):
        if (temperature := drawn["temperature"]) == 1:
            return Distance("KL from the start", f"{words}.")
        at = f"{temperature:g}"
        both = f"Both are taken at temperature {at}, at which the responses were drawn."
        return Distance(f"KL at temperature {at}", f"{words}. {both}")
    places = [
        f"temperature {at:g}"
        + (f" in round{'s' * (len(of) > 1)} {', '.join(map(str, of))}" if len(taken) > 1 else "")
        for at, of in taken.items()
    ]
    how = f"responses were drawn at {other_sampling(run)}, the probabilities are those at"
    words = f"{words}. It is no KL divergence: {how} {' and '.join(places)}."
    return Distance("Log-ratio to the start", words)


def other_sampling(run: Run) -> str:
    """How responses were drawn, where the distance is of other probabilities than theirs."""
    drawn, taken = _drawn(run), _taken(run)
    if drawn["top_p"] == 1 and set(taken) == {drawn["temperature"]}:
        return ""
    return " and ".join(f"{name} {x:g}" for name, x in drawn.items() if x != 1) or "temperature 1"


def _drawn(run: Run) -> dict[str, float]:
    """How responses were; where the options are not known, as a round says of its distance."""
    noted = (one.numbers.get("kl_temperature") for one in run.rounds)
    otherwise = {"temperature": next((x for x in noted if x is not None), 1.0), "top_p": 1.0}
    found = {name: number(run.option(f"sample.{name}")) for name in otherwise}
    return {name: otherwise[name] if x is None else x for name, x in found.items()}


def _taken(run: Run) -> dict[float, list[int]]:
    """The temperatures at which distances were, with the rounds of each; without any, how they
    would be.
    """
    found: dict[float, list[int]] = {}
    for one in run.rounds:
        if "kl" in one.numbers:
            found.setdefault(one.numbers.get("kl_temperature", 1.0), []).append(one.index)
    return found or {_drawn(run)["temperature"]: []}


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
    digits = 0 if quantity.key in KEPT else digits_of(list(values.values()))
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
    """A chart by round of each quantity that is known, in their order, with a line for each run by
    its name.

    Raises DataError when there are more runs than a chart has colours for.
    """
    if len(runs) > charts.LINES:
        raise DataError(
            f"{len(runs)} runs are too many for one chart, which has colours for {charts.LINES}. "
            "Compare fewer at a time."
        )
    figures = []
    for quantity in quantities:
        known = {name: by_round(quantity, rows) for name, (_, rows) in runs.items()}
        if not any(known.values()):
            continue
        run, rows = next(iter(runs.values()))
        label, line = named(run, quantity), quantity.line
        where = "held-out" if quantity.key.removesuffix(" change") in _HELD_KEYS else "training"
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
