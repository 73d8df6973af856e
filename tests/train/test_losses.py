"""Every objective in the trainer: TRL's trainers, whole steps, references, single responses."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from test_trainer import CONFIG, read_metrics, weights
from tiny import LLAMA, save_tiny

from fastdpo.data.batch import plan_steps
from fastdpo.data.examples import TokenizedList, TokenizedPair
from fastdpo.model.load import load_tokenizer
from fastdpo.train import trainer
from fastdpo.train.config import TrainConfig
from fastdpo.train.trainer import train

LOG_2 = torch.tensor(2.0).log()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return str(save_tiny(LLAMA, tmp_path_factory.mktemp("model") / "llama"))


def config_of(**changes):
    return TrainConfig(**{**CONFIG, "bf16": False, **changes})


def run(model_path, out, examples, **changes):
    options = {x: changes.pop(x) for x in ("eval_pairs", "reference") if x in changes}
    config = config_of(**changes)
    tokenizer = load_tokenizer(model_path)
    return train(model_path, tokenizer, examples, config, out, progress=False, **options)


def scored(pairs):
    return [
        replace(pair, score_chosen=0.5 + i % 3, score_rejected=-0.25 * i)
        for i, pair in enumerate(pairs)
    ]


def lists_of(pairs):
    return [
        TokenizedList(
            pair.prompt_ids,
            [pair.chosen_ids, pair.rejected_ids, [*pair.chosen_ids[::-1], 7]],
            [2.0, 0.0, 1.0],
        )
        for pair in pairs
    ]


# --------------------------------------------------------------------------------------------- TRL
RATE, BETA, BATCH = 0.1, 0.3, 4  # of clipped gradients


def sgd(monkeypatch):
    """TRL's steps without Adam, which turns the rounding of small gradients into steps."""

    def optimizer(model, config, steps):
        found = torch.optim.SGD(model.parameters(), lr=RATE)
        return found, torch.optim.lr_scheduler.LambdaLR(found, lambda step: 1.0)

    monkeypatch.setattr(trainer, "_optimizer", optimizer)


def in_their_order(examples):
    """So that a run on them takes each step's examples from the given ones in their order."""
    steps = plan_steps([1] * len(examples), batch_pairs=BATCH, max_tokens=10**6, seed=0)
    order = list(chain.from_iterable(chain.from_iterable(steps)))
    # Within a step the order has no meaning, but which examples it has must be the same.
    placed = [None] * len(examples)
    for place, example in zip(order, examples):
        placed[place] = example
    return placed


def sequential(trainer_class):
    class Sequential(trainer_class):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return Sequential


def assert_same_weights(out, model, start):
    from safetensors.torch import load_file

    theirs, before = dict(model.named_parameters()), load_file(f"{start}/model.safetensors")
    for name, ours in weights(out).items():
        moved = (theirs[name] - before[name]).norm()
        assert (ours - theirs[name]).norm() < 1e-5 * theirs[name].norm(), name
        assert (ours - theirs[name]).norm() < 2e-3 * moved, name


OF_TRL = {
    **{name: dict(loss_type=name) for name in (
        "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
        "discopop", "sft", "sigmoid_norm",
    )},
    "exo_pair": dict(loss_type="exo_pair", label_smoothing=1e-3),
    "robust": dict(loss_type="robust", label_smoothing=0.1),
    "aot": dict(loss_type="aot", label_smoothing=0.1),
    "aot_unpaired": dict(loss_type="aot_unpaired"),
    "mpo": dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    "ld_dpo": dict(loss_type="sigmoid", ld_alpha=0.5),
    "wpo": dict(loss_type="sigmoid", use_weighting=True),
    "js": dict(loss_type="sigmoid", f_divergence_type="js_divergence"),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_TRL)
def test_three_steps_are_those_of_trls_trainer(name, model_path, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    from trl_options import make_trainer

    options = OF_TRL[name]
    theirs = make_trainer(sequential(trl.DPOTrainer), LLAMA, tmp_path, max_grad_norm=1.0, **options)
    pairs = [
        TokenizedPair(x["prompt_ids"], x["chosen_ids"], x["rejected_ids"])
        for x in theirs.train_dataset
    ]
    theirs.train()
    logged = [row["loss"] for row in theirs.state.log_history if "loss" in row]
    sgd(monkeypatch)
    run(
        model_path, tmp_path / "ours", in_their_order(pairs),
        beta=BETA, batch_size=BATCH, max_length=200, max_tokens=200, **options,
    )  # fmt: skip
    losses = [row["loss"] for row in read_metrics(tmp_path / "ours")]
    assert losses == pytest.approx(logged, rel=2e-4)
    assert_same_weights(tmp_path / "ours", theirs.model, model_path)
