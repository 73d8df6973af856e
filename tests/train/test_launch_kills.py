"""A launch that is killed at random moments ends in the same bits, and on fewer processes alike."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import LLAMA, save_tiny

from fastdpo.train.metrics import read_metrics

SCRIPT = Path(__file__).parents[1] / "launch_kills.py"
EARLY, KILLS = 8, 20
TIMES = {"pairs_per_second", "fill_rate", "eval_runtime", "eval_samples_per_second"}


def check(out):
    """The policies and metrics that `launch_kills.py` left."""
    whole, killed, fewer = (
        (
            load_file(out / name / "policy" / "model.safetensors"),
            read_metrics(out / name / "metrics" / "metrics.jsonl"),
            json.loads((out / name / "best.json").read_text()),
        )
        for name in ("whole", "killed", "fewer")
    )
    assert whole[0].keys() == killed[0].keys()
    assert all(killed[0][name].equal(x) for name, x in whole[0].items())
    assert len(whole[1]) == len(killed[1]) == len(fewer[1])
    for row, again, other in zip(whole[1], killed[1], fewer[1]):
        assert row.keys() == again.keys() == other.keys()
        for name in row.keys() - TIMES:
            assert row[name] == again[name], name
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    assert whole[2] == killed[2]


@pytest.mark.slow
def test_killed_at_random_moments_a_launch_ends_the_same(tmp_path):
    model, out = save_tiny(LLAMA, tmp_path / "model"), tmp_path / "runs"
    out.mkdir()
    for name, count in (("pairs", 40), ("held", 6)):
        rows = [
            {
                "prompt": f"{name} number {i}",
                "chosen": f"it is {i}",
                "rejected": "no " * (1 + i % 5),
            }
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    options = [
        f"--model={model}", f"--dataset={tmp_path / 'pairs.jsonl'}", "--engine=fsdp2",
        f"--eval_dataset={tmp_path / 'held.jsonl'}", "--eval_steps=3", "--save_steps=2",
        "--load_best_model_at_end=true", "--reference_cache=null", "--bf16=false",
        "--batch_size=10", "--max_tokens=100", "--learning_rate=1e-3", "--num_train_epochs=4",
    ]  # fmt: skip
    numbers = "0", str(EARLY), str(KILLS), "4", "2"
    command = [sys.executable, str(SCRIPT), *numbers, str(out), "train", *options]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert len(told["places"]) == EARLY + KILLS and told["codes"] == [0, 0, 0], told
    assert any("loading" in x for x in told["places"][:EARLY])
    check(out)
