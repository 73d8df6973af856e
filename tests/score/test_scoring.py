"""Scorers: endpoints that fail on purpose, judges, reward models, answers and implicit rewards.

Servers are real ones in threads of this process; models are tiny real ones.
"""

import json
import logging
import math
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import GEMMA, GEMMA3, LLAMA, MAMBA, build_tokenizer, save_tiny

from fastdpo import storage
from fastdpo.data.parts import check_scored, read_candidates
from fastdpo.data.records import Candidate
from fastdpo.errors import DataError, ModelError
from fastdpo.model.identity import policy_digest
from fastdpo.model.load import load_causal_lm
from fastdpo.remote import Endpoint, Remote, RemoteError, Stop
from fastdpo.score.answer import right_answer
from fastdpo.score.judge import JUDGE_TEMPLATE, Judge
from fastdpo.score.load import load_scorer
from fastdpo.score.stage import Scorer, score

torch.set_num_threads(1)

KEY = "sk-very-secret-4711"
QUICK = Remote(timeout=5.0, retries=3, backoff=0.001, concurrency=1)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]


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
    row = {
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


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".tmp"}


TEXTS = [["a", "bb", "ccc"], ["dddd", "", "ee"], ["é", "g" * 9, "hh"]]
COUNTS = [1, 2, 3, 4, 0, 2, 1, 9, 2]


# The content of candidates


def test_scores_are_of_the_content_of_their_candidates(tmp_path):
    folder, calls = tmp_path / "candidates", []

    def lengths(prompts: Any, responses: list[str]) -> list[int]:
        calls.append(responses)
        return [len(text) for text in responses]

    write_candidates(folder, TEXTS)
    assert run_score(Scorer("tests:f", lengths), tmp_path) == COUNTS
    check_scored(folder, tmp_path / "scores")
    before = file_bytes(tmp_path / "scores")
    # Sampled again, to another text of the same place: by the plan nothing has changed.
    path = storage.part_path(folder, 1)
    known = storage.read_jsonl(path)
    storage.write_jsonl_atomic(path, [{**row, "response": "long" * 5} for row in known])
    with pytest.raises(DataError, match="part-00001") as error:
        check_scored(folder, tmp_path / "scores")
    assert f"{folder} has now" in str(error.value) and "--output_dir" in str(error.value)
    calls.clear()
    values = run_score(Scorer("tests:f", lengths), tmp_path)
    assert values == [*COUNTS[:3], 20, 20, 20, *COUNTS[6:]] and calls == [["long" * 5] * 3]
    check_scored(folder, tmp_path / "scores")
    # The same text again, with or without its checksum, is the same.
    storage.write_jsonl_atomic(path, known)
    storage.checksum_path(path).unlink()
    run_score(Scorer("tests:f", lengths), tmp_path)
    assert file_bytes(tmp_path / "scores") == before and len(calls) == 2
    # Scores that others wrote don't say.
    rows = [{"prompt_index": 0, "sample_index": j, "score": 1.0} for j in range(3)]
    storage.write_jsonl_atomic(storage.part_path(tmp_path / "own", 0), rows)
    check_scored(folder, tmp_path / "own")


def test_a_score_that_was_damaged_is_not_passed_over(tmp_path):
    write_candidates(tmp_path / "candidates", TEXTS)
    scorer = Scorer("tests:f", lambda _, responses: [1.0] * len(responses))
    run_score(scorer, tmp_path)
    part = storage.part_path(tmp_path / "scores", 1)
    part.write_text(part.read_text().replace("1.0", "9.0"))
    with pytest.raises(DataError, match="damaged"):
        run_score(scorer, tmp_path)


# Endpoints


def test_an_endpoint_scores_candidates(tmp_path):
    write_candidates(tmp_path / "candidates", TEXTS)
    with Server(counted) as server:
        remote = Remote(concurrency=4)
        scorer = load_scorer(server.url + "/score", batch_size=2, remote=remote)
        assert run_score(scorer, tmp_path) == COUNTS
        assert {path for path, _, _ in server.requests} == {"/score"}
        sent = sorted(len(body["responses"]) for _, _, body in server.requests)
        assert sent == [1, 1, 1, 2, 2, 2]
        assert {body["prompts"][0] for _, _, body in server.requests} == {
            "Prompt 0",
            "Prompt 1",
            "Prompt 2",
        }
        assert all("Authorization" not in headers for _, headers, _ in server.requests)
        assert scorer([CHAT], ["x\ud800"]) == [2]  # JSON all through
        assert server.requests[-1][2]["prompts"] == [CHAT]


@pytest.mark.parametrize(
    "trouble",
    [
        (429, "slow down", {"Retry-After": "0"}),
        (429, "slow down", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        (500, "", {}),
        (503, "<html>loading</html>", {}),
        (408, "", {}),
        "reset",
        "cut",
        "hang",
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_may_pass_is_tried_again(trouble):
    def answer(number: int, body: Any) -> Any:
        return trouble if number < 2 else counted(number, body)

    timeout = 0.2 if trouble == "hang" else 5.0
    with Server(answer) as server:
        remote = Remote(timeout=timeout, retries=2, backoff=0.001, concurrency=1)
        scorer = load_scorer(server.url, remote=remote)
        assert scorer(["p"], ["four"]) == [4]
        assert len(server.requests) == 3
        assert [body["responses"] for _, _, body in server.requests] == [["four"]] * 3


@pytest.mark.parametrize(
    ("trouble", "said"),
    [((503, "loading", {}), r"status 503 \(loading\)"), ("reset", "reset"), ("hang", "timed out")],
)
def test_tries_run_out_in_one_clear_error(tmp_path, trouble, said):
    write_candidates(tmp_path / "candidates", TEXTS)
    with Server(lambda *_: trouble) as server:
        remote = Remote(timeout=0.1, retries=2, backoff=0.001, concurrency=1)
        with pytest.raises(DataError, match=rf"(?s)gave no answer in 3 tries.*{said}"):
            run_score(load_scorer(server.url, remote=remote), tmp_path)
        assert len(server.requests) == 3
    assert set(file_bytes(tmp_path / "scores")) == {"plan.json"}


def test_a_server_that_is_not_there():
    with Server(counted) as server:
        pass
    scorer = load_scorer(server.url, remote=QUICK)
    with pytest.raises(RemoteError, match=r"in 4 tries, the last one: ConnectionRefused"):
        scorer(["p"], ["r"])


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ((400, "no such model", {}), r"refused the request: status 400 \(no such model\)"),
        ((401, "", {}), "status 401 .no reason given"),
        ((404, "x" * 5000, {}), "status 404"),
        ((302, "", {"Location": "http://127.0.0.1:1/elsewhere"}), "status 302"),
        ((307, "", {"Location": "http://127.0.0.1:1/elsewhere"}), "status 307"),
        ((200, "<html>", {}), "answered '<html>', not JSON"),
        ((200, "[" * 100_000, {}), "not JSON"),
        ([1.0, 2.0], "with 2 numbers"),
        ({"scores": [1.0]}, r"answered .*with 2 numbers"),
        ({"score": [1.0, 2.0]}, "with 2 numbers"),
        ({"scores": "ab"}, "with 2 numbers"),
        ((200, '{"scores": [1.0, NaN]}', {}), "nan for prompt 0, sample 1"),
        ((200, '{"scores": [Infinity, 1]}', {}), "inf for prompt 0, sample 0"),
        ((200, '{"scores": [1, null]}', {}), "None for prompt 0, sample 1"),
        ((200, '{"scores": [1, "2"]}', {}), "'2' for prompt 0, sample 1"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_will_not_pass_is_one_error_at_once(tmp_path, trouble, said):
    write_candidates(tmp_path / "candidates", [["a", "bb"]])
    with Server(lambda *_: trouble) as server:
        with pytest.raises(DataError, match=rf"(?s)scorer {server.url}.*{said}") as error:
            run_score(load_scorer(server.url, remote=QUICK), tmp_path)
        assert len(server.requests) == 1 and len(str(error.value)) < 700
    assert set(file_bytes(tmp_path / "scores")) == {"plan.json"}


def test_a_server_that_dies_on_the_way_costs_nothing_that_was_scored(tmp_path):
    write_candidates(tmp_path / "candidates", TEXTS)
    with Server(counted) as server:
        run_score(load_scorer(server.url, remote=QUICK), tmp_path, "whole")
    whole, port = file_bytes(tmp_path / "whole"), server.port

    def die(number: int, body: Any) -> Any:
        if number < 1:
            return counted(number, body)
        threading.Thread(target=dying.close).start()
        return "hang"

    dying = Server(die, port)
    with pytest.raises(DataError, match=r"prompt 1 to prompt 1.*gave no answer in 4 tries"):
        run_score(load_scorer(dying.url, remote=QUICK), tmp_path)
    dying.thread.join()
    assert "part-00000.jsonl" in file_bytes(tmp_path / "scores")
    assert "part-00001.jsonl" not in file_bytes(tmp_path / "scores")
    with Server(counted, port) as again:
        assert run_score(load_scorer(again.url, remote=QUICK), tmp_path) == COUNTS
        assert {body["prompts"][0] for _, _, body in again.requests} == {"Prompt 1", "Prompt 2"}
    assert file_bytes(tmp_path / "scores") == whole


def partials(folder: Path) -> list[Path]:
    return list(folder.glob(".part-*.partial"))


def test_what_a_server_answered_of_a_part_is_not_asked_again(tmp_path):
    """It dies amid the questions of one part, which are paid for one by one."""
    rows = [candidate(i, j, "ab"[i] * (j + 1)).to_json() for i in range(2) for j in range(4)]
    path = storage.part_path(tmp_path / "candidates", 0)
    storage.write_jsonl_atomic(path, rows)

    def judge(_: int, body: Any) -> Any:
        (win,) = length_judge([body["messages"][0]["content"]])
        return top(A=win + 1e-3, B=1 - win + 1e-3)

    def asked(server: Server) -> list[str]:
        return [body["messages"][0]["content"] for _, _, body in server.requests]

    def load(server: Server) -> Scorer:
        remote = Remote(timeout=5.0, retries=1, backoff=0.001, concurrency=4)
        return load_scorer(f"judge:{server.url}/v1#m", remote=remote)

    with Server(judge) as server:
        run_score(load(server), tmp_path, "whole")
        questions, port = set(asked(server)), server.port
    assert len(questions) == len(server.requests) == 2 * 4 * 3
    whole = file_bytes(tmp_path / "whole")

    def dies(number: int, body: Any) -> Any:
        return judge(number, body) if number < 9 else (503, "", {})

    with Server(dies, port) as server:
        with pytest.raises(DataError, match="in 2 tries"):
            run_score(load(server), tmp_path)
        answered = set(asked(server)[:9])
    (partial,) = partials(tmp_path / "scores")
    assert len(partial.read_text().splitlines()) == len(answered) == 9
    with open(partial, "a") as file:
        file.write('{"request": "cut o')  # killed while it wrote

    def breaks(number: int, body: Any) -> Any:
        return judge(number, body) if number < 3 else "reset"

    with Server(breaks, port) as server:
        with pytest.raises(DataError, match="in 2 tries"):
            run_score(load(server), tmp_path)
        answered |= set(asked(server)[:3])
    assert len(answered) == 12
    with Server(judge, port) as server:
        run_score(load(server), tmp_path)
        assert sorted(asked(server)) == sorted(questions - answered)
    assert file_bytes(tmp_path / "scores") == whole and not partials(tmp_path / "scores")


def test_an_answer_on_its_way_is_kept_when_another_request_fails(tmp_path):
    refused = threading.Event()

    def answer(_: int, body: Any) -> Any:
        if body["responses"] == ["bad"]:
            refused.set()
            return 400, "bad", {}
        refused.wait(10)
        time.sleep(0.2)
        return counted(0, body)

    write_candidates(tmp_path / "candidates", [["good", "bad"]])
    with Server(answer) as server:
        scorer = load_scorer(server.url, batch_size=1, remote=Remote(concurrency=2))
        with pytest.raises(DataError, match="status 400"):
            run_score(scorer, tmp_path)
    (partial,) = partials(tmp_path / "scores")
    assert json.loads(partial.read_text())["value"] == [4]


def test_answers_of_other_candidates_are_left_aside(tmp_path):
    def first(number: int, body: Any) -> Any:
        return counted(number, body) if number < 2 else (400, "no", {})

    write_candidates(tmp_path / "candidates", [["a", "bb", "ccc"]])
    one = {"batch_size": 1, "remote": QUICK}
    with Server(first) as server:
        with pytest.raises(DataError, match="status 400"):
            run_score(load_scorer(server.url, **one), tmp_path)
        assert len(partials(tmp_path / "scores")) == 1
    write_candidates(tmp_path / "candidates", [["a", "dddd", "ccc"]])
    with Server(counted, server.port) as server:
        assert run_score(load_scorer(server.url, **one), tmp_path) == [1, 4, 3]
        # What stayed the same is the same question.
        assert [body["responses"] for _, _, body in server.requests] == [["dddd"], ["ccc"]]
    assert not partials(tmp_path / "scores")


@pytest.mark.parametrize("bad", ["NaN", "null", '"2"', "true", "1" + "0" * 400])
def test_an_answer_that_is_no_score_is_asked_for_again(tmp_path, bad):
    write_candidates(tmp_path / "candidates", [["a", "bb"]])
    answers = [(200, f'{{"scores": [{x}]}}', {}) for x in ("1", bad, "2")]
    with Server(lambda number, _: answers[number]) as server:
        scorer = load_scorer(server.url, batch_size=1, remote=QUICK)
        with pytest.raises(DataError, match="must be a finite number"):
            run_score(scorer, tmp_path)
        assert run_score(scorer, tmp_path) == [1, 2] and len(server.requests) == 3


def test_an_outage_is_told_once(caplog):
    def answer(number: int, body: Any) -> Any:
        return (503, "loading", {}) if number in (0, 1, 3, 4, 5) else counted(number, body)

    with Server(answer) as server:
        scorer = load_scorer(server.url, batch_size=1, remote=QUICK)
        assert scorer(["p", "p"], ["a", "bb"]) == [1, 2]
    told = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    assert told == [f"{server.url}: status 503 (loading); trying again"] * 2


def test_a_request_without_a_body_is_a_get(monkeypatch):
    """And a proxy has no part in it on this machine."""
    methods = []

    class Get(Server):
        def reply(self, handler: BaseHTTPRequestHandler, answer: Any) -> None:
            methods.append(handler.command)
            super().reply(handler, answer)

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with Get(lambda *_: {"data": []}) as server:
        assert Endpoint(server.url, QUICK).ask(path="/v1/models") == {"data": []}
        assert [path for path, _, _ in server.requests] == ["/v1/models"] and methods == ["GET"]


@pytest.mark.parametrize("answer", ["hang", "part"])
def test_a_request_that_waits_can_be_cut(answer):
    """Before the first byte of an answer, and after it."""

    class Half(Server):
        def reply(self, handler: BaseHTTPRequestHandler, answer: Any) -> None:
            if answer == "part":
                handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\n[")
            self.closing.wait(20)

    with Half(lambda *_: answer) as server:
        stop, failed = Stop(), []

        def wait() -> None:
            with pytest.raises(RemoteError, match="given up") as error:
                Endpoint(server.url, Remote(timeout=60.0)).ask({}, stop=stop)
            failed.append(error.value)

        waiting = threading.Thread(target=wait)
        waiting.start()
        while not server.requests:
            time.sleep(0.001)
        time.sleep(0.05)  # the first byte is on its way
        stop.cut()
        waiting.join(timeout=10)
        assert failed and not waiting.is_alive()
    with pytest.raises(RemoteError, match="given up"):
        Endpoint(server.url, QUICK).ask({}, stop=stop)


def test_the_first_failure_stops_the_other_requests():
    def answer(number: int, body: Any) -> Any:
        return (503, "", {}) if body["responses"] != ["bad"] else (400, "bad", {})

    with Server(answer) as server:
        # Without a stop the others would go on for an hour.
        remote = Remote(retries=100, backoff=60.0, concurrency=4)
        scorer = load_scorer(server.url, batch_size=1, remote=remote)
        with pytest.raises(RemoteError, match="status 400"):
            scorer(["p"] * 8, ["good", "good", "good", "bad", "good", "good", "good", "good"])
        assert len(server.requests) < 12


class Waits(Stop):
    """Notes the pauses that are asked for, in seconds, and makes none."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses.append(timeout or 0.0)
        return False


def test_pauses_double_with_jitter_up_to_a_minute():
    with Server(lambda *_: (503, "", {})) as server:
        drawn = []
        for _ in range(20):
            waits = Waits()
            with pytest.raises(RemoteError):
                Endpoint(server.url, Remote(retries=8)).ask({}, stop=waits)
            drawn.append(waits.pauses)
    wholes = [1, 2, 4, 8, 16, 32, 60, 60]
    for seconds in drawn:
        assert len(seconds) == 8
        assert all(whole / 2 <= x <= whole for x, whole in zip(seconds, wholes))
    for column in zip(*drawn):
        assert max(column) - min(column) > 0.1 * max(column)


@pytest.mark.parametrize(("asked", "paused"), [("7", 7.0), ("0.5", 0.5), ("86400", 60.0)])
def test_a_server_says_how_long_to_pause(asked, paused):
    with Server(lambda *_: (429, "", {"Retry-After": asked})) as server:
        waits = Waits()
        with pytest.raises(RemoteError):
            Endpoint(server.url, Remote(retries=2)).ask({}, stop=waits)
    assert waits.pauses == [paused, paused]


@pytest.mark.parametrize("asked", ["nan", "-1", "inf", "soon"])
def test_nonsense_in_retry_after_is_left_aside(asked):
    with Server(lambda *_: (429, "", {"Retry-After": asked})) as server:
        waits = Waits()
        with pytest.raises(RemoteError):
            Endpoint(server.url, Remote(retries=1)).ask({}, stop=waits)
    assert 0.5 <= waits.pauses[0] <= 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0.0},
        {"timeout": math.nan},
        {"backoff": math.inf},
        {"retries": -1},
        {"retries": 1.5},
        {"concurrency": 0},
        {"concurrency": True},
    ],
)
def test_remote_names_what_is_wrong(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"^{name}={options[name]} must be "):
        Remote(**options)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("http://", "is not a URL"),
        ("http://host:port/", "is not a URL"),
        ("http://host:99999/", "is not a URL"),
        ("http://[::1/", "is not a URL"),
        ("http://host/a b", "is not a URL"),
        ("http://host/a\nb", "is not a URL"),
        ("judge:https://host/v1", "after a #"),
        ("http://host/pooling", "after a #"),
        ("implicit", "needs policy and previous"),
    ],
)
def test_specs_that_can_not_be_meant(spec, said):
    with pytest.raises(ValueError, match=said):
        load_scorer(spec)


# Keys


def everything_said(error: BaseException) -> str:
    """The texts and reprs of an error and of all behind it."""
    texts, this = [], error
    while this is not None:
        texts.append(f"{this} {this!r} {this.args!r}")
        this = this.__cause__ or this.__context__
    return "\n".join(texts)


def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    write_candidates(tmp_path / "candidates", TEXTS)
    remote = Remote(retries=1, backoff=0.001, api_key_env="MY_KEY")
    with Server(counted) as server:
        scorer = load_scorer(server.url, remote=remote)
        run_score(scorer, tmp_path)
        assert {headers["Authorization"] for _, headers, _ in server.requests} == {f"Bearer {KEY}"}
        assert KEY not in repr(scorer) + repr(scorer.function)
    echo = {"error": f"wrong key: {KEY}", "messages": [f"Bearer {KEY}"]}
    said = []
    for answer in ((401, echo, {}), (503, echo, {}), (200, f"<{KEY}>", {}), (200, echo, {})):
        with Server(lambda *_, answer=answer: answer) as server:
            scorer = load_scorer(server.url, remote=remote)
            with pytest.raises(DataError) as error:
                run_score(scorer, tmp_path, f"bad-{len(said)}")
            said.append(everything_said(error.value))
            assert "***" in said[-1]
    files = [p.read_text() for p in tmp_path.rglob("*") if p.is_file()]
    output = capfd.readouterr()
    assert not any(KEY in text for text in [*said, *files, caplog.text, output.out, output.err])


def test_the_key_does_not_follow_a_redirect(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with Server(counted) as other:
        moved = (302, "", {"Location": other.url + "/elsewhere"})
        with Server(lambda *_: moved) as server:
            scorer = load_scorer(server.url, remote=Remote(api_key_env="MY_KEY"))
            with pytest.raises(RemoteError, match="status 302"):
                scorer(["p"], ["r"])
        assert len(server.requests) == 1 and other.requests == []


@pytest.mark.parametrize("value", ["", "  ", None, f"{KEY}\r\nX: y", KEY + "é", KEY + "\x01"])
def test_keys_that_can_not_be_sent(monkeypatch, value):
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ValueError, match="MY_KEY") as error:
        load_scorer("http://127.0.0.1:1/", remote=Remote(api_key_env="MY_KEY"))
    assert KEY not in everything_said(error.value)


@pytest.mark.parametrize("name", [KEY, "", "a b", "gsk_abc", "=X"])
def test_a_key_in_place_of_its_variable_is_not_shown(name):
    with pytest.raises(ValueError, match="must be the name of an environment variable") as error:
        Remote(api_key_env=name)
    assert not name or name not in everything_said(error.value)


@pytest.mark.parametrize(
    "url",
    [
        f"http://{KEY}@host/",
        f"https://me:{KEY}@host/v1#m",
        f"http://me:{KEY}@host:port/",
        f"http://host/score?api_key={KEY}",
        f"http://host/v1?{KEY}#m",
        f"http://[host/?{KEY}",
        f"http://host/v1#m?key={KEY}",
        f"http://host/v1#api_key={KEY}",
    ],
)
def test_a_key_in_a_url_is_refused_and_not_shown(url):
    for spec in (url, f"judge:{url}"):
        with pytest.raises(ValueError, match="api_key_env") as error:
            load_scorer(spec)
        assert KEY not in everything_said(error.value)


def test_a_model_is_named_after_the_hash():
    for model in ("org/some-model_7b.v1", "llama:free", "a#b"):
        scorer = load_scorer(f"judge:http://127.0.0.1:1/v1#{model}")
        assert scorer.function.ask.model == model


@pytest.mark.parametrize("key", [KEY, 'first"second\\third/fourth', "two  blanks"])
@pytest.mark.parametrize("before", [0, 195, 1990])
def test_a_key_is_masked_before_its_text_is_cut(monkeypatch, key, before):
    """Also where JSON escapes it, and where blanks bring it forward."""
    monkeypatch.setenv("MY_KEY", key)
    remote = Remote(retries=0, api_key_env="MY_KEY")
    for blank in ("x", " "):
        said = blank * before + key + " wrong"
        php = json.dumps(said).replace("/", "\\/")
        for text in (said, {"error": {"message": said}}, {"error": said}, [said], php):
            for status in (401, 503, 200):
                with (
                    Server(lambda *_, answer=(status, text, {}): answer) as server,
                    pytest.raises(RemoteError) as error,
                ):
                    load_scorer(server.url, remote=remote)(["p"], ["r"])
                shown = everything_said(error.value)
                assert not any(part in shown for part in re.findall(r"[a-z]{4,}", key))
                assert len(str(error.value)) < 500


def test_the_message_of_an_error_is_shown():
    answers = [(400, {"error": {"message": "no  such\nmodel", "code": 400}}, {}), (400, [1], {})]
    for answer, shown in zip(answers, ("status 400 (no such model)", "status 400 ([1])")):
        with (
            Server(lambda *_, answer=answer: answer) as server,
            pytest.raises(RemoteError) as error,
        ):
            load_scorer(server.url, remote=QUICK)(["p"], ["r"])
        assert shown in str(error.value)


# vLLM's pooling endpoint


def test_pooled_scores(tmp_path):
    def answer(number: int, body: Any) -> Any:
        value = len(body["messages"][-1]["content"])
        data = [[0.0], [float(value)]] if number % 2 else [float(value)]
        return {"data": [{"index": 0, "object": "pooling", "data": data}]}

    with Server(answer) as server:
        scorer = load_scorer(f"{server.url}/pooling#my/model", remote=QUICK)
        assert scorer(["p", CHAT], ["four", "xyz"]) == [4.0, 3.0]
        paths, bodies = zip(*((path, body) for path, _, body in server.requests))
        assert set(paths) == {"/pooling"} and {body["model"] for body in bodies} == {"my/model"}
        assert bodies[0]["messages"] == [
            {"role": "user", "content": "p"},
            {"role": "assistant", "content": "four"},
        ]
        assert bodies[1]["messages"] == [*CHAT, {"role": "assistant", "content": "xyz"}]
    for bad in ({"data": []}, {"data": [{"data": "AAAA"}]}, {"data": [{"data": []}]}, []):
        with Server(lambda *_, bad=bad: bad) as server:
            scorer = load_scorer(f"{server.url}/pooling#m", remote=QUICK)
            with pytest.raises(RemoteError, match=r"not .*data"):
                scorer(["p"], ["r"])


# Judges


def test_both_orders_are_averaged():
    asked = []

    def first_wins(texts: list[str]) -> list[float]:
        asked.extend(texts)
        return [0.9] * len(texts)

    judge = Judge(first_wins)
    wins = judge.compare(["p", "p"], ["a", "same"], ["b", "same"])
    assert wins == pytest.approx([0.5, 0.5])
    assert len(asked) == 2  # the same responses are a tie without a question
    assert "[Answer A]\na\n" in asked[0] and "[Answer B]\nb\n" in asked[0]
    assert "[Answer A]\nb\n" in asked[1] and "[Answer B]\na\n" in asked[1]


def length_judge(texts: list[str]) -> list[float]:
    """Longer is better, with a bias for the first."""
    wins = []
    for text in texts:
        a, b = (text.split(f"[Answer {x}]\n")[1].split("\n")[0] for x in "AB")
        wins.append(min(1.0, max(0.0, 0.5 + 0.1 * (len(a) - len(b)) + 0.05)))
    return wins


def test_a_response_scores_its_mean_win_probability():
    # The two prompts' rows are mixed; they are never compared with each other.
    rows = [
        candidate(0, 0, "a"),
        candidate(1, 0, "xxxx"),
        candidate(0, 1, "bbb"),
        candidate(1, 1, "y"),
        candidate(0, 2, "cccc"),
        candidate(2, 0, "alone"),
    ]
    values = Judge(length_judge)(rows)
    by_hand = [(0.3 + 0.2) / 2, 0.8, (0.7 + 0.4) / 2, 0.2, (0.8 + 0.6) / 2, 0.5]
    assert values == pytest.approx(by_hand)


def test_a_conversation_names_its_roles():
    text = Judge(length_judge)._text(CHAT, "one", "two {first}")
    assert "[Message]\nuser: hi\n\nassistant: yes?\n" in text and "two {first}" in text
    assert "[Message]\nhi\n" in Judge(length_judge)._text(CHAT[:1], "one", "two")


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return save_tiny(LLAMA, tmp_path_factory.mktemp("judge") / "model")


@pytest.mark.parametrize("template", [True, False])
def test_a_local_judge_reads_the_letters(causal, tmp_path, template):
    folder, tokenizer = causal, build_tokenizer()
    model = load_causal_lm(str(folder)).double()
    if not template:  # where the letters are words of their own
        folder = tmp_path / "plain"
        tokenizer.chat_template = None
        tokenizer.add_tokens([" A", " B"])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            model.lm_head.weight[-2:] = torch.randn(2, 32)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    scorer = load_scorer(f"judge:{folder}", dtype=torch.float64, batch_size=3)
    weights = {"weights": policy_digest(str(folder)), "dtype": "float64"}
    assert scorer.on == "rows" and scorer.settings == {"template": JUDGE_TEMPLATE, **weights}
    texts = ["no idea", "be nice to the beach, and the weather", "a"]
    values = scorer([candidate(0, j, text) for j, text in enumerate(texts)])

    def wins(first: str, second: str) -> float:
        question = JUDGE_TEMPLATE.format(prompt="Prompt 0", first=first, second=second)
        text, space = question + "\nAnswer:", " "
        if template:
            text, space = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", ""
        ids = tokenizer(text=text)["input_ids"]
        a, b = (tokenizer(text=text + space + x)["input_ids"][-1] for x in "AB")
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        return torch.sigmoid(logits[a] - logits[b]).item()

    def both(first: str, second: str) -> float:
        return (wins(first, second) + 1 - wins(second, first)) / 2

    for i, text in enumerate(texts):
        others = [both(text, other) for j, other in enumerate(texts) if j != i]
        assert values[i] == pytest.approx(sum(others) / 2, abs=1e-6)
    assert sum(values) == pytest.approx(1.5) and max(values) - min(values) > 1e-3
    assert scorer.compare is not None
    (forward,) = scorer.compare(["Prompt 0"], [texts[0]], [texts[1]])
    (backward,) = scorer.compare(["Prompt 0"], [texts[1]], [texts[0]])
    assert forward == pytest.approx(both(*texts[:2]), abs=1e-6)
    assert forward + backward == pytest.approx(1.0)


def test_a_judge_scores_candidates_and_its_template_is_in_the_plan(causal, tmp_path):
    write_candidates(tmp_path / "candidates", TEXTS)
    values = run_score(load_scorer(f"judge:{causal}"), tmp_path)
    assert [sum(values[i : i + 3]) for i in (0, 3, 6)] == pytest.approx([1.5] * 3)
    short = "{prompt}? {first} or {second}?"
    with pytest.raises(DataError, match="another settings"):
        run_score(load_scorer(f"judge:{causal}", judge_template=short), tmp_path)
    with pytest.raises(DataError, match=r"ModelError.*positions"):
        scorer = load_scorer(f"judge:{causal}")
        write_candidates(tmp_path / "candidates", [["a", "b c d " * 5000]])
        run_score(scorer, tmp_path, "long")


@pytest.mark.parametrize(
    "template",
    ["{prompt} {first}", "{first} {second}", "{prompt} {first} {second} {third}", "{0}", "{", ""],
)
def test_templates_need_their_fields(template):
    with pytest.raises(ValueError, match="judge_template"):
        load_scorer("judge:http://127.0.0.1:1/v1#m", judge_template=template)


def top(**probabilities: float) -> Any:
    """A chat completion with the log-probabilities of first tokens."""
    tokens = [{"token": t, "logprob": math.log(p)} for t, p in probabilities.items()]
    content = [{"token": tokens[0]["token"], "top_logprobs": tokens}]
    message = {"role": "assistant", "content": tokens[0]["token"]}
    return {"choices": [{"message": message, "logprobs": {"content": content}}]}


def said(text: str | None, logprobs: Any = None) -> Any:
    return {"choices": [{"message": {"content": text}, "logprobs": logprobs}]}


def test_a_remote_judge(tmp_path):
    write_candidates(tmp_path / "candidates", TEXTS)

    def answer(_: int, body: Any) -> Any:
        (message,) = body["messages"]
        (win,) = length_judge([message["content"]])
        return top(The=0.4, A=0.6 * win + 1e-9, B=0.6 * (1 - win) + 1e-9)

    with Server(answer) as server:
        scorer = load_scorer(f"judge:{server.url}/v1#some/model")
        values = run_score(scorer, tmp_path)
        local = Judge(length_judge)
        rows = list(read_candidates(tmp_path / "candidates").values())
        assert values == pytest.approx(local(rows), abs=1e-6)
        assert len(server.requests) == 3 * 6
        path, _, body = server.requests[0]
        assert path == "/v1/chat/completions" and body["model"] == "some/model"
        assert body["temperature"] == 0 and body["logprobs"] is True


@pytest.mark.parametrize(
    ("answers", "win"),
    [
        ([top(A=0.8, B=0.2), top(A=0.4, B=0.6)], 0.7),
        ([top(A=0.5, **{" A": 0.3, "B": 0.2}), top(A=0.4, B=0.6)], 0.7),  # with a space too
        ([top(A=0.9), top(B=0.9)], 1.0),  # what isn't listed counts nothing
        ([said("B"), said("A.")], 0.0),
        ([said(" A"), said("B", {"content": None})], 1.0),
        ([said("A"), said("A")], 0.5),
    ],
)
def test_what_a_remote_judge_says(answers, win):
    with Server(lambda number, _: answers[number]) as server:
        scorer = load_scorer(f"judge:{server.url}/v1/#m", remote=QUICK)
        assert scorer.compare is not None
        assert scorer.compare(["p"], ["x"], ["y"]) == pytest.approx([win])
        assert server.requests[0][0] == "/v1/chat/completions"


def test_undecided_answers_are_ties_and_counted(caplog):
    answers = [top(Maybe=0.9, C=0.1), said(""), top(A=0.75, B=0.25), top(A=0.75, B=0.25)]
    with Server(lambda number, _: answers[number]) as server:
        scorer = load_scorer(f"judge:{server.url}/v1#m", remote=QUICK)
        assert scorer.compare is not None
        wins = scorer.compare(["p", "p"], ["x", "x"], ["y", "z"])
    assert wins == pytest.approx([0.5, 0.5])
    assert "2 of 4 answers were neither A nor B" in caplog.text


THINKS = "<think>\nOkay, the"


@pytest.mark.parametrize("answer", [said(THINKS), top(**{"<think>": 0.99, "A": 1e-5}), said(None)])
def test_a_judge_that_thinks_first_is_refused(tmp_path, answer):
    """Nothing is written, nor kept: with thinking off the same questions have other answers."""
    write_candidates(tmp_path / "candidates", [["a", "bb", "ccc"]])
    thinks = [answer] * 4 + [said("A")] * 2
    with Server(lambda number, _: thinks[number] if number < 6 else said("A")) as server:
        scorer = load_scorer(f"judge:{server.url}/v1#qwen", remote=QUICK)
        with pytest.raises(DataError, match=r"4 of 6 answers of qwen were neither") as error:
            run_score(scorer, tmp_path)
        assert "thinking off" in str(error.value)
        assert ("<think>" in str(error.value)) == (answer != said(None))
        assert set(file_bytes(tmp_path / "scores")) <= {"plan.json", ".part-00000.jsonl.partial"}
        assert run_score(scorer, tmp_path) == [0.5] * 3
        assert len(server.requests) == 6 + 4


def tokens(*of: dict[str, float]) -> Any:
    """A chat completion with the log-probabilities of several tokens."""
    parts = [top(**x)["choices"][0]["logprobs"]["content"][0] for x in of]
    return said("".join(x["token"] for x in parts), {"content": parts})


@pytest.mark.parametrize(
    ("answer", "win"),
    [
        (said("**A**"), 1.0),
        (said('"b"'), 0.0),
        (said("a"), 1.0),
        (said(" b.\n"), 0.0),
        (said("(B)"), 0.0),
        (said("A is"), 1.0),
        (said("a better"), None),
        (said("Answer"), None),
        (said("Both"), None),
        (top(a=0.3, **{'"A': 0.3, "**B": 0.2}), 0.75),
        (top(Answer=0.5, An=0.3, Both=0.1), None),
        (tokens({"**": 0.9, "A": 0.1}, {"B": 0.8, "a": 0.2}), 0.2),
        (tokens({'"': 1.0}, {"(": 1.0}, {"a": 0.6, "B": 0.4}), 0.6),
        (tokens({"**": 1.0}), None),
        (top(The=0.999, A=0.0009), None),
    ],
)
def test_letters_in_lower_case_and_markup(answer, win):
    with Server(lambda *_: answer) as server:
        judge = load_scorer(f"judge:{server.url}/v1#m", remote=QUICK).function
        if win is None:
            with pytest.raises(RemoteError, match="1 of 1"):
                judge.ask(["?"])
        else:
            assert judge.ask(["?"]) == pytest.approx([win])


@pytest.mark.parametrize(
    "bad",
    [
        {"choices": []},
        {"error": "none"},
        [],
        {"choices": [{"message": None}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": None}]}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "A"}]}]}}]},
        (200, json.dumps(top(A=1.0, B=0.5)).replace("0.0", "NaN"), {}),
        (200, json.dumps(top(A=1.0, B=0.5)).replace("0.0", "1e9"), {}),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_malformed_completion_is_an_error(bad):
    with Server(lambda *_: bad) as server:
        scorer = load_scorer(f"judge:{server.url}/v1#m", remote=QUICK)
        with pytest.raises(RemoteError, match=r"answered .*, not "):
            scorer([candidate(0, 0, "x"), candidate(0, 1, "y")])
        assert len(server.requests) <= 2


# Reward models with a v_head


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("body", ["transformer", "model"])
def test_models_with_a_v_head_are_reward_models(tmp_path, body, shards):
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(3)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    model, value = LlamaModel(config).eval(), torch.randn(1, 16)
    folder = tmp_path / "reward"
    config.save_pretrained(folder)
    tensors = {f"{body}.{name}": x for name, x in model.state_dict().items()}
    tensors["v_head.weight"] = value
    files = ["model.safetensors"]
    if shards == 2:
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        where = {name: files[i % 2] for i, name in enumerate(tensors)}
        index = json.dumps({"metadata": {"total_size": 0}, "weight_map": where})
        (folder / "model.safetensors.index.json").write_text(index)
    for i, file in enumerate(files):
        own = {k: x.contiguous() for j, (k, x) in enumerate(tensors.items()) if j % shards == i}
        save_file(own, folder / file, {"format": "pt"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    scorer = load_scorer(f"{folder}#{tmp_path / 'tokenizer'}", batch_size=2, device="cpu")
    prompts, replies = ["the beach?", CHAT, "no"], ["long walks", "be", "nice weather at all"]
    values = scorer(prompts, replies)
    for prompt, reply, value_of_row in zip(prompts, replies, values):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*messages, {"role": "assistant", "content": reply}]
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        ids = tokenizer(text=text[:-1])["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids[-1]) == "<|im_end|>"
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        assert value_of_row == pytest.approx((value[0] @ hidden).item(), abs=1e-5)
    with pytest.raises(ValueError, match="can't be loaded"):
        load_scorer(str(folder))  # no tokenizer beside it


def save_classifier(folder: Path, seed: int, context: int = 512) -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    options: dict[str, Any] = {"num_labels": 1, "pad_token_id": 0, "initializer_range": 0.5}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=context, **options,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_a_reward_model_reads_the_end_of_what_is_too_long(tmp_path, caplog):
    model = save_classifier(tmp_path / "reward", 0, context=64)
    scorer = load_scorer(str(tmp_path / "reward"), batch_size=2)
    texts = ["be nice", "no idea about the weather " * 9, "hi", "long walks on the beach " * 19]
    values = scorer(["hi"] * 4, texts)
    lengths = []
    for text, value in zip(texts, values):
        ids = scorer.function._render("hi", text)
        lengths.append(len(ids))
        with torch.no_grad():
            logit = model(input_ids=torch.tensor([ids[-64:]])).logits.item()
        assert value == pytest.approx(logit, abs=1e-5)
    assert sum(n > 64 for n in lengths) == 2 and min(lengths) <= 64
    assert caplog.text.count("2 of 4 prompts with their responses are longer") == 1
    assert "context of 64 tokens" in caplog.text
    caplog.clear()
    scorer(["hi"], ["hi"])
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["", "judge:"])
def test_scores_of_a_model_belong_to_its_weights_and_dtype(tmp_path, kind):
    def save(seed: int) -> None:
        if kind:
            save_tiny(LLAMA, tmp_path / "model", seed)
        else:
            save_classifier(tmp_path / "model", seed)

    save(0)
    write_candidates(tmp_path / "candidates", TEXTS)
    spec = f"{kind}{tmp_path / 'model'}"
    first = run_score(load_scorer(spec), tmp_path)
    assert run_score(load_scorer(spec), tmp_path) == first
    assert storage.read_json(tmp_path / "scores" / "plan.json")["settings"]["dtype"] == "float32"
    with pytest.raises(DataError, match="another settings"):
        run_score(load_scorer(spec, dtype=torch.bfloat16), tmp_path)
    save(1)  # trained again, in the same place
    with pytest.raises(DataError, match="another settings"):
        run_score(load_scorer(spec), tmp_path)


# The implicit reward


def plain_logp(model: Any, prompt_ids: list[int], response_ids: list[int]) -> float:
    ids = torch.tensor([prompt_ids + response_ids])
    with torch.no_grad():
        logp = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].double(), -1)
    rows = range(len(prompt_ids) - 1, ids.shape[1] - 1)
    return sum(logp[row, token].item() for row, token in zip(rows, response_ids))


def sampled_rows() -> list[dict[str, Any]]:
    """Three, two and one responses to three prompts, mixed, and an empty one."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 250, (count,), generator=generator).tolist()

    prompts = [ids(7), ids(30), ids(4)]
    lengths = [(0, 5), (1, 9), (0, 1), (2, 12), (1, 3), (0, 20), (2, 0)]
    return [
        candidate(i, j, "x", prompt_ids=prompts[i], response_ids=ids(count))
        for j, (i, count) in enumerate(lengths)
    ]


@pytest.mark.parametrize("family", [LLAMA, GEMMA, GEMMA3, MAMBA], ids=lambda f: f.name)
def test_the_implicit_reward_is_that_of_plain_forwards(tmp_path, family):
    folders = [str(save_tiny(family, tmp_path / name, seed)) for seed, name in enumerate("ab")]
    rows = sampled_rows()
    models = [load_causal_lm(name, dtype=torch.float64).eval() for name in folders]
    by_hand = [
        plain_logp(models[0], row.prompt_ids, row.response_ids)
        - plain_logp(models[1], row.prompt_ids, row.response_ids)
        for row in rows
    ]
    assert by_hand[-1] == 0 and min(map(abs, by_hand[:-1])) > 0.01
    # Norms and softmax are computed in fp32 in any dtype.
    for dtype, tolerance in ((torch.float64, 1e-5), (None, 1e-4)):
        scorer = load_scorer(
            "implicit", policy=folders[0], previous=folders[1], dtype=dtype, batch_size=2
        )
        assert scorer.on == "rows"
        assert scorer(rows) == pytest.approx(by_hand, abs=tolerance)
        assert scorer(rows[::-1]) == pytest.approx(by_hand[::-1], abs=tolerance)
    assert scorer(rows[-1:]) == [0.0]


def test_implicit_scores_belong_to_their_models(tmp_path):
    a, b, c = (str(save_tiny(LLAMA, tmp_path / name, i)) for i, name in enumerate("abc"))
    storage.write_jsonl_atomic(
        storage.part_path(tmp_path / "candidates", 0), [row.to_json() for row in sampled_rows()]
    )
    first = run_score(load_scorer("implicit", policy=a, previous=b), tmp_path)
    assert run_score(load_scorer("implicit", policy=a, previous=b), tmp_path, "two") == first
    with pytest.raises(DataError, match="another settings"):
        run_score(load_scorer("implicit", policy=a, previous=c), tmp_path)
    back = run_score(load_scorer("implicit", policy=b, previous=a), tmp_path, "back")
    assert back == pytest.approx([-x for x in first])
    # The same by another name is no reward at all, a moved folder the same scorer.
    with pytest.raises(ValueError, match="same weights"):
        load_scorer("implicit", policy=a, previous=a)
    Path(a).rename(tmp_path / "moved")
    moved = load_scorer("implicit", policy=str(tmp_path / "moved"), previous=b)
    assert run_score(moved, tmp_path) == first
    with pytest.raises(ModelError):
        load_scorer("implicit", policy=a, previous=b)


def test_scorers_on_rows_need_whole_candidates(tmp_path):
    row = candidate(0, 0, "x", extra={"answer": 4}).to_json()
    del row["prompt_ids"]
    storage.write_jsonl_atomic(storage.part_path(tmp_path / "candidates", 0), [row])
    with pytest.raises(DataError, match="'prompt_ids' is missing"):
        run_score(load_scorer("answer"), tmp_path)
    assert run_score(Scorer("tests:f", lambda p, r: [1.0]), tmp_path) == [1.0]


# Verifiable answers


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        (42, "So it is 40 + 2 = 42.", True),
        (42, "42 is my first guess, or rather 43.", False),
        ("42", "The answer is **42**", True),
        (42, "It costs $42.00!", True),
        (42, "42%", True),
        (-3, "x = -3", True),
        (3, "x = -3", False),
        (-3, "x = \u22123", True),
        (3, "the range 1-3", True),
        (1234567, "about 1,234,567, I think", True),
        (234, "about 1,234, I think", False),
        (1234, "about 1,234, I think", True),
        ("1,234", "1234", True),
        (2345, "lines 1,2345", True),
        (0.5, "a half, 1/2", True),
        ("1/2", "0.50", True),
        ("\\frac{1}{2}", ".5", True),
        (0.1, "0.1000000000000000055", False),
        ("1e3", "1000", True),
        (7, "none at all", False),
        (7, "", False),
        (7, "H2O and 7", True),
        (7, "7e", True),
        (1, "1/0", False),
        ("1/0", "1/0", True),  # as a text
        (5, "5 apples, \\boxed{5} of 9", True),
        (5, "\\boxed{4} and 5", False),
        (5, "first \\boxed{4} then \\boxed{5}", True),
        (5, "\\boxed{x = 5}", True),
        ("\\boxed{5}", "so 5", True),
        ("x^{2}+1", "\\boxed{x^{2}+1}", True),
        ("x^2", "\\boxed{x^3}", False),
        ("\\frac{\\sqrt{3}}{2}", "$\\boxed{\\frac{\\sqrt{3}}{2}}$", True),
        (18, "16 - 3 - 4 = 9\n#### 18", True),
        (18, "18\n#### 19", False),
        ("She has 9 * 2 = 18.\n#### 18", "So she makes $18.", True),
        ("Paris", "I think of Lyon.\nThe capital is Paris.", True),
        ("paris", "Answer: **Paris**\n\n", True),
        ("Paris", "Paris is a town.\nI don't know.", False),
        ("New  York", "new york", True),
        ("", "", False),
        (["4", "four"], "It is four", True),
        (["4", "four"], "It is 4", True),
        (["4", "four"], "It is five", False),
        (9, "9" * 5000, False),
        (9, "1e" + "9" * 50 + " 9", True),
        ("yes", "\\boxed{yes", False),
        ("5/2", "\\boxed{2\\frac{1}{2}}", True),
        ("21/2", "\\boxed{2\\frac{1}{2}}", False),
        ("\\boxed{2\\dfrac12}", "2.5", True),
        ("5/2", "\\boxed{2 1/2}", True),
        ("5/2", "so it takes 2 1/2 hours", True),
        ("5/2", "so it takes $2\\,\\tfrac{1}{2}$ hours", True),
        ("-5/2", "\\boxed{-2 \\frac 1 2}", True),
        ("-1/2", "\\boxed{-\\frac{1}{2}}", True),
        ("-1/2", "\\boxed{- \\frac{1}{2}}", True),
        ("1/2", "\\boxed{\\frac12}", True),
        ("3/4", "\\boxed{\\frac{3}4}", True),
        ("2/3", "\\boxed{2 / 3}", True),
        ("\\frac{\\pi}{2}", "\\boxed{\\frac{\\pi}2}", True),
        (27, "\\boxed{2 7}", False),
        (34, "\\boxed{3 4}", False),
        (34, "\\boxed{3\\ 4}", False),
        (34, "\\boxed{3\\,4}", False),
        ("27/2", "\\boxed{2 7/2}", False),
        ("11/2", "\\boxed{2 7/2}", False),
        (1234, "\\boxed{1\\,234}", True),
        (1234, "\\boxed{1{,}234}", True),
        (1234567, "\\boxed{1,\\!234,\\!567}", True),
        (1234567, "1\u202f234\u202f567", True),
        (5, "\\boxed{5\\text{ cm}^2}", True),
        (5, "\\boxed{5~\\mathrm{m}/\\mathrm{s}^{2}}", True),
        (2, "\\boxed{5\\text{ cm}^2}", False),
        (5, "an area of $5\\,\\text{cm}^2$.", True),
        ("5\\text{ cm}", "\\boxed{5}", True),
        (0.5, "\\boxed{\\frac{1}{2}\\text{ m}}", True),
        (90, "\\boxed{90^\\circ}", True),
        (6, "\\boxed{5\\text{ or }6}", True),  # the last number, as ever
        (56, "\\boxed{5\\text{ or }6}", False),
        (5, "\\boxed{\\text{5}}", True),
    ],
)
def test_right_answers(answer, response, right):
    row = candidate(0, 0, response, extra={"answer": answer})
    assert right_answer([row]) == [float(right)]


def test_answers_score_candidates(tmp_path):
    extra = {"answer": 4}
    rows = [candidate(0, j, x, extra=extra).to_json() for j, x in enumerate(["4", "5"])]
    path = storage.part_path(tmp_path / "candidates", 0)
    storage.write_jsonl_atomic(path, rows)
    assert run_score(load_scorer("answer"), tmp_path) == [1.0, 0.0]
    for extra in ({}, {"answer": None}, {"answer": []}, {"answer": [1, None]}):
        storage.write_jsonl_atomic(path, [candidate(3, 0, "4", extra=extra).to_json()])
        with pytest.raises(DataError, match=r"part-00000.jsonl:1 \(prompt 3\): .* column 'answer'"):
            run_score(load_scorer("answer"), tmp_path, "bad")
        assert not (tmp_path / "bad").exists()
        with pytest.raises(DataError, match=r"prompt 3 has no answer"):
            right_answer([candidate(3, 0, "4", extra=extra)])
