"""The memory planner against what real steps take, as PyTorch's own allocator records it."""

import gc
from typing import Any

import pytest
import torch
import transformers

from fastdpo.data.batch import TokenizedPair, pack_pairs
from fastdpo.errors import ConfigError, ModelError
from fastdpo.loss.streaming import Stash
from fastdpo.model import balance
from fastdpo.model.adapters import add_lora
from fastdpo.model.prepare import layout_of, packed_loss, prepare_model
from fastdpo.plan.memory import estimate, longest_pair, usable_bytes
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

    layout = layout_of(model)
    tokens = TokenizedPair([0] * PROMPT, [0] * RESPONSE, [0] * RESPONSE).num_tokens(layout)
    count = min(config.batch_size, max(1, config.max_tokens // tokens))
    for _ in range(2):
        for _ in range(2 if count < config.batch_size else 1):
            pairs = [TokenizedPair(ids(PROMPT), ids(RESPONSE), ids(RESPONSE)) for _ in range(count)]
            reference = torch.full((2 * count,), -1000.0, dtype=torch.float64)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16, cache_enabled=False):
                result = packed_loss(
                    model, pack_pairs(pairs, layout=layout), reference, beta=0.1, alpha=0.01,
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


def test_a_shared_prompt_saves_memory():
    pairs: dict[str, Any] = {"max_tokens": 10**6, "batch_size": 1}
    assert cuda(**pairs).tokens == 512 + 2 * 256
    assert cuda(layout="packed", **pairs).tokens == 2 * (512 + 256)
    assert cuda(**pairs).peak < cuda(layout="packed", **pairs).peak


def test_steps_do_not_leave_anything_behind():
    import fastdpo.plan.memory as memory

    simulation = memory._Simulation(configuration("Llama"), TrainConfig(), 24.0)
    assert simulation.step(200, 300) == simulation.step(200, 300)


def test_real_calls_get_no_buffer_of_a_simulated_one():
    Stash._idle.clear()
    estimate(configuration("Llama"), TrainConfig(), prompt=64, response=64, device="cpu")
    assert not Stash._idle


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
