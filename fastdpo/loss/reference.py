"""The plain PyTorch meaning of every op, in any float dtype: the oracle of the tests.

Nothing here is fast or small: logits are materialized, and every function computes in the dtype it
is given.  Promote rounded inputs to float64 first to get the value an op should have had.

Legend: N scored tokens, T hidden rows, D hidden size, V vocabulary, P pairs, S = 2P sequences
(2i chosen, 2i+1 rejected).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def linear_logits(
    h_TD: Tensor,
    w_VD: Tensor,
    *,
    rows_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """``softcap * tanh(scale * (h @ w.T + bias) / softcap)`` for the selected rows, (N, V)."""
    h_ND = h_TD if rows_N is None else h_TD[rows_N]
    z_NV = scale * F.linear(h_ND, w_VD, bias_V)
    return z_NV if softcap is None else softcap * torch.tanh(z_NV / softcap)


def linear_logp(h_TD: Tensor, w_VD: Tensor, target_N: Tensor, **head: Any) -> Tensor:
    """Log-probability of each target, (N,); zero where the target is -100.

    ``head`` has the keyword arguments of `linear_logits`.
    """
    z_NV = linear_logits(h_TD, w_VD, **head)
    scored_N = target_N != IGNORE
    index_N1 = torch.where(scored_N, target_N, 0)[:, None]
    logp_N = torch.log_softmax(z_NV, -1).gather(1, index_N1)[:, 0]
    return torch.where(scored_N, logp_N, torch.zeros_like(logp_N))


def token_stats(
    z_NV: Tensor, target_N: Tensor, ref_z_NV: Tensor | None = None
) -> dict[str, Tensor]:
    """Per-token statistics of the logits, each (N,); zero where the target is -100.

    ``entropy`` -sum p log p, ``mean_logit`` mean of z, ``top1`` 1 where the target's logit is the
    largest, ``log_sum_sq_probs`` log sum p^2; with reference logits ``kl_ref``, KL(ref || policy).
    """
    logp_NV = torch.log_softmax(z_NV, -1)
    p_NV = logp_NV.exp()
    scored_N = target_N != IGNORE
    target_z_N = z_NV.gather(1, torch.where(scored_N, target_N, 0)[:, None])[:, 0]
    stats = {
        "entropy": -(p_NV * logp_NV).sum(-1),
        "mean_logit": z_NV.mean(-1),
        "top1": (target_z_N >= z_NV.amax(-1)).to(z_NV.dtype),
        "log_sum_sq_probs": p_NV.square().sum(-1).log(),
    }
    if ref_z_NV is not None:
        ref_logp_NV = torch.log_softmax(ref_z_NV, -1)
        stats["kl_ref"] = (ref_logp_NV.exp() * (ref_logp_NV - logp_NV)).sum(-1)
    return {name: torch.where(scored_N, x, torch.zeros_like(x)) for name, x in stats.items()}


def linear_kl(
    h_TD: Tensor,
    w_VD: Tensor,
    ref_h_TD: Tensor,
    ref_w_VD: Tensor,
    *,
    bias_V: Tensor | None = None,
    ref_bias_V: Tensor | None = None,
    **head: Any,
) -> Tensor:
    """KL(reference || policy) of the next token at each selected row, (N,).

    ``head`` has the other keyword arguments of `linear_logits`, the same for both.
    """
    z_NV = linear_logits(h_TD, w_VD, bias_V=bias_V, **head)
    ref_z_NV = linear_logits(ref_h_TD, ref_w_VD, bias_V=ref_bias_V, **head)
    logp_NV, ref_logp_NV = z_NV.log_softmax(-1), ref_z_NV.log_softmax(-1)
    return F.kl_div(logp_NV, ref_logp_NV, reduction="none", log_target=True).sum(-1)


def sequence_sums(x_N: Tensor, bounds_S1: Tensor) -> Tensor:
    """Sum of ``x_N`` over each sequence ``bounds[s] : bounds[s + 1]``, (S,)."""
    return torch.stack([part.sum() for part in x_N.split(bounds_S1.diff().tolist())])


def dpo_loss(
    logp_S: Tensor,
    ref_logp_S: Tensor,
    lengths_S: Tensor,
    beta: float = 0.1,
    alpha: float = 0.0,
    margin_P: Tensor | float = 0.0,
    smoothing_P: Tensor | float = 0.0,
) -> Tensor:
    """Length-regularized DPO loss of each pair, (P,).  R-DPO (arXiv 2403.19159), equation 9.

    ``z = beta * ((lw - lw') - (ll - ll')) + alpha * (nw - nl) + margin`` and
    ``loss = -(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)``.
    """
    ratio_S = logp_S - ref_logp_S
    lengths_S = lengths_S.to(ratio_S.dtype)
    z_P = beta * (ratio_S[0::2] - ratio_S[1::2]) + alpha * (lengths_S[0::2] - lengths_S[1::2])
    z_P = z_P + margin_P
    return -(1 - smoothing_P) * F.logsigmoid(z_P) - smoothing_P * F.logsigmoid(-z_P)


def linear_dpo_loss(
    h_TD: Tensor,
    w_VD: Tensor,
    target_N: Tensor,
    bounds_S1: Tensor,
    ref_logp_S: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.0,
    **head: Any,
) -> Tensor:
    """Mean length-regularized DPO loss of a packed batch, from materialized logits.

    ``head`` has the keyword arguments of `linear_logits`.
    """
    logp_N = linear_logp(h_TD, w_VD, target_N, **head)
    lengths_S = sequence_sums((target_N != IGNORE).to(logp_N.dtype), bounds_S1)
    logp_S = sequence_sums(logp_N, bounds_S1)
    return dpo_loss(logp_S, ref_logp_S.to(logp_S.dtype), lengths_S, beta, alpha).mean()
