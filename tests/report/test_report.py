"""The report page: what it shows, and what is seen of it."""

import base64
import hashlib
import json
import re
import shutil
import sys
from itertools import pairwise
from typing import Any

import pytest
from report_runs import (
    Reader,
    page_of,
    section,
    section_text,
    text_of,
    write_json,
    write_run,
)

from fastdpo.lazy import installed
from fastdpo.report import card, evaluation, runfiles
from fastdpo.report import summary as report
from fastdpo.report.evaluation import Estimate
from fastdpo.report.page import STYLE, TEMPLATES
from fastdpo.report.text import (
    digits_of,
    fixed,
    masked,
    told,
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return page_of(write_run(tmp_path_factory.mktemp("run")))


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


LOG_RATIO = "Log-ratio to the start"
NO_KL = "It is no KL divergence: responses were drawn at"


@pytest.mark.parametrize(("sample", "noted", "name", "words"), [
    # Taken at temperature 1, as rounds of before were.
    ({"temperature": 0.7}, {}, LOG_RATIO,
     f"{NO_KL} temperature 0.7, the probabilities are those at temperature 1."),
    ({"temperature": 0.7}, {1: 0.7, 2: 0.7}, "KL at temperature 0.7",
     "Both are taken at temperature 0.7, at which the responses were drawn."),
    # A run that went on after an update: its rounds are of two quantities.
    ({"temperature": 0.7}, {2: 0.7}, LOG_RATIO,
     f"{NO_KL} temperature 0.7, the probabilities are those at temperature 1 in round 1 and "
     "temperature 0.7 in round 2."),
    ({"temperature": 1.0}, {2: 1.0}, "KL from the start", "of the policy, in nats."),
    ({"top_p": 0.9}, {1: 1.0, 2: 1.0}, LOG_RATIO,
     f"{NO_KL} top_p 0.9, the probabilities are those at temperature 1."),
    ({"top_p": 0.9, "temperature": 0.7}, {1: 0.7, 2: 0.7}, LOG_RATIO,
     f"{NO_KL} temperature 0.7 and top_p 0.9, the probabilities are those at temperature 0.7."),
    # What is left of a run whose options are lost.
    ({}, {1: 0.7, 2: 0.7}, "KL at temperature 0.7", "at which the responses were drawn."),
])  # fmt: skip
def test_the_distance_has_the_name_of_what_was_measured(sample, noted, name, words, tmp_path):
    out = write_run(tmp_path, sample=sample)
    for index, temperature in noted.items():
        path = out / f"round-0{index}/summary.json"
        write_json(path, json.loads(path.read_text()) | {"kl_temperature": temperature})
    write_json(out / "round-02/policy/config.json", {})
    page = page_of(out)
    whole = Reader(page).all_text()
    (path,) = card.write_cards(out, {}, index=2)
    for text in (whole, " ".join(path.read_text(encoding="utf-8").split())):
        assert f"{name}: the mean of log(policy/start)" in text and words in text
        for other in {LOG_RATIO, "KL from the start", "KL at temperature"} - {name[:17], name}:
            assert other not in text
    assert whole.count(f"{name}, nats") == 2  # of a column and a chart
    assert f'aria-label="{name}, nats by round.' in page
    # A run without any has no word of it.
    for index in (1, 2):
        path = out / f"round-0{index}/summary.json"
        write_json(path, {k: x for k, x in json.loads(path.read_text()).items() if k[:2] != "kl"})
    assert "log(policy/start)" not in page_of(out)


@pytest.mark.parametrize(("prompts", "quantile"), [(5, 2.776445), (None, 1.959964), (-1, 1.959964)])
def test_errors_without_their_responses_take_the_configs_number_of_prompts(
    prompts, quantile, tmp_path
):
    write_run(tmp_path, evaluate={"heldout": prompts})
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
    rounds = section_text(page, "rounds")
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
    pairs = section_text(page_of(tmp_path), "pairs")
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
    pairs = section_text(page, "pairs")
    assert "Pairs kept 61 62" in pairs
    assert "Dropped in training: too long – 7" in pairs
    assert "Kept, but truncated in training – 3" in pairs
    assert "Offline pairs to replay Offline Pairs Kept 30 Dropped: over <max_length> 4" in pairs
    assert "116 in 2 rounds" in Reader(page).all_text()  # 61 and 62 - 7
    assert re.search(r"0\.6600 55 ", section_text(page, "rounds"))
    (tmp_path / "offline/summary.json").write_text("{")
    assert "offline/summary.json" in section(page_of(tmp_path), "pairs")


def test_offline_pairs_are_shown_before_any_round_was_paired(tmp_path):
    write_json(tmp_path / "state.json", {"config": {"rounds": 3}, "done": []})
    write_json(tmp_path / "offline/summary.json", {"pairs": 30, "dropped": {}})
    pairs = section(page_of(tmp_path), "pairs")
    assert "Kept 30" in text_of(f"<section{pairs}</section>") and "no round was paired" in pairs


def test_the_page_has_the_numbers_of_the_files(page):
    rounds = section_text(page, "rounds")
    assert "Start 0.23 ± 0.20 16.5 ± 5.9 – – 50.0% –" in rounds
    change = "0.71 ± 0.20 +0.480 ± 0.079 21.3 ± 5.9 +4.8 ± 1.4"
    assert f"Round 2 {change} 100.0% 5.0 ± 1.4 50.0% 0.2000 62.5% 0.6600 62" in rounds
    pairs = section_text(page, "pairs")
    assert "Pairs kept 61 62" in pairs
    assert "Dropped: identical responses 1 2" in pairs and "Dropped: tie 3 3" in pairs
    speed = section_text(page, "speed")
    assert "Round 1, rollouts generate 812 12.5" in speed and "Start, evaluation" in speed
    config = section_text(page, "config")
    assert "sample.max_new_tokens 40" in config and "train.beta 0.1" in config
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
    assert len(drawings) == 6 + 1 + 7
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
    page = page_of(write_run(tmp_path, score={"scorer": scorer, "others": [scorer, scorer]}))
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
    assert masked(text) == shown


def test_secrets_are_not_shown_on_the_page_and_long_texts_take_no_time(tmp_path):
    page = page_of(write_run(
        tmp_path, score={"scorer": "https://h/score?api_key=sk-1"},
        sample={"server_command": "s {model} --api-key sk-2"},
        model="https://u:p@ss@h", other="key" * 50_000 + "--" * 50_000,
    ))  # fmt: skip
    assert not re.search(r"sk-\d|ss@", page) and "api_key=•••" in page


def test_numbers_are_told_to_the_digits_of_their_interval():
    assert digits_of([Estimate(0.5, 0.034), Estimate(0.6, 0.029)]) == 3
    assert digits_of([Estimate(0.5, 0.034), Estimate(0.6, 0.12)]) == 2
    assert digits_of([Estimate(58.3, 2.1)]) == 1
    assert digits_of([Estimate(1234.5, 310.0)]) == 0
    assert digits_of([Estimate(0.0)]) == 0 and digits_of([Estimate(0.6931)]) == 4
    assert fixed(-0.0001, 2) == "0.00" and fixed(-1234.5, 1) == "−1,234.5"
    assert fixed(0.5, 1, signed=True) == "+0.5" and fixed(3e12, 2) == "3.000e+12"


def test_without_matplotlib_there_is_a_line_instead_of_the_plot(tmp_path, monkeypatch, capfd):
    rows = report.summarize(write_run(tmp_path))
    report.plot(rows, tmp_path / "rounds.png", title="a run")
    assert (tmp_path / "rounds.png").read_bytes()[:4] == b"\x89PNG" and not capfd.readouterr().err
    (tmp_path / "rounds.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    installed.cache_clear()
    for _ in range(2):
        report.plot(rows, tmp_path / "rounds.png", title="a run")
    told = capfd.readouterr().err
    assert told.count("matplotlib is not installed") == told.count("\n") == 1
    assert "rounds.png is not drawn" in told and "'plots'" in told
    assert not (tmp_path / "rounds.png").exists() and page_of(tmp_path)
    installed.cache_clear()


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
    digits = [digits_of([score]) + i for i in (-1, 0, 1)]  # the start may have fewer
    parts: Any = TEMPLATES.get_template("parts.html.jinja").module
    texts = [" ".join(text_of(f"<p>{parts.told(told(score, d))}</p>").split()) for d in digits]
    assert any(f"Round 1 {text}" in reader.all_text() for text in texts)
    assert f"Pairs kept {summary['pairs']}" in reader.all_text()
    assert "tell me about number" in reader.all_text() and "&lt;b&gt;now&lt;/b&gt;" in page
    assert mean.value == pytest.approx(summary["score"])
    assert mean.half == pytest.approx(score.half)
