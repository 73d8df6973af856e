"""Attention over packed pairs, registered with transformers under one name.

A packed row is divided into segments (`fastdpo.data.batch.Segments`): each attends to its own keys,
causally and aligned at their ends.  With a shared prompt the segments are (prompt + chosen) and
(rejected), of a list each further response, whose keys are those of the prompt and its own: one
gather of keys and values, then plain variable-length attention.  That is flash-attn where it is
installed, PyTorch's ``varlen_attn`` on CUDA, and scaled-dot-product attention a segment elsewhere,
in blocks of queries where it needs a mask; no (T, T) mask exists on any of them.  flash-attn has
not run on a GPU yet: it is tested against its signature, by a recorder that computes what it
should.

Packed models must always be called with ``use_cache=False`` and no attention mask: with
transformers' defaults packed segments silently see each other.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastdpo.data.batch import Segments
from fastdpo.kernels.device import capability_of, is_gpu

NAME = "fastdpo_packed"
# Queries that share a mask where SDPA needs one: its size is this times the segment's keys.
_BLOCK = 1024
# A mask up to this is made once a batch, shared by all layers; what is larger is made again.
_KEPT_BYTES = 16 * 2**20
_FLASH_MAX_HEAD_DIM = 256
# While a model is probed: the windows of its masks, and those that its layers ask for.
_windows: tuple[set[int | None], set[int | None]] | None = None


class LayerCall(NamedTuple):
    """What a layer asks for beside its tensors: scores' factor and soft cap, and a window."""

    segments: Segments
    scale: float | None
    window: int | None
    softcap: float | None


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

    With `sequence_parallel`, T are this process's tokens, and others have the rest of the row.

    Returns:
        (1, T, heads, head_dim), as transformers' attention functions do.

    Raises:
        ValueError: no segments were given, or the model needs a mask of its own, attention sinks
            or dropout.
    """
    sliding_window = sliding_window or None  # Qwen2-MoE writes 0 for no window
    if _windows is not None:
        _windows[1].add(sliding_window)
    if segments is None:
        raise ValueError(
            f"attention {NAME!r} serves packed pairs only and got no segments; for anything "
            "else call model.set_attn_implementation('sdpa') first"
        )
    if attention_mask is not None:
        raise ValueError("the model makes a mask of its own, which packed attention does not take")
    if s_aux is not None:
        raise ValueError("attention sinks (s_aux) are not supported with packed pairs")
    if dropout:
        raise ValueError(f"dropout={dropout}: packed pairs are trained without attention dropout")
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    # Squeezed, not indexed: the gradient of an index is a zeroed copy of the whole.
    q_THd, k_KHd, v_KHd = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value))
    if segments.chunk is not None:
        q_THd, k_KHd, v_KHd = segments.chunk.to_heads(q_THd, k_KHd, v_KHd)
    if segments.key_rows_K is not None:
        k_KHd, v_KHd = _GatherKeys.apply(k_KHd, segments), _GatherKeys.apply(v_KHd, segments)
    attend = route(q_THd, v_KHd, softcap)
    call = LayerCall(segments, scaling, sliding_window, softcap)
    out_THd = attend(q_THd, k_KHd, v_KHd, call)
    if segments.chunk is not None:
        out_THd = segments.chunk.to_tokens(out_THd)
    return out_THd[None], None


def route(q_THd: Tensor, v_KHd: Tensor, softcap: float | None) -> Callable[..., Tensor]:
    """The function that serves these tensors: `flash`, `varlen` or `sdpa`."""
    capability = capability_of(q_THd.device)
    fits = (
        capability is not None
        and q_THd.dtype in (torch.bfloat16, torch.float16)
        and q_THd.shape[-1] == v_KHd.shape[-1] <= _FLASH_MAX_HEAD_DIM
        and q_THd.shape[-1] % 8 == 0
        and capability >= (8, 0)
    )
    if fits and has_flash_attn():
        return flash
    if fits and softcap is None and "window_size" in varlen_options():
        return varlen
    return sdpa


@cache
def has_flash_attn() -> bool:
    """Whether flash-attn 2 is installed; packages of other generations share its import name."""
    from transformers.utils import is_flash_attn_2_available  # type: ignore[attr-defined]

    return is_flash_attn_2_available()


@cache
def varlen_options() -> frozenset[str]:
    """Arguments of this torch's ``varlen_attn``: that of torch 2.10 has no window."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


class _GatherKeys(torch.autograd.Function):
    """Rows of keys or values in the order in which segments see them.

    The gradient is a gather too, plus additions at rows gathered again.  Each row gets at most one
    at a time, so the bits are the same every time; several are summed in fp32.
    """

    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, segments: Segments) -> Tensor:
        assert segments.key_rows_K is not None
        ctx.segments = segments
        return x_THd.index_select(0, segments.key_rows_K)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_KHd,), segments = grads, ctx.segments
        sizes, dtype = segments.again_sizes, grad_KHd.dtype
        # One addition rounds as well as any; fp64 stays as it is.
        wide = torch.float32 if len(sizes) > 1 and dtype.itemsize < 4 else dtype
        grad_THd = grad_KHd.index_select(0, segments.first_T).to(wide)
        again = segments.again_keys_R.split(sizes), segments.again_rows_R.split(sizes)
        for keys_R, rows_R in zip(*again):
            grad_THd.index_add_(0, rows_R, grad_KHd.index_select(0, keys_R).to(wide))
        return grad_THd.to(dtype), None


def flash(q_THd: Tensor, k_KHd: Tensor, v_KHd: Tensor, call: LayerCall) -> Tensor:
    """flash-attn 2; ``causal`` is aligned at the ends, its window counts keys to the left."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    bounds = call.segments.cu_q, call.segments.cu_k, *call.segments.longest
    return flash_attn_varlen_func(
        *(q_THd, k_KHd, v_KHd, *bounds),
        softmax_scale=call.scale,
        causal=True,
        window_size=(-1, -1) if call.window is None else (call.window - 1, 0),
        softcap=call.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def varlen(q_THd: Tensor, k_KHd: Tensor, v_KHd: Tensor, call: LayerCall) -> Tensor:
    """PyTorch's flash attention; its window (W, 0) is causal, aligned at the ends."""
    from torch.nn.attention.varlen import varlen_attn

    bounds = call.segments.cu_q, call.segments.cu_k, *call.segments.longest
    options: dict[str, Any] = {}
    groups = q_THd.shape[1] // k_KHd.shape[1]
    if groups > 1:
        if "enable_gqa" in varlen_options():
            options["enable_gqa"] = True
        else:  # torch 2.11 asks for as many heads of keys as of queries
            k_KHd, v_KHd = (x.repeat_interleave(groups, 1) for x in (k_KHd, v_KHd))
    return varlen_attn(
        *(q_THd, k_KHd, v_KHd, *bounds),
        scale=call.scale,
        window_size=(-1, 0) if call.window is None else (call.window - 1, 0),
        **options,
    )  # type: ignore[return-value]


def sdpa(q_THd: Tensor, k_KHd: Tensor, v_KHd: Tensor, call: LayerCall) -> Tensor:
    """Scaled-dot-product attention a segment; in blocks of queries where it needs a mask."""
    groups = q_THd.shape[1] // k_KHd.shape[1]
    if groups > 1 and (is_gpu(q_THd.device) or call.softcap is not None):
        # On CUDA, grouped heads outside flash attention would materialize all scores.
        k_KHd, v_KHd = (x.repeat_interleave(groups, 1) for x in (k_KHd, v_KHd))
    bounds = call.segments.bounds_q, call.segments.bounds_k
    sizes_q, sizes_k = ([b - a for a, b in pairwise(x)] for x in bounds)
    # Split and concatenated, not sliced: the gradient of a slice is a zeroed copy of the whole.
    q, k, v = (
        x.transpose(0, 1).unsqueeze(0).split(sizes, 2)
        for x, sizes in ((q_THd, sizes_q), (k_KHd, sizes_k), (v_KHd, sizes_k))
    )
    out = [_attend(*x, call) for x in zip(q, k, v)]
    # Some models view what they get with heads and head_dim as one, which needs it contiguous.
    return torch.cat(out, 2).squeeze(0).transpose(0, 1).contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
    """One segment, (1, heads, queries, head_dim) on (1, heads, keys, head_dim)."""
    queries, keys = q.shape[2], k.shape[2]
    segments, scale, window, softcap = call
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
        shape = stop - start, last - first
        block = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
        scores = 1 if softcap is None else q.shape[1]
        if scores * shape[0] * shape[1] * q.element_size() <= _KEPT_BYTES:
            key = shape, window, q.dtype
            if key not in segments.masks:
                segments.masks[key] = _mask(q, *key)
            out.append(_masked(*block, segments.masks[key], scale, softcap))
        else:
            # What a long block would keep for its backward is computed again there.
            def long(q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, int] = shape) -> Tensor:
                return _masked(q, k, v, _mask(q, shape, window, q.dtype), scale, softcap)

            out.append(checkpoint(long, *block, use_reentrant=False))
    return torch.cat(out, 2) if len(out) > 1 else out[0]


def _mask(like: Tensor, shape: tuple[int, int], window: int | None, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where a query sees a key, the last one all keys of the block."""
    queries, keys = shape
    seen = torch.ones(shape, dtype=torch.bool, device=like.device).tril(keys - queries)
    if window is not None:
        seen = seen.triu(keys - queries - window + 1)
    return torch.zeros(shape, dtype=dtype, device=like.device).masked_fill_(~seen, float("-inf"))


def _masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, softcap: float | None
) -> Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    # Gemma 2's soft cap on the scores, which SDPA lacks; heads are expanded already.
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


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
    AttentionMaskInterface.register(NAME, _no_mask)
    try:
        model.set_attn_implementation(NAME)  # type: ignore[operator]
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"{type(model).__name__} does not dispatch its attention through transformers' "
            f"AttentionInterface, so packed pairs cannot be isolated in it: {error}"
        ) from error


def _no_mask(*_: object, local_size: int | None = None, **__: object) -> None:
    """Stands for transformers' masks: what a layer sees is in its segments and its window."""
    if _windows is not None:
        _windows[0].add(local_size or None)


@contextmanager
def refuse_lost_windows() -> Iterator[None]:
    """Refuse a model that is run within it and whose windows or chunks are in its masks only.

    Packed attention has no masks, it takes a window from the layer.

    Raises:
        ValueError: at the end, naming the window.
    """
    global _windows
    _windows = set(), set()
    try:
        yield
        lost = {x for x in _windows[0] - _windows[1] if x is not None}
        if lost:
            raise ValueError(
                f"its layers leave a window or chunk of {', '.join(map(str, sorted(lost)))} tokens "
                "to a mask, and do not pass it to the attention"
            )
    finally:
        _windows = None


@contextmanager
def own_attention(model: nn.Module) -> Iterator[None]:
    """Within it, a model runs unpacked, with its own attention or transformers'."""
    packed = model.config._attn_implementation == NAME  # type: ignore[union-attr]
    if packed:
        use_own_attention(model)
    try:
        yield
    finally:
        if packed:
            model.set_attn_implementation(NAME)  # type: ignore[operator]


def use_own_attention(model: nn.Module) -> None:
    """Switch a model back to transformers' attention."""
    try:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
    except ValueError:  # Gemma 2's soft cap, for one
        model.set_attn_implementation("eager")  # type: ignore[operator]
    keep_softcap(model)


def keep_softcap(model: nn.Module) -> None:
    """Take a model with a soft cap on its scores from SDPA, which would leave it out unnoticed.

    transformers does so itself since 5.22 or a little earlier.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if capped and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # type: ignore[operator]
