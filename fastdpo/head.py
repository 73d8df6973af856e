"""The documented name of `fastdpo.model.head`."""

from fastdpo.model.head import *  # noqa: F403
