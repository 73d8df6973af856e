"""The outer loop: sample, score, pair, train, make the policy the next reference, repeat.

    OUT/state.json                 the config and the stages done
    OUT/round-00/eval/             the start, on held-out prompts
    OUT/round-01/candidates/       responses, in parts
    OUT/round-01/scores/           a score for each
    OUT/round-01/pairs.jsonl       best and worst of each prompt, and pairs.summary.json
    OUT/round-01/{ref_logps,checkpoint,metrics,policy}/
    OUT/round-01/eval/             the new policy, on held-out prompts
    OUT/round-01/summary.json      the row of the report

Every stage reads the files of the one before and writes its own under a temporary name first.
Killed anywhere, the same command goes on with the unfinished part of the stage it was in.
"""

import gc
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastdpo import report
from fastdpo.data import DataError, PromptRow, prompt_rows, read_rows, render_prompt
from fastdpo.models import load_causal_lm, load_tokenizer
from fastdpo.pairing import load_pairs, pair
from fastdpo.sampling import SamplingConfig, sample
from fastdpo.scoring import Scorer, load_scorer, score
from fastdpo.storage import read_json, read_parts, write_json_atomic
from fastdpo.trainer import ConfigError, TrainingConfig, check_model, require, train


@dataclass(kw_only=True)
class IterateConfig(TrainingConfig):
    """Options of an iterative run; those of training are explained in `TrainingConfig`.

    Attributes:
        model: start of the first round, a folder or hub name in Hugging Face format.
        prompts: file or hub name of rows with a ``prompt`` (text or messages).
        scorer: ``module:function`` or a sequence-classification reward model.
        output_dir: folder of the run; resumed if it exists.
        rounds: rounds in all; raise it to go on from a finished run.
        heldout: prompts kept out of training, on which every policy is evaluated.
        max_prompts: use only this many prompts for training.
        num_samples: responses sampled for a prompt.
        max_new_tokens: tokens of a response.
        temperature, top_p: of sampling.
        batch_prompts: prompts sampled at a time, each with ``num_samples`` responses.
        eval_samples: responses for a held-out prompt, at the same temperature.
        min_gap: best and worst must differ by more than this in score.
        sample_dtype: dtype of the model that samples.
    """

    model: str
    prompts: str
    scorer: str = "fastdpo.scoring:plain_language"
    output_dir: str = "runs/iterate"
    rounds: int = 3
    heldout: int = 32
    max_prompts: int | None = None
    num_samples: int = 4
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    batch_prompts: int = 8
    eval_samples: int = 2
    min_gap: float = 0.0
    sample_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "eval_samples"):
            require(self, name, getattr(self, name) >= 1, ">= 1")
        require(self, "heldout", self.heldout >= 0, ">= 0")
        require(self, "min_gap", self.min_gap >= 0, ">= 0")
        require(self, "num_samples", self.num_samples >= 2, ">= 2, to have a best and a worst")
        require(self, "temperature", self.temperature > 0, "> 0, or all samples are the same")
        require(self, "max_prompts", (self.max_prompts or 1) >= 1, ">= 1")
        require(
            self,
            "max_new_tokens",
            1 <= self.max_new_tokens < self.max_length,
            f">= 1 and < max_length = {self.max_length}, so that sampled responses are whole",
        )
        dtypes = ("float32", "bfloat16", "float16")
        require(self, "sample_dtype", self.sample_dtype in dtypes, f"one of {', '.join(dtypes)}")
        try:
            self.sampling()
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def sampling(self) -> SamplingConfig:
        return SamplingConfig(
            num_samples=self.num_samples,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            batch_prompts=self.batch_prompts,
            seed=self.seed,
        )


def iterate(config: IterateConfig, *, progress: bool = True) -> list[dict[str, Any]]:
    """Run all rounds and return the report's rows.

    Raises:
        ConfigError: the folder belongs to a run with other options.
        DataError: prompts, samples or scores are unusable; says which row and why.
        ModelError: a model cannot be loaded or trained.
    """
    return _Run(config, progress).run()


class _Run:
    def __init__(self, config: IterateConfig, progress: bool) -> None:
        self.config, self.progress = config, progress
        self.out = Path(config.output_dir)
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"output_dir={self.out} is a file; name a folder")
        self._scorer()
        self.tokenizer = load_tokenizer(config.model)
        self.train_prompts, self.heldout = self._prompts()
        if not (self.out / "state.json").exists():
            check_model(config.model, self.tokenizer, config)
        self.out.mkdir(parents=True, exist_ok=True)
        self.state_path = self.out / "state.json"
        self.done: list[str] = self._open_state()

    def run(self) -> list[dict[str, Any]]:
        policy = self.config.model
        self._evaluate(0, policy)
        for index in range(1, self.config.rounds + 1):
            policy = self._round(index, policy)
            self._evaluate(index, policy)
        return report.summarize(self.out)

    def _prompts(self) -> tuple[list[PromptRow], list[PromptRow]]:
        """Training and held-out prompts, split by the seed."""
        config = self.config
        rows = prompt_rows(read_rows(config.prompts))
        if len(rows) <= config.heldout:
            raise ConfigError(
                f"heldout={config.heldout} must be < the {len(rows)} prompts of {config.prompts}"
            )
        room = config.max_length - config.max_new_tokens
        for row in rows:
            ids = render_prompt(
                row.prompt, self.tokenizer, row.tools, row.chat_template_kwargs, as_chat=True
            )
            if len(ids) > room:
                raise DataError(
                    f"{row.where}: the prompt has {len(ids)} tokens, but max_length - "
                    f"max_new_tokens leaves {room}; raise max_length or drop the row"
                )
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(rows), generator=generator).tolist()
        held = [rows[i] for i in sorted(order[: config.heldout])]
        kept = [rows[i] for i in sorted(order[config.heldout :])]
        return kept[: config.max_prompts], held

    def _scorer(self) -> Scorer:
        """The scorer, loaded for each stage that uses it, so that none lies beside a policy."""
        try:
            return load_scorer(self.config.scorer)
        except ValueError as error:
            raise ConfigError(f"scorer={self.config.scorer}: {error}") from error

    def _state(self) -> dict[str, Any]:
        """What decides a run, and what is done of it."""
        digest = hashlib.sha256()
        for row in [*self.train_prompts, None, *self.heldout]:
            digest.update(json.dumps(row and [row.prompt, row.tools]).encode())
        config = {**asdict(self.config), "content of prompts": digest.hexdigest()}
        return {"config": config, "done": self.done}

    def _open_state(self) -> list[str]:
        self.done = []
        now = self._state()
        if not self.state_path.exists():
            write_json_atomic(self.state_path, now)
            return []
        state = read_json(self.state_path)
        if not isinstance(state, dict) or not {"config", "done"} <= state.keys():
            raise DataError(f"{self.state_path} is not the state of a run; remove {self.out}")
        for name, value in now["config"].items():
            before = state["config"].get(name)
            if name not in {"rounds", "output_dir"} and before != value:
                raise ConfigError(
                    f"{self.out} holds a run with {name}={before}, not {value}; give the same "
                    "options to go on, or another output_dir to start anew"
                )
        return state["done"]

    def _stage(self, name: str, work: Callable[[], None]) -> None:
        """Run a stage unless it is done, and note that it is."""
        if name in self.done:
            return
        work()
        self.done.append(name)
        write_json_atomic(self.state_path, self._state())

    def _round(self, index: int, policy: str) -> str:
        config, folder = self.config, self.out / f"round-{index:02d}"
        candidates, scores = folder / "candidates", folder / "scores"
        pairs = folder / "pairs.jsonl"
        sampling, prompts = config.sampling(), self.train_prompts

        def do_train() -> None:
            metrics = train(
                policy, self.tokenizer, load_pairs(pairs), config, folder, progress=self.progress
            )
            write_json_atomic(folder / "train.json", metrics)

        def do_pair() -> None:
            summary = pair(candidates, scores, pairs, min_gap=config.min_gap)
            dropped = "".join(f", {n} dropped: {why}" for why, n in summary["dropped"].items())
            print(f"round {index}: {summary['pairs']} pairs{dropped}")

        self._stage(
            f"round-{index:02d}/sample",
            lambda: self._sample(policy, prompts, sampling, candidates, index),
        )
        self._stage(
            f"round-{index:02d}/score",
            lambda: score(self._scorer(), candidates, scores, progress=self.progress),
        )
        self._stage(f"round-{index:02d}/pair", do_pair)
        self._stage(f"round-{index:02d}/train", do_train)
        return str(folder / "policy")

    def _sample(
        self,
        policy: str,
        prompts: list[PromptRow],
        sampling: SamplingConfig,
        folder: Path,
        index: int,
    ) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_causal_lm(policy, dtype=getattr(torch, self.config.sample_dtype)).to(device)
        sample(
            model.eval(),
            self.tokenizer,
            prompts,
            sampling,
            folder,
            round_index=index,
            progress=self.progress,
        )
        del model
        gc.collect()

    def _evaluate(self, index: int, policy: str) -> None:
        """Score the policy on held-out prompts and write the round's row of the report."""
        folder = self.out / f"round-{index:02d}"
        if self.heldout:
            settings = replace(
                self.config.sampling(),
                num_samples=self.config.eval_samples,
                seed=self.config.seed + 1,
            )
            candidates, scores = folder / "eval" / "candidates", folder / "eval" / "scores"
            self._stage(
                f"round-{index:02d}/eval-sample",
                lambda: self._sample(policy, self.heldout, settings, candidates, index),
            )
            self._stage(
                f"round-{index:02d}/eval-score",
                lambda: score(self._scorer(), candidates, scores, progress=self.progress),
            )
        self._stage(f"round-{index:02d}/report", lambda: self._summarize(index, folder))

    def _summarize(self, index: int, folder: Path) -> None:
        row: dict[str, Any] = {"round": index}
        if self.heldout:
            row |= _heldout_row(folder / "eval")
        if index:
            row |= read_json(folder / "train.json")
            summary = read_json(folder / "pairs.summary.json")
            row |= {"pairs": summary["pairs"], "dropped": summary["dropped"]}
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / "summary.json", row)
        rows = report.summarize(self.out)
        title = f"{self.config.scorer}, beta={self.config.beta:g}, alpha={self.config.alpha:g}"
        report.plot(rows, self.out / "rounds.png", title=title)


def _heldout_row(folder: Path) -> dict[str, float]:
    """Mean score and length of held-out responses; standard errors are over prompts."""
    means = report.prompt_means(folder)
    spread = means.std(0, correction=1) / math.sqrt(len(means)) if len(means) > 1 else means[0] * 0
    candidates = read_parts(folder / "candidates")
    truncated = sum(row["finish_reason"] == "length" for row in candidates) / len(candidates)
    return {
        "score": means[:, 0].mean().item(),
        "score_se": spread[0].item(),
        "length": means[:, 1].mean().item(),
        "length_se": spread[1].item(),
        "truncated": truncated,
    }
