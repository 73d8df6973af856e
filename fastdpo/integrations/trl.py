"""TRL's DPOTrainer with the fused loss: all its losses, and a length penalty."""

import dataclasses
import inspect
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model, parse_flag_from_env
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import use_adapter

from fastdpo.errors import ConfigError, ModelError
from fastdpo.loss import LinearPreferenceLoss, PreferenceLoss
from fastdpo.loss.choices import make_objective
from fastdpo.loss.examples import BaseObjective
from fastdpo.loss.objectives import lr_dpo
from fastdpo.model import attention, head, rope
from fastdpo.model import prepare as policy
from fastdpo.model.devices import keep_buffers

# The losses of this TRL.
LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
ALPHA = 0.01  # the length penalty of sigmoid alone, where none is given
# Options of DPOConfig that mean here what they mean in TRL, by what acts on them.
HONOURED = {
    "the loss": """loss_type loss_weights beta label_smoothing f_divergence_type
        f_alpha_divergence_coef discopop_tau ld_alpha use_weighting""",
    "the models": """disable_dropout model_init_kwargs trust_remote_code router_aux_loss_coef
        sync_ref_model ref_model_mixup_alpha ref_model_sync_steps precompute_ref_log_probs
        precompute_ref_batch_size""",
    "the data": "dataset_num_proc max_length truncation_mode pad_to_multiple_of pad_token",
    "precision and memory": """bf16 bf16_full_eval tf32 gradient_checkpointing
        gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs
        activation_offloading torch_compile torch_compile_backend torch_compile_mode use_cache
        torch_empty_cache_steps skip_memory_metrics""",
    "the steps": """per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size
        average_tokens_across_devices num_train_epochs max_steps learning_rate lr_scheduler_type
        lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args optim_target_modules
        weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed data_seed
        full_determinism train_sampling_strategy group_by_length length_column_name
        ignore_data_skip logging_nan_inf_filter include_num_input_tokens_seen""",
    "evaluation": """per_device_eval_batch_size do_eval do_predict eval_strategy eval_steps
        eval_delay eval_on_start eval_accumulation_steps eval_do_concat_batches
        eval_use_gather_object prediction_loss_only batch_eval_metrics include_for_metrics
        label_names metric_for_best_model greater_is_better load_best_model_at_end""",
    "the loader": """dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
        dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
        dataloader_prefetch_factor remove_unused_columns accelerator_config""",
    "processes": """use_cpu local_rank ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
        ddp_find_unused_parameters ddp_static_graph ddp_timeout""",
    "files and logs": """output_dir do_train save_strategy save_steps save_total_limit
        save_on_each_node save_only_model enable_jit_checkpoint resume_from_checkpoint
        restore_callback_states_from_checkpoint logging_strategy logging_steps
        logging_first_step logging_dir log_level log_level_replica log_on_each_node report_to
        run_name project disable_tqdm debug push_to_hub hub_model_id hub_revision hub_strategy
        hub_token hub_private_repo hub_always_push trackio_space_id trackio_bucket_id
        trackio_static_space_id""",
}
# Options that must keep their default, and why.
REFUSED = {
    "label_smoothing_factor": "it smooths a cross-entropy; TRL's DPOTrainer ignores it",
    "padding_free": "TRL ignores it",
    "neftune_noise_alpha": "the reference would not have the policy's noise",
    "fp16": "half precision needs the loss scaled before its gradients are taken; use bf16=True",
    "fp16_full_eval": "half precision is not supported; use bf16_full_eval=True",
    "use_liger_kernel": "its kernels would run in the policy and not in its reference",
    "liger_kernel_config": "it belongs to use_liger_kernel",
    "fsdp": "sharded weights are not tested here; use plain data parallelism",
    "fsdp_config": "it belongs to fsdp",
    "deepspeed": "its engines are not tested here; use plain data parallelism",
    "parallelism_config": "it splits sequences or weights, which the fused loss does not know",
}
PARAMETERS = {
    "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset",
    "processing_class", "compute_metrics", "callbacks", "optimizers", "quantization_config",
    "peft_config",
}  # fmt: skip
_OF_LOSS = (
    "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "ld_alpha",
    "use_weighting",
)  # fmt: skip
_NORMALIZED = {"ipo", "sigmoid_norm"}  # losses that divide by the lengths
_PROMPTS = {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"}
NOT_LOGGED = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "aux_loss")
_REWARDS = "rewards/"
_NO_INPUT = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}


class LengthRegularizedDPOTrainer(DPOTrainer):
    """`trl.DPOTrainer` (1.16) whose loss is `fastdpo.LinearPreferenceLoss`.

    At ``alpha=0`` losses, gradients and weights are TRL's, of every ``loss_type`` and of lists of
    them.  As there, a loss is that of a device's batch: what sorts pairs or takes a mean over
    tokens does so within it.  Every option is honoured or refused before anything is loaded;
    `HONOURED` and `REFUSED` say which, and one that the losses have no use for is refused too.
    ``lengths/chosen``, ``lengths/rejected`` and ``length_margin`` are logged as well; TRL's metrics
    of the logits are not, because none are kept.  ``loss_type="sft"`` alone needs no reference, so
    none is run for its rewards: they are logged where they are precomputed.

    Args:
        alpha: length penalty per token, not multiplied by ``args.beta``, of every loss of the
            margin; 0 is TRL's loss, and all that losses of other forms take.  None is 0.01 where
            ``loss_type`` is TRL's default, sigmoid alone, and 0 with every other.

    Raises:
        ConfigError: an option asks for what this loss does not do, or for nothing.
        ModelError: the head cannot be fused or is not the one that gives the model's logits, or
            the router of a mixture of experts has a loss of its own.
    """

    def __init__(self, *args: Any, alpha: float | None = None, **kwargs: Any) -> None:
        given = inspect.signature(DPOTrainer).bind(*args, **kwargs).arguments
        _check_options(given)
        self.objective = _objective_of(given.get("args"), alpha)
        _check_best(given.get("args"), self.objective)
        self._preference_loss = LinearPreferenceLoss(self.objective)
        self._reference_loss = LinearPreferenceLoss(lr_dpo(ld_alpha=self.objective.ld_alpha))
        self._fused_heads = self._needs_positions = False
        super().__init__(*args, **kwargs)
        if self.args.ddp_broadcast_buffers is None:
            keep_buffers(self.accelerator.unwrap_model(self.model))
        self._fuse_heads()

    def _fuse_heads(self) -> None:
        """Give both models the fused head, once, before the first is run on data."""
        if self._fused_heads:
            return
        if self.aux_loss_enabled:
            raise ModelError(
                f"{type(head.base_of(self.model)).__name__} adds its router's balancing loss, "
                f"times {self.router_aux_loss_coef}, which LengthRegularizedDPOTrainer does not; "
                "set DPOConfig(router_aux_loss_coef=0.0) to train without it"
            )
        options: Any = self.args
        for model in (self.model, self.ref_model):
            if model is None:
                continue
            plain = head.base_of(self.accelerator.unwrap_model(model))
            if options.disable_dropout:  # TRL leaves those that are plain numbers
                policy._disable_dropout(plain)
            attention.keep_softcap(plain)
            if rope.attach(plain):
                configs = getattr(self.accelerator.unwrap_model(model), "peft_config", {}).values()
                if any(config.is_prompt_learning for config in configs):
                    raise ModelError(
                        f"{type(plain).__name__} chooses its rotary frequencies by a sequence's "
                        "length, which a learned prompt hides; train another kind of adapter"
                    )
                self._needs_positions = True
            with self.accelerator.autocast():
                policy.fuse_head(plain)
        self._fused_heads = True

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        if not self._fused_heads:
            self._fuse_heads()
            # TRL names the file that keeps them by the model and the rows alone.
            options: Any = self.args
            kept = (options.ld_alpha, options.max_length, options.truncation_mode)
            self._precompute_model_hash = f"{self._precompute_model_hash} {kept}"
        return super()._precompute_ref_logps(*args, **kwargs)

    def _fused(
        self,
        model: Any,
        inputs: dict[str, Any],
        ref_logp_S: Tensor | None,
        loss_of: LinearPreferenceLoss,
    ) -> PreferenceLoss:
        """The loss of TRL's padded batch, all chosen first, run inside the model's head."""
        ids, mask = inputs["input_ids"], inputs["completion_mask"]
        targets = torch.full_like(ids, -100)
        targets[:, :-1] = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        results = []

        def loss(h_TD: Tensor, w_VD: Tensor, **settings: Any) -> PreferenceLoss:
            # Virtual tokens of prompt tuning come before the real ones.
            h = h_TD.view(len(ids), -1, h_TD.shape[-1])[:, -ids.shape[1] :]
            results.append(loss_of(h, w_VD, targets, ref_logp_S=ref_logp_S, **settings))
            return results[0]

        outputs = model(**self._model_inputs(inputs), head_call=head.HeadCall(loss))
        outputs.metrics = results[0].metrics  # accelerate's conversion keeps the entries only
        return outputs

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Log-probs of the chosen and the rejected under the reference, (B,) each: sums over their
        tokens, weighed by ``ld_alpha`` as the policy's are.
        """
        adapters = nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            plain = self.accelerator.unwrap_model(self.model)
            adapters = use_adapter(plain, "ref" if "ref" in plain.peft_config else None)
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        trained: Any = self.model
        zeros_S = torch.zeros(len(inputs["input_ids"]), device=inputs["input_ids"].device)
        # What runs in place of the model's forward is not what accelerate wrapped in autocast.
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(trained, checkpointing),
            adapters,
            self.accelerator.autocast(),
        ):
            return self._fused(model, inputs, zeros_S, self._reference_loss).logp_S.chunk(2)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        ref_logp_S, needed = None, self.objective.needs_reference
        if self.precompute_ref_logps:
            ref_logp_S = torch.cat((inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]))
        elif needed:
            reference_model = self.model if self.ref_model is None else self.ref_model
            ref_logp_S = torch.cat(self.compute_ref_log_probs(reference_model, inputs))
        read_S = ref_logp_S if needed else None
        result = self._fused(model, inputs, read_S, self._preference_loss)
        metrics = result.metrics
        if not needed:
            metrics = {k: x for k, x in metrics.items() if not k.startswith(_REWARDS)}
            if ref_logp_S is not None:
                metrics |= _rewards(self.beta * (result.logp_S - ref_logp_S).detach())
        trained: Any = self.model
        mode = "train" if trained.training else "eval"
        gather: Any = self.accelerator.gather
        if mode == "train":
            of_batch: Any = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum())
            self._total_train_tokens += of_batch.sum().item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        for name, value in metrics.items():
            self._metrics[mode][name].append(gather(value).mean().item())
        if not return_outputs:
            return result.loss
        with torch.no_grad():  # the logits that compute_metrics takes, as TRL makes them
            return result.loss, model(**self._model_inputs(inputs))

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What a batch holds for the model, images and token types included.

        Where rotary frequencies depend on a sequence's length, its positions say where it ends.
        """
        given = {k: v for k, v in inputs.items() if k not in _NO_INPUT} | {"use_cache": False}
        if self._needs_positions:
            mask = inputs["attention_mask"]
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) * mask
        return given


def _rewards(reward_S: Tensor) -> dict[str, Tensor]:
    """TRL's metrics of the rewards, (2B,), which it logs of losses without a reference too."""
    chosen_P, rejected_P = reward_S.chunk(2)
    return {
        "rewards/chosen": chosen_P.mean(),
        "rewards/rejected": rejected_P.mean(),
        "rewards/accuracies": (chosen_P > rejected_P).float().mean(),
        "rewards/margins": (chosen_P - rejected_P).mean(),
    }


def _objective_of(args: Any, alpha: float | None) -> BaseObjective:
    """The objective of a DPOConfig's options, None for its defaults.

    Raises ConfigError for a loss that is none of TRL's, and for options that go together with none.
    """
    if alpha is None:
        alpha = ALPHA if args is None or args.loss_type == ["sigmoid"] else 0.0
    if args is None:
        return lr_dpo(alpha=alpha)
    unknown = next((name for name in args.loss_type if name not in LOSSES), None)
    if unknown is not None:
        raise ConfigError(
            f"DPOConfig(loss_type={args.loss_type}): {unknown!r} is no loss of TRL's DPOTrainer; "
            f"take of {', '.join(LOSSES)}"
        )
    cut = args.max_length is not None and args.truncation_mode == "keep_end"
    if cut and _NORMALIZED & {*args.loss_type}:
        raise ConfigError(
            f"DPOConfig(truncation_mode='keep_end', loss_type={args.loss_type}): where a prompt is "
            "cut off, TRL divides by a length that counts a token which is not scored; leave it at "
            "'keep_start'"
        )
    options = {name: getattr(args, name) for name in _OF_LOSS}
    if "exo_pair" in args.loss_type and not args.label_smoothing:
        raise ConfigError(
            f"DPOConfig(label_smoothing={args.label_smoothing}): exo_pair needs one between 0 and "
            "1 (the paper's is 1e-3)"
        )
    try:
        return make_objective(
            args.loss_type, args.loss_weights, beta=args.beta, alpha=alpha, among=LOSSES, **options
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"LengthRegularizedDPOTrainer: {error}") from error


def _check_options(given: dict[str, Any]) -> None:
    """Refuse what TRL would do and this loss does not, and what is not known here."""
    for name in given.keys() - PARAMETERS:
        if given[name] is not None:
            raise ConfigError(
                f"{name} is a parameter of this TRL's DPOTrainer that "
                "LengthRegularizedDPOTrainer does not know; leave it out"
            )
    args = given.get("args")
    if args is not None:
        _check_config(args)
    configs = _peft_configs(given)
    live = args is not None and not args.disable_dropout and not args.precompute_ref_log_probs
    if configs and live and given.get("ref_model") is None:
        raise ConfigError(
            "DPOConfig(disable_dropout=False): the model without its adapters is the reference, "
            "and would drop out other units than the policy; leave it at True"
        )
    for config in configs:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning and kind not in _PROMPTS:
            raise ConfigError(
                f"peft_config: {kind} is not supported by LengthRegularizedDPOTrainer; of those "
                f"that learn a prompt it takes {', '.join(sorted(_PROMPTS))}"
            )


def _peft_configs(given: dict[str, Any]) -> list[Any]:
    model, config = given["model"], given.get("peft_config")
    found: list[Any] = []
    if isinstance(model, nn.Module) and is_peft_model(model):
        found += list(getattr(model, "peft_config").values())  # noqa: B009
    return [*found, config] if hasattr(config, "is_prompt_learning") else found


def _check_config(args: Any) -> None:
    if not isinstance(args, DPOConfig):
        raise ConfigError(f"args must be a trl.DPOConfig, got {type(args).__name__}")
    honoured = {name for names in HONOURED.values() for name in names.split()}
    with warnings.catch_warnings():  # of options that TRL has other names for
        warnings.simplefilter("ignore")
        usual = DPOConfig(args.output_dir, use_cpu=args.use_cpu, bf16=args.bf16)
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        default = getattr(usual, field.name, field.default)  # not declared: a subclass's own
        if field.name in honoured or value == default:
            continue
        reason = REFUSED.get(field.name, "an option of TRL's that is not known to it")
        raise ConfigError(
            f"DPOConfig({field.name}={value!r}) is refused by LengthRegularizedDPOTrainer: "
            f"{reason}; leave it at {default!r}"
        )
    for name in ("deepspeed", "fsdp"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}"):
            raise ConfigError(
                f"accelerate is launched with {name}, which LengthRegularizedDPOTrainer refuses: "
                f"{REFUSED[name]}"
            )
    if not args.sync_ref_model:
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if getattr(args, name) != getattr(usual, name):
                raise ConfigError(
                    f"DPOConfig({name}={getattr(args, name)!r}) does nothing without "
                    "sync_ref_model=True"
                )


def _check_best(args: Any, objective: BaseObjective) -> None:
    """Refuse to choose the best model by what is not logged."""
    if args is None or args.metric_for_best_model is None:
        return
    metric = args.metric_for_best_model.removeprefix("eval_")
    why, other = "the fused loss keeps no logits and", "'loss' or 'rewards/accuracies'"
    unknown = metric in NOT_LOGGED
    if not (objective.needs_reference or args.precompute_ref_log_probs):
        unknown = unknown or metric.startswith(_REWARDS)
        why, other = f"loss_type={args.loss_type} needs no reference, so it", "'loss'"
    if unknown:
        raise ConfigError(
            f"DPOConfig(metric_for_best_model={args.metric_for_best_model!r}): {why} logs no "
            f"{metric}; take {other}"
        )
