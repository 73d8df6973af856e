"""Attention over packed sequences, registered with transformers under one name.

A packed row holds several sequences; each attends to itself only.  The function below is given the
sequence bounds (``cu_seq_lens_q``) and calls PyTorch's scaled-dot-product attention once a segment,
so no (T, T) mask exists.  Packed models must always be called with ``use_cache=False`` and no
attention mask: with transformers' defaults packed segments silently see each other.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "fastdpo_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within each segment; ``query`` (1, heads, T, head_dim), GQA allowed.

    Returns:
        (1, T, heads, head_dim), as transformers' attention functions do.

    Raises:
        ValueError: no segment bounds were given, or the model needs attention sinks.
    """
    if cu_seq_lens_q is None:
        raise ValueError(
            f"attention {NAME!r} serves packed batches only and got no cu_seq_lens_q; for anything "
            "else call model.set_attn_implementation('sdpa') first"
        )
    if s_aux is not None:
        raise ValueError("attention sinks (s_aux) are not supported with packed pairs")
    edges = cu_seq_lens_q.tolist()
    out = torch.empty_like(query)
    for start, stop in pairwise(edges):
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        window = sliding_window if sliding_window and sliding_window < stop - start else None
        if softcap is None:
            mask = None if window is None else _window_mask(stop - start, window, query.device)
            out[:, :, start:stop] = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
                scale=scaling, enable_gqa=True,
            )  # fmt: skip
        else:
            out[:, :, start:stop] = _softcapped(q, k, v, scaling, softcap, window, dropout)
    return out.transpose(1, 2).contiguous(), None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """True where position i may see j: i - window < j <= i."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return visible if window is None else visible.triu(1 - window)


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, softcap: float, window: int | None,
    dropout: float,
) -> Tensor:  # fmt: skip
    """Attention with Gemma 2's soft cap on the scores, which the fused kernels lack."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    hidden = ~_window_mask(q.shape[2], window, q.device)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v


def use_packed_attention(model: nn.Module) -> None:
    """Register the function and switch this one model to it.

    Raises:
        ValueError: the model does not take its attention from transformers' interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    try:
        model.set_attn_implementation(NAME)  # type: ignore[operator]
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"{type(model).__name__} does not dispatch its attention through transformers' "
            f"AttentionInterface, so packed pairs cannot be isolated in it: {error}"
        ) from error


def probe(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Two short packed sequences: token ids (T,), position ids (T,), bounds (3,)."""
    device = next(model.parameters()).device
    vocab = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.arange(24, device=device) * 7919 % vocab
    position = torch.cat([torch.arange(11), torch.arange(13)]).to(device)
    return ids, position, torch.tensor([0, 11, 24], dtype=torch.int32)


@torch.no_grad()
def check_isolation(model: nn.Module, hidden_states) -> None:
    """Refuse a model in which packed sequences see each other.

    ``hidden_states(input_ids_T, position_ids_T, cu_seqlens)`` runs the model's body.  The second
    sequence of a packed row must get the hidden states it has alone; in a model with recurrent or
    own attention code it does not.
    """
    ids, position, bounds = probe(model)
    packed = hidden_states(ids, position, bounds)[11:]
    alone = hidden_states(ids[11:], position[11:], torch.tensor([0, 13], dtype=torch.int32))
    scale = alone.float().abs().max()
    error = (packed.float() - alone.float()).abs().max() / scale
    # Rounding differences stay near eps times the depth; leaked attention is of order one.
    if not error < 0.05:
        raise ValueError(
            f"packed sequences are not isolated in {type(model).__name__}: hidden states of a "
            f"packed sequence differ from its own by {error:.2g} of their size. Its layers do not "
            "all attend through transformers' AttentionInterface (recurrent or own attention code)"
        )
