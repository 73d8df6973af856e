"""The op on lists, single responses, pairs with a third sequence, and weighted or coupled pairs.

The oracle materializes logits in fp64 and gives the objective its numbers; how an objective itself
is right is tested elsewhere.  Legend as in `test_ops`; P examples.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import cycle, pairwise
from typing import Any

import pytest
import torch
from checks import (
    BETA,
    Problem,
    grad,
    make_problem,
    preference,
    relative_error,
    workspace_for,
)
from interpreter import needs_kernels
from torch import Tensor

from fastdpo import LinearPreferenceLoss, reference
from fastdpo.loss import objectives as of
from fastdpo.loss.blocks import Stash
from fastdpo.loss.choices import CHOICES
from fastdpo.loss.examples import BaseObjective, Examples
from fastdpo.loss.lists import lipo_lambda, plackett_luce
from fastdpo.loss.plan import Plan
from fastdpo.loss.reference import IGNORE
from fastdpo.loss.singles import kto

U = 2.0**-24  # rounding of fp32
IMPLS = ["torch", pytest.param("triton", marks=needs_kernels)]
PAIRS = (4, 3, 9, 8, 2, 3, 5, 5)
LISTS = (4, 3, 5, 2, 6, 3, 3, 2, 2, 7, 2)


@dataclass
class Case:
    """An objective, tokens of its sequences, and what the op is told of its examples."""

    objective: BaseObjective
    sizes: tuple[int, ...] = PAIRS
    firsts: tuple[int, ...] = (0, 2, 4, 6, 8)
    given: dict[str, Any] = field(default_factory=dict)
    routes: tuple[str, ...] = ("stash", "grouped", "long", "frozen", "forward")

    @property
    def count(self) -> int:
        return len(self.firsts) - 1

    def problem(self, dtype: torch.dtype) -> Problem:
        p = make_problem(self.sizes, 8, 101, dtype=dtype, masked=True, bias=True, softcap=10.0)
        options = {"weight_P": torch.rand(self.count).double() + 0.5, "num_pairs": 7.0}
        p.extra = {**options, "firsts_P1": self.firsts, **self.given}
        if not self.objective.needs_reference:
            p.extra["ref_logp_S"] = None
        return p


SCORES = torch.tensor([3.0, 1.0, 0.0, 0.5, 2.0, 2.5, 2.0, 2.0, 1.0, 0.0, 0.5])
DESIRABLE = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0])
SINGLES = tuple(range(9))
CASES = {
    "lists": Case(lipo_lambda(BETA, 0.02), LISTS, (0, 3, 7, 9, 11), {"scores_S": SCORES}),
    "singles": Case(kto(BETA), PAIRS, SINGLES, {"desirable_P": DESIRABLE, "shift": 0.4}),
    # ORPO's third sequence; the second pair has a prompt of one token and so none.
    "triples": Case(of.orpo(BETA), (4, 3, 5, 9, 8, 2, 3, 4, 5, 5, 6), (0, 3, 5, 8, 11)),
    "coupled": Case(of.aot(BETA), routes=("stash", "long", "frozen", "forward")),
    "known slopes": Case(of.given_slopes(of.aot(BETA)), given={"scores_S": torch.randn(8)}),
    "no reference": Case(of.simpo(BETA)),
    "mean length": Case(of.cpo(BETA)),
    "tails, one slope": Case(of.lr_dpo(BETA, 0.02, ld_alpha=0.3)),
    "tails, two slopes": Case(of.nca_pair(BETA, ld_alpha=0.3)),
    "own responses": Case(of.lr_dpo(BETA, use_weighting=True)),
    "own responses, tails": Case(of.length_normalized_dpo(BETA, ld_alpha=0.3, use_weighting=True)),
}
# "long": an example is longer than the workspace, so that it has a unit gradient or recomputes.
UNITS = ("singles", "known slopes", "no reference", "mean length", "tails", "own responses")
LONG = {name: "unit" if name.startswith(UNITS) else "recompute" for name in CASES}
WAYS = [(name, route) for name, case in CASES.items() for route in (*case.routes, "recompute")]
WAYS = [x for x in WAYS if x[1] != "recompute" or LONG[x[0]] != "recompute"]  # which "long" is
# The interpreter is slow: what the routes have in common it runs for two of the cases.
# The kernels are interpreted, which is slow: each case by one route, two of them by all.
KERNEL_ROUTES = dict(zip(CASES, cycle(("stash", "long", "grouped"))))
GRID = [("torch", *x) for x in WAYS]
GRID += [
    pytest.param("triton", name, route, marks=needs_kernels)
    for name, route in WAYS
    if route == KERNEL_ROUTES[name] or name in ("lists", "tails, one slope")
]


def wanted_by(route: str) -> str:
    return {"forward": "", "frozen": "h"}.get(route, "h w bias")


# What `Plan` must look like for each way.
PLANS: dict[str, Callable[[Plan], bool]] = {
    "stash": lambda plan: plan.route == "stash",
    "grouped": lambda plan: plan.route == "grouped" and not any(g.unit for g in plan.groups),
    "unit": lambda plan: plan.route == "grouped" and {g.unit for g in plan.groups} == {True, False},
    "recompute": lambda plan: plan.route == "recompute" and len(list(plan.spans)) > 2,
    "frozen": lambda plan: plan.route == "frozen" and len(list(plan.spans)) > 2,
    "forward": lambda plan: plan.route == "forward" and len(list(plan.spans)) > 2,
}


def workspace(case: Case, p: Problem, route: str, impl: str) -> float:
    """In MiB; a plan with it is that of the route."""
    sides = 1 if case.objective.by_margin or case.firsts == SINGLES else 2
    return workspace_for(
        p,
        PLANS[route],
        sides,
        firsts=case.firsts,
        splits=not case.objective.couples,
        need_head="w" in wanted_by(route),
        need_h=route != "forward",
        fused_itemsize=4 if impl == "triton" else None,
    )


def numbers_of(case: Case, p: Problem) -> Examples:
    """What the objective must be given, from the definition and with a graph."""
    logp_N = reference.linear_logp(p.h_TD, p.w_VD, p.target_N, **p.head)
    z_NV = reference.linear_logits(p.h_TD.detach(), p.w_VD.detach(), **p.head).detach()
    scored_N = p.target_N != IGNORE
    squares_N = reference.token_stats(z_NV, p.target_N)["log_sum_sq_probs"]
    parts = [scored_N[a:b].nonzero()[:, 0] + a for a, b in pairwise(p.bounds_S1.tolist())]
    lengths_S = torch.tensor([float(len(part)) for part in parts], dtype=torch.float64)
    weights = [torch.ones(len(part), dtype=torch.float64) for part in parts]
    if case.objective.ld_alpha is not None:
        for first in case.firsts[:-1]:
            shared = min(len(parts[first]), len(parts[first + 1]))
            for weight in weights[first : first + 2]:
                weight[shared:] = case.objective.ld_alpha
    mean = [sum(len(parts[s]) for s in (a, *range(a + 2, b))) for a, b in pairwise(case.firsts)]
    given: Any = {k: v.double() if isinstance(v, Tensor) else v for k, v in case.given.items()}
    neutral = torch.zeros(case.count, dtype=torch.float64)
    return Examples(
        torch.stack([(logp_N[i] * w).sum() for i, w in zip(parts, weights)]),
        p.ref_logp_S.double() * case.objective.needs_reference,
        lengths_S,
        case.firsts,
        neutral,
        neutral,
        alignment_S=torch.stack([(logp_N.detach() - squares_N)[i].mean() for i in parts]),
        mean_chosen_length=sum(mean) / len(mean),
        **given,
    )


def oracle(case: Case, p: Problem, wanted: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, sums and gradients in fp64."""
    q = p.to(torch.float64).leaves(wanted)
    x = numbers_of(case, q)
    loss = (case.objective.losses(x) * p.extra["weight_P"]).sum() / p.extra["num_pairs"]
    if wanted:
        loss.backward()
    return loss.detach(), x.logp_S.detach(), q.grads()


def run(case: Case, p: Problem, route: str, impl: str, **options: Any) -> tuple[Any, dict]:
    """The op by a route, and its gradients."""
    way = LONG_ROUTES.get(route, lambda _: route)(case)
    q = p.leaves(wanted_by(route))
    mib = workspace(case, p, way, impl)
    result = preference(q, case.objective, workspace_mib=mib, impl=impl, **options)
    assert PLANS[way](result.plan), f"took {result.plan}"
    if wanted_by(route):
        result.loss.backward()
    return result, q.grads()


LONG_ROUTES: dict[str, Callable[[Case], str]] = {
    "long": lambda case: next(LONG[name] for name, x in CASES.items() if x is case)
}


@pytest.mark.parametrize(("impl", "name", "route"), GRID)
def test_every_route_against_the_oracle(impl, name, route):
    """PyTorch in fp64 to its rounding; the kernels in fp32 as near as PyTorch in fp32."""
    case = CASES[name]
    dtype = torch.float64 if impl == "torch" else torch.float32
    p = case.problem(dtype)
    loss, logp_S, gold = oracle(case, p, wanted_by(route))
    found, grads = run(case, p, route, impl)
    assert grads.keys() == gold.keys()
    if impl == "torch":
        torch.testing.assert_close(found.loss.detach(), loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.logp_S, logp_S, rtol=1e-12, atol=1e-12)
        assert all(relative_error(x, gold[key]) <= 1e-11 for key, x in grads.items())
        return
    eager, eager_grads = run(case, p, route, "torch")
    assert (found.logp_S - logp_S).abs().max() <= 2e-5 * max(case.sizes)
    allowed = max(2 * abs(float(eager.loss.detach() - loss)), 20 * U * abs(float(loss)))
    assert abs(float(found.loss.detach()) - float(loss)) <= allowed
    for key, x in grads.items():
        # An absolute error of a logit, at most 10, is a relative one of its probability.
        bound = max(1.5 * relative_error(eager_grads[key], gold[key]), 10 * 10 * U)
        assert relative_error(x, gold[key]) <= bound, key


@pytest.mark.parametrize("name", ["lists", "singles", "triples", "coupled", "tails, one slope"])
def test_gradcheck(name):
    """Through the head, by the route that a small workspace takes."""
    case = replace(CASES[name], sizes=tuple(1 + s % 2 for s in range(len(CASES[name].sizes))))
    p = make_problem(case.sizes, 2, 11, bias=True, softcap=5.0)
    p.extra = {"firsts_P1": case.firsts, **case.given}
    if not case.objective.needs_reference:
        p.extra["ref_logp_S"] = None
    q = p.leaves()

    leaves: Any = (q.h_TD, q.w_VD, q.bias_V)

    def op(h_TD, w_VD, bias_V):
        moved = replace(q, h_TD=h_TD, w_VD=w_VD, bias_V=bias_V)
        return preference(moved, case.objective, workspace_mib=0.002).loss

    assert torch.autograd.gradcheck(op, leaves)


OF_PAIRS = [
    name
    for name, choice in CHOICES.items()
    if (made := choice.build()).shape == "pairs" and not (made.needs_kl or made.needs_prompt)
]


@pytest.mark.parametrize("name", OF_PAIRS)
def test_gradcheck_of_every_loss_of_pairs(name):
    """With a pair longer than the workspace, and where pairs are coupled all of them at once."""
    objective = CHOICES[name].build()
    p = make_problem((2, 1, 4, 3), 2, 11, bias=True)
    p.extra = {"weight_P": torch.rand(2).double() + 0.5}
    if objective.needs_scores:
        p.extra["scores_S"] = torch.rand(4).double()
    if not objective.needs_reference:
        p.extra["ref_logp_S"] = None
    case = Case(objective, (), (0, 2, 4))
    route = "stash" if objective.couples else "unit"
    mib = workspace(case, p, route, "torch")
    q = p.leaves()
    leaves: Any = (q.h_TD, q.w_VD, q.bias_V)
    # Losses of squares are large where beta is small.
    size = max(1.0, abs(float(preference(p, objective).loss)))

    def op(h_TD, w_VD, bias_V):
        moved = replace(q, h_TD=h_TD, w_VD=w_VD, bias_V=bias_V)
        result = preference(moved, objective, workspace_mib=mib)
        assert PLANS[route](result.plan)
        return result.loss / size

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_groups_share_the_mean_length_of_the_call(impl):
    """A mean over the step's tokens is not that of the groups' means."""
    case = CASES["mean length"]
    p = case.problem(torch.float32)
    found = [run(case, p, route, impl)[0].loss for route in ("stash", "grouped")]
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
    apart = preference(p, case.objective, impl=impl, mean_chosen_length=2.0).loss
    assert not torch.isclose(found[0], apart)


@pytest.fixture
def stashes(monkeypatch):
    """Bytes of every stash allocated during a test."""
    monkeypatch.setattr(Stash, "_idle", [])
    taken = []
    take = Stash._take.__func__  # type: ignore[attr-defined]

    def measured(cls, numel, dtype, device):
        buffer = take(cls, numel, dtype, device)
        taken.append(buffer.numel() * buffer.element_size())
        return buffer

    monkeypatch.setattr(Stash, "_take", classmethod(measured))
    return taken


@pytest.mark.parametrize("name", ["lists", "singles", "triples", "coupled"])
@pytest.mark.parametrize("route", ["stash", "grouped", "long", "frozen"])
def test_stashes_stay_inside_the_workspace(stashes, name, route):
    if route not in CASES[name].routes:
        pytest.skip("a coupled objective has no groups")
    result, _ = run(CASES[name], CASES[name].problem(torch.float32), route, "torch")
    if result.plan.route == "recompute":
        assert not stashes
        return
    assert 0 < max(stashes) <= result.plan.workspace_bytes


# ----------------------------------------------------------------------- the same by another name
def test_pairs_are_the_same_with_and_without_their_bounds():
    p = make_problem(masked=True)
    plain, told = p.leaves(), p.leaves()
    for objective in (of.lr_dpo(BETA), of.nca_pair(BETA)):
        results = [
            preference(plain, objective),
            preference(told, objective, firsts_P1=(0, 2, 4, 6, 8)),
        ]
        for result in results:
            result.loss.backward()
        assert torch.equal(results[0].loss, results[1].loss)
        assert results[0].metrics == results[1].metrics and not results[0].counts
        assert torch.equal(grad(plain.w_VD), grad(told.w_VD))


def test_a_list_of_two_is_a_pair():
    """RankNet and Plackett-Luce of two responses are DPO, the better one first."""
    p = make_problem(masked=True)
    scores_S = torch.tensor([2.0, 1.0]).repeat(4)
    wanted = preference(p, of.lr_dpo(BETA))
    given = {"firsts_P1": (0, 2, 4, 6, 8), "scores_S": scores_S}
    found = preference(p, plackett_luce(BETA), **given)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-12, atol=0)
    assert found.metrics.keys() == wanted.metrics.keys()
    for name, value in wanted.metrics.items():
        torch.testing.assert_close(found.metrics[name], value)


def test_tails_of_sides_alike_weigh_nothing():
    """With ld_alpha 1 all tokens count, and with sides of like lengths whatever it is."""
    p = make_problem(masked=True)
    plain = preference(p, of.lr_dpo(BETA)).loss
    torch.testing.assert_close(preference(p, of.lr_dpo(BETA, ld_alpha=1.0)).loss, plain)
    even = make_problem([5, 5, 3, 3])
    wanted = preference(even, of.lr_dpo(BETA)).loss
    torch.testing.assert_close(preference(even, of.lr_dpo(BETA, ld_alpha=0.0)).loss, wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_policy_that_is_its_reference_has_no_margin_with_weighted_tails(impl):
    """To the bit, whether the reference is a head or sums of weighted tokens in fp64."""
    p = make_problem(masked=True, dtype=torch.float32)
    objective = of.lr_dpo(BETA, ld_alpha=0.3)
    head = {"ref_logp_S": None, "ref_h_TD": p.h_TD, "ref_w_VD": p.w_VD}
    found = preference(p.leaves(), objective, impl=impl, **head)
    assert found.logp_S.dtype == torch.float32 and torch.equal(found.logp_S, found.ref_logp_S)
    assert torch.equal(found.loss.detach(), torch.tensor(2.0).log())
    seen = preference(p, objective, impl=impl, ref_logp_S=p.ref_logp_S.double())
    again = preference(p.leaves(), objective, impl=impl, ref_logp_S=seen.logp_S)
    assert torch.equal(again.loss.detach(), torch.tensor(2.0).log())


@pytest.mark.parametrize("impl", IMPLS)
def test_log_probs_of_tokens_are_a_statistic(impl):
    p = make_problem(masked=True, dtype=torch.float32)
    for objective in (of.lr_dpo(BETA), of.lr_dpo(BETA, use_weighting=True)):
        result = preference(p.leaves(), objective, stats=("logp",), impl=impl)
        assert result.stats.keys() == {"logp"} and not result.stats["logp"].requires_grad
        wanted_N = reference.linear_logp(p.h_TD, p.w_VD, p.target_N)
        torch.testing.assert_close(result.stats["logp"], wanted_N, rtol=1e-5, atol=2e-5)


# --------------------------------------------------------------------------------------- metrics
def test_metrics_of_lists():
    """By hand: the best and the worst response of each list, and the ordered pairs of all."""
    case = CASES["lists"]
    p = case.problem(torch.float64)
    result = preference(p, case.objective)
    x = numbers_of(case, p)
    rewards, scores = (BETA * x.ratio_S).tolist(), SCORES.tolist()
    best, worst, right, ordered = [], [], 0, 0
    for a, b in pairwise(case.firsts):
        best.append(max(range(a, b), key=scores.__getitem__))
        worst.append(min(range(a, b), key=scores.__getitem__))
        for i in range(a, b):
            above = [j for j in range(a, b) if scores[i] > scores[j]]
            ordered += len(above)
            right += sum(rewards[i] > rewards[j] for j in above)
    assert ordered == 10 and 0 < right < ordered  # of 3 + 6 + 1 + 1 pairs less a tie
    count = case.count
    wanted = {
        "rewards/chosen": sum(rewards[i] for i in best) / count,
        "rewards/rejected": sum(rewards[i] for i in worst) / count,
        "rewards/accuracies": right / ordered,
        "rewards/margins": sum(rewards[i] - rewards[j] for i, j in zip(best, worst)) / count,
        "logps/chosen": float(x.logp_S[best].mean()),
        "logps/rejected": float(x.logp_S[worst].mean()),
        "lengths/chosen": float(x.lengths_S[best].mean()),
        "lengths/rejected": float(x.lengths_S[worst].mean()),
        "length_margin": 0.02 * float((x.lengths_S[best] - x.lengths_S[worst]).mean()),
    }
    assert {k: float(v) for k, v in result.metrics.items()} == pytest.approx(wanted, rel=1e-6)
    assert {k: float(v) for k, v in result.counts.items()} == {"rewards/accuracies": ordered}


def test_metrics_of_singles_add_up_over_calls():
    """One call of both kinds is the counted mean of several, one without a desirable response."""
    case = CASES["singles"]
    p = case.problem(torch.float64)
    whole = preference(p, case.objective)
    kinds = (DESIRABLE == 1, DESIRABLE == 0)
    x = numbers_of(case, p)
    for side, kind in zip(("chosen", "rejected"), kinds):
        mean = BETA * x.ratio_S[kind].mean()
        assert float(whole.metrics[f"rewards/{side}"]) == pytest.approx(float(mean), rel=1e-6)
        assert float(whole.metrics[f"logps/{side}"]) == pytest.approx(float(x.logp_S[kind].mean()))
        assert whole.counts[f"rewards/{side}"] == kind.sum()
    # The second and the third response are undesirable.
    sums, counts = dict.fromkeys(whole.metrics, 0.0), dict.fromkeys(whole.metrics, 0.0)
    for s0, s1 in ((0, 1), (1, 3), (3, 8)):
        n0, n1 = p.bounds_S1[[s0, s1]].tolist()
        part = replace(
            p,
            h_TD=p.h_TD[n0:n1],
            target_N=p.target_N[n0:n1],
            bounds_S1=p.bounds_S1[s0 : s1 + 1] - n0,
            ref_logp_S=p.ref_logp_S[s0:s1],
            extra={"desirable_P": DESIRABLE[s0:s1], "shift": 0.4},
        )
        found = preference(part, case.objective)
        assert found.metrics.keys() == sums.keys()
        for name, value in found.metrics.items():
            sums[name] += float(value * found.counts[name])
            counts[name] += float(found.counts[name])
        if s0 == 1:
            assert found.counts["rewards/chosen"] == found.metrics["rewards/chosen"] == 0
    for name, value in whole.metrics.items():
        assert sums[name] / counts[name] == pytest.approx(float(value), rel=1e-6), name


# ---------------------------------------------------------------------------------------- modules
def test_a_module_of_lists_and_singles_in_rows():
    """TRL's padded layout of single responses, and rows that firsts_P1 makes lists."""
    S, L = 4, 6
    p = make_problem([L] * S, masked=True)
    h_SLD, target_SL = p.h_TD.view(S, L, -1), p.target_N.view(S, L)
    scores_S, desirable_P = torch.tensor([0.0, 3.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    calls = {
        "singles": (kto(BETA), {"desirable_P": desirable_P}, None),
        "lists": (plackett_luce(BETA), {"scores_S": scores_S, "firsts_P1": (0, 4)}, None),
        "pairs": (of.sppo(BETA), {"scores_S": scores_S / 3}, [0, 2, 1, 3]),
    }
    for objective, given, order in calls.values():
        found = LinearPreferenceLoss(objective, stats=("logp",))(
            h_SLD, p.w_VD, target_SL, ref_logp_S=p.ref_logp_S, **given
        )
        rows = list(range(S)) if order is None else order
        packed = {k: v[rows] if k == "scores_S" else v for k, v in given.items()}
        wanted = LinearPreferenceLoss(objective)(
            h_SLD[rows].flatten(0, 1),
            p.w_VD,
            target_SL[rows].flatten(),
            p.bounds_S1,
            p.ref_logp_S[rows],
            **packed,
        )
        torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.logp_S[rows], wanted.logp_S, rtol=1e-12, atol=1e-12)
        assert torch.equal(found.ref_logp_S, p.ref_logp_S)
        assert found.metrics.keys() == wanted.metrics.keys()
        assert found.stats["logp"].shape == (S, L)


# -------------------------------------------------------------------------------------- bad input
REFUSED = {
    "firsts end early": ("lists", {"firsts_P1": (0, 3, 7)}, "firsts_P1 must run from 0 to S=11"),
    "firsts start late": ("lists", {"firsts_P1": (1, 3, 11)}, "firsts_P1 must run from 0"),
    "firsts go back": ("lists", {"firsts_P1": (0, 7, 3, 11)}, "goes from 7 to 3 at 2"),
    "firsts are a tensor": ("lists", {"firsts_P1": torch.tensor([0, 11])}, "firsts_P1 must be a"),
    "firsts are floats": ("lists", {"firsts_P1": (0, 11.0)}, "firsts_P1 must be a tuple of int"),
    "firsts are flags": ("singles", {"firsts_P1": (False, True)}, "firsts_P1 must be a tuple"),
    "a list of one": ("lists", {"firsts_P1": (0, 1, 11)}, "gives example 0 1"),
    "a single of two": ("singles", {"firsts_P1": (0, 2, 8)}, "takes singles, of 1 sequences"),
    "a pair of three": ("no reference", {"firsts_P1": (0, 3, 5, 8)}, "gives example 0 3"),
    "a prompt pair of four": ("triples", {"firsts_P1": (0, 4, 11)}, "of 2 or 3 sequences"),
    "no scores": (
        "lists",
        {"scores_S": None},
        "scores_S is missing, which objective 'lipo_lambda'",
    ),
    "scores of pairs": ("no reference", {"scores_S": torch.rand(8)}, "scores_S is given, but"),
    "few scores": ("lists", {"scores_S": SCORES[:5]}, "scores_S must have S=11 entries, got 5"),
    "scores are no numbers": ("lists", {"scores_S": SCORES / 0}, r"scores_S\[0\] = inf"),
    "scores are integers": ("lists", {"scores_S": SCORES.long()}, "scores_S must be a float"),
    "no labels": ("singles", {"desirable_P": None}, "desirable_P is missing"),
    "labels beyond 1": ("singles", {"desirable_P": 2 * DESIRABLE}, r"desirable_P\[0\] = 2"),
    "half a label": (
        "singles",
        {"desirable_P": DESIRABLE / 2},
        r"desirable_P\[0\] = 0.5 must be 0",
    ),
    "labels of pairs": ("coupled", {"desirable_P": torch.ones(4)}, "desirable_P is given, but"),
    "a reference too many": ("no reference", {"ref_logp_S": torch.zeros(8)}, "needs no reference"),
    "a head too many": ("no reference", {"ref_h_TD": torch.zeros(39, 8)}, "ref_h_TD is given"),
    "a reference too few": ("singles", {"ref_logp_S": None}, "pass the reference either as"),
    "margins of lists": ("lists", {"margin_P": torch.ones(4)}, "margin_P and smoothing_P need"),
    "no shift": ("singles", {"shift": float("nan")}, "shift must be"),
    "no mean length": ("mean length", {"mean_chosen_length": 0.0}, "mean_chosen_length must be"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_bad_input_is_one_clear_error(fault):
    name, changed, message = REFUSED[fault]
    p = CASES[name].problem(torch.float64)
    with pytest.raises((TypeError, ValueError), match=message):
        preference(p, CASES[name].objective, **changed)


def test_an_empty_sequence_is_named():
    p = CASES["lists"].problem(torch.float64)
    p.target_N[int(p.bounds_S1[5]) : int(p.bounds_S1[6])] = IGNORE
    with pytest.raises(ValueError, match="sequence 5 of example 1 is empty"):
        preference(p, CASES["lists"].objective)
    p = replace(p, bounds_S1=torch.tensor([0, 5, 5, *p.bounds_S1[3:]]))
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        preference(p, CASES["lists"].objective)
