"""One call's way through the head: the routes of `fastdpo.loss.plan`, over whole packed batches.

Every route first gives the log-probs of the scored tokens.  `token_backward` then takes any
coefficient a token; `grouped_pass` finishes the gradients in the forward, because its workspace is
used again for every group of pairs.

Legend: T hidden rows, N scored tokens, D hidden, V vocabulary, P pairs, S = 2P sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.loss.checks import check_pair_losses
from fastdpo.loss.plan import Group, Plan
from fastdpo.loss.streaming import IGNORE, Block, Grads, Head, Needs, Rows, Streamer

if TYPE_CHECKING:
    from fastdpo.loss.fused import FusedStreamer

# Gradients are made of whole rows, whatever the layout of what they belong to.
_ROWS = torch.contiguous_format
# A custom objective: see `fastdpo.objectives`.
ObjectiveFn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Call:
    """One validated call: what the autograd Functions need beside the differentiable tensors."""

    scale: float
    softcap: float | None
    rows_N: Tensor | None
    target_N: Tensor
    keep_N: Tensor | None  # positions of the scored targets, where ignored ones were left out
    num_targets: int
    needs: Needs
    plan: Plan
    edges: list[int]
    fused: bool  # by the Triton kernels
    bounds_S1: Tensor | None = None  # the edges on the device, for the kernels
    stats: frozenset[str] = frozenset()
    ref: tuple[Head, Tensor] | None = None
    blocks: list[tuple[int, int, Block]] = field(default_factory=list)

    def streamer(self, w_VD: Tensor, bias_V: Tensor | None) -> "Streamer | FusedStreamer":
        return self.streamer_of(Head(w_VD, bias_V, self.scale, self.softcap))

    def streamer_of(self, head: Head) -> "Streamer | FusedStreamer":
        """The implementation of this call, with a head."""
        if not self.fused:
            return Streamer(head, self.plan)
        from fastdpo.loss.fused import FusedStreamer  # only where Triton is

        return FusedStreamer(head, self.plan)

    def full(self, x_N: Tensor) -> Tensor:
        """Put values of the scored targets back among the ignored ones."""
        if self.keep_N is None:
            return x_N
        return x_N.new_zeros(self.num_targets).index_copy_(0, self.keep_N, x_N)

    def collect(self, name: Callable[[Block], Tensor | None]) -> Tensor:
        return join([x for _, _, block in self.blocks if (x := name(block)) is not None])

    def token_stats(self) -> dict[str, Tensor]:
        return {
            name: self.full(self.collect(lambda block, name=name: block.stats[name]))
            for name in sorted(self.stats)
        }


def join(parts: list[Tensor]) -> Tensor:
    """One after the other; of a single one no copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass
class Pairs:
    """The per-pair side of a call: everything the objective reads beside the log-probs.

    ``lengths_S``, and margin, smoothing and weight with their neutral values, are None where only
    a kernel would read them.
    """

    objective: ObjectiveFn
    edges: list[int]
    lengths_S: Any
    ref_logp_S: Tensor | None
    margin_P: Any
    smoothing_P: Any
    weight_P: Any
    num_pairs: float
    device: torch.device
    results: list[Any] = field(default_factory=list)  # what a kernel found of some pairs each

    @property
    def sizes(self) -> list[int]:
        return [stop - start for start, stop in pairwise(self.edges)]

    def sums(self, logp_N: Tensor, sizes: list[int] | None = None) -> Tensor:
        """Sum over each sequence, in the reference's precision."""
        dtype = self.dtype(logp_N)
        parts = logp_N.split(self.sizes if sizes is None else sizes)
        return torch.stack([part.sum(dtype=dtype) for part in parts])

    def dtype(self, logp_N: Tensor) -> torch.dtype:
        ref = logp_N.dtype if self.ref_logp_S is None else self.ref_logp_S.dtype
        return torch.promote_types(ref, torch.float32)

    def loss(self, logp_S: Tensor, ref_logp_S: Tensor, pairs: slice) -> Tensor:
        """Loss of each pair of a slice, fp64: these are few numbers, and sums are large."""
        ratio_S = logp_S.double() - ref_logp_S.double()
        lengths_S = self.lengths_S[2 * pairs.start : 2 * pairs.stop].double()
        loss_P = self.objective(
            ratio_S[0::2],
            ratio_S[1::2],
            lengths_S[0::2],
            lengths_S[1::2],
            self.margin_P[pairs],
            self.smoothing_P[pairs],
        )
        check_pair_losses(loss_P, pairs.stop - pairs.start)
        return loss_P * self.weight_P[pairs]

    def loss_and_slope(
        self, logp_S: Tensor, ref_logp_S: Tensor, pairs: slice
    ) -> tuple[Tensor, Tensor]:
        """Summed loss over ``num_pairs`` of a slice, and its derivative by each sequence's sum."""
        with torch.enable_grad():
            leaf_S = logp_S.detach().double().requires_grad_()
            loss = self.loss(leaf_S, ref_logp_S, pairs).sum() / self.num_pairs
            if not loss.requires_grad:
                raise ValueError(
                    "objective must return a function of the log-ratios; it has no gradient"
                )
            (slope_S,) = torch.autograd.grad(loss, leaf_S)
        return loss.detach(), slope_S

    @property
    def is_margin(self) -> bool:
        return getattr(self.objective, "margin", False)

    def unit_signs(self) -> Tensor:
        """Token coefficient of each sequence up to its pair's scalar; only margin objectives."""
        sign_S = torch.ones(len(self.sizes), dtype=torch.float64, device=self.device)
        if self.is_margin:
            sign_S[1::2] = -1.0
            if getattr(self.objective, "length_normalized", False):
                sign_S = sign_S / self.lengths_S
        return sign_S


class Scored(NamedTuple):
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
) -> Scored:
    """Loss and slopes of the pairs whose tokens are given: all, or those from ``part``."""
    first, last = part or (0, len(pairs.edges) // 2)
    if call.fused:
        from fastdpo.loss.fused import score_pairs

        return score_pairs(call, pairs, logp_N, ref_logp_N, (first, last), slopes=slopes)
    sizes = pairs.sizes[2 * first : 2 * last]
    logp_S = pairs.sums(logp_N, sizes)
    if pairs.ref_logp_S is not None:
        ref_S = pairs.ref_logp_S[2 * first : 2 * last]
    else:
        assert ref_logp_N is not None
        ref_S = pairs.sums(ref_logp_N, sizes)
    if not slopes:
        loss = pairs.loss(logp_S, ref_S, slice(first, last)).sum() / pairs.num_pairs
        return Scored(loss, logp_S, ref_S, None, None)
    loss, slope_S = pairs.loss_and_slope(logp_S, ref_S, slice(first, last))
    return Scored(loss, logp_S, ref_S, slope_S, per_token(slope_S, sizes))


def per_token(x_S: Tensor, sizes: list[int]) -> Tensor:
    """Repeat each sequence's number over its tokens; on a GPU this waits for the copy of sizes."""
    counts_S = torch.tensor(sizes, device=x_S.device)
    return torch.repeat_interleave(x_S, counts_S, output_size=sum(sizes))


def ref_logps(call: Call) -> Tensor | None:
    """Log-probs of the reference, where it was streamed beside the policy."""
    return None if call.ref is None else call.collect(lambda block: block.ref_logp_N)


def forward_blocks(call: Call, h_TD: Tensor, w_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Log-probs of all scored tokens; leaves the blocks that a backward reads in ``call``."""
    streamer = call.streamer(w_VD, bias_V)
    rows = Rows(h_TD, call.rows_N, call.target_N)
    call.blocks = []
    for start, stop in call.plan.spans:
        h_ND, target_N = streamer.rows_of(rows, start, stop)
        ref = _ref_block(call, start, stop)
        keep = call.plan.route == "stash"
        block = streamer.forward(h_ND, target_N, keep=keep, stats=call.stats, ref=ref)
        call.blocks.append((start, stop, block))
    return call.collect(lambda block: block.logp_N)


def _ref_block(call: Call, start: int, stop: int) -> Any:
    """Streamer and hidden rows of the reference, if it comes as a head."""
    if call.ref is None:
        return None
    head, h_TD = call.ref
    streamer = call.streamer_of(head)
    h_ND, _ = streamer.rows_of(Rows(h_TD, call.rows_N, call.target_N), start, stop)
    return streamer, h_ND


def frozen_forward(
    call: Call, h_TD: Tensor, w_VD: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probs, and d logp / d h of each scored token, (N, D): the head itself has no gradient."""
    streamer = call.streamer(w_VD, bias_V)
    rows = Rows(h_TD, call.rows_N, call.target_N)
    dtype = h_TD.dtype if call.plan.in_place else streamer.acc_dtype
    unit_ND = torch.empty(call.target_N.shape[0], h_TD.shape[1], dtype=dtype, device=h_TD.device)
    call.blocks = []
    ones_N = torch.ones(len(unit_ND), dtype=streamer.acc_dtype, device=h_TD.device)
    for start, stop in call.plan.spans:
        h_ND, target_N = streamer.rows_of(rows, start, stop)
        ref = _ref_block(call, start, stop)
        block = streamer.forward(h_ND, target_N, keep=True, stats=call.stats, ref=ref)
        streamer.backward(
            block, h_ND, target_N, ones_N[start:stop], call.needs, Grads(), final=False,
            out_ND=unit_ND[start:stop],
        )  # fmt: skip
        block.stash = None
        call.blocks.append((start, stop, block))
    return call.collect(lambda block: block.logp_N), unit_ND


def token_backward(
    call: Call,
    saved: tuple[Tensor | None, ...],
    coef_N: Tensor,
    upstream: Tensor | None = None,
    *,
    reuse: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``upstream * sum coef * logp`` by the frozen, stash or recompute route.

    With ``reuse`` nobody will ask for them again, so what was kept may be overwritten.
    """
    h_TD, w_VD, bias_V, unit_ND = saved
    assert h_TD is not None and w_VD is not None
    rows = Rows(h_TD, call.rows_N, call.target_N)
    streamer = call.streamer(w_VD, bias_V)
    into = Grads()
    if call.needs.w:  # written chunk by chunk, so not cleared
        into.w = torch.empty_like(w_VD, memory_format=_ROWS)
    if bias_V is not None and call.needs.bias:
        into.bias = torch.zeros_like(bias_V, dtype=streamer.acc_dtype)
    more = {}
    if upstream is not None and call.fused and unit_ND is None:
        more["upstream"] = upstream  # a kernel multiplies
    elif upstream is not None:
        coef_N = (coef_N * upstream).to(streamer.acc_dtype)
    if unit_ND is not None:
        coef_N = torch.where(call.target_N == IGNORE, 0.0, coef_N).to(streamer.acc_dtype)
        into.h = streamer.place(rows, unit_ND, coef_N, reuse=reuse)
    elif call.plan.route == "stash":
        (start, stop, block), *_ = call.blocks
        h_ND, target_N = streamer.rows_of(rows, start, stop)
        into.h = streamer.backward(
            block, h_ND, target_N, coef_N, call.needs, into, final=True, rows=rows, **more
        )
    else:
        streamer.recompute_backward(call.blocks, rows, coef_N, call.needs, into, **more)
    return rounded(into, h_TD.dtype, fused=call.fused)


def kl_backward(
    call: Call, saved: tuple[Tensor | None, ...], coef_N: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``sum coef * KL(ref || policy)``."""
    h_TD, w_VD, bias_V = saved
    assert h_TD is not None and w_VD is not None and call.ref is not None
    streamer = call.streamer(w_VD, bias_V)
    into = Grads()
    if call.needs.w:
        into.w = torch.empty_like(w_VD, memory_format=_ROWS)
    if bias_V is not None and call.needs.bias:
        into.bias = torch.zeros_like(bias_V, dtype=streamer.acc_dtype)
    head, ref_h_TD = call.ref
    ref: Any = (call.streamer_of(head), Rows(ref_h_TD, call.rows_N, call.target_N))
    rows = Rows(h_TD, call.rows_N, call.target_N)
    streamer.recompute_backward(call.blocks, rows, coef_N, call.needs, into, ref)
    return rounded(into, h_TD.dtype, fused=call.fused)


def _new_grads(
    call: Call, h_TD: Tensor, w_VD: Tensor, bias_V: Tensor | None, *, w: bool = True
) -> Grads:
    """Accumulators; the kernels write the weight's before they add to it, so it is not cleared."""
    acc = torch.promote_types(h_TD.dtype, torch.float32)
    new = torch.empty_like if call.fused else torch.zeros_like
    return Grads(
        h=torch.zeros_like(h_TD, dtype=acc, memory_format=_ROWS) if call.needs.h else None,
        w=new(w_VD, dtype=acc, memory_format=_ROWS) if w and call.needs.w else None,
        bias=torch.zeros_like(bias_V, dtype=acc)
        if bias_V is not None and call.needs.bias
        else None,
    )


def rounded(
    grads: Grads, dtype: torch.dtype, factor: Tensor | None = None, *, fused: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients times ``factor``, rounded once, without a second copy in fp32."""

    def finish(x: Tensor | None) -> Tensor | None:
        if x is None or (factor is None and x.dtype == dtype):
            return x
        out = torch.empty_like(x, dtype=dtype, memory_format=_ROWS)
        if fused and x.ndim == 2:
            from fastdpo.loss.fused import scale_into

            scale_into(out, x, factor)
            return out
        for part, rows in zip(out.split(4096), x.split(4096)):
            part.copy_(rows if factor is None else rows * factor.to(x.dtype))
        return out

    return finish(grads.h), finish(grads.w), finish(grads.bias)


def grouped_pass(
    call: Call, pairs: Pairs, h_TD: Tensor, w_VD: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Grads]:
    """Loss, log-prob sums of policy and reference, and the finished fp32 gradients."""
    streamer = call.streamer(w_VD, bias_V)
    rows = Rows(h_TD, call.rows_N, call.target_N)
    first_is_unit = call.plan.groups[0].unit
    total = _new_grads(call, h_TD, w_VD, bias_V, w=not first_is_unit)
    if first_is_unit:  # its buffers become the total, so none are needed beside them
        total.bias = None
    call.blocks = []
    parts: list[Scored] = []
    for group in call.plan.groups:
        run = _unit_group if group.unit else _stash_group
        parts.append(run(call, pairs, group, streamer, rows, total))
    loss = torch.stack([part.loss for part in parts]).sum()
    logp_S = join([part.logp_S for part in parts])
    return loss, logp_S, join([part.ref_logp_S for part in parts]), total


def _stash_group(
    call: Call, pairs: Pairs, group: Group, streamer: Any, rows: Rows, total: Grads
) -> Scored:
    start, stop = group.rows
    h_ND, target_N = streamer.rows_of(rows, start, stop)
    ref = _ref_block(call, start, stop)
    block = streamer.forward(h_ND, target_N, keep=True, stats=call.stats, ref=ref)
    call.blocks.append((start, stop, block))
    scored = score(call, pairs, block.logp_N, block.ref_logp_N, group.pairs)
    assert scored.coef_N is not None
    final = call.fused and group is call.plan.groups[0]
    dh_ND = streamer.backward(block, h_ND, target_N, scored.coef_N, call.needs, total, final=final)
    block.stash = None
    if total.h is not None and dh_ND is not None:
        streamer.add_rows(rows, total.h, start, stop, dh_ND)
    return scored


def _unit_group(
    call: Call, pairs: Pairs, group: Group, streamer: Any, rows: Rows, total: Grads
) -> Scored:
    """A pair longer than the workspace.

    Its unit gradients, those of ``sum sign * logp``, are accumulated block by block and multiplied
    by the pair's scalar once the loss is known.  An objective whose two sides have scalars of
    their own needs the weight's unit gradient of each side.
    """
    pair = group.pairs[0]
    sizes, sign_S = (
        pairs.sizes[2 * pair : 2 * pair + 2],
        pairs.unit_signs()[2 * pair : 2 * pair + 2],
    )
    offset, middle = group.rows[0], group.rows[0] + sizes[0]
    head, empty_TD = streamer.head, rows.h_TD[:0]
    units = [
        _new_grads(call, empty_TD, head.w_VD, head.bias_V)
        for _ in range(1 if pairs.is_margin else 2)
    ]
    sign_N = _over_tokens(call, sign_S, sizes)
    blocks, unit_h = [], None
    if total.h is not None:
        shape = sum(sizes), rows.h_TD.shape[1]
        unit_h = torch.empty(shape, dtype=streamer.acc_dtype, device=rows.h_TD.device)
    for start, stop in group.spans:
        h_ND, target_N = streamer.rows_of(rows, start, stop)
        ref = _ref_block(call, start, stop)
        block = streamer.forward(h_ND, target_N, keep=True, stats=call.stats, ref=ref)
        unit = units[0] if pairs.is_margin else units[start >= middle]
        coef_N = sign_N[start - offset : stop - offset]
        writes = call.fused and (start == offset or (start == middle and not pairs.is_margin))
        dh_ND = streamer.backward(block, h_ND, target_N, coef_N, call.needs, unit, final=writes)
        if unit_h is not None:
            unit_h[start - offset : stop - offset] = dh_ND
        block.stash = None
        blocks.append(block)
        call.blocks.append((start, stop, block))
    logp_N = torch.cat([block.logp_N for block in blocks])
    found = [block.ref_logp_N for block in blocks if block.ref_logp_N is not None]
    scored = score(call, pairs, logp_N, torch.cat(found) if found else None, group.pairs)
    assert scored.slope_S is not None
    scalar_S = (scored.slope_S / sign_S).to(streamer.acc_dtype)
    for unit, scalar in zip(units, scalar_S):
        total.w = _add_scaled(total.w, unit.w, scalar)
        total.bias = _add_scaled(total.bias, unit.bias, scalar)
    if total.h is not None and unit_h is not None:
        scalar_N = _over_tokens(call, scalar_S, sizes)
        streamer.add_rows(rows, total.h, *group.rows, unit_h.mul_(scalar_N[:, None]))
    return scored


def _over_tokens(call: Call, x_S: Tensor, sizes: list[int]) -> Tensor:
    """Each of a pair's two numbers over its side's tokens."""
    if not call.fused:
        return per_token(x_S, sizes)
    return torch.cat([x.expand(size) for x, size in zip(x_S, sizes)])


def _add_scaled(total: Tensor | None, unit: Tensor | None, scalar: Tensor) -> Tensor | None:
    if unit is None:
        return total
    unit.mul_(scalar)
    return unit if total is None else total.add_(unit)
