"""What the stage of sampling does whatever the sampler is, and transformers' padded batches."""

import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stages import END, PROMPTS, file_bytes, make_policy, plain_tokenizer, rows_of, run_sample
from tiny import build_tokenizer

import fastdpo
from fastdpo import storage
from fastdpo.data.records import Prompt
from fastdpo.errors import ConfigError, DataError
from fastdpo.sample.config import SampleConfig
from fastdpo.sample.stage import sample


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_policy(tokenizer)


def responses(rows):
    return [row["response_ids"] for row in rows]


def test_sampled_rows(model, tokenizer, tmp_path):
    rows = run_sample(model, tokenizer, tmp_path)
    assert [(r["prompt_index"], r["sample_index"]) for r in rows] == [
        (i, j) for i in range(5) for j in range(3)
    ]
    assert len(storage.list_parts(tmp_path)) == 3
    for row in rows:
        assert row["prompt"] == PROMPTS[row["prompt_index"]]
        text = tokenizer.decode(row["response_ids"], skip_special_tokens=True)
        assert row["response"] == text and 1 <= len(row["response_ids"]) <= 12
    assert tokenizer.decode(rows[3]["prompt_ids"]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(rows[6]["prompt_ids"]).startswith("<|im_start|>system\nBe brief.")
    assert len({tuple(ids) for ids in responses(rows)}) > 10


def test_other_columns_are_kept_and_strings_stay_without_a_template(model, tmp_path):
    plain = plain_tokenizer()
    config = SampleConfig(num_samples=1, max_new_tokens=2)
    prompts = rows_of(["The sky"], id=7, tags=["é"])
    sample(model, plain, prompts, config, tmp_path, round_index=1, progress=False)
    (row,) = storage.read_parts(tmp_path)
    assert row["extra"] == {"id": 7, "tags": ["é"]}
    assert plain.decode(row["prompt_ids"]) == "The sky"


def test_a_seed_gives_the_same_samples_and_another_gives_others(model, tokenizer, tmp_path):
    first = run_sample(model, tokenizer, tmp_path / "a")
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert run_sample(model, tokenizer, tmp_path / "b") == first
    assert torch.equal(torch.get_rng_state(), before)
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")
    assert responses(run_sample(model, tokenizer, tmp_path / "c", seed=1)) != responses(first)
    other_round = run_sample(model, tokenizer, tmp_path / "d", round_index=2)
    assert responses(other_round) != responses(first)
    # Parts have seeds of their own: the same prompt in another part is sampled anew.
    twice = run_sample(model, tokenizer, tmp_path / "e", prompts=["Hi"] * 2, batch_prompts=1)
    assert responses(twice[:3]) != responses(twice[3:])


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(model, tokenizer, tmp_path):
    run_sample(model, tokenizer, tmp_path)
    whole = file_bytes(tmp_path)
    path = storage.part_path(tmp_path, 1)
    path.unlink()
    with pytest.raises(DataError, match="2 of 3"):
        storage.read_parts(tmp_path)
    # A process killed after it wrote the temporary file, before it was renamed.
    code = (
        "import os, sys; from pathlib import Path; from fastdpo import storage\n"
        "os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        "storage.write_jsonl_atomic(Path(sys.argv[1]), [{'half': 1}])"
    )
    root = str(Path(fastdpo.__file__).parents[1])
    killed = subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
    assert not path.exists()
    run_sample(model, tokenizer, tmp_path)
    assert file_bytes(tmp_path) == whole
    storage.part_path(tmp_path, 2).unlink()
    with pytest.raises(DataError, match="2 of 3"):  # the plan knows of a last part
        storage.read_parts(tmp_path)
    run_sample(model, tokenizer, tmp_path)
    assert file_bytes(tmp_path) == whole


def test_parts_that_are_there_are_not_sampled_again(model, tokenizer, tmp_path):
    run_sample(model, tokenizer, tmp_path)
    mark = [{"mine": True}]
    storage.write_jsonl_atomic(storage.part_path(tmp_path, 0), mark)
    assert run_sample(model, tokenizer, tmp_path)[:1] == mark


def test_parts_of_another_plan_are_refused(model, tokenizer, tmp_path):
    run_sample(model, tokenizer, tmp_path, max_new_tokens=2)
    whole = file_bytes(tmp_path)
    same: dict[str, Any] = {"max_new_tokens": 2}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, "sampling"),
        ({"round_index": 2}, "round_index"),
        ({"prompts": ["Other", *PROMPTS[1:]]}, "prompts"),
        ({"prompts": PROMPTS[:3]}, "parts and prompts"),
    ]
    for change, named in changes:
        with pytest.raises(DataError, match=f"another {named}"):
            run_sample(model, tokenizer, tmp_path, **(same | change))
    assert file_bytes(tmp_path) == whole
    (tmp_path / "plan.json").unlink()
    with pytest.raises(DataError, match="another"):
        run_sample(model, tokenizer, tmp_path, max_new_tokens=2)


def test_a_padded_batch_gives_what_prompts_give_alone(model, tokenizer, tmp_path):
    greedy: dict[str, Any] = {"temperature": 0, "num_samples": 1, "max_new_tokens": 10}
    together = run_sample(model, tokenizer, tmp_path / "all", batch_prompts=5, **greedy)
    assert len({len(row["prompt_ids"]) for row in together}) > 2
    for row in together:
        ids = torch.tensor([row["prompt_ids"]])
        by_hand: list[int] = []
        for _ in range(10):
            next_id = int(model(input_ids=ids).logits[0, -1].argmax())
            by_hand.append(next_id)
            if next_id == END:
                break
            ids = torch.cat([ids, torch.tensor([[next_id]])], dim=1)
        assert row["response_ids"] == by_hand
    assert len({tuple(ids) for ids in responses(together)}) > 2


def test_a_low_temperature_or_top_p_is_greedy(model, tokenizer, tmp_path):
    greedy = run_sample(model, tokenizer, tmp_path / "0", temperature=0, num_samples=1)
    cold: list[dict[str, Any]] = [{"temperature": 1e-6}, {"top_p": 1e-9}]
    for name, options in zip("12", cold):
        rows = run_sample(model, tokenizer, tmp_path / name, num_samples=2, **options)
        # Both samples belong to their prompt, not to its neighbour in the batch.
        assert responses(rows[0::2]) == responses(rows[1::2]) == responses(greedy)


def test_responses_end_at_any_end_token(tokenizer, tmp_path):
    model = make_policy(tokenizer)
    extra_ends = list(range(10, 40))
    model.generation_config.eos_token_id = extra_ends
    rows = run_sample(model, tokenizer, tmp_path, num_samples=8)
    ends = {END, *extra_ends}
    for row in rows:
        ids = row["response_ids"]
        assert not ends & set(ids[:-1])
        assert row["finish_reason"] == ("stop" if ids[-1] in ends else "length")
        assert row["finish_reason"] == "stop" or len(ids) == 12
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}


def test_models_without_padding_or_end_token(tmp_path):
    tokenizer = build_tokenizer()
    expected = run_sample(make_policy(tokenizer), tokenizer, tmp_path / "a")
    tokenizer.pad_token = None
    model = make_policy(tokenizer, pad_token_id=None)
    assert run_sample(model, tokenizer, tmp_path / "b") == expected
    model = make_policy(tokenizer, eos_token_id=None, pad_token_id=None)
    assert run_sample(model, tokenizer, tmp_path / "c") == expected  # the tokenizer knows the end
    tokenizer.eos_token = None
    rows = run_sample(model, tokenizer, tmp_path / "d")
    assert {(row["finish_reason"], len(row["response_ids"])) for row in rows} == {("length", 12)}


def test_settings_of_the_model_dont_change_the_distribution(model, tokenizer, tmp_path):
    expected = run_sample(model, tokenizer, tmp_path / "a")
    special = make_policy(tokenizer, attention_dropout=0.9).train()
    own = special.generation_config
    own.update(top_k=1, temperature=0.1, top_p=0.1, repetition_penalty=5.0, min_new_tokens=12)
    assert run_sample(special, tokenizer, tmp_path / "b") == expected
    assert special.training and special.generation_config is own and own.top_k == 1
    # Nearly uniform over 300 tokens: the library's default of the 50 most probable would show.
    uniform = make_policy(tokenizer, initializer_range=0.001)
    rows = run_sample(uniform, tokenizer, tmp_path / "c", ["Hi"], num_samples=400, max_new_tokens=1)
    assert len({row["response_ids"][0] for row in rows}) > 150


def test_sampling_errors_come_before_any_sample(model, tokenizer, tmp_path):
    (short,) = run_sample(model, tokenizer, tmp_path / "a", ["!"], num_samples=1)
    room = 256 - len(short["prompt_ids"])
    run_sample(model, tokenizer, tmp_path / "ok", ["!"], max_new_tokens=room, num_samples=1)
    with pytest.raises(
        DataError, match=rf"here, row 0 .*max_new_tokens={room + 1} .* context, 256"
    ):
        run_sample(model, tokenizer, tmp_path / "b", ["!"], max_new_tokens=room + 1)
    with pytest.raises(DataError, match="here, row 1 "):
        run_sample(model, tokenizer, tmp_path / "b", ["!", "!?" * 99], max_new_tokens=room)
    with pytest.raises(DataError, match="no prompts"):
        run_sample(model, tokenizer, tmp_path / "b", [])
    with pytest.raises(DataError, match=r"here, row 0.*no chat template"):
        run_sample(model, plain_tokenizer(), tmp_path / "b", [PROMPTS[2]])
    prompts, config = rows_of(["Hi"], weight=math.nan), SampleConfig(max_new_tokens=2)
    with pytest.raises(DataError, match=r"here, row 0.*JSON"):
        sample(model, tokenizer, prompts, config, tmp_path / "b", round_index=1)
    empty = [Prompt("there", "")]
    with pytest.raises(DataError, match="there: the prompt has no tokens"):
        sample(model, plain_tokenizer(), empty, config, tmp_path / "b", round_index=1)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": 0},
        {"num_samples": True},
        {"max_new_tokens": 1.5},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": "1"},
        {"batch_prompts": 0},
        {"seed": None},
        {"num_samples": 2, "temperature": 0},
    ],
)
def test_sampling_config_names_what_is_wrong(options):
    name = list(options)[-1]
    with pytest.raises(ConfigError, match=rf"^{name}={options[name]} must be "):
        SampleConfig(**options)
