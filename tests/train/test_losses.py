"""Every objective in the trainer: TRL's trainers, whole steps, references, single responses.

They run on a GPU where there is one, but for comparisons with TRL, whose trainers are set to the
CPU.  ``-m gpu`` takes a few of each kind of objective.
"""

import logging
import math
import os
import socket
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer import CONFIG, random_pairs, read_metrics, weights
from tiny import LLAMA, save_tiny
from torch.multiprocessing.spawn import spawn

from fastdpo.data.batch import plan_steps
from fastdpo.data.examples import TokenizedList, TokenizedPair, TokenizedSingle
from fastdpo.errors import ConfigError, DataError
from fastdpo.kernels.support import METRICS
from fastdpo.model.load import load_tokenizer
from fastdpo.train import control, coupling, engine, logps, prepare, reference, trainer
from fastdpo.train.config import EvalConfig, TrainConfig
from fastdpo.train.trainer import train

LOG_2 = torch.tensor(2.0).log()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return str(save_tiny(LLAMA, tmp_path_factory.mktemp("model") / "llama"))


def config_of(**changes):
    return TrainConfig(**{**CONFIG, "bf16": False, **changes})


def run(model_path, out, examples, **changes):
    given = ("eval_pairs", "evaluation", "reference")
    options = {x: changes.pop(x) for x in given if x in changes}
    config = config_of(**changes)
    tokenizer = load_tokenizer(model_path)
    return train(model_path, tokenizer, examples, config, out, progress=False, **options)


def scored(pairs):
    return [
        replace(pair, score_chosen=0.5 + i % 3, score_rejected=-0.25 * i)
        for i, pair in enumerate(pairs)
    ]


def lists_of(pairs):
    return [
        TokenizedList(
            pair.prompt_ids,
            [pair.chosen_ids, pair.rejected_ids, [*pair.chosen_ids[::-1], 7]],
            [2.0, 0.0, 1.0],
        )
        for pair in pairs
    ]


# --------------------------------------------------------------------------------------------- TRL
RATE, BETA, BATCH = 0.1, 0.3, 4  # of clipped gradients


def sgd(monkeypatch):
    """TRL's steps without Adam, which turns the rounding of small gradients into steps."""

    def optimizer(model, config, steps):
        found = torch.optim.SGD(model.parameters(), lr=RATE)
        return found, torch.optim.lr_scheduler.LambdaLR(found, lambda step: 1.0)

    monkeypatch.setattr(trainer, "_optimizer", optimizer)


def in_their_order(examples):
    """So that a run on them takes each step's examples from the given ones in their order."""
    steps = plan_steps([1] * len(examples), batch_pairs=BATCH, max_tokens=10**6, seed=0)
    order = list(chain.from_iterable(chain.from_iterable(steps)))
    # Within a step the order has no meaning, but which examples it has must be the same.
    placed = [None] * len(examples)
    for place, example in zip(order, examples):
        placed[place] = example
    return placed


def sequential(trainer_class):
    class Sequential(trainer_class):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return Sequential


def assert_same_weights(out, model, start):
    from safetensors.torch import load_file

    theirs, before = dict(model.named_parameters()), load_file(f"{start}/model.safetensors")
    for name, ours in weights(out).items():
        moved = (theirs[name] - before[name]).norm()
        assert (ours - theirs[name]).norm() < 1e-5 * theirs[name].norm(), name
        assert (ours - theirs[name]).norm() < 2e-3 * moved, name


OF_TRL = {
    **{name: dict(loss_type=name) for name in (
        "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
        "discopop", "sft", "sigmoid_norm",
    )},
    "exo_pair": dict(loss_type="exo_pair", label_smoothing=1e-3),
    "robust": dict(loss_type="robust", label_smoothing=0.1),
    "aot": dict(loss_type="aot", label_smoothing=0.1),
    "aot_unpaired": dict(loss_type="aot_unpaired"),
    "mpo": dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    "ld_dpo": dict(loss_type="sigmoid", ld_alpha=0.5),
    "wpo": dict(loss_type="sigmoid", use_weighting=True),
    "js": dict(loss_type="sigmoid", f_divergence_type="js_divergence"),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_TRL)
def test_three_steps_are_those_of_trls_trainer(name, model_path, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    from trl_options import make_trainer

    options = OF_TRL[name]
    theirs = make_trainer(sequential(trl.DPOTrainer), LLAMA, tmp_path, max_grad_norm=1.0, **options)
    pairs = [
        TokenizedPair(x["prompt_ids"], x["chosen_ids"], x["rejected_ids"])
        for x in theirs.train_dataset
    ]
    theirs.train()
    logged = [row["loss"] for row in theirs.state.log_history if "loss" in row]
    sgd(monkeypatch)
    run(
        model_path, tmp_path / "ours", in_their_order(pairs),
        beta=BETA, batch_size=BATCH, max_length=200, max_tokens=200, **options,
    )  # fmt: skip
    losses = [row["loss"] for row in read_metrics(tmp_path / "ours")]
    assert losses == pytest.approx(logged, rel=2e-4)
    assert_same_weights(tmp_path / "ours", theirs.model, model_path)


def other_trainer(trainer_class, config_class, folder, dataset, **options):
    """A trainer of TRL's that has settings of its own, on the tiny model."""
    from datasets import Dataset
    from tiny import build_tokenizer
    from transformers import AutoModelForCausalLM

    path = save_tiny(LLAMA, folder / "model")
    settings = config_class(
        output_dir=str(folder / "out"), beta=BETA, max_steps=3, optim="sgd", learning_rate=RATE,
        per_device_train_batch_size=BATCH, lr_scheduler_type="constant", max_grad_norm=1.0,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, weight_decay=0.0, logging_steps=1, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float32
    )
    return sequential(trainer_class)(
        model=model, args=settings, train_dataset=Dataset.from_list(dataset),
        processing_class=build_tokenizer(),
    )  # fmt: skip


def assert_same_run(model_path, out, theirs, examples, monkeypatch, **options):
    theirs.train()
    logged = [row["loss"] for row in theirs.state.log_history if "loss" in row]
    sgd(monkeypatch)
    run(
        model_path, out, in_their_order(examples), beta=BETA, batch_size=BATCH, max_length=200,
        max_tokens=200, **options,
    )  # fmt: skip
    assert [row["loss"] for row in read_metrics(out)] == pytest.approx(logged, rel=2e-4)
    assert_same_weights(out, theirs.model, model_path)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto_is_that_of_trls_trainer(name, model_path, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    rows = [
        {
            "prompt": f"tell {i % 5} of ",
            "completion": "so and so " * (i % 4 + 1),
            "label": i % 3 > 0,
        }
        for i in range(12)
    ]
    weighed = dict(desirable_weight=1.5, undesirable_weight=0.5)
    theirs = other_trainer(
        trl.KTOTrainer, trl.KTOConfig, tmp_path, rows, loss_type=name,
        train_sampling_strategy="sequential", **weighed,
    )  # fmt: skip
    given = list(theirs.train_dataset)
    examples = [
        TokenizedSingle(x["prompt_ids"], x["completion_ids"], bool(x["label"])) for x in given
    ]
    # TRL takes the completions of the batch that it draws.
    others = {
        tuple(x["prompt_ids"] + x["completion_ids"]): x.get("KL_completion_ids") for x in given
    }

    def mismatched(singles, most, name=""):
        keys = [tuple(x.prompt_ids + x.response_ids) for x in singles]
        return [TokenizedSingle(x.prompt_ids, others[key], True) for x, key in zip(singles, keys)]

    monkeypatch.setattr(prepare, "mismatched", mismatched)
    assert len(others) == 12
    out = tmp_path / "ours"
    assert_same_run(model_path, out, theirs, examples, monkeypatch, loss_type=name, **weighed)
    rows = read_metrics(out)
    logged = [row for row in theirs.state.log_history if "loss" in row]
    for mine, other in zip(rows, logged):
        assert mine.get("kl", 0.0) == pytest.approx(other["kl"], abs=1e-4)
        for metric in ("rewards/chosen", "rewards/rejected", "logps/chosen", "rewards/margins"):
            assert mine[metric] == pytest.approx(other[metric], abs=2e-3), metric
    assert ("kl" in rows[0]) == (name == "kto")


OF_OTHER_TRAINERS = {
    "cpo": dict(loss_type="cpo", cpo_alpha=0.7),
    "simpo": dict(loss_type="simpo", simpo_gamma=0.4, cpo_alpha=0.3),
    "orpo": dict(loss_type="orpo"),
}


@pytest.mark.parametrize("name", OF_OTHER_TRAINERS)
def test_losses_without_a_reference_are_those_of_trls_trainers(
    name, model_path, tmp_path, monkeypatch
):
    pytest.importorskip("trl")
    options = OF_OTHER_TRAINERS[name]
    rows = [
        {"prompt": f"tell {i % 5} of ", "chosen": "so and so " * (i % 4 + 1), "rejected": "no" * i}
        for i in range(1, 13)
    ]
    if name == "orpo":
        rows[0]["prompt"] = "t"  # of one token, which nothing is before

        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        theirs = other_trainer(ORPOTrainer, ORPOConfig, tmp_path, rows)
    else:
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        of_theirs = {**options, "loss_type": {"cpo": "sigmoid"}.get(name, name)}
        theirs = other_trainer(CPOTrainer, CPOConfig, tmp_path, rows, **of_theirs)
    pairs = [
        TokenizedPair(
            prompt, x["chosen_input_ids"][len(prompt) :], x["rejected_input_ids"][len(prompt) :]
        )
        for x in theirs.train_dataset
        if (prompt := x["prompt_input_ids"])
    ]
    assert len(pairs) == 12 and (len(pairs[0].prompt_ids) == 1) == (name == "orpo")
    out = tmp_path / "ours"
    assert_same_run(model_path, out, theirs, pairs, monkeypatch, **options)
    assert not (out / "ref_logps").exists()


# ------------------------------------------------------------------------------------- whole steps
COUPLED = {
    "aot": dict(loss_type="aot", label_smoothing=0.1),
    "sft": dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]),
    "kto": dict(loss_type="kto"),
    "bco": dict(loss_type="bco"),
}

ALL = {
    **COUPLED,
    "plackett_luce": dict(loss_type="plackett_luce"),
    "tdpo2": dict(loss_type="tdpo2", precompute_ref_log_probs=False),
    "orpo": dict(loss_type="orpo"),
    "ld_alpha": dict(loss_type="ipo", ld_alpha=0.3),
}


def in_two_processes(rank, port, model_path, folder):
    """What `run` does, as one of two processes."""
    torch.set_num_threads(1)
    os.environ.update(
        ACCELERATE_USE_CPU="true", WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    for name in ALL:
        run_one(model_path, Path(folder) / name, name)
    torch.distributed.destroy_process_group()


def run_one(model_path, out, name, **changes):
    # Of the first step each process has several examples, of the last one has none.
    weighed = [replace(x, weight=1 + i % 2) for i, x in enumerate(random_pairs(9))]
    options = {"batch_size": 16} if name in ("kto", "bco") else {}
    held = random_pairs(3, seed=5)
    if name == "plackett_luce":
        weighed, held = lists_of(weighed), lists_of(held)
    run(
        model_path, out, weighed, eval_pairs=held, num_train_epochs=2,
        **{**ALL[name], **options, **changes},
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(model_path, tmp_path_factory):
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name in COUPLED:
        run_one(model_path, folder / name, name)
    return folder


def assert_same_training(found, wanted):
    rows = read_metrics(found)
    assert len(rows) == len(read_metrics(wanted)) > 4
    for row, other in zip(rows, read_metrics(wanted)):
        assert row.keys() == other.keys()
        for metric in ("loss", "eval_loss", "kl", "rewards/running_mean", "rewards/margins"):
            if metric in row:
                assert row[metric] == pytest.approx(other[metric], rel=2e-3, abs=2e-4), metric
    for name, x in weights(found).items():
        torch.testing.assert_close(x, weights(wanted)[name], rtol=1e-3, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", COUPLED)
def test_what_is_of_a_step_does_not_depend_on_its_packing(name, alone, model_path, tmp_path):
    run_one(model_path, tmp_path / "padded", name, layout="padded")
    assert_same_training(tmp_path / "padded", alone / name)
    run_one(model_path, tmp_path, name, max_tokens=4000)
    assert_same_training(tmp_path, alone / name)
    (first, *_) = [row for row in read_metrics(tmp_path) if "loss" in row]
    (tight, *_) = [row for row in read_metrics(alone / name) if "loss" in row]
    assert first["fill_rate"] < 0.1 and tight["fill_rate"] > 0.3  # of one batch, and of several


@pytest.mark.slow
def test_what_is_of_a_step_does_not_depend_on_its_processes(alone, model_path, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    spawn(in_two_processes, args=(port, model_path, str(tmp_path)), nprocs=2)
    for name in ALL:
        if name not in COUPLED:
            run_one(model_path, alone / name, name)
        assert_same_training(tmp_path / name, alone / name)


def test_only_what_couples_takes_a_second_pass(model_path, tmp_path, monkeypatch):
    passes, real = [], coupling.batch_logps

    def counted(*args):
        passes.append(1)
        return real(*args)

    monkeypatch.setattr(coupling, "batch_logps", counted)
    run(model_path, tmp_path / "plain", random_pairs(8), loss_type=["sigmoid", "sft"])
    assert not passes
    run(model_path, tmp_path / "aot", random_pairs(8), loss_type="aot_unpaired")
    assert len(passes) >= 2
    # An evaluation takes BCO's mean as it is.
    held = {"eval_pairs": random_pairs(3, seed=5)}
    found = []
    for name, options in (("bco", {}), ("evaluated", held)):
        passes.clear()
        run(model_path, tmp_path / name, random_pairs(8), loss_type="bco", **options)
        found.append(len(passes))
    assert found[0] == found[1] > 2


def test_bco_goes_on_with_the_same_bits(model_path, tmp_path, monkeypatch):
    options = dict(loss_type="bco", num_train_epochs=2, save_steps=2)
    run(model_path, tmp_path / "whole", random_pairs(8), **options)
    real, calls = trainer.take_step, []

    def interrupted(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(trainer, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model_path, tmp_path / "broken", random_pairs(8), **options)
    monkeypatch.setattr(trainer, "take_step", real)
    run(model_path, tmp_path / "broken", random_pairs(8), **options)
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    means = [
        [row["rewards/running_mean"] for row in read_metrics(tmp_path / name)]
        for name in ("whole", "broken")
    ]
    assert means[0] == means[1] and means[0][0] == 0.0 and means[0][-1] != means[0][-2]


def test_mismatched_completions_are_of_other_prompts_and_fit():
    singles = [TokenizedSingle([1 + i % 2] * (3 + i), [5 + i] * 9, i > 2) for i in range(6)]
    singles += [TokenizedSingle([1, 1, 1], [20], True), TokenizedSingle([1, 1, 1], [21], False)]
    found = coupling.mismatched(singles, 12)
    by_response = {x.response_ids[0]: x.prompt_ids for x in singles}
    for single, other in zip(singles, found):
        assert other.prompt_ids == single.prompt_ids
        assert by_response[other.response_ids[0]] != single.prompt_ids
        assert len(other.response_ids) >= 1 and other.longest <= 12
    assert found == coupling.mismatched(singles, 12)


def test_mismatched_completions_where_one_prompt_dominates():
    """Each is the first in the order, from its own place on, that another prompt has."""
    singles = [TokenizedSingle([2 + (i % 40 == 7)], [5 + i], True) for i in range(120)]
    generator = torch.Generator().manual_seed(coupling._MISMATCHES)
    order = torch.randperm(len(singles), generator=generator).tolist()
    for i, other in enumerate(coupling.mismatched(singles, 12)):
        places = (singles[j] for j in order[i:] + order[:i])
        found = next(x for x in places if x.prompt_ids != singles[i].prompt_ids)
        assert other.response_ids == found.response_ids
    same = [TokenizedSingle([2], [5 + i], True, where=f"data:{i}") for i in range(3)]
    with pytest.raises(DataError, match="all 3 rows have the prompt of data:0; give rows of"):
        coupling.mismatched(same, 12)


# -------------------------------------------------------------------------------------- references
@pytest.mark.gpu
def test_no_reference_is_computed_for_a_loss_that_needs_none(model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "compute_reference", None)
    monkeypatch.setattr(engine, "weights_digest", None)
    cache = tmp_path / "cache"
    monkeypatch.setattr(reference, "cache_path", lambda _: cache)
    config = {**CONFIG, "loss_type": "simpo"}
    del config["reference_cache"]
    out = tmp_path / "run"
    held = random_pairs(3, seed=5)
    train(
        model_path, load_tokenizer(model_path), random_pairs(8), TrainConfig(**config), out,
        progress=False, eval_pairs=held,
    )  # fmt: skip
    assert not cache.exists() and not (out / "ref_logps").exists()
    assert {"eval_loss", "eval_rewards/margins"} <= read_metrics(out)[0].keys()


def test_the_file_has_tokens_and_one_of_sums_is_used_where_they_do(
    model_path, tmp_path, monkeypatch, caplog
):
    calls, real = [], reference.compute_reference
    monkeypatch.setattr(reference, "compute_reference", lambda *x: calls.append(1) or real(*x))
    pairs, cache = random_pairs(8), tmp_path / "cache"
    run(model_path, tmp_path / "a", pairs, reference_cache=str(cache))
    (file,) = cache.iterdir()
    found = load_file(file)
    parts = found["logp_N"].split(found["bounds_S1"].diff().tolist())
    sums = torch.stack([part.sum(dtype=torch.float64) for part in parts])
    assert torch.equal(sums, found["logp_S"]) and found["logp_N"].dtype == torch.float32
    assert list(map(len, parts)) == [len(ids) for pair in pairs for ids in pair.responses]
    # As it was written before there were tokens in it.
    owner = _metadata(file)["digests"].partition(" ")[0]
    old = {"digests": f"{owner} {logps._digest(found['logp_S'])}"}
    save_file({"logp_P2": found["logp_S"].view(-1, 2)}, file, old)
    run(model_path, tmp_path / "b", pairs, reference_cache=str(cache))
    assert len(calls) == 1 and "again" not in caplog.text
    with caplog.at_level(logging.WARNING):
        run(model_path, tmp_path / "c", pairs, reference_cache=str(cache), ld_alpha=0.3)
    assert len(calls) == 2 and "sums alone" in caplog.text and "computed again" in caplog.text
    assert torch.equal(load_file(file)["logp_N"], found["logp_N"])
    for name in "abc":
        first = torch.tensor(read_metrics(tmp_path / name)[0]["loss"])
        assert first == LOG_2, name


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [dict(loss_type="sigmoid", ld_alpha=0.3), dict(loss_type="kto")], ids=str
)
def test_a_reference_in_every_step_gives_the_same(options, model_path, tmp_path):
    run(model_path, tmp_path / "once", random_pairs(8), **options)
    run(model_path, tmp_path / "each", random_pairs(8), precompute_ref_log_probs=False, **options)
    once, each = (
        torch.tensor([row["loss"] for row in read_metrics(tmp_path / x)]) for x in ("once", "each")
    )
    torch.testing.assert_close(once, each, rtol=1e-5, atol=0)
    assert not (tmp_path / "each" / "ref_logps").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [False, True])
def test_tdpo_runs_the_reference_in_each_step(lora, model_path, tmp_path):
    if lora:
        pytest.importorskip("peft")
    options = dict(use_peft=True, lora_r=4, learning_rate=1e-2) if lora else {}
    run(
        model_path, tmp_path / "own", random_pairs(8), loss_type="tdpo2", num_train_epochs=3,
        precompute_ref_log_probs=False, eval_pairs=random_pairs(3, seed=5), **options,
    )  # fmt: skip
    rows = [row for row in read_metrics(tmp_path / "own") if "loss" in row]
    assert torch.tensor(rows[0]["loss"]) == LOG_2 and rows[-1]["loss"] < 0.6
    assert not (tmp_path / "own" / "ref_logps").exists()
    if not lora:  # the same model under its name
        run(
            model_path, tmp_path / "named", random_pairs(8), loss_type="tdpo2", num_train_epochs=3,
            precompute_ref_log_probs=False, reference=model_path,
        )  # fmt: skip
        again = [row["loss"] for row in read_metrics(tmp_path / "named")]
        assert again == pytest.approx([row["loss"] for row in rows], rel=1e-5)


# ---------------------------------------------------------------------------------- scores, columns
def softplus(x):
    return math.log1p(math.exp(x))


PAIR = random_pairs(1)[0]
OFFSETS = {
    "log_difference": lambda chosen, rejected: math.log(chosen - rejected),
    "log_ratio": lambda chosen, rejected: math.log(chosen / rejected),
    "difference": lambda chosen, rejected: chosen - rejected,
}


@pytest.mark.parametrize("offset", OFFSETS)
def test_scores_are_offsets_weights_and_labels(offset, model_path, tmp_path):
    """At the start the log-ratios are zero, so the first loss is known."""
    scores = [(2.0, 0.5), (1.25, 1.0)]
    pairs = [
        replace(pair, score_chosen=x, score_rejected=y, margin=0.1 * i)
        for i, (pair, (x, y)) in enumerate(zip(random_pairs(2), scores))
    ]
    run(
        model_path, tmp_path, pairs, score_offset=offset, score_offset_weight=0.7,
        score_weight=True, score_label=True,
    )  # fmt: skip
    wanted = 0.0
    for i, (chosen, rejected) in enumerate(scores):
        z = 0.1 * i - 0.7 * OFFSETS[offset](chosen, rejected)
        eps = 1 / (1 + math.exp(chosen - rejected))
        wanted += (chosen - rejected) * ((1 - eps) * softplus(-z) + eps * softplus(z)) / 2
    assert read_metrics(tmp_path)[0]["loss"] == pytest.approx(wanted, rel=1e-6)


def test_scores_that_nothing_reads_change_nothing(model_path, tmp_path):
    run(model_path, tmp_path, random_pairs(8))
    run(model_path, tmp_path, scored(random_pairs(8)))  # the same run


@pytest.mark.gpu
def test_a_list_is_trained_to_its_order(model_path, tmp_path):
    held = lists_of(random_pairs(3, seed=3))
    run(
        model_path, tmp_path, lists_of(random_pairs(8)), loss_type="plackett_luce",
        num_train_epochs=6, eval_pairs=held,
    )  # fmt: skip
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(6))
    assert rows[-1]["loss"] < 1.5 and rows[-1]["rewards/accuracies"] > 0.9
    assert rows[-1]["rewards/margins"] > 0.2
    assert read_metrics(tmp_path)[0]["eval_loss"] == pytest.approx(math.log(6))


@pytest.mark.parametrize("longer", [True, False])
@pytest.mark.parametrize("name", ["hinge", "ipo", "sigmoid_norm", "discopop"])
def test_alpha_is_found_for_every_loss_of_the_margin(
    name, longer, model_path, tmp_path, monkeypatch
):
    """Against the lengths that are learned, which without a look-ahead the steps alone tell.

    DiscoPOP's loss rises with z at 0, so it learns the rejected side's first.
    """
    monkeypatch.setattr(control, "neutral_alpha", lambda *_: 0.0)
    pairs = [
        replace(pair, chosen_ids=both[longer], rejected_ids=both[not longer])
        for pair in random_pairs(8)
        if (both := sorted((pair.chosen_ids, pair.rejected_ids), key=len))
    ]
    run(model_path, tmp_path, pairs, loss_type=name, alpha="auto", num_train_epochs=3)
    rows, sign = read_metrics(tmp_path), 1 if longer == (name != "discopop") else -1
    alphas = [sign * row["alpha"] for row in rows]
    assert alphas[:2] == [0, 0] and alphas[2:] == sorted(alphas[2:]) and alphas[2] > 0
    assert all(abs(row["alpha"]) < row["alpha/bound"] for row in rows)


# --------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(loss_type="dpo"), "loss_type must be of sigmoid, .*got 'dpo'"),
        (dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0]), "loss_weights must have a weight"),
        (dict(simpo_gamma=1.0), "simpo_gamma=1.0 means nothing to loss_type 'sigmoid'"),
        (dict(loss_type="nca_pair", alpha=0.1), "alpha=0.1 must be left out, .*of the margin"),
        (dict(loss_type="nca_pair", alpha="auto"), "alpha=auto needs a loss of the margin"),
        (dict(loss_type="simpo", alpha="auto"), "alpha=auto needs a loss of the margin to the ref"),
        (dict(loss_type="ranknet", alpha="auto"), "alpha=auto needs .* of pairs, not loss_type=r"),
        (dict(loss_type=["sigmoid", "orpo"], alpha="auto"), "alpha=auto needs .* of pairs, not"),
        (dict(loss_type="simpo", precompute_ref_log_probs=False), "precompute_ref.*no reference"),
        (dict(loss_type="tdpo1"), "precompute_ref_log_probs=True gives no KL.*set precompute_ref"),
        (dict(loss_type="orpo", reference_cache="x"), "reference_cache=x.*orpo needs no reference"),
        (dict(loss_type="kto", score_label=True), "score_label=True.*has no margin of a pair"),
        (dict(loss_type="plackett_luce", score_weight=True), "score_weight=True.*not of pairs"),
        (dict(score_offset="gap"), "score_offset=gap must be one of none, log_difference"),
        (dict(score_offset_weight=2.0), "score_offset_weight=2.0.*score_offset be given"),
        (dict(loss_type="cdpo", label_smoothing=0.1, score_label=True), "left out beside score_la"),
        (dict(loss_type="sigmoid", label_smoothing=0.1), "label_smoothing=0.1 means nothing"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        (PAIR, dict(score_offset="difference"), "score_offset=difference needs scores"),
        (replace(PAIR, score_chosen=1.0, score_rejected=1.0),
         dict(score_offset="log_difference"), "scores higher, and it has score_chosen=1.0"),
        (replace(PAIR, score_chosen=1.0, score_rejected=-1.0),
         dict(score_offset="log_ratio"), "needs scores above 0"),
        (replace(PAIR, score_chosen=0.0, score_rejected=1.0),
         dict(score_weight=True), "scores no lower"),
        (replace(PAIR, score_chosen=2.0, score_rejected=1.0, label_smoothing=0.1),
         dict(score_label=True), "label_smoothing=0.1 of its own, beside score_label"),
        (PAIR, dict(loss_type="sppo"), "loss_type=sppo needs scores"),
        (replace(PAIR, margin=0.5), dict(loss_type="nca_pair"), "no use for margin=0.5"),
        (replace(PAIR, margin=0.5), dict(loss_type="kto"), "margin=0.5 means something to a pair"),
        (replace(PAIR, label_smoothing=0.2), dict(loss_type="cdpo", label_smoothing=0.1),
         "beside the option label_smoothing=0.1"),
        (replace(PAIR, label_smoothing=0.5), dict(loss_type=["hinge", "robust"]),
         "label_smoothing < 0.5, and this row has 0.5"),
        (PAIR, dict(loss_type="plackett_luce"), "takes lists, rows of prompt, responses and sco"),
        (replace(lists_of([PAIR])[0], scores=[1.0, 1.0, 0.0]), dict(loss_type="plackett_luce"),
         "loss_type=plackett_luce needs scores without ties"),
        (lists_of([PAIR])[0], dict(loss_type="lipo_lambda", list_size=4),
         "it has 3 responses, not list_size=4; give it as many"),
        (lists_of([PAIR])[0], dict(), "takes pairs, rows of prompt, chosen and rejected"),
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_a_loss_cannot_take_are_named(example, options, message, tmp_path):
    with pytest.raises(DataError, match=f"^data:7: .*{message}"):
        train("model", None, [replace(example, where="data:7")], config_of(**options), tmp_path)


METRICS_OF = {
    "pairs": (random_pairs(3, seed=5), "ipo", METRICS),
    "lists": (lists_of(random_pairs(3, seed=5)), "plackett_luce", METRICS),
    "singles": (
        random_pairs(3, seed=5), "kto", {*METRICS} - {"rewards/accuracies", "length_margin"},
    ),
    "desirable": ([TokenizedSingle([5, 6], [7 + i, 8], True) for i in range(3)], "bco", {
        "rewards/chosen", "logps/chosen", "lengths/chosen",
    }),
    "tied": ([replace(x, scores=[1.0] * 3) for x in lists_of(random_pairs(3, seed=5))], "ranknet",
        {*METRICS} - {"rewards/accuracies"}),
}  # fmt: skip


@pytest.mark.parametrize("name", METRICS_OF)
def test_the_best_is_chosen_by_a_metric_that_there_is(name, model_path, tmp_path):
    held, loss_type, names = METRICS_OF[name]
    examples = random_pairs(4) if held[0].shape != "lists" else lists_of(random_pairs(4))
    for metric in {*METRICS} - {*names}:
        best = EvalConfig(load_best_model_at_end=True, metric_for_best_model=metric)
        with pytest.raises(
            ConfigError, match=rf"=eval_{metric} is no metric of .*=\w+; give one of"
        ):
            train(
                "no model", None, examples, config_of(loss_type=loss_type), tmp_path,
                eval_pairs=held, evaluation=best,
            )  # fmt: skip
    run(model_path, tmp_path, examples, loss_type=loss_type, eval_pairs=held)
    found = {x.removeprefix("eval_") for x in read_metrics(tmp_path)[0] if x.startswith("eval_")}
    assert found & {*METRICS} == {*names}


def test_a_reference_that_nothing_reads_is_refused(model_path, tmp_path):
    with pytest.raises(ConfigError, match="reference=other has no effect: loss_type=cpo needs no"):
        run(model_path, tmp_path, random_pairs(2), loss_type="cpo", reference="other")
