"""What the files of an iterative run say, as far as they can be read."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastdpo.data.records import Scored
from fastdpo.errors import DataError
from fastdpo.report.evaluation import (
    Estimate,
    by_length,
    by_prompt,
    by_score,
    change,
    half_width,
    heldout,
    number,
    over_prompts,
    win_rate,
)
from fastdpo.storage import read_json, read_text

PARTS = ("config", "numbers", "pairing", "steps", "held", "speed")
_ROUND = re.compile(r"round-(\d{2,6})")
T = TypeVar("T")
Numbers = dict[str, float]


@dataclass(frozen=True)
class Round:
    """What the files of a round say; round 0 is the start, which is only evaluated."""

    index: int
    numbers: Numbers  # summary.json, and what it takes from other files
    pairing: Numbers  # pairs.summary.json
    dropped: dict[str, int]  # by reason
    steps: list[Numbers]  # metrics.jsonl
    held: list[Scored]  # eval
    speed: dict[str, dict[str, Any]]  # throughput.json of "rollouts" and "evaluation"

    @property
    def name(self) -> str:
        return f"Round {self.index}" if self.index else "Start"


@dataclass(frozen=True)
class Run:
    """What the files of a run say.

    `config` has the options by their names with the section, as on the command line.
    `offline` is offline/summary.json, of the pairs to replay: what `pairing` and `dropped` are of a
    round; None where there are none.
    `gone` has, for each of `PARTS`, a line for each file that is missing or damaged; paths in it
    are relative to the run.
    """

    config: dict[str, Any]
    done: list[str]
    rounds: list[Round]
    offline: tuple[Numbers, dict[str, int]] | None
    gone: dict[str, list[str]]

    def option(self, name: str) -> Any:
        """An option of the run, None where it has none; older runs had no sections."""
        return self.config.get(name, self.config.get(name.rpartition(".")[2]))


def round_folders(out: Path) -> dict[int, Path]:
    """The rounds of a run by number, in order."""
    if not out.is_dir():
        return {}
    named = {p: _ROUND.fullmatch(p.name) for p in out.iterdir() if p.is_dir()}
    return dict(sorted((int(match[1]), path) for path, match in named.items() if match))


def read_run(out: Path) -> Run:
    """All of a run that the report shows; raises nothing for what is missing or damaged."""
    files = _Files(out)
    state = files.read("config", out / "state.json", _state) or {"config": {}, "done": []}
    rounds = [_round(files, index, path) for index, path in round_folders(out).items()]
    offline = None
    if (out / "offline").is_dir():
        offline = files.read("pairing", out / "offline" / "summary.json", _pairing)
    return Run(state["config"], state["done"], rounds, offline, files.gone)


class _Files:
    """Reads files of a run and notes what can't be read."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.gone: dict[str, list[str]] = {part: [] for part in PARTS}

    def read(self, part: str, path: Path, reader: Callable[[Path], T]) -> T | None:
        name = path.relative_to(self.out).as_posix()
        try:
            if path.exists():
                return reader(path)
            why = f"{name} is not there"
        # What was damaged can be of any type where another was meant; a DataError is a ValueError.
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            # A message of ours begins with the path, which says where this machine keeps the run.
            text = str(error) or type(error).__name__
            why = text.replace(f"{self.out}/", "").split("\n")[0]
            why = why if why.startswith(name) else f"{name}: {why}"
        self.gone[part].append(why)
        return None


def _round(files: _Files, index: int, folder: Path) -> Round:
    numbers = files.read("numbers", folder / "summary.json", _numbers) or {}
    pairing: tuple[Numbers, dict[str, int]] = ({}, {})
    steps: list[Numbers] = []
    speed = {}
    if index:  # the start is not trained
        pairing = files.read("pairing", folder / "pairs.summary.json", _pairing) or pairing
        # A curriculum has metrics for each of its stages.
        stages = sorted(folder.glob("stage-*"), key=lambda path: (len(path.name), path.name))
        for path in stages or [folder]:
            steps += files.read("steps", path / "metrics" / "metrics.jsonl", _steps) or []
        if not numbers and (folder / "train.json").exists():
            numbers = files.read("numbers", folder / "train.json", _numbers) or {}
        speed["rollouts"] = files.read("speed", folder / "candidates/throughput.json", _object)
    speed["evaluation"] = files.read("speed", folder / "eval/candidates/throughput.json", _object)
    held = files.read("held", folder / "eval", heldout) or []
    speed = {what: facts for what, facts in speed.items() if facts}
    return Round(index, numbers, *pairing, steps, held, speed)


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object. Write the stage again.")
    return value


def _numbers(path: Path) -> Numbers:
    return _finite(_object(path))


def _finite(values: dict[str, Any]) -> Numbers:
    """The entries that are finite numbers."""
    found = {name: number(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def _state(path: Path) -> dict[str, Any]:
    state = _object(path)
    if not isinstance(state.get("config"), dict) or not isinstance(state.get("done"), list):
        raise DataError(f"{path}: not the state of a run. Restore it.")
    config: dict[str, Any] = {}
    for name, value in state["config"].items():
        section = value if isinstance(value, dict) else {}
        config |= {f"{name}.{key}": x for key, x in section.items()} or {name: value}
    return {"config": config, "done": [x for x in state["done"] if isinstance(x, str)]}


def _pairing(path: Path) -> tuple[Numbers, dict[str, int]]:
    """Its numbers, those that shaping found among them, and the drops by reason."""
    summary = _object(path)
    dropped, shaping = summary.get("dropped", {}), summary.get("shaping", {})
    if not isinstance(dropped, dict) or any(number(x) is None for x in dropped.values()):
        raise DataError(f"{path}: dropped is not a count for each reason. Pair again.")
    if not isinstance(shaping, dict):
        raise DataError(f"{path}: shaping is not an object. Pair again.")
    return _finite(summary) | _finite(shaping), {why: int(x) for why, x in dropped.items()}


def _steps(path: Path) -> list[Numbers]:
    """Rows of optimizer steps; a last line that a kill cut off is left out."""
    text = read_text(path, path) if path.stat().st_size else ""
    lines = [line for line in text.split("\n") if line]
    rows = []
    for i, line in enumerate(lines, 1):
        try:
            rows.append(_finite(json.loads(line)))
        except (ValueError, AttributeError) as error:
            if i < len(lines) or isinstance(error, AttributeError):
                raise DataError(f"{path}:{i}: not a JSON object. Restore it.") from error
    return rows


def measured(run: Run, one: Round) -> dict[str, Estimate]:
    """What is known of a round, by name: the numbers of its files, NAME with NAME_se as interval.

    Where its files have none: score and length of held-out responses, and their "score change",
    "length change" and "win_rate" against the start (shares, 0 to 1). What was measured in training
    has no interval: it changes from step to step. "pairs" are those that training took.
    """
    planned = number(run.option("evaluate.heldout")) or 0
    prompts = len(by_prompt(one.held)) or max(int(planned), 0)
    errors = {name: one.numbers.get(f"{name}_se", 0.0) for name in one.numbers}
    row = {name: Estimate(x, half_width(errors[name], prompts)) for name, x in one.numbers.items()}
    found: dict[str, Estimate | None] = {}
    if one.held:
        found = {
            "score": over_prompts(one.held, by_score),
            "length": over_prompts(one.held, by_length),
        }
    if one.index == 0:
        row.pop("win_rate", None)  # of the start against itself
    else:
        start = next((first.held for first in run.rounds if first.index == 0), [])
        found |= {
            "score change": change(start, one.held, by_score),
            "length change": change(start, one.held, by_length),
            "win_rate": win_rate(start, one.held),
            "pairs": Estimate(one.pairing["pairs"]) if "pairs" in one.pairing else None,
        }
    whole = {name: x for name, x in found.items() if x is not None} | row
    if "pairs" in whole and "pairs_dropped" in one.numbers:
        whole["pairs"] = Estimate(whole["pairs"].value - one.numbers["pairs_dropped"])
    return whole
