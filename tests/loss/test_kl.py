"""linear_kl against materialized distributions in fp64: values, gradients, errors."""

from typing import Any

import pytest
import torch
from interpreter import needs_kernels
from torch import Tensor

from fastdpo import linear_kl
from fastdpo.loss import reference

T, D, REF_D, V = 23, 24, 32, 301
IMPLS = ["torch", pytest.param("triton", marks=needs_kernels)]
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 20.0, "scale": 0.7},
    "negative": {"scale": -1.5},
}


def make(dtype: torch.dtype, bias: bool = True) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The policy's leaves (hidden, weight, bias), and the reference's tensors."""
    policy = [torch.randn(T, D), torch.randn(V, D) / 2, torch.randn(V)]
    ref = {
        "ref_h_TD": torch.randn(T, REF_D),
        "ref_w_VD": torch.randn(V, REF_D) / 3,
        "ref_bias_V": torch.randn(V),
    }
    if not bias:
        policy[2].zero_()
        ref["ref_bias_V"].zero_()
    return [x.to(dtype) for x in policy], {k: x.to(dtype) for k, x in ref.items()}


def run(op, policy, ref, upstream_N, dtype, frozen=False, **options):
    """KL of each row, and the gradients of the leaves that have one."""
    leaves = [
        x.detach().to(dtype).clone().requires_grad_(not (frozen and i > 0))
        for i, x in enumerate(policy)
    ]
    ref = {name: x.to(dtype) for name, x in ref.items()}
    kl_N = op(leaves[0], leaves[1], bias_V=leaves[2], **ref, **options)
    (kl_N * upstream_N.to(kl_N.dtype)).sum().backward()
    return kl_N.detach(), [x.grad for x in leaves if x.grad is not None]


def relative(x: Tensor, gold: Tensor) -> float:
    return float((x.double() - gold).norm() / gold.norm())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("workspace_mib", [1, 0.02], ids=["roomy", "tight"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_against_fp64(impl, dtype, head, workspace_mib, frozen):
    policy, ref = make(dtype)
    rows_N, upstream_N = torch.randint(T, (31,)), torch.randn(31)
    options = {"rows_N": rows_N, **HEADS[head]}
    gold = run(
        reference.linear_kl, policy, ref, upstream_N, torch.float64, frozen=frozen, **options
    )
    kl_N, grads = run(
        linear_kl, policy, ref, upstream_N, dtype, frozen=frozen,
        workspace_mib=workspace_mib, impl=impl, **options,
    )  # fmt: skip
    assert kl_N.dtype == torch.float32
    assert float((kl_N - gold[0]).abs().max()) <= 2e-5
    assert len(grads) == len(gold[1]) == (1 if frozen else 3)
    # Operands and result are rounded once each: the difference of the probabilities, the scaled
    # rows, the gradient.  In fp32 what rounds is the logits, of up to about 16.
    bound = 2 * EPS[dtype] if dtype != torch.float32 else 32 * EPS[dtype]
    for grad, wanted in zip(grads, gold[1]):
        assert grad.dtype == dtype
        assert relative(grad, wanted) <= bound


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_heads_have_no_divergence(impl):
    policy, _ = make(torch.float32)
    same = {"ref_h_TD": policy[0], "ref_w_VD": policy[1], "ref_bias_V": policy[2]}
    kl_N, grads = run(linear_kl, policy, same, torch.ones(T), torch.float32, impl=impl)
    assert float(kl_N.abs().max()) <= 1e-6
    assert all(float(grad.abs().max()) <= 1e-6 for grad in grads)


def test_gradcheck():
    policy, ref = make(torch.float64)
    leaves = [x[:7, :5] if x.ndim == 2 else x for x in policy]
    h, w = leaves[0].clone().requires_grad_(), policy[1][:, :5].clone().requires_grad_()
    bias = leaves[2].clone().requires_grad_()

    def op(h, w, bias):
        return linear_kl(
            h, w, ref["ref_h_TD"][:7], ref["ref_w_VD"], bias_V=bias, ref_bias_V=ref["ref_bias_V"],
            softcap=10.0,
        )  # fmt: skip

    assert torch.autograd.gradcheck(op, (h, w, bias), fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_and_no_gradient(impl):
    policy, ref = make(torch.float32)
    columns: dict[str, Any] = {k: x.T.contiguous().T if x.ndim == 2 else x for k, x in ref.items()}
    head: dict[str, Any] = {"bias_V": policy[2], "impl": impl}
    with torch.no_grad():
        plain = linear_kl(*policy[:2], **ref, **head)
        strided = linear_kl(*(x.T.contiguous().T for x in policy[:2]), **columns, **head)
    assert not plain.requires_grad
    torch.testing.assert_close(strided, plain, rtol=0, atol=1e-5)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"rows_N": torch.tensor([0, T])}, r"rows_N\[1\] = 23"),
    "no rows": ({"rows_N": torch.zeros(0, dtype=torch.int64)}, "there is no row"),
    "float rows": ({"rows_N": torch.zeros(3)}, "rows_N must be int64"),
    "other rows": ({"ref_h_TD": torch.randn(T + 1, REF_D)}, "must have the policy's rows"),
    "other vocabulary": (
        {"ref_w_VD": torch.randn(V + 1, REF_D), "ref_bias_V": None},
        "must have the policy's rows",
    ),
    "no reference": ({"ref_w_VD": None}, "ref_w_VD"),
    "other dtype": ({"ref_h_TD": torch.randn(T, REF_D).double()}, "ref_"),
    "scale": ({"scale": 0.0}, "scale must not be 0"),
    "workspace": ({"workspace_mib": 1e-6}, "workspace_mib=.* is too small"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, message = BAD[case]
    policy, ref = make(torch.float32)
    arguments = {**ref, "bias_V": policy[2], **change}
    with pytest.raises((TypeError, ValueError), match=message):
        linear_kl(*policy[:2], **arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_padded_vocabulary_adds_nothing(impl):
    """Tokens that neither head can give, by a bias of -inf."""
    policy, ref = make(torch.float32)
    policy[2][-5:] = ref["ref_bias_V"][-5:] = -torch.inf
    kl_N, grads = run(linear_kl, policy, ref, torch.ones(T), torch.float32, impl=impl)
    short = [policy[0], policy[1][:-5], policy[2][:-5]]
    short_ref = {k: x if k == "ref_h_TD" else x[:-5] for k, x in ref.items()}
    wanted, wanted_grads = run(linear_kl, short, short_ref, torch.ones(T), torch.float32, impl=impl)
    torch.testing.assert_close(kl_N, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(grads[0], wanted_grads[0], rtol=1e-4, atol=1e-5)
    assert not grads[1][-5:].any()
