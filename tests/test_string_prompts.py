"""A prompt that is a string: the same tokens in sampling, in a run and in training, as one option
says."""

import json
from pathlib import Path

import pytest
from tiny import LLAMA, save_tiny

from fastdpo.cli import main, stages
from fastdpo.data.clock import rendering_at
from fastdpo.data.records import STRING_PROMPTS
from fastdpo.model.load import load_tokenizer
from fastdpo.pair.config import PairConfig
from fastdpo.rounds.config import EvaluateConfig, IterateConfig
from fastdpo.rounds.folder import Run
from fastdpo.rounds.processes import Processes
from fastdpo.rounds.replay import read_offline
from fastdpo.sample.config import SampleConfig
from fastdpo.storage import read_parts, write_jsonl_atomic
from fastdpo.train.config import TrainConfig
from fastdpo.train.launch import launched

ROWS = [
    {"prompt": "tell me:\n", "chosen": "nice walks", "rejected": "no idea"},
    {"prompt": "walks?\n", "chosen": "the beach", "rejected": "no", "append_eos": False},
    {"prompt": "<|im_start|>user\nbe nice<|im_end|>\n", "chosen": "be nice", "rejected": "no"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny(LLAMA, tmp_path_factory.mktemp("model") / "llama"))


@pytest.fixture
def rows(tmp_path) -> str:
    write_jsonl_atomic(tmp_path / "rows.jsonl", ROWS)
    return str(tmp_path / "rows.jsonl")


def trained_on(argv, monkeypatch):
    """The pairs that `fastdpo train` would train on."""
    found = []
    monkeypatch.setattr(
        stages, "train", lambda model, tok, pairs, *a, **k: found.extend(pairs) or {}
    )
    monkeypatch.setattr(stages.TrainingPage, "finish", lambda *_: None)  # of no training
    assert main(argv) == 0
    return found


@pytest.mark.parametrize("how", STRING_PROMPTS)
def test_all_commands_give_a_string_the_same_tokens(
    how, model, rows, tmp_path, monkeypatch, capsys
):
    tokenizer = load_tokenizer(model)
    sampled = tmp_path / "candidates"
    argv = ["sample", f"--model={model}", f"--prompts={rows}", f"--output_dir={sampled}",
            "--num_samples=1", "--max_new_tokens=2", "--dtype=float32"]  # fmt: skip
    assert main([*argv, f"--string_prompts={how}"]) == 0
    assert "responses were cut off at max_new_tokens=2; a larger" in capsys.readouterr().out
    prompts = [row["prompt_ids"] for row in read_parts(sampled)]
    # A string that was rendered before is text both ways.
    for row, ids in zip(ROWS, prompts):
        chat = how == "chat" and not row["prompt"].startswith("<|im_start|>")
        text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(ids) == (text if chat else row["prompt"])

    config = IterateConfig(
        model=model, prompts=rows, output_dir=str(tmp_path / "run"), string_prompts=how,
        sample=SampleConfig(max_new_tokens=2, dtype="float32"), train=TrainConfig(max_length=64),
        evaluate=EvaluateConfig(heldout=0), pair=PairConfig(replay=rows, replay_share=0.5),
    )  # fmt: skip
    with rendering_at(None) as clock:
        run = Run(config, False, clock, Processes(launched(config.train)))
        run.sample("sample", model, run.prompts, config.sample, run.out / "candidates", 1)
        read_offline(run)
    of_run = read_parts(run.out / "candidates")
    assert [row["prompt_ids"] for row in of_run if row["sample_index"] == 0] == prompts
    offline = read_parts(run.out / "offline" / "candidates")
    assert [row["prompt_ids"] for row in offline[::2]] == prompts

    argv = ["train", f"--model={model}", f"--dataset={rows}", f"--output_dir={tmp_path / 'out'}"]
    pairs = trained_on([*argv, f"--string_prompts={how}"], monkeypatch)
    assert [pair.prompt_ids for pair in pairs] == prompts
    sides = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    assert sides == [row["response_ids"] for row in offline]
    # Whole responses end once, in what the template or TRL puts there, the others do not.
    end = "<|im_end|>\n" if how == "chat" else "<|im_end|>"
    said = [tokenizer.decode(pair.chosen_ids) for pair in pairs]
    assert said == [f"nice walks{end}", "the beach", "be nice<|im_end|>"]


def test_training_says_once_how_strings_are_taken(model, rows, tmp_path, monkeypatch, capsys):
    def said(*more):
        monkeypatch.setattr(stages, "train", lambda *a, **k: {})
        monkeypatch.setattr(stages.TrainingPage, "finish", lambda *_: None)
        argv = ["train", f"--model={model}", f"--dataset={rows}", f"--output_dir={tmp_path / 'o'}"]
        code = main([*argv, *more])
        return code, capsys.readouterr()

    code, text = said()
    assert code == 0 and text.out.count("prompts that are strings, first at") == 1
    assert "rows.jsonl:1, are taken as text" in text.out and "string_prompts=chat takes" in text.out
    code, text = said("--string_prompts=chat")
    assert code == 0 and "taken as messages of the user" in text.out
    assert said("--string_prompts=no")[1].err == (
        "error: string_prompts=no must be one of chat, text\n"
    )
    write_jsonl_atomic(Path(rows), ROWS[2:])  # rendered before: there is one way only
    code, text = said()
    assert code == 0 and "strings" not in text.out


def test_what_an_option_cannot_do_is_refused(model, rows, tmp_path, capsys):
    plain = tmp_path / "plain"
    save_tiny(LLAMA, plain)
    (plain / "chat_template.jinja").unlink()
    argv = ["train", f"--dataset={rows}", f"--output_dir={tmp_path / 'o'}", "--string_prompts=chat"]
    assert main([*argv, f"--model={plain}"]) == 2
    assert "string_prompts=chat needs a chat template, which model=" in capsys.readouterr().err
    tokens = {"prompt_index": 0, "prompt_ids": [5], "chosen_ids": [6, 2], "rejected_ids": [7, 2]}
    known = {"score_chosen": 1.0, "score_rejected": 0.0}
    ends = {"chosen_finish": "stop", "rejected_finish": "stop"}
    Path(rows).write_text(json.dumps({**tokens, **known, **ends}) + "\n")
    Path(rows).with_name(".rows.jsonl.sha256").unlink()
    assert main([*argv, f"--model={model}"]) == 2
    assert "string_prompts=chat must be left out" in capsys.readouterr().err
    argv = ["pair", "--candidates=c", "--scores=[s]", "--string_prompts=text"]
    assert main(argv) == 2 and "or replay be given" in capsys.readouterr().err
