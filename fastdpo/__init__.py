"""Length-regularized DPO, fast and exact: a fused loss without logits and an iterative trainer."""

from fastdpo.loss import objectives, reference
from fastdpo.loss.ops import (
    LinearDPOLoss,
    PreferenceLoss,
    linear_dpo_loss,
    linear_kl,
    linear_logp,
    linear_preference_loss,
)

__version__ = "0.1.0"

__all__ = [
    "LinearDPOLoss",
    "PreferenceLoss",
    "__version__",
    "linear_dpo_loss",
    "linear_kl",
    "linear_logp",
    "linear_preference_loss",
    "objectives",
    "reference",
]
