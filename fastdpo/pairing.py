"""Pairing scored responses: the third stage of a round.

    pair(candidates_dir, scores_dir, Path("pairs.jsonl"))
    pairs = load_pairs(Path("pairs.jsonl"))

For every prompt the response with the highest score is chosen and the one with the lowest is
rejected.
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from fastdpo.batch import TokenizedPair
from fastdpo.data import DataError, read_rows
from fastdpo.storage import read_parts, write_json_atomic, write_jsonl_atomic

_COLUMNS = (
    "prompt_index",
    "sample_index",
    "prompt",
    "prompt_ids",
    "response",
    "response_ids",
    "finish_reason",
    "score",
)
_PAIR_EXTRA = (
    "prompt_index",
    "score_chosen",
    "score_rejected",
    "chosen_finish",
    "rejected_finish",
)


def best_worst(
    rows: Sequence[dict[str, Any]], *, min_gap: float = 0.0
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Pair the best and the worst response of every prompt; returns the pairs and what was dropped.

    `rows` are candidates, each with its "score". Of equal scores the smallest sample_index counts.
    Pairs come in order of prompt_index, with the columns prompt_index, prompt, prompt_ids, chosen,
    rejected, chosen_ids, rejected_ids, score_chosen, score_rejected, chosen_finish and
    rejected_finish.

    `dropped` counts prompts by reason: "fewer than two responses", "tie" (all scores equal),
    "gap at most min_gap" and "identical responses" (the same tokens). One more entry counts
    responses: "empty response", without tokens or with nothing but white space, never paired.

    Raises ValueError when `min_gap` is negative, and DataError when a row lacks a column or its
    score isn't a finite number.
    """
    if not 0 <= min_gap < math.inf:
        raise ValueError(f"min_gap must be a finite number of at least 0, got {min_gap!r}")
    groups: dict[int, list[dict[str, Any]]] = {}
    dropped: Counter[str] = Counter()
    for row in rows:
        _check(row)
        group = groups.setdefault(row["prompt_index"], [])
        if row["response_ids"] and row["response"].strip():
            group.append(row)
        else:
            dropped["empty response"] += 1
    pairs = []
    for _, group in sorted(groups.items()):
        pair = _pair_of(group, min_gap)
        if isinstance(pair, str):
            dropped[pair] += 1
        else:
            pairs.append(pair)
    return pairs, dict(dropped)


def _pair_of(group: list[dict[str, Any]], min_gap: float) -> dict[str, Any] | str:
    """The pair of one prompt, or the reason why there is none."""
    if len(group) < 2:
        return "fewer than two responses"
    best = min(group, key=lambda row: (-row["score"], row["sample_index"]))
    worst = min(group, key=lambda row: (row["score"], row["sample_index"]))
    gap = best["score"] - worst["score"]
    if gap == 0:
        return "tie"
    if gap <= min_gap:
        return "gap at most min_gap"
    if best["response_ids"] == worst["response_ids"]:
        return "identical responses"
    return {
        "prompt_index": best["prompt_index"],
        "prompt": best["prompt"],
        "prompt_ids": best["prompt_ids"],
        "chosen": best["response"],
        "rejected": worst["response"],
        "chosen_ids": best["response_ids"],
        "rejected_ids": worst["response_ids"],
        "score_chosen": best["score"],
        "score_rejected": worst["score"],
        "chosen_finish": best["finish_reason"],
        "rejected_finish": worst["finish_reason"],
    }


def _check(row: dict[str, Any]) -> None:
    where = f"candidate (prompt {row.get('prompt_index')}, sample {row.get('sample_index')})"
    missing = [column for column in _COLUMNS if column not in row]
    if missing:
        raise DataError(f"{where}: {missing[0]!r} is missing; it has {sorted(row)}. Add it.")
    value = row["score"]
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise DataError(f"{where}: the score is {value!r}, not a finite number. Score it again.")


def pair(
    candidates_dir: Path, scores_dir: Path, out_path: Path, *, min_gap: float = 0.0
) -> dict[str, Any]:
    """Join candidates with their scores, pair them by `best_worst` and write the pairs.

    `out_path` is a `.jsonl` file. The summary is written beside it as `.summary.json` and returned:
    pairs, dropped by reason, mean scores and lengths (tokens) of both sides, and the correlation of
    score and length over all candidates, None where one of them is constant.

    Raises DataError when a candidate has no score or a score no candidate, or when no pair is left;
    then nothing is written. ValueError as `best_worst`.
    """
    out_path = Path(out_path)
    if out_path.suffix != ".jsonl":
        raise ValueError(f"out_path must end in .jsonl, got {str(out_path)!r}")
    rows = _join(candidates_dir, scores_dir)
    pairs, dropped = best_worst(rows, min_gap=min_gap)
    if not pairs:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items()))
        raise DataError(
            f"{candidates_dir}: no pair is left ({reasons}). Sample more responses per prompt or "
            "at a higher temperature, lower min_gap, or use a scorer that tells them apart."
        )
    summary = {
        "pairs": len(pairs),
        "dropped": dropped,
        "mean_score_chosen": statistics.fmean(x["score_chosen"] for x in pairs),
        "mean_score_rejected": statistics.fmean(x["score_rejected"] for x in pairs),
        "mean_length_chosen": statistics.fmean(len(x["chosen_ids"]) for x in pairs),
        "mean_length_rejected": statistics.fmean(len(x["rejected_ids"]) for x in pairs),
        "score_length_correlation": _correlation(
            [row["score"] for row in rows], [len(row["response_ids"]) for row in rows]
        ),
    }
    # The pairs come last: where they are, the stage is complete.
    write_json_atomic(out_path.with_suffix(".summary.json"), summary)
    write_jsonl_atomic(out_path, pairs)
    return summary


def load_pairs(path: Path) -> list[TokenizedPair]:
    """Read pairs that `pair` wrote; scores and finish reasons are in `extra`.

    Raises DataError, naming file and line, when a row isn't such a pair.
    """
    rows = read_rows(path)
    pairs = []
    for i, row in enumerate(rows.rows):
        try:
            pairs.append(
                TokenizedPair(
                    row["prompt_ids"],
                    row["chosen_ids"],
                    row["rejected_ids"],
                    {key: row[key] for key in _PAIR_EXTRA},
                    rows.where(i),
                )
            )
        except KeyError as error:
            raise DataError(f"{rows.where(i)}: {error} is missing. Pair again.") from error
        except (TypeError, ValueError) as error:
            raise DataError(f"{rows.where(i)}: {error}. Pair again.") from error
    return pairs


def _join(candidates_dir: Path, scores_dir: Path) -> list[dict[str, Any]]:
    candidates = _by_key(candidates_dir)
    scores = _by_key(scores_dir)
    for keys, message in (
        (candidates.keys() - scores.keys(), "has no score"),
        (scores.keys() - candidates.keys(), "has a score but is no candidate"),
    ):
        if keys:
            prompt_index, sample_index = min(keys)
            raise DataError(
                f"{scores_dir}: prompt {prompt_index}, sample {sample_index} {message} "
                f"({len(keys)} in all). Score these candidates again into a new directory."
            )
    for key, row in scores.items():
        if "score" not in row:
            raise DataError(f"{scores_dir}: prompt {key[0]}, sample {key[1]} has no score.")
    return [{**row, "score": scores[key]["score"]} for key, row in candidates.items()]


def _by_key(directory: Path) -> dict[tuple[int, int], dict[str, Any]]:
    result: dict[tuple[int, int], dict[str, Any]] = {}
    for row in read_parts(directory):
        key = (row.get("prompt_index"), row.get("sample_index"))
        if not all(type(index) is int for index in key):
            raise DataError(
                f"{directory}: a row has prompt_index {key[0]!r} and sample_index {key[1]!r}. "
                "Both must be ints."
            )
        if key in result:
            raise DataError(
                f"{directory}: prompt {key[0]}, sample {key[1]} is there twice. "
                "Write the directory again."
            )
        result[key] = row  # type: ignore[index]
    return result


def _correlation(scores: list[float], lengths: list[int]) -> float | None:
    """Pearson's, None where it isn't defined."""
    try:
        return statistics.correlation(scores, lengths)
    except statistics.StatisticsError:
        return None
