"""Objectives on lists: some responses to one prompt, with a score each.

A list objective looks at rewards ``r_i = beta * log(pi(y_i|x) / pi_ref(y_i|x)) + alpha * |y_i|``
and at scores, of which the larger is the better.  ``alpha`` is the length penalty per token of
`fastdpo.loss.objectives`, not multiplied by ``beta``; it acts as there, because only differences of
rewards enter.  `pro` has no reference and no rewards.

Lists of one call may differ in length; they are laid out as rows of L, the length of the longest.
A list of two is a pair: `ranknet` and `plackett_luce` are then DPO's loss, and `lipo_lambda` is
DPO's times a weight.

TPO (arXiv 2410.12854) ranks its lists as `lipo_lambda` does.  The weights that it gives to steps
are not here: the paper's equation could not be read, and its released code lowers the loss as the
ranking worsens.

P lists, S sequences, L responses of the longest list.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .checks import require_number
from .examples import BaseObjective, Examples, Shape
from .objectives import SIGMOID


class ListGrid(NamedTuple):
    """Some lists as rows of L responses.

    Attributes:
        valid_PL: where a list has a response.
        score_PL: the responses' scores; 0 where there are none.
        reward_PL: their rewards r; 0 where there are none.
        logp_PL: their log-probs under the policy; 0 where there are none.
        length_PL: their lengths; 1 where there are none.
    """

    valid_PL: Tensor
    score_PL: Tensor
    reward_PL: Tensor
    logp_PL: Tensor
    length_PL: Tensor

    @property
    def better_PLL(self) -> Tensor:
        """[p, i, j]: response i of list p has a larger score than response j."""
        return self._pairs_PLL & (self.score_PL[:, :, None] > self.score_PL[:, None, :])

    @property
    def tied_PLL(self) -> Tensor:
        """[p, i, j]: responses i < j of list p have the same score."""
        tied_PLL = self._pairs_PLL & (self.score_PL[:, :, None] == self.score_PL[:, None, :])
        return tied_PLL.triu(1)

    @property
    def _pairs_PLL(self) -> Tensor:
        return self.valid_PL[:, :, None] & self.valid_PL[:, None, :]

    @property
    def gap_PLL(self) -> Tensor:
        """[p, i, j]: r_i - r_j."""
        return self.reward_PL[:, :, None] - self.reward_PL[:, None, :]

    def ranked(self, by_PL: Tensor) -> Tensor:
        """Positions in descending order of ``by_PL``, those of the list before the empty ones;
        of equals the first in the data comes first.  (P, L)
        """
        by_PL = by_PL.masked_fill(~self.valid_PL, -torch.inf)
        return by_PL.argsort(dim=1, descending=True, stable=True)

    def take(self, order_PL: Tensor) -> "ListGrid":
        """The same lists with their responses in an order that `ranked` gave."""
        return ListGrid(self.valid_PL, *(field.gather(1, order_PL) for field in self[1:]))


@dataclass(frozen=True)
class ListObjective(BaseObjective):
    """A loss of lists: ``f`` of their `ListGrid`, (P,).

    Attributes:
        needs_ranks: whether scores must rank the list, without ties.
        by_order: whether scores enter by their order alone.
        max_score: the largest score whose gain is of use.
    """

    name: str
    f: Callable[[ListGrid], Tensor]
    beta: float = 1.0
    alpha: float = 0.0
    needs_reference: bool = True
    needs_ranks: bool = False
    by_order: bool = False
    max_score: float = math.inf
    needs_scores: bool = True
    shape: ClassVar[Shape] = "lists"

    def __post_init__(self) -> None:
        require_number("beta", self.beta, low=0, open_low=True)
        require_number("alpha", self.alpha)

    def problem(self, scores: Sequence[float] | None) -> str | None:
        """What is wrong with a list of these scores, or None."""
        if scores is None:
            return f"{self.name} needs a score for each response of the list"
        if len(scores) < 2:
            return f"{self.name} needs a list of at least 2 responses, got {len(scores)}"
        if self.needs_ranks and len(set(scores)) < len(scores):
            twice = sorted({score for score in scores if list(scores).count(score) > 1})
            return (
                f"{self.name} needs scores without ties, got the score {twice[0]:g} more than "
                "once: break the ties, drop such lists, or use lipo_lambda, which does not compare "
                "tied ones"
            )
        if max(scores) > self.max_score:
            return (
                f"{self.name} has gains of 2^score - 1 and needs scores of at most "
                f"{self.max_score:g}, got {max(scores):g}: scale them, as to [0, 1]"
            )
        return None

    def losses(self, x: Examples) -> Tensor:
        """The loss of each list, (P,).

        Raises:
            ValueError: a list cannot have this loss, as `problem` says; its place is named.  Scores
                on a device are looked at by an assert there.
        """
        if x.scores_S is None:
            raise ValueError(str(self.problem(None)))
        sizes, seen = x.sizes, range(len(x.firsts) - 1)
        if on_device := x.scores_S.device.type != "cpu":
            shortest = sizes.index(min(sizes))  # only sizes are seen there
            seen, values = [shortest], range(-x.firsts[-1], 0)
        else:
            values = x.scores_S.tolist()
        for p in seen:
            problem = self.problem(values[x.firsts[p] : x.firsts[p + 1]])
            if problem is not None:
                raise ValueError(f"list {p}: {problem}")
        grid = _grid(x, self.beta, self.alpha)
        if on_device and self.needs_ranks:
            message = f"{self.name} needs scores without ties"
            torch.ops.aten._assert_async.msg(~grid.tied_PLL.any(), message)
        elif on_device and self.max_score < math.inf:
            message = f"{self.name} needs scores of at most {self.max_score:g}"
            torch.ops.aten._assert_async.msg(x.scores_S.amax() <= self.max_score, message)
        return self.f(grid)


def _grid(x: Examples, beta: float, alpha: float) -> ListGrid:
    """Lists one below the other, filled up on the right."""
    rows, reward_S = x.rows, beta * x.ratio_S
    if alpha:
        reward_S = reward_S + alpha * x.lengths_S
    valid_PL = rows.valid_PL
    if valid_PL is None:
        valid_PL = torch.ones(rows.shape, dtype=torch.bool, device=reward_S.device)
    assert x.scores_S is not None
    return ListGrid(
        valid_PL, rows.of(x.scores_S), rows.of(reward_S), rows.of(x.logp_S),
        rows.of(x.lengths_S, 1.0),
    )  # fmt: skip


def _sum_of(what_PLL: Tensor, where_PLL: Tensor) -> Tensor:
    """Sum of those of a list's pairs, (P,)."""
    return what_PLL.masked_fill(~where_PLL, 0.0).sum((1, 2))


_softplus_of_minus = SIGMOID.f


# ---------------------------------------------------------------------------------------- formulas
def _lipo_lambda(grid: ListGrid) -> Tensor:
    with torch.no_grad():
        by_score_PL = grid.ranked(grid.score_PL)
        reward_PL = grid.reward_PL.gather(1, by_score_PL)
        by_reward_PL = by_score_PL.gather(1, grid.ranked(reward_PL))
        place_PL = torch.ones_like(reward_PL).cumsum(1)
        tau_PL = torch.empty_like(reward_PL).scatter_(1, by_reward_PL, place_PL)
        gain_PL = grid.score_PL.exp2()
        discount_PL = 1 / torch.log1p(tau_PL)
        gain_PLL = (gain_PL[:, :, None] - gain_PL[:, None, :]).abs()
        weight_PLL = gain_PLL * (discount_PL[:, :, None] - discount_PL[:, None, :]).abs()
    return _sum_of(weight_PLL * _softplus_of_minus(grid.gap_PLL), grid.better_PLL)


def sum_over_better(grid: ListGrid) -> Tensor:
    """DPO's loss of each pair of a list whose scores differ, summed; (P,)."""
    return _sum_of(_softplus_of_minus(grid.gap_PLL), grid.better_PLL)


def _ranknet(grid: ListGrid) -> Tensor:
    losses_PLL = _softplus_of_minus(grid.gap_PLL)
    even_PLL = 0.5 * (losses_PLL + losses_PLL.transpose(1, 2))
    return _sum_of(losses_PLL, grid.better_PLL) + _sum_of(even_PLL, grid.tied_PLL)


def _skip_ranknet(grid: ListGrid, *, max_skip: int) -> Tensor:
    ranked = grid.take(grid.ranked(grid.score_PL))
    near_PLL = ranked.better_PLL.tril(max_skip)
    return _sum_of(_softplus_of_minus(ranked.gap_PLL), near_PLL)


def _plackett_luce(grid: ListGrid) -> Tensor:
    reward_PL = grid.reward_PL.gather(1, grid.ranked(grid.score_PL))
    return (_log_sums_of_rest(reward_PL[:, None, :], grid.valid_PL) - reward_PL).sum(1)


def _pro(grid: ListGrid, *, pro_sft_weight: float) -> Tensor:
    ranked = grid.take(grid.ranked(grid.score_PL))
    sizes_P = ranked.valid_PL.sum(1)
    p_PL = ranked.logp_PL / ranked.length_PL
    last_P1 = ranked.score_PL.gather(1, sizes_P[:, None] - 1)
    own_PL = (ranked.score_PL - last_P1).masked_fill(~ranked.valid_PL, 0.0)
    gap_PLL = ranked.score_PL[:, :, None] - ranked.score_PL[:, None, :]
    gap_PLL = gap_PLL + torch.diag_embed(own_PL)
    sums_PL = _log_sums_of_rest(p_PL[:, None, :] * gap_PLL, ranked.valid_PL)
    ranking_P = (sums_PL - p_PL * own_PL).sum(1)
    return ranking_P - pro_sft_weight * (ranked.logp_PL[:, 0] * (sizes_P - 1).square())


def _log_sums_of_rest(what_PLL: Tensor, valid_PL: Tensor) -> Tensor:
    """[p, k]: log of the sum of ``exp(what[p, k, j])`` over the responses j >= k of list p; 0 where
    the list has no response k.
    """
    L = valid_PL.shape[1]
    rest_LL = torch.ones(L, L, dtype=torch.bool, device=valid_PL.device).triu()
    among_PLL = torch.where(valid_PL[:, :, None], rest_LL & valid_PL[:, None, :], rest_LL)
    sums_PL = what_PLL.expand_as(among_PLL).masked_fill(~among_PLL, -torch.inf).logsumexp(2)
    return sums_PL.masked_fill(~valid_PL, 0.0)


# -------------------------------------------------------------------------------------- objectives
def lipo_lambda(beta: float = 0.1, alpha: float = 0.0) -> ListObjective:
    """LiPO-lambda (arXiv 2402.01878): each pair of a list, weighted by what a swap does to DCG.

        sum over psi_i > psi_j of  |2^psi_i - 2^psi_j| * |1/log(1 + tau_i) - 1/log(1 + tau_j)|
                                   * log(1 + exp(-(r_i - r_j)))

    with the scores psi and the rank tau that the policy's rewards give, 1 for the largest; the
    weight has no gradient.  Tied scores are not compared.  Tied rewards, which all are where the
    policy is its reference, rank as their scores do: the order that any step will give them.
    """
    return ListObjective("lipo_lambda", _lipo_lambda, beta, alpha, max_score=20.0)


def ranknet(beta: float = 0.1, alpha: float = 0.0) -> ListObjective:
    """RankNet (Burges et al. 2005) on rewards: DPO's loss summed over all pairs of a list.

    ``sum over psi_i > psi_j of log(1 + exp(-(r_i - r_j)))``, and for tied scores the cross-entropy
    with a target of 1/2, which draws their rewards together.
    """
    return ListObjective("ranknet", _ranknet, beta, alpha, by_order=True)


def skip_ranknet(beta: float = 0.1, alpha: float = 0.0, max_skip: int = 1) -> ListObjective:
    """RankNet on responses that are at most ``max_skip`` places apart in the order of the scores.

    1 compares neighbours, the size of the list less 1 all pairs.  The idea of skip-wise comparisons
    is RankList's (arXiv 2508.09826); its formula could not be read, so this is not it by name.

    Raises:
        TypeError, ValueError: ``max_skip`` is not an integer >= 1.
    """
    if isinstance(max_skip, bool) or not isinstance(max_skip, int):
        raise TypeError(f"max_skip must be an integer, got {type(max_skip).__name__}")
    if max_skip < 1:
        raise ValueError(f"max_skip must be >= 1, got {max_skip}")
    return ListObjective(
        "skip_ranknet", partial(_skip_ranknet, max_skip=max_skip), beta, alpha,
        needs_ranks=True, by_order=True,
    )  # fmt: skip


def plackett_luce(beta: float = 0.1, alpha: float = 0.0) -> ListObjective:
    """DPO under the Plackett-Luce model of rankings (arXiv 2305.18290, appendix A.3).

    ``- sum over k < n of log(exp(r_k) / sum over j >= k of exp(r_j))``, with the responses in the
    order of their scores.
    """
    options = {"needs_ranks": True, "by_order": True}
    return ListObjective("plackett_luce", _plackett_luce, beta, alpha, **options)


def pro(beta: float = 0.1, pro_sft_weight: float = 0.05) -> ListObjective:
    """PRO, preference ranking optimization (arXiv 2306.17492), as its released code has it.

    With p the mean log-prob of a response's tokens, and the n responses in the order of their
    scores psi:

        - sum over k < n of log(exp(p_k T_kk) / (exp(p_k T_kk) + sum over i > k of exp(p_i T_ki)))
        - pro_sft_weight * (n - 1)^2 * log pi(y_1|x)

    where ``T_ki = psi_k - psi_i`` and T_kk is the largest of them.  There is no reference; ``beta``
    is of the rewards in the metrics alone.

    Raises:
        TypeError, ValueError: ``pro_sft_weight`` is no number >= 0.
    """
    require_number("pro_sft_weight", pro_sft_weight, low=0)
    loss = partial(_pro, pro_sft_weight=pro_sft_weight)
    return ListObjective("pro", loss, beta, needs_reference=False, needs_ranks=True)
