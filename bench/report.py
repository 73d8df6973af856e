"""`python -m bench.report RESULTS.jsonl --readme README.md`: tables in the README, and plots.

Everything between the two markers comes from the results; `--check` exits 1 where it doesn't.
GPUs come before CPUs.

A head measured at one number of tokens has a table with a line a variant, and bars; on a GPU its
last column is the time over fastdpo's. A head measured at several has a table a pass with a line
for each number of tokens, and curves over them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from .variants import FASTDPO, FORWARD, FROZEN, PASSES, TRAIN, WITH_REFERENCE

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COLORS = {"fastdpo": "#2a7f62", "peer": "#8da0b3", "floor": "#d9d9d9"}
LINES = ("#8da0b3", "#c7622b", "#7a5195", "#2b6cb0", "#b8a13a", "#a05252", "#4f9da6", "#666666")
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


def load(paths: list[Path]) -> list[dict]:
    """Rows of all files, in order. A last line that was cut off is left out."""
    rows = []
    for path in paths:
        text = path.read_text()
        lines = [line for line in text.splitlines() if line]
        for line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                if line is not lines[-1] or text.endswith("\n"):
                    raise
    return rows


def grouped(rows: list[dict], names: tuple[str, ...]) -> dict[tuple, list[dict]]:
    """Rows that have all of these in common."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return found


def latest_build(rows: list[dict]) -> list[dict]:
    """Rows of the last commit and versions only, by their dates: the files' order says nothing."""

    def build(row: dict) -> tuple:
        return row["git"], row["dirty"], row["versions"]

    rows = sorted(rows, key=lambda row: row["utc"])
    return [row for row in rows if build(row) == build(rows[-1])]


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


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


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


def markdown_table(titles: list[str], rules: list[str], body: list[list[str]]) -> str:
    """A pass that was not run, or a number nobody has, is no column."""
    kept = [i for i in range(len(titles)) if any(cells[i] for cells in body)]
    grid = [titles, rules, *([cell.replace("|", "\\|") for cell in cells] for cells in body)]
    return "\n".join("| " + " | ".join(cells[i] for i in kept) + " |" for cells in grid)


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


def setting(row: dict) -> str:
    """Where, with which versions."""
    versions = ", ".join(f"{name} {v}" for name, v in row["versions"].items() if v)
    return f"on {row['device']} ({versions}; {commit(row)}; {row['utc'][:10]})"


def heading(row: dict, tokens: str) -> str:
    """What was run."""
    batch = f"N = {tokens} tokens in {row['pairs']} pair{'s' * (row['pairs'] != 1)}"
    softcap = f", softcap {row['softcap']:g}" if row.get("softcap") else ""
    return f"**{row['dtype']}, {batch}, D = {row['D']:,}, V = {row['V']:,}{softcap}**"


def place(row: dict) -> str:
    """Where it was run, with which versions."""
    versions = ", ".join(f"{name} {v}" for name, v in row["versions"].items() if v)
    threads = "" if on_gpu(row) else f"{row['threads']} threads, "
    return (
        f" on {row['device']}, {threads}median of {row['rounds']} interleaved rounds ({versions}; "
        f"{commit(row)}; {row['utc'][:10]})"
    )


def commit(row: dict) -> str:
    return (row["git"] or "no commit")[:12] + (", with local changes" if row["dirty"] else "")


def on_gpu(row: dict) -> bool:
    return row.get("device_type") == "cuda"


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


def insert(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with `block` between the markers."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and then {end}, once each")
    head, tail = text.split(begin)[0], text.split(end)[1]
    return f"{head}{begin}\n{block}\n{end}{tail}"


def plot(rows: list[dict], paths: list[Path]) -> None:
    """Time and peak memory, a row of panels a table: bars, or curves over the tokens."""
    import matplotlib
    from matplotlib.figure import Figure

    # Fixed ids and no date, so that the same results give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "fastdpo", "svg.fonttype": "none"}):
        singles, grids = groups(rows)
        drawn = [(bar_panels, timed_rows(found)) for found in singles]
        drawn += [(curve_panels, timed_rows(found)) for found in grids]
        drawn = [(draw, found) for draw, found in drawn if found]
        figure = Figure(figsize=(10, 0.9 + 3 * max(1, len(drawn))), layout="constrained")
        places = dict.fromkeys(f"{row['device']}; {commit(row)}" for row in rows)
        figure.suptitle("\n".join(places), fontsize=9)
        if drawn:
            axes = figure.subplots(len(drawn), 2, squeeze=False)
            for (left, right), (draw, found) in zip(axes, drawn):
                draw(left, right, found)
        for path in paths:
            kind = path.suffix[1:]
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            figure.savefig(path, format=kind, metadata=metadata)


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
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)


def label(row: dict) -> str:
    """The variant's name; what the default workspace was, since it is another on other devices."""
    workspace_mib = row.get("workspace_mib")  # whole steps have none
    if row["variant"] != FASTDPO.name or workspace_mib is None:
        return row["variant"]
    return f"{FASTDPO.name} (default, {workspace_mib:.0f} MiB)"


def bars(axis, rows: list[dict], values: list[float], title: str) -> None:
    """One panel."""
    colors = [COLORS[row["kind"]] for row in rows]
    drawn = axis.barh([label(row) for row in rows], values, color=colors)
    axis.bar_label(drawn, fmt="%.4g", padding=3, fontsize=8)
    axis.set_title(title, fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)


def main(arguments: list[str] | None = None) -> int:
    """Write the README's block and the plots, or check the block."""
    parser = argparse.ArgumentParser("python -m bench.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="files, or folders of bench.gpu")
    parser.add_argument("--readme", type=Path, help="without it, print the tables")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it differs")
    parser.add_argument("--png", action="store_true", help="also draw each plot as PNG")
    args = parser.parse_args(arguments)
    if args.check and args.readme is None:
        parser.error("--check needs --readme")
    # These have tables and markers of their own.
    from . import length_study, profile, sampling, smoke, step

    kinds: dict[str | None, tuple[Any, Any, tuple[str, str]]] = {
        step.OP: (step.plot, step.markdown, (step.BEGIN, step.END)),
        sampling.OP: (None, sampling.markdown, (sampling.BEGIN, sampling.END)),
        smoke.OP: (None, smoke.markdown, (smoke.BEGIN, smoke.END)),
        profile.OP: (None, profile.markdown, (profile.BEGIN, profile.END)),
        length_study.OP: (
            length_study.plot, length_study.markdown, (length_study.BEGIN, length_study.END),
        ),
        None: (plot, markdown, (BEGIN, END)),
    }  # fmt: skip
    by_kind: dict[str | None, list[Path]] = {}
    found = (sorted(path.glob("*.jsonl")) if path.is_dir() else [path] for path in args.results)
    for path in chain.from_iterable(found):
        rows = load([path])
        op = step.OP if step.is_step(rows) else rows[0].get("op") if rows else None
        by_kind.setdefault(op if op in kinds else None, []).append(path)
    text = wanted = "" if args.readme is None else args.readme.read_text()
    for kind, paths in by_kind.items():
        draw, block, markers = kinds[kind]
        if kind is None:
            paths = sorted(paths, key=lambda path: not any(map(on_gpu, load([path]))))
        # There is nothing to draw of the longest pairs.
        drawn = [x for x in paths if any(row.get("op") != step.LONGEST for row in load([x]))]
        plots = [path.with_suffix(".svg") for path in drawn] if draw else []
        if not args.check:
            for results, picture in zip(drawn, plots):
                draw(load([results]), [picture] + [picture.with_suffix(".png")] * args.png)
        if args.readme is None:
            print(block(load(paths), [path.name for path in plots]))
            continue
        links = [Path(os.path.relpath(path, args.readme.parent)).as_posix() for path in plots]
        wanted = insert(wanted, block(load(paths), links), *markers)
    if args.readme is None:
        return 0
    if args.check:
        if wanted != text:
            print(f"{args.readme} differs from {', '.join(map(str, args.results))}")
        return int(wanted != text)
    args.readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
