"""The reward model of the length study: trained on preference pairs, its length bias measured."""

from __future__ import annotations

import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.data.records import Candidate, Scored, Text
from fastdpo.data.rendering import render_prompt
from fastdpo.data.rows import preference_rows, read_rows
from fastdpo.errors import ConfigError
from fastdpo.loss.gemm import has_native_bf16
from fastdpo.model.load import load_tokenizer, save_policy
from fastdpo.pair.rules import best_worst
from fastdpo.storage import (
    read_parts,
    write_json_atomic,
)
from fastdpo.train.control import neutral_alpha

from .rise import wilson
from .step_pairs import as_preference

HELD_OUT = 5  # every fifth prompt's pairs are kept from the reward model
DRAWS = 2000  # of the bootstrap


class Pair(NamedTuple):
    """A preference pair as messages; the responses continue the prompt."""

    prompt: list[dict[str, Any]]
    chosen: list[dict[str, Any]]
    rejected: list[dict[str, Any]]

    @property
    def sides(self) -> list[list[dict[str, Any]]]:
        return [self.prompt + self.chosen, self.prompt + self.rejected]


def read_preferences(datasets: list[str]) -> list[Pair]:
    """All pairs, as messages: what the reward model is trained on is what the scorer shows it."""
    found = []
    for dataset in datasets:
        rows = read_rows(dataset)
        found += preference_rows(replace(rows, rows=list(map(as_preference, rows.rows))))
    return [
        Pair(
            messages(row.prompt, "user"),
            messages(row.chosen, "assistant"),
            messages(row.rejected, "assistant"),
        )
        for row in found
    ]


def messages(text: Text, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def split(rows: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and pairs held out; those of one prompt are on one side."""
    prompts = list(dict.fromkeys(json.dumps(row.prompt) for row in rows))
    random.Random(0).shuffle(prompts)
    held = set(prompts[::HELD_OUT])
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for row in rows:
        sides[json.dumps(row.prompt) in held].append(row)
    return sides


def single_prompts(rows: list[Pair], tokenizer: Any, most: int, instruction: str = "") -> list[str]:
    """The distinct prompts of one user message, with the instruction, of at most so many tokens."""
    texts = [
        f"{row.prompt[0]['content']} {instruction}".strip()
        for row in rows
        if [message["role"] for message in row.prompt] == ["user"]
    ]
    return [
        text
        for text in dict.fromkeys(texts)
        if len(render_prompt(text, tokenizer, as_chat=True)) <= most
    ]


def train_reward(model: str, rows: list[Pair], out: Path, options: dict) -> None:
    """Train a reward model in a process of its own: TRL sets the precision of a whole process."""
    context = multiprocessing.get_context("spawn")
    pairs = [{**row._asdict(), "length": size_of(row)} for row in rows]
    worker = context.Process(target=reward_worker, args=(model, pairs, out, options))
    worker.start()
    worker.join()
    if worker.exitcode:
        raise RuntimeError(f"training the reward model failed (exit code {worker.exitcode})")


def size_of(row: Pair) -> int:
    """Characters of its longer side, to have pairs of one size in a batch."""
    return max(sum(len(str(message["content"])) for message in side) for side in row.sides)


def reward_worker(model: str, pairs: list[dict], out: Path, options: dict) -> None:
    tokenizer = load_tokenizer(model)
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    class Orphan(TrainerCallback):
        """Ends with the process that wants the model, however that one ends."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            parent = multiprocessing.parent_process()
            if parent is not None and not parent.is_alive():
                sys.exit(1)

    cuda = torch.cuda.is_available()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fastdpo-reward-") as scratch:
        trainer = RewardTrainer(
            model,
            args=RewardConfig(
                output_dir=scratch,
                num_train_epochs=options["epochs"],
                learning_rate=options["learning_rate"],
                per_device_train_batch_size=options["batch_size"],
                max_length=options["max_length"],
                train_sampling_strategy="group_by_length",
                remove_unused_columns=False,  # the length is used
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                bf16=fast_bf16(),
                gradient_checkpointing=False,
                use_cpu=not cuda,
                dataloader_pin_memory=cuda,
                report_to="none",
                save_strategy="no",
                logging_steps=10,
                seed=0,
            ),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            callbacks=[Orphan()],
        )
        trained = trainer.train()
    seconds = time.perf_counter() - started
    facts = {
        "pairs": len(trainer.train_dataset),  # type: ignore[arg-type]
        "too_long": len(pairs) - len(trainer.train_dataset),  # type: ignore[arg-type]
        "loss": trained.training_loss,
        "seconds": seconds,
        **options,
    }
    # The model comes last: where it is, it is whole.
    write_json_atomic(out.with_suffix(".json"), facts)
    save_policy(trainer.model, tokenizer, out)


def fast_bf16() -> bool:
    return torch.cuda.is_available() or has_native_bf16()


def pair_rewards(scorer: Any, tokenizer: Any, rows: list[Pair]) -> Tensor:
    """Reward and length in tokens of both responses, (pairs, 2, 2) fp64; chosen first."""
    found = []
    for name in ("chosen", "rejected"):
        sides = [getattr(row, name) for row in rows]
        texts = [side[-1]["content"] for side in sides]
        rewards = scorer([row.prompt + side[:-1] for row, side in zip(rows, sides)], texts)
        lengths = [
            len(tokenizer(text=text, add_special_tokens=False)["input_ids"]) for text in texts
        ]
        found.append(torch.tensor([rewards, lengths], dtype=torch.float64).T)
    return torch.stack(found, 1)


def whole_groups(rows: list[dict[str, Any]]) -> list[Tensor]:
    """Reward and length of each prompt's responses that were not cut off, (responses, 2) fp64.

    Prompts with fewer than two of them are left out.
    """
    groups: dict[int, list[list[float]]] = {}
    for row in rows:
        if row["finish_reason"] != "length":
            value = [row["score"], float(len(row["response_ids"]))]
            groups.setdefault(row["prompt_index"], []).append(value)
    kept = (groups[i] for i in sorted(groups) if len(groups[i]) > 1)
    return [torch.tensor(group, dtype=torch.float64) for group in kept]


def within(groups: list[Tensor]) -> dict[str, list[float]]:
    """How reward goes with length within groups: value, and low and high ends over groups.

    Correlation and slope (reward a token) of the deviations from each group's mean; the interval
    is the bootstrap's, which draws whole groups.
    """
    deviations = [group - group.mean(0) for group in groups]
    moments_G3 = torch.stack(
        [torch.stack([(x[:, 0] * x[:, 1]).sum(), *x.square().sum(0)]) for x in deviations]
    )
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(groups), (DRAWS, len(groups)), generator=generator)
    sums = torch.cat([moments_G3.sum(0, keepdim=True), moments_G3[drawn].sum(1)])
    both, rewards, lengths = sums.unbind(1)

    def ends(values: Tensor) -> list[float]:
        known = values[1:][values[1:].isfinite()]
        if not len(known) or not values[0].isfinite():
            return [0.0, 0.0, 0.0]  # all of one length, or of one reward
        low, high = known.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return [values[0].item(), low, high]

    return {
        "correlation": ends(both / (rewards * lengths).sqrt()),
        "slope": ends(both / lengths),
    }


def share(holds: Tensor) -> list[float | int | None]:
    """Share, low and high end of its 95% interval, and of how many."""
    count = len(holds)
    if not count:
        return [None, None, None, 0]
    mean = holds.double().mean().item()
    return [mean, *wilson(mean, count), count]


def pair_bias(pairs_P22: Tensor) -> dict[str, Any]:
    """Accuracy on held-out pairs, and what it makes of the longer response."""
    reward, length = (pairs_P22[:, 0] - pairs_P22[:, 1]).unbind(1)
    right, longer = reward > 0, length > 0
    uneven = length != 0
    return {
        "accuracy": share(right),
        "accuracy_chosen_longer": share(right[longer]),
        "accuracy_chosen_shorter": share(right[length < 0]),
        "chosen_is_longer": share(longer[uneven]),
        "prefers_longer": share((right == longer)[uneven]),
        **within(list(pairs_P22)),
    }


def sample_bias(folder: Path) -> dict[str, Any]:
    """The same on the start's whole samples, and what best and worst of a prompt differ in."""
    candidates, scores = read_parts(folder / "candidates"), read_parts(folder / "scores")
    rows = [{**row, "score": scored["score"]} for row, scored in zip(candidates, scores)]
    whole = [row for row in rows if row["finish_reason"] != "length"]
    groups = whole_groups(rows)
    if not groups:
        raise ConfigError("no prompt has two responses that end; raise --max-new-tokens")
    ended = [Scored.of(Candidate.from_json(x, str(folder)), [x["score"]]) for x in whole]
    pairs, _ = best_worst(ended)
    gaps = [len(pair.chosen_ids) - len(pair.rejected_ids) for pair in pairs]
    deviations = torch.cat([group - group.mean(0) for group in groups])
    freedom = len(deviations) - len(groups)
    reward_sd, length_sd = (deviations.square().sum(0) / freedom).sqrt().tolist()
    return {
        "prompts": len(groups),
        "responses": len(rows),
        "length": statistics.fmean(len(row["response_ids"]) for row in rows),
        "length_sd": length_sd,
        "reward_sd": reward_sd,
        "truncated": 1 - len(whole) / len(rows),
        "pairs": len(pairs),
        "best_minus_worst": statistics.fmean(gaps) if gaps else 0.0,
        "neutral_alpha": neutral_alpha(gaps, 1.0) if any(gaps) else 0.0,
        **within(groups),
    }
