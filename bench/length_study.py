"""`python -m bench.length_study`: does a length penalty hold the length that plain DPO gains?

    python -m bench.length_study --dataset pairs.jsonl more.json --out runs/length
    python -m bench.length_study --report runs/length/results.jsonl

1. A reward model is trained with TRL's RewardTrainer on the preference pairs, less those of every
   fifth prompt, in OUT/reward.
2. Its length bias is measured before anything is trained with it: its accuracy on the pairs left
   out, and how its reward goes with length within those pairs and within the start's samples of a
   prompt. The first row of the results is this.
3. For each seed and each arm, `--rounds` rounds of `fastdpo iterate` with it as the scorer. An arm
   is an alpha: 0 is plain iterative DPO, a number is iLR-DPO, and auto holds the start's length.
   The seed decides which prompts are held out and what is sampled, so arms are compared seed by
   seed. A row each.

On held-out prompts, after each round against the start: the mean reward; the mean length in tokens,
the end token included; and the *length-controlled reward*, the reward less `slope` for each token
by which the responses to a prompt are longer than the start's. The slope, in reward a token, is
that of reward on length within the start's samples of a prompt, from step 2: one number for all
arms, known before any of them is run. It is the linear form of what the length-controlled win rate
of AlpacaEval does (arXiv 2404.04475), which takes the length's part out of a fitted model of the
outcome. Intervals are 95%: over seeds (Student's t, of the seeds' means), and over the prompts of
all seeds, as if they were independent. The slope has an interval of its own, the bootstrap's over
prompts; an arm is said to have a higher or lower length-controlled reward than plain DPO only where
that is so with the slope at both of its ends.

The study can tell something where plain DPO's growth in length exceeds twice its standard deviation
between seeds. Where it doesn't, the result is *inconclusive*, and says so.

Killed anywhere, the same command goes on: a row that is there is not run again, and a run goes on
as `fastdpo iterate` does; only the reward model's training starts again. When a row is written, the
weights of its run are removed, unless `--keep-weights` is given. A row's `seconds` are those of all
processes that worked on its run; what an arm takes over from another arm of its seed, the start's
samples and scores, is in the other's.

`--dataset` takes what `fastdpo train` takes, and the public files of `bench.step` as they are. The
prompts are those of the first one's single-turn pairs, each followed by `--instruction`, which can
keep the start's responses short enough to have room to grow. A response that is cut off at
`--max-new-tokens` is never paired, nor part of the slope: a reward model that knows only whole
responses dislikes it for its end, not its length.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.data.records import Text
from fastdpo.data.rows import preference_rows, prompt_rows, read_rows, render_prompt
from fastdpo.errors import ConfigError
from fastdpo.loss.gemm import has_native_bf16
from fastdpo.model.load import load_tokenizer, save_policy
from fastdpo.pair.rules import best_worst
from fastdpo.report.evaluation import NORMAL, quantile
from fastdpo.rounds.run import IterateConfig, iterate
from fastdpo.sample.stage import SamplingConfig, open_sampler, sample
from fastdpo.score.stage import load_scorer, score
from fastdpo.storage import (
    read_json,
    read_parts,
    read_plan,
    write_json_atomic,
    write_jsonl_atomic,
)
from fastdpo.train.control import neutral_alpha
from fastdpo.train.trainer import TrainingConfig

from .measure import where
from .report import LINES, load, markdown_table
from .rise import interval, prompt_means
from .step import as_preference

BEGIN, END = "<!-- length:begin -->", "<!-- length:end -->"
OP, REWARD, RUN = "length study", "reward model", "run"
PLAIN, AUTO = "0", "auto"
METRICS = ("reward", "length", "lc_reward")
TITLES = {
    "reward": "reward",
    "length": "length, tokens",
    "lc_reward": "length-controlled reward",
}
HELD_OUT = 5  # every fifth prompt's pairs are kept from the reward model
DRAWS = 2000  # of the bootstrap
CLOCK, TICK = "seconds.json", 5.0  # a run's seconds so far, noted every so many
UNNAMED = {"output_dir", "model", "prompts", "scorer", "reference_cache"}  # paths, not settings


# --- preference pairs ---------------------------------------------------------------------------


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


# --- the reward model ---------------------------------------------------------------------------


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


def wilson(mean: float, count: int) -> tuple[float, float]:
    """The ends of the 95% interval of a share, Wilson's score interval (JASA 22, 1927).

    It is right for few and for shares of 0 and 1 too, where mean +- 1.96 standard errors is empty.
    """
    weight = NORMAL**2 / count
    middle = (mean + weight / 2) / (1 + weight)
    half = math.sqrt(weight * mean * (1 - mean) + weight**2 / 4) / (1 + weight)
    return max(middle - half, 0.0), min(middle + half, 1.0)


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
    pairs, _ = best_worst(whole)
    gaps = [len(pair["chosen_ids"]) - len(pair["rejected_ids"]) for pair in pairs]
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


# --- the runs -----------------------------------------------------------------------------------


def has_auto() -> bool:
    """Whether this fastdpo takes alpha=auto."""
    try:
        TrainingConfig(alpha=AUTO)  # type: ignore[arg-type]
    except (ConfigError, TypeError, ValueError):
        return False
    return True


def config_of(args: argparse.Namespace, arm: str, seed: int) -> IterateConfig:
    bf16 = fast_bf16()
    return IterateConfig(
        model=args.model,
        prompts=str(args.out / "prompts.jsonl"),
        scorer=str(args.out / "reward"),
        scorer_dtype="bfloat16" if bf16 else "float32",
        output_dir=str(args.out / f"alpha-{arm}" / f"seed-{seed}"),
        alpha=AUTO if arm == AUTO else float(arm),  # type: ignore[arg-type]
        beta=args.beta,
        seed=seed,
        rounds=args.rounds,
        heldout=args.heldout,
        max_prompts=args.train_prompts,
        num_samples=args.samples,
        eval_samples=args.eval_samples,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        drop_truncated=True,
        batch_prompts=args.batch_prompts,
        learning_rate=args.learning_rate,
        warmup_ratio=0.0,
        batch_size=args.batch_size,
        reference_cache=str(args.out / "ref_logps"),  # the first round's are those of all arms
        max_length=args.prompt_tokens + args.max_new_tokens,
        max_tokens=args.max_tokens,
        gradient_checkpointing=False,
        bf16=bf16,
        sample_dtype="bfloat16" if bf16 else "float32",
    )


def settings_of(config: IterateConfig) -> dict[str, Any]:
    """What a row says of its run."""
    return {name: value for name, value in asdict(config).items() if name not in UNNAMED}


def round_rows(folder: Path, rounds: int, slope: float) -> list[dict[str, Any]]:
    """Held-out values by round: means, and of the changes of each prompt their mean and spread."""
    found, start = [], None
    for index in range(rounds + 1):
        at = folder / f"round-{index:02d}"
        reward, length = prompt_means(at / "eval").unbind(1)
        start_length = length if start is None else start[:, 1]
        values = torch.stack([reward, length, reward - slope * (length - start_length)], 1)
        start = values if start is None else start
        summary = read_json(at / "summary.json")
        row: dict[str, Any] = {"round": index, "prompts": len(values)}
        row |= {name: summary.get(name) for name in ("truncated", "pairs", "alpha")}
        for column, name in enumerate(METRICS):
            change = (values - start)[:, column]
            sd = change.std().item() if len(change) > 1 else 0.0
            row[name] = values[:, column].mean().item()
            row[f"{name}_change"] = {"mean": change.mean().item(), "sd": sd}
        found.append(row)
    return found


def copy_start(folder: Path, others: list[Path], scorer: str) -> None:
    """Take what the start answered and scored from another arm of the seed: it would be the same.

    A run only takes samples and scores whose plan and checksums are what it would have made. The
    plan names the scorer by its path, so where OUT has moved since, there is nothing to take.
    """

    def same(other: Path) -> bool:
        plan = read_plan(other / "round-01/scores") or {}
        return (other / "round-01/pairs.jsonl").exists() and plan.get("scorer") == scorer

    done = [x for x in others if same(x)]
    if folder.exists() or not done:
        return
    # Killed before the rename, the folder isn't there, and the next process copies again.
    scratch = folder.with_name(f".{folder.name}.copy")
    shutil.rmtree(scratch, ignore_errors=True)
    for name in ("round-00/eval", "round-01/candidates", "round-01/scores"):
        shutil.copytree(done[0] / name, scratch / name)
    scratch.rename(folder)


def seconds_of(folder: Path) -> float | None:
    """Seconds that processes have worked on a run; None where one did that didn't note them."""
    if (folder / CLOCK).exists():
        return read_json(folder / CLOCK)
    return None if (folder / "state.json").exists() else 0.0


@contextmanager
def clock(folder: Path) -> Iterator[None]:
    """Adds the seconds that this takes to those of a run, also where it is killed."""
    before, started, ended = seconds_of(folder), time.perf_counter(), threading.Event()
    if before is None:
        yield
        return

    def note() -> None:
        write_json_atomic(folder / CLOCK, before + time.perf_counter() - started)

    def tick() -> None:
        while not ended.wait(TICK):
            note()

    note()
    ticking = threading.Thread(target=tick, daemon=True)
    ticking.start()
    try:
        yield
    finally:
        ended.set()
        ticking.join()
        note()


def remove_weights(folder: Path) -> None:
    """Gigabytes that nothing reads any more; samples, scores, pairs and metrics stay."""
    for name in ("policy", "checkpoint", "ref_logps", "adapter"):
        for path in folder.glob(f"round-*/{name}"):
            shutil.rmtree(path)


def study(args: argparse.Namespace) -> list[dict]:
    """Run what is missing, a seed at a time; all rows, each on disk as soon as it is known."""
    args.out.mkdir(parents=True, exist_ok=True)
    rows = load([args.results]) if args.results.exists() else []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = {"model": Path(args.model).name, "data": [Path(name).stem for name in args.dataset]}
    common = {"op": OP, **files, **where(device, args.commit)}

    def add(row: dict) -> dict:
        rows.append(common | row)
        write_jsonl_atomic(args.results, rows)
        print(line(rows[-1]), flush=True)
        return rows[-1]

    prepare(args)
    reward = next((row for row in rows if row["kind"] == REWARD), None)
    if reward and reward["training"] != read_json(args.out / "reward.json"):
        raise ConfigError(f"{args.results} is of another reward model; name other --results")
    reward = reward or add({"kind": REWARD, **reward_row(args)})
    if args.only_reward:
        return rows
    for seed in args.seeds:
        for arm in args.arms:
            config = config_of(args, arm, seed)
            settings, folder = settings_of(config), Path(config.output_dir)
            done = next((row for row in rows if run_of(row) == (arm, seed)), None)
            if done is None:
                others = [args.out / f"alpha-{x}" / folder.name for x in args.arms]
                copy_start(folder, others, str(config.scorer))
                with clock(folder):
                    iterate(config)
                slope = reward["samples"]["slope"][0]
                by_round = round_rows(folder, args.rounds, slope)
                run = {"arm": arm, "seed": seed, "seconds": seconds_of(folder)}
                add({"kind": RUN, **run, "settings": settings, "rounds": by_round})
            elif done["settings"] != settings:
                names = [x for x in settings if done["settings"].get(x) != settings[x]]
                raise ConfigError(
                    f"{args.results} has a run of alpha {arm}, seed {seed} with another "
                    f"{', '.join(names)}; give the same options to go on, or another --out"
                )
            if not args.keep_weights:
                remove_weights(folder)
    return rows


def run_of(row: dict) -> tuple[str, int] | None:
    return (row["arm"], row["seed"]) if row["kind"] == RUN else None


def prepare(args: argparse.Namespace) -> None:
    """The prompts' file and the reward model, unless they are there."""
    rows = read_preferences(args.dataset)
    train, held = split(rows)
    if not train or not held:
        raise ConfigError(f"{len(rows)} pairs are too few to hold some out; give more")
    options = {
        "epochs": args.reward_epochs,
        "learning_rate": args.reward_learning_rate,
        "batch_size": args.reward_batch_size,
        "max_length": args.reward_max_length,
    }
    wanted = {"model": args.model, "dataset": args.dataset, "prompts": args.prompts} | options
    wanted |= {"instruction": args.instruction, "prompt_tokens": args.prompt_tokens}
    wanted |= {"pairs": [len(train), len(held)]}
    # What the bias is measured on. A study that did not note these goes on.
    sampled = ("temperature", "max_new_tokens", "samples", "bias_prompts", "batch_prompts")
    wanted |= {name: getattr(args, name) for name in sampled}
    path = args.out / "study.json"
    if not path.exists():
        write_json_atomic(path, wanted)
    before = {name: wanted[name] for name in sampled} | read_json(path)
    changed = [name for name in wanted if before.get(name) != wanted[name]]
    if changed:
        raise ConfigError(
            f"{args.out} holds a study with {changed[0]}={before.get(changed[0])}, not "
            f"{wanted[changed[0]]}; give the same options to go on, or another --out"
        )
    tokenizer = load_tokenizer(args.model)
    if not (args.out / "prompts.jsonl").exists():
        if args.prompts:
            found = [{"prompt": row.prompt} for row in prompt_rows(read_rows(args.prompts))]
        else:
            texts = single_prompts(
                read_preferences(args.dataset[:1]), tokenizer, args.prompt_tokens, args.instruction
            )
            found = [{"prompt": text} for text in texts]
        write_jsonl_atomic(args.out / "prompts.jsonl", found)
    if not (args.out / "reward").is_dir():
        train_reward(args.model, train, args.out / "reward", options)


def reward_row(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the reward model: on pairs it has not seen, and on samples of the start."""
    tokenizer, folder = load_tokenizer(args.model), args.out / "start"
    _, held = split(read_preferences(args.dataset))
    held = [row for row in held if fits(row, tokenizer, args.reward_max_length)]
    dtype = torch.bfloat16 if fast_bf16() else torch.float32
    scorer = load_scorer(str(args.out / "reward"), dtype=dtype)
    pairs = pair_bias(pair_rewards(scorer, tokenizer, held))
    prompts = prompt_rows(read_rows(args.out / "prompts.jsonl"))[: args.bias_prompts]
    settings = SamplingConfig(
        num_samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        batch_prompts=args.batch_prompts,
    )
    with open_sampler(args.model, tokenizer, settings, dtype=dtype) as sampler:
        sample(sampler, tokenizer, prompts, settings, folder / "candidates", round_index=0)
    score(scorer, folder / "candidates", folder / "scores")
    trained = read_json(args.out / "reward.json")
    return {"training": trained, "held_out": pairs, "samples": sample_bias(folder)}


def fits(row: Pair, tokenizer: Any, most: int) -> bool:
    """Whether both sides with their prompt are within the reward model's training length."""
    return all(
        len(tokenizer.apply_chat_template(x, tokenize=True, return_dict=True)["input_ids"]) <= most
        for x in row.sides
    )


# --- what the rows say --------------------------------------------------------------------------


def runs_of(rows: list[dict], arm: str) -> dict[int, dict]:
    """Of the arm, the row of each seed; the last where there are several."""
    return {row["seed"]: row for row in rows if row["kind"] == RUN and row["arm"] == arm}


def arms_of(rows: list[dict]) -> list[str]:
    """Plain DPO first, then by alpha, auto last."""
    arms = {row["arm"] for row in rows if row["kind"] == RUN}
    return sorted(arms, key=lambda arm: math.inf if arm == AUTO else float(arm))


def label(arm: str) -> str:
    return {PLAIN: "plain DPO", AUTO: "alpha auto"}.get(arm, f"alpha {arm}")


def over_seeds(runs: dict[int, dict], index: int, name: str) -> dict[str, float | None]:
    """Interval of the seeds' mean changes in a round against the start."""
    changes = [run["rounds"][index][f"{name}_change"]["mean"] for run in runs.values()]
    return interval(torch.tensor(changes, dtype=torch.float64))


def over_prompts(runs: dict[int, dict], index: int, name: str) -> dict[str, float | None]:
    """Interval of the changes of all prompts of all seeds, from each seed's mean and spread."""
    found = [run["rounds"][index] for run in runs.values()]
    counts = [row["prompts"] for row in found]
    changes = [row[f"{name}_change"] for row in found]
    total = sum(counts)
    mean = sum(n * x["mean"] for n, x in zip(counts, changes)) / total
    squares = sum(
        (n - 1) * x["sd"] ** 2 + n * (x["mean"] - mean) ** 2 for n, x in zip(counts, changes)
    )
    if total < 2:
        return {"mean": mean, "low": None, "high": None, "n": total}
    half = quantile(total - 1) * math.sqrt(squares / (total - 1) / total)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": total}


def against_plain(rows: list[dict], arm: str, name: str) -> dict[str, float | None] | None:
    """Interval over the common seeds of an arm's last value less plain DPO's."""
    runs, plain = runs_of(rows, arm), runs_of(rows, PLAIN)
    common = sorted(runs.keys() & plain.keys())
    if not common:
        return None
    gaps = [runs[seed]["rounds"][-1][name] - plain[seed]["rounds"][-1][name] for seed in common]
    return interval(torch.tensor(gaps, dtype=torch.float64))


def controlled_against_plain(rows: list[dict], arm: str) -> list[dict[str, float | None]]:
    """As `against_plain` of the length-controlled reward, with the slope as it was measured and at
    each end of its interval; empty where no seed is common or the slope is not known.
    """
    slopes, found = slope_of(rows), []
    reward, plain = runs_of(rows, arm), runs_of(rows, PLAIN)
    common = sorted(reward.keys() & plain.keys())
    for slope in slopes if common else ():
        last = [[runs[seed]["rounds"][-1] for seed in common] for runs in (reward, plain)]
        ours, theirs = ([controlled(row, slope) for row in side] for side in last)
        gaps = [a - b for a, b in zip(ours, theirs)]
        found.append(interval(torch.tensor(gaps, dtype=torch.float64)))
    return found


def controlled(row: dict, slope: float) -> float:
    """The length-controlled reward of a round, which is linear in the slope."""
    return row["reward"] - slope * row["length_change"]["mean"]


def slope_of(rows: list[dict]) -> list[float]:
    """Reward a token: value, low and high end; empty where it was not measured."""
    return next((row["samples"]["slope"] for row in rows if row["kind"] == REWARD), [])


def verdict(rows: list[dict]) -> dict[str, Any]:
    """Whether plain DPO's growth in length exceeds twice its spread between seeds.

    ``growth`` and ``spread`` are mean and standard deviation over seeds of the change in held-out
    length after the last round, in tokens; one seed has no spread and proves nothing.
    """
    changes = [run["rounds"][-1]["length_change"]["mean"] for run in runs_of(rows, PLAIN).values()]
    growth = statistics.fmean(changes) if changes else None
    spread = statistics.stdev(changes) if len(changes) > 1 else None
    known = growth is not None and spread is not None
    return {
        "conclusive": bool(known and growth > 2 * spread),  # type: ignore[operator]
        "growth": growth,
        "spread": spread,
        "seeds": len(changes),
    }


def verdict_text(rows: list[dict]) -> str:
    """The verdict and, where there is one, what each arm did, in sentences."""
    found = verdict(rows)
    if not found["seeds"]:
        return "**Inconclusive**: there is no run of plain DPO."
    if found["spread"] is None:
        told = f"one seed of plain DPO ({found['growth']:+.1f} tokens){capped(rows)}"
        return f"**Inconclusive**: {told}."
    told = (
        f"plain DPO changed the length by {found['growth']:+.1f} tokens over {found['seeds']} "
        f"seeds, with a standard deviation of {found['spread']:.1f} between them"
        f"{capped(rows)}"
    )
    if not found["conclusive"]:
        return f"**Inconclusive**: {told}; the growth does not exceed twice that."
    lines = [f"**Plain DPO grows longer**: {told}."]
    for arm in arms_of(rows):
        if arm == PLAIN:
            continue
        length, reward = (against_plain(rows, arm, name) for name in ("length", "reward"))
        own = over_seeds(runs_of(rows, arm), -1, "length")
        if length is None or reward is None:
            continue
        lines.append(
            f"{label(arm)}: length {change_of(own, '.1f')} against the start, "
            f"{change_of(length, '.1f')} against plain DPO ({shown(length, 'shorter', 'longer')}); "
            f"reward {change_of(reward, '.3f')}, {controlled_text(rows, arm)}."
        )
    return "\n".join(f"- {x}" for x in lines)


def controlled_text(rows: list[dict], arm: str) -> str:
    """What the length-controlled reward shows, with the slope at both ends of its interval too."""
    found, at_ends = against_plain(rows, arm, "lc_reward"), controlled_against_plain(rows, arm)[1:]
    assert found is not None
    text = f"length-controlled reward {change_of(found, '.3f')} against plain DPO"
    told = {shown(x, "lower", "higher") for x in [found, *at_ends]}
    same = told.pop() if len(told) == 1 else "no difference shown: it depends on the slope"
    if at_ends:
        ends = (change_of(x, ".3f") for x in at_ends)
        text += f", {' and '.join(ends)} with the slope at its ends"
    return f"{text} ({same})"


def capped(rows: list[dict]) -> str:
    """A clause on how many of plain DPO's last responses have the greatest length there is."""
    runs = runs_of(rows, PLAIN).values()
    start, last = (statistics.fmean(x["rounds"][i]["truncated"] for x in runs) for i in (0, -1))
    if not last:
        return ""
    most = next(iter(runs))["settings"]["max_new_tokens"]
    text = f"; {last:.0%} of its last responses ({start:.0%} of the start's) are cut off at {most}"
    return f"{text} tokens" + (", so the growth is a lower bound" if last > start else "")


def shown(found: dict[str, Any], below: str, above: str) -> str:
    """What the interval over seeds shows."""
    if found["low"] is None or found["low"] <= 0 <= found["high"]:
        return "no difference shown"
    return below if found["high"] < 0 else above


def change_of(found: dict[str, Any], form: str) -> str:
    """A change with its interval."""
    if found["low"] is None:
        return format(found["mean"], f"+{form}")
    return f"{format(found['mean'], f'+{form}')} ({ends_of(found, form)})"


def ends_of(found: dict[str, Any], form: str) -> str:
    if found["low"] is None:
        return "one value"
    return " to ".join(format(found[end], f"+{form}") for end in ("low", "high"))


# --- tables -------------------------------------------------------------------------------------


def line(row: dict) -> str:
    """A row, in one line."""
    if row["kind"] == REWARD:
        held, samples = row["held_out"], row["samples"]
        return (
            f"reward model: accuracy {held['accuracy'][0]:.2f} on {held['accuracy'][-1]} pairs, "
            f"correlation with length {held['correlation'][0]:+.2f} in pairs and "
            f"{samples['correlation'][0]:+.2f} in samples"
        )
    last = row["rounds"][-1]
    changes = ", ".join(f"{name} {last[f'{name}_change']['mean']:+.3g}" for name in METRICS)
    seconds = "" if row["seconds"] is None else f", {row['seconds']:.0f} s"
    return f"{label(row['arm'])}, seed {row['seed']}: {changes}{seconds}"


def heading(rows: list[dict]) -> str:
    """What was run, where, with which versions."""
    row = rows[-1]
    versions = ", ".join(f"{name} {v}" for name, v in row["versions"].items() if v)
    commit = (row["git"] or "no commit")[:12] + (", with local changes" if row["dirty"] else "")
    threads = "" if row["device_type"] == "cuda" else f"{row['threads']} threads, "
    size = ""
    runs = [x for x in rows if x["kind"] == RUN]
    if runs:
        x, seeds = runs[-1]["settings"], len({run["seed"] for run in runs})
        size = (
            f", {x['rounds']} rounds of {x['max_prompts']} prompts with {x['num_samples']} "
            f"responses of at most {x['max_new_tokens']} tokens, {x['heldout']} prompts held out, "
            f"beta {x['beta']:g}, learning rate {x['learning_rate']:g}, {seeds} seeds"
        )
    return (
        f"**{row['model']}, {' and '.join(row['data'])}{size}** on {row['device']}, {threads}"
        f"({versions}; {commit}; {row['utc'][:10]})"
    )


def percent(found: list) -> str:
    if found[0] is None:
        return "none"
    low, high = wilson(found[0], found[-1])  # older rows have mean +- 1.96 standard errors
    return f"{found[0]:.0%} ({low:.0%} to {high:.0%}) of {found[-1]}"


def ranged(found: list[float], form: str) -> str:
    value, low, high = (format(x, form) for x in found)
    return f"{value} ({low} to {high})"


def reward_table(row: dict) -> str:
    """The reward model's accuracy and its length bias."""
    held, samples, training = row["held_out"], row["samples"], row["training"]
    per_100 = [[100 * x for x in part["slope"]] for part in (held, samples)]
    body = [
        ["accuracy", percent(held["accuracy"]), ""],
        ["accuracy where the chosen one is longer", percent(held["accuracy_chosen_longer"]), ""],
        ["accuracy where it is shorter", percent(held["accuracy_chosen_shorter"]), ""],
        ["the chosen one is longer", percent(held["chosen_is_longer"]), ""],
        ["the longer one gets the higher reward", percent(held["prefers_longer"]), ""],
        [
            "correlation of reward and length within a prompt",
            ranged(held["correlation"], "+.2f"),
            ranged(samples["correlation"], "+.2f"),
        ],
        ["reward for 100 tokens more", ranged(per_100[0], "+.3f"), ranged(per_100[1], "+.3f")],
        ["spread of reward within a prompt", "", f"{samples['reward_sd']:.3f}"],
        [
            "mean length (spread within a prompt)",
            "",
            f"{samples['length']:.1f} ({samples['length_sd']:.1f}) tokens",
        ],
        ["cut off", "", f"{samples['truncated']:.0%}"],
        ["best less worst of a prompt, length", "", f"{samples['best_minus_worst']:+.1f} tokens"],
        ["alpha that would balance those pairs", "", f"{samples['neutral_alpha']:.4f}"],
    ]
    titles = [
        f"reward model ({training['pairs']} pairs, {training['epochs']:g} epochs)",
        "held-out pairs",
        f"the start's samples ({samples['prompts']} prompts)",
    ]
    return markdown_table(titles, ["---", "---:", "---:"], body)


def run_table(rows: list[dict]) -> str:
    """A line for each arm and round: the changes against the start with both intervals."""
    titles = ["arm", "round", "seeds"]
    titles += [f"{TITLES[name]} (over seeds; over prompts)" for name in METRICS]
    titles += ["cut off", "alpha", "minutes"]
    body = []
    for arm in arms_of(rows):
        runs = runs_of(rows, arm)
        for index in range(min(len(run["rounds"]) for run in runs.values())):
            found = [run["rounds"][index] for run in runs.values()]
            cells = [label(arm), str(index), str(len(runs))]
            for name in METRICS:
                form = ".1f" if name == "length" else ".3f"
                mean = statistics.fmean(row[name] for row in found)
                if index == 0:
                    cells.append(format(mean, form))
                    continue
                seeds, prompts = (f(runs, index, name) for f in (over_seeds, over_prompts))
                cells.append(
                    f"{format(seeds['mean'], f'+{form}')} "
                    f"({ends_of(seeds, form)}; {ends_of(prompts, form)})"
                )
            for name, form in (("truncated", ".0%"), ("alpha", ".4f")):
                known = [row[name] for row in found if isinstance(row[name], int | float)]
                cells.append(format(statistics.fmean(known), form) if known else "")
            body.append([*cells, ""])
        body[-1][-1] = minutes(runs)
    return markdown_table(titles, ["---", *["---:"] * (len(titles) - 1)], body)


def minutes(runs: dict[int, dict]) -> str:
    """The runs' mean time, of those seeds whose time is known."""
    known = [run["seconds"] for run in runs.values() if run.get("seconds") is not None]
    if not known:
        return "not known"
    some = f" ({len(known)} of {len(runs)} seeds)" if len(known) < len(runs) else ""
    return f"{statistics.fmean(known) / 60:.1f}{some}"


def notes(rows: list[dict]) -> str:
    """What the table's columns mean."""
    slope, text = slope_of(rows), ""
    if slope:
        text = (
            f"The length-controlled reward takes {slope[0]:+.4f} reward for a token, measured on "
            f"the start's samples, 95% interval {slope[1]:+.4f} to {slope[2]:+.4f}; the table's "
            "intervals are with the slope as it was measured. "
        )
    return (
        f"{text}Lengths end at max_new_tokens, which the responses that were cut off have reached. "
        "Minutes are those of a whole run, the mean over seeds; the arms of a seed share the "
        "start's samples and scores, which are counted in the first."
    )


def markdown(rows: list[dict], plots: list[str]) -> str:
    """The block between the markers."""
    parts = [heading(rows)]
    parts += [reward_table(row) for row in rows if row["kind"] == REWARD][-1:]
    if any(row["kind"] == RUN for row in rows):
        parts += [verdict_text(rows), run_table(rows), notes(rows)]
        parts += [f"![Reward and length by round]({plot})" for plot in plots]
    return "\n\n".join(parts)


def plot(rows: list[dict], paths: list[Path]) -> None:
    """Reward, length and length-controlled reward by round, a line an arm; bars are over seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    # Fixed ids and no date, so that the same results give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "fastdpo", "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        for axis, name in zip(figure.subplots(1, 3), METRICS):
            for place, arm in enumerate(arms_of(rows)):
                draw_arm(axis, runs_of(rows, arm), name, place, label(arm))
            axis.set_title(f"{TITLES[name]}, held-out", fontsize=9, loc="left")
            axis.set_xlabel("round", fontsize=8)
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.get_major_locator().set_params(integer=True)
            if axis.has_data():
                axis.legend(fontsize=7, frameon=False)
        for path in paths:
            kind = path.suffix[1:]
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            figure.savefig(path, format=kind, metadata=metadata)


def draw_arm(axis: Any, runs: dict[int, dict], name: str, place: int, text: str) -> None:
    """The seeds' mean by round; its bar is the interval of the change against the start."""
    rounds = range(min(len(run["rounds"]) for run in runs.values()))
    means = [statistics.fmean(run["rounds"][i][name] for run in runs.values()) for i in rounds]
    found = [over_seeds(runs, i, name) for i in rounds]
    halves = [0.0 if x["high"] is None else x["high"] - x["mean"] for x in found]  # type: ignore[operator]
    # Beside each other, so that bars can be told apart.
    at = [i + 0.04 * place for i in rounds]
    axis.errorbar(
        at, means, yerr=halves, marker="o", markersize=3, capsize=2, label=text,
        color=LINES[(place + 1) % len(LINES)],
    )  # fmt: skip


# --- the command --------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m bench.length_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", nargs="+", help="files or hub names of preference pairs")
    add("--prompts", help="rows with a prompt, in place of the first dataset's")
    add("--model", help="a folder or hub name, of policy and reward model (the demo's model)")
    add("--out", type=Path, default=Path("runs/length"))
    add("--results", type=Path, help="the rows' file (OUT/results.jsonl)")
    add("--arms", default="0,0.01,auto", help="alphas; 0 is plain DPO")
    add("--seeds", default="0,1,2")
    add("--rounds", type=int, default=3)
    add("--beta", type=float, default=0.1)
    add("--train-prompts", type=int, default=96)
    add("--heldout", type=int, default=48, help="prompts held out, by the seed")
    add("--instruction", default="", help="put after each prompt of the dataset")
    add("--temperature", type=float, default=0.7)
    add("--samples", type=int, default=4, help="responses of a prompt, of which two make a pair")
    add("--eval-samples", type=int, default=4, help="responses of a held-out prompt")
    add("--max-new-tokens", type=int, default=128)
    add("--prompt-tokens", type=int, default=128, help="longer prompts are left out")
    add("--learning-rate", type=float, default=2e-5)
    add("--batch-size", type=int, default=8, help="pairs of a step")
    add("--batch-prompts", type=int, default=16, help="prompts sampled at a time")
    add("--max-tokens", type=int, default=2048, help="of a micro-batch")
    add("--reward-epochs", type=float, default=2)
    add("--reward-learning-rate", type=float, default=2e-5)
    add("--reward-batch-size", type=int, default=4)
    add("--reward-max-length", type=int, default=256, help="longer pairs are left out")
    add("--bias-prompts", type=int, default=64, help="prompts whose samples show the bias")
    add("--only-reward", action="store_true", help="train and measure the reward model, no runs")
    add("--keep-weights", action="store_true", help="also of finished runs")
    add("--commit", help="the commit to record where there is no repository")
    add("--report", type=Path, nargs="+", metavar="FILE", help="tables and a plot of these rows")
    args = parser.parse_args(arguments)
    if args.report:
        return args
    if not args.dataset:
        parser.error("give --dataset")
    args.results = args.results or args.out / "results.jsonl"
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
        args.arms = [arm if arm == AUTO else f"{float(arm):g}" for arm in args.arms.split(",")]
    except ValueError as error:
        parser.error(f"--seeds are ints, --arms are numbers or auto, with commas between: {error}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing and write rows, tables and a plot, or report rows that are there."""
    args = parse(arguments)
    if args.report:
        for path in args.report:
            rows, picture = load([path]), path.with_suffix(".svg")
            plot(rows, [picture])
            print(markdown(rows, [picture.name]))
        return 0
    from fastdpo.model.load import demo_model

    args.model = args.model or demo_model()
    if AUTO in args.arms and not has_auto():
        print("alpha=auto is no option of this fastdpo; its arm is left out")
        args.arms = [arm for arm in args.arms if arm != AUTO]
    started = time.perf_counter()
    rows = study(args)
    picture = args.results.with_suffix(".svg")
    plot(rows, [picture])
    print(markdown(rows, [picture.name]))
    print(f"{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
