"""What is dropped, weighed or added before a policy trains on pairs.

Plain functions of candidates and of pairs; they return new records. `PairConfig` has an option for
each, and `pair` applies them. What needs a model is measured by one:

    found = measure(model, pairs)
    kept = keep_lowest(found.ches, 0.9)
"""

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.data.batch import pack_pairs, plan_batches
from fastdpo.data.examples import TokenizedPair
from fastdpo.data.records import PairRow, Scored
from fastdpo.errors import DataError
from fastdpo.progress import advance, bar


def draw_key(seed: int, *place: int) -> str:
    """A number for a place, uniform over seeds, as hex: what sorts first is drawn first.

    It depends on nothing but the arguments, so a draw is the same whatever the order of the rows.
    """
    return hashlib.sha256("/".join(map(str, (seed, *place))).encode()).hexdigest()


# --------------------------------------------------------------------------------- responses
def drop_truncated(rows: Sequence[Scored]) -> tuple[list[Scored], dict[str, int]]:
    """The candidates that ended by themselves, and how many were cut at the token limit.

    DICE (arXiv 2406.09760) leaves cut outputs out; read in its released code, not in the paper.
    """
    kept = [row for row in rows if row.finish_reason != "length"]
    return kept, counted("truncated response", len(rows) - len(kept))


def drop_duplicates(rows: Sequence[Scored]) -> tuple[list[Scored], dict[str, int]]:
    """The candidates, of equal responses (the same tokens) to a prompt only the first.

    First is the smallest sample_index; that one keeps its score, should a noisy scorer have given
    them different ones. SimPO (arXiv 2405.14734; its released code) drops a prompt when all its
    responses are the same text; this is the same for single responses, and ours.
    """

    def response(row: Scored) -> tuple[Any, ...]:
        return row.prompt_index, tuple(row.prompt_ids), tuple(row.response_ids)

    last_first = sorted(rows, key=lambda row: row.sample_index, reverse=True)
    first = {response(row): row.sample_index for row in last_first}
    kept = [row for row in rows if first[response(row)] == row.sample_index]
    return kept, counted("duplicate response", len(rows) - len(kept))


def counted(reason: str, count: int) -> dict[str, int]:
    """How many were dropped for a reason; nothing where none was."""
    return {reason: count} if count else {}


# ----------------------------------------------------------------------------- offline pairs
def beats_fresh(
    pairs: Sequence[PairRow], fresh: Sequence[Mapping[str, float]], threshold: float = 0.0
) -> tuple[list[PairRow], dict[str, int]]:
    """The offline pairs whose chosen response scores above what the policy now gives.

    `fresh` has for each round so far the score of a fresh sample by `Prompt.key`; a pair is kept
    when ``fresh - score_chosen < threshold`` in every round that sampled its prompt, so what was
    dropped once stays out. A pair whose prompt was never sampled is kept.

    Filtered DPO (arXiv 2404.13846), as in its released code: one sample a prompt at the start of
    each epoch, threshold 0, dropped for good. A round is our epoch.

    Raises DataError when an offline pair to be compared has no score.
    """
    kept = []
    for row in pairs:
        values = [scores[row.key] for scores in fresh if row.key in scores]
        score = row.score_chosen
        if values and score is None:
            raise DataError(
                f"offline pair {row.prompt_index} has no score to compare a fresh sample with. "
                "Score the offline pairs by the scorer of the run."
            )
        if score is None or all(value - score < threshold for value in values):
            kept.append(row)
    return kept, counted("offline: a fresh sample scores as high", len(pairs) - len(kept))


def replay(
    pairs: Sequence[PairRow], offline: Sequence[PairRow], share: float, seed: int
) -> tuple[list[PairRow], dict[str, int]]:
    """Offline pairs to train on beside the sampled ones, and how many could not be used.

    ``floor(share * n / (1 - share))`` for `n` sampled pairs, so that `share` of all is offline,
    drawn by `seed` without replacement from those whose prompt (`Prompt.key`) none of `pairs` has;
    in the order of `offline`. Where there are fewer, all of them, with a warning.

    Replay of DICE (arXiv 2406.09760) as in its released code, share 1/2 there; the code takes fewer
    sampled pairs where offline ones run short, which this does not.
    """
    sampled = {row.key for row in pairs}
    free = [row for row in offline if row.key not in sampled]
    wanted = floor_of(share * len(pairs) / (1 - share))
    if len(free) < wanted:
        warnings.warn(
            f"a replay share of {share:g} takes {wanted} offline pairs, there are {len(free)} of "
            "prompts without a sampled pair; all of them are used. Give more offline pairs, or "
            "lower replay_share.",
            stacklevel=2,
        )
    order = sorted(range(len(free)), key=lambda i: draw_key(seed, free[i].prompt_index, i))
    drawn = sorted(order[:wanted])
    dropped = counted("offline: prompt has a sampled pair", len(offline) - len(free))
    return [free[i] for i in drawn], dropped


# --------------------------------------------------------------------------- weights of pairs
def equal_prompts(pairs: Sequence[PairRow]) -> list[PairRow]:
    """The pairs with ``weight = 1 / (pairs of the prompt)``: every prompt weighs the same.

    InstructGPT (arXiv 2203.02155, equation 1) divides the loss of a prompt's comparisons by their
    number; there for a reward model.
    """
    places = [(row.source, row.prompt_index) for row in pairs]
    counts = Counter(places)
    return [replace(row, weight=1 / counts[place]) for row, place in zip(pairs, places)]


def keep_lowest(values: Sequence[float], share: float) -> list[int]:
    """Which entries belong to the lowest `share` of all, in order; at least one, equal ones by
    their order.
    """
    count = math.ceil(share * len(values) - 1e-9)  # 0.07 * 100 is rounded to more than 7
    return sorted(sorted(range(len(values)), key=lambda i: (values[i], i))[:count])


def floor_of(value: float) -> int:
    """The integer below a product, whatever its rounding."""
    return math.floor(value + 1e-9)  # 0.29 * 100 is rounded to less than 29


# ----------------------------------------------------------------------- pairs under a model
@dataclass(frozen=True)
class Measured:
    """What `measure` found, an entry for each pair.

    Attributes:
        ches: centered hidden embedding similarity, high values displace likelihood:
            ``<H_w, H_l> - |H_w|^2``, where ``H`` sums the final hidden states (what the head reads)
            that predict the tokens of a response, from the prompt's last token to the response's
            last but one, over their number. Razin et al. (arXiv 2410.08847), definition 3 in
            appendix A; read in the released code and in notes on the paper, not in the paper. To
            filter, the paper keeps the 5% of lowest values (section 6.3), of pairs for refusals.
            The released code sums over padding where a batch has any; here there is none.
        difficulty: ``log pi_ref(rejected) - log pi_ref(chosen)``, in nats, summed over tokens.
            Above 0 the reference ranks the pair the wrong way. Training has ranked it right exactly
            when the DPO loss of the pair is at most ``-log sigmoid(beta * difficulty)``, which it
            rarely reaches for large values (Chen et al., "Preference Learning Algorithms Do Not
            Learn Preference Rankings", arXiv 2405.19534). To filter by it is ours.
    """

    ches: list[float]
    difficulty: list[float]


@torch.no_grad()
def measure(
    model: Any,
    pairs: Sequence[TokenizedPair],
    *,
    max_tokens: int = 4096,
    bf16: bool = False,
    impl: str = "auto",
    progress: bool = True,
) -> Measured:
    """CHES and difficulty of pairs, from one forward pass over packed batches.

    Args:
        model: the reference, a transformers causal LM on its device. It is prepared for packed rows
            in place (`fastdpo.model.prepare.prepare_model`), so load one for this.
        pairs: at least one.
        max_tokens: tokens of a batch; a longer pair gets one of its own.
        bf16: compute in bf16 under autocast, as training does by default. Sums are fp64.
        impl: of the head, as in training.

    Raises:
        ModelError: the model computes pairs in no layout.
        DataError: there are no pairs, or one has a hidden state or log-prob that is not finite.
    """
    from fastdpo.model.devices import device_of
    from fastdpo.model.prepare import layout_of, prepare_model

    if not pairs:
        raise DataError("there are no pairs to measure. Give at least one.")
    model = prepare_model(model, bf16=bf16, impl=impl).eval()
    layout, device = layout_of(model), device_of(model)
    lengths = [pair.num_tokens(layout) for pair in pairs]
    plan = plan_batches(lengths, max_tokens=max(max_tokens, *lengths), padded=layout == "padded")
    found_P2 = torch.empty(len(pairs), 2, dtype=torch.float64)
    with bar("measuring pairs", len(pairs), "pair", shown=progress):
        for index in plan:
            batch = pack_pairs([pairs[i] for i in index], index, layout=layout).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
                hidden_SD, logp_S = _by_sequence(model, batch, impl)
            chosen_PD, rejected_PD = hidden_SD[0::2], hidden_SD[1::2]
            ches_P = (chosen_PD * (rejected_PD - chosen_PD)).sum(1)
            found_P2[index] = torch.stack([ches_P, logp_S[1::2] - logp_S[0::2]], 1).cpu()
            advance(len(index))
    for i, finite in enumerate(found_P2.isfinite().all(1).tolist()):
        if not finite:
            raise DataError(
                f"{pairs[i].where or f'pair {i} (counting from 0)'}: the model gives it a hidden "
                "state or log-prob that is not finite. Try bf16=False, or check the model."
            )
    return Measured(*found_P2.T.tolist())


def _by_sequence(model: Any, batch: Any, impl: str) -> tuple[Tensor, Tensor]:
    """The mean over each sequence of the hidden states that predict its tokens, (S, D), and the
    sum of their log-probs, (S,); fp64."""
    from fastdpo.loss.ops import linear_logp
    from fastdpo.loss.reference import sequence_sums
    from fastdpo.model.head import packed_forward

    def both(h_TD: Tensor, w_VD: Tensor, **head: Any) -> tuple[Tensor, Tensor]:
        logp_N = linear_logp(h_TD, w_VD, batch.target_N, rows_N=batch.rows_N, impl=impl, **head)
        return h_TD[batch.rows_N], logp_N

    h_ND, logp_N = packed_forward(model, batch, both)
    parts = h_ND.split(batch.bounds_S1.diff().tolist())
    hidden_SD = torch.stack([part.mean(0, dtype=torch.float64) for part in parts])
    return hidden_SD, sequence_sums(logp_N.double(), batch.bounds_S1)
