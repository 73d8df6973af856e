"""The language model's head, called as a module from inside the model's own forward.

`attach` patches one model instance so that ``model(..., head_call=f)`` runs the body and hands
``f`` the hidden states and the head's parameters from within the head module's ``forward``.  FSDP2,
DDP, ZeRO-3 and PEFT hooks then fire as they do for logits: nobody reads ``.weight`` from outside.
"""

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.data.batch import PackedPairs, Segments
from fastdpo.data.examples import Layout
from fastdpo.errors import ModelError
from fastdpo.loss.ops import linear_logp
from fastdpo.model import rope
from fastdpo.model.devices import device_of, forward_of
from fastdpo.model.load import one_line


@dataclass
class HeadCall:
    """What runs in place of ``lm_head(hidden)``: ``f(h_TD, **head)`` with the head's keywords.

    With ``with_routers``, the model returns ``with_routers(model, router_logits, f's result)``.
    """

    f: Callable[..., Any]
    with_routers: Callable[[Any, Any, Any], Any] | None = None


# What configurations call a factor on the logits, a divisor of them, and their soft cap.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Model types whose code does something else with one: what multiplies, and what is left unused.
_MULTIPLIED = {("hyperclovax", "logits_scaling")}
_UNUSED = {("mpt", "logit_scale"), ("gemma3", "final_logit_softcapping")}
_PROBE_LOGIT = 300.0  # a cap of 100 leaves 99.5 of it
_PROBE_TOKENS = 16


def head_settings(config: Any) -> dict[str, float | None]:
    """``scale`` and ``softcap`` of a transformers configuration.

    What the models of transformers 5.24 do between the hidden states and the logits:

    | in the configuration | models | logits |
    |---|---|---|
    | logit_scale | Cohere, Cohere 2 and Compass | times it |
    | lm_head_multiplier | Falcon-H1 | times it |
    | output_multiplier | Muse Glimmer, Muse Spark | times it |
    | logits_scaling | Granite, MiniCPM3 | divided by it |
    | logits_scaling | HyperCLOVA X | times it |
    | logits_mup_width_multiplier | Inkling | divided by it |
    | final_logit_softcapping | Gemma 2 to 4, NanoChat, Muse, Inkling 2, ... | capped at it |
    | logits_soft_cap | RecurrentGemma | capped at it |
    | output_logit_soft_cap | xLSTM | capped at it |

    A name that the configuration's class does not know has no meaning to its model, and none here.
    `check` compares the result with the model's own logits.
    """
    text = config.get_text_config()
    # MiniCPM3's is a property.
    known = {*inspect.signature(type(text)).parameters, *dir(type(text))}

    def is_in(names: set[tuple[str, str]], name: str) -> bool:
        return any((x.model_type, name) in names for x in (config, text))

    values = {
        name: float(getattr(text, name))
        for name in (*_FACTORS, *_DIVISORS, *_CAPS)
        if name in known and getattr(text, name, None) and not is_in(_UNUSED, name)
    }
    scale = 1.0
    for name, value in values.items():
        if name in _FACTORS or is_in(_MULTIPLIED, name):
            scale *= value
        elif name in _DIVISORS:
            scale /= value
    return {"scale": scale, "softcap": next((values[x] for x in _CAPS if x in values), None)}


def base_of(model: Any) -> Any:
    """The transformers model itself, where PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def gathers_bf16(model: Any) -> bool:
    """Whether its layers are gathered in bfloat16 (`fastdpo.model.shard`): then they compute in
    nothing else, and under autocast only."""
    return getattr(base_of(model), "_fastdpo_gathers_bf16", False)


def table_rows(table: Any) -> int:
    """Rows of an embedding's or a head's weight, also where DeepSpeed has sharded it."""
    return getattr(table.weight, "ds_shape", table.weight.shape)[0]


def attach(model: Any) -> None:
    """Teach ``model`` (a transformers causal LM, or a PEFT model of one) ``head_call``.

    Raises:
        ModelError: there is no head, or it is not a plain linear layer, for example because LoRA
            wraps it.
    """
    base = base_of(model)
    if getattr(base, "_fastdpo_attached", False):
        return
    head: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None:
        raise ModelError(
            f"{type(base).__name__} has no head that get_output_embeddings() names; load the model "
            "with AutoModelForCausalLM"
        )
    if base.base_model is base:
        raise ModelError(
            f"{type(base).__name__} has no body apart from its head (base_model), to run it alone"
        )
    kind = type(head)
    if kind is not nn.Linear:
        raise ModelError(
            f"the head of {type(base).__name__} is a {kind.__name__}, not a plain nn.Linear; "
            "an adapter on lm_head is not supported: leave it out of target_modules and "
            "modules_to_save"
        )
    head._fastdpo_settings = head_settings(base.config)
    # Inkling's logits end before the rows that only fill its head up.
    head._fastdpo_vocab = getattr(base.config.get_text_config(), "unpadded_vocab_size", None)
    module: Any
    for module, forward in ((head, _forward_of_head), (base, _forward_of_model)):
        module._fastdpo_plain_forward = getattr(module, forward_of(module))
        # Bound, so that a deep copy of the model calls itself and not the original.
        setattr(module, forward_of(module), MethodType(forward, module))
    base._fastdpo_attached = True


def _forward_of_head(self: Any, hidden: Tensor, head_call: HeadCall | None = None) -> Any:
    if head_call is None:
        return self._fastdpo_plain_forward(hidden)
    h_TD = hidden.reshape(-1, hidden.shape[-1])
    w_VD, bias_V, V = self.weight, self.bias, self._fastdpo_vocab
    if V is not None and w_VD.shape[0] > V:
        w_VD, bias_V = w_VD[:V], None if bias_V is None else bias_V[:V]
    return head_call.f(h_TD, w_VD=w_VD, bias_V=bias_V, **self._fastdpo_settings)


def _forward_of_model(
    self: Any, *args: Any, head_call: HeadCall | None = None, **kwargs: Any
) -> Any:
    if head_call is None:
        return self._fastdpo_plain_forward(*args, **kwargs)
    _check_layout(self, **kwargs)
    _check_chunk(self, **kwargs)
    if head_call.with_routers is not None:
        kwargs["output_router_logits"] = True
    outputs = self.base_model(*args, **{**kwargs, "use_cache": False})
    result = self.get_output_embeddings()(outputs.last_hidden_state, head_call=head_call)
    if head_call.with_routers is None:
        return result
    return head_call.with_routers(self, getattr(outputs, "router_logits", None), result)


def _check_layout(
    model: Any,
    segments: Segments | None = None,
    position_ids: Tensor | None = None,
    input_ids: Tensor | None = None,
    **_: Any,
) -> None:
    """Refuse pairs that were laid out for a model with other rotary frequencies."""
    classes = getattr(model, "_fastdpo_layout", Layout("")).classes
    several = input_ids is not None and len(input_ids) > 1
    if not classes or (position_ids is None and not several):
        return
    if position_ids is None or (segments is not None and not segments.exact_for(classes)):
        raise ValueError(
            f"the rotary frequencies of {type(model).__name__} depend on a sequence's length: lay "
            "pairs out with layout=fastdpo.model.layout_of(model), not with the layout's bare name"
        )


def _check_chunk(model: Any, segments: Segments | None = None, **_: Any) -> None:
    """Refuse a whole row where the layers expect a process's part of it."""
    parallel = getattr(model, "_fastdpo_parallel", None)
    if parallel is not None and segments is not None and segments.chunk is None:
        raise ValueError(
            f"{type(model).__name__} shares packed rows with {parallel.size - 1} other processes: "
            "split the batch first, fastdpo.model.sequence_parallel.chunk(model, batch)"
        )


def packed_forward(
    model: nn.Module,
    batch: PackedPairs,
    f: Callable[..., Any],
    with_routers: Callable[[Any, Any, Any], Any] | None = None,
) -> Any:
    """Run ``model`` on a batch and ``f`` on its hidden states (B * T, D) and head.

    Of a model that is `sequence_parallel` the batch is a `sequence_parallel.chunk`.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids_BT}
    if batch.position_ids_BT is not None:
        inputs["position_ids"] = batch.position_ids_BT
    if batch.segments is not None:
        inputs |= {"attention_mask": None, "segments": batch.segments}
    with nullcontext() if batch.chunk is None else rope.whole_positions(model, batch.chunk):
        return model(**inputs, head_call=HeadCall(f, with_routers))


def check(model: Any, impl: str = "auto") -> None:
    """Prove that an attached head gives the logits of the model's own forward.

    Two passes over a few tokens; in the second the head's input is multiplied so that logits reach
    hundreds and a cap on them shows.  What enters the head must be the body's hidden states times
    a factor; what leaves it must become the logits by scale and soft cap, to the rounding of those
    operations; and the fused log-probs must be those of the head in fp64.  Call it in evaluation
    mode, without gradients, with the model's own attention, under the autocast of training.

    Args:
        model: as for `attach`, which was called.
        impl: of the fused head.

    Raises:
        ModelError: something else happens between the hidden states and the logits.
    """
    device = device_of(base_of(model))
    vocab = table_rows(model.get_input_embeddings())
    ids_BT = torch.tensor([[i * 7919 % vocab for i in range(_PROBE_TOKENS)]], device=device)
    base = base_of(model)
    head = base.get_output_embeddings()
    scale, softcap = (head._fastdpo_settings[name] for name in ("scale", "softcap"))
    try:
        x_TD, z_TV, logits_TV = _own(model, head, ids_BT, 1.0)
        h_TD = model(input_ids=ids_BT, head_call=HeadCall(lambda h_TD, **_: h_TD))
        before = _factor(h_TD, x_TD)
        # A power of two, so that multiplying rounds nothing.
        largest = abs(scale / before) * float(z_TV.abs().max())
        factor = 2.0 ** max(0, math.ceil(math.log2(_PROBE_LOGIT / max(largest, 1e-9))))
        _compare_logits(z_TV, logits_TV, scale / before, softcap)
        x_TD, z_TV, logits_TV = _own(model, head, ids_BT, factor)
        _compare_logits(z_TV, logits_TV, scale / before, softcap)
        compare = partial(_compare_fused, x_TD=x_TD, z_TV=z_TV, factor=factor, impl=impl)
        model(input_ids=ids_BT, head_call=HeadCall(compare))
    # A model that was not made for this can fail in any way.
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        raise ModelError(
            f"the fused head does not reproduce the logits of {type(base).__name__}: "
            f"{one_line(error)}"
        ) from error


def _own(model: Any, head: Any, ids_BT: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Input (T, D) and output (T, V) of the head and the logits of the model's own forward."""
    seen = []

    def multiply(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] * factor,)

    def keep(_: Any, args: tuple[Tensor], output: Tensor) -> None:
        seen.append((args[0], output.clone()))  # what comes after may be in place

    hooks = head.register_forward_pre_hook(multiply), head.register_forward_hook(keep)
    try:
        logits = model(input_ids=ids_BT, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != 1 or seen[0][1].shape[:-1] != ids_BT.shape:
        raise ValueError("its head is not called once with the hidden states of all tokens")
    x, z = (each.to(logits.device) for each in seen[0])
    z = z[..., : head._fastdpo_vocab]
    if logits.shape != z.shape:
        raise ValueError(f"logits {tuple(logits.shape)} are made of {tuple(z.shape)}")
    return x[0], z[0], logits[0]


def _eps(*tensors: Tensor) -> float:
    """Rounding of the coarsest dtype."""
    return max(torch.finfo(x.dtype).eps for x in tensors)


def _factor(h_TD: Tensor, x_TD: Tensor) -> float:
    """The number that the body's hidden states are multiplied by before they enter the head."""
    if x_TD.shape != h_TD.shape:
        raise ValueError(
            f"hidden states {tuple(h_TD.shape)} become {tuple(x_TD.shape)} before they enter it"
        )
    h, x = h_TD.double(), x_TD.double()
    factor = float((x * h).sum() / h.square().sum())
    eps = _eps(h_TD, x_TD)
    # Two passes of a body may round differently on a GPU.
    error = float((x - factor * h).norm() / x.norm())
    if not error < 16 * eps:
        raise ValueError(f"hidden states are transformed before they enter it (by {error:.2g})")
    return 1.0 if abs(factor - 1) < eps else factor


def _compare_logits(z_TV: Tensor, logits_TV: Tensor, scale: float, softcap: float | None) -> None:
    """Element by element, within the rounding of each operation on the head's output."""
    want = _after(z_TV.double(), scale, softcap)
    steps = 1 + 2 * (scale != 1.0) + 4 * (softcap is not None)
    rounding = steps * _eps(z_TV, logits_TV)
    error = (logits_TV.double() - want).abs()
    wrong = error - rounding * want.abs() > torch.finfo(torch.float32).tiny
    if wrong.any() or not error.isfinite().all():
        i = int((error / want.abs().clamp(min=1e-3)).nan_to_num(torch.inf).argmax())
        z, found, wanted = (float(x.flatten()[i]) for x in (z_TV, logits_TV, want))
        raise ValueError(
            f"the head gives {z:.6g}, which becomes a logit of {found:.6g}, but scale {scale:.6g} "
            f"and soft cap {softcap} make it {wanted:.6g}; something is applied to its logits that "
            "is not known here"
        )


def _after(z: Tensor, scale: float, softcap: float | None) -> Tensor:
    z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _compare_fused(
    h_TD: Tensor, w_VD: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None, *,
    x_TD: Tensor, z_TV: Tensor, factor: float, impl: str,
) -> None:  # fmt: skip
    """The fused log-probs, against fp64 and the error of the model's own product."""
    h_TD, x_TD, z_TV = h_TD * factor, x_TD.to(h_TD.device), z_TV.to(h_TD.device)

    def rounded(x: Tensor) -> Tensor:
        return x.to(z_TV.dtype).double()

    def exact(x: Tensor) -> Tensor:
        # A part at a time: a head in fp64 may be as large as the model.
        z = torch.cat([rounded(x) @ rounded(w).T for w in w_VD.split(4096)], -1)
        return z if bias_V is None else z + rounded(bias_V)

    z = exact(x_TD)
    own = float((z_TV.double() - z).abs().max())
    if not own < float(z.abs().max()) / 64:
        raise ValueError(f"its head is no product of hidden states and weight (by {own:.2g})")
    logits = _after(exact(h_TD), scale, softcap)
    T, V = logits.shape
    target_N = torch.cat([torch.arange(T, device=z.device) * 7919 % V, logits.argmax(-1)])
    rows_N = torch.arange(T, device=z.device).repeat(2)
    want_N = logits.log_softmax(-1)[rows_N, target_N]
    found_N = linear_logp(
        h_TD, w_VD, target_N, rows_N=rows_N, bias_V=bias_V, scale=scale, softcap=softcap, impl=impl
    )
    error = float((found_N.double() - want_N).abs().max())
    fp32 = torch.finfo(torch.float32).eps * float(logits.abs().max())
    if not error < 4 * abs(scale) * own + 16 * fp32:
        raise ValueError(f"log-probs differ by {error:.2g}")
