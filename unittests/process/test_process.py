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

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run_python(code, *arguments, threads=2, **variables):
    path = os.pathsep.join([HERE, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=path, **variables)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


PEAK = """
import ctypes, sys
import common, runners, paddle
from common import Case, Mask

# What is freed goes back to the system, and no page is larger than what is asked for.
libc = ctypes.CDLL(None)
M_MMAP_THRESHOLD, PR_SET_THP_DISABLE = -3, 41
libc.mallopt(M_MMAP_THRESHOLD, 65536)
libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)

def resident(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

def allocated(which):
    return getattr(paddle.base.core, f"host_memory_stat_{which}_value")("Allocated", 0) // 1024

seq_len, dtype, masked = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"

def run(seq_len):
    case = Case(1, seq_len, 1, 32, dtype, mask=Mask("B11S", "bool") if masked else None)
    case = case.but(attn_dropout_rate=0.1, dropout_rate=0.1, pre_layer_norm=True, causal=not masked)
    inputs = common.make_inputs(case)
    arrays = common.stored_inputs(case, inputs)
    libc.malloc_trim(0)
    before, earlier_peak, allocated_before = resident("VmRSS"), resident("VmHWM"), allocated("current")
    runners.run_dygraph(arrays, case.config, paddle.CPUPlace(), common.differentiable(inputs))
    peak = resident("VmHWM")
    return peak > earlier_peak, peak - before, allocated("peak") - allocated_before

run(64)
run(1024)
rises, *growth = run(seq_len)
assert rises, "the peak was reached before the measurement"
print(*growth)
"""

reads_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from /proc")


def peak_growth(seq_len, dtype, masked=False, threads=2):
    """By how many KiB a forward and backward pass with one head of 32 raises the process's memory, and what Paddle allocates."""
    result = run_python(PEAK, seq_len, dtype, masked, threads=threads)
    assert result.returncode == 0, result.stderr[-3000:]
    return tuple(map(int, result.stdout.split()[-2:]))


@reads_proc
@pytest.mark.slow
@pytest.mark.parametrize("dtype, masked", [("float32", False), ("float32", True), ("bfloat16", False)])
def test_memory_is_linear_in_the_sequence(dtype, masked):
    """With dropout: twice the length takes at most twice the memory, but for what the system's page counts are out by."""
    (resident, allocated), (resident_of_two, allocated_of_two) = (peak_growth(s, dtype, masked) for s in (8192, 16384))
    one_matrix = 16384 * 16384 * (4 if dtype == "float32" else 2) // 1024
    assert max(resident_of_two, allocated_of_two) < one_matrix / 8
    assert resident_of_two < 2 * resident + 1024
    assert allocated_of_two <= 2 * allocated + 4


@reads_proc
@pytest.mark.slow
def test_threads_that_share_a_head_share_its_memory():
    """Sums over the whole sequence for each of 8 threads would be 14 MiB more than for one."""
    (_, alone), (_, shared) = (peak_growth(8192, "float32", threads=threads) for threads in (1, 8))
    assert shared < alone + 2048


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


def test_same_bits_whatever_ran_before():
    """Libraries that Paddle loads in its own products, MKL among them, have no say in ours."""
    outputs = []
    for before in ("", "import paddle; a = paddle.ones([64, 64], 'float64'); paddle.matmul(a, a)\n"):
        result = run_python(before + BITS)
        assert result.returncode == 0, result.stderr[-3000:]
        outputs.append([line for line in result.stdout.splitlines() if line.startswith(common.DTYPES)])
    assert outputs[0] == outputs[1]


UNDER_SIGNALS = """
import signal, threading, time
import numpy as np
import common, runners, paddle
from common import Case
from paddle_fused_attention import FusedMultiHeadAttention

layer = FusedMultiHeadAttention(384, 12)
layer.eval()
x = paddle.randn([32, 20, 384])
with paddle.no_grad():
    expected = layer(x).numpy()

cases = []
for dtype in common.DTYPES:
    for sizes in ((4, 60, 4, 32), (1, 7, 2, 64)):
        case = Case(*sizes, dtype).but(attn_dropout_rate=0.1, dropout_rate=0.1, seed=3)
        inputs = common.make_inputs(case)
        arguments = common.stored_inputs(case, inputs), case.config, paddle.CPUPlace()
        cases.append((arguments, common.differentiable(inputs)))

def results(arguments, wanted):
    out, gradients = runners.run_dygraph(*arguments, wanted)
    return [out, *gradients.values()]

alone = [results(*case) for case in cases]
handled, wrong = [], []

def repeat(end, backward):
    while time.monotonic() < end:
        for (arguments, wanted), arrays in zip(cases, alone):
            found = results(arguments, wanted if backward else [])
            if not all(map(np.array_equal, found, arrays)):
                wrong.append(arguments[1])
        with paddle.no_grad():
            for _ in range(50):
                out = layer(x)
        if not np.array_equal(out.numpy(), expected):
            wrong.append("layer")

signal.signal(signal.SIGALRM, lambda *_: handled.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
end = time.monotonic() + 6
other = threading.Thread(target=repeat, args=(end, False))  # two backward passes at a time are more than Paddle bears
other.start()
repeat(end, True)
other.join()
signal.setitimer(signal.ITIMER_REAL, 0)
assert not wrong, wrong
assert len(handled) > 20, len(handled)
"""


def test_signals():
    """A handler may run at any instruction: of every dtype, forward and backward, in two Python threads."""
    result = run_python(UNDER_SIGNALS)
    assert result.returncode == 0, f"{result.returncode}: {result.stderr[-3000:]}"


FAILING_ALLOCATIONS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

// The allocation that fails is the one that brings `left` to 0, of those of at least `least` bytes; 0 and less: none.
static long left = 0;
static size_t least = 0;

void fail_allocation(long number, size_t bytes) {
  least = bytes;
  __atomic_store_n(&left, number, __ATOMIC_SEQ_CST);
}

long allocations_left(void) { return __atomic_load_n(&left, __ATOMIC_SEQ_CST); }

static int fails(size_t size) { return left > 0 && size >= least && __atomic_sub_fetch(&left, 1, __ATOMIC_SEQ_CST) == 0; }

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);

void* malloc(size_t size) { return fails(size) ? (errno = ENOMEM, NULL) : __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return fails(count * size) ? (errno = ENOMEM, NULL) : __libc_calloc(count, size); }
void* realloc(void* old, size_t size) { return fails(size) ? (errno = ENOMEM, NULL) : __libc_realloc(old, size); }
void* aligned_alloc(size_t alignment, size_t size) { return fails(size) ? NULL : __libc_memalign(alignment, size); }
void* memalign(size_t alignment, size_t size) { return fails(size) ? NULL : __libc_memalign(alignment, size); }
int posix_memalign(void** result, size_t alignment, size_t size) {
  void* memory = fails(size) ? NULL : __libc_memalign(alignment, size);
  if (!memory) return ENOMEM;
  *result = memory;
  return 0;
}
"""

SHORT_OF_MEMORY = """
import ctypes, sys
import numpy as np
import common, runners, paddle
from common import Case

hooks = ctypes.CDLL(sys.argv[1])
hooks.fail_allocation.argtypes = [ctypes.c_long, ctypes.c_size_t]
hooks.allocations_left.restype = ctypes.c_long
paddle.set_flags({"FLAGS_use_system_allocator": True})
dtype = sys.argv[2]
case = Case(2, 90, 3, 24, dtype).but(pre_layer_norm=True, attn_dropout_rate=0.1, dropout_rate=0.1, seed=3)
inputs = common.make_inputs(case)
arguments = common.stored_inputs(case, inputs), case.config, paddle.CPUPlace(), common.differentiable(inputs)

def results():
    out, gradients = runners.run_dygraph(*arguments)
    return [out, *gradients.values()]

expected = results()
errors = 0
for number in range(1, 10000):
    hooks.fail_allocation(number, 2048)
    try:
        arrays = results()
    except Exception:
        errors += 1
        arrays = None
    left = hooks.allocations_left()
    hooks.fail_allocation(0, 0)
    if arrays is not None and not all(map(np.array_equal, arrays, expected)):
        sys.exit(f"wrong numbers when allocation {number} failed")
    if left > 0:
        break
print("errors", errors)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="cc, which compiles the allocator that fails, is not installed")
@pytest.mark.parametrize("dtype", common.DTYPES)
def test_each_allocation_may_fail(dtype, tmp_path):
    """The numbers are right or there is an error, whichever allocation of a forward and backward pass fails."""
    source, library = tmp_path / "failing.c", tmp_path / "libfailing.so"
    source.write_text(FAILING_ALLOCATIONS)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-fno-builtin", str(source), "-o", str(library)], check=True)
    result = run_python(SHORT_OF_MEMORY, library, dtype, LD_PRELOAD=str(library))
    assert result.returncode == 0, f"{result.returncode}: {result.stdout[-500:]}{result.stderr[-3000:]}"
    assert int(result.stdout.split()[-1]) > 5


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
