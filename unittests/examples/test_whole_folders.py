"""The serving example's folders: whole or not at all, whatever ends the writer."""

import os

import pytest
from processes import run_python

from examples.serving.whole_folders import whole_folder

ENDS = """
import os, shutil, sys
from pathlib import Path
from examples.serving import whole_folders

target, moment, exchanges = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
die = lambda *arguments, **options: os.kill(os.getpid(), 9)
if not exchanges:
    whole_folders.ctypes.CDLL = lambda name: None
if moment == "before":
    Path.chmod = die
elif moment == "between":
    replaced = []
    replace = os.replace
    os.replace = lambda *names: die() if replaced else replaced.append(replace(*names))
elif moment == "after":
    shutil.rmtree = die
with whole_folders.whole_folder(target) as partial:
    (partial / "a").write_text("new")
    (partial / "b").write_text("new")
print("done")
"""


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


OLD, NEW = {"a": "old"}, {"a": "new", "b": "new"}


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("old")
    return folder


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("moment, expected", [("before", OLD), ("after", NEW), ("never", NEW)])
def test_a_writer_that_is_killed(moment, expected, exchanges, target):
    end = run_python(ENDS, target, moment, exchanges)
    assert end.returncode == (0 if moment == "never" else -9), end.stderr
    assert contents(target) == expected
    with whole_folder(target) as partial:
        (partial / "c").write_text("next")
    assert contents(target) == {"c": "next"}
    assert os.listdir(target.parent) == [target.name]


def test_without_an_exchange_there_is_a_moment_without_the_folder(target):
    """Nothing is half then, and the next writer goes on."""
    end = run_python(ENDS, target, "between", False)
    assert end.returncode == -9, end.stderr
    assert not target.exists()
    with whole_folder(target) as partial:
        (partial / "c").write_text("next")
    assert contents(target) == {"c": "next"}
    assert os.listdir(target.parent) == [target.name]


def test_a_failure_changes_nothing(target):
    with pytest.raises(KeyError), whole_folder(target) as partial:
        (partial / "a").write_text("new")
        raise KeyError
    assert contents(target) == OLD and os.listdir(target.parent) == [target.name]


def test_a_folder_that_was_not_there(tmp_path):
    with whole_folder(tmp_path / "new") as partial:
        (partial / "a").write_text("new")
    assert contents(tmp_path / "new") == {"a": "new"}
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o755


def test_what_another_is_writing_stays(target):
    with whole_folder(target) as first:
        (first / "a").write_text("first")
        with whole_folder(target) as second:
            (second / "a").write_text("second")
        assert contents(target) == {"a": "second"} and first.is_dir()
    assert contents(target) == {"a": "first"}
    assert os.listdir(target.parent) == [target.name]


def test_other_names_stay(target):
    (target.parent / ".model.partial-file").write_text("mine")
    others = [".model.partial-file", ".model-backup", ".model.partial", ".models.partial-12345678"]
    for name in others[1:]:
        (target.parent / name).mkdir()
    with whole_folder(target) as partial:
        (partial / "a").write_text("new")
    assert sorted(os.listdir(target.parent)) == sorted([*others, "model"])
