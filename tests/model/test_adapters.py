"""LoRA and QLoRA: the base is the reference, adapters alone are trained, saved and merged."""

import copy
import json
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import GEMMA, LLAMA, QWEN, build_tokenizer, save_tiny
from transformers import AutoModelForCausalLM

from fastdpo.data.batch import pack_pairs
from fastdpo.data.examples import TokenizedPair
from fastdpo.errors import ModelError
from fastdpo.loss import reference
from fastdpo.model import adapters
from fastdpo.model.adapters import add_lora, load_trainable_state, reference_mode, trainable_state
from fastdpo.model.load import load_causal_lm, save_policy
from fastdpo.model.prepare import packed_loss, prepare_model

pytest.importorskip("peft")
VOCAB = len(build_tokenizer())
PAIRS = [
    TokenizedPair([5, 6, 7], [8, 9, 10, 11], [12, 13]),
    TokenizedPair([15, 16], [17], [18, 19, 20]),
    TokenizedPair([21, 22, 23, 24], [25, 26], [27, 28, 29, 30, 31]),
]
ZEROS_S = torch.zeros(2 * len(PAIRS), dtype=torch.float64)
FAMILIES = pytest.mark.parametrize("family", [LLAMA, QWEN, GEMMA], ids=lambda family: family.name)


def lora(base, r=4, alpha=8.0, target_modules=None):
    return add_lora(base, r=r, alpha=alpha, target_modules=target_modules)


def trained(model, scale=0.1):
    """Give the adapters values that make a difference."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=scale)
    return model


def loss_of(model, ref_logp_S=ZEROS_S, bf16=False, alpha=0.02):
    device = next(model.parameters()).device
    batch = pack_pairs(PAIRS).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return packed_loss(model, batch, ref_logp_S.to(device), beta=0.1, alpha=alpha)


@torch.no_grad()
def logps(model, bf16=False):
    return loss_of(model, bf16=bf16).logp_S


def plain_logps(model, pairs=PAIRS):
    """Log-prob sums from full logits, a sequence at a time."""
    sums = []
    for pair in pairs:
        for response in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([pair.prompt_ids + response])
            logp = model(ids, use_cache=False).logits[0].log_softmax(-1)
            rows = logp[len(pair.prompt_ids) - 1 : -1]
            sums.append(rows.gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(sums)


def lengths():
    return torch.tensor([len(x) for p in PAIRS for x in (p.chosen_ids, p.rejected_ids)])


def check_only_adapters_get_gradients(model):
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert not parameter.requires_grad and parameter.grad is None, name


@FAMILIES
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("wrap_first", [True, False])
def test_gradients_of_adapters_equal_those_of_the_plain_model(family, checkpointing, wrap_first):
    base = family.build(VOCAB).double().eval()
    plain = trained(lora(copy.deepcopy(base)))
    plain.set_attn_implementation("eager")
    if wrap_first:
        model: Any = prepare_model(lora(base), gradient_checkpointing=checkpointing)
    else:
        model = lora(prepare_model(base, gradient_checkpointing=checkpointing))
    load_trainable_state(model, trainable_state(plain))

    loss_of(model).loss.backward()
    logp_S = plain_logps(plain)
    reference.dpo_loss(logp_S, ZEROS_S, lengths(), beta=0.1, alpha=0.02).mean().backward()
    check_only_adapters_get_gradients(model)
    layers = model.config.num_hidden_layers
    assert len(trainable_state(model)) == 2 * 7 * layers  # q k v o gate up down
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters()):
        if p.requires_grad:
            # float32 inside the models' own norms and rotary embeddings
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=name)


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bf16", [False, True], ids=["as is", "autocast"])
def test_the_reference_is_the_base_to_the_bit(family, dtype, bf16):
    base = family.build(VOCAB).to(dtype)
    wanted = logps(prepare_model(copy.deepcopy(base)), bf16)
    model = prepare_model(lora(base))
    assert torch.equal(logps(model, bf16), wanted)
    assert loss_of(model, wanted, bf16, alpha=0.0).loss == torch.tensor(2.0).log()
    trained(model)
    assert not torch.equal(logps(model, bf16), wanted)
    with reference_mode(model):
        assert torch.equal(logps(model, bf16), wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_policy_is_back_after_the_reference(training, fails):
    model = trained(prepare_model(lora(LLAMA.build(VOCAB)))).train(training)
    frozen = next(p for name, p in model.named_parameters() if ".lora_A." in name)
    frozen.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    policy = logps(model)
    try:
        with reference_mode(model):
            with reference_mode(model):
                inner = logps(model)
            assert torch.equal(logps(model), inner)
            assert not torch.equal(inner, policy)
            assert model.training is training
            if fails:
                raise KeyError("of the caller")
    except KeyError:
        assert fails
    assert torch.equal(logps(model), policy)
    assert model.training is training
    assert [p.requires_grad for p in model.parameters()] == flags


def test_training_changes_adapters_only():
    model: Any = prepare_model(lora(QWEN.build(VOCAB)), gradient_checkpointing=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with reference_mode(model):
        ref_logp_S = logps(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = loss_of(model, ref_logp_S, alpha=0.0).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is (".lora_" not in name), name
    with reference_mode(model):
        assert torch.equal(logps(model), ref_logp_S)


@pytest.mark.parametrize(
    "targets, names",
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ("o_proj", {"o_proj"}),
        (["layers.1.mlp.down_proj"], {"down_proj"}),
        ("all-linear", {*"qkvo", "gate", "up", "down"}),
        (["all-linear"], {*"qkvo", "gate", "up", "down"}),
    ],
)
def test_adapters_are_where_they_were_asked_for(targets, names):
    model = lora(LLAMA.build(VOCAB), r=3, alpha=12.0, target_modules=targets)
    state = trainable_state(model)
    found = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in state}
    assert found == {name if "_" in name else f"{name}_proj" for name in names}
    assert all(3 in tensor.shape for tensor in state.values())
    layer = model.get_base_model().model.layers[1]
    module = next(m for m in layer.modules() if hasattr(m, "scaling") and hasattr(m, "lora_A"))
    assert module.scaling["default"] == 4.0


@pytest.mark.parametrize(
    "targets, message",
    [
        (["q_proj", "w_proj", "x"], r"\['w_proj', 'x'\] fit no layer of LlamaForCausalLM"),
        ([], r"lora_target_modules=\[\] fit no layer"),
        (r".*q_proj", r"fit no layer"),
        ("proj", r"fit no layer"),
        (["q_proj", "lm_head"], r"'lm_head' is the head of LlamaForCausalLM.*leave it out"),
        ("embed_tokens", r"'embed_tokens' is a Embedding"),
        (["mlp"], r"'mlp' is a LlamaMLP"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(targets, message):
    base = LLAMA.build(VOCAB)
    with pytest.raises(ModelError, match=message) as caught:
        lora(base, target_modules=targets)
    assert "\n" not in str(caught.value)
    assert all(p.requires_grad for p in base.parameters())
    assert len(trainable_state(lora(base))) == 28  # nothing was left behind


def test_a_model_with_adapters_gets_no_second_ones():
    model = lora(LLAMA.build(VOCAB))
    for adapted in (model, model.get_base_model()):
        with pytest.raises(ModelError, match="has adapters already"):
            lora(adapted)


def test_adapters_are_float32_and_drawn_from_the_seed():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        base = LLAMA.build(VOCAB).bfloat16()
        random = torch.get_rng_state()
        model = add_lora(base, r=4, alpha=8, target_modules=None, seed=seed)
        assert torch.equal(torch.get_rng_state(), random)
        torch.rand(3)
        states.append(trainable_state(model))
    assert {tensor.dtype for tensor in states[0].values()} == {torch.float32}
    first, again, other = ([x for n, x in s.items() if "lora_A" in n] for s in states)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


@pytest.mark.parametrize("use", ["reference_mode", "save_adapter", "merged_in_place"])
def test_a_model_without_adapters_is_refused(use, tmp_path):
    model = LLAMA.build(VOCAB)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM is no peft\.PeftModel"):
        if use == "reference_mode":
            with reference_mode(model):
                pass
        elif use == "save_adapter":
            adapters.save_adapter(model, tmp_path / "adapter")
        else:
            adapters.merged_in_place(model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package, extra", [("peft", "peft"), ("bitsandbytes", "qlora")])
def test_a_missing_package_is_named(package, extra, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=rf"pip install 'fastdpo\[{extra}\]'"):
        if package == "peft":
            lora(LLAMA.build(VOCAB))
        else:
            adapters.load_4bit(str(tmp_path), torch.float32)


@FAMILIES
def test_a_merged_model_equals_the_adapted_one(family, tmp_path):
    name = str(save_tiny(family, tmp_path / "base"))
    model: Any = trained(prepare_model(lora(load_causal_lm(name))))
    policy = logps(model)
    adapters.save_adapter(model, tmp_path / "adapter")
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors"}
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 28 and all(".lora_" in key for key in saved)

    plain = adapters.merged(name, tmp_path / "adapter", torch.float32)
    assert torch.equal(logps(model), policy)  # the training model is what it was
    loss_of(model).loss.backward()
    check_only_adapters_get_gradients(model)
    kept = plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert kept is plain.config.tie_word_embeddings
    check_standalone(plain, policy, tmp_path / "merged")
    check_standalone(adapters.merged_in_place(model), policy, tmp_path / "in_place")


@torch.no_grad()
def check_standalone(merged, policy_S, folder):
    """Saved and loaded by transformers alone, it computes the policy and is no peft model."""
    save_policy(merged, build_tokenizer(), folder)
    files = {file.name for file in folder.iterdir()}
    assert not any("adapter" in name for name in files)
    assert "peft" not in json.dumps(json.loads((folder / "config.json").read_text()))
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert not any(type(module).__module__.startswith("peft") for module in again.modules())
    tied = again.config.tie_word_embeddings
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    found = plain_logps(again).double()
    # A sum of some ten log-probs, each of a few dozen products of about 1.
    tolerance = 500 * torch.finfo(torch.float32).eps * policy_S.abs().max()
    assert (found - policy_S).abs().max() < tolerance
    merged.set_attn_implementation(again.config._attn_implementation)
    assert torch.equal(plain_logps(merged.eval()).double(), found)


@pytest.mark.parametrize("in_place", [True, False])
def test_merging_into_bf16_rounds_once(in_place, tmp_path):
    name = str(save_tiny(LLAMA, tmp_path / "base"))
    model = trained(lora(load_causal_lm(name, dtype=torch.bfloat16)), scale=0.02)
    wanted = {
        key: (module.base_layer.weight.float() + module.get_delta_weight("default")).bfloat16()
        for key, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }
    adapters.save_adapter(model, tmp_path / "adapter")
    if in_place:
        base = adapters.merged_in_place(model)
    else:
        base = adapters.merged(name, tmp_path / "adapter", torch.bfloat16)
    assert len(wanted) == 14
    for key, weight in wanted.items():
        assert torch.equal(base.get_submodule(key).weight, weight), key


def test_merging_in_float32_keeps_what_bfloat16_loses():
    """A change of a thousandth of the weights, more than a short run makes."""
    errors = []
    for dtype in (None, torch.float32):
        torch.manual_seed(0)
        model = trained(lora(LLAMA.build(VOCAB).bfloat16()), scale=5e-4)
        layer = model.get_base_model().model.layers[0].mlp.up_proj
        before, delta = layer.base_layer.weight.float(), layer.get_delta_weight("default")
        base = adapters.merged_in_place(model, dtype)
        assert {p.dtype for p in base.parameters()} == {dtype or torch.bfloat16}
        found = base.model.layers[0].mlp.up_proj.weight.float() - before
        errors.append(float((found - delta).norm() / delta.norm()))
    assert errors[0] > 0.5 and errors[1] < 1e-3


@pytest.mark.parametrize("present", [False, True])
def test_adapters_that_do_not_load_are_refused(present, tmp_path):
    name = str(save_tiny(LLAMA, tmp_path / "base"))
    if present:
        import transformers

        config = load_causal_lm(name).config
        config.hidden_size, config.intermediate_size = 64, 64
        wide = transformers.AutoModelForCausalLM.from_config(config)
        adapters.save_adapter(lora(wide), tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"adapters '.*adapter' cannot be loaded: ") as caught:
        adapters.merged(name, tmp_path / "adapter", torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("adapted", [True, False])
def test_trained_tensors_come_back(adapted):
    """Tied weights are there once, and only what is trained is there at all."""
    model = QWEN.build(VOCAB)
    model = trained(lora(model)) if adapted else model
    state = {name: tensor.clone() for name, tensor in trainable_state(model).items()}
    assert len(state) == (28 if adapted else len(list(model.parameters())))
    assert not any(name.endswith("lm_head.weight") for name in state)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    pointers = [p.data_ptr() for p in model.parameters()]
    load_trainable_state(model, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in trainable_state(model).items())
    assert [p.data_ptr() for p in model.parameters()] == pointers


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_trained_tensors_of_another_model_are_refused(change):
    model = lora(LLAMA.build(VOCAB))
    state = {name: tensor.clone() + 1 for name, tensor in trainable_state(model).items()}
    name = next(name for name in state if ".lora_B." in name)
    if change == "missing":
        del state[name]
    elif change == "unknown":
        state["other"] = state[name]
    else:
        state[name] = state[name][:1]  # would be broadcast
    with pytest.raises(ModelError, match=r"lora_B|other"):
        load_trainable_state(model, state)
    assert all(
        tensor.abs().max() == 0
        for name, tensor in trainable_state(model).items()
        if "lora_B" in name
    )


@pytest.fixture
def four_bit(request, tmp_path):
    """A tiny model in 4 bits, and the folder that it came from."""
    pytest.importorskip("bitsandbytes")
    family, dtype = request.param
    name = str(save_tiny(family, tmp_path / "base"))
    return adapters.load_4bit(name, dtype), name


FOUR_BIT = pytest.mark.parametrize(
    "four_bit",
    [(LLAMA, torch.float32), (QWEN, torch.bfloat16)],
    indirect=True,
    ids=["llama fp32", "qwen bf16, tied"],
)


@FOUR_BIT
def test_4bit_quantizes_all_but_the_head_the_embeddings_and_the_norms(four_bit):
    model, _ = four_bit
    dtype = model.config.dtype
    quantized = [m for m in model.modules() if is_4bit(m)]
    assert len(quantized) == 7 * model.config.num_hidden_layers
    for module in quantized:
        state = module.weight.quant_state
        assert (state.quant_type, state.nested) == ("nf4", True)
        assert module.compute_dtype == torch.bfloat16
    head = model.get_output_embeddings()
    assert type(head) is torch.nn.Linear
    others = {n: p for n, p in model.named_parameters() if p.dtype != torch.uint8}
    assert {p.dtype for p in others.values()} == {dtype}
    tied = head.weight is model.get_input_embeddings().weight
    assert tied is model.config.tie_word_embeddings


@FOUR_BIT
@pytest.mark.parametrize("checkpointing", [False, True])
def test_4bit_trains_as_the_dequantized_base_does(four_bit, checkpointing):
    model, _ = four_bit
    plain = lora(dequantized(model))
    four = [m for m in model.modules() if is_4bit(m)]
    before = [m.weight.detach().clone() for m in four]
    model = prepare_model(lora(model), gradient_checkpointing=checkpointing, bf16=True)
    start = logps(model, bf16=True)
    assert loss_of(model, start, bf16=True, alpha=0.0).loss == torch.tensor(2.0).log()
    trained(model)
    with reference_mode(model):
        assert torch.equal(logps(model, bf16=True), start)
    loss_of(model, bf16=True).loss.backward()
    check_only_adapters_get_gradients(model)
    assert len(four) == 14
    assert all(torch.equal(m.weight, weight) for m, weight in zip(four, before))

    state = {name: tensor.cpu() for name, tensor in trainable_state(model).items()}
    assert {tensor.dtype for tensor in trainable_state(model).values()} == {torch.float32}
    load_trainable_state(plain, state)
    logp_S = plain_logps(plain)
    reference.dpo_loss(logp_S, ZEROS_S, lengths(), beta=0.1, alpha=0.02).mean().backward()
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters()):
        if p.grad is not None and q.grad is not None:
            error = (p.grad.cpu() - q.grad).norm() / q.grad.norm()
            assert error < 0.1, (name, error)  # products in bf16


def is_4bit(module: Any) -> bool:
    return isinstance(module, pytest.importorskip("bitsandbytes").nn.Linear4bit)


def dequantized(model):
    """The function that a model in 4 bits computes, in fp32 on the CPU."""
    dequantize_4bit = pytest.importorskip("bitsandbytes").functional.dequantize_4bit
    plain = AutoModelForCausalLM.from_pretrained(model.name_or_path).float()
    with torch.no_grad():
        for key, module in model.named_modules():
            if is_4bit(module):
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain.get_parameter(f"{key}.weight").copy_(weight)
    return plain


@FOUR_BIT
def test_4bit_adapters_are_merged_into_the_unquantized_base(four_bit, tmp_path):
    base, name = four_bit
    dtype = base.config.dtype
    model = trained(lora(base))
    with pytest.raises(ModelError, match="rounded to 4 bits again"):
        adapters.merged_in_place(model)
    adapters.save_adapter(model, tmp_path / "adapter")
    merged = adapters.merged(name, tmp_path / "adapter", dtype)
    plain = load_causal_lm(name, dtype=dtype)
    changed = 0
    for key, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            delta = module.get_delta_weight("default").cpu()
            wanted = (plain.get_submodule(key).weight.float() + delta).to(dtype)
            torch.testing.assert_close(merged.get_submodule(key).weight, wanted)
            changed += 1
    assert changed == 14
    assert torch.equal(merged.lm_head.weight, plain.lm_head.weight)
    merged.save_pretrained(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_a_model_that_does_not_load_in_4bit_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ModelError, match="does not exist"):
        adapters.load_4bit(str(tmp_path / "none"), torch.float32)
