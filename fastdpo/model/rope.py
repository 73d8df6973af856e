"""Rotary frequencies of each sequence alone, in calls that hold several.

LongRoPE (Phi-3, Phi-4-mini) and dynamic NTK choose their frequencies by the longest position of a
call, and some keep them for the next: ``transformers.modeling_rope_utils.dynamic_rope_update``.
`attach` finds such modules by what they compute and lets each sequence of a call, told apart by its
positions from 0, have the frequencies of its own length.  Nothing is kept between calls.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastdpo.data.examples import ANY_LENGTH, LengthClasses
from fastdpo.errors import ModelError
from fastdpo.model.devices import forward_of

_FIRST = 3  # positions whose values a probe compares
# While a model is probed: the positions that its rotary modules get.
_received: list[Tensor] | None = None


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
            with torch.no_grad():
                _forget(module)
                classes, kept = _classes(module)
            if not (classes or kept):
                continue
            module._fastdpo_classes = classes
            # Bound, so that a deep copy of the model calls itself and not the original.
            setattr(module, forward_of(module), MethodType(_forward, module))
            with torch.no_grad():
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
    Of a part of a row the other parts' positions count too.
    """
    if _received is not None:
        _received.append(position_ids)
    chunk = getattr(self, "_fastdpo_chunk", None)
    if chunk is None:
        return _by_class(self, x, position_ids, *args, **kwargs)
    whole = chunk.positions_BT.expand(*position_ids.shape[:-1], -1)
    tables = _by_class(self, x, whole, *args, **kwargs)
    return tree_map(lambda table: table[..., chunk.tokens, :], tables)


@contextmanager
def whole_positions(model: nn.Module, chunk: Any) -> Iterator[None]:
    """Within it, patched modules know the row that they are called with a part of.

    ``chunk`` is a `sequence_parallel.Chunk`.
    """
    patched: list[Any] = [x for x in model.modules() if hasattr(x, "_fastdpo_classes")]
    for module in patched:
        module._fastdpo_chunk = chunk
    try:
        yield
    finally:
        for module in patched:
            module._fastdpo_chunk = None


def refuse_in_layers(model: nn.Module) -> None:
    """Refuse patched modules inside layers, whose recomputation is out of `whole_positions`.

    Raises:
        ModelError: there is one.
    """
    for name, module in model.named_modules():
        if hasattr(module, "_fastdpo_classes") and any(x.isdigit() for x in name.split(".")):
            raise ModelError(
                f"sequence parallel: {name} of {type(model).__name__} has rotary frequencies that "
                "depend on a sequence's length, and is part of a layer, which does not know it; "
                "use sp_size=1"
            )


def _by_class(self: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    def own(positions: Tensor) -> Any:
        return type(self).forward(_fresh(self), x, positions, *args, **kwargs)

    class_R, groups = _grouped(position_ids, self._fastdpo_classes)
    if groups == 1:
        return own(position_ids)
    flat = position_ids.flatten(-2)
    whole: list[Tensor] = []
    spec = None
    for group in range(groups):
        rows = (class_R == group).nonzero()[:, 0]
        parts, spec = tree_flatten(own(flat[..., rows].unsqueeze(-2)))
        parts = [part.squeeze(-3) for part in parts]  # (..., rows, dim)
        if not whole:
            whole = [x.new_empty(*x.shape[:-2], len(class_R), x.shape[-1]) for x in parts]
        for into, part in zip(whole, parts):
            into.index_copy_(into.ndim - 2, rows, part)
    assert spec is not None
    return tree_unflatten([x.unflatten(-2, position_ids.shape[-2:]) for x in whole], spec)


def _grouped(position_ids: Tensor, classes: LengthClasses) -> tuple[Tensor, int]:
    """The length class of each of B * T tokens, numbered from 0, and how many there are."""
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
    return class_U[index_Q][sequence_R], len(numbers)


def _fresh(module: Any) -> Any:
    """A copy that its own forward may change."""
    kept = getattr(module, "config", None), vars(module).get("_hf_hook")
    return copy.deepcopy(module, {id(x): x for x in kept})


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
def _classes(module: Any) -> tuple[LengthClasses, bool]:
    """Which lengths have the same frequencies, found by trial, and whether a call changes the next.

    A switch is looked for at every length that the configuration names.  Where the frequencies
    change anywhere else, each length from there on is a class of its own.
    """
    kinds = _layer_types(module).values()
    dynamic = any(x == "longrope" or "dynamic" in str(x) for x in kinds)
    found, kept = ANY_LENGTH, False
    for layer_type in _layer_types(module):
        try:
            found = found | _switches(_table(module, layer_type), _lengths(module))
            kept = kept or _is_kept(module, layer_type)
        # A module that takes other positions than those of text can fail in any way.
        except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
            if not dynamic:
                continue
            raise ModelError(
                f"the frequencies of {type(module).__name__} depend on the longest sequence of a "
                f"call, and it cannot be called for one sequence: {error}"
            ) from error
    return found, kept


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


def _switches(table: Callable[[int], list[Tensor]], lengths: list[int]) -> LengthClasses:
    steps = []
    before = table(lengths[0])
    for a, b in pairwise(lengths):
        now = table(b)
        if not _same(before, now):
            if b > a + 1:
                return LengthClasses(tuple(steps), grows_from=a)
            steps.append(a)
        before = now
    return LengthClasses(tuple(steps))


def _table(module: Any, layer_type: str | None) -> Callable[[int], list[Tensor]]:
    """What the first positions get in a call whose longest sequence has ``length`` tokens."""
    return lambda length: _call(_fresh(module), [0, 1, 2, length - 1], layer_type)


def _is_kept(module: Any, layer_type: str | None) -> bool:
    used = _fresh(module)
    first = _call(used, [0, 1, 2], layer_type)
    for length in _lengths(module)[::3]:
        try:
            _call(used, [0, 1, 2, length - 1], layer_type)
            again = _call(used, [0, 1, 2], layer_type)
        except NameError:  # transformers 5.0 to 5.8, where LongRoPE differs from layer to layer
            return True
        if not _same(first, again):
            return True
    return False


def _call(module: Any, positions: list[int], layer_type: str | None) -> list[Tensor]:
    return _tables(partial(type(module).forward, module), module, [positions], layer_type)[0]


def _tables(
    forward: Callable[..., Any], module: Any, rows: list[list[int]], layer_type: str | None
) -> list[list[Tensor]]:
    """What the first positions of each row get, where all rows are one call."""
    device = next((x.device for x in module.buffers()), torch.device("cpu"))
    options = {} if layer_type is None else {"layer_type": layer_type}
    position_1T = torch.tensor(rows, device=device).view(1, -1)
    T = position_1T.shape[1]
    tables = tree_flatten(forward(torch.empty(1, T, 1, device=device), position_1T, **options))[0]
    if any(table.shape[-2] != T for table in tables):
        raise ValueError(f"it gives {tuple(tables[0].shape)} for {T} positions")
    tables = [table.unflatten(-2, (len(rows), -1)) for table in tables]
    return [[table[..., i, :_FIRST, :] for table in tables] for i in range(len(rows))]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _check(module: Any) -> None:
    """Sequences of many lengths in one call against each of them alone."""
    lengths = [x for x in _lengths(module) if x <= 2 * module._fastdpo_classes.last + 8]
    rows = [[0, 1, 2, x - 1] for x in lengths]
    for layer_type in _layer_types(module):
        for row, found in zip(rows, _tables(module, module, rows, layer_type)):
            if not _same(found, _call(_fresh(module), row, layer_type)):
                raise ModelError(
                    f"the frequencies of {type(module).__name__} for a sequence of {row[-1] + 1} "
                    "tokens depend on those beside it"
                )
