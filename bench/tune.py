"""`python -m bench.tune`: constants of `loss.plan` and of the kernels, measured on a GPU.

For each head: the forward of one block, without and with a stash, by a tile of each size that is
folded and by the fused kernel with each tile; then the backward from the stash with each size of
fp32 tile.  All candidates of a head are interleaved, and each is checked first.  The fastest of a
column is what `plan._TILE_BYTES` and `project.HOPPER` should say.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdpo.loss import reference
from fastdpo.loss.plan import MIB, make_plan

from .rows import append, where
from .turns import attempt, interleaved_ms
from .variants import SHAPES, Problem, make_problem

TILE_MIB = (32, 64, 128, 512)
KERNEL_TILES = (
    (128, 256, 64, 8, 3, True),
    (128, 256, 64, 8, 3, False),
    (256, 128, 64, 8, 3, True),
    (128, 128, 64, 8, 4, True),
    (128, 128, 64, 8, 4, False),
    (64, 256, 64, 4, 4, True),
)
LOGP_LIMIT = 1e-4  # a wide head's fp32 product is off by more than half of it


def forced(problem: Problem, tile_mib: float, kernel_tile: tuple[Any, ...] | None):
    """A streamer that folds tiles of a size, or projects with a kernel's tile."""
    from fastdpo.kernels.project import Tile
    from fastdpo.loss.fused import FusedStreamer
    from fastdpo.loss.streaming import Head, Needs, TokenRows

    class Forced(FusedStreamer):
        def projects(self, h_ND: Tensor) -> bool:
            return kernel_tile is not None

        def kernel_tile(self, *, narrow: bool = False) -> Tile:
            assert kernel_tile is not None
            return Tile(*kernel_tile)

    N, D, V, _, softcap = problem.shape
    plan = make_plan(
        [0, N], D, V, itemsize=4, workspace_bytes=8192 * MIB, need_head=True, need_h=True, T=N,
        fused_itemsize=problem.h_ND.element_size(),
    )  # fmt: skip
    head = Head(problem.w_VD.detach(), None, 1.0, softcap)
    rows = TokenRows(problem.h_ND.detach(), None, problem.target_N)
    size = int(tile_mib * MIB)
    plan = replace(plan, tile_bytes=size, grad_tile_bytes=size)
    return Forced(head, rows, Needs(True, True, False), plan)


def candidates(problem: Problem) -> dict[str, Callable[[], Any]]:
    """Calls by name; one that fails or is wrong is left out, with a line that says so."""
    from fastdpo.loss.streaming import Grads

    span = 0, len(problem.h_ND)
    sample, gold = sampled_logp(problem)
    folds = {f"fold {mib} MiB": forced(problem, mib, None) for mib in TILE_MIB}
    kernels = {f"kernel {tile}": forced(problem, TILE_MIB[1], tile) for tile in KERNEL_TILES}
    calls: dict[str, Callable[[], Any]] = {}
    block = None
    for name, streamer in {**folds, **kernels}.items():
        row = {"variant": name, "note": None}
        found = attempt(row, partial(streamer.forward, span, keep=block is None))
        if found is None:  # a tile that does not compile or launch is a result
            print(f"{name}: {row['note']}")
            continue
        error = (found.logp_N[sample] - gold).abs().max().item()
        if not error <= LOGP_LIMIT:
            print(f"{name}: wrong, log-prob error {error:.2g}")
            continue
        block = block or found
        calls[f"{name}, forward"] = partial(streamer.forward, span, keep=False)
        calls[f"{name}, forward and stash"] = partial(streamer.forward, span, keep=True)
    if block is not None:
        into = Grads(w=torch.empty_like(problem.w_VD))
        coef = torch.ones_like(gold[:1]).expand(span[1])
        for name, streamer in folds.items():
            calls[f"{name}, backward"] = partial(streamer.backward, block, coef, into, add=False)
    return calls


def sampled_logp(problem: Problem) -> tuple[Tensor, Tensor]:
    """Some rows, and their log-probs in fp64."""
    h, w = problem.h_ND.detach(), problem.w_VD.detach().double()
    sample = torch.arange(0, len(h), max(1, len(h) // 256), device=h.device)
    target, softcap = problem.target_N[sample], problem.shape.softcap
    return sample, reference.linear_logp(h[sample].double(), w, target, softcap=softcap)


def main() -> None:
    """Measure, print and, with `--out`, append JSON lines."""
    parser = argparse.ArgumentParser("python -m bench.tune", description=__doc__)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("python -m bench.tune needs a CUDA device; there is none")
    device = torch.device("cuda")
    for name in args.shape:
        problem = make_problem(SHAPES[name]._replace(N=args.tokens), torch.bfloat16, device)
        calls = candidates(problem)
        rows: dict[str, dict] = {key: {"variant": key, "note": None} for key in calls}
        times = interleaved_ms(rows, calls, args.rounds, device)
        print(f"\n{name}, N={args.tokens}")
        for key, time in sorted(times.items(), key=lambda item: item[1]["median"]):
            print(f"  {time['median']:9.3f} ms  {key}")
        for key in rows.keys() - times.keys():
            print(f"  {key}: {rows[key]['note']}")
        sizes = problem.shape._asdict()
        append(args.out, {**where(device), "op": "tune", **sizes, "times_ms": times})
        del problem
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
