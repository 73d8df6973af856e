"""Reference log-probs on disk, so that each is computed once: across epochs, resumes and runs.

A file holds the log-prob sums of one list of pairs under one model.  Its name is a digest of what
they depend on: the weights, every token, and the way they were computed (device, dtype, layout).
Nothing that a run may vary freely is part of it (beta, learning rate, seed, batch size, budget).
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.batch import TokenizedPair
from fastdpo.checkpoint import sync

_log = logging.getLogger(__name__)


def pairs_digest(pairs: Sequence[TokenizedPair]) -> str:
    """Digest of every token of every pair, in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]).encode())
    return digest.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Digest of a model's configuration, parameters and buffers; adapters that are off count too.

    It reads the weights themselves, so it is the same for a folder, a hub name and a model in
    memory.
    """
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    if config is not None:
        # Where it was loaded from and how it attends do not change what a model is.
        settings = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
        settings = {k: v for k, v in settings.items() if k != "transformers_version"}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(memoryview(data.numpy()))
    return digest.hexdigest()


def cache_key(**parts: Any) -> str:
    """Name of a cache entry: a digest of everything the log-probs depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def load(path: Path, count: int) -> Tensor | None:
    """The (count, 2) fp64 log-prob sums in a file, None if there are none.

    A file that cannot be read, or holds something else, is passed over with a warning.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        return None
    try:
        logp_P2 = load_file(path)["logp_P2"]
    except (SafetensorError, OSError, KeyError) as error:
        problem = str(error)
    else:
        if logp_P2.shape == (count, 2) and bool(logp_P2.isfinite().all()):
            return logp_P2
        problem = f"it holds {tuple(logp_P2.shape)} numbers for {count} pairs, or not finite ones"
    _log.warning("%s is not used, the reference is computed again: %s", path, problem)
    return None


def save(path: Path, logp_P2: Tensor) -> None:
    """Write log-prob sums, whole or not at all, also where runs share a cache."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    save_file({"logp_P2": logp_P2}, scratch)
    sync(scratch)
    scratch.replace(path)
    sync(path.parent)
