"""Rewards that policies give themselves: the implicit reward of DPO, and the mean likelihood."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdpo.data.records import Candidate
from fastdpo.errors import ConfigError
from fastdpo.model.load import weights_digest
from fastdpo.model.logps import load_packed, response_logps


def load_implicit(
    policy: str,
    previous: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    batch_size: int,
) -> "ImplicitReward":
    """The implicit reward of two folders or hub names."""
    names = {"policy": policy, "previous": previous}
    models = {key: load_packed(x, device, dtype or torch.float32) for key, x in names.items()}
    digests = {key: weights_digest(model)[:16] for key, model in models.items()}
    if digests["policy"] == digests["previous"]:
        raise ConfigError(
            f"scorer 'implicit': {policy} and {previous} have the same weights, so every score "
            "would be 0. previous must be the policy before."
        )
    return ImplicitReward(**models, batch_size=batch_size, digests=digests)


@dataclass(frozen=True)
class ImplicitReward:
    """log pi_t(y|x) - log pi_{t-1}(y|x), summed over the response's tokens, in nats; without beta.

    DPO's implicit reward (arXiv 2305.18290, equation 5, up to beta and a term of the prompt alone)
    used as a score, as DICE does (arXiv 2406.09760). A response without tokens scores 0.
    """

    policy: Any
    previous: Any
    batch_size: int
    digests: dict[str, str]  # of both models' weights

    def __call__(self, rows: Sequence[Candidate]) -> list[float]:
        new_R, old_R = (
            response_logps(model, rows, batch_size=self.batch_size)
            for model in (self.policy, self.previous)
        )
        return (new_R - old_R).tolist()


def load_likelihood(
    policy: str, device: torch.device | str | None, dtype: torch.dtype | None, batch_size: int
) -> "Likelihood":
    """The mean log-probability under a folder or hub name."""
    model = load_packed(policy, device, dtype or torch.float32)
    return Likelihood(model, batch_size, {"policy": weights_digest(model)[:16]})


@dataclass(frozen=True)
class Likelihood:
    """log pi(y|x) / |y|, the mean over the response's tokens, in nats a token.

    How CREAM (arXiv 2410.12735; its released code) ranks by a model that has no reference, which in
    its first round is M0. A response without tokens scores 0.
    """

    policy: Any
    batch_size: int
    digests: dict[str, str]  # of the model's weights

    def __call__(self, rows: Sequence[Candidate]) -> list[float]:
        logp_R = response_logps(self.policy, rows, batch_size=self.batch_size)
        counts_R = torch.tensor([max(1, len(row.response_ids)) for row in rows])
        return (logp_R / counts_R).tolist()
