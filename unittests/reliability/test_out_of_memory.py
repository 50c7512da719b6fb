"""Memory that runs out: every allocation of a call fails once, and each time there is an error or the right result."""

import os
import shlex
import subprocess
from pathlib import Path

import allocation_judge
import pytest
from cases import DTYPES
from processes import run_script


@pytest.fixture(scope="module")
def hooks(tmp_path_factory):
    """failing_allocations.cc as a library."""
    library = tmp_path_factory.mktemp("hooks") / "failing_allocations.so"
    source = Path(__file__).with_name("failing_allocations.cc")
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    subprocess.run([*compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@pytest.mark.slow
@pytest.mark.parametrize(
    "call, dtype",
    [(made.__name__, "float32") for made in allocation_judge.CALLS] + [("block", dtype) for dtype in DTYPES[1:]],
)
def test_every_allocation_fails_once(call, dtype, hooks):
    found = run_script(allocation_judge.__file__, call, dtype, threads=1, LD_PRELOAD=str(hooks))
    assert found.returncode == 0, found.stderr[-3000:]
    failed, raised = map(int, found.stdout.split()[-2:])
    print(f"{failed} allocations failed, for {raised} a MemoryError was raised")
    assert failed >= raised > 0
