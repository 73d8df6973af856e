"""The outer loop: sample, score, pair, train, make the policy the next start, repeat.

    OUT/state.json                 the config and the stages done
    OUT/offline/                   offline pairs to replay, and their scores
    OUT/round-00/eval/             the start, on held-out prompts
    OUT/round-01/candidates/       responses, in parts
    OUT/round-01/scores/           a score for each; scores-1, scores-2, ... of several scorers
    OUT/round-01/offline/          a response to each offline prompt, for fresh_threshold
    OUT/round-01/pairs.jsonl       what training takes, and pairs.summary.json
    OUT/round-01/{ref_logps,checkpoint,metrics,policy}/
    OUT/round-01/stage-1/          the same for each stage of a curriculum
    OUT/round-01/reference/        a moving average of the policies, where that is the reference
    OUT/round-01/extrapolated/     the next start, where the policy is not
    OUT/round-01/eval/             the next start, on held-out prompts
    OUT/round-01/summary.json      the row of the report

Every stage reads the files of the one before and writes its own under a temporary name first.
Killed anywhere, the same command goes on with the unfinished part of the stage it was in.
"""

import gc
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from fastdpo.data.clock import KEY, Clock, rendering_at
from fastdpo.data.records import PreferenceRow, Prompt, prompt_key
from fastdpo.data.rendering import render_prompt
from fastdpo.data.rows import preference_rows, prompt_rows, read_rows
from fastdpo.errors import ConfigError, DataError, require, require_used
from fastdpo.model.load import check_start, combine, load_causal_lm, load_tokenizer, stop_ids
from fastdpo.pair import filters, offline
from fastdpo.pair.stage import check_votes, load_pairs, pair, split_stages
from fastdpo.report import summary as report
from fastdpo.rounds.heldout import against_start, heldout_row, kl_to_start
from fastdpo.rounds.options import (
    PairingOptions,
    SamplingOptions,
    ScoringOptions,
    check_address,
    dtype_of,
)
from fastdpo.sample.samplers import SamplingConfig
from fastdpo.sample.stage import open_sampler, sample
from fastdpo.score.stage import Scorer, check_columns, score
from fastdpo.storage import (
    check_directory,
    file_digest,
    list_parts,
    locked,
    read_json,
    read_parts,
    write_json_atomic,
)
from fastdpo.train.control import LengthController
from fastdpo.train.trainer import CONTROL, FREE, TrainingConfig, check_control, check_model, train

# What does not change what a run makes of its prompts.
_FREE = {"rounds", "output_dir", "server_url", "server_command", "server_timeout",
         "server_api_key_env", "scorer_timeout", "scorer_retries", "scorer_concurrency",
         "scorer_api_key_env", "scorer_batch_size", *FREE}  # fmt: skip
# What nothing depends on before the first pairs, or the first step.
_PAIRING = {field.name for field in fields(PairingOptions)}
_TRAINING = {field.name for field in fields(TrainingConfig)} - {"seed", "max_length", "overlong"}
_OWN_POLICIES = ("round", "average")


@dataclass(kw_only=True)
class IterateConfig(TrainingConfig, SamplingOptions, ScoringOptions, PairingOptions):
    """Options of an iterative run; those of training are explained in `TrainingConfig`, those of
    the stages before it in `fastdpo.rounds.options`.

    Attributes:
        model: start of the first round, a folder or hub name in Hugging Face format.
        prompts: file or hub name of rows with a ``prompt`` (text or messages).
        output_dir: folder of the run; resumed if it exists.
        rounds: rounds in all; raise it to go on from a finished run.
        heldout: prompts kept out of training, on which every policy is evaluated.
        max_prompts: use only this many prompts for training.
        eval_samples: responses for a held-out prompt, at the same temperature.
        eval_scorer: scorer of held-out responses; by default the first of ``scorer``.
        chat_template: file with a Jinja chat template instead of the model's own; it is saved with
            the policies.
        reference: of a round: "round", the policy at its start; "average", a moving average of
            these; or a folder or hub name, the same in all rounds.
        reference_decay: what the moving average keeps of itself a round.
        extrapolation: the next start is the policy and this much more of its change from the
            policy of the round before (accelerated preference optimization, arXiv 2410.06293).
        round_learning_rates, round_betas: of each round, the last one for those that follow;
            instead of ``learning_rate`` and ``beta``.
    """

    model: str
    prompts: str
    output_dir: str = "runs/iterate"
    rounds: int = 3
    heldout: int = 32
    max_prompts: int | None = None
    eval_samples: int = 2
    eval_scorer: str | None = None
    chat_template: str | None = None
    reference: str = "round"
    reference_decay: float = 0.5
    extrapolation: float = 0.0
    round_learning_rates: list[float] | None = None
    round_betas: list[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "eval_samples"):
            require(self, name, getattr(self, name) >= 1, ">= 1")
        for name in ("heldout", "extrapolation"):
            require(self, name, getattr(self, name) >= 0, ">= 0")
        require(self, "num_samples", self.num_samples >= 2, ">= 2, to have a best and a worst")
        several = self.num_samples > 2
        require_used(self, "pairing", several, "num_samples be > 2: two responses make one pair")
        for name in ("eval_samples", "eval_scorer"):
            require_used(self, name, self.heldout > 0, "heldout be > 0")
        averaged = self.reference == "average"
        require_used(self, "reference_decay", averaged, "reference be average")
        for name, of_rounds in (
            ("learning_rate", "round_learning_rates"), ("beta", "round_betas"),
        ):  # fmt: skip
            alone = getattr(self, of_rounds) is None
            require_used(self, name, alone, f"{of_rounds} be left out, which says it of all rounds")
        require(self, "temperature", self.temperature > 0, "> 0, or all samples are the same")
        require(self, "max_prompts", self.max_prompts is None or self.max_prompts >= 1, ">= 1")
        require(self, "reference_decay", 0 <= self.reference_decay <= 1, "in [0, 1]")
        for name in ("round_learning_rates", "round_betas"):
            values = getattr(self, name)
            positive = values is None or (values and all(0 < x < math.inf for x in values))
            require(self, name, positive, "a list of finite numbers > 0")
        require(
            self,
            "max_new_tokens",
            1 <= self.max_new_tokens < self.max_length,
            f">= 1 and < max_length = {self.max_length}, so that sampled responses are whole",
        )
        check_address("eval_scorer", self.eval_scorer or "")
        require(self, "scorer", bool(self.scorers) and all(self.scorers), "a scorer, or several")
        self.sampling(self.seed)
        self.remote()
        self.rules(self.seed)
        self.shaping(len(self.scorers))
        self._check_scorers()
        self._check_pairing()
        self.check_used(self.all_scorers, measured=self.heldout > 0)
        check_control(self, None if self.reference == "round" else self.reference)

    def _check_scorers(self) -> None:
        implicit = "implicit" in self.scorers
        if "likelihood" in self.all_scorers:
            raise ConfigError(
                "scorer=likelihood is how the first round of consistency ranks by previous_model, "
                "and not a scorer of iterate; use implicit, or fastdpo score"
            )
        if implicit and self.previous_model is None:
            raise ConfigError(
                "scorer=implicit needs previous_model, the model before the start: in the first "
                "round the reward is log pi(start) - log pi(previous_model)"
            )
        if self.heldout and self.evaluated_by == "implicit":
            raise ConfigError(
                "eval_scorer=implicit would be another function every round; name another "
                "eval_scorer, or set heldout=0"
            )
        if implicit and self.transform_reference == "start":
            raise ConfigError(
                "transform_reference=start compares scores of several rounds, but scorer=implicit "
                "is another function in each; leave one of them out"
            )
        if self.consistency != "none" and (self.scorers != ["implicit"] or self.length_penalty):
            raise ConfigError(
                f"consistency={self.consistency} compares the rankings of two policies, so it "
                "needs scorer=implicit and nothing beside it, no other scorer and no "
                "length_penalty: they do not change between rounds, or are on another scale than "
                "the mean log-probability that the first round compares with"
            )
        several = self.rules(self.seed).needs_several_scorers
        if several and len(self.scorers) < 2:
            raise ConfigError(
                f"flip_share={self.flip_share} and soft_label={self.soft_label} need a list of at "
                f"least two scorers, not scorer={self.scorer}"
            )

    def _check_pairing(self) -> None:
        if self.pairing == "tree_siblings":
            raise ConfigError(
                "pairing=tree_siblings needs the candidates of a tree search, which iterate does "
                "not run; give them to fastdpo pair"
            )
        replays, rules = self.replay is not None, self.rules(self.seed)
        self.check_replay()
        try:
            check_votes(rules, self.shaping(len(self.scorers)), offline=replays)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if self.fresh_threshold is None:
            return
        if not replays:
            raise ConfigError(
                f"fresh_threshold={self.fresh_threshold} needs replay, the pairs that it filters"
            )
        for spec in self.scorers:
            if spec == "implicit" or spec.startswith("judge:"):
                raise ConfigError(
                    f"fresh_threshold compares scores of offline pairs with those of single fresh "
                    f"samples, which scorer={spec} does not give; use a reward model, an endpoint, "
                    "a function or answer"
                )

    @property
    def evaluated_by(self) -> str:
        return self.eval_scorer or self.scorers[0]

    @property
    def all_scorers(self) -> list[str]:
        """Scorers of samples, and of held-out responses where there are any."""
        return [*self.scorers, *([self.evaluated_by] if self.heldout else [])]

    @property
    def scores_offline(self) -> bool:
        """Whether offline pairs are compared with fresh samples, or voted on by the scorers."""
        votes = self.rules(0).needs_several_scorers
        return self.fresh_threshold is not None or votes

    def training(self, index: int) -> TrainingConfig:
        """Options of training in round ``index``, from 1."""

        def of_round(values: list[float] | None, usual: float) -> float:
            return values[min(index, len(values)) - 1] if values else usual

        values = {field.name: getattr(self, field.name) for field in fields(TrainingConfig)}
        values["learning_rate"] = of_round(self.round_learning_rates, self.learning_rate)
        values["beta"] = of_round(self.round_betas, self.beta)
        return TrainingConfig(**values)


def iterate(config: IterateConfig, *, progress: bool = True) -> list[dict[str, Any]]:
    """Run all rounds and return the report's rows.

    Raises:
        ConfigError: the folder belongs to a run with other options.
        DataError: prompts, samples or scores are unusable, files are damaged, or another process
            has the folder; says which and why.
        ModelError: a model cannot be loaded or trained.
    """
    out = Path(config.output_dir)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"output_dir={out} is a file; name a folder")
    state = out / "state.json"
    if not state.exists():
        _check_inputs(config)
    with locked(out):
        before = read_json(state) if state.exists() else None
        time = before.get(KEY) if isinstance(before, dict) else None
        with rendering_at(time) as clock:
            return _Run(config, progress, clock).run()


def _check_inputs(config: IterateConfig) -> None:
    """Refuse what would fail later, before a folder is made."""
    references = [] if config.reference in _OWN_POLICIES else [config.reference]
    for name in (*references, config.model):
        check_start(name)
    tokenizer = load_tokenizer(config.model, config.chat_template)
    prompts, held = split_prompts(config, tokenizer)
    replayed = [] if config.replay is None else preference_rows(read_rows(config.replay))
    offline_rows = replayed if config.scores_offline else []
    config.check_servers(config.all_scorers)
    for spec in dict.fromkeys(config.all_scorers):
        scorer = config.load(spec, config.model, config.previous_model)
        samples, evaluates = spec in config.scorers, spec == config.evaluated_by
        rows = [
            *(prompts if samples else []),
            *(held if evaluates else []),
            *(offline_rows if samples else []),
        ]
        check_columns(scorer, ((row.where, row.extra) for row in rows))
        del scorer
    for name in (*references, config.model):
        check_model(name, tokenizer, config, _tokens(prompts, replayed, held, config, tokenizer))
    release()


def _tokens(
    prompts: Sequence[Prompt],
    replay: Sequence[PreferenceRow],
    heldout: Sequence[Prompt],
    config: IterateConfig,
    tokenizer: Any,
) -> Iterator[tuple[str, list[int]]]:
    """The tokens that a run is given, each with its place; samples have those of the model."""
    yield "the tokenizer's end token", [tokenizer.eos_token_id]
    for row in (*prompts, *heldout):
        ids = render_prompt(
            row.prompt, tokenizer, row.tools, row.chat_template_kwargs, as_chat=True
        )
        yield row.where, ids
    if replay:
        pairs, _ = offline.offline_pairs(
            replay, tokenizer, max_length=config.max_length, exclude=heldout, progress=False
        )
        for pair in pairs:
            ids = pair["prompt_ids"] + pair["chosen_ids"] + pair["rejected_ids"]
            yield pair["prompt_row"].where, ids


def release() -> None:
    """Give back what models had on a GPU, before another process or a larger model wants it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def split_prompts(config: IterateConfig, tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts, split by the seed."""
    rows = prompt_rows(read_rows(config.prompts))
    if len(rows) <= config.heldout:
        raise ConfigError(
            f"heldout={config.heldout} must be < the {len(rows)} prompts of {config.prompts}"
        )
    rows = _that_fit(rows, config, tokenizer)
    if len(rows) <= config.heldout:
        raise ConfigError(
            f"heldout={config.heldout} must be < the {len(rows)} prompts that fit max_length"
        )
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    held = [rows[i] for i in sorted(order[: config.heldout])]
    known = {prompt_key(row.prompt) for row in held}
    kept = [rows[i] for i in sorted(order[config.heldout :])]
    fresh = [row for row in kept if prompt_key(row.prompt) not in known]
    if not fresh:
        raise ConfigError(f"all prompts of {config.prompts} are held out; give more, or heldout=0")
    if len(fresh) < len(kept):
        print(f"{len(kept) - len(fresh)} prompts are those of held-out rows, and left out")
    return fresh[: config.max_prompts], held


def _that_fit(rows: list[Prompt], config: IterateConfig, tokenizer: Any) -> list[Prompt]:
    """The rows whose prompts leave room for a response."""
    room, fitting = config.max_length - config.max_new_tokens, []
    for row in rows:
        ids = render_prompt(
            row.prompt, tokenizer, row.tools, row.chat_template_kwargs, as_chat=True
        )
        if len(ids) <= room:
            fitting.append(row)
        elif config.overlong != "drop":
            raise DataError(
                f"{row.where}: the prompt has {len(ids)} tokens, but max_length - "
                f"max_new_tokens leaves {room}; raise max_length, or leave such prompts out with "
                "overlong=drop"
            )
    if len(fitting) < len(rows):
        print(f"{len(rows) - len(fitting)} prompts of over {room} tokens are left out")
    return fitting


def _rendered_from(row: Prompt) -> str:
    """All that decides the tokens of a prompt."""
    return json.dumps([row.prompt, row.tools, row.chat_template_kwargs], sort_keys=True)


class _Run:
    def __init__(self, config: IterateConfig, progress: bool, clock: Clock) -> None:
        self.config, self.progress, self.clock = config, progress, clock
        self.out = Path(config.output_dir)
        self.tokenizer = load_tokenizer(config.model, config.chat_template)
        self.train_prompts, self.heldout = split_prompts(config, self.tokenizer)
        self.state_path = self.out / "state.json"
        self.done: list[str] = self._open_state()
        # What a stage left, to make it again where it is gone; and what was compared already.
        self.makers: dict[Path, tuple[Callable[[], None], list[Path]]] = {}
        self.checked: set[Path] = set()

    def run(self) -> list[dict[str, Any]]:
        self.config.check_servers(self._scorers_left())
        if self.config.replay_share:
            self._stage("offline", self._read_offline, makes=self.out / "offline" / "summary.json")
        start = self.config.model
        self._evaluate(0, start)
        for index in range(1, self.config.rounds + 1):
            start = self._round(index, start)
            self._evaluate(index, start)
        report.html(self.out)
        return report.summarize(self.out)

    def _scorers_left(self) -> list[str]:
        """Those of stages that are not done."""
        config, last = self.config, f"round-{self.config.rounds:02d}"
        answers = [f"{last}/offline-score"] if config.fresh_threshold is not None else []
        left = {f"{last}/score", *answers} - {*self.done}
        heldout = config.heldout and f"{last}/eval-score" not in self.done
        return [*(config.scorers if left else []), *([config.evaluated_by] if heldout else [])]

    # --- state -----------------------------------------------------------------------------------
    def _state(self) -> dict[str, Any]:
        """What decides a run, and what is done of it."""
        digest = hashlib.sha256()
        for row in [*self.train_prompts, None, *self.heldout]:
            digest.update(
                json.dumps(row and [_rendered_from(row), row.extra], default=str).encode()
            )
        config = {**asdict(self.config), "content of prompts": digest.hexdigest()}
        if self.config.replay is not None and Path(self.config.replay).is_file():
            config["content of replay"] = file_digest(Path(self.config.replay))
        template = json.dumps(self.tokenizer.chat_template)
        config["content of chat_template"] = hashlib.sha256(template.encode()).hexdigest()
        return {"config": config, "done": self.done, KEY: self.clock.time}

    def _open_state(self) -> list[str]:
        self.done = []
        now = self._state()
        if not self.state_path.exists():
            write_json_atomic(self.state_path, now, checksum=True)
            return []
        state = read_json(self.state_path)
        if not isinstance(state, dict) or not {"config", "done"} <= state.keys():
            raise DataError(f"{self.state_path} is not the state of a run; remove {self.out}")
        used = {name.rpartition("/")[2] for name in state["done"]}
        free = _FREE | (set() if "pair" in used else _PAIRING)
        free |= set() if "train" in used else _TRAINING
        for name, value in now["config"].items():
            before = state["config"].get(name)
            if name not in free and before != value:
                raise ConfigError(
                    f"{self.out} holds a run with {name}={before}, not {value}; give the same "
                    "options to go on, or another output_dir to start anew"
                )
        return state["done"]

    def _stage(
        self,
        name: str,
        work: Callable[[], None],
        *,
        makes: Path | list[Path],
        needs: list[Path] | None = None,
    ) -> None:
        """Run a stage unless it is done, and note that it is.

        What it needs is compared with its checksums before, and made again where it was removed;
        what no stage that is left needs may be removed for good.
        """
        needs = needs or []
        for path in [makes] if isinstance(makes, Path) else makes:
            self.makers[path] = work, needs
        if name in self.done:
            return
        self._provide(needs)
        work()
        release()
        self.done.append(name)
        write_json_atomic(self.state_path, self._state(), checksum=True)
        if name.endswith("/report"):  # which says what is done
            report.html(self.out)

    def _provide(self, needs: list[Path]) -> None:
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

    def _folder(self, index: int) -> Path:
        return self.out / f"round-{index:02d}"

    def _start_of(self, index: int) -> str:
        """The policy that round ``index`` starts from; round 0 from what was before the model."""
        if index < 1:
            return str(self.config.previous_model)
        if index == 1:
            return self.config.model
        name = "extrapolated" if self.config.extrapolation else "policy"
        return str(self._folder(index - 1) / name)

    # --- a round ---------------------------------------------------------------------------------
    def _round(self, index: int, start: str) -> str:
        config, folder, name = self.config, self._folder(index), f"round-{index:02d}"
        candidates, previous = folder / "candidates", self._before(index)
        scores, pairs = self._scores(folder), folder / "pairs.jsonl"
        implicit = [Path(start), Path(previous)] if "implicit" in config.scorers else []
        self._stage(
            f"{name}/sample",
            lambda: self._sample(
                start, self.train_prompts, config.sampling(config.seed), candidates, index
            ),
            makes=candidates,
            needs=[Path(start)],
        )
        self._stage(
            f"{name}/score",
            lambda: self._score(candidates, scores, start, previous),
            makes=scores,
            needs=[candidates, *implicit],
        )
        joined = [candidates, *scores]
        if config.consistency != "none":
            earlier, before = self._start_of(index - 1), folder / "scores-before"
            joined.append(before)
            self._stage(
                f"{name}/score-before",
                lambda: self._score_before(candidates, before, earlier),
                makes=before,
                needs=[candidates, Path(earlier), Path(previous)],
            )
        if config.fresh_threshold is not None:
            self._answer_offline(index, start, previous)
            offline_folders = [self._folder(i) / "offline" for i in range(1, index + 1)]
            joined += [y for x in offline_folders for y in (x / "candidates", *self._scores(x))]
        if self._refers(index):
            joined += [self._references()[0], *self._references()[1]]
        if config.reference == "average" and index > 1:
            self._average(index)
        reference = self._reference(index)
        models = [Path(start)] if reference is None else [Path(start), Path(reference)]
        self._stage(
            f"{name}/pair",
            lambda: self._pair(index),
            makes=pairs,
            needs=joined + (models if config.rules(0).needs_model else []),
        )
        self._stage(
            f"{name}/train",
            lambda: self._train(index, start),
            makes=[folder / "policy", folder / "train.json"],
            needs=[pairs, *models],
        )
        if config.extrapolation:
            self._stage(
                f"{name}/extrapolate",
                lambda: self._extrapolate(index),
                makes=folder / "extrapolated",
                needs=[Path(self._trained(index)), Path(self._trained(index - 1))],
            )
        return self._start_of(index + 1)

    def _trained(self, index: int) -> str:
        """What round ``index`` trained, before any extrapolation; the model for round 0."""
        return str(self._folder(index) / "policy") if index else self.config.model

    def _before(self, index: int) -> str:
        """What the implicit reward of round ``index`` compares its policy with: as in DICE the
        policy of the round before, or with consistency, as in CREAM, M0 in all rounds."""
        return self._start_of(0 if self.config.consistency != "none" else index - 1)

    def _sample(
        self,
        policy: str,
        prompts: list[Prompt],
        sampling: SamplingConfig,
        folder: Path,
        index: int,
    ) -> None:
        with open_sampler(
            policy,
            self.tokenizer,
            sampling,
            dtype=dtype_of(self.config),
            max_length=self.config.max_length,
            log_path=self.out / "sampler.log",
        ) as sampler:
            sample(
                sampler,
                self.tokenizer,
                prompts,
                sampling,
                folder,
                round_index=index,
                progress=self.progress,
            )

    def _scores(self, folder: Path) -> list[Path]:
        """A folder for each scorer."""
        count = len(self.config.scorers)
        return [folder / (f"scores-{i + 1}" if count > 1 else "scores") for i in range(count)]

    def _score(self, candidates: Path, folders: list[Path], policy: str, previous: str) -> None:
        """Score with each scorer in turn, loaded for it alone."""
        for spec, folder in zip(self.config.scorers, folders):
            scorer = self.config.load(spec, policy, previous)
            score(scorer, candidates, folder, progress=self.progress)
            del scorer
            release()

    def _score_before(self, candidates: Path, folder: Path, policy: str) -> None:
        """Score as the round before would, whose policy this is; see `filters.consistency`."""
        first = self._start_of(0)
        scorer = self.config.load("likelihood" if policy == first else "implicit", policy, first)
        score(scorer, candidates, folder, progress=self.progress)

    def _pair(self, index: int) -> None:
        config, folder = self.config, self._folder(index)
        rules = config.rules(config.seed + index)
        before = [] if config.consistency == "none" else [folder / "scores-before"]
        offline_rows, fresh = self._offline(index) if config.replay_share else ([], [])
        summary = pair(
            folder / "candidates",
            self._scores(folder),
            folder / "pairs.jsonl",
            pairing=rules,
            shaping=config.shaping(len(config.scorers)),
            previous_scores=before,
            reference_scores=self._references() if self._refers(index) else None,
            replay=offline_rows,
            fresh=fresh,
            measure=(lambda pairs: self._measure(index, pairs)) if rules.needs_model else None,
        )
        dropped = "".join(f", {n} dropped: {why}" for why, n in summary["dropped"].items())
        print(f"round {index}: {summary['pairs']} pairs{dropped}")

    def _refers(self, index: int) -> bool:
        """Whether scores are compared with the start's; in round 1 the samples are the start's."""
        return self.config.transform_reference == "start" and index > 1

    def _references(self) -> tuple[Path, list[Path]]:
        """Responses of the start to the same prompts, which are the first round's, and scores."""
        return self._folder(1) / "candidates", self._scores(self._folder(1))

    def _measure(self, index: int, pairs: list[Any]) -> Any:
        """CHES and difficulty of pairs under the round's reference."""
        config, policy = self.config, self._reference(index) or self._start_of(index)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_causal_lm(policy, dtype=getattr(torch, config.dtype)).to(device)
        return filters.measure(
            model,
            pairs,
            max_tokens=config.max_tokens,
            bf16=config.bf16,
            impl=config.impl,
            progress=self.progress,
        )

    def _train(self, index: int, start: str) -> None:
        """Train on the round's pairs, a stage of a curriculum after the other."""
        folder = self._folder(index)
        stages = split_stages(load_pairs(folder / "pairs.jsonl"))
        options: dict[str, Any] = {"reference": self._reference(index)}
        if self.config.alpha == "auto":
            if index > 1:  # without it, the lengths that the policy has by now would be the target
                before = read_json(self._folder(index - 1) / CONTROL)
                options["control"] = LengthController.from_dict(before)
            options["lengths"] = response_lengths(folder / "candidates")
        if len(stages) == 1:
            found = [self._train_on(stages[0], index, start, folder, options)]
        else:
            found = self._train_stages(stages, index, start, options)
        total = sum(len(stage) for stage in stages)
        metrics = {
            name: sum(row[name] * len(stage) for row, stage in zip(found, stages)) / total
            for name in found[0]
            if all(name in row for row in found)
        }
        for name in ("pairs_dropped", "pairs_truncated"):
            metrics[name] = sum(row[name] for row in found)
        write_json_atomic(folder / "train.json", metrics, checksum=True)

    def _train_stages(
        self, stages: list[list[Any]], index: int, start: str, options: dict[str, Any]
    ) -> list[dict[str, float]]:
        """Each stage starts from the one before, which is its reference too (Curry-DPO,
        arXiv 2403.07230), unless the run names another.
        """
        folder, found = self._folder(index), []
        for i, stage in enumerate(stages):
            place = folder / f"stage-{i + 1}"
            found.append(self._train_on(stage, index, start, place, options))
            start = str(place / "policy")
            if self.config.alpha == "auto":
                options["control"] = LengthController.from_dict(read_json(place / CONTROL))
                options["lengths"] = None
        last = folder / f"stage-{len(stages)}"
        if not (folder / "policy").exists():
            combine([str(last / "policy")], [1.0], self.tokenizer, folder / "policy")
        if self.config.alpha == "auto":
            write_json_atomic(folder / CONTROL, read_json(last / CONTROL), checksum=True)
        return found

    def _train_on(
        self, pairs: list[Any], index: int, start: str, folder: Path, options: dict[str, Any]
    ) -> dict[str, float]:
        config = self.config.training(index)
        return train(
            start, self.tokenizer, pairs, config, folder, progress=self.progress, **options
        )

    def _reference(self, index: int) -> str | None:
        """The reference of a round, None where it is the start of what is trained."""
        config = self.config
        if config.reference == "round" or (config.reference == "average" and index == 1):
            return None
        if config.reference != "average":
            return config.reference
        return str(self._folder(index) / "reference")

    def _average(self, index: int) -> None:
        """The moving average of the starts up to round ``index``, from 2."""
        config, path = self.config, self._folder(index) / "reference"
        before = self._folder(index - 1) / "reference" if index > 2 else Path(config.model)
        names, decay = [str(before), self._start_of(index)], config.reference_decay
        self._stage(
            f"round-{index:02d}/average",
            lambda: combine(names, [decay, 1 - decay], self.tokenizer, path),
            makes=path,
            needs=[Path(name) for name in names],
        )

    def _extrapolate(self, index: int) -> None:
        more = self.config.extrapolation
        names = [self._trained(index), self._trained(index - 1)]
        path = self._folder(index) / "extrapolated"
        combine(names, [1 + more, -more], self.tokenizer, path)

    # --- offline pairs ---------------------------------------------------------------------------
    def _offline_rows(self) -> tuple[list[Any], dict[str, int]]:
        rows = preference_rows(read_rows(str(self.config.replay)))
        fresh = self.config.fresh_threshold is not None
        return offline.offline_pairs(
            rows,
            self.tokenizer,
            max_length=self.config.max_length,
            exclude=self.heldout,
            max_new_tokens=self.config.max_new_tokens if fresh else None,
            stop_ids=stop_ids(self.config.model, self.tokenizer),
            progress=self.progress,
        )

    def _read_offline(self) -> None:
        """Tokenize the pairs to replay, and score them where their scores are used."""
        rows, dropped = self._offline_rows()
        folder = self.out / "offline"
        offline.write_candidates(rows, folder / "candidates")
        if self.config.scores_offline:
            previous = str(self.config.previous_model)
            scores = self._scores(folder)
            self._score(folder / "candidates", scores, self.config.model, previous)
        write_json_atomic(folder / "summary.json", {"pairs": len(rows), "dropped": dropped})

    def _answer_offline(self, index: int, start: str, previous: str) -> None:
        """One fresh response to each offline prompt, and its score."""
        name, folder = f"round-{index:02d}", self._folder(index) / "offline"
        rows, _ = self._offline_rows()
        prompts = offline.prompt_rows(rows)
        settings = replace(self.config.sampling(self.config.seed + 2), num_samples=1)
        candidates = folder / "candidates"
        self._stage(
            f"{name}/offline-sample",
            lambda: self._sample(start, prompts, settings, candidates, index),
            makes=candidates,
            needs=[Path(start)],
        )
        self._stage(
            f"{name}/offline-score",
            lambda: self._score(candidates, self._scores(folder), start, previous),
            makes=self._scores(folder),
            needs=[candidates],
        )

    def _offline(self, index: int) -> tuple[list[Any], list[dict[str, float]]]:
        """Offline pairs, and the scores of each round's fresh responses to their prompts."""
        config, folder = self.config, self.out / "offline"
        rows, _ = self._offline_rows()
        if not config.scores_offline:
            return rows, []
        weights = config.scorer_weights
        rows = offline.with_scores(rows, folder / "candidates", self._scores(folder), weights)
        if config.fresh_threshold is None:
            return rows, []
        rounds = [self._folder(i) / "offline" for i in range(1, index + 1)]
        return rows, [
            offline.fresh_scores(path / "candidates", self._scores(path), weights)
            for path in rounds
        ]

    # --- evaluation ------------------------------------------------------------------------------
    def _evaluate(self, index: int, policy: str) -> None:
        """Score the policy on held-out prompts and write the round's row of the report."""
        folder, config = self._folder(index), self.config
        needs = [folder / "train.json"] if index else []
        if self.heldout:
            settings = replace(config.sampling(config.seed + 1), num_samples=config.eval_samples)
            candidates, name = folder / "eval" / "candidates", f"round-{index:02d}"
            start = self._folder(0) / "eval"
            self._stage(
                f"{name}/eval-sample",
                lambda: self._sample(policy, self.heldout, settings, candidates, index),
                makes=candidates,
                needs=[Path(policy)],
            )
            self._stage(
                f"{name}/eval-score",
                lambda: self._score_heldout(folder),
                makes=folder / "eval" / "scores",
                needs=[candidates, start / "candidates"],
            )
            needs += [
                candidates,
                folder / "eval" / "scores",
                start / "candidates",
                start / "scores",
            ]
            if index:
                self._stage(
                    f"{name}/eval-kl",
                    lambda: self._measure_kl(policy, folder),
                    makes=folder / "eval" / "kl.json",
                    needs=[candidates, Path(policy)],
                )
                needs.append(folder / "eval" / "kl.json")
        self._stage(
            f"round-{index:02d}/report",
            lambda: self._summarize(index, folder),
            makes=folder / "summary.json",
            needs=needs,
        )

    def _score_heldout(self, folder: Path) -> None:
        scorer: Scorer = self.config.load(self.config.evaluated_by)
        if scorer.compare is not None:
            scorer = against_start(scorer, self._folder(0) / "eval" / "candidates")
        score(
            scorer, folder / "eval" / "candidates", folder / "eval" / "scores",
            progress=self.progress,
        )  # fmt: skip

    def _measure_kl(self, policy: str, folder: Path) -> None:
        found = kl_to_start(
            policy,
            self.config.model,
            folder / "eval" / "candidates",
            dtype=dtype_of(self.config),
            batch_size=self.config.scorer_batch_size,
        )
        write_json_atomic(folder / "eval" / "kl.json", found, checksum=True)

    def _summarize(self, index: int, folder: Path) -> None:
        row: dict[str, Any] = {"round": index}
        if self.heldout:
            row |= heldout_row(folder / "eval", self._folder(0) / "eval")
            row |= read_json(folder / "eval" / "kl.json") if index else {}
        if index:
            row |= read_json(folder / "train.json")
            summary = read_json(folder / "pairs.summary.json")
            row |= {"pairs": summary["pairs"], "dropped": summary["dropped"]}
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / "summary.json", row)
        rows = report.summarize(self.out)
        config = self.config
        title = f"{config.evaluated_by}, beta={config.beta:g}, alpha={config.alpha}"
        report.plot(rows, self.out / "rounds.png", title=title)


def is_whole(path: Path) -> bool:
    """Whether a file, a folder of weights, or all parts of a stage are there."""
    if not (path / "plan.json").is_file():
        return path.exists() and (path.is_file() or any(path.iterdir()))
    try:
        list_parts(path)
    except DataError:
        return False
    return True


def response_lengths(candidates: Path) -> list[list[int]]:
    """Tokens of each response, a list for each prompt."""
    found: dict[int, list[int]] = {}
    for row in read_parts(candidates):
        found.setdefault(row["prompt_index"], []).append(len(row["response_ids"]))
    return [found[i] for i in sorted(found)]
