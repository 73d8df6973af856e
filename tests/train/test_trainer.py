"""Packed pairs through real model code: isolation, equality with one-by-one, training, resuming."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from tiny import (
    BLOOM,
    COHERE,
    GEMMA,
    GEMMA3,
    GRANITE,
    LLAMA,
    LLAMA4,
    MAMBA,
    MISTRAL,
    MIXTRAL,
    OLMO,
    OLMO2,
    OPT,
    PHI,
    QWEN,
    QWEN2_MOE,
    build_tokenizer,
    save_tiny,
)

from fastdpo.data.batch import Segments, pack_pairs
from fastdpo.data.examples import LAYOUTS, TokenizedPair
from fastdpo.errors import ConfigError, ModelError
from fastdpo.loss import reference
from fastdpo.model import attention, head
from fastdpo.model.load import load_causal_lm, load_tokenizer
from fastdpo.model.prepare import layout_of, packed_loss, prepare_model
from fastdpo.train.config import TrainConfig
from fastdpo.train.trainer import train

FAMILIES = [LLAMA, QWEN, GEMMA, GEMMA3, MISTRAL, COHERE, GRANITE, PHI, OLMO, OLMO2]
VOCAB = len(build_tokenizer())


def random_pairs(count, seed=0, longest=20):
    generator = torch.Generator().manual_seed(seed)

    def ids():
        length = int(torch.randint(1, longest, (), generator=generator))
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    return [TokenizedPair(ids(), ids(), ids()) for _ in range(count)]


def one_by_one(model, pairs, ref_logp_S):
    """Loss of the plain model, a sequence at a time, from its full logits."""
    sums, lengths = [], []
    for pair in pairs:
        for response in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([pair.prompt_ids + response])
            logp = model(ids, use_cache=False).logits[0].log_softmax(-1)
            rows = logp[len(pair.prompt_ids) - 1 : -1]
            sums.append(rows.gather(1, torch.tensor(response)[:, None]).sum())
            lengths.append(len(response))
    logp_S = torch.stack(sums)
    return logp_S, reference.dpo_loss(
        logp_S, ref_logp_S, torch.tensor(lengths), beta=0.1, alpha=0.02
    ).mean()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_by_one(family, checkpointing, layout):
    if checkpointing and layout == "packed":
        pytest.skip("the attention's arguments go through a checkpoint as with shared prompts")
    torch.manual_seed(0)
    plain = family.build(VOCAB).double().eval()
    plain.set_attn_implementation("eager")
    packed = prepare_model(
        copy.deepcopy(plain), layout=layout, gradient_checkpointing=checkpointing
    )
    assert layout_of(packed) == layout
    pairs = random_pairs(3)
    ref_logp_S = -50 + 10 * torch.randn(6, dtype=torch.float64)
    logp_S, loss = one_by_one(plain, pairs, ref_logp_S)
    loss.backward()
    batch = pack_pairs(pairs, layout=layout)
    result = packed_loss(packed, batch, ref_logp_S, beta=0.1, alpha=0.02)
    result.loss.backward()
    # rotary embeddings and eager softmax are fp32 in any model
    torch.testing.assert_close(result.logp_S, logp_S, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.loss, loss, rtol=1e-6, atol=1e-6)
    for (name, p), q in zip(plain.named_parameters(), packed.parameters()):
        # float32 inside the models' own norms and rotary embeddings
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_of_experts_shares_prompts(dtype):
    torch.manual_seed(0)
    plain = MIXTRAL.build(VOCAB).to(dtype)
    found, pairs, zeros_S = {}, random_pairs(3), torch.zeros(6)
    for layout in ("auto", "padded"):
        model = prepare_model(copy.deepcopy(plain), layout=layout)
        found[layout_of(model)] = packed_loss(
            model, pack_pairs(pairs, layout=layout_of(model)), zeros_S, beta=0.1, alpha=0.0
        ).logp_S
    assert set(found) == {"shared", "padded"}
    # A sum of up to 20 log-probs near -6: rounding of hidden states, once a layer.
    bound = 20 * 6 * torch.finfo(dtype).eps
    torch.testing.assert_close(found["shared"], found["padded"], rtol=0, atol=bound)


def test_a_model_that_leaks_between_sequences_is_refused(monkeypatch):
    real = attention.packed_attention

    def leaky(module, query, key, value, mask, segments=None, **kwargs):
        T = query.shape[2]
        cu = torch.tensor([0, T], dtype=torch.int32)
        everything = Segments((0, T), (0, T), cu, cu)
        return real(module, query, key, value, mask, segments=everything, **kwargs)

    monkeypatch.setattr(attention, "packed_attention", leaky)
    for layout in ("shared", "packed"):
        with pytest.raises(ModelError, match="not isolated"):
            prepare_model(LLAMA.build(VOCAB), layout=layout)


@pytest.mark.parametrize("family", [MAMBA, BLOOM], ids=lambda family: family.name)
def test_recurrent_and_own_attention_models_are_padded_or_refused(family, caplog):
    for layout in ("shared", "packed"):
        with pytest.raises(ModelError, match=r"runs across packed|AttentionInterface"):
            prepare_model(family.build(VOCAB), layout=layout)
    assert layout_of(prepare_model(family.build(VOCAB))) == "padded"
    assert "padded" in caplog.text and "shared:" in caplog.text


def test_a_window_that_is_in_the_mask_only_is_not_lost():
    """Qwen2-MoE's attention does not pass its window on; no probe is as long as real windows."""
    torch.manual_seed(0)
    plain = QWEN2_MOE.build(VOCAB)
    with pytest.raises(ModelError, match="a window or chunk of 30 tokens to a mask"):
        prepare_model(copy.deepcopy(plain), layout="shared")
    model = prepare_model(copy.deepcopy(plain))
    assert layout_of(model) == "padded"
    pairs = [TokenizedPair([5] * 60, [6] * 40, [7, 8] * 25)]
    zeros_S = torch.zeros(2)
    found = packed_loss(model, pack_pairs(pairs, layout="padded"), zeros_S, beta=0.1, alpha=0.0)
    wanted, _ = one_by_one(plain.eval(), pairs, zeros_S)
    torch.testing.assert_close(found.logp_S.float(), wanted.float(), rtol=1e-5, atol=0)


def test_a_model_without_a_body_of_its_own_is_refused():
    with pytest.raises(ModelError, match=r"no body apart from its head|not a plain nn.Linear"):
        prepare_model(LLAMA4.build(VOCAB))


def test_dropout_is_off_so_the_first_loss_is_log_2():
    """OPT keeps its dropout and layerdrop as plain numbers."""
    model = prepare_model(OPT.build(VOCAB))
    assert model.training
    batch = pack_pairs(random_pairs(3))
    with torch.no_grad():
        zeros_S = torch.zeros(6, dtype=torch.float64)
        ref_logp_S = packed_loss(model, batch, zeros_S, beta=0.1, alpha=0.0).logp_S
    loss = packed_loss(model, batch, ref_logp_S, beta=0.1, alpha=0.0).loss
    assert loss == torch.tensor(2.0).log()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cap_of_attention_is_kept_from_sdpa(layout, monkeypatch, tmp_path):
    """transformers before 5.22 gives Gemma 2 SDPA, which leaves its cap out or fails."""
    plain = GEMMA.build(VOCAB).eval()
    plain.config.attn_logit_softcapping = 0.5
    for layer in plain.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.5
    pairs, zeros_S = random_pairs(3), torch.zeros(6)
    plain.set_attn_implementation("eager")
    wanted, _ = one_by_one(plain, pairs, zeros_S)
    monkeypatch.setattr(type(plain), "_supports_sdpa", True)
    plain.set_attn_implementation("sdpa")
    model = prepare_model(copy.deepcopy(plain), layout=layout)
    assert layout_of(model) == layout
    batch = pack_pairs(pairs, layout=layout)
    found = packed_loss(model, batch, zeros_S, beta=0.1, alpha=0.0).logp_S
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    plain.save_pretrained(tmp_path)
    monkeypatch.undo()
    # As a sampler loads it.
    found, _ = one_by_one(load_causal_lm(str(tmp_path)), pairs, zeros_S)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_head_with_an_unknown_factor_is_refused():
    model = LLAMA.build(VOCAB)
    plain = model.forward

    def tripled(*args, **kwargs):
        outputs = plain(*args, **kwargs)
        outputs.logits = 3 * outputs.logits
        return outputs

    model.forward = tripled
    with pytest.raises(ModelError, match="does not reproduce"):
        prepare_model(model)


@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_half_precision_is_no_unknown_factor(factor):
    """bf16 rounds logits of 200 by up to 0.5; a factor on them is still seen."""
    model = LLAMA.build(VOCAB).bfloat16()
    with torch.no_grad():
        hidden = model.model(torch.arange(VOCAB)[None]).last_hidden_state
        model.lm_head.weight *= 200 / model.lm_head(hidden).abs().max()
    plain = model.forward

    def scaled(*args, **kwargs):
        outputs = plain(*args, **kwargs)
        if "head_call" not in kwargs:
            outputs.logits = factor * outputs.logits
        return outputs

    model.forward = scaled
    with nullcontext() if factor == 1.0 else pytest.raises(ModelError, match="not reproduce"):
        prepare_model(model)


def test_noise_in_a_model_is_refused():
    model = LLAMA.build(VOCAB)
    layer = model.model.layers[0].mlp
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1e-3 * torch.randn_like(x) * layer.training
    with pytest.raises(ModelError, match="two forward passes"):
        prepare_model(model)


def test_packed_attention_refuses_unpacked_use():
    model = prepare_model(LLAMA.build(VOCAB))
    with pytest.raises(ValueError, match="got no segments"):
        model(torch.tensor([[3, 4, 5]]))


def test_lora_on_the_head_is_refused():
    model = LLAMA.build(VOCAB)

    class Wrapped(torch.nn.Linear):
        pass

    model.set_output_embeddings(Wrapped(32, VOCAB, bias=False))
    with pytest.raises(ValueError, match="lm_head"):
        head.attach(model)


def test_a_copy_of_a_prepared_model_is_a_model_of_its_own():
    model = prepare_model(LLAMA.build(VOCAB))
    twin = copy.deepcopy(model)
    batch, zeros_S = pack_pairs(random_pairs(2)), torch.zeros(4)
    before = packed_loss(twin, batch, zeros_S, beta=0.1, alpha=0.0).loss
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    after = packed_loss(twin, batch, zeros_S, beta=0.1, alpha=0.0).loss
    assert torch.equal(before, after)
    after.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.parameters())


def test_attached_head_still_gives_logits():
    model = LLAMA.build(VOCAB).eval()
    ids = torch.arange(3, 12)[None]
    before = model(ids).logits
    head.attach(model)
    assert torch.equal(model(ids).logits, before)


CONFIG = dict(
    batch_size=4, max_length=48, max_tokens=120, save_steps=2, learning_rate=1e-3, alpha=0.0,
    gradient_checkpointing=False, warmup_ratio=0.0, reference_cache=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return str(save_tiny(LLAMA, tmp_path_factory.mktemp("model") / "llama"))


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "policy" / "model.safetensors")


def run(model_path, out, pairs=None, **changes):
    pairs = random_pairs(14) if pairs is None else pairs
    config = TrainConfig(**{**CONFIG, **changes})
    return train(model_path, load_tokenizer(model_path), pairs, config, out, progress=False)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("workspace_mib", [None, 0.05])
def test_first_loss_is_log_2_and_falls(model_path, tmp_path, bf16, workspace_mib):
    run(model_path, tmp_path, bf16=bf16, workspace_mib=workspace_mib, num_train_epochs=6)
    rows = [json.loads(line) for line in (tmp_path / "metrics" / "metrics.jsonl").open()]
    assert len(rows) == 6 * 4
    assert torch.tensor(rows[0]["loss"]) == torch.tensor(2.0).log()
    assert rows[-1]["loss"] < 0.6 and rows[-1]["rewards/margins"] > 0
    assert rows[0]["learning_rate"] == 1e-3
    assert {"rewards/accuracies", "logps/chosen", "lengths/rejected", "grad_norm"} <= set(rows[0])


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics" / "metrics.jsonl").open()]


def test_every_layout_gives_the_same_loss_curve(model_path, tmp_path):
    for layout in LAYOUTS:
        run(model_path, tmp_path / layout, bf16=False, layout=layout, num_train_epochs=3)
    curves = [[row["loss"] for row in read_metrics(tmp_path / layout)] for layout in LAYOUTS]
    assert len(curves[0]) == 12 and curves[0][-1] < 0.6
    assert len({row["num_tokens"] for x in LAYOUTS for row in read_metrics(tmp_path / x)[:1]}) == 3
    for curve in curves[1:]:
        # Adam divides by the size of a gradient, so rounding grows over the steps.
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(curves[0]), rtol=2e-3, atol=0)
    ends = [weights(tmp_path / layout) for layout in LAYOUTS]
    for end in ends[1:]:
        for name in end:
            torch.testing.assert_close(end[name], ends[0][name], rtol=1e-2, atol=2e-4)


def test_the_fill_rate_is_logged(model_path, tmp_path):
    run(model_path, tmp_path)
    for row in read_metrics(tmp_path):
        batches = row["num_tokens"] / (row["fill_rate"] * CONFIG["max_tokens"])
        assert 0 < row["fill_rate"] <= 1 and batches == pytest.approx(round(batches))


def test_packing_does_not_change_training(model_path, tmp_path):
    run(model_path, tmp_path / "tight", bf16=False)
    run(model_path, tmp_path / "loose", bf16=False, max_tokens=4000)
    tight, loose = weights(tmp_path / "tight"), weights(tmp_path / "loose")
    for name in tight:
        torch.testing.assert_close(tight[name], loose[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_interrupted_training_ends_in_the_same_bits(model_path, tmp_path, monkeypatch, stop_after):
    from fastdpo.train import trainer

    run(model_path, tmp_path / "whole")
    real, calls = trainer.take_step, []

    def interrupted(*args):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(trainer, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model_path, tmp_path / "broken")
    monkeypatch.setattr(trainer, "take_step", real)
    run(model_path, tmp_path / "broken")
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    lines = (tmp_path / "broken" / "metrics" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_another_run_in_the_same_folder_is_refused(model_path, tmp_path):
    run(model_path, tmp_path)
    with pytest.raises(ConfigError, match="other pairs"):
        run(model_path, tmp_path, pairs=random_pairs(14, seed=1))
    with pytest.raises(ConfigError, match=r"beta=0.1, not 0.2"):
        run(model_path, tmp_path, beta=0.2)
    run(model_path, tmp_path, save_steps=7)  # where it is saved does not change what it is


def test_a_single_step_trains(model_path, tmp_path):
    run(model_path, tmp_path, pairs=random_pairs(3), warmup_ratio=0.1)
    (row,) = [json.loads(line) for line in (tmp_path / "metrics" / "metrics.jsonl").open()]
    assert row["learning_rate"] == 1e-3
    from safetensors.torch import load_file

    start = load_file(f"{model_path}/model.safetensors")
    assert any(not torch.equal(start[name], x) for name, x in weights(tmp_path).items())


def test_the_schedule_warms_up_and_falls(model_path, tmp_path):
    run(model_path, tmp_path, num_train_epochs=2, warmup_ratio=0.25)
    rows = [json.loads(line) for line in (tmp_path / "metrics" / "metrics.jsonl").open()]
    rates = [row["learning_rate"] for row in rows]
    assert len(rates) == 8 and rates.index(max(rates)) == 2 and max(rates) == 1e-3
    assert 0 < rates[0] < rates[1] and rates[2:] == sorted(rates[2:], reverse=True)


def test_returned_metrics_are_means_over_pairs(model_path, tmp_path):
    metrics = run(model_path, tmp_path, pairs=random_pairs(5))
    rows = [json.loads(line) for line in (tmp_path / "metrics" / "metrics.jsonl").open()]
    assert [row["pairs"] for row in rows] == [4, 1]
    mean = (4 * rows[0]["loss"] + rows[1]["loss"]) / 5
    assert metrics["loss"] == pytest.approx(mean, rel=1e-12)


def test_tokens_and_lengths_the_model_does_not_have(model_path, tmp_path):
    alien = [TokenizedPair([3], [VOCAB], [4])]
    with pytest.raises(ModelError, match=f"up to {VOCAB}"):
        run(model_path, tmp_path / "a", pairs=alien)
    long = [TokenizedPair([3] * 3000, [4], [5])]
    with pytest.raises(ModelError, match="2048 positions"):
        run(model_path, tmp_path / "b", pairs=long, max_length=4000, max_tokens=8000)


def test_a_diverging_run_stops_with_an_error(model_path, tmp_path):
    with pytest.raises(ValueError, match="finite range"):
        run(model_path, tmp_path, learning_rate=1e30, bf16=False)
    assert not (tmp_path / "policy").exists()


def test_policy_loads_in_transformers(model_path, tmp_path):
    from transformers import AutoModelForCausalLM

    run(model_path, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], weights(tmp_path)[name])
    assert not torch.equal(
        model.state_dict()[name],
        AutoModelForCausalLM.from_pretrained(model_path).state_dict()[name],
    )
