"""Which devices and dtypes the Triton kernels serve, and why not the others; sizes of launches."""

import importlib.util

import torch

from .device import capability_of, is_simulated

_MINIMUM_TRITON = (3, 6)
_MINIMUM_CAPABILITY = (8, 0)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What is said of the pairs of a call beside their loss, in this order.
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "lengths/chosen",
    "lengths/rejected",
    "length_margin",
)


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1), as the tests do."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def unsupported_reason(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why no kernel of this package can run on ``device`` with ``dtype``; None where one can."""
    capability = capability_of(device)  # ROCm's devices have one too
    if capability is None and not (device.type == "cpu" and is_interpreted()):
        return f"Triton kernels run on CUDA and ROCm devices, not on {device.type!r}"
    if not is_simulated():
        if importlib.util.find_spec("triton") is None:
            return "the triton package is not installed"
        import triton

        version = tuple(map(int, triton.__version__.split(".")[:2]))
        if version < _MINIMUM_TRITON:
            wanted = ".".join(map(str, _MINIMUM_TRITON))
            return f"triton {'.'.join(map(str, version))} is installed, {wanted} or newer is needed"
    if dtype not in DTYPES:
        return f"the kernels take {', '.join(str(x)[6:] for x in DTYPES)}, not {str(dtype)[6:]}"
    if capability is not None and torch.version.hip is None and capability < _MINIMUM_CAPABILITY:
        have = ".".join(map(str, capability))
        return f"the GPU has compute capability {have}, 8.0 (Ampere) or newer is needed"
    return None


# Triton's own functions of these names take the host longer than the rest of a launch's arguments.
def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least one that is no smaller."""
    return 1 << (n - 1).bit_length()
