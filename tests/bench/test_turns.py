"""Everything is checked first and then takes turns; what fails has a note and holds up no other."""

import pytest
import torch

from bench import turns
from bench.rows import append, matching, resume


def rows_of(names):
    return {name: {"variant": name, "note": None} for name in names}


def test_turns_in_a_new_order_each_round():
    rows, taken, ended = rows_of("abcs"), [], []

    def sample(name):
        taken.append(name)
        if name == "c" and taken.count(name) == 5:
            raise turns.Failed("no more")
        return 100.0 if name == "s" else float(taken.count(name))

    samples = {name: [first] for name, first in turns.each(rows, sample)}
    assert taken == ["a", "b", "c", "s"]
    turns.take_turns(
        rows, samples, sample, 6, turn=2, slow=lambda x: x == 100.0, after=ended.append
    )
    assert {name: len(found) for name, found in samples.items()} == {"a": 7, "b": 7, "c": 4, "s": 3}
    assert rows["c"]["note"] == "no more" and rows["a"]["note"] is None
    rounds = ended[:4], ended[4:7], ended[7:]
    assert sorted(rounds[0]) == ["a", "b", "c", "s"] and sorted(rounds[2]) == ["a", "b"]
    assert sorted(rounds[1]) == ["a", "b", "c"]
    # Two samples in a row are one turn.
    assert taken[4:12:2] == taken[5:12:2] == rounds[0]
    more: list[str] = []
    turns.take_turns(rows_of("abcd"), {name: [0] for name in "abcd"}, len, 9, after=more.append)
    assert len({tuple(more[i : i + 4]) for i in range(0, 36, 4)}) > 5


def test_what_has_a_note_is_not_called():
    rows = rows_of("abc")
    rows["a"]["note"] = "wrong: loss_rel_err"
    errors = {"b": torch.OutOfMemoryError("tried to allocate"), "c": ValueError("of\ntwo lines")}

    def fail(name):
        raise errors[name]

    assert dict(turns.each(rows, fail)) == {}
    notes = [row["note"] for row in rows.values()]
    assert notes == ["wrong: loss_rel_err", "out of memory", "ValueError: of"]
    assert turns.interleaved_ms(rows, {}, 3, torch.device("cpu")) == {}


def test_calls_are_timed_by_rounds_and_a_slow_one_once(monkeypatch):
    monkeypatch.setattr(turns, "SLOW_MS", 5.0)
    monkeypatch.setattr(turns, "timed_ms", lambda call, device, calls=1: call())
    calls = {"quick": lambda: 0.5, "slow": lambda: 8.0}
    found = turns.interleaved_ms(rows_of(calls), calls, 3, torch.device("cpu"))
    assert [(x["samples"], x["calls"]) for x in found.values()] == [(3, 4), (1, 1)]
    assert found["quick"]["median"] == found["quick"]["p80"] == 0.5


def test_summary_and_ratios():
    found = turns.summary([4.0, 1.0, 2.0, 3.0, 5.0])
    assert found == {"median": 3.0, "min": 1.0, "p20": 1.8, "p80": 4.2, "samples": 5}
    assert turns.ratios([4.0, 6.0], [2.0, 2.0, 9.0]) == [2.0, 3.0]


def test_a_broken_device_is_said_of_any_row(monkeypatch):
    monkeypatch.setattr(turns, "device_is_broken", lambda: True)
    rows = {"x": {"head": "wide", "case": "kl", "note": None}}
    with pytest.raises(turns.DeviceBroken, match="wide, kl: broke the device: KeyError") as broken:
        list(turns.each(rows, lambda name: {}[name]))
    assert broken.value.row is rows["x"]


def test_a_file_of_rows_goes_on(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert resume(path) == [] and append(None, {"a": 1}) == {"a": 1}
    here = {"device": "D", "threads": 1, "versions": {}, "git": None, "dirty": False}
    rows = [append(path, {**here, "a": i, "utc": str(i)}) for i in range(3)]
    path.write_text(path.read_text()[:-5])
    assert resume(path) == rows[:2] and path.read_text().count("\n") == 2
    assert matching(rows, here, a=1) == rows[1:2] and matching(rows, {**here, "git": "x"}) == []
