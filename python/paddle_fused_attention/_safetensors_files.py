"""Reads and writes .safetensors files: eight bytes with the length of a header, the header in JSON (dtype, shape and
place of every tensor, and metadata), and the tensors' bytes, which follow each other without gaps.

A tensor of a dtype that NumPy lacks (8-bit floats, say) is a RawTensor. So is one of uint16, which stands for bfloat16
in Paddle's arrays.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ._unpickling import FormatError, are_counts, is_shape, shown_name
from .checkpoint import CheckpointError

# The dtypes of .safetensors: bits of an element, and NumPy's dtype where there is one.
_DTYPES: dict[str, tuple[int, str | None]] = {
    "F64": (64, "<f8"),
    "F32": (32, "<f4"),
    "F16": (16, "<f2"),
    "BF16": (16, "<u2"),
    "I64": (64, "<i8"),
    "I32": (32, "<i4"),
    "I16": (16, "<i2"),
    "I8": (8, "|i1"),
    "U8": (8, "|u1"),
    "BOOL": (8, "|b1"),
    "C64": (64, "<c8"),
    "U64": (64, None),
    "U32": (32, None),
    "U16": (16, None),
    "F8_E4M3": (8, None),
    "F8_E5M2": (8, None),
    "F8_E8M0": (8, None),
    "F8_E4M3FNUZ": (8, None),
    "F8_E5M2FNUZ": (8, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}
NAMES = {np.dtype(dtype): name for name, (_, dtype) in _DTYPES.items() if dtype is not None}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class RawTensor:
    """A tensor whose dtype NumPy doesn't have; `dtype` is its name in .safetensors."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def is_text(value: Any) -> bool:
    """Whether it is a str without lone surrogates, which only a pickle can hold."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def is_metadata(found: Any) -> bool:
    return isinstance(found, dict) and all(is_text(text) for pair in found.items() for text in pair)


def parse_json(data: bytes) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in items:
            if name in found:
                raise FormatError(f"{shown_name(name)} stands in it twice")
            found[name] = value
        return found

    def number(digits: str) -> float:
        if not math.isfinite(float(digits)):
            raise FormatError(f"expected a finite number in JSON, got {shown_name(digits)}")
        return float(digits)

    def integer(digits: str) -> float:
        # A long one takes Python time with the square of its length. The safetensors library has -0 for no integer.
        return number(digits) if len(digits) > 20 or digits == "-0" else int(digits)

    text = data.decode("utf-8")
    return json.loads(text, object_pairs_hook=pairs, parse_int=integer, parse_float=number, parse_constant=number)


def read(path: Path) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Returns read-only arrays and metadata. Raises FormatError for what the safetensors library refuses, too."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + header_size > size:
            raise FormatError("its header is not complete")
        if header_size > _MAX_HEADER:
            raise FormatError(f"its header of {header_size} bytes is longer than {_MAX_HEADER}")
        header = parse_json(file.read(header_size))
        if not isinstance(header, dict):
            raise FormatError("its header is no JSON object")
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not is_metadata(metadata):
            raise FormatError("expected its metadata to be strings by name")
        entries = {name: _entry(name, entry) for name, entry in header.items()}
        _check_places(entries, size - 8 - header_size)
        arrays = {name: _read_tensor(file, 8 + header_size, *entry) for name, entry in entries.items()}
    return arrays, metadata


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's dtype, shape and place."""
    if not isinstance(entry, dict):
        raise FormatError(f"{shown_name(name)}: expected dtype, shape and data_offsets")
    dtype, shape, place = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise FormatError(f"{shown_name(name)}: expected a dtype of .safetensors, got {shown_name(str(dtype)[:200])}")
    if not isinstance(shape, list) or not is_shape(tuple(shape)):
        raise FormatError(f"{shown_name(name)}: its shape is none that an array can have")
    if not isinstance(place, list) or len(place) != 2 or not are_counts(place) or place[0] > place[1]:
        raise FormatError(f"{shown_name(name)}: its data_offsets are no range")
    begin, end = place
    bits = math.prod(shape) * _DTYPES[dtype][0]
    if bits != 8 * (end - begin):
        raise FormatError(
            f"{shown_name(name)}: {dtype} of shape {shape} takes {bits / 8:g} bytes, but it has {end - begin}"
        )
    return dtype, tuple(shape), begin, end


def _check_places(entries: dict[str, tuple[str, tuple[int, ...], int, int]], size: int) -> None:
    """Checks that the tensors cover each byte after the header once."""
    covered = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if end > size:
            raise FormatError(f"{shown_name(name)} lies beyond its end")
        if begin != covered:
            raise FormatError(
                f"{shown_name(name)} {'overlaps another tensor' if begin < covered else 'stands after a gap'}"
            )
        covered = end
    if covered != size:
        raise FormatError(f"{size - covered} bytes stand after its last tensor")


def _read_tensor(file: BinaryIO, start: int, dtype: str, shape: tuple[int, ...], begin: int, end: int) -> Any:
    file.seek(start + begin)
    data, numpy = file.read(end - begin), _DTYPES[dtype][1]
    if len(data) != end - begin:
        raise FormatError("it became shorter while it was read")
    if numpy is None:
        return RawTensor(dtype, shape, data)
    return np.frombuffer(data, numpy).reshape(shape) if data else np.empty(shape, numpy)


def write(file: BinaryIO, arrays: dict[str, Any], metadata: dict[str, str] | None) -> None:
    """Writes a file's content. Raises CheckpointError for what the format can't hold."""
    header: dict[str, Any] = {}
    if metadata is not None:
        header["__metadata__"] = metadata
    begin = 0
    tensors = []
    for name, value in arrays.items():
        if name == "__metadata__":
            raise CheckpointError(f"{name}: can't be stored in .safetensors, which has something else by this name")
        if isinstance(value, RawTensor):
            dtype, shape, data = value.dtype, value.shape, value.data
        elif isinstance(value, np.ndarray) and value.dtype in NAMES:
            dtype, shape, data = NAMES[value.dtype], value.shape, np.ascontiguousarray(value)
        else:
            kind = str(value.dtype) if isinstance(value, np.ndarray) else type(value).__name__
            raise CheckpointError(f"{shown_name(name)}: a value of type {kind} can't be stored in .safetensors")
        tensors.append((name, dtype, shape, data))
    # Larger elements first, so that every tensor is aligned.
    tensors.sort(key=lambda tensor: (-_DTYPES[tensor[1]][0], tensor[0]))
    for name, dtype, shape, data in tensors:
        end = begin + memoryview(data).nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _MAX_HEADER:
        raise CheckpointError(
            f"a header of {len(encoded)} bytes can't be stored in .safetensors: its names are too long"
        )
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)
    for _, _, _, data in tensors:
        file.write(data)
