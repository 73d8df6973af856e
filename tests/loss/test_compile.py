"""The ops inside torch.compile, whole graphs: the same values and gradients as outside."""

import pytest
import torch
from interpreter import needs_kernels
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastdpo import LinearDPOLoss, linear_dpo_loss, linear_kl, linear_logp, linear_preference_loss
from fastdpo.loss.lists import plackett_luce
from fastdpo.loss.objectives import (
    apo_zero,
    discopop,
    hinge,
    ipo,
    length_normalized_dpo,
    nca_pair,
    robust,
    simpo,
)
from fastdpo.loss.singles import kto

N, D, V = 24, 16, 101
IMPLS = ["torch", pytest.param("triton", marks=needs_kernels)]
BOUNDS = [0, 5, 12, 20, 24]


def inputs(n: int = N) -> list[Tensor]:
    """Leaves: hidden rows, weight, bias."""
    shapes = [(n, D), (V, D), (V,)]
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def targets(n: int = N) -> Tensor:
    return torch.randint(V, (n,))


def run(function, leaves: list[Tensor]) -> list[Tensor]:
    """Outputs, the first of which is differentiated, and the leaves' gradients."""
    copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in leaves]
    outputs = function(*copies)
    outputs[0].backward()
    return [*outputs, *(x.grad for x in copies if x.grad is not None)]


def assert_same(eager: list[Tensor], compiled: list[Tensor], rtol: float = 1e-6) -> None:
    assert len(eager) == len(compiled)
    for x, y in zip(eager, compiled):
        torch.testing.assert_close(y, x, rtol=rtol, atol=1e-6)


def whole(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def dpo(target: Tensor, **options):
    bounds, ref_logp = torch.tensor(BOUNDS), -torch.rand(4) * 90

    def loss(h, w, b):
        result = linear_dpo_loss(
            2 * h, w, target, bounds, ref_logp, bias_V=b, beta=0.1, alpha=0.02, **options
        )
        stats = [result.stats[name] for name in sorted(result.stats)]
        metrics = [result.metrics[name] for name in result.metrics]
        return [3 * result.loss, result.logp_S, result.ref_logp_S, *metrics, *stats]

    return loss


@pytest.mark.parametrize("impl", IMPLS)
def test_dpo_loss(impl):
    function = dpo(targets(), stats=("entropy", "top1"), impl=impl)
    leaves = inputs()
    assert_same(run(function, leaves), run(whole(function), leaves))


def test_dpo_loss_with_a_reference_head():
    ref_h, ref_w = torch.randn(N, D), torch.randn(V, D)
    bounds, target = torch.tensor(BOUNDS), targets()

    def function(h, w, b):
        result = linear_dpo_loss(
            h, w, target, bounds, ref_h_TD=ref_h, ref_w_VD=ref_w, stats=("kl_ref",)
        )
        return [result.loss, result.ref_logp_S, result.stats["kl_ref"]]

    leaves = inputs()
    assert_same(run(function, leaves), run(whole(function), leaves))


OBJECTIVES = [
    length_normalized_dpo(0.5, 0.01),
    hinge(0.2, ld_alpha=0.4),
    ipo(0.1, reference_scale=1.3),
    apo_zero(0.1),
    nca_pair(0.1),
    robust(0.1, 0.2),
    discopop(0.1, 0.3, target_margin=0.7),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda x: x.name)
def test_objectives(objective):
    bounds, target, ref_logp = torch.tensor(BOUNDS), targets(), -torch.rand(4) * 90
    weight = torch.rand(2)

    def function(h, w, b):
        result = linear_preference_loss(
            h, w, target, bounds, ref_logp, objective, weight_P=weight, num_pairs=3
        )
        return [result.loss]

    leaves = inputs()
    assert_same(run(function, leaves), run(whole(function), leaves))
    assert objective.code is not None


@pytest.mark.parametrize("impl", IMPLS)
def test_pairs_without_a_reference(impl):
    bounds, target = torch.tensor(BOUNDS), targets()

    def function(h, w, b):
        result = linear_preference_loss(
            h, w, target, bounds, None, simpo(2.0), firsts_P1=(0, 2, 4), impl=impl
        )
        return [result.loss, result.logp_S, result.ref_logp_S, *result.metrics.values()]

    leaves = inputs()
    assert_same(run(function, leaves), run(whole(function), leaves))


def square(chosen, rejected, *_):
    return (chosen - rejected).square()


OTHERS = {
    "the caller's own": (square, {}),
    "lists": (plackett_luce(0.1), {"firsts_P1": (0, 4), "scores_S": torch.arange(4.0)}),
    "singles": (kto(0.1), {"desirable_P": torch.tensor([1.0, 0.0, 0.0, 1.0]), "shift": 0.3}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_objective_breaks_the_graph(kind):
    bounds, target, ref_logp = torch.tensor(BOUNDS), targets(), -torch.rand(4) * 9
    objective, given = OTHERS[kind]

    def function(h, w, b):
        result = linear_preference_loss(2 * h, w, target, bounds, ref_logp, objective, **given)
        return [result.loss, *result.metrics.values()]

    leaves = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager")
    assert_same(run(function, leaves), run(compiled, leaves))
    with pytest.raises(Exception, match="disable"):
        run(whole(function), leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_logp_of_any_length_without_recompiling(impl):
    def function(h, w, b, target, upstream):
        logp_N = linear_logp(2 * h, w, target, bias_V=b, softcap=20.0, impl=impl)
        return [(logp_N * upstream).sum(), logp_N]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    frames = 0
    for n in (24, 20, 17):
        leaves, target, upstream = inputs(n), targets(n), torch.randn(n)
        eager = run(lambda h, w, b: function(h, w, b, target, upstream), leaves)  # noqa: B023
        got = run(lambda h, w, b: compiled(h, w, b, target, upstream), leaves)  # noqa: B023
        assert_same(eager, got)
        frames = frames or counter.frame_count
        assert counter.frame_count == frames, f"compiled again for N={n}"


def test_padded_layout():
    module, target, ref_logp = LinearDPOLoss(0.1, 0.02), targets(), -torch.rand(4) * 90

    def function(h, w, b):
        result = module(h.view(4, 6, D), w, target.view(4, 6), ref_logp_S=ref_logp, bias_V=b)
        return [result.loss, result.logp_S]

    leaves = inputs()
    assert_same(run(function, leaves), run(whole(function), leaves))


def test_frozen_head_and_no_gradient():
    leaves = inputs()
    for x in leaves[1:]:
        x.requires_grad_(False)
    function = dpo(targets())
    compiled = whole(function)
    assert_same(run(function, leaves), run(compiled, leaves))
    with torch.no_grad():
        assert_same(function(*leaves), compiled(*leaves))


def test_bad_input_is_still_one_clear_error():
    function = dpo(targets().clone().index_fill_(0, torch.tensor([3]), V))
    with pytest.raises(ValueError, match=r"target_N\[3\] = 101"):
        run(whole(function), inputs())


def test_kl_breaks_the_graph():
    ref_h, ref_w = torch.randn(N, D), torch.randn(V, D)

    def function(h, w, b):
        return [linear_kl(h, w, ref_h, ref_w).mean()]

    leaves = inputs()
    torch._dynamo.reset()
    assert_same(run(function, leaves), run(torch.compile(function, backend="aot_eager"), leaves))


def test_autocast():
    target = targets()
    function = dpo(target)

    def under_autocast(h, w, b):
        with torch.autocast("cpu", torch.bfloat16):
            return function(h, w, b)

    leaves = inputs()
    # The node finishes its gradient before the upstream factor, so bf16 rounds it once more.
    eager, compiled = run(under_autocast, leaves), run(whole(under_autocast), leaves)
    for x, y in zip(eager, compiled):
        assert (x - y).norm() <= 2**-8 * x.norm()


@pytest.mark.slow
def test_inductor():
    function, leaves = dpo(targets()), inputs()
    torch._dynamo.reset()
    assert_same(run(function, leaves), run(torch.compile(function, fullgraph=True), leaves))
