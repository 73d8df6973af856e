"""Training from the command line, configuration files, and bad configuration."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import LLAMA, save_tiny

from fastdpo.cli import COMMANDS, main, parse
from fastdpo.cli.commands import save_options
from fastdpo.cli.names import _of_trl, table
from fastdpo.cli.options import options_of
from fastdpo.errors import ConfigError, DataError
from fastdpo.model.load import demo_model
from fastdpo.rounds.config import IterateConfig
from fastdpo.rounds.old_names import old_names
from fastdpo.storage import CACHE, cache_path

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


def test_the_best_policy_of_an_evaluated_run(model, tmp_path, capsys):
    rows = [{**ROW, "chosen": " nice" * (i % 4 + 1), "rejected": f" no {i}"} for i in range(6)]
    dataset = write(tmp_path / "pairs.jsonl", rows)
    held = write(tmp_path / "held.jsonl", [{**ROW, "chosen": f" be nice {i}"} for i in range(2)])
    argv = train_arguments(model, dataset, tmp_path / "out")
    assert main([*argv, f"--eval_dataset={dataset}"]) == 2
    assert "all 6 pairs are trained on too" in capsys.readouterr().err
    argv += [f"--eval_dataset={held}", "--load_best_model_at_end=true"]
    assert main([*argv, "--eval_split=test"]) == 2
    assert "but eval_split='test' is given. Leave eval_split out" in capsys.readouterr().err
    for epochs in (2, 2, 3):  # the second time it is done already
        assert main([*argv, f"--num_train_epochs={epochs}"]) == 0
        out = capsys.readouterr().out
        assert "eval_dataset: 2 pairs" in out and "\neval_loss 0." in out
        said = re.search(r"policy: .*/policy, after step (\d) of (\d), the best eval_loss: 0", out)
        assert said and int(said[1]) % 2 == 0 and said[2] == str(2 * epochs)
    assert "goes on to num_train_epochs=3, after 2 before" in out
    assert main([*argv, "--num_train_epochs=1"]) == 2
    assert "num_train_epochs=1 is fewer than the 3" in capsys.readouterr().err


def test_yaml_and_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "dataset": "d", "beta": 0.5, "alpha": 0.2}))
    command, config = parse(["train", f"--config={path}", "--alpha=0.3"])
    assert command == "train"
    assert (config.beta, config.alpha, config.model) == (0.5, 0.3, "m")


def test_the_options_left_in_a_run_are_whole(tmp_path, monkeypatch):
    def cut(path, text):
        path.write_bytes(text[:3].encode())
        raise OSError("no space left")

    save_options({"beta": 0.1}, tmp_path)
    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(DataError, match="no space"):
        save_options({"beta": 0.2}, tmp_path)
    (file,) = tmp_path.iterdir()
    assert yaml.safe_load(file.read_text()) == {"beta": 0.1}


def test_defaults_are_the_documented_ones():
    _, config = parse(["train", "--model=m", "--dataset=d"])
    assert (config.beta, config.alpha) == (0.1, 0.01)


def refusal(capsys, *argv: str) -> str:
    """The one line of an error, of a command that ended with exit status 2."""
    assert main(argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


TRAIN = ("train", "--model=m", "--dataset=d")
ITERATE = ("iterate", "--model=m", "--prompts=p")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--model=m"], "--dataset must be given"),
        (["iterate"], "--model and --prompts must be given"),
        ([*TRAIN, "--max_lenght=1"], "did you mean --max_length?"),
        ([*TRAIN, "--entirely"], "--entirely is no option of fastdpo train"),
        ([*TRAIN, "--beta=much"], "beta=much must be a number"),
        ([*TRAIN, "--batch_size=1.5"], "batch_size=1.5 must be a whole number"),
        ([*TRAIN, "--bf16=3"], "bf16=3 must be true or false"),
        ([*TRAIN, "--target_length=x"], "target_length=x must be a number or null"),
        ([*TRAIN, "--lora_target_modules=x"], "must be a list of texts, as [a, b] or null"),
        ([*TRAIN, "--alpha"], "--alpha needs a value, a number or text"),
        ([*TRAIN, "now"], "'now' belongs to no option"),
        ([*TRAIN, "--config=absent.yaml"], "absent.yaml can't be read"),
        ([*ITERATE, "--train.bet=1"], "did you mean --train.beta?"),
        ([*ITERATE, "--train.seed=1"], "did you mean --seed?"),
        ([*ITERATE, "--train.beta=-1"], "train.beta=-1.0 must be"),
        ([*ITERATE, "--evaluate.num_samples=0"], "evaluate.num_samples=0 must be"),
        (
            [*ITERATE, "--sample.temperature=0"],
            "error: sample.temperature=0.0 must be > 0 with sample.num_samples=4, which would",
        ),
        ([*ITERATE, "--train.target_length=9"], "> 0, and needs train.alpha=auto"),
        (["trian"], "did you mean train?"),
        (["nonsense"], "there are demo, iterate,"),
    ],
)  # fmt: skip
def test_unknown_and_mistyped_options(argv, message, capsys):
    assert message in refusal(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*TRAIN, "--per_device_train_batch_size=2"], "is --batch_size, pairs"),
        ([*ITERATE, "--per_device_train_batch_size=2"], "is --train.batch_size, pairs"),
        ([*TRAIN, "--gradient_accumulation_steps", "2"], "is --batch_size, pairs"),
        ([*TRAIN, "--report_to", "none"], "no option: a run writes every step"),
        ([*TRAIN, "--logging_steps=1"], "no option: a run writes every step"),
        ([*TRAIN, "--lr_scheduler_type=cosine"], "no option: a cosine after --warmup_ratio"),
        (["train", "--model_name_or_path=m"], "is --model, a folder or hub name"),
        (["train", "--dataset_name=m"], "is --dataset"),
        (["iterate", "--dataset_name=m"], "is --prompts"),
        (["iterate", "--reward_model_path=m"], "is --score.scorer"),
        (["sample", "--num_generations=8"], "is --num_samples, responses"),
    ],
)  # fmt: skip
def test_names_of_trl(argv, message, capsys):
    assert message in refusal(capsys, *argv)


def test_every_text_for_a_name_of_trl_holds_in_some_command():
    for row in table()["trl"]:
        found = [_of_trl(row["names"].split()[0], options_of(x)) for x, _ in COMMANDS.values()]
        assert any(found), row["names"]
        own = {name for x, _ in COMMANDS.values() for name in options_of(x)}
        assert not own & set(row["names"].split())


def test_old_names_say_the_new_ones(tmp_path, capsys):
    said = refusal(capsys, *ITERATE, "--num_samples=8", "--sampler=vllm", "--alpha=0.1")
    for pair in (
        "--num_samples is --sample.num_samples", "--sampler is --sample.backend",
        "--alpha is --train.alpha",
    ):  # fmt: skip
        assert pair in said
    assert "--sample_dtype is --dtype" in refusal(capsys, "sample", "--sample_dtype=float32")
    assert "--scorer_timeout is --timeout" in refusal(capsys, "score", "--scorer_timeout=3")
    assert "--pairing is --rule" in refusal(capsys, "pair", "--pairing=best_worst")
    path = tmp_path / "old.yaml"
    path.write_text("model: m\nprompts: p\neval_samples: 3\nbeta: 0.2\npairing: best_worst\n")
    said = refusal(capsys, "iterate", f"--config={path}")
    assert f"{path}:3: " in said
    assert "evaluate: num_samples (was eval_samples); train: beta; pair: rule (was pairing)" in said
    old = old_names(IterateConfig)
    assert set(old.values()) <= set(options_of(IterateConfig)) and not set(old) & set(
        options_of(IterateConfig)
    )


def test_a_switch_needs_no_value():
    _, config = parse([*TRAIN, "--use_peft", "--lora-r", "4"])
    assert config.use_peft is True and config.lora_r == 4
    assert parse([*TRAIN, "--lora-r=4", "--use-peft"])[1].use_peft is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: [", "1: this is no YAML"),
        ("- 1\n- 2", "1: a file of options must be lines of"),
        ("alpha: 0\nbeta: {a: 1}", "2: beta={'a': '1'} must be a number"),
        ("\x00", "this is no YAML"),
        ("beta: 1\nnothing: 1", "2: nothing is no option of fastdpo train"),
        ("\nbatch_size: many", "2: batch_size=many must be a whole number"),
        ("bf16: 3", "1: bf16=3 must be true or false"),
        ("beta: {[1]: 2}", "1: this is no YAML: found unhashable key"),
    ],
)
def test_unreadable_configs(text, message, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    said = refusal(capsys, *TRAIN, f"--config={path}")
    assert str(path) in said and message in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  beta: 1\n  alhpa: 1", "3: train.alhpa is no option of fastdpo iterate"),
        ("trian: {beta: 1}", "1: trian is no option of fastdpo iterate; did you mean train?"),
        ("train: 3", "1: train must be lines of"),
        ("train:\n  beta: x", "2: train.beta=x must be a number"),
        ("train: {beta: -1}", "train.beta=-1.0 must be > 0"),
    ],
)
def test_unreadable_sections(text, message, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert message in refusal(capsys, *ITERATE, f"--config={path}")


def test_sections_of_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\nprompts: p\nseed: 3\nscore: {scorer: [a:b, c:d]}\n"
        "train:\n  beta: 5e-1\n  alpha: auto\n  reference_cache: null\n"
        "sample: {stop: ['1', no], num_samples: 8}\npair:\n"
    )
    _, config = parse(["iterate", f"--config={path}", "--train.beta=0.2", "--pair.min_gap=1"])
    assert (config.train.beta, config.train.alpha, config.pair.min_gap) == (0.2, "auto", 1.0)
    assert config.train.reference_cache is None and config.score.scorers == ["a:b", "c:d"]
    assert config.sample.stop == ["1", "no"]
    assert {config.sample.seed, config.pair.seed, config.train.seed} == {3}
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(config.to_dict()))
    assert parse(["iterate", f"--config={saved}"])[1] == config


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option_once_and_ten_first(command, capsys):
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    options = options_of(COMMANDS[command][0])
    shown = re.findall(r"^  --(\S+) ", said, re.MULTILINE)
    assert sorted(shown) == sorted(options)
    first = table()["first"].get(command, "").split()
    assert shown[: len(first)] == first and len(first) in (0, 10)
    assert all(option.meaning for option in options.values())
    assert max(map(len, said.splitlines())) <= 100


def test_help_names_the_commands(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {command}" in said for command in COMMANDS)
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("fastdpo ")
    assert main([]) == 2


def test_a_malformed_row_is_named(model, tmp_path, capsys):
    dataset = write(tmp_path / "pairs.jsonl", [ROW, {"prompt": "x", "chosen": "y"}])
    assert main(train_arguments(model, dataset, tmp_path / "out")) == 2
    assert "pairs.jsonl:2" in capsys.readouterr().err
    assert not (tmp_path / "out" / "policy").exists()


def test_doctor(capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/kept/here")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("device", "dtype", "attention", "kernels"))
    assert "cache  /kept/here/fastdpo\n" in out


def test_the_package_is_the_command(tmp_path):
    argv = [sys.executable, "-m", "fastdpo", "--version"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fastdpo ")


def test_what_is_kept_for_other_runs_lies_where_xdg_says(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    dataset = write(tmp_path / "pairs.jsonl", [ROW])
    assert main(train_arguments(model, dataset, tmp_path / "one")) == 0
    assert list((tmp_path / "xdg/fastdpo/ref_logps").glob("*.safetensors"))
    folder = tmp_path / "xdg/fastdpo/SmolLM2-135M-Instruct"
    save_tiny(LLAMA, folder)
    assert demo_model() == str(folder)
    assert not (tmp_path / "home").exists()
    for unset in ("", "relative"):  # which the specification says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_path(f"{CACHE}/x") == tmp_path / "home/.cache/fastdpo/x"
    assert cache_path("/a/.cache/x") == Path("/a/.cache/x")


# One bad value for each option, beside good ones for some others.
_SMALL = st.floats(max_value=0.0, allow_nan=False)
_INTS = st.integers(max_value=0)
_NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])
_WORDS = st.text("abcxyz ", min_size=1, max_size=6)
_OUTSIDE = st.floats(min_value=1.001) | st.floats(max_value=-0.001) | _NOT_FINITE
_BAD = st.one_of(
    st.tuples(
        st.sampled_from(["train.beta", "train.learning_rate", "train.max_grad_norm"]),
        _SMALL | _NOT_FINITE,
    ),
    st.tuples(
        st.sampled_from(["train.beta", "train.alpha", "train.weight_decay"]), _NOT_FINITE | _WORDS
    ),
    st.tuples(st.just("train.weight_decay"), st.floats(max_value=-1e-9, allow_nan=False)),
    st.tuples(
        st.sampled_from(["train.batch_size", "train.num_train_epochs", "train.save_steps"]), _INTS
    ),
    st.tuples(
        st.sampled_from(["train.batch_size", "train.max_length", "seed"]), _WORDS | st.just(1.5)
    ),
    st.tuples(st.just("seed"), st.integers(max_value=-1)),
    st.tuples(
        st.just("train.warmup_ratio"), st.floats(min_value=1.001) | st.floats(max_value=-0.001)
    ),
    st.tuples(st.just("train.max_length"), st.integers(max_value=1)),
    st.tuples(st.just("train.max_tokens"), st.integers(max_value=2)),
    st.tuples(st.just("train.workspace_mib"), _SMALL | _NOT_FINITE),
    st.tuples(st.sampled_from(["train.bf16", "train.gradient_checkpointing"]), _WORDS | st.just(3)),
    st.tuples(st.sampled_from(["rounds", "evaluate.num_samples", "sample.batch_prompts"]), _INTS),
    st.tuples(st.just("sample.num_samples"), st.integers(max_value=1)),
    st.tuples(st.sampled_from(["evaluate.heldout", "pair.min_gap"]), st.integers(max_value=-1)),
    st.tuples(st.just("sample.temperature"), _SMALL | _NOT_FINITE),
    st.tuples(st.just("sample.top_p"), _SMALL | st.floats(min_value=1.001)),
    st.tuples(st.just("sample.dtype"), _WORDS),
    st.tuples(st.just("sample.max_new_tokens"), _INTS | st.integers(min_value=1024)),
    st.tuples(st.just("pair.length_penalty"), _NOT_FINITE | _WORDS),
    st.tuples(
        st.sampled_from(["pair.rule", "pair.combine", "pair.transform", "pair.consistency"]), _WORDS
    ),
    st.tuples(st.sampled_from(["sample.backend", "score.dtype"]), _WORDS),
    st.tuples(
        st.sampled_from(["pair.flip_share", "pair.soft_label", "pair.replay_share"]), _OUTSIDE
    ),
    st.tuples(st.just("reference_decay"), _OUTSIDE),
    st.tuples(st.just("pair.ches_keep"), _SMALL | _OUTSIDE),
    st.tuples(st.sampled_from(["extrapolation", "pair.max_difficulty"]), _NOT_FINITE | _WORDS),
    st.tuples(
        st.sampled_from(["pair.target_margin", "pair.fresh_threshold"]), _NOT_FINITE | _WORDS
    ),
    st.tuples(st.just("extrapolation"), st.floats(max_value=-1e-9)),
    st.tuples(st.sampled_from(["max_prompts", "pair.max_pairs", "score.batch_size"]), _INTS),
    st.tuples(st.just("score.concurrency"), _INTS),
    st.tuples(st.sampled_from(["score.timeout", "sample.server_timeout"]), _SMALL | _NOT_FINITE),
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
    with pytest.raises(ConfigError) as error:
        parse([*ITERATE, f"--{name}={value}"])
    assert name.rpartition(".")[2] in str(error.value) and "\n" not in str(error.value)


def in_two_processes(argv):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"]
    done = subprocess.run(
        [*launch, "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "-m",
         "fastdpo.cli", *argv],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [[], ["--layout=padded"], ["--use-peft=true", "--lora-r=4", "--learning_rate=1e-2"]],
    ids=["shared", "padded", "lora"],
)
def test_two_processes_train_like_one(model, tmp_path, options):
    few = 2 if "--layout=padded" in options else 0
    from safetensors.torch import load_file
    from torch.testing import assert_close

    rows = [{**ROW, "chosen": " nice" * (i % 4 + 1), "rejected": f" no {i}"} for i in range(12)]
    dataset = write(tmp_path / "pairs.jsonl", rows)
    # The second run reads the references of the first.
    cache = f"--reference-cache={tmp_path / 'references'}"
    # Of three pairs to evaluate on each process has a part; of one, one has none.
    held = write(tmp_path / "held.jsonl", [{**ROW, "chosen": " a" * i} for i in range(1, 4)][few:])
    more = ["--batch_size=4", "--learning_rate=1e-3", "--warmup_ratio=0", cache, *options]
    more += [f"--eval_dataset={held}", "--eval_steps=2"]
    assert main([*train_arguments(model, dataset, tmp_path / "one"), *more]) == 0
    in_two_processes([*train_arguments(model, dataset, tmp_path / "two"), *more])
    assert len(list((tmp_path / "references").iterdir())) == 2  # of training and of evaluation
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
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
    assert [row["eval_pairs"] for row in logs[1] if "eval_loss" in row] == [3 - few] * 3
    for a, b in zip(*logs):
        of = "eval_" if "eval_loss" in a else ""
        for name in ("loss", "rewards/margins", "logps/chosen", "lengths/chosen"):
            assert b[of + name] == pytest.approx(a[of + name], rel=1e-3, abs=1e-4), name
        assert of or b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_two_processes_keep_the_best_and_take_more_epochs(model, tmp_path, capsys):
    """And leave the page and the card of one, which says each thing once."""
    from safetensors.torch import load_file
    from torch.testing import assert_close

    rows = [{**ROW, "chosen": " nice" * (i % 4 + 1), "rejected": f" no {i}"} for i in range(8)]
    dataset = write(tmp_path / "pairs.jsonl", rows)
    held = write(tmp_path / "held.jsonl", [{**ROW, "chosen": " a" * i} for i in range(1, 4)])
    more = ["--batch_size=4", "--learning_rate=1e-3", "--reference_cache=null"]
    more += [f"--eval_dataset={held}", "--eval_steps=1", "--load_best_model_at_end"]
    more += ["--metric_for_best_model=rewards/chosen"]
    found = {}
    for name, train in (("one", main), ("two", in_two_processes)):
        argv = [*train_arguments(model, dataset, tmp_path / name), *more]
        for epochs in (1, 2):
            said = train([*argv, f"--num_train_epochs={epochs}"])
            told = str(said) if name == "two" else capsys.readouterr().out
            assert told.count("prompts that are strings") == 2  # of either dataset
            assert told.count("\n8 pairs, 0 truncated") == told.count("eval_dataset: 3 pairs") == 1
        out = tmp_path / name
        found[name] = {
            file: json.loads((out / file).read_text()) for file in ("best.json", "train.json")
        } | {
            "weights": load_file(out / "policy" / "model.safetensors"),
            "page": re.findall(r"Finished: \d+ optimizer steps", (out / "report.html").read_text()),
            "card": re.findall(r"^\| *([^|]+) \|", (out / "policy/README.md").read_text(), re.M),
            "files": sorted(x.relative_to(out).as_posix() for x in out.rglob("*")
                            if x.is_file() and "events" not in x.name and ".lock" not in x.name),
        }  # fmt: skip
    one, two = found["one"], found["two"]
    for name, value in one.pop("weights").items():
        assert_close(two["weights"][name], value, rtol=1e-4, atol=1e-5)
    assert one["best.json"]["global_step"] == 4 > one["best.json"]["best_global_step"]
    for file in ("best.json", "train.json"):
        wanted = {name: x for name, x in one.pop(file).items() if isinstance(x, int)}
        assert wanted == {name: two[file][name] for name in wanted}
    assert one["page"] == ["Finished: 4 optimizer steps"] and "After step" in one["card"]
    assert [one[x] for x in ("page", "card", "files")] == [
        two[x] for x in ("page", "card", "files")
    ]


def test_plan_says_what_fits(tmp_path, capsys):
    path = save_tiny(LLAMA, tmp_path / "llama")
    assert main(["plan", f"--model={path}", "--gpu-gib=24", "--max-length=64"]) == 0
    out = capsys.readouterr().out
    assert "prompt of 16 and responses of 48 tokens" in out and "peak" in out
    assert "Longest pair on 24 GiB" in out and "2 x   2048 (the model's limit)" in out
    assert main(["plan", f"--model={path}", "--gpu-gib", "0"]) == 2
    assert "gpu_gib=0" in capsys.readouterr().err


def test_the_tables_of_options_are_up_to_date():
    script = Path(__file__).parents[1] / ".ci" / "options.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(script.parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, f"run python .ci/options.py: {done.stdout}{done.stderr}"
