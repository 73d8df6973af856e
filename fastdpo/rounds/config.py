"""The options of a run: a few of its own, and a section for each stage.

A section is the dataclass of that stage's own command.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fastdpo.data.records import STRING_PROMPTS
from fastdpo.errors import ConfigError, is_default, require, require_used
from fastdpo.loss.examples import BaseObjective
from fastdpo.pair.config import PairConfig
from fastdpo.report.runfiles import flat
from fastdpo.sample.config import SampleConfig
from fastdpo.score.config import ScoreConfig, check_address
from fastdpo.train.config import TrainConfig, check_control, default_alpha

_SCORE_OPTIONS = ("score_offset", "score_weight", "score_label")  # what of training reads scores
_IN_UNIT = ("judge", "remote judge", "answer")  # scorers known to be from 0 to 1, by `kind_of`
OWN_POLICIES = ("round", "average")  # what `reference` names beside a model
_SEEDED = ("sample", "pair", "train")  # sections with a seed, which is the run's


@dataclass(kw_only=True)
class EvaluateConfig:
    """How every policy is evaluated on prompts that are kept out of training.

    Attributes:
        heldout: prompts kept out of training.
        num_samples: responses for a held-out prompt, at the same temperature.
        scorer: scorer of held-out responses; by default the first of ``score.scorer``.
    """

    heldout: int = 32
    num_samples: int = 2
    scorer: str | None = None

    def __post_init__(self) -> None:
        require(self, "num_samples", self.num_samples >= 1, ">= 1")
        require(self, "heldout", self.heldout >= 0, ">= 0")
        for name in ("num_samples", "scorer"):
            require_used(self, name, self.heldout > 0, "heldout be > 0")
        check_address("scorer", self.scorer or "")


@dataclass(kw_only=True)
class IterateConfig:
    """Sample, score, pair and train, make the policy the next start, and repeat.

    Attributes:
        model: start of the first round, a folder or hub name in Hugging Face format.
        prompts: file or hub name of rows with a ``prompt`` (text or messages).
        output_dir: folder of the run; resumed if it exists.
        rounds: rounds in all; raise it to go on from a finished run.
        max_prompts: use only this many prompts for training.
        chat_template: file with a Jinja chat template instead of the model's own; it is saved with
            the policies.
        string_prompts: a prompt that is a string, of ``prompts`` and of ``pair.replay``, is a
            message of the user where the model has a chat template ("chat"), or text without one
            ("text").
        reference: of a round: "round", the policy at its start; "average", a moving average of
            these; or a folder or hub name, the same in all rounds.
        reference_decay: what the moving average keeps of itself a round.
        extrapolation: the next start is the policy and this much more of its change from the
            policy of the round before (accelerated preference optimization, arXiv 2410.06293).
        round_learning_rates, round_betas: of each round, the last one for those that follow;
            instead of ``train.learning_rate`` and ``train.beta``.
        seed: of the split of prompts, and of all stages, whose own seeds it replaces.
        sample: how responses are drawn. ``sample.dtype`` is also that of the models whose
            divergence from the start is measured on held-out prompts.
        score: where scores come from. ``score.batch_size`` is also that of that divergence.
        pair: how scored responses become pairs. They are measured with the ``dtype``,
            ``max_tokens``, ``bf16`` and ``impl`` of ``train``.
        train: how a round trains. ``train.max_length`` bounds prompt and response in all stages,
            and ``train.overlong`` says what becomes of longer prompts too.
        evaluate: what is measured of every policy.
    """

    model: str
    prompts: str
    output_dir: str = "runs/iterate"
    rounds: int = 3
    max_prompts: int | None = None
    chat_template: str | None = None
    string_prompts: str = "chat"
    reference: str = "round"
    reference_decay: float = 0.5
    extrapolation: float = 0.0
    round_learning_rates: list[float] | None = None
    round_betas: list[float] | None = None
    seed: int = 0
    sample: SampleConfig = field(default_factory=SampleConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    pair: PairConfig = field(default_factory=PairConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        require(self, "rounds", self.rounds >= 1, ">= 1")
        require(self, "extrapolation", self.extrapolation >= 0, ">= 0")
        require(self, "seed", self.seed >= 0, ">= 0")
        require(self, "max_prompts", self.max_prompts is None or self.max_prompts >= 1, ">= 1")
        require(self, "reference_decay", 0 <= self.reference_decay <= 1, "in [0, 1]")
        known = self.string_prompts in STRING_PROMPTS
        require(self, "string_prompts", known, f"one of {', '.join(STRING_PROMPTS)}")
        averaged = self.reference == "average"
        require_used(self, "reference_decay", averaged, "reference be average")
        for name, of_rounds in (
            ("learning_rate", "round_learning_rates"), ("beta", "round_betas"),
        ):  # fmt: skip
            values = getattr(self, of_rounds)
            positive = values is None or (values and all(0 < x < math.inf for x in values))
            require(self, of_rounds, positive, "a list of finite numbers > 0")
            otherwise = f"{of_rounds} be left out, which says it of all rounds"
            with _in("train"):
                require_used(self.train, name, values is None, otherwise)
        for name in _SEEDED:
            setattr(self, name, replace(getattr(self, name), seed=self.seed))
        self._check_samples()
        self._feed_loss()
        self._check_scorers()
        self._check_pairs()
        with _in("score"):
            self.score.check_used(self.all_scorers, measured=self.evaluate.heldout > 0)
        with _in("train"):
            check_control(self.train, None if self.reference == "round" else self.reference)

    def _check_samples(self) -> None:
        sample, longest = self.sample, self.train.max_length
        with _in("sample"):
            require(sample, "num_samples", sample.num_samples >= 2, ">= 2, for a best and a worst")
            require(sample, "temperature", sample.temperature > 0, "> 0, or all samples are alike")
            whole = f"< train.max_length={longest}, so that sampled responses are whole"
            require(sample, "max_new_tokens", sample.max_new_tokens < longest, whole)
        with _in("pair"):
            several = sample.num_samples > 2 or self.pair.rule in ("best_worst", "listwise")
            two = "sample.num_samples be > 2: two responses make one pair"
            require_used(self.pair, "rule", several, two)

    def _feed_loss(self) -> None:
        """Name the rule that makes what the loss takes, pairs or lists, and refuse what it could
        not be trained on. The options of a run, as its files have them, are those after this.
        """
        with _in("train"):
            betas = self.round_betas or []
            *_, objective = (self.training(i).objective for i in range(1, max(len(betas), 1) + 1))
        lists, rule = objective.shape == "lists", self.pair.rule
        loss = f"train.loss_type={self.loss}"
        if rule is not None and lists != (rule == "listwise"):
            raise ConfigError(
                f"pair.rule={rule} makes {'pairs' if lists else 'lists'}, but {loss} takes "
                f"{objective.shape}; leave pair.rule out"
            )
        with _in("pair"):
            self.pair = self.pair.named("listwise" if lists else "best_worst")
        if lists and objective.problem([0.0, 1.0, 1.0]):  # it can take no list with a tie
            self.pair = replace(self.pair, drop_ties=True)
        if self.reference != "round" and not objective.needs_reference:
            raise ConfigError(
                f"reference={self.reference} must be left out, or another loss be chosen: {loss} "
                "needs no reference"
            )
        for name in ("consistency", "soft_label"):
            if is_default(self.pair, name):
                continue
            given = f"pair.{name}={getattr(self.pair, name)}"
            if not objective.takes_margin:
                raise ConfigError(f"{given} is label smoothing, which {loss} has no use for")
            others = [x for x in ("label_smoothing", "score_label") if self.train.uses(x)]
            if others:
                raise ConfigError(
                    f"{given} and train.{others[0]} both say how far a label holds; choose one"
                )
        smoothed = any(map(self.train.uses, ("label_smoothing", "score_label"))) or any(
            not is_default(self.pair, name) for name in ("consistency", "soft_label")
        )
        if objective.smoothing_above is not None and not smoothed:
            raise ConfigError(
                f"{loss} needs a label smoothing > 0; give train.label_smoothing, as 0.001, or "
                "train.score_label or pair.consistency"
            )
        if self.reads_scores:
            self._check_scores(objective)

    def _check_scores(self, objective: BaseObjective) -> None:
        """Refuse scores of another kind than the loss reads, as far as that is known now."""
        from fastdpo.score.load import kind_of

        pair, train = self.pair, self.train
        reads = next((f"train.{x}" for x in _SCORE_OPTIONS if train.uses(x)), "")
        reads = reads or f"train.loss_type={self.loss}"
        shaped = [
            f"pair.{x}={getattr(pair, x)}"
            for x in ("transform", "combine", "length_penalty")
            if not is_default(pair, x)
        ]
        win_rates = objective.needs_scores and objective.problem([1e3, -1e3]) is not None
        win_rates = win_rates and objective.shape == "pairs"
        unknown = [x for x in self.score.scorers if kind_of(x) not in _IN_UNIT]
        if win_rates and pair.length_penalty != 0:
            raise ConfigError(f"{reads} needs win rates, which {shaped[-1]} takes something off")
        if win_rates and pair.transform not in ("par", "win_rate"):
            scaled = [f"pair.weights={pair.weights}"] if pair.weights else []
            several = self.score.scorers if len(self.score.scorers) > 1 else []  # added up
            of = shaped or scaled or [f"score.scorer={x}" for x in unknown or several]
            if of:
                raise ConfigError(
                    f"{reads} needs win rates, in [0, 1], for scores, and those of {of[0]} may be "
                    "others; set pair.transform=win_rate, which makes them of any scores, or par"
                )
        centred = "preference_score" in self.loss.split(",")
        judges = [f"score.scorer={x}" for x in self.score.scorers if x.startswith("judge:")]
        if centred and (pair.transform in ("par", "win_rate") or judges):
            raise ConfigError(
                f"{reads} needs scores around 0, and those of {(shaped or judges)[0]} are win "
                "rates; use train.loss_type=sppo, which takes these"
            )
        below = pair.transform in ("log_sigmoid", "mean_std")
        if train.score_offset == "log_ratio" and below:
            raise ConfigError(
                f"train.score_offset=log_ratio needs scores above 0, which {shaped[0]} does not "
                "give; use another transform, or log_difference"
            )
        if self.needs_order and pair.flip_share:
            raise ConfigError(
                f"{reads} needs a chosen response that scores higher, but pair.flip_share="
                f"{pair.flip_share:g} turns pairs round; leave one of them out"
            )
        if pair.replay is None:
            return
        if shaped:
            raise ConfigError(
                f"{reads} reads scores, which {shaped[0]} shapes within a prompt's samples; those "
                "of offline pairs (pair.replay) are no such samples. Leave one of the two out"
            )
        self._check_offline_scorers(f"{reads} reads scores of offline pairs (pair.replay)")

    def _check_scorers(self) -> None:
        scorers, pair = self.score.scorers, self.pair
        implicit = "implicit" in scorers
        if "likelihood" in self.all_scorers:
            raise ConfigError(
                "score.scorer=likelihood is how the first round of consistency ranks by "
                "previous_model, and not a scorer of iterate; use implicit, or fastdpo score"
            )
        if implicit and self.score.previous_model is None:
            raise ConfigError(
                "score.scorer=implicit needs score.previous_model, the model before the start: in "
                "the first round the reward is log pi(start) - log pi(previous_model)"
            )
        if self.evaluate.heldout and self.evaluated_by == "implicit":
            raise ConfigError(
                "evaluate.scorer=implicit would be another function every round; name another "
                "evaluate.scorer, or set evaluate.heldout=0"
            )
        compared = [spec for spec in scorers if spec.startswith("judge:")]
        if compared and pair.transform == "win_rate":
            raise ConfigError(
                f"pair.transform=win_rate makes win rates of scores, but those of score.scorer="
                f"{compared[0]} are win rates as they are; leave it out"
            )
        if implicit and pair.transform_reference == "start":
            raise ConfigError(
                "pair.transform_reference=start compares scores of several rounds, but "
                "score.scorer=implicit is another function in each; leave one of them out"
            )
        if pair.consistency != "none" and (scorers != ["implicit"] or pair.length_penalty):
            raise ConfigError(
                f"pair.consistency={pair.consistency} compares the rankings of two policies, so it "
                "needs score.scorer=implicit and nothing beside it, no other scorer and no "
                "pair.length_penalty: they do not change between rounds, or are on another scale "
                "than the mean log-probability that the first round compares with"
            )

    def _check_pairs(self) -> None:
        pair, scorers = self.pair, self.score.scorers
        if pair.rule == "tree_siblings":
            raise ConfigError(
                "pair.rule=tree_siblings needs the candidates of a tree search, which iterate does "
                "not run; give them to fastdpo pair"
            )
        with _in("pair"):
            pair.check_scorers(
                len(scorers), offline=pair.replay is not None, read=self.reads_scores
            )
        if pair.fresh_threshold is None:
            return
        if pair.replay is None:
            raise ConfigError(
                f"pair.fresh_threshold={pair.fresh_threshold} needs pair.replay, the pairs that it "
                "filters"
            )
        self._check_offline_scorers(
            "pair.fresh_threshold compares scores of offline pairs with those of single fresh "
            "samples"
        )

    def _check_offline_scorers(self, why: str) -> None:
        """Refuse scorers whose scores depend on a prompt's other responses, or on the round."""
        for spec in self.score.scorers:
            if spec == "implicit" or spec.startswith("judge:"):
                raise ConfigError(
                    f"{why}, which score.scorer={spec} does not give; use a reward model, an "
                    "endpoint, a function or answer"
                )

    @property
    def loss(self) -> str:
        """The names of the losses."""
        names = self.train.loss_type
        return names if isinstance(names, str) else ",".join(names)

    @property
    def reads_scores(self) -> bool:
        """Whether the loss reads the scores, and not only their order."""
        objective = self.train.objective
        by_value = objective.needs_scores and not getattr(objective, "by_order", False)
        return by_value or any(map(self.train.uses, _SCORE_OPTIONS))

    @property
    def needs_order(self) -> bool:
        """Whether the loss takes no pair whose chosen response scores as low as the rejected."""
        return self.train.score_offset == "log_difference" or self.train.uses("score_weight")

    @property
    def evaluated_by(self) -> str:
        """The scorer of held-out responses."""
        return self.evaluate.scorer or self.score.scorers[0]

    @property
    def all_scorers(self) -> Sequence[str]:
        """Scorers of samples, and of held-out responses where there are any."""
        return [*self.score.scorers, *([self.evaluated_by] if self.evaluate.heldout else [])]

    @property
    def scores_offline(self) -> bool:
        """Whether offline pairs are compared with fresh samples, voted on by the scorers, or their
        scores read by the loss."""
        compared = self.pair.fresh_threshold is not None
        return compared or self.pair.needs_several_scorers or self.reads_scores

    def training(self, index: int) -> TrainConfig:
        """Options of training in round ``index``, from 1."""

        def of_round(values: list[float] | None, usual: float) -> float:
            return values[min(index, len(values)) - 1] if values else usual

        rate = of_round(self.round_learning_rates, self.train.learning_rate)
        return replace(
            self.train, learning_rate=rate, beta=of_round(self.round_betas, self.train.beta)
        )

    def to_dict(self) -> dict[str, Any]:
        """The options by section, as a YAML file has them; the seed once."""
        values = asdict(self)
        for name in _SEEDED:
            del values[name]["seed"]
        return values


@contextmanager
def _in(section: str) -> Iterator[None]:
    """Within it, errors of a section's options name the section too."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{section}.{error}") from error


def defaults() -> dict[str, Any]:
    """What all options are by default, by their names with the section; ``train.alpha`` as a
    function of the others (`fastdpo.report.runfiles.resolved`)."""
    known = flat(IterateConfig(model="", prompts="").to_dict())
    return known | {"train.alpha": lambda config: default_alpha(config.get("train.loss_type"))}
