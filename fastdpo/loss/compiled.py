"""The ops under torch.compile: each one opaque node of the graph, so ``fullgraph=True`` works.

Inside a node `eager` runs, with its routes and its kernels.  A node cannot hand a stash to its
backward: `logp` computes it again there, and a preference loss finishes its gradients in the
forward, whose product with the upstream gradient is rounded once more.  A KL, and an objective
that is not of the pair kernel, are left to Python.

A node takes the fields of the bundles one after the other, the differentiable tensors first.
Legend as in `ops`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import eager
from .call import ExampleInputs, HeadInputs
from .objectives import KERNEL_FORMULAS, Objective
from .result import METRICS, PreferenceLoss

# A node reads its bounds on the host, which the replay of a CUDA graph would not.
_HOST = torch._C.Tag.cudagraph_unsafe
_AUTOGRAD_KEYS = (
    torch._C.DispatchKey.AutogradFunctionality,
    torch._C.DispatchKey.AutogradOther,
    torch._C.DispatchKey.AutogradNestedTensor,
    torch._C.DispatchKey.ADInplaceOrView,
)
_NAMESPACE = __name__.partition(".")[0]  # a copy in another package has nodes of its own
_HEAD, _EXAMPLES = len(HeadInputs._fields), len(ExampleInputs._fields)
_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Any: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int",
    float | None: "float?", Sequence[int] | None: "int[]?",
    str: "str", bool: "bool", tuple[str, ...]: "str[]",
}  # fmt: skip


class _Numbers(NamedTuple):
    """An objective of the pair kernel: its number, and the fields of an `Objective`."""

    code: int
    beta: float
    alpha: float
    length_normalized: bool
    label_smoothing: float
    target_margin: float
    reference_scale: float
    parameter: float
    ld_alpha: float | None


def _schema(*bundles: Any) -> str:
    """The fields of the bundles as a node's arguments."""
    fields = (item for bundle in bundles for item in bundle.__annotations__.items())
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in fields)


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside a node, which the dispatcher runs below it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key) if excluded.has(key) else excluded
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _leaves(given: HeadInputs, wanted: Sequence[bool]) -> HeadInputs:
    """Detached copies of the first three, those wanted with a gradient."""
    leaves = [
        None if x is None else x.detach().requires_grad_(want) for x, want in zip(given[:3], wanted)
    ]
    return HeadInputs(*leaves, *given[3:])  # type: ignore[arg-type]


def _grads(output: Tensor, upstream: Tensor | None, leaves: HeadInputs) -> list[Tensor]:
    """Gradients of the leaves that want one, and empty tensors for the others."""
    wanted = [x for x in leaves[:3] if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, upstream) if wanted else ())
    return [
        next(found).contiguous() if x is not None and x.requires_grad else output.new_empty(0)
        for x in leaves[:3]
    ]


def _empty_grads(given: HeadInputs, wanted: Sequence[bool]) -> list[Tensor]:
    """What `_grads` will return, for shape inference."""
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if want and x is not None
        else given.h_TD.new_empty(0, dtype=_accumulator(given))
        for x, want in zip(given[:3], wanted)
    ]


def _accumulator(given: HeadInputs) -> torch.dtype:
    return torch.promote_types(given.h_TD.dtype, torch.float32)


def outside(op: Callable) -> Callable:
    """A call that torch.compile leaves to Python: a graph break, refused by ``fullgraph=True``."""
    return torch.compiler.disable(op)


# ------------------------------------------------------------------------------------------- tokens
@torch.library.custom_op(
    f"{_NAMESPACE}::linear_logp", mutates_args=(), tags=(_HOST,),
    schema=f"({_schema(HeadInputs)}) -> Tensor",
)  # fmt: skip
def _logp(*given):
    with torch.no_grad():
        return eager.logp(HeadInputs(*given))


@_logp.register_fake
def _(*fields):
    given = HeadInputs(*fields)
    return given.h_TD.new_empty(given.target_N.shape[0], dtype=_accumulator(given))


@torch.library.custom_op(
    f"{_NAMESPACE}::linear_logp_backward", mutates_args=(), tags=(_HOST,),
    schema=f"({_schema(HeadInputs)}, Tensor dlogp_N, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
def _logp_backward(*fields):
    *given, dlogp_N, wanted = fields
    with _autograd():
        leaves = _leaves(HeadInputs(*given), wanted)
        return tuple(_grads(eager.logp(leaves), dlogp_N, leaves))


@_logp_backward.register_fake
def _(*fields):
    *given, _, wanted = fields
    return tuple(_empty_grads(HeadInputs(*given), wanted))


def _save_logp(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.save_for_backward(*tensors)


def _backward_logp(ctx: Any, dlogp_N: Tensor) -> tuple:
    fields = [x if other is None else other for x, other in zip(ctx.saved_tensors, ctx.others)]
    wanted = list(ctx.needs_input_grad[:3])
    grads = _logp_backward(*fields, dlogp_N, wanted)
    return *(g if want else None for g, want in zip(grads, wanted)), *[None] * (_HEAD - 3)


_logp.register_autograd(_backward_logp, setup_context=_save_logp)


def logp(given: HeadInputs) -> Tensor:
    """`eager.logp` as a node of a compiled graph."""
    return _logp(*given)


def kl(given: HeadInputs) -> Tensor:
    """`eager.kl`, outside the graph."""
    return outside(eager.kl)(given)


def logp_kl(given: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
    """`eager.logp_kl`, outside the graph."""
    return outside(eager.logp_kl)(given)


# -------------------------------------------------------------------------------------------- pairs
@torch.library.custom_op(
    f"{_NAMESPACE}::preference_loss", mutates_args=(), tags=(_HOST,),
    schema=f"({_schema(HeadInputs, ExampleInputs, _Numbers)}, bool[] wanted) -> ("
    + ", ".join(["Tensor"] * 9) + ")",
)  # fmt: skip
def _preference(*fields):
    """Loss, sums, reference sums, lengths, metrics, statistics, and finished gradients."""
    given, inputs, objective, wanted = _bundles(fields)
    with _autograd():
        leaves = _leaves(given, wanted)
        result = eager.preference(leaves, inputs, objective)
        grads = _grads(result.loss, None, leaves)
    metrics = torch.stack([result.metrics[name] for name in METRICS])
    acc = _accumulator(given)
    parts = [result.stats[name].to(acc) for name in given.stats]
    N = len(given.target_N)
    per_token = torch.stack(parts) if parts else metrics.new_empty(0, N, dtype=acc)
    return (
        result.loss.detach(), result.logp_S, result.ref_logp_S.clone(), result.lengths_S, metrics,
        per_token, *grads,
    )  # fmt: skip


@_preference.register_fake
def _(*fields):
    given, inputs, objective, wanted = _bundles(fields)
    new, acc, S = given.h_TD.new_empty, _accumulator(given), inputs.bounds_S1.shape[0] - 1
    sums = acc if objective.needs_reference else torch.float64
    if inputs.ref_logp_S is not None:
        sums = torch.promote_types(inputs.ref_logp_S.dtype, torch.float32)
    return (
        new((), dtype=acc), new(S, dtype=sums), new(S, dtype=sums), new(S, dtype=torch.int64),
        new(len(METRICS), dtype=torch.float32),
        new(len(given.stats), given.target_N.shape[0], dtype=acc), *_empty_grads(given, wanted),
    )  # fmt: skip


def _bundles(fields: tuple) -> tuple[HeadInputs, ExampleInputs, Objective, list[bool]]:
    """The arguments of `_preference` again."""
    inputs, numbers = fields[_HEAD : _HEAD + _EXAMPLES], _Numbers(*fields[_HEAD + _EXAMPLES : -1])
    own = {name: x for name, x in numbers._asdict().items() if name != "code"}
    objective = Objective(KERNEL_FORMULAS[numbers.code], **own)
    return HeadInputs(*fields[:_HEAD]), ExampleInputs(*inputs), objective, fields[-1]


def _save_preference(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[6:])
    ctx.num_inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])


def _backward_preference(ctx: Any, dloss: Tensor, *_: Any) -> tuple:
    grads = [
        (g * dloss).to(g.dtype) if need else None
        for g, need in zip(ctx.saved_tensors, ctx.needs_input_grad)
    ]
    return *grads, *[None] * (ctx.num_inputs - len(grads))


_preference.register_autograd(_backward_preference, setup_context=_save_preference)


def preference(given: HeadInputs, inputs: ExampleInputs, objective: Any) -> PreferenceLoss:
    """`eager.preference` as a node of a compiled graph; its result has no plan."""
    if not isinstance(objective, Objective) or objective.code is None:
        return outside(eager.preference)(given, inputs, objective)
    numbers = _Numbers(*(getattr(objective, name) for name in _Numbers._fields))
    grad, names = torch.is_grad_enabled(), sorted(given.stats)
    wanted = [grad and x is not None and x.requires_grad for x in given[:3]]
    given = HeadInputs(*given[:9], tuple(names), *given[10:])
    loss, logp_S, ref_S, lengths_S, metrics, per_token, *_ = _preference(
        *given, *inputs, *numbers, wanted
    )
    return PreferenceLoss(
        {"loss": loss, "logp_S": logp_S, "ref_logp_S": ref_S, "lengths_S": lengths_S},
        dict(zip(METRICS, metrics.unbind())),
        dict(zip(names, per_token.unbind())),
    )
