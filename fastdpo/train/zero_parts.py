"""What ZeRO shards of a training, as files: each process writes the parts that it holds.

DeepSpeed lays parameters one after the other and splits the row (stage 2), or splits each of them
(stage 3).  Either way a process has ranges of elements of some parameters, and that is what a file
has, in safetensors: so any number of processes, of either stage, reads what others wrote.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdpo.errors import ConfigError
from fastdpo.model.adapters import check_trainable

_FILE = "zero-{:05d}.safetensors"
_WEIGHTS, _STEP, _RNG, _SHAPES = "weights", "step", "rng", "shapes"


class _Part(NamedTuple):
    """Elements from ``start`` on of a parameter, which lie in ``flat`` from ``offset`` on."""

    name: str
    parameter: Any
    start: int
    count: int
    flat: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same elements of the flat master weights, or of what the optimizer has beside."""
        return tensor.narrow(0, self.offset, self.count)


def write_parts(
    folder: Path, model: nn.Module, zero: Any, optimizer: torch.optim.Optimizer | None, rank: int
) -> list[Path]:
    """Write this process's parts; returns the file.

    Args:
        zero: DeepSpeed's optimizer, which shards them.
        optimizer: the one inside it; None leaves its state and the random state out.
    """
    tensors: dict[str, Tensor] = {}
    for part in _parts(model, zero):
        slots = {_WEIGHTS: part.flat}
        if optimizer is not None:
            slots |= _slots(optimizer, part.flat)
        for slot, tensor in slots.items():
            tensors[f"{slot}/{part.start}/{part.name}"] = part.of(tensor.detach())
    if rank == 0 and optimizer is not None:
        tensors[_RNG] = torch.get_rng_state()
        states = [x[_STEP] for x in optimizer.state.values() if _STEP in x]
        tensors |= {_STEP: states[0]} if states else {}
    path = folder / _FILE.format(rank)
    save_file(
        {name: x.contiguous().cpu() for name, x in tensors.items()},
        path,
        metadata={_SHAPES: json.dumps(_shapes(model))},
    )
    return [path]


def read_parts(
    folder: Path, model: nn.Module, zero: Any, optimizer: torch.optim.Optimizer | None
) -> None:
    """Put this process's parts of what `write_parts` wrote into master weights and optimizer.

    Raises:
        ConfigError: another engine wrote the folder.
        ModelError: the model trains other tensors.
    """
    paths = sorted(folder.glob("zero-*.safetensors"))
    if not paths:
        raise ConfigError(
            f"{folder} was not written with engine=deepspeed, whose shards are laid out otherwise; "
            "launch the command as it was, or give another output_dir to start anew"
        )
    found: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
    files = [safe_open(path, "pt") for path in paths]
    saved = json.loads(files[0].metadata()[_SHAPES])
    check_trainable(_shapes(model), {name: tuple(shape) for name, shape in saved.items()})
    single: dict[str, Tensor] = {}
    for file in files:
        for key in file.keys():  # noqa: SIM118
            if key in (_STEP, _RNG):
                single[key] = file.get_tensor(key)
                continue
            slot, start, name = key.split("/", 2)
            found.setdefault((slot, name), []).append((int(start), file, key))
    state: dict[Tensor, dict[str, Tensor]] = {flat: {} for flat in _flats(zero)}
    if optimizer is not None:
        torch.set_rng_state(single[_RNG])
        for flat in state if _STEP in single else ():
            slots = {slot for slot, _ in found} - {_WEIGHTS}
            state[flat] = {slot: torch.zeros_like(flat, requires_grad=False) for slot in slots}
            state[flat][_STEP] = single[_STEP].to(flat.device, copy=True)
            optimizer.state[flat] = state[flat]
    for part in _parts(model, zero):
        for slot, tensor in {_WEIGHTS: part.flat.detach(), **state[part.flat]}.items():
            if slot != _STEP:
                _fill(part.of(tensor), part.start, found[slot, part.name])
        if hasattr(part.parameter, "ds_tensor"):  # what forwards gather, the same memory or not
            own = part.of(part.flat.detach())
            part.parameter.ds_tensor.data.narrow(0, 0, part.count).copy_(own)


def _fill(target: Tensor, start: int, pieces: list[tuple[int, Any, str]]) -> None:
    """Elements from ``start`` on, of files that have ranges of them."""
    stop = start + len(target)
    for first, file, key in pieces:
        piece = file.get_slice(key)
        low, high = max(start, first), min(stop, first + piece.get_shape()[0])
        if low < high:
            target[low - start : high - start].copy_(piece[low - first : high - first])


def _parts(model: nn.Module, zero: Any) -> Iterator[_Part]:
    """What this process holds of the parameters that are trained."""
    p: Any
    for name, p in _trained(model):
        if hasattr(p, "ds_id"):  # stage 3: an even part, the last one filled up
            group, offset, count = zero.grad_position[zero.get_param_id(p)]
            start = torch.distributed.get_rank() * count
            count = min(count, p.ds_numel - start)
            if count > 0:
                yield _Part(name, p, start, count, zero.fp32_partitioned_groups_flat[group], offset)
        elif p._hp_mapping is not None:
            here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
            flat = zero.single_partition_of_fp32_groups[p._hp_mapping.param_group_index]
            yield _Part(name, p, here.start, here.numel, flat, there.start)


def _flats(zero: Any) -> list[Tensor]:
    """The optimizer's parameters, flat master weights of this process."""
    names = "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"
    return next(getattr(zero, name) for name in names if hasattr(zero, name))


def _slots(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    return {name: x for name, x in optimizer.state[flat].items() if x.shape == flat.shape}


def _trained(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in _trained(model)}
