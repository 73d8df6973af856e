"""A conversation in the terminal: its columns, its two histories, and how it ends."""

import builtins
import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import LLAMA, save_tiny
from transformers import GenerationMixin

from fastdpo.cli import chat, main
from fastdpo.cli.columns import Flow, cells, clean, column_width, end_of, side_by_side, wrap


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("one two three", 8, ["one two", "three"]),
        ("one  two", 4, ["one", "two"]),
        ("  indented\n\n- a", 20, ["  indented", "", "- a"]),
        ("abcdefghij k", 4, ["abcd", "efgh", "ij k"]),
        ("你好世界 a", 5, ["你好", "世界", "a"]),  # two cells each
        ("e\u0301e\u0301e\u0301", 3, ["e\u0301e\u0301e\u0301"]),  # accents of their own take none
        ("\x1b[31mred\x07\ttab\u202e", 20, ["[31mred tab"]),
        ("", 9, [""]),
    ],
)
def test_text_is_wrapped_to_the_cells_that_it_takes(text, width, lines):
    assert wrap(text, width) == lines


@given(st.text(max_size=60), st.integers(2, 20))
def test_no_line_is_wider_and_no_letter_is_lost(text, width):
    lines = wrap(text, width)
    assert max(map(cells, lines)) <= width
    assert "".join("".join(lines).split()) == "".join(clean(text).split())


@pytest.mark.parametrize("size", [1, 2, 5, 99])
def test_text_that_comes_in_pieces_is_broken_at_spaces(size):
    text = "one two three\nfour abcdefghijk x y"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    flow = Flow(8)
    said = "".join(map(flow.add, pieces)) + flow.add("", last=True)
    lines = [x.rstrip() for x in said.split("\n")]
    assert lines == ["one two", "three", "four", "abcdefghijk x y"]
    assert "".join(map(Flow(None).add, pieces)) == text
    flow = Flow(10)
    assert [flow.add(x) for x in ("你", "好 th", "ree", "\n")] == ["你", "好 ", "", "three\n"]


def test_columns_stand_beside_each_other():
    said = side_by_side(["你好", "x"], ["one", "two", "three"], 5)
    assert said.split("\n") == ["你好  | one", "x     | two", "      | three"]
    assert [column_width(x) for x in (63, 62, 80, 100)] == [30, None, 38, 48]
    assert end_of("one\ntwo 你好", 5) == " 你好" and end_of("one", 5) == "one"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two models of random weights, the second without a chat template."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny(LLAMA, folder / "one")
    save_tiny(LLAMA, folder / "plain", seed=1)
    (folder / "plain" / "chat_template.jinja").unlink()
    return folder


@pytest.fixture
def talk(monkeypatch, models):
    """Talk in a terminal of so many columns, to the exit status and the models."""

    def talk(*lines, options=(), columns=100, beside="one"):
        speakers, questions, load = [], iter(lines), chat.load_speaker

        def ask(prompt):
            line = next(questions, EOFError)  # Ctrl-D
            if isinstance(line, str):
                return line
            raise line

        with monkeypatch.context() as patch:
            patch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
            patch.setattr(sys.stdout, "isatty", lambda: True)
            patch.setenv("COLUMNS", str(columns))
            patch.setattr(builtins, "input", ask)
            patch.setattr(
                chat, "load_speaker", lambda *x: speakers.append(load(*x)) or speakers[-1]
            )
            argv = ["chat", f"--model={models / 'one'}", *options, "--dtype=float32"]
            argv += [f"--beside={models / beside}"] if beside else []
            return main([*argv, "--max_new_tokens=8"]), speakers

    return talk


def test_two_models_answer_in_columns_with_the_same_seed(talk, models, capsys):
    status, speakers = talk("tell me", "", "and?", columns=101)
    assert status == 0 and len(speakers) == 2
    said = capsys.readouterr().out
    shown = said.replace("\r\x1b[K", "\n").split("\n")
    rows = [x.split(" | ") for x in shown if " | " in x]
    assert all(len(row) == 2 and row[0].rstrip() == row[1] for row in rows)  # one model is both
    assert all(cells(row[0]) == 49 for row in rows)
    assert rows[1][1] == "-" * 49
    assert "[8 tokens, cut off at max_new_tokens=8]" in [row[1] for row in rows]
    assert sum(row[1].startswith("[") and " token" in row[1] for row in rows) == 2
    assert said.count("tell me") == 0  # the terminal has it already
    # Each has its own answers in its conversation.
    messages = speakers[0].messages
    assert [x["role"] for x in messages] == ["user", "assistant"] * 2
    assert messages == speakers[1].messages and messages is not speakers[1].messages
    assert messages[0]["content"] == "tell me" and messages[1]["content"] != messages[3]["content"]
    ids = speakers[0].ids("more")
    for message in messages:
        assert message["content"].strip() in speakers[0].tokenizer.decode(ids)
    # The same seed gives the same conversation, another another one.
    assert talk("tell me", "and?", columns=40)[1][0].messages == messages
    narrow = capsys.readouterr().out  # one below the other
    assert " | " not in narrow and narrow.count(f"{models / 'one'}\n---") == 4
    assert talk("tell me", "and?", options=["--seed=1"])[1][0].messages != messages


def test_a_conversation_is_forgotten_stopped_and_ended(talk, capsys, monkeypatch):
    told = {"role": "system", "content": "be nice"}
    for new in ("/new", "!clear"):
        _, [speaker] = talk("tell me", new, beside=None, options=["--system_prompt=be nice"])
        assert speaker.messages == [told] and "a new conversation" in capsys.readouterr().out
    for end in ("/quit", "!exit", KeyboardInterrupt):
        status, [speaker] = talk("/help", end, "tell me", beside=None)
        assert status == 0 and speaker.messages == []
        assert capsys.readouterr().out.count("/new begins another conversation") == 2

    def stop(*args):
        raise KeyboardInterrupt

    # Stopped in the second answer, the first is forgotten too.
    generate = chat.GenerateSampler.generate
    calls = iter([generate, stop, generate, generate])
    with monkeypatch.context() as patch:
        patch.setattr(chat.GenerateSampler, "generate", lambda *x: next(calls)(*x))
        status, speakers = talk("walks?", "be nice")
    assert status == 0 and "this question is forgotten" in capsys.readouterr().out
    assert [x.messages[0]["content"] for x in speakers] == ["be nice", "be nice"]

    def no_memory(*args, **options):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    # What fails in an answer leaves the conversation as it was.
    own: Any = GenerationMixin.__dict__["generate"]
    calls = iter([own, no_memory, own])
    with monkeypatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", lambda *x, **y: next(calls)(*x, **y))
        status, [speaker] = talk("be nice", "walks?", "and?", beside=None)
    assert status == 0 and [x["content"] for x in speaker.messages[::2]] == ["be nice", "and?"]
    assert "9 GiB); lower max_new_tokens if memory is short\n" in capsys.readouterr().err

    status, [speaker] = talk("tell me " * 900, "be nice", beside=None)
    assert status == 0 and speaker.messages[0]["content"] == "be nice"
    assert "more than the context of" in capsys.readouterr().err


def test_a_model_without_a_template_continues_the_text(talk, models, capsys):
    status, (one, plain) = talk("tell me", "walks?", beside="plain")
    assert status == 0 and "plain has no chat template" in capsys.readouterr().out
    assert len(one.messages) == 4 and plain.messages == []
    assert plain.ids("tell me") == plain.tokenizer("tell me")["input_ids"]
    status, _ = talk(beside="plain", options=["--system_prompt=be nice"])
    said = capsys.readouterr().err
    assert status == 2 and "system_prompt=be nice needs a chat template, which beside=" in said


def test_one_question_is_answered_without_a_terminal(models, capsys, monkeypatch):
    argv = ["chat", f"--model={models / 'one'}", "--max_new_tokens=4", "--temperature=0"]
    assert main([*argv, "--prompt=tell me"]) == 0
    asked = capsys.readouterr().out
    assert asked.endswith("\n[4 tokens, cut off at max_new_tokens=4]\n") and "\x1b" not in asked
    monkeypatch.setattr(sys, "stdin", io.StringIO("tell me\n"))
    assert main(argv) == 0
    piped = capsys.readouterr()
    assert piped.out == asked and piped.err.startswith("the question is read from the pipe")
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert main(argv) == 2 and "no question in what came" in capsys.readouterr().err
    for bad, message in (
        ("--prompt= ", "prompt=  must be a question"),
        ("--dtype=int8", "dtype=int8 must be one of float32"),
        ("--temperature=-1", "temperature=-1.0 must be"),
        ("--max_new_tokens=0", "max_new_tokens=0 must be"),
        ("--top_p=0.5", "top_p=0.5 must be 1 with temperature 0"),
    ):
        assert main([*argv, bad]) == 2
        assert f"error: {message}" in capsys.readouterr().err

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "_ask", stop)
    with pytest.raises(SystemExit) as end:
        main([*argv, "--prompt=tell me"])
    assert end.value.code == 130


@pytest.mark.parametrize("template", [None, "Q {{ messages[-1].content }} A"])
def test_adapters_answer_as_the_policy_that_they_were_merged_into(
    models, tmp_path, capsys, monkeypatch, template
):
    pytest.importorskip("peft")
    dataset = tmp_path / "pairs.jsonl"
    dataset.write_text('{"prompt": "tell me", "chosen": " nice walks", "rejected": " no"}\n' * 2)
    out = tmp_path / "out"
    argv = ["train", f"--model={models / 'one'}", f"--dataset={dataset}", f"--output_dir={out}",
            "--bf16=false", "--use_peft", "--lora_r=4", "--learning_rate=0.01", "--batch_size=1",
            "--reference_cache=null", "--max_length=64", "--max_tokens=256"]  # fmt: skip
    if template is not None:
        (tmp_path / "own.jinja").write_text(template)
        argv.append(f"--chat_template={tmp_path / 'own.jinja'}")
    assert main(argv) == 0
    to_talk = shlex.split(capsys.readouterr().out.rpartition("to talk to it: fastdpo ")[2])
    assert main([*to_talk, "--max_new_tokens=1", "--prompt=tell me"]) == 0

    def answers(name):
        capsys.readouterr()
        argv = ["chat", f"--model={name}", "--prompt=tell me", "--dtype=float32"]
        assert main([*argv, "--max_new_tokens=30"]) == 0
        return capsys.readouterr().out

    said = answers(out / "policy")
    assert answers(out / "adapter") == said
    for path in (out / "adapter").glob("*token*"):  # as of earlier versions
        path.unlink()
    (out / "adapter/chat_template.jinja").unlink()
    assert answers(out / "adapter") == said
    monkeypatch.chdir(out / "adapter")
    assert answers(".") == said
    config = json.loads(Path("adapter_config.json").read_text())
    Path("adapter_config.json").write_text(json.dumps(config | {chat._BASE: "./gone"}))
    assert main(["chat", "--model=.", "--prompt=hi"]) == 2
    assert "the folder base_model_name_or_path='./gone' does not" in capsys.readouterr().err
    assert main(["chat", f"--model={out}", "--prompt=hi"]) == 2
    assert f"is the folder of a run; its policy is {out / 'policy'}" in capsys.readouterr().err
