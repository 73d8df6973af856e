"""Large models read and written in pieces: nowhere is there a whole one.

Between files and parameters transformers renames, splits, stacks and joins tensors, each family in
its own way.  That code is run as it is, on tensors that have sizes but no content, and what it does
to them is noted (`Trace`).  Then the same operations give the rows of a parameter that a process
keeps, from those rows of the files that they need.  `fastdpo.model.save` goes the other way.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_KEPT = 6  # whole tensors that are kept for what is made of them next


class _Node:
    """A tensor that can be made: of a file, of processes, or by an operation on others."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.is_noted = True  # all that was done to it

    @property
    def is_sound(self) -> bool:
        """Whether it can be made."""
        return self.is_noted

    def make(self, trace: "Trace") -> Tensor:
        raise NotImplementedError

    def rows(self, trace: "Trace", start: int, stop: int) -> Tensor:
        """Some of the first dimension's; without more knowledge the whole is made for them."""
        return trace.whole(self)[start:stop]


class _Source(_Node):
    """What ``read`` gives, whole or some rows of it (a slice of the first dimension)."""

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, read: Callable[[slice | None], Tensor]
    ) -> None:
        super().__init__(shape, dtype)
        self.read = read

    def make(self, trace: "Trace") -> Tensor:
        return self.read(None).to(self.dtype)

    def rows(self, trace: "Trace", start: int, stop: int) -> Tensor:
        return self.read(slice(start, stop)).to(self.dtype)


class _View:
    """Elements of a node."""

    def __init__(self, node: _Node, tensor: Tensor) -> None:
        self.node, self.shape = node, tensor.shape
        self.stride, self.offset = tensor.stride(), tensor.storage_offset()

    def make(self, trace: "Trace") -> Tensor:
        whole = trace.whole(self.node)
        if self.shape == self.node.shape and self._is_plain:
            return whole
        # The node's storage had the strides of a new tensor.
        return whole.contiguous().as_strided(self.shape, self.stride, self.offset)

    @property
    def _is_plain(self) -> bool:
        """Whether this is rows of the node, or all of it."""
        shape = self.node.shape
        plain = torch.empty(shape, device="meta").stride()
        if len(self.shape) != len(shape) or not shape or self.shape[1:] != shape[1:]:
            return self.shape == shape
        return self.stride == plain and self.offset % max(plain[0], 1) == 0

    def rows(self, trace: "Trace", start: int, stop: int) -> Tensor:
        if not self._is_plain:
            return self.make(trace)[start:stop]
        first = int(self.offset) // max(self.node.shape[1:].numel(), 1)
        return self.node.rows(trace, first + start, first + stop)


class _Result(_Node):
    """One output of an operation."""

    def __init__(self, out: Tensor, func: Any, args: Any, kwargs: Any, index: int) -> None:
        super().__init__(out.shape, out.dtype)
        self.func, self.args, self.kwargs, self.index = func, args, kwargs, index

    @property
    def is_sound(self) -> bool:
        parts = (x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, _View))
        return super().is_sound and all(x.node.is_sound for x in parts)

    def make(self, trace: "Trace") -> Tensor:
        given = self.args, self.kwargs
        args, kwargs = tree_map_only(_View, lambda x: x.make(trace), given)
        if trace.hollow:
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        return tree_leaves(self.func(*args, **kwargs))[self.index]

    def rows(self, trace: "Trace", start: int, stop: int) -> Tensor:
        """Stacks need those of their tensors alone, and so do what is joined side by side."""
        name, ndim = self.func._schema.name, len(self.shape)
        dim = self.args[1] if len(self.args) > 1 else 0
        if name == "aten::stack" and dim % ndim == 0:
            return torch.stack([x.make(trace) for x in self.args[0][start:stop]])
        if name == "aten::cat" and dim % ndim > 0:
            return torch.cat([x.rows(trace, start, stop) for x in self.args[0]], dim)
        if name == "aten::clone" and self.args[0].shape == self.shape:
            return self.args[0].rows(trace, start, stop)
        return super().rows(trace, start, stop)


class Trace(TorchDispatchMode):
    """Notes what becomes of tensors without content (`source`), and makes it with content."""

    def __init__(self) -> None:
        super().__init__()
        self._nodes: dict[int, tuple[Tensor, _Node]] = {}  # by storage, which the tensor keeps
        self._made: OrderedDict[_Node, Tensor] = OrderedDict()
        self.hollow = False  # from now on tensors are made for other processes, and none here

    def source(
        self, shape: Any, dtype: torch.dtype, read: Callable[[slice | None], Tensor]
    ) -> Tensor:
        """A tensor without content; its content is what ``read`` gives when asked for it."""
        out = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self._nodes[_key(out)] = out, _Source(out.shape, dtype, read)
        return out

    def knows(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.is_meta and _key(tensor) in self._nodes

    def can_make(self, tensor: Tensor) -> bool:
        """Whether one that it knows comes of operations that can be done again."""
        return self._view(tensor).node.is_sound

    def value(self, tensor: Tensor) -> Tensor:
        """The content of one that `knows`."""
        return self._view(tensor).make(self)

    def rows(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Some of its first dimension's, from those parts of the sources that they need."""
        return self._view(tensor).rows(self, start, stop)

    def whole(self, node: _Node) -> Tensor:
        if node in self._made:
            self._made.move_to_end(node)
        else:
            made = node.make(self)
            self._made[node] = torch.empty_like(made, device="meta") if self.hollow else made
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
        return self._made[node]

    def _view(self, tensor: Tensor) -> _View:
        return _View(self._nodes[_key(tensor)][1], tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(self.knows(x) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        views = tree_map_only(
            Tensor, lambda x: self._view(x) if self.knows(x) else x, (args, kwargs)
        )
        if not any(
            "Tensor" in str(x.type) for x in func._schema.returns
        ):  # a number or truth value
            given = tree_map_only(_View, lambda x: x.make(self), views)
            return func(*given[0], **given[1])
        out = func(*args, **kwargs)
        # What is changed in place is not noted, nor the content of tensors that are made meanwhile.
        left = tree_leaves(views)
        unknown = func._schema.is_mutable or any(isinstance(x, Tensor) and x.is_meta for x in left)
        for index, tensor in enumerate(tree_leaves(out)):
            if not isinstance(tensor, Tensor) or not tensor.is_meta:
                continue
            if not self.knows(tensor):
                node = _Result(tensor, func, views[0], views[1], index)
                self._nodes[_key(tensor)] = tensor, node
            if unknown:
                self._nodes[_key(tensor)][1].is_noted = False
        return out


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# ------------------------------------------------------------------------------------------ reading
class _Stored:
    """A tensor of a file, as transformers takes one: ``x[...].to(device, dtype)`` loads it."""

    def __init__(self, trace: Trace, stored: Any) -> None:
        self.trace, self.stored = trace, stored
        self.shape = stored.shape if isinstance(stored, Tensor) else stored.get_shape()

    def __getitem__(self, _: Any) -> "_Stored":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        own = self.stored[:0].dtype if self.shape else self.stored[...].dtype
        return self.trace.source(self.shape, dtype or own, self._read)

    def _read(self, rows: slice | None) -> Tensor:
        return self.stored[...] if rows is None else self.stored[rows]


class _File:
    """In place of ``safetensors.safe_open``."""

    def __init__(self, trace: Trace, opened: Any) -> None:
        self.trace, self.opened = trace, opened

    def keys(self) -> list[str]:
        return list(self.opened.keys())

    def metadata(self) -> Any:
        return self.opened.metadata()

    def get_slice(self, key: str) -> _Stored:
        return _Stored(self.trace, self.opened.get_slice(key))

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: Any) -> None:
        pass  # it is read from later


@contextmanager
def reading(trace: Trace) -> Iterator[None]:
    """Within the block transformers' ``from_pretrained`` loads tensors without content."""
    from transformers import modeling_utils

    hf: Any = modeling_utils
    opened, loaded = hf.safe_open, hf.load_state_dict

    def safe_open(*args: Any, **kwargs: Any) -> _File:
        return _File(trace, opened(*args, **kwargs))

    def load_state_dict(*args: Any, **kwargs: Any) -> dict[str, _Stored]:
        return {name: _Stored(trace, x) for name, x in loaded(*args, **kwargs).items()}

    with (
        mock.patch.object(hf, "safe_open", safe_open),
        mock.patch.object(hf, "load_state_dict", load_state_dict),
        trace,
    ):
        yield


class Pieces:
    """The weights of a model on the meta device, read when it is known who keeps which.

    What transformers makes of a file's tensors by an operation that cannot be done again, the first
    process alone loads as it does, with the whole model, and sends.

    Args:
        load: gives the model whole.
    """

    def __init__(self, model: nn.Module, trace: Trace, load: Callable[[], nn.Module]) -> None:
        self._trace, self._load = trace, load
        self._whole: nn.Module | None = None
        # Modules stay what they are where others are put around them, and names do not.
        self._places: list[tuple[nn.Module, str, Tensor, str]] = []
        for prefix, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    full = f"{prefix}.{name}".lstrip(".")
                    self._places.append((module, name, parameter.detach(), full))
            for name, buffer in module._buffers.items():
                if trace.knows(buffer):
                    assert buffer is not None
                    module._buffers[name] = trace.value(buffer).clone()

    def value(self, module: nn.Module, name: str) -> Tensor:
        """The content of one parameter, whole, for this process alone."""
        tensor, full = next(x[2:] for x in self._places if x[0] is module and x[1] == name)
        if self._trace.can_make(tensor):
            return self._trace.value(tensor)
        return self._of_whole(full)

    @property
    def needs_whole(self) -> bool:
        """Whether a parameter's content comes from the whole model alone."""
        return not all(self._trace.can_make(x[2]) for x in self._places)

    def load_whole(self) -> None:
        """Load the whole model, where it is not yet; the first process does before `fill` where a
        model that is sharded `needs_whole`, as the others would wait for it in an exchange."""
        if self._whole is None:
            self._whole = self._load()

    def fill(self, device: torch.device) -> None:
        """Give every parameter its content, on ``device``, of a sharded one this process's rows.

        All processes call it.  What the first one sends comes before what each reads, so that one
        that cannot read leaves none in an exchange.
        """
        done: dict[int, nn.Parameter] = {}
        for module, name, tensor, full in sorted(
            self._places, key=lambda x: self._trace.can_make(x[2])
        ):
            old = module._parameters[name]
            assert old is not None
            if id(old) not in done:
                data = self._content(old, tensor, full, device)
                done[id(old)] = nn.Parameter(data, requires_grad=old.requires_grad)
            module._parameters[name] = done[id(old)]
        self._places.clear()
        self._whole = None

    def _content(self, old: Tensor, tensor: Tensor, full: str, device: torch.device) -> Tensor:
        noted = self._trace.can_make(tensor)
        if not is_sharded(old):
            value = self._trace.value(tensor) if noted else self._of_whole(full)
            return torch.empty_like(tensor, device=device).copy_(value)
        start, stop = own_rows(old)
        local = torch.empty(stop - start, *old.shape[1:], dtype=old.dtype, device=device)
        if not noted:
            local.copy_(self._sent(old, full)[start:stop])
        elif stop > start:
            local.copy_(self._trace.rows(tensor, start, stop))
        return dtensor_like(old, local)

    def _of_whole(self, full: str) -> Tensor:
        self.load_whole()
        assert self._whole is not None
        return self._whole.get_parameter(full).detach()

    def _sent(self, old: Any, full: str) -> Tensor:
        """A parameter that the first process has, on all of them."""
        kind = old.device_mesh.device_type
        if torch.distributed.get_rank() == 0:
            value = self._of_whole(full).to(kind).contiguous()
        else:
            value = torch.empty(old.shape, dtype=old.dtype, device=kind)
        torch.distributed.broadcast(value, 0)
        return value


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has some rows of a tensor only."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def own_rows(tensor: Any) -> tuple[int, int]:
    """Which rows of a DTensor, sharded by its first dimension over its mesh's last, are here."""
    mesh = tensor.device_mesh
    count, parts = tensor.shape[0], mesh.size(mesh.ndim - 1)
    each = -(-count // parts)
    start = min(mesh.get_local_rank(mesh.ndim - 1) * each, count)
    return start, min(start + each, count)


def dtensor_like(tensor: Any, local: Tensor) -> Any:
    """A DTensor with this process's rows, sharded as another; they stay on their device.

    ``DTensor.from_local`` would move those that are offloaded to the mesh's GPU.
    """
    from torch.distributed.tensor import DTensor

    return DTensor(local, tensor._spec, requires_grad=False)  # type: ignore[call-arg]


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a parameter or buffer; of a sharded one all processes call it."""
    if not is_sharded(tensor):
        return tensor.detach()
    shard: Any = tensor.detach()
    local, kind = shard.to_local(), shard.device_mesh.device_type
    if local.device.type != kind:  # kept in CPU memory, where the processes' backend cannot send
        local = local.to(kind)
    return dtensor_like(shard, local).full_tensor()
