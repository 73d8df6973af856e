"""The report of a run as one HTML page without scripts, which loads nothing.

What the page shows is put together here, as plain data; `templates/report.html.jinja` says how it
looks. Each value that a template shows goes through `visible` (text.py), so that text which a model
or a user wrote is nothing but text. The policy in the page's head lets the browser run no script,
load nothing, and take no style but the one sheet of the page, which it knows by its hash; should
markup ever get through, it stays without effect.
"""

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path, PurePath
from statistics import fmean
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fastdpo.report import charts
from fastdpo.report.evaluation import (
    Estimate,
    by_length,
    by_prompt,
    by_score,
    correlation,
    number,
    over_prompts,
)
from fastdpo.report.runfiles import Round, Run, measured
from fastdpo.report.text import (
    KEPT_CHARS,
    KEPT_MESSAGES,
    Told,
    as_text,
    clipped,
    count,
    digits_of,
    fixed,
    masked,
    plain,
    prompt_parts,
    short,
    told,
    visible,
)

SAMPLE_PROMPTS, SAMPLE_ROUNDS = 8, 6
MAX_POINTS = 1500  # of a policy in the scatter plot

FOLDER = Path(__file__).with_name("templates")
STYLE = (FOLDER / "style.css").read_text(encoding="utf-8")
TEMPLATES = Environment(
    loader=FileSystemLoader(FOLDER),
    autoescape=True,
    finalize=visible,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals |= {"KEPT_CHARS": KEPT_CHARS, "KEPT_MESSAGES": KEPT_MESSAGES}
SHOWING = (
    as_text, by_prompt, clipped, correlation, count, fmean, masked, plain, prompt_parts, short,
    told,
)  # fmt: skip
TEMPLATES.filters |= {use.__name__: use for use in SHOWING}

Row = dict[str, Estimate]
Cell = str | Told
Table = tuple[Sequence[str], Sequence[Sequence[Cell]]]  # its head, and rows with their names first
Figure = tuple[str, str, charts.Chart]  # its title, and where its values were measured


class Quantity(NamedTuple):
    """A column of the table by round, and a chart. `percent` tells its unit, `line` a level that
    means something.
    """

    key: str
    name: str
    percent: bool = False
    line: float | None = None

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
    Quantity("length gap", "Chosen − rejected, tokens"),
    Quantity("grad_norm", "Gradient norm"),
    Quantity("alpha", "α"),
    Quantity("length_tilt", "Tilt to length, nats/token"),
)
PAIRING = {
    "mean_score_chosen": "Score of chosen",
    "mean_score_rejected": "Score of rejected",
    "mean_length_chosen": "Length of chosen, tokens",
    "mean_length_rejected": "Length of rejected, tokens",
    "score_length_correlation": "Correlation of score and length",
    "length_penalty": "Length penalty, score/token",
    "length_gap_before": "Best − worst before the penalty, tokens",
    "length_gap": "Best − worst after it, tokens",
    "mean_ches": "CHES",
    "mean_difficulty": "Difficulty, nats",
}
LOST = {
    "pairs_dropped": "Dropped in training: too long",
    "pairs_truncated": "Kept, but truncated in training",
}
SPEED = {
    "tokens_per_second": "tokens/s",
    "samples_per_second": "responses/s",
    "samples": "responses",
}


def render(run: Run) -> str:
    """The page as text, the same for the same run."""
    rows = {one.index: measured(run, one) for one in run.rounds}
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return TEMPLATES.get_template("report.html.jinja").render(
        style=Markup(STYLE),
        style_hash=digest,
        run=run,
        title=_title(run),
        facts=_facts(run),
        planned=number(run.config.get("rounds")),
        finished=len([x for x in run.done if re.fullmatch(r"round-(?!00).*/report", x, re.DOTALL)]),
        tiles=_tiles(rows),
        rounds=_rounds(run, rows),
        other_sampling=_other_sampling(run),
        controlled=any("length/target" in row for row in rows.values()),
        plots=_plots(run, rows),
        lengths=_lengths(run),
        **_responses(run),
        **_training(run),
        **_pairs(run),
        offline=run.offline and _drops("Kept", [run.offline[0]], [run.offline[1]]),
        sampling=_sampling(run),
        rates=_rates(run),
    )


def _title(run: Run) -> str:
    name = run.config.get("output_dir")
    return (PurePath(name).name if isinstance(name, str) else "")[:120] or "A run"


def _facts(run: Run) -> list[tuple[str, str]]:
    """Names with their values, of what a reader asks for first."""
    facts = []
    for key, option in (("model", "model"), ("scorer", "score.scorer"), ("prompts", "prompts")):
        if isinstance(value := run.option(option), str):
            text = masked(value)
            facts.append((f"{key} ", (text if key == "scorer" else PurePath(text).name)[:120]))
    for option, label in (("train.beta", "β = "), ("train.alpha", "α = ")):
        if (value := run.option(option)) is not None:
            facts.append((label, as_text(value)[:40]))
    return facts


def _tiles(rows: dict[int, Row]) -> list[tuple[str, Told, Told, str]]:
    """What changed from the start to the last evaluated round: name, value, note, its unit."""
    score, length, rate, _ = (_by_round(quantity, rows) for quantity in HELD)
    tiles = []
    for name, unit, values in (("score", "", score), ("length", " tokens", length)):
        if 0 in values and len(values) > 1:
            last = max(values)
            digits = digits_of([values[0], values[last]])
            ends = " → ".join(fixed(values[index].value, digits) for index in (0, last))
            moved = rows[last].get(f"{name} change")
            note = told(moved, digits_of([moved]), signed=True) if moved else Told("")
            tiles.append((f"Held-out {name}", Told(ends), note, unit if moved else ""))
    if rate:
        note = Told(f"round {max(rate)} against the start")
        tiles.append(("Win rate", told(rate[max(rate)], 0, unit="%"), note, ""))
    if pairs := [row["pairs"].value for row in rows.values() if "pairs" in row]:
        note = Told(f"in {len(pairs)} round{'s' if len(pairs) > 1 else ''}")
        tiles.append(("Pairs trained on", Told(count(sum(pairs))), note, ""))
    return tiles


def _rounds(run: Run, rows: dict[int, Row]) -> Table | None:
    columns = [_named(run, q) for q in COLUMNS if any(q.key in row for row in rows.values())]
    cells = [_column(quantity, rows) for quantity in columns]
    body = [[one.name, *row] for one, *row in zip(run.rounds, *cells)]
    return ([quantity.name for quantity in columns], body) if columns else None


def _named(run: Run, quantity: Quantity) -> Quantity:
    """The quantity by the name that it has in this run."""
    if quantity.key == "kl" and _other_sampling(run):
        return quantity._replace(name="Log-ratio to the start, nats")
    return quantity


def _other_sampling(run: Run) -> str:
    """How responses were sampled, where not from the policy's own distribution."""
    known = {name: number(run.option(f"sample.{name}")) for name in ("temperature", "top_p")}
    return " and ".join(f"{name} {x:g}" for name, x in known.items() if x not in (None, 1.0))


def _column(quantity: Quantity, rows: dict[int, Row]) -> list[Cell]:
    """A quantity's cell for each round, with its change to the start."""
    values, change = _by_round(quantity, rows), f"{quantity.key} change"
    moves = {index: row[change] for index, row in rows.items() if change in row}
    digits = 0 if quantity.key == "pairs" else digits_of(list(values.values()))
    digits = min(digits, 1) if quantity.percent else digits
    unit = "%" if quantity.percent else ""
    cells: list[Cell] = []
    for index in rows:
        cell = told(values[index], digits, unit=unit) if index in values else Told("–")
        if index in moves:
            moved = told(moves[index], digits_of(list(moves.values())), signed=True)
            cell = cell._replace(moved=moved)
        cells.append(cell)
    return cells


def _by_round(quantity: Quantity, rows: dict[int, Row]) -> dict[int, Estimate]:
    """The rounds that have a quantity, in its unit."""
    scale = 100 if quantity.percent else 1
    found = {i: row[quantity.key] for i, row in rows.items() if quantity.key in row}
    return {i: Estimate(scale * x, half and scale * half) for i, (x, half) in found.items()}


def _plots(run: Run, rows: dict[int, Row]) -> list[Figure]:
    """A chart by round of each quantity that is known."""
    targets = [row["length/target"].value for row in rows.values() if "length/target" in row]
    figures = []
    for quantity in (*HELD, *TRAINED):
        known = _by_round(quantity, rows)
        if not known:
            continue
        named, line = _named(run, quantity), quantity.line
        where = "held-out" if quantity in HELD else "training"
        if quantity.key == "length" and targets:
            line, where = targets[-1], f"{where}; dashed: the target, {short(targets[-1])}"
        marks = [charts.Mark(i, *estimate) for i, estimate in known.items()]
        chart = charts.by_round(named.name, marks, list(rows), line=line)
        figures.append((named.label, where, chart))
    return figures


def _lengths(run: Run) -> tuple[list[tuple[Round, int]], charts.Chart] | None:
    """The start and the last evaluated policy, and them drawn; one point in so many of each."""
    known = [one for one in run.rounds if one.held]
    if not known:
        return None
    shown = [(one, math.ceil(len(one.held) / MAX_POINTS)) for one in _spread(known, 2)]
    clouds = []
    for one, every in shown:
        means = (over_prompts(one.held, by_length), over_prompts(one.held, by_score))
        points = [(by_length(response), by_score(response)) for response in one.held[::every]]
        clouds.append(charts.Cloud(one.name.lower(), points, *means))
    return shown, charts.scatter(clouds, limit=number(run.option("sample.max_new_tokens")))


def _responses(run: Run) -> dict[str, Any]:
    """Prompts that all evaluated policies shown answered, evenly spaced: of each its number, and
    the responses of each policy by its name.
    """
    evaluated = [one for one in run.rounds if one.held]
    known = {one.name: by_prompt(one.held) for one in _spread(evaluated, SAMPLE_ROUNDS)}
    shared = sorted(set.intersection(*map(set, known.values()))) if known else []
    questions = [
        (index, {name: groups[index] for name, groups in known.items()})
        for index in _spread(shared, SAMPLE_PROMPTS)
    ]
    policies = f"{len(known)} of {len(evaluated)}" if len(known) < len(evaluated) else "all"
    return {"questions": questions, "asked": len(shared), "answering": policies}


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, evenly spaced, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _training(run: Run) -> dict[str, Any]:
    """A chart by step for each quantity that training logged, and how many steps a point is."""
    size = math.ceil(sum(len(one.steps) for one in run.rounds) / charts.MAX_BINS) or 1
    figures = []
    for quantity in STEPS:
        lines = []
        starts = accumulate((len(one.steps) for one in run.rounds), initial=1)
        for one, start in zip(run.rounds, starts):
            found = ((i, _step_value(quantity, step)) for i, step in enumerate(one.steps, start))
            if values := [(i, value) for i, value in found if value is not None]:
                lines.append((one.index, charts.binned(values, size)))
        if lines:
            figures.append((quantity.label, "", charts.by_step(quantity.name, lines)))
    return {"training": figures, "steps_a_point": size}


def _step_value(quantity: Quantity, step: dict[str, float]) -> float | None:
    if quantity.key == "length gap" and {"lengths/chosen", "lengths/rejected"} <= step.keys():
        return step["lengths/chosen"] - step["lengths/rejected"]
    value = step.get(quantity.key)
    return value and (100 if quantity.percent else 1) * value


def _pairs(run: Run) -> dict[str, Any]:
    """What was dropped, and what is known of the pairs kept, by round."""
    trained = [one for one in run.rounds if one.pairing or one.dropped]
    kept, numbers = [one.pairing for one in trained], [one.numbers for one in trained]
    drops = _drops("Pairs kept", kept, [one.dropped for one in trained])
    if len(drops) == 1:
        drops.append(["Dropped", *("0" for _ in trained)])
    for key, name in LOST.items():
        if any(found.get(key) for found in numbers):
            drops.append([name, *_entries(numbers, key, 0)])
    facts = []
    found = dict.fromkeys(key for pairing in kept for key in pairing if key != "pairs")
    for key in sorted(found, key=lambda key: key not in PAIRING):
        known = [Estimate(pairing[key]) for pairing in kept if key in pairing]
        small = max(abs(x.value) for x in known) < 0.01  # a penalty for a token
        digits = digits_of(known) if small else min(digits_of(known), 3)
        name = PAIRING.get(key, key.replace("_", " "))[:60]
        facts.append([name, *_entries(kept, key, digits)])
    return {"trained": [one.name for one in trained], "drops": drops, "kept": facts}


def _drops(
    first: str, kept: list[dict[str, float]], dropped: list[dict[str, int]]
) -> list[list[str]]:
    """Rows of the pairs that were kept, and of those dropped, by reason."""
    rows = [[first, *_entries(kept, "pairs", 0)]]
    for why in sorted({why for found in dropped for why in found}):
        rows.append([f"Dropped: {why[:200]}", *(count(found.get(why, 0)) for found in dropped)])
    return rows


def _entries(rounds: Iterable[dict[str, float]], key: str, digits: int) -> list[str]:
    return [fixed(numbers[key], digits) if key in numbers else "–" for numbers in rounds]


def _sampling(run: Run) -> Table | None:
    """How fast stages sampled."""
    found = {f"{one.name}, {name}": x for one in run.rounds for name, x in one.speed.items()}
    keys = dict.fromkeys(key for x in found.values() for key in x if _plain(x[key]) != "–")
    shown = list(keys)[:12]
    head = [SPEED.get(key, key.replace("_", " "))[:60] for key in shown]
    body = [[name, *(_plain(x.get(key)) for key in shown)] for name, x in found.items()]
    return (head, body) if shown else None


def _rates(run: Run) -> list[list[str]]:
    """Pairs that rounds trained on in a second."""
    key = "pairs_per_second"
    found = {one.name: Estimate(one.numbers[key]) for one in run.rounds if key in one.numbers}
    digits = min(digits_of(list(found.values())), 2)
    return [[name, fixed(rate.value, digits)] for name, rate in found.items()]


def _plain(value: Any) -> str:
    """A string or number of throughput.json; a dash for all else."""
    x = number(value)
    if x is not None:
        return count(x) if x == round(x) or abs(x) >= 1000 else short(x)
    return masked(value)[:60] if isinstance(value, str) else "–"
