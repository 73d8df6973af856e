"""Tokenized preference pairs -> tensors of a micro-batch, and the plan of which pairs go where.

Three layouts of the same pairs:

| layout | tokens | for |
|---|---|---|
| shared | one row, `[prompt][chosen][rejected]` a pair: the prompt is computed once | most models |
| packed | one row, `[prompt][chosen]` and `[prompt][rejected]` a pair | as a comparison |
| padded | a row for each of the two, padded to the longest | recurrent or own attention code |

Where a model's rotary frequencies depend on a sequence's length (`LengthClasses`), the sides of a
pair share the prompt in the shared layout only if both have the same; else they are two sequences.

Names: B rows, T tokens of a row, N scored tokens (targets), P pairs, S = 2P sequences (2i chosen,
2i + 1 rejected), K gathered keys.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

LAYOUTS = ("shared", "packed", "padded")


@dataclass(frozen=True)
class LengthClasses:
    """Which lengths of a sequence have the same rotary frequencies in a model.

    The class changes after each of ``steps``, and with every token after ``grows_from``.
    """

    steps: tuple[int, ...] = ()
    grows_from: int | None = None

    def of(self, length: int) -> tuple[int, int]:
        """The class of a length."""
        grown = self.grows_from is not None and length > self.grows_from
        return bisect_left(self.steps, length), length if grown else 0

    @property
    def last(self) -> int:
        """The last length of which the class is given by ``steps``."""
        return max(*self.steps, self.grows_from or 0, 0)

    def __bool__(self) -> bool:
        return bool(self.steps) or self.grows_from is not None

    def __or__(self, other: "LengthClasses") -> "LengthClasses":
        """Lengths that are of one class in both."""
        steps = tuple(sorted({*self.steps, *other.steps}))
        grows = [x.grows_from for x in (self, other) if x.grows_from is not None]
        return LengthClasses(steps, min(grows, default=None))


ANY_LENGTH = LengthClasses()


class Layout(str):
    """One of `LAYOUTS` for a certain model: with the lengths at which its frequencies change."""

    classes: LengthClasses

    def __new__(cls, name: str, classes: LengthClasses = ANY_LENGTH) -> "Layout":
        layout = super().__new__(cls, name)
        layout.classes = classes
        return layout

    @property
    def key(self) -> Any:
        """What names it where values that were computed in it are kept."""
        if not self.classes:
            return str(self)
        return [str(self), list(self.classes.steps), self.classes.grows_from]


def _classes(layout: str) -> LengthClasses:
    return layout.classes if isinstance(layout, Layout) else ANY_LENGTH


@dataclass(frozen=True)
class TokenizedPair:
    """One preference pair as token ids, already truncated.

    `weight` is a factor on its loss, `smoothing` the probability that its label is flipped.

    Raises ValueError when the prompt or a response is empty or holds anything but ints >= 0, when
    `weight` is negative or infinite, or `smoothing` outside [0, 1].
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)  # the row it came from, for messages
    weight: float = 1.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            ids = getattr(self, name)
            if not ids:
                raise ValueError(f"{name} is empty: every side of a pair needs at least one token")
            if set(map(type, ids)) != {int} or min(ids) < 0:
                raise ValueError(f"{name} must be a list of ints >= 0, got {ids[:8]}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be finite and >= 0, got {self.weight!r}")
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"smoothing must be in [0, 1], got {self.smoothing!r}")

    def num_tokens(self, layout: str = "shared") -> int:
        """Tokens this pair takes in a batch of a layout: the length to plan batches with.

        In a padded batch a pair takes two rows as long as the batch's longest sequence; this is
        what it takes alone.
        """
        prompt, chosen, rejected = map(len, (self.prompt_ids, self.chosen_ids, self.rejected_ids))
        return tokens_of_pair(prompt, chosen, rejected, layout)


def tokens_of_pair(prompt: int, chosen: int, rejected: int, layout: str) -> int:
    """`TokenizedPair.num_tokens` of a pair with so many tokens in its three parts."""
    _check_layout(layout)
    if layout == "padded":
        return 2 * (prompt + max(chosen, rejected))
    shares = _shares_prompt(prompt, chosen, rejected, layout)
    return (1 if shares else 2) * prompt + chosen + rejected


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}")


def _shares_prompt(prompt: int, chosen: int, rejected: int, layout: str) -> bool:
    """Whether the prompt of a pair is there once, with the same keys on both sides."""
    same = _classes(layout).of(prompt + chosen) == _classes(layout).of(prompt + rejected)
    return layout == "shared" and same


@dataclass(frozen=True)
class Segments:
    """Which keys the tokens of a packed row attend to.

    Segment i are the tokens ``bounds_q[i]:bounds_q[i + 1]``. It sees the keys
    ``bounds_k[i]:bounds_k[i + 1]`` of the row's keys gathered by ``key_rows_K``, causally and
    aligned at their ends: the segment's last token sees all of them.

    A prompt that is shared is gathered twice. ``first_T`` is where each row was gathered first,
    ``again_keys_R`` and ``again_rows_R`` are the repeats: what the gather's gradient needs.
    """

    bounds_q: tuple[int, ...]
    bounds_k: tuple[int, ...]
    cu_q: Tensor  # the bounds as int32, on the device of the tokens
    cu_k: Tensor
    key_rows_K: Tensor | None = None  # None: the keys are the row's own, in order
    first_T: Tensor | None = None
    again_keys_R: Tensor | None = None
    again_rows_R: Tensor | None = None
    # Masks that attention made for this batch, for its next layer.
    masks: dict[Any, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def sizes(self) -> list[list[int]]:
        """How many queries, and how many keys, each segment has."""
        return [[b - a for a, b in pairwise(bounds)] for bounds in (self.bounds_q, self.bounds_k)]

    @property
    def longest(self) -> tuple[int, int]:
        """Queries and keys of the longest segment of each."""
        queries, keys = self.sizes
        return max(queries), max(keys)

    def exact_for(self, classes: LengthClasses) -> bool:
        """Whether all that share a prompt are of one length class."""
        queries, keys = self.sizes
        return all(
            q == k or classes.of(before) == classes.of(k)
            for q, k, before in zip(queries[1:], keys[1:], keys)
        )

    def to(self, device: torch.device | str) -> "Segments":
        return replace(_moved(self, device, ()), masks={})


@dataclass(frozen=True)
class PackedPairs:
    """One micro-batch: B = 1 row of T tokens, or B = S padded rows. Indices are int64.

    ``rows_N`` counts tokens over all rows, row after row.
    """

    input_ids_BT: Tensor
    # From 0 in every sequence, 0 in padding; None: padded rows of a model that counts them itself.
    position_ids_BT: Tensor | None
    segments: Segments | None  # of a packed row
    rows_N: Tensor  # rows_N[i] is the token whose hidden state predicts target_N[i]
    target_N: Tensor
    bounds_S1: Tensor  # CPU: sequence s has targets [s]:[s + 1]
    pair_index_P: Tensor  # CPU: which pairs of the dataset these are
    weight_P: Tensor | None = None  # of each pair's loss; None: all 1
    smoothing_P: Tensor | None = None  # label noise of each pair; None: all 0

    @property
    def num_pairs(self) -> int:
        return len(self.pair_index_P)

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes, padding included."""
        return self.input_ids_BT.numel()

    def to(self, device: torch.device | str) -> "PackedPairs":
        """Copy the token tensors to `device`; boundaries and pair indices stay on the CPU."""
        return _moved(self, device, ("bounds_S1", "pair_index_P"))


def _moved(data: Any, device: torch.device | str, stay: tuple[str, ...]) -> Any:
    moved = {}
    for item in fields(data):
        value = getattr(data, item.name)
        if isinstance(value, Tensor) and item.name not in stay:
            moved[item.name] = value.to(device, non_blocking=True)
        elif isinstance(value, Segments):
            moved[item.name] = value.to(device)
    return replace(data, **moved)


def pack_pairs(
    pairs: Sequence[TokenizedPair], index: Sequence[int] | None = None, *, layout: str = "shared"
) -> PackedPairs:
    """Lay out whole pairs, in the order given, as one micro-batch.

    Args:
        pairs: at least one.
        index: the dataset pair behind each of `pairs` (default: 0, 1, ...).
        layout: "shared", "packed" or "padded"; see the module's docstring. What
            `fastdpo.model.layout_of` gives is exact for its model; a plain name is not where the
            model's rotary frequencies depend on the length.

    Raises:
        ValueError: no pairs, an `index` of another length, or an unknown layout.
    """
    if not pairs:
        raise ValueError("pack_pairs needs at least one pair")
    if index is None:
        index = range(len(pairs))
    if len(index) != len(pairs):
        raise ValueError(f"index has {len(index)} entries for {len(pairs)} pairs")
    _check_layout(layout)
    responses = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    lay_out = _padded if layout == "padded" else _one_row
    return PackedPairs(
        **lay_out(pairs, layout),
        target_N=torch.tensor([token for ids in responses for token in ids]),
        bounds_S1=torch.tensor([0, *accumulate(map(len, responses))]),
        pair_index_P=torch.tensor(list(index)),
        weight_P=_values([pair.weight for pair in pairs], 1.0),
        smoothing_P=_values([pair.smoothing for pair in pairs], 0.0),
    )


def _values(values: list[float], usual: float) -> Tensor | None:
    return None if set(values) == {usual} else torch.tensor(values, dtype=torch.float32)


def _one_row(pairs: Sequence[TokenizedPair], layout: str) -> dict[str, Any]:
    """`[prompt][chosen][rejected]` a pair that shares its prompt, segments (prompt + chosen) and
    (rejected); else `[prompt][chosen][prompt][rejected]`, a segment for each side."""
    ids, positions, rows, keys, again_keys, again_rows, first = [], [], [], [], [], [], []
    bounds_q, bounds_k = [0], [0]
    for pair in pairs:
        prompt = len(pair.prompt_ids)
        shares = _shares_prompt(prompt, len(pair.chosen_ids), len(pair.rejected_ids), layout)
        start = 0  # of the prompt, in the row
        for side, response in enumerate((pair.chosen_ids, pair.rejected_ids)):
            again, taken = shares and side == 1, len(keys)
            if not again:
                start = len(ids)
                ids += pair.prompt_ids
                positions += range(prompt)
            own = range(len(ids), len(ids) + len(response))
            ids += response
            positions += range(prompt, prompt + len(response))
            # The hidden state before a target predicts it: the prompt's last token predicts the
            # first of a response.
            rows += [start + prompt - 1, *own[:-1]]
            keys += [*range(start, start + prompt), *own]
            if again:
                again_keys += range(taken, taken + prompt)
                again_rows += range(start, start + prompt)
                taken += prompt
            first += range(taken, len(keys))
            bounds_q.append(len(ids))
            bounds_k.append(len(keys))
    int64 = partial(torch.tensor, dtype=torch.int64)
    gathered = map(int64, (keys, first, again_keys, again_rows)) if again_rows else ()
    cu_q, cu_k = (torch.tensor(bounds, dtype=torch.int32) for bounds in (bounds_q, bounds_k))
    return {
        "input_ids_BT": torch.tensor([ids]),
        "position_ids_BT": torch.tensor([positions]),
        "segments": Segments(tuple(bounds_q), tuple(bounds_k), cu_q, cu_k, *gathered),  # type: ignore[arg-type]
        "rows_N": torch.tensor(rows),
    }


def _padded(pairs: Sequence[TokenizedPair], layout: str) -> dict[str, Any]:
    """A row for each `[prompt][response]`, padded on the right: a causal model needs no mask."""
    sides = [(p.prompt_ids, ids) for p in pairs for ids in (p.chosen_ids, p.rejected_ids)]
    ids_B = [torch.tensor(prompt + response) for prompt, response in sides]
    positions_B = [torch.arange(len(ids)) for ids in ids_B]
    T = max(map(len, ids_B))
    rows_B = [at[len(sides[i][0]) - 1 : -1] + i * T for i, at in enumerate(positions_B)]
    return {
        "input_ids_BT": pad_sequence(ids_B, batch_first=True),
        # Their largest tells how long a row is.
        "position_ids_BT": pad_sequence(positions_B, True) if _classes(layout) else None,
        "segments": None,
        "rows_N": torch.cat(rows_B),
    }


def plan_batches(
    lengths: Sequence[int], *, max_tokens: int, padded: bool = False
) -> list[list[int]]:
    """Distribute whole pairs over batches of at most `max_tokens` tokens.

    First-fit decreasing, equal lengths by index: the same lengths always give the same plan.
    `lengths[i]` is the tokens of pair i (`TokenizedPair.num_tokens` in its layout). `padded` says
    that every pair of a batch takes the tokens of its longest; such batches are filled in order of
    length. Returns the pair indices of each batch in ascending order; the batch with the longest
    pair comes first.

    Raises ValueError when a length is below 1 or above `max_tokens`.
    """
    _check_lengths(lengths, max_tokens)
    return _fill(range(len(lengths)), lengths, max_tokens, padded)


def plan_steps(
    lengths: Sequence[int],
    *,
    batch_pairs: int,
    max_tokens: int,
    seed: int,
    epoch: int = 0,
    padded: bool = False,
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
    return [_fill(group, lengths, max_tokens, padded) for group in groups]


def share_step(indices: Sequence[int], lengths: Sequence[int], world: int) -> list[list[int]]:
    """Deal a step's pairs to `world` processes so that their tokens come out even.

    Longest first, each to the process with the fewest tokens so far; which pairs a step has does
    not depend on `world`. A process gets none only when there are fewer pairs than processes.
    """
    shares: list[list[int]] = [[] for _ in range(world)]
    tokens = [0] * world
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        rank = min(range(world), key=lambda rank: (tokens[rank], len(shares[rank])))
        shares[rank].append(i)
        tokens[rank] += lengths[i]
    return [sorted(share) for share in shares]


def _check_lengths(lengths: Sequence[int], max_tokens: int) -> None:
    for i, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"pair {i} has {length} tokens; every length must be at least 1")
        if length > max_tokens:
            raise ValueError(
                f"pair {i} takes {length} packed tokens, more than max_tokens={max_tokens}: "
                f"raise max_tokens to at least {max(lengths)}, or truncate to a smaller max_length"
            )


def _fill(
    indices: Sequence[int], lengths: Sequence[int], max_tokens: int, padded: bool
) -> list[list[int]]:
    if not padded:
        return _first_fit_decreasing(indices, lengths, max_tokens)
    batches: list[list[int]] = []
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > max_tokens:
            batches.append([])
        batches[-1].append(i)
    return [sorted(batch) for batch in batches]


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
