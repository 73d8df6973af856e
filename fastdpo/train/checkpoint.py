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
    model: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    *,
    extra: Any = None,
) -> None:
    """Save weights, optimizer, schedule and random state after ``step`` steps; drop older ones.

    Args:
        extra: JSON that `load_checkpoint` gives back.
    """
    target = folder / _STEP.format(step)
    with atomic_directory(target) as scratch:
        # A frozen base is what the run starts from, so only what is trained is kept.
        weights = {name: x.contiguous() for name, x in trainable_state(model).items()}
        save_file(weights, scratch / "model.safetensors")
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
    for old in folder.glob("step-*"):
        if old != target:
            shutil.rmtree(old)


def load_checkpoint(
    folder: Path, model: Any, optimizer: torch.optim.Optimizer, scheduler: Any
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
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr()):
        group["lr"] = rate
    return state["step"], state["extra"]
