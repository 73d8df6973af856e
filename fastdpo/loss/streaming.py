"""The head in PyTorch, one block of rows and one vocabulary chunk at a time.

For a block of rows the logits ``z = softcap * tanh(scale * (h @ w.T + bias) / softcap)`` are made a
vocabulary chunk at a time, in fp32, and folded into the log-sum-exp of each row.  What the backward
needs of a chunk is ``p_v * dz_v/da_v`` with ``a = h @ w.T``; it is kept unnormalized, relative to
the row's maximum in that chunk, and multiplied by ``exp(max - lse)`` when it is read.  The target's
own entry is ``-expm1(logp)``, not ``1 - p``: for a likely target the difference would have no
correct digit left.

Legend: N rows of the block, D hidden, V vocabulary, C a vocabulary chunk, K chunks.
"""

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from .blocks import (
    Block,
    Grads,
    Head,
    Needs,
    Shares,
    Stash,
    TokenRows,
    Tokens,
    add_rows,
    coefficients,
)
from .checks import IGNORE
from .gemm import Products
from .plan import Plan, even_blocks


def _columns(target_N: Tensor, v0: int, v1: int) -> tuple[Tensor, Tensor]:
    """Column of each target inside a chunk, and whether it is there; both (N, 1)."""
    hit_N = (target_N >= v0) & (target_N < v1)
    return (target_N - v0).clamp(0, v1 - v0 - 1)[:, None], hit_N[:, None]


class _Fold:
    """Log-sum-exp of each row, the target's logit and statistics, from one chunk at a time.

    The exponentials are summed without the target's, so that the log-prob of a likely target,
    ``-log(1 + rest / own)``, is not the difference of two numbers near its logit.
    """

    def __init__(
        self, target_N: Tensor, num_chunks: int, dtype: torch.dtype, stats: frozenset[str]
    ) -> None:
        N = target_N.shape[0]
        self.target_N = target_N
        self.max_KN = torch.empty(num_chunks, N, dtype=dtype, device=target_N.device)
        self.sum_KN = torch.empty_like(self.max_KN)
        self.rest_KN = torch.empty_like(self.max_KN)
        self.target_z_N = torch.zeros(N, dtype=dtype, device=target_N.device)
        self.stats = stats
        self.part = {name: torch.zeros_like(self.max_KN) for name in stats - {"top1"}}

    def add(self, k: int, v0: int, z_NC: Tensor, out_NC: Tensor | None = None) -> Tensor:
        """Fold chunk ``k``; ``exp(z - max)`` overwrites the logits, or ``out_NC`` if given."""
        column_N1, hit_N1 = _columns(self.target_N, v0, v0 + z_NC.shape[1])
        if "mean_logit" in self.stats:
            self.part["mean_logit"][k] = z_NC.sum(1)
        self.target_z_N += torch.where(hit_N1, z_NC.gather(1, column_N1), 0.0)[:, 0]
        torch.amax(z_NC, 1, out=self.max_KN[k])
        # A chunk of a padded vocabulary may be -inf throughout.
        self.max_KN[k].clamp_(min=torch.finfo(z_NC.dtype).min)
        e_NC = torch.sub(z_NC, self.max_KN[k][:, None], out=z_NC if out_NC is None else out_NC)
        own_N1 = e_NC.exp_().gather(1, column_N1)
        e_NC.scatter_(1, column_N1, own_N1.masked_fill(hit_N1, 0.0))
        torch.sum(e_NC, 1, out=self.rest_KN[k])
        e_NC.scatter_(1, column_N1, own_N1)
        torch.add(self.rest_KN[k], torch.where(hit_N1, own_N1, 0.0)[:, 0], out=self.sum_KN[k])
        if "entropy" in self.stats:  # sum e * (z - max); e is 0 where z - max underflows
            self.part["entropy"][k] = torch.special.entr(e_NC).sum(1)
        if "log_sum_sq_probs" in self.stats:
            self.part["log_sum_sq_probs"][k] = e_NC.square().sum(1)
        return e_NC

    @cached_property
    def lse_N(self) -> Tensor:
        return torch.logsumexp(self.max_KN + self.sum_KN.log(), 0)

    def logp(self) -> Tensor:
        rest_lse_N = torch.logsumexp(self.max_KN + self.rest_KN.log(), 0)
        logp_N = -F.softplus(rest_lse_N - self.target_z_N, threshold=50.0)
        return torch.where(self.target_N == IGNORE, 0.0, logp_N)

    def finish_stats(self, ref: "_Fold", V: int) -> dict[str, Tensor]:
        """Statistics of each token; ``ref`` has the reference's fold where one needs it."""
        shift_KN = self.max_KN - self.lse_N
        weight_KN, out = shift_KN.exp(), {}
        if "mean_logit" in self.stats:
            out["mean_logit"] = self.part["mean_logit"].sum(0) / V
        if "top1" in self.stats:
            out["top1"] = (self.target_z_N >= self.max_KN.amax(0)).to(shift_KN.dtype)
        if "entropy" in self.stats:  # -sum p log p, with log p = (z - max) + shift
            own_KN = self.part["entropy"] - shift_KN * self.sum_KN
            out["entropy"] = (weight_KN * own_KN).sum(0)
        if "log_sum_sq_probs" in self.stats:
            squares_N = (weight_KN.square() * self.part["log_sum_sq_probs"]).sum(0)
            out["log_sum_sq_probs"] = squares_N.log()
        if "kl_ref" in self.stats:
            cross_N = ((ref.max_KN - ref.lse_N).exp() * self.part["kl_ref"]).sum(0)
            out["kl_ref"] = cross_N - ref.lse_N + self.lse_N
        scored_N = self.target_N != IGNORE
        return {name: torch.where(scored_N, x_N, 0.0) for name, x_N in out.items()}


class Streamer:
    """Runs a head over blocks of rows with the products and the chunk size of one call."""

    def __init__(self, head: Head, rows: TokenRows, needs: Needs, plan: Plan) -> None:
        self.head, self.rows, self.needs, self.mixed_rows = head, rows, needs, plan.mixed_rows
        V, size = head.w_VD.shape[0], plan.vocab_chunk
        self.chunks = [(v0, min(v0 + size, V)) for v0 in range(0, V, size)]
        self.products = Products(head.w_VD.dtype, head.w_VD.device)
        self.acc_dtype = self.products.acc_dtype

    def tokens(self, span: tuple[int, int]) -> Tokens:
        """A block's, with zeros for the hidden rows of ignored targets, where a non-finite value
        would reach the gradients as 0 * inf.  On a CPU the caller has left ignored targets out.
        """
        h_ND, target_N = self.rows.block(*span)
        if target_N.device.type != "cpu":
            h_ND = torch.where((target_N == IGNORE)[:, None], 0, h_ND)
        return Tokens(h_ND, target_N)

    def add_rows(self, total_TD: Tensor, span: tuple[int, int], dh_ND: Tensor) -> None:
        """Add a block's gradient to the hidden rows it came from."""
        self.rows.scatter(total_TD, *span, dh_ND)

    def place(self, x_ND: Tensor, scale_N: Tensor | None, *, reuse: bool = False) -> Tensor:
        """``x * scale`` of each token summed into its hidden row; (T, D) in the accumulator."""
        dh_TD = torch.zeros_like(self.rows.h_TD, dtype=self.acc_dtype)
        x_ND = x_ND if scale_N is None else x_ND * scale_N[:, None]
        self.rows.scatter(dh_TD, 0, x_ND.shape[0], x_ND)
        return dh_TD

    def _logits(self, h_blocks: list[Tensor], v0: int, v1: int) -> Tensor:
        z_NC = self.products.project(h_blocks, self.head.w_VD[v0:v1])
        if self.head.bias_V is not None:
            z_NC.add_(self.head.bias_V[v0:v1])
        if self.head.scale != 1.0:
            z_NC.mul_(self.head.scale)
        if self.head.softcap is not None:
            z_NC.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return z_NC

    def _slope(self, z_NC: Tensor) -> Tensor:
        """d z / d (uncapped z): 1 - tanh^2."""
        assert self.head.softcap is not None
        return (z_NC / self.head.softcap).square_().neg_().add_(1.0)

    def forward(
        self,
        span: tuple[int, int],
        *,
        keep: bool,
        stats: frozenset[str] = frozenset(),
        ref: "Streamer | None" = None,
        shares: Shares | None = None,
    ) -> Block:
        """Log-probs of a block; with ``keep`` also the stash its backward reads.

        ``ref`` is the reference, streamed beside the policy.  With ``shares`` the stash is that of
        the mixtures, and a row's gradient that of ``logp + ref share * KL``.
        """
        tokens = self.tokens(span)
        stash = Stash(tokens.target_N, self.chunks, self.acc_dtype) if keep else None
        chunks = None if stash is None else stash.chunks
        if chunks is None or shares is None or ref is None:
            block = self._forward(span, tokens, stats, ref, chunks)
        else:
            parts = []
            for start, stop in even_blocks(*span, self.mixed_rows):
                rows = slice(start - span[0], stop - span[0])
                own = [chunk[rows] for chunk in chunks]
                some = tokens.rows(rows)
                other = Stash(some.target_N, self.chunks, self.acc_dtype).chunks
                part = self._forward((start, stop), some, stats, ref, own, other)
                self._mix(part, shares.rows(rows), own, other)
                parts.append(part)
            block = Block.joined(parts, tokens, stash)
        block.tokens, block.stash = (tokens, stash) if keep else (None, None)
        return block

    def _mix(
        self, block: Block, shares: Shares, chunks: list[Tensor], ref_chunks: list[Tensor]
    ) -> None:
        """Turn what was kept of the policy's rows into mixtures of finished probabilities."""
        assert block.ref_max_KN is not None and block.ref_lse_N is not None
        own_KN = (block.max_KN - block.lse_N).exp_().mul_(shares.own_N)
        ref_KN = (block.ref_max_KN - block.ref_lse_N).exp_().mul_(shares.ref_N)
        for k, (kept_NC, ref_NC) in enumerate(zip(chunks, ref_chunks)):
            kept_NC.mul_(own_KN[k][:, None]).addcmul_(ref_NC, ref_KN[k][:, None])
        block.own_N, block.ref_max_KN = block.own(shares), None
        block.max_KN = block.lse_N.expand_as(block.max_KN)  # what is kept has no shift

    def _forward(
        self,
        span: tuple[int, int],
        tokens: Tokens,
        stats: frozenset[str],
        ref: "Streamer | None",
        chunks: list[Tensor] | None,
        ref_chunks: list[Tensor] | None = None,
    ) -> Block:
        """The forward of some rows; exponentials are left in the chunks that are given."""
        target_N, K = tokens.target_N, len(self.chunks)
        h_blocks = self.products.inner_blocks(tokens.h_ND)
        ref_blocks = ref.products.inner_blocks(ref.tokens(span).h_ND) if ref else []
        fold = _Fold(target_N, K, self.acc_dtype, stats)
        ref_fold = _Fold(target_N, K if ref else 0, self.acc_dtype, frozenset())
        keep = chunks is not None
        for k, (v0, v1) in enumerate(self.chunks):
            z_NC = self._logits(h_blocks, v0, v1)
            ref_z_NC = ref._logits(ref_blocks, v0, v1) if ref else None
            difference_NC = None
            if ref_z_NC is not None and "kl_ref" in stats:
                difference_NC = ref_z_NC - z_NC
            slope_NC = self._slope(z_NC) if keep and self.head.softcap is not None else None
            e_NC = fold.add(k, v0, z_NC, None if chunks is None else chunks[k])
            if ref_z_NC is not None:
                ref_kept = None if ref_chunks is None else ref_chunks[k]
                e_ref_NC = ref_fold.add(k, v0, ref_z_NC, ref_kept)
                if difference_NC is not None:
                    # Both logits of a padded token may be -inf, whose difference is NaN.
                    terms_NC = torch.where(e_ref_NC > 0, e_ref_NC * difference_NC, 0.0)
                    fold.part["kl_ref"][k] = terms_NC.sum(1)
                if ref_kept is not None and slope_NC is not None:
                    e_ref_NC.mul_(slope_NC)
            if slope_NC is not None:
                e_NC.mul_(slope_NC)
        logp_N = fold.logp()
        own_N = -torch.expm1(logp_N)
        target_slope_N = None
        if self.head.softcap is not None:
            target_slope_N = self._slope(fold.target_z_N)
            own_N *= target_slope_N
        block = Block(span, None, logp_N, fold.lse_N, fold.max_KN, None, own_N)
        block.stats = fold.finish_stats(ref_fold, self.head.w_VD.shape[0])
        if ref:
            block.ref_logp_N, block.ref_lse_N = ref_fold.logp(), ref_fold.lse_N
            block.ref_own_N = -torch.expm1(block.ref_logp_N)
            if target_slope_N is not None:
                block.ref_own_N *= target_slope_N
            if ref_chunks is not None:
                block.ref_max_KN = ref_fold.max_KN
        return block

    def _dlogits(
        self, block: Block, e_NC: Tensor, target_N: Tensor, coef_N: Tensor, k: int
    ) -> Tensor:
        """Gradient of ``sum coef * logp`` by chunk ``k`` of ``h @ w.T + bias``, without targets.

        ``e_NC`` is what the forward keeps of the chunk.  The targets' own entries are left zero for
        `_add_targets`.
        """
        row_N = (block.max_KN[k] - block.lse_N).exp_().mul_(coef_N).mul_(-self.head.scale)
        return self._without_targets(e_NC * row_N[:, None], target_N, k)

    def _without_targets(self, g_NC: Tensor, target_N: Tensor, k: int) -> Tensor:
        """Chunk ``k`` of a gradient with zeros for the targets' own entries."""
        column_N1, hit_N1 = _columns(target_N, *self.chunks[k])
        return g_NC.scatter_(1, column_N1, g_NC.gather(1, column_N1).masked_fill_(hit_N1, 0.0))

    def _add_targets(
        self, tokens: Tokens, own_N: Tensor, coef_N: Tensor, dh_ND: Tensor | None, into: Grads
    ) -> None:
        """The targets' own entries, in fp32: they are the largest of their rows, and tokens of one
        pair share a coefficient, so rounding them to bf16 first would be one coherent error.
        """
        own_N = own_N * coef_N * self.head.scale
        index_N = tokens.target_N.clamp(min=0)
        if dh_ND is not None:
            dh_ND.addcmul_(self.head.w_VD[index_N].to(dh_ND.dtype), own_N[:, None])
        if into.bias is not None:
            add_rows(into.bias, index_N, own_N)
        if into.w is not None:
            add_rows(into.w, index_N, tokens.h_ND.to(own_N.dtype) * own_N[:, None])

    def _add_chunk(
        self,
        g_NC: Tensor,
        h_ND: Tensor,
        k: int,
        into: Grads,
        dw_CD: Tensor | None,
        dh_ND: Tensor | None,
    ) -> None:
        """Add the products of chunk ``k``'s gradient ``g_NC``: bias, weight and hidden rows."""
        v0, v1 = self.chunks[k]
        if into.bias is not None:
            into.bias[v0:v1] += g_NC.sum(0)
        if dw_CD is None and dh_ND is None:
            return
        g_op_NC = self.products.operand(g_NC)
        if dw_CD is not None:
            self.products.addmm(dw_CD, g_op_NC.T, self.products.operand(h_ND))
        if dh_ND is not None:
            self.products.addmm(dh_ND, g_op_NC, self.products.operand(self.head.w_VD[v0:v1]))

    def _new_rows(self, h_ND: Tensor) -> Tensor | None:
        """The accumulator of a block's hidden rows, if their gradient is wanted."""
        return h_ND.new_zeros(h_ND.shape, dtype=self.acc_dtype) if self.needs.h else None

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
        """Add the head's gradients of ``upstream * sum coef * logp`` to ``into``; return the rows'.

        That is the block's, in ``out_ND`` if given.  With ``whole`` this block is the whole call
        and the result that of all hidden rows: each chunk of the weight's gradient is then one
        product, rounded into ``into.w``, and needs no accumulator; the rows of targets are rounded
        again when their own entries are added.  ``add`` is for kernels, which write as well.
        """
        assert block.stash is not None
        tokens = block.tokens or self.tokens(block.span)
        h_ND, target_N = tokens
        coef_N = coefficients(target_N, coef_N, upstream, self.acc_dtype)
        h_op_ND, dh_ND = self.products.operand(h_ND), self._new_rows(h_ND)
        for k, (v0, v1) in enumerate(self.chunks):
            g_NC = self._dlogits(block, block.stash.chunks[k], target_N, coef_N, k)
            dw_CD = None if into.w is None else into.w[v0:v1]
            if whole and dw_CD is not None:
                self.products.rounded_mm(g_NC.T, h_ND, dw_CD)
                dw_CD = None
            self._add_chunk(g_NC, h_op_ND, k, into, dw_CD, dh_ND)
        self._add_targets(tokens, block.own_N, coef_N, dh_ND, into)
        if out_ND is not None and dh_ND is not None:
            return out_ND.copy_(dh_ND)
        return self.place(dh_ND, None) if whole and dh_ND is not None else dh_ND

    def recompute_backward(
        self,
        blocks: list[Block],
        coef_N: Tensor,
        into: Grads,
        upstream: Tensor | None = None,
        *,
        ref: "Streamer | None" = None,
        shares: Shares | None = None,
        targets: bool = True,
    ) -> None:
        """Gradients with nothing kept but each row's log-sum-exp, vocabulary chunks outermost.

        The weight's gradient of a chunk is complete before the next chunk begins, so its fp32
        accumulator is one chunk high.  With ``shares`` the gradients are ``coef`` times those of
        the mixtures with ``ref``; without ``targets`` no entry belongs to a target.
        """
        coef_N = coefficients(self.rows.target_N, coef_N, upstream, self.acc_dtype)
        if self.needs.h:
            into.h = torch.zeros_like(self.rows.h_TD, dtype=self.acc_dtype)
        for k, (v0, v1) in enumerate(self.chunks):
            dw_CD = None
            if into.w is not None:
                dw_CD = into.w.new_zeros(v1 - v0, into.w.shape[1], dtype=self.acc_dtype)
            for block in blocks:
                h_ND, target_N = self.tokens(block.span)
                coef = coef_N[slice(*block.span)]
                if ref is None or shares is None:
                    e_NC = self._probs(h_ND, k, block.max_KN[k])
                    g_NC = self._dlogits(block, e_NC, target_N, coef, k)
                else:
                    g_NC = self._mixture(h_ND, k, block, ref, shares.rows(slice(*block.span)))
                    g_NC *= (coef * -self.head.scale)[:, None]
                    if targets:
                        g_NC = self._without_targets(g_NC, target_N, k)
                dh_ND = self._new_rows(h_ND)
                self._add_chunk(g_NC, h_ND, k, into, dw_CD, dh_ND)
                if into.h is not None and dh_ND is not None:
                    self.add_rows(into.h, block.span, dh_ND)
            if into.w is not None and dw_CD is not None:
                into.w[v0:v1] = dw_CD
        for block in blocks if targets else ():
            tokens = self.tokens(block.span)
            dh_ND = self._new_rows(tokens.h_ND)
            own_N = block.own(None if shares is None else shares.rows(slice(*block.span)))
            self._add_targets(tokens, own_N, coef_N[slice(*block.span)], dh_ND, into)
            if into.h is not None and dh_ND is not None:
                self.add_rows(into.h, block.span, dh_ND)

    def _probs(self, h_ND: Tensor, k: int, shift_N: Tensor) -> Tensor:
        """Exponentials of a chunk, times the cap's slope."""
        z_NC = self._logits(self.products.inner_blocks(h_ND), *self.chunks[k])
        slope_NC = None if self.head.softcap is None else self._slope(z_NC)
        z_NC.sub_(shift_N[:, None]).exp_()
        return z_NC if slope_NC is None else z_NC.mul_(slope_NC)

    def _mixture(
        self, h_ND: Tensor, k: int, block: Block, ref: "Streamer", shares: Shares
    ) -> Tensor:
        """``own * p + ref * p_ref`` of a chunk, times the slope of the policy's cap."""
        assert block.ref_lse_N is not None
        z_NC = self._logits(self.products.inner_blocks(h_ND), *self.chunks[k])
        slope_NC = None if self.head.softcap is None else self._slope(z_NC)
        z_NC.sub_(block.lse_N[:, None]).exp_().mul_(shares.own_N[:, None])
        ref_blocks = ref.products.inner_blocks(ref.tokens(block.span).h_ND)
        ref_z_NC = ref._logits(ref_blocks, *self.chunks[k])
        ref_z_NC.sub_(block.ref_lse_N[:, None]).exp_()
        z_NC.addcmul_(ref_z_NC, shares.ref_N[:, None])
        return z_NC if slope_NC is None else z_NC.mul_(slope_NC)
