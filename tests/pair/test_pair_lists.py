"""Lists of scored responses: the rule, its file, and the win rates of SPPO."""

import json
from typing import Any

import numpy as np
import pytest
from test_pairing import candidate, group, on_disk, write_stage

from fastdpo import storage
from fastdpo.errors import ConfigError, DataError
from fastdpo.pair.config import PairConfig
from fastdpo.pair.rules import listwise
from fastdpo.pair.stage import load_examples, load_lists, pair, select_lists
from fastdpo.pair.transforms import transform


def ids(row: Any) -> list[int]:
    """The sample indices of a list's responses."""
    return [response[2] for response in row.responses_ids]


def test_a_list_has_all_responses_best_first():
    rows = [*group([1.0, 4.0, 2.0, 4.0], 1), *group([3.0, 5.0], 0)]
    (first, second), dropped = listwise(rows)
    assert dropped == {} and ids(first) == [1, 0]
    assert ids(second) == [1, 3, 2, 0]  # of equal scores by sample_index
    assert second.scores == [4.0, 4.0, 2.0, 1.0]
    assert second.to_json() == {
        "prompt_index": 1,
        "prompt": "p1",
        "prompt_ids": [1, 1],
        "responses": ["7 1 1", "7 1 3", "7 1 2", "7 1 0"],
        "responses_ids": [[7, 1, 1], [7, 1, 3], [7, 1, 2], [7, 1, 0]],
        "scores": [4.0, 4.0, 2.0, 1.0],
        "finish_reasons": ["stop"] * 4,
    }


def test_every_reason_to_drop_is_counted():
    rows = [
        *group([2.0, 2.0, 2.0], 0),  # says nothing
        *group([1.0, 2.0, 2.0, 1.0], 1),
        *group([1.0], 2),
        candidate(3, 0, 1.0, [4]),
        candidate(3, 1, 2.0, [4]),  # the same response twice
        candidate(4, 0, 9.0, []),
        *group([0.0, 5.0, 1.0], 5),
    ]
    lists, dropped = listwise(rows)
    assert [row.prompt_index for row in lists] == [1, 5]
    counted = {
        "tie": 1,
        "fewer than two responses": 2,
        "identical responses": 1,
        "empty response": 1,
    }
    assert dropped == counted
    lists, dropped = listwise(rows, drop_ties=True)
    assert [row.scores for row in lists] == [[2.0, 1.0], [5.0, 1.0, 0.0]]
    assert ids(lists[0]) == [1, 0]  # the first of two best and of two worst
    assert dropped == {**counted, "tied response": 2}
    lists, dropped = listwise(rows, min_gap=1.0)
    assert [row.prompt_index for row in lists] == [5] and dropped["gap at most min_gap"] == 1


def test_responses_that_shaping_made_equal_are_tied():
    """A list has no order but that of its scores; the best of equals before shaping comes first."""
    rows = [candidate(0, 0, 1.0, unshaped=50.0), candidate(0, 1, 1.0, unshaped=60.0)]
    assert listwise(rows) == ([], {"tie": 1})
    rows.append(candidate(0, 2, 0.0, unshaped=0.0))
    [row], dropped = listwise(rows)
    assert ids(row) == [1, 0, 2] and row.scores == [1.0, 1.0, 0.0] and dropped == {}
    [row], dropped = listwise(rows, drop_ties=True)
    assert ids(row) == [1, 2] and dropped == {"tied response": 1}


def test_lists_are_written_with_a_summary(tmp_path):
    rows = [*group([1.0, 4.0, 2.0], 0), *group([3.0, 3.0], 1), *group([5.0, 7.0], 2)]
    rows[2] = candidate(0, 2, 2.0, finish_reason="length")
    out = tmp_path / "pairs.jsonl"
    config = PairConfig(rule="listwise", drop_truncated=True, transform="par", length_penalty=0.1)
    summary = pair(*write_stage(tmp_path, rows), out, config)
    assert summary["lists"] == 2 and summary["responses"] == 4 and "pairs" not in summary
    assert summary["dropped"] == {"tie": 1, "truncated response": 1}
    assert summary["mean_length_best"] == summary["mean_length_worst"] == 3
    assert summary["shaping"]["length_penalty"] == 0.1
    assert json.loads(out.with_suffix(".summary.json").read_text()) == summary
    written = [json.loads(line) for line in out.open()]
    found = [row["scores"] for row in written]
    lists, _ = select_lists(rows, config)
    assert [row["responses_ids"] for row in written] == [row.responses_ids for row in lists]
    # PAR compares with the truncated response too, then the penalty of three tokens.
    sigmoid = 1 / (1 + np.exp(-np.array([3.0, 2.0, -3.0, -1.0])))
    assert found[0] == pytest.approx([sigmoid[:2].mean() - 0.3, sigmoid[2:].mean() - 0.3])


def test_lists_are_read_back(tmp_path):
    out = tmp_path / "pairs.jsonl"
    pair(*write_stage(tmp_path, group([1.0, 4.0, 2.0])), out, PairConfig(rule="listwise"))
    [found] = load_lists(out)
    assert load_examples(out) == [found]
    assert found.responses_ids == [[7, 0, 1], [7, 0, 2], [7, 0, 0]]
    assert found.prompt_ids == [1, 0] and found.scores == [4.0, 2.0, 1.0]
    assert found.extra == {"prompt_index": 0, "finish_reasons": ["stop"] * 3}
    [row] = storage.read_jsonl(out)
    for bad, message in (
        ({"responses_ids": [[7]]}, "responses_ids must be at least two lists"),
        ({"responses_ids": None}, "responses_ids must be at least two lists"),
        ({"scores": [1.0]}, "scores must be a list of 3 numbers, one for each of responses_ids"),
        ({"scores": [1.0, 2.0, "3"]}, "scores must be 3 finite numbers"),
        ({"responses_ids": [[7], [], [8]]}, r"responses_ids\[1\] is empty"),
    ):
        storage.write_jsonl_atomic(out, [row, row | bad])
        with pytest.raises(DataError, match=rf"pairs\.jsonl:2: {message}.* Pair again"):
            load_lists(out)
    storage.write_jsonl_atomic(out, [{x: row[x] for x in row if x != "scores"}])
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: 'scores' is missing"):
        load_examples(out)


def test_no_list_left_is_an_error(tmp_path):
    folders = write_stage(tmp_path, group([3.0, 3.0]))
    with pytest.raises(DataError, match=r"no list is left \(tie: 1\).*responses are equal"):
        pair(*folders, tmp_path / "pairs.jsonl", PairConfig(rule="listwise"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("consistency", "mean"), ("flip_share", 0.2), ("soft_label", 0.1), ("ches_keep", 0.5),
        ("max_difficulty", 1.0), ("replay", "pairs.jsonl"), ("replay_share", 0.5),
        ("fresh_threshold", 0.0), ("max_pairs", 3), ("target_margin", 2.0), ("equal_prompts", True),
    ],
)  # fmt: skip
def test_what_is_of_pairs_is_refused_for_lists(name, value):
    with pytest.raises(ConfigError, match=rf"{name}=\S+ must be left out, where it has no effect"):
        PairConfig(rule="listwise", **{name: value})


def test_ties_are_no_matter_of_pairs(tmp_path):
    with pytest.raises(ConfigError, match=r"drop_ties=True must be left out.*rule be listwise"):
        PairConfig(rule="all_ranked", drop_ties=True)
    folders = write_stage(tmp_path, group([3.0, 1.0]))
    with pytest.raises(ConfigError, match=r"drop_ties=True must be left out.*rule be listwise"):
        pair(*folders, tmp_path / "pairs.jsonl", PairConfig(drop_ties=True))


def test_a_pair_of_equal_scores_after_shaping_can_be_dropped(tmp_path):
    """PAR makes 1.0 of 50 and of 60: ranked all the same, but their difference has no logarithm."""
    raw = [50.0, -800.0, 60.0], [3.0, 0.0, 1.0]
    rows = [*group([0.0] * 3, 0), *group([0.0] * 3, 1)]
    candidates, scores = on_disk(tmp_path, rows, [*raw[0], *raw[1]])
    config, out = PairConfig(rule="all_ranked", transform="par"), tmp_path / "pairs.jsonl"
    pair(candidates, scores, out, config)
    gaps = [row["score_chosen"] - row["score_rejected"] for row in map(json.loads, out.open())]
    assert len(gaps) == 6 and gaps.count(0.0) == 0
    start = tmp_path / "start"
    start.mkdir()
    references = on_disk(start, [*group([0.0], 0), *group([0.0], 1)], [0.0, 0.0])
    config = PairConfig(rule="all_ranked", transform="par", transform_reference="start")
    for ordered, count in ((False, 6), (True, 5)):
        summary = pair(
            candidates, scores, out, config, reference_scores=references, ordered=ordered
        )
        assert summary["pairs"] == count
    assert summary["dropped"] == {"scores equal after shaping": 1}


def test_win_rates_are_those_of_sppo():
    """uclaml/SPPO's compute_prob.py: prb[i][j] = 1 / (1 + exp(score[j] - score[i])), mean over j.

    Of 0 and log 3 alone: (1/2 + 1/4) / 2 and (1/2 + 3/4) / 2.
    """
    found = transform([0.0, float(np.log(3)), 7.0], [0, 0, 1], "win_rate")
    assert found == pytest.approx([0.375, 0.625, 0.5])
    score = np.array([1.5, -0.25, 0.0, 4.0, 1.5])
    prb = 1 / (1 + np.exp(score[None, :] - score[:, None]))
    values = transform(score.tolist(), [0] * 5, "win_rate")
    assert values == pytest.approx(prb.sum(axis=1) / 5)
    assert np.mean(values) == pytest.approx(0.5)
    assert transform([800.0, -800.0], [0, 0], "win_rate") == [0.75, 0.25]
