"""A run of which each process has some rows of the model, from the start to the saved policy."""

import logging
import os
import random
import time
from contextlib import nullcontext
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import not_noted, on_ranks
from safetensors.torch import load_file

from fastdpo.data.examples import TokenizedPair
from fastdpo.errors import ModelError
from fastdpo.model.load import load_causal_lm
from fastdpo.train.config import TrainConfig
from fastdpo.train.together import together
from fastdpo.train.trainer import train

# Of a model by name and in memory, with and without adapters.
CASES = [(memory, lora) for memory in (False, True) for lora in (False, True)]


def run(folder: Any, out: Any, memory: bool, lora: bool, engine: str) -> float:
    """The loss of two steps; full training takes the reference as a second model."""
    draw = random.Random(0)

    def ids(least: int) -> list[int]:
        return [draw.randrange(4, 300) for _ in range(draw.randrange(least, 9))]

    pairs = [TokenizedPair(ids(4), ids(3), ids(3), where=f"row {i}") for i in range(8)]
    config = TrainConfig(
        batch_size=4, max_tokens=64, max_length=32, learning_rate=1e-3, bf16=False, use_peft=lora,
        engine=engine, reference_cache=None, precompute_ref_log_probs=lora,
    )  # fmt: skip
    start = load_causal_lm(str(folder)) if memory else str(folder)
    return train(start, tiny.build_tokenizer(), pairs, config, out, progress=False)["loss"]


def join(rank: int) -> None:
    """The environment of a launch, for accelerate."""
    from accelerate.state import AcceleratorState, GradientState

    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="true",
        MASTER_ADDR="127.0.0.1", MASTER_PORT="1",
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def sharded(rank: int, folder: Any) -> list[float]:
    logging.disable(logging.WARNING)
    join(rank)
    found = []
    for memory, lora in CASES:
        out = folder / f"sharded-{memory}-{lora}"
        found.append(run(folder / "start", out, memory, lora, "fsdp2"))
    return found


@pytest.mark.slow
def test_run_of_a_sharded_model_equals_that_of_one_process(tmp_path):
    tiny.save_tiny(tiny.QWEN, tmp_path / "start")
    found, _ = on_ranks(2, sharded, tmp_path)
    for (memory, lora), loss in zip(CASES, found):
        out = tmp_path / f"one-{memory}-{lora}"
        assert loss == pytest.approx(run(tmp_path / "start", out, memory, lora, "auto"), abs=1e-6)
        name = "policy/model.safetensors"
        weights, wanted = (
            load_file(tmp_path / f"sharded-{memory}-{lora}" / name),
            load_file(out / name),
        )
        assert weights.keys() == wanted.keys()
        for key, x in weights.items():
            torch.testing.assert_close(x, wanted[key], rtol=0, atol=2e-6)  # a step moves 1e-3


def in_another_order(rank: int, folder: Any) -> float:
    """The second process makes RoPE's buffers in another order, as some versions of transformers
    do, which take it from a set."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    logging.disable(logging.WARNING)
    join(rank)
    plain = Gemma3RotaryEmbedding.__init__

    def turned(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        names = sorted(self._buffers, reverse=bool(rank))
        self._buffers = {name: self._buffers[name] for name in names}

    # Nor does it load a whole model to copy it to its device.
    no_whole = mock.patch("fastdpo.train.engine.load_start", None)
    with mock.patch.object(Gemma3RotaryEmbedding, "__init__", turned), no_whole:
        return run(folder / "start", folder / "two", False, True, "ddp")


@pytest.mark.slow
def test_each_process_has_its_own_buffers(tmp_path):
    tiny.save_tiny(tiny.GEMMA3, tmp_path / "start")
    wanted = run(tmp_path / "start", tmp_path / "one", False, True, "auto")
    assert on_ranks(2, in_another_order, tmp_path) == [pytest.approx(wanted, abs=1e-6)] * 2


def late(rank: int) -> list[int]:
    """The first process takes longer than an exchange may."""
    from accelerate import Accelerator

    join(rank)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
    return together(Accelerator(), lambda: time.sleep(5 * (rank == 0)) or rank)


@pytest.mark.slow
def test_what_takes_longer_than_an_exchange_may(tmp_path):
    assert on_ranks(2, late) == [[0, 1]] * 2


def cannot_load(rank: int, folder: Any) -> list[str]:
    """The first process cannot load the whole of what it is to send; the second cannot read."""
    from fastdpo.model import load
    from fastdpo.model.pieces import Pieces

    logging.disable(logging.WARNING)
    join(rank)
    plain, calls, told = load.load_causal_lm, [], []

    def once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise ModelError("the whole is gone")
        return plain(*args, **kwargs)

    def broken(self: Any, *args: Any) -> Any:
        raise OSError("a file is gone")

    noted = not_noted(own=True), mock.patch.object(load, "load_causal_lm", once)
    on_second = mock.patch.object(Pieces, "_content", broken) if rank else nullcontext()
    for number, patches in enumerate((noted, (on_second, nullcontext()))):
        with patches[0], patches[1], pytest.raises((ModelError, OSError)) as error:
            run(folder / "start", folder / f"{number}", False, True, "fsdp2")
        told.append(str(error.value))
    return told


@pytest.mark.slow
def test_one_that_cannot_load_is_the_error_of_all(tmp_path):
    tiny.save_tiny(tiny.QWEN, tmp_path / "start")
    assert on_ranks(2, cannot_load, tmp_path) == [["the whole is gone", "a file is gone"]] * 2
