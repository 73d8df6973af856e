"""The outer loop: sample, score, pair, train, make the policy the next start, repeat.

`folder` has what a run leaves on disk, `resume` how it goes on: killed anywhere, the same command
finishes the stage it was in.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastdpo.data.clock import KEY, rendering_at
from fastdpo.errors import ConfigError
from fastdpo.loss.choices import CHOICES
from fastdpo.model.load import combine, load_causal_lm
from fastdpo.pair import filters
from fastdpo.pair.stage import load_examples, pair, split_stages
from fastdpo.progress import within
from fastdpo.report import card
from fastdpo.report import summary as report
from fastdpo.rounds.config import IterateConfig, defaults
from fastdpo.rounds.folder import Run
from fastdpo.rounds.heldout import evaluate
from fastdpo.rounds.inputs import check_inputs
from fastdpo.rounds.processes import Processes
from fastdpo.rounds.replay import (
    answer_offline,
    answers,
    offline_pairs,
    offline_scores,
    read_offline,
)
from fastdpo.rounds.work import Training
from fastdpo.score.stage import score
from fastdpo.storage import locked, read_json, write_json_atomic
from fastdpo.train.examples import as_trained
from fastdpo.train.launch import launched
from fastdpo.train.trainer import CONTROL


def iterate(config: IterateConfig, *, progress: bool = True) -> list[dict[str, Any]]:
    """Run all rounds and return the report's rows.

    Launched as several processes, all of them call it. They train together; the rest is done by
    the first one, while the others wait, hold no model, and return no rows.

    Raises:
        ConfigError: the folder belongs to a run with other options.
        DataError: prompts, samples or scores are unusable, files are damaged, or another process
            has the folder; says which and why.
        ModelError: a model cannot be loaded or trained.
        ProcessError: another process of the launch failed, or is gone.
        SystemExit: on other processes than the first, which failed and says why.
    """
    processes = Processes(launched(config.train))
    if not processes.is_first:
        processes.follow()
        return []
    with processes.led():
        return _lead(config, processes, progress)


def _lead(config: IterateConfig, processes: Processes, progress: bool) -> list[dict[str, Any]]:
    out = Path(config.output_dir)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"output_dir={out} is a file; name a folder")
    state = out / "state.json"
    if not state.exists():
        check_inputs(config, processes)
    with locked(out):
        before = read_json(state) if state.exists() else None
        time = before.get(KEY) if isinstance(before, dict) else None
        with rendering_at(time) as clock:
            return _rounds(Run(config, progress, clock, processes))


def _rounds(run: Run) -> list[dict[str, Any]]:
    config = run.config
    config.score.check_servers(_scorers_left(run))
    if config.pair.replay_share:
        read_offline(run)
    with within("start"):
        evaluate(run, 0)
    for index in range(1, config.rounds + 1):
        with within(f"round {index} of {config.rounds}"):
            _round(run, index)
            evaluate(run, index)
            _write_cards(run, index)
    run.stages.show()
    return report.summarize(run.out)


def _write_cards(run: Run, index: int) -> None:
    """The model cards of what a round left, where one has none yet."""
    left = card.policies(run.folder(index))
    if not all((folder / card.NAME).is_file() for folder in left):
        card.write_cards(run.out, defaults(), index=index, losses=CHOICES)


def _scorers_left(run: Run) -> list[str]:
    """Those of stages that are not done."""
    config, last = run.config, f"round-{run.config.rounds:02d}"
    answers = [f"{last}/offline-score"] if config.pair.fresh_threshold is not None else []
    left = {f"{last}/score", *answers} - {*run.stages.done}
    heldout = config.evaluate.heldout and f"{last}/eval-score" not in run.stages.done
    return [*(config.score.scorers if left else []), *([config.evaluated_by] if heldout else [])]


def _round(run: Run, index: int) -> None:
    """One round, from the samples of its start to the start of the next."""
    config, stage, folder = run.config, run.stages.run, run.folder(index)
    name = folder.name
    start, before = run.start_of(index), run.before(index)
    candidates, scores, pairs = folder / "candidates", run.scores(folder), folder / "pairs.jsonl"
    run.sample(f"{name}/sample", start, run.prompts, config.sample, candidates, index)
    implicit = [start, before] if "implicit" in config.score.scorers else []
    stage(
        f"{name}/score",
        lambda: run.score(candidates, scores, start, before),
        makes=scores,
        needs=[candidates, *implicit],
    )
    joined: list[Path | str] = [candidates, *scores]
    if config.pair.consistency != "none":
        earlier, ranked = run.start_of(index - 1), folder / "scores-before"
        joined.append(ranked)
        stage(
            f"{name}/score-before",
            lambda: _score_before(run, candidates, ranked, earlier),
            makes=ranked,
            needs=[candidates, earlier, before],
        )
    if config.pair.replay_share:
        joined += offline_scores(run)
    if config.pair.fresh_threshold is not None:
        answer_offline(run, index)
        joined += answers(run, index)
    if (references := _references(run, index)) is not None:
        joined += [references[0], *references[1]]
    if config.reference == "average" and index > 1:
        _average(run, index)
    reference = run.reference(index)
    models = [start] if reference is None else [start, reference]
    joined += models if config.pair.needs_model else []
    stage(f"{name}/pair", lambda: _pair(run, index), makes=pairs, needs=joined)
    made = [folder / "policy", folder / "train.json"]
    stage(f"{name}/train", lambda: _train(run, index), makes=made, needs=[pairs, *models])
    if config.extrapolation:
        more, names = config.extrapolation, [run.trained(index), run.trained(index - 1)]
        path = folder / "extrapolated"
        stage(
            f"{name}/extrapolate",
            lambda: combine(names, [1 + more, -more], run.tokenizer, path),
            makes=path,
            needs=names,
        )


def _score_before(run: Run, candidates: Path, folder: Path, policy: str) -> None:
    """Score as the round before would, whose policy this is; see `filters.consistency`."""
    first = run.start_of(0)
    spec = "likelihood" if policy == first else "implicit"
    scorer = run.config.score.load(spec, policy, first)
    score(scorer, candidates, folder, progress=run.progress)


def _references(run: Run, index: int) -> tuple[Path, list[Path]] | None:
    """The start's responses to the same prompts, which are the first round's, and their scores;
    None where no score is compared with them, and in round 1, whose samples they are."""
    if run.config.pair.transform_reference != "start" or index == 1:
        return None
    return run.folder(1) / "candidates", run.scores(run.folder(1))


def _average(run: Run, index: int) -> None:
    """The moving average of the starts up to round ``index``, from 2."""
    config, path = run.config, run.folder(index) / "reference"
    before = run.folder(index - 1) / "reference" if index > 2 else Path(config.model)
    names, decay = [str(before), run.start_of(index)], config.reference_decay
    run.stages.run(
        f"round-{index:02d}/average",
        lambda: combine(names, [decay, 1 - decay], run.tokenizer, path),
        makes=path,
        needs=names,
    )


def _pair(run: Run, index: int) -> None:
    config, folder = run.config.pair, run.folder(index)
    before = [] if config.consistency == "none" else [folder / "scores-before"]
    replay, fresh = offline_pairs(run, index) if config.replay_share else ([], [])
    summary = pair(
        folder / "candidates",
        run.scores(folder),
        folder / "pairs.jsonl",
        replace(config, seed=run.config.seed + index),
        previous_scores=before,
        reference_scores=_references(run, index),
        replay=replay,
        fresh=fresh,
        measure=(lambda pairs: _measure(run, index, pairs)) if config.needs_model else None,
        ordered=run.config.needs_order,
    )
    # Before the stage is done, so that options of pairing can still be mended.
    as_trained(load_examples(folder / "pairs.jsonl"), run.config.training(index))
    dropped = "".join(f", {n} dropped: {why}" for why, n in summary["dropped"].items())
    what = "lists" if config.makes_lists else "pairs"
    print(f"round {index}: {summary[what]} {what}{dropped}")


def _measure(run: Run, index: int, pairs: list[Any]) -> Any:
    """CHES and difficulty of pairs under the round's reference."""
    config, policy = run.config.train, run.reference(index) or run.start_of(index)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_causal_lm(policy, dtype=getattr(torch, config.dtype)).to(device)
    return filters.measure(
        model, pairs, max_tokens=config.max_tokens, bf16=config.bf16, impl=config.impl,
        progress=run.progress,
    )  # fmt: skip


def _train(run: Run, index: int) -> None:
    """Train on the round's pairs.

    Each stage of a curriculum starts from the one before, which is its reference too (Curry-DPO,
    arXiv 2403.07230), unless the run names another.
    """
    config, folder, start = run.config, run.folder(index), run.start_of(index)
    auto, pairs = config.train.alpha == "auto", folder / "pairs.jsonl"
    stages, found = split_stages(load_examples(pairs)), []
    # Without it, the lengths that the policy has by now would be the target.
    control = read_json(run.folder(index - 1) / CONTROL) if auto and index > 1 else None
    for i, examples in enumerate(stages):
        place = folder / f"stage-{i + 1}" if len(stages) > 1 else folder
        given = Training(
            start=start,
            out=str(place),
            reference=run.reference(index),
            config=asdict(config.training(index)),
            control=control,
            model=config.model,
            chat_template=config.chat_template,
            pairs=str(pairs),
            stage=i,
            candidates=str(folder / "candidates") if auto and i == 0 else None,
        )
        found.append(run.processes.train(given, run.tokenizer, examples, progress=run.progress))
        start = str(place / "policy")
        control = read_json(place / CONTROL) if auto else None
    if len(stages) > 1:
        if not (folder / "policy").exists():
            combine([start], [1.0], run.tokenizer, folder / "policy")
        if auto:
            last = Path(start).with_name(CONTROL)
            write_json_atomic(folder / CONTROL, read_json(last), checksum=True)
    metrics = _mean(found, [len(pairs) for pairs in stages])
    write_json_atomic(folder / "train.json", metrics, checksum=True)


def _mean(found: list[dict[str, float]], sizes: list[int]) -> dict[str, float]:
    """Metrics of all stages, over their pairs; counts are added."""
    metrics = {
        name: sum(row[name] * size for row, size in zip(found, sizes)) / sum(sizes)
        for name in found[0]
        if all(name in row for row in found)
    }
    for name in ("pairs_dropped", "pairs_truncated"):
        metrics[name] = sum(row[name] for row in found)
    return metrics
