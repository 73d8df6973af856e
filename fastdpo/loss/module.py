"""`linear_dpo_loss` as a module, for packed rows and for TRL's padded layout.

Legend as in `ops`; L rows of a padded sequence, B pairs of a padded batch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .ops import check_options, linear_dpo_loss
from .result import PreferenceLoss
from .streaming import IGNORE


class LinearDPOLoss(nn.Module):
    """`linear_dpo_loss` as a module, for packed rows or TRL's padded layout.

    Args:
        beta, alpha: as in `linear_dpo_loss`.
        options: keyword arguments of `linear_preference_loss` that stay the same for every call,
            such as ``scale``, ``softcap`` or ``workspace_mib``.
    """

    def __init__(self, beta: float = 0.1, alpha: float = 0.0, **options: Any) -> None:
        super().__init__()
        self.beta = checks.require_number("beta", beta, low=0, open_low=True)
        self.alpha = checks.require_number("alpha", alpha)
        check_options("LinearDPOLoss", options)
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in {**self.__dict__, **self.options}.items()
                         if k in {"beta", "alpha", *self.options})  # fmt: skip

    def forward(
        self,
        h_TD: Tensor,
        w_VD: Tensor,
        target_N: Tensor,
        bounds_S1: Tensor | None = None,
        ref_logp_S: Tensor | None = None,
        **options: Any,
    ) -> PreferenceLoss:
        """Packed: ``h_TD`` (T, D), ``target_N`` (N,), ``bounds_S1`` (S + 1,).

        Padded, as TRL collates: ``h_TD`` (2B, L, D), all chosen sequences first, then all rejected;
        ``target_N`` (2B, L) already shifted, so that row t predicts label t, with -100 on prompts
        and padding; no ``bounds_S1``.  Pair i is rows i and B + i; ``ref_logp_S``, ``ref_h_TD``
        (2B, L, D) and the returned ``logp_S``, ``lengths_S`` and ``stats`` (2B, L) keep that order.
        On a GPU this layout waits once for the labels, so that prompts and padding cost nothing;
        the packed one never waits.
        """
        settings = {"beta": self.beta, "alpha": self.alpha, **self.options, **options}
        if bounds_S1 is not None or not isinstance(h_TD, Tensor) or h_TD.ndim != 3:
            if bounds_S1 is None:
                raise ValueError(
                    "bounds_S1 is missing: packed rows h_TD (T, D) need it; TRL's padded layout "
                    f"has h_TD of shape (2B, L, D), got {tuple(getattr(h_TD, 'shape', ()))}"
                )
            return linear_dpo_loss(h_TD, w_VD, target_N, bounds_S1, ref_logp_S, **settings)
        return self._padded(h_TD, w_VD, target_N, ref_logp_S, settings)

    def _padded(
        self,
        h_TD: Tensor,
        w_VD: Tensor,
        target_N: Tensor,
        ref_logp_S: Tensor | None,
        settings: dict[str, Any],
    ) -> PreferenceLoss:
        checks.require_tensor("h_TD", h_TD, 3, "(2B, L, D)")
        checks.require_tensor("target_N", target_N, 2, "(2B, L)")
        S, L, D = h_TD.shape
        if target_N.shape != (S, L) or S % 2 or S == 0:
            raise ValueError(
                "padded layout: h_TD must be (2B, L, D) and target_N (2B, L), all chosen first; "
                f"got {tuple(h_TD.shape)} and {tuple(target_N.shape)}"
            )
        if settings.get("rows_N") is not None:
            raise ValueError("rows_N has no meaning in the padded layout; leave it out")
        checks.require_device("target_N", target_N, h_TD.device)
        places_S = torch.arange(S, device=h_TD.device)
        order = places_S.view(2, S // 2).T.reshape(S)  # chosen 0, rejected 0, chosen 1...
        back = places_S.view(S // 2, 2).T.reshape(S)
        rows_N = (order[:, None] * L + torch.arange(L, device=h_TD.device)).reshape(-1)
        packed_N, bounds_S1 = target_N[order].reshape(-1), torch.arange(S + 1) * L
        keep_N = None
        if _may_wait_for(target_N):
            keep_N, bounds_S1 = _scored(packed_N, L)
            rows_N, packed_N = rows_N[keep_N], packed_N[keep_N]
        if settings.get("ref_h_TD") is not None:
            ref_h = checks.require_tensor("ref_h_TD", settings["ref_h_TD"], 3, "(2B, L, D)")
            if ref_h.shape[:2] != (S, L):
                raise ValueError(
                    f"ref_h_TD must be ({S}, {L}, D) as h_TD, got {tuple(ref_h.shape)}"
                )
            settings["ref_h_TD"] = ref_h.flatten(0, 1)
        if ref_logp_S is not None:
            checks.require_tensor("ref_logp_S", ref_logp_S, 1, "(2B,)")
            if ref_logp_S.shape[0] != S:
                raise ValueError(f"ref_logp_S must have 2B={S} entries, got {ref_logp_S.shape[0]}")
            checks.require_device("ref_logp_S", ref_logp_S, h_TD.device)
            ref_logp_S = ref_logp_S[order]
        result = linear_dpo_loss(
            h_TD.reshape(S * L, D),
            w_VD,
            packed_N,
            bounds_S1,
            ref_logp_S,
            **{**settings, "rows_N": rows_N},
        )
        if keep_N is not None:
            whole = {name: x.new_zeros(S * L) for name, x in result.stats.items()}
            result.stats = {k: whole[k].index_copy_(0, keep_N, x) for k, x in result.stats.items()}
        result.stats = {name: x.view(S, L)[back] for name, x in result.stats.items()}
        for name in ("logp_S", "ref_logp_S", "lengths_S"):
            result[name] = result[name][back]
        return result


def _may_wait_for(target: Tensor) -> bool:
    """Whether a GPU's targets can be looked at: not while a graph is being made."""
    if not target.is_cuda or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _scored(target_N: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """Positions of the scored targets of sequences of length ``L``, and the sequences' bounds."""
    keep_N = (target_N != IGNORE).nonzero()[:, 0]
    edges_S1 = torch.arange(0, len(target_N) + 1, L, device=keep_N.device)
    return keep_N, torch.searchsorted(keep_N, edges_S1).cpu()
