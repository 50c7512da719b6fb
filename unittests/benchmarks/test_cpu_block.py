"""benchmarks/cpu_block.py on a tiny block, and the outputs that it compares with."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def cpu_block(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("cpu_block")


def installed(*modules):
    return all(importlib.util.find_spec(module) for module in modules)


@pytest.mark.slow
def test_tiny_run(tmp_path):
    report_file = tmp_path / "cpu_block.json"
    command = [sys.executable, str(BENCHMARKS / "cpu_block.py"), "--cases", "tiny", "--dtypes", "float32"]
    command += ["--threads", "1", "--turns", "1"]
    command += ["--json", str(report_file), "--chart", str(tmp_path / "cpu_block.png")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(report_file.read_text())
    training = ["ours", "paddle"] + ["torch"] * installed("torch")
    forward = ["ours", "ours_saved", *training[1:]] + [
        name for name in ("onnxruntime", "openvino") if installed("onnx", name)
    ]
    seconds = report["seconds"]["1"]["tiny float32"]
    assert list(seconds["forward"]) == forward
    assert list(seconds["forward+backward"]) == list(report["peak growth"]["tiny"]) == training
    assert all(value > 0 for row in seconds.values() for value in row.values())


@pytest.mark.slow
def test_stages(tmp_path):
    """What `make bench-block` runs, by the program that lies beside pfa_core."""
    program = (
        Path(pytest.importorskip("pfa_core", reason="the core is not built (make core)").__file__).parent / "cpu_stages"
    )
    report_file = tmp_path / "cpu_block.json"
    command = [sys.executable, str(BENCHMARKS / "cpu_block.py"), "--cases", "tiny", "--threads", "1", "--turns", "1"]
    command += ["--peers", "--passes", "forward", "--stages", str(program), "--json", str(report_file)]
    run = subprocess.run([*command, "--chart", str(tmp_path / "chart.png")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    stages = json.loads(report_file.read_text())["stages"]["1"]
    assert set(stages) == {"tiny float32", "tiny bfloat16"}
    for row in stages.values():
        assert {"qkv_linear_forward", "attention_backward", "residual_forward"} < set(row)
        assert all(seconds > 0 and floor > 0 for seconds, floor in row.values())


@pytest.mark.parametrize("fused", [True, False])
def test_output(cpu_block, fused):
    block = cpu_block.PaddleBlock("tiny", "float32", fused)
    block.set_training(False)
    expected = cpu_block.expected_output("tiny")
    np.testing.assert_allclose(block.output(), expected, rtol=1e-4, atol=1e-5)
