"""Options of the outer loop: references, extrapolation, schedules, curricula, alpha=auto, several
scorers, offline pairs; its stages as commands; what happens to a folder that is used or damaged.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_rounds import TESTS, arguments, same, weights
from tiny import LLAMA, _family, save_tiny

from fastdpo.cli import main
from fastdpo.models import ModelError, combine, load_causal_lm, load_tokenizer
from fastdpo.storage import check_rows, checksum_path


def lengths(prompts, responses):
    """A scorer that likes long responses."""
    return [float(len(r)) for r in responses]


def vowels(prompts, responses):
    return [sum(c in "aeiou" for c in r) / (len(r) + 1) for r in responses]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(LLAMA, folder / "model")
    save_tiny(LLAMA, folder / "other", seed=1)
    rows = [{"prompt": f"tell me about number {i}"} for i in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {"prompt": f"say {i}", "chosen": " a nice answer" * (i % 3 + 1), "rejected": f" no {i}"}
        for i in range(8)
    ]
    (folder / "offline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


def run(inputs, out, **changes):
    argv = arguments(inputs, out, scorer="test_iterate:vowels", rounds=1, **changes)
    assert main(argv) == 0
    return out


def metrics(out, index=1):
    path = out / f"round-{index:02d}" / "metrics" / "metrics.jsonl"
    return [json.loads(line) for line in path.open()]


def summary(out, index=1):
    return json.loads((out / f"round-{index:02d}" / "pairs.summary.json").read_text())


# ------------------------------------------------------------------------------- the reference
def test_a_fixed_reference_is_another_model(inputs, tmp_path):
    """Its log-ratios are not zero at the start; those of the start itself are."""
    out = run(inputs, tmp_path / "fixed", reference=str(inputs / "other"), alpha=0)
    assert metrics(out)[0]["loss"] != pytest.approx(0.6931, abs=1e-4)
    same_model = run(inputs, tmp_path / "same", reference=str(inputs / "model"), alpha=0)
    own = run(inputs, tmp_path / "own", alpha=0)
    assert same(weights(same_model, 1), weights(own, 1))
    assert not same(weights(out, 1), weights(own, 1))
    # The same in every step as once before, but for a second model in memory.
    each = run(
        inputs, tmp_path / "each", reference=str(inputs / "other"), alpha=0,
        precompute_ref_log_probs="false",
    )  # fmt: skip
    found, wanted = ([row["loss"] for row in metrics(x)] for x in (each, out))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-5)


def test_an_average_of_the_policies_is_the_reference(inputs, tmp_path):
    options = dict(reference="average", reference_decay=0.75)
    argv = arguments(inputs, tmp_path, scorer="test_iterate:vowels", rounds=2, **options)
    assert main(argv) == 0
    found = load_file(tmp_path / "round-02" / "reference" / "model.safetensors")
    start = load_file(inputs / "model" / "model.safetensors")
    for name, value in weights(tmp_path, 1).items():
        wanted = 0.75 * start[name].float() + 0.25 * value
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-7)
    # The policy at the start of round 2 is not the reference any more.
    assert metrics(tmp_path, 2)[0]["rewards/chosen"] != 0
    assert not (tmp_path / "round-01" / "reference").exists()


def test_extrapolation_goes_on_in_the_direction_of_the_update(inputs, tmp_path):
    out = run(inputs, tmp_path / "more", extrapolation=0.5)
    start = load_file(inputs / "model" / "model.safetensors")
    found = load_file(out / "round-01" / "extrapolated" / "model.safetensors")
    moved = 0
    for name, value in weights(out, 1).items():
        wanted = 1.5 * value - 0.5 * start[name].float()
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)
        moved += float((value - start[name]).abs().sum())
    assert moved > 0
    plan = json.loads((out / "round-01" / "eval" / "candidates" / "plan.json").read_text())
    plain = run(inputs, tmp_path / "plain")
    other = json.loads((plain / "round-01" / "eval" / "candidates" / "plan.json").read_text())
    assert plan != other, "the policy that is evaluated is the next start"


def test_models_of_other_shapes_are_not_combined(inputs, tmp_path):
    save_tiny(_family("llama", "LlamaConfig", hidden_size=64), tmp_path / "wide")
    tokenizer = load_tokenizer(str(inputs / "model"))
    with pytest.raises(ModelError, match="of the shape that"):
        names = [str(inputs / "model"), str(tmp_path / "wide")]
        combine(names, [0.5, 0.5], tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_weights_count_once_when_combined(tmp_path):
    tied = _family("llama", "LlamaConfig", tie_word_embeddings=True)
    save_tiny(tied, tmp_path / "a")
    save_tiny(tied, tmp_path / "b", seed=1)
    names, tokenizer = [str(tmp_path / x) for x in "ab"], load_tokenizer(str(tmp_path / "a"))
    combine(names, [1.5, -0.5], tokenizer, tmp_path / "out")
    a, b, found = (load_causal_lm(str(tmp_path / x)) for x in ("a", "b", "out"))
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), found.parameters()):
        torch.testing.assert_close(z, 1.5 * x - 0.5 * y, msg=name)


# ------------------------------------------------------------------------------- training
def test_rates_and_betas_of_each_round(inputs, tmp_path):
    options = dict(round_learning_rates="[1e-3,1e-4]", round_betas="[0.1,0.3]")
    argv = arguments(inputs, tmp_path, scorer="test_iterate:vowels", rounds=3, **options)
    assert main(argv) == 0
    config = [json.loads((tmp_path / f"round-0{i}" / "run.json").read_text()) for i in (1, 2, 3)]
    assert [x["learning_rate"] for x in config] == [1e-3, 1e-4, 1e-4]
    assert [x["beta"] for x in config] == [0.1, 0.3, 0.3]
    assert metrics(tmp_path, 2)[0]["learning_rate"] == pytest.approx(1e-4)


def test_a_curriculum_trains_stage_after_stage(inputs, tmp_path):
    out = run(inputs, tmp_path, pairing="curriculum", num_samples=4, max_pairs=2)
    folder = out / "round-01"
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").open()]
    assert {pair["stage"] for pair in pairs} == {0, 1}
    runs = [json.loads((folder / f"stage-{i}" / "run.json").read_text()) for i in (1, 2)]
    assert runs[1]["model"] == str(folder / "stage-1" / "policy")
    for i in (1, 2):
        first = json.loads((folder / f"stage-{i}" / "metrics" / "metrics.jsonl").open().readline())
        assert first["rewards/chosen"] == 0, "each stage is its own reference"
    last = load_file(folder / "stage-2" / "policy" / "model.safetensors")
    assert same(last, weights(out, 1))
    train = json.loads((folder / "train.json").read_text())
    assert train["loss"] > 0


def test_alpha_is_found_on_the_way(inputs, tmp_path):
    options = dict(alpha="auto", heldout=2, learning_rate=1e-2, stop='["a","e"]')
    argv = arguments(inputs, tmp_path, scorer="test_iterate:lengths", rounds=2, **options)
    assert main(argv) == 0
    rows = metrics(tmp_path, 1) + metrics(tmp_path, 2)
    alphas = [row["alpha"] for row in rows]
    # A scorer of length makes every chosen response the longer one.
    assert all(a > 0 for a in alphas) and len(set(alphas)) > 2
    one, two = (json.loads((tmp_path / f"round-0{i}" / "control.json").read_text()) for i in (1, 2))
    assert one["target"] == two["target"] == one["length"] and two["round"] == 2
    candidates = [
        json.loads(line)
        for part in sorted((tmp_path / "round-02" / "candidates").glob("part-*.jsonl"))
        for line in part.open()
    ]
    mean = sum(len(row["response_ids"]) for row in candidates) / len(candidates)
    assert two["length"] == pytest.approx(mean)


def test_alpha_auto_goes_on_with_the_same_bits(inputs, tmp_path):
    options = dict(alpha="auto", scorer="test_iterate:lengths", rounds=1, stop='["a"]')
    assert main(arguments(inputs, tmp_path / "whole", **options)) == 0
    argv = arguments(inputs, tmp_path / "killed", **options)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    driver = [sys.executable, str(TESTS / "kill_driver.py"), "fastdpo.trainer:packed_loss", "6"]
    done = subprocess.run([*driver, *argv], env=environment, capture_output=True, text=True)
    assert done.returncode < 0, done.stderr
    assert main(argv) == 0
    assert same(weights(tmp_path / "whole", 1), weights(tmp_path / "killed", 1))
    control = [(tmp_path / x / "round-01/control.json").read_bytes() for x in ("whole", "killed")]
    assert control[0] == control[1]


# ------------------------------------------------------------------------------- scores and pairs
def test_several_scorers_are_combined(inputs, tmp_path):
    scorers = '["test_iterate:vowels","test_iterate:lengths"]'
    argv = arguments(
        inputs,
        tmp_path,
        scorer=scorers,
        rounds=1,
        scorer_weights="[1.0,-0.5]",
        transform="mean_std",
    )
    assert main(argv) == 0
    folder = tmp_path / "round-01"
    assert (folder / "scores-1").is_dir() and (folder / "scores-2").is_dir()
    assert summary(tmp_path)["pairs"] > 0 and "shaping" in summary(tmp_path)


def test_the_implicit_reward_and_its_consistency(inputs, tmp_path):
    options = dict(
        scorer="implicit", previous_model=str(inputs / "other"), consistency="prompt",
        eval_scorer="test_iterate:vowels", rounds=2,
    )  # fmt: skip
    assert main(arguments(inputs, tmp_path, **options)) == 0
    assert not (tmp_path / "round-01" / "scores-before").exists()
    assert (tmp_path / "round-02" / "scores-before").is_dir()
    pairs = [json.loads(line) for line in (tmp_path / "round-02" / "pairs.jsonl").open()]
    assert all(0 <= pair["smoothing"] <= 1 for pair in pairs)
    assert 0 <= summary(tmp_path, 2)["consistency"] <= 1


def test_offline_pairs_are_replayed(inputs, tmp_path):
    options = dict(replay=str(inputs / "offline.jsonl"), replay_share=0.5, fresh_threshold=-0.2)
    out = run(inputs, tmp_path, **options)
    pairs = [json.loads(line) for line in (out / "round-01" / "pairs.jsonl").open()]
    sources = [pair["source"] for pair in pairs]
    assert sources.count("offline") == summary(out)["replayed"] > 0
    assert (out / "offline" / "scores").is_dir()
    rows = [
        json.loads(line)
        for part in (out / "round-01" / "offline" / "candidates").glob("part-*.jsonl")
        for line in part.open()
    ]
    assert sorted(row["prompt"] for row in rows) == [f"say {i}" for i in range(8)]
    # Some fresh responses have more vowels than the chosen one; their pairs are gone.
    assert any(why.startswith("offline:") for why in summary(out)["dropped"])


def test_difficult_pairs_are_dropped(inputs, tmp_path):
    out = run(inputs, tmp_path, ches_keep=0.5)
    found = summary(out)
    assert found["dropped"]["CHES above the share kept"] > 0 and "mean_ches" in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": "implicit"}, "previous_model"),
        ({"scorer": "implicit", "previous_model": "x"}, "eval_scorer"),
        ({"consistency": "mean"}, "needs scorer=implicit"),
        ({"flip_share": 0.2}, "at least two scorers"),
        ({"replay_share": 0.5}, "needs replay"),
        ({"pairing": "worst"}, "rule must be one of"),
        ({"round_betas": "[0.1,-1]"}, "round_betas"),
        ({"extrapolation": -1}, "extrapolation"),
        ({"reference_decay": 2}, "reference_decay"),
        ({"alpha": "most"}, "alpha=most"),
        ({"scorer_api_key_env": "my key"}, "api_key_env"),
        ({"reference": "/nowhere/at-all"}, "at-all"),
        ({"transform": "cube"}, "transform"),
    ],
)
def test_impossible_options_end_before_there_is_a_folder(
    inputs, tmp_path, capsys, changes, message
):
    options = {"scorer": "test_iterate:vowels", **changes}
    assert main(arguments(inputs, tmp_path / "out", **options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- stages
def test_the_stages_as_commands_give_what_iterate_gives(inputs, tmp_path):
    whole = run(inputs, tmp_path / "whole", heldout=0)
    folder = whole / "round-01"
    model, out = inputs / "model", tmp_path / "alone"
    sampling = ["--num_samples=3", "--max_new_tokens=12", "--batch_prompts=3"]
    assert main(["sample", f"--model={model}", f"--prompts={inputs / 'prompts.jsonl'}", *sampling,
                 "--sample_dtype=float32", f"--output_dir={out / 'candidates'}"]) == 0  # fmt: skip
    assert main(["score", f"--candidates={out / 'candidates'}", "--scorer=test_iterate:vowels",
                 f"--output_dir={out / 'scores'}"]) == 0  # fmt: skip
    assert main(["pair", f"--candidates={out / 'candidates'}", f"--scores=[{out / 'scores'}]",
                 f"--output={out / 'pairs.jsonl'}"]) == 0  # fmt: skip
    for name in ("pairs.jsonl", "pairs.summary.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert main(["train", f"--model={model}", f"--dataset={out / 'pairs.jsonl'}",
                 f"--output_dir={out}", "--max_length=64", "--max_tokens=160", "--batch_size=3",
                 "--learning_rate=1e-3", "--warmup_ratio=0", "--bf16=false", "--save_steps=1",
                 "--gradient_checkpointing=false", "--reference_cache=null"]) == 0  # fmt: skip
    trained = load_file(out / "policy" / "model.safetensors")
    assert same(trained, weights(whole, 1))


def test_the_report_command(inputs, tmp_path, capsys):
    out = run(inputs, tmp_path / "run")
    (out / "report.html").unlink()
    assert main(["report", f"--output_dir={out}"]) == 0
    page = (out / "report.html").read_text()
    assert "tell me about number" in page and "http-equiv" in page
    assert main(["report", f"--output_dir={tmp_path / 'none'}"]) == 2
    assert "no run here" in capsys.readouterr().err


# ------------------------------------------------------------------------------- folders
def test_a_second_run_in_a_folder_is_refused(inputs, tmp_path):
    """The lock is the process's: it is gone with it, whatever ends it."""
    code = (
        "import sys, time; from pathlib import Path; from fastdpo.storage import locked\n"
        "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(600)"
    )
    out = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True, cwd=TESTS.parent
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        argv = arguments(inputs, out, scorer="test_iterate:vowels", rounds=1)
        done = subprocess.run(
            [sys.executable, "-m", "fastdpo.cli", *argv], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        )  # fmt: skip
        assert done.returncode == 2 and f"process {other.pid}" in done.stderr, done.stderr
        assert not (out / "state.json").exists()
    finally:
        other.kill()
        other.wait()
    assert main(argv) == 0


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_damaged_files_are_named_and_made_again(inputs, tmp_path, capsys):
    options = dict(scorer="test_iterate:vowels", rounds=1)
    out = run(inputs, tmp_path)
    before = {name: x.clone() for name, x in weights(out, 1).items()}  # files are mapped
    argv = arguments(inputs, out, **{**options, "rounds": 2})
    damage(out / "round-01" / "policy" / "model.safetensors")
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "model.safetensors differs" in error and "Delete" in error
    part = out / "round-01" / "scores" / "part-00000.jsonl"
    damage(part)
    with pytest.raises(Exception, match="SHA-256 differs"):
        check_rows(part)
    assert checksum_path(part).exists()
    state = json.loads((out / "state.json").read_text())
    state["done"] = state["done"][: state["done"].index("round-01/score")]
    (out / "state.json").write_text(json.dumps(state))
    import shutil

    part.unlink()
    shutil.rmtree(out / "round-01" / "policy")
    assert main(arguments(inputs, out, **options)) == 0
    assert same(weights(out, 1), before)


def test_a_truncated_line_is_named(inputs, tmp_path, capsys):
    out = run(inputs, tmp_path)
    part = out / "round-01" / "candidates" / "part-00001.jsonl"
    part.write_text(part.read_text()[:-40])
    checksum_path(part).unlink()  # as if it were of an older version
    state = json.loads((out / "state.json").read_text())
    state["done"] = state["done"][: state["done"].index("round-01/pair")]
    (out / "state.json").write_text(json.dumps(state))
    argv = arguments(inputs, out, scorer="test_iterate:vowels", rounds=1)
    assert main(argv) == 2
    assert "part-00001.jsonl:" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(inputs, tmp_path, capsys, monkeypatch):
    """A write that fails is one line; what was there stays, and the same command goes on."""
    from fastdpo import scoring, storage

    real, calls = storage.write_jsonl_atomic, []

    def full(path, rows):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(path))
        real(path, rows)

    argv = arguments(inputs, tmp_path, scorer="test_iterate:vowels", rounds=1, heldout=0)
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "write_jsonl_atomic", full)
        assert main(argv) == 2
    assert "No space left" in capsys.readouterr().err
    scores = tmp_path / "round-01" / "scores"
    assert [path.name for path in sorted(scores.glob("part-*"))] == ["part-00000.jsonl"]
    kept = (scores / "part-00000.jsonl").stat().st_mtime_ns
    assert main(argv) == 0
    assert (scores / "part-00000.jsonl").stat().st_mtime_ns == kept
