"""Reference log-probs, each computed once and kept on disk: across epochs, resumes and runs.

A file holds the log-prob sums of one list of pairs under one model.  In the cache its name is a
digest of what they depend on: the weights, every token, and the way they were computed
(`cache_key`).  How pairs are packed is not part of it: a run on another seed or budget reads values
that differ from its own by the rounding of a matrix product, so its first loss is log 2 to that
rounding only.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdpo import __version__
from fastdpo.data.examples import TokenizedExample, TokenizedPair, TokenizedSingle
from fastdpo.errors import ModelError
from fastdpo.model.attention import has_flash_attn
from fastdpo.progress import advance, bar
from fastdpo.storage import atomic_file, cache_path
from fastdpo.train.steps import Setup, plan_epoch, reference_logp

_log = logging.getLogger(__name__)
_DIGESTS = "digests"  # of the weights and of the log-probs; safetensors keeps no order of entries


def reference_logps(setup: Setup, model: nn.Module, weights: str) -> Tensor:
    """Log-prob sums of each pair under the reference, (pairs, 2) fp64.

    They are those of the run, or of another run in ``reference_cache``, or computed and left in
    both.

    Args:
        model: the reference, or with adapters that are none of it.
        weights: digest of the reference's weights; it is used on the first process only.

    Raises:
        ModelError: those of the run are of another model, or one is not finite.
    """
    from accelerate.utils import gather_object

    accelerator, logp_P2, shared = setup.accelerator, None, None
    own, count = setup.out / "ref_logps" / "ref_logps.safetensors", len(setup.pairs)
    if setup.layout.classes:
        weights = cache_key(weights=weights, layout=setup.layout.key)
    if accelerator.is_main_process:
        logp_P2 = load(own, count, weights)
        if logp_P2 is None and setup.config.reference_cache is not None:
            shared = _cache_path(setup, weights)
            logp_P2 = load(shared, count, weights)
            if logp_P2 is not None:
                save(own, logp_P2, weights)
    [known, *_] = gather_object([logp_P2 is not None])
    if not known:
        logp_P2 = compute_reference(setup, model)
        if accelerator.is_main_process:
            save(own, logp_P2, weights)
        if shared is not None:
            try:
                save(shared, logp_P2, weights)
            except OSError as error:
                _log.warning(
                    "reference_cache: %s cannot be written, other runs will not find it: %s",
                    shared, error,
                )  # fmt: skip
    accelerator.wait_for_everyone()
    # Every process reads what the first one found.
    return load_file(own)["logp_P2"] if logp_P2 is None else logp_P2


def compute_reference(setup: Setup, model: nn.Module) -> Tensor:
    """`reference_logps` by the model, on the micro-batches of the first epoch."""
    from accelerate.utils import gather_object

    found: list[tuple[int, list[float]]] = []
    batches = list(chain.from_iterable(plan_epoch(setup, 0)))
    purpose = f"reference of {setup.name}" if setup.name else "reference"
    with bar(purpose, len(batches), "batch", shown=setup.progress):
        for index in batches:
            logp_S = reference_logp(setup, model, setup.batch(index))
            found += zip(index, logp_S.view(-1, 2).tolist())
            advance()
    logp_P2 = torch.full((len(setup.pairs), 2), float("nan"), dtype=torch.float64)
    for pair, sums in gather_object(found):
        logp_P2[pair] = torch.tensor(sums, dtype=torch.float64)
    bad = logp_P2.isfinite().all(1).logical_not().nonzero()
    if len(bad):
        raise ModelError(
            f"the reference gives pair {int(bad[0])} ({setup.pairs[int(bad[0])].where}) a log-prob "
            "that is not finite; the model is broken or overflows in bf16 (try bf16=false)"
        )
    return logp_P2


def _cache_path(setup: Setup, weights: str) -> Path:
    """Where runs that compute the same log-probs keep them."""
    config, device = setup.config, setup.accelerator.device.type
    key = cache_key(
        weights=weights,
        pairs=pairs_digest(setup.pairs),
        layout=setup.layout.key,
        device=[device, has_flash_attn() if device == "cuda" else False],
        bf16=config.bf16,
        impl=config.impl,
        liger=config.use_liger_kernel,
    )
    return cache_path(config.reference_cache or "") / f"{key}.safetensors"


def pairs_digest(pairs: Sequence[TokenizedExample], *, scores: bool = False) -> str:
    """Digest of every token of every example, in order, and of what it counts beside.

    Args:
        scores: whether the objective reads the scores of pairs, which then belong to it.
    """
    digest = hashlib.sha256()
    for pair in pairs:
        parts: list[Any]
        if isinstance(pair, TokenizedPair):
            parts = [pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]
        else:
            parts = [pair.shape, pair.prompt_ids, pair.responses, pair.scores]
        if (pair.weight, pair.label_smoothing) != (1.0, 0.0):
            parts.append([pair.weight, pair.label_smoothing])
        more: dict[str, Any] = {"margin": pair.margin} if pair.margin else {}
        if isinstance(pair, TokenizedSingle):
            more["desirable"] = pair.desirable
        if isinstance(pair, TokenizedPair):
            # In an old file a pair of these tokens has nothing more.
            names = ["rejected_prompt_ids", "prompt_nll"]
            names += ["score_chosen", "score_rejected"] if scores else []
            more |= {x: value for x in names if (value := getattr(pair, x)) not in (None, False)}
        parts += [more] if more else []
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()


def cache_key(**parts: Any) -> str:
    """Name of a cache entry: a digest of ``parts`` and of the versions that compute log-probs."""
    parts["versions"] = [__version__, torch.__version__, version("transformers")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def load(path: Path, count: int, weights: str) -> Tensor | None:
    """The log-prob sums in a file, (count, 2) fp64; None if there are none that can be used.

    A file that is damaged, or holds sums of another number of pairs, is passed over with a warning.

    Args:
        weights: digest of the model that they must belong to, and of its length classes if it has
            any: log-probs of such a model once depended on what else was in a batch.

    Raises:
        ModelError: they are of another model.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            owner, _, known = (file.metadata() or {}).get(_DIGESTS, "").partition(" ")
            logp_P2 = file.get_tensor("logp_P2")
    except (SafetensorError, OSError, KeyError) as error:
        problem = str(error)
    else:
        if owner and owner != weights:
            raise ModelError(
                f"{path} holds the log-probs of another model, or computed in another way: the "
                "one that the run started from has changed since; give the old one to go on, or "
                "another output_dir to start anew"
            )
        if known != _digest(logp_P2):
            problem = "its SHA-256 differs, or it has none"
        elif logp_P2.shape != (count, 2):
            problem = f"it holds {tuple(logp_P2.shape)} numbers for {count} pairs"
        else:
            return logp_P2
    _log.warning("%s is not used, the reference is computed again: %s", path, problem)
    return None


def save(path: Path, logp_P2: Tensor, weights: str) -> None:
    """Write log-prob sums, whole or not at all, also where runs share a cache."""
    with atomic_file(path) as scratch:
        save_file({"logp_P2": logp_P2}, scratch, {_DIGESTS: f"{weights} {_digest(logp_P2)}"})


def _digest(logp_P2: Tensor) -> str:
    return hashlib.sha256(logp_P2.contiguous().numpy().tobytes()).hexdigest()
