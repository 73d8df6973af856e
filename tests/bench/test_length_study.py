"""The length study: numbers, verdict, and whole studies of a tiny model, killed and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from result_files import document_of, write_rows
from tiny import LLAMA, build_tokenizer, save_tiny

from bench import length_reward, length_tables, rise
from bench import length_study as ls
from bench.rise import prompt_means
from bench.rows import load
from fastdpo.errors import ConfigError
from fastdpo.report.evaluation import interval
from fastdpo.storage import read_parts

TESTS = Path(__file__).parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def pairs(count=30):
    """Chosen responses are mostly the longer ones; the prompts of the first are no single turn."""
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "be nice"},
                {"from": "gpt", "value": "no idea"},
                {"from": "human", "value": "tell me about walks"},
            ],
            "chosen": {"from": "gpt", "value": "long walks on the beach"},
            "rejected": {"from": "gpt", "value": "no"},
        }
    ]
    for i in range(count):
        prompt = f"tell me about number {i}"
        long, short = "nice " * (i % 5 + 3), "no idea"
        chosen, rejected = (long, short) if i % 7 else (short, long)
        sides = {"r_chosen": chosen, "r_reject": rejected}
        rows.append({"i_chosen": prompt, "i_reject": prompt, **sides})
    return rows


# --- numbers ------------------------------------------------------------------------------------


def test_within_is_the_regression_with_an_effect_for_each_prompt():
    generator = torch.Generator().manual_seed(1)
    groups = []
    for i in range(30):
        length = torch.randint(5, 200, (4,), generator=generator).double()
        noise = torch.randn(4, generator=generator, dtype=torch.float64)
        groups.append(torch.stack([10.0 * i - 0.02 * length + noise, length], 1))
    found = length_reward.within(groups)
    flat = torch.cat(groups).numpy()
    effects = np.kron(np.eye(len(groups)), np.ones((4, 1)))
    fitted = np.linalg.lstsq(np.column_stack([flat[:, 1], effects]), flat[:, 0], rcond=None)[0]
    slope, low, high = found["slope"]
    assert slope == pytest.approx(fitted[0], rel=1e-9)
    assert low < -0.02 < high and high - low < 0.02
    residual = flat - effects @ np.linalg.lstsq(effects, flat, rcond=None)[0]
    assert found["correlation"][0] == pytest.approx(np.corrcoef(residual.T)[0, 1], rel=1e-9)
    # Over all responses the prompts would hide it.
    assert abs(np.corrcoef(flat.T)[0, 1]) < 0.2 < abs(found["correlation"][0])


def test_within_of_equal_lengths_is_zero():
    groups = [torch.tensor([[1.0, 5.0], [2.0, 5.0]], dtype=torch.float64)]
    assert length_reward.within(groups) == {"correlation": [0.0] * 3, "slope": [0.0] * 3}


def test_a_response_that_was_cut_off_is_no_part_of_the_bias():
    def row(prompt, score, length, reason="stop"):
        ids = {"response_ids": [0] * length, "finish_reason": reason}
        return {"prompt_index": prompt, "score": score, **ids}

    rows = [row(1, 1.0, 5), row(1, 2.0, 9), row(1, -9.0, 64, "length"), row(0, 1.0, 3)]
    (group,) = length_reward.whole_groups(rows)
    assert group.tolist() == [[1.0, 5.0], [2.0, 9.0]]


def test_pair_bias_counts():
    """Chosen and rejected as (reward, length): right and longer, right and shorter, wrong, even."""
    found = length_reward.pair_bias(
        torch.tensor(
            [
                [[2.0, 30.0], [1.0, 10.0]],
                [[2.0, 10.0], [1.0, 30.0]],
                [[1.0, 10.0], [2.0, 40.0]],
                [[3.0, 20.0], [2.0, 20.0]],
            ],
            dtype=torch.float64,
        )
    )
    assert found["accuracy"][0] == 0.75 and found["accuracy"][-1] == 4
    assert found["accuracy_chosen_longer"][::3] == [1.0, 1]
    assert found["accuracy_chosen_shorter"][::3] == [0.5, 2]
    assert found["chosen_is_longer"][0] == pytest.approx(1 / 3)
    assert found["prefers_longer"][0] == pytest.approx(2 / 3)


def test_the_interval_of_a_share_is_wilsons():
    """Of 3 of 3 and 81 of 263, the latter Newcombe's example (Stat. Med. 17, 1998, table I)."""
    assert rise.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    holds = torch.tensor([True] * 3)
    value, low, high, count = length_reward.share(holds)
    assert (value, count) == (1.0, 3) and high == pytest.approx(1.0)
    assert low == pytest.approx(1 / (1 + 1.959964**2 / 3))
    assert length_reward.share(~holds)[:3] == pytest.approx([0.0, 0.0, 1 - rise.wilson(1.0, 3)[0]])
    assert length_tables.percent(length_reward.share(holds)) == "100% (44% to 100%) of 3"
    assert length_tables.percent([1.0, 0.0, 3]) == "100% (44% to 100%) of 3"  # of an older row
    assert (
        length_tables.percent(length_reward.share(holds[:0]))
        == length_tables.percent([None, None, 0])
        == "none"
    )


def test_a_prompt_is_trained_on_or_held_out(tmp_path):
    rows = length_reward.read_preferences([write_rows(tmp_path / "pairs.jsonl", pairs() * 2)])
    train, held = length_reward.split(rows)
    assert len(train) + len(held) == len(rows) == 62
    assert 8 <= len(held) <= 16 and len(held) % 2 == 0
    prompts = [{json.dumps(row.prompt) for row in side} for side in (train, held)]
    assert not prompts[0] & prompts[1]


# --- verdict and tables from given rows ---------------------------------------------------------


def given(arm, lengths, rewards=None, controlled=None, start=60.0):
    """A row for each seed of an arm: changes of the last of two rounds."""
    rows = []
    for seed, length in enumerate(lengths):
        last = {
            "length": length,
            "reward": (rewards or [1.0] * len(lengths))[seed],
            "lc_reward": (controlled or [0.5] * len(lengths))[seed],
        }
        rounds = []
        for index in range(3):
            row = {"round": index, "prompts": 10, "truncated": 0.1, "pairs": 5, "alpha": None}
            for name, value in last.items():
                at = start if name == "length" else 0.0
                change = value * index / 2
                row[name] = at + change
                row[f"{name}_change"] = {"mean": change, "sd": 2.0 * bool(index)}
            rounds.append(row)
        rows.append(
            {
                "op": length_tables.OP, "kind": length_tables.RUN, "arm": arm, "seed": seed,
                "seconds": 1.0,
                "rounds": rounds, "model": "M", "data": ["D"], "device": "cpu",
                "device_type": "cpu", "threads": 2, "versions": {"torch": "2"}, "git": "0" * 40,
                "dirty": False, "utc": "2026-01-01T00:00:00",
                "settings": {
                    "rounds": 2, "max_prompts": 8, "num_samples": 4, "max_new_tokens": 64,
                    "heldout": 10, "beta": 0.1, "learning_rate": 1e-5, "alpha": arm,
                },
            }
        )  # fmt: skip
    return rows


def test_growth_within_twice_its_spread_is_inconclusive():
    rows = given("0", [10.0, 30.0, 20.0]) + given("auto", [0.0, 1.0, -1.0])
    found = length_tables.verdict(rows)
    assert (found["growth"], found["spread"], found["seeds"]) == (20.0, 10.0, 3)
    assert not found["conclusive"], "20 does not exceed twice 10"
    text = length_tables.verdict_text(rows)
    assert "Inconclusive" in text and "+20.0 tokens" in text and "shorter" not in text
    assert "Inconclusive" in length_tables.markdown(rows, [])
    assert length_tables.verdict(given("0", [9.9, 30.1, 20.0]))["conclusive"] is False
    assert length_tables.verdict(given("0", [10.1, 29.9, 20.0]))["conclusive"] is True


@pytest.mark.parametrize("growth", [[-30.0, -31.0, -30.5], [30.0], []])
def test_shrinking_or_a_single_seed_is_inconclusive(growth):
    rows = given("0", growth) + given("0.01", [1.0, 2.0, 3.0])
    assert length_tables.verdict(rows)["conclusive"] is False
    assert "Inconclusive" in length_tables.verdict_text(rows)


def test_a_conclusive_study_says_what_each_arm_did():
    rows = given("0", [30.0, 31.0, 32.0], [1.0, 1.1, 1.2], [0.2, 0.3, 0.4])
    rows += given("auto", [1.0, 0.0, -1.0], [0.8, 0.9, 1.0], [0.7, 0.8, 0.9])
    rows += given("0.01", [29.0, 33.0, 31.0], [1.0, 1.1, 1.2], [0.0, 0.5, 0.3])
    text = length_tables.verdict_text(rows)
    plain, fixed, auto = text.split("\n")
    assert "Plain DPO grows longer" in plain and "+31.0 tokens" in plain
    assert "no difference shown" in fixed and "alpha 0.01" in fixed
    assert "(shorter)" in auto and "(higher)" in auto and "alpha auto" in auto
    # Seed by seed: -29, -31, -33; standard error 2 / sqrt(3), quantile 4.303.
    assert "-31.0 (-36.0 to -26.0) against plain DPO" in auto


def measured(slope, low, high):
    """The part of the reward model's row that the verdict takes."""
    return {
        **given("0", [0.0])[0],
        "kind": length_tables.REWARD,
        "samples": {"slope": [slope, low, high]},
    }


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.01, 0.03, "higher"), (0.0005, 0.03, "no difference shown: it depends on the slope")],
)
def test_a_length_controlled_reward_differs_where_it_does_at_both_ends_of_the_slope(
    low, high, word
):
    """Lengths differ by -30 in each seed, rewards by about -0.1: 0.0005 a token is too little."""

    def arm(name, lengths, rewards):
        lc = [reward - 0.02 * length for reward, length in zip(rewards, lengths)]
        return given(name, lengths, rewards, lc)

    rows = arm("0", [30.0, 31.0, 32.0], [1.0, 1.1, 1.2])
    rows += arm("auto", [0.0, 1.0, 2.0], [0.9, 0.99, 1.11])
    assert "(higher)" in length_tables.verdict_text(rows)
    rows = [measured(0.02, low, high), *rows]
    at, *ends = length_tables.controlled_against_plain(rows, "auto")
    assert at == pytest.approx(length_tables.against_plain(rows, "auto", "lc_reward"))
    assert [x["mean"] for x in ends] == pytest.approx([-0.1 + 30 * low, -0.1 + 30 * high])
    last = length_tables.verdict_text(rows).split("\n")[-1]
    assert last.endswith(f"with the slope at its ends ({word}).")
    assert "+0.0200 reward for a token" in length_tables.notes(rows)
    assert f"95% interval {low:+.4f} to {high:+.4f}" in length_tables.notes(rows)


@pytest.mark.parametrize("lengths", [[30.0, 31.0, 32.0], [30.0], [10.0, 30.0, 20.0]])
def test_the_verdict_tells_how_many_responses_were_cut_off(lengths):
    rows = given("0", lengths)
    assert "10% of its last responses (10% of the start's) are cut off at 64 tokens" in (
        length_tables.verdict_text(rows)
    )
    assert "lower bound" not in length_tables.verdict_text(rows)
    for row in rows:
        row["rounds"][-1]["truncated"] = 0.5
    assert "50% of its last responses" in length_tables.verdict_text(rows)
    assert "so the growth is a lower bound" in length_tables.verdict_text(rows)
    for row in rows:
        row["rounds"][-1]["truncated"] = 0.0
    assert "cut off" not in length_tables.verdict_text(rows)


def test_minutes_are_the_mean_of_the_known(tmp_path):
    rows = given("0", [30.0, 31.0]) + given("auto", [1.0, 2.0]) + given("0.01", [10.0, 12.0])
    for row, seconds in zip(rows, (60.0, 90.0, None, 120.0, None, None)):
        row["seconds"] = seconds
    lines = length_tables.run_table(rows).splitlines()
    assert lines[0].endswith("| minutes |")
    last = [line.split("|")[-2].strip() for line in lines[2:]]
    assert last == ["", "", "1.2", "", "", "not known", "", "", "2.0 (1 of 2 seeds)"]
    text = length_tables.markdown(rows, [])
    assert "share the start's samples and scores, which are counted in the first" in text
    assert ls.line(rows[1]).endswith(", 90 s") and not ls.line(rows[2]).endswith(" s")


def test_only_common_seeds_are_compared():
    rows = given("0", [30.0, 31.0, 32.0]) + given("auto", [0.0, 1.0])
    found = length_tables.against_plain(rows, "auto", "length")
    assert found is not None and found["n"] == 2 and found["mean"] == -30.0
    assert length_tables.against_plain(given("auto", [1.0]), "auto", "length") is None


def test_the_interval_over_prompts_is_that_of_all_of_them():
    generator = torch.Generator().manual_seed(0)
    changes = [3 * i + torch.randn(5 + i, generator=generator).double() for i in range(3)]
    rows = given("0", [float(x.mean()) for x in changes])
    for row, x in zip(rows, changes):
        row["rounds"][2]["prompts"] = len(x)
        row["rounds"][2]["length_change"] = {"mean": x.mean().item(), "sd": x.std().item()}
    found = length_tables.over_prompts(length_tables.runs_of(rows, "0"), 2, "length")
    mean, half = interval(torch.cat(changes).tolist())
    assert half is not None and found["n"] == 18 and found["mean"] == pytest.approx(mean)
    assert (found["low"], found["high"]) == pytest.approx((mean - half, mean + half))


def test_tables_and_plot(tmp_path):
    rows = given("0", [30.0, 31.0]) + given("auto", [1.0, 2.0]) + given("0.01", [10.0, 12.0])
    rows[-1]["rounds"][2]["alpha"] = 0.0125
    text = length_tables.markdown(rows, ["x.svg"])
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        f"| {arm}" for arm in ("plain DPO", "alpha 0.01", "alpha auto") for _ in range(3)
    ]
    assert "+30.5 (+24.1 to +36.9;" in text and "0.0125" in text and "(x.svg)" in text
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        length_tables.plot(rows, [path])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert "length-controlled reward" in paths[0].read_text()
    length_tables.plot([], [paths[0]])


def test_the_document_says_what_the_rows_say(tmp_path):
    results, document = tmp_path / "length.jsonl", tmp_path / "RESULTS.md"
    rows = given("0", [30.0, 31.0]) + given("auto", [1.0, 2.0])
    write_rows(results, rows)
    text = document_of([results], document)
    assert "Plain DPO grows longer" in text and "(length.svg)" in text and "old" not in text
    assert results.with_suffix(".svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("options", [[], ["--dataset", "x", "--seeds", "a"], ["--arms", "b"]])
def test_bad_options_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        ls.parse(options)
    assert "error" in capsys.readouterr().err


# --- files of a run -----------------------------------------------------------------------------


def sampled_run(folder):
    """Another arm of the seed, as far as `copy_start` reads it."""
    for name in ("round-00/eval/scores", "round-01/candidates", "round-01/scores"):
        (folder / name).mkdir(parents=True)
        (folder / name / "part-00000.jsonl").write_text(name)
    (folder / "round-01/pairs.jsonl").write_text("{}")
    (folder / "round-01/scores/plan.json").write_text('{"scorer": "reward"}')
    return folder


def test_scores_of_another_scorer_are_not_copied(tmp_path):
    other, folder = sampled_run(tmp_path / "alpha-0/seed-0"), tmp_path / "alpha-2/seed-0"
    ls.copy_start(folder, [other], "elsewhere/reward")
    assert not folder.exists()
    ls.copy_start(folder, [other], "reward")
    assert (folder / "round-00/eval/scores/part-00000.jsonl").exists()


def test_a_copy_that_is_interrupted_is_made_again(tmp_path, monkeypatch):
    other, folder = sampled_run(tmp_path / "alpha-0/seed-0"), tmp_path / "alpha-2/seed-0"
    copy, calls = shutil.copytree, []

    def failing(source, target, *inner):
        if not inner:  # as it calls itself for what is inside
            calls.append(source)
        if len(calls) == 2:
            Path(target).mkdir(parents=True)
            raise KeyboardInterrupt
        return copy(source, target, *inner)

    monkeypatch.setattr(shutil, "copytree", failing)
    with pytest.raises(KeyboardInterrupt):
        ls.copy_start(folder, [folder, other], "reward")
    assert not folder.exists()
    ls.copy_start(folder, [folder, other], "reward")
    files = {x.relative_to(folder).as_posix() for x in folder.rglob("*.jsonl")}
    assert files == {
        f"{name}/part-00000.jsonl"
        for name in ("round-00/eval/scores", "round-01/candidates", "round-01/scores")
    }
    assert [x.name for x in folder.parent.iterdir()] == ["seed-0"]
    (folder / "own").touch()
    ls.copy_start(folder, [folder, other], "reward")
    assert (folder / "own").exists() and len(calls) == 5


def test_seconds_are_added_over_processes_also_killed_ones(tmp_path):
    folder = tmp_path / "seed-0"
    code = (
        "import os, sys, time; from pathlib import Path; from bench import length_study as ls\n"
        "ls.TICK = 0.05\n"
        "with ls.clock(Path(sys.argv[1])):\n"
        "    time.sleep(0.5); os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(TESTS.parent)}
    assert ls.seconds_of(folder) == 0.0
    done = subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, timeout=300)
    assert done.returncode == -signal.SIGKILL
    killed, left = ls.seconds_of(folder), sorted(folder.iterdir())  # it may have been writing
    assert killed is not None and 0.2 < killed < 5
    (folder / "state.json").touch()  # the run has begun
    with pytest.raises(ValueError, match="x"), ls.clock(folder):
        time.sleep(0.1)
        raise ValueError("x")
    after = ls.seconds_of(folder)
    assert after is not None and killed + 0.1 <= after < killed + 5
    (folder / "state.json").unlink()
    assert sorted(folder.iterdir()) == left and folder / ls.CLOCK in left


def test_a_run_that_began_without_a_clock_has_no_seconds(tmp_path):
    (tmp_path / "state.json").touch()
    with ls.clock(tmp_path):
        pass
    assert ls.seconds_of(tmp_path) is None and not (tmp_path / ls.CLOCK).exists()


# --- whole studies ------------------------------------------------------------------------------


def save_talker(path):
    """A tiny model that ends some of its responses."""
    from transformers import AutoModelForCausalLM

    save_tiny(LLAMA, path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight[build_tokenizer().eos_token_id] *= 5
    model.save_pretrained(path)


def arguments(inputs, out, **changes):
    options = dict(
        model=inputs / "model", dataset=inputs / "pairs.jsonl", out=out, arms="0,2", seeds="0,1",
        rounds=1, train_prompts=6, heldout=4, samples=3, eval_samples=2, max_new_tokens=16,
        prompt_tokens=40, learning_rate=2e-2, batch_size=3, batch_prompts=4, max_tokens=160,
        reward_epochs=3, reward_learning_rate=3e-3, reward_max_length=64, bias_prompts=6,
        instruction="be nice", temperature=1.0,
    )  # fmt: skip
    options |= changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_talker(folder / "model")
    write_rows(folder / "pairs.jsonl", pairs())
    return folder


SAMPLED = ("temperature", "max_new_tokens", "samples", "bias_prompts", "batch_prompts")


@pytest.mark.parametrize("name", SAMPLED)
def test_a_reward_row_of_other_samples_is_refused(name, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(ls, "train_reward", lambda model, rows, out, options: out.mkdir())
    ls.prepare(ls.parse([*arguments(inputs, tmp_path), "--only-reward"]))
    ls.prepare(ls.parse(arguments(inputs, tmp_path)))
    other = ls.parse(arguments(inputs, tmp_path, **{name: 2}))
    with pytest.raises(ConfigError, match=f"{name}="):
        ls.prepare(other)
    # An older study did not note these.
    path = tmp_path / "study.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({x: known[x] for x in known if x not in SAMPLED}))
    ls.prepare(other)


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    pytest.importorskip("trl")
    out = tmp_path_factory.mktemp("study") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ONE_THREAD.items():  # of the reward model's process
            patch.setenv(name, value)
        assert ls.main([*arguments(inputs, out), "--keep-weights"]) == 0
    return out


def told(out):
    """What a study found, without times."""
    known = ("kind", "arm", "seed", "rounds", "held_out", "samples", "settings")
    return [
        {name: row[name] for name in known if name in row} for row in load([out / "results.jsonl"])
    ]


def never(*args, **kwargs):
    raise AssertionError("was run again")


def test_a_study_leaves_a_row_for_each_arm_and_seed(finished):
    rows = load([finished / "results.jsonl"])
    assert [row["kind"] for row in rows] == [length_tables.REWARD] + [length_tables.RUN] * 4
    assert [ls.run_of(row) for row in rows[1:]] == [("0", 0), ("2", 0), ("0", 1), ("2", 1)]
    assert all(row["seconds"] is not None and len(row["rounds"]) == 2 for row in rows[1:])
    assert (finished / "results.svg").read_text().startswith("<?xml")
    # The same seed holds out the same prompts and starts with the same samples.
    starts = {row["seed"]: [] for row in rows[1:]}
    for row in rows[1:]:
        starts[row["seed"]].append(row["rounds"][0])
    assert starts[0][0] == starts[0][1] != starts[1][0] == starts[1][1]
    assert rows[1]["rounds"][1] != rows[2]["rounds"][1]


def test_the_reward_model_learns_its_pairs_and_their_bias(finished):
    row = load([finished / "results.jsonl"])[0]
    assert row["training"]["pairs"] == 24 or row["training"]["pairs"] == 25
    held, samples = row["held_out"], row["samples"]
    assert held["accuracy"][-1] >= 6
    # Six of seven chosen responses are the longer ones, so that is what can be learned.
    assert held["prefers_longer"][0] > 0.8 and held["correlation"][0] > 0.5
    assert held["slope"][0] > 0
    assert 2 <= samples["prompts"] <= 6 and samples["responses"] == 18
    assert samples["length"] > 1 and -1 <= samples["correlation"][0] <= 1


def test_the_rows_are_what_the_files_of_the_runs_say(finished):
    slope = load([finished / "results.jsonl"])[0]["samples"]["slope"][0]
    row = load([finished / "results.jsonl"])[2]
    folder = finished / "alpha-2" / "seed-0"
    start, last = (prompt_means(folder / f"round-0{i}" / "eval") for i in (0, 1))
    found = row["rounds"][1]
    assert found["reward"] == pytest.approx(last[:, 0].mean().item())
    assert found["length"] == pytest.approx(last[:, 1].mean().item())
    change = (last - start).mean(0)
    assert found["length_change"]["mean"] == pytest.approx(change[1].item())
    controlled = change[0] - slope * change[1]
    assert found["lc_reward_change"]["mean"] == pytest.approx(controlled.item())
    spread = (last - start)[:, 0].std().item()
    assert found["reward_change"]["sd"] == pytest.approx(spread)
    assert found["prompts"] == 4 and 0 <= found["truncated"] <= 1 and found["pairs"] > 0


def test_prompts_are_single_turns_and_the_scorer_is_the_trained_model(finished):
    prompts = [json.loads(line)["prompt"] for line in (finished / "prompts.jsonl").open()]
    assert len(prompts) == 30 and all(text.endswith(" be nice") for text in prompts)
    assert prompts[3] == "tell me about number 3 be nice"
    folder = finished / "alpha-0" / "seed-1" / "round-01"
    candidates, scores = read_parts(folder / "candidates"), read_parts(folder / "scores")
    from fastdpo.score.load import load_scorer

    name = load([finished / "results.jsonl"])[-1]["settings"]["scorer_dtype"]
    scorer = load_scorer(str(finished / "reward"), dtype=getattr(torch, name))
    again = scorer([row["prompt"] for row in candidates], [row["response"] for row in candidates])
    assert [row["score"] for row in scores] == pytest.approx(
        again, abs=1e-4 if name == "float32" else 0.02
    )
    assert len({row["score"] for row in scores}) > 3


def test_a_finished_study_runs_nothing_again(finished, inputs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    before = (out / "results.jsonl").read_bytes()
    study = json.loads((out / "study.json").read_text())
    for name in ("iterate", "train_reward", "sample", "score"):
        monkeypatch.setattr(ls, name, never)
    assert ls.main(arguments(inputs, out)) == 0
    assert (out / "results.jsonl").read_bytes() == before
    assert json.loads((out / "study.json").read_text()) == study
    text = capsys.readouterr().out
    assert "Inconclusive" in text or "grows longer" in text
    # Without --keep-weights the weights go, and what was measured stays.
    assert not list(out.glob("alpha-*/seed-*/round-*/policy"))
    assert list(out.glob("alpha-*/seed-*/round-*/checkpoint")) == []
    assert len(list(out.glob("alpha-*/seed-*/round-*/eval/scores"))) == 4 * 2
    assert ls.main(["--report", str(out / "results.jsonl")]) == 0
    assert "| reward model (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2e-3}, "learning_rate"),
        ({"reward_epochs": 1}, "epochs"),
        ({"results": "other.jsonl"}, "another reward model"),
    ],
)
def test_another_study_in_the_same_folder_is_refused(finished, inputs, tmp_path, change, message):
    if "results" in change:
        row = load([finished / "results.jsonl"])[0]
        row["training"]["loss"] = 0.0
        change = {"results": write_rows(tmp_path / "other.jsonl", [row])}
    with pytest.raises(ConfigError, match=message):
        ls.main(arguments(inputs, finished, **change))


def test_too_few_pairs_are_refused(inputs, tmp_path):
    one = write_rows(tmp_path / "one.jsonl", pairs()[1:2])
    with pytest.raises(ConfigError, match="too few"):
        ls.main(arguments(inputs, tmp_path / "out", dataset=one))


def test_the_automatic_arm_runs_where_there_is_one(finished, inputs, tmp_path, capsys):
    out = tmp_path / "auto"
    shutil.copytree(finished, out)
    options = arguments(inputs, out, arms="0,2,auto", seeds="0")
    assert ls.main(options) == 0
    runs = [ls.run_of(row) for row in load([out / "results.jsonl"])[1:]]
    assert (("auto", 0) in runs) == ls.has_auto()
    assert ("left out" in capsys.readouterr().out) == (not ls.has_auto())


def test_a_failing_reward_training_is_an_error(inputs, tmp_path):
    rows = length_reward.read_preferences([str(inputs / "pairs.jsonl")])
    with pytest.raises(RuntimeError, match="exit code 1"):
        length_reward.train_reward(str(tmp_path / "no-model"), rows[:4], tmp_path / "reward", {})
    assert not (tmp_path / "reward").exists()


def drive(place, countdown, argv):
    code = (
        "import sys, kill_driver; from bench import length_study\n"
        f"kill_driver.arm({place!r}, {countdown})\n"
        "sys.exit(length_study.main(sys.argv[1:]))"
    )
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": path}
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_killed_in_a_run_it_goes_on_to_the_same_rows(finished, inputs, tmp_path, monkeypatch):
    """From the measured reward model on: killed in the training of the second run."""
    out = tmp_path / "killed"
    out.mkdir()
    for name in ("study.json", "prompts.jsonl", "reward.json"):
        shutil.copy(finished / name, out)
    for name in ("reward", "start"):
        shutil.copytree(finished / name, out / name)
    rows = (finished / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(rows[:2]))
    argv = arguments(inputs, out, seeds="0")
    done = drive("fastdpo.train.steps:packed_loss", 4, argv)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(load([out / "results.jsonl"])) == 2
    # The killed process left its part of the run's clock; one that can be told from the rest.
    clock = out / "alpha-2/seed-0" / ls.CLOCK
    assert clock.is_file()
    clock.write_text("1e9")
    assert not (out / "alpha-2/seed-0/round-01/policy").exists()
    monkeypatch.setattr(ls, "train_reward", never)
    assert ls.main(argv) == 0
    assert told(out) == told(finished)[:3]
    # What was noted before is part of the row: it goes on from there, and doesn't begin anew.
    assert load([out / "results.jsonl"])[2]["seconds"] // 1e9 == 1


@pytest.mark.slow
def test_killed_everywhere_it_ends_in_the_same_rows(finished, inputs, tmp_path):
    argv = arguments(inputs, tmp_path / "killed")
    kills = [
        ("bench.length_study:write_jsonl_atomic", 1),  # the prompts
        ("bench.length_study:train_reward", 1),
        ("fastdpo.sample.stage:write_jsonl_atomic", 2),  # the start's samples
        ("bench.length_study:append", 1),  # the reward model's row
        ("fastdpo.score.stage:write_jsonl_atomic", 3),
        ("fastdpo.train.steps:packed_loss", 6),
        ("bench.length_study:append", 1),  # a run's row
        ("bench.length_study:remove_weights", 1),
    ]
    for place, countdown in kills:
        done = drive(place, countdown, argv)
        assert done.returncode == -signal.SIGKILL, (place, done.stderr)
    done = drive("os:getpid", 10**9, argv)
    assert done.returncode == 0, done.stderr
    assert told(tmp_path / "killed") == told(finished)
