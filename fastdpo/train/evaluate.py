"""Evaluation in training: the policy on pairs that it is not trained on, and the best one kept.

The pairs are a `Setup` of their own, whose one step takes all of them.  They are computed as those
of training are, so that at ``alpha = 0`` the first ``eval_loss`` is log 2 too.  Weights and random
state stay as they are, so training goes on with the same bits.
"""

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any

from torch import nn
from tqdm import tqdm

from fastdpo.errors import ConfigError, DataError, ModelError, require_used
from fastdpo.kernels.support import METRICS
from fastdpo.loss.examples import BaseObjective
from fastdpo.loss.singles import RunningMean
from fastdpo.progress import bar
from fastdpo.storage import read_json, write_json_atomic
from fastdpo.train.checkpoint import best_so_far, forget_best, keep_newest, load_best, save_best
from fastdpo.train.config import EvalConfig
from fastdpo.train.metrics import MetricsLog, read_metrics
from fastdpo.train.prepare import fit_pairs
from fastdpo.train.reference import known_reference, pairs_digest
from fastdpo.train.steps import Reference, Setup, plan_epoch
from fastdpo.train.together import of_first
from fastdpo.train.update import measure

BEST = "best.json"  # which step the policy is of, where the best one is kept
_FOLDER = "eval_dataset"  # what is kept of these pairs in the run's folder, and their name
_log = logging.getLogger(__name__)
_SHOWN = ("loss", "rewards/accuracies", "rewards/margins")


class Evaluator:
    """Evaluates the policy, and keeps the best; without pairs it does nothing.

    `fit` and `refer` are called as the same is done for the pairs of training, then `begin`, then
    `after` for each step.

    Raises:
        ConfigError: there are options of evaluation, and no pairs; or the best is to be chosen by
            what an evaluation of these does not have.
        DataError: the pairs are those of training.
    """

    def __init__(self, setup: Setup, pairs: Sequence[Any], options: EvalConfig) -> None:
        for field in fields(EvalConfig):
            require_used(options, field.name, bool(pairs), "eval_pairs be given")
        _check_apart(setup, pairs)
        _check_best(setup, pairs, options)
        self.options, self.best = options, setup.out / "best"
        own = replace(setup.config, batch_size=max(len(pairs), 1))
        self.setup = replace(setup, pairs=pairs, config=own, out=setup.out / _FOLDER, name=_FOLDER)
        self.reference = Reference()
        self.batches: list[list[int]] = []
        self.due: Collection[int] = ()
        self.checkpoint = 0  # steps done at the last one

    def facts(self) -> dict[str, Any]:
        """What of an evaluation is part of what a run is."""
        pairs = self.setup.pairs
        options = {x.name: getattr(self.options, x.name) for x in fields(EvalConfig)}
        return {"eval_pairs": pairs_digest(pairs) if pairs else None, **options}

    def fit(self, model: nn.Module, aux_loss_coef: float = 0.0) -> None:
        """Bring the pairs within the budget of a model's layout."""
        if self.setup.pairs:
            self.setup = replace(fit_pairs(self.setup, model), aux_loss_coef=aux_loss_coef)

    def refer(self, model: nn.Module, weights: str) -> None:
        """Compute their log-probs under the reference."""
        if self.setup.pairs:
            self.reference = known_reference(self.setup, model, weights)

    def begin(self, epochs: Sequence[int], done: int) -> None:
        """Plan the evaluations of epochs of so many steps, of which ``done`` are done.

        What was evaluated after them is not evaluated again.
        """
        if not self.setup.pairs:
            return
        ends, every = [0, *accumulate(epochs)], self.options.eval_steps
        due = {*(range(0, ends[-1], every) if every else ends), ends[-1]}
        self.due = {step for step in due if step > done or done == 0}
        [self.batches] = plan_epoch(self.setup, 0)
        self.checkpoint = done
        if self.setup.is_main:
            forget_best(self.best, done)
        if self.setup.progress:
            print(
                f"{len(self.setup.pairs)} {self.setup.noun} to evaluate on, {len(self.due)} times"
            )

    def after(
        self,
        step: int,
        model: nn.Module,
        objective: BaseObjective,
        reference: nn.Module | None,
        running: RunningMean,
        log: MetricsLog | None,
    ) -> None:
        """Evaluate after a step if it is time to, and keep the weights if they are the best.

        Args:
            reference: the model that computes it, where it is not known.
            log: of the first process, None on the others.

        Raises:
            ModelError: a metric is not finite.
        """
        if step not in self.due:
            return
        count = len(self.batches)
        evaluating = bar("evaluation", count, "batch", shown=self.setup.progress)
        with evaluating as shown, shown.part(count):
            given = replace(self.reference, model=reference)
            row = measure(self.setup, model, self.batches, objective, given, running)
        _check_finite(self.setup, step, row)
        if log is not None:
            log.add({"step": step, **row})
        if self.setup.progress:
            shown_names = (f"eval_{name}" for name in _SHOWN if f"eval_{name}" in row)
            told = (f"{name} {row[name]:.4f}" for name in shown_names)
            tqdm.write(f"step {step}: {'  '.join(told)}")
        # As in transformers the start is none to choose.
        if step and self.options.load_best_model_at_end:
            engine, value = self.setup.engine, row[self.options.best_metric]
            best = of_first(engine, lambda: best_so_far(self.best))
            if best is None or self.options.is_better(value, best[1]):
                if engine.is_main:
                    # Killed, the run goes on from the checkpoint, with the best up to there.
                    forget_best(self.best, self.checkpoint)
                save_best(self.best, step, engine, model, value)

    def saved(self, step: int) -> None:
        """Called after a checkpoint: the run never goes on from before it."""
        self.checkpoint = step
        if self.setup.is_main and self.options.load_best_model_at_end:
            keep_newest(self.best)

    def finish(self, model: nn.Module, steps: int) -> None:
        """Put the best weights into the model, where they are asked for, and say of which step."""
        if not self.options.load_best_model_at_end:
            return
        found = load_best(self.best, self.setup.engine, model)  # the last step is evaluated
        if self.setup.is_main:
            facts = {
                "global_step": steps,
                "best_global_step": found[0],
                "best_metric": found[1],
                "metric_for_best_model": self.options.best_metric,
            }
            write_json_atomic(self.best.parent / BEST, facts)

    def of_policy(self, steps: int | None) -> dict[str, float]:
        """The metrics of the saved policy's evaluation, none without one; ``steps`` are those of
        the policy, where they are known."""
        out = self.best.parent
        rows = read_metrics(out / "metrics" / "metrics.jsonl", steps)
        rows = [row for row in rows if "eval_loss" in row]
        if rows and self.options.load_best_model_at_end:
            best = read_json(out / BEST)["best_global_step"]
            rows = [row for row in rows if row["step"] == best]
        return {name: x for name, x in rows[-1].items() if name != "step"} if rows else {}


def _check_finite(setup: Setup, step: int, row: dict[str, float]) -> None:
    bad = next((name for name, value in row.items() if not math.isfinite(value)), None)
    if bad is None:
        return
    rate = setup.config.learning_rate
    raise ModelError(
        f"the {f'policy after step {step}' if step else 'start'} gives {_FOLDER} {bad}={row[bad]}: "
        + (
            f"training left the finite range; lower learning_rate ({rate}) or set bf16=false. The "
            "last checkpoint is kept"
            if step
            else "the model is broken or overflows in bf16 (try bf16=false)"
        )
    )


def _check_best(setup: Setup, examples: Sequence[Any], options: EvalConfig) -> None:
    """Refuse to choose the best by what an evaluation of these examples does not have."""
    known = [f"eval_{name}" for name in _metrics_of(examples)] if examples else []
    if examples and options.best_metric not in known:
        raise ConfigError(
            f"metric_for_best_model={options.best_metric} is no metric of eval_dataset with "
            f"loss_type={setup.config.loss_type}; give one of {', '.join(known)}"
        )


def _metrics_of(examples: Sequence[Any]) -> list[str]:
    """Of `METRICS` those that these examples have, and the loss.

    Single responses have no accuracy, and nothing of a side that none of them is on; lists without
    two scores that differ have no order to be right about.
    """
    names = ["loss", *METRICS]
    if examples[0].shape == "singles":
        sides = {"chosen" if x.desirable else "rejected" for x in examples}
        both = {"rewards/margins"} if len(sides) > 1 else set()
        return [x for x in names if x == "loss" or x.partition("/")[2] in sides or x in both]
    if examples[0].shape == "lists" and all(len({*x.scores}) == 1 for x in examples):
        names.remove("rewards/accuracies")
    return names


def _check_apart(setup: Setup, pairs: Sequence[Any]) -> None:
    """Refuse to evaluate on what is trained on, and warn where some of it is."""

    def key(example: Any) -> int:
        return hash((*map(tuple, (*example.prompts, *example.responses)),))

    if not pairs:
        return
    trained = {key(pair) for pair in setup.pairs}
    both = [pair for pair in pairs if key(pair) in trained]
    if len(both) == len(pairs):
        raise DataError(
            f"eval_dataset: all {len(pairs)} {setup.noun} are trained on too, so they would say "
            f"nothing of others; keep some {setup.noun} out of dataset, and give those"
        )
    if both and setup.is_main:
        _log.warning(
            "eval_dataset: %d of %d %s are trained on too (%s)",
            len(both), len(pairs), setup.noun, both[0].where,
        )  # fmt: skip
