"""Sums of objectives, and pair objectives that are more than a formula of a pair's log-ratios.

Legend: P examples, S sequences.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .checks import require_number
from .examples import BaseObjective, Examples
from .formulas import softplus

_NEEDS = (
    "needs_reference", "needs_scores", "needs_kl", "needs_alignment", "needs_prompt",
    "needs_mean_length", "couples", "takes_margin",
)  # fmt: skip


def _set(objective: Any, **values: Any) -> None:
    """Attributes of a frozen dataclass that follow from its fields."""
    for name, value in values.items():
        object.__setattr__(objective, name, value)


@dataclass(frozen=True)
class Sum(BaseObjective):
    """A weighted sum of objectives of the same examples.

    It is ``by_margin`` if all parts are, of the same margin but for a factor and an offset.  Parts
    of weight 0 are left out, with all that they need.  Rewards in the metrics are of means over the
    tokens only if those of all parts are; a likelihood has none.

    Raises:
        ValueError: there is none, a weight is negative, all are 0, or two cannot be summed: they
            differ in the shape of their examples, in what rewards are multiplied by, in the weights
            of tokens, or in what the step's examples share, or one couples the examples of a step
            and another needs more of each than `given_slopes` can know.
    """

    parts: tuple[BaseObjective, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.parts or len(self.parts) != len(self.weights):
            raise ValueError(
                "a sum needs objectives and a weight of each, got "
                f"{len(self.parts)} objectives and {len(self.weights)} weights"
            )
        for i, weight in enumerate(self.weights):
            require_number(f"loss_weights[{i}]", weight, low=0)
        used = [(part, weight) for part, weight in zip(self.parts, self.weights) if weight]
        if not used:
            raise ValueError("loss_weights are all 0: there is nothing to train")
        _set(self, parts=tuple(x for x, _ in used), weights=tuple(x for _, x in used))
        _set(self, **{name: self._common(name) for name in ("shape", "beta", "ld_alpha")})
        _set(self, **{name: any(self._all(name)) for name in _NEEDS})
        if self.couples and (self.needs_kl or self.needs_alignment):
            raise ValueError(
                f"{self.name} cannot be summed: one needs all pairs of a step at once, and another "
                "more than the log-probs of each"
            )
        rewards = {x.mean_rewards for x in self.parts if not isinstance(x, ChosenLikelihood)}
        shifts = {shift for shift in self._all("shift_is") if shift is not None}
        if len(shifts) > 1 or (self.needs_prompt and not self._same_mean()):
            raise ValueError(f"{self.name} cannot be summed: their losses share different means")
        normalized, shares = (set(self._all(x)) for x in ("length_normalized", "kl_shares"))
        _set(
            self,
            shift_is=next(iter(shifts), None),
            by_margin=all(self._all("by_margin")) and len(normalized) == 1,
            length_normalized=normalized == {True},
            kl_shares=shares.pop() if len(shares) == 1 else None,
            alpha=max(self._all("alpha"), key=abs),
            mean_rewards=rewards == {True},
            smoothing_below=min(filter(None, self._all("smoothing_below")), default=None),
            smoothing_above=max(
                (x for x in self._all("smoothing_above") if x is not None), default=None
            ),
        )

    @property
    def name(self) -> str:
        return " + ".join(self._all("name"))

    def _all(self, name: str) -> list[Any]:
        return [getattr(part, name) for part in self.parts]

    def _common(self, name: str) -> Any:
        values = self._all(name)
        if len(set(values)) > 1:
            raise ValueError(
                f"{self.name} cannot be summed: they differ in {name}, "
                + " and ".join(map(str, values))
            )
        return values[0]

    def _same_mean(self) -> bool:
        """Whether all that read a mean length count the prompt in it."""
        return all(part.needs_prompt for part in self.parts if part.needs_mean_length)

    def problem(self, scores: Any) -> str | None:
        """The first part's that has one."""
        return next(filter(None, (part.problem(scores) for part in self.parts)), None)

    def losses(self, x: Examples) -> Tensor:
        """The weighted sum of the parts' losses of each example, (P,)."""
        terms = [weight * part.losses(x) for part, weight in zip(self.parts, self.weights)]
        return torch.stack(terms).sum(0)


@dataclass(frozen=True)
class GivenSlopes(BaseObjective):
    """`given_slopes`."""

    like: BaseObjective
    name = "given_slopes"
    needs_scores = True

    def __post_init__(self) -> None:
        kept = (
            "shape", "needs_reference", "needs_prompt", "beta", "mean_rewards", "alpha", "ld_alpha",
        )  # fmt: skip
        _set(self, **{name: getattr(self.like, name) for name in kept})

    def losses(self, x: Examples) -> Tensor:
        """``sum scores_S * logp_S`` over the sequences of each example, (P,)."""
        assert x.scores_S is not None
        return x.rows.of(x.scores_S * x.logp_S).sum(1)


def given_slopes(objective: BaseObjective) -> BaseObjective:
    """An objective whose gradients are known beforehand: the slope of each sequence, as its score.

    For one that ``couples`` the examples of a whole step: its slopes come from a first pass over
    the step, and this one trains with them.  Beta and the other numbers of the metrics, what else
    is needed and ``ld_alpha`` are those of ``objective``.
    """
    return GivenSlopes(objective)


# -------------------------------------------------------------------------- likelihood of responses
def _mean_length(x: Examples, of: Tensor) -> Any:
    """The step's mean of these lengths; of the examples at hand where nobody gave it."""
    return of.mean() if x.mean_chosen_length is None else x.mean_chosen_length


@dataclass(frozen=True)
class ChosenLikelihood(BaseObjective):
    """Negative log-likelihood of the chosen response.

    Attributes:
        per: over all the step's tokens its mean ("token"), over the response's its mean
            ("response"), or its sum ("sum").
    """

    per: Literal["token", "response", "sum"]
    beta: float = 1.0
    needs_reference = False

    def __post_init__(self) -> None:
        require_number("beta", self.beta, low=0, open_low=True)
        _set(self, needs_mean_length=self.per == "token")

    @property
    def name(self) -> str:
        return {"token": "sft", "response": "nll_mean", "sum": "nll_sum"}[self.per]

    def losses(self, x: Examples) -> Tensor:
        """The loss of each pair, (P,); of "token" their mean is the mean over the step's tokens."""
        nll_P, length_P = -x.nth(x.logp_S, 0), x.nth(x.lengths_S, 0)
        if self.per == "sum":
            return nll_P
        return nll_P / (length_P if self.per == "response" else _mean_length(x, length_P))


@dataclass(frozen=True)
class OddsRatio(BaseObjective):
    """`orpo`."""

    beta: float = 0.1
    name = "orpo"
    needs_reference = False
    needs_prompt = True
    needs_mean_length = True
    mean_rewards = True

    def __post_init__(self) -> None:
        require_number("beta", self.beta, low=0, open_low=True)

    def losses(self, x: Examples) -> Tensor:
        """The loss of each pair, (P,); a prompt of one token has no third sequence."""
        logp_PL, lengths_PL = x.rows.of(x.logp_S), x.rows.of(x.lengths_S)
        w_P, l_P = (logp_PL[:, k] / lengths_PL[:, k] for k in (0, 1))
        log_ratio_P = (w_P - l_P) - (_log_of_rest(w_P) - _log_of_rest(l_P))
        nll_P = -logp_PL[:, 0] - logp_PL[:, 2:].sum(1)
        length_P = lengths_PL[:, 0] + lengths_PL[:, 2:].sum(1)
        return nll_P / _mean_length(x, length_P) + self.beta * softplus(-log_ratio_P)


def _log_of_rest(logp_P: Tensor) -> Tensor:
    """``log(1 - e^logp)`` with all digits near both ends.

    A response whose tokens all have probability 1 has no rest: it counts as one that has 1e-12, and
    without a gradient here.
    """
    logp_P = logp_P.clamp(max=-1e-12)
    near_P = logp_P > -0.7
    small_P, large_P = torch.where(near_P, logp_P, -1.0), torch.where(near_P, -1.0, logp_P)
    return torch.where(near_P, (-torch.expm1(small_P)).log(), torch.log1p(-torch.exp(large_P)))


# ------------------------------------------------------------------------------- sorted over a step
@dataclass(frozen=True)
class SortedMargins(BaseObjective):
    """`aot` and `aot_unpaired`; the loss of a rank is that of the pair which has it."""

    paired: bool
    beta: float = 0.1
    label_smoothing: float = 0.0
    ld_alpha: float | None = None
    couples = True

    def __post_init__(self) -> None:
        require_number("beta", self.beta, low=0, open_low=True)
        require_number("label_smoothing", self.label_smoothing, low=0, high=1)
        check_ld_alpha(self.ld_alpha)

    @property
    def name(self) -> str:
        return "aot" if self.paired else "aot_unpaired"

    def losses(self, x: Examples) -> Tensor:
        """The loss of each pair, (P,)."""
        if self.paired:
            first_P = x.nth(x.logp_S, 0) - x.nth(x.logp_S, 1)
            second_P = x.nth(x.ref_logp_S, 0) - x.nth(x.ref_logp_S, 1)
        else:
            first_P, second_P = x.nth(x.ratio_S, 0), x.nth(x.ratio_S, 1)
        ranked_P, order_P = first_P.sort()
        z_P = self.beta * (ranked_P - second_P.sort().values)
        eps = self.label_smoothing
        loss_P = (1 - eps) * softplus(-z_P) + eps * softplus(z_P)
        return loss_P[order_P.argsort()]


def check_ld_alpha(ld_alpha: Any) -> None:
    """None, or a weight of the tokens of a longer response."""
    if ld_alpha is not None:
        require_number("ld_alpha", ld_alpha, low=0, high=1)


# ----------------------------------------------------------------------------------- scores as aims
@dataclass(frozen=True)
class ScoreSquares(BaseObjective):
    """`sppo` and `preference_score`: log-ratios are to be ``(score - center) / beta``."""

    name: str
    center: float
    beta: float = 0.001
    ld_alpha: float | None = None
    needs_scores = True

    def __post_init__(self) -> None:
        require_number("beta", self.beta, low=0, open_low=True)
        check_ld_alpha(self.ld_alpha)

    def problem(self, scores: Any) -> str | None:
        """Scores are missing, or no probabilities where they have to be."""
        if scores is None:
            return f"{self.name} needs score_chosen and score_rejected"
        if self.center and not all(0 <= score <= 1 for score in scores):
            return (
                f"{self.name} needs probabilities to win, between 0 and 1, as scores, got "
                + " and ".join(f"{score:g}" for score in scores)
                + "; transform=win_rate of pairing makes such of any scores"
            )
        return None

    def losses(self, x: Examples) -> Tensor:
        """The loss of each pair, (P,)."""
        if x.scores_S is None:
            raise ValueError(f"{self.name} needs scores_S, the scores of both responses")
        off_S = (x.ratio_S - (x.scores_S - self.center) / self.beta).square()
        return 0.5 * (x.nth(off_S, 0) + x.nth(off_S, 1))
