"""What the losses make of options and columns: alpha's default, smoothing, ties, messages."""

import json
import logging
import math
from dataclasses import replace

import pytest
from test_trainer import CONFIG, random_pairs, read_metrics
from tiny import LLAMA, save_tiny

from fastdpo.cli.stages import TrainCommand
from fastdpo.cli.training import defaults as command_defaults
from fastdpo.data.examples import TokenizedList
from fastdpo.errors import ConfigError, DataError
from fastdpo.model.load import load_tokenizer
from fastdpo.report.page import differing
from fastdpo.report.runfiles import flat
from fastdpo.rounds.config import IterateConfig, defaults
from fastdpo.train.config import TrainConfig
from fastdpo.train.examples import as_trained, warn_of_ties
from fastdpo.train.launch import launched
from fastdpo.train.prepare import claim_folder
from fastdpo.train.steps import Setup
from fastdpo.train.trainer import train


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return str(save_tiny(LLAMA, tmp_path_factory.mktemp("model") / "llama"))


def run(model_path, out, examples, *, progress=False, eval_pairs=(), **changes):
    given = {**CONFIG, "bf16": False, **changes}
    config = TrainConfig(**{name: x for name, x in given.items() if x != "unset"})
    tokenizer = load_tokenizer(model_path)
    train(model_path, tokenizer, examples, config, out, progress=progress, eval_pairs=eval_pairs)


# ------------------------------------------------------------------------------------------- alpha
@pytest.mark.parametrize(
    ("loss_type", "alpha"),
    [("sigmoid", 0.01), (["sigmoid"], 0.01), ("ipo", 0.0), ("simpo", 0.0), ("kto", 0.0),
     ("lipo_lambda", 0.0), (["sigmoid", "sft"], 0.0)],
    ids=str,
)  # fmt: skip
def test_only_dpo_has_a_length_penalty_unasked(loss_type, alpha):
    config = TrainConfig(loss_type=loss_type)
    assert config.alpha == config.objective.alpha == alpha
    command = TrainCommand(model="m", dataset="d", loss_type=loss_type)
    assert command.alpha == alpha
    # Reports take it for the default that it is, and another one for none.
    known, options = command_defaults(TrainCommand), vars(command)
    assert "alpha" not in differing(options, known)
    assert differing({**options, "alpha": 0.02}, known)["alpha"] == 0.02
    rounds = flat(IterateConfig(model="", prompts="", train=config).to_dict())
    assert rounds["train.alpha"] == alpha and "train.alpha" not in differing(rounds, defaults())
    other = {**rounds, "train.alpha": 0.01 - alpha}
    assert differing(other, defaults())["train.alpha"] == 0.01 - alpha


def test_an_alpha_that_is_given_is_kept_or_refused():
    assert TrainConfig(loss_type="ipo", alpha=0.01).objective.alpha == 0.01
    assert TrainConfig(alpha=0.0).objective.alpha == 0.0
    for alpha in (0.02, 0.01):
        with pytest.raises(ConfigError, match=rf"alpha={alpha} must be left .*: kto has no length"):
            TrainConfig(loss_type="kto", alpha=alpha)


def test_a_folder_of_before_goes_on(tmp_path):
    setup = Setup(launched(TrainConfig()), TrainConfig(), tmp_path, None, False, random_pairs(2))
    claim_folder(setup, "model")
    path = tmp_path / "run.json"
    recorded = json.loads(path.read_text())
    assert recorded["alpha"] == 0.01
    for name in ("loss_type", "loss_weights", "alpha"):  # of before there were any
        del recorded[name]
        path.write_text(json.dumps(recorded))
        claim_folder(setup, "model")
    with pytest.raises(ConfigError, match=r"loss_type=sigmoid, not ipo|alpha=0\.01, not 0\.0"):
        claim_folder(replace(setup, config=TrainConfig(loss_type="ipo")), "model")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "sigmoid, beta=0.1, alpha=0.01"),
        ({"alpha": "auto"}, "sigmoid, beta=0.1, alpha=auto"),
        ({"loss_type": "ipo"}, "ipo, beta=0.1"),
        ({"loss_type": "ipo", "alpha": 0.02}, "ipo, beta=0.1, alpha=0.02"),
        ({"loss_type": "simpo", "beta": 2.0}, "simpo, beta=2, simpo_gamma=0.5"),
        ({"loss_type": ["hinge", "sft"], "loss_weights": [1.0, 0.2]}, "hinge + 0.2 sft, beta=0.1"),
        ({"loss_type": "robust", "label_smoothing": 0.2, "use_weighting": True},
         "robust, beta=0.1, label_smoothing=0.2, use_weighting=true"),
        ({"loss_type": "ipo", "f_divergence_type": "alpha_divergence",
          "score_offset": "difference"},
         "ipo, beta=0.1, f_divergence_type=alpha_divergence, f_alpha_divergence_coef=0.5, "
         "score_offset=difference"),
        ({"loss_type": "kto", "desirable_weight": 2.0}, "kto, beta=0.1, desirable_weight=2"),
    ],
    ids=str,
)  # fmt: skip
def test_the_loss_is_told_with_its_numbers(options, told):
    assert TrainConfig(**options).told_loss == told


def test_a_run_tells_its_loss_and_counts_its_examples(model_path, tmp_path, capsys):
    run(model_path, tmp_path / "a", random_pairs(4), progress=True, alpha="unset")
    told = capsys.readouterr().out
    assert "loss: sigmoid, beta=0.1, alpha=0.01\n" in told and "4 pairs, shared: 1 steps" in told
    run(model_path, tmp_path / "b", random_pairs(4), progress=True, loss_type="kto")
    told = capsys.readouterr().out
    assert "loss: kto, beta=0.1\n" in told
    assert "8 responses (two of each pair), shared: 2 steps" in told


# --------------------------------------------------------------------------------------- smoothing
def test_exo_pair_takes_the_smoothing_of_rows(model_path, tmp_path):
    """At the start q is 1/2, so the first loss is known."""
    gaps = [0.4, 1.5]
    of_rows = [1 / (1 + math.exp(gap)) for gap in gaps]
    wanted = sum(-math.log(2) - math.log(eps * (1 - eps)) / 2 for eps in of_rows) / 2
    pairs = [replace(x, label_smoothing=eps) for x, eps in zip(random_pairs(2), of_rows)]
    scored = [replace(x, score_chosen=gap, score_rejected=0.0)
              for x, gap in zip(random_pairs(2), gaps)]  # fmt: skip
    for name, given, options in (("a", pairs, {}), ("b", scored, {"score_label": True})):
        run(
            model_path,
            tmp_path / name,
            given,
            loss_type="exo_pair",
            eval_pairs=given[:0],
            **options,
        )
        assert read_metrics(tmp_path / name)[0]["loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("eps", "wanted"), [(0.0, "> 0, and this row has 0"), (1.0, "< 1, and")])
def test_a_row_without_smoothing_is_named(eps, wanted):
    pairs = [
        replace(x, label_smoothing=y, where=f"data:{i}")
        for i, (x, y) in enumerate(zip(random_pairs(2), (0.1, eps)))
    ]
    with pytest.raises(DataError, match=rf"^data:1: .*exo_pair needs label_smoothing {wanted}"):
        as_trained(pairs, TrainConfig(loss_type="exo_pair"))
    assert as_trained(random_pairs(1), TrainConfig(loss_type="exo_pair", label_smoothing=1e-3))


def test_a_run_of_exo_pair_without_smoothing_is_refused_before_it_samples():
    def config(**options):
        return IterateConfig(
            model="m", prompts="p", train=TrainConfig(loss_type="exo_pair", **options)
        )

    with pytest.raises(ConfigError, match="exo_pair needs a label smoothing > 0"):
        config()
    assert config(label_smoothing=0.1).train.objective.smoothing_above is None


# -------------------------------------------------------------------------------------------- ties
def lists(*scores):
    return [
        TokenizedList([1, 2], [[3 + i, j, 9] for j in range(3)], list(row), where=f"data:{i}")
        for i, row in enumerate(scores)
    ]


@pytest.mark.parametrize("loss_type", ["lipo_lambda", "ranknet"])
def test_lists_that_teach_nothing_are_told(loss_type, caplog):
    config = TrainConfig(loss_type=loss_type)
    some = lists((1.0, 0.0, 2.0), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0), (2.0, 2.0, 2.0))
    with caplog.at_level(logging.WARNING):
        warn_of_ties(as_trained(some, config), config)
        warn_of_ties(as_trained(some[:1], config), config)
    [record] = caplog.records
    assert record.getMessage() == (
        "2 of 4 lists have no response better than another, the first is data:1: they teach "
        f"{loss_type} nothing of an order"
    )
    tied = lists((1.0, 1.0, 1.0), (2.0, 2.0, 2.0))
    with pytest.raises(DataError, match=r"^data:0: it has no response .* any of the 2 lists"):
        as_trained(tied, config)


def test_a_training_on_some_ties_warns(model_path, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(model_path, tmp_path, lists((1.0, 0.0, 2.0), (1.0, 1.0, 1.0)), loss_type="lipo_lambda")
    assert "1 of 2 lists have no response better than another" in caplog.text


# ---------------------------------------------------------------------------------------- messages
def test_held_out_rows_of_one_prompt_are_named(model_path, tmp_path):
    held = [replace(x, prompt_ids=[5, 6]) for x in random_pairs(3, seed=5)]
    with pytest.raises(DataError, match=r"^eval_dataset: .*kto.* all 6 rows have.* leave eval_d"):
        run(model_path, tmp_path, random_pairs(4), loss_type="kto", eval_pairs=held)


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        (random_pairs(1), dict(loss_type="sppo"), ": loss_type=sppo needs scores"),
        ([replace(random_pairs(1)[0], score_chosen=2.0, score_rejected=0.0)],
         dict(loss_type="sppo"), ": loss_type=sppo needs probabilities"),
        (lists((0.0, 0.0, 1.0)), dict(loss_type="plackett_luce"),
         "^data:0: loss_type=plackett_luce needs scores without ties, got the score 0 more"),
        (lists((0.0, 0.0, 1.0)), dict(loss_type="kto"),
         "takes singles, rows of prompt, completion and label, or pairs, each of which"),
    ],
    ids=["missing", "no probabilities", "ties", "lists"],
)  # fmt: skip
def test_messages_say_a_name_once(examples, options, message):
    with pytest.raises(DataError, match=message):
        as_trained(examples, TrainConfig(**options))
