"""Tokenized preference pairs -> packed tensors, and the plan of which pairs go where.

A packed batch is one row of tokens without padding. Every pair contributes two sequences,
`[prompt][chosen]` and `[prompt][rejected]`, and each sequence is its own attention segment.

Names: T packed tokens, N scored tokens (targets), P pairs, S = 2P sequences (2i chosen,
2i+1 rejected).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenizedPair:
    """One preference pair as token ids, already truncated.

    Raises ValueError when the prompt or a response is empty or holds anything but ints >= 0.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            ids = getattr(self, name)
            if not ids:
                raise ValueError(f"{name} is empty: every side of a pair needs at least one token")
            if set(map(type, ids)) != {int} or min(ids) < 0:
                raise ValueError(f"{name} must be a list of ints >= 0, got {ids[:8]}")

    @property
    def num_tokens(self) -> int:
        """Packed tokens this pair takes in a batch: the length to plan batches with."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class PackedPairs:
    """One micro-batch. All integers are int64, except `cu_seqlens_S1`, which is int32."""

    input_ids_T: Tensor
    position_ids_T: Tensor  # from 0 in every sequence
    cu_seqlens_S1: Tensor  # CPU: sequence s is packed tokens [s]:[s + 1]
    max_seqlen: int  # tokens of the longest sequence
    rows_N: Tensor  # rows_N[i] is the packed row whose hidden state predicts target_N[i]
    target_N: Tensor
    bounds_S1: Tensor  # CPU: sequence s has targets [s]:[s + 1]
    pair_index_P: Tensor  # CPU: which pairs of the dataset these are

    @property
    def num_pairs(self) -> int:
        return len(self.pair_index_P)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids_T)

    def to(self, device: torch.device | str) -> "PackedPairs":
        """Copy the token tensors to `device`; boundaries and pair indices stay on the CPU."""
        names = ("input_ids_T", "position_ids_T", "rows_N", "target_N")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)


def pack_pairs(pairs: Sequence[TokenizedPair], index: Sequence[int] | None = None) -> PackedPairs:
    """Pack whole pairs, in the order given, into one row of tokens.

    `index` names the dataset pair behind each of `pairs` (default: 0, 1, ...). Raises ValueError
    when there are no pairs or `index` has another length.
    """
    if not pairs:
        raise ValueError("pack_pairs needs at least one pair")
    if index is None:
        index = range(len(pairs))
    if len(index) != len(pairs):
        raise ValueError(f"index has {len(index)} entries for {len(pairs)} pairs")

    sides = [(p.prompt_ids, ids) for p in pairs for ids in (p.chosen_ids, p.rejected_ids)]
    seqlens = [len(prompt) + len(response) for prompt, response in sides]
    offsets = [0, *accumulate(seqlens)]
    # The hidden state of the token before a target predicts it, so the rows of a response start
    # at the last token of its prompt.
    rows = [
        torch.arange(start + len(prompt) - 1, start + len(prompt) - 1 + len(response))
        for start, (prompt, response) in zip(offsets, sides)
    ]
    return PackedPairs(
        input_ids_T=torch.tensor([t for prompt, response in sides for t in prompt + response]),
        position_ids_T=torch.cat([torch.arange(n) for n in seqlens]),
        cu_seqlens_S1=torch.tensor(offsets, dtype=torch.int32),
        max_seqlen=max(seqlens),
        rows_N=torch.cat(rows),
        target_N=torch.tensor([t for _, response in sides for t in response]),
        bounds_S1=torch.tensor([0, *accumulate(len(response) for _, response in sides)]),
        pair_index_P=torch.tensor(list(index)),
    )


def plan_batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Distribute whole pairs over batches of at most `max_tokens` packed tokens.

    First-fit decreasing, equal lengths by index: the same lengths always give the same plan.
    `lengths[i]` is the packed tokens of pair i (`TokenizedPair.num_tokens`). Returns the pair
    indices of each batch in ascending order; the batch with the longest pair comes first.

    Raises ValueError when a length is below 1 or above `max_tokens`.
    """
    _check_lengths(lengths, max_tokens)
    return _first_fit_decreasing(range(len(lengths)), lengths, max_tokens)


def plan_steps(
    lengths: Sequence[int], *, batch_pairs: int, max_tokens: int, seed: int, epoch: int = 0
) -> list[list[list[int]]]:
    """Plan an epoch: `plan[step][micro_batch]` lists pair indices.

    All pairs are shuffled by `seed` and `epoch`, every step takes the next `batch_pairs` of them
    (the last step what is left), and `plan_batches` splits a step into micro-batches. The plan
    depends on nothing but the arguments, so a run resumes by its step number.

    Raises ValueError like `plan_batches`, and when `batch_pairs` < 1 or `epoch` < 0.
    """
    _check_lengths(lengths, max_tokens)
    if batch_pairs < 1 or epoch < 0:
        raise ValueError(
            f"needs batch_pairs >= 1 and epoch >= 0, got batch_pairs={batch_pairs}, epoch={epoch}"
        )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    # Drawing every epoch up to this one keeps (seed, epoch) apart from (seed + 1, epoch - 1).
    for _ in range(epoch + 1):
        order = torch.randperm(len(lengths), generator=generator).tolist()
    groups = [order[start : start + batch_pairs] for start in range(0, len(order), batch_pairs)]
    return [_first_fit_decreasing(group, lengths, max_tokens) for group in groups]


def fill_rate(plan: Sequence[Sequence[int]], lengths: Sequence[int], max_tokens: int) -> float:
    """Share of the token budget that a plan of micro-batches uses, in (0, 1]."""
    if not plan:
        raise ValueError("the plan has no batches")
    return sum(lengths[i] for batch in plan for i in batch) / (len(plan) * max_tokens)


def _check_lengths(lengths: Sequence[int], max_tokens: int) -> None:
    for i, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"pair {i} has {length} tokens; every length must be at least 1")
        if length > max_tokens:
            raise ValueError(
                f"pair {i} takes {length} packed tokens, more than max_tokens={max_tokens}: "
                f"raise max_tokens to at least {max(lengths)}, or truncate to a smaller max_length"
            )


def _first_fit_decreasing(
    indices: Sequence[int], lengths: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Place each of `indices`, longest first, into the first batch with room for it."""
    num_leaves = 1 << max(len(indices) - 1, 0).bit_length()
    # A max-tree over the free tokens of every batch, opened or not: leaves from num_leaves on,
    # node k above 2k and 2k + 1. A plain scan is quadratic, minutes for a large dataset.
    room = [max_tokens] * (2 * num_leaves)
    batches: list[list[int]] = []
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        node = 1
        while node < num_leaves:
            node = 2 * node if room[2 * node] >= lengths[i] else 2 * node + 1
        if node - num_leaves == len(batches):
            batches.append([])
        batches[node - num_leaves].append(i)
        room[node] -= lengths[i]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [sorted(batch) for batch in batches]
