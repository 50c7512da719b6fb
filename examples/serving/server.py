"""JSON over HTTP on 127.0.0.1.

    GET /health           {"status": "ok", "paddle": "3.3.1"}
    POST /embed           {"texts": [str, ...]} to {"embeddings": [[float, ...], ...], "tokens": [int, ...]}:
                          for each text a row of length 1, and how many of its tokens were read

What cannot be answered so gets {"error": str} and status 400, 404, 405, 408, 411, 413, 414, 431, 500, 501, 503 or 505.

A connection has a thread, which waits for a request, reads the whole of it until a deadline, and answers. Connections
beyond `Limits.connections` wait, without a thread, until another one ends.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
import threading
import time
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Iterator, Mapping, Sequence, Tuple

import numpy as np
import paddle

HOST = "127.0.0.1"
MAX_BYTES = 1 << 20
MAX_HEAD_BYTES = 1 << 16
MAX_TEXTS = 256
RECEIVE_BYTES = 1 << 16

ROUTES = {"/health": ("GET", "HEAD"), "/embed": ("POST",)}
EXPECTED_PATHS = "GET /health or POST /embed"
METHODS = ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")

HEAD_END = re.compile(rb"\r?\n\r?\n")
HEADER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*")

Embed = Callable[[Sequence[str], Callable[[], None]], Tuple[np.ndarray, np.ndarray]]
"""Texts to embeddings [N, E] and numbers of tokens [N]. It calls the function before each batch that it computes, which
ends the request by an exception if the batch is not wanted any more."""


@dataclass(frozen=True)
class Limits:
    """How much of the server clients can have.

    Attributes:
        connections: at one time.
        idle_seconds: until the next request begins.
        request_seconds: until the whole of a request is there.
        answer_seconds: until the whole of an answer is taken.
        linger_seconds: from the last answer until the client ends the connection.
        stop_seconds: from the end of listening until requests in work are refused.
    """

    connections: int = 128
    idle_seconds: float = 5.0
    request_seconds: float = 10.0
    answer_seconds: float = 10.0
    linger_seconds: float = 2.0
    stop_seconds: float = 5.0


class RequestError(ValueError):
    """A request that can't be answered.

    Attributes:
        status: the HTTP status to say so with.
        headers: more headers of the answer.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class Handler(BaseHTTPRequestHandler):
    """One connection; `server` has the function that embeds and the limits."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the last packet of an answer waits for the client's delayed acknowledgment
    server: Server

    def setup(self) -> None:
        super().setup()
        self.rfile.close()  # it has no deadline; each head is parsed from a file of its own
        self._received = bytearray()
        self._deadline = 0.0

    def handle_one_request(self) -> None:
        """Read a request and answer it, or set `close_connection` if there is none."""
        self.close_connection = True
        self.command = self.requestline = ""
        self._expects_leave = read = False
        headers: Mapping[str, str] = {}
        try:
            if not self._received and not self._wait():
                return
            self._deadline = time.monotonic() + self.server.limits.request_seconds
            try:
                self._read_head()
                body = self._read_body()
                read = True
                status, value = 200, self._value(body)
            except RequestError as error:
                status, value, headers = error.status, {"error": str(error)}, error.headers
            # Where the next request would begin is not known if this one was not read.
            self.close_connection = self.close_connection or not read or self.server.wants_connections_to_end()
            self._send(status, value, headers)
            if self.close_connection:
                self._linger()
        except OSError:  # the client is gone, or takes no answer
            self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a head, answered like all other errors."""
        raise RequestError(code, f"request: {_short(message or HTTPStatus(code).phrase)}")

    def handle_expect_100(self) -> bool:
        """The client waits for leave to send the body, which `_read_body` gives once its length is checked."""
        self._expects_leave = True
        return True

    def _wait(self) -> bool:
        """Whether a request begins before the connection was idle for too long or the server stops."""
        with self.server.idle(self.connection):
            self.connection.settimeout(self.server.limits.idle_seconds)
            self._received += self.connection.recv(RECEIVE_BYTES)
        return bool(self._received)

    def _receive(self) -> None:
        try:
            seconds = self._deadline - time.monotonic()
            if seconds <= 0:
                raise socket.timeout
            self.connection.settimeout(seconds)
            received = self.connection.recv(RECEIVE_BYTES)
        except socket.timeout:
            seconds = self.server.limits.request_seconds
            raise RequestError(408, f"request: expected the whole of it within {seconds:g} seconds") from None
        if not received:
            raise RequestError(400, "request: expected the rest of it, got the end of the connection")
        self._received += received

    def _read_head(self) -> None:
        """Set `command`, `path`, `headers` and `close_connection`."""
        searched = 0
        while True:
            if self._received.startswith((b"\r", b"\n")):
                self._received = self._received.lstrip(b"\r\n")
            end = HEAD_END.search(self._received, max(0, searched - 3))
            searched = len(self._received)
            if (end.start() if end else searched) > MAX_HEAD_BYTES:
                status, part = (431, "headers") if b"\n" in self._received[:MAX_HEAD_BYTES] else (414, "request line")
                raise RequestError(status, f"{part}: expected at most {MAX_HEAD_BYTES} bytes, got more")
            if end:
                break
            self._receive()
        line, *headers = bytes(self._received[: end.start()]).replace(b"\r\n", b"\n").split(b"\n")
        del self._received[: end.end()]
        for header in headers:
            if not HEADER.fullmatch(header):
                raise RequestError(400, f"headers: expected NAME: VALUE, got {_shown(header.decode('latin-1'))}")
        self.raw_requestline = line
        self.rfile = io.BytesIO(b"".join(header + b"\r\n" for header in headers) + b"\r\n")
        if not self.parse_request() or self.request_version == "HTTP/0.9":
            shown = _shown(line.decode("latin-1"))
            raise RequestError(400, f"request line: expected METHOD PATH HTTP/1.1, got {shown}")

    def _read_body(self) -> bytes:
        lengths = self.headers.get_all("Content-Length", [])
        encoding = self.headers["Transfer-Encoding"]
        if encoding is not None:
            status = 400 if lengths else 411
            raise RequestError(status, f"Transfer-Encoding: expected a Content-Length instead, got {_shown(encoding)}")
        if not lengths and self.command == "POST":
            raise RequestError(411, "Content-Length: expected a number of bytes, got none")
        if len(lengths) > 1:
            raise RequestError(400, f"Content-Length: expected one, got {len(lengths)}")
        digits = lengths[0].strip(" \t") if lengths else "0"
        if not re.fullmatch("[0-9]+", digits):
            raise RequestError(400, f"Content-Length: expected a number of bytes, got {_shown(digits)}")
        significant = digits.lstrip("0") or "0"
        # Python refuses to convert thousands of digits.
        if len(significant) > len(str(MAX_BYTES)) or int(significant) > MAX_BYTES:
            raise RequestError(413, f"Content-Length: expected at most {MAX_BYTES}, got {_short(significant)}")
        length = int(significant)
        if self._expects_leave and len(self._received) < length:
            self.connection.settimeout(self.server.limits.answer_seconds)
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while len(self._received) < length:
            self._receive()
        body = bytes(self._received[:length])
        del self._received[:length]
        return body

    def _value(self, body: bytes) -> dict[str, Any]:
        if self.command not in METHODS:
            raise RequestError(501, f"method: expected {EXPECTED_PATHS}, got {_shown(self.command)}")
        if self.path not in ROUTES:
            raise RequestError(404, f"{_short(self.path)}: expected {EXPECTED_PATHS}")
        allowed = ROUTES[self.path]
        if self.command not in allowed:
            message = f"{self.path}: expected {' or '.join(allowed)}, got {self.command}"
            raise RequestError(405, message, {"Allow": ", ".join(allowed)})
        if self.path == "/health":
            return {"status": "ok", "paddle": paddle.__version__}
        texts = _texts(body)
        try:
            embeddings, tokens = self.server.embed(texts, self.server.refuse_if_stopping)
            return {"embeddings": embeddings.tolist(), "tokens": tokens.tolist()}
        except RequestError:
            raise
        except Exception as error:
            self.log_error("%s", f"the model failed: {type(error).__name__}: {error}")
            raise RequestError(500, "the model failed; the server's log says why") from error

    def _send(self, status: int, value: Any, more_headers: Mapping[str, str]) -> None:
        body = json.dumps(value).encode()
        headers = {
            "Date": self.date_time_string(),
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close" if self.close_connection else "keep-alive",
            **more_headers,
        }
        lines = [f"{self.protocol_version} {status} {HTTPStatus(status).phrase}"]
        lines += [f"{name}: {text}" for name, text in headers.items()]
        head = "".join(f"{line}\r\n" for line in [*lines, ""]).encode("ascii")
        self.log_request(status)
        self.connection.settimeout(self.server.limits.answer_seconds)
        self.wfile.write(head if self.command == "HEAD" else head + body)

    def _linger(self) -> None:
        """Take what the client still sends: ended with bytes unread, a connection is reset, and the answer lost."""
        self.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + self.server.limits.linger_seconds
        received = b"?"
        while received and time.monotonic() < deadline:
            self.connection.settimeout(max(deadline - time.monotonic(), 0.001))
            received = self.connection.recv(RECEIVE_BYTES)


def _texts(body: bytes) -> list[str]:
    try:
        value = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"body: expected JSON in UTF-8, got something else ({_short(str(error))})") from error
    if not isinstance(value, dict) or "texts" not in value:
        raise RequestError(400, f'body: expected {{"texts": [...]}}, got {_shown(value)}')
    texts = value["texts"]
    if not isinstance(texts, list):
        raise RequestError(400, f"texts: expected a list, got {_shown(texts)}")
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise RequestError(400, f"texts: expected 1 to {MAX_TEXTS}, got {len(texts)}")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise RequestError(400, f"texts[{i}]: expected some words, got {_shown(text)}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"{_shown(text[error.start])} at {error.start}, a lone surrogate"
            raise RequestError(400, f"texts[{i}]: expected characters, got {half}") from error
    return texts


def _shown(value: object) -> str:
    """A value for an error's text. What is nested is not shown, for it may be too deep for Python's stack."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"an object with {len(value)} keys" if isinstance(value, dict) else _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


class Server(ThreadingHTTPServer):
    """Listens from the start. `serve_forever` answers; `shutdown`, of another thread, ends it, and `server_close` waits
    for the answers of requests in work.

    Args:
        port: 0 takes any free one; `server_port` says which.
        embed: see `Embed`.
        limits: of connections and times.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True
    request_queue_size = 256  # clients that wait to be accepted; more of them have to try again

    def __init__(self, port: int, embed: Embed, limits: Limits = Limits()) -> None:
        self.embed = embed
        self.limits = limits
        self._changed = threading.Condition()  # of what follows
        self._connections: set[socket.socket] = set()
        self._idle: set[socket.socket] = set()
        self._full = False
        self._stopping = False
        self._refusing = False
        super().__init__((HOST, port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection as soon as it may have one, at once if the server stops."""
        with self._changed:
            self._full = len(self._connections) >= self.limits.connections
            self._changed.wait_for(lambda: len(self._connections) < self.limits.connections or self._stopping)
            self._full = False
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection and make room for another one."""
        super().shutdown_request(request)
        with self._changed:
            self._connections.discard(request)
            self._changed.notify_all()

    @contextlib.contextmanager
    def idle(self, connection: socket.socket) -> Iterator[None]:
        """While a connection waits for a request, in which `shutdown` ends it."""
        with self._changed:
            self._idle.add(connection)
            if self._stopping:
                self._end_idle()
        try:
            yield
        finally:
            with self._changed:
                self._idle.discard(connection)

    def _end_idle(self) -> None:
        for connection in self._idle:
            with contextlib.suppress(OSError):  # the client has ended it
                connection.shutdown(socket.SHUT_RD)  # what came already can still be read

    def wants_connections_to_end(self) -> bool:
        """Whether others wait for a thread, or the server stops."""
        return self._full or self._stopping

    def refuse_if_stopping(self) -> None:
        """Raise `RequestError` if requests in work have had their time."""
        if self._refusing:
            raise RequestError(503, "server: stopped before the texts were embedded")

    def shutdown(self) -> None:
        """Accept no more connections and end those that are idle."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self._end_idle()
        super().shutdown()

    def server_close(self) -> None:
        """Stop listening, and wait until requests in work are answered, after `stop_seconds` by a refusal."""
        with contextlib.suppress(OSError):  # none is left
            self.socket.setblocking(False)
            while True:  # clients in the queue are connected, for all they know, and may have asked
                self.process_request(*self.get_request())
        super().server_close()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._connections, self.limits.stop_seconds):
                self._refusing = True
                self._changed.wait_for(lambda: not self._connections, self.limits.stop_seconds)
