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
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path, PurePath
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fastdpo.data.records import Scored
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
from fastdpo.report.runfiles import KEPT, Round, Run, resolved
from fastdpo.report.tables import (
    HELD,
    STEPS,
    Quantity,
    Row,
    Table,
    by_round,
    by_round_charts,
    by_round_table,
    by_step_charts,
    distance,
    entries,
    evaluated,
    evaluation_table,
    rows_of,
    spread,
    step_values,
)
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
CHART_STYLE = (FOLDER / "charts.css").read_text(encoding="utf-8")
STYLE = CHART_STYLE + (FOLDER / "style.css").read_text(encoding="utf-8")
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

# The sections, each a template of this name, of a run with rounds and of a training by itself.
ROUNDS = {
    "rounds": "Rounds",
    "plots": "By round",
    "lengths": "Length and score",
    "responses": "Responses side by side",
    "training": "Training, step by step",
    "pairs": "Pairs and drops",
    "speed": "Throughput",
    "config": "Configuration",
}
TRAINING = {
    "config": "Recipe",
    "pairs": "Data",
    "evaluations": "Held-out pairs",
    "training": "Training, step by step",
    "speed": "Throughput",
}
PAIRING = {
    "mean_length_prompt": "Length of prompt, tokens",
    "mean_score_chosen": "Score of chosen",
    "mean_score_rejected": "Score of rejected",
    "mean_score_best": "Score of the best",
    "mean_score_worst": "Score of the worst",
    "mean_length_chosen": "Length of chosen, tokens",
    "mean_length_rejected": "Length of rejected, tokens",
    "mean_length_best": "Length of the best, tokens",
    "mean_length_worst": "Length of the worst, tokens",
    "responses": "Responses",
    "mean_length_response": "Length of responses, tokens",
    "score_length_correlation": "Correlation of score and length",
    "length_penalty": "Length penalty, score/token",
    "length_gap_before": "Best − worst before the penalty, tokens",
    "length_gap": "Best − worst after it, tokens",
    "mean_ches": "CHES",
    "mean_difficulty": "Difficulty, nats",
    "held_out_pairs": "Held out",
    "longest": "Longest side, tokens",
    "truncated_to_max_length": "Truncated to max_length",
    "prompts_as_text": "Prompts without the chat template",
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


def render(run: Run, defaults: Mapping[str, Any] | None = None) -> str:
    """The page as text, the same for the same run. With the `defaults` of all options, by their
    names with the section, those that differ come first.
    """
    rows = rows_of(run)
    training, steps_a_point = by_step_charts(run)
    changed = differing(run.config, defaults or {})
    drops, kept = pairs_tables(run)
    return page(
        run=run,
        kind="preference optimization" if run.alone else "iterative preference optimization",
        titles=_titles(run),
        title=title(run),
        facts=_facts(run, changed),
        status=_status(run),
        tiles=_training_tiles(run) if run.alone else _tiles(rows),
        rounds=by_round_table(run, rows),
        distance=distance(run) if any("kl" in row for row in rows.values()) else None,
        controlled=any("length/target" in row for row in rows.values()),
        plots=by_round_charts({"": (run, rows)}),
        lengths=_lengths(run),
        **questions_of({one.name: one.held for one in run.rounds if one.held}),
        training=training,
        steps_a_point=steps_a_point,
        evaluations=evaluation_table(run),
        drops=drops,
        kept=kept,
        offline=run.offline and _drops([run.offline[0]], [run.offline[1]], "Kept"),
        sampling=_sampling(run),
        rates=_rates(run),
        changed=changed,
        options={name: x for name, x in run.config.items() if name not in changed},
    )


def page(**shown: Any) -> str:
    """A page of what its sections show, which are named in `titles`."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    template = TEMPLATES.get_template("report.html.jinja")
    return template.render(style=Markup(STYLE), style_hash=digest, **shown)


def picture(figures: Sequence[tuple[str, str, charts.Chart]], *, steps: bool) -> str:
    """Charts by step, or by round, side by side in one SVG file of its own."""
    return TEMPLATES.get_template("picture.svg.jinja").render(
        figures=figures, by_steps=steps, style=Markup(CHART_STYLE)
    )


def differing(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from their defaults; what a run is of comes first."""
    defaults = resolved(defaults, config)
    found = {name: x for name, x in config.items() if name in defaults and defaults[name] != x}
    first = [name for name in ("model", "prompts", "dataset", "eval_dataset") if name in found]
    return {name: found[name] for name in dict.fromkeys([*first, *found])}


def _titles(run: Run) -> dict[str, str]:
    if not run.alone:
        return ROUNDS
    shown = any(one.evaluations for one in run.rounds)
    return {name: x for name, x in TRAINING.items() if shown or name != "evaluations"}


def _status(run: Run) -> str:
    """What is done, and when, or where the run is or stopped."""
    if run.alone:
        return _training_status(run)
    reports = [x for x in run.done if re.fullmatch(r"round-(?!00).*/report", x, re.DOTALL)]
    planned, finished = number(run.config.get("rounds")), len(reports)
    if planned is None:
        return f"{len(run.rounds)} folders of rounds; what was planned is not known."
    of = f"{count(min(finished, planned))} of {count(planned)} rounds"
    if finished >= planned:
        return f"Finished: {of}{_when(', ', run.ended.get(run.done[-1]) if run.done else None)}."
    if run.begun is not None:
        stage, time = run.begun
        folder, _, name = stage.rpartition("/")
        match = re.match(r"round-(\d+)", folder)
        place = f" of {f'round {int(match[1])}' if int(match[1]) else 'the start'}" if match else ""
        at = f"{name[:60]}{place}{_when(', begun ', time)}"
        return f"Unfinished: {of}. It is at {at}, or stopped there; the same command goes on."
    last = f", last stage done {run.done[-1][:60]}" if run.done else ""
    return f"Unfinished: {of}{last}."


def _training_status(run: Run) -> str:
    [one] = run.rounds
    steps = f"{count(len(one.steps))} optimizer step{'s' if len(one.steps) != 1 else ''}"
    if not run.has_policy:
        return f"Unfinished: it is at step {len(one.steps):,}, or stopped there."
    kept = f"; the policy is of step {run.kept:,}, the best" if run.kept is not None else ""
    return f"Finished: {steps}{_when(', ', run.ended.get('train'))}{kept}."


def _when(before: str, time: str | None) -> str:
    """A time in UTC to the minute, with words before it; nothing where it is none."""
    try:
        return f"{before}{datetime.fromisoformat((time or '')[:19]):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return ""


def title(run: Run) -> str:
    """The name of its folder, as it was given."""
    name = run.config.get("output_dir")
    otherwise = "A training" if run.alone else "A run"
    return (PurePath(name).name if isinstance(name, str) else "")[:120] or otherwise


def _facts(run: Run, changed: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names with their values, of what a reader asks for first."""
    facts = []
    given = ("scorer", "score.scorer"), ("prompts", "prompts"), ("dataset", "dataset")
    for key, option in (("model", "model"), *given):
        if isinstance(value := run.option(option), str):
            text = masked(value)
            facts.append((f"{key} ", (text if key == "scorer" else PurePath(text).name)[:120]))
    loss, alpha = run.option("train.loss_type"), run.option("train.alpha")
    if loss not in (None, "sigmoid"):
        facts.append(("loss ", as_text(loss)[:120]))
        if not {"alpha", "train.alpha"} & changed.keys():
            alpha = None  # a loss without a length penalty has it at its default
    for label, value in (("β = ", run.option("train.beta")), ("α = ", alpha)):
        if value is not None:
            facts.append((label, as_text(value)[:40]))
    return facts


def _tiles(rows: dict[int, Row]) -> list[tuple[str, Told, Told, str]]:
    """What changed from the start to the last evaluated round: name, value, note, its unit."""
    score, length, rate, _ = (by_round(quantity, rows) for quantity in HELD)
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
    for key, name in KEPT.items():
        if kept := [row[key].value for row in rows.values() if key in row]:
            note = Told(f"in {len(kept)} round{'s' if len(kept) > 1 else ''}")
            tiles.append((f"{name} trained on", Told(count(sum(kept))), note, ""))
    return tiles


def _training_tiles(run: Run) -> list[tuple[str, Told, Told, str]]:
    """From the first to the kept evaluation, or else from the first to the last tenth of steps."""
    [one] = run.rounds
    tiles = []
    for quantity in STEPS[:3]:
        held = evaluated(quantity, one)
        if len(held) > 1:
            first, last = min(held), max(held) if run.kept not in held else run.kept
            ends, where = [held[first], held[last]], "Held-out"  # type: ignore[index]
            note = f"step {first:,} → {last:,}"
        elif values := step_values(quantity, one):
            tenth = max(len(values) // 10, 1)
            ends = [Estimate(fmean(part)) for part in (values[:tenth], values[-tenth:])]
            where, note = "Training", f"mean of the first → last {tenth:,} of {len(values):,} steps"
        else:
            continue
        tiles.append((f"{where} {quantity.name.lower()}", _ends(quantity, ends), Told(note), ""))
    for key in KEPT.keys() & one.pairing.keys():
        kept = one.pairing[key] - one.numbers.get("pairs_dropped", 0.0)
        epochs = number(run.option("num_train_epochs")) or 1
        note = f"{count(epochs)} epoch{'s' if epochs != 1 else ''}"
        tiles.append((f"{KEPT[key]} to train on", Told(count(kept)), Told(note), ""))
    return tiles


def _ends(quantity: Quantity, ends: Sequence[Estimate]) -> Told:
    digits, unit = (0, "%") if quantity.percent else (min(digits_of(ends), 4), "")
    return Told(" → ".join(fixed(x.value, digits) + unit for x in ends))


def _lengths(run: Run) -> tuple[list[tuple[Round, int]], charts.Chart] | None:
    """The start and the last evaluated policy, and them drawn; one point in so many of each."""
    known = [one for one in run.rounds if one.held]
    if not known:
        return None
    shown = [(one, math.ceil(len(one.held) / MAX_POINTS)) for one in spread(known, 2)]
    clouds = []
    for one, every in shown:
        means = (over_prompts(one.held, by_length), over_prompts(one.held, by_score))
        points = [(by_length(response), by_score(response)) for response in one.held[::every]]
        clouds.append(charts.Cloud(one.name.lower(), points, *means))
    return shown, charts.scatter(clouds, limit=number(run.option("sample.max_new_tokens")))


def questions_of(evaluated: Mapping[str, Sequence[Scored]]) -> dict[str, Any]:
    """Prompts that all evaluated policies shown answered, evenly spaced: of each its number, and
    the responses of each policy by its name.
    """
    known = {name: by_prompt(evaluated[name]) for name in spread([*evaluated], SAMPLE_ROUNDS)}
    shared = sorted(set.intersection(*map(set, known.values()))) if known else []
    questions = [
        (index, {name: groups[index] for name, groups in known.items()})
        for index in spread(shared, SAMPLE_PROMPTS)
    ]
    policies = f"{len(known)} of {len(evaluated)}" if len(known) < len(evaluated) else "all"
    return {"questions": questions, "asked": len(shared), "answering": policies}


def pairs_tables(run: Run) -> tuple[Table | None, Table | None]:
    """What was dropped, and what is known of the pairs kept, with a column for each round."""
    trained = [one for one in run.rounds if one.pairing or one.dropped]
    kept, numbers = [one.pairing for one in trained], [one.numbers for one in trained]
    drops = _drops(kept, [one.dropped for one in trained])
    if len(drops) == 1:
        drops.append(["Dropped", *("0" for _ in trained)])
    for key, name in LOST.items():
        if any(found.get(key) for found in numbers):
            drops.append([name, *entries(numbers, key, 0)])
    facts = []
    found = dict.fromkeys(key for pairing in kept for key in pairing if key not in KEPT)
    for key in sorted(found, key=lambda key: key not in PAIRING):
        known = [Estimate(pairing[key]) for pairing in kept if key in pairing]
        small = max(abs(x.value) for x in known) < 0.01  # a penalty for a token
        digits = digits_of(known) if small else min(digits_of(known), 3)
        digits = 0 if all(x.value == round(x.value) for x in known) else digits
        name = PAIRING.get(key, key.replace("_", " "))[:60]
        facts.append([name, *entries(kept, key, digits)])
    names = [one.name for one in trained]
    return ((names, drops) if names else None), ((names, facts) if facts else None)


def _drops(
    kept: list[dict[str, float]], dropped: list[dict[str, int]], first: str | None = None
) -> list[list[str]]:
    """Rows of the pairs or lists that were kept, and of those dropped, by reason."""
    keys = [key for key in KEPT if any(key in x for x in kept)] or ["pairs"]
    rows = [[first or f"{KEPT[key]} kept", *entries(kept, key, 0)] for key in keys]
    for why in sorted({why for found in dropped for why in found}):
        rows.append([f"Dropped: {why[:200]}", *(count(found.get(why, 0)) for found in dropped)])
    return rows


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
