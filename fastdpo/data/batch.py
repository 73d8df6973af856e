"""Tokenized examples -> tensors of a micro-batch, and the plan of which examples go where.

Three layouts of the same pairs, and of lists and single responses alike:

| layout | tokens | for |
|---|---|---|
| shared | one row, `[prompt][chosen][rejected]` a pair: the prompt is computed once | most models |
| packed | one row, `[prompt][chosen]` and `[prompt][rejected]` a pair | as a comparison |
| padded | a row for each of the two, padded to the longest | recurrent or own attention code |

Where a model's rotary frequencies depend on a sequence's length (`LengthClasses`), the sequences of
an example share a prompt in the shared layout only if they have the same; so they do if the prompt
is the same.

Names: B rows, T tokens of a row, N scored tokens (targets), P examples (pairs, lists or single
responses), S sequences (of pairs 2i chosen, 2i + 1 rejected), K gathered keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastdpo.data.examples import (
    LengthClasses,
    TokenizedExample,
    TokenizedSingle,
    check_layout,
    classes_of,
    shared_prompts,
)


@dataclass(frozen=True)
class Segments:
    """Which keys the tokens of a packed row attend to.

    Segment i are the tokens ``bounds_q[i]:bounds_q[i + 1]``. It sees the keys
    ``bounds_k[i]:bounds_k[i + 1]`` of the row's keys gathered by ``key_rows_K``, causally and
    aligned at their ends: the segment's last token sees all of them.

    A prompt that is shared is gathered several times. ``first_T`` is where each row was gathered
    first, ``again_keys_R`` and ``again_rows_R`` are the repeats, in parts of ``again_sizes`` that
    have each row at most once: what the gather's gradient needs.
    """

    bounds_q: tuple[int, ...]
    bounds_k: tuple[int, ...]
    cu_q: Tensor  # the bounds as int32, on the device of the tokens
    cu_k: Tensor
    key_rows_K: Tensor | None = None  # None: the keys are the row's own, in order
    first_T: Tensor | None = None
    again_keys_R: Tensor | None = None
    again_rows_R: Tensor | None = None
    again_sizes: tuple[int, ...] = ()
    # Masks that attention made for this batch, for its next layer.
    masks: dict[Any, Tensor] = field(default_factory=dict, compare=False, repr=False)
    # A process's part of the row, where several have it (`fastdpo.model.sequence_parallel`).
    chunk: Any = field(default=None, compare=False, repr=False)

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
    """One micro-batch: B = 1 row of T tokens, or padded rows, a sequence each. Indices are int64.

    ``rows_N`` counts tokens over all rows, row after row.
    """

    input_ids_BT: Tensor
    # From 0 in every sequence, 0 in padding; None: padded rows of a model that counts them itself.
    position_ids_BT: Tensor | None
    segments: Segments | None  # of a packed row
    rows_N: Tensor  # rows_N[i] is the token whose hidden state predicts target_N[i]
    target_N: Tensor
    bounds_S1: Tensor  # CPU: sequence s has targets [s]:[s + 1]
    firsts: tuple[int, ...]  # example p has the sequences [p]:[p + 1]
    pair_index_P: Tensor  # CPU: which examples of the dataset these are
    weight_P: Tensor | None = None  # of each example's loss; None: all 1
    smoothing_P: Tensor | None = None  # fp64, label noise of each example; None: all 0
    margin_P: Tensor | None = None  # fp64, each example's offset; None: all 0
    scores_S: Tensor | None = None  # fp64, of each sequence; None: an example has none
    desirable_P: Tensor | None = None  # fp64, of single responses: 1 desirable, 0 undesirable

    @property
    def num_pairs(self) -> int:
        return len(self.pair_index_P)

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes, padding included."""
        return self.input_ids_BT.numel()

    @property
    def chunk(self) -> Any:
        """What it knows of the whole row, if it is a process's part of one."""
        return None if self.segments is None else self.segments.chunk

    def to(self, device: torch.device | str) -> "PackedPairs":
        """Copy the token tensors to `device`; boundaries and pair indices stay on the CPU."""
        return _moved(self, device, ("bounds_S1", "pair_index_P"))


def _moved(data: Any, device: torch.device | str, stay: tuple[str, ...]) -> Any:
    moved = {}
    for item in fields(data):
        value = getattr(data, item.name)
        if isinstance(value, Tensor) and item.name not in stay:
            moved[item.name] = value.to(device, non_blocking=True)
        elif value is not None and item.name in ("segments", "chunk"):
            moved[item.name] = value.to(device)
    return replace(data, **moved)


def pack_pairs(
    pairs: Sequence[TokenizedExample], index: Sequence[int] | None = None, *, layout: str = "shared"
) -> PackedPairs:
    """Lay out whole examples, of one shape and in the order given, as one micro-batch.

    Args:
        pairs: at least one pair, list or single response.
        index: the example of the dataset behind each of `pairs` (default: 0, 1, ...).
        layout: "shared", "packed" or "padded"; see the module's docstring. What
            `fastdpo.model.layout_of` gives is exact for its model; a plain name is not where the
            model's rotary frequencies depend on the length.

    Raises:
        ValueError: no examples, of several shapes, an `index` of another length, or an unknown
            layout.
    """
    if not pairs:
        raise ValueError("pack_pairs needs at least one pair")
    if len(shapes := {pair.shape for pair in pairs}) > 1:
        raise ValueError(f"examples of one shape make a batch, these are {sorted(shapes)}")
    if index is None:
        index = range(len(pairs))
    if len(index) != len(pairs):
        raise ValueError(f"index has {len(index)} entries for {len(pairs)} pairs")
    check_layout(layout)
    responses_P = [pair.responses for pair in pairs]
    responses = list(chain.from_iterable(responses_P))
    lay_out = _padded if layout == "padded" else _one_row
    return PackedPairs(
        **lay_out(pairs, layout),
        target_N=torch.tensor([token for ids in responses for token in ids]),
        bounds_S1=torch.tensor([0, *accumulate(map(len, responses))]),
        firsts=(0, *accumulate(map(len, responses_P))),
        pair_index_P=torch.tensor(list(index)),
        weight_P=_values([pair.weight for pair in pairs], 1.0, torch.float32),
        smoothing_P=_values([pair.label_smoothing for pair in pairs], 0.0),
        margin_P=_values([pair.margin for pair in pairs], 0.0),
        scores_S=_scores(pairs),
        desirable_P=_desirable(pairs),
    )


def _values(values: list[float], usual: float, dtype: torch.dtype = torch.float64) -> Tensor | None:
    return None if set(values) == {usual} else torch.tensor(values, dtype=dtype)


def _scores(pairs: Sequence[TokenizedExample]) -> Tensor | None:
    known = [pair.scores for pair in pairs]
    given = [scores for scores in known if scores is not None]
    if len(given) < len(known):  # an objective that needs them refuses the batch
        return None
    return torch.tensor(list(chain.from_iterable(given)), dtype=torch.float64)


def _desirable(pairs: Sequence[TokenizedExample]) -> Tensor | None:
    labels = [float(pair.desirable) for pair in pairs if isinstance(pair, TokenizedSingle)]
    return torch.tensor(labels, dtype=torch.float64) if labels else None


def _one_row(pairs: Sequence[TokenizedExample], layout: str) -> dict[str, Any]:
    """`[prompt][response][response] ...` for the sequences of an example that share a prompt.

    The segments are (prompt + first response) and each further response.
    """
    ids, positions, rows_N, keys, first = [], [], [], [], []
    # The keys and rows that are gathered again, those of a second time apart from a third's.
    again: list[tuple[list[int], list[int]]] = []
    bounds_q, bounds_k = [0], [0]
    for pair in pairs:
        prompts, responses, count = pair.prompts, pair.responses, pair.num_computed
        # Those that are not computed stand where the first one does.
        rows: list[Sequence[int]] = [range(len(ids), len(ids) + len(x)) for x in responses]
        for group in shared_prompts(prompts[:count], [*map(len, responses[:count])], layout):
            prompt, start = len(prompts[group[0]]), len(ids)
            ids += prompts[group[0]]
            positions += range(prompt)
            for time, s in enumerate(group):
                own, taken = range(len(ids), len(ids) + len(responses[s])), len(keys)
                ids += responses[s]
                positions += range(prompt, prompt + len(own))
                # The hidden state before a target predicts it: the prompt's last token predicts
                # the first of a response.
                rows[s] = (start + prompt - 1, *own[:-1])
                keys += [*range(start, start + prompt), *own]
                if time:
                    if len(again) < time:
                        again.append(([], []))
                    again[time - 1][0].extend(range(taken, taken + prompt))
                    again[time - 1][1].extend(range(start, start + prompt))
                    taken += prompt
                first += range(taken, len(keys))
                bounds_q.append(len(ids))
                bounds_k.append(len(keys))
        rows_N += chain.from_iterable(rows)
    int64 = partial(torch.tensor, dtype=torch.int64)
    sizes = tuple(len(keys_of) for keys_of, _ in again)
    repeats = [list(chain.from_iterable(x)) for x in zip(*again)]
    gathered = (*map(int64, (keys, first, *repeats)), sizes) if again else ()
    cu_q, cu_k = (torch.tensor(bounds, dtype=torch.int32) for bounds in (bounds_q, bounds_k))
    return {
        "input_ids_BT": torch.tensor([ids]),
        "position_ids_BT": torch.tensor([positions]),
        "segments": Segments(tuple(bounds_q), tuple(bounds_k), cu_q, cu_k, *gathered),  # type: ignore[arg-type]
        "rows_N": torch.tensor(rows_N),
    }


def _padded(pairs: Sequence[TokenizedExample], layout: str) -> dict[str, Any]:
    """A row for each `[prompt][response]`, padded on the right: a causal model needs no mask."""
    ids_B: list[Tensor] = []
    places: list[tuple[int, int, int]] = []  # of each sequence: its row, first and last target
    for pair in pairs:
        prompts, responses, count = pair.prompts, pair.responses, pair.num_computed
        for s, (prompt, response) in enumerate(zip(prompts, responses)):
            row = len(ids_B) if s < count else len(ids_B) - count
            places.append((row, len(prompt), len(prompt) + len(response)))
            ids_B += [torch.tensor(prompt + response)] if s < count else []
    T = max(map(len, ids_B))
    # The hidden state before a target predicts it.
    rows_S = [torch.arange(start - 1, stop - 1) + row * T for row, start, stop in places]
    # Their largest tells how long a row is.
    positions_B = [torch.arange(len(ids)) for ids in ids_B] if classes_of(layout) else None
    return {
        "input_ids_BT": pad_sequence(ids_B, batch_first=True),
        "position_ids_BT": positions_B and pad_sequence(positions_B, True),
        "segments": None,
        "rows_N": torch.cat(rows_S),
    }


def plan_batches(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    padded: bool = False,
    sequences: Sequence[int] | None = None,
) -> list[list[int]]:
    """Distribute whole examples over batches of at most `max_tokens` tokens.

    First-fit decreasing, equal lengths by index: the same lengths always give the same plan.
    `lengths[i]` is the tokens of example i (`num_tokens` in its layout). `padded` says that every
    sequence of a batch takes the tokens of its longest; such batches are filled in order of the
    examples' longest sequences. `sequences[i]` says how many example i has then (`num_computed`);
    None: all have as many. Returns the indices of each batch in ascending order; the batch with the
    longest comes first.

    Raises ValueError when a length is below 1 or above `max_tokens`.
    """
    _check_lengths(lengths, max_tokens)
    return _fill(range(len(lengths)), lengths, max_tokens, padded, sequences)


def plan_steps(
    lengths: Sequence[int],
    *,
    batch_pairs: int,
    max_tokens: int,
    seed: int,
    epoch: int = 0,
    padded: bool = False,
    sequences: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """Plan an epoch: `plan[step][micro_batch]` lists indices of examples.

    All examples are shuffled by `seed` and `epoch`, every step takes the next `batch_pairs` of them
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
    return [_fill(group, lengths, max_tokens, padded, sequences) for group in groups]


def padded_tokens(lengths: Sequence[int], sequences: Sequence[int]) -> int:
    """Tokens of a padded batch of examples of these lengths and numbers of sequences."""
    return sum(sequences) * max(length // count for length, count in zip(lengths, sequences))


def share_step(indices: Sequence[int], lengths: Sequence[int], world: int) -> list[list[int]]:
    """Deal a step's examples to `world` processes so that their tokens come out even.

    Longest first, each to the process with the fewest tokens so far; which examples a step has does
    not depend on `world`. A process gets none only when there are fewer examples than processes.
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
            raise ValueError(f"example {i} has {length} tokens; every length must be at least 1")
        if length > max_tokens:
            raise ValueError(
                f"example {i} takes {length} packed tokens, more than max_tokens={max_tokens}: "
                f"raise max_tokens to at least {max(lengths)}, or truncate to a smaller max_length"
            )


def _fill(
    indices: Sequence[int],
    lengths: Sequence[int],
    max_tokens: int,
    padded: bool,
    sequences: Sequence[int] | None,
) -> list[list[int]]:
    if not padded:
        return _first_fit_decreasing(indices, lengths, max_tokens)
    counts = sequences or [1] * len(lengths)
    batches: list[list[int]] = []
    rows = longest = 0  # of the last batch
    for i in sorted(indices, key=lambda i: (-(lengths[i] // counts[i]), i)):
        if not batches or (rows + counts[i]) * longest > max_tokens:
            batches.append([])
            rows, longest = 0, lengths[i] // counts[i]
        batches[-1].append(i)
        rows += counts[i]
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
