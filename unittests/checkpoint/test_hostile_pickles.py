"""No pickle runs code, and pickles that lie are refused in one line and take little memory."""

import os
import pickle
import struct

import numpy as np
import pytest
from file_bytes import DATA, STATE, numbers, refused, text, torch_tensor, torch_zip
from paddle_fused_attention.checkpoint_files import Checkpoint, load_state, read, write


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def hostile(marker):
    """Pickles that make the file `marker`, or could, and what each asks for."""
    command = f"touch '{marker}'"
    call = text(command) + b"\x85R"
    stack = b"\x8c\x05posix\x8c\x06system\x93"
    code = f"open({str(marker)!r}, 'w')"
    system, evaluate = b"cposix\nsystem\n", b"c__builtin__\neval\n"
    yield "GLOBAL", b"\x80\x02}" + text("w") + system + call + b"s.", "posix.system"
    yield "alone", b"\x80\x02" + system + call + b".", "posix.system"
    yield "STACK_GLOBAL", b"\x80\x04}" + text("w") + stack + call + b"s.", "posix.system"
    yield "not in the result", b"\x80\x02" + system + call + b"0}.", "posix.system"
    yield "INST", b"\x80\x02(" + text(command) + b"iposix\nsystem\n.", "posix.system"
    yield "NEWOBJ", b"\x80\x02csubprocess\nPopen\n" + text(f"touch {marker}") + b"\x85\x81.", "subprocess.Popen"
    yield "OBJ", b"\x80\x02(" + system + text(command) + b"o.", "posix.system"
    yield "eval", b"\x80\x02" + evaluate + text(code) + b"\x85R.", None
    yield (
        "eval as of a DenseTensor",
        b"\x80\x02" + evaluate + text(code) + b"}" + text("data") + b"Ns\x86R.",
        "eval of open(",
    )
    yield "exec", b"\x80\x02c__builtin__\nexec\n" + text(code) + b"\x85R.", "__builtin__.exec"
    yield "getattr", b"\x80\x02c__builtin__\ngetattr\ncposix\nsystem\n" + text("x") + b"\x86R.", "__builtin__.getattr"
    yield "a name with dots", b"\x80\x04\x8c\x08builtins\x8c\x0dtuple.__new__\x93.", "builtins.tuple.__new__"
    yield "a module of ours", b"\x80\x02cpaddle_fused_attention.checkpoint_files\nos.system\n.", "os.system"
    yield "in a list of NumPy", pickle.dumps({"w": np.array([Call(os.system, command)], object)}, 2), None


def marker_of(tmp_path):
    return tmp_path / "marker"


@pytest.mark.parametrize("reader", [read, load_state])
def test_no_pickle_runs_code(reader, tmp_path):
    marker = marker_of(tmp_path)
    path = tmp_path / "a.pdparams"
    ran = 0
    for name, data, asked in hostile(marker):
        path.write_bytes(data)
        refused(path, asked or "", reader=reader)
        assert not marker.exists(), name
        try:
            pickle.loads(data)
        except Exception:
            pass
        ran += marker.exists()
        if marker.exists():
            marker.unlink()
    assert ran >= 8, "these pickles do no harm"


def test_no_pickle_of_torch_runs_code(tmp_path):
    marker = marker_of(tmp_path)
    path = tmp_path / "a.bin"
    start = (DATA / "torch_legacy.bin").read_bytes()
    system = start.index(b"\x80\x02", start.index(b"\x80\x02", 1) + 1)
    for name, data, asked in hostile(marker):
        refused(torch_zip(path, data), asked or "")
        path.write_bytes(data)
        refused(path, asked or "")
        path.write_bytes(start[:system] + data)
        refused(path, asked or "")
        assert not marker.exists(), name


def test_no_metadata_runs_code(tmp_path):
    """Behind a good state dict."""
    path = tmp_path / "a.pdparams"
    write(path, Checkpoint(STATE))
    whole = path.read_bytes()
    for name, data, asked in hostile(marker_of(tmp_path)):
        path.write_bytes(whole + data)
        refused(path, asked or "")
        assert not marker_of(tmp_path).exists(), name
    for behind in (
        pickle.dumps({}),
        pickle.dumps(3),
        pickle.dumps({"paddle_fused_attention.metadata": {"a": 1}}),
        b"x",
        whole,
    ):
        path.write_bytes(whole + behind)
        refused(path)


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
NDARRAY = b"cnumpy\nndarray\n"
EMPTY_ARRAY = RECONSTRUCT + NDARRAY + b"K\x00\x85C\x01b\x87R"
FLOAT32 = b"cnumpy\ndtype\n" + text("f4") + b"\x89\x88\x87R"


def array(shape, data, dtype=FLOAT32):
    return EMPTY_ARRAY + b"(K\x01" + numbers(shape) + dtype + b"\x89" + data + b"tb"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(array((2**40,), b"C\x04abcd"), id="an array without its bytes"),
        pytest.param(array((-1,), b"C\x04abcd"), id="a negative shape"),
        pytest.param(array((1,), b"K\x04"), id="an array without bytes at all"),
        pytest.param(array((1,), b"C\x08abcdefgh", b"cnumpy\ndtype\n" + text("O8") + b"\x89\x88\x87R"), id="objects"),
        pytest.param(array((1,), b"C\x08abcdefgh", b"cnumpy\ndtype\n" + text("f4,f4") + b"\x89\x88\x87R"), id="fields"),
        pytest.param(array((1,), b"C\x08abcdefgh", b"cnumpy\ndtype\n" + text("V8") + b"\x89\x88\x87R"), id="void"),
        pytest.param(EMPTY_ARRAY, id="an array without a state"),
        pytest.param(EMPTY_ARRAY + b"}b", id="a state of another type"),
        pytest.param(RECONSTRUCT + b"c__builtin__\ntuple\nK\x00\x85C\x01b\x87R", id="an array of another class"),
        pytest.param(RECONSTRUCT, id="a function as a value"),
        pytest.param(RECONSTRUCT + b"}" + text("x") + b"Nsb", id="attributes of a function"),
        pytest.param(RECONSTRUCT + b")R", id="a call without arguments"),
        pytest.param(NDARRAY + b")R", id="a call of ndarray"),
        pytest.param(NDARRAY + b")\x81", id="NEWOBJ"),
        pytest.param(b"c_codecs\nencode\n" + text("x" * 99) + text("bz2") + b"\x86R", id="another codec"),
        pytest.param(b"\x82\x01", id="EXT1"),
        pytest.param(b"K\x01Q", id="BINPERSID"),
        pytest.param(b"P1\n", id="PERSID"),
        pytest.param(b"I" + b"9" * 5000 + b"\n", id="a number in decimals"),
        pytest.param(b"\x97", id="NEXT_BUFFER"),
        pytest.param(b"]" * 200 + b"a" * 199, id="deep lists"),
        pytest.param(b")" + b"\x85" * 100_000, id="deep tuples"),
        pytest.param(b"}" + b")" + b"\x85" * 100_000 + b"Ns", id="a deep tuple as a key"),
        pytest.param(b"}" + EMPTY_ARRAY + b"Ns", id="an array as a key"),
        pytest.param(b"]q\x00h\x00a", id="a list in itself"),
        pytest.param(b"}q\x00K\x01h\x00s", id="a dict in itself"),
        pytest.param(b"\x8f(]\x90", id="a list in a set"),
        pytest.param(b"h\x05", id="an empty place of the memo"),
        pytest.param(b"j\xff\xff\xff\xff", id="a far place of the memo"),
        pytest.param(b"\x8e" + struct.pack("<Q", 2**40), id="a terabyte"),
        pytest.param(b"\x8b" + struct.pack("<i", -5), id="a number of negative length"),
        pytest.param(b"\x8b" + struct.pack("<i", 2**31 - 1), id="a long number"),
        pytest.param(b"(" * 1000, id="marks"),
        pytest.param(b"00", id="an empty stack"),
        pytest.param(b"(K\x01u", id="no dict"),
        pytest.param(b"}(K\x01u", id="no value"),
        pytest.param(b"K\x01K\x02", id="two values"),
    ],
)
def test_pickles_that_lie(body, tmp_path):
    path = tmp_path / "a.pdparams"
    for data in (b"\x80\x02" + body + b".", b"\x80\x04}" + text("w") + body + b"s."):
        path.write_bytes(data)
        refused(path)
        refused(path, reader=load_state)
    refused(torch_zip(tmp_path / "a.bin", b"\x80\x02" + body + b"."))


def test_memo_of_a_far_place(tmp_path):
    """Python's own unpickler would get memory for all places before."""
    path = tmp_path / "a.pdparams"
    path.write_bytes(b"\x80\x02}r\xff\xff\xff\xff" + text("a") + b"K\x01s.")
    assert read(path).arrays == {"a": 1}


def test_small_files_take_little_memory(tmp_path):
    """An array or a string that is referred to time and again counts each time."""
    path = tmp_path / "a.pdparams"
    block = b"B" + struct.pack("<I", 2**20) + bytes(2**20)

    def names(body):
        return b"".join(text(str(i)) + body for i in range(1000))

    def state(start, body):
        return b"\x80\x03" + start + b"0}(" + names(body) + b"u."

    many = "would take far more memory than its"
    for data in (
        state(block + b"q\x00", array((2**18,), b"h\x00")),
        state(array((2**18,), block) + b"q\x00", b"h\x00"),
        state(text("x" * 2**20) + b"q\x00", b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R"),
        state(b"(" + b"N" * 2**20 + b"lq\x00", b"c__builtin__\ntuple\nh\x00\x85R"),
    ):
        path.write_bytes(data)
        refused(path, many)
    tensors = {str(i): torch_tensor("k", 2**18, 0, (2**18,), (1,)) for i in range(1000)}
    refused(torch_zip(tmp_path / "a.bin", tensors, k=bytes(2**20)), many)
    refused(torch_zip(tmp_path / "a.bin", {"w": torch_tensor("k", 1, 0, (2**40,), (0,))}, k=bytes(4)), many)


def test_lists_of_lists_of_lists(tmp_path):
    """Sixty lists, each twice in the next one, are 2^60 paths, but sixty lists."""
    path, copy = tmp_path / "a.pdparams", tmp_path / "b.pdparams"
    lists = b"]q\x00" + b"".join(b"0]h%ch%ceq%c" % (i, i, i + 1) for i in range(60)).replace(b"]h", b"](h")
    path.write_bytes(b"\x80\x02}" + text("w") + lists + b"s.")
    found = read(path).arrays["w"]
    assert len(found) == 2 and found[0] is found[1] and len(load_state(path)["w"]) == 2
    write(copy, read(path))
    assert copy.stat().st_size < 2 * path.stat().st_size and len(load_state(copy)["w"]) == 2


def test_names_in_messages(tmp_path):
    """Escaped, and not long."""
    path = tmp_path / "a.pdparams"
    path.write_bytes(b"\x80\x02c\x1b[31mos\nsystem" + b"x" * 900 + b"\n.")
    message = refused(path, "it asks for \\x1b[31mos.systemxxx", "...xxxxxxxx")
    assert len(message) < len(str(path)) + 250
    path.write_bytes(pickle.dumps({3: 1}))
    refused(path, "a key that is no text: int")
    path.write_bytes(pickle.dumps({"\ud800": 1}))
    refused(path, "\\ud800")
    path.write_bytes(pickle.dumps([1, 2]))
    refused(path, "expected a state dict, got list")
