"""The time that chat templates see, held still from a run's start to its end.

Some templates print today's date (``strftime_now`` in those of Llama 3, Granite and gpt-oss), so
the same rows become other tokens after midnight.  A run writes down the time at which it was first
rendered, and renders by it whenever it goes on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

KEY = "rendered_at"  # of the time, in the files of a run


@dataclass
class Clock:
    """A local time in ISO format, and whether a template has asked for it."""

    time: str
    read: bool = False


def now() -> str:
    """The time that templates see: that of now, or the one that is held."""
    from transformers.utils import chat_template_utils as rendering

    return rendering.datetime.now().isoformat()  # type: ignore[attr-defined]


@contextmanager
def rendering_at(time: str | None) -> Iterator[Clock]:
    """Within the block, templates of this process see one time; None is that of `now`."""
    # transformers passes only plain data to templates, so none can be given a clock of its own.
    from transformers.utils import chat_template_utils as rendering

    before: Any = rendering.datetime  # type: ignore[attr-defined]
    clock = Clock(time or now())
    moment = datetime.fromisoformat(clock.time)

    class Held(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            clock.read = True
            return moment

    rendering.datetime = Held  # type: ignore[attr-defined]
    try:
        yield clock
    finally:
        rendering.datetime = before  # type: ignore[attr-defined]
