"""Sampling by transformers' continuous batching."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from fastdpo.errors import ModelError
from fastdpo.model import attention
from fastdpo.progress import advance
from fastdpo.sample.config import SampleConfig
from fastdpo.sample.generate import LoadedSampler
from fastdpo.sample.sampler import Output, told

if TYPE_CHECKING:
    from transformers import GenerationConfig


class ContinuousSampler(LoadedSampler):
    """transformers' continuous batching on a loaded model: no padding, and a paged cache.

    What a call draws depends on its seed and prompts alone: all requests wait before the loop
    starts, the cache has room for all of them at full length, and nothing is shared with another
    call. On a CPU it runs as well and is slow: without flash-attn, attention compares each sequence
    with the cache of all others under a mask. A stop string doesn't end the generation, it cuts
    what was generated.
    """

    backend = "continuous"

    def __init__(self, model: Any, tokenizer: Any, config: SampleConfig) -> None:
        if not hasattr(model, "init_continuous_batching"):
            raise ModelError(
                f"{type(model).__name__} has no continuous batching; set backend to 'generate'"
            )
        super().__init__(model, tokenizer, config)
        if self.frequencies_vary:
            raise ModelError(
                f"the rotary frequencies of {type(model).__name__} depend on a sequence's length, "
                "and continuous batching gives one set to all; set backend to 'generate'"
            )
        self._forks = self._blocks = 0

    def generate(self, prompts: list[list[int]], num_samples: int, seed: int) -> list[list[Output]]:
        """As `Sampler.generate`.

        Raises ModelError when the cache doesn't fit, or the model can't run this way.
        """
        # A request is forked into its samples before the last token of its prompt.
        forks = num_samples if min(map(len, prompts)) > 1 else 1
        requests = [prompt for prompt in prompts for _ in range(num_samples // forks)]
        try:
            with (
                told("continuous batching", "set backend to 'generate'"),
                self.drawing() as settings,
                _paged_attention(self.model),
            ):
                settings.num_return_sequences = forks
                manager = self._manager(requests, forks, settings)
                torch.manual_seed(seed)  # a new manager has seeds of its own
                found = _run(manager, requests, forks, self.config.max_new_tokens)
        except BaseException:
            self.forget()
            raise
        return self.outputs(found, num_samples)

    def _manager(self, requests: list[list[int]], forks: int, settings: "GenerationConfig") -> Any:
        """One with room enough; kept between calls, as CUDA graphs take seconds."""
        from transformers import ContinuousBatchingConfig

        page = 256  # tokens, transformers' default
        new = self.config.max_new_tokens
        blocks = forks * sum(math.ceil((len(x) + new) / page) + 1 for x in requests)
        if forks != self._forks or blocks > self._blocks:
            self.forget()
            self._forks, self._blocks = forks, blocks
        # The same for every part, the last and smaller one too.
        most = max(self.config.batch_prompts * self.config.num_samples, forks * len(requests))
        options: dict[str, Any] = {
            "num_blocks": self._blocks,
            "max_batch_tokens": max(8192 if flash_attention(self.model) else 256, most),
            "max_requests_per_batch": most,
            # With either a call would depend on those before it.
            "allow_block_sharing": False,
            "safety_margin": 0.0,
        }
        if _chooses_flash():
            options["auto_switch_to_flash"] = False
        manager = self.model.init_continuous_batching(
            generation_config=settings,
            continuous_batching_config=ContinuousBatchingConfig(**options),
        )
        if not manager.warmed_up:
            manager.warmup()
        return manager

    def forget(self) -> None:
        """Give back the cache."""
        self._forks = self._blocks = 0
        self.model.destroy_cached_continuous_batching_manager()

    def close(self) -> None:
        """Give back the cache, and let go of the model."""
        if self.model is not None:
            self.forget()
        super().close()


def _run(
    manager: Any, requests: list[list[int]], forks: int, max_new_tokens: int
) -> list[list[int]]:
    """Token ids of all samples, those of a request one after the other."""
    # Queued before the loop starts, so that its batches don't depend on timing. A manager that has
    # stopped takes no requests until its status is cleared, which it does itself at the start only.
    manager.background_thread_status.clear()
    names = manager.add_requests(requests, max_new_tokens=max_new_tokens)
    if manager.input_queue.qsize() != len(requests):
        raise RuntimeError("requests were refused")
    children = [f"__child#{i}" for i in range(forks - 1)]  # what transformers calls the forks
    wanted = [name + child for name in names for child in (*children, "")]
    found: dict[str, list[int]] = {}
    manager.start()
    try:
        while len(found) < len(wanted):
            result = manager.get_result(timeout=1.0)
            if result is not None and result.error is not None:
                raise RuntimeError(result.error)
            if result is not None and result.is_finished():
                found[result.request_id] = result.generated_tokens
                advance()
            if result is None and not manager.is_running():
                raise RuntimeError("the generation loop ended early")
    except BaseException:
        manager.stop(hard_stop=True)
        raise
    manager.stop(keep_for_next_session=True)
    return [found[name] for name in wanted]


def _chooses_flash() -> bool:
    """Whether this transformers has paged attention under its plain names, and a switch for it."""
    from transformers import ContinuousBatchingConfig

    return "auto_switch_to_flash" in {field.name for field in fields(ContinuousBatchingConfig)}


@contextmanager
def _paged_attention(model: Any) -> Iterator[None]:
    """The model with an attention that can read a paged cache.

    Left to itself, transformers downloads one where `kernels` is installed.
    """
    own = model.config._attn_implementation
    name = flash_attention(model) or own
    model.set_attn_implementation(name if _chooses_flash() else f"paged|{name}")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def flash_attention(model: Any) -> str | None:
    """The attention by which continuous batching pays; None where the model or device has none."""
    half = model.dtype in (torch.bfloat16, torch.float16)
    usable = model.device.type == "cuda" and half and getattr(model, "_supports_flash_attn", False)
    return "flash_attention_2" if usable and attention.has_flash_attn() else None
