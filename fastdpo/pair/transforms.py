"""Raw scores -> the scores that pairs are made from.

    scores, facts = shape(rows, [helpful, harmless], PairConfig(combine="log_sigmoid"))

In this order: `combine` makes one score of several, `transform` reshapes it within each prompt, and
`penalize` takes off what length earned.

A transform keeps the order of one prompt's scores, so it matters only where more than the order
does: to losses that read scores, to `min_gap`, to rules that look at gaps, and to a length penalty
in its units. Where it rounds two scores to the
same value, as PAR does 50 and 60 against 0, their order is still that of `unshaped`.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise
from statistics import NormalDist, fmean, pstdev
from typing import Any

from fastdpo.data.records import Candidate
from fastdpo.pair.config import PairConfig

_PERCENTILE = NormalDist().inv_cdf(0.85)

References = Mapping[Any, Sequence[float]]  # scores of reference responses, by prompt


def shape(
    rows: Sequence[Candidate],
    raw: Sequence[Sequence[float]],
    config: PairConfig,
    paired: Callable[[Any], bool] = lambda row: True,
    references_K: Sequence[References] | None = None,
) -> tuple[list[float], dict[str, float]]:
    """Final scores of candidates, and facts for the summary.

    `raw[k][i]` is scorer k's score of `rows[i]`. What transforms refer to are the prompt's own
    samples, or reference responses: `references_K[k]` has scorer k's scores of them by
    prompt_index, of the same responses in the same order for each scorer. They are combined as the
    samples are before the transform compares with them.

    Facts are there with a length penalty only: `length_penalty`, a score per token, and how many
    tokens longer the best response of a prompt is than the worst, on the mean over prompts,
    `length_gap_before` and `length_gap` after it. Responses that are not `paired`, and those
    without tokens or with nothing but white space, count in neither the search nor these.

    Raises ConfigError when there isn't a weight for each scorer, and ValueError as `transform`.
    """
    groups = [row.prompt_index for row in rows]
    weights = config.weights_of(len(raw))
    order = unshaped(raw, weights)
    options: Any = {"weights": weights, "how": config.combine, "references_K": references_K}
    scores = combine(raw, groups, **options)
    references = None if references_K is None else _combined(references_K, options)
    scores = transform(scores, groups, config.transform, references=references)
    if config.length_penalty == 0:
        return scores, {}
    lengths = [len(row.response_ids) for row in rows]
    used = [
        i for i, row in enumerate(rows) if row.response_ids and row.response.strip() and paired(row)
    ]
    of_used = [lengths[i] for i in used], [groups[i] for i in used]
    before, order = [scores[i] for i in used], [order[i] for i in used]
    gap_before = length_gap(list(zip(before, order)), *of_used)
    if config.length_penalty == "auto":
        alpha, gap = find_alpha(before, *of_used, order=order)
    else:
        alpha = float(config.length_penalty)
        gap = length_gap(list(zip(penalize(before, of_used[0], alpha), order)), *of_used)
    facts = {"length_penalty": alpha, "length_gap_before": gap_before, "length_gap": gap}
    return penalize(scores, lengths, alpha), facts


def unshaped(scores_K: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """`sum_k w_k s_k` of each response: the order of those whose final scores round to the same."""
    return [sum(w * s for w, s in zip(weights, of_one)) for of_one in zip(*scores_K)]


def _combined(references_K: Sequence[References], options: dict[str, Any]) -> References:
    """One score for each reference response, by prompt."""
    places = [prompt for prompt, scores in references_K[0].items() for _ in scores]
    raw = [[x for prompt in references_K[0] for x in by[prompt]] for by in references_K]
    scores = combine(raw, places, **options)
    return {prompt: [scores[i] for i in at] for prompt, at in _members(places).items()}


# One score of several


def combine(
    scores_K: Sequence[Sequence[float]],
    groups: Sequence[Hashable],
    *,
    weights: Sequence[float] | None = None,
    how: str = "weighted",
    references_K: Sequence[References] | None = None,
) -> list[float]:
    """One score for each response from those of K scorers; `groups[i]` is the prompt of response i.

    "weighted" is `sum_k w_k s_k`, a direction in the space of rewards (directional preference
    alignment, arXiv 2402.18571, where w has length 1; here it is taken as given).

    "log_sigmoid" is `sum_k w_k log sigmoid(s_k - ref_k)`, each scorer's log-sigmoid-centred
    transform (see `transform`): up to weights the log-probability that a response is good in all
    respects at once, a logical and (arXiv 2402.00742). `references_K` are each scorer's reference
    scores, by default the prompt's own.

    One scorer is passed through by "weighted" as it is, up to its weight.

    Raises ValueError as `transform` does.
    """
    weights = [1.0] * len(scores_K) if weights is None else weights
    if how == "log_sigmoid":
        given = [None] * len(scores_K) if references_K is None else references_K
        scores_K = [
            transform(scores, groups, how, references=references)
            for scores, references in zip(scores_K, given)
        ]
    return unshaped(scores_K, weights)


# Within a prompt


def transform(
    values: Sequence[float],
    groups: Sequence[Hashable],
    how: str,
    *,
    references: References | None = None,
) -> list[float]:
    """Reshape scores within each prompt; `groups[i]` is the prompt of `values[i]`.

    - "none": as they are.
    - "par", preference as reward (arXiv 2502.18770): the mean over M reference responses of
      `sigmoid(r - r_ref)`, the probability under Bradley and Terry to be preferred to them, bounded
      by 0 and 1.
    - "win_rate" (SPPO, arXiv 2405.00675): the same over all samples of the prompt, the response
      itself among them with 1/2: an estimate of the probability to be preferred to a response of
      the policy, as in its released code (uclaml/SPPO, scripts/compute_prob.py, whose
      chosen_probs_win and chosen_probs_lose it is).
    - "log_sigmoid", log-sigmoid-centred (arXiv 2402.00742): `log sigmoid(r - r_ref)`; r_ref is the
      85th percentile of a normal distribution with mean and deviation of the reference scores, as
      in PAR's code for this method. What is below it counts, what is above flattens out.
    - "mean_std": `(r - mean) / std` of the prompt's own scores (population's std), 0 where they are
      all the same; as in GRPO (arXiv 2402.03300).

    `references` holds the scores of reference responses by prompt, which in both papers come from
    the model before training. Without them a prompt's own samples serve: for "par" all others of
    the prompt, so that the value is a response's expected win rate among them (0.5 where there are
    none), for "log_sigmoid" all of them.

    No value is below that of a lower score, but rounding may make them equal: 1 is the nearest
    float to sigmoid(37) and to all above.

    Raises ValueError when a prompt has no references among those given.
    """
    result = list(map(float, values))
    if how == "none":
        return result
    for group, members in _members(groups).items():
        own = [result[i] for i in members]
        if references is not None and not references.get(group):
            raise ValueError(f"references has no scores for prompt {group!r}; give at least one")
        given = None if references is None else references[group]
        values, highest = _TRANSFORM[how](own, given), -math.inf
        for place in sorted(range(len(own)), key=own.__getitem__):
            # exp and log1p are within a rounding of right, which may turn two neighbours round.
            highest = max(highest, values[place])
            result[members[place]] = highest
    return result


def _members(groups: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    return members


def _par(own: list[float], references: Sequence[float] | None) -> list[float]:
    values = []
    for i, value in enumerate(own):
        others = own[:i] + own[i + 1 :] if references is None else references
        values.append(fmean(_sigmoid(value - x) for x in others) if others else 0.5)
    return values


def _win_rate(own: list[float], _: Sequence[float] | None) -> list[float]:
    return [fmean(_sigmoid(value - x) for x in own) for value in own]


def _log_sigmoid_centred(own: list[float], references: Sequence[float] | None) -> list[float]:
    base = own if references is None else references
    reference = fmean(base) + _PERCENTILE * pstdev(base)
    return [_log_sigmoid(value - reference) for value in own]


def _mean_std(own: list[float], _: Sequence[float] | None) -> list[float]:
    mean, std = fmean(own), pstdev(own)
    return [(value - mean) / std if std else 0.0 for value in own]


_TRANSFORM: dict[str, Callable[[list[float], Sequence[float] | None], list[float]]] = {
    "par": _par,
    "win_rate": _win_rate,
    "log_sigmoid": _log_sigmoid_centred,
    "mean_std": _mean_std,
}


def _log_sigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def _sigmoid(x: float) -> float:
    return math.exp(_log_sigmoid(x))


# Length


def penalize(scores: Sequence[float], lengths: Sequence[int], alpha: float) -> list[float]:
    """`score - alpha * length`, with lengths in tokens.

    Online-RLHF's max_min_p and DICE (arXiv 2406.09760) do the same with lengths in characters.
    """
    return [score - alpha * length for score, length in zip(scores, lengths)]


def length_gap(scores: Sequence[Any], lengths: Sequence[int], groups: Sequence[Hashable]) -> float:
    """Length of the best response less that of the worst, on the mean over prompts.

    Scores are numbers, or tuples whose later entries order equal ones. Of equal scores the first
    counts. A prompt with one response isn't counted, one whose scores are
    all the same counts as 0. 0 where there are no prompts.
    """
    gaps = []
    for members in _members(groups).values():
        if len(members) > 1:
            best = max(members, key=lambda i: scores[i])
            worst = min(members, key=lambda i: scores[i])
            gaps.append(lengths[best] - lengths[worst])
    return fmean(gaps) if gaps else 0.0


def find_alpha(
    scores: Sequence[float],
    lengths: Sequence[int],
    groups: Sequence[Hashable],
    *,
    high: float = 1.0,
    order: Sequence[float] | None = None,
) -> tuple[float, float]:
    """The alpha in [0, `high`] for which best and worst responses are closest in mean length.

    DICE's length correction (arXiv 2406.09760): alpha minimizes the absolute `length_gap` of
    `score - alpha * length`. DICE's code counts characters and scans a grid of steps of 0.001 from
    0 to 1; here lengths are tokens and the search is exact. The larger alpha, the shorter the best
    response of a prompt and the longer its worst, so the gap only falls: in steps, at the alphas
    where two responses of a prompt change places, which are enumerated. Between two of them alpha
    doesn't matter; it is put in the middle, or half as far again as the lower one if that is less,
    so that nothing is tied by it. Of equally good alphas the smallest is taken; 0 where the best
    are not longer to begin with.

    `order` says which of equal scores is the higher one, as `unshaped` does.

    Returns alpha, in scores per token, and the mean gap in tokens that it leaves. Short of zero at
    `high`, it stays there.
    """
    members = [x for x in _members(groups).values() if len(x) > 1]
    gap = length_gap(scores if order is None else list(zip(scores, order)), lengths, groups)
    if gap <= 0:
        return 0.0, gap
    falls: dict[float, int] = {}  # by alpha: how much the sum of gaps falls there
    total = 0  # of the gaps just above 0, where ties are broken by length
    for group in members:
        lines = [(scores[i], lengths[i]) for i in group]
        for path in (_best_path(lines, high), _best_path([(-s, -n) for s, n in lines], high)):
            total += path[0][1]
            for (_, old), (alpha, new) in pairwise(path):
                falls[alpha] = falls.get(alpha, 0) + old - new
    found, least = 0.0, gap
    bounds = sorted(falls)
    for low, top in zip([0.0, *bounds], [*bounds, high]):
        total -= falls.pop(low, 0)  # once, also where it rounds to 0
        if low < top and abs(total / len(members)) < abs(least):
            found = min((low + top) / 2, 1.5 * low) if low else top / 2
            least = total / len(members)
    return found, least


def _best_path(lines: list[tuple[float, int]], high: float) -> list[tuple[float, int]]:
    """From which alpha on which length is the best by `s - alpha * n`, up to `high`.

    Called with both negated it follows the worst, whose lengths it gives negated.
    """
    s, n = max(lines, key=lambda line: (line[0], -line[1]))
    path = [(0.0, n)]
    while shorter := [(s_j, n_j) for s_j, n_j in lines if n_j < n]:
        # The next to overtake; of several at once, the shortest stays ahead.
        alpha, n, s = min(((s - s_j) / (n - n_j), n_j, s_j) for s_j, n_j in shorter)
        if alpha >= high:
            break
        path.append((alpha, n))
    return path
