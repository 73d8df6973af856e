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
from .blocks import Needs, Shares
from .call import Call, ExampleInputs, HeadInputs, Scoring, collect, join
from .checks import IGNORE
from .examples import BaseObjective, device_numbers, sizes_of
from .objectives import as_objective
from .passes import forward_blocks, per_token, tail_weights
from .plan import MIB, default_workspace_mib, make_plan
from .result import PreferenceLoss, kl_metrics, metrics_of
from .streaming import Streamer


def outside(op: Callable) -> Callable:
    """What `compiled` leaves to Python."""
    return op


# ------------------------------------------------------------------------------------------- tokens
def logp(given: HeadInputs) -> Tensor:
    """`ops.linear_logp`."""
    given, fused = check_head(given)
    check_targets(given, fused)
    if nothing_scored(given, fused):
        return zeros(given)
    call = make_call(given, fused=fused)
    return of_tokens(call, given)


def nothing_scored(given: HeadInputs, fused: bool) -> bool:
    """Whether all targets are ignored, where it costs no synchronization to know."""
    on_host = not fused and given.target_N.device.type == "cpu"
    return on_host and bool((given.target_N == IGNORE).all())


def zeros(given: HeadInputs) -> Tensor:
    """What an op of tokens returns if no target is scored; it keeps the graph connected."""
    acc = torch.promote_types(given.h_TD.dtype, torch.float32)
    anchors = [x[:0].sum() for x in given[:3] if x is not None]
    zeros = torch.zeros(given.target_N.shape[0], dtype=acc, device=given.h_TD.device)
    return zeros + sum(anchors[1:], anchors[0]).to(acc)


def kl(given: HeadInputs) -> Tensor:
    """`ops.linear_kl`; there are no targets yet."""
    given, fused = check_head(given)
    if given.rows_N is not None:
        checks.check_tokens("rows_N", given.rows_N, given.h_TD.device)
    N = len(given.h_TD if given.rows_N is None else given.rows_N)
    if N == 0:
        raise ValueError("there is no row to compare: h_TD, or rows_N, is empty")
    # The streams gather a target anyway; the first token is as good as any.
    target_N = torch.zeros(N, dtype=torch.int64, device=given.h_TD.device)
    given = given._replace(target_N=target_N)
    check_targets(given, fused)
    call = call_of_both(given, fused)
    call.of_kl = True
    return of_tokens(call, given)


def logp_kl(given: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.linear_logp_kl`."""
    given, fused = check_head(given)
    check_targets(given, fused)
    if nothing_scored(given, fused):
        _require_reference(given)
        return zeros(given), zeros(given), zeros(given).detach()
    return of_tokens_kl(call_of_both(given, fused), given)


def call_of_both(given: HeadInputs, fused: bool) -> Call:
    """A call of tokens that streams the reference's head beside the policy's."""
    ref = _require_reference(given)
    call = make_call(given, fused=fused)
    call.ref, call.stats = ref, frozenset({"kl_ref"})
    _keep_nothing(call)
    return call


def _keep_nothing(call: Call) -> None:
    """Let the backward recompute: a row is a mixture of two distributions with unknown shares."""
    route, plan = "recompute" if any(call.needs) else "forward", call.plan
    call.plan = replace(plan, route=route, grad_tile_bytes=plan.tile_bytes)


def _require_reference(given: HeadInputs) -> Any:
    """The reference's head of an op that can't do without."""
    if given.ref_h_TD is None:
        raise TypeError("ref_h_TD must be a torch.Tensor, got NoneType")
    return _reference_head(given)


def of_tokens(call: Call, given: HeadInputs) -> Tensor:
    """Log-probs of the targets, or KLs, with a gradient where one is wanted."""
    if call.plan.route == "forward":
        with torch.no_grad(), plainly(given.h_TD.device):
            forward_blocks(call, *given[:3])
            return call.token_values()
    return LinearTokens.apply(*given[:3], call)  # type: ignore[return-value]


def of_tokens_kl(call: Call, given: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the targets, KLs and the reference's log-probs; the first two likewise."""
    if call.plan.route == "forward":
        with torch.no_grad(), plainly(given.h_TD.device):
            forward_blocks(call, *given[:3])
            return call.token_values_kl()
    return LinearTokensKL.apply(*given[:3], call)  # type: ignore[return-value]


# ----------------------------------------------------------------------------------------- examples
def preference(
    given: HeadInputs, inputs: ExampleInputs, objective: BaseObjective | Callable
) -> PreferenceLoss:
    """`ops.linear_preference_loss`."""
    given, fused = check_head(given)
    check_targets(given, fused)
    objective = as_objective(objective)
    edges, firsts, stats, ref = check_examples(given, inputs, objective, fused)
    # What the kernel would read and what is left out need not be made.
    known = fused and objective.code is not None
    values = check_values(objective, inputs, firsts, given.h_TD.device, not known)
    shares = objective.kl_shares
    mixes = shares is not None and set(sizes_of(firsts)) == {len(shares)}
    call = make_call(
        given, edges, firsts, fused=fused, splits=not objective.couples,
        unit_buffers=1 if objective.by_margin else min(2, max(sizes_of(firsts))), mixes=mixes,
    )  # fmt: skip
    call.ref, call.stats = ref, stats - {"logp"} | stats_of(objective)
    if mixes:
        call.shares = _known_shares(call, objective, given.h_TD.dtype)
    elif objective.needs_kl:
        _keep_nothing(call)
    weighs = objective.ld_alpha is not None
    # A long example's tokens have their signs before the kernel has seen their number.
    units = call.plan.route == "grouped" and any(group.unit for group in call.plan.groups)
    by_length = objective.length_normalized and units
    bounds_S1, lengths_S = _lengths(call, not known or weighs or by_length)
    ref_S = None if inputs.ref_logp_S is None else inputs.ref_logp_S.contiguous()
    scoring = Scoring(
        objective, call.edges, firsts, bounds_S1, lengths_S, ref_S, **values, shift=inputs.shift
    )
    if objective.needs_mean_length and scoring.mean_chosen_length is None:
        scoring.mean_chosen_length = mean_length(scoring)
    if weighs:
        scoring.token_weight_N = tail_weights(call.target_N, scoring)
    run: Callable = score_only if call.plan.route == "forward" else _differentiably
    loss, logp_S, ref_S = run(call, scoring, *given[:3])
    if scoring.results:
        scoring.lengths_S = join([result.lengths_S for result in scoring.results])
    entries = {"loss": loss, "logp_S": logp_S, "ref_logp_S": ref_S, "lengths_S": scoring.lengths_S}
    metrics, counts = metrics_of(scoring, logp_S, ref_S)
    if objective.needs_kl:
        metrics |= kl_metrics(scoring)
    return PreferenceLoss(entries, metrics, _stats(call, stats), call.plan, counts)


def _differentiably(call: Call, scoring: Scoring, *tensors: Tensor | None) -> Any:
    return LinearPreference.apply(*tensors, call, scoring)


def stats_of(objective: BaseObjective) -> set[str]:
    """Statistics of each token that an objective needs."""
    needs = {"log_sum_sq_probs": objective.needs_alignment, "kl_ref": objective.needs_kl}
    return {name for name, needed in needs.items() if needed}


def _known_shares(call: Call, objective: BaseObjective, dtype: torch.dtype) -> Shares:
    """How policy and reference are mixed in each token's gradient, without a synchronization."""
    assert objective.kl_shares is not None
    acc = torch.promote_types(dtype, torch.float32)
    device, sizes = call.target_N.device, [b - a for a, b in pairwise(call.edges)]
    shares = [torch.full((), share, dtype=acc, device=device) for share in objective.kl_shares]
    ref_N = per_token(shares * (len(sizes) // len(shares)), sizes)
    return Shares(1 - ref_N, ref_N)


def _stats(call: Call, wanted: frozenset[str]) -> dict[str, Tensor]:
    """The statistics that the caller asked for."""
    found = {name: x for name, x in call.token_stats().items() if name in wanted}
    if "logp" in wanted:
        found["logp"] = call.full(collect(call.blocks, "logp_N"))
    return found


def mean_length(scoring: Scoring) -> Tensor:
    """Mean over the examples of the first's tokens, and of the prompt's if the objective does."""
    lengths_S = scoring.lengths_S.double()
    if scoring.objective.needs_prompt:  # all that are not the rejected one's
        return (lengths_S.sum() - scoring.rows.of(lengths_S)[:, 1].sum()) / scoring.count
    return scoring.rows.of(lengths_S)[:, 0].mean()


def _lengths(call: Call, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    """Bounds on the device, for kernels, and scored tokens of each sequence.

    Kernels count those, so there they are made only if ``wanted`` before.
    """
    device = call.target_N.device
    if call.fused:
        from .fused import count_scored

        with plainly(device):
            bounds_S1 = device_numbers(call.edges, device)
            return bounds_S1, count_scored(call.target_N, bounds_S1) if wanted else None
    sizes = [b - a for a, b in pairwise(call.edges)]
    if device.type == "cpu":
        return None, torch.tensor(sizes)
    scored = (call.target_N != IGNORE).long().split(sizes)
    lengths_S = torch.stack([part.sum() for part in scored])
    checks.check_device_lengths(lengths_S)
    return None, lengths_S


# --------------------------------------------------------------------------------- checks and plan
def check_head(given: HeadInputs) -> tuple[HeadInputs, bool]:
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


def check_targets(given: HeadInputs, fused: bool) -> None:
    V = given.w_VD.shape[0]
    checks.check_targets(given.h_TD, V, given.target_N, given.rows_N, in_kernel=fused)


def check_examples(
    given: HeadInputs,
    inputs: ExampleInputs,
    objective: BaseObjective,
    fused: bool,
    *,
    empty: bool = False,
) -> tuple[list[int], tuple[int, ...], frozenset[str], Any]:
    """Bounds of the sequences and of the examples, names of statistics, and the reference's head.

    ``empty`` says that sequences may have no token.
    """
    firsts = inputs.firsts_P1
    pairs = firsts is None and objective.shape != "singles"
    edges = checks.check_bounds(inputs.bounds_S1, given.target_N, pairs=pairs, empty=empty)
    S = len(edges) - 1
    if firsts is None:
        firsts = range(0, S + 1, 2 if pairs else 1)
    firsts = checks.check_firsts(firsts, S, objective)
    stats = checks.check_stats(given.stats, given.ref_h_TD is not None)
    ref = _check_reference(given, inputs.ref_logp_S, S, objective, fused)
    return edges, firsts, stats, ref


def _check_reference(
    given: HeadInputs, ref_logp_S: Any, S: int, objective: BaseObjective, fused: bool
) -> Any:
    """Exactly one form of reference, or none."""
    ref_names = ("ref_logp_S", ref_logp_S), *zip(HeadInputs._fields[-3:], given[-3:])
    if not objective.needs_reference:
        for name, x in ref_names:
            if x is not None:
                raise ValueError(
                    f"{name} is given, but objective {checks.name_of(objective)} needs no "
                    "reference; leave it out"
                )
        return None
    if objective.needs_kl and (ref_logp_S is not None or given.ref_h_TD is None):
        raise ValueError(
            f"objective {checks.name_of(objective)} reads the KL to the reference over the whole "
            "vocabulary, which ref_logp_S, sums of log-probs, cannot give: pass the reference's "
            "hidden rows and head as ref_h_TD and ref_w_VD, without ref_logp_S"
        )
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


def check_values(
    objective: BaseObjective,
    given: ExampleInputs,
    firsts: tuple[int, ...],
    device: torch.device,
    neutral: bool,
) -> dict[str, Any]:
    """Numbers of each example and sequence as fp64; ``neutral`` ones for None if wanted."""
    named = given.margin_P is not None or given.smoothing_P is not None
    if named and not objective.takes_margin:
        raise ValueError(
            "margin_P and smoothing_P need an objective of the margin (lr_dpo, hinge, ipo, ...)"
        )
    checks.check_asked(objective, given.scores_S, given.desirable_P)
    S, P = firsts[-1], len(firsts) - 1
    inf = float("inf")
    ranges = (
        ("margin_P", P, -inf, inf, 0.0),
        ("smoothing_P", P, 0.0, 1.0, 0.0),
        ("weight_P", P, 0.0, inf, 1.0),
        ("scores_S", S, -inf, inf, None),
        ("desirable_P", P, 0.0, 1.0, None),
    )
    values: dict[str, Any] = {}
    for name, count, low, high, value in ranges:
        x = getattr(given, name)
        if x is not None:
            checks.check_vector(name, x, count, name[-1], device, low=low, high=high)
            if name == "desirable_P":
                checks.require_values(name, x, (x == 0) | (x == 1), "0.0 or 1.0")
            x = x.double().contiguous()
        elif neutral and value is not None:
            x = torch.full((count,), value, dtype=torch.float64, device=device)
        values[name] = x
    if objective.smoothing_above is not None:  # the pair kernel doesn't look
        checks.require_smoothing(objective, values["smoothing_P"] if named else None)
    values["num_pairs"] = float(P)
    for name in ("num_pairs", "mean_chosen_length"):
        x = getattr(given, name)
        if x is not None:
            values[name] = checks.require_number(name, x, low=0, open_low=True)
    checks.require_number("shift", given.shift)
    return values


def make_call(
    given: HeadInputs,
    edges: list[int] | None = None,
    firsts: tuple[int, ...] | None = None,
    *,
    fused: bool,
    splits: bool = True,
    unit_buffers: int = 1,
    mixes: bool = False,
) -> Call:
    """Leave ignored targets out where that costs no synchronization, and plan the call.

    ``edges`` are the bounds of the sequences, None for tokens without; ``firsts``, ``splits`` and
    ``unit_buffers`` as in `make_plan`.
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
        assert firsts is not None
        checks.check_lengths([b - a for a, b in pairwise(edges)], firsts)
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
        firsts=firsts,
        splits=splits,
        unit_buffers=unit_buffers,
        fused_itemsize=h_TD.itemsize if fused else None,
        gathered=rows_N is not None,
        mixes=mixes,
    )
    return Call(
        given.scale, given.softcap, rows_N, target_N, keep_N, num_targets, needs, plan,
        edges or [], fused, streamer,
    )  # fmt: skip
