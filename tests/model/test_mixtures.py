"""Mixtures of experts: the router's balancing loss, and adapters on experts that are parameters."""

import inspect
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import build_tokenizer

from fastdpo.data.batch import pack_pairs, plan_batches
from fastdpo.data.examples import TokenizedPair
from fastdpo.errors import ConfigError, ModelError
from fastdpo.model import balance
from fastdpo.model.adapters import (
    adapted_parameters,
    add_lora,
    load_4bit,
    merged,
    reference_mode,
    save_adapter,
    trainable_share,
)
from fastdpo.model.prepare import packed_loss, prepare_model
from fastdpo.train.config import TrainConfig
from fastdpo.train.metrics import read_metrics
from fastdpo.train.prepare import prepare_policy
from fastdpo.train.trainer import train

PAIRS = [
    TokenizedPair([5, 6, 7], [8, 9, 10, 11], [12, 13]),
    TokenizedPair([15, 16], [17], [18, 19, 20]),
    TokenizedPair([21, 22, 23, 24], [25, 26], [27, 28, 29, 30, 31]),
]
SIZES: dict[str, Any] = dict(
    vocab_size=99, hidden_size=32, intermediate_size=24, moe_intermediate_size=24,
    shared_expert_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, num_experts=4,
    num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, initializer_range=0.2,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
EXTRA: dict[str, dict[str, Any]] = {
    "deepseek_v3": dict(
        _LATENT, num_key_value_heads=4, n_group=1, topk_group=1, first_k_dense_replace=1
    ),
    "jetmoe": dict(kv_channels=8),
    "doge": dict(is_moe=True),
}


def build(family: str, **changes: Any) -> Any:
    sizes = {**SIZES, **EXTRA.get(family, {}), **changes}
    config = transformers.AutoConfig.for_model(family, **sizes)
    # The loop over experts is the one implementation that takes every dtype.
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def plain_loss(model: Any, coefficient: float, *, prompt_once: bool) -> tuple[Any, Any]:
    """DPO by autograd on padded rows of the model's own forward, and its balancing loss."""
    rows = [p.prompt_ids + x for p in PAIRS for x in (p.chosen_ids, p.rejected_ids)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    out = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    aux = out.aux_loss
    if prompt_once:
        for i, pair in enumerate(PAIRS):
            mask[2 * i + 1, : len(pair.prompt_ids)] = 0
        function = sys.modules[type(model).__module__].load_balancing_loss_func
        aux = function(out.router_logits, model.num_experts, model.num_experts_per_tok, mask)
    logp = out.logits.double().log_softmax(-1)
    sums = []
    for i, row in enumerate(rows):
        start = len(PAIRS[i // 2].prompt_ids)
        sums.append(sum(logp[i, t - 1, row[t]] for t in range(start, len(row))))
    margins = torch.stack([sums[i] - sums[i + 1] for i in range(0, len(rows), 2)])
    preference = torch.nn.functional.softplus(-0.1 * margins).mean()
    return preference + coefficient * aux, aux


@pytest.mark.parametrize(
    ("family", "layout", "checkpointing"),
    [
        ("mixtral", "padded", False),
        ("mixtral", "packed", True),
        ("mixtral", "shared", False),
        ("qwen3_moe", "padded", True),
        ("qwen3_moe", "shared", True),
        ("jetmoe", "padded", False),  # aux_loss_coef, and experts in the attention
    ],
)
def test_the_balancing_loss_is_that_of_the_models_own_forward(family, layout, checkpointing):
    plain = build(family).double()
    model = build(family).double()
    prepare_model(model, layout=layout, gradient_checkpointing=checkpointing)
    balance.check_balance(model)
    wanted, aux = plain_loss(plain, 0.3, prompt_once=layout == "shared")
    wanted.backward()
    zeros = torch.zeros(2 * len(PAIRS), dtype=torch.float64)
    batch = pack_pairs(PAIRS, layout=layout)
    found = packed_loss(model, batch, zeros, beta=0.1, alpha=0.0, router_aux_loss_coef=0.3)
    found.loss.backward()
    # Transformers sums the probabilities in fp32, in another order for other rows.
    close: dict[str, Any] = dict(rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.metrics["aux_loss"], aux.detach(), **close)
    torch.testing.assert_close(found.loss.double(), wanted.detach().double(), **close)
    assert found.metrics["preference_loss"] < found.loss
    gradients = {n: p.grad for n, p in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], **close, msg=name)


def options(**changes: Any) -> TrainConfig:
    defaults: dict[str, Any] = dict(
        batch_size=3, max_length=64, max_tokens=20, bf16=False, learning_rate=1e-3, alpha=0.0,
        reference_cache=None, warmup_ratio=0.0,
    )  # fmt: skip
    return TrainConfig(**{**defaults, **changes})


@pytest.mark.parametrize(("layout", "budget"), [("shared", 20), ("padded", 28)])
def test_a_steps_balancing_loss_is_the_mean_over_its_tokens(tmp_path, layout, budget):
    tokens = [p.num_tokens("shared" if layout == "shared" else "packed") for p in PAIRS]
    lengths = [p.num_tokens(layout) for p in PAIRS]
    parts = plan_batches(lengths, max_tokens=budget, padded=layout == "padded")
    assert len(parts) == 2 and len(set(map(len, parts))) == 2
    model = prepare_model(build("mixtral"), layout=layout)
    total = 0.0
    for part in parts:
        batch = pack_pairs([PAIRS[i] for i in part], layout=layout)
        with torch.no_grad():
            reference = packed_loss(model, batch, torch.zeros(2 * len(part)), beta=0.1, alpha=0.0)
        weight = sum(tokens[i] for i in part) / sum(tokens)
        result = packed_loss(
            model, batch, reference.logp_S, beta=0.1, alpha=0.0, num_pairs=len(PAIRS),
            router_aux_loss_coef=0.5 * weight,
        )  # fmt: skip
        result.loss.backward()
        total += weight * float(result.metrics["aux_loss"])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)

    config = options(layout=layout, max_tokens=budget, router_aux_loss_coef=0.5)
    train(build("mixtral"), build_tokenizer(), PAIRS, config, tmp_path / "out", progress=False)
    [row] = read_metrics(tmp_path / "out" / "metrics" / "metrics.jsonl")
    assert row["aux_loss"] == pytest.approx(total, rel=1e-6)
    assert row["preference_loss"] == pytest.approx(math.log(2), rel=1e-8)
    assert row["loss"] == pytest.approx(math.log(2) + 0.5 * total, rel=1e-6)
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.slow
def test_two_processes_balance_like_two_micro_batches(tmp_path):
    tokenizer = build_tokenizer()
    build("mixtral", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    # One process has room for the pair of one process, so its micro-batches are their shares.
    rows = [{"prompt": "hi", "chosen": " nice" * n, "rejected": " no"} for n in (1, 3, 1, 3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def arguments(name: str) -> list[str]:
        return [
            "train", f"--model={tmp_path}/start", f"--dataset={tmp_path}/pairs.jsonl",
            f"--output_dir={tmp_path}/{name}", "--batch_size=2", "--max_tokens=40", "--bf16=false",
            "--max_length=40", "--reference_cache=null", "--router_aux_loss_coef=0.5",
            "--learning_rate=1e-3",
        ]  # fmt: skip

    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "-m", "fastdpo.cli"]
    logs = []
    for count in (1, 2):
        where = [*launch[:3], f"--num_processes={count}", *launch[3:]]
        done = subprocess.run(
            [sys.executable, *where, *arguments(str(count))],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        logs.append(read_metrics(tmp_path / str(count) / "metrics" / "metrics.jsonl"))
    assert len(logs[0]) == 2
    for one, two in zip(*logs):
        assert one["fill_rate"] == two["fill_rate"]  # as many micro-batches
        for name in ("loss", "preference_loss", "aux_loss", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), name


def test_the_configuration_or_the_option_decides():
    asks = build("mixtral", output_router_logits=True, router_aux_loss_coef=0.25)
    assert balance.coefficient(asks, None) == 0.25
    assert balance.coefficient(asks, 0.0) == 0.0
    assert balance.coefficient(asks, 2.0) == 2.0
    assert balance.coefficient(build("mixtral"), None) == 0.0  # as in its own loss
    asks = build("jetmoe", output_router_logits=True, aux_loss_coef=0.125)
    assert balance.coefficient(asks, None) == 0.125


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {}, "LlamaForCausalLM has no balancing loss of its own"),
        ("deepseek_v3", {}, "DeepseekV3ForCausalLM has no balancing loss of its own"),
        ("doge", {"num_experts": 16}, "takes num_keys"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "no layer with experts"),
    ],
)
def test_a_model_without_a_balancing_loss_is_refused_one(family, changes, message):
    with pytest.raises(ModelError, match=message):
        prepare_policy(build(family, **changes), options(router_aux_loss_coef=0.1))


def test_another_balancing_loss_than_the_models_is_refused():
    model: Any = prepare_model(build("mixtral"))
    balance.check_balance(model)
    plain = type(model).forward
    model._fastdpo_plain_forward = lambda **kw: _doubled(plain(model, **kw))
    with pytest.raises(ModelError, match="by its own forward but"):
        balance.check_balance(model)


def _doubled(output: Any) -> Any:
    output.aux_loss = 2 * output.aux_loss
    return output


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_an_impossible_coefficient_is_refused(value):
    with pytest.raises(ConfigError, match="router_aux_loss_coef"):
        TrainConfig(router_aux_loss_coef=value)


# ------------------------------------------------------------------------------------------- LoRA
FAMILIES = ["gpt_oss", "qwen2_moe", "granitemoe", "qwen3_moe", "deepseek_v3", "laguna"]


def lora(base: Any, modules: Any = None, parameters: Any = None) -> Any:
    return add_lora(base, r=4, alpha=8.0, target_modules=modules, target_parameters=parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_are_the_experts_too(family, tmp_path):
    base = build(family)
    if "self.gate.e_score_correction_bias" in Path(inspect.getfile(type(base))).read_text():
        pytest.skip("this transformers' layer reads a buffer of its router, which peft wraps")
    base.save_pretrained(tmp_path / "base")
    # Every matrix and every stack of matrices; biases of experts are matrices as well.
    wanted = {
        name
        for name, p in base.named_parameters()
        if p.ndim >= 2 and not name.endswith("_bias") and "embed" not in name and "head" not in name
    }
    model = prepare_model(lora(base), layout="padded")
    assert adapted_parameters(model) == wanted
    line = trainable_share(model)
    assert "experts" in line and "frozen" not in line and "are trained" in line

    batch = pack_pairs(PAIRS, layout="padded")
    zeros = torch.zeros(2 * len(PAIRS), dtype=torch.float64)

    def loss(reference: torch.Tensor) -> Any:
        return packed_loss(model, batch, reference, beta=0.5, alpha=0.0)

    with torch.no_grad(), reference_mode(model):
        reference = loss(zeros).logp_S
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(3):
        result = loss(reference)
        losses.append(float(result.loss))
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(math.log(2), rel=1e-8)
    assert losses[2] < losses[1] < losses[0]
    with torch.no_grad(), reference_mode(model):
        assert torch.equal(loss(zeros).logp_S, reference)

    save_adapter(model, tmp_path / "adapter")
    whole = merged(str(tmp_path / "base"), tmp_path / "adapter", torch.float32)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
        found = whole.eval()(input_ids=ids, use_cache=False).logits
        before = build(family).eval()(input_ids=ids, use_cache=False).logits
    # W x + B A x and (W + B A) x differ by rounding, some eps a layer.
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    assert float((before - logits).abs().max()) > 1e-2


def test_dense_layers_keep_the_names_that_peft_gives_to_experts():
    """To peft "up_proj" of DeepSeek-V3 is an expert's; here it is what the model calls so."""
    model = lora(build("deepseek_v3"), ["up_proj", "q_b_proj"])
    assert adapted_parameters(model) == {
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "model.layers.0.self_attn.q_b_proj.weight",
        "model.layers.1.self_attn.q_b_proj.weight",
    }


def test_what_stays_frozen_is_said(caplog):
    with caplog.at_level(logging.WARNING, "fastdpo"):
        model = lora(build("gpt_oss"), ["q_proj"])
    [record] = [x for x in caplog.records if x.name.startswith("fastdpo")]  # not bitsandbytes
    assert "experts (" in record.message and "are frozen, routers" in record.message
    assert "lora_target_parameters=['experts.down_proj', 'experts.gate_up_proj']" in record.message
    assert "routers" in trainable_share(model)
    chosen = lora(build("gpt_oss"), ["q_proj"], ["experts.down_proj"])
    assert "experts" in trainable_share(chosen) and "partly frozen" in trainable_share(chosen)
    assert {n.split(".")[-1] for n in adapted_parameters(chosen)} == {"weight", "down_proj"}
    only = lora(build("gpt_oss"), [], ["router.weight"])
    assert {n.split(".", 3)[3] for n in adapted_parameters(only)} == {"mlp.router.weight"}


@pytest.mark.parametrize(
    ("modules", "parameters", "message"),
    [
        (["gate_up_proj"], None, r"give lora_target_parameters=\['gate_up_proj'\]"),
        (["experts.down_proj"], None, r"lora_target_parameters=\['experts.down_proj'\]"),
        (["gate"], None, r"lora_target_parameters=\['gate.weight'\]"),
        (None, ["up_proj"], "it has experts.down_proj, experts.gate_up_proj, gate.weight"),
        (["q_proj"], ["q_proj.weight"], "fits no parameter of experts or routers"),
        ([], [], "fit no layer"),
    ],
)
def test_names_that_are_no_targets_are_refused(modules, parameters, message):
    with pytest.raises(ModelError, match=message):
        lora(build("mixtral"), modules, parameters)


def test_a_dense_model_has_no_parameters_to_name():
    with pytest.raises(ModelError, match="it has none, so leave the option out"):
        lora(build("llama"), None, ["gate_up_proj"])


@pytest.mark.parametrize("trains", [["gate.weight"], []])
def test_the_balancing_loss_reaches_adapters_behind_frozen_routers(trains):
    model = prepare_model(lora(build("mixtral"), None, trains), gradient_checkpointing=True)
    batch = pack_pairs(PAIRS)
    zeros = torch.zeros(2 * len(PAIRS), dtype=torch.float64)
    found = packed_loss(model, batch, zeros, beta=1e-9, alpha=0.0, router_aux_loss_coef=1.0)
    found.loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_B" in name and ("layers.0.self_attn.v_proj" in name or "gate" in name):
            assert parameter.grad is not None and float(parameter.grad.abs().max()) > 1e-6, name
    assert any("gate" in n for n, p in model.named_parameters() if p.requires_grad) == bool(trains)


def test_4_bits_leave_experts_as_they_are(tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    build("mixtral").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "fastdpo"):
        model = load_4bit(str(tmp_path), torch.bfloat16)
    assert "are parameters and stay in torch.bfloat16" in caplog.text
    assert model.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8


def test_adapters_of_experts_are_fp32_on_a_bf16_base():
    model = lora(build("mixtral").bfloat16())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
