"""`python -m bench.lists`: a list of responses at once against its pairs one by one.

    python -m bench.lists --shape llama-3.2-1b --out lists.jsonl
    python -m bench.lists --report lists.jsonl

A prompt has `--responses` responses, the first of which is the best. What is timed is forward and
backward through the whole model and the loss, alpha 0, without an optimizer: of all responses as
one list, whose prompt is computed once, and of the pairs of the best and each other response.
`x pairs` is the time of the pairs one by one over a variant's, round by round.

Before any time is taken every variant is run in fp32: its loss and the gradient of every weight
have to be those of another way to the same comparisons. For the list of DPO's losses of the best
against each other these are the pairs one by one, for other objectives of lists the same loss
without a shared prompt. A variant that differs is a row that says so, without a time.

Weights and tokens are random. Without `--shape` it is llama-3.2-1b on a GPU and a tiny model, which
says nothing about speed, on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdpo.data.batch import pack_pairs
from fastdpo.data.examples import TokenizedList, TokenizedPair
from fastdpo.loss.examples import BaseObjective
from fastdpo.loss.lists import ListObjective, lipo_lambda, plackett_luce, sum_over_better
from fastdpo.loss.objectives import lr_dpo
from fastdpo.model.prepare import packed_loss, prepare_model

from .rows import append, command_line, load, this_device, where
from .step_pairs import SHAPES, random_model
from .tables import grouped, latest_build, markdown_table, number, setting
from .turns import Row, attempt, each, ratios, summary, take_turns, timed_ms, warm_ms

OP = "lists"
BETA = 0.1
WANTED = 3.0  # times faster than the pairs one by one, for 8 responses of 128 to a prompt of 512
LIMITS = {"loss_off": 1e-5, "grad_off": 1e-4}  # relative, in fp32
PAIRS = "pairs one by one"


class Way(NamedTuple):
    """How a prompt's responses are trained on: micro-batches of examples."""

    name: str
    objective: BaseObjective
    batches: list[list[Any]]
    comparisons: int
    layout: str = "shared"

    @property
    def tokens(self) -> int:
        return sum(x.num_tokens(self.layout) for batch in self.batches for x in batch)


def ways(args: argparse.Namespace, vocab: int) -> dict[str, tuple[Way, Way]]:
    """Each way, and the one that it has to agree with."""
    n, (prompt, response) = args.responses, args.lengths
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(3, vocab, (prompt + n * response,), generator=generator)
    head, *answers = ids[:prompt].tolist(), *ids[prompt:].view(n, response).tolist()
    best, *others = answers
    ranked = TokenizedList(head, answers, [1 - i / n for i in range(n)])
    one_best = TokenizedList(head, answers, [1.0, *[0.0] * (n - 1)])
    pairs = [TokenizedPair(head, best, other) for other in others]
    dpo, all_pairs = lr_dpo(BETA), n * (n - 1) // 2
    dpo_of_best = ListObjective("the best against each other", sum_over_better, BETA)
    apart = Way(PAIRS, dpo, [[pair] for pair in pairs], n - 1)
    lists = {
        "list, DPO of the best and each other": (dpo_of_best, one_best, n - 1),
        "list, lipo_lambda": (lipo_lambda(BETA), ranked, all_pairs),
        "list, plackett_luce": (plackett_luce(BETA), ranked, all_pairs),
    }
    found = {PAIRS: (apart, apart), "pairs at once": (apart._replace(batches=[pairs]), apart)}
    for name, (objective, example, comparisons) in lists.items():
        way = Way(name, objective, [[example]], comparisons)
        gold = apart if objective is dpo_of_best else way._replace(layout="packed")
        found[name] = way, gold
    return found


class Trainer:
    """A model, and the reference's log-probs of all responses: near its own."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        model = random_model(args.shape, torch.float32)
        self.model: nn.Module = prepare_model(model, layout="shared", impl=args.impl)
        self.bf16, self.of_response = False, {}

    def round_to(self, dtype: torch.dtype) -> None:
        """Weights in another dtype, and bf16 under autocast; buffers stay as they are."""
        for weight in self.model.parameters():
            weight.data, weight.grad = weight.data.to(dtype), None
        self.bf16 = dtype == torch.bfloat16

    def loss(self, way: Way, *, backward: bool = True) -> Tensor:
        """Sum of the losses of a way's examples; gradients are added up."""
        losses = []
        for examples in way.batches:
            batch = pack_pairs(examples, range(len(examples)), layout=way.layout).to(self.device)
            responses = [tuple(ids) for x in examples for ids in x.responses]
            ref = [self.of_response.get(ids, 0.0) for ids in responses]
            ref_logp_S = torch.tensor(ref, dtype=torch.float64, device=self.device)
            kind = self.device.type
            rounded = torch.autocast(kind, torch.bfloat16, enabled=self.bf16, cache_enabled=False)
            with rounded, nullcontext() if backward else torch.no_grad():
                found = packed_loss(
                    self.model, batch, ref_logp_S, objective=way.objective,
                    num_pairs=1, impl=self.args.impl,
                )  # fmt: skip
            if backward:
                found.loss.backward()
            elif not self.of_response:
                noise = torch.randn(len(ref), generator=torch.Generator().manual_seed(1))
                near = found.logp_S.double().cpu() + 5 * noise
                self.of_response = dict(zip(responses, near.tolist()))
            losses.append(found.loss.detach().double())
        return torch.stack(losses).sum()

    def gradients(self, way: Way) -> tuple[float, list[Tensor]]:
        self.model.zero_grad()
        loss = self.loss(way).item()
        return loss, [w.grad for w in self.model.parameters() if w.grad is not None]

    def step(self, way: Way) -> None:
        self.model.zero_grad()
        self.loss(way)


def off(trainer: Trainer, way: Way, gold: Way) -> dict[str, float]:
    """Relative errors of the loss and of the gradient of all weights together."""
    loss, found = trainer.gradients(way)
    wanted_loss, wanted = trainer.gradients(gold)
    size = sum(g.double().square().sum().item() for g in wanted)
    error = sum((g - w).double().square().sum().item() for g, w in zip(found, wanted, strict=True))
    return {
        "loss_off": abs(loss - wanted_loss) / abs(wanted_loss),
        "grad_off": (error / size) ** 0.5,
    }


def run(args: argparse.Namespace) -> Iterator[Row]:
    """A row a way, after all are timed."""
    device = this_device()
    trainer = Trainer(args, device)
    found = ways(args, trainer.model.config.vocab_size)  # type: ignore[union-attr]
    common = {
        **where(device, args.commit), "op": OP, "model": args.shape, "dtype": args.dtype,
        "prompt": args.lengths[0], "response": args.lengths[1], "responses": args.responses,
    }  # fmt: skip
    rows: dict[str, Row] = {}
    for name, (way, _) in found.items():
        row = {**common, "variant": name, "tokens": way.tokens, "comparisons": way.comparisons}
        row |= {"micro_batches": len(way.batches), "note": None, "time_ms": None, "x_pairs": None}
        rows[name] = {**row, **dict.fromkeys(LIMITS), "peak_mib": None}
    trainer.loss(found["list, lipo_lambda"][0], backward=False)  # the reference
    for name, (way, gold) in found.items():
        errors = attempt(rows[name], lambda way=way, gold=gold: off(trainer, way, gold))
        if errors is not None:
            rows[name] |= errors
            wrong = [key for key, error in errors.items() if not error <= LIMITS[key]]
            if wrong:
                rows[name]["note"] = ", ".join(f"{key} is over {LIMITS[key]:g}" for key in wrong)
    trainer.round_to(getattr(torch, args.dtype))
    steps = {name: lambda way=way: trainer.step(way) for name, (way, _) in found.items()}
    measure(rows, steps, args.rounds, device)
    yield from rows.values()


def measure(
    rows: dict[str, Row], steps: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> None:
    """Times and peaks of the rows without a note, in turns."""

    def warm_up(name: str) -> float:
        if device.type != "cuda":
            return warm_ms(steps[name], device)
        warm_ms(steps[name], device)
        torch.cuda.reset_peak_memory_stats()
        ms = timed_ms(steps[name], device)
        rows[name]["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        return ms

    samples = {name: [ms] for name, ms in each(rows, warm_up)}
    take_turns(rows, samples, lambda name: timed_ms(steps[name], device), rounds)
    timed = {name: ms[1:] for name, ms in samples.items() if rows[name]["note"] is None}
    for name, ms in timed.items():
        rows[name]["time_ms"] = summary(ms)
        if PAIRS in timed:
            rows[name]["x_pairs"] = summary(ratios(timed[PAIRS], ms))


def line(row: Row) -> str:
    """A row for the eye."""
    if row["note"]:
        return f"{row['variant']:<38} {row['note']}"
    x = "" if row["x_pairs"] is None else f"{row['x_pairs']['median']:6.2f}x"
    return (
        f"{row['variant']:<38} {row['time_ms']['median']:9.1f} ms {x}  {row['tokens']:6,} tokens  "
        f"{row['comparisons']:2} comparisons  peak {number(row['peak_mib'], ',.0f') or '-'} MiB"
        f"  off: loss {row['loss_off']:.1e}, gradient {row['grad_off']:.1e}"
    )


def markdown(rows: list[Row], plots: list[str]) -> str:
    """A table for each model and sizes."""
    rows, parts = latest_build(rows), []
    key = ("device", "model", "dtype", "prompt", "response", "responses")
    titles = ["", "comparisons", "tokens", "ms", "x pairs one by one", "peak, MiB"]
    titles += ["loss off in fp32", "gradient off in fp32"]
    for (_, model, dtype, prompt, response, count), found in grouped(rows, key).items():
        what = f"{count} responses of {response} tokens to a prompt of {prompt}, {model}, {dtype}"
        body = []
        for row in {row["variant"]: row for row in found}.values():
            cells = [row["variant"], str(row["comparisons"]), f"{row['tokens']:,}"]
            if row["note"]:
                body.append([*cells, row["note"], *[""] * 4])
                continue
            ratio = row["x_pairs"] and row["x_pairs"]["median"]
            cells += [number(row["time_ms"]["median"], ".1f"), number(ratio, ".2f")]
            cells += [number(row["peak_mib"], ",.0f")]
            body.append([*cells, *(number(row[name], ".1e") for name in LIMITS)])
        table = markdown_table(titles, ["---", *["---:"] * (len(titles) - 1)], body)
        parts += [f"**Forward and backward of {what}** {setting(found[-1])}", table]
    return "\n\n".join(parts)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    on_gpu = this_device().type == "cuda"
    parser = command_line("bench.lists", __doc__)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama-3.2-1b" if on_gpu else "tiny")
    add("--responses", type=int, default=8)
    add("--lengths", default="512/128", help="PROMPT/RESPONSE tokens")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if on_gpu else "float32")
    add("--impl", default="auto", help="of the head")
    add("--rounds", type=int, default=7)
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="rows are added to this file")
    add("--report", type=Path, metavar="FILE", help="a table of these rows")
    args = parser.parse_args(arguments)
    try:
        args.lengths = tuple(map(int, args.lengths.split("/")))
        fits = len(args.lengths) == 2 and min(args.lengths) >= 1
    except ValueError:
        fits = False
    if not fits:
        parser.error("--lengths must be PROMPT/RESPONSE, as 512/128")
    if args.responses < 3:
        parser.error("--responses must be at least 3: two are a pair")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measure and write, or report; 1 where a check failed."""
    args = parse(arguments)
    if args.report:
        print(markdown(load([args.report]), []))
        return 0
    started = time.perf_counter()
    rows = [append(args.out, row) for row in run(args)]
    print("\n".join(map(line, rows)))
    print(f"{time.perf_counter() - started:.0f} s")
    return int(any(row["note"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
