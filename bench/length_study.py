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
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastdpo.data.rows import prompt_rows, read_rows
from fastdpo.errors import ConfigError
from fastdpo.model.load import dtype_name, load_tokenizer
from fastdpo.pair.config import PairConfig
from fastdpo.rounds.config import EvaluateConfig, IterateConfig
from fastdpo.rounds.folder import take_start
from fastdpo.rounds.old_names import old_names
from fastdpo.rounds.run import iterate
from fastdpo.sample.config import SampleConfig
from fastdpo.sample.stage import open_sampler, sample
from fastdpo.score.config import ScoreConfig
from fastdpo.score.load import load_scorer
from fastdpo.score.stage import score
from fastdpo.storage import (
    read_json,
    read_plan,
    write_json_atomic,
    write_jsonl_atomic,
)
from fastdpo.train.config import TrainConfig

from .length_reward import (
    Pair,
    fast_bf16,
    pair_bias,
    pair_rewards,
    read_preferences,
    sample_bias,
    single_prompts,
    split,
    train_reward,
)
from .length_tables import AUTO, METRICS, OP, REWARD, RUN, label, markdown, plot
from .rise import prompt_means
from .rows import append, command_line, load, resume, this_device, where

CLOCK, TICK = "seconds.json", 5.0  # a run's seconds so far, noted every so many
UNNAMED = {"output_dir", "model", "prompts", "scorer", "reference_cache"}  # paths, not settings


def has_auto() -> bool:
    """Whether this fastdpo takes alpha=auto."""
    try:
        TrainConfig(alpha=AUTO)
    except (ConfigError, TypeError, ValueError):
        return False
    return True


def config_of(args: argparse.Namespace, arm: str, seed: int) -> IterateConfig:
    bf16 = fast_bf16()
    return IterateConfig(
        model=args.model,
        prompts=str(args.out / "prompts.jsonl"),
        output_dir=str(args.out / f"alpha-{arm}" / f"seed-{seed}"),
        seed=seed,
        rounds=args.rounds,
        max_prompts=args.train_prompts,
        sample=SampleConfig(
            num_samples=args.samples,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            batch_prompts=args.batch_prompts,
            dtype="bfloat16" if bf16 else "float32",
        ),
        score=ScoreConfig(scorer=str(args.out / "reward"), dtype="bfloat16" if bf16 else "float32"),
        pair=PairConfig(drop_truncated=True),
        train=TrainConfig(
            alpha=AUTO if arm == AUTO else float(arm),
            beta=args.beta,
            learning_rate=args.learning_rate,
            warmup_ratio=0.0,
            batch_size=args.batch_size,
            reference_cache=str(args.out / "ref_logps"),  # the first round's are those of all arms
            max_length=args.prompt_tokens + args.max_new_tokens,
            max_tokens=args.max_tokens,
            gradient_checkpointing=False,
            bf16=bf16,
        ),
        evaluate=EvaluateConfig(heldout=args.heldout, num_samples=args.eval_samples),
    )


def settings_of(config: IterateConfig) -> dict[str, Any]:
    """What a row says of its run, by the names that options had before they were in sections."""
    values = config.to_dict()
    found = {name: value for name, value in values.items() if not isinstance(value, dict)}
    for old, new in old_names(IterateConfig).items():
        section, _, name = new.partition(".")
        found[old] = values[section][name]
    return {name: value for name, value in found.items() if name not in UNNAMED}


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
    if done:
        take_start(folder, done[0])


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
    rows = resume(args.results)
    files = {"model": Path(args.model).name, "data": [Path(name).stem for name in args.dataset]}
    common = {"op": OP, **files, **where(this_device(), args.commit)}

    def add(row: dict) -> dict:
        rows.append(append(args.results, common | row))
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
                copy_start(folder, others, str(config.score.scorer))
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
    of_reward = ("epochs", "learning_rate", "batch_size", "max_length")
    options = {name: getattr(args, f"reward_{name}") for name in of_reward}
    # What the bias is measured on. A study that did not note these goes on.
    sampled = ("temperature", "max_new_tokens", "samples", "bias_prompts", "batch_prompts")
    named = ("model", "dataset", "prompts", "instruction", "prompt_tokens", *sampled)
    wanted = {name: getattr(args, name) for name in named} | options
    wanted |= {"pairs": [len(train), len(held)]}
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
    settings = SampleConfig(
        num_samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        batch_prompts=args.batch_prompts,
        dtype=dtype_name(dtype),
    )
    with open_sampler(args.model, tokenizer, settings) as sampler:
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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line("bench.length_study", __doc__)
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
