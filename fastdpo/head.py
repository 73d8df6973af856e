"""The documented name of `fastdpo.model.head`: the language model's head, called as a module."""

from fastdpo.model.head import HeadCall, attach, base_of, check, head_settings, packed_forward

__all__ = ["HeadCall", "attach", "base_of", "check", "head_settings", "packed_forward"]
