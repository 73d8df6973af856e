"""What the files of an iterative run say, as far as they can be read."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastdpo.data import DataError
from fastdpo.evaluation import (
    Estimate,
    Response,
    by_length,
    by_score,
    change,
    heldout,
    interval,
    number,
    over_prompts,
    win_rate,
)
from fastdpo.metrics import read_metrics
from fastdpo.storage import read_json

_ROUND = re.compile(r"round-(\d{2,6})")
T = TypeVar("T")


@dataclass(frozen=True)
class Round:
    """What the files of a round say; round 0 is the start, which is only evaluated."""

    index: int
    numbers: dict[str, float]  # summary.json, and what it takes from other files
    pairing: dict[str, float]  # pairs.summary.json
    dropped: dict[str, int]  # by reason
    steps: list[dict[str, float]]  # metrics.jsonl
    held: list[Response]  # eval
    speed: dict[str, dict[str, Any]]  # throughput.json of "rollouts" and "evaluation"


@dataclass(frozen=True)
class Run:
    """What the files of a run say.

    `gone` has, for "config", "numbers", "pairing", "steps", "held" and "speed", a line for each
    file that is missing or damaged; paths in it are relative to the run.
    """

    config: dict[str, Any]
    done: list[str]
    rounds: list[Round]
    gone: dict[str, list[str]]


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
    return Run(state["config"], state["done"], rounds, files.gone)


class _Files:
    """Reads files of a run and notes what can't be read."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.gone: dict[str, list[str]] = {}

    def read(self, section: str, path: Path, reader: Callable[[Path], T]) -> T | None:
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
        self.gone.setdefault(section, []).append(why)
        return None


def _round(files: _Files, index: int, folder: Path) -> Round:
    numbers = files.read("numbers", folder / "summary.json", _numbers) or {}
    pairing: dict[str, Any] = {}
    steps: list[dict[str, float]] = []
    speed = {}
    if index:  # the start is not trained
        pairing = files.read("pairing", folder / "pairs.summary.json", _pairing) or {}
        # A curriculum has metrics for each of its stages.
        stages = sorted(folder.glob("stage-*"), key=lambda path: (len(path.name), path.name))
        for path in stages or [folder]:
            steps += files.read("steps", path / "metrics" / "metrics.jsonl", _steps) or []
        if not numbers and (folder / "train.json").exists():
            numbers = files.read("numbers", folder / "train.json", _numbers) or {}
        speed["rollouts"] = files.read("speed", folder / "candidates/throughput.json", _object)
    speed["evaluation"] = files.read("speed", folder / "eval/candidates/throughput.json", _object)
    return Round(
        index=index,
        numbers=numbers,
        pairing={k: x for k, x in pairing.items() if k != "dropped"},
        dropped=pairing.get("dropped", {}),
        steps=steps,
        held=files.read("held", folder / "eval", heldout) or [],
        speed={what: facts for what, facts in speed.items() if facts},
    )


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object. Write the stage again.")
    return value


def _numbers(path: Path) -> dict[str, float]:
    """The entries that are finite numbers."""
    found = {name: number(value) for name, value in _object(path).items()}
    return {name: value for name, value in found.items() if value is not None}


def _state(path: Path) -> dict[str, Any]:
    state = _object(path)
    if not isinstance(state.get("config"), dict) or not isinstance(state.get("done"), list):
        raise DataError(f"{path}: not the state of a run. Restore it.")
    return {"config": state["config"], "done": [x for x in state["done"] if isinstance(x, str)]}


def _pairing(path: Path) -> dict[str, Any]:
    dropped = _object(path).get("dropped", {})
    if not isinstance(dropped, dict) or any(number(x) is None for x in dropped.values()):
        raise DataError(f"{path}: dropped is not a count for each reason. Pair again.")
    return {**_numbers(path), "dropped": {why: int(x) for why, x in dropped.items()}}


def _steps(path: Path) -> list[dict[str, float]]:
    """Rows of optimizer steps; a last line that a kill cut off is left out."""
    try:
        rows = read_metrics(path)
        lines = sum(1 for line in path.read_text().splitlines() if line)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8. Restore it.") from error
    if lines > len(rows) + 1 or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}:{len(rows) + 1}: not a JSON object. Restore it.")
    found = [{name: number(value) for name, value in row.items()} for row in rows]
    return [{name: x for name, x in row.items() if x is not None} for row in found]


def measured(run: Run, one: Round) -> dict[str, Estimate]:
    """What is known of a round, by name: the numbers of its files, NAME with NAME_se as interval.

    Where its files have none: score and length of held-out responses, their "score change",
    "length change" and "win_rate" against the start (shares, 0 to 1), and "kl" by `kl_estimate`.
    Intervals of what was measured in training are over the round's optimizer steps.
    """
    errors = {name: one.numbers.get(f"{name}_se") for name in one.numbers}
    # An error of zero is that of a single prompt, or of prompts that are all alike.
    row = {name: Estimate(x, 1.96 * (errors[name] or 0) or None) for name, x in one.numbers.items()}
    found: dict[str, Estimate | None] = {}
    if one.held:
        found = {
            "score": over_prompts(one.held, by_score),
            "length": over_prompts(one.held, by_length),
        }
    if one.index == 0:
        row.pop("win_rate", None)  # of the start against itself
    else:
        beta = beta_of(run.config, one.index)
        row |= {
            name: Estimate(row[name].value, interval(values).half)
            for name in ("loss", "rewards/margins", "rewards/accuracies")
            if name in row and (values := [x[name] for x in one.steps if name in x])
        }
        start = next((first.held for first in run.rounds if first.index == 0), [])
        kl = kl_estimate(one.numbers, beta)
        kls = [x for x in (kl_estimate(step, beta) for step in one.steps) if x is not None]
        found |= {
            "score change": change(start, one.held, by_score),
            "length change": change(start, one.held, by_length),
            "win_rate": win_rate(start, one.held),
            "pairs": Estimate(one.pairing["pairs"]) if "pairs" in one.pairing else None,
            "kl": None if kl is None else Estimate(kl, interval(kls).half if kls else None),
        }
    return {name: x for name, x in found.items() if x is not None} | row


def beta_of(config: dict[str, Any], index: int) -> float | None:
    """beta of a round, from 1, as the config has it."""
    schedule = config.get("round_betas")
    if isinstance(schedule, list) and schedule:
        return number(schedule[min(index, len(schedule)) - 1])
    return number(config.get("beta"))


def kl_estimate(numbers: dict[str, float], beta: float | None) -> float | None:
    """KL(reference || policy) of a response in nats: "kl" of the file, or else from its rewards.

    A reward is beta * log(policy / reference), and the mean of log(reference / policy) over what
    the reference sampled is that KL; so -(chosen + rejected) / 2 beta estimates it where the
    reference sampled the pairs. It is biased as far as the pairs are a selection. Ours.
    """
    if "kl" in numbers:
        return numbers["kl"]
    sides = {"rewards/chosen", "rewards/rejected"}
    if beta is None or beta < 1e-12 or not sides <= numbers.keys():
        return None
    return -math.fsum(numbers[side] for side in sides) / (2 * beta)
