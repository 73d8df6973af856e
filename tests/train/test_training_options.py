"""Options of a round: where its reference comes from, adapters, budgets, memory."""

import copy
import json
import logging
from dataclasses import replace

import pytest
import torch
from test_trainer import CONFIG, random_pairs, read_metrics, run, weights
from tiny import LLAMA, MAMBA, QWEN, build_tokenizer, save_tiny

from fastdpo.data.examples import TokenizedPair
from fastdpo.errors import ConfigError, DataError, ModelError
from fastdpo.model import liger, offload
from fastdpo.model.load import load_causal_lm, load_tokenizer, weights_digest
from fastdpo.train import reference, trainer
from fastdpo.train.config import TrainConfig
from fastdpo.train.launch import launched
from fastdpo.train.prepare import claim_folder
from fastdpo.train.steps import Setup
from fastdpo.train.trainer import train

LOG_2 = torch.tensor(2.0).log()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return str(save_tiny(QWEN, tmp_path_factory.mktemp("model") / "qwen"))


@pytest.fixture
def references(monkeypatch):
    """How often a run computed its reference."""
    calls, real = [], reference.compute_reference

    def counted(*args):
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(reference, "compute_reference", counted)
    return calls


def losses(folder):
    return torch.tensor([row["loss"] for row in read_metrics(folder)], dtype=torch.float64)


# ------------------------------------------------------------------------------- the reference
def test_the_reference_is_reused_by_other_runs(model_path, tmp_path, references):
    cache = str(tmp_path / "cache")
    run(model_path, tmp_path / "a", reference_cache=cache)
    assert len(references) == 1 and len(list((tmp_path / "cache").iterdir())) == 1
    run(model_path, tmp_path / "same", reference_cache=cache)
    free = dict(beta=0.3, learning_rate=1e-4, seed=4, batch_size=3, max_tokens=150)
    run(model_path, tmp_path / "free", reference_cache=cache, num_train_epochs=2, **free)
    assert len(references) == 1
    assert torch.equal(losses(tmp_path / "a"), losses(tmp_path / "same"))
    # Packed otherwise than when it was computed, so log 2 to rounding of a bf16 forward.
    torch.testing.assert_close(losses(tmp_path / "free")[0].float(), LOG_2, rtol=0.02, atol=0)


def test_a_cache_that_cannot_be_written_costs_nothing_else(model_path, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    run(model_path, tmp_path / "a", reference_cache=str(tmp_path / "file" / "cache"))
    assert "cannot be written" in caplog.text
    assert losses(tmp_path / "a")[0].float() == LOG_2


def stop_after_the_reference(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "take_step", stop)


def test_a_start_that_changed_under_its_name_is_refused(tmp_path, monkeypatch):
    path = save_tiny(QWEN, tmp_path / "model")
    with monkeypatch.context() as patch:
        stop_after_the_reference(patch)
        with pytest.raises(KeyboardInterrupt):
            run(str(path), tmp_path / "run")
    save_tiny(QWEN, path, seed=1)
    with pytest.raises(ModelError, match="has changed since"):
        run(str(path), tmp_path / "run")


def test_a_broken_reference_of_the_run_is_repaired(model_path, tmp_path, monkeypatch, references):
    with monkeypatch.context() as patch:
        stop_after_the_reference(patch)
        with pytest.raises(KeyboardInterrupt):
            run(model_path, tmp_path)
    file = tmp_path / "ref_logps" / "ref_logps.safetensors"
    whole = file.read_bytes()
    file.write_bytes(b"x")
    run(model_path, tmp_path)
    assert len(references) == 2 and file.read_bytes() == whole


@pytest.mark.parametrize("change", ["pairs", "weights", "layout", "bf16"])
def test_another_reference_is_computed_for(change, model_path, tmp_path, references):
    cache = str(tmp_path / "cache")
    run(model_path, tmp_path / "a", reference_cache=cache)
    options, path = {}, model_path
    if change == "pairs":
        options["pairs"] = random_pairs(14, seed=1)
    elif change == "weights":
        path = str(save_tiny(QWEN, tmp_path / "other", seed=1))
    else:
        options[change] = {"layout": "packed", "bf16": False}[change]
    run(path, tmp_path / "b", reference_cache=cache, **options)
    assert len(references) == 2 and len(list((tmp_path / "cache").iterdir())) == 2
    assert losses(tmp_path / "b")[0].float() == LOG_2


def test_a_broken_cache_file_is_passed_over(model_path, tmp_path, references, caplog):
    cache = tmp_path / "cache"
    run(model_path, tmp_path / "a", reference_cache=str(cache))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        run(model_path, tmp_path / "b", reference_cache=str(cache))
    assert len(references) == 2 and "computed again" in caplog.text
    assert file.read_bytes() == whole
    assert torch.equal(losses(tmp_path / "a"), losses(tmp_path / "b"))


def test_a_digest_of_weights_is_that_of_the_model(model_path):
    model = load_causal_lm(model_path)
    assert weights_digest(model) == weights_digest(copy.deepcopy(model))
    before = weights_digest(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    assert weights_digest(model) != before
    scaled = load_causal_lm(model_path)
    scaled.config.rope_parameters["rope_theta"] = 5.0
    assert weights_digest(scaled) != before


def test_a_reference_in_every_step_gives_the_same_training(model_path, tmp_path, references):
    run(model_path, tmp_path / "once", bf16=False, num_train_epochs=2)
    run(
        model_path,
        tmp_path / "each",
        bf16=False,
        num_train_epochs=2,
        precompute_ref_log_probs=False,
    )
    assert len(references) == 1 and not (tmp_path / "each" / "ref_logps").exists()
    once, each = losses(tmp_path / "once"), losses(tmp_path / "each")
    assert torch.equal(once[:4], each[:4])  # the reference was computed on the first epoch's rows
    torch.testing.assert_close(once, each, rtol=1e-5, atol=0)


def test_a_model_in_memory_is_trained_against_what_it_was(model_path, tmp_path):
    """Its name on disk says something else; the reference is a copy, not what the name loads."""
    model, tokenizer = load_causal_lm(model_path), load_tokenizer(model_path)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    start = copy.deepcopy(model)
    for name, each in (("once", False), ("each", True)):
        start_again = copy.deepcopy(start)
        config = TrainConfig(**CONFIG, precompute_ref_log_probs=not each)  # type: ignore[arg-type]
        train(start_again, tokenizer, random_pairs(14), config, tmp_path / name, progress=False)
        assert losses(tmp_path / name)[0].float() == LOG_2
        start_again.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)  # a model as before
        with pytest.raises(ConfigError, match="finished run"):
            train(copy.deepcopy(start), tokenizer, random_pairs(14), config, tmp_path / name)
    assert torch.equal(losses(tmp_path / "once"), losses(tmp_path / "each"))
    with pytest.raises(ConfigError, match="holds a run with"):
        run(model_path, tmp_path / "once")


def test_an_option_newer_than_a_run_had_its_default(tmp_path):
    setup = Setup(launched(TrainConfig()), TrainConfig(), tmp_path, None, False, random_pairs(2))
    claim_folder(setup, "model")
    path = tmp_path / "run.json"
    known = json.loads(path.read_text())
    del known["weight_decay"]
    path.write_text(json.dumps(known))
    claim_folder(setup, "model")
    other = replace(setup, config=TrainConfig(weight_decay=0.5))
    with pytest.raises(ConfigError, match=r"weight_decay=0\.0, not 0\.5"):
        claim_folder(other, "model")


def test_models_in_memory_that_cannot_be_trained(model_path, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        load_causal_lm(model_path), peft.LoraConfig(target_modules=["q_proj"])
    )
    half = load_causal_lm(model_path, dtype=torch.bfloat16)
    frozen = load_causal_lm(model_path).requires_grad_(False)
    config = TrainConfig(**CONFIG)  # type: ignore[arg-type]
    cases = ((adapted, "has adapters"), (half, "dtype=float32"), (frozen, "is frozen"))
    for i, (model, message) in enumerate(cases):
        with pytest.raises(ModelError, match=message):
            train(model, build_tokenizer(), random_pairs(4), config, tmp_path / str(i))


# ------------------------------------------------------------------------------------ adapters
LORA = dict(use_peft=True, lora_r=4, lora_alpha=8.0, learning_rate=1e-2)


def test_adapters_train_and_leave_a_whole_policy(model_path, tmp_path):
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    run(model_path, tmp_path, num_train_epochs=6, **LORA)
    found = losses(tmp_path)
    assert found[0].float() == LOG_2 and found[-1] < 0.6
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    config = (tmp_path / "policy" / "config.json").read_text()
    assert "peft" not in config and "lora" not in " ".join(weights(tmp_path))
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    start = AutoModelForCausalLM.from_pretrained(model_path)
    changed = {
        name
        for name, x in start.named_parameters()
        if not torch.equal(x, policy.get_parameter(name))
    }
    linear = {
        f"{name}.weight"
        for name, x in start.named_modules()
        if isinstance(x, torch.nn.Linear) and name != "lm_head"
    }
    assert changed == linear
    saved = list((tmp_path / "checkpoint").glob("step-*/model.safetensors"))
    whole = (tmp_path / "policy" / "model.safetensors").stat().st_size
    assert len(saved) == 1 and saved[0].stat().st_size < whole / 2


def test_interrupted_adapters_end_in_the_same_bits(model_path, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    run(model_path, tmp_path / "whole", **LORA)
    real, calls = trainer.take_step, []

    def interrupted(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(trainer, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model_path, tmp_path / "broken", **LORA)
    monkeypatch.setattr(trainer, "take_step", real)
    run(model_path, tmp_path / "broken", **LORA)
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_the_reference_of_adapters_is_the_model_without_them(model_path, tmp_path, monkeypatch):
    """Computed in every step, with no second model in memory."""
    pytest.importorskip("peft")
    real = copy.deepcopy

    def no_model(x, *args):
        # Rotary modules are copied, which have no weights.
        assert not isinstance(x, torch.nn.Module) or not list(x.parameters()), "a second model"
        return real(x, *args)

    monkeypatch.setattr(copy, "deepcopy", no_model)
    run(model_path, tmp_path / "each", bf16=False, precompute_ref_log_probs=False, **LORA)
    monkeypatch.undo()
    run(model_path, tmp_path / "once", bf16=False, **LORA)
    assert torch.equal(losses(tmp_path / "once"), losses(tmp_path / "each"))


def test_adapters_share_the_cached_reference_of_their_base(model_path, tmp_path, references):
    pytest.importorskip("peft")
    cache = str(tmp_path / "cache")
    run(model_path, tmp_path / "whole", reference_cache=cache)
    run(model_path, tmp_path / "lora", reference_cache=cache, **LORA)
    assert len(references) == 1 and losses(tmp_path / "lora")[0].float() == LOG_2


def test_adapters_on_four_bits(model_path, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    path = str(save_tiny(LLAMA, tmp_path / "llama"))
    run(path, tmp_path / "run", num_train_epochs=6, load_in_4bit=True, dtype="bfloat16", **LORA)
    found = losses(tmp_path / "run")
    assert found[0].float() == LOG_2 and found[-1] < 0.65
    assert weights(tmp_path / "run")["lm_head.weight"].dtype == torch.float32
    with pytest.raises(ConfigError, match="by name"):
        config = TrainConfig(**{**CONFIG, **LORA}, load_in_4bit=True)  # type: ignore[arg-type]
        train(load_causal_lm(path), build_tokenizer(), random_pairs(4), config, tmp_path / "b")


# -------------------------------------------------------------------------------- memory, budget
@pytest.mark.parametrize(
    "options",
    [
        dict(gradient_checkpointing=True),
        dict(mlp_tile_tokens=7),
        dict(mlp_tile_tokens=7, gradient_checkpointing=True, activation_offloading=True),
        dict(workspace_mib=0.05),
        dict(impl="torch"),
    ],
    ids=str,
)
def test_options_of_memory_do_not_change_training(options, model_path, tmp_path):
    run(model_path, tmp_path / "plain", bf16=False)
    run(model_path, tmp_path / "other", bf16=False, **options)
    plain, other = losses(tmp_path / "plain"), losses(tmp_path / "other")
    assert other[0].float() == LOG_2
    torch.testing.assert_close(plain, other, rtol=1e-4, atol=0)


def test_activations_are_offloaded_around_the_body(model_path, tmp_path, monkeypatch):
    entered, real = [], offload.offload_activations

    def counted():
        entered.append(torch.is_grad_enabled())
        return real()

    monkeypatch.setattr(offload, "offload_activations", counted)
    run(model_path, tmp_path, activation_offloading=True)
    assert sum(entered) >= 4


def test_weights_in_bfloat16_stay_so(model_path, tmp_path):
    run(model_path, tmp_path, dtype="bfloat16")
    assert {x.dtype for x in weights(tmp_path).values()} == {torch.bfloat16}
    assert losses(tmp_path)[0].float() == LOG_2


def test_kernels_that_compute_something_else_are_named(model_path, tmp_path, monkeypatch):
    def wrong(model):
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.ReLU()

    monkeypatch.setattr(liger, "use_liger", wrong)
    with pytest.raises(ModelError, match="use_liger_kernel: Liger's kernels give Qwen3ForCausalLM"):
        run(model_path, tmp_path, use_liger_kernel=True)


def test_pairs_over_the_budget_follow_the_config(model_path, tmp_path, capsys):
    pairs = [*random_pairs(6), TokenizedPair([3] * 9, [4] * 80, [5] * 90, where="pairs.jsonl:7")]
    with pytest.raises(DataError, match=r"pairs.jsonl:7: the pair takes 179 tokens.*overlong"):
        run(model_path, tmp_path / "stop", pairs=pairs, overlong="stop")
    run(model_path, tmp_path / "drop", pairs=pairs, overlong="drop")
    run(model_path, tmp_path / "truncate", pairs=pairs)
    out = capsys.readouterr().out
    assert "1 (pairs.jsonl:7) dropped, 0 trunc" in out and "0 dropped, 1 (pairs.jsonl:7) tr" in out
    for name, count in (("drop", 6), ("truncate", 7)):
        assert sum(row["pairs"] for row in read_metrics(tmp_path / name)) == count


def test_a_model_that_cannot_share_is_padded_or_refused(tmp_path):
    path = str(save_tiny(MAMBA, tmp_path / "mamba"))
    with pytest.raises(ModelError, match="which runs across packed sequences"):
        run(path, tmp_path / "shared", layout="shared")
    run(path, tmp_path / "auto", bf16=False, learning_rate=1e-2, num_train_epochs=6)
    found = losses(tmp_path / "auto")
    assert found[0].float() == LOG_2 and found[-1] < found[0]


def test_each_step_is_reported(model_path, tmp_path):
    rows = []
    config = TrainConfig(**CONFIG)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(model_path)
    train(
        model_path,
        tokenizer,
        random_pairs(9),
        config,
        tmp_path,
        progress=False,
        on_step=rows.append,
    )
    assert [row["pairs"] for row in rows] == [4, 4, 1]
    assert [row["loss"] for row in rows] == losses(tmp_path).tolist()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(layout="rows"), "layout=rows must be one of auto, shared, packed, padded"),
        (dict(overlong="cut"), "overlong=cut must be one of truncate, drop, stop"),
        (dict(dtype="float16"), "dtype=float16 must be one of float32, bfloat16"),
        (dict(impl="cuda"), "impl=cuda must be one of"),
        (dict(load_in_4bit=True), "load_in_4bit=True must be false without use_peft"),
        (dict(use_peft=True, lora_r=0), "lora_r=0 must be >= 1"),
        (dict(mlp_tile_tokens=0), "mlp_tile_tokens=0 must be >= 1"),
        (dict(max_tokens=2), "max_tokens=2 must be >= 3"),
    ],
    ids=str,
)
def test_bad_options_are_refused(option, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**option)
