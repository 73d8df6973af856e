"""The loss in a PyTorch loop of your own: tokenize, reference, AdamW, save.

python -m fastdpo.examples.bare_loop --model MODEL --dataset pairs.jsonl --output_dir policy
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo import LinearDPOLoss, PreferenceLoss
from fastdpo.data import TokenizedPair, preference_rows, read_rows, tokenize_dataset


def padded(pairs: Sequence[TokenizedPair], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and shifted labels, (2B, L): all chosen sequences first, then all rejected.

    Row t predicts label t; -100 marks prompts and padding.
    """
    rows = [(pair.prompts[side], pair.responses[side]) for side in (0, 1) for pair in pairs]
    longest = max(len(prompt) + len(ids) for prompt, ids in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    for i, (prompt, ids) in enumerate(rows):
        end = len(prompt) + len(ids)
        tokens[i, :end] = torch.tensor(prompt + ids)
        labels[i, len(prompt) - 1 : end - 1] = torch.tensor(ids)
    return tokens.to(device), labels.to(device)


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train one epoch and save the policy; returns the loss of each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--dataset", required=True, help="prompt, chosen, rejected; file or hub")
    parser.add_argument("--output_dir", default="policy")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs of a step")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    args = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.to(device)
    rows = preference_rows(read_rows(args.dataset))
    pairs = tokenize_dataset(rows, tokenizer, max_length=1024, overlong="drop").pairs
    batches = [pairs[i : i + args.batch_size] for i in range(0, len(pairs), args.batch_size)]
    loss_of = LinearDPOLoss(beta=0.1, alpha=0.01)

    def forward(batch: Sequence[TokenizedPair], ref_logp_S: Tensor) -> PreferenceLoss:
        """The body's hidden states go into the loss; the head's logits are never computed."""
        tokens, labels = padded(batch, device)
        # Padding lies to the right, where no real token looks, so no mask is needed.
        hidden = model.base_model(tokens).last_hidden_state
        return loss_of(hidden, model.get_output_embeddings().weight, labels, None, ref_logp_S)

    # The reference is the model before training, so its log-probs are computed once.
    model.eval()
    with torch.no_grad():
        zeros = [torch.zeros(2 * len(batch), device=device) for batch in batches]
        references = [forward(batch, zero).logp_S for batch, zero in zip(batches, zeros)]

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    losses = []
    for batch, ref_logp_S in zip(batches, references):
        result = forward(batch, ref_logp_S)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(result.loss.item())
        margin = result.metrics["rewards/margins"].item()
        print(f"step {len(losses)}/{len(batches)}: loss {losses[-1]:.4f}, margin {margin:.4f}")
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    return losses


if __name__ == "__main__":
    main()
