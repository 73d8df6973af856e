"""Losses in rounds: what they are fed with, what is refused before a run, and what scores do."""

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_rounds import arguments, drive, same, weights
from tiny import LLAMA, save_tiny

from fastdpo import storage
from fastdpo.cli import main
from fastdpo.cli.options import build
from fastdpo.errors import ConfigError
from fastdpo.rounds import run as outer
from fastdpo.rounds.config import IterateConfig

LISTS = ["lipo_lambda", "ranknet", "skip_ranknet", "plackett_luce", "pro"]
REWARD = "some/reward-model"
OFFLINE = {"pair.replay": "r", "pair.replay_share": 0.5}


def config(**options: Any) -> IterateConfig:
    """``train__loss_type`` is ``train.loss_type``."""
    given = {name.replace("__", "."): value for name, value in options.items()}
    base = {"model": "m", "prompts": "p", "score.scorer": "a:b", "evaluate.scorer": "answer"}
    return build(IterateConfig, {**base, **given})


# ------------------------------------------------------------------------------ what is refused
def test_pairing_makes_what_the_loss_takes():
    assert config().pair.rule == "best_worst"
    assert config(train__loss_type="kto").pair.rule == "best_worst"
    for loss in LISTS:
        found = config(train__loss_type=loss).pair
        ranks = loss in ("plackett_luce", "pro", "skip_ranknet")
        assert found.rule == "listwise" and found.drop_ties == ranks
    assert config(train__loss_type="ranknet", pair__drop_ties=True).pair.drop_ties
    assert config(train__loss_type="ranknet", sample__num_samples=2).pair.rule == "listwise"
    # What a file of a run says of itself makes the same run again.
    for options in ({}, {"train__loss_type": "plackett_luce"}, {"sample__num_samples": 2}):
        whole = config(**options).to_dict()
        assert whole["pair"]["rule"] in ("best_worst", "listwise")
        flat = {
            f"{section}.{name}" if isinstance(values, dict) else section: value
            for section, values in whole.items()
            for name, value in (values.items() if isinstance(values, dict) else [("", values)])
        }
        assert build(IterateConfig, flat).to_dict() == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train__loss_type": "lipo_lambda", "pair__rule": "best_worst"},
         "pair.rule=best_worst makes pairs, but train.loss_type=lipo_lambda takes lists"),
        ({"pair__rule": "listwise"},
         "pair.rule=listwise makes lists, but train.loss_type=sigmoid takes pairs"),
        ({"train__loss_type": "kto", "pair__rule": "listwise"}, "kto takes singles"),
        ({"train__loss_type": "ranknet", "pair__replay": "r", "pair__replay_share": 0.5},
         "pair.replay=r must be left out, .* rule not be listwise: offline rows are pairs"),
        ({"train__loss_type": "ranknet", "pair__ches_keep": 0.5}, "pair.ches_keep=0.5 must be"),
        ({"train__loss_type": "ranknet", "sample__num_samples": 1}, "sample.num_samples=1 must"),
        ({"train__loss_type": ["simpo"], "reference": "average"},
         "reference=average must be left out, .*train.loss_type=simpo needs no reference"),
        ({"train__loss_type": "simpo", "reference": "other"}, "reference=other must be left out"),
        ({"train__loss_type": "kto", "pair__soft_label": 0.1, "score__scorer": ["a:b", "a:c"],
          "pair__combine": "log_sigmoid"},
         "pair.soft_label=0.1 is label smoothing, which train.loss_type=kto has no use for"),
        ({"train__score_label": True, "pair__consistency": "mean", "score__scorer": "implicit",
          "score__previous_model": "q"},
         "pair.consistency=mean and train.score_label both say how far a label holds"),
        ({"train__loss_type": "robust", "train__label_smoothing": 0.1, "pair__soft_label": 0.1,
          "score__scorer": ["a:b", "a:c"], "pair__combine": "log_sigmoid"},
         "pair.soft_label=0.1 and train.label_smoothing both"),
        ({"train__loss_type": "sppo", "score__scorer": REWARD},
         f"loss_type=sppo needs win rates, .* score.scorer={REWARD} may .*transform=win_rate"),
        ({"train__loss_type": "sppo"},
         "loss_type=sppo needs win rates, .* score.scorer=a:b may .* pair.transform=win_rate"),
        ({"train__loss_type": ["sigmoid", "sppo"], "score__scorer": "http://localhost:1"},
         "train.loss_type=sigmoid,sppo needs win rates, .* score.scorer=http://localhost:1 may"),
        ({"train__loss_type": "sppo", "score__scorer": "judge:j", "pair__weights": [2.0]},
         r"needs win rates, .* pair.weights=\[2.0\] may be others"),
        ({"train__loss_type": "sppo", "score__scorer": ["answer", "judge:j"]},
         "needs win rates, .* score.scorer=answer may be others"),
        ({"train__loss_type": "sppo", "pair__transform": "mean_std"},
         "those of pair.transform=mean_std may be others; set pair.transform=win_rate"),
        ({"train__loss_type": "sppo", "pair__transform": "win_rate", "pair__length_penalty": 0.1},
         "needs win rates, which pair.length_penalty=0.1 takes something off"),
        ({"train__loss_type": "preference_score", "pair__transform": "win_rate"},
         "needs scores around 0, and those of pair.transform=win_rate are win rates"),
        ({"train__loss_type": "preference_score", "score__scorer": "judge:j"},
         "needs scores around 0, and those of score.scorer=judge:j are win rates"),
        ({"train__score_offset": "log_ratio", "pair__transform": "log_sigmoid"},
         "log_ratio needs scores above 0, which pair.transform=log_sigmoid does not give"),
        ({"train__score_offset": "log_difference", "pair__flip_share": 0.2,
          "score__scorer": ["a:b", "a:c"], "pair__combine": "log_sigmoid"},
         "train.score_offset needs a chosen response that scores higher, but pair.flip_share=0.2"),
        ({"train__score_weight": True, "pair__transform": "par", "pair__replay": "r",
          "pair__replay_share": 0.5},
         "train.score_weight reads scores, which pair.transform=par shapes within a prompt's"),
        ({"train__score_offset": "difference", "score__scorer": "judge:j", "pair__replay": "r",
          "pair__replay_share": 0.5},
         "reads scores of offline pairs .*, which score.scorer=judge:j does not give"),
        ({"pair__transform": "win_rate"}, "pair.transform=win_rate changes nothing"),
        ({"pair__transform": "par", "train__loss_type": "plackett_luce"},
         "pair.transform=par changes nothing"),
        ({"pair__transform": "win_rate", "train__loss_type": "sppo", "score__scorer": "judge:j"},
         "pair.transform=win_rate makes win rates of scores, but those of score.scorer=judge:j"),
        ({"round_betas": [0.1, -1.0]}, "round_betas"),
        ({"train__loss_type": "tdpo1"}, "train.precompute_ref_log_probs=True gives no KL"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_a_loss_could_not_be_trained_on_is_refused(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        config(**options)
    assert "\n" not in str(error.value)


def test_scores_that_the_loss_reads_give_a_transform_its_use():
    for used in (
        {"train__score_offset": "difference"},
        {"train__score_weight": True},
        {"train__score_label": True},
        {"train__loss_type": "sppo"},
        {"train__loss_type": ["sigmoid", "sppo"]},
        {"train__loss_type": "lipo_lambda"},
    ):
        assert config(pair__transform="par", **used).reads_scores
    assert config(train__loss_type="sppo", pair__transform="win_rate", score__scorer=REWARD)
    assert config(train__loss_type="sppo", score__scorer="judge:j")  # its scores are win rates
    assert config(train__loss_type="sppo", score__scorer="answer")  # 1 or 0
    # Offline pairs are scored where the loss reads scores.
    options = {name.replace(".", "__"): value for name, value in OFFLINE.items()}
    assert config(train__score_offset="log_difference", **options).scores_offline
    assert not config(**options).scores_offline


# -------------------------------------------------------------------------------- from end to end
@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(LLAMA, folder / "model")
    rows = [{"prompt": f"tell me about number {i}"} for i in range(7)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options_of(inputs: Path, out: Path, **changes: Any) -> list[str]:
    given = dict(rounds=1, evaluate__heldout=0, sample__num_samples=4, train__batch_size=4)
    return arguments(inputs, out, **{**given, **changes})


@pytest.fixture(scope="module")
def plain(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    assert main(options_of(inputs, out)) == 0
    return out


def run(inputs: Path, plain: Path, out: Path, **changes: Any) -> Path:
    """A run that begins with the samples and scores of another, which are what it would draw."""
    for name in ("candidates", "scores"):
        shutil.copytree(plain / "round-01" / name, out / "round-01" / name)
    assert main(options_of(inputs, out, **changes)) == 0
    return out / "round-01"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").open()]


def train_alone(inputs: Path, dataset: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    command = [
        "train", f"--model={inputs / 'model'}", f"--dataset={dataset}", f"--output_dir={out}",
        "--max_length=64", "--max_tokens=160", "--batch_size=4", "--learning_rate=1e-3",
        "--warmup_ratio=0", "--bf16=false", "--gradient_checkpointing=false",
        "--reference_cache=null",
    ]  # fmt: skip
    assert main([*command, *more]) == 0
    return load_file(out / "policy" / "model.safetensors")


def test_a_loss_of_lists_trains_on_all_samples_of_a_prompt(inputs, plain, tmp_path):
    loss = {"train__loss_type": "lipo_lambda", "pair__transform": "mean_std"}
    folder = run(inputs, plain, tmp_path / "run", **loss)
    rows = rows_of(folder)
    assert all(2 <= len(row["scores"]) == len(row["responses_ids"]) <= 4 for row in rows)
    assert any(len(row["scores"]) == 4 for row in rows)
    assert all(row["scores"] == sorted(row["scores"], reverse=True) for row in rows)
    assert abs(sum(rows[0]["scores"])) < 1e-9  # of mean 0 within a prompt
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["lists"] == len(rows) and "pairs" not in summary
    trained = load_file(folder / "policy" / "model.safetensors")
    assert not same(trained, weights(plain, 1))
    page = (folder.parent / "report.html").read_text()
    assert "Lists trained on" in page and "lipo_lambda" in page and "Lists kept" in page
    card = (folder / "policy" / "README.md").read_text()
    assert "The loss is `lipo_lambda`" in card and "arXiv 2402.01878" in card
    assert "ranking them, and training on the lists." in card
    assert "Here beta is 0.1 and alpha is 0." in card and "- lipo_lambda" in card
    # By the stages as commands it is the same file, and the same weights.
    command = ["pair", f"--candidates={folder / 'candidates'}", f"--scores=[{folder / 'scores'}]"]
    out = tmp_path / "lists.jsonl"
    argv = [*command, "--rule=listwise", "--transform=mean_std", f"--output={out}"]
    assert main(argv) == 0
    assert out.read_bytes() == (folder / "pairs.jsonl").read_bytes()
    alone = train_alone(inputs, out, tmp_path / "alone", "--loss_type=lipo_lambda")
    assert same(alone, trained)
    page = (tmp_path / "alone" / "report.html").read_text()
    assert "Lists to train on" in page and "Lists kept" in page
    assert "on the lists of" in (tmp_path / "alone" / "policy" / "README.md").read_text()


def test_shaped_scores_change_what_is_trained(inputs, plain, tmp_path):
    """PAR's scores as an offset: the policy is that of margins written by hand."""
    options = dict(train__score_offset="difference", train__score_offset_weight=2.0)
    folder = run(inputs, plain, tmp_path / "run", pair__transform="par", **options)
    card = (folder / "policy" / "README.md").read_text()
    assert "changed by options of training: `score_offset=difference`, `score_offset_wei" in card
    rows = rows_of(folder)
    plain_rows = rows_of(plain / "round-01")
    assert [row["chosen_ids"] for row in rows] == [row["chosen_ids"] for row in plain_rows]
    trained = load_file(folder / "policy" / "model.safetensors")
    assert not same(trained, weights(plain, 1))
    scores = {}
    for part in sorted((folder / "candidates").glob("part-*.jsonl")):
        texts = [json.loads(line) for line in part.open()]
        found = [json.loads(line) for line in (folder / "scores" / part.name).open()]
        for text, score in zip(texts, found):
            scores.setdefault(text["prompt_index"], []).append(score["score"])

    def par(own: list[float], i: int) -> float:
        others = own[:i] + own[i + 1 :]
        return sum(1 / (1 + math.exp(x - own[i])) for x in others) / len(others)

    by_hand = []
    for row in plain_rows:
        own = scores[row["prompt_index"]]
        best, worst = (own.index(row[f"score_{side}"]) for side in ("chosen", "rejected"))
        margin = -2.0 * (par(own, best) - par(own, worst))
        by_hand.append({**row, "margin": margin})
    gaps = [row["score_chosen"] - row["score_rejected"] for row in rows]
    assert [row["margin"] for row in by_hand] == pytest.approx([-2.0 * gap for gap in gaps])
    for row, gap in zip(by_hand, gaps):
        row["margin"] = -2.0 * gap  # to the last bit
    dataset = tmp_path / "by_hand.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in by_hand))
    assert same(train_alone(inputs, dataset, tmp_path / "alone"), trained)


def test_offline_pairs_are_scored_where_the_loss_reads_scores(inputs, plain, tmp_path):
    """Their label comes with the data: those that the scorer contradicts have no logarithm."""
    good, bad = " a e i o u", " brr"
    rows = [
        {"prompt": f"say {i}", "chosen": good if i % 2 else bad, "rejected": bad if i % 2 else good}
        for i in range(8)
    ]
    offline = tmp_path / "offline.jsonl"
    offline.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replay = dict(pair__replay=offline, pair__replay_share=0.3)
    folder = run(inputs, plain, tmp_path / "run", **replay, train__score_offset="log_difference")
    drawn = [row for row in rows_of(folder) if row["source"] == "offline"]
    assert len(drawn) == 3 and all("a e i" in row["chosen"] for row in drawn)
    assert all(row["score_chosen"] > row["score_rejected"] == 0 for row in drawn)
    summary = json.loads((folder / "pairs.summary.json").read_text())
    assert summary["dropped"]["offline: chosen scores no higher"] == 4


def test_offline_pairs_are_scored_when_the_loss_comes_to_read_scores(inputs, plain, tmp_path):
    """The options of training may change until there is a pair: what they need is made then."""
    rows = [{"prompt": f"say {i}", "chosen": " a e i o", "rejected": " brr"} for i in range(8)]
    offline, out = tmp_path / "offline.jsonl", tmp_path / "run"
    offline.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replay = dict(pair__replay=offline, pair__replay_share=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outer, "pair", lambda *args, **options: (_ for _ in ()).throw(OSError("no")))
        for name in ("candidates", "scores"):
            shutil.copytree(plain / "round-01" / name, out / "round-01" / name)
        assert main(options_of(inputs, out, **replay)) == 2
    assert (out / "offline").is_dir() and not (out / "offline" / "scores").exists()
    assert main(options_of(inputs, out, **replay, train__score_offset="difference")) == 0
    drawn = [row for row in rows_of(out / "round-01") if row["source"] == "offline"]
    assert drawn and all(row["score_chosen"] > 0 for row in drawn)


def test_sppo_trains_on_win_rates(inputs, plain, tmp_path):
    folder = run(
        inputs, plain, tmp_path / "run", train__loss_type="sppo", pair__transform="win_rate"
    )
    for row in rows_of(folder):
        assert 0 < row["score_rejected"] < 0.5 < row["score_chosen"] < 1
    first = json.loads((folder / "metrics" / "metrics.jsonl").open().readline())
    # At the start log-ratios are 0: ((p_w - 1/2)^2 + (p_l - 1/2)^2) / (2 beta^2).
    assert 0 < first["loss"] < 0.5 / 0.1**2 / 4


@pytest.mark.parametrize(
    ("loss", "more"),
    [
        ("simpo", {}),
        ("kto", {}),
        ("aot_unpaired", {}),
        ("tdpo1", {"train__precompute_ref_log_probs": "false"}),
        ("plackett_luce", {}),
    ],
)
def test_losses_of_every_kind_train_a_round(inputs, plain, tmp_path, loss, more):
    folder = run(inputs, plain, tmp_path / "run", train__loss_type=loss, **more)
    assert not same(load_file(folder / "policy" / "model.safetensors"), weights(plain, 1))
    kept = (folder / "ref_logps").is_dir()
    assert kept == (loss in ("kto", "aot_unpaired", "plackett_luce"))
    assert json.loads((folder / "train.json").read_text())["loss"] > 0


def test_bad_scores_are_told_while_pairing_can_be_changed(inputs, plain, tmp_path, capsys):
    """The scorer's values are no win rates; the same folder goes on with a transform."""
    out, loss = tmp_path / "run", {"train__loss_type": "lipo_lambda"}
    for name in ("candidates", "scores"):
        shutil.copytree(plain / "round-01" / name, out / "round-01" / name)
    for part in (out / "round-01" / "scores").glob("part-*.jsonl"):
        lines = [json.loads(line) for line in part.open()]
        more = [{**row, "score": 100 * row["score"]} for row in lines]
        storage.write_jsonl_atomic(part, more)
    assert main(options_of(inputs, out, **loss)) == 2
    error = capsys.readouterr().err
    assert "pairs.jsonl:" in error and "needs scores of at most 20" in error
    assert main(options_of(inputs, out, **loss, pair__transform="win_rate")) == 0


def test_killed_with_lists_it_ends_in_the_same_weights(inputs, plain, tmp_path):
    loss = {"train__loss_type": "ranknet", "train__alpha": 0.02}
    whole = run(inputs, plain, tmp_path / "whole", **loss)
    argv = options_of(inputs, tmp_path / "killed", **loss)
    done = drive("fastdpo.train.steps:packed_loss", 6, argv)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "killed" / "round-01" / "policy").exists()
    assert main(argv) == 0
    killed = tmp_path / "killed" / "round-01"
    assert (killed / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    assert same(weights(tmp_path / "killed", 1), weights(tmp_path / "whole", 1))


def test_a_run_of_before_losses_goes_on(inputs, plain, tmp_path):
    """Its folder knows nothing of the options of losses, nor of ties."""
    out = tmp_path / "old"
    shutil.copytree(plain, out)
    state = storage.read_json(out / "state.json")
    new = {"loss_type", "loss_weights", "label_smoothing", "score_offset", "score_label"}
    state["config"]["output_dir"] = str(out)
    for section in ("train", "pair"):
        values = state["config"][section]
        for name in [*values]:
            if name in new | {"drop_ties"}:
                del values[name]
    storage.write_json_atomic(out / "state.json", state, checksum=True)
    assert main(options_of(inputs, out, rounds=2)) == 0
    assert same(weights(out, 1), weights(plain, 1))
