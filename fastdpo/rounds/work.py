"""What all processes of a launch do at once, in files and values that any of them can read."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdpo.data.parts import read_candidates
from fastdpo.model.load import load_tokenizer
from fastdpo.pair.stage import load_examples, split_stages
from fastdpo.report.evaluation import by_prompt
from fastdpo.train.config import TrainConfig
from fastdpo.train.control import LengthController
from fastdpo.train.launch import launched
from fastdpo.train.together import telling
from fastdpo.train.trainer import train


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training of a round.

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

    def ready(self) -> Callable[[], Any]:
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

    def ready(self) -> Callable[[], Any]:
        return self.run

    @telling()
    def run(self) -> Any:
        """The model, or this process's part of it."""
        config = TrainConfig(**self.config)
        with closing(launched(config)) as engine:
            return engine.load(self.model, config, digest=False)[0]


WORK = {work.__name__: work for work in (Training, Loading)}


def response_lengths(candidates: Path) -> list[list[int]]:
    """Tokens of each response, a list for each prompt."""
    groups = by_prompt(read_candidates(candidates).values()).values()
    return [[len(row.response_ids) for row in group] for group in groups]
