"""The log of training's metrics, with TensorBoard and without."""

import sys

import pytest

from fastdpo.lazy import installed
from fastdpo.train.metrics import MetricsLog, read_metrics


@pytest.fixture(autouse=True)
def asked_anew():
    installed.cache_clear()
    yield
    installed.cache_clear()


def test_rows_go_to_both_and_those_of_later_steps_are_dropped(tmp_path, capfd):
    for done in (0, 1):
        log = MetricsLog(tmp_path, done)
        for step in (1, 2)[done:]:
            log.add({"step": step, "loss": 0.5 / step})
        log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25},
    ]
    assert list((tmp_path / "tensorboard").glob("events*")) and not capfd.readouterr().err


def test_without_tensorboard_there_is_the_file_alone_and_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in ("a", "b"):
        log = MetricsLog(tmp_path / name, 0)
        log.add({"step": 1, "loss": 0.5})
        log.close()
        assert read_metrics(tmp_path / name / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
        assert not (tmp_path / name / "tensorboard").exists()
    told = capfd.readouterr().err
    assert told.count("tensorboard is not installed") == told.count("\n") == 1
    assert "metrics.jsonl alone" in told
