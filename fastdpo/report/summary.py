"""What a run shows: a row for each round, a table, a plot and a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdpo.errors import DataError, listed
from fastdpo.lazy import installed
from fastdpo.report.page import render
from fastdpo.report.runfiles import is_training, read_run, round_folders
from fastdpo.storage import atomic_file, read_json

_COLUMNS = {
    "round": "{:d}",
    "score": "{:.4f}",
    "score_se": "{:.4f}",
    "length": "{:.1f}",
    "truncated": "{:.0%}",
    "win_rate": "{:.2f}",
    "kl": "{:.2f}",
    "pairs": "{:d}",
    "lists": "{:d}",
    "rewards/margins": "{:.4f}",
    "rewards/accuracies": "{:.2f}",
    "loss": "{:.4f}",
}


def summarize(out: Path) -> list[dict[str, Any]]:
    """One row for each finished round, the start as round 0, from the files of a run."""
    summaries = (folder / "summary.json" for folder in round_folders(out).values())
    return [read_json(path) for path in summaries if path.is_file()]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text; a value a round does not have is a dash."""
    columns = [name for name in _COLUMNS if any(row.get(name) is not None for row in rows)]
    cells = [columns]
    for row in rows:
        values = ((name, row.get(name)) for name in columns)
        cells.append(["-" if x is None else _COLUMNS[name].format(x) for name, x in values])
    return aligned(cells)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text whose columns end below one another."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths)) for row in rows)


def plot(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Held-out score, training margin and response length by round, as a PNG.

    Without matplotlib there is none, and a line on the error output says how to have it.
    """
    if not installed(
        "matplotlib", "plots", f"{path.name} is not drawn; report.html has its curves"
    ):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (
        (axes[0], "score", "held-out score", "score_se"),
        (axes[1], "rewards/margins", "reward margin in training", None),
        (axes[2], "length", "held-out response length, tokens", "length_se"),
    )
    for axis, name, label, error in panels:
        known = [row for row in rows if row.get(name) is not None]
        x, y = [row["round"] for row in known], [row[name] for row in known]
        spread = [1.96 * row[error] for row in known] if error else None
        axis.errorbar(x, y, yerr=spread, marker="o", capsize=3, color="#1f5fa8")
        axis.set(xlabel="round", title=label)
        axis.set_xticks([row["round"] for row in rows])
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def html(out: Path, defaults: Mapping[str, Any] | None = None) -> Path:
    """Write the report of a run as one page that loads nothing, OUT/report.html; returns its path.

    Everything on it comes from files of the run, whatever stage that is in: the same files give the
    same bytes. A section whose files are missing or damaged is left out, and the page says so.

    Args:
        out: folder of `fastdpo iterate`, or of `fastdpo train`.
        defaults: of all options, by their names with the section; those that differ come first.

    Raises DataError when `out` holds no run at all, and OSError when it can't be written to.
    """
    out = Path(out)
    if not _is_run(out):
        below = [str(x) for x in sorted(out.glob("*")) if x.is_dir() and _is_run(x)]
        raise DataError(
            f"{out}: there is no run here, but below it. Name one as output_dir: {listed(below)}"
            if below
            else f"{out}: there is no run here, neither state.json, a round nor run.json. Name the "
            "output_dir of fastdpo iterate or of fastdpo train."
        )
    path = out / "report.html"
    with atomic_file(path) as scratch:
        scratch.write_text(render(read_run(out), defaults), encoding="utf-8")
    return path


def _is_run(out: Path) -> bool:
    return (out / "state.json").is_file() or bool(round_folders(out)) or is_training(out)
