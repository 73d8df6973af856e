"""Loss, gradients and SGD steps equal TRL's DPOTrainer on the same pairs, in fp32 at alpha 0."""

import copy

import pytest
import torch
from tiny import GEMMA, LLAMA, QWEN, build_tokenizer, save_tiny

from fastdpo.batch import TokenizedPair, pack_pairs
from fastdpo.policy import packed_loss, prepare_model

trl = pytest.importorskip("trl")
FAMILIES = [LLAMA, QWEN, GEMMA]
BETA, STEPS, BATCH, RATE = 0.3, 3, 4, 0.5


def rows(count):
    topics = ["dogs", "the weather", "bread and butter", "long walks on the beach", "maps"]
    return [
        {
            "prompt": [{"role": "user", "content": f"tell me about {topics[i % 5]} {i}"}],
            "chosen": [{"role": "assistant", "content": "they are nice " * (i % 4 + 1)}],
            "rejected": [{"role": "assistant", "content": "no idea at all " * (i % 3 + 1)}],
        }
        for i in range(count)
    ]


def make_trainer(trainer_class, family, folder, *, more=None, **changes):
    """A trainer on a tiny saved model; eager attention is the only one that caps scores."""
    from datasets import Dataset

    path = save_tiny(family, folder / "model")
    settings = dict(
        output_dir=str(folder / "out"), beta=BETA, max_steps=STEPS, optim="sgd",
        per_device_train_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="constant",
        max_grad_norm=0.0, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False, weight_decay=0.0, logging_steps=1,
        model_init_kwargs={"attn_implementation": "eager", "dtype": "float32"},
    )  # fmt: skip
    return trainer_class(
        str(path),
        args=trl.DPOConfig(**{**settings, **changes}),
        train_dataset=Dataset.from_list(rows(STEPS * BATCH)),
        processing_class=build_tokenizer(),
        **(more or {}),
    )


@pytest.fixture(params=FAMILIES, ids=[family.name for family in FAMILIES])
def trainer(request, tmp_path):
    return make_trainer(trl.DPOTrainer, request.param, tmp_path)


def fresh(model):
    """The same weights in a model of its own: TRL's patched forward stays bound to its model."""
    twin = type(model)(copy.deepcopy(model.config))
    twin.load_state_dict(model.state_dict())
    return twin


def pairs_of(examples):
    return [
        TokenizedPair(x["prompt_ids"], x["chosen_ids"], x["rejected_ids"], {}) for x in examples
    ]


def reference_of(model, batch):
    zeros_S = torch.zeros(2 * batch.num_pairs, dtype=torch.float64)
    with torch.no_grad():
        return packed_loss(model, batch, zeros_S, beta=BETA, alpha=0.0).logp_S


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_loss_and_gradients(trainer):
    theirs = trainer.model
    with torch.no_grad():  # away from the reference, where the loss would not depend on anything
        generator = torch.Generator().manual_seed(1)
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    ours, ref = fresh(theirs), fresh(trainer.ref_model)
    examples = [trainer.train_dataset[i] for i in range(BATCH)]
    loss = trainer.compute_loss(theirs, trainer.data_collator(examples))
    loss.backward()

    batch = pack_pairs(pairs_of(examples))
    ref_logp_S = reference_of(prepare_model(ref), batch)
    result = packed_loss(prepare_model(ours), batch, ref_logp_S, beta=BETA, alpha=0.0)
    result.loss.backward()
    assert abs(loss.item() - 0.6931) > 1e-3
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert p.grad is not None and wanted[name].grad is not None, name
        assert relative(p.grad, wanted[name].grad) < 1e-5, name


def test_weights_after_sgd_steps(trainer):
    start = fresh(trainer.model)
    seen = []
    collate = trainer.data_collator

    def recording(examples):
        seen.append(pairs_of(examples))
        return collate(examples)

    trainer.data_collator = recording
    trainer.train()
    assert len(seen) == STEPS

    ours, ref = prepare_model(fresh(start)), prepare_model(fresh(start))
    optimizer = torch.optim.SGD(ours.parameters(), lr=RATE)
    for pairs in seen:
        batch = pack_pairs(pairs)
        packed_loss(ours, batch, reference_of(ref, batch), beta=BETA, alpha=0.0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted, before = dict(trainer.model.named_parameters()), dict(start.named_parameters())
    for name, p in ours.named_parameters():
        moved = (wanted[name] - before[name]).norm()
        assert moved > 0, name
        assert (p - wanted[name]).norm() < 1e-5 * wanted[name].norm(), name
        assert (p - wanted[name]).norm() < 1e-3 * moved, name


def trained(trainer):
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return rows, {name: p.detach() for name, p in trainer.model.named_parameters()}


def lora():
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)}


@pytest.mark.parametrize("how", ["plain", "precomputed", "lora"])
def test_the_trl_trainer_with_the_fused_loss(how, tmp_path):
    """At alpha 0 it logs what TRL logs and ends in the same weights; alpha then changes both."""
    from fastdpo.integrations.trl import LengthRegularizedDPOTrainer

    if how == "lora":
        pytest.importorskip("peft")

    def make(trainer_class, name, **more):
        torch.manual_seed(0)
        more |= lora() if how == "lora" else {}
        changes = {"precompute_ref_log_probs": how == "precomputed"}
        return make_trainer(trainer_class, LLAMA, tmp_path / name, more=more, **changes)

    theirs, wanted = trained(make(trl.DPOTrainer, "theirs"))
    ours, got = trained(make(LengthRegularizedDPOTrainer, "ours", alpha=0.0))
    for a, b in zip(theirs, ours, strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen", "rewards/accuracies", "num_tokens"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
    assert got.keys() == wanted.keys()
    for name, p in got.items():
        assert (p - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
    rows, _ = trained(make(LengthRegularizedDPOTrainer, "longer", alpha=0.3))
    assert rows[0]["length_margin"] != 0 and rows[-1]["loss"] != ours[-1]["loss"]
    margin = 0.3 * (rows[0]["lengths/chosen"] - rows[0]["lengths/rejected"])
    assert rows[0]["length_margin"] == pytest.approx(margin, rel=1e-4)


@pytest.mark.parametrize("change", [{"loss_type": ["ipo"]}, {"ld_alpha": 0.5}])
def test_the_trl_trainer_refuses_other_losses(change, tmp_path):
    from fastdpo.integrations.trl import LengthRegularizedDPOTrainer

    with pytest.raises(ValueError, match="belongs to another loss"):
        make_trainer(LengthRegularizedDPOTrainer, LLAMA, tmp_path, **change)
