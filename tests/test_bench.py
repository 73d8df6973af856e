"""The benchmark measures what it says, refuses wrong variants, reports only what was measured."""

import json
import subprocess
import sys

import pytest
import torch

from bench import __main__ as cli
from bench import measure, peak, report, targets, variants

SHAPE = variants.Shape(N=64, D=32, V=200, pairs=2)
FIELDS = {
    *("op", "variant", "kind", "pass", "N", "D", "V", "pairs", "dtype", "rounds", "note", "route"),
    *("time_ms", "x_floor", "peak_mib", "workspace_mib", "accumulators_mib"),
    *("loss_rel_err", "logp_max_err", "logp_sum_max_err", "dh_rel_err", "dw_rel_err"),
    *("device", "threads", "versions", "git", "dirty", "utc"),
}
NAIVE = variants.VARIANTS["naive"]


def rows_of(*chosen, dtype="fp32", passes=variants.PASSES, **kwargs):
    return list(
        measure.run(SHAPE, dtype, chosen, passes=passes, rounds=2, **{"memory": False, **kwargs})
    )


def test_rows_have_all_fields():
    rows = rows_of(variants.FASTDPO, NAIVE, variants.FLOOR)
    assert len(rows) == 9
    for row in rows:
        assert set(row) == FIELDS
        assert row["note"] is None
        assert row["time_ms"]["min"] <= row["time_ms"]["median"]
        assert row["x_floor"] > 0
        json.dumps(row)
    train = {row["variant"]: row for row in rows if row["pass"] == variants.TRAIN}
    ours = train["fastdpo"]
    assert ours["route"] and ours["workspace_mib"] is not None
    assert ours["accumulators_mib"] is not None
    assert max(ours[f"{name}_err"] for name in ("logp_max", "dh_rel", "dw_rel")) < 1e-5
    assert train["bare matmuls"]["x_floor"] == 1


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "name", [name for name, v in variants.VARIANTS.items() if v.loss and not v.compiled]
)
def test_every_variant_solves_the_same_problem(name, dtype):
    if name.startswith("trl"):
        pytest.importorskip("trl")
    if name.startswith("liger"):
        pytest.importorskip("liger_kernel")
    variant = variants.VARIANTS[name]
    for row in rows_of(variant, dtype=dtype):
        if (row["note"] or "").startswith("NotImplementedError"):
            pytest.skip(row["note"])
        assert row["note"] is None
        assert row["time_ms"]["median"] > 0


def test_a_wrong_variant_gets_no_time():
    def off(h, w, target):
        return 1.5 * variants.naive_logp(h, w, target)

    def broken(h, w, target):
        return float("nan") * variants.naive_logp(h, w, target)

    def missing(h, w, target):
        raise ImportError("no such peer\nand more")

    def wrong_gradient(h, w, target):
        value = variants.naive_logp(h, w, target)
        return 2 * value - value.detach()

    functions = (off, broken, missing, wrong_gradient)
    wrong = [variants.over_tokens(f.__name__, f) for f in functions]
    rows = rows_of(*wrong, NAIVE, passes=[variants.TRAIN])
    notes = {row["variant"]: row["note"] for row in rows}
    assert notes["off"].startswith("wrong: loss_rel_err")
    assert notes["broken"].startswith("wrong: loss_rel_err nan")
    assert notes["missing"] == "ImportError: no such peer"
    assert notes["wrong_gradient"].startswith("wrong: dh_rel_err")
    assert [row["variant"] for row in rows if row["time_ms"]] == ["naive"]


def test_gold_is_the_gradient_of_the_loss():
    problem = variants.make_problem(SHAPE, torch.float64)
    _, found = measure.errors(
        NAIVE, problem, variants.TRAIN, measure.fp64_gold(problem, variants.TRAIN)
    )
    # The naive route rounds its log-softmax to fp32; the gradients inherit that.
    assert found["dh_rel_err"] < 1e-6 and found["dw_rel_err"] < 1e-6


def test_padded_layout_round_trips():
    x = torch.arange(24).view(12, 2)
    padded = variants.to_padded(x, pairs=2)
    assert padded.shape == (4, 3, 2)
    assert torch.equal(padded[1], x[6:9])  # the second pair's chosen side
    assert torch.equal(padded[2], x[3:6])  # the first pair's rejected side
    assert torch.equal(variants.from_padded(padded, pairs=2), x)


def test_peak_memory_sees_the_logits():
    shape = variants.Shape(N=512, D=8, V=20000, pairs=2)
    logits_mib = shape.N * shape.V * 4 / 2**20
    peaks = peak.peaks_mib(NAIVE, shape, torch.float32, (variants.TRAIN,), threads=1)
    assert 1.5 * logits_mib < peaks[variants.TRAIN] < 6 * logits_mib


def test_targets_say_pass_and_miss():
    def row(variant, kind, ms):
        time = {"median": ms}
        return {"variant": variant, "kind": kind, "dtype": "bf16", "pass": variants.TRAIN} | {
            "time_ms": time
        }

    rows = [row("fastdpo", "fastdpo", 20.0), row(variants.TRL.name, "peer", 100.0)]
    rows += [row("liger", "peer", 10.0), row("bare matmuls", "floor", 10.0)]
    verdicts = [line.split()[:3] for line in targets.target_lines(rows)]
    assert verdicts == [
        ["pass", "bf16", "5.00x"],
        ["miss", "bf16", "2.00x"],
        ["pass", "bf16", "2.00x"],
    ]


def test_command_line_writes_rows(tmp_path, capsys):
    out = tmp_path / "results" / "here.jsonl"
    arguments = ["--shape", "64,32,200", "--pairs", "2", "--dtype", "fp32", "--rounds", "1"]
    cli.main([*arguments, "--variants", "naive,bare matmuls", "--no-memory", "--out", str(out)])
    rows = report.load([out])
    assert [row["variant"] for row in rows] == ["naive", "bare matmuls"] * 3
    assert len(capsys.readouterr().out.splitlines()) == 6
    with pytest.raises(ValueError, match="pairs of equal length"):
        variants.make_problem(variants.Shape(10, 4, 8, pairs=2), torch.float32)


def test_report_is_deterministic_and_checks(tmp_path):
    def missing(h, w, target):
        raise ImportError("no such | peer")

    rows = rows_of(NAIVE, variants.over_tokens("missing", missing), variants.FLOOR)
    results, readme = tmp_path / "results" / "here.jsonl", tmp_path / "README.md"
    results.parent.mkdir()
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = [str(results), "--readme", str(readme)]

    assert report.main([*arguments, "--check"]) == 1
    assert "old" in readme.read_text()
    assert report.main(arguments) == 0
    text, picture = readme.read_text(), results.with_suffix(".svg").read_bytes()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "no such \\| peer" in text and "results/here.svg" in text
    assert report.main([*arguments, "--check"]) == 0
    assert report.main(arguments) == 0
    assert readme.read_text() == text and results.with_suffix(".svg").read_bytes() == picture

    readme.write_text(text.replace("naive", "faster"))
    assert report.main([*arguments, "--check"]) == 1
    with pytest.raises(ValueError, match="once each"):
        report.insert("no markers", "block")


def test_bench_imports_no_peer():
    code = "import sys, bench.__main__; print({'trl', 'liger_kernel'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=peak.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
