"""Training state on disk: safetensors and JSON, complete or absent.

A folder is written under a temporary name, flushed to the disk and renamed, so a kill at any moment
leaves either the old state or the new one. It holds the SHA-256 of its files in the format of
`sha256sum`, which is compared before they are used.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastdpo.errors import DataError
from fastdpo.storage import file_digest, told_when_full

_STEP = "step-{:08d}"
_SUMS = "SHA256SUMS"


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``path`` if the block ends without an exception."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with told_when_full(path):
        yield scratch
    files = sorted(file for file in scratch.rglob("*") if file.is_file())
    sums = [f"{file_digest(file)}  {file.relative_to(scratch).as_posix()}\n" for file in files]
    (scratch / _SUMS).write_text("".join(sums))
    for file in scratch.rglob("*"):
        sync(file)
    sync(scratch)
    if path.exists():
        shutil.rmtree(path)
    scratch.rename(path)
    sync(path.parent)


def check_directory(path: Path) -> None:
    """Compare the files of a folder with their checksums; a folder without any is left alone.

    Raises:
        DataError: a file is missing or differs.
    """
    path = Path(path)
    if not (path / _SUMS).is_file():
        return
    for line in (path / _SUMS).read_text().splitlines():
        wanted, _, name = line.partition("  ")
        file = path / name
        if not file.is_file() or file_digest(file) != wanted:
            what = "differs from what was written" if file.is_file() else "is missing"
            raise DataError(
                f"{file} {what}: the folder is damaged. Delete {path}, and the same command makes "
                "it again."
            )


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    if os.name != "posix" and path.is_dir():  # directories can't be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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

    ``extra`` is JSON that is to be had again.
    """
    from safetensors.torch import save_file

    from fastdpo.model.adapters import trainable_state

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
        state = {"step": step, "scheduler": _plain(scheduler.state_dict()), "extra": extra}
        (scratch / "state.json").write_text(json.dumps(state))
    for old in folder.glob("step-*"):
        if old != target:
            shutil.rmtree(old)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """The schedule's numbers; its functions are made anew."""
    return {k: v for k, v in state.items() if k != "lr_lambdas"}


def load_checkpoint(
    folder: Path, model: Any, optimizer: torch.optim.Optimizer, scheduler: Any
) -> tuple[int, Any]:
    """Restore the newest checkpoint in place; the number of steps done, 0 without one, and extra.

    Raises:
        DataError: it is damaged.
    """
    from safetensors.torch import load_file

    from fastdpo.model.adapters import load_trainable_state

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
    return state["step"], state.get("extra")
