"""What the tests of scorers share: a server that fails on purpose, and candidates on disk."""

import json
import math
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fastdpo import storage
from fastdpo.data.records import Candidate
from fastdpo.remote import Remote
from fastdpo.score.stage import Scorer, score

KEY = "sk-very-secret-4711"
QUICK = Remote(timeout=5.0, retries=3, backoff=0.001, concurrency=1)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
TEXTS = [["a", "bb", "ccc"], ["dddd", "", "ee"], ["é", "g" * 9, "hh"]]
COUNTS = [1, 2, 3, 4, 0, 2, 1, 9, 2]


class Server:
    """A server whose `answer(number, body)` gives what happens to a request, counted from 0.

    A dict is sent as JSON, (status, text, headers) as it is; "reset" breaks the connection off,
    "cut" sends half a body, "hang" nothing until the server closes.
    """

    def __init__(self, answer: Callable[[int, Any], Any], port: int = 0) -> None:
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.closing, lock = threading.Event(), threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"] or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                with lock:
                    number = len(outer.requests)
                    outer.requests.append((self.path, dict(self.headers), body))
                outer.reply(self, answer(number, body))

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def reply(self, handler: BaseHTTPRequestHandler, answer: Any) -> None:
        if answer == "reset":
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()
            return
        if answer == "hang":
            self.closing.wait(20)
            return
        status, text, headers = 200, answer, {}
        if isinstance(answer, tuple):
            status, text, headers = answer
        data = (text if isinstance(text, str) else json.dumps(text)).encode()
        length = len(data)
        if answer == "cut":
            length = 2 * len(data)
        handler.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    def close(self) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def counted(_: int, body: Any) -> Any:
    """Scores that tell the responses apart: their lengths."""
    return {"scores": [len(text) for text in body["responses"]]}


def candidate(prompt_index: int, sample_index: int, response: str, **changes: Any) -> Candidate:
    row: dict[str, Any] = {
        "prompt_index": prompt_index,
        "sample_index": sample_index,
        "prompt": f"Prompt {prompt_index}",
        "prompt_ids": [5, 6 + prompt_index],
        "response": response,
        "response_ids": [10 + len(response), 2],
        "finish_reason": "stop",
        **changes,
    }
    return Candidate(**row)


def write_candidates(folder: Path, texts: list[list[str]]) -> None:
    """One prompt a part."""
    for i, of_prompt in enumerate(texts):
        rows = [candidate(i, j, text).to_json() for j, text in enumerate(of_prompt)]
        storage.write_jsonl_atomic(storage.part_path(folder, i), rows)


def run_score(scorer: Scorer, tmp_path: Path, out: str = "scores") -> list[float]:
    score(scorer, tmp_path / "candidates", tmp_path / out, progress=False)
    return [row["score"] for row in storage.read_parts(tmp_path / out)]


def length_judge(texts: list[str]) -> list[float]:
    """Longer is better, with a bias for the first."""
    wins = []
    for text in texts:
        a, b = (text.split(f"[Answer {x}]\n")[1].split("\n")[0] for x in "AB")
        wins.append(min(1.0, max(0.0, 0.5 + 0.1 * (len(a) - len(b)) + 0.05)))
    return wins


def top(**probabilities: float) -> Any:
    """A chat completion with the log-probabilities of first tokens."""
    tokens = [{"token": t, "logprob": math.log(p)} for t, p in probabilities.items()]
    content = [{"token": tokens[0]["token"], "top_logprobs": tokens}]
    message = {"role": "assistant", "content": tokens[0]["token"]}
    return {"choices": [{"message": message, "logprobs": {"content": content}}]}


def said(text: str | None, logprobs: Any = None) -> Any:
    return {"choices": [{"message": {"content": text}, "logprobs": logprobs}]}
