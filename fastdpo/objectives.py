"""The documented name of `fastdpo.loss.objectives`: the same module object."""

import sys

from .loss import objectives
from .loss.objectives import *  # noqa: F403

sys.modules[__name__] = objectives
