"""The outer loop from the command line: real stages on a tiny model, killed and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import LLAMA, save_tiny

from fastdpo.cli import main, parse
from fastdpo.rounds.inputs import check_inputs
from fastdpo.rounds.processes import Processes
from fastdpo.storage import check_directory, read_json
from fastdpo.train.launch import launched

TESTS = Path(__file__).parents[1]
DRIVER = TESTS / "kill_driver.py"


# One thread, as in this process: another number of threads gives other bits.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        map(str, [TESTS.parent, TESTS, TESTS / "rounds", TESTS / "score"])
    ),
    "OMP_NUM_THREADS": "1",
}


def vowels(prompts, responses):
    """A scorer: share of vowels, so not a function of length."""
    return [sum(c in "aeiou" for c in r) / (len(r) + 1) for r in responses]


def short(prompts, responses):
    return [-float(len(r)) for r in responses]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(LLAMA, folder / "model")
    rows = [{"prompt": f"tell me about number {i}"} for i in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(inputs, out, **changes):
    """A command line; ``train__alpha`` is ``--train.alpha``."""
    options = dict(
        model=inputs / "model", prompts=inputs / "prompts.jsonl",
        score__scorer="test_rounds:vowels",
        output_dir=out, rounds=2, evaluate__heldout=3, sample__num_samples=3,
        sample__max_new_tokens=12, train__max_length=64,
        train__max_tokens=160, sample__batch_prompts=3, train__batch_size=3, train__save_steps=1,
        train__learning_rate=1e-3,
        train__warmup_ratio=0.0, train__bf16="false", sample__dtype="float32",
        train__gradient_checkpointing="false",
        train__reference_cache="null",
    )  # fmt: skip
    options |= changes
    names = {name: name.replace("__", ".") for name in options}
    return ["iterate", *(f"--{names[name]}={value}" for name, value in options.items())]


def weights(out, index=2):
    return load_file(out / f"round-{index:02d}" / "policy" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(arguments(inputs, out)) == 0
    return out


def test_a_run_leaves_what_it_promises(finished):
    state = json.loads((finished / "state.json").read_text())
    assert state["done"][-1] == "round-02/report" and len(state["done"]) == 2 * 8 + 3
    assert (finished / "rounds.png").read_bytes()[:4] == b"\x89PNG"
    page = (finished / "report.html").read_text()
    assert re.search(r"Finished: 2 of 2 rounds, 20\d\d-\d\d-\d\d \d\d:\d\d UTC\.", page)
    assert [*state["ended"]] == state["done"] and state["begun"] is None
    for index in (1, 2):
        folder = finished / f"round-{index:02d}"
        check_directory(folder / "policy")
        card = (folder / "policy" / "README.md").read_text()
        assert f"the policy of round {index}" in card and "3 of them were held out" in card
        results = card.split("## Results")[1]
        assert results.count("| Round ") == index and "| Start |" in results
        pairs = [json.loads(line) for line in (folder / "pairs.jsonl").open()]
        assert pairs and all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs)
        names = {path.name for path in folder.iterdir()}
        assert {"metrics", "policy", "ref_logps", "candidates", "scores"} <= names
        assert not {"checkpoint", ".checkpoint.partial"} & names
        rows = [json.loads(line) for line in (folder / "metrics" / "metrics.jsonl").open()]
        assert len(rows) == -(-len(pairs) // 3)
        row = json.loads((folder / "summary.json").read_text())
        assert row["pairs"] == len(pairs)
        assert row["length"] > 0 and row["score_se"] > 0
    first = json.loads((finished / "round-01" / "metrics" / "metrics.jsonl").open().readline())
    lengths = first["lengths/chosen"] - first["lengths/rejected"]
    assert first["length_margin"] == pytest.approx(0.01 * lengths, abs=1e-6)
    assert not torch.equal(
        weights(finished, 1)["lm_head.weight"], weights(finished, 2)["lm_head.weight"]
    )


def test_the_reference_is_the_start_of_the_round(finished):
    """At alpha 0 it would be log 2; with a length term the margin is exactly that term."""
    for index in (1, 2):
        path = finished / f"round-{index:02d}" / "metrics" / "metrics.jsonl"
        first = json.loads(path.open().readline())
        assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0


def test_a_finished_run_goes_on_with_more_rounds(finished, inputs, tmp_path, capsys, monkeypatch):
    import shutil

    from fastdpo.rounds import work as outer

    out = tmp_path / "more"
    shutil.copytree(finished, out)
    before, cards = weights(out), [out / f"round-0{i}/policy/README.md" for i in (1, 2)]
    texts = [path.read_bytes() for path in cards]
    with monkeypatch.context() as patch:
        patch.setattr(outer, "train", lambda *args, **options: (_ for _ in ()).throw(OSError("no")))
        assert main(arguments(inputs, out, rounds=3)) == 2
    page = (out / "report.html").read_text()
    assert "Unfinished: 2 of 3 rounds. It is at train of round 3, begun 20" in page
    assert main(arguments(inputs, out, rounds=3)) == 0
    said = capsys.readouterr().out
    chat = f"fastdpo chat --model {out / 'round-03/policy'} --beside {inputs / 'model'}"
    assert "to go on" in said and said.endswith(f"to talk to it: {chat}\n")
    page = (out / "report.html").read_text()
    assert "Finished: 3 of 3 rounds, 20" in page
    # A kill may come between the last stage and its page.
    (out / "report.html").write_text("Unfinished")
    assert main(arguments(inputs, out, rounds=3)) == 0
    assert (out / "report.html").read_text() == page
    assert (out / "round-03" / "policy").is_dir()
    assert [path.read_bytes() for path in cards] == texts
    assert all(torch.equal(before[name], x) for name, x in weights(out).items())


def test_other_options_in_the_same_folder_are_refused(finished, inputs, capsys):
    assert main(arguments(inputs, finished, train__alpha=0.5)) == 2
    assert "alpha=0.01, not 0.5" in capsys.readouterr().err


def test_other_prompts_in_the_same_file_are_refused(finished, inputs, tmp_path, capsys):
    import shutil

    folder = tmp_path / "inputs"
    shutil.copytree(inputs, folder)
    argv = arguments(inputs, tmp_path / "out", rounds=1, prompts=folder / "prompts.jsonl")
    assert main(argv) == 0
    with (folder / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "one more"}) + "\n")
    assert main(argv) == 2
    assert "content of prompts" in capsys.readouterr().err


def test_an_unsupported_model_is_refused_before_sampling(inputs, tmp_path, capsys):
    from tiny import MAMBA

    save_tiny(MAMBA, tmp_path / "mamba")
    model = tmp_path / "mamba"
    assert main(arguments(inputs, tmp_path / "out", model=model, train__layout="shared")) == 2
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_broken_state_and_output_file(inputs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(arguments(inputs, tmp_path / "file")) == 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text("[]")
    assert main(arguments(inputs, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "is a file" in error and "not the state of a run" in error


def test_prompts_and_gap_options(inputs, tmp_path):
    options = dict(
        rounds=1, max_prompts=4, evaluate__num_samples=1, pair__min_gap=0.02, sample__top_p=0.9
    )
    assert main(arguments(inputs, tmp_path / "out", **options)) == 0
    folder = tmp_path / "out" / "round-01"
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").open()]
    assert 1 <= len(pairs) <= 4
    assert all(pair["score_chosen"] - pair["score_rejected"] > 0.02 for pair in pairs)
    parts = sorted((folder / "eval" / "candidates").glob("part-*.jsonl"))
    assert sum(len(part.read_text().splitlines()) for part in parts) == 3


@pytest.mark.slow
def test_the_demo_on_a_given_model(inputs, tmp_path, capsys):
    argv = ["demo", f"--model={inputs / 'model'}", f"--output_dir={tmp_path / 'demo'}"]
    assert main(argv) == 0
    shown = capsys.readouterr()
    out, lines = shown.out, shown.out.strip().split("\n")
    assert out.startswith("The scorer of this demo likes long answers")
    bars = shown.err.replace("\r", "\n").strip().split("\n")
    assert all("left" in bar for bar in bars) and "100%" in bars[-1]  # one, and nothing beside it
    begins = ["What happened: plain DPO", "Where to look: ", "What next: "]
    assert [line.startswith(words) for line, words in zip(lines[-3:], begins)] == [True] * 3
    plain, penalized = (tmp_path / "demo" / name for name in ("plain", "alpha"))
    for name in ("round-00/eval", "round-01/candidates", "round-01/scores"):
        parts = [sorted((run / name).rglob("part-*.jsonl")) for run in (plain, penalized)]
        assert parts[0] and [x.read_bytes() for x in parts[0]] == [x.read_bytes() for x in parts[1]]
    alphas = [
        read_json(run / "state.json")["config"]["train"]["alpha"] for run in (plain, penalized)
    ]
    assert alphas == [0, "auto"]
    assert (tmp_path / "demo" / "report.html").is_file()
    # The same command again has the same to say, and those that it names are commands.
    assert main(argv) == 0
    assert capsys.readouterr().out == out
    for line in lines[-2:]:
        parse(line.rpartition(": fastdpo ")[2].split())


def test_a_reward_model_scores_a_round(inputs, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig.from_pretrained(inputs / "model", num_labels=1, pad_token_id=0)
    torch.manual_seed(3)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        source = inputs / "model" / name
        if source.exists():
            (tmp_path / "reward" / name).write_bytes(source.read_bytes())
    options = arguments(inputs, tmp_path / "out", score__scorer=tmp_path / "reward", rounds=1)
    assert main(options) == 0
    scores = [
        json.loads(line)["score"]
        for part in sorted((tmp_path / "out/round-01/scores").glob("part-*.jsonl"))
        for line in part.open()
    ]
    assert len(scores) == 7 * 3 and len(set(scores)) > 10


def test_a_default_that_leaves_few_prompts_is_told_of(inputs, tmp_path, capsys):
    for heldout, told in ((6, "evaluate.heldout=6 leaves 4 prompts to train on"), (5, "")):
        config = parse(arguments(inputs, tmp_path / "out", evaluate__heldout=heldout))[1]
        check_inputs(config, Processes(launched(config.train)))
        assert told in (said := capsys.readouterr().out) and bool(told) == ("heldout" in said)


def test_ties_are_counted_and_told(inputs, tmp_path, capsys, monkeypatch):
    """A scorer that likes nothing better leaves no pair, and says so."""
    import test_rounds

    monkeypatch.setattr(test_rounds, "vowels", lambda prompts, responses: [1.0] * len(responses))
    assert main(arguments(inputs, tmp_path / "out")) == 2
    assert "tie" in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on(inputs, tmp_path, capsys, monkeypatch):
    from fastdpo.rounds import run as rounds

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "pair", interrupt)
    assert main(arguments(inputs, tmp_path / "out")) == 130
    assert "same command" in capsys.readouterr().err
    assert len(list((tmp_path / "out/round-01/scores").glob("part-*.jsonl"))) == 3


# Each place is one call of one stage; the n-th call of it kills the process.
KILLS = [
    ("fastdpo.sample.stage:write_jsonl_atomic", 1),  # round 0, evaluation
    ("fastdpo.sample.stage:write_jsonl_atomic", 2),  # round 1, second part of the samples
    ("fastdpo.score.stage:write_jsonl_atomic", 3),
    ("fastdpo.pair.stage:write_jsonl_atomic", 1),
    ("fastdpo.train.steps:packed_loss", 2),  # the reference
    ("fastdpo.train.steps:packed_loss", 6),  # training
    ("safetensors.torch:save_file", 1),  # inside a checkpoint
    ("fastdpo.train.engine:save_policy", 1),
    ("fastdpo.rounds.resume:write_json_atomic", 2),  # between two stages
    ("fastdpo.report.summary:plot", 1),
    ("os:replace", 4),  # a temporary file is whole, and not renamed yet
    ("pathlib:Path.rename", 1),  # a folder, likewise
]


def drive(place, countdown, argv):
    environment = ENVIRONMENT
    command = [sys.executable, str(DRIVER), place, str(countdown), *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_killed_at_every_stage_it_ends_in_the_same_weights(finished, inputs, tmp_path):
    argv = arguments(inputs, tmp_path / "killed")
    for place, countdown in KILLS:
        done = drive(place, countdown, argv)
        assert done.returncode == -signal.SIGKILL, (place, done.stderr)
    done = drive("none", 0, argv)
    assert done.returncode == 0, done.stderr
    for index in (1, 2):
        assert same(weights(tmp_path / "killed", index), weights(finished, index))
        pairs = f"round-{index:02d}/pairs.jsonl"
        assert (tmp_path / "killed" / pairs).read_bytes() == (finished / pairs).read_bytes()


EVERYTHING = {
    "plain": (2, {}),
    "all stages": (1, dict(
        reference="average", extrapolation=0.3, pair__rule="curriculum", pair__max_pairs=2,
        score__scorer="[test_rounds:vowels,test_rounds:short]",
        evaluate__scorer="test_rounds:vowels",
        pair__replay="{offline}", pair__replay_share=0.3, pair__fresh_threshold=-1.0,
    )),
    "alpha auto, LoRA, consistency": (1, dict(
        train__alpha="auto", train__use_peft="true", train__lora_r=4, train__learning_rate=1e-2,
        pair__consistency="mean",
        score__scorer="implicit", score__previous_model="{other}",
        evaluate__scorer="test_rounds:vowels",
    )),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [*((name, 1) for name in EVERYTHING), ("plain", 2)])
def test_killed_at_random_moments_it_ends_in_the_same_weights(inputs, tmp_path, name, count):
    """A kill or two in every stage; nothing that was sampled or scored is so again."""
    kills, changes = EVERYTHING[name]
    save_tiny(LLAMA, tmp_path / "other", seed=1)
    rows = [{"prompt": f"say {i}", "chosen": " a nice one", "rejected": " no"} for i in range(8)]
    (tmp_path / "offline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"offline": tmp_path / "offline.jsonl", "other": tmp_path / "other"}
    changes = {k: v.format(**paths) if isinstance(v, str) else v for k, v in changes.items()}
    options = [x for x in arguments(inputs, "", **changes) if not x.startswith("--output_dir")]
    driver = str(TESTS / "random_kills.py")
    command = [sys.executable, driver, "0", str(kills), str(count), str(tmp_path)]
    environment = ENVIRONMENT
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    log = (tmp_path / "whole.log/0.err").read_text()[-2000:]
    assert done.returncode == 0, done.stderr + log
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found["places"], indent=1))
    assert found["codes"] == [0, 0] and not found["again"], log
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    stages = json.loads((whole / "state.json").read_text())["done"]
    assert json.loads((killed / "state.json").read_text())["done"] == stages
    # The moment may come after a stage's end: then the kill falls into a later one, or none.
    assert len(found["places"]) >= 0.7 * kills * len(stages) and kills * len(stages) >= 19
    assert len(set(found["places"])) >= 0.6 * len(stages)
    for index in (1, 2):
        for kind in ("policy", "extrapolated", "reference"):
            folders = [run / f"round-{index:02d}" / kind for run in (whole, killed)]
            assert folders[0].exists() == folders[1].exists() or kind == "policy"
            if folders[0].exists():
                a, b = (load_file(folder / "model.safetensors") for folder in folders)
                assert same(a, b), (index, kind)
        pairs = f"round-{index:02d}/pairs.jsonl"
        assert (killed / pairs).read_bytes() == (whole / pairs).read_bytes()


def test_killed_in_training_it_ends_in_the_same_weights(finished, inputs, tmp_path):
    argv = arguments(inputs, tmp_path / "killed")
    done = drive("fastdpo.train.steps:packed_loss", 7, argv)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "killed" / "round-01" / "policy").exists()
    page = tmp_path / "killed" / "report.html"
    assert "Unfinished: 0 of 2 rounds. It is at train of round 1, begun 20" in page.read_text()
    assert "is not there" not in page.read_text()
    assert main(argv) == 0
    assert "Finished: 2 of 2 rounds, " in page.read_text()
    assert same(weights(tmp_path / "killed"), weights(finished))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/nowhere/at-all"}, "at-all"),
        ({"prompts": "missing.jsonl"}, "missing.jsonl"),
        ({"score__scorer": "test_rounds:absent"}, "absent"),
        ({"score__scorer": "no_such_module:f"}, "no_such_module"),
        ({"evaluate__heldout": 10}, "heldout=10 must be < the 10 prompts"),
        ({"evaluate__heldout": 32}, "Set it to 2, or to 0, which evaluates nothing"),
        ({"sample__num_samples": 1}, "num_samples=1"),
        ({"sample__temperature": 0}, "> 0 with sample.num_samples="),
        ({"train__beta": -1}, "beta=-1"),
        ({"train__max_tokens": 2}, "max_tokens=2"),
        ({"sample__max_new_tokens": 64}, "max_new_tokens=64"),
        ({"sample__max_new_tokens": 60}, "prompts.jsonl:1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_options_are_one_error_before_any_work(inputs, tmp_path, capsys, changes, message):
    assert main(arguments(inputs, tmp_path / "out", **changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error
    assert not (tmp_path / "out" / "round-00").exists()


def test_a_run_of_before_sections_says_so(inputs, tmp_path, capsys):
    """One line, with the new place of every option."""
    out = tmp_path / "old"
    out.mkdir()
    config = {"model": "m", "rounds": 2, "sampler": "auto", "num_samples": 4, "alpha": 0.01}
    (out / "state.json").write_text(json.dumps({"config": config, "done": ["round-00/report"]}))
    assert main(arguments(inputs, out)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds a run of before options had sections" in error
    assert "sample: backend (was sampler), num_samples; train: alpha" in error
