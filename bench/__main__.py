"""`python -m bench`: measure, print a line a row, and write JSON lines for `bench.report`."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch

from .measure import DTYPES, run
from .targets import target_lines
from .variants import PASSES, SHAPES, TRAIN, VARIANTS, Shape


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    add = parser.add_argument
    add("--shape", default="smollm2", help=f"N,D,V or one of: {', '.join(SHAPES)}")
    add("--pairs", type=int, help="pairs the N tokens are split into (the shape's, or 4)")
    add("--dtype", default="bf16,fp32", help=f"of {','.join(DTYPES)}")
    add("--passes", default=",".join(PASSES))
    add("--variants", help=f"of: {', '.join(VARIANTS)}")
    add("--rounds", type=int, default=7)
    add("--threads", type=int)
    add("--device", default="cuda" if cuda else "cpu")
    add("--out", type=Path, help="for example bench/results/NAME.jsonl; replaced, not appended to")
    add("--no-memory", action="store_true", help="skip peak memory (a process a variant on a CPU)")
    add("--targets", action="store_true", help="forward+backward only, then the targets and ratios")
    return parser.parse_args(arguments)


def shape_of(text: str, pairs: int | None) -> Shape:
    """A named shape, or N,D,V."""
    if text in SHAPES:
        return SHAPES[text] if pairs is None else SHAPES[text]._replace(pairs=pairs)
    N, D, V = map(int, text.split(","))
    return Shape(N, D, V, pairs or 4)


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
    names = args.variants.split(",") if args.variants else list(VARIANTS)
    passes = [TRAIN] if args.targets else args.passes.split(",")
    rows = []
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("")
    for dtype in args.dtype.split(","):
        for row in run(
            shape_of(args.shape, args.pairs),
            dtype,
            [VARIANTS[name] for name in names],
            passes=passes,
            rounds=args.rounds,
            memory=not (args.no_memory or args.targets),
            device=args.device,
        ):
            rows.append(row)
            print(line(row), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    if args.targets:
        print("\n".join(target_lines(rows)))


if __name__ == "__main__":
    main()
