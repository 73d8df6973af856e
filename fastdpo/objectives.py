"""The documented name of `fastdpo.loss.objectives`."""

from .loss.objectives import (
    Formula,
    Objective,
    apo_zero,
    hinge,
    ipo,
    length_normalized_dpo,
    lr_dpo,
    nca_pair,
)

__all__ = [
    "Formula",
    "Objective",
    "apo_zero",
    "hinge",
    "ipo",
    "length_normalized_dpo",
    "lr_dpo",
    "nca_pair",
]
