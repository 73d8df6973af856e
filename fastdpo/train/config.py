"""Options of training, and what they may be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastdpo.data.budget import OVERLONG
from fastdpo.data.examples import LAYOUTS
from fastdpo.errors import ConfigError, is_default, require, require_used
from fastdpo.kernels.support import METRICS
from fastdpo.loss.choices import CHOICES, make_objective
from fastdpo.loss.examples import BaseObjective
from fastdpo.storage import CACHE

# What does not change the weights that come out.
FREE = {
    "save_steps", "reference_cache", "gradient_checkpointing", "activation_offloading",
    "engine", "dp_replicate_size", "sp_size", "offload_params", "reshard_after_forward",
}  # fmt: skip
OFFSETS = ("none", "log_difference", "log_ratio", "difference")
# What `make_objective` gets beside the names of the losses and the length penalty.
_OF_OBJECTIVE = (
    "beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau",
    "ld_alpha", "use_weighting", "reference_scale", "target_margin", "simpo_gamma", "cpo_alpha",
    "desirable_weight", "undesirable_weight", "tdpo_alpha", "pro_sft_weight", "max_skip",
)  # fmt: skip
_OF_SCORES = ("score_offset", "score_offset_weight", "score_weight", "score_label")
# Of the numbers that a loss has, what changes nothing where that is not the default: None is no
# number, as these always count.
_NEUTRAL = dict.fromkeys(
    ("beta", "f_alpha_divergence_coef", "discopop_tau", "simpo_gamma", "tdpo_alpha",
     "pro_sft_weight", "max_skip"),
) | {"alpha": 0.0}  # fmt: skip
_CHOICES = {
    "overlong": OVERLONG,
    "layout": ("auto", *LAYOUTS),
    "impl": ("auto", "triton", "torch"),
    "dtype": ("float32", "bfloat16"),
    "engine": ("auto", "ddp", "fsdp2", "deepspeed"),
}


@dataclass
class TrainConfig:
    """Hyper-parameters of a round; names are TRL's where TRL has them.

    Attributes:
        beta: strength of the KL penalty.
        alpha: length penalty per token, not multiplied by beta; 0 is plain DPO, and null is 0.01
            for loss_type sigmoid alone and 0 for all others. "auto" holds the mean response length
            at `target_length`, see `fastdpo.train.control`.
        target_length: tokens that alpha="auto" holds; by default the mean length of the samples
            that the first round starts with.
        loss_type: the objective, or several that are summed: TRL's names and others, in the table
            of `fastdpo/loss/README.md`. The length penalty composes with those by margin.
        loss_weights: factor of each of several; by default all 1.
        label_smoothing: probability that a pair's label is flipped, of the losses that read one;
            rows may have their own instead, for every loss of the margin. exo_pair needs one > 0,
            here or of every row.
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence".
        f_alpha_divergence_coef: of alpha_divergence.
        discopop_tau: temperature of discopop.
        ld_alpha: weight of the longer side's tokens beyond the shorter one's length, in [0, 1]
            (LD-DPO); null counts all alike.
        use_weighting: weigh a pair by how likely the policy is to write its responses (WPO).
        reference_scale: factor on the reference's log-ratio (DPO^gamma; AIPO's 1 + alpha).
        target_margin: margin that losses of the margin want, subtracted from z.
        simpo_gamma: target margin of simpo, as in TRL's CPOTrainer.
        cpo_alpha: weight of the chosen response's likelihood in cpo (default 1) and simpo
            (default 0).
        desirable_weight, undesirable_weight: of the two kinds of single responses.
        tdpo_alpha: weight of the KL terms in tdpo2.
        pro_sft_weight: weight of the best response's likelihood in pro.
        max_skip: places in the ranking of a list between which skip_ranknet compares, at most.
        list_size: responses that each list has to have; null takes any number from 2.
        score_offset: what a pair's scores add to the margin that is wanted: "log_difference" and
            "log_ratio" are ODPO's (arXiv 2402.10571), "difference" the adaptive margin of Secrets
            of RLHF II (arXiv 2401.06080). "none" adds nothing.
        score_offset_weight: factor on it, ODPO's alpha.
        score_weight: multiply a pair's loss by the difference of its scores.
        score_label: take sigmoid of the difference of a pair's scores as the probability that its
            label is right, so that label_smoothing is one minus that.
        learning_rate: peak of the cosine schedule.
        warmup_ratio: share of the steps that warm up linearly.
        weight_decay: AdamW's.
        max_grad_norm: gradient norm that is clipped to.
        num_train_epochs: passes over the examples.
        batch_size: examples of an optimizer step, over all processes and micro-batches: pairs,
            lists or single responses, as the loss takes them. A pair that is given to a loss of
            single responses is two examples.
        max_length: tokens of prompt and response kept, from the start.
        max_tokens: tokens of a micro-batch.
        overlong: what becomes of a pair over max_length or max_tokens: "truncate" keeps the start
            of its responses, "drop" leaves it out and counts it, "stop" is an error.
        layout: "shared" computes a pair's prompt once, "packed" twice, "padded" gives each sequence
            a row; "auto" takes the first that the model computes exactly.
        precompute_ref_log_probs: compute the reference once, before training; otherwise in every
            step, with a copy of the model in memory (none with use_peft).
        reference_cache: folder that keeps reference log-probs for other runs on the same pairs;
            ~/.cache is XDG_CACHE_HOME where that is set. null keeps none.
        dtype: of the weights, "float32" or "bfloat16"; the optimizer's state has the same. Small
            steps are lost in bfloat16 weights: it is for frozen ones, under use_peft.
        gradient_checkpointing: recompute activations in the backward.
        bf16: compute in bf16 under autocast.
        save_steps: optimizer steps between checkpoints.
        workspace_mib: bound on the head's tiles and stash; default 1/32 of a GPU's memory
            and at least 256, which is a CPU's.
        impl: of the head: "triton", "torch", or "auto" for what the device has.
        activation_offloading: keep what the backward needs in CPU memory.
        mlp_tile_tokens: tokens that go through an MLP at a time; bounds its activations.
        use_liger_kernel: Liger's RMSNorm, RoPE and SwiGLU, on this model only.
        use_peft: train LoRA adapters; the reference is the model with them off.
        lora_r: rank of the adapters, as in PEFT.
        lora_alpha: their scale is lora_alpha / lora_r, as in PEFT.
        lora_target_modules: layers that get adapters, as in PEFT; by default all linear ones but
            the head.
        lora_target_parameters: experts and routers that are parameters, as in PEFT; by default all
            of them, or none where lora_target_modules names layers.
        load_in_4bit: QLoRA, frozen weights in NF4; needs use_peft.
        router_aux_loss_coef: of the balancing loss that a mixture of experts has, added to the
            loss; 0 is none. By default the model's own where its configuration has
            output_router_logits.
        engine: how several processes hold the model: each a whole one ("ddp"), each a part of it by
            PyTorch's FSDP2 ("fsdp2"), or by DeepSpeed's ZeRO ("deepspeed"). "auto" is what
            accelerate's launch was configured for, and else ddp.
        dp_replicate_size: groups of processes that FSDP2 shards a model within, as in accelerate
            (hybrid sharding); gradients are averaged over all.
        sp_size: processes that split the tokens of each sequence between them, as in accelerate.
        offload_params: of FSDP2, keep weights, gradients and the optimizer in CPU memory.
        reshard_after_forward: of FSDP2, let go of a layer's weights after its forward, and gather
            them again for its backward.
        seed: order of the pairs.
    """

    beta: float = 0.1
    alpha: float | str | None = None
    target_length: float | None = None
    loss_type: str | list[str] = "sigmoid"
    loss_weights: list[float] | None = None
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    ld_alpha: float | None = None
    use_weighting: bool = False
    reference_scale: float = 1.0
    target_margin: float = 0.0
    simpo_gamma: float = 0.5
    cpo_alpha: float | None = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    tdpo_alpha: float = 0.5
    pro_sft_weight: float = 0.05
    max_skip: int = 1
    list_size: int | None = None
    score_offset: str = "none"
    score_offset_weight: float = 1.0
    score_weight: bool = False
    score_label: bool = False
    learning_rate: float = 1e-6
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    num_train_epochs: int = 1
    batch_size: int = 32
    max_length: int = 1024
    max_tokens: int = 4096
    overlong: str = "truncate"
    layout: str = "auto"
    precompute_ref_log_probs: bool = True
    reference_cache: str | None = f"{CACHE}/ref_logps"
    dtype: str = "float32"
    gradient_checkpointing: bool = True
    bf16: bool = True
    save_steps: int = 50
    workspace_mib: float | None = None
    impl: str = "auto"
    activation_offloading: bool = False
    mlp_tile_tokens: int | None = None
    use_liger_kernel: bool = False
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_target_modules: list[str] | None = None
    lora_target_parameters: list[str] | None = None
    load_in_4bit: bool = False
    router_aux_loss_coef: float | None = None
    engine: str = "auto"
    dp_replicate_size: int = 1
    sp_size: int = 1
    offload_params: bool = False
    reshard_after_forward: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.alpha is None:
            self.alpha = default_alpha(self.loss_type)
        above = ("beta", "learning_rate", "max_grad_norm", "lora_alpha", "workspace_mib")
        counts = (
            "num_train_epochs", "batch_size", "save_steps", "lora_r", "mlp_tile_tokens",
            "dp_replicate_size", "sp_size",
        )  # fmt: skip
        least = dict.fromkeys(counts, 1) | {"weight_decay": 0, "seed": 0, "router_aux_loss_coef": 0}
        for name in above:
            value = getattr(self, name)
            require(self, name, value is None or value > 0, "> 0")
        for name, bound in least.items():
            value = getattr(self, name)
            require(self, name, value is None or value >= bound, f">= {bound}")
        known = self.alpha == "auto" or isinstance(self.alpha, int | float)
        require(self, "alpha", known, "a finite number or auto")
        self._check_objective()
        if self.target_length is not None:
            valid = self.alpha == "auto" and 0 < self.target_length < math.inf
            require(self, "target_length", valid, "a finite number > 0, and needs alpha=auto")
        require(self, "warmup_ratio", 0 <= self.warmup_ratio <= 1, "in [0, 1]")
        require(self, "max_length", self.max_length >= 2, ">= 2 (a prompt and a response token)")
        require(self, "max_tokens", self.max_tokens >= 3, ">= 3 (a prompt and two responses)")
        for name, choices in _CHOICES.items():
            require(self, name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        # Its linear layers compute in bf16, whatever is around them.
        fits = (self.use_peft and self.bf16) or not self.load_in_4bit
        require(self, "load_in_4bit", fits, "false without use_peft and bf16")
        for name in ("lora_r", "lora_alpha", "lora_target_modules", "lora_target_parameters"):
            require_used(self, name, self.use_peft, "use_peft be true")
        cached = self.precompute_ref_log_probs or self.reference_cache is None
        require_used(self, "reference_cache", cached, "precompute_ref_log_probs be true")

    def _check_objective(self) -> None:
        """What the losses have no use for is refused, and what they need is asked for."""
        objective, named = self.objective, f"loss_type={self.loss_type}"
        for name in ("precompute_ref_log_probs", "reference_cache"):
            otherwise = f"another loss_type be given: {self.loss_type} needs no reference"
            used = objective.needs_reference or getattr(self, name) is None
            require_used(self, name, used, otherwise)
        if objective.needs_kl and self.precompute_ref_log_probs:
            raise ConfigError(
                f"precompute_ref_log_probs=True gives no KL of tokens, which {named} needs; set "
                "precompute_ref_log_probs=false, and the reference is computed in each step"
            )
        if self.alpha == "auto":
            of_pairs = objective.shape == "pairs" and not objective.needs_prompt
            if not (self._takes_alpha and objective.needs_reference and of_pairs):
                raise ConfigError(
                    "alpha=auto needs a loss of the margin to the reference of pairs, not "
                    f"{named}; give alpha a number, or leave it out"
                )
        else:
            wanted = (
                f"another loss_type be given: {self.loss_type} has no length penalty, which is of "
                "losses of the margin, of lists and of tokens"
            )
            require_used(self, "alpha", self._takes_alpha or self.alpha == 0, wanted)
        require(self, "score_offset", self.score_offset in OFFSETS, f"one of {', '.join(OFFSETS)}")
        for name in ("score_offset", "score_label"):
            wanted = f"another loss_type be given: {self.loss_type} has no margin of a pair"
            require_used(self, name, objective.takes_margin, wanted)
        size, wanted = (
            self.list_size,
            f"another loss_type be given: {self.loss_type} takes no lists",
        )
        require(self, "list_size", size is None or size >= 2, ">= 2")
        require_used(self, "list_size", objective.shape == "lists", wanted)
        pairs = objective.shape == "pairs"
        wanted = f"another loss_type be given: {self.loss_type} is not of pairs"
        require_used(self, "score_weight", pairs, wanted)
        used = self.score_offset != "none"
        require_used(self, "score_offset_weight", used, "score_offset be given")
        require(self, "score_offset_weight", self.score_offset_weight > 0, "> 0")
        labelled = not self.score_label or self.label_smoothing == 0
        require(self, "label_smoothing", labelled, "left out beside score_label")

    @property
    def _takes_alpha(self) -> bool:
        """Whether the length penalty means something to one of the losses."""
        return any("alpha" in CHOICES[name].options for name in _names(self.loss_type))

    @cached_property
    def objective(self) -> BaseObjective:
        """The objective that is trained with; where alpha="auto", at 0.

        Raises:
            ConfigError: the losses are unknown, or have no use for an option that is given.
        """
        return self.objective_at(0.0 if self.alpha == "auto" else float(self.alpha or 0.0))

    def objective_at(self, alpha: float) -> BaseObjective:
        """The objective with another length penalty per token."""
        options = {name: getattr(self, name) for name in _OF_OBJECTIVE}
        try:
            plain = make_objective(self.loss_type, self.loss_weights, **options)
            if not self._takes_alpha:
                return plain
            return make_objective(self.loss_type, self.loss_weights, alpha=alpha, **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from None

    def uses(self, name: str) -> bool:
        """Whether one of the options that read a pair's scores is given."""
        return not is_default(self, name)

    @property
    def told_loss(self) -> str:
        """The losses with the numbers that they are trained with, as "ipo, beta=0.1"; those that
        change nothing are left out."""
        names = _names(self.loss_type)
        weights = self.loss_weights or [1.0] * len(names)
        told = [" + ".join(x if w == 1 else f"{w:g} {x}" for x, w in zip(names, weights))]
        read = {"beta", *(option for name in names for option in CHOICES[name].options)}
        if self.f_divergence_type != "alpha_divergence":
            read.discard("f_alpha_divergence_coef")
        for name in ("beta", "alpha", *_OF_OBJECTIVE[1:], *_OF_SCORES):
            value = getattr(self, name)
            neutral = _NEUTRAL.get(name, getattr(type(self), name))
            if (name in read or name in _OF_SCORES) and value not in (neutral, None):
                told.append(f"{name}={_as_given(value)}")
        return ", ".join(told)


def default_alpha(loss_type: str | Sequence[str] | None) -> float:
    """What alpha=null is: the length penalty is of length-regularized DPO, and no other loss has
    one unasked. Runs of before there were others name none."""
    return 0.01 if _names(loss_type or "sigmoid") == ["sigmoid"] else 0.0


def _names(loss_type: str | Sequence[str]) -> list[str]:
    return [loss_type] if isinstance(loss_type, str) else list(loss_type)


def _as_given(value: Any) -> str:
    """The value of an option, as one would give it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(kw_only=True)
class EvalConfig:
    """When the policy is evaluated in training, and what is made of it; names of transformers.

    Attributes:
        eval_steps: optimizer steps between evaluations; by default one at the end of each epoch.
            The start and the end are evaluated too.
        load_best_model_at_end: save the policy of the best evaluation after a step, not the last.
        metric_for_best_model: what it is best by, with or without "eval_"; default eval_loss.
        greater_is_better: whether a larger value is better; by default where the metric's name
            does not end in "loss".
    """

    eval_steps: int | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None

    def __post_init__(self) -> None:
        steps, names = self.eval_steps, [f"eval_{name}" for name in ("loss", *METRICS)]
        require(self, "eval_steps", steps is None or steps >= 1, ">= 1")
        known = self.best_metric in names
        require(self, "metric_for_best_model", known, f"one of {', '.join(names)}")
        for name in ("metric_for_best_model", "greater_is_better"):
            keeps = self.load_best_model_at_end
            require_used(self, name, keeps, "load_best_model_at_end be true")

    @property
    def best_metric(self) -> str:
        """The name of ``metric_for_best_model`` in the metrics of an evaluation."""
        return "eval_" + (self.metric_for_best_model or "loss").removeprefix("eval_")

    def is_better(self, value: float, best: float) -> bool:
        """Whether a value of that metric is better than the best so far; as good is not."""
        greater = self.greater_is_better
        if greater is None:
            greater = not self.best_metric.endswith("loss")
        return value > best if greater else value < best


def check_control(config: TrainConfig, reference: str | Path | None) -> None:
    """Raises ConfigError when another reference than the start is given and does not go together
    with the objective, or with alpha being found on the way.

    The controller reads from the log-ratios how far a round has moved, which they tell only from
    where it began (`fastdpo.train.control`).
    """
    if reference is None:
        return
    if not config.objective.needs_reference:
        raise ConfigError(
            f"reference={reference} has no effect: loss_type={config.loss_type} needs no "
            "reference; leave reference out, or give another loss_type"
        )
    if config.alpha == "auto":
        raise ConfigError(
            f"alpha=auto needs the round's start as its reference, not reference={reference}; "
            "leave reference out, or give alpha a number"
        )
