"""What draws samples: transformers' `generate` and continuous batching, and vLLM.

    outputs = GenerateSampler(model, tokenizer, config).generate(prompt_ids, 4, seed=7)

gives `[prompt][sample]`. Token ids go in and come out, so nothing is tokenized twice. Every backend
draws from the same distribution, softmax(logits / temperature) cut at top_p: what a model brings
along in its generation config is left out. Their random numbers differ, and so do their samples.
`fastdpo.sample.server` is the one over HTTP, `fastdpo.sample.stage.open_sampler` chooses.
"""

import gc
import hashlib
import logging
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from fastdpo.errors import ModelError
from fastdpo.model import rope
from fastdpo.model.identity import dtype_name, policy_digest
from fastdpo.model.load import context_of, end_ids
from fastdpo.model.noise import random_state_kept
from fastdpo.sample.config import SampleConfig

if TYPE_CHECKING:
    from transformers import GenerationConfig

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """A response: `ids` up to and with the token that ended it."""

    ids: list[int]
    finish_reason: Literal["stop", "length"]


class Ending:
    """Where responses end: at an end token, or at the token that completes a stop string."""

    def __init__(self, end_ids: list[int], stop: Sequence[str], tokenizer: Any) -> None:
        self.end_ids, self.stop, self._tokenizer = end_ids, list(stop), tokenizer
        # Tokens that hold the whole of a stop string: each has a byte of it at least, but for the
        # few that decode to nothing.
        self._window = max((len(x.encode()) for x in self.stop), default=0) + 8

    def cut(self, ids: list[int]) -> Output:
        """The response within `ids`; what follows its end, such as padding, is dropped."""
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), None)
        before = ids[:end]
        if self._stops(before):
            last = bisect_left(range(len(before)), True, key=lambda i: self._stops(before[: i + 1]))
            return Output(before[: last + 1], "stop")
        return Output(ids, "length") if end is None else Output(ids[: end + 1], "stop")

    def reached(self, ids: list[int]) -> bool:
        """Whether a response in the making has a stop string; cheap while it hasn't."""
        return self._stops(ids[-self._window :]) and self._stops(ids)

    def text(self, ids: list[int]) -> str:
        """A response's text, without special tokens and up to the first stop string."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text[: min((at for x in self.stop if (at := text.find(x)) >= 0), default=None)]

    def _stops(self, ids: list[int]) -> bool:
        """Special tokens are looked at too: a stop string may be one."""
        if not self.stop or not ids:
            return False
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return any(x in text for x in self.stop)


class Sampler(Protocol):
    """A model that is ready to sample.

    `config` is what it was made with, `backend` its name; `policy` tells its weights from others,
    `dtype` is theirs, like "bfloat16" (None: unknown); `context` is the most tokens of a prompt
    with its response (None: no limit), `vocab` how many tokens have embeddings (None: unknown),
    `at_once` how many calls of `generate` may run at the same time, in threads.
    """

    config: SampleConfig
    backend: str
    policy: str | None
    dtype: str | None
    context: int | None
    vocab: int | None
    at_once: int
    ending: Ending

    def generate(self, prompts: list[list[int]], num_samples: int, seed: int) -> list[list[Output]]:
        """`num_samples` responses to every prompt, `[prompt][sample]`; the seed decides them."""
        ...

    def close(self) -> None:
        """Give back memory and processes, and end calls of `generate` that wait."""
        ...


def prompt_seed(seed: int, place: int) -> int:
    """The seed of one prompt of a part, below 2**48: vLLM counts up from it for its samples."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{place}".encode()).digest()[:6], "big")


# transformers


def model_sampler(
    model: Any, tokenizer: Any, config: SampleConfig
) -> "GenerateSampler | ContinuousSampler":
    """The sampler of a loaded model: as `config.backend` says, "auto" as `SampleConfig` has it.

    Raises ModelError when the backend can't be used with a loaded model, or with this one.
    """
    if config.backend == "vllm" or config.asks_server:
        raise ModelError(
            "a loaded model can't be sampled by vLLM: give open_sampler its folder, or set backend "
            "to 'generate'"
        )
    if config.backend == "continuous":
        return ContinuousSampler(model, tokenizer, config)
    if config.backend == "auto" and model.device.type == "cuda":
        reason = _why_not_continuous(model, tokenizer, config)
        if reason is None:
            return ContinuousSampler(model, tokenizer, config)
        _log.warning("sampling in padded batches, not by continuous batching: %s", reason)
    return GenerateSampler(model, tokenizer, config)


def _why_not_continuous(model: Any, tokenizer: Any, config: SampleConfig) -> str | None:
    """None where continuous batching should pay on a GPU, and a trial of it works."""
    if config.stop:
        return "it can't end a response at a stop string"
    if _flash_attention(model) is None:
        return "without flash-attn it compares every sequence with the cache of all others"
    try:
        trial = replace(config, num_samples=1, batch_prompts=1, max_new_tokens=2)
        sampler = ContinuousSampler(model, tokenizer, trial)
        sampler.generate([[0, 0]], 1, seed=0)
        sampler.forget()
    except ModelError as error:
        return str(error)
    return None


class GenerateSampler:
    """transformers' `generate` on a loaded model, one padded batch a call."""

    backend = "generate"
    at_once = 1
    policy: str | None = None

    def __init__(self, model: Any, tokenizer: Any, config: SampleConfig) -> None:
        self.model: Any = model
        rope.attach(model)  # a row's frequencies are its own, whatever else is in the batch
        self.config, self.context = config, context_of(model.config)
        vocab = model.get_input_embeddings().weight.shape[0]
        self.vocab: int | None = vocab
        self.dtype: str | None = dtype_name(model.dtype)
        ends = end_ids(model.generation_config.eos_token_id, tokenizer.eos_token_id)
        self.ending = Ending(ends, config.stop, tokenizer)
        # What pads is masked, but must have an embedding, which an added <pad> may not have.
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, *ends, 0)
        self._pad_id = next(x for x in ids if x is not None and x < vocab)

    def generate(self, prompts: list[list[int]], num_samples: int, seed: int) -> list[list[Output]]:
        """As `Sampler.generate`. Model settings and random state are left as they were.

        Raises ModelError when memory runs out, or the model can't run.
        """
        settings = _settings(self.config, self.ending.end_ids)
        settings.pad_token_id = self._pad_id
        with (
            _told("generate"),
            torch.no_grad(),
            _only_these(self.model, settings),
            random_state_kept(),
        ):
            torch.manual_seed(seed)
            rows = self._draw(prompts, num_samples, settings)
        outputs = [self.ending.cut(row) for row in rows]
        return [outputs[i : i + num_samples] for i in range(0, len(outputs), num_samples)]

    def _draw(
        self, prompts: list[list[int]], num_samples: int, settings: "GenerationConfig"
    ) -> list[list[int]]:
        width = max(map(len, prompts))
        # On the left, so that every response continues its prompt.
        ids = torch.tensor([[self._pad_id] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        ids, mask = (x.repeat_interleave(num_samples, 0).to(self.model.device) for x in (ids, mask))
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            stopping_criteria=self._stopping(width),
        )
        return output[:, width:].tolist()

    def _stopping(self, width: int) -> Any:
        """For `generate`, which rows have reached a stop string."""
        from transformers import StoppingCriteriaList

        def reached(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            done = [self.ending.reached(row) for row in input_ids[:, width:].tolist()]
            return torch.tensor(done, device=input_ids.device)

        return StoppingCriteriaList([reached] if self.ending.stop else [])  # type: ignore[list-item]

    def close(self) -> None:
        """Let go of the model."""
        self.model = None
        _free()


class ContinuousSampler:
    """transformers' continuous batching on a loaded model: no padding, and a paged cache.

    What a call draws depends on its seed and prompts alone: all requests wait before the loop
    starts, the cache has room for all of them at full length, and nothing is shared with another
    call. On a CPU it runs as well and is slow: without flash-attn, attention compares each sequence
    with the cache of all others under a mask. A stop string doesn't end the generation, it cuts
    what was generated.
    """

    backend = "continuous"
    at_once = 1
    policy: str | None = None

    def __init__(self, model: Any, tokenizer: Any, config: SampleConfig) -> None:
        try:
            from transformers import ContinuousBatchingConfig  # noqa: F401
        except ImportError as error:
            raise ModelError(
                "backend='continuous' needs a transformers with ContinuousBatchingConfig; upgrade "
                "it, or set backend to 'generate'"
            ) from error
        if not hasattr(model, "init_continuous_batching"):
            raise ModelError(
                f"{type(model).__name__} has no continuous batching; set backend to 'generate'"
            )
        if rope.attach(model):
            raise ModelError(
                f"the rotary frequencies of {type(model).__name__} depend on a sequence's length, "
                "and continuous batching gives one set to all; set backend to 'generate'"
            )
        self.model: Any = model
        self.config, self.context = config, context_of(model.config)
        self.vocab: int | None = model.get_input_embeddings().weight.shape[0]
        self.dtype: str | None = dtype_name(model.dtype)
        ends = end_ids(model.generation_config.eos_token_id, tokenizer.eos_token_id)
        self.ending = Ending(ends, config.stop, tokenizer)
        self._forks = self._blocks = 0

    def generate(self, prompts: list[list[int]], num_samples: int, seed: int) -> list[list[Output]]:
        """As `Sampler.generate`. Model settings and random state are left as they were.

        Raises ModelError when the cache doesn't fit, or the model can't run this way.
        """
        # A request is forked into its samples before the last token of its prompt.
        forks = num_samples if min(map(len, prompts)) > 1 else 1
        requests = [prompt for prompt in prompts for _ in range(num_samples // forks)]
        settings = _settings(self.config, self.ending.end_ids)
        settings.num_return_sequences = forks
        try:
            with (
                _told("continuous batching", "set backend to 'generate'"),
                torch.no_grad(),
                _only_these(self.model, settings),
                _paged_attention(self.model),
                random_state_kept(),
            ):
                manager = self._manager(requests, forks, settings)
                torch.manual_seed(seed)  # a new manager has seeds of its own
                found = _run(manager, requests, forks, self.config.max_new_tokens)
        except BaseException:
            self.forget()
            raise
        outputs = [self.ending.cut(ids) for ids in found]
        return [outputs[i : i + num_samples] for i in range(0, len(outputs), num_samples)]

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
            "max_batch_tokens": max(8192 if _flash_attention(self.model) else 256, most),
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
        self.model = None
        _free()


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
    wanted = [x for name in names for x in (*_children(name, forks), name)]
    found: dict[str, list[int]] = {}
    manager.start()
    try:
        while len(found) < len(wanted):
            result = manager.get_result(timeout=1.0)
            if result is not None and result.error is not None:
                raise RuntimeError(result.error)
            if result is not None and result.is_finished():
                found[result.request_id] = result.generated_tokens
            if result is None and not manager.is_running():
                raise RuntimeError("the generation loop ended early")
    except BaseException:
        manager.stop(hard_stop=True)
        raise
    manager.stop(keep_for_next_session=True)
    return [found[name] for name in wanted]


def _children(name: str, forks: int) -> list[str]:
    """What transformers calls the forks of a request, the request itself left out."""
    return [f"{name}__child#{i}" for i in range(forks - 1)]


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
    name = _flash_attention(model) or own
    model.set_attn_implementation(name if _chooses_flash() else f"paged|{name}")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _flash_attention(model: Any) -> str | None:
    from fastdpo.model.attention import has_flash_attn

    half = model.dtype in (torch.bfloat16, torch.float16)
    usable = model.device.type == "cuda" and half and getattr(model, "_supports_flash_attn", False)
    return "flash_attention_2" if usable and has_flash_attn() else None


def _settings(config: SampleConfig, ends: list[int]) -> "GenerationConfig":
    from transformers import GenerationConfig

    options: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        # top_k is 50 where it isn't set.
        options = {
            "do_sample": True,
            "temperature": float(config.temperature),
            "top_p": float(config.top_p),
            "top_k": 0,
        }
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens, eos_token_id=ends or None, use_cache=True, **options
    )


@contextmanager
def _only_these(model: Any, settings: "GenerationConfig") -> Iterator[None]:
    """The model in eval mode and without a generation config of its own."""
    from transformers import GenerationConfig

    own, was_training = model.generation_config, model.training
    settings.bos_token_id = own.bos_token_id
    # generate fills whatever a given config leaves open from the model's own.
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)


@contextmanager
def _told(what: str, otherwise: str = "") -> Iterator[None]:
    """What a backend raises, as a ModelError that says what may help."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        advice = "lower batch_prompts if memory is short" + (otherwise and f", or {otherwise}")
        raise ModelError(f"{what} failed ({type(error).__name__}: {reason}); {advice}") from error


def _free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# vLLM


class VllmSampler:
    """vLLM in this process, `pip install 'fastdpo[vllm]'`. Not verified on a device.

    Written after its published API (docs.vllm.ai: `LLM`, `SamplingParams`). Every prompt has a
    seed, and vLLM counts up from it for the prompt's samples. It repeats itself bit for bit only
    with VLLM_BATCH_INVARIANT=1 in the environment (docs.vllm.ai, "Reproducibility").
    """

    backend = "vllm"
    at_once = 1
    vocab: int | None = None  # it refuses other tokens itself

    def __init__(
        self,
        policy: str,
        ending: Ending,
        config: SampleConfig,
        *,
        max_length: int | None,
    ) -> None:
        try:
            from vllm import LLM  # type: ignore[import-not-found]
        except ImportError as error:
            raise ModelError(
                f"backend='vllm' needs vLLM ({error}): pip install 'fastdpo[vllm]'"
            ) from error
        self.config, self.ending, self.context = config, ending, max_length
        self.policy: str | None = policy_digest(policy)
        self.dtype: str | None = config.dtype
        try:
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
        with _told("vLLM", "start again: parts that are written stay"):
            found = self._llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [SamplingParams(seed=prompt_seed(seed, i), **common) for i in range(len(prompts))],
                use_tqdm=False,
            )
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
        _free()


def finished(ending: Ending, ids: list[int], reason: Any) -> Output:
    """What vLLM returned, cut as the other backends' responses are; its reason stays.

    Raises ValueError when the response was given up.
    """
    if reason not in ("stop", "length"):
        raise ValueError(f"a response has finish_reason {reason!r}")
    output = ending.cut(ids)
    return output if output.finish_reason == "stop" else Output(output.ids, reason)
