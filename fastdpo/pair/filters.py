"""What is dropped, softened, turned round or added before a policy trains on pairs.

Plain functions of candidates and of the pairs that `fastdpo.pair.stage` makes of them; they return
new rows and change none. `Pairing` has an option for each, and `pair` applies them. Two measure
pairs under a model, and need one:

    found = measure(model, pairs)
    kept = keep_lowest(found.ches, 0.9)
"""

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdpo.data.batch import TokenizedPair, pack_pairs, plan_batches
from fastdpo.data.records import prompt_key
from fastdpo.errors import DataError

Row = dict[str, Any]


def draw_key(seed: int, *place: int) -> str:
    """A number for a place, uniform over seeds, as hex: what sorts first is drawn first.

    It depends on nothing but the arguments, so a draw is the same whatever the order of the rows.
    """
    return hashlib.sha256("/".join(map(str, (seed, *place))).encode()).hexdigest()


def order(row: Row) -> tuple[float, float]:
    """What a candidate is ranked by: its score, and among equal ones its score before shaping.

    `fastdpo.pair.stage` gives rows whose scores were shaped an "unshaped" (`transforms.unshaped`).
    """
    return row["score"], row.get("unshaped", 0.0)


def is_above(row: Row, other: Row) -> bool:
    """Whether a candidate ranks above another.

    Of equal scores after a length penalty, those of different lengths are a tie.
    """
    if row["score"] != other["score"]:
        return row["score"] > other["score"]
    lengths = [len(x["response_ids"]) for x in (row, other) if x.get("penalized")]
    return order(row) > order(other) and len(set(lengths)) < 2


# --------------------------------------------------------------------------------- responses
def drop_truncated(rows: Sequence[Row]) -> tuple[list[Row], dict[str, int]]:
    """The candidates that ended by themselves, and how many were cut at the token limit.

    DICE (arXiv 2406.09760) leaves cut outputs out; read in its released code, not in the paper.
    """
    kept = [row for row in rows if row["finish_reason"] != "length"]
    return kept, _counted("truncated response", len(rows) - len(kept))


def drop_duplicates(rows: Sequence[Row]) -> tuple[list[Row], dict[str, int]]:
    """The candidates, of equal responses (the same tokens) to a prompt only the first.

    First is the smallest sample_index; that one keeps its score, should a noisy scorer have given
    them different ones. SimPO (arXiv 2405.14734; its released code) drops a prompt when all its
    responses are the same text; this is the same for single responses, and ours.
    """
    first: dict[Any, int] = {}
    for row in rows:
        key = _response(row)
        first[key] = min(first.get(key, row["sample_index"]), row["sample_index"])
    kept = [row for row in rows if first[_response(row)] == row["sample_index"]]
    return kept, _counted("duplicate response", len(rows) - len(kept))


def _response(row: Row) -> tuple[Any, ...]:
    return row["prompt_index"], tuple(row["prompt_ids"]), tuple(row["response_ids"])


def _counted(reason: str, count: int) -> dict[str, int]:
    return {reason: count} if count else {}


# ------------------------------------------------------------------------ consistency (CREAM)
def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau of two score lists, in [-1, 1]; two entries tied in either list count as 0.

    Concordant less discordant pairs, over all pairs (tau-a).

    Raises ValueError when the lists differ in length or have fewer than two entries.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(
            f"needs two lists of the same length of at least 2, got {len(a)} and {len(b)}"
        )
    orders = []
    for values in (a, b):
        x = np.asarray(values, dtype=np.float64)
        orders.append((x[:, None] > x).astype(np.int64) - (x[:, None] < x))
    return int((orders[0] * orders[1]).sum()) / (len(a) * (len(a) - 1))


def consistency(rows: Sequence[Row], previous: Mapping[tuple[int, int], Any]) -> dict[int, float]:
    """How far two reward models agree on the ranking of each prompt's responses, in [0, 1].

    ``C = (tau + 1) / 2`` with Kendall's tau of the present scores (`order` of `rows`) and those of
    the round before (`previous`, a number or an `order` by prompt_index and sample_index), of the
    same responses. By prompt_index; a prompt with one response has none.

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
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt_index"], []).append(row)
    result = {}
    for prompt_index, group in sorted(groups.items()):
        if len(group) > 1:
            before = [previous[prompt_index, row["sample_index"]] for row in group]
            tau = kendall_tau(_ranks(list(map(order, group))), _ranks(before))
            result[prompt_index] = (tau + 1) / 2
    return result


def _ranks(values: Sequence[Any]) -> list[float]:
    """The place of each among the different values, from the lowest."""
    places = {value: i for i, value in enumerate(sorted(set(values)))}
    return [float(places[value]) for value in values]


def smooth(pairs: Sequence[Row], agreement: Mapping[int, float], how: str) -> list[Row]:
    """The pairs with ``smoothing = 1 - C``, of their prompt (`how` "prompt") or the mean ("mean").

    CREAM's loss (arXiv 2410.12735) is ``C`` times DPO's plus ``1 - C`` times that of the reversed
    pair: label smoothing by ``1 - C``, which beyond 1/2 turns the pair round. The mean is over all
    prompts in `agreement`. The released code has both, as "avg" and "dyn".

    Raises ValueError when `how` is neither, or there is nothing to average.
    """
    if how not in ("mean", "prompt"):
        raise ValueError(f"how must be mean or prompt, got {how!r}")
    if not agreement:
        raise ValueError("agreement is empty: no prompt has two responses to compare")
    mean = fmean(agreement.values())
    return [
        {**row, "smoothing": 1 - (mean if how == "mean" else agreement[row["prompt_index"]])}
        for row in pairs
    ]


# ------------------------------------------------------- preference strength (Secrets of RLHF II)
def strengths(pairs: Sequence[Row], weights: Sequence[float] | None = None) -> list[float]:
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
        try:
            sides = row["scores_chosen"], row["scores_rejected"]
        except KeyError as error:
            raise DataError(
                f"pair of prompt {row.get('prompt_index')}: {error} is missing. Preference "
                "strength needs the scores of several scorers."
            ) from error
        of_all = [1.0] * len(sides[0]) if weights is None else weights
        if any(len(side) != len(of_all) for side in sides):
            raise DataError(
                f"pair of prompt {row.get('prompt_index')}: chosen and rejected have "
                f"{len(sides[0])} and {len(sides[1])} scores, of {len(of_all)} scorers. Score both "
                "by all of them."
            )
        # Sums first, like the score that a label comes from: rounding then can't part the two.
        chosen, rejected = (sum(w * x for w, x in zip(of_all, side)) for side in sides)
        result.append((chosen - rejected) / len(of_all))
    return result


def flip_weakest(
    pairs: Sequence[Row], share: float, weights: Sequence[float] | None = None
) -> tuple[list[Row], int]:
    """The pairs, those with the lowest strength turned round, and how many were.

    ``floor(share * pairs)`` at most, and only where the strength (`strengths`, with `weights`) is
    below 0: the scorers' mean says the opposite of the label. Equal strengths go by their order. A
    flipped pair has chosen and rejected exchanged in every column, and ``flipped: true``.

    Label flipping of arXiv 2401.06080, section 2.4.1, which flips the lowest 20%; all of those are
    below 0 there, so the second condition is ours. The paper does it to train reward models.

    Raises ValueError when `share` isn't in [0, 1], and DataError as `strengths`.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share!r}")
    values = strengths(pairs, weights)
    weakest = sorted(range(len(pairs)), key=lambda i: (values[i], i))[: _floor(share * len(pairs))]
    flip = {i for i in weakest if values[i] < 0}
    return [_flipped(row) if i in flip else row for i, row in enumerate(pairs)], len(flip)


def soften(
    pairs: Sequence[Row], smoothing: float, weights: Sequence[float] | None = None
) -> tuple[list[Row], int]:
    """The pairs, those of a strength below 0 with this label smoothing, and how many they are.

    The strength is that of `strengths` with `weights`.

    Soft labels of arXiv 2401.06080: label smoothing (equation 5) "to data with the preference
    strength less than 0" (section 2.5). How much smoothing it takes is UNVERIFIED: no value was
    found in the paper's text.

    Raises ValueError when `smoothing` isn't in [0, 1], and DataError as `strengths`.
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be in [0, 1], got {smoothing!r}")
    weak = [value < 0 for value in strengths(pairs, weights)]
    return [{**x, "smoothing": smoothing} if w else x for x, w in zip(pairs, weak)], sum(weak)


def _flipped(row: Row) -> Row:
    other = {"chosen": "rejected", "rejected": "chosen"}
    result: Row = {}
    for name, value in row.items():
        side = next((side for side in other if side in name.split("_")), None)
        source = name if side is None else name.replace(side, other[side])
        result[name] = value if source == name else row[source]
    return {**result, "flipped": True}


# ----------------------------------------------------------------------------- offline pairs
def beats_fresh(
    pairs: Sequence[Row], fresh: Sequence[Mapping[str, float]], threshold: float = 0.0
) -> tuple[list[Row], dict[str, int]]:
    """The offline pairs whose chosen response scores above what the policy now gives.

    `fresh` has for each round so far the score of a fresh sample by `prompt_key`; a pair is kept
    when ``fresh - score_chosen < threshold`` in every round that sampled its prompt, so what was
    dropped once stays out. A pair whose prompt was never sampled is kept.

    Filtered DPO (arXiv 2404.13846), as in its released code: one sample a prompt at the start of
    each epoch, threshold 0, dropped for good. A round is our epoch.

    Raises DataError when an offline pair to be compared has no score.
    """
    kept, worse = [], 0
    for row in pairs:
        key = prompt_key(row["prompt"])
        values = [scores[key] for scores in fresh if key in scores]
        if values and row["score_chosen"] is None:
            raise DataError(
                f"offline pair {row['prompt_index']} has no score to compare a fresh sample with. "
                "Score the offline pairs by the scorer of the run."
            )
        if all(value - row["score_chosen"] < threshold for value in values):
            kept.append(row)
        else:
            worse += 1
    return kept, _counted("offline: a fresh sample scores as high", worse)


def replay(
    pairs: Sequence[Row], offline: Sequence[Row], share: float, seed: int
) -> tuple[list[Row], dict[str, int]]:
    """Offline pairs to train on beside the sampled ones, and how many could not be used.

    ``floor(share * n / (1 - share))`` for `n` sampled pairs, so that `share` of all is offline,
    drawn by `seed` without replacement from those whose prompt (`prompt_key`) none of `pairs` has;
    in the order of `offline`. Where there are fewer, all of them, with a warning.

    Replay of DICE (arXiv 2406.09760) as in its released code, share 1/2 there; the code takes fewer
    sampled pairs where offline ones run short, which this does not.

    Raises ValueError when `share` isn't in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got {share!r}")
    sampled = {prompt_key(row["prompt"]) for row in pairs}
    free = [row for row in offline if prompt_key(row["prompt"]) not in sampled]
    wanted = _floor(share * len(pairs) / (1 - share))
    if len(free) < wanted:
        warnings.warn(
            f"a replay share of {share:g} takes {wanted} offline pairs, there are {len(free)} of "
            "prompts without a sampled pair; all of them are used. Give more offline pairs, or "
            "lower replay_share.",
            stacklevel=2,
        )
    order = sorted(range(len(free)), key=lambda i: draw_key(seed, free[i]["prompt_index"], i))
    drawn = sorted(order[:wanted])
    dropped = _counted("offline: prompt has a sampled pair", len(offline) - len(free))
    return [free[i] for i in drawn], dropped


# --------------------------------------------------------------------------- weights of pairs
def equal_prompts(pairs: Sequence[Row]) -> list[Row]:
    """The pairs with ``weight = 1 / (pairs of the prompt)``: every prompt weighs the same.

    InstructGPT (arXiv 2203.02155, equation 1) divides the loss of a prompt's comparisons by their
    number; there for a reward model.
    """
    places = [(row.get("source"), row["prompt_index"]) for row in pairs]
    counts = Counter(places)
    return [{**row, "weight": 1 / counts[place]} for row, place in zip(pairs, places)]


def keep_lowest(values: Sequence[float], share: float) -> list[int]:
    """Which entries belong to the lowest `share` of all, in order; at least one, equal ones by
    their order.

    Raises ValueError when `share` isn't in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share!r}")
    count = math.ceil(share * len(values) - 1e-9)  # 0.07 * 100 is rounded to more than 7
    return sorted(sorted(range(len(values)), key=lambda i: (values[i], i))[:count])


def _floor(value: float) -> int:
    return math.floor(value + 1e-9)  # 0.29 * 100 is rounded to less than 29


# ----------------------------------------------------------------------- pairs under a model
@dataclass(frozen=True)
class Measured:
    """What `measure` found, an entry for each pair: see `ches` and `difficulty`."""

    ches: list[float]
    difficulty: list[float]


def ches(
    model: Any, pairs: Sequence[TokenizedPair], *, length_normalized: bool = True, **options: Any
) -> list[float]:
    """Centered hidden embedding similarity of each pair: high values displace likelihood.

    ``<H_w, H_l> - |H_w|^2``, where ``H`` sums the final hidden states (what the head reads) that
    predict the tokens of a response: from the prompt's last token to the response's last but one.
    With `length_normalized` each H is divided by the tokens of its response; plain sums grow with
    length, so only these compare pairs of different lengths.

    Razin et al. (arXiv 2410.08847), definition 2, and 3 in appendix A for the normalized form; read
    in the released code and in notes on the paper, not in the paper. To filter, the paper keeps the
    5% of lowest normalized values (section 6.3), of pairs for refusals. The released code sums over
    padding where a batch has any; here there is none.

    `options` and errors are those of `measure`.
    """
    return measure(model, pairs, length_normalized=length_normalized, **options).ches


def difficulty(model: Any, pairs: Sequence[TokenizedPair], **options: Any) -> list[float]:
    """``log pi_ref(rejected) - log pi_ref(chosen)`` of each pair, in nats, summed over tokens.

    Above 0 the reference ranks the pair the wrong way. Training has ranked it right exactly when
    the DPO loss of the pair is at most ``-log sigmoid(beta * difficulty)``, which it rarely reaches
    for large values (Chen et al., "Preference Learning Algorithms Do Not Learn Preference
    Rankings", arXiv 2405.19534). To filter by it is ours.

    `model` is the reference; `options` and errors are those of `measure`.
    """
    return measure(model, pairs, **options).difficulty


@torch.no_grad()
def measure(
    model: Any,
    pairs: Sequence[TokenizedPair],
    *,
    length_normalized: bool = True,
    max_tokens: int = 4096,
    bf16: bool = False,
    impl: str = "auto",
    progress: bool = True,
) -> Measured:
    """`ches` and `difficulty` of pairs, from one forward pass over packed batches.

    Args:
        model: a transformers causal LM on its device. It is prepared for packed rows in place
            (`fastdpo.model.prepare.prepare_model`), so load one for this.
        pairs: at least one.
        length_normalized: of `ches`.
        max_tokens: tokens of a batch; a longer pair gets one of its own.
        bf16: compute in bf16 under autocast, as training does by default. Sums are fp64.
        impl: of the head, as in training.

    Raises:
        ModelError: the model computes pairs in no layout.
        DataError: there are no pairs, or one has a hidden state or log-prob that is not finite.
    """
    from tqdm import tqdm

    from fastdpo.model.prepare import layout_of, prepare_model

    if not pairs:
        raise DataError("there are no pairs to measure. Give at least one.")
    model = prepare_model(model, bf16=bf16, impl=impl).eval()
    layout, device = layout_of(model), next(model.parameters()).device
    lengths = [pair.num_tokens(layout) for pair in pairs]
    plan = plan_batches(lengths, max_tokens=max(max_tokens, *lengths), padded=layout == "padded")
    found: dict[int, tuple[float, float]] = {}
    for index in tqdm(plan, desc="measuring pairs", unit="batch", disable=not progress):
        batch = pack_pairs([pairs[i] for i in index], index, layout=layout).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            hidden_SD, logp_S = _sums(model, batch, impl)
        counts_S1 = batch.bounds_S1.diff()[:, None].to(device)
        if length_normalized:
            hidden_SD = hidden_SD / counts_S1
        chosen_PD, rejected_PD = hidden_SD[0::2], hidden_SD[1::2]
        ches_P = (chosen_PD * (rejected_PD - chosen_PD)).sum(1)
        difficulty_P = logp_S[1::2] - logp_S[0::2]
        found |= zip(index, zip(ches_P.tolist(), difficulty_P.tolist()))
    values = [found[i] for i in range(len(pairs))]
    for i, pair in enumerate(pairs):
        if not all(map(math.isfinite, values[i])):
            raise DataError(
                f"{pair.where or f'pair {i} (counting from 0)'}: the model gives it a hidden state "
                "or log-prob that is not finite. Try bf16=False, or check the model."
            )
    return Measured([value[0] for value in values], [value[1] for value in values])


def _sums(model: Any, batch: Any, impl: str) -> tuple[Tensor, Tensor]:
    """Sums over each sequence of the hidden states that predict its tokens, (S, D), and of their
    log-probs, (S,); fp64."""
    from fastdpo.loss.ops import linear_logp
    from fastdpo.model.head import packed_forward

    def both(h_TD: Tensor, w_VD: Tensor, **head: Any) -> tuple[Tensor, Tensor]:
        logp_N = linear_logp(h_TD, w_VD, batch.target_N, rows_N=batch.rows_N, impl=impl, **head)
        return h_TD[batch.rows_N], logp_N

    h_ND, logp_N = packed_forward(model, batch, both)
    sizes = batch.bounds_S1.diff().tolist()
    hidden_SD = torch.stack([part.sum(0, dtype=torch.float64) for part in h_ND.split(sizes)])
    return hidden_SD, torch.stack([part.sum(dtype=torch.float64) for part in logp_N.split(sizes)])
