"""Attention over packed pairs, registered with transformers under one name.

A packed row is divided into segments (`fastdpo.batch.Segments`): each attends to its own keys,
causally and aligned at their ends.  With a shared prompt the segments are (prompt + chosen) and
(rejected), and the second one's keys are those of the prompt and its own: one gather of keys and
values, then plain variable-length attention.  That is flash-attn where it is installed, PyTorch's
``varlen_attn`` on CUDA, and scaled-dot-product attention a segment elsewhere; no (T, T) mask exists
on any of them.

Packed models must always be called with ``use_cache=False`` and no attention mask: with
transformers' defaults packed segments silently see each other.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdpo.batch import Segments

NAME = "fastdpo_packed"
# Queries that share a mask where SDPA needs one: its size is this times the segment's keys.
_BLOCK = 1024
_FLASH_MAX_HEAD_DIM = 256


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within each segment; ``query`` (1, heads, T, head_dim), GQA allowed.

    Returns:
        (1, T, heads, head_dim), as transformers' attention functions do.

    Raises:
        ValueError: no segments were given, or the model needs attention sinks or dropout.
    """
    if segments is None:
        raise ValueError(
            f"attention {NAME!r} serves packed pairs only and got no segments; for anything "
            "else call model.set_attn_implementation('sdpa') first"
        )
    if s_aux is not None:
        raise ValueError("attention sinks (s_aux) are not supported with packed pairs")
    if dropout:
        raise ValueError(f"dropout={dropout}: packed pairs are trained without attention dropout")
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    # Squeezed, not indexed: the gradient of an index is a zeroed copy of the whole.
    q_THd, k_THd, v_THd = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value))
    if segments.key_rows_K is not None:
        k_THd, v_THd = _GatherKeys.apply(k_THd, segments), _GatherKeys.apply(v_THd, segments)
    attend = route(q_THd, v_THd, softcap)
    return attend(q_THd, k_THd, v_THd, segments, scaling, sliding_window, softcap)[None], None


def route(q_THd: Tensor, v_KHd: Tensor, softcap: float | None) -> Callable[..., Tensor]:
    """The function that serves these tensors: `flash`, `varlen` or `sdpa`."""
    fits = (
        q_THd.is_cuda
        and q_THd.dtype in (torch.bfloat16, torch.float16)
        and q_THd.shape[-1] == v_KHd.shape[-1] <= _FLASH_MAX_HEAD_DIM
        and torch.cuda.get_device_capability(q_THd.device) >= (8, 0)
    )
    if fits and has_flash_attn():
        return flash
    if fits and softcap is None and "window_size" in varlen_options():
        return varlen
    return sdpa


@cache
def has_flash_attn() -> bool:
    """Whether flash-attn 2 is installed; packages of other generations share its import name."""
    from transformers.utils import is_flash_attn_2_available

    return is_flash_attn_2_available()


@cache
def varlen_options() -> frozenset[str]:
    """Arguments of this torch's ``varlen_attn``: none before torch 2.10, whose has no window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


class _GatherKeys(torch.autograd.Function):
    """Rows of keys or values in the order in which segments see them.

    The gradient is a gather too, plus one addition at rows gathered twice: no atomics, the same
    bits every time.
    """

    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, segments: Segments) -> Tensor:
        assert segments.key_rows_K is not None
        ctx.segments = segments
        return x_THd.index_select(0, segments.key_rows_K)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_KHd,), segments = grads, ctx.segments
        grad_THd = grad_KHd.index_select(0, segments.first_T)
        again = grad_KHd.index_select(0, segments.again_keys_R)
        return grad_THd.index_add_(0, segments.again_rows_R, again), None


def flash(
    q_THd: Tensor, k_KHd: Tensor, v_KHd: Tensor, segments: Segments, scale: float | None,
    window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """flash-attn 2; ``causal`` is aligned at the ends, its window counts keys to the left."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    longest_q, longest_k = segments.longest
    return flash_attn_varlen_func(
        q_THd,
        k_KHd,
        v_KHd,
        cu_seqlens_q=segments.cu_q,
        cu_seqlens_k=segments.cu_k,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def varlen(
    q_THd: Tensor, k_KHd: Tensor, v_KHd: Tensor, segments: Segments, scale: float | None,
    window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """PyTorch's flash attention; its window (W, 0) is causal, aligned at the ends."""
    from torch.nn.attention.varlen import varlen_attn

    longest_q, longest_k = segments.longest
    options: dict[str, Any] = {}
    groups = q_THd.shape[1] // k_KHd.shape[1]
    if groups > 1:
        if "enable_gqa" in varlen_options():
            options["enable_gqa"] = True
        else:  # torch 2.11 asks for as many heads of keys as of queries
            k_KHd, v_KHd = (x.repeat_interleave(groups, 1) for x in (k_KHd, v_KHd))
    return varlen_attn(
        q_THd,
        k_KHd,
        v_KHd,
        segments.cu_q,
        segments.cu_k,
        longest_q,
        longest_k,
        scale=scale,
        window_size=(-1, 0) if window is None else (window - 1, 0),
        **options,
    )  # type: ignore[return-value]


def sdpa(
    q_THd: Tensor, k_KHd: Tensor, v_KHd: Tensor, segments: Segments, scale: float | None,
    window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Scaled-dot-product attention a segment; in blocks of queries where it needs a mask."""
    sizes_q, sizes_k = (
        [b - a for a, b in pairwise(x)] for x in (segments.bounds_q, segments.bounds_k)
    )
    # Split and concatenated, not sliced: the gradient of a slice is a zeroed copy of the whole.
    parts = (x.transpose(0, 1)[None].split(sizes, 2) for x, sizes in (
        (q_THd, sizes_q), (k_KHd, sizes_k), (v_KHd, sizes_k)
    ))  # fmt: skip
    out = [_attend(q, k, v, scale, window, softcap) for q, k, v in zip(*parts)]
    return torch.cat(out, 2).squeeze(0).transpose(0, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """One segment, (1, heads, queries, head_dim) on (1, heads, keys, head_dim)."""
    queries, keys = q.shape[2], k.shape[2]
    if window is not None and window >= keys:
        window = None
    if queries == keys and window is None and softcap is None:
        # is_causal is aligned at the start, which is only the same for as many keys as queries.
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    out = []
    for start in range(0, queries, _BLOCK):
        stop = min(start + _BLOCK, queries)
        last = keys - queries + stop  # keys that the block's last query sees
        first = 0 if window is None else max(0, last - (stop - start) - window + 1)
        # True where query i, at position last - (stop - start) + i, sees key first + j.
        mask = torch.ones(stop - start, last - first, dtype=torch.bool, device=q.device)
        mask = mask.tril(last - first - (stop - start))
        if window is not None:
            mask = mask.triu(last - first - (stop - start) - window + 1)
        block = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
        if softcap is None:
            out.append(
                F.scaled_dot_product_attention(*block, attn_mask=mask, scale=scale, enable_gqa=True)
            )
        else:
            out.append(_softcapped(*block, mask, scale, softcap))
    return torch.cat(out, 2) if len(out) > 1 else out[0]


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, softcap: float
) -> Tensor:
    """Attention with Gemma 2's soft cap on the scores, which SDPA lacks."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def use_packed_attention(model: nn.Module) -> None:
    """Register the function and switch this one model to it.

    Raises:
        ValueError: the model does not take its attention from transformers' interface, or attends
            in chunks.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    if getattr(config, "attention_chunk_size", None):
        raise ValueError(
            f"{type(model).__name__} attends in chunks (attention_chunk_size="
            f"{config.attention_chunk_size}), which packed attention does not do"
        )
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    try:
        model.set_attn_implementation(NAME)  # type: ignore[operator]
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"{type(model).__name__} does not dispatch its attention through transformers' "
            f"AttentionInterface, so packed pairs cannot be isolated in it: {error}"
        ) from error


@contextmanager
def own_attention(model: nn.Module) -> Iterator[None]:
    """Within it, a model runs unpacked, with its own attention or transformers'."""
    packed = model.config._attn_implementation  # type: ignore[union-attr]
    if packed != NAME:
        yield
        return
    use_own_attention(model)
    try:
        yield
    finally:
        model.set_attn_implementation(packed)  # type: ignore[operator]


def use_own_attention(model: nn.Module) -> None:
    """Switch a model back to transformers' attention."""
    try:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
    except ValueError:  # Gemma 2's soft cap, for one
        model.set_attn_implementation("eager")  # type: ignore[operator]
