"""Pairs of tens of thousands of tokens on one GPU, or on a few.

    python -m fastdpo.examples.long_context --model MODEL --dataset pairs.jsonl --max_length 32768

Five things make room, each an option of `fastdpo train`: the head's logits never exist; a pair's
prompt is computed once; activations are recomputed and wait in CPU memory; an MLP runs a few
thousand tokens at a time; and LoRA keeps one copy of frozen weights, which is the reference too.

Several GPUs take the tokens of a pair between them, and FSDP2 the weights:

    torchrun --nproc-per-node 4 -m fastdpo.examples.long_context ... --sp_size 4 --engine fsdp2
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from fastdpo.data import preference_rows, read_rows, tokenize_dataset
from fastdpo.model.load import load_tokenizer, stop_ids
from fastdpo.plan import longest_pair
from fastdpo.train import TrainConfig, train


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Say what fits, train, and leave the policy in ``output_dir/policy``; returns its metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True, help="prompt, chosen, rejected; file or hub")
    parser.add_argument("--output_dir", default="runs/long")
    parser.add_argument("--max_length", type=int, default=32768, help="tokens of prompt + response")
    parser.add_argument("--gpu_gib", type=float, default=24.0)
    parser.add_argument("--load_in_4bit", action="store_true", help="QLoRA; needs bitsandbytes")
    parser.add_argument("--sp_size", type=int, default=1, help="processes that share a pair")
    parser.add_argument("--engine", default="auto", help="fsdp2 to share the weights as well")
    args = parser.parse_args(argv)

    config = TrainConfig(
        max_length=args.max_length,
        max_tokens=2 * args.max_length,  # a micro-batch: both responses, the prompt once
        overlong="drop",
        gradient_checkpointing=True,
        activation_offloading=torch.cuda.is_available(),
        mlp_tile_tokens=4096,
        use_peft=True,
        dtype="bfloat16",  # of the frozen weights
        load_in_4bit=args.load_in_4bit,
        learning_rate=1e-5,
        batch_size=8,
        sp_size=args.sp_size,
        engine=args.engine,
    )
    first = os.environ.get("RANK", "0") == "0"
    if args.sp_size == 1:  # `fastdpo plan --gpus` knows of several
        print(longest_pair(args.model, config, args.gpu_gib))
    tokenizer = load_tokenizer(args.model)
    found = tokenize_dataset(
        preference_rows(read_rows(args.dataset)),
        tokenizer,
        max_length=config.max_length,
        overlong=config.overlong,
        stop_ids=stop_ids(args.model, tokenizer),
    )
    if first:
        print(found)
    return train(args.model, tokenizer, found.pairs, config, Path(args.output_dir))


if __name__ == "__main__":
    main()
