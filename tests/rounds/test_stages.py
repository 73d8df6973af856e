"""The stages of a round: sampling, scoring, pairing, and their files.

Models are tiny random Llamas with a tokenizer trained here on a few sentences.
"""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdpo
from fastdpo import storage
from fastdpo.data.records import Prompt
from fastdpo.data.rows import Rows, prompt_rows, read_rows
from fastdpo.errors import ConfigError, DataError
from fastdpo.pair.stage import best_worst, load_pairs, pair
from fastdpo.sample.config import SampleConfig
from fastdpo.sample.stage import sample
from fastdpo.score.stage import Scorer, load_scorer, plain_language, score

torch.set_num_threads(1)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "What color is the sky? The sky is blue, the sea is blue too.",
    "user assistant system: the answer is four, the answer is five.",
]
PROMPTS = [
    "What color is the sky?",
    "Hi",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The fox?"}],
    "The quick brown fox jumps over the lazy dog. The answer is four, the sea is blue too. Why?",
    "One?",
]
END = 2  # <|im_end|>


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


def make_tokenizer(chat_template: str | None = CHATML) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(SENTENCES * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def llama_config(tokenizer, **options) -> Any:
    from transformers import LlamaConfig

    defaults = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": END,
        "pad_token_id": 0,
        "initializer_range": 0.5,  # large enough for tokens to depend on the context
    }
    return LlamaConfig(**{**defaults, **options})


def make_model(tokenizer, **options) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(tokenizer, **options)).double().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0.0  # as with a padding token, so without one
    return model


def rows_of(prompts: list[Any], **columns: Any) -> list[Prompt]:
    return prompt_rows(Rows("here", [{"prompt": prompt, **columns} for prompt in prompts]))


def run_sample(model, tokenizer, out_dir, prompts=PROMPTS, round_index=1, **options):
    options = {"num_samples": 3, "max_new_tokens": 12, "batch_prompts": 2, **options}
    config = SampleConfig(**options)
    sample(
        model,
        tokenizer,
        rows_of(prompts),
        config,
        out_dir,
        round_index=round_index,
        progress=False,
    )
    return storage.read_parts(out_dir)


def responses(rows):
    return [row["response_ids"] for row in rows]


def file_bytes(directory: Path) -> dict[str, bytes]:
    """Everything but what a killed process left, and the times of what was sampled."""
    names = [p for p in directory.iterdir() if p.name != "throughput.json"]
    return {p.name: p.read_bytes() for p in names if not p.name.startswith(".")}


# Scoring


def write_candidates(directory: Path, texts: list[list[str]], per_part: int = 2) -> None:
    rows = [
        {
            "prompt_index": i,
            "sample_index": j,
            "prompt": f"Prompt {i}",
            "prompt_ids": [1, 5 + i],
            "response": text,
            "response_ids": [10 + ord(x) for x in text],
            "finish_reason": "stop",
            "extra": {},
        }
        for i, of_prompt in enumerate(texts)
        for j, text in enumerate(of_prompt)
    ]
    for part in range(math.ceil(len(texts) / per_part)):
        of_part = [row for row in rows if row["prompt_index"] // per_part == part]
        storage.write_jsonl_atomic(storage.part_path(directory, part), of_part)


def run_score(function, tmp_path: Path, out: str = "scores"):
    scorer = function if isinstance(function, Scorer) else Scorer("tests:f", function)
    score(scorer, tmp_path / "candidates", tmp_path / out, progress=False)
    return storage.read_parts(tmp_path / out)


def lengths(prompts, responses):
    return [len(text) for text in responses]


# Pairing


def candidate(prompt_index: int, sample_index: int, value: float, ids: Any = None) -> Any:
    ids = [7, prompt_index, sample_index, END] if ids is None else ids
    return {
        "prompt_index": prompt_index,
        "sample_index": sample_index,
        "prompt": f"p{prompt_index}",
        "prompt_ids": [1, prompt_index],
        "response": " ".join(map(str, ids)),
        "response_ids": ids,
        "finish_reason": "stop" if sample_index % 2 else "length",
        "extra": {},
        "score": value,
    }


def test_best_and_worst_are_paired():
    rows = [candidate(1, j, v) for j, v in enumerate([2.0, 5.0, -1.0, 5.0, -1.0])]
    rows = [candidate(0, 0, 3.0), *reversed(rows), candidate(0, 1, 4.0)]
    (first, second), dropped = best_worst(rows)
    assert dropped == {} and (first["score_chosen"], first["score_rejected"]) == (4.0, 3.0)
    assert second == {
        "prompt_index": 1,
        "prompt": "p1",
        "prompt_ids": [1, 1],
        "chosen": f"7 1 1 {END}",  # the first of two best and of two worst
        "rejected": f"7 1 2 {END}",
        "chosen_ids": [7, 1, 1, END],
        "rejected_ids": [7, 1, 2, END],
        "score_chosen": 5.0,
        "score_rejected": -1.0,
        "chosen_finish": "stop",
        "rejected_finish": "length",
    }


def test_every_reason_to_drop_is_counted():
    blank = candidate(0, 0, 9.0)
    blank["response"] = " \n"
    rows = [
        blank,
        candidate(0, 1, 1.0),
        candidate(1, 0, 5.0, []),
        candidate(1, 1, 1.0),
        candidate(1, 2, 2.0),
        candidate(2, 0, 1.0),
        candidate(2, 1, 1.0),
        candidate(3, 0, 1.0, [4, 4]),
        candidate(3, 1, 2.0, [4, 4]),
        candidate(4, 0, 1.0),
    ]
    pairs, dropped = best_worst(rows)
    assert [(p["prompt_index"], p["score_chosen"]) for p in pairs] == [(1, 2.0)]
    assert dropped == {
        "empty response": 2,
        "fewer than two responses": 2,
        "tie": 1,
        "identical responses": 1,
    }
    pairs, dropped = best_worst(rows, min_gap=1.0)
    assert pairs == [] and dropped["gap at most min_gap"] == 2
    assert len(best_worst(rows, min_gap=0.99)[0]) == 1


def test_best_worst_errors():
    for gap in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="min_gap"):
            best_worst([], min_gap=gap)
    for value in (math.nan, math.inf, None, "1", True):
        with pytest.raises(DataError, match=r"prompt 3, sample 4.*score is"):
            best_worst([candidate(3, 4, value)])  # type: ignore[arg-type]
    row = candidate(3, 4, 1.0)
    del row["score"]
    with pytest.raises(DataError, match=r"prompt 3, sample 4.*'score' is missing"):
        best_worst([row])


TOKENS = st.lists(st.integers(3, 5), max_size=2)
SCORES = st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(-1e6, 1e6), st.integers(-3, 3))
GROUPS = st.lists(st.lists(st.tuples(SCORES, TOKENS), min_size=1, max_size=5), max_size=6)


@settings(max_examples=200, deadline=None)
@given(groups=GROUPS, min_gap=st.sampled_from([0.0, 0.5, 3.0]), shuffle=st.randoms())
def test_pairs_and_dropped_prompts_add_up(groups, min_gap, shuffle):
    rows = [
        candidate(i, j, value, ids)
        for i, group in enumerate(groups)
        for j, (value, ids) in enumerate(group)
    ]
    pairs, dropped = best_worst(rows, min_gap=min_gap)
    num_empty = dropped.pop("empty response", 0)
    assert num_empty == sum(not ids for group in groups for _, ids in group)
    assert len(pairs) + sum(dropped.values()) == len(groups)
    assert len({p["prompt_index"] for p in pairs}) == len(pairs)
    for p in pairs:
        values = [value for value, ids in groups[p["prompt_index"]] if ids]
        assert p["score_chosen"] == max(values) and p["score_rejected"] == min(values)
        assert p["score_chosen"] > p["score_rejected"]
        assert p["score_chosen"] - p["score_rejected"] > min_gap
        assert p["chosen_ids"] and p["rejected_ids"] and p["chosen_ids"] != p["rejected_ids"]
    shuffle.shuffle(rows)
    again = best_worst(rows, min_gap=min_gap)
    assert again[0] == pairs


def test_pairs_are_written_with_a_summary_and_read_back(tmp_path):
    texts = [["a", "bbb", "cc"], ["dddd", "e"], ["same", "size"], [""]]
    write_candidates(tmp_path / "candidates", texts)
    run_score(lengths, tmp_path)
    path = tmp_path / "out" / "pairs.jsonl"
    summary = pair(tmp_path / "candidates", tmp_path / "scores", path)
    assert summary == {
        "pairs": 2,
        "dropped": {"tie": 1, "empty response": 1, "fewer than two responses": 1},
        "mean_score_chosen": 3.5,
        "mean_score_rejected": 1.0,
        "mean_length_chosen": 3.5,
        "mean_length_rejected": 1.0,
        "score_length_correlation": pytest.approx(1.0),
    }
    stored = storage.read_json(tmp_path / "out" / "pairs.summary.json")
    assert stored == {**summary, "score_length_correlation": pytest.approx(1.0)}
    first, second = load_pairs(path)
    assert first.prompt_ids == [1, 5] and second.prompt_ids == [1, 6]
    assert first.chosen_ids == [10 + ord("b")] * 3 and first.rejected_ids == [10 + ord("a")]
    assert first.extra == {
        "prompt_index": 0,
        "score_chosen": 3.0,
        "score_rejected": 1.0,
        "chosen_finish": "stop",
        "rejected_finish": "stop",
    }


def test_correlation_is_over_all_candidates_and_null_where_undefined(tmp_path):
    write_candidates(tmp_path / "candidates", [["a", "bbb", "cc"]])
    run_score(lambda p, r: [1.0, 2.0, 5.0], tmp_path)
    path = tmp_path / "pairs.jsonl"
    value = pair(tmp_path / "candidates", tmp_path / "scores", path)["score_length_correlation"]
    assert value == pytest.approx(np.corrcoef([1, 2, 5], [1, 3, 2])[0, 1])
    write_candidates(tmp_path / "candidates", [["a", "b"]])
    run_score(lambda p, r: [1.0, 2.0], tmp_path, "again")
    summary = pair(tmp_path / "candidates", tmp_path / "again", path)
    assert summary["score_length_correlation"] is None
    assert '"score_length_correlation": null' in path.with_suffix(".summary.json").read_text()


def test_candidates_and_scores_must_match(tmp_path):
    out = tmp_path / "pairs.jsonl"
    write_candidates(tmp_path / "candidates", [["a", "bb"], ["c", "dd"]])
    run_score(lengths, tmp_path)
    write_candidates(tmp_path / "more", [["a", "bb"], ["c", "dd", "x"]])
    with pytest.raises(DataError, match="prompt 1, sample 2 has no score"):
        pair(tmp_path / "more", tmp_path / "scores", out)
    write_candidates(tmp_path / "fewer", [["a"], ["c", "dd"]])
    with pytest.raises(DataError, match="prompt 0, sample 1 has a score but"):
        pair(tmp_path / "fewer", tmp_path / "scores", out)
    part = storage.part_path(tmp_path / "scores", 0)
    rows = storage.read_jsonl(part)
    for bad, message in (
        ([*rows, rows[0]], "prompt 0, sample 0 is there twice"),
        ([{"score": 1.0}], "prompt_index None"),
        ([{**rows[0], "score": None}, *rows[1:]], "score is None"),
        ([{"prompt_index": 0, "sample_index": 0}, *rows[1:]], "has no score"),
    ):
        storage.write_jsonl_atomic(part, bad)
        with pytest.raises(DataError, match=message):
            pair(tmp_path / "candidates", tmp_path / "scores", out)
    assert not out.exists()


def test_no_pair_left_is_an_error(tmp_path):
    write_candidates(tmp_path / "candidates", [["a", "b"], ["c"]])
    run_score(lengths, tmp_path)
    out = tmp_path / "pairs.jsonl"
    with pytest.raises(
        DataError, match=r"no pair is left \(fewer than two responses: 1, tie: 1\).*Sample more"
    ):
        pair(tmp_path / "candidates", tmp_path / "scores", out)
    assert not out.exists() and not out.with_suffix(".summary.json").exists()
    with pytest.raises(ValueError, match="jsonl"):
        pair(tmp_path / "candidates", tmp_path / "scores", tmp_path / "pairs")


def test_reading_pairs_names_the_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [candidate(0, j, float(j)) for j in range(2)]
    (good,), _ = best_worst(rows)
    without = {k: v for k, v in good.items() if k != "chosen_ids"}
    for bad, message in (
        ({**good, "chosen_ids": []}, "chosen_ids is empty"),
        ({**good, "prompt_ids": [1.5]}, "prompt_ids must be"),
        (without, "'chosen_ids' is missing"),
        ({**good, "rejected_ids": 3}, "int"),
    ):
        storage.write_jsonl_atomic(path, [good, bad])
        with pytest.raises(DataError, match=rf"pairs\.jsonl:2: .*{message}"):
            load_pairs(path)


# The whole way


def test_the_stages_fit_together(model, tokenizer, tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name
        run_sample(model, tokenizer, folder / "candidates", num_samples=4)
        run_score(lengths, folder)
        pair(folder / "candidates", folder / "scores", folder / "pairs.jsonl")
    pairs = load_pairs(tmp_path / "a" / "pairs.jsonl")
    assert 1 <= len(pairs) <= len(PROMPTS)
    candidates = {tuple(r["response_ids"]) for r in storage.read_parts(tmp_path / "a/candidates")}
    assert all({tuple(p.chosen_ids), tuple(p.rejected_ids)} <= candidates for p in pairs)
    for name in ("pairs.jsonl", "pairs.summary.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_demo_prompts():
    rows = read_rows(Path(fastdpo.__file__).parent / "recipes" / "demo_prompts.jsonl").rows
    assert len(prompt_rows(Rows("demo", rows))) == 72
    assert len({row["prompt"].lower() for row in rows}) == 72
    assert [row["split"] for row in rows].count("train") == 48
    assert [row["split"] for row in rows].count("heldout") == 24
    assert all(10 < len(row["prompt"]) < 100 for row in rows)


def test_importing_the_stages_does_not_import_transformers():
    stages = "fastdpo.pair.stage, fastdpo.sample.stage, fastdpo.score.stage"
    code = f"import sys, {stages}; print(*sys.modules)"
    root = str(Path(fastdpo.__file__).parents[1])
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=root, timeout=60, capture_output=True, text=True
    )
    loaded = out.stdout.split()
    assert "fastdpo.sample.stage" in loaded and "transformers" not in loaded, json.dumps(out.stderr)
