"""The stages of a round as commands of their own, so that each can run where its hardware is.

    fastdpo sample --model POLICY --prompts prompts.jsonl --output_dir r1/candidates
    fastdpo score  --candidates r1/candidates --scorer REWARD_MODEL --output_dir r1/scores
    fastdpo pair   --candidates r1/candidates --scores '[r1/scores]' --output r1/pairs.jsonl
    accelerate launch -m fastdpo.cli train --model POLICY --dataset r1/pairs.jsonl --output_dir r1

They take and leave the files of `fastdpo iterate`, and go on where they were stopped like it. The
options of a command are those of its stage, and what the stage is given.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastdpo.cli.commands import quiet_loading, to_talk
from fastdpo.cli.datasets import has_tokens, is_first, read_examples
from fastdpo.cli.training import TrainingPage
from fastdpo.data.clock import KEY, now, rendering_at
from fastdpo.data.records import STRING_PROMPTS, PairRow
from fastdpo.data.rows import preference_rows, prompt_rows, read_rows
from fastdpo.errors import ConfigError, require, require_used
from fastdpo.model.load import check_start, load_causal_lm, load_tokenizer, stop_ids
from fastdpo.pair import filters
from fastdpo.pair.config import PairConfig
from fastdpo.pair.offline import offline_pairs
from fastdpo.pair.stage import pair
from fastdpo.rounds.work import response_lengths
from fastdpo.sample.config import SampleConfig
from fastdpo.sample.stage import open_sampler, sample
from fastdpo.score.config import ScoreConfig
from fastdpo.score.load import uses
from fastdpo.score.stage import score
from fastdpo.storage import locked, read_json, write_json_atomic
from fastdpo.train.config import EvalConfig, TrainConfig, check_control
from fastdpo.train.control import LengthController
from fastdpo.train.evaluate import BEST
from fastdpo.train.launch import joined
from fastdpo.train.trainer import train

Stage = TypeVar("Stage", SampleConfig, PairConfig)
RENDERED = "rendered.json"  # when the rows were rendered, where a template asked for the time


@dataclass(frozen=True, kw_only=True)
class SampleCommand(SampleConfig):
    """Sample responses to prompts.

    Attributes:
        model: the policy, a folder or hub name in Hugging Face format.
        prompts: file or hub name of rows with a ``prompt`` (text or messages).
        output_dir: gets the candidates, in parts; resumed if it exists.
        chat_template: file with a Jinja chat template instead of the model's own.
        string_prompts: a prompt that is a string is a message of the user where the model has a
            chat template ("chat"), or text without one ("text").
        max_prompts: take only this many, from the first on.
        max_length: tokens of prompt and response; null leaves it to the model.
        round_index: another round draws other random numbers.
    """

    model: str
    prompts: str
    output_dir: str = "candidates"
    chat_template: str | None = None
    string_prompts: str = "chat"
    max_prompts: int | None = None
    max_length: int | None = None
    round_index: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_string_prompts(self)
        require(self, "max_prompts", self.max_prompts is None or self.max_prompts >= 1, ">= 1")
        room = self.max_length is None or self.max_length > self.max_new_tokens
        require(self, "max_length", room, f"> max_new_tokens={self.max_new_tokens}")


@dataclass(frozen=True, kw_only=True)
class ScoreCommand(ScoreConfig):
    """Score candidates by one scorer.

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
        super().__post_init__()
        if len(self.scorers) != 1:
            raise ConfigError(
                f"scorer={self.scorer} must be one scorer; run the command for each, with an "
                "output_dir of its own, and give all of them to fastdpo pair"
            )
        self.check_used(self.scorers)
        needs = "policy" in uses(self.scorers[0])
        require_used(self, "policy", needs, "scorer be implicit or likelihood")


@dataclass(frozen=True, kw_only=True)
class PairCommand(PairConfig):
    """Make pairs of scored candidates.

    Attributes:
        candidates: folder that ``fastdpo sample`` wrote.
        scores: folders that ``fastdpo score`` wrote, one for each scorer.
        output: a .jsonl file for the pairs; its summary lies beside it.
        previous_scores: for ``consistency``, scores of the same candidates by the round before.
        reference_candidates, reference_scores: for ``transform_reference: start``, what the model
            before training gave to the same prompts, and its scores, a folder for each scorer.
        model: for ``ches_keep``, ``max_difficulty`` and ``replay``, the policy that is trained.
        chat_template: for ``replay``, file with a Jinja chat template instead of the model's own.
        string_prompts: for ``replay``, a prompt that is a string is a message of the user where the
            model has a chat template ("chat"), or text without one ("text"), as in sampling.
        max_length: offline pairs with a longer side are left out.
        max_tokens: tokens that are measured at a time.
        bf16: measure in bf16 under autocast.
    """

    candidates: str
    scores: list[str]
    output: str = "pairs.jsonl"
    previous_scores: list[str] = field(default_factory=list)
    reference_candidates: str | None = None
    reference_scores: list[str] = field(default_factory=list)
    model: str | None = None
    chat_template: str | None = None
    string_prompts: str = "chat"
    max_length: int = 1024
    max_tokens: int = 4096
    bf16: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "scores", bool(self.scores), "at least one folder")
        _check_string_prompts(self)
        compares = self.consistency != "none"
        if compares and len(self.previous_scores) != len(self.scores):
            raise ConfigError(
                f"consistency={self.consistency} needs previous_scores, as many folders as scores, "
                f"not {self.previous_scores}"
            )
        self.check_scorers(len(self.scores), offline=False)
        refers = self.transform_reference == "start"
        if {self.reference_candidates is not None, bool(self.reference_scores)} != {refers}:
            raise ConfigError(
                f"transform_reference={self.transform_reference} with "
                f"reference_candidates={self.reference_candidates} and "
                f"reference_scores={self.reference_scores}: give start and both, or none"
            )
        if self.fresh_threshold is not None:
            raise ConfigError("fresh_threshold needs scored rounds; use fastdpo iterate")
        measures, replays = self.needs_model, self.replay is not None
        if (measures or replays) and self.model is None:
            raise ConfigError("ches_keep, max_difficulty and replay need model, the policy")
        for name, used, otherwise in (
            ("drop_ties", self.makes_lists, "rule be listwise: the others pair no tie"),
            ("previous_scores", compares, "consistency be given"),
            ("model", measures or replays, "ches_keep, max_difficulty or replay be given"),
            ("max_length", replays, "replay be given"),
            ("chat_template", replays, "replay be given"),
            ("string_prompts", replays, "replay be given"),
            ("max_tokens", measures, "ches_keep or max_difficulty be given"),
            ("bf16", measures, "ches_keep or max_difficulty be given"),
        ):
            require_used(self, name, used, otherwise)


@dataclass(kw_only=True)
class TrainCommand(TrainConfig, EvalConfig):
    """Train on a preference dataset.

    Attributes:
        model: start and reference, a folder or hub name in Hugging Face format.
        dataset: file (.jsonl, .json, .parquet, .csv), folder or hub name, of pairs in TRL's
            preference formats, of lists (``prompt``, ``responses``, ``scores`` or ``ranks``) or of
            single responses (``prompt``, ``completion``, ``label``), as ``loss_type`` takes them
            (see the README of ``fastdpo/data``); or what ``fastdpo pair`` wrote, whose tokens are
            taken as they are.
        split: of a hub dataset or a folder with several; by default train.
        eval_dataset: pairs to evaluate on in training, as ``dataset``; they are not trained on.
        eval_split: of ``eval_dataset``; by default test, where it has several.
        chat_template: file with a Jinja chat template instead of the model's own; it is saved with
            the policy.
        string_prompts: a prompt that is a string is text without a template, as in TRL ("text"), or
            a message of the user and its responses the assistant's, as in sampling ("chat").
        prompt_in_likelihood: score the tokens of the prompts too, and count them in the lengths, as
            where both responses of a pair have a prompt of their own (DOVE).
        from_first_difference: score the responses of a pair from the first token in which they
            differ; what both begin with belongs to the prompt.
        reference: folder or hub name of another reference than the start.
        output_dir: folder of the run; resumed if it exists.
        candidates: for alpha=auto, the samples that the pairs are from, a folder of
            ``fastdpo sample``; without it the length is held where it is.
        control: for alpha=auto, ``control.json`` of the round before, to hold the same target.
    """

    model: str
    dataset: str
    split: str | None = None
    eval_dataset: str | None = None
    eval_split: str | None = None
    chat_template: str | None = None
    string_prompts: str = "text"
    prompt_in_likelihood: bool = False
    from_first_difference: bool = False
    reference: str | None = None
    output_dir: str = "runs/train"
    candidates: str | None = None
    control: str | None = None

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        EvalConfig.__post_init__(self)
        for name in ("eval_split", "eval_steps", "load_best_model_at_end"):
            evaluates = self.eval_dataset is not None
            require_used(self, name, evaluates, "eval_dataset be given, the pairs to evaluate on")
        _check_string_prompts(self)
        apart = not (self.prompt_in_likelihood and self.from_first_difference)
        require(self, "from_first_difference", apart, "left out with prompt_in_likelihood")
        apart = not (self.prompt_in_likelihood and self.objective.needs_prompt)
        other = f"left out with loss_type={self.loss_type}, which scores the prompt itself"
        require(self, "prompt_in_likelihood", apart, other)
        whole = self.objective.shift_is != "kl"
        for name in ("prompt_in_likelihood", "from_first_difference"):
            other = (
                f"left out with loss_type={self.loss_type}, which estimates a KL from each prompt "
                "with the completion of another: it needs prompts and completions as they are"
            )
            require(self, name, whole or not getattr(self, name), other)
        check_control(self, self.reference)
        for name in ("candidates", "control"):
            require_used(self, name, self.alpha == "auto", "alpha be auto")


def _check_string_prompts(config: Any) -> None:
    known = config.string_prompts in STRING_PROMPTS
    require(config, "string_prompts", known, f"one of {', '.join(STRING_PROMPTS)}")


def _stage(config: Any, kind: type[Stage]) -> Stage:
    """The options of a command's stage alone, which is what its files say of it."""
    return kind(**{field.name: getattr(config, field.name) for field in fields(kind)})  # type: ignore[arg-type]


def run_sample(config: SampleCommand) -> None:
    rows = prompt_rows(read_rows(config.prompts))[: config.max_prompts]
    tokenizer = load_tokenizer(config.model, config.chat_template)
    out, settings = Path(config.output_dir), _stage(config, SampleConfig)
    longest, log = config.max_length, out / "sampler.log"
    with (
        locked(out),
        open_sampler(config.model, tokenizer, settings, max_length=longest, log_path=log) as source,
    ):
        sample(
            source, tokenizer, rows, settings, out, round_index=config.round_index,
            string_prompts=config.string_prompts,
        )  # fmt: skip
    drawn = read_json(path) if (path := out / "throughput.json").is_file() else {}
    if drawn.get("truncated", 0) > drawn.get("samples", 0) / 2:
        print(
            f"{drawn['truncated']} of {drawn['samples']} responses were cut off at max_new_tokens="
            f"{config.max_new_tokens}; a larger one lets more of them end"
        )
    print(f"candidates: {out}")


def run_score(config: ScoreCommand) -> None:
    out = Path(config.output_dir)
    scorer = config.load(config.scorers[0], config.policy, config.previous_model)
    with locked(out):
        score(scorer, Path(config.candidates), out)
    print(f"scores: {out}")


def run_pair(config: PairCommand) -> None:
    replay: list[PairRow] = []
    if config.replay is not None:
        tokenizer = load_tokenizer(str(config.model), config.chat_template)
        replay, dropped = offline_pairs(
            preference_rows(read_rows(config.replay)),
            tokenizer,
            max_length=config.max_length,
            stop_ids=stop_ids(str(config.model), tokenizer),
            string_prompts=config.string_prompts,
        )
        for reason, count in dropped.items():
            print(f"offline pairs dropped, {count}: {reason}")

    def measure(pairs: list[Any]) -> Any:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_causal_lm(str(config.model)).to(device)
        return filters.measure(model, pairs, max_tokens=config.max_tokens, bf16=config.bf16)

    references = None
    if config.reference_candidates is not None:
        references = Path(config.reference_candidates), list(map(Path, config.reference_scores))
    summary = pair(
        Path(config.candidates),
        list(map(Path, config.scores)),
        Path(config.output),
        _stage(config, PairConfig),
        previous_scores=list(map(Path, config.previous_scores)),
        reference_scores=references,
        replay=replay,
        measure=measure if config.needs_model else None,
    )
    for reason, count in summary["dropped"].items():
        print(f"dropped {count}: {reason}")
    what = "lists" if config.makes_lists else "pairs"
    print(f"{summary[what]} {what}: {config.output}")


def run_train(config: TrainCommand) -> None:
    quiet_loading()
    check_start(config.model)
    if config.reference is not None:
        check_start(config.reference, option="reference")
    tokenizer = load_tokenizer(config.model, config.chat_template)
    out, first = Path(config.output_dir), is_first()
    with rendering_at(_rendered_at(config, out / RENDERED)) as clock:
        given = {"dataset": read_rows(config.dataset, config.split)}
        if config.eval_dataset is not None:
            given["eval_dataset"] = read_rows(
                config.eval_dataset, config.eval_split, default="test", option="eval_split"
            )
        texts = not all(map(has_tokens, given.values()))
        require_used(config, "string_prompts", texts, f"dataset={config.dataset} have texts")
        found, *others = (read_examples(config, *each, tokenizer) for each in given.items())
        held = others[0].examples if others else []
    if out.exists() and not out.is_dir():
        raise ConfigError(f"output_dir={out} is a file; name a folder")
    control = (
        LengthController.from_dict(read_json(Path(config.control))) if config.control else None
    )
    lengths = response_lengths(Path(config.candidates)) if config.candidates else None
    shown = TrainingPage(config, found, held)
    with locked(out) if first else nullcontext():
        if first and clock.read:
            write_json_atomic(out / RENDERED, {KEY: clock.time})
        metrics = train(
            config.model, tokenizer, found.examples, config, out, reference=config.reference,
            control=control, lengths=lengths, eval_pairs=held, evaluation=config,
            on_step=shown.step if first else None,
        )  # fmt: skip
        if first:
            page = shown.finish(metrics)
    if first:
        for evaluated in (False, True) if held else (False,):
            names = [name for name in metrics if name.startswith("eval_") == evaluated]
            print("  ".join(f"{name} {metrics[name]:.4g}" for name in names))
        print(f"report: {page}")
        print(f"policy: {out / 'policy'}{_best(out) if config.load_best_model_at_end else ''}")
        print(to_talk(out / "policy", config))


def _best(out: Path) -> str:
    """Which step the policy is of."""
    best = read_json(out / BEST)
    return (
        f", after step {best['best_global_step']} of {best['global_step']}, the best "
        f"{best['metric_for_best_model']}: {best['best_metric']:.4g}"
    )


def _rendered_at(config: TrainConfig, path: Path) -> str:
    """When the run's rows were rendered first, now if they were not; alike on all processes."""
    from accelerate.utils import broadcast_object_list

    time = [read_json(path)[KEY] if path.is_file() else now()]
    joined(offload_params=config.offload_params)
    broadcast_object_list(time)
    return time[0]
