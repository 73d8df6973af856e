# pyright: reportAttributeAccessIssue=false
# pyright: reportAttributeAccessIssue=false
# pyright: reportAttributeAccessIssue=false
"""Datasets of every shape: which columns tell it, what is refused, and the tokens of each."""

import csv
import json
import warnings

import pytest
from test_data import CHATS, STRINGS, a, make_tokenizer, u

from fastdpo.cli import datasets, main
from fastdpo.cli.stages import TrainCommand
from fastdpo.data.records import LabeledRow, PreferenceRow, RankedRow
from fastdpo.data.rows import Rows, example_rows, read_rows
from fastdpo.data.tokenize import tokenize_dataset
from fastdpo.errors import ConfigError, DataError

SKY, SEA = "What color is the sky?", "What color is the sea?"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def tokenize(rows, tokenizer, max_length=None, **options):
    given = example_rows(Rows("here", rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenize_dataset(given, tokenizer, max_length=max_length, progress=False, **options)


def texts(example, tokenizer):
    return [
        tuple(map(tokenizer.decode, sides)) for sides in zip(example.prompts, example.responses)
    ]


LIST = {"prompt": SKY, "responses": [" Blue.", " Green?", " Blue."], "scores": [2, -1.5, 0]}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (STRINGS[0], PreferenceRow),
        ({"chosen": "one, two", "rejected": "one, three"}, PreferenceRow),
        ({**STRINGS[0], "responses": ["a", "b"], "completion": "c"}, PreferenceRow),
        ({"i_chosen": "a", "r_chosen": "b", "i_reject": "c", "r_reject": "d"}, PreferenceRow),
        ({"prompt_chosen": "a", "chosen": "b", "prompt_rejected": "c", "rejected": "b"},
         PreferenceRow),
        (LIST, RankedRow),
        ({"prompt": "a", "completion": "b", "label": True}, LabeledRow),
    ],
)  # fmt: skip
def test_columns_tell_the_shape(row, kind):
    (found,) = example_rows(Rows("here", [row]))
    assert type(found) is kind


def test_columns_of_pairs_that_count(tokenizer, tmp_path):
    numbers = {"weight": 0.5, "margin": -2, "label_smoothing": 0.25, "score_chosen": 1e-3,
               "score_rejected": 0}  # fmt: skip
    rows = [
        {**STRINGS[0], **numbers, "id": "7"},
        {**STRINGS[0], "weight": None, "score_chosen": None},
    ]
    first, second = tokenize(rows, tokenizer).examples
    assert {name: getattr(first, name) for name in numbers} == numbers
    assert first.extra == {"id": "7"} and first.scores == [1e-3, 0.0]
    assert (second.weight, second.margin, second.scores, second.extra) == (1.0, 0.0, None, {})
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows([rows[0], {**STRINGS[0], "weight": "", "id": ""}])
    (one, other) = example_rows(read_rows(path))
    assert one.numbers == numbers and other.numbers == {}


@pytest.mark.parametrize(
    ("row", "near"),
    [
        ({**STRINGS[0], "weights": 2.0}, {"weights": "weight"}),
        ({**STRINGS[0], "Margin": 1, "lable_smoothing": 0.1},
         {"Margin": "margin", "lable_smoothing": "label_smoothing"}),
        ({**STRINGS[0], "chosen_score": 2, "rejectedScore": 1},
         {"chosen_score": "score_chosen", "rejectedScore": "score_rejected"}),
        ({"chosen": "ab", "rejected": "ac", "prompts": "x"}, {"prompts": "prompt"}),
        ({**LIST, "margins": [1, 2]}, {"margins": "margin"}),
        ({"prompt": "a", "completion": "b", "label": True, "wieght": 2}, {"wieght": "weight"}),
        # A name that stands for what is there too, without a value, or for something else.
        ({**STRINGS[0], "margin": 1, "margins": "wide"}, {}),
        ({**STRINGS[0], "weights": None, "margins": ""}, {}),
        ({**STRINGS[0], "prompt_id": 1, "height": 2, "score": 3, "source_chosen": "x",
          "messages": [u("a")], "chosen_rating": 5, "origin": "y", "tags": ["z"]}, {}),
    ],
)  # fmt: skip
def test_columns_called_nearly_as_one_that_counts(row, near):
    """Each is told of once, whatever the number of rows; all are kept."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = example_rows(Rows("here", [row] * 3))
    told = sorted(str(x.message) for x in caught)
    assert told == [
        f"here: the column {name!r} is not read; {meant!r} would be. Rename it if that is what it "
        "holds."
        for name, meant in sorted(near.items())
    ]
    assert near.keys() <= found[0].extra.keys()


def test_a_hand_made_column_of_tokenized_pairs(tokenizer, tmp_path):
    row = {"prompt_index": 0, "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3],
           "score_chosen": None, "score_rejected": None, "chosen_finish": "stop",
           "rejected_finish": "stop", "smoothing": 0.25, "weights": 2.0}  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    config = TrainCommand(model="m", dataset=str(path))
    with pytest.warns(UserWarning, match="'weights' is not read; 'weight' would be"):
        (pair,) = datasets.read_examples(config, "dataset", read_rows(path), tokenizer).examples
    assert (pair.weight, pair.label_smoothing) == (1.0, 0.25)  # by its name of before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**STRINGS[0], "smoothing": 0.1}, "no column .* Rename it to label_smoothing"),
        ({**LIST, "smoothing": 0.1}, "smoothing is no column that is read"),
        ({**STRINGS[0], "weight": -1}, "weight is -1. Write a finite number >= 0, or leave it out"),
        ({**STRINGS[0], "label_smoothing": "2"}, "label_smoothing is '2'. Write a number from"),
        ({**STRINGS[0], "margin": float("inf")}, "margin is inf. Write a finite number, or leave"),
        ({**STRINGS[0], "score_chosen": "best"}, "score_chosen is 'best'. Write a finite number"),
        ({**STRINGS[0], "score_rejected": True}, "score_rejected is True. Write a finite number"),
        ({"prompt_chosen": "a", "chosen": "b", "rejected": "c"}, "'prompt_rejected' is missing"),
        ({**STRINGS[0], "prompt_chosen": "a", "prompt_rejected": "b"},
         "prompt is beside prompt_chosen and prompt_rejected"),
        ({"prompt_chosen": [u("a")], "chosen": "b", "prompt_rejected": "c", "rejected": "d"},
         "its prompt is a message list and chosen a string"),
        ({"prompt_chosen": [u("a")], "chosen": [a("b")], "prompt_rejected": "c", "rejected": "d"},
         "one prompt is a string and the other a message list"),
        ({"chosen": "ab", "rejected": "ac", "initial_reason_steps": "x"}, "needs a prompt before"),
        ({**STRINGS[0], "initial_reason_steps": ["x"]}, "initial_reason_steps is of type list"),
        ({**CHATS[1], "initial_reason_steps": "x"}, "chosen goes on after initial_reason_steps"),
        ({**LIST, "scores": [1, 2]}, "scores has 2 entries for 3 responses"),
        ({**LIST, "scores": [1, 2, None]}, "scores has None among its entries"),
        ({**LIST, "scores": "high"}, "scores is not valid JSON"),
        ({**LIST, "ranks": [1, 2, 3]}, "it has scores and ranks"),
        ({"prompt": SKY, "responses": ["a"]}, "scores, rewards .* and ranks .*it has .'prompt'"),
        ({"prompt": SKY, "responses": ["a", "b"], "ranks": [1, 1]}, "ranks are .1, 1., with ties"),
        ({"prompt": SKY, "responses": ["a", "b"], "ranks": [0, 1]}, "Write each of 1 to 2 once"),
        ({**LIST, "responses": {"a": 1}}, "responses is of type dict. Write a list"),
        ({**LIST, "responses": ["a", 4, "b"]}, r"responses\[1\] is of type int"),
        ({**LIST, "responses": ["a", [a("b")], "c"]}, r"its prompt is a string and responses\[1\]"),
        ({"prompt": [u("a")], "responses": [[u("a"), a("b")]], "scores": [1]},
         r"responses\[0\] repeats the messages of its prompt"),
        ({"responses": ["a", "b"], "scores": [0, 1]}, "column 'prompt' is missing"),
        ({"prompt": "a", "completion": "b"}, "column 'label' is missing"),
        ({"prompt": "a", "completion": "b", "label": 1}, "label is 1. Write true or false"),
        ({"prompt": "a", "completion": "b", "label": ""}, "label is ''. Write true or false"),
        ({"prompt": "a", "completion": [a("b")], "label": True}, "its prompt is a string and comp"),
        ({"completion": "b", "label": True}, "column 'prompt' is missing"),
    ],
)  # fmt: skip
def test_bad_rows_name_their_place(row, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(x) for x in (row,)) + "\n")
    with pytest.raises(DataError, match=f"^{path}:1: .*{message}") as found:
        example_rows(read_rows(path))
    assert "\n" not in str(found.value)


def test_a_row_of_another_shape_is_named():
    with pytest.raises(DataError, match=r"row 1 .*'responses' is missing"):
        example_rows(Rows("here", [LIST, STRINGS[0]]))


def test_ranks_are_scores(tokenizer):
    rows = [{"prompt": SKY, "responses": '[" a", " b", " c"]', "ranks": "[2, 3, 1]"}]  # of a CSV
    (one,) = tokenize(rows, tokenizer).examples
    assert one.scores == [1.0, 0.0, 2.0] and one.extra == {}


def test_lists_have_the_tokens_of_pairs(tokenizer):
    for row in (*STRINGS, *CHATS):
        pair = tokenize([row], tokenizer).examples[0]
        responses = [row["chosen"], row["rejected"], row["chosen"]]
        given = {"prompt": row["prompt"], "responses": responses, "scores": [2, 1, 0], "id": 1}
        (one,) = tokenize([given], tokenizer).examples
        assert one.prompt_ids == pair.prompt_ids and one.extra == {"id": 1}
        assert one.responses_ids == [pair.chosen_ids, pair.rejected_ids, pair.chosen_ids]
        for string_prompts in ("text", "chat"):
            options = {"string_prompts": string_prompts}
            pair = tokenize([row], tokenizer, **options).examples[0]
            (one,) = tokenize([given], tokenizer, **options).examples
            assert one.responses_ids[:2] == pair.responses


def test_single_responses_have_the_tokens_of_trl(tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    for given in (STRINGS, CHATS):
        rows = [
            {"prompt": x["prompt"], "completion": x[side], "label": side == "chosen"}
            for x in given
            for side in ("chosen", "rejected")
        ]
        args = trl.KTOConfig(
            output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none", max_length=None
        )
        trainer = trl.KTOTrainer(
            model=LlamaForCausalLM(config), ref_model=LlamaForCausalLM(config), args=args,
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        )  # fmt: skip
        names = ("prompt_ids", "completion_ids", "label")
        wanted = [tuple(x[name] for name in names) for x in trainer.train_dataset]
        ours = tokenize(rows, tokenizer).examples
        assert [(x.prompt_ids, x.response_ids, x.desirable) for x in ours] == wanted


def test_two_prompts_have_a_side_each(tokenizer):
    dove = {"i_chosen": SKY, "r_chosen": " Blue.", "i_reject": SEA, "r_reject": " Lazy."}
    (pair,) = tokenize([dove], tokenizer).examples
    wanted = [f"{SKY} Blue.<|im_end|>", f"{SEA} Lazy.<|im_end|>"]
    assert list(map("".join, texts(pair, tokenizer))) == wanted and pair.extra == {}
    assert tokenizer.decode(pair.prompt_ids) == SKY[:-1]  # its last letter merges
    names = {"i_chosen": "prompt_chosen", "r_chosen": "chosen", "i_reject": "prompt_rejected",
             "r_reject": "rejected"}  # fmt: skip
    (again,) = tokenize([{names[x]: y for x, y in dove.items()}], tokenizer).examples
    assert again == pair
    # One response to two prompts; and one prompt twice, which is a plain pair.
    same = {**dove, "r_reject": " Blue."}
    (pair,) = tokenize([same], tokenizer).examples
    assert pair.rejected_ids == pair.chosen_ids and pair.rejected_prompt_ids is not None
    (plain,) = tokenize([{**dove, "i_reject": SKY}], tokenizer).examples
    assert plain.rejected_prompt_ids is None
    chat = {"prompt_chosen": [u(SKY)], "chosen": [a("Blue.")], "prompt_rejected": [u(SEA)],
            "rejected": [a("Lazy.")]}  # fmt: skip
    (pair,) = tokenize([chat], tokenizer).examples
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert [x for x, _ in texts(pair, tokenizer)] == [turn.format(SKY), turn.format(SEA)]
    (as_chat,) = tokenize([{**dove, "r_chosen": "Blue.", "r_reject": "Lazy."}], tokenizer,
                          string_prompts="chat").examples  # fmt: skip
    assert as_chat == pair
    # Each side is cut where its own prompt leaves off.
    room = len(pair.prompt_ids) + 3
    longer = {**chat, "prompt_rejected": [u(f"{SEA} {SEA}")]}
    result = tokenize([longer, chat], tokenizer, max_length=room)
    assert result.dropped == {"responses truncated to nothing": 1} and result.truncated == 1
    (cut,) = result.examples
    assert cut.longest == room and cut.chosen_ids == pair.chosen_ids[:3]


STEP = {"initial_reason_steps": "First, look up.\n", "chosen": "It is blue.", "rejected": "No."}


@pytest.mark.parametrize("prompt", [SKY, [u(SKY)]])
def test_next_steps_go_on_in_the_same_turn(prompt, tokenizer):
    opening = f"<|im_start|>user\n{SKY}<|im_end|>\n<|im_start|>assistant\n"
    opening = SKY if prompt is SKY else opening
    (pair,) = tokenize([{"prompt": prompt, **STEP}], tokenizer).examples
    steps = STEP["initial_reason_steps"]
    assert texts(pair, tokenizer) == [
        (opening + steps, "It is blue."), (opening + steps, "No."),
    ]  # fmt: skip
    (first,) = tokenize([{"prompt": prompt, **STEP, "initial_reason_steps": None}], tokenizer).pairs
    assert texts(first, tokenizer) == [(opening, "It is blue."), (opening, "No.")]
    if prompt is SKY:
        (chat,) = tokenize([{"prompt": prompt, **STEP}], tokenizer, string_prompts="chat").pairs
        ((whole, _), _) = texts(chat, tokenizer)
        assert whole == f"<|im_start|>user\n{SKY}<|im_end|>\n<|im_start|>assistant\n{steps}"
    else:
        spoken = {name: [a(STEP[name])] for name in ("chosen", "rejected")}
        (same,) = tokenize([{"prompt": prompt, **STEP, **spoken}], tokenizer).pairs
        assert same == pair
        answer = a(steps + STEP["chosen"])
        wanted = tokenizer.apply_chat_template(
            [*prompt, answer], continue_final_message=True, return_dict=True
        )["input_ids"]
        assert pair.prompt_ids + pair.chosen_ids == wanted
    last = {"prompt": prompt, **STEP, "append_eos": True}
    (ended,) = tokenize([last], tokenizer).pairs
    assert texts(ended, tokenizer)[0][1] == "It is blue.<|im_end|>"


def test_next_steps_begin_as_the_template_does(tokenizer):
    """No second beginning token, and none where the template has none."""
    from tokenizers.processors import TemplateProcessing

    rows = [{"prompt": [u(SKY)], **STEP}]
    plain = tokenize(rows, tokenizer).pairs
    begins = make_tokenizer()
    begins.bos_token = "<|im_start|>"
    begins._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begins.bos_token_id)]
    )
    assert tokenize(rows, begins).pairs == plain


def test_lists_that_cannot_be_trained_on_are_dropped_and_counted(tokenizer):
    rows = [
        LIST,
        {**LIST, "responses": [" Blue."], "scores": [1]},
        {**LIST, "responses": [], "scores": []},
        {**LIST, "responses": [" Blue.", "", " Green."]},
        {**LIST, "responses": [" Blue.", " Blue.", " Blue."]},
    ]
    result = tokenize(rows, tokenizer)
    assert len(result.examples) == 1 and result.dropped == {
        "fewer than 2 responses": 2, "empty response": 1, "identical responses": 1,
    }  # fmt: skip
    assert str(result).startswith("1 lists, 0 truncated")
    with pytest.raises(DataError, match=r"no list is left .*Give lists of two or more responses"):
        tokenize(rows[1:], tokenizer)
    with pytest.raises(DataError, match=r"prompt and responses\[1\] have .* overlong=truncate"):
        tokenize([LIST], tokenizer, max_length=9, overlong="stop")


def test_published_lists_by_prompt(tmp_path):
    path = tmp_path / "lists.json"
    path.write_text(json.dumps({SKY: {"responses": ["a", "b"], "rewards": [4, 6]}}))
    (row,) = example_rows(read_rows(path))
    assert (row.prompt, row.responses, row.scores) == (SKY, ["a", "b"], [4.0, 6.0])
    path.write_text(json.dumps({SKY: {"chosen": "a"}}))
    with pytest.raises(DataError, match=r"a JSON dict. Write a list of objects"):
        read_rows(path)


# ------------------------------------------------------------------------------- in fastdpo train
def command(path, **options):
    return TrainCommand(model="here", dataset=str(path), **options)


def read(path, rows, tokenizer, monkeypatch, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(datasets, "stop_ids", lambda *_: None)
    config = command(path, **options)
    return datasets.read_examples(config, "dataset", read_rows(path), tokenizer).examples


def test_options_of_what_is_scored(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": SKY, "chosen": " It is blue.", "rejected": " It is lazy."}
    args = (path, [row], tokenizer, monkeypatch)
    (plain,) = read(*args)
    (joint,) = read(*args, prompt_in_likelihood=True)
    assert joint.prompt_ids == plain.prompt_ids[:1]
    assert joint.chosen_ids == plain.prompt_ids[1:] + plain.chosen_ids
    (late,) = read(*args, from_first_difference=True)
    assert late.chosen_ids[0] != late.rejected_ids[0]
    assert late.prompt_ids + late.chosen_ids == plain.prompt_ids + plain.chosen_ids
    assert len(late.prompt_ids) > len(plain.prompt_ids)
    with pytest.raises(
        ConfigError, match=r"^from_first_difference=True must be left out: pairs al"
    ):
        read(path, [LIST], tokenizer, monkeypatch, from_first_difference=True)
    with pytest.raises(
        ConfigError, match=r"from_first_difference=True .*with prompt_in_likelihood"
    ):
        command(path, from_first_difference=True, prompt_in_likelihood=True)
    with pytest.raises(
        ConfigError, match=r"^prompt_in_likelihood=True .* with loss_type=orpo, whi"
    ):
        command(path, prompt_in_likelihood=True, loss_type="orpo")
    for name in ("prompt_in_likelihood", "from_first_difference"):
        with pytest.raises(
            ConfigError, match=rf"^{name}=True .* loss_type=kto, which estimates a K"
        ):
            command(path, loss_type="kto", **{name: True})
        assert command(path, loss_type="bco", **{name: True}).objective.shift_is == "mean_reward"
    dove = {"i_chosen": SKY, "r_chosen": " Blue.", "i_reject": SEA, "r_reject": " Lazy."}
    (pair,) = read(path, [dove], tokenizer, monkeypatch, prompt_in_likelihood=True)
    for response, text in zip(pair.responses, (f"{SKY} Blue.", f"{SEA} Lazy.")):
        assert tokenizer.decode(pair.prompt_ids + response) == f"{text}<|im_end|>"


def test_lists_that_pair_wrote_are_taken_as_they_are(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "lists.jsonl"
    row = {"prompt_index": 3, "prompt_ids": [5], "responses_ids": [[6, 7], [8]], "scores": [2, 1]}
    (one,) = read(path, [row], tokenizer, monkeypatch)
    assert (one.prompt_ids, one.responses_ids, one.scores) == ([5], [[6, 7], [8]], [2, 1])
    with pytest.raises(
        ConfigError, match=r"max_length=2, but dataset=.* has a sequence of 3 tokens"
    ):
        read(path, [row], tokenizer, monkeypatch, max_length=2)
    with pytest.raises(DataError, match=r"lists.jsonl:1: scores must be a list of 2 numbers"):
        read(path, [{**row, "scores": [2]}], tokenizer, monkeypatch)


@pytest.mark.parametrize("loss_type", ["lipo_lambda", "apo_zero_unpaired"])
def test_every_shape_is_trained_on(loss_type, tmp_path, capsys):
    from tiny import LLAMA, save_tiny

    model, path, out = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out"
    save_tiny(LLAMA, model)
    rows = [{**LIST, "prompt": f"number {i}"} for i in range(4)]
    if loss_type != "lipo_lambda":
        rows = [{"prompt": f"number {i}", "completion": " be nice", "label": i < 2}
                for i in range(4)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "train", f"--model={model}", f"--dataset={path}", f"--output_dir={out}",
        f"--loss_type={loss_type}", "--bf16=false", "--batch_size=2", "--max_length=64",
        "--max_tokens=300", "--gradient_checkpointing=false", "--reference_cache=null",
    ]  # fmt: skip
    assert main(argv) == 0
    facts = json.loads((out / "data.json").read_text())
    shape = "lists" if loss_type == "lipo_lambda" else "singles"
    assert facts[shape] == 4 and facts["mean_length_response"] > 0
    assert facts["responses"] == (12 if loss_type == "lipo_lambda" else 4)
    path.write_text("".join(json.dumps(STRINGS[0]) + "\n" for _ in range(3)))
    if loss_type == "lipo_lambda":
        assert main([*argv, f"--output_dir={out}2"]) == 2
        assert "takes lists" in capsys.readouterr().err
