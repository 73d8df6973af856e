"""Best of majority (arXiv 2510.03199): only answers that come often may win, then the best score.

keep = best_of_majority(["4", "4", "5", "4"], [0.2, 0.9, 0.99, 0.5], threshold=0.5)   # [1]
"""

from collections import Counter
from collections.abc import Hashable, Sequence


def best_of_majority(
    answers: Sequence[Hashable], scores: Sequence[float], *, threshold: float = 0.5, k: int = 1
) -> list[int]:
    """Places of the best responses of one prompt, best first.

    An answer is kept if its share of the responses is at least `threshold`; of each kept answer the
    response with the highest score stands for it, and the k answers with the highest are returned,
    fewer where fewer are kept. A reward model that is wrong about a rare answer can't choose it.

    The abstract gives the gate and the top k; the paper's threshold and what it does where no
    answer passes are UNVERIFIED: here the most frequent answers pass then.

    Args:
        answers: what each response answers, extracted and normalized by the caller.
        scores: of each response.
        threshold: in [0, 1]; 0 is best-of-n.
        k: answers to return, at least 1.

    Of equal scores the earlier response counts.

    Raises ValueError when an argument is out of its range.
    """
    if len(answers) != len(scores) or not answers:
        raise ValueError(
            f"answers and scores must be as many and at least one, got {len(answers)} and "
            f"{len(scores)}"
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k!r}")
    counts = Counter(answers)
    least = min(threshold * len(answers), max(counts.values()))
    best: dict[Hashable, int] = {}
    for i, answer in enumerate(answers):
        if counts[answer] >= least and (answer not in best or scores[i] > scores[best[answer]]):
            best[answer] = i
    return sorted(best.values(), key=lambda i: (-scores[i], i))[:k]
