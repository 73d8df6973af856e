"""The corrected interpreter computes what a GPU would, and refuses what it cannot."""

from typing import Any

import interpreter
import numpy as np
import pytest
import torch
from torch import Tensor

if not interpreter.supported() or torch.cuda.is_available():
    pytest.skip("needs Triton 3.6 or newer, and no GPU", allow_module_level=True)
interpreter.enable()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

HALVES = [torch.bfloat16, torch.float16]


@triton.jit
def dot_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    k = tl.arange(0, K)
    left = tl.load(a + m * K + k[None, :])
    right = tl.load(b + n * K + k[:, None])
    acc = tl.dot(left, right, tl.zeros((M, N), tl.float32), input_precision="ieee")
    tl.store(out + m * N + n, acc)


@triton.jit
def copy_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def fp32_copy_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out + i, value, mask=i < n)


@triton.jit
def arithmetic_kernel(x, out, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    if OP == "add":
        value = value + value
    elif OP == "negate":
        value = -value
    elif OP == "compare":
        value = tl.where(value > tl.load(x), value, value)
    elif OP == "sum":
        value = value + tl.sum(value, 0)
    elif OP == "fp64":
        value = value.to(tl.float32).to(tl.float64).to(tl.bfloat16)
    tl.store(out + i, value)


@triton.jit
def bounds_kernel(bounds, x, out, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    end = tl.load(bounds + program + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    begin = tl.load(bounds + program)
    for start in tl.range(begin, end, BLOCK):  # pyright: ignore
        total += tl.load(x + start + i, mask=start + i < end, other=0.0)
    for _ in range(program, program + 1):
        tl.store(out + program, tl.sum(total, 0))


@triton.jit
def mask_kernel(x, flag, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    inside = i < n
    first = tl.program_id(0) == 0
    value = tl.load(x + i, mask=inside & first, other=-1.0)
    value = tl.load(x + i, mask=(tl.load(flag) > 0.5) & inside, other=value)
    tl.store(out + tl.program_id(0) * BLOCK + i, value, mask=inside & (tl.load(flag) >= 0.0))


@triton.jit
def descriptor_kernel(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS
    column = tl.program_id(1) * COLUMNS
    value = x.load([row, column])
    out.store([row, column], (value.to(tl.float32) + 1.0).to(out.dtype))


@triton.jit
def device_descriptor_kernel(x, out, rows, columns, step, R: tl.constexpr, C: tl.constexpr):
    shape = [rows, columns]
    strides = [step, 1]
    source = tl.make_tensor_descriptor(x, shape, strides, [R, C])  # pyright: ignore
    target = tl.make_tensor_descriptor(out, shape, strides, [R, C])  # pyright: ignore
    descriptor_kernel(source, target, R, C)


@triton.jit
def reduce_kernel(x, sums, maxima, other, AXIS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    value = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    i = tl.arange(0, N if AXIS == 0 else M)
    tl.store(sums + i, tl.sum(value, AXIS))
    largest = tl.max(value, AXIS)
    tl.store(maxima + i, largest)
    tl.store(other + i, tl.maximum(largest, 0.5))


@triton.jit
def math_kernel(x, exp, log, total, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(exp + i, tl.exp(value))
    tl.store(log + i, tl.log(value))
    tl.store(total, tl.sum(value.to(tl.float64) * 0.1, 0))


@triton.jit
def unmasked_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any) -> None:
    kernel[grid](*arguments)


def _special_fp32() -> Tensor:
    """Random numbers of every exponent, ties of both halves, infinities and NaNs."""
    random = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    high = np.arange(0, 2**16, 7, dtype=np.uint32) << 16
    bits = np.concatenate([random, *(high + low for low in (0, 0x7FFF, 0x8000, 0x8001, 0xFFFF))])
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504, 65520, 1e-45, 6e-8])
    ties = torch.arange(-4096.0, 4096.0) * 2.0**-24  # fp16 subnormals and halfway between them
    return torch.cat([torch.from_numpy(bits.view(np.float32)), special, ties])


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal bit for bit, but for the payload of NaNs."""
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(
        left.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).view(torch.int16),
        right.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).view(torch.int16),
    )


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_dot_is_that_of_fp64(dtype):
    a, b = torch.randn(16, 64).to(dtype), torch.randn(32, 64).to(dtype)
    out = torch.empty(16, 32)
    launch(dot_kernel, (1,), a, b, out, 16, 32, 64)
    torch.testing.assert_close(out.double(), a.double() @ b.double().T, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", HALVES)
def test_fp32_is_rounded_as_torch_does(dtype):
    x = _special_fp32()
    out = torch.empty(len(x), dtype=dtype)
    launch(copy_kernel, (1,), x, out, len(x), triton.next_power_of_2(len(x)))
    assert _same_bits(out, x.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_becomes_fp32_exactly(dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    out = torch.empty(len(x))
    launch(fp32_copy_kernel, (1,), x, out, len(x), len(x))
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out.nan_to_num(0.0), x.float().nan_to_num(0.0))


@pytest.mark.parametrize("op", ["add", "negate", "compare", "sum", "fp64"])
def test_bf16_arithmetic_is_refused(op):
    x = torch.randn(8).bfloat16()
    with pytest.raises(InterpreterError, match="cast to fp32"):
        launch(arithmetic_kernel, (1,), x, torch.empty_like(x), op, 8)


def test_loop_bounds_may_be_loaded():
    bounds = torch.tensor([0, 3, 3, 20])
    x = torch.randn(20)
    out = torch.full((3,), torch.nan)
    launch(bounds_kernel, (3,), bounds, x, out, 4)
    torch.testing.assert_close(out, torch.stack([x[:3].sum(), x[3:3].sum(), x[3:].sum()]))


@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_masks_may_hold_scalar_conditions(flag):
    x = torch.arange(5.0)
    out = torch.full((2, 8), 9.0)
    launch(mask_kernel, (2,), x, torch.tensor([flag]), out, 5, 8)
    later = x if flag else torch.full((5,), -1.0)
    assert torch.equal(out[:, :5], torch.stack([x, later]))
    assert (out[:, 5:] == 9).all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_host_descriptors_stop_at_the_edge(dtype):
    x = torch.randn(3, 8).to(dtype)
    out = torch.full((9, 24), 9.0, dtype=dtype)
    source = TensorDescriptor.from_tensor(x, [4, 16])
    target = TensorDescriptor.from_tensor(out[:5, :13], [4, 16])
    launch(descriptor_kernel, (2, 1), source, target, 4, 16)
    assert torch.equal(out[:3, :8], (x.float() + 1).to(dtype))
    assert (out[3:5, :13] == 1).all() and (out[:3, 8:13] == 1).all()  # beyond the source is 0
    assert (out[5:] == 9).all() and (out[:, 13:] == 9).all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_device_descriptors_stop_at_the_edge(dtype):
    x = torch.randn(5, 24).to(dtype)
    out = torch.full((9, 24), 9.0, dtype=dtype)
    launch(device_descriptor_kernel, (2, 2), x, out, 5, 21, 24, 4, 16)
    assert torch.equal(out[:5, :21], (x[:, :21].float() + 1).to(dtype))
    assert (out[5:] == 9).all() and (out[:, 21:] == 9).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("axis", [0, 1])
def test_reductions(dtype, axis):
    x = torch.randn(8, 4).to(dtype)
    x[0, 0] = torch.nan
    sums, maxima, other = (torch.empty(4 if axis == 0 else 8, dtype=dtype) for _ in range(3))
    launch(reduce_kernel, (1,), x, sums, maxima, other, axis, 8, 4)
    torch.testing.assert_close(sums, x.sum(axis), equal_nan=True)
    # A GPU ignores NaN in a maximum.
    expected = x.nan_to_num(nan=-torch.inf).amax(axis)
    assert torch.equal(maxima, expected)
    assert torch.equal(other, expected.clamp(min=0.5))


def test_maximum_with_nan_is_the_number():
    x = torch.full((2, 2), torch.nan)
    maxima, other = torch.empty(2), torch.empty(2)
    with pytest.warns(RuntimeWarning, match="All-NaN"):
        launch(reduce_kernel, (1,), x, torch.empty(2), maxima, other, 0, 2, 2)
    assert maxima.isnan().all()
    assert (other == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_log_and_fp64_sum(dtype):
    x = torch.rand(64).to(dtype) + 0.01
    exp, log, total = torch.empty_like(x), torch.empty_like(x), torch.empty(1, dtype=torch.float64)
    launch(math_kernel, (1,), x, exp, log, total, 64)
    torch.testing.assert_close(exp, x.exp())
    torch.testing.assert_close(log, x.log())
    torch.testing.assert_close(total[0], (x.double() * 0.1).sum(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.int64, torch.bool])
def test_masked_elements_without_a_value_are_poison(dtype):
    x, out = torch.ones(8, dtype=dtype), torch.zeros(8, dtype=dtype)
    launch(unmasked_kernel, (1,), x, out, 5, 8)
    assert (out[:5] == 1).all()
    wrong = {torch.int64: out == 2**63 - 1, torch.bool: out}.get(dtype, out.isnan())
    assert wrong[5:].all()


def test_access_out_of_bounds_is_refused():
    x, out = torch.ones(8), torch.zeros(8)
    with pytest.raises(InterpreterError, match="load out of bounds: bytes 0 to 64"):
        launch(copy_kernel, (1,), x, out, 16, 16)
    with pytest.raises(InterpreterError, match="store out of bounds: bytes 0 to 64"):
        launch(copy_kernel, (1,), torch.ones(16), out, 16, 16)
    with pytest.raises(InterpreterError, match="store out of bounds"):
        launch(copy_kernel, (1,), x, out[:4], 8, 8)  # within the storage, but not in the view
    launch(copy_kernel, (1,), x, out, 8, 16)
    assert torch.equal(x, out)


def test_a_changed_interpreter_is_refused():
    class Changed:
        def create_dot(self, left, right):
            pass

    for name in ("create_dot", "create_matmul"):
        with pytest.raises(RuntimeError, match="its interpreter has changed"):
            interpreter._wrap(Changed, name, "self a b d", lambda *_: None)
