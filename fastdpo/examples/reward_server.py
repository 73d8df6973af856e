"""A server of scores, for a reward that lives on another machine.

    python -m fastdpo.examples.reward_server --scorer REWARD_MODEL --port 8100
    fastdpo iterate --score.scorer http://HOST:8100/score ...

The protocol is one request: POST {"prompts": [...], "responses": [...]} is answered with
{"scores": [...]}, a finite number for each response.  Prompts are strings or lists of messages.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fastdpo.score.config import ScoreConfig

Score = Callable[[list[Any], list[str]], Sequence[float]]


def server(score: Score, port: int = 0, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    """A server of a scoring function; ``serve_forever`` runs it. Port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer, status = {"scores": list(score(body["prompts"], body["responses"]))}, 200
            except Exception as error:  # the client says it, and where it was
                answer, status = {"error": f"{type(error).__name__}: {error}"}, 400
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    return ThreadingHTTPServer((host, port), Handler)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scorer", default="fastdpo.scoring:plain_language")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8100)
    args = parser.parse_args(argv)
    scorer = ScoreConfig(scorer=args.scorer).load(args.scorer)
    with server(scorer, args.port, args.host) as running:
        print(f"scores of {args.scorer}: http://{args.host}:{running.server_port}/score")
        running.serve_forever()


if __name__ == "__main__":
    main()
