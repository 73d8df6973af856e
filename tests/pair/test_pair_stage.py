"""The pairs of the stage: what is dropped, written, summed up and read back."""

from typing import Any

import numpy as np
import pytest
import test_pairing
from stages import END, PROMPTS, lengths, make_policy, run_sample, run_score, write_candidates
from tiny import build_tokenizer

from fastdpo import storage
from fastdpo.data.records import Scored
from fastdpo.errors import DataError
from fastdpo.pair.config import PairConfig
from fastdpo.pair.rules import best_worst
from fastdpo.pair.stage import load_pairs, pair


def candidate(
    prompt_index: int, sample_index: int, score: float, ids: Any = None, **more: Any
) -> Scored:
    """Of odd samples the response is whole, of even ones cut."""
    ids = [7, prompt_index, sample_index, END] if ids is None else ids
    reason = "stop" if sample_index % 2 else "length"
    return test_pairing.candidate(
        prompt_index, sample_index, score, ids, **{"finish_reason": reason, **more}
    )


def test_best_and_worst_are_paired():
    rows = [candidate(1, j, v) for j, v in enumerate([2.0, 5.0, -1.0, 5.0, -1.0])]
    rows = [candidate(0, 0, 3.0), *reversed(rows), candidate(0, 1, 4.0)]
    (first, second), dropped = best_worst(rows)
    assert dropped == {} and (first.score_chosen, first.score_rejected) == (4.0, 3.0)
    assert second.to_json() == {
        "prompt_index": 1,
        "prompt": "p1",
        "prompt_ids": [1, 1],
        "chosen": f"7 1 1 {END}",  # the first of two best and of two worst
        "rejected": f"7 1 2 {END}",
        "chosen_ids": [7, 1, 1, END],
        "rejected_ids": [7, 1, 2, END],
        "score_chosen": 5.0,
        "score_rejected": -1.0,
        "chosen_finish": "stop",
        "rejected_finish": "length",
    }


def test_every_reason_to_drop_is_counted():
    rows = [
        candidate(0, 0, 9.0, response=" \n"),
        candidate(0, 1, 1.0),
        candidate(1, 0, 5.0, []),
        candidate(1, 1, 1.0),
        candidate(1, 2, 2.0),
        candidate(2, 0, 1.0),
        candidate(2, 1, 1.0),
        candidate(3, 0, 1.0, [4, 4]),
        candidate(3, 1, 2.0, [4, 4]),
        candidate(4, 0, 1.0),
    ]
    pairs, dropped = best_worst(rows)
    assert [(p.prompt_index, p.score_chosen) for p in pairs] == [(1, 2.0)]
    assert dropped == {
        "empty response": 2,
        "fewer than two responses": 2,
        "tie": 1,
        "identical responses": 1,
    }
    pairs, dropped = best_worst(rows, min_gap=1.0)
    assert pairs == [] and dropped["gap at most min_gap"] == 2
    assert len(best_worst(rows, min_gap=0.99)[0]) == 1


def test_pairs_are_written_with_a_summary_and_read_back(tmp_path):
    texts = [["a", "bbb", "cc"], ["dddd", "e"], ["same", "size"], [""]]
    write_candidates(tmp_path / "candidates", texts)
    run_score(lengths, tmp_path)
    path = tmp_path / "out" / "pairs.jsonl"
    summary = pair(tmp_path / "candidates", tmp_path / "scores", path)
    assert summary == {
        "pairs": 2,
        "dropped": {"tie": 1, "empty response": 1, "fewer than two responses": 1},
        "mean_score_chosen": 3.5,
        "mean_score_rejected": 1.0,
        "mean_length_chosen": 3.5,
        "mean_length_rejected": 1.0,
        "score_length_correlation": pytest.approx(1.0),
    }
    stored = storage.read_json(tmp_path / "out" / "pairs.summary.json")
    assert stored == {**summary, "score_length_correlation": pytest.approx(1.0)}
    first, second = load_pairs(path)
    assert first.prompt_ids == [1, 5] and second.prompt_ids == [1, 6]
    assert first.chosen_ids == [10 + ord("b")] * 3 and first.rejected_ids == [10 + ord("a")]
    assert first.extra == {
        "prompt_index": 0,
        "score_chosen": 3.0,
        "score_rejected": 1.0,
        "chosen_finish": "stop",
        "rejected_finish": "stop",
    }


def test_correlation_is_over_all_candidates_and_null_where_undefined(tmp_path):
    write_candidates(tmp_path / "candidates", [["a", "bbb", "cc"]])
    run_score(lambda p, r: [1.0, 2.0, 5.0], tmp_path)
    path = tmp_path / "pairs.jsonl"
    value = pair(tmp_path / "candidates", tmp_path / "scores", path)["score_length_correlation"]
    assert value == pytest.approx(np.corrcoef([1, 2, 5], [1, 3, 2])[0, 1])
    write_candidates(tmp_path / "candidates", [["a", "b"]])
    run_score(lambda p, r: [1.0, 2.0], tmp_path, "again")
    summary = pair(tmp_path / "candidates", tmp_path / "again", path)
    assert summary["score_length_correlation"] is None
    assert '"score_length_correlation": null' in path.with_suffix(".summary.json").read_text()


def test_candidates_and_scores_must_match(tmp_path):
    out = tmp_path / "pairs.jsonl"
    write_candidates(tmp_path / "candidates", [["a", "bb"], ["c", "dd"]])
    run_score(lengths, tmp_path)
    write_candidates(tmp_path / "more", [["a", "bb"], ["c", "dd", "x"]])
    with pytest.raises(DataError, match="prompt 1, sample 2 has no score"):
        pair(tmp_path / "more", tmp_path / "scores", out)
    write_candidates(tmp_path / "fewer", [["a"], ["c", "dd"]])
    with pytest.raises(DataError, match="prompt 0, sample 1 has a score but"):
        pair(tmp_path / "fewer", tmp_path / "scores", out)
    part = storage.part_path(tmp_path / "scores", 0)
    rows = storage.read_jsonl(part)
    for bad, message in (
        ([*rows, rows[0]], "prompt 0, sample 0 is there twice"),
        ([{"score": 1.0}], "prompt_index None"),
        ([{**rows[0], "score": None}, *rows[1:]], "score is None"),
        ([{"prompt_index": 0, "sample_index": 0}, *rows[1:]], "has no score"),
    ):
        storage.write_jsonl_atomic(part, bad)
        with pytest.raises(DataError, match=message):
            pair(tmp_path / "candidates", tmp_path / "scores", out)
    assert not out.exists()


def test_no_pair_left_is_an_error(tmp_path):
    write_candidates(tmp_path / "candidates", [["a", "b"], ["c"]])
    run_score(lengths, tmp_path)
    out = tmp_path / "pairs.jsonl"
    with pytest.raises(
        DataError, match=r"no pair is left \(fewer than two responses: 1, tie: 1\).*Sample more"
    ):
        pair(tmp_path / "candidates", tmp_path / "scores", out)
    assert not out.exists() and not out.with_suffix(".summary.json").exists()
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "responses are equal, all of them 1: use a scorer that tells them apart"),
        ({"min_gap": 9.0}, r"\(fewer than two responses: 1, gap at most .*Lower min_gap=9"),
        ({"drop_truncated": True}, "larger max_new_tokens, .* has 2 tokens.*drop_truncated=false"),
        ({"drop_duplicates": True}, "higher temperature"),
    ]
    for options, message in cases:
        texts = [["a", "a" if "drop_duplicates" in options else "b" * 2 ** len(options)], ["c"]]
        write_candidates(tmp_path / "candidates", texts)
        if "drop_truncated" in options:
            for path in storage.list_parts(tmp_path / "candidates"):
                rows = [{**x, "finish_reason": "length"} for x in storage.read_jsonl(path)]
                storage.write_jsonl_atomic(path, rows)
        run_score(lengths, tmp_path)
        with pytest.raises(DataError, match=message):
            pair(tmp_path / "candidates", tmp_path / "scores", out, PairConfig(**options))
    with pytest.raises(ValueError, match="jsonl"):
        pair(tmp_path / "candidates", tmp_path / "scores", tmp_path / "pairs")


def test_reading_pairs_names_the_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [candidate(0, j, float(j)) for j in range(2)]
    (pair_row,), _ = best_worst(rows)
    good = pair_row.to_json()
    without = {k: v for k, v in good.items() if k != "chosen_ids"}
    for bad, message in (
        ({**good, "chosen_ids": []}, "chosen_ids is empty"),
        ({**good, "prompt_ids": [1.5]}, "prompt_ids must be"),
        (without, "'chosen_ids' is missing"),
        ({**good, "rejected_ids": 3}, "int"),
    ):
        storage.write_jsonl_atomic(path, [good, bad])
        with pytest.raises(DataError, match=rf"pairs\.jsonl:2: .*{message}"):
            load_pairs(path)


def test_the_stages_fit_together(tmp_path):
    tokenizer = build_tokenizer()
    model = make_policy(tokenizer)
    for name in ("a", "b"):
        folder = tmp_path / name
        run_sample(model, tokenizer, folder / "candidates", num_samples=4)
        run_score(lengths, folder)
        pair(folder / "candidates", folder / "scores", folder / "pairs.jsonl")
    pairs = load_pairs(tmp_path / "a" / "pairs.jsonl")
    assert 1 <= len(pairs) <= len(PROMPTS)
    candidates = {tuple(r["response_ids"]) for r in storage.read_parts(tmp_path / "a/candidates")}
    assert all({tuple(p.chosen_ids), tuple(p.rejected_ids)} <= candidates for p in pairs)
    for name in ("pairs.jsonl", "pairs.summary.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
