"""Tables and plots of the loss alone.

A head measured at one number of tokens has a table with a line a variant, and bars; on a GPU its
last column is the time over fastdpo's. A head measured at several has a table a pass with a line
for each number of tokens, and curves over them.
"""

from __future__ import annotations

from pathlib import Path

from .tables import (
    COLORS,
    LINES,
    bars,
    build,
    commit,
    grouped,
    latest_build,
    markdown_table,
    number,
    on_gpu,
    panel,
    picture,
)
from .variants import FASTDPO, FORWARD, FROZEN, PASSES, TRAIN, WITH_REFERENCE

COLUMNS = {
    "variant": "---",
    "fwd+bwd ms (p20 to p80)": "---:",
    "x matmuls": "---:",
    "peak MiB": "---:",
    "workspace MiB": "---:",
    "fp32 acc. MiB": "---:",
    "max logp error": "---:",
    "dh error": "---:",
    "dw error": "---:",
    "forward ms": "---:",
    "with reference ms": "---:",
    "frozen head ms": "---:",
    "x fastdpo": "---:",
}
NOTE = 60  # characters of a note in a narrow cell
MACHINE, HEAD = ("device", "threads"), ("D", "V", "softcap")


def latest(rows: list[dict]) -> list[dict]:
    """Likewise, and the last of those measured twice."""
    kept = latest_build(rows)
    return list({(row["N"], row["pass"], row["variant"]): row for row in kept}.values())


def groups(rows: list[dict]) -> tuple[list[list[dict]], list[list[dict]]]:
    """Rows that belong in one table: single shapes, and heads with several numbers of tokens."""
    singles, grids = [], []
    for head in grouped(rows, (*MACHINE, *HEAD, "dtype", "pairs")).values():
        found = sorted(latest(head), key=lambda row: row["N"])
        (singles if found[0]["N"] == found[-1]["N"] else grids).append(found)
    return singles, grids


def main_pass(rows: list[dict]) -> str:
    """The pass a table or a plot is about: forward and backward, if it was run."""
    run = {row["pass"] for row in rows}
    return next((pass_ for pass_ in (TRAIN, *PASSES) if pass_ in run), rows[0]["pass"])


def milliseconds(row: dict | None, spread: bool = False) -> str:
    """Three digits; tenths of a second don't need hundredths of a millisecond."""
    if row is None or row["time_ms"] is None:
        return ""

    def digits(ms: float) -> str:
        return f"{ms:.3g}" if ms < 100 else f"{ms:,.0f}"

    time = row["time_ms"]
    span = f" ({digits(time['p20'])} to {digits(time['p80'])})" if spread else ""
    return digits(time["median"]) + span


def table(rows: list[dict]) -> str:
    """One line a variant, the fastest forward+backward first."""
    by_name: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_name.setdefault(row["variant"], {})[row["pass"]] = row
    first = main_pass(rows)
    first_rows = {name: passes[first] for name, passes in by_name.items() if first in passes}

    def order(name: str) -> float:
        row = by_name[name].get(first)
        return row["time_ms"]["median"] if row and row["time_ms"] else float("inf")

    body = []
    for name in sorted(by_name, key=order):
        passes = by_name[name]
        row = passes.get(first) or next(iter(passes.values()))
        others = {pass_: found for pass_, found in passes.items() if pass_ != first}
        body.append(
            [
                f"**{name}**" if row["kind"] == "fastdpo" else name,
                row["note"] or milliseconds(passes.get(first), spread=True),
                number(row["x_floor"], ".2f"),
                number(row["peak_mib"], ",.0f"),
                number(row["workspace_mib"], ",.0f"),
                number(row["accumulators_mib"], ",.0f"),
                number(row["logp_max_err"], ".1e"),
                number(row["dh_rel_err"], ".1e"),
                number(row["dw_rel_err"], ".1e"),
                milliseconds(others.get(FORWARD)),
                milliseconds(others.get(WITH_REFERENCE)),
                milliseconds(others.get(FROZEN)),
                speedup(row, first_rows) if on_gpu(row) and row["time_ms"] else "",
            ]
        )
    titles = list(COLUMNS)
    if first != TRAIN:
        titles[1] = titles[1].replace("fwd+bwd", first)
    return markdown_table(titles, list(COLUMNS.values()), body)


def grid_table(rows: list[dict]) -> str:
    """One pass of one head: a line for each number of tokens, how much faster than each peer."""
    peers = list(dict.fromkeys(row["variant"] for row in rows if row["kind"] == "peer"))
    ours = list(dict.fromkeys(row["variant"] for row in rows if row["kind"] == "fastdpo"))
    titles = ["tokens"]
    for name in ours:
        titles += [f"{name} ms", "of the floor", "peak MiB"]
    titles += [f"vs {name}" for name in peers]
    body = []
    for (N,), found in grouped(rows, ("N",)).items():
        by_name = {row["variant"]: row for row in found}
        cells = [f"{N:,}"]
        for name in ours:
            row = by_name.get(name)
            if row is None:
                cells += ["", "", ""]
                continue
            cells += [
                (row["note"] or milliseconds(row))[:NOTE],
                "" if row["x_floor"] is None else f"{1 / row['x_floor']:.0%}",
                number(row["peak_mib"], ",.0f"),
            ]
        body.append(cells + [speedup(by_name.get(name), by_name) for name in peers])
    return markdown_table(titles, ["---:"] * len(titles), body)


def speedup(peer: dict | None, by_name: dict[str, dict]) -> str:
    """Of fastdpo's default over another, or why the other has no time."""
    ours = by_name.get(FASTDPO.name)
    if peer is None or peer["time_ms"] is None:
        return "" if peer is None else peer["note"][:NOTE]
    if ours is None or ours["time_ms"] is None:
        return ""
    return f"{peer['time_ms']['median'] / ours['time_ms']['median']:.2f}"


def heading(row: dict, tokens: str) -> str:
    """What was run."""
    batch = f"N = {tokens} tokens in {row['pairs']} pair{'s' * (row['pairs'] != 1)}"
    softcap = f", softcap {row['softcap']:g}" if row.get("softcap") else ""
    return f"**{row['dtype']}, {batch}, D = {row['D']:,}, V = {row['V']:,}{softcap}**"


def place(row: dict) -> str:
    """Where it was run, with which versions."""
    threads = "" if on_gpu(row) else f"{row['threads']} threads, "
    return (
        f" on {row['device']}, {threads}median of {row['rounds']} interleaved rounds ({build(row)})"
    )


def slice_note(rows: list[dict]) -> str:
    """Where only a part was compared with fp64, how much."""
    parts = {
        (row["checked_tokens"], row["checked_vocab"])
        for row in rows
        if row.get("checked_tokens") and row["checked_tokens"] < row["N"]
    }
    if not parts:
        return ""
    tokens = max(part[0] for part in parts)
    vocab = max(part[1] or 0 for part in parts)
    return f"Errors are those of {tokens:,} tokens" + (
        f" and of {vocab:,} rows of the head's gradient." if vocab else "."
    )


def markdown(rows: list[dict], plots: list[str]) -> str:
    """The block between the markers; a CPU's tables are folded where there are a GPU's."""
    gpu, cpu = (tables([row for row in rows if on_gpu(row) == where]) for where in (True, False))
    if gpu and cpu:
        cpu = ["<details><summary>On a CPU</summary>", *cpu, "</details>"]
    drawn = [f"![Time and peak memory of each variant]({plot})" for plot in plots]
    return "\n\n".join(gpu + cpu + drawn)


def tables(rows: list[dict]) -> list[str]:
    """Headings and tables; one of the same run as the table above it doesn't repeat where."""
    parts, above = [], ""
    singles, grids = groups(rows)
    for found in singles + grids:
        here, least, most = place(found[-1]), found[0]["N"], found[-1]["N"]
        tokens = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        parts.append(heading(found[0], tokens) + ("" if here == above else here))
        above = here
        if least == most:
            parts += filter(None, [table(found), slice_note(found)])
            continue
        for (pass_,), of_pass in grouped(found, ("pass",)).items():
            parts += [f"{pass_}, times over {FASTDPO.name}'s", grid_table(of_pass)]
    return parts


def plot(rows: list[dict], paths: list[Path]) -> None:
    """Time and peak memory, a row of panels a table: bars, or curves over the tokens."""
    singles, grids = groups(rows)
    drawn = [(bar_panels, timed_rows(found)) for found in singles]
    drawn += [(curve_panels, timed_rows(found)) for found in grids]
    drawn = [(draw, found) for draw, found in drawn if found]
    with picture(10, 0.9 + 3 * max(1, len(drawn)), paths) as figure:
        places = dict.fromkeys(f"{row['device']}; {commit(row)}" for row in rows)
        figure.suptitle("\n".join(places), fontsize=9)
        axes = figure.subplots(len(drawn), 2, squeeze=False) if drawn else []
        for (left, right), (draw, found) in zip(axes, drawn):
            draw(left, right, found)


def timed_rows(rows: list[dict]) -> list[dict]:
    """Those of the pass that is drawn."""
    return [row for row in rows if row["pass"] == main_pass(rows) and row["time_ms"]]


def title_of(row: dict) -> str:
    pass_ = "" if row["pass"] == TRAIN else f"{row['pass']}, "
    return f"{pass_}{row['dtype']}"


def bar_panels(left, right, rows: list[dict]) -> None:
    """One shape."""
    timed = sorted(rows, key=lambda row: -row["time_ms"]["median"])
    first = timed[0]
    where = f"{title_of(first)}, N={first['N']}, D={first['D']}, V={first['V']}"
    bars(left, timed, [row["time_ms"]["median"] for row in timed], f"time, ms ({where})")
    weighed = [row for row in timed if row["peak_mib"] is not None]
    peaks = [row["peak_mib"] for row in weighed]
    bars(right, weighed, peaks, "peak memory beyond the inputs, MiB")


def curve_panels(left, right, rows: list[dict]) -> None:
    """One head, tokens from left to right; where a curve ends, the variant failed."""
    where = f"{title_of(rows[0])}, D={rows[0]['D']}, V={rows[0]['V']}"
    peers = 0
    for (name, kind), found in grouped(rows, ("variant", "kind")).items():
        style = {"color": COLORS[kind], "linestyle": "-" if kind != "floor" else ":"}
        if kind == "peer":
            style["color"], peers = LINES[peers % len(LINES)], peers + 1
        elif name != FASTDPO.name and kind == "fastdpo":
            style["linestyle"] = "--"
        times = [row["time_ms"]["median"] for row in found]
        left.plot([row["N"] for row in found], times, marker=".", label=name, **style)
        if found := [row for row in found if row["peak_mib"]]:
            peaks = [row["peak_mib"] for row in found]
            right.plot([row["N"] for row in found], peaks, marker=".", **style)
    left.legend(fontsize=6, frameon=False)
    for axis, title in (
        (left, f"time, ms ({where})"),
        (right, "peak memory beyond the inputs, MiB, by tokens"),
    ):
        if axis.has_data():  # without any memory measured there is nothing to scale
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
        panel(axis, title)
