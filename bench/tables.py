"""What the tables of all results share: grouping rows, and Markdown of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .variants import FASTDPO

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"fastdpo": "#2a7f62", "peer": "#8da0b3", "floor": "#d9d9d9"}
LINES = ("#8da0b3", "#c7622b", "#7a5195", "#2b6cb0", "#b8a13a", "#a05252", "#4f9da6", "#666666")


def grouped(rows: list[dict], names: tuple[str, ...]) -> dict[tuple, list[dict]]:
    """Rows that have all of these in common."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return found


def latest_build(rows: list[dict]) -> list[dict]:
    """Rows of the last commit and versions only, by their dates: the files' order says nothing."""

    def same(row: dict) -> tuple:
        return row["git"], row["dirty"], row["versions"]

    rows = sorted(rows, key=lambda row: row["utc"])
    return [row for row in rows if same(row) == same(rows[-1])]


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def markdown_table(titles: list[str], rules: list[str], body: list[list[str]]) -> str:
    """A pass that was not run, or a number nobody has, is no column."""
    kept = [i for i in range(len(titles)) if any(cells[i] for cells in body)]
    grid = [titles, rules, *([cell.replace("|", "\\|") for cell in cells] for cells in body)]
    return "\n".join("| " + " | ".join(cells[i] for i in kept) + " |" for cells in grid)


def setting(row: dict) -> str:
    """Where a row was measured, and with what."""
    return f"on {row['device']} ({build(row)})"


def build(row: dict) -> str:
    """Versions, commit and day of a measurement."""
    versions = ", ".join(f"{name} {v}" for name, v in row["versions"].items() if v)
    return f"{versions}; {commit(row)}; {row['utc'][:10]}"


def commit(row: dict) -> str:
    return (row["git"] or "no commit")[:12] + (", with local changes" if row["dirty"] else "")


def on_gpu(row: dict) -> bool:
    return row.get("device_type") == "cuda"


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
    axis.margins(x=0.15)
    panel(axis, title)


@contextmanager
def picture(width: float, height: float, paths: list[Path]) -> Iterator[Figure]:
    """A figure that is saved at the end, as SVG or PNG.

    Its ids are fixed and it has no date, so that the same results give the same bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "fastdpo", "svg.fonttype": "none"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        for path in paths:
            kind = path.suffix[1:]
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            figure.savefig(path, format=kind, metadata=metadata)


def panel(axis: Axes, title: str) -> None:
    """The look of all panels."""
    axis.set_title(title, fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
