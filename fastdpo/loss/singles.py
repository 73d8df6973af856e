"""Objectives on single responses, each desirable or not: no pair is needed.

KTO and BCO compare a response's reward with a number that the step's responses share,
``Examples.shift``; who calls them computes it, as `SingleObjective.shift_is` says.  The loss of a
step is the mean over all its responses, the desirable and the undesirable together.

P responses; each is an example of one sequence.  Rewards are ``beta * log(pi / pi_ref)``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .checks import require_number
from .examples import BaseObjective, Examples, Shape, Shift
from .objectives import SIGMOID


@dataclass(frozen=True)
class SingleObjective(BaseObjective):
    """A loss of single responses: ``f`` of ``z``, the reward less the shift and, for an undesirable
    one, times -1.

    Attributes:
        shift_is: what the caller gives as ``shift``.
        desirable_weight: of the losses of desirable responses.
        undesirable_weight: of those of undesirable ones.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    beta: float = 0.1
    shift_is: Shift = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    shape: ClassVar[Shape] = "singles"

    def __post_init__(self) -> None:
        require_number("beta", self.beta, low=0, open_low=True)
        for name in ("desirable_weight", "undesirable_weight"):
            require_number(name, getattr(self, name), low=0)

    def losses(self, x: Examples) -> Tensor:
        """The loss of each response, (P,).

        Raises:
            ValueError: an example has not one sequence, or the labels are missing.
        """
        if x.desirable_P is None:
            raise ValueError(
                f"{self.name} needs desirable_P, 1 for each desirable response, else 0"
            )
        if len(x.firsts) - 1 != len(x.logp_S):
            wrong = next(p for p, size in enumerate(x.sizes) if size != 1)
            raise ValueError(
                f"{self.name} takes single responses, but example {wrong} has {x.sizes[wrong]}"
            )
        desirable_P = x.desirable_P > 0.5
        shift = 0.0 if self.shift_is is None else x.shift
        z_P = self.beta * x.ratio_S - (self.beta * shift if self.shift_is == "kl" else shift)
        loss_P = self.f(torch.where(desirable_P, z_P, -z_P))
        return torch.where(desirable_P, self.desirable_weight, self.undesirable_weight) * loss_P


def _sigmoid_of_minus(z_P: Tensor) -> Tensor:
    return torch.sigmoid(-z_P)


def kto(
    beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> SingleObjective:
    """KTO (arXiv 2402.01306, eq. 7): ``1 - sigmoid(beta * (log-ratio - KL))`` of a desirable
    response, ``1 - sigmoid(beta * (KL - log-ratio))`` of another.

    ``shift`` is the KL, estimated from completions of other prompts and at least 0, without a
    gradient.
    """
    weights = (desirable_weight, undesirable_weight)
    return SingleObjective("kto", _sigmoid_of_minus, beta, "kl", *weights)


def apo_zero_unpaired(
    beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> SingleObjective:
    """APO-zero of single responses (arXiv 2408.06266): KTO without its KL; the name is TRL's."""
    weights = (desirable_weight, undesirable_weight)
    return SingleObjective("apo_zero_unpaired", _sigmoid_of_minus, beta, None, *weights)


def bco(beta: float = 0.1) -> SingleObjective:
    """BCO (arXiv 2404.04656) in TRL's form: ``-log sigmoid(reward - delta)`` of a desirable
    response, ``-log sigmoid(delta - reward)`` of another.

    ``shift`` is delta, the running mean of all rewards (`RunningMean`), without a gradient.  The
    paper's weights for undesirable responses to prompts that are unlike those of the desirable ones
    are left out: they need a classifier of prompt embeddings.
    """
    return SingleObjective("bco", SIGMOID.f, beta, "mean_reward")


@dataclass
class RunningMean:
    """Mean of all numbers seen, as state of a run.

    As in the ``BCOTrainer`` that TRL had: each number counts alike, and those of a step are seen
    before its loss is computed.
    """

    count: int = 0
    mean: float = 0.0

    def update(self, values: Tensor) -> float:
        """Count the values of a step, those of all processes; the new mean."""
        if values.numel():
            self.count += values.numel()
            self.mean += (values.double() - self.mean).sum().item() / self.count
        return self.mean

    def state(self) -> dict[str, float]:
        """What `RunningMean(**state)` goes on from, to the same bits in JSON."""
        return {"count": self.count, "mean": self.mean}
