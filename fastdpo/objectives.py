"""The documented name of `fastdpo.loss.objectives`."""

from fastdpo.loss.objectives import *  # noqa: F403
