"""Rewards that policies give themselves: the implicit reward of DPO, and the mean likelihood."""

from collections.abc import Sequence

import torch

from fastdpo.data.records import Candidate
from fastdpo.errors import ConfigError
from fastdpo.model.load import weights_digest
from fastdpo.model.logps import load_packed, response_logps
from fastdpo.score.stage import Scorer


def implicit_reward(
    policy: str,
    previous: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    batch_size: int,
) -> Scorer:
    """log pi_t(y|x) - log pi_{t-1}(y|x), summed over the response's tokens, in nats; without beta.

    DPO's implicit reward (arXiv 2305.18290, equation 5, up to beta and a term of the prompt alone)
    used as a score, as DICE does (arXiv 2406.09760). A response without tokens scores 0.

    Args:
        policy, previous: folders or hub names of pi_t and pi_{t-1}.

    Raises ConfigError when both have the same weights.
    """
    new, old = (load_packed(x, device, dtype or torch.float32) for x in (policy, previous))
    digests = {"policy": weights_digest(new)[:16], "previous": weights_digest(old)[:16]}
    if digests["policy"] == digests["previous"]:
        raise ConfigError(
            f"scorer 'implicit': {policy} and {previous} have the same weights, so every score "
            "would be 0. previous must be the policy before."
        )

    def reward(rows: Sequence[Candidate]) -> list[float]:
        new_R, old_R = (response_logps(x, rows, batch_size=batch_size) for x in (new, old))
        return (new_R - old_R).tolist()

    return Scorer("implicit", reward, on="rows", settings=digests)


def mean_likelihood(
    policy: str, device: torch.device | str | None, dtype: torch.dtype | None, batch_size: int
) -> Scorer:
    """log pi(y|x) / |y|, the mean over the response's tokens, in nats a token.

    How CREAM (arXiv 2410.12735; its released code) ranks by a model that has no reference, which in
    its first round is M0. A response without tokens scores 0. `policy` is a folder or hub name.
    """
    model = load_packed(policy, device, dtype or torch.float32)

    def likelihood(rows: Sequence[Candidate]) -> list[float]:
        logp_R = response_logps(model, rows, batch_size=batch_size)
        return (logp_R / torch.tensor([max(1, len(row.response_ids)) for row in rows])).tolist()

    digest = weights_digest(model)[:16]
    return Scorer("likelihood", likelihood, on="rows", settings={"policy": digest})
