"""Every objective against TRL's formula, written a second time in ``checks``."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import (
    apo_zero_formula,
    grad,
    hinge_formula,
    ipo_formula,
    nca_pair_formula,
    sigmoid_formula,
    sigmoid_norm_formula,
)

from fastdpo.loss import objectives

ROOT = Path(__file__).parents[2]
MARGIN = {
    "lr_dpo": (objectives.lr_dpo, sigmoid_formula),
    "length_normalized_dpo": (objectives.length_normalized_dpo, sigmoid_norm_formula),
    "hinge": (objectives.hinge, hinge_formula),
    "ipo": (objectives.ipo, ipo_formula),
}
SEPARATE = {
    "apo_zero": (objectives.apo_zero, apo_zero_formula),
    "nca_pair": (objectives.nca_pair, nca_pair_formula),
}


def some_pairs(P: int = 64):
    """Log-ratios up to a few hundred, as long responses give, and lengths."""
    size_P = torch.logspace(-3, 2.5, P, dtype=torch.float64)
    chosen_P, rejected_P = size_P * torch.randn(P).double(), size_P * torch.randn(P).double()
    nw_P, nl_P = torch.randint(1, 900, (2, P)).double()
    return chosen_P, rejected_P, nw_P, nl_P


@pytest.mark.parametrize("name", [*MARGIN, *SEPARATE])
@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_objective_is_trls_formula(name, beta):
    build, formula = {**MARGIN, **SEPARATE}[name]
    pairs = some_pairs()
    zero_P = torch.zeros_like(pairs[0])
    torch.testing.assert_close(
        build(beta=beta)(*pairs, zero_P, zero_P), formula(*pairs, beta), rtol=1e-13, atol=1e-15
    )


@pytest.mark.parametrize("name", MARGIN)
def test_margin_and_smoothing(name):
    build, formula = MARGIN[name]
    pairs = some_pairs()
    margin_P, smoothing_P = torch.randn(64).double(), torch.rand(64).double()
    found_P = build(beta=0.1)(*pairs, margin_P, smoothing_P)
    wanted_P = formula(*pairs, 0.1, m=margin_P, eps=smoothing_P)
    torch.testing.assert_close(found_P, wanted_P, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("name", ["lr_dpo", "length_normalized_dpo", "hinge"])
def test_alpha_is_a_margin_of_the_length_difference(name):
    build, formula = MARGIN[name]
    pairs = some_pairs()
    zero_P = torch.zeros_like(pairs[0])
    found_P = build(beta=0.1, alpha=0.02)(*pairs, zero_P, zero_P)
    torch.testing.assert_close(found_P, formula(*pairs, 0.1, alpha=0.02), rtol=1e-12, atol=1e-300)
    # Not multiplied by beta, and positive where the chosen response is longer.
    margin_P = 0.02 * (pairs[2] - pairs[3])
    as_margin_P = build(beta=0.1)(*pairs, margin_P, zero_P)
    torch.testing.assert_close(found_P, as_margin_P, rtol=1e-12, atol=1e-300)


def test_a_longer_chosen_response_gets_a_smaller_gradient():
    chosen_P = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    zero_P = torch.zeros(2, dtype=torch.float64)
    nw_P, nl_P = torch.tensor([30.0, 10.0]), torch.tensor([10.0, 30.0])
    objectives.lr_dpo(0.1, alpha=0.05)(
        chosen_P, zero_P, nw_P, nl_P, zero_P, zero_P
    ).sum().backward()
    longer, shorter = grad(chosen_P).abs().tolist()
    assert longer < 0.05 < shorter  # 0.05 is beta / 2, the gradient without the penalty


@pytest.mark.parametrize("name", [*MARGIN, *SEPARATE])
def test_derivative_of_objective(name):
    build, _ = {**MARGIN, **SEPARATE}[name]
    chosen_P = torch.linspace(-3, 3, 8, dtype=torch.float64).requires_grad_()
    rejected_P = torch.linspace(2, -2, 8, dtype=torch.float64).requires_grad_()
    lengths_P = torch.arange(1.0, 9.0).double()
    m_P, eps_P = torch.full((8,), 0.1).double(), torch.full((8,), 0.2).double()

    def loss(chosen_P, rejected_P):
        return build(beta=0.7)(chosen_P, rejected_P, lengths_P, lengths_P.flip(0), m_P, eps_P)

    assert torch.autograd.gradcheck(loss, (chosen_P, rejected_P))


@pytest.mark.parametrize("z", [1e4, 60.0, 0.0, -60.0, -1e4])
def test_log_sigmoid_at_extremes(z):
    z_1 = torch.tensor([z], dtype=torch.float64, requires_grad=True)
    zero_1 = torch.zeros(1, dtype=torch.float64)
    loss_1 = objectives.lr_dpo(1.0)(z_1, zero_1, zero_1, zero_1, zero_1, zero_1)
    loss_1.sum().backward()
    wanted = math.log1p(math.exp(-z)) if z > -700 else -z
    assert loss_1.item() == pytest.approx(wanted, rel=1e-14, abs=1e-300)
    slope = -1 / (1 + math.exp(z)) if z < 700 else 0.0
    assert grad(z_1).item() == pytest.approx(slope, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("name", [*MARGIN, *SEPARATE])
@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan"), float("inf"), True, "0.1"])
def test_bad_beta_is_refused_where_it_is_given(name, beta):
    build, _ = {**MARGIN, **SEPARATE}[name]
    with pytest.raises((TypeError, ValueError), match="beta"):
        build(beta=beta)


def test_bad_alpha_is_refused_where_it_is_given():
    with pytest.raises(ValueError, match="alpha"):
        objectives.lr_dpo(0.1, alpha=float("inf"))


def test_import_needs_neither_triton_nor_transformers():
    code = (
        "import sys, fastdpo, fastdpo.kernels.support as support, torch\n"
        "loaded = {'triton', 'transformers'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "assert 'cpu' in support.unsupported_reason(torch.device('cpu'))\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, env=env
    )
    assert done.returncode == 0, done.stderr
