"""Requests to servers: JSON over HTTP, tried again where that may help, keys kept out of sight.

Endpoint("http://localhost:8000", Remote(api_key_env="SCORE_KEY")).ask({"prompts": []}, "/score")
"""

import hashlib
import json
import logging
import math
import os
import random
import re
import socket
import ssl
import threading
import urllib.request
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import tenacity

from fastdpo.errors import ConfigError, require
from fastdpo.progress import parts

_log = logging.getLogger(__name__)

_MAX_PAUSE = 60.0  # seconds
_TRY_AGAIN = {408, 425, 429}
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


class RemoteError(OSError):
    """A server that can't be reached or gave no usable answer; the message holds no key."""


class PassingError(Exception):
    """What may work a moment later; `pause` are the seconds that the server asks for."""

    def __init__(self, problem: str, pause: float | None = None) -> None:
        super().__init__(problem)
        self.pause = pause


@dataclass(frozen=True)
class Remote:
    """How servers are asked. Raises ConfigError, naming the field, when one is out of its range.

    What may pass is tried again: no connection, a connection that breaks off, a timeout, and the
    statuses 408, 425, 429 and 5xx. The pause is `backoff`, doubled each time up to a minute, less
    up to half of it at random, so that clients don't come back at once; or what the server asks for
    in Retry-After, up to a minute. By default that bridges from one and a half to three minutes,
    and each retry more from half a minute to a minute.
    """

    timeout: float = 60.0  # seconds without a byte
    retries: int = 8  # after the first try
    concurrency: int = 8  # requests at a time
    backoff: float = 1.0  # seconds before the first retry
    api_key_env: str | None = None  # name of the environment variable that holds the key

    def __post_init__(self) -> None:
        for name in ("timeout", "backoff"):
            require(self, name, getattr(self, name) > 0, "a finite number above 0")
        for name, least in (("retries", 0), ("concurrency", 1)):
            count = getattr(self, name)
            require(
                self, name, type(count) is int and count >= least, f"an int of at least {least}"
            )
        check_variable(self.api_key_env)

    def key(self) -> str | None:
        """The key, from the environment. Raises ConfigError, without it, when there is none."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key and key.isascii() and key.isprintable()):
            what = "holds a character that can't be in a key" if key else "is not set"
            raise ConfigError(
                f"api_key_env: the environment variable {self.api_key_env} {what}; set it anew"
            )
        return key


def check_variable(name: str | None) -> None:
    """Raise ConfigError unless this is None or can be the name of a key's environment variable.

    Lower case is refused: most keys have some, and a key in its place would be written to disk.
    """
    if name is not None and not _VARIABLE.fullmatch(name):
        # Not shown: it may be the key itself.
        raise ConfigError(
            "api_key_env must be the name of an environment variable, in capital letters, "
            "digits and underscores; put the key into that variable"
        )


def check_url(url: str, option: str = "") -> None:
    """Raise ConfigError unless a URL is one of HTTP, without a name, a key or a query in it.

    What follows a # may name a model. A URL that may hold a key is not shown. The message begins
    with the name of the option, where one is given.
    """
    named = f"{option}: " if option else ""
    address, _, model = url.partition("#")
    for found, what in (
        ("@" in address, "a name or key before an @"),
        ("?" in address, "a query after a ?"),
        (any(mark in model for mark in "?&="), "a query after its #"),
    ):
        if found:
            raise ConfigError(
                f"{named}the URL has {what}, which would be written to disk; put the key into an "
                "environment variable and name that in api_key_env"
            )
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port
        valid = False
    if not (valid and url.isascii() and url.isprintable() and " " not in url):
        raise ConfigError(f"{named}{url!r} is not a URL; write http://host:port/path")


class Stop(threading.Event):
    """Ends requests, in whatever thread they are: none is tried again once it is set.

    So does `gone`, where it raises RemoteError: what is asked has ended.
    """

    def __init__(self, gone: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._gone = gone
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def check(self) -> None:
        """Before each try. Raises RemoteError when requests are to end."""
        if self.is_set():
            raise RemoteError("the request was given up")
        self._gone()

    def cut(self) -> None:
        """Set it, and break off the requests that wait for an answer."""
        self.set()
        with self._lock:
            for one in self._sockets:
                _shut(one)

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """What httpcore tells of a request: here, the connections that it waits at."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            one = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets.add(one)
                if self.is_set():  # nothing was sent yet
                    _shut(one)


def _shut(one: socket.socket) -> None:
    with suppress(OSError):  # it may be closed already
        one.shutdown(socket.SHUT_RDWR)


# The system's certificates, to which an organisation may have added its own.
_certificates = cache(ssl.create_default_context)


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for a URL; never one for this machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    direct = host in ("localhost", "::1") or host.startswith("127.")
    if direct or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


class Journal:
    """Answers to the requests of one piece of work, in a file as they come.

    Work that was broken off finds them there, so nothing that was answered is asked again. A line
    each: the SHA-256 of the URL and the request, and what was read of the answer. Lines of other
    requests are never found, and a last line that was cut off is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = {}  # by request
        self._lock = threading.Lock()
        data = path.read_bytes() if path.is_file() else b""
        whole, _, rest = data.rpartition(b"\n")
        for line in whole.splitlines():
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                self.values[row["request"]] = row["value"]
        if rest:
            os.truncate(path, len(data) - len(rest))

    def add(self, request: str, value: Any) -> None:
        line = json.dumps({"request": request, "value": value}, allow_nan=False) + "\n"
        with self._lock, open(self.path, "a", encoding="ascii") as file:
            file.write(line)


@dataclass(eq=False)
class Endpoint:
    """A URL that takes JSON and gives JSON."""

    url: str
    remote: Remote
    journal: Journal | None = field(default=None, init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)

    @contextmanager
    def keeping(self, path: Path) -> Iterator[None]:
        """Within the block, answers of `ask_all` are kept in a file, and taken from it."""
        self.journal = Journal(path)
        try:
            yield
        finally:
            self.journal = None

    def reach(self) -> None:
        """Raise RemoteError unless something takes connections at the URL; asked once.

        Behind a proxy that can't be told.
        """
        if _proxy(self.url):
            return
        parts = urlsplit(self.url)
        address = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection(address, min(self.remote.timeout, 10.0)).close()
        except OSError as error:
            raise RemoteError(
                f"{self.url} can't be reached ({error}). Start the server, or mend the URL."
            ) from None

    def ask_all(
        self, bodies: Sequence[Any], read: Callable[[Any, Any], Any], keep: Callable[[Any], bool]
    ) -> list[Any]:
        """What `read` makes of the answers, in order; `remote.concurrency` requests at a time.

        `read` takes an answer and the body that was sent, and raises RemoteError for one that can't
        be used. Values for which `keep` is true go to the journal, where there is one, and must be
        JSON; tuples come back from it as lists.

        Raises RemoteError as `ask` does, at the first that fails for good. The others that are
        under way end, so that what a server charges for is kept, and are not tried again.
        """
        stop, journal = Stop(), self.journal

        def one(body: Any) -> Any:
            request = hashlib.sha256(f"{self.url}\n{json.dumps(body)}".encode()).hexdigest()
            if journal and request in journal.values:
                return journal.values[request]
            value = read(self.ask(body, stop=stop), body)
            if journal and keep(value):
                journal.add(request, value)
            return value

        pool = ThreadPoolExecutor(self.remote.concurrency)
        try:
            futures = [pool.submit(one, body) for body in bodies]
            for future in parts(as_completed(futures), len(futures)):
                future.result()
            return [future.result() for future in futures]
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def ask(
        self,
        body: Any = None,
        path: str = "",
        *,
        parse: Callable[[bytes], Any] | None = None,
        stop: Stop | None = None,
    ) -> Any:
        """The answer to one request, a GET without a body, tried again as `Remote` says.

        `path` is appended to the URL. `parse` makes something of a whole answer, by default of
        JSON; where it raises PassingError, the request is tried again. `stop` ends the request.

        Raises RemoteError when tries run out, and at once when the server refuses the request
        (another 4xx, or a redirect) or answers with what isn't JSON.
        """
        url, stop = self.url + path, stop or Stop()
        data = None if body is None else json.dumps(body).encode("ascii")
        parse = parse or self._parse

        def warn(state: tenacity.RetryCallState) -> None:
            """Once for an outage, not for each of the requests that it hits."""
            stop.check()
            if not self._warned:
                self._warned = True
                _log.warning("%s: %s; trying again", url, _passing(state))

        tries = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(PassingError),
            stop=tenacity.stop_after_attempt(self.remote.retries + 1),
            wait=self._pause,
            before_sleep=warn,
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )
        try:
            found = tries(lambda: parse(self.once(url, data, stop)))
        except PassingError as problem:
            raise RemoteError(
                f"{url} gave no answer in {self.remote.retries + 1} tries, the last one: "
                f"{problem}. Check the server; the same command goes on where this one stopped."
            ) from None
        self._warned = False
        return found

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Seconds before the next try."""
        asked = _passing(state).pause
        if asked is not None:
            return min(asked, _MAX_PAUSE)
        whole = tenacity.wait_exponential(multiplier=self.remote.backoff, max=_MAX_PAUSE)(state)
        return whole * random.uniform(0.5, 1.0)

    def once(self, url: str, data: bytes | None, stop: Stop) -> bytes:
        """The body of the answer to one try.

        Raises PassingError for what may work a moment later, RemoteError for what won't.
        """
        stop.check()
        key = self.remote.key()
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        try:
            with (
                httpx.Client(
                    timeout=self.remote.timeout,
                    verify=_certificates(),
                    proxy=_proxy(url),
                    trust_env=False,
                ) as client,
                client.stream(
                    "GET" if data is None else "POST",
                    url,
                    content=data,
                    headers=headers,
                    extensions={"trace": stop.trace},
                ) as response,
            ):
                # A redirect is an error: a POST would lose its body, the key could go elsewhere.
                if response.is_success:
                    return response.read()
                said = ""
                with suppress(httpx.HTTPError, OSError):  # the status counts, whatever follows it
                    said = response.read().decode("utf-8", "replace")
                refused = f"status {response.status_code} ({self._reason(said)})"
        except (httpx.HTTPError, OSError) as error:
            reason = _root(error)
            problem = f"{type(reason).__name__}: {hidden(str(reason), key)}"
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise RemoteError(f"{self.url}: {problem}. Mend its certificate.") from None
            raise PassingError(problem) from None
        except (httpx.InvalidURL, ValueError, ImportError) as error:  # of the URL, or a proxy's
            raise RemoteError(f"{url} can't be asked: {error}. Mend the URL or proxy.") from None
        if response.status_code in _TRY_AGAIN or response.status_code >= 500:
            raise PassingError(refused, _retry_after(response))
        raise RemoteError(
            f"{url} refused the request: {refused}. Mend the URL, the model's name or the key; it "
            "is not tried again."
        )

    def _parse(self, answer: bytes) -> Any:
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            raise self.malformed(answer, "JSON") from None

    def malformed(self, answer: Any, wanted: str) -> RemoteError:
        """The error for an answer of another form."""
        # As JSON again, whose escapes `hidden` knows.
        text = str(answer, "utf-8", "replace") if isinstance(answer, bytes) else json.dumps(answer)
        shown = self.excerpt(text)
        return RemoteError(f"{self.url} answered {shown!r}, not {wanted}. Mend the server.")

    def _reason(self, text: str) -> str:
        """What the body of an error says, in a line; it may repeat what it was sent."""
        with suppress(ValueError, RecursionError, AttributeError, LookupError, TypeError):
            reply = json.loads(text)
            text = str(reply.get("error", reply)["message"])  # OpenAI's form
        return self.excerpt(text) or "no reason given"

    def excerpt(self, text: str) -> str:
        """A line of at most 200 characters to show of what a server said.

        The key goes first: a cut one wouldn't be found.
        """
        return " ".join(hidden(text, self.remote.key()).split())[:200]


def _passing(state: tenacity.RetryCallState) -> PassingError:
    error = state.outcome and state.outcome.exception()
    assert isinstance(error, PassingError)
    return error


def _root(error: BaseException) -> BaseException:
    """The system's own error, where one is behind those that httpx makes of it."""
    this: BaseException | None = error
    while this is not None and not isinstance(this, OSError):
        this = this.__cause__ or this.__context__
    return this or error


def hidden(text: str, key: str | None) -> str:
    """A text with *** for the key, also where JSON has escaped it."""
    if not key:
        return text
    escaped = json.dumps(key)[1:-1]
    for form in (key, escaped, escaped.replace("/", "\\/")):
        text = text.replace(form, "***")
    return text


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait; a date, its other form, is left to the back-off."""
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None
