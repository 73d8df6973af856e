"""The differentiable ops: from hidden states to log-probs and preference losses without logits.

`linear_logp` is the head's projection, log-softmax and gather in one op.  `linear_preference_loss`
adds the sums over sequences, the reference and the objective, and knows that a pair's gradient is
one scalar times something known beforehand, which saves a matrix product (see `plan`).
`linear_dpo_loss` is that with the length-regularized DPO objective, and `module.LinearDPOLoss` its
module.  Here are the signatures; `eager` runs them, and under torch.compile `compiled`.

Legend: T hidden rows, N scored tokens, D hidden size, V vocabulary, P examples, S sequences; of
pairs 2i is the chosen and 2i+1 the rejected one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, eager, spread
from .call import ExampleInputs, HeadInputs
from .examples import BaseObjective
from .objectives import lr_dpo
from .result import PreferenceLoss


def linear_logp(
    h_TD: Tensor,
    w_VD: Tensor,
    target_N: Tensor,
    *,
    rows_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    workspace_mib: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each target under the head, with any upstream gradient.

    ``logp[i] = log_softmax(z)[target[i]]``, ``z = softcap * tanh(scale * (h[rows[i]] @ w.T + bias)
    / softcap)``, in fp32 with unrounded logits and no (N, V) tensor beyond the workspace.
    fp32 products on a GPU are as exact as ``torch.set_float32_matmul_precision`` lets them be.

    Args:
        h_TD: hidden states, (T, D), fp16, bf16, fp32 or fp64.
        w_VD: weight of the head, (V, D), same dtype.
        target_N: token ids, (N,) int64; -100 gives a zero and no gradient.
        rows_N: hidden row that predicts each target, (N,) int64; default: row i predicts target i.
            Repeats are allowed, their gradients are summed in fp32 in a fixed order.
        bias_V: bias of the head, (V,).
        scale: factor on the logits (Cohere, Granite).
        softcap: soft cap on the logits (Gemma 2), in logits.
        workspace_mib: bound on tiles and stash in MiB; default 256, on a GPU 1/32 of its memory if
            that is more.  A result's ``plan`` says what it was.  Where the kernels fold tiles
            (before Hopper, fp32) the last bits depend on it.
        impl: "auto", "triton" or "torch".

    Returns:
        (N,) fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
    """
    h_TD, w_VD, bias_V = autocast(h_TD, w_VD, bias_V)
    given = HeadInputs(h_TD, w_VD, bias_V, target_N, rows_N, scale, softcap, workspace_mib, impl)
    return _route().logp(given)


def linear_kl(
    h_TD: Tensor,
    w_VD: Tensor,
    ref_h_TD: Tensor,
    ref_w_VD: Tensor,
    *,
    rows_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    ref_bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    workspace_mib: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """KL(reference || policy) of the next token at each row, with any upstream gradient.

    Both heads are streamed together, so neither's logits are kept.  The gradient is the policy's;
    the reference gets none.  It takes one product a head in the forward, and in the backward one a
    head again and one for each gradient.  Under torch.compile it breaks the graph.

    Args:
        h_TD, w_VD, bias_V: the policy's hidden states and head, as in `linear_logp`.
        ref_h_TD, ref_w_VD, ref_bias_V: the reference's, for the same tokens; the hidden size may
            differ.
        rows_N: hidden rows to compare, (N,) int64; default: all, in order.
        scale, softcap, workspace_mib, impl: as in `linear_logp`.

    Returns:
        (N,) fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
    """
    tensors = h_TD, w_VD, bias_V, ref_h_TD, ref_w_VD, ref_bias_V
    h_TD, w_VD, bias_V, *ref = autocast(*tensors)
    given = HeadInputs(
        h_TD, w_VD, bias_V, None, rows_N, scale, softcap, workspace_mib, impl, (), *ref
    )
    return _route().kl(given)


def linear_logp_kl(
    h_TD: Tensor,
    w_VD: Tensor,
    target_N: Tensor,
    ref_h_TD: Tensor,
    ref_w_VD: Tensor,
    *,
    rows_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    ref_bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    workspace_mib: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_logp` of policy and reference and `linear_kl`, in one pass over both heads.

    It takes as many products as `linear_kl` alone: two in the forward, and in the backward, which
    knows both upstream gradients, two again and one for each gradient.  Under torch.compile it
    breaks the graph.

    Args:
        h_TD, w_VD, target_N, rows_N, bias_V, scale, softcap, workspace_mib, impl: as in
            `linear_logp`.
        ref_h_TD, ref_w_VD, ref_bias_V: as in `linear_kl`.

    Returns:
        Log-prob of each target under the policy, KL(reference || policy) at its position, and its
        log-prob under the reference, each (N,) fp32 (fp64 for fp64 inputs); zeros where the target
        is -100.  The first two have a gradient, the policy's.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
    """
    tensors = h_TD, w_VD, bias_V, ref_h_TD, ref_w_VD, ref_bias_V
    h_TD, w_VD, bias_V, *ref = autocast(*tensors)
    given = HeadInputs(
        h_TD, w_VD, bias_V, target_N, rows_N, scale, softcap, workspace_mib, impl, (), *ref
    )
    return _route().logp_kl(given)


def linear_preference_loss(
    h_TD: Tensor,
    w_VD: Tensor,
    target_N: Tensor,
    bounds_S1: Tensor,
    ref_logp_S: Tensor | None,
    objective: BaseObjective | Callable[..., Tensor],
    *,
    firsts_P1: Sequence[int] | None = None,
    rows_N: Tensor | None = None,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ref_h_TD: Tensor | None = None,
    ref_w_VD: Tensor | None = None,
    ref_bias_V: Tensor | None = None,
    margin_P: Tensor | None = None,
    smoothing_P: Tensor | None = None,
    weight_P: Tensor | None = None,
    scores_S: Tensor | None = None,
    desirable_P: Tensor | None = None,
    mean_chosen_length: float | None = None,
    shift: float = 0.0,
    num_pairs: float | None = None,
    stats: tuple[str, ...] = (),
    workspace_mib: float | None = None,
    impl: str = "auto",
    group: Any = None,
) -> PreferenceLoss:
    """A preference loss of packed pairs, lists or single responses, without logits.

    Args:
        h_TD, w_VD, target_N, rows_N, bias_V, scale, softcap, workspace_mib, impl: as in
            `linear_logp`.
        bounds_S1: cumulative bounds of the sequences in ``target_N``, (S + 1,) int64 on the CPU;
            of pairs they alternate chosen, rejected.
        ref_logp_S: summed log-probs under the reference, (S,) fp32 or fp64; the policy's sums are
            taken in the same precision.  None with ``ref_h_TD``, and where the objective needs no
            reference.  For an objective with ``ld_alpha`` the caller weighs their tokens alike.
        objective: one of `fastdpo.objectives`, or a function of the six numbers of a pair there.
        firsts_P1: P + 1 integers: example p has the sequences ``firsts[p] : firsts[p + 1]``, so
            that the last one is S; default: pairs, or single responses if the objective takes
            those.  A pair may have a third sequence, if its objective reads one.
        ref_h_TD, ref_w_VD, ref_bias_V: the reference's hidden rows and head instead of its sums;
            same rows, scale and softcap as the policy.
        margin_P: added to z, (P,).  Only margin objectives.
        smoothing_P: probability in [0, 1] that a pair's label is flipped, (P,).  Likewise.
        weight_P: factor >= 0 on each example's loss, (P,).
        scores_S: score, win probability or rank of each sequence, as the objective asks, (S,).
        desirable_P: 1.0 for a desirable single response and 0.0 for an undesirable one, (P,).
        mean_chosen_length: mean length of the first sequences of all examples that ``num_pairs``
            counts, in tokens; default: of this call's.
        shift: what an objective of single responses compares them with, such as KTO's estimate of
            the KL.
        num_pairs: what the summed loss is divided by; default: the examples of this call.  A
            trainer that accumulates passes the examples of the whole optimizer step.
        stats: per-token statistics to return, of "logp", "entropy", "mean_logit", "top1",
            "log_sum_sq_probs" and, with ``ref_h_TD``, "kl_ref" (KL(reference || policy)).
        group: torch.distributed's process group that has the tokens of the sequences among its
            processes (sequence parallel, see `spread`).  Rows, targets, bounds and statistics are
            this process's own.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
    """
    tensors = h_TD, w_VD, bias_V, ref_h_TD, ref_w_VD, ref_bias_V
    h_TD, w_VD, bias_V, *ref = autocast(*tensors)
    given = HeadInputs(
        h_TD, w_VD, bias_V, target_N, rows_N, scale, softcap, workspace_mib, impl, stats, *ref
    )
    inputs = ExampleInputs(
        bounds_S1, ref_logp_S, margin_P, smoothing_P, weight_P, num_pairs, firsts_P1, scores_S,
        desirable_P, mean_chosen_length, shift,
    )  # fmt: skip
    if group is not None:
        return _route().outside(spread.preference)(given, inputs, objective, group)
    return _route().preference(given, inputs, objective)


def linear_dpo_loss(
    h_TD: Tensor,
    w_VD: Tensor,
    target_N: Tensor,
    bounds_S1: Tensor,
    ref_logp_S: Tensor | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.0,
    **options: Any,
) -> PreferenceLoss:
    """Length-regularized DPO (arXiv 2406.11817) of packed pairs, without logits.

    ``z = beta * ((lw - lw') - (ll - ll')) + alpha * (nw - nl)``, ``loss = -log sigmoid(z)``, mean
    over pairs; ``lw`` and ``ll`` are summed log-probs of chosen and rejected, a prime marks the
    reference, ``nw`` and ``nl`` count scored tokens.

    Args:
        beta: strength of the KL penalty, > 0.
        alpha: length penalty per token, not multiplied by ``beta``; 0 is plain DPO.
        options: the keyword arguments of `linear_preference_loss`.
    """
    if not torch.compiler.is_compiling():
        beta = checks.require_number("beta", beta, low=0, open_low=True)
        alpha = checks.require_number("alpha", alpha)
        check_options("linear_dpo_loss", options)
    return linear_preference_loss(
        h_TD, w_VD, target_N, bounds_S1, ref_logp_S, lr_dpo(beta, alpha), **options
    )


def _route() -> Any:
    """The module that runs the ops."""
    if not torch.compiler.is_compiling():
        return eager
    from . import compiled  # whose nodes are registered only where they are used

    return compiled


def check_options(owner: str, options: dict[str, Any]) -> None:
    """Refuse what is no keyword argument of `linear_preference_loss`."""
    known = linear_preference_loss.__kwdefaults__ or {}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise TypeError(f"{owner} has no option {unknown[0]!r}; options are {', '.join(known)}")


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast as `torch.nn.functional.linear` would under autocast; fp64 stays."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    device = tensors[0].device.type
    # Dynamo of torch 2.11 cannot trace the question whether there is autocast at all.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if not available or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        else x
        for x in tensors
    )
