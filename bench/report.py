"""Tables and plots of results, the GPU's first.

    python -m bench.report bench/results/*.jsonl --out bench/RESULTS.md --readme README.md

`--out` is written whole: a section for each kind of results, with its plots beside the results. The
README has the first three tables of them between its two markers. `--check` writes nothing, and
exits 1 where either is not what the results say.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from . import (
    length_tables,
    lists,
    loss_tables,
    losses,
    objectives,
    parallel_tables,
    plan_check,
    profile,
    sampling,
    smoke,
    step_tables,
)
from .rows import load
from .tables import on_gpu

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
INTRODUCTION = """# Results

Made of `bench/results/*.jsonl` by

    python -m bench.report bench/results/*.jsonl --out bench/RESULTS.md --readme README.md"""


class Kind(NamedTuple):
    """A kind of results: its section's title, its tables (of rows, and links to plots), its plot,
    and how many of its tables the README has.
    """

    title: str
    markdown: Callable[[list[dict], list[str]], str]
    plot: Callable[[list[dict], list[Path]], None] | None = None
    best: int = 0


KINDS = {
    None: Kind("The loss", loss_tables.markdown, loss_tables.plot, best=2),
    step_tables.OP: Kind("Whole steps", step_tables.markdown, step_tables.plot, best=1),
    losses.OP: Kind("What objectives cost", losses.markdown),
    lists.OP: Kind("Lists of responses", lists.markdown),
    objectives.OP: Kind("Objectives on the same prompts", objectives.markdown),
    sampling.OP: Kind("Samplers", sampling.markdown),
    length_tables.OP: Kind("The length study", length_tables.markdown, length_tables.plot),
    parallel_tables.OP: Kind("Several processes", parallel_tables.markdown),
    plan_check.OP: Kind("The planner and real processes", plan_check.markdown),
    smoke.OP: Kind("Every op on every route", smoke.markdown),
    profile.OP: Kind("Kernels", profile.markdown),
}


def kind_of(rows: list[dict]) -> str | None:
    """The key in `KINDS` of a file's rows."""
    op = rows[0].get("op") if rows else None
    op = step_tables.OP if op == step_tables.LONGEST else op
    return op if op in KINDS else None


def by_kind(results: list[Path]) -> dict[Kind, list[Path]]:
    """The files of each kind there is, of files and folders, in the order of `KINDS`."""
    files = (sorted(path.glob("*.jsonl")) if path.is_dir() else [path] for path in results)
    found: dict[str | None, list[Path]] = {op: [] for op in KINDS}
    for path in chain.from_iterable(files):
        found[kind_of(load([path]))].append(path)
    found[None].sort(key=lambda path: not any(map(on_gpu, load([path]))))
    return {KINDS[op]: paths for op, paths in found.items() if paths}


def pictures(kind: Kind, results: list[Path]) -> dict[Path, Path]:
    """The results that have a plot, and where it is; there is none of the longest pairs."""
    if kind.plot is None:
        return {}
    longest = step_tables.LONGEST
    drawn = (path for path in results if any(row.get("op") != longest for row in load([path])))
    return {path: path.with_suffix(".svg") for path in drawn}


def document(kinds: dict[Kind, list[Path]], folder: Path) -> str:
    """All results as one text; links to plots are relative to the folder that it goes to."""
    parts = [INTRODUCTION]
    for kind, paths in kinds.items():
        plots = pictures(kind, paths).values()
        links = [Path(os.path.relpath(path, folder)).as_posix() for path in plots]
        parts += [f"## {kind.title}", kind.markdown(load(paths), links)]
    return "\n\n".join(parts) + "\n"


def best(kinds: dict[Kind, list[Path]]) -> str:
    """The first tables of each kind, each with its heading and what is said below it.

    What was not run, for want of a peer's package, is in the whole document only.
    """
    parts = []
    for kind, paths in kinds.items():
        tables: list[list[str]] = []
        for part in kind.markdown(load(paths), []).split("\n\n"):
            if part.startswith("**"):
                tables.append([])
            if tables and not part.startswith("<"):
                lines = part.splitlines()
                tables[-1].append("\n".join(x for x in lines if "| not run: " not in x))
        parts += [part for table in tables[: kind.best] for part in table]
    return "\n\n".join(parts)


def insert(text: str, block: str) -> str:
    """`text` with `block` between the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and then {END}, once each")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def main(arguments: list[str] | None = None) -> int:
    """Write the document, the README's tables and the plots, or check the two texts."""
    parser = argparse.ArgumentParser("python -m bench.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="files, or folders of bench.gpu")
    parser.add_argument("--out", type=Path, help="where all tables go; without it, print them")
    parser.add_argument("--readme", type=Path, help="a text with markers for the first tables")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if they differ")
    parser.add_argument("--png", action="store_true", help="also draw each plot as PNG")
    args = parser.parse_args(arguments)
    if args.check and args.out is None and args.readme is None:
        parser.error("--check needs --out or --readme")
    kinds = by_kind(args.results)
    texts: dict[Path, str] = {}
    if args.out:
        texts[args.out] = document(kinds, args.out.parent)
    if args.readme:
        texts[args.readme] = insert(args.readme.read_text(), best(kinds))
    if args.check:
        differ = [p for p, text in texts.items() if not p.exists() or p.read_text() != text]
        for path in differ:
            print(f"{path} differs from {', '.join(map(str, args.results))}")
        return int(bool(differ))
    for kind, paths in kinds.items():
        for results, picture in pictures(kind, paths).items():
            assert kind.plot is not None
            kind.plot(load([results]), [picture] + [picture.with_suffix(".png")] * args.png)
    for path, text in texts.items():
        path.write_text(text)
    if not texts:
        print(document(kinds, Path()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
