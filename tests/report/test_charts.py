"""The charts of the report page."""

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import (
    drawing,
    page_of,
    section,
    section_text,
    write_run,
)

from fastdpo.errors import DataError
from fastdpo.report import charts, runfiles, tables
from fastdpo.report.evaluation import Estimate
from fastdpo.report.page import CHART_STYLE, TEMPLATES

draw: Any = TEMPLATES.get_template("charts.svg.jinja").module


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return page_of(write_run(tmp_path_factory.mktemp("run")))


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
    chart = charts.by_round("Score", {"": marks}, [0, 1, 2], line=2.0)
    root = drawing(draw.by_round(chart))
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
    root = drawing(
        draw.by_step(charts.by_step("Loss", [(1, bins), (2, charts.binned([(8, 1.0)], 3))]))
    )
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
    clouds = [
        charts.Cloud("start", points, Estimate(4.5, 1.0), Estimate(10.0, 2.0)),
        charts.Cloud("round 2", points[:4], Estimate(1.5), Estimate(4.0)),
    ]
    assert clouds[0].fit == [(0.0, 1.0), (9.0, pytest.approx(19.0))]
    assert clouds[0]._replace(points=[(3.0, 1.0), (3.0, 2.0)]).fit == []
    root = drawing(draw.scatter(charts.scatter(clouds, limit=11.0)))
    dots = [p.attrib for p in root.findall("path") if p.attrib["class"].startswith("dots")]
    assert [d["class"] for d in dots] == ["dots c0", "dots c1"]
    assert [d["d"].count("M") for d in dots] == [10, 4]
    assert "max_new_tokens = 11" in [t.text for t in root.findall("text")]
    for limit in (100.0, None):
        assert "max_new_tokens" not in draw.scatter(charts.scatter(clouds, limit=limit))
    assert "start: 10 responses, mean length 4.5 tokens, mean score 10" in root.attrib["aria-label"]


def test_many_points_are_thinned_and_said_so(tmp_path, monkeypatch):
    from fastdpo.report import page as page_module

    monkeypatch.setattr(page_module, "MAX_POINTS", 4)
    page = page_of(write_run(tmp_path))
    found = section(page, "lengths")
    assert "10 responses to 5 prompts, one in 3 drawn" in section_text(page, "lengths")
    dots = re.findall(r'class="dots c\d" d="([^"]*)"', found)
    assert [d.count("M") for d in dots] == [4, 4]


def test_two_runs_share_a_chart():
    runs = {
        "plain": [charts.Mark(0, 1.0, 0.5), charts.Mark(1, 3.0, 0.25)],
        "with alpha": [charts.Mark(0, 1.0, 0.5), charts.Mark(1, 2.0)],
    }
    chart = charts.by_round("Length", runs, [0, 1], line=None)
    root = drawing(draw.by_round(chart))
    assert [p.attrib["class"] for p in root.findall("path")][-2:] == ["line", "line s1"]
    dots = [(d.attrib["class"], float(d.attrib["cx"])) for d in root.findall(".//circle")]
    assert [kind for kind, _ in dots] == ["dot", "dot", "dot s1", "dot s1"]
    assert dots[2][1] - dots[0][1] == pytest.approx(6, abs=0.2)  # side by side
    assert [(t.text or "").strip() for t in root.findall(".//tspan")] == ["● plain", "○ with alpha"]
    assert "plain: start: 1 ± 0.5; round 1: 3 ± 0.25. with alpha: start" in chart.spoken


def test_each_of_several_runs_has_a_colour_of_its_own(tmp_path):
    run = runfiles.read_run(write_run(tmp_path, rounds=1))
    runs = {name: (run, tables.rows_of(run)) for name in "abcd"}
    wanted = [*reversed(tables.HELD), tables.COLUMNS[4]]
    figures = tables.by_round_charts(runs, wanted)
    assert [title for title, _, _ in figures] == [
        "KL from the start, nats", "Win rate, %", "Length, tokens", "Score", "Cut off, %",
    ]  # fmt: skip
    assert {where for _, where, _ in figures} == {"held-out"}
    root = drawing(draw.by_round(figures[-1][2]))
    lines = [p.attrib["class"] for p in root.findall("path") if "line" in p.attrib["class"]]
    assert lines == ["line", "line s1", "line s2", "line s3"]
    spans = [t.attrib["class"] for t in root.findall(".//tspan")]
    assert spans == ["s0", "s1", "s2", "s3"] and len(spans) == charts.LINES
    colours = [re.findall(rf"svg tspan\.{x} {{ fill: (\S+); }}", CHART_STYLE) for x in spans]
    strokes = [re.findall(rf"svg \.line\.{x}, .*{{ stroke: (\S+); }}", CHART_STYLE) for x in spans]
    assert all(len(x) == 1 for x in colours) and len({*map(tuple, colours)}) == 4
    assert strokes[1:] == colours[1:]
    with pytest.raises(DataError, match="5 runs are too many for one chart"):
        tables.by_round_charts(runs | {"e": runs["a"]})


def test_evaluations_lie_over_the_curve_of_training():
    bins = charts.binned([(i, 1.0) for i in range(1, 9)], 1)
    chart = charts.by_step("Loss", [(None, bins)], {"evaluation": [(0, 3.0), (8, 2.0)]})
    root = drawing(draw.by_step(chart))
    over = next(p.attrib["d"] for p in root.findall("path") if p.attrib["class"] == "line s1")
    ends = [tuple(map(float, point.split(" "))) for point in over[1:].split("L")]
    assert ends[0][0] == 44 and ends[0][1] < ends[1][1]  # at step 0, and higher than the last
    assert "Evaluation: 3 at first, 2 at last." in chart.spoken
    assert not [t for t in root.findall("text") if t.text and "round" in t.text]
