"""`python -m bench.report RESULTS.jsonl --readme README.md`: tables in the README, and plots.

Everything between the two markers comes from the results; `--check` exits 1 where it doesn't.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from .variants import FORWARD, TRAIN, WITH_REFERENCE

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COLORS = {"fastdpo": "#2a7f62", "peer": "#8da0b3", "floor": "#d9d9d9"}
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
}


def load(paths: list[Path]) -> list[dict]:
    """Rows of all files, in order."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines() if line]


def groups(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows that can be compared with each other: one machine, shape and dtype."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("device", "threads", "N", "D", "V", "pairs", "dtype"))
        found.setdefault(key, []).append(row)
    return found


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

    def order(name: str) -> float:
        row = by_name[name].get(TRAIN)
        return row["time_ms"]["median"] if row and row["time_ms"] else float("inf")

    body = []
    for name in sorted(by_name, key=order):
        passes = by_name[name]
        row = passes.get(TRAIN) or next(iter(passes.values()))
        cells = [
            f"**{name}**" if row["kind"] == "fastdpo" else name,
            row["note"] or milliseconds(passes.get(TRAIN), spread=True),
            number(row["x_floor"], ".2f"),
            number(row["peak_mib"], ",.0f"),
            number(row["workspace_mib"], ",.0f"),
            number(row["accumulators_mib"], ",.0f"),
            number(row["logp_max_err"], ".1e"),
            number(row["dh_rel_err"], ".1e"),
            number(row["dw_rel_err"], ".1e"),
            milliseconds(passes.get(FORWARD)),
            milliseconds(passes.get(WITH_REFERENCE)),
        ]
        body.append([cell.replace("|", "\\|") for cell in cells])
    # A pass that was not run has no column.
    kept = [i for i in range(len(COLUMNS)) if any(cells[i] for cells in body)]
    grid = [list(COLUMNS), list(COLUMNS.values()), *body]
    return "\n".join("| " + " | ".join(cells[i] for i in kept) + " |" for cells in grid)


def heading(row: dict) -> str:
    """What was run, where, with which versions."""
    versions = ", ".join(f"{name} {v}" for name, v in row["versions"].items() if v)
    commit = (row["git"] or "no commit")[:12] + (", with local changes" if row["dirty"] else "")
    return (
        f"**{row['dtype']}, N = {row['N']:,} tokens in {row['pairs']} pairs, D = {row['D']:,}, "
        f"V = {row['V']:,}** on {row['device']}, {row['threads']} threads, median of "
        f"{row['rounds']} interleaved rounds ({versions}; {commit}; {row['utc'][:10]})"
    )


def markdown(rows: list[dict], plots: list[str]) -> str:
    """The block between the markers."""
    parts = []
    for found in groups(rows).values():
        parts += [heading(found[0]), table(found)]
    parts += [f"![Time and peak memory of each variant]({plot})" for plot in plots]
    return "\n\n".join(parts)


def insert(text: str, block: str) -> str:
    """`text` with `block` between the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and then {END}, once each")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def plot(rows: list[dict], path: Path) -> None:
    """Bars of forward+backward time and peak memory, a row of panels a group."""
    import matplotlib
    from matplotlib.figure import Figure

    # Fixed ids and no date, so that the same results give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "fastdpo", "svg.fonttype": "none"}):
        shown = [[row for row in found if row["pass"] == TRAIN] for found in groups(rows).values()]
        shown = [found for found in shown if any(row["time_ms"] for row in found)]
        figure = Figure(figsize=(10, 0.6 + 3 * len(shown)), layout="constrained")
        axes = figure.subplots(len(shown), 2, squeeze=False)
        for (left, right), found in zip(axes, shown):
            timed = sorted(
                (row for row in found if row["time_ms"]), key=lambda row: -row["time_ms"]["median"]
            )
            first = timed[0]
            where = f"{first['dtype']}, N={first['N']}, D={first['D']}, V={first['V']}"
            bars(left, timed, [row["time_ms"]["median"] for row in timed], f"time, ms ({where})")
            weighed = [row for row in timed if row["peak_mib"] is not None]
            peaks = [row["peak_mib"] for row in weighed]
            bars(right, weighed, peaks, "peak memory beyond the inputs, MiB")
        figure.savefig(path, format="svg", metadata={"Date": None})


def bars(axis, rows: list[dict], values: list[float], title: str) -> None:
    """One panel."""
    colors = [COLORS[row["kind"]] for row in rows]
    drawn = axis.barh([row["variant"] for row in rows], values, color=colors)
    axis.bar_label(drawn, fmt="%.4g", padding=3, fontsize=8)
    axis.set_title(title, fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)


def main(arguments: list[str] | None = None) -> int:
    """Write the README's block and the plots, or check the block."""
    parser = argparse.ArgumentParser("python -m bench.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--readme", type=Path, help="without it, print the tables")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it differs")
    args = parser.parse_args(arguments)
    if args.check and args.readme is None:
        parser.error("--check needs --readme")
    plots = [path.with_suffix(".svg") for path in args.results]
    if not args.check:
        for results, picture in zip(args.results, plots):
            plot(load([results]), picture)
    if args.readme is None:
        print(markdown(load(args.results), [path.name for path in plots]))
        return 0
    links = [Path(os.path.relpath(path, args.readme.parent)).as_posix() for path in plots]
    text = args.readme.read_text()
    wanted = insert(text, markdown(load(args.results), links))
    if args.check:
        if wanted != text:
            print(f"{args.readme} differs from {', '.join(map(str, args.results))}")
        return int(wanted != text)
    args.readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
