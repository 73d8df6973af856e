"""Length-regularized DPO, fast and exact: a fused loss without logits and an iterative trainer."""

from typing import TYPE_CHECKING

from .lazy import lazy

if TYPE_CHECKING:
    from . import objectives, reference
    from .loss import (
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
__getattr__ = lazy(__name__, {name: "loss" for name in __all__ if name != "__version__"})
