"""Evaluation in training, the best policy, and more epochs for a run that is finished."""

import json
import logging
import re
import shutil
from typing import Any

import pytest
import torch
from test_trainer import CONFIG, one_by_one, random_pairs, read_metrics, run, weights
from tiny import LLAMA, MIXTRAL, save_tiny

from fastdpo.errors import ConfigError, DataError, ModelError
from fastdpo.loss import reference
from fastdpo.model.load import load_causal_lm, load_tokenizer
from fastdpo.train import evaluate, trainer
from fastdpo.train.config import EvalConfig, TrainConfig

HELD = random_pairs(9, seed=7)
LORA = dict(use_peft=True, lora_r=4, lora_alpha=8.0, learning_rate=1e-2)
BEST = EvalConfig(eval_steps=1, load_best_model_at_end=True)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return str(save_tiny(LLAMA, tmp_path_factory.mktemp("model") / "llama"))


@pytest.fixture(autouse=True)
def evaluated(monkeypatch):
    """Options of `run` that are none of TrainConfig reach `train`."""
    import test_trainer

    def train(*args, **options):
        return trainer.train(*args, **options, **given)

    given = {}
    monkeypatch.setattr(test_trainer, "train", train)
    return given


def rows_of(folder, of_evaluation=True):
    """Rows of the log without what is measured by a clock."""
    rows = [row for row in read_metrics(folder) if ("eval_loss" in row) == of_evaluation]
    return [{k: x for k, x in row.items() if "second" not in k and "runtime" not in k}
            for row in rows]  # fmt: skip


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def by_hand(policy, start, alpha):
    """The metrics of `HELD`, from full logits, a sequence at a time."""
    with torch.no_grad():
        zeros_S = torch.zeros(2 * len(HELD))
        logp_S, ref_S = (one_by_one(load_causal_lm(str(path)).eval(), HELD, zeros_S)[0].double()
                         for path in (policy, start))  # fmt: skip
    lengths_S = torch.tensor([len(x) for p in HELD for x in (p.chosen_ids, p.rejected_ids)])
    reward_P2 = 0.1 * (logp_S - ref_S).view(-1, 2)
    margin_P = reward_P2[:, 0] - reward_P2[:, 1]
    found = {
        "loss": reference.dpo_loss(logp_S, ref_S, lengths_S, beta=0.1, alpha=alpha).mean(),
        "rewards/chosen": reward_P2[:, 0].mean(),
        "rewards/rejected": reward_P2[:, 1].mean(),
        "rewards/accuracies": (margin_P > 0).double().mean(),
        "rewards/margins": margin_P.mean(),
        "logps/chosen": logp_S[0::2].mean(),
        "logps/rejected": logp_S[1::2].mean(),
        "lengths/chosen": lengths_S[0::2].double().mean(),
        "lengths/rejected": lengths_S[1::2].double().mean(),
        "length_margin": alpha * (lengths_S[0::2] - lengths_S[1::2]).double().mean(),
    }
    return {f"eval_{name}": float(x) for name, x in found.items()} | {"eval_pairs": len(HELD)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("once", {}),
        ("padded", dict(layout="padded")),
        ("each", dict(precompute_ref_log_probs=False)),
        ("adapters", dict(precompute_ref_log_probs=False, **LORA)),
        ("another", dict(precompute_ref_log_probs=True)),
    ],
)
def test_an_evaluation_is_the_mean_over_all_pairs(model_path, tmp_path, evaluated, name, options):
    if name == "adapters":
        pytest.importorskip("peft")
    start = model_path
    if name == "another":
        start = evaluated["reference"] = str(save_tiny(LLAMA, tmp_path / "other", seed=1))
    evaluated |= dict(eval_pairs=HELD, evaluation=EvalConfig(eval_steps=3))
    found = run(model_path, tmp_path / "run", bf16=False, alpha=0.02, max_tokens=80, **options)
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 3, 4]
    policies = {0: model_path, 4: tmp_path / "run" / "policy"}
    for row in (rows[0], rows[-1]):
        wanted = by_hand(policies[row.pop("step")], start, 0.02)
        assert row == pytest.approx(wanted, rel=1e-4, abs=2e-5)
    assert {k: x for k, x in found.items() if k.startswith("eval_") and k in wanted} == rows[-1]
    assert len(rows_of(tmp_path / "run", False)) == 4


def test_evaluation_changes_no_bit_of_training(model_path, tmp_path, evaluated):
    run(model_path, tmp_path / "without", num_train_epochs=2)
    evaluated |= dict(eval_pairs=HELD)
    run(model_path, tmp_path / "with", num_train_epochs=2)
    assert same(tmp_path / "without", tmp_path / "with")
    assert rows_of(tmp_path / "without", False) == rows_of(tmp_path / "with", False)
    rows = rows_of(tmp_path / "with")
    assert [row["step"] for row in rows] == [0, 4, 8]  # by default each epoch
    assert torch.tensor(rows[0]["eval_loss"]) == torch.tensor(2.0).log()


def killed(monkeypatch, module, name, count, work):
    """Run something that is interrupted at the n-th call of a function."""
    real, calls = getattr(module, name), []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            work()


@pytest.mark.parametrize("adapters", [False, True])
def test_killed_anywhere_the_best_policy_is_the_same(
    model_path, tmp_path, evaluated, monkeypatch, adapters
):
    if adapters:
        pytest.importorskip("peft")
    name, more = ("eval_loss", LORA) if adapters else ("rewards/margins", {})
    evaluated |= dict(
        eval_pairs=HELD,
        evaluation=EvalConfig(
            eval_steps=1, load_best_model_at_end=True, metric_for_best_model=name
        ),
    )
    options = dict(num_train_epochs=2, save_steps=3, **more)
    run(model_path, tmp_path / "whole", **options)
    rows = rows_of(tmp_path / "whole")
    name = "eval_" + name.removeprefix("eval_")
    pick = min if name == "eval_loss" else max
    best = pick(rows[1:], key=lambda row: row[name])
    assert 1 < best["step"] < 8, "the end is no test of it"
    facts = json.loads((tmp_path / "whole" / "best.json").read_text())
    assert (facts["best_global_step"], facts["best_metric"]) == (best["step"], best[name])
    policy = by_hand(tmp_path / "whole" / "policy", model_path, 0.0)
    assert best[name] == pytest.approx(policy[name], rel=0.05)  # bf16 there, fp32 here
    for module, called, count in (
        (evaluate, "measure", 1),  # of the start
        (evaluate, "measure", 4),
        (evaluate, "save_best", 2),
        (trainer, "save_checkpoint", 2),
        (trainer, "_save", 1),
    ):
        killed(monkeypatch, module, called, count,
               lambda: run(model_path, tmp_path / "killed", **options))  # fmt: skip
    run(model_path, tmp_path / "killed", **options)
    assert same(tmp_path / "whole", tmp_path / "killed")
    assert read_rows(tmp_path / "whole") == read_rows(tmp_path / "killed")
    assert len(list((tmp_path / "killed" / "best").iterdir())) == 1


def test_at_most_two_of_the_best_are_kept(model_path, tmp_path, evaluated, monkeypatch):
    """That of the last checkpoint and the newest; and nothing that a kill left."""
    evaluated |= dict(eval_pairs=HELD, evaluation=BEST)
    kept, real = [], evaluate.save_best

    def save(folder, *args):
        real(folder, *args)
        kept.append([int(path.name[-2:]) for path in sorted(folder.glob("step-*"))])

    monkeypatch.setattr(evaluate, "save_best", save)
    monkeypatch.setattr(EvalConfig, "is_better", lambda *_: True)
    (tmp_path / "best" / ".step-00000099.partial").mkdir(parents=True)
    run(model_path, tmp_path, num_train_epochs=2, save_steps=3)
    assert kept == [[1], [2], [3], [3, 4], [3, 5], [3, 6], [6, 7], [6, 8]]
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step-00000008"]


def test_an_evaluation_that_is_not_finite_is_named(model_path, tmp_path, evaluated, monkeypatch):
    evaluated |= dict(eval_pairs=HELD, evaluation=EvalConfig(eval_steps=1))
    with pytest.raises(ModelError, match=r"the policy after step 1 gives eval_dataset eval_loss=n"):
        run(model_path, tmp_path / "a", learning_rate=1e38)
    monkeypatch.setattr(evaluate, "measure", lambda *_: {"eval_loss": float("inf")})
    with pytest.raises(ModelError, match=r"the start gives .*=inf: the model is broken or .* bf16"):
        run(model_path, tmp_path / "b")


def test_bars_and_errors_name_the_pairs(model_path, tmp_path, evaluated, capsys):
    evaluated |= dict(eval_pairs=HELD)
    options: dict[str, Any] = CONFIG
    config = TrainConfig(**options)
    trainer.train(model_path, load_tokenizer(model_path), random_pairs(14), config, tmp_path,
                  **evaluated)  # fmt: skip
    bars = capsys.readouterr().err
    assert "reference: 100%" in bars and "reference of eval_dataset: 100%" in bars
    row = next(row for row in read_metrics(tmp_path) if "eval_loss" in row)
    assert row["eval_samples_per_second"] == pytest.approx(len(HELD) / row["eval_runtime"])


def read_rows(folder):
    return rows_of(folder) + rows_of(folder, False)


def test_pairs_of_training_are_no_evaluation(model_path, tmp_path, evaluated, caplog):
    pairs = random_pairs(14)
    evaluated |= dict(eval_pairs=pairs[3:6])
    with pytest.raises(DataError, match="all 3 pairs are trained on too"):
        run(model_path, tmp_path / "a")
    evaluated |= dict(eval_pairs=[*pairs[3:5], *HELD])
    with caplog.at_level(logging.WARNING):
        run(model_path, tmp_path / "b")
    assert "2 of 11 pairs are trained on too" in caplog.text
    evaluated |= dict(eval_pairs=HELD)
    with pytest.raises(ConfigError, match="other pairs in eval_dataset"):
        run(model_path, tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(eval_steps=0), "eval_steps=0 must be >= 1"),
        (dict(metric_for_best_model="eval_loss"), "metric_for_best_model=eval_loss must be left"),
        (dict(greater_is_better=False), "greater_is_better=False must be left out"),
        (dict(load_best_model_at_end=True, metric_for_best_model="eval_accuracy"),
         "metric_for_best_model=eval_accuracy must be one of eval_loss, eval_rewards/chosen"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_of_evaluation_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EvalConfig(**options)


def test_without_pairs_to_evaluate_on_options_are_refused(model_path, tmp_path, evaluated):
    evaluated |= dict(evaluation=EvalConfig(load_best_model_at_end=True))
    with pytest.raises(ConfigError, match=r"load_best_model_at_end=True.*eval_pairs be given"):
        run(model_path, tmp_path)


def test_which_metrics_are_better_when_greater():
    loss, kept = EvalConfig(), dict(load_best_model_at_end=True)
    margins = EvalConfig(metric_for_best_model="rewards/margins", **kept)
    assert loss.is_better(1.0, 2.0) and not loss.is_better(1.0, 1.0)
    assert margins.best_metric == "eval_rewards/margins" and margins.is_better(2.0, 1.0)
    lower = EvalConfig(metric_for_best_model="rewards/margins", greater_is_better=False, **kept)
    assert lower.is_better(1.0, 2.0)


def test_a_mixture_is_evaluated_with_its_balancing_loss(tmp_path, evaluated):
    path = str(save_tiny(MIXTRAL, tmp_path / "mixtral"))
    evaluated |= dict(eval_pairs=HELD)
    run(path, tmp_path / "run", bf16=False, router_aux_loss_coef=0.1)
    for row in rows_of(tmp_path / "run"):
        whole = row["eval_preference_loss"] + 0.1 * row["eval_aux_loss"]
        assert row["eval_aux_loss"] > 1 and row["eval_loss"] == pytest.approx(whole, rel=1e-6)


def test_the_alpha_of_an_evaluation_is_that_of_the_next_step(model_path, tmp_path, evaluated):
    evaluated |= dict(eval_pairs=HELD, evaluation=EvalConfig(eval_steps=1))
    run(model_path, tmp_path, alpha="auto", learning_rate=3e-3)
    steps, found = rows_of(tmp_path, False), rows_of(tmp_path)
    assert len({row["alpha"] for row in steps}) == 3  # the first step says nothing of the tilt
    for step, row in zip(steps, found):
        difference = row["eval_lengths/chosen"] - row["eval_lengths/rejected"]
        assert row["eval_length_margin"] == pytest.approx(step["alpha"] * difference, rel=1e-5)


def test_a_model_in_memory_ends_as_the_best(model_path, tmp_path, evaluated):
    evaluated |= dict(eval_pairs=HELD, evaluation=BEST)
    model, tokenizer = load_causal_lm(model_path), load_tokenizer(model_path)
    config = TrainConfig(**{**CONFIG, "num_train_epochs": 2, "learning_rate": 3e-3})
    trainer.train(model, tokenizer, random_pairs(14), config, tmp_path, progress=False, **evaluated)
    assert json.loads((tmp_path / "best.json").read_text())["best_global_step"] < 8
    policy = weights(tmp_path)
    assert all(torch.equal(policy[name], x) for name, x in model.state_dict().items())


# ---------------------------------------------------------------------------------- more epochs
@pytest.fixture
def constant(monkeypatch):
    def schedule(optimizer, config, steps):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    monkeypatch.setattr(trainer, "_cosine", schedule)


def test_epochs_added_to_a_finished_run_are_those_of_the_longer_one(
    model_path, tmp_path, constant, monkeypatch
):
    """Killed on the way too; until then the policy is what it was."""
    run(model_path, tmp_path / "whole", num_train_epochs=3)
    found = run(model_path, tmp_path / "more")
    shutil.copytree(tmp_path / "more", tmp_path / "before")

    def add():
        run(model_path, tmp_path / "more", num_train_epochs=3)

    killed(monkeypatch, trainer, "take_step", 1, add)
    killed(monkeypatch, trainer, "take_step", 4, add)
    assert len(rows_of(tmp_path / "more", False)) == 7
    with monkeypatch.context() as patch:  # the finished run can be had back
        patch.setattr(trainer, "_train", None)
        assert run(model_path, tmp_path / "more") == found
    killed(monkeypatch, trainer, "take_step", 5, add)
    with pytest.raises(ConfigError, match=r"3 or more to go on, 1 to have its policy of so many"):
        run(model_path, tmp_path / "more", num_train_epochs=2)
    assert same(tmp_path / "more", tmp_path / "before")
    run(model_path, tmp_path / "more")
    with pytest.raises(ConfigError, match=r"num_train_epochs=2 is 8 steps, .* is of step 10"):
        run(model_path, tmp_path / "more", num_train_epochs=2)
    killed(monkeypatch, trainer, "_save", 1, add)
    assert same(tmp_path / "more", tmp_path / "before")
    killed(monkeypatch, trainer, "note_finished", 1, add)
    for epochs in (1, 2):  # which policy is there is not known by now
        with pytest.raises(ConfigError, match="is fewer than the 3 of the run"):
            run(model_path, tmp_path / "more", num_train_epochs=epochs)
    add()
    assert same(tmp_path / "more", tmp_path / "whole")
    assert rows_of(tmp_path / "more", False) == rows_of(tmp_path / "whole", False)
    with pytest.raises(ConfigError, match="num_train_epochs=1 is fewer than the 3 of the run"):
        run(model_path, tmp_path / "more")
    monkeypatch.setattr(trainer, "_train", None)
    add()  # it is finished
    shutil.rmtree(tmp_path / "more" / "checkpoint")
    with pytest.raises(ConfigError, match=r"num_train_epochs=4, but .* is gone"):
        run(model_path, tmp_path / "more", num_train_epochs=4)
    add()


def test_added_epochs_follow_the_schedule_of_all(model_path, tmp_path, monkeypatch):
    """Their first step is not at the zero that the shorter schedule ended at."""
    for name in ("whole", "more"):
        for epochs in (1, 3) if name == "more" else (3,):
            run(model_path, tmp_path / name, num_train_epochs=epochs)
    whole, more = (
        [row["learning_rate"] for row in rows_of(tmp_path / name, False)]
        for name in ("whole", "more")
    )
    assert more[4:] == whole[4:] and more[:4] != whole[:4]


def test_added_epochs_keep_the_best_so_far(model_path, tmp_path, evaluated):
    evaluated |= dict(eval_pairs=HELD, evaluation=BEST)
    options = dict(learning_rate=3e-3)
    run(model_path, tmp_path, num_train_epochs=2, **options)
    first = json.loads((tmp_path / "best.json").read_text())
    before = weights(tmp_path)
    run(model_path, tmp_path, num_train_epochs=3, **options)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(13))
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["best_global_step"] == first["best_global_step"] <= 8 < best["global_step"] == 12
    after = weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


# ----------------------------------------------------------------------------------- the rest
def test_a_checkpoint_that_is_not_kept_costs_nothing_else(
    model_path, tmp_path, evaluated, monkeypatch
):
    run(model_path, tmp_path / "kept")
    evaluated["keep_checkpoint"] = False
    out = tmp_path / "run"
    killed(monkeypatch, trainer, "_save", 1, lambda: run(model_path, out))
    assert [x.name for x in (out / "checkpoint").iterdir()] == ["step-00000002"]
    killed(monkeypatch, trainer, "remove_checkpoint", 1, lambda: run(model_path, out))
    assert (out / "checkpoint").exists()
    for _ in range(2):
        run(model_path, out)
        assert same(out, tmp_path / "kept") and not (out / "checkpoint").exists()
        assert len(list(out.glob(".checkpoint*"))) == 0
        shutil.rmtree(out / "policy")  # and it is made again


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(batch_size=32), "make 1 optimizer step, too few .* batch_size, as 2, or more num_tr"),
        (dict(batch_size=7, num_train_epochs=2), "make 4 optimizer steps.* as 4, or more num_tr"),
        (dict(num_train_epochs=2), None),
    ],
    ids=str,
)
def test_a_run_of_few_steps_says_so(model_path, tmp_path, caplog, options, told):
    run(model_path, tmp_path, **options)
    few = [x.getMessage() for x in caplog.records if "optimizer step" in x.getMessage()]
    assert len(few) == (told is not None) and (told is None or re.search(told, few[0]))
