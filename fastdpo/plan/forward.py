"""What a model takes that only computes: it samples, scores or measures, and keeps no gradient.

As in `fastdpo.plan.memory` its code is run on tensors without content, and storages are counted.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdpo.data.batch import pack_pairs
from fastdpo.data.examples import TokenizedPair
from fastdpo.loss.ops import linear_logp
from fastdpo.model.head import packed_forward
from fastdpo.model.prepare import layout_of, prepare_model
from fastdpo.plan.live import Live
from fastdpo.plan.memory import as_on_gpu, know_the_machine, readable
from fastdpo.sample.config import SampleConfig

_CACHE = ("cache", "past_key_values")  # what transformers calls it, and did


class Forwards:
    """A model without content on a GPU, and the bytes that its forwards take.

    Args:
        configuration: transformers' of the model, which is changed.
        build: makes the model of it, on the meta device.

    Raises:
        ModelError: a model of this configuration cannot be built or run without content.
    """

    def __init__(self, configuration: Any, build: Callable[[Any], Any]) -> None:
        know_the_machine()
        self.configuration = configuration
        self.fake, self.live = FakeTensorMode(allow_non_fake_inputs=True), Live(512)
        with readable(configuration):
            with torch.device("meta"):
                self.model = build(configuration).eval().requires_grad_(False)
            with self.fake:
                self.model.to_empty(device="cpu")
                self.model.tie_weights()
        self.weights = self.live.known([*self.model.parameters(), *self.model.buffers()])

    def peak(self, run: Callable[[Any], Any]) -> int:
        """The most that ``run``, given the model, takes beside its weights."""
        live = self.live
        with readable(self.configuration), self.fake, as_on_gpu(), torch.no_grad(), live:
            start = live.bytes
            live.restart()
            run(self.model)
        return live.peak - start


# ---------------------------------------------------------------------------------------- to sample
def sampling(model: Forwards, config: SampleConfig, length: int, rows: int) -> tuple[int, int]:
    """Bytes beside the weights, and of the key-value cache when all rows are at their end.

    The cache is transformers' own.  Continuous batching keeps it in pages, of which it takes as
    many as all rows need at their full length and one more.

    Args:
        length: tokens of prompt and response, at most.
        rows: samples that are drawn at once.
    """
    cached = 0
    width = max(1, length - config.max_new_tokens)  # of the longest prompt

    def begin(model: Any) -> None:
        _draw(model(**_inputs(model, rows, width)), config)

    def end(model: Any) -> None:
        nonlocal cached
        before = live.bytes
        out = model(**_inputs(model, rows, length - 1))
        cache = out[next(name for name in _CACHE if name in out)]
        del out
        cached = live.bytes - before
        live.restart()
        mask = torch.ones(rows, length, dtype=torch.long)
        ids = torch.zeros(rows, 1, dtype=torch.long)
        known = inspect.signature(model.forward).parameters
        named = {next(name for name in _CACHE if name in known): cache}
        _draw(model(input_ids=ids, attention_mask=mask, **named), config)

    live = model.live
    most = max(model.peak(begin), model.peak(end))
    if config.backend == "continuous":
        page = 256  # tokens, as `fastdpo.sample.continuous` has it
        paged = cached * page * (-(-length // page) + 1) // length
        return most - cached + paged, paged
    return most, cached


def _inputs(model: Any, rows: int, width: int) -> dict[str, Any]:
    """As `generate` begins: only the last token's logits are made."""
    kept = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    ids = torch.zeros(rows, width, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True, **kept}


def _draw(out: Any, config: SampleConfig) -> Tensor:
    """The next token of each row, as `generate` draws it."""
    from transformers import TopPLogitsWarper

    scores = out.logits[:, -1].to(torch.float32, copy=True)
    if config.temperature > 0:
        scores = scores / config.temperature
    if config.top_p < 1:
        scores = TopPLogitsWarper(config.top_p)(None, scores)  # type: ignore[arg-type]
    return torch.multinomial(torch.softmax(scores, -1), 1)


# -------------------------------------------------------------------------------- to score, measure
def classifying(model: Forwards, rows: int, length: int) -> int:
    """Bytes beside the weights of a reward model that reads so many rows of tokens."""

    def run(model: Any) -> None:
        ids = torch.zeros(rows, length, dtype=torch.long)
        model(input_ids=ids, attention_mask=torch.ones_like(ids))

    return model.peak(run)


def packed(model: Forwards, pair: TokenizedPair, pairs: int, *, bf16: bool = False) -> int:
    """Bytes beside the weights of a model prepared by `prepared`, for log-probs of packed pairs."""
    batch = pack_pairs([pair] * pairs, layout=layout_of(model.model))

    def logps(h_TD: Tensor, w_VD: Tensor, **head: Any) -> Tensor:
        return linear_logp(h_TD, w_VD, batch.target_N, rows_N=batch.rows_N, **head)

    def run(model: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            packed_forward(model, batch, logps)

    return model.peak(run)


def prepared(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """As `fastdpo.model.logps.load_packed` has a model."""
    return lambda configuration: prepare_model(build(configuration), prove=False)
