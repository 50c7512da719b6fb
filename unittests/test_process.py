"""What needs a process of its own: memory, numbers of threads, and a package built for another Paddle."""

import ctypes
import glob
import os
import shutil
import subprocess
import sys

import common
import numpy as np
import paddle
import paddle_fused_attention
import pytest

HERE = os.path.dirname(os.path.abspath(__file__))


def run_python(code, *arguments, threads=2):
    path = os.pathsep.join([HERE, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=path)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


PEAK = """
import sys
import numpy as np
import common, runners, paddle
from common import Case, Mask

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

seq_len, dtype, masked = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"

def run(seq_len, measure):
    case = Case(1, seq_len, 1, 32, dtype, mask=Mask("B11S", "bool") if masked else None)
    case = case.but(attn_dropout_rate=0.1, dropout_rate=0.1, pre_layer_norm=True, causal=not masked)
    inputs = common.make_inputs(case)
    arrays = common.stored_inputs(case, inputs)
    before = status("VmRSS")
    assert not measure or status("VmHWM") - before < 8192, "the peak was reached before the measurement"
    runners.run_dygraph(arrays, case.config, paddle.CPUPlace(), common.differentiable(inputs))
    return status("VmHWM") - before

run(64, False)
run(1024, False)
print(run(seq_len, True))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from /proc")
@pytest.mark.parametrize("dtype, masked", [("float32", False), ("float32", True), ("bfloat16", False)])
def test_memory_is_linear_in_the_sequence(dtype, masked):
    """Forward and backward with dropout, one head of 32: peak growth in KiB at S=4096 and 8192."""
    growth = {}
    for seq_len in (4096, 8192):
        result = run_python(PEAK, seq_len, dtype, masked)
        assert result.returncode == 0, result.stderr[-3000:]
        growth[seq_len] = int(result.stdout.split()[-1])
    one_matrix = 8192 * 8192 * (4 if dtype == "float32" else 2) / 1024
    assert growth[8192] < one_matrix / 4, growth
    assert growth[8192] < 2.5 * growth[4096] + 2048, growth


BITS = """
import hashlib
import common, runners, paddle
from common import Case, Mask

# Of the second one's matrix products, some are a single block with long sums.
cases = [(sizes, dtype) for sizes in ((3, 150, 3, 24), (1, 4096, 1, 64)) for dtype in common.DTYPES]
for sizes, dtype in cases:
    case = Case(*sizes, dtype, mask=Mask("B1SS" if sizes[0] > 1 else "S", "float32"))
    case = case.but(attn_dropout_rate=0.1, dropout_rate=0.1, pre_layer_norm=True)
    inputs = common.make_inputs(case)
    out, gradients = runners.run_dygraph(
        common.stored_inputs(case, inputs), case.config, paddle.CPUPlace(), common.differentiable(inputs)
    )
    for name, a in [("out", out)] + sorted(gradients.items()):
        print(dtype, sizes, name, hashlib.sha256(a.tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_same_bits_for_any_number_of_threads():
    outputs = []
    for threads in (1, 2, 2, 3):
        result = run_python(BITS, threads=threads)
        assert result.returncode == 0, result.stderr[-3000:]
        outputs.append([line for line in result.stdout.splitlines() if line.startswith(common.DTYPES)])
    assert len(outputs[0]) == 2 * 4 * 10
    for other in outputs[1:]:
        assert [line for line in other if line not in outputs[0]] == []


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
        assert version in message and paddle.__version__ in message and "pip install" in message
        assert "CPU" in message and "CUDA" in message or cuda == with_cuda
    result = run_python(OTHER_PADDLE, paddle.__version__, with_cuda)
    assert result.returncode == 0, result.stderr


def test_importing_twice_and_exports():
    """The operator is registered once, and the package's top has the whole public API."""
    import importlib

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
    """A function that Paddle's OpenMP runtime lacks would be taken from any other that is loaded, whose threads know nothing of it."""
    runtime = os.path.join(paddle.sysconfig.get_lib(), "libiomp5.so")
    if not os.path.exists(runtime):
        pytest.skip("this Paddle brings no OpenMP runtime of its own")
    if shutil.which("nm") is None:
        pytest.skip("nm, of binutils, is not installed")
    (library,) = glob.glob(os.path.join(os.path.dirname(paddle_fused_attention.__file__), "_C*.so"))
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    names = [word.split("@")[0] for word in listing.split() if word.startswith(("GOMP_", "omp_", "__kmpc_"))]
    assert names, "the operator is expected to be parallel"
    functions = ctypes.CDLL(runtime)
    assert [name for name in names if not hasattr(functions, name)] == []
