"""TRL's DPOTrainer with the fused, length-regularized loss: one class exchanged, one argument more.

python -m fastdpo.examples.trl_trainer --model MODEL --dataset pairs.jsonl --output_dir out
"""

import argparse
from collections.abc import Sequence

import torch
from datasets import load_dataset
from trl.trainer.dpo_config import DPOConfig

from fastdpo.integrations.trl import LengthRegularizedDPOTrainer


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Train and save the policy; returns what was logged."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--dataset", required=True, help=".jsonl with prompt, chosen, rejected")
    parser.add_argument("--output_dir", default="out")
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--alpha", type=float, default=0.01, help="length penalty; 0 is TRL's loss")
    parser.add_argument("--loss_type", nargs="+", default=["sigmoid"], help="TRL's losses")
    args = parser.parse_args(argv)

    trainer = LengthRegularizedDPOTrainer(
        model=args.model,
        args=DPOConfig(
            args.output_dir, loss_type=args.loss_type, beta=0.1, learning_rate=1e-6,
            max_steps=args.max_steps, per_device_train_batch_size=4, logging_steps=1,
            report_to="none",
            model_init_kwargs={"dtype": "float32"}, bf16=torch.cuda.is_available(),
        ),
        train_dataset=load_dataset("json", data_files=args.dataset, split="train"),
        alpha=args.alpha,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
