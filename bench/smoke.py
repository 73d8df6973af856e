"""Every op on every route of small heads, through the kernels, against fp64: a row each.

It says in seconds whether a device, a Triton and a commit give right numbers at all; the tests say
it at length. Sizes are multiples of nothing, targets are ignored here and there, responses share
the row after their prompt, and one pair has most of the tokens. A route is found by its workspace:
smaller and smaller ones, until no row of logits fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo import linear_kl, linear_logp, linear_preference_loss
from fastdpo.loss import objectives, reference

from .measure import DTYPES, max_error, relative
from .oracle import fp32_product
from .tables import grouped, latest_build, markdown_table, number, setting
from .turns import attempt

OP, LAST_CASE = "smoke", "kl"
BETA, ALPHA = 0.3, 0.02
ROUTES = ("frozen", "stash", "grouped", "recompute")
STATS = ("entropy", "mean_logit", "top1", "log_sum_sq_probs", "kl_ref")
SHRINK = 0.7  # of one workspace to the next: more than the first pair's share of the tokens
# What rounding explains, a wrong kernel exceeds by far. Log-probs may have 1.5 times the error of
# those from an fp32 product where that is more; the loss has the errors of whole sums.
LOGP_LIMIT, LOSS_LIMIT, STATS_LIMIT = 2e-5, 1e-3, 1e-4
_UNSPLIT_ROWS = 4096  # of a product that fills a GPU without splitting its sums
GRADIENT_LIMIT = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2e-5}
FACTOR = {"bf16": 1.0, "fp16": 1024.0, "fp32": 1.0}  # fp16 gradients below 6e-5 lose digits
ERRORS: tuple[str, ...] = (
    "loss_rel_err", "logp_max_err", "stats_max_err", "dh_rel_err", "dw_rel_err", "dbias_rel_err",
)  # fmt: skip


Call = Callable[[dict], dict[str, float]]


class Head(NamedTuple):
    """A head and a batch of pairs, the first of which has 0.6 of the tokens."""

    name: str
    N: int
    D: int
    V: int
    pairs: int = 3
    dtype: str = "bf16"
    bias: bool = True
    scale: float = 0.5
    softcap: float | None = 20.0
    shared: bool = True  # a pair's responses have a hidden row in common


HEADS = (
    Head("narrow", 150, 72, 700),
    Head("wide", 300, 2304, 1500, bias=False, scale=1.0, softcap=None, shared=False),
    Head("odd rows", 150, 70, 701),  # of 140 bytes: no descriptor takes them
    Head("narrow", 150, 72, 700, dtype="fp16"),
    Head("narrow", 150, 72, 700, dtype="fp32"),
)


class Batch(NamedTuple):
    """Inputs of all ops; `options` are what ops and reference have in common."""

    h_TD: Tensor
    w_VD: Tensor
    bias_V: Tensor | None
    target_N: Tensor
    bounds_S1: Tensor
    options: dict[str, Any]

    def leaves(self, wanted: str, dtype: torch.dtype | None = None) -> Batch:
        """Copies, in fp64 for the gold values, of which the named ones require a gradient."""

        def leaf(name: str, x: Tensor) -> Tensor:
            return x.detach().to(dtype or x.dtype, copy=True).requires_grad_(name in wanted.split())

        bias_V = None if self.bias_V is None else leaf("bias", self.bias_V)
        return self._replace(h_TD=leaf("h", self.h_TD), w_VD=leaf("w", self.w_VD), bias_V=bias_V)

    def grads(self) -> dict[str, Tensor]:
        tensors = {"dh": self.h_TD, "dw": self.w_VD, "dbias": self.bias_V}
        return {k: x.grad for k, x in tensors.items() if x is not None and x.grad is not None}


def make(head: Head, device: torch.device, seed: int = 0) -> Batch:
    """Random inputs; logits have a standard deviation of 2.5 before the cap."""
    generator = torch.Generator().manual_seed(seed)
    N, D, V, dtype = head.N, head.D, head.V, DTYPES[head.dtype]
    rest = [1.0 + 0.37 * s for s in range(2 * head.pairs - 2)]
    weights = torch.tensor([0.55 * 1.5 * sum(rest), 0.45 * 1.5 * sum(rest), *rest])
    bounds = torch.cat([torch.zeros(1), weights.cumsum(0) / weights.sum() * N]).round().long()
    target = torch.randint(V, (N,), generator=generator)
    target[5::19] = reference.IGNORE
    rows = torch.arange(N) if head.shared else None
    for first, second in zip(bounds[:-1:2].tolist(), bounds[1::2].tolist()):
        if rows is not None:
            rows[second:] -= 1
            rows[second] = rows[first]
    h = torch.randn(N - head.pairs * head.shared, D, generator=generator)
    w = torch.randn(V, D, generator=generator) * (2.5 / head.scale * D**-0.5)
    bias = torch.randn(V, generator=generator) if head.bias else None
    rows_N = None if rows is None else rows.to(device)
    options = {"rows_N": rows_N, "scale": head.scale, "softcap": head.softcap}
    return Batch(
        h.to(device, dtype), w.to(device, dtype), None if bias is None else bias.to(device, dtype),
        target.to(device), bounds, options,
    )  # fmt: skip


class Gold:
    """fp64 values of a batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        exact = self._logp(batch.leaves("", torch.float64))
        self.logp_N, self.logp_S = exact, self._sums(exact)
        noise = torch.randn(len(batch.bounds_S1) - 1, generator=torch.Generator().manual_seed(1))
        self.ref_logp_S = self.logp_S.float() + noise.to(exact.device)
        known = max_error(self._plain_logp(), exact)
        self.logp_limit = max(LOGP_LIMIT, 1.5 * known + 2.0**-22 * exact.abs().max().item())

    def _logp(self, x: Batch) -> Tensor:
        return reference.linear_logp(x.h_TD, x.w_VD, x.target_N, bias_V=x.bias_V, **x.options)

    def _plain_logp(self) -> Tensor:
        """From a product accumulated in fp32, then fp64: its error grows with D.

        The rows are there often enough that the library has no use for splitting the sum over D,
        which would round less than one chain of additions does.
        """
        T = len(self.batch.h_TD)
        h_TD = self.batch.h_TD.repeat(-(-_UNSPLIT_ROWS // T), 1)
        z_TV = fp32_product(h_TD, self.batch.w_VD)[:T].double()
        identity = torch.eye(z_TV.shape[1], dtype=z_TV.dtype, device=z_TV.device)
        batch = self.batch.leaves("", torch.float64)
        return self._logp(batch._replace(h_TD=z_TV, w_VD=identity))

    def _sums(self, x_N: Tensor) -> Tensor:
        return reference.sequence_sums(x_N, self.batch.bounds_S1)

    def preference(self, objective: Any, wanted: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its gradients."""
        x = self.batch.leaves(wanted, torch.float64)
        ratio_S = self._sums(self._logp(x)) - self.ref_logp_S.double()
        lengths_S = self._sums((x.target_N != reference.IGNORE).double())
        sides = (y[side::2] for y in (ratio_S, lengths_S) for side in (0, 1))
        none_P = torch.zeros_like(ratio_S[::2])
        loss = objective(*sides, none_P, none_P).mean()
        if wanted:
            loss.backward()
        return loss.detach(), x.grads()

    def of_logp(self, upstream_N: Tensor) -> dict[str, Tensor]:
        """Gradients of `sum(upstream * logp)`."""
        x = self.batch.leaves("h w bias", torch.float64)
        (self._logp(x) * upstream_N).sum().backward()
        return x.grads()


class Cases:
    """What is called and compared: each a function of a row that it may add to, to its errors."""

    def __init__(self, head: Head, device: torch.device, impl: str) -> None:
        self.head, self.device, self.impl = head, device, impl
        self.batch, self.other = make(head, device), make(head, device, seed=3)
        self.gold, self.factor = Gold(self.batch), FACTOR[head.dtype]
        self.limits: dict[str, float] = dict.fromkeys(ERRORS, GRADIENT_LIMIT[head.dtype])
        self.limits |= {"loss_rel_err": LOSS_LIMIT, "stats_max_err": STATS_LIMIT}
        self.limits["logp_max_err"] = self.gold.logp_limit

    def row(self, common: dict, name: str, call: Call) -> dict:
        """A case's errors, and whether they are within the limits."""
        sizes = self.head._asdict()
        row = {**common, "op": OP, "head": sizes.pop("name"), **sizes, "case": name}
        row |= {"route": None, "workspace_mib": None, **dict.fromkeys(ERRORS), "passed": False}
        row["note"] = None
        errors = attempt(row, lambda: call(row))
        if errors is not None:
            wrong = [name for name, error in errors.items() if not error <= self.limits[name]]
            note = ", ".join(f"{name} is over {self.limits[name]:.1e}" for name in wrong) or None
            row |= {**errors, "passed": not wrong, "note": note}
        return row

    def preference(self, x: Batch, objective: Any, ref_logp_S: Tensor | None, **more: Any) -> Any:
        packed = x.h_TD, x.w_VD, x.target_N, x.bounds_S1, ref_logp_S, objective
        options = {"bias_V": x.bias_V, "impl": self.impl, **x.options, **more}
        return linear_preference_loss(*packed, **options)

    def gradients(self, x: Batch, wanted: dict[str, Tensor]) -> dict[str, float]:
        grads = {name: dx / self.factor for name, dx in x.grads().items()}
        return {f"{name}_rel_err": relative(dx, wanted[name]) for name, dx in grads.items()}

    def loss(self, objective: Any, wanted: str, workspace_mib: float | None) -> Call:
        def call(row: dict) -> dict[str, float]:
            x = self.batch.leaves(wanted)
            found = self.preference(x, objective, self.gold.ref_logp_S, workspace_mib=workspace_mib)
            plan = found.plan
            row |= {"route": way_of(plan), "workspace_mib": plan.workspace_bytes / 2**20}
            loss, grads = self.gold.preference(objective, wanted)
            if wanted:
                (found.loss * self.factor).backward()
            # Each sum may have the error of all its tokens.
            most = self.batch.bounds_S1.diff().max().item()
            return {
                "loss_rel_err": relative(found.loss.detach(), loss),
                "logp_max_err": max_error(found.logp_S, self.gold.logp_S) / most,
                **self.gradients(x, grads),
            }

        return call

    def logp(self, row: dict) -> dict[str, float]:
        x = self.batch.leaves("h w bias")
        logp_N = linear_logp(
            x.h_TD, x.w_VD, x.target_N, bias_V=x.bias_V, impl=self.impl, **x.options
        )
        generator = torch.Generator().manual_seed(2)
        upstream_N = torch.randn(len(logp_N), generator=generator).to(self.device)
        (logp_N * upstream_N * self.factor).sum().backward()
        errors = {"logp_max_err": max_error(logp_N.detach(), self.gold.logp_N)}
        return {**errors, **self.gradients(x, self.gold.of_logp(upstream_N.double()))}

    def statistics(self, row: dict) -> dict[str, float]:
        """Those of the policy, and of another reference's head."""
        x, y = self.batch.leaves("h w bias"), self.other
        ref = {"ref_h_TD": y.h_TD, "ref_w_VD": y.w_VD, "ref_bias_V": y.bias_V}
        found = self.preference(x, objectives.lr_dpo(BETA, ALPHA), None, stats=STATS, **ref)
        found.loss.backward()
        z_NV, ref_z_NV = (
            reference.linear_logits(z.h_TD, z.w_VD, bias_V=z.bias_V, **z.options)
            for z in (self.batch.leaves("", torch.float64), y.leaves("", torch.float64))
        )
        wanted = reference.token_stats(z_NV, x.target_N, ref_z_NV)
        return {"stats_max_err": max(max_error(found.stats[k], wanted[k]) for k in STATS)}

    def log_2(self, row: dict) -> dict[str, float]:
        """The policy as its own reference: the same bits, and the loss of a coin."""
        x, y = self.batch.leaves("h w bias"), self.batch
        ref = {"ref_h_TD": y.h_TD, "ref_w_VD": y.w_VD, "ref_bias_V": y.bias_V}
        found = self.preference(x, objectives.lr_dpo(BETA), None, **ref)
        found.loss.backward()
        if not torch.equal(found.logp_S.detach(), found.ref_logp_S):
            raise ValueError("policy and reference differ on the same rows")
        log_2 = torch.tensor(2.0, dtype=torch.float64, device=self.device).log()
        return {"loss_rel_err": relative(found.loss.detach(), log_2)}

    def kl(self, row: dict) -> dict[str, float]:
        def value(op: Callable, x: Batch, y: Batch, factor: float, **options: Any) -> Tensor:
            biases = {"bias_V": x.bias_V, "ref_bias_V": y.bias_V}
            value_N = op(x.h_TD, x.w_VD, y.h_TD, y.w_VD, **biases, **x.options, **options)
            (value_N.sum() * factor).backward()
            return value_N.detach()

        x, exact = self.batch.leaves("h w bias"), self.batch.leaves("h w bias", torch.float64)
        found_N = value(linear_kl, x, self.other, self.factor, impl=self.impl)
        wanted_N = value(reference.linear_kl, exact, self.other.leaves("", torch.float64), 1.0)
        return {"stats_max_err": max_error(found_N, wanted_N), **self.gradients(x, exact.grads())}


def run(
    head: Head, device: torch.device, common: dict[str, Any], impl: str = "triton"
) -> Iterator[dict]:
    """Rows of one head.

    Raises:
        DeviceBroken: after which nothing runs in this process; its row is not among these.
    """
    cases = Cases(head, device, impl)
    margin, separate = objectives.lr_dpo(BETA, ALPHA), objectives.nca_pair(BETA)
    yield cases.row(common, "dpo", cases.loss(margin, "", None))
    taken: dict[tuple[str, str], float] = {}
    for wanted in ("h w bias", "h"):
        for workspace_mib in workspaces(cases.batch):
            row = cases.row(common, "dpo", cases.loss(margin, wanted, workspace_mib))
            if "workspace_mib" in (row["note"] or ""):  # it is too small
                break
            if (way := (wanted, row["route"] or row["note"][:24])) not in taken:
                taken[way] = workspace_mib
                yield row
            if row["route"] == ROUTES[-1]:  # and so does every smaller one
                break
    for (wanted, _), workspace_mib in taken.items():
        yield cases.row(common, "nca", cases.loss(separate, wanted, workspace_mib))
    # A head much wider than the batch is long has sums that no workspace for these tokens allows.
    for route in ROUTES if head.D < head.N else ():
        if not any(name.startswith(route) for _, name in taken):
            row = cases.row(common, "dpo", lambda _: {})
            yield {**row, "route": route, "passed": False, "note": "no workspace leads there"}
    others = {"logp": cases.logp, "statistics": cases.statistics, "log 2": cases.log_2}
    for name, call in {**others, LAST_CASE: cases.kl}.items():
        yield cases.row(common, name, call)


def workspaces(batch: Batch) -> Iterator[float]:
    """MiB, from more than all that a call could keep down to nothing."""
    size = 16.0 * len(batch.target_N) * len(batch.w_VD) + 2**14
    while size > 64:
        yield size / 2**20
        size *= SHRINK


def way_of(plan: Any) -> str:
    """The plan's route, and whether a pair goes in blocks or lies where its gradient will."""
    blocks = plan.route == "grouped" and any(group.unit for group in plan.groups)
    return plan.route + ", a pair in blocks" * blocks + ", in place" * plan.in_place


def line(row: dict) -> str:
    """A row for the eye."""
    verdict = "pass" if row["passed"] else "FAIL"
    errors = "  ".join(f"{k.split('_')[0]} {row[k]:.1e}" for k in ERRORS if row[k] is not None)
    what = f"{row['head']}, {row['dtype']}: {row['case']} {row['route'] or ''}"
    return f"{verdict}  {what:<50} {errors}  {row['note'] or ''}".rstrip()


def markdown(rows: list[dict], plots: list[str]) -> str:
    """One line a head: how many cases passed and the largest errors; then what failed."""
    rows = latest_build(rows)
    # A case that was measured again, for instance after a stop, counts once.
    key = ("head", "dtype", "case", "route", "workspace_mib")
    rows = [found[-1] for found in grouped(rows, key).values()]
    titles = ["head", "dtype", "N", "D", "V", "passed", *(name.split("_")[0] for name in ERRORS)]
    body, failed = [], []
    for (head, dtype, *sizes), found in grouped(rows, ("head", "dtype", "N", "D", "V")).items():
        right = sum(row["passed"] for row in found)
        errors = ([r[name] for r in found if r[name] is not None] for name in ERRORS)
        worst = [number(max(x, default=None), ".1e") for x in errors]
        body.append([head, dtype, *map(str, sizes), f"{right} of {len(found)}", *worst])
        failed += [f"- {line(row)}" for row in found if not row["passed"]]
    table = markdown_table(titles, ["---", "---", *["---:"] * (len(titles) - 2)], body)
    heading = f"**Every op on every route, largest errors against fp64** {setting(rows[0])}"
    return "\n\n".join(filter(None, [heading, table, "\n".join(failed)]))
