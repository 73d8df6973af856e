"""Log-probs with KL in one pass, and the objectives of them, against plain formulas in fp64."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from checks import grad, relative_error
from interpreter import needs_kernels
from torch import Tensor
from torch.nn import functional as F

from fastdpo import PreferenceLoss, linear_logp_kl, linear_preference_loss
from fastdpo.loss import reference
from fastdpo.loss.choices import make_objective
from fastdpo.loss.examples import Examples
from fastdpo.loss.objectives import lr_dpo
from fastdpo.loss.plan import Plan, make_plan
from fastdpo.loss.tokens import tdpo1, tdpo2

T, D, REF_D, V = 23, 24, 32, 301
IMPLS = ["torch", pytest.param("triton", marks=needs_kernels)]
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 20.0, "scale": 0.7},
    "negative": {"scale": -1.5},
}


def marked(cases: Iterable[tuple]) -> list[Any]:
    """Those whose first argument is "triton" need the interpreter, or a GPU."""
    return [pytest.param(*c, marks=needs_kernels if c[0] == "triton" else ()) for c in cases]


# -------------------------------------------------------------------------------------- objectives
def examples(P: int = 1000) -> Examples:
    """Pairs among which some are extreme."""
    S = 2 * P
    size_S = 10 ** (4 * torch.rand(S, dtype=torch.float64) - 1)
    ratio_S, ref_S = torch.randn(S, dtype=torch.float64) * size_S, -100 * torch.rand(S).double()
    return Examples(
        logp_S=(ref_S + ratio_S).requires_grad_(), ref_logp_S=ref_S,
        lengths_S=torch.randint(1, 500, (S,)).double(), firsts=tuple(range(0, S + 1, 2)),
        margin_P=torch.randn(P).double(), smoothing_P=torch.rand(P).double(),
        kl_S=(torch.rand(S, dtype=torch.float64) * size_S).requires_grad_(),
    )  # fmt: skip


def plain(x: Examples, beta: float, alpha: float, tdpo_alpha: float | None) -> Tensor:
    """The authors' logits, term by term, with our length penalty, margin and smoothing."""
    assert x.kl_S is not None
    losses = []
    for p in range(len(x.margin_P)):
        w, l = 2 * p, 2 * p + 1  # noqa: E741
        d = (x.logp_S[w] - x.ref_logp_S[w]) - (x.logp_S[l] - x.ref_logp_S[l])
        if tdpo_alpha is None:
            logit = d - (x.kl_S[l] - x.kl_S[w])
        else:
            logit = d - tdpo_alpha * (x.kl_S[l] - x.kl_S[w].detach())
        z = beta * logit + alpha * (x.lengths_S[w] - x.lengths_S[l]) + x.margin_P[p]
        eps = x.smoothing_P[p]
        losses.append(-(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z))
    return torch.stack(losses)


@pytest.mark.parametrize("tdpo_alpha", [None, 0.5, 1.7])
def test_objectives(tdpo_alpha):
    x = examples()
    objective = tdpo1(0.3, 0.02) if tdpo_alpha is None else tdpo2(0.3, 0.02, tdpo_alpha=tdpo_alpha)
    loss_P, wanted_P = objective.losses(x), plain(x, 0.3, 0.02, tdpo_alpha)
    torch.testing.assert_close(loss_P, wanted_P, rtol=1e-12, atol=1e-12)
    assert x.kl_S is not None
    leaves = [x.logp_S, x.kl_S]
    grads = torch.autograd.grad(loss_P.sum(), leaves, materialize_grads=True)
    wanted = torch.autograd.grad(wanted_P.sum(), leaves, materialize_grads=True)
    torch.testing.assert_close(grads, wanted, rtol=1e-12, atol=1e-14)
    # What routes rely on: beside a unit of log-prob each side's KL counts this much.
    shares_S = torch.tensor(objective.kl_shares, dtype=torch.float64).repeat(len(loss_P))
    torch.testing.assert_close(grads[1], shares_S * grads[0], rtol=1e-12, atol=1e-14)


def test_a_pair_by_hand():
    one = torch.ones(1, dtype=torch.float64)
    x = Examples(
        logp_S=torch.tensor([-3.0, -5.0]).double(), ref_logp_S=torch.tensor([-4.0, -4.0]).double(),
        lengths_S=torch.tensor([2.0, 3.0]).double(), firsts=(0, 2), margin_P=0 * one,
        smoothing_P=0 * one, kl_S=torch.tensor([0.25, 1.25]).double(),
    )  # fmt: skip
    # d = 1 + 1; TDPO1: 2 - 1 = 1; TDPO2: 2 - 0.5 = 1.5; with beta 2: -log sigmoid(2), (3)
    assert tdpo1(2.0).losses(x).item() == pytest.approx(0.126928011042972, abs=1e-14)
    assert tdpo2(2.0).losses(x).item() == pytest.approx(0.048587351573742, abs=1e-14)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tdpo1(0.0), "beta must be"),
        (lambda: tdpo1(alpha=float("nan")), "alpha must be"),
        (lambda: tdpo2(tdpo_alpha=-1.0), "tdpo_alpha must be a finite number >= 0"),
        (lambda: tdpo2(tdpo_alpha=True), "tdpo_alpha must be a number"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


# ------------------------------------------------------------------------------------------ tokens
def make(dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The policy's leaves (hidden, weight, bias), and the reference's tensors."""
    policy = [torch.randn(T, D), torch.randn(V, D) / 2, torch.randn(V)]
    ref = {
        "ref_h_TD": torch.randn(T, REF_D),
        "ref_w_VD": torch.randn(V, REF_D) / 3,
        "ref_bias_V": torch.randn(V),
    }
    return [x.to(dtype) for x in policy], {k: x.to(dtype) for k, x in ref.items()}


def plain_logp_kl(h, w, target_N, *, ref_h_TD, ref_w_VD, bias_V, ref_bias_V, **head):
    """What `linear_logp_kl` returns, from materialized logits."""
    logp_N = reference.linear_logp(h, w, target_N, bias_V=bias_V, **head)
    kl_N = reference.linear_kl(
        h, w, ref_h_TD, ref_w_VD, bias_V=bias_V, ref_bias_V=ref_bias_V, **head
    )
    ref_N = reference.linear_logp(ref_h_TD, ref_w_VD, target_N, bias_V=ref_bias_V, **head)
    return logp_N, torch.where(target_N == reference.IGNORE, 0.0, kl_N), ref_N


def run(op, policy, ref, target_N, upstream_2N, dtype, frozen=False, **options):
    """The three values, and the gradients of the leaves that have one."""
    leaves = [
        x.detach().to(dtype).clone().requires_grad_(not (frozen and i > 0))
        for i, x in enumerate(policy)
    ]
    ref = {name: x.to(dtype) for name, x in ref.items()}
    values = op(leaves[0], leaves[1], target_N, bias_V=leaves[2], **ref, **options)
    up = upstream_2N.to(values[0].dtype)
    (values[0] * up[0] + values[1] * up[1]).sum().backward()
    assert not values[2].requires_grad
    return [x.detach() for x in values], [x.grad for x in leaves if x.grad is not None]


TOKEN_CASES = [
    *(("torch", *x) for x in product(EPS, HEADS, (1, 0.02), (False, True))),
    *(("triton", dtype, "softcap", 1, False) for dtype in EPS),
    ("triton", torch.bfloat16, "plain", 0.02, False),
    ("triton", torch.float32, "negative", 0.02, True),
]


@pytest.mark.parametrize("impl, dtype, head, workspace_mib, frozen", marked(TOKEN_CASES))
def test_tokens_against_fp64(impl, dtype, head, workspace_mib, frozen):
    policy, ref = make(dtype)
    rows_N, target_N = torch.randint(T, (31,)), torch.randint(V, (31,))
    target_N[3::7] = reference.IGNORE
    upstream_2N = torch.randn(2, 31)
    upstream_2N[:, 5] = 0.0
    upstream_2N[1, 6] = upstream_2N[0, 6]  # only the reference's probabilities are left
    options = {"rows_N": rows_N, **HEADS[head]}
    gold, wanted = run(
        plain_logp_kl, policy, ref, target_N, upstream_2N, torch.float64, frozen=frozen, **options
    )
    values, grads = run(
        linear_logp_kl, policy, ref, target_N, upstream_2N, dtype, frozen=frozen,
        workspace_mib=workspace_mib, impl=impl, **options,
    )  # fmt: skip
    for value, gold_N in zip(values, gold):
        assert value.dtype == torch.float32
        assert float((value - gold_N).abs().max()) <= 2e-5
    assert len(grads) == len(wanted) == (1 if frozen else 3)
    # As for a KL alone: the mixture, the scaled rows and the result are rounded once each.
    bound = 2 * EPS[dtype] if dtype != torch.float32 else 32 * EPS[dtype]
    for found, gold_grad in zip(grads, wanted):
        assert found.dtype == dtype
        assert relative_error(found, gold_grad) <= bound


def test_gradcheck():
    policy, ref = make(torch.float64)
    h, w = (x.clone().requires_grad_() for x in (policy[0][:7, :5], policy[1][:, :5]))
    bias = policy[2].clone().requires_grad_()
    target_N = torch.randint(V, (7,))
    target_N[2] = reference.IGNORE

    def op(h, w, bias):
        return linear_logp_kl(
            h, w, target_N, ref["ref_h_TD"][:7], ref["ref_w_VD"], bias_V=bias,
            ref_bias_V=ref["ref_bias_V"], softcap=10.0, scale=0.7,
        )[:2]  # fmt: skip

    assert torch.autograd.gradcheck(op, (h, w, bias), fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_policy_that_is_its_reference(impl):
    policy, _ = make(torch.float32)
    same = {"ref_h_TD": policy[0], "ref_w_VD": policy[1], "ref_bias_V": policy[2]}
    target_N = torch.randint(V, (T,))
    (logp_N, kl_N, ref_logp_N), _ = run(
        linear_logp_kl, policy, same, target_N, torch.ones(2, T), torch.float32, impl=impl
    )
    assert torch.equal(logp_N, ref_logp_N)
    assert float(kl_N.abs().max()) <= 1e-6


def test_nothing_scored():
    policy, ref = make(torch.float32)
    nothing_N = torch.full((T,), reference.IGNORE)
    values, grads = run(linear_logp_kl, policy, ref, nothing_N, torch.ones(2, T), torch.float32)
    assert not any(x.any() for x in [*values, *grads])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "target": ({"target_N": torch.full((T,), V)}, r"target_N\[0\] = 301"),
    "short target": ({"target_N": torch.zeros(3, dtype=torch.int64)}, "pass rows_N"),
    "other rows": ({"ref_h_TD": torch.randn(T + 1, REF_D)}, "must have the policy's rows"),
    "no reference": ({"ref_h_TD": None}, "ref_h_TD must be a torch.Tensor"),
    "no head": ({"ref_w_VD": None}, "ref_h_TD needs ref_w_VD"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, message = BAD[case]
    policy, ref = make(torch.float32)
    arguments = {"target_N": torch.zeros(T, dtype=torch.int64), **ref, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        linear_logp_kl(policy[0], policy[1], bias_V=policy[2], **arguments)


# ----------------------------------------------------------------------------------------- the loss
SIZES, LOSS_V = (9, 7, 30, 26, 4, 12), 101
# What the plan must look like for each way of training the head.
ROUTES: dict[str, Callable[[Plan], bool]] = {
    # In PyTorch the stash is mixed a part at a time.
    "stash": lambda plan: (
        plan.route == "stash" and (plan.tile_bytes > 0 or plan.mixed_rows < sum(SIZES) / 2)
    ),
    "grouped": lambda plan: plan.route == "grouped" and not any(g.unit for g in plan.groups),
    "unit": lambda plan: plan.route == "grouped" and {g.unit for g in plan.groups} == {True, False},
    "recompute": lambda plan: plan.route == "recompute" and len(list(plan.spans)) > 2,
    "frozen": lambda plan: plan.route == "frozen" and len(list(plan.spans)) > 2,
}


def workspace_for(route: str, impl: str, dtype: torch.dtype) -> float:
    """A workspace in MiB whose plan is the wanted one, for `Scored`."""
    edges = torch.tensor([0, *SIZES]).cumsum(0)
    scored_N = torch.ones(sum(SIZES), dtype=torch.int64)
    if impl == "torch":
        scored_N[4::9] = 0
    edges = [int(scored_N[:b].sum()) for b in edges]
    for size in range(2**19, 2**10, -512):
        try:
            plan = make_plan(
                edges, D, LOSS_V, itemsize=8 if dtype == torch.float64 else 4,
                workspace_bytes=size, need_head=route != "frozen", need_h=True,
                T=sum(SIZES), mixes=True, gathered=impl == "torch",
                fused_itemsize=dtype.itemsize if impl == "triton" else None,
            )  # fmt: skip
        except ValueError:
            break
        if ROUTES[route](plan):
            return size / 2**20
    raise AssertionError(f"no workspace gives {route}")


class Scored:
    """Pairs with a policy and a reference of another hidden size."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        N, V = sum(SIZES), LOSS_V
        self.policy = [torch.randn(N, D), torch.randn(V, D) / 2, torch.randn(V)]
        self.ref: dict[str, Any] = {
            "ref_h_TD": torch.randn(N, REF_D), "ref_w_VD": torch.randn(V, REF_D) / 3,
            "ref_bias_V": torch.randn(V),
        }  # fmt: skip
        self.policy = [x.to(dtype) for x in self.policy]
        self.ref = {name: x.to(dtype) for name, x in self.ref.items()}
        self.target_N = torch.randint(V, (N,))
        self.target_N[4::9] = reference.IGNORE
        self.bounds_S1 = torch.tensor([0, *SIZES]).cumsum(0)
        P = len(SIZES) // 2
        self.options: dict[str, Any] = {
            "margin_P": torch.randn(P), "smoothing_P": torch.rand(P) / 2, "weight_P": torch.rand(P)
        }  # fmt: skip

    def leaves(self, dtype: torch.dtype, frozen: bool = False) -> list[Tensor]:
        return [
            x.detach().to(dtype).clone().requires_grad_(not (frozen and i > 0))
            for i, x in enumerate(self.policy)
        ]

    def gold(self, objective: Any, frozen: bool, **head: Any) -> tuple[Tensor, ...]:
        """Loss, both sums and KLs in fp64, and the leaves, whose gradients are there."""
        leaves = self.leaves(torch.float64, frozen)
        ref = {name: x.double() for name, x in self.ref.items()}
        logp_N, kl_N, ref_N = plain_logp_kl(
            leaves[0], leaves[1], self.target_N, bias_V=leaves[2], **ref, **head
        )
        bounds = self.bounds_S1
        scored_N = (self.target_N != reference.IGNORE).double()
        sums = [reference.sequence_sums(x, bounds) for x in (logp_N, ref_N, kl_N, scored_N)]
        x = Examples(
            sums[0], sums[1], sums[3], tuple(range(0, len(SIZES) + 1, 2)),
            self.options["margin_P"].double(), self.options["smoothing_P"].double(), kl_S=sums[2],
        )  # fmt: skip
        tdpo_alpha = objective.detached_chosen or None
        loss_P = plain(x, objective.beta, objective.alpha, tdpo_alpha)
        loss = (loss_P * self.options["weight_P"].double()).mean()
        loss.backward()
        return loss.detach(), *(x.detach() for x in sums[:3]), *leaves


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The kernels see two numbers of an objective, so that one objective a route tells of both.
CASES = [
    *(("torch", *x) for x in product(EPS, HEADS, ROUTES, (tdpo1, tdpo2))),
    ("triton", BF16, "softcap", "stash", tdpo1),
    ("triton", FP16, "negative", "grouped", tdpo2),
    ("triton", BF16, "plain", "unit", tdpo1),
    ("triton", FP16, "softcap", "recompute", tdpo2),
    ("triton", FP32, "softcap", "frozen", tdpo2),
]


@pytest.mark.parametrize("impl, dtype, head, route, make", marked(CASES))
def test_loss_against_fp64(impl, dtype, head, route, make):
    scored, frozen, objective = Scored(dtype), route == "frozen", make(0.3, 0.02)
    gold = scored.gold(objective, frozen, **HEADS[head])
    leaves = scored.leaves(dtype, frozen)
    result = linear_preference_loss(
        leaves[0], leaves[1], scored.target_N, scored.bounds_S1, None, objective,
        bias_V=leaves[2], **scored.ref, **scored.options, impl=impl,
        workspace_mib=workspace_for(route, impl, dtype), **HEADS[head],
    )  # fmt: skip
    assert ROUTES[route](result.plan)
    assert not result.stats
    assert_values(result, gold, objective)
    result.loss.backward()
    # The policy's and the reference's exponentials, their mixture, the scaled rows and the result
    # are rounded once each.  In fp32 what rounds is logits of up to about 16 and sums of up to
    # about 200, which move the pair's slope.
    bound = 3 * EPS[dtype] if dtype != FP32 else 64 * EPS[dtype]
    for leaf, gold_leaf in zip(leaves, gold[4:]):
        assert (leaf.grad is None) == (gold_leaf.grad is None)
        if leaf.grad is not None:
            assert relative_error(leaf.grad, grad(gold_leaf)) <= bound


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_without_gradients(impl):
    scored, objective = Scored(FP32), tdpo2(0.3, 0.02)
    gold = scored.gold(objective, frozen=False)
    h_TD, w_VD, bias_V = scored.policy
    result = linear_preference_loss(
        h_TD, w_VD, scored.target_N, scored.bounds_S1, None, objective, bias_V=bias_V,
        **scored.ref, **scored.options, impl=impl,
    )  # fmt: skip
    assert result.plan.route == "forward"
    assert_values(result, gold, objective)


def assert_values(result: PreferenceLoss, gold: tuple[Tensor, ...], objective: Any) -> None:
    loss, logp_S, ref_logp_S, kl_S = gold[:4]
    assert float((result.loss.detach() - loss).abs()) <= 1e-5
    assert float((result.logp_S - logp_S).abs().max()) <= 2e-4
    assert float((result.ref_logp_S - ref_logp_S).abs().max()) <= 2e-4
    rewards_S = objective.beta * (logp_S - ref_logp_S)
    for name, x_S in (("kl", kl_S), ("rewards", rewards_S), ("logps", logp_S)):
        for k, side in enumerate(("chosen", "rejected")):
            wanted = float(x_S[k::2].mean())
            assert float(result.metrics[f"{name}/{side}"]) == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("make", [tdpo1, tdpo2])
def test_loss_gradcheck(route, make):
    """Through both heads' softmaxes, the sums and the objective; values of the other test."""
    scored, objective = Scored(), make(0.3, 0.02)
    h, w, bias = scored.leaves(torch.float64, route == "frozen")

    def op(h, w, bias):
        return linear_preference_loss(
            h, w, scored.target_N, scored.bounds_S1, None, objective, bias_V=bias, **scored.ref,
            **scored.options, softcap=20.0, scale=0.7,
            workspace_mib=workspace_for(route, "torch", torch.float64),
        ).loss  # fmt: skip

    if objective.detached_chosen:  # whose K_w has a value and no gradient: see the other test
        with torch.no_grad():
            op(h, w, bias)
        objective = replace(objective, detached_chosen=0.0)
    assert torch.autograd.gradcheck(op, (h, w, bias), fast_mode=True)


def test_a_sum_of_losses():
    """Where the KL's slope is no known multiple of the other, which only recomputing can serve."""
    scored = Scored()
    objective = make_objective(["tdpo2", "sigmoid"], [0.7, 0.4], beta=0.3)
    assert objective.kl_shares is None
    grads, losses = [], []
    for parts in ([objective], [tdpo2(0.3), lr_dpo(0.3)]):
        leaves = scored.leaves(torch.float64)
        weights = [1.0] if len(parts) == 1 else [0.7, 0.4]
        found = [
            weight * linear_preference_loss(
                leaves[0], leaves[1], scored.target_N, scored.bounds_S1, None, part,
                bias_V=leaves[2], **scored.ref, workspace_mib=0.2,
            ).loss for weight, part in zip(weights, parts)
        ]  # fmt: skip
        loss = torch.stack(found).sum()
        losses.append(loss.detach())
        grads.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ref", ["sums", "nothing", "both"])
def test_a_reference_without_its_distribution(ref):
    scored = Scored()
    ref_logp_S = None if ref == "nothing" else torch.zeros(len(SIZES))
    with pytest.raises(
        ValueError, match=r"'tdpo1' reads the KL .* pass the reference's hidden rows"
    ):
        h_TD, w_VD, _ = scored.policy
        linear_preference_loss(
            h_TD, w_VD, scored.target_N, scored.bounds_S1, ref_logp_S, tdpo1(),
            **(scored.ref if ref == "both" else {}),  # type: ignore[arg-type]
        )  # fmt: skip
