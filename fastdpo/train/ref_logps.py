"""Reference log-probs on disk, so that each is computed once: across epochs, resumes and runs.

A file holds the log-prob sums of one list of pairs under one model.  In the cache its name is a
digest of what they depend on: the weights, every token, and the way they were computed
(`cache_key`).  How pairs are packed is not part of it: a run on another seed or budget reads values
that differ from its own by the rounding of a matrix product, so its first loss is log 2 to that
rounding only.
"""

import hashlib
import json
import logging
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdpo import __version__
from fastdpo.data.batch import TokenizedPair
from fastdpo.errors import ModelError
from fastdpo.storage import sync, told_when_full

_log = logging.getLogger(__name__)
_DIGESTS = "digests"  # of the weights and of the log-probs; safetensors keeps no order of entries


def pairs_digest(pairs: Sequence[TokenizedPair]) -> str:
    """Digest of every token of every pair, in order, and of what a pair counts if not 1."""
    digest = hashlib.sha256()
    for pair in pairs:
        parts: list[Any] = [pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]
        if (pair.weight, pair.smoothing) != (1.0, 0.0):
            parts.append([pair.weight, pair.smoothing])
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()


def cache_key(**parts: Any) -> str:
    """Name of a cache entry: a digest of ``parts`` and of the versions that compute log-probs."""
    parts["versions"] = [__version__, torch.__version__, version("transformers")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def load(path: Path, count: int, weights: str) -> Tensor | None:
    """The (count, 2) fp64 log-prob sums in a file, None if there are none.

    ``weights`` is the digest of the model that they must belong to, and of its length classes if
    it has any: log-probs of such a model once depended on what else was in a batch.

    A file that cannot be read, or holds something else, is passed over with a warning.
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
        whole = known == _digest(logp_P2)
        if whole and logp_P2.shape == (count, 2) and bool(logp_P2.isfinite().all()):
            return logp_P2
        problem = (
            "its SHA-256 differs, or it has none"
            if not whole
            else f"it holds {tuple(logp_P2.shape)} numbers for {count} pairs, or not finite ones"
        )
    _log.warning("%s is not used, the reference is computed again: %s", path, problem)
    return None


def save(path: Path, logp_P2: Tensor, weights: str) -> None:
    """Write log-prob sums, whole or not at all, also where runs share a cache."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    with told_when_full(path):
        save_file({"logp_P2": logp_P2}, scratch, {_DIGESTS: f"{weights} {_digest(logp_P2)}"})
    sync(scratch)
    scratch.replace(path)
    sync(path.parent)


def _digest(logp_P2: Tensor) -> str:
    return hashlib.sha256(logp_P2.contiguous().numpy().tobytes()).hexdigest()
