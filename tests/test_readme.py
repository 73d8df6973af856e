"""The README's quick starts run as they stand, and its generated tables are current."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import LLAMA, build_tokenizer

from fastdpo.loss import reference

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks():
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_loss_in_a_pytorch_loop(capsys):
    names: dict = {}
    exec(blocks()[0], names)
    assert capsys.readouterr().out.strip()
    h, w = (names[name].detach().double().requires_grad_() for name in "hw")
    gold = reference.linear_dpo_loss(
        h, w, names["target"], names["bounds"], names["ref_logp"].double(),
        rows_N=names["rows"], beta=0.1, alpha=0.01,
    )  # fmt: skip
    gold.backward()
    assert names["result"].loss.item() == pytest.approx(gold.item(), rel=1e-5)
    for name, x in zip("hw", (h, w)):
        assert (names[name].grad - x.grad).norm() < 1e-5 * x.grad.norm()


def test_the_loss_in_a_transformers_trainer(tmp_path):
    from transformers import TrainingArguments

    names: dict = {}
    exec(blocks()[1], names)
    model = LLAMA.build(len(build_tokenizer()))
    generator = torch.Generator().manual_seed(0)

    def example(i):
        ids = torch.randint(3, 300, (2, 12), generator=generator)  # chosen, rejected
        labels = ids.clone()
        labels[:, :5] = -100  # the prompt
        labels[1, 9 + i % 3 :] = -100  # padding
        return {"input_ids": ids, "labels": labels, "ref_logp": torch.tensor([-40.0, -30.0])}

    def collate(examples):  # all chosen first, then all rejected
        return {
            name: torch.cat([torch.stack([x[name][side] for x in examples]) for side in (0, 1)])
            for name in examples[0]
        }

    data = [example(i) for i in range(8)]

    def trainer_of(steps, batch, accumulation, more=None, **changes):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, learning_rate=1e-2, report_to="none",
            use_cpu=True, disable_tqdm=True, remove_unused_columns=False, logging_steps=1,
            save_strategy="no", **changes,
        )  # fmt: skip
        return names["DPOTrainer"](
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


def test_the_two_commands_are_one_line_each():
    lines = [line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv")]
    assert len(lines) == 2
    assert lines[0].endswith("fastdpo demo") and lines[1].endswith("-m pytest -n auto")


def test_the_benchmark_table_is_generated_from_the_committed_results(capsys):
    from bench import report

    results = sorted((ROOT / "bench" / "results").glob("*.jsonl"))
    if not results:
        pytest.fail("no committed benchmark results")
    names = [str(path) for path in results]
    texts = ["--out", str(ROOT / "bench/RESULTS.md"), "--readme", str(ROOT / "README.md")]
    assert report.main([*names, *texts, "--check"]) == 0
