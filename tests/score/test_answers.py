"""Verifiable answers: which responses are right."""

import pytest
from scoring_server import candidate, run_score

from fastdpo import storage
from fastdpo.errors import DataError
from fastdpo.score.answer import right_answer
from fastdpo.score.load import load_scorer


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        (42, "So it is 40 + 2 = 42.", True),
        (42, "42 is my first guess, or rather 43.", False),
        ("42", "The answer is **42**", True),
        (42, "It costs $42.00!", True),
        (42, "42%", True),
        (-3, "x = -3", True),
        (3, "x = -3", False),
        (-3, "x = \u22123", True),
        (3, "the range 1-3", True),
        (1234567, "about 1,234,567, I think", True),
        (234, "about 1,234, I think", False),
        (1234, "about 1,234, I think", True),
        ("1,234", "1234", True),
        (2345, "lines 1,2345", True),
        (0.5, "a half, 1/2", True),
        ("1/2", "0.50", True),
        ("\\frac{1}{2}", ".5", True),
        (0.1, "0.1000000000000000055", False),
        ("1e3", "1000", True),
        (7, "none at all", False),
        (7, "", False),
        (7, "H2O and 7", True),
        (7, "7e", True),
        (1, "1/0", False),
        ("1/0", "1/0", True),  # as a text
        (5, "5 apples, \\boxed{5} of 9", True),
        (5, "\\boxed{4} and 5", False),
        (5, "first \\boxed{4} then \\boxed{5}", True),
        (5, "\\boxed{x = 5}", True),
        ("\\boxed{5}", "so 5", True),
        ("x^{2}+1", "\\boxed{x^{2}+1}", True),
        ("x^2", "\\boxed{x^3}", False),
        ("\\frac{\\sqrt{3}}{2}", "$\\boxed{\\frac{\\sqrt{3}}{2}}$", True),
        (18, "16 - 3 - 4 = 9\n#### 18", True),
        (18, "18\n#### 19", False),
        ("She has 9 * 2 = 18.\n#### 18", "So she makes $18.", True),
        ("Paris", "I think of Lyon.\nThe capital is Paris.", True),
        ("paris", "Answer: **Paris**\n\n", True),
        ("Paris", "Paris is a town.\nI don't know.", False),
        ("New  York", "new york", True),
        ("", "", False),
        (["4", "four"], "It is four", True),
        (["4", "four"], "It is 4", True),
        (["4", "four"], "It is five", False),
        (9, "9" * 5000, False),
        (9, "1e" + "9" * 50 + " 9", True),
        ("yes", "\\boxed{yes", False),
        ("5/2", "\\boxed{2\\frac{1}{2}}", True),
        ("21/2", "\\boxed{2\\frac{1}{2}}", False),
        ("\\boxed{2\\dfrac12}", "2.5", True),
        ("5/2", "\\boxed{2 1/2}", True),
        ("5/2", "so it takes 2 1/2 hours", True),
        ("5/2", "so it takes $2\\,\\tfrac{1}{2}$ hours", True),
        ("-5/2", "\\boxed{-2 \\frac 1 2}", True),
        ("-1/2", "\\boxed{-\\frac{1}{2}}", True),
        ("-1/2", "\\boxed{- \\frac{1}{2}}", True),
        ("1/2", "\\boxed{\\frac12}", True),
        ("3/4", "\\boxed{\\frac{3}4}", True),
        ("2/3", "\\boxed{2 / 3}", True),
        ("\\frac{\\pi}{2}", "\\boxed{\\frac{\\pi}2}", True),
        (27, "\\boxed{2 7}", False),
        (34, "\\boxed{3 4}", False),
        (34, "\\boxed{3\\ 4}", False),
        (34, "\\boxed{3\\,4}", False),
        ("27/2", "\\boxed{2 7/2}", False),
        ("11/2", "\\boxed{2 7/2}", False),
        (1234, "\\boxed{1\\,234}", True),
        (1234, "\\boxed{1{,}234}", True),
        (1234567, "\\boxed{1,\\!234,\\!567}", True),
        (1234567, "1\u202f234\u202f567", True),
        (5, "\\boxed{5\\text{ cm}^2}", True),
        (5, "\\boxed{5~\\mathrm{m}/\\mathrm{s}^{2}}", True),
        (2, "\\boxed{5\\text{ cm}^2}", False),
        (5, "an area of $5\\,\\text{cm}^2$.", True),
        ("5\\text{ cm}", "\\boxed{5}", True),
        (0.5, "\\boxed{\\frac{1}{2}\\text{ m}}", True),
        (90, "\\boxed{90^\\circ}", True),
        (6, "\\boxed{5\\text{ or }6}", True),  # the last number, as ever
        (56, "\\boxed{5\\text{ or }6}", False),
        (5, "\\boxed{\\text{5}}", True),
    ],
)
def test_right_answers(answer, response, right):
    row = candidate(0, 0, response, extra={"answer": answer})
    assert right_answer([row]) == [float(right)]


def test_answers_score_candidates(tmp_path):
    extra = {"answer": 4}
    rows = [candidate(0, j, x, extra=extra).to_json() for j, x in enumerate(["4", "5"])]
    path = storage.part_path(tmp_path / "candidates", 0)
    storage.write_jsonl_atomic(path, rows)
    assert run_score(load_scorer("answer"), tmp_path) == [1.0, 0.0]
    for extra in ({}, {"answer": None}, {"answer": []}, {"answer": [1, None]}):
        storage.write_jsonl_atomic(path, [candidate(3, 0, "4", extra=extra).to_json()])
        with pytest.raises(DataError, match=r"part-00000.jsonl:1 \(prompt 3\): .* column 'answer'"):
            run_score(load_scorer("answer"), tmp_path, "bad")
        assert not (tmp_path / "bad").exists()
        with pytest.raises(DataError, match=r"prompt 3 has no answer"):
            right_answer([candidate(3, 0, "4", extra=extra)])
