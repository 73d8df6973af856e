"""DeepSpeed's ZeRO: what its configuration may say, and training equal to one process."""

import gc
import json
import os
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from test_trainer import random_pairs
from tiny import LLAMA, QWEN, save_tiny

from fastdpo.errors import ConfigError
from fastdpo.model.load import load_tokenizer
from fastdpo.rounds.work import Loading
from fastdpo.train import deepspeed, update
from fastdpo.train.config import EvalConfig, TrainConfig
from fastdpo.train.evaluate import BEST
from fastdpo.train.metrics import read_metrics
from fastdpo.train.trainer import train

CONFIG = TrainConfig(
    batch_size=6, max_tokens=120, max_length=60, learning_rate=1e-3, alpha=0.02, bf16=False,
    reference_cache=None, max_grad_norm=0.05, save_steps=1,
)  # fmt: skip
ZERO = {"zero_optimization": {"stage": 2}}
GROUPED, RECOMPUTED = 0.03, 0.012  # workspaces with which micro-batches take that route
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


# ------------------------------------------------------------------------------ the configuration
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_clipping": 0.05, "train_batch_size": 6, "gradient_accumulation_steps": 1},
        {"gradient_clipping": "auto", "train_batch_size": "auto", "bf16": {"enabled": "auto"}},
        {"fp16": {"enabled": False}, "train_micro_batch_size_per_gpu": "auto"},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
    ],
)
def test_settings_that_options_agree_with_are_taken(settings):
    found = deepspeed.checked_settings({**ZERO, **settings}, CONFIG)
    assert found["zero_optimization"]["stage"] == settings.get(
        "zero_optimization", ZERO["zero_optimization"]
    ).get("stage")
    assert set(found) == {"zero_optimization"}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"gradient_clipping": 1.0}, ("gradient_clipping is 1.0", "max_grad_norm says it (0.05)")),
        ({"train_batch_size": 32}, ("train_batch_size is 32", "batch_size says it (6)")),
        ({"gradient_accumulation_steps": 4}, ("gradient_accumulation_steps is 4", "max_tokens")),
        ({"train_micro_batch_size_per_gpu": 2}, ("per_gpu is 2", "max_tokens")),
        ({"bf16": {"enabled": True}}, ("bf16 is enabled", "option bf16")),
        ({"fp16": {"enabled": True}}, ("fp16 is enabled", "option bf16")),
        ({"optimizer": {"type": "Adam"}}, ("has optimizer", "learning_rate")),
        ({"scheduler": {"type": "WarmupLR"}}, ("has scheduler", "warmup_ratio")),
        ({"pipeline": {"stages": 2}}, ("pipeline is not taken",)),
        ({"communication_data_type": "bf16"}, ("communication_data_type is not taken",)),
        ({"zero_optimization": {"stage": 1}}, ("stage is 1", "set it to 2")),
        ({"zero_optimization": None}, ("stage is None",)),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, ("quantized",)),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            ("offload_param.device is nvme", "cpu"),
        ),
    ],
)
def test_settings_that_say_something_else_are_refused(settings, words):
    with pytest.raises(ConfigError) as error:
        deepspeed.checked_settings({**ZERO, **settings}, CONFIG)
    assert all(word in str(error.value) for word in words)


def test_without_the_package_one_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fastdpo\[deepspeed\]'"):
        train("model", None, random_pairs(2), replace(CONFIG, engine="deepspeed"), tmp_path)


@needs_deepspeed
def test_one_process_or_no_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="accelerate launch --use_deepspeed"):
        train("model", None, random_pairs(2), replace(CONFIG, engine="deepspeed"), tmp_path)


# ------------------------------------------------------------------------------ the same training
class Stopped(Exception):
    """In place of a kill."""


class Job(NamedTuple):
    """A run on several processes: its folder's name, the model, options, DeepSpeed's settings."""

    name: str
    model: str
    options: dict[str, Any]
    zero: dict[str, Any]
    stop: int = 0  # after so many steps
    evaluates: bool = False


def run(job: Job, folder: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """Train: metrics of the steps, and the routes that micro-batches took through the head."""
    routes: set[str] = set()
    real = update.batch_loss

    def watched(*args: Any, **options: Any) -> Any:
        result = real(*args, **options)
        routes.add(result.plan.route)
        return result

    def on_step(row: dict[str, float]) -> None:
        if next(steps) == job.stop:
            raise Stopped

    steps, out = iter(range(1, 100)), folder / job.name
    given: dict[str, Any] = {}
    config, model = replace(CONFIG, **job.options), str(folder / job.model)
    if job.evaluates:
        evaluation = EvalConfig(eval_steps=1, load_best_model_at_end=True)
        given = dict(eval_pairs=random_pairs(5, seed=7), evaluation=evaluation)
    linear = torch.nn.functional.linear
    with pytest.MonkeyPatch.context() as patch, suppress(Stopped):
        patch.setattr(update, "batch_loss", watched)
        train(
            model, load_tokenizer(model), random_pairs(13, seed=1), config, out, progress=False,
            on_step=on_step, **given,
        )  # fmt: skip
    assert torch.nn.functional.linear is linear
    return read_metrics(out / "metrics" / "metrics.jsonl"), routes


def run_all(rank: int, world: int, jobs: list[Job], folder: Path) -> list[Any]:
    os.environ.update(
        WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true", ACCELERATE_USE_DEEPSPEED="true",
    )  # fmt: skip
    found = []
    for job in jobs:
        # Above the norms of these models, below all else.
        zero = {"stage3_param_persistence_threshold": 100, **job.zero}
        path = folder / f"{job.name}.{rank}.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
        found.append(run(job, folder))
    return found


def policy(folder: Path) -> dict[str, torch.Tensor]:
    files = (folder / "policy").glob("*.safetensors")
    return {name: x for file in files for name, x in load_file(file).items()}


def check_same(
    job: Job, rows: list[dict[str, Any]], one: list[dict[str, Any]], folder: Path, alone: Path
) -> None:
    """Losses, the norm before clipping and the policy, within rounding of one process's."""
    assert all(row["grad_norm"] > CONFIG.max_grad_norm for row in one if "grad_norm" in row)
    for row, wanted in zip(rows, one, strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "rewards/margins", "eval_loss"):
            if name in wanted:
                found = row[name]
                assert found == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), (job.name, name)
        for name in ("step", "pairs", "num_tokens"):
            assert row.get(name) == wanted.get(name), (job.name, name)
    found, wanted = policy(folder), policy(alone)
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        # An update is the learning rate times a ratio whose rounding shows where it is near 0.
        torch.testing.assert_close(found[name], x, rtol=0, atol=0.03 * CONFIG.learning_rate)


LORA = dict(use_peft=True, lora_r=4)
OFFLOAD = {key: {"device": "cpu"} for key in ("offload_optimizer", "offload_param")}
JOBS = [
    Job("two", "llama", {"workspace_mib": GROUPED}, {"stage": 2}),
    Job("two-lora", "llama", LORA, {"stage": 2}),
    Job("three", "llama", {"workspace_mib": GROUPED}, {"stage": 3}, evaluates=True),
    Job("three-tied", "qwen", {"workspace_mib": RECOMPUTED}, {"stage": 3}),
    Job(
        "three-lora", "llama",
        {**LORA, "precompute_ref_log_probs": False, "gradient_checkpointing": True}, {"stage": 3},
    ),
    Job("three-copy", "llama", {"precompute_ref_log_probs": False}, {"stage": 3}),
    Job("three-aot", "llama", {"loss_type": "aot", "alpha": 0.0}, {"stage": 3}),
    Job("three-tiles", "llama", {"mlp_tile_tokens": 8}, {"stage": 3}),
    Job("three-offload", "llama", {}, {"stage": 3, **OFFLOAD}),
]  # fmt: skip


@needs_deepspeed
@pytest.mark.slow
def test_training_equals_one_process(tmp_path):
    for family in (LLAMA, QWEN):
        save_tiny(family, tmp_path / family.name.removesuffix("3"))
    alone = tmp_path / "alone"
    alone.mkdir()
    for family in ("llama", "qwen"):
        (alone / family).symlink_to(tmp_path / family)
    [found, other] = on_ranks(2, run_all, 2, JOBS, tmp_path)
    for job, (rows, routes), (_, others) in zip(JOBS, found, other):
        one, _ = run(job, alone)
        check_same(job, rows, one, tmp_path / job.name, alone / job.name)
        route = {GROUPED: "grouped", RECOMPUTED: "recompute"}.get(
            job.options.get("workspace_mib", 0)
        )
        assert route is None or route in routes & others
        if job.evaluates:
            kept = [json.loads((x / job.name / BEST).read_text()) for x in (tmp_path, alone)]
            assert kept[0]["best_global_step"] == kept[1]["best_global_step"]


@needs_deepspeed
@pytest.mark.slow
def test_a_stopped_run_goes_on_in_the_same_bits_or_on_other_processes(tmp_path):
    save_tiny(LLAMA, tmp_path / "llama")
    whole = [Job(f"whole-{n}", "llama", {}, {"stage": n}) for n in (2, 3)]
    begun = [Job(f"stage-{n}", "llama", {}, {"stage": n}, stop=2) for n in (2, 3)]
    moved = [Job(f"moved-{n}", "llama", {}, {"stage": n}, stop=2) for n in (2, 3)]
    resumed = [job._replace(stop=0) for job in begun]
    on_ranks(2, run_all, 2, [*whole, *begun, *moved, *resumed], tmp_path)
    for n in (2, 3):
        wanted, found = (policy(tmp_path / f"{name}-{n}") for name in ("whole", "stage"))
        assert all(torch.equal(found[name], x) for name, x in wanted.items())
    # Three processes, each stage from what the other one wrote on two.
    on_ranks(
        3, run_all, 3,
        [Job("moved-2", "llama", {}, {"stage": 3}), Job("moved-3", "llama", {}, {"stage": 2})],
        tmp_path,
    )  # fmt: skip
    for n in (2, 3):
        wanted, found = (policy(tmp_path / f"{name}-{n}") for name in ("whole", "moved"))
        for name, x in wanted.items():
            torch.testing.assert_close(found[name], x, rtol=0, atol=0.03 * CONFIG.learning_rate)


# ------------------------------------------------------------------- what is left, what is computed
def launch_as_one(zero: dict[str, Any], folder: Path) -> None:
    """Let accelerate find a launch of one process with DeepSpeed."""
    path = folder / "zero.json"
    zero = {"stage3_param_persistence_threshold": 0, **zero}
    path.write_text(json.dumps({"zero_optimization": zero}))
    os.environ.update(
        WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
        ACCELERATE_USE_CPU="true", ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_DEEPSPEED_CONFIG_FILE=str(path),
    )  # fmt: skip


def train_under_autocast(rank: int, model: str, folder: Path) -> list[set[torch.dtype]]:
    """For each stage, what linear layers give in training where autocast is on as on a GPU."""
    real, found = torch.is_autocast_enabled, []
    for stage in (2, 3):
        launch_as_one({"stage": stage}, folder)
        dtypes: set[torch.dtype] = set()

        def note(module: Any, _: Any, output: Any, dtypes: Any = dtypes) -> None:
            inner = isinstance(module, torch.nn.Linear) and isinstance(output, torch.Tensor)
            if inner and torch.is_grad_enabled():  # the head gives the loss
                dtypes.add(output.dtype)

        with pytest.MonkeyPatch.context() as patch:
            # Without a kind it is GPUs that are asked for.
            patch.setattr(torch, "is_autocast_enabled", lambda *kind: not kind or real(*kind))
            hook = torch.nn.modules.module.register_module_forward_hook(note)
            try:
                config, pairs = replace(CONFIG, bf16=True), random_pairs(4, seed=1)
                out = folder / f"stage-{stage}"
                train(model, load_tokenizer(model), pairs, config, out, progress=False)
            finally:
                hook.remove()
        found.append(dtypes)
    return found


@needs_deepspeed
def test_bf16_is_computed_where_autocast_is_on_for_gpus(tmp_path):
    model = str(save_tiny(LLAMA, tmp_path / "llama"))
    [found] = on_ranks(1, train_under_autocast, model, tmp_path)
    assert found == [{torch.bfloat16}] * 2


def load_and_drop(rank: int, model: str, folder: Path) -> tuple[bool, bool, int]:
    """Load a model to be trained as a run does first: whether its weights were sharded, whether
    linear layers are torch's afterwards, and how many parameters are left."""
    launch_as_one({"stage": 3}, folder)
    linear = torch.nn.functional.linear
    loading = Loading(model=model, config=asdict(CONFIG))
    sharded = all(hasattr(p, "ds_id") for p in loading.run().parameters())
    gc.collect()
    left = [x for x in gc.get_objects() if isinstance(x, torch.nn.Parameter)]
    return sharded, torch.nn.functional.linear is linear, len(left)


@needs_deepspeed
def test_a_model_that_was_only_loaded_leaves_nothing(tmp_path):
    model = str(save_tiny(LLAMA, tmp_path / "llama"))
    assert on_ranks(1, load_and_drop, model, tmp_path) == [(True, True, 0)]


@needs_deepspeed
@pytest.mark.slow
def test_parts_are_refused_by_another_engine(tmp_path):
    save_tiny(LLAMA, tmp_path / "llama")
    on_ranks(2, run_all, 2, [Job("run", "llama", {}, {"stage": 3}, stop=1)], tmp_path)
    with pytest.raises(ConfigError, match="engine=deepspeed on 2 processes"):
        run(Job("run", "llama", {}, {}), tmp_path)
