"""What `fastdpo plan` estimates, against what real processes take.

    python -m bench.plan_check --out plan.jsonl

Each case is three steps of `fastdpo.train.trainer.train` on processes of this machine that gloo
joins.  Measured is the most that PyTorch's allocator had alive in any of them from the end of the
first step to the end of the last: weights, gradients, optimizer and all else, counted by
`allocations.c`, which needs Linux and a C compiler.  Estimated is what `fastdpo.plan.step` says of
the same options.  gloo makes a copy of what it reduces or gathers: where the peak comes then, as
with sequence parallel, the real processes take so much more.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .rows import ROOT, load, where
from .tables import grouped, markdown_table, setting

OP = "plan"
# Large enough for activations to count beside weights, small enough for seconds.
SIZES: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "max_position_embeddings": 4096,
}  # fmt: skip
PROMPT, RESPONSE = 128, 192  # tokens
STEPS = 3
PAIRS = 4  # of a step, for each process or group that has some of its own
# Of ZeRO, values: what DeepSpeed takes by itself, 2 GB, would hide everything else.
ZERO_BUCKET = 2**18
MAX_TOKENS = 2 * (PROMPT + 2 * RESPONSE)  # two pairs a micro-batch


class _Enough(Exception):
    """Nothing after the last step is measured, so nothing is saved."""


class Case(NamedTuple):
    """A number of processes, and the options that differ from the default."""

    processes: int
    options: dict[str, Any]
    family: str = "Llama"
    zero_stage: int = 0  # of DeepSpeed


def cases() -> list[Case]:
    """FSDP2 at 2 and 4 processes, what changes its memory, sequence parallel, DDP and ZeRO."""
    fsdp2: dict[str, Any] = {"engine": "fsdp2"}
    kept: dict[str, Any] = {"gradient_checkpointing": False}
    both = [
        Case(processes, {**fsdp2, **peft, **more})
        for processes in (2, 4)
        for peft in ({}, {"use_peft": True})
        for more in ({}, kept)
    ]
    return [
        Case(1, {}),
        *both,
        Case(2, {**fsdp2, "sp_size": 2}),
        Case(4, {**fsdp2, "sp_size": 2, **kept}),
        Case(4, {**fsdp2, "sp_size": 4, **kept}),
        Case(2, {"sp_size": 2, **kept}),
        Case(4, {**fsdp2, "bf16": False}),
        Case(4, {**fsdp2, "reshard_after_forward": False}),
        Case(4, {**fsdp2, "dp_replicate_size": 2}),
        Case(4, {**fsdp2, **kept}, "Qwen3"),
        Case(2, {**fsdp2, "offload_params": True}),
        Case(4, {**fsdp2, "precompute_ref_log_probs": False}),
        Case(2, {}),
        *(Case(2, {"engine": "deepspeed"}, zero_stage=stage) for stage in (2, 3)),
    ]


def possible(case: Case) -> bool:
    """Whether what it needs is installed."""
    return not case.zero_stage or importlib.util.find_spec("deepspeed") is not None


def name_of(case: Case) -> str:
    """Its number of processes, its options and its family."""
    return f"{case.processes} x {_options(case)}, {case.family}"


def configuration_of(case: Case) -> Any:
    import transformers

    tied = {"tie_word_embeddings": True} if case.family == "Qwen3" else {}
    return getattr(transformers, f"{case.family}Config")(**SIZES, **tied)


def options_of(case: Case) -> Any:
    from fastdpo.train.config import TrainConfig

    groups = case.processes // case.options.get("sp_size", 1)
    return TrainConfig(
        batch_size=PAIRS * groups, max_tokens=MAX_TOKENS, reference_cache=None, **case.options
    )


def estimated(case: Case) -> Any:
    """`fastdpo.plan.step.StepMemory` of a case, on CPUs."""
    from fastdpo.plan.step import estimate

    return estimate(
        configuration_of(case), options_of(case), prompt=PROMPT, response=RESPONSE, device="cpu",
        gpus=case.processes, zero_stage=case.zero_stage or 3,
    )  # fmt: skip


def estimated_peak(case: Case) -> int:
    """The estimate as a process of CPUs has it: what is moved to CPU memory is there too."""
    return _on_cpu(case, estimated(case))


def _on_cpu(case: Case, found: Any) -> int:
    bucket = 4 * ZERO_BUCKET - found.buckets if case.zero_stage else 0
    return found.peak + found.host + bucket


def start_of(case: Case) -> Any:
    """Its model, of random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = getattr(torch, options_of(case).dtype)
    return AutoModelForCausalLM.from_config(configuration_of(case), dtype=dtype)


def measured(case: Case) -> list[int]:
    """The peak of each process, in bytes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as out:
        counter = Path(out) / "allocations.so"
        source = Path(__file__).with_name("allocations.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", counter, source, "-ldl"], check=True)
        if case.zero_stage:  # ZeRO-3 shards a model as it is loaded
            start_of(case).save_pretrained(Path(out) / "start")
        job = json.dumps([*case, out])
        command = [sys.executable, "-m", "bench.plan_check", "--job", job]
        started = []
        for rank in range(case.processes):
            env = os.environ | {
                "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(counter),
            }  # fmt: skip
            if case.processes > 1:
                env |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.processes),
                "LOCAL_WORLD_SIZE": str(case.processes), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }  # fmt: skip
            if case.zero_stage:
                zero = {"stage": case.zero_stage, "reduce_bucket_size": ZERO_BUCKET}
                settings = json.dumps({"zero_optimization": zero})
                env |= {
                    "ACCELERATE_USE_DEEPSPEED": "true",
                    "ACCELERATE_DEEPSPEED_CONFIG_FILE": base64.urlsafe_b64encode(
                        settings.encode()
                    ).decode(),
                }
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            started.append(subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes))
        ended = [(process.communicate(), process.returncode) for process in started]
    for (_, err), status in ended:
        if status:
            raise RuntimeError(f"{case}: {err[-2000:]}")
    return [int(text.splitlines()[-1]) for (text, _), _ in ended]


def peak_of_steps(case: Case, out: Path) -> int:
    """Most bytes alive from the first step's end on, in this process of the case."""
    from fastdpo.data.examples import TokenizedPair
    from fastdpo.train.trainer import train

    config, draw = options_of(case), torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(SIZES["vocab_size"], (count,), generator=draw).tolist()

    pairs = [
        TokenizedPair(ids(PROMPT), ids(RESPONSE), ids(RESPONSE))
        for _ in range(STEPS * config.batch_size)
    ]
    steps = 0

    def on_step(_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 1:
            counted.allocations_restart()
        if steps == STEPS:
            raise _Enough

    counted = ctypes.CDLL(None)  # preloaded
    for name in ("allocations_alive", "allocations_most"):
        getattr(counted, name).restype = ctypes.c_size_t
    before = counted.allocations_alive()
    model = str(out / "start") if case.zero_stage else start_of(case)
    with suppress(_Enough):
        train(
            model, None, pairs, config, out, keep_checkpoint=False, progress=False, on_step=on_step
        )
    return counted.allocations_most() - before


def key_of(case: Case) -> dict[str, Any]:
    """What names its row."""
    return {key: x for key, x in case._asdict().items() if key != "zero_stage" or x}


def case_of(row: dict[str, Any]) -> Case:
    return Case(**{key: row[key] for key in Case._fields if key in row})


def row_of(case: Case) -> dict[str, Any]:
    peaks, found = measured(case), estimated(case)
    return {
        "op": OP, **key_of(case), "estimated": _on_cpu(case, found), "measured": max(peaks),
        "measured_least": min(peaks), "limit": found.limit, "sent": found.sent,
    }  # fmt: skip


def markdown(rows: list[dict], links: list[str]) -> str:
    """A table for each machine."""
    titles = ["model", "processes", "options", "estimated MiB", "measured MiB", "off", "limit"]
    parts = []
    for group in grouped(rows, ("device",)).values():
        # The last of each case: a run that was stopped goes on at another commit.
        last = {name_of(case_of(row)): row for row in group}
        group = list(last.values())
        body = [
            [
                row["family"], str(row["processes"]), _options(case_of(row)),
                f"{row['estimated'] / 2**20:.1f}", f"{row['measured'] / 2**20:.1f}",
                f"{row['estimated'] / row['measured'] - 1:+.1%}", row["limit"],
            ]
            for row in group
        ]  # fmt: skip
        parts.append(
            "**Peak of a training step in each process, as `fastdpo plan` estimates it and as "
            f"PyTorch's allocator saw it: {SIZES['num_hidden_layers']} layers of "
            f"{SIZES['hidden_size']}, V = {SIZES['vocab_size']:,}, two pairs of "
            f"{PROMPT + 2 * RESPONSE} tokens a micro-batch, joined by gloo** {setting(group[-1])}"
        )
        rules = ["---", "---:", "---", "---:", "---:", "---:", "---"]
        parts.append(markdown_table(titles, rules, body))
    return "\n\n".join(parts)


def _options(case: Case) -> str:
    stage = [f"stage {case.zero_stage}"] if case.zero_stage else []
    return ", ".join([*(f"{name}={x}" for name, x in case.options.items()), *stage]) or "(default)"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="fastdpo plan against real processes")
    parser.add_argument("--out", type=Path, help="file that gets a row for each case")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    if given.job:
        *case, out = json.loads(given.job)
        print(peak_of_steps(Case(*case), Path(out)))
        return
    place = where(torch.device("cpu"), None, "accelerate", "peft")
    done = load([given.out]) if given.out and given.out.exists() else []
    for case in filter(possible, cases()):
        if any(case == case_of(row) for row in done):
            continue
        row = row_of(case) | place
        off = row["estimated"] / row["measured"] - 1
        print(f"{case}: {row['estimated']:,} of {row['measured']:,}, {off:+.1%}", flush=True)
        if given.out:
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
