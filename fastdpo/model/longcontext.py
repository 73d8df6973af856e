"""Less memory for long sequences: MLPs in tiles, activations in host memory, Liger's kernels.

Each changes one model instance, or what is saved inside a ``with`` block; classes and modules of
transformers stay as they are, and so do other models of the process.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from fastdpo.errors import ModelError
from fastdpo.kernels.device import is_gpu
from fastdpo.kernels.support import is_interpreted
from fastdpo.model.head import base_of

# ----------------------------------------------------------------------------------- MLPs in tiles
# Children by which an MLP is known: a first and the last linear layer.
_MLP_PARTS = (
    ("up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("fc1", "fc2"), ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)  # fmt: skip


def tile_mlp(model: nn.Module, tile_tokens: int) -> int:
    """Run each dense MLP of the decoder layers on ``tile_tokens`` tokens at a time.

    A tile is checkpointed, so activations of the MLP's inner width exist for one tile only, and the
    backward computes it again: one more forward of the MLP, two more inside gradient checkpointing.
    This is the TiledMLP of ALST (arXiv 2506.13996).  Gradients of the weights are summed over the
    tiles in the dtype the weights are multiplied in; with few tokens a tile that costs digits of
    bf16 as well as time.  Called again, it changes the tile; mixtures of experts are left alone.

    Returns:
        How many MLPs were found.

    Raises:
        ModelError: there is none, or ``tile_tokens`` is no positive number.
    """
    if type(tile_tokens) is not int or tile_tokens < 1:
        raise ModelError(f"tile_tokens={tile_tokens!r} must be a positive integer, such as 4096")
    mlps: list[Any] = list(_dense_mlps(model))
    if not mlps:
        raise ModelError(
            f"{type(model).__name__} has no dense MLP to tile (mixtures of experts are not tiled): "
            "leave tile_mlp out"
        )
    for mlp in mlps:
        if not hasattr(mlp, "_fastdpo_untiled"):
            mlp._fastdpo_untiled = mlp.forward
            # Bound, so that a deep copy of the model calls itself and not the original.
            mlp.forward = MethodType(_tiled_forward, mlp)
        mlp._fastdpo_tile_tokens = tile_tokens
    return len(mlps)


def _dense_mlps(module: nn.Module, in_layer: bool = False) -> Iterator[nn.Module]:
    """MLPs inside the elements of module lists; an element itself is a layer, whatever it holds."""
    for child in module.children():
        if hasattr(child, "experts") or hasattr(child, "router"):
            continue
        if in_layer and _is_mlp(child):
            yield child
        else:
            yield from _dense_mlps(child, in_layer or isinstance(module, nn.ModuleList))


def _is_mlp(module: nn.Module) -> bool:
    """Whether it has an MLP's linear layers and maps one tensor to another of that shape."""
    for names in _MLP_PARTS:
        first, last = (getattr(module, name, None) for name in names)
        if isinstance(first, nn.Module) and isinstance(last, nn.Module):
            break
    else:
        return False
    _, *inputs = inspect.signature(type(module).forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [x for x in inputs if x.kind in positional and x.default is inspect.Parameter.empty]
    same_width = getattr(first, "in_features", None) == getattr(last, "out_features", None)
    return len(needed) == 1 and same_width


def _tiled_forward(self: Any, hidden_BTD: Tensor) -> Tensor:
    rows_1ND = hidden_BTD.reshape(1, -1, hidden_BTD.shape[-1])
    tiles = rows_1ND.split(self._fastdpo_tile_tokens, dim=1)
    if torch.is_grad_enabled():
        parts = [checkpoint(self._fastdpo_untiled, tile, use_reentrant=False) for tile in tiles]
    else:
        parts = [self._fastdpo_untiled(tile) for tile in tiles]
    return torch.cat(parts, dim=1).view(hidden_BTD.shape)


# ----------------------------------------------------------------------- activations in host memory
_MIN_BYTES = 64 * 1024  # below, starting a copy costs more than the memory is worth


def offload_activations(enabled: bool = True) -> AbstractContextManager[Any]:
    """Keep what the forward saves for the backward in host memory; for use around the forward.

    The backward may run inside or outside.  Gradients keep their bits.  It is meant for gradient
    checkpointing, where one tensor a layer is saved: without it, a tensor that several operations
    save is moved once for each.  Parameters (also views of them and autocast's copies of trained
    ones), tensors under 64 KiB and those on the CPU stay where they are; autocast's copies of
    frozen fp32 weights are not recognized, so freeze them in bf16.  The copies are not overlapped
    with computation, and have not run on a device yet.  Pinned host buffers are rounded
    up to powers of two by PyTorch.
    """
    offload = _Offload()
    return saved_tensors_hooks(offload.pack, offload.unpack) if enabled else nullcontext()


def offload(model: Any) -> None:
    """Make a causal LM's body run within `offload_activations` from now on; its head does not."""
    body = base_of(model).base_model
    if not hasattr(body, "_fastdpo_kept_forward"):
        body._fastdpo_kept_forward = body.forward
        body.forward = MethodType(_forward_offloaded, body)


def _forward_offloaded(self: Any, *args: Any, **kwargs: Any) -> Any:
    with offload_activations():
        return self._fastdpo_kept_forward(*args, **kwargs)


class _Moved(NamedTuple):
    """A saved tensor in host memory: its elements (E,), and what they looked like."""

    host_E: Tensor
    device: torch.device
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Offload:
    """The two hooks.

    Both copies are queued on the current stream and the host waits for neither.  The stream's order
    makes that right: the copy to the host is queued behind the operation that made the tensor, and
    memory freed after it is reused behind it; the copy back is queued behind the first one, for
    autograd runs the backward of an operation on the stream of its forward, and ahead of its
    reader.  A pinned buffer is given out again only after the copies from it have ended, of which
    PyTorch's host allocator keeps account.
    """

    def on_device(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in the memory that is to be spared."""
        return is_gpu(tensor.device) and not tensor.is_meta

    def moves(self, tensor: Tensor) -> bool:
        """Whether a saved tensor goes to host memory."""
        return (
            self.on_device(tensor)
            and not is_traceable_wrapper_subclass(tensor)  # a DTensor is more than its memory
            and tensor.layout is torch.strided
            and _without_repeats(tensor).numel() * tensor.element_size() >= _MIN_BYTES
            and not _is_parameter(tensor)
        )

    def pack(self, tensor: Tensor) -> Tensor | _Moved:
        if not self.moves(tensor):
            return tensor
        values_E = _memory(tensor.detach())
        host_E = torch.empty(values_E.shape, dtype=tensor.dtype, pin_memory=is_gpu(tensor.device))
        host_E.copy_(values_E, non_blocking=True)
        return _Moved(host_E, tensor.device, tuple(tensor.shape), tensor.stride())

    def unpack(self, packed: Tensor | _Moved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        values_E = packed.host_E.to(packed.device, non_blocking=True, copy=True)
        if len(values_E) == _span(packed.shape, packed.stride):
            return values_E.as_strided(packed.shape, packed.stride)
        out = torch.empty_strided(
            packed.shape, packed.stride, dtype=values_E.dtype, device=packed.device
        )
        once = _without_repeats(out)
        once.copy_(values_E.view(once.shape))
        return out


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements of memory from the first to the last one of a tensor."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride))


def _without_repeats(tensor: Tensor) -> Tensor:
    """The tensor before it was expanded: one element of each dimension of stride 0."""
    if 0 not in tensor.stride():
        return tensor
    shape = [size if step else min(size, 1) for size, step in zip(tensor.shape, tensor.stride())]
    return tensor.as_strided(shape, tensor.stride())


def _memory(tensor: Tensor) -> Tensor:
    """Its memory as it lies there, (E,), so that one plain copy moves it.

    Where that has gaps, as a part of a wider tensor has, the elements are drawn together first.
    """
    once, span = _without_repeats(tensor), _span(tuple(tensor.shape), tensor.stride())
    return tensor.as_strided((span,), (1,)) if span <= once.numel() else once.reshape(-1)


def _is_parameter(tensor: Tensor) -> bool:
    """Whether it is a parameter, a view of one or, under autocast, its copy in low precision."""
    base = tensor if tensor._base is None else tensor._base
    if isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad):
        return True
    made_by = base.grad_fn
    if made_by is None or made_by.name() != "ToCopyBackward0":
        return False
    source = made_by.next_functions[0][0]
    return source is not None and source.name() == "torch::autograd::AccumulateGrad"


# ---------------------------------------------------------------------------------- Liger's kernels
class _LigerFamily(NamedTuple):
    """How a family's classes are called and what they compute.

    RMSNorm multiplies by ``offset + weight``, before it rounds to the input's dtype (``gemma``) or
    after (``llama``).
    """

    prefix: str
    offset: float = 0.0
    casting: str = "llama"
    mlp: str = "swiglu"


_LIGER = {
    "llama": _LigerFamily("Llama"),
    "mistral": _LigerFamily("Mistral"),
    "qwen2": _LigerFamily("Qwen2"),
    "qwen3": _LigerFamily("Qwen3"),
    "phi3": _LigerFamily("Phi3"),
    # Liger itself rounds OLMo 2 as Llama; transformers multiplies first.
    "olmo2": _LigerFamily("Olmo2", casting="gemma"),
    "gemma2": _LigerFamily("Gemma2", offset=1.0, casting="gemma", mlp="geglu"),
    "gemma3_text": _LigerFamily("Gemma3", offset=1.0, casting="gemma", mlp="geglu"),
}
_ACTIVATIONS = {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh",)}
_ROPE = "apply_rotary_pos_emb"


def use_liger(model: nn.Module) -> list[str]:
    """Let Liger's RMSNorm, RoPE and SwiGLU or GeGLU kernels compute this model, once on its GPU.

    Before or after `tile_mlp`, `fastdpo.head.attach` and PEFT.  The MLP's kernel overwrites what it
    saved, so a graph takes one backward: a second one (``retain_graph``) gives wrong gradients.

    Returns:
        What Liger computes now: ``["rms_norm", "rope", "swiglu"]``, or ``"geglu"`` last.

    Raises:
        ModelError: the family or its activation has no kernel, Liger is not installed, the model is
            on the CPU, or something else has replaced a forward of its modules.
    """
    config: Any = model.config
    family = _LIGER.get(config.model_type)
    if family is None:
        raise ModelError(
            f"model_type={config.model_type!r} is not among those use_liger knows "
            f"({', '.join(_LIGER)}): leave Liger's kernels off"
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in _ACTIVATIONS[family.mlp]:
        raise ModelError(
            f"activation {activation!r} of this {config.model_type} model is not that of Liger's "
            f"{family.mlp} ({' or '.join(_ACTIVATIONS[family.mlp])}): leave Liger's kernels off"
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModelError("liger-kernel is not installed: pip install 'fastdpo[liger]'")
    device = next(model.parameters()).device
    if device.type == "cpu" and not is_interpreted():
        raise ModelError(
            "the model is on device 'cpu', where Liger's Triton kernels do not run: move it to a "
            "GPU before use_liger, or leave Liger's kernels off"
        )
    # All is prepared before anything is changed.
    patches = _liger_patches(model, family)
    for module, forward in patches:
        tiled = hasattr(module, "_fastdpo_untiled")
        setattr(module, "_fastdpo_untiled" if tiled else "forward", MethodType(forward, module))
        module._fastdpo_liger = True
    return ["rms_norm", "rope", family.mlp]


def _liger_patches(model: nn.Module, family: _LigerFamily) -> list[tuple[Any, Callable[..., Any]]]:
    """Every module that changes, and its new forward."""
    from liger_kernel.transformers import functional as liger  # type: ignore[import-not-found]

    patches: list[tuple[Any, Callable[..., Any]]] = []
    for kind in ("RMSNorm", "Attention", "MLP"):
        name = family.prefix + kind
        modules = [x for x in model.modules() if type(x).__name__ == name]
        if not modules:
            raise ModelError(f"{type(model).__name__} has no {name}: leave Liger's kernels off")
        if kind == "Attention":
            kinds = {type(x) for x in modules}
            forwards = {attention: _with_rope(attention, liger.liger_rope) for attention in kinds}
            patches += [(module, forwards[type(module)]) for module in modules]
            continue
        if kind == "RMSNorm":
            forward = _norm_forward(liger.liger_rms_norm, family)
        else:
            gated = liger.liger_swiglu if family.mlp == "swiglu" else liger.liger_geglu
            forward = _mlp_forward(gated)
        patches += [(module, forward) for module in modules]
    for module, _ in patches:
        ours = hasattr(module, "_fastdpo_liger") or hasattr(module, "_fastdpo_untiled")
        if "forward" in vars(module) and not ours:
            raise ModelError(
                f"the forward of a {type(module).__name__} was replaced already, by a hook or "
                "another patch: call use_liger before that"
            )
    return patches


def _norm_forward(rms_norm: Callable[..., Tensor], family: _LigerFamily) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
        # Not in place: the gradient handed to this norm may be another branch's too (the residual
        # after the post-norms of Gemma and OLMo) or one that the loss keeps.
        return rms_norm(x, self.weight, eps, family.offset, family.casting, in_place=False)

    return forward


def _mlp_forward(gated: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if hasattr(self, "gate_up_proj"):
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gated(gate, up))

    return forward


def _with_rope(attention: type[nn.Module], rope: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of an attention of transformers with another function as its rotary embedding.

    It comes from a second copy of the module that defines the class: there, and nowhere else, the
    name of that function means ``rope``.  All other names mean what they mean in the module, so
    that patches of others hold.

    Raises:
        ModelError: the class or its forward is not transformers' own, or has no such function.
    """
    own: Any = sys.modules[attention.__module__]
    fitting = attention.__module__.startswith("transformers.") and hasattr(own, _ROPE)
    if fitting:
        copy = importlib.util.module_from_spec(own.__spec__)
        own.__spec__.loader.exec_module(copy)
        forward = getattr(copy, attention.__name__).forward
        names = [(x.__module__, x.__qualname__) for x in (attention.forward, forward)]
        if names[0] == names[1] and inspect.unwrap(forward).__globals__ is vars(copy):
            vars(copy).update({**vars(own), _ROPE: rope})
            return forward
    raise ModelError(
        f"{attention.__qualname__}.forward of {attention.__module__} is not the one that "
        f"transformers ships, or calls no {_ROPE} of its module, so Liger's cannot take its "
        "place: leave Liger's kernels off, or use another transformers version"
    )
