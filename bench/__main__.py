"""`python -m bench`: measure, print a line a row, and write JSON lines for `bench.report`.

One shape: `--shape smollm2`, with `--tokens` or sizes of its own. The targets: `--targets`. The
full grid of heads, tokens and passes: `--grid --out FILE`, which goes on where it stopped: a pass
of a shape is skipped if FILE has a row for each of its variants from the same device, threads,
versions and commit (the same state of local changes too). A variant that broke the device is left
out the next time.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import replace
from pathlib import Path

import torch

from .measure import DTYPES, run
from .rows import append, command_line, matching, resume, this_device, where
from .targets import BUDGET_S, Job, gpu_jobs, gpu_target_lines, target_lines
from .turns import BROKE, DeviceBroken
from .variants import GRID_TOKENS, PASSES, SHAPES, TRAIN, VARIANTS, Shape


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line("bench", __doc__)
    add = parser.add_argument
    add("--shape", nargs="+", help=f"N,D,V or one of: {', '.join(SHAPES)} (smollm2)")
    add("--tokens", nargs="+", type=int, help="N, in place of the named shapes'")
    add("--pairs", type=int, help="pairs the N tokens are split into (the shape's, or 4)")
    add("--dtype", help=f"of {','.join(DTYPES)} (bf16, and fp32 for one shape on a CPU)")
    add("--passes", default=",".join(PASSES))
    add("--variants", help=f"of: {', '.join(VARIANTS)}")
    add("--rounds", type=int, default=7)
    add("--threads", type=int)
    add("--device", default=this_device().type)
    add("--out", type=Path, help="for example bench/results/NAME.jsonl; replaced without --grid")
    add("--no-memory", action="store_true", help="skip peak memory (a process a variant on a CPU)")
    add("--targets", action="store_true", help="the rows that the targets need, and the targets")
    add("--grid", action="store_true", help="all heads and tokens, or those given; resumes --out")
    args = parser.parse_args(arguments)
    if args.grid and (args.out is None or args.targets):
        parser.error("--grid needs --out, and goes without --targets")
    return args


def shapes(args: argparse.Namespace) -> list[Shape]:
    """Named shapes, or N,D,V; the fewest tokens first."""
    names = args.shape or (list(SHAPES) if args.grid else ["smollm2"])
    tokens = args.tokens or (GRID_TOKENS if args.grid and not args.shape else [None])
    changed = {} if args.pairs is None else {"pairs": args.pairs}
    found = []
    for N in tokens:
        if N is not None:
            changed["N"] = N
        found += [shape_of(name)._replace(**changed) for name in names]
    return found


def shape_of(name: str) -> Shape:
    if name in SHAPES:
        return SHAPES[name]
    try:
        N, D, V = map(int, name.split(","))
    except ValueError:
        known = ", ".join(SHAPES)
        raise SystemExit(f"--shape {name}: expected N,D,V or one of {known}") from None
    return Shape(N, D, V, pairs=4)


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """What is to be measured, in order."""
    device = torch.device(args.device).type
    if args.targets and device == "cuda":
        return gpu_jobs()
    one_on_cpu = device == "cpu" and not args.grid
    dtypes = (args.dtype or ("bf16,fp32" if one_on_cpu else "bf16")).split(",")
    passes = (TRAIN,) if args.targets else tuple(args.passes.split(","))
    if args.variants:
        variants = tuple(VARIANTS[name] for name in args.variants.split(","))
    else:
        variants = tuple(v for v in VARIANTS.values() if device in v.devices)
    return [Job(shape, dtype, passes, variants) for shape in shapes(args) for dtype in dtypes]


def remaining(job: Job, rows: list[dict], here: dict) -> Job:
    """The job without the passes that `rows` have, and without what broke the device."""
    same = matching(rows, here, **job.shape._asdict(), dtype=job.dtype)
    done = {(row["pass"], row["variant"]) for row in same}
    passes = [
        pass_
        for pass_ in job.passes
        if any((pass_, v.name) not in done for v in job.variants if pass_ in v.passes)
    ]
    broke = {(row["pass"], row["variant"]) for row in same if (row["note"] or "").startswith(BROKE)}
    return replace(job, passes=tuple(passes), leave_out=frozenset(broke))


def line(row: dict) -> str:
    """A row for the eye; the file has everything."""
    name = f"{row['dtype']}  {row['pass']:<26} {row['variant']:<26}"
    if row["time_ms"] is None:
        return f"{name} {row['note']}"

    def number(key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    return (
        f"{name} {row['time_ms']['median']:9.1f} ms {number('x_floor', '6.2f'):>6}x"
        f" {number('peak_mib', '7.0f'):>7} MiB  workspace {number('workspace_mib', '.0f')}"
        f"  accumulators {number('accumulators_mib', '.0f')}  logp {number('logp_max_err', '.1e')}"
        f"  dh {number('dh_rel_err', '.1e')}  dw {number('dw_rel_err', '.1e')}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    # The compiler's advice to raise its recompile limits is not a result.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    device, started = torch.device(args.device), time.perf_counter()
    on_gpu = device.type == "cuda"
    jobs, rows, stopped = jobs_of(args), [], None
    here = where(device, args.commit)
    if args.grid:
        rows = resume(args.out)
    elif args.out:
        args.out.unlink(missing_ok=True)
    for i, job in enumerate(jobs):
        elapsed = time.perf_counter() - started
        if args.targets and on_gpu and elapsed > BUDGET_S:
            print(f"stopped after {elapsed:.0f} s, before {job.shape}")
            break
        job = remaining(job, rows, here) if args.grid else job
        if not job.passes:
            continue
        if len(jobs) > 1:
            print(f"[{i + 1}/{len(jobs)}] {elapsed:.0f} s  {job.shape}", flush=True)
        try:
            for row in run(
                job.shape,
                job.dtype,
                job.variants,
                passes=job.passes,
                rounds=args.rounds,
                # On a GPU the allocator keeps the books at no cost.
                memory=not args.no_memory and (on_gpu or not args.targets),
                device=device,
                leave_out=job.leave_out,
                commit=args.commit,
            ):
                rows.append(append(args.out, row))
                print(line(row), flush=True)
        except DeviceBroken as error:
            stopped = f"stopped: {error}"
            break
    if args.targets:
        print("\n".join((gpu_target_lines if on_gpu else target_lines)(rows)))
        print(f"{time.perf_counter() - started:.0f} s")
    if stopped:
        raise SystemExit(stopped)


if __name__ == "__main__":
    main()
