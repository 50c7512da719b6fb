"""What the installed package says of itself."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import paddle_fused_attention as pfa
import pytest

ROOT = Path(__file__).parents[2]


def test_version_is_that_of_the_distribution():
    try:
        version = importlib.metadata.version("paddle-fused-attention")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is on the path, but not installed")
    assert pfa.__version__ == version


def test_version_is_read_without_paddle():
    """As pip does where it makes a source distribution, in an environment that has none."""
    pytest.importorskip("setuptools")
    program = """
import runpy, sys
sys.modules["paddle"] = None
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py")
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == pfa.__version__


def test_version_stands_in_one_place():
    assert not re.search(r"^version\s*=\s*[\"']", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
