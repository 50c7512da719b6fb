"""JSON over HTTP on 127.0.0.1.

    GET /health           {"status": "ok", "paddle": "3.3.1"}
    POST /embed           {"texts": [str, ...]} to {"embeddings": [[float, ...], ...]}, a row of length 1 for each text

A bad request is answered with status 400, 404 or 413 and {"error": str}.
"""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Sequence

import numpy as np
import paddle

HOST = "127.0.0.1"
MAX_BYTES = 1 << 20
MAX_TEXTS = 256


class RequestError(ValueError):
    """A request that can't be answered.

    Attributes:
        status: the HTTP status to say so with.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """One connection; `server` has the function that embeds."""

    protocol_version = "HTTP/1.1"
    timeout = 30
    server: Server

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, {"status": "ok", "paddle": paddle.__version__})
        else:
            self._send(404, {"error": f"{self.path}: expected GET /health or POST /embed"})

    def do_POST(self) -> None:
        try:
            texts = self._read_texts()
        except RequestError as error:
            # The body may not have been read, so the connection can't go on.
            self.close_connection = True
            self._send(error.status, {"error": str(error)})
            return
        self._send(200, {"embeddings": self.server.embed(texts).tolist()})

    def _read_texts(self) -> list[str]:
        if self.path != "/embed":
            raise RequestError(404, f"{self.path}: expected GET /health or POST /embed")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RequestError(400, f"Content-Length: expected a number of bytes, got {length!r}")
        if int(length) > MAX_BYTES:
            raise RequestError(413, f"Content-Length: expected at most {MAX_BYTES}, got {length}")
        try:
            value = json.loads(self.rfile.read(int(length)))
        except ValueError as error:
            raise RequestError(400, f"body: expected JSON, got something else ({error})") from error
        texts = value.get("texts") if isinstance(value, dict) else None
        if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_TEXTS:
            raise RequestError(400, f'body: expected {{"texts": [...]}} with 1 to {MAX_TEXTS} texts')
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise RequestError(400, f"texts[{i}]: expected some words, got {text!r}")
        return texts

    def _send(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """Listens from the start; `serve_forever` answers, `server_close` stops listening.

    Args:
        port: 0 takes any free one; `server_port` says which.
        embed: texts to embeddings [N, E].

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, port: int, embed: Callable[[Sequence[str]], np.ndarray]) -> None:
        super().__init__((HOST, port), Handler)
        self.embed = embed
