"""Requests to servers: JSON over HTTP, tried again where that may help, keys kept out of sight.

Endpoint("http://localhost:8000", Remote(api_key_env="SCORE_KEY")).ask({"prompts": []}, "/score")
"""

import contextlib
import hashlib
import http.client
import json
import logging
import math
import os
import random
import re
import socket
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fastdpo.errors import ConfigError, require

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
        if not key:
            raise ConfigError(
                f"api_key_env: the environment variable {self.api_key_env} is not set; "
                "set it to the key"
            )
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(
                f"api_key_env: the environment variable {self.api_key_env} holds a character that "
                "can't be in a key; set it anew"
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
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port
        valid = False
    if not (valid and url.isascii() and url.isprintable() and " " not in url):
        raise ConfigError(f"{named}{url!r} is not a URL; write http://host:port/path")


class Stop(threading.Event):
    """Ends requests, in whatever thread they are: none is tried again once it is set."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._cut = False

    def check(self) -> None:
        """Before each try. Raises RemoteError when requests are to end."""
        if self.is_set():
            raise RemoteError("the request was given up")

    def cut(self) -> None:
        """Set it, and break off the requests that wait for an answer."""
        self.set()
        with self._lock:
            self._cut = True
            for one in self._sockets:
                _shut(one)

    def holds(self, one: socket.socket) -> None:
        """A request waits at this socket."""
        with self._lock:
            self._sockets.add(one)
            if self._cut:
                _shut(one)


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may be closed already
        one.shutdown(socket.SHUT_RDWR)


class _Request(urllib.request.Request):
    stop: Stop


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: a POST would lose its body, and the key could go elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Held(urllib.request.AbstractHTTPHandler):
    """Shows the connection of a request to its `Stop`."""

    def do_open(self, http_class: Any, req: Any, **options: Any) -> http.client.HTTPResponse:
        def connection_of(*args: Any, **kwargs: Any) -> http.client.HTTPConnection:
            connection = http_class(*args, **kwargs)
            connect = connection.connect

            def connect_and_hold() -> None:
                connect()
                req.stop.holds(connection.sock)

            connection.connect = connect_and_hold
            return connection

        return super().do_open(connection_of, req, **options)  # type: ignore[arg-type]


class _Http(_Held, urllib.request.HTTPHandler):
    pass


class _Https(_Held, urllib.request.HTTPSHandler):
    pass


@cache
def _opener(direct: bool) -> urllib.request.OpenerDirector:
    proxies = [urllib.request.ProxyHandler({})] if direct else []
    return urllib.request.build_opener(*proxies, _NoRedirects, _Http, _Https)


class Journal:
    """Answers to the requests of one piece of work, in a file as they come.

    Work that was broken off finds them there, so nothing that was answered is asked again. A line
    each: the SHA-256 of the URL and the request, and what was read of the answer. Lines of other
    requests are never found, and a last line that was cut off is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._values: dict[str, Any] = {}
        data = self.path.read_bytes() if self.path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                self._values[row["request"]] = row["value"]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))

    def find(self, request: str) -> tuple[Any] | None:
        """The value of a request in a tuple, None where there is none."""
        return (self._values[request],) if request in self._values else None

    def add(self, request: str, value: Any) -> None:
        line = json.dumps({"request": request, "value": value}, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
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
        parts = urllib.parse.urlsplit(self.url)
        host = parts.hostname or ""
        if urllib.request.getproxies() and not _is_direct(host):
            return
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((host, port), min(self.remote.timeout, 10.0)).close()
        except OSError as error:
            raise RemoteError(
                f"{self.url} can't be reached ({error}). Start the server, or mend the URL."
            ) from None

    def ask_all(
        self,
        bodies: Sequence[Any],
        read: Callable[[Any, Any], Any],
        keep: Callable[[Any], bool],
    ) -> list[Any]:
        """What `read` makes of the answers, in order; `remote.concurrency` requests at a time.

        `read` takes an answer and the body that was sent, and raises RemoteError for one that can't
        be used. Values for which `keep` is true go to the journal, where there is one, and must be
        JSON; tuples come back from it as lists.

        Raises RemoteError as `ask` does, at the first that fails for good. The others that are
        under way end, so that what a server charges for is kept, and are not tried again.
        """
        stop = Stop()
        pool = ThreadPoolExecutor(min(self.remote.concurrency, len(bodies) or 1))
        try:
            futures = [pool.submit(self._kept, body, read, keep, stop) for body in bodies]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def _kept(
        self,
        body: Any,
        read: Callable[[Any, Any], Any],
        keep: Callable[[Any], bool],
        stop: Stop,
    ) -> Any:
        if self.journal is None:
            return read(self.ask(body, stop=stop), body)
        request = hashlib.sha256(f"{self.url}\n{json.dumps(body)}".encode()).hexdigest()
        known = self.journal.find(request)
        if known is not None:
            return known[0]
        value = read(self.ask(body, stop=stop), body)
        if keep(value):
            self.journal.add(request, value)
        return value

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
        stop = stop or Stop()
        parse = parse or self._parse
        data = None if body is None else json.dumps(body).encode("ascii")
        problem = ""
        for attempt in range(self.remote.retries + 1):
            stop.check()
            try:
                found = parse(self.once(data, path, stop))
                self._warned = False
                return found
            except PassingError as passing:
                problem = hidden(str(passing), self.remote.key())
                stop.check()
                if attempt < self.remote.retries:
                    self._warn(path, problem)
                    stop.wait(self._pause(attempt, passing.pause))
        raise RemoteError(
            f"{self.url}{path} gave no answer in {self.remote.retries + 1} tries, the last one: "
            f"{problem}. Check the server; the same command goes on where this one stopped."
        )

    def _pause(self, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, _MAX_PAUSE)
        whole = min(self.remote.backoff * 2.0 ** min(attempt, 30), _MAX_PAUSE)
        return whole * random.uniform(0.5, 1.0)

    def _warn(self, path: str, problem: str) -> None:
        """Once for an outage, not for each of the requests that it hits."""
        if not self._warned:
            self._warned = True
            _log.warning("%s%s: %s; trying again", self.url, path, problem)

    def once(self, data: bytes | None, path: str, stop: Stop) -> bytes:
        """The body of the answer to one try.

        Raises PassingError for what may work a moment later, RemoteError for what won't.
        """
        request = _Request(self.url + path, data, {"Content-Type": "application/json"})
        request.stop = stop
        key = self.remote.key()
        if key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        host = urllib.parse.urlsplit(self.url).hostname or ""
        try:
            with _opener(_is_direct(host)).open(request, timeout=self.remote.timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            with error:
                status = f"status {error.code} ({_excerpt(error, key)})"
            if error.code in _TRY_AGAIN or error.code >= 500:
                raise PassingError(status, _retry_after(error)) from None
            raise RemoteError(
                f"{self.url}{path} refused the request: {status}. Mend the URL, the model's name "
                "or the key; it is not tried again."
            ) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            problem = f"{type(reason).__name__}: {hidden(str(reason), key)}"
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise RemoteError(f"{self.url}: {problem}. Mend its certificate.") from None
            raise PassingError(problem) from None

    def _parse(self, answer: bytes) -> Any:
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            raise self.malformed(answer, "JSON") from None

    def malformed(self, answer: Any, wanted: str) -> RemoteError:
        """The error for an answer of another form."""
        # As JSON again, whose escapes `hidden` knows.
        text = (
            answer.decode("utf-8", "replace") if isinstance(answer, bytes) else json.dumps(answer)
        )
        shown = self.excerpt(text)
        return RemoteError(f"{self.url} answered {shown!r}, not {wanted}. Mend the server.")

    def excerpt(self, text: str) -> str:
        """A line to show of what a server said, without the key."""
        return _shortened(text, self.remote.key())


def _is_direct(host: str) -> bool:
    """Whether a host is never asked by a proxy."""
    return host in ("localhost", "::1") or host.startswith("127.")


def _excerpt(error: urllib.error.HTTPError, key: str | None) -> str:
    """What the body of an error says, in a line; it may repeat what it was sent."""
    try:
        text = error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return "no reason given"
    with contextlib.suppress(ValueError, RecursionError, AttributeError, LookupError, TypeError):
        reply = json.loads(text)
        reason = reply.get("error", reply)  # OpenAI's form
        text = str(reason["message"])
    return _shortened(text, key) or "no reason given"


def _shortened(text: str, key: str | None) -> str:
    """A line of at most 200 characters. The key goes first: a cut one wouldn't be found."""
    return " ".join(hidden(text, key).split())[:200]


def hidden(text: str, key: str | None) -> str:
    """A text with *** for the key, also where JSON has escaped it."""
    if not key:
        return text
    escaped = json.dumps(key)[1:-1]
    for form in (key, escaped, escaped.replace("/", "\\/")):
        text = text.replace(form, "***")
    return text


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the server asks to wait; a date, its other form, is left to the back-off."""
    try:
        seconds = float(error.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None
