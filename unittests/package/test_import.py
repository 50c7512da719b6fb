"""Importing the package: another Paddle, names, and the libraries that it is linked with."""

import ctypes
import glob
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import paddle
import paddle_fused_attention
import pytest
from processes import run_python

OTHER_PADDLE = """
import sys, types
entry = types.ModuleType("paddle_fused_attention._build_info")
entry.PADDLE_VERSION, entry.WITH_CUDA = sys.argv[1], sys.argv[2] == "True"
sys.modules["paddle_fused_attention._build_info"] = entry
import paddle_fused_attention
"""


def test_a_package_built_for_another_paddle_says_so():
    """At import, with both versions and the command that mends it."""
    info = sys.modules["paddle_fused_attention._build_info"]
    with_cuda = paddle.is_compiled_with_cuda()
    assert (info.PADDLE_VERSION, info.WITH_CUDA) == (paddle.__version__, with_cuda)
    for version, cuda in (("1.2.3", with_cuda), (paddle.__version__, not with_cuda)):
        result = run_python(OTHER_PADDLE, version, cuda)
        assert result.returncode != 0
        message = result.stderr[result.stderr.index("ImportError:") :]
        assert version in message and paddle.__version__ in message
        assert "pip install" in message or "build_ext --inplace" in message
        assert "CPU" in message and "CUDA" in message or cuda == with_cuda
    result = run_python(OTHER_PADDLE, paddle.__version__, with_cuda)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("url", ["file://{}", "file:///nowhere", "https://example.com/a.git", None])
def test_advice_after_a_change_of_paddle_is_a_command_that_works(url, monkeypatch, tmp_path):
    """It names the folder that was installed from, if that is known and still there, and nothing that no index has."""
    op = importlib.import_module("paddle_fused_attention._op")
    sources = tmp_path / "some sources"
    sources.mkdir()
    (sources / "setup.py").touch()

    class Distribution:
        def read_text(self, name):
            return url and json.dumps({"url": url.format(str(sources).replace(" ", "%20"))})

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    monkeypatch.setattr(op, "__file__", str(tmp_path / "site-packages" / "paddle_fused_attention" / "_op.py"))
    *_, command = op._rebuild().splitlines()
    where = f"'{sources}'" if url == "file://{}" else ".    (in the folder of its sources)"
    install = "pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir"
    assert command.strip() == f"{install} {where}"
    monkeypatch.setattr(op, "__file__", str(sources / "python" / "paddle_fused_attention" / "_op.py"))
    assert op._rebuild().splitlines()[-1].strip() == f"cd '{sources}' && python setup.py build_ext --inplace"


def test_importing_twice_and_exports():
    """The operator is registered once, and the package's top has the whole public API."""
    assert importlib.import_module("paddle_fused_attention") is paddle_fused_attention
    for name in (
        "fused_multi_head_attention",
        "FusedMultiHeadAttention",
        "pack_qkv_weight",
        "pack_qkv_bias",
        "unpack_qkv_weight",
        "unpack_qkv_bias",
    ):
        assert hasattr(paddle_fused_attention, name) and name in paddle_fused_attention.__all__, name
    result = run_python("import numpy, paddle, paddle_fused_attention; print(paddle_fused_attention.__version__)")
    assert result.returncode == 0 and np.all([part.isdigit() for part in result.stdout.split()[-1].split(".")[:2]])


def test_openmp_functions_are_in_paddles_runtime():
    """A function that Paddle's OpenMP runtime lacks would be taken from any other that is loaded, whose threads know
    nothing of it.
    """
    runtime = os.path.join(paddle.sysconfig.get_lib(), "libiomp5.so")
    if not os.path.exists(runtime):
        pytest.skip("this Paddle brings no OpenMP runtime of its own")
    if shutil.which("nm") is None:
        pytest.skip("nm, of binutils, is not installed")
    (library,) = glob.glob(os.path.join(os.path.dirname(paddle_fused_attention.__file__), "_C*.so"))
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    names = [word.split("@")[0] for word in listing.split() if word.startswith(("GOMP_", "omp_", "__kmpc_"))]
    assert names, "the operator is expected to be parallel"
    functions = ctypes.CDLL(runtime)
    assert [name for name in names if not hasattr(functions, name)] == []
