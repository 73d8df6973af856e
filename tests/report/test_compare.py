"""Runs from one start side by side: their table, their page and their picture."""

from xml.etree import ElementTree

import pytest
from report_runs import Reader, write_run

from fastdpo.errors import DataError
from fastdpo.report.compare import compare, text_table, write_page


@pytest.fixture
def found(tmp_path):
    """A run that makes responses 4, 6, 4, 6, 4 tokens longer, and one by half of that."""
    folders = {"plain": tmp_path / "a", "with <alpha>": tmp_path / "b"}
    for rounds, folder in zip((2, 1), folders.values()):
        write_run(folder, rounds=rounds)
    return compare(folders)


def test_the_growth_is_that_of_each_prompt(found):
    plain, penalized = found.growth("plain"), found.growth("with <alpha>")
    error = (1.2 / 5) ** 0.5  # of the mean of five with a variance of 1.2
    assert plain == (pytest.approx(4.8), pytest.approx(2.776445 * error))
    assert penalized == (pytest.approx(2.4), pytest.approx(plain.half / 2))
    rows = text_table(found).split("\n")
    assert [row.split("  ")[0] or row.strip().split("  ")[0] for row in rows[1:]] == [
        "start", "plain", "with <alpha>",
    ]  # fmt: skip
    assert "+4.8 ± 1.4" in rows[2] and "+2.4 ± 0.7" in rows[3]
    assert "–" in rows[1]  # the start grew by nothing, and is at no distance from itself


def test_page_and_picture(found, tmp_path):
    note = "score: how <plain>"
    write_page(
        found, tmp_path, title="Two runs", facts=[("alpha = ", "0.05")], status="Both grew.",
        intro=["Two were trained."], notes=[note],
    )  # fmt: skip
    page = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    text = page.all_text()
    for words in (
        "Two runs",
        "alpha = 0.05",
        note,
        "with <alpha>",
        "+4.8 ± 1.4",
        "Finished. Both grew.",
        "Two were trained.",
    ):
        assert words in text
    # The same prompt's answers of the start and of the last policy of each run.
    for answer in ("a fine answer 0.0.0", "a fine answer 2.0.0", "a fine answer 1.0.0"):
        assert answer in text
    assert "script" not in {name for name, _ in page.elements}
    picture = ElementTree.fromstring((tmp_path / "picture.svg").read_text(encoding="utf-8"))
    assert picture.tag.endswith("svg")
    words = " ".join("".join(picture.itertext()).split())
    assert "Length, tokens" in words and "with <alpha>" in words


def test_runs_of_other_prompts_are_refused(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", prompt="another question")
    with pytest.raises(DataError, match="b: its held-out prompts are not those of first"):
        compare({"first": tmp_path / "a", "second": tmp_path / "b"})


def test_a_run_without_an_evaluated_round_is_refused(tmp_path):
    write_run(tmp_path / "a", rounds=0)
    with pytest.raises(DataError, match="no round of it was evaluated"):
        compare({"a": tmp_path / "a"})
