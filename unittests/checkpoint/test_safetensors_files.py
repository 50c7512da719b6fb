"""Files of safetensors: those that lie are refused, and unusual ones are read."""

import json
import struct

import numpy as np
import pytest
from file_bytes import refused
from paddle_fused_attention import _safetensors_files
from paddle_fused_attention.checkpoint_files import Checkpoint, CheckpointError, RawTensor, read, write


def safetensors(path, header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


SAFETENSORS = {
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b overlaps another tensor"),
    "twice": ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "b overlaps another tensor"),
    "gap": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "b stands after a gap"),
    "gap at the start": ({"a": entry(4, 8)}, 8, "a stands after a gap"),
    "bytes after the last": ({"a": entry(0, 4)}, 8, "4 bytes stand after its last tensor"),
    "beyond the end": ({"a": entry(0, 8)}, 4, "a lies beyond its end"),
    "far beyond the end": ({"a": entry(0, 2**62, [2**60 - 1])}, 4, "a: "),
    "wrong shape": ({"a": entry(0, 8, [3])}, 8, "a: F32 of shape [3] takes 12 bytes, but it has 8"),
    "wrong dtype": ({"a": entry(0, 8, [2], "F64")}, 8, "a: F64 of shape [2] takes 16 bytes, but it has 8"),
    "unknown dtype": ({"a": entry(0, 8, [2], "F\n9")}, 8, "a: expected a dtype of .safetensors, got F\\n9"),
    "half a byte": ({"a": entry(0, 1, [1], "F4")}, 1, "a: F4 of shape [1] takes 0.5 bytes, but it has 1"),
    "negative offset": ({"a": entry(-4, 0, [1])}, 4, "a: its data_offsets are no range"),
    "backwards": ({"a": entry(4, 0, [1])}, 4, "a: its data_offsets are no range"),
    "offsets that are no integers": (
        {"a": {**entry(0, 4), "data_offsets": [0, 4.0]}},
        4,
        "a: its data_offsets are no range",
    ),
    "offsets that are bools": (
        {"a": {**entry(0, 1, [1], "U8"), "data_offsets": [False, True]}},
        1,
        "data_offsets are no range",
    ),
    "an offset of -0": (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [-0, 1]}}', 1, "its data_offsets are no"),
    "a number beyond floats": (
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "more": 1e999}}',
        1,
        "expected a finite number in JSON, got 1e999",
    ),
    "a long number": (b'{"a": {"more": ' + b"9" * 1_000_000 + b"}}", 0, "expected a finite number in JSON, got 999"),
    "one offset": ({"a": {**entry(0, 4), "data_offsets": [4]}}, 4, "a: its data_offsets are no range"),
    "negative shape": ({"a": entry(0, 4, [-1, -1])}, 4, "a: its shape is none that an array can have"),
    "overflow": ({"a": entry(0, 0, [2**32, 2**32])}, 0, "a: its shape is none that an array can have"),
    "overflow beside a zero": ({"a": entry(0, 0, [0, 2**40, 2**40])}, 0, "a: its shape is none that an array can have"),
    "many dimensions": ({"a": entry(0, 4, [1] * 100)}, 4, "a: its shape is none that an array can have"),
    "a list for an entry": ({"a": [1]}, 0, "a: expected dtype, shape and data_offsets"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, "a: its shape"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "expected its metadata to be strings by name"),
    "a list for metadata": ({"__metadata__": ["a"]}, 0, "expected its metadata to be strings by name"),
    "a list for a header": ([], 0, "its header is no JSON object"),
    "not JSON": (b"{'a': 1}", 0, ""),
    "NaN": (b'{"a": NaN}', 0, "NaN"),
    "not UTF-8": (b'{"\xff": 1}', 0, ""),
    "UTF-16": ('{"__metadata__": {}}'.encode("utf-16"), 0, ""),
    "half a character": (b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}', 0, "\\ud800"),
    "a name twice": (
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": {}}',
        1,
        "a stands in it twice",
    ),
    "deep JSON": (b'{"a": ' + b"[" * 100_000, 0, ""),
    "a long name": ({"\x1b" * 10_000: [1]}, 0, "\\x1b\\x1b"),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_that_lie(name, tmp_path):
    header, size, message = SAFETENSORS[name]
    refused(safetensors(tmp_path / "a.safetensors", header, bytes(size)), message)


def test_safetensors_of_overlapping_tensors_take_no_memory(tmp_path, monkeypatch):
    """Refused before the first tensor is read."""
    header = {f"t{i}": entry(0, 2**20) for i in range(10_000)}
    path = safetensors(tmp_path / "a.safetensors", header, bytes(2**20))
    monkeypatch.setattr(_safetensors_files, "_read_tensor", lambda *_: pytest.fail("a tensor was read"))
    refused(path, "overlaps another tensor")


def test_long_safetensors_headers(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    refused(path, "its header is not complete")
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(8 + 100_000_001)
    refused(path, "its header of 100000001 bytes is longer than 100000000")


def test_names_that_no_header_holds(tmp_path, monkeypatch):
    """What could not be read is not written."""
    monkeypatch.setattr(_safetensors_files, "_MAX_HEADER", 1000)
    with pytest.raises(CheckpointError, match=r"a header of \d+ bytes can't be stored in .safetensors"):
        write(tmp_path / "a.safetensors", Checkpoint({"x" * 1000: np.zeros(2)}))
    assert not list(tmp_path.iterdir())


def test_good_safetensors_of_unusual_form(tmp_path):
    """Tensors in another order than the header's, empty ones, odd places, spaces, no tensor at all."""
    path = tmp_path / "a.safetensors"
    header = {
        "b": entry(1, 9),
        "empty": entry(1, 1, [0, 3]),
        "a": entry(0, 1, [], "U8"),
        "end": entry(9, 9, [0]),
        "f4": entry(9, 10, [2], "F4"),
    }
    data = b"\x07" + np.array([1, 2], "<f4").tobytes() + b"\x21"
    found = read(safetensors(path, json.dumps(header).encode() + b"  ", data)).arrays
    assert list(found) == list(header) and found["b"].tolist() == [1, 2] and found["a"] == 7 and found["a"].shape == ()
    assert (
        found["empty"].shape == (0, 3) and found["end"].shape == (0,) and found["f4"] == RawTensor("F4", (2,), b"\x21")
    )
    for content, metadata in ((b"{}", None), (b'{"__metadata__": null}', None), (b'{"__metadata__": {}}', {})):
        assert read(safetensors(path, content)) == Checkpoint({}, metadata)


def test_large_safetensors():
    """Places beyond 4 GB."""
    shape, size = [2**16, 2**16 + 1], 4 * 2**16 * (2**16 + 1)
    assert _safetensors_files._entry("a", entry(size, 2 * size, shape)) == ("F32", tuple(shape), size, 2 * size)


# Refused here alone: NumPy has no such shape, or which of two entries is meant is not said.
STRICTER = ("a name twice", "overflow beside a zero", "many dimensions")


@pytest.mark.parametrize("name", [name for name in SAFETENSORS if name not in STRICTER])
def test_the_library_refuses_the_same(name, tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy")
    header, size, _ = SAFETENSORS[name]
    with pytest.raises(Exception, match="."):
        numpy_files.load_file(str(safetensors(tmp_path / "a.safetensors", header, bytes(size))))
