"""Every loss that TRL has against TRL's own trainers, executed on given log-probs and logits.

The trainers are made without their constructors, and the model they call returns what is given.
"""

import dataclasses
import os
from collections import defaultdict
from inspect import signature
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import PreferenceLoss, linear_preference_loss
from fastdpo.loss.choices import make_objective
from fastdpo.loss.examples import BaseObjective, Examples

trl = pytest.importorskip("trl")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402
from trl.trainer.dpo_config import DPOConfig  # noqa: E402

# A loss is a mean over the pairs of a batch, so that large ones would hide the others: each batch
# has log-ratios of one size.
SIZES = (1e-6, 1e-3, 0.1, 1.0, 5.0, 20.0, 80.0, 300.0, 1000.0, 4000.0)
VOCAB = 11
P, L = 100, 6  # pairs of a batch, tokens of the longest response
PAIRS = tuple(range(0, 2 * P + 1, 2))
ACCELERATOR = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


USED = (
    "beta", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing",
    "use_weighting",
)  # fmt: skip
DEFAULTS = {field.name: field.default for field in dataclasses.fields(DPOConfig)}


class Model(torch.nn.Module):
    is_gradient_checkpointing = False


def bare(trainer: Any, **attributes: Any) -> Any:
    """One of TRL's trainers that never saw a model or data."""
    made = object.__new__(trainer)
    made.__dict__.update(
        model=Model(),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        **attributes,
    )
    return made


def token_logps(size: float, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of tokens under policy and reference, (2P, L), and which of them there are.

    Sums differ by about ``size``; their parts are multiples of a power of two, so that no order of
    summation rounds.
    """
    generator = torch.Generator().manual_seed(seed)
    mask_SL = torch.arange(L) < torch.randint(1, L + 1, (2 * P, 1), generator=generator)
    step = 2.0 ** torch.tensor(size / 2**10).log2().round()

    def draw() -> Tensor:
        x_SL = torch.randn(2 * P, L, generator=generator, dtype=torch.float64) * size
        return torch.where(mask_SL, -((x_SL / step).round() * step).abs(), 0.0).to(dtype)

    return draw().requires_grad_(), draw(), mask_SL


def trl_loss(
    logp_SL: Tensor, ref_SL: Tensor, mask_SL: Tensor, squares_SL: Tensor, **options: Any
) -> Tensor:
    """The loss of ``trl.DPOTrainer``, whose batch has all chosen responses first."""
    names = (
        options["loss_type"] if isinstance(options["loss_type"], list) else [options["loss_type"]]
    )
    config = SimpleNamespace(**{**DEFAULTS, **options})
    trainer = bare(
        trl.DPOTrainer, args=config, loss_types=names, precompute_ref_logps=False,
        ref_model=lambda **_: SimpleNamespace(log_probs=ref_SL),
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        **{
            **{name: getattr(config, name) for name in USED},
            "loss_weights": config.loss_weights or [1.0] * len(names),
        },
    )  # fmt: skip
    order = [*range(0, 2 * P, 2), *range(1, 2 * P, 2)]
    logp_SL, ref_SL, mask_SL = logp_SL[order], ref_SL[order], mask_SL[order]
    outputs = SimpleNamespace(
        log_probs=logp_SL, entropy=mask_SL.double(), mean_logits=mask_SL.double(),
        is_top1=mask_SL, log_sum_sq_probs=squares_SL[order],
    )  # fmt: skip
    prompt_S1 = torch.zeros(2 * P, 1, dtype=torch.long)
    inputs = {
        "input_ids": torch.zeros(2 * P, L + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * P, L + 1, dtype=torch.long),
        "completion_mask": torch.cat([prompt_S1, mask_SL.long()], 1),
    }
    return trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False)


def ours(
    objective: BaseObjective, logp_SL: Tensor, ref_SL: Tensor, mask_SL: Tensor, squares_SL: Tensor
) -> Tensor:
    """The same from sums in fp64."""
    lengths_S = mask_SL.sum(1).double()
    weight_SL = mask_SL.double()
    if objective.ld_alpha is not None:
        shared_P = torch.minimum(*lengths_S.view(P, 2).unbind(1))
        tail_SL = torch.arange(L) >= shared_P.repeat_interleave(2)[:, None]
        weight_SL[tail_SL & mask_SL] = objective.ld_alpha
    logp_S = (logp_SL.double() * weight_SL).sum(1)
    zeros_P = torch.zeros(P, dtype=torch.float64)
    aligned_SL = ((logp_SL.detach() - squares_SL) * mask_SL).double()
    x = Examples(
        logp_S, (ref_SL.double() * weight_SL).sum(1), lengths_S, PAIRS, zeros_P, zeros_P,
        alignment_S=aligned_SL.sum(1) / lengths_S,
    )  # fmt: skip
    return objective.losses(x).mean()


PLAIN = """sigmoid hinge ipo nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero apo_down
discopop sft sigmoid_norm"""
CASES: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in PLAIN.split()},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    "exo_pair-0.375": {"loss_type": "exo_pair", "label_smoothing": 0.375, "beta": 0.5},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "robust-0.45": {"loss_type": "robust", "label_smoothing": 0.45, "beta": 0.02},
    "aot-smoothed": {"loss_type": "aot", "label_smoothing": 0.2},
    "aot_unpaired-smoothed": {"loss_type": "aot_unpaired", "label_smoothing": 0.2},
    "discopop-tau": {"loss_type": "discopop", "discopop_tau": 0.5},
    "hinge-beta": {"loss_type": "hinge", "beta": 0.7},
    "sppo_hard-beta": {"loss_type": "sppo_hard", "beta": 0.01},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "two-margins": {"loss_type": ["sigmoid", "hinge"]},
    "label-of-one": {"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1},
    "sorted-and-not": {"loss_type": ["aot", "ipo"], "loss_weights": [1.0, 0.5]},
    **{
        f"{kind}-{name}": {"loss_type": name, "f_divergence_type": kind, **more}
        for kind in ("forward_kl", "js_divergence")
        for name, more in {
            "sigmoid": {},
            "sigmoid_norm": {},
            "hinge": {},
            "ipo": {},
            "discopop": {},
            "exo_pair": {"label_smoothing": 0.01},
            "robust": {"label_smoothing": 0.1},
        }.items()
    },
    "forward_kl-rpo": {"loss_type": ["sigmoid", "sft"], "f_divergence_type": "forward_kl"},
    "ld_alpha": {"loss_type": "sigmoid", "ld_alpha": 0.3},
    "ld_alpha-norm": {"loss_type": ["ipo", "sigmoid_norm", "apo_down"], "ld_alpha": 0.0},
    "wpo": {"loss_type": "sigmoid", "use_weighting": True},
    "wpo-sum": {"loss_type": ["ipo", "nca_pair"], "use_weighting": True},
}


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_trls(name):
    """1,000 pairs, in fp64: losses and the slope of every token."""
    options, checked = CASES[name], 0
    # Beyond this TRL's exponentials overflow.
    largest = 300.0 if "discopop" in name else 4000.0
    if "forward_kl" in name:
        largest = 1.0 if "discopop" in name else 20.0
    for seed, size in enumerate(SIZES):
        if size > largest:
            continue
        batch = token_logps(size, torch.float64, seed)
        squares_SL = -2 * torch.rand(2 * P, L, dtype=torch.float64)
        wanted = trl_loss(*batch, squares_SL, **options)
        objective = make_objective(**options)
        found = ours(objective, *batch, squares_SL)
        (wanted_SL,) = torch.autograd.grad(wanted, batch[0])
        (found_SL,) = torch.autograd.grad(found, batch[0])
        mask_SL = batch[2]
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-12)
        # TRL's log of label_smoothing is of fp32.
        torch.testing.assert_close(found_SL[mask_SL], wanted_SL[mask_SL], rtol=1e-6, atol=1e-10)
        checked += P
    assert checked >= 400


@pytest.mark.parametrize("coef", [0.5, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_an_alpha_divergence_is_trls(loss, coef):
    """Which TRL computes in fp32 only."""
    options = {
        "loss_type": loss, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": coef,
    }  # fmt: skip
    for seed, size in enumerate((1e-3, 0.1, 1.0, 3.0)):
        batch = token_logps(size, torch.float32, seed)
        wanted = trl_loss(*batch, torch.zeros(2 * P, L), **options)
        found = ours(make_objective(**options), *batch, torch.zeros(2 * P, L))
        slopes = [torch.autograd.grad(loss, batch[0])[0][batch[2]] for loss in (found, wanted)]
        torch.testing.assert_close(found.float(), wanted, rtol=2e-5, atol=1e-6)
        largest = slopes[1].abs().max().item()
        torch.testing.assert_close(*slopes, rtol=1e-5, atol=2e-5 * largest + 2e-7)


def test_the_defaults_are_trls():
    defaults = {name: x.default for name, x in signature(make_objective).parameters.items()}
    for name in (*USED, "loss_weights", "discopop_tau"):
        assert DEFAULTS[name] == defaults[name], name
    cpo: dict[str, Any]
    cpo, orpo = (
        {x.name: x.default for x in dataclasses.fields(config)}
        for config in (CPOConfig, ORPOConfig)
    )
    assert cpo["simpo_gamma"] == defaults["simpo_gamma"]
    assert cpo["beta"] == orpo["beta"] == defaults["beta"]
    assert make_objective("cpo") == make_objective("cpo", cpo_alpha=cpo["cpo_alpha"])


# ------------------------------------------------------------------------------ CPO, SimPO and ORPO
def pair_batch(P: int, seed: int) -> tuple[dict[str, Tensor], list[tuple[int, int, int]]]:
    """Token ids of pairs as those trainers want them, and sizes of prompt and responses."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [tuple(torch.randint(1, 7, (3,), generator=generator).tolist()) for _ in range(P)]
    batch = {}
    for side, k in (("chosen", 1), ("rejected", 2)):
        longest = max(size[0] + size[k] for size in sizes)
        ids = torch.randint(VOCAB, (P, longest), generator=generator)
        mask = torch.arange(longest) < torch.tensor([[size[0] + size[k]] for size in sizes])
        scored = torch.arange(longest) >= torch.tensor([[size[0]] for size in sizes])
        if side == "rejected":
            for p, size in enumerate(sizes):
                ids[p, : size[0]] = batch["chosen_input_ids"][p, : size[0]]
        batch[f"{side}_input_ids"] = ids
        batch[f"{side}_attention_mask"] = mask.long()
        batch[f"{side}_labels"] = torch.where(mask & scored, ids, -100)
    return batch, sizes


def reference_free(
    objective: BaseObjective, logits: Tensor, ids: Tensor, sizes: list[tuple[int, int, int]]
) -> PreferenceLoss:
    """The op on the logits that TRL saw, (2P, T, V), chosen responses first; its head is the unit
    matrix.
    """
    P, (_, T, V) = len(sizes), logits.shape
    rows, lengths, firsts = [], [], [0]
    for p, (prompt, chosen, rejected) in enumerate(sizes):
        spans = [(p, prompt - 1, chosen), (p + P, prompt - 1, rejected)]
        if objective.needs_prompt and prompt > 1:
            spans.append((p, 0, prompt - 1))
        for row, start, length in spans:
            rows += range(row * T + start, row * T + start + length)
            lengths.append(length)
        firsts.append(len(lengths))
    rows_N = torch.tensor(rows)
    target_N = ids.reshape(-1)[rows_N + 1]
    return linear_preference_loss(
        logits.view(-1, V), torch.eye(V, dtype=logits.dtype), target_N,
        torch.tensor([0, *accumulate(lengths)]), None, objective, rows_N=rows_N, firsts_P1=firsts,
    )  # fmt: skip


OF_CPO = ("beta", "loss_type", "cpo_alpha", "simpo_gamma", "label_smoothing", "alpha")
REFERENCE_FREE = {
    "cpo": (CPOTrainer, CPOConfig, {"cpo_alpha": 1.0}, {"loss_type": "cpo"}),
    "cpo-smoothed": (
        CPOTrainer, CPOConfig, {"cpo_alpha": 0.0, "label_smoothing": 0.1},
        {"loss_type": "cpo", "cpo_alpha": 0.0, "label_smoothing": 0.1},
    ),
    "cpo-hinge": (
        CPOTrainer, CPOConfig, {"loss_type": "hinge", "cpo_alpha": 0.5},
        {"loss_type": ["hinge", "sft"], "loss_weights": [1.0, 0.5], "reference_scale": 0.0},
    ),
    "cpo-ipo": (
        CPOTrainer, CPOConfig, {"loss_type": "ipo", "cpo_alpha": 0.0},
        {"loss_type": "ipo", "reference_scale": 0.0},
    ),
    "simpo": (
        CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0},
        {"loss_type": "simpo", "beta": 2.0},
    ),
    "cpo-simpo": (
        CPOTrainer, CPOConfig,
        {"loss_type": "simpo", "cpo_alpha": 0.7, "simpo_gamma": 1.5, "label_smoothing": 0.2},
        {"loss_type": "simpo", "cpo_alpha": 0.7, "simpo_gamma": 1.5, "label_smoothing": 0.2},
    ),
    "orpo": (ORPOTrainer, ORPOConfig, {}, {"loss_type": "orpo"}),
    "orpo-beta": (ORPOTrainer, ORPOConfig, {"beta": 0.7}, {"loss_type": "orpo", "beta": 0.7}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_a_loss_without_a_reference_is_trls(name):
    trainer, config, theirs, options = REFERENCE_FREE[name]
    values = {**{field.name: field.default for field in dataclasses.fields(config)}, **theirs}
    for seed, scale in enumerate((1e-3, 1.0, 10.0, 60.0)):
        batch, sizes = pair_batch(20, seed)
        widths = [batch[f"{side}_input_ids"].shape[1] for side in ("chosen", "rejected")]
        logits = torch.randn(40, max(widths), VOCAB, dtype=torch.float64) * scale
        logits.requires_grad_()
        seen = []

        def model(ids, logits=logits, seen=seen, **_):
            seen.append(ids)
            return SimpleNamespace(logits=logits)

        made = bare(
            trainer, is_encoder_decoder=False, pad_token_id=0, padding_value=0,
            **{name: value for name, value in values.items() if name in OF_CPO},
        )  # fmt: skip
        wanted, metrics = made.get_batch_loss_metrics(model, batch)
        result = reference_free(make_objective(**options), logits, seen[0], sizes)
        found = result.loss
        slopes = [torch.autograd.grad(loss, logits)[0] for loss in (found, wanted)]
        # ORPO's odds are of fp32 in TRL.
        rtol = 1e-4 if name.startswith("orpo") else 1e-6
        torch.testing.assert_close(found, wanted.double(), rtol=rtol, atol=1e-7)
        torch.testing.assert_close(*slopes, rtol=rtol, atol=1e-7)
        for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
            assert float(result.metrics[key]) == pytest.approx(metrics[key], 1e-5, 1e-6), key
