"""DeepSpeed's ZeRO: what its configuration may say, and training equal to one process."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
from test_trainer import random_pairs

from fastdpo.errors import ConfigError
from fastdpo.train import deepspeed
from fastdpo.train.config import TrainConfig
from fastdpo.train.trainer import train

CONFIG = TrainConfig(
    batch_size=6, max_tokens=120, max_length=60, learning_rate=1e-3, alpha=0.02, bf16=False,
    reference_cache=None, max_grad_norm=0.05, save_steps=1,
)  # fmt: skip
ZERO = {"zero_optimization": {"stage": 2}}


# ------------------------------------------------------------------------------ the configuration
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_clipping": 0.05, "train_batch_size": 6, "gradient_accumulation_steps": 1},
        {"gradient_clipping": "auto", "train_batch_size": "auto", "bf16": {"enabled": "auto"}},
        {"fp16": {"enabled": False}, "train_micro_batch_size_per_gpu": "auto"},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
    ],
)
def test_settings_that_options_agree_with_are_taken(settings):
    found = deepspeed.checked_settings({**ZERO, **settings}, CONFIG)
    assert found["zero_optimization"]["stage"] == settings.get(
        "zero_optimization", ZERO["zero_optimization"]
    ).get("stage")
    assert set(found) == {"zero_optimization"}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"gradient_clipping": 1.0}, ("gradient_clipping is 1.0", "max_grad_norm says it (0.05)")),
        ({"train_batch_size": 32}, ("train_batch_size is 32", "batch_size says it (6)")),
        ({"gradient_accumulation_steps": 4}, ("gradient_accumulation_steps is 4", "max_tokens")),
        ({"train_micro_batch_size_per_gpu": 2}, ("per_gpu is 2", "max_tokens")),
        ({"bf16": {"enabled": True}}, ("bf16 is enabled", "option bf16")),
        ({"fp16": {"enabled": True}}, ("fp16 is enabled", "option bf16")),
        ({"optimizer": {"type": "Adam"}}, ("has optimizer", "learning_rate")),
        ({"scheduler": {"type": "WarmupLR"}}, ("has scheduler", "warmup_ratio")),
        ({"pipeline": {"stages": 2}}, ("pipeline is not taken",)),
        ({"communication_data_type": "bf16"}, ("communication_data_type is not taken",)),
        ({"zero_optimization": {"stage": 1}}, ("stage is 1", "set it to 2")),
        ({"zero_optimization": None}, ("stage is None",)),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, ("quantized",)),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            ("offload_param.device is nvme", "cpu"),
        ),
    ],
)
def test_settings_that_say_something_else_are_refused(settings, words):
    with pytest.raises(ConfigError) as error:
        deepspeed.checked_settings({**ZERO, **settings}, CONFIG)
    assert all(word in str(error.value) for word in words)


def test_without_the_package_one_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fastdpo\[deepspeed\]'"):
        train("model", None, random_pairs(2), replace(CONFIG, engine="deepspeed"), tmp_path)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_one_process_or_no_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="accelerate launch --use_deepspeed"):
        train("model", None, random_pairs(2), replace(CONFIG, engine="deepspeed"), tmp_path)
