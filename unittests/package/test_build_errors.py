"""What the build says where something is missing; nothing is compiled."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[2]

# setup.py with the module argv[1] missing, or an empty one ("name="), and setuptools in the folder argv[2], if any.
SETUP = """
import runpy, sys, types
module, folder, *arguments = sys.argv[1:]
sys.modules[module.rstrip("=")] = types.ModuleType(module) if module.endswith("=") else None
if folder:
    import setuptools
    setuptools.__file__ = folder + "/setuptools/__init__.py"
sys.argv = ["setup.py", *arguments]
runpy.run_path("setup.py", run_name="__main__")
"""


def error_of(*arguments, **environment):
    command = [sys.executable, "-W", "ignore", "-c", SETUP, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
    return result.stderr.strip()


@pytest.mark.parametrize(
    "folder, front_end, command",
    [
        ("/tmp/pip-build-env-x1/overlay/lib/site-packages", "pip", "pip install --no-build-isolation ."),
        ("/tmp/build-env-x1/lib/site-packages", "build", "python -m build --no-isolation"),
        ("/root/.cache/uv/builds-v0/.tmpx1/lib/site-packages", "uv", "uv pip install --no-build-isolation ."),
    ],
)
def test_isolation_that_hides_paddle_is_named(folder, front_end, command):
    said = error_of("paddle", folder, "build_ext")
    assert f"isolated build environment of {front_end} hides it" in said and "none is" not in said
    assert said.splitlines()[-1].strip() == command
    assert re.search(r"install 'setuptools>=\d+' wheel", said)


def test_no_paddle():
    said = error_of("paddle", "", "build_ext")
    assert "and none is. Install it" in said and "pip install --no-build-isolation ." in said


@pytest.mark.parametrize("cxx", ["/nowhere/g++ -m64", "no-such-launcher g++"])
def test_no_compiler_is_one_line(cxx):
    said = error_of("paddle=", "", "build_ext", CXX=cxx)
    assert (
        said.splitlines()[-1]
        == f"error: The C++ compiler {cxx.split()[0]} is not found: install g++, or set CXX to another."
    )
    assert "command" not in said


def test_no_setuptools_is_one_line():
    said = error_of("setuptools", "", "build_ext")
    assert re.fullmatch(r"setuptools 62 or later .* needed: pip install -U setuptools wheel", said)


def test_versions_of_setuptools_agree():
    """Where it is asked for, and where it is checked."""
    names = ("setup.py", "pyproject.toml", "Makefile", "README.md")
    asked = {
        name: set(re.findall(r"setuptools(?:>=| )(\d+)(?= or later|\b['\"])", (ROOT / name).read_text()))
        for name in names
    }
    assert asked == dict.fromkeys(names, {"62"})
