"""Training, watched: what one process of a run computed, for `bench.parallel` to compare."""

from __future__ import annotations

import logging
import os
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, nn

from fastdpo.data.examples import TokenizedPair, TokenizedSingle
from fastdpo.train import fsdp, trainer, update
from fastdpo.train.config import EvalConfig, TrainConfig
from fastdpo.train.trainer import train

VOCAB = 323  # no number of processes divides it
SIZES = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=98, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=4, head_dim=8, initializer_range=0.1,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma3": ("Gemma3TextConfig", dict(
        sliding_window=16, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )),
    "qwen3_moe": ("Qwen3MoeConfig", dict(
        num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20,
    )),
}  # fmt: skip
# Of three steps, of which the last has one pair.
STEP, LAST = 10, 1
PAIRS, HELD_OUT = 2 * STEP + LAST, 5
MAX_TOKENS = 110
LENGTHS = (4, 10), (16, 28), (36, 46)  # tokens of a response: short, middling or long
CONFIG: dict[str, Any] = dict(
    batch_size=STEP, max_length=80, max_tokens=MAX_TOKENS, learning_rate=1e-3, alpha=0.02,
    warmup_ratio=0.0, reference_cache=None, bf16=False, impl="torch", max_grad_norm=0.05,
)  # fmt: skip
FOUND = "found.pt"
SINGLES = ("kto", "bco")


class Job(NamedTuple):
    """A run: the model, the options of training, and what else is not as usual.

    ``environment`` is of its processes. ``root`` puts an untied head into FSDP2's root;
    ``evaluates`` is to do so after each step.
    """

    family: str
    tied: bool
    options: Mapping[str, Any]
    environment: Mapping[str, str] = {}
    root: bool = False
    evaluates: bool = False


@dataclass
class Found:
    """What a run computed.

    Attributes:
        values: by name, a value of each step or evaluation.
        counts: by name, numbers that have to be the same.
        gradients, clipped: of each step, before and after clipping; DeepSpeed keeps none after it.
        weights: those that are trained, after the last step.
        policy: as it was saved.
        routes: through the head, and how many micro-batches took them.
        batches: of each step, on each process.
        fillers: micro-batches of weight 0, on each process.
    """

    values: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, list[float]] = field(default_factory=dict)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    clipped: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    policy: dict[str, Tensor] = field(default_factory=dict)
    routes: Counter[str] = field(default_factory=Counter)
    batches: list[list[int]] = field(default_factory=list)
    fillers: list[int] = field(default_factory=list)


# --------------------------------------------------------------------------------- what is trained
def examples(options: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """Those to train and to evaluate on, as the loss of the options takes them."""
    generator = torch.Generator().manual_seed(1)

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most, (), generator=generator))

    sizes = []
    for _ in range(PAIRS + HELD_OUT):
        kind = LENGTHS[draw(0, len(LENGTHS))]
        sizes.append((draw(2, 12), draw(*kind), draw(*kind)))

    def pair(i: int) -> TokenizedPair:
        ids = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in sizes[i]]
        return TokenizedPair(*ids, weight=1 + i % 2)

    pairs = [pair(i) for i in range(PAIRS + HELD_OUT)]
    if options.get("loss_type") in SINGLES:
        pairs = [
            TokenizedSingle(x.prompt_ids, x.responses[i % 2], i % 2 == 0, weight=x.weight)
            for i, x in enumerate(pairs)
        ]
    return pairs[:PAIRS], pairs[PAIRS:]


def save_model(family: str, tied: bool, folder: Path) -> Path:
    """Random weights and a tokenizer of a model that fits in no one process's share evenly."""

    path = folder / f"{family}-{'tied' if tied else 'untied'}"
    if not path.is_dir():
        name, extra = FAMILIES[family]
        config = getattr(transformers, name)(**SIZES, **extra, tie_word_embeddings=tied)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
        tokenizer().save_pretrained(path)
    return path


def tokenizer() -> Any:
    """One that is only saved."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
    )  # fmt: skip


# ------------------------------------------------------------------------------------- how it went
def whole(x: Any) -> Tensor:
    """A tensor's copy on the CPU, put together where processes have parts; all of them call it."""
    x = x.full_tensor() if hasattr(x, "full_tensor") else x
    return x.detach().float().cpu().clone()


def weight(parameter: Any) -> Tensor:
    if not hasattr(parameter, "ds_id"):
        return whole(parameter)
    from deepspeed.utils import safe_get_full_fp32_param  # type: ignore[import-not-found]

    return whole(safe_get_full_fp32_param(parameter))


def gradient(parameter: Any) -> Tensor:
    if parameter.grad is not None:
        return whole(parameter.grad)
    from deepspeed.utils import safe_get_full_grad  # type: ignore[import-not-found]

    return whole(safe_get_full_grad(parameter))


def trained(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name.removeprefix("module."), parameter


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: gradient(p) for name, p in trained(model)}


class Watch:
    """Looks at a run of `train` from within: its engine, its steps and its micro-batches."""

    def __init__(self) -> None:
        self.found, self.mine, self.fillers = Found(), [], 0

    @contextmanager
    def watching(self, root: bool) -> Iterator[None]:
        patches = [
            patch.object(trainer, "launched", self.launched(trainer.launched)),
            patch.object(trainer, "take_step", self.step(trainer.take_step)),
            patch.object(update, "batch_loss", self.loss(update.batch_loss)),
            patch.object(fsdp.Fsdp2, "head_in_root", root),
        ]
        with ExitStack() as stack:
            for each in patches:
                stack.enter_context(each)
            yield

    def launched(self, real: Any) -> Any:
        def call(config: TrainConfig) -> Any:
            engine = real(config)
            engine.clip, engine.step = self.clip(engine.clip), self.optimize(engine.step)
            engine.forwards = self.forwards(engine.forwards)
            return engine

        return call

    def clip(self, real: Any) -> Any:
        def call(model: nn.Module, most: float) -> float:
            self.found.gradients.append(gradients(model))
            norm = real(model, most)
            if any(p.grad is not None for _, p in trained(model)):  # DeepSpeed keeps none
                self.found.clipped.append(gradients(model))
            return norm

        return call

    def optimize(self, real: Any) -> Any:
        def call(model: nn.Module, optimizer: Any) -> None:
            real(model, optimizer)
            self.found.weights = {name: weight(p) for name, p in trained(model)}

        return call

    def forwards(self, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Iterator[tuple[list[int], bool]]:
            for index, counts in real(*arguments, **options):
                self.fillers += not counts
                yield index, counts

        return call

    def step(self, real: Any) -> Any:
        def call(setup: Any, model: Any, optimizer: Any, batches: Any, *rest: Any) -> Any:
            self.mine.append(len(batches))
            return real(setup, model, optimizer, batches, *rest)

        return call

    def loss(self, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            if torch.is_grad_enabled():
                self.found.routes[result.plan.route] += 1
            return result

        return call


# Sums of log-probs and what is made of them; rewards are differences, in which they are lost.
VALUES = (
    "loss",
    "logps/chosen",
    "logps/rejected",
    "grad_norm",
    "aux_loss",
    "lengths/chosen",
    "lengths/rejected",
)
COUNTS = ("pairs", "num_tokens")


def run(job: Job, model: Path, folder: Path) -> Found | None:
    """Train, and say how it went; None on all but the first process."""
    from accelerate.utils import gather_object

    from fastdpo.train.metrics import read_metrics

    config = TrainConfig(**{**CONFIG, **job.options})
    given, held_out = examples(job.options)
    watch, found = Watch(), None
    with watch.watching(job.root), patch.dict(os.environ, job.environment):
        train(
            str(model), tokenizer(), given, config, folder, progress=False,
            keep_checkpoint=False,
            eval_pairs=held_out if job.evaluates else (),
            evaluation=EvalConfig(eval_steps=1) if job.evaluates else None,
        )  # fmt: skip
    batches, fillers = gather_object([watch.mine]), gather_object([watch.fillers])
    if int(os.environ.get("RANK", 0)) == 0:
        found = replace(watch.found, batches=batches, fillers=fillers)
        rows = read_metrics(folder / "metrics" / "metrics.jsonl")
        for names, kept in ((VALUES, found.values), (COUNTS, found.counts)):
            for name in (*names, *(f"eval_{x}" for x in names)):
                if of_steps := [row[name] for row in rows if name in row]:
                    kept[name] = of_steps
        found.policy = read_policy(folder / "policy")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return found


def read_policy(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {
        k: x for path in sorted(folder.glob("*.safetensors")) for k, x in load_file(path).items()
    }


def process(
    rank: int, world: int, port: int, jobs: Sequence[tuple[Job, str]], folder: str, answers: Any
) -> None:
    """One of several processes, or one alone: runs jobs, each with its model, one after the other.

    The first process answers each with the file of what was found and None. Whichever fails first
    answers with None and why, and ends.
    """
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if world > 1:
        os.environ |= {
            "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "RANK": str(rank),
            "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    try:
        for number, (job, model) in enumerate(jobs):
            torch.manual_seed(0)
            out = Path(folder) / f"run-{number}"
            found = run(job, Path(model), out)
            if rank == 0:
                torch.save(found, out / FOUND)
                answers.put((out / FOUND, None))
    except BaseException:
        answers.put((None, traceback.format_exc()))
        answers.close()
        answers.join_thread()
        os._exit(1)
    if world > 1:
        torch.distributed.destroy_process_group()
