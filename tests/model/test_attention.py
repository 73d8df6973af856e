# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false, reportCallIssue=false
"""Attention over segments: every route against a dense mask in fp64, absent ones by recorders."""

import inspect
import sys
import types
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.data.batch import pack_pairs
from fastdpo.data.examples import TokenizedPair
from fastdpo.model import attention

PAIRS = [
    TokenizedPair([5] * 7, [6] * 4, [7] * 9),
    TokenizedPair([5] * 3, [6] * 11, [7] * 2),
    TokenizedPair([5], [6], [7]),
]
OPTIONS = [
    dict(window=None, softcap=None), dict(window=5, softcap=None), dict(window=None, softcap=2.0),
    dict(window=3, softcap=2.0), dict(window=1, softcap=None), dict(window=40, softcap=None),
]  # fmt: skip


def tensors(T, heads=4, kv_heads=2, dim=8, value_dim=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim)
    return [
        torch.randn(T, h, d, generator=generator, dtype=dtype).requires_grad_() for h, d in sizes
    ]


def visible(pairs, layout, window):
    """(T, T): which packed token sees which, from what the layouts mean."""
    owner, positions = [], []  # (pair, part) and position of each packed token
    for i, pair in enumerate(pairs):
        prompt = len(pair.prompt_ids)
        sides = (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids))
        for j, (name, response) in enumerate(sides):
            if layout == "packed" or j == 0:
                whose = "prompt" if layout == "shared" else f"prompt of {name}"
                owner += [(i, whose)] * prompt
                positions += range(prompt)
            owner += [(i, name)] * len(response)
            positions += range(prompt, prompt + len(response))
    mask = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for q, (pair, part) in enumerate(owner):
        seen = {(pair, part), (pair, "prompt"), (pair, f"prompt of {part}")}
        for k in range(len(owner)):
            distance = positions[q] - positions[k]
            mask[q, k] = owner[k] in seen and 0 <= distance < (window or len(owner))
    return mask


def dense(q, k, v, mask, scale, softcap):
    """Attention with a whole (T, T) mask, token-major."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def call(q, k, v, segments, window=None, softcap=None, scale=None):
    """Through the function that transformers calls."""
    major = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, _ = attention.packed_attention(
        torch.nn.Module(), *major, None, scaling=scale, segments=segments,
        sliding_window=window, softcap=softcap,
    )  # fmt: skip
    return out[0]


def gradients(out, inputs):
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return torch.autograd.grad((out * weight).sum(), inputs)


@pytest.mark.parametrize("block", [4, 1024])
@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_segments_against_a_dense_mask(layout, options, block, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", block)
    segments = pack_pairs(PAIRS, layout=layout).segments
    mask = visible(PAIRS, layout, options["window"])
    inputs = tensors(len(mask), value_dim=6)
    out = call(*inputs, segments, **options, scale=0.3)
    wanted = dense(*inputs, mask, 0.3, options["softcap"])
    # softcapped weights are fp32, as transformers computes them
    tolerance = 1e-12 if options["softcap"] is None else 1e-6
    torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(gradients(out, inputs), gradients(wanted, inputs)):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


lengths = st.integers(1, 12)
pair = st.builds(
    lambda p, c, r: TokenizedPair([5] * p, [6] * c, [7] * r), lengths, lengths, lengths
)


@settings(max_examples=40, deadline=None)
@given(st.lists(pair, min_size=1, max_size=3), st.one_of(st.none(), lengths), st.integers(1, 6))
def test_any_lengths_windows_and_blocks(pairs, window, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_BLOCK", block)
        for layout in ("shared", "packed"):
            mask = visible(pairs, layout, window)
            inputs = tensors(len(mask))
            segments = pack_pairs(pairs, layout=layout).segments
            out = call(*inputs, segments, window=window)
            torch.testing.assert_close(out, dense(*inputs, mask, None, None))


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_long_blocks_keep_no_mask_and_no_scores(options, monkeypatch):
    """What a backward needs of a long segment grows with its tokens, not with their square."""
    monkeypatch.setattr(attention, "_BLOCK", 16)
    monkeypatch.setattr(attention, "_KEPT_BYTES", 0)
    pairs = [TokenizedPair([5] * 150, [6] * 90, [7] * 80)]
    segments, kept = pack_pairs(pairs).segments, []

    def keep(x):
        kept.append(x)
        return x

    inputs = tensors(320)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = call(*inputs, segments, **options)
    tokens = max(x.shape[-2] * x.shape[-3] for x in kept if x.ndim == 4)
    assert tokens <= 470 * 4 and max(x.numel() for x in kept) <= 470 * 4 * 8
    assert not segments.masks
    wanted = dense(*inputs, visible(pairs, "shared", options["window"]), None, options["softcap"])
    tolerance = 1e-12 if options["softcap"] is None else 1e-6
    for mine, theirs in zip(gradients(out, inputs), gradients(wanted, inputs)):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_layers_share_the_masks_of_a_batch(monkeypatch):
    made, real = [], attention._mask

    def counted(*args):
        made.append(args[1:])
        return real(*args)

    monkeypatch.setattr(attention, "_mask", counted)
    segments = pack_pairs(PAIRS).segments
    inputs = tensors(segments.bounds_q[-1])
    for window in (None, 5, None, 5):
        call(*inputs, segments, window=window)
    assert len(made) == len(set(made)) == len(segments.masks) > 0
    assert not segments.to("cpu").masks


# ------------------------------------------------------------------- what is not on this machine
def record_flash(calls):
    # The signature of flash-attn 2.8 (github.com/Dao-AILab/flash-attention).
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        calls.append(dict(locals()))
        assert causal and dropout_p == 0.0 and alibi_slopes is None and block_table is None
        left, right = window_size
        assert right == (-1 if left == -1 else 0)
        return by_segment(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
            left, softcap or None,
        )  # fmt: skip

    return flash_attn_varlen_func


def by_segment(q, k, v, cu_q, cu_k, max_q, max_k, scale, left, softcap):
    """What variable-length attention means: bottom-right causal, ``left`` keys back."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and q.ndim == k.ndim == v.ndim == 3
    assert int(cu_q[-1]) == len(q) and int(cu_k[-1]) == len(k) == len(v)
    assert max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
    assert type(max_q) is type(max_k) is int
    out = []
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist())):
        position = torch.arange(d - c - (b - a), d - c)[:, None]
        distance = position - torch.arange(d - c)[None]
        mask = (distance >= 0) & ((left < 0) | (distance <= left))
        out.append(dense(q[a:b], k[c:d], v[c:d], mask, scale, softcap))
    return torch.cat(out)


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_call_of_flash_attn(layout, options, monkeypatch):
    calls = []
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = record_flash(calls)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(attention, "route", lambda *_: attention.flash)
    segments = pack_pairs(PAIRS, layout=layout).segments
    mask = visible(PAIRS, layout, options["window"])
    inputs = tensors(len(mask))
    out = call(*inputs, segments, **options, scale=0.3)
    assert len(calls) == 1
    wanted = dense(*inputs, mask, 0.3, options["softcap"])
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(out, inputs), gradients(wanted, inputs)):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gqa", [True, False], ids=["torch 2.13", "torch 2.11"])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("window", [None, 5])
def test_the_call_of_varlen_attn(gqa, kv_heads, window, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    calls = []

    def old(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1),
    ):  # fmt: skip
        return serve(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, False)

    def new(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1), enable_gqa=False,
    ):  # fmt: skip
        return serve(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, enable_gqa
        )

    def serve(query, key, value, cu_q, cu_k, max_q, max_k, scale, window_size, enable_gqa):
        calls.append(window_size)
        assert enable_gqa or query.shape[1] == key.shape[1] == value.shape[1]
        left, right = window_size
        assert right == 0
        return by_segment(query, key, value, cu_q, cu_k, max_q, max_k, scale, left, None)

    fake = new if gqa else old
    installed = inspect.signature(varlen.varlen_attn).parameters
    if "window_size" not in installed:
        pytest.skip("the varlen_attn of this torch takes no window, and is not used")
    assert set(inspect.signature(fake).parameters) <= set(installed) | {"enable_gqa"}
    monkeypatch.setattr(varlen, "varlen_attn", fake)
    monkeypatch.setattr(
        attention, "varlen_options", lambda: set(inspect.signature(fake).parameters)
    )
    monkeypatch.setattr(attention, "route", lambda *_: attention.varlen)
    mask = visible(PAIRS, "shared", window)
    inputs = tensors(len(mask), kv_heads=kv_heads)
    out = call(*inputs, pack_pairs(PAIRS).segments, window=window, scale=0.3)
    assert calls == [(-1, 0) if window is None else (4, 0)]
    wanted = dense(*inputs, mask, 0.3, None)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(out, inputs), gradients(wanted, inputs)):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_autocast_reaches_the_attention(monkeypatch):
    seen = []
    monkeypatch.setattr(
        attention, "route", lambda q, v, softcap: seen.append(q.dtype) or attention.sdpa
    )
    inputs = tensors(pack_pairs(PAIRS).num_tokens, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(*inputs, pack_pairs(PAIRS).segments)
    assert seen == [torch.bfloat16] and out.dtype == torch.bfloat16


def test_what_packed_attention_refuses():
    segments = pack_pairs(PAIRS).segments
    query = torch.randn(1, 2, segments.bounds_q[-1], 8)
    with pytest.raises(ValueError, match="got no segments"):
        attention.packed_attention(torch.nn.Module(), query, query, query, None)
    with pytest.raises(ValueError, match="makes a mask of its own"):
        attention.packed_attention(
            torch.nn.Module(), query, query, query, torch.zeros(()), segments=segments
        )
    for unserved in ({"s_aux": torch.zeros(2)}, {"dropout": 0.1}):
        with pytest.raises(ValueError, match=r"sinks|dropout=0.1"):
            attention.packed_attention(
                torch.nn.Module(), query, query, query, None, segments=segments, **unserved
            )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_every_route_on_a_gpu(layout, heads, window, softcap, dim):
    """Against the dense mask in fp64; the bound is twice SDPA's own error in the same dtype."""
    pairs = [TokenizedPair([5] * 300, [6] * 200, [7] * 411), TokenizedPair([5], [6] * 70, [7])]
    segments = pack_pairs(pairs, layout=layout).segments.to("cuda")
    mask = visible(pairs, layout, window).cuda()
    drawn = tensors(len(mask), *heads, dim=dim, dtype=torch.bfloat16)
    inputs = [x.detach().cuda().requires_grad_() for x in drawn]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = dense(*exact, mask, None, softcap)
    wanted_grads = gradients(wanted, exact)
    routes = [attention.sdpa, attention.route(inputs[0], inputs[2], softcap)]

    def errors(route):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "route", lambda *_: route)
            out = call(*inputs, segments, window=window, softcap=softcap)
        found = [out, *gradients(out, inputs)]
        return [
            float((x.double() - y).norm() / y.norm())
            for x, y in zip(found, [wanted, *wanted_grads])
        ]

    base, mine = (errors(route) for route in routes)
    assert all(error < 0.02 for error in base)
    assert all(b <= 2 * a + 1e-3 for a, b in zip(base, mine)), (base, mine)
