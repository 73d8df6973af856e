"""The evaluation of a policy on held-out prompts: a judge's scores, and the row of the report."""

from pathlib import Path
from typing import Any

from fastdpo.data import DataError
from fastdpo.evaluation import by_length, by_score, heldout, over_prompts, win_rate
from fastdpo.scoring import Scorer
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
        scorer.name, function, on="rows", settings={**scorer.settings, "against": "start"}
    )


def heldout_row(folder: Path, start: Path) -> dict[str, float]:
    """Mean score and length of held-out responses, and how often they win against the start's.

    Args:
        folder: `candidates` and `scores` of an evaluation.
        start: those of the start.

    Standard errors are over prompts; lengths are tokens, `truncated` the share cut at the limit.
    """
    now = heldout(folder)
    row = {"truncated": sum(x.cut for x in now) / len(now)}
    for name, found in (
        ("score", over_prompts(now, by_score)),
        ("length", over_prompts(now, by_length)),
        ("win_rate", win_rate(heldout(start), now)),
    ):
        if found is not None:
            row[name] = found.value
            row[f"{name}_se"] = (found.half or 0.0) / 1.96
    return row
