"""`python -m bench.step`: whole optimizer steps, fastdpo's trainer against TRL's DPOTrainer.

    python -m bench.step --dataset pairs.jsonl --out mine.jsonl
    python -m bench.step --report mine.jsonl
    python -m bench.step --convert dpo_en_demo.json pairs.jsonl
    python -m bench.step --longest --shape llama-3-8b --out longest.jsonl
    python -m bench.step --shape llama-3.2-1b --lengths bench/lengths.json:long --out long.jsonl

Each variant trains in a process of its own, on the same model, the same pairs in the same order and
the same dtype of weights, with AdamW of the same settings; alpha is 0, where the losses are one
function. The variants take turns of four steps. Steps differ in length, so a speed is that of all
timed steps together or of the median one, and `x trl` TRL's seconds over a variant's.

Before any time is taken, every variant trains two steps in fp32 on the shortest pairs: its loss,
log-probs and gradient norm have to be TRL's, and those of the first step the ones of plain fp32
without batches. The timed steps, in the dtype asked for, are compared with TRL's by limits that
leave room for its rounding. A variant that differs is a row that says so, without a speed.

Processes import side by side while the weights are made, and on a GPU they live on from the check
to the timed steps; on a CPU each job has a fresh one, whose memory is its own.

A step is one forward of `--batch-size` pairs for TRL; `--max-tokens` splits fastdpo's into
micro-batches, which by default it does not. Tokens are those of the two sequences of each pair,
without padding, however a variant lays them out. Peak memory is the process's over the timed steps
on a CPU, and what was allocated on a GPU.

`--dataset` is anything that `fastdpo train` takes, or either of these public files as it is:
github.com/hiyouga/LLaMA-Factory, data/dpo_en_demo.json (long pairs), and
github.com/Hritikbansal/dove, data/anthropic_helpful/val_conditional_pref.jsonl (short pairs).
`--lengths 512/256` needs no data: random prompts of 512 tokens with responses of 256. Nor does
`--lengths bench/lengths.json:long`: random tokens, as many as the pairs of those two files have
(`short` is dove's); `--dataset pairs.jsonl --write-lengths FILE:NAME` wrote that file.

`--longest` wants a GPU: the longest pair that trains one step within 24, 48, 80 and 141 GiB, with
LoRA, checkpointing and offloaded activations on both sides and tiled MLPs on fastdpo's. A pair of
length n is a prompt of n/4 tokens and two responses of 3n/4.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from fastdpo.data.examples import TokenizedPair

from .rows import append, command_line, load, this_device, where
from .step_crew import Crew, crew_of
from .step_pairs import (
    POSITIONS,
    SHAPES,
    convert,
    lengths,
    random_pair,
    read_lengths,
    read_pairs,
    sample,
    shape_model,
    vocabulary,
    write_lengths,
)
from .step_tables import LONGEST, OP, markdown, plot
from .step_turns import (
    ROUNDED,
    WARM_UP,
    Result,
    capacity_mib,
    first_refusal,
    measure,
    seconds_of,
)
from .step_worker import GOLD, VARIANTS, planned
from .turns import Failed, summary

DTYPES = ("bfloat16", "float32")
BUDGETS_GIB = (24, 48, 80, 141)
LONGEST_STEP = 1024
SO_FAR = "so far"  # the note of a search that has not ended
LONGEST_VARIANTS = ("trl", "fastdpo")
# Trainers that go in no environment with TRL 1.16, and what their pyproject.toml asks for.
ABSENT = {
    "LLaMA-Factory": ("llamafactory", "trl<=0.24.0 and transformers<=4.57.1 (00577a85)"),
    "open-instruct": ("open_instruct", "torch==2.7.0 and numpy<2 (002bde10)"),
}


def common_fields(args: argparse.Namespace, model: str, pairs: list[TokenizedPair]) -> dict:
    """What all rows of a run share."""
    here = where(this_device(), args.commit, "accelerate", "peft")
    here["threads"] = args.threads or here["threads"]
    sequences = [n for pair in pairs for n in lengths(pair)]
    return {
        **here,
        "model": Path(model).name,
        "data": data_name(args),
        **settings_of(args),
        "rounds": args.steps,
        "mean_sequence": sum(sequences) / len(sequences) if sequences else None,
    }


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What both a row and a worker's job say."""
    names = "batch_size max_length max_tokens dtype gradient_checkpointing learning_rate"
    found = {name: getattr(args, name) for name in names.split()}
    return {**found, "autocast": not args.no_autocast, "attention": args.trl_attention}


def data_name(args: argparse.Namespace) -> str:
    if args.lengths:
        return f"random, {'lengths of ' * (':' in args.lengths)}{args.lengths.split(':')[-1]}"
    return "random" if args.longest else Path(args.dataset).stem


def row_of(result: Result, job: dict[str, Any], common: dict) -> dict:
    """A result for the file; `x_trl` and all speeds are None where there is a note."""
    pairs, size = job["pairs"], job["batch_size"]
    steps = result.steps
    plan = planned(pairs, size, job["seed"])[: len(steps)]
    needed = [sum(sum(lengths(pairs[i])) for i in step) for step in plan]
    seconds = seconds_of(steps)
    timed = result.note is None and bool(seconds)

    def rate(amounts: list[int]) -> dict[str, float] | None:
        if not timed:
            return None
        steps = summary([x / s for x, s in zip(amounts, seconds)])
        return {"total": sum(amounts) / sum(seconds), **steps}

    computed = [step["tokens"] for step in steps[WARM_UP:]]
    kind = VARIANTS[result.variant].kind if result.variant in VARIANTS else "peer"
    padded = kind == "peer" or "padded" in result.variant
    fills = [step["fill_rate"] for step in steps[WARM_UP:] if step["fill_rate"] is not None]
    return {
        **common,
        "op": OP,
        "variant": result.variant,
        "kind": kind,
        "note": result.note,
        "pairs_per_s": rate([size] * len(seconds)),
        "tokens_per_s": rate(needed[WARM_UP:]),
        "step_s": summary(seconds) if timed else None,
        "x_trl": x_trl(result.ratios, seconds),
        "x_trl_steps": summary(result.ratios) if result.ratios else None,
        "interleaved": result.interleaved,
        "off": result.off,
        "off_fp32": result.check,
        "setup_s": steps[0]["seconds"] if steps else None,
        "tokens": sum(needed[WARM_UP:]) or None,
        "tokens_computed": sum(computed) if computed else None,
        "padding_share": 1 - sum(needed[WARM_UP:]) / sum(computed) if computed and padded else None,
        "fill_rate": sum(fills) / len(fills) if fills else None,
        "peak_mib": steps[-1]["peak_mib"] if timed else None,
        "resident_mib": steps[0]["resident_mib"] if steps else None,
        **{name: [step[name] for step in steps] for name in ("loss", "grad_norm")},
        "logps": [[step[f"logps/{side}"] for side in ("chosen", "rejected")] for step in steps],
    }


def x_trl(ratios: list[float], seconds: list[float]) -> float | None:
    """All of TRL's seconds over all its own: steps of many tokens count for what they take."""
    if not ratios:
        return None
    return sum(ratio * s for ratio, s in zip(ratios, seconds)) / sum(seconds)


def absent() -> Iterator[Result]:
    """The trainers that are not run, and why."""
    for name, (package, why) in ABSENT.items():
        here = "installed, but there is no route to it" if find_spec(package) else "not installed"
        yield Result(name, [], f"not run: {here}; it wants {why}", [], None, None, None)


def line(row: dict) -> str:
    """A row for the eye."""
    name = f"{row['variant']:<28}"
    if row["op"] == LONGEST:
        found = "-" if row["longest"] is None else f"2 x {row['longest']:,} tokens"
        return f"{name} {row['budget_gib']:>4} GiB  {found}  {row['note'] or ''}"
    if row["step_s"] is None:
        return f"{name} {row['note']}"
    losses = " ".join(f"{loss:.4f}" for loss in row["loss"])
    ratio = "" if row["x_trl"] is None else f"  {row['x_trl']:.2f}x"
    return (
        f"{name} {row['step_s']['median']:7.2f} s{ratio}"
        f"  {row['pairs_per_s']['total']:.3g} pairs/s"
        f"  {row['tokens_per_s']['total']:,.0f} tokens/s  peak {row['peak_mib']:,.0f} MiB"
        f"  losses {losses}"
    )


def longest(
    fits: Callable[[int], str | None], *, good: int = 0, most: int = POSITIONS
) -> Iterator[tuple[int | None, str]]:
    """The most tokens of a sequence that fit, in steps of `LONGEST_STEP`; and what ended it.

    `fits` is None where a length trains, else why not. Doubled until one fails, then bisected;
    what is known so far comes after each one that fits. `good` is known to fit.
    """
    bad, why = 0, ""
    while not bad or bad - good > LONGEST_STEP:
        tried = (good + bad) // 2 // LONGEST_STEP * LONGEST_STEP if bad else 2 * good
        tried = tried or LONGEST_STEP
        if tried > most:
            yield good, f"not tried over {most:,} positions"
            return
        if (note := fits(tried)) is None:
            good = tried
            yield good, SO_FAR
        else:
            bad, why = tried, note
    yield good or None, f"{bad:,} does not: {why}"


def longest_rows(
    args: argparse.Namespace,
    job: dict[str, Any],
    start: Callable[[dict[str, Any]], Any],
    name: str,
    budget: int,
    good: int = 0,
) -> Iterator[dict]:
    """A variant and a budget: a row for each longer pair, the last one says why it is the longest.

    Every trial loads anew, with its process's memory capped.
    """
    total_gib = capacity_mib() / 2**10
    common = {**common_fields(args, job["model"], []), "op": LONGEST, "data": "random"}
    vocab = vocabulary(job["model"])
    row = {**common, "variant": name, "kind": VARIANTS[name].kind, "budget_gib": budget}
    # A card of 141 GB has a little less than 141 GiB.
    if budget > 1.05 * total_gib:
        yield {**row, "longest": None, "note": f"not run: the device has {total_gib:.0f} GiB"}
        return

    def fits(n: int) -> str | None:
        response = n - n // 4
        pairs = [random_pair(n // 4, response, response, vocab, seed) for seed in range(2)]
        trial = {
            **job, "variant": name, "pairs": pairs, "batch_size": 1, "max_length": n,
            "max_tokens": 2 * n, "memory_gib": budget, "lora": 16,
            "gradient_checkpointing": True, "activation_offloading": True,
            "mlp_tile_tokens": args.mlp_tile_tokens,
        }  # fmt: skip
        worker = start(trial)
        try:
            first = worker.receive()
        except Failed as error:
            return str(error)
        finally:
            worker.stop()
        # The adapters start as zero, so the policy is the reference.
        return first_refusal(first, None, ROUNDED)

    for found, note in longest(fits, good=good):
        yield {**row, "longest": found, "note": note}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line("bench.step", __doc__)
    add = parser.add_argument
    add("--dataset", help="a file, folder or hub name of preference pairs")
    add(
        "--lengths", help="random pairs in place of --dataset: PROMPT/RESPONSE tokens, or FILE:NAME"
    )
    add("--pairs", type=int, help="only the first so many of the dataset")
    add("--model", help="a folder or hub name (the demo's model)")
    add("--shape", choices=SHAPES, help="in place of --model: random weights of that size")
    add("--variants", help=f"of: {', '.join(VARIANTS)} (all)")
    add("--batch-size", type=int, default=4, help="pairs of a step")
    add("--max-length", type=int, default=1024)
    add("--max-tokens", type=int, help="of fastdpo's micro-batch (all pairs of a step)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    add("--no-autocast", action="store_true", help="compute in the dtype of the weights")
    add("--gradient-checkpointing", action="store_true")
    add("--learning-rate", type=float, default=1e-5)
    add("--steps", type=int, default=8, help="timed steps of each variant, after one warm-up")
    add("--at-once", type=int, default=len(VARIANTS), help="processes alive, memory permitting")
    add("--threads", type=int)
    add("--seed", type=int, default=0)
    add("--trl-attention", help="TRL's attn_implementation (transformers' choice)")
    add("--mlp-tile-tokens", type=int, default=4096, help="fastdpo's, with --longest")
    add("--longest", action="store_true")
    add("--out", type=Path, help="rows are added to this file")
    add("--report", type=Path, nargs="+", metavar="FILE", help="tables and a plot of these rows")
    add("--write-lengths", metavar="FILE:NAME", help="keep the token counts of the dataset's pairs")
    add("--convert", nargs=2, metavar=("SOURCE", "OUT"), help="write a public file as pairs")
    args = parser.parse_args(arguments)
    if args.report or args.convert:
        return args
    if not args.longest and bool(args.dataset) == bool(args.lengths):
        parser.error("give --dataset or --lengths")
    if args.shape and (args.model or args.dataset):
        parser.error("--shape goes without --model and --dataset: its weights know no language")
    unknown = [name for name in names_of(args) if name not in VARIANTS]
    if unknown:
        parser.error(f"no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    for name in ("batch_size", "steps", "at_once"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    args.max_tokens = args.max_tokens or 2 * args.batch_size * args.max_length
    return args


def names_of(args: argparse.Namespace) -> list[str]:
    return args.variants.split(",") if args.variants else list(VARIANTS)


def job_of(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """What every worker is told, but for the pairs and its variant."""
    return {
        "model": model,
        **settings_of(args),
        "beta": 0.1,
        "max_grad_norm": 1.0,
        "seed": args.seed,
        "threads": args.threads or torch.get_num_threads(),
        "lora": None,
        "activation_offloading": False,
        "mlp_tile_tokens": None,
        "memory_gib": None,
    }


def pairs_of(args: argparse.Namespace, model: str) -> list[TokenizedPair]:
    """The pairs of all steps, and of one more: the last would be saved, which no step should be."""
    count = (WARM_UP + args.steps + 1) * args.batch_size
    if args.lengths:
        vocab = vocabulary(model)
        if ":" in args.lengths:
            pairs = read_lengths(args.lengths, vocab, args.max_length, args.seed)
            return sample(pairs, count, args.seed)
        prompt, response = map(int, args.lengths.split("/"))
        seeds = range(args.seed, args.seed + count)
        return [random_pair(prompt, response, response, vocab, seed) for seed in seeds]
    pairs = read_pairs(args.dataset, model, args.max_length)[: args.pairs]
    return sample(pairs, count, args.seed)


def run(
    args: argparse.Namespace, crew: Crew, checks: dict[str, Result] | None = None
) -> Iterator[dict]:
    """Rows, as they are found; `checks` is of `measure`."""
    names = list(LONGEST_VARIANTS) if args.longest else names_of(args)
    if torch.cuda.is_available():
        crew.warm(names if args.longest or checks else [*names, GOLD])
    elif args.longest:
        raise SystemExit("--longest needs a GPU, whose memory it can cap")
    model = model_of(args)
    job = job_of(args, model)
    if args.longest:
        for budget in BUDGETS_GIB:
            for name in names:
                yield from longest_rows(args, job, crew.start, name, budget)
        return
    job["pairs"] = pairs_of(args, model)
    common = common_fields(args, model, job["pairs"])
    results = measure(job, names, args.steps, at_once=args.at_once, start=crew.start, checks=checks)
    for result in chain(results, absent()):
        yield row_of(result, job, common)


def model_of(args: argparse.Namespace) -> str:
    from fastdpo.model.load import demo_model

    return shape_model(args.shape) if args.shape else args.model or demo_model()


def main(arguments: list[str] | None = None) -> int:
    """Measure and write, or report, or convert."""
    args = parse(arguments)
    if args.convert:
        source, out = args.convert
        print(f"{convert(source, Path(out))} pairs in {out}")
        return 0
    if args.report:
        plots = [path.with_suffix(".svg") for path in args.report]
        for path, picture in zip(args.report, plots):
            plot(load([path]), [picture])
        print(markdown(load(args.report), [path.name for path in plots]))
        return 0
    if args.write_lengths:
        model = model_of(args)
        pairs = read_pairs(args.dataset, model, args.max_length)
        source = f"{Path(args.dataset).name}, in tokens of {Path(model).name}"
        write_lengths(args.write_lengths, pairs, source)
        return 0
    started = time.perf_counter()
    with crew_of() as crew:
        for row in run(args, crew):
            print(line(append(args.out, row)), flush=True)
    print(f"{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
