"""The ops on a GPU: heads of real models, every route, memory, synchronization, graphs.

Gold values are fp64 products on the device, a chunk of the vocabulary at a time; gradients are
compared on slices.  No test of this file runs without a CUDA device; on a CPU its shapes are so
small that the interpreter can run most bodies when the skip is lifted.

Legend: T hidden rows, N targets, D hidden, V vocabulary, P pairs, S = 2P sequences, R sampled rows,
C sampled columns (vocabulary entries).
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import BETA, ROUTES, Problem, preference, relative_error
from torch import Tensor

from fastdpo import linear_dpo_loss, linear_kl, linear_logp
from fastdpo.loss import reference
from fastdpo.loss.choices import CHOICES
from fastdpo.loss.examples import Examples
from fastdpo.loss.lists import lipo_lambda, plackett_luce
from fastdpo.loss.objectives import given_slopes, lr_dpo, nca_pair, orpo
from fastdpo.loss.plan import MIB, Plan, make_plan
from fastdpo.loss.reference import IGNORE
from fastdpo.loss.singles import kto
from fastdpo.loss.tokens import tdpo2

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ALPHA = 0.02
LOG_2 = torch.tensor(2.0).log()
U = 2.0**-24  # largest relative error of one rounding to fp32
# Error of a gradient that rounding stash and result to a dtype explains, and some more.
FLOOR = {BF16: 2.5e-3, FP16: 3.2e-4, FP32: 1e-5}
# fp16 gradients below 6e-5 lose digits; training multiplies the loss to avoid that.
FACTOR = {BF16: 1.0, FP16: 1024.0, FP32: 1.0}
CHUNK_NUMEL = 2**26  # of logits in fp64 at a time


# ---------------------------------------------------------------------------------------- problems
@dataclass(frozen=True)
class Shape:
    """A head and how many tokens of how many pairs it scores."""

    D: int
    V: int
    N: int
    P: int = 4
    softcap: float | None = None
    scale: float = 1.0
    bias: bool = False
    first_share: float | None = None  # of the tokens, for the first pair; None: all are alike


def sized(shape: Shape, N: int, V: int, D: int = 64) -> Shape:
    """The shape on a GPU; on a CPU as many features of it as the interpreter can bear."""
    return shape if ON_GPU else replace(shape, N=N, V=V, D=min(D, shape.D))


HEADS = {
    "Llama-3-8B": sized(Shape(4096, 128_256, 4096, P=5), 70, 521),
    "Qwen2.5-7B": sized(Shape(3584, 152_064, 3000), 60, 301),
    "Gemma-2-9B": sized(Shape(3584, 256_000, 2048, softcap=30.0), 50, 700),
    "Llama-3.2-1B": sized(Shape(2048, 128_256, 4096, P=7), 80, 400),
    "SmolLM2": sized(Shape(576, 49_152, 6000, P=9), 90, 257),
}
# A head whose gold gradients are quick, with one long pair.
MODERATE = sized(Shape(1024, 32_000, 2048, P=5, bias=True, first_share=0.6), 90, 521, D=16)


def sizes_of(shape: Shape) -> list[int]:
    """Ragged sequences: no two of one length, where there are tokens enough."""
    S = 2 * shape.P
    weights = [1.0 + 0.37 * (s * 5 % S) for s in range(S)]
    if shape.first_share is not None:
        rest = sum(weights[2:])
        share = shape.first_share / (1 - shape.first_share)
        weights[:2] = [0.55 * share * rest, 0.45 * share * rest]
    edges = [0, *(round(shape.N * x / sum(weights)) for x in accumulate(weights))]
    return [stop - start for start, stop in pairwise(edges)]


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def make(shape: Shape, dtype: torch.dtype = BF16, seed: int = 0) -> Problem:
    """Packed pairs: targets from hopeless to certain, ignored ones, and a shared row a pair.

    The first tokens of both responses are predicted by one hidden row, as after one prompt.
    ``ref_logp_S`` is near the policy's.
    """
    sizes, D, V = sizes_of(shape), shape.D, shape.V
    N, edges = sum(sizes), [0, *accumulate(sizes)]
    generator = torch.Generator(DEVICE).manual_seed(seed)
    target_N = torch.randint(V, (N,), generator=generator, device=DEVICE)
    target_N[0], target_N[1] = 0, V - 1
    own_N = torch.arange(N, device=DEVICE)
    for pair in range(shape.P):  # no row of its own for the first token of a rejected response
        own_N[edges[2 * pair + 1] :] -= 1
        own_N[edges[2 * pair + 1]] = own_N[edges[2 * pair]]
    T = N - shape.P
    w_VD = normal(V, D, seed=seed + 1, dtype=FP32) * (2.5 / D**0.5)
    h_TD = normal(T, D, seed=seed + 2, dtype=FP32)
    lift_N = 15 * torch.rand(N, generator=generator, device=DEVICE)
    lift_N[::3] = 0.0
    lift_N[edges[1::2]] = 0.0  # one lift a hidden row, so that the sums have one order
    w_ND = w_VD[target_N]
    h_TD.index_add_(0, own_N, w_ND * (lift_N / w_ND.square().sum(1))[:, None])
    target_N[5::19] = IGNORE
    bias_V = normal(V, seed=seed + 3, dtype=dtype) if shape.bias else None
    problem = Problem(
        h_TD.to(dtype), (w_VD / shape.scale).to(dtype), target_N, torch.tensor(edges),
        torch.zeros(len(sizes), device=DEVICE), own_N, bias_V, shape.scale, shape.softcap,
    )  # fmt: skip
    logp_S = reference.sequence_sums(Streamed(problem, accumulated).logp_N, problem.bounds_S1)
    noise_S = normal(len(sizes), seed=seed + 4, dtype=FP32)
    return replace(problem, ref_logp_S=logp_S.float() + noise_S)


# -------------------------------------------------------------------------------------- gold values
def exact(a: Tensor, b: Tensor) -> Tensor:
    """A product in fp64."""
    return a.double() @ b.double()


def accumulated(a: Tensor, b: Tensor) -> Tensor:
    """A product accumulated and returned in fp32."""
    if a.dtype == FP32 or not ON_GPU:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=FP32)


def rounded(a: Tensor, b: Tensor) -> Tensor:
    """A product in the dtype of its operands, as the usual logits are."""
    return a @ b


class Streamed:
    """Log-probs, and gradients of ``sum coef * logp``, by one kind of product.

    All else is fp64.  With ``low`` the derivatives by the logits are rounded to that dtype and so
    are the gradients, as where autograd makes them.
    """

    def __init__(
        self,
        p: Problem,
        product: Callable[[Tensor, Tensor], Tensor],
        low: torch.dtype | None = None,
    ) -> None:
        self.p, self.product, self.low = p, product, low
        self.h_ND = p.h_TD.detach() if p.rows_N is None else p.h_TD.detach()[p.rows_N]
        self.w_VD = p.w_VD.detach()
        self.bias_V = None if p.bias_V is None else p.bias_V.detach()
        self.scored_N = p.target_N != IGNORE
        N = len(self.h_ND)
        self.lse_N = torch.full((N,), -torch.inf, dtype=torch.float64, device=DEVICE)
        own_N = torch.zeros_like(self.lse_N)
        for columns in self.chunks():
            z_NC = self.logits(self.h_ND, columns)
            self.lse_N = torch.logaddexp(self.lse_N, z_NC.logsumexp(1))
            at_N = p.target_N - columns[0]
            inside_N = (at_N >= 0) & (at_N < len(columns))
            picked_N = z_NC.gather(1, torch.where(inside_N, at_N, 0)[:, None])[:, 0]
            own_N = torch.where(inside_N, picked_N, own_N)
        self.logp_N = torch.where(self.scored_N, own_N - self.lse_N, 0.0)

    @cached_property
    def allowed(self) -> float:
        """The error of a log-prob, for gold ones, that a product accumulated in fp32 explains.

        Half more than the largest such error here, which grows with D, and a few roundings.
        """
        known = float((Streamed(self.p, accumulated).logp_N - self.logp_N).abs().max())
        return 1.5 * known + 4 * U * float(torch.maximum(self.lse_N.abs(), self.logp_N.abs()).max())

    def chunks(self) -> Iterator[Tensor]:
        width = max(256, CHUNK_NUMEL // len(self.h_ND))
        return iter(torch.arange(len(self.w_VD), device=DEVICE).split(width))

    def logits(self, h_ND: Tensor, columns: Tensor) -> Tensor:
        z_NC = self.product(h_ND, self.w_VD[columns].T).double()
        if self.bias_V is not None:
            z_NC += self.bias_V[columns].double()
        z_NC *= self.p.scale
        cap = self.p.softcap
        return z_NC if cap is None else cap * torch.tanh(z_NC / cap)

    def slopes(self, coef_N: Tensor, tokens: Tensor, columns: Tensor) -> Tensor:
        """Derivatives by the biased products of some tokens and columns."""
        z_NC = self.logits(self.h_ND[tokens], columns)
        own_NC = self.p.target_N[tokens, None] == columns
        g_NC = own_NC.double() - (z_NC - self.lse_N[tokens, None]).exp()
        coef_N = torch.where(self.scored_N, coef_N, 0.0)[tokens]
        g_NC *= coef_N[:, None] * self.p.scale
        if self.p.softcap is not None:
            g_NC *= 1 - (z_NC / self.p.softcap).square()
        return g_NC if self.low is None else g_NC.to(self.low).double()

    def finish(self, x: Tensor) -> Tensor:
        return x if self.low is None else x.to(self.low)

    def dh(self, coef_N: Tensor, rows_R: Tensor) -> Tensor:
        """Gradients of some hidden rows."""
        N = len(self.h_ND)
        rows_N = torch.arange(N, device=DEVICE) if self.p.rows_N is None else self.p.rows_N
        tokens = torch.isin(rows_N, rows_R).nonzero()[:, 0]
        d_ND = torch.zeros(len(tokens), self.w_VD.shape[1], dtype=torch.float64, device=DEVICE)
        for columns in self.chunks():
            d_ND += self.slopes(coef_N, tokens, columns) @ self.w_VD[columns].double()
        out = torch.zeros(self.p.h_TD.shape, dtype=torch.float64, device=DEVICE)
        return self.finish(out.index_add_(0, rows_N[tokens], d_ND)[rows_R])

    def dw(self, coef_N: Tensor, columns: Tensor) -> Tensor:
        tokens = torch.arange(len(self.h_ND), device=DEVICE)
        return self.finish(self.slopes(coef_N, tokens, columns).T @ self.h_ND.double())

    def dbias(self, coef_N: Tensor, columns: Tensor) -> Tensor:
        tokens = torch.arange(len(self.h_ND), device=DEVICE)
        return self.finish(self.slopes(coef_N, tokens, columns).sum(0))

    def dpo(self, result: Any) -> Tensor:
        """Check loss and sums of a result; return the loss's derivative by each log-prob.

        The derivative is that at the result's own sums: what it changes by their error says
        nothing of the gradient.
        """
        p = self.p
        gold_S = reference.sequence_sums(self.logp_N, p.bounds_S1)
        # As many log-probs' errors as the longest has, and the roundings of a sum.
        allowed = self.allowed * int(p.bounds_S1.diff().max()) + 2 * U * float(gold_S.abs().max())
        error = float((result.logp_S - gold_S).abs().max())
        assert error <= allowed, f"sums: {error:.2e} > {allowed:.2e}"
        leaf_S = result.logp_S.double().requires_grad_()
        lengths_S = reference.sequence_sums(self.scored_N.double(), p.bounds_S1)
        loss = reference.dpo_loss(leaf_S, p.ref_logp_S.double(), lengths_S, BETA, ALPHA).mean()
        (slope_S,) = torch.autograd.grad(loss, leaf_S)
        error, loss = abs(float(result.loss.detach()) - float(loss.detach())), float(loss.detach())
        assert error <= 4 * U * loss, f"loss: {error:.2e} from {loss}"
        return slope_S.repeat_interleave(p.bounds_S1.diff().to(DEVICE))


def samples(p: Problem, count: int = 200) -> tuple[Tensor, Tensor]:
    """Some hidden rows, shared ones among them, and columns: targets and others."""
    T, V = len(p.h_TD), len(p.w_VD)
    spread_R = torch.arange(0, T, max(1, T // count), device=DEVICE)
    shared_R = p.rows_N[p.bounds_S1[1::2].to(DEVICE)] if p.rows_N is not None else spread_R[:1]
    scored = p.target_N[p.target_N != IGNORE]
    edge_C = torch.tensor([0, V - 1], device=DEVICE)
    spread_C = torch.arange(1, V, max(1, V // count), device=DEVICE)
    rows_R = torch.cat([spread_R, shared_R]).unique()
    return rows_R, torch.cat([edge_C, scored[:: max(1, len(scored) // count)], spread_C]).unique()


def assert_gradients(
    p: Problem, found: dict[str, Tensor], gold: Streamed, coef_N: Tensor, bounds_only: bool = False
) -> None:
    """Slices of the gradients: within what rounding explains, or half the usual route's error.

    In fp32 the bound is the error of derivatives from an fp32 product, and a half more.
    ``bounds_only`` spares the usual route, so that rounding has to explain all.
    """
    dtype = p.h_TD.dtype
    rows_R, columns = samples(p)
    usual = None
    if not bounds_only:
        usual = Streamed(p, rounded, dtype) if dtype != FP32 else Streamed(p, accumulated, dtype)
    slices = {"h": ("dh", rows_R), "w": ("dw", columns), "bias": ("dbias", columns)}
    for name, x in found.items():
        method, index = slices[name]
        wanted = getattr(gold, method)(coef_N, index)
        error, bound = relative_error(x[index], wanted), FLOOR[dtype]
        if usual is not None:
            known = relative_error(getattr(usual, method)(coef_N, index), wanted)
            bound = max(bound, known / 2 if dtype != FP32 else 1.5 * known)
        assert error <= bound, f"gradient of {name}: {error:.2e} > {bound:.2e}"


def assert_log_probs(p: Problem, found_N: Tensor, gold: Streamed) -> None:
    """No worse than a product accumulated in fp32 allows, but for a few roundings."""
    error = float((found_N.double() - gold.logp_N).abs().max())
    assert not found_N[p.target_N == IGNORE].any()
    assert error <= gold.allowed, f"log-probs: {error:.2e} > {gold.allowed:.2e}"


# ------------------------------------------------------------------------------------------- routes
def plan_of(p: Problem, workspace_bytes: int, *, head: bool = True, buffers: int = 1) -> Plan:
    V, D = p.w_VD.shape
    return make_plan(
        p.bounds_S1.tolist(), D, V, itemsize=4, workspace_bytes=workspace_bytes, need_head=head,
        need_h=True, T=len(p.h_TD), unit_buffers=buffers, fused_itemsize=p.h_TD.itemsize,
        gathered=p.rows_N is not None,
    )  # fmt: skip


def workspace_of(p: Problem, route: str) -> float:
    """The largest workspace in MiB, about, that sends a call with a trained head this way."""
    V, D = p.w_VD.shape
    size = 4 * p.h_TD.itemsize * len(p.target_N) * (V + 64) + 16 * D
    while size > 64:
        try:
            if ROUTES[route](plan_of(p, size)):
                return size / MIB
        except ValueError:
            break
        size = size * 19 // 20
    raise AssertionError(f"no workspace gives the route {route}")


@dataclass(frozen=True)
class Way:
    """How to have a call take a route: what is trained, and the workspace."""

    route: str
    wanted: str = "h w bias"

    def workspace(self, p: Problem) -> float:
        return workspace_of(p, {"forward": "stash", "frozen": "stash"}.get(self.route, self.route))

    def check(self, plan: Plan) -> None:
        taken = "grouped" if self.route == "unit" else self.route
        assert plan.route == taken and (self.route not in ROUTES or ROUTES[self.route](plan))


WAYS = {
    "frozen": Way("frozen", "h"),
    "stash": Way("stash"),
    "grouped": Way("grouped"),
    "unit": Way("unit"),
    "recompute": Way("recompute"),
}


def dpo(p: Problem, **options: Any) -> Any:
    options = {"impl": "triton", **p.head, **options}
    return linear_dpo_loss(*p.packed, p.ref_logp_S, beta=BETA, alpha=ALPHA, **options)


def run(p: Problem, way: Way, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """The loss of a problem by a route, and its gradients times the dtype's factor."""
    q = p.leaves(way.wanted)
    result = dpo(q, workspace_mib=way.workspace(p), **options)
    way.check(result.plan)
    (result.loss * FACTOR[p.h_TD.dtype]).backward()
    return result, q.grads()


@pytest.fixture(params=["fused", "fold"])
def projection(request, monkeypatch):
    """The two ways of the projection."""
    from fastdpo.kernels import project

    if request.param == "fused" and not project.feeds_from_descriptors(DEVICE):
        pytest.skip("this device folds tiles")
    if request.param == "fold":
        monkeypatch.setattr(project, "feeds_from_descriptors", lambda device: False)
    return request.param


@pytest.fixture
def launches(monkeypatch):
    """Calls of the fused projection."""
    from fastdpo.kernels import project

    calls: list[Any] = []
    original = project.project

    def counted(*args: Any, **options: Any) -> None:
        calls.append(args)
        original(*args, **options)

    monkeypatch.setattr(project, "project", counted)
    return calls


# ------------------------------------------------------------------------------- heads, every route
HEAD_CASES = [(name, BF16) for name in HEADS]
HEAD_CASES += [("Llama-3.2-1B", FP16), ("SmolLM2", FP16), ("SmolLM2", FP32)]


@pytest.mark.parametrize(("name", "dtype"), HEAD_CASES, ids=lambda x: str(x).split(".")[-1])
def test_heads_of_models_against_fp64(name, dtype):
    p = make(HEADS[name], dtype)
    gold = Streamed(p, exact)
    q = p.leaves()
    result = dpo(q)
    assert torch.isfinite(result.loss)
    (result.loss * FACTOR[dtype]).backward()
    assert_gradients(p, q.grads(), gold, gold.dpo(result) * FACTOR[dtype])
    # linear_logp, whose upstream gradient is any vector
    q = p.leaves()
    logp_N = linear_logp(q.h_TD, q.w_VD, q.target_N, impl="triton", **q.head)
    assert_log_probs(p, logp_N.detach(), gold)
    upstream_N = normal(len(logp_N), seed=9, dtype=FP32)
    (logp_N * upstream_N).sum().backward()
    assert_gradients(p, q.grads(), gold, upstream_N.double())


@pytest.mark.parametrize("route", WAYS)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_every_route_against_fp64(route, softcap, projection, launches):
    p = make(replace(MODERATE, softcap=softcap, scale=0.5 if softcap else 1.0))
    gold = Streamed(p, exact)
    result, found = run(p, WAYS[route])
    assert bool(launches) == (projection == "fused")
    assert found.keys() == set(WAYS[route].wanted.split())
    assert_gradients(p, found, gold, gold.dpo(result))


def test_forward_alone_is_the_forward_of_every_route(projection):
    """The same blocks of rows, so the same instructions."""
    p = make(MODERATE)
    for way in WAYS.values():
        with torch.no_grad():
            seen = dpo(p, workspace_mib=way.workspace(p))
        assert seen.plan.route == "forward"
        result, _ = run(p, way)
        assert torch.equal(seen.loss, result.loss.detach())
        assert torch.equal(seen.logp_S, result.logp_S)


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_other_dtypes_on_every_route(dtype):
    p = make(MODERATE, dtype)
    gold = Streamed(p, exact)
    for way in WAYS.values():
        result, found = run(p, way)
        assert_gradients(p, found, gold, gold.dpo(result) * FACTOR[dtype])


def test_objective_of_two_sides_on_every_route():
    """Its long pair has two unit gradients."""
    p = make(replace(MODERATE, bias=False))
    found = {}
    for name, way in WAYS.items():
        q = p.leaves(way.wanted)
        result = preference(q, nca_pair(BETA), workspace_mib=way.workspace(p), impl="triton")
        result.loss.backward()
        found[name] = q.grads()
    for name, grads in found.items():
        for x, dx in grads.items():
            assert relative_error(dx, found["stash"][x]) <= 2 * FLOOR[BF16], (name, x)


@pytest.mark.parametrize(
    "name", [name for name, choice in CHOICES.items() if choice.build().code is not None]
)
def test_pairs_of_each_objective(name):
    """Loss, sums and slopes in fp64 from the same log-probs of tokens."""
    from fastdpo.kernels import pair

    objective, P = CHOICES[name].build(), 40
    logp_N = -torch.rand(40 * P, device=DEVICE) * 9
    ref_S = -torch.rand(2 * P, device=DEVICE, dtype=torch.float64) * 90
    given = {"weight_P": torch.rand(P, device=DEVICE).double()}
    if objective.by_margin:
        given["margin_P"] = torch.randn(P, device=DEVICE).double()
        given["smoothing_P"] = torch.rand(P, device=DEVICE).double() / 4
    found = pair.pair_losses(
        logp_N, torch.ones_like(logp_N).long(), torch.arange(0, 40 * P + 1, 20, device=DEVICE),
        objective, ref_logp_S=ref_S, num_pairs=7.0, want_coef=True, **given,
    )  # fmt: skip
    leaf_S = found.logp_S.clone().requires_grad_()
    zeros_P, length_S = leaf_S.new_zeros(P), torch.full_like(leaf_S, 20.0)
    x = Examples(
        leaf_S, ref_S, length_S, tuple(range(0, 2 * P + 1, 2)), given.get("margin_P", zeros_P),
        given.get("smoothing_P", zeros_P),
    )  # fmt: skip
    loss = (objective.losses(x) * given["weight_P"]).sum() / 7
    (slope_S,) = torch.autograd.grad(loss, leaf_S)
    torch.testing.assert_close(found.logp_S, logp_N.double().view(-1, 20).sum(1))
    torch.testing.assert_close(found.totals[0], loss.detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found.slope_S, slope_S, rtol=1e-11, atol=1e-13)
    coef_N = slope_S.repeat_interleave(20).float()
    torch.testing.assert_close(found.coef_N, coef_N, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("share", [1.6, 0.7, 0.25], ids=["stash", "in parts", "longer examples"])
@pytest.mark.parametrize("name", ["lists", "singles", "tails"])
def test_other_examples_by_every_workspace(name, share):
    """Sums of any sequences, and tokens of unlike weights, against fp64."""
    p = make(MODERATE)
    S, V = 2 * MODERATE.P, len(p.w_VD)
    lists, pairs = (0, 3, 5, S), tuple(range(0, S + 1, 2))
    desirable_P = (torch.arange(S, device=DEVICE) % 2).float()
    objective, firsts, given = {
        "lists": (lipo_lambda(BETA), lists, {"scores_S": torch.rand(S, device=DEVICE)}),
        "singles": (kto(BETA), tuple(range(S + 1)), {"desirable_P": desirable_P, "shift": 0.2}),
        "tails": (lr_dpo(BETA, ld_alpha=0.3), pairs, {}),
    }[name]
    q, gold = p.leaves(), Streamed(p, exact)
    mib = share * p.h_TD.itemsize * len(p.target_N) * (V + 64) / MIB
    result = preference(q, objective, firsts_P1=firsts, workspace_mib=mib, impl="triton", **given)
    assert (result.plan.route == "stash") == (share > 1)
    result.loss.backward()
    weight_N = torch.ones(len(p.target_N), dtype=torch.float64, device=DEVICE)
    lengths_S = reference.sequence_sums(gold.scored_N.double(), p.bounds_S1)
    if objective.ld_alpha is not None:
        edges = p.bounds_S1.tolist()
        for s, length in enumerate(lengths_S.tolist()):
            shared = min(length, float(lengths_S[s ^ 1]))
            place_n = gold.scored_N[edges[s] : edges[s + 1]].cumsum(0)
            weight_N[edges[s] : edges[s + 1]][place_n > shared] = objective.ld_alpha
    gold_S = reference.sequence_sums(gold.logp_N * weight_N, p.bounds_S1)
    allowed = gold.allowed * float(lengths_S.max()) + 4 * U * float(gold_S.abs().max())
    assert float((result.logp_S - gold_S).abs().max()) <= allowed
    leaf_S, none_P = result.logp_S.double().requires_grad_(), gold_S.new_zeros(len(firsts) - 1)
    numbers: Any = {k: x.double() if isinstance(x, Tensor) else x for k, x in given.items()}
    x = Examples(leaf_S, p.ref_logp_S.double(), lengths_S, firsts, none_P, none_P, **numbers)
    loss = objective.losses(x).mean()
    (slope_S,) = torch.autograd.grad(loss, leaf_S)
    assert abs(float(result.loss.detach()) - float(loss)) <= 4 * U * abs(float(loss))
    coef_N = slope_S.repeat_interleave(p.bounds_S1.diff().to(DEVICE)) * weight_N
    assert_gradients(p, q.grads(), gold, coef_N)


@pytest.mark.parametrize("route", WAYS)
def test_statistics_against_fp64(route):
    p = make(replace(MODERATE, softcap=25.0))
    names = ("entropy", "mean_logit", "top1", "log_sum_sq_probs", "kl_ref")
    other = make(replace(MODERATE, softcap=25.0), seed=7)
    ref = {"ref_h_TD": other.h_TD, "ref_w_VD": other.w_VD, "ref_bias_V": other.bias_V}
    q = replace(p.leaves(WAYS[route].wanted), ref_logp_S=None)
    result = dpo(q, stats=names, workspace_mib=WAYS[route].workspace(p), **ref)
    head = {"rows_N": p.rows_N, "scale": p.scale, "softcap": p.softcap}
    z_NV, ref_z_NV = (
        reference.linear_logits(x.h_TD, x.w_VD, bias_V=x.bias_V, **head)
        for x in (p.to(torch.float64), other.to(torch.float64))
    )
    gold = reference.token_stats(z_NV, p.target_N, ref_z_NV)
    for name in names:
        error = float((result.stats[name] - gold[name]).abs().max())
        assert error <= (0 if name == "top1" else 1e-4), f"{name}: {error:.2e}"


# ------------------------------------------------------------------------------------ exact numbers
@pytest.mark.parametrize("route", WAYS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_first_loss_is_log_2(route, dtype, projection):
    p = make(MODERATE, dtype)
    workspace_mib = WAYS[route].workspace(p)
    with torch.no_grad():
        seen = dpo(p, workspace_mib=workspace_mib)
    q = replace(p.leaves(WAYS[route].wanted), ref_logp_S=seen.logp_S)
    first = preference(q, lr_dpo(BETA), workspace_mib=workspace_mib, impl="triton")
    assert torch.equal(first.loss.detach().cpu(), LOG_2)
    ref = {"ref_h_TD": p.h_TD, "ref_w_VD": p.w_VD, "ref_bias_V": p.bias_V}
    own = preference(
        q, lr_dpo(BETA), ref_logp_S=None, workspace_mib=workspace_mib, impl="triton", **ref
    )
    assert torch.equal(own.loss.detach().cpu(), LOG_2)
    assert torch.equal(own.logp_S, own.ref_logp_S)


@pytest.mark.parametrize("route", WAYS)
def test_three_runs_agree_bit_for_bit(route, projection):
    p = make(MODERATE)
    (first, grads), *others = (run(p, WAYS[route]) for _ in range(3))
    for result, again in others:
        assert torch.equal(first.loss, result.loss) and torch.equal(first.logp_S, result.logp_S)
        assert all(torch.equal(grads[name], again[name]) for name in grads)


def test_a_real_head_agrees_bit_for_bit_with_itself():
    p = make(HEADS["Llama-3.2-1B"])
    found = []
    for _ in range(3):
        q = p.leaves()
        result = dpo(q)
        result.loss.backward()
        found.append([result.loss.detach(), *q.grads().values()])
    for again in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], again))


# --------------------------------------------------------------------------------------- odd shapes
@pytest.mark.parametrize("N", [70_000, 140_000] if ON_GPU else [300])
@pytest.mark.parametrize("route", ["frozen", "stash", "recompute"])
def test_many_tokens(N, route, projection):
    """More rows than a grid's second dimension takes, twice over."""
    p = make(Shape(256, 4100, N, P=6) if ON_GPU else Shape(16, 300, N))
    gold = Streamed(p, exact)
    result, found = run(p, WAYS[route])
    assert_gradients(p, found, gold, gold.dpo(result), bounds_only=True)
    logp_N = linear_logp(p.h_TD, p.w_VD, p.target_N, impl="triton", **p.head)
    assert_log_probs(p, logp_N, gold)


def test_a_stash_of_more_elements_than_32_bits_count(projection):
    p = make(Shape(64, 32_768, 70_000, P=6) if ON_GPU else Shape(16, 300, 60))
    if ON_GPU:
        assert len(p.target_N) * len(p.w_VD) > 2**31
    gold = Streamed(p, exact)
    result, found = run(p, WAYS["stash"])
    assert len(list(result.plan.spans)) == 1
    assert_gradients(p, found, gold, gold.dpo(result), bounds_only=True)


ODD = {
    "V": (Shape(520, 5003, 700, bias=True), True),
    "D": (Shape(515, 5003, 700, bias=True), False),
    "offset": (Shape(512, 5000, 700), False),
    "transposed": (Shape(512, 5000, 700), False),
    "strided": (Shape(512, 5000, 700), True),
}


def odd_layout(p: Problem, kind: str) -> Problem:
    """The same numbers in memory that is not aligned, not contiguous, or not by rows."""
    V, D = p.w_VD.shape
    if kind == "offset":
        flat = torch.empty(V * D + 1, dtype=p.w_VD.dtype, device=DEVICE)
        w_VD = flat[1:].view(V, D)
    elif kind == "transposed":
        w_VD = torch.empty(D, V, dtype=p.w_VD.dtype, device=DEVICE).T
        p = replace(p, h_TD=p.h_TD.T.contiguous().T)
    elif kind == "strided":
        w_VD = torch.empty(V, D + 64, dtype=p.w_VD.dtype, device=DEVICE)[:, :D]
        h_TD = torch.empty(len(p.h_TD), D + 8, dtype=p.h_TD.dtype, device=DEVICE)[:, :D]
        p = replace(p, h_TD=h_TD.copy_(p.h_TD))
    else:
        return p
    return replace(p, w_VD=w_VD.copy_(p.w_VD))


@pytest.mark.parametrize("route", WAYS)
@pytest.mark.parametrize("kind", ODD)
def test_odd_shapes_and_layouts(kind, route, launches):
    """What descriptors cannot address goes through the fold."""
    shape, fits = ODD[kind]
    odd = sized(shape, 80, 303 if shape.V % 8 else 296, D=24 if shape.D % 8 == 0 else 19)
    p = odd_layout(make(replace(odd, first_share=0.6)), kind)
    gold = Streamed(p, exact)
    way = WAYS[route]
    wanted = way.wanted.split()
    q = replace(  # leaves without a copy, which would be contiguous
        p,
        h_TD=p.h_TD.detach().requires_grad_(),
        w_VD=p.w_VD.detach().requires_grad_("w" in wanted),
        bias_V=None if p.bias_V is None else p.bias_V.detach().requires_grad_("bias" in wanted),
    )
    assert q.w_VD.stride() == p.w_VD.stride() and q.w_VD.data_ptr() == p.w_VD.data_ptr()
    result = dpo(q, workspace_mib=way.workspace(p))
    way.check(result.plan)
    result.loss.backward()
    if not fits:
        assert not launches
    assert_gradients(p, q.grads(), gold, gold.dpo(result))


# ------------------------------------------------------------------------------------------- memory
# What no plan counts, beside what `uncounted` names: allocations are rounded up, by less than a MiB
# each where they are large.
ALLOCATOR_BYTES = 16 * MIB


def uncounted(p: Problem) -> int:
    """Bytes that are small beside a workspace and that no plan counts.

    Hidden rows gathered by ``rows_N``, the targets' order, and per-token vectors.
    """
    N, (V, D) = len(p.target_N), p.w_VD.shape
    gathered = 2 * N * D * p.h_TD.itemsize
    return gathered + 8 * (V + 1) + 200 * N + ALLOCATOR_BYTES


@contextmanager
def peak() -> Iterator[Callable[[], int]]:
    """Give the largest number of bytes allocated since, beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield lambda: torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("route", WAYS)
def test_peak_memory_is_what_the_plan_says(route, projection):
    p = make(replace(MODERATE, bias=False))
    way = WAYS[route]
    run(p, way)  # compiles the kernels; cuBLAS takes its workspace
    q = p.leaves(way.wanted)
    workspace_mib = way.workspace(p)
    with peak() as taken:
        result = dpo(q, workspace_mib=workspace_mib)
        result.loss.backward()
        gradients = sum(x.numel() * x.element_size() for x in q.grads().values())
        beyond = taken() - gradients
    plan = result.plan
    way.check(plan)
    allowed = plan.workspace_bytes + plan.accumulator_bytes + uncounted(p)
    assert beyond <= allowed, f"{beyond / MIB:.0f} MiB > {allowed / MIB:.0f} MiB"


def test_peak_memory_of_a_real_head():
    """Beyond inputs and gradients: far less than the logits."""
    p = make(HEADS["Llama-3-8B"])
    for _ in range(2):
        q = p.leaves()
        with peak() as taken:
            result = dpo(q)
            result.loss.backward()
            gradients = sum(x.numel() * x.element_size() for x in q.grads().values())
            beyond = taken() - gradients
    plan = result.plan
    allowed = plan.workspace_bytes + plan.accumulator_bytes + uncounted(p)
    assert beyond <= allowed, f"{beyond / MIB:.0f} MiB > {allowed / MIB:.0f} MiB"


LONG = Shape(3584, 152_064, 131_072, P=1) if ON_GPU else Shape(64, 300, 200, P=1)


def test_a_long_pair_with_a_frozen_head_takes_less_than_a_gib():
    N, V, D = LONG.N, LONG.V, LONG.D
    w_VD = normal(V, D, seed=1, dtype=BF16).mul_(2.5 / D**0.5)
    h_TD = normal(N, D, seed=2, dtype=BF16).requires_grad_()
    target_N = torch.randint(V, (N,), device=DEVICE)
    bounds_S1 = torch.tensor([0, N // 2, N])

    def loss_to(ref_logp_S: Tensor) -> Any:
        return linear_dpo_loss(
            h_TD, w_VD, target_N, bounds_S1, ref_logp_S, beta=BETA,
            workspace_mib=256 if ON_GPU else 0.008, impl="triton",
        )  # fmt: skip

    small = make(replace(LONG, N=256, V=512, P=1)).leaves("h")
    dpo(small, workspace_mib=1).loss.backward()  # cuBLAS takes its workspace
    # The reference is near the policy: with any other so long a pair has no gradient.
    with torch.no_grad():
        own_S = loss_to(torch.zeros(2, device=DEVICE)).logp_S
    ref_logp_S = own_S + normal(2, seed=4, dtype=FP32)
    with peak() as taken:
        result = loss_to(ref_logp_S)
        result.loss.backward()
        assert h_TD.grad is not None
        beyond = taken() - h_TD.grad.numel() * h_TD.grad.element_size()
    assert result.plan.route == "frozen" and result.plan.in_place
    assert beyond <= 2**30, f"{beyond / MIB:.0f} MiB"
    # The gradients of a few rows, from one whole row of logits each in fp64.
    coef_S = torch.tensor([-1.0, 1.0], dtype=torch.float64, device=DEVICE) * BETA
    z = result.logp_S.double() - ref_logp_S.double()
    coef_S *= torch.sigmoid(-BETA * (z[0] - z[1]))
    assert float(coef_S.abs().min()) > BETA / 10
    rows = torch.tensor([0, 1, N // 2 - 1, N // 2, N - 1], device=DEVICE)
    z_RV = h_TD.detach()[rows].double() @ w_VD.double().T
    g_RV = torch.zeros_like(z_RV).scatter_(1, target_N[rows, None], 1.0) - z_RV.softmax(1)
    g_RV *= coef_S[(rows >= N // 2).long()][:, None]
    assert h_TD.grad[rows].any(1).all()
    # Unit gradients in the memory of the gradient are rounded, then scaled and rounded again.
    assert relative_error(h_TD.grad[rows], g_RV @ w_VD.double()) <= 2**0.5 * FLOOR[BF16]


# ---------------------------------------------------------------------- no waiting, compile, graphs
@contextmanager
def no_synchronization() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("route", WAYS)
def test_the_host_never_waits(route, projection):
    p = make(MODERATE)
    way = WAYS[route]
    workspace_mib = way.workspace(p)
    run(p, way)
    q = p.leaves(way.wanted)
    with no_synchronization():
        result = dpo(q, workspace_mib=workspace_mib)
        result.loss.backward()
    way.check(result.plan)


def test_the_host_never_waits_for_other_ops():
    p = make(MODERATE)
    ref = make(MODERATE, seed=5)

    def step() -> None:
        q = p.leaves()
        logp_N = linear_logp(q.h_TD, q.w_VD, q.target_N, impl="triton", **q.head)
        logp_N.sum().backward()
        q = replace(p.leaves(), ref_logp_S=None)
        heads = {"ref_h_TD": ref.h_TD, "ref_w_VD": ref.w_VD, "stats": ("entropy", "kl_ref")}
        dpo(q, **heads).loss.backward()
        q = p.leaves()
        kl_N = linear_kl(q.h_TD, q.w_VD, ref.h_TD, ref.w_VD, impl="triton", **q.head)
        kl_N.sum().backward()

    step()
    with no_synchronization():
        step()


def examples_of(name: str) -> tuple[Any, dict[str, Any]]:
    """An objective whose examples are not all pairs of the kernel, and what it needs."""
    S, ref = 2 * MODERATE.P, make(MODERATE, seed=5)
    scores = {"scores_S": normal(S, seed=6, dtype=FP32)}
    lists = {"firsts_P1": (0, 3, 5, S), **scores}
    desirable_P = (torch.arange(S, device=DEVICE) % 2).float()
    return {
        "lists": (lipo_lambda(BETA), lists),
        "rankings": (plackett_luce(BETA), lists),
        "singles": (kto(BETA), {"firsts_P1": tuple(range(S + 1)), "desirable_P": desirable_P}),
        # The second and the last pair have prompts of one token.
        "orpo": (orpo(BETA), {"firsts_P1": (0, 3, 5, 8, S), "ref_logp_S": None}),
        "tdpo2": (
            tdpo2(BETA), {"ref_logp_S": None, "ref_h_TD": ref.h_TD, "ref_w_VD": ref.w_VD},
        ),
        "known slopes": (given_slopes(lr_dpo(BETA)), scores),
    }[name]  # fmt: skip


OF_EXAMPLES = ["lists", "rankings", "singles", "orpo", "tdpo2", "known slopes"]


@pytest.mark.parametrize("name", OF_EXAMPLES)
def test_the_host_never_waits_for_examples(name):
    p, (objective, given) = make(MODERATE), examples_of(name)

    def step() -> None:
        preference(p.leaves(), objective, impl="triton", **given).loss.backward()

    step()
    with no_synchronization():
        step()


@pytest.mark.parametrize("name", OF_EXAMPLES)
def test_a_captured_step_of_examples(name):
    p, (objective, given) = make(MODERATE), examples_of(name)
    q = p.leaves()

    def step() -> tuple[Tensor, Tensor]:
        loss = preference(q, objective, impl="triton", **given).loss
        return loss.detach(), torch.autograd.grad(loss, q.h_TD)[0]

    wanted = step()
    replay, found = captured(step)
    replay()
    assert all(torch.equal(x, y) for x, y in zip(found, wanted))


BACKEND = "inductor" if ON_GPU else "aot_eager"


def test_compiled_loss_is_the_eager_one():
    p = make(MODERATE)

    def loss(h_TD: Tensor, w_VD: Tensor, bias_V: Tensor) -> tuple[Tensor, Tensor]:
        result = linear_dpo_loss(
            2 * h_TD, w_VD, p.target_N, p.bounds_S1, p.ref_logp_S, beta=BETA, alpha=ALPHA,
            rows_N=p.rows_N, bias_V=bias_V, impl="triton",
        )  # fmt: skip
        return 3 * result.loss, result.logp_S

    found = []
    torch._dynamo.reset()
    for function in (loss, torch.compile(loss, fullgraph=True, backend=BACKEND)):
        q = p.leaves()
        assert q.bias_V is not None
        value, logp_S = function(q.h_TD / 2, q.w_VD, q.bias_V)
        value.backward()
        found.append((value.detach(), logp_S, q.grads()))
    (value, logp_S, grads), (value_, logp_S_, grads_) = found
    assert torch.equal(value, value_) and torch.equal(logp_S, logp_S_)
    for name in grads:  # a compiled call rounds once more, when the upstream gradient is known
        assert relative_error(grads_[name], grads[name]) <= 2**-8


def test_compiled_logp_is_the_eager_one_for_any_number_of_tokens():
    from torch._dynamo.testing import CompileCounterWithBackend

    p = make(replace(MODERATE, softcap=25.0))

    def logp(h_TD: Tensor, w_VD: Tensor, target_N: Tensor) -> Tensor:
        return linear_logp(2 * h_TD, w_VD, target_N, softcap=25.0, impl="triton")

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(logp, fullgraph=True, dynamic=True, backend=counter)
    frames = 0
    for n in (len(p.h_TD), len(p.h_TD) // 2, len(p.h_TD) - 17):
        found = []
        for function in (logp, compiled):
            h_TD = (p.h_TD[:n] / 2).requires_grad_()
            w_VD = p.w_VD.clone().requires_grad_()
            logp_N = function(h_TD, w_VD, p.target_N[:n])
            (logp_N * torch.linspace(-1, 1, n, device=DEVICE)).sum().backward()
            found.append((logp_N.detach(), h_TD.grad, w_VD.grad))
        assert all(torch.equal(x, y) for x, y in zip(*found))
        frames = frames or counter.frame_count
        assert counter.frame_count == frames, f"compiled again for {n} rows"


def captured(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A CUDA graph of a step, after it has run: how to replay it, and its static results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results


@pytest.mark.parametrize("route", WAYS)
def test_a_captured_step_replays_with_other_inputs(route, projection):
    p, other = make(MODERATE), make(MODERATE, seed=3)
    way = WAYS[route]
    workspace_mib = way.workspace(p)
    static = p.leaves(way.wanted)

    def step_of(q: Problem) -> list[Tensor]:
        result = dpo(q, workspace_mib=workspace_mib)
        way.check(result.plan)
        tensors = {"h": q.h_TD, "w": q.w_VD, "bias": q.bias_V}
        wanted = [x for name, x in tensors.items() if name in way.wanted.split() and x is not None]
        metrics = [result.metrics[name] for name in sorted(result.metrics)]
        grads = torch.autograd.grad(result.loss, wanted)
        return [result.loss.detach(), result.logp_S, *metrics, *grads]

    replay, results = captured(lambda: step_of(static))
    for q in (p, other, p):
        with torch.no_grad():
            for mine, theirs in (
                (static.h_TD, q.h_TD),
                (static.w_VD, q.w_VD),
                (static.bias_V, q.bias_V),
                (static.target_N, q.target_N),
                (static.ref_logp_S, q.ref_logp_S),
            ):
                assert mine is not None and theirs is not None
                mine.copy_(theirs)
        replay()
        eager = step_of(q.leaves(way.wanted))
        for x, y in zip(results, eager):
            assert torch.equal(x, y)


# --------------------------------------------------------------------------------- KL of two heads
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("softcap", [None, 25.0])
def test_kl_against_fp64(dtype, softcap, projection):
    shape = replace(MODERATE, N=600 if ON_GPU else 40, softcap=softcap)
    p = make(shape, dtype)
    other = make(replace(shape, D=768 if ON_GPU else 24), dtype, seed=3)
    q = p.leaves()
    head = {"rows_N": p.rows_N, "scale": p.scale, "softcap": p.softcap}
    kl_N = linear_kl(
        q.h_TD, q.w_VD, other.h_TD, other.w_VD, bias_V=q.bias_V, ref_bias_V=other.bias_V,
        impl="triton", **head,
    )  # fmt: skip
    upstream_N = normal(len(kl_N), seed=9, dtype=FP32)
    (kl_N * upstream_N).sum().backward()

    def gold(low: torch.dtype | None) -> tuple[Tensor, dict[str, Tensor]]:
        """In fp64, or as people write it in another dtype."""
        x = (p if low is not None else p.to(torch.float64)).leaves()
        y = other if low is not None else other.to(torch.float64)
        value_N = reference.linear_kl(
            x.h_TD, x.w_VD, y.h_TD, y.w_VD, bias_V=x.bias_V, ref_bias_V=y.bias_V, **head
        )
        (value_N * upstream_N).sum().backward()
        return value_N.detach(), x.grads()

    gold_N, wanted = gold(None)
    _, usual = gold(dtype)
    found = q.grads()
    # Both heads' log-probs have errors; the reference's also change the probabilities, which weigh
    # differences of log-probs.
    error, ref_error = (Streamed(x, exact).allowed for x in (p, other))
    logp_NV, ref_NV = (
        reference.linear_logits(x.h_TD, x.w_VD, bias_V=x.bias_V, **head).log_softmax(1)
        for x in (p.to(torch.float64), other.to(torch.float64))
    )
    spread_N = (ref_NV.exp() * (ref_NV - logp_NV).abs()).sum(1)
    allowed_N = error + ref_error * (1 + spread_N)
    assert bool(((kl_N.detach() - gold_N).abs() <= allowed_N).all())
    for name, dx in wanted.items():
        bound = FLOOR[dtype]
        if dtype != FP32:
            bound = max(bound, relative_error(usual[name], dx) / 2)
        assert relative_error(found[name], dx) <= bound, name


def test_kl_of_a_head_to_itself_is_zero(projection):
    p = make(MODERATE)
    q = p.leaves()
    kl_N = linear_kl(
        q.h_TD, q.w_VD, p.h_TD, p.w_VD, bias_V=q.bias_V, ref_bias_V=p.bias_V, impl="triton",
        rows_N=p.rows_N,
    )  # fmt: skip
    # The same products, whatever D is: a few roundings of what is summed.
    assert float(kl_N.detach().abs().max()) <= 2e-5
    kl_N.sum().backward()
    assert all(float(x.abs().max()) <= 1e-4 for x in q.grads().values())


# ---------------------------------------------------------------------------------- other processes
HERE = Path(__file__).parent


def python(code: str, *prefix: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, whose CUDA context may break."""
    path = [str(HERE.parents[1]), str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    return subprocess.run(
        [*prefix, sys.executable, "-c", code], env=environment, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip


BAD_INPUT = """
import torch
from fastdpo import linear_dpo_loss, linear_logp

torch.manual_seed(0)
h = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
w = torch.randn(500, 64, device="cuda", dtype=torch.bfloat16)
target = torch.randint(500, (64,), device="cuda")
rows = torch.arange(64, device="cuda")
bounds, ref = torch.tensor([0, 30, 64]), torch.zeros(2, device="cuda")
linear_dpo_loss(h, w, target, bounds, ref, rows_N=rows)
torch.cuda.synchronize()
print("ready", flush=True)
{change}
linear_dpo_loss(h, w, target, bounds, ref, rows_N=rows)
torch.cuda.synchronize()
print("survived", flush=True)
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("target[7] = 500", "target_N must be 0 <= target < V or -100"),
        ("target[7] = -1", "target_N must be 0 <= target < V or -100"),
        ("rows[7] = 64", "rows_N must be 0 <= row < T"),
        ("ref[1] = float('nan')", "ref_logp_S must be finite"),
        ("target[:30] = -100", "a response is empty"),
    ],
    ids=["target", "negative", "row", "reference", "empty"],
)
def test_bad_values_trip_an_assert_that_names_them(change, message):
    done = python(BAD_INPUT.format(change=change))
    assert "ready" in done.stdout, done.stderr
    assert done.returncode != 0 and "survived" not in done.stdout
    assert message in done.stderr


# Every kernel, at sizes that are multiples of nothing.
EVERY_KERNEL = """
import torch
import test_gpu
from dataclasses import replace
import checks
from fastdpo import linear_kl
from fastdpo.kernels import project
from fastdpo.loss.tokens import tdpo2

shape = test_gpu.{shape!r}
p, other = test_gpu.make(shape), test_gpu.make(shape, seed=3)
for project.feeds_from_descriptors in (lambda device: False, project.feeds_from_descriptors):
    for route in {routes}:
        test_gpu.run(p, test_gpu.WAYS[route])
    stats = ("entropy", "mean_logit", "top1", "log_sum_sq_probs")
    for stats in (stats, (*stats, "kl_ref")):
        q = replace(p.leaves(), ref_logp_S=None)
        test_gpu.dpo(q, stats=stats, ref_h_TD=other.h_TD, ref_w_VD=other.w_VD).loss.backward()
    q = p.leaves()
    linear_kl(q.h_TD, q.w_VD, other.h_TD, other.w_VD, impl="triton", **q.head).sum().backward()
    q = replace(p.leaves(), ref_logp_S=None)
    ref = dict(ref_h_TD=other.h_TD, ref_w_VD=other.w_VD)
    checks.preference(q, tdpo2(), impl="triton", **ref).loss.backward()
{finish}
print("finished", flush=True)
"""
SANITIZED = Shape(72, 700, 150, P=3, softcap=20.0, bias=True, first_share=0.6)
# What a tool's program runs, and how long at most.  Racecheck is by far the slower one: it gets few
# tokens, one route, which has each kernel already, and looks at our kernels alone.
TOOLS = {
    "memcheck": (SANITIZED, list(WAYS), 240.0),
    "racecheck": (replace(SANITIZED, N=40, V=300, D=24, P=2), ["stash"], 480.0),
}


def every_kernel(tool: str) -> str:
    shape, routes, _ = TOOLS[tool]
    finish = "torch.cuda.synchronize()" if ON_GPU else ""
    return EVERY_KERNEL.format(shape=shape, routes=routes, finish=finish)


def kernel_names() -> list[str]:
    from fastdpo.kernels import fold, kl, pair, project, scatter

    modules = (fold, kl, pair, project, scatter)
    return [name for module in modules for name in vars(module) if name.endswith("_kernel")]


def find_sanitizer() -> str | None:
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join([f"{cuda}/bin", f"{cuda}/compute-sanitizer"])
    )


@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer(tool, monkeypatch):
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # or it sees one large allocation
    chosen = [f"kns={name}" for name in kernel_names() if tool == "racecheck"]
    options = [option for name in chosen for option in ("--kernel-name", name)]
    code, limit_s = every_kernel(tool), TOOLS[tool][-1]
    done = python(code, sanitizer, "--tool", tool, *options, timeout=limit_s)
    output = done.stdout + done.stderr
    if re.search("not supported|unsupported", output, re.IGNORECASE):
        pytest.skip(f"compute-sanitizer: {output.strip().splitlines()[0]}")
    # On an H100 with CUDA 13.0 racecheck fails in itself; memcheck and the bare program do not.
    if tool == "racecheck" and "Internal Sanitizer Error" in output:
        pytest.skip("compute-sanitizer: racecheck ended in an error of its own")
    assert "finished" in output, output[-4000:]
    # Of the matrix library's own kernels nothing is claimed.
    ours = re.compile("|".join(kernel_names()))
    found = [line for line in output.splitlines() if line.startswith("=====") and ours.search(line)]
    assert not found, "\n".join(found[:40])


@pytest.mark.parametrize("tool", TOOLS)
def test_every_kernel_of_the_sanitized_programs_runs(tool):
    """The programs by themselves, so that a failure above is the sanitizer's finding."""
    done = python(every_kernel(tool))
    assert "finished" in done.stdout, done.stderr
