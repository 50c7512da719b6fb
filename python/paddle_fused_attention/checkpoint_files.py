"""Reads and writes checkpoints as NumPy arrays by name; bfloat16 is uint16, as Paddle has it.

It reads Paddle's .pdparams, .safetensors, PyTorch's .bin, .pt and .pth, and the indices of checkpoints in several files
of these kinds. It writes .pdparams and .safetensors. `_unpickling` reads pickles and runs nothing that stands in them.

What NumPy can't hold (8-bit floats, say) is passed on as it is. The metadata of a .safetensors file goes into
.pdparams as a second pickle behind Paddle's own: paddle.load reads the first one and stops.
"""

from __future__ import annotations

import math
import os
import pickle
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Iterator

import numpy as np
import paddle

from . import _safetensors_files, _torch_files, whole_files
from ._checks import check_switches, shown
from ._namings import LAYOUTS
from ._safetensors_files import RawTensor, is_metadata, is_text, parse_json
from ._types import Layout
from ._unpickling import Budget, FormatError, Unpickler, is_shape, resolve, shown_name
from .checkpoint import METADATA, METADATA_LAYOUT, CheckpointError

SUFFIXES = (".pdparams", ".safetensors")
TORCH_SUFFIXES = (".bin", ".pt", ".pth")
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json", ".pdparams.index.json")

_PADDLE_DTYPES = {np.dtype(dtype) for dtype in ("<c16", *_safetensors_files.NAMES)}
_NAME_TABLE = "StructuredToParameterName@@"
_BIG_TABLE = "UnpackBigParamInfor@@"
_METADATA = "paddle_fused_attention.metadata"

# "np" tells nothing: PaddleNLP writes it into files in Paddle's layout, others into files in PyTorch's.
_LAYOUT_OF_FORMAT: dict[str, Layout] = {"pt": "out-in", "pd": "in-out", "paddle": "in-out"}

__all__ = [
    "SUFFIXES",
    "Checkpoint",
    "CheckpointError",
    "RawTensor",
    "TargetExists",
    "check_suffix",
    "check_target",
    "load_state",
    "read",
    "write",
]


@dataclass
class Checkpoint:
    """A state dict as it lies in a file.

    Attributes:
        arrays: NumPy arrays by name, RawTensors, and whatever else the file holds. Arrays may be read-only.
        metadata: of a .safetensors file, also after it went through .pdparams.
        layout: how the file says that the weights of linear layers are stored: "in-out" (Paddle), "out-in" (PyTorch);
            None: not at all. `write` does not store it.
    """

    arrays: dict[str, Any]
    metadata: dict[str, str] | None = None
    layout: Layout | None = None


def check_suffix(path: Path) -> None:
    """Checks that files of this kind can be written."""
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")


class TargetExists(CheckpointError):
    """There is a file, and it is not to be replaced."""


def check_target(path: Path, replace: bool = True) -> None:
    """Checks that a file of this kind can be put there, before it is made."""
    check_suffix(path)
    with _errors_of_writing(path):
        whole_files.check_target(path, replace)


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint of any known kind, by its suffix.

    Raises:
        TypeError: path is no path.
        CheckpointError: The file is not there, is no checkpoint, is not complete, or asks for code to be run.
    """
    path = _checked_path(path)
    if path.name.endswith(INDEX_SUFFIXES):
        with _errors_in_one_line(path, ".index.json"):
            return _read_index(path)
    if path.suffix not in (*SUFFIXES, *TORCH_SUFFIXES):
        known = ", ".join((*SUFFIXES, *TORCH_SUFFIXES))
        raise CheckpointError(f"{path}: expected a name that ends in {known} or .index.json")
    with _errors_in_one_line(path, path.suffix):
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return _read_pdparams(path) if path.suffix == ".pdparams" else _read_torch(path)


def load_state(path: Path, return_numpy: bool = False) -> Any:
    """Reads a file of ``paddle.save`` as ``paddle.load`` does in dygraph, but runs nothing that stands in it.

    Args:
        path: A file of any suffix, with tensors, numbers and strings in dicts, lists, tuples and sets, such as state
            dicts.
        return_numpy: NumPy arrays, read-only, for tensors.

    Raises:
        TypeError: An argument is of the wrong type.
        CheckpointError: As in :func:`read`.
    """
    path = _checked_path(path)
    check_switches(return_numpy=return_numpy)
    with _errors_in_one_line(path, "a file of paddle.save"):
        return _as_paddle(_read_pickles(path)[0], return_numpy)


def write(path: Path, checkpoint: Checkpoint, replace: bool = True) -> None:
    """Writes the whole file or none: what stood at `path` is replaced only when the new file is complete.

    Raises:
        TypeError: An argument is of the wrong type.
        TargetExists: `replace` is False and a file stands there; a CheckpointError.
        CheckpointError: The kind of file can't hold a value, or the file can't be written.
    """
    path = _checked_path(path)
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(f"checkpoint: expected a Checkpoint, got {type(checkpoint).__name__}")
    check_suffix(path)
    _checked_names(checkpoint.arrays, path)
    if checkpoint.metadata is not None and not is_metadata(checkpoint.metadata):
        raise CheckpointError(f"{path}: expected metadata that is strings by name")
    write_content = _write_safetensors if path.suffix == ".safetensors" else _write_pdparams
    with _errors_of_writing(path):
        whole_files.write_whole(path, lambda file: write_content(file, checkpoint), replace)


def _checked_path(path: Any) -> Path:
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str) or "\0" in text:
        raise TypeError(f"path: expected a str or a Path, got {shown(path)}")
    return Path(text)


@contextmanager
def _errors_in_one_line(path: Path, kind: str) -> Iterator[None]:
    """Turns whatever goes wrong with a file's content into a CheckpointError of one line that names the file."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        yield
    except CheckpointError:
        raise
    except MemoryError:
        raise CheckpointError(f"{path}: not enough memory to read it") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error
    except FormatError as error:
        raise CheckpointError(f"{path}: can't be read as {kind}: {error}") from None
    except Exception as error:  # a file that is no checkpoint fails in many ways
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: can't be read as {kind}: {shown_name(first_line)}") from error


@contextmanager
def _errors_of_writing(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise TargetExists(f"{path}: exists already") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written: {error.strerror or error}") from error
    except MemoryError:
        raise CheckpointError(f"{path}: not enough memory to write it") from None


def _layout(metadata: dict[str, str] | None, of_kind: Layout | None) -> Layout | None:
    own: Any = (metadata or {}).get(METADATA_LAYOUT)
    if own is not None and own not in LAYOUTS:
        raise FormatError(
            f"expected {METADATA_LAYOUT} to be {' or '.join(LAYOUTS)} in its metadata, got {shown_name(own)}"
        )
    return own or of_kind


def _checked_names(found: Any, path: Path) -> dict[str, Any]:
    """`found`, if it is a dict by names."""
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a state dict, got {type(found).__name__}")
    for name in found:
        if not is_text(name):
            got = shown_name(name) if isinstance(name, str) else type(name).__name__
            raise CheckpointError(f"{path}: expected a state dict, got a dict with a key that is no text: {got}")
    return found


# Paddle


def _read_pickles(path: Path) -> tuple[Any, dict[str, str] | None]:
    """What paddle.save pickled, with arrays for tensors, and the metadata behind it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        budget = Budget(size)
        pickles = Unpickler(file, size, budget)
        value = resolve(pickles.load(), budget)
        metadata = None
        if file.tell() < size:
            behind = resolve(pickles.load(), budget)
            metadata = behind.get(_METADATA) if isinstance(behind, dict) else None
            if not is_metadata(metadata) or file.tell() < size:
                raise FormatError("more stands after its state dict")
    return _with_slices_joined(value), metadata


def _with_slices_joined(value: Any) -> Any:
    """Joins arrays that Paddle divided, since each holds at most 4 GB in pickles of protocols 2 and 3."""
    if not isinstance(value, dict) or _BIG_TABLE not in value:
        return value
    table = value.pop(_BIG_TABLE)
    for name, entry in table.items() if isinstance(table, dict) else [("", None)]:
        entry = entry if isinstance(entry, dict) else {}
        parts: Any = entry.get("slices")
        shape: Any = entry.get("OriginShape")
        slices = [value.pop(part, None) for part in parts] if isinstance(parts, list) and parts else [None]
        good = is_shape(shape) and all(isinstance(part, np.ndarray) and part.ndim == 1 for part in slices)
        if not good or sum(part.size for part in slices) != math.prod(shape):
            raise FormatError(f"its array {shown_name(str(name))} is not divided as paddle.save does it")
        value[name] = np.concatenate(slices).reshape(shape)
    return value


def _as_paddle(value: Any, return_numpy: bool) -> Any:
    """Makes tensors of the arrays that were tensors.

    Paddle pickles a state dict of tensors alone as arrays with a table of the parameters' names. In anything else a
    tensor is a pair of name and array, or an array if it is from a static graph or from Paddle 2.0.
    """
    if isinstance(value, dict) and isinstance(value.get(_NAME_TABLE), dict):
        names = value.pop(_NAME_TABLE)
        for key, name in names.items():
            if isinstance(value.get(key), np.ndarray):
                value[key] = _tensor(value[key], name, return_numpy)
        return value
    pairs = _any_inside(value, _is_name_and_array)
    done: dict[int, Any] = {}

    def visit(value: Any) -> Any:
        if _is_name_and_array(value):
            return _tensor(value[1], value[0], return_numpy)
        if isinstance(value, np.ndarray):
            return value if pairs else _tensor(value, None, return_numpy)
        if not isinstance(value, (dict, list, tuple)):
            return value
        if id(value) not in done:
            if isinstance(value, dict):
                for key in value:
                    value[key] = visit(value[key])
                done[id(value)] = (value, value)
            elif isinstance(value, list):
                value[:] = [visit(element) for element in value]
                done[id(value)] = (value, value)
            else:
                done[id(value)] = (value, tuple(visit(element) for element in value))
        return done[id(value)][1]

    return visit(value)


def _is_name_and_array(value: Any) -> bool:
    return (
        isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], np.ndarray)
    )


def _any_inside(value: Any, condition: Any) -> bool:
    """Whether the condition holds for the value or one inside it. Each container is looked into once."""
    seen: set = set()
    left = [value]
    while left:
        value = left.pop()
        if condition(value):
            return True
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, dict) else value)
    return False


def _tensor(array: np.ndarray, name: Any, return_numpy: bool) -> Any:
    if return_numpy:
        return array
    tensor = paddle.to_tensor(array)
    if isinstance(name, str) and name:
        tensor.name = name
    return tensor


def _read_pdparams(path: Path) -> Checkpoint:
    found, metadata = _read_pickles(path)
    return Checkpoint(_checked_names(_as_paddle(found, return_numpy=True), path), metadata, _layout(metadata, "in-out"))


def _write_pdparams(file: BinaryIO, checkpoint: Checkpoint) -> None:
    """Writes as paddle.save does. A tensor's own name is the one that it has in the checkpoint."""
    values = checkpoint.arrays
    for name in (_NAME_TABLE, _BIG_TABLE):
        if name in values:
            raise CheckpointError(f"{name}: can't be stored in .pdparams, where Paddle has something else by this name")
    named = {name: _with_names(name, value) for name, value in values.items()}
    if all(isinstance(value, np.ndarray) for value in values.values()):
        named = {**values, _NAME_TABLE: {name: name for name in values}}
    pickle.dump(named, file, protocol=4)
    if checkpoint.metadata is not None:
        pickle.dump({_METADATA: dict(checkpoint.metadata)}, file, protocol=4)


def _with_names(name: str, value: Any) -> Any:
    """The value, with a pair of name and array for each array in it. Refuses what paddle.load would refuse."""
    done: dict[int, Any] = {}

    def visit(value: Any) -> Any:
        if isinstance(value, RawTensor) or (isinstance(value, np.ndarray) and value.dtype not in _PADDLE_DTYPES):
            raise CheckpointError(f"{shown_name(name)}: a tensor of dtype {value.dtype} can't be stored in .pdparams")
        if id(value) in done:
            return done[id(value)]
        if isinstance(value, np.ndarray):
            done[id(value)] = (name, value)
        elif isinstance(value, dict):
            done[id(value)] = type(value)((key, visit(element)) for key, element in value.items())
        elif isinstance(value, (list, tuple)):
            done[id(value)] = type(value)(visit(element) for element in value)
        elif isinstance(value, (str, int, float, complex, set, np.generic, type(None))):
            return value
        else:
            raise CheckpointError(
                f"{shown_name(name)}: a value of type {type(value).__name__} can't be stored in .pdparams"
            )
        return done[id(value)]

    return visit(value)


# PyTorch


def _read_torch(path: Path) -> Checkpoint:
    with open(path, "rb") as file:
        found = _checked_names(_torch_files.read(file, path.stat().st_size), path)

    def is_tensor(value: Any) -> bool:
        return isinstance(value, (np.ndarray, RawTensor))

    for name, value in found.items():
        if not is_tensor(value) and _any_inside(value, is_tensor):
            keys = ", ".join(shown_name(name) for name in list(found)[:10]) + (", ..." if len(found) > 10 else "")
            raise CheckpointError(
                f"{path}: expected tensors by name, got a dict whose {shown_name(name)} holds tensors (it has {keys}): "
                "save that alone"
            )
    return Checkpoint(found, layout="out-in")


# safetensors


def _read_safetensors(path: Path) -> Checkpoint:
    arrays, metadata = _safetensors_files.read(path)
    return Checkpoint(
        _checked_names(arrays, path),
        metadata,
        _layout(metadata, _LAYOUT_OF_FORMAT.get((metadata or {}).get("format", ""))),
    )


def _write_safetensors(file: BinaryIO, checkpoint: Checkpoint) -> None:
    _safetensors_files.write(file, checkpoint.arrays, checkpoint.metadata)


# Several files


def _read_index(path: Path) -> Checkpoint:
    """Reads the tensors that an index names, each from the file that it says, in the index's order."""
    index = parse_json(path.read_bytes())
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not is_metadata(places):
        raise FormatError("expected a weight_map of file names by tensors' names")
    for shard in places.values():
        if shard != os.path.basename(shard) or "\\" in shard or "\0" in shard:
            raise FormatError(f"its file {shown_name(shard)} is not in the index's own folder")
        if Path(shard).suffix not in (*SUFFIXES, *TORCH_SUFFIXES):
            raise FormatError(f"its file {shown_name(shard)} is of no kind that can be read")
    read_shards = {shard: read(path.with_name(shard)) for shard in dict.fromkeys(places.values())}
    for shard, found in read_shards.items():
        expected = {name for name, place in places.items() if place == shard}
        for name in sorted(expected.symmetric_difference(found.arrays)):
            what = "is missing in" if name in expected else "is not in its weight_map, but in"
            raise FormatError(f"{shown_name(name)} {what} {shown_name(shard)}")
    metadata = _common_metadata([found.metadata for found in read_shards.values()])
    layouts = {found.layout for found in read_shards.values() if found.layout is not None}
    if len(layouts) > 1:
        raise FormatError("its files disagree about the layout of linear layers' weights")
    arrays = {name: read_shards[shard].arrays[name] for name, shard in places.items()}
    return Checkpoint(arrays, metadata, layouts.pop() if layouts else None)


def _common_metadata(each: list[dict[str, str] | None]) -> dict[str, str] | None:
    """The metadata of all files together, without entries that differ between them."""
    merged: dict[str, str] = {}
    different: set = set()
    for metadata in each:
        for name, text in (metadata or {}).items():
            if merged.setdefault(name, text) != text:
                if name == "format" or name.startswith(METADATA):
                    raise FormatError(f"its files disagree about {shown_name(name)} in their metadata")
                different.add(name)
    if all(metadata is None for metadata in each):
        return None
    return {name: text for name, text in merged.items() if name not in different}
