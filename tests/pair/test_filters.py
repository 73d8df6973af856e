"""What drops, weighs and adds pairs: by hand, on any rows, and under real tiny models."""

import copy
import math
import random
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pairing import candidate, gap, group, read_pairs, samples, write_stage

from fastdpo import storage
from fastdpo.data.batch import pack_pairs
from fastdpo.data.examples import TokenizedPair
from fastdpo.data.records import PreferenceRow, Prompt, prompt_key
from fastdpo.data.rendering import render_prompt
from fastdpo.data.rows import preference_rows, read_rows
from fastdpo.errors import DataError, ModelError
from fastdpo.model.prepare import packed_loss, prepare_model
from fastdpo.pair.config import PairConfig
from fastdpo.pair.filters import (
    Measured,
    beats_fresh,
    drop_duplicates,
    drop_truncated,
    equal_prompts,
    keep_lowest,
    measure,
    replay,
)
from fastdpo.pair.offline import (
    fresh_scores,
    offline_pairs,
    prompt_rows,
    with_scores,
    write_candidates,
)
from fastdpo.pair.rules import all_ranked, best_worst
from fastdpo.pair.stage import load_pairs, pair
from fastdpo.pair.transforms import combine
from fastdpo.pair.votes import consistency, flip_weakest, kendall_tau, smooth, soften, strengths
from fastdpo.score.stage import Scorer, score

torch.set_num_threads(1)


# Responses


def test_truncated_responses_are_dropped():
    rows = [candidate(0, j, 1.0, finish_reason=why) for j, why in enumerate(["stop", "length"])]
    assert drop_truncated(rows) == (rows[:1], {"truncated response": 1})
    assert drop_truncated(rows[:1]) == (rows[:1], {})


def test_of_equal_responses_the_first_is_left():
    rows = [
        candidate(0, 2, 5.0, [4]),
        candidate(0, 1, 3.0, [4]),
        candidate(0, 0, 3.0, [5]),
        candidate(1, 2, 3.0, [4]),
        candidate(0, 3, 3.0, [4], prompt_ids=[9]),  # elsewhere in a tree
    ]
    kept, dropped = drop_duplicates(rows)
    assert kept == rows[1:] and dropped == {"duplicate response": 1}


# Consistency


def test_kendall_tau_by_hand():
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1.0
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1.0
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / 3)  # a tie counts as 0
    assert kendall_tau([1, 1], [1, 1]) == 0.0


VALUES = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=7)


@settings(max_examples=100, deadline=None)
@given(pairs=VALUES, shuffle=st.randoms())
def test_kendall_tau_of_anything(pairs, shuffle):
    a, b = (list(x) for x in zip(*pairs))
    signs = [
        math.copysign(1, x[0] - y[0]) * math.copysign(1, x[1] - y[1])
        for i, x in enumerate(pairs)
        for y in pairs[:i]
        if x[0] != y[0] and x[1] != y[1]
    ]
    value = kendall_tau(a, b)
    assert value == pytest.approx(sum(signs) / (len(a) * (len(a) - 1) / 2))
    assert value == kendall_tau(b, a) and kendall_tau([-x for x in a], b) == -value
    shuffle.shuffle(pairs)
    assert kendall_tau(*zip(*pairs)) == value


def agreeing() -> tuple[list[Any], dict[tuple[int, int], float]]:
    """Prompts 0, 1, 2 with consistency 2/3, 0 and 1; 3 has one response."""
    rows = group([1.0, 2.0, 3.0], 0) + group([1.0, 2.0], 1) + group([5.0, 2.0], 2)
    rows += group([1.0], 3)
    before = [[1.0, 3.0, 2.0], [2.0, 1.0], [9.0, 0.0], [4.0]]
    return rows, {(i, j): x for i, scores in enumerate(before) for j, x in enumerate(scores)}


def test_consistency_becomes_smoothing():
    rows, before = agreeing()
    found = consistency(rows[::-1], before)
    assert found == {0: pytest.approx(2 / 3), 1: 0.0, 2: 1.0}
    pairs, _ = best_worst(rows)
    by_prompt = smooth(pairs, found, "prompt")
    assert [row.label_smoothing for row in by_prompt] == [pytest.approx(1 / 3), 1.0, 0.0]
    mean = smooth(pairs[:1], found, "mean")  # over all prompts, paired or not
    assert [row.label_smoothing for row in mean] == [pytest.approx(1 - 5 / 9)]
    assert "label_smoothing" not in pairs[0].to_json()


def test_consistency_of_a_round(tmp_path):
    rows, before = agreeing()
    candidates, scores = write_stage(tmp_path / "now", rows)
    old = [replace(x, score=before[x.place]) for x in rows]
    _, previous = write_stage(tmp_path / "before", old)
    out = tmp_path / "pairs.jsonl"
    for how, wanted in (("prompt", [1 / 3, 1.0, 0.0]), ("mean", [4 / 9] * 3)):
        pairing = PairConfig(consistency=how)
        summary = pair(candidates, scores, out, config=pairing, previous_scores=previous)
        assert [x.label_smoothing for x in load_pairs(out)] == pytest.approx(wanted)
        assert summary["consistency"] == pytest.approx(5 / 9)
        assert summary["dropped"] == {"fewer than two responses": 1}


def test_consistency_with_an_automatic_length_penalty_uses_one_penalty(tmp_path):
    # Longer responses score higher, by 0.5 and 2 a token: the penalty found is between the two, at
    # 0.75. The previous scores rise by 0.25 and 0.6, and alone would be given 0.375.
    rows, old = [], []
    for i, (now, before) in enumerate([(0.5, 0.25), (2.0, 0.6)]):
        for j, tokens in enumerate([1, 3, 5]):
            rows.append(candidate(i, j, now * tokens, [3] * tokens))
            old.append(replace(rows[-1], score=before * tokens))
    candidates, scores = write_stage(tmp_path / "now", rows)
    _, previous = write_stage(tmp_path / "before", old)
    summary = pair(
        candidates,
        scores,
        tmp_path / "pairs.jsonl",
        PairConfig(consistency="prompt", length_penalty="auto"),
        previous_scores=previous,
    )
    assert summary["shaping"]["length_penalty"] == 0.75
    # At 0.75 the second prompt's previous scores fall with length where the present ones rise.
    smoothing = [x.label_smoothing for x in load_pairs(tmp_path / "pairs.jsonl")]
    assert smoothing == [0.0, 1.0] and summary["consistency"] == 0.5


# Preference strength


def voted(*gaps: tuple[float, ...]) -> list[Any]:
    """Pairs of which scorer k gives chosen this much more than rejected."""
    pairs = []
    for i, by_scorer in enumerate(gaps):
        sides = [[0.5] * len(by_scorer), [0.5 + gap for gap in by_scorer]]
        rows = [candidate(i, j, float(j), scores=scores) for j, scores in enumerate(sides)]
        (row,), _ = best_worst(rows)
        pairs.append(replace(row, scores_chosen=sides[1], scores_rejected=sides[0]))
    return pairs


def test_strength_is_the_mean_gap():
    assert strengths(voted((1.0, 2.0), (-3.0, 1.0), (0.0, 0.0))) == [1.5, -1.0, 0.0]
    with pytest.raises(DataError, match=r"prompt 0.*scores of several scorers are missing"):
        strengths(best_worst(group([1.0, 2.0]))[0])


def test_strength_goes_by_the_weights_of_scores():
    pairs = voted((3.0, 1.0), (-1.0, -4.0), (1.0, 2.0))
    assert strengths(pairs, [1.0, -1.0]) == [1.0, 1.5, -0.5]
    assert strengths(pairs, [2.0, 0.0]) == [3.0, -1.0, 1.0]
    flipped, count = flip_weakest(pairs, 1.0, [1.0, -1.0])
    assert count == 1 and [x.flipped for x in flipped] == [None, None, True]
    softened, count = soften(pairs, 0.2, [1.0, -1.0])
    assert count == 1 and [x.label_smoothing for x in softened] == [None, None, 0.2]
    with pytest.raises(DataError, match=r"prompt 0: .* have 2 and 2 scores, of 3 scorers"):
        strengths(pairs, [1.0, 1.0, 1.0])


SEVERAL = st.lists(st.tuples(*[st.floats(-9, 9)] * 3), min_size=2, max_size=6)


@settings(max_examples=200, deadline=None)
@given(scores=SEVERAL, weights=st.tuples(*[st.floats(-2, 2)] * 3))
def test_no_pair_is_against_the_sum_it_was_labelled_by(scores, weights):
    """However the sums are rounded."""
    rows = group(combine([list(x) for x in zip(*scores)], [0] * len(scores), weights=weights))
    pairs, _ = all_ranked([replace(x, scores=list(s)) for x, s in zip(rows, scores)])
    assert all(value > 0 for value in strengths(pairs, weights))


def test_the_weakest_pairs_are_flipped():
    pairs = voted((1.0, 2.0), (-3.0, 1.0), (-4.0, 0.0), (0.5, 0.5), (-1.0, 0.0))
    flipped, count = flip_weakest(pairs, 0.4)
    assert count == 2 and [bool(row.flipped) for row in flipped] == [
        False, True, True, False, False,
    ]  # fmt: skip
    one, was = flipped[1], pairs[1]
    assert one.chosen == was.rejected and one.rejected == was.chosen
    assert one.chosen_ids == was.rejected_ids and one.rejected_ids == was.chosen_ids
    assert (one.score_chosen, one.score_rejected) == (0.0, 1.0)
    assert one.scores_chosen == [0.5, 0.5] and one.scores_rejected == [-2.5, 1.5]
    assert one.prompt_ids == was.prompt_ids and one.to_json().keys() - was.to_json() == {"flipped"}
    assert flip_weakest(pairs, 1.0)[1] == 3  # no more than are below 0
    assert flip_weakest(voted(*[(-1.0,)] * 100), 0.29)[1] == 29
    assert flip_weakest(pairs, 0.39)[1] == 1 and flip_weakest(pairs, 0.0) == (pairs, 0)
    assert [x.flipped for x in flip_weakest(pairs, 0.2)[0]] == [None, None, True, None, None]


def test_pairs_below_zero_are_softened():
    pairs = voted((1.0, 2.0), (-3.0, 1.0), (0.0, 0.0))
    softened, count = soften(pairs, 0.3)
    assert [row.label_smoothing for row in softened] == [None, 0.3, None] and count == 1


GAPS = st.lists(st.tuples(*[st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0])] * 3), max_size=8)


@settings(max_examples=100, deadline=None)
@given(gaps=GAPS, share=st.floats(0, 1))
def test_flips_of_anything(gaps, share):
    pairs = voted(*gaps)
    result, count = flip_weakest(pairs, share)
    assert count == sum(bool(row.flipped) for row in result) <= share * len(pairs) + 1e-6
    for row, was in zip(result, pairs):
        above = gap(row) > 0
        assert above != bool(row.flipped)
        assert above or strengths([was])[0] < 0
    left = [strengths([row])[0] for row in result if not row.flipped]
    turned = [-strengths([row])[0] for row in result if row.flipped]
    assert max(turned, default=-9) <= min((x for x in left if x < 0), default=0)


def test_scorers_vote_on_the_labels_of_a_round(tmp_path):
    rows = [candidate(i, j, 1.0 + j, [7, i, j] + [3] * 10 * j) for i in range(4) for j in range(2)]
    candidates, labels = write_stage(tmp_path / "a", rows)
    # With this they say 8, 3, 4 and -1 for the second response. It is 10 tokens longer, for which
    # it is labelled 5 lower: against them at prompts 1 and 2, at 2 the more.
    votes = {0: 7.0, 1: 2.0, 2: 3.0, 3: -2.0}
    others = [replace(x, score=votes[x.prompt_index] * x.sample_index) for x in rows]
    _, second = write_stage(tmp_path / "b", others)
    folders, out = [labels, second], tmp_path / "pairs.jsonl"
    config = PairConfig(flip_share=0.25, soft_label=0.1, length_penalty=0.5)
    summary = pair(candidates, folders, out, config)
    assert summary["flipped"] == 1 and summary["softened"] == 1 and summary["pairs"] == 4
    pairs = read_pairs(out)
    longer = [len(row.chosen_ids) - len(row.rejected_ids) for row in pairs]
    assert longer == [10, -10, 10, -10]
    assert [row.label_smoothing for row in pairs] == [None, 0.1, None, None]
    # With the second scorer's sign turned they say -6, -1, -2 and 3, and 5 less is the label.
    config = PairConfig(soft_label=0.1, length_penalty=0.5, weights=[1.0, -1.0])
    pair(candidates, folders, out, config)
    assert [row.label_smoothing for row in read_pairs(out)] == [None, None, None, 0.1]


def test_scorers_vote_on_the_labels_of_offline_pairs(tmp_path):
    rows = [row for i in range(4) for row in group([1.0, 2.0], i)]
    candidates, first = write_stage(tmp_path / "a", rows)
    _, second = write_stage(tmp_path / "b", rows)
    pool = offline(20, 10)
    # By the scorers' sum prompts 10 to 14 are labelled the wrong way, 11 and 13 the most.
    gaps = [1.0, 5.0, 1.0, 4.0, 1.0] + [-1.0] * 15
    for i, against in enumerate(gaps):
        votes: dict[str, Any] = {
            "scores_chosen": [0.0, 0.0],
            "scores_rejected": [against + 2, -2.0],
        }
        pool[i] = replace(pool[i], **votes)
    pool[5] = offline(1, 15)[0]  # has no votes
    out = tmp_path / "pairs.jsonl"
    summary = pair(
        candidates,
        [first, second],
        out,
        config=PairConfig(flip_share=0.11, soft_label=0.2, replay_share=5 / 6),
        replay=pool,
    )
    assert summary["replayed"] == 20 and (summary["flipped"], summary["softened"]) == (2, 3)
    pairs = read_pairs(out)
    flipped = [row.prompt_index for row in pairs if row.flipped]
    assert flipped == [11, 13]
    assert [row.prompt_index for row in pairs if row.label_smoothing is not None] == [10, 12, 14]
    assert samples(pairs)[5] == (0, 1) and pairs[5].scores_chosen == [7.0, -2.0]
    assert not any(row.flipped for row in pairs[:4])
    assert summary["mean_score_chosen"] == 4.0  # of what was sampled, by both scorers


def test_sampled_pairs_are_measured_as_they_were_voted(tmp_path):
    rows = [candidate(0, 0, 1.0, [7]), candidate(0, 1, 2.0, [7, 3, 3, 3])]
    candidates, scores = write_stage(tmp_path, rows)
    seen: list[Any] = []

    def measured(pairs: Any) -> Any:
        seen.extend(pairs)
        return Measured([0.0] * len(pairs), [0.0] * len(pairs))

    pair(
        candidates,
        [scores, scores],
        tmp_path / "pairs.jsonl",
        PairConfig(flip_share=1.0, max_difficulty=1.0, length_penalty=1.0),
        measure=measured,
    )
    assert len(seen[0].chosen_ids) == 4 and len(seen[0].rejected_ids) == 1


# Weights and shares


def test_every_prompt_weighs_the_same():
    pairs, _ = all_ranked(group([1.0, 2.0, 3.0], 0) + group([1.0, 2.0], 1))
    weighed = equal_prompts(pairs)
    assert [row.weight for row in weighed] == [pytest.approx(1 / 3)] * 3 + [1.0]
    # An offline pair's prompt_index is a place in other data.
    mixed = [replace(pairs[0], source=source) for source in ("sampled", "offline")]
    assert [row.weight for row in equal_prompts(mixed)] == [1.0, 1.0]


def test_the_lowest_share():
    values = [3.0, 1.0, 2.0, 1.0, 5.0]
    assert keep_lowest(values, 0.2) == [1]
    assert keep_lowest(values, 0.4) == [1, 3]
    assert keep_lowest(values, 0.41) == [1, 2, 3]
    assert keep_lowest(values, 1.0) == [0, 1, 2, 3, 4]
    assert keep_lowest(values, 1e-6) == [1]
    assert len(keep_lowest(list(range(100)), 0.07)) == 7
    assert keep_lowest([], 0.5) == []


# Offline pairs


def offline(count: int, start: int = 0, value: float | None = 1.0) -> list[Any]:
    return [
        replace(
            best_worst(group([0.0, 1.0], i))[0][0],
            score_chosen=value,
            source="offline",
            origin=Prompt("here", f"p{i}", extra={"more": 1}),
        )
        for i in range(start, start + count)
    ]


def test_prompts_are_told_apart_by_their_messages():
    chat = [{"role": "user", "content": "Hi"}]
    assert prompt_key("Hi") == prompt_key(chat) == prompt_key([{"content": "Hi", "role": "user"}])
    others = ["Ho", [{"role": "system", "content": "Hi"}], chat + chat]
    assert len({prompt_key(x) for x in ["Hi", *others]}) == 4  # type: ignore[misc]


def test_offline_pairs_must_beat_fresh_samples():
    pairs = offline(4)
    fresh = {prompt_key("p0"): 0.9, prompt_key("p1"): 1.0, prompt_key("p2"): 1.1}
    kept, dropped = beats_fresh(pairs, [fresh])
    assert [row.prompt_index for row in kept] == [0, 3]  # not as good as, better than
    assert dropped == {"offline: a fresh sample scores as high": 2}
    kept, _ = beats_fresh(pairs, [fresh], 0.05)
    assert [row.prompt_index for row in kept] == [0, 1, 3]
    # What an earlier round dropped stays out, whatever the policy gives now.
    kept, _ = beats_fresh(pairs, [fresh, dict.fromkeys(fresh, 0.0)])
    assert [row.prompt_index for row in kept] == [0, 3]
    assert beats_fresh(pairs, []) == (pairs, {})
    with pytest.raises(DataError, match="offline pair 0 has no score"):
        beats_fresh(offline(1, value=None), [fresh])
    assert len(beats_fresh(offline(1, 3, None), [fresh])[0]) == 1  # nothing to compare


def test_a_share_of_offline_pairs_is_drawn():
    pairs = best_worst([row for i in range(6) for row in group([0.0, 1.0], i)])[0]
    pool = offline(40)
    for share, wanted in ((0.5, 6), (0.25, 2), (0.3, 2), (0.0, 0), (0.1, 0), (0.8, 24)):
        drawn, dropped = replay(pairs, pool, share, seed=0)
        assert len(drawn) == wanted and dropped == {"offline: prompt has a sampled pair": 6}
        assert {row.prompt_index for row in drawn} <= set(range(6, 40))
        places = [row.prompt_index for row in drawn]
        assert places == sorted(set(places))
    assert replay(pairs, pool, 0.5, 0) == replay(pairs, pool, 0.5, 0)
    draws = [tuple(x.prompt_index for x in replay(pairs, pool, 0.5, s)[0]) for s in range(60)]
    assert len(set(draws)) > 50
    counts = [sum(i in draw for draw in draws) for i in range(6, 40)]
    assert min(counts) >= 2 and max(counts) < 30  # each is drawn in 6 of 34, about 10.6 of 60


def test_too_few_offline_pairs_are_all_used():
    pairs = best_worst([row for i in range(6) for row in group([0.0, 1.0], i)])[0]
    with pytest.warns(UserWarning, match=r"share of 0.5 takes 6 offline pairs, there are 2"):
        drawn, _ = replay(pairs, offline(8), 0.5, seed=0)
    assert [row.prompt_index for row in drawn] == [6, 7]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(replay(pairs, offline(12), 0.5, seed=0)[0]) == 6


@settings(max_examples=60, deadline=None)
@given(
    sampled=st.sets(st.integers(0, 12), min_size=1),
    pool=st.lists(st.integers(0, 20), max_size=25),
    share=st.floats(0, 0.9),
)
def test_replay_adds_up(sampled, pool, share):
    pairs = best_worst([row for i in sampled for row in group([0.0, 1.0], i)])[0]
    rows = [offline(1, i)[0] for i in pool]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn, dropped = replay(pairs, rows, share, seed=1)
    taken = sum(i in sampled for i in pool)
    assert dropped == ({"offline: prompt has a sampled pair": taken} if taken else {})
    wanted = share * len(pairs) / (1 - share)
    assert len(drawn) == min(math.floor(wanted + 1e-9), len(pool) - taken)
    assert not {row.prompt_index for row in drawn} & sampled


def test_replayed_pairs_are_written_with_their_source(tmp_path):
    rows = [row for i in range(4) for row in group([1.0, 2.0, 4.0], i)]
    folders, out = write_stage(tmp_path, rows), tmp_path / "pairs.jsonl"
    pairing = PairConfig(rule="curriculum", replay_share=0.5, seed=3, equal_prompts=True)
    summary = pair(*folders, out, config=pairing, replay=offline(20, value=None))
    assert summary["pairs"] == 16 and summary["replayed"] == 8 and summary["replay_share"] == 0.5
    assert summary["dropped"] == {"offline: prompt has a sampled pair": 4}
    assert summary["stages"] == [8, 8] and summary["mean_score_chosen"] == 4.0
    pairs = read_pairs(out)
    assert [row.source for row in pairs] == ["sampled"] * 8 + ["offline"] * 8
    assert all(not {"extra", "origin"} & row.keys() for row in storage.read_jsonl(out))
    assert [row.weight for row in pairs] == [0.5] * 8 + [1.0] * 8
    loaded = load_pairs(out)
    assert loaded[-1].extra["source"] == "offline" and loaded[-1].extra["score_chosen"] is None


PREFERENCES = [
    {"prompt": "tell me about the weather", "chosen": "no idea", "rejected": "be nice", "id": 7},
    {"prompt": "walk", "chosen": "on the beach " * 40, "rejected": "no"},
    {"prompt": "be nice", "chosen": "no idea at all", "rejected": "no"},
    {
        "prompt": [{"role": "system", "content": "be nice"}, {"role": "user", "content": "walks?"}],
        "chosen": [{"role": "assistant", "content": "the beach"}],
        "rejected": [{"role": "assistant", "content": "tell me"}],
    },
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.build_tokenizer()


@pytest.fixture
def preferences(tmp_path) -> list[PreferenceRow]:
    storage.write_jsonl_atomic(tmp_path / "preferences.jsonl", PREFERENCES)
    return preference_rows(read_rows(tmp_path / "preferences.jsonl"))


def test_offline_pairs_are_tokenized_as_samples_are(preferences, tokenizer):
    pairs, dropped = offline_pairs(preferences, tokenizer, max_length=100, progress=False)
    assert dropped == {"longer than max_length": 1}
    assert [row.prompt_index for row in pairs] == [0, 2, 3]
    for row in pairs:
        prompt = PREFERENCES[row.prompt_index]["prompt"]
        assert row.prompt == prompt
        assert row.prompt_ids == render_prompt(prompt, tokenizer, as_chat=True)  # type: ignore[arg-type]
        assert tokenizer.eos_token_id in row.chosen_ids
    assert pairs[0].chosen.strip() == "no idea" and pairs[2].rejected.strip() == "tell me"
    assert [row.extra for row in prompt_rows(pairs)][:2] == [{"id": 7}, {}]
    plain = copy.copy(tokenizer)
    plain.chat_template = None
    text = PreferenceRow("here", "walk\n", "no idea", "be nice")
    (row,), _ = offline_pairs([text], plain, max_length=100, progress=False)
    assert row.prompt_ids == plain(text="walk\n")["input_ids"]
    assert row.chosen == "no idea" and row.chosen_ids[-1] == tokenizer.eos_token_id


def test_prompts_that_are_held_out_or_too_long_are_left_out(preferences, tokenizer):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = "{{ tools }}" + tiny.CHAT_TEMPLATE
    first = [{"role": "user", "content": "tell me about the weather"}]
    last = [{**message, "name": None} for message in PREFERENCES[3]["prompt"]]  # type: ignore[union-attr]
    options: Any = {"max_length": 400, "progress": False}
    rows, dropped = offline_pairs(preferences, tokenizer, **options)
    assert [row.prompt_index for row in rows] == [0, 1, 2, 3] and dropped == {}
    # One by its messages, though its tools render otherwise, the other by its tokens.
    held = [Prompt("h:1", first, [{"name": "f"}]), Prompt("h:2", last)]
    rows, dropped = offline_pairs(preferences, tokenizer, exclude=held, **options)
    assert [row.prompt_index for row in rows] == [1, 2]
    assert dropped == {"offline: prompt is held out": 2}
    sizes = [len(row.prompt_ids) for row in rows]
    assert sizes[0] > sizes[1]
    rows, dropped = offline_pairs(
        preferences, tokenizer, exclude=held, max_new_tokens=400 - sizes[1], **options
    )
    assert [row.prompt_index for row in rows] == [2]
    assert dropped == {
        "offline: prompt is held out": 2,
        "offline: prompt leaves no room for max_new_tokens": 1,
    }
    with pytest.raises(DataError, match=r"no pair is left to replay \(offline: prompt is held out"):
        offline_pairs(preferences[:1], tokenizer, exclude=held, **options)


def test_fresh_samples_are_of_all_that_a_row_has(tokenizer, tmp_path):
    template = "{% for t in tools or [] %}{{ t.name }}{% endfor %}{{ mood }}" + tiny.CHAT_TEMPLATE
    with_tools = copy.copy(tokenizer)
    with_tools.chat_template = template
    more = {"tools": [{"name": "walks"}], "chat_template_kwargs": {"mood": "nice"}, "answer": "4"}
    storage.write_jsonl_atomic(tmp_path / "preferences.jsonl", [{**PREFERENCES[0], **more}])
    preferences = preference_rows(read_rows(tmp_path / "preferences.jsonl"))
    rows, _ = offline_pairs(preferences, with_tools, max_length=200, progress=False)
    (row,) = prompt_rows(rows)
    assert row.extra == {"answer": "4", "id": 7} and row.where == preferences[0].where
    ids = render_prompt(row.prompt, with_tools, row.tools, row.chat_template_kwargs, as_chat=True)
    assert ids == rows[0].prompt_ids and "walksnice" in with_tools.decode(ids)
    # What is written is what was before.
    folders = write_stage(tmp_path / "round", group([1.0, 2.0]))
    out = tmp_path / "pairs.jsonl"
    pair(*folders, out, config=PairConfig(replay_share=0.5), replay=rows)
    sampled, replayed = storage.read_jsonl(out)
    assert sampled.keys() == replayed.keys()


def test_offline_pairs_are_scored_compared_and_replayed(preferences, tokenizer, tmp_path):
    scorer = Scorer("tests:length", lambda prompts, responses: [len(x.strip()) for x in responses])
    pairs, _ = offline_pairs(preferences, tokenizer, max_length=100, progress=False)
    candidates, scores = tmp_path / "candidates", tmp_path / "scores"
    write_candidates(pairs, candidates, part_pairs=2)
    assert len(storage.list_parts(candidates)) == 2
    before = [path.stat().st_mtime_ns for path in storage.list_parts(candidates)]
    write_candidates(pairs, candidates, part_pairs=2)
    assert [path.stat().st_mtime_ns for path in storage.list_parts(candidates)] == before
    with pytest.raises(DataError, match="another offline"):
        write_candidates(pairs[:1], candidates, part_pairs=2)
    score(scorer, candidates, scores, progress=False)
    scored = with_scores(pairs, candidates, [scores])
    assert [(x.score_chosen, x.score_rejected) for x in scored] == [(7, 7), (14, 2), (9, 7)]
    twice = with_scores(pairs, candidates, [scores, scores], [1.0, -0.5])
    assert [row.score_chosen for row in twice] == [3.5, 7.0, 4.5]
    assert [x.scores_chosen for x in twice] == [[7, 7], [14, 14], [9, 9]]
    assert [x.scores_rejected for x in twice] == [[7, 7], [2, 2], [7, 7]]
    assert scored[0].scores_chosen is None
    with pytest.raises(ValueError, match="1 weights for 2 scorers"):
        with_scores(pairs, candidates, [scores, scores], [1.0])
    with pytest.raises(DataError, match="other responses for offline pair 2"):
        with_scores([pairs[0], replace(pairs[1], chosen_ids=[5])], candidates, [scores])
    with pytest.raises(DataError, match="other responses for offline pair 9"):
        with_scores([replace(pairs[0], prompt_index=9)], candidates, [scores])

    # Fresh samples of two of the prompts, the second as a message; of several the first counts.
    texts = [("tell me about the weather", ["12345678", "1"]), (PREFERENCES[3]["prompt"], ["123"])]
    fresh_rows = [
        candidate(i, j, 0.0, prompt=prompt, response=text)
        for i, (prompt, responses) in enumerate(texts)
        for j, text in enumerate(responses)
    ]
    write_stage(tmp_path / "fresh", fresh_rows)
    score(scorer, tmp_path / "fresh" / "candidates", tmp_path / "fresh" / "new", progress=False)
    fresh = fresh_scores(tmp_path / "fresh" / "candidates", [tmp_path / "fresh" / "new"])
    assert sorted(fresh.values()) == [3, 8]

    folders = write_stage(tmp_path / "round", [x for i in range(9) for x in group([1.0, 2.0], i)])
    summary = pair(
        *folders,
        tmp_path / "pairs.jsonl",
        config=PairConfig(replay_share=0.1, fresh_threshold=0.0, seed=1),
        replay=scored,
        fresh=[fresh],
    )
    assert summary["replayed"] == 1 and summary["pairs"] == 10
    assert summary["dropped"] == {"offline: a fresh sample scores as high": 1}
    assert load_pairs(tmp_path / "pairs.jsonl")[-1].extra["prompt_index"] in (2, 3)


# Under a model


def random_pairs(vocab: int, sizes: list[tuple[int, int, int]], seed: int = 0) -> list[Any]:
    generator = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [generator.randrange(3, vocab) for _ in range(count)]

    return [TokenizedPair(ids(p), ids(w), ids(r)) for p, w, r in sizes]


SIZES = [(5, 7, 3), (1, 1, 1), (9, 2, 12), (3, 20, 20), (4, 1, 6)]
VOCAB = 97


def slow(model: Any, pair: TokenizedPair) -> tuple[float, float]:
    """Length-normalized CHES, and difficulty, a sequence at a time in fp64."""
    sums, logps = [], []
    for ids in (pair.chosen_ids, pair.rejected_ids):
        inputs = torch.tensor([pair.prompt_ids + ids])
        with torch.no_grad():
            hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state[0]
            logits = model(input_ids=inputs, use_cache=False).logits[0]
        assert hidden.dtype == torch.float64
        total, logp = torch.zeros(hidden.shape[1], dtype=torch.float64), 0.0
        for k, token in enumerate(ids):
            place = len(pair.prompt_ids) - 1 + k  # the state that predicts this token
            total += hidden[place]
            logp += torch.log_softmax(logits[place], -1)[token].item()
        sums.append(total)
        logps.append(logp)
    chosen, rejected = sums
    chosen, rejected = chosen / len(pair.chosen_ids), rejected / len(pair.rejected_ids)
    normalized = chosen @ rejected - chosen @ chosen
    return normalized.item(), logps[1] - logps[0]


def build(family: tiny.Family) -> Any:
    torch.manual_seed(0)
    return family.build(VOCAB).eval()


FAMILIES = [tiny.LLAMA, tiny.QWEN, tiny.GEMMA, tiny.MISTRAL, tiny.GRANITE, tiny.OPT, tiny.MAMBA]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_measured_is_what_each_sequence_alone_gives(family):
    model = build(family)
    pairs = random_pairs(VOCAB, SIZES)
    exact = copy.deepcopy(model).double()
    wanted = torch.tensor([slow(exact, x) for x in pairs], dtype=torch.float64)
    options: Any = {"progress": False, "max_tokens": 64}
    normalized = measure(copy.deepcopy(model), pairs, **options)
    for found, column in ((normalized.ches, 0), (normalized.difficulty, 1)):
        scale = wanted[:, column].abs().max().clamp(min=1.0)
        error = (torch.tensor(found) - wanted[:, column]).abs().max() / scale
        assert error < 1e-4, (family.name, column)
    assert wanted[:, 1].abs().max() > 0.5


def test_single_tokens_have_no_similarity_beyond_the_prompt():
    """Both are predicted by the prompt's last state: <h, h> - |h|^2 is 0, whatever the model."""
    (pair_,) = random_pairs(VOCAB, [(6, 1, 1)])
    model = build(tiny.LLAMA)
    assert measure(model, [pair_], progress=False).ches == [0.0]


def test_what_else_is_in_a_batch_does_not_matter():
    model = build(tiny.LLAMA)
    pairs = random_pairs(VOCAB, SIZES)
    together = measure(model, pairs, max_tokens=10_000, progress=False)
    for i, pair_ in enumerate(pairs):
        alone = measure(model, [pair_], max_tokens=1, progress=False)  # over max_tokens: its own
        assert alone.ches == pytest.approx([together.ches[i]], rel=1e-4, abs=1e-4)
        assert alone.difficulty == pytest.approx([together.difficulty[i]], rel=1e-4, abs=1e-4)
    reverse = measure(model, pairs[::-1], max_tokens=64, progress=False).difficulty
    assert reverse == pytest.approx(together.difficulty[::-1], rel=1e-4, abs=1e-4)
    # Exchanging the sides changes the sign of the difficulty.
    swapped = [TokenizedPair(x.prompt_ids, x.rejected_ids, x.chosen_ids) for x in pairs]
    found = measure(model, swapped, progress=False).difficulty
    assert found == pytest.approx([-x for x in together.difficulty], rel=1e-4, abs=1e-4)


def test_bf16_is_near():
    model = build(tiny.LLAMA)
    pairs = random_pairs(VOCAB, SIZES)
    exact = measure(copy.deepcopy(model), pairs, progress=False)
    rough = measure(copy.deepcopy(model), pairs, bf16=True, progress=False)
    error = torch.tensor(rough.ches) - torch.tensor(exact.ches)
    assert 0 < error.abs().max() < 0.05 * torch.tensor(exact.ches).abs().max()


def test_models_and_pairs_that_cannot_be_measured():
    model = build(tiny.LLAMA)
    with pytest.raises(DataError, match="no pairs to measure"):
        measure(model, [])
    probed = {(i * 7919 + k) % VOCAB for i in range(44) for k in (0, 1)}
    token = next(i for i in range(3, VOCAB) if i not in probed)
    a, b, c = sorted(probed)[-3:]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = math.nan
    good = TokenizedPair([a, b], [c, a], [b])
    bad = TokenizedPair([a, b], [c, token, a], [b])
    assert len(measure(model, [good], progress=False).ches) == 1
    with pytest.raises(DataError, match=r"pair 1 .*not finite"):
        measure(model, [good, bad], progress=False)
    with pytest.raises(DataError, match="here:7: the model gives it"):
        measure(model, [replace(bad, where="here:7")], progress=False)
    with torch.no_grad():
        model.lm_head.weight[a] = math.nan
    with pytest.raises(ModelError, match="does not reproduce"):
        measure(model, [good], progress=False)


def test_pairs_of_a_round_are_filtered_under_a_model(tmp_path):
    model = build(tiny.LLAMA)
    measured = partial(measure, model, progress=False)
    rows = [row for i in range(8) for row in group([1.0, 2.0, 3.0], i + 3)]
    folders, out = write_stage(tmp_path, rows), tmp_path / "pairs.jsonl"
    every = best_worst(rows)[0]
    tokens = [TokenizedPair(x.prompt_ids, x.chosen_ids, x.rejected_ids) for x in every]
    found = measured(tokens)
    middle = sorted(found.difficulty)[3]
    summary = pair(*folders, out, config=PairConfig(max_difficulty=middle), measure=measured)
    kept = [i for i in range(8) if found.difficulty[i] <= middle]
    assert [x.extra["prompt_index"] - 3 for x in load_pairs(out)] == kept and len(kept) == 4
    assert summary["dropped"] == {"difficulty above max_difficulty": 4}
    assert summary["mean_difficulty"] == pytest.approx(sum(found.difficulty) / 8)
    # Half of those that difficulty leaves.
    pairing = PairConfig(max_difficulty=middle, ches_keep=0.5)
    summary = pair(*folders, out, config=pairing, measure=measured)
    lowest = sorted(sorted(kept, key=lambda i: found.ches[i])[:2])
    assert [x.extra["prompt_index"] - 3 for x in load_pairs(out)] == lowest
    assert summary["dropped"] == {
        "difficulty above max_difficulty": 4,
        "CHES above the share kept": 2,
    }
    assert summary["mean_ches"] == pytest.approx(sum(found.ches) / 8)
    none = PairConfig(max_difficulty=min(found.difficulty) - 1)
    with pytest.raises(DataError, match=r"no pair is left \(difficulty above max_difficulty: 8\)"):
        pair(*folders, tmp_path / "none.jsonl", config=none, measure=measured)
    assert not Path(tmp_path / "none.jsonl").exists()


def test_weights_and_smoothing_reach_the_loss(tmp_path):
    rows, before = agreeing()
    candidates, scores = write_stage(tmp_path / "now", rows)
    old = [replace(x, score=before[x.place]) for x in rows]
    _, previous = write_stage(tmp_path / "before", old)
    out = tmp_path / "pairs.jsonl"
    pairing = PairConfig(rule="all_ranked", consistency="prompt", equal_prompts=True)
    pair(candidates, scores, out, config=pairing, previous_scores=previous)
    pairs = load_pairs(out)
    model = prepare_model(build(tiny.LLAMA), layout="shared").eval()
    batch = pack_pairs(pairs)
    ref_logp_S = torch.linspace(-9, -3, 2 * len(pairs), dtype=torch.float64)
    with torch.no_grad():
        result = packed_loss(model, batch, ref_logp_S, beta=0.5, alpha=0.25)
    ratio_P2 = (result.logp_S - ref_logp_S).view(-1, 2)
    wanted = 0.0
    for (w, r), smoothing, weight in zip(
        ratio_P2.tolist(), [1 / 3] * 3 + [1.0, 0.0], [1 / 3] * 3 + [1.0, 1.0]
    ):
        z = 0.5 * (w - r)  # all responses are as long
        loss = (1 - smoothing) * math.log1p(math.exp(-z)) + smoothing * math.log1p(math.exp(z))
        wanted += weight * loss / len(pairs)
    assert result.loss.item() == pytest.approx(wanted, rel=1e-5)
