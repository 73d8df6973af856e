"""Matrix products of low-precision tensors whose results are not rounded to low precision.

CUDA has ``torch.mm(..., out_dtype=torch.float32)``.  On a CPU a bf16 product always rounds its
output, by up to 1/16 in a logit of 30, so products are made of fp32 copies, a tile at a time.
There oneDNN's linear is used where torch has it: it does not depend on MKL, which is slow on some
CPUs, and it sets no process-wide switch.  It sums the inner dimension in one chain of additions;
blocks of at most `_INNER_BLOCK` bring the error back to that of a blocked product.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..kernels.device import is_gpu

_INNER_BLOCK = 320


def _has_onednn_linear() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _keep_freed_tiles() -> None:
    """Let glibc serve tiles of up to 31 MiB from its heap, so that their pages stay mapped.

    Its limit adapts to the largest block freed so far.  A tile above the limit goes back to the
    system when it is freed, and every page of the next one faults again.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


@cache
def has_native_bf16() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32; a build without oneDNN does not."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fp32_product(a: Tensor, b: Tensor, out: Tensor | None = None, *, add: bool = False) -> Tensor:
    """``a @ b`` of fp16, bf16 or fp32 matrices, accumulated and returned in fp32.

    The result is written to ``out`` where given, or added to it.
    """
    if not is_gpu(a.device):  # where kernels are interpreted
        a, b = a.float(), b.float()
    wide: dict[str, Any] = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
    if add:
        assert out is not None
        return torch.addmm(out, a, b, **wide, out=out)
    return torch.mm(a, b, **wide, out=out)


def matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized matrix whose rows start at 128-byte boundaries, as fast products want."""
    return torch.empty(rows, padded(columns), dtype=dtype, device=device)[:, :columns]


def padded(columns: int) -> int:
    return -(-columns // 64) * 64


def tiles(total: int, most: int) -> list[slice]:
    """At most ``most`` wide, of like widths, and if it can be in whole tiles of a product."""
    count = -(-total // (most // 256 * 256 or most))
    width = -(-total // count)
    if most >= 256:
        width = -(-width // 256) * 256
    return [slice(i, min(i + width, total)) for i in range(0, total, width)]


class Products:
    """fp32-valued (fp64 for fp64 inputs) products of tensors of one ``dtype`` on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.acc_dtype = torch.promote_types(dtype, torch.float32)
        self.on_cpu = not is_gpu(device)
        self.widen = dtype != self.acc_dtype and not self.on_cpu
        self.onednn = self.on_cpu and self.acc_dtype == torch.float32 and _has_onednn_linear()
        if self.on_cpu:
            _keep_freed_tiles()

    def operand(self, x: Tensor) -> Tensor:
        """``x`` in the dtype the products take: on a CPU the result's, elsewhere the inputs'."""
        return x.to(self.acc_dtype if self.on_cpu else self.dtype)

    def inner_blocks(self, x: Tensor) -> list[Tensor]:
        """``x`` (rows, D) as operands over blocks of D."""
        if not self.onednn:
            return [self.operand(x)]
        count = -(-x.shape[1] // _INNER_BLOCK)
        return [part.to(self.acc_dtype).contiguous() for part in x.tensor_split(count, 1)]

    def project(self, h_blocks: list[Tensor], w_CD: Tensor) -> Tensor:
        """``h @ w.T`` as a fresh tensor; ``h_blocks`` are `inner_blocks` of h."""
        if not self.onednn:
            return self._mm(h_blocks[0], self.operand(w_CD).T)
        linear = torch.ops.mkldnn._linear_pointwise
        blocks = zip(h_blocks, self.inner_blocks(w_CD))
        z_NC = linear(*next(blocks), None, "none", [], "")
        for h_block, w_block in blocks:
            z_NC = linear.binary(h_block, z_NC, w_block, None, "add")
        return z_NC

    def addmm(self, acc: Tensor, a: Tensor, b: Tensor) -> None:
        """``acc += a @ b`` for operands."""
        if self.onednn:
            acc += torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
        elif self.widen:
            acc += self._mm(a, b)
        else:
            acc.addmm_(a, b)

    def rounded_mm(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """``out = a @ b`` rounded once to the inputs' dtype: the cheapest product there is."""
        native = self.on_cpu and self.dtype == torch.bfloat16 and has_native_bf16()
        if self.widen or native:
            torch.mm(a.to(self.dtype), b.to(self.dtype), out=out)
        elif self.onednn:
            a, b = self.operand(a), self.operand(b)
            out.copy_(torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], ""))
        else:
            out.copy_(self._mm(self.operand(a), self.operand(b)))

    def _mm(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, out_dtype=self.acc_dtype) if self.widen else torch.mm(a, b)
