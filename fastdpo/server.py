"""Sampling by vLLM's OpenAI-compatible server: one that runs already, or one started here."""

import contextlib
import http.client
import json
import logging
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fastdpo.samplers import (
    Ending,
    Output,
    SamplingConfig,
    dtype_name,
    finished,
    policy_digest,
    prompt_seed,
    split_url,
)

_log = logging.getLogger(__name__)

_START_S = 1800.0  # a large model loads and compiles for minutes
_ATTEMPTS = 8
_LONGEST_WAIT_S = 30.0
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
_SEQUENCES = 256  # in flight, so that parts of a few prompts don't leave the server idle


class ServerError(OSError):
    """A sampling server that can't be reached, refuses a request or answers wrongly."""


def open_server(
    policy: str,
    ending: Ending,
    config: SamplingConfig,
    *,
    dtype: torch.dtype,
    max_length: int | None,
    log_path: Path | None,
) -> "ServerSampler":
    """The server at `config.server_url`, or one started by `config.server_command`, as a sampler.

    Raises ServerError when it can't be reached, doesn't start or doesn't serve the policy.
    """
    key = _key(config.api_key_env)
    local = None
    if config.server_url is None:
        local = LocalServer(
            policy, config.server_command, dtype, max_length, key=key, log_path=log_path
        )
    sampler = ServerSampler(
        local.url if local else config.server_url, ending, config, key=key, local=local
    )
    try:
        if local is not None:
            local.wait_until(sampler.is_healthy)
        sampler.expect(policy)
    except BaseException:
        sampler.close()
        raise
    sampler.policy = policy_digest(policy)
    limits = [x for x in (sampler.context, max_length) if x is not None]
    sampler.context = min(limits, default=None)
    return sampler


def _key(variable: str | None) -> str | None:
    """The key in the environment variable. Raises ServerError, without its value, if unusable."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ServerError(f"api_key_env={variable}: this environment variable isn't set")
    if not (key.isascii() and key.isprintable()):
        raise ServerError(f"api_key_env={variable}: its value can't be a key, it isn't plain text")
    return key


class ServerSampler:
    """A server that speaks vLLM's OpenAI-compatible API, 0.10.2 or newer for `return_token_ids`.

    Prompts go to /v1/completions as token ids, each in a request of its own with its own seed, from
    which the server counts up for the `n` samples; every setting that a server could bring along is
    sent. A request that fails is sent again after a growing, jittered wait: no connection, one that
    broke, status 429 and 5xx, a reply that can't be read. It has its seed, so nothing changes.

    Written after docs.vllm.ai, "OpenAI-Compatible Server", and tested against a server that follows
    it; not verified against vLLM on a device. vLLM repeats itself bit for bit only with
    VLLM_BATCH_INVARIANT=1 in the server's environment.
    """

    backend = "server"

    def __init__(
        self,
        url: str | None,
        ending: Ending,
        config: SamplingConfig,
        *,
        key: str | None = None,
        local: "LocalServer | None" = None,
        wait_s: float = 0.5,
    ) -> None:
        self._secure, self._host, self._port, self._prefix = split_url(url)
        scheme = "https" if self._secure else "http"
        self.url = f"{scheme}://{self._host}:{self._port}{self._prefix}"
        self.config, self.ending = config, ending
        self.policy: str | None = None
        self.context: int | None = None
        self.at_once = max(1, _SEQUENCES // (config.num_samples * config.batch_prompts))
        self._key, self._local, self._wait_s = key, local, wait_s
        self._model = ""
        self._jitter, self._warned = random.Random(), False
        self._closed = threading.Event()
        self._open: set[http.client.HTTPConnection] = set()

    def is_healthy(self) -> bool:
        """Whether the server answers, asked once."""
        try:
            return self._exchange("/health", None)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def expect(self, policy: str) -> None:
        """Make sure that the server has this model, by its name or path; contents can't be seen.

        Raises ServerError when it hasn't.
        """
        cards = self._call("/v1/models", None, _model_cards)
        names = {policy, str(Path(policy).resolve())} if Path(policy).exists() else {policy}
        for card in cards:
            if names & {card["id"], card.get("root")}:
                self._model, self.context = card["id"], card.get("max_model_len")
                return
        found = ", ".join(repr(card["id"]) for card in cards) or "nothing"
        raise ServerError(
            f"{self.url} serves {found}, not the policy {policy!r}. Start it again with this "
            "model, and then this command: it goes on where it stopped."
        )

    def generate(self, prompts: list[list[int]], num_samples: int, seed: int) -> list[list[Output]]:
        """As `Sampler.generate`; may be called from several threads.

        Raises ServerError when the server refuses a request or fails again and again.
        """
        pool = ThreadPoolExecutor(min(len(prompts), _SEQUENCES))
        try:
            requests = [
                pool.submit(self._complete, prompt, num_samples, prompt_seed(seed, place))
                for place, prompt in enumerate(prompts)
            ]
            return [request.result() for request in requests]
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
        return self._call("/v1/completions", body, lambda reply: self._outputs(reply, body))

    def _outputs(self, reply: Any, body: dict[str, Any]) -> list[Output]:
        """The samples in a reply; ValueError and the like when it isn't one that was asked for."""
        if reply.get("model", self._model) != self._model:
            raise ServerError(f"{self.url} answered with another model, {reply['model']!r}")
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(body["n"])):
            raise ValueError(f"it has {len(choices)} samples of {body['n']}")
        for choice in choices:
            if not _are_ids(choice.get("token_ids")):
                raise ServerError(
                    f"{self.url} returns no token ids; vLLM does from version 0.10.2 on"
                )
            if choice.get("prompt_token_ids") not in (None, body["prompt"]):
                raise ServerError(f"{self.url} changed the tokens of a prompt")
        return [finished(self.ending, x["token_ids"], x["finish_reason"]) for x in choices]

    def _call(self, path: str, body: Any, read: Callable[[Any], Any]) -> Any:
        """What `read` makes of the reply, tried several times.

        `read` raises ValueError, TypeError, KeyError or AttributeError for a reply that is broken.
        """
        problem = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                wait = min(self._wait_s * 2 ** (attempt - 1), _LONGEST_WAIT_S)
                self._closed.wait(wait * self._jitter.uniform(0.5, 1.5))
            self._check_open()
            try:
                status, data = self._exchange(path, body)
                if status == 200:
                    found = read(json.loads(data))
                    self._warned = False
                    return found
                problem = f"status {status}: {_message(data)}"
                if status not in _RETRIED:
                    break
            except ServerError as error:
                raise ServerError(self._hidden(str(error))) from None
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                problem = f"the reply can't be used, {type(error).__name__}: {error}"
            self._warn(path, problem)
        self._check_open(wait_s=2.0)
        raise ServerError(
            self._hidden(
                f"{self.url}{path} failed ({problem}). Parts that are written stay; once the "
                "server is well, the same command goes on."
            )
        )

    def _check_open(self, wait_s: float = 0.0) -> None:
        if self._closed.is_set():
            raise ServerError(f"{self.url}: sampling was given up")
        gone = self._local.gone(wait_s) if self._local else None
        if gone:
            raise ServerError(gone)

    def _warn(self, path: str, problem: str) -> None:
        """Once for an outage, not for each of the requests that it hits."""
        if not self._warned:
            self._warned = True
            _log.warning("%s%s: %s; trying again", self.url, path, self._hidden(problem))

    def _exchange(self, path: str, body: Any) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self.config.server_timeout)
        self._open.add(connection)
        try:
            method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
            connection.request(method, self._prefix + path, data, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            self._open.discard(connection)
            connection.close()

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def close(self) -> None:
        """End requests that wait, in whatever thread, and the server if it was started here."""
        self._closed.set()
        for connection in list(self._open):
            if connection.sock is not None:
                with contextlib.suppress(OSError):  # it may be closing already
                    connection.sock.shutdown(socket.SHUT_RDWR)
        if self._local is not None:
            self._local.stop()


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int for x in value)


def _model_cards(reply: Any) -> list[dict[str, Any]]:
    cards = reply["data"]
    if not all(isinstance(card["id"], str) for card in cards):
        raise ValueError("a model has no name")
    return cards


def _message(data: bytes) -> str:
    """What an error reply says, in a line."""
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, AttributeError):
        reply = json.loads(text)
        error = reply.get("error", reply)
        text = str(error.get("message", error))
    return " ".join(text.split())[:300] or "no reason given"


# Runs the server in a group of processes of its own, and ends the group when the pipe from its
# parent closes: because it was told to, or because the parent was killed.
_KEEPER = """
import os, signal, subprocess, sys, threading
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
closed = threading.Event()
def listen():
    while os.read(0, 1):
        pass
    closed.set()
threading.Thread(target=listen, daemon=True).start()
while server.poll() is None and not closed.wait(0.1):
    pass
status = server.poll()
os.killpg(0, signal.SIGTERM)
try:
    server.wait(30)
except subprocess.TimeoutExpired:
    pass
if status is None:
    os.killpg(0, signal.SIGKILL)
os._exit(status if status >= 0 else 128 - status)
"""


class LocalServer:
    """A server started here, on a free port of this machine; it ends with this process at latest.

    The key reaches it as VLLM_API_KEY in its environment, where a list of processes doesn't show
    it.
    """

    def __init__(
        self,
        policy: str,
        command: str,
        dtype: torch.dtype,
        max_length: int | None,
        *,
        key: str | None = None,
        log_path: Path | None = None,
    ) -> None:
        if os.name != "posix":
            raise ServerError("a server is started on Linux and macOS only; give a server_url")
        if log_path is None:
            descriptor, name = tempfile.mkstemp(prefix="fastdpo-server-", suffix=".log")
            os.close(descriptor)
            log_path = Path(name)
        self.log_path, self._key = Path(log_path), key
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        arguments = [word.replace("{model}", policy) for word in shlex.split(command)]
        arguments += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", policy]
        arguments += ["--dtype", dtype_name(dtype), "--generation-config", "vllm"]
        if max_length is not None:
            arguments += ["--max-model-len", str(max_length)]
        environment = {**os.environ, "VLLM_API_KEY": key} if key else dict(os.environ)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _KEEPER, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Raises ServerError when the server ends, or isn't ready after half an hour."""
        deadline = time.monotonic() + _START_S
        while not ready():
            gone = self.gone()
            if gone:
                raise ServerError(gone)
            if time.monotonic() > deadline:
                raise ServerError(f"the server wasn't ready after {_START_S:.0f} s; {self._tail()}")
            time.sleep(0.2)

    def gone(self, wait_s: float = 0.0) -> str | None:
        """None while the server runs, else how it ended; connections break before that is known."""
        try:
            status = self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            return None
        return f"the server ended with status {status}; {self._tail()}"

    def _tail(self) -> str:
        text = self.log_path.read_text(errors="replace")
        if self._key:
            text = text.replace(self._key, "***")
        return "\n  ".join([f"the end of {self.log_path}:", *text.splitlines()[-8:]])

    def stop(self) -> None:
        """End the server and all of its processes, by force after half a minute."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(45)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
