"""One training step on tensors without content, and the bytes that it takes.

There are no formulas here.  A model is built from its configuration with tensors that have sizes
but no content, prepared and run by the code that trains, and every storage that comes and goes is
counted.  Neither weights nor a GPU are needed: `fastdpo.kernels.device.simulated` lets the host's
code run as for one.

What no such tensor shows is added by name: the scratch memory of flash attention's backward, and
weights in 4 bits, which bitsandbytes makes of real ones.  Not counted are a CUDA context and the
allocator's fragmentation, and what libraries take inside of one operation.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdpo.data.batch import PackedPairs, pack_pairs
from fastdpo.errors import ConfigError, ModelError
from fastdpo.kernels.device import simulated
from fastdpo.loss import checks, eager
from fastdpo.loss.gemm import Products, has_native_bf16
from fastdpo.loss.objectives import given_slopes
from fastdpo.loss.plan import default_workspace_mib
from fastdpo.loss.streaming import Stash
from fastdpo.model import balance, sequence_parallel
from fastdpo.model.prepare import layout_of, packed_loss, reference_rows
from fastdpo.plan.cluster import Cluster
from fastdpo.plan.live import Live, local
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
        whole: the most that FSDP2 has whole at once, of weights, gradients and its buffers; a part
            of `head` and `body`.
        sent: bytes that the process sends, by kind of collective.
        sent_forward: those of the forward alone.
    """

    kept: int
    head: int
    body: int
    host: int
    whole: int
    sent: Counter[str]
    sent_forward: Counter[str]


@contextmanager
def readable(configuration: Any) -> Iterator[None]:
    """Say in one line that a model cannot be built or simulated."""
    try:
        yield
    except (ModelError, ConfigError):
        raise
    # Code of models that were not made for tensors without content can fail in any way.
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
        raise ModelError(
            f"the memory of a model with {type(configuration).__name__} cannot be simulated: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def know_the_machine() -> None:
    """Let what is found out once be found out now, by real calls."""
    has_native_bf16()
    Products(torch.float32, torch.device("cpu"))


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within it, code that is run on tensors without content runs as for a GPU."""
    with simulated(_CAPABILITY), Stash.apart():
        yield


@contextmanager
def _all_scored() -> Iterator[None]:
    """Within it, every target of a process is scored: sequence parallel counts them, on a CPU in
    Python, and would find none in tensors without content."""
    with (
        mock.patch.object(checks, "check_lengths", lambda *_: None),
        mock.patch.object(eager, "nothing_scored", lambda *_: False),
    ):
        yield


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
    """One model with one set of options, on GPUs of ``gpu_gib`` or CPUs (0); many steps.

    Of several GPUs it is one that has no less than any other.  It then has a process group that
    only stands for one, until it is closed: use it as a context.

    Raises:
        ConfigError: so many GPUs cannot be divided as the options say.
        ModelError: a model of this configuration cannot be built, prepared or run without content.
    """

    configuration: Any  # transformers', which is changed
    config: TrainConfig
    gpu_gib: float
    gpus: int = 1
    zero_stage: int = 3

    def __post_init__(self) -> None:
        know_the_machine()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = Live(_ALIGNED["cuda" if self.gpu_gib else "cpu"])
        with ExitStack() as stack:
            self.cluster = stack.enter_context(Cluster(self.config, self.gpus, self.zero_stage))
            with readable(self.configuration):
                model = self._build()
            self._open = stack.pop_all()
        self.model: Any = model
        self.layout = layout_of(model)
        self.aux_loss_coef = balance.coefficient(model, self.config.router_aux_loss_coef)
        self.weights = self.live.known([*model.parameters(), *model.buffers()])
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.gradients = sum(self.live.rounded(local(p).nbytes) for p in self.trained)

    @property
    def offloaded(self) -> bool:
        """Whether weights, gradients and optimizer are kept in CPU memory."""
        return self.config.offload_params and self.cluster.name == "fsdp2"

    @property
    def largest_unit(self) -> int:
        """Bytes of this process's part of the weights that are gathered together, at most."""
        from torch.distributed.fsdp import FSDPModule

        seen: set[int] = set()
        largest = 0
        for module in reversed(list(self.model.modules())):  # what is inside another comes first
            if isinstance(module, FSDPModule):
                unit: Any = module
                own = [p for p in unit.parameters() if id(p) not in seen]
                seen |= {id(p) for p in own}
                largest = max(largest, sum(local(p).nbytes for p in own))
        return largest

    def __enter__(self) -> "Simulation":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the processes that were stood for; no further step is run."""
        self._open.close()

    def _build(self) -> Any:
        from transformers import AutoModelForCausalLM

        config = self.config

        def place(model: Any) -> None:
            # It is not built with the fake mode, because peft could not move its adapters.
            with torch.device("cpu"), self.fake:
                model.to_empty(device="cpu")
                model.tie_weights()
                self.cluster.place(model)

        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                self.configuration, dtype=getattr(torch, config.dtype)
            )
            if config.load_in_4bit:
                _quantize(model)
            return prepare_policy(model, config, place=place, prove=False)

    def run(self, pairs: Sequence[Any], *, accumulated: bool) -> Peaks:
        """A micro-batch, forward and backward; ``accumulated``: after others of its step."""
        from transformers import masking_utils

        live = self.live
        # What a process gets of it depends on its content.
        batch = sequence_parallel.chunk(self.model, pack_pairs(pairs, layout=self.layout))
        gpu = as_on_gpu() if self.gpu_gib else Stash.apart()
        masks = nullcontext()
        if self.layout == "padded":
            # Padded rows need no mask, but transformers does not look at tensors that it takes for
            # a trace, and makes one of (T, T) to be safe.
            masks = mock.patch.object(masking_utils, "is_tracing", lambda *_: False, create=True)
        scored = nullcontext() if batch.chunk is None else _all_scored()
        start = live.bytes  # of an earlier step, where the collector has not come yet
        with readable(self.configuration), self.fake, gpu, masks, scored:
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
        live.host_peak, live.whole_peak = live.host, live.whole
        live.sent.clear()

        def head_begins(_: Any, args: tuple[Tensor, ...]) -> None:
            edges.extend([live.peak, live.bytes - live.whole])
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
            sent_forward = live.sent.copy()
            result.loss.backward()
        finally:
            hook.remove()
        _, forward, kept, head = edges
        return Peaks(
            kept - before, head - start, max(forward, live.peak) - start, live.host_peak,
            live.whole_peak, live.sent.copy(), sent_forward,
        )  # fmt: skip

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
