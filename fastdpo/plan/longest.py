"""The longest pairs that fit a GPU, as configured and with each option that saves memory."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from fastdpo.errors import ConfigError
from fastdpo.plan.memory import Simulation
from fastdpo.plan.step import (
    StepMemory,
    at_rest,
    configuration_of,
    gib,
    of_step,
    usable_bytes,
)
from fastdpo.train.config import TrainConfig

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
# The same where several GPUs train: those that matter most, as each takes a while to try.  Of
# sequence parallel there are the smallest size and the largest that is possible.
_SAVINGS_OF_SEVERAL: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": True},
    {"engine": "fsdp2"},
    *({"engine": "fsdp2", "gradient_checkpointing": True, "sp_size": size} for size in (2, 4, 8)),
    {"engine": "fsdp2", "offload_params": True},
    {"activation_offloading": True},
    {"use_peft": True, "dtype": "bfloat16"},
)
_LENGTH_STEP = 64
# The share of the longest length that may be missing, on one GPU and on several.
_SHORT, _SHORT_OF_SEVERAL = 0.01, 0.03
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
    estimate: StepMemory

    @property
    def name(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.changes.items())


@dataclass(frozen=True)
class Fit:
    """What fits on a GPU: the configuration as it is first, then each change that saves memory.

    Attributes:
        usable: bytes of it that tensors can have, see `usable_bytes`.
        limit: tokens of the longest sequence the model takes.
        what: an example, as "pair".
        gpus: how many train together; the pair is of one of them, or of the ``sp_size`` that share
            its tokens.
    """

    gpu_gib: float
    usable: int
    limit: int
    options: tuple[Option, ...]
    what: str = "pair"
    gpus: int = 1

    @property
    def longest(self) -> int:
        """Tokens of the longest response with its prompt, under the configuration as it is."""
        return self.options[0].longest

    @property
    def estimate(self) -> StepMemory:
        return self.options[0].estimate

    def __str__(self) -> str:
        several = f"{self.gpus} x " if self.gpus > 1 else ""
        rows = [
            f"Longest {self.what} on {several}{self.gpu_gib:g} GiB, of which tensors can have "
            f"{gib(self.usable)}; one a micro-batch, a quarter of each side is prompt"
        ]
        sides = 1 if self.what == "response" else 2
        for option in self.options:
            what = option.name or "as configured"
            if not option.longest:
                rows.append(f"      none  {what}: needs {gib(option.estimate.peak)} at least")
                continue
            most = " (the model's limit)" if option.longest == self.limit else ""
            found = option.estimate
            host = f" and {gib(found.host)} of CPU memory" if found.host else ""
            rows.append(f"{sides} x {option.longest:>6}{most}  {what}: {gib(found.peak)}{host}")
        if not find_spec("peft"):
            rows.append("use_peft is left out: it needs peft, pip install 'fastdpo[peft]'")
        return "\n".join(rows)


def longest_pair(
    model: Any, config: TrainConfig, gpu_gib: float, *, gpus: int = 1, zero_stage: int = 3
) -> Fit:
    """The longest pairs that a GPU can train on, as configured and with what saves memory.

    So are lists, of two responses, or single responses, where the objective takes those.  A pair is
    2 x N tokens: a prompt of N / 4 and two responses of the rest, alone in its
    micro-batch, so ``config.max_length`` and ``max_tokens`` do not matter here.

    Args:
        model: as in `estimate`.
        gpu_gib: memory of the GPU, in GiB.
        gpus, zero_stage: as in `estimate`. With ``sp_size`` the pair is shared by so many GPUs.

    Raises:
        ConfigError: ``gpu_gib`` is no memory of a GPU, so many GPUs cannot be divided so, or
            nothing fits whatever the options.
        ModelError: as in `estimate`.
    """
    usable, configuration = usable_bytes(gpu_gib), configuration_of(model)
    text = configuration.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or _NO_LIMIT
    options: list[Option] = []
    search = _Search(usable, limit, limit if limit <= 16384 else 4096)
    if gpus > 1:
        search.short = _SHORT_OF_SEVERAL
    for wanted in _wanted(config, text, gpus):
        changed = replace(config, **wanted)
        own = configuration_of(configuration)
        with Simulation(own, changed, gpu_gib, gpus, zero_stage) as simulation:
            options.append(Option(wanted, *search.longest(simulation)))
    if not any(option.longest for option in options):
        least = min(options, key=lambda option: option.estimate.peak)
        how = f" with {least.name}" if least.changes else ""
        raise ConfigError(
            f"gpu_gib={gpu_gib} is too small for this model whatever the options: the shortest "
            f"pair needs {gib(least.estimate.peak)}{how}, and tensors can have {gib(usable)}"
        )
    whats = {"pairs": "pair", "lists": "list of two", "singles": "response"}
    return Fit(gpu_gib, usable, limit, tuple(options), whats[config.objective.shape], gpus)


def _wanted(config: TrainConfig, text: Any, gpus: int) -> list[dict[str, Any]]:
    """What to try: nothing, and what changes the configuration and goes with it."""
    found: list[dict[str, Any]] = [{}]
    for changes in _SAVINGS if gpus == 1 else _SAVINGS_OF_SEVERAL:
        wanted = {name: x for name, x in changes.items() if getattr(config, name) != x}
        if wanted not in found and _possible(config, wanted, text, gpus):
            found.append(wanted)
    split = [wanted for wanted in found if "sp_size" in wanted]
    return [wanted for wanted in found if wanted not in split[1:-1]]


def _possible(config: TrainConfig, wanted: dict[str, Any], text: Any, gpus: int) -> bool:
    """Whether these changes go with the options and the model."""
    if "precompute_ref_log_probs" in wanted and config.objective.needs_kl:
        return False  # a KL of tokens is of both models
    if wanted.get("use_peft") and not find_spec("peft"):
        return False  # its layers are peft's
    if wanted.get("use_peft") and "precompute_ref_log_probs" in wanted:
        return False
    if "engine" in wanted and (config.load_in_4bit or config.engine == "deepspeed"):
        return False
    size = wanted.get("sp_size")
    if size is None:
        return True
    heads = getattr(text, "num_attention_heads", 0)
    shared = gpus // config.dp_replicate_size
    return size > config.sp_size and not (shared % size or heads % size) and _packs(config)


def _packs(config: TrainConfig) -> bool:
    return config.layout != "padded"


@dataclass
class _Search:
    """Longest sides that fit, of one simulation after the other.

    The peak is close to a line in the number of tokens, so few guesses do.  What the first
    simulation finds makes the first guess of the others.
    """

    usable: int
    limit: int
    guess: int  # tokens of a side
    short: float = _SHORT
    beside: float = 0.0  # bytes of a step without tokens, but for what is there whatever runs
    first: bool = True  # nothing was simulated yet

    def longest(self, simulation: Simulation) -> tuple[int, StepMemory]:
        """The longest side that fits, to `short`, and its estimate; (0, that of the shortest) if
        none does."""
        usable, limit = self.usable, self.limit

        def at(length: int) -> StepMemory:
            prompt = max(1, length // 4)
            return of_step(simulation, prompt, length - prompt, pairs=1)

        shortest, rest = min(_LENGTH_STEP, limit), at_rest(simulation)
        still = rest.device + rest.gradients * (not rest.host)
        before, before_peak, slope = 0, still + self.beside, 0.0
        # A little short of where the line ends, so that the guess tends to fit.
        aim = usable - 0.4 * self.short * (usable - rest.device)
        low, found, high, length = 0, None, limit + 1, max(shortest, min(self.guess, limit))
        while rest.device <= usable:
            tried = at(length)
            if tried.peak <= usable:
                low, found = length, tried
            else:
                high = length
            slope = (tried.peak - before_peak) / (length - before)
            before, before_peak = length, tried.peak
            room = (aim - tried.peak) / slope if slope > 0 else limit
            if tried.peak <= usable and room < max(length * self.short, _LENGTH_STEP):
                break
            length = int(min(length + room, high - 1, limit))
            if length < limit:
                length = length // _LENGTH_STEP * _LENGTH_STEP
            if length <= low:  # the line says less than what was found to fit, or nothing
                length = (low + high) // 2 // _LENGTH_STEP * _LENGTH_STEP
            if length <= low * (1 + self.short) or length < shortest or length >= high:
                break
        if found is None:
            return 0, at(shortest)
        if self.first:
            self.first, self.guess = False, low
            self.beside = max(0.0, found.peak - slope * low - still)
        return low, found
