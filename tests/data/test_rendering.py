"""Text becomes the tokens that were meant, by real templates: those that TRL ships of 40 models."""

import csv
import json
import re
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import LLAMA, save_tiny

from fastdpo.data import lost
from fastdpo.data.records import Prompt, prompt_key
from fastdpo.data.rendering import render_prompt, takes_as_chat
from fastdpo.data.rows import Rows, preference_rows, prompt_rows, read_rows
from fastdpo.data.tokenize import tokenize_dataset
from fastdpo.errors import DataError, ModelError
from fastdpo.model.load import load_tokenizer, stop_ids
from fastdpo.pair.offline import offline_pairs
from fastdpo.rounds.config import EvaluateConfig, IterateConfig
from fastdpo.rounds.inputs import split_prompts
from fastdpo.sample import stage as sampling

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As GLM-4's: a turn ends where the next begins.
ENDLESS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_MARK = r"<[|｜][^<>'\"{}\s]*[|｜]>|<\|[A-Z_]+\|>|</?[a-z]+_of_[a-z]+>|<turn\|>|<\|turn>|</s>"


def u(text):
    return {"role": "user", "content": text}


def a(text, **more):
    return {"role": "assistant", "content": text, **more}


def templates() -> dict[str, str]:
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.jinja"))}


@cache
def byte_tokenizer(*more: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<s>", *more]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {x: i for i, x in enumerate(dict.fromkeys([*special, *letters]))}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>", bos_token="<s>"
    )


def tokenizer(template: str | None = CHATML, *more: str, around: str | None = None) -> Any:
    """One token a byte; `around` is what the tokenizer itself puts around a text, "$A" in it."""
    from tokenizers.processors import TemplateProcessing

    found = byte_tokenizer(*more)
    found.chat_template = template
    marks = [x for x in (around or "").split() if x != "$A"]
    found._tokenizer.post_processor = TemplateProcessing(
        single=around or "$A",
        special_tokens=[(x, found.convert_tokens_to_ids(x)) for x in marks],
    )
    return found


def tokenized(row, tok, told: int = 0):
    """The only pair of a row, and prompt, chosen and rejected as text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = preference_rows(Rows("here", [row]))
        (pair,) = tokenize_dataset(rows, tok, max_length=None, progress=False).pairs
    assert len([x for x in caught if "stops generation" in str(x.message)]) == told
    texts = [tok.decode(x) for x in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
    return pair, texts


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"b": 'x"y', "a": "Oslo"}}}
THINK = "<think>\ntwo and two\n</think>\n\nIt is 4."
CODE = "def f():\n    return 1\n\n\n    # x  y"
# A response, and what must be in its rendering.
RESPONSES = {
    "plain": ([a("It is 4.")], ["It is 4."]),
    "code": ([a(CODE)], [CODE]),
    "think": ([a(THINK)], ["two and two", "It is 4."]),
    "reasoning": ([a("It is 4.", reasoning_content="two and two")], ["two and two", "It is 4."]),
    "call": ([a("", tool_calls=[CALL])], ["weather", "Oslo"]),
    "word and call": ([a("So see.", tool_calls=[CALL])], ["So see.", "weather", "Oslo"]),
    "parts": ([a([{"type": "text", "text": "It is 4."}])], ["It is 4."]),
    "turns": ([a(THINK), u("Sure?"), a("Yes.")], ["two and two", "It is 4.", "Sure?", "Yes."]),
}


@pytest.mark.parametrize("kind", RESPONSES)
def test_a_template_keeps_a_response_or_is_refused(kind):
    """All of TRL's templates: 79 in TRL 1.16. The oracle looks for words that stand nowhere else
    in the rendered text."""
    marks = {x for text in templates().values() for x in re.findall(_MARK, text)}
    tok = tokenizer(None, *sorted(marks - {"<|im_start|>", "<|im_end|>", "<|pad|>"}))
    response, words = RESPONSES[kind]
    prompt, other, verdicts = [u("2 + 2?")], "No idea.", {}
    (row,) = preference_rows(
        Rows("here", [{"prompt": prompt, "chosen": response, "rejected": [a(other)]}])
    )
    for name, template in templates().items():
        tok.chat_template = template
        try:
            whole = tok.apply_chat_template(prompt + response, tokenize=False)
            kept = all(word in whole for word in words) and not re.search(
                "{['\"]type.: .text", whole
            )
            kept = kept and other in tok.apply_chat_template([*prompt, a(other)], tokenize=False)
        except Exception:
            kept = False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                (pair,) = tokenize_dataset([row], tok, max_length=None, progress=False).pairs
        except DataError as error:
            assert "chat template" in str(error), name
            verdicts[name] = False
        else:
            text = tok.decode(pair.chosen_ids).rstrip()
            assert text.endswith((">", "<turn|>")) and pair.chosen_ids != pair.rejected_ids, name
            verdicts[name] = True
        assert verdicts[name] == kept, (name, kind)
    assert any(verdicts.values())
    assert kind in ("plain", "code") or not all(verdicts.values())


def test_reasoning_that_a_template_cuts_is_told_of():
    tok = tokenizer(templates()["deepseek_r1_distill"], "<｜end▁of▁sentence｜>")
    row = {"prompt": [u("2 + 2?")], "chosen": [a(THINK)], "rejected": [a("It is 4.")]}
    with pytest.raises(
        DataError,
        match=r"^here, row 0 .*: content '<think>\\ntwo and two.* of message 0 of chosen is not in "
        r"what the chat template renders, .*It is 4.*cuts what stands before </think>.*"
        r"\(chat_template\)",
    ):
        tokenized(row, tok)
    with pytest.raises(DataError, match=r"reasoning_content 'why' .* never reads 'reasoning_cont"):
        tokenized({**row, "chosen": [a("4", reasoning_content="why")]}, tok)
    tok.chat_template = templates()["deepseek_r1_distill_training"]
    _, (prompt, chosen, _) = tokenized(row, tok)
    assert prompt + chosen == f"<s><｜User｜>2 + 2?<｜Assistant｜>{THINK}<｜end▁of▁sentence｜>"


def test_inner_whitespace_is_text_too():
    tok = tokenizer(CHATML.replace("m.content", "m.content.split() | join(' ')"))
    row = {"prompt": [u("f")], "chosen": [a("x  y")], "rejected": [a("x z")]}
    with pytest.raises(DataError, match="'x  y' of message 0 of chosen is not in"):
        tokenized(row, tok)
    _, (_, chosen, _) = tokenized({**row, "chosen": [a("\n x y\n")]}, tok)
    assert chosen == "x y<|im_end|>\n"


def test_a_template_that_always_begins_the_next_turn_is_refused():
    tok = tokenizer(CHATML.replace("{% if add_generation_prompt %}", "{% if true %}"))
    row = {"prompt": [u("f")], "chosen": [a("x")], "rejected": [a("y")]}
    with pytest.raises(
        DataError, match=r"writes .*assistant\\n' after chosen as it does before it"
    ):
        tokenized(row, tok)


@pytest.mark.parametrize(
    ("template", "response", "end", "told"),
    [
        (ENDLESS, "4", "<|im_end|>", 1),
        (ENDLESS, "4<|im_end|>", "<|im_end|>", 1),
        (CHATML, "4", "<|im_end|>\n", 0),
        (CHATML, "4<|im_end|>", "<|im_end|>\n", 0),  # two ends
        (CHATML, "4<|im_end|>\n", "<|im_end|>\n", 0),
        (CHATML.replace("<|im_end|>", "<|user|>"), "4", "<|user|>\n", 0),  # another end of a turn
        (CHATML.replace("<|im_end|>", "</t>"), "4", "</t>\n<|im_end|>", 1),  # no token
    ],
)
def test_responses_end_once_in_an_end_token(template, response, end, told):
    tok = tokenizer(template, "<|user|>", "<|assistant|>")
    row = {"prompt": [u("2 + 2?")], "chosen": [a(response)], "rejected": [a("5 or 6")]}
    pair, (_, chosen, rejected) = tokenized(row, tok, told)
    assert (chosen, rejected) == (f"4{end}", f"5 or 6{end}")
    assert pair.chosen_ids.count(tok.eos_token_id) == end.count("<|im_end|>")


def test_rows_can_have_no_end():
    tok = tokenizer(ENDLESS, "<|user|>", "<|assistant|>")
    chat = {"prompt": [u("f")], "chosen": [a("x")], "rejected": [a("y")], "append_eos": False}
    assert tokenized(chat, tok)[1] == ["<|user|>\nf<|assistant|>\n", "x", "y"]
    text = {"prompt": "f ", "chosen": "x", "rejected": "y<|im_end|>", "append_eos": "False"}
    pair, texts = tokenized(text, tokenizer())
    assert texts == ["f ", "x", "y<|im_end|>"] and pair.extra == {}
    assert tokenized({**text, "append_eos": None}, tokenizer())[1][1] == "x<|im_end|>"


@pytest.mark.parametrize("around", ["$A <|im_end|>", "<s> $A <|im_end|>", "<|user|> <s> $A", "$A"])
def test_strings_begin_and_end_once_whatever_the_tokenizer_adds(around):
    tok = tokenizer(CHATML, "<|user|>", around=around)
    begin = around.split("$A")[0].replace(" ", "")
    row = {"prompt": "say ", "chosen": "yes", "rejected": "no"}
    want = [f"{begin}say ", "yes<|im_end|>", "no<|im_end|>"]
    assert tokenized(row, tok)[1] == want
    # What was rendered before has its marks already; SimPO's data has them in responses too.
    again = {"prompt": f"{begin}say ", "chosen": "<s>yes<|im_end|>\n", "rejected": "no<|im_end|>"}
    assert tokenized(again, tok)[1] == [want[0], "yes<|im_end|>\n", want[2]]
    for prompt in ("say ", f"{begin}say "):
        assert tok.decode(render_prompt(prompt, tok)) == f"{begin}say "


def test_a_template_and_a_message_write_one_beginning():
    template = "{{ bos_token }}" + CHATML.replace("<|im_start|>{{ m.role }}\n", "")
    tok = tokenizer(template, around="<s> $A")
    row = {"prompt": [u("<s>hi")], "chosen": [a("x")], "rejected": [a("y")]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenized(row, tok)[1][0].startswith("<s>hi")


def test_a_template_without_the_beginning_of_its_tokenizer_is_told_of():
    row = {"prompt": [u("hi")], "chosen": [a("x")], "rejected": [a("y")]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = preference_rows(Rows("here", [row] * 2))
        tokenize_dataset(rows, tokenizer(around="<s> $A"), max_length=None, progress=False)
        tokenize_dataset(rows, tokenizer(), max_length=None, progress=False)  # it puts none either
    (message,) = [str(x.message) for x in caught]
    assert message.startswith("2 of 2 pairs: the chat template doesn't begin with '<s>'")
    assert "the first is here, row 0" in message and "chat_template" in message


def test_an_end_that_does_not_stop_the_model_is_told_of(tmp_path):
    from transformers import GenerationConfig

    from fastdpo.cli import main

    model, data = save_tiny(LLAMA, tmp_path / "model"), tmp_path / "pairs.jsonl"
    row = {"prompt": [u("hi")], "chosen": [a("yes")], "rejected": [a("no")]}
    data.write_text(json.dumps(row) + "\n")
    tok = load_tokenizer(str(model))
    tok.eos_token = "<|pad|>"
    tok.save_pretrained(model)
    rows = preference_rows(read_rows(data))

    def told(work):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
        return [str(x.message) for x in caught if "doesn't stop" in str(x.message)]

    def tokenize():
        stops = stop_ids(str(model), tok)
        tokenize_dataset(rows, tok, max_length=None, stop_ids=stops, progress=False)

    assert told(tokenize) == []  # token 2 is in the model's generation config
    GenerationConfig(eos_token_id=0).save_pretrained(model)
    (message,) = told(tokenize)
    assert "'<|im_end|>' (token 2)" in message and "pairs.jsonl:1" in message
    command = [
        "train", "--model", str(model), "--dataset", str(data), "--output_dir", str(tmp_path / "o"),
        "--bf16", "false", "--max_tokens", "999", "--reference_cache", "null",
    ]  # fmt: skip
    assert told(lambda: main(command)) == [message]
    (model / "generation_config.json").unlink()
    assert stop_ids(str(model), tok) == [2]
    # The tokenizer's own end, where generation doesn't stop at it.
    tok.eos_token = "<|im_end|>"
    tok.save_pretrained(model)
    GenerationConfig(eos_token_id=0).save_pretrained(model)
    assert told(tokenize) == [message]


def test_the_first_of_two_ends_is_where_the_model_stops():
    """Phi-3's template ends a turn and the conversation, Cohere's an answer and the turn."""
    ending = "{% if not add_generation_prompt %}<|eot|>{% endif %}"
    tok = tokenizer(CHATML + ending, "<|eot|>")
    tok.eos_token = "<|eot|>"
    row = {"prompt": [u("hi")], "chosen": [a("yes")], "rejected": [a("no")]}
    rows = preference_rows(Rows("here", [row]))
    end, last = tok.convert_tokens_to_ids(["<|im_end|>", "<|eot|>"])
    for stops, wanted in (
        ([end, last], "yes<|im_end|>"),
        ([last], "yes<|im_end|>\n<|eot|>"),
        (None, "yes<|im_end|>\n<|eot|>"),
    ):
        (pair,) = tokenize_dataset(rows, tok, max_length=None, stop_ids=stops, progress=False).pairs
        assert tok.decode(pair.chosen_ids) == wanted
    tok.eos_token = "<|im_end|>"


SYSTEM = """content ' Be "brief". ' (the template leaves it out"""
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.mark.parametrize(
    ("change", "template", "told"),
    [
        ({}, CHATML, None),
        ({"tools": [WEATHER]}, CHATML, "tools 'weather' (the template never reads 'tools')"),
        ({"tools": [WEATHER]}, "{{ tools | tojson }}" + CHATML, None),
        ({}, CHATML.replace("m.content", "'' if m.role == 'system' else m.content"), SYSTEM),
        ({}, CHATML.replace("m.content", "m.content | trim | tojson"), None),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_of_a_prompt_is_told_of(change, template, told, tmp_path):
    system = {"role": "system", "content": ' Be "brief". '}
    picture: Any = [{"type": "image", "image": "a.png"}, {"type": "reasoning", "reasoning": "so"}]
    assert list(lost.texts(u(picture))) == [("content", "so")]
    earlier = a("<think>so</think>It is.")  # the reasoning of an earlier turn may go
    row = {"prompt": [system, u("hi"), earlier, u("and?")], "chosen": [a("x")],
           "rejected": [a("y")], **change}  # fmt: skip
    tok = tokenizer(template.replace("m.content }}", "m.content.split('</think>')[-1] }}"))

    def warned(work):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
        return [str(x.message) for x in caught if "leaves out" in str(x.message)]

    rows = Rows("here", [row, row])
    pairs = preference_rows(rows)
    found = warned(lambda: tokenize_dataset(pairs, tok, max_length=None, progress=False))
    sampler: Any = SimpleNamespace(context=None, vocab=None)
    asked = prompt_rows(rows)
    assert warned(lambda: sampling._render_all(sampler, tok, asked, 5)) == found
    assert len(found) == (told is not None)
    if told:
        assert found[0].startswith("2 of 2 prompts")
        assert f"the first is here, row 0 (counting from 0): {told}" in found[0]


def test_a_rendered_prompt_is_not_rendered_again():
    tok = tokenizer()
    text = tok.apply_chat_template([u("hi")], tokenize=False, add_generation_prompt=True)
    for prompt in (text, "hi", [u("hi")]):
        assert tok.decode(render_prompt(prompt, tok, as_chat=True)) == text
    # A mark that is not the template's is a text like any other.
    assert tok.decode(render_prompt("<s>hi", tok, as_chat=True)) == text.replace("hi", "<s>hi")
    row = {"prompt": text, "chosen": "x<|im_end|>", "rejected": "y"}
    (pair,), _ = offline_pairs(
        preference_rows(Rows("here", [row])), tok, max_length=None, progress=False
    )
    assert tok.decode(pair.prompt_ids + pair.chosen_ids) == text + "x<|im_end|>"


def tool_row(name, arguments, answer):
    properties = {k: {"type": "string"} for k in arguments}
    schema = {"name": name, "parameters": {"type": "object", "properties": properties}}
    call = {"function": {"name": name, "arguments": arguments}}
    steps = [u("go"), a(None, tool_calls=[call]), {"role": "tool", "content": answer}]
    return {
        "prompt": steps,
        "chosen": [a(answer, reasoning_content="it said so")],
        "rejected": [a("?")],
        "tools": [{"type": "function", "function": schema}],
    }


def test_rows_from_arrow_are_those_of_json(tmp_path, monkeypatch):
    from datasets import Dataset

    rows = [tool_row("weather", {"city": "Oslo"}, "12"), tool_row("add", {"a": "1", "b": "2"}, "3")]
    whole = [{"chosen": [u("x"), a("y")], "rejected": [u("x"), a("z")]}]  # no prompt, no tools
    rows += whole
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = Dataset.from_list(rows)
    dataset.to_parquet(str(tmp_path / "b.parquet"))
    dataset.save_to_disk(str(tmp_path / "c"))
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: dataset)
    want = preference_rows(read_rows(tmp_path / "a.jsonl"))
    assert '"b"' not in json.dumps(want[0].tools)
    for source in (tmp_path / "b.parquet", tmp_path / "c", "org/data"):
        found = preference_rows(read_rows(source))
        for row, other in zip(found, want, strict=True):
            for name in ("prompt", "chosen", "rejected", "tools"):
                assert getattr(row, name) == getattr(other, name), source


def test_nulls_that_were_written_as_json_stay(tmp_path):
    import datasets

    kept = [{"prompt": "p", "meta": [{"a": None}, {"b": 1}]}]
    features = datasets.Features({"prompt": datasets.Value("string"), "meta": [datasets.Json()]})
    datasets.Dataset.from_list(kept, features=features).to_parquet(str(tmp_path / "x.parquet"))
    assert read_rows(tmp_path / "x.parquet").rows == kept


def test_messages_as_json_text_are_messages(tmp_path):
    row = {"prompt": [u("2 + 2?")], "chosen": [a("4")], "rejected": [a("5")]}
    with open(tmp_path / "d.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*row, "append_eos", "chat_template_kwargs"])
        writer.writeheader()
        writer.writerow({k: json.dumps(v, indent=1) for k, v in row.items()})
        writer.writerow({k: json.dumps(v) for k, v in row.items()} | {"rejected": ""})
    first, second = preference_rows(read_rows(tmp_path / "d.csv"))
    assert first == preference_rows(Rows(str(tmp_path / "d.csv"), [row], [2]))[0].__class__(
        first.where, row["prompt"], row["chosen"], row["rejected"]
    )
    assert second.rejected == ""
    (prompt,) = prompt_rows(Rows("here", [{"prompt": json.dumps(row["prompt"])}]))
    assert prompt.prompt == row["prompt"]


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "[]",
        '{"role": "user", "content": "x"}',
        '[{"role": "user"}]',
        '[{"content": "x"}]',
        '[{"role": "user", "content": "x"}, 3]',
        '[{"role": "user", "content": "x"}] is a chat.',
        "[{'a': 1}]",
        "[tool]",
        "[" * 5000,
    ],
)
def test_a_text_that_only_looks_like_messages_stays_text(text):
    row = {"prompt": "p", "chosen": text, "rejected": "r"}
    assert preference_rows(Rows("here", [row]))[0].chosen == text


EMPTY = [
    {"chosen": "x", "rejected": ""},
    {"chosen": "<|im_end|>", "rejected": "y"},
    {"chosen": [a("x")], "rejected": [a("")]},
    {"chosen": [], "rejected": [a("y")]},
    {"chosen": [a([{"type": "text", "text": ""}])], "rejected": [a("y")]},
]


@pytest.mark.parametrize("row", EMPTY)
def test_empty_responses_are_dropped_and_counted(row):
    chat = isinstance(row["rejected"], list)
    rows = [{"prompt": [u("p")] if chat else "p ", **row}, {"prompt": "p ", **FULL}]
    checked = preference_rows(Rows("here", rows))
    for tok in (tokenizer(), tokenizer(ENDLESS, "<|user|>", "<|assistant|>")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = tokenize_dataset(checked, tok, max_length=None, progress=False)
            pairs, dropped = offline_pairs(checked, tok, max_length=None, progress=False)
        assert result.dropped_at == {"empty response": ["here, row 0 (counting from 0)"]}
        assert len(pairs) == 1 and dropped == {"empty response": 1}


FULL = {"chosen": "x", "rejected": "y"}


def test_a_call_or_reasoning_alone_is_no_empty_response():
    tok = tokenizer(templates()["qwen3"])
    row = {"prompt": [u("p")], "chosen": [a("", tool_calls=[CALL])], "rejected": [a("no")]}
    assert "weather" in tokenized(row, tok)[1][1]
    row["chosen"] = [a("", reasoning_content="hm")]
    assert "hm" in tokenized(row, tok)[1][1]
    # Without a prompt column an empty response has no beginning in common with the other.
    both = [{"chosen": "p x", "rejected": ""}, {"chosen": "p x", "rejected": "p y"}]
    rows = preference_rows(Rows("here", both))
    result = tokenize_dataset(rows, tok, max_length=None, progress=False)
    assert result.dropped == {"empty response": 1}


def test_offline_responses_that_do_not_end_are_not_called_finished():
    tok = tokenizer()
    rows = [
        {"prompt": "p", "chosen": "x", "rejected": "y", "append_eos": False},
        {"prompt": "p", "chosen": "x<|im_end|>", "rejected": "y", "append_eos": False},
        {"prompt": "p", "chosen": "x", "rejected": "y"},
    ]
    chat = {"prompt": [u("p")], "chosen": [a("x")], "rejected": [a("y")], "append_eos": False}

    def found(rows, tok):
        checked = preference_rows(Rows("here", rows))
        pairs, _ = offline_pairs(checked, tok, max_length=None, progress=False)
        return [
            side
            for x in pairs
            for side in (
                (tok.decode(x.chosen_ids), x.chosen_finish),
                (tok.decode(x.rejected_ids), x.rejected_finish),
            )
        ]

    cut, whole = ("y", "length"), ("y<|im_end|>\n", "stop")
    assert found(rows, tok) == [
        ("x", "length"), cut, ("x<|im_end|>", "stop"), cut, ("x<|im_end|>\n", "stop"), whole,
    ]  # fmt: skip
    assert found([chat], tok)[1] == whole
    endless = tokenizer(ENDLESS, "<|user|>", "<|assistant|>")
    assert found([chat], endless) == [("x", "length"), cut]
    # A template that ends no turn leaves nothing to cut off a string, one that ends it twice two.
    plain = [{"prompt": "p", "chosen": "xy z", "rejected": "y", "append_eos": False}]
    assert found(plain, endless) == [("xy z", "length"), cut]
    twice = CHATML.replace("<|im_end|>", "<|end|><|im_end|>")
    assert found(plain, tokenizer(twice, "<|end|>")) == [("xy z", "length"), cut]


def test_a_prompt_is_the_same_however_it_is_written(tmp_path):
    parts = [u([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}])]
    same = ["hi", [u("hi")], parts, [{"content": "hi", "role": "user", "name": None}]]
    assert len({prompt_key(x) for x in same}) == 1
    assert len({prompt_key(x) for x in ["hi", "Hi", [a("hi")], [u("h"), u("i")]]}) == 4
    # Held out one way, none is trained on the other way.
    rows: list[dict[str, Any]] = [{"prompt": f"p{i}"} for i in range(8)]
    rows += [{"prompt": [u(f"p{i}")]} for i in range(8)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = IterateConfig(
        model="m", prompts=str(tmp_path / "p.jsonl"), evaluate=EvaluateConfig(heldout=4)
    )
    train, held = split_prompts(config, tokenizer())

    def keys(rows: list[Prompt]) -> set[str]:
        return {prompt_key(row.prompt) for row in rows}

    assert train and held and not keys(train) & keys(held)


def test_special_text_of_a_response_is_no_end():
    tok = tokenizer(ENDLESS, "<|user|>", "<|assistant|>")
    for last in ("<|im_start|>", "<|pad|>", "<s>"):
        row = {"prompt": [u("p")], "chosen": [a(f"x {last}")], "rejected": [a("y")]}
        _, (_, chosen, rejected) = tokenized(row, tok, told=1)
        assert (chosen, rejected) == (f"x {last}<|im_end|>", "y<|im_end|>")


def test_a_response_of_blanks_is_empty():
    tok = tokenizer(CHATML.replace("m.content", "m.content | trim"))
    row = {"prompt": [u("p")], "chosen": [a("x")], "rejected": [a(" \n")]}
    (checked,) = preference_rows(Rows("here", [row]))
    with pytest.raises(DataError, match="empty response: 1"):
        tokenize_dataset([checked], tok, max_length=None, progress=False)


def test_a_prompt_that_is_null_is_not_made_up(tmp_path):
    from datasets import Dataset

    rows = [
        {"prompt": "p", "chosen": "x", "rejected": "y"},
        {"prompt": None, "chosen": "The answer is 4.", "rejected": "The answer is 5."},
    ]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    with pytest.raises(DataError, match=r"row 1 .*prompt is null"):
        preference_rows(read_rows(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("prompt", ["hello there", "你好", "\nhello"])
def test_a_prompt_of_a_sentencepiece_tokenizer_is_chat(prompt):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<s>", "</s>", "▁", *sorted({*"hello there你好\nuserasitn<|>"} - {" "})]
    core = Tokenizer(models.BPE({x: i for i, x in enumerate(letters)}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    core.decoder = decoders.Metaspace()  # type: ignore[assignment]
    tok = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    tok.chat_template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>{% endfor %}"
    assert takes_as_chat(prompt, tok)


def test_chat_template_is_an_option_of_training(tmp_path, capsys):
    from fastdpo.cli import main

    model, cut = save_tiny(LLAMA, tmp_path / "model"), tmp_path / "cut.jinja"
    good = load_tokenizer(str(model)).chat_template
    cut.write_text(good.replace("message['content']", "message['content'].split('</think>')[-1]"))
    saved = load_tokenizer(str(model), str(cut))
    assert saved.chat_template == cut.read_text()
    saved.save_pretrained(model)
    (tmp_path / "good.jinja").write_text(good)
    row = {"prompt": [u("hi")], "chosen": [a(THINK)], "rejected": [a("It is 5.")]}
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps(row))
    command = [
        "train", "--model", str(model), "--dataset", str(data), "--output_dir", str(tmp_path / "o"),
        "--bf16", "false", "--max_tokens", "999", "--max_length", "400",
        "--reference_cache", "null",
    ]  # fmt: skip
    assert main(command) == 2
    assert "pairs.jsonl:1: content '<think>" in capsys.readouterr().err
    assert main([*command, "--chat_template", str(tmp_path / "good.jinja")]) == 0
    assert load_tokenizer(str(tmp_path / "o" / "policy")).chat_template == good
    for name, message in (("none.jinja", "cannot be read"), ("empty.jinja", "is empty")):
        (tmp_path / "empty.jinja").write_text("\n")
        with pytest.raises(ModelError, match=f"chat_template=.*{name} {message}"):
            load_tokenizer(str(model), str(tmp_path / name))


def test_an_error_of_a_template_names_its_line(tmp_path):
    model = str(save_tiny(LLAMA, tmp_path / "llama"))
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    line = r"mine.jinja is no Jinja .*, line 2 of the chat .*: '{{ m.content }'; corr"
    with pytest.raises(ModelError, match=line):
        load_tokenizer(model, str(path))
    path.write_text("{% for m in messages %}\n")
    with pytest.raises(ModelError, match=r"Unexpected end of template.*line \d of"):
        load_tokenizer(model, str(path))
    path.write_text("{% for m in messages %}\n  {{ m.content + 1 }}\n{% endfor %}")
    tok = load_tokenizer(model, str(path))  # it may take other messages than a trial would have
    with pytest.raises(DataError, match=r"TypeError: .*, line 2 of the chat .*'{{ m.content \+ 1"):
        render_prompt([u("hi")], tok)
    tok.chat_template = "{% for m in messages %}\n\n{{ raise_exception('no') }}{% endfor %}"
    with pytest.raises(DataError, match="TemplateError: no, line 3 of the chat template"):
        render_prompt([u("hi")], tok)
    given = {"chat_template": "{{ 1 }}\n{{ nothing.at }}"}  # by a row
    with pytest.raises(DataError, match=r"UndefinedError: .*, line 2 .*'{{ nothing.at }}'\)"):
        render_prompt([u("hi")], tok, None, given)
