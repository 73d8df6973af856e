"""A run under a launch of several processes: what it makes, how it ends, how it goes on."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_rounds import ENVIRONMENT, TESTS, arguments, same, weights
from tiny import LLAMA, save_tiny

from fastdpo.cli import main
from fastdpo.storage import read_parts


# --------------------------------------------------------- what the processes do before they begin
def note_what_waits_hold(rank, others):
    """On all but the first, print how many parameters are alive at each wait."""
    from fastdpo.rounds.processes import Processes

    hear = Processes._hear

    def noted(self, *args):
        gc.collect()
        print("held", sum(isinstance(x, torch.nn.Parameter) for x in gc.get_objects()))
        return hear(self, *args)

    Processes._hear = noted  # type: ignore[method-assign]


def fail_in_training(rank, others):
    from fastdpo.errors import DataError

    _in_training(rank, 1, lambda: (_ for _ in ()).throw(DataError("a row is broken")))


def crash_in_training(rank, others):
    _in_training(rank, 1, lambda: [][0])


def die_in_training(rank, others):
    _in_training(rank, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))


def die_late_in_training(rank, others):
    """After the first checkpoint."""
    _in_training(rank, 1, lambda: os.kill(os.getpid(), signal.SIGKILL), call=2)


def die_first_in_training(rank, others):
    _in_training(rank, 0, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _in_training(rank, which, act, call=1):
    from fastdpo.train import update

    if rank != which:
        return
    real, calls = update.batch_loss, [0]

    def changed(*args, **kwargs):
        calls[0] += 1
        return act() if calls[0] == call else real(*args, **kwargs)

    update.batch_loss = changed


def die_in_sampling(rank, others):
    """The first process, while the others wait."""
    from fastdpo.sample import stage

    def die(*args, **kwargs):
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        stage.write_jsonl_atomic = die


def crash_in_sampling(rank, others):
    from fastdpo.sample import stage

    if rank == 0:
        stage.write_jsonl_atomic = lambda *args, **kwargs: [][0]


def stop_in_sampling(rank, others):
    from fastdpo.sample import stage

    if rank == 0:
        stage.write_jsonl_atomic = lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)


# ----------------------------------------------------------------------------------- the tests
@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(LLAMA, folder / "model")
    rows = [{"prompt": f"tell me about number {i}"} for i in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def launches(*given):
    """Exit codes and standard errors of each process of each launch."""
    command = [sys.executable, str(TESTS / "launched.py")]
    given = [
        {**each, "argv": list(map(str, each["argv"])), "log": str(each["log"])} for each in given
    ]
    done = subprocess.run(
        [*command, json.dumps(given)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = []
    for each, codes in zip(given, json.loads(done.stdout.splitlines()[-1])):
        errors = [Path(each["log"], f"{rank}.err").read_text() for rank in range(len(codes))]
        found.append((codes, errors))
    return found


def told(errors):
    """The lines of errors, of each process."""
    return [[x for x in text.splitlines() if x.startswith("error: ")] for text in errors]


def close(found, wanted):
    for name, value in weights(wanted, 1).items():
        torch.testing.assert_close(weights(found, 1)[name], value, rtol=1e-4, atol=1e-5)


def test_two_processes_run_like_one(inputs, tmp_path):
    """Samples and pairs of the first round to the bit, its policy up to rounding; while the first
    process samples, the other one holds no model."""
    assert main(arguments(inputs, tmp_path / "one", rounds=1)) == 0
    argv = arguments(inputs, tmp_path / "two", rounds=1)
    before = "test_launched:note_what_waits_hold"
    [(codes, errors)] = launches(dict(argv=argv, log=tmp_path / "log", before=before))
    assert codes == [0, 0], errors
    runs = tmp_path / "one", tmp_path / "two"
    assert read_parts(runs[0] / "round-01/candidates") == read_parts(
        runs[1] / "round-01/candidates"
    )
    pairs = [(run / "round-01/pairs.jsonl").read_bytes() for run in runs]
    assert pairs[0] == pairs[1]
    close(*reversed(runs))
    start = load_file(inputs / "model" / "model.safetensors")
    assert not same(weights(runs[1], 1), start)
    assert "Finished: 1 of 1 rounds" in (runs[1] / "report.html").read_text()
    said = (tmp_path / "log/1.out").read_text().splitlines()
    said = [line for line in said if not line.startswith("[Gloo]")]  # of torch before 2.11
    # While it waits to load the model, to train and to end.
    assert said == ["held 0"] * 3, "the first process alone talks"


# What becomes of two processes: options, what they do before, their exit codes, and the beginning
# of what each says; what is empty says nothing.
ENDS = {
    "an option": (dict(rounds=0), None, [2, 2], ["rounds=0 must be", ""]),
    "an engine": (dict(train__sp_size=3), None, [2, 2], ["sp_size=3 does not divide the 2", ""]),
    "a file": (dict(prompts="/nowhere.jsonl"), None, [2, 2], ["/nowhere.jsonl: no such", ""]),
    "a model": (dict(model="/nowhere"), None, [2, 2], ["the folder model='/nowhere'", ""]),
    "a bug": ({}, "crash_in_sampling", [1, 1], ["", ""]),
    "a stop": ({}, "stop_in_sampling", [130, 130], ["", ""]),
    "the first": ({}, "die_in_sampling", [-9, 2], ["", "process 1: the first process is gone"]),
    "an error of another": ({}, "fail_in_training", [2, 2], ["process 1: a row is broken", ""]),
    "a bug of another": ({}, "crash_in_training", [2, 1], ["process 1: IndexError: list", ""]),
    "another": ({}, "die_in_training", [2, -9], ["another process is gone", ""]),
    "the first in training": ({}, "die_first_in_training", [-9, 2], ["", "process 1: the first"]),
}  # fmt: skip


@pytest.mark.slow
def test_one_process_says_what_ended_them_and_the_same_command_goes_on(inputs, tmp_path):
    given = []
    for name, (changes, before, _, _) in ENDS.items():
        argv = arguments(inputs, tmp_path / "run", **{"rounds": 1, **changes})
        named = {"before": f"test_launched:{before}"} if before else {}
        given.append(dict(argv=argv, log=tmp_path / name, **named))
    argv = arguments(inputs, tmp_path / "run", rounds=1)
    given += [dict(argv=argv, log=tmp_path / "again")]
    argv = arguments(inputs, tmp_path / "whole", rounds=1)
    given += [dict(argv=argv, log=tmp_path / "whole log")]
    given += [dict(argv=["doctor"], log=tmp_path / "other")]
    *found, again, whole, other = launches(*given)
    for (name, (_, _, codes, says)), (ended, errors) in zip(ENDS.items(), found):
        print(name, ended, errors)
        assert ended == codes, (name, errors)
        lines = told(errors)
        assert [len(x) for x in lines] == [bool(x) for x in says], (name, errors)
        for line, wanted in zip(lines, says):
            assert not wanted or line[0].startswith(f"error: {wanted}"), name
        crashed = name.startswith("a bug")
        assert sum("Traceback" in x for x in errors) == crashed, (name, errors)
    assert again[0] == whole[0] == [0, 0], (again, whole)
    assert same(weights(tmp_path / "run", 1), weights(tmp_path / "whole", 1))
    assert other[0] == [2, 2]
    assert told(other[1]) == [[x for x in told(other[1])[0] if "launched as 2" in x], []]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_killed_in_training_it_goes_on_with_as_many_processes_or_others(inputs, tmp_path, engine):
    """With as many to the bit, with others up to rounding, as one process has it."""
    count, others = (2, 3) if engine == "ddp" else (4, 2)

    def given(out, log, count, **changes):
        argv = arguments(inputs, tmp_path / out, rounds=1, train__engine=engine)
        return dict(argv=argv, log=tmp_path / log, count=count, ends_others=True, **changes)

    kill = {"before": "test_launched:die_late_in_training"}
    whole, *found = launches(
        given("whole", "log", count),
        given("same", "log-killed", count, **kill),
        given("same", "log-same", count),
        given("other", "log-killed-too", count, **kill),
        given("other", "log-other", others),
    )
    assert whole[0] == [0] * count, whole
    assert [codes[1] for codes, _ in found[::2]] == [-signal.SIGKILL] * 2, found
    assert [codes for codes, _ in found[1::2]] == [[0] * count, [0] * others], found
    assert same(weights(tmp_path / "same", 1), weights(tmp_path / "whole", 1))
    assert main(arguments(inputs, tmp_path / "one", rounds=1)) == 0
    for name in ("whole", "other"):
        close(tmp_path / name, tmp_path / "one")
