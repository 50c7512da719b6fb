"""The serving example's HTTP without a model: every request is answered in JSON, clients share threads and time, and
stopping leaves nothing unanswered."""

import concurrent.futures
import contextlib
import http.client
import json
import re
import select
import socket
import threading
import time

import numpy as np
import pytest

from examples.serving.server import MAX_BYTES, MAX_HEAD_BYTES, MAX_TEXTS, Handler, Limits, Server
from examples.serving.turns import Turns

PATIENCE = 30  # seconds until a test gives up
TEXTS = b'{"texts": ["a cat", "sat"]}'


def embed(texts, before_batch):
    """What a model would do, on two numbers for each text."""
    before_batch()
    return np.full((len(texts), 2), 0.5, np.float32), np.array([len(text.split()) for text in texts])


ANSWER = {"embeddings": [[0.5, 0.5], [0.5, 0.5]], "tokens": [2, 1]}


def serve(server):
    """What stops a server, once it serves in a thread: a function."""
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()

    def stop():
        server.shutdown()
        thread.join()
        server.server_close()

    return stop


@contextlib.contextmanager
def running(function=embed, **limits):
    """A server that serves in a thread."""
    server = Server(0, function, Limits(**limits))
    stop = serve(server)
    try:
        yield server
    finally:
        stop()


@pytest.fixture(scope="module")
def server():
    with running(linger_seconds=PATIENCE) as server:
        yield server


def connect(server):
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=PATIENCE)


def receive(connection, method="GET"):
    """The next answer: its status, its headers and its value, which is None if there is no body."""
    response = http.client.HTTPResponse(connection, method=method)
    response.begin()
    body = response.read()
    assert response.headers["Content-Type"] == "application/json"
    return response.status, response.headers, json.loads(body) if body else None


def ask(server, data, method="GET"):
    """`receive` on a connection of its own."""
    with connect(server) as connection:
        connection.sendall(data)
        return receive(connection, method)


def wait_until(condition):
    """Return once `condition()` holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def get(path="/health", *headers, method="GET"):
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def post(body, *headers, path="/embed"):
    return get(path, *headers, method="POST") + body


def framed(body, *headers, path="/embed"):
    return post(body, f"Content-Length: {len(body)}", *headers, path=path)


def texts(*values):
    return framed(json.dumps({"texts": values}).encode())


# By name: the bytes, the status, a word of the error, and whether the connection can go on.
BAD_REQUESTS = {
    "path of GET": (get("/other"), 404, "/other", True),
    "path of POST": (framed(b"{}", path="/other"), 404, "/other", True),
    "no JSON": (framed(b"no JSON"), 400, "JSON", True),
    "no body": (framed(b""), 400, "JSON", True),
    "not UTF-8": (framed(b'{"texts": ["\xff\xfe"]}'), 400, "UTF-8", True),
    "UTF-16": (framed(TEXTS.decode().encode("utf-16")), 400, "UTF-8", True),
    "list": (framed(b"[]"), 400, "got a list of 0", True),
    "other key": (framed(b'{"text": "a cat"}'), 400, "got an object with 1 keys", True),
    "no texts": (framed(b'{"texts": []}'), 400, "got 0", True),
    "text alone": (framed(b'{"texts": "a cat"}'), 400, "got 'a cat'", True),
    "empty text": (texts("a cat", "  "), 400, "texts[1]", True),
    "number": (texts("a cat", 3), 400, "texts[1]", True),
    "long number": (texts(10**4000), 400, "texts[0]", True),
    "too many texts": (texts(*["a"] * (MAX_TEXTS + 1)), 400, str(MAX_TEXTS), True),
    "lone surrogate": (framed(b'{"texts": ["a cat", "a \\ud800"]}'), 400, "texts[1]", True),
    "100,000 brackets": (framed(b"[" * 100_000), 400, "JSON", True),
    "100,000 lists": (framed(b'{"texts": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}"), 400, "JSON", True),
    "200 lists": (framed(b'{"texts": [' + b"[" * 200 + b"]" * 200 + b"]}"), 400, "got a list of 1", True),
    "number of 6,000 digits": (framed(b'{"texts": [' + b"9" * 6000 + b"]}"), 400, "", True),
    "too long": (framed(b" " * (4 * MAX_BYTES)), 413, str(MAX_BYTES), False),
    "length of 6,000 digits": (post(TEXTS, f"Content-Length: {'9' * 6000}"), 413, "Content-Length", False),
    "length below 0": (post(TEXTS, "Content-Length: -1"), 400, "'-1'", False),
    "length with a sign": (post(TEXTS, f"Content-Length: +{len(TEXTS)}"), 400, "Content-Length", False),
    "length in other digits": (post(TEXTS, "Content-Length: \u00b2"), 400, "Content-Length", False),
    "length in words": (post(TEXTS, "Content-Length: abc"), 400, "'abc'", False),
    "empty length": (post(TEXTS, "Content-Length:"), 400, "Content-Length", False),
    "list of lengths": (post(TEXTS, "Content-Length: 5, 5"), 400, "'5, 5'", False),
    "two lengths": (framed(TEXTS, f"Content-Length: {len(TEXTS)}"), 400, "expected one, got 2", False),
    "no length": (post(TEXTS), 411, "Content-Length", False),
    "chunks": (post(b"0\r\n\r\n", "Transfer-Encoding: chunked"), 411, "Transfer-Encoding", False),
    "chunks and length": (framed(TEXTS, "Transfer-Encoding: chunked"), 400, "Transfer-Encoding", False),
    "long header": (get("/health", "X: " + "a" * 70_000), 431, str(MAX_HEAD_BYTES), False),
    "long headers": (get("/health", *["X: " + "a" * 6000] * 90), 431, str(MAX_HEAD_BYTES), False),
    "many headers": (get("/health", *["X: a"] * 200), 431, "headers", False),
    "endless header": (b"GET /health HTTP/1.1\r\nX: " + b"a" * 500_000, 431, str(MAX_HEAD_BYTES), False),
    "long path": (get("/" + "a" * 70_000), 414, "request line", False),
    "header without a name": (get("/health", "nonsense"), 400, "'nonsense'", False),
    "space in a header's name": (post(TEXTS, "Content-Length : 5"), 400, "headers", False),
    "folded header": (get("/health", "X: a\r\n b"), 400, "headers", False),
    "carriage return in a header": (get("/health", "X: a\rContent-Length: 5"), 400, "headers", False),
    "unknown method": (get(method="BREW"), 501, "'BREW'", True),
    "lower case": (get(method="get"), 501, "'get'", True),
    "no version": (b"GET /health\r\n\r\n", 400, "request line", False),
    "bad version": (b"GET /health HTTP/one\r\n\r\n", 400, "HTTP/one", False),
    "other version": (b"GET /health HTTP/2.0\r\n\r\n", 505, "2.0", False),
    "version of 6,000 digits": (b"GET /health HTTP/1." + b"1" * 6000 + b"\r\n\r\n", 400, "version", False),
    "spaces": (b"   \r\n\r\n", 400, "request line", False),
    "other protocol": (b"\x16\x03\x01\x02\x00\r\n\r\n", 400, "request", False),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests(server, capsys, name):
    """They are answered, with nothing else on standard error than a line for each, and the server goes on."""
    data, status, word, goes_on = BAD_REQUESTS[name]
    with connect(server) as connection:
        connection.sendall(data)
        got, headers, value = receive(connection)
        assert got == status and list(value) == ["error"] and word in value["error"] and len(value["error"]) < 300
        assert "Server" not in headers and headers["Connection"] == ("keep-alive" if goes_on else "close")
        if goes_on:
            connection.sendall(framed(TEXTS))
            assert receive(connection)[2] == ANSWER
        else:
            assert connection.recv(1) == b""
    assert ask(server, get())[0] == 200
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "data",
    [
        framed(TEXTS),
        post(TEXTS, "Content-Length: " + "0" * 6000 + str(len(TEXTS))),
        post(TEXTS, f"Content-Length: \t{len(TEXTS)} "),
        b"\r\n\r\n" + framed(TEXTS),
        framed(TEXTS).replace(b"\r\n", b"\n"),
        framed(TEXTS).replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
    ids=["plain", "zeros", "white space", "empty lines before", "line feeds", "HTTP/1.0"],
)
def test_good_requests(server, data):
    status, headers, value = ask(server, data)
    assert status == 200 and value == ANSWER and "Server" not in headers


def test_part_of_a_request(server):
    """A client that ends its side of the connection too early is told so."""
    for data in (get()[:-2], framed(TEXTS)[:-1]):
        with connect(server) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            status, _, value = receive(connection)
            assert status == 400 and "end of the connection" in value["error"]


@pytest.mark.parametrize("path, allowed", [("/health", ["GET", "HEAD"]), ("/embed", ["POST"])])
@pytest.mark.parametrize("method", ["CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"])
def test_methods(server, path, allowed, method):
    status, headers, value = ask(server, get(path, "Content-Length: 0", method=method), method)
    if method in allowed:
        assert status == (400 if method == "POST" else 200)  # what is posted here is empty
    else:
        assert status == 405 and headers["Allow"] == ", ".join(allowed)
        assert value is None if method == "HEAD" else method in value["error"]


def test_head(server):
    """The headers of GET, no body, and the next answer follows."""
    with connect(server) as connection:
        connection.sendall(get(method="HEAD"))
        _, head, value = receive(connection, "HEAD")
        connection.sendall(get())
        _, headers, _ = receive(connection)
    assert value is None and head["Content-Length"] == headers["Content-Length"] != "0"


def test_requests_sent_together(server):
    with connect(server) as connection:
        connection.sendall(framed(TEXTS) + get("/other") + framed(TEXTS, "Connection: close"))
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"404", b"200"]


def test_expected_continue(server):
    """A client that waits for leave to send a body gets it, or the error."""
    with connect(server) as connection:
        connection.sendall(post(b"", f"Content-Length: {len(TEXTS)}", "Expect: 100-continue"))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(TEXTS)
        assert receive(connection)[2] == ANSWER
    assert ask(server, post(b"", f"Content-Length: {MAX_BYTES + 1}", "Expect: 100-continue"))[0] == 413


def test_failing_model(capsys):
    def fail(texts, before_batch):
        raise RuntimeError("out of memory")

    with running(fail) as server, connect(server) as connection:
        for _ in range(2):
            connection.sendall(framed(TEXTS))
            status, _, value = receive(connection)
            assert status == 500 and list(value) == ["error"]
    errors = capsys.readouterr().err
    assert errors.count("RuntimeError: out of memory") == 2 and "Traceback" not in errors


def test_answers_are_sent_at_once(monkeypatch):
    """In one call and without Nagle's algorithm, so that no answer waits for the client's acknowledgment."""
    sent = []
    setup = Handler.setup

    class Recorder:
        def __init__(self, handler):
            self.handler, self.file = handler, handler.wfile

        def write(self, data):
            delayed = not self.handler.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            sent.append((bytes(data), delayed))
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def recording_setup(handler):
        setup(handler)
        handler.wfile = Recorder(handler)

    monkeypatch.setattr(Handler, "setup", recording_setup)
    with running() as server, connect(server) as connection:
        for data in (framed(TEXTS), get(), get("/other")):
            connection.sendall(data)
            receive(connection)
    assert [data.split()[1] for data, _ in sent] == [b"200", b"200", b"404"]
    assert all(data.endswith(b"}") and not delayed for data, delayed in sent)


def test_clients_before_the_server_accepts():
    """A hundred clients that come at once are connected, and answered, even if none is accepted for a while."""
    server = Server(0, embed)
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(100):
            clients.append(socket.socket())
            stack.enter_context(clients[-1])
            clients[-1].settimeout(5)
            clients[-1].connect(("127.0.0.1", server.server_port))
            clients[-1].sendall(framed(TEXTS))
        stop = serve(server)
        try:
            for client in clients:
                client.settimeout(PATIENCE)
                assert receive(client)[2] == ANSWER
        finally:
            stop()


def test_threads_are_bounded():
    """No more requests than connections are worked at; the others wait, and all are answered."""
    working, most = [], []
    release = threading.Event()

    def wait(texts, before_batch):
        working.append(threading.current_thread())
        most.append(len(working))
        assert release.wait(PATIENCE)
        working.pop()
        return embed(texts, before_batch)

    with running(wait, connections=4) as server, concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(ask, server, framed(TEXTS, "Connection: close")) for _ in range(16)]
        wait_until(lambda: len(working) >= 4 and server.wants_connections_to_end())
        release.set()
        assert [answer.result()[2] for answer in answers] == [ANSWER] * 16
    assert max(most) == 4


def test_connections_give_way():
    """An answer ends its connection where another one waits for a thread; an idle connection ends after a while."""
    begun, release = threading.Event(), threading.Event()

    def wait(texts, before_batch):
        begun.set()
        assert release.wait(PATIENCE)
        return embed(texts, before_batch)

    with running(wait, connections=1, idle_seconds=1) as server:
        with connect(server) as first, connect(server) as second, connect(server) as third:
            first.sendall(framed(TEXTS))
            assert begun.wait(PATIENCE)
            wait_until(server.wants_connections_to_end)
            second.sendall(get())
            third.sendall(get())
            release.set()
            assert receive(first)[1]["Connection"] == "close"
            first.close()
            assert receive(second)[0] == 200
            second.close()
            assert receive(third)[1]["Connection"] == "keep-alive"
            assert third.recv(1) == b""


@pytest.mark.parametrize("start", [b"", b"GET /health HTTP/1.1\r\nX: ", post(b"", "Content-Length: 10000")])
def test_slow_clients(start):
    """A byte now and then keeps no thread: the whole request has a deadline."""
    with running(request_seconds=0.5, linger_seconds=PATIENCE) as server, connect(server) as connection:
        connection.sendall(start)
        for _ in range(1000):
            connection.sendall(b"a")
            if select.select([connection], [], [], 0.02)[0]:
                break
        status, headers, value = receive(connection)
        assert status == 408 and "0.5 seconds" in value["error"] and headers["Connection"] == "close"


def test_silent_clients():
    """Those that send nothing, before a request or after the last one, are left without an answer."""
    with running(idle_seconds=1) as server, connect(server) as connection, connect(server) as silent:
        connection.sendall(get())
        assert receive(connection)[0] == 200
        assert connection.recv(1) == silent.recv(1) == b""


def test_clients_that_take_no_answer():
    """They keep a thread for a while only."""

    def embed_much(texts, before_batch):
        return np.full((1, 600_000), 1 / 3), np.array([1])

    with running(embed_much, connections=1, answer_seconds=0.2) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.server_port))
        client.sendall(framed(TEXTS))
        assert ask(server, get())[0] == 200


def test_clients_that_leave(server, capsys):
    """The server takes no notice."""
    for data in (b"", b"GET", get() * 1000, framed(TEXTS)):
        with connect(server) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # leave by a reset
            connection.sendall(data)
    assert ask(server, get())[0] == 200
    assert "Traceback" not in capsys.readouterr().err


def test_turns():
    """Whoever asks anew comes after those that wait, which come in the order in which they asked."""
    turns, order, threads = Turns(), [], []

    def take(name):
        with turns:
            order.append(name)

    with turns:
        for name in "abc":
            threads.append(threading.Thread(target=take, args=name))
            threads[-1].start()
            wait_until(lambda: len(turns._waiting) == len(threads))
    take("anew")
    assert order == ["a", "b", "c", "anew"]


@contextlib.contextmanager
def stopping(function, **limits):
    """A server, and a thread that stops it once it is started; the server has stopped at the end."""
    server = Server(0, function, Limits(**limits))
    thread = threading.Thread(target=serve(server))
    yield server, thread
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_stopping_finishes_requests():
    begun, release = threading.Event(), threading.Event()

    def wait(texts, before_batch):
        begun.set()
        assert release.wait(PATIENCE)
        return embed(texts, before_batch)

    with stopping(wait, stop_seconds=PATIENCE) as (server, stop), connect(server) as connection:
        connection.sendall(framed(TEXTS))
        assert begun.wait(PATIENCE)
        stop.start()
        wait_until(server.wants_connections_to_end)
        release.set()
        status, headers, value = receive(connection)
        assert status == 200 and value == ANSWER and headers["Connection"] == "close"


def test_stopping_answers_the_queue():
    """Clients that were not accepted yet, too."""
    begun, release = threading.Event(), threading.Event()

    def wait(texts, before_batch):
        begun.set()
        assert release.wait(PATIENCE)
        return embed(texts, before_batch)

    with stopping(wait, connections=1, stop_seconds=PATIENCE) as (server, stop), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(6)]
        for client in clients:
            client.sendall(framed(TEXTS))
        assert begun.wait(PATIENCE)
        stop.start()
        release.set()
        assert [receive(client)[2] for client in clients] == [ANSWER] * 6


def test_stopping_refuses_what_takes_long():
    begun = threading.Event()

    def work(texts, before_batch):
        begun.set()
        while True:
            before_batch()
            time.sleep(0.01)

    with stopping(work, stop_seconds=0.2) as (server, stop), connect(server) as connection:
        connection.sendall(framed(TEXTS))
        assert begun.wait(PATIENCE)
        stop.start()
        status, _, value = receive(connection)
        assert status == 503 and "stopped" in value["error"]


def test_stopping_ends_idle_connections():
    seconds = 10 * PATIENCE
    with stopping(embed, idle_seconds=seconds, stop_seconds=seconds) as (server, stop):
        with connect(server) as used, connect(server) as new:
            used.sendall(get())
            assert receive(used)[0] == 200
            wait_until(lambda: len(server._idle) == 2)
            stop.start()
            assert used.recv(1) == new.recv(1) == b""
