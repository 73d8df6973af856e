"""The memory planner against what real steps take, as PyTorch's own allocator records it."""

import gc
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers

from fastdpo.data.batch import pack_pairs
from fastdpo.data.examples import TokenizedList, TokenizedPair, TokenizedSingle
from fastdpo.errors import ConfigError, ModelError
from fastdpo.kernels import device, support
from fastdpo.loss.streaming import Stash
from fastdpo.model import balance
from fastdpo.model.adapters import add_lora
from fastdpo.model.prepare import layout_of, packed_loss, prepare_model
from fastdpo.plan.longest import longest_pair
from fastdpo.plan.memory import Simulation
from fastdpo.plan.step import estimate, of_step, usable_bytes
from fastdpo.train.config import TrainConfig

# Large enough for activations to count beside weights, small enough for seconds.
_SIZES: dict[str, Any] = dict(
    vocab_size=2048, hidden_size=128, intermediate_size=352, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=4096,
)  # fmt: skip
_EXTRA: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": 128},
    "Mixtral": {"intermediate_size": 96, "num_local_experts": 8, "output_router_logits": True},
    "Gemma2": {"sliding_window": 128, "query_pre_attn_scalar": 32},
    "Gemma3Text": {"sliding_window": 128, "query_pre_attn_scalar": 32},
}
PROMPT, RESPONSE = 128, 192


def configuration(family: str, **changes: Any) -> Any:
    return getattr(transformers, f"{family}Config")(**{**_SIZES, **_EXTRA[family], **changes})


def measured_peak(sizes: Any, config: TrainConfig) -> int:
    """Most bytes alive in a real run of two optimizer steps, its model included."""
    Stash._idle.clear()
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        _train(sizes, config)
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        live += change
        peak = max(peak, live)
    return peak


def _train(sizes: Any, config: TrainConfig) -> None:
    """The steps of `fastdpo.train.trainer`, two micro-batches each unless the batch is one."""
    model: Any = transformers.AutoModelForCausalLM.from_config(
        sizes, dtype=getattr(torch, config.dtype)
    )
    if config.use_peft:
        model = add_lora(model, r=config.lora_r, alpha=config.lora_alpha, target_modules=None)
    prepare_model(
        model, layout=config.layout, gradient_checkpointing=config.gradient_checkpointing,
        bf16=config.bf16, mlp_tile_tokens=config.mlp_tile_tokens,
    )  # fmt: skip
    added = balance.coefficient(model, config.router_aux_loss_coef)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(sizes.vocab_size, (count,), generator=draw).tolist()

    layout, objective = layout_of(model), config.objective

    def example() -> Any:
        if objective.shape == "singles":
            return TokenizedSingle(ids(PROMPT), ids(RESPONSE), True)
        if objective.shape == "lists":
            return TokenizedList(ids(PROMPT), [ids(RESPONSE), ids(RESPONSE)], [1.0, 0.0])
        return TokenizedPair(ids(PROMPT), ids(RESPONSE), ids(RESPONSE))

    tokens = example().num_tokens(layout)
    count = min(config.batch_size, max(1, config.max_tokens // tokens))
    for _ in range(2):
        for _ in range(2 if count < config.batch_size else 1):
            batch = pack_pairs([example() for _ in range(count)], layout=layout)
            reference = None
            if objective.needs_reference:
                reference = torch.full((batch.firsts[-1],), -1000.0, dtype=torch.float64)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16, cache_enabled=False):
                result = packed_loss(
                    model, batch, reference, objective=objective,
                    workspace_mib=config.workspace_mib, router_aux_loss_coef=added,
                )  # fmt: skip
            result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {}),
        ("Llama", {"gradient_checkpointing": False, "bf16": False}),
        ("Llama", {"workspace_mib": 2.0}),
        ("Llama", {"layout": "padded", "gradient_checkpointing": False}),
        ("Qwen3", {"use_peft": True}),
        ("Qwen3", {"mlp_tile_tokens": 64, "batch_size": 1}),
        ("Gemma2", {"gradient_checkpointing": False}),
        ("Gemma3Text", {"layout": "packed"}),
        ("Mixtral", {"use_peft": True, "layout": "padded"}),
        ("Mistral", {"dtype": "bfloat16", "gradient_checkpointing": False}),
        ("Llama", {"loss_type": "kto", "workspace_mib": 2.0}),
        ("Llama", {"loss_type": ["plackett_luce"]}),
        ("Llama", {"loss_type": "simpo", "gradient_checkpointing": False}),
    ],
)
def test_the_peak_of_a_real_step(family, options):
    config = TrainConfig(**{"max_tokens": 1100, **options})
    found = estimate(configuration(family), config, prompt=PROMPT, response=RESPONSE, device="cpu")
    wanted = measured_peak(configuration(family), config)
    # Observed within 1%; what is asked for is 10%.
    assert found.peak == pytest.approx(wanted, rel=0.03)


def cuda(family: str = "Llama", **options: Any) -> Any:
    config = TrainConfig(**{"max_tokens": 2000, **options})
    return estimate(configuration(family), config, prompt=512, response=256)


def test_options_save_what_they_promise():
    plain = cuda(gradient_checkpointing=False)
    assert cuda().activations < plain.activations
    assert cuda(mlp_tile_tokens=64, gradient_checkpointing=False).activations < plain.activations
    offloaded = cuda(activation_offloading=True)
    assert offloaded.peak < cuda().peak
    assert offloaded.host > 0 == cuda().host
    lora = cuda(use_peft=True)
    assert lora.gradients < plain.gradients / 4
    assert lora.optimizer == 2 * lora.gradients
    # Embeddings and head, 2 MiB of 4.5, are not quantized.
    assert cuda(use_peft=True, load_in_4bit=True).weights < 0.7 * lora.weights
    assert cuda(precompute_ref_log_probs=False).reference == plain.weights
    assert cuda(precompute_ref_log_probs=False, use_peft=True).reference == 0


def test_a_loss_says_what_it_takes():
    plain = cuda()
    assert cuda(loss_type="aot").peak == pytest.approx(plain.peak, rel=0.01)
    assert cuda(loss_type="kto").pairs > plain.pairs
    assert cuda(loss_type="simpo").reference == 0
    assert cuda(loss_type="exo_pair").peak == pytest.approx(plain.peak, rel=0.01)
    orpo = TrainConfig(loss_type="orpo", batch_size=2)
    assert estimate(configuration("Llama"), orpo, prompt=1, response=5).tokens == 2 * 11
    fit = longest_pair(configuration("Llama"), TrainConfig(loss_type="kto"), 24.0)
    assert "Longest response" in str(fit) and "1 x" in str(fit)


def test_a_shared_prompt_saves_memory():
    pairs: dict[str, Any] = {"max_tokens": 10**6, "batch_size": 1}
    assert cuda(**pairs).tokens == 512 + 2 * 256
    assert cuda(layout="packed", **pairs).tokens == 2 * (512 + 256)
    assert cuda(**pairs).peak < cuda(layout="packed", **pairs).peak


def test_steps_do_not_leave_anything_behind():
    simulation = Simulation(configuration("Llama"), TrainConfig(), 24.0)
    assert of_step(simulation, 200, 300) == of_step(simulation, 200, 300)


def test_real_calls_get_no_buffer_of_a_simulated_one():
    Stash._idle.clear()
    estimate(configuration("Llama"), TrainConfig(), prompt=64, response=64, device="cpu")
    assert not Stash._idle


def test_a_gpu_is_simulated_where_triton_is_not_installed(tmp_path):
    configuration("Llama").save_pretrained(tmp_path)
    code = f"""
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
from fastdpo.plan.step import estimate
from fastdpo.train.config import TrainConfig
print(estimate({str(tmp_path)!r}, TrainConfig(), prompt=64, response=64).peak)
from fastdpo.kernels import fold
print(type(fold.fold_kernel).__name__)
"""
    env = os.environ | {"TRITON_INTERPRET": "0"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    wanted = estimate(str(tmp_path), TrainConfig(), prompt=64, response=64)
    assert out.stdout.split() == [str(wanted.peak), "_Nothing"], out.stderr


def test_nothing_stands_for_a_gpu_afterwards():
    cpu = torch.device("cpu")
    with device.simulated((8, 0)):
        assert device.is_gpu(cpu) and device.capability_of(cpu) == (8, 0)
        assert support.unsupported_reason(cpu) is None
        assert "float64" in str(support.unsupported_reason(cpu, torch.float64))
    assert not device.is_gpu(cpu) and device.capability_of(cpu) is None


def test_longest_pair_fits_and_a_longer_one_does_not():
    sizes = configuration("Llama", max_position_embeddings=2**15, num_hidden_layers=1)
    config = TrainConfig(gradient_checkpointing=False)
    found = longest_pair(sizes, config, 0.8)
    prompt = found.longest // 4
    assert 0 < found.longest < found.limit

    def peak(length: int) -> int:
        whole = TrainConfig(gradient_checkpointing=False, max_tokens=length)
        return estimate(sizes, whole, prompt=prompt, response=length - prompt).peak

    assert peak(found.longest) == found.estimate.peak <= found.usable
    assert peak(found.longest * 11 // 10) > found.usable
    rows = str(found).splitlines()
    assert f"2 x {found.longest:>6}  as configured" in rows[1]
    assert len(rows) == len(found.options) + 1
    assert any(o.name == "gradient_checkpointing=True" for o in found.options)


@pytest.mark.parametrize("gpu_gib", [0, -1, float("nan"), float("inf"), 0.5, True])
def test_memory_of_no_gpu(gpu_gib):
    with pytest.raises(ConfigError, match=r"^gpu_gib=.* must be the memory of a GPU in GiB"):
        usable_bytes(gpu_gib)


def test_a_gpu_too_small_for_the_weights():
    sizes = configuration("Llama", vocab_size=400_000, hidden_size=512)
    with pytest.raises(ConfigError, match=r"^gpu_gib=0.7 is too small for this model whatever"):
        longest_pair(sizes, TrainConfig(), 0.7)


def test_bad_input(tmp_path):
    config, sizes = TrainConfig(), configuration("Llama")
    with pytest.raises(ConfigError, match=r"^prompt=0 must be a positive number of tokens"):
        estimate(sizes, config, prompt=0, response=1)
    with pytest.raises(ConfigError, match=r"^device='tpu' must be one of cuda, cpu"):
        estimate(sizes, config, prompt=1, response=1, device="tpu")
    with pytest.raises(ModelError, match=r"^config.json of model=.* cannot be had"):
        estimate(str(tmp_path), config, prompt=1, response=1)


def test_a_folder_with_its_configuration_is_enough(tmp_path):
    configuration("Llama").save_pretrained(tmp_path)
    args: dict[str, Any] = {"prompt": 64, "response": 64}
    assert estimate(str(tmp_path), TrainConfig(), **args) == estimate(
        configuration("Llama"), TrainConfig(), **args
    )
