"""The statistics of held-out responses."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import (
    write_rows,
    write_run,
)

from fastdpo.data.records import Scored
from fastdpo.errors import DataError
from fastdpo.report import evaluation


def held(*values, start=0):
    """Responses from (prompt, score, length)."""
    return [
        Scored(p, 0, "q", [], "a", [0] * length, "stop", score=score, scores=[])
        for p, score, length in values
    ]


many = st.lists(
    st.tuples(st.integers(0, 6), st.integers(-20, 20), st.integers(1, 40)), min_size=1, max_size=40
)


def prompt_means(rows, column):
    groups = {}
    for row in rows:
        groups.setdefault(row[0], []).append(row[column])
    return {p: np.mean(values) for p, values in groups.items()}


@given(many)
@settings(max_examples=60, deadline=None)
def test_means_are_over_prompts(rows):
    means = np.array(list(prompt_means(rows, 1).values()))
    found = evaluation.over_prompts(held(*rows), evaluation.by_score)
    assert found.value == pytest.approx(means.mean(), abs=1e-9)
    if means.std() < 1e-9:
        assert found.half is None
    else:
        error = means.std(ddof=1) / np.sqrt(len(means))
        assert found.half == pytest.approx(evaluation.quantile(len(means) - 1) * error, abs=1e-9)


@given(many, many)
@settings(max_examples=60, deadline=None)
def test_change_and_win_rate_are_by_prompt(before, after):
    start, now = held(*before), held(*after)
    shared = sorted({r[0] for r in before} & {r[0] for r in after})
    change = evaluation.change(start, now, evaluation.by_length)
    wins = evaluation.win_rate(start, now)
    if not shared:
        assert change is None and wins is None
        return
    old, new = prompt_means(before, 2), prompt_means(after, 2)
    differences = [new[p] - old[p] for p in shared]
    assert change is not None and wins is not None
    assert change.value == pytest.approx(np.mean(differences), abs=1e-9)
    shares = [
        np.mean([
            1.0 if a[1] > b[1] else 0.5 if a[1] == b[1] else 0.0
            for a in after if a[0] == p for b in before if b[0] == p
        ])
        for p in shared
    ]  # fmt: skip
    assert wins.value == pytest.approx(np.mean(shares))
    if np.std(differences) < 1e-9:
        assert change.half is None
    else:
        error = np.std(differences, ddof=1) / np.sqrt(len(shared))
        half = evaluation.quantile(len(shared) - 1) * error
        assert change.half == pytest.approx(half, abs=1e-9)


@given(many)
@settings(max_examples=100, deadline=None)
def test_correlation_is_pearsons_and_its_interval_the_jackknife(rows):
    array = np.array(rows, dtype=float)
    found = evaluation.correlation(held(*rows))
    if array[:, 1].std() == 0 or array[:, 2].std() == 0:
        assert found is None
        return
    assert found is not None
    assert found.value == pytest.approx(np.corrcoef(array[:, 1], array[:, 2])[0, 1], abs=1e-9)
    kept = [array[array[:, 0] != p] for p in np.unique(array[:, 0])]
    if len(kept) < 2 or any(len(x) < 2 or (x[:, 1:].std(0) < 1e-9).any() for x in kept):
        assert found.half is None
        return
    left = np.array([np.corrcoef(x[:, 1], x[:, 2])[0, 1] for x in kept])
    error = np.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum())
    assert found.half == pytest.approx(evaluation.quantile(len(left) - 1) * error, abs=1e-5)


def test_quantiles_are_students():
    """Printed tables, and the normal distribution in the limit; 1000 is where the series begins."""
    known = {1: 12.7062, 2: 4.30265, 3: 3.18245, 10: 2.22814, 31: 2.03951, 120: 1.97993}
    for degrees, value in known.items():
        assert evaluation.quantile(degrees) == pytest.approx(value, abs=1e-5 * value)
    assert evaluation.quantile(10**15) == pytest.approx(1.959964, abs=1e-6)
    middle = evaluation.quantile(999) + evaluation.quantile(1001)
    assert evaluation.quantile(1000) == pytest.approx(middle / 2, abs=3e-6)


def test_a_standard_error_is_no_half_width():
    values = [1.0, 2.0, 6.0]
    error = evaluation.standard_error(values)
    assert error == pytest.approx(np.std(values, ddof=1) / 3**0.5)
    assert evaluation.interval(values) == (3.0, pytest.approx(4.302653 * error))
    assert evaluation.standard_error([0.1] * 7) == evaluation.standard_error([2.0]) == 0.0
    assert evaluation.half_width(1.0, None) == pytest.approx(1.959964)
    assert evaluation.half_width(0.0, 5) is evaluation.half_width(1.0, 1) is None


def test_heldout_reads_in_order_of_prompts_and_joins_by_key(tmp_path):
    write_run(tmp_path, rounds=0, prompts=3)
    folder = tmp_path / "round-00/eval"
    scores = [json.loads(x) for x in (folder / "scores/part-00000.jsonl").open()]
    candidates = [json.loads(x) for x in (folder / "candidates/part-00000.jsonl").open()]
    write_rows(folder / "candidates/part-00000.jsonl", candidates[::-1])
    found = evaluation.heldout(folder)
    assert [r.prompt_index for r in found] == [0, 0, 1, 1, 2, 2]
    assert [r.score for r in found] == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.25])
    assert found[1].finish_reason == "length" and len(found[3].response_ids) == 14
    for broken in (scores[1:], [*scores, {**scores[0], "sample_index": 9}], [{}], [*scores, 3]):
        write_rows(folder / "scores/part-00000.jsonl", broken)  # type: ignore[arg-type]
        with pytest.raises(DataError):
            evaluation.heldout(folder)
    write_rows(folder / "scores/part-00000.jsonl", scores)
    write_rows(folder / "candidates/part-00000.jsonl", [*candidates, candidates[0]])
    with pytest.raises(DataError, match="there twice"):
        evaluation.heldout(folder)
