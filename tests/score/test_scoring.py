"""The stage of scoring: its parts, what scorers may return, and whose scores they are."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scoring_server import COUNTS, TEXTS, candidate
from stages import file_bytes, lengths, make_policy, run_sample, run_score, write_candidates
from tiny import build_tokenizer

from fastdpo import storage
from fastdpo.data.parts import check_scored
from fastdpo.errors import ConfigError, DataError
from fastdpo.score.config import ScoreConfig
from fastdpo.score.load import load_scorer
from fastdpo.score.stage import Scorer


def values_of(scorer: Any, folder: Any) -> list[float]:
    return [row["score"] for row in run_score(scorer, folder)]


def test_scores_are_written_part_by_part(tmp_path):
    write_candidates(tmp_path / "candidates", [["a", "bb"], ["ccc", ""], ["d"]])
    calls = []

    def f(prompts, responses):
        calls.append((prompts, responses))
        return np.array([len(x) for x in responses], dtype=np.float32)

    rows = run_score(f, tmp_path)
    assert [(r["prompt_index"], r["sample_index"], r["score"]) for r in rows] == [
        (0, 0, 1.0),
        (0, 1, 2.0),
        (1, 0, 3.0),
        (1, 1, 0.0),
        (2, 0, 1.0),
    ]
    assert calls[1] == (["Prompt 2"], ["d"]) and len(calls) == 2
    whole = file_bytes(tmp_path / "scores")
    storage.part_path(tmp_path / "scores", 0).unlink()
    run_score(f, tmp_path)
    assert len(calls) == 3 and file_bytes(tmp_path / "scores") == whole
    with pytest.raises(DataError, match="another scorer"):
        run_score(Scorer("tests:g", lengths), tmp_path)


def test_scores_of_candidates_of_another_plan_are_refused(tmp_path):
    tokenizer = build_tokenizer()
    model = make_policy(tokenizer)
    run_sample(model, tokenizer, tmp_path / "candidates", max_new_tokens=2)
    run_score(lengths, tmp_path)
    for path in (tmp_path / "candidates").iterdir():
        path.unlink()
    run_sample(model, tokenizer, tmp_path / "candidates", max_new_tokens=2, seed=1)
    with pytest.raises(DataError, match="another candidates"):
        run_score(lengths, tmp_path)


class OddError(Exception):
    pass


def raises(prompts, responses):
    raise OddError("no idea")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (raises, r"OddError .*prompt 2 to prompt 2.*no idea"),
        (lambda p, r: [1.0] * 3, r"returned 3 .*list of 2 numbers"),
        (lambda p, r: None, r"returned None for .*part-00001.jsonl, lines 1 to 2 \(prompt 2"),
        (lambda p, r: "ab", "a str"),
        (lambda p, r: 1.0, "a float"),
        (lambda p, r: [1.0, math.nan], r"nan for prompt 2, sample 1 \(.*part-00001.jsonl:2\)"),
        (lambda p, r: torch.tensor([math.inf, 1.0]), "inf for prompt 2, sample 0"),
        (lambda p, r: [1.0, "high"], "'high' for prompt 2, sample 1"),
        (lambda p, r: [1.0, None], "None for prompt 2, sample 1"),
        (lambda p, r: [1.0, True], "True for prompt 2, sample 1"),
        (lambda p, r: [1.0, 10**400], "for prompt 2, sample 1"),
        (lambda p, r: torch.ones(2, 1), r"\[1.0\] for prompt 2, sample 0"),
    ],
)
def test_scorer_errors_name_the_scorer_and_the_place(tmp_path, bad, message):
    write_candidates(tmp_path / "candidates", [["a"], ["b"], ["c", "d"]])

    def f(prompts, responses):
        return bad(prompts, responses) if "Prompt 2" in prompts else lengths(prompts, responses)

    with pytest.raises(DataError, match=rf"(?s)tests:f.*{message}"):
        run_score(f, tmp_path)
    part = storage.part_path(tmp_path / "scores", 0)
    names = {"plan.json", part.name, storage.checksum_path(part).name}
    assert set(file_bytes(tmp_path / "scores")) == names
    rows = run_score(lengths, tmp_path)  # mended, it goes on
    assert len(rows) == 4


REWARDS = """\
import functools

def logged(f):
    @functools.wraps(f)
    def g(*args): return f(*args)
    return g

@logged
def helpful(prompts, responses):
    return [half(x) for x in responses]

def half(response):
    try:
        return 1 / response.count("!")
    except ZeroDivisionError as error:
        raise ValueError("no mark") from error

def few(prompts, responses): return [0.5]

class Words:
    def __call__(self, prompts, responses): return ["0.5" for _ in responses]

words = Words()

def one(responses): return [1.0]
"""


@pytest.mark.parametrize("spec", ["shown_rewards", "shown_rewards.py"])
def test_what_a_function_raises_or_returns_is_shown_in_its_own_lines(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shown_rewards.py").write_text(REWARDS)
    write_candidates(tmp_path / "candidates", [["a"], ["b"]])

    def said(name):
        with pytest.raises(DataError) as error:
            run_score(load_scorer(f"{spec}:{name}"), tmp_path, f"scores-{name}")
        first, _, lines = str(error.value).partition("\n")
        assert first.startswith(f"scorer {spec}:{name} r") and "(prompt 0" in first
        assert "fastdpo/" not in lines
        return lines

    at = f'File "{tmp_path / "shown_rewards.py"}", line'
    lines = said("helpful")
    assert lines.startswith("Traceback") and lines.endswith("ValueError: no mark")
    assert f'{at} 14, in half\n    return 1 / response.count("!")' in lines  # its cause
    assert f"{at} 10, in helpful\n" in lines and f"{at} 16, in half\n    raise ValueErr" in lines
    assert said("few") == f"  {at} 18, in few\n    def few(prompts, responses): return [0.5]"
    assert f"{at} 25, in one\n" in said("one")  # it was called with another number of arguments
    with pytest.raises(DataError, match=r"returned '0.5' for prompt 0(?s:.*)line 21, in __call__"):
        run_score(load_scorer(f"{spec}:words"), tmp_path)


def test_files_of_one_name_are_modules_of_their_own(tmp_path):
    import pickle

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        text = f"class Rewards(list): pass\ndef score(p, responses): return Rewards(['{folder}'])"
        (tmp_path / folder / "rewards.py").write_text(text)
    places = [tmp_path / folder / "rewards.py" for folder in ("one", "two")]
    found = [load_scorer(f"{place}:score").function([], []) for place in places]
    # By the name of its module a class is found again.
    assert [*map(pickle.loads, map(pickle.dumps, found))] == [["one"], ["two"]]


def test_what_fastdpo_itself_raises_is_one_line(tmp_path):
    write_candidates(tmp_path / "candidates", [[["a"]]])  # type: ignore[list-item]
    with pytest.raises(DataError, match="plain_language raised TypeError for") as error:
        run_score(load_scorer("fastdpo.scoring:plain_language"), tmp_path)
    assert "\n" not in str(error.value)


def test_scoring_needs_whole_candidates(tmp_path):
    with pytest.raises(DataError, match="no parts"):
        run_score(lengths, tmp_path)
    storage.write_jsonl_atomic(
        storage.part_path(tmp_path / "candidates", 0),
        [{"prompt_index": 0, "sample_index": 0, "prompt": "p"}],
    )
    with pytest.raises(DataError, match=r"part-00000.jsonl:1: 'response' is missing"):
        run_score(lengths, tmp_path)


def test_functions_are_found_by_name(tmp_path, monkeypatch):
    scorer = load_scorer("fastdpo.scoring:plain_language")
    assert scorer.name == "fastdpo.scoring:plain_language"
    assert scorer(["p"], ["The cat sat on the mat."]) == [1.0]
    (tmp_path / "my_own_rewards.py").write_text("def f(p, r): return [7 for _ in r]\nx = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd())])
    assert load_scorer("my_own_rewards:f")(["p"], ["r"]) == [7]
    for spec, message in (
        ("no_such_module:f", "'no_such_module' can't be imported"),
        ("my_own_rewards:g", "no function 'g'"),
        ("my_own_rewards:x", "no function 'x'"),
        ("my_own_rewards:", "no function ''"),
        (":f", "can't be imported"),
    ):
        with pytest.raises(ValueError, match=message):
            load_scorer(spec)
    (tmp_path / "broken_rewards.py").write_text("x = 1\n1 / 0")
    line = (
        r"ZeroDivisionError: .*\nTraceback.*\n  File \".*broken_rewards.py\", line 2, in <module>"
    )
    for spec in ("broken_rewards:f", "broken_rewards.py:f"):
        with pytest.raises(ValueError, match=line) as error:
            load_scorer(spec)
        assert "fastdpo" not in str(error.value).partition("\n")[2] and "importlib" not in str(
            error
        )
    (tmp_path / "cut_rewards.py").write_text("def f(p, r:")
    for spec in ("cut_rewards:f", "cut_rewards.py:f"):
        with pytest.raises(ValueError, match=r'cut_rewards.py", line 1\n +def f'):
            load_scorer(spec)
    with pytest.raises(ConfigError, match=r"Write my_own_rewards\.py:function"):
        load_scorer("my_own_rewards.py")
    assert load_scorer("my_own_rewards.py:f")(["p"], ["r"]) == [7]
    with pytest.raises(ConfigError, match="batch_size=0 must be >= 1"):
        ScoreConfig(batch_size=0)


# The content of candidates


def test_scores_are_of_the_content_of_their_candidates(tmp_path):
    folder, calls = tmp_path / "candidates", []

    def f(prompts: Any, responses: list[str]) -> list[int]:
        calls.append(responses)
        return lengths(prompts, responses)

    write_candidates(folder, TEXTS, per_part=1)
    assert values_of(f, tmp_path) == COUNTS
    check_scored(folder, tmp_path / "scores")
    before = file_bytes(tmp_path / "scores")
    # Sampled again, to another text of the same place: by the plan nothing has changed.
    path = storage.part_path(folder, 1)
    known = storage.read_jsonl(path)
    storage.write_jsonl_atomic(path, [{**row, "response": "long" * 5} for row in known])
    with pytest.raises(DataError, match="part-00001") as error:
        check_scored(folder, tmp_path / "scores")
    assert f"{folder} has now" in str(error.value) and "--output_dir" in str(error.value)
    calls.clear()
    values = values_of(f, tmp_path)
    assert values == [*COUNTS[:3], 20, 20, 20, *COUNTS[6:]] and calls == [["long" * 5] * 3]
    check_scored(folder, tmp_path / "scores")
    # The same text again, with or without its checksum, is the same.
    storage.write_jsonl_atomic(path, known)
    storage.checksum_path(path).unlink()
    values_of(f, tmp_path)
    assert file_bytes(tmp_path / "scores") == before and len(calls) == 2
    # Scores that others wrote don't say.
    rows = [{"prompt_index": 0, "sample_index": j, "score": 1.0} for j in range(3)]
    storage.write_jsonl_atomic(storage.part_path(tmp_path / "own", 0), rows)
    check_scored(folder, tmp_path / "own")


def test_a_score_that_was_damaged_is_not_passed_over(tmp_path):
    write_candidates(tmp_path / "candidates", TEXTS, per_part=1)
    scorer = Scorer("tests:f", lambda _, responses: [1.0] * len(responses))
    values_of(scorer, tmp_path)
    part = storage.part_path(tmp_path / "scores", 1)
    part.write_text(part.read_text().replace("1.0", "9.0"))
    with pytest.raises(DataError, match="damaged"):
        values_of(scorer, tmp_path)


def test_scorers_on_rows_need_whole_candidates(tmp_path):
    row = candidate(0, 0, "x", extra={"answer": 4}).to_json()
    del row["prompt_ids"]
    storage.write_jsonl_atomic(storage.part_path(tmp_path / "candidates", 0), [row])
    with pytest.raises(DataError, match="'prompt_ids' is missing"):
        values_of(load_scorer("answer"), tmp_path)
    assert values_of(Scorer("tests:f", lambda p, r: [1.0]), tmp_path) == [1.0]
