"""Objectives by the names that configs have: `make_objective`, and the table of what there is.

To add a name, give `CHOICES` a line: what builds it, the options it reads, and how the table in
``loss/README.md`` states it.
"""

from collections.abc import Callable, Container, Sequence
from inspect import signature
from typing import Any, NamedTuple

from . import lists, singles, tokens
from . import objectives as of
from .checks import require_number
from .combined import Sum
from .examples import BaseObjective


class Choice(NamedTuple):
    """A name of ``loss_type``.

    Attributes:
        build: makes the objective of those options of `make_objective` that it reads, given by
            their names.
        options: these names, without beta, which every objective has.
        formula: in the notation of `NOTATION`.
        source: paper and equation, or whose form it has.
    """

    build: Callable[..., BaseObjective]
    options: tuple[str, ...]
    formula: str
    source: str


NOTATION = """\
`c`, `r`: log-ratio `log π(y|x) - log π_ref(y|x)` of the chosen and of the rejected response, summed
over its tokens; `nw`, `nl` their tokens; `d = c - r`; `z = β d + α (nw - nl) - target_margin + m`
with the pair's own margin `m`; `ε` the probability that the label is flipped; `σ` the logistic
function; `lw`, `ll` log-probs of the policy alone; `Kw`, `Kl` the sums of `KL(π_ref ‖ π)` of the
next token at each token of a response.

Of a list, in the order of its scores `ψ_1 ≥ ψ_2 ≥ ...`: `s_i = β · log-ratio + α · tokens`, `p_i`
the mean log-prob of a response's tokens, `lp_1` the sum of the best one's. Of a single response:
`c` if it is desirable, `r` if not."""

_WEIGHING = ("ld_alpha", "use_weighting", "reference_scale")
_MARGIN = (
    "alpha", "target_margin", "f_divergence_type", "f_alpha_divergence_coef", *_WEIGHING,
)  # fmt: skip
_SMOOTHED = ("label_smoothing", *_MARGIN)
_SORTED = ("label_smoothing", "ld_alpha")
_CPO = ("cpo_alpha", "label_smoothing", "alpha")
_KINDS = ("desirable_weight", "undesirable_weight")

CHOICES: dict[str, Choice] = {
    "sigmoid": Choice(of.lr_dpo, _MARGIN, "-log σ(z)", "DPO, arXiv 2305.18290, eq. 7"),
    "sigmoid_norm": Choice(
        of.length_normalized_dpo, _MARGIN, "-log σ(z), d = c/nw - r/nl",
        "arXiv 2411.15124, section 5",
    ),
    "cdpo": Choice(
        of.cdpo, _SMOOTHED, "-(1-ε) log σ(z) - ε log σ(-z)", "cDPO, Mitchell's note of 2023"
    ),
    "robust": Choice(
        of.robust, _SMOOTHED, "(-(1-ε) log σ(z) + ε log σ(-z)) / (1-2ε)", "rDPO, arXiv 2403.00409"
    ),
    "hinge": Choice(of.hinge, _MARGIN, "max(0, 1 - z)", "SLiC, arXiv 2305.10425"),
    "ipo": Choice(
        of.ipo, _MARGIN, "((z - 1/2) / β)², d = c/nw - r/nl", "IPO, arXiv 2310.12036, eq. 17"
    ),
    "exo_pair": Choice(
        of.exo_pair, _SMOOTHED, "KL((σ(z), σ(-z)) ‖ (1-ε, ε))", "EXO, arXiv 2402.00856, eq. 16"
    ),
    "discopop": Choice(
        of.discopop, ("discopop_tau", *_MARGIN), "-(1-μ) log σ(z) + μ exp(-z), μ = σ(z/τ)",
        "DiscoPOP, arXiv 2406.08414, eq. 5",
    ),
    "nca_pair": Choice(
        of.nca_pair, _WEIGHING, "-log σ(βc) - ½ log σ(-βc) - ½ log σ(-βr)",
        "NCA, arXiv 2402.05369",
    ),
    "bco_pair": Choice(
        of.bco_pair, _WEIGHING, "-log σ(βc) - log σ(-βr)", "TRL's, after arXiv 2404.04656"
    ),
    "sppo_hard": Choice(
        of.sppo_hard, _WEIGHING, "(c - 1/(2β))² + (r + 1/(2β))²", "SPPO, arXiv 2405.00675, eq. 4.7"
    ),
    "apo_zero": Choice(
        of.apo_zero, _WEIGHING, "σ(-βc) + σ(βr)", "APO, arXiv 2408.06266, eq. 7"
    ),
    "apo_down": Choice(
        of.apo_down, _WEIGHING, "σ(βc) + σ(-β(c-r))", "APO, arXiv 2408.06266, eq. 8"
    ),
    "aot": Choice(
        of.aot, _SORTED, "cdpo of z = β (sorted(lw-ll) - sorted(ref. lw-ll))",
        "AOT, arXiv 2406.05882",
    ),
    "aot_unpaired": Choice(
        of.aot_unpaired, _SORTED, "cdpo of z = β (sorted(c) - sorted(r))", "AOT, arXiv 2406.05882"
    ),
    "sft": Choice(of.sft, (), "-Σ lw / Σ nw over the step", "likelihood; RPO and MPO add it"),
    "nll_mean": Choice(of.nll_mean, (), "-lw / nw", "RPO's average form, arXiv 2405.16436"),
    "nll_sum": Choice(of.nll_sum, (), "-lw", "RPO's cumulative form, arXiv 2405.16436"),
    "simpo": Choice(
        of.simpo, ("simpo_gamma", *_CPO), "-log σ(β (lw/nw - ll/nl) - γ)",
        "SimPO, arXiv 2405.14734, eq. 6",
    ),
    "cpo": Choice(
        of.cpo, _CPO, "-log σ(β (lw - ll)) + cpo_alpha · sft", "CPO, arXiv 2401.08417, eq. 3"
    ),
    "orpo": Choice(
        of.orpo, (), "NLL of prompt and chosen - β log σ(log odds ratio)",
        "ORPO, arXiv 2403.07691, eqs. 4 to 7",
    ),
    "sppo": Choice(
        of.sppo, ("ld_alpha",), "½ (c - (pw-½)/β)² + ½ (r - (pl-½)/β)², win probabilities p",
        "SPPO, arXiv 2405.00675, eq. 4.7",
    ),
    "preference_score": Choice(
        of.preference_score, ("ld_alpha",), "½ (c - sw/β)² + ½ (r - sl/β)², preference scores s",
        "our name; after GPO, arXiv 2410.02197",
    ),
    "tdpo1": Choice(
        tokens.tdpo1, ("alpha",), "-log σ(z), d = c - r - (Kl - Kw)", "TDPO, arXiv 2404.11999"
    ),
    "tdpo2": Choice(
        tokens.tdpo2, ("alpha", "tdpo_alpha"),
        "-log σ(z), d = c - r - tdpo_alpha (Kl - Kw), Kw without a gradient",
        "TDPO, arXiv 2404.11999",
    ),
    "lipo_lambda": Choice(
        lists.lipo_lambda, ("alpha",),
        "-Σ_{ψi>ψj} Δij log σ(s_i - s_j), Δij = |2^ψi - 2^ψj| |1/log(1+τi) - 1/log(1+τj)|, "
        "τ the rank by s",
        "LiPO-λ, arXiv 2402.01878",
    ),
    "ranknet": Choice(
        lists.ranknet, ("alpha",), "-Σ_{ψi>ψj} log σ(s_i - s_j); half of both ways if tied",
        "RankNet, Burges et al. 2005",
    ),
    "skip_ranknet": Choice(
        lists.skip_ranknet, ("alpha", "max_skip"), "-Σ_{i<j≤i+max_skip} log σ(s_i - s_j)",
        "our name; after RankList, arXiv 2508.09826",
    ),
    "plackett_luce": Choice(
        lists.plackett_luce, ("alpha",), "-Σ_k (s_k - log Σ_{j≥k} exp s_j)",
        "DPO, arXiv 2305.18290, appendix A.3",
    ),
    "pro": Choice(
        lists.pro, ("pro_sft_weight",),
        "-Σ_k log(exp(p_k T_kk) / Σ_{i≥k} exp(p_i T_ki)) - pro_sft_weight (n-1)² lp_1, "
        "T_ki = ψ_k - ψ_i, T_kk their largest",
        "PRO, arXiv 2306.17492, its code",
    ),
    "kto": Choice(
        singles.kto, _KINDS, "w σ(-β(c - KL)); w σ(β(r - KL))",
        "KTO, arXiv 2402.01306, eq. 7; mismatched completions by a permutation of the data",
    ),
    "apo_zero_unpaired": Choice(
        singles.apo_zero_unpaired, _KINDS, "w σ(-βc); w σ(βr)", "APO, arXiv 2408.06266; TRL's name"
    ),
    "bco": Choice(
        singles.bco, (), "-log σ(βc - δ); -log σ(δ - βr), δ the running mean of rewards",
        "BCO, TRL's form of arXiv 2404.04656",
    ),
}  # fmt: skip


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
    max_skip: int = 1,
    among: Container[str] = CHOICES,
) -> BaseObjective:
    """The objective of one name, or the weighted sum of several.

    Names and options that TRL has mean what they mean there, with its defaults.

    Args:
        loss_type: a name of `CHOICES`, or several.
        loss_weights: weight of each name; 1.0 each if None.  One of weight 0 is left out.
        beta: scale of the log-ratios.
        alpha: length penalty per token, of every loss of the margin.
        label_smoothing: probability that a pair's label is flipped, for robust, cdpo, exo_pair,
            aot, aot_unpaired, cpo and simpo.  A pair's own comes on top, as a second flip.
        target_margin: subtracted from z of every loss of the margin (AIPO's ``beta * gamma``).
        reference_scale: what the reference's log-probs are multiplied by (DPO^gamma, AIPO's
            ``1 + alpha``); with 0 none is needed.
        f_divergence_type: reverse_kl, forward_kl, js_divergence or alpha_divergence.
        f_alpha_divergence_coef: the coefficient of the last.
        discopop_tau: temperature of discopop.
        ld_alpha: weight of the tokens beyond the shorter response's length (LD-DPO).
        use_weighting: weigh each pair by the policy's own probabilities of its responses (WPO).
        simpo_gamma: target margin of simpo.
        cpo_alpha: weight of sft in cpo (1.0 if None) and in simpo (0.0 if None).
        desirable_weight, undesirable_weight: of the two kinds of single responses.
        tdpo_alpha: weight of the difference of the two sides' KL in tdpo2.
        pro_sft_weight: weight of the best response's negative log-likelihood in pro.
        max_skip: places in the ranking between which skip_ranknet compares, at most.
        among: the names that are taken, and that errors name, where not all are.

    Raises:
        TypeError, ValueError: an unknown name, weights of another number, a number outside its
            range, or an option that differs from its default and means nothing to the losses.
    """
    given = {name: value for name, value in locals().items() if name in _DEFAULTS}
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    taken = [name for name in CHOICES if name in among]
    if not names or not set(names) <= set(taken):
        raise ValueError(f"loss_type must be of {', '.join(taken)}; got {loss_type!r}")
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    if len(weights) != len(names):
        raise ValueError(
            f"loss_weights must have a weight for each of {', '.join(names)}, got {len(weights)}"
        )
    require_number("beta", beta, low=0, open_low=True)
    parts = [_build(name, beta, given) for name in names]
    _refuse_unused(names, parts, given, taken)
    total = Sum(tuple(parts), tuple(weights))
    return total.parts[0] if total.weights == (1.0,) else total


_DEFAULTS = {
    name: option.default
    for name, option in signature(make_objective).parameters.items()
    if name not in ("loss_type", "loss_weights", "beta", "among")
}
# What concerns a pair as a whole, so that in a sum each loss has to have a use for it, or, of the
# latter, no reference.
_OF_ALL = ("ld_alpha", "use_weighting")
_OF_RATIOS = ("f_divergence_type", "reference_scale")


def _build(name: str, beta: float, given: dict[str, Any]) -> BaseObjective:
    choice = CHOICES[name]
    options = {x: given[x] for x in choice.options if given[x] is not None}
    return choice.build(beta=beta, **options)


def _refuse_unused(
    names: Sequence[str],
    parts: Sequence[BaseObjective],
    given: dict[str, Any],
    taken: Sequence[str],
) -> None:
    """An option that was changed and that no loss reads, or not each that has to; the error names
    those of `taken` that do."""
    changed = [option for option, value in given.items() if value != _DEFAULTS[option]]
    if "f_alpha_divergence_coef" in changed and given["f_divergence_type"] != "alpha_divergence":
        raise ValueError("f_alpha_divergence_coef needs f_divergence_type='alpha_divergence'")
    for option in changed:
        deaf = {x: part for x, part in zip(names, parts) if option not in CHOICES[x].options}
        if len(deaf) < len(set(names)):
            if option in _OF_RATIOS:
                deaf = {name: part for name, part in deaf.items() if part.needs_reference}
            elif option not in _OF_ALL:
                continue
        if deaf:
            able = ", ".join(name for name in taken if option in CHOICES[name].options)
            raise ValueError(
                f"{option}={given[option]!r} means nothing to loss_type "
                f"{', '.join(map(repr, deaf))}: leave it out{able and f', or use it with {able}'}"
            )
