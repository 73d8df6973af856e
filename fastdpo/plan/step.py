"""What a training step takes: the bytes of its parts, and the most that is alive at once."""

from dataclasses import dataclass, fields
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
from fastdpo.plan.memory import GIB, Simulation
from fastdpo.train.config import TrainConfig

# Of a GPU's memory, a CUDA context with its libraries takes this, and of the rest the caching
# allocator loses a share to gaps between blocks.  Both are estimates that no GPU has confirmed.
CONTEXT_GIB = 0.6
ALLOCATED_SHARE = 0.95


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
        host: CPU memory that offloaded activations take, for a GPU.
        pairs: of the micro-batch.
        tokens: of the micro-batch.
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

    def __str__(self) -> str:
        parts = {x.name: getattr(self, x.name) for x in fields(self)[:7]}
        shown = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
        host = f", and {gib(self.host)} of CPU memory" if self.host else ""
        return f"peak {gib(self.peak)}{host} for {self.tokens} tokens ({shown})"


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
) -> StepMemory:
    """Peak memory of a step on pairs of ``prompt`` tokens and two responses of ``response`` tokens.

    Where the objective takes lists, they are of two responses, and single responses are one each.
    A micro-batch has as many of these as fit ``config.max_tokens`` and ``batch_size``, at least
    one.  ``use_liger_kernel`` is counted as if it were off, which needs more.

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
    if device not in ("cuda", "cpu"):
        raise ConfigError(f"device={device!r} must be one of cuda, cpu")
    if device == "cuda":
        usable_bytes(gpu_gib)  # it may be no memory of a GPU
    memory = gpu_gib if device == "cuda" else 0.0
    return of_step(Simulation(configuration_of(model), config, memory), prompt, response)


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


def fixed_bytes(simulation: Simulation) -> tuple[int, int]:
    """Bytes of the optimizer and of a second model, which are there whatever runs."""
    config = simulation.config
    in_steps = config.objective.needs_reference and not config.precompute_ref_log_probs
    twice = in_steps and not config.use_peft
    return 2 * simulation.gradients, simulation.weights if twice else 0


def of_step(
    simulation: Simulation, prompt: int, response: int, pairs: int | None = None
) -> StepMemory:
    """The estimate of one micro-batch, after the first one of its step if that has several.

    ``pairs`` of it; by default as many as the configuration lets it have.
    """
    config = simulation.config
    pair = _example(config.objective, prompt, response)
    tokens = pair.num_tokens(simulation.layout)
    if pairs is None:
        pairs = min(max(1, config.max_tokens // tokens), config.batch_size)
    several = pairs < config.batch_size
    found = simulation.run([pair] * pairs, accumulated=several)
    optimizer, reference = fixed_bytes(simulation)
    fixed = simulation.weights + optimizer + reference
    running = fixed + (simulation.gradients if several else 0) + max(found.head, found.body)
    return StepMemory(
        weights=simulation.weights,
        gradients=simulation.gradients,
        optimizer=optimizer,
        reference=reference,
        activations=found.kept,
        head=found.head - found.kept,
        backward=max(0, found.body - found.kept),
        # When the optimizer steps there are the gradients, and it makes nothing of its own.
        peak=max(running, fixed + simulation.gradients),
        host=found.host,
        pairs=pairs,
        tokens=pairs * tokens,
    )


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
