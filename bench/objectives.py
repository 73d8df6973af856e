"""`python -m bench.objectives`: objectives of different kinds, trained on the same prompts.

    python -m bench.objectives --data train.json --held-out test.json --out runs/objectives
    python -m bench.objectives --report runs/objectives/results.jsonl

Every prompt comes with scored responses. Of each prompt as many are taken as `--responses` says,
with different scores, from the best to the worst. An objective of lists is trained on all of them,
one of pairs on the best and the worst, one of single responses on the same two, the best as
desirable and the worst as not. So all see the same prompts, in the same number of optimizer steps,
by `fastdpo train`; the files that it reads are left in OUT/data. An objective is a loss_type, with
options that are not the trainer's defaults after it: `simpo:beta=2,simpo_gamma=1`.

On prompts that none was trained on, each policy against the start:

- margin: the mean over prompts of log pi(best)/pi_start(best) - log pi(worst)/pi_start(worst), in
  nats, without any beta, so that objectives can be compared;
- accuracy: on how many prompts that is above zero;
- KL: the mean of log pi(y)/pi_start(y) over responses y that the policy draws at temperature 1, in
  nats a response;
- length: tokens of the greedy response, the end token included, and its change against the start.

Intervals are 95%: the bootstrap's over prompts, and of accuracies Wilson's. An objective that moves
further from the start has larger margins of either sign; compare them at a like KL.

`--data` and `--held-out` take what `fastdpo train` takes as lists, with prompts as strings. The
shortest prompts are taken, since this is meant for a CPU. Killed anywhere, the same command goes
on: a row that is there is not run again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from fastdpo.cli.stages import TrainCommand, run_train
from fastdpo.data.parts import read_candidates
from fastdpo.data.records import Candidate, RankedRow
from fastdpo.data.rows import example_rows, preference_rows, prompt_rows, read_rows
from fastdpo.data.tokenize import tokenize_dataset
from fastdpo.errors import ConfigError, DataError
from fastdpo.loss.choices import CHOICES, make_objective
from fastdpo.model.load import load_tokenizer
from fastdpo.model.logps import load_packed, pair_logps, response_logps
from fastdpo.sample.config import SampleConfig
from fastdpo.sample.stage import open_sampler, sample
from fastdpo.storage import write_jsonl_atomic

from .length_reward import fast_bf16
from .rise import wilson
from .rows import append, command_line, load, resume, this_device, where
from .tables import build, commit, grouped, markdown_table

OP, START, TRAINED = "objectives", "start", "trained"
DRAWS = 2000  # of the bootstrap
DEFAULTS = (
    "sigmoid", "simpo:beta=2.0,simpo_gamma=1.0", "tdpo2", "kto", "lipo_lambda", "plackett_luce",
)  # fmt: skip
INSTRUCTION = "Summarize this in one or two sentences."


class Scored(NamedTuple):
    """A prompt and responses with different scores, the best first."""

    prompt: str
    responses: list[str]
    scores: list[float]


class Start(NamedTuple):
    """What the changes are measured from: log-probs of held-out pairs, greedy lengths by prompt."""

    logp_P2: Tensor
    lengths_P: Tensor


# --- the data -------------------------------------------------------------------------------------


def read_scored(path: Path, instruction: str) -> list[Scored]:
    """The prompts of a file, each with one response of each score, the first one that has it."""
    found = []
    for row in example_rows(read_rows(path)):
        if not isinstance(row, RankedRow) or not isinstance(row.prompt, str):
            raise DataError(f"{row.where}: give lists, of a prompt that is a string with scores")
        by_score: dict[float, str] = {}
        for response, score in zip(row.responses, row.scores, strict=True):
            by_score.setdefault(score, str(response).strip())
        scores = sorted(by_score, reverse=True)
        text = f"{row.prompt}\n\n{instruction}".strip()
        found.append(Scored(text, [by_score[x] for x in scores], scores))
    return found


def choose(rows: list[Scored], responses: int, count: int, option: str) -> list[Scored]:
    """The shortest prompts with so many different scores, whose responses are spread evenly."""
    known: dict[str, Scored] = {}
    for row in rows:
        if len(row.scores) >= responses and all(row.responses):
            known.setdefault(row.prompt, row)
    if len(known) < count:
        raise ConfigError(
            f"{option}={count}, but {len(known)} prompts have {responses} responses of different "
            "scores; ask for fewer, or lower --responses"
        )
    chosen = []
    for row in sorted(known.values(), key=lambda row: len(row.prompt))[:count]:
        places = [round(i * (len(row.scores) - 1) / (responses - 1)) for i in range(responses)]
        kept = [row.responses[i] for i in places]
        chosen.append(Scored(row.prompt, kept, [row.scores[i] for i in places]))
    return chosen


def write_files(rows: list[Scored], held: list[Scored], folder: Path) -> None:
    """What the trainer reads, by the shape of an objective's examples, and the held-out prompts."""

    def messages(text: str, role: str = "assistant") -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    def pair(row: Scored) -> dict[str, Any]:
        sides = {"chosen": messages(row.responses[0]), "rejected": messages(row.responses[-1])}
        return {"prompt": messages(row.prompt, "user"), **sides}

    prompts = [{"prompt": messages(row.prompt, "user")} for row in rows]
    pairs = list(map(pair, rows))
    singles = [
        {**prompt, "completion": side["chosen" if label else "rejected"], "label": label}
        for prompt, side in zip(prompts, pairs)
        for label in (True, False)
    ]
    lists = [
        {**prompt, "responses": list(map(messages, row.responses)), "scores": row.scores}
        for prompt, row in zip(prompts, rows)
    ]
    files = {"pairs": pairs, "singles": singles, "lists": lists, "held": list(map(pair, held))}
    for name, found in files.items():
        write_jsonl_atomic(folder / f"{name}.jsonl", found)


# --- training -------------------------------------------------------------------------------------


def read_run(text: str) -> tuple[str, dict[str, Any]]:
    """A loss_type and its options, of `simpo:beta=2,simpo_gamma=1`."""
    name, _, options = text.partition(":")
    pairs = [x.partition("=") for x in options.split(",") if x]
    if not all(given for _, given, _ in pairs):
        raise ConfigError(f"--objectives {text}: give options as name=value, with commas between")
    return name, {key: yaml.safe_load(value) for key, _, value in pairs}


def command_of(args: argparse.Namespace, text: str, folder: Path) -> tuple[str, TrainCommand]:
    """The shape of an objective's examples, and its options of `fastdpo train`."""
    name, options = read_run(text)
    known = CHOICES[name].options if name in CHOICES else ()
    objective = make_objective(name, **{x: options[x] for x in options if x in known})
    shape, of_reference = objective.shape, dict[str, Any]()
    if objective.needs_kl:
        of_reference["precompute_ref_log_probs"] = False
    elif objective.needs_reference:
        of_reference["reference_cache"] = str(args.out / "ref_logps")
    per_prompt = 2 if shape == "singles" else 1
    return shape, TrainCommand(
        **{
            "model": args.model,
            "dataset": str(args.out / "data" / f"{shape}.jsonl"),
            "output_dir": str(folder),
            "loss_type": name,
            "alpha": 0.0,
            "learning_rate": args.learning_rate,
            "num_train_epochs": args.epochs,
            "batch_size": args.batch_size * per_prompt,
            "max_length": args.max_length,
            "max_tokens": args.max_tokens,
            "gradient_checkpointing": False,
            "bf16": fast_bf16(),
            "save_steps": sys.maxsize,
            "seed": args.seed,
            **of_reference,
            **options,
        }
    )


# --- what a policy does on held-out prompts -------------------------------------------------------


def bootstrap(values_P: Tensor) -> list[float]:
    """Mean, and low and high end of its 95% interval: the bootstrap's, which draws prompts."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values_P), (DRAWS, len(values_P)), generator=generator)
    means = values_P.double()[drawn].mean(1)
    ends = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [values_P.double().mean().item(), *ends.tolist()]


def held_pairs(args: argparse.Namespace, tokenizer: Any) -> list[Any]:
    rows = preference_rows(read_rows(args.out / "data" / "held.jsonl"))
    return tokenize_dataset(rows, tokenizer, max_length=args.max_length, progress=False).pairs


def draw(
    args: argparse.Namespace, policy: str, tokenizer: Any, out: Path, **how: Any
) -> list[Candidate]:
    """Responses of a policy to the held-out prompts, in their order."""
    prompts = prompt_rows(read_rows(args.out / "data" / "held.jsonl"))
    dtype = "bfloat16" if fast_bf16() else "float32"
    settings = SampleConfig(
        max_new_tokens=args.max_new_tokens, batch_prompts=16, dtype=dtype, seed=args.seed, **how
    )
    with open_sampler(policy, tokenizer, settings) as sampler:
        sample(sampler, tokenizer, prompts, settings, out, round_index=0)
    return list(read_candidates(out).values())


def greedy(
    args: argparse.Namespace, policy: str, tokenizer: Any, out: Path
) -> tuple[Tensor, float]:
    """Tokens of each held-out prompt's greedy response, and the share that was cut off."""
    rows = draw(args, policy, tokenizer, out, num_samples=1, temperature=0.0)
    lengths = [float(len(row.response_ids)) for row in rows]
    cut = sum(row.finish_reason == "length" for row in rows) / len(rows)
    return torch.tensor(lengths, dtype=torch.float64), cut


def measure(args: argparse.Namespace, start: Start, policy: Path, folder: Path) -> dict[str, Any]:
    """Margin, accuracy, KL and lengths of a policy against the start."""
    tokenizer = load_tokenizer(str(policy))
    lengths_P, cut = greedy(args, str(policy), tokenizer, folder / "greedy")
    drawn = draw(
        args, str(policy), tokenizer, folder / "drawn", num_samples=args.samples, temperature=1.0
    )
    model = load_packed(str(policy))
    ratio_P2 = pair_logps(model, held_pairs(args, tokenizer)) - start.logp_P2
    own_R = response_logps(model, drawn)
    del model
    kl_R = own_R - response_logps(load_packed(args.model), drawn)
    margin_P = ratio_P2[:, 0] - ratio_P2[:, 1]
    right = (margin_P > 0).double().mean().item()
    return {
        "margin": bootstrap(margin_P),
        "accuracy": [right, *wilson(right, len(margin_P))],
        "kl": bootstrap(kl_R.view(-1, args.samples).mean(1)),
        "length": bootstrap(lengths_P),
        "length_change": bootstrap(lengths_P - start.lengths_P),
        "truncated": cut,
    }


def start_of(args: argparse.Namespace) -> tuple[Start, dict[str, Any]]:
    """The start's numbers, and its row."""
    tokenizer = load_tokenizer(args.model)
    lengths_P, cut = greedy(args, args.model, tokenizer, args.out / "start")
    logp_P2 = pair_logps(load_packed(args.model), held_pairs(args, tokenizer))
    return Start(logp_P2, lengths_P), {"length": bootstrap(lengths_P), "truncated": cut}


def study(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what is missing; all rows, each on disk as soon as it is known."""
    rows, data = resume(args.results), args.out / "data"
    train = choose(
        read_scored(args.data, args.instruction), args.responses, args.prompts, "--prompts"
    )
    seen = {row.prompt for row in train}
    others = [x for x in read_scored(args.held_out, args.instruction) if x.prompt not in seen]
    write_files(train, choose(others, 2, args.heldout, "--heldout"), data)
    sizes = ("prompts", "responses", "heldout", "batch_size", "epochs", "learning_rate", "seed")
    settings = {name: getattr(args, name) for name in (*sizes, "max_new_tokens", "samples")}
    names = {"model": Path(args.model).name, "data": [args.data.stem, args.held_out.stem]}
    common = {"op": OP, **names, "settings": settings, **where(this_device(), args.commit)}
    if changed := [row for row in rows if row["settings"] != settings]:
        raise ConfigError(
            f"{args.results} has a row of other settings, {changed[0]['settings']}; give the same "
            "options to go on, or another --out"
        )

    def add(row: dict[str, Any]) -> None:
        rows.append(append(args.results, common | row))
        print(line(rows[-1]), flush=True)

    commands = {}  # all are checked before the first is run
    for text in args.objectives:
        folder = args.out / text.replace(":", "-").replace(",", "-").replace("=", "-")
        commands[text] = (folder, *command_of(args, text, folder))
    start, of_start = start_of(args)
    if not any(row["kind"] == START for row in rows):
        add({"kind": START, "objective": START, **of_start})
    for text, (folder, shape, command) in commands.items():
        if any(row["objective"] == text for row in rows):
            continue
        started = time.perf_counter()
        run_train(command)
        seconds = time.perf_counter() - started
        found = measure(args, start, folder / "policy", folder)
        add({"kind": TRAINED, "objective": text, "shape": shape, "seconds": seconds, **found})
        if not args.keep_weights:
            for name in ("policy", "checkpoint"):
                shutil.rmtree(folder / name, ignore_errors=True)
    return rows


# --- the table ------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    """A row, in one line."""
    if row["kind"] == START:
        return f"start: {row['length'][0]:.1f} tokens"
    return (
        f"{row['objective']}: margin {row['margin'][0]:+.2f}, accuracy {row['accuracy'][0]:.2f}, "
        f"KL {row['kl'][0]:.2f}, length {row['length_change'][0]:+.1f}, {row['seconds']:.0f} s"
    )


def ranged(found: list[float] | None, form: str) -> str:
    if found is None:
        return ""
    value, low, high = (format(x, form) for x in found)
    return f"{value} ({low} to {high})"


def table(rows: list[dict[str, Any]]) -> str:
    """A line an objective, the start first."""
    titles = [
        "objective", "trained on", "margin, nats", "accuracy", "KL, nats", "greedy length, tokens",
        "change of length", "cut off",
    ]  # fmt: skip
    body = [
        [
            row["objective"],
            row.get("shape", ""),
            ranged(row.get("margin"), "+.2f"),
            ranged(row.get("accuracy"), ".0%"),
            ranged(row.get("kl"), ".2f"),
            ranged(row["length"], ".1f"),
            ranged(row.get("length_change"), "+.1f"),
            f"{row['truncated']:.0%}",
        ]
        for row in rows
    ]
    return markdown_table(titles, ["---", "---", *["---:"] * (len(titles) - 2)], body)


def markdown(rows: list[dict[str, Any]], plots: list[str]) -> str:
    """A table for each model and machine, with the last row of each objective."""
    parts = []
    for found in grouped(rows, ("device", "threads", "model")).values():
        found = list({row["objective"]: row for row in found}.values())
        row, x = found[-1], found[-1]["settings"]
        earlier = {commit(x) for x in found} - {commit(row)}
        also = f"; some rows of {', '.join(sorted(earlier))}" if earlier else ""
        threads = "" if row["device_type"] == "cuda" else f", {row['threads']} threads"
        steps = -(-x["prompts"] // x["batch_size"]) * x["epochs"]
        parts += [
            f"**{row['model']}, {' and '.join(row['data'])}: {steps} steps of {x['batch_size']} "
            f"prompts, {x['prompts']} prompts with {x['responses']} responses each, learning "
            f"rate {x['learning_rate']:g}; {x['heldout']} prompts held out** on {row['device']}"
            f"{threads} ({build(row)}{also})",
            table(found),
            "Trained by the same steps, measured on held-out prompts against the start; margin "
            "and KL are of log-probabilities, without beta. Responses are cut off at "
            f"{x['max_new_tokens']} tokens, so lengths say little where most are.",
        ]
    return "\n\n".join(parts)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line("bench.objectives", __doc__)
    add = parser.add_argument
    add("--data", type=Path, help="prompts with scored responses")
    add("--held-out", type=Path, help="others, to measure on")
    add("--model", help="a folder or hub name (the demo's model)")
    add("--out", type=Path, default=Path("runs/objectives"))
    add("--results", type=Path, help="the rows' file (OUT/results.jsonl)")
    add("--objectives", nargs="+", default=DEFAULTS, metavar="NAME[:OPTION=VALUE,...]")
    add("--prompts", type=int, default=64, help="prompts to train on")
    add("--responses", type=int, default=4, help="responses of a prompt, in a list")
    add("--heldout", type=int, default=24, help="prompts to measure on")
    add("--batch-size", type=int, default=8, help="prompts of a step")
    add("--epochs", type=int, default=1)
    add("--learning-rate", type=float, default=2e-5)
    add("--max-length", type=int, default=512, help="tokens of a prompt with a response")
    add("--max-tokens", type=int, default=1024, help="of a micro-batch")
    add("--max-new-tokens", type=int, default=48, help="of a response that is drawn")
    add("--samples", type=int, default=1, help="responses of a held-out prompt, for the KL")
    add("--instruction", default=INSTRUCTION, help="put after each prompt")
    add("--seed", type=int, default=0)
    add("--keep-weights", action="store_true", help="also of finished runs")
    add("--report", type=Path, nargs="+", metavar="FILE", help="a table of these rows")
    args = parser.parse_args(arguments)
    if not args.report and not (args.data and args.held_out):
        parser.error("give --data and --held-out")
    if args.responses < 2:
        parser.error("--responses: a list has at least 2")
    args.results = args.results or args.out / "results.jsonl"
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing and print the table, or a table of rows that are there."""
    args = parse(arguments)
    if args.report:
        print(markdown(load(args.report), []))
        return 0
    from fastdpo.model.load import demo_model

    args.model = args.model or demo_model()
    print(markdown(study(args), []))
    return 0


if __name__ == "__main__":
    sys.exit(main())
