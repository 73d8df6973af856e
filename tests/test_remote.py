"""How servers are reached: proxies, and the connections that a `Stop` cuts.

Tries, pauses, keys and answers that are kept are in tests/score.
"""

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fastdpo.remote import Endpoint, Remote, RemoteError, Stop

QUICK = Remote(timeout=5.0, retries=1, backoff=0.001)


@pytest.fixture
def proxy(monkeypatch):
    """A server that answers whatever it is asked for with the address that was meant."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            data = json.dumps([self.path, self.headers["Host"]]).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_a_proxy_of_the_environment_is_asked(proxy, monkeypatch, scheme):
    monkeypatch.setenv("http_proxy", scheme + proxy)
    endpoint = Endpoint("http://elsewhere.invalid:81/v1", QUICK)
    endpoint.reach()  # can't be told
    assert endpoint.ask({}, "/x") == ["http://elsewhere.invalid:81/v1/x", "elsewhere.invalid:81"]


def test_hosts_without_a_proxy_are_asked_themselves(proxy, monkeypatch):
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", "elsewhere.invalid")
    endpoint = Endpoint("http://elsewhere.invalid/", QUICK)
    with pytest.raises(RemoteError, match="in 2 tries, the last one: gaierror"):
        endpoint.ask({})
    with pytest.raises(RemoteError, match="can't be reached"):
        endpoint.reach()
    # This machine never has one.
    assert Endpoint(f"http://{proxy}", QUICK).ask({}) == ["/", proxy]


def test_a_proxy_that_cant_be_used_is_told(monkeypatch):
    monkeypatch.setenv("http_proxy", "gopher://me:secret@127.0.0.1:1")
    with pytest.raises(RemoteError, match=r"can't be asked.*Mend the URL or proxy") as caught:
        Endpoint("http://elsewhere.invalid/", QUICK).ask({})
    assert "secret" not in str(caught.value)


def test_nothing_is_asked_once_the_work_has_stopped(caplog):
    stop = Stop()
    stop.set()
    caplog.set_level(logging.WARNING)
    with pytest.raises(RemoteError, match="given up"):
        Endpoint("http://127.0.0.1:1/", QUICK).ask({}, stop=stop)
    assert not caplog.text
