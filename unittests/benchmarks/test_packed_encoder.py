"""benchmarks/packed_encoder.py on three short texts."""

import importlib.util
import os
import sys
from pathlib import Path

import paddle
import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "packed_encoder.py"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "2"))  # which the benchmark sets
    device = paddle.get_device()
    monkeypatch.syspath_prepend(str(PATH.parent))
    spec = importlib.util.spec_from_file_location("packed_encoder", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    paddle.set_device(device)


@pytest.mark.parametrize("longest", [1, 16, 128])
def test_lengths(benchmark, longest):
    lengths = benchmark.draw_lengths(32, longest)
    assert lengths.min() >= 1 and lengths.max() == longest
    if longest > 1:
        assert lengths.mean() == pytest.approx(longest / 3, rel=0.1)


def test_short_run(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["packed_encoder", "--batch", "3", "--longest", "6", "--turns", "1"])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 texts of 1 to 6 tokens")
    assert [line[:18].strip() for line in lines[-3:]] == ["padded", "packed", "unpad, packed, pad"]


def test_results_that_differ_end_it(benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["packed_encoder", "--batch", "3", "--longest", "6", "--turns", "1"])
    monkeypatch.setitem(benchmark.peers.TOLERANCES, "float32", -1.0)
    with pytest.raises(SystemExit, match="packed differs from padded by"):
        benchmark.main()
