"""Files are written whole or not at all: their modes, what stands at their place, what others leave there or write at
the same time, signals, a full disk.
"""

import errno
import fcntl
import os
import resource
import signal
import stat
import threading

import pytest
from families import bert_block, check_error, save
from paddle_fused_attention import whole_files
from paddle_fused_attention.checkpoint_files import Checkpoint, CheckpointError, write
from paddle_fused_attention.whole_files import write_whole
from processes import run_python


def content(data):
    return lambda file: file.write(data)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def partial_files(folder):
    return [path for path in folder.iterdir() if path.name.endswith(".partial")]


@pytest.fixture
def umask():
    """Sets the umask of a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.fixture
def handler():
    """Sets Python's handler of a signal of a test."""
    before = {}

    def set_handler(number, function):
        before.setdefault(number, signal.signal(number, function))

    yield set_handler
    for number, function in before.items():
        signal.signal(number, function)


def test_modes(umask, tmp_path):
    """A file that is replaced hands on its mode, whatever the umask is; another one's is that of the umask."""
    path = tmp_path / "a"
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        umask(mask)
        write_whole(path, content(b"1"))
        assert mode_of(path) == mode
        path.unlink()
    for mode in (0o600, 0o640, 0o666, 0o755):
        write_whole(path, content(b"1"))
        path.chmod(mode)
        seen = []
        write_whole(path, lambda file, seen=seen: seen.append(stat.S_IMODE(os.fstat(file.fileno()).st_mode)))
        assert seen == [mode] and mode_of(path) == mode
        path.unlink()


def test_a_partial_file_is_never_open_to_more_users_than_the_file(monkeypatch, tmp_path):
    path = tmp_path / "a"
    path.touch(0o600)
    modes = []
    fchmod = os.fchmod
    monkeypatch.setattr(
        os, "fchmod", lambda file, mode: modes.append(stat.S_IMODE(os.fstat(file).st_mode)) or fchmod(file, mode)
    )
    write_whole(path, content(b""))
    assert modes == [0o600]


def test_the_content_is_on_the_disk_before_its_name(monkeypatch, tmp_path):
    """And the name before it returns."""
    path, done = tmp_path / "a", []
    fsync, replace, link = os.fsync, os.replace, os.link

    def synced(file):
        done.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else f"{os.fstat(file).st_size} bytes")
        fsync(file)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: done.append("replace") or replace(*names))
    monkeypatch.setattr(os, "link", lambda *names: done.append("link") or link(*names))
    write_whole(path, content(b"123"), replace=False)
    write_whole(path, content(b"45"))
    assert done == ["3 bytes", "link", "folder", "2 bytes", "replace", "folder"] and path.read_bytes() == b"45"


TARGETS = {
    "a folder": lambda path: path.mkdir(),
    "a symbolic link": lambda path: path.symlink_to("elsewhere"),
    "a symbolic link ": lambda path: path.symlink_to("/dev/full"),
    "no regular file": lambda path: os.mkfifo(path),
    "read-only": lambda path: path.touch(0o444),
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("force", [True, False])
def test_targets_that_are_no_files_to_write(kind, force, tmp_path):
    """One line says what stands there, and it stays what it is."""
    source, target = save(tmp_path / "in.pdparams", bert_block("", False)), tmp_path / "out.pdparams"
    TARGETS[kind](target)
    before = os.lstat(target)
    message = f"{target}: can't be written: it is {kind.strip()}$"
    if kind == "read-only" and not force:
        message = f"{target}: exists already; --force replaces it"
    check_error(["convert", source, target, "--num-heads", 4, *(["--force"] if force else [])], message)
    after = os.lstat(target)
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert len(list(tmp_path.iterdir())) == 2 and not (tmp_path / "elsewhere").exists()


def test_long_names(tmp_path):
    source = save(tmp_path / "in.pdparams", bert_block("", False))
    longest = tmp_path / ("x" * (255 - len(".pdparams")) + ".pdparams")
    write(longest, Checkpoint({}))
    assert longest.exists()
    too_long = tmp_path / ("x" * 300 + ".pdparams")
    check_error(["convert", source, too_long, "--num-heads", 4], f"{too_long}: can't be written: File name too long$")
    check_error(
        ["convert", too_long, longest, "--num-heads", 4, "--force"], f"{too_long}: can't be read: File name too long$"
    )


def test_what_comes_there_meanwhile_is_not_replaced(monkeypatch, tmp_path):
    path = tmp_path / "out.pdparams"

    def other_writes_first(file):
        path.write_bytes(b"other")
        file.write(b"own")

    for _ in range(2):  # the second time on a file system without links
        with pytest.raises(FileExistsError):
            write_whole(path, other_writes_first, replace=False)
        assert path.read_bytes() == b"other" and list(tmp_path.iterdir()) == [path]
        path.unlink()

        def no_links(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
    write_whole(path, content(b"own"), replace=False)
    with pytest.raises(CheckpointError, match=f"^{path}: exists already$"):
        write(path, Checkpoint({}), replace=False)
    assert path.read_bytes() == b"own" and list(tmp_path.iterdir()) == [path]


def test_one_of_many_writers_wins(tmp_path):
    """And is told so; the others are told that the file exists."""
    path, start = tmp_path / "a", threading.Barrier(8, timeout=60)
    ends = []

    def write_one(i):
        def write_together(file):
            start.wait()
            file.write(b"%d" % i * 100_000)

        try:
            write_whole(path, write_together, replace=False)
            ends.append(i)
        except FileExistsError:
            ends.append(None)

    threads = [threading.Thread(target=write_one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (end for end in ends if end is not None)
    assert len(ends) == 8 and path.read_bytes() == b"%d" % winner * 100_000 and list(tmp_path.iterdir()) == [path]


def test_leftovers_are_removed_and_no_others(tmp_path):
    """A partial file that no process holds is one; what looks like it but is no file of a writer stays."""
    path = tmp_path / "a"
    name = ".paddle_fused_attention.{}.partial".format
    (tmp_path / name("0" * 16)).write_bytes(b"half")
    (tmp_path / "victim").write_bytes(b"victim")
    (tmp_path / name("link")).symlink_to("victim")
    (tmp_path / name("folder")).mkdir()
    os.mkfifo(tmp_path / name("pipe"))
    (tmp_path / ".a.123.partial").write_bytes(b"not ours")
    others = {"victim", ".a.123.partial", *map(name, ("link", "folder", "pipe"))}

    def write_meanwhile(file):
        (own,) = (p.name for p in partial_files(tmp_path) if p.name not in others)
        write_whole(tmp_path / "b", content(b"b"))
        assert (tmp_path / own).exists()
        file.write(b"a")

    write_whole(path, write_meanwhile)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", *others}
    assert path.read_bytes() == b"a" and (tmp_path / "victim").read_bytes() == b"victim"


def test_a_partial_file_that_another_process_takes_for_a_leftover(monkeypatch, tmp_path):
    """Between its creation and its lock: the writer begins anew."""
    lock, taken = whole_files._lock, []

    def taken_once(descriptor):
        if not taken:
            taken.extend(partial_files(tmp_path))
            taken[0].unlink()
        return lock(descriptor)

    monkeypatch.setattr(whole_files, "_lock", taken_once)
    write_whole(tmp_path / "a", content(b"1"))
    assert taken and [path.name for path in tmp_path.iterdir()] == ["a"]
    locked = []

    def locked_once(descriptor):
        if not locked:
            locked.append(os.open(partial_files(tmp_path)[0], os.O_RDONLY))
            fcntl.flock(locked[0], fcntl.LOCK_EX)
        return lock(descriptor)

    monkeypatch.setattr(whole_files, "_lock", locked_once)
    write_whole(tmp_path / "a", content(b"2"))
    os.close(locked[0])
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"2"


def test_a_file_system_without_locks(monkeypatch, tmp_path):
    """Files are written there, and nobody's partial files removed."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    other = tmp_path / ".paddle_fused_attention.0123456789abcdef.partial"
    other.write_bytes(b"perhaps another's")
    write_whole(tmp_path / "a", content(b"1"))
    assert (tmp_path / "a").read_bytes() == b"1" and partial_files(tmp_path) == [other]


def test_names_of_partial_files_can_not_be_foreseen(tmp_path):
    names = set()
    for _ in range(20):
        write_whole(tmp_path / "a", lambda _: names.update(path.name for path in partial_files(tmp_path)))
    assert len(names) == 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_of_a_program_s_own(number, handler, tmp_path):
    """Its handler is called while the content is written, and when the file stands, not between; it may raise."""
    path, called = tmp_path / "a", []

    class Ended(Exception):
        pass

    def end(*_):
        called.append(bool(partial_files(tmp_path)))
        raise Ended

    handler(number, lambda *_: called.append(bool(partial_files(tmp_path))))
    write_whole(path, lambda file: os.kill(os.getpid(), number) or file.write(b"1"))
    assert called == [True] and path.read_bytes() == b"1"
    handler(number, end)
    with pytest.raises(Ended):
        write_whole(path, lambda file: file.write(b"2") and os.kill(os.getpid(), number) or file.write(b"3"))
    assert called == [True, True] and path.read_bytes() == b"1" and list(tmp_path.iterdir()) == [path]
    assert signal.getsignal(number) is end


def test_a_signal_while_the_file_is_put_in_its_place(handler, monkeypatch, tmp_path):
    path, replace = tmp_path / "a", os.replace

    def replace_and_signal(*names):
        os.kill(os.getpid(), signal.SIGINT)
        replace(*names)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "replace", replace_and_signal)
    handler(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, content(b"1"))
    assert path.read_bytes() == b"1" and list(tmp_path.iterdir()) == [path]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_that_are_ignored_stay_so(handler, tmp_path):
    handler(signal.SIGHUP, signal.SIG_IGN)
    write_whole(tmp_path / "a", lambda file: os.kill(os.getpid(), signal.SIGHUP) or file.write(b"1"))
    assert (tmp_path / "a").read_bytes() == b"1" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


TERMINATED = """
import os, signal, sys
from pathlib import Path
from paddle_fused_attention.whole_files import write_whole

path = Path(sys.argv[1]) / "a"
write_whole(path, lambda file: file.write(b"1"))
if sys.argv[2] == "while writing":
    write_whole(path, lambda file: file.write(b"2") and os.kill(os.getpid(), signal.SIGTERM) or file.write(b"3"))
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["while writing", "afterwards"])
def test_sigterm_ends_as_before(when, tmp_path):
    """By the signal, and with what Paddle says then: its handler is none of Python's."""
    end = run_python(TERMINATED, tmp_path, when)
    assert end.returncode == -signal.SIGTERM
    assert (end.stdout + end.stderr).count("`Termination signal` is detected by the operating system") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"1"


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
@pytest.mark.parametrize("limit", [0, 100, 3000])
def test_a_disk_that_is_full(limit, suffix, tmp_path):
    """Wherever in the file it becomes full, the old file stays, with nothing beside it."""
    source, target = save(tmp_path / f"in{suffix}", bert_block("", suffix != ".pdparams")), tmp_path / f"out{suffix}"
    target.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # SIGXFSZ is ignored by Python
        check_error(
            ["convert", source, target, "--num-heads", 4, "--force"], f"{target}: can't be written: File too large$"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


def test_errors_name_the_file(tmp_path):
    """And not the partial one."""

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError) as raised:
        write_whole(tmp_path / "a", full)
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
