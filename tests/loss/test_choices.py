"""Objectives by name: losses that TRL has not, by hand; refusals; gradients through the head."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from checks import make_problem

from fastdpo import linear_logp, linear_preference_loss
from fastdpo.loss import objectives, reference
from fastdpo.loss.choices import CHOICES, make_objective
from fastdpo.loss.combined import Sum
from fastdpo.loss.examples import BaseObjective, Examples


def examples(
    logp: list[float], ref: list[float], lengths: list[int], firsts: tuple[int, ...], **more: Any
) -> Examples:
    P = len(firsts) - 1
    given = {"margin_P": [0.0] * P, "smoothing_P": [0.0] * P, **more}
    values: dict[str, Any] = {
        name: torch.tensor(x, dtype=torch.float64) if isinstance(x, list) else x
        for name, x in given.items()
    }
    logp_S, ref_S, lengths_S = (torch.tensor(x, dtype=torch.float64) for x in (logp, ref, lengths))
    return Examples(logp_S, ref_S, lengths_S, firsts, **values)


# Two pairs: c = -10 - -13 = 3, r = -8 - -9 = 1, and c = -5 - -4 = -1, r = -7 - -6.5 = -0.5.
TWO = ([-10.0, -8.0, -5.0, -7.0], [-13.0, -9.0, -4.0, -6.5], [4, 2, 5, 10], (0, 2, 4))
LOG = math.log


def sp(x: float) -> float:
    return LOG(1 + math.exp(x))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


BY_HAND: dict[str, tuple[dict[str, Any], dict[str, Any], list[float]]] = {
    # z = beta d: 0.5 * 2 = 1 and 0.5 * -0.5 = -0.25.
    "cdpo": (
        {"loss_type": "cdpo", "beta": 0.5, "label_smoothing": 0.1}, {},
        [0.9 * sp(-1) + 0.1 * sp(1), 0.9 * sp(0.25) + 0.1 * sp(-0.25)],
    ),
    # CREAM: a consistency of 0.75 is a smoothing of 0.25.
    "cream": (
        {"loss_type": "sigmoid", "beta": 0.5}, {"smoothing_P": [0.25, 0.0]},
        [0.75 * sp(-1) + 0.25 * sp(1), sp(0.25)],
    ),
    # Two flips: 0.1 * 0.8 + 0.9 * 0.2 = 0.26.
    "robust": (
        {"loss_type": "robust", "beta": 0.5, "label_smoothing": 0.1}, {"smoothing_P": [0.2, 0.0]},
        [
            (0.74 * sp(-1) - 0.26 * sp(1)) / 0.48,
            (0.9 * sp(0.25) - 0.1 * sp(-0.25)) / 0.8,
        ],
    ),
    # alpha (nw - nl): 0.1 * 2 and 0.1 * -5; then the margins.
    "length and margin": (
        {"loss_type": "exo_pair", "beta": 0.5, "alpha": 0.1, "label_smoothing": 0.5},
        {"margin_P": [0.3, -0.2]},
        [
            sigma(z) * LOG(sigma(z) / 0.5) + sigma(-z) * LOG(sigma(-z) / 0.5)
            for z in (1 + 0.2 + 0.3, -0.25 - 0.5 - 0.2)
        ],
    ),
    "secrets": ({"beta": 0.5}, {"margin_P": [-0.4, 0.0]}, [sp(-0.6), sp(0.25)]),
    # Scaled by 0.5: c = -10 + 6.5 = -3.5, r = -8 + 4.5 = -3.5; c = -3, r = -3.75.
    "dpo_gamma": (
        {"loss_type": "sigmoid", "beta": 0.5, "reference_scale": 0.5}, {}, [sp(0), sp(-0.375)]
    ),
    "scaled sides": (
        {"loss_type": "bco_pair", "beta": 0.5, "reference_scale": 0.5}, {},
        [sp(1.75) + sp(-1.75), sp(1.5) + sp(-1.875)],
    ),
    # AIPO with alpha 0.5, gamma 0.4 and lambda 0.2: c = -10 + 19.5, r = -8 + 13.5; c = 1, r = 2.75.
    "aipo": (
        {
            "loss_type": ["sigmoid", "nll_mean"], "loss_weights": [1.0, 0.2], "beta": 0.5,
            "reference_scale": 1.5, "target_margin": 0.5 * 0.4,
        },
        {}, [sp(-0.5 * (4 - 0.4)) + 0.2 * 2.5, sp(0.5 * (1.75 + 0.4)) + 0.2 * 1],
    ),
    "rpo, cumulative": (
        {"loss_type": ["sigmoid", "nll_sum"], "loss_weights": [1.0, 0.01], "beta": 0.5}, {},
        [sp(-1) + 0.1, sp(0.25) + 0.05],
    ),
    # Over the step: responses of 4 and 5 tokens have 4.5 on the mean, unless the step says other.
    "rpo, by tokens": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.9], "beta": 0.5}, {},
        [sp(-1) + 0.9 * 10 / 4.5, sp(0.25) + 0.9 * 5 / 4.5],
    ),
    "of a step": ({"loss_type": "sft"}, {"mean_chosen_length": 8.0}, [10 / 8, 5 / 8]),
    "simpo": (
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.3}, {},
        [sp(-(2 * (-2.5 + 4) - 0.3)), sp(-(2 * (-1 + 0.7) - 0.3))],
    ),
    "simpo, length": (
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.3, "alpha": 0.01}, {},
        [sp(-(3 - 0.3 + 0.02)), sp(-(-0.6 - 0.3 - 0.05))],
    ),
    # log odds ratio of means: -2.5 and -4, -1 and -0.7; the prompt has no tokens of its own.
    "orpo": (
        {"loss_type": "orpo", "beta": 0.2}, {},
        [
            nll / 4.5 + 0.2 * sp(-((w - r) - (LOG(1 - math.exp(w)) - LOG(1 - math.exp(r)))))
            for nll, w, r in ((10, -2.5, -4), (5, -1, -0.7))
        ],
    ),
    # Against the policy the first wins with 0.75 and the second with 0.4.
    "sppo": (
        {"loss_type": "sppo", "beta": 0.5}, {"scores_S": [0.75, 0.4, 0.5, 1.0]},
        [((3 - 0.5) ** 2 + (1 + 0.2) ** 2) / 2, ((-1 - 0) ** 2 + (-0.5 - 1) ** 2) / 2],
    ),
    "preference_score": (
        {"loss_type": "preference_score", "beta": 0.5}, {"scores_S": [2.0, -1.0, 0.0, 0.5]},
        [((3 - 4) ** 2 + (1 + 2) ** 2) / 2, (1 + (-0.5 - 1) ** 2) / 2],
    ),
    "wpo": (
        {"loss_type": "sigmoid", "beta": 0.5, "use_weighting": True},
        {"alignment_S": [-0.1, -0.2, 0.0, -1.0]},
        [math.exp(-0.3) * sp(-1), math.exp(-1) * sp(0.25)],
    ),
    # f' = 1 - 1/t: 1 - e^-3 and 1 - e^-1; 1 - e and 1 - e^0.5.
    "f and length": (
        {"loss_type": "sigmoid", "beta": 0.5, "f_divergence_type": "forward_kl", "alpha": 0.1}, {},
        [
            sp(-(0.5 * (math.exp(-1) - math.exp(-3)) + 0.2)),
            sp(-(0.5 * (math.exp(0.5) - math.exp(1)) - 0.5)),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_a_loss_by_hand(name):
    options, given, wanted = BY_HAND[name]
    found_P = make_objective(**options).losses(examples(*TWO, **given))
    assert found_P.tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_the_prompts_own_tokens_are_orpos():
    """Three tokens of -6 with the first pair; the second prompt has one token."""
    x = examples([-10.0, -8.0, -6.0, -5.0, -7.0], [0.0] * 5, [4, 2, 3, 5, 10], (0, 3, 5))
    plain = BY_HAND["orpo"][2]
    nll, mean = (16, 5), (4 + 3 + 5) / 2
    wanted = [y - a / 4.5 + b / mean for y, a, b in zip(plain, (10, 5), nll)]
    assert make_objective("orpo", beta=0.2).losses(x).tolist() == pytest.approx(wanted, rel=1e-12)
    # The other objectives of such a pair don't see the prompt.
    assert make_objective("simpo").losses(x).tolist() == pytest.approx(
        make_objective("simpo").losses(examples(*TWO)).tolist(), rel=1e-12
    )


def test_sorted_margins_by_hand():
    """The third policy margin is the smallest, and its loss is that of the smallest of the
    reference, which the first pair has.
    """
    x = examples(
        [-1.0, -2.0, -3.0, -6.0, -5.0, -4.0], [-1.0, 0.0, -2.0, -2.5, -3.0, -5.0], [1] * 6,
        (0, 2, 4, 6),
    )  # fmt: skip
    # lw - ll: 1, 3, -1; of the reference: -1, 0.5, 2
    found = make_objective("aot", beta=0.5).losses(x).tolist()
    assert found == pytest.approx([sp(-0.25), sp(-0.5), sp(0)], rel=1e-12)
    # c: 0, -1, -2; r: -2, -3.5, 1
    found = make_objective("aot_unpaired", beta=0.5, label_smoothing=0.2).losses(x).tolist()
    zs = [0.5 * (0 - 1), 0.5 * (-1 + 2), 0.5 * (-2 + 3.5)]
    assert found == pytest.approx([0.8 * sp(-z) + 0.2 * sp(z) for z in zs], rel=1e-12)
    assert make_objective(["sft", "aot"]).couples and not make_objective("sft").couples


# ----------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type must be of sigmoid, .*got 'dpo'"),
        ({"loss_type": []}, "loss_type must be"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "each of sigmoid, sft, got 1"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, -1]}, r"loss_weights\[1\].*-1"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 .*'sigmoid'.*cdpo"),
        ({"loss_type": "apo_zero", "alpha": 0.1}, "alpha=0.1 means nothing to .*'apo_zero'"),
        ({"loss_type": ["apo_zero", "sft"], "alpha": 0.1}, "'apo_zero', 'sft'"),
        ({"loss_type": "hinge", "discopop_tau": 0.1}, "discopop_tau=0.1"),
        ({"loss_type": "sft", "reference_scale": 0.5}, "reference_scale=0.5"),
        ({"loss_type": ["sigmoid", "sppo"], "reference_scale": 0.5}, "nothing to loss_type 'sppo'"),
        ({"loss_type": "cpo", "reference_scale": 0.5}, "reference_scale=0.5"),
        ({"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5}, "ld_alpha=0.5 .*'sft'"),
        ({"ld_alpha": 1.5}, "ld_alpha must be .*1.5"),
        ({"loss_type": ["sigmoid", "aot"], "use_weighting": True}, "use_weighting=True .*'aot'"),
        ({"loss_type": "nca_pair", "f_divergence_type": "forward_kl"}, "f_divergence_type='f"),
        ({"f_divergence_type": "kl"}, "f_divergence_type must be one of reverse_kl"),
        ({"f_alpha_divergence_coef": 0.7}, "needs f_divergence_type='alpha_divergence'"),
        ({"loss_type": "exo_pair", "label_smoothing": 1.0}, "exo_pair needs a label_smoothing < 1"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "robust needs a label_smoothing < 0.5"),
        ({"loss_type": "cdpo", "label_smoothing": 1.5}, "label_smoothing must be"),
        ({"loss_type": "cdpo"}, "cdpo needs a label_smoothing > 0.* loss_type sigmoid"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau must be"),
        ({"loss_type": "simpo", "cpo_alpha": -1.0}, "cpo_alpha must be"),
        ({"simpo_gamma": 0.7}, "simpo_gamma=0.7 .*use it with simpo"),
        ({"loss_type": ["sigmoid", "kto"]}, "differ in shape"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [0, 0.0]}, "all 0"),
        ({"loss_type": ["aot", "tdpo2"]}, "aot .* tdpo2 cannot be summed: one needs all pairs"),
        ({"loss_type": ["orpo", "sft"]}, "different means"),
        ({"beta": 0}, "beta must be"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_objective(**options)


def test_a_robust_pair_of_a_coin_is_refused():
    with pytest.raises(ValueError, match=r"smoothing_P\[1\] = 0.5"):
        make_objective("robust").losses(examples(*TWO, smoothing_P=[0.4, 0.5]))


def test_exo_pair_takes_the_smoothing_of_each_pair():
    objective = make_objective("exo_pair", beta=0.5, alpha=0.02)
    found = objective.losses(examples(*TWO, smoothing_P=[0.1, 0.3])).tolist()
    for i, eps in enumerate([0.1, 0.3]):
        alike = make_objective("exo_pair", beta=0.5, alpha=0.02, label_smoothing=eps)
        assert found[i] == pytest.approx(alike.losses(examples(*TWO)).tolist()[i], rel=1e-12)
    for eps, wrong in ((0.0, "0.0"), (1.0, "1.0")):
        with pytest.raises(ValueError, match=rf"smoothing_P\[1\] = {wrong} must be > 0 and < 1"):
            objective.losses(examples(*TWO, smoothing_P=[0.4, eps]))
    both = make_objective(["exo_pair", "robust"], beta=0.5)
    assert (both.smoothing_above, both.smoothing_below) == (0.0, 0.5)
    assert make_objective("exo_pair", label_smoothing=0.1).smoothing_above is None


@pytest.mark.parametrize("given", [None, [0.0, 0.2]])
def test_the_op_refuses_an_exo_pair_without_smoothing(given):
    p = make_problem((3, 2, 1, 2), 3, 11)
    smoothing_P = None if given is None else torch.tensor(given).double()
    with pytest.raises(ValueError, match=r"smoothing_P.* (needs a label_smoothing|must be) > 0"):
        linear_preference_loss(
            p.h_TD, p.w_VD, p.target_N, p.bounds_S1, p.ref_logp_S, make_objective("exo_pair"),
            smoothing_P=smoothing_P,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["alpha", "label_smoothing", "target_margin"])
def test_a_loss_of_two_sides_has_no_margin(name):
    with pytest.raises(ValueError, match=f"{name}=0.1 means nothing to bco_pair"):
        replace(objectives.bco_pair(), **{name: 0.1})


def test_scores_that_a_loss_cannot_have():
    sppo = make_objective("sppo")
    assert "score_chosen" in str(sppo.problem(None))
    assert re.search("between 0 and 1.*1.3; transform=win_rate", str(sppo.problem([0.2, 1.3])))
    assert sppo.problem([0.2, 1.0]) is None
    assert make_objective("preference_score").problem([-3.0, 7.0]) is None
    assert "between 0 and 1" in str(make_objective(["sigmoid", "sppo"]).problem([2.0, 1.0]))


# ---------------------------------------------------------------------- what they say of themselves
def test_a_sum_says_what_its_parts_say():
    both = make_objective(["sigmoid", "hinge"], [0.5, 2.0], alpha=0.01)
    assert both.by_margin and both.takes_margin and both.alpha == 0.01 and both.beta == 0.1
    assert not make_objective(["sigmoid", "ipo"]).by_margin  # of different signs
    assert make_objective(["ipo", "sigmoid_norm"]).length_normalized
    rpo = make_objective(["sigmoid", "sft"])
    assert rpo.needs_reference and rpo.needs_mean_length and not rpo.by_margin
    cpo = make_objective("cpo")
    assert not cpo.needs_reference and isinstance(cpo, Sum) and cpo.weights == (1.0, 1.0)
    assert make_objective("cpo", cpo_alpha=0.0).code is not None
    assert make_objective("sigmoid", use_weighting=True).needs_alignment
    assert make_objective(["hinge", "ipo"], ld_alpha=0.2).ld_alpha == 0.2
    assert make_objective("orpo").needs_prompt
    assert make_objective("sigmoid", [2.0]).losses(examples(*TWO)).tolist() == pytest.approx(
        [2 * y for y in make_objective().losses(examples(*TWO)).tolist()]
    )


def test_a_part_of_weight_0_needs_nothing():
    sigmoid = make_objective()
    parts = ["sigmoid", "sppo", "tdpo2", "kto", "aot"]
    assert make_objective(parts, [1.0, 0.0, 0.0, 0.0, 0.0]) == sigmoid
    assert make_objective(["sigmoid", "sft"], [0.0, 2.0]).needs_reference is False


def test_rewards_of_a_sum_are_means_if_all_are():
    """As TRL's of CPO-SimPO, whose likelihood has no rewards."""
    assert make_objective("simpo", cpo_alpha=0.5).mean_rewards
    assert not make_objective(["sigmoid", "orpo"]).mean_rewards
    assert not make_objective("sft").mean_rewards and not make_objective("cpo").mean_rewards


def test_a_forward_kl_stays_finite():
    x = examples([-1e3, -2e3, -9e3, -1e4], [0.0] * 4, [4, 2, 5, 10], (0, 2, 4))
    for name in ("sigmoid", "hinge"):
        leaf_S = x.logp_S.clone().requires_grad_()
        loss_P = make_objective(name, f_divergence_type="forward_kl").losses(
            replace(x, logp_S=leaf_S)
        )
        assert loss_P.tolist() == [LOG(2) if name == "sigmoid" else 1.0] * 2
        loss_P.sum().backward()
        assert leaf_S.grad is not None and not leaf_S.grad.any()


def test_given_slopes_have_the_gradients_of_what_they_are_of():
    objective = make_objective(["aot", "sft"], [1.0, 0.3], label_smoothing=0.1)
    x = examples(*TWO)
    leaf_S = x.logp_S.clone().requires_grad_()
    (slope_S,) = torch.autograd.grad(objective.losses(replace(x, logp_S=leaf_S)).sum(), leaf_S)
    known = objectives.given_slopes(objective)
    x = replace(x, logp_S=leaf_S, scores_S=slope_S)
    (again_S,) = torch.autograd.grad(known.losses(x).sum(), leaf_S)
    assert torch.equal(again_S, slope_S)
    assert not known.couples and known.beta == objective.beta and known.needs_reference


# --------------------------------------------------------------------------------- through the head
@pytest.mark.parametrize("sure", [0, 2])
def test_orpo_of_a_response_without_doubt(sure):
    """Its tokens have probability 1 in fp32, so that nothing is left for others."""
    h_ND = torch.zeros(6, 4)
    h_ND[sure : sure + 2, 0] = 1e4
    h_ND.requires_grad_()
    w_VD = torch.eye(4)
    result = linear_preference_loss(
        h_ND, w_VD, torch.zeros(6, dtype=torch.int64), torch.tensor([0, 2, 4, 6]), None,
        make_objective("orpo"), firsts_P1=(0, 3),
    )  # fmt: skip
    assert result.logp_S[sure // 2] == 0 and result.loss.isfinite()
    result.loss.backward()
    assert h_ND.grad is not None and h_ND.grad.isfinite().all() and h_ND.grad.any()


@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo", "sft"])
def test_sums_without_a_reference_are_of_fp64(name):
    """As with one, whose dtype they have."""
    p, given = problem_of(make_objective(name))
    h, w, target_N = p.h_TD.float(), p.w_VD.float(), p.target_N
    result = linear_preference_loss(
        h, w, target_N, p.bounds_S1, None, make_objective(name), **given
    )
    logp_N = linear_logp(h, w, target_N)
    assert torch.equal(result.logp_S, reference.sequence_sums(logp_N.double(), p.bounds_S1))


# Of both models' logits test_tdpo has its own.
BUILT = {name: choice.build() for name, choice in CHOICES.items()}
PAIR_NAMES = [name for name, x in BUILT.items() if x.shape == "pairs" and not x.needs_kl]
LEAST = {
    "exo_pair": {"label_smoothing": 0.01}, "robust": {"label_smoothing": 0.1},
    "cdpo": {"label_smoothing": 0.1},
}  # fmt: skip
THROUGH: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name, **LEAST.get(name, {})} for name in PAIR_NAMES},
    "cpo-simpo": {"loss_type": "simpo", "cpo_alpha": 0.5, "label_smoothing": 0.1},
    "sum": {"loss_type": ["sigmoid", "hinge"], "alpha": 0.05},
    "rpo": {"loss_type": ["sigmoid", "sft"]},
    "alpha_divergence": {"loss_type": "ipo", "f_divergence_type": "alpha_divergence"},
    "ld": {"loss_type": "apo_down", "ld_alpha": 0.3, "reference_scale": 1.2},
}


def problem_of(objective: BaseObjective) -> tuple[Any, dict[str, Any]]:
    sizes = (3, 2, 1, 2, 4, 2) if objective.needs_prompt else (3, 2, 1, 2)
    p = make_problem(sizes, 3, 11, bias=True, softcap=5.0)
    S, step = len(sizes), 3 if objective.needs_prompt else 2
    given: dict[str, Any] = {"firsts_P1": tuple(range(0, S + 1, step))}
    if objective.needs_scores:
        given["scores_S"] = torch.rand(S).double()
    if objective.takes_margin:
        given["margin_P"] = torch.randn(S // step).double()
        given["smoothing_P"] = torch.rand(S // step).double() / 4
    return p, given


@pytest.mark.parametrize("name", THROUGH)
def test_gradcheck_through_the_head(name):
    """In fp64, whole and by a workspace of a row or two."""
    objective = make_objective(beta=0.3, **THROUGH[name])
    p, given = problem_of(objective)
    ref_S = p.ref_logp_S if objective.needs_reference else None
    leaves = p.leaves()
    tensors: tuple[Any, ...] = (leaves.h_TD, leaves.w_VD, leaves.bias_V)
    for workspace_mib in (None, 0.002):

        def op(h_TD, w_VD, bias_V, workspace_mib=workspace_mib):
            return linear_preference_loss(
                h_TD, w_VD, p.target_N, p.bounds_S1, ref_S, objective, bias_V=bias_V, softcap=5.0,
                workspace_mib=workspace_mib, **given,
            ).loss  # fmt: skip

        assert torch.autograd.gradcheck(op, tensors, fast_mode=True)


@pytest.mark.parametrize("workspace_mib", [None, 0.002])
@pytest.mark.parametrize("name", ["sigmoid", "nca_pair"])
def test_weights_of_wpo_through_the_head(name, workspace_mib):
    """They have no gradient, so that no difference quotient sees them."""
    objective = make_objective(name, beta=0.3, use_weighting=True)
    p = make_problem((3, 2, 1, 2), 3, 11, bias=True).leaves()
    found = linear_preference_loss(
        *p.packed, p.ref_logp_S, objective, bias_V=p.bias_V, workspace_mib=workspace_mib
    )
    logp_NV = reference.linear_logits(p.h_TD, p.w_VD, bias_V=p.bias_V).log_softmax(-1)
    logp_N = logp_NV.gather(1, p.target_N[:, None])[:, 0]
    gap_N = logp_N - logp_NV.exp().square().sum(-1).log()
    lengths_S = p.bounds_S1.diff().double()
    zeros_P = torch.zeros(2, dtype=torch.float64)
    x = Examples(
        reference.sequence_sums(logp_N, p.bounds_S1), p.ref_logp_S, lengths_S, (0, 2, 4), zeros_P,
        zeros_P, alignment_S=reference.sequence_sums(gap_N.detach(), p.bounds_S1) / lengths_S,
    )  # fmt: skip
    wanted = objective.losses(x).mean()
    leaves: Any = (p.h_TD, p.w_VD, p.bias_V)
    torch.testing.assert_close(found.loss, wanted, rtol=1e-12, atol=0)
    for got, gold in zip(*(torch.autograd.grad(y, leaves) for y in (found.loss, wanted))):
        torch.testing.assert_close(got, gold, rtol=1e-11, atol=1e-13)
