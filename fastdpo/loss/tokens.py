"""Token-level objectives of pairs: losses that read the KL divergence at each scored token.

``k_t = KL(pi_ref(. | s_t) || pi(. | s_t))`` over the whole vocabulary, and ``K`` is its sum over a
response's scored tokens (`Examples.kl_S`).  It has a gradient, so the reference is needed as a
model, not as log-probs.

P pairs, S = 2P sequences (2i chosen, 2i+1 rejected).
"""

from dataclasses import dataclass

from torch import Tensor

from .checks import require_number
from .examples import BaseObjective, Examples
from .formulas import softplus


@dataclass(frozen=True)
class TokenObjective(BaseObjective):
    """``(1 - eps) * f(z) + eps * f(-z)`` with ``f(z) = -log sigmoid(z)`` and

    ``z = beta * (d + k_w K_w - k_l K_l) + alpha * (nw - nl) + m``, where ``d`` is the difference of
    the log-ratios of chosen and rejected, ``K_w`` and ``K_l`` their KLs, and ``kl_shares`` is
    ``(k_w, k_l)``.  `detached_chosen` adds ``K_w`` without a gradient.  ``alpha``, the margin ``m``
    and the smoothing ``eps`` are those of `objectives.Objective`.  Rewards in the metrics are beta
    times log-ratios, as DPO's, and not the authors' ``beta * (log-ratio + K)``; the KLs stand
    beside them.

    Attributes:
        kl_shares: what a unit of KL counts beside one of log-prob, in the gradient of the chosen
            and of the rejected response.  Since it is known beforehand, a row of the gradient by
            the logits is ``onehot - (1 - k) p - k p_ref`` up to a scalar of the pair.
        detached_chosen: what the chosen response's KL counts without a gradient.

    Raises:
        TypeError, ValueError: ``beta`` is not a number > 0, ``alpha`` no finite one, or a share
            not >= 0.
    """

    name: str
    beta: float = 0.1
    alpha: float = 0.0
    kl_shares: tuple[float, float] = (1.0, 1.0)
    detached_chosen: float = 0.0

    needs_kl = True
    takes_margin = True
    by_margin = True

    def __post_init__(self) -> None:
        require_number("beta", self.beta, low=0, open_low=True)
        require_number("alpha", self.alpha)

    def losses(self, x: Examples) -> Tensor:
        """The loss of each pair, (P,), with a gradient by ``x.logp_S`` and ``x.kl_S``."""
        assert x.kl_S is not None
        chosen_kl_P, rejected_kl_P = x.nth(x.kl_S, 0), x.nth(x.kl_S, 1)
        d_P = x.nth(x.ratio_S, 0) - x.nth(x.ratio_S, 1)
        d_P = d_P + self.kl_shares[0] * chosen_kl_P - self.kl_shares[1] * rejected_kl_P
        d_P = d_P + self.detached_chosen * chosen_kl_P.detach()
        z_P = self.beta * d_P + x.margin_P
        z_P = z_P + self.alpha * (x.nth(x.lengths_S, 0) - x.nth(x.lengths_S, 1))
        return (1 - x.smoothing_P) * softplus(-z_P) + x.smoothing_P * softplus(z_P)


def tdpo1(beta: float = 0.1, alpha: float = 0.0) -> TokenObjective:
    """TDPO1 (arXiv 2404.11999): ``z = beta * (d - (K_l - K_w))``, as in the authors' code.

    ``alpha`` is the length penalty per token, which the paper does not have.
    """
    return TokenObjective("tdpo1", beta, alpha)


def tdpo2(beta: float = 0.1, alpha: float = 0.0, *, tdpo_alpha: float = 0.5) -> TokenObjective:
    """TDPO2 (arXiv 2404.11999): ``z = beta * (d - tdpo_alpha * (K_l - stopgrad(K_w)))``, likewise.

    ``tdpo_alpha`` is the paper's alpha; ``alpha`` is the length penalty per token.

    Raises:
        TypeError, ValueError: ``tdpo_alpha`` is not a number >= 0.
    """
    tdpo_alpha = require_number("tdpo_alpha", tdpo_alpha, low=0)
    return TokenObjective("tdpo2", beta, alpha, (0.0, tdpo_alpha), detached_chosen=tdpo_alpha)
