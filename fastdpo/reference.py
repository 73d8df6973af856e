"""The documented name of `fastdpo.loss.reference`."""

from .loss.reference import (
    IGNORE,
    dpo_loss,
    linear_dpo_loss,
    linear_kl,
    linear_logits,
    linear_logp,
    sequence_sums,
    token_stats,
)

__all__ = [
    "IGNORE",
    "dpo_loss",
    "linear_dpo_loss",
    "linear_kl",
    "linear_logits",
    "linear_logp",
    "sequence_sums",
    "token_stats",
]
