"""What is trained as files, with the optimizer's and the random state: whole, or in parts.

A whole state is written by one process in safetensors.  Of a sharded one each process writes its
part, by PyTorch's distributed checkpoints.  Both call a tensor by the same name and hold the same
tensors, so that either is read by whoever holds the model in whatever way, on as many processes as
there are.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdpo.errors import ConfigError
from fastdpo.model.adapters import check_trainable, trainable_state
from fastdpo.train.together import of_first

STATE = "state.json"  # what a folder is of, beside its tensors
_PARTS = ".metadata"  # which part of a tensor is where, as PyTorch calls it
_MODEL, _OPTIMIZER, _RNG = "model", "optimizer", "rng"


def write_whole(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> list[Path]:
    """Write everything, from this process alone; returns the files.

    Args:
        optimizer: None leaves its state and the random state out.
    """
    files = []
    for part, tensors in _state(model, optimizer).items():
        files.append(folder / f"{part}.safetensors")
        save_file({name: x.contiguous() for name, x in tensors.items()}, files[-1])
    return files


def write_parts(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, rank: int
) -> list[Path]:
    """Write this process's part of everything; all processes call it, and it fails on all.

    Returns:
        The files that this process wrote.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    class Writer(FileSystemWriter):
        def write_data(self, *args: Any) -> Any:
            try:
                return super().write_data(*args)
            except RuntimeError as error:
                # PyTorch's archive covers what the disk said with an error of its own.
                raise error.__context__ or error from None

    flat = {
        f"{part}.{k}": x for part, xs in _state(model, optimizer).items() for k, x in xs.items()
    }
    try:
        with _quiet():
            save(flat, storage_writer=Writer(folder))
    except CheckpointException as error:
        raise _first_of(error) from None
    return [*folder.glob(f"__{rank}_*"), *([folder / _PARTS] if rank == 0 else [])]


def read(
    engine: Any, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> None:
    """Put what one of them wrote into the model and the optimizer, whole or this process's part.

    All processes call it, and none is left in an exchange where one fails.

    Raises:
        ModelError: the model trains other tensors.
        ConfigError: it is of an engine that shards it in another way.
    """
    known = of_first(engine, lambda: _shapes(folder))
    own = {f"{_MODEL}.{name}": x for name, x in trainable_state(model).items()}
    saved = {name: shape for name, (shape, _) in known.items() if name.startswith(f"{_MODEL}.")}
    check_trainable(
        {name.partition(".")[2]: tuple(x.shape) for name, x in own.items()},
        {name.partition(".")[2]: shape for name, shape in saved.items()},
    )
    weights, wanted = list(own.values()), dict(own)
    slots: dict[int, dict[str, Tensor]] = {}
    if optimizer is not None:
        for name in sorted(known.keys() - saved.keys()):  # alike on all processes
            shape, dtype = known[name]
            _, index, *slot = name.split(".", 2)
            like = weights[int(index)] if slot else None
            wanted[name] = torch.zeros(shape, dtype=dtype)
            if like is not None and like.shape == shape:
                wanted[name] = torch.zeros_like(like, dtype=dtype)
            if slot:
                slots.setdefault(int(index), {})[slot[0]] = wanted[name]
    (_read_parts if (folder / _PARTS).is_file() else _read_whole)(folder, wanted)
    if optimizer is not None:
        torch.set_rng_state(wanted[f"{_OPTIMIZER}.{_RNG}"])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": slots, "param_groups": groups})


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[str, dict[str, Tensor]]:
    # A frozen base is what the run starts from, so only what is trained is kept.
    state = {_MODEL: trainable_state(model)}
    if optimizer is not None:
        slots = optimizer.state_dict()["state"].items()
        state[_OPTIMIZER] = {f"{i}.{name}": x for i, each in slots for name, x in each.items()}
        state[_OPTIMIZER][_RNG] = torch.get_rng_state()
    return state


def _shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each tensor in a folder."""
    if (folder / _PARTS).is_file():
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        found: Any = FileSystemReader(folder).read_metadata().state_dict_metadata
        return {name: (tuple(x.size), x.properties.dtype) for name, x in found.items()}
    shapes = {}
    for path in _whole(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                x = file.get_slice(name)
                shape = tuple(x.get_shape())
                none = x[:0] if shape else file.get_tensor(name)  # of a slice no type is known
                shapes[f"{path.stem}.{name}"] = shape, none.dtype
    return shapes


def _whole(folder: Path) -> list[Path]:
    found = [folder / f"{part}.safetensors" for part in (_MODEL, _OPTIMIZER)]
    found = [path for path in found if path.is_file()]
    if not found:
        state = json.loads((folder / STATE).read_text())
        raise ConfigError(
            f"{folder} was written with engine={state.get('engine')} on {state.get('world')} "
            "processes, in parts that no other engine reads; launch the command as it was, or "
            "give another output_dir to start anew"
        )
    return found


def _read_whole(folder: Path, wanted: Mapping[str, Tensor]) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    for path in _whole(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                target = wanted.get(f"{path.stem}.{name}")
                if target is None:
                    continue
                x = file.get_tensor(name)
                if isinstance(target, DTensor):  # each process takes its own part of the file
                    x = distribute_tensor(
                        x.to(target.device),
                        target.device_mesh,
                        target.placements,
                        src_data_rank=None,
                    )
                target.copy_(x)


def _read_parts(folder: Path, wanted: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with _quiet():
            load(wanted, storage_reader=FileSystemReader(folder))
    except CheckpointException as error:
        raise _first_of(error) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's warnings of a single process, which is meant, and of its own code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        warnings.filterwarnings("ignore", message="TypedStorage is")
        yield


def _first_of(error: Any) -> Exception:
    """The error of the first process that had one, which PyTorch tells all of them."""
    found = error.failures[min(error.failures)][0]
    if isinstance(found, Exception):
        return found
    raise found  # an interruption
