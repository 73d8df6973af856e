"""DeepSpeed's ZeRO: each process holds a part of the optimizer and of the gradients (stage 2), and
of the weights too (stage 3).

How is said by accelerate's plugin, as its launch configures it.  accelerate itself does not enter
DeepSpeed on the processes of a CPU, so ``deepspeed.initialize`` is called here, for these and for
GPUs alike.  Master weights are the model's own, in fp32; `bf16` is the autocast of one process.
"""

import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.errors import ConfigError
from fastdpo.model import head, sequence_parallel
from fastdpo.model.adapters import save_adapter
from fastdpo.model.load import weights_digest
from fastdpo.model.merge import save_merged
from fastdpo.model.save import save_made
from fastdpo.model.tiling import dense_mlps
from fastdpo.train.config import TrainConfig
from fastdpo.train.engine import Engine
from fastdpo.train.prepare import load_start, prepare_policy, start_in_pieces
from fastdpo.train.together import together
from fastdpo.train.zero_parts import read_parts, write_parts

_STAGES = (2, 3)
# What a configuration may have: DeepSpeed's buckets and places, which change no result.
_TAKEN = {
    "zero_optimization", "wall_clock_breakdown", "steps_per_print", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}  # fmt: skip
_TAKEN_OF_ZERO = {
    "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size",
    "overlap_comm", "offload_param", "offload_optimizer", "sub_group_size",
    "round_robin_gradients", "memory_efficient_linear", "ignore_unused_parameters",
    "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save", "stage3_module_granularity_threshold",
}  # fmt: skip
_AUTO = (None, "auto")
# What "auto" stands for in accelerate and transformers, by the hidden size.
_BY_SIZE = {
    "reduce_bucket_size": lambda D: D * D,
    "stage3_prefetch_bucket_size": lambda D: int(0.9 * D * D),
    "stage3_param_persistence_threshold": lambda D: 10 * D,
}


def _library() -> Any:
    return importlib.import_module("deepspeed")  # this module has its name


def _part(name: str) -> Any:
    return importlib.import_module(f"deepspeed.runtime.{name}")


def require_deepspeed() -> None:
    """Raise `ConfigError` where the package is missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "engine=deepspeed needs the deepspeed package: pip install 'fastdpo[deepspeed]'"
        )


def launch_settings(accelerator: Any) -> dict[str, Any]:
    """The DeepSpeed configuration of accelerate's launch, with "auto" where it leaves it open.

    Raises:
        ConfigError: there is none.
    """
    from accelerate.utils import DeepSpeedPlugin, parse_flag_from_env

    plugin, moe = accelerator.state.deepspeed_plugin, "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"
    if plugin is None:  # accelerate enters DeepSpeed on GPUs only
        if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            raise ConfigError(
                "engine=deepspeed needs accelerate's settings of DeepSpeed; launch with accelerate "
                "launch --use_deepspeed --zero_stage 3, or with a --config_file that has them"
            )
        plugin = DeepSpeedPlugin()
    if plugin.transformer_moe_cls_names or os.environ.get(moe):
        raise ConfigError(
            "accelerate's deepspeed_moe_layer_cls_names is not taken here; leave it out: "
            "transformers 5 keeps the experts of a layer in one module"
        )
    return dict(plugin.deepspeed_config)


def checked_settings(settings: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """A DeepSpeed configuration without what options of training say.

    Raises:
        ConfigError: it says something else than they do, or asks for what is not done here.
    """
    said = {
        "train_batch_size": ("batch_size", config.batch_size),
        "gradient_clipping": ("max_grad_norm", config.max_grad_norm),
        "gradient_accumulation_steps": ("", 1),
        "train_micro_batch_size_per_gpu": ("", None),
    }
    for key, (option, value) in said.items():
        given = settings.get(key)
        if given not in (*_AUTO, value):
            fix = f"the option {option} says it ({value})" if option else "max_tokens says it"
            raise ConfigError(f"DeepSpeed's {key} is {given}; set it to 'auto': {fix}")
    for key in ("bf16", "fp16", "amp"):
        if (settings.get(key) or {}).get("enabled") not in (*_AUTO, False):
            raise ConfigError(
                f"DeepSpeed's {key} is enabled; leave it out: the option bf16 says what is "
                "computed in bf16, beside weights in fp32"
            )
    for key, option in (("optimizer", "learning_rate"), ("scheduler", "warmup_ratio")):
        if key in settings:
            raise ConfigError(
                f"DeepSpeed's configuration has {key}; leave it out: the {key} is that of one "
                f"process, with {option} and its kin"
            )
    zero = dict(settings.get("zero_optimization") or {})
    if zero.get("stage") not in _STAGES:
        raise ConfigError(
            f"DeepSpeed's zero_optimization.stage is {zero.get('stage')}; set it to 2 (optimizer "
            "and gradients are sharded) or 3 (weights too), or leave DeepSpeed out"
        )
    for name in ("offload_param", "offload_optimizer"):
        place = (zero.get(name) or {}).get("device")
        if place not in (*_AUTO, "none", "cpu"):
            raise ConfigError(f"DeepSpeed's {name}.device is {place}; set it to cpu or none")
        if place != "cpu":
            zero.pop(name, None)
    for where, given, taken in (
        ("", set(settings) - {*said, "bf16", "fp16", "amp"}, _TAKEN),
        ("zero_optimization.", set(zero), _TAKEN_OF_ZERO),
    ):
        if others := given - taken:
            raise ConfigError(
                f"DeepSpeed's {where}{min(others)} is not taken here; leave it out of its "
                "configuration"
            )
    return {**{key: x for key, x in settings.items() if key in _TAKEN}, "zero_optimization": zero}


class DeepSpeed(Engine):
    """A part of the optimizer, the gradients and by stage 3 the weights on each process.

    Args:
        settings: DeepSpeed's configuration (`launch_settings`).

    Raises:
        ConfigError: there is one process, or the options or settings are not what it does here.
    """

    name = "deepspeed"
    collective = True  # of stage 2 the backward is

    def __init__(self, accelerator: Any, config: TrainConfig, settings: Mapping[str, Any]) -> None:
        require_deepspeed()
        super().__init__(accelerator, config)
        if not torch.distributed.is_initialized():
            raise ConfigError(
                "engine=deepspeed shards a model over processes, and there is one; launch "
                "several with accelerate launch, or leave engine out"
            )
        if config.load_in_4bit:
            raise ConfigError(
                "load_in_4bit=True cannot be sharded by engine=deepspeed; leave it out, or use "
                "engine=ddp"
            )
        if config.dtype != "float32" and not config.use_peft:
            raise ConfigError(
                f"dtype={config.dtype} cannot be trained by engine=deepspeed, whose optimizer "
                "keeps fp32 weights beside it, unlike one process; set dtype=float32 (bf16=true "
                "computes in bf16), or use_peft=true"
            )
        self.settings = checked_settings(settings, config)
        self.shards_weights = self.settings["zero_optimization"]["stage"] == 3
        self._engines: list[Any] = []  # of the models that are sharded, the policy's at last
        if accelerator.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        _library().utils.logger.setLevel(logging.WARNING)
        # DeepSpeed's calls, at every step.
        old = r"`torch\.distributed\.\w+` is deprecated"
        warnings.filterwarnings("ignore", old, FutureWarning)
        # Else transformers shards what it loads.
        unset_hf_deepspeed_config()

    # ------------------------------------------------------------------------------- the model
    def load(self, start: Any, config: TrainConfig, *, digest: bool) -> tuple[nn.Module, str]:
        if not self.shards_weights:
            return super().load(start, config, digest=digest)
        if not isinstance(start, str | Path):
            raise ConfigError(
                "engine=deepspeed with zero_optimization.stage 3 shards a model as it is loaded; "
                "save the one in memory (save_pretrained), and give its folder"
            )

        def place(model: Any) -> None:
            head.attach(model)
            if config.mlp_tile_tokens is not None:
                # Processes have other numbers of tiles, so a tile may gather nothing.
                for mlp in dense_mlps(model):
                    _library().utils.set_z3_leaf_module(mlp, True)
            self._engines.append(self._initialized(model))

        model: Any = None

        def read() -> None:
            nonlocal model
            cpu = torch.device("cpu")
            model = load_start(start, config, cpu) if self.is_main else _unread(str(start), config)

        # The first process reads it, and gives the others their parts, tensor by tensor.
        together(self.accelerator, read)
        sequence_parallel.use(model, self.sp)
        weights = weights_digest(model) if digest and self.is_main else ""
        return prepare_policy(model, config, place=place), weights

    def frozen_copy(self, model: nn.Module, start: Any, config: TrainConfig) -> nn.Module:
        if not self.shards_weights:
            return super().frozen_copy(model, start, config)
        found, _ = self.load(start, config, digest=False)
        return found.requires_grad_(False).eval()

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        for engine in [x for x in self._engines if x.module is model]:
            _take_off(engine)  # it had no optimizer
            self._engines.remove(engine)
        engine = self._initialized(model, optimizer)
        self._engines.append(engine)
        return engine, optimizer

    def _initialized(self, model: Any, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """DeepSpeed's engine around a model, which stays the module that forwards are run on."""
        width = head.base_of(model).config.get_text_config().hidden_size
        zero = {
            key: _BY_SIZE[key](width) if x == "auto" and key in _BY_SIZE else x
            for key, x in self.settings["zero_optimization"].items()
        }
        settings = {
            **self.settings,
            "zero_optimization": {key: x for key, x in zero.items() if x not in _AUTO},
            "train_micro_batch_size_per_gpu": 1,  # which has no meaning here
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.config.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if self.shards_weights and not hasattr(next(model.parameters()), "ds_id"):
            # Tensor by tensor: the engine would first put the whole on the device.
            _library().zero.Init(module=model, config_dict_or_path=settings)
            for module in model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = buffer.to(self.accelerator.device)
        engine, *_ = _library().initialize(model=model, optimizer=optimizer, config=settings)
        # Where autocast is on, its engines would switch it off around the module.
        _part("engine").autocast_if_enabled = nullcontext
        return engine

    def close(self) -> None:
        """Take off what DeepSpeed put on models, and on linear layers of any model."""
        while self._engines:
            _take_off(self._engines.pop())
        _part("engine").autocast_if_enabled = _part("torch_autocast").autocast_if_enabled
        places = _part("zero.partition_parameters")
        if torch.nn.functional.linear is places.zero3_linear_wrap:
            kept = places.InsertPostInitMethodToModuleSubClasses.linear_bk
            torch.nn.functional.linear = kept

    def plain(self, model: Any) -> Any:
        return model.module if any(model is x for x in self._engines) else model

    # -------------------------------------------------------------------------------- the step
    @contextmanager
    def accumulates(self, model: Any) -> Iterator[None]:
        model.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            model.set_gradient_accumulation_boundary(True)

    def backward(self, model: Any, loss: Tensor) -> None:
        model.backward(loss, scale_wrt_gas=False)

    def clip(self, model: Any, most: float) -> float:
        """DeepSpeed clips as it steps, and only then tells the norm, so the step is done here.

        It is left out where the norm is not finite.
        """
        model.step()
        return float(model.get_global_grad_norm())

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Done by `clip`."""

    # --------------------------------------------------------------------------------- on disk
    def write_state(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> list[Path]:
        return write_parts(folder, model, self._engine_of(model).optimizer, optimizer, self.rank)

    def read_state(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> None:
        engine = self._engine_of(model)
        engine.empty_partition_cache()  # weights that are whole would stay what they were
        zero = engine.optimizer
        together(self.accelerator, lambda: read_parts(folder, model, zero, optimizer))
        if not self.shards_weights:
            zero.update_lp_params()

    def save_policy(
        self, model: nn.Module, start: Any, config: TrainConfig, tokenizer: Any, out: Path
    ) -> None:
        if not self.shards_weights:
            super().save_policy(model, start, config, tokenizer, out)
            return
        adapter, policy = out / "adapter", out / "policy"

        def of_adapters() -> None:
            with _library().zero.GatheredParameters(
                [p for p in model.parameters() if p.requires_grad]
            ):
                if self.is_main:
                    save_adapter(model, adapter, tokenizer)

        def whole() -> None:
            if not config.use_peft:
                _save_whole(model, tokenizer, policy, start=str(start))
            elif self.is_main:  # of the files alone
                save_merged(str(start), adapter, tokenizer, policy, torch.float32)

        if config.use_peft:
            together(self.accelerator, of_adapters)
        together(self.accelerator, whole)

    def _engine_of(self, model: nn.Module) -> Any:
        return next(x for x in self._engines if model in (x, x.module))


def _save_whole(model: Any, tokenizer: Any, path: Path, *, start: str) -> None:
    """`save_policy` of a model whose weights are sharded: each is put together when it is written.

    All processes call it.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    # Sizes without content; tied weights are one tensor.
    hollow = {id(p): torch.empty(p.ds_shape, dtype=p.dtype, device="meta") for p in named.values()}

    def whole(parameter: Any) -> Tensor:
        with _library().zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def sizes(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state.update({prefix + name: hollow[id(p)] for name, p in named.items()})

    hook = model.register_state_dict_post_hook(sizes)
    try:
        values = {name: partial(whole, p) for name, p in named.items()}
        save_made(model, values, tokenizer, path, start=start, collective=True)
    finally:
        hook.remove()


def _unread(name: str, config: TrainConfig) -> Any:
    """A model whose parameters have no content yet, nor take memory before it comes."""
    model, _ = start_in_pieces(name, config)
    given: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for own, p in module._parameters.items():
            if p is not None and p.is_meta:
                if id(p) not in given:
                    given[id(p)] = nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad)
                module._parameters[own] = given[id(p)]
    return model


def _take_off(engine: Any) -> None:
    """Remove an engine's hooks from its model, whose weights stay sharded."""
    engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for module in engine.module.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):  # they belong to the engine, and would be kept
            vars(module).pop(name, None)
    # What in the library keeps models, and with them their optimizers, for good: a list, and what a
    # method has cached.
    modules = _part("zero.parameter_offload").FWD_MODULE_STACK
    modules[:] = [module for module in modules if module is not engine.module]
    of_parameters = _part("zero.partitioned_param_coordinator").PartitionedParameterCoordinator
    for method in vars(of_parameters).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()
