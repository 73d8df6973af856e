"""Each program of `fastdpo.examples` runs from start to end, on a tiny model."""

import json
import math
import threading

import pytest
import torch
from tiny import LLAMA, save_tiny

from fastdpo.examples import bare_loop, hf_trainer, long_context, reward_model_rounds, reward_server


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, pairs and prompts on disk."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(LLAMA, folder / "model")
    questions = [f"tell me about number {i}" for i in range(8)]
    pairs = [{"prompt": x, "chosen": "be nice", "rejected": "no idea at all"} for x in questions]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    rows = [{"prompt": x} for x in questions]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(inputs, out, *names):
    files = {"model": "model", "dataset": "pairs.jsonl", "prompts": "prompts.jsonl"}
    return [x for name in names for x in (f"--{name}", str(inputs / files[name]))] + [
        "--output_dir", str(out),
    ]  # fmt: skip


def test_bare_loop(inputs, tmp_path):
    argv = options(inputs, tmp_path / "policy", "model", "dataset")
    losses = bare_loop.main([*argv, "--batch_size=2", "--learning_rate=1e-2"])
    lengths = -0.01 * 2  # "no idea at all" has more tokens, so the first loss is below log 2
    assert losses[0] < math.log(2) + abs(lengths) and losses[-1] < losses[0]
    assert (tmp_path / "policy" / "model.safetensors").is_file()


def test_hf_trainer(inputs, tmp_path):
    argv = options(inputs, tmp_path, "model", "dataset")
    log = hf_trainer.main([*argv, "--max_steps=2"])
    first = next(row["loss"] for row in log if "loss" in row)
    assert first == pytest.approx(math.log(2), abs=0.1)
    assert (tmp_path / "model.safetensors").is_file()


def test_trl_trainer(inputs, tmp_path):
    pytest.importorskip("trl")
    from fastdpo.examples import trl_trainer

    argv = options(inputs, tmp_path, "model", "dataset")
    log = trl_trainer.main([*argv, "--max_steps=2", "--alpha=0"])
    first = next(row["loss"] for row in log if "loss" in row)
    assert first == pytest.approx(math.log(2), abs=1e-3)


def test_long_context(inputs, tmp_path, capsys):
    pytest.importorskip("peft")
    argv = options(inputs, tmp_path, "model", "dataset")
    metrics = long_context.main([*argv, "--max_length=64", "--gpu_gib=1"])
    assert metrics["pairs_dropped"] == 0 and "longest" in capsys.readouterr().out
    assert (tmp_path / "policy" / "model.safetensors").is_file()


def test_rounds_with_a_served_reward(inputs, tmp_path):
    """The reward comes from the example's server, and longer responses are better."""
    torch.manual_seed(0)
    with reward_server.server(lambda prompts, responses: [len(x) for x in responses]) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        rows = reward_model_rounds.main(
            [
                *options(inputs, tmp_path / "run", "model", "prompts"),
                f"--scorer=http://127.0.0.1:{running.server_port}/score",
                "--rounds=1", "--heldout=2", "--max_new_tokens=8",
            ]
        )  # fmt: skip
        running.shutdown()
    assert [row["round"] for row in rows] == [0, 1] and rows[1]["pairs"] > 0
    assert (tmp_path / "run" / "report.html").is_file()
