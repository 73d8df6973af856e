"""The formulas of the pair objectives: losses of a margin, or of the rewards of the two sides.

Each is plain PyTorch on (P,) tensors and keeps all digits where its terms are large or small.  The
branches of ``kernels/pair.py`` compute the same, by the place of a formula in `KERNEL_FORMULAS`.

Sources are with the objectives, in `objectives`.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Formula(NamedTuple):
    """What an objective computes.

    Attributes:
        form: what ``f`` is a function of: of z and beta ("margin"); of z, beta and eps, the
            probability that the label is flipped ("label"); of the two sides' log-ratios times beta
            and of beta ("sides"); of the six arguments of an objective ("own").
        parameter: name of a number of the formula's own, the last argument of ``f``.
    """

    name: str
    form: Literal["margin", "label", "sides", "own"]
    f: Callable[..., Tensor]
    parameter: str | None = None


def softplus(x_P: Tensor) -> Tensor:
    """``log(1 + e^x)``."""
    return F.softplus(x_P, threshold=50.0)


# ------------------------------------------------------------------------------------ of the margin
def _sigmoid(z_P: Tensor, beta: float = 1.0) -> Tensor:
    return softplus(-z_P)


def _hinge(z_P: Tensor, beta: float) -> Tensor:
    return F.relu(1 - z_P)


def _ipo(z_P: Tensor, beta: float) -> Tensor:
    return ((z_P - 0.5) / beta).square()


def _discopop(z_P: Tensor, beta: float, tau: float) -> Tensor:
    share_P = z_P / tau
    # The exponential's share times the exponential, of which one alone may overflow.
    grown_P = torch.exp(-z_P - softplus(-share_P))
    return torch.sigmoid(-share_P) * softplus(-z_P) + grown_P


def _exo_pair(z_P: Tensor, beta: float, eps_P: Tensor) -> Tensor:
    chosen_P = torch.sigmoid(z_P) * (-softplus(-z_P) - torch.log1p(-eps_P))
    return chosen_P + torch.sigmoid(-z_P) * (-softplus(z_P) - torch.log(eps_P))


def _robust(z_P: Tensor, beta: float, eps_P: Tensor) -> Tensor:
    return ((1 - eps_P) * softplus(-z_P) - eps_P * softplus(z_P)) / (1 - 2 * eps_P)


# ------------------------------------------------------------------------------------ of both sides
def _apo_zero(w_P: Tensor, l_P: Tensor, beta: float) -> Tensor:
    return torch.sigmoid(-w_P) + torch.sigmoid(l_P)


def _apo_down(w_P: Tensor, l_P: Tensor, beta: float) -> Tensor:
    return torch.sigmoid(w_P) + torch.sigmoid(l_P - w_P)


def _nca_pair(w_P: Tensor, l_P: Tensor, beta: float) -> Tensor:
    return softplus(-w_P) + 0.5 * softplus(w_P) + 0.5 * softplus(l_P)


def _bco_pair(w_P: Tensor, l_P: Tensor, beta: float) -> Tensor:
    return softplus(-w_P) + softplus(l_P)


def _sppo_hard(w_P: Tensor, l_P: Tensor, beta: float) -> Tensor:
    return ((w_P - 0.5) / beta).square() + ((l_P + 0.5) / beta).square()


SIGMOID = Formula("sigmoid", "margin", _sigmoid)
HINGE = Formula("hinge", "margin", _hinge)
IPO = Formula("ipo", "margin", _ipo)
APO_ZERO = Formula("apo_zero", "sides", _apo_zero)
NCA_PAIR = Formula("nca_pair", "sides", _nca_pair)
EXO_PAIR = Formula("exo_pair", "label", _exo_pair)
ROBUST = Formula("robust", "label", _robust)
DISCOPOP = Formula("discopop", "margin", _discopop, "discopop_tau")
BCO_PAIR = Formula("bco_pair", "sides", _bco_pair)
SPPO_HARD = Formula("sppo_hard", "sides", _sppo_hard)
APO_DOWN = Formula("apo_down", "sides", _apo_down)
# Those that the pair kernel knows, by number.
KERNEL_FORMULAS = (
    SIGMOID, HINGE, IPO, APO_ZERO, NCA_PAIR, EXO_PAIR, ROBUST, DISCOPOP, BCO_PAIR, SPPO_HARD,
    APO_DOWN,
)  # fmt: skip


# ------------------------------------------------------------------------------------- f-divergence
# Where the exponential of an alpha-divergence stops, as in TRL: e^80 is the last that fits fp32.
_LARGEST = 80.0
# Where that of the forward KL does, which is fp64's end, so that two sides beyond it do not differ.
_LARGEST_FP64 = 709.78
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def divergence_score(ratio_S: Tensor, kind: str, coef: float) -> Tensor:
    """``f'(pi / pi_ref)`` of log-ratios (f-DPO, arXiv 2309.16240); of reverse KL themselves."""
    if kind == "forward_kl":
        return 1 - torch.exp((-ratio_S).clamp(max=_LARGEST_FP64))
    if kind == "js_divergence":
        return math.log(2) - softplus(-ratio_S)
    if kind == "alpha_divergence" and abs(coef - 1) >= 1e-6:  # whose limit at 1 is reverse KL
        return torch.expm1(((coef - 1) * ratio_S).clamp(max=_LARGEST)) / (coef - 1)
    return ratio_S
