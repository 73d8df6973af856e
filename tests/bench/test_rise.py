"""The study of the held-out score: its intervals, and a run on a tiny model."""

import json

import pytest
import torch
from result_files import write_rows
from tiny import LLAMA, save_tiny

from bench.rise import interval, study
from fastdpo.rounds.config import EvaluateConfig, IterateConfig
from fastdpo.sample.config import SampleConfig
from fastdpo.score.config import ScoreConfig
from fastdpo.train.config import TrainConfig


def vowels(prompts, responses):
    return [sum(c in "aeiou" for c in r) / (len(r) + 1) for r in responses]


def test_interval_is_students():
    """Three values: mean 2, standard error 1 / sqrt(3), quantile 4.303 of 2 degrees."""
    found = interval(torch.tensor([1.0, 2.0, 3.0]))
    assert found["mean"] == 2.0 and found["n"] == 3
    assert found["high"] == pytest.approx(2 + 4.302653 / 3**0.5)
    assert found["low"] == pytest.approx(2 - 4.302653 / 3**0.5)
    assert interval(torch.tensor([1.0]))["low"] is None


def test_study_compares_with_the_start_of_each_seed(tmp_path):
    save_tiny(LLAMA, tmp_path / "model")
    rows = [{"prompt": f"tell me about number {i}"} for i in range(9)]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    config = IterateConfig(
        model=str(tmp_path / "model"), prompts=prompts, rounds=1,
        sample=SampleConfig(num_samples=2, max_new_tokens=8, dtype="float32"),
        score=ScoreConfig(scorer="test_rise:vowels"),
        train=TrainConfig(
            max_length=64, max_tokens=160, batch_size=3, bf16=False, reference_cache=None
        ),
        evaluate=EvaluateConfig(heldout=4),
    )  # fmt: skip
    score, length, last = study(config, [0, 1], tmp_path / "out")
    assert (score["what"], length["what"], last["seeds"]) == ("score", "length", [0, 1])
    assert score["over_prompts"]["n"] == 8 and score["over_seeds"]["n"] == 2
    changes = []
    for seed in (0, 1):
        start, after = (
            json.loads((tmp_path / f"out/seed-{seed}/round-0{i}/summary.json").read_text())
            for i in (0, 1)
        )
        changes.append(after["score"] - start["score"])
    assert score["over_seeds"]["mean"] == pytest.approx(sum(changes) / 2)
