"""Training on several processes equals that of one, to what another packing does on one process.

The cases are those of ``python -m bench.parallel``.
"""

import importlib.util
from dataclasses import replace

import pytest
import torch

from bench import parallel, parallel_run, report
from bench.parallel import OWN, ROOT, TIED, UNTIED, Case
from bench.parallel_tables import MEASURES, markdown, worst
from bench.rows import where

SOME = [
    Case("ddp", 2, UNTIED, "grouped"),
    Case("fsdp2", 2, TIED, "grouped"),
    Case("fsdp2", 2, OWN, "recompute"),
    Case("fsdp2", 2, ROOT, "stash"),
    Case("fsdp2", 2, OWN, "stash", "reference in each step"),
    Case("fsdp2", 2, OWN, "stash", "kto"),
    Case("fsdp2", 2, OWN, "stash", "bf16"),
    Case("fsdp2", 2, OWN, "stash", "tdpo2"),
    Case("fsdp2, offloaded", 2, OWN, "stash", "evaluation"),
    Case("fsdp2, sp 2", 2, OWN, "recompute"),
    Case("zero 2", 2, TIED, "grouped"),
    Case("zero 3", 2, UNTIED, "recompute"),
    Case("zero 3, sp 2", 2, TIED, "stash"),
    Case("fsdp2", 4, TIED, "frozen"),
    Case("fsdp2, kept after forward", 4, OWN, "grouped"),
    Case("fsdp2, 2 replicas", 4, TIED, "recompute"),
    Case("fsdp2, sp 2", 4, TIED, "stash", family="gemma3"),
    Case("ddp, sp 4", 4, UNTIED, "frozen"),
]


@pytest.mark.slow
def test_several_processes_are_one(tmp_path):
    assert set(SOME) <= set(parallel.cases())
    some = SOME
    if importlib.util.find_spec("deepspeed") is None:
        some = [case for case in SOME if not case.job.environment]
    rows = list(parallel.run(some, tmp_path))
    assert len(rows) == len(some) and not [parallel.line(row) for row in rows if row["note"]]


def test_two_processes_are_one(tmp_path, monkeypatch):
    """One case, beside one process that is this one."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    case = Case("fsdp2", 2, OWN, "stash", "evaluation")
    model = parallel_run.save_model("llama", False, tmp_path)
    jobs = case.alone, *case.others[:3]  # by its own way through the head
    runs = (parallel_run.run(job, model, tmp_path / f"{i}") for i, job in enumerate(jobs))
    alone, *others = (found for found in runs if found is not None)
    rounding = parallel.rounding_of(alone, others)
    [(_, path, why)] = parallel.in_processes(2, [case.job], tmp_path)
    assert path is not None, why
    found = parallel.read(path)
    row = parallel.compared(case, found, alone, rounding)
    assert row["note"] is None
    assert row["batches"] == [[3, 3, 1], [2, 3, 0]] and row["fillers"][1] > row["fillers"][0] == 0
    assert alone.batches == [[5, 6, 1]] and set(row["routes"]) == {"stash"}

    # What it finds: a gradient that misses a pair, a weight that moved otherwise, another route.
    name = "model.layers.3.mlp.up_proj.weight"
    zeros = torch.zeros_like(found.policy[name])
    scaled = [{**x, name: x[name] * 1.001} for x in found.gradients]
    for wrong, problem in (
        (replace(found, gradients=scaled), "gradients off by 1.0e-03"),
        (replace(found, policy={**found.policy, name: zeros}), "policy off by 1.0e+00"),
        (replace(found, routes={"frozen": 7}), "took {'frozen': 7}"),
        (replace(found, fillers=[0, 0]), "none was topped up"),
        (replace(found, batches=[[3, 3, 1]] * 2), "as many micro-batches"),
        (replace(found, counts={**found.counts, "pairs": [10, 10, 2]}), "'pairs': [10, 10, 2]"),
    ):
        assert problem in parallel.compared(case, wrong, alone, rounding)["note"]
    for exact, problem in ((found, "computed in fp32"), (replace(found, gradients=scaled), None)):
        assert parallel.compared(case, found, alone, rounding, exact)["note"] == problem
    told_of(case, row)


def told_of(case, row):
    """A row in the tables of all results."""
    facts = {"op": "parallel", "trains": "full", "tied": False, "evaluated": False}
    whole = {**facts, **case._asdict(), **row, **where(torch.device("cpu"), "abc"), "extra": ""}
    table = markdown([whole, {**whole, "extra": "kto", "evaluated": True}], [])
    gradients = max(row["differences"][x] for x in ("norm", "gradients"))
    assert f" {gradients:.0e} " in table and "| fsdp2 | 2 | own unit | " in table
    assert "*one process, packed otherwise*" in table and "*kto* have an evaluation" in table
    assert f"| {worst(whole):.2g} |" in table and worst(whole) <= parallel.WITHIN
    assert report.kind_of([whole]) == "parallel" and set(row["rounding"]) == set(MEASURES)
