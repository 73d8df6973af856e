"""Objectives of pairs: preference losses as small pure functions of per-sequence numbers.

An objective maps what is known of the sequences of some examples (`examples.Examples`) to one loss
an example.  It never sees tokens, logits or models.  Here are those of pairs; `lists`, `singles`
and `tokens` have the others, and `choices.make_objective` makes any of them by the name that a
config has.  An op takes an objective, or any differentiable function with this signature:

    objective(chosen_P, rejected_P, chosen_len_P, rejected_len_P, margin_P, smoothing_P) -> loss_P

where chosen and rejected are the log-ratios of the two sides, ``log pi(y|x) - log pi_ref(y|x)``
summed over the response.

A *margin* objective depends on the log-ratios only through ``d = chosen - rejected`` (each divided
by its length first if ``length_normalized``).  The gradient of every token of a pair is then one
unknown scalar times a sign known beforehand, which is what lets a loss train the head on a pair of
any length with three matrix products.

To add one: write its formula in `formulas`, a function here that returns the `Objective`, and its
line in the table of `choices`.  It then works everywhere but under
``torch.compile(fullgraph=True)``; on a GPU PyTorch computes it from the sums that the pair kernel
returns.  To have the kernel compute it too, append the formula to `KERNEL_FORMULAS`, its name to
the ``KINDS`` of ``kernels/pair.py``, and a branch for its number there, to ``_margin_loss`` or
``_separate_loss`` by its form.

P pairs, S sequences (the chosen one of a pair, then the rejected one).  Tensors are (P,) unless
named otherwise; lengths are token counts, the end token included.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from .checks import check_objective, require_number, require_smoothing
from .combined import (
    ChosenLikelihood,
    OddsRatio,
    ScoreSquares,
    SortedMargins,
    Sum,
    check_ld_alpha,
    given_slopes,
)
from .examples import BaseObjective, Examples
from .formulas import (
    APO_DOWN,
    APO_ZERO,
    BCO_PAIR,
    DISCOPOP,
    DIVERGENCES,
    EXO_PAIR,
    HINGE,
    IPO,
    KERNEL_FORMULAS,
    NCA_PAIR,
    ROBUST,
    SIGMOID,
    SPPO_HARD,
    Formula,
    divergence_score,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "KERNEL_FORMULAS", "BaseObjective", "Examples", "Formula", "Objective", "Sum", "aot",
    "aot_unpaired", "apo_down", "apo_zero", "as_objective", "bco_pair", "cdpo", "cpo", "discopop",
    "exo_pair", "given_slopes", "hinge", "ipo", "length_normalized_dpo", "lr_dpo", "nca_pair",
    "nll_mean", "nll_sum", "orpo", "preference_score", "robust", "sft", "simpo", "sppo",
    "sppo_hard",
]  # fmt: skip


@dataclass(frozen=True)
class Objective(BaseObjective):
    """A formula with its parameters; call it with the six arguments above.

    A "margin" formula gives ``(1 - eps) * f(z) + eps * f(-z)`` with
    ``z = beta * d + alpha * (nw - nl) - target_margin + m``.  ``m`` is the pair's margin and
    ``eps`` the probability that its label is flipped (cDPO): the pair's smoothing and
    ``label_smoothing``, as two independent flips.  ``alpha`` is not multiplied by ``beta``; its
    sign is plus, so a chosen response longer than the rejected one gets a smaller gradient (arXiv
    2403.19159, equation 9; arXiv 2406.11817).  A "label" formula has the same z and eps.

    With "sides" margin, label and length penalty have no meaning; passing one is an error.

    Attributes:
        reference_scale: the reference's log-probs are multiplied by it; with 0 it is not read.  A
            call with the six arguments has done so already.
        f_divergence_type, f_alpha_divergence_coef: ``d`` is a difference of ``f'(pi / pi_ref)``
            instead of log-ratios (f-DPO, arXiv 2309.16240); two sides then enter by themselves.
        parameter: the formula's own number.
        ld_alpha: as in `BaseObjective` (LD-DPO, arXiv 2409.06411).
        use_weighting: whether a pair's loss is multiplied by the two responses' ``exp(alignment)``
            (WPO, arXiv 2406.11827, equation 2).

    Raises:
        TypeError, ValueError: ``beta`` is not a number > 0, or ``alpha`` no finite one, or another
            field is outside its range or has no meaning for the formula.
    """

    formula: Formula
    beta: float = 1.0
    alpha: float = 0.0
    length_normalized: bool = False
    label_smoothing: float = 0.0
    target_margin: float = 0.0
    reference_scale: float = 1.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    parameter: float = 0.0
    ld_alpha: float | None = None
    use_weighting: bool = False

    def __post_init__(self) -> None:
        require_number("beta", self.beta, low=0, open_low=True)
        require_number("alpha", self.alpha)
        require_number("label_smoothing", self.label_smoothing, low=0, high=1)
        require_number("target_margin", self.target_margin)
        require_number("reference_scale", self.reference_scale, low=0)
        require_number("f_alpha_divergence_coef", self.f_alpha_divergence_coef)
        check_ld_alpha(self.ld_alpha)
        if self.f_divergence_type not in DIVERGENCES:
            raise ValueError(
                f"f_divergence_type must be one of {', '.join(DIVERGENCES)}, "
                f"got {self.f_divergence_type!r}"
            )
        if self.formula.parameter is not None:
            require_number(self.formula.parameter, self.parameter, low=0, open_low=True)
        if self.formula is EXO_PAIR and self.label_smoothing == 1:
            raise ValueError("exo_pair needs a label_smoothing < 1, got 1")
        if self.label_smoothing >= (self.smoothing_below or 2):
            raise ValueError(f"robust needs a label_smoothing < 0.5, got {self.label_smoothing:g}")
        if self._has_z:
            return
        for name, neutral in _OF_Z.items():
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} means nothing to {self.name}, which is no "
                    "function of the pair's margin"
                )

    @property
    def name(self) -> str:
        without = "" if self.reference_scale else " without a reference"
        return self.formula.name + without

    @property
    def _has_z(self) -> bool:
        return self.formula.form in ("margin", "label")

    @property
    def by_margin(self) -> bool:
        """Whether a pair enters by its margin alone."""
        return self._has_z and self.f_divergence_type == "reverse_kl"

    @property
    def takes_margin(self) -> bool:
        """Whether margin and smoothing of a pair mean something."""
        return self.formula.form != "sides"

    @property
    def smoothing_below(self) -> float | None:
        """Of labels flipped as often as not there is nothing to learn for robust."""
        if self.formula is ROBUST:
            return 0.5
        return None if self.smoothing_above is None else 1.0

    @property
    def smoothing_above(self) -> float | None:
        """Without one for all, exo_pair needs each pair's own, which it takes the logarithm of."""
        return 0.0 if self.formula is EXO_PAIR and self.label_smoothing == 0 else None

    @property
    def needs_reference(self) -> bool:
        """Whether it reads the reference."""
        return self.reference_scale != 0

    @property
    def mean_rewards(self) -> bool:
        """As in TRL's trainers without a reference; with one its rewards are of sums."""
        return self.length_normalized and not self.needs_reference

    @property
    def needs_alignment(self) -> bool:
        """Whether it reads how much of the policy's own the responses are."""
        return self.use_weighting

    @property
    def code(self) -> int | None:
        """Its number in the pair kernel; None if PyTorch computes it."""
        if self.use_weighting or self.f_divergence_type != "reverse_kl":
            return None
        known = enumerate(KERNEL_FORMULAS)
        return next((i for i, formula in known if formula.f is self.formula.f), None)

    def losses(self, x: Examples) -> Tensor:
        """The loss of each pair, (P,)."""
        ratio_S, lengths_S = x.ratio_S, x.lengths_S
        if self.reference_scale != 1:
            ratio_S = x.logp_S
            if self.reference_scale:
                ratio_S = ratio_S - self.reference_scale * x.ref_logp_S
        sides = x.nth(ratio_S, 0), x.nth(ratio_S, 1), x.nth(lengths_S, 0), x.nth(lengths_S, 1)
        loss_P = self(*sides, x.margin_P, x.smoothing_P)
        if not self.use_weighting:
            return loss_P
        assert x.alignment_S is not None
        return loss_P * (x.nth(x.alignment_S, 0) + x.nth(x.alignment_S, 1)).exp()

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
            return f(self.beta * chosen_P, self.beta * rejected_P, self.beta)
        if self.f_divergence_type != "reverse_kl":
            chosen_P, rejected_P = (
                divergence_score(x_P, self.f_divergence_type, self.f_alpha_divergence_coef)
                for x_P in (chosen_P, rejected_P)
            )
        if self.length_normalized:
            chosen_P, rejected_P = chosen_P / chosen_len_P, rejected_P / rejected_len_P
        z_P = self.beta * (chosen_P - rejected_P) + margin_P
        z_P = z_P + self.alpha * (chosen_len_P - rejected_len_P)
        if self.target_margin:
            z_P = z_P - self.target_margin
        eps_P, given = smoothing_P, self.label_smoothing
        if given:
            eps_P = given + eps_P - 2 * given * eps_P
        if self.formula.form == "label":
            require_smoothing(self, eps_P)
            return f(z_P, self.beta, eps_P)
        own = (self.beta,) if self.formula.parameter is None else (self.beta, self.parameter)
        return (1 - eps_P) * f(z_P, *own) + eps_P * f(-z_P, *own)


# What has a meaning only for a loss of z, and the value that changes nothing.
_OF_Z: dict[str, Any] = {
    "alpha": 0.0, "label_smoothing": 0.0, "target_margin": 0.0, "length_normalized": False,
    "f_divergence_type": "reverse_kl",
}  # fmt: skip


class Weighing(TypedDict, total=False):
    """Fields of `Objective` for every formula."""

    ld_alpha: float | None
    use_weighting: bool
    reference_scale: float


class OfMargin(Weighing, total=False):
    """Further ones for every formula of the margin."""

    target_margin: float
    f_divergence_type: str
    f_alpha_divergence_coef: float


# ----------------------------------------------------------------------------------- of the margin
def lr_dpo(beta: float = 0.1, alpha: float = 0.0, **more: "Unpack[OfMargin]") -> Objective:
    """Length-regularized DPO (arXiv 2406.11817); ``alpha=0`` is DPO (arXiv 2305.18290, eq. 7)."""
    return Objective(SIGMOID, beta, alpha, **more)


def cdpo(
    beta: float = 0.1, label_smoothing: float = 0.1, alpha: float = 0.0, **more: "Unpack[OfMargin]"
) -> Objective:
    """Conservative DPO: ``(1 - eps) f(z) + eps f(-z)`` with DPO's f, whose labels are flipped with
    probability eps.  `lr_dpo` is that with each pair's own eps; with ``eps = 1 - consistency`` it
    is CREAM (arXiv 2410.12735).

    Raises:
        ValueError: ``label_smoothing`` is 0.
    """
    if not label_smoothing:
        raise ValueError(
            "cdpo needs a label_smoothing > 0, as 0.1; rows that have a label_smoothing of their "
            "own are for loss_type sigmoid"
        )
    return Objective(SIGMOID, beta, alpha, label_smoothing=label_smoothing, **more)


def length_normalized_dpo(
    beta: float = 0.1, alpha: float = 0.0, **more: "Unpack[OfMargin]"
) -> Objective:
    """DPO on log-ratios divided by length (arXiv 2411.15124, section 5); TRL's ``sigmoid_norm``."""
    return Objective(SIGMOID, beta, alpha, length_normalized=True, **more)


def hinge(beta: float = 0.1, alpha: float = 0.0, **more: "Unpack[OfMargin]") -> Objective:
    """Hinge loss of the margin (SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657)."""
    return Objective(HINGE, beta, alpha, **more)


def ipo(beta: float = 0.1, alpha: float = 0.0, **more: "Unpack[OfMargin]") -> Objective:
    """IPO on length-averaged log-ratios (arXiv 2310.12036, eq. 17): ``(d - 1/(2 beta))^2``."""
    return Objective(IPO, beta, alpha, length_normalized=True, **more)


def exo_pair(
    beta: float = 0.1, label_smoothing: float = 1e-3, alpha: float = 0.0, **more: "Unpack[OfMargin]"
) -> Objective:
    """EXO on pairs (arXiv 2402.00856, eq. 16): ``KL((q, 1 - q) || (1 - eps, eps))`` of
    ``q = sigmoid(z)``.  With a ``label_smoothing`` of 0 every pair needs one of its own.
    """
    return Objective(EXO_PAIR, beta, alpha, label_smoothing=label_smoothing, **more)


def robust(
    beta: float = 0.1, label_smoothing: float = 0.1, alpha: float = 0.0, **more: "Unpack[OfMargin]"
) -> Objective:
    """Provably robust DPO, rDPO (arXiv 2403.00409): ``((1 - eps) f(z) - eps f(-z)) / (1 - 2 eps)``
    with DPO's f, unbiased where labels are flipped with probability eps < 0.5.
    """
    return Objective(ROBUST, beta, alpha, label_smoothing=label_smoothing, **more)


def discopop(
    beta: float = 0.1, discopop_tau: float = 0.05, alpha: float = 0.0, **more: "Unpack[OfMargin]"
) -> Objective:
    """DiscoPOP's log-ratio modulated loss (arXiv 2406.08414, eq. 5):
    ``(1 - m) f(z) + m e^-z`` with DPO's f and ``m = sigmoid(z / tau)``.
    """
    return Objective(DISCOPOP, beta, alpha, parameter=discopop_tau, **more)


# ------------------------------------------------------------------------------------ of both sides
def apo_zero(beta: float = 0.1, **more: "Unpack[Weighing]") -> Objective:
    """Anchored preference optimization, zero variant (arXiv 2408.06266, eq. 7)."""
    return Objective(APO_ZERO, beta, **more)


def apo_down(beta: float = 0.1, **more: "Unpack[Weighing]") -> Objective:
    """Anchored preference optimization, down variant (arXiv 2408.06266, eq. 8)."""
    return Objective(APO_DOWN, beta, **more)


def nca_pair(beta: float = 0.1, **more: "Unpack[Weighing]") -> Objective:
    """Noise contrastive alignment of pairs (arXiv 2402.05369)."""
    return Objective(NCA_PAIR, beta, **more)


def bco_pair(beta: float = 0.1, **more: "Unpack[Weighing]") -> Objective:
    """BCO of pairs without its running mean, as TRL has it (after arXiv 2404.04656)."""
    return Objective(BCO_PAIR, beta, **more)


def sppo_hard(beta: float = 0.1, **more: "Unpack[Weighing]") -> Objective:
    """SPPO whose chosen response always wins (arXiv 2405.00675, eq. 4.7): twice `sppo` of
    probabilities 1 and 0.
    """
    return Objective(SPPO_HARD, beta, **more)


def sppo(beta: float = 0.001, ld_alpha: float | None = None) -> BaseObjective:
    """SPPO (arXiv 2405.00675, eq. 4.7, on both responses):
    ``((chosen - (p_w - 1/2) / beta)^2 + (rejected - (p_l - 1/2) / beta)^2) / 2``; scores are the
    probabilities p to win against the policy.
    """
    return ScoreSquares("sppo", 0.5, beta, ld_alpha)


def preference_score(beta: float = 0.001, ld_alpha: float | None = None) -> BaseObjective:
    """`sppo` with a preference score against the policy, which may have any sign, in the place of
    ``p - 1/2`` (after the general preference model, arXiv 2410.02197, whose released code leaves
    its normalization open).
    """
    return ScoreSquares("preference_score", 0.0, beta, ld_alpha)


# ------------------------------------------------------------------------------- sorted over a step
def aot(
    beta: float = 0.1, label_smoothing: float = 0.0, ld_alpha: float | None = None
) -> BaseObjective:
    """AOT (arXiv 2406.05882): DPO between the sorted margins of the policy and the sorted margins
    of the reference, over all pairs of a step.
    """
    return SortedMargins(True, beta, label_smoothing, ld_alpha)


def aot_unpaired(
    beta: float = 0.1, label_smoothing: float = 0.0, ld_alpha: float | None = None
) -> BaseObjective:
    """The same between the sorted log-ratios of the chosen and of the rejected responses."""
    return SortedMargins(False, beta, label_smoothing, ld_alpha)


# ------------------------------------------------------------------ likelihood, without a reference
def sft(beta: float = 1.0) -> BaseObjective:
    """Negative log-likelihood of the chosen responses, the mean over all their tokens in a step;
    ``beta`` serves the metrics only.
    """
    return ChosenLikelihood("token", beta)


def nll_mean(beta: float = 1.0) -> BaseObjective:
    """The same as the mean over a response's tokens, each response counting alike."""
    return ChosenLikelihood("response", beta)


def nll_sum(beta: float = 1.0) -> BaseObjective:
    """The same as the sum over a response's tokens."""
    return ChosenLikelihood("sum", beta)


def cpo(
    beta: float = 0.1, cpo_alpha: float = 1.0, label_smoothing: float = 0.0, alpha: float = 0.0
) -> BaseObjective:
    """CPO (arXiv 2401.08417, eq. 3): DPO without a reference, plus ``cpo_alpha`` times `sft`."""
    margin = Objective(SIGMOID, beta, alpha, label_smoothing=label_smoothing, reference_scale=0.0)
    return _with_sft(margin, cpo_alpha)


def simpo(
    beta: float = 2.0,
    simpo_gamma: float = 0.5,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 0.0,
    alpha: float = 0.0,
) -> BaseObjective:
    """SimPO (arXiv 2405.14734, eq. 6): ``z = beta * (lw / nw - ll / nl) - simpo_gamma``, without a
    reference; with ``cpo_alpha`` times `sft` CPO-SimPO.
    """
    margin = Objective(
        SIGMOID, beta, alpha, length_normalized=True, label_smoothing=label_smoothing,
        target_margin=simpo_gamma, reference_scale=0.0,
    )  # fmt: skip
    return _with_sft(margin, cpo_alpha)


def _with_sft(margin: Objective, cpo_alpha: float) -> BaseObjective:
    require_number("cpo_alpha", cpo_alpha, low=0)
    return Sum((margin, sft(margin.beta)), (1.0, cpo_alpha)) if cpo_alpha else margin


def orpo(beta: float = 0.1) -> BaseObjective:
    """ORPO (arXiv 2403.07691, eqs. 4 to 7) as TRL has it: likelihood of prompt and chosen response,
    the mean over their tokens in a step, plus ``-beta * log sigmoid`` of the log odds ratio of the
    two responses' mean log-probs.
    """
    return OddsRatio(beta)


# ---------------------------------------------------------------------------------- of the caller
def as_objective(objective: BaseObjective | Callable[..., Tensor]) -> BaseObjective:
    """An objective as it is; a function of the caller's own as one, in which `beta` is 1.

    Raises:
        TypeError: it is no function of the six arguments.
    """
    if isinstance(objective, BaseObjective):
        return objective
    check_objective(objective)
    return Objective(Formula("own", "own", objective))
