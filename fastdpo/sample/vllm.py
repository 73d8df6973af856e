"""Sampling by vLLM in this process."""

import logging
from typing import Any

from fastdpo.errors import ModelError
from fastdpo.model.load import policy_digest
from fastdpo.progress import advance
from fastdpo.sample.config import SampleConfig
from fastdpo.sample.launch import alone
from fastdpo.sample.sampler import Ending, Output, Sampler, finished, free, prompt_seed, told

_log = logging.getLogger(__name__)


class VllmSampler(Sampler):
    """vLLM in this process, `pip install 'fastdpo[vllm]'`. Not verified on a device.

    Written after its published API (docs.vllm.ai: `LLM`, `SamplingParams`). Every prompt has a
    seed, and vLLM counts up from it for the prompt's samples. It repeats itself bit for bit only
    with VLLM_BATCH_INVARIANT=1 in the environment (docs.vllm.ai, "Reproducibility").
    """

    backend = "vllm"

    def __init__(
        self, policy: str, ending: Ending, config: SampleConfig, max_length: int | None
    ) -> None:
        try:
            from vllm import LLM  # type: ignore[import-not-found]
        except ImportError as error:
            raise ModelError(
                f"backend='vllm' needs vLLM ({error}): pip install 'fastdpo[vllm]'"
            ) from error
        super().__init__(config, ending)
        self.policy, self.dtype, self.context = policy_digest(policy), config.dtype, max_length
        try:
            with alone():
                self._llm: Any = LLM(
                    model=policy,
                    dtype=config.dtype,
                    max_model_len=max_length,
                    generation_config="vllm",  # its own defaults, not the model's
                )
        except Exception as error:
            raise ModelError(f"vLLM can't load model={policy!r}: {error}") from error

    def generate(self, prompts: list[list[int]], num_samples: int, seed: int) -> list[list[Output]]:
        """As `Sampler.generate`.

        Raises ModelError when the engine has died, or gave a response up.
        """
        from vllm import SamplingParams  # type: ignore[import-not-found]

        config = self.config
        common = dict(
            n=num_samples,
            temperature=float(config.temperature),
            top_p=float(config.top_p),
            max_tokens=config.max_new_tokens,
            stop=list(config.stop) or None,
            stop_token_ids=self.ending.end_ids,
            skip_special_tokens=False,
            detokenize=bool(config.stop),
        )
        with told("vLLM", "start again: parts that are written stay"):
            found = self._llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [SamplingParams(seed=prompt_seed(seed, i), **common) for i in range(len(prompts))],
                use_tqdm=False,
            )
            advance(len(prompts) * num_samples)  # its engine tells of none before
            by_sample = (sorted(request.outputs, key=lambda x: x.index) for request in found)
            return [
                [finished(self.ending, list(x.token_ids), x.finish_reason) for x in outputs]
                for outputs in by_sample
            ]

    def close(self) -> None:
        """End the engine, whose worker is a process that may outlive the object."""
        if self._llm is not None:
            shutdown = getattr(self._llm, "shutdown", None)
            try:
                (shutdown or self._llm.llm_engine.engine_core.shutdown)()
            except Exception as error:  # of a dead one; it mustn't hide why it died
                _log.warning("vLLM's engine didn't end in order: %s", error)
        self._llm = None
        free()
