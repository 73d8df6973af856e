"""Objectives of single responses: KTO's against TRL's own trainer, BCO's by hand."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdpo import linear_preference_loss
from fastdpo.loss import reference, singles
from fastdpo.loss.choices import make_objective
from fastdpo.loss.examples import Examples

KTO_LOSSES = {"kto": singles.kto, "apo_zero_unpaired": singles.apo_zero_unpaired}


def some_singles(P, spread=1.0, shift=0.0, generator=None) -> Any:
    """P responses whose log-ratios are about ``spread`` large."""
    logp_S = -20 * torch.rand(P, generator=generator, dtype=torch.float64)
    ratio_S = spread * torch.randn(P, generator=generator, dtype=torch.float64)
    zero_P = torch.zeros(P, dtype=torch.float64)
    return Examples(
        logp_S=logp_S.requires_grad_(),
        ref_logp_S=(logp_S - ratio_S).detach(),
        lengths_S=torch.randint(1, 90, (P,), generator=generator).double(),
        firsts=tuple(range(P + 1)),
        margin_P=zero_P,
        smoothing_P=zero_P,
        desirable_P=torch.randint(0, 2, (P,), generator=generator).double(),
        shift=shift,
    )


class TrlModel(torch.nn.Module):
    """Gives the log-probs it was told to, each in two halves, to TRL's `_compute_loss`."""

    def __init__(self, logp_S, kl_logp_S):
        super().__init__()
        self.of = {0: logp_S, 1: kl_logp_S}

    def forward(self, input_ids, labels, **_):
        logp_S = self.of[int(input_ids[0, 0])]
        log_probs = torch.stack([logp_S / 2, logp_S / 2], 1)
        return SimpleNamespace(
            log_probs=log_probs, entropy=log_probs.detach(), mean_logits=log_probs.detach()
        )


def trl_loss(x, loss_type, beta, weights, kl_logp_S, kl_ref_logp_S):
    """Loss and KL of TRL 1.16's `KTOTrainer._compute_loss` on given log-probs."""
    from trl.trainer.kto_trainer import KTOTrainer

    P = len(x.logp_S)
    model = TrlModel(x.logp_S, kl_logp_S)
    trainer: Any = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda t: t),
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = lambda m, batch: KTOTrainer._compute_kl_logps(trainer, m, batch)
    ids = torch.zeros(P, 3, dtype=torch.int64)
    mask = torch.ones(P, 3, dtype=torch.int64)
    batch = dict(
        input_ids=ids, attention_mask=mask, completion_mask=mask,
        KL_input_ids=ids + 1, KL_attention_mask=mask, KL_completion_mask=mask,
        label=x.desirable_P.bool(), ref_logps=x.ref_logp_S, ref_KL_logps=kl_ref_logp_S,
    )  # fmt: skip
    loss = KTOTrainer._compute_loss(trainer, model, batch, return_outputs=False)
    return loss, trainer._metrics["train"]["kl"][0]


@pytest.mark.parametrize("loss_type", KTO_LOSSES)
def test_losses_are_trls(loss_type):
    pytest.importorskip("trl")
    generator = torch.Generator().manual_seed(1)
    for case in range(60):
        P = (1, 9, 40)[case // 20]  # 1,000 responses
        beta = (0.01, 0.1, 0.5, 3.0)[case % 4]
        weights = ((1.0, 1.0), (1.5, 0.7), (0.0, 2.0))[case % 3]
        x = some_singles(P, 10.0 ** (case % 5 - 2), generator=generator)
        kl_S = 10.0 ** (case % 4 - 2) * torch.randn(P, generator=generator, dtype=torch.float64)
        wanted, kl = trl_loss(x, loss_type, beta, weights, kl_S, torch.zeros_like(kl_S))
        (wanted_grad,) = torch.autograd.grad(wanted, x.logp_S, retain_graph=True)
        x = replace(x, shift=kl)
        found = KTO_LOSSES[loss_type](beta, *weights).losses(x).mean()
        (found_grad,) = torch.autograd.grad(found, x.logp_S)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(found_grad, wanted_grad, rtol=1e-6, atol=1e-12)
        assert kl == max(kl_S.mean().item(), 0.0) or loss_type != "kto"


def test_bco_by_hand():
    """Rewards 2 and 1 about a delta of 1.5: both losses are log(1 + exp(-1/2))."""
    x = some_singles(2, shift=1.5)
    x = replace(
        x,
        ref_logp_S=x.logp_S.detach() - torch.tensor([20.0, 10.0], dtype=torch.float64),
        desirable_P=torch.tensor([1.0, 0.0], dtype=torch.float64),
    )
    loss_P = singles.bco(0.1).losses(x)
    assert loss_P.tolist() == pytest.approx([math.log1p(math.exp(-0.5))] * 2, rel=1e-14)
    (grad_S,) = torch.autograd.grad(loss_P.sum(), x.logp_S)
    slope = 0.1 / (1 + math.exp(0.5))
    assert grad_S.tolist() == pytest.approx([-slope, slope], rel=1e-14)


def test_bco_of_pairs_without_a_shift_is_bco_pair():
    """TRL's bco_pair is BCO of both responses with delta 0."""
    x = some_singles(64, 300.0)
    z_S = 0.1 * x.ratio_S
    wanted_P = -torch.nn.functional.logsigmoid(torch.where(x.desirable_P > 0, z_S, -z_S))
    torch.testing.assert_close(singles.bco(0.1).losses(x), wanted_P, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired", "bco"])
def test_gradients(name):
    x = some_singles(6, 5.0, shift=0.3)
    objective = getattr(singles, name)(0.2)
    assert torch.autograd.gradcheck(
        lambda logp_S: objective.losses(replace(x, logp_S=logp_S)), x.logp_S
    )
    far = some_singles(8, 1e5, shift=-3.0)
    (grad_S,) = torch.autograd.grad(objective.losses(far).sum(), far.logp_S)
    assert grad_S.isfinite().all()


def test_running_mean():
    """Of all values however they come, and the same bits after a round trip through JSON."""
    values = [torch.randn(n).double() * 10 + 3 for n in (5, 0, 1, 300)]
    running = singles.RunningMean()
    assert running.update(values[1]) == 0.0
    for v in values:
        running.update(v)
    assert running.mean == pytest.approx(torch.cat(values).mean().item(), rel=1e-12)
    again = singles.RunningMean(**json.loads(json.dumps(running.state())))
    assert again.update(values[0]) == running.update(values[0])
    assert again == running


def test_refusals():
    x = some_singles(4)
    no_labels = replace(x, desirable_P=None)
    with pytest.raises(ValueError, match="kto needs desirable_P"):
        singles.kto().losses(no_labels)
    pairs = replace(x, firsts=(0, 1, 3, 4), desirable_P=x.desirable_P[:3])
    with pytest.raises(ValueError, match="bco takes single responses, but example 1 has 2"):
        singles.bco().losses(pairs)
    with pytest.raises(ValueError, match="desirable_weight must be a finite number >= 0, got -1"):
        singles.kto(desirable_weight=-1.0)
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        singles.bco(0.0)


def test_by_name():
    x = some_singles(8, 5.0, shift=0.4)
    found = make_objective("kto", beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    assert torch.equal(found.losses(x), singles.kto(0.2, 1.5, 0.5).losses(x))
    assert found.shift_is == "kl" and make_objective("bco").shift_is == "mean_reward"
    with pytest.raises(ValueError, match=r"desirable_weight=2.0 means nothing to loss_type 'bco'"):
        make_objective("bco", desirable_weight=2.0)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired", "bco"])
def test_through_the_head(name):
    """The loss from hidden states, its weights included, and its gradients."""
    lengths = torch.tensor([2, 1, 3, 2])
    bounds_S1 = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    h_ND = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    w_VD = torch.randn(17, 6, dtype=torch.float64, requires_grad=True)
    target_N, x = torch.randint(17, (8,)), some_singles(4, 5.0, shift=0.3)
    objective, weight_P = getattr(singles, name)(0.2), torch.rand(4).double()

    def loss(h_ND, w_VD):
        return linear_preference_loss(
            h_ND, w_VD, target_N, bounds_S1, x.ref_logp_S, objective, desirable_P=x.desirable_P,
            firsts_P1=range(5), weight_P=weight_P, shift=x.shift, num_pairs=10,
        ).loss  # fmt: skip

    logp_S = reference.sequence_sums(reference.linear_logp(h_ND, w_VD, target_N), bounds_S1)
    wanted = (objective.losses(replace(x, logp_S=logp_S)) * weight_P).sum() / 10
    torch.testing.assert_close(loss(h_ND, w_VD), wanted, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(loss, (h_ND, w_VD))
