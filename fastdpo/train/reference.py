"""Reference log-probs, each computed once and kept on disk: across epochs, resumes and runs.

A file holds the log-probs of one list of examples under one model (`logps`).  In the cache its name
is a digest of what they depend on: the weights, every token, and the way they were computed
(`cache_key`).  How examples are packed is not part of it: a run on another seed or budget reads
values that differ from its own by the rounding of a matrix product, so its first loss is log 2 to
that rounding only.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fastdpo import __version__
from fastdpo.data.examples import TokenizedExample, TokenizedPair
from fastdpo.errors import ModelError
from fastdpo.model.attention import has_flash_attn
from fastdpo.progress import advance, bar
from fastdpo.storage import cache_path
from fastdpo.train.logps import LogProbs, load, places_of, save
from fastdpo.train.steps import Reference, Setup, plan_epoch, reference_logps_of
from fastdpo.train.together import of_first

_log = logging.getLogger(__name__)


class Found(NamedTuple):
    """Log-probs of one example: of each of its sequences, and of all their tokens."""

    example: int
    logp_S: np.ndarray
    logp_N: np.ndarray


def known_reference(setup: Setup, model: nn.Module, weights: str) -> Reference:
    """`reference_logps` of the examples, and of the mismatched ones where there are any."""
    others = setup.mismatched
    return Reference(
        reference_logps(setup, model, weights),
        None if others is None else reference_logps(others, model, weights),
    )


def reference_logps(setup: Setup, model: nn.Module, weights: str) -> LogProbs:
    """Log-probs of each example under the reference.

    They are those of the run, or of another run in ``reference_cache``, or computed and left in
    both.

    Args:
        model: the reference, or with adapters that are none of it.
        weights: digest of the reference's weights; it is used on the first process only.

    Raises:
        ModelError: those of the run are of another model, or one is not finite.
    """
    logps: LogProbs | None = None
    own = setup.out / "ref_logps" / f"{setup.logps_name}.safetensors"
    need_tokens = setup.config.objective.ld_alpha is not None
    if setup.layout.classes:
        weights = cache_key(weights=weights, layout=setup.layout.key)
    weights += setup.engine.rounding

    def find() -> bool:
        nonlocal logps
        logps = load(own, setup.pairs, weights, need_tokens=need_tokens)
        if logps is None and setup.config.reference_cache is not None:
            shared = _cache_path(setup, weights)
            logps = load(shared, setup.pairs, weights, need_tokens=need_tokens)
            if logps is not None:
                save(own, logps, weights)
        return logps is not None

    def keep(found: Sequence[Found]) -> None:
        nonlocal logps
        logps = _in_order(setup, found)
        save(own, logps, weights)
        if setup.config.reference_cache is None:
            return
        shared = _cache_path(setup, weights)
        try:
            save(shared, logps, weights)
        except OSError as error:
            _log.warning(
                "reference_cache: %s cannot be written, other runs will not find it: %s",
                shared, error,
            )  # fmt: skip

    if not of_first(setup.engine, find):
        found = compute_reference(setup, model)
        of_first(setup.engine, lambda: keep(found))
    # Every process reads what the first one found.
    logps = logps or load(own, setup.pairs, None)
    assert logps is not None
    return logps if need_tokens else replace(logps, logp_N=None)


def compute_reference(setup: Setup, model: nn.Module) -> list[Found]:
    """What `reference_logps` are made of, by the model on the micro-batches of the first epoch.

    Returns:
        Those of all examples on the first process, in any order, and none on the others.
    """
    found: list[Found] = []
    batches = list(chain.from_iterable(plan_epoch(setup, 0)))
    purpose = f"reference of {setup.name}" if setup.name else "reference"
    planned = list(setup.engine.forwards(batches, setup.filler))
    with bar(purpose, len(planned), "batch", shown=setup.progress):
        for index, real in planned:
            batch = setup.batch(index)
            result = reference_logps_of(setup, model, batch)
            logp_S, logp_N = result.logp_S.cpu().numpy(), result.stats["logp"].cpu().numpy()
            bounds = batch.bounds_S1.tolist()
            for i, start, stop in zip(index if real else [], batch.firsts, batch.firsts[1:]):
                tokens = logp_N[bounds[start] : bounds[stop]]
                found.append(Found(i, logp_S[start:stop], tokens))
            advance()
    return setup.engine.gather_first(found)


def _in_order(setup: Setup, found: Sequence[Found]) -> LogProbs:
    """Those of all examples, in their order; raises `ModelError` where one is not finite."""
    firsts, bounds_S1 = places_of(setup.pairs)
    logp_S = torch.full((firsts[-1],), float("nan"), dtype=torch.float64)
    logp_N = torch.full((bounds_S1[-1],), float("nan"), dtype=torch.float32)
    for i, sums, tokens in found:
        start, stop = firsts[i : i + 2]
        logp_S[start:stop] = torch.from_numpy(sums)
        logp_N[bounds_S1[start] : bounds_S1[stop]] = torch.from_numpy(tokens)
    for i, (start, stop) in enumerate(pairwise(firsts)):
        if not logp_S[start:stop].isfinite().all():
            raise ModelError(
                f"the reference gives {setup.noun[:-1]} {i} ({setup.pairs[i].where}) a log-prob "
                "that is not finite; the model is broken or overflows in bf16 (try bf16=false)"
            )
    return LogProbs(logp_S, logp_N, firsts, bounds_S1)


def _cache_path(setup: Setup, weights: str) -> Path:
    """Where runs that compute the same log-probs keep them."""
    config, device = setup.config, setup.device.type
    key = cache_key(
        weights=weights,
        pairs=pairs_digest(setup.pairs, tokens_only=True),
        layout=setup.layout.key,
        device=[device, has_flash_attn() if device == "cuda" else False],
        bf16=config.bf16,
        impl=config.impl,
        liger=config.use_liger_kernel,
    )
    return cache_path(config.reference_cache or "") / f"{key}.safetensors"


def pairs_digest(examples: Sequence[TokenizedExample], *, tokens_only: bool = False) -> str:
    """Digest of every token of every example, in order, and of what its loss reads beside them.

    ``tokens_only`` leaves the latter out: it is no matter of log-probs.
    """
    digest = hashlib.sha256()
    for example in examples:
        tokens: list[Any] = [example.shape, example.prompts[0], example.responses]
        if isinstance(example, TokenizedPair):
            # In an old file a pair of these tokens has nothing more.
            tokens = [example.prompt_ids, example.chosen_ids, example.rejected_ids]
            names = ("rejected_prompt_ids", "prompt_nll")
            more = {x: value for x in names if (value := getattr(example, x))}
            tokens += [more] if more else []
        digest.update(json.dumps([*tokens, *([] if tokens_only else _beside(example))]).encode())
    return digest.hexdigest()


def _beside(example: TokenizedExample) -> list[Any]:
    """Numbers of an example that its loss reads, those that are not as usual."""
    found: list[Any] = []
    if (example.weight, example.label_smoothing) != (1.0, 0.0):
        found.append([example.weight, example.label_smoothing])
    named = {
        "margin": example.margin or None,
        "scores": example.scores,
        "desirable": getattr(example, "desirable", None),
    }
    named = {name: x for name, x in named.items() if x is not None}
    return [*found, named] if named else found


def cache_key(**parts: Any) -> str:
    """Name of a cache entry: a digest of ``parts`` and of the versions that compute log-probs."""
    parts["versions"] = [__version__, torch.__version__, version("transformers")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
