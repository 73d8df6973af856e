"""FSDP2: each process holds a part of every weight, gradient and optimizer state.

torch's ``fully_shard``, as `fastdpo.model.shard` calls it, gathers a layer's weights before it runs
and lets go of them after.  Gradients are summed and divided after each micro-batch, so no process
ever has all of them.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastdpo.errors import ConfigError
from fastdpo.model import head, sequence_parallel
from fastdpo.model.adapters import save_adapter
from fastdpo.model.load import save_policy, weights_digest
from fastdpo.model.merge import save_merged, save_merged_in_place
from fastdpo.model.shard import reshard, shard
from fastdpo.train import stored
from fastdpo.train.config import TrainConfig
from fastdpo.train.engine import Engine, mesh_of
from fastdpo.train.logps import ROUNDED
from fastdpo.train.prepare import load_start, prepare_policy, start_in_pieces
from fastdpo.train.together import of_first, together


class Fsdp2(Engine):
    """A part of the model on each process.

    Args:
        sharding: how it is sharded (`fastdpo.train.launch.Sharding`).

    Raises:
        ConfigError: the processes cannot be divided so, or a weight in 4 bits cannot be sharded.
    """

    name = "fsdp2"
    collective = True
    head_in_root = False  # a unit of its own

    def __init__(self, accelerator: Any, config: TrainConfig, sharding: Any) -> None:
        super().__init__(accelerator, config)
        self._twin: Any = None
        if config.bf16 and config.dtype != "bfloat16":
            self.rounding = f"{ROUNDED}bfloat16"  # the weights of layers, as they are gathered
        self.sharding, replicas = sharding, sharding.replicas
        if self.world == 1 and not torch.distributed.is_initialized():
            raise ConfigError(
                "engine=fsdp2 shards a model over processes, and there is one; launch several "
                "with accelerate launch or torchrun, or leave engine out"
            )
        if self.world % replicas or (self.world // replicas) % config.sp_size:
            raise ConfigError(
                f"dp_replicate_size={replicas} does not divide the {self.world} processes into "
                f"groups of whole sp_size={config.sp_size}; give sizes whose product divides them"
            )
        if config.load_in_4bit:
            raise ConfigError(
                "load_in_4bit=True cannot be sharded by engine=fsdp2: weights in 4 bits are "
                "packed with their constants; leave it out, or use engine=ddp"
            )
        kind = accelerator.device.type
        if replicas == 1:
            self.mesh = mesh_of(kind, (self.world,), ("dp_shard",))
        else:
            sizes = replicas, self.world // replicas
            self.mesh = mesh_of(kind, sizes, ("dp_replicate", "dp_shard"))

    def load(self, start: Any, config: TrainConfig, *, digest: bool) -> tuple[nn.Module, str]:
        named = isinstance(start, str | Path)
        if not (named or config.precompute_ref_log_probs or config.use_peft):
            self._twin = copy.deepcopy(start.to("cpu"))  # a sharded one can't be copied
        return self._sharded(start, config, digest=digest)

    def _sharded(self, start: Any, config: TrainConfig, *, digest: bool) -> tuple[nn.Module, str]:
        pieces, weights = None, ""
        if isinstance(start, str | Path):
            model, pieces = start_in_pieces(str(start), config)
        else:
            model = load_start(start, config, torch.device("cpu"))
        offload = self.sharding.offload_params

        def place(model: Any) -> None:
            nonlocal weights
            head.attach(model)
            shard(
                model,
                self.mesh,
                bf16=config.bf16,
                reshard_after_forward=self.sharding.reshard_after_forward,
                offload_params=offload,
                head_in_root=self.head_in_root,
                layer_names=self.sharding.layer_names,
            )
            if pieces is not None:
                if pieces.needs_whole:
                    of_first(self, pieces.load_whole)
                device = torch.device("cpu") if offload else self.accelerator.device
                together(self.accelerator, partial(pieces.fill, device))
            if digest:
                weights = weights_digest(model)

        sequence_parallel.use(model, self.sp)
        model = prepare_policy(model, config, place=place)
        reshard(model)  # an optimizer made of gathered weights would train none
        return model, weights

    def frozen_copy(self, model: nn.Module, start: Any, config: TrainConfig) -> nn.Module:
        twin, self._twin = self._twin, None
        found, _ = self._sharded(start if twin is None else twin, config, digest=False)
        return found.requires_grad_(False).eval()

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        if any(not isinstance(p, DTensor) for x in optimizer.param_groups for p in x["params"]):
            raise AssertionError("the optimizer was made of gathered weights")
        return model, optimizer

    def plain(self, model: nn.Module) -> Any:
        return model

    def release(self, model: nn.Module) -> None:
        reshard(model)

    def accumulates(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        loss.backward()

    def clip(self, model: nn.Module, most: float) -> float:
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
        return float(norm.full_tensor())

    def write_state(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> list[Path]:
        reshard(model)  # an evaluation may have left weights gathered
        return stored.write_parts(folder, model, optimizer, self.rank)

    def read_state(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> None:
        reshard(model)
        super().read_state(folder, model, optimizer)

    def save_policy(
        self, model: nn.Module, start: Any, config: TrainConfig, tokenizer: Any, out: Path
    ) -> None:
        named, adapter, policy = isinstance(start, str | Path), out / "adapter", out / "policy"
        name = str(start if named else start.name_or_path)

        def write() -> None:
            if not config.use_peft:
                save_policy(model, tokenizer, policy, start=name)
            elif not named:
                save_merged_in_place(model, tokenizer, policy, torch.float32, start=name)
            elif self.is_main:  # of the files alone, so it exchanges nothing
                save_merged(name, adapter, tokenizer, policy, torch.float32)

        if config.use_peft:
            together(self.accelerator, lambda: save_adapter(model, adapter, tokenizer))
        together(self.accelerator, write)
