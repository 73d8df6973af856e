"""The processes of a training step, one of which stands for all and exchanges nothing.

torch's fake process group has any number of processes, and its collectives leave every tensor as
it was.  Over it run the engines that train, `fastdpo.train.fsdp` and sequence parallel, so the
memory of a process and what it sends are those of the real step.  DeepSpeed's code does not run
so.  ZeRO-3 is run as FSDP2, which gathers and reduces the same, in fp32; ZeRO-2 as a process with a
whole model, whose gradients and optimizer are sharded by arithmetic (`fastdpo.plan.step`).
"""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from fastdpo.errors import ConfigError
from fastdpo.model import head, sequence_parallel
from fastdpo.model.shard import shard
from fastdpo.train.config import TrainConfig
from fastdpo.train.engine import Engine
from fastdpo.train.fsdp import Fsdp2
from fastdpo.train.launch import Sharding, refuse_sharding


class Cluster:
    """GPUs that train together, as one of their processes sees it; a context.

    That is the first of them, or, where tokens are split, the last of the first group: the first
    has the prompt, which the head has nothing to do with.

    Args:
        config: the options, of which ``engine``, ``dp_replicate_size``, ``sp_size``,
            ``offload_params`` and ``reshard_after_forward`` are read; "auto" is ddp.
        gpus: how many.
        zero_stage: of DeepSpeed, 2 or 3.

    Attributes:
        name: of the engine, with the stage: ddp, fsdp2, zero2 or zero3.

    Raises:
        ConfigError: so many cannot be divided as the options say.
    """

    def __init__(self, config: TrainConfig, gpus: int, zero_stage: int = 3) -> None:
        if type(gpus) is not int or gpus < 1:
            raise ConfigError(f"gpus={gpus!r} must be a whole number of at least 1")
        self.config, self.gpus = config, gpus
        if zero_stage not in (2, 3):
            raise ConfigError(f"zero_stage={zero_stage!r} must be 2 or 3")
        named = {"auto": "ddp", "deepspeed": f"zero{zero_stage}"}
        self.name = named.get(config.engine, config.engine)
        if self.name != "fsdp2":
            refuse_sharding(config, self.name)
        if self.name != "ddp" and gpus == 1:
            raise ConfigError(
                f"engine={config.engine} shards a model over GPUs, and gpus=1; give gpus, as "
                "--gpus 8, or leave engine out"
            )
        if gpus > 1 and dist.is_initialized():
            raise ConfigError("a plan is made by one process; start it without a launcher")

    def __enter__(self) -> "Cluster":
        with ExitStack() as stack:
            if self.gpus > 1:
                _stand_for(self.gpus, self._rank)
                stack.callback(dist.destroy_process_group)
            self.engine = self._engine()
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()

    @property
    def groups(self) -> int:
        """Groups of processes that one is in and exchanges tensors with."""
        if self.gpus == 1:
            return 0
        copies = 2 if self.name == "fsdp2" and self.config.dp_replicate_size > 1 else 0
        return 1 + copies + (self.config.sp_size > 1)

    @property
    def _rank(self) -> int:
        return min(self.config.sp_size, self.gpus) - 1

    def _engine(self) -> Engine:
        config = self.config
        accelerator = SimpleNamespace(
            num_processes=self.gpus, process_index=self._rank, device=torch.device("cpu")
        )
        if self.name not in ("fsdp2", "zero3"):
            return Engine(accelerator, config)
        # What is offloaded is taken off what was counted, as all tensors here are on the CPU.
        sharding = Sharding(config.dp_replicate_size, config.reshard_after_forward, False, None)
        return Fsdp2(accelerator, config, sharding)

    def place(self, model: Any) -> None:
        """Shard a model over the processes, as its engine does."""
        engine = self.engine
        if engine.sp is not None:
            sequence_parallel.use(model, engine.sp)
        if isinstance(engine, Fsdp2):
            head.attach(model)
            shard(
                model, engine.mesh, bf16=self.config.bf16 and self.name == "fsdp2",
                reshard_after_forward=self.config.reshard_after_forward,
            )  # fmt: skip


def _stand_for(gpus: int, rank: int) -> None:
    """Make a process group of so many processes, of which this is the only one that there is."""
    # Before torch 2.11 this import alone lets collectives take tensors without content.
    import torch.distributed._tools.fake_collectives  # noqa: F401
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=gpus, store=FakeStore())
