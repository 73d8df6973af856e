"""The fused ops against fp64, against each other on every route, and by property.

Legend: T hidden rows, N targets, D hidden size, V vocabulary, P pairs, S = 2P sequences.
"""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from checks import (
    BETA,
    PAIR_SIZES,
    ROUTES,
    apo_zero_formula,
    dpo_of,
    gold_logp,
    gold_loss,
    grad,
    hinge_formula,
    ipo_formula,
    make_problem,
    max_error,
    nca_pair_formula,
    preference,
    relative_error,
    sigmoid_formula,
    sigmoid_norm_formula,
    usual_logp,
    workspace_for,
)

from fastdpo import (
    LinearDPOLoss,
    PreferenceLoss,
    linear_dpo_loss,
    linear_logp,
    linear_preference_loss,
    reference,
)
from fastdpo.kernels import support
from fastdpo.loss import module
from fastdpo.loss.objectives import (
    apo_zero,
    hinge,
    ipo,
    length_normalized_dpo,
    lr_dpo,
    nca_pair,
)
from fastdpo.loss.plan import MIB
from fastdpo.loss.streaming import Grads, Stash

LOW = [torch.bfloat16, torch.float16]
LOG_2 = torch.tensor(2.0).log()

# Logits up to 30; V is odd everywhere, so that no chunk or tile is full.
CASES = {
    "plain": {"D": 32, "V": 1031},
    "bias-softcap": {"D": 64, "V": 517, "bias": True, "softcap": 30.0, "scale": 0.5},
    "masked": {"D": 48, "V": 1301, "masked": True, "unused_rows": 50},
    "repeats": {"D": 40, "V": 771, "masked": True, "repeats": True, "softcap": 30.0},
    "deep": {"D": 2048, "V": 1031},
    "realistic": {"sizes": (40, 24, 50, 46, 20, 30, 33, 13), "D": 576, "V": 5003},
}


def case(name: str, dtype: torch.dtype):
    return make_problem(**{"peak": 30.0, "dtype": dtype, **CASES[name]})


def floor(dtype: torch.dtype) -> float:
    """Error that rounding the result to its dtype explains, and a half more."""
    return {torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4, torch.float32: 1e-5}[dtype]


def grads_of(p, loss) -> dict[str, torch.Tensor]:
    loss.backward()
    return p.grads()


def assert_precise(dtype, found, gold, usual):
    """In low precision at most half the error of the usual route, or what rounding costs."""
    for name in ("h", "w"):
        error = relative_error(found[name], gold[name])
        bound = floor(dtype)
        if dtype in LOW:
            bound = max(bound, relative_error(usual[name], gold[name]) / 2)
        assert error <= bound, f"gradient of {name}: {error:.2e} > {bound:.2e}"
    if "bias" in gold:
        assert relative_error(found["bias"], gold["bias"]) <= max(floor(dtype), 2.5e-3)


# ------------------------------------------------------------------------------- against fp64 gold
@pytest.mark.parametrize("route", ["stash", "recompute"])
@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_linear_logp_against_fp64(name, dtype, route):
    p = case(name, dtype)
    workspace_mib = None
    if route == "recompute":
        workspace_mib = workspace_for(p, ROUTES["recompute"])
    upstream_N = torch.randn(p.target_N.shape[0], dtype=torch.float64)

    def run(q, logp):
        logp_N = logp(q)
        return logp_N.detach(), grads_of(q, (logp_N * upstream_N.to(logp_N.dtype)).sum())

    def fused(q):
        return linear_logp(q.h_TD, q.w_VD, q.target_N, **q.head, workspace_mib=workspace_mib)

    gold_N, gold = run(p.to(torch.float64).leaves(), gold_logp_with_graph)
    found_N, found = run(p.leaves(), fused)
    _, usual = run(p.leaves(), usual_logp)
    assert found_N.dtype == torch.float32 and found["w"].dtype == dtype
    assert max_error(found_N, gold_N) <= 2e-5
    assert_precise(dtype, found, gold, usual)


def gold_logp_with_graph(p):
    return reference.linear_logp(p.h_TD, p.w_VD, p.target_N, **p.head)


# Accumulators of the head fit beside the workspace only where a block has D / 4 rows or more.
ROUTED_CASES = [(name, route) for name in CASES for route in ("stash", "recompute")]
ROUTED_CASES += [(name, "grouped") for name in CASES if name != "deep"] + [("plain", "unit")]


@pytest.mark.parametrize(("name", "route"), ROUTED_CASES)
@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
def test_linear_dpo_loss_against_fp64(name, dtype, route):
    p = case(name, dtype)
    alpha = 0.02
    # fp16 gradients below 6e-5 lose digits; training multiplies the loss to avoid that.
    factor = 1024.0 if dtype == torch.float16 else 1.0
    workspace_mib = workspace_for(p, ROUTES[route])
    gold_p, usual_p, q = p.to(torch.float64).leaves(), p.leaves(), p.leaves()
    gold_loss_ = dpo_of(gold_logp_with_graph(gold_p), gold_p, BETA, alpha)
    gold = grads_of(gold_p, gold_loss_ * factor)
    usual = grads_of(usual_p, dpo_of(usual_logp(usual_p), usual_p, BETA, alpha) * factor)
    result = linear_dpo_loss(
        *q.packed, q.ref_logp_S, beta=BETA, alpha=alpha, **q.head, workspace_mib=workspace_mib
    )
    found = grads_of(q, result.loss * factor)
    assert ROUTES[route](result.plan)
    assert result.loss.dtype == torch.float32
    # A sum of log-probs is as precise as its parts.
    longest = int(p.bounds_S1.diff().max())
    gold_S = reference.sequence_sums(gold_logp(p), p.bounds_S1)
    assert max_error(result.logp_S, gold_S) <= 2e-5 * longest
    assert max_error(result.loss.detach(), gold_loss_.detach()) <= BETA * 2e-5 * longest
    assert_precise(dtype, found, gold, usual)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_sums_over_chunks_are_rounded_once(dtype, route):
    """Rows of the head that share a large component: it cancels, if no partial sum was rounded."""
    p = make_problem(D=8, V=2051, dtype=torch.float64, peak=4.0)
    p.w_VD += 30 * p.w_VD.std() * torch.sign(torch.randn(8))
    p = p.to(dtype)
    q, gold_p = p.leaves(), p.to(torch.float64).leaves()
    workspace = workspace_for(p, ROUTES[route])
    factor = 2.0**6  # fp16 gradients below 6e-5 lose digits
    found = grads_of(q, factor * preference(q, lr_dpo(1.0), workspace_mib=workspace).loss)
    gold = grads_of(gold_p, factor * gold_loss(gold_p, sigmoid_formula, beta=1.0))
    assert relative_error(found["h"], gold["h"]) <= floor(dtype)


@pytest.mark.parametrize("softcap", [None, 80.0])
def test_extreme_logits(softcap):
    """Logits of 80 beside -80: nothing overflows and the errors stay relative to the logits."""
    p = make_problem(D=16, V=303, dtype=torch.float32, peak=80.0, softcap=softcap)
    q, gold_p = p.leaves(), p.to(torch.float64).leaves()
    found = grads_of(q, preference(q, lr_dpo(BETA)).loss)
    gold = grads_of(gold_p, gold_loss(gold_p, sigmoid_formula))
    logp_N = linear_logp(p.h_TD, p.w_VD, p.target_N, **p.head)
    assert max_error(logp_N, gold_logp(p)) <= 80 * 2e-6
    for name, gold_grad in gold.items():
        assert relative_error(found[name], gold_grad) <= 1e-5


@pytest.mark.parametrize("route", ["stash", "recompute", "frozen"])
def test_confident_targets_keep_their_gradient(route):
    """Where p is 1 - 1e-6 the gradient is 1e-6 and must not come from the difference 1 - p."""
    N, D, V = 12, 12, 205
    h_TD = torch.eye(N, D) * 4.8
    w_VD = torch.zeros(V, D)
    target_N = torch.arange(N) * 3
    w_VD[target_N] = torch.eye(D) * 4
    w_VD += 1e-3 * torch.randn(V, D)
    p = replace(make_problem([N], D, V, dtype=torch.float32), h_TD=h_TD, w_VD=w_VD)
    p.target_N = target_N
    assert (gold_logp(p).abs() < 5e-6).all()
    workspace = workspace_for(p, ROUTES["recompute"]) if route == "recompute" else None
    wanted = "h" if route == "frozen" else "h w"
    q, gold_p = p.leaves(wanted), p.to(torch.float64).leaves(wanted)
    logp_N = linear_logp(q.h_TD, q.w_VD, target_N, workspace_mib=workspace)
    found = grads_of(q, logp_N.sum())
    gold = grads_of(gold_p, gold_logp_with_graph(gold_p).sum())
    for name, gold_grad in gold.items():
        # The logits of 19 are good to 1e-6, and so is their ratio of exponentials.
        assert relative_error(found[name], gold_grad) <= 1e-5, name


def test_own_gradient_of_a_confident_target_is_exact_given_its_logp():
    """Two tokens, logits (x, 0): p(first) = sigmoid(x), and log-prob and gradient are exact."""
    x = torch.tensor([[9.0], [12.0], [15.0]], requires_grad=True)
    w_VD = torch.tensor([[1.0], [0.0]])
    target_N = torch.zeros(3, dtype=torch.int64)
    linear_logp(x, w_VD, target_N).sum().backward()
    gold = torch.sigmoid(-x.detach().double())
    # 1 - p in fp32 has a relative error of 0.2 at x = 15, and so has expm1 of z - lse.
    torch.testing.assert_close(grad(x).double(), gold, rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------- all routes
OBJECTIVES = {
    "lr_dpo": (lr_dpo(BETA, 0.02), sigmoid_formula, 0.02),
    "length_normalized_dpo": (length_normalized_dpo(BETA, 0.02), sigmoid_norm_formula, 0.02),
    "hinge": (hinge(BETA, 0.02), hinge_formula, 0.02),
    "ipo": (ipo(BETA), ipo_formula, 0.0),
    "apo_zero": (apo_zero(BETA), apo_zero_formula, 0.0),
    "nca_pair": (nca_pair(BETA), nca_pair_formula, 0.0),
}


def pair_options(p, objective):
    """Every per-pair option the objective takes."""
    P = p.num_pairs
    options = {"weight_P": torch.rand(P).double() + 0.5, "num_pairs": 7.0}
    if objective.by_margin:
        options["margin_P"] = 0.3 * torch.randn(P).double()
        options["smoothing_P"] = torch.rand(P).double() / 2
    return options


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("wanted", ["h w bias", "h w", "h bias", "w", "bias", "h", ""])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_route_gives_the_same_loss_and_gradients(name, wanted, dtype):
    objective, formula, alpha = OBJECTIVES[name]
    p = make_problem(dtype=dtype, bias=True, softcap=10.0, scale=0.7, masked=True, repeats=True)
    p.extra = pair_options(p, objective)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    gold_p = p.to(torch.float64).leaves(wanted)
    gold_value = gold_loss(gold_p, formula, alpha=alpha)
    gold = grads_of(gold_p, gold_value * 3) if wanted else {}
    frozen = {"h": "frozen", "": "forward"}.get(wanted)
    for route, is_wanted in ROUTES.items():
        workspace = workspace_for(p, is_wanted, 1 if objective.by_margin else 2)
        q = p.leaves(wanted)
        result = preference(q, objective, workspace_mib=workspace)
        assert result.plan.route == frozen if frozen else is_wanted(result.plan)
        torch.testing.assert_close(
            result.loss.detach().double(), gold_value.detach(), rtol=rtol, atol=0
        )
        found = grads_of(q, result.loss * 3) if wanted else {}
        assert found.keys() == gold.keys() == set(wanted.split())
        for key, gold_grad in gold.items():
            assert relative_error(found[key], gold_grad) <= rtol, f"{route}: gradient of {key}"


def test_a_custom_function_is_an_objective():
    """Any differentiable function of the per-pair numbers, here of both sides and the lengths."""

    def formula(c, r, nw, nl, *_, **__):
        return (c - 0.1).square() / nw + torch.exp(0.1 * r) + c * r / nl

    p = make_problem(masked=True)
    gold_p = p.leaves()
    gold = grads_of(gold_p, gold_loss(gold_p, formula))
    for route, is_wanted in ROUTES.items():
        q = p.leaves()
        found = grads_of(
            q, preference(q, formula, workspace_mib=workspace_for(p, is_wanted, 2)).loss
        )
        for key, gold_grad in gold.items():
            assert relative_error(found[key], gold_grad) <= 1e-12, f"{route}: gradient of {key}"


@pytest.mark.parametrize("returned", ["mean", "constant", "number"])
def test_objective_that_returns_no_loss_a_pair(returned):
    results = {
        "mean": lambda c, *_: c.mean(),
        "constant": lambda c, *_: torch.ones_like(c),
        "number": lambda c, *_: 1.0,
    }
    with pytest.raises(ValueError, match="objective must return"):
        preference(make_problem().leaves(), results[returned])


@pytest.fixture
def stashes(monkeypatch):
    """Bytes of every stash allocated during a test, the lent buffers included."""
    monkeypatch.setattr(Stash, "_idle", [])
    taken = []
    take = Stash._take.__func__

    def measured(cls, numel, dtype, device):
        buffer = take(cls, numel, dtype, device)
        taken.append(buffer.numel() * buffer.element_size())
        return buffer

    monkeypatch.setattr(Stash, "_take", classmethod(measured))
    return taken


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("wanted", ["h w", "h"])
def test_stashes_stay_inside_the_workspace(stashes, route, wanted):
    p = make_problem(V=303, dtype=torch.float32)
    workspace = workspace_for(p, ROUTES[route])
    q = p.leaves(wanted)
    result = preference(q, lr_dpo(BETA), workspace_mib=workspace)
    result.loss.backward()
    assert result.plan.workspace_bytes == int(workspace * MIB)
    if route == "recompute" and wanted == "h w":
        assert not stashes
        return
    assert 0 < max(stashes) <= result.plan.workspace_bytes
    # As large as the rows of the largest block, so as few blocks as the workspace allows.
    longest = max(stop - start for start, stop in result.plan.spans)
    assert max(stashes) == longest * 303 * 4


def test_a_freed_stash_is_used_again(stashes):
    p = make_problem(V=303).leaves()
    for _ in range(3):
        preference(p, lr_dpo(BETA)).loss.backward()
    assert len(stashes) == 3 and len(Stash._idle) == 1


def test_accumulators_of_the_plan():
    """What the plan reports beside the workspace: fp32 buffers of the head and the hidden rows."""
    p = make_problem(dtype=torch.bfloat16)
    T, D, V = p.h_TD.shape[0], 8, 101
    q = p.leaves()
    found = {}
    for route, is_wanted in ROUTES.items():
        for buffers, objective in ((1, lr_dpo()), (2, nca_pair())):
            workspace = workspace_for(p, is_wanted, buffers)
            plan = preference(q, objective, workspace_mib=workspace).plan
            rows = [g.rows for g in plan.groups if g.unit] if route == "unit" else []
            longest = max((stop - start for start, stop in rows), default=0)
            found[route, buffers] = plan.accumulator_bytes - 4 * D * (T + longest)
    head = 4 * V * D
    assert found["stash", 1] == found["stash", 2] == 0
    assert found["grouped", 1] == found["grouped", 2] == head
    assert (found["unit", 1], found["unit", 2]) == (2 * head, 3 * head)
    assert 0 < found["recompute", 1] < head


# -------------------------------------------------------------------------------------- first loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case_name", ["plain", "bias-softcap", "masked", "repeats"])
def test_first_loss_is_log_2_on_every_route(case_name, dtype):
    """The reference saw the same packed rows: the same instructions, so the same bits."""
    kwargs = {**CASES[case_name], "D": 8, "V": 301}
    p = make_problem(peak=30.0, dtype=dtype, **kwargs)
    p.ref_logp_S = p.ref_logp_S.float()  # the policy's sums are taken in the reference's precision
    for wanted in ("h w", "h", ""):
        for is_wanted in ROUTES.values():
            workspace = workspace_for(p, is_wanted)
            with torch.no_grad():
                seen = preference(p, lr_dpo(BETA), workspace_mib=workspace)
            assert seen.plan.route == "forward"
            q = p.leaves(wanted)
            first = preference(q, lr_dpo(BETA), ref_logp_S=seen.logp_S, workspace_mib=workspace)
            assert torch.equal(first.loss.detach(), LOG_2)
            own = preference(
                q,
                lr_dpo(BETA),
                ref_logp_S=None,
                ref_h_TD=p.h_TD,
                ref_w_VD=p.w_VD,
                ref_bias_V=p.bias_V,
                workspace_mib=workspace,
            )
            assert torch.equal(own.loss.detach(), LOG_2)
            assert torch.equal(own.logp_S, own.ref_logp_S)
            assert first.metrics["rewards/margins"] == own.metrics["rewards/margins"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_first_loss_is_log_2_with_sums_of_linear_logp(dtype):
    p = case("realistic", dtype)
    sizes = p.bounds_S1.diff().tolist()
    with torch.no_grad():
        logp_N = linear_logp(p.h_TD, p.w_VD, p.target_N, **p.head)
    ref_logp_S = torch.stack([part.sum() for part in logp_N.split(sizes)])
    result = preference(p.leaves(), lr_dpo(BETA), ref_logp_S=ref_logp_S)
    assert result.plan.route == "stash"
    assert torch.equal(result.loss.detach(), LOG_2)


def test_reference_from_hidden_rows_is_the_reference_from_sums():
    p = make_problem(masked=True, softcap=8.0, bias=True)
    other = make_problem(D=12, masked=True, softcap=8.0, bias=True, seed=1)
    other.target_N = p.target_N
    ref_logp_S = reference.sequence_sums(gold_logp(other), p.bounds_S1)
    for is_wanted in ROUTES.values():
        workspace = workspace_for(p, is_wanted)
        sums, rows = p.leaves(), p.leaves()
        from_sums = preference(sums, lr_dpo(), ref_logp_S=ref_logp_S, workspace_mib=workspace)
        from_rows = preference(
            rows,
            lr_dpo(),
            ref_logp_S=None,
            ref_h_TD=other.h_TD.requires_grad_(),
            ref_w_VD=other.w_VD.requires_grad_(),
            ref_bias_V=other.bias_V,
            workspace_mib=workspace,
        )
        torch.testing.assert_close(from_rows.ref_logp_S, ref_logp_S, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(from_rows.loss, from_sums.loss, rtol=1e-12, atol=0)
        gold = grads_of(sums, from_sums.loss)
        for name, dx in grads_of(rows, from_rows.loss).items():
            assert relative_error(dx, gold[name]) <= 1e-12
    assert other.h_TD.grad is None and other.w_VD.grad is None  # a reference is never trained


# ---------------------------------------------------------------------------------------- autograd
def small(route: str, **options):
    """As few numbers as the route needs: only a large head is worth recomputing."""
    D, V = (16, 67) if route == "recompute" else (2, 11)
    return make_problem((2, 1, 3, 2), D, V, **options)


def check_gradients(op, inputs):
    return torch.autograd.gradcheck(op, inputs, fast_mode=sum(x.numel() for x in inputs) > 500)


@pytest.mark.parametrize("route", ["stash", "recompute", "frozen"])
def test_gradcheck_linear_logp(route):
    p = small(route, bias=True, softcap=5.0, scale=0.7, masked=True, repeats=True)
    workspace = workspace_for(p, ROUTES["recompute"]) if route == "recompute" else None
    q = p.leaves("h" if route == "frozen" else "h w bias")

    def op(h_TD, w_VD, bias_V):
        options = {**q.head, "bias_V": bias_V, "workspace_mib": workspace}
        return linear_logp(h_TD, w_VD, q.target_N, **options)

    assert check_gradients(op, (q.h_TD, q.w_VD, q.bias_V))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("route", [*ROUTES, "frozen"])
def test_gradcheck_linear_preference_loss(route, name):
    objective, _, _ = OBJECTIVES[name]
    p = small(route, bias=True, softcap=5.0)
    workspace = None
    if route != "frozen":
        workspace = workspace_for(p, ROUTES[route], 1 if objective.by_margin else 2)
    q = p.leaves("h" if route == "frozen" else "h w bias")

    def op(h_TD, w_VD, bias_V):
        moved = replace(q, h_TD=h_TD, w_VD=w_VD, bias_V=bias_V)
        return preference(moved, objective, workspace_mib=workspace).loss

    assert check_gradients(op, (q.h_TD, q.w_VD, q.bias_V))


OPS = {
    "linear_logp": lambda p, **o: linear_logp(p.h_TD, p.w_VD, p.target_N, **p.head, **o).sum(),
    "linear_preference_loss": lambda p, **o: preference(p, lr_dpo(BETA), **o).loss,
}
ROUTED_OPS = [("linear_logp", "stash"), ("linear_logp", "recompute"), ("linear_logp", "frozen")]
ROUTED_OPS += [("linear_preference_loss", route) for route in [*ROUTES, "frozen"]]


def routed(op, route, p):
    """An op's loss by a route, and the leaves it trains."""
    workspace = None if route == "frozen" else workspace_for(p, ROUTES[route])
    q = p.leaves("h" if route == "frozen" else "h w")
    return OPS[op](q, workspace_mib=workspace), q


@pytest.mark.parametrize(("op", "route"), ROUTED_OPS)
def test_double_backward_is_refused(op, route):
    loss, q = routed(op, route, make_problem())
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(loss, q.h_TD, create_graph=True)


@pytest.mark.parametrize(("op", "route"), ROUTED_OPS)
def test_backward_twice_gives_the_same_gradients(op, route):
    loss, q = routed(op, route, make_problem())
    loss.backward(retain_graph=True)
    first = {name: dx.clone() for name, dx in q.grads().items()}
    q.h_TD.grad = q.w_VD.grad = None
    loss.backward(retain_graph=True)
    assert first.keys() == q.grads().keys()
    assert all(torch.equal(dx, q.grads()[name]) for name, dx in first.items())
    # And a factor on the loss is a factor on the gradients, exactly where it is a power of two.
    q.h_TD.grad = q.w_VD.grad = None
    (loss * -4).backward()
    assert all(torch.equal(-4 * dx, q.grads()[name]) for name, dx in first.items())


@pytest.mark.parametrize(("op", "route"), ROUTED_OPS)
@pytest.mark.parametrize("tensor", ["h_TD", "w_VD"])
def test_modified_in_place_before_the_backward(op, route, tensor):
    loss, q = routed(op, route, make_problem())
    with torch.no_grad():
        getattr(q, tensor).mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_the_loss_carries_a_gradient():
    result = preference(make_problem().leaves(), lr_dpo(), stats=("entropy",))
    tensors = [result.logp_S, result.ref_logp_S, *result.metrics.values(), *result.stats.values()]
    assert result.loss.requires_grad and not any(x.requires_grad for x in tensors)


def test_a_result_is_a_mapping_of_tensors_and_a_pytree():
    from accelerate.utils.operations import convert_to_fp32, send_to_device
    from torch.utils._pytree import tree_leaves, tree_map

    result = preference(make_problem().leaves(), lr_dpo(), stats=("entropy",))
    names = ["loss", "logp_S", "ref_logp_S", "lengths_S"]
    assert isinstance(result, dict) and list(result) == names
    assert all(getattr(result, name) is result[name] is result[i] for i, name in enumerate(names))
    assert [id(x) for x in result[1:]] == [id(result[name]) for name in names[1:]]
    assert any(x is result.loss for x in tree_leaves(result))

    halves = tree_map(lambda x: x.detach() / 2, result)
    assert type(halves) is PreferenceLoss and halves.plan == result.plan
    assert torch.equal(2 * halves.logp_S, result.logp_S)
    assert 2 * halves.metrics["logps/chosen"] == result.metrics["logps/chosen"]
    for twin in (pickle.loads(pickle.dumps(halves)), copy.deepcopy(halves), copy.copy(halves)):
        assert type(twin) is PreferenceLoss and twin.plan == halves.plan
        for a, b in zip(tree_leaves(twin), tree_leaves(halves), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    # What rebuilds mappings from their items: accelerate, and DataParallel's gathering.
    for rebuilt in (convert_to_fp32(result), send_to_device(result, "cpu")):
        assert type(rebuilt) is PreferenceLoss and rebuilt.loss is result.loss
        assert rebuilt.metrics == {} and rebuilt.plan is None
    assert type(result)((name, result[name]) for name in result).logp_S is result.logp_S


# -------------------------------------------------------------------------------------- properties
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_alpha_0_is_plain_dpo_to_the_bit(dtype):
    p = make_problem(dtype=dtype)
    plain, zero = p.leaves(), p.leaves()
    dpo = linear_dpo_loss(*plain.packed, p.ref_logp_S, beta=BETA)
    with_alpha = linear_dpo_loss(*zero.packed, p.ref_logp_S, beta=BETA, alpha=0.0)
    assert torch.equal(dpo.loss, with_alpha.loss)
    found, wanted = grads_of(zero, with_alpha.loss), grads_of(plain, dpo.loss)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    # And to the bit of fp32 what the plain formula gives on the op's own sums.
    d_P = (dpo.logp_S - dpo.ref_logp_S).double().view(-1, 2)
    loss = -torch.nn.functional.logsigmoid(BETA * (d_P[:, 0] - d_P[:, 1])).mean()
    assert torch.equal(dpo.loss, loss.float())


def test_alpha_moves_the_loss_by_the_length_difference():
    p = make_problem(PAIR_SIZES[:2])  # 4 chosen, 3 rejected tokens
    plain = linear_dpo_loss(*p.packed, p.ref_logp_S, beta=BETA, margin_P=torch.tensor([0.5]))
    by_length = linear_dpo_loss(*p.packed, p.ref_logp_S, beta=BETA, alpha=0.5)
    torch.testing.assert_close(by_length.loss, plain.loss, rtol=1e-14, atol=0)
    assert by_length.metrics["length_margin"] == 0.5


def moved_pairs(p, order: list[int]):
    """The problem with its sequences in another order."""
    parts = [torch.arange(a, b) for a, b in zip(p.bounds_S1.tolist(), p.bounds_S1[1:].tolist())]
    index_N = torch.cat([parts[s] for s in order])
    sizes_S = p.bounds_S1.diff()[order]
    return replace(
        p,
        target_N=p.target_N[index_N],
        rows_N=index_N if p.rows_N is None else p.rows_N[index_N],
        bounds_S1=torch.cat([torch.zeros(1, dtype=torch.int64), sizes_S.cumsum(0)]),
        ref_logp_S=p.ref_logp_S[order],
    )


@pytest.mark.parametrize("route", ROUTES)
def test_swapping_sides_negates_the_margins(route):
    p = make_problem(masked=True)
    q = moved_pairs(p, [1, 0, 3, 2, 5, 4, 7, 6])
    found, swapped = (
        preference(x, lr_dpo(BETA, 0.1), workspace_mib=workspace_for(p, ROUTES[route])).metrics
        for x in (p, q)
    )
    for name in ("rewards/margins", "length_margin"):
        assert found[name] != 0
        torch.testing.assert_close(swapped[name], -found[name])
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        for kind in ("rewards", "logps", "lengths"):
            torch.testing.assert_close(swapped[f"{kind}/{side}"], found[f"{kind}/{other}"])
    assert swapped["rewards/accuracies"] == 1 - found["rewards/accuracies"]


@pytest.mark.parametrize("route", ROUTES)
def test_permuting_pairs_permutes(route):
    p = make_problem(masked=True)
    order = [6, 7, 2, 3, 0, 1, 4, 5]
    workspace = workspace_for(p, ROUTES[route])
    plain, permuted = p.leaves(), moved_pairs(p, order).leaves()
    wanted = preference(plain, lr_dpo(BETA, 0.1), workspace_mib=workspace)
    found = preference(permuted, lr_dpo(BETA, 0.1), workspace_mib=workspace)
    torch.testing.assert_close(found.logp_S, wanted.logp_S[order], rtol=1e-12, atol=1e-12)
    assert torch.equal(found.lengths_S, wanted.lengths_S[order])
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-12, atol=0)
    gold = grads_of(plain, wanted.loss)
    for name, dx in grads_of(permuted, found.loss).items():
        assert relative_error(dx, gold[name]) <= 1e-12


@pytest.mark.parametrize("route", ROUTES)
def test_microbatches_sum_to_the_batch(route):
    p = make_problem(masked=True)
    workspace = workspace_for(p, ROUTES[route])
    whole, parts = p.leaves(), p.leaves()
    loss = preference(whole, lr_dpo(BETA, 0.1), workspace_mib=workspace).loss
    gold = grads_of(whole, loss)
    total = 0.0
    for s0, s1 in ((0, 2), (2, 8)):
        n0, n1 = int(p.bounds_S1[s0]), int(p.bounds_S1[s1])
        result = linear_preference_loss(
            parts.h_TD,
            parts.w_VD,
            p.target_N[n0:n1],
            p.bounds_S1[s0 : s1 + 1] - n0,
            p.ref_logp_S[s0:s1],
            lr_dpo(BETA, 0.1),
            rows_N=torch.arange(n0, n1),
            num_pairs=p.num_pairs,
            workspace_mib=workspace,
        )
        result.loss.backward()
        total += float(result.loss.detach())
    assert total == pytest.approx(float(loss.detach()), rel=1e-12)
    for name, dx in parts.grads().items():
        assert relative_error(dx, gold[name]) <= 1e-12


def test_one_vector_added_to_all_rows_of_the_head_changes_nothing():
    p = make_problem(D=32, V=503, dtype=torch.float32, peak=20.0)
    shifted = p.w_VD + torch.randn(32)
    logp_N = linear_logp(p.h_TD, p.w_VD, p.target_N)
    assert max_error(linear_logp(p.h_TD, shifted, p.target_N), logp_N) <= 5e-5


@pytest.mark.parametrize("wanted", ["h w bias", "h", "w", "bias"])
def test_all_masked_linear_logp_is_zero_and_connected(wanted):
    p = make_problem([5], bias=True, dtype=torch.bfloat16).leaves(wanted)
    target_N = torch.full((5,), reference.IGNORE)
    logp_N = linear_logp(p.h_TD, p.w_VD, target_N, bias_V=p.bias_V)
    assert logp_N.dtype == torch.float32 and logp_N.tolist() == [0.0] * 5
    grads = grads_of(p, logp_N.sum())
    assert grads.keys() == set(wanted.split())
    assert not any(dx.any() for dx in grads.values())


@pytest.mark.parametrize(("op", "route"), ROUTED_OPS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_rows_that_are_not_scored_do_not_leak(op, route, bad):
    """Rows outside rows_N, and rows whose target is -100."""
    p = make_problem(masked=True, unused_rows=6, bias=True, softcap=9.0)
    assert p.rows_N is not None
    scored_N = p.target_N != reference.IGNORE
    unread_T = torch.ones(p.h_TD.shape[0], dtype=torch.bool)
    unread_T[p.rows_N[scored_N]] = False
    assert unread_T.sum() > 6  # the unused ones and the masked ones
    clean_loss, clean = routed(op, route, p)
    p.h_TD[unread_T] = bad
    loss, q = routed(op, route, p)
    assert torch.equal(loss, clean_loss)
    gold = grads_of(clean, clean_loss)
    for name, dx in grads_of(q, loss).items():
        assert torch.equal(dx, gold[name])
    assert not grad(q.h_TD)[unread_T].any()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strided_inputs(route, dtype):
    p = make_problem(dtype=dtype, bias=True)
    workspace = workspace_for(p, ROUTES[route])
    plain = p.leaves()
    strided = p.leaves()
    strided.h_TD = torch.stack([p.h_TD, p.h_TD], 2)[:, :, 0].detach().requires_grad_()
    strided.w_VD = p.w_VD.T.contiguous().T.detach().requires_grad_()
    assert not strided.h_TD.is_contiguous() and not strided.w_VD.is_contiguous()
    wanted = preference(plain, lr_dpo(BETA), workspace_mib=workspace).loss
    loss = preference(strided, lr_dpo(BETA), workspace_mib=workspace).loss
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    gold = grads_of(plain, wanted)
    for name, dx in grads_of(strided, loss).items():
        assert relative_error(dx, gold[name]) <= (1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("route", ["stash", "recompute", "frozen"])
def test_many_more_hidden_rows_than_targets(route):
    p = make_problem([6, 5, 4, 7], unused_rows=4000)
    loss, q = routed("linear_logp", route, p)
    gold_p = p.leaves("h" if route == "frozen" else "h w")
    gold = grads_of(gold_p, gold_logp_with_graph(gold_p).sum())
    for name, dx in grads_of(q, loss).items():
        assert relative_error(dx, gold[name]) <= 1e-12
    assert int(grad(q.h_TD).any(1).sum()) == 22


@pytest.mark.parametrize(("op", "route"), ROUTED_OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_two_runs_agree_bit_for_bit(op, route, dtype):
    p = make_problem(V=1201, dtype=dtype, repeats=True, softcap=20.0)
    runs = []
    for _ in range(2):
        loss, q = routed(op, route, p)
        runs.append({"loss": loss.detach(), **grads_of(q, loss)})
    assert all(torch.equal(x, runs[1][name]) for name, x in runs[0].items())


# ------------------------------------------------------------------------------------------ module
def padded_and_packed(dtype=torch.float64, B=3, L=7, D=8, V=53):
    """TRL's layout, and the same pairs packed by hand, one token at a time."""
    p = make_problem([L] * (2 * B), D, V, dtype=dtype)
    h_BLD = p.h_TD.view(2 * B, L, D)
    target_BL = p.target_N.view(2 * B, L).clone()
    for b in range(2 * B):  # a prompt at the left, padding at the right
        target_BL[b, : 1 + b % 3] = reference.IGNORE
        target_BL[b, L - b % 2 :] = reference.IGNORE
    ref_logp_B = -torch.rand(2 * B, dtype=torch.float64) * 10
    rows, targets, edges, refs = [], [], [0], []
    for pair in range(B):
        for b in (pair, B + pair):
            for t in range(L):
                if target_BL[b, t] != reference.IGNORE:
                    rows.append(b * L + t)
                    targets.append(int(target_BL[b, t]))
            edges.append(len(rows))
            refs.append(ref_logp_B[b])
    packed = {
        "target_N": torch.tensor(targets),
        "bounds_S1": torch.tensor(edges),
        "ref_logp_S": torch.stack(refs),
        "rows_N": torch.tensor(rows),
    }
    return h_BLD, p.w_VD, target_BL, ref_logp_B, packed


@pytest.mark.parametrize("workspace_mib", [None, 0.008])
def test_padded_layout_is_the_packed_op(workspace_mib):
    h_BLD, w_VD, target_BL, ref_logp_B, packed = padded_and_packed()
    options = {"workspace_mib": workspace_mib, "stats": ("entropy", "top1")}
    margin_P = torch.tensor([0.1, -0.2, 0.3])
    leaves = [x.clone().requires_grad_() for x in (h_BLD, w_VD, h_BLD.reshape(-1, 8), w_VD)]
    module = LinearDPOLoss(beta=BETA, alpha=0.05, **options)
    found = module(leaves[0], leaves[1], target_BL, ref_logp_S=ref_logp_B, margin_P=margin_P)
    wanted = linear_dpo_loss(
        leaves[2], leaves[3], beta=BETA, alpha=0.05, margin_P=margin_P, **packed, **options
    )
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-12, atol=0)
    found.loss.backward()
    wanted.loss.backward()
    assert relative_error(grad(leaves[0]).reshape(-1, 8), grad(leaves[2])) <= 1e-12
    assert relative_error(grad(leaves[1]), grad(leaves[3])) <= 1e-12
    # The module keeps the padded order: all chosen first.
    order = [0, 2, 4, 1, 3, 5]
    torch.testing.assert_close(found.logp_S, wanted.logp_S[order], rtol=1e-12, atol=0)
    assert torch.equal(found.ref_logp_S, ref_logp_B)
    assert torch.equal(found.lengths_S, (target_BL != reference.IGNORE).sum(1))
    assert found.metrics.keys() == wanted.metrics.keys()
    for name, value in wanted.metrics.items():
        torch.testing.assert_close(found.metrics[name], value)
    for name, values in wanted.stats.items():
        in_rows = torch.zeros(42, dtype=torch.float64).index_copy(0, packed["rows_N"], values)
        torch.testing.assert_close(found.stats[name], in_rows.view(6, 7), rtol=1e-12, atol=1e-13)


def test_padded_reference_rows_are_the_padded_reference_sums():
    h_BLD, w_VD, target_BL, _, _ = padded_and_packed()
    ref_h_BLD, module = h_BLD + 0.3 * torch.randn_like(h_BLD), LinearDPOLoss(BETA)
    ref_logp_N = reference.linear_logp(ref_h_BLD.view(-1, 8), w_VD, target_BL.view(-1))
    sums = module(h_BLD, w_VD, target_BL, ref_logp_S=ref_logp_N.view(6, 7).sum(1))
    rows = module(h_BLD, w_VD, target_BL, ref_h_TD=ref_h_BLD, ref_w_VD=w_VD)
    torch.testing.assert_close(rows.ref_logp_S, sums.ref_logp_S, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.loss, sums.loss, rtol=1e-12, atol=0)


def test_module_with_packed_rows_is_the_op_and_calls_override_settings():
    p = make_problem(softcap=9.0)
    module = LinearDPOLoss(beta=0.5, alpha=0.1, softcap=9.0)
    found = module(*p.packed, p.ref_logp_S)
    wanted = linear_dpo_loss(*p.packed, p.ref_logp_S, beta=0.5, alpha=0.1, softcap=9.0)
    assert torch.equal(found.loss, wanted.loss) and torch.equal(found.logp_S, wanted.logp_S)
    overridden = module(*p.packed, p.ref_logp_S, softcap=None, beta=0.1)
    wanted = linear_dpo_loss(*p.packed, p.ref_logp_S, beta=0.1, alpha=0.1)
    assert torch.equal(overridden.loss, wanted.loss)
    assert repr(module) == "LinearDPOLoss(beta=0.5, alpha=0.1, softcap=9.0)"
    assert not list(module.parameters())


# ------------------------------------------------------------------------- statistics and metrics
@pytest.mark.parametrize("route", [*ROUTES, "frozen", "forward"])
@pytest.mark.parametrize("softcap", [None, 7.0])
def test_token_statistics(route, softcap):
    p = make_problem(V=2051, masked=True, repeats=True, bias=True, softcap=softcap, peak=12.0)
    other = make_problem(V=2051, repeats=True, bias=True, softcap=softcap, peak=12.0, seed=1)
    names = ("entropy", "mean_logit", "top1", "log_sum_sq_probs", "kl_ref")
    z_NV = reference.linear_logits(p.h_TD, p.w_VD, **p.head)
    # Make some targets the most likely tokens, or top1 would be zero everywhere.
    p.target_N[::5] = z_NV.argmax(1)[::5]
    ref_z_NV = reference.linear_logits(other.h_TD, other.w_VD, **{**p.head, "bias_V": other.bias_V})
    gold = reference.token_stats(z_NV, p.target_N, ref_z_NV)
    assert 0 < gold["top1"].sum() < len(gold["top1"])
    small = route if route in ROUTES else "recompute"
    result = preference(
        p.leaves({"frozen": "h", "forward": ""}.get(route, "h w")),
        lr_dpo(),
        ref_logp_S=None,
        ref_h_TD=other.h_TD,
        ref_w_VD=other.w_VD,
        ref_bias_V=other.bias_V,
        stats=names,
        workspace_mib=workspace_for(p, ROUTES[small]),
    )
    assert result.plan.route == {"unit": "grouped"}.get(route, route)
    assert result.plan.vocab_chunk < 2051
    assert result.stats.keys() == set(names)
    for name, values in gold.items():
        torch.testing.assert_close(result.stats[name], values, rtol=1e-11, atol=1e-12, msg=name)


def test_statistics_are_only_those_asked_for():
    p = make_problem()
    assert preference(p, lr_dpo()).stats == {}
    assert preference(p, lr_dpo(), stats=("top1",)).stats.keys() == {"top1"}


def test_statistics_do_not_change_the_loss():
    p = make_problem(dtype=torch.float32, softcap=9.0)
    plain, asked = p.leaves(), p.leaves()
    stats = ("entropy", "mean_logit", "top1", "log_sum_sq_probs")
    wanted, found = preference(plain, lr_dpo()), preference(asked, lr_dpo(), stats=stats)
    assert torch.equal(found.loss, wanted.loss)
    gold = grads_of(plain, wanted.loss)
    assert all(torch.equal(x, gold[name]) for name, x in grads_of(asked, found.loss).items())


def test_metrics_are_trls():
    p = make_problem(masked=True)
    result = preference(p, lr_dpo(BETA, alpha=0.05))
    logp_P2 = reference.sequence_sums(gold_logp(p), p.bounds_S1).view(-1, 2)
    reward_P2 = BETA * (logp_P2 - p.ref_logp_S.view(-1, 2))
    n_P2 = reference.sequence_sums((p.target_N != reference.IGNORE).double(), p.bounds_S1)
    n_P2 = n_P2.view(-1, 2)
    wanted = {
        "rewards/chosen": reward_P2[:, 0].mean(),
        "rewards/rejected": reward_P2[:, 1].mean(),
        "rewards/accuracies": (reward_P2[:, 0] > reward_P2[:, 1]).double().mean(),
        "rewards/margins": (reward_P2[:, 0] - reward_P2[:, 1]).mean(),
        "logps/chosen": logp_P2[:, 0].mean(),
        "logps/rejected": logp_P2[:, 1].mean(),
        "lengths/chosen": n_P2[:, 0].mean(),
        "lengths/rejected": n_P2[:, 1].mean(),
        "length_margin": 0.05 * (n_P2[:, 0] - n_P2[:, 1]).mean(),
    }
    assert 0 < wanted["rewards/accuracies"] < 1
    assert result.metrics.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(result.metrics[name]) == pytest.approx(float(value), rel=1e-6), name
    assert torch.equal(result.lengths_S, n_P2.view(-1).long())


def test_equal_rewards_are_not_accurate():
    """TRL's accuracy is strict, so a policy equal to its reference has accuracy 0."""
    p = make_problem()
    seen = preference(p, lr_dpo())
    again = preference(p, lr_dpo(), ref_logp_S=seen.logp_S)
    assert again.metrics["rewards/accuracies"] == 0


# ------------------------------------------------------------------------------ dtypes and choices
def test_dtype_of_the_sums_is_that_of_the_reference():
    p = make_problem([150, 90], dtype=torch.bfloat16)
    logp_N = linear_logp(p.h_TD, p.w_VD, p.target_N)
    for dtype in (torch.float32, torch.float64):
        result = preference(p.leaves(), lr_dpo(), ref_logp_S=p.ref_logp_S.to(dtype))
        assert result.logp_S.dtype == result.ref_logp_S.dtype == dtype
        assert result.loss.dtype == torch.float32
        assert torch.equal(result.logp_S, reference.sequence_sums(logp_N.to(dtype), p.bounds_S1))


def test_int32_bounds():
    p = make_problem()
    wanted = preference(p, lr_dpo()).loss
    assert torch.equal(preference(replace(p, bounds_S1=p.bounds_S1.int()), lr_dpo()).loss, wanted)


def test_implementation_torch_is_the_default_on_a_cpu():
    p = make_problem(dtype=torch.float32)
    runs = []
    for impl in ("auto", "torch"):
        q = p.leaves()
        loss = preference(q, lr_dpo(), impl=impl).loss
        logp_N = linear_logp(p.h_TD, p.w_VD, p.target_N, impl=impl)
        runs.append([loss.detach(), logp_N, *grads_of(q, loss).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("op", OPS)
def test_implementation_triton_is_refused_on_a_cpu(op, monkeypatch):
    monkeypatch.setattr(support, "is_interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run.*'cpu'"):
        OPS[op](make_problem(dtype=torch.float32), impl="triton")


@pytest.mark.parametrize("workspace_mib", [256, 0.1], ids=["stash", "grouped"])
def test_a_kept_loss_keeps_no_workspace(workspace_mib):
    import gc

    h = torch.randn(40, 16, requires_grad=True)
    w = torch.randn(997, 16, requires_grad=True)
    target, bounds = torch.randint(997, (40,)), torch.arange(5) * 10

    def held():
        gc.collect()
        return [x for x in gc.get_objects() if type(x) in (Stash, Grads)]

    result = linear_dpo_loss(
        h, w, target, bounds, torch.zeros(4), workspace_mib=workspace_mib, beta=0.1
    )
    assert held()
    result.loss.backward()
    assert not held()
    with pytest.raises(RuntimeError, match="second time"):
        result.loss.backward()


def test_a_vocabulary_chunk_of_minus_infinity():
    """Padded vocabularies mask whole ranges of tokens through the bias."""
    h = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3000, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3000, dtype=torch.float64)
    bias[900:] = -torch.inf
    target = torch.randint(900, (6,))
    gold = reference.linear_logp(h, w, target, bias_V=bias)
    ours = linear_logp(h, w, target, bias_V=bias)
    torch.testing.assert_close(ours, gold, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(gold.sum(), (h, w))
    got = torch.autograd.grad(ours.sum(), (h, w))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_targets_modified_before_the_backward():
    h, w = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    target = torch.randint(49, (6,))
    logp = linear_logp(h, w, target)
    target += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


def test_inference_mode():
    h, w, target = torch.randn(6, 8), torch.randn(50, 8), torch.randint(50, (6,))
    arguments = (h, w, target, torch.tensor([0, 3, 6]), torch.zeros(2))
    outside = linear_dpo_loss(*arguments).loss
    with torch.inference_mode():
        assert torch.equal(linear_dpo_loss(*arguments).loss, outside)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_constant_objective_is_an_error_with_and_without_gradients(requires_grad):
    h = torch.randn(6, 8, requires_grad=requires_grad)
    arguments = h, torch.randn(50, 8), torch.randint(50, (6,)), torch.tensor([0, 3, 6])
    with pytest.raises(ValueError, match="objective"):
        linear_preference_loss(*arguments, torch.zeros(2), lambda c, *_: c.detach())


def test_scored_targets_of_a_padded_batch():
    target_N = torch.tensor([-100, 3, 4, -100, 5, -100, -100, -100, 0])
    keep_N, bounds_S1 = module._scored(target_N, 3)
    assert keep_N.tolist() == [1, 2, 4, 8]
    assert bounds_S1.tolist() == [0, 2, 3, 4]
