"""What is measured: the fused loss, its peers and the bare matmuls, behind one signature.

N scored tokens, D hidden, V vocabulary, P pairs, S = 2P sequences, T tokens of one sequence.

Every variant solves the same problem: summed log-probs of S sequences of equal length (nothing here
is padded, so no peer is charged for padding), then DPO with beta = 0.1. alpha is 0 for everyone,
because Liger's loss has no length term; with equal lengths that term would be zero anyway. The
reference log-probs are zero, which is what Liger computes with `use_ref_model=False`, except in the
pass "reference+forward+backward", where each variant computes them from the reference's hidden
states and the same head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FORWARD, TRAIN, WITH_REFERENCE = PASSES = (
    "forward",
    "forward+backward",
    "reference+forward+backward",
)
MATMULS = {FORWARD: 1, TRAIN: 3, WITH_REFERENCE: 4}


class Shape(NamedTuple):
    """A head and a batch: N tokens in `pairs` pairs of equal length."""

    N: int
    D: int
    V: int
    pairs: int


SHAPES = {
    "smollm2": Shape(N=1024, D=576, V=49152, pairs=4),  # SmolLM2-135M
    "qwen3-8b": Shape(N=16384, D=4096, V=151936, pairs=8),
}


@dataclass
class Problem:
    """Inputs shared by all variants; sequences alternate chosen, rejected."""

    shape: Shape
    h_ND: Tensor
    w_VD: Tensor
    target_N: Tensor
    bounds_S1: Tensor
    ref_h_ND: Tensor
    ref_logp_S: Tensor
    padded_h: (
        Tensor  # (2P, T, D), all chosen first: Liger's layout, made here so its copy costs nobody
    )
    padded_target: Tensor
    padded_ref_h: Tensor
    beta: float = 0.1

    def hidden(self, padded: bool) -> Tensor:
        return self.padded_h if padded else self.h_ND

    def ref_hidden(self, padded: bool) -> Tensor:
        return self.padded_ref_h if padded else self.ref_h_ND


def to_padded(x: Tensor, pairs: int) -> Tensor:
    """(N, ...) alternating chosen, rejected -> (2P, T, ...) with all chosen first."""
    return x.reshape(pairs, 2, -1, *x.shape[1:]).transpose(0, 1).flatten(0, 1).contiguous()


def from_padded(x: Tensor, pairs: int) -> Tensor:
    """The inverse of `to_padded`, for a gradient."""
    return x.unflatten(0, (2, pairs)).transpose(0, 1).flatten(0, 2)


def make_problem(
    shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Problem:
    """Random normal inputs whose logits have a standard deviation of 2."""
    N, D, V, pairs = shape
    if min(shape) < 1 or N % (2 * pairs):
        raise ValueError(f"N={N} tokens can't be split into {pairs} pairs of equal length")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        x = torch.randn(*size, generator=generator, device=device)
        return x.mul_(std).to(dtype)

    h, ref_h, w = normal(N, D), normal(N, D), normal(V, D, std=2 * D**-0.5)
    target = torch.randint(V, (N,), generator=generator, device=device)
    return Problem(
        shape=shape,
        h_ND=h.requires_grad_(),
        w_VD=w.requires_grad_(),
        target_N=target,
        bounds_S1=torch.arange(0, N + 1, N // (2 * pairs)),
        ref_h_ND=ref_h,
        ref_logp_S=torch.zeros(2 * pairs, device=device),
        padded_h=to_padded(h.detach(), pairs).requires_grad_(),
        padded_target=to_padded(target, pairs),
        padded_ref_h=to_padded(ref_h, pairs),
    )


@dataclass
class Out:
    """A loss, its per-sequence log-probs, and what is known about the memory it takes."""

    loss: Tensor
    logp_S: Tensor
    route: str | None = None
    workspace_bytes: int | None = None
    accumulator_bytes: int | None = None


Loss = Callable[[Problem, Tensor, Tensor, Tensor | None], Out]  # problem, h, w, ref_h
TokenLogp = Callable[[Tensor, Tensor, Tensor], Tensor]  # h_ND, w_VD, target_N -> logp_N
Memory = Callable[
    [Shape, int], tuple[int, int]
]  # shape, bytes an element -> workspace, accumulators


@dataclass(frozen=True)
class Variant:
    """One row of the table. `loss` is differentiable in h and w; None marks the bare matmuls."""

    name: str
    loss: Loss | None
    token_logp: TokenLogp | None = None
    padded: bool = False
    compiled: bool = False
    ours: bool = False
    passes: tuple[str, ...] = (FORWARD, TRAIN)


def step(
    variant: Variant, problem: Problem, pass_: str
) -> tuple[Out, Tensor | None, Tensor | None]:
    """One measured call: the loss and, unless it is forward only, the gradients of h and w."""
    if variant.loss is None:
        raise ValueError(f"{variant.name} has no loss; time it with floor_step()")
    h, w = problem.hidden(variant.padded), problem.w_VD
    if pass_ == FORWARD:
        with torch.no_grad():
            return variant.loss(problem, h.detach(), w.detach(), None), None, None
    ref_h = problem.ref_hidden(variant.padded) if pass_ == WITH_REFERENCE else None
    out = variant.loss(problem, h, w, ref_h)
    dh, dw = torch.autograd.grad(out.loss, (h, w))
    return out, dh, dw


def floor_step(problem: Problem, pass_: str) -> Callable[[], None]:
    """The matmuls no exact route can do without, into buffers allocated and touched beforehand."""
    h, w, ref_h = problem.h_ND.detach(), problem.w_VD.detach(), problem.ref_h_ND
    logits = torch.zeros(h.shape[0], w.shape[0], dtype=h.dtype, device=h.device)
    g = torch.empty_like(logits).normal_()
    dh, dw = torch.zeros_like(h), torch.zeros_like(w)

    def matmuls() -> None:
        if pass_ == WITH_REFERENCE:
            torch.mm(ref_h, w.T, out=logits)
        torch.mm(h, w.T, out=logits)
        if pass_ != FORWARD:
            torch.mm(g, w, out=dh)
            torch.mm(g.T, h, out=dw)

    return matmuls


def pair_loss(logp_S: Tensor, ref_logp_S: Tensor, beta: float) -> Tensor:
    """DPO without a length term, mean over pairs of (chosen, rejected)."""
    logratio = (logp_S - ref_logp_S).view(-1, 2)
    return F.softplus(-beta * (logratio[:, 0] - logratio[:, 1])).mean()


def sum_sequences(logp_N: Tensor, problem: Problem) -> Tensor:
    """Log-probs of equally long sequences."""
    return logp_N.float().view(2 * problem.shape.pairs, -1).sum(1)


def over_tokens(
    name: str,
    token_logp: TokenLogp,
    *,
    memory: Memory | None = None,
    route: Callable[[Tensor], str] | None = None,
    **kwargs,
) -> Variant:
    """A peer that gives per-token log-probs, with the shared loss on top."""

    def loss(problem: Problem, h: Tensor, w: Tensor, ref_h: Tensor | None) -> Out:
        ref_logp_S = problem.ref_logp_S
        if ref_h is not None:
            with torch.no_grad():
                ref_logp_S = sum_sequences(token_logp(ref_h, w, problem.target_N), problem)
        logp_S = sum_sequences(token_logp(h, w, problem.target_N), problem)
        out = Out(pair_loss(logp_S, ref_logp_S, problem.beta), logp_S.detach())
        if route is not None:
            out.route = route(h)
        if memory is not None:
            out.workspace_bytes, out.accumulator_bytes = memory(problem.shape, h.element_size())
        return out

    return Variant(name, loss, token_logp, **kwargs)


def fastdpo_variant(workspace_mib: int | None = None, passes: tuple[str, ...] = PASSES) -> Variant:
    """The fused loss; its reference log-probs come from its own forward pass."""

    def loss(problem: Problem, h: Tensor, w: Tensor, ref_h: Tensor | None) -> Out:
        from fastdpo import linear_dpo_loss

        def dpo(hidden: Tensor, ref_logp_S: Tensor):
            return linear_dpo_loss(
                hidden,
                w,
                problem.target_N,
                problem.bounds_S1,
                ref_logp_S,
                beta=problem.beta,
                alpha=0.0,
                workspace_mib=workspace_mib,
            )

        ref_logp_S = problem.ref_logp_S
        if ref_h is not None:
            with torch.no_grad():
                ref_logp_S = dpo(ref_h, ref_logp_S).logp_S
        result = dpo(h, ref_logp_S)
        plan = result.plan
        return Out(
            result.loss, result.logp_S, plan.route, plan.workspace_bytes, plan.accumulator_bytes
        )

    def token_logp(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
        from fastdpo import linear_logp

        return linear_logp(h, w, target)

    name = "fastdpo" if workspace_mib is None else f"fastdpo ({workspace_mib} MiB)"
    return Variant(name, loss, token_logp, ours=True, passes=passes)


# The trainer's constants, in trl.trainer.utils and trl.kernels.chunked_logprob.
TRL_VOCABULARY_CHUNK, TRL_TOKEN_CHUNK = 32768, 4096


def trl_memory(shape: Shape, itemsize: int) -> tuple[int, int]:
    """One tile in the compute dtype; fp32 gradients of h and w."""
    N, D, V, _ = shape
    return min(N, TRL_TOKEN_CHUNK) * TRL_VOCABULARY_CHUNK * itemsize, 4 * D * (N + V)


def trl_variant(name: str, outputs: tuple[str, ...], **kwargs) -> Variant:
    """TRL's chunked head, on rows already gathered (its `hidden[mask]` copy isn't charged)."""

    def token_logp(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
        from trl.kernels import ChunkedLogProbFunction

        # h, w, bias, target, temperature, chunk_size, softcap, logit_scale, outputs
        return ChunkedLogProbFunction.apply(
            h, w, None, target, 1.0, TRL_VOCABULARY_CHUNK, None, 1.0, outputs
        )[0]

    return over_tokens(name, token_logp, memory=trl_memory, **kwargs)


def liger_variant(name: str, compiled: bool) -> Variant:
    """Liger's DPO loss, a pair at a time, prompt positions and all; here none is padding."""

    def loss(problem: Problem, h: Tensor, w: Tensor, ref_h: Tensor | None) -> Out:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss  # pyright: ignore[reportMissingImports]

        dpo = LigerFusedLinearDPOLoss(
            beta=problem.beta, compiled=compiled, use_ref_model=ref_h is not None
        )
        ref = {} if ref_h is None else {"ref_input": ref_h, "ref_weight": w.detach()}
        value, (chosen, rejected, *_) = dpo(w, h, problem.padded_target, **ref)
        N, _, V, pairs = problem.shape
        logp_S = torch.stack((chosen, rejected), dim=1).flatten().detach()
        # By its source: a pair's logits, and their fp32 log-softmax; w's gradient in w's dtype.
        return Out(value, logp_S, None, N // pairs * V * (h.element_size() + 4), 0)

    return Variant(name, loss, padded=True, compiled=compiled, passes=PASSES)


def naive_logp(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """The usual route: logits in the inputs' dtype, an fp32 log-softmax, a gather."""
    return (h @ w.T).float().log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)


def naive_memory(shape: Shape, itemsize: int) -> tuple[int, int]:
    """Logits and their fp32 log-softmax; temporaries come on top."""
    return shape.N * shape.V * (itemsize + 4), 0


@cache
def compiled_naive() -> TokenLogp:
    # One specialized graph a shape, as training at a fixed shape would have.
    return torch.compile(naive_logp, dynamic=False)


def compiled_naive_logp(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """The usual route, fused by torch.compile where it can be."""
    return compiled_naive()(h, w, target)


def torch_logp(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """torch's own chunked linear cross-entropy."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(h, w, target, reduction="none", options=options)


def cce_logp(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """Cut cross-entropy, exact: its gradient filter would drop nearly all of these flat rows."""
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return -linear_cross_entropy(h, w, target, reduction="none", filter_eps=None, impl=cce_route(h))


def cce_route(h: Tensor) -> str:
    """Its kernels need a GPU; its own way elsewhere is torch.compile of the logits route."""
    return "cce" if h.is_cuda else "torch_compile"


def trl_name() -> str:
    """TRL's row carries the version that is installed."""
    try:
        return "trl-" + ".".join(version("trl").split(".")[:2])
    except PackageNotFoundError:
        return "trl"


FASTDPO = fastdpo_variant()
FLOOR = Variant("bare matmuls", None, passes=PASSES)
# The trainer also asks for three metrics; without them TRL is faster: that row is the one to beat.
TRL = trl_variant(f"{trl_name()} (log-probs only)", (), passes=PASSES)
VARIANTS = {
    variant.name: variant
    for variant in (
        FASTDPO,
        fastdpo_variant(workspace_mib=32, passes=(FORWARD, TRAIN)),
        TRL,
        trl_variant(trl_name(), ("entropy", "mean_logits", "is_top1")),
        liger_variant("liger", compiled=True),
        liger_variant("liger (not compiled)", compiled=False),
        over_tokens("naive", naive_logp, memory=naive_memory, passes=PASSES),
        over_tokens("naive (torch.compile)", compiled_naive_logp, compiled=True),
        over_tokens("cut-cross-entropy", cce_logp, route=cce_route, compiled=True),
        over_tokens("torch linear_cross_entropy", torch_logp),
        FLOOR,
    )
}
