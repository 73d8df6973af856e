"""The head through the Triton kernels: the blocks of `fastdpo.streaming`, on a GPU.

Products whose result is a plain matrix are the matrix library's; the kernels do the rest in one
pass each.  The projection goes one of two ways, by the head's width: a bounded fp32 tile that a
kernel folds, or, for a narrow head, one kernel that folds in registers.  The width at which one
takes over from the other is an estimate that no GPU has confirmed yet (`python -m bench.tune`).
Policy and reference of like sizes take the same way, so they agree to the bit, unless one of them
is asked for statistics, which only the fold takes.

Nothing here waits for the device, so a call can be captured in a CUDA graph.

Legend: N rows of the block, D hidden, V vocabulary, C columns of a tile, R rows of a tile, K tiles.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastdpo.gemm import fp32_product
from fastdpo.kernels import fold, pair, project, scatter
from fastdpo.objectives import kind_of
from fastdpo.passes import Call, Pairs, Scored
from fastdpo.plan import PROJECT_MAX_D, Plan
from fastdpo.streaming import IGNORE, Block, Grads, Head, Needs, Rows


def matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized matrix whose rows start at 128-byte boundaries, as fast products want."""
    return torch.empty(rows, padded(columns), dtype=dtype, device=device)[:, :columns]


def padded(columns: int) -> int:
    return -(-columns // 64) * 64


def tiles(total: int, most: int) -> list[slice]:
    """At most ``most`` wide, and if it can be in whole tiles of a matrix product."""
    width = most // 256 * 256 or most
    return [slice(i, min(i + width, total)) for i in range(0, total, width)]


@dataclass
class _Tokens:
    """What the head's gradient takes of each token: factors of its kept row and of its target."""

    h_ND: Tensor
    by_target: scatter.Segments | None
    row_N: Tensor
    own_N: Tensor | None  # None where no target has an entry of its own

    @cached_property
    def scaled(self) -> tuple[Tensor, Tensor]:
        """``row * h`` over a power of two, which keeps fp16 in range; and that power."""
        gain = scatter.gain_of(self.row_N)
        return scatter.scaled_rows(self.h_ND, self.row_N, gain), gain


class FusedStreamer:
    """Runs a head over blocks of rows; the interface of `fastdpo.streaming.Streamer`."""

    acc_dtype = torch.float32

    def __init__(self, head: Head, plan: Plan) -> None:
        if head.bias_V is not None:
            head = head._replace(bias_V=head.bias_V.contiguous())
        self.head = head
        self.plan = plan
        self.shape = fold.HeadShape(head.scale, head.softcap)
        self.V, self.D = head.w_VD.shape
        self.limit = fold.LIMITS[head.w_VD.dtype]
        self.kernel_tile = project.tile_for(head.w_VD.device)

    # ------------------------------------------------------------------------------------- forward
    def forward(
        self,
        h_ND: Tensor,
        target_N: Tensor,
        *,
        keep: bool,
        stats: frozenset[str] = frozenset(),
        ref: "tuple[FusedStreamer, Tensor] | None" = None,
    ) -> Block:
        """Log-probs of a block; with ``keep`` also the stash its backward reads.

        ``ref`` is the reference head and its hidden rows, streamed beside the policy's.
        """
        h_ND = _rows_in_memory(h_ND)
        stash_NV = None
        if keep:
            stash_NV = matrix(len(h_ND), self.V, h_ND.dtype, h_ND.device)
        ref_streamer, ref_h_ND = ref or (None, None)
        ref_partials = cross_KN = None
        if not stats and self.projects(h_ND):
            partials = self._project(h_ND, target_N, stash_NV)
            if ref_streamer is not None and ref_h_ND is not None:
                ref_partials = ref_streamer._alone(_rows_in_memory(ref_h_ND), target_N)
        else:
            partials, ref_partials, cross_KN = self._fold(
                h_ND, target_N, stats, stash_NV, ref_streamer, ref_h_ND
            )
        merged = fold.merge(partials, target_N, self.V)
        if stash_NV is not None:
            fold.settle(stash_NV, partials, merged.shift_N)
        own_N = merged.miss_N
        if self.head.softcap is not None:
            own_N = own_N * (1.0 - (partials.target_z_N / self.head.softcap).square())
        block = Block(merged.logp_N, merged.lse_N, merged.shift_N, stash_NV, own_N, merged.stats)
        if ref_partials is not None:
            ref_merged = fold.merge(ref_partials, target_N, self.V)
            block.ref_logp_N, block.ref_lse_N = ref_merged.logp_N, ref_merged.lse_N
            if cross_KN is not None:
                down_KN = (ref_partials.shift_KN - ref_merged.lse_N).exp()
                kl_N = (down_KN * cross_KN).sum(0) - ref_merged.lse_N + merged.lse_N
                block.stats["kl_ref"] = torch.where(target_N == IGNORE, 0.0, kl_N)
        return block

    def projects(self, h_ND: Tensor) -> bool:
        """Whether one kernel makes and folds the logits."""
        w_VD = self.head.w_VD
        narrow = self.D <= PROJECT_MAX_D and project.feeds_from_descriptors(w_VD.device)
        return narrow and project.can_project(h_ND, w_VD)

    def _alone(self, h_ND: Tensor, target_N: Tensor) -> fold.Partials:
        """The partials of a reference."""
        if self.projects(h_ND):
            return self._project(h_ND, target_N, None)
        return self._fold(h_ND, target_N, frozenset(), None, None, None)[0]

    def _project(self, h_ND: Tensor, target_N: Tensor, stash_NV: Tensor | None) -> fold.Partials:
        tile, head = self.kernel_tile, self.head
        partials = fold.Partials.empty(target_N, self.V, tile.v, frozenset())
        project.project(
            h_ND, head.w_VD, head.bias_V, self.shape, target_N, tile=tile, partials=partials,
            stash_NC=stash_NV, limit=self.limit,
        )  # fmt: skip
        return partials

    def _fold(
        self,
        h_ND: Tensor,
        target_N: Tensor,
        stats: frozenset[str],
        stash_NV: Tensor | None,
        ref: "FusedStreamer | None",
        ref_h_ND: Tensor | None,
    ) -> tuple[fold.Partials, fold.Partials | None, Tensor | None]:
        """Partials of policy and reference, and the cross term of their KL if asked for."""
        width, row_tiles = self._tiles(len(h_ND), 1 if ref is None else 2)
        partials = fold.Partials.empty(target_N, self.V, width, stats)
        ref_partials = cross_KN = None
        if ref is not None:
            ref_partials = fold.Partials.empty(target_N, self.V, width, frozenset())
            if "kl_ref" in stats:
                cross_KN = torch.empty_like(ref_partials.shift_KN)
        for rows in row_tiles:
            for k, v0 in enumerate(range(0, self.V, width)):
                columns = slice(v0, min(v0 + width, self.V))
                product, bias = self._products(h_ND[rows], columns)
                fold.fold(
                    product, bias, self.shape, target_N[rows], v0, partials, rows,
                    None if stash_NV is None else stash_NV[rows, columns], self.limit,
                )  # fmt: skip
                if ref is None or ref_h_ND is None or ref_partials is None:
                    del product  # before the next is made, so that it takes the same memory
                    continue
                ref_product, ref_bias = ref._products(ref_h_ND[rows], columns)
                fold.fold(
                    ref_product, ref_bias, ref.shape, target_N[rows], v0, ref_partials, rows, None,
                    self.limit,
                )  # fmt: skip
                if cross_KN is not None:
                    fold.cross(
                        product, bias, ref_product, ref_bias, self.shape,
                        ref_partials.shift_KN[k, rows], cross_KN[k, rows],
                    )  # fmt: skip
                del product, ref_product
        return partials, ref_partials, cross_KN

    def _products(self, h_RD: Tensor, columns: slice) -> tuple[Tensor, Tensor | None]:
        """An fp32 tile of products, and its columns' biases."""
        bias_V = self.head.bias_V
        product_RC = fp32_product(h_RD, self.head.w_VD[columns].T)
        R, C = product_RC.shape
        if C % 16:  # the vocabulary's last columns; rows are read four numbers at a time
            padded_RC = matrix(R, C, product_RC.dtype, product_RC.device)
            product_RC = padded_RC.copy_(product_RC)
        return product_RC, None if bias_V is None else bias_V[columns]

    def _tiles(self, N: int, count: int = 1) -> tuple[int, list[slice]]:
        """Width of a tile, and its rows; near square, as products like.

        ``count`` of them fit what the plan has for tiles.
        """
        numel = max(1, self.plan.tile_bytes // (4 * count))
        width = min(fold.MAX_TILE_COLUMNS, padded(self.V))
        while width > 256 and numel // width < min(N, width // 2):
            width //= 2
        width = min(width, self.V)
        return width, tiles(N, max(1, numel // width))

    # ------------------------------------------------------------------------------------ backward
    def backward(
        self,
        block: Block,
        h_ND: Tensor,
        target_N: Tensor,
        coef_N: Tensor,
        needs: Needs,
        into: Grads,
        *,
        final: bool,
    ) -> Tensor | None:
        """Add the head's gradients of ``sum coef * logp`` to ``into``; return that of the rows.

        With ``final`` the head's gradients are written, not added.
        """
        h_ND = _rows_in_memory(h_ND)
        coef_N = torch.where(target_N == IGNORE, 0.0, coef_N).float()
        row_N = (block.max_KN - block.lse_N).exp_().mul_(coef_N).mul_(-self.head.scale)
        row_N = torch.where(coef_N == 0.0, 0.0, row_N)  # an ignored row may not be finite
        own_N = block.own_N * coef_N * self.head.scale
        if into.w is not None or into.bias is not None:
            tokens = self._tokens(h_ND, target_N, row_N, own_N)
            self._head_grads(block.stash, slice(0, self.V), tokens, into, accumulate=not final)
        if not needs.h:
            return None
        dh_ND = fp32_product(block.stash, self.head.w_VD)
        self._row_grads(dh_ND, dh_ND, row_N, target_N, own_N)
        return dh_ND

    def _tokens(
        self, h_ND: Tensor, target_N: Tensor, row_N: Tensor, own_N: Tensor | None
    ) -> "_Tokens":
        segments = None if own_N is None else scatter.Segments.of(target_N, self.V)
        return _Tokens(h_ND, segments, row_N, own_N)

    def _head_grads(
        self, stash_NC: Tensor, columns: slice, tokens: "_Tokens", into: Grads, *, accumulate: bool
    ) -> None:
        """Gradients of some columns of the head: kept numbers and the targets' own."""
        if into.bias is not None:
            bias_C = into.bias[columns]
            scatter.add_column_sums(bias_C, stash_NC, tokens.row_N)
            if tokens.own_N is not None:
                scatter.row_sums(
                    bias_C[:, None], segments=tokens.by_target, offset=columns.start,
                    accumulate=True, b_ND=torch.ones_like(tokens.own_N)[:, None],
                    b_scale_N=tokens.own_N,
                )  # fmt: skip
        if into.w is None:
            return
        scaled_ND, gain = tokens.scaled
        most = max(16, self.plan.tile_bytes // (4 * self.D))
        for part in tiles(columns.stop - columns.start, most):
            rows = slice(columns.start + part.start, columns.start + part.stop)
            scatter.row_sums(
                into.w[rows], segments=tokens.by_target, offset=rows.start, accumulate=accumulate,
                base_ID=fp32_product(stash_NC[:, part].T, scaled_ND), base_factor=gain,
                b_ND=None if tokens.own_N is None else tokens.h_ND, b_scale_N=tokens.own_N,
            )  # fmt: skip

    def _row_grads(
        self,
        out_ND: Tensor,
        product_ND: Tensor,
        row_N: Tensor,
        target_N: Tensor,
        own_N: Tensor | None,
        *,
        accumulate: bool = False,
    ) -> None:
        """``row * product + own * w[target]``; without ``own`` the first term."""
        w_VD, index_N = self.head.w_VD, target_N
        if own_N is not None and w_VD.stride(1) != 1:
            w_VD, index_N = w_VD[target_N.clamp(min=0)], None
        scatter.row_sums(
            out_ND, a_ND=product_ND, a_scale_N=row_N, accumulate=accumulate,
            b_ND=None if own_N is None else w_VD, b_scale_N=own_N, b_index_N=index_N,
        )  # fmt: skip

    def recompute_backward(
        self,
        blocks: list[tuple[int, int, Block]],
        rows: Rows,
        coef_N: Tensor,
        needs: Needs,
        into: Grads,
        ref: "tuple[FusedStreamer, Rows] | None" = None,
    ) -> None:
        """Gradients with nothing kept but each row's log-sum-exp.

        With a frozen head, whole rows at a time; else whole columns, whose gradient is then
        complete at once.  With ``ref`` they are those of ``sum coef * KL(ref || policy)``.
        """
        if not needs.head and ref is None:
            self._recompute_rows(blocks, rows, coef_N, needs, into)
            return
        h_ND, target_N = rows.block(0, coef_N.shape[0])
        h_ND = _rows_in_memory(h_ND)
        coef_N = torch.where(target_N == IGNORE, 0.0, coef_N).float()
        lse_N = torch.cat([block.lse_N for _, _, block in blocks])
        own_N, row_N = None, coef_N * self.head.scale
        if ref is None:
            own_N = torch.cat([block.own_N for _, _, block in blocks]) * row_N
            row_N = -row_N
        tokens = self._tokens(h_ND, target_N, row_N, own_N)
        dh_ND = torch.empty(h_ND.shape, device=h_ND.device) if needs.h else None
        width = self.plan.vocab_chunk
        stash_NC = matrix(len(h_ND), width, h_ND.dtype, h_ND.device)
        for v0 in range(0, self.V, width):
            columns = slice(v0, min(v0 + width, self.V))
            kept_NC = stash_NC[:, : columns.stop - v0]
            if ref is None:
                self._keep(h_ND, target_N, lse_N, columns, kept_NC)
            else:
                self._keep_difference(h_ND, lse_N, columns, kept_NC, *ref, blocks)
            self._head_grads(kept_NC, columns, tokens, into, accumulate=False)
            if dh_ND is not None:
                product_ND = fp32_product(kept_NC, self.head.w_VD[columns])
                # The targets' own entries belong to no columns in particular: the first turn's.
                own = own_N if v0 == 0 else None
                self._row_grads(dh_ND, product_ND, row_N, target_N, own, accumulate=v0 > 0)
                del product_ND
        if dh_ND is not None:
            into.h = self.place(rows, dh_ND, None)

    def _keep_difference(
        self,
        h_ND: Tensor,
        lse_N: Tensor,
        columns: slice,
        kept_NC: Tensor,
        ref: "FusedStreamer",
        ref_rows: Rows,
        blocks: list[tuple[int, int, Block]],
    ) -> None:
        """Probabilities of some columns, less the reference's."""
        ref_h_ND, _ = ref_rows.block(0, len(h_ND))
        found = [block.ref_lse_N for _, _, block in blocks if block.ref_lse_N is not None]
        ref_lse_N = torch.cat(found)
        width, row_tiles = self._tiles(len(h_ND), 2)
        for rows in row_tiles:
            for v0 in range(columns.start, columns.stop, width):
                part = slice(v0, min(v0 + width, columns.stop))
                product, bias = self._products(h_ND[rows], part)
                other = (*ref._products(ref_h_ND[rows], part), ref_lse_N[rows])
                kept_RC = kept_NC[rows, v0 - columns.start : part.stop - columns.start]
                fold.keep(product, bias, self.shape, None, lse_N[rows], v0, kept_RC, other)
                del product, other

    def _recompute_rows(
        self,
        blocks: list[tuple[int, int, Block]],
        rows: Rows,
        coef_N: Tensor,
        needs: Needs,
        into: Grads,
    ) -> None:
        # The plan comes here only where token i has hidden row i, so a block's are finished.
        assert rows.rows_N is None
        into.h = torch.empty_like(rows.h_TD, memory_format=torch.contiguous_format)
        for start, stop, _ in blocks:
            h_ND, target_N = rows.block(start, stop)
            block = self.forward(h_ND, target_N, keep=True)
            coef = coef_N[start:stop]
            dh_ND = self.backward(block, h_ND, target_N, coef, needs, Grads(), final=False)
            assert dh_ND is not None
            into.h[start:stop] = dh_ND
            del block, dh_ND  # before the next stash is made

    def _keep(
        self, h_ND: Tensor, target_N: Tensor, lse_N: Tensor, columns: slice, kept_NC: Tensor
    ) -> None:
        """Probabilities of some columns of finished rows."""
        if self.projects(h_ND):
            project.project(
                h_ND, self.head.w_VD, self.head.bias_V, self.shape, target_N,
                tile=self.kernel_tile, columns=(columns.start, columns.stop), lse_N=lse_N,
                stash_NC=kept_NC,
            )  # fmt: skip
            return
        width, row_tiles = self._tiles(len(h_ND))
        for rows in row_tiles:
            for v0 in range(columns.start, columns.stop, width):
                part = slice(v0, min(v0 + width, columns.stop))
                product, bias = self._products(h_ND[rows], part)
                kept_RC = kept_NC[rows, v0 - columns.start : part.stop - columns.start]
                fold.keep(product, bias, self.shape, target_N[rows], lse_N[rows], v0, kept_RC)
                del product

    def place(self, rows: Rows, x_ND: Tensor, scale_N: Tensor | None) -> Tensor:
        """``x * scale`` of each token summed into its hidden row in fp32, and rounded once."""
        out_TD = torch.empty_like(rows.h_TD, memory_format=torch.contiguous_format)
        segments = None
        if rows.rows_N is not None:
            segments = scatter.Segments.of(rows.rows_N, len(out_TD))
        scatter.row_sums(out_TD, segments=segments, a_ND=x_ND, a_scale_N=scale_N)
        return out_TD


def _rows_in_memory(h_ND: Tensor) -> Tensor:
    """Rows with neighbouring elements side by side, as the kernels read them."""
    return h_ND if h_ND.stride(1) == 1 else h_ND.contiguous()


def scale_into(out_ID: Tensor, x_ID: Tensor, factor: Tensor | None) -> None:
    """``out = x * factor``, rounded once."""
    scatter.row_sums(out_ID, base_ID=x_ID, base_factor=factor)


def device_bounds(edges: list[int], device: torch.device) -> Tensor:
    """Sequence bounds on the device, without a synchronization.

    A captured CUDA graph keeps no host memory alive, so there the numbers become arguments of
    fills.
    """
    if device.type == "cpu":
        return torch.tensor(edges)
    if torch.cuda.is_current_stream_capturing():
        bounds_S1 = torch.empty(len(edges), dtype=torch.int64, device=device)
        for s, edge in enumerate(edges):
            bounds_S1[s].fill_(edge)
        return bounds_S1
    return torch.tensor(edges, pin_memory=True).to(device, non_blocking=True)


def count_scored(target_N: Tensor, bounds_S1: Tensor) -> Tensor:
    """Scored tokens of each sequence."""
    before = torch.nn.functional.pad((target_N != IGNORE).cumsum(0), (1, 0))
    return before[bounds_S1].diff()


def score_pairs(
    call: Call,
    pairs: Pairs,
    logp_N: Tensor,
    ref_logp_N: Tensor | None,
    part: tuple[int, int],
    *,
    slopes: bool,
) -> Scored:
    """Loss and slopes of some pairs in one launch; an objective of the caller's own runs after."""
    first, last = part
    assert call.bounds_S1 is not None
    start = pairs.edges[2 * first]
    bounds_S1 = call.bounds_S1[2 * first : 2 * last + 1] - start
    kind = kind_of(pairs.objective)
    objective: Any = pairs.objective
    if kind is None:  # the kernel sums its sequences all the same
        known = pair.Objective(pair.MARGIN_KINDS[0], 1.0)
    else:
        known = pair.Objective(
            kind,
            objective.beta,
            getattr(objective, "alpha", 0.0),
            getattr(objective, "length_normalized", False),
        )
    ref_S = None
    if pairs.ref_logp_S is not None:
        ref_S = pairs.ref_logp_S[2 * first : 2 * last].contiguous()
    result = pair.pair_losses(
        logp_N,
        call.target_N[start : pairs.edges[2 * last]],
        bounds_S1,
        pairs.lengths_S[2 * first : 2 * last],
        known,
        ref_logp_S=ref_S,
        ref_logp_N=ref_logp_N,
        margin_P=pairs.margin_P[first:last].contiguous(),
        smoothing_P=pairs.smoothing_P[first:last].contiguous(),
        weight_P=pairs.weight_P[first:last].contiguous(),
        num_pairs=pairs.num_pairs,
        want_coef=slopes,
    )
    if kind is not None:
        totals = result.totals
        pairs.totals = totals if pairs.totals is None else pairs.totals + totals
        loss, slope_S, coef_N = totals[0], result.slope_S, result.coef_N
        return Scored(loss, result.logp_S, result.ref_logp_S, slope_S, coef_N)
    everything = slice(first, last)
    if not slopes:
        loss_P = pairs.loss(result.logp_S, result.ref_logp_S, everything)
        loss = loss_P.sum() / pairs.num_pairs
        return Scored(loss, result.logp_S, result.ref_logp_S, None, None)
    loss, slope_S = pairs.loss_and_slope(result.logp_S, result.ref_logp_S, everything)
    size = pairs.edges[2 * last] - start
    coef_N = torch.repeat_interleave(slope_S, bounds_S1.diff(), output_size=size)
    return Scored(loss, result.logp_S, result.ref_logp_S, slope_S, coef_N)
