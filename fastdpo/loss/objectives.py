"""Preference losses as small pure functions of per-sequence numbers.

An objective maps the log-ratios of the two sides of each pair, ``log pi(y|x) - log pi_ref(y|x)``
summed over the response, to one loss a pair.  It never sees tokens, logits or models, so any
differentiable function with this signature can be used:

    objective(chosen_P, rejected_P, chosen_len_P, rejected_len_P, margin_P, smoothing_P) -> loss_P

A *margin* objective depends on the log-ratios only through ``d = chosen - rejected`` (each divided
by its length first if ``length_normalized``).  The gradient of every token of a pair is then one
unknown scalar times a sign known beforehand, which is what lets a loss train the head on a pair of
any length with three matrix products.

To add an objective: write its formula ``f`` below, a `Formula` with its name and form, and a
function that returns the `Objective`.  It then works everywhere but under
``torch.compile(fullgraph=True)``; on a GPU PyTorch computes it from the sums that the pair kernel
returns.  To have the kernel compute it too, append the formula to `KERNEL_FORMULAS`, its name to
the ``KINDS`` of ``kernels/pair.py``, and a branch for its number there, to ``_margin_loss`` or
``_separate_loss`` by its form.

P pairs, S = 2P sequences (2i chosen, 2i+1 rejected).  Tensors are (P,) unless named otherwise;
lengths are token counts, the end token included.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_objective, require_number
from .examples import BaseObjective, Examples


class Formula(NamedTuple):
    """What an objective computes.

    ``f`` is a function of z and beta ("margin"), of the two sides' log-ratios times beta ("sides"),
    or of the six arguments of an objective ("own").
    """

    name: str
    form: Literal["margin", "sides", "own"]
    f: Callable[..., Tensor]


@dataclass(frozen=True)
class Objective(BaseObjective):
    """A formula with its parameters; call it with the six arguments above.

    A "margin" formula gives ``(1 - eps) * f(z) + eps * f(-z)`` with
    ``z = beta * d + alpha * (nw - nl) + m``.  ``m`` is the pair's margin and ``eps`` its smoothing,
    the probability that its label is flipped (cDPO).  ``alpha`` is not multiplied by ``beta``; its
    sign is plus, so a chosen response longer than the rejected one gets a smaller gradient (arXiv
    2403.19159, equation 9; arXiv 2406.11817).

    With "sides" margin and smoothing have no meaning; passing either to the op is an error.

    Raises:
        TypeError, ValueError: ``beta`` is not a number > 0, or ``alpha`` no finite one.
    """

    formula: Formula
    beta: float = 1.0
    alpha: float = 0.0
    length_normalized: bool = False
    ld_alpha: float | None = None

    def __post_init__(self) -> None:
        require_number("beta", self.beta, low=0, open_low=True)
        require_number("alpha", self.alpha)

    @property
    def name(self) -> str:
        return self.formula.name

    @property
    def by_margin(self) -> bool:
        """Whether a pair enters by its margin alone."""
        return self.formula.form == "margin"

    @property
    def takes_margin(self) -> bool:
        """Whether margin and smoothing of a pair mean something."""
        return self.formula.form != "sides"

    @property
    def code(self) -> int | None:
        """Its number in the pair kernel; None if PyTorch computes it."""
        known = enumerate(KERNEL_FORMULAS)
        return next((i for i, formula in known if formula.f is self.formula.f), None)

    def losses(self, x: Examples) -> Tensor:
        """The loss of each pair, (P,)."""
        ratio_S, lengths_S = x.ratio_S, x.lengths_S
        sides = x.nth(ratio_S, 0), x.nth(ratio_S, 1), x.nth(lengths_S, 0), x.nth(lengths_S, 1)
        return self(*sides, x.margin_P, x.smoothing_P)

    def __call__(
        self,
        chosen_P: Tensor,
        rejected_P: Tensor,
        chosen_len_P: Tensor,
        rejected_len_P: Tensor,
        margin_P: Tensor,
        smoothing_P: Tensor,
    ) -> Tensor:
        f = self.formula.f
        if self.formula.form == "own":
            return f(chosen_P, rejected_P, chosen_len_P, rejected_len_P, margin_P, smoothing_P)
        if self.formula.form == "sides":
            return f(self.beta * chosen_P, self.beta * rejected_P)
        if self.length_normalized:
            chosen_P, rejected_P = chosen_P / chosen_len_P, rejected_P / rejected_len_P
        z_P = self.beta * (chosen_P - rejected_P) + margin_P
        z_P = z_P + self.alpha * (chosen_len_P - rejected_len_P)
        return (1 - smoothing_P) * f(z_P, self.beta) + smoothing_P * f(-z_P, self.beta)


# ---------------------------------------------------------------------------------------- formulas
def _softplus_of_minus(z_P: Tensor, beta: float = 1.0) -> Tensor:
    return F.softplus(-z_P, threshold=50.0)


def _hinge(z_P: Tensor, beta: float) -> Tensor:
    return F.relu(1 - z_P)


def _ipo(z_P: Tensor, beta: float) -> Tensor:
    return ((z_P - 0.5) / beta).square()


def _apo_zero(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    return torch.sigmoid(-chosen_P) + torch.sigmoid(rejected_P)


def _nca_pair(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    softplus = _softplus_of_minus
    return softplus(chosen_P) + 0.5 * softplus(-chosen_P) + 0.5 * softplus(-rejected_P)


SIGMOID = Formula("sigmoid", "margin", _softplus_of_minus)
HINGE = Formula("hinge", "margin", _hinge)
IPO = Formula("ipo", "margin", _ipo)
APO_ZERO = Formula("apo_zero", "sides", _apo_zero)
NCA_PAIR = Formula("nca_pair", "sides", _nca_pair)
# Those that the pair kernel knows, by number.
KERNEL_FORMULAS = (SIGMOID, HINGE, IPO, APO_ZERO, NCA_PAIR)


# -------------------------------------------------------------------------------------- objectives
def lr_dpo(beta: float = 0.1, alpha: float = 0.0) -> Objective:
    """Length-regularized DPO (arXiv 2406.11817); ``alpha=0`` is DPO (arXiv 2305.18290, eq. 7)."""
    return Objective(SIGMOID, beta, alpha)


def length_normalized_dpo(beta: float = 0.1, alpha: float = 0.0) -> Objective:
    """DPO on log-ratios divided by length (arXiv 2411.15124, section 5); TRL's ``sigmoid_norm``."""
    return Objective(SIGMOID, beta, alpha, length_normalized=True)


def hinge(beta: float = 0.1, alpha: float = 0.0) -> Objective:
    """Hinge loss of the margin (SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657)."""
    return Objective(HINGE, beta, alpha)


def ipo(beta: float = 0.1) -> Objective:
    """IPO on length-averaged log-ratios (arXiv 2310.12036, eq. 17): ``(d - 1/(2 beta))^2``."""
    return Objective(IPO, beta, length_normalized=True)


def apo_zero(beta: float = 0.1) -> Objective:
    """Anchored preference optimization, zero variant (arXiv 2408.06266)."""
    return Objective(APO_ZERO, beta)


def nca_pair(beta: float = 0.1) -> Objective:
    """Noise contrastive alignment of pairs (arXiv 2402.05369)."""
    return Objective(NCA_PAIR, beta)


def as_objective(objective: BaseObjective | Callable[..., Tensor]) -> BaseObjective:
    """An objective as it is; a function of the caller's own as one, in which `beta` is 1.

    Raises:
        TypeError: it is no function of the six arguments.
    """
    if isinstance(objective, BaseObjective):
        return objective
    check_objective(objective)
    return Objective(Formula("own", "own", objective))


@dataclass(frozen=True)
class _GivenSlopes(BaseObjective):
    """`given_slopes`."""

    like: BaseObjective
    needs_scores = True

    def __post_init__(self) -> None:
        for name in ("shape", "needs_reference", "needs_prompt", "beta", "alpha", "ld_alpha"):
            object.__setattr__(self, name, getattr(self.like, name))

    def losses(self, x: Examples) -> Tensor:
        """``sum scores_S * logp_S`` over the sequences of each example, (P,)."""
        assert x.scores_S is not None
        parts = (x.scores_S * x.logp_S).split(x.sizes)
        return torch.stack([part.sum() for part in parts])


def given_slopes(objective: BaseObjective) -> BaseObjective:
    """An objective whose gradients are known beforehand: the slope of each sequence, as its score.

    For one that ``couples`` the examples of a whole step: its slopes come from a first pass over
    the step, and this one trains with them.  Beta and the other numbers of the metrics, what else
    is needed and ``ld_alpha`` are those of ``objective``.
    """
    return _GivenSlopes(objective)
