"""What FSDP2 gathers, in which dtype and for how long, and what follows for the reference."""

import logging
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import on_ranks
from safetensors.torch import load_file
from test_sharded_start import join

from fastdpo.data.examples import TokenizedPair
from fastdpo.errors import ModelError
from fastdpo.model.pieces import is_sharded
from fastdpo.model.shard import shard
from fastdpo.train import logps, trainer
from fastdpo.train.config import TrainConfig
from fastdpo.train.fsdp import Fsdp2
from fastdpo.train.launch import launched
from fastdpo.train.trainer import train


def run(start: Any, out: Any, **options: Any) -> float:
    """The loss of two steps."""
    draw = random.Random(0)

    def ids(least: int) -> list[int]:
        return [draw.randrange(4, 300) for _ in range(draw.randrange(least, 9))]

    pairs = [TokenizedPair(ids(4), ids(3), ids(3), where=f"row {i}") for i in range(8)]
    config = TrainConfig(
        **{
            **dict(batch_size=4, max_tokens=64, max_length=32, learning_rate=1e-3, bf16=False),
            **dict(reference_cache=None, save_steps=1),
            **options,
        }
    )
    return train(str(start), tiny.build_tokenizer(), pairs, config, out, progress=False)["loss"]


# ---------------------------------------------------------------------------- dtypes and groups
def dtypes(family: Any, mesh: Any) -> dict[str, torch.dtype]:
    """Those of weights while their module runs."""
    torch.manual_seed(0)
    model, seen = family.build(320), {}
    shard(model, mesh, bf16=True)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            module.register_forward_pre_hook(
                lambda own, _, name=name: seen.update({name: own.weight.dtype})
            )
    ids = torch.arange(3, 15)[None]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids, output_hidden_states=True)
    assert {x.dtype for x in out.hidden_states} == {torch.float32}
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    return seen


def gathered(rank: int) -> None:
    join(rank)
    engines: list[Any] = [launched(TrainConfig(engine="fsdp2", bf16=False)) for _ in range(2)]
    assert engines[0].mesh is engines[1].mesh
    parallel = [launched(TrainConfig(engine="fsdp2", bf16=False, sp_size=2)).sp for _ in range(2)]
    assert parallel[0] is parallel[1]
    groups = len(dist.distributed_c10d._world.pg_map)
    launched(TrainConfig(engine="fsdp2", sp_size=2))
    assert len(dist.distributed_c10d._world.pg_map) == groups
    for family in (tiny.LLAMA, tiny.QWEN):
        found = dtypes(family, engines[0].mesh)
        exact = {name for name, dtype in found.items() if dtype == torch.float32}
        head = {"lm_head"} if family is tiny.QWEN else set()
        assert exact == {"model.embed_tokens", "model.norm", *head}


def test_what_is_gathered_in_the_dtype_of_the_weights():
    on_ranks(2, gathered)


# --------------------------------------------------------------------------------- the reference
def test_log_probs_of_weights_that_an_engine_rounds(tmp_path, caplog):
    pairs = [TokenizedPair([1], [2], [3])]
    found = logps.LogProbs.of_examples(pairs, torch.zeros(2).double(), torch.zeros(2))
    path = tmp_path / "ref_logps.safetensors"
    for kept, wanted in (("abc", "abc+bfloat16"), ("abc+bfloat16", "abc")):
        logps.save(path, found, kept)
        assert logps.load(path, pairs, kept) is not None
        assert logps.load(path, pairs, None) is not None
        assert logps.load(path, pairs, wanted) is None
        assert "the reference is computed again: it is of an engine that rounds" in caplog.text
        caplog.clear()
        with pytest.raises(ModelError, match="the log-probs of another model"):
            logps.load(path, pairs, "other+bfloat16")


def test_which_engine_rounds():
    accelerator: Any = SimpleNamespace(num_processes=2, process_index=0, device=torch.device("cpu"))
    sharding = SimpleNamespace(replicas=1)
    with patch("fastdpo.train.fsdp.mesh_of"):
        for bf16, dtype, rounding in (
            (True, "float32", "+bfloat16"),
            (True, "bfloat16", ""),
            (False, "float32", ""),
        ):
            config = replace(TrainConfig(), bf16=bf16, dtype=dtype)
            assert Fsdp2(accelerator, config, sharding).rounding == rounding


def let_go(real: Any) -> Any:
    """`take_step`, after which nothing of the reference is gathered."""

    def call(setup: Any, model: Any, optimizer: Any, batches: Any, objective: Any, *rest: Any):
        row = real(setup, model, optimizer, batches, objective, *rest)
        assert all(map(is_sharded, rest[0].model.parameters()))
        return row

    return call


def sharded(rank: int, folder: Any) -> dict[str, float]:
    logging.disable(logging.WARNING)
    join(rank)
    given: dict[str, Any] = {"engine": "fsdp2", "precompute_ref_log_probs": False}
    with patch.object(trainer, "take_step", let_go(trainer.take_step)):
        run(folder / "start", folder / "each step", **given)
        run(folder / "start", folder / "tdpo2", loss_type="tdpo2", **given)
    cache = {"engine": "fsdp2", "reference_cache": str(folder / "cache")}
    run(folder / "start", folder / "fp32", **cache)
    run(folder / "start", folder / "bf16", bf16=True, **cache)
    # Of a run that one process began.
    run(folder / "start", folder / "begun", bf16=True, num_train_epochs=2, **cache)
    return {
        name: run(folder / name.split()[0], folder / f"sharded {name}", engine="fsdp2", **options)
        for name, options in MIXTURES.items()
    }


MIXTURES: dict[str, dict[str, Any]] = {
    "qwen2_moe all": dict(use_peft=True),
    "mixtral experts": dict(use_peft=True, lora_target_parameters=["experts.gate_up_proj"]),
}


@pytest.mark.slow
def test_references_and_mixtures(tmp_path):
    for name, family in (
        ("start", tiny.QWEN),
        ("qwen2_moe", tiny.QWEN2_MOE),
        ("mixtral", tiny.MIXTRAL),
    ):
        tiny.save_tiny(family, tmp_path / name)
    cache = {"reference_cache": str(tmp_path / "cache")}
    for bf16 in (False, True):
        run(
            tmp_path / "start", tmp_path / "begun" if bf16 else tmp_path / "one", bf16=bf16, **cache
        )
    own = tmp_path / "begun" / "ref_logps" / "ref_logps.safetensors"
    before = load_file(own)
    found, _ = on_ranks(2, sharded, tmp_path)
    # fp32 of both engines, bf16 of one process, and bf16 of two.
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert not torch.equal(load_file(own)["logp_S"], before["logp_S"])
    for name, options in MIXTURES.items():
        out = tmp_path / f"one {name}"
        loss = run(tmp_path / name.split()[0], out, **options)
        assert found[name] == pytest.approx(loss, abs=1e-6)
        of_two = tmp_path / f"sharded {name}" / "policy" / "model.safetensors"
        weights, wanted = load_file(of_two), load_file(out / "policy" / "model.safetensors")
        assert weights.keys() == wanted.keys()
        for key, x in weights.items():
            torch.testing.assert_close(x, wanted[key], rtol=0, atol=2e-5, msg=key)
