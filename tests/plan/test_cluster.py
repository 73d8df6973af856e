"""The planner for several GPUs: one process that stands for all, against real ones."""

import shutil
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
import transformers
from test_memory import configuration

from bench import plan_check
from fastdpo.cli import main
from fastdpo.errors import ConfigError, ModelError
from fastdpo.plan.longest import longest_pair
from fastdpo.plan.memory import Simulation
from fastdpo.plan.step import estimate, of_step
from fastdpo.train.config import TrainConfig


def step(gpus: int, *, zero_stage: int = 3, family: str = "Llama", **options: Any) -> Any:
    config = TrainConfig(**{"max_tokens": 2000, **options})
    sizes: dict[str, Any] = {"prompt": 512, "response": 256}
    return estimate(configuration(family), config, gpus=gpus, zero_stage=zero_stage, **sizes)


def parameters(family: str = "Llama") -> tuple[int, int]:
    """All of the model's, and those of its layers."""
    model = transformers.AutoModelForCausalLM.from_config(configuration(family))
    layers = sum(p.numel() for p in model.model.layers.parameters())
    return sum(p.numel() for p in model.parameters()), layers


def test_fsdp2_divides_what_is_there_and_counts_what_is_sent():
    one, four = step(1), step(4, engine="fsdp2", bf16=False)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(four, name) == pytest.approx(getattr(one, name) / 4, rel=0.01)
    assert four.pairs == one.pairs and four.micro_batches * 4 == one.micro_batches
    whole, layers = parameters()
    # Every weight is gathered for the forward, and those of the layers again for the backward.
    others = 4 * 3 / 4 * four.micro_batches
    gathered = whole + layers
    assert four.sent["all-gather"] == pytest.approx(others * gathered, rel=1e-3)
    assert four.sent["reduce-scatter"] == pytest.approx(others * whole, rel=1e-3)
    # Gathered in bf16, but for the embeddings and the last norm, and reduced in fp32.
    half = step(4, engine="fsdp2")
    exact = 2048 * 128 + 128
    assert half.sent["all-gather"] == pytest.approx(others * (gathered + exact) / 2, rel=1e-3)
    assert half.sent["reduce-scatter"] == four.sent["reduce-scatter"]
    said = four.exchange(50)
    assert f"a step of {four.micro_batches} micro-batches" in said and "at 50 GB/s" in said
    # With a reference in each step there is another forward.
    twice = step(4, engine="fsdp2", bf16=False, precompute_ref_log_probs=False)
    assert twice.sent["all-gather"] == pytest.approx(others * (whole + gathered), rel=1e-3)
    assert twice.reference == four.weights


def test_what_divides_otherwise():
    plain = step(4, engine="fsdp2")
    kept = step(4, engine="fsdp2", reshard_after_forward=False)
    assert kept.whole > plain.whole and kept.sent["all-gather"] < plain.sent["all-gather"]
    copies = step(4, engine="fsdp2", dp_replicate_size=2)
    assert copies.weights == pytest.approx(2 * plain.weights, rel=0.01)
    assert copies.sent["all-reduce"] > 0 == plain.sent.get("all-reduce", 0)
    moved = step(4, engine="fsdp2", offload_params=True)
    state = plain.weights + plain.gradients + plain.optimizer
    # Beside what runs there is one unit's part, of which the embeddings are the largest.
    runs = moved.activations + max(moved.head, moved.backward)
    assert moved.host == state
    assert moved.peak == runs + 2048 * 128 * 4 // 4 + moved.communicators
    lora = step(4, engine="fsdp2", use_peft=True)
    assert lora.gradients < plain.gradients / 4
    assert lora.sent["reduce-scatter"] < plain.sent["reduce-scatter"] / 4


def test_copies_by_ddp():
    one, four = step(1), step(4)
    assert four.buckets == four.gradients
    assert four.peak == one.peak + four.buckets + four.communicators
    assert four.sent == {"all-reduce": 2 * four.gradients * 3 // 4}
    assert step(4, engine="ddp") == four


def test_each_group_of_gpus_has_an_allowance():
    one, four = step(1), step(4, engine="fsdp2")
    assert one.communicators == 0 < four.communicators and "NCCL 1.00 GiB" in str(four)
    assert step(4, engine="fsdp2", sp_size=2).communicators == 2 * four.communicators
    assert step(4, engine="fsdp2", dp_replicate_size=2).communicators == 3 * four.communicators
    sizes: dict[str, Any] = {"prompt": 64, "response": 64, "device": "cpu", "gpus": 2}
    assert estimate(configuration("Llama"), TrainConfig(), **sizes).communicators == 0  # gloo


def test_zero_divides_more_by_each_stage():
    plain = step(4)
    two, three = (step(4, engine="deepspeed", zero_stage=stage) for stage in (2, 3))
    assert two.weights == plain.weights and two.gradients == plain.gradients // 4
    # A copy of the trained weights beside the moments.
    assert two.optimizer == 3 * two.gradients and three.optimizer == 3 * three.gradients
    assert three.weights == pytest.approx(two.weights / 4, rel=0.01)
    assert three.peak - three.buckets < two.peak - two.buckets < plain.peak - plain.buckets
    assert two.buckets == three.buckets == 4 * 500_000_000  # DeepSpeed's own
    assert set(two.sent) == set(three.sent) == {"all-gather", "reduce-scatter"}


def test_sequence_parallel_divides_activations():
    whole = step(4, engine="fsdp2", gradient_checkpointing=False)
    for size in (2, 4):
        parts = step(4, engine="fsdp2", gradient_checkpointing=False, sp_size=size)
        # Of four, each gets a head of keys of its own, where there are two.
        assert parts.activations == pytest.approx(whole.activations / size, rel=0.2)
        assert parts.tokens == whole.tokens and parts.weights == whole.weights
        assert parts.micro_batches == size * whole.micro_batches
        assert parts.sent["all-to-all"] > 0


def test_nothing_stands_for_processes_afterwards():
    config, sizes = TrainConfig(engine="fsdp2", max_tokens=1100), configuration("Llama")
    with Simulation(sizes, config, 24.0, 4) as simulation:
        assert dist.get_world_size() == 4
        first = of_step(simulation, 200, 300)
        assert of_step(simulation, 200, 300) == first
        with pytest.raises(ConfigError, match=r"^a plan is made by one process"):
            Simulation(sizes, config, 24.0, 2)
    assert not dist.is_initialized()
    with pytest.raises(ModelError):
        Simulation(configuration("Llama", num_attention_heads=-1), config, 24.0, 4)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("gpus", "options", "message"),
    [
        (8, {"sp_size": 3}, "^sp_size=3 does not divide the 8 processes"),
        (8, {"engine": "fsdp2", "dp_replicate_size": 3}, "^dp_replicate_size=3 does not divide"),
        (8, {"sp_size": 8}, "^sp_size=8: LlamaForCausalLM has 4 attention heads"),
        (
            4,
            {"sp_size": 2, "layout": "padded"},
            r"sequence parallel \(sp_size=2\) splits packed rows",
        ),
        (1, {"engine": "fsdp2"}, "^engine=fsdp2 shards a model over GPUs, and gpus=1; give"),
        (1, {"sp_size": 2}, "^sp_size=2 does not divide the 1 processes"),
        (4, {"offload_params": True}, "^offload_params=True has no effect with engine=ddp"),
        (0, {}, "^gpus=0 must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_divided(gpus, options, message):
    with pytest.raises((ConfigError, ModelError), match=message):
        step(gpus, **options)
    assert not dist.is_initialized()


@pytest.mark.slow
def test_the_longest_pair_of_several_gpus():
    sizes = configuration("Llama", max_position_embeddings=2**20, num_hidden_layers=1)
    config = TrainConfig(engine="fsdp2", gradient_checkpointing=False, max_tokens=512)
    found = longest_pair(sizes, config, 4.0, gpus=4)
    longest = {option.name: option.longest for option in found.options}
    assert "Longest pair on 4 x 4 GiB" in str(found)
    assert 0 < found.longest < longest["gradient_checkpointing=True, sp_size=2"]
    # No eight GPUs, and no other engine than the one that is configured.
    assert not any("sp_size=8" in name or "engine" in name for name in longest)


def test_on_the_command_line(tmp_path, capsys):
    configuration("Llama", num_hidden_layers=1).save_pretrained(tmp_path)
    command = ["plan", f"--model={tmp_path}", "--gpus=4", "--engine=fsdp2", "--max_length=64"]
    assert main([*command, "--link_gbs=100"]) == 0
    out = capsys.readouterr().out
    assert "on each of 4 GPUs, estimated:" in out and "its largest part is" in out
    assert "at 100 GB/s if nothing overlaps" in out and "Longest pair on 4 x 24 GiB" in out
    assert main([*command, "--sp_size=3"]) == 2
    assert capsys.readouterr().err.startswith("error: sp_size=3 does not divide the 4 processes")
    assert main([*command, "--zero_stage=2"]) == 2
    assert "zero_stage=2 must be left out, where it has no effect" in capsys.readouterr().err


measurable = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None,
    reason="allocations are counted by a library that a C compiler makes on Linux",
)


@measurable
@pytest.mark.slow
@pytest.mark.parametrize("case", plan_check.cases(), ids=plan_check.name_of)
def test_the_peak_of_real_processes(case):
    if not plan_check.possible(case):
        pytest.skip("needs deepspeed")
    found, wanted = plan_check.estimated_peak(case), max(plan_check.measured(case))
    # Observed within 1%; 8% with sequence parallel over four, 9% with ZeRO-2.
    assert found == pytest.approx(wanted, rel=0.15)


# Shapes of public model cards: Llama 3.1.
_LLAMA_8B: dict[str, Any] = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
)  # fmt: skip
_LLAMA_70B: dict[str, Any] = dict(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=131072,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "gpus", "peak"), [(_LLAMA_8B, 8, 24), (_LLAMA_70B, 64, 36)])
def test_shapes_of_8b_and_70b(sizes, gpus, peak):
    """Full training of the first on 8 GPUs of 80 GB, and of the second on 64."""
    config = TrainConfig(engine="fsdp2", batch_size=64)
    args: dict[str, Any] = {"prompt": 256, "response": 768, "gpu_gib": 80.0}
    found = estimate(transformers.LlamaConfig(**sizes), config, gpus=gpus, **args)
    state = 16 * sum(_of_llama(sizes)) / gpus
    assert found.weights + found.gradients + found.optimizer == pytest.approx(state, rel=0.01)
    assert state < found.peak < peak * 2**30
    shared = estimate(
        transformers.LlamaConfig(**sizes), replace(config, sp_size=8), gpus=gpus, **args
    )
    assert shared.tokens >= found.tokens and shared.sent["all-to-all"] > 0
    assert shared.activations < found.activations / 2


def _of_llama(sizes: dict[str, Any]) -> tuple[int, int]:
    """Parameters of embeddings and head, and of the layers."""
    D, L = sizes["hidden_size"], sizes["num_hidden_layers"]
    of_keys = sizes["num_key_value_heads"] * D // sizes["num_attention_heads"]
    layer = 2 * D * D + 2 * D * of_keys + 3 * D * sizes["intermediate_size"] + 2 * D
    return 2 * sizes["vocab_size"] * D + D, L * layer
