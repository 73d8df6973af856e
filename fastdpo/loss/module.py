"""The preference losses as modules, for packed rows and for TRL's padded layouts.

Legend as in `ops`; L rows of a padded sequence, B pairs of a padded batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .examples import BaseObjective
from .objectives import as_objective, lr_dpo
from .ops import check_options, linear_preference_loss
from .result import PreferenceLoss
from .streaming import IGNORE

_OF_SEQUENCES = ("logp_S", "ref_logp_S", "lengths_S")  # of a result


class LinearPreferenceLoss(nn.Module):
    """`linear_preference_loss` as a module, for packed rows or TRL's padded layouts.

    Args:
        objective: as in `linear_preference_loss`.
        options: its keyword arguments that stay the same for every call, such as ``scale``,
            ``softcap`` or ``workspace_mib``.
    """

    def __init__(self, objective: BaseObjective | Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        self.objective = as_objective(objective)
        check_options(type(self).__name__, options)
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in {**self.__dict__, **self.options}.items()
                         if k in {"objective", *self.options})  # fmt: skip

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

        Padded, as TRL collates: ``h_TD`` (S, L, D), ``target_N`` (S, L) already shifted, so that
        row t predicts label t, with -100 on prompts and padding; no ``bounds_S1``.  Of pairs
        S = 2B, all chosen sequences first, then all rejected: pair i is rows i and B + i.  Single
        responses are a row each, and with ``firsts_P1`` the rows of an example follow one another.
        ``ref_logp_S``, ``scores_S``, ``ref_h_TD`` (S, L, D) and the returned ``logp_S``,
        ``ref_logp_S``, ``lengths_S`` and ``stats`` (S, L) are in the order of the rows.  On a GPU
        this layout waits once for the labels, so that prompts and padding cost nothing; the packed
        one never waits.
        """
        return self._run(self.objective, h_TD, w_VD, target_N, bounds_S1, ref_logp_S, options)

    def _run(
        self,
        objective: BaseObjective,
        h_TD: Tensor,
        w_VD: Tensor,
        target_N: Tensor,
        bounds_S1: Tensor | None,
        ref_logp_S: Tensor | None,
        options: dict[str, Any],
    ) -> PreferenceLoss:
        settings = {**self.options, **options}
        if not torch.compiler.is_compiling():
            check_options(type(self).__name__, settings)
        if bounds_S1 is None and isinstance(h_TD, Tensor) and h_TD.ndim == 3:
            return _padded(objective, h_TD, w_VD, target_N, ref_logp_S, settings)
        if bounds_S1 is None:
            raise ValueError(
                "bounds_S1 is missing: packed rows h_TD (T, D) need it; TRL's padded layout "
                f"has h_TD of shape (2B, L, D), got {tuple(getattr(h_TD, 'shape', ()))}"
            )
        return linear_preference_loss(
            h_TD, w_VD, target_N, bounds_S1, ref_logp_S, objective, **settings
        )


class LinearDPOLoss(LinearPreferenceLoss):
    """`linear_dpo_loss` as a module, for packed rows or TRL's padded layout.

    Args:
        beta, alpha: as in `linear_dpo_loss`; a call may have others.
        options: keyword arguments of `linear_preference_loss` that stay the same for every call,
            such as ``scale``, ``softcap`` or ``workspace_mib``.
    """

    def __init__(self, beta: float = 0.1, alpha: float = 0.0, **options: Any) -> None:
        super().__init__(lr_dpo(beta, alpha), **options)
        self.beta, self.alpha = float(beta), float(alpha)

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
        """As `LinearPreferenceLoss.forward`, of pairs."""
        objective = lr_dpo(options.pop("beta", self.beta), options.pop("alpha", self.alpha))
        return self._run(objective, h_TD, w_VD, target_N, bounds_S1, ref_logp_S, options)


def _padded(
    objective: BaseObjective,
    h_SLD: Tensor,
    w_VD: Tensor,
    target_SL: Tensor,
    ref_logp_S: Tensor | None,
    settings: dict[str, Any],
) -> PreferenceLoss:
    checks.require_tensor("h_TD", h_SLD, 3, "(2B, L, D)")
    checks.require_tensor("target_N", target_SL, 2, "(2B, L)")
    S, L, D = h_SLD.shape
    # Chosen and rejected sides lie apart only where nothing says which rows are an example.
    halves = objective.shape != "singles" and settings.get("firsts_P1") is None
    if target_SL.shape != (S, L) or S == 0 or (halves and S % 2):
        raise ValueError(
            "padded layout: h_TD must be (2B, L, D) and target_N (2B, L), all chosen first; "
            f"got {tuple(h_SLD.shape)} and {tuple(target_SL.shape)}"
        )
    if settings.get("group") is not None:
        raise ValueError("group needs packed rows: in the padded layout sequences are whole")
    if settings.get("rows_N") is not None:
        raise ValueError("rows_N has no meaning in the padded layout; leave it out")
    checks.require_device("target_N", target_SL, h_SLD.device)
    order = back = places_S = torch.arange(S, device=h_SLD.device)
    if halves:
        order = places_S.view(2, S // 2).T.reshape(S)  # chosen 0, rejected 0, chosen 1...
        back = places_S.view(S // 2, 2).T.reshape(S)
    rows_N = (order[:, None] * L + torch.arange(L, device=h_SLD.device)).reshape(-1)
    packed_N, bounds_S1 = target_SL[order].reshape(-1), torch.arange(S + 1) * L
    keep_N = None
    if _may_wait_for(target_SL):
        keep_N, bounds_S1 = _scored(packed_N, L)
        rows_N, packed_N = rows_N[keep_N], packed_N[keep_N]
    settings = {**settings, "ref_logp_S": ref_logp_S, "rows_N": rows_N}
    if settings.get("ref_h_TD") is not None:
        ref_h = checks.require_tensor("ref_h_TD", settings["ref_h_TD"], 3, "(2B, L, D)")
        if ref_h.shape[:2] != (S, L):
            raise ValueError(f"ref_h_TD must be ({S}, {L}, D) as h_TD, got {tuple(ref_h.shape)}")
        settings["ref_h_TD"] = ref_h.flatten(0, 1)
    for name in ("ref_logp_S", "scores_S"):
        if settings.get(name) is not None:
            x_S = checks.require_tensor(name, settings[name], 1, "(2B,)")
            if x_S.shape[0] != S:
                raise ValueError(f"{name} must have 2B={S} entries, got {x_S.shape[0]}")
            checks.require_device(name, x_S, h_SLD.device)
            settings[name] = x_S[order]
    result = linear_preference_loss(
        h_SLD.reshape(S * L, D),
        w_VD,
        packed_N,
        bounds_S1,
        objective=objective,
        **settings,
    )
    if keep_N is not None:
        whole = {name: x.new_zeros(S * L) for name, x in result.stats.items()}
        result.stats = {k: whole[k].index_copy_(0, keep_N, x) for k, x in result.stats.items()}
    result.stats = {name: x.view(S, L)[back] for name, x in result.stats.items()}
    for name in _OF_SEQUENCES:
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
