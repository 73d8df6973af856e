"""The loss: hidden states and token ids in, a differentiable loss out, without all the logits.

It stands alone: this folder and ``kernels`` can be copied into another package.  Open `ops` first
for what there is to call, then `plan` for the ways through a head, and `choices` for what losses
there are.
"""

from . import objectives, reference
from .choices import make_objective
from .module import LinearDPOLoss, LinearPreferenceLoss
from .ops import (
    linear_dpo_loss,
    linear_kl,
    linear_logp,
    linear_logp_kl,
    linear_preference_loss,
)
from .result import PreferenceLoss

__all__ = [
    "LinearDPOLoss",
    "LinearPreferenceLoss",
    "PreferenceLoss",
    "linear_dpo_loss",
    "linear_kl",
    "linear_logp",
    "linear_logp_kl",
    "linear_preference_loss",
    "make_objective",
    "objectives",
    "reference",
]
