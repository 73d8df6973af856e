"""What tells lists of examples apart in a run's folder and in the cache of the reference."""

from dataclasses import replace
from typing import Any

from fastdpo.data.examples import TokenizedList, TokenizedPair, TokenizedSingle
from fastdpo.train.reference import pairs_digest

PLAIN = [TokenizedPair([1, 2], [3], [4, 5]), TokenizedPair([6], [7, 8], [9])]
DIGEST = "92cc5ee6cab2f0bc22b88e422e8b653925a53987e8c0dda56046df85904dea0e"
COUNTED = "b6adbc061922221582dc6f260562e4950ae422d7995ec07fcca634024b97b98a"


def test_digests_of_pairs_are_those_of_older_runs():
    """As written by versions that knew pairs alone, so that their runs go on."""
    assert pairs_digest(PLAIN) == DIGEST
    counted = [TokenizedPair([1, 2], [3], [4, 5], weight=0.5, label_smoothing=0.25)]
    assert pairs_digest(counted) == COUNTED


def test_every_field_that_changes_numbers_changes_the_digest():
    (pair, _), found = PLAIN, {}
    one, single = TokenizedList([1], [[2], [3]], [1.0, 0.0]), TokenizedSingle([1], [2], True)
    ways: list[tuple[Any, list[dict[str, Any]]]] = [
        (pair, [
            {"chosen_ids": [8]}, {"rejected_prompt_ids": [1]}, {"prompt_nll": True},
            {"weight": 2.0}, {"label_smoothing": 0.5}, {"margin": 0.5},
            {"score_chosen": 1.0, "score_rejected": 0.0},
        ]),
        (one, [{"responses_ids": [[2], [4]]}, {"scores": [0.0, 1.0]}, {"margin": 1.0}]),
        (single, [{"desirable": False}, {"prompt_ids": [2]}, {"weight": 0.0}]),
    ]  # fmt: skip
    for example, changes in ways:
        kinds = [example, *(replace(example, **change) for change in changes)]
        found |= {pairs_digest([kind]): kind for kind in kinds}
    assert len(found) == 3 + 7 + 3 + 3
