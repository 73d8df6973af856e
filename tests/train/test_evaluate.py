"""Evaluation in training, the best policy, and more epochs for a run that is finished."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import CONFIG, one_by_one, random_pairs, read_metrics, run, weights
from tiny import LLAMA, save_tiny

from fastdpo.errors import ConfigError, DataError
from fastdpo.loss import reference
from fastdpo.model.load import load_causal_lm
from fastdpo.train import evaluate, trainer
from fastdpo.train.config import EvalConfig

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
    # The chosen become less likely, so that the best is neither the first nor the last.
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
    print([(row["step"], row[name]) for row in rows])
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


def read_rows(folder):
    return rows_of(folder) + rows_of(folder, False)
