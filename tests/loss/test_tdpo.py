"""Log-probs with KL in one pass, and the objectives of them, against plain formulas in fp64."""

from typing import Any

import pytest
import torch
from checks import relative_error
from interpreter import needs_kernels
from torch import Tensor
from torch.nn import functional as F

from fastdpo import linear_logp_kl
from fastdpo.loss import reference
from fastdpo.loss.examples import Examples
from fastdpo.loss.tokens import tdpo1, tdpo2

T, D, REF_D, V = 23, 24, 32, 301
IMPLS = ["torch", pytest.param("triton", marks=needs_kernels)]
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 20.0, "scale": 0.7},
    "negative": {"scale": -1.5},
}


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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("workspace_mib", [1, 0.02], ids=["roomy", "tight"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
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
    for grad, gold_grad in zip(grads, wanted):
        assert grad.dtype == dtype
        assert relative_error(grad, gold_grad) <= bound


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
