"""What models do between hidden states and logits: read from configurations, proved by a probe."""

from typing import Any

import pytest
import torch
import transformers
from tiny import LLAMA

from fastdpo.errors import ModelError
from fastdpo.loss import reference
from fastdpo.model import head
from fastdpo.model.head import head_settings

VOCAB = 320
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, initializer_range=0.2,
)  # fmt: skip
MAMBA: dict[str, Any] = dict(
    mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=16
)
VISION: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
)


def config(name, **extra):
    return getattr(transformers, name)(**{**SIZES, **extra})


def nested(name, **extra):
    """A multimodal configuration; only its text is used."""
    text = {**SIZES, **extra}
    return getattr(transformers, name)(text_config=text, vision_config=VISION)


# Configurations and what their models do: scale and soft cap.
CASES = {
    "recurrent_gemma": (
        lambda: config(
            "RecurrentGemmaConfig", num_hidden_layers=3, num_key_value_heads=1, lru_width=64,
            attention_window_size=16, logits_soft_cap=30.0,
        ), 1.0, 30.0,
    ),
    "xlstm": (
        lambda: transformers.xLSTMConfig(
            vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_heads=4, chunk_size=16,
            output_logit_soft_cap=100.0,
        ), 1.0, 100.0,
    ),
    "falcon_h1": (lambda: config("FalconH1Config", **MAMBA, lm_head_multiplier=0.25), 0.25, None),
    "hyperclovax": (lambda: config("HyperCLOVAXConfig", logits_scaling=4.0), 4.0, None),
    "granite": (lambda: config("GraniteConfig", logits_scaling=4.0), 0.25, None),
    "muse": (
        lambda: nested("MuseGlimmerConfig", output_multiplier=0.5, final_logit_softcapping=20.0),
        0.5, 20.0,
    ),
    "minicpm3": (
        lambda: config(
            "MiniCPM3Config", num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32,
            qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, dim_model_base=16,
        ), 0.25, None,
    ),
    # Names that the models' code leaves out.
    "mpt": (
        lambda: transformers.MptConfig(
            vocab_size=VOCAB, d_model=64, n_heads=4, n_layers=2, logit_scale=0.25
        ), 1.0, None,
    ),
    "gemma3": (lambda: nested("Gemma3Config", final_logit_softcapping=20.0), 1.0, None),
    "llama": (lambda: config("LlamaConfig", logit_scale=0.25), 1.0, None),
}  # fmt: skip


def build(settings):
    torch.manual_seed(0)
    architectures = {
        "muse_glimmer": "MuseGlimmerForConditionalGeneration",
        "gemma3": "Gemma3ForConditionalGeneration",
    }
    name = architectures.get(settings.model_type)
    if name:
        return getattr(transformers, name)(settings).eval()
    return transformers.AutoModelForCausalLM.from_config(settings).eval()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_settings_are_those_of_the_models_code(name, bf16):
    make, scale, softcap = CASES[name]
    try:
        settings = make()
    except AttributeError as error:
        pytest.skip(str(error))  # a model that came later than this transformers
    assert head_settings(settings) == {"scale": scale, "softcap": softcap}
    model = build(settings)
    head.attach(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        head.check(model)
        if bf16:
            return
        # And against the model's own logits, without the probe.
        ids = torch.arange(3, 40)[None]
        want = model(input_ids=ids, use_cache=False).logits[0].double()
        call = head.HeadCall(lambda h, w_VD, bias_V, **s: reference.linear_logits(h, w_VD, **s))
        found = model(input_ids=ids, head_call=call).double()
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("cap", [30.0, 100.0])
def test_an_unknown_cap_is_seen_at_logits_far_below_it(cap, bf16):
    model = build(config("LlamaConfig", initializer_range=0.02))
    plain = model.forward

    def capped(*args, **kwargs):
        outputs = plain(*args, **kwargs)
        outputs.logits = cap * torch.tanh(outputs.logits / cap)
        return outputs

    model.forward = capped
    head.attach(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert float(model(input_ids=torch.arange(3, 40)[None]).logits.abs().max()) < 2
        with pytest.raises(
            ModelError, match=r"does not reproduce.* a logit of \d+.*not known here"
        ):
            head.check(model)


@pytest.mark.parametrize("factor", [1.0, 1.02])
def test_the_bound_is_rounding_whatever_the_logits_size(factor):
    """In bf16 logits of 300 round by 1; a factor of 1.02 on them is more than rounding."""
    model = LLAMA.build(VOCAB).bfloat16().eval()
    with torch.no_grad():
        hidden = model.model(torch.arange(VOCAB)[None]).last_hidden_state
        model.lm_head.weight *= 300 / model.lm_head(hidden).abs().max()
    plain = model.forward

    def scaled(*args, **kwargs):
        outputs = plain(*args, **kwargs)
        outputs.logits = factor * outputs.logits
        return outputs

    model.forward = scaled
    head.attach(model)
    with torch.no_grad():
        if factor == 1.0:
            head.check(model)
        else:
            with pytest.raises(ModelError, match="soft cap None make it"):
                head.check(model)


@pytest.mark.parametrize("name", ["BertConfig", "RemBertConfig"])
def test_a_transform_before_the_head_is_refused(name):
    """BERT's head has a layer of its own; RemBERT's has another size as well."""
    extra = {"input_embedding_size": 32, "output_embedding_size": 48} if "Rem" in name else {}
    model = build(config(name, is_decoder=True, **extra))
    head.attach(model)
    with torch.no_grad(), pytest.raises(ModelError, match="before they enter it"):
        head.check(model)


def test_rows_that_fill_a_head_up_are_no_tokens():
    """Inkling's logits end at `unpadded_vocab_size`."""
    from bench import architectures

    if "inkling_text" not in architectures.model_types():
        pytest.skip("this transformers has no inkling_text")
    model = architectures.build("inkling_text", unpadded_vocab_size=300).float().eval()
    head.attach(model)
    with torch.no_grad():
        head.check(model)
        ids = torch.arange(3, 40)[None]
        call = head.HeadCall(lambda h, w_VD, bias_V, **s: reference.linear_logits(h, w_VD, **s))
        found, want = model(input_ids=ids, head_call=call), model(input_ids=ids).logits[0]
    assert found.shape[-1] == want.shape[-1] == 300
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_adapters_and_biases_pass(bf16):
    from peft import LoraConfig, get_peft_model

    model = build(transformers.PhiConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}))
    assert model.lm_head.bias is not None
    torch.nn.init.normal_(model.lm_head.bias)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    head.attach(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        head.check(model.eval())
