"""The tables in the rooms' READMEs: options, from the dataclasses and their docstrings, and
objectives, from what they say of themselves.

    python .ci/options.py            write them
    python .ci/options.py --check    exit with 1 where one is not up to date

What stands outside a table's two markers is written by hand.
"""

import sys
from pathlib import Path

from objectives import tables

from fastdpo.cli.options import Option, options_of
from fastdpo.pair.config import PairConfig
from fastdpo.rounds.config import IterateConfig
from fastdpo.sample.config import SampleConfig
from fastdpo.score.config import ScoreConfig
from fastdpo.train.config import TrainConfig

PACKAGE = Path(__file__).resolve().parents[1] / "fastdpo"
ROOMS = {
    "sample": SampleConfig,
    "score": ScoreConfig,
    "pair": PairConfig,
    "train": TrainConfig,
    "rounds": IterateConfig,
}


def table(options: list[Option]) -> str:
    """Markdown: option, default, meaning."""
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for option in options:
        meaning = option.meaning.replace("|", "\\|")
        default = "" if option.required else f"`{option.shown}`"
        lines.append(f"| `{option.name}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def shown(config: type) -> list[Option]:
    """The options of a room: of a run its own and those of no other room."""
    others = ("sample.", "score.", "pair.", "train.")
    return [x for name, x in options_of(config).items() if not name.startswith(others)]


def main(argv: list[str]) -> int:
    """Write the tables, or with --check say which are not up to date."""
    stale = []
    parts = [(room, "options", table(shown(config))) for room, config in ROOMS.items()]
    for room, name, found in [*parts, ("loss", "objectives", tables())]:
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
        path = PACKAGE / room / "README.md"
        text = path.read_text(encoding="utf-8")
        before, rest = text.split(begin)
        new = f"{before}{begin}{found}{end}{rest.split(end)[1]}"
        if new != text:
            stale.append(str(path))
            if "--check" not in argv:
                path.write_text(new, encoding="utf-8")
    if stale:
        print("\n".join(stale))
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
