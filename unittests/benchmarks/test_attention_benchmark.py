"""benchmarks/cpu_attention.py on tiny cases of every kind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "cpu_attention.py"


@pytest.mark.slow
def test_tiny_run(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    report_file = tmp_path / "attention.json"
    cases = ("tiny", "tiny_mask", "tiny_packed", "tiny_window", "tiny_decode")
    command = [sys.executable, str(BENCHMARK), "--cases", *cases, "--threads", "1", "--turns", "1"]
    run = subprocess.run([*command, "--json", str(report_file)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(report_file.read_text())["1"]
    assert report["bandwidth"] > 1e8
    assert set(report["seconds"]) == {f"{case} {dtype}" for case in cases for dtype in ("float32", "bfloat16")}
    for name, row in report["seconds"].items():
        parts = ["torch_parts"] * ("packed" in name or "window" in name)
        passes = ["forward", "of_bandwidth"] if "decode" in name else ["forward", "forward+backward"]
        assert list(row) == passes
        for by_library in row.values():
            assert list(by_library) == ["ours", "torch", *parts] and all(value > 0 for value in by_library.values())
