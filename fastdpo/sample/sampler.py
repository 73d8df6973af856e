"""What all samplers share: what they give, where a response ends, and the errors they raise.

    outputs = GenerateSampler(model, tokenizer, config).generate(prompt_ids, 4, seed=7)

gives `[prompt][sample]`. Token ids go in and come out, so nothing is tokenized twice. Every backend
draws from the same distribution, softmax(logits / temperature) cut at top_p: what a model brings
along in its generation config is left out. Their random numbers differ, and so do their samples.
"""

import gc
import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

from fastdpo.errors import ModelError
from fastdpo.sample.config import SampleConfig


class Output(NamedTuple):
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


class Sampler(ABC):
    """A model that is ready to sample.

    Attributes:
        config: what it was made with.
        ending: where its responses end.
        backend: its name.
        policy: tells its weights from others; None: unknown.
        dtype: theirs, like "bfloat16"; None: unknown.
        context: the most tokens of a prompt with its response; None: no limit.
        vocab: how many tokens have embeddings; None: unknown, or it refuses others itself.
        at_once: how many calls of `generate` may run at the same time, in threads.
    """

    backend: str
    policy: str | None = None
    dtype: str | None = None
    context: int | None = None
    vocab: int | None = None
    at_once: int = 1

    def __init__(self, config: SampleConfig, ending: Ending) -> None:
        self.config, self.ending = config, ending

    @abstractmethod
    def generate(self, prompts: list[list[int]], num_samples: int, seed: int) -> list[list[Output]]:
        """`num_samples` responses to every prompt, `[prompt][sample]`; the seed decides them.

        Calls `fastdpo.progress.advance` for each response that is done.

        Raises ModelError or RemoteError, saying what may help, when they can't be had.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back memory and processes, and end calls of `generate` that wait."""


def shorter(*lengths: int | None) -> int | None:
    """The least of those that are known."""
    return min((x for x in lengths if x is not None), default=None)


def prompt_seed(seed: int, place: int) -> int:
    """The seed of one prompt of a part, below 2**48: vLLM counts up from it for its samples."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{place}".encode()).digest()[:6], "big")


def finished(ending: Ending, ids: list[int], reason: Any) -> Output:
    """What vLLM returned, cut as the other backends' responses are; its reason stays.

    Raises ValueError when the response was given up.
    """
    if reason not in ("stop", "length"):
        raise ValueError(f"a response has finish_reason {reason!r}")
    output = ending.cut(ids)
    return output if output.finish_reason == "stop" else Output(output.ids, reason)


@contextmanager
def told(what: str, otherwise: str = "", *, lower: str = "batch_prompts") -> Iterator[None]:
    """What a backend raises, as a ModelError that says what may help; `lower` where memory is
    short."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        advice = f"lower {lower} if memory is short" + (otherwise and f", or {otherwise}")
        raise ModelError(f"{what} failed ({type(error).__name__}: {reason}); {advice}") from error


def free() -> None:
    """Give back what the models that are gone took of the GPU."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
