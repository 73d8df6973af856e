"""Corrections to Triton's CPU interpreter, so that kernels can be tested where no GPU is.

They suit Triton 3.6 and 3.9. What stays different from a GPU: programs run one after another, so
races do not show, and tl.dot multiplies fp32 exactly whatever its input_precision.
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

import numpy as np
import pytest

MINIMUM_TRITON = (3, 6)  # as in fastdpo.kernels.support, which must not be imported before enable()


def supported() -> bool:
    """Whether a Triton is installed that the kernels and these corrections are made for."""
    try:
        major, minor, *_ = metadata.version("triton").split(".")
    except metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= MINIMUM_TRITON


needs_kernels = pytest.mark.skipif(not supported(), reason="needs Triton 3.6 or newer")

_spans: list[tuple[int, int]] = []  # addresses of the running kernel's tensors: first, last + 1


@functools.cache
def enable() -> None:
    """Set TRITON_INTERPRET and patch the interpreter; call it before any import of Triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton import JITFunction
    from triton.runtime import interpreter

    if isinstance(tl.sum, JITFunction):
        raise RuntimeError("Triton was imported before TRITON_INTERPRET=1 was set")
    _correct_bf16(interpreter, tl)
    _correct_scalars(interpreter, tl)
    _detect_stray_access(interpreter)


def _correct_bf16(interpreter: Any, tl: Any) -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_bf16(value: Any) -> bool:
        return isinstance(value, handle) and value.dtype.scalar == tl.bfloat16

    def widen(value: Any) -> Any:
        bits = np.ascontiguousarray(value.data).astype(np.uint32) << 16
        return handle(bits.view(np.float32), tl.float32)

    def refuse(values: Iterable[Any]) -> None:
        if any(map(is_bf16, values)):
            raise NotImplementedError("arithmetic on bf16 in the interpreter: cast to fp32 first")

    # Upstream truncates fp32 to bf16, garbles bf16 subnormals, and casts other types as integers.
    def cast(original, self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return original(self, src, dst_type)
        if target == tl.float32:
            return widen(src)
        if source == tl.float32:
            return handle(_round_to_bf16(src.data), tl.bfloat16)
        raise NotImplementedError(f"{source} to {target} in the interpreter: cast to fp32 between")

    # Upstream multiplies the bits of bf16 numbers as integers.
    def dot(original, self, a, b, d, *rest):
        refuse([d])
        return original(self, *(widen(x) if is_bf16(x) else x for x in (a, b)), d, *rest)

    # Upstream adds, compares and reduces the bits of bf16 numbers as integers.
    def arithmetic(original, self, *values):
        refuse(values)
        return original(self, *values)

    def reduction(original, self, input):
        refuse(x.handle for x in (input if isinstance(input, tuple) else (input,)))
        return original(self, input)

    _wrap(builder, "cast_impl", "self src dst_type", cast)
    _wrap(builder, "create_dot", "self a b d", dot)
    _wrap(builder, "binary_op", "self lhs rhs op", arithmetic)
    _wrap(builder, "unary_op", "self arg op", arithmetic)
    _wrap(builder, "create_fma", "self x y z", arithmetic)
    _wrap(builder, "create_clampf", "self arg lo hi", arithmetic)
    _wrap(interpreter.ReduceScanOpInterface, "apply", "self input", reduction)


def _correct_scalars(interpreter: Any, tl: Any) -> None:
    builder = interpreter.InterpreterBuilder

    # Upstream gives a comparison its operands' type: ``block_mask & scalar_condition`` is no mask.
    def comparison(original, self, lhs, rhs):
        return interpreter.TensorHandle(original(self, lhs, rhs).data, tl.int1)

    for kind in ("icmpS", "icmpU", "fcmpO", "fcmpU"):
        for relation in ("LT", "LE", "GT", "GE"):
            _wrap(builder, f"create_{kind}{relation}", "self lhs rhs", comparison)
    for name in ("icmpEQ", "icmpNE", "fcmpOEQ", "fcmpUEQ", "fcmpONE", "fcmpUNE"):
        _wrap(builder, f"create_{name}", "self lhs rhs", comparison)

    # 3.6 returns NaN if one operand is NaN; a GPU returns the other one.
    for name, op in (("create_minnumf", np.fmin), ("create_maxnumf", np.fmax)):
        _wrap(builder, name, "self lhs rhs", lambda _, self, *x, op=op: self.binary_op(*x, op))

    # 3.6 takes int() of a one-element array as loop bound, which NumPy 2.4 refuses.
    def tensor_methods(original, tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    _wrap(interpreter, "_patch_lang_tensor", "tensor scope", tensor_methods)


def _detect_stray_access(interpreter: Any) -> None:
    builder = interpreter.InterpreterBuilder

    # Upstream reads and writes any address: every block has to lie in one of the given tensors.
    def arguments(original, self, args_dev, kwargs):
        args, named = original(self, args_dev, kwargs)
        _spans[:] = _find_spans(interpreter, [*args, *named.values()])
        return args, named

    # Upstream reads 0 where the mask is off and ``other`` absent; on a GPU it is undefined. (For a
    # single element an ``other`` of 0 looks as if it was absent.)
    def load(original, self, ptrs, mask, other, *rest, **kwargs):
        element = ptrs.get_element_ty()
        _check_bounds("load", ptrs.data, mask.data, element)
        if other is None and ptrs.data.size > 1:
            poison = _poison(ptrs.data.shape, interpreter._get_np_dtype(element))
            other = interpreter.TensorHandle(poison, element)
        return original(self, ptrs, mask, other, *rest, **kwargs)

    def store(original, self, ptrs, value, mask, *rest, **kwargs):
        _check_bounds("store", ptrs.data, mask.data, ptrs.get_element_ty())
        return original(self, ptrs, value, mask, *rest, **kwargs)

    _wrap(interpreter.GridExecutor, "_init_args_hst", "self args_dev kwargs", arguments)
    _wrap(builder, "create_masked_load", "self ptrs mask other", load)
    _wrap(builder, "create_masked_store", "self ptrs value mask", store)


def _wrap(owner: Any, name: str, parameters: str, wrapper: Callable[..., Any]) -> None:
    """Replace a function of the interpreter by ``wrapper``, which gets the original first."""
    original = getattr(owner, name, None)
    found = list(inspect.signature(original).parameters) if original else []
    expected = parameters.split()
    if original is None or found[: len(expected)] != expected:
        import triton

        raise RuntimeError(
            f"Triton {triton.__version__} has no {owner.__name__}.{name}({', '.join(expected)}): "
            f"its interpreter has changed, and so must the corrections in {__file__}"
        )

    @functools.wraps(original)
    def replacement(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, replacement)


def _round_to_bf16(data: np.ndarray) -> np.ndarray:
    """The bits of the nearest bf16 numbers, ties to even."""
    bits = np.ascontiguousarray(data).view(np.uint32).reshape(np.shape(data))
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


def _find_spans(interpreter: Any, values: Iterable[Any]) -> list[tuple[int, int]]:
    spans = []
    for value in values:
        if isinstance(value, tuple):
            spans += _find_spans(interpreter, value)
        elif isinstance(value, interpreter.TensorDescriptor):
            spans += _find_spans(interpreter, [value.base])
        elif hasattr(value, "data_ptr"):
            tensor = interpreter._unwrap_tensor(value)
            last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride()))
            length = (last + 1) * tensor.element_size() if tensor.numel() else 0
            spans.append((tensor.data_ptr(), tensor.data_ptr() + length))
    return spans


def _check_bounds(action: str, pointers: np.ndarray, mask: Any, element: Any) -> None:
    used = pointers[np.broadcast_to(np.asarray(mask, bool), pointers.shape)]
    if not used.size:
        return
    first, end = int(used.min()), int(used.max()) + max(1, element.primitive_bitwidth // 8)
    if any(low <= first and end <= high for low, high in _spans):
        return
    low, high = min(_spans, key=lambda span: abs(span[0] - first), default=(0, 0))
    raise IndexError(
        f"{action} out of bounds: bytes {first - low} to {end - low} of the nearest tensor's "
        f"{high - low} (one block must not span two tensors)"
    )


def _poison(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """NaN, also as the bits of bf16; the largest number; or True."""
    value = {"f": np.nan, "b": True}.get(dtype.kind)
    return np.full(shape, np.iinfo(dtype).max if value is None else value, dtype)
