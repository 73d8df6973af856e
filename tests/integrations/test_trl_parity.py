"""Loss, gradients and SGD steps equal TRL's DPOTrainer on the same pairs, in fp32 at alpha 0."""

import copy
import dataclasses
import inspect
import math
import re
from typing import Any

import pytest
import torch
import transformers
from datasets import load_from_disk
from test_rope import DYNAMIC, PHI3, SWITCH, alone
from tiny import GEMMA, LLAMA, MIXTRAL, OPT, QWEN

from fastdpo.data.batch import pack_pairs
from fastdpo.data.examples import TokenizedPair
from fastdpo.errors import ConfigError, ModelError
from fastdpo.model.prepare import packed_loss, prepare_model

trl = pytest.importorskip("trl")
pytest.importorskip("peft")
import trl_options  # noqa: E402
from trl_options import BATCH, BETA, RATE, STEPS, compare, make_trainer  # noqa: E402

from fastdpo.integrations import trl as integration  # noqa: E402
from fastdpo.integrations.trl import HONOURED, LOSSES, REFUSED  # noqa: E402
from fastdpo.integrations.trl import LengthRegularizedDPOTrainer as Trainer  # noqa: E402

FAMILIES = [LLAMA, QWEN, GEMMA]


@pytest.fixture(params=FAMILIES, ids=[family.name for family in FAMILIES])
def trainer(request, tmp_path):
    return make_trainer(trl.DPOTrainer, request.param, tmp_path)


def fresh(model):
    """The same weights in a model of its own: TRL's patched forward stays bound to its model."""
    twin = type(model)(copy.deepcopy(model.config))
    twin.load_state_dict(model.state_dict())
    return twin


def pairs_of(examples):
    return [TokenizedPair(x["prompt_ids"], x["chosen_ids"], x["rejected_ids"]) for x in examples]


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


# Each is one that failed; the others run with the table that they are in.
SAMPLE = [
    "full, evaluated", "own reference, accumulated, clipped", "precomputed", "quantized",
    "P-tuning", "pictures with token types",
]  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_the_trl_trainer_with_the_fused_loss(name, tmp_path):
    """At alpha 0 it logs what TRL logs and ends in the same weights."""
    if name == "quantized":
        pytest.importorskip("bitsandbytes")
    case = trl_options.CASES[name]
    found = compare(case, tmp_path)
    assert max(found.values()) <= case.tolerance, found


@pytest.mark.parametrize("name", trl_options.LOSS_CASES)
def test_losses(name, tmp_path):
    """Losses, gradients and weights after three steps, from a policy that is not its reference."""
    case = trl_options.LOSS_CASES[name]
    found = compare(case, tmp_path)
    assert max(found.values()) <= case.tolerance and found["weights"] <= 1e-5, found


def test_each_loss_of_trl_has_a_case():
    shown = {x for case in trl_options.LOSS_CASES.values() for x in case.options["loss_type"]}
    assert shown == set(integration.LOSSES)
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    assert set(re.findall(r'if loss_type == "(\w+)"', source)) == shown


@pytest.mark.slow
def test_every_case_of_the_table(tmp_path):
    others = trl_options.CASES.keys() - set(SAMPLE) - trl_options.LOSS_CASES.keys()
    for i, name in enumerate(others):
        found = compare(trl_options.CASES[name], tmp_path / str(i))
        assert max(found.values()) <= trl_options.CASES[name].tolerance, (name, found)
    for name in trl_options.DOUBLED:
        found = trl_options.in_two_processes(name)
        assert max(found.values()) <= trl_options.CASES[name].tolerance, (name, found)


def test_the_table_of_options_is_current():
    """Its lists are the code's, it has every case, and no figure is over its bound."""
    table = trl_options.TABLE.read_text()
    assert trl_options.options_table() in table
    measured = [line.split(" | ") for line in table.splitlines() if line.endswith("e-05 |")]
    for end in ("e-04 |", "e-02 |"):
        measured += [line.split(" | ") for line in table.splitlines() if line.endswith(end)]
    assert {cells[0][2:].removesuffix(trl_options.TWICE) for cells in measured} == set(
        trl_options.CASES
    )
    for cells in measured:
        bound = float(cells[-1].rstrip(" |"))
        assert all(float(cell) <= bound for cell in cells[2:-1]), cells


def test_every_option_of_this_trl_is_listed():
    honoured = [name for names in HONOURED.values() for name in names.split()]
    assert not set(honoured) & set(REFUSED)
    known = [x.name for x in dataclasses.fields(trl.DPOConfig)]
    assert not set(known) - set(honoured) - set(REFUSED)
    parameters = inspect.signature(trl.DPOTrainer).parameters
    assert set(parameters) == integration.PARAMETERS


@pytest.mark.parametrize("family", [LLAMA, GEMMA], ids=["llama", "gemma2"])
def test_bf16_starts_at_log_2_with_a_separate_reference(family, tmp_path):
    """The reference of equal weights runs under the policy's autocast."""
    trainer = make_trainer(
        Trainer, family, tmp_path, bf16=True, max_steps=1,
        more=lambda path: {"ref_model": trl_options.load(path), "alpha": 0.0},
    )  # fmt: skip
    kinds = []
    layer = trainer.ref_model.model.layers[0].mlp
    layer.register_forward_hook(lambda *x: kinds.append(x[2].dtype))
    logged, _ = trl_options.train(trainer)
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert set(kinds) == {torch.bfloat16}


@pytest.mark.parametrize("of", [PHI3, DYNAMIC], ids=lambda of: of.name)
def test_rotary_frequencies_are_those_of_each_sequence_alone(of, tmp_path):
    """TRL's own depend on the longest sequence of a batch."""
    rows = trl_options.rows(BATCH)
    for i, row in enumerate(rows):
        row["chosen"][0]["content"] = "long walks " * (1 + 9 * i)
    more: dict[str, Any] = {"train_dataset": trl_options.Dataset.from_list(rows)}
    trainer = make_trainer(Trainer, of, tmp_path, more=more)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["attention_mask"].sum(-1).min() < SWITCH < batch["attention_mask"].sum(-1).max()
    pairs = []
    sides = list(zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"]))
    for chosen, rejected in zip(sides[:BATCH], sides[BATCH:]):
        ids = [ids[mask == 1].tolist() for ids, mask, _ in (chosen, rejected)]
        start = int(chosen[2].argmax())
        pairs.append(TokenizedPair(ids[0][:start], ids[0][start:], ids[1][start:]))
    want_S = alone(trl_options.load(tmp_path / "model"), pairs).view(-1, 2).T
    found_S = torch.stack(trainer.compute_ref_log_probs(trainer.model, batch))
    torch.testing.assert_close(found_S.float(), want_S.float(), rtol=1e-5, atol=1e-4)


def test_a_learned_prompt_would_hide_the_lengths_of_sequences(tmp_path):
    more = trl_options.prompt("PromptTuningConfig")
    with pytest.raises(ModelError, match="which a learned prompt hides"):
        make_trainer(Trainer, PHI3, tmp_path, more=more)


def test_dropout_of_plain_numbers_is_disabled_too(tmp_path):
    """TRL zeroes modules only: with OPT's dropout, equal models would not start at log 2."""
    logged, _ = trl_options.train(make_trainer(Trainer, OPT, tmp_path, more={"alpha": 0.0}))
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_alpha_moves_the_loss(tmp_path):
    trainer = make_trainer(Trainer, LLAMA, tmp_path, more={"alpha": 0.3})
    # DDP would send RoPE's frequencies from process to process.
    assert "model.rotary_emb.inv_freq" in trainer.model._ddp_params_and_buffers_to_ignore
    logged, _ = trl_options.train(trainer)
    margin = 0.3 * (logged[0]["lengths/chosen"] - logged[0]["lengths/rejected"])
    assert logged[0]["length_margin"] == pytest.approx(margin, rel=1e-4) and margin > 0.1
    assert logged[0]["loss"] != pytest.approx(math.log(2), abs=1e-3)


def test_alpha_composes_with_losses_of_the_margin(tmp_path):
    """At the start IPO's is ``((z - 1/2) / beta)^2`` with ``z = alpha (nw - nl)``."""
    trainer = make_trainer(
        Trainer, LLAMA, tmp_path, more={"alpha": 0.3}, loss_type="ipo", max_steps=1
    )
    mask = trainer.data_collator(list(trainer.train_dataset))["completion_mask"]
    gaps = -mask.sum(1).view(2, -1).diff(dim=0)[0].double()
    wanted = ((0.3 * gaps - 0.5) / BETA).square().mean().item()
    found = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert found == pytest.approx(wanted, rel=1e-5) and wanted > 10


def test_log_probs_that_were_kept_are_of_the_same_weights_of_tokens(tmp_path):
    """TRL keeps them by the model and the rows alone; here each ld_alpha has its own."""
    rows_of(4 * STEPS).save_to_disk(str(tmp_path / "rows"))
    data = load_from_disk(str(tmp_path / "rows"))
    for ld_alpha in (None, 0.2, 0.6):
        trainer = make_trainer(
            Trainer, LLAMA, tmp_path, more={"alpha": 0.0, "train_dataset": data},
            precompute_ref_log_probs=True, ld_alpha=ld_alpha, max_length=None,
        )  # fmt: skip
        (first, *_), _ = trl_options.train(trainer)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), ld_alpha


def test_no_reference_is_run_for_a_loss_that_needs_none(tmp_path, monkeypatch):
    """Its rewards are logged where the reference's log-probs are there anyway."""
    monkeypatch.setattr(Trainer, "compute_ref_log_probs", None)
    logged, _ = trl_options.train(make_trainer(Trainer, LLAMA, tmp_path, loss_type="sft"))
    assert not [name for name in logged[0] if name.startswith("rewards/")]
    monkeypatch.undo()
    options = dict(loss_type="sft", precompute_ref_log_probs=True, max_steps=2)
    mine, theirs = (
        trl_options.train(make_trainer(kind, LLAMA, tmp_path / kind.__name__, **options))[0]
        for kind in (Trainer, trl.DPOTrainer)
    )
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert mine[1][name] == pytest.approx(theirs[1][name], abs=1e-5), name


# -------------------------------------------------------------------------------------- refusals
def refused(tmp_path, match, args=None, **given):
    """Before anything is loaded: there is no model."""
    plain = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ConfigError, match=match):
        Trainer(**{"model": str(tmp_path / "none"), "args": args or plain, **given})


@pytest.mark.parametrize("name", REFUSED)
def test_options_are_refused(name, tmp_path):
    args = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    if hasattr(args, name):
        setattr(args, name, 0.25)
        refused(tmp_path, rf"DPOConfig\({name}=.*leave it at", args)


@pytest.mark.parametrize(
    ("names", "options", "match"),
    [
        ("kto", {}, "'kto' is no loss of TRL's DPOTrainer; take of sigmoid"),
        ("sigmoid", {"label_smoothing": 0.1}, "label_smoothing=0.1 means nothing to .*'sigmoid'"),
        ("sigmoid", {"discopop_tau": 0.1}, "discopop_tau=0.1 means nothing"),
        ("sigmoid", {"f_alpha_divergence_coef": 0.7}, "needs f_divergence_type"),
        ("apo_zero", {"f_divergence_type": "forward_kl"}, "means nothing to .*'apo_zero'"),
        ("exo_pair", {}, "exo_pair needs one between 0 and 1"),
        ("aot", {"use_weighting": True}, "use_weighting=True means nothing to .*'aot'"),
        ("sigmoid sft", {"use_weighting": True}, "means nothing to .*'sft'"),
        ("sigmoid sft", {"ld_alpha": 0.5}, "ld_alpha=0.5 means nothing to .*'sft'"),
        ("ipo", {"truncation_mode": "keep_end"}, "a length that counts a token"),
        ("sigmoid", {"beta": 0.0}, "beta must be"),
    ],
)
def test_losses_that_have_no_use_for_an_option(names, options, match, tmp_path):
    args = trl.DPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, loss_type=names.split(), **options
    )
    refused(tmp_path, match, args, alpha=0.0)


def test_alpha_of_a_loss_that_has_none(tmp_path):
    """The error names losses that this trainer takes."""
    args = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False, loss_type="apo_zero")
    message = "alpha=0.01 means nothing to loss_type 'apo_zero'.* use it with sigmoid, .*discopop$"
    with pytest.raises(ConfigError, match=message) as error:
        Trainer(str(tmp_path / "none"), args=args, alpha=0.01)
    named = str(error.value).rpartition(" with ")[2].split(", ")
    assert set(named) < set(LOSSES)


@pytest.mark.parametrize("names", LOSSES, ids=str)
def test_alpha_that_is_not_given(names, tmp_path):
    """The length penalty of sigmoid alone; of every other loss TRL's own, with none."""
    needed = {"label_smoothing": 0.1} if names in ("exo_pair", "robust") else {}
    args = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False, loss_type=names, **needed)
    assert integration._objective_of(args, None).alpha == (0.01 if names == "sigmoid" else 0)
    both = dataclasses.replace(args, loss_type=[names, "hinge"])
    assert integration._objective_of(both, None).alpha == 0
    assert integration._objective_of(None, None).alpha == 0.01


def test_an_option_that_a_later_trl_adds_is_refused(tmp_path):
    @dataclasses.dataclass
    class Later(trl.DPOConfig):
        sharpness: float = 0.5

    def make(value):
        return Later(str(tmp_path), use_cpu=True, bf16=False, sharpness=value)

    refused(tmp_path, r"sharpness=0\.7.*not known", make(0.7))
    with pytest.raises(OSError, match="none"):  # its default is no reason: the model is missing
        Trainer(model=str(tmp_path / "none"), args=make(0.5), train_dataset=rows_of(1))


def rows_of(count):
    return trl_options.Dataset.from_list(trl_options.rows(count))


def test_what_else_would_be_ignored_is_refused(tmp_path, monkeypatch):
    import peft

    def config(**changes):
        return trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False, **changes)

    refused(tmp_path, "without sync_ref_model", config(ref_model_sync_steps=2))
    refused(tmp_path, "logs no entropy", config(metric_for_best_model="eval_entropy"))
    of_rewards = config(metric_for_best_model="rewards/margins", loss_type="sft")
    refused(tmp_path, "needs no reference, so it logs no rewards/margins; take 'loss'", of_rewards)
    adapters = {"peft_config": trl_options.lora()}
    refused(tmp_path, "disable_dropout=False", config(disable_dropout=False), **adapters)
    learned = peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[1], cpt_mask=[1], cpt_tokens_type_mask=[1]
    )
    refused(tmp_path, "peft_config: CPT", peft_config=learned)
    refused(tmp_path, "must be a trl.DPOConfig", transformers.TrainingArguments(str(tmp_path)))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused(tmp_path, "launched with fsdp")


class Doubled(transformers.LlamaForCausalLM):
    """Something after the head that no configuration tells of."""

    def forward(self, *args, **kwargs):
        outputs: Any = super().forward(*args, **kwargs)
        outputs.logits = 2 * outputs.logits
        return outputs


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda config: Doubled(config), "does not reproduce the logits"),
        (lambda config: MIXTRAL.build(config.vocab_size), r"router_aux_loss_coef=0\.0"),
    ],
    ids=["head", "router"],
)
def test_models_are_refused_before_references_are_computed(build, match, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "compute_ref_log_probs", lambda *_: pytest.fail("computed"))
    model = build(LLAMA.build(len(trl_options.build_tokenizer())).config)
    with pytest.raises(ModelError, match=match):
        make_trainer(Trainer, LLAMA, tmp_path, more={"model": model}, precompute_ref_log_probs=True)
