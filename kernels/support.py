"""Whether Triton kernels can serve a device, and if not, why."""

import importlib.util

import torch

# Devices that Triton compiles for; ROCm presents itself as "cuda".
_DEVICE_TYPES = ("cuda",)


def unsupported_reason(device: torch.device) -> str | None:
    """Why no kernel of this package can run on ``device``; None where one can."""
    if device.type not in _DEVICE_TYPES:
        return f"Triton kernels run on CUDA and ROCm devices, not on {device.type!r}"
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    return "this version has no Triton kernels yet"
