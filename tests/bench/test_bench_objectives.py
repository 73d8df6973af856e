"""Objectives trained on the same prompts: what each is given, and a study of a tiny model."""

import json
import random
from typing import Any

import pytest
import torch
from result_files import document_of
from tiny import LLAMA, save_tiny

from bench import objectives as study
from bench.rows import load
from fastdpo.data.rows import example_rows, read_rows
from fastdpo.errors import ConfigError, DataError


def lists(count, start):
    """Five responses to a prompt: longer ones have other scores, and one score is there twice."""
    chance = random.Random(start)
    return {
        f"tell me about number {i}": {
            "responses": [" " + "nice " * (j + 1) for j in range(5)],
            "rewards": [*chance.sample(range(1, 8), 4), 1],
        }
        for i in range(start, start + count)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("objectives")
    save_tiny(LLAMA, path / "model")
    (path / "train.json").write_text(json.dumps(lists(8, 0)))
    (path / "test.json").write_text(json.dumps({**lists(6, 100), **lists(2, 0)}))
    return path


def command(folder, *more):
    return [
        "--data", str(folder / "train.json"), "--held-out", str(folder / "test.json"),
        "--model", str(folder / "model"), "--out", str(folder / "out"), "--prompts", "6",
        "--heldout", "4", "--responses", "3", "--batch-size", "3", "--max-new-tokens", "6",
        "--learning-rate", "1e-3", *more,
    ]  # fmt: skip


def test_responses_have_different_scores_from_the_best_to_the_worst(folder):
    rows = study.read_scored(folder / "train.json", "Be brief.")
    for row in rows:
        assert row.scores == sorted(set(row.scores), reverse=True)
        assert row.prompt.endswith("\n\nBe brief.")
    chosen = study.choose(rows, 2, 5, "--prompts")
    assert [len(x.prompt) for x in chosen] == sorted(len(x.prompt) for x in rows)[:5]
    scores = {x.prompt: x.scores for x in rows}
    for row in chosen:
        known = scores[row.prompt]
        assert row.scores == [known[0], known[-1]]
    with pytest.raises(ConfigError, match=r"--prompts=9, but 8 prompts have 2 responses"):
        study.choose(rows, 2, 9, "--prompts")


def test_the_bootstrap_has_the_intervals_of_the_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) * 3 + 5
    mean, low, high = study.bootstrap(values)
    assert mean == pytest.approx(values.double().mean().item())
    assert high - low == pytest.approx(2 * 1.96 * 3 / 20, rel=0.1) and low < mean < high


def test_a_study_of_three_kinds_goes_on_where_it_was(folder, capsys):
    assert study.main(command(folder, "--objectives", "ipo", "kto:beta=0.2")) == 0
    rows = load([folder / "out" / "results.jsonl"])
    assert [row["objective"] for row in rows] == ["start", "ipo", "kto:beta=0.2"]

    # All see the same prompts: the best and the worst as a pair, as two responses, in a list.
    def read(name: str) -> list[Any]:
        return list(example_rows(read_rows(folder / "out" / "data" / f"{name}.jsonl")))

    pairs, singles, ranked = map(read, ("pairs", "singles", "lists"))
    assert len(pairs) == len(ranked) == 6 and len(singles) == 12
    for i, (pair, ranking) in enumerate(zip(pairs, ranked)):
        assert [pair.chosen, pair.rejected] == ranking.responses[:: len(ranking.responses) - 1]
        assert [x.completion for x in singles[2 * i : 2 * i + 2]] == [pair.chosen, pair.rejected]
        assert [x.label for x in singles[2 * i : 2 * i + 2]] == [True, False]
        assert pair.prompt == ranking.prompt == singles[2 * i].prompt
    held = [row.prompt for row in read("held")]
    assert len(held) == 4 and not any(row.prompt in held for row in pairs)
    before = (folder / "out" / "results.jsonl").read_text()
    names = ["ipo", "kto:beta=0.2", "plackett_luce", "simpo:beta=2.0,simpo_gamma=1.0"]
    assert study.main(command(folder, "--objectives", *names)) == 0
    rows = load([folder / "out" / "results.jsonl"])
    assert (folder / "out" / "results.jsonl").read_text().startswith(before)
    assert [row.get("shape") for row in rows] == [None, "pairs", "singles", "lists", "pairs"]
    for row in rows[1:]:
        for name in ("margin", "accuracy", "kl", "length", "length_change"):
            value, low, high = row[name]
            assert low <= value <= high, name
        assert row["margin"][0] != 0
    steps = (folder / "out/ipo/metrics/metrics.jsonl").read_text().splitlines()
    assert len(steps) == 2 and not (folder / "out/ipo/policy").exists()
    text = document_of([folder / "out" / "results.jsonl"], folder / "RESULTS.md")
    assert "## Objectives on the same prompts" in text and "| plackett_luce | lists |" in text
    assert "2 steps of 3 prompts, 6 prompts with 3 responses" in text
    capsys.readouterr()
    assert study.main(["--report", str(folder / "out" / "results.jsonl")]) == 0
    assert "| kto:beta=0.2 | singles |" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="a row of other settings"):
        study.main(command(folder, "--epochs", "2"))


def test_what_cannot_be_run_is_refused_before_anything_is(folder, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(DataError, match="give lists"):
        study.main(command(folder, "--data", str(tmp_path / "pairs.jsonl")))
    with pytest.raises(ConfigError, match="give options as name=value"):
        study.read_run("simpo:beta")
    for name in ("ipo:nothing=1", "none"):
        with pytest.raises((TypeError, ValueError)):
            study.main([*command(folder, "--out", str(tmp_path)), "--objectives", name])
    assert not (tmp_path / "results.jsonl").exists()
    with pytest.raises(SystemExit):
        study.parse([])
