"""Verdict, tables and curves of the length study, from its rows."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch

from fastdpo.report.evaluation import quantile

from .rise import interval, wilson
from .tables import LINES, build, markdown_table, panel, picture

OP, REWARD, RUN = "length study", "reward model", "run"
PLAIN, AUTO = "0", "auto"
METRICS = ("reward", "length", "lc_reward")
TITLES = {
    "reward": "reward",
    "length": "length, tokens",
    "lc_reward": "length-controlled reward",
}


def runs_of(rows: list[dict], arm: str) -> dict[int, dict]:
    """Of the arm, the row of each seed; the last where there are several."""
    return {row["seed"]: row for row in rows if row["kind"] == RUN and row["arm"] == arm}


def arms_of(rows: list[dict]) -> list[str]:
    """Plain DPO first, then by alpha, auto last."""
    arms = {row["arm"] for row in rows if row["kind"] == RUN}
    return sorted(arms, key=lambda arm: math.inf if arm == AUTO else float(arm))


def label(arm: str) -> str:
    return {PLAIN: "plain DPO", AUTO: "alpha auto"}.get(arm, f"alpha {arm}")


def over_seeds(runs: dict[int, dict], index: int, name: str) -> dict[str, float | None]:
    """Interval of the seeds' mean changes in a round against the start."""
    changes = [run["rounds"][index][f"{name}_change"]["mean"] for run in runs.values()]
    return interval(torch.tensor(changes, dtype=torch.float64))


def over_prompts(runs: dict[int, dict], index: int, name: str) -> dict[str, float | None]:
    """Interval of the changes of all prompts of all seeds, from each seed's mean and spread."""
    found = [run["rounds"][index] for run in runs.values()]
    counts = [row["prompts"] for row in found]
    changes = [row[f"{name}_change"] for row in found]
    total = sum(counts)
    mean = sum(n * x["mean"] for n, x in zip(counts, changes)) / total
    squares = sum(
        (n - 1) * x["sd"] ** 2 + n * (x["mean"] - mean) ** 2 for n, x in zip(counts, changes)
    )
    if total < 2:
        return {"mean": mean, "low": None, "high": None, "n": total}
    half = quantile(total - 1) * math.sqrt(squares / (total - 1) / total)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": total}


def against_plain(rows: list[dict], arm: str, name: str) -> dict[str, float | None] | None:
    """Interval over the common seeds of an arm's last value less plain DPO's."""
    runs, plain = runs_of(rows, arm), runs_of(rows, PLAIN)
    common = sorted(runs.keys() & plain.keys())
    if not common:
        return None
    gaps = [runs[seed]["rounds"][-1][name] - plain[seed]["rounds"][-1][name] for seed in common]
    return interval(torch.tensor(gaps, dtype=torch.float64))


def controlled_against_plain(rows: list[dict], arm: str) -> list[dict[str, float | None]]:
    """As `against_plain` of the length-controlled reward, with the slope as it was measured and at
    each end of its interval; empty where no seed is common or the slope is not known.
    """
    slopes, found = slope_of(rows), []
    reward, plain = runs_of(rows, arm), runs_of(rows, PLAIN)
    common = sorted(reward.keys() & plain.keys())
    for slope in slopes if common else ():
        last = [[runs[seed]["rounds"][-1] for seed in common] for runs in (reward, plain)]
        ours, theirs = ([controlled(row, slope) for row in side] for side in last)
        gaps = [a - b for a, b in zip(ours, theirs)]
        found.append(interval(torch.tensor(gaps, dtype=torch.float64)))
    return found


def controlled(row: dict, slope: float) -> float:
    """The length-controlled reward of a round, which is linear in the slope."""
    return row["reward"] - slope * row["length_change"]["mean"]


def slope_of(rows: list[dict]) -> list[float]:
    """Reward a token: value, low and high end; empty where it was not measured."""
    return next((row["samples"]["slope"] for row in rows if row["kind"] == REWARD), [])


def verdict(rows: list[dict]) -> dict[str, Any]:
    """Whether plain DPO's growth in length exceeds twice its spread between seeds.

    ``growth`` and ``spread`` are mean and standard deviation over seeds of the change in held-out
    length after the last round, in tokens; one seed has no spread and proves nothing.
    """
    changes = [run["rounds"][-1]["length_change"]["mean"] for run in runs_of(rows, PLAIN).values()]
    growth = statistics.fmean(changes) if changes else None
    spread = statistics.stdev(changes) if len(changes) > 1 else None
    known = growth is not None and spread is not None
    return {
        "conclusive": bool(known and growth > 2 * spread),  # type: ignore[operator]
        "growth": growth,
        "spread": spread,
        "seeds": len(changes),
    }


def verdict_text(rows: list[dict]) -> str:
    """The verdict and, where there is one, what each arm did, in sentences."""
    found = verdict(rows)
    if not found["seeds"]:
        return "**Inconclusive**: there is no run of plain DPO."
    if found["spread"] is None:
        told = f"one seed of plain DPO ({found['growth']:+.1f} tokens){capped(rows)}"
        return f"**Inconclusive**: {told}."
    told = (
        f"plain DPO changed the length by {found['growth']:+.1f} tokens over {found['seeds']} "
        f"seeds, with a standard deviation of {found['spread']:.1f} between them"
        f"{capped(rows)}"
    )
    if not found["conclusive"]:
        return f"**Inconclusive**: {told}; the growth does not exceed twice that."
    lines = [f"**Plain DPO grows longer**: {told}."]
    for arm in arms_of(rows):
        if arm == PLAIN:
            continue
        length, reward = (against_plain(rows, arm, name) for name in ("length", "reward"))
        own = over_seeds(runs_of(rows, arm), -1, "length")
        if length is None or reward is None:
            continue
        lines.append(
            f"{label(arm)}: length {change_of(own, '.1f')} against the start, "
            f"{change_of(length, '.1f')} against plain DPO ({shown(length, 'shorter', 'longer')}); "
            f"reward {change_of(reward, '.3f')}, {controlled_text(rows, arm)}."
        )
    return "\n".join(f"- {x}" for x in lines)


def controlled_text(rows: list[dict], arm: str) -> str:
    """What the length-controlled reward shows, with the slope at both ends of its interval too."""
    found, at_ends = against_plain(rows, arm, "lc_reward"), controlled_against_plain(rows, arm)[1:]
    assert found is not None
    text = f"length-controlled reward {change_of(found, '.3f')} against plain DPO"
    told = {shown(x, "lower", "higher") for x in [found, *at_ends]}
    same = told.pop() if len(told) == 1 else "no difference shown: it depends on the slope"
    if at_ends:
        ends = (change_of(x, ".3f") for x in at_ends)
        text += f", {' and '.join(ends)} with the slope at its ends"
    return f"{text} ({same})"


def capped(rows: list[dict]) -> str:
    """A clause on how many of plain DPO's last responses have the greatest length there is."""
    runs = runs_of(rows, PLAIN).values()
    start, last = (statistics.fmean(x["rounds"][i]["truncated"] for x in runs) for i in (0, -1))
    if not last:
        return ""
    most = next(iter(runs))["settings"]["max_new_tokens"]
    text = f"; {last:.0%} of its last responses ({start:.0%} of the start's) are cut off at {most}"
    return f"{text} tokens" + (", so the growth is a lower bound" if last > start else "")


def shown(found: dict[str, Any], below: str, above: str) -> str:
    """What the interval over seeds shows."""
    if found["low"] is None or found["low"] <= 0 <= found["high"]:
        return "no difference shown"
    return below if found["high"] < 0 else above


def change_of(found: dict[str, Any], form: str) -> str:
    """A change with its interval."""
    if found["low"] is None:
        return format(found["mean"], f"+{form}")
    return f"{format(found['mean'], f'+{form}')} ({ends_of(found, form)})"


def ends_of(found: dict[str, Any], form: str) -> str:
    if found["low"] is None:
        return "one value"
    return " to ".join(format(found[end], f"+{form}") for end in ("low", "high"))


def heading(rows: list[dict]) -> str:
    """What was run, where, with which versions."""
    row = rows[-1]
    threads = "" if row["device_type"] == "cuda" else f"{row['threads']} threads, "
    size = ""
    runs = [x for x in rows if x["kind"] == RUN]
    if runs:
        x, seeds = runs[-1]["settings"], len({run["seed"] for run in runs})
        size = (
            f", {x['rounds']} rounds of {x['max_prompts']} prompts with {x['num_samples']} "
            f"responses of at most {x['max_new_tokens']} tokens, {x['heldout']} prompts held out, "
            f"beta {x['beta']:g}, learning rate {x['learning_rate']:g}, {seeds} seeds"
        )
    return (
        f"**{row['model']}, {' and '.join(row['data'])}{size}** on {row['device']}, {threads}"
        f"({build(row)})"
    )


def percent(found: list) -> str:
    if found[0] is None:
        return "none"
    low, high = wilson(found[0], found[-1])  # older rows have mean +- 1.96 standard errors
    return f"{found[0]:.0%} ({low:.0%} to {high:.0%}) of {found[-1]}"


def ranged(found: list[float], form: str) -> str:
    value, low, high = (format(x, form) for x in found)
    return f"{value} ({low} to {high})"


def reward_table(row: dict) -> str:
    """The reward model's accuracy and its length bias."""
    held, samples, training = row["held_out"], row["samples"], row["training"]
    per_100 = [[100 * x for x in part["slope"]] for part in (held, samples)]
    body = [
        ["accuracy", percent(held["accuracy"]), ""],
        ["accuracy where the chosen one is longer", percent(held["accuracy_chosen_longer"]), ""],
        ["accuracy where it is shorter", percent(held["accuracy_chosen_shorter"]), ""],
        ["the chosen one is longer", percent(held["chosen_is_longer"]), ""],
        ["the longer one gets the higher reward", percent(held["prefers_longer"]), ""],
        [
            "correlation of reward and length within a prompt",
            ranged(held["correlation"], "+.2f"),
            ranged(samples["correlation"], "+.2f"),
        ],
        ["reward for 100 tokens more", ranged(per_100[0], "+.3f"), ranged(per_100[1], "+.3f")],
        ["spread of reward within a prompt", "", f"{samples['reward_sd']:.3f}"],
        [
            "mean length (spread within a prompt)",
            "",
            f"{samples['length']:.1f} ({samples['length_sd']:.1f}) tokens",
        ],
        ["cut off", "", f"{samples['truncated']:.0%}"],
        ["best less worst of a prompt, length", "", f"{samples['best_minus_worst']:+.1f} tokens"],
        ["alpha that would balance those pairs", "", f"{samples['neutral_alpha']:.4f}"],
    ]
    titles = [
        f"reward model ({training['pairs']} pairs, {training['epochs']:g} epochs)",
        "held-out pairs",
        f"the start's samples ({samples['prompts']} prompts)",
    ]
    return markdown_table(titles, ["---", "---:", "---:"], body)


def run_table(rows: list[dict]) -> str:
    """A line for each arm and round: the changes against the start with both intervals."""
    titles = ["arm", "round", "seeds"]
    titles += [f"{TITLES[name]} (over seeds; over prompts)" for name in METRICS]
    titles += ["cut off", "alpha", "minutes"]
    body = []
    for arm in arms_of(rows):
        runs = runs_of(rows, arm)
        for index in range(min(len(run["rounds"]) for run in runs.values())):
            found = [run["rounds"][index] for run in runs.values()]
            cells = [label(arm), str(index), str(len(runs))]
            for name in METRICS:
                form = ".1f" if name == "length" else ".3f"
                mean = statistics.fmean(row[name] for row in found)
                if index == 0:
                    cells.append(format(mean, form))
                    continue
                seeds, prompts = (f(runs, index, name) for f in (over_seeds, over_prompts))
                cells.append(
                    f"{format(seeds['mean'], f'+{form}')} "
                    f"({ends_of(seeds, form)}; {ends_of(prompts, form)})"
                )
            for name, form in (("truncated", ".0%"), ("alpha", ".4f")):
                known = [row[name] for row in found if isinstance(row[name], int | float)]
                cells.append(format(statistics.fmean(known), form) if known else "")
            body.append([*cells, ""])
        body[-1][-1] = minutes(runs)
    return markdown_table(titles, ["---", *["---:"] * (len(titles) - 1)], body)


def minutes(runs: dict[int, dict]) -> str:
    """The runs' mean time, of those seeds whose time is known."""
    known = [run["seconds"] for run in runs.values() if run.get("seconds") is not None]
    if not known:
        return "not known"
    some = f" ({len(known)} of {len(runs)} seeds)" if len(known) < len(runs) else ""
    return f"{statistics.fmean(known) / 60:.1f}{some}"


def notes(rows: list[dict]) -> str:
    """What the table's columns mean."""
    slope, text = slope_of(rows), ""
    if slope:
        text = (
            f"The length-controlled reward takes {slope[0]:+.4f} reward for a token, measured on "
            f"the start's samples, 95% interval {slope[1]:+.4f} to {slope[2]:+.4f}; the table's "
            "intervals are with the slope as it was measured. "
        )
    return (
        f"{text}Lengths end at max_new_tokens, which the responses that were cut off have reached. "
        "Minutes are those of a whole run, the mean over seeds; the arms of a seed share the "
        "start's samples and scores, which are counted in the first."
    )


def markdown(rows: list[dict], plots: list[str]) -> str:
    """The block between the markers."""
    parts = [heading(rows)]
    parts += [reward_table(row) for row in rows if row["kind"] == REWARD][-1:]
    if any(row["kind"] == RUN for row in rows):
        parts += [verdict_text(rows), run_table(rows), notes(rows)]
        parts += [f"![Reward and length by round]({plot})" for plot in plots]
    return "\n\n".join(parts)


def plot(rows: list[dict], paths: list[Path]) -> None:
    """Reward, length and length-controlled reward by round, a line an arm; bars are over seeds."""
    with picture(11, 3.4, paths) as figure:
        for axis, name in zip(figure.subplots(1, 3), METRICS):
            for place, arm in enumerate(arms_of(rows)):
                draw_arm(axis, runs_of(rows, arm), name, place, label(arm))
            panel(axis, f"{TITLES[name]}, held-out")
            axis.set_xlabel("round", fontsize=8)
            axis.xaxis.get_major_locator().set_params(integer=True)
            if axis.has_data():
                axis.legend(fontsize=7, frameon=False)


def draw_arm(axis: Any, runs: dict[int, dict], name: str, place: int, text: str) -> None:
    """The seeds' mean by round; its bar is the interval of the change against the start."""
    rounds = range(min(len(run["rounds"]) for run in runs.values()))
    means = [statistics.fmean(run["rounds"][i][name] for run in runs.values()) for i in rounds]
    found = [over_seeds(runs, i, name) for i in rounds]
    halves = [0.0 if x["high"] is None else x["high"] - x["mean"] for x in found]  # type: ignore[operator]
    # Beside each other, so that bars can be told apart.
    at = [i + 0.04 * place for i in rounds]
    axis.errorbar(
        at, means, yerr=halves, marker="o", markersize=3, capsize=2, label=text,
        color=LINES[(place + 1) % len(LINES)],
    )  # fmt: skip
