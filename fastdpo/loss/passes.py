"""One call's way through the head: the routes of `plan`, over whole packed batches.

Every route first gives the log-probs of the scored tokens.  `token_backward` then takes any
coefficient a token; `grouped_pass` finishes the gradients in the forward, because its workspace is
used again for every group of examples.

Legend: T hidden rows, N scored tokens, D hidden, V vocabulary, P examples, S sequences.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import Block, Grads, Shares, coefficients
from .call import Call, Scoring, Sums, collect, join
from .checks import IGNORE
from .plan import Group

# Gradients are made of whole rows, whatever the layout of what they belong to.
_ROWS = torch.contiguous_format
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of h, w and bias


# --------------------------------------------------------------------------------------- examples
class Share(NamedTuple):
    """Some examples' share of the loss, their sums, its derivative by those and by each token."""

    loss: Tensor
    logp_S: Tensor
    ref_logp_S: Tensor
    slope_S: Tensor | None
    coef_N: Tensor | None
    kl_coef_N: Tensor | None = None  # where it is not a known multiple of the other


def score(call: Call, scoring: Scoring, blocks: list[Block], *, slopes: bool = True) -> Share:
    """Loss and slopes of the examples whose tokens ``blocks`` have, by a kernel in one launch."""
    logp_N, ref_logp_N = collect(blocks, "logp_N"), collect(blocks, "ref_logp_N")
    weight_N = scoring.token_weight_N
    if weight_N is not None:  # in fp64, as those of a reference that was weighted before
        logp_N = logp_N * weight_N
        ref_logp_N = None if ref_logp_N is None else ref_logp_N * weight_N
    if call.fused and scoring.objective.code is not None:
        share = _by_kernel(call, scoring, logp_N, ref_logp_N, slopes=slopes)
    else:
        sums = _sums(call, scoring, blocks, logp_N, ref_logp_N)
        if not slopes:
            return Share(scoring.loss(sums), *sums[:2], None, None)
        loss, slope_S, kl_slope_S = scoring.loss_and_slopes(sums)
        share = Share(loss, *sums[:2], slope_S, per_token(slope_S, scoring.sizes))
        if kl_slope_S is not None and call.shares is None:
            share = share._replace(kl_coef_N=per_token(kl_slope_S, scoring.sizes))
    if weight_N is not None and share.coef_N is not None:
        share = share._replace(coef_N=share.coef_N * weight_N)
    return share


def _by_kernel(
    call: Call, scoring: Scoring, logp_N: Tensor, ref_logp_N: Tensor | None, *, slopes: bool
) -> Share:
    from ..kernels import pair  # only where Triton is

    found = pair.pair_losses(
        logp_N, _targets(call, scoring), _bounds(scoring), scoring.objective,
        ref_logp_S=scoring.ref_logp_S, ref_logp_N=ref_logp_N, margin_P=scoring.margin_P,
        smoothing_P=scoring.smoothing_P, weight_P=scoring.weight_P, num_pairs=scoring.num_pairs,
        want_coef=slopes,
    )  # fmt: skip
    scoring.results.append(found)
    return Share(found.totals[0], found.logp_S, found.ref_logp_S, found.slope_S, found.coef_N)


def _sums(
    call: Call, scoring: Scoring, blocks: list[Block], logp_N: Tensor, ref_logp_N: Tensor | None
) -> Sums:
    """What the objective reads of each sequence, by a kernel in one launch."""
    dtype, ref_S = scoring.sum_dtype(blocks[0].logp_N.dtype), scoring.ref_logp_S
    gap_N = kl_S = None
    if scoring.objective.needs_kl:
        kl_S = _kl_sums(call, scoring, join([block.stats["kl_ref"] for block in blocks]))
        scoring.kl_sums.append(kl_S)
    if scoring.objective.needs_alignment:  # zero where a target is ignored
        squares_N = join([block.stats["log_sum_sq_probs"] for block in blocks])
        gap_N = collect(blocks, "logp_N").double() - squares_N
    if call.fused:
        from ..kernels import pair  # only where Triton is

        found = pair.sequence_sums(
            logp_N, _targets(call, scoring), _bounds(scoring), dtype, ref_logp_S=ref_S,
            ref_logp_N=ref_logp_N, gap_N=gap_N,
        )  # fmt: skip
        return Sums(found.logp_S, found.ref_logp_S, kl_S, found.gap_S)
    logp_S = sequence_sums(logp_N, scoring, dtype)
    if ref_S is None:
        ref_S = torch.zeros_like(logp_S)
        if ref_logp_N is not None:
            ref_S = sequence_sums(ref_logp_N, scoring, dtype)
    if gap_N is None:
        return Sums(logp_S, ref_S, kl_S)
    means_S = sequence_sums(gap_N, scoring, torch.float64) / scoring.lengths_S
    return Sums(logp_S, ref_S, kl_S, means_S)


def _kl_sums(call: Call, scoring: Scoring, kl_N: Tensor) -> Tensor:
    """Of each sequence in fp64; a KL is 0 where a target is ignored."""
    if not call.fused:
        return sequence_sums(kl_N, scoring, torch.float64)
    from ..kernels import pair  # only where Triton is

    targets_N, bounds_S1 = _targets(call, scoring), _bounds(scoring)
    return pair.sequence_sums(kl_N, targets_N, bounds_S1, torch.float64).logp_S


def tail_weights(
    target_N: Tensor, scoring: Scoring, here: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """1.0 for as many tokens of a pair's longer side as the other has, ``ld_alpha`` for the rest.

    ``here`` are the scored tokens of each sequence that are among the targets, and those that come
    before them; by default all and none. (N,) fp64.
    """
    lengths_S, sizes, ld_alpha = scoring.lengths_S, scoring.sizes, scoring.objective.ld_alpha
    assert ld_alpha is not None
    here_S, earlier_S = here or (lengths_S, 0)
    before_S = here_S.cumsum(0) - here_S - earlier_S
    place_N = (target_N != IGNORE).cumsum(0) - per_token(before_S, sizes)  # from 1
    shared_S = lengths_S.view(-1, 2).amin(1).repeat_interleave(2)
    weight_N = torch.ones(len(target_N), dtype=torch.float64, device=target_N.device)
    return weight_N.masked_fill_(place_N > per_token(shared_S, sizes), ld_alpha)


def _targets(call: Call, scoring: Scoring) -> Tensor:
    return call.target_N[scoring.edges[0] : scoring.edges[-1]]


def _bounds(scoring: Scoring) -> Tensor:
    """From the first token of the examples."""
    start = scoring.edges[0]
    return scoring.bounds_S1 - start if start else scoring.bounds_S1


def sequence_sums(x_N: Tensor, scoring: Scoring, dtype: torch.dtype) -> Tensor:
    """Over each sequence."""
    return torch.stack([part.sum(dtype=dtype) for part in x_N.split(scoring.sizes)])


def per_token(x_S: Iterable[Tensor], sizes: list[int]) -> Tensor:
    """Repeat each sequence's number over its tokens, without a wait for the device."""
    return torch.cat([x.expand(size) for x, size in zip(x_S, sizes)])


# ---------------------------------------------------------------------------------------- forward
def _run_block(call: Call, streamer: Any, span: tuple[int, int], *, keep: bool) -> Block:
    """Forward of one block, which is left in ``call``."""
    ref = call.open_reference()
    shares = None if call.shares is None else call.shares.rows(slice(*span))
    block = streamer.forward(span, keep=keep, stats=call.stats, ref=ref, shares=shares)
    call.blocks.append(block)
    return block


def forward_blocks(call: Call, h_TD: Tensor, w_VD: Tensor, bias_V: Tensor | None) -> None:
    """Leave the log-probs of all scored tokens, and what a backward reads, in the call's blocks."""
    streamer = call.open(h_TD, w_VD, bias_V)
    call.blocks = []
    for span in call.plan.spans:
        _run_block(call, streamer, span, keep=call.plan.route == "stash").tokens = None


def frozen_forward(call: Call, h_TD: Tensor, w_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """The same where the head has no gradient: d logp / d h of each scored token, (N, D)."""
    streamer = call.open(h_TD, w_VD, bias_V)
    dtype = h_TD.dtype if call.plan.in_place else streamer.acc_dtype
    unit_ND = torch.empty(call.target_N.shape[0], h_TD.shape[1], dtype=dtype, device=h_TD.device)
    ones_N = torch.ones(len(unit_ND), dtype=streamer.acc_dtype, device=h_TD.device)
    call.blocks = []
    for span in call.plan.spans:
        block, rows = _run_block(call, streamer, span, keep=True), slice(*span)
        streamer.backward(block, ones_N[rows], Grads(), add=True, out_ND=unit_ND[rows])
        block.free()
    return unit_ND


# --------------------------------------------------------------------------------------- backward
def token_backward(
    call: Call,
    saved: tuple[Tensor | None, ...],
    coef_N: Tensor,
    upstream: Tensor | None = None,
    *,
    kl_coef_N: Tensor | None = None,
    reuse: bool = False,
) -> Gradients:
    """Gradients of ``upstream * sum coef * logp`` by the frozen, stash or recompute route.

    With ``reuse`` nobody will ask for them again, so what was kept may be overwritten.  Those of
    ``sum coef * KL(ref || policy)``, or of ``sum coef * logp + kl_coef * KL``, are always
    recomputed.
    """
    h_TD, w_VD, bias_V, unit_ND = saved
    assert h_TD is not None and w_VD is not None
    streamer = call.open(h_TD, w_VD, bias_V)
    into = _new_grads(call, streamer, whole=True)
    if unit_ND is not None:
        coef_N = coefficients(call.target_N, coef_N, upstream, streamer.acc_dtype)
        into.h = streamer.place(unit_ND, coef_N, reuse=reuse)
    elif call.plan.route == "stash":
        into.h = streamer.backward(
            call.blocks[0], coef_N, into, add=False, whole=True, upstream=upstream
        )
    else:
        shares = Shares.of_kl(coef_N) if call.of_kl else call.shares
        if kl_coef_N is not None:
            coef_N, shares = Shares.of(coef_N, kl_coef_N)
        ref = call.open_reference() if shares is not None else None
        streamer.recompute_backward(
            call.blocks, coef_N, into, upstream, ref=ref, shares=shares, targets=not call.of_kl
        )
    return rounded(call, into, h_TD.dtype)


def _new_grads(call: Call, streamer: Any, *, whole: bool = False) -> Grads:
    """Accumulators of the head's gradients; that of the weight is cleared only if it is added to.

    A ``whole`` call writes it chunk by chunk, in its own dtype; kernels write before they add.
    """
    w_VD, bias_V, acc, into = streamer.head.w_VD, streamer.head.bias_V, streamer.acc_dtype, Grads()
    if call.needs.w:
        new = torch.empty_like if whole or call.fused else torch.zeros_like
        into.w = new(w_VD, dtype=w_VD.dtype if whole else acc, memory_format=_ROWS)
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
            from ..kernels import scatter  # only where Triton is

            scatter.row_sums(out, base_ID=x, base_factor=factor)
            return out
        for part, rows in zip(out.split(4096), x.split(4096)):
            part.copy_(rows if factor is None else rows * factor.to(x.dtype))
        return out

    return finish(grads.h), finish(grads.w), finish(grads.bias)


# ----------------------------------------------------------------------------------------- groups
def grouped_pass(
    call: Call, scoring: Scoring, h_TD: Tensor, w_VD: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Grads]:
    """Loss, log-prob sums of policy and reference, and the finished fp32 gradients."""
    streamer = call.open(h_TD, w_VD, bias_V)
    # The buffers of a unit become the total, so none are needed beside them.
    total = Grads() if call.plan.groups[0].unit else _new_grads(call, streamer)
    if call.needs.h:
        total.h = torch.zeros_like(h_TD, dtype=streamer.acc_dtype, memory_format=_ROWS)
    call.blocks = []
    parts: list[Share] = []
    for group in call.plan.groups:
        run = _unit_group if group.unit else _stash_group
        parts.append(run(call, scoring.part(*group.examples), group, streamer, total))
    loss = torch.stack([part.loss for part in parts]).sum()
    logp_S = join([part.logp_S for part in parts])
    return loss, logp_S, join([part.ref_logp_S for part in parts]), total


def _stash_group(call: Call, scoring: Scoring, group: Group, streamer: Any, total: Grads) -> Share:
    """Examples whose stash fits the workspace."""
    block = _run_block(call, streamer, group.rows, keep=True)
    share = score(call, scoring, [block])
    first = group is call.plan.groups[0]
    dh_ND = streamer.backward(block, share.coef_N, total, add=not first)
    block.free()
    if total.h is not None:
        streamer.add_rows(total.h, group.rows, dh_ND)
    return share


def _unit_group(call: Call, scoring: Scoring, group: Group, streamer: Any, total: Grads) -> Share:
    """A pair, or a single response, longer than the workspace.

    Its unit gradients, those of ``sum sign * logp``, are accumulated block by block and multiplied
    by the pair's scalar once the loss is known.  An objective whose two sides have scalars of
    their own needs the weight's unit gradient of each side.
    """
    sizes, by_margin = scoring.sizes, scoring.objective.by_margin
    h_TD = streamer.rows.h_TD
    sign_S = scoring.objective.token_signs(scoring.lengths_S, len(sizes), h_TD.device)
    sign_N = per_token(sign_S, sizes)
    if scoring.token_weight_N is not None:
        sign_N = sign_N * scoring.token_weight_N
    offset, middle = group.rows[0], group.rows[0] + sizes[0]
    units = [_new_grads(call, streamer) for _ in range(1 if by_margin else len(sizes))]
    unit_h = None
    if total.h is not None:
        unit_h = h_TD.new_empty(sum(sizes), h_TD.shape[1], dtype=streamer.acc_dtype)
    blocks = []
    for start, stop in group.spans:
        block = _run_block(call, streamer, (start, stop), keep=True)
        unit = units[0] if by_margin else units[start >= middle]
        rows = slice(start - offset, stop - offset)
        first = start == offset or (start == middle and not by_margin)
        dh_ND = streamer.backward(block, sign_N[rows], unit, add=not first)
        if unit_h is not None:
            unit_h[rows] = dh_ND
        block.free()
        blocks.append(block)
    share = score(call, scoring, blocks)
    assert share.slope_S is not None
    scalar_S = (share.slope_S / sign_S).to(streamer.acc_dtype)
    for unit, scalar in zip(units, scalar_S):
        total.w = _add_scaled(total.w, unit.w, scalar)
        total.bias = _add_scaled(total.bias, unit.bias, scalar)
    if total.h is not None and unit_h is not None:
        scalar_N = per_token(scalar_S, sizes)
        streamer.add_rows(total.h, group.rows, unit_h.mul_(scalar_N[:, None]))
    return share


def _add_scaled(total: Tensor | None, unit: Tensor | None, scalar: Tensor) -> Tensor | None:
    if unit is None:
        return total
    unit.mul_(scalar)
    return unit if total is None else total.add_(unit)
