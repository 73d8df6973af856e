"""Objectives by the names of configs: `make_objective`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .examples import BaseObjective
from .objectives import apo_zero, hinge, ipo, length_normalized_dpo, lr_dpo, nca_pair


class Choice(NamedTuple):
    """A name of ``loss_type``: what makes it, its formula and source in text.

    ``build`` takes those options of `make_objective` that mean something to it, by their names.
    """

    build: Callable[..., BaseObjective]
    formula: str
    source: str


CHOICES: dict[str, Choice] = {
    "sigmoid": Choice(lr_dpo, "-log σ(z)", "arXiv 2305.18290, eq. 7"),
    "sigmoid_norm": Choice(length_normalized_dpo, "-log σ(z)", "arXiv 2411.15124, section 5"),
    "hinge": Choice(hinge, "max(0, 1 - z)", "arXiv 2305.10425"),
    "ipo": Choice(ipo, "(z/β - 1/(2β))²", "arXiv 2310.12036, eq. 17"),
    "apo_zero": Choice(apo_zero, "σ(-βc) + σ(βr)", "arXiv 2408.06266, eq. 7"),
    "nca_pair": Choice(nca_pair, "-log σ(βc) - ½ log σ(-βc) - ½ log σ(-βr)", "arXiv 2402.05369"),
}


def make_objective(
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    target_margin: float = 0.0,
    reference_scale: float = 1.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    simpo_gamma: float = 0.5,
    cpo_alpha: float | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    tdpo_alpha: float = 0.5,
    pro_sft_weight: float = 0.05,
) -> BaseObjective:
    """The objective of one name, or the weighted sum of several.

    Names and options that TRL has mean what they mean there, with its defaults.

    Args:
        loss_type: a name of `CHOICES`, or several.
        loss_weights: weight of each name; 1.0 each if None.
        beta: scale of the log-ratios.
        alpha: length penalty per token, of every loss of the margin.
        label_smoothing: probability that a pair's label is flipped (robust, cdpo, exo_pair, aot,
            aot_unpaired, cpo, simpo).  A pair's own comes on top, as a second flip.
        target_margin: subtracted from z of every loss of the margin.
        reference_scale: what the reference's log-probs are multiplied by (DPO^gamma, AIPO); with 0
            none is needed.
        f_divergence_type: reverse_kl, forward_kl, js_divergence or alpha_divergence.
        f_alpha_divergence_coef: the coefficient of the last.
        discopop_tau: temperature of discopop.
        ld_alpha: weight of the tokens beyond the shorter response's length (LD-DPO).
        use_weighting: weigh each pair by the policy's own probabilities of it (WPO).
        simpo_gamma: target margin of simpo.
        cpo_alpha: weight of the chosen response's negative log-likelihood in cpo (1.0 if None) and
            simpo (0.0 if None).
        desirable_weight, undesirable_weight: of the two kinds of single responses (kto, bco).
        tdpo_alpha: weight of the difference of the two sides' KL in tdpo2.
        pro_sft_weight: weight of the best response's negative log-likelihood in pro.

    Raises:
        ValueError: an unknown name, weights of another number, a number outside its range, or an
            option that differs from its default and means nothing to the chosen losses.
    """
    if not isinstance(loss_type, str) or loss_type not in CHOICES:
        raise ValueError(f"loss_type must be one of {', '.join(CHOICES)}, got {loss_type!r}")
    if loss_type in ("sigmoid", "sigmoid_norm", "hinge"):
        return CHOICES[loss_type].build(beta=beta, alpha=alpha)
    return CHOICES[loss_type].build(beta=beta)
