"""One call's way through the head: the routes of `plan`, over whole packed batches.

Every route first gives the log-probs of the scored tokens.  `token_backward` then takes any
coefficient a token; `grouped_pass` finishes the gradients in the forward, because its workspace is
used again for every group of pairs.

Legend: T hidden rows, N scored tokens, D hidden, V vocabulary, P pairs, S = 2P sequences.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call import Call, Pairs, join
from .plan import Group
from .streaming import IGNORE, Block, Grads, TokenRows

# Gradients are made of whole rows, whatever the layout of what they belong to.
_ROWS = torch.contiguous_format
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of h, w and bias


# ------------------------------------------------------------------------------------------ pairs
class Share(NamedTuple):
    """Some pairs' share of the loss, their sums, and its derivative by those and by each token."""

    loss: Tensor
    logp_S: Tensor
    ref_logp_S: Tensor
    slope_S: Tensor | None
    coef_N: Tensor | None


def score(
    call: Call,
    pairs: Pairs,
    logp_N: Tensor,
    ref_logp_N: Tensor | None,
    part: tuple[int, int] | None = None,
    *,
    slopes: bool = True,
) -> Share:
    """Loss and slopes of the pairs whose tokens are given: all, or those from ``part``."""
    first, last = part or (0, len(pairs.edges) // 2)
    sizes = pairs.sizes[2 * first : 2 * last]
    if call.fused:
        from .fused import launch_pairs  # only where Triton is

        found = launch_pairs(call, pairs, logp_N, ref_logp_N, (first, last), slopes=slopes)
        if pairs.by_kernel:
            loss, slope_S = found.totals[0], found.slope_S
            return Share(loss, found.logp_S, found.ref_logp_S, slope_S, found.coef_N)
        logp_S, ref_S = found.logp_S, found.ref_logp_S
    else:
        logp_S = pairs.sums(logp_N, sizes)
        if pairs.ref_logp_S is not None:
            ref_S = pairs.ref_logp_S[2 * first : 2 * last]
        else:
            assert ref_logp_N is not None
            ref_S = pairs.sums(ref_logp_N, sizes)
    if not slopes:
        return Share(pairs.loss(logp_S, ref_S, slice(first, last)), logp_S, ref_S, None, None)
    loss, slope_S = pairs.loss_and_slope(logp_S, ref_S, slice(first, last))
    return Share(loss, logp_S, ref_S, slope_S, _per_token(slope_S, sizes))


def _per_token(x_S: Tensor, sizes: list[int]) -> Tensor:
    """Repeat each sequence's number over its tokens, without a wait for the device."""
    return torch.cat([x.expand(size) for x, size in zip(x_S, sizes)])


def ref_logps(call: Call) -> Tensor | None:
    """Log-probs of the reference, where it was streamed beside the policy."""
    return None if call.ref is None else call.collect(lambda block: block.ref_logp_N)


# ---------------------------------------------------------------------------------------- forward
def _run_block(
    call: Call, streamer: Any, rows: TokenRows, span: tuple[int, int], *, keep: bool
) -> tuple[Tensor, Tensor, Block]:
    """Hidden rows, targets and forward of one block, which is left in ``call``."""
    h_ND, target_N = streamer.rows_of(rows, *span)
    ref = call.open_reference()
    if ref is not None:
        other, ref_rows = ref
        ref = other, other.rows_of(ref_rows, *span)[0]
    block = streamer.forward(h_ND, target_N, keep=keep, stats=call.stats, ref=ref)
    call.blocks.append((*span, block))
    return h_ND, target_N, block


def forward_blocks(call: Call, h_TD: Tensor, w_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Log-probs of all scored tokens; leaves the blocks that a backward reads in ``call``."""
    streamer, rows = call.open(h_TD, w_VD, bias_V)
    call.blocks = []
    for span in call.plan.spans:
        _run_block(call, streamer, rows, span, keep=call.plan.route == "stash")
    return call.collect(lambda block: block.logp_N)


def frozen_forward(
    call: Call, h_TD: Tensor, w_VD: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probs, and d logp / d h of each scored token, (N, D): the head itself has no gradient."""
    streamer, rows = call.open(h_TD, w_VD, bias_V)
    dtype = h_TD.dtype if call.plan.in_place else streamer.acc_dtype
    unit_ND = torch.empty(call.target_N.shape[0], h_TD.shape[1], dtype=dtype, device=h_TD.device)
    ones_N = torch.ones(len(unit_ND), dtype=streamer.acc_dtype, device=h_TD.device)
    call.blocks = []
    for start, stop in call.plan.spans:
        h_ND, target_N, block = _run_block(call, streamer, rows, (start, stop), keep=True)
        streamer.backward(
            block, h_ND, target_N, ones_N[start:stop], call.needs, Grads(), final=False,
            out_ND=unit_ND[start:stop],
        )  # fmt: skip
        block.stash = None
    return call.collect(lambda block: block.logp_N), unit_ND


# --------------------------------------------------------------------------------------- backward
def token_backward(
    call: Call,
    saved: tuple[Tensor | None, ...],
    coef_N: Tensor,
    upstream: Tensor | None = None,
    *,
    reuse: bool = False,
) -> Gradients:
    """Gradients of ``upstream * sum coef * logp`` by the frozen, stash or recompute route.

    With ``reuse`` nobody will ask for them again, so what was kept may be overwritten.
    """
    h_TD, w_VD, bias_V, unit_ND = saved
    assert h_TD is not None and w_VD is not None
    streamer, rows = call.open(h_TD, w_VD, bias_V)
    into = _whole_grads(call, w_VD, bias_V)
    if unit_ND is not None:
        coef_N = coef_N if upstream is None else coef_N * upstream
        coef_N = torch.where(call.target_N == IGNORE, 0.0, coef_N).to(streamer.acc_dtype)
        into.h = streamer.place(rows, unit_ND, coef_N, reuse=reuse)
    elif call.plan.route == "stash":
        (start, stop, block), *_ = call.blocks
        h_ND, target_N = streamer.rows_of(rows, start, stop)
        into.h = streamer.backward(
            block, h_ND, target_N, coef_N, call.needs, into, final=True, rows=rows,
            upstream=upstream,
        )  # fmt: skip
    else:
        streamer.recompute_backward(call.blocks, rows, coef_N, call.needs, into, upstream=upstream)
    return rounded(call, into, h_TD.dtype)


def kl_backward(call: Call, saved: tuple[Tensor, ...], coef_N: Tensor) -> Gradients:
    """Gradients of ``sum coef * KL(ref || policy)``."""
    h_TD, w_VD, bias_V = saved
    streamer, rows = call.open(h_TD, w_VD, bias_V)
    into = _whole_grads(call, w_VD, bias_V)
    ref = call.open_reference()
    streamer.recompute_backward(call.blocks, rows, coef_N, call.needs, into, ref)
    return rounded(call, into, h_TD.dtype)


def _whole_grads(call: Call, w_VD: Tensor, bias_V: Tensor | None) -> Grads:
    """Where the whole call writes: the weight's chunk by chunk, so it is not cleared."""
    into = Grads()
    if call.needs.w:
        into.w = torch.empty_like(w_VD, memory_format=_ROWS)
    if bias_V is not None and call.needs.bias:
        into.bias = torch.zeros_like(bias_V, dtype=torch.promote_types(w_VD.dtype, torch.float32))
    return into


def _new_grads(
    call: Call, h_TD: Tensor, w_VD: Tensor, bias_V: Tensor | None, *, w: bool = True
) -> Grads:
    """Accumulators; the kernels write the weight's before they add to it, so it is not cleared."""
    acc = torch.promote_types(h_TD.dtype, torch.float32)
    new, into = torch.empty_like if call.fused else torch.zeros_like, Grads()
    if call.needs.h:
        into.h = torch.zeros_like(h_TD, dtype=acc, memory_format=_ROWS)
    if w and call.needs.w:
        into.w = new(w_VD, dtype=acc, memory_format=_ROWS)
    if bias_V is not None and call.needs.bias:
        into.bias = torch.zeros_like(bias_V, dtype=acc)
    return into


def rounded(
    call: Call, grads: Grads, dtype: torch.dtype, factor: Tensor | None = None
) -> Gradients:
    """The gradients times ``factor``, rounded once, without a second copy in fp32."""

    def finish(x: Tensor | None) -> Tensor | None:
        if x is None or (factor is None and x.dtype == dtype):
            return x
        out = torch.empty_like(x, dtype=dtype, memory_format=_ROWS)
        if call.fused and x.ndim == 2:
            from .fused import scale_into

            scale_into(out, x, factor)
            return out
        for part, rows in zip(out.split(4096), x.split(4096)):
            part.copy_(rows if factor is None else rows * factor.to(x.dtype))
        return out

    return finish(grads.h), finish(grads.w), finish(grads.bias)


# ----------------------------------------------------------------------------------------- groups
def grouped_pass(
    call: Call, pairs: Pairs, h_TD: Tensor, w_VD: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Grads]:
    """Loss, log-prob sums of policy and reference, and the finished fp32 gradients."""
    streamer, rows = call.open(h_TD, w_VD, bias_V)
    first_is_unit = call.plan.groups[0].unit
    total = _new_grads(call, h_TD, w_VD, bias_V, w=not first_is_unit)
    if first_is_unit:  # its buffers become the total, so none are needed beside them
        total.bias = None
    call.blocks = []
    parts: list[Share] = []
    for group in call.plan.groups:
        run = _unit_group if group.unit else _stash_group
        parts.append(run(call, pairs, group, streamer, rows, total))
    loss = torch.stack([part.loss for part in parts]).sum()
    logp_S = join([part.logp_S for part in parts])
    return loss, logp_S, join([part.ref_logp_S for part in parts]), total


def _stash_group(
    call: Call, pairs: Pairs, group: Group, streamer: Any, rows: TokenRows, total: Grads
) -> Share:
    """Pairs whose stash fits the workspace."""
    h_ND, target_N, block = _run_block(call, streamer, rows, group.rows, keep=True)
    share = score(call, pairs, block.logp_N, block.ref_logp_N, group.pairs)
    final = call.fused and group is call.plan.groups[0]
    dh_ND = streamer.backward(block, h_ND, target_N, share.coef_N, call.needs, total, final=final)
    block.stash = None
    if total.h is not None and dh_ND is not None:
        streamer.add_rows(rows, total.h, *group.rows, dh_ND)
    return share


def _unit_group(
    call: Call, pairs: Pairs, group: Group, streamer: Any, rows: TokenRows, total: Grads
) -> Share:
    """A pair longer than the workspace.

    Its unit gradients, those of ``sum sign * logp``, are accumulated block by block and multiplied
    by the pair's scalar once the loss is known.  An objective whose two sides have scalars of
    their own needs the weight's unit gradient of each side.
    """
    sides = slice(2 * group.pairs[0], 2 * group.pairs[1])
    sizes, by_margin = pairs.sizes[sides], pairs.objective.by_margin
    lengths_S = None if pairs.lengths_S is None else pairs.lengths_S[sides]
    sign_S = pairs.objective.token_signs(lengths_S, 2, pairs.device)
    sign_N = _per_token(sign_S, sizes)
    offset, middle = group.rows[0], group.rows[0] + sizes[0]
    w_VD, bias_V = streamer.head.w_VD, streamer.head.bias_V
    units = [_new_grads(call, rows.h_TD[:0], w_VD, bias_V) for _ in range(1 if by_margin else 2)]
    unit_h = None
    if total.h is not None:
        shape = sum(sizes), rows.h_TD.shape[1]
        unit_h = torch.empty(shape, dtype=streamer.acc_dtype, device=rows.h_TD.device)
    blocks = []
    for start, stop in group.spans:
        h_ND, target_N, block = _run_block(call, streamer, rows, (start, stop), keep=True)
        unit = units[0] if by_margin else units[start >= middle]
        coef_N = sign_N[start - offset : stop - offset]
        writes = call.fused and (start == offset or (start == middle and not by_margin))
        dh_ND = streamer.backward(block, h_ND, target_N, coef_N, call.needs, unit, final=writes)
        if unit_h is not None:
            unit_h[start - offset : stop - offset] = dh_ND
        block.stash = None
        blocks.append(block)
    logp_N = torch.cat([block.logp_N for block in blocks])
    found = [block.ref_logp_N for block in blocks if block.ref_logp_N is not None]
    share = score(call, pairs, logp_N, torch.cat(found) if found else None, group.pairs)
    assert share.slope_S is not None
    scalar_S = (share.slope_S / sign_S).to(streamer.acc_dtype)
    for unit, scalar in zip(units, scalar_S):
        total.w = _add_scaled(total.w, unit.w, scalar)
        total.bias = _add_scaled(total.bias, unit.bias, scalar)
    if total.h is not None and unit_h is not None:
        scalar_N = _per_token(scalar_S, sizes)
        streamer.add_rows(rows, total.h, *group.rows, unit_h.mul_(scalar_N[:, None]))
    return share


def _add_scaled(total: Tensor | None, unit: Tensor | None, scalar: Tensor) -> Tensor | None:
    if unit is None:
        return total
    unit.mul_(scalar)
    return unit if total is None else total.add_(unit)
