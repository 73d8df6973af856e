"""The language model's head, called as a module from inside the model's own forward.

`attach` patches one model instance so that ``model(..., head_call=f)`` runs the body and hands
``f`` the hidden states and the head's parameters from within the head module's ``forward``.  FSDP2,
DDP, ZeRO-3 and PEFT hooks then fire as they do for logits: nobody reads ``.weight`` from outside.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.ops import linear_logp


class HeadCall:
    """What runs in place of ``lm_head(hidden)``: ``f(h_TD, **head)`` with the head's keywords."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f


def head_settings(config: Any) -> dict[str, float | None]:
    """``scale`` and ``softcap`` of a transformers configuration.

    Gemma 2 caps its logits, Cohere multiplies them (``logit_scale``), Granite divides them
    (``logits_scaling``).
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return {"scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}


def attach(model: Any) -> None:
    """Teach ``model`` (a transformers causal LM, or a PEFT model of one) ``head_call``.

    Raises:
        ValueError: the head is not a plain linear layer, for example because LoRA wraps it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "_fastdpo_attached", False):
        return
    head: Any = base.get_output_embeddings()
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
    outputs = self.base_model(*args, use_cache=False, **kwargs)
    return self.get_output_embeddings()(outputs.last_hidden_state, head_call=head_call)


@torch.no_grad()
def check(model: nn.Module) -> None:
    """Refuse a model whose logits the fused head does not reproduce.

    There may be a factor or a function after the head that `head_settings` does not know.
    """
    from fastdpo.attention import probe

    ids, position, bounds = probe(model)
    packed = {"attention_mask": None, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    longest = {"max_length_q": 13, "max_length_k": 13}
    inputs = {"input_ids": ids[None], "position_ids": position[None], **packed, **longest}
    logits = model(**inputs, use_cache=False).logits[0]
    wanted = torch.log_softmax(logits.double(), -1).gather(1, ids[:, None])[:, 0]
    call = HeadCall(lambda h_TD, w_VD, **rest: linear_logp(h_TD, w_VD, ids, **rest))
    error = (model(**inputs, head_call=call).double() - wanted).abs().max()
    tolerance = 0.2 if logits.dtype in (torch.bfloat16, torch.float16) else 1e-2
    if not error < tolerance:
        raise ValueError(
            f"the fused head does not reproduce the logits of {type(model).__name__} (log-probs "
            f"differ by {error:.2g}): something is applied to its logits that is not known here"
        )


def packed_forward(model: nn.Module, batch: Any, f: Callable[..., Any]) -> Any:
    """Run ``model`` on a `fastdpo.batch.PackedPairs` and ``f`` on its hidden states and head."""
    return model(
        input_ids=batch.input_ids_T[None],
        position_ids=batch.position_ids_T[None],
        attention_mask=None,
        cu_seq_lens_q=batch.cu_seqlens_S1,
        cu_seq_lens_k=batch.cu_seqlens_S1,
        max_length_q=batch.max_seqlen,
        max_length_k=batch.max_seqlen,
        head_call=HeadCall(f),
    )


def hidden_states(
    model: nn.Module, input_ids_T: Tensor, position_ids_T: Tensor, cu_seqlens_S1: Tensor
) -> Tensor:
    """Hidden states (T, D) of packed tokens, as the head would get them."""
    longest = int(cu_seqlens_S1.diff().max())
    return model(
        input_ids=input_ids_T[None],
        position_ids=position_ids_T[None],
        attention_mask=None,
        cu_seq_lens_q=cu_seqlens_S1,
        cu_seq_lens_k=cu_seqlens_S1,
        max_length_q=longest,
        max_length_k=longest,
        head_call=HeadCall(lambda h_TD, **_: h_TD),
    )
