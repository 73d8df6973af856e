"""Rules of pairing: the responses to a prompt and their scores -> pairs, or a list of them all.

A rule takes the responses to one prompt, best first, and proposes pairs of them. A proposal whose
two scores are equal or too close, or whose responses are the same tokens, is dropped and counted.
`fastdpo.pair.stage` applies one of these to the files of a round.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, groupby
from typing import Any

from fastdpo.data.records import ListRow, PairRow, Scored
from fastdpo.errors import DataError, is_number
from fastdpo.pair.filters import draw_key

Pairing = tuple[list[PairRow], dict[str, int]]  # pairs, and what was dropped by reason
Proposal = tuple[Scored, Scored]  # chosen, rejected


def best_worst(rows: Sequence[Scored], *, min_gap: float = 0.0) -> Pairing:
    """Pair the best and the worst response of every prompt; returns the pairs and what was dropped.

    What most iterative recipes do, among them Online-RLHF's ``max_min`` (arXiv 2405.07863) and
    DICE (arXiv 2406.09760). Of equal scores the smallest sample_index counts. Scores that shaping
    rounded to the same value are not equal: `Scored.rank` tells them apart.

    This and all other rules: `rows` are in any order, pairs come in order of prompt_index.

    `dropped` counts proposed pairs by reason: "tie" (equal scores), "gap at most min_gap",
    "identical responses" (the same tokens), and here a prompt proposes one. "fewer than two
    responses" counts prompts, which propose none, and "empty response" responses, without tokens or
    with nothing but white space, never paired.
    """
    return _pairs(rows, _best_and_worst, min_gap)


def best_random(rows: Sequence[Scored], *, min_gap: float = 0.0, seed: int = 0) -> Pairing:
    """Pair the best response of every prompt with one drawn from the others.

    Online-RLHF's ``max_random`` (arXiv 2405.07863; its released code takes the first of the
    others). Only those that can be paired are drawn from; where none can, the prompt is dropped for
    the reason of its worst response. Otherwise as `best_worst`.
    """

    def propose(group: list[Scored]) -> list[Proposal]:
        best = group[0]
        others = [row for row in group if _refusal(best, row, min_gap) is None]
        if not others:
            return _best_and_worst(group)
        return [(best, min(others, key=lambda row: draw_key(seed, *row.place)))]

    return _pairs(rows, propose, min_gap)


def all_ranked(
    rows: Sequence[Scored], *, min_gap: float = 0.0, max_pairs: int | None = None
) -> Pairing:
    """Pair every response with every one that scores lower.

    All comparisons of a ranking, as InstructGPT trains its reward model on (arXiv 2203.02155,
    section 3.5); `filters.equal_prompts` gives its weights. With `max_pairs` the widest gaps of a
    prompt are kept and the others counted as "over max_pairs", which is ours. A prompt of n
    responses proposes n (n - 1) / 2 pairs. Otherwise as `best_worst`.
    """

    def widest(pairs: list[Proposal]) -> list[Proposal]:
        return sorted(pairs, key=lambda x: (-_gap(x), x[1].unshaped - x[0].unshaped))[:max_pairs]

    return _pairs(rows, lambda group: list(combinations(group, 2)), min_gap, keep=widest)


def curriculum(
    rows: Sequence[Scored], *, min_gap: float = 0.0, max_pairs: int | None = None
) -> Pairing:
    """Pair the best response with each other one, easy pairs (wide gaps) before hard ones.

    Curry-DPO (arXiv 2403.07230): of four ranked responses (R1, R4), (R1, R3), (R1, R2) are trained
    on one after another, and the policy of a stage is the reference of the next. A pair's column
    "stage" counts them from 0 for each prompt; `split_stages` takes them apart. With `max_pairs` a
    prompt has so many stages at most: evenly spread from its widest gap to its narrowest, both
    kept, the others counted as "over max_pairs"; that is ours, for more than four responses. A
    prompt of n responses proposes n - 1 pairs. Otherwise as `best_worst`.
    """

    def spread(pairs: list[Proposal]) -> list[Proposal]:
        count = len(pairs) if max_pairs is None else min(max_pairs, len(pairs))
        last, steps = len(pairs) - 1, max(count - 1, 1)
        return [pairs[stage * last // steps] for stage in range(count)]

    def propose(group: list[Scored]) -> list[Proposal]:
        others = sorted(group[1:], key=lambda row: (row.rank, row.sample_index))
        return [(group[0], row) for row in others]

    pairs, dropped = _pairs(rows, propose, min_gap, keep=spread)
    groups = groupby(pairs, key=lambda row: row.prompt_index)
    return [replace(row, stage=i) for _, group in groups for i, row in enumerate(group)], dropped


def nearest_margin(rows: Sequence[Scored], *, target: float, min_gap: float = 0.0) -> Pairing:
    """Pair the two responses of every prompt whose gap in score is nearest to `target`.

    Of equally near gaps the one with the highest scores counts, those of chosen first, then the
    smaller sample indices. Where no two responses can be paired, the prompt is dropped for the
    reason of its best and worst. Ours; that the worst of many samples is not the best rejected
    response is a finding of Xiao et al. (arXiv 2502.16825, its abstract), who take one near mean -
    2 standard deviations instead. Otherwise as `best_worst`.
    """

    def propose(group: list[Scored]) -> list[Proposal]:
        good = [pair for pair in combinations(group, 2) if _refusal(*pair, min_gap) is None]
        # The pairs are in order of the chosen score, and min takes the first.
        return [min(good, key=lambda x: abs(_gap(x) - target))] if good else _best_and_worst(group)

    return _pairs(rows, propose, min_gap)


def tree_siblings(rows: Sequence[Scored], *, min_gap: float = 0.0) -> Pairing:
    """Pair the best and the worst child of every node of a search tree.

    A candidate is a node: ``extra["parent"]``, a string or int, names its parent among those of its
    prompt; its response continues what both share, which is in prompt_ids or in both responses (a
    shared beginning cancels in the loss). ``extra["visits"]``, where siblings have it, is the
    search's visit count, and gives label smoothing ``1 - 1 / (1 + N_l / max(1, N_w))``, 1/2 at
    most: little where the better child was visited far more often.

    MCTS-DPO (arXiv 2405.00451), as in its released code, which sorts children by value and has
    that formula; it takes the runner-up as rejected unless told to take the worst, which with its
    two children is the same. Counts families where `best_worst` counts prompts, otherwise as that.

    Raises DataError also when a candidate has no parent, only some siblings have visits, or their
    prompts differ.
    """

    def sibling_pair(best: Scored, worst: Scored) -> PairRow:
        visits: list[Any] = [row.extra.get("visits") for row in (best, worst)]
        if best.prompt_ids != worst.prompt_ids:
            raise DataError(f"{worst.name}: its prompt_ids differ from its sibling's. Fix them.")
        result = PairRow.of(best, worst)
        if visits == [None, None]:
            return result
        if not all(is_number(n) and n >= 0 for n in visits):
            raise DataError(
                f"{worst.name}: visits of it and its sibling are {visits[1]!r} and "
                f"{visits[0]!r}. Give both a count, or none."
            )
        confidence = 1 / (1 + visits[1] / max(1, visits[0]))
        return replace(result, label_smoothing=min(1 - confidence, 0.5))

    return _pairs(rows, _best_and_worst, min_gap, unit=family, finish=sibling_pair)


def listwise(
    rows: Sequence[Scored], *, min_gap: float = 0.0, drop_ties: bool = False
) -> tuple[list[ListRow], dict[str, int]]:
    """All responses to a prompt in one list, best first, for losses of a ranking.

    Equal scores stay side by side, by sample_index, but with `drop_ties`, which leaves out all but
    the first and counts the others as "tied response". A prompt has a list unless its best and its
    worst response could not be paired: as with `best_worst` it is dropped for "tie", here also of
    scores that shaping rounded to the same value, since a list has no other order than its scores;
    for "gap at most min_gap"; or for "identical responses", where all are. Otherwise as
    `best_worst`.
    """
    dropped: Counter[str] = Counter()
    lists = []
    for group in _groups(rows, prompt_of, dropped):
        gap, same = group[0].score - group[-1].score, _same(group)
        if gap <= min_gap or same:
            why = "identical responses" if same and gap else "gap at most min_gap"
            dropped["tie" if gap == 0 else why] += 1
            continue
        first = {row.score: row for row in reversed(group)}
        kept = list(reversed(first.values())) if drop_ties else group
        if len(kept) < len(group):
            dropped["tied response"] += len(group) - len(kept)
        lists.append(ListRow.of(kept))
    return lists, dict(dropped)


def _same(group: Sequence[Scored]) -> bool:
    return all(row.response_ids == group[0].response_ids for row in group)


def prompt_of(row: Scored) -> int:
    """What most rules pair within."""
    return row.prompt_index


def family(row: Scored) -> tuple[int, str]:
    """What `tree_siblings` pairs within. Raises DataError when a candidate has no parent."""
    parent = row.extra.get("parent")
    if not isinstance(parent, str | int):
        raise DataError(
            f"{row.name}: its parent is {parent!r}. The rule tree_siblings needs "
            'extra["parent"], a string or int.'
        )
    return row.prompt_index, repr(parent)


def _best_and_worst(group: list[Scored]) -> list[Proposal]:
    return [(group[0], min(group, key=lambda row: (row.rank, row.sample_index)))]


def _gap(pair: Proposal) -> float:
    return pair[0].score - pair[1].score


def _refusal(chosen: Scored, rejected: Scored, min_gap: float) -> str | None:
    """The reason why two responses can't be paired, or None."""
    gap = _gap((chosen, rejected))
    if gap == 0 and _is_tie(chosen, rejected):
        return "tie"
    if gap <= min_gap > 0:
        return "gap at most min_gap"
    return "identical responses" if chosen.response_ids == rejected.response_ids else None


def _is_tie(chosen: Scored, rejected: Scored) -> bool:
    """Of equal scores; after a length penalty, those of different lengths are a tie."""
    lengths = {len(x.response_ids) for x in (chosen, rejected) if x.penalized}
    return chosen.rank <= rejected.rank or len(lengths) > 1


def _pairs(
    rows: Sequence[Scored],
    propose: Callable[[list[Scored]], list[Proposal]],
    min_gap: float,
    *,
    keep: Callable[[list[Proposal]], list[Proposal]] = list,
    unit: Callable[[Scored], Any] = prompt_of,
    finish: Callable[[Scored, Scored], PairRow] = PairRow.of,
) -> Pairing:
    """Pair each unit's responses: propose, refuse what can't be paired, keep, finish the rows."""
    dropped: Counter[str] = Counter()
    pairs = []
    for group in _groups(rows, unit, dropped):
        good = []
        for proposal in propose(group):
            reason = _refusal(*proposal, min_gap)
            if reason is None:
                good.append(proposal)
            else:
                dropped[reason] += 1
        kept = keep(good)
        if len(kept) < len(good):
            dropped["over max_pairs"] += len(good) - len(kept)
        pairs += [finish(*proposal) for proposal in kept]
    return pairs, dict(dropped)


def _groups(
    rows: Sequence[Scored], unit: Callable[[Scored], Any], dropped: Counter[str]
) -> Iterator[list[Scored]]:
    """Each unit's responses, best first, of equal ones by sample_index; those that are empty, and
    units with fewer than two others, are counted in `dropped`."""
    groups: dict[Any, list[Scored]] = {}
    for row in sorted(rows, key=lambda row: row.place):
        group = groups.setdefault(unit(row), [])
        if row.response_ids and row.response.strip():
            group.append(row)
        else:
            dropped["empty response"] += 1
    for group in groups.values():
        if len(group) < 2:
            dropped["fewer than two responses"] += 1
        else:
            yield sorted(group, key=lambda row: row.rank, reverse=True)
