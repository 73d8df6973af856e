"""The ops outside a compiled graph: check the arguments, plan the call, run it.

Legend as in `ops`.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import checks
from .autograd import LinearPreference, LinearTokens, LinearTokensKL, plainly, score_only
from .blocks import Needs
from .call import Call, HeadInputs, PairInputs, Pairs, join
from .checks import IGNORE
from .objectives import Objective, as_objective
from .passes import forward_blocks
from .plan import MIB, default_workspace_mib, make_plan
from .result import PreferenceLoss, metrics_of
from .streaming import Streamer


# ------------------------------------------------------------------------------------------- tokens
def logp(given: HeadInputs) -> Tensor:
    """`ops.linear_logp`."""
    given, fused = _check_head(given)
    _check_targets(given, fused)
    if _nothing_scored(given, fused):
        return _zeros(given)
    call = make_call(given, fused=fused)
    return _of_tokens(call, given)


def _nothing_scored(given: HeadInputs, fused: bool) -> bool:
    """Whether all targets are ignored, where it costs no synchronization to know."""
    on_host = not fused and given.target_N.device.type == "cpu"
    return on_host and bool((given.target_N == IGNORE).all())


def _zeros(given: HeadInputs) -> Tensor:
    """What an op of tokens returns if no target is scored; it keeps the graph connected."""
    acc = torch.promote_types(given.h_TD.dtype, torch.float32)
    anchors = [x[:0].sum() for x in given[:3] if x is not None]
    zeros = torch.zeros(given.target_N.shape[0], dtype=acc, device=given.h_TD.device)
    return zeros + sum(anchors[1:], anchors[0]).to(acc)


def kl(given: HeadInputs) -> Tensor:
    """`ops.linear_kl`; there are no targets yet."""
    given, fused = _check_head(given)
    if given.rows_N is not None:
        checks.check_tokens("rows_N", given.rows_N, given.h_TD.device)
    N = len(given.h_TD if given.rows_N is None else given.rows_N)
    if N == 0:
        raise ValueError("there is no row to compare: h_TD, or rows_N, is empty")
    # The streams gather a target anyway; the first token is as good as any.
    target_N = torch.zeros(N, dtype=torch.int64, device=given.h_TD.device)
    given = given._replace(target_N=target_N)
    _check_targets(given, fused)
    call = _of_both_heads(given, fused)
    call.of_kl = True
    return _of_tokens(call, given)


def logp_kl(given: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.linear_logp_kl`."""
    given, fused = _check_head(given)
    _check_targets(given, fused)
    if _nothing_scored(given, fused):
        _require_reference(given)
        return _zeros(given), _zeros(given), _zeros(given).detach()
    call = _of_both_heads(given, fused)
    if call.plan.route == "forward":
        with torch.no_grad(), plainly(given.h_TD.device):
            forward_blocks(call, *given[:3])
            return call.token_values_kl()
    return LinearTokensKL.apply(*given[:3], call)  # type: ignore[return-value]


def _of_both_heads(given: HeadInputs, fused: bool) -> Call:
    """A call of tokens that streams the reference's head beside the policy's."""
    ref = _require_reference(given)
    call = make_call(given, fused=fused)
    call.ref, call.stats = ref, frozenset({"kl_ref"})
    # Nothing is kept: any upstream gradient may come, and a difference of two softmaxes needs both
    # log-sum-exps first.
    route, plan = "recompute" if any(call.needs) else "forward", call.plan
    call.plan = replace(plan, route=route, grad_tile_bytes=plan.tile_bytes)
    return call


def _require_reference(given: HeadInputs) -> Any:
    """The reference's head of an op that can't do without."""
    if given.ref_h_TD is None:
        raise TypeError("ref_h_TD must be a torch.Tensor, got NoneType")
    return _reference_head(given)


def _of_tokens(call: Call, given: HeadInputs) -> Tensor:
    if call.plan.route == "forward":
        with torch.no_grad(), plainly(given.h_TD.device):
            forward_blocks(call, *given[:3])
            return call.token_values()
    return LinearTokens.apply(*given[:3], call)  # type: ignore[return-value]


# -------------------------------------------------------------------------------------------- pairs
def preference(given: HeadInputs, of_pairs: PairInputs, objective: Any) -> PreferenceLoss:
    """`ops.linear_preference_loss`."""
    given, fused = _check_head(given)
    _check_targets(given, fused)
    edges = checks.check_bounds(of_pairs.bounds_S1, given.target_N)
    stats = checks.check_stats(given.stats, given.ref_h_TD is not None)
    objective = as_objective(objective)
    ref = _check_reference(given, of_pairs.ref_logp_S, len(edges) - 1, fused)
    # What the kernel would read and what is left out need not be made.
    known = fused and objective.code is not None
    margin_P, smoothing_P, weight_P = _check_pair_values(
        objective, of_pairs, len(edges) // 2, given.h_TD.device, not known
    )
    count = float(len(edges) // 2)
    if of_pairs.num_pairs is not None:
        count = checks.require_number("num_pairs", of_pairs.num_pairs, low=0, open_low=True)
    call = make_call(given, edges, fused=fused, unit_buffers=1 if objective.by_margin else 2)
    call.stats, call.ref = stats, ref
    bounds_S1, lengths_S = _lengths(call, not known or objective.length_normalized)
    ref_S = None if of_pairs.ref_logp_S is None else of_pairs.ref_logp_S.contiguous()
    pairs = Pairs(
        objective, call.edges, bounds_S1, lengths_S, ref_S, margin_P, smoothing_P, weight_P, count
    )
    run: Callable = score_only if call.plan.route == "forward" else _differentiably
    loss, logp_S, ref_S = run(call, pairs, *given[:3])
    if fused:
        pairs.lengths_S = join([result.lengths_S for result in pairs.results])
    entries = {"loss": loss, "logp_S": logp_S, "ref_logp_S": ref_S, "lengths_S": pairs.lengths_S}
    metrics = metrics_of(pairs, logp_S, ref_S)
    return PreferenceLoss(entries, metrics, call.token_stats(), call.plan)


def _differentiably(call: Call, pairs: Pairs, *tensors: Tensor | None) -> Any:
    return LinearPreference.apply(*tensors, call, pairs)


def _lengths(call: Call, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    """Bounds on the device, for kernels, and scored tokens of each sequence.

    Kernels count those, so there they are made only if ``wanted`` before.
    """
    device = call.target_N.device
    if call.fused:
        from .fused import count_scored, device_bounds

        with plainly(device):
            bounds_S1 = device_bounds(call.edges, device)
            return bounds_S1, count_scored(call.target_N, bounds_S1) if wanted else None
    sizes = [b - a for a, b in pairwise(call.edges)]
    if device.type == "cpu":
        return None, torch.tensor(sizes)
    scored = (call.target_N != IGNORE).long().split(sizes)
    lengths_S = torch.stack([part.sum() for part in scored])
    checks.check_device_lengths(lengths_S)
    return None, lengths_S


# --------------------------------------------------------------------------------- checks and plan
def _check_head(given: HeadInputs) -> tuple[HeadInputs, bool]:
    """The arguments with plain numbers, and whether the kernels run them."""
    fused = checks.choose_impl(given.impl, given.h_TD) == "triton"
    scale, softcap = checks.check_head(*given[:3], given.scale, given.softcap)
    workspace_mib = given.workspace_mib
    if workspace_mib is None:
        memory_bytes, device = 0, given.h_TD.device
        if device.type == "cuda":
            memory_bytes = torch.cuda.get_device_properties(device).total_memory
        workspace_mib = default_workspace_mib(memory_bytes)
    workspace_mib = checks.require_number(
        "workspace_mib", workspace_mib, low=0, high=2**40, open_low=True
    )
    return given._replace(scale=scale, softcap=softcap, workspace_mib=workspace_mib), fused


def _check_targets(given: HeadInputs, fused: bool) -> None:
    V = given.w_VD.shape[0]
    checks.check_targets(given.h_TD, V, given.target_N, given.rows_N, in_kernel=fused)


def _check_reference(given: HeadInputs, ref_logp_S: Any, S: int, fused: bool) -> Any:
    """Exactly one form of reference."""
    if (ref_logp_S is None) == (given.ref_h_TD is None):
        raise ValueError("pass the reference either as ref_logp_S or as ref_h_TD with ref_w_VD")
    if given.ref_h_TD is not None:
        return _reference_head(given)
    if given.ref_w_VD is not None or given.ref_bias_V is not None:
        raise ValueError("ref_w_VD and ref_bias_V belong to ref_h_TD, which is missing")
    checks.check_reference_sums(ref_logp_S, S, given.h_TD.device, in_kernel=fused)
    return None


def _reference_head(given: HeadInputs) -> Any:
    """The reference's hidden rows, weight and bias; it has the policy's scale and softcap."""
    checks.check_reference_head(given.h_TD, given.w_VD, *given[-3:])
    return tuple(None if x is None else x.detach() for x in given[-3:])


def _check_pair_values(
    objective: Objective, given: PairInputs, P: int, device: torch.device, neutral: bool
) -> Any:
    """Margin, smoothing and weight of each pair as fp64; ``neutral`` values for None if wanted."""
    named = given.margin_P is not None or given.smoothing_P is not None
    if named and not objective.takes_margin:
        raise ValueError(
            "margin_P and smoothing_P need an objective of the margin (lr_dpo, hinge, ipo, ...)"
        )
    inf = float("inf")
    ranges = (
        ("margin_P", given.margin_P, -inf, inf, 0.0),
        ("smoothing_P", given.smoothing_P, 0.0, 1.0, 0.0),
        ("weight_P", given.weight_P, 0.0, inf, 1.0),
    )
    values: list[Tensor | None] = []
    for name, x, low, high, value in ranges:
        if x is not None:
            checks.check_vector(name, x, P, "P", device, low=low, high=high)
            x = x.double().contiguous()
        elif neutral:
            x = torch.full((P,), value, dtype=torch.float64, device=device)
        values.append(x)
    return values


def make_call(
    given: HeadInputs, edges: list[int] | None = None, *, fused: bool, unit_buffers: int = 1
) -> Call:
    """Leave ignored targets out where that costs no synchronization, and plan the call.

    ``edges`` are the bounds of the sequences, None for tokens without; ``unit_buffers`` as in
    `make_plan`.
    """
    h_TD, w_VD, bias_V, target_N, rows_N = given[:5]
    assert given.workspace_mib is not None
    num_targets, keep_N = target_N.shape[0], None
    on_host = not fused and target_N.device.type == "cpu"
    if on_host and bool((target_N == IGNORE).any()):
        keep_N = (target_N != IGNORE).nonzero()[:, 0]
        if edges is not None:
            edges = torch.searchsorted(keep_N, torch.tensor(edges)).tolist()
        target_N = target_N[keep_N]
        rows_N = keep_N if rows_N is None else rows_N[keep_N]
    if on_host and edges is not None:
        checks.check_lengths([b - a for a, b in pairwise(edges)])
    streamer: Any = Streamer
    if fused:  # the kernels read neighbouring elements
        from .fused import FusedStreamer

        streamer = FusedStreamer
        target_N = target_N.contiguous()
        rows_N = None if rows_N is None else rows_N.contiguous()
    grad = torch.is_grad_enabled()
    needs = Needs(*(grad and x is not None and x.requires_grad for x in (h_TD, w_VD, bias_V)))
    plan = make_plan(
        edges or [0, target_N.shape[0]],
        w_VD.shape[1],
        w_VD.shape[0],
        itemsize=torch.promote_types(h_TD.dtype, torch.float32).itemsize,
        workspace_bytes=int(given.workspace_mib * MIB),
        need_head=needs.w or needs.bias,
        need_h=needs.h,
        T=h_TD.shape[0],
        unit_buffers=unit_buffers,
        fused_itemsize=h_TD.itemsize if fused else None,
        gathered=rows_N is not None,
    )
    return Call(
        given.scale, given.softcap, rows_N, target_N, keep_N, num_targets, needs, plan,
        edges or [], fused, streamer,
    )  # fmt: skip
