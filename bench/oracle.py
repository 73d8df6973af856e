"""What a variant should have given, in fp64 on the inputs as rounded to the tested dtype.

Small problems are compared whole. Beyond `FULL_LIMIT` multiply-adds in one matmul, or where an fp64
head would crowd the variants out of the GPU's memory, a seeded slice is: the log-probs and the
gradients of h of `TOKENS` rows, and the gradient of w for up to `VOCAB` rows, half of them targets
of those tokens. Only what is compared is cut. Every number is fp64 all the same: the loss, the
sequence sums and a row of w's gradient need each token's log-sum-exp, and that costs one fp64
matmul, where gradients of everything would cost four.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastdpo.loss import reference

from .variants import FORWARD, FROZEN, WITH_REFERENCE, Problem, pair_loss

FULL_LIMIT = {"cpu": 2**36, "cuda": 2**43}  # N * D * V
TILE_BYTES = {"cpu": 2**26, "cuda": 2**30}  # an fp64 tile of logits
TOKENS, VOCAB = 1024, 512

Index = Tensor | slice


@dataclass
class Gold:
    """The loss, the sums and, for the compared rows, log-probs and gradients."""

    loss: Tensor
    logp_S: Tensor
    logp_N: Tensor
    dh_ND: Tensor | None
    dw_VD: Tensor | None
    tokens: Index  # which rows of h, and of the log-probs
    vocab: Index  # which rows of w


def memory_bytes(device: torch.device) -> float:
    """The GPU's memory; a CPU's peaks are taken in other processes, so it has no limit here."""
    cuda = device.type == "cuda"
    return torch.cuda.get_device_properties(device).total_memory if cuda else float("inf")


class Oracle:
    """fp64 results of one problem; log-probs are kept from pass to pass, gradients are not."""

    def __init__(self, problem: Problem, sliced: bool | None = None) -> None:
        N, D, V, self.pairs, self.softcap = problem.shape
        self.problem, self.target_N = problem, problem.target_N
        device = problem.h_ND.device
        self.rows = max(1, TILE_BYTES[device.type] // (8 * V))
        self.tokens: Index = slice(None)
        self.vocab: Index = slice(None)
        if sliced is None:
            crowded = memory_bytes(device) < 20 * 8 * V * D
            sliced = crowded or FULL_LIMIT[device.type] < N * D * V
        if sliced:
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randperm(N, generator=generator)[:TOKENS].sort().values
            tokens = tokens.to(self.target_N.device)
            random = torch.randperm(V, generator=generator)[: VOCAB // 2].to(tokens.device)
            self.tokens = tokens
            self.vocab = torch.cat((random, self.target_N[tokens[: VOCAB // 2]])).unique()

    @property
    def w_VD(self) -> Tensor:
        """A copy, made where it is needed: it is four times the size of a 16-bit head."""
        return self.problem.w_VD.detach().double()

    def _tiles(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(x.split(self.rows) for x in tensors))

    def _logp_and_lse(self, h_ND: Tensor) -> tuple[Tensor, Tensor]:
        w, found = self.w_VD, []
        for h, target in self._tiles(h_ND.detach(), self.target_N):
            logits = reference.linear_logits(h.double(), w, softcap=self.softcap)
            lse = logits.logsumexp(-1)
            found.append((logits.gather(1, target[:, None])[:, 0] - lse, lse))
        logp, lse = zip(*found)
        return torch.cat(logp), torch.cat(lse)

    @cached_property
    def policy(self) -> tuple[Tensor, Tensor]:
        """Each token's log-prob and log-sum-exp."""
        return self._logp_and_lse(self.problem.h_ND)

    @cached_property
    def ref_logp_S(self) -> Tensor:
        return self._sums(self._logp_and_lse(self.problem.ref_h_ND)[0])

    def _sums(self, logp_N: Tensor) -> Tensor:
        return logp_N.view(2 * self.pairs, -1).sum(1)

    def gold(self, pass_: str) -> Gold:
        """What a variant should give in this pass."""
        ref_logp_S = self.problem.ref_logp_S.double()
        if pass_ == WITH_REFERENCE:
            ref_logp_S = self.ref_logp_S
        logp_N = self.policy[0].clone().requires_grad_()
        loss = pair_loss(self._sums(logp_N), ref_logp_S, self.problem.beta)
        (slope_N,) = torch.autograd.grad(loss, logp_N)
        logp_N, dh, dw = logp_N.detach(), None, None
        if pass_ != FORWARD:
            with_w, whole = pass_ != FROZEN, isinstance(self.tokens, slice)
            dh, dw = self._gradients(slope_N, with_w and whole)
            if with_w and not whole:
                dw = self._dw_slice(slope_N)
        return Gold(
            loss.detach(),
            self._sums(logp_N),
            logp_N[self.tokens],
            dh,
            dw,
            self.tokens,
            self.vocab,
        )

    def _gradients(self, slope_N: Tensor, with_w: bool) -> tuple[Tensor, Tensor | None]:
        """By autograd, from the plain meaning of the op."""
        w = self.w_VD.requires_grad_(with_w)
        dw = torch.zeros_like(w) if with_w else None
        compared = (self.problem.h_ND.detach(), self.target_N, slope_N)
        dh = []
        for h, target, slope in self._tiles(*(x[self.tokens] for x in compared)):
            h = h.double().requires_grad_()
            logp = reference.linear_logp(h, w, target, softcap=self.softcap)
            part, *dw_part = torch.autograd.grad(logp, (h, w) if with_w else (h,), slope)
            dh.append(part)
            if dw is not None:
                dw += dw_part[0]
        return torch.cat(dh), None if dw is None else dw.detach()

    def _dw_slice(self, slope_N: Tensor) -> Tensor:
        """Rows of w's gradient from all tokens: p is exp(logit - the token's log-sum-exp)."""
        vocab = torch.arange(self.problem.shape.V, device=self.target_N.device)[self.vocab]
        w = self.problem.w_VD.detach()[vocab].double()
        dw = torch.zeros_like(w)
        tiles = (self.problem.h_ND.detach(), self.target_N, slope_N, self.policy[1])
        for h, target, slope, lse in self._tiles(*tiles):
            h = h.double()
            z = reference.linear_logits(h, w, softcap=self.softcap)
            hot = target[:, None].eq(vocab).double()
            dz = slope[:, None] * (hot - (z - lse[:, None]).exp())
            if self.softcap is not None:
                dz *= 1 - (z / self.softcap).square()
            dw += dz.T @ h
        return dw


def fp32_product(h_ND: Tensor, w_VD: Tensor) -> Tensor:
    """``h @ w.T`` accumulated and returned in fp32, by the tensor cores where there are some."""
    if h_ND.is_cuda and h_ND.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(h_ND, w_VD.T, out_dtype=torch.float32)
    return h_ND.float() @ w_VD.float().T


def plain_logp(problem: Problem, tokens: Index) -> Tensor:
    """Log-probs from a matmul whose result is fp32, then fp64: what a plain exact route gives."""
    h, w = problem.h_ND.detach()[tokens], problem.w_VD.detach()
    target, softcap = problem.target_N[tokens], problem.shape.softcap
    rows = max(1, TILE_BYTES[h.device.type] // (8 * problem.shape.V))
    found = []
    for x, y in zip(h.split(rows), target.split(rows)):
        z = fp32_product(x, w).double()
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        found.append(z.log_softmax(-1).gather(1, y[:, None])[:, 0])
    return torch.cat(found)
