"""Training from the command line, configuration files, and bad configuration."""

import json
import math

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import LLAMA, save_tiny

from fastdpo.cli import main, parse
from fastdpo.errors import ConfigError

ROW = {"prompt": "tell me", "chosen": " nice walks", "rejected": " no idea"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(LLAMA, tmp_path_factory.mktemp("model") / "llama")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_arguments(model, dataset, out):
    return [
        "train", f"--model={model}", f"--dataset={dataset}", f"--output_dir={out}",
        "--max_length=64", "--max_tokens=256", "--batch_size=3", "--bf16=false",
    ]  # fmt: skip


def test_train_on_a_file_and_again(model, tmp_path, capsys):
    rows = [
        ROW,
        {**ROW, "chosen": " no idea"},
        {
            "prompt": [{"role": "user", "content": "tell me"}],
            "chosen": [{"role": "assistant", "content": "be nice"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        },
    ]
    dataset = write(tmp_path / "pairs.jsonl", rows)
    argv = train_arguments(model, dataset, tmp_path / "out")
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "2 pairs" in out and ": identical responses" in out and "dropped 1 (" in out
    assert (tmp_path / "out/policy/model.safetensors").is_file()
    assert list((tmp_path / "out/metrics/tensorboard").glob("events*"))
    assert main(argv) == 0  # already done


def test_yaml_and_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "dataset": "d", "beta": 0.5, "alpha": 0.2}))
    command, config = parse(["train", f"--config={path}", "--alpha=0.3"])
    assert command == "train"
    assert (config.beta, config.alpha, config.model) == (0.5, 0.3, "m")


def test_defaults_are_the_documented_ones():
    _, config = parse(["train", "--model=m", "--dataset=d"])
    assert (config.beta, config.alpha) == (0.1, 0.01)


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--model=m"],
        ["train", "--model=m", "--dataset=d", "--lenght_penalty=1"],
        ["train", "--model=m", "--dataset=d", "--beta=much"],
        ["train", "--model=m", "--dataset=d", "--config=absent.yaml"],
        ["nonsense"],
    ],
)
def test_unknown_and_mistyped_options(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["beta: [", "- 1\n- 2", "beta: {a: 1}", "\x00", "nothing: 1"])
def test_unreadable_configs(text, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse(["train", "--model=m", "--dataset=d", f"--config={path}"])
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_malformed_row_is_named(model, tmp_path, capsys):
    dataset = write(tmp_path / "pairs.jsonl", [ROW, {"prompt": "x", "chosen": "y"}])
    assert main(train_arguments(model, dataset, tmp_path / "out")) == 2
    assert "pairs.jsonl:2" in capsys.readouterr().err
    assert not (tmp_path / "out" / "policy").exists()


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("device", "dtype", "attention", "kernels"))


# One bad value for each option, beside good ones for some others.
_SMALL = st.floats(max_value=0.0, allow_nan=False)
_INTS = st.integers(max_value=0)
_NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])
_WORDS = st.text("abcxyz ", min_size=1, max_size=6)
_OUTSIDE = st.floats(min_value=1.001) | st.floats(max_value=-0.001) | _NOT_FINITE
_BAD = st.one_of(
    st.tuples(st.sampled_from(["beta", "learning_rate", "max_grad_norm"]), _SMALL | _NOT_FINITE),
    st.tuples(st.sampled_from(["beta", "alpha", "weight_decay"]), _NOT_FINITE | _WORDS),
    st.tuples(st.just("weight_decay"), st.floats(max_value=-1e-9, allow_nan=False)),
    st.tuples(st.sampled_from(["batch_size", "num_train_epochs", "save_steps"]), _INTS),
    st.tuples(st.sampled_from(["batch_size", "max_length", "seed"]), _WORDS | st.just(1.5)),
    st.tuples(st.just("seed"), st.integers(max_value=-1)),
    st.tuples(st.just("warmup_ratio"), st.floats(min_value=1.001) | st.floats(max_value=-0.001)),
    st.tuples(st.just("max_length"), st.integers(max_value=1)),
    st.tuples(st.just("max_tokens"), st.integers(max_value=2)),
    st.tuples(st.just("workspace_mib"), _SMALL | _NOT_FINITE),
    st.tuples(st.sampled_from(["bf16", "gradient_checkpointing"]), _WORDS | st.just(3)),
    st.tuples(st.sampled_from(["rounds", "eval_samples", "batch_prompts"]), _INTS),
    st.tuples(st.just("num_samples"), st.integers(max_value=1)),
    st.tuples(st.sampled_from(["heldout", "min_gap"]), st.integers(max_value=-1)),
    st.tuples(st.just("temperature"), _SMALL | _NOT_FINITE),
    st.tuples(st.just("top_p"), _SMALL | st.floats(min_value=1.001)),
    st.tuples(st.just("sample_dtype"), _WORDS),
    st.tuples(st.just("max_new_tokens"), _INTS | st.integers(min_value=1024)),
    st.tuples(st.just("length_penalty"), _NOT_FINITE | _WORDS),
    st.tuples(st.sampled_from(["pairing", "combine", "transform", "consistency"]), _WORDS),
    st.tuples(st.sampled_from(["sampler", "scorer_dtype"]), _WORDS),
    st.tuples(st.sampled_from(["flip_share", "soft_label", "replay_share"]), _OUTSIDE),
    st.tuples(st.just("reference_decay"), _OUTSIDE),
    st.tuples(st.just("ches_keep"), _SMALL | _OUTSIDE),
    st.tuples(st.sampled_from(["extrapolation", "max_difficulty"]), _NOT_FINITE | _WORDS),
    st.tuples(st.sampled_from(["target_margin", "fresh_threshold"]), _NOT_FINITE | _WORDS),
    st.tuples(st.just("extrapolation"), st.floats(max_value=-1e-9)),
    st.tuples(st.sampled_from(["max_prompts", "max_pairs", "scorer_batch_size"]), _INTS),
    st.tuples(st.just("scorer_concurrency"), _INTS),
    st.tuples(st.sampled_from(["scorer_timeout", "server_timeout"]), _SMALL | _NOT_FINITE),
    st.tuples(st.sampled_from(["round_betas", "round_learning_rates"]), st.just("[0.1, 0]")),
    st.tuples(st.just("unknown_option"), st.floats()),
)


@given(bad=_BAD)
@settings(
    max_examples=500, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
def test_bad_configs_are_typed_errors(bad):
    name, value = bad
    try:
        parse(["iterate", "--model=m", "--prompts=p", f"--{name}={value}"])
    except (ConfigError, SystemExit) as error:
        if isinstance(error, ConfigError):
            assert name in str(error)
        else:
            assert error.code == 2
    else:
        raise AssertionError(f"{name}={value!r} was accepted")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [[], ["--layout=padded"], ["--use-peft=true", "--lora-r=4", "--learning_rate=1e-2"]],
    ids=["shared", "padded", "lora"],
)
def test_two_processes_train_like_one(model, tmp_path, options):
    import os
    import subprocess
    import sys

    from safetensors.torch import load_file
    from torch.testing import assert_close

    rows = [{**ROW, "chosen": " nice" * (i % 4 + 1), "rejected": f" no {i}"} for i in range(12)]
    dataset = write(tmp_path / "pairs.jsonl", rows)
    # The second run reads the references of the first.
    cache = f"--reference-cache={tmp_path / 'references'}"
    more = ["--batch_size=4", "--learning_rate=1e-3", "--warmup_ratio=0", cache, *options]
    assert main([*train_arguments(model, dataset, tmp_path / "one"), *more]) == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"]
    done = subprocess.run(
        [*launch, "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "-m",
         "fastdpo.cli", *train_arguments(model, dataset, tmp_path / "two"), *more],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "references").iterdir())) == 1
    one = load_file(tmp_path / "one/policy/model.safetensors")
    two = load_file(tmp_path / "two/policy/model.safetensors")
    start = load_file(model / "model.safetensors")
    for name, value in one.items():
        assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    moved = sum(float((one[name] - start[name]).norm()) for name in one)
    apart = sum(float((one[name] - two[name]).norm()) for name in one)
    assert moved > 0 and apart < 0.02 * moved
    logs = [
        [json.loads(line) for line in (tmp_path / run / "metrics/metrics.jsonl").open()]
        for run in ("one", "two")
    ]
    for a, b in zip(*logs):
        for name in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), name


def test_plan_says_what_fits(tmp_path, capsys):
    path = save_tiny(LLAMA, tmp_path / "llama")
    assert main(["plan", f"--model={path}", "--gpu-gib=24", "--max-length=64"]) == 0
    out = capsys.readouterr().out
    assert "prompt of 16 and responses of 48 tokens" in out and "peak" in out
    assert "Longest pair on 24 GiB" in out and "2 x   2048 (the model's limit)" in out
    assert main(["plan", f"--model={path}", "--gpu-gib", "0"]) == 2
    assert "gpu_gib=0" in capsys.readouterr().err
