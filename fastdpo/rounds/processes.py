"""The processes of a launch: the first one runs the rounds, the others join it in training.

Between trainings the others hold no model. They wait, without a limit, for the first one's next
word: JSON under a number, in the key-value store by which torch.distributed connected the
processes. No collective is pending then: those time out.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, NoReturn

import torch

from fastdpo.errors import ConfigError, DataError, ModelError, ProcessError
from fastdpo.model.load import one_line
from fastdpo.rounds.resume import release
from fastdpo.rounds.work import WORK, Loading, Training
from fastdpo.train.config import TrainConfig
from fastdpo.train.engine import Engine

_PAUSE = 0.5  # seconds between looks at the store, at most
# Seconds in which the others have heard a word, have read the examples, have given memory back.
_LIMITS = {"heard": 60.0, "ready": 1800.0, "done": 600.0}
_LAST = 10.0  # seconds in which the last word is heard, or said to one that has failed
_EXIT = 3.0  # seconds in which a process fails by itself where another one does
_ERRORS = (ConfigError, DataError, ModelError, ProcessError, OSError)  # what is told in a line


class Processes:
    """Those that a run was launched as; one alone is the first, and has nobody to tell.

    Args:
        engine: that joined them.

    Attributes:
        rank: of this one.
        is_first: whether this is the one that runs the rounds.
    """

    def __init__(self, engine: Engine) -> None:
        self.rank, self.is_first = engine.rank, engine.is_main
        self._others = engine.world - 1
        self._said = 0  # the number of the last word that was said, or heard
        self._store: Any = None
        if self._others:
            self._store = _own_store(engine.rank)

    # ------------------------------------------------------------------------- the first process
    @contextmanager
    def led(self) -> Iterator[None]:
        """Around all that the first process does: the others hear of its end, or its error."""
        last: dict[str, Any] = {"do": "end"}
        try:
            yield
        except BaseException as error:
            status = 130 if isinstance(error, KeyboardInterrupt) else 1
            last = {"do": "fail", "status": 2 if isinstance(error, _ERRORS) else status}
            raise
        finally:
            if self._others:
                self._end(last)

    def train(
        self, given: Training, tokenizer: Any, examples: Sequence[Any], *, progress: bool
    ) -> dict[str, float]:
        """Train on all processes; returns the metrics. Tokenizer and examples are those given.

        Raises:
            ProcessError: another process failed, is gone or doesn't answer.
            Exception: whatever `fastdpo.train.trainer.train` raises.
        """
        return self._do(given, lambda: given.run(tokenizer, examples, progress=progress))

    def load(self, name: str, config: TrainConfig) -> Any:
        """Load a model to be trained, or the first process's part of it.

        Raises:
            ProcessError: another process failed, is gone or doesn't answer.
            ModelError: it cannot be trained.
        """
        given = Loading(model=name, config=asdict(config))
        return self._do(given, given.run)

    def _do(self, given: Training | Loading, work: Callable[[], Any]) -> Any:
        """What the work returns, which all processes do at once."""
        if not self._others:
            return work()
        self._say({"do": type(given).__name__, "given": asdict(given)})
        self._wait_for_others("heard")
        self._wait_for_others("ready")
        with self._watched():
            try:
                found = work()
            except RuntimeError as error:
                self._check_others()
                if _is_of_exchange(error):
                    raise ProcessError(
                        "another process is gone; launch them again, the same command goes on"
                    ) from error
                raise
        self._wait_for_others("done")
        return found

    def _say(self, word: dict[str, Any]) -> None:
        """Leave the next word for the others."""
        self._said += 1
        self._store.set(f"word-{self._said}", json.dumps(word))

    def _end(self, word: dict[str, Any]) -> None:
        """Leave the last word, and the others time to hear it: where no launcher keeps the store,
        it ends with this process."""
        with suppress(RuntimeError):  # the store is gone, and so are they
            self._say(word)
            self._have_marked("heard", _LAST)

    def _wait_for_others(self, mark: str) -> None:
        """Until all have left this mark; raises ProcessError where one failed, or is too slow."""
        limit = _LIMITS[mark]
        if not self._have_marked(mark, limit, checked=True):
            raise ProcessError(
                f"{self._mark(mark, 0)} of {self._others} other processes answer after {limit:.0f} "
                "seconds; launch them again, the same command goes on"
            )

    def _have_marked(self, mark: str, limit: float, *, checked: bool = False) -> bool:
        """Whether all others leave this mark within so many seconds."""
        for _ in _looks(limit):
            if checked:
                self._check_others()
            if self._mark(mark, 0) == self._others:
                return True
        return False

    def _mark(self, mark: str, count: int = 1) -> int:
        """Leave a mark at the last word, and return how many there are."""
        return self._store.add(f"{mark}-{self._said}", count)

    def _check_others(self) -> None:
        """Raises ProcessError where another process has failed."""
        if self._store.check(["failed"]):
            raise ProcessError(self._store.get("failed").decode())

    # ------------------------------------------------------------------------- the other ones
    def follow(self) -> None:
        """As one of the others, do what the first process asks for, until it ends.

        Raises:
            ProcessError: the first process is gone, or this one failed alone.
            SystemExit: the first process failed, and says why.
        """
        try:
            while (word := self._hear())["do"] in WORK:
                self._join(WORK[word["do"]](**word["given"]))
        except torch.distributed.DistError as error:
            raise self._deserted() from error
        _take(word)

    def _hear(self, limit: float | None = None) -> dict[str, Any]:
        """The first process's next word; "nothing" after so many seconds."""
        for _ in _looks(limit):
            if self._store.check([f"word-{self._said + 1}"]):
                self._said += 1
                self._mark("heard")
                return json.loads(self._store.get(f"word-{self._said}"))
        return {"do": "nothing"}

    def _join(self, given: Training | Loading) -> None:
        try:
            work = given.ready()
            self._mark("ready")
            with self._watched():
                work()
        except Exception as error:
            self._fail(error)
        del work
        release()
        self._mark("done")

    def _fail(self, error: Exception) -> NoReturn:
        """End with the first process's error where it has one, or else with this one."""
        kind = "" if isinstance(error, _ERRORS) else f"{type(error).__name__}: "
        told = f"process {self.rank}: {kind}{one_line(error)}"
        if not _is_of_exchange(error):  # which fails because another process does
            self._store.compare_set("failed", "", told)
        word = self._hear(_LAST)
        if isinstance(error, _ERRORS) or _is_of_exchange(error):
            _take(word)
            raise ProcessError(told) from error
        raise error

    def _deserted(self) -> ProcessError:
        return ProcessError(
            f"process {self.rank}: the first process is gone; launch them again, the same "
            "command goes on"
        )

    # ------------------------------------------------------------------------------------ both
    @contextmanager
    def _watched(self) -> Iterator[None]:
        """End this process where, in an exchange of the block, it waits for one that has failed.

        Nothing else ends such a wait on a GPU, and nothing soon on a CPU.
        """
        left = threading.Event()
        watch = threading.Thread(target=self._watch, args=[left], daemon=True)
        watch.start()
        try:
            yield
        finally:
            left.set()
            watch.join()

    def _watch(self, left: threading.Event) -> None:
        sign = "failed" if self.is_first else f"word-{self._said + 1}"
        told = ""
        try:
            while not self._store.check([sign]):
                if left.wait(_PAUSE):
                    return
            if self.is_first:
                told = self._store.get(sign).decode()
        except torch.distributed.DistError:
            told = "" if self.is_first else str(self._deserted())
        if left.wait(_EXIT):  # it fails by itself
            return
        if told:
            print(f"\nerror: {told}", file=sys.stderr, flush=True)  # below a bar
        if self.is_first:
            self._end({"do": "fail", "status": 2})
        elif not told:
            self._hear(_LAST)
        os._exit(2)


def _take(word: dict[str, Any]) -> None:
    """End this process where the last word is of an error, which the first process tells."""
    if word["do"] == "fail":
        raise SystemExit(word["status"])


def _is_of_exchange(error: Exception) -> bool:
    """Whether a collective failed, as it does where another process is gone."""
    gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return gloo or isinstance(error, torch.distributed.DistError)


def _own_store(rank: int) -> Any:
    """A part of the processes' store for this run: they may do several, one after the other.

    The connection is one of its own, as no other thread may wait on that of the group meanwhile.
    """
    from torch.distributed.distributed_c10d import PrefixStore, group

    assert group.WORLD is not None  # they have joined
    store: Any = group.WORLD.get_group_store()
    store = store.clone()
    return PrefixStore(f"fastdpo/run-{store.add(f'fastdpo/{rank}', 1)}", store)


def _looks(limit: float | None) -> Iterator[None]:
    """Times at which to look for something: often at first, until so many seconds are over."""
    begun, pause = time.monotonic(), 0.01
    while limit is None or time.monotonic() - begun < limit:
        yield
        time.sleep(pause)
        pause = min(2 * pause, _PAUSE)
