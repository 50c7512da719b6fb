"""What every example does before its slow imports, and when one of them fails."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings

# Paddle 2.6 holds another zlib: Python's own, when loaded after it, calls into that one and crashes.
import zlib  # noqa: F401

REQUIREMENTS = {"matplotlib", "numpy", "safetensors", "sklearn", "tokenizers", "tqdm"}


def import_paddle() -> None:
    """Import Paddle with all cores, errors only in its log, and without its remarks on OMP_NUM_THREADS and on a
    compiler cache.

    The variables are read by Paddle and cuBLAS when they are loaded; float32 products are not rounded to TF32.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(_usable_cores()))
    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    warnings.filterwarnings("ignore", message="No ccache found")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            import paddle  # noqa: F401
    finally:
        kept = [line for line in said.getvalue().splitlines(keepends=True) if "OMP_NUM_THREADS" not in line]
        sys.stderr.write("".join(kept))


def explain_missing(error: ModuleNotFoundError) -> int:
    """Say how to install a package that is not there and return 1; raise anything else, a fault of the example."""
    package = (error.name or "").split(".")[0]
    if package in REQUIREMENTS:
        command = "pip install -r examples/requirements.txt"
    elif package == "paddlenlp":
        command = "pip install -r unittests/libraries/requirements.txt"
    elif package == "paddle":
        command = "pip install paddlepaddle"
    elif package == "paddle_fused_attention":
        command = "pip install --no-build-isolation ."
    else:
        raise error
    print(f"The package {package} is not installed: {command}", file=sys.stderr)
    return 1


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
