"""Rewards that policies give themselves: the implicit reward of DPO, and the mean likelihood."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastdpo.data.records import Candidate
from fastdpo.errors import ConfigError, ModelError
from fastdpo.model.devices import offloaded
from fastdpo.model.load import weights_digest
from fastdpo.model.logps import response_logps
from fastdpo.score.stage import Scorer


def implicit_reward(
    policy: str, previous: str, load: Callable[[str], Any], batch_size: int
) -> Scorer:
    """log pi_t(y|x) - log pi_{t-1}(y|x), summed over the response's tokens, in nats; without beta.

    DPO's implicit reward (arXiv 2305.18290, equation 5, up to beta and a term of the prompt alone)
    used as a score, as DICE does (arXiv 2406.09760). A response without tokens scores 0.

    Args:
        policy, previous: folders or hub names of pi_t and pi_{t-1}.
        load: makes models of these, as `fastdpo.model.logps.load_packed`.

    Raises ConfigError when both have the same weights, and ModelError when one can't be told from
    others.
    """
    new, old = load(policy), load(previous)
    digests = {"policy": _digest(new, policy), "previous": _digest(old, previous)}
    if digests["policy"] == digests["previous"]:
        raise ConfigError(
            f"scorer 'implicit': {policy} and {previous} have the same weights, so every score "
            "would be 0. previous must be the policy before."
        )

    def reward(rows: Sequence[Candidate]) -> list[float]:
        new_R, old_R = (response_logps(x, rows, batch_size=batch_size) for x in (new, old))
        return (new_R - old_R).tolist()

    return Scorer("implicit", reward, on="rows", settings=digests)


def mean_likelihood(policy: str, load: Callable[[str], Any], batch_size: int) -> Scorer:
    """log pi(y|x) / |y|, the mean over the response's tokens, in nats a token.

    How CREAM (arXiv 2410.12735; its released code) ranks by a model that has no reference, which in
    its first round is M0. A response without tokens scores 0. `policy` is a folder or hub name,
    of which `load` makes a model.
    """
    model = load(policy)

    def likelihood(rows: Sequence[Candidate]) -> list[float]:
        logp_R = response_logps(model, rows, batch_size=batch_size)
        return (logp_R / torch.tensor([max(1, len(row.response_ids)) for row in rows])).tolist()

    settings = {"policy": _digest(model, policy)}
    return Scorer("likelihood", likelihood, on="rows", settings=settings)


def _digest(model: Any, name: str) -> str:
    """Raises ModelError where weights are not in memory to be read."""
    if offloaded(model):
        raise ModelError(
            f"device_map: the GPUs have no room for all of {name}, and weights elsewhere can't be "
            "told from others; give dtype=bfloat16, or more GPUs"
        )
    return weights_digest(model)[:16]
