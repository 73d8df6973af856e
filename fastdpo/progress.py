"""Bars that say what is done, for which round, and how far it is, within its parts too.

    with within("round 1 of 2"), bar("sampling", 64, "response") as shown:
        advance(8)  # by whatever finishes some of them, however deep

is shown as ``round 1 of 2: sampling: 12%|...``. A run that is one thing to its user has one bar for
all of it: within `overall`, others are parts of that one and are not drawn. Bars are the process's,
not a thread's, as a server's answers come in several.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from threading import RLock
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_TRUST = 20.0  # seconds of a whole by whose likely pace it begins

_lock = RLock()
_names: list[str] = []  # of what the bars to come are for
_open: list["Bar"] = []
_whole: list["Whole"] = []


class Bar:
    """How far something is, drawn or not.

    Attributes:
        total, done: how many there are, and how many are done; half of one is 0.5.
    """

    def __init__(self, name: str, total: int, unit: str, done: int, shown: bool) -> None:
        self.name, self.total, self.done = name, total, float(done)
        self._part = self.done, 0.0
        inner = bool(_open)  # is gone at its end
        self._tqdm: Any = tqdm(
            desc=name, total=total, unit=unit, initial=done, leave=not inner,
            disable=not shown or bool(_whole),
        )  # fmt: skip

    def reach(self, done: float) -> None:
        """So many are done, with those from before; fewer than are known to be are no news."""
        with _lock:
            self.done = max(self.done, done)
            if (whole := int(self.done)) > self._tqdm.n:
                self._tqdm.update(whole - self._tqdm.n)
            if _whole:
                _whole[-1].reach(self.name, self.done / self.total if self.total else 1.0)

    @contextmanager
    def part(self, count: int = 1) -> Iterator[None]:
        """What does the next so many; within it, `parts` says how far they are."""
        self._part = self.done, float(count)
        yield
        self.reach(sum(self._part))

    def note(self, text: str) -> None:
        """What is shown behind the bar."""
        self._tqdm.set_postfix_str(text)

    def share(self, share: float) -> None:
        """Such a share of the part is done."""
        self.reach(self._part[0] + share * self._part[1])


@contextmanager
def bar(purpose: str, total: int, unit: str, *, done: int = 0, shown: bool = True) -> Iterator[Bar]:
    """A bar for the block: of so many of a unit, some of which are done from before."""
    found = Bar(": ".join([*_names, purpose]), total, unit, done, shown)
    found.reach(done)
    _open.append(found)
    try:
        yield found
    finally:
        _open.remove(found)
        found._tqdm.close()


def advance(count: int = 1) -> None:
    """So many more of what the innermost bar counts are done; nothing where there is no bar."""
    with _lock:
        if _open and count:
            _open[-1].reach(_open[-1].done + count)


def parts(items: Iterable[Item], total: int | None = None) -> Iterator[Item]:
    """The items; after each, its share of the innermost bar's part is done.

    Their number is `total`, where they are no collection.
    """
    count = len(items) if isinstance(items, Sized) else total
    for i, item in enumerate(items):
        yield item
        if _open and count:
            _open[-1].share((i + 1) / count)


@contextmanager
def within(name: str) -> Iterator[None]:
    """Bars of the block say that they are of this."""
    _names.append(name)
    try:
        yield
    finally:
        _names.pop()


class Whole:
    """One bar over others that are known before, as long as each is likely to take."""

    def __init__(self, seconds: Mapping[str, float], shown: bool) -> None:
        self.seconds = dict(seconds)
        self.total, self.done = sum(seconds.values()), 0.0
        # What was done before this process, and when that began.
        self.known, self.began, self.names = 0.0, time.monotonic(), set[str]()
        form = "{percentage:3.0f}%|{bar:20}| {elapsed}, {desc}"
        self.tqdm: Any = tqdm(
            total=self.total, bar_format=form, dynamic_ncols=True, miniters=0, mininterval=0.5,
            desc=f"{tqdm.format_interval(self.total)} left", disable=not shown,
        )  # fmt: skip

    def reach(self, name: str, share: float) -> None:
        """What is listed before it is done too, in this process or in one before."""
        names = [*self.seconds]
        if name in names:
            before = sum(self.seconds[x] for x in names[: names.index(name)])
            seconds = before + share * self.seconds[name]
            if name not in self.names:  # it begins where it was left
                self.names.add(name)
                self.known += max(seconds - self.done, 0.0)
            left = tqdm.format_interval(self.left)
            self.tqdm.set_description_str(f"{left} left: {name}", refresh=False)
            self.to(seconds)

    @property
    def left(self) -> float:
        """Seconds, by how fast this process is; at first by what is likely."""
        pace = (time.monotonic() - self.began + _TRUST) / (self.done - self.known + _TRUST)
        return (self.total - self.done) * pace

    def to(self, seconds: float) -> None:
        if seconds > self.done:
            self.tqdm.update(seconds - self.done)
            self.done = seconds


@contextmanager
def overall(seconds: Mapping[str, float], *, shown: bool = True) -> Iterator[Whole]:
    """One bar with the time left for the block; others in it are its parts and are not drawn.

    Args:
        seconds: what each part is likely to take, by the name that its own bar would have, in their
            order. What has no bar counts to the part before it.
        shown: whether it is drawn.
    """
    whole = Whole(seconds, shown)
    _whole.append(whole)
    try:
        yield whole
        whole.to(whole.total)
    finally:
        _whole.pop()
        whole.tqdm.close()
