"""Pairing: the rules, what they count as dropped, and the files of the stage."""

import json
import math
import random
import shutil
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo import storage
from fastdpo.data.records import Candidate, PairRow, Scored
from fastdpo.errors import ConfigError, DataError
from fastdpo.pair.config import RULES, PairConfig
from fastdpo.pair.rules import (
    all_ranked,
    best_random,
    best_worst,
    curriculum,
    nearest_margin,
    tree_siblings,
)
from fastdpo.pair.stage import (
    load_pairs,
    pair,
    scored_candidates,
    select,
    split_stages,
)
from fastdpo.pair.votes import consistency
from fastdpo.score.stage import Scorer, score


def candidate(
    prompt_index: int, sample_index: int, score: Any, ids: Any = None, **more: Any
) -> Scored:
    ids = [7, prompt_index, sample_index] if ids is None else ids
    row: dict[str, Any] = {
        "prompt_index": prompt_index,
        "sample_index": sample_index,
        "prompt": f"p{prompt_index}",
        "prompt_ids": [1, prompt_index],
        "response": " ".join(map(str, ids)),
        "response_ids": ids,
        "finish_reason": "stop",
        "score": score,
        "scores": [score],
        **more,
    }
    return Scored(**row)


def gap(row: PairRow) -> float:
    assert row.score_chosen is not None and row.score_rejected is not None
    return row.score_chosen - row.score_rejected


def read_pairs(path: Path) -> list[PairRow]:
    return [PairRow.from_json(row, str(path)) for row in storage.read_jsonl(path)]


def group(scores: list[float], prompt_index: int = 0) -> list[Any]:
    return [candidate(prompt_index, j, score) for j, score in enumerate(scores)]


def samples(pairs: list[Any]) -> list[tuple[int, int]]:
    """Sample indices of chosen and rejected; they are the last tokens of what `group` makes."""
    return [(row.chosen_ids[-1], row.rejected_ids[-1]) for row in pairs]


# The rules, by hand


def test_best_random_draws_from_all_that_score_lower():
    rows = [row for i in range(300) for row in group([1.0, 4.0, 2.0, 3.0], i)]
    pairs, dropped = best_random(rows)
    assert len(pairs) == 300 and dropped == {}
    counts = Counter(samples(pairs))
    assert counts.keys() == {(1, 0), (1, 2), (1, 3)} and min(counts.values()) > 70
    assert best_random(rows, seed=0)[0] == pairs != best_random(rows, seed=1)[0]
    # What can't be paired isn't drawn.
    pairs, dropped = best_random(rows, min_gap=1.0)
    assert Counter(samples(pairs)).keys() == {(1, 0), (1, 2)} and dropped == {}


def test_best_random_names_the_reason_where_nothing_can_be_drawn():
    rows = group([1.0, 1.0], 0) + group([1.0, 2.0], 1) + group([1.0, 3.0], 2)
    rows += [candidate(3, 0, 1.0, [4]), candidate(3, 1, 9.0, [4])]
    pairs, dropped = best_random(rows, min_gap=1.0)
    assert [row.prompt_index for row in pairs] == [2]
    assert dropped == {"tie": 1, "gap at most min_gap": 1, "identical responses": 1}


def test_all_ranked_pairs_everything_that_differs():
    rows = group([3.0, 1.0, 2.0, 2.0])
    pairs, dropped = all_ranked(rows)
    assert sorted(samples(pairs)) == [(0, 1), (0, 2), (0, 3), (2, 1), (3, 1)]
    assert dropped == {"tie": 1}
    assert all(gap(row) > 0 for row in pairs)
    pairs, dropped = all_ranked(rows, max_pairs=2)
    assert samples(pairs) == [(0, 1), (0, 2)]  # the widest gaps, then the smaller index
    assert dropped == {"tie": 1, "over max_pairs": 3}
    pairs, dropped = all_ranked(rows, min_gap=1.0)
    assert samples(pairs) == [(0, 1)] and dropped == {"tie": 1, "gap at most min_gap": 4}


def test_curriculum_goes_from_wide_gaps_to_narrow_ones():
    rows = group([1.0, 4.0, 3.0, 2.0]) + group([5.0, 6.0, 6.0], 1) + group([1.0], 2)
    pairs, dropped = curriculum(rows)
    assert samples(pairs) == [(1, 0), (1, 3), (1, 2), (1, 0)]
    assert [row.stage for row in pairs] == [0, 1, 2, 0]
    assert dropped == {"tie": 1, "fewer than two responses": 1}
    many = group([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    pairs, dropped = curriculum(many, max_pairs=3)
    assert [row.score_rejected for row in pairs] == [1.0, 3.0, 5.0]
    assert [row.stage for row in pairs] == [0, 1, 2] and dropped == {"over max_pairs": 2}
    assert samples(curriculum(many, max_pairs=1)[0]) == [(0, 5)]
    assert len(curriculum(many, max_pairs=9)[0]) == 5


def test_nearest_margin():
    rows = group([0.0, 1.0, 3.0, 7.0])
    for target, wanted in ((2.0, (2, 1)), (100.0, (3, 0)), (0.1, (1, 0)), (3.4, (2, 0))):
        pairs, dropped = nearest_margin(rows, target=target)
        assert samples(pairs) == [wanted] and dropped == {}
    assert samples(nearest_margin(rows, target=0.1, min_gap=1.5)[0]) == [(2, 1)]
    # Two pairs are as near: the one that scores higher.
    assert samples(nearest_margin(group([0.0, 1.0, 5.0, 6.0]), target=1.0)[0]) == [(3, 2)]
    same = [candidate(0, 0, 1.0, [4]), candidate(0, 1, 2.0, [4]), candidate(0, 2, 9.0, [5])]
    pairs, _ = nearest_margin(same, target=1.0)  # not the two that are the same tokens
    assert pairs[0].chosen_ids == [5] and pairs[0].score_rejected == 2.0
    rows = group([1.0, 1.0], 0) + group([1.0, 2.0], 1)
    assert nearest_margin(rows, target=5.0, min_gap=1.0) == (
        [],
        {"tie": 1, "gap at most min_gap": 1},
    )


def node(sample_index: int, score: float, parent: Any, prompt_index: int = 0, **more: Any) -> Any:
    return candidate(prompt_index, sample_index, score, extra={"parent": parent, **more})


def test_tree_siblings_are_paired_within_a_family():
    rows = [
        node(0, 5.0, "root"),
        node(1, 1.0, "root"),
        node(2, 2.0, "root"),
        node(3, 9.0, 0),  # an only child
        node(4, 3.0, 1, visits=1),
        node(5, 4.0, 1, visits=3),
        node(6, 3.0, "1", visits=3),  # the parent "1" isn't the parent 1
        node(7, 4.0, "1", visits=1),
        node(8, 3.0, "root", 1),
        node(9, 4.0, "root", 1),
        node(10, 4.0, 8, 1),
        node(11, 4.0, 8, 1),
    ]
    pairs, dropped = tree_siblings(rows)
    assert samples(pairs) == [(0, 1), (5, 4), (7, 6), (9, 8)]
    assert dropped == {"tie": 1, "fewer than two responses": 1}
    # 1 - 1 / (1 + 1/3); the worse one visited more often says nothing but 1/2.
    assert [row.label_smoothing for row in pairs] == [None, pytest.approx(0.25), 0.5, None]


def test_visits_of_zero_and_bad_trees():
    for best, worst, smoothing in ((0, 0, 0.0), (8, 0, 0.0), (0, 1, 0.5), (9, 1, 0.1)):
        rows = [node(0, 2.0, "a", visits=best), node(1, 1.0, "a", visits=worst)]
        (row,), _ = tree_siblings(rows)
        assert row.label_smoothing == pytest.approx(smoothing)
    good = node(0, 2.0, "a", visits=3)
    for bad, message in (
        (candidate(0, 1, 1.0), "prompt 0, sample 1.*parent is None"),
        (node(1, 1.0, ["a"]), "parent is"),
        (node(1, 1.0, "a"), "sample 1.*visits of it and its sibling are None and 3"),
        (node(1, 1.0, "a", visits=-1), "are -1 and 3"),
        (node(1, 1.0, "a", visits="3"), "are '3' and 3"),
        (replace(node(1, 1.0, "a", visits=1), prompt_ids=[9]), "sample 1.*prompt_ids differ"),
    ):
        with pytest.raises(DataError, match=message):
            tree_siblings([good, bad])


@pytest.mark.parametrize("value", [10**400, math.nan, math.inf, None, "1", True])
def test_scores_that_are_no_finite_numbers_are_refused(value):
    with pytest.raises(DataError, match=r"prompt 3, sample 4.*score is"):
        candidate(3, 4, value)


def test_pairs_carry_the_score_of_every_scorer():
    rows = [candidate(0, 0, 1.0, scores=[1.0, 5.0]), candidate(0, 1, 2.0, scores=[2.0, 3.0])]
    (row,), _ = best_worst(rows)
    assert row.scores_chosen == [2.0, 3.0] and row.scores_rejected == [1.0, 5.0]


# Any scores: what is proposed is paired or dropped

TOKENS = st.lists(st.integers(3, 5), max_size=2)
SCORES = st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(-1e6, 1e6), st.integers(-3, 3))
RESPONSES = st.tuples(SCORES, TOKENS, st.booleans(), st.sampled_from(["a", "b"]))
PROMPTS = st.lists(st.lists(RESPONSES, min_size=1, max_size=5), max_size=5)
OF_PAIRS = [rule for rule in RULES if rule != "listwise"]
ONE_A_UNIT = {"best_worst", "best_random", "nearest_margin", "tree_siblings"}


@settings(max_examples=300, deadline=None)
@given(
    prompts=PROMPTS,
    rule=st.sampled_from(OF_PAIRS),
    min_gap=st.sampled_from([0.0, 0.5, 3.0]),
    max_pairs=st.sampled_from([None, 1, 2]),
    truncated=st.booleans(),
    duplicates=st.booleans(),
    shuffle=st.randoms(),
)
def test_pairs_and_drops_add_up(prompts, rule, min_gap, max_pairs, truncated, duplicates, shuffle):
    rows = [
        candidate(
            i, j, score, ids, finish_reason="length" if cut else "stop", extra={"parent": parent}
        )
        for i, responses in enumerate(prompts)
        for j, (score, ids, cut, parent) in enumerate(responses)
    ]
    max_pairs = max_pairs if rule in ("all_ranked", "curriculum") else None
    pairing = PairConfig(
        rule=rule,
        min_gap=min_gap,
        max_pairs=max_pairs,
        drop_truncated=truncated,
        drop_duplicates=duplicates,
    )
    pairs, dropped = select(rows, pairing)

    # Responses that are left, counted the slow way.
    wanted: Counter[str] = Counter()
    left: list[Any] = []
    for row in rows:
        twins = [x for x in left if x.prompt_index == row.prompt_index]
        if truncated and row.finish_reason == "length":
            wanted["truncated response"] += 1
        elif duplicates and row.response_ids in [x.response_ids for x in twins]:
            wanted["duplicate response"] += 1
        else:
            left.append(row)
    wanted["empty response"] = sum(not row.response_ids for row in left)
    for reason in ("truncated response", "duplicate response", "empty response"):
        assert dropped.pop(reason, 0) == wanted[reason]
    tree = rule == "tree_siblings"

    def unit(row: Any) -> Any:
        return row.prompt_index, row.extra["parent"] if tree else None

    sizes = {unit(row): 0 for row in rows}
    for row in left:
        sizes[unit(row)] += bool(row.response_ids)
    assert dropped.pop("fewer than two responses", 0) == sum(n < 2 for n in sizes.values())
    proposals = {
        "all_ranked": lambda n: n * (n - 1) // 2,
        "curriculum": lambda n: n - 1,
    }.get(rule, lambda n: 1)
    assert len(pairs) + sum(dropped.values()) == sum(proposals(n) for n in sizes.values() if n > 1)
    assert dropped.keys() <= {"tie", "gap at most min_gap", "identical responses", "over max_pairs"}

    by_ids = {(row.prompt_index, tuple(row.response_ids)) for row in left}
    for row in pairs:
        assert gap(row) > min_gap
        assert row.chosen_ids != row.rejected_ids
        for side in ("chosen_ids", "rejected_ids"):
            ids = getattr(row, side)
            assert ids and (row.prompt_index, tuple(ids)) in by_ids
        if rule == "best_worst":
            values = [x.score for x in left if x.prompt_index == row.prompt_index if x.response_ids]
            assert (row.score_chosen, row.score_rejected) == (max(values), min(values))
    counts = Counter(row.prompt_index for row in pairs)
    if rule in ONE_A_UNIT - {"tree_siblings"}:
        assert set(counts.values()) <= {1}
    elif max_pairs is not None:
        assert max(counts.values(), default=0) <= max_pairs
    if rule == "curriculum":
        for i in counts:
            of_prompt = [row for row in pairs if row.prompt_index == i]
            assert [row.stage for row in of_prompt] == list(range(counts[i]))
            gaps = [gap(row) for row in of_prompt]
            assert gaps == sorted(gaps, reverse=True)

    shuffle.shuffle(rows)
    assert select(rows, pairing)[0] == pairs


@pytest.mark.parametrize("rule", OF_PAIRS)
def test_one_pair_where_two_responses_differ(rule):
    rows = [node(0, 1.0, "a"), node(1, 3.0, "a")]
    pairs, dropped = select(rows, PairConfig(rule=rule))
    assert samples(pairs) == [(1, 0)] and dropped == {}


def test_a_prompt_that_loses_all_responses_is_counted():
    rows = [candidate(0, j, float(j), finish_reason="length") for j in range(3)]
    rows += [candidate(1, 0, 1.0), candidate(1, 1, 2.0, finish_reason="length")]
    rows += [candidate(2, 0, 1.0, [4]), candidate(2, 1, 2.0, [4]), candidate(2, 2, 0.0, [5])]
    pairs, dropped = select(rows, PairConfig(drop_truncated=True, drop_duplicates=True))
    # Of equal responses the first counts, with its own score.
    assert [(row.prompt_index, row.score_chosen) for row in pairs] == [(2, 1.0)]
    assert dropped == {
        "truncated response": 4,
        "duplicate response": 1,
        "fewer than two responses": 2,
    }
    assert select(rows, PairConfig())[1] == {} and len(select(rows, PairConfig())[0]) == 3


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, "rule=best must be one of best_worst, "),
        ({"min_gap": -0.1}, "min_gap=-0.1 must be finite and >= 0"),
        ({"min_gap": math.nan}, "min_gap"),
        ({"min_gap": math.inf}, "min_gap"),
        ({"target_margin": 0.0}, "target_margin=0.0 must be finite and > 0"),
        ({"max_pairs": 0}, "max_pairs=0 must be >= 1"),
        ({"target_margin": 2.0}, "target_margin=2.0 must be left out, .* rule be nearest_margin"),
        ({"max_pairs": 2}, "max_pairs=2 must be left out, .* rule be all_ranked or curriculum"),
        ({"equal_prompts": True}, "equal_prompts=True must be left out"),
        (
            {"rule": "all_ranked", "max_pairs": 1, "equal_prompts": True},
            "equal_prompts=True must be left out",
        ),
        ({"consistency": "avg"}, "consistency=avg must be one of none, mean, prompt"),
        ({"flip_share": 1.1}, r"flip_share=1.1 must be in \[0, 1\]"),
        ({"soft_label": -0.1}, "soft_label"),
        ({"ches_keep": 0.0}, r"ches_keep=0.0 must be in \(0, 1\]"),
        ({"max_difficulty": math.inf}, "max_difficulty=inf must be finite"),
        ({"replay_share": 1.0}, r"replay_share=1.0 must be in \[0, 1\)"),
        ({"fresh_threshold": math.nan}, "fresh_threshold=nan must be finite"),
        ({"rule": "tree_siblings", "consistency": "mean"}, "tree_siblings and consistency each"),
        ({"consistency": "mean", "flip_share": 0.2}, "consistency and flip_share or soft_label"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        PairConfig(**options)


def test_what_options_need():
    assert not PairConfig(rule="curriculum", max_pairs=3, seed=-1).needs_model
    assert PairConfig(ches_keep=0.5).needs_model and PairConfig(max_difficulty=0.0).needs_model
    assert (
        PairConfig(soft_label=0.1).needs_several_scorers and not PairConfig().needs_several_scorers
    )


# The files of the stage


def write_stage(folder: Path, rows: list[Any], per_part: int = 3) -> tuple[Path, Path]:
    """Candidates and their scores, in parts, the candidates of a part in reverse order."""
    for name, columns in (
        ("candidates", Candidate.__dataclass_fields__),
        ("scores", ("prompt_index", "sample_index", "score")),
    ):
        for part, start in enumerate(range(0, len(rows), per_part)):
            these = [
                {column: getattr(row, column) for column in columns}
                for row in rows[start : start + per_part]
            ]
            if name == "candidates":
                these.reverse()
            storage.write_jsonl_atomic(storage.part_path(folder / name, part), these)
    return folder / "candidates", folder / "scores"


def test_each_rule_writes_what_it_selects(tmp_path):
    rows = [node(j, s, "a", i) for i in range(4) for j, s in enumerate([1.0, 4.0, 2.5 + i, 3.0])]
    folders = write_stage(tmp_path, rows)
    for rule in OF_PAIRS:
        pairing = PairConfig(rule=rule, min_gap=1.0, seed=3)
        out = tmp_path / rule / "pairs.jsonl"
        summary = pair(*folders, out, config=pairing)
        wanted, dropped = select(rows, pairing)
        assert storage.read_jsonl(out) == [row.to_json() for row in wanted]
        assert summary["dropped"] == dropped and summary["pairs"] == len(wanted)
        assert json.loads(out.with_suffix(".summary.json").read_text()) == summary
        loaded = load_pairs(out)
        assert [x.chosen_ids for x in loaded] == [row.chosen_ids for row in wanted]


def test_stages_are_counted_loaded_and_split(tmp_path):
    rows = group([1.0, 4.0, 3.0], 0) + group([1.0, 4.0], 1)
    out = tmp_path / "pairs.jsonl"
    summary = pair(*write_stage(tmp_path, rows), out, config=PairConfig(rule="curriculum"))
    assert summary["stages"] == [2, 1]
    easy, hard = split_stages(load_pairs(out))
    assert [x.extra["stage"] for x in easy] == [0, 0] and [x.extra["stage"] for x in hard] == [1]
    assert hard[0].rejected_ids == [7, 0, 2]
    pair(*write_stage(tmp_path, rows), out)
    assert len(split_stages(load_pairs(out))) == 1 and "stage" not in load_pairs(out)[0].extra


def test_weights_make_prompts_equal(tmp_path):
    rows = group([1.0, 4.0, 3.0], 0) + group([1.0, 4.0], 1)
    out = tmp_path / "pairs.jsonl"
    pair(
        *write_stage(tmp_path, rows), out, config=PairConfig(rule="all_ranked", equal_prompts=True)
    )
    assert [x.weight for x in load_pairs(out)] == [pytest.approx(1 / 3)] * 3 + [1.0]


def test_reading_pairs_checks_what_the_loss_will_use(tmp_path):
    (row,), _ = best_worst(group([1.0, 2.0]))
    good = row.to_json()
    path = tmp_path / "pairs.jsonl"
    more = {"weight": 0.5, "label_smoothing": 1.0, "margin": -2.0, "stage": 2, "source": "offline"}
    old = {"smoothing": 0.25}  # the column's name in files of older runs
    storage.write_jsonl_atomic(path, [{**good, **more}, good, {**good, **old}])
    loaded, plain, older = load_pairs(path)
    assert (loaded.weight, loaded.label_smoothing, loaded.margin) == (0.5, 1.0, -2.0)
    assert older.label_smoothing == 0.25 and older.scores == [2.0, 1.0]
    assert loaded.extra == {**plain.extra, "stage": 2, "source": "offline"}
    assert (plain.weight, plain.label_smoothing) == (1.0, 0.0)
    for key, value in (
        ("weight", -1.0),
        ("weight", "1"),
        ("label_smoothing", 1.5),
        ("label_smoothing", None),
        ("margin", "1"),
        ("stage", 1.0),
        ("stage", -1),
        ("source", "elsewhere"),
        ("score_chosen", "1"),
    ):
        storage.write_jsonl_atomic(path, [good, {**good, key: value}])
        with pytest.raises(DataError, match=rf"pairs\.jsonl:2: {key} is {value!r}"):
            load_pairs(path)


def test_several_scorers_become_one_score(tmp_path):
    rows = group([1.0, 2.0, 3.0])
    candidates, first = write_stage(tmp_path, rows)
    second = tmp_path / "scores-2"
    others = [replace(row, score=10.0 * (row.sample_index == 1)) for row in rows]
    write_stage(tmp_path / "other", others)
    (tmp_path / "other" / "scores").rename(second)
    config = PairConfig(weights=[1.0, 1.0])
    found, facts = scored_candidates(candidates, [first, second], config)
    assert [row.scores for row in found] == [[1.0, 0.0], [2.0, 10.0], [3.0, 0.0]]
    assert facts.keys() == {"shaping"}
    out = tmp_path / "pairs.jsonl"
    pair(candidates, [first, second], out, config)
    (row,) = read_pairs(out)
    assert samples([row]) == [(1, 0)]
    assert row.scores_chosen == [2.0, 10.0] and row.scores_rejected == [1.0, 0.0]
    config = PairConfig(weights=[1.0, 0.0])
    pair(candidates, [first, second], out, config)
    assert samples(read_pairs(out)) == [(2, 0)]
    with pytest.raises(ValueError, match=r"weights=\[2.0\] must be one for each of the 2 scorers"):
        pair(candidates, [first, second], out, PairConfig(weights=[2.0]))
    part = storage.part_path(second, 0)
    broken = storage.read_jsonl(part)
    storage.write_jsonl_atomic(part, [*broken[:2], {**broken[2], "score": None}])
    with pytest.raises(DataError, match=r"scores-2: prompt 0, sample 2: the score is None"):
        pair(candidates, [first, second], out, config)


def test_the_length_penalty_is_found_on_what_can_be_paired(tmp_path):
    """Longer responses score higher; those that were cut are the longest, and are disliked."""
    draw = random.Random(0)
    rows = []
    for i in range(300):
        for j in range(4):
            cut = draw.random() < 0.3
            tokens = 60 if cut else draw.randrange(5, 40)
            score = -5.0 if cut else 0.1 * tokens
            why = "length" if cut else "stop"
            ids = [1000 + i, j] + [3] * (tokens - 2)
            rows.append(candidate(i, j, score + draw.gauss(0, 1), ids, finish_reason=why))
        # A copy that a noisy scorer thinks the worst of.
        rows.append(replace(rows[-1], sample_index=4, score=-9.0))
    folders, out = write_stage(tmp_path, rows, 500), tmp_path / "pairs.jsonl"
    config = PairConfig(length_penalty="auto", drop_truncated=True, drop_duplicates=True)
    summary = pair(*folders, out, config)
    assert summary["dropped"]["truncated response"] > 300
    pairs = read_pairs(out)
    gap = sum(len(x.chosen_ids) - len(x.rejected_ids) for x in pairs) / len(pairs)
    facts = summary["shaping"]
    assert len(pairs) > 250 and abs(gap) < 0.2
    # A prompt with one response left proposes no pair and is not in the mean of the facts.
    assert gap == pytest.approx(facts["length_gap"])
    assert facts["length_gap_before"] > 5 and facts["length_penalty"] > 0.05


def on_disk(folder: Path, rows: list[Any], *scorers: list[float]) -> tuple[Path, list[Path]]:
    """Candidates, and a folder for what each scorer gives them."""
    for k, scores in enumerate(scorers):
        write_stage(folder / str(k), [replace(x, score=s) for x, s in zip(rows, scores)])
    return folder / "0" / "candidates", [folder / str(k) / "scores" for k in range(len(scorers))]


def test_scores_are_compared_with_the_responses_of_a_reference(tmp_path):
    """By the first scorer the second is far beyond the start's responses, which hardly counts."""
    rows = group([0.0] * 3, 0)
    candidates, scores = on_disk(tmp_path / "now", rows, [0.0, 30.0, 9.0], [0.0, -3.0, 8.0])
    start = on_disk(tmp_path / "start", group([0.0] * 2, 0) + group([0.0], 1), [1.0, 3.0, 7.0],
                    [2.0, 0.0, 7.0])  # fmt: skip
    config = PairConfig(combine="log_sigmoid", transform="par")
    found, _ = scored_candidates(candidates, scores, config, start)

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    centre = 1.0364333894937898  # the 85th percentile of a standard normal; both have std 1

    def both(a: float, b: float) -> float:
        return log_sigmoid(a - 2 - centre) + log_sigmoid(b - 1 - centre)

    references = [both(1.0, 2.0), both(3.0, 0.0)]
    for row, (a, b) in zip(found, [(0.0, 0.0), (30.0, -3.0), (9.0, 8.0)]):
        wins = [1 / (1 + math.exp(x - both(a, b))) for x in references]
        assert row.score == pytest.approx(sum(wins) / 2)
    # Which of the two is better depends on whom they are compared with.
    out = tmp_path / "pairs.jsonl"
    config = PairConfig(combine="log_sigmoid")
    for reference, best in ((start, 2), (None, 1)):
        pair(candidates, scores, out, config, reference_scores=reference)
        assert samples(read_pairs(out))[0][0] == best


def test_references_of_other_prompts_are_refused(tmp_path):
    candidates, scores = on_disk(tmp_path / "now", group([0.0] * 2, 4), [1.0, 2.0])
    start = group([0.0] * 2, 3)
    others = [candidate(4, 0, 0.0, prompt="what?")]
    out = tmp_path / "pairs.jsonl"
    par = PairConfig(transform="par", min_gap=0.1)
    for i, (rows, message) in enumerate(
        ((start, "prompt 4 has no response"), (others, "prompt 4 has another text"))
    ):
        folders = on_disk(tmp_path / str(i), rows, [1.0] * len(rows))
        with pytest.raises(DataError, match=message):
            pair(candidates, scores, out, par, reference_scores=folders)
    own = (candidates, scores)
    for config, reference, previous, message in (
        (par, (candidates, scores * 2), [], "1 scorers, got 2"),
        (PairConfig(), own, [], "reference_scores need transform=par"),
        (PairConfig(transform="mean_std", min_gap=0.1), own, [], "need transform=par"),
        (
            replace(par, consistency="mean"),
            own,
            scores,
            "consistency=mean ranks .* reference_scores",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            pair(
                candidates, scores, out, config,
                reference_scores=reference, previous_scores=previous,
            )  # fmt: skip
    assert not out.exists()


def test_shaping_that_can_change_nothing_is_refused(tmp_path):
    """A transform keeps the order, and so does one scorer's weight: where nothing reads scores, and
    nothing looks at gaps, it does nothing. What is written is read by whoever has the file."""
    par, both = {"transform": "par"}, {"combine": "log_sigmoid"}
    idle: list[tuple[dict[str, Any], int]] = [
        (par, 1),
        (par, 2),
        ({"transform": "win_rate"}, 1),
        ({"transform": "mean_std", "weights": [1.0, -1.0]}, 2),
        (both, 1),
        ({"weights": [2.0]}, 1),
        (both | par, 2),
    ]
    others: list[dict[str, Any]] = [
        {},
        {"rule": "all_ranked"},
        {"rule": "curriculum", "max_pairs": 2},
        {"rule": "listwise"},
    ]
    for shaping, count in idle:
        for rules in others:
            config = PairConfig(**shaping, **rules)
            with pytest.raises(ConfigError, match="changes nothing: it keeps the order"):
                config.check_shaping(count, read=False)
            config.check_shaping(count, read=True)
    matters: list[tuple[dict[str, Any], int]] = [
        (both, 2),
        ({"weights": [-1.0]}, 1),
        (par | {"length_penalty": 0.1}, 1),
        (par | {"min_gap": 0.01}, 1),
        (par | {"rule": "nearest_margin"}, 1),
        (par | {"rule": "all_ranked", "max_pairs": 2}, 2),
    ]
    for options, count in matters:
        PairConfig(**options).check_shaping(count, read=False)
    candidates, scores = on_disk(tmp_path, group([0.0] * 3), [1.0, 2.0, 0.0])
    pair(candidates, scores, tmp_path / "pairs.jsonl", PairConfig(transform="par"))
    [row] = storage.read_jsonl(tmp_path / "pairs.jsonl")
    sigmoid = [1 / (1 + math.exp(-x)) for x in (1.0, 2.0)]
    wanted = sum(sigmoid) / 2, 1 - sum(sigmoid) / 2
    assert [row["score_chosen"], row["score_rejected"]] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("shaping", "raw", "start"),
    [
        # sigmoid(50) and sigmoid(60) are both 1, sigmoid(-800) and sigmoid(-900) both 0.
        (PairConfig(transform="par"), [50.0, -800.0, 60.0, -900.0, 1.0], [0.0]),
        # log sigmoid is 0 from 746 on.
        (PairConfig(transform="log_sigmoid"), [800.0, 1.0, 900.0, -5.0, -6.0], [0.0]),
        (PairConfig(combine="log_sigmoid"), [800.0, 1.0, 900.0, -5.0, -6.0], [0.0]),
        # Of equal lengths a length penalty leaves the order of scores.
        (PairConfig(transform="par", length_penalty=2.0), [50.0, 0.0, 60.0, -900.0, -800.0], [0.0]),
        (PairConfig(transform="mean_std"), [1e-3, 0.0, 2e-3, -1e17, -1e18], None),
    ],
)  # fmt: skip
def test_scores_that_a_transform_rounds_to_the_same_keep_their_order(tmp_path, shaping, raw, start):
    candidates, scores = on_disk(tmp_path, group([0.0] * 5), raw)
    out = tmp_path / "pairs.jsonl"
    references = start and on_disk(tmp_path / "start", group([0.0]), start)
    ranked = sorted(range(5), key=lambda i: -raw[i])
    # A cap has no effect, but makes the rule one that looks at gaps.
    most = replace(shaping, rule="all_ranked", max_pairs=10)
    summary = pair(candidates, scores, out, most, reference_scores=references)
    assert summary["dropped"] == {} and summary["pairs"] == 10
    assert set(samples(read_pairs(out))) == set(combinations(ranked, 2))
    widest = replace(most, max_pairs=1)
    pair(candidates, scores, out, widest, reference_scores=references)
    assert samples(read_pairs(out)) == [(ranked[0], ranked[-1])]
    rows, _ = scored_candidates(candidates, scores, shaping, reference_scores=references)
    for rule in (best_worst, best_random):
        assert samples(rule(rows)[0])[0][0] == ranked[0]
    assert samples(best_worst(rows)[0]) == [(ranked[0], ranked[-1])]
    assert samples(curriculum(rows)[0]) == [(ranked[0], other) for other in ranked[:0:-1]]
    # Agreement with the raw scores is whole, and none with their reverse.
    for sign, agreement in ((1.0, 1.0), (-1.0, 0.0)):
        before = {(0, i): sign * value for i, value in enumerate(raw)}
        assert consistency([replace(x, prompt_index=0) for x in rows], before) == {0: agreement}


def test_a_tie_after_the_length_penalty_is_one(tmp_path):
    rows = [candidate(0, i, 0.0, [5] * n) for i, n in enumerate((2, 4))]
    candidates, scores = on_disk(tmp_path, rows, [1.0, 2.0])
    with pytest.raises(DataError, match="tie: 1"):
        pair(candidates, scores, tmp_path / "pairs.jsonl", PairConfig(length_penalty=0.5))


def test_votes_that_can_change_no_label_are_refused(tmp_path):
    rows = group([0.0] * 3)
    candidates, scores = on_disk(tmp_path, rows, [1.0, 2.0, 0.0], [5.0, 0.0, 1.0])
    out = tmp_path / "pairs.jsonl"
    ranked: dict[str, Any] = {"rule": "all_ranked", "flip_share": 0.25, "soft_label": 0.1}
    unscored = [replace(best_worst(group([1.0, 2.0], 9))[0][0], score_chosen=None)]
    shapings: list[dict[str, Any]] = [{}, {"weights": [1.0, -1.0], "transform": "par"}]
    for shaping in shapings:
        with pytest.raises(ConfigError, match=r"flip_share=0.25 and soft_label=0.1 can change no"):
            pair(candidates, scores, out, PairConfig(**ranked, **shaping))
        replayed = PairConfig(flip_share=0.25, replay_share=0.5, **shaping)
        with pytest.raises(ConfigError, match=r"^flip_share=0.25 can change no label"):
            pair(candidates, scores, out, replayed, replay=unscored)
    assert not out.exists()
    reordering: list[dict[str, Any]] = [{"combine": "log_sigmoid"}, {"length_penalty": 0.1}]
    for more in reordering:
        assert "flipped" in pair(candidates, scores, out, PairConfig(**ranked, **more))
    PairConfig(**ranked).check_votes(2, offline=True)
    PairConfig().check_votes(1, offline=False)


def test_an_option_without_its_input_is_refused(tmp_path):
    folders = write_stage(tmp_path, group([1.0, 2.0]))
    out = tmp_path / "pairs.jsonl"
    wanted: list[tuple[dict[str, Any], str]] = [
        ({"consistency": "mean"}, "consistency needs previous_scores of 1 scorers, got 0"),
        (
            {"flip_share": 0.2},
            "flip_share=0.2 can change no label with 1 scorer; give a list of at least two",
        ),
        ({"ches_keep": 0.5}, "ches_keep or max_difficulty needs measure"),
        ({"replay_share": 0.5}, "replay_share needs offline pairs in replay"),
        ({"fresh_threshold": 0.0}, "fresh_threshold needs replay_share > 0"),
    ]
    for options, message in wanted:
        with pytest.raises(ConfigError, match=message):
            pair(*folders, out, config=PairConfig(**options))
    with pytest.raises(ConfigError, match="at least one folder"):
        pair(folders[0], [], out)
    assert not out.exists()


def test_the_order_of_rows_on_disk_does_not_matter(tmp_path):
    rows = [row for i in range(6) for row in group([1.0, 2.0, 3.0, 4.0], i)]
    pairing = PairConfig(rule="best_random", seed=5)
    pair(*write_stage(tmp_path / "a", rows), tmp_path / "a.jsonl", config=pairing)
    random.Random(0).shuffle(rows)
    pair(*write_stage(tmp_path / "b", rows), tmp_path / "b.jsonl", config=pairing)
    for suffix in (".jsonl", ".summary.json"):
        a, b = ((tmp_path / name).with_suffix(suffix).read_bytes() for name in ("a", "b"))
        assert a == b


def test_scores_of_other_candidates_are_refused(tmp_path):
    """By the content of the candidates that were scored, not by their places."""
    rows = group([1.0, 2.0])
    candidates, scores = write_stage(tmp_path, rows)
    shutil.rmtree(scores)
    score(Scorer("length", lambda _, texts: list(map(len, texts))), candidates, scores)
    rows[1] = replace(rows[1], response="something else", response_ids=[7, 0, 9])
    out = tmp_path / "pairs.jsonl"
    with pytest.raises(DataError, match="no pair is left"):  # both are as long
        pair(candidates, scores, out)
    write_stage(tmp_path / "again", rows)
    shutil.copytree(tmp_path / "again" / "candidates", candidates, dirs_exist_ok=True)
    with pytest.raises(DataError, match="scores of other candidates"):
        pair(candidates, scores, out)
    score(Scorer("length", lambda _, texts: list(map(len, texts))), candidates, scores)
    assert pair(candidates, scores, out)["pairs"] == 1
