"""Bars: what they say, how they move within a part, and several as the parts of one."""

import re
from threading import Thread

import pytest

from fastdpo.progress import advance, bar, overall, parts, within


def test_a_bar_says_what_for(capsys):
    with within("round 1 of 2"), bar("scoring", 4, "part", done=1) as shown:
        shown.reach(4)
        shown.note("fast")
    assert re.search(r"round 1 of 2: scoring: 100%.*4/4 .*part/s, fast", capsys.readouterr().err)


def test_it_moves_within_a_part():
    with bar("scoring", 3, "part", shown=False) as shown:
        seen = []
        with shown.part():
            for _ in parts(range(4)):
                seen.append(shown.done)
        with shown.part(), shown.part():  # what asks twice doesn't count twice
            list(parts(iter("ab"), 2))
            list(parts("ab"))
            assert shown.done == 2.0
    assert seen == [0.0, 0.25, 0.5, 0.75] and shown.done == 2.0


def test_threads_advance_it_together():
    with bar("sampling", 400, "response", shown=False) as shown:
        threads = [Thread(target=lambda: [advance() for _ in range(100)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert shown.done == 400.0
    advance()  # nothing to move
    assert list(parts("ab")) == ["a", "b"]


def test_one_bar_over_all(capsys):
    seconds = {"start: sampling": 10.0, "round 1: sampling": 20.0, "round 1: training": 10.0}
    with overall(seconds) as whole, within("round 1"):
        with bar("sampling", 10, "response") as shown:  # the start's are there from before
            assert whole.done == 10.0
            shown.reach(5)
            assert whole.done == 20.0
        with bar("reference", 4, "batch") as shown:  # is not listed
            shown.reach(4)
        with bar("training", 0, "step"):  # nothing is left to do
            assert whole.done == 40.0
    shown = capsys.readouterr().err
    assert "100%" in shown and "left: round 1: training" in shown
    assert "response/s" not in shown and "batch/s" not in shown


def test_what_fails_leaves_no_bar():
    with pytest.raises(ValueError), overall({"a": 1.0}, shown=False), bar("a", 2, "part"):
        raise ValueError
    with bar("b", 2, "part", shown=False) as shown:
        advance()
        assert shown.done == 1.0
