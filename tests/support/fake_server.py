"""An HTTP server on loopback that answers as a vLLM server would, or wouldn't: what a real one can't be made to."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from aspo_lightning.engines.transfer import Stream

Answer = tuple[int, dict[str, Any]]
"""Status and body."""


@contextmanager
def serving(answers: Mapping[str, Callable[[dict[str, Any]], Answer]]) -> Iterator[str]:
    """A server's URL.

    Args:
        answers: by path; each is given the request's body. Of a model, and empty where nothing is said.
    """
    usual = {
        "/v1/models": lambda body: (200, {"data": [{"id": "model", "max_model_len": 64}]}),
        "/get_world_size": lambda body: (200, {"world_size": 1}),
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
            answer = answers.get(self.path) or usual.get(self.path) or (lambda body: (200, {}))
            code, said = answer(body)
            text = json.dumps(said).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Joined:
    """Answers that join a trainer's stream, as a worker of a server does."""

    stream: Stream | None = None

    def join(self, body: dict[str, Any]) -> Answer:
        info = dict(body["init_info"])
        rank, device = info.pop("first_rank"), torch.device("cpu")
        self.stream = Stream(info.pop("address"), info.pop("port"), rank=rank, device=device, **info)
        return 200, {}


def completion(finish_reason: str, *token_ids: int) -> Answer:
    """What ``/inference/v1/generate`` answers."""
    logprobs = {"content": [{"logprob": -1.0} for _ in token_ids]}
    return 200, {"choices": [{"token_ids": token_ids, "logprobs": logprobs, "finish_reason": finish_reason}]}
