"""The evaluation of a policy on held-out prompts: its samples and scores, and the report's row."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdpo.data.parts import read_candidates
from fastdpo.data.records import Candidate
from fastdpo.errors import DataError
from fastdpo.model.logps import load_packed, response_logps
from fastdpo.progress import bar, within
from fastdpo.report import summary as report
from fastdpo.report.evaluation import (
    by_length,
    by_prompt,
    by_score,
    heldout,
    means_by_prompt,
    standard_error,
    win_rates,
)
from fastdpo.rounds.folder import Run
from fastdpo.score.stage import Scorer, score
from fastdpo.storage import read_json, write_json_atomic


def evaluate(run: Run, index: int) -> None:
    """The stages that score a round's policy on held-out prompts, and write its report.

    Round 0 is the model before training.
    """
    config, stage, folder = run.config, run.stages.run, run.folder(index)
    name = folder.name
    policy, start = run.start_of(index + 1), run.folder(0) / "eval"
    candidates, scores = folder / "eval" / "candidates", folder / "eval" / "scores"
    needs = [folder / "train.json"] if index else []
    if run.heldout:
        count = config.evaluate.num_samples
        settings = replace(config.sample, seed=config.seed + 1, num_samples=count)
        with within("held-out"):
            run.sample(f"{name}/eval-sample", policy, run.heldout, settings, candidates, index)
        stage(
            f"{name}/eval-score",
            lambda: _score(run, candidates, scores),
            makes=scores,
            needs=[candidates, start / "candidates"],
        )
        needs += [candidates, scores, start / "candidates", start / "scores"]
        if index:
            kl = folder / "eval" / "kl.json"
            stage(
                f"{name}/eval-kl",
                lambda: _measure_kl(run, policy, candidates, kl),
                makes=kl,
                needs=[candidates, policy],
            )
            needs.append(kl)
    row = folder / "summary.json"
    stage(f"{name}/report", lambda: _summarize(run, index), makes=row, needs=needs)


def _score(run: Run, candidates: Path, scores: Path) -> None:
    scorer = run.config.score.load(run.config.evaluated_by)
    if scorer.compare is not None:
        scorer = against_start(scorer, run.folder(0) / "eval" / "candidates")
    with within("held-out"):
        score(scorer, candidates, scores, progress=run.progress)


def _summarize(run: Run, index: int) -> None:
    config, folder = run.config, run.folder(index)
    row: dict[str, Any] = {"round": index}
    if run.heldout:
        row |= heldout_row(folder / "eval", run.folder(0) / "eval")
        row |= read_json(folder / "eval" / "kl.json") if index else {}
    if index:
        row |= read_json(folder / "train.json")
        summary = read_json(folder / "pairs.summary.json")
        row |= {x: summary[x] for x in ("pairs", "lists", "dropped") if x in summary}
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "summary.json", row)
    rows = report.summarize(run.out)
    train = config.train
    alpha = f"alpha={train.alpha}" if train.loss_type == "sigmoid" else f"loss {config.loss}"
    title = f"{config.evaluated_by}, beta={train.beta:g}, {alpha}"
    report.plot(rows, run.out / "rounds.png", title=title)


def against_start(scorer: Scorer, start: Path) -> Scorer:
    """A scorer of held-out responses by comparison with the start's, for scorers that compare.

    The score of a response is the mean probability that it is better than a response of the start
    to the same prompt; comparisons within its own round would average to 0.5 whatever the policy.
    The start's own score is 0.5.

    Args:
        scorer: one with `compare`.
        start: candidates of the start on the same prompts.
    """
    compare = scorer.compare
    assert compare is not None
    others = by_prompt(read_candidates(start).values())

    def function(rows: list[Candidate]) -> list[float]:
        prompts, first, second, counts = [], [], [], []
        for row in rows:
            known = others.get(row.prompt_index)
            if not known:
                raise DataError(f"{start}: there is no response to prompt {row.prompt_index}")
            different = [x.response for x in known if x.response != row.response]
            prompts += [row.prompt] * len(different)
            first += [row.response] * len(different)
            second += different
            counts.append((len(different), len(known)))
        found = iter(compare(prompts, first, second))
        scores = []
        for different, all_of_them in counts:  # the same text wins half of the time
            wins = sum(next(found) for _ in range(different))
            scores.append((wins + 0.5 * (all_of_them - different)) / all_of_them)
        return scores

    settings = {**scorer.settings, "against": "start"}
    return replace(scorer, function=function, on="rows", compare=None, settings=settings)


def _measure_kl(run: Run, policy: str, candidates: Path, path: Path) -> None:
    """The policy's KL divergence from the start, from the responses that the policy gave.

    The mean of log pi(y|x) - log pi_start(y|x), first over the responses of a prompt and then over
    prompts, in nats a response, with its standard error. Both are taken at the temperature that the
    responses were drawn at, so it is an unbiased estimate of KL(pi || pi_start) where top_p is 1,
    and only a measure of distance elsewhere. The models, folders or hub names, are loaded one after
    the other.
    """
    rows = list(read_candidates(candidates).values())
    dtype, batch_size = getattr(torch, run.config.sample.dtype), run.config.score.batch_size
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "temperature": run.config.sample.temperature,
    }
    logp_2R = []
    with bar("distance from the start", 2, "model", shown=run.progress) as shown:
        for name in (policy, run.config.model):
            with shown.part():
                logp_2R.append(response_logps(load_packed(name, dtype=dtype), rows, **options))
    ratios: dict[int, list[float]] = {}
    for row, ratio in zip(rows, (logp_2R[0] - logp_2R[1]).tolist()):
        ratios.setdefault(row.prompt_index, []).append(ratio)
    means = [sum(group) / len(group) for group in ratios.values()]
    found = {"kl": sum(means) / len(means), "kl_se": standard_error(means)}
    found["kl_temperature"] = options["temperature"]
    write_json_atomic(path, found, checksum=True)


def heldout_row(folder: Path, start: Path) -> dict[str, float]:
    """Mean score and length of held-out responses, and how often they win against the start's.

    Args:
        folder: `candidates` and `scores` of an evaluation.
        start: those of the start.

    Standard errors are over prompts; lengths are tokens, `truncated` the share cut at the limit.
    """
    now = heldout(folder)
    row = {"truncated": sum(x.finish_reason == "length" for x in now) / len(now)}
    for name, values in (
        ("score", means_by_prompt(now, by_score)),
        ("length", means_by_prompt(now, by_length)),
        ("win_rate", win_rates(heldout(start), now)),
    ):
        if values:
            row[name] = sum(values) / len(values)
            row[f"{name}_se"] = standard_error(values)
    return row
