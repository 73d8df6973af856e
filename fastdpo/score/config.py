"""The options of scoring: of ``fastdpo score``, and the section ``score`` of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastdpo.errors import ConfigError, require, require_used
from fastdpo.model.devices import DEVICE_MAPS, is_device_map
from fastdpo.model.load import DTYPES
from fastdpo.remote import Remote, check_url

if TYPE_CHECKING:
    from fastdpo.score.stage import Scorer


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Where scores come from. Raises ConfigError, naming the option, when one is out of range.

    Attributes:
        scorer: a Python function (module:function or file.py:function), a reward model, judge:NAME,
            follow_up:NAME, an http(s) URL, "answer", "implicit" or "likelihood"; or a list of them,
            whose scores are combined. See `fastdpo.score.load.load_scorer`.
        previous_model: for scorer "implicit" in the first round, the model before the start; with
            ``consistency`` in all rounds, as in CREAM.
        judge_template: what a judge is asked; by default that of `fastdpo.score.judge`.
        dtype: of a reward model, a judge or the implicit reward's two models: "float32",
            "bfloat16", "float16", or "auto" for the checkpoint's; by default the checkpoint's, and
            float32 for the last two.
        device_map: how such a model is spread over the GPUs of this machine, as in transformers:
            "auto", "balanced", "balanced_low_0" or "sequential"; or its one device, as "cuda:1".
            By default it is whole on the first.
        batch_size: sequences of a reward model at a time.
        timeout: seconds without an answer of a server.
        retries: tries of a request after the first.
        concurrency: requests at a time.
        api_key_env: name of the environment variable with the servers' key, in capital letters.
    """

    scorer: str | list[str] = "fastdpo.scoring:plain_language"
    previous_model: str | None = None
    judge_template: str | None = None
    dtype: str | None = None
    device_map: str | None = None
    batch_size: int = 8
    timeout: float = 60.0
    retries: int = 8
    concurrency: int = 8
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        require(self, "scorer", bool(self.scorers) and all(self.scorers), "a scorer, or several")
        for spec in self.scorers:
            check_address("scorer", spec)
        dtypes = (*DTYPES, "auto")
        require(self, "dtype", self.dtype in (None, *dtypes), f"one of {', '.join(dtypes)}")
        spread = self.device_map is None or is_device_map(self.device_map)
        maps = f"one of {', '.join(DEVICE_MAPS)}, or a device, as cuda:1"
        require(self, "device_map", spread, maps)
        require(self, "batch_size", self.batch_size >= 1, ">= 1")
        self.remote()

    @property
    def scorers(self) -> list[str]:
        """Their names, of one too."""
        return [self.scorer] if isinstance(self.scorer, str) else list(self.scorer)

    def check_used(self, specs: Sequence[str], measured: bool = False) -> None:
        """Raise ConfigError where an option is set that none of these scorers uses.

        `measured` says that models are compared on held-out prompts, `batch_size` at a time.
        """
        from fastdpo.score.load import uses

        used = set().union(*map(uses, specs)) | ({"batch_size"} if measured else set())
        servers = ("timeout", "retries", "concurrency", "api_key_env")
        for need, names, otherwise in (
            ("previous", ("previous_model",), "scorer be implicit"),
            ("template", ("judge_template",), "a scorer be judge:NAME"),
            ("loading", ("dtype", "device_map"), "a scorer be a model that is loaded here"),
            ("batch_size", ("batch_size",), "a scorer be a model, or a URL of one's own"),
            ("remote", servers, "a scorer be a URL"),
        ):
            for name in names:
                require_used(self, name, need in used, otherwise)

    def check_servers(self, specs: Sequence[str]) -> None:
        """Raise RemoteError where the server of a scorer takes no connection, and ConfigError where
        its key is missing."""
        from fastdpo.score.load import uses

        for spec in dict.fromkeys(specs):
            if "remote" in uses(spec):
                endpoint = self.load(spec).endpoint
                assert endpoint is not None
                endpoint.reach()

    def remote(self) -> Remote:
        """How servers are asked. Raises ConfigError, naming the option."""
        return Remote(
            timeout=self.timeout,
            retries=self.retries,
            concurrency=self.concurrency,
            api_key_env=self.api_key_env,
        )

    def load(self, spec: str, policy: str | None = None, previous: str | None = None) -> "Scorer":
        """The scorer of this name; `load_scorer` says what it takes.

        Raises ConfigError when it can't be loaded.
        """
        from fastdpo.score.load import load_scorer

        try:
            return load_scorer(
                spec,
                dtype=getattr(torch, self.dtype) if self.dtype in DTYPES else self.dtype,
                device_map=self.device_map,
                batch_size=self.batch_size,
                policy=policy,
                previous=previous,
                remote=self.remote(),
                judge_template=self.judge_template or None,
            )
        except ValueError as error:
            # An address may hold a key, and the error names what is wrong with it.
            named = "scorer" if "://" in spec else f"scorer={spec}"
            raise ConfigError(f"{named}: {error}") from error


def check_address(option: str, spec: str) -> None:
    """Raise ConfigError, without the value, where a scorer's URL holds a key or a password."""
    address = spec.removeprefix("judge:")
    if address.startswith(("http://", "https://")):
        check_url(address, option)
