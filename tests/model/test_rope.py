# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
"""Frequencies that depend on a call's length: each sequence against itself alone, in fp64."""

import copy
import math
from types import MethodType

import pytest
import torch
from tiny import LLAMA, Family, build_tokenizer
from torch.utils.checkpoint import checkpoint

from fastdpo.data.batch import pack_pairs
from fastdpo.data.budget import fit_to_budget
from fastdpo.data.examples import Layout, LengthClasses, TokenizedPair
from fastdpo.errors import ModelError
from fastdpo.loss import reference
from fastdpo.model import rope
from fastdpo.model.prepare import layout_of, packed_loss, prepare_model
from fastdpo.train.config import TrainConfig
from fastdpo.train.trainer import train

VOCAB, SWITCH = 320, 64
SIZES = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=1024,
)  # fmt: skip


def longrope(dim, **more):
    """LongRoPE for heads with ``dim`` rotated dimensions."""
    long = [4.0 + i for i in range(dim // 2)]
    return {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * (dim // 2),
        "long_factor": long, "original_max_position_embeddings": SWITCH, **more,
    }  # fmt: skip


def family(name, config, **extra):
    def build(vocab_size=VOCAB):
        import transformers

        settings = getattr(transformers, config)(**{**SIZES, **extra, "vocab_size": vocab_size})
        return transformers.AutoModelForCausalLM.from_config(settings)

    return Family(name, build)


PHI3 = family(
    "phi3", "Phi3Config", original_max_position_embeddings=SWITCH, rope_parameters=longrope(16)
)
PHI4_MINI = family(
    "phi4-mini", "Phi3Config", original_max_position_embeddings=SWITCH, tie_word_embeddings=True,
    rope_parameters=longrope(12, partial_rotary_factor=0.75),
)  # fmt: skip
DYNAMIC = family(
    "dynamic", "LlamaConfig", max_position_embeddings=SWITCH,
    rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
)  # fmt: skip
# Frequencies of its own for each kind of layer, and a window.
GEMMA3 = family(
    "gemma3", "Gemma3TextConfig", head_dim=16, sliding_window=8, query_pre_attn_scalar=16,
    layer_types=["sliding_attention", "full_attention"],
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": longrope(16, factor=16.0),
    },
)  # fmt: skip
# The factor on its cosines switches, in code of its own.
PHIMOE = family(
    "phimoe", "PhimoeConfig", num_local_experts=4,
    rope_parameters=longrope(16, short_mscale=1.1, long_mscale=1.3),
)  # fmt: skip
FAMILIES = [PHI3, PHI4_MINI, DYNAMIC, GEMMA3, PHIMOE]
ROUTES = [("shared", True), ("packed", False), ("padded", True)]


def ids(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count,), generator=generator).tolist()


def pair(prompt, chosen, rejected):
    return TokenizedPair(ids(prompt, 1), ids(chosen, 2), ids(rejected, 3))


# Both sides short; on both sides of the switch, the longer one first and last; at it; both long.
PAIRS = [
    pair(10, 12, 9), pair(30, 50, 20), pair(20, 5, 70), pair(24, 40, 41), pair(24, 41, 40),
    pair(40, 50, 50), pair(40, 50, 51),
]  # fmt: skip


def build(of, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = of.build(VOCAB).to(dtype).eval()
    # Grouped products are not for fp64.
    model.config._experts_implementation = "eager"
    return model


def alone(plain, pairs):
    """Log-prob sums (2P,) from full logits, by a model that has seen no other sequence."""
    rotary, sums = copy.deepcopy(plain.model.rotary_emb), []
    for one in pairs:
        for response in (one.chosen_ids, one.rejected_ids):
            plain.model.rotary_emb = copy.deepcopy(rotary)
            logits = plain(torch.tensor([one.prompt_ids + response]), use_cache=False).logits
            rows = logits[0].log_softmax(-1)[len(one.prompt_ids) - 1 : -1]
            sums.append(rows.gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(sums)


def in_a_batch(model, pairs, ref_logp_S=None):
    if ref_logp_S is None:
        ref_logp_S = torch.zeros(2 * len(pairs), dtype=torch.float64)
    batch = pack_pairs(pairs, layout=layout_of(model))
    return packed_loss(model, batch, ref_logp_S, beta=0.1, alpha=0.02)


@pytest.mark.parametrize(("layout", "checkpointing"), ROUTES)
@pytest.mark.parametrize("of", FAMILIES, ids=lambda of: of.name)
def test_every_sequence_is_what_it_is_alone(of, layout, checkpointing):
    plain = build(of)
    model = prepare_model(copy.deepcopy(plain), layout=layout, gradient_checkpointing=checkpointing)
    ref_logp_S = -300 + 10 * torch.randn(2 * len(PAIRS), dtype=torch.float64)
    logp_S = alone(plain, PAIRS)
    lengths_S = torch.tensor([len(x) for p in PAIRS for x in (p.chosen_ids, p.rejected_ids)])
    reference.dpo_loss(logp_S, ref_logp_S, lengths_S, beta=0.1, alpha=0.02).mean().backward()
    result = in_a_batch(model, PAIRS, ref_logp_S)
    result.loss.backward()
    # Norms, routers and some softmaxes are fp32 in any model; another frequency is off by nats.
    torch.testing.assert_close(result.logp_S, logp_S, rtol=1e-6, atol=1e-6)
    for (name, p), q in zip(plain.named_parameters(), model.parameters()):
        scale = float(p.grad.abs().max())
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("of", [PHI3, DYNAMIC], ids=lambda of: of.name)
def test_nothing_is_kept_between_calls(of):
    used = build(of)
    used(torch.tensor([ids(200, 0)]), use_cache=False)  # by whoever had it before
    wanted = alone(build(of), PAIRS[:1])
    model = prepare_model(used, layout="packed")
    before = in_a_batch(model, PAIRS[:1]).logp_S
    in_a_batch(model, PAIRS)
    assert torch.equal(in_a_batch(model, PAIRS[:1]).logp_S, before)
    torch.testing.assert_close(before, wanted, rtol=1e-6, atol=1e-6)
    # A copy has modules of its own, and one prepared again is as before.
    twin = copy.deepcopy(model)
    assert twin.model.rotary_emb.forward.__self__ is twin.model.rotary_emb
    twin = prepare_model(twin.eval(), layout="packed")
    assert torch.equal(in_a_batch(twin, PAIRS[:1]).logp_S, before)


def test_which_lengths_are_alike():
    found = {of.name: rope.attach(build(of)) for of in [*FAMILIES, LLAMA]}
    switch, grows = LengthClasses((SWITCH,)), LengthClasses((SWITCH,), SWITCH + 1)
    wanted = {of.name: switch for of in FAMILIES} | {"dynamic": grows, "llama": LengthClasses()}
    assert found == wanted and not found["llama"]
    of = grows.of
    assert of(1) == of(SWITCH) != of(SWITCH + 1) != of(SWITCH + 2) and switch.of(65) == switch.of(
        99
    )
    assert switch | grows == grows and switch | LengthClasses((9,), 40) == LengthClasses(
        (9, 64), 40
    )


def test_rotary_code_that_is_not_known():
    """It switches where no configuration says so, and keeps the longest length that it saw."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    class Growing(LlamaRotaryEmbedding):
        longest = 0

        def forward(self, x, position_ids):
            self.longest = max(self.longest, int(position_ids.max()) + 1)
            cos, sin = LlamaRotaryEmbedding.forward(self, x, position_ids)
            return (cos, sin) if self.longest <= 37 else (cos * 0.5, sin * 0.7)

    plain = build(LLAMA)
    plain.model.rotary_emb = Growing(plain.config).double()
    model = prepare_model(copy.deepcopy(plain))
    classes = layout_of(model).classes
    assert classes.grows_from is not None and classes.grows_from <= 37
    torch.testing.assert_close(
        in_a_batch(model, PAIRS).logp_S, alone(plain, PAIRS), rtol=1e-6, atol=1e-6
    )


def test_a_model_that_counts_positions_itself_is_refused():
    model = build(PHI3)
    body, own = model.model, type(model.model).forward

    def forward(self, *args, position_ids=None, **kwargs):
        return own(self, *args, **kwargs)

    body.forward = MethodType(forward, body)
    with pytest.raises(ModelError, match=r"padded: it counts positions itself, by which"):
        prepare_model(model, layout="padded")


@pytest.mark.parametrize("of", [PHI3, DYNAMIC], ids=lambda of: of.name)
def test_lengths_are_planned_as_they_are_laid_out(of):
    model = prepare_model(build(of, torch.float32))
    layout = layout_of(model)
    assert layout == "shared" and isinstance(layout, str) and copy.copy(layout).classes
    sizes = [one.num_tokens(layout) for one in PAIRS]
    assert [pack_pairs([one], layout=layout).num_tokens for one in PAIRS] == sizes
    assert pack_pairs(PAIRS, layout=layout).num_tokens == sum(sizes)
    # The prompt is there twice exactly where the sides differ in their frequencies.
    twice = [size - one.num_tokens("shared") for one, size in zip(PAIRS, sizes)]
    assert twice == [0, 30, 20, 24, 24, 0, 0 if of is PHI3 else 40]
    for one, size in zip(PAIRS, sizes):
        for room in range(len(one.prompt_ids) + 6, size):
            cut = fit_to_budget([one], room, layout=layout, overlong="truncate").pairs[0]
            longest = max(len(cut.chosen_ids), len(cut.rejected_ids))
            assert cut.num_tokens(layout) <= room
            wider = TokenizedPair(
                one.prompt_ids, one.chosen_ids[: longest + 1], one.rejected_ids[: longest + 1]
            )
            assert wider == one or wider.num_tokens(layout) > room


def test_pairs_laid_out_for_another_model_are_refused():
    for name in ("shared", "padded"):
        model = prepare_model(build(PHI3, torch.float32), layout=name)
        batch = pack_pairs(PAIRS, layout=name)
        with pytest.raises(ValueError, match=r"layout=fastdpo\.model\.layout_of"):
            packed_loss(model, batch, torch.zeros(2 * len(PAIRS)), beta=0.1, alpha=0.0)


def test_every_loss_is_log_2_while_nothing_is_learnt(tmp_path):
    from fastdpo.train.reference import cache_key

    tokenizer = build_tokenizer()
    path = tmp_path / "model"
    build(DYNAMIC, torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    losses, made = [], []
    for name, seed in (("first", 0), ("other plan", 1)):
        config = TrainConfig(
            batch_size=3, max_length=256, max_tokens=420, bf16=False, alpha=0.0, beta=0.5,
            seed=seed, learning_rate=1e-12, num_train_epochs=3,
            reference_cache=str(tmp_path / "cache"),
        )  # fmt: skip
        train(
            str(path), tokenizer, PAIRS, config, tmp_path / name, progress=False,
            on_step=lambda row: losses.append(row["loss"]),
        )  # fmt: skip
        made.append({x.name for x in (tmp_path / "cache").iterdir()})
    assert len(losses) == 18 and made[0] == made[1] and len(made[0]) == 1
    # The second run reads values that were computed beside other pairs.
    assert losses == pytest.approx([math.log(2)] * 18, abs=1e-5)
    # What was computed when neighbours mattered has another name.
    layouts = Layout("shared"), Layout("shared", LengthClasses((SWITCH,)))
    assert len({cache_key(layout=layout.key) for layout in layouts}) == 2
    assert layouts[0].key == "shared"


def test_frequencies_through_a_checkpoint_of_the_module_itself():
    """Layers that call their own rotary module call it again in the backward."""
    module = build(DYNAMIC).model.rotary_emb
    holder = torch.nn.ModuleList([module])
    rope.attach(holder)
    x = torch.randn(1, 100, 4, dtype=torch.float64, requires_grad=True)
    positions = torch.cat([torch.arange(30), torch.arange(70)])[None]

    def scaled(x):
        return (module(x, positions)[0].sum(-1) * x.sum(-1)).sum()

    wanted = torch.autograd.grad(scaled(x), x)[0]
    loss = checkpoint(scaled, x, use_reentrant=False)
    module(x, torch.arange(100)[None])  # the next batch comes before the backward
    assert torch.equal(torch.autograd.grad(loss, x)[0], wanted)


@pytest.mark.parametrize("of", [PHI3, DYNAMIC], ids=lambda of: of.name)
def test_rows_of_a_sampled_batch_and_of_a_reward_model(of):
    from transformers import AutoModelForSequenceClassification

    from fastdpo.sample.config import SampleConfig
    from fastdpo.sample.generate import GenerateSampler
    from fastdpo.score.reward_model import RewardModel

    short, long = ids(9, 4), ids(150, 5)
    config = SampleConfig(num_samples=1, temperature=0, max_new_tokens=6)

    def sampled(*prompts):
        sampler = GenerateSampler(build(of, torch.float32), build_tokenizer(), config)
        return [outputs[0].ids for outputs in sampler.generate(list(prompts), 1, seed=0)]

    assert sampled(short, long) == sampled(short) + sampled(long)
    settings = build(of).config
    settings.num_labels = 1
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_config(settings).double().eval()
    wanted = [copy.deepcopy(plain)(torch.tensor([x])).logits.item() for x in (short, long)]
    by_length = bool(rope.attach(plain))
    model = RewardModel(plain, None, 0, 2, math.inf, by_length=by_length)
    with torch.no_grad():
        found = model._logits([short, long]).flatten().tolist()
    assert by_length and found == pytest.approx(wanted, rel=1e-5)
