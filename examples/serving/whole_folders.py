"""A folder that is written whole or not at all, whatever ends the process that writes it.

What is written goes to a hidden folder beside it, which takes its place in one step of the file system, or in two where
that has no exchange. The writer holds a lock on the hidden folder: a lock ends with its process, so the next writer
tells what a killed one has left from what another is writing, and removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Iterator

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write to, which stands at `path` when the block ends; where it fails, nothing has changed."""
    _remove_left_over(path)
    partial = _hidden_folder(path)
    with _locked(partial):
        try:
            yield partial
            partial.chmod(0o755)  # not the private mode of a temporary folder
            if path.exists():
                _exchange(partial, path)
            else:
                os.replace(partial, path)
        finally:  # of an exchange it is what was replaced
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether nobody else has locked it, and lock it for the block if so."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:  # locked, or there are no locks
        free = False
    try:
        yield free
    finally:
        os.close(descriptor)


def _prefix(path: Path) -> str:
    return f".{path.name}.partial-"


def _hidden_folder(path: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))


def _remove_left_over(path: Path) -> None:
    for folder in path.parent.iterdir():
        if not folder.name.startswith(_prefix(path)):
            continue
        with contextlib.suppress(OSError), _locked(folder) as free:  # no folder, or gone meanwhile
            if free:
                shutil.rmtree(folder, ignore_errors=True)


def _exchange(partial: Path, path: Path) -> None:
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # of glibc 2.28
    names = os.fsencode(partial), os.fsencode(path)
    if rename and rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return
    aside = _hidden_folder(path)
    os.replace(path, aside)
    os.replace(partial, path)
    shutil.rmtree(aside, ignore_errors=True)
