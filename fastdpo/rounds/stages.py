"""The stages of a round as commands of their own, so that each can run where its hardware is.

    fastdpo sample --model POLICY --prompts prompts.jsonl --output_dir r1/candidates
    fastdpo score  --candidates r1/candidates --scorer REWARD_MODEL --output_dir r1/scores
    fastdpo pair   --candidates r1/candidates --scores '[r1/scores]' --output r1/pairs.jsonl
    accelerate launch -m fastdpo.cli train --model POLICY --dataset r1/pairs.jsonl --output_dir r1

They take and leave the files of `fastdpo iterate`, and go on where they were stopped like it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastdpo.data.rows import preference_rows, prompt_rows, read_rows
from fastdpo.errors import ConfigError, require_used
from fastdpo.model.load import load_causal_lm, load_tokenizer, stop_ids
from fastdpo.pair import filters
from fastdpo.pair.offline import offline_pairs
from fastdpo.pair.stage import check_votes, pair
from fastdpo.rounds.options import PairingOptions, SamplingOptions, ScoringOptions, dtype_of
from fastdpo.sample.stage import open_sampler, sample
from fastdpo.score.stage import score, uses
from fastdpo.storage import locked


@dataclass(kw_only=True)
class SampleConfig(SamplingOptions):
    """Sample responses to prompts; see `fastdpo.rounds.options.SamplingOptions`.

    Attributes:
        model: the policy, a folder or hub name in Hugging Face format.
        prompts: file or hub name of rows with a ``prompt`` (text or messages).
        output_dir: gets the candidates, in parts; resumed if it exists.
        chat_template: file with a Jinja chat template instead of the model's own.
        max_prompts: take only this many, from the first on.
        max_length: tokens of prompt and response; None leaves it to the model.
        round_index: another round draws other random numbers.
        seed: of all random numbers.
    """

    model: str
    prompts: str
    output_dir: str = "candidates"
    chat_template: str | None = None
    max_prompts: int | None = None
    max_length: int | None = None
    round_index: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        self.sampling(self.seed)
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ConfigError(f"max_prompts={self.max_prompts} must be >= 1")
        if self.max_length is not None and self.max_length <= self.max_new_tokens:
            raise ConfigError(
                f"max_length={self.max_length} must be > max_new_tokens={self.max_new_tokens}"
            )


@dataclass(kw_only=True)
class ScoreConfig(ScoringOptions):
    """Score candidates by one scorer; see `fastdpo.rounds.options.ScoringOptions`.

    Attributes:
        candidates: folder that ``fastdpo sample`` wrote.
        output_dir: gets the scores, a part for each part of candidates; resumed if it exists.
        policy: for scorer "implicit", the policy that sampled; ``previous_model`` is the one before
            it. For "likelihood", the model whose mean log-probability is the score.
    """

    candidates: str
    output_dir: str = "scores"
    policy: str | None = None

    def __post_init__(self) -> None:
        if len(self.scorers) != 1:
            raise ConfigError(
                f"scorer={self.scorer} must be one scorer; run the command for each, with an "
                "output_dir of its own, and give all of them to fastdpo pair"
            )
        self.remote()
        self.check_used(self.scorers)
        needs = "policy" in uses(self.scorers[0])
        require_used(self, "policy", needs, "scorer be implicit or likelihood")


@dataclass(kw_only=True)
class PairConfig(PairingOptions):
    """Make pairs of scored candidates; see `fastdpo.rounds.options.PairingOptions`.

    Attributes:
        candidates: folder that ``fastdpo sample`` wrote.
        scores: folders that ``fastdpo score`` wrote, one for each scorer.
        output: a .jsonl file for the pairs; its summary lies beside it.
        previous_scores: for ``consistency``, scores of the same candidates by the round before.
        reference_candidates, reference_scores: for ``transform_reference: start``, what the model
            before training gave to the same prompts, and its scores, a folder for each scorer.
        model: for ``ches_keep``, ``max_difficulty`` and ``replay``, the policy that is trained.
        chat_template: for ``replay``, file with a Jinja chat template instead of the model's own.
        max_length: offline pairs with a longer side are left out.
        max_tokens: tokens that are measured at a time.
        bf16: measure in bf16 under autocast.
        seed: of what is drawn.
    """

    candidates: str
    scores: list[str]
    output: str = "pairs.jsonl"
    previous_scores: list[str] = field(default_factory=list)
    reference_candidates: str | None = None
    reference_scores: list[str] = field(default_factory=list)
    model: str | None = None
    chat_template: str | None = None
    max_length: int = 1024
    max_tokens: int = 4096
    bf16: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        rules = self.rules(self.seed)
        self.shaping(len(self.scores))
        if not self.scores:
            raise ConfigError("scores=[] must name at least one folder")
        voting = rules.needs_several_scorers
        if voting and len(self.scores) < 2:
            raise ConfigError(
                f"flip_share={self.flip_share} and soft_label={self.soft_label} need at least two "
                f"folders of scores, not scores={self.scores}"
            )
        compares = self.consistency != "none"
        if compares and len(self.previous_scores) != len(self.scores):
            raise ConfigError(
                f"consistency={self.consistency} needs previous_scores, as many folders as scores, "
                f"not {self.previous_scores}"
            )
        self.check_replay()
        try:
            check_votes(rules, self.shaping(len(self.scores)), offline=False)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        refers = self.transform_reference == "start"
        named = self.reference_candidates is not None and bool(self.reference_scores)
        given = self.reference_candidates is not None or bool(self.reference_scores)
        if refers != named or refers != given:
            raise ConfigError(
                f"transform_reference={self.transform_reference} with "
                f"reference_candidates={self.reference_candidates} and "
                f"reference_scores={self.reference_scores}: give start and both, or none"
            )
        if self.fresh_threshold is not None:
            raise ConfigError("fresh_threshold needs scored rounds; use fastdpo iterate")
        if (rules.needs_model or self.replay) and self.model is None:
            raise ConfigError("ches_keep, max_difficulty and replay need model, the policy")
        measures, replays = rules.needs_model, self.replay is not None
        for names, used, otherwise in (
            (("previous_scores",), compares, "consistency be given"),
            (("model",), measures or replays, "ches_keep, max_difficulty or replay be given"),
            (("max_length", "chat_template"), replays, "replay be given"),
            (("max_tokens", "bf16"), measures, "ches_keep or max_difficulty be given"),
        ):
            for name in names:
                require_used(self, name, used, otherwise)


def run_sample(config: SampleConfig) -> None:
    rows = prompt_rows(read_rows(config.prompts))[: config.max_prompts]
    tokenizer = load_tokenizer(config.model, config.chat_template)
    sampling = config.sampling(config.seed)
    out = Path(config.output_dir)
    with (
        locked(out),
        open_sampler(
            config.model,
            tokenizer,
            sampling,
            dtype=dtype_of(config),
            max_length=config.max_length,
            log_path=out / "sampler.log",
        ) as sampler,
    ):
        sample(sampler, tokenizer, rows, sampling, out, round_index=config.round_index)
    print(f"candidates: {out}")


def run_score(config: ScoreConfig) -> None:
    out = Path(config.output_dir)
    scorer = config.load(config.scorers[0], config.policy, config.previous_model)
    with locked(out):
        score(scorer, Path(config.candidates), out)
    print(f"scores: {out}")


def run_pair(config: PairConfig) -> None:
    rules = config.rules(config.seed)
    replay: list[Any] = []
    if config.replay_share:
        rows = preference_rows(read_rows(str(config.replay)))
        tokenizer = load_tokenizer(str(config.model), config.chat_template)
        replay, dropped = offline_pairs(
            rows,
            tokenizer,
            max_length=config.max_length,
            stop_ids=stop_ids(str(config.model), tokenizer),
        )
        for reason, count in dropped.items():
            print(f"offline pairs dropped, {count}: {reason}")

    def measure(pairs: list[Any]) -> Any:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_causal_lm(str(config.model)).to(device)
        return filters.measure(model, pairs, max_tokens=config.max_tokens, bf16=config.bf16)

    summary = pair(
        Path(config.candidates),
        [Path(folder) for folder in config.scores],
        Path(config.output),
        pairing=rules,
        shaping=config.shaping(len(config.scores)),
        previous_scores=[Path(folder) for folder in config.previous_scores] or None,
        reference_scores=(
            (Path(config.reference_candidates), [Path(x) for x in config.reference_scores])
            if config.reference_candidates
            else None
        ),
        replay=replay,
        measure=measure if rules.needs_model else None,
    )
    for reason, count in summary["dropped"].items():
        print(f"dropped {count}: {reason}")
    print(f"{summary['pairs']} pairs: {config.output}")
