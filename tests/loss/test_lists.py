"""Objectives of lists against plain formulas, written with loops, and against numbers by hand."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from fastdpo import linear_preference_loss
from fastdpo.loss import lists, objectives, reference
from fastdpo.loss.choices import make_objective
from fastdpo.loss.examples import Examples

BETA, ALPHA = 0.1, 0.02
OBJECTIVES = {
    "lipo_lambda": lists.lipo_lambda(BETA, ALPHA),
    "ranknet": lists.ranknet(BETA, ALPHA),
    "skip_ranknet": lists.skip_ranknet(BETA, ALPHA, max_skip=2),
    "plackett_luce": lists.plackett_luce(BETA, ALPHA),
    "pro": lists.pro(pro_sft_weight=0.05),
}


def some_lists(sizes, scores=None, spread=1.0) -> Any:
    S, P = sum(sizes), len(sizes)
    logp_S = -20 * torch.rand(S, dtype=torch.float64) - 1
    if scores is None:
        scores = [s / 8 for size in sizes for s in torch.randperm(size).tolist()]
    return Examples(
        logp_S=logp_S.requires_grad_(),
        ref_logp_S=logp_S.detach() + spread * torch.randn(S, dtype=torch.float64),
        lengths_S=torch.randint(1, 90, (S,)).double(),
        firsts=tuple(sum(sizes[:p]) for p in range(P + 1)),
        margin_P=torch.zeros(P, dtype=torch.float64),
        smoothing_P=torch.zeros(P, dtype=torch.float64),
        scores_S=torch.tensor(scores, dtype=torch.float64),
    )


def softplus(z):
    return torch.logaddexp(torch.zeros_like(z), z)


def plain(name, logp, ref, length, psi):
    """The loss of one list, response by response."""
    psi, n = psi.tolist(), len(psi)
    r = BETA * (logp - ref) + ALPHA * length
    order = sorted(range(n), key=lambda i: -psi[i])
    total = logp.sum() * 0
    if name == "lipo_lambda":
        tau = {i: 1 + k for k, i in enumerate(sorted(order, key=lambda i: -r[i].item()))}
        for i in range(n):
            for j in range(n):
                if psi[i] > psi[j]:
                    gain = abs((2 ** psi[i] - 1) - (2 ** psi[j] - 1))
                    discount = abs(1 / math.log(1 + tau[i]) - 1 / math.log(1 + tau[j]))
                    total = total + gain * discount * softplus(-(r[i] - r[j]))
    elif name in ("ranknet", "skip_ranknet"):
        for a in range(n):
            for b in range(a + 1, n if name == "ranknet" else min(n, a + 3)):
                i, j = order[a], order[b]
                p = 0.5 if psi[i] == psi[j] else 1.0
                total = total - p * (r[i] - r[j]) + softplus(r[i] - r[j])
    elif name == "plackett_luce":
        for k in range(n - 1):
            rest = torch.stack([r[i] for i in order[k:]])
            total = total - torch.log(torch.exp(r[order[k]]) / torch.exp(rest).sum())
    else:
        p = logp / length
        for k in range(n - 1):
            rest = [(psi[order[k]] - psi[i], i) for i in order[k + 1 :]]
            own = torch.exp(p[order[k]] * max(gap for gap, _ in rest))
            others = sum(torch.exp(p[i] * gap) for gap, i in rest)
            total = total - torch.log(own / (own + others))
        total = total + 0.05 * (n - 1) ** 2 * -logp[order[0]]
    return total


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_those_of_the_plain_formula(name):
    """Values and gradients of lists of 2 to 9 in one call, near and far from the reference."""
    for case in range(60):
        sizes = torch.randint(2, 10, (5,)).tolist()
        x = some_lists(sizes, spread=10.0 ** (case % 4 - 1))
        loss_P = OBJECTIVES[name].losses(x)
        wanted = [
            plain(name, *(v[a:b] for v in (x.logp_S, x.ref_logp_S, x.lengths_S, x.scores_S)))
            for a, b in pairwise(x.firsts)
        ]
        torch.testing.assert_close(loss_P, torch.stack(wanted), rtol=1e-10, atol=1e-12)
        weight_P = torch.rand(5, dtype=torch.float64)
        (found_S,) = torch.autograd.grad((weight_P * loss_P).sum(), x.logp_S, retain_graph=True)
        (wanted_S,) = torch.autograd.grad((weight_P * torch.stack(wanted)).sum(), x.logp_S)
        torch.testing.assert_close(found_S, wanted_S, rtol=1e-9, atol=1e-12)


def by_hand(objective, rewards, scores, lengths=None):
    """The loss of one list with these rewards, which are log-ratios at beta = 1."""
    x = some_lists([len(rewards)], scores)
    logp_S = torch.tensor(rewards, dtype=torch.float64)
    lengths_S = torch.tensor(lengths or [1.0] * len(rewards), dtype=torch.float64)
    x = replace(x, logp_S=logp_S, ref_logp_S=0 * logp_S, lengths_S=lengths_S)
    return objective.losses(x).item()


def test_values_by_hand():
    """Rewards log 4, log 2 and 0, in the order of the scores."""
    rewards = [math.log(4), math.log(2), 0.0]
    scores = [2.0, 1.0, 0.0]
    # exp(-(r_i - r_j)) is 1/2, 1/4 and 1/2.
    half, quarter = math.log(3 / 2), math.log(5 / 4)
    assert by_hand(lists.ranknet(1.0), rewards, scores) == pytest.approx(2 * half + quarter)
    assert by_hand(lists.skip_ranknet(1.0), rewards, scores) == pytest.approx(2 * half)
    # 4/7 of three, then 2/3 of two.
    found = by_hand(lists.plackett_luce(1.0), rewards, scores)
    assert found == pytest.approx(math.log(7 / 4) + math.log(3 / 2))
    # Gains 3, 1, 0; discounts 1/log 2, 1/log 3, 1/log 4.
    d = [1 / math.log(k) for k in (2, 3, 4)]
    wanted = 2 * (d[0] - d[1]) * half + 3 * (d[0] - d[2]) * quarter + (d[1] - d[2]) * half
    assert by_hand(lists.lipo_lambda(1.0), rewards, scores) == pytest.approx(wanted)
    # The wrong way round the policy ranks them 3, 2, 1, and exp(-(r_i - r_j)) is 2, 4 and 2.
    wanted = (2 * (d[1] - d[2]) + (d[0] - d[1])) * math.log(3) + 3 * (d[0] - d[2]) * math.log(5)
    assert by_hand(lists.lipo_lambda(1.0), rewards[::-1], scores) == pytest.approx(wanted)


def test_pro_by_hand():
    """Mean log-probs log 1/2 and log 1/4 of lengths 1 and 2, scores 3 and 2: T is 1."""
    logp = [math.log(1 / 2), 2 * math.log(1 / 4)]
    found = by_hand(lists.pro(1.0, 0.5), logp, [3.0, 2.0], [1.0, 2.0])
    assert found == pytest.approx(-math.log((1 / 2) / (1 / 2 + 1 / 4)) + 0.5 * math.log(2))
    # Scores 2 apart square what is compared: 1/4 against 1/16.
    found = by_hand(lists.pro(1.0, 0.0), logp, [3.0, 1.0], [1.0, 2.0])
    assert found == pytest.approx(-math.log((1 / 4) / (1 / 4 + 1 / 16)))


def test_a_list_of_two_is_dpo():
    x = some_lists([2] * 20, [1.0, 0.0] * 20, spread=100.0)
    dpo_P = objectives.lr_dpo(BETA, ALPHA).losses(x)
    for name in ("ranknet", "plackett_luce", "skip_ranknet"):
        torch.testing.assert_close(OBJECTIVES[name].losses(x), dpo_P, rtol=1e-12, atol=1e-14)
    # Delta is 1 where the gains 2^psi differ by the inverse of what the discounts differ by.
    psi = math.log2(1 + 1 / (1 / math.log(2) - 1 / math.log(3)))
    x = replace(x, scores_S=psi * x.scores_S)
    torch.testing.assert_close(OBJECTIVES["lipo_lambda"].losses(x), dpo_P, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_order_of_the_data_is_nothing(name):
    """Of lists and of the responses in them, the rewards of the start, all tied, included."""
    for spread in (3.0, 0.0):
        x = some_lists([4, 4, 4], spread=spread)
        if name == "lipo_lambda" and spread == 0.0:
            x = replace(x, lengths_S=torch.full((12,), 7.0, dtype=torch.float64))
        loss_P = OBJECTIVES[name].losses(x)
        order_P = torch.randperm(3)
        order_S = torch.cat([4 * p + torch.randperm(4) for p in order_P])
        fields = ("logp_S", "ref_logp_S", "lengths_S", "scores_S")
        shuffled = replace(x, **{f: getattr(x, f)[order_S] for f in fields})
        torch.testing.assert_close(
            OBJECTIVES[name].losses(shuffled), loss_P[order_P], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients(name):
    x = some_lists([2, 5, 3], spread=5.0)
    objective = OBJECTIVES[name]
    assert torch.autograd.gradcheck(
        lambda logp_S: objective.losses(replace(x, logp_S=logp_S)), x.logp_S
    )
    far = some_lists([2, 5, 3], spread=1e5)
    (grad_S,) = torch.autograd.grad(objective.losses(far).sum(), far.logp_S)
    assert grad_S.isfinite().all()


def test_at_the_start_each_pair_of_a_list_has_a_gradient():
    """All rewards are tied, and still no weight is 0."""
    x = replace(some_lists([4], [0.1, 0.9, 0.5, 0.3], spread=0.0))
    (grad_S,) = torch.autograd.grad(lists.lipo_lambda().losses(x).sum(), x.logp_S)
    assert (grad_S != 0).all()
    assert grad_S[1] < 0 < grad_S[0]


def test_ties():
    """lipo_lambda does not compare tied responses, ranknet draws them together, ranks need none."""
    x = some_lists([3], [1.0, 1.0, 0.0])
    pairs = [some_lists([2], [1.0, 0.0]) for _ in range(2)]
    for i, pair in enumerate(pairs):
        both = torch.tensor([i, 2])
        pairs[i] = replace(
            pair, logp_S=x.logp_S[both], ref_logp_S=x.ref_logp_S[both], lengths_S=x.lengths_S[both]
        )
    untied = sum(lists.ranknet().losses(pair) for pair in pairs)
    d = lists._softplus_of_minus(0.1 * (x.ratio_S[0] - x.ratio_S[1]))
    e = lists._softplus_of_minus(0.1 * (x.ratio_S[1] - x.ratio_S[0]))
    torch.testing.assert_close(lists.ranknet().losses(x), untied + (d + e) / 2)
    all_tied = replace(x, scores_S=torch.zeros_like(x.ratio_S))
    assert lists.lipo_lambda().losses(all_tied).item() == 0.0
    for name in ("pro", "plackett_luce", "skip_ranknet"):
        with pytest.raises(
            ValueError, match=f"list 0: {name} needs scores without ties, got the score 1 "
        ):
            OBJECTIVES[name].losses(x)


def test_refusals():
    short = some_lists([2, 1])
    for name, objective in OBJECTIVES.items():
        with pytest.raises(ValueError, match=f"list 1: {name} needs a list of at least 2 resp"):
            objective.losses(short)
        with pytest.raises(ValueError, match=f"{name} needs a score for each response"):
            objective.losses(replace(short, scores_S=None))
    with pytest.raises(ValueError, match=r"list 1: lipo_lambda has gains .* got 35: scale them"):
        lists.lipo_lambda().losses(some_lists([2, 2], [1.0, 0.0, 35.0, 1.0]))
    with pytest.raises(ValueError, match="max_skip must be >= 1, got 0"):
        lists.skip_ranknet(max_skip=0)
    with pytest.raises(TypeError, match="max_skip must be an integer, got float"):
        lists.skip_ranknet(max_skip=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pro_sft_weight must be a finite number >= 0, got -1"):
        lists.pro(pro_sft_weight=-1)


def test_by_name():
    """Options reach the objective that reads them, and are refused where none does."""
    x = some_lists([4, 3], spread=5.0)
    for name, options in {
        "lipo_lambda": {"alpha": ALPHA},
        "skip_ranknet": {"alpha": ALPHA, "max_skip": 2},
        "pro": {"pro_sft_weight": 0.05},
    }.items():
        found = make_objective(name, beta=BETA, **options)
        assert torch.equal(found.losses(x), OBJECTIVES[name].losses(x))
    both = make_objective(["ranknet", "pro"], [0.5, 2.0], beta=BETA, alpha=ALPHA)
    wanted = 0.5 * OBJECTIVES["ranknet"].losses(x) + 2 * OBJECTIVES["pro"].losses(x)
    torch.testing.assert_close(both.losses(x), wanted)
    with pytest.raises(ValueError, match=r"alpha=0.02 means nothing to loss_type 'pro'"):
        make_objective("pro", alpha=ALPHA)
    with pytest.raises(ValueError, match="cannot be summed: they differ in shape"):
        make_objective(["ranknet", "kto"])


def a_batch(sizes, D=6, V=17):
    """Hidden rows, a head, targets and bounds of lists; and the tokens that are scored."""
    lengths = torch.randint(1, 5, (sum(sizes),))
    bounds_S1 = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    N = int(bounds_S1[-1])
    h_ND = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    w_VD = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    return h_ND, w_VD, torch.randint(V, (N,)), bounds_S1


@pytest.mark.parametrize("workspace_mib", [None, 0.02])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_through_the_head(name, workspace_mib):
    """The loss from hidden states is that of the log-probs, and so are its gradients."""
    sizes = [3, 2, 4]
    h_ND, w_VD, target_N, bounds_S1 = a_batch(sizes)
    x = some_lists(sizes)
    objective = OBJECTIVES[name]
    ref_logp_S = x.ref_logp_S if objective.needs_reference else None

    def loss(h_ND, w_VD):
        return linear_preference_loss(
            h_ND, w_VD, target_N, bounds_S1, ref_logp_S, objective,
            firsts_P1=x.firsts, scores_S=x.scores_S, workspace_mib=workspace_mib,
        ).loss  # fmt: skip

    logp_S = reference.sequence_sums(reference.linear_logp(h_ND, w_VD, target_N), bounds_S1)
    x = replace(x, logp_S=logp_S, lengths_S=bounds_S1.diff().double())
    wanted = objective.losses(x).mean()
    found = loss(h_ND, w_VD)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    for leaf, want in zip((h_ND, w_VD), torch.autograd.grad(wanted, (h_ND, w_VD)), strict=True):
        (grad,) = torch.autograd.grad(loss(h_ND, w_VD), leaf)
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-12)
    if workspace_mib is None:
        assert torch.autograd.gradcheck(loss, (h_ND, w_VD))
