"""The load-balancing loss of a mixture of experts, by the function of the model's own module.

A router that is trained without it may send ever more tokens to few experts (Switch Transformers,
arXiv 2101.03961).  Transformers' models add it to their loss where ``config.output_router_logits``
is true; what is computed here is compared with that before anything is trained.
"""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor

from fastdpo.data.batch import PackedPairs
from fastdpo.errors import ModelError
from fastdpo.model import attention, head
from fastdpo.model.devices import device_of

_NAMES = ("router_aux_loss_coef", "aux_loss_coef")  # the second is JetMoE's
# Parameters of transformers' function, beside num_experts and top_k.
_KNOWN = {"gate_logits", "num_experts", "top_k", "attention_mask"}


def coefficient(model: Any, wanted: float | None) -> float:
    """What the balancing loss is multiplied by; 0 where none is computed.

    Args:
        model: a transformers causal LM, or a PEFT model of one.
        wanted: None is what the model's configuration asks for: its own coefficient where
            ``output_router_logits`` is true, as in the model's own loss.

    Raises:
        ModelError: a coefficient is wanted and the model has no such loss, or no router.
    """
    base = head.base_of(model)
    config = base.config.get_text_config()
    name = type(base).__name__
    function = _function(base)
    if wanted is None:
        if function is None or not getattr(config, "output_router_logits", False):
            return 0.0
        found = (getattr(x, name, None) for x in (base, config) for name in _NAMES)
        wanted = next((x for x in found if x is not None), None)
        if wanted is None:
            raise ModelError(
                f"{name} asks for its routers' balancing loss (output_router_logits) but has no "
                "coefficient for it; give router_aux_loss_coef"
            )
    if wanted and function is None:
        raise ModelError(
            f"router_aux_loss_coef={wanted}, but {name} has no balancing loss of its own: it is no "
            "mixture of experts, or one that is balanced otherwise; leave the option out"
        )
    if wanted and (odd := inspect.signature(function).parameters.keys() - _KNOWN):
        raise ModelError(
            f"router_aux_loss_coef={wanted}: the balancing loss of {name} takes "
            f"{', '.join(sorted(odd))}, which is not known here; set router_aux_loss_coef=0"
        )
    return float(wanted)


def _function(base: Any) -> Any:
    return getattr(sys.modules[type(base).__module__], "load_balancing_loss_func", None)


def balancing_loss(base: Any, gate_logits: Any, mask_BT: Tensor | None) -> Tensor:
    """The loss of one forward pass, fp32, not yet multiplied by its coefficient.

    Args:
        base: the transformers model.
        gate_logits: router logits of each layer, (B * T, experts).
        mask_BT: 1 where there is a token and 0 on padding; None: no padding.

    Raises:
        ModelError: the model gave no router logits.
    """
    if not isinstance(gate_logits, tuple) or not gate_logits:
        raise ModelError(
            f"router_aux_loss_coef: {type(base).__name__} gives no router logits; it has no layer "
            "with experts, so set router_aux_loss_coef=0"
        )
    config = base.config.get_text_config()
    sizes = [
        getattr(base, name, None) or getattr(config, name)
        for name in ("num_experts", "num_experts_per_tok")
    ]
    return _function(base)(gate_logits, *sizes, mask_BT)


def token_mask(batch: PackedPairs) -> Tensor | None:
    """(B, T), 1 where a row has a token; None for packed rows, which have no padding."""
    if batch.segments is not None:
        return None
    B, T = batch.input_ids_BT.shape
    # A row's last token is the last target, which the row before it predicts.
    last_B = torch.zeros(B, dtype=torch.long, device=batch.rows_N.device)
    last_B.scatter_reduce_(0, batch.rows_N // T, batch.rows_N % T + 1, "amax")
    return (torch.arange(T, device=last_B.device) <= last_B[:, None]).long()


@torch.no_grad()
def check_balance(model: Any) -> None:
    """Refuse a model whose own forward computes another balancing loss than `balancing_loss`.

    Raises:
        ModelError: it does.
    """
    base = head.base_of(model)
    vocab = head.table_rows(model.get_input_embeddings())
    device = device_of(base)
    ids_BT = torch.arange(2, 26, device=device).view(2, 12) * 7919 % vocab
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 5:] = 0
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=head.gathers_bf16(model))
    with attention.own_attention(model), autocast:
        call = head.HeadCall(
            lambda h_TD, **_: h_TD,
            lambda base, gates, _: balancing_loss(base, gates, mask_BT),
        )
        found = model(**inputs, head_call=call)
        wanted = model(**inputs, output_router_logits=True, use_cache=False).aux_loss
    if not torch.allclose(found, wanted, rtol=1e-4, atol=0):
        raise ModelError(
            f"router_aux_loss_coef: the balancing loss of {type(base).__name__} is "
            f"{float(wanted):.6g} by its own forward but {float(found):.6g} here; set it to 0"
        )
