"""Preference losses as small pure functions of per-sequence numbers.

An objective maps the log-ratios of the two sides of each pair, ``log pi(y|x) - log pi_ref(y|x)``
summed over the response, to one loss a pair.  It never sees tokens, logits or models, so any
differentiable function with this signature can be used:

    objective(chosen_P, rejected_P, chosen_len_P, rejected_len_P, margin_P, smoothing_P) -> loss_P

A *margin* objective depends on the log-ratios only through ``d = chosen - rejected`` (each divided
by its length first if ``length_normalized``).  The gradient of every token of a pair is then one
unknown scalar times a sign known beforehand, which is what lets `fastdpo.loss.ops` train the head
on a pair of any length with three matrix products.

P pairs.  All tensors are (P,); lengths are token counts, the end token included.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdpo.loss.checks import require_number


@dataclass(frozen=True)
class MarginObjective:
    """``(1 - eps) * f(z) + eps * f(-z)`` with ``z = beta * d + alpha * (nw - nl) + m``.

    ``m`` is the pair's margin and ``eps`` its smoothing, the probability that its label is flipped
    (cDPO).  ``alpha`` is not multiplied by ``beta``; its sign is plus, so a chosen response longer
    than the rejected one gets a smaller gradient (arXiv 2403.19159, equation 9; arXiv 2406.11817).
    """

    f: Callable[[Tensor], Tensor]
    beta: float
    alpha: float = 0.0
    length_normalized: bool = False
    margin: bool = True

    def __post_init__(self) -> None:
        require_number("beta", self.beta, low=0, open_low=True)
        require_number("alpha", self.alpha)

    def __call__(
        self,
        chosen_P: Tensor,
        rejected_P: Tensor,
        chosen_len_P: Tensor,
        rejected_len_P: Tensor,
        margin_P: Tensor,
        smoothing_P: Tensor,
    ) -> Tensor:
        if self.length_normalized:
            chosen_P, rejected_P = chosen_P / chosen_len_P, rejected_P / rejected_len_P
        z_P = self.beta * (chosen_P - rejected_P) + margin_P
        z_P = z_P + self.alpha * (chosen_len_P - rejected_len_P)
        return (1 - smoothing_P) * self.f(z_P) + smoothing_P * self.f(-z_P)


@dataclass(frozen=True)
class SeparateObjective:
    """``f(beta * chosen, beta * rejected)``: the two sides enter on their own.

    Margin and smoothing have no meaning here; passing either to the op is an error.
    """

    f: Callable[[Tensor, Tensor], Tensor]
    beta: float
    margin: bool = False

    def __post_init__(self) -> None:
        require_number("beta", self.beta, low=0, open_low=True)

    def __call__(self, chosen_P, rejected_P, chosen_len_P, rejected_len_P, margin_P, smoothing_P):
        return self.f(self.beta * chosen_P, self.beta * rejected_P)


Objective = MarginObjective | SeparateObjective


def _softplus_of_minus(z_P: Tensor) -> Tensor:
    return F.softplus(-z_P, threshold=50.0)


def _hinge(z_P: Tensor) -> Tensor:
    return F.relu(1 - z_P)


@dataclass(frozen=True)
class _Ipo:
    beta: float

    def __call__(self, z_P: Tensor) -> Tensor:
        return ((z_P - 0.5) / self.beta).square()


def _apo_zero(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    return torch.sigmoid(-chosen_P) + torch.sigmoid(rejected_P)


def _nca_pair(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    softplus = _softplus_of_minus
    return softplus(chosen_P) + 0.5 * softplus(-chosen_P) + 0.5 * softplus(-rejected_P)


def lr_dpo(beta: float = 0.1, alpha: float = 0.0) -> MarginObjective:
    """Length-regularized DPO (arXiv 2406.11817); ``alpha=0`` is DPO (arXiv 2305.18290, eq. 7)."""
    return MarginObjective(_softplus_of_minus, beta, alpha)


def length_normalized_dpo(beta: float = 0.1, alpha: float = 0.0) -> MarginObjective:
    """DPO on log-ratios divided by length (arXiv 2411.15124, section 5); TRL's ``sigmoid_norm``."""
    return MarginObjective(_softplus_of_minus, beta, alpha, length_normalized=True)


def hinge(beta: float = 0.1, alpha: float = 0.0) -> MarginObjective:
    """Hinge loss of the margin (SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657)."""
    return MarginObjective(_hinge, beta, alpha)


def ipo(beta: float = 0.1) -> MarginObjective:
    """IPO on length-averaged log-ratios (arXiv 2310.12036, eq. 17): ``(d - 1/(2 beta))^2``."""
    return MarginObjective(_Ipo(beta), beta, length_normalized=True)


def apo_zero(beta: float = 0.1) -> SeparateObjective:
    """Anchored preference optimization, zero variant (arXiv 2408.06266)."""
    return SeparateObjective(_apo_zero, beta)


def nca_pair(beta: float = 0.1) -> SeparateObjective:
    """Noise contrastive alignment of pairs (arXiv 2402.05369)."""
    return SeparateObjective(_nca_pair, beta)


def kind_of(objective: object) -> str | None:
    """The name of an objective of this module in the pair kernel; None for one of the caller's."""
    if isinstance(objective, MarginObjective):
        if objective.f == _Ipo(objective.beta):
            return "ipo"
    elif not isinstance(objective, SeparateObjective):
        return None
    names = ("sigmoid", _softplus_of_minus), ("hinge", _hinge)
    separate = ("apo_zero", _apo_zero), ("nca_pair", _nca_pair)
    return next((name for name, f in (*names, *separate) if objective.f is f), None)


def of_kind(kind: str, beta: float, alpha: float, length_normalized: bool) -> Objective:
    """The objective with these attributes, for where only numbers and names can be passed."""
    if kind == "apo_zero":
        return apo_zero(beta)
    if kind == "nca_pair":
        return nca_pair(beta)
    if kind == "ipo":
        return replace(ipo(beta), alpha=alpha, length_normalized=length_normalized)
    margin = {"sigmoid": lr_dpo, "hinge": hinge}[kind](beta, alpha)
    return replace(margin, length_normalized=length_normalized)
