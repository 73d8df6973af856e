"""Log-probabilities of responses under a model, packed as in training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.data.batch import pack_pairs, plan_batches
from fastdpo.data.examples import TokenizedPair
from fastdpo.data.records import Candidate
from fastdpo.loss.ops import linear_logp
from fastdpo.loss.reference import sequence_sums
from fastdpo.model.devices import device_of, dispatching, placed
from fastdpo.model.head import packed_forward
from fastdpo.model.load import load_causal_lm
from fastdpo.model.prepare import check_range, layout_of, prepare_model
from fastdpo.progress import parts


def load_packed(
    name: str,
    device: torch.device | str | None = None,
    dtype: Any = torch.float32,
    *,
    device_map: str | dict[str, Any] | None = None,
    option: str = "model",
) -> Any:
    """A causal language model ready for `pair_logps`; `dtype` "auto" is that of the checkpoint.

    `device` is by default the GPU if there is one. With a `device_map`, as of transformers'
    `from_pretrained`, the model may lie on several instead. `option` is what gave the name, for
    messages.

    Raises ModelError (a ValueError) when it can't be loaded, has no room on the device, or doesn't
    compute pairs exactly.
    """
    with dispatching(device_map) as options:
        model = load_causal_lm(name, dtype=dtype, option=option, **options)
    model = placed(model, device, f"{option}={name!r}")
    return prepare_model(model.requires_grad_(False)).eval()


@torch.no_grad()
def pair_logps(
    model: Any, pairs: Sequence[TokenizedPair], *, batch_size: int = 8, temperature: float = 1.0
) -> Tensor:
    """Log-probability of both responses of each pair given its prompt, summed over their tokens.

    `model` is of `load_packed`. A batch takes as many tokens as `batch_size` of the longest pairs.
    The probabilities are those at a temperature, softmax(logits / temperature).

    Returns (pairs, 2) fp64 on the CPU: chosen, rejected.

    Raises ModelError when a token or a length is beyond the model's.
    """
    layout = layout_of(model)
    sides = [p.prompt_ids + ids for p in pairs for ids in (p.chosen_ids, p.rejected_ids)]
    longest = max(map(len, sides))
    check_range(model, max(map(max, sides)), longest, "the samples'", "prompt and response")
    lengths = [pair.num_tokens(layout) for pair in pairs]
    device = device_of(model)
    budget = batch_size * max(lengths)
    logp_P2 = torch.empty(len(pairs), 2, dtype=torch.float64)

    def of_targets(
        h_TD: Tensor, w_VD: Tensor, *, scale: float, softcap: float | None, **head: Any
    ) -> Tensor:
        # (c / t) tanh((s / t) z / (c / t)) is c tanh(s z / c) / t.
        head |= {"scale": scale / temperature, "softcap": softcap and softcap / temperature}
        # The head may lie on another device than the model's inputs.
        target_N, rows_N = (x.to(h_TD.device) for x in (batch.target_N, batch.rows_N))
        return linear_logp(h_TD, w_VD, target_N, rows_N=rows_N, **head)

    for index in parts(plan_batches(lengths, max_tokens=budget, padded=layout == "padded")):
        batch = pack_pairs([pairs[i] for i in index], index, layout=layout).to(device)
        logp_N = packed_forward(model, batch, of_targets)
        logp_P2[index] = sequence_sums(logp_N.double(), batch.bounds_S1).view(-1, 2).cpu()
    return logp_P2


def response_logps(
    model: Any, rows: Sequence[Candidate], *, batch_size: int = 8, temperature: float = 1.0
) -> Tensor:
    """Log-probability of each candidate given its prompt, in nats; 0 of one without tokens.

    `model` is of `load_packed`, and `temperature` as in `pair_logps`.

    Returns (rows,) fp64 on the CPU.

    Raises ModelError when a token or a length is beyond the model's.
    """
    pairs, places = _in_pairs(rows)
    logp_R = torch.zeros(len(rows), dtype=torch.float64)
    if pairs:
        logp_P2 = pair_logps(model, pairs, batch_size=batch_size, temperature=temperature)
        for place, values_2 in zip(places, logp_P2):
            logp_R[list(place)] = values_2[: len(place)]
    return logp_R


def _in_pairs(
    rows: Sequence[Candidate],
) -> tuple[list[TokenizedPair], list[tuple[int, ...]]]:
    """Responses to the same prompt two by two, and the one or two rows of each pair."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if row.response_ids:
            by_prompt.setdefault(tuple(row.prompt_ids), []).append(i)
    pairs, places = [], []
    for prompt_ids, members in by_prompt.items():
        for start in range(0, len(members), 2):
            place = tuple(members[start : start + 2])
            first = rows[place[0]].response_ids
            # Where one is left over, a token of its own stands in for the second.
            second = rows[place[1]].response_ids if len(place) == 2 else first[:1]
            pairs.append(TokenizedPair(list(prompt_ids), first, second))
            places.append(place)
    return pairs, places
