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

from fastdpo.batch import (
    TokenizedPair,
    fill_rate,
    pack_pairs,
    plan_batches,
    plan_steps,
)

PAIRS = [
    TokenizedPair([1, 2, 3], [4, 5], [6]),
    TokenizedPair([7], [8], [9, 10, 11]),
    TokenizedPair([12, 13], [14, 15, 16, 17], [18, 19]),
]

ids = st.lists(st.integers(0, 1000), min_size=1, max_size=9)
some_pairs = st.lists(st.builds(TokenizedPair, ids, ids, ids), min_size=1, max_size=6)
some_lengths = st.lists(st.integers(1, 64), max_size=60)


def test_layout_of_one_pair_by_hand():
    batch = pack_pairs(PAIRS[:1])
    assert batch.input_ids_T.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 6]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert batch.cu_seqlens_S1.tolist() == [0, 5, 9]
    assert batch.rows_N.tolist() == [2, 3, 7]
    assert batch.target_N.tolist() == [4, 5, 6]
    assert batch.bounds_S1.tolist() == [0, 2, 3]
    assert (batch.max_seqlen, batch.num_pairs, batch.num_tokens) == (5, 1, 9)


@settings(max_examples=60, deadline=None)
@given(some_pairs)
def test_layout_against_one_sequence_at_a_time(pairs):
    batch = pack_pairs(pairs)
    responses = [r for p in pairs for r in (p.chosen_ids, p.rejected_ids)]
    prompts = [p.prompt_ids for p in pairs for _ in range(2)]
    starts = batch.cu_seqlens_S1.tolist()
    bounds = batch.bounds_S1.tolist()
    assert len(starts) == len(bounds) == 2 * len(pairs) + 1
    for s, (prompt, response) in enumerate(zip(prompts, responses)):
        tokens = batch.input_ids_T[starts[s] : starts[s + 1]]
        rows = batch.rows_N[bounds[s] : bounds[s + 1]]
        assert tokens.tolist() == prompt + response
        assert batch.position_ids_T[starts[s] : starts[s + 1]].tolist() == list(range(len(tokens)))
        assert batch.target_N[bounds[s] : bounds[s + 1]].tolist() == response
        # The row that predicts a target is the one before it, inside the same sequence.
        assert (rows - starts[s]).tolist() == [len(prompt) - 1 + j for j in range(len(response))]
        assert batch.input_ids_T[rows + 1].tolist() == response
    assert starts[-1] == batch.num_tokens == sum(p.num_tokens for p in pairs)
    assert bounds[-1] == len(batch.target_N) == len(batch.rows_N)
    assert batch.max_seqlen == max(b - a for a, b in pairwise(starts))
    assert batch.num_pairs == len(pairs)


def test_types_and_pair_indices():
    batch = pack_pairs(PAIRS, index=[40, 7, 5_000_000_000])
    assert batch.pair_index_P.tolist() == [40, 7, 5_000_000_000]
    assert pack_pairs(PAIRS).pair_index_P.tolist() == [0, 1, 2]
    for f in fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == (torch.int32 if f.name == "cu_seqlens_S1" else torch.int64)
            assert value.is_contiguous() and value.ndim == 1


def test_to_moves_only_the_token_tensors():
    batch = pack_pairs(PAIRS).to("meta")
    on_meta = {
        f.name for f in fields(batch) if getattr(getattr(batch, f.name), "is_meta", False) is True
    }
    assert on_meta == {"input_ids_T", "position_ids_T", "rows_N", "target_N"}
    assert batch.num_pairs == 3 and batch.num_tokens == 25


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


def test_planning_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    plan_steps([1, 2, 3], batch_pairs=2, max_tokens=9, seed=3, epoch=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("plan", [plan_batches, lambda x, **k: plan_steps(x, **k, **STEP)])
def test_a_pair_over_the_budget_is_named(plan):
    with pytest.raises(ValueError, match=r"pair 2 takes 11 .*max_tokens=10.*at least 12.*max_leng"):
        plan([3, 10, 11, 12], max_tokens=10)
    with pytest.raises(ValueError, match="pair 1 has 0 tokens"):
        plan([3, 0], max_tokens=10)


STEP = {"batch_pairs": 2, "seed": 0}


@pytest.mark.parametrize("bad", [{"batch_pairs": 0, "seed": 0}, {**STEP, "epoch": -1}])
def test_plan_steps_refuses(bad):
    with pytest.raises(ValueError, match="batch_pairs >= 1 and epoch >= 0"):
        plan_steps([1, 2], max_tokens=4, **bad)


def test_fill_rate():
    assert fill_rate([[0, 1], [2]], [3, 4, 5], 10) == 0.6
    with pytest.raises(ValueError, match="no batches"):
        fill_rate([], [], 10)


def test_realistic_lengths_fill_the_budget_and_plan_quickly():
    rng = random.Random(0)
    lengths = [min(4096, 20 + int(rng.lognormvariate(6.2, 0.8))) for _ in range(20_000)]
    plan = plan_batches(lengths, max_tokens=8192)
    assert fill_rate(plan, lengths, 8192) > 0.99


def test_importing_batch_and_data_loads_neither_transformers_nor_datasets():
    code = (
        "import sys, fastdpo.batch, fastdpo.data;"
        "print(*{'transformers', 'datasets', 'tokenizers', 'accelerate'} & {*sys.modules})"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
