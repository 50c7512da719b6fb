"""Clients of the serving example: many at a time, some of whose requests are bad, and what they got."""

import http.client
import json
import random
import threading
import time
from typing import NamedTuple

import numpy as np

TEXTS = [
    "how do I save a model",
    "store the parameters of a network in a file",
    "a cat",
    "multiply two matrices " * 12,
    "an error of the optimizer after it was loaded",
    "word " * 200,
]
TOLERANCE = 1e-5  # of embeddings, whose batches others share
PATIENCE = 120  # seconds for an answer

# Method, path, body and the status that they deserve.
BAD_REQUESTS = [
    ("POST", "/embed", b"no JSON", 400),
    ("POST", "/embed", b'{"texts": []}', 400),
    ("POST", "/embed", b'{"texts": ["\xff"]}', 400),
    ("POST", "/embed", b'{"texts": ["a cat", 3]}', 400),
    ("POST", "/embed", b"[" * 100_000, 400),
    ("POST", "/other", b"{}", 404),
    ("PUT", "/embed", b"{}", 405),
    ("GET", "/embed", None, 405),
]


class Report(NamedTuple):
    good: int
    bad: int
    faults: list  # lines
    seconds: float
    latencies: np.ndarray  # of good requests, in seconds

    def percentiles(self):
        """By name, in milliseconds; none where no good request was answered."""
        if not self.latencies.size:
            return {}
        values = {f"{q:g}%": np.percentile(self.latencies, q) for q in (50, 90, 99, 99.9)}
        return {name: 1e3 * value for name, value in {**values, "most": self.latencies.max()}.items()}


class Client:
    """One connection that stays, as long as the server keeps it."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

    def ask(self, method, path, body):
        self.connection.request(method, path, body)
        response = self.connection.getresponse()
        return response.status, json.loads(response.read())

    def embed(self, texts):
        status, answer = self.ask("POST", "/embed", json.dumps({"texts": texts}).encode())
        if status != 200:
            raise ValueError(f"status {status}: {answer}")
        return np.array(answer["embeddings"])

    def close(self):
        self.connection.close()


def drive(port, clients, seconds, bad_part=0.05, seed=0):
    """Has so many clients ask for so many seconds, and compares the answers with those to each text alone."""
    first = Client(port)
    expected = {text: first.embed([text])[0] for text in TEXTS}
    first.close()
    lock = threading.Lock()
    latencies, faults, counts = [], [], [0, 0]
    end = time.monotonic() + seconds

    def run(number):
        rng = random.Random(f"{seed} {number}")
        client = Client(port)
        while time.monotonic() < end:
            begin, is_bad = time.monotonic(), rng.random() < bad_part
            fault = None
            try:
                if is_bad:
                    *request, deserved = rng.choice(BAD_REQUESTS)
                    status, answer = client.ask(*request)
                    if status != deserved or not answer.get("error"):
                        fault = f"{request[:2]}: status {status} where {deserved} is expected: {answer}"
                else:
                    texts = rng.choices(TEXTS, k=rng.randint(1, 4))
                    error = np.abs(client.embed(texts) - [expected[text] for text in texts]).max()
                    if not error <= TOLERANCE:
                        fault = f"{len(texts)} texts: off by {error:.2g}"
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
                client.close()
            with lock:
                counts[is_bad] += 1
                if fault:
                    faults.append(fault)
                elif not is_bad:
                    latencies.append(time.monotonic() - begin)
        client.close()

    threads = [threading.Thread(target=run, args=[number]) for number in range(clients)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Report(*counts, faults, time.monotonic() - start, np.array(latencies))
