"""What the scorers say of a label: how far it holds, and which pairs they would turn round.

Agreement of two rounds' rankings (CREAM), and the mean gap of several scorers (Secrets of RLHF II).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from statistics import fmean
from typing import Any

import numpy as np

from fastdpo.data.records import PairRow, Scored
from fastdpo.errors import DataError
from fastdpo.pair.filters import floor_of


# ------------------------------------------------------------------------ consistency (CREAM)
def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau of two score lists, in [-1, 1]; two entries tied in either list count as 0.

    Concordant less discordant pairs, over all pairs (tau-a). At least two entries.
    """
    orders = [np.sign(np.subtract.outer(x, x)) for x in (a, b)]
    return int((orders[0] * orders[1]).sum()) / (len(a) * (len(a) - 1))


def consistency(
    rows: Sequence[Scored], previous: Mapping[tuple[int, int], Any]
) -> dict[int, float]:
    """How far two reward models agree on the ranking of each prompt's responses, in [0, 1].

    ``C = (tau + 1) / 2`` with Kendall's tau of the present ranks (`Scored.rank` of `rows`) and
    those of the round before (`previous`, a number or a rank by place), of the same responses. By
    prompt_index; a prompt with one response has none.

    CREAM (arXiv 2410.12735, Algorithm 1). Of models M0, M1 (the start of round 1) and so on, the
    rewards that round t compares are

        r(x, y) = log pi_t(y|x) - log pi_0(y|x)             the present ones, summed over tokens
        log pi_{t-1}(y|x) - log pi_0(y|x)                   those before, from round 2 on
        log pi_0(y|x) / |y|                                 those before in round 1

    since M0 against itself says nothing: in its released code a model without a reference is ranked
    by its mean log-probability. Equal scores agree with nothing, as in the paper's tau; its code
    ranks them by their place in the list. The code also skips prompts without moving on in the list
    of their values, so that pairs get the value of another prompt; not here.
    """
    key, result = attrgetter("prompt_index"), {}
    for prompt_index, of_prompt in groupby(sorted(rows, key=key), key):
        group = list(of_prompt)
        if len(group) > 1:
            before = [previous[row.place] for row in group]
            tau = kendall_tau(_ranks([row.rank for row in group]), _ranks(before))
            result[prompt_index] = (tau + 1) / 2
    return result


def _ranks(values: Sequence[Any]) -> list[int]:
    """The place of each among the different values, from the lowest."""
    places = sorted(set(values))
    return [places.index(value) for value in values]


def smooth(pairs: Sequence[PairRow], agreement: Mapping[int, float], how: str) -> list[PairRow]:
    """The pairs with ``label_smoothing = 1 - C``, of their prompt (`how` "prompt") or the "mean".

    CREAM's loss (arXiv 2410.12735) is ``C`` times DPO's plus ``1 - C`` times that of the reversed
    pair: label smoothing by ``1 - C``, which beyond 1/2 turns the pair round. The mean is over all
    prompts in `agreement`. The released code has both, as "avg" and "dyn".
    """
    mean = fmean(agreement.values())
    return [
        replace(row, label_smoothing=1 - (mean if how == "mean" else agreement[row.prompt_index]))
        for row in pairs
    ]


# ------------------------------------------------------- preference strength (Secrets of RLHF II)
def strengths(pairs: Sequence[PairRow], weights: Sequence[float] | None = None) -> list[float]:
    """Mean gap of each pair over K scorers: ``mean_k w_k (r_k(chosen) - r_k(rejected))``.

    The preference strength of "Secrets of RLHF in Large Language Models Part II" (arXiv 2401.06080,
    equation 4), where ten reward models trained on the same data vote on labels that others gave;
    about a quarter of the human labels of HH-RLHF come out negative. The weights are ours, by
    default 1: a negative one is of a scorer whose low scores are wanted. Scorers on different
    scales don't weigh the same in it.

    Of pairs whose label is the order of ``sum_k w_k r_k`` no strength is below 0. It can be where
    the label has another source: data, another combination of scores, or a length penalty.

    Raises DataError when a pair lacks ``scores_chosen`` or ``scores_rejected``, a score by scorer,
    or has not one for each weight.
    """
    result = []
    for row in pairs:
        chosen_K, rejected_K = row.scores_chosen, row.scores_rejected
        if chosen_K is None or rejected_K is None:
            raise DataError(
                f"pair of prompt {row.prompt_index}: the scores of several scorers are missing, "
                "which preference strength needs."
            )
        of_all = [1.0] * len(chosen_K) if weights is None else weights
        if any(len(side) != len(of_all) for side in (chosen_K, rejected_K)):
            raise DataError(
                f"pair of prompt {row.prompt_index}: chosen and rejected have {len(chosen_K)} and "
                f"{len(rejected_K)} scores, of {len(of_all)} scorers. Score both by all of them."
            )
        # Sums first, like the score that a label comes from: rounding then can't part the two.
        chosen, rejected = (
            sum(w * x for w, x in zip(of_all, side)) for side in (chosen_K, rejected_K)
        )
        result.append((chosen - rejected) / len(of_all))
    return result


def flip_weakest(
    pairs: Sequence[PairRow], share: float, weights: Sequence[float] | None = None
) -> tuple[list[PairRow], int]:
    """The pairs, those with the lowest strength turned round, and how many were.

    ``floor(share * pairs)`` at most, and only where the strength (`strengths`, with `weights`) is
    below 0: the scorers' mean says the opposite of the label. Equal strengths go by their order. A
    flipped pair has chosen and rejected exchanged in every column, and ``flipped: true``.

    Label flipping of arXiv 2401.06080, section 2.4.1, which flips the lowest 20%; all of those are
    below 0 there, so the second condition is ours. The paper does it to train reward models.

    Raises DataError as `strengths`.
    """
    values, most = strengths(pairs, weights), floor_of(share * len(pairs))
    weakest = sorted(range(len(pairs)), key=lambda i: (values[i], i))[:most]
    flip = {i for i in weakest if values[i] < 0}
    return [row.turned() if i in flip else row for i, row in enumerate(pairs)], len(flip)


def soften(
    pairs: Sequence[PairRow], smoothing: float, weights: Sequence[float] | None = None
) -> tuple[list[PairRow], int]:
    """The pairs, those of a strength below 0 with this label smoothing, and how many they are.

    The strength is that of `strengths` with `weights`.

    Soft labels of arXiv 2401.06080: label smoothing (equation 5) "to data with the preference
    strength less than 0" (section 2.5). How much smoothing it takes is UNVERIFIED: no value was
    found in the paper's text.

    Raises DataError as `strengths`.
    """
    weak = [value < 0 for value in strengths(pairs, weights)]
    softened = [replace(x, label_smoothing=smoothing) if w else x for x, w in zip(pairs, weak)]
    return softened, sum(weak)
