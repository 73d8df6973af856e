"""The differentiable ops: from hidden states to log-probs and preference losses without logits.

`linear_logp` is the head's projection, log-softmax and gather in one op.  `linear_preference_loss`
adds the sums over sequences, the reference and the objective, and knows that a pair's gradient is
one scalar times something known beforehand, which saves a matrix product (see `fastdpo.loss.plan`).
`linear_dpo_loss` is that with the length-regularized DPO objective, and `LinearDPOLoss` its module.

Legend: T hidden rows, N scored tokens, D hidden size, V vocabulary, P pairs, S = 2P sequences
(2i chosen, 2i+1 rejected).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from fastdpo.loss import checks
from fastdpo.loss.objectives import kind_of, lr_dpo
from fastdpo.loss.passes import (
    Call,
    ObjectiveFn,
    Pairs,
    forward_blocks,
    frozen_forward,
    grouped_pass,
    join,
    kl_backward,
    ref_logps,
    rounded,
    score,
    token_backward,
)
from fastdpo.loss.plan import MIB, Plan, default_workspace_mib, make_plan
from fastdpo.loss.streaming import IGNORE, Head, Needs

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
STATS = frozenset({"entropy", "mean_logit", "top1", "log_sum_sq_probs", "kl_ref"})


class PreferenceLoss(dict[str, Tensor]):
    """What a preference loss returns: a mapping of tensors; only ``loss`` carries a gradient.

    Its entries are attributes too, and an index or a slice counts them, as in a model's output.
    PyTorch's pytrees know it.  What rebuilds it from its entries alone, as accelerate's conversion
    of a model's outputs does, leaves ``metrics`` and ``stats`` empty.

    Entries:
        loss: scalar, the summed loss of the pairs divided by ``num_pairs``.
        logp_S: summed log-probs of each sequence under the policy, in the dtype of the reference.
        ref_logp_S: those of the reference.
        lengths_S: scored tokens of each sequence, int64.

    Attributes:
        metrics: detached scalars averaged over the call's pairs, under TRL's names, and
            ``lengths/chosen``, ``lengths/rejected``, ``length_margin`` (``alpha * (nw - nl)``).
        stats: the requested per-token statistics, each (N,).
        plan: the route taken, its workspace and its accumulators; None under torch.compile.
    """

    def __init__(
        self,
        entries: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        metrics: dict[str, Tensor] | None = None,
        stats: dict[str, Tensor] | None = None,
        plan: Plan | None = None,
    ) -> None:
        super().__init__(entries)
        self.metrics = {} if metrics is None else metrics
        self.stats = {} if stats is None else stats
        self.plan: Any = plan

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    @property
    def loss(self) -> Tensor:
        return self["loss"]

    @property
    def logp_S(self) -> Tensor:
        return self["logp_S"]

    @property
    def ref_logp_S(self) -> Tensor:
        return self["ref_logp_S"]

    @property
    def lengths_S(self) -> Tensor:
        return self["lengths_S"]


# Hooks of DDP and FSDP2 look for the outputs that carry a gradient in a pytree's leaves.
register_pytree_node(
    PreferenceLoss,
    lambda result: ([dict(result), result.metrics, result.stats], result.plan),
    lambda parts, plan: PreferenceLoss(*parts, plan=plan),  # type: ignore[call-arg]
)


# ------------------------------------------------------------------------------------- linear_logp
@contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    """Outside autocast, which would round fp32 products, and on the device, where kernels start."""
    guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard, torch.autocast(device.type, enabled=False):
        yield


def _plain_precision(method: Callable) -> Callable:
    """Run an autograd method `_plainly`."""

    @wraps(method)
    def run(ctx, x, *args):
        with nullcontext() if x is None else _plainly(x.device):
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


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    @_plain_precision
    def forward(ctx, h_TD, w_VD, bias_V, call: Call):  # type: ignore[override]
        unit_ND = None
        if call.plan.route == "frozen":
            logp_N, unit_ND = frozen_forward(call, h_TD, w_VD, bias_V)
        else:
            logp_N = forward_blocks(call, h_TD, w_VD, bias_V)
        ctx.call = call
        ctx.save_for_backward(h_TD, w_VD, bias_V, unit_ND, call.target_N, call.rows_N)
        return call.full(logp_N)

    @staticmethod
    @_once
    @_plain_precision
    def backward(ctx, dlogp_N):
        call: Call = ctx.call
        coef_N = dlogp_N if call.keep_N is None else dlogp_N[call.keep_N]
        grads = token_backward(call, ctx.saved_tensors[:4], coef_N, reuse=_is_last_backward())
        _free_unless_retained(ctx)
        return *grads, None


def linear_logp(
    h_TD: Tensor,
    w_VD: Tensor,
    target_N: Tensor,
    *,
    rows_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    workspace_mib: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each target under the head, with any upstream gradient.

    ``logp[i] = log_softmax(z)[target[i]]``, ``z = softcap * tanh(scale * (h[rows[i]] @ w.T + bias)
    / softcap)``, in fp32 with unrounded logits and no (N, V) tensor beyond the workspace.
    fp32 products on a GPU are as exact as ``torch.set_float32_matmul_precision`` lets them be.

    Args:
        h_TD: hidden states, (T, D), fp16, bf16, fp32 or fp64.
        w_VD: weight of the head, (V, D), same dtype.
        target_N: token ids, (N,) int64; -100 gives a zero and no gradient.
        rows_N: hidden row that predicts each target, (N,) int64; default: row i predicts target i.
            Repeats are allowed, their gradients are summed in fp32 in a fixed order.
        bias_V: bias of the head, (V,).
        scale: factor on the logits (Cohere, Granite).
        softcap: soft cap on the logits (Gemma 2), in logits.
        workspace_mib: bound on tiles and stash in MiB; default 256, on a GPU 1/32 of its memory if
            that is more.  A result's ``plan`` says what it was.  Where the kernels fold tiles
            (before Hopper, fp32) the last bits depend on it.
        impl: "auto", "triton" or "torch".

    Returns:
        (N,) fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
    """
    h_TD, w_VD, bias_V = _autocast(h_TD, w_VD, bias_V)
    if torch.compiler.is_compiling():
        from fastdpo.loss import compiled

        return compiled.linear_logp(
            h_TD, w_VD, target_N, rows_N=rows_N, bias_V=bias_V, scale=scale, softcap=softcap,
            workspace_mib=workspace_mib, impl=impl,
        )  # fmt: skip
    fused = checks.choose_impl(impl, h_TD) == "triton"
    scale, softcap = checks.check_head(h_TD, w_VD, bias_V, scale, softcap)
    checks.check_targets(h_TD, w_VD.shape[0], target_N, rows_N, in_kernel=fused)
    call = _make_call(
        h_TD, w_VD, bias_V, target_N, rows_N, scale, softcap, workspace_mib, None, fused=fused
    )
    if call is None:  # every target is ignored
        acc = torch.promote_types(h_TD.dtype, torch.float32)
        anchor = h_TD[:0].sum() + w_VD[:0].sum()  # keeps the graph connected
        if bias_V is not None:
            anchor = anchor + bias_V[:0].sum()
        return torch.zeros(target_N.shape[0], dtype=acc, device=h_TD.device) + anchor.to(acc)
    if call.plan.route == "forward":
        with torch.no_grad(), _plainly(h_TD.device):
            return call.full(forward_blocks(call, h_TD, w_VD, bias_V))
    return _LinearLogp.apply(h_TD, w_VD, bias_V, call)  # type: ignore[return-value]


class _LinearKL(torch.autograd.Function):
    @staticmethod
    @_plain_precision
    def forward(ctx, h_TD, w_VD, bias_V, call: Call):  # type: ignore[override]
        forward_blocks(call, h_TD, w_VD, bias_V)
        ctx.call = call
        ctx.save_for_backward(h_TD, w_VD, bias_V)
        return call.token_stats()["kl_ref"]

    @staticmethod
    @_once
    @_plain_precision
    def backward(ctx, dkl_N):
        return *kl_backward(ctx.call, ctx.saved_tensors, dkl_N), None


def linear_kl(
    h_TD: Tensor,
    w_VD: Tensor,
    ref_h_TD: Tensor,
    ref_w_VD: Tensor,
    *,
    rows_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    ref_bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    workspace_mib: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """KL(reference || policy) of the next token at each row, with any upstream gradient.

    Both heads are streamed together, so neither's logits are kept.  The gradient is the policy's;
    the reference gets none.  It takes one product a head in the forward, and in the backward one a
    head again and one for each gradient.  Under torch.compile it breaks the graph.

    Args:
        h_TD, w_VD, bias_V: the policy's hidden states and head, as in `linear_logp`.
        ref_h_TD, ref_w_VD, ref_bias_V: the reference's, for the same tokens; the hidden size may
            differ.
        rows_N: hidden rows to compare, (N,) int64; default: all, in order.
        scale, softcap, workspace_mib, impl: as in `linear_logp`.

    Returns:
        (N,) fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
    """
    if torch.compiler.is_compiling():
        return _outside_the_graph(linear_kl)(
            h_TD, w_VD, ref_h_TD, ref_w_VD, rows_N=rows_N, bias_V=bias_V, ref_bias_V=ref_bias_V,
            scale=scale, softcap=softcap, workspace_mib=workspace_mib, impl=impl,
        )  # fmt: skip
    h_TD, w_VD, bias_V, ref_h_TD, ref_w_VD, ref_bias_V = _autocast(
        h_TD, w_VD, bias_V, ref_h_TD, ref_w_VD, ref_bias_V
    )
    fused = checks.choose_impl(impl, h_TD) == "triton"
    scale, softcap = checks.check_head(h_TD, w_VD, bias_V, scale, softcap)
    if rows_N is not None:
        checks.require_tensor("rows_N", rows_N, 1, "(N,)")
    N = h_TD.shape[0] if rows_N is None else rows_N.shape[0]
    if N == 0:
        raise ValueError("there is no row to compare: h_TD, or rows_N, is empty")
    # The streams gather a target anyway; the first token is as good as any.
    target_N = torch.zeros(N, dtype=torch.int64, device=h_TD.device)
    checks.check_targets(h_TD, w_VD.shape[0], target_N, rows_N, in_kernel=fused)
    if ref_h_TD is None:
        raise TypeError("ref_h_TD must be a torch.Tensor, got NoneType")
    ref = _check_reference(
        h_TD, w_VD, None, ref_h_TD, ref_w_VD, ref_bias_V, (0, scale, softcap), in_kernel=fused
    )
    call = _make_call(
        h_TD, w_VD, bias_V, target_N, rows_N, scale, softcap, workspace_mib, None, fused=fused
    )
    assert call is not None
    call.ref, call.stats = ref, frozenset({"kl_ref"})
    # Nothing is kept: the difference of two softmaxes needs both log-sum-exps first.
    route, plan = "recompute" if any(call.needs) else "forward", call.plan
    call.plan = replace(plan, route=route, grad_tile_bytes=plan.tile_bytes)
    if call.plan.route == "forward":
        with torch.no_grad(), _plainly(h_TD.device):
            forward_blocks(call, h_TD, w_VD, bias_V)
            return call.token_stats()["kl_ref"]
    return _LinearKL.apply(h_TD, w_VD, bias_V, call)  # type: ignore[return-value]


def _outside_the_graph(op: Callable) -> Callable:
    """A call that torch.compile leaves to Python: a graph break, refused by ``fullgraph=True``."""
    return torch.compiler.disable(op)


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast as `torch.nn.functional.linear` would under autocast; fp64 stays."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    device = tensors[0].device.type
    # Dynamo of torch 2.11 cannot trace the question whether there is autocast at all.
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
        return tensors
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        else x
        for x in tensors
    )


def _make_call(
    h_TD: Tensor,
    w_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    rows_N: Tensor | None,
    scale: float,
    softcap: float | None,
    workspace_mib: float | None,
    edges: list[int] | None,
    *,
    fused: bool,
    unit_buffers: int = 1,
) -> Call | None:
    """Leave ignored targets out where that costs no synchronization, and plan the call."""
    if workspace_mib is None:
        memory_bytes = 0
        if h_TD.is_cuda:
            memory_bytes = torch.cuda.get_device_properties(h_TD.device).total_memory
        workspace_mib = default_workspace_mib(memory_bytes)
    workspace_mib = checks.require_number(
        "workspace_mib", workspace_mib, low=0, high=2**40, open_low=True
    )
    num_targets, keep_N = target_N.shape[0], None
    if not fused and target_N.device.type == "cpu" and bool((target_N == IGNORE).any()):
        keep_N = (target_N != IGNORE).nonzero()[:, 0]
        if keep_N.numel() == 0 and edges is None:
            return None
        if edges is not None:
            edges = torch.searchsorted(keep_N, torch.tensor(edges)).tolist()
        target_N = target_N[keep_N]
        rows_N = keep_N if rows_N is None else rows_N[keep_N]
    if edges is not None and not fused and target_N.device.type == "cpu":
        checks.check_lengths([b - a for a, b in pairwise(edges)])
    if fused:  # the kernels read neighbouring elements
        target_N = target_N.contiguous()
        rows_N = None if rows_N is None else rows_N.contiguous()
    grad = torch.is_grad_enabled()
    needs = Needs(
        h=grad and h_TD.requires_grad,
        w=grad and w_VD.requires_grad,
        bias=grad and bias_V is not None and bias_V.requires_grad,
    )
    plan = make_plan(
        edges or [0, target_N.shape[0]],
        w_VD.shape[1],
        w_VD.shape[0],
        itemsize=torch.promote_types(h_TD.dtype, torch.float32).itemsize,
        workspace_bytes=int(workspace_mib * MIB),
        need_head=needs.head,
        need_h=needs.h,
        T=h_TD.shape[0],
        unit_buffers=unit_buffers,
        fused_itemsize=h_TD.itemsize if fused else None,
        gathered=rows_N is not None,
    )
    return Call(
        scale, softcap, rows_N, target_N, keep_N, num_targets, needs, plan, edges or [], fused
    )


# --------------------------------------------------------------------------------- preference loss
class _LinearPreference(torch.autograd.Function):
    @staticmethod
    @_plain_precision
    def forward(ctx, h_TD, w_VD, bias_V, call: Call, pairs: Pairs):  # type: ignore[override]
        ctx.call, ctx.grads, unit_ND, coef_N = call, None, None, None
        if call.plan.route == "grouped":
            loss, logp_S, ref_S, ctx.grads = grouped_pass(call, pairs, h_TD, w_VD, bias_V)
            ctx.save_for_backward(h_TD, w_VD, bias_V)
        else:
            if call.plan.route == "frozen":
                logp_N, unit_ND = frozen_forward(call, h_TD, w_VD, bias_V)
            else:
                logp_N = forward_blocks(call, h_TD, w_VD, bias_V)
            loss, logp_S, ref_S, _, coef_N = score(call, pairs, logp_N, ref_logps(call))
            ctx.save_for_backward(h_TD, w_VD, bias_V, unit_ND, call.target_N, call.rows_N)
        ctx.coef_N = coef_N
        ctx.mark_non_differentiable(logp_S, ref_S)
        ctx.set_materialize_grads(False)  # the sums' would be cleared for nothing
        return _returned(loss, h_TD, pairs), logp_S, ref_S

    @staticmethod
    @_once
    @_plain_precision
    def backward(ctx, dloss, *_):
        if dloss is None:  # nothing depends on the loss
            return (None,) * 5
        saved = ctx.saved_tensors
        if ctx.grads is not None:
            grads = rounded(ctx.grads, saved[0].dtype, dloss, fused=ctx.call.fused)
        else:
            reuse = _is_last_backward()
            grads = token_backward(ctx.call, saved[:4], ctx.coef_N, dloss, reuse=reuse)
        _free_unless_retained(ctx)
        return *grads, None, None


def _returned(loss: Tensor, h_TD: Tensor, pairs: Pairs) -> Tensor:
    """The loss in the accumulator's dtype, as the kernel left it where it made all of it."""
    if len(pairs.results) == 1 and kind_of(pairs.objective) is not None:
        return pairs.results[0].loss
    return loss.to(torch.promote_types(h_TD.dtype, torch.float32))


def linear_preference_loss(
    h_TD: Tensor,
    w_VD: Tensor,
    target_N: Tensor,
    bounds_S1: Tensor,
    ref_logp_S: Tensor | None,
    objective: ObjectiveFn,
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
) -> PreferenceLoss:
    """A preference loss of packed pairs, from hidden states, without logits.

    Args:
        h_TD, w_VD, target_N, rows_N, bias_V, scale, softcap, workspace_mib, impl: as in
            `linear_logp`.
        bounds_S1: cumulative bounds of the sequences in ``target_N``, (S + 1,) int64 on the CPU;
            sequences alternate chosen, rejected.
        ref_logp_S: summed log-probs under the reference, (S,) fp32 or fp64; the policy's sums are
            taken in the same precision.  None with ``ref_h_TD``.
        objective: one of `fastdpo.objectives`, or a function of that signature.
        ref_h_TD, ref_w_VD, ref_bias_V: the reference's hidden rows and head instead of its sums;
            same rows, scale and softcap as the policy.
        margin_P: added to z, (P,).  Only margin objectives.
        smoothing_P: probability in [0, 1] that a pair's label is flipped, (P,).  Likewise.
        weight_P: factor >= 0 on each pair's loss, (P,).
        num_pairs: what the summed loss is divided by; default: the pairs of this call.  A trainer
            that accumulates passes the pairs of the whole optimizer step.
        stats: per-token statistics to return, of "entropy", "mean_logit", "top1",
            "log_sum_sq_probs" and, with ``ref_h_TD``, "kl_ref" (KL(reference || policy)).

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
    """
    h_TD, w_VD, bias_V, ref_h_TD, ref_w_VD, ref_bias_V = _autocast(
        h_TD, w_VD, bias_V, ref_h_TD, ref_w_VD, ref_bias_V
    )
    if torch.compiler.is_compiling():
        options = {
            "rows_N": rows_N, "bias_V": bias_V, "scale": scale, "softcap": softcap,
            "ref_h_TD": ref_h_TD, "ref_w_VD": ref_w_VD, "ref_bias_V": ref_bias_V,
            "margin_P": margin_P, "smoothing_P": smoothing_P, "weight_P": weight_P,
            "num_pairs": num_pairs, "stats": stats, "workspace_mib": workspace_mib, "impl": impl,
        }  # fmt: skip
        packed = (h_TD, w_VD, target_N, bounds_S1, ref_logp_S)
        kind = kind_of(objective)
        if kind is None:  # a function of the caller's own
            return _outside_the_graph(linear_preference_loss)(*packed, objective, **options)
        from fastdpo.loss import compiled

        known: Any = objective
        alpha, normalized = getattr(known, "alpha", 0.0), getattr(known, "length_normalized", False)
        described = (kind, known.beta, alpha, normalized)
        return compiled.linear_preference_loss(*packed, described, **options)
    fused = checks.choose_impl(impl, h_TD) == "triton"
    scale, softcap = checks.check_head(h_TD, w_VD, bias_V, scale, softcap)
    V = w_VD.shape[0]
    checks.check_targets(h_TD, V, target_N, rows_N, in_kernel=fused)
    edges = checks.check_bounds(bounds_S1, target_N)
    S, device = len(edges) - 1, h_TD.device
    wanted = _check_stats(stats, ref_h_TD is not None)
    kind = kind_of(objective)
    if kind is None:
        checks.check_objective(objective)
    ref = _check_reference(
        h_TD, w_VD, ref_logp_S, ref_h_TD, ref_w_VD, ref_bias_V, (S, scale, softcap),
        in_kernel=fused,
    )  # fmt: skip
    known = fused and kind is not None  # what is left out need not be made
    pair_values = _check_pair_values(
        objective, margin_P, smoothing_P, weight_P, S // 2, device, neutral=not known
    )
    count = float(S // 2)
    if num_pairs is not None:
        count = checks.require_number("num_pairs", num_pairs, low=0, open_low=True)
    call = _make_call(
        h_TD, w_VD, bias_V, target_N, rows_N, scale, softcap, workspace_mib, edges,
        fused=fused, unit_buffers=1 if getattr(objective, "margin", False) else 2,
    )  # fmt: skip
    assert call is not None
    call.stats, call.ref = wanted, ref
    edges = call.edges
    if fused:
        from fastdpo.loss.fused import count_scored, device_bounds

        lengths_S = None
        with _plainly(device):
            call.bounds_S1 = device_bounds(edges, device)
            if not known or getattr(objective, "length_normalized", False):
                lengths_S = count_scored(target_N, call.bounds_S1)
    elif device.type == "cpu":
        lengths_S = torch.tensor([b - a for a, b in pairwise(edges)])
    else:
        scored = (target_N != IGNORE).long().split([b - a for a, b in pairwise(edges)])
        lengths_S = torch.stack([part.sum() for part in scored])
    if lengths_S is not None and not fused and device.type != "cpu":
        checks.check_device_lengths(lengths_S)
    pairs = Pairs(objective, edges, lengths_S, ref_logp_S, *pair_values, count, device)
    if call.plan.route == "forward":
        with torch.no_grad(), _plainly(h_TD.device):
            logp_N = forward_blocks(call, h_TD, w_VD, bias_V)
            # Slopes only for their check of the objective; inference mode has none.
            slopes = not torch.is_inference_mode_enabled()
            scored = score(call, pairs, logp_N, ref_logps(call), slopes=slopes)
            logp_S, ref_S = scored.logp_S, scored.ref_logp_S
            loss = _returned(scored.loss, h_TD, pairs)
    else:
        loss, logp_S, ref_S = _LinearPreference.apply(h_TD, w_VD, bias_V, call, pairs)  # type: ignore[misc]
    if fused:
        lengths_S = pairs.lengths_S = join([result.lengths_S for result in pairs.results])
    metrics = _metrics(pairs, logp_S, ref_S)
    entries = {"loss": loss, "logp_S": logp_S, "ref_logp_S": ref_S, "lengths_S": lengths_S}
    return PreferenceLoss(entries, metrics, call.token_stats(), call.plan)


def linear_dpo_loss(
    h_TD: Tensor,
    w_VD: Tensor,
    target_N: Tensor,
    bounds_S1: Tensor,
    ref_logp_S: Tensor | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.0,
    **options: Any,
) -> PreferenceLoss:
    """Length-regularized DPO (arXiv 2406.11817) of packed pairs, without logits.

    ``z = beta * ((lw - lw') - (ll - ll')) + alpha * (nw - nl)``, ``loss = -log sigmoid(z)``, mean
    over pairs; ``lw`` and ``ll`` are summed log-probs of chosen and rejected, a prime marks the
    reference, ``nw`` and ``nl`` count scored tokens.

    Args:
        beta: strength of the KL penalty, > 0.
        alpha: length penalty per token, not multiplied by ``beta``; 0 is plain DPO.
        options: the keyword arguments of `linear_preference_loss`.
    """
    if not torch.compiler.is_compiling():
        beta = checks.require_number("beta", beta, low=0, open_low=True)
        alpha = checks.require_number("alpha", alpha)
        _check_options("linear_dpo_loss", options)
    return linear_preference_loss(
        h_TD, w_VD, target_N, bounds_S1, ref_logp_S, lr_dpo(beta, alpha), **options
    )


class LinearDPOLoss(nn.Module):
    """`linear_dpo_loss` as a module, for packed rows or TRL's padded layout.

    Args:
        beta, alpha: as in `linear_dpo_loss`.
        options: keyword arguments of `linear_preference_loss` that stay the same for every call,
            such as ``scale``, ``softcap`` or ``workspace_mib``.
    """

    def __init__(self, beta: float = 0.1, alpha: float = 0.0, **options: Any) -> None:
        super().__init__()
        self.beta = checks.require_number("beta", beta, low=0, open_low=True)
        self.alpha = checks.require_number("alpha", alpha)
        _check_options("LinearDPOLoss", options)
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in {**self.__dict__, **self.options}.items()
                         if k in {"beta", "alpha", *self.options})  # fmt: skip

    def forward(
        self,
        h_TD: Tensor,
        w_VD: Tensor,
        target_N: Tensor,
        bounds_S1: Tensor | None = None,
        ref_logp_S: Tensor | None = None,
        **options: Any,
    ) -> PreferenceLoss:
        """Packed: ``h_TD`` (T, D), ``target_N`` (N,), ``bounds_S1`` (S + 1,).

        Padded, as TRL collates: ``h_TD`` (2B, L, D), all chosen sequences first, then all rejected;
        ``target_N`` (2B, L) already shifted, so that row t predicts label t, with -100 on prompts
        and padding; no ``bounds_S1``.  Pair i is rows i and B + i; ``ref_logp_S``, ``ref_h_TD``
        (2B, L, D) and the returned ``logp_S``, ``lengths_S`` and ``stats`` (2B, L) keep that order.
        On a GPU this layout waits once for the labels, so that prompts and padding cost nothing;
        the packed one never waits.
        """
        settings = {"beta": self.beta, "alpha": self.alpha, **self.options, **options}
        if bounds_S1 is not None or not isinstance(h_TD, Tensor) or h_TD.ndim != 3:
            if bounds_S1 is None:
                raise ValueError(
                    "bounds_S1 is missing: packed rows h_TD (T, D) need it; TRL's padded layout "
                    f"has h_TD of shape (2B, L, D), got {tuple(getattr(h_TD, 'shape', ()))}"
                )
            return linear_dpo_loss(h_TD, w_VD, target_N, bounds_S1, ref_logp_S, **settings)
        return self._padded(h_TD, w_VD, target_N, ref_logp_S, settings)

    def _padded(
        self,
        h_TD: Tensor,
        w_VD: Tensor,
        target_N: Tensor,
        ref_logp_S: Tensor | None,
        settings: dict[str, Any],
    ) -> PreferenceLoss:
        checks.require_tensor("h_TD", h_TD, 3, "(2B, L, D)")
        checks.require_tensor("target_N", target_N, 2, "(2B, L)")
        S, L, D = h_TD.shape
        if target_N.shape != (S, L) or S % 2 or S == 0:
            raise ValueError(
                "padded layout: h_TD must be (2B, L, D) and target_N (2B, L), all chosen first; "
                f"got {tuple(h_TD.shape)} and {tuple(target_N.shape)}"
            )
        if settings.get("rows_N") is not None:
            raise ValueError("rows_N has no meaning in the padded layout; leave it out")
        checks.require_device("target_N", target_N, h_TD.device)
        places_S = torch.arange(S, device=h_TD.device)
        order = places_S.view(2, S // 2).T.reshape(S)  # chosen 0, rejected 0, chosen 1...
        back = places_S.view(S // 2, 2).T.reshape(S)
        rows_N = (order[:, None] * L + torch.arange(L, device=h_TD.device)).reshape(-1)
        packed_N, bounds_S1 = target_N[order].reshape(-1), torch.arange(S + 1) * L
        keep_N = None
        if _may_wait_for(target_N):
            keep_N, bounds_S1 = _scored(packed_N, L)
            rows_N, packed_N = rows_N[keep_N], packed_N[keep_N]
        if settings.get("ref_h_TD") is not None:
            ref_h = checks.require_tensor("ref_h_TD", settings["ref_h_TD"], 3, "(2B, L, D)")
            if ref_h.shape[:2] != (S, L):
                raise ValueError(
                    f"ref_h_TD must be ({S}, {L}, D) as h_TD, got {tuple(ref_h.shape)}"
                )
            settings["ref_h_TD"] = ref_h.flatten(0, 1)
        if ref_logp_S is not None:
            checks.require_tensor("ref_logp_S", ref_logp_S, 1, "(2B,)")
            if ref_logp_S.shape[0] != S:
                raise ValueError(f"ref_logp_S must have 2B={S} entries, got {ref_logp_S.shape[0]}")
            checks.require_device("ref_logp_S", ref_logp_S, h_TD.device)
            ref_logp_S = ref_logp_S[order]
        result = linear_dpo_loss(
            h_TD.reshape(S * L, D),
            w_VD,
            packed_N,
            bounds_S1,
            ref_logp_S,
            **{**settings, "rows_N": rows_N},
        )
        if keep_N is not None:
            whole = {name: x.new_zeros(S * L) for name, x in result.stats.items()}
            result.stats = {k: whole[k].index_copy_(0, keep_N, x) for k, x in result.stats.items()}
        result.stats = {name: x.view(S, L)[back] for name, x in result.stats.items()}
        for name in ("logp_S", "ref_logp_S", "lengths_S"):
            result[name] = result[name][back]
        return result


def _may_wait_for(target: Tensor) -> bool:
    """Whether a GPU's targets can be looked at: not while a graph is being made."""
    if not target.is_cuda or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _scored(target_N: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """Positions of the scored targets of sequences of length ``L``, and the sequences' bounds."""
    keep_N = (target_N != IGNORE).nonzero()[:, 0]
    edges_S1 = torch.arange(0, len(target_N) + 1, L, device=keep_N.device)
    return keep_N, torch.searchsorted(keep_N, edges_S1).cpu()


def _check_options(owner: str, options: dict[str, Any]) -> None:
    known = linear_preference_loss.__kwdefaults__ or {}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise TypeError(f"{owner} has no option {unknown[0]!r}; options are {', '.join(known)}")


def _check_stats(stats: Any, has_ref: bool) -> frozenset[str]:
    if not isinstance(stats, tuple | list | set | frozenset):
        raise TypeError(f"stats must be a tuple of names, got {stats!r}")
    if not all(isinstance(name, str) for name in stats):
        raise TypeError(f"stats must hold names only, got {stats!r}")
    wanted = frozenset(stats)
    if wanted - STATS:
        unknown = ", ".join(sorted(map(repr, wanted - STATS)))
        raise ValueError(f"stats has unknown names {unknown}; known: {', '.join(sorted(STATS))}")
    if "kl_ref" in wanted and not has_ref:
        raise ValueError("stats='kl_ref' needs the reference as ref_h_TD and ref_w_VD")
    return wanted


def _check_reference(
    h_TD: Tensor,
    w_VD: Tensor,
    ref_logp_S: Any,
    ref_h_TD: Any,
    ref_w_VD: Any,
    ref_bias_V: Any,
    shared: tuple[int, float, float | None],
    *,
    in_kernel: bool,
) -> tuple[Head, Tensor] | None:
    """Exactly one form of reference, with the policy's sizes."""
    S, scale, softcap = shared
    if (ref_logp_S is None) == (ref_h_TD is None):
        raise ValueError("pass the reference either as ref_logp_S or as ref_h_TD with ref_w_VD")
    if ref_h_TD is None:
        if ref_w_VD is not None or ref_bias_V is not None:
            raise ValueError("ref_w_VD and ref_bias_V belong to ref_h_TD, which is missing")
        checks.check_vector("ref_logp_S", ref_logp_S, S, "S", h_TD.device, in_kernel=in_kernel)
        if ref_logp_S.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"ref_logp_S must be float32 or float64, got {ref_logp_S.dtype}, which rounds the "
                "sum of a long response by more than a preference is worth"
            )
        return None
    if ref_w_VD is None:
        raise ValueError("ref_h_TD needs ref_w_VD, the reference's head")
    checks.check_head(ref_h_TD, ref_w_VD, ref_bias_V, scale, softcap, prefix="ref_")
    if ref_h_TD.shape[0] != h_TD.shape[0] or ref_w_VD.shape[0] != w_VD.shape[0]:
        raise ValueError(
            f"ref_h_TD and ref_w_VD must have the policy's rows T={h_TD.shape[0]} and vocabulary "
            f"V={w_VD.shape[0]}, got {ref_h_TD.shape[0]} and {ref_w_VD.shape[0]}"
        )
    if ref_h_TD.dtype != h_TD.dtype or ref_h_TD.device != h_TD.device:
        raise TypeError(
            f"ref_h_TD is {ref_h_TD.dtype} on {ref_h_TD.device}, h_TD is {h_TD.dtype} on "
            f"{h_TD.device}; they must agree"
        )
    bias = None if ref_bias_V is None else ref_bias_V.detach()
    return Head(ref_w_VD.detach(), bias, scale, softcap), ref_h_TD.detach()


def _check_pair_values(
    objective: ObjectiveFn,
    margin_P: Any,
    smoothing_P: Any,
    weight_P: Any,
    P: int,
    device: torch.device,
    *,
    neutral: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Margin, smoothing and weight of each pair as fp64; ``neutral`` values for None if wanted."""
    separate = hasattr(objective, "margin") and not objective.margin  # type: ignore[attr-defined]
    if separate and (margin_P is not None or smoothing_P is not None):
        raise ValueError(
            "margin_P and smoothing_P need an objective of the margin (lr_dpo, hinge, ipo, ...)"
        )

    def value(name: str, x: Any, default: float, low: float, high: float) -> Tensor | None:
        if x is None and not neutral:
            return None
        if x is None:
            return torch.full((P,), default, dtype=torch.float64, device=device)
        return checks.check_vector(name, x, P, "P", device, low=low, high=high).double()

    inf = float("inf")
    return (
        value("margin_P", margin_P, 0.0, -inf, inf),
        value("smoothing_P", smoothing_P, 0.0, 0.0, 1.0),
        value("weight_P", weight_P, 1.0, 0.0, inf),
    )


@torch.no_grad()
def _metrics(pairs: Pairs, logp_S: Tensor, ref_S: Tensor) -> dict[str, Tensor]:
    if kind_of(pairs.objective) is not None and pairs.results:
        if len(pairs.results) == 1:
            return dict(zip(METRICS, pairs.results[0].means.unbind()))
        totals = torch.stack([result.totals for result in pairs.results]).sum(0)
        return dict(zip(METRICS, (totals[1:] / (len(pairs.edges) // 2)).float().unbind()))
    beta = getattr(pairs.objective, "beta", 1.0)
    alpha = getattr(pairs.objective, "alpha", 0.0)
    reward_S = beta * (logp_S.double() - ref_S.double())
    chosen_P, rejected_P = reward_S[0::2], reward_S[1::2]
    lengths_S = pairs.lengths_S.double()
    length_P = lengths_S[0::2] - lengths_S[1::2]
    metrics = {
        "rewards/chosen": chosen_P.mean(),
        "rewards/rejected": rejected_P.mean(),
        "rewards/accuracies": (chosen_P > rejected_P).double().mean(),
        "rewards/margins": (chosen_P - rejected_P).mean(),
        "logps/chosen": logp_S[0::2].double().mean(),
        "logps/rejected": logp_S[1::2].double().mean(),
        "lengths/chosen": lengths_S[0::2].mean(),
        "lengths/rejected": lengths_S[1::2].mean(),
        "length_margin": alpha * length_P.mean(),
    }
    return {name: x.float() for name, x in metrics.items()}
