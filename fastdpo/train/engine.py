"""How the processes of a run hold the model between them, and what that makes of a step.

`Engine` is the plain way: each process has a whole model, and accelerate's DDP averages their
gradients.  `fastdpo.train.fsdp` and `fastdpo.train.deepspeed` shard the model; `launch` finds
which of them a run was started with.  With ``sp_size`` over 1 as many processes in a row take the
same examples, and each of them a part of every sequence's tokens.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastdpo.errors import ConfigError
from fastdpo.model import sequence_parallel
from fastdpo.model.adapters import merged, merged_in_place, save_adapter
from fastdpo.model.devices import keep_buffers
from fastdpo.model.load import save_policy, weights_digest
from fastdpo.train import stored
from fastdpo.train.config import TrainConfig
from fastdpo.train.prepare import load_start, prepare_policy, start_in_pieces
from fastdpo.train.together import of_first, together

# By the group of all processes, with which they end: none of their groups is ever let go of before.
_meshes: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def mesh_of(kind: str, sizes: tuple[int, ...], names: tuple[str, ...]) -> Any:
    """All processes as a device mesh, the same one whenever it is asked for."""
    from torch.distributed.device_mesh import init_device_mesh

    known = _meshes.setdefault(torch.distributed.group.WORLD, {})
    if (kind, sizes, names) not in known:
        known[kind, sizes, names] = init_device_mesh(kind, sizes, mesh_dim_names=names)
    return known[kind, sizes, names]


def groups() -> Iterator[Any]:
    """The process groups of all meshes."""
    if torch.distributed.is_initialized():
        for mesh in _meshes.get(torch.distributed.group.WORLD, {}).values():
            yield from mesh.get_all_groups()


class Engine:
    """Each process holds a whole model.

    Attributes:
        name: as in the option ``engine``.
        collective: whether every forward is an exchange between all processes, so that each of
            them has to run as many as the others.
        rounding: what this engine does to weights before it computes log-probs with them; "" is
            nothing, as one process.
        world, rank: all processes, and the number of this one.
        dp_size, dp_rank: those that take examples of their own, and which of them this one is.
        sp: process group that splits the tokens of this process's examples; None is one alone.
    """

    name = "ddp"
    collective = False
    rounding = ""

    def __init__(self, accelerator: Any, config: TrainConfig) -> None:
        self.accelerator, self.config = accelerator, config
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        size = config.sp_size
        if self.world % size:
            raise ConfigError(
                f"sp_size={size} does not divide the {self.world} processes; launch a multiple of "
                f"{size}, or give another sp_size"
            )
        self.dp_size, self.dp_rank = self.world // size, self.rank // size
        self.sp: Any = None
        if size > 1:
            mesh = mesh_of(accelerator.device.type, (self.dp_size, size), ("dp", "sp"))
            self.sp = mesh["sp"].get_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, which writes files and talks."""
        return self.accelerator.is_main_process

    @property
    def counts(self) -> bool:
        """Whether this process's examples are not those of another one that counts them."""
        return self.rank % self.config.sp_size == 0

    # ------------------------------------------------------------------------------- the model
    def load(self, start: Any, config: TrainConfig, *, digest: bool) -> tuple[nn.Module, str]:
        """The model that training starts from, or a reference, with all that the options patch.

        Args:
            start: folder, hub name, or a transformers model in memory.
            config: options; those of the reference differ from the policy's.
            digest: whether the second value is wanted.

        Returns:
            The model on its device, and the digest of its weights before there were adapters ("" on
            all but the first process).
        """
        device, weights, pieces = self.accelerator.device, "", None
        if self.world > 1 and isinstance(start, str | Path) and not config.load_in_4bit:
            # A tensor at a time: together the processes have no memory for as many models.
            model, pieces = start_in_pieces(str(start), config)
        else:
            model = load_start(start, config, device)

        def place(model: Any) -> None:
            nonlocal weights
            if pieces is not None:
                together(self.accelerator, partial(pieces.fill, device))
                model.to(device)
            if digest and self.is_main:
                weights = weights_digest(model)

        sequence_parallel.use(model, self.sp)
        return prepare_policy(model, config, place=place), weights

    def frozen_copy(self, model: nn.Module, start: Any, config: TrainConfig) -> nn.Module:
        """The start once more, without gradients, as the reference of each step."""
        return copy.deepcopy(model).requires_grad_(False).eval()

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model as it is trained: its backward averages gradients over all processes."""
        keep_buffers(model)
        return self.accelerator.prepare(model), optimizer

    def plain(self, model: nn.Module) -> Any:
        """The model without what `prepare` put around it."""
        return self.accelerator.unwrap_model(model)

    def release(self, model: nn.Module) -> None:
        """Let go of what the forward of a model that has no backward left gathered."""

    def close(self) -> None:
        """Called when training has ended, however it did."""

    # -------------------------------------------------------------------------------- the step
    def accumulates(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch that is not the last of its step."""
        return self.accelerator.no_sync(model)

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, model: nn.Module, most: float) -> float:
        """Scale all gradients so that their norm is at most ``most``; returns what it was."""
        return float(torch.nn.utils.clip_grad_norm_(model.parameters(), most))

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Change the weights, and let go of the gradients."""
        optimizer.step()
        optimizer.zero_grad()

    # ------------------------------------------------------------------------ between processes
    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes that take examples of their own, on all of them."""
        if not self.counts:
            values = torch.zeros_like(values)
        return self.accelerator.reduce(values, "sum")

    def most(self, count: int) -> int:
        """The largest count of any process."""
        counts = torch.tensor([count], device=self.accelerator.device)
        return int(self.accelerator.gather(counts).max())

    def gather(self, found: list[Any]) -> list[Any]:
        """All processes' findings, one list after the other, each example's once."""
        from accelerate.utils import gather_object

        return gather_object(found if self.counts else [])

    def gather_first(self, found: list[Any]) -> list[Any]:
        """As `gather` on the first process; nothing on the others, which need no memory for it."""
        found = found if self.counts else []
        if self.world == 1:
            return found
        parts: list[Any] | None = [None] * self.world if self.is_main else None
        torch.distributed.gather_object(found, parts)
        return list(chain.from_iterable(parts or []))

    def forwards(
        self, batches: Sequence[list[int]], filler: list[int], *, least: int = 0
    ) -> Iterator[tuple[list[int], bool]]:
        """Micro-batches, and whether each is one: fillers count for nothing.

        Where forwards are `collective` there are as many as on any other process, and ``least``
        wherever.
        """
        count = max(len(batches), least)
        if self.collective:
            count = self.most(count)
        for i in range(count):
            yield (batches[i], True) if i < len(batches) else (filler, False)

    # --------------------------------------------------------------------------------- on disk
    def write_state(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> list[Path]:
        """Write what is trained, with the optimizer's and the random state, as a checkpoint has it.

        All processes call it (`fastdpo.train.checkpoint`), and whoever reads them later may be
        others.  Exchanges in it have to fail on all processes alike.

        Args:
            folder: there and empty, the same on all processes.
            optimizer: None leaves its state and the random state out.

        Returns:
            The files that this process wrote.
        """
        return stored.write_whole(folder, model, optimizer) if self.is_main else []

    def read_state(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> None:
        """Put what `write_state` left into model and optimizer, of whatever engine can be.

        Raises:
            ModelError: it is of other tensors.
            ConfigError: this engine cannot read it, or not on so many processes.
        """
        stored.read(self, folder, model, optimizer)

    def save_policy(
        self, model: nn.Module, start: Any, config: TrainConfig, tokenizer: Any, out: Path
    ) -> None:
        """Leave ``out/policy``, a whole model; adapters are merged in fp32 and kept beside it.

        All processes call it.  Merged in bf16, most of a small change would be rounded away.
        """
        named, adapter = isinstance(start, str | Path), out / "adapter"
        name = str(start if named else start.name_or_path)

        def save() -> None:
            policy: Any = model
            if config.use_peft:
                save_adapter(model, adapter, tokenizer)
                # Neither way needs room for an fp32 model on the device.
                if named:
                    policy = merged(str(start), adapter, torch.float32)
                else:
                    policy = merged_in_place(model.cpu(), torch.float32)
            save_policy(policy, tokenizer, out / "policy", start=name)

        of_first(self, save)
