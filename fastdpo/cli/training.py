"""What `fastdpo train` leaves for its reader: options, facts of its data, page and model cards."""

import time
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from fastdpo.cli.commands import save_options
from fastdpo.data.examples import TokenizedExample
from fastdpo.data.tokenize import Tokenized
from fastdpo.loss.choices import CHOICES
from fastdpo.report import card
from fastdpo.report import summary as report
from fastdpo.storage import write_json_atomic
from fastdpo.train.config import default_alpha
from fastdpo.train.prepare import steps_and_end

_LEAST_SHARE = 50  # a page takes at most one part in so many of the time


class TrainingPage:
    """Keeps the page of a training up to date, and ends with its cards.

    Nothing is written before the first step, so that a folder of another run stays as it is.

    Args:
        config: the command's options.
        found: the examples to train on, and what became of the others.
        held: those to evaluate on.
    """

    def __init__(self, config: Any, found: Tokenized, held: Sequence[TokenizedExample]) -> None:
        self.config, self.out = config, Path(config.output_dir)
        self.data = data_facts(found, held)
        self.defaults = defaults(type(config))
        self.steps, self.took, self.wrote = 0, 0.0, 0.0

    def step(self, row: dict[str, float]) -> None:
        """Called after each optimizer step; the page follows at checkpoints, where it is cheap."""
        self.steps += 1
        if self.steps == 1:
            self._begin()
        if self.steps == 1 or self.steps % self.config.save_steps == 0:
            now = time.monotonic()
            if now - self.wrote >= _LEAST_SHARE * self.took:
                report.html(self.out, self.defaults)
                self.wrote = time.monotonic()
                self.took = self.wrote - now

    def finish(self, metrics: dict[str, float]) -> Path:
        """Note that training ended, and write page and cards; returns the page."""
        self._begin()
        path, (_, ended) = self.out / "train.json", steps_and_end(self.out)
        if ended or not path.is_file():  # an older run noted its end there alone
            write_json_atomic(path, metrics | {"ended": ended}, checksum=True)
        page = report.html(self.out, self.defaults)
        card.write_cards(self.out, self.defaults, losses=CHOICES)
        return page

    def _begin(self) -> None:
        save_options(asdict(self.config), self.out)
        write_json_atomic(self.out / "data.json", self.data)


def defaults(config: type) -> dict[str, Any]:
    """The options of a command at their defaults, None for those that have to be given; ``alpha``
    as a function of the others (`fastdpo.report.runfiles.resolved`)."""
    found = {
        field.name: None if field.default is MISSING else field.default for field in fields(config)
    }
    return found | {"alpha": lambda config: default_alpha(config.get("loss_type"))}


def data_facts(found: Tokenized, held: Sequence[TokenizedExample]) -> dict[str, Any]:
    """Numbers and mean lengths of examples, in tokens, as `pairs.summary.json` of a round has them;
    the number of examples by their shape."""
    examples = found.examples
    facts = {
        examples[0].shape: len(examples),
        "dropped": found.dropped,
        "truncated_to_max_length": found.truncated,
        "mean_length_prompt": fmean(len(x) for each in examples for x in each.prompts),
    }
    if examples[0].shape == "pairs":
        facts["mean_length_chosen"] = fmean(len(pair.chosen_ids) for pair in examples)
        facts["mean_length_rejected"] = fmean(len(pair.rejected_ids) for pair in examples)
    else:
        lengths = [len(ids) for each in examples for ids in each.responses]
        facts |= {"responses": len(lengths), "mean_length_response": fmean(lengths)}
    facts["longest"] = max(each.longest for each in examples)
    facts |= {"prompts_as_text": len(found.as_text_at)} if found.as_text_at else {}
    return facts | ({"held_out_pairs": len(held)} if held else {})
