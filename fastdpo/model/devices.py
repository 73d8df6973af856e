"""Models that lie on several devices of one machine, by accelerate's dispatch (``device_map``).

Hooks of accelerate move a module's inputs to its device, and bring offloaded weights there before
it runs.  They replace ``forward``; what this room patches goes inside of them (`forward_of`).
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastdpo.errors import ModelError

# How transformers may spread a model: "auto" and "balanced" evenly over the GPUs, the third leaves
# room on the first one, the last fills one after the other.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_log = logging.getLogger(__name__)


def is_device_map(text: str) -> bool:
    """Whether it is a way to spread a model, or a device."""
    if text in DEVICE_MAPS:
        return True
    try:
        return torch.device(text).type != "meta"
    except RuntimeError:
        return False


@contextmanager
def dispatching(device_map: str | dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Options of ``from_pretrained`` for a model that one process has to itself.

    Under ``accelerate launch`` with FSDP, transformers would leave the hooks out.
    """
    if device_map is None:
        yield {}
        return
    with without("ACCELERATE_USE_FSDP"):
        yield {"device_map": device_map}


@contextmanager
def without(name: str) -> Iterator[None]:
    """Within it, an environment variable of accelerate is not set."""
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def placed(model: Any, device: torch.device | str | None, named: str) -> Any:
    """The model on a device, by default the GPU if there is one; one that `dispatching` placed
    stays where it is.

    Args:
        named: the model, as "scorer=NAME", for messages.

    Raises:
        ModelError: the device has no room for it.
    """
    if hasattr(model, "hf_device_map"):
        if away := offloaded(model):
            _log.warning(
                "%s does not fit the GPUs: %d of its tensors stay in CPU memory or on the disk and "
                "are copied for each batch, which is slow; give dtype=bfloat16, or more GPUs",
                named, away,
            )  # fmt: skip
        return model
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{named} in {str(model.dtype).removeprefix('torch.')} does not fit {device}; give "
            "device_map=auto, which spreads it over all GPUs, or dtype=bfloat16"
        ) from error


def offloaded(model: nn.Module) -> int:
    """How many parameters accelerate brings to their device only while they are used."""
    return sum(x.is_meta for x in model.parameters()) if hasattr(model, "hf_device_map") else 0


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go: where its weights are, or, if they are on several devices, where
    the first hook wants them, or, if they are sharded, where they are gathered."""
    hook = vars(model).get("_hf_hook")
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    parameter: Any = next(model.parameters())
    mesh = getattr(parameter, "device_mesh", None)  # of a DTensor, which may be offloaded
    return parameter.device if mesh is None else torch.device(mesh.device_type)


def keep_buffers(model: nn.Module) -> None:
    """Let DDP leave each process its own buffers, as each has loaded them.

    It would send the first one's in the order in which they were made, and in some versions of
    transformers that of RoPE's comes from a set: each process has another.
    """
    names = [name for name, _ in model.named_buffers()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def forward_of(module: nn.Module) -> str:
    """The attribute with a module's own ``forward``, inside of accelerate's hook if it has one."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"
