"""Rotary frequencies of each sequence alone, in calls that hold several.

LongRoPE (Phi-3, Phi-4-mini) and dynamic NTK choose their frequencies by the longest position of a
call, and some keep them for the next: ``transformers.modeling_rope_utils.dynamic_rope_update``.
`attach` finds such modules by what they compute and lets each sequence of a call, told apart by its
positions from 0, have the frequencies of its own length.  Nothing is kept between calls.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdpo.data.batch import ANY_LENGTH, LengthClasses
from fastdpo.errors import ModelError

_FIRST = 3  # positions whose values a probe compares
# While a model is probed: the positions that its rotary modules get.
_received: list[Tensor] | None = None


@torch.no_grad()
def attach(model: nn.Module) -> LengthClasses:
    """Patch the rotary modules of one model whose frequencies depend on the call.

    Returns:
        Which lengths have the same frequencies; `ANY_LENGTH` where nothing had to be patched.

    Raises:
        ModelError: a rotary module depends on the call in a way that can't be taken apart.
    """
    found = ANY_LENGTH
    for module in _rotary_modules(model):
        if not hasattr(module, "_fastdpo_classes"):
            _forget(module)
            classes = _classes(module)
            if not classes:
                continue
            module._fastdpo_classes = classes
            # Bound, so that a deep copy of the model calls itself and not the original.
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
            _check(module)
        found = found | module._fastdpo_classes  # type: ignore[operator]
    return found


@contextmanager
def received() -> Iterator[list[Tensor]]:
    """Collect the positions that patched modules are called with."""
    global _received
    _received = []
    try:
        yield _received
    finally:
        _received = None


def _rotary_modules(model: nn.Module) -> Iterator[Any]:
    """Modules without parameters that make something of positions."""
    for module in model.modules():
        takes = inspect.signature(type(module).forward).parameters
        if "position_ids" in takes and "x" in takes and not any(True for _ in module.parameters()):
            yield module


def _forward(self: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, for the sequences of each length class by themselves.

    ``position_ids`` (..., B, T): a sequence begins with each row and wherever the position is 0.
    """
    if _received is not None:
        _received.append(position_ids)

    class_BT, groups = _grouped(position_ids, self._fastdpo_classes)
    whole: list[Tensor] = []
    spec: Any = None
    for group in range(groups):
        mine_BT = class_BT == group
        # The longest position is that of the group: all others are 0.
        out = _fresh(self).forward(x, position_ids * mine_BT, *args, **kwargs)
        parts, spec = tree_flatten(out)  # (..., B, T, dim)
        whole = [torch.where(mine_BT[..., None], *two) for two in zip(parts, whole or parts)]
    return tree_unflatten(whole, spec)


def _grouped(position_ids: Tensor, classes: LengthClasses) -> tuple[Tensor, int]:
    """The length class of each token (B, T), numbered from 0, and how many there are."""
    # Text has the same positions in all dimensions that a multimodal model counts.
    position_BT = position_ids.reshape(-1, *position_ids.shape[-2:])[0]
    starts_BT = position_BT == 0
    starts_BT[:, 0] = True
    sequence_R = starts_BT.flatten().cumsum(0) - 1
    length_Q = torch.zeros_like(sequence_R).scatter_reduce(
        0, sequence_R, position_BT.flatten().long() + 1, "amax"
    )
    length_U, index_Q = length_Q.unique(return_inverse=True)
    numbers: dict[tuple[int, int], int] = {}
    # Lengths of 0 stand behind the last sequence.
    of_U = [numbers.setdefault(classes.of(x), len(numbers)) if x else 0 for x in length_U.tolist()]
    class_U = torch.tensor(of_U, device=position_BT.device)
    return class_U[index_Q][sequence_R].view_as(position_BT), len(numbers)


def _fresh(module: Any) -> Any:
    """A copy with its class's own forward, which may change it."""
    config = getattr(module, "config", None)
    fresh = copy.deepcopy(module, {id(config): config})
    vars(fresh).pop("forward", None)
    return fresh


def _forget(module: Any) -> None:
    """Undo what a call longer than ``max_position_embeddings`` left in a dynamic NTK module."""
    longest = getattr(module, "original_max_seq_len", None)
    grown = [name for name in vars(module) if name.endswith("max_seq_len_cached")]
    if all(int(getattr(module, name)) == longest for name in grown):
        return
    for name in grown:
        setattr(module, name, longest)
    for name in [*vars(module), *module._buffers]:
        if name.endswith("original_inv_freq"):
            prefix = name.removesuffix("original_inv_freq")
            now = getattr(module, f"{prefix}inv_freq")
            setattr(module, f"{prefix}inv_freq", getattr(module, name).clone().to(now.device))


# ---------------------------------------------------------------------------------------- the probe
def _classes(module: Any) -> LengthClasses:
    """Which lengths have the same frequencies, found by trial.

    A switch is looked for at every length that the configuration names.  Where the frequencies
    change anywhere else, each length from there on is a class of its own.
    """
    kinds, found = _layer_types(module), ANY_LENGTH
    for layer_type in kinds:
        try:
            found = found | _switches(module, layer_type)
        # A module that takes other positions than those of text can fail in any way.
        except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
            if any(x == "longrope" or "dynamic" in str(x) for x in kinds.values()):
                raise ModelError(
                    f"the frequencies of {type(module).__name__} depend on the longest sequence of "
                    f"a call, and it cannot be called for one sequence: {error}"
                ) from error
    return found


def _layer_types(module: Any) -> dict[str | None, str]:
    """The rope type of each kind of layer that a module serves; None: of all."""
    kinds = getattr(module, "rope_type", "default")
    return kinds if isinstance(kinds, dict) else {None: kinds}


def _lengths(module: Any) -> list[int]:
    """Lengths to try: on both sides of every number where frequencies may switch, and between."""
    config = getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    sources = [vars(module), getattr(config, "__dict__", {}), parameters, *parameters.values()]
    numbers = {2**i for i in range(3, 23)}
    for source in sources:
        if isinstance(source, dict):
            named = {k: v for k, v in source.items() if "position" in str(k) or "seq_len" in str(k)}
            numbers |= {int(x) for x in named.values() if isinstance(x, int | Tensor) and x > 3}
    edges = sorted(numbers)
    between = {(a + b) // 2 for a, b in pairwise(edges)}
    return sorted({_FIRST + 1, *edges, *between, *(x + 1 for x in edges)})


def _switches(module: Any, layer_type: str | None) -> LengthClasses:
    steps, lengths = [], _lengths(module)
    before = _alone(module, lengths[0], layer_type)
    for a, b in pairwise(lengths):
        now = _alone(module, b, layer_type)
        if not _same(before, now):
            if b > a + 1:
                return LengthClasses(tuple(steps), grows_from=a)
            steps.append(a)
        before = now
    return LengthClasses(tuple(steps))


def _alone(module: Any, length: int, layer_type: str | None) -> list[Tensor]:
    """What the first positions of a sequence get in a call of its own."""
    return _tables(_fresh(module), [length], layer_type)[0]


def _tables(module: Any, lengths: list[int], layer_type: str | None) -> list[list[Tensor]]:
    """What the first positions of sequences get that are one call."""
    device = next((x.device for x in module.buffers()), torch.device("cpu"))
    options = {} if layer_type is None else {"layer_type": layer_type}
    rows = [[*range(_FIRST), length - 1] for length in lengths]
    position_1T = torch.tensor(rows, device=device).view(1, -1)
    T = position_1T.shape[1]
    out = module.forward(torch.empty(1, T, 1, device=device), position_1T, **options)
    tables = tree_flatten(out)[0]
    if any(table.shape[-2] != T for table in tables):
        raise ValueError(f"it gives {tuple(tables[0].shape)} for {T} positions")
    tables = [table.unflatten(-2, (len(rows), -1)) for table in tables]
    return [[table[..., i, :_FIRST, :] for table in tables] for i in range(len(rows))]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _check(module: Any) -> None:
    """Sequences of many lengths in one call against each of them alone."""
    lengths = [x for x in _lengths(module) if x <= 2 * module._fastdpo_classes.last + 8]
    for layer_type in _layer_types(module):
        for length, found in zip(lengths, _tables(module, lengths, layer_type)):
            if not _same(found, _alone(module, length, layer_type)):
                raise ModelError(
                    f"the frequencies of {type(module).__name__} for a sequence of {length} "
                    "tokens depend on those beside it"
                )
