"""Sequence parallel: one long packed row on several processes, by DeepSpeed-Ulysses' exchange.

A packed row is split into as many equal chunks of tokens as the group has processes, the last
filled up with tokens that nothing sees.  Each process runs the model's body on its chunk.  Only
attention needs the other tokens: around it, an all-to-all gives each process all tokens of its
share of the heads, and another one brings its own tokens back with all heads (arXiv 2309.14509).
The head runs on the scored tokens of the chunk, and the loss adds their sums up over the group
before its formula (`fastdpo.loss.spread`).  So a process holds 1 / size of the activations, and
never all tokens of all heads.

    group = torch.distributed.new_group(ranks)           # or one dimension of a device mesh
    sequence_parallel.use(model, group)                  # before prepare_model, which proves it
    model = prepare_model(model, gradient_checkpointing=True)
    result = packed_loss(model, batch, ref_logp_S, beta=0.1, num_pairs=pairs / world)
    result.loss.backward()                               # the gradient of this process's tokens

All processes of a group get the same batch and have the same result.  Gradients are to be summed
over the group: as DDP and FSDP2 average over all processes, ``num_pairs`` is the step's pairs over
all processes, those of the groups included.
"""

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastdpo.data.batch import PackedPairs
from fastdpo.errors import ModelError
from fastdpo.loss.checks import IGNORE
from fastdpo.model import head


@dataclass(frozen=True)
class SequenceParallel:
    """A group of processes that have a packed row's tokens among them, as one of them sees it."""

    group: Any  # torch.distributed's process group
    size: int
    rank: int  # in the group

    def __deepcopy__(self, _: Any) -> "SequenceParallel":
        """A copy of a model has the same group."""
        return self


@dataclass(frozen=True)
class Chunk:
    """This process's part of a packed row: what the layers of a batch that was split ask."""

    parallel: SequenceParallel
    size: int  # tokens that each process has
    length: int  # tokens of the row, those that fill it up left out
    index_N: Tensor  # which of the row's targets this process has
    num_targets: int  # of the row
    positions_BT: Tensor  # of the row filled up

    def to(self, device: torch.device | str) -> "Chunk":
        """With its tensors there."""
        return replace(
            self, index_N=self.index_N.to(device), positions_BT=self.positions_BT.to(device)
        )

    @property
    def tokens(self) -> slice:
        """This process's, of the row filled up."""
        start = self.parallel.rank * self.size
        return slice(start, start + self.size)

    def to_heads(self, q_THd: Tensor, k_THd: Tensor, v_THd: Tensor) -> list[Tensor]:
        """All tokens of the process's heads, from its tokens of all heads; one exchange.

        Heads of keys are repeated where there are too few, so that each process gets those that its
        heads of queries read.
        """
        P, H, groups = self.parallel.size, q_THd.shape[1], k_THd.shape[1]
        if H % P:
            raise ValueError(_indivisible("the model", H, P))
        repeats = P // gcd(groups, P)
        if repeats > 1:
            k_THd, v_THd = (x.repeat_interleave(repeats, 1) for x in (k_THd, v_THd))
        heads = [x.unflatten(1, (P, -1)) for x in (q_THd, k_THd, v_THd)]  # (T, P, heads, d)
        rows_PTX = torch.cat([x.flatten(2) for x in heads], 2).transpose(0, 1)
        rows_TX = self._exchange(rows_PTX).flatten(0, 1)[: self.length]
        parts = rows_TX.split([x.shape[2] * x.shape[3] for x in heads], 1)
        return [part.unflatten(1, x.shape[2:]) for part, x in zip(parts, heads)]

    def to_tokens(self, out_THd: Tensor) -> Tensor:
        """The process's tokens of all heads again, zeros where the row was filled up."""
        P, (T, heads, d) = self.parallel.size, out_THd.shape
        rows_TX = F.pad(out_THd.flatten(1), (0, 0, 0, P * self.size - T))
        rows_PTX = self._exchange(rows_TX.unflatten(0, (P, self.size)))
        return rows_PTX.transpose(0, 1).reshape(self.size, P * heads, d)

    def rows(self, x_TX: Tensor) -> Tensor:
        """Rows of the whole row's tokens, from those of each process's; differentiable.

        All processes have to use them for the same: each gets the derivative by its own rows.
        """
        return _Gather.apply(x_TX, self.parallel)[: self.length]  # type: ignore[index]

    def targets(self, x_N: Tensor) -> Tensor:
        """Numbers of all targets, from those of each process's; without a gradient."""
        whole_N = x_N.new_zeros(self.num_targets)
        whole_N.index_copy_(0, self.index_N, x_N.detach()[: len(self.index_N)])
        dist.all_reduce(whole_N, group=self.parallel.group)
        return whole_N

    def _exchange(self, x_PX: Tensor) -> Tensor:
        return _Exchange.apply(x_PX, self.parallel.group)  # type: ignore[return-value]


class _Exchange(torch.autograd.Function):
    """Part p goes to process p, and from there comes part p: its own transpose."""

    @staticmethod
    def forward(ctx: Any, x_PX: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out_PX = torch.empty_like(x_PX, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out_PX, x_PX.contiguous(), group=group)
        return out_PX

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grads[0], ctx.group), None  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    """The rows of all processes, one after the other; back go those that were this one's."""

    @staticmethod
    def forward(ctx: Any, x_TX: Tensor, parallel: SequenceParallel) -> Tensor:
        ctx.rows = slice(parallel.rank * len(x_TX), (parallel.rank + 1) * len(x_TX))
        parts = [torch.empty_like(x_TX) for _ in range(parallel.size)]
        dist.all_gather(parts, x_TX.contiguous(), group=parallel.group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][ctx.rows], None


# ---------------------------------------------------------------------------------------- the model
def use(model: nn.Module, group: Any) -> None:
    """Let a model share each packed row with the other processes of ``group``.

    Args:
        model: a transformers causal LM, or a PEFT model of one; `prepare_model` comes after this.
        group: torch.distributed's process group; None for a model that has whole rows again.

    Raises:
        ModelError: the heads of its attention can't be shared evenly.
        ValueError: this process is not in the group.
    """
    base = head.base_of(model)
    if group is None:
        base._fastdpo_parallel = None
        return
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: this process is not in it; pass the group that it is in")
    heads = getattr(base.config.get_text_config(), "num_attention_heads", None)
    if isinstance(heads, int) and heads % size:
        raise ModelError(_indivisible(type(base).__name__, heads, size))
    base._fastdpo_parallel = SequenceParallel(group, size, rank)


def _indivisible(name: str, heads: int, size: int) -> str:
    fit = [n for n in range(2, heads + 1) if heads % n == 0]
    return (
        f"sp_size={size}: {name} has {heads} attention heads, which so many processes can't share "
        f"evenly; sizes that can: {', '.join(map(str, fit)) or 'none'}"
    )


def padded(parallel: SequenceParallel) -> str:
    """Why a layout that pads is refused."""
    return (
        f"sequence parallel (sp_size={parallel.size}) splits packed rows, and padded batches have "
        "none; use sp_size=1, or a model and layout that pack"
    )


def of(model: Any) -> SequenceParallel | None:
    """The group that a model shares its rows with; ``model`` may be wrapped by DDP."""
    model = getattr(model, "module", model)
    return getattr(head.base_of(model), "_fastdpo_parallel", None)


def chunk(model: Any, batch: PackedPairs) -> PackedPairs:
    """The process's part of a batch: its tokens, the targets that they predict, whole segments.

    ``batch`` itself where the model has whole rows, and where it was split before.  On a GPU it
    waits for the device once.

    Raises:
        ValueError: the batch is padded.
    """
    parallel, segments = of(model), batch.segments
    if parallel is None or batch.chunk is not None:
        return batch
    if segments is None or batch.position_ids_BT is None:
        raise ValueError(padded(parallel))
    device, T = batch.target_N.device, batch.num_tokens
    size = -(-T // parallel.size)
    row_N = batch.rows_N.cpu() - parallel.rank * size
    mine_N = (row_N >= 0) & (row_N < size)
    index_N = mine_N.nonzero()[:, 0]
    rows_N = row_N[index_N]
    bounds_S1 = F.pad(mine_N.cumsum(0), (1, 0))[batch.bounds_S1]
    index_N = index_N.to(device)
    target_N = batch.target_N[index_N]
    if not len(rows_N):  # the loss wants a target; this one is ignored
        rows_N, target_N = torch.zeros(1, dtype=torch.long), target_N.new_full((1,), IGNORE)
        bounds_S1[1:] += 1

    def filled(x_BT: Tensor) -> Tensor:
        return F.pad(x_BT, (0, size * parallel.size - T))

    positions_BT = filled(batch.position_ids_BT)
    part = Chunk(parallel, size, T, index_N, len(batch.target_N), positions_BT)
    return replace(
        batch,
        input_ids_BT=filled(batch.input_ids_BT)[:, part.tokens],
        position_ids_BT=positions_BT[:, part.tokens],
        segments=replace(segments, chunk=part),
        rows_N=rows_N.to(device),
        target_N=target_N,
        bounds_S1=bounds_S1,
    )
