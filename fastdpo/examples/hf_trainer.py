"""The loss in `transformers.Trainer`, with everything the Trainer brings: logging, evaluation,
mixed precision, several GPUs.

    python -m fastdpo.examples.hf_trainer --model MODEL --dataset pairs.jsonl --output_dir out
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from fastdpo import LinearDPOLoss
from fastdpo.data import TokenizedPair, preference_rows, read_rows, tokenize_dataset
from fastdpo.examples.bare_loop import padded
from fastdpo.head import HeadCall
from fastdpo.model import fuse_head

CPU = torch.device("cpu")


class DPOTrainer(Trainer):
    """A Trainer whose batches have input_ids and labels, (2B, L), and ref_logp, (2B,)."""

    loss = LinearDPOLoss(beta=0.1, alpha=0.01)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # After it ``model(..., head_call=HeadCall(f))`` calls f with the head's parameters in place
        # of lm_head, inside the wrapped model's forward, as autocast, DDP and FSDP2 need it.
        fuse_head(self.model)
        self.model_accepts_loss_kwargs = False  # the loss below is a mean over this batch's pairs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, ref_logp_S = inputs.pop("labels"), inputs.pop("ref_logp")

        def loss(hidden: Tensor, **head: Any):
            hidden = hidden.view(*labels.shape, -1)
            return self.loss(hidden, target_N=labels, ref_logp_S=ref_logp_S, **head)

        result = model(**inputs, head_call=HeadCall(loss))
        return (result.loss, result) if return_outputs else result.loss


def collate(examples: Sequence[tuple[TokenizedPair, Tensor]]) -> dict[str, Tensor]:
    """Pairs and their reference log-probs as the trainer takes them."""
    tokens, labels = padded([pair for pair, _ in examples], CPU)
    ref_logp = torch.stack([ref_logp_2 for _, ref_logp_2 in examples]).T.reshape(-1)
    return {"input_ids": tokens, "labels": labels, "ref_logp": ref_logp}


@torch.no_grad()
def reference(model: Any, pairs: Sequence[TokenizedPair]) -> list[Tensor]:
    """Log-probs of chosen and rejected of each pair under the model before training, (2,) each."""
    found = []
    for pair in pairs:
        tokens, labels = padded([pair], model.device)
        hidden = model.base_model(tokens).last_hidden_state
        weight, zeros_S = model.get_output_embeddings().weight, torch.zeros(2, device=model.device)
        found.append(DPOTrainer.loss(hidden, weight, labels, None, zeros_S).logp_S.cpu())
    return found


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Train and save the policy; returns what was logged."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--dataset", required=True, help="prompt, chosen, rejected; file or hub")
    parser.add_argument("--output_dir", default="out")
    parser.add_argument("--max_steps", type=int, default=-1)
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    rows = preference_rows(read_rows(args.dataset))
    pairs = tokenize_dataset(rows, tokenizer, max_length=1024, overlong="drop").pairs
    trainer = DPOTrainer(
        model,
        TrainingArguments(
            args.output_dir, max_steps=args.max_steps, learning_rate=1e-6, logging_steps=1,
            per_device_train_batch_size=4, remove_unused_columns=False, report_to="none",
        ),
        train_dataset=list(zip(pairs, reference(model.eval(), pairs))),  # type: ignore[arg-type]
        data_collator=collate,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
