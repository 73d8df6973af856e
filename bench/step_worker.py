"""One variant's trainings in a process of its own: a step for each word of `bench.step`.

The trainers are whole and unchanged: TRL's `DPOTrainer` and `fastdpo.train.trainer.train`. TRL is
only handed token ids instead of text, in the order of fastdpo's plan. A step lasts from the
parent's word to the end of the loop's turn, so fetching the pairs, the reference, both passes,
clipping, the
optimizer and the log are all in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdpo.data.batch import plan_steps
from fastdpo.data.examples import TokenizedPair

from .peak import resident_mib
from .turns import note_of, release

METRICS = ("loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/margins")
STEP, STOP = "step", "stop"
LEFT_BYTES = 2**28  # of the device's memory, for the libraries' own workspaces
GOLD = "fp32, each sequence alone"  # no variant, but what their first steps are compared with


class Variant(NamedTuple):
    """`settings` are of `TrainConfig`, or of TRL's `DPOConfig` where it is a peer."""

    name: str
    kind: str
    settings: dict[str, Any]


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("trl", "peer", {"precompute_ref_log_probs": False}),
        Variant("trl (precomputed)", "peer", {"precompute_ref_log_probs": True}),
        Variant("fastdpo", "fastdpo", {"precompute_ref_log_probs": False}),
        Variant("fastdpo (cached reference)", "fastdpo", {"precompute_ref_log_probs": True}),
        Variant(
            "fastdpo (packed)", "fastdpo", {"precompute_ref_log_probs": False, "layout": "packed"}
        ),
        Variant(
            "fastdpo (padded)", "fastdpo", {"precompute_ref_log_probs": False, "layout": "padded"}
        ),
    )
}


class Finished(Exception):
    """The parent has all the steps it wants."""


class Turns:
    """The worker's end of the pipe: waits after every step, and says how it went."""

    def __init__(self, conn: Any) -> None:
        self.conn, self.cuda = conn, torch.cuda.is_available()
        self.steps, self.started = 0, time.perf_counter()

    def end(self, metrics: dict[str, Any]) -> None:
        """After a step. The first is a warm-up: the peak of memory counts from then on."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started
        peak_mib = self._peak_mib()
        if self.steps == 0:
            gc.collect()
            if sys.platform == "linux":
                ctypes.CDLL(None).malloc_trim(0)
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            else:
                resident_mib(reset_peak=True)
        self.steps += 1
        self.conn.send({"seconds": seconds, "peak_mib": peak_mib, **self._held(), **metrics})
        if self.conn.recv() != STEP:
            raise Finished
        self.started = time.perf_counter()

    def _peak_mib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if self.cuda else resident_mib()[1]

    def _held(self) -> dict[str, float]:
        """What the process keeps while it waits."""
        if self.cuda:
            return {
                "resident_mib": torch.cuda.memory_allocated() / 2**20,
                "held_mib": torch.cuda.memory_reserved() / 2**20,
            }
        now = resident_mib()[0]
        return {"resident_mib": now, "held_mib": now}


def main(conn: Any, variant: str, log: str) -> None:
    """Import what a variant takes, then serve; `log` has all that is printed."""
    with open(log, "w") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    with contextlib.suppress(Exception):  # the job says so
        for name in IMPORTS[kind_of(variant)]:
            import_module(name)
    serve(conn)


def serve(conn: Any) -> None:
    """Run jobs until one leaves something behind, as all do on a CPU, or the parent has none.

    A failure is told by its first line. Every job ends with the parent's word to stop and the
    answer whether the process can take another.
    """
    clean = True
    while clean:
        try:
            job = conn.recv()
            work(conn, job)
            clean = left_nothing()
            conn.send({"clean": clean})
        except (EOFError, OSError):  # the parent is gone
            return


def work(conn: Any, job: dict[str, Any]) -> None:
    """Run one job in this process, to the parent's word to stop."""
    torch.set_num_threads(job["threads"])
    try:
        if torch.cuda.is_available():
            limit, total = job.get("memory_gib"), torch.cuda.get_device_properties(0).total_memory
            share = 1.0 if limit is None else min(1.0, limit * 2**30 / total)
            torch.cuda.set_per_process_memory_fraction(share)
            torch.cuda.reset_peak_memory_stats()
        ROUTES[kind_of(job["variant"])](job, Turns(conn))
        raise RuntimeError("training ended before the steps that were asked for")
    except Finished:
        return
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        traceback.print_exc()
        note = note_of(error)
    # Outside the handler: the traceback would keep the failed step's tensors.
    conn.send({"failed": note})
    conn.recv()


def left_nothing() -> bool:
    """Whether the next job finds the device as a fresh process would.

    On a CPU the process's own memory is measured, which no other job may have grown.
    """
    if not torch.cuda.is_available():
        return False
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
    release()
    return torch.cuda.memory_allocated() < LEFT_BYTES


def kind_of(variant: str) -> str:
    return GOLD if variant == GOLD else VARIANTS[variant].kind


def planned(pairs: list[TokenizedPair], batch_size: int, seed: int) -> list[list[int]]:
    """Which pairs every step of fastdpo's trainer takes: the same in all its layouts."""
    lengths = [1] * len(pairs)
    steps = plan_steps(lengths, batch_pairs=batch_size, max_tokens=len(pairs), seed=seed)
    return [sorted(chain.from_iterable(step)) for step in steps]


def train_fastdpo(job: dict[str, Any], turns: Turns) -> None:
    from fastdpo.train.config import TrainConfig
    from fastdpo.train.trainer import train

    def on_step(row: dict[str, float]) -> None:
        found = {name: row[name] for name in METRICS}
        turns.end({**found, "tokens": row["num_tokens"], "fill_rate": row["fill_rate"]})

    lora = job["lora"]
    config = TrainConfig(
        beta=job["beta"],
        alpha=0.0,  # the length penalty is fastdpo's only; without it the losses are one function
        learning_rate=job["learning_rate"],
        warmup_ratio=0.0,
        max_grad_norm=job["max_grad_norm"],
        batch_size=job["batch_size"],
        max_length=job["max_length"],
        max_tokens=job["max_tokens"],
        overlong="stop",
        dtype=job["dtype"],
        bf16=job["autocast"],
        gradient_checkpointing=job["gradient_checkpointing"],
        activation_offloading=job["activation_offloading"],
        mlp_tile_tokens=job["mlp_tile_tokens"],
        use_peft=lora is not None,
        **({"lora_r": lora, "lora_alpha": 2.0 * lora} if lora else {}),
        reference_cache=None,
        save_steps=10**9,
        seed=job["seed"],
        **VARIANTS[job["variant"]].settings,
    )
    out = Path(job["folder"]) / "fastdpo"
    train(job["model"], None, job["pairs"], config, out, progress=False, on_step=on_step)


def train_trl(job: dict[str, Any], turns: Turns) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    computed: list[int] = []  # tokens of each batch, padding included; one is fetched ahead

    class Turn(TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
        ) -> None:
            if "loss" in (logs or {}):
                found = {name: logs[name] for name in METRICS}
                turns.end({**found, "tokens": computed[state.global_step - 1], "fill_rate": None})

    pairs, batch_size = job["pairs"], job["batch_size"]
    order = chain.from_iterable(planned(pairs, batch_size, job["seed"]))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: getattr(pairs[i], name) for name in names} for i in order]
    more, lora = {}, job["lora"]
    if lora is not None:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(
            task_type="CAUSAL_LM", r=lora, lora_alpha=2 * lora, target_modules="all-linear"
        )
    load = {"dtype": job["dtype"]}  # of the reference too
    if job["attention"]:
        load["attn_implementation"] = job["attention"]
    trainer = Tokenized(
        job["model"],
        args=DPOConfig(
            output_dir=str(Path(job["folder"]) / "trl"),
            beta=job["beta"],
            learning_rate=job["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=job["max_grad_norm"],
            optim="adamw_torch_fused",
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=1,
            max_length=job["max_length"],
            train_sampling_strategy="sequential",
            bf16=job["autocast"],
            gradient_checkpointing=job["gradient_checkpointing"],
            activation_offloading=job["activation_offloading"],
            model_init_kwargs=load,
            use_cpu=not turns.cuda,
            dataloader_pin_memory=turns.cuda,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            seed=job["seed"],
            **VARIANTS[job["variant"]].settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(job["model"]),
        callbacks=[Turn()],
        **more,
    )
    collate: Callable[[Any], Any] = trainer.data_collator

    def counting(examples: Any) -> Any:
        batch = collate(examples)
        computed.append(batch["input_ids"].numel())
        return batch

    trainer.data_collator = counting
    trainer.train()


def tokenizer_of(model: str) -> Any:
    """TRL asks it for the padding token only."""
    from fastdpo.model.load import load_tokenizer

    return load_tokenizer(model)


def gold(job: dict[str, Any], turns: Turns) -> None:
    """The first step's log-probs and gradient norm in plain fp32: no batch, no padding, no fusion.

    There the policy is the reference, so the loss is log 2 and its slope is half of beta.
    """
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, job["dtype"])
    device = torch.device("cuda" if turns.cuda else "cpu")
    # Rounded as the variants' weights are, and computed in fp32 from there on.
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).float()
    model = model.to(device).eval()
    pairs = job["pairs"]
    step = planned(pairs, job["batch_size"], job["seed"])[0]
    sums = {"chosen": 0.0, "rejected": 0.0}
    for i in step:
        for name, sign in (("chosen", -1), ("rejected", 1)):
            prompt, response = pairs[i].prompt_ids, getattr(pairs[i], f"{name}_ids")
            ids = torch.tensor([prompt + response], device=device)
            rows = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            target = torch.tensor(response, device=device)
            logp = -torch.nn.functional.cross_entropy(rows, target, reduction="sum")
            (sign * job["beta"] / 2 / len(step) * logp).backward()
            sums[name] += logp.item() / len(step)
    squares = (p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)
    norm = math.sqrt(sum(x.item() for x in squares))
    found = {f"logps/{name}": value for name, value in sums.items()}
    turns.end({"loss": math.log(2), "grad_norm": norm, **found, "rewards/margins": 0.0})


ROUTES = {"fastdpo": train_fastdpo, "peer": train_trl, GOLD: gold}
# What takes long to import, before the first job is known.
IMPORTS = {
    "fastdpo": ("fastdpo.train.trainer", "transformers.models.auto.modeling_auto"),
    "peer": ("trl.trainer.dpo_trainer", "datasets"),
    GOLD: ("transformers.models.auto.modeling_auto",),
}
