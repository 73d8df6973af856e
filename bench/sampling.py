"""How fast does each sampler draw, and does it draw from the model's distribution?

    python -m bench.sampling --model MODEL --out bench/results/sampling-cpu.jsonl

Correctness comes first, and a sampler that fails it gets a row that says so, and no time:

- greedy responses against those of plain `generate`, a prompt at a time, without padding: how many
  are equal token for token, and where they part, by how much the model's fp32 logits of the two
  tokens differ. Rounding may part them at a tie (at most `TIES` by dtype), nothing else may.
- surprise: over all sampled tokens, the sum of -log p(token) minus the entropy of what it was drawn
  from, in standard deviations of that sum. It is a martingale, so its mean is 0 and its
  variance 1 for samples of the model at temperature 1, however long the responses are. A hidden
  top-k or another temperature moves it by many.

Then whole stages of sampling are timed, files and all, the samplers taking turns.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

import fastdpo
from fastdpo.data.records import Prompt
from fastdpo.data.rendering import render_prompt
from fastdpo.data.rows import prompt_rows, read_rows
from fastdpo.model.load import load_causal_lm, load_tokenizer
from fastdpo.sample.config import BACKENDS, SampleConfig
from fastdpo.sample.generate import GenerateSampler
from fastdpo.sample.sampler import Sampler
from fastdpo.sample.stage import open_sampler, sample
from fastdpo.storage import read_json, read_parts

from .rows import append, command_line, this_device, where
from .tables import grouped, markdown_table
from .turns import Row, each, summary, take_turns

OP = "sampling"
TIES = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
Z_LIMIT = 4.0


@torch.no_grad()
def surprise(model: Any, rows: list[dict[str, Any]]) -> float:
    """The z of responses that claim to be samples of the model at temperature 1; see the top.

    `rows` are candidates with `prompt_ids` and `response_ids`.
    """
    excess = variance = 0.0
    for row in rows:
        prompt, response = row["prompt_ids"], row["response_ids"]
        ids = torch.tensor([prompt + response], device=model.device)
        logits_NV = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
        logp_NV = logits_NV.log_softmax(-1)
        p_NV = logp_NV.exp()
        entropy_N = -(p_NV * logp_NV).sum(-1)
        surprise_N = -logp_NV.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
        excess += (surprise_N - entropy_N).sum().item()
        variance += ((p_NV * logp_NV.square()).sum(-1) - entropy_N.square()).sum().item()
    return excess / variance**0.5


@torch.no_grad()
def parting(model: Any, prompt: list[int], plain: list[int], other: list[int]) -> float | None:
    """By how much the logits differ where two greedy responses part; None where they don't."""
    if plain == other:
        return None
    at = next((i for i, (a, b) in enumerate(zip(plain, other)) if a != b), None)
    if at is None:  # one is the beginning of the other, and yet it didn't end there
        return float("inf")
    ids = torch.tensor([prompt + plain[:at]], device=model.device)
    logits_V = model(input_ids=ids).logits[0, -1].float()
    return (logits_V[plain[at]] - logits_V[other[at]]).abs().item()


class Study:
    """One model, its prompts and what is drawn."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = load_tokenizer(args.model)
        self.prompts: list[Prompt] = prompt_rows(read_rows(args.prompts))[: args.limit]
        self.prompt_ids = [
            render_prompt(row.prompt, self.tokenizer, as_chat=True) for row in self.prompts
        ]
        self.device = this_device()
        self.exact = load_causal_lm(args.model, dtype=torch.float32).to(self.device).eval()
        self.config = SampleConfig(
            num_samples=args.num_samples,
            max_new_tokens=args.max_new_tokens,
            batch_prompts=args.batch_prompts,
            dtype=args.dtype,
            server_command=args.server_command,
        )
        self.greedy = replace(self.config, temperature=0.0, num_samples=1)

    def open(self, stack: ExitStack, backend: str, config: SampleConfig) -> Sampler:
        url = self.args.server_url if backend == "server" else None
        longest = max(map(len, self.prompt_ids)) + self.args.max_new_tokens
        return stack.enter_context(
            open_sampler(
                self.args.model,
                self.tokenizer,
                replace(config, backend=backend, server_url=url),
                max_length=longest,
            )
        )

    def plain(self) -> list[list[int]]:
        """Greedy responses of `generate`, a prompt at a time, in the tested dtype."""
        model = load_causal_lm(self.args.model, dtype=getattr(torch, self.args.dtype))
        sampler = GenerateSampler(model.to(self.device), self.tokenizer, self.greedy)
        found = [sampler.generate([ids], 1, seed=0)[0][0].ids for ids in self.prompt_ids]
        sampler.close()
        return found

    def stage(self, sampler: Sampler, config: SampleConfig, seed: int) -> tuple[list, dict]:
        """Rows and throughput of one whole stage in a folder of its own."""
        with tempfile.TemporaryDirectory() as folder:
            out, config = Path(folder), replace(config, seed=seed)
            sample(
                sampler, self.tokenizer, self.prompts, config, out, round_index=1, progress=False
            )
            return read_parts(out), read_json(out / "throughput.json")

    def check(self, backend: str, plain: list[list[int]]) -> dict[str, Any]:
        """Errors of a sampler, and whether they are too large to be timed."""
        with ExitStack() as stack:
            rows, _ = self.stage(self.open(stack, backend, self.greedy), self.greedy, 0)
        gaps = [
            parting(self.exact, ids, a, row["response_ids"])
            for ids, a, row in zip(self.prompt_ids, plain, rows)
        ]
        parted = [gap for gap in gaps if gap is not None]
        with ExitStack() as stack:
            rows, _ = self.stage(self.open(stack, backend, self.config), self.config, 0)
        z = surprise(self.exact, rows)
        note = None
        if parted and max(parted) > TIES[self.args.dtype]:
            note = "greedy responses differ from those of generate"
        elif abs(z) > Z_LIMIT:
            note = "the samples aren't of the model's distribution"
        return {
            "greedy_equal": len(gaps) - len(parted),
            "greedy_of": len(gaps),
            "greedy_gap": max(parted, default=None),
            "surprise_z": z,
            "note": note,
        }


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each sampler, errors first; those that pass are timed in turns."""
    study = Study(args)
    plain = study.plain()
    rows: dict[str, Row] = {backend: {"note": None} for backend in args.backends.split(",")}
    for backend, found in each(rows, lambda x: study.check(x, plain)):
        rows[backend] |= found
    seeds = {backend: count() for backend in rows}
    with ExitStack() as stack:
        samplers = dict(each(rows, lambda x: study.open(stack, x, study.config)))

        def stage(backend: str) -> dict[str, Any]:
            return study.stage(samplers[backend], study.config, next(seeds[backend]))[1]

        stages = {backend: [warm_up] for backend, warm_up in each(rows, stage)}
        take_turns(rows, stages, stage, args.rounds)
    for backend in [x for x in stages if rows[x]["note"] is None]:
        timed = stages[backend][1:]
        for name in ("samples_per_second", "tokens_per_second", "seconds"):
            values = [stage[name] for stage in timed]
            rows[backend][name] = {**summary(values), "max": max(values)}
        rows[backend]["tokens_per_sample"] = sum(x["tokens"] for x in timed) / sum(
            x["samples"] for x in timed
        )
    common = {
        **where(study.device, args.commit),
        "op": OP,
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "prompts": len(study.prompts),
        "prompt_tokens": sum(map(len, study.prompt_ids)) / len(study.prompt_ids),
        "rounds": args.rounds,
    }
    drawn = ("num_samples", "max_new_tokens", "batch_prompts")
    common |= {name: getattr(args, name) for name in drawn}
    return [{**common, "backend": backend, **row} for backend, row in rows.items()]


def line(row: dict[str, Any]) -> str:
    """A row for the eye; the file has everything."""
    if row.get("samples_per_second") is None:
        return f"{row['backend']:<12} {row['note']}"
    gap = row["greedy_gap"]
    return (
        f"{row['backend']:<12} {row['samples_per_second']['median']:8.2f} samples/s "
        f"{row['tokens_per_second']['median']:9.1f} tokens/s   greedy {row['greedy_equal']}/"
        f"{row['greedy_of']}{'' if gap is None else f', gap {gap:.1e}'}   "
        f"surprise {row['surprise_z']:+.1f}"
    )


def markdown(rows: list[dict[str, Any]], plots: list[str]) -> str:
    """A table for each machine, model and dtype, the fastest sampler first."""
    parts = []
    for found in grouped(rows, ("device", "threads", "model", "dtype", "git")).values():
        row = found[0]
        threads = "" if row["device_type"] == "cuda" else f", {row['threads']} threads"
        versions = ", ".join(
            f"{name} {row['versions'][name]}" for name in ("torch", "transformers")
        )
        parts.append(
            f"**{row['model']}, {row['dtype']}: {row['prompts']} prompts of "
            f"{row['prompt_tokens']:.0f} tokens on average, {row['num_samples']} responses each of "
            f"at most {row['max_new_tokens']} tokens, {row['batch_prompts']} prompts a part** on "
            f"{row['device']}{threads}, median of {row['rounds']} interleaved stages ({versions}; "
            f"{(row['git'] or 'no commit')[:12]}; {row['utc'][:10]})"
        )
        titles = ["sampler", "samples/s (least to most)", "tokens/s"]
        titles += ["greedy, equal", "surprise, z"]
        body = [cells(x) for x in sorted(found, key=speed_of, reverse=True)]
        parts.append(markdown_table(titles, ["---", *["---:"] * 4], body))
    return "\n\n".join(parts)


def speed_of(row: dict[str, Any]) -> float:
    return (row.get("samples_per_second") or {"median": 0.0})["median"]


def cells(row: dict[str, Any]) -> list[str]:
    speed, tokens = row.get("samples_per_second"), row.get("tokens_per_second")
    if speed is None or tokens is None:
        return [row["backend"], f"not measured: {row['note']}", "", "", ""]
    return [
        row["backend"],
        f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})",
        f"{tokens['median']:.0f}",
        f"{row['greedy_equal']} of {row['greedy_of']}",
        f"{row['surprise_z']:+.1f}",
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line("bench.sampling", __doc__)
    add = parser.add_argument
    demo = Path(fastdpo.__file__).parent / "recipes" / "demo_prompts.jsonl"
    add("--model", required=True, help="folder or hub name")
    add("--prompts", default=str(demo), help="the demo's by default")
    add("--limit", type=int, default=24, help="prompts")
    add("--num_samples", type=int, default=4)
    add("--max_new_tokens", type=int, default=64)
    add("--batch_prompts", type=int, default=8, help="prompts a part")
    add("--rounds", type=int, default=3, help="timed stages of each")
    add("--backends", default="generate,continuous", help=f"of {', '.join(BACKENDS[1:])}")
    add("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32", choices=TIES)
    add("--server_url", help="of a running server")
    add("--server_command", default=SampleConfig.server_command)
    add("--threads", type=int)
    add("--out", type=Path, help="rows are appended to this .jsonl")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    for row in run(args):
        print(line(append(args.out, row)), flush=True)


if __name__ == "__main__":
    main()
