"""The report page: its numbers, its safety against any text, and runs with damaged files."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.errors import DataError
from fastdpo.report import charts, evaluation, markup, runfiles
from fastdpo.report import summary as report
from fastdpo.report.evaluation import Estimate, Response
from fastdpo.report.style import STYLE

HOSTILE = [
    "<script>alert(1)</script>",
    "</p></div></article></section><h1>other</h1>",
    "\"><img src=x onerror=alert(1)> ' onload='x",
    "&lt;b&gt; &amp; &#60;i&#62;",
    "]]> --> <!-- <style>*{display:none}</style>",
    "abc \u202e fdp.exe \u2066 isolate \u200b zero \ufeff",
    "nul \0 and \x1b[31mred\x07",
    "lone \ud800 surrogate \udfff",
    "<svg><a xlink:href='javascript:alert(1)'>x</a></svg>",
    "line\u2028separators\u2029here",
]


def write_json(path, value):
    """With escapes for all but ASCII, so that lone surrogates can be written too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(
    out: Path,
    *,
    rounds: int = 2,
    prompts: int = 5,
    texts: dict | None = None,
    text: str = "a fine answer",
    prompt: Any = "question",
    **config: Any,
):
    """A finished run with the files that the stages write; `texts` overrides response texts."""
    config = {
        "model": "/models/tiny", "scorer": "words:plain", "prompts": "prompts.jsonl", "beta": 0.1,
        "alpha": 0.01, "rounds": rounds, "max_new_tokens": 40, "output_dir": "/runs/first",
    } | config  # fmt: skip
    done = [f"round-{i:02d}/report" for i in range(rounds + 1)]
    write_json(out / "state.json", {"config": config, "done": done})
    for index in range(rounds + 1):
        folder = out / f"round-{index:02d}"
        candidates, scores = [], []
        for p in range(prompts):
            for s in range(2):
                key = {"prompt_index": p, "sample_index": s}
                length = 10 + 3 * p + s + (2 + p % 2) * index
                response = (texts or {}).get((index, p, s), f"{text} {index}.{p}.{s}")
                asked = prompt if isinstance(prompt, list) else f"{prompt} {p}"
                finish = "length" if (p + s) % 2 else "stop"
                candidates.append({
                    **key, "prompt": asked, "prompt_ids": [1], "response": response,
                    "response_ids": [5] * length, "finish_reason": finish, "extra": {},
                })  # fmt: skip
                scores.append({**key, "score": 0.1 * p + 0.05 * s + (0.2 + 0.02 * p) * index})
        for name, rows in (("candidates", candidates), ("scores", scores)):
            write_rows(folder / "eval" / name / "part-00000.jsonl", rows)
            write_json(folder / "eval" / name / "plan.json", {"parts": 1})
        speed = {"backend": "generate", "tokens_per_second": 812.5, "samples_per_second": 12.5}
        write_json(folder / "eval/candidates/throughput.json", speed)
        summary = {"round": index, "score": 0.226 + 0.24 * index, "score_se": 0.0707}
        summary |= {"length": 16.5 + 2.4 * index, "length_se": 2.121, "truncated": 0.5}
        if index:
            trained = {
                "loss": 0.66, "rewards/chosen": -0.1, "rewards/rejected": -0.3,
                "rewards/margins": 0.2, "rewards/accuracies": 0.625, "pairs_per_second": 1.5,
            }  # fmt: skip
            dropped = {"tie": 3, "identical responses": index}
            write_json(folder / "train.json", trained)
            pairing = {"pairs": 60 + index, "dropped": dropped, "mean_score_chosen": 0.75}
            write_json(folder / "pairs.summary.json", pairing)
            steps = [
                {"step": i + 1, **trained, "loss": 0.7 - 0.01 * i, "grad_norm": 9.5, "pairs": 8,
                 "lengths/chosen": 20.0, "lengths/rejected": 18.0}
                for i in range(4)
            ]  # fmt: skip
            write_rows(folder / "metrics" / "metrics.jsonl", steps)
            write_json(folder / "candidates/throughput.json", speed)
            summary |= trained | {"pairs": 60 + index, "dropped": dropped}
            summary |= {"kl": 2.5 * index, "kl_se": 0.5}
        write_json(folder / "summary.json", summary)
    return out


class Reader(HTMLParser):
    """Elements with their attributes, and the text of the page, as a browser takes them."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})
    INLINE = frozenset({"b", "i"})

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.text, self.declarations = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.text.append("" if tag in self.INLINE else " ")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def handle_comment(self, data):
        self.declarations.append(data)

    def find(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def all_text(self):
        return " ".join("".join(self.text).split())


def page_of(out):
    path = report.html(out)
    assert path == Path(out) / "report.html"
    return path.read_text(encoding="utf-8")


def section(page, name):
    return page.split(f'<section id="{name}"')[1].split("</section>")[0]


def text_of(markup_text):
    return Reader(markup_text).all_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return page_of(write_run(tmp_path_factory.mktemp("run")))


# Statistics


def held(*values, start=0):
    """Responses from (prompt, score, length)."""
    return [Response(p, "q", "a", length, score, False) for p, score, length in values]


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
    assert found[1].cut and not found[0].cut and found[3].length == 14
    for broken in (scores[1:], [*scores, {**scores[0], "sample_index": 9}], [{}], [*scores, 3]):
        write_rows(folder / "scores/part-00000.jsonl", broken)  # type: ignore[arg-type]
        with pytest.raises(DataError):
            evaluation.heldout(folder)
    write_rows(folder / "scores/part-00000.jsonl", scores)
    write_rows(folder / "candidates/part-00000.jsonl", [*candidates, candidates[0]])
    with pytest.raises(DataError, match="there twice"):
        evaluation.heldout(folder)


def test_numbers_of_the_files_come_before_those_computed(tmp_path):
    """A win rate with its error; that of the start against itself says nothing."""
    write_run(tmp_path)
    for index, rate in ((0, 0.5), (1, 0.75)):
        path = tmp_path / f"round-0{index}/summary.json"
        write_json(path, json.loads(path.read_text()) | {"win_rate": rate, "win_rate_se": 0.05})
    run = runfiles.read_run(tmp_path)
    rows = [runfiles.measured(run, one) for one in run.rounds]
    assert "win_rate" not in rows[0]
    assert rows[1]["win_rate"] == (0.75, pytest.approx(2.776445 * 0.05))  # of 5 prompts
    assert rows[2]["win_rate"] == (1.0, None)


def test_the_divergence_is_that_of_the_evaluation(tmp_path):
    """Of held-out responses; that of a round has its own interval, the start has none."""
    run = runfiles.read_run(write_run(tmp_path))
    rows = [runfiles.measured(run, one) for one in run.rounds]
    assert "kl" not in rows[0]
    assert rows[1]["kl"] == (2.5, pytest.approx(2.776445 * 0.5)) and rows[2]["kl"].value == 5.0
    page = report.html(tmp_path).read_text(encoding="utf-8")
    assert "KL from the start, nats" in Reader(page).all_text()


@pytest.mark.parametrize("config", [{"temperature": 0.7}, {"top_p": 0.9, "temperature": 1.0}])
def test_it_is_no_divergence_of_responses_that_were_sampled_otherwise(config, tmp_path):
    page = page_of(write_run(tmp_path, **config))
    told = Reader(page).all_text()
    assert "KL from the start" not in told and told.count("Log-ratio to the start, nats") == 2
    (name, value), *_ = config.items()
    assert (
        f"no KL divergence: responses were not sampled from the policy itself but at {name} "
        in told
    )
    assert f"{name} {value:g}, while" in told
    assert 'aria-label="Log-ratio to the start, nats by round.' in page


@pytest.mark.parametrize(("prompts", "quantile"), [(5, 2.776445), (None, 1.959964), (-1, 1.959964)])
def test_errors_without_their_responses_take_the_configs_number_of_prompts(
    prompts, quantile, tmp_path
):
    write_run(tmp_path, heldout=prompts)
    shutil.rmtree(tmp_path / "round-01/eval")
    run = runfiles.read_run(tmp_path)
    assert runfiles.measured(run, run.rounds[1])["kl"] == (2.5, pytest.approx(0.5 * quantile))


def test_the_length_controller_is_shown(tmp_path):
    write_run(tmp_path, rounds=2)
    before = page_of(tmp_path)
    assert "at most" not in before and "dashed" not in before and "length controller" not in before
    for index in (1, 2):
        path = tmp_path / f"round-0{index}/summary.json"
        facts = {
            "alpha": 0.0125 * index, "alpha/neutral": 0.01, "alpha/bound": 0.25 / index,
            "length/sampled": 17.0 + index, "length/target": 18.0, "length/error_sum": 1.0,
            "length_tilt/wanted": -0.002,
        }  # fmt: skip
        write_json(path, json.loads(path.read_text()) | facts)
    page = page_of(tmp_path)
    rounds = text_of("<section" + section(page, "rounds") + "</section>")
    assert "α |α| at most Target, tokens Pairs" in rounds
    assert "0.01250 0.2500 18.00 61" in rounds and "0.02500 0.1250 18.00 62" in rounds
    assert "the length controller’s" in rounds
    length = next(x for x in section(page, "plots").split("<figure>") if "<b>Length" in x)
    assert "dashed: the target, 18" in length and 'class="level"' in length
    assert section(page, "plots").count('class="level"') == section(before, "plots").count(
        'class="level"'
    ) + 1  # fmt: skip


def test_what_shaping_found_is_shown(tmp_path):
    write_run(tmp_path)
    for index in (1, 2):
        path = tmp_path / f"round-0{index}/pairs.summary.json"
        facts = {"length_penalty": 0.00032, "length_gap_before": 11.5, "length_gap": 0.25 * index}
        write_json(path, json.loads(path.read_text()) | {"shaping": facts})
    pairs = text_of("<section" + section(page_of(tmp_path), "pairs") + "</section>")
    assert "Length penalty, score/token 0.000320 0.000320" in pairs
    assert "Best − worst before the penalty, tokens 11.50 11.50" in pairs
    assert "Best − worst after it, tokens 0.250 0.500" in pairs
    write_json(path, json.loads(path.read_text()) | {"shaping": [1]})
    assert "shaping is not an object" in section(page_of(tmp_path), "pairs")


def test_what_training_and_replay_left_out_is_among_the_drops(tmp_path):
    write_run(tmp_path)
    path = tmp_path / "round-02/summary.json"
    lost = {"pairs_dropped": 7, "pairs_truncated": 3}
    write_json(path, json.loads(path.read_text()) | lost)
    summary = {"pairs": 30, "dropped": {"over <max_length>": 4}}
    write_json(tmp_path / "offline/summary.json", summary)
    page = page_of(tmp_path)
    pairs = text_of("<section" + section(page, "pairs") + "</section>")
    assert "Pairs kept 61 62" in pairs
    assert "Dropped in training: too long – 7" in pairs
    assert "Kept, but truncated in training – 3" in pairs
    assert "Offline pairs to replay Offline Pairs Kept 30 Dropped: over <max_length> 4" in pairs
    assert "116 in 2 rounds" in Reader(page).all_text()  # 61 and 62 - 7
    assert re.search(r"0\.6600 55 ", text_of("<section" + section(page, "rounds") + "</section>"))
    (tmp_path / "offline/summary.json").write_text("{")
    assert "offline/summary.json" in section(page_of(tmp_path), "pairs")


def test_offline_pairs_are_shown_before_any_round_was_paired(tmp_path):
    write_json(tmp_path / "state.json", {"config": {"rounds": 3}, "done": []})
    write_json(tmp_path / "offline/summary.json", {"pairs": 30, "dropped": {}})
    pairs = section(page_of(tmp_path), "pairs")
    assert "Kept 30" in text_of(f"<section{pairs}</section>") and "no round was paired" in pairs


# The page


def test_the_page_has_the_numbers_of_the_files(page):
    rounds = text_of("<section" + section(page, "rounds") + "</section>")
    assert "Start 0.23 ± 0.20 16.5 ± 5.9 – – 50.0% –" in rounds
    change = "0.71 ± 0.20 +0.480 ± 0.079 21.3 ± 5.9 +4.8 ± 1.4"
    assert f"Round 2 {change} 100.0% 5.0 ± 1.4 50.0% 0.2000 62.5% 0.6600 62" in rounds
    pairs = text_of("<section" + section(page, "pairs") + "</section>")
    assert "Pairs kept 61 62" in pairs
    assert "Dropped: identical responses 1 2" in pairs and "Dropped: tie 3 3" in pairs
    speed = text_of("<section" + section(page, "speed") + "</section>")
    assert "Round 1, rollouts generate 812 12.5" in speed and "Start, evaluation" in speed
    config = text_of("<section" + section(page, "config") + "</section>")
    assert "max_new_tokens 40" in config and "beta 0.1" in config
    whole = Reader(page).all_text()
    assert "model tiny · scorer words:plain" in whole and "Finished: 2 of 2 rounds." in whole
    assert "0.23 → 0.71 +0.480 ± 0.079" in whole and "123 in 2 rounds" in whole


def test_responses_stand_side_by_side(page):
    found = section(page, "responses")
    assert found.count("<article>") == 5 and found.count('class="answer"') == 15
    third = text_of("<article>" + found.split("<article>")[4].split("</article>")[0] + "</article>")
    assert "question 3" in third and "a fine answer 0.3.0" in third
    assert third.index("a fine answer 0.3.0") < third.index("a fine answer 2.3.0")
    assert "score 0.3, mean of 2: 0.325 · 19 tokens" in third
    assert "score 0.82, mean of 2: 0.845 · 25 tokens" in third


def test_every_section_is_there_and_reachable(page):
    reader = Reader(page)
    ids = [a["id"] for _, a in reader.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for a in reader.find("a")]
    assert len(targets) == 8 and all(t[1:] in ids for t in targets)
    assert [a["aria-labelledby"] for a in reader.find("section")] == [
        f"{t[1:]}-title" for t in targets
    ]
    levels = [int(tag[1]) for tag, _ in reader.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert len(reader.find("caption")) == len(reader.find("table")) == 5
    drawings = reader.find("svg")
    assert len(drawings) == 6 + 1 + 5
    assert all(a["role"] == "img" and len(a["aria-label"]) > 30 for a in drawings)
    regions = [a for _, a in reader.elements if a.get("role") == "region"]
    assert regions and all(a["aria-label"] and a["tabindex"] == "0" for a in regions)
    assert reader.find("html")[0]["lang"] == "en" and page.count("\n<title>") == 1
    assert "Left out" not in page


def test_the_page_loads_and_runs_nothing(page):
    reader = Reader(page)
    policy = next(a["content"] for a in reader.find("meta") if "content-security" in str(a).lower())
    style = re.search("<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None and page.count("<style>") == 1
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    # The policy stands before anything that it governs.
    assert page.index("Content-Security-Policy") < page.index("<style>")
    names = {tag for tag, _ in reader.elements}
    assert not names & {"script", "img", "link", "iframe", "object", "embed", "form", "base", "use"}
    attributes = {name for _, a in reader.elements for name in a}
    assert not [x for x in attributes if x.startswith("on") or x in {"src", "style", "srcset"}]
    assert not re.search(r"url\(|@import|https?:|expression\(", page)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_shown_and_changes_nothing(text, tmp_path):
    """The same elements, whatever the text: only marks for code points may be added."""
    outs = []
    for name, word in (("plain", "x"), ("hostile", text)):
        prompt = [{"role": word, "content": word}, {"role": "user", "content": {word: None}}]
        out = write_run(
            tmp_path / name, text=word, prompt=prompt, model=word, scorer=word, output_dir=word,
            other={word: [word]}, **{f"key {word}": word},  # type: ignore[arg-type]
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
    shown = Reader(f"<p>{markup.visible(text)}</p>")
    assert [tag for tag, _ in shown.elements if tag != "span"] == ["p"]
    markup.visible(text).encode()
    flat = markup.visible(text, marked=False)
    assert not re.search(r"[<>\"']", flat)
    categories = {unicodedata.category(c) for c in flat if c not in "\n\t\u200c\u200d"}
    assert not categories & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    if text.isascii() and text.isprintable():
        assert "".join(shown.text)[1:] == text


def test_code_points_are_named_and_runs_counted():
    assert "U+202E" in markup.visible("\u202e") and "RIGHT-TO-LEFT OVERRIDE" in markup.visible(
        "\u202e"
    )
    assert "U+0000 × 5,000<" in markup.visible("\0" * 5000)
    assert len(markup.visible("\0" * 5000)) < 100
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert markup.visible(family + "אבג") == family + "אבג"


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
    assert first.count("line") == markup.SHOWN_LINES - 1
    assert "500 more of 1,200 characters" in found and found.count("&lt;") == 1200
    assert markup.clipped("x" * 700).count("<details>") == 0
    assert markup.clipped("x" * 701).count("<details>") == 1
    assert "empty" in markup.clipped("") and "white space" in markup.clipped(" \n ")


def test_prompts_of_any_form_are_shown():
    messages = [{"role": "system", "content": "be <b>"}, {"role": "user", "content": [{"t": 1}]}, 7]
    found = text_of(f"<div>{markup.prompt_text(messages)}</div>")
    assert "system be <b>".replace(" ", "") in found.replace(" ", "") and '[{"t": 1}]' in found
    assert "12 of 40 messages" in markup.prompt_text([{"role": "user", "content": "a"}] * 40)


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


# Missing and damaged files

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
BROKEN = [
    b"", b"[]", b"{", b"null", b"\xff\xfe", b"[" * 100_000, b'{"step": 1}\nnope\n{"step": 2}\nno\n',
    b'{"config": [], "done": {}, "dropped": [1], "pairs": "x"}',
    b'{"config": {"beta": 1e999, "rounds": null}, "done": [1, null], "dropped": {"tie": NaN}}',
]  # fmt: skip


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
    told = text_of("<section" + section(page, where) + "</section>")
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
    rounds = text_of("<section" + section(page, "rounds") + "</section>")
    assert re.search(r"Round 2 – – – – – 0\.2000", rounds)
    assert "round-02/eval is not there" in section(page, "responses")
    assert section(page, "responses").count('class="answer"') == 2 * 5


def test_no_run_is_an_error_and_leaves_nothing(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="no run here"):
            report.html(folder)
    assert not list(tmp_path.iterdir())


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
                                 "output_dir"]), json_values)
        )  # fmt: skip
        changes["config"] = config
    try:
        path.write_text(json.dumps({**known, **changes}))
        Reader(page_of(scratch))
    finally:
        path.write_text(before)


# Charts


def drawing(svg):
    return ElementTree.fromstring(svg)


values = st.floats(-1e6, 1e6, allow_subnormal=False) | st.floats(-1, 1) | st.just(0.0)


@given(st.lists(values, min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_axes_hold_all_values_and_tick_at_round_numbers(numbers):
    axis = charts.axis(numbers, 200.0, 10.0)
    assert all(9.9 <= float(axis(x)) <= 200.1 for x in numbers)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 6
    assert all(9.9 <= float(axis(tick)) <= 200.1 for tick, _ in ticks)
    labels = [text for _, text in ticks]
    assert all(
        float(text.replace("−", "-")) == pytest.approx(x, rel=0.01, abs=1e-6) for x, text in ticks
    )
    assert len(set(labels)) == len(labels) and "−0" not in labels


def test_a_chart_by_round_places_values_and_intervals():
    marks = [charts.Mark(0, 1.0, 0.5), charts.Mark(1, 3.0, 0.25), charts.Mark(2, 2.0)]
    svg = charts.by_round("Score", marks, [0, 1, 2], line=2.0)
    root = drawing(svg)
    dots = root.findall(".//circle")
    x, y = ([float(dot.attrib[name]) for dot in dots] for name in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert y[0] - y[1] == pytest.approx(2 * (y[0] - y[2]), abs=0.3)
    bars = [p.attrib["d"] for p in root.findall(".//path") if p.attrib["class"] == "bar"]
    assert len(bars) == 2
    top, bottom = re.match(r"M\S+ (\S+)V([0-9.]+)", bars[0]).groups()  # type: ignore[union-attr]
    scale = (y[0] - y[1]) / 2
    assert float(bottom) - float(top) == pytest.approx(scale, abs=0.3)
    assert float(bottom) <= 210 - 24  # above the labels of the rounds
    level = next(p.attrib["d"] for p in root.findall(".//path") if p.attrib["class"] == "level")
    assert float(level.split()[1].split("H")[0]) == pytest.approx(y[2], abs=0.1)
    assert root.attrib["aria-label"] == (
        "Score by round. start: 1 ± 0.5; round 1: 3 ± 0.25; round 2: 2."
    )
    labels = [t.text for t in root.findall("text") if t.attrib["class"] == "mid"]
    assert labels == ["start", "1", "2"]


def test_steps_are_binned_within_their_round():
    bins = charts.binned([(i + 1, float(i)) for i in range(7)], 3)
    assert bins == [(2.0, 1.0, 0.0, 2.0), (5.0, 4.0, 3.0, 5.0), (7.0, 6.0, 6.0, 6.0)]
    root = drawing(charts.by_step("Loss", [(1, bins), (2, charts.binned([(8, 1.0)], 3))]))
    kinds = [p.attrib["class"] for p in root.findall("path")]
    assert kinds.count("line") == 2 and kinds.count("band") == 1 and kinds.count("border") == 1


def test_the_rounds_of_training_follow_one_another(page):
    loss = section(page, "training").split("</svg>")[0]
    first, second = re.findall(r'class="line" d="([^"]*)"', loss)
    ends = [[float(x) for x in re.findall(r"[ML](\S+) ", line)] for line in (first, second)]
    assert len(ends[0]) == len(ends[1]) == 4
    steps = np.diff([*ends[0], *ends[1]])
    assert steps.min() > 0 and steps.max() - steps.min() < 0.25  # a step from round to round too


def test_a_long_training_stays_small(tmp_path):
    write_run(tmp_path)
    steps = [{"step": i + 1, "loss": 1.0 + i % 7, "pairs": 1} for i in range(5000)]
    path = tmp_path / "round-01/metrics/metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in steps))
    found = section(page_of(tmp_path), "training")
    assert "the mean of 26 optimizer steps" in found and len(found) < 60_000


def test_the_scatter_fits_and_marks_each_policy():
    points = [(float(i), 2.0 * i + 1) for i in range(10)]
    assert charts.fitted(points) == pytest.approx((1.0, 2.0))
    assert charts.fitted([(3.0, 1.0), (3.0, 2.0)]) is None
    clouds = [
        charts.Cloud("start", points, Estimate(4.5, 1.0), Estimate(10.0, 2.0)),
        charts.Cloud("round 2", points[:4], Estimate(1.5), Estimate(4.0)),
    ]
    root = drawing(charts.scatter(clouds, limit=11.0))
    dots = [p.attrib for p in root.findall("path") if p.attrib["class"].startswith("dots")]
    assert [d["class"] for d in dots] == ["dots c0", "dots c1"]
    assert [d["d"].count("M") for d in dots] == [10, 4]
    assert "max_new_tokens = 11" in [t.text for t in root.findall("text")]
    assert "max_new_tokens" not in charts.scatter(clouds, limit=100.0) + charts.scatter(
        clouds, limit=None
    )
    assert "start: 10 responses, mean length 4.5 tokens, mean score 10" in root.attrib["aria-label"]


def test_many_points_are_thinned_and_said_so(tmp_path, monkeypatch):
    from fastdpo.report import page as page_module

    monkeypatch.setattr(page_module, "MAX_POINTS", 4)
    found = section(page_of(write_run(tmp_path)), "lengths")
    assert "10 responses to 5 prompts, one in 3 drawn" in found
    dots = re.findall(r'class="dots c\d" d="([^"]*)"', found)
    assert [d.count("M") for d in dots] == [4, 4]


# What is seen


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_contrast_in_every_scheme():
    """WCAG 2.1, 1.4.3: at least 4.5 for text."""
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    assert len(blocks) == 3  # light, dark, print
    for block in blocks:
        found = dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6})", block))
        full = {
            k: "#" + "".join(c * 2 for c in v[1:]) if len(v) == 4 else v for k, v in found.items()
        }
        for back in ("paper", "well"):
            for name in ("ink", "soft", "start", "now"):
                a, b = sorted((luminance(full[name]), luminance(full[back])))
                assert (b + 0.05) / (a + 0.05) >= 4.5, (name, back, block)


def test_every_class_of_the_page_has_a_style(page):
    used = {c for _, a in Reader(page).elements for c in (a.get("class") or "").split()}
    styled = set(re.findall(r"\.([a-z][a-z0-9]*)", STYLE))
    assert used - styled <= {"answer", "first"}, used - styled


def test_a_password_in_a_url_is_not_shown(tmp_path):
    scorer = "https://me:secret@rewards.example/score?x=1"
    page = page_of(write_run(tmp_path, scorer=scorer, scorers=[scorer, scorer]))
    assert "secret" not in page and page.count("://•••@rewards.example/score") == 4


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:p@ss@h/score", "http://•••@h/score"),
        ('["https://u:a@b@h", "see x@y"]', '["https://•••@h", "see x@y"]'),
        ("https://h/score?api_key=sk-1&n=2", "https://h/score?api_key=•••&n=2"),
        ("https://h/?n=2;Access-Token=a.b#top", "https://h/?n=2;Access-Token=•••#top"),
        ("vllm serve {model} --api-key sk-123", "vllm serve {model} --api-key •••"),
        ("serve --api-key a b --port 1", "serve --api-key ••• --port 1"),
        ("serve --hf-token=ab 'x y'", "serve --hf-token=••• 'x y'"),
        ("serve --password 'a b' -v", "serve --password ••• -v"),
        ('["s", "--secret", "ab c", "-v"]', '["s", "--secret", "•••", "-v"]'),
        ('["s --key \\"a b\\" -v"]', '["s --key ••• -v"]'),
        ("VLLM_API_KEY=ab vllm serve", "VLLM_API_KEY=••• vllm serve"),
        ("-H 'Authorization: Bearer ab'", "-H 'Authorization: Bearer •••'"),
        (
            "s --max-tokens 5 --tokenizer x --keyed-by y",
            "s --max-tokens 5 --tokenizer x --keyed-by y",
        ),
        ("keys: a, b; 2 * token and the key x", "keys: a, b; 2 * token and the key x"),
    ],
)
def test_secrets_in_urls_and_commands_are_not_shown(text, shown):
    assert markup.masked(text) == shown


def test_secrets_are_not_shown_on_the_page_and_long_texts_take_no_time(tmp_path):
    page = page_of(write_run(
        tmp_path, scorer="https://h/score?api_key=sk-1", server_command="s {model} --api-key sk-2",
        model="https://u:p@ss@h", other="key" * 50_000 + "--" * 50_000,
    ))  # fmt: skip
    assert not re.search(r"sk-\d|ss@", page) and "api_key=•••" in page


def test_numbers_are_told_to_the_digits_of_their_interval():
    assert markup.digits_of([Estimate(0.5, 0.034), Estimate(0.6, 0.029)]) == 3
    assert markup.digits_of([Estimate(0.5, 0.034), Estimate(0.6, 0.12)]) == 2
    assert markup.digits_of([Estimate(58.3, 2.1)]) == 1
    assert markup.digits_of([Estimate(1234.5, 310.0)]) == 0
    assert markup.digits_of([Estimate(0.0)]) == 0 and markup.digits_of([Estimate(0.6931)]) == 4
    assert markup.fixed(-0.0001, 2) == "0.00" and markup.fixed(-1234.5, 1) == "−1,234.5"
    assert markup.fixed(0.5, 1, signed=True) == "+0.5" and markup.fixed(3e12, 2) == "3.000e+12"


# A real run


def test_the_report_of_a_real_run(tmp_path):
    from test_rounds import arguments
    from tiny import LLAMA, save_tiny

    from fastdpo.cli import main

    save_tiny(LLAMA, tmp_path / "model")
    rows = [{"prompt": f"tell me about number {i} <b>now</b>"} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(arguments(tmp_path, tmp_path / "run", rounds=1)) == 0
    page = page_of(tmp_path / "run")
    summary = json.loads((tmp_path / "run/round-01/summary.json").read_text())
    reader = Reader(page)
    for name in ("rounds", "plots", "lengths", "responses", "training", "pairs", "config"):
        assert "Left out" not in section(page, name)
    found = evaluation.heldout(tmp_path / "run/round-01/eval")
    mean = evaluation.over_prompts(found, evaluation.by_score)
    prompts = len(evaluation.by_prompt(found))
    score = Estimate(summary["score"], evaluation.half_width(summary["score_se"], prompts))
    digits = [markup.digits_of([score]) + i for i in (-1, 0, 1)]  # the start may have fewer
    told = [" ".join(text_of(f"<p>{markup.told(score, d)}</p>").split()) for d in digits]
    assert any(f"Round 1 {text}" in reader.all_text() for text in told)
    assert f"Pairs kept {summary['pairs']}" in reader.all_text()
    assert "tell me about number" in reader.all_text() and "&lt;b&gt;now&lt;/b&gt;" in page
    assert mean.value == pytest.approx(summary["score"])
    assert mean.half == pytest.approx(score.half)
