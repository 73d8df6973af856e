# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false
# pyright: reportArgumentType=false
"""Examples of every shape as tokens: what they refuse, how they are packed and cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch import seen_by

from fastdpo.data.batch import pack_pairs
from fastdpo.data.budget import fit_to_budget
from fastdpo.data.examples import LAYOUTS, TokenizedList, TokenizedPair, TokenizedSingle
from fastdpo.data.scored import from_first_difference, with_scored_prompt
from fastdpo.errors import DataError

ids = st.lists(st.integers(0, 50), min_size=1, max_size=7)
counts = {"weight": st.floats(0, 9), "label_smoothing": st.floats(0, 1), "margin": st.floats(-9, 9)}
scores = st.floats(-9, 9)
pairs = st.builds(
    TokenizedPair, st.lists(st.integers(0, 50), min_size=2, max_size=7), ids, ids,
    rejected_prompt_ids=st.none() | ids, score_chosen=scores, score_rejected=scores,
    prompt_nll=st.booleans(), **counts,
)  # fmt: skip
lists = st.integers(2, 5).flatmap(
    lambda n: st.builds(
        TokenizedList, ids, st.lists(ids, min_size=n, max_size=n),
        st.lists(scores, min_size=n, max_size=n), **counts,
    )
)  # fmt: skip
singles = st.builds(TokenizedSingle, ids, ids, st.booleans(), **counts)
batches = st.one_of(*(st.lists(kind, min_size=1, max_size=4) for kind in (pairs, lists, singles)))


def test_layouts_of_one_list_by_hand():
    one = TokenizedList([1, 2], [[3, 4], [5], [6, 7]], [0.5, 2.0, -1.0], margin=0.25)
    batch = pack_pairs([one])
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 2, 2, 3]]
    assert batch.rows_N.tolist() == [1, 2, 1, 1, 5]  # the prompt's last row predicts all firsts
    segments = batch.segments
    assert (segments.bounds_q, segments.bounds_k) == ((0, 4, 5, 7), (0, 4, 7, 11))
    assert segments.key_rows_K.tolist() == [0, 1, 2, 3, 0, 1, 4, 0, 1, 5, 6]
    assert segments.again_sizes == (2, 2) and segments.again_rows_R.tolist() == [0, 1, 0, 1]
    assert batch.firsts == (0, 3) and batch.num_pairs == 1
    assert batch.scores_S.tolist() == one.scores and batch.margin_P.tolist() == [0.25]
    assert batch.desirable_P is batch.weight_P is batch.smoothing_P is None
    padded = pack_pairs([one], layout="padded")
    assert padded.input_ids_BT.tolist() == [[1, 2, 3, 4], [1, 2, 5, 0], [1, 2, 6, 7]]
    assert padded.rows_N.tolist() == [1, 2, 5, 9, 10]


def test_two_prompts_and_a_scored_prompt_by_hand():
    two = TokenizedPair([1, 2], [3], [4], rejected_prompt_ids=[5])
    batch = pack_pairs([two])
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 5, 4]] and batch.rows_N.tolist() == [1, 3]
    assert batch.segments.key_rows_K is None and batch.segments.bounds_q == (0, 3, 5)
    one = TokenizedPair([1, 2, 3], [4], [5], prompt_nll=True, score_chosen=1.0, score_rejected=0.0)
    batch = pack_pairs([one])
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 4, 5]] and one.num_tokens() == 5
    assert batch.rows_N.tolist() == [2, 2, 0, 1] and batch.target_N.tolist() == [4, 5, 2, 3]
    assert batch.firsts == (0, 3) and batch.bounds_S1.tolist() == [0, 1, 2, 4]
    padded = pack_pairs([one], layout="padded")
    assert padded.input_ids_BT.shape == (2, 4) and padded.rows_N.tolist() == [2, 6, 0, 1]


@settings(max_examples=80, deadline=None)
@given(batches, st.sampled_from(LAYOUTS))
def test_each_target_sees_its_own_sequence(examples, layout):
    batch = pack_pairs(examples, layout=layout)
    tokens, bounds = batch.input_ids_BT.view(-1), batch.bounds_S1.tolist()
    sequences = [x for one in examples for x in zip(one.prompts, one.responses)]
    assert len(bounds) == len(sequences) + 1 == batch.firsts[-1] + 1
    for s, (prompt, response) in enumerate(sequences):
        assert batch.target_N[bounds[s] : bounds[s + 1]].tolist() == response
        for j, row in enumerate(batch.rows_N[bounds[s] : bounds[s + 1]].tolist()):
            assert seen_by(batch, tokens, row) == prompt + response[:j]
    if layout != "padded":
        assert batch.num_tokens == sum(x.num_tokens(layout) for x in examples)
    sizes = [len(one.responses) for one in examples]
    assert [b - a for a, b in zip(batch.firsts, batch.firsts[1:])] == sizes
    for name, usual in (("weight", 1.0), ("label_smoothing", 0.0), ("margin", 0.0)):
        found = getattr(batch, {"label_smoothing": "smoothing"}.get(name, name) + "_P")
        wanted = [getattr(one, name) for one in examples]
        assert (found is None) == (set(wanted) == {usual})
        dtype = torch.float32 if name == "weight" else torch.float64
        assert found is None or torch.equal(found, torch.tensor(wanted, dtype=dtype))
    segments = batch.segments
    if segments is not None and segments.key_rows_K is not None:
        # Each part of the repeats has a row at most once, so its sum has one order.
        for part in segments.again_rows_R.split(segments.again_sizes):
            assert len(part.unique()) == len(part)
        places = torch.cat([segments.first_T, segments.again_keys_R]).tolist()
        assert sorted(places) == list(range(segments.bounds_k[-1]))
    if isinstance(examples[0], TokenizedSingle):
        assert batch.desirable_P.tolist() == [float(one.desirable) for one in examples]
        assert batch.scores_S is None
    else:
        assert batch.scores_S.tolist() == [x for one in examples for x in one.scores]


def test_a_batch_where_a_pair_has_no_scores_has_none():
    scored = TokenizedPair([1], [2], [3], score_chosen=1.0, score_rejected=0.0)
    bare = TokenizedPair([1], [2], [3], score_chosen=1.0)
    assert pack_pairs([scored]).scores_S.tolist() == [1.0, 0.0]
    assert pack_pairs([scored, bare]).scores_S is None and bare.scores is None


def test_examples_of_several_shapes_are_no_batch():
    one = TokenizedPair([1], [2], [3])
    with pytest.raises(ValueError, match=r"of one shape make a batch, these are \['lists', 'pa"):
        pack_pairs([one, TokenizedList([1], [[2], [3]], [0.0, 1.0])])


PAIR = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
LIST = {"prompt_ids": [1], "responses_ids": [[2], [3]], "scores": [0.0, 1.0]}
SINGLE = {"prompt_ids": [1], "response_ids": [2], "desirable": True}


@pytest.mark.parametrize(
    ("kind", "good", "bad", "message"),
    [
        (TokenizedPair, PAIR, {"rejected_prompt_ids": []}, "rejected_prompt_ids is empty"),
        (TokenizedPair, PAIR, {"score_chosen": "1"}, "score_chosen must be a finite number"),
        (TokenizedPair, PAIR, {"prompt_nll": True}, "prompt that is scored needs two"),
        (TokenizedPair, PAIR, {"margin": float("nan")}, "margin must be a finite number, got nan"),
        (TokenizedPair, PAIR, {"weight": -1}, "weight must be finite and >= 0, got -1"),
        (TokenizedPair, PAIR, {"label_smoothing": 2}, r"label_smoothing must be in \[0, 1\], got"),
        (TokenizedList, LIST, {"responses_ids": [[2]]}, "has 1 responses: a list needs at least 2"),
        (TokenizedList, LIST, {"responses_ids": [[2], []]}, r"responses_ids\[1\] is empty"),
        (TokenizedList, LIST, {"scores": [1.0]}, r"scores must be 2 finite numbers, got \[1.0\]"),
        (TokenizedList, LIST, {"scores": [1.0, None]}, "scores must be 2 finite numbers"),
        (TokenizedSingle, SINGLE, {"response_ids": [-1]}, "response_ids must be a list of ints"),
        (TokenizedSingle, SINGLE, {"desirable": 1}, "desirable must be True or False, got 1"),
    ],
)
def test_what_examples_refuse(kind, good, bad, message):
    kind(**good)
    with pytest.raises(ValueError, match=message):
        kind(**{**good, **bad})


@settings(max_examples=60, deadline=None)
@given(batches, st.integers(2, 20), st.sampled_from(LAYOUTS))
def test_fitted_examples_fit_and_lose_no_more_than_they_must(examples, most, layout):
    try:
        fitted = fit_to_budget(examples, most, layout=layout, overlong="truncate")
    except DataError:
        return
    for cut, i in zip(fitted.pairs, fitted.kept):
        whole = examples[i]
        assert cut.num_tokens(layout) <= most and cut.prompts == whole.prompts
        assert (cut is whole) == (whole.num_tokens(layout) <= most)
        cap = max(map(len, cut.responses[: cut.num_computed]))
        for ours, given_ in zip(cut.responses[: cut.num_computed], whole.responses):
            assert ours == given_[:cap]


def test_a_list_over_the_budget_is_named_as_one():
    one = TokenizedList([1, 2], [[3, 4], [3, 5, 6]], [0.0, 1.0], where="lists.jsonl:7")
    with pytest.raises(
        DataError, match=r"^lists.jsonl:7: the list takes 7 tokens, .* longest list"
    ):
        fit_to_budget([one], 6, layout="shared", overlong="stop")
    (cut,) = fit_to_budget([one], 6, layout="shared", overlong="truncate").pairs
    assert cut.responses_ids == [[3, 4], [3, 5]] and cut.scores == one.scores
    with pytest.raises(DataError, match="no list is left"):  # one token each, and the same
        fit_to_budget([one], 5, layout="shared", overlong="truncate")
    same = TokenizedPair([1, 2], [3, 4], [3, 4, 5], rejected_prompt_ids=[9])
    (cut,) = fit_to_budget([same], 5, layout="shared", overlong="truncate").pairs
    assert cut.chosen_ids == cut.rejected_ids == [3]  # to other prompts


@settings(max_examples=60, deadline=None)
@given(st.one_of(pairs, lists, singles))
def test_a_scored_prompt_leaves_the_sequences_as_they_are(example):
    if example.responses[-1:] == [example.prompt_ids[1:]] or getattr(example, "prompt_nll", False):
        return
    found = with_scored_prompt(example)
    assert whole(found) == whole(example)
    assert all(len(prompt) == 1 for prompt in found.prompts)
    assert (found.margin, found.weight, found.scores) == (
        example.margin, example.weight, example.scores,
    )  # fmt: skip


def whole(example):
    return [prompt + ids for prompt, ids in zip(example.prompts, example.responses)]


@settings(max_examples=60, deadline=None)
@given(ids, ids, ids)
def test_sums_from_the_first_difference(start, chosen, rejected):
    pair = TokenizedPair([1], start + chosen, start + rejected)
    found = from_first_difference(pair)
    assert whole(found) == whole(pair)
    one, other = found.chosen_ids, found.rejected_ids
    assert one[0] != other[0] or min(len(one), len(other)) == 1


def test_sums_from_the_first_difference_by_hand():
    pair = TokenizedPair([1], [2, 3, 4], [2, 3, 5, 6], where="here")
    found = from_first_difference(pair)
    assert (found.prompt_ids, found.chosen_ids, found.rejected_ids) == ([1, 2, 3], [4], [5, 6])
    found = from_first_difference(TokenizedPair([1], [2, 3], [2, 3, 4]))  # one begins the other
    assert (found.prompt_ids, found.chosen_ids, found.rejected_ids) == ([1, 2], [3], [3, 4])
    two = TokenizedPair([1], [2], [3], rejected_prompt_ids=[9], where="here")
    with pytest.raises(DataError, match=r"^here: from_first_difference needs one prompt"):
        from_first_difference(two)
