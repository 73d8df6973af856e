"""Reward models: sequence classifiers, and causal models with a v_head."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stages
import torch
from scoring_server import CHAT, TEXTS, run_score, write_candidates
from stages import END, PROMPTS, llama_config, make_policy, plain_tokenizer, run_sample
from tiny import LLAMA, build_tokenizer, save_tiny

from fastdpo import storage
from fastdpo.errors import DataError
from fastdpo.score.load import load_scorer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


# Sequence classifiers


def save_reward_model(folder: Path, tokenizer, **options) -> Any:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(1)
    config = llama_config(tokenizer, **{"num_labels": 1, **options})
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


REPLIES = ["Blue.", "", "The sky is blue, the sea is blue too. " * 3, "five", "é"]


@pytest.mark.parametrize("case", ["chat", "plain", "no padding token", "end token pads"])
def test_reward_model_scores_are_those_of_single_rows(tmp_path, case):
    # Ends in the end token, where a model that pads with it would look one token further left.
    template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = plain_tokenizer()
    tokenizer.chat_template = None if case == "plain" else template
    pad_id: int | None = 0
    if case in ("no padding token", "end token pads"):
        tokenizer.pad_token = tokenizer.eos_token
        pad_id = END if case == "end token pads" else None
    # A colon in a path that exists is no function.
    model = save_reward_model(tmp_path / "re:ward", tokenizer, pad_token_id=pad_id)
    scorer = load_scorer(str(tmp_path / "re:ward"), device="cpu", batch_size=2)
    values = scorer(list(PROMPTS), REPLIES)
    for prompt, reply, value in zip(PROMPTS, REPLIES, values):
        messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = "".join(f"{m['role']}\n{m['content']}<|im_end|>" for m in messages)
        text += f"assistant\n{reply}<|im_end|>"
        if case == "plain":
            text = "\n".join([*(m["content"] for m in messages), reply])
        with torch.no_grad():
            logit = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits
        assert value == pytest.approx(logit.item(), abs=1e-5)
    assert np.std(values) > 0.1


def test_reward_models_score_candidates(tokenizer, tmp_path):
    save_reward_model(tmp_path / "reward", tokenizer)
    scorer = load_scorer(str(tmp_path / "reward"), dtype=torch.float64)
    run_sample(make_policy(tokenizer), tokenizer, tmp_path / "candidates")
    rows = stages.run_score(scorer, tmp_path)
    assert len(rows) == 15 and len({row["score"] for row in rows}) > 5
    whole = stages.file_bytes(tmp_path / "scores")
    storage.part_path(tmp_path / "scores", 1).unlink()
    stages.run_score(scorer, tmp_path)
    assert stages.file_bytes(tmp_path / "scores") == whole


def test_models_that_are_no_reward_models_are_refused(tokenizer, tmp_path):
    save_reward_model(tmp_path / "two", tokenizer, num_labels=2)
    with pytest.raises(ValueError, match="2 labels"):
        load_scorer(str(tmp_path / "two"))
    headless = make_policy(tokenizer, num_labels=1)
    headless.save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match=r"no score\.weight"):
        load_scorer(str(tmp_path / "causal"))
    with pytest.raises(ValueError, match="nothing' does not exist"):
        load_scorer(str(tmp_path / "nothing"))


# Causal models with a v_head


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("body", ["transformer", "model"])
def test_models_with_a_v_head_are_reward_models(tmp_path, body, shards):
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(3)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    model, value = LlamaModel(config).eval(), torch.randn(1, 16)
    folder = tmp_path / "reward"
    config.save_pretrained(folder)
    tensors = {f"{body}.{name}": x for name, x in model.state_dict().items()}
    tensors["v_head.weight"] = value
    files = ["model.safetensors"]
    if shards == 2:
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        where = {name: files[i % 2] for i, name in enumerate(tensors)}
        index = json.dumps({"metadata": {"total_size": 0}, "weight_map": where})
        (folder / "model.safetensors.index.json").write_text(index)
    for i, file in enumerate(files):
        own = {k: x.contiguous() for j, (k, x) in enumerate(tensors.items()) if j % shards == i}
        save_file(own, folder / file, {"format": "pt"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    scorer = load_scorer(f"{folder}#{tmp_path / 'tokenizer'}", batch_size=2, device="cpu")
    prompts, replies = ["the beach?", CHAT, "no"], ["long walks", "be", "nice weather at all"]
    values = scorer(prompts, replies)
    for prompt, reply, value_of_row in zip(prompts, replies, values):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*messages, {"role": "assistant", "content": reply}]
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        ids = tokenizer(text=text[:-1])["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids[-1]) == "<|im_end|>"
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        assert value_of_row == pytest.approx((value[0] @ hidden).item(), abs=1e-5)
    with pytest.raises(ValueError, match="can't be loaded"):
        load_scorer(str(folder))  # no tokenizer beside it


def save_classifier(folder: Path, seed: int, context: int = 512) -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    options: dict[str, Any] = {"num_labels": 1, "pad_token_id": 0, "initializer_range": 0.5}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=context, **options,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_a_reward_model_reads_the_end_of_what_is_too_long(tmp_path, caplog):
    model = save_classifier(tmp_path / "reward", 0, context=64)
    scorer = load_scorer(str(tmp_path / "reward"), batch_size=2)
    texts = ["be nice", "no idea about the weather " * 9, "hi", "long walks on the beach " * 19]
    values = scorer(["hi"] * 4, texts)
    lengths = []
    for text, value in zip(texts, values):
        ids = scorer.function._render("hi", text)
        lengths.append(len(ids))
        with torch.no_grad():
            logit = model(input_ids=torch.tensor([ids[-64:]])).logits.item()
        assert value == pytest.approx(logit, abs=1e-5)
    assert sum(n > 64 for n in lengths) == 2 and min(lengths) <= 64
    assert caplog.text.count("2 of 4 prompts with their responses are longer") == 1
    assert "context of 64 tokens" in caplog.text
    caplog.clear()
    scorer(["hi"], ["hi"])
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["", "judge:"])
def test_scores_of_a_model_belong_to_its_weights_and_dtype(tmp_path, kind):
    def save(seed: int) -> None:
        if kind:
            save_tiny(LLAMA, tmp_path / "model", seed)
        else:
            save_classifier(tmp_path / "model", seed)

    save(0)
    write_candidates(tmp_path / "candidates", TEXTS)
    spec = f"{kind}{tmp_path / 'model'}"
    first = run_score(load_scorer(spec), tmp_path)
    assert run_score(load_scorer(spec), tmp_path) == first
    assert storage.read_json(tmp_path / "scores" / "plan.json")["settings"]["dtype"] == "float32"
    with pytest.raises(DataError, match="another settings"):
        run_score(load_scorer(spec, dtype=torch.bfloat16), tmp_path)
    save(1)  # trained again, in the same place
    with pytest.raises(DataError, match="another settings"):
        run_score(load_scorer(spec), tmp_path)
