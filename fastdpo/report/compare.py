"""Runs from one start side by side: what their last policies answer to the same held-out prompts.

found = compare({"plain DPO": Path("runs/plain"), "with alpha": Path("runs/alpha")})
print(text_table(found))
write_page(found, Path("runs"), title="Two runs", facts=[], notes=[])
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdpo.data.records import Scored
from fastdpo.errors import DataError
from fastdpo.report.evaluation import Estimate
from fastdpo.report.page import page, picture, questions_of
from fastdpo.report.runfiles import Run, read_run
from fastdpo.report.summary import aligned
from fastdpo.report.tables import (
    HELD,
    Quantity,
    Row,
    Table,
    by_round,
    by_round_charts,
    cells_of,
    other_sampling,
    rows_of,
)
from fastdpo.report.text import Told
from fastdpo.storage import atomic_file

START = "start"
_LENGTH = Quantity("length", "length, tokens")
_GROWTH = Quantity("length change", "longer than the start, tokens", signed=True)
_SCORE = Quantity("score", "score")
_WINS = Quantity("win_rate", "win rate", percent=True)
_KL = Quantity("kl", "KL, nats")
_CUT = Quantity("truncated", "cut off", percent=True)
COLUMNS = (_LENGTH, _GROWTH, _SCORE, _WINS, _KL, _CUT)


@dataclass(frozen=True)
class Comparison:
    """Runs by their names, and what was measured of the start and of the last policy of each."""

    runs: Mapping[str, Run]
    policies: Mapping[str, Row]

    def growth(self, name: str) -> Estimate:
        """Tokens by which a policy's responses are longer than the start's, prompt by prompt."""
        return self.policies[name]["length change"]


def compare(folders: Mapping[str, Path]) -> Comparison:
    """Read the runs in these folders, by the names that they shall have.

    Raises DataError when one of them has no evaluated round, or not the prompts of the first.
    """
    runs = {name: read_run(folder) for name, folder in folders.items()}
    policies: dict[str, Row] = {}
    for name, run in runs.items():
        rows = rows_of(run)
        last = max(rows, default=0)
        if not last or "length change" not in rows[last]:
            raise DataError(
                f"{folders[name]}: no round of it was evaluated, so it can't be compared"
            )
        policies.setdefault(START, rows[0])
        policies[name] = rows[last]
    return Comparison(runs, policies)


def table(found: Comparison) -> Table:
    """A row for each policy."""
    numbered = dict(enumerate(found.policies.values()))
    columns = [cells_of(x, by_round(x, numbered), list(numbered)) for x in COLUMNS]
    return [x.name for x in COLUMNS], [list(row) for row in zip(found.policies, *columns)]


def text_table(found: Comparison) -> str:
    """The table for a terminal, each ± half a 95% interval."""
    head, body = table(found)

    def shown(cell: str | Told) -> str:
        return cell if isinstance(cell, str) else cell.value + (f" ± {cell.half}" * bool(cell.half))

    return aligned([["", *head], *([shown(cell) for cell in row] for row in body)])


def write_page(
    found: Comparison,
    out: Path,
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
) -> None:
    """Write OUT/report.html, a page that loads nothing, and its charts alone as OUT/picture.svg.

    The page has the table, the charts by round, and answers to the same prompts side by side.

    Args:
        facts: names with their values, below the title.
        notes: what a reader has to know of the table, a paragraph each.
    """
    run = next(iter(found.runs.values()))
    every = {name: (x, rows_of(x)) for name, x in found.runs.items()}
    held: dict[str, list[Scored]] = {START: run.rounds[0].held}
    held |= {name: x.rounds[-1].held for name, x in found.runs.items()}
    charts = by_round_charts(every, HELD)
    titles = {"policies": "What became of the answers", "plots": "In pictures"}
    text = page(
        kind="one start, several policies",
        title=title,
        facts=facts,
        status="Finished.",
        tiles=[],
        titles=titles | {"responses": "Answers side by side"},
        run=run,
        policies=table(found),
        notes=notes,
        plots=charts,
        other_sampling=other_sampling(run),
        **questions_of(held),
    )
    for name, content in (("report.html", text), ("picture.svg", picture(charts, steps=False))):
        with atomic_file(out / name) as scratch:
            scratch.write_text(content, encoding="utf-8")
