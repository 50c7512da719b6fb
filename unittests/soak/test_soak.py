"""The short form of the soak (`make soak`), and that it sees what it is for."""

import contextlib
import itertools
import os
import threading

import numpy as np
import paddle
import pytest
import soak_calls
import soak_clients
from soak_calls import MEBIBYTE

from examples.serving.server import Server

reads_proc = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")


@reads_proc
@pytest.mark.slow
def test_small_calls():
    calls = soak_calls.make_calls(soak_calls.SMALL)
    report = soak_calls.repeat(calls, 20 * len(calls), samples=8)
    assert report.calls == 20 * len(calls)
    assert not report.differing
    assert report.grown <= 4 * MEBIBYTE


@reads_proc
@pytest.mark.slow
def test_mixed_sizes():
    calls = soak_calls.make_calls(soak_calls.mixed_sizes(3, seed=1))
    report = soak_calls.repeat(calls, 2 * len(calls), samples=4)
    assert not report.differing


@reads_proc
def test_a_result_that_drifts_is_seen():
    numbers = itertools.chain([1.0] * 4, itertools.repeat(2.0))
    calls = {"drifts": lambda: [paddle.to_tensor(next(numbers))], "stays": lambda: [paddle.ones([2])]}
    assert soak_calls.repeat(calls, 10, samples=4).differing == ["drifts"] * 2


@reads_proc
def test_memory_that_is_kept_is_seen():
    kept = []

    def call():
        kept.append(np.ones(MEBIBYTE, np.uint8))
        return [paddle.ones([1])]

    assert soak_calls.repeat({"keeps": call}, 80, samples=8).grown >= 10 * MEBIBYTE


def test_memory_that_caches_take_at_first_is_no_growth():
    samples = [100, *range(180, 200), *[200] * 19]
    assert soak_calls.grown_bytes(samples) == 0
    assert soak_calls.grown_bytes([*samples[:-2], 230, 229]) == 30


def embed(texts, before_batch):
    before_batch()
    return np.array([[len(text), text.count("a")] for text in texts], np.float32), np.array([1] * len(texts))


@contextlib.contextmanager
def running(function):
    """The port of a server."""
    with Server(0, function) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_clients():
    with running(embed) as port:
        report = soak_clients.drive(port, clients=8, seconds=1.0, bad_part=0.3)
    assert not report.faults
    assert report.good and report.bad and len(report.latencies) == report.good
    assert list(report.percentiles()) == ["50%", "90%", "99%", "99.9%", "most"]


def test_a_wrong_answer_is_seen():
    def mixed_up(texts, before_batch):
        embeddings, tokens = embed(texts, before_batch)
        return embeddings[::-1], tokens

    with running(mixed_up) as port:
        report = soak_clients.drive(port, clients=2, seconds=1.0)
    assert report.faults and all("off by" in fault for fault in report.faults)
