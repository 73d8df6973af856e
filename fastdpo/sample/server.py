"""Sampling by vLLM's OpenAI-compatible server: one that runs already, or one started here."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import Any

from fastdpo.model.load import policy_digest
from fastdpo.progress import advance
from fastdpo.remote import Endpoint, PassingError, Remote, RemoteError, Stop, hidden
from fastdpo.sample.config import SampleConfig
from fastdpo.sample.launch import own_environment
from fastdpo.sample.sampler import Ending, Output, Sampler, finished, prompt_seed, shorter

_START_S = 1800.0  # a large model loads and compiles for minutes
# A server that is started again is away for minutes: with pauses of half a minute to a minute these
# are five and a half to eleven.
_RETRIES = 16
_SEQUENCES = 256  # in flight, so that parts of a few prompts don't leave the server idle


def open_server(
    policy: str, ending: Ending, config: SampleConfig, max_length: int | None, log_path: Path | None
) -> "ServerSampler":
    """The server at `config.server_url`, or one started by `config.server_command`, as a sampler.

    Raises RemoteError when it can't be reached, doesn't start or doesn't serve the policy, and
    ConfigError when its key is missing.
    """
    url, local = config.server_url, None
    if url is None:
        local = LocalServer(policy, config, max_length, log_path)
        url = local.url
    sampler = ServerSampler(url, ending, config, local)
    try:
        if local is not None:
            local.wait_until(sampler.is_healthy)
        sampler.expect(policy)
    except BaseException:
        sampler.close()
        raise
    sampler.policy = policy_digest(policy)
    sampler.context = shorter(sampler.context, max_length)
    return sampler


class ServerSampler(Sampler):
    """A server that speaks vLLM's OpenAI-compatible API, 0.10.2 or newer for `return_token_ids`.

    Prompts go to /v1/completions as token ids, each in a request of its own with its own seed, from
    which the server counts up for the `n` samples; every setting that a server could bring along is
    sent. A request that fails is sent again as `fastdpo.remote.Remote` has it, for five minutes and
    more, and so is one whose reply can't be read. It has its seed, so nothing changes.

    `dtype` is what it was asked for; of a server that runs already it can't be seen.

    Written after docs.vllm.ai, "OpenAI-Compatible Server", and tested against a server that follows
    it; not verified against vLLM on a device. vLLM repeats itself bit for bit only with
    VLLM_BATCH_INVARIANT=1 in the server's environment.
    """

    backend = "server"

    def __init__(
        self, url: str, ending: Ending, config: SampleConfig, local: "LocalServer | None" = None
    ) -> None:
        super().__init__(config, ending)
        remote = Remote(
            timeout=config.server_timeout, retries=_RETRIES, api_key_env=config.api_key_env
        )
        self._endpoint = Endpoint(url.rstrip("/").removesuffix("/v1"), remote)
        self.url, self.dtype = self._endpoint.url, config.dtype
        self.at_once = max(1, _SEQUENCES // (config.num_samples * config.batch_prompts))
        self._local, self._stop = local, Stop(local.check) if local else Stop()
        self._model = ""

    def is_healthy(self) -> bool:
        """Whether the server answers, asked once."""
        try:
            self._endpoint.once(f"{self.url}/health", None, self._stop)
        except (PassingError, RemoteError):
            return False
        return True

    def expect(self, policy: str) -> None:
        """Make sure that the server has this model, by its name or path; contents can't be seen.

        Raises RemoteError when it hasn't.
        """
        cards = self._call("/v1/models", None, _model_cards)
        names = {policy, str(Path(policy).resolve())} if Path(policy).exists() else {policy}
        for card in cards:
            if names & {card["id"], card.get("root")}:
                self._model, self.context = card["id"], card.get("max_model_len")
                return
        found = ", ".join(repr(card["id"]) for card in cards) or "nothing"
        raise RemoteError(
            f"{self.url} serves {found}, not the policy {policy!r}. Start it again with this "
            "model, and then this command: it goes on where it stopped."
        )

    def generate(self, prompts: list[list[int]], num_samples: int, seed: int) -> list[list[Output]]:
        """As `Sampler.generate`; may be called from several threads.

        Raises RemoteError when the server refuses a request or fails again and again.
        """
        pool = ThreadPoolExecutor(min(len(prompts), _SEQUENCES))
        try:
            seeds = [prompt_seed(seed, place) for place in range(len(prompts))]
            return list(pool.map(self._complete, prompts, repeat(num_samples), seeds))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _complete(self, prompt: list[int], num_samples: int, seed: int) -> list[Output]:
        config = self.config
        body = {
            "model": self._model,
            "prompt": prompt,
            "n": num_samples,
            "seed": seed,
            "max_tokens": config.max_new_tokens,
            "temperature": float(config.temperature),
            "top_p": float(config.top_p),
            # The model's generation config would fill these.
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": list(config.stop),
            "stop_token_ids": self.ending.end_ids,
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        outputs = self._call("/v1/completions", body, lambda reply: self._outputs(reply, body))
        advance(num_samples)
        return outputs

    def _outputs(self, reply: Any, body: dict[str, Any]) -> list[Output]:
        """The samples in a reply; ValueError and the like when it isn't one that was asked for."""
        if reply.get("model", self._model) != self._model:
            raise self._endpoint.malformed(reply["model"], f"by the model {self._model!r}")
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(body["n"])):
            raise ValueError(f"it has {len(choices)} samples of {body['n']}")
        for choice in choices:
            ids = choice.get("token_ids")
            if not (isinstance(ids, list) and all(type(x) is int for x in ids)):
                raise RemoteError(
                    f"{self.url} returns no token ids; vLLM does from version 0.10.2 on"
                )
            if choice.get("prompt_token_ids") not in (None, body["prompt"]):
                raise RemoteError(
                    f"{self.url} changed the tokens of a prompt; its tokenizer or a limit of its "
                    "own is in the way, start it as server_command does"
                )
        return [finished(self.ending, x["token_ids"], x["finish_reason"]) for x in choices]

    def _call(self, path: str, body: Any, read: Callable[[Any], Any]) -> Any:
        """What `read` makes of the reply, tried several times.

        `read` raises ValueError, TypeError, KeyError or AttributeError for a reply that is broken.
        """

        def parse(data: bytes) -> Any:
            try:
                return read(json.loads(data))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                problem = self._endpoint.excerpt(f"{type(error).__name__}: {error}")
                raise PassingError(f"the reply can't be used, {problem}") from None

        try:
            return self._endpoint.ask(body, path, parse=parse, stop=self._stop)
        except RemoteError:
            if self._local and not self._stop.is_set():
                self._local.check(wait_s=2.0)  # connections break before its end is known
            raise

    def close(self) -> None:
        """End requests that wait, in whatever thread, and the server if it was started here."""
        self._stop.cut()
        if self._local is not None:
            self._local.stop()


def _model_cards(reply: Any) -> list[dict[str, Any]]:
    cards = reply["data"]
    if not all(isinstance(card["id"], str) for card in cards):
        raise ValueError("a model has no name")
    return cards


# Runs the server in a group of processes of its own, and ends the group when the pipe from its
# parent closes: because it was told to, or because the parent was killed.
_KEEPER = """
import contextlib, os, select, signal, subprocess, sys
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while server.poll() is None and not select.select([0], [], [], 0.1)[0]:
    pass
status = server.poll()
os.killpg(0, signal.SIGTERM)
with contextlib.suppress(subprocess.TimeoutExpired):
    server.wait(30)
if status is None:
    os.killpg(0, signal.SIGKILL)
sys.exit(status if status >= 0 else 128 - status)
"""


class LocalServer:
    """A server started here, on a free port of this machine; it ends with this process at latest.

    The key reaches it as VLLM_API_KEY in its environment, where a list of processes doesn't show
    it.
    """

    def __init__(
        self, policy: str, config: SampleConfig, max_length: int | None, log_path: Path | None
    ) -> None:
        if os.name != "posix":
            raise RemoteError("a server is started on Linux and macOS only; give a server_url")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._key = Remote(api_key_env=config.api_key_env).key()
        command = [word.replace("{model}", policy) for word in shlex.split(config.server_command)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", policy]
        command += ["--dtype", config.dtype, "--generation-config", "vllm"]
        if max_length is not None:
            command += ["--max-model-len", str(max_length)]
        if log_path is None:
            log_path = Path(tempfile.mkdtemp(prefix="fastdpo-")) / "server.log"
        self.log_path = Path(log_path)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _KEEPER, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=own_environment() | ({"VLLM_API_KEY": self._key} if self._key else {}),
                start_new_session=True,
            )

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Raises RemoteError when the server ends, or isn't ready after half an hour."""
        deadline = time.monotonic() + _START_S
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise RemoteError(f"the server wasn't ready after {_START_S:.0f} s; {self._tail()}")
            time.sleep(0.2)

    def check(self, wait_s: float = 0.0) -> None:
        """Raises RemoteError, saying how, once the server has ended; within `wait_s` seconds."""
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(wait_s)
            raise RemoteError(f"the server ended with status {status}; {self._tail()}")

    def _tail(self) -> str:
        text = self.log_path.read_text(errors="replace")
        lines = hidden(text, self._key).splitlines()
        return "\n  ".join([f"the end of {self.log_path}:", *lines[-8:]])

    def stop(self) -> None:
        """End the server and all of its processes, by force after half a minute."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(45)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
