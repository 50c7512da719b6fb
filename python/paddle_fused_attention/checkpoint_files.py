"""Reads and writes checkpoints, .pdparams and .safetensors, as NumPy arrays by name; bfloat16 is uint16, as Paddle has it.

A .safetensors file is eight bytes with the length of a header, the header in JSON (dtype, shape and place of every tensor)
and the tensors' bytes. What has no place in NumPy (8-bit floats, say) is passed on as it is.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import paddle

from .checkpoint import CheckpointError

SUFFIXES = (".pdparams", ".safetensors")

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}
_DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class RawTensor:
    """A tensor of a .safetensors file whose dtype NumPy doesn't have."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass
class Checkpoint:
    """``arrays``: NumPy arrays by name, and whatever else the file holds. ``metadata``: of a .safetensors file. ``layout``: what the
    file tells of how linear layers store their weights, "in-out" or "out-in"; None: nothing."""

    arrays: dict[str, Any]
    metadata: dict[str, str] | None = None
    layout: str | None = None


def check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")


def check_target(path: Path) -> None:
    check_suffix(path)
    # paddle.save would make the folder.
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: can't be written: no such folder")


def read(path: Path) -> Checkpoint:
    """Raises CheckpointError where the file is not there, or is not a checkpoint."""
    check_suffix(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pdparams(path)
    except CheckpointError:
        raise
    except MemoryError:
        raise CheckpointError(f"{path}: not enough memory to read it") from None
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: can't be read as {path.suffix}: {first_line}") from error


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Writes the whole file or none: what stood at `path` is replaced only when the new file is complete."""
    check_target(path)
    try:
        with _replacing(path) as partial:
            if path.suffix == ".safetensors":
                _write_safetensors(partial, checkpoint)
            else:
                _write_pdparams(partial, checkpoint)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written: {error.strerror or error}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if partial.exists():
            partial.unlink()


def _read_pdparams(path: Path) -> Checkpoint:
    loaded = paddle.load(str(path))
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: expected a state dict, got {type(loaded).__name__}")
    arrays = {name: value.numpy() if isinstance(value, paddle.Tensor) else value for name, value in loaded.items()}
    return Checkpoint(arrays, layout="in-out")


def _write_pdparams(path: Path, checkpoint: Checkpoint) -> None:
    values = {}
    for name, value in checkpoint.arrays.items():
        if isinstance(value, RawTensor):
            raise CheckpointError(f"{name}: a tensor of dtype {value.dtype} can't be stored in .pdparams")
        values[name] = paddle.to_tensor(value, place=paddle.CPUPlace()) if isinstance(value, np.ndarray) else value
    paddle.save(values, str(path))


def _read_safetensors(path: Path) -> Checkpoint:
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        start = 8 + header_size
        if size < 8 or start > size:
            raise CheckpointError(f"{path}: can't be read as .safetensors: its header is not complete")
        header = json.loads(file.read(header_size))
        metadata = header.pop("__metadata__", None)
        arrays: dict[str, Any] = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= size - start:
                raise CheckpointError(f"{path}: can't be read as .safetensors: {name} lies beyond its end")
            file.seek(start + begin)
            data, shape = file.read(end - begin), tuple(entry["shape"])
            dtype = _DTYPES.get(entry["dtype"])
            arrays[name] = (
                RawTensor(entry["dtype"], shape, data) if dtype is None else np.frombuffer(data, dtype).reshape(shape)
            )
    layout = (metadata or {}).get("paddle_fused_attention.layout", "out-in" if (metadata or {}).get("format") == "pt" else None)
    return Checkpoint(arrays, metadata, layout)


def _write_safetensors(path: Path, checkpoint: Checkpoint) -> None:
    header: dict[str, Any] = {}
    if checkpoint.metadata is not None:
        header["__metadata__"] = checkpoint.metadata
    begin = 0
    tensors = []
    for name, value in checkpoint.arrays.items():
        if isinstance(value, RawTensor):
            dtype, shape, data = value.dtype, value.shape, value.data
        elif isinstance(value, np.ndarray) and value.dtype in _DTYPE_NAMES:
            dtype, shape, data = _DTYPE_NAMES[value.dtype], value.shape, np.ascontiguousarray(value)
        else:
            kind = str(value.dtype) if isinstance(value, np.ndarray) else type(value).__name__
            raise CheckpointError(f"{name}: a value of type {kind} can't be stored in .safetensors")
        tensors.append((name, dtype, shape, data))
    # Larger elements first, so that every tensor is aligned.
    tensors.sort(key=lambda tensor: (-getattr(tensor[3], "itemsize", 1), tensor[0]))
    for name, dtype, shape, data in tensors:
        end = begin + memoryview(data).nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for _, _, _, data in tensors:
            file.write(data)
