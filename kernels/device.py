"""What a device is: a GPU, a CPU, or a CPU whose tensors stand for those of a GPU.

The last is for estimates of memory: the host's code then runs as for the GPU, on tensors that have
sizes but no content, and no kernel is launched on them.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

# The compute capability of the GPU that CPU tensors stand for, within `simulated`.
_stands_for: tuple[int, int] | None = None


def is_gpu(device: torch.device) -> bool:
    """Whether it is no CPU, or one whose tensors stand for a GPU's."""
    return device.type != "cpu" or _stands_for is not None


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA or ROCm device, or of the one stood for; else None."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _stands_for


def is_simulated() -> bool:
    """Whether CPU tensors stand for a GPU's."""
    return _stands_for is not None


@contextmanager
def simulated(capability: tuple[int, int]) -> Iterator[None]:
    """Let CPU tensors stand for those of a GPU; Triton need not be installed."""
    global _stands_for
    before, _stands_for = _stands_for, capability
    try:
        with _without_launches():
            yield
    finally:
        _stands_for = before


@contextmanager
def _without_launches() -> Iterator[None]:
    """Within it, ``kernel[grid](...)`` does nothing."""
    if importlib.util.find_spec("triton") is None:
        _import_without_triton()
        yield
        return
    from triton.runtime.jit import KernelInterface

    launch = KernelInterface.__getitem__
    KernelInterface.__getitem__ = lambda self, grid: lambda *_, **__: None
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launch


class _Nothing(ModuleType):
    """Stands for all of Triton: whatever it is asked for is itself, and calls do nothing."""

    def __getattr__(self, name: str) -> "_Nothing":
        return self

    def __call__(self, *_: object, **__: object) -> "_Nothing":
        return self

    def __getitem__(self, _: object) -> "_Nothing":
        return self


def _import_without_triton() -> None:
    """Import the modules of kernels where none can run; `support` refuses real calls of them."""
    names = ("triton", "triton.language", "triton.tools", "triton.tools.tensor_descriptor")
    sys.modules.update({name: _Nothing(name) for name in names})
    try:
        for module in ("fold", "kl", "pair", "project", "scatter"):
            importlib.import_module(f".{module}", __package__)
    finally:
        for name in names:
            del sys.modules[name]
