"""Length-regularized DPO, fast and exact: a fused loss without logits and an iterative trainer."""

# ruff: noqa: F405
from typing import TYPE_CHECKING

from .lazy import lazy

if TYPE_CHECKING:
    from .loss import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "LinearDPOLoss",
    "LinearPreferenceLoss",
    "PreferenceLoss",
    "__version__",
    "linear_dpo_loss",
    "linear_kl",
    "linear_logp",
    "linear_logp_kl",
    "linear_preference_loss",
    "make_objective",
    "objectives",
    "reference",
]
__getattr__ = lazy(__name__, {name: "loss" for name in __all__ if name != "__version__"})
