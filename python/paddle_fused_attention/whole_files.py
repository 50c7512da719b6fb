"""Writes a file whole or not at all, whatever ends the process that writes it.

The content goes to a partial file in the same folder, from there to the disk, and only then under its name, in one step
of the file system. The writer holds a lock (flock) on its partial file. A lock ends with its process, so the next write
to the folder tells what a killed process has left from what another one is writing, and removes the former. Signals
that would end the process do so when the partial file is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import signal
import stat
import threading
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Callable

_PREFIX, _SUFFIX = ".paddle_fused_attention.", ".partial"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_libc = ctypes.CDLL(None)
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EPERM)  # by a file system


def write_whole(path: Path, content: Callable[[BinaryIO], Any], replace: bool = True) -> None:
    """Puts at `path` what `content` writes to the file that it is called with.

    A file that is replaced hands on its mode; a new one's is that of the umask. Until the new file is complete, the old
    one stays as it was.

    Raises:
        FileExistsError: `replace` is False, and a file stands there, or came there while `content` wrote.
        OSError: The file can't be written.
    """
    path = Path(path)
    mode = check_target(path, replace)
    _remove_leftovers(path.parent)
    signals = _Signals()
    try:
        signals.catch()
        partial, file = _create(path.parent, mode)
        try:
            try:
                signals.let_through()
                content(file)
                file.flush()
                os.fsync(file.fileno())
            finally:
                signals.hold()
            _publish(partial, path, replace)
        finally:
            _discard(partial, file)
    except OSError as error:  # which may name the partial file or none
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        signals.release()


def check_target(path: Path, replace: bool = True) -> int | None:
    """The mode of the file that stands at a path; None: nothing stands there.

    Raises:
        FileExistsError: A file stands there, and `replace` is False.
        OSError: No file can be put there, or only in the place of one that is read-only or no regular file.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise OSError(errno.ENOENT, "no such folder", str(path)) from None
        return None
    for is_kind, code, what in (
        (stat.S_ISLNK, errno.ELOOP, "a symbolic link"),
        (stat.S_ISDIR, errno.EISDIR, "a folder"),
        (lambda mode: not stat.S_ISREG(mode), errno.EINVAL, "no regular file"),
    ):
        if is_kind(found.st_mode):
            raise OSError(code, f"it is {what}", str(path))
    if not replace:
        raise OSError(errno.EEXIST, "it exists already", str(path))
    if not found.st_mode & 0o222 or not os.access(path, os.W_OK):
        raise OSError(errno.EACCES, "it is read-only", str(path))
    return stat.S_IMODE(found.st_mode) & 0o777


def _create(folder: Path, mode: int | None) -> tuple[Path, BinaryIO]:
    """A new partial file, which is locked."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        partial = folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        descriptor = os.open(partial, flags, 0o666 if mode is None else mode)
        file = os.fdopen(descriptor, "wb")
        kept = False
        try:
            if mode is not None:
                os.fchmod(descriptor, mode)  # the umask may have taken some of it
            # Another process may have taken the file for a leftover before it was locked.
            kept = _lock(descriptor) is not False and os.fstat(descriptor).st_nlink > 0
        finally:
            if not kept:
                _discard(partial, file)
        if kept:
            return partial, file


def _lock(descriptor: int) -> bool | None:
    """Whether nobody else had the lock; None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None


def _publish(partial: Path, path: Path, replace: bool) -> None:
    if replace:
        os.replace(partial, path)
    else:
        try:
            os.link(partial, path)  # unlike a rename it fails if something stands there
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            check_target(path, replace)
            os.rename(partial, path)
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # one may write to a folder that one may not read
        return
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(folder)


def _discard(partial: Path, file: BinaryIO) -> None:
    """Closes a partial file, and removes its name if it still has that."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(partial)
    with contextlib.suppress(OSError):  # closing writes the rest of what could not be written
        file.close()


def _remove_leftovers(folder: Path) -> None:
    """Removes the partial files of this user whose writers have ended."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith(_PREFIX) and name.endswith(_SUFFIX)]
    except OSError:
        return
    for name in names:
        leftover = folder / name
        with contextlib.suppress(OSError):
            found = os.lstat(leftover)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                continue
            # For writing, which NFS asks of those who lock a file.
            descriptor = os.open(leftover, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if _lock(descriptor):
                    os.unlink(leftover)
            finally:
                os.close(descriptor)


class _Terminated(BaseException):
    """Raised by a signal whose action is to end the process."""


class _Signals:
    """The signals that a user or the system ends a process with, while a partial file is there.

    From `catch` to `release` they wait, but between `let_through` and `hold` they do what they did before, or raise if
    they would have ended the process; `release` lets them end it. Python has its handlers called in the main thread
    alone: in other threads nothing is done.
    """

    def __init__(self) -> None:
        self._before: dict[int, tuple[Any, Any]] = {}  # Python's handlers, and the system's
        self._waiting: list[int] = []
        self._open = False

    def catch(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                # Paddle's handlers are none of Python's, which would not bring them back.
                action = ctypes.create_string_buffer(1024)
                _libc.sigaction(number, None, action)
                self._before[number] = handler, action
                signal.signal(number, self._received)

    def _received(self, number: int, frame: FrameType | None) -> None:
        handler = self._before[number][0]
        if not self._open:
            self._waiting.append(number)
            return
        self._open = False
        if not callable(handler):
            self._waiting.append(number)
            raise _Terminated
        handler(number, frame)
        self._open = True

    def let_through(self) -> None:
        self._open = True
        while self._waiting:
            self._received(self._waiting.pop(0), None)

    def hold(self) -> None:
        self._open = False

    def release(self) -> None:
        # SIGINT comes last in both loops: its handler raises.
        for number, (handler, action) in reversed(list(self._before.items())):
            _libc.sigaction(number, action, None)  # first, since Python drops a signal that comes while it sets SIG_DFL
            signal.signal(number, handler)
            _libc.sigaction(number, action, None)
        for number in sorted(self._waiting, key=_SIGNALS.index, reverse=True):
            signal.raise_signal(number)
