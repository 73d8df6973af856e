"""Reading, checking and tokenizing preference data.

Token ids are compared with those that TRL's DPOTrainer prepares and collates; everything else
with values written out by hand. Tokenizers are trained here on a few sentences.
"""

import csv
import json
import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.data.budget import OVERLONG, Fitted, fit_to_budget
from fastdpo.data.examples import TokenizedPair
from fastdpo.data.records import PreferenceRow
from fastdpo.data.rendering import render_prompt
from fastdpo.data.rows import Rows, preference_rows, prompt_rows, read_rows
from fastdpo.data.tokenize import tokenize_dataset
from fastdpo.errors import DataError

torch.set_num_threads(1)

CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'forbidden' %}{{ raise_exception('no such role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if think %}<think></think>{% endif %}{% endif %}"
)
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "What color is the sky? The sky is blue, the sea is blue too.",
    "user assistant system tools think: the answer is four, the answer is five.",
]


def u(text):
    return {"role": "user", "content": text}


def a(text):
    return {"role": "assistant", "content": text}


STRINGS = [
    {"prompt": "What color is the sky?", "chosen": " Blue.", "rejected": " It is the sea, too."},
    # " th" + "e sky" merges over the boundary.
    {"prompt": "The quick brown fox and th", "chosen": "e sky is blue", "rejected": "e dog"},
    # Already ends in the end token.
    {"prompt": "The answer is", "chosen": " four.<|im_end|>", "rejected": " five."},
    {"prompt": "Ünï ", "chosen": "čödé 🦊", "rejected": "\n\n"},
    # Merges with one of the responses only.
    {"prompt": "A dog and th", "chosen": "e sea", "rejected": "!"},
]
CHATS = [
    {"prompt": [u("What color is the sky?")], "chosen": [a("Blue.")], "rejected": [a("A dog.")]},
    {
        "prompt": [{"role": "system", "content": "The fox."}, u("One?"), a("Two."), u("Three?")],
        "chosen": [a("four"), u("the sea?"), a("five")],
        "rejected": [a("the lazy dog")],
    },
]
IMPLICIT_STRINGS = [
    {"chosen": "The sky is blue", "rejected": "The sky is lazy"},
    {"chosen": "One, two, three: the answer is x", "rejected": "One, two, three: the answer is y?"},
    {"chosen": "the fox", "rejected": "the fox jumps"},  # one is the beginning of the other
]
IMPLICIT_CHATS = [
    {"chosen": [u("The sky?"), a("blue")], "rejected": [u("The sky?"), a("lazy")]},
    {
        "chosen": [u("1"), a("2"), u("3"), a("four")],
        "rejected": [u("1"), a("2"), u("3"), a("five"), u("too?"), a("is")],
    },
]
TOOL = {"type": "function", "function": {"name": "fox", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_tokenizer(chat_template: str | None = CHATML) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # Without splitting at spaces, tokens merge over every boundary.
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(SENTENCES * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tokenize(rows, tokenizer, max_length=None, **options):
    rows = preference_rows(Rows("here", rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prompts that lose tokens have a test of their own
        return tokenize_dataset(rows, tokenizer, max_length=max_length, progress=False, **options)


def triples(result):
    return [(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in result.pairs]


@pytest.fixture(scope="module")
def trl_triples(tokenizer, tmp_path_factory):
    """A function: what TRL trains on, as (prompt, chosen, rejected) ids after truncation."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("trl")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )

    def prepare(rows, max_length=None):
        args = trl.DPOConfig(
            output_dir=str(folder),
            max_length=max_length,
            bf16=False,
            use_cpu=True,
            report_to="none",
        )
        trainer = trl.DPOTrainer(
            model=LlamaForCausalLM(config),
            ref_model=LlamaForCausalLM(config),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        return [collated(trainer.data_collator([row])) for row in trainer.train_dataset]

    def collated(batch):
        sides = []
        for ids, attended, scored in zip(
            batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
        ):
            prompt = ids[(attended == 1) & (scored == 0)].tolist()
            sides.append((prompt, ids[scored == 1].tolist()))
        assert sides[0][0] == sides[1][0]
        return (sides[0][0], sides[0][1], sides[1][1])

    return prepare


@pytest.mark.parametrize("rows", [STRINGS, CHATS, IMPLICIT_STRINGS, IMPLICIT_CHATS])
def test_token_ids_are_those_of_trl(rows, tokenizer, trl_triples):
    whole = trl_triples(rows)
    assert triples(tokenize(rows, tokenizer)) == whole
    longest_prompt = max(len(prompt) for prompt, _, _ in whole)
    cut = trl_triples(rows, longest_prompt + 2)
    assert len(cut) == len(whole) and cut != whole
    assert triples(tokenize(rows, tokenizer, longest_prompt + 2)) == cut
    fewer = trl_triples(rows, longest_prompt)
    assert len(fewer) < len(whole)
    result = tokenize(rows, tokenizer, longest_prompt)
    assert triples(result) == fewer
    assert result.dropped == {"responses truncated to nothing": len(whole) - len(fewer)}


def test_tools_and_template_kwargs_are_those_of_trl(tokenizer, trl_triples):
    options = {"tools": [TOOL], "chat_template_kwargs": {"think": True}}
    rows = [{**CHATS[0], **options}]
    ours = triples(tokenize(rows, tokenizer))
    assert ours == trl_triples(rows)
    assert ours == triples(tokenize([{**rows[0], "tools": json.dumps([TOOL])}], tokenizer))
    assert ours != triples(tokenize([{**rows[0], "tools": None}], tokenizer))
    assert tokenizer.decode(ours[0][0]).startswith("<|im_start|>tools")


def test_texts_of_a_chat_pair(tokenizer):
    (pair,) = tokenize(CHATS[:1], tokenizer).pairs
    prompt = "<|im_start|>user\nWhat color is the sky?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair.prompt_ids) == prompt
    assert tokenizer.decode(pair.chosen_ids) == "Blue.<|im_end|>\n"
    assert tokenizer.decode(pair.rejected_ids) == "A dog.<|im_end|>\n"


def test_strings_get_one_end_token(tokenizer):
    (pair,) = tokenize(STRINGS[2:3], tokenizer).pairs
    for ids in (pair.chosen_ids, pair.rejected_ids):
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1


def test_a_prompt_that_merges_into_its_response_is_warned_about(tokenizer):
    rows = preference_rows(Rows("here", [STRINGS[3], STRINGS[1]]))
    with pytest.warns(UserWarning, match=r"1 of 2 prompts lose .* here, row 1 .*: ' th'"):
        result = tokenize_dataset(rows, tokenizer, max_length=None, progress=False)
    pair = result.pairs[1]
    assert len(result.pairs) == 2
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids) == (
        STRINGS[1]["prompt"] + STRINGS[1]["chosen"] + "<|im_end|>"
    )
    assert pair.prompt_ids != render_prompt(STRINGS[1]["prompt"], tokenizer)


def test_extra_columns_are_kept(tokenizer):
    row = {**STRINGS[0], "score": 0.5, "tags": ["a"], "tools": None}
    (checked,) = preference_rows(Rows("here", [row]))
    assert checked.extra == {"score": 0.5, "tags": ["a"]}
    assert tokenize([row], tokenizer).pairs[0].extra == {"score": 0.5, "tags": ["a"]}
    assert prompt_rows(Rows("here", [row]))[0].extra.keys() == {
        "chosen",
        "rejected",
        "score",
        "tags",
    }


def test_dropped_and_truncated_pairs_are_counted(tokenizer):
    prompt = "The sky"
    start = len(tokenizer(prompt)["input_ids"])
    rows = [
        {"prompt": prompt, "chosen": "!", "rejected": "?"},
        {"prompt": prompt, "chosen": "!", "rejected": "!"},
        {"prompt": prompt, "chosen": "!", "rejected": "!<|im_end|>"},
        {"prompt": prompt, "chosen": "!?!?!", "rejected": "?"},
        {"prompt": prompt, "chosen": "!?!?!", "rejected": "!?!?"},
        {"prompt": "!?" * 9, "chosen": "!", "rejected": "?"},
    ]
    result = tokenize(rows, tokenizer, max_length=start + 2)
    assert len(result.pairs) == 2
    assert result.truncated == 1
    assert result.dropped_at["responses truncated to nothing"] == ["here, row 5 (counting from 0)"]
    assert result.dropped == {
        "identical responses": 2,
        "identical responses after truncation": 1,
        "responses truncated to nothing": 1,
    }
    everything = tokenize(rows, tokenizer)
    assert (len(everything.pairs), everything.truncated) == (4, 0)
    assert everything.dropped == {"identical responses": 2}


def overlong_rows(tokenizer):
    """Rows, and the `max_length` that exactly two of them are within."""
    prompt = "The sky"
    rows = [
        {"prompt": prompt, "chosen": "!", "rejected": "?"},
        {"prompt": prompt, "chosen": "!?!?!", "rejected": "!?!?!"},  # identical at any length
        {"prompt": prompt, "chosen": "!?", "rejected": "?"},  # chosen is one too long
        {"prompt": prompt, "chosen": "?", "rejected": "!?!?!"},
        {"prompt": prompt, "chosen": "!?!?!", "rejected": "!?!?"},
        {"prompt": "!?" * 9, "chosen": "!", "rejected": "?"},
        {"prompt": prompt, "chosen": "?", "rejected": "!"},
    ]
    start = len(tokenizer(prompt)["input_ids"])
    whole = tokenize(rows, tokenizer).pairs
    lengths = [(len(x.prompt_ids), len(x.chosen_ids), len(x.rejected_ids)) for x in whole]
    responses = [(2, 2), (3, 2), (2, 6), (6, 5), (2, 2), (2, 2)]
    prompts = [start, start, start, start, 18, start]
    assert lengths == [(prompt, *both) for prompt, both in zip(prompts, responses)]
    return rows, whole, start + 2


def test_overlong_pairs_are_truncated(tokenizer):
    rows, whole, max_length = overlong_rows(tokenizer)
    result = tokenize(rows, tokenizer, max_length, overlong="truncate")
    assert result == tokenize(rows, tokenizer, max_length)
    assert result.pairs == [
        whole[0],
        replace(whole[1], chosen_ids=whole[1].chosen_ids[:2]),
        replace(whole[2], rejected_ids=whole[2].rejected_ids[:2]),
        whole[5],
    ]
    assert result.truncated == 2
    assert result.dropped == {
        "identical responses": 1,
        "identical responses after truncation": 1,
        "responses truncated to nothing": 1,
    }


def test_overlong_pairs_are_dropped(tokenizer):
    rows, whole, max_length = overlong_rows(tokenizer)
    result = tokenize(rows, tokenizer, max_length, overlong="drop")
    assert result.pairs == [whole[0], whole[5]]
    assert result.truncated == 0
    assert result.dropped == {"identical responses": 1, "longer than max_length": 4}
    with pytest.raises(
        DataError,
        match=rf"\(longer than max_length: 1\)\. Raise max_length={max_length}, to keep all of "
        rf"them to {max_length + 1}\.$",
    ):
        tokenize(rows[2:3], tokenizer, max_length, overlong="drop")
    with pytest.raises(
        DataError, match=r"truncated to nothing: 1\)\. Raise max_length=2, .* to \d+\.$"
    ):
        tokenize(rows[2:3], tokenizer, 2)
    with pytest.raises(DataError, match=r"identical responses: 1\)\. Give pairs whose chosen and"):
        tokenize([{**rows[0], "rejected": rows[0]["chosen"]}], tokenizer, max_length)


@pytest.mark.parametrize(("at", "side", "tokens"), [(2, "chosen", 3), (3, "rejected", 6)])
def test_the_first_overlong_pair_stops(tmp_path, tokenizer, at, side, tokens):
    rows, _, max_length = overlong_rows(tokenizer)
    path = tmp_path / "pairs.jsonl"
    # Identical responses are dropped whatever their length, so they stop nothing.
    chosen = [*rows[:2], *rows[at:]]
    path.write_text("\n" + "".join(f"{json.dumps(row)}\n" for row in chosen))
    start = max_length - 2
    with pytest.raises(DataError) as caught:
        tokenize_dataset(
            preference_rows(read_rows(path)),
            tokenizer,
            max_length=max_length,
            overlong="stop",
            progress=False,
        )
    total = start + tokens
    assert str(caught.value) == (
        f"{path}:4: prompt and {side} response have {total} tokens ({start} + {tokens}), "
        f"max_length is {max_length}. Raise max_length to at least {total}, "
        "or set overlong=truncate or overlong=drop."
    )
    # The advice holds.
    tokenize(chosen[:3], tokenizer, total, overlong="stop")
    with pytest.raises(DataError, match=f"max_length is {total - 1}"):
        tokenize(chosen[:3], tokenizer, total - 1, overlong="stop")


@pytest.mark.parametrize("overlong", OVERLONG)
def test_pairs_within_max_length_are_left_alone(overlong, tokenizer):
    rows, whole, _ = overlong_rows(tokenizer)
    longest = max(len(x.prompt_ids) + max(len(x.chosen_ids), len(x.rejected_ids)) for x in whole)
    for max_length in (None, longest):
        result = tokenize(rows, tokenizer, max_length, overlong=overlong)
        assert (result.pairs, result.truncated) == (whole, 0)
        assert result.dropped == {"identical responses": 1}


@pytest.mark.parametrize("overlong", ["", "keep", "Truncate", "truncate "])
def test_other_choices_are_refused(overlong, tokenizer):
    message = re.escape(f"overlong must be truncate, drop or stop, got {overlong!r}")
    with pytest.raises(ValueError, match=message):
        tokenize(STRINGS, tokenizer, overlong=overlong)
    with pytest.raises(ValueError, match=message):
        fit_to_budget([LONG], 99, layout="shared", overlong=overlong)


def test_pairs_remember_their_row(tokenizer):
    rows = preference_rows(Rows("pairs.jsonl", CHATS, lines=[1, 17]))
    result = tokenize_dataset(rows, tokenizer, max_length=None, progress=False)
    assert [pair.where for pair in result.pairs] == ["pairs.jsonl:1", "pairs.jsonl:17"]
    pair = result.pairs[1]
    assert pair == replace(pair, where="elsewhere")


SHORT = TokenizedPair([1], [2], [3])
LONG = TokenizedPair([1, 2], [3, 4, 5, 6, 7], [8, 9], extra={"score": 1.5}, where="pairs.jsonl:17")


@pytest.mark.parametrize(
    ("room", "chosen", "rejected"),
    [
        (6, [3, 4, 5, 6], [8, 9]),
        (5, [3, 4, 5], [8, 9]),
        (4, [3, 4], [8, 9]),
        (3, [3], [8]),  # a cap of 2 would take 4
        (2, [3], [8]),
    ],
)
@pytest.mark.parametrize("share_prompt", [True, False])
def test_pairs_over_the_budget_are_cut_to_one_cap(room, chosen, rejected, share_prompt):
    max_tokens = room + (2 if share_prompt else 4)
    result = fit_to_budget(
        [SHORT, LONG],
        max_tokens,
        layout="shared" if share_prompt else "packed",
        overlong="truncate",
    )
    cut = TokenizedPair([1, 2], chosen, rejected, extra={"score": 1.5})
    assert result == Fitted([SHORT, cut], [0, 1], [], ["pairs.jsonl:17"])
    assert result.pairs[0] is SHORT and result.pairs[1].where == "pairs.jsonl:17"
    assert (LONG.chosen_ids, LONG.rejected_ids) == ([3, 4, 5, 6, 7], [8, 9])


@pytest.mark.parametrize(
    ("pair", "share_prompt", "max_tokens"),
    [
        (LONG, True, 3),  # one token of each is one too many
        (LONG, False, 5),
        (TokenizedPair([1] * 9, [2], [3]), True, 8),  # the prompt alone is too long
        (TokenizedPair([1], [2, 3, 4], [2, 3, 5]), True, 5),  # identical after the cut
    ],
)
def test_a_pair_that_no_cut_makes_useful_is_dropped(pair, share_prompt, max_tokens):
    result = fit_to_budget(
        [pair, SHORT, pair, SHORT],
        max_tokens,
        layout="shared" if share_prompt else "packed",
        overlong="truncate",
    )
    places = [pair.where or f"pair {i} (counting from 0)" for i in (0, 2)]
    assert (result.kept, result.dropped_at, result.truncated_at) == ([1, 3], places, [])
    assert result.pairs[0] is SHORT and result.pairs[1] is SHORT
    with pytest.raises(DataError, match="no pair is left"):
        fit_to_budget(
            [pair], max_tokens, layout="shared" if share_prompt else "packed", overlong="truncate"
        )


@pytest.mark.parametrize(("share_prompt", "size"), [(True, 9), (False, 11)])
def test_pairs_over_the_budget_are_dropped_or_stop(share_prompt, size):
    pairs = [SHORT, LONG, replace(LONG, chosen_ids=[7] * 20)]
    result = fit_to_budget(
        pairs, size - 1, layout="shared" if share_prompt else "packed", overlong="drop"
    )
    assert result == Fitted([SHORT], [0], ["pairs.jsonl:17"] * 2, []) and result.pairs[0] is SHORT
    with pytest.raises(DataError) as caught:
        fit_to_budget(
            pairs, size - 1, layout="shared" if share_prompt else "packed", overlong="stop"
        )
    assert str(caught.value) == (
        f"pairs.jsonl:17: the pair takes {size} tokens, max_tokens is {size - 1}. Raise "
        f"max_tokens to at least {size + 15}, the longest pair, or set overlong=truncate or "
        "overlong=drop."
    )
    with pytest.raises(DataError, match=r"^pair 1 \(counting from 0\): the pair takes"):
        fit_to_budget(
            [SHORT, replace(LONG, where="")],
            8,
            layout="shared" if share_prompt else "packed",
            overlong="stop",
        )
    for overlong in OVERLONG:
        whole = fit_to_budget(
            pairs, size + 15, layout="shared" if share_prompt else "packed", overlong=overlong
        )
        assert whole == Fitted(pairs, [0, 1, 2], [], [])


@pytest.mark.parametrize(
    ("overlong", "choice"), [("truncate", ""), ("drop", ", or set overlong=truncate")]
)
def test_no_pair_within_the_budget_is_an_error(overlong, choice):
    with pytest.raises(DataError) as caught:
        fit_to_budget([LONG, SHORT], 2, layout="shared", overlong=overlong)
    assert str(caught.value) == (
        "pairs.jsonl:17 to pair 1 (counting from 0): no pair is left: all 2 take "
        "more than max_tokens = 2 tokens. Raise max_tokens to at least 9, the longest pair"
        f"{choice}."
    )
    with pytest.raises(DataError, match="there are no pairs"):
        fit_to_budget([], 9, layout="shared", overlong=overlong)


def some_ids(most):
    return st.lists(st.integers(0, 2), min_size=1, max_size=most)


@settings(max_examples=200, deadline=None)
@given(
    pairs=st.lists(
        st.builds(TokenizedPair, some_ids(6), some_ids(12), some_ids(12)), min_size=1, max_size=5
    ),
    max_tokens=st.integers(3, 36),
    share_prompt=st.booleans(),
)
def test_fitted_pairs_fit_and_lose_no_more_than_they_must(pairs, max_tokens, share_prompt):
    def cut(pair, cap):
        return replace(pair, chosen_ids=pair.chosen_ids[:cap], rejected_ids=pair.rejected_ids[:cap])

    def fits(pair):
        prompts = 1 if share_prompt else 2
        size = prompts * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
        return size <= max_tokens

    # The rule in its plainest form: try every cap.
    best = {}
    for i, pair in enumerate(pairs):
        caps = [cap for cap in range(1, 13) if fits(cut(pair, cap))]
        if caps and (
            fits(pair) or cut(pair, caps[-1]).chosen_ids != cut(pair, caps[-1]).rejected_ids
        ):
            best[i] = cut(pair, caps[-1])
    within = [i for i, pair in enumerate(pairs) if fits(pair)]
    for overlong, kept in (("truncate", list(best)), ("drop", within)):
        if not kept:
            with pytest.raises(DataError, match="no pair is left"):
                fit_to_budget(
                    pairs,
                    max_tokens,
                    layout="shared" if share_prompt else "packed",
                    overlong=overlong,
                )
            continue
        result = fit_to_budget(
            pairs, max_tokens, layout="shared" if share_prompt else "packed", overlong=overlong
        )
        assert all(map(fits, result.pairs))
        assert result.pairs == [best[i] for i in kept] and result.kept == kept
        counts = len(result.dropped_at), len(result.truncated_at)
        assert counts == (len(pairs) - len(kept), len(set(kept) - set(within)))
        assert all(x is pairs[i] for x, i in zip(result.pairs, kept) if i in within)


def test_a_prompt_or_a_response_without_tokens_is_dropped(tokenizer):
    merged = {"prompt": "t", "chosen": "he dog", "rejected": "he sea"}
    assert tokenize([merged, STRINGS[0]], tokenizer).dropped == {"no prompt token": 1}
    silent = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    row = {"prompt": [u("The sky")], "chosen": [a("")], "rejected": [a("!")]}
    assert tokenize([row, CHATS[0]], silent).dropped == {"empty response": 1}


def test_nothing_left_is_an_error(tokenizer):
    with pytest.raises(DataError, match=r"here, row 0 .*row 3 .*truncated to nothing: 4.*max_leng"):
        tokenize([STRINGS[0]] * 4, tokenizer, max_length=2)
    with pytest.raises(DataError, match="no rows"):
        tokenize_dataset([], tokenizer, max_length=9)
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        tokenize(STRINGS, tokenizer, max_length=1)


def test_implicit_and_redundant_prompts_become_explicit():
    redundant = {**IMPLICIT_CHATS[0], "prompt": "The sky?"}
    rows = Rows("here", [IMPLICIT_STRINGS[0], IMPLICIT_STRINGS[2], IMPLICIT_CHATS[1], redundant])
    checked = [(row.prompt, row.chosen, row.rejected) for row in preference_rows(rows)]
    assert checked == [
        ("The sky is", " blue", " lazy"),
        ("the fo", "x", "x jumps"),
        ([u("1"), a("2"), u("3")], [a("four")], [a("five"), u("too?"), a("is")]),
        ([u("The sky?")], [a("blue")], [a("lazy")]),
    ]


OK = {"prompt": "p", "chosen": "c", "rejected": "r"}
CHAT = CHATS[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, r"column 'rejected' is missing.*\['chosen', 'prompt'\]"),
        ({"prompt": "p", "rejected": "c"}, "column 'chosen' is missing"),
        ({**OK, "chosen": None}, "chosen is null"),
        ({**OK, "prompt": None}, "prompt is null"),
        ({**OK, "rejected": 3}, "rejected is of type int"),
        ({**OK, "prompt": {"role": "user"}}, "prompt is of type dict"),
        ({**OK, "prompt": ""}, "prompt is empty"),
        ({**CHAT, "prompt": []}, "prompt is empty"),
        ({**OK, "chosen": CHAT["chosen"]}, "one response is a string and the other a message"),
        ({**OK, "prompt": CHAT["prompt"]}, "prompt is a message list, the responses are strings"),
        ({**CHAT, "prompt": "What color is the sky?"}, "no common beginning"),
        ({**IMPLICIT_CHATS[0], "prompt": "Other?"}, "prompt is a string.*don't begin with it"),
        ({"chosen": "a dog", "rejected": "the sea"}, "no common beginning"),
        ({"chosen": " a", "rejected": " b"}, "no common beginning"),
        ({**IMPLICIT_CHATS[0], "prompt": [u("The sky?")]}, "repeat the messages of the prompt"),
        ({**CHAT, "chosen": [{"content": "x"}]}, "a message in chosen has no role"),
        ({**CHAT, "chosen": [{"role": 1, "content": "x"}]}, "role that is not a string"),
        ({**CHAT, "rejected": [{"role": "assistant"}]}, "a message in rejected has no content"),
        ({**CHAT, "prompt": [{"role": "user", "content": 5}]}, "has of type int as its content"),
        ({**CHAT, "prompt": ["x"]}, "a message in prompt is of type str, not an object"),
        ({**OK, "tools": "[{"}, "tools is not valid JSON"),
        ({**OK, "tools": "{}"}, "tools is of type dict"),
        ({**OK, "chat_template_kwargs": ["x"]}, "chat_template_kwargs is of type list"),
        ({**OK, "chat_template_kwargs": "{x}"}, "chat_template_kwargs is not valid JSON"),
        ({**OK, "append_eos": 0}, "append_eos is 0. Write true or false"),
        ({**OK, "append_eos": "no"}, "append_eos is 'no'. Write true or false"),
        ({**OK, "chosen": str(CHAT["chosen"])}, "chosen is a list of messages as Python prints"),
        ({**OK, "chosen": f"[{a('x')} {u('y')}]"}, "chosen is a list of messages as Python print"),
        ({**OK, "chosen": json.dumps(CHAT["chosen"])}, "one response is a string and the other a"),
        ({**CHAT, "prompt": [u([{"type": "image"}])]}, "has a part of type 'image', which can't"),
        ({**OK, "images": ["x.png"]}, "images can't be trained on"),
    ],
)
def test_malformed_rows_name_file_and_line(tmp_path, row, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(OK)}\n\n{json.dumps(row)}\n{json.dumps(OK)}\n")
    with pytest.raises(DataError, match=rf"{path}:3: .*{message}"):
        preference_rows(read_rows(path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "p"}, "column 'prompt' is missing"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": 3}, "prompt is of type int"),
        ({"prompt": [{"role": "user"}]}, "has no content"),
    ],
)
def test_malformed_prompts_name_file_and_line(tmp_path, row, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{json.dumps({'prompt': 'p'})}\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match=rf"{path}:2: .*{message}"):
        prompt_rows(read_rows(path))


def test_a_call_of_a_tool_needs_no_content():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "fox"}}]}
    (row,) = preference_rows(Rows("here", [{**CHAT, "chosen": [call]}]))
    assert row.chosen == [{**call, "content": None}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {**CHAT, "chosen": [{"role": "forbidden", "content": "x"}]},
            "TemplateError: no such role",
        ),
        ({**CHAT, "chat_template_kwargs": {"tokenize": False}}, "can't render this.*tokenize"),
        ({**OK, "chosen": "\ud800"}, "can't render this"),
    ],
)
def test_rows_that_cannot_be_rendered_are_named(row, message, tokenizer):
    with pytest.raises(DataError, match=rf"here, row 1 \(counting from 0\): .*{message}"):
        tokenize([OK, row], tokenizer)


def test_tokenizers_that_lack_something_are_refused():
    with pytest.raises(DataError, match=r"here, row 0 .*no chat template"):
        tokenize(CHATS, make_tokenizer(chat_template=None))
    endless = make_tokenizer()
    endless.eos_token = None
    with pytest.raises(DataError, match=r"here, row 0 .*no end token"):
        tokenize(STRINGS, endless)
    mixed = PreferenceRow("here", "p", [a("c")], [a("r")])
    with pytest.raises(DataError, match="different formats"):
        tokenize_dataset([mixed], make_tokenizer(), max_length=None, progress=False)


def test_render_prompt_gives_the_ids_of_training(tokenizer):
    (pair,) = tokenize(CHATS[1:], tokenizer).pairs
    assert render_prompt(CHATS[1]["prompt"], tokenizer) == pair.prompt_ids
    options = {"tools": [TOOL], "chat_template_kwargs": {"think": True}}
    ids = render_prompt(CHAT["prompt"], tokenizer, **options)
    assert tokenizer.decode(ids).endswith("<think></think>") and "fox" in tokenizer.decode(ids)
    plain = render_prompt("The sky", tokenizer)
    assert tokenizer.decode(plain) == "The sky"
    assert render_prompt("The sky", tokenizer, as_chat=True) == render_prompt(
        [u("The sky")], tokenizer
    )
    assert render_prompt("The sky", make_tokenizer(None), as_chat=True) == plain


def test_prompt_rows_take_strings_and_messages():
    rows = prompt_rows(
        Rows("here", [{"prompt": "p", "id": 4}, {"prompt": [u("x")], "tools": "[1]"}])
    )
    assert [(r.prompt, r.tools, r.extra) for r in rows] == [
        ("p", None, {"id": 4}),
        ([u("x")], [1], {}),
    ]
    assert rows[1].where == "here, row 1 (counting from 0)"


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = [{k: v + " é\u2028\n\n" for k, v in row.items()} for row in STRINGS]
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    with open(tmp_path / "c.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)
    dataset = Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "d.parquet")
    dataset.save_to_disk(tmp_path / "e")
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "f")
    for name in ("a.jsonl", "b.json", "c.csv", "d.parquet", "e", "f"):
        assert read_rows(tmp_path / name).rows == rows, name
    assert read_rows(tmp_path / "f", split="test").rows == rows[:1]
    assert read_rows(tmp_path / "f", default="test").rows == rows[:1]
    assert read_rows(tmp_path / "e", default="test").rows == rows
    assert read_rows(tmp_path / "a.jsonl").lines == [1, 2, 3, 4, 5]
    with pytest.raises(DataError, match=r"no split 'val'.*\['test', 'train'\]"):
        read_rows(tmp_path / "f", split="val")
    for name in ("a.jsonl", "d.parquet", "e"):  # "train" too: nothing says that they are it
        with pytest.raises(DataError, match=rf"{name}: a f.* has no splits, but split='train'"):
            read_rows(tmp_path / name, split="train")


def test_csv_values_stay_strings_and_rows_keep_their_lines(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,chosen,rejected\n"two\nlines",42,null\n\n,c,r\n')
    rows = read_rows(path)
    assert rows.rows[0] == {"prompt": "two\nlines", "chosen": "42", "rejected": "null"}
    with pytest.raises(DataError, match=rf"{path}:5: prompt is empty"):
        preference_rows(rows)
    path.write_text("prompt,chosen,rejected\np,{},r\n".format("x" * 200_000))
    assert len(read_rows(path).rows[0]["chosen"]) == 200_000


GOOD_LINE = json.dumps(OK).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "x.jsonl: the file is empty"),
        ("x.jsonl", b" \n\n", "x.jsonl: the file is empty"),
        ("x.jsonl", GOOD_LINE * 2 + GOOD_LINE[:20], "x.jsonl:3: not valid JSON.*cut short"),
        ("x.jsonl", GOOD_LINE + b"[1]\n", "x.jsonl:2: a JSON list, not an object"),
        ("x.jsonl", b"\n" + b"[" * 200_000, "x.jsonl:2: not valid JSON"),
        ("x.jsonl", GOOD_LINE + b'{"prompt": "\xff"}\n', "x.jsonl:2: not UTF-8"),
        ("x.jsonl", json.dumps(OK).encode("utf-16"), "x.jsonl:1: not UTF-8"),
        ("x.json", b"", "x.json: the file is empty"),
        ("x.json", b"[]", "x.json: there are no rows"),
        ("x.json", b'[{"prompt": "a"},', "x.json: not valid JSON.*cut short"),
        ("x.json", GOOD_LINE * 2, "x.json: not valid JSON.*name it .jsonl"),
        ("x.json", b'{"prompt": "a"}', "x.json: a JSON dict. Write a list"),
        ("x.json", b'[{"prompt": "a"}, 3]', "x.json, row 1 .*a JSON int, not an object"),
        ("x.csv", b"prompt,chosen\n", "x.csv: there are no rows"),
        ("x.csv", b"prompt,chosen\na,b\na,b,c\n", "x.csv:3: 3 fields, the header has 2"),
        ("x.csv", b'prompt,chosen\na,"b\n', "x.csv:2: not valid CSV.*cut-off"),
        ("x.csv", b"prompt\n\xe9\n", "x.csv:2: not UTF-8"),
        ("x.parquet", b"PAR1 and no more", "x.parquet: can't be read as Parquet"),
        ("x.parquet", b"", "x.parquet: can't be read as Parquet"),
        ("x.txt", b"hello", "x.txt: unknown file type '.txt'"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(path)


@pytest.mark.parametrize(
    "name", ["no.jsonl", "data/no.json", "./no", "/no/such", "a/b/c", "~/no.x"]
)
def test_missing_files_do_not_become_hub_names(name, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match=f"^{name}: no such file or directory"):
        read_rows(name)


def test_unreadable_places(tmp_path, monkeypatch):
    (tmp_path / "some").mkdir()
    with pytest.raises(DataError, match=r"some: not a readable dataset directory.*save_to_disk"):
        read_rows(tmp_path / "some")

    def denied(self):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.jsonl").write_bytes(GOOD_LINE)
    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    with pytest.raises(DataError, match=r"x\.jsonl: can't be read \(Permission denied\)"):
        read_rows(tmp_path / "x.jsonl")


def test_hub_names(monkeypatch):
    from datasets import Dataset

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return Dataset.from_list([OK])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_rows("org/some-data.v1", split="test").rows == [OK]
    assert asked == [("org/some-data.v1", "test")]
    assert read_rows("org/some-data.v1").rows == [OK] and asked[1][1] == "train"
    assert read_rows("org/some-data.v1", default="test").rows == [OK] and asked[2][1] == "test"
    assert read_rows("imdb").where(0) == "imdb, row 0 (counting from 0)"

    def unreachable(name, split):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"org/data: .*split 'train'.*ConnectionError: no route\).*network"
    ):
        read_rows("org/data")


def test_the_progress_bar_can_be_turned_off(tokenizer, capsys):
    rows = preference_rows(Rows("here", CHATS))
    tokenize_dataset(rows, tokenizer, max_length=None, progress=False)
    assert capsys.readouterr().err == ""
    tokenize_dataset(rows, tokenizer, max_length=None)
    assert "tokenizing" in capsys.readouterr().err
