"""The documented place of the demo's scorers, as runs have stored it."""

from fastdpo.score.readability import likes_length, on_topic, plain_language

__all__ = ["likes_length", "on_topic", "plain_language"]
