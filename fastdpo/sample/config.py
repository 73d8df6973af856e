"""The options of sampling: of ``fastdpo sample``, and the section ``sample`` of a run."""

import shlex
from dataclasses import dataclass, field

from fastdpo.errors import ConfigError, is_number, require, require_used
from fastdpo.model.load import DTYPES
from fastdpo.remote import check_url, check_variable

BACKENDS = ("auto", "generate", "continuous", "vllm", "server")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How responses are drawn.  Raises ConfigError, naming the option, when one is out of range.

    They come from exactly this distribution: the top-k, repetition penalty and other settings that
    a model brings along in its generation config are left out.  `batch_prompts` is a part of the
    plan: another value gives other random numbers.  The last four say how a server is reached, and
    may change between a run and its resumption.

    Attributes:
        num_samples: responses sampled for a prompt.
        max_new_tokens: tokens of a response, the end token included.
        temperature: 0 takes the most probable token.
        top_p: share of the probability that is kept, from the most probable token on.
        stop: strings that end a response. Its text ends before the first of them, its tokens with
            the one that completes it.
        batch_prompts: prompts sampled at a time, each with ``num_samples`` responses. Continuous
            batching and vLLM want many, 64 and more; the key-value cache of all must fit.
        seed: of all random numbers.
        backend: "generate" (transformers, padded batches), "continuous" (transformers, paged
            cache), "vllm" (in this process) or "server" (vLLM's, over HTTP). "auto" is the server
            if ``server_url`` is given, else "continuous" on a GPU with flash-attn where a trial
            works, else "generate"; a GPU's reason for that is logged.
        dtype: of the model that samples, where it is loaded for that: float32, bfloat16 or float16.
        server_url: a running server, http://host:8000; its model must be the policy. None starts
            one.
        server_command: starts a server; {model} becomes the policy, and the arguments of ``vllm
            serve`` for host, port, name, dtype, defaults and length are appended.
        server_timeout: seconds for the responses to one prompt.
        api_key_env: name of the environment variable with the server's key, in capital letters.
    """

    num_samples: int = 4
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    stop: list[str] = field(default_factory=list)
    batch_prompts: int = 8
    seed: int = 0
    backend: str = "auto"
    dtype: str = "bfloat16"
    server_url: str | None = None
    server_command: str = "vllm serve {model}"
    server_timeout: float = 600.0
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens", "batch_prompts"):
            count = getattr(self, name)
            require(self, name, type(count) is int and count >= 1, "an int of at least 1")
        require(self, "seed", type(self.seed) is int, "an int")
        drawn = is_number(self.temperature) and self.temperature >= 0
        require(self, "temperature", drawn, "a finite number of at least 0")
        in_range = is_number(self.top_p) and 0 < self.top_p <= 1
        require(self, "top_p", in_range, "a number above 0 and at most 1")
        if self.temperature == 0:
            several = f"> 0 with num_samples={self.num_samples}, which would all be the same"
            require(self, "temperature", self.num_samples == 1, several)
            require(self, "top_p", self.top_p == 1, "1 with temperature 0, which draws nothing")
        strings = isinstance(self.stop, list) and all(isinstance(x, str) and x for x in self.stop)
        require(self, "stop", strings, "a list of strings that aren't empty")
        require(self, "backend", self.backend in BACKENDS, f"one of {', '.join(BACKENDS)}")
        require(self, "dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        self._check_server()

    @property
    def asks_server(self) -> bool:
        """Whether a server draws the responses."""
        return self.backend == "server" or self.server_url is not None

    def _check_server(self) -> None:
        if self.server_url is not None:
            require(self, "server_url", isinstance(self.server_url, str), "a text")
            check_url(self.server_url, "server_url")
            if "#" in self.server_url:
                raise ConfigError("server_url must have no #, its model is the policy")
            server = self.backend in ("auto", "server")
            require(self, "backend", server, "'server' or 'auto' with a server_url")
        try:
            named = "{model}" in self.server_command and bool(shlex.split(self.server_command))
        except ValueError:
            named = False
        require(self, "server_command", named, "a command line with {model} in it")
        positive = is_number(self.server_timeout) and self.server_timeout > 0
        require(self, "server_timeout", positive, "a finite number above 0")
        check_variable(self.api_key_env)
        starts = self.asks_server and self.server_url is None
        require_used(self, "server_command", starts, "backend be server, without a server_url")
        for name in ("server_timeout", "api_key_env"):
            require_used(self, name, self.asks_server, "backend be server, or a server_url given")
