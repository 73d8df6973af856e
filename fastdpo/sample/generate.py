"""Sampling by transformers' `generate`, and what its two ways to sample share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from fastdpo.model import rope
from fastdpo.model.load import context_of, dtype_name, end_ids
from fastdpo.model.noise import random_state_kept
from fastdpo.progress import advance
from fastdpo.sample.config import SampleConfig
from fastdpo.sample.sampler import Ending, Output, Sampler, free, told

if TYPE_CHECKING:
    from transformers import GenerationConfig


class LoadedSampler(Sampler):
    """Samples from a loaded model; its settings and the random state are left as they were."""

    def __init__(self, model: Any, tokenizer: Any, config: SampleConfig) -> None:
        ends = end_ids(model.generation_config.eos_token_id, tokenizer.eos_token_id)
        super().__init__(config, Ending(ends, config.stop, tokenizer))
        self.model: Any = model
        # A row's frequencies are its own, whatever else is in the batch.
        self.frequencies_vary = rope.attach(model)
        self.context, self.dtype = context_of(model.config), dtype_name(model.dtype)
        self.vocab: int = model.get_input_embeddings().weight.shape[0]

    @contextmanager
    def drawing(self) -> Iterator["GenerationConfig"]:
        """The settings that the config asks for; within the block the model has no others."""
        from transformers import GenerationConfig

        config, own, was_training = self.config, self.model.generation_config, self.model.training
        options: dict[str, Any] = {"do_sample": False}
        if config.temperature > 0:
            # top_k is 50 where it isn't set.
            options = {"do_sample": True, "top_k": 0, "top_p": float(config.top_p)}
            options["temperature"] = float(config.temperature)
        settings = GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            bos_token_id=own.bos_token_id,
            eos_token_id=self.ending.end_ids or None,
            use_cache=True,
            **options,
        )
        # generate fills whatever a given config leaves open from the model's own.
        self.model.generation_config = GenerationConfig()
        self.model.eval()
        try:
            with torch.no_grad(), random_state_kept():
                yield settings
        finally:
            self.model.generation_config = own
            self.model.train(was_training)

    def outputs(self, rows: list[list[int]], num_samples: int) -> list[list[Output]]:
        """The responses in rows of tokens, by prompt."""
        found = [self.ending.cut(row) for row in rows]
        return [found[i : i + num_samples] for i in range(0, len(found), num_samples)]

    def close(self) -> None:
        """Let go of the model."""
        self.model = None
        free()


class GenerateSampler(LoadedSampler):
    """transformers' `generate` on a loaded model, one padded batch a call."""

    backend = "generate"

    def __init__(self, model: Any, tokenizer: Any, config: SampleConfig) -> None:
        super().__init__(model, tokenizer, config)
        # What pads is masked, but must have an embedding, which an added <pad> may not have.
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, *self.ending.end_ids, 0)
        self._pad_id = next(x for x in ids if x is not None and x < self.vocab)

    def generate(
        self, prompts: list[list[int]], num_samples: int, seed: int, streamer: Any = None
    ) -> list[list[Output]]:
        """As `Sampler.generate`; a single response also goes to transformers' `streamer`.

        Raises ModelError when memory runs out, or the model can't run.
        """
        rows, width = [p for p in prompts for _ in range(num_samples)], max(map(len, prompts))
        # On the left, so that every response continues its prompt.
        ids = torch.tensor([[self._pad_id] * (width - len(p)) + p for p in rows])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rows])

        device = self.model.device
        ends, ended = torch.tensor(self.ending.end_ids, dtype=torch.long, device=device), 0
        over = torch.zeros(len(rows), dtype=torch.bool, device=device)

        def stopped(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            """Which rows have a stop string; tells on the way how many have ended."""
            nonlocal ended
            reached = torch.zeros_like(over)
            if self.ending.stop:
                texts = input_ids[:, width:].tolist()
                reached = torch.tensor([self.ending.reached(row) for row in texts], device=device)
            over.logical_or_(reached).logical_or_(torch.isin(input_ids[:, -1], ends))
            before, ended = ended, int(over.sum())
            advance(ended - before)
            return reached

        # One prompt at a time can't be fewer.
        lower = "batch_prompts" if self.config.batch_prompts > 1 else "max_new_tokens"
        with told("generate", lower=lower), self.drawing() as settings:
            settings.pad_token_id = self._pad_id
            torch.manual_seed(seed)
            output = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=settings,
                stopping_criteria=[stopped],
                streamer=streamer,
            )
            advance(len(rows) - ended)  # those cut off
            return self.outputs(output[:, width:].tolist(), num_samples)
