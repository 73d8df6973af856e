"""What happens to a run's folder that is used by another process, damaged, or on a full disk."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_rounds import ENVIRONMENT, TESTS, arguments, same, weights
from tiny import LLAMA, save_tiny

from fastdpo.cli import main
from fastdpo.storage import checksum_path, write_json_atomic


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(LLAMA, folder / "model")
    rows = [{"prompt": f"tell me about number {i}"} for i in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(inputs, out, **changes):
    options = {
        "score__scorer": "test_rounds:vowels",
        "rounds": 1,
        "evaluate__heldout": 0,
        **changes,
    }
    assert main(arguments(inputs, out, **options)) == 0
    return out


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    return run(inputs, tmp_path_factory.mktemp("whole"), rounds=2)


def test_a_second_run_in_a_folder_is_refused(inputs, tmp_path):
    """The lock is the process's: it is gone with it, whatever ends it."""
    code = (
        "import sys, time; from pathlib import Path; from fastdpo.storage import locked\n"
        "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(600)"
    )
    out = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True, cwd=TESTS.parent
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        argv = arguments(
            inputs, out, score__scorer="test_rounds:vowels", rounds=1, evaluate__heldout=0
        )
        done = subprocess.run(
            [sys.executable, "-m", "fastdpo.cli", *argv], capture_output=True, text=True,
            env=ENVIRONMENT,
        )  # fmt: skip
        assert done.returncode == 2 and f"process {other.pid}" in done.stderr, done.stderr
        assert not (out / "state.json").exists()
    finally:
        other.kill()
        other.wait()
    assert main(argv) == 0


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def stopped(inputs, out, capsys, **changes):
    """A run that sampled and scored, and found no pair; and the command that goes on."""
    options = dict(score__scorer="test_rounds:vowels", rounds=1, evaluate__heldout=0, **changes)
    assert main(arguments(inputs, out, **options, pair__min_gap=100)) == 2
    assert "Lower min_gap=" in capsys.readouterr().err
    return arguments(inputs, out, **options)


def test_a_damaged_policy_is_named_and_made_again(inputs, whole, tmp_path, capsys):
    out = run(inputs, tmp_path / "run")
    argv = arguments(inputs, out, score__scorer="test_rounds:vowels", rounds=2, evaluate__heldout=0)
    damage(out / "round-01" / "policy" / "model.safetensors")
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "model.safetensors differs" in error and "Delete" in error
    shutil.rmtree(out / "round-01" / "policy")
    shutil.rmtree(out / "round-01" / "scores")  # which nothing needs any more
    assert main(argv) == 0
    assert "policy is gone, or not whole; it is made again" in capsys.readouterr().out
    assert not (out / "round-01" / "scores").exists()
    for index in (1, 2):
        assert same(weights(out, index), weights(whole, index))


def test_damaged_rows_are_named_and_made_again(inputs, whole, tmp_path, capsys):
    out = tmp_path / "run"
    argv = stopped(inputs, out, capsys)
    parts = [out / "round-01" / name / "part-00000.jsonl" for name in ("candidates", "scores")]
    before = [part.read_bytes() for part in parts]
    for part in parts:
        damage(part)
        assert main(argv) == 2
        assert f"{part}: the content is not what was written" in capsys.readouterr().err
        part.unlink()
    assert main(argv) == 0
    assert [part.read_bytes() for part in parts] == before
    assert same(weights(out, 1), weights(whole, 1))


def test_options_are_free_until_something_depends_on_them(inputs, tmp_path, capsys):
    out = tmp_path / "run"
    argv = stopped(inputs, out, capsys)
    assert main([*argv, "--sample.temperature=0.5"]) == 2
    assert "holds a run with sample.temperature=1.0" in capsys.readouterr().err
    state = json.loads((out / "state.json").read_text())
    del state["config"]["sample"]["top_p"]  # as if the option were newer than the run
    del state["ended"], state["begun"]  # and so were these
    write_json_atomic(out / "state.json", state, checksum=True)
    assert main([*argv, "--sample.top_p=0.5"]) == 2
    assert "holds a run with sample.top_p=1.0" in capsys.readouterr().err
    assert main([*argv, "--pair.min_gap=0.001", "--train.learning_rate=1e-2"]) == 0
    assert json.loads((out / "state.json").read_text())["config"]["pair"]["min_gap"] == 0.001
    for option in ("--pair.min_gap=0.002", "--train.learning_rate=1e-3"):
        assert main([*argv, "--pair.min_gap=0.001", "--train.learning_rate=1e-2", option]) == 2
        assert "holds a run with" in capsys.readouterr().err
    assert (
        main([*argv, "--pair.min_gap=0.001", "--train.learning_rate=1e-2", "--train.save_steps=7"])
        == 0
    )


def test_a_truncated_line_is_named(inputs, tmp_path, capsys):
    out = tmp_path / "run"
    argv = stopped(inputs, out, capsys)
    part = out / "round-01" / "candidates" / "part-00001.jsonl"
    part.write_text(part.read_text()[:-40])
    checksum_path(part).unlink()  # as if it were of an older version
    assert main(argv) == 2
    assert "part-00001.jsonl:" in capsys.readouterr().err


def test_a_disk_that_fills_up_with_weights_is_one_error(inputs, whole, tmp_path):
    """The system itself refuses to write more from the first training step on."""
    code = (
        "import resource, signal, sys\n"
        "from fastdpo.cli import main; from fastdpo.rounds import work as run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); real = run.train\n"
        "def train(*arguments, **options):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "    return real(*arguments, **options)\n"
        "run.train = train\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    argv = arguments(
        inputs, tmp_path / "run", score__scorer="test_rounds:vowels", rounds=1, evaluate__heldout=0
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True,
        env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "can't be written" in done.stderr and "GiB are free" in done.stderr
    assert "Traceback" not in done.stderr
    assert main(argv) == 0
    assert same(weights(tmp_path / "run", 1), weights(whole, 1))


def test_a_full_disk_loses_nothing(inputs, tmp_path, capsys, monkeypatch):
    """A write that fails is one line; what was there stays, and the same command goes on."""
    from fastdpo import storage
    from fastdpo.score import stage as scoring

    real, calls = storage.write_jsonl_atomic, []

    def full(path, rows):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(path))
        real(path, rows)

    argv = arguments(
        inputs, tmp_path, score__scorer="test_rounds:vowels", rounds=1, evaluate__heldout=0
    )
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "write_jsonl_atomic", full)
        assert main(argv) == 2
    assert "No space left" in capsys.readouterr().err
    scores = tmp_path / "round-01" / "scores"
    assert [path.name for path in sorted(scores.glob("part-*"))] == ["part-00000.jsonl"]
    kept = (scores / "part-00000.jsonl").stat().st_mtime_ns
    assert main(argv) == 0
    assert (scores / "part-00000.jsonl").stat().st_mtime_ns == kept
