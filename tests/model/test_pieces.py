"""Models read and written in pieces: the bits, names and files of one process."""

import gc
import hashlib
import logging
import re
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from ranks import not_noted, on_ranks
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fastdpo.data.batch import pack_pairs
from fastdpo.data.examples import TokenizedPair
from fastdpo.errors import DataError, ModelError
from fastdpo.model import adapters, head
from fastdpo.model.devices import device_of
from fastdpo.model.load import (
    load_causal_lm,
    load_in_pieces,
    save_policy,
    weights_digest,
)
from fastdpo.model.merge import save_merged, save_merged_in_place
from fastdpo.model.pieces import Trace, dtensor_like, gathered, is_sharded
from fastdpo.model.prepare import layout_of, prepare_model
from fastdpo.model.save import save_made
from fastdpo.model.shard import shard

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
    for _, name, tensor, _ in pieces._places:  # any rows of any parameter
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


@pytest.mark.parametrize("own", [False, True], ids=["in place", "own tensor"])
def test_what_cannot_be_noted(own, tmp_path):
    start = str(tiny.save_tiny(tiny.QWEN, tmp_path / "start"))
    tokenizer = tiny.build_tokenizer()
    with not_noted(own):
        whole = load_causal_lm(start)
        model, pieces = load_in_pieces(start)
        pieces.fill(torch.device("cpu"))
        assert weights_digest(model) == weights_digest(whole)
        if not own:  # in place they would be doubled again in the model that is saved
            return
        made = {name: lambda x=x: x for name, x in whole.state_dict().items()}
        save_policy(whole, tokenizer, tmp_path / "whole")
        save_made(model, made, tokenizer, tmp_path / "made")
    assert files(tmp_path / "made") == files(tmp_path / "whole")


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


def test_what_is_made_for_other_processes_leaves_nothing_here():
    trace, reads = Trace(), []
    with trace:
        x = trace.source((4, 3), torch.float32, lambda rows: reads.append(rows) or torch.ones(4, 3))
        y = torch.cat([x, x.clone()]).t().contiguous()
    trace.hollow = True
    made = trace.value(y)
    assert made.is_meta and made.shape == (3, 8) and reads == [None]


@pytest.fixture
def fake_group():
    """One process that stands for two, and exchanges nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_rows_of_a_gpu_that_are_offloaded_stay_in_cpu_memory(fake_group):
    """The model runs on the GPU all the same."""
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    whole, local = torch.empty(5, 2, device="meta"), torch.ones(2, 2)
    mesh = DeviceMesh("cuda", [0, 1], _init_backend=False, _rank=1)
    meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
    spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=meta)
    like = DTensor(torch.empty(2, 2, device="meta"), spec, requires_grad=False)  # type: ignore[call-arg]
    rows = dtensor_like(like, local)
    assert rows.shape == whole.shape and rows._local_tensor is local
    model = nn.Linear(2, 5, bias=False)
    model._parameters["weight"] = nn.Parameter(rows)
    assert device_of(model) == torch.device("cuda")


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
    assert weights_digest(model) == (digest if rank == 0 else "")
    whole = lora(whole) if peft else whole
    assert not any(map(is_sharded, whole.parameters()))
    for (name, x), (other, y) in zip(model.named_parameters(), whole.named_parameters()):
        assert name == other and x.requires_grad == y.requires_grad, name
        assert is_sharded(x) and torch.equal(gathered(x), y), name
    ties = [[n for n, _ in m.named_parameters()] for m in (model, whole)]
    assert ties[0] == ties[1]

    # The proof leaves parameters sharded, and what it computes with them is what they were.
    prepare_model(model, gradient_checkpointing=True)
    assert all(map(is_sharded, model.parameters()))
    batch = pack_pairs([TokenizedPair([5, 6, 7], [8, 9, 10, 11], [12, 13])])
    plain = prepare_model(whole, gradient_checkpointing=True)
    with torch.no_grad():
        hidden = [head.packed_forward(m, batch, lambda h_TD, **_: h_TD) for m in (model, plain)]
    found, wanted = hidden
    assert torch.equal(found, wanted)
    # After a forward that leaves some gathered.
    assert weights_digest(model) == (digest if rank == 0 else "")

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


def mesh_of(world: int, *, copies: bool = True) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    if world < 4 or not copies:
        return init_device_mesh("cpu", (world,))
    return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copy", "part"))


def all_cases(rank, world, folder) -> None:
    logging.disable(logging.WARNING)
    mesh = mesh_of(world)
    with not_noted(own=True):
        case(rank, mesh, folder, "QWEN", torch.float32, False, False)
    for family in ("LLAMA", "QWEN", "GEMMA3", "MIXTRAL"):
        for dtype, peft in ((torch.float32, False), (torch.bfloat16, True)):
            case(rank, mesh, folder, family, dtype, peft, offload=family == "QWEN")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])  # 4: two copies, each on two
def test_several_processes(world, tmp_path):
    for family in ("LLAMA", "QWEN", "GEMMA3", "MIXTRAL"):
        tiny.save_tiny(getattr(tiny, family), tmp_path / family)
    on_ranks(world, all_cases, world, tmp_path)


def full(rank, folder) -> list[str]:
    """No process but one can write, the second beside what is for nothing."""
    logging.disable(logging.WARNING)
    model, told = tiny.LLAMA.build(320), []
    shard(model, mesh_of(2))
    for one, target in ((1, "tempfile.TemporaryDirectory"), (0, "fastdpo.storage.begin_directory")):
        error = OSError(28, "No space left on device", "it")
        patch = mock.patch(target, side_effect=error) if rank == one else nullcontext()
        with patch, pytest.raises((OSError, DataError)) as raised:
            save_policy(model, tiny.build_tokenizer(), folder / "policy")
        told.append(str(raised.value))
        assert not (folder / "policy").exists()
    save_policy(model, tiny.build_tokenizer(), folder / "policy")
    return told


@pytest.mark.slow
def test_a_disk_that_is_full_on_one_process_ends_all(tmp_path):
    for first, second in zip(*on_ranks(2, full, tmp_path)):
        assert "[Errno 28] No space left on device: 'it'" in first and "[Errno 28]" in second
    assert (tmp_path / "policy" / "model.safetensors").is_file()


# ----------------------------------------------------------------------------------- the proof
def noisy(model: Any) -> None:
    """Draws random numbers whatever its mode is."""
    model.model.layers[1].mlp.register_forward_hook(lambda _, __, out: out + torch.rand_like(out))


def other_logits(model: Any) -> None:
    plain = model.forward

    def forward(*args, **kwargs):
        found = plain(*args, **kwargs)
        found.logits = found.logits.sin()
        return found

    model.forward = forward


def no_segments(model: Any) -> None:
    """Fails in the middle of a forward on packed pairs."""

    def refuse(_, __, kwargs):
        if kwargs.get("segments") is not None:
            raise RuntimeError("this layer takes no segments")

    model.model.layers[1].register_forward_pre_hook(refuse, with_kwargs=True)


def tied(model: Any) -> None:
    model.lm_head.weight = model.get_input_embeddings().weight


def nothing(model: Any) -> None:
    pass


def proven(family: str, change: Any, mesh: Any, **options: Any) -> tuple[str, Any]:
    """The layout that is found, or the error; and the hidden states of a pair, in it."""
    torch.manual_seed(0)
    model = getattr(tiny, family).build(320)
    change(model)
    batch = None
    if mesh is not None:
        head.attach(model)
        shard(model, mesh, bf16=options.get("bf16", False))
    try:
        prepare_model(model, **options)
    except ModelError as error:
        return str(error), None
    assert mesh is None or all(map(is_sharded, model.parameters()))
    layout = layout_of(model)
    batch = pack_pairs([TokenizedPair([5, 6, 7], [8, 9, 10, 11], [12, 13])], layout=layout)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=options.get("bf16", False)):
        return layout.key, head.packed_forward(model, batch, lambda h_TD, **_: h_TD)


def proofs(rank, world) -> None:
    logging.disable(logging.WARNING)
    mesh = mesh_of(world)
    for family, change, options in (
        ("LLAMA", noisy, {}),
        ("LLAMA", other_logits, {}),
        ("LLAMA", no_segments, {}),
        ("LLAMA", no_segments, {"layout": "packed"}),
        ("MAMBA", nothing, {}),
        ("MAMBA", nothing, {"layout": "shared"}),
        ("OPT", nothing, {"gradient_checkpointing": True}),
        ("QWEN2_MOE", nothing, {}),
        ("LLAMA", nothing, {"mlp_tile_tokens": 4, "activation_offloading": True}),
        ("GEMMA", nothing, {"bf16": True}),
        ("QWEN2_MOE", nothing, {"bf16": True}),
        ("QWEN2_MOE", tied, {"bf16": True}),
    ):
        wanted, hidden = proven(family, change, None, **options)
        found, cut = proven(family, change, mesh, **options)
        assert found == wanted, (family, change.__name__, found, wanted)
        if hidden is not None and not options.get("bf16"):
            assert torch.equal(hidden, cut), (family, change.__name__)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2])
def test_proofs(world):
    on_ranks(world, proofs, world)


# --------------------------------------------------------------------------------------- memory
def resident() -> float:
    """MiB of this process's memory, without pages of files, which the system has for all."""
    text = Path("/proc/self/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+) kB", text)[0]) / 2**10


def added(work: Any) -> tuple[Any, float]:
    """What ``work`` gives, and the most MiB that it adds to what is there before."""
    gc.collect()
    before, done, seen = resident(), threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        found = work()
    finally:
        done.set()
        thread.join()
    return found, max(seen) - before


def loaded(rank, world, small, large) -> tuple[float, float, float, float]:
    """MiB that loading, the digest and saving add, and those of the process's own parameters."""
    logging.disable(logging.WARNING)
    mesh, tokenizer = mesh_of(world, copies=False), tiny.build_tokenizer()

    def load() -> Any:
        model, pieces = load_in_pieces(str(start))
        head.attach(model)
        shard(model, mesh)
        pieces.fill(torch.device("cpu"))
        return model

    found: list[Any] = []
    for start in (small, large):  # the first one for what imports take
        model, loading = added(load)
        _, digest = added(lambda model=model: weights_digest(model))
        saved = start.with_suffix(".saved")
        _, saving = added(lambda model=model, out=saved: save_policy(model, tokenizer, out))
        found = [loading, digest, saving, sum(p.to_local().nbytes for p in model.parameters())]
    return found[0], found[1], found[2], found[3] / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's counters")
def test_no_process_has_the_whole(tmp_path):
    """Each reads its rows alone; what is gathered to be saved is a tensor at a time."""
    small = tiny.save_tiny(tiny.LLAMA, tmp_path / "small")
    wide = tiny._family(
        "wide", "LlamaConfig", hidden_size=512, intermediate_size=1408, num_hidden_layers=24
    )
    large = tiny.save_tiny(wide, tmp_path / "large")
    whole = (large / "model.safetensors").stat().st_size / 2**20
    found = on_ranks(4, loaded, 4, small, large)
    print(f"{whole:.0f} MiB of weights: {found}")
    for rank, (loading, digest, saving, own) in enumerate(found):
        assert own == pytest.approx(whole / 4, rel=0.05)
        assert loading < 1.5 * own, rank
        assert digest < own and (saving < own or rank == 0), rank
    assert (
        files(large.with_suffix(".saved"))["model.safetensors"] == files(large)["model.safetensors"]
    )
