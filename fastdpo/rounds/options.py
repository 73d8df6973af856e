"""Options of the stages of a round, shared by `fastdpo iterate` and the command of each stage."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdpo.errors import ConfigError, require_used
from fastdpo.pair.stage import Pairing, check_references, check_shaping
from fastdpo.pair.transforms import Shaping, check_scorers
from fastdpo.remote import Remote, check_url
from fastdpo.sample.samplers import SamplingConfig
from fastdpo.score.rewards import JUDGE_TEMPLATE
from fastdpo.score.stage import Scorer, load_scorer, uses

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(kw_only=True)
class SamplingOptions:
    """How responses are drawn; see `fastdpo.sample.samplers.SamplingConfig`.

    Attributes:
        num_samples: responses sampled for a prompt.
        max_new_tokens: tokens of a response.
        temperature, top_p: of sampling.
        stop: strings that end a response.
        batch_prompts: prompts sampled at a time, each with ``num_samples`` responses.
        sampler: "generate", "continuous", "vllm", "server", or "auto" for what the device has.
        sample_dtype: dtype of the model that samples.
        server_url: a running server; its model must be the policy. None starts one.
        server_command: starts a server; {model} is the policy.
        server_timeout: seconds for the responses to one prompt.
        server_api_key_env: environment variable with the server's key.
    """

    num_samples: int = 4
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    stop: list[str] = field(default_factory=list)
    batch_prompts: int = 8
    sampler: str = "auto"
    sample_dtype: str = "bfloat16"
    server_url: str | None = None
    server_command: str = "vllm serve {model}"
    server_timeout: float = 600.0
    server_api_key_env: str | None = None

    def sampling(self, seed: int) -> SamplingConfig:
        """Raises ConfigError, naming the option, when one has an impossible value."""
        if self.sample_dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise ConfigError(f"sample_dtype={self.sample_dtype} must be one of {known}")
        return checked(
            SamplingConfig,
            {"backend": "sampler", "api_key_env": "server_api_key_env"},
            num_samples=self.num_samples,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=self.stop,
            batch_prompts=self.batch_prompts,
            seed=seed,
            backend=self.sampler,
            server_url=self.server_url,
            server_command=self.server_command,
            server_timeout=self.server_timeout,
            api_key_env=self.server_api_key_env,
        )


@dataclass(kw_only=True)
class ScoringOptions:
    """Where scores come from; see `fastdpo.score.stage.load_scorer`.

    Attributes:
        scorer: a Python function (module:function), a reward model, judge:NAME, an http(s) URL,
            "answer", "implicit" or "likelihood"; or a list of them, whose scores are combined.
        previous_model: for scorer "implicit" in the first round, the model before the start; with
            ``consistency`` in all rounds, as in CREAM.
        judge_template: what a judge is asked; by default the template of `fastdpo.score.rewards`.
        scorer_dtype: of a reward model, a judge or the implicit reward's two models; by default the
            checkpoint's, and float32 for the last two.
        scorer_batch_size: sequences of a reward model at a time.
        scorer_timeout: seconds without an answer of a server.
        scorer_retries: tries after the first.
        scorer_concurrency: requests at a time.
        scorer_api_key_env: environment variable with the servers' key.
    """

    scorer: str | list[str] = "fastdpo.scoring:plain_language"
    previous_model: str | None = None
    judge_template: str | None = None
    scorer_dtype: str | None = None
    scorer_batch_size: int = 8
    scorer_timeout: float = 60.0
    scorer_retries: int = 8
    scorer_concurrency: int = 8
    scorer_api_key_env: str | None = None

    @property
    def scorers(self) -> list[str]:
        return [self.scorer] if isinstance(self.scorer, str) else list(self.scorer)

    def check_used(self, specs: Sequence[str], measured: bool = False) -> None:
        """Raise ConfigError where an option is set that none of these scorers uses.

        `measured` says that models are compared on held-out prompts, `scorer_batch_size` at a time.
        """
        used = set().union(*map(uses, specs)) | ({"batch_size"} if measured else set())
        servers = ("scorer_timeout", "scorer_retries", "scorer_concurrency", "scorer_api_key_env")
        for need, names, otherwise in (
            ("previous", ("previous_model",), "scorer be implicit"),
            ("template", ("judge_template",), "a scorer be judge:NAME"),
            ("dtype", ("scorer_dtype",), "a scorer be a model that is loaded here"),
            ("batch_size", ("scorer_batch_size",), "a scorer be a model, or a URL of one's own"),
            ("remote", servers, "a scorer be a URL"),
        ):
            for name in names:
                require_used(self, name, need in used, otherwise)

    def check_servers(self, specs: Sequence[str]) -> None:
        """Raise RemoteError where the server of a scorer takes no connection, and ConfigError where
        its key is missing."""
        for spec in dict.fromkeys(specs):
            if "remote" in uses(spec):
                endpoint = self.load(spec).endpoint
                assert endpoint is not None
                endpoint.reach()

    def remote(self) -> Remote:
        """Raises ConfigError, naming the option, when one has an impossible value."""
        if self.scorer_dtype not in (None, *DTYPES):
            raise ConfigError(
                f"scorer_dtype={self.scorer_dtype} must be one of {', '.join(DTYPES)}"
            )
        for spec in self.scorers:
            check_address("scorer", spec)
        if self.scorer_batch_size < 1:
            raise ConfigError(f"scorer_batch_size={self.scorer_batch_size} must be >= 1")
        names = ("timeout", "retries", "concurrency", "api_key_env")
        return checked(
            Remote,
            {name: f"scorer_{name}" for name in names},
            timeout=self.scorer_timeout,
            retries=self.scorer_retries,
            concurrency=self.scorer_concurrency,
            api_key_env=self.scorer_api_key_env,
        )

    def load(self, spec: str, policy: str | None = None, previous: str | None = None) -> Scorer:
        """Raises ConfigError when the scorer cannot be loaded."""
        try:
            return load_scorer(
                spec,
                dtype=getattr(torch, self.scorer_dtype) if self.scorer_dtype else None,
                batch_size=self.scorer_batch_size,
                policy=policy,
                previous=previous,
                remote=self.remote(),
                judge_template=self.judge_template or JUDGE_TEMPLATE,
            )
        except ValueError as error:
            # An address may hold a key, and the error names what is wrong with it.
            named = "scorer" if "://" in spec else f"scorer={spec}"
            raise ConfigError(f"{named}: {error}") from error


@dataclass(kw_only=True)
class PairingOptions:
    """How scored responses become pairs; see `fastdpo.pair.stage.Pairing` and
    `fastdpo.pair.transforms.Shaping`.

    Attributes:
        pairing: best_worst, best_random, all_ranked, curriculum, nearest_margin or tree_siblings.
        scorer_weights: weight of each of several scorers.
        combine: "weighted", or "log_sigmoid" for a logical and of several scorers.
        transform: of scores within a prompt: none, par, log_sigmoid or mean_std. It keeps their
            order, so it needs what looks at gaps: min_gap, length_penalty, nearest_margin, or
            all_ranked with max_pairs.
        transform_reference: what par and log_sigmoid compare a score with: "own", the prompt's
            samples, or "start", those of the model before training, as in the papers.
        length_penalty: subtracted from a score for each token; "auto" finds DICE's.
        min_gap: best and worst must differ by more than this in score.
        target_margin: the gap that nearest_margin looks for.
        max_pairs: pairs of a prompt at most, of all_ranked and curriculum.
        equal_prompts: weigh a pair by 1 / (pairs of its prompt).
        drop_truncated, drop_duplicates: leave out responses that were cut, or are there twice.
        consistency: none, mean or prompt: label smoothing by the ranking of the round before
            (CREAM), see `fastdpo.pair.filters.consistency`.
        flip_share: turn round this share of pairs, the weakest by several scorers. As soft_label it
            needs labels that are not their own sum: combine=log_sigmoid, a length_penalty, or
            offline pairs.
        soft_label: label smoothing of pairs on which several scorers disagree on average.
        ches_keep: keep this share of the pairs, those of lowest CHES.
        max_difficulty: drop pairs above this difficulty under the reference, in nats.
        replay: file or hub name of offline pairs.
        replay_share: share of offline pairs among all.
        fresh_threshold: drop offline pairs that a fresh sample beats by this score (fDPO).
    """

    pairing: str = "best_worst"
    scorer_weights: list[float] | None = None
    combine: str = "weighted"
    transform: str = "none"
    transform_reference: str = "own"
    length_penalty: float | str = 0.0
    min_gap: float = 0.0
    target_margin: float = 1.0
    max_pairs: int | None = None
    equal_prompts: bool = False
    drop_truncated: bool = False
    drop_duplicates: bool = False
    consistency: str = "none"
    flip_share: float = 0.0
    soft_label: float = 0.0
    ches_keep: float = 1.0
    max_difficulty: float | None = None
    replay: str | None = None
    replay_share: float = 0.0
    fresh_threshold: float | None = None

    def rules(self, seed: int) -> Pairing:
        """Raises ConfigError, naming the option, when one has an impossible value."""
        return checked(
            Pairing,
            {"rule": "pairing"},
            rule=self.pairing,
            min_gap=self.min_gap,
            target_margin=self.target_margin,
            max_pairs=self.max_pairs,
            equal_prompts=self.equal_prompts,
            drop_truncated=self.drop_truncated,
            drop_duplicates=self.drop_duplicates,
            consistency=self.consistency,
            flip_share=self.flip_share,
            soft_label=self.soft_label,
            ches_keep=self.ches_keep,
            max_difficulty=self.max_difficulty,
            replay_share=self.replay_share,
            fresh_threshold=self.fresh_threshold,
            seed=seed,
        )

    def check_replay(self) -> None:
        """Raises ConfigError unless offline pairs and their share come together."""
        if (self.replay is not None) != (self.replay_share > 0):
            raise ConfigError(
                f"replay={self.replay} and replay_share={self.replay_share} need each other: a "
                "file of pairs, and its share above 0"
            )

    def shaping(self, scorers: int) -> Shaping | None:
        """How scores become one; None where a single scorer's are taken as they are.

        Raises ConfigError, naming the option, when one has an impossible value.
        """
        shaping = checked(
            Shaping,
            {"weights": "scorer_weights"},
            weights=self.scorer_weights,
            combine=self.combine,
            transform=self.transform,
            length_penalty=self.length_penalty,
        )
        if self.transform_reference not in ("own", "start"):
            raise ConfigError(
                f"transform_reference={self.transform_reference} must be own or start"
            )
        try:
            check_scorers(shaping, scorers)
            check_shaping(self.rules(0), shaping, scorers)
            if self.transform_reference == "start":
                check_references(self.rules(0), shaping)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return None if shaping == Shaping() and scorers == 1 else shaping


def check_address(option: str, spec: str) -> None:
    """Raises ConfigError, without the value, where a scorer's URL holds a key or a password."""
    address = spec.removeprefix("judge:")
    if address.startswith(("http://", "https://")):
        try:
            check_url(address)
        except ValueError as error:
            raise ConfigError(f"{option}: {error}") from error


def checked(build: Callable[..., Any], options: dict[str, str], **values: Any) -> Any:
    """``build(**values)``, whose ValueError is the user's; fields are named as their options."""
    try:
        return build(**values)
    except ValueError as error:
        text = str(error)
        for field_name, option in options.items():
            text = re.sub(rf"^{field_name}\b", option, text)
        raise ConfigError(text) from error


def dtype_of(options: SamplingOptions) -> torch.dtype:
    return getattr(torch, options.sample_dtype)
