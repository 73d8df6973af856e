# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false, reportCallIssue=false
"""Packing and planning of pairs, against naive constructions and by property."""

import random
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.data.batch import pack_pairs, plan_batches, plan_steps, share_step
from fastdpo.data.examples import LAYOUTS, TokenizedPair

PAIRS = [
    TokenizedPair([1, 2, 3], [4, 5], [6]),
    TokenizedPair([7], [8], [9, 10, 11]),
    TokenizedPair([12, 13], [14, 15, 16, 17], [18, 19]),
]

ids = st.lists(st.integers(0, 1000), min_size=1, max_size=9)
some_pairs = st.lists(st.builds(TokenizedPair, ids, ids, ids), min_size=1, max_size=6)
some_lengths = st.lists(st.integers(1, 64), max_size=60)


def test_layouts_of_one_pair_by_hand():
    batch = pack_pairs(PAIRS[:1])
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch.rows_N.tolist() == [2, 3, 2]  # the prompt's last row predicts both firsts
    segments = batch.segments
    assert (segments.bounds_q, segments.bounds_k) == ((0, 5, 6), (0, 5, 9))
    assert segments.key_rows_K.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert segments.longest == (5, 5)
    packed = pack_pairs(PAIRS[:1], layout="packed")
    assert packed.input_ids_BT.tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 6]]
    assert packed.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert packed.rows_N.tolist() == [2, 3, 7]
    assert packed.segments.bounds_q == packed.segments.bounds_k == (0, 5, 9)
    assert packed.segments.key_rows_K is None
    padded = pack_pairs(PAIRS[:1], layout="padded")
    assert padded.input_ids_BT.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 6, 0]]
    assert padded.position_ids_BT is padded.segments is None
    assert padded.rows_N.tolist() == [2, 3, 7]
    for each, tokens in ((batch, 6), (packed, 9), (padded, 10)):
        assert each.target_N.tolist() == [4, 5, 6] and each.bounds_S1.tolist() == [0, 2, 3]
        assert (each.num_pairs, each.num_tokens) == (1, tokens)


@settings(max_examples=60, deadline=None)
@given(some_pairs, st.sampled_from(LAYOUTS))
def test_each_target_sees_its_own_sequence(pairs, layout):
    """Following keys back from each target's row gives its prompt and the response before it."""
    batch = pack_pairs(pairs, layout=layout)
    ids, bounds = batch.input_ids_BT.view(-1), batch.bounds_S1.tolist()
    sides = [(p.prompt_ids, r) for p in pairs for r in (p.chosen_ids, p.rejected_ids)]
    assert len(bounds) == len(sides) + 1 and batch.num_pairs == len(pairs)
    for s, (prompt, response) in enumerate(sides):
        assert batch.target_N[bounds[s] : bounds[s + 1]].tolist() == response
        for j, row in enumerate(batch.rows_N[bounds[s] : bounds[s + 1]].tolist()):
            assert seen_by(batch, ids, row) == prompt + response[:j]
            if batch.position_ids_BT is not None:
                assert batch.position_ids_BT[0, row] == len(prompt) + j - 1
    if layout != "padded":
        assert batch.num_tokens == sum(p.num_tokens(layout) for p in pairs)
    elif len(pairs) == 1:
        assert batch.num_tokens == pairs[0].num_tokens(layout)


def seen_by(batch, ids, row):
    """Tokens that a row attends to, itself last."""
    if batch.segments is None:
        T = batch.input_ids_BT.shape[1]
        return ids[row // T * T : row + 1].tolist()
    q, k = batch.segments.bounds_q, batch.segments.bounds_k
    i = next(i for i in range(len(q) - 1) if q[i] <= row < q[i + 1])
    keys = batch.segments.key_rows_K
    keys = range(q[-1]) if keys is None else keys.tolist()
    own = list(keys)[k[i] : k[i + 1]]
    return ids[own[: len(own) - (q[i + 1] - 1 - row)]].tolist()


@settings(max_examples=40, deadline=None)
@given(some_pairs)
def test_gathered_keys_and_their_gradient(pairs):
    segments = pack_pairs(pairs).segments
    T, K = segments.bounds_q[-1], segments.bounds_k[-1]
    assert len(segments.key_rows_K) == K and len(segments.first_T) == T
    assert segments.key_rows_K[segments.first_T].tolist() == list(range(T))
    assert torch.equal(segments.key_rows_K[segments.again_keys_R], segments.again_rows_R)
    everything = torch.cat([segments.first_T, segments.again_keys_R])
    assert sorted(everything.tolist()) == list(range(K))
    for bounds, tensor in ((segments.bounds_q, segments.cu_q), (segments.bounds_k, segments.cu_k)):
        assert tensor.dtype == torch.int32 and tuple(tensor.tolist()) == bounds


def test_types_and_pair_indices():
    batch = pack_pairs(PAIRS, index=[40, 7, 5_000_000_000])
    assert batch.pair_index_P.tolist() == [40, 7, 5_000_000_000]
    assert pack_pairs(PAIRS).pair_index_P.tolist() == [0, 1, 2]
    for f in fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == torch.int64 and value.is_contiguous()


def test_to_moves_only_the_token_tensors():
    batch = pack_pairs(PAIRS).to("meta")
    stay = {"bounds_S1", "pair_index_P"}
    for data in (batch, batch.segments):
        for f in fields(data):
            value = getattr(data, f.name)
            if isinstance(value, torch.Tensor):
                assert value.is_meta == (f.name not in stay), f.name
    assert batch.num_pairs == 3 and batch.num_tokens == 19


def test_an_unknown_layout_is_named():
    for refused in (lambda: pack_pairs(PAIRS, layout="rows"), lambda: PAIRS[0].num_tokens("rows")):
        with pytest.raises(ValueError, match="layout='rows' must be one of shared, packed, padded"):
            refused()


def test_pack_pairs_refuses_nothing_and_wrong_index():
    with pytest.raises(ValueError, match="at least one pair"):
        pack_pairs([])
    with pytest.raises(ValueError, match="index has 1 entries for 3 pairs"):
        pack_pairs(PAIRS, index=[0])


@pytest.mark.parametrize("bad", [[], [1, -2], [1, 2.0], ["1"], [True], [None]])
@pytest.mark.parametrize("name", ["prompt_ids", "chosen_ids", "rejected_ids"])
def test_tokenized_pair_refuses(name, bad):
    good = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    with pytest.raises(ValueError, match=name):
        TokenizedPair(**{**good, name: bad})


def naive_first_fit(indices, lengths, max_tokens):
    batches: list[list[int]] = []
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        for batch in batches:
            if sum(lengths[j] for j in batch) + lengths[i] <= max_tokens:
                batch.append(i)
                break
        else:
            batches.append([i])
    return [sorted(batch) for batch in batches]


def test_plan_batches_by_hand():
    assert plan_batches([5, 3, 8, 2, 5], max_tokens=10) == [[2, 3], [0, 4], [1]]
    assert plan_batches([10], max_tokens=10) == [[0]]
    assert plan_batches([], max_tokens=10) == []


@settings(max_examples=150, deadline=None)
@given(some_lengths, st.integers(64, 200))
def test_plan_batches_is_first_fit_decreasing(lengths, max_tokens):
    plan = plan_batches(lengths, max_tokens=max_tokens)
    assert plan == naive_first_fit(range(len(lengths)), lengths, max_tokens)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in batch) for batch in plan]
    assert all(0 < total <= max_tokens for total in sums)
    # No two batches would have fitted into one.
    assert all(a + b > max_tokens for k, a in enumerate(sums) for b in sums[k + 1 :])


@settings(max_examples=80, deadline=None)
@given(some_lengths, st.integers(1, 70), st.integers(0, 2**40), st.integers(0, 3))
def test_plan_steps_takes_every_pair_once(lengths, batch_pairs, seed, epoch):
    options = {"batch_pairs": batch_pairs, "max_tokens": 90, "seed": seed, "epoch": epoch}
    plan = plan_steps(lengths, **options)
    assert plan == plan_steps(lengths, **options)
    steps = [[i for batch in step for i in batch] for step in plan]
    assert sorted(i for step in steps for i in step) == list(range(len(lengths)))
    assert [len(step) for step in steps[:-1]] == [batch_pairs] * len(steps[:-1])
    assert all(1 <= len(step) <= batch_pairs for step in steps)
    for step, members in zip(plan, steps):
        assert step == naive_first_fit(members, lengths, 90)


def test_plan_steps_shuffles_by_seed_and_epoch_only():
    lengths = [3] * 50

    def order(seed, epoch):
        plan = plan_steps(lengths, batch_pairs=5, max_tokens=9, seed=seed, epoch=epoch)
        return tuple(i for step in plan for batch in step for i in batch)

    torch.manual_seed(1)
    first = order(0, 0)
    torch.manual_seed(2)
    assert order(0, 0) == first
    assert len({order(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16
    assert first != tuple(range(50))


@settings(max_examples=80, deadline=None)
@given(some_lengths, st.integers(64, 300))
def test_padded_batches_count_their_padding(lengths, max_tokens):
    plan = plan_batches(lengths, max_tokens=max_tokens, padded=True)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    taken = [[lengths[i] for i in batch] for batch in plan]
    assert all(len(batch) * max(batch) <= max_tokens for batch in taken)
    # Filled in order of length: the next pair would not have fitted.
    for batch, after in pairwise(taken):
        assert min(batch) >= max(after) and (len(batch) + 1) * max(batch) > max_tokens


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=60), st.integers(1, 8))
def test_a_step_is_shared_out_evenly(lengths, world):
    shares = share_step(range(len(lengths)), lengths, world)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    # Longest first to the emptiest: two differ by at most one pair.
    assert len(shares) == world and max(loads) - min(loads) <= max(lengths)
    assert all(shares) or len(lengths) < world


def test_planning_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    plan_steps([1, 2, 3], batch_pairs=2, max_tokens=9, seed=3, epoch=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("plan", [plan_batches, lambda x, **k: plan_steps(x, **k, **STEP)])
def test_a_pair_over_the_budget_is_named(plan):
    with pytest.raises(ValueError, match=r"example 2 takes 11 .*=10.*at least 12.*max_leng"):
        plan([3, 10, 11, 12], max_tokens=10)
    with pytest.raises(ValueError, match="example 1 has 0 tokens"):
        plan([3, 0], max_tokens=10)


STEP = {"batch_pairs": 2, "seed": 0}


@pytest.mark.parametrize("bad", [{"batch_pairs": 0, "seed": 0}, {**STEP, "epoch": -1}])
def test_plan_steps_refuses(bad):
    with pytest.raises(ValueError, match="batch_pairs >= 1 and epoch >= 0"):
        plan_steps([1, 2], max_tokens=4, **bad)


def test_realistic_lengths_fill_the_budget_and_plan_quickly():
    rng = random.Random(0)
    lengths = [min(4096, 20 + int(rng.lognormvariate(6.2, 0.8))) for _ in range(20_000)]
    plan = plan_batches(lengths, max_tokens=8192)
    assert sum(lengths) / (len(plan) * 8192) > 0.99
    # A step of n micro-batches leaves half of one free on average, whatever their order.
    steps = plan_steps(lengths, batch_pairs=128, max_tokens=8192, seed=0)
    batches = [batch for step in steps for batch in step]
    assert len(batches) / len(steps) > 10
    assert sum(lengths) / (len(batches) * 8192) > 0.95


def test_importing_batch_and_data_loads_neither_transformers_nor_datasets():
    code = (
        "import sys, fastdpo.data.batch, fastdpo.data.rows;"
        "print(*{'transformers', 'datasets', 'tokenizers', 'accelerate'} & {*sys.modules})"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
