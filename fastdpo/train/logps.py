"""Log-probs of examples under a model, kept: the sums of sequences, and those of their tokens.

The file of some examples has ``logp_S``, fp64 sums of every sequence in the order of the examples,
``logp_N``, the fp32 log-probs of all scored tokens, and ``bounds_S1``, where each sequence is in
them.  Files of before have the sums alone, as ``logp_P2``.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastdpo.errors import ModelError
from fastdpo.storage import atomic_file

_log = logging.getLogger(__name__)
ROUNDED = "+"  # between the digest of weights and what they are rounded to
_DIGESTS = "digests"  # of the weights and of the log-probs; safetensors keeps no order of entries


@dataclass(frozen=True)
class LogProbs:
    """What is known of some examples.

    Attributes:
        logp_S: sum of each sequence, fp64.
        logp_N: of each scored token, fp32; None in files of before, and where nothing reads them.
        firsts: example p has the sequences ``firsts[p] : firsts[p + 1]``.
        bounds: sequence s has the tokens ``bounds[s] : bounds[s + 1]``.
    """

    logp_S: Tensor
    logp_N: Tensor | None
    firsts: tuple[int, ...]
    bounds: tuple[int, ...]

    @classmethod
    def of_examples(
        cls, examples: Sequence[Any], logp_S: Tensor, logp_N: Tensor | None
    ) -> "LogProbs":
        firsts, bounds = places_of(examples)
        return cls(logp_S, logp_N, firsts, bounds)

    def sums(self, index: Sequence[int], ld_alpha: float | None) -> Tensor:
        """Sums of the sequences of these examples, weighted as LD-DPO weighs tokens; fp64."""
        where = [s for p in index for s in range(self.firsts[p], self.firsts[p + 1])]
        if ld_alpha is None:
            return self.logp_S[where]
        assert self.logp_N is not None
        parts = []
        for p in index:
            start, stop = self.firsts[p : p + 2]
            tokens = [self.logp_N[self.bounds[s] : self.bounds[s + 1]] for s in range(start, stop)]
            shared = min(map(len, tokens[:2]))
            for s, logp_n in enumerate(tokens):
                weight_n = torch.ones(len(logp_n), dtype=torch.float64)
                if s < 2:  # a third sequence keeps all of its tokens
                    weight_n[shared:] = ld_alpha
                parts.append((logp_n * weight_n).sum())
        return torch.stack(parts)


def places_of(examples: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First sequence of each example and first token of each sequence, and the ends."""
    responses = [example.responses for example in examples]
    lengths = [len(ids) for each in responses for ids in each]
    return (0, *accumulate(map(len, responses))), (0, *accumulate(lengths))


def load(
    path: Path, examples: Sequence[Any], weights: str | None, *, need_tokens: bool = False
) -> LogProbs | None:
    """The log-probs in a file; None if there are none that can be used.

    A file that is damaged, or is of other examples, is passed over with a warning; and so is one of
    sums alone with ``need_tokens``.

    Args:
        weights: digest of the model that they must belong to, and of its length classes if it has
            any: log-probs of such a model once depended on what else was in a batch.  After
            `ROUNDED` it may say how weights are rounded; those of another rounding are passed over
            too.  None: it is known to be theirs.

    Raises:
        ModelError: they are of another model.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    firsts, bounds = places_of(examples)
    try:
        with safe_open(path, "pt") as file:
            owner, _, known = (file.metadata() or {}).get(_DIGESTS, "").partition(" ")
            if "logp_P2" in file.keys():  # noqa: SIM118, it is no dict
                logp_S, logp_N = file.get_tensor("logp_P2").reshape(-1), None
            else:
                logp_S, logp_N = file.get_tensor("logp_S"), file.get_tensor("logp_N")
    except (SafetensorError, OSError, KeyError) as error:
        problem = str(error)
    else:
        given = owner if weights is None else weights
        (own, *rounding), (wanted, *other) = owner.split(ROUNDED), given.split(ROUNDED)
        if owner and own != wanted:
            raise ModelError(
                f"{path} holds the log-probs of another model, or computed in another way: the "
                "one that the run started from has changed since; give the old one to go on, or "
                "another output_dir to start anew"
            )
        count = bounds[-1] if logp_N is None else len(logp_N)
        if owner and rounding != other:
            problem = "it is of an engine that rounds the model's weights otherwise"
        elif known != _digest(logp_S, logp_N):
            problem = "its SHA-256 differs, or it has none"
        elif len(logp_S) != firsts[-1] or count != bounds[-1]:
            problem = (
                f"it holds {len(logp_S)} sums of {count} tokens for {firsts[-1]} responses of "
                f"{bounds[-1]}"
            )
        elif need_tokens and logp_N is None:
            problem = "it is of before, with sums alone, and ld_alpha needs those of tokens"
        else:
            return LogProbs(logp_S, logp_N, firsts, bounds)
    _log.warning("%s is not used, the reference is computed again: %s", path, problem)
    return None


def save(path: Path, found: LogProbs, weights: str) -> None:
    """Write log-probs, whole or not at all, also where runs share a cache."""
    if found.logp_N is None:  # of a cache of before
        tensors = {"logp_P2": found.logp_S.view(-1, 2)}
    else:
        bounds_S1 = torch.tensor(found.bounds)
        tensors = {"logp_S": found.logp_S, "logp_N": found.logp_N, "bounds_S1": bounds_S1}
    digests = f"{weights} {_digest(found.logp_S, found.logp_N)}"
    with atomic_file(path) as scratch:
        save_file(tensors, scratch, {_DIGESTS: digests})


def _digest(*tensors: Tensor | None) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        if x is not None:
            digest.update(x.contiguous().numpy().tobytes())
    return digest.hexdigest()
