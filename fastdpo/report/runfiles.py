"""What the files of a run say, as far as they can be read: of rounds, or of a training alone."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

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
KEPT = {"pairs": "Pairs", "lists": "Lists", "singles": "Responses"}  # what is trained on, by shape
_ROUND = re.compile(r"round-(\d{2,6})")
_NO_STATE: dict[str, Any] = {"config": {}, "done": [], "begun": None, "ended": {}}
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
    evaluations: list[tuple[int, Numbers]]  # the same, after so many of these steps
    held: list[Scored]  # eval
    speed: dict[str, dict[str, Any]]  # throughput.json of "rollouts" and "evaluation"
    alone: bool = False

    @property
    def name(self) -> str:
        return "Training" if self.alone else f"Round {self.index}" if self.index else "Start"


@dataclass(frozen=True)
class Run:
    """What the files of a run say.

    `config` has the options by their names with the section, as on the command line.
    `ended` says when stages did, and `begun` which one is not done and when it began, where the run
    noted it; times are UTC, in the format of ISO 8601.
    `offline` is offline/summary.json, of the pairs to replay: what `pairing` and `dropped` are of a
    round; None where there are none.
    `gone` has, for each of `PARTS`, a line for each file that is missing or damaged; paths in it
    are relative to the run.
    `alone`: a training by itself, its only round; `kept` is the step that its policy is from where
    the best one was kept, and `has_policy` says that it is done, with all epochs asked for.
    """

    config: dict[str, Any]
    done: list[str]
    rounds: list[Round]
    offline: tuple[Numbers, dict[str, int]] | None
    gone: dict[str, list[str]]
    ended: dict[str, str] = field(default_factory=dict)
    begun: tuple[str, str] | None = None
    alone: bool = False
    kept: int | None = None
    has_policy: bool = False

    def option(self, name: str) -> Any:
        """An option of the run, None where it has none; older runs had no sections."""
        return self.config.get(name, self.config.get(name.rpartition(".")[2]))


def round_folders(out: Path) -> dict[int, Path]:
    """The rounds of a run by number, in order."""
    if not out.is_dir():
        return {}
    named = {p: _ROUND.fullmatch(p.name) for p in out.iterdir() if p.is_dir()}
    return dict(sorted((int(match[1]), path) for path, match in named.items() if match))


def is_training(out: Path) -> bool:
    """Whether a folder is that of `fastdpo train`, and not of a run with rounds."""
    return (
        (out / "run.json").is_file()
        and not (out / "state.json").is_file()
        and not round_folders(out)
    )


def read_run(out: Path) -> Run:
    """All of a run that the report shows; raises nothing for what is missing or damaged."""
    files = _Files(out)
    if is_training(out):
        return _training(files)
    state = files.read("config", out / "state.json", _state) or _NO_STATE
    rounds = [
        _round(files, index, path, _unfinished(state, path.name))
        for index, path in round_folders(out).items()
    ]
    offline = None
    if (out / "offline").is_dir():
        offline = files.read("pairing", out / "offline" / "summary.json", _pairing)
    return Run(rounds=rounds, offline=offline, gone=files.gone, **state)


def _unfinished(state: dict[str, Any], name: str) -> bool:
    """Whether a round is one that the run is at, so that files of it are still to come."""
    return state["begun"] is not None and state["begun"][0].startswith(f"{name}/")


def _training(files: "_Files") -> Run:
    """A training by itself, as a run whose only round is the folder."""
    out = files.out

    def read(part: str, name: str, reader: Callable[[Path], T], otherwise: T) -> T:
        """What a file says that needn't be there."""
        found = files.read(part, out / name, reader) if (out / name).exists() else None
        return otherwise if found is None else found

    # What decides a training stands in run.json first.
    config = files.read("config", out / "run.json", _object) or {}
    config = read("config", "config.yaml", _options, {}) | config
    for digest in ("pairs", "eval_pairs"):
        config.pop(digest, None)
    epochs = number(config.get("num_train_epochs"))
    # It has a policy of fewer epochs while it goes on to more.
    is_whole = config.pop("policy_epochs", epochs) == epochs and (out / "policy").is_dir()
    last, saved = number(config.pop("policy_steps", None)), config.pop("policy_ended", None)
    whole = files.read("steps", out / "metrics" / "metrics.jsonl", _steps) or []
    if is_whole and last is not None:  # more epochs may have been begun
        whole = [row for row in whole if row.get("step", 0) <= last]
    steps, evaluations = _apart(whole)
    end = read("steps", "train.json", _object, {}) if is_whole else {}
    if is_whole and saved not in (None, end.get("ended")):  # killed before it was written
        end = {"ended": saved}
    best = read("steps", "best.json", _numbers, {}) if is_whole else {}
    numbers = _means(steps) | read("steps", "fitted.json", _numbers, {}) | _finite(end)
    pairing: Numbers = {}
    dropped: dict[str, int] = {}
    for name in ("pairs.summary.json", "data.json"):
        found, reasons = read("pairing", name, _pairing, ({}, {}))
        pairing, dropped = pairing | found, dropped | reasons
    if not pairing and steps:  # of before the data was noted
        known = {f"mean_length_{x}": numbers.get(f"lengths/{x}") for x in ("chosen", "rejected")}
        taken = sum(step.get("pairs", 0.0) for step in steps) / (epochs or 1)
        known["pairs"] = taken + numbers.get("pairs_dropped", 0.0) if is_whole else None
        pairing = _finite(known)
    one = Round(1, numbers, pairing, dropped, steps, evaluations, [], {}, alone=True)
    ended, kept = end.get("ended"), best.get("best_global_step")
    return Run(
        config, [], [one], None, files.gone,
        ended={"train": ended} if isinstance(ended, str) else {},
        alone=True,
        kept=None if kept is None else int(kept),
        has_policy=is_whole,
    )  # fmt: skip


def _means(steps: list[Numbers]) -> Numbers:
    """What all steps logged, averaged over their pairs."""
    steps = [step for step in steps if step.get("pairs", 0.0) > 0]
    total = sum(step["pairs"] for step in steps)
    if not steps:
        return {}
    names = set.intersection(*(set(step) for step in steps)) - {"step", "pairs"}
    return {n: sum(step[n] * step["pairs"] for step in steps) / total for n in sorted(names)}


def _apart(rows: list[Numbers]) -> tuple[list[Numbers], list[tuple[int, Numbers]]]:
    """Steps of training, and evaluations after so many of them."""
    steps = [row for row in rows if not any(name.startswith("eval_") for name in row)]
    evaluations = [
        (int(row.get("step", 0)), row)
        for row in rows
        if any(name.startswith("eval_") for name in row)
    ]
    return steps, evaluations


class _Files:
    """Reads files of a run and notes what can't be read."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.gone: dict[str, list[str]] = {part: [] for part in PARTS}
        self.coming = False  # what is not there is still to come

    def read(self, part: str, path: Path, reader: Callable[[Path], T]) -> T | None:
        name = path.relative_to(self.out).as_posix()
        try:
            if path.exists():
                return reader(path)
            if self.coming:
                return None
            why = f"{name} is not there"
        # What was damaged can be of any type where another was meant; a DataError is a ValueError.
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            # A message of ours begins with the path, which says where this machine keeps the run.
            text = str(error) or type(error).__name__
            why = text.replace(f"{self.out}/", "").split("\n")[0]
            why = why if why.startswith(name) else f"{name}: {why}"
        self.gone[part].append(why)
        return None


def _round(files: _Files, index: int, folder: Path, coming: bool) -> Round:
    files.coming = coming
    numbers = files.read("numbers", folder / "summary.json", _numbers) or {}
    pairing: tuple[Numbers, dict[str, int]] = ({}, {})
    steps: list[Numbers] = []
    evaluations: list[tuple[int, Numbers]] = []
    speed = {}
    if index:  # the start is not trained
        pairing = files.read("pairing", folder / "pairs.summary.json", _pairing) or pairing
        # A curriculum has metrics for each of its stages.
        stages = sorted(folder.glob("stage-*"), key=lambda path: (len(path.name), path.name))
        for path in stages or [folder]:
            whole = files.read("steps", path / "metrics" / "metrics.jsonl", _steps) or []
            found, after = _apart(whole)
            evaluations += [(len(steps) + step, row) for step, row in after]
            steps += found
        if not numbers and (folder / "train.json").exists():
            numbers = files.read("numbers", folder / "train.json", _numbers) or {}
        speed["rollouts"] = files.read("speed", folder / "candidates/throughput.json", _object)
    speed["evaluation"] = files.read("speed", folder / "eval/candidates/throughput.json", _object)
    held = [] if coming else files.read("held", folder / "eval", heldout) or []
    files.coming = False
    speed = {what: facts for what, facts in speed.items() if facts}
    return Round(index, numbers, *pairing, steps, evaluations, held, speed)


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
    begun, ended = state.get("begun"), state.get("ended")
    return {
        "config": flat(state["config"]),
        "done": [x for x in state["done"] if isinstance(x, str)],
        "begun": tuple(begun)
        if isinstance(begun, list) and len(begun) == 2 and _texts(begun)
        else None,
        "ended": ended if isinstance(ended, dict) and _texts([*ended.values()]) else {},
    }


def _texts(values: list[Any]) -> bool:
    return all(isinstance(x, str) for x in values)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Options by their names with the section, of a run's options by section."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        section = value if isinstance(value, dict) else {}
        found |= {f"{name}.{key}": x for key, x in section.items()} or {name: value}
    return found


def resolved(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a run's options; one that depends on other options is a function of them."""
    return {name: x(config) if callable(x) else x for name, x in defaults.items()}


def _options(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(read_text(path, path))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: no options. Restore it.")
    return {str(name): value for name, value in values.items()}


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
    has no interval: it changes from step to step. "pairs", "lists" and "singles" are those that
    training took.
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
            **{kept: Estimate(one.pairing[kept]) for kept in KEPT if kept in one.pairing},
        }
    whole = {name: x for name, x in found.items() if x is not None} | row
    for kept in KEPT:
        if kept in whole and "pairs_dropped" in one.numbers:
            whole[kept] = Estimate(whole[kept].value - one.numbers["pairs_dropped"])
    return whole
