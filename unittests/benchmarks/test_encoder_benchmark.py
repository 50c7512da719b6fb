"""benchmarks/encoder.py on a tiny encoder."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def encoder(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("encoder")


def installed(*modules):
    return all(importlib.util.find_spec(module) for module in modules)


@pytest.mark.slow
def test_tiny_run(tmp_path):
    report_file, chart = tmp_path / "encoder.json", tmp_path / "encoder.svg"
    peers = ("ours_saved", "paddle", "torch", "torch_nn", "onnxruntime", "openvino")  # the compiled one takes long
    command = [sys.executable, str(BENCHMARKS / "encoder.py"), "--cases", "tiny", "--dtypes", "float32"]
    command += ["--threads", "1", "--turns", "1", "--peers", *peers, "--json", str(report_file), "--chart", str(chart)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(report_file.read_text())
    training = ["ours", "paddle"] + ["torch", "torch_nn"] * installed("torch")
    forward = ["ours", "ours_saved", *training[1:]]
    forward += [name for name in ("onnxruntime", "openvino") if installed("onnx", name)]
    row = "tiny float32"
    expected = {"forward": ("output", forward), "forward+backward": ("gradient", training)}
    assert report["libraries"] == forward
    for which, (tensor, libraries) in expected.items():
        seconds, errors = report["seconds"]["1"][row][which], report["errors"]["1"][row][tensor]
        assert list(seconds) == list(errors) == libraries
        assert all(value > 0 for value in seconds.values())
        assert all(value < 1e-5 for value in errors.values())
    rows = [line.split() for line in run.stdout.splitlines() if line.startswith("tiny")]
    assert [row[:3] for row in rows[:2]] == [["tiny", "float32", which] for which in expected]
    for name in set(peers) - set(forward):
        assert f"{name} is left out" in run.stdout
    assert chart.exists() == installed("matplotlib")


@pytest.mark.skipif(not installed("onnx", "onnxruntime", "sympy"), reason="onnx, onnxruntime or sympy is not installed")
def test_graph_that_is_not_fused_is_refused(encoder):
    from onnx import TensorProto

    from examples.semantic_search import onnx_encoder

    case = encoder.CASES["tiny"]
    graph = onnx_encoder.Graph()
    output = onnx_encoder.add_encoder(graph, "x", encoder.draw_weights(case), case.num_heads, 1e-5)
    shape = [case.batch, case.seq_len, case.embed_dim]
    model = graph.model([("x", TensorProto.FLOAT, shape)], output, shape)
    onnx_encoder.fuse(model, case.num_heads, case.embed_dim, 2)
    with pytest.raises(RuntimeError, match="expected {'Attention': 3.*got {'Attention': 2"):
        onnx_encoder.fuse(model, case.num_heads, case.embed_dim, 3)
