"""The evaluation of a policy on held-out prompts: a judge's scores, and the row of the report."""

from pathlib import Path
from typing import Any

import torch

from fastdpo.errors import DataError
from fastdpo.model.logps import load_packed, response_logps
from fastdpo.report.evaluation import (
    by_length,
    by_score,
    heldout,
    means_by_prompt,
    standard_error,
    win_rates,
)
from fastdpo.score.stage import Scorer
from fastdpo.storage import read_parts


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
    others: dict[int, list[str]] = {}
    for row in read_parts(start):
        others.setdefault(row["prompt_index"], []).append(row["response"])

    def function(rows: list[dict[str, Any]]) -> list[float]:
        prompts, first, second, counts = [], [], [], []
        for row in rows:
            known = others.get(row["prompt_index"])
            if not known:
                raise DataError(f"{start}: there is no response to prompt {row['prompt_index']}")
            different = [x for x in known if x != row["response"]]
            prompts += [row["prompt"]] * len(different)
            first += [row["response"]] * len(different)
            second += different
            counts.append((len(different), len(known)))
        found = iter(compare(prompts, first, second))
        scores = []
        for different, all_of_them in counts:  # the same text wins half of the time
            wins = sum(next(found) for _ in range(different))
            scores.append((wins + 0.5 * (all_of_them - different)) / all_of_them)
        return scores

    return Scorer(
        scorer.name,
        function,
        on="rows",
        settings={**scorer.settings, "against": "start"},
        endpoint=scorer.endpoint,
    )


def kl_to_start(
    policy: str, start: str, candidates: Path, *, dtype: torch.dtype, batch_size: int
) -> dict[str, float]:
    """The policy's KL divergence from the start, from the responses that the policy gave.

    The mean of log pi(y|x) - log pi_start(y|x), first over the responses of a prompt and then over
    prompts, in nats a response, with its standard error: an unbiased estimate of KL(pi || pi_start)
    for responses at temperature 1 and top_p 1, and only a measure of distance for others.

    Args:
        policy, start: folders or hub names, loaded one after the other.
        candidates: the policy's responses.
        dtype: of both models.
        batch_size: sequences at a time.
    """
    rows = read_parts(candidates)
    logp_2R = [
        response_logps(load_packed(name, dtype=dtype), rows, batch_size=batch_size)
        for name in (policy, start)
    ]
    ratios: dict[int, list[float]] = {}
    for row, ratio in zip(rows, (logp_2R[0] - logp_2R[1]).tolist()):
        ratios.setdefault(row["prompt_index"], []).append(ratio)
    means = [sum(group) / len(group) for group in ratios.values()]
    return {"kl": sum(means) / len(means), "kl_se": standard_error(means)}


def heldout_row(folder: Path, start: Path) -> dict[str, float]:
    """Mean score and length of held-out responses, and how often they win against the start's.

    Args:
        folder: `candidates` and `scores` of an evaluation.
        start: those of the start.

    Standard errors are over prompts; lengths are tokens, `truncated` the share cut at the limit.
    """
    now = heldout(folder)
    row = {"truncated": sum(x.cut for x in now) / len(now)}
    for name, values in (
        ("score", means_by_prompt(now, by_score)),
        ("length", means_by_prompt(now, by_length)),
        ("win_rate", win_rates(heldout(start), now)),
    ):
        if values:
            row[name] = sum(values) / len(values)
            row[f"{name}_se"] = standard_error(values)
    return row
