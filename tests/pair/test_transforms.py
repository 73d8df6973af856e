"""What becomes of scores before pairing: combinations, transforms, and the price of length."""

import math
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.data.records import Candidate
from fastdpo.errors import ConfigError
from fastdpo.pair.config import TRANSFORMS, PairConfig
from fastdpo.pair.transforms import (
    combine,
    find_alpha,
    length_gap,
    penalize,
    shape,
    transform,
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def row(prompt_index: int, tokens: int, text: str = "x"):
    return Candidate(prompt_index, 0, "p", [1], text, [7] * tokens, "stop")


# Transforms


def test_par_is_the_expected_win_rate_among_the_others():
    values = transform([1.0, 0.0, 3.0, 5.0], ["a", "a", "b", "a"], "par")
    assert values == pytest.approx(
        [
            (sigmoid(1) + sigmoid(-4)) / 2,
            (sigmoid(-1) + sigmoid(-5)) / 2,
            0.5,  # alone
            (sigmoid(4) + sigmoid(5)) / 2,
        ]
    )
    given_references = transform([1.0, 3.0], ["a", "b"], "par", references={"a": [0, 2], "b": [3]})
    assert given_references == pytest.approx([(sigmoid(1) + sigmoid(-1)) / 2, 0.5])


def test_log_sigmoid_is_centred_at_a_high_percentile():
    z = NormalDist().inv_cdf(0.85)
    assert z == pytest.approx(1.0364, abs=1e-4)
    reference = 2.0 + z * math.sqrt(8 / 3)
    values = transform([0.0, 2.0, 9.0, 4.0], [0, 0, 1, 0], "log_sigmoid")
    by_hand = [math.log(sigmoid(x - reference)) for x in (0.0, 2.0, 4.0)]
    assert values == pytest.approx([*by_hand[:2], math.log(0.5), by_hand[2]])
    given_references = transform([0.0], [0], "log_sigmoid", references={0: [1.0, 3.0], 5: [0.0]})
    assert given_references == pytest.approx([math.log(sigmoid(-2 - z))])


def test_mean_std():
    values = transform([1.0, 2.0, 3.0, 7.0, 7.0], [0, 0, 0, 1, 1], "mean_std")
    assert values == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5), 0, 0])


def test_none_leaves_scores_alone():
    assert transform([3, 1.5], [0, 0], "none") == [3.0, 1.5]


@pytest.mark.parametrize("how", ["par", "log_sigmoid", "mean_std"])
def test_huge_scores_stay_finite(how):
    values = transform([-1e6, 0.0, 1e6], [0, 0, 0], how)
    assert all(map(math.isfinite, values)) and values == sorted(values)


def test_transforms_name_what_is_wrong():
    for references in ({1: [0.0]}, {0: []}):
        with pytest.raises(ValueError, match="no scores for prompt 0"):
            transform([1.0], [0], "par", references=references)


SCORES = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-30, 30), st.integers(-3, 3))
GROUPS = st.lists(st.tuples(st.integers(0, 3), SCORES, st.integers(1, 30)), max_size=20)


@settings(max_examples=100, deadline=None)
@given(rows=GROUPS, how=st.sampled_from(TRANSFORMS))
def test_a_transform_keeps_the_order_within_a_prompt(rows, how):
    groups, scores = [g for g, _, _ in rows], [float(s) for _, s, _ in rows]
    values = transform(scores, groups, how)
    for i, group in enumerate(groups):
        for j, other in enumerate(groups):
            if group == other and scores[i] < scores[j]:
                assert values[i] <= values[j]
            if group == other and scores[i] == scores[j]:
                assert values[i] == pytest.approx(values[j], abs=1e-12)


# Combinations


def test_weights_are_a_direction():
    scores = [[1.0, 2.0], [10.0, 0.0]]
    assert combine(scores, [0, 0]) == [11.0, 2.0]
    assert combine(scores, [0, 0], weights=[1.0, -0.5]) == [-4.0, 2.0]
    assert combine([[3.0, 4.0]], [0, 1]) == [3.0, 4.0]


def test_log_sigmoids_are_a_logical_and():
    # The first is best in one respect and bad in the other, the second is good in both.
    groups, scores = [0, 0, 0], [[20.0, 3.0, 0.0], [-8.0, 3.0, 4.0]]
    references = [{0: [0.0]}, {0: [0.0]}]
    summed = combine(scores, groups)
    both = combine(scores, groups, how="log_sigmoid", references_K=references)
    assert max(range(3), key=lambda i: summed[i]) == 0
    assert max(range(3), key=lambda i: both[i]) == 1
    by_hand = [math.log(sigmoid(a)) + math.log(sigmoid(b)) for a, b in zip(*scores)]
    assert both == pytest.approx(by_hand)


def test_log_sigmoids_are_centred_for_each_scorer():
    groups, scores = [0, 0, 1, 1], [[9.0, 3.0, 0.0, 1.0], [0.0, 3.0, 3.5, 2.0]]
    parts = [transform(x, groups, "log_sigmoid") for x in scores]
    both = combine(scores, groups, how="log_sigmoid")
    assert both == pytest.approx([a + b for a, b in zip(*parts)])
    weighted = combine(scores, groups, how="log_sigmoid", weights=[2.0, 1.0])
    assert weighted == pytest.approx([2 * a + b for a, b in zip(*parts)])
    rows = [row(group, 1) for group in groups]
    shaping = PairConfig(combine="log_sigmoid", weights=[2.0, 1.0])
    assert shape(rows, scores, shaping) == (weighted, {})


# Length


def test_penalties_and_gaps_by_hand():
    assert penalize([1.0, 2.0], [10, 30], 0.05) == pytest.approx([0.5, 0.5])
    # 9 - 4, then 1 - 5 (the first of equals), one alone, and a tie.
    scores = [1.0, 3.0, 2.0, 5.0, 4.0, 5.0, 0.0, 7.0, 7.0]
    groups = [0, 0, 0, 1, 1, 1, 2, 3, 3]
    assert length_gap(scores, [4, 9, 20, 1, 5, 30, 99, 2, 8], groups) == pytest.approx(1 / 3)
    assert length_gap([1.0], [5], [0]) == 0.0


def test_alpha_by_hand():
    # One prompt: they change places at (3 - 1) / (20 - 10); from there the gap is -10.
    alpha, gap = find_alpha([3.0, 1.0], [20, 10], [0, 0])
    assert (alpha, gap) == (0.0, 10)  # as far from 0 on both sides: the smaller alpha
    # Another whose best is 4 shorter: 6 / 2 = 3 before, -7 after.
    alpha, gap = find_alpha([3.0, 1.0, 9.0, 0.0], [20, 10, 3, 7], [0, 0, 1, 1])
    assert (alpha, gap) == (0.0, 3.0)
    # Another whose best is 8 longer, but wins by little: at 0.1 / 8 it falls to 10 - 8 = 2.
    lengths, groups = [20, 10, 18, 10], [0, 0, 1, 1]
    alpha, gap = find_alpha([3.0, 1.0, 0.1, 0.0], lengths, groups)
    assert gap == 1.0 and 0.1 / 8 < alpha < 0.2 and alpha == pytest.approx(1.5 * 0.1 / 8)
    assert length_gap(penalize([3.0, 1.0, 0.1, 0.0], lengths, alpha), lengths, groups) == 1.0


def test_alpha_is_bounded_and_zero_where_the_best_are_not_longer():
    assert find_alpha([3.0, 1.0], [10, 20], [0, 0]) == (0.0, -10)
    assert find_alpha([1.0, 1.0], [20, 10], [0, 0]) == (0.0, 0)
    assert find_alpha([], [], []) == (0.0, 0)
    # Differences so small that they change places at 0.
    alpha, gap = find_alpha([0.0, 1.0, 5e-324], [1, 5, 3], [0, 0, 0])
    assert 0 < alpha < 0.25 and gap == 2
    scores, lengths, groups = [50.0, 0.0, 9.0, 0.0], [20, 10, 18, 12], [0, 0, 1, 1]
    # They change places at 5 and 1.5: out of reach by default.
    assert find_alpha(scores, lengths, groups) == (0.0, 8.0)
    alpha, gap = find_alpha(scores, lengths, groups, high=9.0)
    assert 1.5 < alpha < 5 and gap == 2.0


@settings(max_examples=300, deadline=None)
@given(rows=GROUPS, high=st.sampled_from([0.05, 1.0, 20.0]))
def test_no_alpha_of_a_fine_grid_does_better(rows, high):
    groups, lengths = [g for g, _, _ in rows], [n for _, _, n in rows]
    scores = [float(s) for _, s, _ in rows]
    alpha, gap = find_alpha(scores, lengths, groups, high=high)
    assert 0 <= alpha <= high
    before = length_gap(scores, lengths, groups)
    after = length_gap(penalize(scores, lengths, alpha), lengths, groups)
    assert after == pytest.approx(gap) or _nearly_tied(scores, lengths, groups, alpha)
    assert abs(gap) <= abs(before) + 1e-9
    if before <= 0:
        assert alpha == 0
        return
    for k in range(1, 200):
        step = high * k / 200 * (1 - 1e-7)
        if not _nearly_tied(scores, lengths, groups, step):
            other = length_gap(penalize(scores, lengths, step), lengths, groups)
            assert abs(gap) <= abs(other) + 1e-9, step


def _nearly_tied(scores, lengths, groups, alpha):
    """Whether rounding decides an order, between responses of different lengths."""
    values = penalize(scores, lengths, alpha)
    return any(
        groups[i] == groups[j] and lengths[i] != lengths[j] and abs(values[i] - values[j]) < 1e-9
        for i in range(len(values))
        for j in range(i)
    )


# All together


def test_shape_by_hand():
    rows = [row(0, 10), row(0, 30), row(1, 5), row(1, 6)]
    raw = [[1.0, 2.0, 0.0, 4.0], [0.0, 1.0, 1.0, 0.0]]
    assert shape(rows, raw[:1], PairConfig()) == (raw[0], {})
    scores, facts = shape(rows, raw, PairConfig(weights=[1.0, 2.0]))
    assert scores == [1.0, 4.0, 2.0, 4.0] and facts == {}
    scores, facts = shape(rows, raw, PairConfig(weights=[1.0, 2.0], transform="mean_std"))
    assert scores == pytest.approx([-1, 1, -1, 1])
    # The penalty comes last, in units of the transformed scores.
    scores, facts = shape(
        rows, raw, PairConfig(weights=[1.0, 2.0], transform="mean_std", length_penalty=0.2)
    )
    assert scores == pytest.approx([-1 - 2, 1 - 6, -1 - 1, 1 - 1.2])
    assert facts == {
        "length_penalty": 0.2,
        "length_gap_before": (20 + 1) / 2,
        "length_gap": (-20 + 1) / 2,
    }


def test_shape_finds_alpha():
    rows = [row(0, 20), row(0, 10), row(1, 18), row(1, 10)]
    raw = [3.0, 1.0, 0.1, 0.0]
    scores, facts = shape(rows, [raw], PairConfig(length_penalty="auto"))
    alpha = 1.5 * 0.1 / 8
    assert facts == pytest.approx(
        {"length_penalty": alpha, "length_gap_before": 9.0, "length_gap": 1.0}
    )
    assert scores == pytest.approx(penalize(raw, [20, 10, 18, 10], alpha))


def test_responses_that_are_never_paired_do_not_count_in_the_search():
    rows = [row(0, 20), row(0, 10), row(1, 18), row(1, 10)]
    raw = [3.0, 1.0, 0.1, 0.0]
    expected = shape(rows, [raw], PairConfig(length_penalty="auto"))[1]
    blank = [row(0, 0, ""), row(1, 500, " \n"), row(1, 0, "x")]
    scores, facts = shape(
        [*rows, *blank], [[*raw, 99.0, 99.0, -99.0]], PairConfig(length_penalty="auto")
    )
    assert facts == expected and len(scores) == 7


def test_shape_compares_with_references():
    rows, raw = [row(3, 10), row(3, 10)], [[1.0, 4.0], [0.0, 2.0]]
    references = [{3: [0.0, 5.0], 4: []}, {3: [1.0, 0.0], 4: []}]
    shaping = PairConfig(transform="par", weights=[1.0, -2.0])
    scores, _ = shape(rows, raw, shaping, references_K=references)
    # 1 - 0 and 4 - 4, against 0 - 2 and 5 - 0.
    by_hand = [(sigmoid(x + 2) + sigmoid(x - 5)) / 2 for x in (1.0, 0.0)]
    assert scores == pytest.approx(by_hand)
    own, _ = shape(rows, raw, shaping)
    assert own == pytest.approx([sigmoid(1.0), sigmoid(-1.0)])
    # A shared reference lets the scale of one prompt's scores stand beside another's.
    shaping = PairConfig(combine="log_sigmoid")
    scores, _ = shape(rows, raw, shaping, references_K=references)
    assert (
        scores
        == pytest.approx(combine(raw, [3, 3], how="log_sigmoid", references_K=references))
        != pytest.approx(combine(raw, [3, 3], how="log_sigmoid"))
    )
    with pytest.raises(ValueError, match="no scores for prompt 3"):
        shape(rows, raw, shaping, references_K=[{4: [0.0]}, {4: [0.0]}])


def test_weights_must_be_as_many_as_scorers():
    assert PairConfig().weights_of(3) == [1.0] * 3
    assert PairConfig(weights=[0.5, -1.0]).weights_of(2) == [0.5, -1.0]
    with pytest.raises(ConfigError, match=r"weights=\[0.5, -1.0\] must be .* the 3 scorers"):
        PairConfig(weights=[0.5, -1.0]).weights_of(3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"combine": "sum"}, "combine=sum must be one of weighted, log_sigmoid"),
        ({"transform": "PAR"}, "transform=PAR must be one of"),
        ({"weights": []}, "weights=.* must be"),
        ({"weights": [1.0, math.nan]}, "weights=.* must be"),
        ({"weights": ["1"]}, "weights=.* must be"),
        ({"length_penalty": -0.1}, "length_penalty=-0.1 must be"),
        ({"length_penalty": math.inf}, "length_penalty=inf must be"),
        ({"length_penalty": "dice"}, "length_penalty=dice must be"),
        ({"length_penalty": True}, "length_penalty=.* must be"),
        ({"length_penalty": None}, "length_penalty=.* must be"),
    ],
)
def test_shaping_names_what_is_wrong(options, said):
    with pytest.raises(ConfigError, match=said):
        PairConfig(**options)
