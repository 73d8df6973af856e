"""A whole run on a machine before it is rented: what each stage of a round takes a GPU.

Every stage is taken at its longest: prompts and responses that fill ``train.max_length``, samples
that all go on to their limit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastdpo.data.examples import TokenizedPair
from fastdpo.errors import ModelError
from fastdpo.plan import forward
from fastdpo.plan.forward import Forwards
from fastdpo.plan.step import configuration_of, estimate, gib, usable_bytes
from fastdpo.rounds.config import IterateConfig
from fastdpo.sample.config import SampleConfig
from fastdpo.score.load import kind_of

_TEMPLATE = 256  # tokens that a judge's template and its letters take, beside what they hold
_FREE = 0.9  # of a GPU's free memory, what transformers gives a model that it spreads


@dataclass(frozen=True)
class Stage:
    """What a stage of a round takes.

    Attributes:
        name: of the stage.
        what: its model and its work.
        gpus: how many it works on; 0 where it has no model on this machine.
        takes: bytes, at most, on the fullest of them.
        fix: what makes it smaller.
    """

    name: str
    what: str
    gpus: int
    takes: int
    fix: str = ""


@dataclass(frozen=True)
class RunPlan:
    """The stages of a round on a machine; estimates."""

    gpus: int
    gpu_gib: float
    usable: int
    stages: tuple[Stage, ...]

    @property
    def too_large(self) -> list[Stage]:
        """Those that do not fit."""
        return [stage for stage in self.stages if stage.takes > self.usable]

    def __str__(self) -> str:
        lines = [
            f"Estimates of each stage on {self.gpus} x {self.gpu_gib:g} GiB, of which tensors can "
            f"have {gib(self.usable)} each:"
        ]
        for stage in self.stages:
            if not stage.gpus:
                lines.append(f"{stage.name:>11}  {stage.what}")
                continue
            fits = stage.takes <= self.usable
            verdict, fix = ("fits", "") if fits else ("DOES NOT FIT", f"; {stage.fix}")
            gpus = f"{stage.gpus} GPU{'s' if stage.gpus > 1 else ''}"
            lines.append(
                f"{stage.name:>11}  {verdict}: {gib(stage.takes)} on {gpus}; {stage.what}{fix}"
            )
        return "\n".join(lines)


def plan_run(
    config: IterateConfig,
    gpus: int,
    gpu_gib: float,
    configurations: Mapping[str, Any] | None = None,
    *,
    zero_stage: int = 3,
) -> RunPlan:
    """What each stage of a run takes on a machine.

    Args:
        gpus: of the machine. Training uses all; sampling and measuring one; scoring one, or those
            that ``score.device_map`` spreads a model over.
        gpu_gib: memory of each.
        configurations: transformers configurations by the names of models, of those that are not
            to be read from a folder or the hub.
        zero_stage: of ``engine="deepspeed"``, 2 or 3.

    Raises:
        ConfigError: an argument has an impossible value, or the GPUs cannot be divided so.
        ModelError: the policy's configuration cannot be had, or not be simulated. What is wrong
            with that of a scorer is said in its place.
    """
    usable = usable_bytes(gpu_gib)
    run = _Run(config, gpus, gpu_gib, usable, configurations or {}, zero_stage)
    return RunPlan(gpus, gpu_gib, usable, tuple(run.stages()))


@dataclass
class _Run:
    config: IterateConfig
    gpus: int
    gpu_gib: float
    usable: int
    configurations: Mapping[str, Any]
    zero_stage: int

    def stages(self) -> Iterator[Stage]:
        config = self.config
        yield self.sampling("sampling", config.sample.num_samples)
        for spec in config.score.scorers:
            yield self.scoring("scoring", spec)
        if config.pair.needs_model:
            train = config.train
            pairs = max(1, train.max_tokens // self.pair.num_tokens("shared"))
            yield self.measuring("pairing", train.dtype, pairs, bf16=train.bf16)
        yield self.training()
        if config.evaluate.heldout:
            yield self.sampling("evaluation", config.evaluate.num_samples)
            yield self.scoring("evaluation", config.evaluated_by)
            yield self.measuring("evaluation", config.sample.dtype, config.score.batch_size)

    @property
    def length(self) -> int:
        """Tokens of prompt and response, at most."""
        return self.config.train.max_length

    @property
    def pair(self) -> TokenizedPair:
        """The longest pair that samples make."""
        response = self.config.sample.max_new_tokens
        ids = [0] * response
        return TokenizedPair([0] * max(1, self.length - response), ids, ids)

    def configuration(self, name: str) -> Any:
        given = self.configurations.get(name)
        return configuration_of(name if given is None else given)

    def causal(self, name: str, dtype: str | None, *, packs: bool) -> Forwards:
        """A language model; ``packs``: made ready for packed rows."""
        configuration = self.configuration(name)
        build = partial(_causal, dtype=_dtype(configuration, dtype))
        return Forwards(configuration, forward.prepared(build) if packs else build)

    def sampling(self, name: str, samples: int) -> Stage:
        config, sample = self.config, self.config.sample
        if sample.asks_server:
            return Stage(name, "samples are drawn by a server, which is not estimated", 0, 0)
        model = self.causal(config.model, sample.dtype, packs=False)
        rows = sample.batch_prompts * samples
        if sample.backend == "vllm":
            return Stage(
                name, f"vLLM: weights {gib(model.weights)}, and its cache in what is left", 1,
                model.weights, "sample with a server on several GPUs (sample.server_command)",
            )  # fmt: skip
        found = [
            forward.sampling(model, replace(sample, backend=backend), self.length, rows)
            for backend in _backends(sample)
        ]
        most, cached = max(found)
        return Stage(
            name,
            f"{rows} samples of {self.length} tokens at once: weights {gib(model.weights)}, "
            f"key-value cache {gib(cached)}",
            1,
            model.weights + most,
            "lower sample.batch_prompts",
        )

    def scoring(self, name: str, spec: str) -> Stage:
        """One scorer; several are loaded one after the other."""
        try:
            return self._scoring(name, spec)
        except ModelError as error:
            return Stage(name, f"not estimated: {error}", 0, 0)

    def _scoring(self, name: str, spec: str) -> Stage:
        config, score, kind = self.config, self.config.score, kind_of(spec)
        if kind in ("answer", "function"):
            return Stage(name, f"{spec}: no model of fastdpo's", 0, 0)
        if kind in ("remote judge", "pooling", "endpoint"):
            return Stage(name, f"a server scores, which is not estimated ({kind})", 0, 0)
        rows, models = score.batch_size, 1
        if kind == "reward model":
            label = spec if Path(spec).exists() else spec.partition("#")[0]
            configuration = self.configuration(label)
            build = partial(_classifier, dtype=_dtype(configuration, score.dtype))
            model = Forwards(configuration, build)
            runs = forward.classifying(model, rows, self.length)
        elif kind in ("implicit", "likelihood"):
            label, models = config.model, 2 if kind == "implicit" else 1
            model = self.causal(label, _named(score.dtype) or "float32", packs=True)
            runs = forward.packed(model, self.pair, rows)
        else:
            label = spec.partition(":")[2]
            model = self.causal(label, score.dtype, packs=True)
            asked = self.length + config.sample.max_new_tokens + _TEMPLATE
            runs = forward.packed(model, TokenizedPair([0] * asked, [0], [0]), rows)
        weights, gpus = self.spread(model)
        two = " and the one before" if models == 2 else ""
        return Stage(
            name,
            f"{label}{two}, {rows} sequences at once: weights {gib(models * weights)} a GPU",
            gpus,
            models * weights + runs,
            "spread it (score.device_map=auto) in bfloat16 (score.dtype), or lower "
            "score.batch_size",
        )

    def spread(self, model: Forwards) -> tuple[int, int]:
        """Bytes of the weights on the fullest GPU, and how many GPUs have some."""
        how = self.config.score.device_map
        if how is None or how not in ("auto", "balanced", "balanced_low_0", "sequential"):
            return model.weights, 1
        from accelerate.utils import get_balanced_memory, infer_auto_device_map, modeling

        most: Any = {i: int(_FREE * self.usable) for i in range(self.gpus)}
        whole: Any = {"no_split_module_classes": list(model.model._no_split_modules or ())}
        # It would warn of GPUs that are not here.
        with model.fake, mock.patch.object(modeling, "get_max_memory", dict):
            if how != "sequential":
                low = how == "balanced_low_0"
                most = get_balanced_memory(model.model, max_memory=most, low_zero=low, **whole)
            most["cpu"] = 2**60
            places = infer_auto_device_map(model.model, max_memory=most, **whole)
        found: dict[Any, int] = {}
        for name, place in places.items():
            part = model.model.get_submodule(name) if name else model.model
            size = sum(x.nbytes for x in (*part.parameters(), *part.buffers()))
            found[place] = found.get(place, 0) + size
        away = found.pop("cpu", 0) + found.pop("disk", 0)
        # What finds no room is said as if it were there.
        return max(found.values(), default=0) + away, max(1, len(found))

    def measuring(self, name: str, dtype: str, pairs: int, *, bf16: bool = False) -> Stage:
        """Log-probs of pairs under one model at a time."""
        model = self.causal(self.config.model, dtype, packs=True)
        runs = forward.packed(model, self.pair, pairs, bf16=bf16)
        return Stage(
            name,
            f"log-probs of {pairs} pairs at once: weights {gib(model.weights)}",
            1,
            model.weights + runs,
            "lower score.batch_size" if name == "evaluation" else "lower train.max_tokens",
        )

    def training(self) -> Stage:
        train, prompt = self.config.training(1), max(1, self.length // 4)
        given = self.configurations.get(self.config.model, self.config.model)
        found = estimate(
            given, train, prompt=prompt, response=self.length - prompt, gpu_gib=self.gpu_gib,
            gpus=self.gpus, zero_stage=self.zero_stage,
        )  # fmt: skip
        engine = train.engine if train.engine != "auto" else "ddp" if self.gpus > 1 else "one GPU"
        return Stage(
            "training",
            f"{engine}, {found.pairs} pairs of {found.tokens} tokens in all at once; the largest "
            f"part is {found.limit}",
            self.gpus,
            found.peak,
            "fastdpo plan --model, with the options of train, says what saves memory",
        )


def _backends(sample: SampleConfig) -> list[str]:
    """Those that may draw the samples: which one "auto" is depends on what is installed."""
    both = sample.backend == "auto" and not sample.stop
    return ["generate", "continuous"] if both else [sample.backend.replace("auto", "generate")]


def _named(dtype: str | None) -> str | None:
    return None if dtype == "auto" else dtype


def _dtype(configuration: Any, dtype: str | None) -> torch.dtype:
    """The dtype of a name, or that of the checkpoint."""
    found = _named(dtype) or getattr(configuration, "dtype", None) or "float32"
    return getattr(torch, found) if isinstance(found, str) else found


def _causal(configuration: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(configuration, dtype=dtype)


def _classifier(configuration: Any, dtype: torch.dtype) -> Any:
    """A sequence classifier, as `fastdpo.score.reward_model` loads one, of one score."""
    from transformers import AutoModelForSequenceClassification

    configuration.num_labels, configuration.use_cache = 1, False
    if configuration.get_text_config().pad_token_id is None:
        configuration.get_text_config().pad_token_id = 0
    return AutoModelForSequenceClassification.from_config(configuration, dtype=dtype)
