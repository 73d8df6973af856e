"""The evidence of a GPU in one command: within its minutes, resumable, and nothing is lost.

Here all of it runs on a CPU, on sizes that say nothing about speed.
"""

import json
import math
import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interpreter import needs_kernels
from result_files import write_rows
from threaded import Threaded
from tiny import LLAMA, save_tiny

from bench import (
    gpu,
    report,
    smoke,
    step,
    step_crew,
    step_pairs,
    step_tables,
    turns,
)
from bench.rows import PLACE, load, resume
from bench.targets import Job
from bench.variants import FASTDPO, FLOOR, TRAIN, Shape
from fastdpo.loss import objectives

CPU = torch.device("cpu")
SHAPE = Shape(N=16, D=8, V=40, pairs=2)
HEAD = smoke.Head("tiny", 30, 16, 60)


def job(shape):
    return Job(shape, "bf16", (TRAIN,), (FASTDPO, FLOOR))


EMPTY = gpu.Work(
    device=CPU, commit=None, heads=(), targets=[], steps=[], longest=[], budgets_gib=(),
    profiles=[], grid=[], impl="torch",
)  # fmt: skip


class Clock:
    """Stands still unless it is told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def here_and_now(name, plan, out, deadline):
    """A stage without a process of its own."""
    return gpu.run_stage(name, plan(), out, deadline, lambda: 0.0)


def rows_in(folder):
    return {path.stem: load([path]) for path in folder.glob("*.jsonl")}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    model = save_tiny(LLAMA, folder / "tiny")
    lengths = folder / "lengths.json"
    counts = {"of": "nothing", "lengths": [[3 + i, 2, 5 - i] for i in range(4)]}
    lengths.write_text(json.dumps({"short": counts}))
    arguments = [
        "--model", str(model), "--lengths", f"{lengths}:short", "--variants",
        "fastdpo,fastdpo (padded)", "--dtype", "float32", "--no-autocast",
        "--batch-size", "2", "--steps", "1", "--max-length", "64",
    ]  # fmt: skip
    return replace(
        EMPTY, heads=(HEAD,), targets=[job(SHAPE)], steps=[arguments],
        profiles=[(SHAPE, FASTDPO)], grid=[job(SHAPE), job(SHAPE._replace(N=32))], worker=Threaded,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(work, tmp_path_factory):
    out = tmp_path_factory.mktemp("evidence") / "out"
    gpu.measure(out, 60, lambda: work, here_and_now, Clock())
    return out


def test_one_folder_has_all_rows(folder):
    found = rows_in(folder)
    assert list(gpu.STAGES) == ["smoke", "targets", "step", "longest", "profile", "grid"]
    assert set(found) == {*gpu.STAGES} - {"longest"}  # which had nothing to do
    files = list(folder.iterdir())
    assert all(path.is_file() for path in files)
    assert len({path.name for path in files} | {f"{name}.jsonl" for name in gpu.STAGES}) <= 8
    for rows in found.values():
        for row in rows:
            assert {*PLACE, "utc", "op"} <= set(row)
            assert not row["note"] or row["variant"] in step.ABSENT, row
    assert {(row["N"], row["variant"]) for row in found["grid"]} == {
        (n, variant.name) for n in (16, 32) for variant in (FASTDPO, FLOOR)
    }
    assert [row["variant"] for row in found["step"]][:2] == ["fastdpo", "fastdpo (padded)"]
    log = (folder / gpu.LOG).read_text()
    assert "targets:" in log and "bench.report" in log


def test_the_smoke_takes_every_route_and_sees_a_wrong_result(folder, monkeypatch):
    rows = rows_in(folder)["smoke"]
    routes = {(row["route"] or "").split(",")[0] for row in rows}
    assert routes >= {"forward", *smoke.ROUTES}
    assert {row["case"] for row in rows} == {"dpo", "nca", "logp", "statistics", "log 2", "kl"}
    assert all(row["passed"] and row["head"] == "tiny" for row in rows)
    monkeypatch.setattr(
        smoke, "linear_logp", lambda h, w, *_, **__: (h.float() @ w.T.float())[:, 0]
    )
    wrong = [row for row in smoke.run(HEAD, CPU, {}, "torch") if not row["passed"]]
    assert [row["case"] for row in wrong] == ["logp"] and wrong[0]["note"]
    assert smoke.line(wrong[0]).startswith("FAIL")


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_the_smoke_of_other_dtypes(dtype):
    head = HEAD._replace(dtype=dtype, bias=False, scale=1.0, softcap=None)
    assert all(row["passed"] for row in smoke.run(head, CPU, {}, "torch"))


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's")
def test_the_smoke_of_the_kernels():
    cases = smoke.Cases(HEAD, CPU, "triton")
    loss = cases.loss(objectives.lr_dpo(), "h w bias", None)
    for name, call in (("dpo", loss), ("logp", cases.logp), ("kl", cases.kl)):
        row = cases.row({}, name, call)
        assert row["passed"], row["note"]
    wide = smoke.Cases(HEAD._replace(D=80, shared=False, softcap=None), CPU, "triton")
    row = wide.row({}, "dpo", wide.loss(objectives.lr_dpo(), "h", 1500 / 2**20))
    assert row["passed"] and row["route"] == "frozen, in place", row


def test_the_profile_adds_up(folder):
    *kernels, total = rows_in(folder)["profile"]
    assert total["kernel"] is None and total["route"] and len(kernels) > 3
    for name in ("launches", "ms"):
        assert total[name] == pytest.approx(sum(row[name] for row in kernels))
    assert total["call_ms"] > 0 and total["host_ms"] > 0


def test_the_report_makes_tables_and_plots_of_the_folder(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (row, *_) = rows_in(folder)["step"]
    found = {"op": step_tables.LONGEST, "budget_gib": 24, "longest": 4096, "note": ""}
    write_rows(copy / "longest.jsonl", [{**row, **found}])
    assert report.main([str(copy)]) == 0
    text = capsys.readouterr().out
    assert "| fastdpo | 2 x 4,096 |" in text
    count = len(rows_in(folder)["smoke"])
    assert f"| tiny | bf16 | 30 | 16 | 60 | {count} of {count} |" in text
    assert "| kernel | launches | ms |" in text and "others |" in text
    assert "2 pairs a step" in text and "16 to 32 tokens" in text
    assert {path.stem for path in copy.glob("*.svg")} == {"targets", "step", "grid"}


def test_what_is_there_is_not_measured_again(work, folder, tmp_path, capsys):
    out = shutil.copytree(folder, tmp_path / "out")
    started = []

    def start(name, plan, out, deadline):
        started.append(name)
        return here_and_now(name, plan, out, deadline)

    before = rows_in(out)
    gpu.measure(out, 60, lambda: work, start, Clock())
    assert started == [] and rows_in(out) == before
    # A row that was cut off is measured again, and only its part of the stage.
    grid = out / "grid.jsonl"
    grid.write_text(grid.read_text()[:-9])
    gpu.measure(out, 60, lambda: work, start, Clock())
    assert started == ["grid"]
    assert [row["N"] for row in rows_in(out)["grid"]] == [16, 16, 32, 32, 32]
    # Another commit's rows count for nothing.
    started.clear()
    other = replace(work, heads=(HEAD,), targets=[], steps=[], profiles=[], grid=[])
    rows = [{**row, "git": "another"} for row in before["smoke"]]
    write_rows(out / "smoke.jsonl", rows)
    gpu.measure(out, 60, lambda: other, start, Clock())
    assert started == ["smoke"] and len(rows_in(out)["smoke"]) == 2 * len(rows)


def test_nothing_is_started_that_does_not_fit(work, tmp_path, capsys):
    clock, started = Clock(), []

    def start(name, plan, out, deadline):
        started.append((name, deadline))
        clock.now += 90
        return 0

    gpu.measure(tmp_path, 4, lambda: work, start, clock)
    # 240, 150 and 60 s are left for stages that want 25, 40, 100, 25 and 40.
    assert started == [(name, 340.0) for name in ("smoke", "targets", "profile")]
    text = capsys.readouterr().out
    assert "step: not started, wants 100 s of 60 s" in text
    assert "grid: not started, wants" in text


def test_within_a_stage_only_parts_that_fit_are_started(tmp_path, monkeypatch, capsys):
    clock = Clock()

    def part(name, seconds):
        def rows():
            clock.now += seconds
            yield {"op": "profile", "note": name, "variant": name}

        return gpu.Item(name, seconds, rows)

    wrong = gpu.Item("wrong", 1, lambda: iter([{}["missing"]]))
    parts = [part("a", 30), part("b", 60), wrong, part("c", 10)]
    stage = gpu.Stage("", lambda work, known, crew: parts)
    monkeypatch.setitem(gpu.STAGES, "profile", stage)
    assert gpu.run_stage("profile", EMPTY, tmp_path, 150.0, clock) == gpu.FAILED
    assert [row["note"] for row in rows_in(tmp_path)["profile"]] == ["a", "c"]
    text = capsys.readouterr().out
    assert "b: not started, wants 60 s of 20 s" in text and "KeyError: 'missing'" in text


def made_up(common, head, note=None):
    """A row of a smoke."""
    row = {**common, "op": "smoke", "head": head.name, **head._asdict(), "case": "dpo"}
    return {**row, "route": None, "passed": True, "note": note} | dict.fromkeys(smoke.ERRORS)


def test_a_broken_device_costs_one_part(tmp_path, monkeypatch, capsys):
    """The stage goes on in another process, without what broke it."""
    heads = HEAD, HEAD._replace(dtype="fp32"), HEAD._replace(dtype="fp16")
    original = smoke.run

    def breaking(head, device, common, impl):
        if head.dtype == "fp32":
            yield made_up(common, head)
            note = f"{turns.BROKE}: illegal access"
            row = {**made_up(common, head), "passed": False, "note": note}
            raise turns.DeviceBroken(row)
        yield from original(head, device, common, impl)

    monkeypatch.setattr(smoke, "run", breaking)
    codes = []

    def start(*arguments):
        codes.append(here_and_now(*arguments))
        return codes[-1]

    gpu.measure(tmp_path, 60, lambda: replace(EMPTY, heads=heads), start, Clock())
    assert codes == [gpu.BROKEN, 0]
    rows = rows_in(tmp_path)["smoke"]
    assert [row["dtype"] for row in rows if row["case"] == "kl"] == ["bf16", "fp16"]
    assert sum(row["dtype"] == "fp32" for row in rows) == 2


class Fits(step_crew.Worker):
    """Trains pairs of up to 5,000 tokens, without a process."""

    def __init__(self, variant, folder):
        self.alive = True

    def begin(self, job):
        self.job = job

    def receive(self):
        assert self.job["memory_gib"] == 24 and self.job["gradient_checkpointing"]
        if self.job["max_length"] > 5000:
            raise turns.Failed("out of memory")
        return {"loss": math.log(2)}

    def stop(self):
        pass

    def close(self):
        self.alive = False


def test_a_search_for_the_longest_pair_goes_on(work, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "capacity_mib", lambda: 80.0 * 2**10)
    arguments = ["--longest", "--model", work.steps[0][1]]
    work = replace(EMPTY, longest=arguments, budgets_gib=(24, 141), worker=Fits)
    assert gpu.run_stage("longest", work, tmp_path, 1e9, lambda: 0.0) == 0
    rows = rows_in(tmp_path)["longest"]
    last = {(row["variant"], row["budget_gib"]): row for row in rows}
    for name in step.LONGEST_VARIANTS:
        assert last[name, 24]["longest"] == 4096 and "5,120 does not" in last[name, 24]["note"]
        assert last[name, 141]["note"] == "not run: the device has 80 GiB"
    assert gpu.longest_items(work, rows, gpu.no_crew) == []
    # Stopped after the first lengths: the search goes on from there.
    stopped = [row for row in rows if row["variant"] == "trl" and row["longest"] in (1024, 2048)]
    write_rows(tmp_path / "longest.jsonl", stopped)
    assert gpu.run_stage("longest", work, tmp_path, 1e9, lambda: 0.0) == 0
    again = [row["longest"] for row in rows_in(tmp_path)["longest"] if row["variant"] == "trl"]
    assert again == [1024, 2048, 4096, 4096, None]
    assert "| trl | 2 x 4,096 |" in step_tables.markdown(rows_in(tmp_path)["longest"], [])


def sleeping(head, device, common, impl):
    """One row, then nothing for long, beside a process of its own."""
    pid = subprocess.Popen(["sleep", "600"]).pid
    yield made_up(common, head, note=str(pid))
    print("half a line", end="", flush=True)
    with (Path(device_file)).open("a") as file:
        file.write('{"op": "smo')
    time.sleep(600)


device_file = ""


def sleeping_plan(path=None):
    """Runs in the stage's process, where nothing else is replaced."""
    global device_file
    device_file = path or device_file
    smoke.run = sleeping
    return replace(EMPTY, heads=(HEAD,))


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux for the processes")
def test_a_stopped_stage_keeps_its_rows_and_leaves_no_process(tmp_path):
    from functools import partial

    path = tmp_path / "smoke.jsonl"

    def clock():
        """Late as soon as there is the beginning of a second row."""
        return math.inf if path.exists() and "\n{" in path.read_text() else 0.0

    plan = partial(sleeping_plan, str(path))
    deadline = time.monotonic() + 100
    assert gpu.in_process("smoke", plan, tmp_path, deadline, clock) is None
    (row,) = load([path])
    for _ in range(50):  # what was killed takes a moment to be gone
        if not is_alive(int(row["note"])):
            break
        time.sleep(0.1)
    assert not is_alive(int(row["note"]))
    assert len(resume(path)) == 1 and path.read_text().count("\n") == 1
    assert "pass  tiny, bf16: dpo" in (tmp_path / gpu.LOG).read_text()
    assert sorted(os.listdir(tmp_path)) == [gpu.LOG, "smoke.jsonl"]


def test_without_a_gpu_it_says_what_it_would_do(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    assert gpu.main(["--out", str(out), "--minutes", "5", "--commit", "abc"]) == 0
    text = capsys.readouterr().out
    assert "no CUDA device" in text and not out.exists()
    places = [text.index(f"{n}. {name}.jsonl") for n, name in enumerate(gpu.STAGES, 1)]
    assert places == sorted(places)
    for part in ("wide head", "frozen head", "lengths of long, 32 pairs", "within 80 GiB", "about"):
        assert part in text
    here = {"device": "NVIDIA H100 80GB HBM3", "git": "a" * 40}
    assert gpu.default_folder(here).name == f"nvidia-h100-80gb-hbm3-{'a' * 12}"


def test_the_lengths_in_the_repository_are_those_of_real_pairs():
    for name, least in (("short", 300), ("long", 250)):
        pairs = step_pairs.read_lengths(f"{gpu.LENGTHS}:{name}", 1000, 2048, 0)
        assert len(pairs) > least
    means = [
        sum(
            sum(step_pairs.lengths(pair))
            for pair in step_pairs.read_lengths(f"{gpu.LENGTHS}:{name}", 9, 2048, 0)
        )
        for name in ("short", "long")
    ]
    assert means[1] > 4 * means[0]
    assert gpu.LENGTHS.stat().st_size < 40_000
