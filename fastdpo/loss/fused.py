"""The head through the Triton kernels: the blocks of `streaming`, on a GPU.

Products whose result is a plain matrix are the matrix library's; the kernels do the rest in one
pass each.  The projection is one kernel that folds its tiles in registers, where a copy engine
feeds it (Hopper and newer, bf16 and fp16); elsewhere, and where a statistic needs the logits of two
heads at once, it is a bounded fp32 tile that another kernel folds.  Policy and reference of like
sizes and layouts take the same way, so they agree to the bit, unless one call asks for statistics
and the other does not; where tiles are folded, the two calls must have the same workspace too.

Nothing here waits for the device, so a call can be captured in a CUDA graph.

Legend: N rows of the block, D hidden, V vocabulary, C columns of a tile, R rows of a tile, K tiles,
T hidden rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import fold, kl, project, scatter
from .blocks import Block, Grads, Head, Needs, Shares, TokenRows, Tokens
from .call import collect
from .checks import IGNORE
from .gemm import fp32_product, matrix, padded, tiles
from .plan import Plan


@dataclass
class _Factors:
    """What the head's gradient takes of each token: factors of its kept row and of its target."""

    tokens: Tokens
    by_target: scatter.TokenGroups | None
    row_N: Tensor
    own_N: Tensor | None  # None where no target has an entry of its own
    scaled_ND: Tensor | None  # ``row * h``, in fp16 over `gain`, which keeps it in range
    gain: Tensor | None


class _Other(NamedTuple):
    """The reference beside finished rows, and how its probabilities are mixed with theirs."""

    streamer: "FusedStreamer"
    h_ND: Tensor
    lse_N: Tensor
    shares: Shares


class FusedStreamer:
    """Runs a head over blocks of rows; the interface of `streaming.Streamer`."""

    acc_dtype = torch.float32

    def __init__(self, head: Head, rows: TokenRows, needs: Needs, plan: Plan) -> None:
        if head.bias_V is not None:
            head = head._replace(bias_V=head.bias_V.contiguous())
        self.head, self.rows, self.needs, self.plan = head, rows, needs, plan
        self.shape = fold.HeadShape(head.scale, head.softcap)
        self.V, self.D = head.w_VD.shape
        self.limit = fold.LIMITS[head.w_VD.dtype]

    # ------------------------------------------------------------------------------------- forward
    def forward(
        self,
        span: tuple[int, int],
        *,
        keep: bool,
        stats: frozenset[str] = frozenset(),
        ref: "FusedStreamer | None" = None,
        shares: Shares | None = None,
    ) -> Block:
        """Log-probs of a block; with ``keep`` also the stash its backward reads.

        ``ref`` is the reference.  It comes after the policy, beside it only for a statistic that
        needs the logits of both.  With ``shares`` the stash is that of the mixtures, and a row's
        gradient that of ``logp + ref share * KL``.
        """
        tokens = self.tokens(span)
        N, dtype, device = len(tokens.h_ND), tokens.h_ND.dtype, tokens.h_ND.device
        stash_NV = matrix(N, self.V, dtype, device) if keep else None
        ref_tokens = None if ref is None else ref.tokens(span)
        if stash_NV is None or shares is None:
            block = self._forward(span, tokens, stats, ref, ref_tokens, stash_NV)
        else:
            ref_NV = matrix(N, self.V, dtype, device)
            block = self._forward(span, tokens, stats, ref, ref_tokens, stash_NV, ref_NV)
            self._mix(block, tokens, shares, stash_NV, ref_NV)
        block.tokens, block.stash = (tokens, stash_NV) if keep else (None, None)
        return block

    def _mix(
        self, block: Block, tokens: Tokens, shares: Shares, kept_RV: Tensor, ref_RV: Tensor
    ) -> None:
        """Turn what was kept of the policy's rows into mixtures, at most as large as the kept."""
        assert block.ref_max_KN is not None and block.ref_lse_N is not None
        own_N = shares.own_N * (block.max_KN - block.lse_N).exp()
        ref_N = shares.ref_N * (block.ref_max_KN - block.ref_lse_N).exp()
        unit_N = torch.maximum(own_N.abs(), ref_N.abs())
        # An ignored row may not be finite.
        factors = (torch.where(tokens.target_N < 0, 0.0, x_N / unit_N) for x_N in (own_N, ref_N))
        kl.mix(kept_RV, ref_RV, *factors)
        block.own_N, block.ref_max_KN = block.own(shares), None
        block.max_KN = block.lse_N + unit_N.log()

    def _forward(
        self,
        span: tuple[int, int],
        tokens: Tokens,
        stats: frozenset[str],
        ref: "FusedStreamer | None",
        ref_tokens: Tokens | None,
        stash_NV: Tensor | None,
        ref_stash_NV: Tensor | None = None,
    ) -> Block:
        """The forward of some rows; exponentials are left in the stashes that are given."""
        target_N = tokens.target_N
        other = None
        if ref is not None and ref_tokens is not None and "kl_ref" in stats:
            other = ref, ref_tokens, ref_stash_NV
        partials, ref_partials, cross_KN = self._partials(tokens, stats, stash_NV, other=other)
        merged = fold.merge(partials, target_N, self.V, self.shape, stash_NV)
        target_z_N = partials.target_z_N
        del partials  # before the reference's are made
        block = Block(
            span, None, merged.logp_N, merged.lse_N, merged.shift_N, None, merged.own_N,
            merged.stats,
        )  # fmt: skip
        if ref is None or ref_tokens is None:
            return block
        if ref_partials is None:
            ref_partials, _, _ = ref._partials(ref_tokens, frozenset(), None, bool(stats))
        ref_merged = fold.merge(ref_partials, target_N, self.V, stash_NV=ref_stash_NV)
        block.ref_logp_N, block.ref_lse_N = ref_merged.logp_N, ref_merged.lse_N
        if ref_stash_NV is not None:
            block.ref_max_KN = ref_merged.shift_N
        if cross_KN is not None:
            down_KN = (ref_partials.shift_KN - ref_merged.lse_N).exp()
            kl_N = (down_KN * cross_KN).sum(0) - ref_merged.lse_N + merged.lse_N
            ignored_N = target_N == IGNORE
            block.stats["kl_ref"] = torch.where(ignored_N, 0.0, kl_N)
            block.ref_own_N = ref_merged.own_N
            if self.head.softcap is not None:
                slope_N = 1.0 - (target_z_N / self.head.softcap).square()
                block.ref_own_N = torch.where(ignored_N, 0.0, ref_merged.own_N * slope_N)
        return block

    def projects(self, h_ND: Tensor) -> bool:
        """Whether one kernel makes and folds the logits."""
        w_VD = self.head.w_VD
        return project.feeds_from_descriptors(w_VD.device) and project.can_project(h_ND, w_VD)

    def _partials(
        self,
        tokens: Tokens,
        stats: frozenset[str],
        stash_NV: Tensor | None,
        with_stats: bool = False,
        other: "tuple[FusedStreamer, Tokens, Tensor | None] | None" = None,
    ) -> tuple[fold.Partials, fold.Partials | None, Tensor | None]:
        """The partials of one head; ``with_stats`` if they are compared to some with statistics.

        With ``other`` those of the reference too, whose stash is taken if given, and the cross
        term of their KL.
        """
        h_ND, target_N = tokens
        if other is not None or not self.projects(h_ND):
            return self._fold(tokens, stats, stash_NV, other)
        head = self.head
        tile = self.kernel_tile(narrow=with_stats or bool(stats))
        partials = fold.Partials.empty(target_N, self.V, tile.v, stats)
        shift_N = project.row_shifts(h_ND, head.w_VD, head.bias_V, self.shape)
        project.project(
            h_ND, head.w_VD, head.bias_V, self.shape, target_N, shift_N, tile=tile,
            partials=partials, stash_NC=stash_NV, limit=self.limit,
        )  # fmt: skip
        return partials, None, None

    def kernel_tile(self, *, narrow: bool = False) -> project.Tile:
        head = self.head
        narrow = narrow or (head.bias_V is not None and head.softcap is not None)
        return project.tile_for(head.w_VD.device, narrow=narrow)

    def _fold(
        self,
        tokens: Tokens,
        stats: frozenset[str],
        stash_NV: Tensor | None,
        other: "tuple[FusedStreamer, Tokens, Tensor | None] | None",
    ) -> tuple[fold.Partials, fold.Partials | None, Tensor | None]:
        """Partials of policy and, where it is given, reference with the cross term of their KL."""
        h_ND, target_N = tokens
        width, row_tiles = self._tiles(len(h_ND), 1 if other is None else 2)
        partials = fold.Partials.empty(target_N, self.V, width, stats)
        ref_partials = cross_KN = None
        if other is not None:
            ref_partials = fold.Partials.empty(target_N, self.V, width, frozenset())
            cross_KN = torch.empty_like(ref_partials.shift_KN)
        for rows in row_tiles:
            for k, v0 in enumerate(range(0, self.V, width)):
                columns = slice(v0, min(v0 + width, self.V))
                product, bias = self._products(h_ND[rows], columns)
                fold.fold(
                    product, bias, self.shape, target_N[rows], v0, partials, rows,
                    None if stash_NV is None else stash_NV[rows, columns], self.limit,
                )  # fmt: skip
                if other is None or ref_partials is None or cross_KN is None:
                    del product  # before the next is made, so that it takes the same memory
                    continue
                ref, (ref_h_ND, _), ref_NV = other
                ref_product, ref_bias = ref._products(ref_h_ND[rows], columns)
                fold.fold(
                    ref_product, ref_bias, ref.shape, target_N[rows], v0, ref_partials, rows,
                    None, self.limit,
                )  # fmt: skip
                kl.cross(
                    product, bias, ref_product, ref_bias, self.shape,
                    ref_partials.shift_KN[k, rows], cross_KN[k, rows],
                    None if ref_NV is None else (target_N[rows], v0, ref_NV[rows, columns]),
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
        coef_N: Tensor,
        into: Grads,
        *,
        add: bool,
        whole: bool = False,
        out_ND: Tensor | None = None,
        upstream: Tensor | None = None,
    ) -> Tensor | None:
        """Add the head's gradients of ``upstream * sum coef * logp`` to ``into``, or write them.

        The result is the gradient of the block's hidden rows, in fp32 or in ``out_ND``, or with
        ``whole`` that of all hidden rows, where the block has all of their tokens.
        """
        tokens = block.tokens or self.tokens(block.span)
        shift_lse = block.max_KN, block.lse_N
        factors = self._factors(tokens, coef_N, upstream, into, shift_lse, block.own_N)
        self._head_grads(block.stash, slice(0, self.V), factors, into, add=add)
        if not self.needs.h:
            return None
        product_ND = fp32_product(block.stash, self.head.w_VD)
        if whole:
            return self._placed(product_ND, factors)
        out_ND = product_ND if out_ND is None else out_ND
        self._row_grads(out_ND, product_ND, factors)
        return out_ND

    def _factors(
        self,
        tokens: Tokens,
        coef_N: Tensor,
        upstream: Tensor | None,
        into: Grads,
        shift_lse: tuple[Tensor | None, Tensor | None],
        own_N: Tensor | None,
    ) -> _Factors:
        h_ND, target_N = tokens
        in_range = h_ND.dtype != torch.float16
        row_N, own_N, scaled_ND = scatter.factors(
            target_N, coef_N.float().contiguous(), upstream, *shift_lse, own_N,
            self.head.scale, h_ND if into.w is not None and in_range else None,
        )  # fmt: skip
        gain = by_target = None
        if into.w is not None and not in_range:
            gain = scatter.gain_of(row_N)
            scaled_ND = scatter.scaled_rows(h_ND, row_N, gain)
        if own_N is not None and (into.w is not None or into.bias is not None):
            by_target = scatter.TokenGroups.of(target_N, self.V)
        return _Factors(tokens, by_target, row_N, own_N, scaled_ND, gain)

    def _head_grads(
        self, stash_NC: Tensor, columns: slice, factors: _Factors, into: Grads, *, add: bool
    ) -> None:
        """Gradients of some columns of the head: kept numbers and the targets' own."""
        if into.bias is not None:
            bias_C = into.bias[columns]
            scatter.add_column_sums(bias_C, stash_NC, factors.row_N)
            if factors.own_N is not None:
                scatter.row_sums(
                    bias_C[:, None], segments=factors.by_target, offset=columns.start,
                    accumulate=True, b_ND=torch.ones_like(factors.own_N)[:, None],
                    b_scale_N=factors.own_N,
                )  # fmt: skip
        if into.w is None:
            return
        assert factors.scaled_ND is not None
        h_ND = None if factors.own_N is None else factors.tokens.h_ND
        w_CD = into.w[columns]
        if w_CD.dtype == torch.float32 and factors.gain is None:  # the product is the sum itself
            fp32_product(stash_NC.T, factors.scaled_ND, w_CD, add=add)
            if h_ND is not None:
                scatter.row_sums(
                    w_CD, segments=factors.by_target, offset=columns.start, accumulate=True,
                    b_ND=h_ND, b_scale_N=factors.own_N,
                )  # fmt: skip
            return
        for part in tiles(len(w_CD), max(16, self.plan.grad_tile_bytes // (4 * self.D))):
            scatter.row_sums(
                w_CD[part], segments=factors.by_target, offset=columns.start + part.start,
                accumulate=add, base_ID=fp32_product(stash_NC[:, part].T, factors.scaled_ND),
                base_factor=factors.gain, b_ND=h_ND, b_scale_N=factors.own_N,
            )  # fmt: skip

    def _row_grads(
        self,
        out_ID: Tensor,
        product_ND: Tensor,
        factors: _Factors,
        segments: scatter.TokenGroups | None = None,
    ) -> None:
        """``row * product + own * w[target]`` of each token, or summed; no ``own``, first term."""
        w_VD, index_N, own_N = self.head.w_VD, factors.tokens.target_N, factors.own_N
        if own_N is not None and w_VD.stride(1) != 1:
            w_VD, index_N = w_VD[index_N.clamp(min=0)], None
        scatter.row_sums(
            out_ID, segments=segments, a_ND=product_ND, a_scale_N=factors.row_N,
            b_ND=None if own_N is None else w_VD, b_scale_N=own_N, b_index_N=index_N,
        )  # fmt: skip

    def _placed(self, product_ND: Tensor, factors: _Factors) -> Tensor:
        """The gradient of all hidden rows, each summed in fp32 and rounded once."""
        out_TD = torch.empty_like(self.rows.h_TD, memory_format=torch.contiguous_format)
        self._row_grads(out_TD, product_ND, factors, self._by_row())
        return out_TD

    def recompute_backward(
        self,
        blocks: list[Block],
        coef_N: Tensor,
        into: Grads,
        upstream: Tensor | None = None,
        *,
        ref: "FusedStreamer | None" = None,
        shares: Shares | None = None,
        targets: bool = True,
    ) -> None:
        """Gradients with nothing kept but each row's log-sum-exp.

        Whole columns at a time, whose gradient is then complete at once.  With ``shares`` they are
        ``coef`` times those of the mixtures with ``ref``; without ``targets`` no entry belongs to
        a target.
        """
        span = 0, coef_N.shape[0]
        tokens = self.tokens(span)
        h_ND, lse_N = tokens.h_ND, collect(blocks, "lse_N")
        own_N, other = collect(blocks, "own_N") if targets else None, None
        if ref is not None and shares is not None:
            other = _Other(ref, ref.tokens(span).h_ND, collect(blocks, "ref_lse_N"), shares)
            if own_N is not None:
                own_N = shares.own_N * own_N + shares.ref_N * collect(blocks, "ref_own_N")
        factors = self._factors(tokens, coef_N, upstream, into, (None, None), own_N)
        dh_ND = torch.empty(h_ND.shape, device=h_ND.device) if self.needs.h else None
        width = self.plan.vocab_chunk
        stash_NC = matrix(len(h_ND), width, h_ND.dtype, h_ND.device)
        for v0 in range(0, self.V, width):
            columns = slice(v0, min(v0 + width, self.V))
            kept_NC = stash_NC[:, : columns.stop - v0]
            self._keep(tokens, lse_N, columns, kept_NC, other, targets=targets)
            self._head_grads(kept_NC, columns, factors, into, add=False)
            if dh_ND is not None:
                fp32_product(kept_NC, self.head.w_VD[columns], dh_ND, add=v0 > 0)
        if dh_ND is not None:
            into.h = self._placed(dh_ND, factors)

    def _keep(
        self,
        tokens: Tokens,
        lse_N: Tensor,
        columns: slice,
        kept_NC: Tensor,
        other: "_Other | None",
        *,
        targets: bool,
    ) -> None:
        """Probabilities of some columns of finished rows, or mixtures with the reference's.

        Zero for the rows' targets, if they have ``targets``.
        """
        h_ND, target_N = tokens
        if other is None and self.projects(h_ND):
            project.project(
                h_ND, self.head.w_VD, self.head.bias_V, self.shape, target_N, lse_N,
                tile=self.kernel_tile(), columns=(columns.start, columns.stop), stash_NC=kept_NC,
            )  # fmt: skip
            return
        width, row_tiles = self._tiles(len(h_ND), 1 if other is None else 2)
        for rows in row_tiles:
            for v0 in range(columns.start, columns.stop, width):
                part = slice(v0, min(v0 + width, columns.stop))
                product, bias = self._products(h_ND[rows], part)
                ref_tile = None
                if other is not None:
                    ref_tile = fold.RefTile(
                        *other.streamer._products(other.h_ND[rows], part), other.lse_N[rows],
                        other.shares.own_N[rows], other.shares.ref_N[rows],
                    )  # fmt: skip
                kept_RC = kept_NC[rows, v0 - columns.start : part.stop - columns.start]
                target_R = target_N[rows] if targets else None
                fold.keep(product, bias, self.shape, target_R, lse_N[rows], v0, kept_RC, ref_tile)
                del product, ref_tile

    def tokens(self, span: tuple[int, int]) -> Tokens:
        """A block's, the hidden ones with neighbouring elements side by side, as kernels read."""
        h_TD, rows_N, target_N = self.rows
        if rows_N is None:
            h_ND, target_N = self.rows.block(*span)
            return Tokens(_rows_in_memory(h_ND), target_N)
        block = slice(*span)
        return Tokens(scatter.gather(_rows_in_memory(h_TD), rows_N[block]), target_N[block])

    def add_rows(self, total_TD: Tensor, span: tuple[int, int], dh_ND: Tensor) -> None:
        """Add a block's gradient to the hidden rows it came from."""
        if self.rows.rows_N is None:
            self.rows.scatter(total_TD, *span, dh_ND)
            return
        segments = scatter.TokenGroups.of(self.rows.rows_N[slice(*span)], len(total_TD))
        scatter.row_sums(total_TD, segments=segments, a_ND=dh_ND, accumulate=True)

    def place(self, x_ND: Tensor, scale_N: Tensor | None, *, reuse: bool) -> Tensor:
        """``x * scale`` of each token summed into its hidden row in fp32, and rounded once.

        With ``reuse`` the memory of ``x_ND`` becomes that of the result, if it has its dtype: then
        ``x`` was rounded before.
        """
        h_TD, rows_N, _ = self.rows
        out_TD = x_ND
        if not reuse or x_ND.dtype != h_TD.dtype or rows_N is not None:
            out_TD = torch.empty_like(h_TD, memory_format=torch.contiguous_format)
        scatter.row_sums(out_TD, segments=self._by_row(), a_ND=x_ND, a_scale_N=scale_N)
        return out_TD

    def _by_row(self) -> scatter.TokenGroups | None:
        """Which tokens each hidden row predicts; None if token i has row i."""
        h_TD, rows_N, _ = self.rows
        return None if rows_N is None else scatter.TokenGroups.of(rows_N, len(h_TD))


def _rows_in_memory(h_ND: Tensor) -> Tensor:
    """A matrix whose rows have their elements side by side, as the kernels read them."""
    return h_ND if h_ND.stride(1) == 1 else h_ND.contiguous()


def count_scored(target_N: Tensor, bounds_S1: Tensor) -> Tensor:
    """Scored tokens of each sequence."""
    before = torch.nn.functional.pad((target_N != IGNORE).cumsum(0), (1, 0))
    return before[bounds_S1].diff()
