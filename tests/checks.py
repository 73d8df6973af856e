"""Problems for the ops, their fp64 gold values, the usual route beside them, and error measures.

Legend: T hidden rows, N targets, D hidden size, V vocabulary, P pairs, S = 2P sequences.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdpo import linear_preference_loss
from fastdpo.loss import reference
from fastdpo.loss.ops import PreferenceLoss
from fastdpo.loss.plan import MIB, Plan, make_plan

BETA = 0.3
PAIR_SIZES = (4, 3, 9, 8, 2, 3, 5, 5)


@dataclass
class Problem:
    """Packed pairs and a head; ``ref_logp_S`` is near the policy's, as in training."""

    h_TD: Tensor
    w_VD: Tensor
    target_N: Tensor
    bounds_S1: Tensor
    ref_logp_S: Tensor
    rows_N: Tensor | None = None
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def head(self) -> dict[str, Any]:
        """The keyword arguments that ops and reference have in common."""
        return {
            "rows_N": self.rows_N,
            "bias_V": self.bias_V,
            "scale": self.scale,
            "softcap": self.softcap,
        }

    @property
    def packed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.h_TD, self.w_VD, self.target_N, self.bounds_S1

    @property
    def num_pairs(self) -> int:
        return len(self.bounds_S1) // 2

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same numbers in another dtype, as leaves without gradients."""
        bias_V = None if self.bias_V is None else self.bias_V.detach().to(dtype)
        return replace(
            self,
            h_TD=self.h_TD.detach().to(dtype),
            w_VD=self.w_VD.detach().to(dtype),
            bias_V=bias_V,
        )

    def leaves(self, wanted: str = "h w bias") -> "Problem":
        """Copies of which the named ones require a gradient."""
        names = wanted.split()
        bias_V = None
        if self.bias_V is not None:
            bias_V = self.bias_V.detach().clone().requires_grad_("bias" in names)
        return replace(
            self,
            h_TD=self.h_TD.detach().clone().requires_grad_("h" in names),
            w_VD=self.w_VD.detach().clone().requires_grad_("w" in names),
            bias_V=bias_V,
        )

    def grads(self) -> dict[str, Tensor]:
        tensors = {"h": self.h_TD, "w": self.w_VD, "bias": self.bias_V}
        return {k: x.grad for k, x in tensors.items() if x is not None and x.grad is not None}


def make_problem(
    sizes: Iterable[int] = PAIR_SIZES,
    D: int = 8,
    V: int = 101,
    *,
    dtype: torch.dtype = torch.float64,
    peak: float = 6.0,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    masked: bool = False,
    repeats: bool = False,
    unused_rows: int = 0,
    seed: int = 0,
) -> Problem:
    """Random pairs whose largest logit before the cap is ``peak``.

    Args:
        masked: every fourth target is -100.
        repeats: hidden rows and targets are drawn with many repeats.
        unused_rows: hidden rows that no target reads.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = list(sizes)
    N = sum(sizes)
    T = max(1, N // 2) if repeats else N
    h_TD = torch.randn(T + unused_rows, D, generator=generator, dtype=torch.float64)
    w_VD = torch.randn(V, D, generator=generator, dtype=torch.float64)
    w_VD *= peak / (scale * (h_TD @ w_VD.T).abs().max())
    bias_V = torch.randn(V, generator=generator, dtype=torch.float64) if bias else None
    target_N = torch.randint(min(V, 7) if repeats else V, (N,), generator=generator)
    if masked:
        target_N[1::4] = reference.IGNORE
    rows_N = None
    if repeats:
        rows_N = torch.randint(T, (N,), generator=generator)
    elif unused_rows:
        rows_N = torch.randperm(T + unused_rows, generator=generator)[:N]
    problem = Problem(
        h_TD,
        w_VD,
        target_N,
        torch.tensor([0, *accumulate(sizes)]),
        torch.zeros(len(sizes), dtype=torch.float64),
        rows_N,
        bias_V,
        scale,
        softcap,
    ).to(dtype)
    noise_S = torch.randn(len(sizes), generator=generator, dtype=torch.float64)
    logp_S = reference.sequence_sums(gold_logp(problem), problem.bounds_S1)
    return replace(problem, ref_logp_S=logp_S + noise_S)


# ------------------------------------------------------------------------------------ gold values
def gold_logp(problem: Problem) -> Tensor:
    """Log-probs of the rounded inputs in fp64."""
    p = problem.to(torch.float64)
    return reference.linear_logp(p.h_TD, p.w_VD, p.target_N, **p.head)


def usual_logp(p: Problem) -> Tensor:
    """What people write: logits in the inputs' dtype, then an fp32 log-softmax and a gather."""
    h_ND = p.h_TD if p.rows_N is None else p.h_TD[p.rows_N]
    z_NV = h_ND @ p.w_VD.T
    if p.bias_V is not None:
        z_NV = z_NV + p.bias_V
    z_NV = z_NV * p.scale
    if p.softcap is not None:
        z_NV = p.softcap * torch.tanh(z_NV / p.softcap)
    logp_NV = z_NV.float().log_softmax(-1)
    logp_N = logp_NV.gather(1, p.target_N.clamp(min=0)[:, None])[:, 0]
    return torch.where(p.target_N == reference.IGNORE, 0.0, logp_N)


def dpo_of(logp_N: Tensor, p: Problem, beta: float, alpha: float) -> Tensor:
    """The DPO loss of a problem from its log-probs, in their dtype."""
    logp_S = reference.sequence_sums(logp_N, p.bounds_S1)
    scored_N = (p.target_N != reference.IGNORE).to(logp_N.dtype)
    lengths_S = reference.sequence_sums(scored_N, p.bounds_S1)
    return reference.dpo_loss(logp_S, p.ref_logp_S.to(logp_S), lengths_S, beta, alpha).mean()


# ``f(c, r, nw, nl, beta, alpha, m, eps)``: TRL's formulas, written a second time.  ``c`` and ``r``
# are the log-ratios of chosen and rejected; m is added to z, eps flips the label.
Formula = Callable[..., Tensor]


def _flip(f: Callable[[Tensor], Tensor], z: Tensor, eps: Any) -> Tensor:
    return (1 - eps) * f(z) + eps * f(-z)


def sigmoid_formula(c, r, nw, nl, beta, alpha=0.0, m=0.0, eps=0.0):
    return _flip(lambda z: -F.logsigmoid(z), beta * (c - r) + alpha * (nw - nl) + m, eps)


def sigmoid_norm_formula(c, r, nw, nl, beta, alpha=0.0, m=0.0, eps=0.0):
    return sigmoid_formula(c / nw, r / nl, nw, nl, beta, alpha, m, eps)


def hinge_formula(c, r, nw, nl, beta, alpha=0.0, m=0.0, eps=0.0):
    z = beta * (c - r) + alpha * (nw - nl) + m
    return _flip(lambda z: (1 - z).clamp(min=0), z, eps)


def ipo_formula(c, r, nw, nl, beta, alpha=0.0, m=0.0, eps=0.0):
    d = c / nw - r / nl + m / beta
    return (1 - eps) * (d - 1 / (2 * beta)) ** 2 + eps * (-d - 1 / (2 * beta)) ** 2


def apo_zero_formula(c, r, nw, nl, beta, **_):
    return 1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r)


def nca_pair_formula(c, r, nw, nl, beta, **_):
    ls = F.logsigmoid
    return -ls(beta * c) - 0.5 * ls(-beta * c) - 0.5 * ls(-beta * r)


def gold_loss(p: Problem, formula: Formula, *, beta: float = BETA, alpha: float = 0.0) -> Tensor:
    """A preference loss from the definition, with the per-pair options in ``p.extra``."""
    logp_N = reference.linear_logp(p.h_TD, p.w_VD, p.target_N, **p.head)
    scored_N = (p.target_N != reference.IGNORE).to(logp_N.dtype)
    n_S = reference.sequence_sums(scored_N, p.bounds_S1)
    x_S = reference.sequence_sums(logp_N, p.bounds_S1) - p.ref_logp_S.to(logp_N.dtype)
    options = {
        "alpha": alpha,
        "m": p.extra.get("margin_P", 0),
        "eps": p.extra.get("smoothing_P", 0),
    }
    loss_P = formula(x_S[0::2], x_S[1::2], n_S[0::2], n_S[1::2], beta, **options)
    loss_P = loss_P * p.extra.get("weight_P", 1.0)
    return loss_P.sum() / p.extra.get("num_pairs", p.num_pairs)


# ----------------------------------------------------------------------------------------- running
def preference(p: Problem, objective: Any, **options: Any) -> PreferenceLoss:
    """`linear_preference_loss` of a problem and its per-pair options."""
    options = {**p.head, **p.extra, **options}
    ref = options.pop("ref_logp_S", p.ref_logp_S)
    return linear_preference_loss(*p.packed, ref, objective, **options)


def workspace_for(
    p: Problem, wanted: Callable[[Plan], bool], buffers: int = 1, **options: Any
) -> float:
    """A workspace in MiB whose plan is the wanted one, the head being trained.

    The largest below a whole stash, so that blocks are few; for a whole stash the smallest.
    ``options`` are those of `make_plan`.  The kernels leave ignored targets in the call.
    """
    D, V = p.w_VD.shape[1], p.w_VD.shape[0]
    scored_N = p.target_N != reference.IGNORE
    edges = [int(scored_N[:b].sum()) for b in p.bounds_S1]
    if options.get("fused_itemsize") is not None:
        edges = p.bounds_S1.tolist()
    options = {"need_head": True, "need_h": True, **options}
    size, found = 1024, None
    while size < 2**32:
        try:
            plan = make_plan(
                edges,
                D,
                V,
                itemsize=torch.promote_types(p.h_TD.dtype, torch.float32).itemsize,
                workspace_bytes=size,
                T=p.h_TD.shape[0],
                unit_buffers=buffers,
                **options,
            )
        except ValueError:
            plan = None
        if plan is not None and wanted(plan):
            found = size / MIB
        if plan is not None and (plan.route == "stash" or len(list(plan.spans)) == 1):
            break
        size += max(size // 40, 1)
    assert found is not None, "no workspace gives the wanted plan"
    return found


# What `Plan` must look like for each way of training the head.
ROUTES: dict[str, Callable[[Plan], bool]] = {
    "stash": lambda plan: plan.route == "stash",
    "grouped": lambda plan: plan.route == "grouped" and not any(g.unit for g in plan.groups),
    "unit": lambda plan: plan.route == "grouped" and {g.unit for g in plan.groups} == {True, False},
    "recompute": lambda plan: plan.route == "recompute" and len(list(plan.spans)) > 2,
}


def grad(x: Tensor) -> Tensor:
    """The gradient of a leaf, which must be there."""
    assert x.grad is not None
    return x.grad


# ------------------------------------------------------------------------------------------ errors
def relative_error(x: Tensor, gold: Tensor) -> float:
    """Frobenius norm of the difference over that of the gold value."""
    return float((x.double() - gold.double()).norm() / gold.double().norm())


def max_error(x: Tensor, gold: Tensor) -> float:
    return float((x.double() - gold.double()).abs().max())
