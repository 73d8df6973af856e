"""Which engine a launch asks for, by accelerate's own plugin and environment."""

from types import SimpleNamespace

import accelerate
import pytest
import torch

from fastdpo.errors import ConfigError
from fastdpo.train import launch
from fastdpo.train.config import TrainConfig


@pytest.fixture
def given(monkeypatch):
    """What accelerate is given of the processes on a machine with a GPU."""
    seen = {}

    def accelerator(cpu, kwargs_handlers):
        seen.update(cpu=cpu, **kwargs_handlers[0].to_kwargs())
        return SimpleNamespace(num_processes=1)

    monkeypatch.setattr(accelerate, "Accelerator", accelerator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for name in ("LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    return seen


@pytest.mark.parametrize(
    "environment, backend",
    [
        ({}, None),  # accelerate would look for a group that nobody made
        ({"LOCAL_RANK": "0"}, "cuda:nccl,cpu:gloo"),
        ({"LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"}, None),
    ],
)
def test_processes_of_a_launch_on_gpus_sum_on_the_cpu_what_is_offloaded(
    given, monkeypatch, environment, backend
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch.joined(offload_params=True)
    assert given.get("backend") == backend
    assert given["cpu"] == ("ACCELERATE_USE_CPU" in environment)
    given.clear()
    launch.joined()
    assert "backend" not in given  # gloo between machines needs a network set up for it


def sharding(monkeypatch, config=None, environment=None, **settings):
    """What FSDP2 gets of a plugin that accelerate has entered, as it does on GPUs."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in (environment or {}).items():
        monkeypatch.setenv(name, value)
    plugin = accelerate.FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **settings})
    state = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    return launch._sharding(state, config or TrainConfig())


def test_settings_of_accelerates_plugin_are_taken(monkeypatch):
    found = sharding(
        monkeypatch,
        environment={"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"},
        reshard_after_forward=False,
        cpu_offload=True,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    assert found == launch.Sharding(2, False, True, ("LlamaDecoderLayer",))


@pytest.mark.parametrize(
    "config, environment, settings, message",
    [
        ({}, {}, {"fsdp_version": 1}, "set fsdp_version: 2"),
        ({}, {}, {"auto_wrap_policy": "SIZE_BASED_WRAP"}, "SIZE_BASED_WRAP"),
        ({}, {}, {"state_dict_type": "FULL_STATE_DICT"}, "leave it out: checkpoints are sharded"),
        ({}, {"PARALLELISM_CONFIG_TP_SIZE": "2"}, {}, "tp_size is 2"),
        ({}, {"PARALLELISM_CONFIG_CP_SIZE": "2"}, {}, "cp_size is 2"),
        ({}, {"PARALLELISM_CONFIG_SP_SIZE": "2"}, {}, "sp_size=1, but accelerate .* 2"),
        (
            {"dp_replicate_size": 4},
            {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"},
            {},
            "dp_replicate_size=4, but accelerate .* 2",
        ),
        (
            {"gradient_checkpointing": False},
            {},
            {"activation_checkpointing": True},
            "gradient_checkpointing=false",
        ),
    ],
)
def test_what_the_plugin_asks_for_and_is_not_done_is_refused(
    monkeypatch, config, environment, settings, message
):
    with pytest.raises(ConfigError, match=message):
        sharding(monkeypatch, TrainConfig(**config), environment, **settings)
