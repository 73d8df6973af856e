"""The models and the pairs of whole steps: public files, token counts kept in a file, or random."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from fastdpo.data.examples import TokenizedPair
from fastdpo.data.rows import preference_rows, read_rows
from fastdpo.data.tokenize import tokenize_dataset
from fastdpo.storage import CACHE, cache_path

from .rows import this_device
from .turns import release

# From the models' published configurations, with random weights and positions without a limit.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2-1b": ("LlamaConfig", dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )),
    "llama-3-8b": ("LlamaConfig", dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )),
    "qwen2.5-0.5b": ("Qwen2Config", dict(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )),
    "qwen2.5-7b": ("Qwen2Config", dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )),
    "tiny": ("LlamaConfig", dict(  # nobody's, for a CPU: its head has llama-3.2-1b's share
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
    )),
}  # fmt: skip
POSITIONS = 2**22
LENGTHS_KEPT = 500  # pairs of a dataset whose token counts go into a file


def random_model(name: str, dtype: torch.dtype) -> Any:
    """A model of a shape with random weights, on this device."""
    import transformers

    config_class, numbers = SHAPES[name]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, config_class)(
        **numbers, **special, max_position_embeddings=POSITIONS
    )
    torch.manual_seed(0)
    with this_device():
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def shape_model(name: str) -> str:
    """A folder with random bfloat16 weights of a shape, and a tokenizer that only pads."""
    import transformers
    from tokenizers import Tokenizer, models

    folder = cache_path(f"{CACHE}/bench/{name}")
    if (folder / "config.json").is_file():
        return str(folder)
    model = random_model(name, torch.bfloat16)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
    )  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Whole or absent, without checksums: every load of many would compute them again.
    unfinished = folder.with_name(f".{name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    del model
    release()  # the device is the workers'
    return str(folder)


def as_preference(row: dict[str, Any]) -> dict[str, Any]:
    """A row of LLaMA-Factory's or of dove's files in the format of messages; others as they are."""
    if "conversations" in row:
        roles = {"system": "system", "human": "user", "gpt": "assistant"}

        def message(x: dict[str, str]) -> dict[str, str]:
            return {"role": roles[x["from"]], "content": x["value"]}

        sides = {name: [message(row[name])] for name in ("chosen", "rejected")}
        return {"prompt": list(map(message, row["conversations"])), **sides}
    if "i_chosen" in row:
        if row["i_chosen"] != row["i_reject"]:
            raise ValueError("the two responses answer different prompts")
        sides = {"chosen": row["r_chosen"], "rejected": row["r_reject"]}
        answers = {k: [{"role": "assistant", "content": text}] for k, text in sides.items()}
        return {"prompt": [{"role": "user", "content": row["i_chosen"]}], **answers}
    return row


def read_pairs(dataset: str, model: str, max_length: int) -> list[TokenizedPair]:
    """The token ids of a dataset's pairs, by the rules of `fastdpo train` (and of TRL)."""
    from dataclasses import replace

    from fastdpo.model.load import load_tokenizer

    rows = read_rows(dataset)
    rows = replace(rows, rows=list(map(as_preference, rows.rows)))
    found = tokenize_dataset(
        preference_rows(rows), load_tokenizer(model), max_length=max_length, progress=False
    )
    return found.pairs


def random_pair(prompt: int, chosen: int, rejected: int, vocab: int, seed: int) -> TokenizedPair:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (prompt + chosen + rejected,), generator=generator).tolist()
    middle = prompt + chosen
    return TokenizedPair(ids[:prompt], ids[prompt:middle], ids[middle:])


def write_lengths(where_to: str, pairs: list[TokenizedPair], source: str) -> None:
    """Under a name of a file, the token counts of pairs: prompt, chosen, rejected."""
    path, name = lengths_file(where_to)
    counts = [
        [len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)]
        for p in sample(pairs, min(len(pairs), LENGTHS_KEPT), seed=0)
    ]
    found = json.loads(path.read_text()) if path.exists() else {}
    found[name] = {"of": source, "lengths": counts}
    lines = (f'"{key}": {json.dumps(value)}' for key, value in found.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read_lengths(where_from: str, vocab: int, max_length: int, seed: int) -> list[TokenizedPair]:
    """Random pairs with the token counts of a file, those that fit."""
    path, name = lengths_file(where_from)
    counts = json.loads(path.read_text())[name]["lengths"]
    kept = [x for x in counts if x[0] + max(x[1:]) <= max_length]
    return [random_pair(p, c, r, vocab, seed + i) for i, (p, c, r) in enumerate(kept)]


def lengths_file(text: str) -> tuple[Path, str]:
    path, _, name = text.rpartition(":")
    return Path(path), name


def sample(pairs: list[TokenizedPair], count: int, seed: int) -> list[TokenizedPair]:
    """So many pairs in random order, all of them before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(pairs), generator=generator).tolist()
    return [pairs[i] for i in order[:count]]


def vocabulary(model: str) -> int:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config().vocab_size


def lengths(pair: TokenizedPair) -> tuple[int, int]:
    """Tokens of its two sequences."""
    prompt, chosen, rejected = map(len, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
    return prompt + chosen, prompt + rejected


def convert(source: str, out: Path) -> int:
    """Write a public file's rows as `fastdpo train` takes them."""
    rows = [as_preference(row) for row in read_rows(source).rows]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)
