"""One training step on tensors without content, and the bytes that it takes.

There are no formulas here.  A model is built from its configuration with tensors that have sizes
but no content, prepared and run by the code that trains, and every storage that comes and goes is
counted.  Neither weights nor a GPU are needed: `fastdpo.kernels.device.simulated` lets the host's
code run as for one.

What no such tensor shows is added by name: the scratch memory of flash attention's backward, and
weights in 4 bits, which bitsandbytes makes of real ones.  Not counted are a CUDA context and the
allocator's fragmentation, and what libraries take inside of one operation.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdpo.data.batch import PackedPairs, pack_pairs
from fastdpo.errors import ConfigError, ModelError
from fastdpo.kernels.device import simulated
from fastdpo.loss.gemm import Products, has_native_bf16
from fastdpo.loss.objectives import given_slopes
from fastdpo.loss.plan import default_workspace_mib
from fastdpo.loss.streaming import Stash
from fastdpo.model import balance
from fastdpo.model.prepare import layout_of, packed_loss, reference_rows
from fastdpo.train.config import TrainConfig
from fastdpo.train.prepare import prepare_policy

GIB = 2**30
_ALIGNED = {"cuda": 512, "cpu": 64}  # bytes that allocators round up to
# The oldest GPU with all of the kernels' dtypes; the head's newer ways take no more.
_CAPABILITY = (8, 0)
# Bytes of an NF4 weight: half of one, a byte for each 64, and four for 256 of those.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


class Peaks(NamedTuple):
    """Bytes of one micro-batch, beside what is there whatever runs.

    Attributes:
        kept: alive where the head begins.
        head: the most while the head runs, forward and backward.
        body: the most while the body runs, forward or backward.
        host: the most in CPU memory.
    """

    kept: int
    head: int
    body: int
    host: int


class Live(TorchDispatchMode):
    """Counts the bytes of storages that operations make, from then until they are freed.

    What was there before is told by `known`.  A number read from a tensor without content is zero;
    a truth value says what it does for tokens in order: all are, none is not.  Distinct values are
    as many as there can be.  Pinned memory is the host's.
    """

    def __init__(self, aligned: int) -> None:
        super().__init__()
        self.aligned = aligned
        self.bytes, self.peak, self.host, self.host_peak = 0, 0, 0, 0
        self._seen: set[int] = set()
        self._any: Any = None  # the last tensor that says whether there is any

    def known(self, tensors: Iterable[Tensor]) -> int:
        """Take note of tensors that are not to be counted; returns their bytes."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._watch(storage, 0, 0)
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
        self.bytes, self.host = self.bytes + size, self.host + host
        self.peak, self.host_peak = max(self.peak, self.bytes), max(self.host_peak, self.host)
        self._watch(storage, size, host)

    def _watch(self, storage: Any, size: int, host: int) -> None:
        key = storage._cdata  # free for another storage as soon as this one is gone
        self._seen.add(key)
        weakref.finalize(storage, self._free, key, size, host).atexit = False

    def _free(self, key: int, size: int, host: int) -> None:
        self._seen.discard(key)
        self.bytes, self.host = self.bytes - size, self.host - host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
        return out


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


# ------------------------------------------------------------------------------- weights in 4 bits
class _Product4bit(torch.autograd.Function):
    """A product with NF4 weights: they are made bf16 for it, and again in the backward."""

    @staticmethod
    def forward(ctx, x, shape: tuple[int, int]):  # type: ignore[override]
        ctx.shape = shape
        return nn.functional.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad @ grad.new_empty(ctx.shape), None


class _Linear4bit(nn.Linear):
    """A linear layer as bitsandbytes keeps it."""

    def forward(self, input: Tensor) -> Tensor:
        x = input.to(torch.bfloat16)
        out = _Product4bit.apply(x, (self.out_features, self.in_features))
        out = out if self.bias is None else out + self.bias  # type: ignore[operator]
        return out.to(input.dtype)  # type: ignore[union-attr]


def _quantize(model: nn.Module) -> None:
    """Give all linear layers but the head weights of as many bytes as NF4 takes."""
    output = model.get_output_embeddings()  # type: ignore[operator]
    for module in list(model.modules()):
        if type(module) is nn.Linear and module is not output:
            size = int(module.weight.numel() * _NF4_BYTES)
            module.__class__ = _Linear4bit
            module.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)


# -------------------------------------------------------------------------------------- simulation
@dataclass
class Simulation:
    """One model with one set of options, on a GPU of ``gpu_gib`` or a CPU (0); many steps.

    Raises:
        ModelError: a model of this configuration cannot be built, prepared or run without content.
    """

    configuration: Any  # transformers', which is changed
    config: TrainConfig
    gpu_gib: float

    def __post_init__(self) -> None:
        from transformers import AutoModelForCausalLM

        config = self.config
        # What these find out once is for real calls.
        has_native_bf16()
        Products(torch.float32, torch.device("cpu"))
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = Live(_ALIGNED["cuda" if self.gpu_gib else "cpu"])
        with self._readable():
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    self.configuration, dtype=getattr(torch, config.dtype)
                )
                if config.load_in_4bit:
                    _quantize(model)
                model = prepare_policy(model, config, prove=False)
            # It is not built there, because peft could not move its adapters.
            with self.fake:
                model.to_empty(device="cpu")
            model.tie_weights()  # type: ignore[operator]
        self.model: Any = model
        self.layout = layout_of(model)
        self.aux_loss_coef = balance.coefficient(model, config.router_aux_loss_coef)
        self.weights = self.live.known([*model.parameters(), *model.buffers()])
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.gradients = sum(self.live.rounded(p.nbytes) for p in self.trained)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Say in one line that a model cannot be built or simulated."""
        try:
            yield
        except (ModelError, ConfigError):
            raise
        # Code of models that were not made for tensors without content can fail in any way.
        except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
            raise ModelError(
                f"the memory of a model with {type(self.configuration).__name__} cannot be "
                f"simulated: {' '.join(str(error).split())[:200]}"
            ) from error

    def run(self, pairs: Sequence[Any], *, accumulated: bool) -> Peaks:
        """A micro-batch, forward and backward; ``accumulated``: after others of its step."""
        from transformers import masking_utils

        live = self.live
        batch = pack_pairs(pairs, layout=self.layout)
        gpu = simulated(_CAPABILITY) if self.gpu_gib else nullcontext()
        masks = nullcontext()
        if self.layout == "padded":
            # Padded rows need no mask, but transformers does not look at tensors that it takes for
            # a trace, and makes one of (T, T) to be safe.
            masks = mock.patch.object(masking_utils, "is_tracing", lambda *_: False, create=True)
        start = live.bytes  # of an earlier step, where the collector has not come yet
        with self._readable(), self.fake, gpu, Stash.apart(), masks:
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter) if accumulated else None
            live.known(p.grad for p in self.trained if p.grad is not None)
            # On a CPU the head keeps a buffer from one call to the next.
            for _ in range(1 if self.gpu_gib else 2):
                if not accumulated:
                    self.model.zero_grad()
                with live:
                    peaks = self._micro_batch(batch, start)
            self.model.zero_grad()
        return peaks

    def _micro_batch(self, batch: PackedPairs, start: int) -> Peaks:
        live, config = self.live, self.config
        before, edges = live.bytes, [live.bytes]
        live.host_peak = live.host

        def head_begins(_: Any, args: tuple[Tensor, ...]) -> None:
            edges.extend([live.peak, live.bytes])
            args[0].register_hook(head_is_done)
            live.restart()

        def head_is_done(_: Tensor) -> None:
            edges.append(live.peak)
            live.restart()

        workspace_mib = config.workspace_mib
        if workspace_mib is None:
            workspace_mib = default_workspace_mib(int(self.gpu_gib * GIB))
        live.restart()
        hook = self.model.get_output_embeddings().register_forward_pre_hook(head_begins)
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16, cache_enabled=False):
                batch, given = self._given(batch)
                result = packed_loss(
                    self.model, batch, **given, workspace_mib=workspace_mib, impl=config.impl,
                    router_aux_loss_coef=self.aux_loss_coef,
                )  # fmt: skip
            result.loss.backward()
        finally:
            hook.remove()
        _, forward, kept, head = edges
        return Peaks(kept - before, head - start, max(forward, live.peak) - start, live.host_peak)

    def _given(self, batch: PackedPairs) -> tuple[PackedPairs, dict[str, Any]]:
        """A batch as its objective takes it, and what the loss gets beside it.

        A reference that gives a KL is run here, on weights that `step.fixed_bytes` counts.
        """
        objective = self.config.objective
        zeros_S = torch.zeros(batch.firsts[-1], dtype=torch.float64)
        if objective.couples:  # it trains with slopes that are known
            objective = given_slopes(objective)
        if objective.needs_scores and batch.scores_S is None:
            batch = replace(batch, scores_S=zeros_S)
        given: dict[str, Any] = {"objective": objective, "ref_logp_S": None}
        if objective.needs_kl:
            given["reference"] = reference_rows(self.model, batch)
        elif objective.needs_reference:
            given["ref_logp_S"] = zeros_S
        return batch, given
