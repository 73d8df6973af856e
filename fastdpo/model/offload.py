"""Activations in host memory: less memory for long sequences.

What is saved inside a ``with`` block changes, or within the body of one model instance.
"""

from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastdpo.kernels.device import is_gpu
from fastdpo.model.head import base_of

_MIN_BYTES = 64 * 1024  # below, starting a copy costs more than the memory is worth


def offload_activations(enabled: bool = True) -> AbstractContextManager[Any]:
    """Keep what the forward saves for the backward in host memory; for use around the forward.

    The backward may run inside or outside.  Gradients keep their bits.  It is meant for gradient
    checkpointing, where one tensor a layer is saved: without it, a tensor that several operations
    save is moved once for each.  Parameters (also views of them and autocast's copies of trained
    ones), tensors under 64 KiB and those on the CPU stay where they are; autocast's copies of
    frozen fp32 weights are not recognized, so freeze them in bf16.  The copies are not overlapped
    with computation, and have not run on a device yet.  Pinned host buffers are rounded
    up to powers of two by PyTorch.
    """
    offload = _Offload()
    return saved_tensors_hooks(offload.pack, offload.unpack) if enabled else nullcontext()


def offload(model: Any) -> None:
    """Make a causal LM's body run within `offload_activations` from now on; its head does not."""
    body = base_of(model).base_model
    if not hasattr(body, "_fastdpo_kept_forward"):
        body._fastdpo_kept_forward = body.forward
        body.forward = MethodType(_forward_offloaded, body)


def _forward_offloaded(self: Any, *args: Any, **kwargs: Any) -> Any:
    with offload_activations():
        return self._fastdpo_kept_forward(*args, **kwargs)


class _Moved(NamedTuple):
    """A saved tensor in host memory: its elements (E,), and what they looked like."""

    host_E: Tensor
    device: torch.device
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Offload:
    """The two hooks.

    Both copies are queued on the current stream and the host waits for neither.  The stream's order
    makes that right: the copy to the host is queued behind the operation that made the tensor, and
    memory freed after it is reused behind it; the copy back is queued behind the first one, for
    autograd runs the backward of an operation on the stream of its forward, and ahead of its
    reader.  A pinned buffer is given out again only after the copies from it have ended, of which
    PyTorch's host allocator keeps account.
    """

    def on_device(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in the memory that is to be spared."""
        return is_gpu(tensor.device) and not tensor.is_meta

    def moves(self, tensor: Tensor) -> bool:
        """Whether a saved tensor goes to host memory."""
        return (
            self.on_device(tensor)
            and not is_traceable_wrapper_subclass(tensor)  # a DTensor is more than its memory
            and tensor.layout is torch.strided
            and _without_repeats(tensor).numel() * tensor.element_size() >= _MIN_BYTES
            and not _is_parameter(tensor)
        )

    def pack(self, tensor: Tensor) -> Tensor | _Moved:
        if not self.moves(tensor):
            return tensor
        values_E = _memory(tensor.detach())
        host_E = torch.empty(values_E.shape, dtype=tensor.dtype, pin_memory=is_gpu(tensor.device))
        host_E.copy_(values_E, non_blocking=True)
        return _Moved(host_E, tensor.device, tuple(tensor.shape), tensor.stride())

    def unpack(self, packed: Tensor | _Moved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        values_E = packed.host_E.to(packed.device, non_blocking=True, copy=True)
        if len(values_E) == _span(packed.shape, packed.stride):
            return values_E.as_strided(packed.shape, packed.stride)
        out = torch.empty_strided(
            packed.shape, packed.stride, dtype=values_E.dtype, device=packed.device
        )
        once = _without_repeats(out)
        once.copy_(values_E.view(once.shape))
        return out


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements of memory from the first to the last one of a tensor."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride))


def _without_repeats(tensor: Tensor) -> Tensor:
    """The tensor before it was expanded: one element of each dimension of stride 0."""
    if 0 not in tensor.stride():
        return tensor
    shape = [size if step else min(size, 1) for size, step in zip(tensor.shape, tensor.stride())]
    return tensor.as_strided(shape, tensor.stride())


def _memory(tensor: Tensor) -> Tensor:
    """Its memory as it lies there, (E,), so that one plain copy moves it.

    Where that has gaps, as a part of a wider tensor has, the elements are drawn together first.
    """
    once, span = _without_repeats(tensor), _span(tuple(tensor.shape), tensor.stride())
    return tensor.as_strided((span,), (1,)) if span <= once.numel() else once.reshape(-1)


def _is_parameter(tensor: Tensor) -> bool:
    """Whether it is a parameter, a view of one or, under autocast, its copy in low precision."""
    base = tensor if tensor._base is None else tensor._base
    if isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad):
        return True
    made_by = base.grad_fn
    if made_by is None or made_by.name() != "ToCopyBackward0":
        return False
    source = made_by.next_functions[0][0]
    return source is not None and source.name() == "torch::autograd::AccumulateGrad"
