"""The command line: ``fastdpo demo | iterate | sample | score | pair | train | report | plan |
doctor``; in a checkout, ``bench``.

Every option can stand in a YAML file (``--config``) and be overridden on the command line.  Errors
a user can mend are one line and exit status 2; an interruption exits with 130 and loses at most the
unfinished part of a stage.
"""

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from fastdpo import __version__
from fastdpo.errors import ConfigError, DataError, ModelError, is_default, require
from fastdpo.rounds.run import IterateConfig
from fastdpo.rounds.stages import (
    PairConfig,
    SampleConfig,
    ScoreConfig,
    run_pair,
    run_sample,
    run_score,
)
from fastdpo.train.trainer import TrainingConfig, check_control


@dataclass(kw_only=True)
class TrainConfig(TrainingConfig):
    """Train on a preference dataset; the options of training are those of `TrainingConfig`.

    Attributes:
        model: start and reference, a folder or hub name in Hugging Face format.
        dataset: file (.jsonl, .json, .parquet, .csv), folder or hub name, in TRL's preference
            formats; or what ``fastdpo pair`` wrote, whose tokens are taken as they are.
        reference: folder or hub name of another reference than the start.
        split: of a hub dataset or a folder with several; by default train.
        chat_template: file with a Jinja chat template instead of the model's own; it is saved with
            the policy.
        output_dir: folder of the run; resumed if it exists.
        candidates: for alpha=auto, the samples that the pairs are from, a folder of
            ``fastdpo sample``; without it the length is held where it is.
        control: for alpha=auto, ``control.json`` of the round before, to hold the same target.
    """

    model: str
    dataset: str
    split: str | None = None
    chat_template: str | None = None
    reference: str | None = None
    output_dir: str = "runs/train"
    candidates: str | None = None
    control: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_control(self, self.reference)
        for name in ("candidates", "control"):
            known = getattr(self, name) is None or self.alpha == "auto"
            require(self, name, known, "left out, or alpha be auto")


@dataclass(kw_only=True)
class DemoConfig:
    """Two rounds on a small model, minutes on a laptop.

    Attributes:
        model: folder or hub name; default SmolLM2-135M-Instruct.
        output_dir: folder of the run; resumed if it exists.
        seed: of the split, the samples and the order of pairs.
    """

    model: str | None = None
    output_dir: str = "runs/demo"
    seed: int = 0


@dataclass(kw_only=True)
class PlanConfig(TrainingConfig):
    """Say what a training step takes and the longest pair that fits, without weights or a GPU.

    ``--config`` takes the file of a whole run too: options of other stages in it are passed over.

    Attributes:
        model: folder or hub name; only its configuration is read.
        gpu_gib: memory of the GPU, in GiB.
    """

    model: str
    gpu_gib: float = 24.0


@dataclass(kw_only=True)
class ReportConfig:
    """Write the report of a run as one HTML page.

    Attributes:
        output_dir: folder of the run.
    """

    output_dir: str = "runs/iterate"


@dataclass(kw_only=True)
class DoctorConfig:
    """Say what this machine will use and what is missing."""


RENDERED = "rendered.json"  # when the rows were rendered, where a template asked for the time


def _quiet_loading() -> None:
    """Keep transformers' bars for loading shards from drowning those of the stages."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def run_train(config: TrainConfig) -> None:
    from fastdpo.data.clock import KEY, rendering_at
    from fastdpo.data.rows import preference_rows, read_rows, tokenize_dataset
    from fastdpo.model.load import check_start, load_tokenizer, stop_ids
    from fastdpo.pair.stage import load_pairs, split_stages
    from fastdpo.rounds.run import response_lengths
    from fastdpo.storage import locked, read_json, write_json_atomic
    from fastdpo.train.control import LengthController
    from fastdpo.train.trainer import train

    _quiet_loading()
    for name in (config.model, config.reference):
        if name is not None:
            check_start(name)
    tokenizer = load_tokenizer(config.model, config.chat_template)
    out = Path(config.output_dir)
    clock = None
    rows = read_rows(config.dataset, config.split)
    if {"prompt_ids", "chosen_ids", "rejected_ids"} <= rows.rows[0].keys():
        pairs = load_pairs(Path(config.dataset))
        if len(stages := split_stages(pairs)) > 1:
            raise ConfigError(
                f"dataset={config.dataset} is a curriculum of {len(stages)} stages, each of which "
                "starts where the one before ended; use fastdpo iterate"
            )
        longest = max(pair.num_tokens("padded") for pair in pairs) // 2
        if config.max_length < longest and not is_default(config, "max_length"):
            raise ConfigError(
                f"max_length={config.max_length}, but dataset={config.dataset} has a side of "
                f"{longest} tokens: what fastdpo pair wrote is taken as it is. Leave max_length "
                "out, or give it to fastdpo sample"
            )
    else:
        with rendering_at(_rendered_at(out / RENDERED)) as clock:
            found = tokenize_dataset(
                preference_rows(rows),
                tokenizer,
                max_length=config.max_length,
                overlong=config.overlong,
                stop_ids=stop_ids(config.model, tokenizer),
            )
        print(found)
        pairs = found.pairs
    if out.exists() and not out.is_dir():
        raise ConfigError(f"output_dir={out} is a file; name a folder")
    first = int(os.environ.get("RANK", "0")) == 0
    with locked(out) if first else nullcontext():
        if first and clock is not None and clock.read:
            write_json_atomic(out / RENDERED, {KEY: clock.time})
        metrics = train(
            config.model,
            tokenizer,
            pairs,
            config,
            out,
            reference=config.reference,
            control=(
                LengthController.from_dict(read_json(Path(config.control)))
                if config.control
                else None
            ),
            lengths=response_lengths(Path(config.candidates)) if config.candidates else None,
        )
    if int(os.environ.get("RANK", "0")):
        return
    _save_config(config, out)
    print("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    print(f"policy: {out / 'policy'}")


def _rendered_at(path: Path) -> str:
    """When the run's rows were rendered first, now if they were not; alike on all processes."""
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list

    from fastdpo.data.clock import KEY, now
    from fastdpo.storage import read_json

    time = [read_json(path)[KEY] if path.is_file() else now()]
    Accelerator()  # joins the processes as they were launched; the next call alone does not
    broadcast_object_list(time)
    return time[0]


def run_iterate(config: IterateConfig) -> None:
    from fastdpo.report import summary as report
    from fastdpo.rounds.run import iterate

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "fastdpo iterate runs in one process; use 'accelerate launch -m fastdpo.cli train' for "
            "a round of training on several"
        )
    _quiet_loading()
    out = Path(config.output_dir)
    rows = iterate(config)
    _save_config(config, out)
    print(report.table(rows))
    print(f"report: {out / 'report.html'}")
    if (out / "rounds.png").is_file():
        print(f"plot: {out / 'rounds.png'}")
    name = "extrapolated" if config.extrapolation else "policy"
    print(f"policy: {out / f'round-{config.rounds:02d}' / name}")
    more = f"fastdpo iterate --config {out / 'config.yaml'} --rounds {config.rounds + 1}"
    print(f"to go on: {more}")


def run_demo(config: DemoConfig) -> None:
    import torch

    from fastdpo.loss.gemm import has_native_bf16
    from fastdpo.model.load import demo_model

    bf16 = torch.cuda.is_available() or has_native_bf16()
    _quiet_loading()
    prompts = Path(__file__).with_name("demo_prompts.jsonl")
    settings = IterateConfig(
        model=config.model or demo_model(),
        prompts=str(prompts),
        scorer="fastdpo.scoring:plain_language",
        output_dir=config.output_dir,
        rounds=2,
        heldout=24,
        num_samples=6,
        max_new_tokens=64,
        batch_prompts=12,
        learning_rate=4e-5,
        warmup_ratio=0.0,
        batch_size=4,
        alpha=0.01,
        max_length=256,
        max_tokens=2048,
        gradient_checkpointing=False,
        save_steps=3,
        bf16=bf16,
        sample_dtype="bfloat16" if bf16 else "float32",
        seed=config.seed,
    )
    print(
        f"two rounds of length-regularized DPO: {settings.model}, beta={settings.beta}, "
        f"alpha={settings.alpha}, scored by {settings.scorer}"
    )
    run_iterate(settings)


def run_report(config: ReportConfig) -> None:
    from fastdpo.report.summary import html

    print(f"report: {html(Path(config.output_dir))}")


def run_plan(config: PlanConfig) -> None:
    from fastdpo.plan.memory import estimate, longest_pair

    prompt = max(1, config.max_length // 4)
    response = config.max_length - prompt
    print(
        f"a full micro-batch of max_tokens={config.max_tokens}, pairs of a prompt of {prompt} and "
        f"responses of {response} tokens:"
    )
    gpu_gib = config.gpu_gib
    print(estimate(config.model, config, prompt=prompt, response=response, gpu_gib=gpu_gib))
    print(longest_pair(config.model, config, gpu_gib))


def run_doctor(config: DoctorConfig) -> None:
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
        "fastdpo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"{device.type} ({name}), {torch.get_num_threads()} threads",
        "dtype": "bf16 autocast" if fast_bf16 else "bf16 works, but is slow here: set bf16=false",
        "attention": _attention(device),
        "kernels": kernels,
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
    root = Path(__file__).resolve().parent.parent
    if not (root / "bench" / "__main__.py").is_file():
        raise ConfigError("bench is in fastdpo's repository only; run this in a checkout of it")
    sys.path.insert(0, str(root))
    from bench.__main__ import main as bench

    bench(list(argv))


_OPTION = re.compile(r"^--[a-z][a-z0-9-]*")
COMMANDS = {
    "demo": (DemoConfig, run_demo),
    "iterate": (IterateConfig, run_iterate),
    "sample": (SampleConfig, run_sample),
    "score": (ScoreConfig, run_score),
    "pair": (PairConfig, run_pair),
    "train": (TrainConfig, run_train),
    "report": (ReportConfig, run_report),
    "plan": (PlanConfig, run_plan),
    "doctor": (DoctorConfig, run_doctor),
}


def _training_alone(path: str) -> str:
    """The file of a run as YAML with what `plan` takes of it; what is no option at all stays in it,
    and so is refused. Other files are left to the parser.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return path
    if not isinstance(values, dict):
        return path
    known = {field.name for config_class, _ in COMMANDS.values() for field in fields(config_class)}
    others = known - {field.name for field in fields(PlanConfig)}
    return yaml.safe_dump({name: value for name, value in values.items() if name not in others})


@cache
def build_parser() -> Any:
    from jsonargparse import (
        ActionConfigFile,  # type: ignore[reportPrivateImportUsage]
        ArgumentParser,
    )

    class RunFile(ActionConfigFile):
        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
            super().__call__(parser, cfg, _training_alone(values), option_string)

    parser = ArgumentParser(
        prog="fastdpo",
        description="Length-regularized DPO, fast and exact. In a checkout, also: fastdpo bench.",
        version=__version__,
    )
    commands = parser.add_subcommands(dest="command")
    for name, (config_class, _) in COMMANDS.items():
        command = ArgumentParser(description=config_class.__doc__.split("\n")[0])
        action = RunFile if name == "plan" else "config"
        command.add_argument("--config", action=action, help="YAML file of options")
        command.add_class_arguments(config_class)
        commands.add_subcommand(name, command, help=config_class.__doc__.split("\n")[0])
    return parser


def parse(argv: Sequence[str] | None = None) -> tuple[str, Any]:
    """Command name and its validated options.

    Raises:
        ConfigError: an option has an impossible value.
        SystemExit: an unknown option, a wrong type or an unreadable file; printed as one error.
    """
    argv = sys.argv[1:] if argv is None else argv
    # --gpu-gib is --gpu_gib
    argv = [_OPTION.sub(lambda name: "--" + name[0][2:].replace("-", "_"), x) for x in argv]
    options = build_parser().parse_args(argv)
    config_class, _ = COMMANDS[options.command]
    values = options[options.command].as_dict()
    values.pop("config", None)
    return options.command, config_class(**values)


def _save_config(config: Any, out: Path) -> None:
    import yaml

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if list(argv[:1]) == ["bench"]:
            run_bench(argv[1:])
            return 0
        command, config = parse(argv)
        COMMANDS[command][1](config)
    except (ConfigError, DataError, ModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
