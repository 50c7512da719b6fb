"""What is installed, what runs here and why: the report of ``python -m paddle_fused_attention info``.

It is for bug reports: the home folder is written as ~, and neither the machine nor its user is named.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
import paddle

from . import __version__
from ._explain import ELEMENTS, explain
from ._op import library

# What setup.py reads, and what decides when the operator runs.
_VARIABLES = (
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
    "MAX_JOBS",
    "CUDA_HOME",
    "CUDA_PATH",
    "PADDLE_CUDA_ARCH_LIST",
    "CUDA_VISIBLE_DEVICES",
    "FLAGS_cudnn_deterministic",
)
_PREFIXES = ("OMP_", "GOMP_", "KMP_")

# Of the processor's features as Linux names them, those that the CPU's implementations ask for, fewest first.
_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16")


def environment_report(head_dim: int = 64, dtype: str | None = None, device: str | None = None) -> Iterator[str]:
    """The lines of the report.

    Args:
        head_dim, dtype, device: The attention whose implementations are told, as for :func:`explain`. None: each dtype;
            the CPU and each kind of GPU.
    """
    cards = _cards()
    for label, text in _facts(cards):
        yield _without_home(f"{label:15}{text}")
    devices = ["cpu", *(alike[0] for alike in cards.values())] if device is None else [device]
    for each in devices:
        yield from _explanations(head_dim, list(ELEMENTS) if dtype is None else [dtype], each)


def _facts(cards: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    build = importlib.import_module(f"{__package__}._build_info")
    yield "package", f"paddle-fused-attention {__version__}, in {Path(__file__).parent}"
    # Where these two differ the package can't be imported, which says so.
    yield "built for", f"Paddle {build.PADDLE_VERSION} {'with CUDA' if build.WITH_CUDA else 'for the CPU'}"
    cuda = f"with CUDA {paddle.version.cuda()}" if paddle.is_compiled_with_cuda() else "for the CPU"
    yield "Paddle", f"{paddle.__version__} {cuda}"
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()}), NumPy {np.__version__}"
    yield "platform", platform.platform()  # with glibc's version
    name, features = _processor()
    yield "processor", name
    yield "features", " ".join(feature for feature in _FEATURES if feature in features) or "none that is made use of"
    yield "cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    given = _environment()
    threads = str(library.omp_get_max_threads())
    if "OMP_NUM_THREADS" not in given:
        threads += f" (OMP_NUM_THREADS is not set, and Paddle sets it to {os.environ.get('OMP_NUM_THREADS')})"
    yield "threads", threads
    if build.WITH_CUDA:
        architectures = getattr(build, "CUDA_ARCHITECTURES", ())  # which older builds did not write
        yield "CUDA kernels", f"for {', '.join(architectures) or 'unknown architectures'}"
        for kind, alike in cards.items():
            yield "GPU", f"{', '.join(alike)}: {kind}"
        if not cards:
            yield "GPU", "none that Paddle sees"
    else:
        yield "CUDA kernels", "none, as Paddle is built without CUDA"
    for variable, value in given.items():
        yield "environment", f"{variable}={value}"


def _explanations(head_dim: int, dtypes: Sequence[str], device: str) -> Iterator[str]:
    """What explain() says, once for all dtypes of which it says the same."""
    answers: dict[str, list[str]] = {}
    for dtype in dtypes:
        try:
            answer = str(explain(head_dim, dtype, device)).partition("\n")[2]
        except ValueError as error:  # a GPU has none for some sizes, or can't be asked
            answer = f"  {error}"
        answers.setdefault(answer, []).append(dtype)
    for answer, alike in answers.items():
        yield f"attention on {device}, {', '.join(alike)}, head_dim {head_dim}"
        yield from answer.splitlines()


def _cards() -> dict[str, list[str]]:
    """The GPUs that Paddle sees, by what they are."""
    found: dict[str, list[str]] = {}
    cuda = paddle.device.cuda
    for card in range(cuda.device_count() if paddle.is_compiled_with_cuda() else 0):
        major, minor = cuda.get_device_capability(card)
        kind = f"{cuda.get_device_name(card)}, compute capability {major}.{minor}"
        found.setdefault(kind, []).append(f"gpu:{card}")
    return found


def _processor() -> tuple[str, set[str]]:
    """Its name and features, as Linux tells them; on ARM it tells no name."""
    found: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found.get("model name", platform.machine()), set(found.get("flags", "").split())


def _environment() -> dict[str, str]:
    """The variables that matter here, as the process was given them: Paddle sets some when it is imported."""
    pairs = (entry.partition("=") for entry in _read("/proc/self/environ").split("\0"))
    return {name: value for name, _, value in sorted(pairs) if name in _VARIABLES or name.startswith(_PREFIXES)}


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="backslashreplace")
    except OSError:
        return ""


def _without_home(text: str) -> str:
    home = os.path.expanduser("~").rstrip("/")
    for folder in {home, os.path.realpath(home)} if home else ():
        text = re.sub(re.escape(folder) + r"(?=[/:;,\s]|$)", "~", text)
    return text
