"""Reward models with a scalar head: sequence classifiers, and causal models with a `v_head`."""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastdpo.data.records import Text, messages_of
from fastdpo.data.rendering import text_of
from fastdpo.errors import ModelError
from fastdpo.model import rope
from fastdpo.model.devices import device_of, dispatching, placed
from fastdpo.model.load import check_folder, context_of
from fastdpo.progress import parts

_log = logging.getLogger(__name__)


def load_reward_model(
    spec: str,
    dtype: torch.dtype | str | None,
    batch_size: int,
    *,
    device: torch.device | str | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> "RewardModel":
    """A reward model of a folder or hub name, with its tokenizer; see `load_scorer`.

    Two kinds of checkpoints: transformers' sequence classifiers with one label, and causal models
    with a linear `v_head` in place of the language model's head, as of Starling-RM, which are
    loaded as such classifiers.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    name, _, of_tokenizer = (spec, "", "") if Path(spec).exists() else spec.partition("#")
    check_folder(name, option="scorer")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        value_head = "v_head.weight" in _tensor_names(name)
        num_labels, options = config.num_labels, {}
        if value_head:  # `transformer` and `v_head` become the body and head of a classifier
            kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
            names = {r"^transformer\.": f"{kind.base_model_prefix}.", r"^v_head\.": "score."}
            num_labels, options = 1, {"num_labels": 1, "key_mapping": names}
        model: Any = None
        if num_labels == 1:
            with dispatching(device_map) as placing:
                model, loading = AutoModelForSequenceClassification.from_pretrained(
                    name,
                    dtype=dtype or "auto",
                    trust_remote_code=False,
                    use_safetensors=True,
                    output_loading_info=True,
                    **options,
                    **placing,
                )
            tokenizer = AutoTokenizer.from_pretrained(of_tokenizer or name, trust_remote_code=False)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise ModelError(
            f"scorer {spec!r}: can't be loaded as a reward model ({type(error).__name__}: "
            f"{first_line}). Name its folder or its hub name; a Python function is written "
            "module:function."
        ) from error
    if model is None:
        raise ModelError(
            f"scorer {spec!r}: the model has {num_labels} labels. "
            "A reward model is a sequence classifier with one."
        )
    if loading["missing_keys"]:
        raise ModelError(
            f"scorer {spec!r}: the checkpoint has no {', '.join(sorted(loading['missing_keys']))}. "
            "A reward model is a sequence classifier with a trained head."
        )
    pad_id = model.config.get_text_config().pad_token_id
    if pad_id is None and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        # An end token can't pad: the model scores at the last token that isn't padding.
        pad_id = tokenizer.pad_token_id
        model.config.get_text_config().pad_token_id = pad_id
    model.config.use_cache = False
    context = min(context_of(config) or math.inf, tokenizer.model_max_length)
    if pad_id is None:
        batch_size = 1
    model = placed(model.eval(), device, f"scorer={spec!r}")
    by_length = bool(rope.attach(model))
    return RewardModel(
        model, tokenizer, pad_id, batch_size, context, until_end=value_head, by_length=by_length
    )


def _tensor_names(name: str) -> set[str]:
    """Names of the tensors in a checkpoint's safetensors files."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    missing: Any = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, "model.safetensors.index.json", **missing)
    if index is not None:
        return set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    file = cached_file(name, "model.safetensors", **missing)
    if file is None:
        return set()
    with safe_open(file, "pt") as tensors:
        return set(tensors.keys())


@dataclass(frozen=True)
class RewardModel:
    """Scores of a sequence classifier with one label, read at the last token.

    Of what is longer than its context it reads the end; a warning counts these.
    """

    model: Any
    tokenizer: Any
    pad_id: int | None
    batch_size: int
    context: float
    # The published text of models with a v_head ends in the end token; templates add a line break.
    until_end: bool = False
    # Its rotary frequencies depend on a row's length, which its positions tell (`model.rope`).
    by_length: bool = False

    @torch.inference_mode()
    def __call__(self, prompts: list[Text], responses: list[str]) -> list[float]:
        ids = [self._render(prompt, response) for prompt, response in zip(prompts, responses)]
        long = sum(len(x) > self.context for x in ids)
        if long:
            _log.warning(
                "%d of %d prompts with their responses are longer than the reward model's context "
                "of %d tokens; it reads their ends",
                long, len(ids), self.context,
            )  # fmt: skip
            ids = [x[-int(self.context) :] if len(x) > self.context else x for x in ids]
        scores = [0.0] * len(ids)
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in parts(range(0, len(ids), self.batch_size)):
            batch = by_length[start : start + self.batch_size]
            logits_B1 = self._logits([ids[i] for i in batch])
            for i, value in zip(batch, logits_B1.flatten().tolist()):
                scores[i] = value
        return scores

    def _render(self, prompt: Text, response: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self.tokenizer(text=text_of(prompt) + "\n" + response)["input_ids"]
        messages = messages_of(prompt, response)
        if self.until_end:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
            return self.tokenizer(text=text, add_special_tokens=False)["input_ids"]
        encoded = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        return encoded["input_ids"]

    def _logits(self, batch: list[list[int]]) -> Tensor:
        rows = [torch.tensor(x) for x in batch]
        # On the right: absolute positions then start at 0 in every row.
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_id or 0)
        mask = pad_sequence([torch.ones_like(x) for x in rows], batch_first=True)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.by_length:
            inputs["position_ids"] = (mask.cumsum(1) - 1) * mask
        device = device_of(self.model)
        return self.model(**{k: x.to(device) for k, x in inputs.items()}).logits.float()
