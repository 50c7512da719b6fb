"""Reads what torch.save writes, without PyTorch: tensors by name out of the zip format and the one before PyTorch 1.6.

Both are a pickle in which a tensor is a function's name with a storage, an offset, a shape and strides; a storage is a
persistent id. Its bytes are a member of the zip archive, or stand after the pickles, each after its length.
"""

from __future__ import annotations

import errno
import io
import math
import zipfile
from dataclasses import dataclass
from typing import Any, BinaryIO, Callable

import numpy as np

from ._safetensors_files import RawTensor
from ._unpickling import Budget, FormatError, Global, Unpickler, Unresolved, are_counts, is_shape, resolve, shown_name

_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# Each dtype in NumPy, and its name in .safetensors if NumPy lacks it or means another one.
_DTYPES = {
    "float64": ("<f8", None),
    "float32": ("<f4", None),
    "float16": ("<f2", None),
    "bfloat16": ("<u2", None),
    "int64": ("<i8", None),
    "int32": ("<i4", None),
    "int16": ("<i2", None),
    "int8": ("|i1", None),
    "uint8": ("|u1", None),
    "bool": ("|b1", None),
    "complex64": ("<c8", None),
    "complex128": ("<c16", None),
    "uint16": ("<u2", "U16"),
    "uint32": ("<u4", "U32"),
    "uint64": ("<u8", "U64"),
    "float8_e4m3fn": ("|u1", "F8_E4M3"),
    "float8_e5m2": ("|u1", "F8_E5M2"),
    "float8_e4m3fnuz": ("|u1", "F8_E4M3FNUZ"),
    "float8_e5m2fnuz": ("|u1", "F8_E5M2FNUZ"),
    "float8_e8m0fnu": ("|u1", "F8_E8M0"),
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}


class _Kind(Global):
    """Stands for a storage's type or a dtype."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: str) -> None:
        super().__init__(self._is_no_function)
        self.dtype = dtype

    @staticmethod
    def _is_no_function(*_: Any) -> None:
        raise FormatError("it calls a dtype or a type of storage")


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    size: int  # in elements

    @property
    def bytes(self) -> int:
        return self.size * np.dtype(_DTYPES[self.dtype][0]).itemsize


class _Tensor(Unresolved):
    __slots__ = ("dtype", "offset", "shape", "storage", "strides")

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: str) -> None:
        self.storage, self.offset, self.shape, self.strides, self.dtype = storage, offset, shape, strides, dtype
        good = is_shape(shape) and are_counts([offset]) and are_counts(strides) and len(shape) == len(strides)
        if not good or not isinstance(storage, _Storage):
            raise FormatError("a tensor's shape, offset or strides are not as expected")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) if 0 not in shape else offset - 1
        if (last + 1) * self.itemsize > storage.bytes:
            raise FormatError(f"a tensor of shape {list(shape)} lies beyond the end of its storage")

    @property
    def itemsize(self) -> int:
        return np.dtype(_DTYPES[self.dtype][0]).itemsize

    def fill(self, data: bytes, shared: bool, budget: Budget) -> None:
        """Sets the value: an array on `data` if this tensor alone uses all of it, else a copy."""
        dtype, raw = _DTYPES[self.dtype]
        size = math.prod(self.shape)
        budget.take(size * self.itemsize)
        found = np.frombuffer(data, dtype, len(data) // self.itemsize) if data else np.empty(0, dtype)
        if size == 0:
            found = np.empty(self.shape, dtype)
        else:
            strides = [stride * self.itemsize for stride in self.strides]
            found = np.lib.stride_tricks.as_strided(found[self.offset :], self.shape, strides, writeable=False)
            if shared or size != len(data) // self.itemsize or not found.flags["C_CONTIGUOUS"]:
                found = found.copy(order="C")
        self.value = found if raw is None else RawTensor(raw, self.shape, found.tobytes())


def _globals(tensors: list[_Tensor]) -> dict[str, Global]:
    def tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str) -> _Tensor:
        tensors.append(_Tensor(storage, offset, shape, strides, dtype))
        return tensors[-1]

    def version_1(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
        return tensor(storage, offset, shape, strides, getattr(storage, "dtype", "uint8"))

    def version_2(
        storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, metadata: Any = None
    ) -> _Tensor:
        if metadata:
            raise FormatError("it has a tensor that is to be conjugated or negated")
        return version_1(storage, offset, shape, strides)

    def version_3(
        storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
    ) -> _Tensor:
        if metadata or not isinstance(dtype, _Kind):
            raise FormatError("a tensor's dtype is not as expected")
        return tensor(storage, offset, shape, strides, dtype.dtype)

    def parameter(data: Any, *_: Any) -> Any:
        return data

    def size(values: Any) -> tuple:
        if not is_shape(values):
            raise FormatError("a torch.Size is not as expected")
        return values

    found: dict[str, Global] = {
        "torch._utils._rebuild_tensor": Global(version_1),
        "torch._utils._rebuild_tensor_v2": Global(version_2),
        "torch._utils._rebuild_tensor_v3": Global(version_3),
        "torch._utils._rebuild_parameter": Global(parameter),
        "torch._utils._rebuild_parameter_with_state": Global(parameter),
        "torch.Size": Global(size),
    }
    for name, dtype in _STORAGES.items():
        for module in ("torch", "torch.cuda", "torch.storage"):
            found[f"{module}.{name}"] = _Kind(dtype)
    for dtype in _DTYPES:
        found[f"torch.{dtype}"] = _Kind(dtype)
    return found


def _storage(parts: Any) -> _Storage:
    if not isinstance(parts, tuple) or len(parts) < 5 or parts[0] != "storage" or not isinstance(parts[1], _Kind):
        raise FormatError("its pickle refers to something other than a storage")
    _, kind, key, _, size, *view = parts
    if not isinstance(key, str) or not are_counts([size]) or any(part is not None for part in view):
        raise FormatError("a storage is not as expected")
    return _Storage(key, kind.dtype, size)


def _fill(tensors: list[_Tensor], read: Callable[[_Storage], bytes], budget: Budget) -> None:
    """Reads every storage once, and lets it go with its last tensor."""
    by_storage: dict[str, list[_Tensor]] = {}
    for tensor in tensors:
        by_storage.setdefault(tensor.storage.key, []).append(tensor)
    for users in by_storage.values():
        if len({tensor.storage.bytes for tensor in users}) > 1:
            raise FormatError(f"its storage {shown_name(users[0].storage.key)} has two sizes")
        data = read(users[0].storage)
        for tensor in users:
            tensor.fill(data, len(users) > 1, budget)


def read(file: BinaryIO, size: int) -> Any:
    """What torch.save was given: NumPy arrays and RawTensors for tensors, each with memory of its own; plain values."""
    budget = Budget(size)
    start = file.read(4)
    file.seek(0)
    if start != b"PK\x03\x04":
        return _read_legacy(file, size, budget)
    try:
        return _read_zip(file, budget)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise FormatError("its archive names a place before its start") from None


def _read_zip(file: BinaryIO, budget: Budget) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise FormatError("its archive has two members of one name")
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise FormatError("its archive is not one of torch.save: it has no data.pkl")
        folder = pickles[0][: -len("data.pkl")]
        if f"{folder}constants.pkl" in members:
            raise FormatError("it is a TorchScript program, not tensors by name")

        def content(name: str, expected: int | None = None) -> bytes:
            info = members.get(folder + name)
            if info is None:
                raise FormatError(f"its archive has no member {shown_name(folder + name)}")
            # Paddle 2.6 holds another zlib, in which Python's module crashes when it inflates.
            if info.compress_type != zipfile.ZIP_STORED:
                raise FormatError(f"its member {shown_name(info.filename)} is compressed, which torch.save does not do")
            if expected is not None and info.file_size != expected:
                raise FormatError(f"its member {shown_name(info.filename)} has {info.file_size} bytes, not {expected}")
            budget.take(info.file_size)
            return archive.read(info)

        if f"{folder}byteorder" in members:
            _check_byte_order(content("byteorder") == b"little")
        tensors: list[_Tensor] = []
        data = content("data.pkl")
        value = Unpickler(io.BytesIO(data), len(data), budget, _globals(tensors), _storage).load()
        _fill(tensors, lambda storage: content(f"data/{storage.key}", storage.bytes), budget)
        return resolve(value, budget)


def _read_legacy(file: BinaryIO, size: int, budget: Budget) -> Any:
    tensors: list[_Tensor] = []
    storages: dict[str, _Storage] = {}

    def persistent(parts: Any) -> _Storage:
        storage = _storage(parts)
        return storages.setdefault(storage.key, storage)

    pickles = Unpickler(file, size, budget, _globals(tensors), persistent)
    if pickles.load() != _MAGIC or pickles.load() != _LEGACY_PROTOCOL:
        raise FormatError("it is not a file of torch.save")
    system = pickles.load()
    _check_byte_order(isinstance(system, dict) and system.get("little_endian") is True)
    value = pickles.load()
    keys = pickles.load()
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise FormatError("its list of storages is not as expected")
    places: dict[str, int] = {}
    for key in keys:
        storage, place = storages[key], file.tell() + 8
        count = int.from_bytes(file.read(8), "little")
        if key in places or count != storage.size or place + storage.bytes > size:
            raise FormatError(f"its storage {shown_name(key)} is not complete")
        places[key] = place
        file.seek(place + storage.bytes)
    if file.tell() != size:
        raise FormatError(f"{size - file.tell()} bytes stand after its last storage")

    def content(storage: _Storage) -> bytes:
        if storage.key not in places:
            raise FormatError(f"its storage {shown_name(storage.key)} is missing")
        file.seek(places[storage.key])
        return file.read(storage.bytes)

    _fill(tensors, content, budget)
    return resolve(value, budget)


def _check_byte_order(is_little: bool) -> None:
    if not is_little:
        raise FormatError("its numbers are not little-endian")
