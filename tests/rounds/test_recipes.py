"""The short ways to score and select, and the configuration of Storm-7B."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny import LLAMA, QWEN, build_tokenizer, save_tiny

from fastdpo import recipes
from fastdpo.cli import main, parse
from fastdpo.data.rows import Rows, prompt_rows, read_rows
from fastdpo.model.load import load_causal_lm, load_tokenizer
from fastdpo.model.logps import load_packed
from fastdpo.recipes import nectar
from fastdpo.recipes.relevance import length_incentive, open_ended, repetition_penalty
from fastdpo.score.follow_up import NEGATIVE, POSITIVE, follow_up_scores
from fastdpo.score.load import load_scorer

STORM = Path(recipes.__file__).parent / "storm-7b.yaml"

# Follow-ups


def mean_logp(model, head: list[int], tail: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([head + tail])).logits[0]
    logp = torch.log_softmax(logits[len(head) - 1 : -1], -1)
    return logp.gather(1, torch.tensor(tail)[:, None]).mean().item()


@pytest.mark.parametrize("template", [True, False])
def test_follow_ups_by_hand(tmp_path, template):
    folder = save_tiny(QWEN if template else LLAMA, tmp_path / "model")
    tokenizer = load_tokenizer(str(folder))
    if not template:
        tokenizer.chat_template = None
    packed = load_packed(str(folder), dtype=torch.float64)
    prompts = ["the weather?", [{"role": "user", "content": "no"}], "walks"]
    responses = ["be nice", "long walks on the beach", ""]
    kinds = {"positive": ["nice.", "be nice, no?", "all"], "negative": ["no idea", "about me"]}
    values = follow_up_scores(packed, tokenizer, prompts, responses, batch_size=2, **kinds)
    model = load_causal_lm(str(folder), dtype=torch.float64).eval()

    def after(prompt, response: str, follow_up: str) -> float:
        text = prompt if isinstance(prompt, str) else prompt[0]["content"]
        before = f"{text}\n{response}\n"
        if template:
            before = (
                f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>\n"
                "<|im_start|>user\n"
            )
        head = tokenizer(text=before)["input_ids"]
        return mean_logp(model, head, tokenizer(text=before + follow_up)["input_ids"][len(head) :])

    for prompt, response, value in zip(prompts, responses, values):
        good = [after(prompt, response, x) for x in kinds["positive"]]
        bad = [after(prompt, response, x) for x in kinds["negative"]]
        assert value == pytest.approx(sum(good) / 3 - sum(bad) / 2, abs=1e-9)
    assert len(set(values)) == 3
    assert follow_up_scores(packed, tokenizer, [], []) == []
    swapped = follow_up_scores(
        packed, tokenizer, prompts, responses, positive=NEGATIVE, negative=POSITIVE
    )
    default = follow_up_scores(packed, tokenizer, prompts, responses)
    assert default == pytest.approx([-x for x in swapped])
    if template:
        scorer = load_scorer(f"follow_up:{folder}", dtype=torch.float64)
        assert scorer(prompts, responses) == pytest.approx(default)


def test_follow_ups_need_both_kinds():
    with pytest.raises(ValueError, match="at least one follow-up"):
        follow_up_scores(None, None, ["p"], ["r"], positive=[])


def test_a_follow_up_that_merges_with_what_is_before_it_is_refused(tmp_path):
    folder = save_tiny(LLAMA, tmp_path / "model")
    tokenizer, packed = build_tokenizer(), load_packed(str(folder))
    tokenizer.chat_template = None
    tokenizer.add_tokens(["\nno"])
    with pytest.raises(ValueError, match="joins 'no' with the text before"):
        follow_up_scores(packed, tokenizer, ["p"], ["r"], positive=["no"], negative=["all"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="template changes 'all'"):
        follow_up_scores(packed, tokenizer, ["p"], ["r"], positive=["all"], negative=["all"])


# Relevance


def test_relevance_terms_by_hand():
    assert length_incentive("") == 0 and repetition_penalty("") == 1
    assert length_incentive("It's 3.5, isn't it?") == 12 / 100  # It ' s 3 . 5 , isn ' t it ?
    assert repetition_penalty("a b") == 1
    assert repetition_penalty("a b c a b c") == 3 / 4
    assert repetition_penalty("no " * 50) == 1 / 48
    assert open_ended(["p"], ["a b c a b c"]) == [6 / 100 * 3 / 4]
    scorer = load_scorer("fastdpo.recipes.relevance:open_ended")
    assert scorer(["p", "p"], ["one two", ""]) == [0.02, 0.0]


# Nectar


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("\n\nHuman: Why?\n\nAssistant: ", ["Why?"]),
        ("\n\nHuman: Why?\n\nAssistant:", ["Why?"]),
        ("Human: Two\n\nparagraphs\n\nAssistant: ", ["Two\n\nparagraphs"]),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c \n\nAssistant: ", ["a", "b", "c"]),
        ("\n\nHuman: say Human: hi\n\nAssistant: ", ["say Human: hi"]),
        ("\n\nHuman: a\n\nAssistant: half an answer", None),
        ("\n\nHuman: a", None),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: ", None),
        ("\n\nAssistant: a\n\nHuman: b\n\nAssistant: ", None),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: ", None),
        ("\n\nHuman: \n\nAssistant: ", None),
        ("before\n\nHuman: a\n\nAssistant: ", None),
        ("plain", None),
        ("", None),
    ],
)
def test_nectar_turns(prompt, turns):
    found = nectar.messages(prompt)
    roles = ["user", "assistant", "user"]
    assert found == (
        turns and [{"role": role, "content": text} for role, text in zip(roles, turns)]
    )


def test_nectar_becomes_a_prompt_file(tmp_path, capsys):
    rows = [
        {"prompt": "\n\nHuman: one\n\nAssistant: ", "answers": [{"answer": "x", "rank": 1.0}]},
        {"prompt": "\n\nHuman: one\n\nAssistant: ", "answers": []},
        {"prompt": "odd", "answers": []},
        {"prompt": "\n\nHuman: two\n\nAssistant: ", "answers": []},
    ]
    source, out = tmp_path / "nectar.json", tmp_path / "prompts.jsonl"
    source.write_text(json.dumps(rows))
    assert nectar.main([str(out), str(source)]) == 0
    assert "2 prompts" in (said := capsys.readouterr().out) and "1 rows left out" in said
    prompts = prompt_rows(read_rows(out))
    assert [p.prompt[0] for p in prompts] == [
        {"role": "user", "content": "one"},
        {"role": "user", "content": "two"},
    ]
    assert nectar.main([]) == 2


# Storm-7B


def test_storm_is_a_configuration():
    command, config = parse(["iterate", f"--config={STORM}"])
    assert command == "iterate" and config.rounds == 3 and config.train.learning_rate == 5e-7
    assert config.model == "openchat/openchat-3.5-0106"
    assert config.score.scorer == "Nexusflow/Starling-RM-34B#01-ai/Yi-34B-Chat"


@pytest.mark.parametrize("recipe", sorted(STORM.parent.glob("*.yaml")), ids=lambda path: path.name)
def test_plan_takes_a_recipe(recipe, tmp_path, capsys):
    model = save_tiny(LLAMA, tmp_path / "model")
    command = ["plan", f"--config={recipe}", f"--model={model}", "--gpus=8"]
    assert main(command) == 0
    values = yaml.safe_load(recipe.read_text())
    said = f"max_tokens={values['train']['max_tokens']}, pairs of a prompt of"
    assert said in capsys.readouterr().out
    # No option at all is one of no command, and those of other stages stand in files only.
    for text, name in (("round: 3", "round"), ("sample: {num_sample: 3}", "sample.num_sample")):
        other = tmp_path / "other.yaml"
        other.write_text(f"model: {model}\n{text}\n")
        assert main(["plan", f"--config={other}"]) == 2
        assert f"{other}:2: {name} is no option" in capsys.readouterr().err
    assert main([*command, "--prompts=x.jsonl"]) == 2
    assert "--prompts" in capsys.readouterr().err


def test_storm_says_where_every_value_is_from():
    lines = [x for x in STORM.read_text().splitlines() if x and not x.startswith("#")]
    published = set()
    for line in lines:
        match = re.fullmatch(r"(\w+:|  (\w+): \S+  # (.*)|(\w+): \S+  # (.*))", line)
        assert match, line
        name, source = match[2] or match[4], match[3] or match[5]
        assert name is None or re.fullmatch(r"published: \S.*|ours(; .*)?", source), line
        if name is not None and source.startswith("published"):
            published.add(name)
    # What the model card says, and nothing that it doesn't.
    assert published == {"model", "prompts", "scorer", "rounds"}


def test_demo_prompts():
    """As many as the demo trains on and holds out, each once, that ask for a short answer."""
    rows = read_rows(STORM.parent / "demo_prompts.jsonl").rows
    demo = yaml.safe_load((STORM.parent / "demo.yaml").read_text())
    texts = [str(row.prompt) for row in prompt_rows(Rows("demo", rows))]
    assert len({text.lower() for text in texts}) == len(texts)
    assert len(texts) >= demo["max_prompts"] + demo["evaluate"]["heldout"]
    assert all(text.endswith("? Answer in one short sentence.") for text in texts)
