"""The report of a run as one HTML page without scripts, which loads nothing.

Text that a model or a user wrote goes through `visible` and nothing else. The policy in the page's
head lets the browser run no script, load nothing, and take no style but the one sheet here, which
it knows by its hash; should markup ever get through, it stays without effect.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from fastdpo.report import charts
from fastdpo.report.evaluation import (
    Estimate,
    Response,
    by_length,
    by_prompt,
    by_score,
    correlation,
    number,
    over_prompts,
)
from fastdpo.report.markup import (
    as_text,
    clipped,
    count,
    digits_of,
    fixed,
    masked,
    prompt_text,
    table,
    told,
    visible,
)
from fastdpo.report.runfiles import Run, measured
from fastdpo.report.style import CONTROL, KL, LOG_RATIO, NOTES, READING, STYLE

SAMPLE_PROMPTS, SAMPLE_ROUNDS = 8, 6
MAX_POINTS = 1500  # of a policy in the scatter plot

Row = dict[str, Estimate]


class Quantity(NamedTuple):
    """A column of the table by round, and a chart. `percent` tells its unit, `line` a level that
    means something.
    """

    key: str
    name: str
    percent: bool = False
    line: float | None = None


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
    sections = [
        ("rounds", "Rounds", _rounds(run, rows)),
        ("plots", "By round", _plots(run, rows)),
        ("lengths", "Length and score", _lengths(run)),
        ("responses", "Responses side by side", _responses(run)),
        ("training", "Training, step by step", _training(run)),
        ("pairs", "Pairs and drops", _pairs(run)),
        ("speed", "Throughput", _speed(run)),
        ("config", "Configuration", _config(run)),
    ]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>'
        f"{content}</section>"
        for name, title, content in sections
    )
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = _title(run)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{visible(title, marked=False)} · fastdpo report</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header>{_head(run, title)}{_tiles(rows)}"
        f'<nav aria-label="Sections">{links}</nav></header>\n<main>\n{body}\n</main>\n'
        f"<footer>{READING}</footer>\n</body>\n</html>\n"
    )


def _title(run: Run) -> str:
    name = run.config.get("output_dir")
    return (PurePath(name).name if isinstance(name, str) else "")[:120] or "A run"


def _head(run: Run, title: str) -> str:
    config = run.config
    facts = []
    for key, label in (("model", "model"), ("scorer", "scorer"), ("prompts", "prompts")):
        if isinstance(config.get(key), str):
            text = masked(config[key])
            text = text if key == "scorer" else PurePath(text).name
            facts.append(f"{label} <b>{visible(text[:120])}</b>")
    for key, label in (("beta", "β"), ("alpha", "α")):
        if config.get(key) is not None:
            facts.append(f"{label} = <b>{visible(as_text(config[key])[:40])}</b>")
    status = _status(run)
    return (
        f'<p class="kind">fastdpo · iterative preference optimization</p>'
        f'<h1 dir="auto">{visible(title)}</h1><p class="facts">{" · ".join(facts)}</p>'
        f'<p class="status">{status}</p>'
    )


def _status(run: Run) -> str:
    planned = number(run.config.get("rounds"))
    finished = [r for r in run.done if r.startswith("round-") and r.endswith("/report")]
    rounds = len([r for r in finished if not r.startswith("round-00")])
    if planned is None:
        return f"{len(run.rounds)} folders of rounds; what was planned is not known."
    if rounds >= planned:
        return f"Finished: {count(planned)} of {count(planned)} rounds."
    last = f", last stage done {visible(run.done[-1][:60])}" if run.done else ""
    return f"Unfinished: {rounds} of {count(planned)} rounds{last}."


def _tiles(rows: dict[int, Row]) -> str:
    """What changed from the start to the last evaluated round."""
    score, length, rate, _ = (_by_round(quantity, rows) for quantity in HELD)
    tiles = []
    for name, unit, values in (("score", "", score), ("length", " tokens", length)):
        if 0 in values and len(values) > 1:
            last = max(values)
            digits = digits_of([values[0], values[last]])
            value = f"{fixed(values[0].value, digits)} → {fixed(values[last].value, digits)}"
            moved = rows[last].get(f"{name} change")
            note = told(moved, digits_of([moved]), signed=True) + unit if moved else ""
            tiles.append((f"Held-out {name}", value, note))
    if rate:
        value = told(rate[max(rate)], 0, unit="%")
        tiles.append(("Win rate", value, f"round {max(rate)} against the start"))
    pairs = [row["pairs"].value for row in rows.values() if "pairs" in row]
    if pairs:
        rounds = f"in {len(pairs)} round{'s' if len(pairs) > 1 else ''}"
        tiles.append(("Pairs trained on", count(sum(pairs)), rounds))
    items = (
        f'<div><dt>{name}</dt><dd class="big">{value}</dd><dd class="sub">{note}</dd></div>'
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{"".join(items)}</dl>' if tiles else ""


def _gone(run: Run, *sections: str) -> str:
    """A line for what had to be left out."""
    why = [line for section in sections for line in run.gone.get(section, [])]
    if not why:
        return ""
    more = f"; and {len(why) - 3} more" if len(why) > 3 else ""
    first = "; ".join(visible(line[:300].rstrip(".")) for line in why[:3])
    return f'<p class="gone">Left out: {first}{more}.</p>'


def _name(index: int) -> str:
    return "Start" if index == 0 else f"Round {index}"


def _rounds(run: Run, rows: dict[int, Row]) -> str:
    columns = [_named(run, q) for q in COLUMNS if any(q.key in row for row in rows.values())]
    missing = _gone(run, "numbers")
    if not columns:
        return missing or '<p class="gone">Left out: no round has numbers yet.</p>'
    head = ["Policy", *(quantity.name for quantity in columns)]
    cells = zip(map(_name, rows), *(_column(quantity, rows) for quantity in columns))
    found = table("Held-out evaluation and training by round", head, cells)
    return found + _notes(run, rows) + missing


def _notes(run: Run, rows: dict[int, Row]) -> str:
    other = _other_sampling(run)
    return NOTES.format(
        distance=LOG_RATIO.format(sampling=other) if other else KL,
        control=CONTROL if any("length/target" in row for row in rows.values()) else "",
    )


def _named(run: Run, quantity: Quantity) -> Quantity:
    """The quantity by the name that it has in this run."""
    if quantity.key == "kl" and _other_sampling(run):
        return quantity._replace(name="Log-ratio to the start, nats")
    return quantity


def _other_sampling(run: Run) -> str:
    """How responses were sampled, where not from the policy's own distribution."""
    known = {name: number(run.config.get(name)) for name in ("temperature", "top_p")}
    return " and ".join(f"{name} {x:g}" for name, x in known.items() if x not in (None, 1.0))


def _column(quantity: Quantity, rows: dict[int, Row]) -> list[str]:
    """A quantity's cell for each round, below the value its change to the start."""
    values, moves = _by_round(quantity, rows), {}
    for index, row in rows.items():
        if f"{quantity.key} change" in row:
            moves[index] = row[f"{quantity.key} change"]
    digits = 0 if quantity.key == "pairs" else digits_of(list(values.values()))
    digits = min(digits, 1) if quantity.percent else digits
    unit = "%" if quantity.percent else ""
    cells = []
    for index in rows:
        cell = told(values[index], digits, unit=unit) if index in values else "–"
        if index in moves:
            moved = told(moves[index], digits_of(list(moves.values())), signed=True)
            cell += f'<span class="sub">{moved}</span>'
        cells.append(cell)
    return cells


def _by_round(quantity: Quantity, rows: dict[int, Row]) -> dict[int, Estimate]:
    """The rounds that have a quantity, in its unit."""
    scale = 100 if quantity.percent else 1
    found = {i: row[quantity.key] for i, row in rows.items() if quantity.key in row}
    return {i: Estimate(scale * x, half and scale * half) for i, (x, half) in found.items()}


def _plots(run: Run, rows: dict[int, Row]) -> str:
    panels = []
    for quantity in (*HELD, *TRAINED):
        known = _by_round(quantity, rows)
        if not known:
            continue
        marks = [charts.Mark(i, *estimate) for i, estimate in known.items()]
        name, line = _named(run, quantity).name, quantity.line
        where = "held-out" if quantity in HELD else "training"
        targets = [row["length/target"].value for row in rows.values() if "length/target" in row]
        if quantity.key == "length" and targets:
            line, where = targets[-1], f"{where}; dashed: the target, {charts.short(targets[-1])}"
        drawing = charts.by_round(name, marks, list(rows), line=line)
        unit = ", %" if quantity.percent else ""
        panels.append(_figure(f"{name}{unit}", where, drawing))
    if not panels:
        return '<p class="gone">Left out: no round has numbers yet.</p>'
    return (
        f'<div class="panels">{"".join(panels)}</div><p class="note">Bars are 95% intervals over '
        "held-out prompts.</p>"
    )


def _figure(title: str, where: str, drawing: str) -> str:
    return f"<figure><figcaption><b>{title}</b> {where}</figcaption>{drawing}</figure>"


def _lengths(run: Run) -> str:
    known = [one for one in run.rounds if one.held]
    if not known:
        return _gone(run, "held") or '<p class="gone">Left out: nothing was held out.</p>'
    chosen = known[:1] if len(known) == 1 else [known[0], known[-1]]
    clouds, keys = [], []
    for i, one in enumerate(chosen):
        length, score = over_prompts(one.held, by_length), over_prompts(one.held, by_score)
        every = math.ceil(len(one.held) / MAX_POINTS)
        points = [(by_length(response), by_score(response)) for response in one.held[::every]]
        clouds.append(charts.Cloud(_name(one.index).lower(), points, length, score))
        r = correlation(one.held)
        some = f", one in {every} drawn" if every > 1 else ""
        keys.append(
            f'<li class="k{i}"><b>{_name(one.index)}</b> {count(len(one.held))} responses to '
            f"{count(len(by_prompt(one.held)))} prompts{some}; correlation of score and length "
            f"<i>r</i> = {told(r, 2) if r else 'not defined'}</li>"
        )
    limit = number(run.config.get("max_new_tokens"))
    return (
        f'<figure class="wide"><figcaption><ul class="keys">{"".join(keys)}</ul></figcaption>'
        f'{charts.scatter(clouds, limit=limit)}</figure><p class="note">A point is a held-out '
        "response. Crosses are the means over prompts with their 95% intervals; lines are "
        "least squares over responses. The interval of <i>r</i> is a jackknife over prompts.</p>"
    ) + _gone(run, "held")


def _responses(run: Run) -> str:
    evaluated = [one for one in run.rounds if one.held]
    known = _spread(evaluated, SAMPLE_ROUNDS)
    groups = [by_prompt(one.held) for one in known]
    shared = sorted(set.intersection(*map(set, groups))) if groups else []
    if not shared:
        return _gone(run, "held") or '<p class="gone">Left out: nothing was held out.</p>'
    picked = _spread(shared, SAMPLE_PROMPTS)
    articles = []
    for index in picked:
        cells = "".join(
            _response(one.index, group[index][0], group[index]) for one, group in zip(known, groups)
        )
        articles.append(
            f'<article><h3>Prompt {index}</h3><div class="prompt">'
            f"{prompt_text(groups[0][index][0].prompt)}</div>"
            f'<div class="scroll" role="region" aria-label="Responses to prompt {index}" '
            f'tabindex="0"><div class="side">{cells}</div></div></article>'
        )
    policies = f"{len(known)} of {len(evaluated)}" if len(known) < len(evaluated) else "all"
    return (
        f'<p class="note">The first response of {policies} evaluated policies to {len(picked)} of '
        f"{count(len(shared))} held-out prompts, evenly spaced, not picked by score. Control and "
        "format characters appear as code points.</p>" + "".join(articles) + _gone(run, "held")
    )


def _response(index: int, first: Response, group: Sequence[Response]) -> str:
    cut = '<span class="cut">cut off</span>' if first.cut else ""
    mean = ""
    if len(group) > 1:
        average = math.fsum(r.score for r in group) / len(group)
        mean = f", mean of {len(group)}: {charts.short(average)}"
    return (
        f'<div class="answer"><h4>{_name(index)}{cut}</h4><p class="meta">score '
        f"<b>{charts.short(first.score)}</b>{mean} · {count(first.length)} tokens</p>"
        f"{clipped(first.text)}</div>"
    )


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, evenly spaced, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _training(run: Run) -> str:
    panels = []
    size = math.ceil(sum(len(one.steps) for one in run.rounds) / charts.MAX_BINS) or 1
    for quantity in STEPS:
        lines, before = [], 0
        for one in run.rounds:
            values = []
            for i, step in enumerate(one.steps):
                value = _step_value(quantity.key, step)
                if value is not None:
                    values.append((before + i + 1, (100 if quantity.percent else 1) * value))
            before += len(one.steps)
            if values:
                lines.append((one.index, charts.binned(values, size)))
        if lines:
            unit = ", %" if quantity.percent else ""
            drawing = charts.by_step(quantity.name, lines)
            panels.append(_figure(f"{quantity.name}{unit}", "", drawing))
    missing = _gone(run, "steps")
    if not panels:
        return missing or '<p class="gone">Left out: no round was trained yet.</p>'
    each = (
        "an optimizer step"
        if size == 1
        else f"the mean of {size} optimizer steps, the band their range"
    )
    return (
        f'<div class="panels">{"".join(panels)}</div><p class="note">Each point is {each}, '
        f"measured before the update; rounds follow one another.</p>{missing}"
    )


def _step_value(key: str, step: dict[str, float]) -> float | None:
    if key == "length gap" and {"lengths/chosen", "lengths/rejected"} <= step.keys():
        return step["lengths/chosen"] - step["lengths/rejected"]
    return step.get(key)


def _pairs(run: Run) -> str:
    trained = [one for one in run.rounds if one.pairing or one.dropped]
    missing, offline = _gone(run, "pairing"), _offline(run)
    if not trained:
        none = missing or '<p class="gone">Left out: no round was paired yet.</p>'
        return f'<div class="pair">{offline}</div>{none}' if offline else none
    head = ["Round", *(_name(one.index) for one in trained)]
    body = [["Pairs kept", *(_entry(one.pairing, "pairs", 0) for one in trained)]]
    reasons = sorted({why for one in trained for why in one.dropped})
    for why in reasons:
        counts = [count(one.dropped[why]) if why in one.dropped else "0" for one in trained]
        body.append([f"Dropped: {visible(why[:200])}", *counts])
    if not reasons:
        body.append(["Dropped", *("0" for _ in trained)])
    for key, name in LOST.items():
        if any(one.numbers.get(key) for one in trained):
            body.append([name, *(_entry(one.numbers, key, 0) for one in trained)])
    counts = table("Pairs kept and dropped, by reason", head, body)
    found = dict.fromkeys(key for one in trained for key in one.pairing if key != "pairs")
    facts = []
    for key in sorted(found, key=lambda key: key not in PAIRING):
        known = [Estimate(one.pairing[key]) for one in trained if key in one.pairing]
        small = max(abs(x.value) for x in known) < 0.01  # a penalty for a token
        digits = digits_of(known) if small else min(digits_of(known), 3)
        name = visible(PAIRING.get(key, key.replace("_", " "))[:60])
        facts.append([name, *(_entry(one.pairing, key, digits) for one in trained)])
    means = table("The pairs kept", head, facts) if facts else ""
    return (
        f'<div class="pair">{counts}{means}{offline}</div><p class="note">Drops are counted as the '
        "stage counted them: prompts, or responses (“empty response”), or pairs. Scores and "
        "lengths are means; the correlation is over all sampled responses, best − worst the mean "
        f"over prompts.</p>{missing}"
    )


def _offline(run: Run) -> str:
    """The pairs given to be replayed, read once for all rounds."""
    if not run.offline:
        return ""
    body = [["Kept", _entry(run.offline, "pairs", 0)]]
    for why, lost in sorted(run.offline["dropped"].items()):
        body.append([f"Dropped: {visible(why[:200])}", count(lost)])
    return table("Offline pairs to replay", ["Offline", "Pairs"], body)


def _entry(numbers: dict[str, float], key: str, digits: int) -> str:
    return fixed(numbers[key], digits) if key in numbers else "–"


def _speed(run: Run) -> str:
    facts = [
        (f"{_name(one.index)}, {what}", found)
        for one in run.rounds
        for what, found in one.speed.items()
    ]
    keys = dict.fromkeys(k for _, found in facts for k, x in found.items() if _is_plain(x))
    tables = []
    if keys:
        shown = list(keys)[:12]
        head = ["Stage", *(visible(SPEED.get(key, key.replace("_", " "))[:60]) for key in shown)]
        body = [[name, *(_plain(found.get(key)) for key in shown)] for name, found in facts]
        tables.append(table("Sampling", head, body))
    rates = {r.index: r.numbers.get("pairs_per_second") for r in run.rounds}
    trained = {index: Estimate(rate) for index, rate in rates.items() if rate is not None}
    if trained:
        digits = min(digits_of(list(trained.values())), 2)
        body = [[_name(index), fixed(rate.value, digits)] for index, rate in trained.items()]
        tables.append(table("Training", ["Stage", "pairs/s, mean of the steps"], body))
    missing = _gone(run, "speed")
    if not tables:
        return missing or '<p class="gone">Left out: no stage has told its speed.</p>'
    return f'<div class="stack">{"".join(tables)}</div>{missing}'


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) or number(value) is not None


def _plain(value: Any) -> str:
    x = number(value)
    if x is not None:
        return count(x) if x == round(x) or abs(x) >= 1000 else f"{x:.3g}".replace("-", "−")
    return visible(masked(value)[:60]) if isinstance(value, str) else "–"


def _config(run: Run) -> str:
    if not run.config:
        return _gone(run, "config") or '<p class="gone">Left out: state.json has none.</p>'
    items = []
    for key, value in run.config.items():
        text = masked(as_text(value))
        items.append(f"<div><dt>{visible(key[:80])}</dt><dd>{clipped(text)}</dd></div>")
    return f'<dl class="config">{"".join(items)}</dl>'
