"""TRL's DPOTrainer with the fused, length-regularized loss."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DPOTrainer

from fastdpo import head
from fastdpo.checks import require_number
from fastdpo.ops import LinearDPOLoss, PreferenceLoss

_WANTED = {
    "loss_types": ["sigmoid"],
    "f_divergence_type": "reverse_kl",
    "ld_alpha": None,
    "use_weighting": False,
    "aux_loss_enabled": False,
}


class LengthRegularizedDPOTrainer(DPOTrainer):
    """`trl.DPOTrainer` (1.16) whose loss is `fastdpo.LinearDPOLoss`.

    Data, reference model, adapters, precomputed reference log-probs, metrics and everything else
    are TRL's.  ``lengths/chosen``, ``lengths/rejected`` and ``length_margin`` are logged as well;
    TRL's metrics of the logits are not, because none are kept.

    Args:
        alpha: length penalty per token, not multiplied by ``args.beta``; 0 is plain DPO.

    Raises:
        ValueError: an option of TRL's asks for another loss, or the head cannot be fused.
    """

    def __init__(self, *args: Any, alpha: float = 0.01, **kwargs: Any) -> None:
        alpha = require_number("alpha", alpha)
        super().__init__(*args, **kwargs)
        for name, wanted in _WANTED.items():
            value = getattr(self, name)
            if value != wanted:
                raise ValueError(
                    f"{name}={value!r} belongs to another loss; LengthRegularizedDPOTrainer needs "
                    f"{wanted!r}"
                )
        self.length_regularized_loss = LinearDPOLoss(beta=self.beta, alpha=alpha)
        for model in (self.model, self.ref_model):
            if model is not None:
                head.attach(self.accelerator.unwrap_model(model))

    def _fused(self, model: Any, inputs: dict[str, Tensor], ref_logp_S: Tensor) -> PreferenceLoss:
        """The loss of TRL's padded batch, all chosen first, run inside the model's head."""
        ids, mask = inputs["input_ids"], inputs["completion_mask"]
        targets = torch.full_like(ids, -100)
        targets[:, :-1] = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)

        def loss(h_TD: Tensor, w_VD: Tensor, **settings: Any) -> PreferenceLoss:
            h = h_TD.view(*ids.shape, -1)
            return self.length_regularized_loss(h, w_VD, targets, ref_logp_S=ref_logp_S, **settings)

        call = head.HeadCall(loss)
        return model(input_ids=ids, attention_mask=inputs["attention_mask"], head_call=call)

    def _reference(self, inputs: dict[str, Tensor]) -> Tensor:
        """Summed reference log-probs, (2B,), precomputed or from the reference model."""
        if self.precompute_ref_logps:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        zeros_S = torch.zeros(len(inputs["input_ids"]), device=inputs["input_ids"].device)
        adapters, model = nullcontext(), self.ref_model
        if model is None:  # a PEFT model without its adapters is the reference
            from trl.trainer.utils import use_adapter

            model = self.model
            plain = self.accelerator.unwrap_model(model)
            adapters = use_adapter(
                plain, adapter_name="ref" if "ref" in plain.peft_config else None
            )
        kwargs: Any = self.args.gradient_checkpointing_kwargs
        policy: Any = self.model
        with torch.no_grad(), disable_gradient_checkpointing(policy, kwargs), adapters:
            return self._fused(model, inputs, zeros_S).logp_S

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        result = self._fused(model, inputs, self._reference(inputs))
        mode = "train" if model.training else "eval"
        gather: Any = self.accelerator.gather
        if mode == "train":
            tokens = gather(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += tokens
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        for name, value in result.metrics.items():
            self._metrics[mode][name].append(gather(value).mean().item())
        return (result.loss, result) if return_outputs else result.loss
