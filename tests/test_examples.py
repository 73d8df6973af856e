"""Each program of `fastdpo.examples` runs from start to end, on a tiny model."""

import copy
import json
import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from tiny import LLAMA, build_tokenizer, save_tiny

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


def test_the_transformers_trainer(tmp_path):
    from transformers import TrainingArguments

    model = LLAMA.build(len(build_tokenizer()))
    generator = torch.Generator().manual_seed(0)

    def example(i):
        ids = torch.randint(3, 300, (2, 12), generator=generator)  # chosen, rejected
        labels = ids.clone()
        labels[:, :5] = -100  # the prompt
        labels[1, 9 + i % 3 :] = -100  # padding
        labels = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)  # row t predicts label t
        return {"input_ids": ids, "labels": labels, "ref_logp": torch.tensor([-40.0, -30.0])}

    def collate(examples):  # all chosen first, then all rejected
        return {
            name: torch.cat([torch.stack([x[name][side] for x in examples]) for side in (0, 1)])
            for name in examples[0]
        }

    data = [example(i) for i in range(8)]

    def trainer_of(steps, batch, accumulation, more=None, **changes) -> Any:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, learning_rate=1e-2, report_to="none",
            use_cpu=True, disable_tqdm=True, remove_unused_columns=False, logging_steps=1,
            save_strategy="no", **changes,
        )  # fmt: skip
        return hf_trainer.DPOTrainer(
            copy.deepcopy(model), arguments, train_dataset=data, data_collator=collate,
            **(more or {}),
        )  # fmt: skip

    def train(*sizes):
        trainer = trainer_of(*sizes)
        trainer.train()
        return [row for row in trainer.state.log_history if "loss" in row]

    rows = train(20, 4, 1)
    assert len(rows) == 20 and rows[-1]["loss"] < rows[0]["loss"]
    # Accumulated micro-batches are one batch.
    (split,) = train(1, 2, 2)
    for name in ("loss", "grad_norm"):
        assert split[name] == pytest.approx(rows[0][name], rel=1e-3), name

    # It evaluates; the predictions are those of the mapping.
    seen = []
    more = {"eval_dataset": data[:4], "compute_metrics": lambda found: seen.append(found) or {}}
    trainer = trainer_of(1, 4, 1, more, eval_strategy="steps", per_device_eval_batch_size=2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    (after,) = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    logp, ref_logp, lengths = seen[0].predictions
    assert ref_logp.tolist() == [-40.0, -40.0, -30.0, -30.0] * 2
    assert lengths.tolist() == [7, 7, 4, 5, 7, 7, 6, 4]
    score = (0.1 * (logp - ref_logp) + 0.01 * lengths).reshape(2, 2, 2)  # batch, side, pair
    margins = score[:, 0] - score[:, 1]
    assert before == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-5) != after
    _, predictions, labels = trainer.prediction_step(
        trainer.model, collate(data[:2]), False, ignore_keys=["lengths_S"]
    )
    assert len(predictions) == 2 and len(labels) == 4

    # Mixed precision reaches the body, which the trainer's own autocast surrounds.
    trainer = trainer_of(1, 4, 1, bf16=True)
    kinds = []
    trainer.model.model.layers[0].mlp.register_forward_hook(lambda *x: kinds.append(x[2].dtype))
    trainer.train()
    assert set(kinds) == {torch.bfloat16}


def test_trl_trainer(inputs, tmp_path):
    pytest.importorskip("trl")
    from fastdpo.examples import trl_trainer

    argv = options(inputs, tmp_path, "model", "dataset")
    log = trl_trainer.main([*argv, "--max_steps=2", "--alpha=0", "--loss_type=robust"])
    first = next(row["loss"] for row in log if "loss" in row)
    assert first == pytest.approx(math.log(2), abs=1e-3)


def test_long_context(inputs, tmp_path, capsys):
    pytest.importorskip("peft")
    argv = options(inputs, tmp_path, "model", "dataset")
    metrics = long_context.main([*argv, "--max_length=64", "--gpu_gib=1"])
    assert metrics["pairs_dropped"] == 0 and "Longest pair" in capsys.readouterr().out
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
