"""Requests to servers: JSON over HTTP, tried again where that may help, keys kept out of sight.

Endpoint("http://localhost:8000/score", Remote(api_key_env="SCORE_KEY")).post({"prompts": []})
"""

import json
import math
import os
import random
import re
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

_MAX_PAUSE = 60.0  # seconds
_TRY_AGAIN = {408, 425, 429}
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


class RemoteError(RuntimeError):
    """A server gave no usable answer; the message holds no key."""


@dataclass(frozen=True)
class Remote:
    """How servers are asked. Raises ValueError, naming the field, when one is out of its range.

    What may pass is tried again: no connection, a connection that breaks off, a timeout, and the
    statuses 408, 425, 429 and 5xx. The pause is `backoff`, doubled each time up to a minute, less
    up to half of it at random, so that clients don't come back at once; or what the server asks for
    in Retry-After, up to a minute. By default that bridges over three minutes.
    """

    timeout: float = 60.0  # seconds without a byte
    retries: int = 8  # after the first try
    concurrency: int = 8  # requests at a time
    backoff: float = 1.0  # seconds before the first retry
    api_key_env: str | None = None  # name of the environment variable that holds the key

    def __post_init__(self) -> None:
        for name in ("timeout", "backoff"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
        for name, least in (("retries", 0), ("concurrency", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        if self.api_key_env is not None and not _VARIABLE.fullmatch(self.api_key_env):
            # Not shown: it may be the key itself.
            raise ValueError(
                "api_key_env must be the name of an environment variable, in capital letters, "
                "digits and underscores; put the key into that variable"
            )

    def key(self) -> str | None:
        """The key, from the environment. Raises ValueError, without it, when there is none."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ValueError(
                f"api_key_env: the environment variable {self.api_key_env} is not set; "
                "set it to the key"
            )
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"api_key_env: the environment variable {self.api_key_env} holds a character that "
                "can't be in a key; set it anew"
            )
        return key


def check_url(url: str) -> None:
    """Raise ValueError unless a URL is one of HTTP, without a name or a key in it."""
    try:
        parts = urllib.parse.urlsplit(url)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError as error:
        raise ValueError(f"{url!r} is not a URL ({error}); write http://host:port/path") from error
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"the URL of {parts.hostname} has a name or key in it, which would be written to disk; "
            "put it into an environment variable and name that in api_key_env"
        )
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not (parts.hostname and port_is_valid and plain):
        raise ValueError(f"{url!r} is not a URL; write http://host:port/path")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: a POST would lose its body, and the key could go elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class _PassingError(Exception):
    """What may work a moment later."""

    def __init__(self, problem: str, pause: float | None = None) -> None:
        super().__init__(problem)
        self.pause = pause


@dataclass(frozen=True)
class Endpoint:
    """One URL that takes JSON and gives JSON."""

    url: str
    remote: Remote

    def post_all(self, bodies: Sequence[Any]) -> list[Any]:
        """The answers, in order; `remote.concurrency` requests at a time.

        Raises RemoteError as `post` does, at the first that fails for good; the others stop.
        """
        stop = threading.Event()
        pool = ThreadPoolExecutor(min(self.remote.concurrency, len(bodies) or 1))
        try:
            futures = [pool.submit(self.post, body, stop) for body in bodies]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def post(self, body: Any, stop: threading.Event | None = None) -> Any:
        """The answer to one request, tried again as `Remote` says.

        Raises RemoteError when tries run out, and at once when the server refuses the request
        (another 4xx, or a redirect) or answers with what isn't JSON.
        """
        data = json.dumps(body).encode("ascii")
        stop = stop or threading.Event()
        problem = ""
        for attempt in range(self.remote.retries + 1):
            try:
                return self._parse(self._once(data))
            except _PassingError as passing:
                problem = str(passing)
                if attempt < self.remote.retries and stop.wait(self._pause(attempt, passing.pause)):
                    break
        raise RemoteError(
            f"{self.url} gave no answer in {self.remote.retries + 1} tries, the last one: "
            f"{problem}. Check the server; the same command goes on where this one stopped."
        )

    def _pause(self, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, _MAX_PAUSE)
        whole = min(self.remote.backoff * 2.0 ** min(attempt, 30), _MAX_PAUSE)
        return whole * random.uniform(0.5, 1.0)

    def _once(self, data: bytes) -> bytes:
        request = urllib.request.Request(self.url, data, {"Content-Type": "application/json"})
        key = self.remote.key()
        if key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        try:
            with _OPENER.open(request, timeout=self.remote.timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            status = f"status {error.code} ({_excerpt(error.read, key)})"
            if error.code in _TRY_AGAIN or error.code >= 500:
                raise _PassingError(status, _retry_after(error)) from None
            raise RemoteError(
                f"{self.url} refused the request: {status}. Mend the URL, the model's name or the "
                "key; it is not tried again."
            ) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            problem = f"{type(reason).__name__}: {_hidden(str(reason), key)}"
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise RemoteError(f"{self.url}: {problem}. Mend its certificate.") from None
            raise _PassingError(problem) from None

    def _parse(self, answer: bytes) -> Any:
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            raise self.malformed(answer, "JSON") from None

    def malformed(self, answer: Any, wanted: str) -> RemoteError:
        """The error for an answer of another form."""
        text = answer.decode("utf-8", "replace") if isinstance(answer, bytes) else str(answer)
        shown = _hidden(" ".join(text.split()), self.remote.key())[:200]
        return RemoteError(f"{self.url} answered {shown!r}, not {wanted}. Mend the server.")


def _excerpt(read: Callable[[int], bytes], key: str | None) -> str:
    """The beginning of an error's body, which may repeat what it was sent."""
    try:
        text = read(2000).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return "no reason given"
    return _hidden(" ".join(text.split()), key)[:200] or "no reason given"


def _hidden(text: str, key: str | None) -> str:
    return text.replace(key, "***") if key else text


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the server asks to wait; a date, its other form, is left to the back-off."""
    try:
        seconds = float(error.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None
