"""The commands about whole runs, and about this machine."""

import importlib.util
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import fastdpo
from fastdpo.cli.datasets import is_first
from fastdpo.errors import ConfigError, is_number, require, require_used
from fastdpo.rounds.config import IterateConfig
from fastdpo.storage import CACHE, atomic_file, cache_path
from fastdpo.train.config import TrainConfig

ON_SEVERAL = ("train", "iterate")  # commands that may be launched as several processes


@dataclass(kw_only=True)
class PlanCommand(TrainConfig):
    """Say what a training step takes and the longest pair that fits, without weights or a GPU.

    Of several GPUs it says what each takes, and what it sends to the others.  ``--config`` takes
    the file of a whole run too: what each of its stages takes is said before.  All are estimates.

    Attributes:
        model: folder or hub name; only its configuration is read.
        gpu_gib: memory of a GPU, in GiB.
        gpus: how many train together, as engine and sp_size say; sampling uses one of them, and
            scoring those that score.device_map spreads a model over.
        zero_stage: of engine=deepspeed, 2 or 3. What it takes is at least what is said.
        link_gbs: GB/s that a GPU can send to others, for the time that communication takes; 50 is a
            network card of 400 Gbit/s for each GPU.
    """

    model: str
    gpu_gib: float = 24.0
    gpus: int = 1
    zero_stage: int = 3
    link_gbs: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.run: IterateConfig | None = None  # that of a file, set by `parse`
        require(self, "gpus", self.gpus >= 1, ">= 1")
        require(self, "zero_stage", self.zero_stage in (2, 3), "2 or 3")
        require(self, "link_gbs", is_number(self.link_gbs) and self.link_gbs > 0, "> 0")
        staged = self.engine == "deepspeed"
        require_used(self, "zero_stage", staged, "engine be deepspeed")
        require_used(self, "link_gbs", self.gpus > 1, "gpus be more than 1")


@dataclass(kw_only=True)
class DoctorCommand:
    """Say what this machine will use and what is missing."""


def quiet_loading() -> None:
    """Keep transformers' bars for loading shards from drowning those of the stages."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def check_one_process(command: str) -> None:
    """Raises ConfigError where a command that is for one process was launched as several."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if command not in ON_SEVERAL and count > 1:
        raise ConfigError(
            f"fastdpo {command} runs in one process, and was launched as {count}; start it without "
            f"a launcher, which {' and '.join(ON_SEVERAL)} alone take"
        )


def run_iterate(config: IterateConfig) -> None:
    from fastdpo.report import summary as report
    from fastdpo.rounds.run import iterate

    quiet_loading()
    out = Path(config.output_dir)
    rows = iterate(config)
    if not is_first():
        return
    save_options(config.to_dict(), out)
    print(report.table(rows))
    print(f"report: {out / 'report.html'}")
    if (out / "rounds.png").is_file():
        print(f"plot: {out / 'rounds.png'}")
    name = "extrapolated" if config.extrapolation else "policy"
    policy = out / f"round-{config.rounds:02d}" / name
    print(f"policy: {policy}")
    more = f"fastdpo iterate --config {out / 'config.yaml'} --rounds {config.rounds + 1}"
    print(f"to go on: {more}")
    print(to_talk(policy, config))


def to_talk(policy: Path, config: Any) -> str:
    """The line that says how to talk to a policy, beside the model that it was trained from."""
    words = ["fastdpo", "chat", "--model", str(policy), "--beside", config.model]
    if config.chat_template is not None:  # the policy has it, its start may have another
        words += ["--chat_template", config.chat_template]
    return f"to talk to it: {shlex.join(words)}"


def save_options(values: dict[str, Any], out: Path) -> None:
    """Leave the options of a run in its folder, as a file for ``--config``."""
    with atomic_file(out / "config.yaml") as scratch:
        scratch.write_text(yaml.safe_dump(values, sort_keys=False))


def run_plan(config: PlanCommand) -> None:
    from fastdpo.plan import estimate, longest_pair, plan_run

    cluster: dict[str, Any] = {"gpus": config.gpus, "zero_stage": config.zero_stage}
    if config.run is not None:
        print(plan_run(config.run, gpu_gib=config.gpu_gib, **cluster), flush=True)
        print("training, in a step:")
    prompt = max(1, config.max_length // 4)
    response = config.max_length - prompt
    whats = {"pairs": "pairs", "lists": "lists of two", "singles": "single responses"}
    each = f" on each of {config.gpus} GPUs" if config.gpus > 1 else ""
    print(
        f"a full micro-batch of max_tokens={config.max_tokens}, {whats[config.objective.shape]} "
        f"of a prompt of {prompt} and responses of {response} tokens{each}, estimated:"
    )
    sizes: dict[str, Any] = {"prompt": prompt, "response": response, "gpu_gib": config.gpu_gib}
    found = estimate(config.model, config, **sizes, **cluster)
    print(found, flush=True)
    print(f"its largest part is {found.limit}")
    if config.gpus > 1:
        print(found.exchange(config.link_gbs), flush=True)
    print(longest_pair(config.model, config, config.gpu_gib, **cluster))


def run_doctor(config: DoctorCommand) -> None:
    import torch

    from fastdpo.kernels import support
    from fastdpo.loss.gemm import has_native_bf16

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    fast_bf16 = cuda or has_native_bf16()
    reason = support.unsupported_reason(device)
    kernels = "Triton"
    if reason is not None:  # a GPU without kernels is refused, so it is said here first
        on_cpu = device.type == "cpu"
        kernels = f"PyTorch path ({reason})" if on_cpu else f"none: {reason}; use impl='torch'"
    lines = {
        "fastdpo": fastdpo.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"{device.type} ({name}), {torch.get_num_threads()} threads",
        "dtype": "bf16 autocast" if fast_bf16 else "bf16 works, but is slow here: set bf16=false",
        "attention": _attention(device),
        "kernels": kernels,
        "cache": str(cache_path(CACHE)),
    }
    for key, value in lines.items():
        print(f"{key:>10}  {value}")
    optional = {
        "gguf": "the demo's model without a hub",
        "peft": "LoRA (use_peft)",
        "bitsandbytes": "QLoRA (load_in_4bit)",
        "flash_attn": "the fastest packed attention on a GPU",
        "liger_kernel": "use_liger_kernel, and the benchmark",
        "trl": "the parity tests and the benchmark",
        "cut_cross_entropy": "the benchmark",
    }
    for package, use in optional.items():
        if importlib.util.find_spec(package) is None:
            print(f"{'missing':>10}  {package}: needed for {use}")


def _attention(device: Any) -> str:
    """What packed attention runs on; `fastdpo.model.attention.route` decides it for each call."""
    from fastdpo.model.attention import has_flash_attn, varlen_options

    if device.type != "cuda":
        return "PyTorch SDPA, one call a packed segment"
    if has_flash_attn():
        return "flash-attn"
    if "window_size" in varlen_options():
        return "PyTorch varlen_attn; SDPA a segment for soft caps and fp32"
    return "PyTorch SDPA, one call a packed segment: torch 2.11 or flash-attn would be faster"


def run_bench(argv: Sequence[str]) -> None:
    """`python -m bench`, which has its own options and is no part of the installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / "__main__.py").is_file():
        raise ConfigError("bench is in fastdpo's repository only; run this in a checkout of it")
    sys.path.insert(0, str(root))
    from bench.__main__ import main as bench

    bench(list(argv))
