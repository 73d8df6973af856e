"""Validation of the ops' arguments: one clear error that names the argument, before any work.

Shapes, dtypes and devices are checked everywhere; values only where looking at them costs no
synchronization, that is for tensors on the CPU.  Elsewhere wrong values trip a device assert: one
of the kernel that reads them anyway (``in_kernel``), or one of PyTorch.
"""

import inspect
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..kernels.device import capability_of

IGNORE = -100
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IMPLS = ("auto", "triton", "torch")


def require_tensor(name: str, x: Any, ndim: int, letters: str) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    dtensor = sys.modules.get("torch.distributed.tensor")  # slow to import, so not for its own sake
    if dtensor is not None and isinstance(x, dtensor.DTensor):
        raise TypeError(
            f"{name} is a DTensor (FSDP2 or tensor parallel): its gradient would be silently wrong "
            "here. Call the head as a module inside the wrapped model's forward "
            "(fastdpo.head.attach), where the hooks hand over the plain parameter"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    if x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions {letters}, got {tuple(x.shape)}")
    return x


def require_number(
    name: str, x: Any, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> float:
    if isinstance(x, bool) or not isinstance(x, (int, float)):  # traceable by torch 2.8
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    if isinstance(x, int) and abs(x) > sys.float_info.max:
        raise ValueError(f"{name} must fit a float, got an integer of {x.bit_length()} bits")
    below = x <= low if open_low else x < low
    if not math.isfinite(x) or below or x > high:
        bounds = f"{'>' if open_low else '>='} {low:g}" + (
            f" and <= {high:g}" if high < 1e300 else ""
        )
        wanted = "a finite number" + (f" {bounds}" if low > -1e300 else "")
        raise ValueError(f"{name} must be {wanted}, got {x}")
    return float(x)


def require_device(name: str, x: Tensor, device: torch.device, other: str = "h_TD") -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but {other} is on {device}; move it there")


def choose_impl(impl: Any, h_TD: Any) -> str:
    """ "triton" or "torch"; one that cannot run is refused, nothing falls back silently.

    "auto" is Triton on CUDA and ROCm, except for fp64, which only PyTorch computes.
    """
    if not isinstance(impl, str) or impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    device, dtype = torch.device("cpu"), torch.float32
    if isinstance(h_TD, Tensor):
        device, dtype = h_TD.device, h_TD.dtype
    automatic = capability_of(device) is not None and dtype != torch.float64
    if impl == "torch" or (impl == "auto" and not automatic):
        return "torch"
    from ..kernels import support

    reason = support.unsupported_reason(device, dtype)
    if reason is not None:
        raise ValueError(f"impl={impl!r} cannot run: {reason}; use impl='torch'")
    return "triton"


def check_head(
    h: Any, w: Any, bias: Any, scale: Any, softcap: Any, *, prefix: str = ""
) -> tuple[float, float | None]:
    """Hidden rows (T, D) and the head: weight (V, D), bias (V,), scale and softcap."""
    h_name, w_name, bias_name = f"{prefix}h_TD", f"{prefix}w_VD", f"{prefix}bias_V"
    require_tensor(h_name, h, 2, "(T, D)")
    require_tensor(w_name, w, 2, "(V, D)")
    if h.dtype not in _FLOATS:
        raise TypeError(f"{h_name} must be float16, bfloat16, float32 or float64, got {h.dtype}")
    if w.dtype != h.dtype:
        raise TypeError(f"{w_name} is {w.dtype} but {h_name} is {h.dtype}; cast one to the other")
    require_device(w_name, w, h.device, h_name)
    if w.numel() == 0:
        raise ValueError(
            f"{w_name} is empty {tuple(w.shape)}: under DeepSpeed ZeRO-3 a weight has no content "
            "outside its module's forward; call the head as a module (fastdpo.head.attach)"
        )
    if h.shape[1] != w.shape[1]:
        raise ValueError(
            f"{h_name} {tuple(h.shape)} and {w_name} {tuple(w.shape)} must have the same "
            "last dimension D"
        )
    if bias is not None:
        require_tensor(bias_name, bias, 1, "(V,)")
        require_device(bias_name, bias, h.device, h_name)
        if bias.dtype != h.dtype:
            raise TypeError(f"{bias_name} is {bias.dtype} but {h_name} is {h.dtype}")
        if bias.shape[0] != w.shape[0]:
            raise ValueError(f"{bias_name} must have V={w.shape[0]} entries, got {bias.shape[0]}")
    scale = require_number("scale", scale)
    if scale == 0:
        raise ValueError("scale must not be 0")
    if softcap is not None:
        softcap = require_number("softcap", softcap, low=0, open_low=True)
    return scale, softcap


def check_targets(h_TD: Tensor, V: int, target: Any, rows: Any, *, in_kernel: bool = False) -> None:
    """Targets (N,) int64 in [0, V) or -100; rows (N,) int64 in [0, T)."""
    check_tokens("target_N", target, h_TD.device)
    T, N = h_TD.shape[0], target.shape[0]
    if N == 0:
        raise ValueError("target_N is empty: there is nothing to score")
    if rows is None:
        if N != T:
            raise ValueError(
                f"target_N has {N} targets but h_TD has {T} rows; pass rows_N to say which hidden "
                "row predicts which target"
            )
    else:
        check_tokens("rows_N", rows, h_TD.device)
        if rows.shape[0] != N:
            raise ValueError(f"rows_N has {rows.shape[0]} entries but target_N has {N}")
        if not (in_kernel and rows.device.type != "cpu"):
            require_values("rows_N", rows, (rows >= 0) & (rows < T), f"0 <= row < T={T}")
    if in_kernel and target.device.type != "cpu":
        return
    valid = ((target >= 0) & (target < V)) | (target == IGNORE)
    require_values("target_N", target, valid, f"0 <= target < V={V} or -100")


def check_tokens(name: str, x: Any, device: torch.device) -> None:
    """One int64 number a scored token."""
    require_tensor(name, x, 1, "(N,)")
    if x.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {x.dtype}")
    require_device(name, x, device)


def require_values(name: str, x: Tensor, valid: Tensor, wanted: str) -> None:
    if x.device.type != "cpu":
        torch.ops.aten._assert_async.msg(valid.all(), f"{name} must be {wanted}")
    elif not valid.all():
        i = int(valid.logical_not().nonzero()[0])
        raise ValueError(f"{name}[{i}] = {x[i].item()} must be {wanted}")


def require_smoothing(objective: Any, smoothing_P: Tensor | None) -> None:
    """Smoothing of pairs within the bounds of an objective that has some."""
    above, below = objective.smoothing_above, objective.smoothing_below
    if above is not None and smoothing_P is None:
        raise ValueError(
            f"smoothing_P is None, but {objective.name} needs a label_smoothing > {above:g} (the "
            "paper's is 1e-3), or a smoothing_P of each pair"
        )
    if below is None or smoothing_P is None:
        return
    valid, wanted = smoothing_P < below, f"< {below:g}"
    if above is not None:
        valid, wanted = valid & (smoothing_P > above), f"> {above:g} and {wanted}"
    require_values("smoothing_P", smoothing_P, valid, f"{wanted} for {objective.name}")


def check_objective(objective: Any) -> None:
    """A function of the six arguments of `fastdpo.objectives`."""
    wanted = "one of fastdpo.objectives (such as lr_dpo(beta=0.1)) or a function of their signature"
    if not callable(objective):
        raise TypeError(f"objective must be {wanted}, got {type(objective).__name__}")
    try:
        inspect.signature(objective).bind(*range(6))
    except ValueError:  # some builtins have no signature
        return
    except TypeError as error:
        raise TypeError(f"objective must be {wanted}, got {objective!r}: {error}") from None


def check_losses(loss_P: Any, count: int) -> None:
    """What an objective returned."""
    if not isinstance(loss_P, Tensor) or loss_P.shape != (count,):
        got = tuple(loss_P.shape) if isinstance(loss_P, Tensor) else type(loss_P).__name__
        raise ValueError(f"objective must return one loss an example, shape ({count},); got {got}")


def check_bounds(bounds: Any, target: Tensor, *, pairs: bool, empty: bool = False) -> list[int]:
    """Cumulative sequence bounds (S + 1,), S even if of ``pairs``, as Python integers."""
    require_tensor("bounds_S1", bounds, 1, "(S + 1,)")
    if bounds.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"bounds_S1 must be int64 or int32, got {bounds.dtype}")
    if bounds.device.type != "cpu":
        raise ValueError(
            f"bounds_S1 must live on the CPU, got {bounds.device}: the route of the call is chosen "
            "from it without a synchronization"
        )
    edges: list[int] = bounds.tolist()
    if not pairs and len(edges) < 2:
        raise ValueError("bounds_S1 must bound a sequence at least, so have two entries or more")
    if pairs and (len(edges) < 3 or len(edges) % 2 == 0):
        raise ValueError(
            f"bounds_S1 must bound an even number of sequences (chosen, rejected, ...), so have an "
            f"odd number of entries, at least 3; got {len(edges)}. Of other examples than pairs "
            "firsts_P1 says where each begins"
        )
    if edges[0] != 0 or edges[-1] != target.shape[0]:
        raise ValueError(
            f"bounds_S1 must run from 0 to N={target.shape[0]} (the number of targets), "
            f"got {edges[0]} to {edges[-1]}"
        )
    for s, (start, stop) in enumerate(pairwise(edges)):
        if stop < start:
            raise ValueError(f"bounds_S1 must increase, but goes from {start} to {stop} at {s + 1}")
        if stop == start and not empty:
            which = _side(s, s // 2) if pairs else f"sequence {s}"
            raise ValueError(f"{which} is empty: bounds_S1[{s}] = bounds_S1[{s + 1}]")
    return edges


def check_firsts(firsts: Any, S: int, objective: Any) -> tuple[int, ...]:
    """The first sequence of each example and the end; examples of the objective's shape."""
    if not isinstance(firsts, range | tuple | list) or any(type(x) is not int for x in firsts):
        raise TypeError(f"firsts_P1 must be a tuple of integers, got {_shortly(firsts)}")
    if len(firsts) < 2 or firsts[0] != 0 or firsts[-1] != S:
        raise ValueError(
            f"firsts_P1 must run from 0 to S={S}, the number of sequences that bounds_S1 has, got "
            f"{_shortly(firsts)}"
        )
    pair = 2, 3 if objective.needs_prompt and objective.ld_alpha is None else 2
    sizes = {"pairs": pair, "lists": (2, sys.maxsize), "singles": (1, 1)}
    least, most = sizes[objective.shape]
    for p, (start, stop) in enumerate(pairwise(firsts)):
        if stop <= start:
            raise ValueError(f"firsts_P1 must increase, but goes from {start} to {stop} at {p + 1}")
        if not least <= stop - start <= most:
            wanted = f"{least}" if least == most else f"{least} or more"
            wanted = "2 or 3" if (least, most) == (2, 3) else wanted
            raise ValueError(
                f"objective {name_of(objective)} takes {objective.shape}, of {wanted} sequences "
                f"each, but firsts_P1 gives example {p} {stop - start}"
            )
    return tuple(firsts)


def check_asked(objective: Any, scores: Any, desirable: Any) -> None:
    """Scores and labels where the objective reads them, and only there."""
    shape, name = objective.shape, name_of(objective)
    if scores is None and objective.needs_scores:
        raise ValueError(f"scores_S is missing, which objective {name} needs")
    if scores is not None and not objective.needs_scores and shape in ("pairs", "singles"):
        raise ValueError(f"scores_S is given, but objective {name} has no use for it; leave it out")
    if desirable is None and shape == "singles":
        raise ValueError(f"desirable_P is missing, which objective {name} needs")
    if desirable is not None and shape in ("pairs", "lists"):
        raise ValueError(
            f"desirable_P is given, but objective {name} takes {shape} and has no use for it; "
            "leave it out"
        )


def name_of(objective: Any) -> str:
    """As an error calls it."""
    return repr(getattr(objective, "name", type(objective).__name__))


def _shortly(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 80 else text[:77] + "..."


def check_lengths(lengths: Sequence[int], firsts: Sequence[int]) -> None:
    """Every sequence has a scored token."""
    for p, (start, stop) in enumerate(pairwise(firsts)):
        for s in range(start, stop):
            if lengths[s] == 0:
                which = _side(s - start, p) if stop - start == 2 else f"sequence {s} of example {p}"
                raise ValueError(f"{which} is empty: all its targets are -100")


def check_device_lengths(lengths_S: Tensor) -> None:
    """The same for counts that lie on a device."""
    message = "a response is empty: all its targets are -100"
    torch.ops.aten._assert_async.msg((lengths_S > 0).all(), message)


def _side(s: int, pair: int) -> str:
    return f"the {'rejected' if s % 2 else 'chosen'} response of pair {pair}"


def check_vector(
    name: str,
    x: Any,
    count: int,
    letter: str,
    device: torch.device,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    in_kernel: bool = False,
) -> Tensor:
    """A finite float vector with one entry a sequence or pair."""
    require_tensor(name, x, 1, f"({letter},)")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be a float tensor, got {x.dtype}")
    require_device(name, x, device)
    if x.shape[0] != count:
        raise ValueError(f"{name} must have {letter}={count} entries, got {x.shape[0]}")
    if x.requires_grad:
        raise ValueError(f"{name} must not require a gradient; detach it")
    if in_kernel and x.device.type != "cpu":
        return x
    valid = x.isfinite() & (x >= low) & (x <= high)
    wanted = "finite" + (f" and in [{low:g}, {high:g}]" if low > -1e300 else "")
    require_values(name, x, valid, wanted)
    return x


# --------------------------------------------------------------------------- of the preference loss
STATS = frozenset({"logp", "entropy", "mean_logit", "top1", "log_sum_sq_probs", "kl_ref"})


def check_stats(stats: Any, has_ref: bool) -> frozenset[str]:
    """Names of statistics; one of them needs the reference's head."""
    if not isinstance(stats, tuple | list | set | frozenset):
        raise TypeError(f"stats must be a tuple of names, got {stats!r}")
    if not all(isinstance(name, str) for name in stats):
        raise TypeError(f"stats must hold names only, got {stats!r}")
    wanted = frozenset(stats)
    if wanted - STATS:
        unknown = ", ".join(sorted(map(repr, wanted - STATS)))
        raise ValueError(f"stats has unknown names {unknown}; known: {', '.join(sorted(STATS))}")
    if "kl_ref" in wanted and not has_ref:
        raise ValueError("stats='kl_ref' needs the reference as ref_h_TD and ref_w_VD")
    return wanted


def check_reference_sums(ref_logp_S: Any, S: int, device: torch.device, *, in_kernel: bool) -> None:
    """Log-probs of S sequences under the reference."""
    check_vector("ref_logp_S", ref_logp_S, S, "S", device, in_kernel=in_kernel)
    if ref_logp_S.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"ref_logp_S must be float32 or float64, got {ref_logp_S.dtype}, which rounds the "
            "sum of a long response by more than a preference is worth"
        )


def check_reference_head(h: Tensor, w: Tensor, ref_h: Any, ref_w: Any, ref_bias: Any) -> None:
    """The reference's hidden rows and head, of the policy's sizes."""
    if ref_w is None:
        raise ValueError("ref_h_TD needs ref_w_VD, the reference's head")
    check_head(ref_h, ref_w, ref_bias, 1.0, None, prefix="ref_")
    if ref_h.shape[0] != h.shape[0] or ref_w.shape[0] != w.shape[0]:
        raise ValueError(
            f"ref_h_TD and ref_w_VD must have the policy's rows T={h.shape[0]} and vocabulary "
            f"V={w.shape[0]}, got {ref_h.shape[0]} and {ref_w.shape[0]}"
        )
    if ref_h.dtype != h.dtype or ref_h.device != h.device:
        raise TypeError(
            f"ref_h_TD is {ref_h.dtype} on {ref_h.device}, h_TD is {h.dtype} on {h.device}; they "
            "must agree"
        )
