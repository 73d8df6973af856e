"""Rewarding the unlikely (arXiv 2506.02355): prefer right answers that the policy rarely gives.

scores = unlikeliness(scores, logps, groups)   # then pair as always
"""

from collections.abc import Hashable, Sequence


def unlikeliness(
    scores: Sequence[float],
    mean_logps: Sequence[float],
    groups: Sequence[Hashable],
    *,
    strength: float = 0.25,
) -> list[float]:
    """`r * (1 - strength * rank / G)`, rank 0 for the least likely of a prompt's G responses.

    Meant for scores that are 1 for a right response and 0 for a wrong one: wrong ones stay at 0,
    and of the right ones the likeliest loses most, so the chosen response is a rare right one.
    Paper and code (AndreHe02/rewarding-unlikely-release) use it before GRPO's normalization, with
    G = 32 and strength 0.25; as a rule for DPO's pairs it is ours.

    Args:
        scores: of each response, at least 0.
        mean_logps: log-probability of each response under the policy, per token.
        groups: prompt of each response.
        strength: share that the likeliest loses, nearly; in [0, 1].

    Of equal log-probabilities the earlier response counts as less likely.

    Raises ValueError when `strength` is out of its range or a score is negative, for which the
    factor would be a reward.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength!r}")
    if min(scores, default=0) < 0:
        raise ValueError(f"scores must be at least 0, got {min(scores)!r}; shift them first")
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    result = list(map(float, scores))
    for group in members.values():
        for rank, i in enumerate(sorted(group, key=lambda i: mean_logps[i])):
            result[i] *= 1 - strength * rank / len(group)
    return result
