"""A real HTTP server that speaks vLLM's completions API and samples from a real model.

    with serve(folder, name="policy") as server: ...          # in a thread
    python completions_server.py FOLDER --port 8000 ...       # as `vllm serve FOLDER --port 8000`

It knows the fields that docs.vllm.ai lists for /v1/completions and refuses others. The sampling is
written apart from fastdpo's: a sequence at a time, without a cache, sample i from seed + i.
"""

import argparse
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

# docs.vllm.ai, "OpenAI-Compatible Server", Completions API with its extra parameters.
_FIELDS = """
    model prompt echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed
    stop stream stream_options suffix temperature top_p user use_beam_search top_k min_p
    repetition_penalty length_penalty stop_token_ids include_stop_str_in_output ignore_eos
    min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens
    allowed_token_ids prompt_logprobs add_special_tokens response_format priority request_id
    return_tokens_as_token_ids return_token_ids cache_salt kv_transfer_params vllm_xargs
"""


class CompletionsServer(ThreadingHTTPServer):
    """`faults` are what goes wrong with the next requests for completions, in order."""

    daemon_threads = True

    def __init__(
        self, folder: Path, name: str, port: int = 0, key: str | None = None, max_len: int = 2048
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().__init__(("127.0.0.1", port), _Handler)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.root, self.name, self.key, self.max_len = str(folder), name, key, max_len
        self.lock = threading.Lock()
        self.faults: list[Any] = []
        self.fault_headers: dict[str, str] = {}  # of those that are a status
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.die_after: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up isn't worth a traceback."""


@torch.no_grad()
def draw(model: Any, tokenizer: Any, body: dict[str, Any], index: int) -> dict[str, Any]:
    """One sample for a request of these fields, as a choice of the reply."""
    generator = torch.Generator().manual_seed(body["seed"] + index)
    ids, text, reason, stop_reason = list(body["prompt"]), "", "length", None
    start = len(ids)
    while len(ids) - start < body["max_tokens"] and reason == "length":
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
        ids.append(_choose(logits, body["temperature"], body["top_p"], generator))
        if ids[-1] in body["stop_token_ids"]:
            reason, stop_reason = "stop", ids[-1]
            break
        skipped = body.get("skip_special_tokens", True)
        text = tokenizer.decode(ids[start:], skip_special_tokens=skipped)
        for stop in body.get("stop") or []:
            if stop in text:
                reason, stop_reason, text = "stop", stop, text[: text.index(stop)]
    choice = {"index": index, "text": text, "logprobs": None}
    choice |= {"finish_reason": reason, "stop_reason": stop_reason}
    if body.get("return_token_ids"):
        choice |= {"token_ids": ids[start:], "prompt_token_ids": body["prompt"]}
    return choice


def _choose(logits: torch.Tensor, temperature: float, top_p: float, generator: Any) -> int:
    if temperature == 0:
        return int(logits.argmax())
    p, order = (logits / temperature).softmax(-1).sort(descending=True)
    p[(p.cumsum(-1) - p) >= top_p] = 0.0
    return int(order[torch.multinomial(p, 1, generator=generator)])


class _Handler(BaseHTTPRequestHandler):
    server: CompletionsServer

    def log_message(self, format: str, *args: Any) -> None:
        print(format % args, flush=True) if self.server.die_after is not None else None

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply(200, b"")
        elif self.path == "/v1/models" and self._may():
            card = {"id": self.server.name, "object": "model", "root": self.server.root}
            card |= {"max_model_len": self.server.max_len, "owned_by": "vllm"}
            self._json(200, {"object": "list", "data": [card]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._may():
            return
        server = self.server
        with server.lock:
            server.bodies.append(body)
            fault = server.faults.pop(0) if server.faults else None
            if server.die_after is not None and len(server.bodies) > server.die_after:
                print("worker died", flush=True)
                os._exit(3)
        if body["model"] != server.name:
            self._error(404, f"The model `{body['model']}` does not exist.")
        elif unknown := body.keys() - set(_FIELDS.split()):
            self._error(400, f"unknown fields {sorted(unknown)}")
        elif isinstance(fault, int):
            self._error(fault, f"Bearer {server.key} broke")
        elif fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "garbage":
            self._reply(200, b'{"choices": [')
        else:
            self._complete(body, fault)

    def _complete(self, body: dict[str, Any], fault: str | None) -> None:
        with self.server.lock:
            choices = [
                draw(self.server.model, self.server.tokenizer, body, i) for i in range(body["n"])
            ]
        if fault == "short":
            choices.pop()
        for choice in choices:
            if fault == "no ids":
                del choice["token_ids"]
            if fault == "abort":
                choice["finish_reason"] = "abort"
            if fault == "other prompt":
                choice["prompt_token_ids"] = [1, *body["prompt"]]
        # Nothing says in which order they come.
        reply = {"model": self.server.name, "choices": choices[::-1]}
        data = json.dumps(reply).encode()
        self._reply(200, data, len(data) + (99 if fault == "half" else 0))

    def _may(self) -> bool:
        given = self.headers["Authorization"]
        self.server.keys.append(given)
        allowed = self.server.key is None or given == f"Bearer {self.server.key}"
        if not allowed:
            self._error(401, f"Unauthorized: {given}")
        return allowed

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message, "code": status}})

    def _json(self, status: int, value: Any) -> None:
        self._reply(status, json.dumps(value).encode())

    def _reply(self, status: int, data: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in self.server.fault_headers.items() if status != 200 else ():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve(folder: Path, **options: Any) -> Iterator[CompletionsServer]:
    """The server in a thread; the policy is its name unless `name` says otherwise."""
    server = CompletionsServer(folder, **{"name": str(folder), **options})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--die-after", type=int, default=10**9)
    parser.add_argument("--host", choices=["127.0.0.1"], required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--generation-config", choices=["vllm"], required=True)
    parser.add_argument("--max-model-len", type=int, default=2048)
    args = parser.parse_args()
    key = os.environ.get("VLLM_API_KEY")
    torch.set_num_threads(1)
    server = CompletionsServer(
        args.model, args.served_model_name, args.port, key, args.max_model_len
    )
    server.die_after = args.die_after
    print(f"serving {args.model} with key {key}, process {os.getpid()}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
