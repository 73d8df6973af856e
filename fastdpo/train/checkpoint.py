"""Training state on disk: safetensors and JSON, complete or absent.

A folder is written under a temporary name, flushed to the disk and renamed, so a kill at any moment
leaves either the old state or the new one. It holds the SHA-256 of its files in the format of
`sha256sum`, which is compared before they are used.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastdpo.storage import (
    begin_directory,
    check_directory,
    digests,
    finish_directory,
    scratch_directory,
    sync,
    told_when_full,
)
from fastdpo.train.stored import STATE
from fastdpo.train.together import of_first, together

_STEP = "step-{:08d}"


def save_checkpoint(
    folder: Path,
    step: int,
    engine: Any,
    model: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    *,
    extra: Any = None,
) -> None:
    """Save weights, optimizer, schedule and random state after ``step`` steps; drop older ones.

    All processes call it.

    Args:
        extra: JSON that `load_checkpoint` gives back.

    Raises:
        DataError: a process cannot write what it has to; all raise it.
    """
    # The schedule's numbers; its functions are made anew.
    plan = {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"}
    state = {"step": step, "scheduler": plan, "extra": extra}
    _write(folder / _STEP.format(step), engine, model, optimizer, state)
    if engine.is_main:
        keep_newest(folder)


def _write(
    path: Path,
    engine: Any,
    model: Any,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
) -> None:
    """Write a folder, each process its files and their checksums, the first one all else."""
    if engine.name != "ddp":
        state = {**state, "engine": engine.name, "world": engine.world}
    scratch = scratch_directory(path)

    def own() -> dict[str, str]:
        with told_when_full(path):
            files = engine.write_state(scratch, model, optimizer)
            for file in files:
                sync(file)
            return digests(scratch, files)

    def whole() -> None:
        with told_when_full(path):
            (scratch / STATE).write_text(json.dumps(state))
            sums.append(digests(scratch, [scratch / STATE]))
            finish_directory(path, {name: x for each in sums for name, x in each.items()})

    of_first(engine, lambda: begin_directory(path))
    sums = together(engine.accelerator, own)
    of_first(engine, whole)


def keep_newest(folder: Path) -> None:
    """Remove all steps of a folder but the last, and what a kill left of others."""
    for old in (*sorted(folder.glob("step-*"))[:-1], *folder.glob(".step-*")):
        shutil.rmtree(old)


def remove_checkpoint(folder: Path) -> None:
    """Remove a folder of checkpoints; a kill in the middle leaves none that looks whole."""
    scratch = folder.with_name(f".{folder.name}.partial")
    if folder.exists():
        shutil.rmtree(scratch, ignore_errors=True)
        folder.rename(scratch)
    shutil.rmtree(scratch, ignore_errors=True)


def save_best(folder: Path, step: int, engine: Any, model: Any, value: float) -> None:
    """Save the weights after ``step`` steps, and the metric by which they are the best so far.

    All processes call it.  Earlier ones stay until `forget_best` and `keep_newest`: a run that goes
    on from before this step needs that of its checkpoint.

    Raises:
        DataError: as `save_checkpoint`.
    """
    _write(folder / _STEP.format(step), engine, model, None, {"step": step, "value": value})


def forget_best(folder: Path, done: int) -> None:
    """Remove what was the best after more than ``done`` steps: they are done again, or there is a
    better one."""
    for path in folder.glob("step-*"):
        if path.name > _STEP.format(done):
            shutil.rmtree(path)


def best_so_far(folder: Path) -> tuple[int, float] | None:
    """The step of `save_best` and its metric, None where nothing was saved."""
    found = sorted(folder.glob("step-*"))
    if not found:
        return None
    state = json.loads((found[-1] / "state.json").read_text())
    return state["step"], state["value"]


def load_best(folder: Path, engine: Any, model: Any) -> tuple[int, float]:
    """Put the weights of `save_best` into the model; all processes call it.

    Returns:
        As `best_so_far`.

    Raises:
        DataError: they are damaged.
    """
    path = of_first(engine, lambda: max(folder.glob("step-*")))
    state = _read(path, engine, model, None)
    return state["step"], state["value"]


def load_checkpoint(
    folder: Path, engine: Any, model: Any, optimizer: torch.optim.Optimizer, scheduler: Any
) -> tuple[int, Any]:
    """Restore the newest checkpoint in place; all processes call it.

    Returns:
        The number of steps done, 0 without a checkpoint, and its ``extra``.

    Raises:
        DataError: it is damaged.
        ConfigError: it was written by an engine or for processes that this one cannot take over.
    """
    path = of_first(engine, lambda: max(folder.glob("step-*"), default=None))
    if path is None:
        return 0, None
    state = _read(path, engine, model, optimizer)
    scheduler.load_state_dict({**scheduler.state_dict(), **state["scheduler"]})
    # Not those of the checkpoint: where epochs were added, the schedule is another from here on.
    factors = [of_step(scheduler.last_epoch) for of_step in scheduler.lr_lambdas]
    rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors)]
    scheduler._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    return state["step"], state["extra"]


def _read(
    path: Path, engine: Any, model: Any, optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    """Put what a folder has into model and optimizer; each process checks its share of the files.

    Returns:
        What `_write` was given.
    """
    together(engine.accelerator, lambda: check_directory(path, engine.rank, engine.world))
    together(engine.accelerator, lambda: engine.read_state(path, model, optimizer))
    return json.loads((path / STATE).read_text())
