"""A command on several processes that fails says why, once, and all of them end."""

import json
import multiprocessing
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from tiny import LLAMA, save_tiny
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from fastdpo.cli import failing

TESTS = Path(__file__).parent
WORLD = 3


def failed(rank, port, out):
    os.environ |= dict(
        RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    with (out / f"{rank}").open("w") as sys.stderr:
        status = failing.fail(f"error of {rank if out.name != 'alike' else 'all'}", 2 + rank)
    os._exit(status)


@pytest.mark.parametrize(
    ("name", "ranks"), [("alike", [0, 1, 2]), ("first", [0]), ("others", [1, 2]), ("third", [2])]
)
def test_an_error_is_printed_once_by_the_first_that_knows_it(name, ranks, tmp_path, monkeypatch):
    out = tmp_path / name
    out.mkdir()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(failing, "_PATIENCE", timedelta(seconds=20 if name == "alike" else 0.5))
    context = multiprocessing.get_context("fork")
    found = [context.Process(target=failed, args=(rank, store.port, out)) for rank in ranks]
    for process in found:
        process.start()
    for process in found:
        process.join(60)
    told = {rank: (out / f"{rank}").read_text() for rank in ranks}
    printed = {rank: text for rank, text in told.items() if text}
    assert len(printed) == 1 and (0 in printed or 0 not in ranks)
    # Whoever was first to fail is what all end with.
    cause = json.loads(store.get("fastdpo/failed//why"))
    assert [*printed.values()] == [f"{cause[0]}\n"]
    assert {process.exitcode for process in found} == {cause[1]}


def test_a_launch_without_a_store_prints_all_the_same(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert failing.fail("error: this", 2) == 2
    assert capsys.readouterr().err == "error: this\n"


def launch(how, out, model, rows, *options):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
        "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(TESTS / "failing_driver.py"),
        how, "train", f"--model={model}", f"--dataset={rows}", f"--output_dir={out}",
        "--reference_cache=null", "--batch_size=4", "--max_tokens=200", "--save_steps=2", *options,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_what_ends_one_process_ends_all(tmp_path):
    model = save_tiny(LLAMA, tmp_path / "model")
    rows, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    texts = [{"prompt": f"number {i}", "chosen": f"it is {i}", "rejected": "no"} for i in range(16)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    cases = {
        "disk": (f"error: {run}/checkpoint/step-00000002 can't be written ([Errno 27]", []),
        "model": ("error: the second is broken", ["step-00000002"]),
        "bug": ("KeyError: 'of the second'", ["step-00000002"]),
        "killed": ("error: a process of this launch ended without a word", ["step-00000002"]),
    }
    for how, (text, steps) in cases.items():
        ended = launch(how, run, model, rows, "--engine=fsdp2")
        assert ended.returncode, how
        if how == "killed" and text not in ended.stderr:
            text = "(SIGKILL) received"  # the launcher was faster: it ends the first, and says why
        assert ended.stderr.count(text) == 1, ended.stderr
        assert ended.stderr.count("error: ") <= 1, ended.stderr
        assert [x.name for x in run.glob("checkpoint/step-*")] == steps, ended.stderr
        if how != "disk":  # it began anew each time, from no step
            (run / "checkpoint" / "step-00000002").rename(tmp_path / f"after-{how}")
    # Nothing is lost: the same command goes on.
    (tmp_path / "after-bug").rename(run / "checkpoint" / "step-00000002")
    ended = launch("none", run, model, rows, "--engine=fsdp2")
    assert ended.returncode == 0, ended.stderr
    assert (run / "policy").is_dir()
    bad = {
        "--sp_size=3": "error: sp_size=3 does not divide the 2 processes",
        "--batch_size=0": "error: batch_size=0 must be",
    }
    for option, text in bad.items():
        ended = launch("none", tmp_path / "none", model, rows, "--engine=fsdp2", option)
        assert ended.returncode and ended.stderr.count("error: ") == 1, ended.stderr
        assert text in ended.stderr and not (tmp_path / "none" / "run.json").exists()
