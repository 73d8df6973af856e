"""`python -m bench.log2`: a policy that does not move has the loss of a coin, log 2, in every step.

Three epochs of `fastdpo.train.trainer.train` at learning rate 1e-12 for tiny models of 20 families
(`bench.architectures`), in fp32 and bf16, each packed in every layout that it has, with LoRA, and
with reference log-probs that an earlier run cached with another seed and other batches.  The table
says how far from log 2 the worst loss of a run is; ``bench/LOG2.md`` keeps it.
"""

import argparse
import importlib.metadata
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import architectures
from bench.sweep import VARIANTS, Case, random_pairs
from fastdpo.data.examples import LAYOUTS, TokenizedPair
from fastdpo.errors import ModelError
from fastdpo.train.config import TrainConfig
from fastdpo.train.trainer import train

TABLE = Path(__file__).with_name("LOG2.md")
_LLAMAS = ("linear", "dynamic", "yarn", "llama3")
NAMES = [
    "llama", *(f"llama, rope {kind}" for kind in _LLAMAS), "phi3, rope longrope",
    "phi4-mini", "mistral, window", "qwen2, window", "qwen3", "qwen3_moe", "mixtral", "gemma2",
    "gemma3_text", "gemma4_text", "gpt_oss", "olmo2", "granite, scale", "cohere", "mamba",
    "falcon_h1, scale", "recurrent_gemma, cap",
]  # fmt: skip
PHI4_MINI = Case(
    "phi4-mini", "phi3",
    {
        "tie_word_embeddings": True,
        "original_max_position_embeddings": architectures.ORIGINAL,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
            "short_factor": [1.0] * 6, "long_factor": [4.0] * 6,
            "original_max_position_embeddings": architectures.ORIGINAL,
        },
    },
)  # fmt: skip
# Sides of rotary thresholds, windows and chunks, in steps of other pairs each epoch.
LENGTHS = ((20, 90, 50), (9, 14, 31), (40, 25, 12), (8, 30, 60), (30, 31, 29), (5, 70, 6))


def cases() -> list[Case]:
    """The families of the table."""
    variants = {case.name: case for case in (*VARIANTS, PHI4_MINI)}
    return [variants.get(name, Case(name, name, {})) for name in NAMES]


def runs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Columns: the layouts in fp32, then auto in bf16, with LoRA, and with a cached reference."""
    for layout in LAYOUTS:
        yield layout, {"bf16": False, "layout": layout}
    yield "bf16", {"bf16": True}
    yield "LoRA", {"bf16": False, "use_peft": True, "lora_r": 2}
    yield "cached", {"bf16": False, "seed": 1, "max_tokens": 300}
    yield "cached, bf16", {"bf16": True, "seed": 1, "max_tokens": 300}


def bound(name: str, pairs: list[TokenizedPair]) -> float:
    """How far from log 2 rounding may take a loss, at beta 1/2.

    A loss moves by half of beta times the difference of two sums of log-probs.  In fp32 each of a
    pair's tokens may differ by a unit in the last place of a log-prob near -log(vocabulary).
    """
    if name.endswith("bf16"):
        return 1e-6
    tokens = max(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    return 0.25 * tokens * math.log(architectures.VOCAB) * torch.finfo(torch.float32).eps


def worst(
    path: Path, tokenizer: Any, pairs: list[TokenizedPair], out: Path, **options: Any
) -> float:
    """Largest distance of a loss from log 2 over three epochs."""
    losses: list[float] = []
    config = TrainConfig(
        **{
            "alpha": 0.0, "beta": 0.5, "learning_rate": 1e-12, "num_train_epochs": 3,
            "batch_size": 2, "max_length": 256, "max_tokens": 600, "reference_cache": None,
            "gradient_checkpointing": False, **options,
        }
    )  # fmt: skip
    train(
        str(path), tokenizer, pairs, config, out, progress=False,
        on_step=lambda row: losses.append(row["loss"]),
    )  # fmt: skip
    return max(abs(loss - math.log(2)) for loss in losses)


def try_case(case: Case, folder: Path, tokenizer: Any) -> dict[str, float | str]:
    """Of each run the worst distance, or why there is none."""
    path = folder / "model"
    architectures.build(case.model_type, **case.changes).float().save_pretrained(path)
    tokenizer.save_pretrained(path)
    pairs = random_pairs(len(tokenizer), LENGTHS)
    found: dict[str, float | str] = {}
    for name, options in runs():
        cache = {"reference_cache": str(folder / "cache")}
        try:
            if name.startswith("cached"):  # by a run with another seed and other batches
                first = {**options, "seed": 0, "max_tokens": 600, "num_train_epochs": 1}
                worst(path, tokenizer, pairs, folder / f"{name} 0", **(first | cache))
                options = options | cache
            kept = set((folder / "cache").glob("*"))
            found[name] = worst(path, tokenizer, pairs, folder / name, **options)
            if set((folder / "cache").glob("*")) != kept:
                found[name] = "the cached reference was not read"
        except ModelError as error:
            found[name] = " ".join(str(error).split())
    return found


def table(found: dict[str, dict[str, float | str]]) -> str:
    """Markdown: a line a family."""
    columns = [name for name, _ in runs()]
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch", "peft")
    )
    lines = [
        "# Every loss is log 2",
        "",
        f"Written by `python -m bench.log2` with {versions}:",
        "three epochs at learning rate 1e-12, the largest distance of a step's loss from log 2.",
        "`-`: refused, the layout by its check or LoRA by peft.",
        "Reference log-probs come from other batches than later epochs have: what rounds by the",
        "shape of a batch shows, as Falcon-H1's layers do in bf16 (0.011 of a log-prob, a fifth of",
        "their error against fp32).",
        "",
        f"| family | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name, row in found.items():
        cells = [f"{x:.1g}" if isinstance(x := row[c], float) else "-" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run, print and write."""
    import transformers

    parser = argparse.ArgumentParser(
        "python -m bench.log2", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("names", nargs="*", help=f"of: {'; '.join(NAMES)} (all)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    found = {}
    for case in cases():
        if args.names and case.name not in args.names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found[case.name] = try_case(case, Path(folder), tokenizer())
        print(case.name, found[case.name], flush=True)
    pairs, allowed = random_pairs(architectures.VOCAB, LENGTHS), (*LAYOUTS, "LoRA")
    far = [
        f"{family}, {name}"
        for family, row in found.items()
        for name, x in row.items()
        # A layout or LoRA may be refused, the rest may not.
        if (not x <= bound(name, pairs) if isinstance(x, float) else name not in allowed)
    ]
    print(f"{len(found)} families, {len(far)} runs beyond rounding: {'; '.join(far)}")
    if not args.names:
        TABLE.write_text(table(found))
    if far:
        raise SystemExit(1)


def tokenizer() -> Any:
    """Words that are numbers; the pairs are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    words |= {str(i): i for i in range(3, architectures.VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>",
        eos_token="</s>",
    )  # fmt: skip


if __name__ == "__main__":
    main()
