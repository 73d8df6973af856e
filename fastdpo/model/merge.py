"""Adapters merged into a base of which no process holds the whole, and the policy saved."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.model.adapters import check_adapted, with_adapters
from fastdpo.model.load import load_in_pieces
from fastdpo.model.pieces import gathered
from fastdpo.model.save import Making, save_made


def save_merged(
    base_name: str, adapter_folder: Path, tokenizer: Any, path: Path, dtype: torch.dtype
) -> None:
    """`merged`, and saved as a policy, without the whole of it in memory: a weight is read, merged
    and written when it is its turn.

    Raises:
        ModelError: as `merged`.
    """
    base, pieces = load_in_pieces(base_name, dtype=dtype)
    model = with_adapters(base, base_name, adapter_folder)
    base, values = _merging(model, lambda module, name: partial(pieces.value, module, name), dtype)
    save_made(base, values, tokenizer, path, start=base_name)


def save_merged_in_place(
    model: Any, tokenizer: Any, path: Path, dtype: torch.dtype, *, start: str | None = None
) -> None:
    """`merged_in_place` of a model that is sharded, saved as a policy by the first process.

    All processes call it; ``model`` is of no use afterwards.

    Raises:
        ModelError: the model has no adapters.
    """
    check_adapted(model)

    def value(module: nn.Module, name: str) -> Callable[[], Tensor]:
        parameter = module.get_parameter(name)
        return lambda: gathered(parameter).to("cpu", dtype)

    base, values = _merging(model, value, dtype)
    save_made(base, values, tokenizer, path, start=start, collective=True)


def _merging(
    model: Any, value: Callable[[nn.Module, str], Callable[[], Tensor]], dtype: torch.dtype
) -> tuple[Any, Making]:
    """The base with parameters on the meta device, and what makes each of them, merged.

    Args:
        value: of a module and the name of its parameter what makes that of the base, on the CPU.
    """
    layers = {
        (layer.get_base_layer(), getattr(layer, "parameter_name", "weight")): layer
        for layer in model.modules()
        if "lora_A" in layer._modules
    }
    base, values = model.unload(), {}
    hollow: dict[nn.Parameter, nn.Parameter] = {}  # one that is tied stays one
    for prefix, module in base.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            layer = layers.get((module, name))
            make = value(module, name)
            values[f"{prefix}.{name}"] = partial(_merge_one, module, name, layer, make)
            if parameter not in hollow:
                empty = torch.empty(parameter.shape, dtype=dtype, device="meta")
                hollow[parameter] = nn.Parameter(empty, requires_grad=False)
            module._parameters[name] = hollow[parameter]
    return base, values


@torch.no_grad()
def _merge_one(module: nn.Module, name: str, layer: Any, make: Callable[[], Tensor]) -> Tensor:
    """A parameter with its adapter added by peft, which finds the content of both in its layer."""
    weight = make()
    if layer is None:
        return weight
    parts = [x for key, part in layer._modules.items() if "lora_" in key for x in part.modules()]
    filled = {(module, name): weight}
    for part in parts:
        for key, parameter in part._parameters.items():
            if parameter is not None:
                filled[part, key] = gathered(parameter).cpu()
    before = {(part, key): part._parameters[key] for part, key in filled}
    try:
        for (part, key), tensor in filled.items():
            part._parameters[key] = nn.Parameter(tensor, requires_grad=False)
        layer.merge()
        return module.get_parameter(name).data
    finally:
        layer.merged_adapters.clear()
        for (part, key), parameter in before.items():
            part._parameters[key] = parameter
