"""Judges: models here and on servers that compare the responses of a prompt."""

import json
from typing import Any

import pytest
import torch
from scoring_server import (
    CHAT,
    QUICK,
    TEXTS,
    Server,
    candidate,
    length_judge,
    run_score,
    said,
    top,
    write_candidates,
)
from stages import file_bytes
from tiny import LLAMA, build_tokenizer, save_tiny

from fastdpo.data.parts import read_candidates
from fastdpo.errors import DataError
from fastdpo.model.load import load_causal_lm, policy_digest
from fastdpo.remote import RemoteError
from fastdpo.score.judge import JUDGE_TEMPLATE, Judge
from fastdpo.score.load import load_scorer

torch.set_num_threads(1)


def test_both_orders_are_averaged():
    asked = []

    def first_wins(texts: list[str]) -> list[float]:
        asked.extend(texts)
        return [0.9] * len(texts)

    judge = Judge(first_wins)
    wins = judge.compare(["p", "p"], ["a", "same"], ["b", "same"])
    assert wins == pytest.approx([0.5, 0.5])
    assert len(asked) == 2  # the same responses are a tie without a question
    assert "[Answer A]\na\n" in asked[0] and "[Answer B]\nb\n" in asked[0]
    assert "[Answer A]\nb\n" in asked[1] and "[Answer B]\na\n" in asked[1]


def test_a_response_scores_its_mean_win_probability():
    # The two prompts' rows are mixed; they are never compared with each other.
    rows = [
        candidate(0, 0, "a"),
        candidate(1, 0, "xxxx"),
        candidate(0, 1, "bbb"),
        candidate(1, 1, "y"),
        candidate(0, 2, "cccc"),
        candidate(2, 0, "alone"),
    ]
    values = Judge(length_judge)(rows)
    by_hand = [(0.3 + 0.2) / 2, 0.8, (0.7 + 0.4) / 2, 0.2, (0.8 + 0.6) / 2, 0.5]
    assert values == pytest.approx(by_hand)


def test_a_conversation_names_its_roles():
    text = Judge(length_judge)._text(CHAT, "one", "two {first}")
    assert "[Message]\nuser: hi\n\nassistant: yes?\n" in text and "two {first}" in text
    assert "[Message]\nhi\n" in Judge(length_judge)._text(CHAT[:1], "one", "two")


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return save_tiny(LLAMA, tmp_path_factory.mktemp("judge") / "model")


@pytest.mark.parametrize("template", [True, False])
def test_a_local_judge_reads_the_letters(causal, tmp_path, template):
    folder, tokenizer = causal, build_tokenizer()
    model = load_causal_lm(str(folder)).double()
    if not template:  # where the letters are words of their own
        folder = tmp_path / "plain"
        tokenizer.chat_template = None
        tokenizer.add_tokens([" A", " B"])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            model.lm_head.weight[-2:] = torch.randn(2, 32)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    scorer = load_scorer(f"judge:{folder}", dtype=torch.float64, batch_size=3)
    weights = {"weights": policy_digest(str(folder)), "dtype": "float64"}
    assert scorer.on == "rows" and scorer.settings == {"template": JUDGE_TEMPLATE, **weights}
    texts = ["no idea", "be nice to the beach, and the weather", "a"]
    values = scorer([candidate(0, j, text) for j, text in enumerate(texts)])

    def wins(first: str, second: str) -> float:
        question = JUDGE_TEMPLATE.format(prompt="Prompt 0", first=first, second=second)
        text, space = question + "\nAnswer:", " "
        if template:
            text, space = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", ""
        ids = tokenizer(text=text)["input_ids"]
        a, b = (tokenizer(text=text + space + x)["input_ids"][-1] for x in "AB")
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        return torch.sigmoid(logits[a] - logits[b]).item()

    def both(first: str, second: str) -> float:
        return (wins(first, second) + 1 - wins(second, first)) / 2

    for i, text in enumerate(texts):
        others = [both(text, other) for j, other in enumerate(texts) if j != i]
        assert values[i] == pytest.approx(sum(others) / 2, abs=1e-6)
    assert sum(values) == pytest.approx(1.5) and max(values) - min(values) > 1e-3
    assert scorer.compare is not None
    (forward,) = scorer.compare(["Prompt 0"], [texts[0]], [texts[1]])
    (backward,) = scorer.compare(["Prompt 0"], [texts[1]], [texts[0]])
    assert forward == pytest.approx(both(*texts[:2]), abs=1e-6)
    assert forward + backward == pytest.approx(1.0)


def test_a_judge_scores_candidates_and_its_template_is_in_the_plan(causal, tmp_path):
    write_candidates(tmp_path / "candidates", TEXTS)
    values = run_score(load_scorer(f"judge:{causal}"), tmp_path)
    assert [sum(values[i : i + 3]) for i in (0, 3, 6)] == pytest.approx([1.5] * 3)
    short = "{prompt}? {first} or {second}?"
    with pytest.raises(DataError, match="another settings"):
        run_score(load_scorer(f"judge:{causal}", judge_template=short), tmp_path)
    with pytest.raises(DataError, match=r"ModelError.*positions"):
        scorer = load_scorer(f"judge:{causal}")
        write_candidates(tmp_path / "candidates", [["a", "b c d " * 5000]])
        run_score(scorer, tmp_path, "long")


@pytest.mark.parametrize(
    "template",
    ["{prompt} {first}", "{first} {second}", "{prompt} {first} {second} {third}", "{0}", "{", ""],
)
def test_templates_need_their_fields(template):
    with pytest.raises(ValueError, match="judge_template"):
        load_scorer("judge:http://127.0.0.1:1/v1#m", judge_template=template)


def test_a_remote_judge(tmp_path):
    write_candidates(tmp_path / "candidates", TEXTS)

    def answer(_: int, body: Any) -> Any:
        (message,) = body["messages"]
        (win,) = length_judge([message["content"]])
        return top(The=0.4, A=0.6 * win + 1e-9, B=0.6 * (1 - win) + 1e-9)

    with Server(answer) as server:
        scorer = load_scorer(f"judge:{server.url}/v1#some/model")
        values = run_score(scorer, tmp_path)
        local = Judge(length_judge)
        rows = list(read_candidates(tmp_path / "candidates").values())
        assert values == pytest.approx(local(rows), abs=1e-6)
        assert len(server.requests) == 3 * 6
        path, _, body = server.requests[0]
        assert path == "/v1/chat/completions" and body["model"] == "some/model"
        assert body["temperature"] == 0 and body["logprobs"] is True


@pytest.mark.parametrize(
    ("answers", "win"),
    [
        ([top(A=0.8, B=0.2), top(A=0.4, B=0.6)], 0.7),
        ([top(A=0.5, **{" A": 0.3, "B": 0.2}), top(A=0.4, B=0.6)], 0.7),  # with a space too
        ([top(A=0.9), top(B=0.9)], 1.0),  # what isn't listed counts nothing
        ([said("B"), said("A.")], 0.0),
        ([said(" A"), said("B", {"content": None})], 1.0),
        ([said("A"), said("A")], 0.5),
    ],
)
def test_what_a_remote_judge_says(answers, win):
    with Server(lambda number, _: answers[number]) as server:
        scorer = load_scorer(f"judge:{server.url}/v1/#m", remote=QUICK)
        assert scorer.compare is not None
        assert scorer.compare(["p"], ["x"], ["y"]) == pytest.approx([win])
        assert server.requests[0][0] == "/v1/chat/completions"


def test_undecided_answers_are_ties_and_counted(caplog):
    answers = [top(Maybe=0.9, C=0.1), said(""), top(A=0.75, B=0.25), top(A=0.75, B=0.25)]
    with Server(lambda number, _: answers[number]) as server:
        scorer = load_scorer(f"judge:{server.url}/v1#m", remote=QUICK)
        assert scorer.compare is not None
        wins = scorer.compare(["p", "p"], ["x", "x"], ["y", "z"])
    assert wins == pytest.approx([0.5, 0.5])
    assert "2 of 4 answers were neither A nor B" in caplog.text


THINKS = "<think>\nOkay, the"


@pytest.mark.parametrize("answer", [said(THINKS), top(**{"<think>": 0.99, "A": 1e-5}), said(None)])
def test_a_judge_that_thinks_first_is_refused(tmp_path, answer):
    """Nothing is written, nor kept: with thinking off the same questions have other answers."""
    write_candidates(tmp_path / "candidates", [["a", "bb", "ccc"]])
    thinks = [answer] * 4 + [said("A")] * 2
    with Server(lambda number, _: thinks[number] if number < 6 else said("A")) as server:
        scorer = load_scorer(f"judge:{server.url}/v1#qwen", remote=QUICK)
        with pytest.raises(DataError, match=r"4 of 6 answers of qwen were neither") as error:
            run_score(scorer, tmp_path)
        assert "thinking off" in str(error.value)
        assert ("<think>" in str(error.value)) == (answer != said(None))
        assert set(file_bytes(tmp_path / "scores")) <= {"plan.json", ".part-00000.jsonl.partial"}
        assert run_score(scorer, tmp_path) == [0.5] * 3
        assert len(server.requests) == 6 + 4


def tokens(*of: dict[str, float]) -> Any:
    """A chat completion with the log-probabilities of several tokens."""
    parts = [top(**x)["choices"][0]["logprobs"]["content"][0] for x in of]
    return said("".join(x["token"] for x in parts), {"content": parts})


@pytest.mark.parametrize(
    ("answer", "win"),
    [
        (said("**A**"), 1.0),
        (said('"b"'), 0.0),
        (said("a"), 1.0),
        (said(" b.\n"), 0.0),
        (said("(B)"), 0.0),
        (said("A is"), 1.0),
        (said("a better"), None),
        (said("Answer"), None),
        (said("Both"), None),
        (top(a=0.3, **{'"A': 0.3, "**B": 0.2}), 0.75),
        (top(Answer=0.5, An=0.3, Both=0.1), None),
        (tokens({"**": 0.9, "A": 0.1}, {"B": 0.8, "a": 0.2}), 0.2),
        (tokens({'"': 1.0}, {"(": 1.0}, {"a": 0.6, "B": 0.4}), 0.6),
        (tokens({"**": 1.0}), None),
        (top(The=0.999, A=0.0009), None),
    ],
)
def test_letters_in_lower_case_and_markup(answer, win):
    with Server(lambda *_: answer) as server:
        judge = load_scorer(f"judge:{server.url}/v1#m", remote=QUICK).function
        if win is None:
            with pytest.raises(RemoteError, match="1 of 1"):
                judge.ask(["?"])
        else:
            assert judge.ask(["?"]) == pytest.approx([win])


@pytest.mark.parametrize(
    "bad",
    [
        {"choices": []},
        {"error": "none"},
        [],
        {"choices": [{"message": None}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": None}]}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "A"}]}]}}]},
        (200, json.dumps(top(A=1.0, B=0.5)).replace("0.0", "NaN"), {}),
        (200, json.dumps(top(A=1.0, B=0.5)).replace("0.0", "1e9"), {}),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_malformed_completion_is_an_error(bad):
    with Server(lambda *_: bad) as server:
        scorer = load_scorer(f"judge:{server.url}/v1#m", remote=QUICK)
        with pytest.raises(RemoteError, match=r"answered .*, not "):
            scorer([candidate(0, 0, "x"), candidate(0, 1, "y")])
        assert len(server.requests) <= 2
