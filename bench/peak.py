"""Peak memory of one variant beyond its inputs; gradients of h and w are part of it.

On a GPU the allocator keeps the books. On a CPU only the process can be asked, so each variant runs
in a fresh one: `python -m bench.peak JOB`, where JOB is JSON, prints {pass: MiB}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from .rows import ROOT
from .variants import VARIANTS, Problem, Shape, Variant, make_problem, step

TINY = Shape(N=16, D=16, V=64, pairs=2)


def peaks_mib(
    variant: Variant, shape: Shape, dtype: torch.dtype, passes: tuple[str, ...], threads: int
) -> dict[str, float]:
    """Peak of each pass on a CPU, in a fresh process; empty if the variant fails there."""
    job = {
        "variant": variant.name,
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "passes": [pass_ for pass_ in passes if pass_ in variant.passes],
        "threads": threads,
    }
    command = [sys.executable, "-m", "bench.peak", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}


def cuda_peak_mib(variant: Variant, problem: Problem, pass_: str) -> float:
    """Peak of one call that has run before, from the caching allocator."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(variant, problem, pass_)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def status_mib(field: str) -> float:
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)
    )
    return int(line.split()[1]) / 2**10


def resident_mib(reset_peak: bool = False) -> tuple[float, float]:
    """Resident memory now and its peak since the last reset, or since the start without Linux."""
    if not Path("/proc/self/clear_refs").exists():
        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        return peak, peak
    if reset_peak:
        Path("/proc/self/clear_refs").write_text("5")
    return status_mib("VmRSS"), status_mib("VmHWM")


def main() -> None:
    """Run one job in this process."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    variant, dtype = VARIANTS[job["variant"]], getattr(torch, job["dtype"])
    problem = make_problem(Shape(*job["shape"]), dtype)
    tiny = make_problem(TINY._replace(softcap=problem.shape.softcap), dtype)
    peaks = {}
    for pass_ in job["passes"]:
        # Libraries and thread pools start on a tiny call; a compiler has to see the real shape.
        step(variant, problem if variant.compiled else tiny, pass_)
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        before, _ = resident_mib(reset_peak=True)
        step(variant, problem, pass_)
        peaks[pass_] = resident_mib()[1] - before
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
