"""The README's quick starts run as they stand, and its generated tables are current."""

import re
from pathlib import Path

import pytest

from fastdpo.loss import reference

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks():
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_loss_in_a_pytorch_loop(capsys):
    names: dict = {}
    exec(blocks()[0], names)
    assert capsys.readouterr().out.strip()
    h, w = (names[name].detach().double().requires_grad_() for name in "hw")
    gold = reference.linear_dpo_loss(
        h, w, names["target"], names["bounds"], names["ref_logp"].double(),
        rows_N=names["rows"], beta=0.1, alpha=0.01,
    )  # fmt: skip
    gold.backward()
    assert names["result"].loss.item() == pytest.approx(gold.item(), rel=1e-5)
    for name, x in zip("hw", (h, w)):
        assert (names[name].grad - x.grad).norm() < 1e-5 * x.grad.norm()


def test_the_recipe_is_a_run(tmp_path):
    """The YAML of the README is read as it stands."""
    from fastdpo.cli import parse

    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "run.yaml").write_text(text)
    command, config = parse(
        ["iterate", "--config", str(tmp_path / "run.yaml"), "--train.alpha=0.02"]
    )
    assert command == "iterate" and config.train.alpha == 0.02 and config.evaluate.heldout == 32


def test_the_readme_is_short():
    assert len(README.encode()) <= 9000


def test_the_two_commands_are_one_line_each():
    lines = [line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv")]
    assert len(lines) == 2
    assert lines[0].endswith("fastdpo demo") and lines[1].endswith("-m pytest -n auto")


def test_the_benchmark_table_is_generated_from_the_committed_results(capsys):
    from bench import report

    results = sorted((ROOT / "bench" / "results").glob("*.jsonl"))
    if not results:
        pytest.fail("no committed benchmark results")
    names = [str(path) for path in results]
    texts = ["--out", str(ROOT / "bench/RESULTS.md"), "--readme", str(ROOT / "README.md")]
    assert report.main([*names, *texts, "--check"]) == 0
