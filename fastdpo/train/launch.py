"""Which engine a run was started with: by an option, or by accelerate's launch.

accelerate says in the environment of a process how it was launched.  It enters FSDP on GPUs only,
so its settings are read here, and the same code runs on the processes of a CPU.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from fastdpo.errors import ConfigError
from fastdpo.model.devices import without
from fastdpo.train.config import TrainConfig
from fastdpo.train.deepspeed import DeepSpeed, launch_settings, require_deepspeed
from fastdpo.train.engine import Engine, groups

_PARALLEL = "PARALLELISM_CONFIG_"  # accelerate's, in the environment
# How long a process waits for the others; the first one may write a large model meanwhile.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 shards a model, by the options or by accelerate's configuration.

    Attributes:
        replicas: groups of processes that each hold the model once.
        reshard_after_forward: let go of a layer's weights after its forward.
        offload_params: keep parameters, gradients and optimizer in CPU memory.
        layer_names: classes whose modules are units; None is what transformers names.
    """

    replicas: int
    reshard_after_forward: bool
    offload_params: bool
    layer_names: tuple[str, ...] | None


def joined(*, offload_params: bool = False) -> Any:
    """accelerate's view of the processes of a launch, which join each other here.

    Args:
        offload_params: what FSDP2 keeps in CPU memory is summed and gathered there.

    Raises:
        ConfigError: they cannot, and each would train alone.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import parse_flag_from_env

    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    # torchrun says nothing of CPUs, and accelerate would leave each process alone there.
    on_cpu = wanted > 1 and not torch.accelerator.is_available()
    on_cpu = on_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    waits = InitProcessGroupKwargs(timeout=_PATIENCE)
    # A process that no launcher started joins none.
    on_gpus = "LOCAL_RANK" in os.environ and torch.cuda.is_available() and not on_cpu
    if on_gpus and offload_params:
        waits = InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo", timeout=_PATIENCE)
    # accelerate takes sizes of parallelism on GPUs only; `_sharding` reads them anyway.
    with without("ACCELERATE_USE_PARALLELISM_CONFIG") if on_cpu else nullcontext():
        accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[waits])
    if accelerator.num_processes != wanted:
        raise ConfigError(
            f"{wanted} processes were launched, and accelerate joined {accelerator.num_processes} "
            "of them; launch with accelerate launch, or one process"
        )
    return accelerator


def launched(config: TrainConfig) -> Engine:
    """The engine of these options, in the processes as they were launched.

    Raises:
        ConfigError: the launch asks for what training does not do, or the two differ.
    """
    engine = _launched(config)
    for group in groups():  # a mesh makes them with torch's own, shorter limit
        torch.distributed.distributed_c10d._set_pg_timeout(_PATIENCE, group)
    return engine


def _launched(config: TrainConfig) -> Engine:
    from accelerate.utils import DistributedType

    asked = _asked_for()
    if "deepspeed" in (asked, config.engine):
        require_deepspeed()
    # Its precision belongs to the process, so autocast is entered in `batch_loss` instead.
    accelerator = joined(offload_params=config.offload_params)
    if accelerator.mixed_precision != "no":
        raise ConfigError(
            f"accelerate's mixed_precision is {accelerator.mixed_precision!r}; set it to 'no', the "
            "option bf16 says what is computed in bf16"
        )
    accelerator.gradient_accumulation_steps = 1  # micro-batches are accumulated in take_step
    if config.engine not in ("auto", asked or config.engine):
        raise ConfigError(
            f"engine={config.engine}, but accelerate is configured for {asked}; leave engine out, "
            "or launch with another configuration"
        )
    name = config.engine if config.engine != "auto" else asked or "ddp"
    if name != "fsdp2":
        refuse_sharding(config, name)
    if name == "deepspeed":
        return DeepSpeed(accelerator, config, launch_settings(accelerator))
    if name == "fsdp2":
        from fastdpo.train.fsdp import Fsdp2

        return Fsdp2(accelerator, config, _sharding(accelerator, config))
    plain = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if accelerator.distributed_type not in plain:
        raise ConfigError(
            f"accelerate is set to {accelerator.distributed_type.value}, which training does not "
            "run on; launch with --multi_gpu, --use_fsdp --fsdp_version 2, --use_deepspeed, --cpu "
            "or one process"
        )
    return Engine(accelerator, config)


def _asked_for() -> str | None:
    """The engine that accelerate was configured for, if it was for one."""
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "deepspeed"
    return "fsdp2" if parse_flag_from_env("ACCELERATE_USE_FSDP") else None


def refuse_sharding(config: TrainConfig, name: str) -> None:
    """Refuse options of FSDP2 where it is not the engine."""
    for option in ("dp_replicate_size", "offload_params", "reshard_after_forward"):
        value, default = getattr(config, option), getattr(type(config), option)
        if value != default:
            raise ConfigError(
                f"{option}={value} has no effect with engine={name}; set engine=fsdp2, or leave "
                f"{option} out"
            )


def _sharding(accelerator: Any, config: TrainConfig) -> Sharding:
    """What FSDP2 gets of the options, and of accelerate's plugin where that was configured.

    Raises:
        ConfigError: the two differ, or the plugin asks for what FSDP2 is not given here.
    """
    own = Sharding(
        config.dp_replicate_size, config.reshard_after_forward, config.offload_params, None
    )
    if _asked_for() != "fsdp2":
        return own
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    plugin = plugin or FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ConfigError("accelerate is set to FSDP 1; set fsdp_version: 2, which replaces it")
    wrap, names = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    if getattr(wrap, "func", wrap) not in (None, transformer_auto_wrap_policy):
        raise ConfigError(
            "accelerate's fsdp_auto_wrap_policy is SIZE_BASED_WRAP; give TRANSFORMER_BASED_WRAP, "
            "or NO_WRAP: the units are the model's layers"
        )
    if plugin.activation_checkpointing and not config.gradient_checkpointing:
        raise ConfigError(
            "accelerate's fsdp_activation_checkpointing is true and gradient_checkpointing=false; "
            "leave the first out, the option says it"
        )
    for name in ("ignored_modules", "mixed_precision_policy", "activation_checkpointing_offload"):
        if getattr(plugin, name, None):
            raise ConfigError(f"accelerate's fsdp {name} is not taken here; leave it out")
    if plugin.state_dict_type.name != "SHARDED_STATE_DICT":
        raise ConfigError(
            f"accelerate's fsdp_state_dict_type is {plugin.state_dict_type.name}; leave it out: "
            "checkpoints are sharded, and the policy is whole"
        )
    sizes = {
        name: int(os.environ.get(f"{_PARALLEL}{name.upper()}_SIZE") or 1)
        for name in ("dp_replicate", "tp", "cp", "sp")
    }
    for name in ("tp", "cp"):
        if sizes[name] > 1:
            raise ConfigError(
                f"accelerate's {name}_size is {sizes[name]}, which training does not do; long "
                "pairs are split by sp_size"
            )
    offload = isinstance(plugin.cpu_offload, CPUOffloadPolicy) or plugin.cpu_offload is True
    _check_same(config, "sp_size", sizes["sp"], config.sp_size)
    return Sharding(
        _either(config, "dp_replicate_size", sizes["dp_replicate"]),
        _either(config, "reshard_after_forward", bool(plugin.reshard_after_forward)),
        _either(config, "offload_params", offload),
        tuple(names) if names else None,
    )


def _either(config: TrainConfig, name: str, configured: Any) -> Any:
    """The value that is not the default; refuses two."""
    default, own = getattr(type(config), name), getattr(config, name)
    if configured == default:
        return own
    if own != default:
        _check_same(config, name, configured, own)
    return configured


def _check_same(config: TrainConfig, name: str, configured: Any, own: Any) -> None:
    if configured not in (own, 1 if name.endswith("_size") else own):
        raise ConfigError(
            f"{name}={own}, but accelerate is configured for {configured}; give both the same"
        )
