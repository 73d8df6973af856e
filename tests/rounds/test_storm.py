"""Storm-7B's recipe at the size of a test: its classes of models, on four processes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_devices import save_valued
from test_launch_files import run
from tiny import MISTRAL, build_tokenizer, save_tiny

from fastdpo.cli import main
from fastdpo.recipes.files import files
from fastdpo.storage import read_parts

# Mistral's template of OpenChat in few words: roles with names of their own, and an end of turn.
TEMPLATE = (
    "{% for m in messages %}GPT4 Correct {{ m.role.title() }}: {{ m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}GPT4 Correct Assistant:{% endif %}"
)


@pytest.mark.slow
def test_storm_trains_sharded_over_four_processes_in_each_round(tmp_path):
    """As one process does up to rounding: the same samples, scores and pairs in the first round,
    and the same policy."""
    model = save_tiny(MISTRAL, tmp_path / "model")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    scorer = save_valued(tmp_path / "reward")
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"question {i}"}]} for i in range(12)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    smaller = {
        "model": model, "prompts": prompts, "score.scorer": scorer, "rounds": 2,
        "sample.num_samples": 4, "sample.max_new_tokens": 12, "sample.dtype": "float32",
        "score.dtype": "float32", "train.bf16": "false", "train.batch_size": 4,
        "train.learning_rate": 1e-3, "train.max_length": 96, "train.max_tokens": 256,
        "train.reference_cache": "null", "evaluate.heldout": 2,
    }  # fmt: skip
    argv = ["iterate", f"--config={files()['storm-7b.yaml']}"]
    argv += [f"--{name}={value}" for name, value in smaller.items()]
    out = tmp_path / "four"
    launch = ["torchrun", "--standalone", "--nproc-per-node=4", "-m", "fastdpo.cli"]
    code, said = run([*launch, *argv, f"--output_dir={out}"], tmp_path)
    assert code == 0, said
    one = tmp_path / "one"
    assert main([*argv, f"--output_dir={one}", "--train.engine=ddp"]) == 0
    for part in ("candidates", "scores"):
        found = read_parts(out / "round-01" / part)
        assert found and found == read_parts(one / "round-01" / part)
    pairs = [(run / "round-01" / "pairs.jsonl").read_bytes() for run in (one, out)]
    assert pairs[0] == pairs[1]
    last = load_file(model / "model.safetensors")
    for index in (1, 2):
        policy = out / f"round-{index:02d}" / "policy"
        weights = load_file(policy / "model.safetensors")
        assert max(float((weights[k] - last[k]).abs().max()) for k in weights) > 1e-4
        assert json.loads((policy / "config.json").read_text())["architectures"] == [
            "MistralForCausalLM"
        ]
        if index == 1:
            wanted = load_file(Path(one, "round-01", "policy", "model.safetensors"))
            for name, value in wanted.items():
                torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
        last = weights
