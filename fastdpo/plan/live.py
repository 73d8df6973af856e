"""Storages counted as they come and go, and what a process sends to others.

`Live` sees every operation on tensors without content.  FSDP2 frees and re-allocates the weights of
a layer by resizing their storages, which is no operation: `Live` stands in for that method too.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a collective is called, by a part of its operation's name.
_COLLECTIVES = {
    "allgather": "all-gather", "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "allreduce": "all-reduce", "all_reduce": "all-reduce",
    "alltoall": "all-to-all", "all_to_all": "all-to-all",
}  # fmt: skip
_OF_PROCESSES = ("c10d", "_c10d_functional")


class _Bytes(NamedTuple):
    """Of a storage, as they are counted: on the device, in pinned memory."""

    device: int
    host: int


class Live(TorchDispatchMode):
    """Counts the bytes of storages that operations make, from then until they are freed.

    What was there before is told by `known`.  A number read from a tensor without content is zero;
    a truth value says what it does for tokens in order: all are, none is not.  Distinct values are
    as many as there can be.  Pinned memory is the host's.

    Attributes:
        bytes, peak: alive on the device now, and the most since `restart`.
        host, host_peak: the same of pinned memory.
        whole, whole_peak: the same of what FSDP2 gathers and reduces: weights and gradients of
            parts of the model that are whole just now, and its buffers; a part of `bytes`.
        sent: bytes that this process sends in all, by kind of collective, where each is done in a
            ring: of n processes, (n - 1) / n of what is gathered, and twice that to sum it.
    """

    def __init__(self, aligned: int) -> None:
        super().__init__()
        self.aligned = aligned
        self.bytes, self.peak, self.host, self.host_peak = 0, 0, 0, 0
        self.whole, self.whole_peak = 0, 0
        self.sent: Counter[str] = Counter()
        self._seen: dict[int, _Bytes] = {}
        self._whole: set[int] = set()
        self._patches: list[Any] = []  # one a time that it is entered
        self._any: Any = None  # the last tensor that says whether there is any

    def __enter__(self) -> Any:
        own = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> Any:
            out = own(storage, size)
            self._resized(storage)
            return out

        patch = mock.patch.object(torch.UntypedStorage, "resize_", resize)
        patch.start()
        self._patches.append(patch)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        self._patches.pop().stop()
        super().__exit__(*args)

    def known(self, tensors: Iterable[Tensor]) -> int:
        """Take note of tensors that are not to be counted; returns their bytes.

        Of one that is sharded over processes, this process's part.
        """
        total = 0
        for tensor in tensors:
            storage = local(tensor).untyped_storage()
            if storage._cdata not in self._seen:
                self._watch(storage, _Bytes(0, 0))
                total += self.rounded(storage.nbytes())
        return total

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.bytes

    def rounded(self, size: int) -> int:
        return -(-size // self.aligned) * self.aligned

    def _add(self, storage: Any, pinned: bool) -> None:
        if storage._cdata in self._seen:
            return
        size, host = self.rounded(storage.nbytes()), 0
        if pinned:  # rounded up to powers of two
            size, host = 0, 1 << max(storage.nbytes() - 1, 0).bit_length()
        self._count(size, host)
        self._watch(storage, _Bytes(size, host))

    def _count(self, size: int, host: int = 0) -> None:
        self.bytes, self.host = self.bytes + size, self.host + host
        self.peak, self.host_peak = max(self.peak, self.bytes), max(self.host_peak, self.host)

    def _watch(self, storage: Any, size: _Bytes) -> None:
        key = storage._cdata  # free for another storage as soon as this one is gone
        self._seen[key] = size
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        size = self._seen.pop(key)
        self._count(-size.device, -size.host)
        if key in self._whole:
            self._whole.discard(key)
            self.whole -= size.device

    def _resized(self, storage: Any) -> None:
        """A storage that is counted has another size now."""
        before = self._seen.get(storage._cdata)
        if before is None:  # of a tensor with content, or none of ours
            return
        change = self.rounded(storage.nbytes()) - before.device
        self._seen[storage._cdata] = before._replace(device=before.device + change)
        if storage._cdata in self._whole:
            self.whole += change
            self.whole_peak = max(self.whole_peak, self.whole)
        self._count(change)

    def _is_whole(self, tensors: Any) -> None:
        """Note that these are gathered from all processes, or on their way to them."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor) or isinstance(tensor, DTensor):
                continue
            key = tensor.untyped_storage()._cdata
            if key in self._seen and key not in self._whole:
                self._whole.add(key)
                self.whole += self._seen[key].device
        self.whole_peak = max(self.whole_peak, self.whole)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own operations come here
        kwargs = dict(kwargs or {})
        pinned = kwargs.pop("pin_memory", False)
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0] is not self._any if args[0].dtype == torch.bool else 0
        rule = _RULES.get(func.name())
        if rule is None:
            out = func(*args, **kwargs)
        else:
            with self:  # what it makes counts too
                out = rule(*args, **kwargs)
        if func is torch.ops.aten.any.default:
            self._any = out
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage(), pinned)
        if func.namespace in _OF_PROCESSES:
            self._sends(func.name(), args, out)
        elif func.namespace == "fsdp":
            self._is_whole((args, kwargs, out))
        return out

    def _sends(self, name: str, args: Any, out: Any) -> None:
        """Count a collective, whose larger side is of all processes."""
        kind = next((kind for part, kind in _COLLECTIVES.items() if part in name), None)
        if kind is None:
            return
        sides = [_tensors(side) for side in (*args[:2], out)]
        whole = max(sides, key=lambda side: sum(x.nbytes for x in side))
        size, processes = sum(x.nbytes for x in whole), _group_size(args)
        rounds = 2 if kind == "all-reduce" else 1
        self.sent[kind] += rounds * size * (processes - 1) // processes
        if kind in ("all-gather", "reduce-scatter"):
            self._is_whole(whole)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is sharded over several, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _group_size(args: Any) -> int:
    """Of a collective's arguments, how many processes take part: its group is one, or its name."""
    from torch._C._distributed_c10d import ProcessGroup, _resolve_process_group

    for value in reversed(args):
        if isinstance(value, torch.ScriptObject):
            try:
                return ProcessGroup.unbox(value).size()
            except RuntimeError:  # how it reduces
                continue
        if isinstance(value, str) and value not in ("sum", "avg", "max", "min", "product"):
            return _resolve_process_group(value).size()  # type: ignore[arg-type]
    return 1


# ------------------------------------------------------------------ operations with a rule of ours
def _unique(values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(values), torch.empty_like(values), torch.empty_like(values)


def _linear(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _grouped_mm(left: Tensor, right: Tensor, offsets: Tensor, *_: Any, **__: Any) -> Tensor:
    """Experts; torch's own rule knows bf16 alone.  Two matrices give one product a group."""
    first = ()
    if left.ndim == right.ndim:
        first = (left if left.ndim == 3 else offsets).shape[:1]
    return left.new_empty(*first, left.shape[-2], right.shape[-1])


def _flash_backward(grad: Tensor, q_THd: Tensor, k_KHd: Tensor, v_KHd: Tensor, *rest: Any) -> Any:
    """The gradients, and what flash attention 2 takes to make them.

    Those are sums in fp32, of tokens rounded up to tiles, and gradients of keys and values for
    every head of queries.
    """
    (T, H, d), K = q_THd.shape, k_KHd.shape[0]
    out = tuple(torch.empty_like(x) for x in (q_THd, k_KHd, v_KHd))
    rows = T + 128 * (len(rest[2]) - 1)
    scratch = [q_THd.new_empty(H, rows, dtype=torch.float32)]
    scratch.append(q_THd.new_empty(rows, H, -(-d // 32) * 32, dtype=torch.float32))
    if k_KHd.shape[1] != H:
        scratch += [q_THd.new_empty(K, H, d) for _ in range(2)]
    return out


# Operations whose sizes torch does not know without content, or not all of them.
_RULES: dict[str, Any] = {
    "aten::_unique2": _unique,
    "aten::_grouped_mm": _grouped_mm,
    "mkldnn::_linear_pointwise": _linear,
    "mkldnn::_linear_pointwise.binary": lambda x, added, *rest: _linear(x, *rest),
    "torch_attn::_varlen_attn_backward": _flash_backward,
}
