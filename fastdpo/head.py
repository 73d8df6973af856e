"""The language model's head, called as a module from inside the model's own forward.

`attach` patches one model instance so that ``model(..., head_call=f)`` runs the body and hands
``f`` the hidden states and the head's parameters from within the head module's ``forward``.  FSDP2,
DDP, ZeRO-3 and PEFT hooks then fire as they do for logits: nobody reads ``.weight`` from outside.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from fastdpo.batch import Layout, PackedPairs, Segments


class HeadCall:
    """What runs in place of ``lm_head(hidden)``: ``f(h_TD, **head)`` with the head's keywords.

    With ``with_routers``, the model returns ``with_routers(model, router_logits, f's result)``.
    """

    def __init__(
        self, f: Callable[..., Any], with_routers: Callable[[Any, Any, Any], Any] | None = None
    ) -> None:
        self.f, self.with_routers = f, with_routers


def head_settings(config: Any) -> dict[str, float | None]:
    """``scale`` and ``softcap`` of a transformers configuration.

    Gemma 2 caps its logits, Cohere multiplies them (``logit_scale``), Granite divides them
    (``logits_scaling``).
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return {"scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}


def base_of(model: Any) -> Any:
    """The transformers model itself, where PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attach(model: Any) -> None:
    """Teach ``model`` (a transformers causal LM, or a PEFT model of one) ``head_call``.

    Raises:
        ValueError: there is no head, or it is not a plain linear layer, for example because LoRA
            wraps it.
    """
    base = base_of(model)
    if getattr(base, "_fastdpo_attached", False):
        return
    head: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None:
        raise ValueError(
            f"{type(base).__name__} has no head that get_output_embeddings() names; load the model "
            "with AutoModelForCausalLM"
        )
    if base.base_model is base:
        raise ValueError(
            f"{type(base).__name__} has no body apart from its head (base_model), to run it alone"
        )
    kind = type(head)
    if kind is not nn.Linear:
        raise ValueError(
            f"the head of {type(base).__name__} is a {kind.__name__}, not a plain nn.Linear; "
            "an adapter on lm_head is not supported: leave it out of target_modules and "
            "modules_to_save"
        )
    head._fastdpo_settings = head_settings(base.config)
    module: Any
    for module, forward in ((head, _forward_of_head), (base, _forward_of_model)):
        module._fastdpo_plain_forward = module.forward
        # Bound, so that a deep copy of the model calls itself and not the original.
        module.forward = MethodType(forward, module)
    base._fastdpo_attached = True


def _forward_of_head(self: Any, hidden: Tensor, head_call: HeadCall | None = None) -> Any:
    if head_call is None:
        return self._fastdpo_plain_forward(hidden)
    h_TD = hidden.reshape(-1, hidden.shape[-1])
    return head_call.f(h_TD, w_VD=self.weight, bias_V=self.bias, **self._fastdpo_settings)


def _forward_of_model(
    self: Any, *args: Any, head_call: HeadCall | None = None, **kwargs: Any
) -> Any:
    if head_call is None:
        return self._fastdpo_plain_forward(*args, **kwargs)
    _check_layout(self, **kwargs)
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
            "pairs out with layout=fastdpo.policy.layout_of(model), not with the layout's bare name"
        )


def packed_forward(
    model: nn.Module,
    batch: PackedPairs,
    f: Callable[..., Any],
    with_routers: Callable[[Any, Any, Any], Any] | None = None,
) -> Any:
    """Run ``model`` on a batch and ``f`` on its hidden states (B * T, D) and head."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids_BT}
    if batch.position_ids_BT is not None:
        inputs["position_ids"] = batch.position_ids_BT
    if batch.segments is not None:
        inputs |= {"attention_mask": None, "segments": batch.segments}
    return model(**inputs, head_call=HeadCall(f, with_routers))
