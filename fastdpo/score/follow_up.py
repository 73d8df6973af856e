"""Follow-up likelihood as a reward (FLR, arXiv 2409.13948): does the answer please its reader?"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from fastdpo.data.examples import TokenizedPair
from fastdpo.data.records import Text, messages_of
from fastdpo.data.rendering import text_of
from fastdpo.model.logps import pair_logps

POSITIVE = (
    "Thank you, that is just what I wanted to know.",
    "That is right.",
    "I understand it now.",
)
NEGATIVE = (
    "That is not what I asked.",
    "That is wrong.",
    "I don't understand what you mean.",
)


def follow_up_scores(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    responses: Sequence[str],
    *,
    positive: Sequence[str] = POSITIVE,
    negative: Sequence[str] = NEGATIVE,
    batch_size: int = 8,
) -> list[float]:
    """How much likelier a user's praise is after each response than a complaint.

    `mean_k l(positive_k) - mean_k l(negative_k)`, where l is the log-probability of a follow-up
    after prompt and response, in nats per token, under any causal language model
    (`fastdpo.model.logps.load_packed`); none is trained.

    The paper takes log-likelihoods. Its code averages over tokens as is done here, but it averages
    logits, and not those of the positions before the tokens; that is not followed. The follow-ups
    here are ours. UNVERIFIED: whether the paper sums or averages over tokens.

    Raises ValueError when there are no follow-ups of a kind, or one can't be told apart from the
    conversation in tokens; ModelError when they don't fit the model's context.
    """
    if not positive or not negative:
        raise ValueError("positive and negative must each have at least one follow-up")
    width = max(len(positive), len(negative))
    pairs = [
        # A kind with fewer starts again; what is over isn't counted below.
        _pair(tokenizer, prompt, response, positive[i % len(positive)], negative[i % len(negative)])
        for prompt, response in zip(prompts, responses)
        for i in range(width)
    ]
    if not pairs:
        return []
    lengths_P2 = torch.tensor([(len(x.chosen_ids), len(x.rejected_ids)) for x in pairs])
    good, bad = (pair_logps(model, pairs, batch_size=batch_size) / lengths_P2).T.tolist()
    return [
        fmean(good[start : start + len(positive)]) - fmean(bad[start : start + len(negative)])
        for start in range(0, len(pairs), width)
    ]


def _pair(
    tokenizer: Any, prompt: Text, response: str, praise: str, complaint: str
) -> TokenizedPair:
    """Both follow-ups after the same conversation, as tokens."""
    heads, tails = zip(*(_split(tokenizer, prompt, response, x) for x in (praise, complaint)))
    if heads[0] != heads[1]:
        raise ValueError(
            f"the chat template renders a conversation otherwise before {praise!r} than before "
            f"{complaint!r}; use the tokenizer of another model"
        )
    return TokenizedPair(heads[0], tails[0], tails[1])


def _split(
    tokenizer: Any, prompt: Text, response: str, follow_up: str
) -> tuple[list[int], list[int]]:
    """Tokens of the conversation up to a follow-up, and of the follow-up without its end."""
    if tokenizer.chat_template is None:
        before, special = f"{text_of(prompt)}\n{response}\n", True
    else:
        messages = [*messages_of(prompt, response), {"role": "user", "content": follow_up}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        place = text.rfind(follow_up)
        if place < 0:
            raise ValueError(f"the chat template changes {follow_up!r}; write it otherwise")
        before, special = text[:place], False
    head = tokenizer(text=before, add_special_tokens=special)["input_ids"]
    whole = tokenizer(text=before + follow_up, add_special_tokens=special)["input_ids"]
    if whole[: len(head)] != head:
        raise ValueError(
            f"the tokenizer joins {follow_up!r} with the text before it; begin it otherwise"
        )
    return head, whole[len(head) :]
