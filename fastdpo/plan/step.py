"""What a training step takes: the bytes of its parts, and the most that is alive at once.

Of several GPUs all is what one of them takes, and no other takes more.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.examples import (
    TokenizedExample,
    TokenizedList,
    TokenizedPair,
    TokenizedSingle,
)
from fastdpo.errors import ConfigError, ModelError, is_number
from fastdpo.loss.examples import BaseObjective
from fastdpo.model.load import check_folder, refuse_quantized
from fastdpo.plan.memory import GIB, Peaks, Simulation
from fastdpo.train.config import TrainConfig

# Of a GPU's memory, a CUDA context with its libraries takes this, and of the rest the caching
# allocator loses a share to gaps between blocks.  Both are estimates that no GPU has confirmed.
CONTEXT_GIB = 0.6
ALLOCATED_SHARE = 0.95
# Of several GPUs NCCL takes this for each group that one of them is in, outside of the allocator.
# Reports have 0.3 to 1.5 GiB, by the number of GPUs and channels; an estimate, too.
COMMUNICATOR_GIB = 1.0
# Gradients that DeepSpeed gathers before it sums them: its reduce_bucket_size, in fp32.  It makes
# the whole of it whatever the model.
ZERO_BUCKET_BYTES = 4 * 500_000_000


# Of these the parts of a step's memory are told.
_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "reference": "reference",
    "activations": "activations",
    "head": "head",
    "backward": "backward",
    "whole": "whole layers",
    "buckets": "buckets",
    "communicators": "NCCL",
}


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step.  They are not all alive at once: `peak` is less than their sum.

    Attributes:
        weights: of the policy, with adapters and buffers.
        gradients: of what is trained.
        optimizer: AdamW's two moments.
        reference: a second copy of the weights, if each step computes the reference.
        activations: what the body's forward keeps for its backward, checkpoints or all.
        head: the most that the head adds to that: workspace, accumulators, its gradients.
        backward: the most that the body's backward adds, of which new gradients are a part.
        peak: the most that is alive at once on the device.
        host: CPU memory that offloaded activations take, for a GPU, and offloaded weights with
            their gradients and optimizer.
        pairs: of the micro-batch.
        tokens: of the micro-batch; with sequence parallel those of the whole group.
        whole: the most that FSDP2 has whole at once: the weights and gradients of layers, and
            buffers to gather and reduce them; a part of `head` and `backward`.
        buckets: of DDP, copies of the gradients that it sums; of ZeRO its bucket of gradients, as
            large as DeepSpeed makes it by itself.
        communicators: of NCCL, an allowance for each group of GPUs that this one is in.
        limit: the largest part of `peak`.
        micro_batches: of a step, for each GPU or group of sequence parallel.
        sent: bytes that a GPU sends in a step, by kind of collective.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    head: int
    backward: int
    peak: int
    host: int
    pairs: int
    tokens: int
    whole: int = 0
    buckets: int = 0
    communicators: int = 0
    limit: str = ""
    micro_batches: int = 1
    sent: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = {told: getattr(self, name) for name, told in _PARTS.items()}
        shown = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
        host = f", and {gib(self.host)} of CPU memory" if self.host else ""
        return f"peak {gib(self.peak)}{host} for {self.tokens} tokens ({shown})"

    def exchange(self, gbs: float) -> str:
        """What a GPU sends in a step, and how long that takes at ``gbs`` GB/s if nothing else goes
        on meanwhile."""
        total = sum(self.sent.values())
        kinds = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in self.sent.items())
        several = "es" if self.micro_batches > 1 else ""
        return (
            f"a GPU sends {total / 1e9:.2f} GB a step of {self.micro_batches} micro-batch{several} "
            f"({kinds}): {total / 1e9 / gbs:.2f} s at {gbs:g} GB/s if nothing overlaps"
        )


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:.2f} GiB"


def usable_bytes(gpu_gib: float) -> int:
    """Bytes of a GPU's memory that tensors can have.

    Raises:
        ConfigError: it is no memory of a GPU.
    """
    if not is_number(gpu_gib) or gpu_gib <= CONTEXT_GIB:
        raise ConfigError(
            f"gpu_gib={gpu_gib} must be the memory of a GPU in GiB, over the {CONTEXT_GIB} that "
            "CUDA itself takes"
        )
    return int((gpu_gib - CONTEXT_GIB) * ALLOCATED_SHARE * GIB)


def estimate(
    model: Any,
    config: TrainConfig,
    *,
    prompt: int,
    response: int,
    device: str = "cuda",
    gpu_gib: float = 24.0,
    gpus: int = 1,
    zero_stage: int = 3,
) -> StepMemory:
    """Peak memory of a step on pairs of ``prompt`` tokens and two responses of ``response`` tokens.

    Where the objective takes lists, they are of two responses, and single responses are one each.
    A micro-batch has as many of these as fit ``config.max_tokens`` and ``batch_size``, at least
    one.  ``use_liger_kernel`` is counted as if it were off, which needs more.

    Args:
        model: folder (only its config.json is read) or hub name, or a transformers configuration.
        device: "cuda" or "cpu", the target; it need not be here.
        gpu_gib: memory of the GPU, in GiB, of which the head's default workspace is a part.
        gpus: how many train together, as ``config.engine`` and ``config.sp_size`` have it; or CPU
            processes.
        zero_stage: of ``engine="deepspeed"``, 2 or 3.

    Raises:
        ConfigError: an argument has an impossible value, or so many cannot be divided so.
        ModelError: the model's configuration cannot be had, or not be simulated.
    """
    for name, value in (("prompt", prompt), ("response", response)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name}={value!r} must be a positive number of tokens")
    if device not in ("cuda", "cpu"):
        raise ConfigError(f"device={device!r} must be one of cuda, cpu")
    if device == "cuda":
        usable_bytes(gpu_gib)  # it may be no memory of a GPU
    memory = gpu_gib if device == "cuda" else 0.0
    with Simulation(configuration_of(model), config, memory, gpus, zero_stage) as simulation:
        return of_step(simulation, prompt, response)


def configuration_of(model: Any) -> Any:
    """The transformers configuration of a folder or hub name; an own copy of one that is given.

    Raises:
        ModelError: it cannot be had, or is that of a quantized model.
    """
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


@dataclass(frozen=True)
class _AtRest:
    """Bytes that are there whatever runs: on the device, and of them or offloaded the parts."""

    gradients: int  # between micro-batches; not counted in `device`
    optimizer: int
    reference: int
    buckets: int
    communicators: int
    device: int
    host: int


def at_rest(simulation: Simulation) -> _AtRest:
    """What the weights, the optimizer, a second model, buckets and NCCL take."""
    config, cluster = simulation.config, simulation.cluster
    in_steps = config.objective.needs_reference and not config.precompute_ref_log_probs
    gradients, several = simulation.gradients, cluster.gpus > 1
    if cluster.name == "zero2":
        gradients = -(-gradients // cluster.gpus)
    # ZeRO keeps a second copy of the weights that it trains, which the optimizer works on.
    optimizer = gradients * (3 if cluster.name.startswith("zero") else 2)
    reference = simulation.weights if in_steps and not config.use_peft else 0
    buckets = gradients if cluster.name == "ddp" and several else 0
    if cluster.name.startswith("zero"):
        buckets = ZERO_BUCKET_BYTES
    nccl = int(COMMUNICATOR_GIB * GIB) * cluster.groups if simulation.gpu_gib else 0
    device, host = simulation.weights + optimizer + reference + buckets, 0
    if simulation.offloaded:
        device, host = 0, device + gradients
    return _AtRest(gradients, optimizer, reference, buckets, nccl, device + nccl, host)


def of_step(
    simulation: Simulation, prompt: int, response: int, pairs: int | None = None
) -> StepMemory:
    """The estimate of one micro-batch, after the first one of its step if that has several.

    ``pairs`` of it; by default as many as the configuration lets it have.
    """
    config, cluster = simulation.config, simulation.cluster
    pair = _example(config.objective, prompt, response)
    tokens = pair.num_tokens(simulation.layout)
    share = -(-config.batch_size // cluster.engine.dp_size)
    if pairs is None:
        pairs = min(max(1, config.max_tokens // tokens), share)
    fixed, offloaded = at_rest(simulation), simulation.offloaded
    # Of gradients that are sharded, or moved to the CPU, as each is there, none stays on the device
    # beside those between micro-batches.
    passing = offloaded or cluster.name == "zero2"
    several = pairs < share or passing
    found = simulation.run([pair] * pairs, accumulated=several)
    running = fixed.device + max(found.head, found.body)
    if offloaded:
        running += simulation.largest_unit
    elif several:
        running += fixed.gradients
    # When the optimizer steps there are the gradients, and it makes nothing of its own.
    stepping = fixed.device + (0 if offloaded else fixed.gradients)
    parts = {
        "weights": simulation.weights,
        "gradients": fixed.gradients,
        "optimizer": fixed.optimizer,
        "reference": fixed.reference,
        "activations": found.kept,
        "head": found.head - found.kept,
        "backward": max(0, found.body - found.kept),
        "whole": found.whole,
        "buckets": fixed.buckets,
        "communicators": fixed.communicators,
    }
    micro_batches = -(-share // pairs)
    return StepMemory(
        **parts,
        peak=max(running, stepping),
        host=found.host + fixed.host,
        pairs=pairs,
        tokens=pairs * tokens,
        limit=_limit(parts, found.head > found.body, offloaded),
        micro_batches=micro_batches,
        sent=_sent(simulation, found, micro_batches),
    )


def _limit(parts: dict[str, int], at_head: bool, offloaded: bool) -> str:
    """The largest of the parts that are alive at the peak, of what runs then without the rest."""
    runs, rests = ("head", "backward") if at_head else ("backward", "head")
    alive = {name: size for name, size in parts.items() if name != rests}
    alive[runs] = max(0, alive[runs] - alive["whole"])
    if offloaded:
        for name in ("weights", "gradients", "optimizer", "reference"):
            del alive[name]
    return _PARTS[max(alive, key=alive.__getitem__)]


def _sent(simulation: Simulation, found: Peaks, micro_batches: int) -> dict[str, int]:
    """Bytes of a step: of each micro-batch, of a reference beside it, and of whole gradients."""
    config, cluster = simulation.config, simulation.cluster
    objective = config.objective
    sent = Counter({kind: size * micro_batches for kind, size in found.sent.items()})
    # One that gives a KL was run already.
    if objective.needs_reference and not (config.precompute_ref_log_probs or objective.needs_kl):
        for kind, size in found.sent_forward.items():
            sent[kind] += size * micro_batches
    others = simulation.gradients * (cluster.gpus - 1) // cluster.gpus
    if cluster.name == "ddp" and others:
        sent["all-reduce"] += 2 * others
    elif cluster.name == "zero2":  # scattered after each micro-batch, and what was changed gathered
        sent["reduce-scatter"] += others * micro_batches
        sent["all-gather"] += others
    return dict(sent)


def _example(objective: BaseObjective, prompt: int, response: int) -> TokenizedExample:
    """What the objective takes: a pair, two responses as a list, or one; of so many tokens each."""
    prompt_ids, ids = [0] * prompt, [0] * response
    if objective.shape == "lists":
        return TokenizedList(prompt_ids, [ids, ids], [1.0, 0.0])
    if objective.shape == "singles":
        return TokenizedSingle(prompt_ids, ids, True)
    nll = objective.needs_prompt and prompt > 1
    eps = 0.0 if objective.smoothing_above is None else 0.5  # where each pair has to have one
    return TokenizedPair(prompt_ids, ids, ids, prompt_nll=nll, label_smoothing=eps)
