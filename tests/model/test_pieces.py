"""Models read and written in pieces: the bits, names and files of one process."""

import hashlib
import multiprocessing
import os
import re
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.multiprocessing.spawn import spawn

from fastdpo.data.batch import pack_pairs
from fastdpo.data.examples import TokenizedPair
from fastdpo.errors import ModelError
from fastdpo.model import adapters, head
from fastdpo.model.load import (
    load_causal_lm,
    load_in_pieces,
    save_policy,
    weights_digest,
)
from fastdpo.model.merge import save_merged, save_merged_in_place
from fastdpo.model.pieces import gathered, is_cut
from fastdpo.model.prepare import prepare_model
from fastdpo.model.save import save_made
from fastdpo.model.shard import is_sharded, shard

FAMILIES = ["LLAMA", "QWEN", "GEMMA3", "MIXTRAL", "QWEN2_MOE", "PHI", "OPT", "BLOOM", "MAMBA"]
LORA: dict[str, Any] = {"r": 4, "alpha": 8.0, "target_modules": None}


def files(folder: Path) -> dict[str, str]:
    """Digests of a policy's files."""
    return {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in folder.iterdir()}


def lora(model: nn.Module) -> Any:
    """Adapters whose second halves are no longer zero, with the same bits in every process."""
    model = adapters.add_lora(model, **LORA)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.02, generator=generator)
    return model


# ------------------------------------------------------------------------------------ one process
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_process(family, dtype, tmp_path):
    start = str(tiny.save_tiny(getattr(tiny, family), tmp_path / "start"))
    whole = load_causal_lm(start, dtype=dtype)
    model, pieces = load_in_pieces(start, dtype=dtype)
    assert all(p.is_meta for p in model.parameters())
    for _, name, tensor in pieces._places:  # any rows of any parameter
        wanted = pieces._trace.value(tensor)
        parts = [(i, min(i + 3, len(wanted))) for i in range(0, len(wanted), 3)]
        assert torch.equal(torch.cat([pieces._trace.rows(tensor, *x) for x in parts]), wanted), name
    pieces.fill(torch.device("cpu"))
    assert weights_digest(model) == weights_digest(whole)
    for (name, x), (other, y) in zip(model.named_buffers(), whole.named_buffers(), strict=True):
        assert name == other and torch.equal(x, y)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in whole.named_parameters()]

    tokenizer = tiny.build_tokenizer()
    save_policy(whole, tokenizer, tmp_path / "whole", start=start)
    made = {name: lambda x=x: x for name, x in whole.state_dict().items()}
    save_made(model, made, tokenizer, tmp_path / "made", start=start)
    assert files(tmp_path / "made") == files(tmp_path / "whole")


def test_several_files(tmp_path, monkeypatch):
    """What is more than a file has its index, and no more than a file is in memory."""
    start = str(tiny.save_tiny(tiny.MIXTRAL, tmp_path / "start"))
    whole = load_causal_lm(start)
    made = {name: lambda x=x: x for name, x in whole.state_dict().items()}
    plain = type(whole).save_pretrained
    monkeypatch.setattr(
        type(whole), "save_pretrained",
        lambda self, folder, **x: plain(self, folder, max_shard_size="20KB", **x),
    )  # fmt: skip
    tokenizer = tiny.build_tokenizer()
    save_policy(whole, tokenizer, tmp_path / "whole")
    model, _ = load_in_pieces(start)
    save_made(model, made, tokenizer, tmp_path / "made")
    found = files(tmp_path / "made")
    assert found == files(tmp_path / "whole")
    assert "model.safetensors.index.json" in found and len(found) > 8
    again, pieces = load_in_pieces(str(tmp_path / "made"))
    pieces.fill(torch.device("cpu"))
    for (name, x), y in zip(again.state_dict().items(), whole.state_dict().values()):
        assert torch.equal(x, y), name


def test_bin_files(tmp_path):
    start = tiny.save_tiny(tiny.QWEN, tmp_path / "start")
    whole = load_causal_lm(str(start))
    (start / "model.safetensors").unlink()
    torch.save(whole.state_dict(), start / "pytorch_model.bin")
    model, pieces = load_in_pieces(str(start))
    assert all(p.is_meta for p in model.parameters())
    pieces.fill(torch.device("cpu"))
    for (name, x), y in zip(model.state_dict().items(), whole.state_dict().values()):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_same_errors(damage, tmp_path):
    from safetensors.torch import load_file, save_file

    start = tiny.save_tiny(tiny.LLAMA, tmp_path / "start")
    tensors = load_file(start / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    if damage == "missing":
        del tensors[f"{name}.weight"]
    elif damage == "unknown":
        tensors[f"{name}.bias"] = torch.zeros(32)
    else:
        tensors[f"{name}.weight"] = torch.zeros(3, 32)
    save_file(tensors, start / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as whole:
        load_causal_lm(str(start))
    with pytest.raises(ModelError, match=re.escape(str(whole.value))):
        load_in_pieces(str(start))


def test_changed_in_place(tmp_path, monkeypatch):
    """What the notes can't tell is refused, not read wrongly."""
    from transformers import core_model_loading

    start = str(tiny.save_tiny(tiny.LLAMA, tmp_path / "start"))
    plain = core_model_loading.WeightRenaming.convert

    def convert(self, *args, **kwargs):
        found = plain(self, *args, **kwargs)
        for x in found.values():
            (x[0] if isinstance(x, list) else x).mul_(2)
        return found

    monkeypatch.setattr(core_model_loading.WeightRenaming, "convert", convert)
    _, pieces = load_in_pieces(start)
    with pytest.raises(ModelError, match=r"in place .aten::mul_.*set engine=ddp"):
        pieces.fill(torch.device("cpu"))


@pytest.mark.parametrize("family", ["LLAMA", "QWEN", "MIXTRAL"])
def test_merged_in_pieces(family, tmp_path):
    start = str(tiny.save_tiny(getattr(tiny, family), tmp_path / "start"))
    whole = lora(load_causal_lm(start, dtype=torch.bfloat16))
    model, pieces = load_in_pieces(start, dtype=torch.bfloat16)
    model = lora(model)
    pieces.fill(torch.device("cpu"))
    for (name, x), (other, y) in zip(whole.named_parameters(), model.named_parameters()):
        assert name == other and torch.equal(x, y) and x.requires_grad == y.requires_grad, name
    assert weights_digest(model) == weights_digest(load_causal_lm(start, dtype=torch.bfloat16))

    tokenizer = tiny.build_tokenizer()
    adapters.save_adapter(whole, tmp_path / "adapter", tokenizer)
    merged = adapters.merged(start, tmp_path / "adapter", torch.float32)
    save_policy(merged, tokenizer, tmp_path / "whole", start=start)
    save_merged(start, tmp_path / "adapter", tokenizer, tmp_path / "made", torch.float32)
    assert files(tmp_path / "made") == files(tmp_path / "whole")


# ------------------------------------------------------------------------------ several processes
def case(rank, mesh, folder, family, dtype, peft, offload) -> None:
    from torch.distributed import barrier

    start = str(folder / family)
    tokenizer = tiny.build_tokenizer()
    model, pieces = load_in_pieces(start, dtype=dtype)
    if peft:
        model = lora(model)
    head.attach(model)
    shard(model, mesh, offload_params=offload)
    pieces.fill(torch.device("cpu"))
    whole = load_causal_lm(start, dtype=dtype)
    digest = weights_digest(whole)
    assert weights_digest(model) == digest
    whole = lora(whole) if peft else whole
    assert is_sharded(model) and not is_sharded(whole)
    for (name, x), (other, y) in zip(model.named_parameters(), whole.named_parameters()):
        assert name == other and x.requires_grad == y.requires_grad, name
        assert is_cut(x) and torch.equal(gathered(x), y), name
    ties = [[n for n, _ in m.named_parameters()] for m in (model, whole)]
    assert ties[0] == ties[1]

    # The proof leaves parameters cut, and what it computes with them is what they were.
    prepare_model(model, gradient_checkpointing=True)
    assert all(map(is_cut, model.parameters()))
    batch = pack_pairs([TokenizedPair([5, 6, 7], [8, 9, 10, 11], [12, 13])])
    plain = prepare_model(whole, gradient_checkpointing=True)
    with torch.no_grad():
        hidden = [head.packed_forward(m, batch, lambda h_TD, **_: h_TD) for m in (model, plain)]
    found, wanted = hidden
    assert torch.equal(found, wanted)
    assert weights_digest(model) == digest  # after a forward that leaves some gathered

    out, adapter = folder / f"{family}-out", folder / f"{family}-adapter"
    if not peft:
        save_policy(model, tokenizer, out, start=start)
    else:
        adapters.save_adapter(model, adapter, tokenizer)
        if rank == 0:
            save_merged(start, adapter, tokenizer, folder / f"{family}-named", torch.float32)
        save_merged_in_place(model, tokenizer, out, torch.float32, start=start)
    if rank == 0:
        one = folder / f"{family}-one"
        if peft:
            adapters.save_adapter(whole, folder / "adapter", tokenizer)
            assert files(folder / "adapter") == files(adapter)
            merged = adapters.merged(start, adapter, torch.float32)
            save_policy(merged, tokenizer, one, start=start)
            assert files(folder / f"{family}-named") == files(one)
            whole = adapters.merged_in_place(whole, torch.float32)  # the base in bf16, as it was
        save_policy(whole, tokenizer, one, start=start)
        assert files(out) == files(one)
    barrier()


def worker(rank, world, port, queue, folder, work) -> None:
    import logging

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    sizes = (world,) if world < 4 else (2, world // 2)
    try:
        queue.put(work(rank, init_device_mesh("cpu", sizes), folder))
    except Exception:
        queue.put(traceback.format_exc())
        raise
    dist.destroy_process_group()


def run(world, folder, work) -> list[Any]:
    """What each process found; ``work`` takes its number, a mesh and a folder."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    spawn(worker, args=(world, port, queue, folder, work), nprocs=world)
    return [queue.get() for _ in range(world)]


def all_cases(rank, mesh, folder) -> None:
    for family in ("LLAMA", "QWEN", "GEMMA3", "MIXTRAL"):
        for dtype, peft in ((torch.float32, False), (torch.bfloat16, True)):
            case(rank, mesh, folder, family, dtype, peft, offload=family == "QWEN")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes(world, tmp_path):
    for family in ("LLAMA", "QWEN", "GEMMA3", "MIXTRAL"):
        tiny.save_tiny(getattr(tiny, family), tmp_path / family)
    run(world, tmp_path, all_cases)
