"""The documented place of the demo's scorer, as runs have stored it."""

from fastdpo.score.readability import plain_language

__all__ = ["plain_language"]
