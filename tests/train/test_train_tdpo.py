"""TDPO in the trainer, against a loop with the logits of both models, one response at a time."""

from copy import deepcopy
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import CONFIG, random_pairs, read_metrics, weights
from tiny import LLAMA, save_tiny
from torch.nn import functional as F

from fastdpo.data.batch import plan_steps
from fastdpo.errors import ConfigError
from fastdpo.model.head import base_of
from fastdpo.model.load import load_tokenizer
from fastdpo.train import trainer
from fastdpo.train.config import TrainConfig
from fastdpo.train.trainer import train

BETA, ALPHA, TDPO_ALPHA = 0.3, 0.05, 0.7
BATCH, RATE = 4, 0.1  # of clipped gradients


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return str(save_tiny(LLAMA, tmp_path_factory.mktemp("model") / "llama"))


def run(model_path, out, pairs, **changes):
    config = TrainConfig(**{**CONFIG, "bf16": False, **changes})
    train(model_path, load_tokenizer(model_path), pairs, config, out, progress=False)


def response_sums(model, reference, prompt_ids, response_ids):
    """Log-prob under the policy, under the reference, and KL(reference || policy), each summed."""
    device = next(model.parameters()).device  # where the trainer has put it
    ids, first = torch.tensor([prompt_ids + response_ids], device=device), len(prompt_ids) - 1
    target_N = ids[0, len(prompt_ids) :, None]
    logp_NV = model(input_ids=ids).logits[0, first:-1].log_softmax(-1)
    with torch.no_grad():
        ref_NV = reference(ids)[0, first:-1].log_softmax(-1)
    kl = (ref_NV.exp() * (ref_NV - logp_NV)).sum()
    return logp_NV.gather(1, target_N).sum(), ref_NV.gather(1, target_N).sum(), kl


def plain_steps(model, reference, pairs, loss_type):
    """The losses of three steps by SGD on clipped gradients; ``model`` is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=RATE), []
    for step in plan_steps([1] * len(pairs), batch_pairs=BATCH, max_tokens=10**6, seed=0):
        terms = []
        for pair in (pairs[i] for i in chain.from_iterable(step)):
            sides = pair.chosen_ids, pair.rejected_ids
            chosen, rejected = (response_sums(model, reference, pair.prompt_ids, x) for x in sides)
            d = (chosen[0] - chosen[1]) - (rejected[0] - rejected[1])
            if loss_type == "tdpo1":
                logit = d - (rejected[2] - chosen[2])
            else:
                logit = d - TDPO_ALPHA * (rejected[2] - chosen[2].detach())
            longer = len(pair.chosen_ids) - len(pair.rejected_ids)
            terms.append(-F.logsigmoid(BETA * logit + ALPHA * longer))
        loss = torch.stack(terms).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", ["tdpo1", "tdpo2"])
def test_three_steps_are_those_of_a_plain_loop(loss_type, lora, model_path, tmp_path, monkeypatch):
    if lora:
        pytest.importorskip("peft")
    started = []

    def optimizer(model, config, steps):
        started.append(deepcopy(model))
        found = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
        return found, torch.optim.lr_scheduler.LambdaLR(found, lambda step: 1.0)

    monkeypatch.setattr(trainer, "_optimizer", optimizer)
    pairs = random_pairs(3 * BATCH)
    options = {"tdpo_alpha": TDPO_ALPHA} if loss_type == "tdpo2" else {}
    run(
        model_path, tmp_path / "ours", pairs, loss_type=loss_type, beta=BETA,
        alpha=ALPHA, batch_size=BATCH, max_tokens=200, precompute_ref_log_probs=False,
        num_train_epochs=1, use_peft=lora, **({"lora_r": 4} if lora else {}), **options,
    )  # fmt: skip
    (model,) = started
    base_of(model).set_attn_implementation("eager")
    if lora:

        def reference(ids):
            with model.disable_adapter():
                return model(input_ids=ids).logits
    else:
        unchanged = deepcopy(model)

        def reference(ids):
            return unchanged(input_ids=ids).logits

    losses = plain_steps(model, reference, pairs, loss_type)
    assert [row["loss"] for row in read_metrics(tmp_path / "ours")] == pytest.approx(losses, 1e-5)
    if lora:
        model = model.merge_and_unload()
    before = load_file(f"{model_path}/model.safetensors")
    for name, ours in weights(tmp_path / "ours").items():
        theirs = model.get_parameter(name).detach().cpu()
        assert (ours - theirs).norm() < 1e-5 * theirs.norm(), name
        assert (ours - theirs).norm() < 1e-3 * (theirs - before[name]).norm() + 1e-7, name


def test_the_metrics_have_the_kl(model_path, tmp_path):
    run(
        model_path, tmp_path / "run", random_pairs(4), loss_type="tdpo1", num_train_epochs=2,
        precompute_ref_log_probs=False,
    )  # fmt: skip
    first, *_, last = read_metrics(tmp_path / "run")
    for side in ("chosen", "rejected"):
        assert abs(first[f"kl/{side}"]) < 1e-5 < last[f"kl/{side}"]


def test_a_cache_of_the_reference_is_refused():
    with pytest.raises(ConfigError, match="set precompute_ref_log_probs=false"):
        TrainConfig(loss_type="tdpo1", precompute_ref_log_probs=True)
