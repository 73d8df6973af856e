"""Which way a call goes through the head, decided from its sizes before any work.

One matrix product over a call is G = 2*N*D*V operations.

| route     | products | keeps until the backward             | used when                     |
|-----------|----------|--------------------------------------|-------------------------------|
| forward   | 1G       | nothing                              | no gradient is wanted         |
| frozen    | 2G       | d logp / d h of each token, (N, D)   | the head has no gradient      |
| stash     | 3G       | exponentials of all tokens, (N, V)   | they fit the workspace        |
| grouped   | 3G       | the finished gradients               | examples, too many for one    |
| recompute | 4G       | log-sum-exp of each token            | otherwise (3G, frozen head)   |

`grouped` takes as many whole examples at a time as the workspace holds; a pair, or a single
response, longer than the workspace streams through it in blocks and has its unit gradient scaled at
the end, which needs fp32 buffers of the head's size beside the workspace.  They, and what `frozen`
keeps, may take up to `ACCUMULATOR_SHARE` workspaces; beyond that the call recomputes.  So it does
for a longer list, and where the loss of an example depends on the others.

Only the kernels' `frozen` never recomputes: where tokens name their rows it keeps more, since the
sum into those rows would need as much, and elsewhere it keeps the unit gradients in the memory of
the gradient, rounded to the gradient's dtype, so that a result is rounded twice.

A loss that reads the KL to a reference streams both heads, one product more in each forward and
each recomputation.  Where each KL's share beside the log-probs is known beforehand, a row of the
gradient by the logits is ``onehot`` less a known mixture of the two distributions, so one stash is
kept, of mixtures: `mixed_rows` at a time have a second one, of the reference, for a moment.  Other
losses of a KL, and the ops of tokens with one, recompute.

The blocks of rows (`spans`) depend on the sizes alone, not on what needs a gradient, so a policy
and a reference evaluated on the same packed rows run the same instructions and agree to the bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

MIB = 2**20
ACCUMULATOR_SHARE = 4
_VOCAB_CHUNK = 1024
# An fp32 tile: smaller ones make slow products, and their folds are launches more than work.
_TILE_BYTES = 64 * MIB
_MIXED_ROWS = 512  # as many as make products of both heads fast
_TILE_SHARE = 4  # at most one part in so many of the workspace


LEAST_WORKSPACE_MIB = 256.0
_MEMORY_SHARE = 32


def default_workspace_mib(memory_bytes: int) -> float:
    """1/32 of a GPU's memory, and at least what other devices get, whose memory counts as 0."""
    return max(LEAST_WORKSPACE_MIB, float(memory_bytes // (_MEMORY_SHARE * MIB)))


@dataclass(frozen=True)
class Group:
    """Consecutive examples that are scored together, and their blocks of rows.

    ``unit`` is true for one example longer than the workspace that has a unit gradient.
    """

    examples: tuple[int, int]
    spans: tuple[tuple[int, int], ...]
    unit: bool

    @property
    def rows(self) -> tuple[int, int]:
        return self.spans[0][0], self.spans[-1][1]


@dataclass(frozen=True)
class Plan:
    """Route of one call; ``workspace_bytes`` bounds tiles and stash, accumulators come on top.

    So do sums of statistics: for each of them 4 bytes for every 128 columns of a block's rows.

    ``vocab_chunk`` columns of the head are worked on at a time, by the kernels only where they
    recompute.  ``tile_bytes`` of the workspace are the kernels' fp32 tiles of logits, and
    ``grad_tile_bytes`` those of the head's gradient, which is made when there are no others.
    ``in_place`` says that a frozen head's unit gradients lie in the memory of the gradient.
    ``mixed_rows`` at a time have a stash of the reference beside their own, where the two are mixed
    into one; 0 where they are not.
    """

    route: str
    groups: tuple[Group, ...]
    vocab_chunk: int
    workspace_bytes: int
    accumulator_bytes: int
    tile_bytes: int = 0
    grad_tile_bytes: int = 0
    in_place: bool = False
    mixed_rows: int = 0

    @property
    def spans(self) -> Iterator[tuple[int, int]]:
        return (span for group in self.groups for span in group.spans)


class _Space(NamedTuple):
    """How an implementation divides a workspace."""

    chunk: int  # columns of the head at a time
    row_bytes: int  # of a stash and of what is made with it
    stash_row_bytes: int
    fixed_bytes: int  # of the workspace, whatever the rows
    scratch_row_bytes: int  # in the backward, beside the workspace
    fused: bool
    mixed_rows: int = 0  # that have a second stash for a moment

    def mixing(self, workspace_bytes: int) -> "_Space":
        """The same with a second stash of some rows.

        In PyTorch they are enough for products of a good size.  The kernels' tiles are as many
        launches whatever rows they have, so there they are all the rows that are kept at a time.
        """
        enough = min(workspace_bytes // 4, _MIXED_ROWS * self.row_bytes)
        share = max(workspace_bytes // 8, enough)
        if self.fused:
            share = (workspace_bytes - self.fixed_bytes) // 2
        rows = max(1, share // self.row_bytes)
        fixed_bytes = self.fixed_bytes + rows * self.row_bytes
        return self._replace(mixed_rows=rows, fixed_bytes=fixed_bytes)


def _torch_space(D: int, V: int, itemsize: int, workspace_bytes: int) -> _Space:
    """PyTorch: a stash of accumulated numbers of ``itemsize`` bytes, a chunk of the head beside."""
    chunk = min(V, _VOCAB_CHUNK, max(16, workspace_bytes // (8 * D * itemsize)))
    row_bytes = itemsize * V + (itemsize + 2) * chunk
    return _Space(chunk, row_bytes, itemsize * V, itemsize * chunk * D, 0, fused=False)


def _fused_space(D: int, V: int, itemsize: int, workspace_bytes: int, heads: int) -> _Space:
    """Kernels: a stash of operands of ``itemsize`` bytes beside an fp32 tile of each head.

    The backward of a row needs an fp32 product and a scaled copy.
    """
    stash = itemsize * (-(-V // 64) * 64)
    sums = V // 16  # two in fp32 for a tile of 128 columns
    tile = min(heads * _TILE_BYTES, workspace_bytes // _TILE_SHARE)
    return _Space(V, stash + sums, stash, tile, (4 + itemsize) * D, fused=True)


def _space(
    D: int, V: int, itemsize: int, workspace_bytes: int, fused_itemsize: int | None, mixes: bool
) -> tuple[_Space, int]:
    """How a call divides its workspace, and the kernels' part of it for tiles."""
    if fused_itemsize is None:
        space, tile_bytes = _torch_space(D, V, itemsize, workspace_bytes), 0
    else:
        space = _fused_space(D, V, fused_itemsize, workspace_bytes, heads=2 if mixes else 1)
        tile_bytes = space.fixed_bytes
    return space.mixing(workspace_bytes) if mixes else space, tile_bytes


def _capacity(space: _Space, V: int, workspace_bytes: int) -> int:
    """Rows that a workspace holds."""
    capacity = (workspace_bytes - space.fixed_bytes) // space.row_bytes
    if space.fused and capacity > 128:
        capacity -= capacity % 128  # whole tiles of a matrix product
    if capacity < 1:
        share = _TILE_SHARE / (_TILE_SHARE - 1) if space.fused else 1.0
        rows_bytes = space.row_bytes * (2 if space.mixed_rows else 1)
        needed = max(space.row_bytes + space.fixed_bytes, share * rows_bytes) / MIB
        raise ValueError(
            f"workspace_mib={workspace_bytes / MIB:g} is too small: one row of V={V} logits with "
            f"its tile of the head needs {needed:.3g} MiB"
        )
    return capacity


def make_plan(
    bounds: list[int],
    D: int,
    V: int,
    *,
    itemsize: int,
    workspace_bytes: int,
    need_head: bool,
    need_h: bool,
    T: int,
    firsts: Sequence[int] | None = None,
    splits: bool = True,
    unit_buffers: int = 1,
    fused_itemsize: int | None = None,
    gathered: bool = True,
    mixes: bool = False,
) -> Plan:
    """Plan a call on sequences ``bounds[s] : bounds[s + 1]``.

    Args:
        firsts: first sequence of each example, and the end; default: pairs, and two bounds are one
            plain list of tokens.
        splits: whether examples may be scored apart.
        itemsize: bytes of an accumulated number, 4 or 8.
        need_head, need_h: whether the head's (weight or bias) and the hidden rows' gradients are
            wanted.
        T: hidden rows, the size of their fp32 gradient.
        unit_buffers: head-sized buffers a long example needs: 1 for margin objectives, else 2.
        fused_itemsize: bytes of an operand where the kernels run the call, None for PyTorch.
        gathered: whether tokens name their hidden rows, whose gradients are then summed at the end.
        mixes: whether what is kept of the policy is mixed with that of the reference.

    Raises:
        ValueError: the workspace does not hold one row of logits.
    """
    space, tile_bytes = _space(D, V, itemsize, workspace_bytes, fused_itemsize, mixes)
    grad_tile_bytes, chunk = tile_bytes, space.chunk
    capacity = _capacity(space, V, workspace_bytes)
    groups = _groups(bounds, firsts, capacity)
    splits = splits and all(g.examples != (0, 0) and (g.unit or len(g.spans) == 1) for g in groups)
    rows, head_bytes, h_bytes = bounds[-1], itemsize * V * D, itemsize * T * D
    tokens_bytes = itemsize * rows * D
    units = sum(group.unit for group in groups)
    buffers = 1 + (unit_buffers - 1 if units == 1 == len(groups) else unit_buffers)
    buffers = buffers if units else 1
    grouped_bytes = buffers * head_bytes
    affordable = ACCUMULATOR_SHARE * workspace_bytes
    sums_h = not space.fused  # an fp32 gradient of all hidden rows, on every route
    in_place = False
    longest = max(stop - start for group in groups for start, stop in group.spans)
    scratch_bytes = space.scratch_row_bytes * longest
    if not (need_head or need_h):
        route, accumulators = "forward", 0
    elif not need_head and (tokens_bytes <= affordable or space.fused):
        in_place = tokens_bytes > affordable and not gathered
        kept_bytes = 0 if in_place else tokens_bytes
        route, accumulators = "frozen", kept_bytes + scratch_bytes + h_bytes * sums_h
    elif need_head and rows <= capacity:
        route, accumulators = "stash", scratch_bytes + h_bytes * sums_h
    elif need_head and splits and grouped_bytes <= affordable:
        in_groups = [stop - start for start, stop in (g.rows for g in groups if g.unit)]
        unit_bytes = itemsize * D * max(in_groups, default=0)
        route, accumulators = "grouped", grouped_bytes + scratch_bytes + h_bytes + unit_bytes
    elif not space.fused:
        route, accumulators = "recompute", h_bytes + itemsize * space.chunk * D
    else:
        route, accumulators = "recompute", tokens_bytes + space.scratch_row_bytes * rows
    if fused_itemsize is not None:
        # Tiles of logits come from the sizes alone, so that every route folds the same ones; those
        # of the gradient take what its stash leaves.
        columns = (workspace_bytes - tile_bytes) // (fused_itemsize * rows)
        chunk = min(V, columns // 256 * 256 or max(64, columns // 64 * 64))
        if route != "recompute":
            grad_tile_bytes = workspace_bytes - longest * space.stash_row_bytes
    return Plan(
        route, groups, chunk, workspace_bytes, accumulators, tile_bytes, grad_tile_bytes, in_place,
        space.mixed_rows,
    )  # fmt: skip


def _groups(bounds: list[int], firsts: Sequence[int] | None, capacity: int) -> tuple[Group, ...]:
    """Consecutive examples of at most ``capacity`` rows; longer ones alone, split by sequence."""
    if firsts is None and len(bounds) > 2:
        firsts = range(0, len(bounds), 2)
    if firsts is None:
        return (Group((0, 0), tuple(even_blocks(0, bounds[-1], capacity)), unit=False),)
    groups: list[Group] = []
    first = 0

    def close(stop: int) -> None:
        if stop > first:
            span = (bounds[firsts[first]], bounds[firsts[stop]])
            groups.append(Group((first, stop), (span,), unit=False))

    for example, (s0, s1) in enumerate(pairwise(firsts)):
        if bounds[s1] - bounds[s0] > capacity:
            close(example)
            parts = pairwise(bounds[s0 : s1 + 1])
            spans = [block for part in parts for block in even_blocks(*part, capacity)]
            groups.append(Group((example, example + 1), tuple(spans), unit=s1 - s0 <= 2))
            first = example + 1
        elif bounds[s1] - bounds[firsts[first]] > capacity:
            close(example)
            first = example
    close(len(firsts) - 1)
    return tuple(groups)


def even_blocks(start: int, stop: int, capacity: int) -> list[tuple[int, int]]:
    count = max(1, -(-(stop - start) // capacity))
    edges = [start + (stop - start) * i // count for i in range(count + 1)]
    return list(pairwise(edges))
