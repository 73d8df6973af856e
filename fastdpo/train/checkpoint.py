"""Training state on disk: safetensors and JSON, complete or absent.

A folder is written under a temporary name, flushed to the disk and renamed, so a kill at any moment
leaves either the old state or the new one. It holds the SHA-256 of its files in the format of
`sha256sum`, which is compared before they are used.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastdpo.model.adapters import load_trainable_state, trainable_state
from fastdpo.storage import atomic_directory, check_directory

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
    """
    if not engine.is_main:
        return
    with atomic_directory(folder / _STEP.format(step)) as scratch:
        _save_weights(model, scratch)
        tensors = {
            f"{index}.{name}": value.contiguous()
            for index, slots in optimizer.state_dict()["state"].items()
            for name, value in slots.items()
        }
        tensors["rng"] = torch.get_rng_state()
        save_file(tensors, scratch / "optimizer.safetensors")
        # The schedule's numbers; its functions are made anew.
        plan = {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"}
        state = {"step": step, "scheduler": plan, "extra": extra}
        (scratch / "state.json").write_text(json.dumps(state))
    keep_newest(folder)


def _save_weights(model: Any, folder: Path) -> None:
    # A frozen base is what the run starts from, so only what is trained is kept.
    weights = {name: x.contiguous() for name, x in trainable_state(model).items()}
    save_file(weights, folder / "model.safetensors")


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


def save_best(folder: Path, step: int, model: Any, value: float) -> None:
    """Save the weights after ``step`` steps, and the metric by which they are the best so far.

    Earlier ones stay until `forget_best` and `keep_newest`: a run that goes on from before this
    step needs that of its checkpoint.
    """
    with atomic_directory(folder / _STEP.format(step)) as scratch:
        _save_weights(model, scratch)
        (scratch / "state.json").write_text(json.dumps({"step": step, "value": value}))


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


def load_best(folder: Path, model: Any) -> None:
    """Put the weights of `save_best` into the model.

    Raises:
        DataError: they are damaged.
    """
    path = max(folder.glob("step-*"))
    check_directory(path)
    load_trainable_state(model, load_file(path / "model.safetensors"))


def load_checkpoint(
    folder: Path, engine: Any, model: Any, optimizer: torch.optim.Optimizer, scheduler: Any
) -> tuple[int, Any]:
    """Restore the newest checkpoint in place.

    Returns:
        The number of steps done, 0 without a checkpoint, and its ``extra``.

    Raises:
        DataError: it is damaged.
    """
    found = sorted(folder.glob("step-*"))
    if not found:
        return 0, None
    check_directory(found[-1])
    load_trainable_state(model, load_file(found[-1] / "model.safetensors"))
    tensors = load_file(found[-1] / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("rng"))
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        slots.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    state = json.loads((found[-1] / "state.json").read_text())
    scheduler.load_state_dict({**scheduler.state_dict(), **state["scheduler"]})
    # Not those of the checkpoint: where epochs were added, the schedule is another from here on.
    factors = [of_step(scheduler.last_epoch) for of_step in scheduler.lr_lambdas]
    rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors)]
    scheduler._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    return state["step"], state["extra"]
