"""The command line. It checks the arguments before the slow imports and turns failures into one line and an exit status."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import warnings
from typing import Sequence

DEFAULT_QUERIES = (
    "how do I clip gradients by their norm",
    "attention over queries, keys and values",
    "randomly switch off neurons while training",
    "multiply two matrices",
    "how do I save a model",
    "convert a numpy array to a tensor",
)
REQUIREMENTS = {"numpy", "safetensors", "tokenizers", "tqdm"}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return `queries`, a list, and `top`; bad ones end the program with status 2 and a line that says why."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.semantic_search",
        description="Search Paddle's API documentation by meaning, with all-MiniLM-L6-v2 on the fused attention operator.",
    )
    parser.add_argument("queries", nargs="*", metavar="query", help="what to look for (default: some examples)")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="answers to print for each query (default: 5)")
    arguments = parser.parse_args(argv)
    if arguments.top < 1:
        parser.error(f"--top: expected at least 1, got {arguments.top}")
    for query in arguments.queries:
        if not query.strip():
            parser.error(f"query: expected some words, got {query!r}")
    arguments.queries = arguments.queries or list(DEFAULT_QUERIES)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status: 0 done, 1 failed, 2 bad arguments."""
    arguments = parse_arguments(argv)
    # Read by Paddle and cuBLAS when they are loaded: all cores, errors only, and float32 products that are not
    # rounded to TF32.
    os.environ.setdefault("OMP_NUM_THREADS", str(_usable_cores()))
    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    try:
        _import_paddle()
        from . import demo
        from .model_files import ModelFilesError
    except ModuleNotFoundError as error:
        return _missing(error)
    try:
        demo.run(arguments.queries, arguments.top)
    except demo.RequestError as error:
        print(error, file=sys.stderr)
        return 2
    except (ModelFilesError, demo.DifferenceError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _import_paddle() -> None:
    """Import Paddle without its remarks on OMP_NUM_THREADS and on a compiler cache, which are no news here."""
    warnings.filterwarnings("ignore", message="No ccache found")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            import paddle  # noqa: F401
    finally:
        kept = [line for line in said.getvalue().splitlines(keepends=True) if "OMP_NUM_THREADS" not in line]
        sys.stderr.write("".join(kept))


def _missing(error: ModuleNotFoundError) -> int:
    """Say how to install a package that is not there; anything else is a fault of this program."""
    package = (error.name or "").split(".")[0]
    if package in REQUIREMENTS:
        command = "pip install -r examples/requirements.txt"
    elif package == "paddle":
        command = "pip install paddlepaddle"
    elif package == "paddle_fused_attention":
        command = "pip install --no-build-isolation ."
    else:
        raise error
    print(f"The package {package} is not installed: {command}", file=sys.stderr)
    return 1
