"""Which stage depends on what: a small build system, for runs that are killed and go on.

Every stage reads the files of those before it and writes its own under a temporary name first.
``state.json`` has the options of the run and the stages that are done, in their order, when each
ended, and which one is under way. The run's page is written before each stage and after the last.
"""

import gc
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastdpo.data.clock import KEY, Clock
from fastdpo.errors import ConfigError, DataError
from fastdpo.report import summary as report
from fastdpo.report.runfiles import flat, resolved
from fastdpo.rounds.config import IterateConfig, defaults
from fastdpo.rounds.old_names import moved, old_names
from fastdpo.storage import check_directory, list_parts, read_json, write_json_atomic
from fastdpo.train import config as training

# What does not change what a run makes of its prompts.
FREE = {
    "rounds", "output_dir", "sample.server_url", "sample.server_command", "sample.server_timeout",
    "sample.api_key_env", "score.timeout", "score.retries", "score.concurrency",
    "score.api_key_env", "score.batch_size", "score.device_map",
    *(f"train.{name}" for name in training.FREE),
}  # fmt: skip
_EARLY = {"train.max_length", "train.overlong"}  # of training, but used from the prompts on


class Stages:
    """The stages of a run, each done once.

    Args:
        out: folder of the run.
        config: what decides the run, by section, as it stands in ``state.json``.
        clock: the time that chat templates see, which is noted too.

    Raises:
        ConfigError: the folder belongs to a run with other options.
        DataError: ``state.json`` is none.
    """

    def __init__(self, out: Path, config: dict[str, Any], clock: Clock) -> None:
        self.out, self.config, self.clock = out, config, clock
        self.path = out / "state.json"
        self.done: list[str] = []
        self.ended: dict[str, str] = {}
        self.begun: tuple[str, str] | None = None
        # What a stage left, to make it again where it is gone; and what was compared already.
        self.makers: dict[Path, tuple[Callable[[], None], Sequence[Path]]] = {}
        self.checked: set[Path] = set()
        if self.path.exists():
            self.done = self._done_before()
        else:
            self._save()

    def run(
        self,
        name: str,
        work: Callable[[], None],
        *,
        makes: Path | Sequence[Path],
        needs: Sequence[Path | str] = (),
    ) -> None:
        """Run a stage unless it is done, and note that it is.

        What it needs is compared with its checksums before, and made again where it was removed;
        what no stage that is left needs may be removed for good. A hub name is no file to compare.
        """
        paths = [Path(path) for path in needs]
        for path in [makes] if isinstance(makes, Path) else makes:
            self.makers[path] = work, paths
        if name in self.done:
            return
        self.begun = name, _now()
        self._save()
        self.show()
        self._provide(paths)
        work()
        release()
        self.done.append(name)
        self.ended[name], self.begun = _now(), None
        self._save()

    def show(self) -> None:
        """Write the run's page; at its end that says what was done."""
        report.html(self.out, defaults())

    def _provide(self, needs: Sequence[Path]) -> None:
        for path in needs:
            if path in self.makers and not is_whole(path):
                work, before = self.makers[path]
                print(f"{path} is gone, or not whole; it is made again")
                self._provide(before)
                work()
                release()
            if path not in self.checked and path.is_dir():
                check_directory(path)
            self.checked.add(path)

    def _save(self) -> None:
        state = {"config": self.config, "done": self.done, KEY: self.clock.time}
        state |= {"ended": self.ended, "begun": self.begun}
        write_json_atomic(self.path, state, checksum=True)

    def _done_before(self) -> list[str]:
        state = read_json(self.path)
        if not isinstance(state, dict) or not {"config", "done"} <= state.keys():
            raise DataError(f"{self.path} is not the state of a run; remove {self.out}")
        if "train" not in state["config"]:
            new = old_names(IterateConfig)
            places = moved([name for name in state["config"] if name in new], new)
            raise ConfigError(
                f"{self.out} holds a run of before options had sections ({places}); give another "
                "output_dir to start anew"
            )
        used = {x.rpartition("/")[2] for x in state["done"]}
        # An option that is newer than the run had its default's meaning.
        recorded = flat(state["config"])
        before = resolved(defaults(), recorded) | recorded
        for name, value in flat(self.config).items():
            # Nothing depends on how pairs are made before the first, or on how they are trained on.
            early = (name.startswith("pair.") and "pair" not in used) or (
                name.startswith("train.") and name not in _EARLY and "train" not in used
            )
            if name not in FREE and not early and before.get(name) != value:
                raise ConfigError(
                    f"{self.out} holds a run with {name}={before.get(name)}, not {value}; give the "
                    "same options to go on, or another output_dir to start anew"
                )
        self.ended = state.get("ended", {})
        return state["done"]


def _now() -> str:
    """In UTC, to the second."""
    return f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


def release() -> None:
    """Give back what models had on a GPU, before another process or a larger model wants it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_whole(path: Path) -> bool:
    """Whether a file, a folder of weights, or all parts of a stage are there."""
    if not (path / "plan.json").is_file():
        return path.exists() and (path.is_file() or any(path.iterdir()))
    try:
        list_parts(path)
    except DataError:
        return False
    return True
