"""Stages of a round on a tiny policy, for the tests of sampling, scoring and pairing."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import build_tokenizer

from fastdpo import storage
from fastdpo.data.records import Candidate, Prompt
from fastdpo.data.rows import Rows, prompt_rows
from fastdpo.sample.config import SampleConfig
from fastdpo.sample.stage import sample
from fastdpo.score.stage import Scorer, score

PROMPTS = [
    "What color is the sky?",
    "Hi",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The fox?"}],
    "The quick brown fox jumps over the lazy dog. The answer is four, the sea is blue too. Why?",
    "One?",
]
END = 2  # <|im_end|>


def plain_tokenizer() -> Any:
    """One without a chat template."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def llama_config(tokenizer: Any, **options: Any) -> Any:
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


def make_policy(tokenizer: Any, **options: Any) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(tokenizer, **options)).double().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0.0  # as with a padding token, so without one
    return model


def rows_of(prompts: list[Any], **columns: Any) -> list[Prompt]:
    return prompt_rows(Rows("here", [{"prompt": prompt, **columns} for prompt in prompts]))


def run_sample(
    model: Any,
    tokenizer: Any,
    out_dir: Path,
    prompts: list[Any] = PROMPTS,
    round_index: int = 1,
    **options: Any,
) -> list[dict[str, Any]]:
    config = SampleConfig(**{"num_samples": 3, "max_new_tokens": 12, "batch_prompts": 2, **options})
    rows = rows_of(prompts)
    sample(model, tokenizer, rows, config, out_dir, round_index=round_index, progress=False)
    return storage.read_parts(out_dir)


def write_candidates(directory: Path, texts: list[list[str]], per_part: int = 2) -> None:
    """Responses whose tokens are their letters."""
    rows = [
        Candidate(
            prompt_index=i,
            sample_index=j,
            prompt=f"Prompt {i}",
            prompt_ids=[1, 5 + i],
            response=text,
            response_ids=[10 + ord(x) for x in text],
            finish_reason="stop",
        )
        for i, of_prompt in enumerate(texts)
        for j, text in enumerate(of_prompt)
    ]
    for part in range(math.ceil(len(texts) / per_part)):
        of_part = [row.to_json() for row in rows if row.prompt_index // per_part == part]
        storage.write_jsonl_atomic(storage.part_path(directory, part), of_part)


def run_score(
    scorer: Scorer | Callable[..., Any], folder: Path, out: str = "scores"
) -> list[dict[str, Any]]:
    """The scores of `folder`'s candidates, by a scorer or a function."""
    if not isinstance(scorer, Scorer):
        scorer = Scorer("tests:f", scorer)
    score(scorer, folder / "candidates", folder / out, progress=False)
    return storage.read_parts(folder / out)


def lengths(prompts: Any, responses: list[str]) -> list[int]:
    return [len(text) for text in responses]


def file_bytes(directory: Path) -> dict[str, bytes]:
    """Everything but what a killed process left, and the times of what was sampled."""
    files = [p for p in directory.iterdir() if p.name != "throughput.json"]
    return {p.name: p.read_bytes() for p in files if p.suffix != ".tmp"}
