"""The Makefile's own promises: it lists its targets, and cleans up."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments, folder=ROOT):
    # What an outer make was told, such as another VENV, is not meant for this one.
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "VENV", "PADDLE")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def test_make_alone_lists_every_target():
    listed = re.findall(r"^make ([a-z-]+) +\S", make(), re.MULTILINE)
    rules = re.findall(r"^([a-z-]+):(?!=)", MAKEFILE, re.MULTILINE)
    parts = {"run-test-libraries", "make-library-packages"}
    assert listed[0] == "help" and "test" in listed and "clean" in listed
    assert listed == [rule for rule in rules if rule not in parts]
    phony = re.findall(r"^\.PHONY: ((?:.*\\\n)*[^#\n]*)", MAKEFILE, re.MULTILINE)
    assert sorted(" ".join(phony).replace("\\", "").split()) == sorted(rules)


def test_clean_leaves_nothing_that_git_ignores(tmp_path):
    made = {
        "/build/": ["build/objects/a.o"],
        "/dist/": ["dist/a.whl"],
        "/.venv*/": [".venv/bin/python", ".venv-libraries/bin/python", ".venv-paddle-3.0.0/bin/python"],
        "*.egg-info/": ["python/paddle_fused_attention.egg-info/PKG-INFO"],
        "__pycache__/": ["unittests/__pycache__/a.pyc", "examples/b/__pycache__/a.pyc"],
        "*.so": ["python/paddle_fused_attention/_C.so"],
        ".pytest_cache/": [".pytest_cache/a"],
        ".ruff_cache/": [".ruff_cache/a"],
        ".mypy_cache/": [".mypy_cache/a"],
        "python/paddle_fused_attention/_build_info.py": ["python/paddle_fused_attention/_build_info.py"],
        "python/paddle_fused_attention/bill_of_materials.cdx.json": [
            "python/paddle_fused_attention/bill_of_materials.cdx.json"
        ],
        "/.gpu/": [],  # which no target makes
    }
    ignored = ROOT / ".gitignore"
    if ignored.exists():  # not in a source distribution
        assert set(made) == set(ignored.read_text().split())
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = ["custom_ops/a.cc", "python/paddle_fused_attention/_op.py"]
    for name in sum(made.values(), kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    make("clean", folder=tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["Makefile", *kept]


def test_another_environment_is_told_what_it_gets():
    """Before each of the installations into it."""
    lines = make("-n", "-B", "test", f"PYTHON={sys.executable}").splitlines()
    told = f'echo "pip installs into the environment of {sys.executable}:" '
    steps = ["told" if line.startswith(told) else "done" for line in lines if "pip install" in line]
    assert steps == ["told", "done"] * 4 + ["done"]  # the last two are told of at once
