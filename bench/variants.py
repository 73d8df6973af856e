"""What is measured: the fused loss, its peers and the bare matmuls, behind one signature.

N scored tokens, D hidden, V vocabulary, P pairs, S = 2P sequences, T tokens of one sequence.

Every variant solves the same problem: summed log-probs of S sequences of equal length (nothing here
is padded, so no peer is charged for padding), then DPO. alpha is 0 for everyone, because Liger's
loss has no length term; with equal lengths that term would be zero anyway. The reference log-probs
are zero, which is what Liger computes with `use_ref_model=False`, except in the pass
"reference+forward+backward", where each variant computes them from the reference's hidden states
and the same head.

A head with a softcap (Gemma 2) is measured with it; a peer that has none gets a row that says so.
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

FORWARD, TRAIN, FROZEN, WITH_REFERENCE = PASSES = (
    "forward",
    "forward+backward",
    "frozen head",  # forward and backward, without the gradient of w
    "reference+forward+backward",
)
MATMULS = {FORWARD: 1, TRAIN: 3, FROZEN: 2, WITH_REFERENCE: 4}


class Shape(NamedTuple):
    """A head and a batch: N tokens in `pairs` pairs of equal length."""

    N: int
    D: int
    V: int
    pairs: int
    softcap: float | None = None


SHAPES = {
    "llama-3-8b": Shape(N=8192, D=4096, V=128256, pairs=4),
    "qwen2.5-7b": Shape(N=8192, D=3584, V=152064, pairs=4),
    "gemma-2-9b": Shape(N=8192, D=3584, V=256000, pairs=4, softcap=30.0),
    "llama-3.2-1b": Shape(N=8192, D=2048, V=128256, pairs=4),
    "smollm2": Shape(N=1024, D=576, V=49152, pairs=4),  # SmolLM2-135M
}
GRID_TOKENS = tuple(2**n for n in range(11, 18))  # 2,048 to 131,072


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
    beta: float

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


def beta_of(shape: Shape) -> float:
    """0.1 up to 128 tokens a sequence, falling with the square root of the length beyond.

    A random margin grows with that root, and a saturated loss has no gradient to check.
    """
    return 0.1 * min(1.0, (128 * 2 * shape.pairs / shape.N) ** 0.5)


def make_problem(
    shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Problem:
    """Random normal inputs whose logits have a standard deviation of 2."""
    N, D, V, pairs, _ = shape
    if min(N, D, V, pairs) < 1 or N % (2 * pairs):
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
        beta=beta_of(shape),
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
# h_ND, w_VD, target_N, softcap -> logp_N; NotImplementedError for a softcap it doesn't have
TokenLogp = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
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
    passes: tuple[str, ...] = (FORWARD, TRAIN, FROZEN)
    devices: tuple[str, ...] = ("cpu", "cuda")  # where it is run unless it is asked for by name


def step(
    variant: Variant, problem: Problem, pass_: str
) -> tuple[Out, Tensor | None, Tensor | None]:
    """One measured call: the loss and the gradients of h and w that the pass has."""
    if variant.loss is None:
        raise ValueError(f"{variant.name} has no loss; time it with floor_step()")
    h, w = problem.hidden(variant.padded), problem.w_VD
    if pass_ == FORWARD:
        with torch.no_grad():
            return variant.loss(problem, h.detach(), w.detach(), None), None, None
    if pass_ == FROZEN:
        out = variant.loss(problem, h, w.detach(), None)
        return out, torch.autograd.grad(out.loss, h)[0], None
    ref_h = problem.ref_hidden(variant.padded) if pass_ == WITH_REFERENCE else None
    out = variant.loss(problem, h, w, ref_h)
    dh, dw = torch.autograd.grad(out.loss, (h, w))
    return out, dh, dw


FLOOR_ROWS = 8192


def floor_step(problem: Problem, pass_: str, rows: int = FLOOR_ROWS) -> Callable[[], None]:
    """The matmuls no exact route can do without, into buffers allocated and touched beforehand.

    More than `rows` tokens go in blocks, since all their logits would take memory that the variants
    need; the sums of w's gradient over blocks are left out. The logits stand in for their gradient.
    """
    h, w, ref_h = problem.h_ND.detach(), problem.w_VD.detach(), problem.ref_h_ND
    logits = torch.zeros(min(rows, h.shape[0]), w.shape[0], dtype=h.dtype, device=h.device)
    dh, dw = torch.zeros_like(h), torch.zeros_like(w)

    def matmuls() -> None:
        for n in range(0, h.shape[0], rows):
            x, z = h[n : n + rows], logits[: h.shape[0] - n]
            if pass_ == WITH_REFERENCE:
                torch.mm(ref_h[n : n + rows], w.T, out=z)
            torch.mm(x, w.T, out=z)
            if pass_ != FORWARD:
                torch.mm(z, w, out=dh[n : n + rows])
            if pass_ in (TRAIN, WITH_REFERENCE):
                torch.mm(z.T, x, out=dw)

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
        target, softcap = problem.target_N, problem.shape.softcap
        ref_logp_S = problem.ref_logp_S
        if ref_h is not None:
            with torch.no_grad():
                ref_logp_S = sum_sequences(token_logp(ref_h, w, target, softcap), problem)
        logp_S = sum_sequences(token_logp(h, w, target, softcap), problem)
        out = Out(pair_loss(logp_S, ref_logp_S, problem.beta), logp_S.detach())
        if route is not None:
            out.route = route(h)
        if memory is not None:
            out.workspace_bytes, out.accumulator_bytes = memory(problem.shape, h.element_size())
        return out

    return Variant(name, loss, token_logp, **kwargs)


def refuse_softcap(softcap: float | None) -> None:
    """For a peer without one: a row that says so, and no time for another function."""
    if softcap is not None:
        raise NotImplementedError("it has no softcap")


def fastdpo_variant(workspace_mib: int | None = None, **kwargs) -> Variant:
    """The fused loss, with its default workspace or another; the reference is part of the call."""

    def loss(problem: Problem, h: Tensor, w: Tensor, ref_h: Tensor | None) -> Out:
        from fastdpo import linear_dpo_loss

        result = linear_dpo_loss(
            h,
            w,
            problem.target_N,
            problem.bounds_S1,
            problem.ref_logp_S if ref_h is None else None,
            beta=problem.beta,
            alpha=0.0,
            softcap=problem.shape.softcap,
            ref_h_TD=ref_h,
            ref_w_VD=None if ref_h is None else w.detach(),
            workspace_mib=workspace_mib,
        )
        plan = result.plan
        return Out(
            result.loss, result.logp_S, plan.route, plan.workspace_bytes, plan.accumulator_bytes
        )

    def token_logp(h: Tensor, w: Tensor, target: Tensor, softcap: float | None) -> Tensor:
        from fastdpo import linear_logp

        return linear_logp(h, w, target, softcap=softcap, workspace_mib=workspace_mib)

    name = "fastdpo" if workspace_mib is None else f"fastdpo ({workspace_mib} MiB)"
    return Variant(name, loss, token_logp, ours=True, **kwargs)


# The trainer's constants, in trl.trainer.utils and trl.kernels.chunked_logprob.
TRL_VOCABULARY_CHUNK, TRL_TOKEN_CHUNK = 32768, 4096


def trl_memory(shape: Shape, itemsize: int) -> tuple[int, int]:
    """One tile in the compute dtype; fp32 gradients of h and w."""
    N, D, V, *_ = shape
    return min(N, TRL_TOKEN_CHUNK) * TRL_VOCABULARY_CHUNK * itemsize, 4 * D * (N + V)


def trl_variant(name: str, outputs: tuple[str, ...], **kwargs) -> Variant:
    """TRL's chunked head, on rows already gathered (its `hidden[mask]` copy isn't charged)."""

    def token_logp(h: Tensor, w: Tensor, target: Tensor, softcap: float | None) -> Tensor:
        from trl.kernels import ChunkedLogProbFunction

        # h, w, bias, target, temperature, chunk_size, softcap, logit_scale, outputs
        return ChunkedLogProbFunction.apply(
            h, w, None, target, 1.0, TRL_VOCABULARY_CHUNK, softcap, 1.0, outputs
        )[0]

    return over_tokens(name, token_logp, memory=trl_memory, **kwargs)


def liger_variant(name: str, compiled: bool) -> Variant:
    """Liger's DPO loss, a pair at a time, prompt positions and all; here none is padding."""

    def loss(problem: Problem, h: Tensor, w: Tensor, ref_h: Tensor | None) -> Out:
        refuse_softcap(problem.shape.softcap)
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss  # pyright: ignore[reportMissingImports]

        dpo = LigerFusedLinearDPOLoss(
            beta=problem.beta, compiled=compiled, use_ref_model=ref_h is not None
        )
        ref = {} if ref_h is None else {"ref_input": ref_h, "ref_weight": w.detach()}
        value, (chosen, rejected, *_) = dpo(w, h, problem.padded_target, **ref)
        N, _, V, pairs, _ = problem.shape
        logp_S = torch.stack((chosen, rejected), dim=1).flatten().detach()
        # By its source: a pair's logits, and their fp32 log-softmax; w's gradient in w's dtype.
        return Out(value, logp_S, None, N // pairs * V * (h.element_size() + 4), 0)

    return Variant(name, loss, padded=True, compiled=compiled, passes=PASSES)


def naive_logp(h: Tensor, w: Tensor, target: Tensor, softcap: float | None = None) -> Tensor:
    """The usual route: logits and softcap in the inputs' dtype, an fp32 log-softmax, a gather."""
    logits = h @ w.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.float().log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)


def naive_memory(shape: Shape, itemsize: int) -> tuple[int, int]:
    """Logits and their fp32 log-softmax; temporaries come on top."""
    return shape.N * shape.V * (itemsize + 4), 0


@cache
def compiled_naive() -> TokenLogp:
    # One specialized graph a shape, as training at a fixed shape would have; `measure.run` resets
    # the compiler for each shape and pass, because past its limit of graphs it stops compiling.
    return torch.compile(naive_logp, dynamic=False)


def compiled_naive_logp(h: Tensor, w: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    """The usual route, fused by torch.compile where it can be."""
    return compiled_naive()(h, w, target, softcap)


def torch_logp(h: Tensor, w: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    """torch's own chunked linear cross-entropy."""
    refuse_softcap(softcap)
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(h, w, target, reduction="none", options=options)


def cce_logp(h: Tensor, w: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    """Cut cross-entropy, exact: its gradient filter would drop nearly all of these flat rows."""
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return -linear_cross_entropy(
        h, w, target, softcap=softcap, reduction="none", filter_eps=None, impl=cce_route(h)
    )


def cce_route(h: Tensor) -> str:
    """Its kernels need a GPU; its own way elsewhere is torch.compile of the logits route."""
    return "cce" if h.is_cuda else "torch_compile"


def trl_name() -> str:
    """TRL's row carries the version that is installed."""
    try:
        return "trl-" + ".".join(version("trl").split(".")[:2])
    except PackageNotFoundError:
        return "trl"


FASTDPO = fastdpo_variant(passes=PASSES)
# The targets name these workspaces, since the default is a share of the device's memory; on a CPU a
# smaller one than the default says more.
FASTDPO_LARGE = fastdpo_variant(2560, passes=PASSES, devices=("cuda",))
FASTDPO_MIDDLE = fastdpo_variant(1024, passes=PASSES, devices=())
FASTDPO_SMALL = fastdpo_variant(256, passes=(TRAIN, FROZEN), devices=("cuda",))
FLOOR = Variant("bare matmuls", None, passes=PASSES)
# The trainer also asks for three metrics; without them TRL is faster: that row is the one to beat.
TRL = trl_variant(f"{trl_name()} (log-probs only)", (), passes=PASSES)
LIGER = liger_variant("liger", compiled=True)
LIGER_EAGER = liger_variant("liger (not compiled)", compiled=False)
NAIVE = over_tokens("naive", naive_logp, memory=naive_memory, passes=PASSES)
VARIANTS = {
    variant.name: variant
    for variant in (
        FASTDPO,
        FASTDPO_LARGE,
        FASTDPO_MIDDLE,
        FASTDPO_SMALL,
        fastdpo_variant(32, passes=(FORWARD, TRAIN), devices=("cpu",)),
        TRL,
        trl_variant(trl_name(), ("entropy", "mean_logits", "is_top1")),
        LIGER,
        LIGER_EAGER,
        NAIVE,
        over_tokens("naive (torch.compile)", compiled_naive_logp, compiled=True),
        over_tokens("cut-cross-entropy", cce_logp, route=cce_route, compiled=True),
        over_tokens("torch linear_cross_entropy", torch_logp),
        FLOOR,
    )
}
