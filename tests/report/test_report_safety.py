"""Any text, and missing or damaged files, give a page that says what is there."""

import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import markupsafe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import (
    BROKEN,
    HOSTILE,
    Reader,
    page_of,
    section,
    section_text,
    write_json,
    write_rows,
    write_run,
)

from fastdpo.errors import DataError
from fastdpo.report import runfiles
from fastdpo.report import summary as report
from fastdpo.report.page import TEMPLATES
from fastdpo.report.text import (
    SHOWN_LINES,
    clipped,
    plain,
    visible,
)

PARTS: Any = TEMPLATES.get_template("parts.html.jinja").module


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_shown_and_changes_nothing(text, tmp_path):
    """The same elements, whatever the text: only marks for code points may be added."""
    outs = []
    for name, word in (("plain", "x"), ("hostile", text)):
        prompt = [{"role": word, "content": word}, {"role": "user", "content": {word: None}}]
        out = write_run(
            tmp_path / name, text=word, prompt=prompt, model=word, score={"scorer": word},
            output_dir=word, other={word: [word]}, **{f"key {word}": word},  # type: ignore[arg-type]
        )  # fmt: skip
        write_json(out / "round-01/pairs.summary.json", {"pairs": 1, "dropped": {word: 4}})
        speed = {word: word, "tokens_per_second": 1.0}
        write_json(out / "round-01/candidates/throughput.json", speed)
        outs.append(out)
    ours, theirs = (Reader(page_of(out)) for out in outs)
    assert "Left out" not in ours.all_text() + theirs.all_text()

    def shape(reader):
        return [(tag, sorted(a)) for tag, a in reader.elements if a.get("class") != "code"]

    assert shape(theirs) == shape(ours)
    assert not theirs.declarations
    shown = theirs.all_text()
    for word in re.findall(r"[A-Za-z<>&;/=\"']{3,}", text):
        assert word in shown
    for c in text:
        if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}:
            assert f"U+{ord(c):04X}" in shown


@given(st.text(st.characters(), max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_text_becomes_text(text):
    shown = Reader(f"<p>{visible(text)}</p>")
    assert [tag for tag, _ in shown.elements if tag != "span"] == ["p"]
    visible(text).encode()
    flat = plain(text)
    assert visible(flat) == markupsafe.escape(flat)
    categories = {unicodedata.category(c) for c in flat if c not in "\n\t\u200c\u200d"}
    assert not categories & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    if text.isascii() and text.isprintable():
        assert "".join(shown.text)[1:] == text


def test_code_points_are_named_and_runs_counted():
    assert "U+202E" in visible("\u202e") and "RIGHT-TO-LEFT OVERRIDE" in visible("\u202e")
    assert "U+0000 × 5,000<" in visible("\0" * 5000)
    assert len(visible("\0" * 5000)) < 100
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert visible(family + "אבג") == family + "אבג"


def test_long_texts_are_clipped_and_their_length_told(tmp_path):
    texts = {(0, 0, 0): "x" * 100_000, (1, 0, 0): "line\n" * 3000, (2, 0, 0): "<" * 1200}
    page = page_of(write_run(tmp_path, texts=texts))
    focused = [a for _, a in Reader(page).elements if "tabindex" in a]
    assert sum(a["role"] == "group" for a in focused) == 3
    assert all(a.get("role") and a.get("aria-label") for a in focused)
    found = section(page, "responses")
    assert "99,300 more of 100,000 characters" in found
    assert "clipped here, after 6,000 of 100,000 characters" in found
    assert "x" * 5300 in found and "x" * 5301 not in found and len(page) < 100_000
    first = found.split("line\n", 1)[1].split("</p>")[0]
    assert first.count("line") == SHOWN_LINES - 1
    assert "500 more of 1,200 characters" in found and found.count("&lt;") == 1200
    assert clipped("x" * 700).more == 0 and clipped("x" * 701).more == 1
    assert "empty" in PARTS.clipped(clipped(""))
    assert "white space" in PARTS.clipped(clipped(" \n "))


def test_prompts_of_any_form_are_shown(tmp_path):
    messages = [{"role": "system", "content": "be <b>"}, {"role": "user", "content": [{"t": 1}]}, 7]
    found = Reader(page_of(write_run(tmp_path / "a", prompt=messages))).all_text()
    assert 'system be <b> user [{"t": 1}] message 7 Start' in found
    messages = [{"role": "user", "content": "a"}] * 40
    found = Reader(page_of(write_run(tmp_path / "b", prompt=messages))).all_text()
    assert "12 of 40 messages are shown" in found


def test_the_same_files_give_the_same_bytes(tmp_path):
    first = page_of(write_run(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "elsewhere")
    assert page_of(tmp_path / "b" / "elsewhere") == first
    code = "import sys; from fastdpo.report.summary import html; html(sys.argv[1])"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path.cwd())}
        (tmp_path / "a/report.html").unlink()
        command = [sys.executable, "-c", code, str(tmp_path / "a")]
        subprocess.run(command, env=environment, check=True, timeout=300)
        assert (tmp_path / "a/report.html").read_text(encoding="utf-8") == first
    assert not re.search(r"20\d\d-\d\d|tmp|elsewhere", first)


FILES = {
    "state.json": "config",
    "round-01/summary.json": "rounds",
    "round-01/pairs.summary.json": "pairs",
    "round-01/metrics/metrics.jsonl": "training",
    "round-01/candidates/throughput.json": "speed",
    "round-02/eval/candidates/throughput.json": "speed",
    "round-02/eval/candidates/part-00000.jsonl": "lengths",
    "round-01/eval/scores/part-00000.jsonl": "responses",
    "round-00/eval/scores/plan.json": None,
}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_leaves_out_its_section_alone(name, tmp_path):
    write_run(tmp_path)
    (tmp_path / name).unlink()
    page = page_of(tmp_path)
    where = FILES[name]
    assert Reader(page).find("section")
    if where is None:
        assert "Left out" not in page
        return
    told = section_text(page, where)
    assert "Left out:" in told and name.split("/part")[0].split("/scores")[0] in told
    assert str(tmp_path) not in page
    untouched = {"config", "pairs", "training", "speed"} - {where}
    for other in untouched - ({"lengths", "responses"} if "eval" in name else set()):
        assert "Left out" not in section(page, other)


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_told_of(name, content, tmp_path):
    write_run(tmp_path)
    (tmp_path / name).write_bytes(content)
    page = page_of(tmp_path)
    Reader(page)
    where = FILES[name]
    # An empty file of metrics has no steps yet, and a last line may be cut off; the last contents
    # are objects, if strange ones.
    strange = {"state.json": BROKEN[8:], "metrics.jsonl": [b"", b"{", *BROKEN[7:]]}
    whole = content in strange.get(Path(name).name, [])
    if where in {"config", "pairs", "lengths", "responses", "training"} and not whole:
        assert "Left out" in section(page, where)
    assert "nan" not in Reader(page).all_text().lower().split()


def test_a_cut_off_last_line_of_metrics_is_no_damage(tmp_path):
    write_run(tmp_path)
    path = tmp_path / "round-01/metrics/metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    assert "Left out" not in page_of(tmp_path)
    path.write_text(path.read_text() + '\n{"step": 6}\n')
    assert "metrics.jsonl:5" in section(page_of(tmp_path), "training")


def test_unreadable_parts_of_a_round_are_left_out_not_raised(tmp_path):
    write_run(tmp_path)
    for name in ("summary.json", "pairs.summary.json", "metrics/metrics.jsonl"):
        path = tmp_path / "round-02" / name
        path.unlink()
        path.mkdir()  # reading it is an OSError, also for root
    page = page_of(tmp_path)
    assert section(page, "pairs").count("Left out") == 1
    assert "round-02/pairs.summary.json" in section(page, "pairs")


def test_a_run_that_only_began(tmp_path):
    write_json(tmp_path / "state.json", {"config": {"rounds": 3}, "done": []})
    page = page_of(tmp_path)
    assert "Unfinished: 0 of 3 rounds." in page
    assert page.count('class="gone"') == 7  # all but the config
    (tmp_path / "round-00").mkdir()
    assert "round-00/summary.json is not there" in page_of(tmp_path)


def test_the_stages_of_a_curriculum_follow_one_another(tmp_path):
    write_run(tmp_path)
    folder = tmp_path / "round-01"
    shutil.rmtree(folder / "metrics")
    for stage, loss in (("stage-10", 0.25), ("stage-2", 0.5)):
        write_rows(folder / stage / "metrics/metrics.jsonl", [{"step": 1, "loss": loss}])
    one = next(x for x in runfiles.read_run(tmp_path).rounds if x.index == 1)
    assert [step["loss"] for step in one.steps] == [0.5, 0.25]
    assert "Left out" not in page_of(tmp_path)


def test_a_round_that_was_trained_and_not_evaluated(tmp_path):
    write_run(tmp_path)
    shutil.rmtree(tmp_path / "round-02/eval")
    (tmp_path / "round-02/summary.json").unlink()
    page = page_of(tmp_path)
    rounds = section_text(page, "rounds")
    assert re.search(r"Round 2 – – – – – 0\.2000", rounds)
    assert "round-02/eval is not there" in section(page, "responses")
    assert section(page, "responses").count('class="answer"') == 2 * 5


def test_no_run_is_an_error_and_leaves_nothing(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="no run here"):
            report.html(folder)
    assert not list(tmp_path.iterdir())
    for run in ("runs/alpha/round-01", "runs/plain", "other"):
        (tmp_path / run).mkdir(parents=True)
    (tmp_path / "runs/plain/state.json").touch()
    with pytest.raises(DataError, match="but below it") as error:
        report.html(tmp_path / "runs")
    assert str(error.value).endswith(f": {tmp_path}/runs/alpha, {tmp_path}/runs/plain")


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    write_run(tmp_path)
    before = page_of(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        report.html(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert not list(tmp_path.glob(".report*"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("fuzz"), prompts=2)


@given(st.sampled_from([name for name in FILES if name.endswith(".json")]), st.data())
@settings(max_examples=150, deadline=None)
def test_any_values_in_json_files_give_a_page(scratch, name, data):
    path = scratch / name
    before = path.read_text()
    known = json.loads(before)
    keys = [*sorted(known), "config", "done", "rewards/chosen", "win_rate", "beta"]
    changes = data.draw(st.dictionaries(st.sampled_from(keys) | st.text(max_size=9), json_values))
    if isinstance(changes.get("config"), dict) or "config" in known:
        config = data.draw(
            st.dictionaries(
                st.sampled_from(["model", "beta", "alpha", "rounds", "max_new_tokens", "scorer",
                                 "output_dir", "train", "sample", "score", "evaluate"]),
                json_values | st.dictionaries(
                    st.sampled_from(["beta", "alpha", "max_new_tokens", "scorer", "heldout"]),
                    json_values))
        )  # fmt: skip
        changes["config"] = config
    try:
        path.write_text(json.dumps({**known, **changes}))
        Reader(page_of(scratch))
    finally:
        path.write_text(before)
