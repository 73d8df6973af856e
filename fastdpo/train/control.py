"""``alpha: auto``: the length penalty that keeps responses at a target length.

    controller = LengthController()                      # target: the mean length of the start
    controller = controller.begin_round(differences, beta=0.1, lengths=lengths)
    for step, batch in enumerate(steps, start=1):
        ...                                              # a step with alpha = controller.alpha
        controller = controller.after_step(mean(margins * differences), step / len(steps))

The controller is a value: both calls return a new one, and `LengthController.to_dict` is all that
has to be kept to go on with the same bits. The law and its gains are ours, no paper's; the loss is
that of iLR-DPO (arXiv 2406.11817, R-DPO's equation 9 in arXiv 2403.19159), whose alpha is fixed.

**Quantities.** Of a pair: ``D = nw - nl``, tokens of chosen less those of rejected, and its
log-ratio margin ``d = (lw - lw') - (ll - ll')``, in nats, against the reference, which has to be
the policy at the start of the round. The logit is ``beta * d + alpha * D``. Of a round: ``L``, the
mean length of the responses sampled from the policy at its start, and ``V``, their variance around
the mean of their prompt, in tokens squared; ``R``, the root mean square of ``D`` over its pairs, in
tokens. The *tilt* ``t``, in nats a token, is the slope of ``d`` on ``D`` through the origin: how
much likelier each further token has made a response. A policy that is its reference times
``exp(t * n)`` has, to first order in ``t``, responses ``V * t`` tokens longer (the derivative of an
exponential family's mean is its variance). So the tilt says during a round what the next round's
samples show only after it.

**Law.** Once a round, with its error ``e = L - target`` in tokens and the sum ``E`` of all errors:

    neutral = the root a of mean(D * sigmoid(-a * D))                            per token
    wanted  = -(ERROR_SHARE * e + SUM_SHARE * E) / V, |wanted| <= 1 / sqrt(V)    nats a token

and for each step, with the share ``s`` of the round's steps that are done and the running mean
``tilt`` (weight `SMOOTHING`) of ``mean(d * D) / R**2`` over the steps before:

    alpha = neutral - beta * wanted + TILT_GAIN * beta * (tilt - s * wanted)
    |alpha| <= MAX_MARGIN / R                                                    per token

``neutral`` looks ahead: it is the maximum-likelihood coefficient of a Bradley-Terry model that
knows only the pairs' lengths, and with it the round's first gradient is balanced between longer and
shorter responses. It is not DICE's search, which makes the mean gap of the pairs zero by choosing
other pairs (arXiv 2406.09760). The rest is feedback: proportional on the tilt within a round,
proportional and integral on tokens between rounds. ``beta`` turns nats into logits, and ``1 / V``
turns tokens into nats a token, so the gains are numbers without a unit, for models and data of any
scale. alpha may be negative: a policy that becomes too short is kept from it too.

**Bounds.** `MAX_MARGIN` logits are the largest part that alpha has in the logit of a pair with a
difference of ``R`` tokens, and ``wanted`` asks for at most one standard deviation of length a
round. Where it is cut off, an error that would push it further is not summed (no wind-up). All this
holds for any measurement, so alpha is bounded whatever the policy does.

**Stability.** *Within a round*, near a balance the tilt follows ``b <- b + c * (a - alpha - b)``
where ``b = beta * t``, ``a`` is what the pairs ask for and ``c > 0`` is how much of the way a step
goes: a hundredth or less in an ordinary round. With the running mean ``m <- m + w * (b - m)`` and
``alpha = G * m`` the pair ``(b, m)`` has trace ``2 - c - w`` and determinant
``(1 - c)(1 - w) + c G w``, so up to c = 1 it decays exactly if ``1 + G < 1 / c + 1 / w``. With
G = 10 and w = 0.2 that is ``c < 1/6``; a run with longer steps swings between the bounds. What
``neutral`` misses of ``a`` is reduced to ``1 / (1 + G)``. *Between rounds*, let the length move by
``g`` times what the tilt predicts, and drift besides. The error then has the roots of
``z**2 - (2 - g(P + I)) z + 1 - gP``, inside the unit circle exactly if ``g (2P + I) < 4`` (and
``gP < 2``). With P = 0.75 and I = 0.25 that is ``g < 2.28``; at ``g = 1`` both roots are 1/2, so
what is left of an error falls as ``k / 2**k`` after k rounds, and a constant drift leaves none.

**Limits.** alpha weighs pairs; it makes none. Where nearly all chosen responses are longer, the few
others cannot balance them: alpha ends at its bound and the length grows, slower. Pairs that are
best and worst of several samples exaggerate what is correlated with the score, length too, which is
a ``g`` other than 1; so is a round too short to reach the wanted tilt. In a second epoch the tilt
is measured on pairs trained before. Label smoothing and weights of pairs are not in ``neutral``.
The policy after the last round is corrected by its tilt only, never by its length.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fastdpo.errors import DataError, is_number

ERROR_SHARE = 0.75  # P: share of a round's error in tokens that the next round is to undo
SUM_SHARE = 0.25  # I: share of the sum of errors
TILT_GAIN = 10.0  # G: logits of alpha for a logit of tilt, both per token
SMOOTHING = 0.2  # w: weight of a step in the running tilt
MAX_MARGIN = 5.0  # logits that alpha gives a pair of typical difference in length, at most

_BISECTIONS = 60


@dataclass(frozen=True)
class LengthController:
    """The controller's whole state; see the module for the law and the units.

    Attributes:
        target: tokens to hold; None until the first round sets it to its own mean length.
        round: rounds begun.
        length: mean length of this round's samples, tokens; None where they were not given.
        error_sum: sum of the rounds' errors, tokens.
        beta: of this round.
        neutral: this round's look-ahead, per token.
        wanted: the tilt that this round is to end with, nats a token.
        spread: root mean square length difference of this round's pairs, tokens.
        tilt: running tilt, nats a token.
        progress: share of this round's steps that are done.
    """

    target: float | None = None
    round: int = 0
    length: float | None = None
    error_sum: float = 0.0
    beta: float = 0.0
    neutral: float = 0.0
    wanted: float = 0.0
    spread: float = 0.0
    tilt: float = 0.0
    progress: float = 0.0

    def __post_init__(self) -> None:
        if self.target is not None:
            _require("target", self.target, is_number(self.target) and self.target >= 0, ">= 0")

    @property
    def bound(self) -> float:
        """The largest |alpha| of this round, per token."""
        return MAX_MARGIN / self.spread if self.spread else 0.0

    @property
    def alpha(self) -> float:
        """For the next step, per token; 0 before the first round, or where no lengths differ."""
        behind = self.tilt - self.progress * self.wanted
        alpha = self.neutral + self.beta * (TILT_GAIN * behind - self.wanted)
        return _clip(alpha, self.bound)

    def begin_round(
        self,
        differences: Sequence[float],
        *,
        beta: float,
        lengths: Sequence[Sequence[float]] | None = None,
    ) -> "LengthController":
        """The controller at the start of a round.

        Args:
            differences: ``nw - nl`` in tokens of each pair that the round trains on.
            beta: of the round's loss.
            lengths: tokens of each sampled response, a list for each prompt, of the policy that
                starts the round; all of them, whether or not a pair came of them. None where there
                are no samples (training on given pairs): the tilt is then held at zero.

        Raises:
            ValueError: there are no pairs, a number is not finite, a length is negative, no prompt
                has two samples, or beta is not above 0.
        """
        if not differences or not all(map(is_number, differences)):
            raise ValueError(
                f"differences must be finite numbers, at least one, got {list(differences)[:8]}"
            )
        _require("beta", beta, is_number(beta) and beta > 0, "> 0")
        spread = math.sqrt(math.fsum(x * x for x in differences) / len(differences))
        begun = LengthController(  # without a tilt: the policy is its own reference
            target=self.target,
            round=self.round + 1,
            error_sum=self.error_sum,
            beta=float(beta),
            neutral=neutral_alpha(differences, MAX_MARGIN / spread) if spread else 0.0,
            spread=spread,
        )
        return begun if lengths is None else begun._aim(*_moments(lengths))

    def _aim(self, mean: float, variance: float) -> "LengthController":
        """Set the tilt that the round is to end with."""
        target = mean if self.target is None else self.target
        error = mean - target
        limit = 1 / math.sqrt(variance)
        summed = self.error_sum + error
        wanted = -(ERROR_SHARE * error + SUM_SHARE * summed) / variance
        if abs(wanted) > limit and summed * error > 0:
            summed = self.error_sum
        return replace(
            self, target=target, length=mean, error_sum=summed, wanted=_clip(wanted, limit)
        )

    def after_step(self, covariance: float, progress: float) -> "LengthController":
        """The controller after an optimizer step.

        Args:
            covariance: mean over the step's pairs, of all processes, of the log-ratio margin
                before the step times the length difference, nats x tokens.
            progress: share of the round's steps that are done, this one included; 0 to 1.

        Raises:
            ValueError: one of them is not finite or out of its range.
        """
        _require("covariance", covariance, is_number(covariance), "a finite number")
        _require("progress", progress, is_number(progress) and 0 <= progress <= 1, "in [0, 1]")
        now = covariance / self.spread**2 if self.spread else 0.0
        # A single step, however odd, moves alpha by no more than TILT_GAIN times its bound.
        now = _clip(now, self.bound / self.beta / SMOOTHING) if self.beta else 0.0
        tilt = self.tilt + SMOOTHING * (now - self.tilt)
        return replace(self, tilt=tilt, progress=float(progress))

    def step_facts(self) -> dict[str, float]:
        """What to log with a step, before `after_step`: the alpha it used, and why.

        Lengths are in tokens, the rest is per token. What was not given is left out.
        """
        facts = {
            "alpha": self.alpha,
            "alpha/neutral": self.neutral,
            "alpha/bound": self.bound,
            "length_tilt": self.tilt,
            "length_tilt/wanted": self.progress * self.wanted,
            "length/sampled": self.length,
            "length/target": self.target,
            "length/error_sum": self.error_sum,
        }
        return {name: value for name, value in facts.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON numbers; Python writes floats so that reading gives the same bits."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "LengthController":
        """The controller that `to_dict` described.

        Raises:
            DataError: it is not such a state.
        """
        names = {field.name for field in fields(cls)}
        optional = {"target", "length"}
        if not isinstance(state, dict) or state.keys() != names:
            raise DataError(
                f"the state of alpha=auto must have the entries {', '.join(sorted(names))}, got "
                f"{state!r:.200}; remove the round's folder to start the round again"
            )
        for name, value in state.items():
            if not (is_number(value) or (value is None and name in optional)):
                raise DataError(
                    f"the state of alpha=auto has {name}={value!r}, which is no finite number; "
                    "remove the round's folder to start the round again"
                )
        return cls(**state)


def neutral_alpha(differences: Sequence[float], bound: float) -> float:
    """The alpha at which a policy that is its reference is pushed towards no length, per token.

    There ``mean(D * sigmoid(-alpha * D))`` is zero: the loss's gradient gives a pair of length
    difference ``D`` the weight ``sigmoid(-alpha * D)``. The mean falls with alpha, so there is one
    root, if differences of both signs occur; it is cut off at ``+-bound``. Ours.
    """
    low, high = -bound, bound
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        push = math.fsum(x * _sigmoid(-middle * x) for x in differences)
        low, high = (middle, high) if push > 0 else (low, middle)
    return (low + high) / 2


def _moments(lengths: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean length over all responses, and their variance within prompts, at least one token's."""
    flat = [float(x) for group in lengths for x in group]
    if not flat or not all(is_number(x) and x >= 0 for x in flat):
        raise ValueError(
            f"lengths must be token counts >= 0, at least one, got {list(lengths)[:4]}"
        )
    mean = math.fsum(flat) / len(flat)
    squares, freedom = 0.0, 0
    for group in lengths:
        if group:
            center = math.fsum(group) / len(group)
            squares += math.fsum((x - center) ** 2 for x in group)
            freedom += len(group) - 1
    if not freedom:
        raise ValueError("lengths must have two responses of a prompt, to know how they spread")
    return mean, max(squares / freedom, 1.0)


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def _clip(value: float, bound: float) -> float:
    return max(-bound, min(bound, value))


def _require(name: str, value: Any, holds: bool, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r} must be {wanted}")
