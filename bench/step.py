"""`python -m bench.step`: whole optimizer steps, fastdpo's trainer against TRL's DPOTrainer.

    python -m bench.step --dataset pairs.jsonl --out mine.jsonl
    python -m bench.step --report mine.jsonl
    python -m bench.step --convert dpo_en_demo.json pairs.jsonl
    python -m bench.step --longest --shape llama-3-8b --out longest.jsonl
    python -m bench.step --shape llama-3.2-1b --lengths bench/lengths.json:long --out long.jsonl

Each variant trains in a process of its own, on the same model, the same pairs in the same order and
the same dtype of weights, with AdamW of the same settings; alpha is 0, where the losses are one
function. The variants take turns of four steps. Steps differ in length, so a speed is that of all
timed steps together, and `x trl` all of TRL's seconds over all of a variant's.

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
import contextlib
import json
import math
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdpo.data.batch import TokenizedPair
from fastdpo.data.rows import preference_rows, read_rows
from fastdpo.data.tokenize import tokenize_dataset

from .measure import OUT_OF_MEMORY, installed, release, summary, where
from .report import bars, grouped, load, markdown_table, number
from .step_worker import GOLD, STEP, STOP, VARIANTS, planned
from .step_worker import main as run_worker

BEGIN, END = "<!-- step:begin -->", "<!-- step:end -->"
OP, LONGEST = "step", "longest pair"
DTYPES = ("bfloat16", "float32")
WARM_UP = 1
TURN = 4  # steps; the first after others had theirs finds nothing of its own in caches
YARDSTICK = "trl"
# Limits of a loss's distance, and of relative ones of log-probs and gradient norms. In fp32 they
# are over 20 times what tests find between TRL and fastdpo. In bf16 every log-prob of hundreds in a
# sum was rounded to 8 bits somewhere, and so was every update of the weights.
EXACT = {"loss": 2e-4, "logps": 1e-4, "grad_norm": 1e-3}
ROUNDED = {"loss": 1e-1, "logps": 1e-2, "grad_norm": 1e-1}
CHECK_STEPS, CHECK_PAIRS = 1, 2  # of the comparison in fp32, after the warm-up
LOG_2_LIMIT = 1e-3
BUDGETS_GIB = (24, 48, 80, 141)
LONGEST_STEP = 1024
SO_FAR = "so far"  # the note of a search that has not ended
LONGEST_VARIANTS = ("trl", "fastdpo")
PATIENCE_S = 60  # for a process to clean up, or to end
SPARE = 0.9  # share of the memory that waiting processes may fill
# Trainers that go in no environment with TRL 1.16, and what their pyproject.toml asks for.
ABSENT = {
    "LLaMA-Factory": ("llamafactory", "trl<=0.24.0 and transformers<=4.57.1 (00577a85)"),
    "open-instruct": ("open_instruct", "torch==2.7.0 and numpy<2 (002bde10)"),
}
# From the models' published configurations, with random weights and positions without a limit.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2-1b": ("LlamaConfig", dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )),
    "llama-3-8b": ("LlamaConfig", dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )),
    "qwen2.5-0.5b": ("Qwen2Config", dict(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )),
    "qwen2.5-7b": ("Qwen2Config", dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )),
}  # fmt: skip
POSITIONS = 2**22
LENGTHS_KEPT = 500  # pairs of a dataset whose token counts go into a file


# --- models and pairs ---------------------------------------------------------------------------


def shape_model(name: str) -> str:
    """A folder with random bfloat16 weights of a shape, and a tokenizer that only pads."""
    import transformers
    from tokenizers import Tokenizer, models

    folder = Path.home() / ".cache" / "fastdpo" / "bench" / name
    if (folder / "config.json").is_file():
        return str(folder)
    config_class, numbers = SHAPES[name]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, config_class)(
        **numbers, **special, max_position_embeddings=POSITIONS
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
    )  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Whole or absent, without checksums: every load of many would compute them again.
    unfinished = folder.with_name(f".{name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    del model
    release()  # the device is the workers'
    return str(folder)


def as_preference(row: dict[str, Any]) -> dict[str, Any]:
    """A row of LLaMA-Factory's or of dove's files in the format of messages; others as they are."""
    if "conversations" in row:
        roles = {"system": "system", "human": "user", "gpt": "assistant"}

        def message(x: dict[str, str]) -> dict[str, str]:
            return {"role": roles[x["from"]], "content": x["value"]}

        sides = {name: [message(row[name])] for name in ("chosen", "rejected")}
        return {"prompt": list(map(message, row["conversations"])), **sides}
    if "i_chosen" in row:
        if row["i_chosen"] != row["i_reject"]:
            raise ValueError("the two responses answer different prompts")
        sides = {"chosen": row["r_chosen"], "rejected": row["r_reject"]}
        answers = {k: [{"role": "assistant", "content": text}] for k, text in sides.items()}
        return {"prompt": [{"role": "user", "content": row["i_chosen"]}], **answers}
    return row


def read_pairs(dataset: str, model: str, max_length: int) -> list[TokenizedPair]:
    """The token ids of a dataset's pairs, by the rules of `fastdpo train` (and of TRL)."""
    from dataclasses import replace

    from fastdpo.model.load import load_tokenizer

    rows = read_rows(dataset)
    rows = replace(rows, rows=list(map(as_preference, rows.rows)))
    found = tokenize_dataset(
        preference_rows(rows), load_tokenizer(model), max_length=max_length, progress=False
    )
    return found.pairs


def random_pair(prompt: int, chosen: int, rejected: int, vocab: int, seed: int) -> TokenizedPair:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (prompt + chosen + rejected,), generator=generator).tolist()
    middle = prompt + chosen
    return TokenizedPair(ids[:prompt], ids[prompt:middle], ids[middle:])


def write_lengths(where_to: str, pairs: list[TokenizedPair], source: str) -> None:
    """Under a name of a file, the token counts of pairs: prompt, chosen, rejected."""
    path, name = lengths_file(where_to)
    counts = [
        [len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)]
        for p in sample(pairs, min(len(pairs), LENGTHS_KEPT), seed=0)
    ]
    found = json.loads(path.read_text()) if path.exists() else {}
    found[name] = {"of": source, "lengths": counts}
    lines = (f'"{key}": {json.dumps(value)}' for key, value in found.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read_lengths(where_from: str, vocab: int, max_length: int, seed: int) -> list[TokenizedPair]:
    """Random pairs with the token counts of a file, those that fit."""
    path, name = lengths_file(where_from)
    counts = json.loads(path.read_text())[name]["lengths"]
    kept = [x for x in counts if x[0] + max(x[1:]) <= max_length]
    return [random_pair(p, c, r, vocab, seed + i) for i, (p, c, r) in enumerate(kept)]


def lengths_file(text: str) -> tuple[Path, str]:
    path, _, name = text.rpartition(":")
    return Path(path), name


def sample(pairs: list[TokenizedPair], count: int, seed: int) -> list[TokenizedPair]:
    """So many pairs in random order, all of them before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(pairs), generator=generator).tolist()
    return [pairs[i] for i in order[:count]]


def vocabulary(model: str) -> int:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config().vocab_size


# --- workers ------------------------------------------------------------------------------------


class Failed(Exception):
    """A worker gave up; the message is why."""


class Worker:
    """The parent's end: `step` lets the other side train one step and returns what it measured."""

    def __init__(self, variant: str, folder: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        context = multiprocessing.get_context("spawn")
        self.conn, theirs = context.Pipe()
        job = theirs, variant, str(self.folder / "log")
        self.process = context.Process(target=run_worker, args=job)
        self.process.start()
        theirs.close()  # so that its death is the end of the pipe
        self.alive = True

    def begin(self, job: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # receive says what happened
            self.conn.send({**job, "folder": tempfile.mkdtemp(dir=self.folder)})

    def receive(self) -> dict[str, Any]:
        try:
            found = self.conn.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            killed = f"{OUT_OF_MEMORY}, probably: killed" if code == -9 else f"exit code {code}"
            raise Failed(killed) from None
        if "failed" in found:
            raise Failed(found["failed"])
        return found

    def step(self) -> dict[str, Any]:
        with contextlib.suppress(OSError):
            self.conn.send(STEP)
        return self.receive()

    def stop(self) -> None:
        """End the job; a process that cannot take another ends too."""
        clean = False
        with contextlib.suppress(OSError, EOFError):
            self.conn.send(STOP)
            while not clean and self.conn.poll(PATIENCE_S):
                clean = self.conn.recv().get("clean", False)
        if not clean:
            self.close()

    def close(self) -> None:
        self.alive = False
        self.conn.close()
        self.process.join(PATIENCE_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


class Crew:
    """A process for each variant, started before it has a job and kept after it."""

    def __init__(self, folder: Path, worker: Callable[[str, Path], Any] = Worker) -> None:
        self.folder, self.worker = folder, worker
        self.workers: dict[str, Any] = {}

    def warm(self, variants: Iterable[str]) -> None:
        """Let processes import what they need, side by side."""
        for name in variants:
            if name not in self.workers or not self.workers[name].alive:
                self.workers[name] = self.worker(name, self.folder)

    def start(self, job: dict[str, Any]) -> Any:
        """Give a variant's process its job, without waiting for it."""
        self.warm([job["variant"]])
        worker = self.workers[job["variant"]]
        worker.begin(job)
        return worker

    def close(self) -> None:
        for worker in self.workers.values():
            if worker.alive:
                worker.close()


class Result(NamedTuple):
    """What is known of a variant: its steps, the warm-up first, and why it has no speed."""

    variant: str
    steps: list[dict[str, Any]]
    note: str | None
    ratios: list[float]  # of TRL's seconds to its own, for each step
    interleaved: bool  # with TRL, in one group
    off: dict[str, float]  # the largest distances from the yardstick's steps
    check: dict[str, float] = {}  # noqa: RUF012 - the same in fp32


def measure(
    job: dict[str, Any],
    variants: Sequence[str],
    rounds: int,
    *,
    at_once: int,
    start: Callable[[dict[str, Any]], Any],
    checks: dict[str, Result] | None = None,
) -> Iterator[Result]:
    """Check, then time, as many at once as memory has room for; yields groups as they end.

    `checks` are the results in fp32 of a job before on the same model, and become this one's.
    """
    checks = {} if checks is None else checks
    gold = None
    if limits_of(job) is EXACT:
        gold = first_steps(job, start) if variants else None
    elif missing := [name for name in variants if name not in checks]:
        small = check_job(job)
        first = first_steps(small, start)
        for result in in_groups(small, missing, CHECK_STEPS, first, at_once=at_once, start=start):
            checks[result.variant] = result
            said = result.note or "agrees"
            print(f"... {result.variant}: in fp32 {said}", file=sys.stderr, flush=True)
    wrong = [name for name in variants if name in checks and checks[name].note is not None]
    for name in wrong:
        yield checks[name]._replace(steps=[], note=f"in fp32: {checks[name].note}", off={})
    right = [name for name in variants if name not in wrong]
    for result in in_groups(job, right, rounds, gold, at_once=at_once, start=start):
        yield result._replace(check=checks.get(result.variant, result).off)


def in_groups(
    job: dict[str, Any],
    variants: Sequence[str],
    rounds: int,
    gold: dict[str, Any] | None,
    *,
    at_once: int,
    start: Callable[[dict[str, Any]], Any],
) -> Iterator[Result]:
    """Where not all fit, each group has the first variant again, as the yardstick of its ratios.

    What runs out of memory beside others is tried by itself.
    """
    yardstick = YARDSTICK if YARDSTICK in variants else next(iter(variants), YARDSTICK)
    waiting = sorted(variants, key=lambda name: name != yardstick)
    known: list[dict[str, Any]] = []  # the yardstick's steps
    while waiting:
        again = [yardstick] if known and at_once > 1 else []
        waiting = again + waiting
        group = Group(job, gold, start)
        while waiting and (room := group.room(at_once)):
            group.add(waiting[:room])
            waiting = waiting[room:]
        group.run(rounds)
        for result in group.results(yardstick, known):
            if result.variant in again:
                continue
            if result.note == OUT_OF_MEMORY and len(group.steps) > 1:
                # It may fit by itself; from then on nothing is beside another.
                at_once, waiting = 1, [*waiting, result.variant]
                continue
            if result.variant == yardstick and result.note is None:
                known = result.steps
            yield result


def check_job(job: dict[str, Any]) -> dict[str, Any]:
    """The job in fp32, with few pairs of few tokens."""
    count = (WARM_UP + CHECK_STEPS + 1) * CHECK_PAIRS
    short = sorted(job["pairs"], key=lambda pair: sum(lengths(pair)))
    exact = {"dtype": "float32", "autocast": False, "batch_size": CHECK_PAIRS}
    return {**job, **exact, "pairs": short[:count]}


def first_steps(
    job: dict[str, Any], start: Callable[[dict[str, Any]], Any]
) -> dict[str, Any] | None:
    """What the first step should give; None where there is no room to find out."""
    worker = start({**job, "variant": GOLD})
    try:
        return worker.receive()
    except Failed as error:
        print(f"not compared with {GOLD}: {error}", flush=True)
        return None
    finally:
        worker.stop()


class Group:
    """Variants that are alive together and take turns."""

    def __init__(
        self,
        job: dict[str, Any],
        gold: dict[str, Any] | None,
        start: Callable[[dict[str, Any]], Any],
    ) -> None:
        self.job, self.gold, self.start = job, gold, start
        self.workers: dict[str, Any] = {}
        self.steps: dict[str, list[dict[str, Any]]] = {}
        self.notes: dict[str, str | None] = {}
        self.capacity_mib = capacity_mib()

    def add(self, names: Sequence[str]) -> None:
        """Start variants side by side, to their warm-up; one that fails or differs is stopped."""
        started = {name: self.start({**self.job, "variant": name}) for name in names}
        for name, worker in started.items():
            self.steps[name], self.notes[name] = [], None
            try:
                self.steps[name].append(worker.receive())
            except Failed as error:
                self.notes[name] = str(error)
            else:
                first = self.steps[name][0]
                self.notes[name] = first_refusal(first, self.gold, limits_of(self.job))
            self._tell(name, self.notes[name] or "loaded, first")
            if self.notes[name] is None:
                self.workers[name] = worker
            else:
                worker.stop()

    def _tell(self, name: str, what: str) -> None:
        seconds = ", ".join(f"{step['seconds']:.2f} s" for step in self.steps[name][-TURN:])
        line = f"... {name}, {self.job['dtype']}: {what} {seconds}"
        print(line, file=sys.stderr, flush=True)

    def room(self, at_once: int) -> int:
        """How many more have room, were each like the largest and all at their longest step.

        What an allocator holds stays its own while others take their turn, so peaks add up. The
        first is alone, to know its size, and one beside it is always tried.
        """
        first = [self.steps[name][0] for name in self.workers]
        if not first:
            return 1
        cuda = torch.cuda.is_available()
        peaks = [x["held_mib"] if cuda else x["peak_mib"] for x in first]
        space = SPARE * self.capacity_mib / self.growth() - sum(peaks)
        room = int(min(space / max(peaks), len(VARIANTS)))
        return min(max(room, int(len(first) < 2)), at_once - len(first))

    def growth(self) -> float:
        """The longest step's tokens over those of the warm-up."""
        pairs, size = self.job["pairs"], self.job["batch_size"]
        tokens = [
            max(max(lengths(pairs[i])) for i in step)
            for step in planned(pairs, size, self.job["seed"])
        ]
        return max(1.0, max(tokens) / tokens[0])

    def run(self, rounds: int) -> None:
        order, shuffle = list(self.workers), random.Random(0).shuffle
        for start in range(0, rounds, TURN):
            shuffle(order)
            for name in order:
                self._take_turn(name, min(TURN, rounds - start))
        for worker in self.workers.values():
            worker.stop()

    def _take_turn(self, name: str, count: int) -> None:
        if self.notes[name] is not None:
            return
        try:
            for _ in range(count):
                self.steps[name].append(self.workers[name].step())
        except Failed as error:
            self.notes[name] = str(error)
        self._tell(name, self.notes[name] or f"step {len(self.steps[name])},")

    def results(self, yardstick: str, known: list[dict[str, Any]]) -> list[Result]:
        """Losses of all steps are compared before anyone has a ratio.

        `known` are the yardstick's steps from a group before, on the same pairs.
        """
        limits, found = limits_of(self.job), []
        alive = [name for name, note in self.notes.items() if note is None]
        here = yardstick in alive
        beside = self.steps[yardstick] if here else known
        other = known or beside or (self.steps[alive[0]] if alive else [])
        for name, steps in self.steps.items():
            off = distances(steps, other)
            note = self.notes[name] or refusal(off, limits)
            ratios = []
            if note is None and yardstick == YARDSTICK:
                both = zip(beside[WARM_UP:], steps[WARM_UP:])
                ratios = [theirs["seconds"] / own["seconds"] for theirs, own in both]
            found.append(Result(name, steps, note, ratios, here, off))
        return found


def capacity_mib() -> float:
    """Memory for all workers together, before any has started."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 2**20
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return math.inf
    line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) / 2**10


def limits_of(job: dict[str, Any]) -> dict[str, float]:
    return EXACT if job["dtype"] == "float32" and not job["autocast"] else ROUNDED


LIMITED = {
    "loss": "loss", "logps/chosen": "logps", "logps/rejected": "logps", "grad_norm": "grad_norm",
}  # fmt: skip


def distances(steps: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, float]:
    """The largest distance of each number from another's at the same step."""
    found = dict.fromkeys(LIMITED.values(), 0.0)
    for step, wanted in zip(steps, other):
        for name, kind in LIMITED.items():
            scale = 1.0 if kind == "loss" else abs(wanted[name]) or 1.0
            error = abs(step[name] - wanted[name]) / scale
            # NaN is larger than any number here, and max would lose it.
            found[kind] = max(found[kind], math.inf if math.isnan(error) else error)
    return found


def refusal(off: dict[str, float], limits: dict[str, float]) -> str | None:
    """Why a variant so far off gets no speed."""
    for name, error in off.items():
        if not error <= limits[name]:
            return f"disagrees: {name} is off by {error:.2g}, over {limits[name]:g}"
    return None


def first_refusal(
    step: dict[str, Any], gold: dict[str, Any] | None, limits: dict[str, float]
) -> str | None:
    """Why a variant with this first step is not timed."""
    if not abs(step["loss"] - math.log(2)) <= LOG_2_LIMIT:
        return f"disagrees: the first loss is {step['loss']:.5f}, not log 2"
    return refusal(distances([step], [gold]), limits) if gold else None


# --- rows ---------------------------------------------------------------------------------------


def lengths(pair: TokenizedPair) -> tuple[int, int]:
    """Tokens of its two sequences."""
    prompt, chosen, rejected = map(len, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
    return prompt + chosen, prompt + rejected


def common_fields(args: argparse.Namespace, model: str, pairs: list[TokenizedPair]) -> dict:
    """What all rows of a run share."""
    here = where(torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.commit)
    here["threads"] = args.threads or here["threads"]
    here["versions"] |= {name: installed(name) for name in ("accelerate", "peft")}
    sequences = [n for pair in pairs for n in lengths(pair)]
    return {
        **here,
        "model": Path(model).name,
        "data": data_name(args),
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "max_tokens": args.max_tokens,
        "dtype": args.dtype,
        "autocast": not args.no_autocast,
        "gradient_checkpointing": args.gradient_checkpointing,
        "attention": args.trl_attention,
        "learning_rate": args.learning_rate,
        "rounds": args.steps,
        "mean_sequence": sum(sequences) / len(sequences) if sequences else None,
    }


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
    seconds = [step["seconds"] for step in steps[WARM_UP:]]
    timed = result.note is None and bool(seconds)

    def rate(amounts: list[int]) -> dict[str, float] | None:
        if not timed:
            return None
        steps = summary([x / s for x, s in zip(amounts, seconds)])
        return {"total": sum(amounts) / sum(seconds), **steps}

    computed = [step["tokens"] for step in steps[WARM_UP:]]
    padded = VARIANTS[result.variant].kind == "peer" or "padded" in result.variant
    fills = [step["fill_rate"] for step in steps[WARM_UP:] if step["fill_rate"] is not None]
    return {
        **common,
        "op": OP,
        "variant": result.variant,
        "kind": VARIANTS[result.variant].kind,
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
        "tokens": sum(needed[WARM_UP:]),
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


def absent_rows(common: dict) -> list[dict]:
    """Rows for the trainers that are not run, and why."""
    rows = []
    for name, (package, why) in ABSENT.items():
        here = "installed, but there is no route to it" if find_spec(package) else "not installed"
        row = blank_row(name, "peer", common)
        rows.append({**row, "note": f"not run: {here}; it wants {why}"})
    return rows


def blank_row(name: str, kind: str, common: dict) -> dict:
    unknown = (
        "pairs_per_s", "tokens_per_s", "step_s", "x_trl", "x_trl_steps", "interleaved",
        "setup_s", "tokens", "off", "off_fp32",
        "tokens_computed", "padding_share", "fill_rate", "peak_mib", "resident_mib",
    )  # fmt: skip
    curves: dict[str, list] = {"loss": [], "grad_norm": [], "logps": []}
    return {**common, "op": OP, "variant": name, "kind": kind, **dict.fromkeys(unknown), **curves}


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


# --- the longest pair ---------------------------------------------------------------------------


def longest(
    fits: Callable[[int], str | None], *, good: int = 0, most: int = POSITIONS
) -> Iterator[tuple[int | None, str]]:
    """The most tokens of a sequence that fit, in steps of `LONGEST_STEP`; and what ended it.

    `fits` is None where a length trains, else why not. Doubled until one fails, then bisected;
    what is known so far comes after each one that fits. `good` is known to fit.
    """
    bad, why = 0, ""
    while not bad:
        tried = 2 * good or LONGEST_STEP
        if tried > most:
            yield good, f"not tried over {most:,} positions"
            return
        if (note := fits(tried)) is None:
            good = tried
            yield good, SO_FAR
        else:
            bad, why = tried, note
    while bad - good > LONGEST_STEP:
        tried = (good + bad) // 2 // LONGEST_STEP * LONGEST_STEP
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


# --- tables -------------------------------------------------------------------------------------

KEY = (
    "device", "threads", "model", "data", "batch_size", "max_length", "max_tokens", "dtype",
    "autocast", "gradient_checkpointing",
)  # fmt: skip


def is_step(rows: list[dict]) -> bool:
    return bool(rows) and rows[0].get("op") in (OP, LONGEST)


def tables(rows: list[dict]) -> list[list[dict]]:
    """Rows that belong together, the last of each variant."""
    steps = [row for row in rows if row["op"] == OP]
    found = grouped(steps, KEY).values()
    return [list({row["variant"]: row for row in group}.values()) for group in found]


def heading(rows: list[dict]) -> str:
    """What was run, where, with which versions."""
    row = rows[0]
    versions = ", ".join(f"{name} {v}" for name, v in row["versions"].items() if v)
    commit = (row["git"] or "no commit")[:12] + (", with local changes" if row["dirty"] else "")
    threads = "" if row["device_type"] == "cuda" else f"{row['threads']} threads, "
    computed = "under bf16 autocast" if row["autocast"] else "without autocast"
    saved = "with" if row["gradient_checkpointing"] else "without"
    return (
        f"**{row['model']}, {row['data']}: {row['batch_size']} pairs a step, sequences of "
        f"{row['mean_sequence']:,.0f} tokens on average and {row['max_length']:,} at most, "
        f"{row['dtype']} weights {computed}, {saved} gradient checkpointing** on {row['device']}, "
        f"{threads}all of {row['rounds']} interleaved steps together ({versions}; {commit}; "
        f"{row['utc'][:10]})"
    )


def spread(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    form = ",.0f" if value["total"] >= 100 else ".3g"
    total, low, high = (format(value[name], form) for name in ("total", "p20", "p80"))
    return f"{total} ({low} to {high})"


def table(rows: list[dict]) -> str:
    """One line a variant, the fastest first."""
    titles = [
        "variant", "pairs/s (steps' p20 to p80)", "x trl", "tokens/s", "s a step",
        "tokens computed", "padding", "peak MiB", "before, MiB", "loss, first and last step",
    ]  # fmt: skip
    body = []
    for row in sorted(rows, key=lambda row: -(row["x_trl"] or 0)):
        step_s, losses = row["step_s"], row["loss"]
        body.append(
            [
                f"**{row['variant']}**" if row["kind"] == "fastdpo" else row["variant"],
                row["note"] or spread(row["pairs_per_s"]),
                number(row["x_trl"], ".2f"),
                "" if step_s is None else f"{row['tokens_per_s']['total']:,.0f}",
                "" if step_s is None else f"{step_s['median']:.3g}",
                "" if step_s is None else number(row["tokens_computed"], ",.0f"),
                "" if step_s is None else number(row["padding_share"], ".0%"),
                number(row["peak_mib"], ",.0f"),
                "" if step_s is None else number(row["resident_mib"], ",.0f"),
                f"{losses[0]:.4f}, {losses[-1]:.4f}" if len(losses) > WARM_UP else "",
            ]
        )
    return markdown_table(titles, ["---", *["---:"] * (len(titles) - 1)], body)


def longest_tables(rows: list[dict]) -> list[str]:
    parts = []
    key = ("device", "model")
    for group in grouped([row for row in rows if row["op"] == LONGEST], key).values():
        found = {(row["variant"], row["budget_gib"]): row for row in group}
        budgets = list(dict.fromkeys(row["budget_gib"] for row in group))
        body = []
        for name in dict.fromkeys(row["variant"] for row in group):
            cells = []
            for budget in budgets:
                row = found.get((name, budget))
                fits = row and row["longest"]
                cells.append(f"2 x {fits:,}" if fits else (row or {}).get("note") or "")
            body.append([name, *cells])
        titles = ["longest pair, tokens", *(f"within {budget} GiB" for budget in budgets)]
        first = group[0]
        parts.append(
            f"**{first['model']}, LoRA, one pair a step** on {first['device']} "
            f"({(first['git'] or 'no commit')[:12]}; {first['utc'][:10]})"
        )
        parts.append(markdown_table(titles, ["---", *["---:"] * len(budgets)], body))
    return parts


def markdown(rows: list[dict], plots: list[str]) -> str:
    """The block between the markers."""
    parts = []
    for group in tables(rows):
        parts += [heading(group), table(group)]
    parts += longest_tables(rows)
    parts += [f"![Pairs per second and peak memory of whole steps]({plot})" for plot in plots]
    return "\n\n".join(parts)


def plot(rows: list[dict], paths: list[Path]) -> None:
    """Speed and peak memory as bars, a row of panels a table."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "fastdpo", "svg.fonttype": "none"}):
        drawn = [[row for row in group if row["step_s"]] for group in tables(rows)]
        drawn = [group for group in drawn if group]
        figure = Figure(figsize=(10, 0.6 + 2.4 * max(1, len(drawn))), layout="constrained")
        if drawn:
            axes = figure.subplots(len(drawn), 2, squeeze=False)
            for (left, right), group in zip(axes, drawn):
                ordered = sorted(group, key=lambda row: row["pairs_per_s"]["total"])
                first = group[0]
                what = f"{first['data']}, {first['dtype']}"
                what += ", checkpointing" if first["gradient_checkpointing"] else ""
                speeds = [row["pairs_per_s"]["total"] for row in ordered]
                bars(left, ordered, speeds, f"pairs per second ({what})")
                peaks = [row["peak_mib"] for row in ordered]
                bars(right, ordered, peaks, "peak memory of the process, MiB")
        for path in paths:
            kind = path.suffix[1:]
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            figure.savefig(path, format=kind, metadata=metadata)


# --- the command --------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m bench.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    add("--commit", help="the commit to record where there is no repository")
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
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "max_tokens": args.max_tokens,
        "dtype": args.dtype,
        "autocast": not args.no_autocast,
        "gradient_checkpointing": args.gradient_checkpointing,
        "learning_rate": args.learning_rate,
        "beta": 0.1,
        "max_grad_norm": 1.0,
        "seed": args.seed,
        "threads": args.threads or torch.get_num_threads(),
        "attention": args.trl_attention,
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
    for result in results:
        yield row_of(result, job, common)
    yield from absent_rows(common)


def model_of(args: argparse.Namespace) -> str:
    from fastdpo.model.load import demo_model

    return shape_model(args.shape) if args.shape else args.model or demo_model()


@contextlib.contextmanager
def crew_of(
    worker: Callable[[str, Path], Any] = Worker, inside: Path | None = None
) -> Iterator[Crew]:
    """Processes and a folder for them, and neither afterwards."""
    if inside is not None:
        inside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastdpo-bench-", dir=inside) as scratch:
        crew = Crew(Path(scratch), worker)
        try:
            yield crew
        finally:
            crew.close()


def convert(source: str, out: Path) -> int:
    """Write a public file's rows as `fastdpo train` takes them."""
    rows = [as_preference(row) for row in read_rows(source).rows]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


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
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    with crew_of() as crew:
        for row in run(args, crew):
            print(line(row), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print(f"{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
