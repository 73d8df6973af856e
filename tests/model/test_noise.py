# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
"""Noise of training mode, mixtures of experts, and models that pack or are refused for a reason."""

import copy
from types import MethodType

import pytest
import torch
from test_rope import PAIRS, PHIMOE, VOCAB, alone, build, family, in_a_batch
from tiny import LLAMA, MIXTRAL, OPT

from fastdpo.errors import ModelError
from fastdpo.loss import reference
from fastdpo.model import noise
from fastdpo.model.prepare import layout_of, prepare_model

JITTERS = family("mixtral", "MixtralConfig", num_local_experts=4, router_jitter_noise=0.3)
BY_MARGIN = family("phimoe", "PhimoeConfig", num_local_experts=4, input_jitter_noise=0.1)


@pytest.mark.parametrize("of", [JITTERS, PHIMOE, BY_MARGIN], ids=["jitter", "sampled", "both"])
def test_a_router_with_noise_computes_what_it_does_without(of):
    """PhiMoE's draws for every token, but acts where two experts are within 2%."""
    plain = build(of, torch.float32)
    if of is not JITTERS:
        # Two experts that are nearly alike answer one for the other.
        for layer in plain.model.layers:
            with torch.no_grad():
                layer.mlp.router.weight[1] = layer.mlp.router.weight[0] * (1 + 1e-3)
    noisy = copy.deepcopy(plain).train()
    tokens = torch.tensor([PAIRS[0].prompt_ids * 4])
    assert not torch.equal(noisy(tokens).logits, noisy(tokens).logits)
    model = prepare_model(copy.deepcopy(plain), gradient_checkpointing=True)
    assert model.training
    logp_S, ref_logp_S = alone(plain, PAIRS), torch.linspace(-300, -290, 2 * len(PAIRS))
    lengths_S = torch.tensor([len(x) for p in PAIRS for x in (p.chosen_ids, p.rejected_ids)])
    reference.dpo_loss(logp_S, ref_logp_S, lengths_S, beta=0.1, alpha=0.02).mean().backward()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        result = in_a_batch(model, PAIRS, ref_logp_S)
        result.loss.backward()
    torch.testing.assert_close(result.logp_S, logp_S, rtol=1e-4, atol=1e-4, check_dtype=False)
    for (name, p), q in zip(plain.named_parameters(), model.parameters()):
        scale = float(p.grad.abs().max())
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3 * scale, msg=name)
    # Whoever switches modes later changes nothing.
    assert torch.equal(in_a_batch(model.eval().train(), PAIRS, ref_logp_S).logp_S, result.logp_S)


@pytest.mark.parametrize("chance", [1e-9, 1.0])
def test_noise_in_every_mode_is_refused_however_rare(chance):
    model = build(LLAMA)
    mlp, own = model.model.layers[1].mlp, type(model.model.layers[1].mlp).forward
    mlp.forward = MethodType(lambda self, x: own(self, x) + (torch.rand_like(x) < chance), mlp)
    wanted = r"layers\.1\.mlp \(LlamaMLP\) draws random numbers in every forward pass"
    with pytest.raises(ModelError, match=wanted):
        prepare_model(model)


def test_noise_of_another_generator_shows_in_its_values():
    model, generator = build(LLAMA), torch.Generator()
    mlp, own = model.model.layers[1].mlp, type(model.model.layers[1].mlp).forward

    def forward(self, x):
        drawn = torch.rand(x.shape, generator=generator, dtype=x.dtype)
        return own(self, x) + (0.1 * drawn if self.training else 0)

    mlp.forward = MethodType(forward, mlp)
    with pytest.raises(ModelError, match="noise or dropout that cannot be switched off"):
        prepare_model(model)


@pytest.mark.parametrize("of", [OPT, PHIMOE], ids=lambda of: of.name)
def test_the_random_state_is_left_as_it_was(of):
    """OPT draws a number a layer, to skip none."""
    model = build(of, torch.float32)
    before = torch.get_rng_state()
    prepare_model(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not noise._drawing(model, lambda: torch.rand(()))


@pytest.mark.parametrize("layout", ["auto", "packed"])
def test_routing_that_rounds_otherwise_is_no_leak(layout):
    """In bf16 some tokens go to another expert in a batch than alone."""
    of = family(
        "phimoe", "PhimoeConfig", num_local_experts=8, num_hidden_layers=4, initializer_range=0.05
    )
    plain = build(of, torch.float32, seed=2)
    model = prepare_model(plain, bf16=True, layout=layout)
    assert layout_of(model) == ("shared" if layout == "auto" else layout)


@pytest.mark.parametrize("bf16", [False, True])
def test_experts_that_serve_a_limited_number_of_tokens_are_refused(bf16):
    """Those over an expert's capacity get nothing, so a token depends on how many there are.

    One in three of them is no more than bf16's rounding does to a router's choices.
    """
    model = build(MIXTRAL, torch.float32)
    mlp, own = model.model.layers[1].mlp, type(model.model.layers[1].mlp).forward

    def forward(self, x):
        out = own(self, x)
        place = torch.arange(out.shape[:-1].numel()).view(out.shape[:-1])
        return out * ((place < 100) | (place % 3 > 0))[..., None]

    mlp.forward = MethodType(forward, mlp)
    with pytest.raises(ModelError, match="MixtralForCausalLM"):
        prepare_model(model, bf16=bf16)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_deep_mixture_whose_rounding_chooses_other_experts_is_exact(bf16):
    """Among 48 layers of 128 experts, of which 8 answer, fp32 finds a near tie."""
    of = family(
        "qwen3_moe", "Qwen3MoeConfig", hidden_size=128, moe_intermediate_size=16,
        num_hidden_layers=48, num_experts=128, num_experts_per_tok=8, head_dim=32,
        norm_topk_prob=True, initializer_range=0.1, vocab_size=2000,
    )  # fmt: skip
    torch.manual_seed(7)
    model = of.build(2000)
    assert layout_of(prepare_model(model, bf16=bf16)) == "shared"


AFMOE = family(
    "afmoe", "AfmoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    num_dense_layers=1, head_dim=16, layer_types=["sliding_attention", "full_attention"],
    sliding_window=8,
)  # fmt: skip
JETMOE = family("jetmoe", "JetMoeConfig", kv_channels=16, num_local_experts=4)
QWEN2_MOE = family(
    "qwen2_moe", "Qwen2MoeConfig", num_experts=4, moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)  # fmt: skip


@pytest.mark.parametrize("of", [AFMOE, JETMOE, QWEN2_MOE], ids=lambda of: of.name)
def test_models_that_share_their_prompts(of):
    plain = build(of, torch.float32)
    model = prepare_model(copy.deepcopy(plain))
    assert layout_of(model) == "shared"
    # Up to 70 log-probs near -6, rounded once a layer.
    bound = 70 * 6 * 2 * torch.finfo(torch.float32).eps * 10
    wanted = alone(plain, PAIRS) if hasattr(plain.model, "rotary_emb") else None
    assert wanted is not None
    torch.testing.assert_close(
        in_a_batch(model, PAIRS).logp_S.double(), wanted.double(), rtol=0, atol=bound
    )


@pytest.mark.parametrize(
    ("config", "extra", "wanted"),
    [
        (
            "RemBertConfig",
            dict(is_decoder=True, input_embedding_size=64),
            r"RemBert.* become \(16, 1664\) before",
        ),
        ("ElectraConfig", dict(is_decoder=True), r"Electra.* become \(16, 128\) before"),
        ("CpmAntConfig", dict(dim_head=16, dim_ff=96), r"CpmAnt.* in no layout"),
        ("XmodConfig", dict(is_decoder=True), "Xmod.* Input language unknown"),
    ],
)
def test_a_model_that_cannot_be_run_says_why(config, extra, wanted):
    sizes = {"num_key_value_heads": 4, **extra}
    with pytest.raises(ModelError, match=wanted):
        prepare_model(family("", config, **sizes).build(VOCAB))
