"""MLPs in tiles: less memory for long sequences. One model instance changes, no class."""

import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdpo.errors import ModelError

# Children by which an MLP is known: a first and the last linear layer.
_MLP_PARTS = (
    ("up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("fc1", "fc2"), ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)  # fmt: skip


def tile_mlp(model: nn.Module, tile_tokens: int) -> int:
    """Run each dense MLP of the decoder layers on ``tile_tokens`` tokens at a time.

    A tile is checkpointed, so activations of the MLP's inner width exist for one tile only, and the
    backward computes it again: one more forward of the MLP, two more inside gradient checkpointing.
    This is the TiledMLP of ALST (arXiv 2506.13996).  Gradients of the weights are summed over the
    tiles in the dtype the weights are multiplied in; with few tokens a tile that costs digits of
    bf16 as well as time.  Called again, it changes the tile; mixtures of experts are left alone.

    Returns:
        How many MLPs were found.

    Raises:
        ModelError: there is none, or ``tile_tokens`` is no positive number.
    """
    if type(tile_tokens) is not int or tile_tokens < 1:
        raise ModelError(f"tile_tokens={tile_tokens!r} must be a positive integer, such as 4096")
    mlps: list[Any] = list(dense_mlps(model))
    if not mlps:
        raise ModelError(
            f"{type(model).__name__} has no dense MLP to tile (mixtures of experts are not tiled): "
            "leave tile_mlp out"
        )
    for mlp in mlps:
        if not hasattr(mlp, "_fastdpo_untiled"):
            mlp._fastdpo_untiled = mlp.forward
            # Bound, so that a deep copy of the model calls itself and not the original.
            mlp.forward = MethodType(_tiled_forward, mlp)
        mlp._fastdpo_tile_tokens = tile_tokens
    return len(mlps)


def dense_mlps(module: nn.Module, in_layer: bool = False) -> Iterator[nn.Module]:
    """MLPs inside the elements of module lists; an element itself is a layer, whatever it holds."""
    for child in module.children():
        if hasattr(child, "experts") or hasattr(child, "router"):
            continue
        if in_layer and _is_mlp(child):
            yield child
        else:
            yield from dense_mlps(child, in_layer or isinstance(module, nn.ModuleList))


def _is_mlp(module: nn.Module) -> bool:
    """Whether it has an MLP's linear layers and maps one tensor to another of that shape."""
    for names in _MLP_PARTS:
        first, last = (getattr(module, name, None) for name in names)
        if isinstance(first, nn.Module) and isinstance(last, nn.Module):
            break
    else:
        return False
    _, *inputs = inspect.signature(type(module).forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [x for x in inputs if x.kind in positional and x.default is inspect.Parameter.empty]
    same_width = getattr(first, "in_features", None) == getattr(last, "out_features", None)
    return len(needed) == 1 and same_width


def _tiled_forward(self: Any, hidden_BTD: Tensor) -> Tensor:
    rows_1ND = hidden_BTD.reshape(1, -1, hidden_BTD.shape[-1])
    tiles = rows_1ND.split(self._fastdpo_tile_tokens, dim=1)
    if torch.is_grad_enabled():
        parts = [checkpoint(self._fastdpo_untiled, tile, use_reentrant=False) for tile in tiles]
    else:
        parts = [self._fastdpo_untiled(tile) for tile in tiles]
    return torch.cat(parts, dim=1).view(hidden_BTD.shape)
