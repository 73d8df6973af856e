"""A list at once against its pairs: checked first, timed in turns, and a table of it."""

import pytest
import torch

from bench import lists, report, step_pairs
from bench.rows import load


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    kind, numbers = step_pairs.SHAPES["tiny"]
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1, head_dim=16)  # fmt: skip
    monkeypatch.setitem(step_pairs.SHAPES, "tiny", (kind, {**numbers, **sizes}))


def command(*more):
    return [
        "--shape", "tiny", "--responses", "4", "--lengths", "24/6", "--dtype", "float32",
        "--rounds", "2", *more,
    ]  # fmt: skip


def test_rows_and_their_table(tmp_path, capsys):
    out = tmp_path / "lists.jsonl"
    assert lists.main(command("--out", str(out))) == 0
    rows = {row["variant"]: row for row in load([out])}
    assert {name: row["tokens"] for name, row in rows.items()} == {
        lists.PAIRS: 3 * 36,
        "pairs at once": 3 * 36,
        "list, DPO of the best and each other": 48,
        "list, lipo_lambda": 48,
        "list, plackett_luce": 48,
    }
    for row in rows.values():
        assert row["note"] is None and row["loss_off"] < 1e-6 and row["grad_off"] < 1e-5
        assert row["time_ms"]["samples"] == row["x_pairs"]["samples"] == 2
    assert rows[lists.PAIRS]["x_pairs"]["median"] == 1.0
    assert report.kind_of(load([out])) == lists.OP
    capsys.readouterr()
    assert lists.main(["--report", str(out)]) == 0
    table = capsys.readouterr().out
    assert "4 responses of 6 tokens to a prompt of 24, tiny, float32" in table
    assert "| list, plackett_luce | 6 | 48 |" in table


def test_what_differs_is_not_timed(monkeypatch):
    """A loss of the best against each other that leaves a comparison out."""
    monkeypatch.setattr(lists, "sum_over_better", lambda grid: lists_without_the_last(grid))
    *_, best, lipo, _ = lists.run(lists.parse(command()))
    assert best["note"] == "loss_off is over 1e-05, grad_off is over 0.0001"
    assert best["time_ms"] is None and best["x_pairs"] is None
    assert lipo["note"] is None and lipo["time_ms"] is not None


def lists_without_the_last(grid):
    loss_PLL = torch.nn.functional.softplus(-grid.gap_PLL)
    return loss_PLL[:, 0, 1:-1].sum(1)


@pytest.mark.parametrize("arguments", [["--lengths", "512"], ["--responses", "2"]])
def test_impossible_commands(arguments):
    with pytest.raises(SystemExit):
        lists.parse(arguments)
