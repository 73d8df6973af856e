"""Offline pairs in a run: read once, scored where their scores are used, answered in each round."""

from dataclasses import replace
from pathlib import Path

from fastdpo.data.records import PairRow
from fastdpo.data.rows import preference_rows, read_rows
from fastdpo.model.load import stop_ids
from fastdpo.pair import offline
from fastdpo.rounds.folder import Run
from fastdpo.storage import write_json_atomic


def read_offline(run: Run) -> None:
    """The stage that tokenizes the pairs to replay, and scores them where scores are used."""
    config, folder = run.config, run.out / "offline"

    def work() -> None:
        rows, dropped = _rows(run)
        offline.write_candidates(rows, folder / "candidates")
        if config.scores_offline:
            previous = str(config.score.previous_model)
            run.score(folder / "candidates", run.scores(folder), config.model, previous)
        write_json_atomic(folder / "summary.json", {"pairs": len(rows), "dropped": dropped})

    run.stages.run("offline", work, makes=[folder / "summary.json", *offline_scores(run)])


def offline_scores(run: Run) -> list[Path]:
    """The scores of offline pairs, a folder for each scorer; none where nothing uses them."""
    return run.scores(run.out / "offline") if run.config.scores_offline else []


def answer_offline(run: Run, index: int) -> None:
    """The stages of one fresh response to each offline prompt, and its score."""
    config, name, folder = run.config, run.folder(index).name, run.folder(index) / "offline"
    start, candidates = run.start_of(index), folder / "candidates"
    prompts = offline.prompt_rows(_rows(run)[0])
    settings = replace(config.sample, seed=config.seed + 2, num_samples=1)
    run.sample(f"{name}/offline-sample", start, prompts, settings, candidates, index)
    run.stages.run(
        f"{name}/offline-score",
        lambda: run.score(candidates, run.scores(folder), start, run.before(index)),
        makes=run.scores(folder),
        needs=[candidates],
    )


def answers(run: Run, index: int) -> list[Path]:
    """What `answer_offline` left in the rounds up to this one."""
    folders = [run.folder(i) / "offline" for i in range(1, index + 1)]
    return [y for x in folders for y in (x / "candidates", *run.scores(x))]


def offline_pairs(run: Run, index: int) -> tuple[list[PairRow], list[dict[str, float]]]:
    """Offline pairs, and the scores of each round's fresh responses to their prompts."""
    config, folder = run.config, run.out / "offline"
    rows, _ = _rows(run)
    if not config.scores_offline:
        return rows, []
    weights = config.pair.weights
    rows = offline.with_scores(rows, folder / "candidates", run.scores(folder), weights)
    if config.pair.fresh_threshold is None:
        return rows, []
    rounds = [run.folder(i) / "offline" for i in range(1, index + 1)]
    return rows, [
        offline.fresh_scores(path / "candidates", run.scores(path), weights) for path in rounds
    ]


def _rows(run: Run) -> tuple[list[PairRow], dict[str, int]]:
    config = run.config
    fresh = config.pair.fresh_threshold is not None
    return offline.offline_pairs(
        preference_rows(read_rows(str(config.pair.replay))),
        run.tokenizer,
        max_length=config.train.max_length,
        exclude=run.heldout,
        max_new_tokens=config.sample.max_new_tokens if fresh else None,
        stop_ids=stop_ids(config.model, run.tokenizer),
        string_prompts=config.string_prompts,
        progress=run.progress,
    )
