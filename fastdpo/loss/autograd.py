"""The autograd functions of the ops: what the forward keeps, and the way back.

Legend as in `ops`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .call import Call, Scoring
from .passes import (
    forward_blocks,
    frozen_forward,
    grouped_pass,
    rounded,
    score,
    token_backward,
)


@contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Outside autocast, which would round fp32 products, and on the device, where kernels start."""
    guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard, torch.autocast(device.type, enabled=False):
        yield


def _plain_precision(method: Callable) -> Callable:
    """Run an autograd method `plainly`."""

    @wraps(method)
    def run(ctx, x, *args):
        with nullcontext() if x is None else plainly(x.device):
            return method(ctx, x, *args)

    return run


def _once(backward: Callable) -> Callable:
    """Refuse to be differentiated twice, whatever the upstream gradient requires.

    ``once_differentiable`` would let ``create_graph=True`` through with gradients that carry no
    graph, so that a penalty on them silently contributed nothing.
    """

    @wraps(backward)
    def run(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastdpo's ops cannot be differentiated twice (create_graph=True): their gradients "
                "carry no graph; use fastdpo.reference for second derivatives"
            )
        return backward(ctx, *grads)

    return run


def _is_last_backward() -> bool:
    """Whether autograd lets go of the graph after this backward; False where torch cannot say."""
    autograd = getattr(torch._C, "_autograd", None)
    graph_is_kept = getattr(autograd, "_get_current_graph_task_keep_graph", None)
    return graph_is_kept is not None and not graph_is_kept()


def _free_unless_retained(ctx: Any) -> None:
    """Let go of the stash and the finished gradients as autograd lets go of saved tensors.

    They live outside `save_for_backward` so that a stash can be lent again; a loss that is kept
    for logging must not keep them.
    """
    if _is_last_backward():
        ctx.call.blocks, ctx.grads = [], None


def _forward(ctx: Any, call: Call, h_TD: Tensor, w_VD: Tensor, bias_V: Tensor | None) -> None:
    """Leave the log-probs in the call's blocks, and save what `token_backward` reads."""
    run = frozen_forward if call.plan.route == "frozen" else forward_blocks
    unit_ND = run(call, h_TD, w_VD, bias_V)
    ctx.save_for_backward(h_TD, w_VD, bias_V, unit_ND, call.target_N, call.rows_N)


class LinearTokens(torch.autograd.Function):
    """Log-probs of all targets, or KLs to the reference, from which any gradient may come back."""

    @staticmethod
    @_plain_precision
    def forward(ctx, h_TD, w_VD, bias_V, call: Call):  # type: ignore[override]
        ctx.call = call
        _forward(ctx, call, h_TD, w_VD, bias_V)
        return call.token_values()

    @staticmethod
    @_once
    @_plain_precision
    def backward(ctx, dlogp_N):
        call: Call = ctx.call
        coef_N = dlogp_N if call.keep_N is None else dlogp_N[call.keep_N]
        grads = token_backward(call, ctx.saved_tensors[:4], coef_N, reuse=_is_last_backward())
        _free_unless_retained(ctx)
        return *grads, None


class LinearTokensKL(torch.autograd.Function):
    """Log-probs, KLs to the reference, and the reference's log-probs, which have no gradient."""

    @staticmethod
    @_plain_precision
    def forward(ctx, h_TD, w_VD, bias_V, call: Call):  # type: ignore[override]
        ctx.call = call
        _forward(ctx, call, h_TD, w_VD, bias_V)
        logp_N, kl_N, ref_logp_N = call.token_values_kl()
        ctx.mark_non_differentiable(ref_logp_N)
        return logp_N, kl_N, ref_logp_N

    @staticmethod
    @_once
    @_plain_precision
    def backward(ctx, dlogp_N, dkl_N, _):
        call: Call = ctx.call
        if call.keep_N is not None:
            dlogp_N, dkl_N = dlogp_N[call.keep_N], dkl_N[call.keep_N]
        grads = token_backward(call, ctx.saved_tensors[:4], dlogp_N, kl_coef_N=dkl_N)
        _free_unless_retained(ctx)
        return *grads, None


class LinearPreference(torch.autograd.Function):
    """Loss and both sums of each sequence; only the loss has a gradient."""

    @staticmethod
    @_plain_precision
    def forward(ctx, h_TD, w_VD, bias_V, call: Call, scoring: Scoring):  # type: ignore[override]
        ctx.call, ctx.grads, ctx.share = call, None, None
        if call.plan.route == "grouped":
            loss, logp_S, ref_S, ctx.grads = grouped_pass(call, scoring, h_TD, w_VD, bias_V)
            ctx.save_for_backward(h_TD, w_VD, bias_V)
        else:
            _forward(ctx, call, h_TD, w_VD, bias_V)
            ctx.share = score(call, scoring, call.blocks)
            loss, logp_S, ref_S = ctx.share[:3]
        ctx.mark_non_differentiable(logp_S, ref_S)
        ctx.set_materialize_grads(False)  # the sums' would be cleared for nothing
        return _returned(loss, h_TD, scoring), logp_S, ref_S

    @staticmethod
    @_once
    @_plain_precision
    def backward(ctx, dloss, *_):
        if dloss is None:  # nothing depends on the loss
            return (None,) * 5
        call, saved = ctx.call, ctx.saved_tensors
        if ctx.grads is not None:
            grads = rounded(call, ctx.grads, saved[0].dtype, dloss)
        else:
            coef_N, kl_coef_N = ctx.share.coef_N, ctx.share.kl_coef_N
            grads = token_backward(
                call, saved[:4], coef_N, dloss, kl_coef_N=kl_coef_N, reuse=_is_last_backward()
            )
        _free_unless_retained(ctx)
        return *grads, None, None


def score_only(
    call: Call, scoring: Scoring, h_TD: Tensor, w_VD: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `LinearPreference` returns, where no gradient is wanted."""
    with torch.no_grad(), plainly(h_TD.device):
        forward_blocks(call, h_TD, w_VD, bias_V)
        # Slopes only for their check of the objective; inference mode has none.
        slopes = not torch.is_inference_mode_enabled()
        share = score(call, scoring, call.blocks, slopes=slopes)
        return _returned(share.loss, h_TD, scoring), share.logp_S, share.ref_logp_S


def _returned(loss: Tensor, h_TD: Tensor, scoring: Scoring) -> Tensor:
    """The loss in the accumulator's dtype, as the kernel left it where it made all of it."""
    if len(scoring.results) == 1:
        return scoring.results[0].loss
    return loss.to(torch.promote_types(h_TD.dtype, torch.float32))
