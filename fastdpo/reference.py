"""The documented name of `fastdpo.loss.reference`."""

from .loss.reference import IGNORE as IGNORE
from .loss.reference import dpo_loss as dpo_loss
from .loss.reference import linear_dpo_loss as linear_dpo_loss
from .loss.reference import linear_kl as linear_kl
from .loss.reference import linear_logits as linear_logits
from .loss.reference import linear_logp as linear_logp
from .loss.reference import sequence_sums as sequence_sums
from .loss.reference import token_stats as token_stats
