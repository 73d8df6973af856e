"""Whole steps of both trainers agree before they are timed; every failure is a row."""

import json
import math
from pathlib import Path

import pytest
import torch
from result_files import document_of, write_rows
from threaded import Threaded
from tiny import LLAMA, save_tiny

from bench import (
    report,
    step,
    step_crew,
    step_pairs,
    step_tables,
    step_turns,
    step_worker,
    turns,
)

trl = pytest.importorskip("trl")
STEPS, BATCH = 2, 2


def source_rows(count=16):
    topics = ["dogs", "the weather", "bread and butter", "long walks on the beach", "maps"]
    return [
        {
            "i_chosen": f"tell me about {topics[i % 5]} {i}",
            "i_reject": f"tell me about {topics[i % 5]} {i}",
            "r_chosen": "they are nice " * (i % 4 + 1),
            "r_reject": "no idea at all " * (i % 3 + 1),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(LLAMA, tmp_path_factory.mktemp("step") / "tiny")


def arguments(model, folder, *more):
    data = write_rows(folder / "public.jsonl", source_rows())
    common = ["--model", str(model), "--dataset", data, "--batch-size", str(BATCH)]
    sizes = ["--steps", str(STEPS), "--max-length", "64", "--learning-rate", "1e-3"]
    return [*common, *sizes, *more]


EXACT = ("--dtype", "float32", "--no-autocast")


def rows_of(*command, worker: type[step_crew.Worker] = Threaded):
    with step_crew.crew_of(worker) as crew:
        return list(step.run(step.parse(list(command)), crew))


@pytest.fixture(scope="module")
def rows(model, tmp_path_factory):
    return rows_of(*arguments(model, tmp_path_factory.mktemp("rows"), *EXACT))


def test_all_variants_take_the_same_steps(rows):
    ran = {row["variant"]: row for row in rows if row["variant"] not in step.ABSENT}
    assert list(ran) == list(step_worker.VARIANTS)
    for name, row in ran.items():
        assert row["note"] is None, (name, row["note"])
        assert len(row["loss"]) == STEPS + step_turns.WARM_UP
        assert row["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(row["loss"][-1] - math.log(2)) > 5e-3, "the steps change nothing"
        # What the limits of fp32 are derived from.
        for kind, error in row["off"].items():
            assert 20 * error < step_turns.EXACT[kind], (name, kind, error)
        assert row["x_trl"] > 0 and row["peak_mib"] > 0 and row["setup_s"] > 0
        assert row["pairs_per_s"]["samples"] == STEPS and row["interleaved"]
        assert row["tokens"] == ran["trl"]["tokens"]
        json.dumps(row)
    assert ran["trl"]["x_trl"] == 1
    # One layout pads like TRL, which computes prompts twice, as packing does; sharing does not.
    tokens = {name: row["tokens_computed"] for name, row in ran.items()}
    assert tokens["trl"] == tokens["fastdpo (padded)"] > ran["trl"]["tokens"]
    assert tokens["fastdpo"] < tokens["fastdpo (packed)"] == ran["trl"]["tokens"]
    padding = 1 - ran["trl"]["tokens"] / tokens["trl"]
    assert ran["trl"]["padding_share"] == ran["fastdpo (padded)"]["padding_share"] == padding
    assert ran["fastdpo"]["padding_share"] is None


def test_both_trainers_take_the_same_pairs(model, tmp_path, monkeypatch):
    from trl.trainer import dpo_trainer

    from fastdpo.train import steps as trained

    seen: dict[str, list] = {"trl": [], "fastdpo": []}
    collate = dpo_trainer.DataCollatorForPreference.torch_call
    pack = trained.pack_pairs

    def collating(self, examples):
        sides = ("prompt_ids", "chosen_ids", "rejected_ids")
        seen["trl"].append([tuple(map(tuple, (x[side] for side in sides))) for x in examples])
        return collate(self, examples)

    def packing(pairs, *args, **kwargs):
        sides = [(x.prompt_ids, x.chosen_ids, x.rejected_ids) for x in pairs]
        seen["fastdpo"].append([tuple(map(tuple, side)) for side in sides])
        return pack(pairs, *args, **kwargs)

    monkeypatch.setattr(dpo_trainer.DataCollatorForPreference, "torch_call", collating)
    monkeypatch.setattr(trained, "pack_pairs", packing)
    rows_of(*arguments(model, tmp_path, *EXACT, "--variants", "trl,fastdpo"))
    steps = STEPS + step_turns.WARM_UP
    assert len(seen["fastdpo"]) == steps
    assert seen["trl"][:steps] == seen["fastdpo"]
    assert len({pair for batch in seen["fastdpo"] for pair in batch}) == steps * BATCH


def test_the_table_the_plot_and_the_document_come_from_the_rows(rows, tmp_path, capsys):
    missing = [row for row in rows if row["variant"] in step.ABSENT]
    assert len(missing) == 2 and all(row["note"].startswith("not run: ") for row in missing)
    results = tmp_path / "step-tiny.jsonl"
    assert step.main(["--report", write_rows(results, rows)]) == 0
    text = capsys.readouterr().out
    for row in rows:
        shown = row["note"] or f"{row['x_trl']:.2f}"
        lines = [x for x in text.splitlines() if x.startswith("| ") and row["variant"] in x]
        assert any(shown in x for x in lines), row["variant"]
    assert "tiny, public: 2 pairs a step" in text
    assert "fastdpo (padded)" in (tmp_path / "step-tiny.svg").read_text()

    losses = Path(__file__).parents[2] / "bench" / "results" / "cpu-smollm2.jsonl"
    kept = tmp_path / losses.name
    kept.write_text(losses.read_text())
    document = tmp_path / "RESULTS.md"
    _, first, second = document_of([results, kept], document).split("\n## ")
    assert first.startswith("The loss\n") and second.startswith("Whole steps\n")
    assert "bare matmuls" in first and "pairs a step" not in first
    assert "pairs a step" in second and "bare matmuls" not in second
    document.write_text(document.read_text().replace("pairs a step", "pears a step"))
    document_of([results, kept], document)  # which sees the difference


def test_a_variant_that_fails_is_a_row(model, tmp_path, monkeypatch):
    broken = step_worker.VARIANTS["fastdpo"]._replace(settings={"layout": "sideways"})
    monkeypatch.setitem(step_worker.VARIANTS, "fastdpo", broken)
    found = rows_of(*arguments(model, tmp_path, *EXACT, "--variants", "trl,fastdpo"))
    ran = {row["variant"]: row for row in found}
    assert ran["trl"]["note"] is None and ran["trl"]["step_s"]
    assert ran["fastdpo"]["note"].startswith("ConfigError: layout=sideways")
    assert ran["fastdpo"]["step_s"] is None and ran["fastdpo"]["x_trl"] is None
    assert "layout=sideways" in step_tables.table(found) and "layout=sideways" in step.line(
        ran["fastdpo"]
    )


def test_a_variant_that_trains_otherwise_gets_no_speed(model, tmp_path, monkeypatch):
    """Weight decay on one side only: the first step is the same, the later ones are not."""
    settings = {**step_worker.VARIANTS["fastdpo"].settings, "weight_decay": 2.0}
    other = step_worker.VARIANTS["fastdpo"]._replace(settings=settings)
    monkeypatch.setitem(step_worker.VARIANTS, "fastdpo", other)
    (theirs, ours, *_) = rows_of(*arguments(model, tmp_path, *EXACT, "--variants", "trl,fastdpo"))
    assert theirs["note"] is None and theirs["step_s"]
    assert ours["note"].startswith("disagrees: ")
    assert ours["step_s"] is ours["pairs_per_s"] is ours["peak_mib"] is ours["x_trl"] is None


class Canned:
    """A worker with made-up steps; `alive` has the names of all that were not stopped."""

    alive: list[str]
    changes: dict[tuple[str, int, str], float]

    def __init__(self, job, folder=None):
        self.name, self.count = job["variant"], 0
        self.exact = job["dtype"] == "float32"
        Canned.alive.append(self.name)

    def receive(self):
        found = {"loss": 0.6931, "grad_norm": 2.0, "logps/chosen": -30.0, "logps/rejected": -40.0}
        for name in found:
            found[name] = Canned.changes.get((self.name, self.count, name), found[name])
        memory = {"peak_mib": 900.0, "resident_mib": 300.0, "held_mib": 300.0}
        seconds = 4.0 if self.name == "trl" else 2.0
        self.count += 1
        return {**found, **memory, "seconds": seconds, "tokens": 10, "fill_rate": None}

    def step(self):
        return self.receive()

    def stop(self):
        Canned.alive.remove(self.name)


@pytest.fixture
def canned(monkeypatch):
    monkeypatch.setattr(Canned, "alive", [], raising=False)
    monkeypatch.setattr(Canned, "changes", {}, raising=False)
    pairs = [step_pairs.random_pair(4, 3, 3, 50, seed) for seed in range(8)]
    return {"pairs": pairs, "batch_size": 2, "seed": 0, "dtype": "bfloat16", "autocast": True}


def results_of(job, *, at_once=6, variants=tuple(step_worker.VARIANTS)):
    found = list(step_turns.measure(job, list(variants), 2, at_once=at_once, start=Canned))
    assert not Canned.alive
    return {result.variant: result for result in found}


@pytest.mark.parametrize(
    "where, value, message",
    [
        (("fastdpo", 0, "loss"), 0.7, "in fp32: disagrees: the first loss is 0.70000, not log 2"),
        (("fastdpo", 0, "grad_norm"), 2.01, "in fp32: disagrees: grad_norm is off by 0.005"),
        (("fastdpo", 1, "loss"), 0.6935, "in fp32: disagrees: loss is off by 0.0004"),
        (("fastdpo", 1, "logps/rejected"), -39.9, "in fp32: disagrees: logps is off by 0.0025"),
        (("fastdpo", 1, "loss"), math.nan, "in fp32: disagrees: loss is off by inf"),
        (("trl", 0, "logps/chosen"), -30.1, "in fp32: disagrees: logps is off by 0.0033"),
    ],
)
def test_disagreement_in_fp32_is_found_before_any_time(canned, where, value, message):
    Canned.changes[where] = value
    found = results_of(canned)
    assert set(found) == set(step_worker.VARIANTS)
    result = found.pop(where[0])
    assert (result.note or "").startswith(message) and not result.steps and not result.ratios
    for name, other in found.items():
        assert other.note is None, name
        expected = [] if where[0] == "trl" else [1.0 if name == "trl" else 2.0] * 2
        assert other.ratios == expected, name


def test_rounding_passes_and_more_does_not(canned, monkeypatch):
    Canned.changes.update({("fastdpo", 2, "loss"): 0.73, ("fastdpo (packed)", 2, "loss"): 0.83})
    found = results_of(canned)
    assert found["fastdpo"].note is None
    note = found["fastdpo (packed)"].note
    assert note == "disagrees: loss is off by 0.14, over 0.1"
    assert not found["fastdpo (packed)"].ratios


@pytest.mark.parametrize(
    "at_once, memory, most", [(6, 1e6, 6), (3, 1e6, 3), (6, 1.0, 2), (1, 1e6, 1)]
)
def test_no_more_processes_than_there_is_memory_for(canned, monkeypatch, at_once, memory, most):
    sizes = []
    run = step_turns.Group.run

    def counting(group, rounds):
        sizes.append(list(group.workers))
        run(group, rounds)

    monkeypatch.setattr(step_turns.Group, "run", counting)
    monkeypatch.setattr(step_turns, "capacity_mib", lambda: memory)
    found = results_of({**canned, "dtype": "float32", "autocast": False}, at_once=at_once)
    assert set(found) == set(step_worker.VARIANTS) and max(map(len, sizes)) == most
    assert all(result.ratios == [2.0] * 2 for name, result in found.items() if name != "trl")
    assert all(group[0] == "trl" for group in sizes) or most == 1
    assert found["fastdpo (padded)"].interleaved == (most > 1)


@pytest.mark.parametrize("alone", [True, False])
def test_what_runs_out_of_memory_beside_others_is_tried_alone(canned, monkeypatch, alone):
    receive = Canned.receive

    def crowded(worker):
        if worker.name == "fastdpo" and (len(Canned.alive) > 1 or not alone):
            raise turns.Failed(turns.OUT_OF_MEMORY)
        return receive(worker)

    monkeypatch.setattr(Canned, "receive", crowded)
    found = results_of({**canned, "dtype": "float32", "autocast": False})
    assert found["fastdpo"].note == (None if alone else turns.OUT_OF_MEMORY)
    assert found["fastdpo"].ratios == [2.0] * 2 * alone and not found["fastdpo"].interleaved
    assert all(x.interleaved for name, x in found.items() if name != "fastdpo")


def test_a_process_that_dies_is_out_of_memory_probably(tmp_path, model):
    job = {**step.job_of(step.parse(["--lengths", "4/4"]), str(model)), "variant": "fastdpo"}
    worker = step_crew.Worker("fastdpo", tmp_path)
    worker.begin({**job, "pairs": []})
    worker.process.kill()
    with pytest.raises(turns.Failed, match="out of memory, probably"):
        worker.receive()
    worker.stop()


@pytest.mark.parametrize("limit", [700, 1024, 5000, 70_000])
def test_the_longest_pair_is_bisected(limit):
    tried = []

    def fits(n):
        tried.append(n)
        return None if n <= limit else "out of memory"

    *before, (found, why) = step.longest(fits)
    assert all(note == step.SO_FAR and fits(n) is None for n, note in before)
    assert found == (limit // 1024 * 1024 or None)
    assert why == f"{(found or 0) + 1024:,} does not: out of memory"
    assert len(set(tried)) == len(tried) - len(before) < 16
    assert [*step.longest(lambda n: None, most=4096)][-1] == (
        4096,
        "not tried over 4,096 positions",
    )
    if found:  # a search goes on from what is known
        assert [*step.longest(fits, good=found)][-1] == (found, why)


def test_the_longest_pair_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="--longest needs a GPU"):
        rows_of("--longest", "--shape", "llama-3-8b")


def test_the_table_of_longest_pairs():
    common = {
        "op": step_tables.LONGEST,
        "device": "D",
        "model": "M",
        "git": None,
        "utc": "2026-01-01T",
    }
    rows = [
        {**common, "variant": name, "budget_gib": budget, "longest": found, "note": note}
        for name, budget, found, note in [
            ("trl", 24, None, "1,024 does not: out of memory"), ("trl", 48, 2048, ""),
            ("fastdpo", 24, 4096, ""), ("fastdpo", 48, 65536, ""),
        ]
    ]  # fmt: skip
    text = step_tables.markdown(rows, [])
    assert "| fastdpo | 2 x 4,096 | 2 x 65,536 |" in text
    assert "| trl | 1,024 does not: out of memory | 2 x 2,048 |" in text
    assert report.kind_of(rows) == step_tables.OP and report.kind_of([{"op": "dpo_loss"}]) is None


def test_public_files_become_pairs(tmp_path):
    turns = [("system", "be nice"), ("human", "hello"), ("gpt", "yes"), ("human", "why")]
    long = {
        "conversations": [{"from": who, "value": text} for who, text in turns],
        "chosen": {"from": "gpt", "value": "so"}, "rejected": {"from": "gpt", "value": "no"},
    }  # fmt: skip
    (tmp_path / "long.json").write_text(json.dumps([long]))
    out = tmp_path / "out.jsonl"
    assert step.main(["--convert", str(tmp_path / "long.json"), str(out)]) == 0
    row = json.loads(out.read_text())
    assert [x["role"] for x in row["prompt"]] == ["system", "user", "assistant", "user"]
    assert row["chosen"] == [{"role": "assistant", "content": "so"}]
    short = step_pairs.as_preference(source_rows(1)[0])
    assert short["prompt"][0]["content"] == "tell me about dogs 0"
    assert step_pairs.as_preference(row) == row
    with pytest.raises(ValueError, match="different prompts"):
        step_pairs.as_preference({**source_rows(1)[0], "i_reject": "another"})


def test_random_pairs_have_the_lengths_asked_for(model):
    args = step.parse(["--lengths", "12/5", "--steps", "1", "--batch-size", "3"])
    pairs = step.pairs_of(args, str(model))
    assert len(pairs) == 9 and {step_pairs.lengths(pair) for pair in pairs} == {(17, 17)}
    assert all(pair.chosen_ids != pair.rejected_ids for pair in pairs)
    assert pairs == step.pairs_of(args, str(model))


def test_token_counts_of_pairs_are_kept_in_a_file(model, tmp_path, capsys):
    file = f"{tmp_path / 'lengths.json'}:public"
    command = arguments(model, tmp_path, "--write-lengths", file)
    for _ in range(2):  # the same file comes again
        assert step.main(command) == 0
    real = step_pairs.read_pairs(str(tmp_path / "public.jsonl"), str(model), 64)
    found = step_pairs.read_lengths(file, 50, 64, seed=0)
    assert sorted(map(step_pairs.lengths, found)) == sorted(map(step_pairs.lengths, real))
    assert max(max(pair.chosen_ids) for pair in found) < 50
    longest = max(max(step_pairs.lengths(pair)) for pair in real)
    assert len(step_pairs.read_lengths(file, 50, longest - 1, seed=0)) < len(real)
    args = step.parse(["--lengths", file, "--batch-size", "2", "--steps", "1"])
    assert len(step.pairs_of(args, str(model))) == 6
    assert step.data_name(args) == "random, lengths of public"


@pytest.mark.parametrize(
    "command",
    [
        [], ["--dataset", "x", "--lengths", "1/1"], ["--dataset", "x", "--variants", "none"],
        ["--dataset", "x", "--shape", "llama-3-8b"], ["--dataset", "x", "--steps", "0"],
    ],
)  # fmt: skip
def test_impossible_commands(command):
    with pytest.raises(SystemExit):
        step.parse(command)


def test_shapes_are_of_the_size_their_names_say():
    import transformers

    billions = {"llama-3.2-1b": 1.24, "llama-3-8b": 8.03, "qwen2.5-0.5b": 0.49, "qwen2.5-7b": 7.62}
    billions["tiny"] = 0.00577
    for name, (config_class, numbers) in step_pairs.SHAPES.items():
        config = getattr(transformers, config_class)(**numbers)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert model.num_parameters() / 1e9 == pytest.approx(billions[name], rel=0.01), name


@pytest.mark.slow
def test_in_processes_of_their_own_in_bf16(model, tmp_path):
    more = ("--learning-rate", "1e-4", "--threads", "1", "--gradient-checkpointing")
    found = rows_of(*arguments(model, tmp_path, *more), worker=step_crew.Worker)
    ran = [row for row in found if row["variant"] not in step.ABSENT]
    assert [row["note"] for row in ran] == [None] * len(step_worker.VARIANTS)
    assert all(row["x_trl"] > 0 and row["off_fp32"] and row["interleaved"] for row in ran)
