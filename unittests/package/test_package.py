"""What the installed package says of itself."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import paddle
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


def test_bill_of_materials():
    """It names the Paddle that the library was built for, and NumPy, and nothing else on the CPU."""
    bill = json.loads((Path(pfa.__file__).with_name("bill_of_materials.cdx.json")).read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    own = bill["metadata"]["component"]
    assert (own["name"], own["version"]) == ("paddle-fused-attention", pfa.__version__)
    with_cuda = paddle.is_compiled_with_cuda()
    distribution = "paddlepaddle-gpu" if with_cuda else "paddlepaddle"
    purls = [other.get("purl") for other in bill["components"]]
    assert purls[:2] == [f"pkg:pypi/{distribution}@{paddle.__version__}", "pkg:pypi/numpy"]
    assert len(purls) == (3 if with_cuda else 2)
    refs = [other["bom-ref"] for other in bill["components"]]
    assert bill["dependencies"] == [{"ref": own["bom-ref"], "dependsOn": refs}]
