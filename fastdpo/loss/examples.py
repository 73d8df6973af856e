"""What an objective sees of some examples, and what every objective says of itself.

An *example* is what one loss is made of: a pair of responses, a list of them, or a single one.  Its
sequences follow one another: of a pair the chosen and the rejected response, of a list its
responses in the order of the data.

P examples, S sequences.  All tensors are fp64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

Shape = Literal["pairs", "lists", "singles"]
Shift = Literal["kl", "mean_reward"] | None


@dataclass(frozen=True)
class Examples:
    """The numbers of P examples with S sequences.

    Attributes:
        logp_S: log-probs of each sequence under the policy, summed over its scored tokens; the
            only one with a gradient, beside ``kl_S``.
        ref_logp_S: those under the reference; zeros for an objective that needs none.
        lengths_S: scored tokens, the end token included.
        firsts: example p has the sequences ``firsts[p] : firsts[p + 1]``; P + 1 numbers.
        margin_P: the example's own offset of z; 0 where none was given.
        smoothing_P: probability that the example's label is flipped; 0 where none was given.
        scores_S: score, win probability or rank of each sequence, as the objective asks; None
            where the data have none.
        desirable_P: 1.0 for a desirable single response, 0.0 for an undesirable one.
        kl_S: KL(reference || policy) summed over the scored tokens' positions, with a gradient;
            None unless the objective ``needs_kl``.
        alignment_S: mean of ``logp - log sum p^2`` over the tokens (WPO), without a gradient; None
            unless the objective ``needs_alignment``.
        mean_chosen_length: mean length of the first sequences of all examples of the step: what
            makes a sum over tokens of an example its share of a mean over the step's tokens.
        shift: what a step's examples share: KTO's KL estimate, BCO's running mean of the rewards.
    """

    logp_S: Tensor
    ref_logp_S: Tensor
    lengths_S: Tensor
    firsts: tuple[int, ...]
    margin_P: Tensor
    smoothing_P: Tensor
    scores_S: Tensor | None = None
    desirable_P: Tensor | None = None
    kl_S: Tensor | None = None
    alignment_S: Tensor | None = None
    mean_chosen_length: float | None = None
    shift: float = 0.0

    @property
    def ratio_S(self) -> Tensor:
        """``log pi(y|x) - log pi_ref(y|x)`` of each sequence."""
        return self.logp_S - self.ref_logp_S

    @property
    def sizes(self) -> list[int]:
        """Sequences of each example."""
        return sizes_of(self.firsts)

    @cached_property
    def rows(self) -> "Rows":
        """How the examples lie one below the other."""
        return Rows(self.firsts, self.logp_S.device)

    def nth(self, x_S: Tensor, k: int) -> Tensor:
        """The numbers of sequence k of each example, (P,)."""
        return self.rows.of(x_S)[:, k]


def sizes_of(firsts: Sequence[int]) -> list[int]:
    """Sequences of each example."""
    return [stop - start for start, stop in pairwise(firsts)]


class Rows:
    """Examples as rows of L sequences, the size of the largest, without a wait for the device.

    Attributes:
        valid_PL: where an example has a sequence, from the left; None if everywhere.
    """

    def __init__(self, firsts: Sequence[int], device: torch.device) -> None:
        sizes = sizes_of(firsts)
        self.shape = len(sizes), max(sizes)
        self.valid_PL: Tensor | None = None
        if len({*sizes}) > 1:
            firsts_P1 = device_numbers(firsts, device)
            place_PL = firsts_P1[:-1, None] + torch.arange(max(sizes), device=device)
            self.valid_PL = place_PL < firsts_P1[1:, None]
            self._empty_PL = ~self.valid_PL
            self._index = place_PL.clamp_(max=firsts[-1] - 1).view(-1)

    def of(self, x_S: Tensor, fill: float = 0.0) -> Tensor:
        """Numbers of the sequences as (P, L), with ``fill`` where there is none."""
        if self.valid_PL is None:
            return x_S.view(self.shape)
        x_PL = x_S.index_select(0, self._index).view(self.shape)
        return x_PL.masked_fill(self._empty_PL, fill)


def device_numbers(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Integers on the device, without a synchronization.

    A captured CUDA graph keeps no host memory alive, so there the numbers become arguments of
    fills.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, device=device)
    if torch.cuda.is_current_stream_capturing():
        numbers_X = torch.empty(len(numbers), dtype=torch.int64, device=device)
        for i, number in enumerate(numbers):
            numbers_X[i].fill_(number)
        return numbers_X
    numbers_X = torch.tensor(numbers, device="cpu", pin_memory=True)
    return numbers_X.to(device, non_blocking=True)


class BaseObjective:
    """What every objective says of itself, and `losses`.

    Attributes:
        name: its name, for messages and tables.
        shape: which examples it takes.
        needs_reference: whether it reads ``ref_logp_S``; if not, no reference is computed.
        needs_scores: whether it reads ``scores_S``, which must then be there.
        needs_kl: whether it reads ``kl_S``, which needs the reference as a model.
        kl_shares: what a unit of KL counts beside one of log-prob in the gradient, for the
            sequences of an example in turn; None if that is not known beforehand.
        needs_alignment: whether it reads ``alignment_S``.
        couples: whether the loss of an example depends on the other examples of the step, so that
            `losses` must be given all of them.
        shift_is: what the step must give as ``shift``: the estimate of the KL from mismatched
            completions, the running mean of the rewards, or nothing.
        takes_margin: whether margin and smoothing of an example mean something.
        smoothing_below: what an example's smoothing must be less than; None for no more than 1.
        smoothing_above: what it must be more than; None for no less than 0.
        by_margin: whether a pair enters by its margin alone, so that the gradients of its tokens
            are one unknown scalar times signs known beforehand (`token_signs`).
        length_normalized: whether those signs are divided by the lengths.
        needs_prompt: whether a pair has a third sequence, the prompt's own tokens but the first
            (ORPO), whose tokens ``mean_chosen_length`` counts with the first's.
        needs_mean_length: whether it reads ``mean_chosen_length``; where that is None, it takes the
            examples at hand for all.
        code: its number in the pair kernel; None if PyTorch computes it.
        beta: what rewards in the metrics are multiplied by.
        mean_rewards: whether those are of means over the tokens, as the loss is, not of sums.
        alpha: length penalty per token.
        ld_alpha: weight of the tokens of a pair's longer side beyond the length of the shorter one
            (LD-DPO), in the sums of policy and reference; None counts all tokens alike.
    """

    name: str
    shape: Shape = "pairs"
    needs_reference: bool = True
    needs_scores: bool = False
    needs_kl: bool = False
    kl_shares: tuple[float, ...] | None = None
    needs_alignment: bool = False
    couples: bool = False
    shift_is: Shift = None
    takes_margin: bool = False
    smoothing_below: float | None = None
    smoothing_above: float | None = None
    by_margin: bool = False
    length_normalized: bool = False
    needs_prompt: bool = False
    needs_mean_length: bool = False
    code: int | None = None
    beta: float = 1.0
    mean_rewards: bool = False
    alpha: float = 0.0
    ld_alpha: float | None = None

    def problem(self, scores: Sequence[float] | None) -> str | None:
        """Why an example with these scores cannot have this loss, in words to which the caller adds
        the row; None if it can.
        """
        return None

    def losses(self, x: Examples) -> Tensor:
        """The loss of each example, (P,), differentiable by ``x.logp_S``."""
        raise NotImplementedError

    def token_signs(self, lengths_S: Any, S: int, device: torch.device) -> Tensor:
        """Coefficient of each sequence's tokens up to a scalar: a pair's if ``by_margin``, else a
        side's.  (S,) fp64; the lengths are read only where they count.
        """
        sign_S = torch.ones(S, dtype=torch.float64, device=device)
        if not self.by_margin:
            return sign_S
        sign_S[1::2] = -1.0
        return sign_S / lengths_S if self.length_normalized else sign_S
