"""What each objective costs: every one is right in a tiny run, and a wrong one is not timed."""

import dataclasses
from typing import Any

import pytest
import torch
from result_files import document_of, write_rows

from bench import losses, oracle
from bench.rows import load
from bench.variants import Shape
from fastdpo.loss.choices import CHOICES
from fastdpo.loss.objectives import Objective

TINY = Shape(N=128, D=16, V=96, pairs=4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows():
    return losses.run(TINY, "fp32", CPU, losses.cases(), rounds=1)


def test_every_objective_is_measured_and_right(rows):
    found = {row["objective"]: row for row in rows}
    assert set(CHOICES) <= found.keys() == losses.cases().keys()
    for name, row in found.items():
        assert row["note"] is None and row["time_ms"]["median"] > 0, name
        errors = [row[f"{x}_rel_err"] for x in ("loss", "dh", "dw")]
        assert max(errors) < 1e-4 and row["x_dpo"] > 0, (name, errors)
    examples = {row["examples"] for row in rows}
    assert examples == {"4 pairs", "8 responses", "a list of 8"}
    assert found["simpo"]["reference"] == "none" and found["tdpo2"]["limit"] == 2.2
    assert found[losses.LIVE]["reference"] == "in the call" and found[losses.DPO]["kernel"]


def test_a_part_is_compared_where_the_whole_is_too_large(monkeypatch):
    monkeypatch.setattr(losses, "WHOLE", 0)
    monkeypatch.setattr(losses, "ROWS", 24)
    monkeypatch.setattr(oracle, "VOCAB", 24)
    bench = losses.Bench(TINY._replace(softcap=20.0), "fp32", CPU, None)
    tokens = bench.oracle.tokens
    assert isinstance(tokens, torch.Tensor) and 0 < len(tokens) <= 24
    for name in (losses.DPO, *(x for x in CHOICES if losses.cases()[x].live)):
        row: dict[str, Any] = {"note": None}
        bench.check(row, losses.cases()[name])
        assert row["note"] is None and row["dw_rel_err"] < 1e-4, row


def test_no_loss_is_saturated_at_the_sizes_that_are_measured():
    """At these lengths fp32 still has a gradient where the reference is scaled."""
    bench = losses.Bench(Shape(N=8192, D=8, V=256, pairs=4), "fp32", CPU, None)
    row: dict[str, Any] = {"note": None}
    bench.check(row, losses.cases()["sigmoid, scaled reference"])
    assert row["note"] is None and row["loss_rel_err"] < 1e-3, row


def test_a_wrong_loss_is_not_timed(monkeypatch):
    real: Any = losses.linear_preference_loss

    def wrong(*inputs: Any, **options: Any) -> Any:
        *others, objective = inputs
        if isinstance(objective, Objective):
            objective = dataclasses.replace(objective, beta=2 * objective.beta)
        return real(*others, objective, **options)

    monkeypatch.setattr(losses, "linear_preference_loss", wrong)
    ipo, kto = losses.run(TINY, "fp32", CPU, ["ipo", "kto"], rounds=1)
    assert ipo["time_ms"] is None and ipo["note"].startswith("wrong: loss")
    assert kto["note"] is None and kto["x_dpo"] is None  # there is no row of DPO


def test_no_time_is_a_row_that_says_so():
    (row,) = losses.run(TINY, "fp32", CPU, [losses.DPO], rounds=1, minutes=-1.0)
    assert row["note"] == "not started: no time left"


def test_targets_and_tables(rows, tmp_path):
    slow = [{**row, "launches": 9.0} for row in rows]
    for row in slow:
        row["x_dpo"] = {"ipo": 1.04, "hinge": 1.2}.get(row["objective"], 1.0)
    lines = losses.target_lines(slow)
    assert "pass  1.04x  ipo: DPO's time (at most 1.05x); 9 launches, DPO's are 9" in lines
    assert any(line.startswith("miss  1.20x  hinge") for line in lines)
    assert not any(x in line for x in ("nca_pair", "WPO", "with reference") for line in lines)
    path = tmp_path / "losses.jsonl"
    write_rows(path, slow)
    text = document_of([path], tmp_path / "RESULTS.md")
    assert "## What objectives cost" in text and "| hinge | 4 pairs | before | stash |" in text
    costs = losses.newest_costs([path])
    assert costs["ipo"] == 1.04 and costs.keys() == losses.cases().keys()


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(losses.SHAPES, "smollm2", TINY)
    command = ["--shape", "smollm2", "--tokens", "64", "--objectives", "sigmoid", "ipo"]
    assert losses.main([*command, "--rounds", "1", "--out", str(tmp_path)]) == 0
    assert [row["objective"] for row in load([tmp_path / "losses.jsonl"])] == ["sigmoid", "ipo"]
    assert "DPO's time (at most 1.05x)" in capsys.readouterr().out
