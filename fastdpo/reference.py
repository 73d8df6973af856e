"""The documented name of `fastdpo.loss.reference`."""

from fastdpo.loss.reference import *  # noqa: F403
