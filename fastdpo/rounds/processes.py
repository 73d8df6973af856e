"""The processes of a launch: the first one runs the rounds, the others join it in training.

Between trainings the others hold no model. They wait, without a limit, for the first one's next
word: JSON under a number, in the key-value store by which torch.distributed connected the
processes. No collective is pending then: those time out.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastdpo.data.parts import read_candidates
from fastdpo.errors import ConfigError, DataError, ModelError, ProcessError
from fastdpo.model.load import load_tokenizer, one_line
from fastdpo.pair.stage import load_examples, split_stages
from fastdpo.report.evaluation import by_prompt
from fastdpo.rounds.resume import release
from fastdpo.train.config import TrainConfig
from fastdpo.train.control import LengthController
from fastdpo.train.engine import Engine
from fastdpo.train.trainer import train

_PAUSE = 0.5  # seconds between looks at the store, at most
_HEARD = 30.0  # seconds in which a word is heard by processes that look for one
_DONE = 600.0  # seconds in which they have read the examples, or given memory back
_ERRORS = (ConfigError, DataError, ModelError, OSError, KeyboardInterrupt)  # told from one to all


@dataclass(frozen=True, kw_only=True)
class Training:
    """What one training of a round is given, in files and values that any process can read.

    Attributes:
        start, out, reference: as of `train`.
        config, control: the same, as JSON has them.
        model, chat_template: where the tokenizer comes from.
        pairs: the file of the examples.
        stage: which stage of their curriculum, from 0.
        candidates: the samples whose lengths are held, for alpha=auto.
    """

    start: str
    out: str
    reference: str | None
    config: dict[str, Any]
    control: dict[str, Any] | None
    model: str
    chat_template: str | None
    pairs: str
    stage: int
    candidates: str | None

    def ready(self, engine: Engine) -> Callable[[], Any]:
        """Read the files; returns the work."""
        stages = split_stages(load_examples(Path(self.pairs)))
        tokenizer = load_tokenizer(self.model, self.chat_template)
        return lambda: self.run(tokenizer, stages[self.stage], progress=False)

    def run(self, tokenizer: Any, examples: Sequence[Any], *, progress: bool) -> dict[str, float]:
        """`train` on the examples, which are those of the file; returns its metrics."""
        control, candidates = self.control, self.candidates
        return train(
            self.start,
            tokenizer,
            examples,
            TrainConfig(**self.config),
            Path(self.out),
            reference=self.reference,
            control=None if control is None else LengthController.from_dict(control),
            lengths=None if candidates is None else response_lengths(Path(candidates)),
            keep_checkpoint=False,
            progress=progress,
        )


@dataclass(frozen=True, kw_only=True)
class Loading:
    """A model that is to be trained, loaded to see that it can be; ``config`` as JSON has it."""

    model: str
    config: dict[str, Any]

    def ready(self, engine: Engine) -> Callable[[], Any]:
        return lambda: self.run(engine)

    def run(self, engine: Engine) -> Any:
        model, _ = engine.load(self.model, TrainConfig(**self.config), digest=False)
        return model


_WORK = {work.__name__: work for work in (Training, Loading)}


def response_lengths(candidates: Path) -> list[list[int]]:
    """Tokens of each response, a list for each prompt."""
    groups = by_prompt(read_candidates(candidates).values()).values()
    return [[len(row.response_ids) for row in group] for group in groups]


class Processes:
    """Those that a run was launched as; one alone is the first, and has nobody to tell.

    Args:
        engine: how they train together.

    Attributes:
        is_first: whether this is the one that runs the rounds.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.is_first = engine, engine.is_main
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
            kind = next((x.__name__ for x in _ERRORS if isinstance(error, x)), None)
            if isinstance(error, ProcessError):
                kind = ModelError.__name__  # it is told here
            last = {"do": "fail", "kind": kind, "message": str(error)}
            raise
        finally:
            if self._others:
                with suppress(RuntimeError):  # the store is gone, and so are they
                    self._say(last)
                    if last["do"] == "fail":
                        _let_go()
                    # They have the store from this process, where no launcher keeps one.
                    self._have_marked("heard", _HEARD)

    def train(
        self, given: Training, tokenizer: Any, examples: Sequence[Any], *, progress: bool
    ) -> dict[str, float]:
        """Train on all processes; returns the metrics. Tokenizer and examples are those given.

        Raises:
            ProcessError: another process failed or doesn't answer.
            Exception: whatever `fastdpo.train.trainer.train` raises.
        """
        return self._do(given, lambda: given.run(tokenizer, examples, progress=progress))

    def load(self, name: str, config: TrainConfig) -> Any:
        """Load a model to be trained, or the first process's part of it.

        Raises:
            ProcessError: another process failed or doesn't answer.
            ModelError: it cannot be trained.
        """
        given = Loading(model=name, config=asdict(config))
        return self._do(given, lambda: given.run(self.engine))

    def _do(self, given: Any, work: Callable[[], Any]) -> Any:
        """What the work returns, which all processes do at once."""
        if not self._others:
            return work()
        self._say({"do": type(given).__name__, "given": asdict(given)})
        self._wait_for_others("heard", _HEARD)
        self._wait_for_others("ready", _DONE)
        try:
            found = work()
        except RuntimeError:  # as where one is gone whom a collective waits for
            self._check_others()
            raise
        self._wait_for_others("done", _DONE)
        return found

    def _say(self, word: dict[str, Any]) -> None:
        """Leave the next word for the others."""
        self._said += 1
        self._store.set(f"word-{self._said}", json.dumps(word))

    def _wait_for_others(self, mark: str, limit: float) -> None:
        """Until all have left this mark; raises ProcessError where one failed, or is too slow."""
        if not self._have_marked(mark, limit, checked=True):
            raise ProcessError(
                f"{self._mark(mark, 0)} of {self._others} other processes answer after "
                f"{limit:.0f} seconds; launch them again, the same command goes on"
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
            Exception: what the first process failed with.
        """
        try:
            while (word := self._hear())["do"] in _WORK:
                self._join(_WORK[word["do"]](**word["given"]))
        except torch.distributed.DistError as error:
            raise ProcessError(
                f"process {self.engine.rank}: the first process is gone; launch them again, the "
                "same command goes on"
            ) from error
        self._leave(word)

    def _hear(self, limit: float | None = None) -> dict[str, Any]:
        """The first process's next word; "nothing" after so many seconds."""
        key = f"word-{self._said + 1}"
        for _ in _looks(limit):
            if self._store.check([key]):
                self._said += 1
                self._mark("heard")
                return json.loads(self._store.get(key))
        return {"do": "nothing"}

    def _join(self, given: Any) -> None:
        try:
            work = given.ready(self.engine)
            self._mark("ready")
            work()
        except Exception as error:
            self._fail(error)
        del work
        release()
        self._mark("done")

    def _fail(self, error: Exception) -> NoReturn:
        """End with the first process's error where it has one, or else with this one."""
        told = f"process {self.engine.rank}: {one_line(error)}"
        if not isinstance(error, _ERRORS):
            told = f"process {self.engine.rank}: {type(error).__name__}: {one_line(error)}"
        self._store.compare_set("failed", "", told)
        _let_go()
        word = self._hear(_HEARD)
        if word["do"] == "fail":
            self._leave(word)
        if isinstance(error, (*_ERRORS, torch.distributed.DistError)):
            raise ProcessError(told) from error
        raise error

    def _leave(self, word: dict[str, Any]) -> None:
        """Where the last word is of an error, raise that."""
        if word["do"] == "end":
            return
        kinds = {x.__name__: x for x in _ERRORS}
        if word["kind"] is None:
            raise SystemExit(1)  # the first process shows where its code failed
        raise kinds[word["kind"]](word["message"])


def _own_store(rank: int) -> Any:
    """A part of the processes' store for this run: they may do several, one after the other."""
    from torch.distributed.distributed_c10d import PrefixStore, group

    assert group.WORLD is not None  # they have joined
    store = group.WORLD.get_group_store()
    return PrefixStore(f"fastdpo/run-{store.add(f'fastdpo/{rank}', 1)}", store)


def _let_go() -> None:
    """Fail the collectives that others wait in for this process, which is ending; on GPUs they are
    ended by the launcher."""
    from torch import distributed

    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def _looks(limit: float | None) -> Iterator[None]:
    """Times at which to look for something: often at first, until so many seconds are over."""
    begun, pause = time.monotonic(), 0.01
    while limit is None or time.monotonic() - begun < limit:
        yield
        time.sleep(pause)
        pause = min(2 * pause, _PAUSE)
