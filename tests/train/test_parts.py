"""Checkpoints of a sharded model: each process writes its part, and any engine reads them."""

import json
import os
import resource
import signal
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import on_ranks
from tiny import LLAMA, QWEN, build_tokenizer

from fastdpo.errors import DataError, ModelError
from fastdpo.model.adapters import add_lora, trainable_state
from fastdpo.model.shard import reshard, shard
from fastdpo.train.checkpoint import (
    best_so_far,
    load_best,
    load_checkpoint,
    save_best,
    save_checkpoint,
)
from fastdpo.train.config import TrainConfig
from fastdpo.train.engine import Engine
from fastdpo.train.launch import launched
from fastdpo.train.together import telling, together

VOCAB = len(build_tokenizer())


def join(rank, world):
    """The environment of a launch, for accelerate."""
    from accelerate.state import AcceleratorState, GradientState

    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), ACCELERATE_USE_CPU="true",
        MASTER_ADDR="127.0.0.1", MASTER_PORT="1",
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trained(engine, family=LLAMA, *, lora=False, steps=0, shift=0.0):
    """A model, sharded by its engine, its optimizer and schedule after so many steps."""
    torch.manual_seed(0)
    model: Any = family.build(VOCAB)
    if lora:
        model = add_lora(model, r=4, alpha=8.0, target_modules=None)
    with torch.no_grad():
        for p in trainable_state(model).values():
            p.add_(shift)
    if engine.name == "fsdp2":
        shard(model, engine.mesh, offload_params=engine.sharding.offload_params)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    ids = torch.arange(3, 15)[None]
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model, optimizer, schedule


def bits(model, optimizer):
    """All that a checkpoint has of them, whole."""
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        reshard(model)
    state = {f"model.{k}": x for k, x in trainable_state(model).items()}
    for i, slots in optimizer.state_dict()["state"].items():
        state |= {f"{i}.{k}": x for k, x in slots.items()}
    return {k: getattr(x, "full_tensor", x.clone)() for k, x in state.items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(x, wanted[name]) for name, x in found.items())


CASES: dict[str, Any] = {"full": {}, "tied": dict(family=QWEN), "lora": dict(lora=True)}


def every_way(rank, folder, cases):
    """Checkpoints of both forms, read by both engines."""
    join(rank, 2)
    fsdp2 = launched(TrainConfig(engine="fsdp2"))
    accelerator: Any = fsdp2.accelerator
    whole = Engine(accelerator, TrainConfig())
    for name in cases:
        out, options = folder / name, CASES[name]
        sharded = trained(fsdp2, steps=3, **options)
        wanted = bits(*sharded[:2])
        save_checkpoint(out / "parts", 3, fsdp2, *sharded, extra={"a": 1})
        alone = trained(whole, steps=2, **options)
        of_alone = bits(*alone[:2])
        save_checkpoint(out / "whole", 2, whole, *alone)
        for source, state, extra in (("parts", wanted, {"a": 1}), ("whole", of_alone, None)):
            for engine in (fsdp2, whole):
                torch.manual_seed(7)
                new = trained(engine, steps=1, shift=0.1, **options)
                step = 3 if source == "parts" else 2
                assert load_checkpoint(out / source, engine, *new) == (step, extra)
                assert_same(bits(*new[:2]), state)
                rates = [group["lr"] for group in new[1].param_groups]
                assert rates == new[2].get_last_lr() == [1e-2 * (1 / (1 + step))]
        # The best weights, from a model whose weights are gathered after a forward.
        model = sharded[0]
        with torch.no_grad():
            model(torch.arange(3, 9)[None])
        save_best(out / "best", 3, fsdp2, model, 0.5)
        new = trained(fsdp2, shift=0.1, **options)
        assert load_best(out / "best", fsdp2, new[0]) == (3, 0.5) == best_so_far(out / "best")
        found = bits(*new[:2])
        assert_same(found, {name: wanted[name] for name in found})
        with pytest.raises(ModelError, match="but the model trains it with"):
            load_checkpoint(out / "parts", fsdp2, *trained(fsdp2, lora=name != "lora"))


@contextmanager
def full_disk(on, most=2**15):
    """Where it is ``on``, no file grows beyond so many bytes; that of the store is smaller."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if on:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def fails_on_one(rank, folder):
    join(rank, 2)
    engine = launched(TrainConfig(engine="fsdp2"))
    told = []
    state = trained(engine, steps=2)
    save_checkpoint(folder, 2, engine, *state)
    # A full disk of either process, in its part or in what the first one adds.
    for full in (0, 1):
        with full_disk(rank == full), pytest.raises(DataError) as error:
            save_checkpoint(folder, 4, engine, *state)
        told.append(str(error.value))
        assert [x.name for x in folder.glob("step-*")] == ["step-00000002"]
    save_checkpoint(folder, 4, engine, *state)
    accelerator: Any = engine.accelerator
    accelerator.wait_for_everyone()
    assert [x.name for x in folder.iterdir()] == ["step-00000004"]  # nothing is left over
    # A file that only one of them looks at.
    path = folder / "step-00000004" / f"__{rank}_0.distcp"
    if rank == 1:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    accelerator.wait_for_everyone()
    with pytest.raises(DataError) as error:
        load_checkpoint(folder, engine, *state)
    told.append(str(error.value))
    # What nobody has planned.
    with pytest.raises(KeyError if rank == 1 else RuntimeError) as error:
        together(accelerator, lambda: {}["a"] if rank == 1 else 1)
    told.append(str(error.value))
    assert together(accelerator, lambda: rank) == [0, 1]
    # One that ended, so it never comes to where the other waits, and the work after it.
    with pytest.raises(ModelError, match="the second is broken"), telling():
        if rank == 1:
            raise ModelError("the second is broken")
        together(accelerator, lambda: rank)
    with telling():
        assert together(accelerator, lambda: rank) == [0, 1]
    # What the first process does alone.
    whole, model = Engine(accelerator, TrainConfig()), LLAMA.build(VOCAB)
    with full_disk(rank == 0), pytest.raises(DataError) as error:
        whole.save_policy(model, model, TrainConfig(), build_tokenizer(), folder)
    told.append(str(error.value))
    return told


def both(rank, folder):
    every_way(rank, folder, ["full"])
    return fails_on_one(rank, folder / "fails")


def test_parts_are_read_by_each_engine_and_what_fails_on_one_is_the_error_of_all(tmp_path):
    first, second = on_ranks(2, both, tmp_path)
    [step] = (tmp_path / "full" / "parts").iterdir()
    names = {path.name for path in step.iterdir()}
    assert names == {".metadata", "__0_0.distcp", "__1_0.distcp", "state.json", "SHA256SUMS"}
    assert {line.split()[1] for line in (step / "SHA256SUMS").open()} == names - {"SHA256SUMS"}
    assert json.loads((step / "state.json").read_text())["world"] == 2
    [step] = (tmp_path / "full" / "whole").iterdir()
    assert json.loads((step / "state.json").read_text()).keys() == {"step", "scheduler", "extra"}
    # A single process that was not launched reads them too.
    accelerator = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)
    alone = Engine(accelerator, TrainConfig())
    new = trained(alone, steps=1, shift=0.1)
    assert load_checkpoint(tmp_path / "full" / "parts", alone, *new) == (3, {"a": 1})
    # What failed.
    path = tmp_path / "fails" / "step-00000004"
    for told in (first, second):
        for text in told[:2]:
            assert text.startswith(f"{path} can't be written ([Errno 27] File too large")
        assert told[2].startswith(f"{path / '__1_0.distcp'} differs from what was written")
        assert told[4].startswith(f"{tmp_path / 'fails' / 'policy'} can't be written (")
    assert (first[3], second[3]) == ("process 1 of 2: KeyError: 'a'", "'a'")


@pytest.mark.slow
def test_parts_of_tied_weights_and_adapters(tmp_path):
    on_ranks(2, every_way, tmp_path, ["tied", "lora"])


WAYS: dict[str, Any] = {
    "fsdp2": {},
    "hsdp": dict(dp_replicate_size=2),
    "offloaded": dict(offload_params=True),
}


def written(rank, folder):
    join(rank, 4)
    for name, options in WAYS.items():
        engine = launched(TrainConfig(engine="fsdp2", **options))
        state = trained(engine, steps=2)
        save_checkpoint(folder / name, 2, engine, *state)
        whole = bits(*state[:2])
        if rank == 0:
            torch.save(whole, folder / f"{name}.pt")
    is_read(rank, folder, 4)


def is_read(rank, folder, world):
    """By every way that this many processes can be grouped in."""
    join(rank, world)
    for options in WAYS.values() if world > 2 else [WAYS["fsdp2"], WAYS["offloaded"]]:
        engine = launched(TrainConfig(engine="fsdp2", **options))
        for name in WAYS:
            new = trained(engine, steps=1, shift=0.1)
            assert load_checkpoint(folder / name, engine, *new) == (2, None)
            assert_same(bits(*new[:2]), torch.load(folder / f"{name}.pt"))


@pytest.mark.slow
def test_parts_are_read_by_another_number_of_processes(tmp_path):
    on_ranks(4, written, tmp_path)
    on_ranks(2, is_read, tmp_path, 2)
