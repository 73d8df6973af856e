"""Options of the outer loop: references, extrapolation, schedules, curricula, alpha=auto, several
scorers, offline pairs; its stages as commands.
"""

import json
import math
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scoring_server import Server, counted
from test_rounds import ENVIRONMENT, TESTS, arguments, same, weights
from tiny import LLAMA, _family, save_tiny

from fastdpo.cli import main
from fastdpo.errors import ModelError
from fastdpo.model.load import combine, load_causal_lm, load_tokenizer
from fastdpo.rounds import folder
from fastdpo.rounds import run as rounds
from fastdpo.storage import read_parts


def lengths(prompts, responses):
    """A scorer that likes long responses."""
    return [float(len(r)) for r in responses]


def vowels(prompts, responses):
    return [sum(c in "aeiou" for c in r) / (len(r) + 1) for r in responses]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(LLAMA, folder / "model")
    save_tiny(LLAMA, folder / "other", seed=1)
    rows = [{"prompt": f"tell me about number {i}"} for i in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {"prompt": f"say {i}", "chosen": " a nice answer" * (i % 3 + 1), "rejected": f" no {i}"}
        for i in range(8)
    ]
    (folder / "offline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


def run(inputs, out, **changes):
    options = {
        "score__scorer": "test_iterate:vowels",
        "rounds": 1,
        "evaluate__heldout": 0,
        **changes,
    }
    assert main(arguments(inputs, out, **options)) == 0
    return out


def metrics(out, index=1):
    path = out / f"round-{index:02d}" / "metrics" / "metrics.jsonl"
    return [json.loads(line) for line in path.open()]


def summary(out, index=1):
    return json.loads((out / f"round-{index:02d}" / "pairs.summary.json").read_text())


@pytest.fixture(scope="module")
def plain(inputs, tmp_path_factory):
    return run(inputs, tmp_path_factory.mktemp("plain"))


AUTO: dict[str, Any] = dict(
    train__alpha="auto",
    score__scorer="test_iterate:lengths",
    rounds=2,
    sample__stop='["a"]',
    evaluate__heldout=0,
)


@pytest.fixture(scope="module")
def auto(inputs, tmp_path_factory):
    return run(inputs, tmp_path_factory.mktemp("auto"), **AUTO)


# ------------------------------------------------------------------------------- the reference
def test_a_fixed_reference_is_another_model(inputs, plain, tmp_path):
    """Its log-ratios are not zero at the start; those of the start itself are."""
    out = run(inputs, tmp_path / "fixed", reference=str(inputs / "other"))
    assert metrics(out)[0]["rewards/chosen"] != 0 == metrics(plain)[0]["rewards/chosen"]
    same_model = run(inputs, tmp_path / "same", reference=str(inputs / "model"))
    assert same(weights(same_model, 1), weights(plain, 1))
    assert not same(weights(out, 1), weights(plain, 1))
    # The same in every step as once before, but for a second model in memory.
    each = run(
        inputs, tmp_path / "each", reference=str(inputs / "other"),
        train__precompute_ref_log_probs="false",
    )  # fmt: skip
    found, wanted = ([row["loss"] for row in metrics(x)] for x in (each, out))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-5)


def test_an_average_of_the_policies_is_the_reference(inputs, tmp_path):
    options = dict(reference="average", reference_decay=0.75)
    argv = arguments(inputs, tmp_path, score__scorer="test_iterate:vowels", rounds=2, **options)
    assert main(argv) == 0
    found = load_file(tmp_path / "round-02" / "reference" / "model.safetensors")
    start = load_file(inputs / "model" / "model.safetensors")
    for name, value in weights(tmp_path, 1).items():
        wanted = 0.75 * start[name].float() + 0.25 * value
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-7)
    # The policy at the start of round 2 is not the reference any more.
    assert metrics(tmp_path, 2)[0]["rewards/chosen"] != 0
    assert not (tmp_path / "round-01" / "reference").exists()


def test_extrapolation_goes_on_in_the_direction_of_the_update(inputs, tmp_path):
    out = run(inputs, tmp_path / "more", extrapolation=0.5, evaluate__heldout=3)
    start = load_file(inputs / "model" / "model.safetensors")
    found = load_file(out / "round-01" / "extrapolated" / "model.safetensors")
    moved = 0
    for name, value in weights(out, 1).items():
        wanted = 1.5 * value - 0.5 * start[name].float()
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)
        moved += float((value - start[name]).abs().sum())
    assert moved > 0
    plan = json.loads((out / "round-01" / "eval" / "candidates" / "plan.json").read_text())
    plain = run(inputs, tmp_path / "plain", evaluate__heldout=3)
    other = json.loads((plain / "round-01" / "eval" / "candidates" / "plan.json").read_text())
    assert plan != other, "the policy that is evaluated is the next start"


def test_a_later_extrapolation_is_from_policy_to_policy(inputs, tmp_path):
    """Not from the extrapolated start, which would add up what was extrapolated before."""
    out = run(inputs, tmp_path, extrapolation=0.5, rounds=2, evaluate__heldout=0)
    found = load_file(out / "round-02" / "extrapolated" / "model.safetensors")
    first, second = weights(out, 1), weights(out, 2)
    for name, value in second.items():
        wanted = 1.5 * value - 0.5 * first[name]
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)


def test_prompts_are_on_one_side_of_the_split(inputs, tmp_path, capsys):
    rows = [{"prompt": f"tell me about number {i % 5}"} for i in range(10)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run(inputs, tmp_path / "run", prompts=prompts, evaluate__heldout=2)
    asked = [
        {row["prompt"] for row in read_parts(out / "round-01" / name)}
        for name in ("candidates", "eval/candidates")
    ]
    assert all(asked) and not asked[0] & asked[1]
    assert "are those of held-out rows" in capsys.readouterr().out


def test_prompts_without_room_are_left_out_if_asked_to(inputs, tmp_path, capsys):
    rows = [{"prompt": f"tell me about number {i} " * (1 + 20 * (i == 3))} for i in range(10)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = arguments(inputs, tmp_path / "run", score__scorer="test_iterate:vowels", prompts=prompts)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "prompts.jsonl:4" in error and "overlong=drop" in error
    out = run(
        inputs, tmp_path / "run", prompts=prompts, train__overlong="drop", evaluate__heldout=0
    )
    assert "1 prompts of over 52 tokens are left out" in capsys.readouterr().out
    asked = {row["prompt"] for row in read_parts(out / "round-01" / "candidates")}
    assert len(asked) == 9 and rows[3]["prompt"] not in asked


def test_models_of_other_shapes_are_not_combined(inputs, tmp_path):
    save_tiny(_family("llama", "LlamaConfig", hidden_size=64), tmp_path / "wide")
    tokenizer = load_tokenizer(str(inputs / "model"))
    with pytest.raises(ModelError, match="of the shape that"):
        names = [str(inputs / "model"), str(tmp_path / "wide")]
        combine(names, [0.5, 0.5], tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_weights_count_once_when_combined(tmp_path):
    tied = _family("llama", "LlamaConfig", tie_word_embeddings=True)
    save_tiny(tied, tmp_path / "a")
    save_tiny(tied, tmp_path / "b", seed=1)
    names, tokenizer = [str(tmp_path / x) for x in "ab"], load_tokenizer(str(tmp_path / "a"))
    combine(names, [1.5, -0.5], tokenizer, tmp_path / "out")
    a, b, found = (load_causal_lm(str(tmp_path / x)) for x in ("a", "b", "out"))
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), found.parameters()):
        torch.testing.assert_close(z, 1.5 * x - 0.5 * y, msg=name)


# ------------------------------------------------------------------------------- training
def test_rates_and_betas_of_each_round(inputs, tmp_path):
    options = dict(
        round_learning_rates="[1e-3,1e-4]", round_betas="[0.1,0.3]", train__learning_rate=1e-6
    )
    argv = arguments(inputs, tmp_path, score__scorer="test_iterate:vowels", rounds=3, **options)
    assert main(argv) == 0
    config = [json.loads((tmp_path / f"round-0{i}" / "run.json").read_text()) for i in (1, 2, 3)]
    assert [x["learning_rate"] for x in config] == [1e-3, 1e-4, 1e-4]
    assert [x["beta"] for x in config] == [0.1, 0.3, 0.3]
    assert metrics(tmp_path, 2)[0]["learning_rate"] == pytest.approx(1e-4)


def test_a_curriculum_trains_stage_after_stage(inputs, tmp_path):
    out = run(inputs, tmp_path, pair__rule="curriculum", sample__num_samples=4, pair__max_pairs=2)
    folder = out / "round-01"
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").open()]
    assert {pair["stage"] for pair in pairs} == {0, 1}
    runs = [json.loads((folder / f"stage-{i}" / "run.json").read_text()) for i in (1, 2)]
    assert runs[1]["model"] == str(folder / "stage-1" / "policy")
    for i in (1, 2):
        first = json.loads((folder / f"stage-{i}" / "metrics" / "metrics.jsonl").open().readline())
        assert first["rewards/chosen"] == 0, "each stage is its own reference"
    last = load_file(folder / "stage-2" / "policy" / "model.safetensors")
    assert same(last, weights(out, 1))
    train = json.loads((folder / "train.json").read_text())
    assert train["loss"] > 0


def test_alpha_is_found_on_the_way(inputs, tmp_path):
    options = dict(
        train__alpha="auto",
        evaluate__heldout=2,
        train__learning_rate=1e-2,
        sample__stop='["a","e"]',
    )
    argv = arguments(inputs, tmp_path, score__scorer="test_iterate:lengths", rounds=2, **options)
    assert main(argv) == 0
    rows = metrics(tmp_path, 1) + metrics(tmp_path, 2)
    alphas = [row["alpha"] for row in rows]
    # A scorer of length makes every chosen response the longer one.
    assert all(a > 0 for a in alphas) and len(set(alphas)) > 2
    one, two = (json.loads((tmp_path / f"round-0{i}" / "control.json").read_text()) for i in (1, 2))
    assert one["target"] == two["target"] == one["length"] and two["round"] == 2
    candidates = [
        json.loads(line)
        for part in sorted((tmp_path / "round-02" / "candidates").glob("part-*.jsonl"))
        for line in part.open()
    ]
    mean = sum(len(row["response_ids"]) for row in candidates) / len(candidates)
    assert two["length"] == pytest.approx(mean)


def test_alpha_auto_goes_on_with_the_same_bits(inputs, auto, tmp_path):
    argv = arguments(inputs, tmp_path / "killed", **AUTO)
    environment = ENVIRONMENT
    driver = [
        sys.executable,
        str(TESTS / "kill_driver.py"),
        "fastdpo.train.steps:packed_loss",
        "14",
    ]
    done = subprocess.run([*driver, *argv], env=environment, capture_output=True, text=True)
    assert done.returncode < 0, done.stderr
    assert (tmp_path / "killed/round-02/checkpoint").is_dir(), "it was not killed in round 2"
    assert not (tmp_path / "killed/round-02/policy").exists()
    assert main(argv) == 0
    assert same(weights(auto, 2), weights(tmp_path / "killed", 2))
    folders = (auto, tmp_path / "killed")
    control = [(folder / "round-02/control.json").read_bytes() for folder in folders]
    assert control[0] == control[1] and json.loads(control[0])["error_sum"] != 0


def test_a_length_may_be_asked_for(inputs, tmp_path):
    options = dict(
        train__alpha="auto",
        score__scorer="test_iterate:lengths",
        train__target_length=5,
        evaluate__heldout=0,
    )
    out = run(inputs, tmp_path, **options)
    found = json.loads((out / "round-01" / "train.json").read_text())
    assert found["length/target"] == 5 and found["length/sampled"] > 6
    # It is too long from the start, so shorter is wanted at once.
    assert json.loads((out / "round-01" / "control.json").read_text())["wanted"] < 0


def test_a_lost_controller_is_no_new_target(inputs, auto, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(auto, out)
    (out / "round-02" / "control.json").unlink()
    assert main(arguments(inputs, out, **{**AUTO, "rounds": 3})) == 2
    assert "control.json" in capsys.readouterr().err


def test_rounds_of_alpha_auto_by_the_stages_as_commands(auto, tmp_path):
    """Given what the round before left, training alone is what iterate does; evaluated or not."""
    first, second = auto / "round-01", auto / "round-02"
    command = [
        "train", f"--model={first / 'policy'}", f"--dataset={second / 'pairs.jsonl'}",
        f"--output_dir={tmp_path / 'alone'}", "--max_length=64", "--max_tokens=160",
        "--batch_size=3", "--learning_rate=1e-3", "--warmup_ratio=0", "--bf16=false",
        "--gradient_checkpointing=false", "--reference_cache=null", "--alpha=auto",
    ]  # fmt: skip
    more = [f"--control={first / 'control.json'}", f"--candidates={second / 'candidates'}"]
    assert main([*command, *more, f"--eval_dataset={first / 'pairs.jsonl'}"]) == 0
    rows = (tmp_path / "alone" / "metrics" / "metrics.jsonl").read_text().splitlines()
    pairs = len((first / "pairs.jsonl").read_text().splitlines())
    assert json.loads(rows[0])["eval_pairs"] == json.loads(rows[-1])["eval_pairs"] == pairs
    trained = load_file(tmp_path / "alone" / "policy" / "model.safetensors")
    assert same(trained, weights(auto, 2))
    assert main([*command[:-1], *more, "--alpha=0.1"]) == 2


# ------------------------------------------------------------------------------- scores and pairs
def test_the_divergence_from_the_start_is_the_log_ratio_of_held_out_responses(inputs, tmp_path):
    options = dict(train__learning_rate=1e-2, evaluate__heldout=3, sample__temperature=0.8)
    out = run(inputs, tmp_path / "run", **options)
    models = [
        load_causal_lm(str(name), dtype=torch.float64)
        for name in (out / "round-01" / "policy", inputs / "model")
    ]
    by_prompt: dict[int, list[float]] = {}
    for row in read_parts(out / "round-01" / "eval" / "candidates"):
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        start, logps = len(row["prompt_ids"]), []
        for model in models:
            with torch.no_grad():
                logp_TV = (model(input_ids=ids).logits[0] / 0.8).log_softmax(-1)  # as drawn
            logps.append(logp_TV[start - 1 : -1].gather(1, ids[0, start:, None]).sum().item())
        by_prompt.setdefault(row["prompt_index"], []).append(logps[0] - logps[1])
    ratios = torch.tensor([sum(x) / len(x) for x in by_prompt.values()], dtype=torch.float64)
    found = json.loads((out / "round-01" / "summary.json").read_text())
    assert found["kl"] == pytest.approx(ratios.mean().item(), rel=1e-3) and found["kl"] > 0.01
    error = ratios.std().item() / len(ratios) ** 0.5
    assert found["kl_se"] == pytest.approx(error, rel=1e-3)
    assert "kl" not in json.loads((out / "round-00" / "summary.json").read_text())


def test_several_scorers_are_combined(inputs, tmp_path):
    scorers = '["test_iterate:vowels","test_iterate:lengths"]'
    argv = arguments(
        inputs,
        tmp_path,
        score__scorer=scorers,
        rounds=1,
        pair__weights="[1.0,-0.5]",
        pair__transform="mean_std",
        pair__min_gap=0.01,
    )
    assert main(argv) == 0
    folder = tmp_path / "round-01"
    assert (folder / "scores-1").is_dir() and (folder / "scores-2").is_dir()
    assert summary(tmp_path)["pairs"] > 0 and "shaping" in summary(tmp_path)


def sums(name, rows):
    """log pi(y|x) of each candidate in fp64, alone in its batch, by transformers' own logits."""
    model = load_causal_lm(str(name), dtype=torch.float64).eval()
    found = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        with torch.no_grad():
            logp_TV = model(ids).logits[0].log_softmax(-1)
        start = len(row["prompt_ids"])
        found.append(sum(logp_TV[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])))
    return found


def agreement(now, before):
    """(tau + 1) / 2 as in CREAM: signs of all pairs, ties 0."""

    def sign(x):
        return (x > 0) - (x < 0)

    places = [(i, j) for i in range(len(now)) for j in range(i)]
    tau = sum(sign(now[i] - now[j]) * sign(before[i] - before[j]) for i, j in places) / len(places)
    return (tau + 1) / 2


def test_consistency_compares_the_rewards_of_cream(inputs, tmp_path):
    """r_t = log pi_t - log pi_0 in every round; before it r_{t-1}, or M0's mean log-prob."""
    first = inputs / "other"
    out = run(
        inputs,
        tmp_path,
        score__scorer="implicit",
        score__previous_model=first,
        pair__consistency="prompt",
        rounds=2,
    )
    models = {1: inputs / "model", 2: out / "round-01" / "policy"}
    for index, policy in models.items():
        folder = out / f"round-{index:02d}"
        rows = read_parts(folder / "candidates")
        zero = sums(first, rows)
        now = [a - b for a, b in zip(sums(policy, rows), zero)]
        if index == 1:
            before = [a / len(row["response_ids"]) for a, row in zip(zero, rows)]
        else:
            before = [a - b for a, b in zip(sums(models[1], rows), zero)]
        for name, wanted in (("scores", now), ("scores-before", before)):
            found = [row["score"] for row in read_parts(folder / name)]
            assert found == pytest.approx(wanted, abs=1e-4)
        pairs = [json.loads(line) for line in (folder / "pairs.jsonl").open()]
        means = []
        for place in sorted({row["prompt_index"] for row in rows}):
            of_prompt = [i for i, row in enumerate(rows) if row["prompt_index"] == place]
            agreed = agreement([now[i] for i in of_prompt], [before[i] for i in of_prompt])
            means.append(agreed)
            for row in (row for row in pairs if row["prompt_index"] == place):
                assert row["label_smoothing"] == pytest.approx(1 - agreed)
                best = max(of_prompt, key=lambda i: now[i])
                assert row["chosen_ids"] == rows[best]["response_ids"]
        assert len(pairs) > 3 and len(set(means)) > 1  # or there is nothing to tell apart
        assert summary(out, index)["consistency"] == pytest.approx(sum(means) / len(means))


def test_the_stages_as_commands_score_for_consistency(inputs, tmp_path):
    """Round 1 of CREAM by hand: the ranking of M0 is the scorer likelihood."""
    first, model = inputs / "other", inputs / "model"
    whole = run(
        inputs,
        tmp_path / "run",
        score__scorer="implicit",
        score__previous_model=first,
        pair__consistency="mean",
    )
    folder, out = whole / "round-01", tmp_path / "alone"
    candidates = f"--candidates={folder / 'candidates'}"
    now = ["--scorer=implicit", f"--policy={model}", f"--previous_model={first}"]
    before = ["--scorer=likelihood", f"--policy={first}"]
    for name, options in (("scores", now), ("scores-before", before)):
        assert main(["score", candidates, *options, f"--output_dir={out / name}"]) == 0
    assert main(["pair", candidates, f"--scores=[{out / 'scores'}]", "--consistency=mean",
                 f"--previous_scores=[{out / 'scores-before'}]",
                 f"--output={out / 'pairs.jsonl'}"]) == 0  # fmt: skip
    assert (out / "pairs.jsonl").read_bytes() == (folder / "pairs.jsonl").read_bytes()


@pytest.mark.parametrize("column", [None, 4])
def test_what_a_scorer_needs_is_there_before_anything_is_sampled(inputs, tmp_path, capsys, column):
    """Of training prompts, held-out ones, and of offline pairs that are scored."""
    rows = [{"prompt": f"what is {i} + 1?", "answer": i + 1} for i in range(8)]
    if column is not None:
        rows[column]["answer"] = None
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = dict(score__scorer="answer", prompts=path)
    if column is None:
        offline = inputs / "offline.jsonl"
        options |= dict(pair__replay=offline, pair__replay_share=0.5, pair__fresh_threshold=0.5)
    assert main(arguments(inputs, tmp_path / "out", **options)) == 2
    error = capsys.readouterr().err
    name = "prompts.jsonl:5" if column is not None else "offline.jsonl:1"
    assert f"{name}: scorer answer needs the column 'answer', which is" in error
    assert not (tmp_path / "out").exists()


def test_scores_are_compared_with_those_of_the_start(inputs, tmp_path):
    """PAR, with the first round's samples as its reference in the second."""
    options = dict(pair__transform="par", rounds=2, evaluate__heldout=0, pair__min_gap=1e-6)
    own = run(inputs, tmp_path / "own", **options)
    start = run(inputs, tmp_path / "start", pair__transform_reference="start", **options)
    pairs = [
        [json.loads(line) for line in (out / f"round-0{i}" / "pairs.jsonl").open()]
        for i in (1, 2)
        for out in (own, start)
    ]
    assert pairs[0] == pairs[1] and pairs[2] != pairs[3]
    # Pairs are those of the same responses: PAR keeps their order.
    assert [x["chosen_ids"] for x in pairs[2]] == [x["chosen_ids"] for x in pairs[3]]
    by_prompt: dict[int, list[float]] = {}
    for row in read_parts(start / "round-01" / "scores"):
        by_prompt.setdefault(row["prompt_index"], []).append(row["score"])
    raw = {
        (row["prompt_index"], row["sample_index"]): row["score"]
        for row in read_parts(start / "round-02" / "scores")
    }
    row = pairs[3][0]
    best = max(value for (index, _), value in raw.items() if index == row["prompt_index"])
    references = by_prompt[row["prompt_index"]]
    wanted = sum(1 / (1 + math.exp(x - best)) for x in references) / len(references)
    assert row["score_chosen"] == pytest.approx(wanted)


def test_what_is_held_out_is_not_replayed(inputs, tmp_path):
    rows = [
        {"prompt": f"tell me about number {i}", "chosen": " a nice answer", "rejected": f" no {i}"}
        for i in range(10)
    ]
    offline = tmp_path / "offline.jsonl"
    offline.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run(
        inputs, tmp_path / "run", pair__replay=offline, pair__replay_share=0.2, evaluate__heldout=6
    )
    held = {row["prompt"] for row in read_parts(out / "round-01" / "eval" / "candidates")}
    candidates = read_parts(out / "offline" / "candidates")
    assert held and not held & {row["prompt"] for row in candidates}
    dropped = json.loads((out / "offline" / "summary.json").read_text())["dropped"]
    assert dropped["offline: prompt is held out"] == 6


def test_offline_pairs_are_replayed(inputs, tmp_path):
    options = dict(
        pair__replay=str(inputs / "offline.jsonl"),
        pair__replay_share=0.5,
        pair__fresh_threshold=-0.2,
    )
    out = run(inputs, tmp_path, **options)
    pairs = [json.loads(line) for line in (out / "round-01" / "pairs.jsonl").open()]
    sources = [pair["source"] for pair in pairs]
    assert sources.count("offline") == summary(out)["replayed"] > 0
    assert (out / "offline" / "scores").is_dir()
    rows = [
        json.loads(line)
        for part in (out / "round-01" / "offline" / "candidates").glob("part-*.jsonl")
        for line in part.open()
    ]
    assert sorted(row["prompt"] for row in rows) == [f"say {i}" for i in range(8)]
    # Some fresh responses have more vowels than the chosen one; their pairs are gone.
    assert any(why.startswith("offline:") for why in summary(out)["dropped"])


def test_difficult_pairs_are_dropped(inputs, tmp_path):
    out = run(inputs, tmp_path, pair__ches_keep=0.5)
    found = summary(out)
    assert found["dropped"]["CHES above the share kept"] > 0 and "mean_ches" in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score__scorer": "implicit"}, "previous_model"),
        ({"score__scorer": "implicit", "score__previous_model": "x"}, "evaluate.scorer"),
        ({"pair__consistency": "mean"}, "needs score.scorer=implicit"),
        ({"pair__flip_share": 0.2}, "pair.flip_share=0.2 can change no label with 1 scorer"),
        ({"pair__replay_share": 0.5}, "need each other"),
        ({"pair__replay": "pairs.jsonl"}, "need each other"),
        ({"pair__fresh_threshold": 0.0}, "needs pair.replay"),
        ({"pair__rule": "worst"}, "pair.rule=worst must be one of"),
        ({"pair__rule": "tree_siblings"}, "fastdpo pair"),
        ({"train__alpha": "auto", "reference": "average"}, "reference=average"),
        ({"train__target_length": 20}, "needs train.alpha=auto"),
        ({"pair__weights": "[1,2]"}, "pair.weights=[1.0, 2.0]"),
        ({"score__timeout": 0}, "score.timeout=0.0 must be"),
        ({"round_betas": "[0.1,-1]"}, "round_betas"),
        ({"extrapolation": -1}, "extrapolation"),
        ({"reference_decay": 2}, "reference_decay"),
        ({"train__alpha": "most"}, "alpha=most"),
        ({"score__api_key_env": "my key"}, "api_key_env"),
        ({"reference": "/nowhere/at-all"}, "at-all"),
        ({"pair__transform": "cube"}, "transform"),
        ({"pair__transform": "par"}, "transform=par changes nothing"),
        ({"pair__transform_reference": "start"}, "transform=par"),
        ({"score__scorer": "answer"}, "prompts.jsonl:1: scorer answer needs the column 'answer'"),
        ({"evaluate__scorer": "answer"}, "scorer answer needs the column 'answer'"),
        (
            {"score__scorer": "judge:http://127.0.0.1:1/v1#m"},
            "127.0.0.1:1/v1/chat/completions can't be",
        ),
        ({"evaluate__scorer": "http://127.0.0.1:1/score"}, "127.0.0.1:1/score can't be reached"),
        ({"score__scorer": "likelihood"}, "scorer=likelihood"),
        ({"pair__transform_reference": "end"}, "one of own, start"),
        ({"score__scorer": "https://host/score?api_key=1"}, "score.scorer: the URL has a query"),
        (
            {"evaluate__scorer": "judge:http://me:1@host#m"},
            "evaluate.scorer: the URL has a name or key",
        ),
        (
            {
                "pair__flip_share": 0.2,
                "score__scorer": "[test_iterate:vowels,test_iterate:lengths]",
                "evaluate__scorer": "test_iterate:vowels",
            },
            "can change no label",
        ),
    ],
)
def test_impossible_options_end_before_there_is_a_folder(
    inputs, tmp_path, capsys, changes, message
):
    options = {"score__scorer": "test_iterate:vowels", **changes}
    assert main(arguments(inputs, tmp_path / "out", **options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_asks_only_servers_that_it_still_needs(inputs, tmp_path, capsys, monkeypatch):
    def interrupted_in(module, name):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupt)
            assert main(options) == 130

    with Server(counted) as server:
        url = f"{server.url}/score"
        options = arguments(
            inputs, tmp_path / "out", score__scorer=url, rounds=1, evaluate__heldout=0
        )
        interrupted_in(folder, "sample")
    assert main(options) == 2  # before a sample is drawn for it
    assert "can't be reached" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/round-01/candidates/part*"))
    with Server(counted, port=server.port):
        interrupted_in(rounds, "pair")
    assert main(options) == 0


# ------------------------------------------------------------------------------- stages
def test_the_stages_as_commands_give_what_iterate_gives(inputs, plain, tmp_path):
    folder = plain / "round-01"
    model, out = inputs / "model", tmp_path / "alone"
    sampling = ["--num_samples=3", "--max_new_tokens=12", "--batch_prompts=3"]
    assert main(["sample", f"--model={model}", f"--prompts={inputs / 'prompts.jsonl'}", *sampling,
                 "--dtype=float32", f"--output_dir={out / 'candidates'}"]) == 0  # fmt: skip
    assert main(["score", f"--candidates={out / 'candidates'}", "--scorer=test_iterate:vowels",
                 f"--output_dir={out / 'scores'}"]) == 0  # fmt: skip
    assert main(["pair", f"--candidates={out / 'candidates'}", f"--scores=[{out / 'scores'}]",
                 f"--output={out / 'pairs.jsonl'}"]) == 0  # fmt: skip
    for name in ("pairs.jsonl", "pairs.summary.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert main(["train", f"--model={model}", f"--dataset={out / 'pairs.jsonl'}",
                 f"--output_dir={out}", "--max_length=64", "--max_tokens=160", "--batch_size=3",
                 "--learning_rate=1e-3", "--warmup_ratio=0", "--bf16=false", "--save_steps=1",
                 "--gradient_checkpointing=false", "--reference_cache=null"]) == 0  # fmt: skip
    trained = load_file(out / "policy" / "model.safetensors")
    assert same(trained, weights(plain, 1))


def test_the_report_command(inputs, tmp_path, capsys):
    out = run(inputs, tmp_path / "run", evaluate__heldout=3)
    (out / "report.html").unlink()
    assert main(["report", f"--output_dir={out}"]) == 0
    page = (out / "report.html").read_text()
    assert "tell me about number" in page and "http-equiv" in page
    assert main(["report", f"--output_dir={tmp_path / 'none'}"]) == 2
    assert "no run here" in capsys.readouterr().err
