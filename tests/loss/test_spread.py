"""A preference loss whose tokens several processes have among them: that of one process."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import BETA, Problem, preference, relative_error
from ranks import on_ranks
from test_examples_op import CASES, Case

from fastdpo import LinearPreferenceLoss, linear_preference_loss
from fastdpo.loss.objectives import lr_dpo
from fastdpo.loss.reference import IGNORE
from fastdpo.loss.tokens import tdpo1, tdpo2

NUMBERS = torch.linspace(-1.0, 1.0, 8).double()
ALL = {
    **CASES,
    "known slopes": replace(CASES["known slopes"], given={"scores_S": NUMBERS}),
    "KL": Case(tdpo1(BETA, 0.02)),
    "KL without a gradient": Case(tdpo2(BETA, 0.02)),
    "margins": Case(lr_dpo(BETA, 0.02), given={"margin_P": NUMBERS[:4]}),
}
STATS = ("logp", "entropy")
# Where the tokens of a problem are cut: unevenly, inside sequences, and with none for a process.
CUTS = {2: (0, 0.4, 1), 3: (0, 0.15, 0.15, 1)}
WAYS = {"stash": ("h w bias", 256.0), "recompute": ("h w bias", 0.02), "frozen": ("h", 0.02)}
WAYS["forward"] = ("", 0.02)


def with_reference(case: Case, p: Problem) -> Problem:
    """The reference as a head where the objective reads its KL."""
    if not case.objective.needs_kl:
        return p
    generator = torch.Generator().manual_seed(1)
    noise = partial(torch.randn, generator=generator, dtype=torch.float64)
    head = {
        "ref_h_TD": (p.h_TD + 0.1 * noise(p.h_TD.shape)).to(p.h_TD.dtype),
        "ref_w_VD": p.w_VD,
        "ref_bias_V": p.bias_V,
    }
    return replace(p, extra={**p.extra, "ref_logp_S": None, **head})


def part_of(p: Problem, start: int, stop: int) -> Problem:
    """The tokens that a process has."""
    rows = slice(start, stop)
    h_TD, target_N = p.h_TD.detach()[rows], p.target_N[rows]
    bounds_S1 = (p.bounds_S1 - start).clamp(0, stop - start)
    extra = dict(p.extra)
    if extra.get("ref_h_TD") is not None:
        extra["ref_h_TD"] = extra["ref_h_TD"][rows]
    if start == stop:
        h_TD, target_N = p.h_TD.detach()[:1], torch.tensor([IGNORE])
        bounds_S1[1:] += 1
        if extra.get("ref_h_TD") is not None:
            extra["ref_h_TD"] = p.extra["ref_h_TD"][:1]
    return replace(p, h_TD=h_TD, target_N=target_N, bounds_S1=bounds_S1, extra=extra)


def gather_rows(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """All processes' rows, one after the other."""
    parts: list[Any] = [None] * len(sizes)
    dist.all_gather_object(parts, x)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def compared(rank: int, world: int) -> list[tuple[str, str, float]]:
    """Each case and route with the largest difference from one process, relative."""
    group, found = dist.group.WORLD, []
    for name, case in ALL.items():
        whole = with_reference(case, case.problem(torch.float64))
        N = len(whole.target_N)
        edges = [round(x * N) for x in CUTS[world]]
        sizes = [b - a for a, b in pairwise(edges)]
        for way, (wanted, workspace_mib) in WAYS.items():
            options = {"impl": "torch", "stats": STATS, "workspace_mib": workspace_mib}
            weight_P = 0.5 + NUMBERS[: case.count].abs()  # not the random ones of this process
            whole.extra["weight_P"] = weight_P
            p = whole.leaves(wanted)
            q = part_of(whole, *edges[rank : rank + 2]).leaves(wanted)
            one = preference(p, case.objective, **options)
            mine = preference(q, case.objective, group=group, **options)
            values = [
                (mine[key].detach(), one[key].detach()) for key in ("loss", "logp_S", "lengths_S")
            ]
            values += [(mine.metrics[key], x) for key, x in one.metrics.items()]
            values += [(mine.counts[key], x) for key, x in one.counts.items()]
            values += [(gather_rows(mine.stats[key], sizes), one.stats[key]) for key in STATS]
            if wanted:
                one.loss.backward()
                mine.loss.backward()
                grads = p.grads()
                for key, x in q.grads().items():
                    if key == "h":
                        x = gather_rows(x, sizes)
                    else:
                        dist.all_reduce(x)
                    values.append((x, grads[key]))
            assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in values), name
            worst = max(relative_error(a.double(), b.double()) for a, b in values)
            found.append((name, way, worst))
    return found


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_spread_tokens_give_the_loss_and_gradients_of_one_process(world):
    for found in on_ranks(world, compared, world):
        assert len(found) == len(ALL) * len(WAYS)
        assert max(found, key=lambda x: x[2])[2] < 1e-11, sorted(found, key=lambda x: x[2])[-3:]


@pytest.mark.parametrize("make", [lambda: "all", lambda: torch.zeros(1)])
def test_a_group_that_is_none_is_refused(make):
    p = CASES["tails, one slope"].problem(torch.float32)
    with pytest.raises(TypeError, match="group must be a torch"):
        linear_preference_loss(*p.packed, p.ref_logp_S, lr_dpo(0.1), group=make())


def test_the_padded_layout_has_whole_sequences():
    loss = LinearPreferenceLoss(lr_dpo(0.1), group=object())
    with pytest.raises(ValueError, match="group needs packed rows"):
        loss(torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.long))
