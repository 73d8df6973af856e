"""Held-out responses that are scored by comparison with the start's."""

from pathlib import Path

import pytest

from fastdpo.data.records import Candidate
from fastdpo.errors import DataError
from fastdpo.rounds.heldout import against_start
from fastdpo.score.stage import Scorer
from fastdpo.storage import begin_stage, part_path, write_jsonl_atomic


def candidate(prompt: int, sample: int, response: str) -> Candidate:
    return Candidate(prompt, sample, f"question {prompt}", [1], response, [2], "stop")


def written(folder: Path, rows: list[Candidate]) -> Path:
    begin_stage(folder, {"parts": 1})
    write_jsonl_atomic(part_path(folder, 0), [row.to_json() for row in rows])
    return folder


def test_the_start_scores_half_against_itself_and_others_their_share_of_wins(tmp_path):
    def longer(prompts, first, second):
        """The probability of a win, 1 for the longer text."""
        assert all(a != b for a, b in zip(first, second))  # the same text is never asked about
        return [float(len(a) > len(b)) for a, b in zip(first, second)]

    judge = Scorer("judge:x", lambda rows: [], on="rows", compare=longer, settings={"template": 1})
    rows = [candidate(0, 0, "aa"), candidate(0, 1, "aaaa"), candidate(1, 0, "b")]
    start = written(tmp_path / "start", rows)
    scorer = against_start(judge, start)
    assert scorer.name == "judge:x" and scorer.on == "rows" and scorer.compare is None
    assert scorer.settings == {"template": 1, "against": "start"}
    assert scorer(rows) == [0.25, 0.75, 0.5]  # of a prompt's two, one is the text itself
    assert scorer([candidate(0, 0, "aaa"), candidate(1, 0, "bb")]) == [0.5, 1.0]
    with pytest.raises(DataError, match="no response to prompt 2"):
        scorer([candidate(2, 0, "c")])
