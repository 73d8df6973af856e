"""The ops under torch.compile: each one opaque node of the graph, so ``fullgraph=True`` works.

Inside a node the usual eager op runs, with its routes and its kernels.  A node cannot hand a stash
to its backward: `linear_logp` computes it again there, and a preference loss finishes its gradients
in the forward, whose product with the upstream gradient is rounded once more.

Legend as in `fastdpo.loss.ops`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastdpo.loss import objectives, ops

# A node reads its bounds on the host, which the replay of a CUDA graph would not.
_HOST = torch._C.Tag.cudagraph_unsafe
_AUTOGRAD_KEYS = (
    torch._C.DispatchKey.AutogradFunctionality,
    torch._C.DispatchKey.AutogradOther,
    torch._C.DispatchKey.AutogradNestedTensor,
    torch._C.DispatchKey.ADInplaceOrView,
)


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside a node, which the dispatcher runs below it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key) if excluded.has(key) else excluded
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _leaves(wanted: Sequence[bool], *tensors: Tensor | None) -> list[Any]:
    """Detached copies of the handles, those wanted with a gradient."""
    return [
        None if x is None else x.detach().requires_grad_(want) for want, x in zip(wanted, tensors)
    ]


def _grads(output: Tensor, upstream: Tensor | None, leaves: list[Any]) -> list[Tensor]:
    """Gradients of the leaves that want one, and empty tensors for the others."""
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, upstream) if wanted else ())
    return [
        next(found).contiguous() if x is not None and x.requires_grad else output.new_empty(0)
        for x in leaves
    ]


def _empty_grads(wanted: Sequence[bool], like: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """What `_grads` will return, for shape inference."""
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if want and x is not None
        else like.new_empty(0)
        for want, x in zip(wanted, tensors)
    ]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ------------------------------------------------------------------------------------- linear_logp
@torch.library.custom_op("fastdpo::linear_logp", mutates_args=(), tags=(_HOST,))
def _logp(
    h_TD: Tensor,
    w_VD: Tensor,
    target_N: Tensor,
    rows_N: Tensor | None,
    bias_V: Tensor | None,
    scale: float,
    softcap: float | None,
    workspace_mib: float | None,
    impl: str,
) -> Tensor:
    with torch.no_grad():
        return ops.linear_logp(
            h_TD, w_VD, target_N, rows_N=rows_N, bias_V=bias_V, scale=scale, softcap=softcap,
            workspace_mib=workspace_mib, impl=impl,
        )  # fmt: skip


@_logp.register_fake
def _(h_TD, w_VD, target_N, rows_N, bias_V, scale, softcap, workspace_mib, impl):
    return h_TD.new_empty(target_N.shape[0], dtype=_accumulator(h_TD))


@torch.library.custom_op("fastdpo::linear_logp_backward", mutates_args=(), tags=(_HOST,))
def _logp_backward(
    dlogp_N: Tensor,
    h_TD: Tensor,
    w_VD: Tensor,
    target_N: Tensor,
    rows_N: Tensor | None,
    bias_V: Tensor | None,
    scale: float,
    softcap: float | None,
    workspace_mib: float | None,
    impl: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    with _autograd():
        h, w, bias = leaves = _leaves(wanted, h_TD, w_VD, bias_V)
        logp_N = ops.linear_logp(
            h, w, target_N, rows_N=rows_N, bias_V=bias, scale=scale, softcap=softcap,
            workspace_mib=workspace_mib, impl=impl,
        )  # fmt: skip
        dh, dw, dbias = _grads(logp_N, dlogp_N, leaves)
    return dh, dw, dbias


@_logp_backward.register_fake
def _(dlogp_N, h_TD, w_VD, target_N, rows_N, bias_V, scale, softcap, workspace_mib, impl, wanted):
    dh, dw, dbias = _empty_grads(wanted, dlogp_N, h_TD, w_VD, bias_V)
    return dh, dw, dbias


def _save_logp(ctx: Any, inputs: tuple, output: Tensor) -> None:
    h_TD, w_VD, target_N, rows_N, bias_V, *ctx.options = inputs
    ctx.save_for_backward(h_TD, w_VD, target_N, rows_N, bias_V)


def _backward_logp(ctx: Any, dlogp_N: Tensor) -> tuple:
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[4]]
    grads = _logp_backward(dlogp_N, *ctx.saved_tensors, *ctx.options, wanted)
    dh, dw, dbias = (g if want else None for g, want in zip(grads, wanted))
    return dh, dw, None, None, dbias, None, None, None, None


_logp.register_autograd(_backward_logp, setup_context=_save_logp)


def linear_logp(
    h_TD: Tensor,
    w_VD: Tensor,
    target_N: Tensor,
    *,
    rows_N: Tensor | None,
    bias_V: Tensor | None,
    scale: float,
    softcap: float | None,
    workspace_mib: float | None,
    impl: str,
) -> Tensor:
    """`fastdpo.linear_logp` as a node of a compiled graph."""
    return _logp(h_TD, w_VD, target_N, rows_N, bias_V, scale, softcap, workspace_mib, impl)


# -------------------------------------------------------------------------------- preference losses
@torch.library.custom_op("fastdpo::preference_loss", mutates_args=(), tags=(_HOST,))
def _preference(
    h_TD: Tensor,
    w_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    bounds_S1: Tensor,
    rows_N: Tensor | None,
    ref_logp_S: Tensor | None,
    ref_h_TD: Tensor | None,
    ref_w_VD: Tensor | None,
    ref_bias_V: Tensor | None,
    margin_P: Tensor | None,
    smoothing_P: Tensor | None,
    weight_P: Tensor | None,
    kind: str,
    beta: float,
    alpha: float,
    length_normalized: bool,
    scale: float,
    softcap: float | None,
    num_pairs: float | None,
    stats: str,
    workspace_mib: float | None,
    impl: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, sums, reference sums, lengths, metrics, statistics, and finished gradients."""
    with _autograd():
        h, w, bias = leaves = _leaves(wanted, h_TD, w_VD, bias_V)
        result = ops.linear_preference_loss(
            h, w, target_N, bounds_S1, ref_logp_S,
            objectives.of_kind(kind, beta, alpha, length_normalized),
            rows_N=rows_N, bias_V=bias, scale=scale, softcap=softcap, ref_h_TD=ref_h_TD,
            ref_w_VD=ref_w_VD, ref_bias_V=ref_bias_V, margin_P=margin_P, smoothing_P=smoothing_P,
            weight_P=weight_P, num_pairs=num_pairs, stats=_names(stats),
            workspace_mib=workspace_mib, impl=impl,
        )  # fmt: skip
        dh, dw, dbias = _grads(result.loss, None, leaves)
    metrics = torch.stack([result.metrics[name] for name in ops.METRICS])
    acc = _accumulator(h_TD)
    parts = [result.stats[name].to(acc) for name in _names(stats)]
    per_token = torch.stack(parts) if parts else metrics.new_empty(0, len(target_N), dtype=acc)
    return (
        result.loss.detach(), result.logp_S, result.ref_logp_S.clone(), result.lengths_S, metrics,
        per_token, dh, dw, dbias,
    )  # fmt: skip


@_preference.register_fake
def _(
    h_TD, w_VD, bias_V, target_N, bounds_S1, rows_N, ref_logp_S, ref_h_TD, ref_w_VD, ref_bias_V,
    margin_P, smoothing_P, weight_P, kind, beta, alpha, length_normalized, scale, softcap,
    num_pairs, stats, workspace_mib, impl, wanted,
):  # fmt: skip
    S, acc = bounds_S1.shape[0] - 1, _accumulator(h_TD)
    sums = acc if ref_logp_S is None else torch.promote_types(ref_logp_S.dtype, torch.float32)
    dh, dw, dbias = _empty_grads(wanted, h_TD.new_empty(0, dtype=acc), h_TD, w_VD, bias_V)
    return (
        h_TD.new_empty((), dtype=acc), h_TD.new_empty(S, dtype=sums),
        h_TD.new_empty(S, dtype=sums), h_TD.new_empty(S, dtype=torch.int64),
        h_TD.new_empty(len(ops.METRICS), dtype=torch.float32),
        h_TD.new_empty(len(_names(stats)), target_N.shape[0], dtype=acc), dh, dw, dbias,
    )  # fmt: skip


def _names(stats: str) -> tuple[str, ...]:
    return tuple(stats.split())


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


def linear_preference_loss(
    h_TD: Tensor,
    w_VD: Tensor,
    target_N: Tensor,
    bounds_S1: Tensor,
    ref_logp_S: Tensor | None,
    objective: tuple[str, float, float, bool],
    *,
    rows_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ref_h_TD: Tensor | None = None,
    ref_w_VD: Tensor | None = None,
    ref_bias_V: Tensor | None = None,
    margin_P: Tensor | None = None,
    smoothing_P: Tensor | None = None,
    weight_P: Tensor | None = None,
    num_pairs: float | None = None,
    stats: tuple[str, ...] = (),
    workspace_mib: float | None = None,
    impl: str = "auto",
) -> "ops.PreferenceLoss":
    """`fastdpo.linear_preference_loss` as a node of a compiled graph; its result has no plan.

    ``objective`` is what `objectives.of_kind` takes.
    """
    grad = torch.is_grad_enabled()
    wanted = [grad and x is not None and x.requires_grad for x in (h_TD, w_VD, bias_V)]
    names = sorted(stats)
    loss, logp_S, ref_S, lengths_S, metrics, per_token, *_ = _preference(
        h_TD, w_VD, bias_V, target_N, bounds_S1, rows_N, ref_logp_S, ref_h_TD, ref_w_VD,
        ref_bias_V, margin_P, smoothing_P, weight_P, *objective, scale, softcap,
        num_pairs, " ".join(names), workspace_mib, impl, wanted,
    )  # fmt: skip
    return ops.PreferenceLoss(
        {"loss": loss, "logp_S": logp_S, "ref_logp_S": ref_S, "lengths_S": lengths_S},
        dict(zip(ops.METRICS, metrics.unbind())),
        dict(zip(names, per_token.unbind())),
    )
