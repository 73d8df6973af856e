"""Peak memory of a training step, known before a GPU is rented: what fits, and which option helps.

There are no formulas for activations here.  The model is built from its configuration with tensors
that have sizes but no content, prepared as `fastdpo.train.trainer` prepares it, and one micro-batch
runs forward and backward while every storage that comes and goes is counted.  Weights are not
needed, nor is a GPU.

What no simulated tensor shows is taken from elsewhere: on CUDA, flash attention and the fused head
are stand-ins that make and keep tensors of the sizes that the kernels do.  Not counted are a CUDA
context and the allocator's fragmentation (`usable_bytes` sets some aside for them), and on a CPU
what libraries take inside of one operation.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdpo.data.batch import LAYOUTS, Layout, PackedPairs, Segments, TokenizedPair, pack_pairs
from fastdpo.errors import ConfigError, ModelError
from fastdpo.loss import ops
from fastdpo.loss.gemm import Products, has_native_bf16
from fastdpo.loss.objectives import lr_dpo
from fastdpo.loss.passes import Call, Pairs
from fastdpo.loss.plan import default_workspace_mib
from fastdpo.loss.streaming import Block, Grads, Head, Needs, Rows, Stash
from fastdpo.model import attention, balance, head, offload, tiling
from fastdpo.model import prepare as policy
from fastdpo.model.load import check_folder, refuse_quantized
from fastdpo.train.config import TrainConfig
from fastdpo.train.prepare import with_adapters

GIB = 2**30
# Of a GPU's memory, a CUDA context with its libraries takes this, and of the rest the caching
# allocator loses a share to gaps between blocks.  Both are estimates that no GPU has confirmed.
CONTEXT_GIB = 0.6
ALLOCATED_SHARE = 0.95
_ALIGNED = {"cuda": 512, "cpu": 64}  # bytes that allocators round up to
_NAME = "fastdpo_sized"
# Bytes of an NF4 weight: half of one, a byte for each 64, and four for 256 of those.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Estimate:
    """Bytes of one training step.  They are not all alive at once: `peak` is less than their sum.

    Attributes:
        peak: the most that is alive at once on the device.
        host: CPU memory that offloaded activations take, for a GPU.
        weights: of the policy, with adapters and buffers.
        gradients: of what is trained.
        optimizer: AdamW's two moments.
        reference: a second copy of the weights, if each step computes the reference.
        activations: what the body's forward keeps for its backward, checkpoints or all.
        head: the most that the head adds to that: workspace, accumulators, its gradients.
        backward: the most that the body's backward adds, of which new gradients are a part.
        pairs: of the micro-batch.
        tokens: of the micro-batch.
    """

    peak: int
    host: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    head: int
    backward: int
    pairs: int
    tokens: int

    def __str__(self) -> str:
        parts = (
            "weights",
            "gradients",
            "optimizer",
            "reference",
            "activations",
            "head",
            "backward",
        )
        shown = ", ".join(f"{x} {_gib(getattr(self, x))}" for x in parts if getattr(self, x))
        host = f", and {_gib(self.host)} of CPU memory" if self.host else ""
        return f"peak {_gib(self.peak)}{host} for {self.tokens} tokens ({shown})"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def estimate(
    model: Any,
    config: TrainConfig,
    *,
    prompt: int,
    response: int,
    device: str = "cuda",
    gpu_gib: float = 24.0,
) -> Estimate:
    """Peak memory of a step on pairs of ``prompt`` tokens and two responses of ``response`` tokens.

    A micro-batch has as many of these pairs as fit ``config.max_tokens`` and ``batch_size``, at
    least one.  ``use_liger_kernel`` is counted as if it were off, which needs more.

    Args:
        model: folder (only its config.json is read) or hub name, or a transformers configuration.
        device: "cuda" or "cpu", the target; it need not be here.
        gpu_gib: memory of the GPU, in GiB, of which the head's default workspace is a part.

    Raises:
        ConfigError: an argument has an impossible value.
        ModelError: the model's configuration cannot be had, or not be simulated.
    """
    for name, value in (("prompt", prompt), ("response", response)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name}={value!r} must be a positive number of tokens")
    if device not in _ALIGNED:
        raise ConfigError(f"device={device!r} must be one of {', '.join(_ALIGNED)}")
    if device == "cuda":
        usable_bytes(gpu_gib)  # it may be no memory of a GPU
    else:
        gpu_gib = 0.0
    return _Simulation(_configuration(model), config, gpu_gib).step(prompt, response)


def _configuration(model: Any) -> Any:
    """The transformers configuration of a folder or hub name; an own copy of one that is given."""
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(model, PreTrainedConfig):
        refuse_quantized(model, type(model).__name__)
        return type(model).from_dict(model.to_dict())
    check_folder(str(model))
    try:
        found = AutoConfig.from_pretrained(str(model))
    except (OSError, ValueError, ImportError) as error:
        short = " ".join(str(error).split())[:300]
        raise ModelError(
            f"config.json of model={str(model)!r} cannot be had (a folder with that one file is "
            f"enough): {short}"
        ) from error
    refuse_quantized(found, str(model))
    return found


# -------------------------------------------------------------------------------------- what fits
# Changes that save memory, each by itself or with what it needs; the last are all together.
_SAVINGS: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": True},
    {"precompute_ref_log_probs": True},
    {"mlp_tile_tokens": 8192},
    {"activation_offloading": True},
    {"dtype": "bfloat16"},
    {"use_peft": True},
    {"use_peft": True, "dtype": "bfloat16"},
    {"use_peft": True, "bf16": True, "load_in_4bit": True},
    {
        "use_peft": True, "bf16": True, "load_in_4bit": True, "dtype": "bfloat16",
        "gradient_checkpointing": True, "mlp_tile_tokens": 8192, "activation_offloading": True,
    },
)  # fmt: skip
_LENGTH_STEP = 64
_NO_LIMIT = 2**20  # tokens, where a model names no limit of its own


@dataclass(frozen=True)
class Option:
    """What one change of the configuration gives.

    Attributes:
        changes: options that differ from the configuration asked about; none for itself.
        longest: tokens of the longest response with its prompt that fits, 0 if none does.
        estimate: of a pair of that length, or of the shortest pair if none fits.
    """

    changes: dict[str, Any]
    longest: int
    estimate: Estimate

    @property
    def name(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.changes.items())


@dataclass(frozen=True)
class Fit:
    """What fits on a GPU: the configuration as it is first, then each change that saves memory.

    Attributes:
        usable: bytes of it that tensors can have, see `usable_bytes`.
        limit: tokens of the longest sequence the model takes.
    """

    gpu_gib: float
    usable: int
    limit: int
    options: tuple[Option, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest response with its prompt, under the configuration as it is."""
        return self.options[0].longest

    @property
    def estimate(self) -> Estimate:
        return self.options[0].estimate

    def __str__(self) -> str:
        rows = [
            f"Longest pair on {self.gpu_gib:g} GiB, of which tensors can have {_gib(self.usable)}; "
            "one pair a micro-batch, a quarter of each side is prompt"
        ]
        for option in self.options:
            what = option.name or "as configured"
            if not option.longest:
                rows.append(f"      none  {what}: needs {_gib(option.estimate.peak)} at least")
                continue
            most = " (the model's limit)" if option.longest == self.limit else ""
            found = option.estimate
            host = f" and {_gib(found.host)} of CPU memory" if found.host else ""
            rows.append(f"2 x {option.longest:>6}{most}  {what}: {_gib(found.peak)}{host}")
        if not find_spec("peft"):
            rows.append("use_peft is left out: it needs peft, pip install 'fastdpo[peft]'")
        return "\n".join(rows)


def usable_bytes(gpu_gib: float) -> int:
    """Bytes of a GPU's memory that tensors can have.

    Raises:
        ConfigError: it is no memory of a GPU.
    """
    number = isinstance(gpu_gib, int | float) and not isinstance(gpu_gib, bool)
    if not number or not CONTEXT_GIB < gpu_gib < float("inf"):
        raise ConfigError(
            f"gpu_gib={gpu_gib} must be the memory of a GPU in GiB, over the {CONTEXT_GIB} that "
            "CUDA itself takes"
        )
    return int((gpu_gib - CONTEXT_GIB) * ALLOCATED_SHARE * GIB)


def longest_pair(model: Any, config: TrainConfig, gpu_gib: float) -> Fit:
    """The longest pairs that a GPU can train on, as configured and with what saves memory.

    A pair is 2 x N tokens: a prompt of N / 4 and two responses of the rest, alone in its
    micro-batch, so ``config.max_length`` and ``max_tokens`` do not matter here.

    Args:
        model: as in `estimate`.
        gpu_gib: memory of the GPU, in GiB.

    Raises:
        ConfigError: ``gpu_gib`` is no memory of a GPU, or nothing fits whatever the options.
        ModelError: as in `estimate`.
    """
    usable, configuration = usable_bytes(gpu_gib), _configuration(model)
    text = configuration.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or _NO_LIMIT
    options: list[Option] = []
    guess = limit if limit <= 16384 else 4096
    for changes in ({}, *_SAVINGS):
        wanted = {name: x for name, x in changes.items() if getattr(config, name) != x}
        if changes and (not wanted or any(wanted == option.changes for option in options)):
            continue
        changed = replace(config, **wanted)
        if changed.use_peft and not config.use_peft and not find_spec("peft"):
            continue  # its layers are peft's
        if changed.use_peft and not config.use_peft and "precompute_ref_log_probs" in wanted:
            continue
        simulation = _Simulation(_configuration(configuration), changed, gpu_gib)
        options.append(Option(wanted, *_longest(simulation, usable, limit, guess)))
    if not any(option.longest for option in options):
        least = min(options, key=lambda option: option.estimate.peak)
        how = f" with {least.name}" if least.changes else ""
        raise ConfigError(
            f"gpu_gib={gpu_gib} is too small for this model whatever the options: the shortest "
            f"pair needs {_gib(least.estimate.peak)}{how}, and tensors can have {_gib(usable)}"
        )
    return Fit(gpu_gib, usable, limit, tuple(options))


def _longest(
    simulation: "_Simulation", usable: int, limit: int, guess: int
) -> tuple[int, Estimate]:
    """Longest side that fits, to one percent, and its estimate; (0, that of the shortest) if none.

    The peak is close to a line in the number of tokens, so few guesses do.
    """

    def at(length: int) -> Estimate:
        prompt = max(1, length // 4)
        return simulation.step(prompt, length - prompt, pairs=1)

    shortest = min(_LENGTH_STEP, limit)
    before, before_peak = 0, simulation.fixed
    low, found, high, length = 0, None, limit + 1, max(shortest, min(guess, limit))
    while before_peak <= usable or before:
        tried = at(length)
        if tried.peak <= usable:
            low, found = length, tried
        else:
            high = length
        slope = (tried.peak - before_peak) / (length - before)
        before, before_peak = length, tried.peak
        # A little short of where the line ends, so that the guess tends to fit.
        room = 0.997 * (usable - tried.peak) / slope if slope > 0 else limit
        if 0 <= room < max(length // 100, _LENGTH_STEP):
            break
        length = int(min(length + room, high - 1, limit))
        if length < limit:
            length = length // _LENGTH_STEP * _LENGTH_STEP
        if length <= low:  # the line says less than what was found to fit, or nothing
            length = (low + high) // 2 // _LENGTH_STEP * _LENGTH_STEP
        if length <= low + low // 100 or length < shortest or length >= high:
            break
    return (0, at(shortest)) if found is None else (low, found)


# ------------------------------------------------------------------------------------ live storages
class _Live(TorchDispatchMode):
    """Counts the bytes of storages that operations make, from then until they are freed.

    What was there before is told by `known`.  A number read from a tensor without content is zero,
    a truth value is ``answer``, and distinct values are as many as there can be.
    """

    def __init__(self, aligned: int) -> None:
        super().__init__()
        self.aligned = aligned
        self.bytes, self.peak, self.host, self.host_peak = 0, 0, 0, 0
        # True to transformers, that asks whether all tokens of a row are one sequence; False to the
        # head, that asks whether any target is to be ignored.
        self.answer = True
        self.to_host = False
        self._seen: set[int] = set()

    def known(self, tensors: Iterator[Tensor]) -> int:
        """Take note of tensors that are not to be counted; returns their bytes."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._watch(storage, 0, False)
                total += self._rounded(storage.nbytes())
        return total

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.bytes

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Within it, new storages are the host's."""
        self.to_host = True
        try:
            yield
        finally:
            self.to_host = False

    def _rounded(self, size: int) -> int:
        return -(-size // self.aligned) * self.aligned

    def _add(self, storage: Any) -> None:
        if storage._cdata in self._seen:
            return
        size = storage.nbytes()
        if self.to_host:  # pinned buffers are rounded up to powers of two
            size = 1 << max(size - 1, 0).bit_length()
            self.host += size
            self.host_peak = max(self.host_peak, self.host)
        else:
            size = self._rounded(size)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self._watch(storage, size, self.to_host)

    def _watch(self, storage: Any, size: int, host: bool) -> None:
        key = storage._cdata  # free for another storage as soon as this one is gone
        self._seen.add(key)
        weakref.finalize(storage, self._free, key, size, host).atexit = False

    def _free(self, key: int, size: int, host: bool) -> None:
        self._seen.discard(key)
        if host:
            self.host -= size
        else:
            self.bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.answer if args[0].dtype == torch.bool else 0
        if func is torch.ops.aten._unique2.default:
            values = args[0]
            out = torch.empty_like(values), torch.empty_like(values), torch.empty_like(values)
        elif func.name().startswith(
            "mkldnn::_linear_pointwise"
        ):  # the head's products; they have no rule for sizes
            weight = args[2 if func._overloadname == "binary" else 1]
            out = args[0].new_empty(args[0].shape[0], weight.shape[0])
        elif func is torch.ops.aten._grouped_mm.default:
            # Experts; its own rule knows bf16 alone.  Two matrices give one product a group.
            left, right = args[:2]
            if left.ndim == right.ndim:
                first = (left if left.ndim == 3 else args[2]).shape[:1]
            else:
                first = ()
            out = left.new_empty(*first, left.shape[-2], right.shape[-1])
        else:
            out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return out


# --------------------------------------------------------------------------------------- stand-ins
class _Flash(torch.autograd.Function):
    """What flash attention 2 takes, keeps and gives: q, k, v, the output, a log-sum-exp a query."""

    @staticmethod
    def forward(ctx, q_THd, k_KHd, v_KHd, segments: int):  # type: ignore[override]
        out_THd = torch.empty_like(q_THd)
        lse_HT = q_THd.new_empty(q_THd.shape[1], q_THd.shape[0], dtype=torch.float32)
        ctx.save_for_backward(q_THd, k_KHd, v_KHd, out_THd, lse_HT)
        ctx.segments = segments
        return out_THd

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[override]
        q_THd, k_KHd, v_KHd, *_ = ctx.saved_tensors
        (T, H, d), K = q_THd.shape, k_KHd.shape[0]
        out = [torch.empty_like(x) for x in (q_THd, k_KHd, v_KHd)]
        # Sums in fp32, of tokens rounded up to tiles; gradients of keys for every head of queries.
        rows = T + 128 * ctx.segments
        scratch = [q_THd.new_empty(H, rows, dtype=torch.float32)]
        scratch.append(q_THd.new_empty(rows, H, -(-d // 32) * 32, dtype=torch.float32))
        if k_KHd.shape[1] != H:
            scratch += [q_THd.new_empty(K, H, d) for _ in range(2)]
        del scratch
        return *out, None


def _attention_on_cuda(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """`fastdpo.model.attention.packed_attention` as a GPU of the last years runs it."""
    assert segments is not None
    q_THd, k_KHd, v_KHd = attention.seen_by(segments, query, key, value)
    fits = q_THd.dtype == torch.bfloat16 and (
        q_THd.shape[-1] == v_KHd.shape[-1] <= attention._FLASH_MAX_HEAD_DIM
    )
    if fits and (softcap is None or attention.has_flash_attn()):
        return _Flash.apply(q_THd, k_KHd, v_KHd, len(segments.bounds_q) - 1)[None], None  # type: ignore[index]
    out = attention.sdpa(q_THd, k_KHd, v_KHd, segments, scaling, sliding_window, softcap)
    return out[None], None


class _FusedSizes:
    """`fastdpo.loss.fused.FusedStreamer` without its kernels: their inputs, results and tiles."""

    acc_dtype = torch.float32

    def __init__(self, head: Head, plan: Any) -> None:
        self.head, self.plan = head, plan
        self.V, self.D = head.w_VD.shape

    def _bytes(self, size: int) -> Tensor:
        return self.head.w_VD.new_empty(size, dtype=torch.uint8)

    def _grad_tile(self, into: Grads) -> None:
        if into.w is not None and into.w.dtype != torch.float32:  # else the product adds to it
            self._bytes(min(self.plan.grad_tile_bytes, 4 * self.V * self.D))

    def _matrix(self, rows: int, columns: int) -> Tensor:
        return self.head.w_VD.new_empty(rows, -(-columns // 64) * 64)

    def forward(self, h_ND: Tensor, target_N: Tensor, *, keep: bool, **_: Any) -> Block:
        rows = len(h_ND)
        stash = self._matrix(rows, self.V) if keep else None
        # A tile that is folded, or two fp32 sums a tile of 128 columns that is not kept.
        self._bytes(max(self.plan.tile_bytes, rows * 8 * -(-self.V // 128)))
        logp, lse, shift, own = (h_ND.new_empty(rows, dtype=torch.float32) for _ in range(4))
        return Block(logp, lse, shift, stash, own)

    def backward(
        self, block: Block, h_ND: Tensor, target_N: Tensor, coef_N: Tensor, needs: Needs,
        into: Grads, *, final: bool, rows: Rows | None = None, out_ND: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        scaled_ND = torch.empty_like(h_ND) if into.w is not None else None
        if scaled_ND is not None:
            self._grad_tile(into)
        if not needs.h:
            return None
        dh_ND = h_ND.new_empty(h_ND.shape, dtype=torch.float32)
        return dh_ND if rows is None else self.place(rows, dh_ND, None)

    def recompute_backward(
        self, blocks: Any, rows: Rows, coef_N: Tensor, needs: Needs, into: Grads, ref: Any = None
    ) -> None:
        h_ND, _ = rows.block(0, coef_N.shape[0])
        scaled_ND = torch.empty_like(h_ND)
        stash_NC = self._matrix(len(h_ND), self.plan.vocab_chunk)
        dh_ND = h_ND.new_empty(h_ND.shape, dtype=torch.float32)
        self._grad_tile(into)
        del scaled_ND, stash_NC
        if needs.h:
            into.h = self.place(rows, dh_ND, None)

    def place(
        self, rows: Rows, x_ND: Tensor, scale_N: Tensor | None, *, reuse: bool = False
    ) -> Tensor:
        return torch.empty_like(rows.h_TD)

    def rows_of(self, rows: Rows, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return rows.block(start, stop)

    def add_rows(self, *_: Any) -> None:
        """Nothing is allocated for it."""


class _FusedCall(Call):
    """A call that the kernels would run."""

    def streamer(self, w_VD: Tensor, bias_V: Tensor | None) -> Any:
        return _FusedSizes(Head(w_VD, bias_V, self.scale, self.softcap), self.plan)


class _SizedPairs(Pairs):
    """Pairs whose loss has no content."""

    def loss_and_slope(
        self, logp_S: Tensor, ref_logp_S: Tensor, pairs: slice
    ) -> tuple[Tensor, Tensor]:
        slope_S = torch.zeros_like(logp_S, dtype=torch.float64)
        return slope_S[0], slope_S


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
class _Simulation:
    """One model with one set of options, on a GPU of ``gpu_gib`` or a CPU (0); many steps."""

    def __init__(self, configuration: Any, config: TrainConfig, gpu_gib: float) -> None:
        self.config, self.gpu_gib = config, gpu_gib
        self.device = device = "cuda" if gpu_gib else "cpu"
        # What these find out once is for real calls.
        has_native_bf16()
        Products(torch.float32, torch.device("cpu"))
        self.fake = FakeTensorMode()
        self.live = _Live(_ALIGNED[device])
        name = configuration.__class__.__name__
        with self._readable(name):
            with torch.device("meta"):
                self.model = self._prepare(configuration)
            with self.fake:
                _onto_the_device(self.model)
        self.layout = policy.layout_of(self.model)
        self.balanced = balance.coefficient(self.model, config.router_aux_loss_coef) > 0
        everything = [*self.model.parameters(), *self.model.buffers()]
        self.weights = self.live.known(iter(everything))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.gradients = sum(self.live._rounded(p.nbytes) for p in self.trained)
        self.optimizer = 2 * self.gradients
        twice = not config.precompute_ref_log_probs and not config.use_peft
        self.reference = self.weights if twice else 0

    @property
    def fixed(self) -> int:
        """Bytes that are there whatever runs."""
        return self.weights + self.optimizer + self.reference

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        """Say in one line that a model cannot be built or simulated."""
        try:
            yield
        except (ModelError, ConfigError):
            raise
        # Code of models that were not made for tensors without content can fail in any way.
        except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
            short = " ".join(str(error).split())[:200]
            raise ModelError(
                f"the memory of a model with {name} cannot be simulated: {short}"
            ) from error

    def _prepare(self, configuration: Any) -> Any:
        """As `train.trainer` and `model.prepare.prepare_model` do, but for their checks."""
        from transformers import AutoModelForCausalLM

        config = self.config
        model = AutoModelForCausalLM.from_config(configuration, dtype=getattr(torch, config.dtype))
        if config.load_in_4bit:
            _quantize(model)
        model = with_adapters(model, config)
        try:
            head.attach(model)
        except ValueError as error:
            raise ModelError(str(error)) from error
        policy._disable_dropout(model)
        if config.mlp_tile_tokens is not None:
            tiling.tile_mlp(model, config.mlp_tile_tokens)
        if config.activation_offloading and self.device == "cuda":
            self._offload(model)
        head.base_of(model)._fastdpo_layout = self._use_layout(model)
        if config.gradient_checkpointing:
            policy.checkpoint_activations(model)
        return model.train()

    def _use_layout(self, model: Any) -> Layout:
        """The first layout that the model's kind allows; what it computes is not looked at."""
        wanted = LAYOUTS if self.config.layout == "auto" else (self.config.layout,)
        reasons = []
        for layout in wanted:
            try:
                policy._refuse_state(model, layout)
                if layout != "padded":
                    attention.use_packed_attention(model)
                    if self.device == "cuda":
                        _use_attention_on_cuda(model)
                return Layout(layout)
            except ValueError as error:
                reasons.append(f"{layout}: {error}")
                if model.config._attn_implementation in (attention.NAME, _NAME):
                    attention.use_own_attention(model)
        raise ModelError("; ".join(reasons))

    def _offload(self, model: Any) -> None:
        """`fastdpo.model.offload.offload`, for tensors that only say they were on a GPU."""
        body, live = head.base_of(model).base_model, self.live

        def pack(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
            size = offload._without_repeats(tensor).numel() * tensor.element_size()
            if size < offload._MIN_BYTES or offload._is_parameter(tensor):
                return tensor, None
            memory_E = offload._memory(tensor.detach())
            with live.on_host():
                host_E = torch.empty(memory_E.shape, dtype=tensor.dtype)
            # Its shape without its memory.
            return host_E, torch.empty_strided((), (), dtype=tensor.dtype).expand(tensor.shape)

        def unpack(packed: tuple[Tensor, Tensor | None]) -> Tensor:
            kept, like = packed
            return kept if like is None else torch.empty(like.shape, dtype=like.dtype)

        kept_forward = body.forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(pack, unpack):
                return kept_forward(*args, **kwargs)

        body.forward = MethodType(forward, body)

    def step(self, prompt: int, response: int, pairs: int | None = None) -> Estimate:
        """One micro-batch, after the first one of the step if it has several."""
        config, live = self.config, self.live
        pair = TokenizedPair([0] * prompt, [0] * response, [0] * response)
        if pairs is None:
            most = max(1, config.max_tokens // pair.num_tokens(self.layout))
            pairs = min(most, config.batch_size)
        real = pack_pairs([pair] * pairs, layout=self.layout)
        several = pairs < config.batch_size
        name = type(head.base_of(self.model)).__name__
        masks = _masks_as_for_real(self.layout)
        before, kept, peaks = 0, 0, (0, 0)
        start = live.bytes  # of an earlier step, where the collector has not come yet
        with self._readable(name), self.fake, _no_idle_stash(), masks:
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter) if several else None
            live.known(p.grad for p in self.trained if p.grad is not None)
            batch = _without_content(real)
            # On a CPU the head keeps a buffer from one call to the next.
            for _ in range(2 if self.device == "cpu" else 1):
                if not several:
                    self._clear()
                with live:
                    before = live.bytes
                    live.host_peak = live.host
                    kept, peaks = self._run(batch, real.bounds_S1.tolist())
            self._clear()
        fixed = self.fixed + (self.gradients if several else 0)
        # When the optimizer steps there are the gradients, and it makes nothing of its own.
        peak = max(fixed + max(peaks) - start, self.fixed + self.gradients)
        return Estimate(
            peak=peak,
            host=live.host_peak,
            weights=self.weights,
            gradients=self.gradients,
            optimizer=self.optimizer,
            reference=self.reference,
            activations=kept - before,
            head=peaks[0] - kept,
            backward=max(0, peaks[1] - kept),
            pairs=pairs,
            tokens=real.num_tokens,
        )

    def _clear(self) -> None:
        for parameter in self.trained:
            parameter.grad = None

    def _run(self, batch: PackedPairs, edges: list[int]) -> tuple[int, tuple[int, int]]:
        """Bytes alive where the head begins, and the peaks of the head and of the body."""
        live, found = self.live, {}

        def loss(h_TD: Tensor, **parameters: Any) -> Tensor:
            found["kept"], found["forward"] = live.bytes, live.peak
            h_TD.register_hook(head_is_done)
            live.restart()
            live.answer = False
            try:
                return self._head(h_TD, batch, edges, **parameters)
            finally:
                live.answer = True

        def head_is_done(grad: Tensor) -> None:
            found["head"] = live.peak
            live.restart()

        live.restart()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16, cache_enabled=False):
            routers = self._with_routers(batch) if self.balanced else None
            value = head.packed_forward(self.model, batch, loss, routers)
        value.backward()
        return found["kept"], (found["head"], max(found["forward"], live.peak))

    def _with_routers(self, batch: PackedPairs) -> Any:
        return lambda base, gates, value: (
            value + balance.balancing_loss(base, gates, balance.token_mask(batch))
        )

    def _head(
        self,
        h_TD: Tensor,
        batch: PackedPairs,
        edges: list[int],
        w_VD: Tensor,
        bias_V: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """The loss by the route that `fastdpo.loss.ops` takes on the target."""
        config, on_cuda = self.config, self.device == "cuda"
        h_TD, w_VD, bias_V = ops._autocast(h_TD, w_VD, bias_V)
        fused = config.impl == "triton" or (config.impl == "auto" and on_cuda)
        workspace_mib = config.workspace_mib
        if workspace_mib is None:
            workspace_mib = default_workspace_mib(int(self.gpu_gib * GIB))
        call = ops._make_call(
            h_TD, w_VD, bias_V, batch.target_N, batch.rows_N, scale, softcap, workspace_mib, edges,
            fused=fused,
        )  # fmt: skip
        assert call is not None
        if fused:
            # Its functions then run in PyTorch, with the same tensors.
            call = _FusedCall(**{**vars(call), "fused": False})
        S = len(edges) - 1
        lengths_S, numbers_P = torch.empty(S), torch.empty(S // 2)
        pairs = _SizedPairs(
            lr_dpo(config.beta), edges, lengths_S,
            torch.empty(S, dtype=torch.float64), numbers_P, numbers_P, numbers_P, 1.0, h_TD.device,
        )  # fmt: skip
        return ops._LinearPreference.apply(h_TD, w_VD, bias_V, call, pairs)[0]  # type: ignore[index]


def _use_attention_on_cuda(model: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention_on_cuda)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(_NAME)


@contextmanager
def _masks_as_for_real(layout: str) -> Iterator[None]:
    """Let transformers see, as it does with real tensors, that padded rows need no mask.

    It does not look at tensors that it takes for a trace, and makes a (T, T) mask to be safe.
    """
    from transformers import masking_utils as module

    masking_utils: Any = module
    plain = getattr(masking_utils, "is_tracing", None)
    if layout != "padded" or plain is None:
        yield
        return
    masking_utils.is_tracing = lambda *_: False
    try:
        yield
    finally:
        masking_utils.is_tracing = plain


def _onto_the_device(model: nn.Module) -> None:
    """Move a model without content to the CPU of the current `FakeTensorMode`, ties and all.

    It is not built there, because peft could not move its adapters.
    """
    moved: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in moved:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    moved[id(old)] = old, new  # the old one is kept for its id
                tensors[name] = moved[id(old)][1]


@contextmanager
def _no_idle_stash() -> Iterator[None]:
    """Keep buffers without content from those that the head lends to real calls."""
    before, Stash._idle = Stash._idle, []
    try:
        yield
    finally:
        Stash._idle = before


def _without_content(batch: PackedPairs) -> PackedPairs:
    """The batch on the simulated device."""

    def empty(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.empty(x.shape, dtype=x.dtype)

    segments = batch.segments
    if segments is not None:
        names = ("cu_q", "cu_k", "key_rows_K", "first_T", "again_keys_R", "again_rows_R")
        segments = replace(segments, **{name: empty(getattr(segments, name)) for name in names})
    names = ("input_ids_BT", "position_ids_BT", "rows_N", "target_N")
    rest: Any = {name: empty(getattr(batch, name)) for name in names}
    return replace(batch, segments=segments, **rest)
