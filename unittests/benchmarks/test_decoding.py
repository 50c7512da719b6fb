"""benchmarks/decoding.py on a tiny decoder."""

import subprocess
import sys
from pathlib import Path

import pytest

DECODING = Path(__file__).resolve().parents[2] / "benchmarks" / "decoding.py"


@pytest.mark.slow
def test_tiny_run():
    sizes = ("--threads", "1", "--width", "64", "--cached", "3", "--memory", "2", "--turns", "1")
    end = subprocess.run([sys.executable, str(DECODING), *sizes], capture_output=True, text=True, timeout=300)
    assert end.returncode == 0, end.stderr
    rows = [line.split() for line in end.stdout.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["paddle", "converted", "arranged"]
    assert all(float(median) > 0 and float(ratio) > 0 for _, median, ratio in rows)
