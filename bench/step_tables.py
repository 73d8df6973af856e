"""Tables and bars of whole steps, from their rows."""

from __future__ import annotations

from pathlib import Path

from .step_turns import WARM_UP
from .tables import bars, build, grouped, markdown_table, number, picture

OP, LONGEST = "step", "longest pair"
KEY = (
    "device", "threads", "model", "data", "batch_size", "max_length", "max_tokens", "dtype",
    "autocast", "gradient_checkpointing",
)  # fmt: skip


def tables(rows: list[dict]) -> list[list[dict]]:
    """Rows that belong together, the last of each variant."""
    steps = [row for row in rows if row["op"] == OP]
    found = grouped(steps, KEY).values()
    return [list({row["variant"]: row for row in group}.values()) for group in found]


def heading(rows: list[dict]) -> str:
    """What was run, where, with which versions."""
    row = rows[0]
    threads = "" if row["device_type"] == "cuda" else f"{row['threads']} threads, "
    computed = "under bf16 autocast" if row["autocast"] else "without autocast"
    saved = "with" if row["gradient_checkpointing"] else "without"
    return (
        f"**{row['model']}, {row['data']}: {row['batch_size']} pairs a step, sequences of "
        f"{row['mean_sequence']:,.0f} tokens on average and {row['max_length']:,} at most, "
        f"{row['dtype']} weights {computed}, {saved} gradient checkpointing** on {row['device']}, "
        f"{threads}{row['rounds']} interleaved steps ({build(row)})"
    )


def spread(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    form = ",.0f" if value["median"] >= 100 else ".3g"
    median, low, high = (format(value[name], form) for name in ("median", "p20", "p80"))
    return f"{median} ({low} to {high})"


def table(rows: list[dict]) -> str:
    """One line a variant, the fastest first."""
    titles = [
        "variant", "pairs/s, median step (p20 to p80)", "x trl, median step", "x trl, all steps",
        "tokens/s, all steps", "s, median step", "tokens computed", "padding", "peak MiB",
        "MiB before",
        "loss, first and last step",
    ]  # fmt: skip
    body = []
    for row in sorted(rows, key=lambda row: -(row["x_trl"] or 0)):
        step_s, losses = row["step_s"], row["loss"]
        body.append(
            [
                f"**{row['variant']}**" if row["kind"] == "fastdpo" else row["variant"],
                row["note"] or spread(row["pairs_per_s"]),
                number((row["x_trl_steps"] or {}).get("median"), ".2f"),
                number(row["x_trl"], ".2f"),
                "" if step_s is None else f"{row['tokens_per_s']['total']:,.0f}",
                "" if step_s is None else f"{step_s['median']:.3g}",
                "" if step_s is None else number(row["tokens_computed"], ",.0f"),
                "" if step_s is None else number(row["padding_share"], ".0%"),
                number(row["peak_mib"], ",.0f"),
                "" if step_s is None else number(row["resident_mib"], ",.0f"),
                f"{losses[0]:.4f}, {losses[-1]:.4f}" if len(losses) > WARM_UP else "",
            ]
        )
    return markdown_table(titles, ["---", *["---:"] * (len(titles) - 1)], body)


def longest_tables(rows: list[dict]) -> list[str]:
    parts = []
    key = ("device", "model")
    for group in grouped([row for row in rows if row["op"] == LONGEST], key).values():
        found = {(row["variant"], row["budget_gib"]): row for row in group}
        budgets = list(dict.fromkeys(row["budget_gib"] for row in group))
        body = []
        for name in dict.fromkeys(row["variant"] for row in group):
            cells = []
            for budget in budgets:
                row = found.get((name, budget))
                fits = row and row["longest"]
                cells.append(f"2 x {fits:,}" if fits else (row or {}).get("note") or "")
            body.append([name, *cells])
        titles = ["longest pair, tokens", *(f"within {budget} GiB" for budget in budgets)]
        first = group[0]
        parts.append(
            f"**{first['model']}, LoRA, one pair a step** on {first['device']} "
            f"({(first['git'] or 'no commit')[:12]}; {first['utc'][:10]})"
        )
        parts.append(markdown_table(titles, ["---", *["---:"] * len(budgets)], body))
    return parts


def markdown(rows: list[dict], plots: list[str]) -> str:
    """The block between the markers."""
    parts = []
    for group in tables(rows):
        parts += [heading(group), table(group)]
    parts += longest_tables(rows)
    parts += [f"![Pairs per second and peak memory of whole steps]({plot})" for plot in plots]
    return "\n\n".join(parts)


def plot(rows: list[dict], paths: list[Path]) -> None:
    """Speed and peak memory as bars, a row of panels a table."""
    drawn = [[row for row in group if row["step_s"]] for group in tables(rows)]
    drawn = [group for group in drawn if group]
    with picture(10, 0.6 + 2.4 * max(1, len(drawn)), paths) as figure:
        axes = figure.subplots(len(drawn), 2, squeeze=False) if drawn else []
        for (left, right), group in zip(axes, drawn):
            ordered = sorted(group, key=lambda row: row["pairs_per_s"]["total"])
            first = group[0]
            what = f"{first['data']}, {first['dtype']}"
            what += ", checkpointing" if first["gradient_checkpointing"] else ""
            speeds = [row["pairs_per_s"]["total"] for row in ordered]
            bars(left, ordered, speeds, f"pairs per second ({what})")
            peaks = [row["peak_mib"] for row in ordered]
            bars(right, ordered, peaks, "peak memory of the process, MiB")
