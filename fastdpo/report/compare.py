"""Runs from one start side by side: what their last policies answer to the same held-out prompts.

found = compare({"plain DPO": Path("runs/plain"), "with alpha": Path("runs/alpha")})
print(text_table(found))
write_page(found, Path("runs"), title="Two runs", facts=[], status="", intro=[], notes=[])
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdpo.data.records import Scored, Text
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
    distance,
    rows_of,
)
from fastdpo.report.text import Told
from fastdpo.storage import atomic_file

START = "start"
COLUMNS = (
    Quantity("length", "tokens"),
    Quantity("length change", "growth", signed=True),
    Quantity("score", "score"),
    Quantity("win_rate", "win rate", percent=True),
    Quantity("kl", "KL"),
    Quantity("truncated", "cut off", percent=True),
)
CHARTS = ("length", "score", "kl")


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

    Raises DataError when one of them has no evaluated round, or held-out prompts or sampling other
    than the first's.
    """
    runs = {name: read_run(folder) for name, folder in folders.items()}
    first, policies = next(iter(runs.values())), dict[str, Row]()
    for name, run in runs.items():
        rows = rows_of(run)
        last = max(rows, default=0)
        if not last or "length change" not in rows[last]:
            raise DataError(
                f"{folders[name]}: no round of it was evaluated, so it can't be compared"
            )
        if _prompts(run) != _prompts(first):
            raise DataError(
                f"{folders[name]}: its held-out prompts are not those of {next(iter(folders))}; "
                "compare runs of the same prompts, evaluate.heldout and seed"
            )
        if distance(run) != distance(first):
            raise DataError(
                f"{folders[name]}: its answers were drawn otherwise than those of "
                f"{next(iter(folders))}; compare runs of the same sample.temperature and top_p"
            )
        policies.setdefault(START, rows[0])
        policies[name] = rows[last]
    return Comparison(runs, policies)


def _prompts(run: Run) -> dict[int, Text]:
    """The prompts that its start answered."""
    return {response.prompt_index: response.prompt for response in run.rounds[0].held}


def table(found: Comparison) -> Table:
    """A row for each policy."""
    numbered = dict(enumerate(found.policies.values()))
    columns = [cells_of(x, by_round(x, numbered), list(numbered)) for x in COLUMNS]
    return [x.name for x in COLUMNS], [list(row) for row in zip(found.policies, *columns)]


def text_table(found: Comparison) -> str:
    """The table for a terminal of 80 columns: lengths and distances without their intervals."""
    head, body = table(found)

    def shown(name: str, cell: str | Told) -> str:
        if isinstance(cell, str) or not cell.half or name in ("tokens", "KL"):
            return cell if isinstance(cell, str) else cell.value
        return f"{cell.value} ± {cell.half}"

    names = ["", *head]
    return aligned([names, *([shown(*each) for each in zip(names, row)] for row in body)])


def write_page(
    found: Comparison,
    out: Path,
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    status: str,
    intro: Sequence[str],
    notes: Sequence[str],
) -> None:
    """Write OUT/report.html, a page that loads nothing, and its charts alone as OUT/picture.svg.

    The page has the table, the charts by round, and answers to the same prompts side by side.

    Args:
        facts: names with their values, below the title.
        status: what happened.
        intro, notes: what a reader has to know before and after the table, a paragraph each.
    """
    run = next(iter(found.runs.values()))
    every = {name: (x, rows_of(x)) for name, x in found.runs.items()}
    held: dict[str, list[Scored]] = {START: run.rounds[0].held}
    held |= {name: x.rounds[-1].held for name, x in found.runs.items()}
    shown = [x for name in CHARTS for x in HELD if x.key == name]
    charts = by_round_charts(every, shown)
    titles = {"policies": "What became of the answers", "plots": "In pictures"}
    text = page(
        kind="one start, several policies",
        title=title,
        facts=facts,
        status=f"Finished. {status}",
        tiles=[],
        titles=titles | {"responses": "Answers side by side"},
        run=run,
        policies=table(found),
        intro=intro,
        notes=notes,
        plots=charts,
        **questions_of(held),
    )
    for name, content in (("report.html", text), ("picture.svg", picture(charts, steps=False))):
        with atomic_file(out / name) as scratch:
            scratch.write_text(content, encoding="utf-8")
