"""`python -m bench.losses`: what each objective costs, in time and memory, against DPO's loss.

    python -m bench.losses --out FOLDER --minutes 4
    python -m bench.report FOLDER

A row for each name of loss_type, and for what can be added to one: forward and backward of the same
head and tokens, all in turns of one run. `x DPO` is the time over that of DPO with a reference that
was computed before; `x DPO, with reference` over that of DPO which computes the reference in the
call, from hidden states, as losses with a KL have to. Every loss is compared with fp64 before
it is timed, from the same numbers of sequences; the row of one that is wrong says so and has no
time. On a GPU a row has the launches of a call too.

It needs no network, and without a repository `--commit` says what it measures. What FOLDER has of
the same device, versions, commit and changes is measured again, since ratios are of one run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo import linear_preference_loss
from fastdpo.loss import reference
from fastdpo.loss.choices import CHOICES, make_objective
from fastdpo.loss.examples import BaseObjective, Examples

from .measure import DTYPES, GRADIENT_LIMIT, LOSS_LIMIT, mib, relative
from .oracle import Oracle
from .profile import kernels
from .rows import append, command_line, load, this_device, where
from .tables import grouped, latest_build, markdown_table, number, on_gpu, setting
from .turns import DeviceBroken, attempt, each, interleaved_ms, release
from .variants import SHAPES, Problem, Shape, make_problem

OP, DPO, LIVE = "loss costs", "sigmoid", "sigmoid, with reference"
BETA = 0.1
AT_MOST = 1.05  # of DPO's time for a loss of the margin
KL_AT_MOST = 2.2  # for one that computes the reference and a KL
NEAR = 0.02  # how far the reference's hidden states are from the policy's, in standard deviations
WHOLE, ROWS = 2**30, 128  # a head and batch that is compared whole, else rows of h that are
# Shares of an example's tokens for each of its sequences: of unequal lengths, so that what depends
# on them is checked too. In eighths.
PAIR, PROMPTED_PAIR = (5, 3), (3, 3, 2)


class Case(NamedTuple):
    """A row: an objective by its options, and whether the reference is computed in the call."""

    name: str
    options: dict[str, Any]
    live: bool = False

    @property
    def objective(self) -> BaseObjective:
        return make_objective(beta=BETA, **self.options)


# What a name needs beside itself.
NEEDED = {
    "exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1},
    "cdpo": {"label_smoothing": 0.1},
}  # fmt: skip
ADDED = {
    "sigmoid, length penalty": {"alpha": 0.01},
    "sigmoid, smoothed": {"loss_type": "cdpo", "label_smoothing": 0.1, "alpha": 0.01},
    "sigmoid, target margin": {"target_margin": 0.5},
    "sigmoid, forward KL": {"f_divergence_type": "forward_kl"},
    # z grows with the tokens: at 1.5 it is 280 for 2,048 a pair, and fp32 has no exp(-280), so that
    # loss and gradient would be 0 there and not in fp64.
    "sigmoid, scaled reference": {"reference_scale": 1.002},
    "sigmoid, LD-DPO": {"ld_alpha": 0.5},
    "sigmoid, WPO": {"use_weighting": True},
    "sigmoid + sft (RPO)": {"loss_type": ["sigmoid", "sft"]},
    "sigmoid + bco_pair + sft (MPO)": {
        "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0],
    },
}  # fmt: skip


def cases() -> dict[str, Case]:
    """All rows; DPO's two come first, and what has a target next."""
    found = [Case(DPO, {}), Case(LIVE, {}, live=True)]
    for name in sorted(CHOICES, key=lambda x: not x.startswith("tdpo")):
        options = {"loss_type": name, **NEEDED.get(name, {})}
        if name != DPO:
            found.append(Case(name, options, make_objective(**options).needs_kl))
    found += [Case(name, options) for name, options in ADDED.items()]
    return {case.name: case for case in found}


# --- the same head and tokens for all -------------------------------------------------------------


class Split(NamedTuple):
    """How N tokens are examples, and what an objective reads of them."""

    what: str
    bounds_S1: Tensor
    firsts: tuple[int, ...]
    scores_S: Tensor | None
    desirable_P: Tensor | None

    @property
    def count(self) -> int:
        return len(self.firsts) - 1


def split_for(objective: BaseObjective, shape: Shape) -> Split:
    """Pairs, the same sequences as single responses, or as one list."""
    shares = PROMPTED_PAIR if objective.needs_prompt else PAIR
    if shape.N % (8 * shape.pairs):
        raise ValueError(f"N={shape.N} is no multiple of {8 * shape.pairs}")
    unit = shape.N // (8 * shape.pairs)
    edges = list(accumulate((unit * x for x in shares * shape.pairs), initial=0))
    S, kind = len(edges) - 1, objective.shape
    size = {"pairs": len(shares), "lists": S, "singles": 1}[kind]
    scores = torch.linspace(1, 0, S, dtype=torch.float64) if objective.needs_scores else None
    desirable = (torch.arange(S) % 2 == 0).double() if kind == "singles" else None
    what = {"lists": f"a list of {S}", "singles": f"{S} responses"}.get(kind, f"{S // size} pairs")
    return Split(what, torch.tensor(edges), tuple(range(0, S + 1, size)), scores, desirable)


class Gold(NamedTuple):
    """What a call should give: the loss, and gradients of the compared rows of h and w."""

    loss: Tensor
    dh: Tensor
    dw: Tensor


class CostOracle(Oracle):
    """fp64 values of any objective: a pass over the head for all of them, then for each gradients
    of a few rows of h and w, where the whole would take minutes for all.
    """

    def __init__(self, problem: Problem) -> None:
        N, D, V, *_ = problem.shape
        super().__init__(problem, sliced=N * D * V > WHOLE)
        if isinstance(self.tokens, Tensor):
            self.tokens = self.tokens[:: -(-len(self.tokens) // ROWS)]

    @cached_property
    def tokens_of(self) -> dict[str, Tensor]:
        """Of each token log-prob, log-sum-exp, those of the reference, KL and log of the sum of
        squared probabilities, (N,)."""
        w, found = self.w_VD, []
        rows = self.problem.h_ND.detach(), self.problem.ref_h_ND, self.target_N
        for h, ref_h, target in self._tiles(*rows):
            logp_TV, ref_logp_TV = (
                reference.linear_logits(x.double(), w, softcap=self.softcap) for x in (h, ref_h)
            )
            lse, ref_lse = logp_TV.logsumexp(-1), ref_logp_TV.logsumexp(-1)
            logp_TV -= lse[:, None]
            ref_logp_TV -= ref_lse[:, None]
            at = target[:, None]
            found.append(
                {
                    "logp": logp_TV.gather(1, at)[:, 0],
                    "ref_logp": ref_logp_TV.gather(1, at)[:, 0],
                    "lse": lse,
                    "ref_lse": ref_lse,
                    "kl": (ref_logp_TV.exp() * (ref_logp_TV - logp_TV)).sum(-1),
                    "squares": (2 * logp_TV).logsumexp(-1),
                }
            )
        return {name: torch.cat([x[name] for x in found]) for name in found[0]}

    def sums(self, split: Split, name: str, weight_N: Tensor | None = None) -> Tensor:
        x_N = self.tokens_of[name]
        return reference.sequence_sums(
            x_N if weight_N is None else x_N * weight_N, split.bounds_S1.to(x_N.device)
        )

    def token_weights(self, objective: BaseObjective, split: Split) -> Tensor | None:
        """LD-DPO's: of the tokens of a pair's longer side beyond the length of the other."""
        if objective.ld_alpha is None:
            return None
        weights, lengths = [], split.bounds_S1.diff().tolist()
        for one, other in zip(lengths[0::2], lengths[1::2]):
            for length in (one, other):
                weight = torch.ones(length, dtype=torch.float64, device=self.target_N.device)
                weight[min(one, other) :] = objective.ld_alpha
                weights.append(weight)
        return torch.cat(weights)

    def reference_sums(self, objective: BaseObjective, split: Split) -> Tensor:
        return self.sums(split, "ref_logp", self.token_weights(objective, split))

    def of(self, objective: BaseObjective, split: Split) -> Gold:
        """Loss and gradients, from the objective's own formula on exact sums."""
        device = self.target_N.device
        weight_N = self.token_weights(objective, split)
        none_P = torch.zeros(split.count, dtype=torch.float64, device=device)
        lengths_S = split.bounds_S1.diff().double().to(device)
        logp_S = self.sums(split, "logp", weight_N).requires_grad_()
        kl_S = self.sums(split, "kl").requires_grad_()
        aligned_S = (self.sums(split, "logp") - self.sums(split, "squares")) / lengths_S
        scores_S, desirable_P = (
            None if x is None else x.to(device) for x in (split.scores_S, split.desirable_P)
        )
        loss = objective.losses(
            Examples(
                logp_S, self.reference_sums(objective, split), lengths_S, split.firsts, none_P,
                none_P, scores_S, desirable_P, kl_S, aligned_S,
            )
        ).mean()  # fmt: skip
        slopes = torch.autograd.grad(loss, (logp_S, kl_S), materialize_grads=True)
        sizes = split.bounds_S1.diff().to(device)
        logp_N, kl_N = (x.repeat_interleave(sizes) for x in slopes)
        return Gold(
            loss.detach(), *self._both(logp_N if weight_N is None else logp_N * weight_N, kl_N)
        )

    def _both(self, slope_N: Tensor, kl_slope_N: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients by h of the compared rows, and of the compared rows of w."""
        values, problem = self.tokens_of, self.problem
        given = [problem.h_ND.detach(), problem.ref_h_ND, self.target_N, slope_N, kl_slope_N]
        given += [values["lse"], values["ref_lse"]]
        w, all_V = self.w_VD, torch.arange(problem.shape.V, device=self.target_N.device)
        dh = [self._dz(w, all_V, *x) @ w for x in self._tiles(*(x[self.tokens] for x in given))]
        vocab = all_V[self.vocab]
        w_of, dw = w[vocab], torch.zeros(len(vocab), w.shape[1], dtype=w.dtype, device=w.device)
        for tile in self._tiles(*given):
            dw += self._dz(w_of, vocab, *tile).T @ tile[0].double()
        return torch.cat(dh), dw

    def _dz(
        self, w: Tensor, vocab: Tensor, h: Tensor, ref_h: Tensor, target: Tensor, *of_tokens: Tensor
    ) -> Tensor:
        """Gradients by logits of words: of a log-prob ``onehot - p``, of a KL ``p - p_ref``."""
        slope, kl_slope, lse, ref_lse = (x[:, None] for x in of_tokens)
        z = reference.linear_logits(h.double(), w, softcap=self.softcap)
        p = (z - lse).exp()
        dz = slope * (target[:, None].eq(vocab).double() - p)
        if kl_slope.any():
            ref_z = reference.linear_logits(ref_h.double(), w, softcap=self.softcap)
            dz += kl_slope * (p - (ref_z - ref_lse).exp())
        if self.softcap is not None:
            dz *= 1 - (z / self.softcap).square()
        return dz


# --- measuring ------------------------------------------------------------------------------------


class Bench:
    """A head, its tokens, and the calls on them."""

    def __init__(self, shape: Shape, dtype: str, device: torch.device, workspace_mib: float | None):
        self.problem: Problem = make_problem(shape, DTYPES[dtype], device)
        # A policy near its reference: no loss is saturated, and no gradient vanishes.
        h = self.problem.h_ND.detach()
        near = (h.float() + NEAR * self.problem.ref_h_ND.float()).to(h.dtype)
        self.problem.ref_h_ND.copy_(near)
        self.oracle, self.workspace_mib = CostOracle(self.problem), workspace_mib

    def call(self, case: Case) -> Any:
        """A function that runs it forward and backward once, and returns all that it gives."""
        objective, problem = case.objective, self.problem
        split = split_for(objective, problem.shape)
        device = problem.h_ND.device
        options: dict[str, Any] = {"firsts_P1": split.firsts, "workspace_mib": self.workspace_mib}
        for name in ("scores_S", "desirable_P"):
            x = getattr(split, name)
            options[name] = None if x is None else x.to(device)
        ref_logp_S = None
        if case.live:
            options |= {"ref_h_TD": problem.ref_h_ND, "ref_w_VD": problem.w_VD.detach()}
        elif objective.needs_reference:
            ref_logp_S = self.oracle.reference_sums(objective, split).float()
        inputs = problem.h_ND, problem.w_VD, problem.target_N, split.bounds_S1, ref_logp_S
        softcap = problem.shape.softcap

        def run() -> Any:
            result = linear_preference_loss(*inputs, objective, softcap=softcap, **options)
            return result, *torch.autograd.grad(result.loss, inputs[:2])

        return run

    def check(self, row: dict[str, Any], case: Case) -> Any:
        """Fill in the errors against fp64; the call to be timed."""
        objective = case.objective
        split = split_for(objective, self.problem.shape)
        row |= {"examples": split.what, "reference": reference_of(case, objective)}
        row |= {"kernel": objective.code is not None, "limit": limit_of(case, objective)}
        gold, run = self.oracle.of(objective, split), self.call(case)
        result, dh, dw = run()
        row |= {"route": result.plan.route, "workspace_mib": mib(result.plan.workspace_bytes)}
        row["loss_rel_err"] = relative(result.loss.detach(), gold.loss)
        row["dh_rel_err"] = relative(dh[self.oracle.tokens], gold.dh)
        row["dw_rel_err"] = relative(dw[self.oracle.vocab], gold.dw)
        limits = {"loss": LOSS_LIMIT, "dh": GRADIENT_LIMIT, "dw": GRADIENT_LIMIT}
        wrong = [name for name, most in limits.items() if not row[f"{name}_rel_err"] <= most]
        if wrong:
            row["note"] = f"wrong: {', '.join(wrong)} off by more than {limits[wrong[0]]}"
        return run


def reference_of(case: Case, objective: BaseObjective) -> str:
    if not objective.needs_reference:
        return "none"
    return "in the call" if case.live else "before"


def limit_of(case: Case, objective: BaseObjective) -> float | None:
    """What is asked of its time over DPO's, if anything is."""
    if objective.needs_kl:
        return KL_AT_MOST
    plain = objective.by_margin and not objective.needs_alignment and not case.live
    return AT_MOST if plain and case.name != DPO else None


def weigh(run: Any, device: torch.device) -> tuple[float, float]:
    """Launches of a call, and its peak of memory in MiB beyond the inputs."""
    launches = sum(count for count, _ in kernels(run, device).values())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return launches, (torch.cuda.max_memory_allocated() - before) / 2**20


def run(
    shape: Shape,
    dtype: str,
    device: torch.device,
    names: Iterable[str],
    *,
    rounds: int = 7,
    workspace_mib: float | None = None,
    minutes: float = float("inf"),
    commit: str | None = None,
) -> list[dict[str, Any]]:
    """A row for each name; what could not be checked in half of the time has a row that says so."""
    deadline, known = time.monotonic() + 30 * minutes, cases()
    common = {**where(device, commit), "op": OP, **shape._asdict(), "dtype": dtype, "beta": BETA}
    unknown = (
        "examples", "reference", "kernel", "limit", "route", "workspace_mib", "loss_rel_err",
        "dh_rel_err", "dw_rel_err", "launches", "peak_mib", "time_ms", "x_dpo", "x_live", "note",
    )  # fmt: skip
    rows = {name: {"objective": name, **dict.fromkeys(unknown)} for name in names}
    bench, calls = Bench(shape, dtype, device, workspace_mib), {}
    try:
        for name, row in rows.items():
            if time.monotonic() > deadline:
                row["note"] = "not started: no time left"
            elif (found := attempt(row, partial(bench.check, row, known[name]))) is not None:
                calls[name] = found
        release()
        if device.type == "cuda":
            for name, (launches, peak) in each(rows, lambda x: weigh(calls[x], device)):
                rows[name] |= {"launches": launches, "peak_mib": peak}
        for name, time_ms in interleaved_ms(rows, calls, rounds, device).items():
            rows[name]["time_ms"] = time_ms
    except DeviceBroken as error:
        print(f"stopped: {error}", flush=True)
    for key, base in (("x_dpo", DPO), ("x_live", LIVE)):
        times = rows.get(base, {}).get("time_ms")
        for row in rows.values():
            if times and row["time_ms"]:
                row[key] = row["time_ms"]["median"] / times["median"]
    return [{**common, "rounds": rounds, **row} for row in rows.values()]


# --- what is said of rows -------------------------------------------------------------------------


def target_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Losses of the margin take DPO's time and launches; those with a KL at most 2.2 times it."""
    base = next((row for row in rows if row["objective"] == DPO), None)
    lines = []
    for row in rows:
        limit = row["limit"]
        if base is None or limit is None or row["x_dpo"] is None:
            continue
        verdict = "pass" if row["x_dpo"] <= limit else "miss"
        text = f"{verdict}  {row['x_dpo']:.2f}x  {row['objective']}: DPO's time (at most {limit}x)"
        if row["launches"] is not None and limit == AT_MOST:
            text += f"; {row['launches']:g} launches, DPO's are {base['launches']:g}"
        lines.append(text)
    return lines


def line(row: dict[str, Any]) -> str:
    """A row for the eye."""
    if row["time_ms"] is None:
        return f"{row['objective']:<32} {row['note']}"
    launches = "" if row["launches"] is None else f"  {row['launches']:g} launches"
    return (
        f"{row['objective']:<32} {row['time_ms']['median']:8.2f} ms  {number(row['x_dpo'], '.2f')}x"
        f"  dw {row['dw_rel_err']:.1e}{launches}"
    )


def newest_costs(paths: Iterable[Path]) -> dict[str, float]:
    """Each objective's time over DPO's by its name, of the newest build there is, a GPU's first."""
    rows = [row for row in load(paths) if row.get("op") == OP]
    rows = latest_build([row for row in rows if on_gpu(row)] or rows) if rows else []
    return {row["objective"]: row["x_dpo"] for row in rows if row["x_dpo"] is not None}


def markdown(rows: list[dict[str, Any]], plots: list[str]) -> str:
    """A table for each head and machine."""
    parts = []
    for found in grouped(rows, ("device", "N", "D", "V", "dtype")).values():
        found = list({row["objective"]: row for row in latest_build(found)}.values())
        row = found[0]
        titles = [
            "objective", "examples", "reference", "route", "fwd+bwd ms (p20 to p80)", "x DPO",
            "x DPO, with reference", "launches", "peak MiB", "loss error", "dh error", "dw error",
        ]  # fmt: skip
        body = [cells(x) for x in found]
        parts += [
            f"**{row['dtype']}, N = {row['N']:,} tokens, D = {row['D']:,}, V = {row['V']:,}: every "
            f"objective** {setting(row)}, median of {row['rounds']} interleaved rounds",
            markdown_table(titles, [*["---"] * 4, *["---:"] * (len(titles) - 4)], body),
        ]
    return "\n\n".join(parts)


def cells(row: dict[str, Any]) -> list[str]:
    said = [row["objective"], row["examples"] or "", row["reference"] or "", row["route"] or ""]
    if row["time_ms"] is None:
        return [*said, row["note"] or "", *[""] * 7]
    ms = [format(row["time_ms"][x], ".3g") for x in ("median", "p20", "p80")]
    live = row["x_live"] if row["reference"] == "in the call" else None
    return [
        *said, f"{ms[0]} ({ms[1]} to {ms[2]})", number(row["x_dpo"], ".2f"), number(live, ".2f"),
        number(row["launches"], "g"), number(row["peak_mib"], ",.0f"),
        *(number(row[f"{x}_rel_err"], ".1e") for x in ("loss", "dh", "dw")),
    ]  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser, cuda = command_line("bench.losses", __doc__), torch.cuda.is_available()
    add = parser.add_argument
    add("--out", type=Path, help="a folder, which gets losses.jsonl")
    add("--shape", choices=SHAPES, default="llama-3-8b" if cuda else "smollm2")
    add("--tokens", type=int, help="another number than the shape's")
    add("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32")
    add("--objectives", nargs="+", choices=cases(), metavar="NAME", help="of all, these only")
    add("--rounds", type=int, default=7)
    add("--workspace-mib", type=float, default=2560 if cuda else None)
    add("--minutes", type=float, default=float("inf"), help="half of it for what comes first")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the rows, and say which targets are met."""
    args = parse(arguments)
    shape, names = SHAPES[args.shape], args.objectives or list(cases())
    shape = shape._replace(N=args.tokens or shape.N)
    rows = run(
        shape, args.dtype, this_device(), names, rounds=args.rounds, minutes=args.minutes,
        workspace_mib=args.workspace_mib, commit=args.commit,
    )  # fmt: skip
    for row in rows:
        print(line(append(args.out and args.out / "losses.jsonl", row)), flush=True)
    print("\n".join(target_lines(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
