"""What torch.save writes is read without PyTorch, and files of that form that lie are refused."""

import struct
import zipfile

import numpy as np
import pytest
from file_bytes import DATA, DTYPES, FLOATS, number, refused, same, text, torch_floats, torch_tensor, torch_zip
from paddle_fused_attention.checkpoint_files import RawTensor, read

TORCH = {
    "parameter": np.array([[1, -2], [0.5, 3]], "float32"),
    "tied_a": np.arange(4, dtype="float32").reshape(2, 2),
    "tied_b": np.arange(4, dtype="float32").reshape(2, 2),
    "view": np.arange(2, 8, dtype="float32").reshape(2, 3),
    "transposed": np.ascontiguousarray(np.arange(12, dtype="float32").reshape(3, 4).T),
    "strided": np.arange(1, 12, 3, dtype="float32"),
    "expanded": np.full((2, 3), 7, "float32"),
    "scalar": np.array(2.5, "float32"),
    "empty": np.zeros((0, 3), "float32"),
    "uint16": RawTensor("U16", (2,), b"\x01\x00\xff\xff"),
    "float8": RawTensor("F8_E4M3", (2, 2), b"\x38\x30\xc0\x7e"),
    "epoch": 3,
    **{name: np.arange(4).astype(name) for name in DTYPES if name not in ("float32", "bfloat16", "bool")},
    "bfloat16": np.array([0, 0x3F80, 0x4000, 0x4040], "uint16"),
    "bool": np.array([False, True, True, True]),
}


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
@pytest.mark.parametrize("name", ["torch_zip.bin", "torch_legacy.bin"])
def test_what_torch_saves(name, suffix, tmp_path):
    """Written by PyTorch 2.13, see data/make_torch_files.py."""
    path = tmp_path / f"model{suffix}"
    path.write_bytes((DATA / name).read_bytes())
    found = read(path)
    assert found.metadata is None and found.layout == "out-in" and sorted(found.arrays) == sorted(TORCH)
    for key, value in TORCH.items():
        same(found.arrays[key], value) if not isinstance(value, RawTensor) else same(
            vars(found.arrays[key]), vars(value)
        )
    arrays = [value for value in found.arrays.values() if isinstance(value, np.ndarray)]
    assert all(array.flags["C_CONTIGUOUS"] for array in arrays)
    for i, array in enumerate(arrays):
        assert not any(np.shares_memory(array, other) for other in arrays[:i]), i


def test_torch_tensors_that_lie(tmp_path):
    """Tensors beyond their storage, storages that are not there or of another size, archives that are not torch's."""
    path = tmp_path / "a.bin"
    data = FLOATS.tobytes()
    same(read(torch_floats(path, "w")).arrays, {"w": FLOATS.reshape(2, 3)})
    for tensor in (
        torch_tensor("k", 6, 1, (2, 3), (3, 1)),
        torch_tensor("k", 6, 0, (2, 3), (4, 1)),
        torch_tensor("k", 6, 7, (0,), (1,)),
        torch_tensor("k", 6, 0, (2**40, 2**40), (0, 2**62)),
    ):
        refused(torch_zip(path, {"w": tensor}, k=data), "tensor")
    for offset, shape, strides in (
        (-1, (2,), (1,)),
        (5, (2,), (-1,)),
        (0, (-2,), (1,)),
        (0, (2, 3), (3,)),
        (0, (2**62, 4), (0, 0)),
    ):
        refused(
            torch_zip(path, {"w": torch_tensor("k", 6, offset, shape, strides)}, k=data), "shape, offset or strides"
        )
    refused(torch_zip(path, {"w": torch_tensor("k", 2**62, 0, (6,), (1,))}, k=data), "storage is not as expected")
    refused(
        torch_zip(path, {"w": torch_tensor("k", 6, 0, (6,), (1,))}, k=data[:-1]), "archive/data/k has 23 bytes, not 24"
    )
    refused(torch_zip(path, {"w": torch_tensor("../k", 6, 0, (6,), (1,))}, k=data), "no member archive/data/../k")
    other = {"a": torch_tensor("k", 6, 0, (6,), (1,)), "b": torch_tensor("k", 6, 0, (3,), (1,), "DoubleStorage")}
    refused(torch_zip(path, other, k=data), "two sizes")
    refused(torch_zip(path, {"w": torch_tensor("k", 6, 0, (6,), (1,))}, zipfile.ZIP_DEFLATED, k=data), "compressed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other/thing", b"")
    refused(path, "no data.pkl")
    torch_floats(path, "w")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants.pkl", b"")
    refused(path, "TorchScript")
    torch_floats(path, "w")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", b"big")
    refused(path, "not little-endian")
    torch_floats(path, "w")
    broken = bytearray(path.read_bytes())
    broken[-6:-2] = struct.pack("<I", len(broken))  # where the list of members begins
    path.write_bytes(broken)
    refused(path, "can't be read as .bin")
    torch_floats(path, "w")
    path.write_bytes(path.read_bytes().replace(FLOATS.tobytes(), FLOATS[::-1].tobytes()))
    refused(path)


def test_torch_tensors_of_many_dimensions(tmp_path):
    """Strides whose product is beyond 64 bits."""
    shape, strides = (2, 1, 3, 1, 1), (3, 2**40, 1, 2**50, 2**59)
    path = torch_zip(tmp_path / "a.bin", {"w": torch_tensor("k", 6, 0, shape, strides)}, k=FLOATS.tobytes())
    same(read(path).arrays["w"], FLOATS.reshape(shape))


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_training_checkpoints_of_torch(key, tmp_path):
    """Tensors a level further down: which of them is the model is not for the reader to guess."""
    inner = b"}" + text("w") + torch_tensor("k", 6, 0, (6,), (1,)) + b"s"
    path = torch_zip(tmp_path / "a.pt", {"epoch": number(3), key: inner}, k=FLOATS.tobytes())
    refused(path, f"a dict whose {key} holds tensors", f"it has epoch, {key}")
