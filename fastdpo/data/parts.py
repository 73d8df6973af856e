"""Candidates and their scores, read from the parts of their folders and joined by place.

    rows = read_scored(candidates_dir, [scores_dir])   # Scored, in order of place

A row of scores has prompt_index, sample_index, score, and candidates, the beginning of the SHA-256
of the part that was scored, so that scores are never taken for those of other responses.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastdpo.data.records import Candidate, Scored
from fastdpo.errors import DataError, is_number
from fastdpo.storage import checksum_path, file_digest, list_parts, read_jsonl, read_parts

Place = tuple[int, int]  # prompt_index, sample_index
T = TypeVar("T")


def read_candidates(directory: Path) -> dict[Place, Candidate]:
    """The candidates of a folder by their places, in order.

    Raises DataError, naming the folder, when parts or columns are missing or a place is there
    twice; and as `read_parts`.
    """
    return _by_place(directory, Candidate.from_json)


def read_scores(directory: Path, places: Collection[Place]) -> dict[Place, float]:
    """The scores of candidates at these places.

    Raises DataError, naming the folder, when one has no score, is no candidate, or has one that is
    no finite number.
    """
    scores = _by_place(directory, _score_of)
    for some, message in (
        (set(places) - scores.keys(), "has no score"),
        (scores.keys() - set(places), "has a score but is no candidate"),
    ):
        if some:
            prompt_index, sample_index = min(some)
            raise DataError(
                f"{directory}: prompt {prompt_index}, sample {sample_index} {message} "
                f"({len(some)} in all). Score these candidates again into a new directory."
            )
    return scores


def read_scored(candidates_dir: Path, scores_dirs: Sequence[Path]) -> list[Scored]:
    """Candidates in order, each with the scores of all scorers.

    Raises DataError as `read_candidates`, `read_scores` and `check_scored`.
    """
    candidates = read_candidates(candidates_dir)
    scores_K = [read_scores(folder, candidates.keys()) for folder in scores_dirs]
    for folder in scores_dirs:
        check_scored(candidates_dir, folder)
    return [Scored.of(x, [of[place] for of in scores_K]) for place, x in candidates.items()]


def score_row(candidate: Candidate, score: float, digest: str) -> dict[str, Any]:
    """A row of scores, of a candidate in the part with this digest."""
    return {
        "prompt_index": candidate.prompt_index,
        "sample_index": candidate.sample_index,
        "score": score,
        "candidates": digest,
    }


def part_digest(path: Path) -> str:
    """What tells a part from one of other content."""
    known = checksum_path(path)
    return (known.read_text().split()[0] if known.is_file() else file_digest(path))[:16]


def scored_digests(path: Path) -> set[str | None]:
    """The parts of candidates that the scores in a file are of, by their digests."""
    return {row.get("candidates") for row in read_jsonl(path)}


def check_scored(candidates_dir: Path, scores_dir: Path) -> None:
    """Make sure that scores are of these candidates, by the content of the parts and not by place.

    Parts that `score` didn't write don't say what they are of, and pass.

    Raises DataError, naming both folders, when a part is of others; and as `read_jsonl` does.
    """
    for path in list_parts(candidates_dir):
        scores = Path(scores_dir) / path.name
        known = scored_digests(scores) - {None} if scores.is_file() else set()
        if known and known != {part_digest(path)}:
            raise DataError(
                f"{scores}: these are scores of other candidates than {candidates_dir} has now. "
                f"Run fastdpo score with this scorer, --candidates {candidates_dir} and "
                f"--output_dir {scores_dir}: it scores the parts that differ anew."
            )


def _score_of(row: dict[str, Any], where: str) -> float:
    if "score" not in row:
        raise DataError(f"{where} has no score. Score it again.")
    score = row["score"]
    if not is_number(score):
        raise DataError(f"{where}: the score is {score!r}, not a finite number. Score it again.")
    return score


def _by_place(directory: Path, read: Callable[[dict[str, Any], str], T]) -> dict[Place, T]:
    result: dict[Place, T] = {}
    for row in read_parts(directory):
        prompt_index, sample_index = row.get("prompt_index"), row.get("sample_index")
        if type(prompt_index) is not int or type(sample_index) is not int:
            raise DataError(
                f"{directory}: a row has prompt_index {prompt_index!r} and sample_index "
                f"{sample_index!r}. Both must be ints."
            )
        where = f"{directory}: prompt {prompt_index}, sample {sample_index}"
        if (prompt_index, sample_index) in result:
            raise DataError(f"{where} is there twice. Write the directory again.")
        result[prompt_index, sample_index] = read(row, where)
    return dict(sorted(result.items()))
