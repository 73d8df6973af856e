"""Liger's kernels in one model instance; classes and modules of transformers stay as they are."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdpo.errors import ModelError
from fastdpo.kernels.support import is_interpreted
from fastdpo.model.devices import device_of


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
    device = device_of(model)
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

    gated = liger.liger_swiglu if family.mlp == "swiglu" else liger.liger_geglu
    forward_of: dict[str, Callable[[Any], Callable[..., Any]]] = {
        "RMSNorm": lambda _: _norm_forward(liger.liger_rms_norm, family),
        "Attention": lambda kind: _with_rope(kind, liger.liger_rope),
        "MLP": lambda _: _mlp_forward(gated),
    }
    patches: list[tuple[Any, Callable[..., Any]]] = []
    for part, make in forward_of.items():
        name = family.prefix + part
        modules = [x for x in model.modules() if type(x).__name__ == name]
        if not modules:
            raise ModelError(f"{type(model).__name__} has no {name}: leave Liger's kernels off")
        forwards = {kind: make(kind) for kind in {type(x) for x in modules}}
        patches += [(module, forwards[type(module)]) for module in modules]
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
