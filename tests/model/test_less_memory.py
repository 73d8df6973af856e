"""Tiled MLPs, offloaded activations and Liger's kernels: same numbers, less memory, one model."""

import contextlib
import copy
import gc
import importlib
import inspect
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from tiny import BLOOM, GEMMA, LLAMA, MISTRAL, MIXTRAL, OLMO2, OPT, PHI, QWEN, _family
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo import linear_logp
from fastdpo.data.batch import pack_pairs
from fastdpo.data.examples import TokenizedPair
from fastdpo.errors import ModelError
from fastdpo.model import liger, offload, tiling
from fastdpo.model.liger import use_liger
from fastdpo.model.offload import _Moved, _Offload, offload_activations
from fastdpo.model.prepare import checkpoint_activations, packed_loss, prepare_model
from fastdpo.model.tiling import tile_mlp

GEMMA3 = _family("gemma3_text", "Gemma3TextConfig", sliding_window=8, query_pre_attn_scalar=8)
QWEN2 = _family("qwen2", "Qwen2Config")
PHI3 = _family("phi3", "Phi3Config", partial_rotary_factor=0.5)
SHARED_EXPERT = _family(
    "qwen2_moe", "Qwen2MoeConfig", num_experts=4, moe_intermediate_size=16,
    shared_expert_intermediate_size=48, decoder_sparse_step=2,
)  # fmt: skip
TILED = [LLAMA, QWEN, GEMMA3, PHI, MISTRAL, OLMO2, PHI3]
LIGER = [LLAMA, MISTRAL, QWEN2, QWEN, PHI3, OLMO2, GEMMA, GEMMA3]
VOCAB, INNER = 40, 48  # INNER is the MLPs' width
ON_GPU = torch.cuda.is_available()
IDS = torch.arange(2 * 11).reshape(2, 11) * 7 % VOCAB

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")]


def by_name(family):
    return family.name


def build(family, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = family.build(VOCAB)
    for name, p in model.named_parameters():
        if "norm" in name:  # they are born as ones or zeros, which hides what is done with them
            nn.init.normal_(p, 0.5, 0.2)
    return model.to(dtype).train()


def passes(model, ids=IDS, context: Callable[[], Any] = contextlib.nullcontext):
    """Logits, and the gradients of a function of them by every trained parameter."""
    model.zero_grad()
    with context():
        logits = model(ids.to(next(model.parameters()).device), use_cache=False).logits
        loss = (logits.float() if logits.dtype == torch.bfloat16 else logits).sin().sum()
    loss.backward()
    named = model.named_parameters()
    return logits.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_near(found, wanted, tolerance):
    """Logits and gradients alike but for ``tolerance`` of their size."""
    assert found[1].keys() == wanted[1].keys() and wanted[1]
    for name, x, y in [("logits", found[0], wanted[0])] + [
        (name, found[1][name], wanted[1][name]) for name in wanted[1]
    ]:
        error = (x - y).norm() / y.norm().clamp_min(1e-3)
        assert error < tolerance, f"{name}: {error:.2g}"


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=3, target_modules=targets))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model


# ----------------------------------------------------------------------------------- MLPs in tiles
# fp64 carries 16 digits; two hundred roundings leave more than 12 of them.
FP64 = 1e-12


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", TILED, ids=by_name)
def test_tiles_change_neither_values_nor_gradients(family, checkpointing):
    model = build(family)
    wanted = passes(model)
    assert tile_mlp(model, 5) == 2  # of 22 tokens: the last tile is smaller
    if checkpointing:
        checkpoint_activations(model)
    assert_near(passes(model), wanted, FP64)
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    assert (logits - wanted[0]).abs().max() < 1e-10


def test_tiles_with_lora():
    model = with_lora(build(LLAMA))
    wanted = passes(model)
    assert any("down_proj.lora_A" in name for name in wanted[1])
    assert tile_mlp(model, 4) == 2
    assert_near(passes(model), wanted, FP64)


def test_tiles_under_autocast():
    model = build(LLAMA, torch.float32)

    def bf16():
        return torch.autocast("cpu", torch.bfloat16)

    wanted = passes(model, context=bf16)
    tile_mlp(model, 5)
    # A sum over 22 tokens is rounded to bf16 once a tile instead of once: some units of 2^-9.
    assert_near(passes(model, context=bf16), wanted, 0.02)


def test_gradients_accumulate_over_micro_batches():
    model = build(LLAMA)
    wanted = {name: 2 * grad for name, grad in passes(model)[1].items()}
    tile_mlp(model, 5)
    model.zero_grad()
    for _ in range(2):
        model(IDS, use_cache=False).logits.sin().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert_near((torch.ones(1), found), (torch.ones(1), wanted), FP64)


class Widest(TorchDispatchMode):
    """The most rows of any tensor as wide as the MLP's inside, and how many products were made."""

    def __init__(self):
        super().__init__()
        self.rows = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.products += 1
        weight_rows = {32, INNER}  # (intermediate, hidden) and its transpose are weights
        if isinstance(out, torch.Tensor) and out.ndim and out.shape[-1] == INNER:
            rows = out.numel() // INNER
            if rows not in weight_rows:
                self.rows = max(self.rows, rows)
        return out


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_inner_activation_has_more_rows_than_a_tile(checkpointing):
    ids = torch.arange(2 * 40).reshape(2, 40) % VOCAB

    def widest(model):
        if checkpointing:
            checkpoint_activations(model)
        with Widest() as seen:
            model(ids, use_cache=False).logits.sum().backward()
        return seen.rows

    model = build(LLAMA)
    assert widest(copy.deepcopy(model)) == 80
    tile_mlp(model, 7)
    assert widest(model) == 7


def test_inner_activations_live_for_one_tile_only():
    """Nothing of the MLP's inner width is saved by the forward: all is computed again."""
    model = build(LLAMA)
    tile_mlp(model, 7)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda x: x):
        model(IDS, use_cache=False).logits.sum()
    assert saved and not [x for x in saved if x.shape[-1] == INNER and x.shape[0] != 32]


def test_tiles_without_gradients_are_not_checkpointed(monkeypatch):
    model = build(LLAMA)
    tile_mlp(model, 5)
    with torch.no_grad():
        wanted = model(IDS, use_cache=False).logits

    def refuse(*args, **kwargs):
        raise AssertionError("checkpointed")

    monkeypatch.setattr(tiling, "checkpoint", refuse)
    with torch.no_grad():
        assert torch.equal(model(IDS, use_cache=False).logits, wanted)
    with pytest.raises(AssertionError, match="checkpointed"):
        model(IDS, use_cache=False)


def test_tiles_stay_on_one_model_and_follow_a_deep_copy():
    model, other = build(LLAMA), build(LLAMA)
    plain = type(model.model.layers[0].mlp).forward
    tile_mlp(model, 5)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.model.layers[0].mlp.down_proj.weight)
    nn.init.zeros_(twin.model.layers[1].mlp.down_proj.weight)
    assert type(model.model.layers[0].mlp).forward is plain
    assert "forward" not in vars(other.model.layers[0].mlp)
    assert not torch.allclose(passes(twin)[0], passes(model)[0])
    assert_near(passes(model), passes(other), FP64)
    wanted = copy.deepcopy(other)
    wanted.load_state_dict(twin.state_dict())
    assert_near(passes(twin), passes(wanted), FP64)
    assert passes(twin)[1]["model.layers.0.mlp.down_proj.weight"].abs().max() > 0


def test_a_second_call_changes_the_tile():
    model = build(LLAMA)
    mlp = model.model.layers[0].mlp
    calls = []
    mlp.gate_proj.register_forward_hook(lambda module, inputs, out: calls.append(out.shape[1]))
    tile_mlp(model, 5)
    assert tile_mlp(model, 10) == 2
    passes(model)
    # The forward, and again in the backward, where autograd takes the last tile of a layer first.
    assert calls == [10, 10, 2, 2, 10, 10]


def test_mixtures_of_experts_are_left_alone():
    assert tile_mlp(build(SHARED_EXPERT), 5) == 1  # every second layer is dense
    with pytest.raises(ModelError, match=r"^MixtralForCausalLM has no dense MLP .* leave tile_mlp"):
        tile_mlp(build(MIXTRAL), 5)


@pytest.mark.parametrize("family", [OPT, BLOOM], ids=by_name)
def test_models_whose_mlp_is_no_module_of_one_input_are_refused(family):
    """OPT's layer holds the linears itself; BLOOM's MLP takes the residual too."""
    with pytest.raises(ModelError, match="has no dense MLP"):
        tile_mlp(build(family), 5)


@pytest.mark.parametrize("tile", [0, -3, 2.5, True, "8"])
def test_bad_tiles_are_refused(tile):
    with pytest.raises(ModelError, match=r"tile_tokens=.* must be a positive integer"):
        tile_mlp(build(LLAMA), tile)


# ----------------------------------------------------------------------- activations in host memory
class Pretend(_Offload):
    """Takes tensors on the CPU for a GPU's, and keeps account."""

    def __init__(self):
        self.moved, self.kept = [], []

    def on_device(self, tensor):
        return True

    def pack(self, tensor):
        packed = super().pack(tensor)
        (self.moved if isinstance(packed, _Moved) else self.kept).append(tensor)
        if isinstance(packed, _Moved):
            assert packed.host_E.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
        return packed

    def hooks(self):
        return saved_tensors_hooks(self.pack, self.unpack)


@pytest.fixture
def tiny_limit(monkeypatch):
    monkeypatch.setattr(offload, "_MIN_BYTES", 1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_offloading_keeps_every_bit(checkpointing, inside, tiny_limit):
    model = build(LLAMA, torch.float32)
    if checkpointing:
        checkpoint_activations(model)
    wanted = passes(model)
    offload = Pretend()
    if inside:
        with offload.hooks():
            found = passes(model)
    else:
        found = passes(model, context=offload.hooks)
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(found[1][name], grad) for name, grad in wanted[1].items())
    assert offload.moved
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not [x for x in offload.moved if x.untyped_storage().data_ptr() in owned]


def test_offloading_moves_the_layers_inputs_under_checkpointing(tiny_limit):
    model = build(LLAMA, torch.float32)
    checkpoint_activations(model)
    inputs = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    offload = Pretend()
    with offload.hooks():
        h = model.model(IDS, use_cache=False).last_hidden_state
    moved = [x for x in offload.moved if x.shape == (2, 11, 32)]
    assert len(inputs) == 2 and len(moved) < 6
    for x in inputs:
        assert any(y.data_ptr() == x.data_ptr() for y in moved)
    assert not [x for x in offload.moved if x.shape[-1] == INNER]  # recomputed, not saved
    h.sum().backward()


def test_offloading_with_tiles_and_checkpointing(tiny_limit):
    model = build(LLAMA)
    wanted = passes(model)
    tile_mlp(model, 5)
    checkpoint_activations(model)
    offload = Pretend()
    assert_near(passes(model, context=offload.hooks), wanted, FP64)
    assert offload.moved


def test_offloading_leaves_parameters_small_tensors_and_the_cpu_alone():
    weight, frozen = nn.Parameter(torch.randn(256, 256)), nn.Linear(256, 256).requires_grad_(False)
    x = torch.randn(300, 256, requires_grad=True) * 1
    offload = Pretend()
    with offload.hooks():
        y = frozen(x @ weight.T)
        z = torch.nn.functional.linear(y[None], weight) * weight[:1, :1] * weight.view(-1)[:256]
        small = (z[0, :10] ** 2).sum()
        with torch.autocast("cpu", torch.bfloat16):
            low = torch.nn.functional.linear(z, weight)
    (small + low.sum()).backward()
    rows = sorted(x.numel() // 256 for x in offload.moved)
    assert rows and all(n == 300 for n in rows)  # x, x @ weight.T and the like
    assert len(rows) == 5  # x, y, both products of z, and z in bf16
    assert any(x.shape == (10, 256) for x in offload.kept)  # 10 KiB
    kept = [x for x in offload.kept if x.numel() == 256 * 256]
    assert len(kept) == 4  # three times a weight, and autocast's copy
    assert not _Offload().moves(x.detach())  # on the CPU
    assert Pretend().moves(x.detach()) and Pretend().moves(x.detach()[:64])
    assert not Pretend().moves(x.detach()[:63])
    assert not Pretend().moves(x.detach().to_sparse())
    assert not Pretend().moves(torch.randn(9).expand(10**5, 9))  # 36 bytes of memory


def test_offloading_leaves_the_weight_of_the_fused_head_alone():
    h, weight = torch.randn(200, 128, requires_grad=True), nn.Parameter(torch.randn(300, 128))
    target = torch.arange(200)
    linear_logp(h * 1, weight, target).sum().backward()
    wanted, weight.grad = weight.grad, None
    assert wanted is not None
    offload = Pretend()
    with offload.hooks():
        loss = linear_logp(h * 1, weight, target).sum()
    loss.backward()
    assert weight.grad is not None and torch.equal(weight.grad, wanted)
    assert [x.shape for x in offload.moved] == [(200, 128)]


def strided_cases():
    x = torch.randn(40, 60)
    wide = torch.randn(4, 6, 50)
    yield "plain", x, 2400
    yield "transposed", x.T, 2400
    yield "permuted", wide.permute(2, 0, 1), 1200
    yield "rows", x[10:30], 1200
    yield "columns", x[:, 5:25], 800  # gaps are not moved
    yield "steps", x[::2, ::3], 400
    yield "expanded", x[:, :1].expand(40, 60), 40
    yield "expanded columns", x[None, :, 7:9].expand(3, 40, 2), 80
    yield "expanded rows", x[:1].expand(40, 60), 60
    yield "windows", x.view(-1).unfold(0, 50, 10), 2400
    yield "scalar", x[3, 4], 1
    yield "bf16", x.bfloat16().T, 2400
    yield "bool", x > 0, 2400
    yield "int64", torch.arange(99), 99


@pytest.mark.parametrize(
    ("tensor", "elements"), [pytest.param(x, n, id=name) for name, x, n in strided_cases()]
)
def test_offloading_restores_a_tensor_as_it_was(tensor, elements, tiny_limit):
    offload, before = Pretend(), tensor.clone()
    packed = offload.pack(tensor)
    assert isinstance(packed, _Moved) and packed.host_E.numel() == elements
    found = offload.unpack(packed)
    assert torch.equal(found, before) and found.dtype == tensor.dtype
    assert found.stride() == tensor.stride() and found.shape == tensor.shape
    found.as_strided((1,), (1,)).fill_(1)  # kernels may overwrite what they saved
    assert torch.equal(offload.unpack(packed), before)


def test_offloading_releases_what_it_moved(tiny_limit):
    """The graph holds no reference to the tensor itself."""
    x = torch.randn(30, 30, requires_grad=True) * 2
    freed, offload = [], Pretend()
    with offload.hooks():
        inner = x * 3
        loss = (inner**2).sum()

    class Guard:
        def __del__(self):
            freed.append(1)

    holder: Any = inner
    holder.guard = Guard()  # lives as long as the tensor's Python object
    del inner, holder
    offload.moved.clear()
    gc.collect()
    assert freed
    loss.backward()


def test_offloading_disabled_does_nothing():
    assert isinstance(offload_activations(enabled=False), contextlib.nullcontext)
    assert isinstance(offload_activations(), saved_tensors_hooks)
    model = build(LLAMA)
    wanted = passes(model)
    assert_near(passes(model, context=offload_activations), wanted, 1e-15)


# ---------------------------------------------------------------------------------- Liger's kernels
@pytest.fixture
def interpreted(monkeypatch):
    """Liger's kernels in Triton's interpreter, which lacks some of what they use."""
    pytest.importorskip("liger_kernel")
    if ON_GPU or not liger.is_interpreted():
        pytest.skip("needs Triton's interpreter")
    import triton.language as tl
    from triton.runtime import interpreter

    for name, function, ours in [
        ("rms_norm", "rsqrt", lambda x: 1 / tl.sqrt(x)),
        ("geglu", "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1),
    ]:
        module = importlib.import_module(f"liger_kernel.ops.{name}")
        monkeypatch.setattr(module, function, ours)
    original = interpreter.GridExecutor._init_args_hst

    # A float is an fp32 scalar on a GPU; the interpreter passes Python's, which has no ``.to``.
    def arguments(self, args_dev, kwargs):
        args, named = original(self, args_dev, kwargs)
        return [scalar(x) for x in args], {name: scalar(x) for name, x in named.items()}

    def scalar(x):
        if type(x) is not float:
            return x
        return tl.tensor(
            interpreter.TensorHandle(np.array([x], np.float32), tl.float32), tl.float32
        )

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", arguments)


def kernels_of(calls):
    """Names of the Triton kernels launched, recorded by `count_kernels`."""
    return {name: calls.count(name) for name in dict.fromkeys(calls)}


@pytest.fixture
def launched(interpreted, monkeypatch):
    from triton.runtime import interpreter

    calls, original = [], interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        calls.append(self.fn.__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    return calls


# Norms of two layers and the last one: two a layer, four of Gemma, and those of queries and keys.
NORMS = {"qwen3": 9, "olmo2": 9, "gemma2": 9, "gemma3_text": 13}
# Every operation rounds to fp32 some hundred times over.
FP32 = 200 * 2.0**-24


@pytest.mark.parametrize("family", LIGER, ids=by_name)
def test_liger_computes_what_the_model_did(family, launched):
    from liger_kernel.ops import rope

    model = build(family, torch.float32)
    if family is PHI3 and "rotary_dim" not in inspect.signature(rope.rope_forward).parameters:
        # This Liger rotates whole heads only.
        with pytest.raises(ModelError, match="use_liger_kernel"):
            prepare_model(model, use_liger_kernel=True)
        return
    wanted = passes(model)
    assert not launched
    gate = "geglu" if family.name.startswith("gemma") else "swiglu"
    assert use_liger(model) == ["rms_norm", "rope", gate]
    assert_near(passes(model), wanted, FP32)
    kernel = "_geglu_tanh" if gate == "geglu" else "_swiglu"
    norms = NORMS.get(family.name, 5)
    assert kernels_of(launched) == {
        "_rms_norm_forward_kernel": norms, "_rms_norm_backward_kernel": norms,
        "_triton_rope": 4, f"{kernel}_forward_kernel": 2, f"{kernel}_backward_kernel": 2,
    }  # fmt: skip


@pytest.mark.parametrize("first", ["tile_mlp", "use_liger"])
def test_liger_with_tiles_checkpointing_and_lora(first, launched):
    model = with_lora(build(LLAMA, torch.float32))
    wanted = passes(model)
    for step in sorted(["tile_mlp", "use_liger"], key=lambda x: x != first):
        assert use_liger(model) if step == "use_liger" else tile_mlp(model, 12) == 2
    assert use_liger(model) and tile_mlp(model, 12) == 2  # again, which changes nothing
    checkpoint_activations(model)
    model.enable_input_require_grads()
    assert_near(passes(model), wanted, FP32)
    # Two tiles a layer: the forward, its recomputation up to the last tile, and each tile's own.
    assert kernels_of(launched)["_swiglu_forward_kernel"] >= 2 * 2 * 2
    assert kernels_of(launched)["_swiglu_backward_kernel"] == 2 * 2


@pytest.mark.parametrize("family", [LLAMA, GEMMA], ids=by_name)
def test_packed_pairs_with_everything(family, launched, tiny_limit):
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(VOCAB, (n,), generator=generator).tolist()

    batch = pack_pairs([TokenizedPair(ids(7), ids(5), ids(9)) for _ in range(2)])

    def step(model, context: Callable[[], Any] = contextlib.nullcontext):
        with context():
            result = packed_loss(model, batch, torch.full((4,), -30.0), beta=0.1, alpha=0.02)
        result.loss.backward()
        return result.logp_S, {name: p.grad for name, p in model.named_parameters()}

    model = build(family, torch.float32)
    prepare_model(model, gradient_checkpointing=True)
    wanted = step(copy.deepcopy(model))
    assert not launched
    assert tile_mlp(model, 8) == 2 and use_liger(model)
    offload = Pretend()
    assert_near(step(model, offload.hooks), wanted, 4 * FP32)  # the loss adds its own roundings
    assert launched and offload.moved


def test_liger_stays_on_one_model_and_follows_a_deep_copy(interpreted):
    model, other = build(LLAMA, torch.float32), build(LLAMA, torch.float32)
    wanted = passes(other)
    modeling = sys.modules[type(model).__module__]
    before, classes = dict(vars(modeling)), {}
    for name in ("LlamaRMSNorm", "LlamaMLP", "LlamaAttention", "LlamaForCausalLM"):
        classes[name] = dict(vars(getattr(modeling, name)))
    use_liger(model)
    assert dict(vars(modeling)) == before
    assert modeling.apply_rotary_pos_emb.__module__ == modeling.__name__
    for name, members in classes.items():
        assert dict(vars(getattr(modeling, name))) == members
    assert not [name for name, module in other.named_modules() if "forward" in vars(module)]
    found = passes(other)
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(found[1][name], grad) for name, grad in wanted[1].items())
    twin = copy.deepcopy(model)
    for p in model.parameters():
        nn.init.zeros_(p)
    assert_near(passes(twin), wanted, FP32)
    assert all(module.forward.__self__ is module for module in twin.modules())


def test_liger_rounds_olmo_as_transformers_does():
    """In bf16 the order of rounding and multiplying shows; which one each family takes."""
    assert {name: family.casting for name, family in liger._LIGER.items()} == {
        "llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "llama", "phi3": "llama",
        "olmo2": "gemma", "gemma2": "gemma", "gemma3_text": "gemma",
    }  # fmt: skip
    for family in LIGER:
        norm = build(family, torch.bfloat16).base_model.norm
        x = torch.randn(300, 32, dtype=torch.bfloat16)
        x_32 = x.float()
        x_32 = x_32 * torch.rsqrt(x_32.square().mean(-1, keepdim=True) + 1e-6)
        known = liger._LIGER[family.name]
        if known.casting == "llama":
            wanted = x_32.bfloat16() * norm.weight
        else:
            wanted = (x_32 * (known.offset + norm.weight.float())).bfloat16()
        # fp32 sums of another order round a few elements the other way; the other order, a quarter.
        assert (norm(x) == wanted).float().mean() > 0.99


def test_liger_refuses_families_it_does_not_know(interpreted):
    with pytest.raises(ModelError, match=r"model_type='phi' .*llama, .*olmo2.*gemma3_text"):
        use_liger(build(PHI))


def test_liger_refuses_other_activations(interpreted):
    model = build(_family("llama", "LlamaConfig", hidden_act="gelu"))
    with pytest.raises(
        ModelError, match=r"activation 'gelu' of this llama model.*\(silu or swish\)"
    ):
        use_liger(model)


def test_liger_refuses_the_cpu(monkeypatch):
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr(liger, "is_interpreted", lambda: False)
    with pytest.raises(ModelError, match=r"the model is on device 'cpu'.*move it to a GPU"):
        use_liger(build(LLAMA))


def test_liger_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'fastdpo\[liger\]'"):
        use_liger(build(LLAMA))


def test_liger_refuses_forwards_that_something_else_replaced(interpreted):
    model = build(LLAMA)
    attention = model.model.layers[1].self_attn
    attention.forward = attention.forward
    with pytest.raises(ModelError, match="forward of a LlamaAttention was replaced already"):
        use_liger(model)
    assert "forward" not in vars(model.model.norm)  # nothing was changed


class Counting:
    """Calls of a function, which stay what they were."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


def test_patches_of_others_hold_beside_ligers_rope(interpreted, monkeypatch):
    model = build(LLAMA, torch.float32)
    model.set_attn_implementation("eager")
    modeling = sys.modules[type(model).__module__]
    eager = Counting(modeling.eager_attention_forward)
    rope = Counting(modeling.apply_rotary_pos_emb)
    monkeypatch.setattr(modeling, "eager_attention_forward", eager)
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", rope)
    wanted = passes(model)
    assert (eager.calls, rope.calls) == (2, 2)
    use_liger(model)
    assert_near(passes(model), wanted, FP32)
    assert (eager.calls, rope.calls) == (4, 2)


@pytest.mark.parametrize("how", ["its class", "its forward", "its rope"])
def test_liger_refuses_attention_that_is_not_of_transformers(how, interpreted, monkeypatch):
    model = build(LLAMA)
    attention = type(model.model.layers[0].self_attn)
    if how == "its class":
        model.model.layers[1].self_attn.__class__ = type("LlamaAttention", (attention,), {})
    elif how == "its forward":
        monkeypatch.setattr(attention, "forward", lambda self, *args, **kwargs: args)
    else:
        monkeypatch.delattr(sys.modules[attention.__module__], "apply_rotary_pos_emb")
    with pytest.raises(ModelError, match=r"LlamaAttention\.forward of .* is not the one that tran"):
        use_liger(model)
    assert "forward" not in vars(model.model.norm)  # nothing was changed


# -------------------------------------------------------------------------------------- on a GPU
GPU_MODEL = _family(
    "llama", "LlamaConfig", hidden_size=512, intermediate_size=4096, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=16384,
    initializer_range=0.02,
)  # fmt: skip


def gpu_pass(model, context: Callable[[], Any] = contextlib.nullcontext, tokens=8192):
    """Gradients of the body, and the most memory used above what was there before."""
    ids = torch.arange(tokens, device="cuda")[None] % VOCAB
    model.zero_grad(set_to_none=False)  # gradients that come and go would hide the peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with context(), torch.autocast("cuda", torch.bfloat16):
        h = model.model(ids, use_cache=False).last_hidden_state
    h.float().square().mean().backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return peak, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class TestOnGpu:
    pytestmark = needs_gpu

    def build(self, family=GPU_MODEL):
        return build(family, torch.float32).cuda()

    def test_offloading(self):
        model = self.build()
        checkpoint_activations(model)
        gpu_pass(model)
        peak, wanted = gpu_pass(model)
        offloaded, found = gpu_pass(model, offload_activations)
        # Attention's backward adds in an order that varies; bits are compared on the CPU.
        for name, grad in wanted.items():
            assert (found[name] - grad).norm() < 0.01 * grad.norm(), name
        # Eight layers' inputs in fp32, of which one or two are on the device at a time.
        assert peak - offloaded > 5 * 8192 * 512 * 4

    def test_tiles(self):
        model = self.build()
        checkpoint_activations(model)
        gpu_pass(model)
        peak, wanted = gpu_pass(model)
        tile_mlp(model, 1024)
        tiled, found = gpu_pass(model)
        for name, grad in wanted.items():
            assert (found[name] - grad).norm() < 0.02 * grad.norm(), name
        # At least gate, up and their product, in bf16, less those of a tile.
        assert peak - tiled > 3 * (8192 - 1024) * 4096 * 2

    @pytest.mark.parametrize("family", LIGER, ids=by_name)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_liger(self, family, dtype):
        """The median of three models: a small random one can turn one rounding into a fifth."""
        pytest.importorskip("liger_kernel")
        errors: dict[str, list[list[float]]] = {}
        for seed in range(3):
            model = build(family, torch.float32, seed).cuda()
            gold = passes(model.double())
            model.to(dtype)
            plain = passes(model)
            assert use_liger(model)
            found = passes(model)
            named = {"logits": (plain[0], found[0], gold[0])}
            named |= {name: (plain[1][name], found[1][name], x) for name, x in gold[1].items()}
            for name, (*both, y) in named.items():
                size = y.norm().clamp_min(1e-3)
                sides = errors.setdefault(name, [[], []])
                for side, x in zip(sides, both):
                    side.append(float((x.double() - y).norm() / size))
        floor = FP32 * 100 if dtype == torch.float32 else 0.02  # TF32 may be on
        for name, (plain, found) in errors.items():
            assert median(found) < 2 * median(plain) + floor, name
