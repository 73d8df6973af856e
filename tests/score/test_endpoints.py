"""Scores of servers that fail on purpose, and the keys they are asked with.

They are real ones in threads of this process.
"""

import json
import logging
import math
import re
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from scoring_server import (
    CHAT,
    COUNTS,
    KEY,
    QUICK,
    TEXTS,
    Server,
    candidate,
    counted,
    length_judge,
    run_score,
    top,
    write_candidates,
)
from stages import file_bytes

from fastdpo import storage
from fastdpo.errors import DataError
from fastdpo.remote import Endpoint, Remote, RemoteError, Stop
from fastdpo.score.load import load_scorer
from fastdpo.score.stage import Scorer

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
