"""Files of checkpoints: what paddle.save, torch.save and safetensors write is read as it is, and hostile files do no harm."""

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle_fused_attention import _safetensors_files, checkpoint_files
from paddle_fused_attention.checkpoint_files import Checkpoint, CheckpointError, RawTensor, load_state, read, write

DATA = Path(__file__).parents[1] / "data"


def same(found, expected):
    """Types, keys in their order, dtypes, shapes and bits; tensors by their names too."""
    if isinstance(expected, paddle.Tensor):
        assert isinstance(found, paddle.Tensor) and found.dtype == expected.dtype and found.name == expected.name
        found, expected = found.numpy(), expected.numpy()
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            same(one, other)
    elif isinstance(expected, (np.ndarray, np.generic)):
        assert found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()
    else:
        assert found == expected


def refused(path, *words, reader=read):
    """One line that begins with the file's path, without a warning. Returns the message."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError) as raised:
            reader(path)
    message = str(raised.value)
    assert message.startswith(str(path)) and "\n" not in message and message.isprintable() and len(message) < 700
    for word in words:
        assert word in message, message
    return message


# Files of paddle.save


def state_dict():
    paddle.seed(0)
    return paddle.nn.Sequential(paddle.nn.Linear(3, 4), paddle.nn.LayerNorm(4)).state_dict()


def optimizer_state(level=None):
    """With a scheduler of a scheduler; with master weights at level O2."""
    paddle.seed(0)
    model = paddle.nn.Linear(3, 4)
    rate = paddle.optimizer.lr.LinearWarmup(paddle.optimizer.lr.CosineAnnealingDecay(1e-3, 10), 3, 1e-4, 1e-3)
    optimizer = paddle.optimizer.AdamW(rate, parameters=model.parameters())
    model(paddle.ones([2, 3])).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    if level is not None:
        state["master_weights"] = {name: p.astype("float32") for name, p in model.named_parameters()}
    return state


def dense_tensor():
    tensor = paddle.base.core.eager.Tensor(np.arange(3), paddle.CPUPlace())
    KEPT.append(tensor)  # a DenseTensor does not keep it
    return {"a": tensor.value().get_tensor(), "b": 1}


KEPT = []
SAVED = {
    "state dict": state_dict,
    "OrderedDict in a dict": lambda: {"model": OrderedDict(state_dict()), "epoch": 3},
    "optimizer": optimizer_state,
    "optimizer with master weights": lambda: optimizer_state("O2"),
    "both": lambda: {"model": state_dict(), "optimizer": optimizer_state(), "step": 7, "losses": np.arange(3, dtype="float32")},
    "plain values": lambda: {"a": [1, 2.5, None, True, "text", -(10**30)], "b": (1, "x"), "c": {1, 2}, 5: 1 + 2j},
    "empty dict": dict,
    "tensor": lambda: paddle.arange(5),
    "list": lambda: [paddle.ones([2]), {"x": (paddle.zeros([1, 2]), 1)}],
    "arrays": lambda: {"a": np.arange(6).reshape(2, 3), "b": 1},
    "arrays in any order": lambda: [
        np.arange(6.0).reshape(2, 3).T,
        np.asfortranarray(np.ones((2, 3))),
        np.zeros((0, 3)),
        np.array(1),
    ],
    "NumPy numbers": lambda: {"a": np.float32(1.5), "b": np.int64(-3), "c": np.bool_(True)},
    "DenseTensor": dense_tensor,
    "a parameter twice": lambda: (lambda weight: {"a": weight, "b": weight, "c": 1})(paddle.ones([2, 2])),
    "dtypes": lambda: {name: paddle.arange(4).astype(name) for name in DTYPES},
    "dtypes in a list": lambda: [paddle.arange(4).astype(name) for name in DTYPES],
}
DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"]


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("name", SAVED)
@pytest.mark.filterwarnings("ignore:The input state dict is empty")
def test_what_paddle_saves(name, protocol, tmp_path):
    """As paddle.load reads it, tensors or arrays, with the tensors' names."""
    path = tmp_path / "any.checkpoint"
    paddle.save(SAVED[name](), str(path), protocol=protocol)
    # A tensor that Paddle itself does not name gets a new name in every load.
    expected = paddle.load(str(path))
    if name not in ("arrays", "arrays in any order", "DenseTensor"):
        same(load_state(path), expected)
    else:
        assert [type(value) for value in flat(load_state(path))] == [type(value) for value in flat(expected)]
    same(load_state(path, return_numpy=True), paddle.load(str(path), return_numpy=True))


def flat(value):
    values = value.values() if isinstance(value, dict) else value
    return list(values)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_other_versions_of_numpy(protocol, tmp_path):
    """NumPy 1 and 2 pickle arrays by functions of modules of their own."""
    path, other = tmp_path / "a.pdparams", tmp_path / "b.pdparams"
    paddle.save({"w": paddle.arange(3), "number": np.float32(2)}, str(path), protocol=protocol)
    data = path.read_bytes()
    if protocol < 4:
        new = b"numpy._core." in data
        data = data.replace(b"numpy._core.", b"numpy.core.") if new else data.replace(b"numpy.core.", b"numpy._core.")
    else:
        long, short = (b"\x8c" + bytes([len(name)]) + name for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"))
        data = data.replace(long, short) if long in data else data.replace(short, long)
    assert data != path.read_bytes()
    other.write_bytes(data)
    same(load_state(other, return_numpy=True), load_state(path, return_numpy=True))
    assert read(other).arrays["w"].tolist() == [0, 1, 2]


def test_pickles_of_protocol_5(tmp_path):
    path = tmp_path / "a.pdparams"
    state = {"w": np.arange(6, dtype="float32").reshape(2, 3), "f": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    path.write_bytes(pickle.dumps(state, 5))
    same(read(path).arrays, state)


def test_pickles_of_python_2(tmp_path):
    """Strings of bytes, for names and for an array's own."""
    numbers = np.array([1.5, -2.0], "<f4")
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01"
        b"\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08" + numbers.tobytes() + b"tb"
    )
    path = tmp_path / "old.pdparams"
    path.write_bytes(b"\x80\x02}U\x01w" + array + b"s.")
    same(read(path).arrays, {"w": numbers})
    same(read(path).arrays, paddle.load(str(path), return_numpy=True))


def test_numbers_of_another_byte_order(tmp_path):
    path = tmp_path / "a.pdparams"
    path.write_bytes(pickle.dumps({"w": np.arange(3, dtype=">f4"), "n": np.array(5, ">i8")[()]}))
    found = read(path).arrays
    assert found["w"].dtype == np.dtype("float32") and found["w"].tolist() == [0, 1, 2] and found["n"] == 5


def test_arrays_in_parts(tmp_path):
    """Protocols 2 and 3 hold at most 4 GB, so that Paddle divides what is larger than 1 GB."""
    path, values = tmp_path / "a.pdparams", np.arange(12, dtype="float32")
    table = {"w": {"OriginShape": (3, 4), "slices": ["w@@.0", "w@@.1"]}}
    saved = {"b": np.ones(2), "w@@.0": values[:7], "w@@.1": values[7:], "UnpackBigParamInfor@@": table}
    saved["StructuredToParameterName@@"] = {"w": "linear_0.w_0", "b": "linear_0.b_0"}
    path.write_bytes(pickle.dumps(saved, 2))
    same(read(path).arrays, {"b": np.ones(2), "w": values.reshape(3, 4)})
    same(load_state(path), paddle.load(str(path)))
    for bad in (
        7,
        {"w": 1},
        {"w": {"OriginShape": (3, 5), "slices": ["w@@.0", "w@@.1"]}},
        {"w": {"OriginShape": (7,), "slices": []}},
    ):
        path.write_bytes(pickle.dumps({**saved, "UnpackBigParamInfor@@": bad}, 2))
        refused(path, "is not divided as paddle.save does it")
    twice = {name: {"OriginShape": (7,), "slices": ["w@@.0"]} for name in "abc"}
    path.write_bytes(pickle.dumps({**saved, "UnpackBigParamInfor@@": twice}, 2))
    refused(path, "is not divided as paddle.save does it")


# Files of our own


STATE = {
    "layer.weight": np.arange(12, dtype="float32").reshape(3, 4),
    "transposed": np.arange(6, dtype="float64").reshape(2, 3).T,
    "bfloat16": np.array([0x3F80, 0xFFC1], "uint16"),
    "half": np.array([1, -0.0], "float16"),
    "long": np.array([2**40]),
    "flag": np.array([True, False]),
    "scalar": np.array(2.5, "float32"),
    "empty": np.zeros((0, 3), "float32"),
    "complex": np.array([1 + 2j], "complex64"),
}


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
def test_own_files(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    write(path, Checkpoint(STATE))
    found = read(path)
    assert found.metadata is None and sorted(found.arrays) == sorted(STATE)
    for name, value in STATE.items():
        same(found.arrays[name], np.array(value, order="C"))


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "\u540d": "\u503c\n'"}])
def test_paddle_loads_own_files(metadata, tmp_path):
    """Also with metadata, of which paddle.load sees nothing, whatever its options."""
    path = tmp_path / "a.pdparams"
    state = {name: value for name, value in STATE.items() if name != "empty"}
    write(path, Checkpoint(state, metadata))
    loaded = paddle.load(str(path))
    assert list(loaded) == list(state) and all(isinstance(value, paddle.Tensor) for value in loaded.values())
    assert loaded["bfloat16"].dtype == paddle.bfloat16
    for name, value in state.items():
        assert loaded[name].numpy().tobytes() == value.tobytes() and list(loaded[name].shape) == list(value.shape)
    arrays = paddle.load(str(path), return_numpy=True)
    assert list(arrays) == list(state) and all(isinstance(value, np.ndarray) for value in arrays.values())
    for return_numpy in (False, True):
        with_table = paddle.load(str(path), keep_name_table=True, return_numpy=return_numpy)
        assert list(with_table) == [*state, "StructuredToParameterName@@"]
    with open(path, "rb") as file:
        assert list(paddle.load(io.BytesIO(file.read()))) == list(state)
    layer = paddle.nn.Linear(3, 4)
    write(path, Checkpoint({"weight": STATE["layer.weight"], "bias": np.ones(4, "float32")}, metadata))
    assert [list(names) for names in layer.set_state_dict(paddle.load(str(path)))] == [[], []]
    assert layer.weight.numpy().tolist() == STATE["layer.weight"].tolist() and layer.bias.numpy().tolist() == [1] * 4


def test_paddle_loads_other_values(tmp_path):
    """Beside tensors there are numbers and containers, and tensors inside them."""
    path = tmp_path / "a.pdparams"
    inner = np.arange(3, dtype="float32")
    write(
        path, Checkpoint({"w": STATE["layer.weight"], "epoch": 3, "more": OrderedDict(x=[inner, "text", None], y=(inner, 1.5))})
    )
    loaded = paddle.load(str(path))
    assert isinstance(loaded["w"], paddle.Tensor) and loaded["epoch"] == 3 and isinstance(loaded["more"], OrderedDict)
    (x, text, nothing), (y, number) = loaded["more"]["x"], loaded["more"]["y"]
    assert x.numpy().tolist() == y.numpy().tolist() == [0, 1, 2] and (text, nothing, number) == ("text", None, 1.5)
    same(read(path).arrays["more"], OrderedDict(x=[inner, "text", None], y=(inner, 1.5)))


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "paddle_fused_attention.layout": "in-out", "\u540d": ""}])
def test_metadata_survives(metadata, tmp_path):
    first, middle, last = (tmp_path / name for name in ("a.safetensors", "b.pdparams", "c.safetensors"))
    write(first, Checkpoint(STATE, metadata))
    write(middle, read(first))
    write(last, read(middle))
    assert read(middle).metadata == read(last).metadata == read(first).metadata == metadata
    assert first.read_bytes() == last.read_bytes()


@pytest.mark.parametrize(
    "name, value, suffix",
    [
        ("raw", RawTensor("F8_E4M3", (1,), b"\x01"), ".pdparams"),
        ("dtype", np.zeros(2, "uint32"), ".pdparams"),
        ("object", np.array([None]), ".pdparams"),
        ("bytes", b"12", ".pdparams"),
        ("in a list", [{"x": RawTensor("U16", (1,), b"12")}], ".pdparams"),
        ("StructuredToParameterName@@", np.zeros(2), ".pdparams"),
        ("UnpackBigParamInfor@@", np.zeros(2), ".pdparams"),
        ("epoch", 3, ".safetensors"),
        ("dtype", np.zeros(2, "complex128"), ".safetensors"),
        ("__metadata__", np.zeros(2), ".safetensors"),
    ],
)
def test_what_a_kind_of_file_cannot_hold(name, value, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointError, match=f"^{name}: .*can't be stored in {suffix}"):
        write(path, Checkpoint({"w": np.zeros(2), name: value}))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
def test_names_and_metadata_that_are_no_text(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    for wrong in (
        Checkpoint({3: np.zeros(2)}),
        Checkpoint({"\ud800": np.zeros(2)}),
        Checkpoint({}, {"a": 1}),
        Checkpoint({}, {"\ud800": ""}),
    ):
        refused(path, "expected", reader=lambda path, wrong=wrong: write(path, wrong))
    assert not list(tmp_path.iterdir())


# Files of torch.save


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
        same(found.arrays[key], value) if not isinstance(value, RawTensor) else same(vars(found.arrays[key]), vars(value))
    arrays = [value for value in found.arrays.values() if isinstance(value, np.ndarray)]
    assert all(array.flags["C_CONTIGUOUS"] for array in arrays)
    for i, array in enumerate(arrays):
        assert not any(np.shares_memory(array, other) for other in arrays[:i]), i


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def numbers(values):
    return b"(" + b"".join(number(value) for value in values) + b"t"


def torch_tensor(key, count, offset, shape, strides, kind="FloatStorage"):
    """The pickle of a tensor in a storage of `count` elements."""
    storage = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + number(count) + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89NtR"


def torch_zip(path, pickled, compression=zipfile.ZIP_STORED, **storages):
    """`pickled`: the bytes of a pickle, or of tensors' pickles by name."""
    if isinstance(pickled, dict):
        pickled = b"\x80\x02}(" + b"".join(text(name) + value for name, value in pickled.items()) + b"u."
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


FLOATS = np.arange(6, dtype="<f4")


def torch_floats(path, *names):
    """A tensor of six numbers for each name."""
    tensors = {name: torch_tensor(f"s{i}", 6, 0, (2, 3), (3, 1)) for i, name in enumerate(names)}
    return torch_zip(path, tensors, **{f"s{i}": (FLOATS + i).tobytes() for i in range(len(names))})


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
        refused(torch_zip(path, {"w": torch_tensor("k", 6, offset, shape, strides)}, k=data), "shape, offset or strides")
    refused(torch_zip(path, {"w": torch_tensor("k", 2**62, 0, (6,), (1,))}, k=data), "storage is not as expected")
    refused(torch_zip(path, {"w": torch_tensor("k", 6, 0, (6,), (1,))}, k=data[:-1]), "archive/data/k has 23 bytes, not 24")
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


# Checkpoints in several files


def index(path, weight_map, **more):
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map, **more}))
    return path


def shards(folder, suffix, metadata=({"format": "pt", "part": "1"}, {"format": "pt", "part": "2"})):
    """Two files; `a` and `c` are in the first."""
    first, second = (f"model-0000{i}-of-00002{suffix}" for i in (1, 2))
    if suffix == ".bin":
        torch_floats(folder / first, "a", "c")
        torch_floats(folder / second, "b")
    else:
        write(folder / first, Checkpoint({"a": FLOATS.reshape(2, 3), "c": FLOATS.reshape(2, 3) + 1}, metadata[0]))
        write(folder / second, Checkpoint({"b": FLOATS.reshape(2, 3)}, metadata[1]))
    return {"a": first, "b": second, "c": first}


KINDS = [
    (".safetensors", "model.safetensors.index.json", "out-in"),
    (".bin", "pytorch_model.bin.index.json", "out-in"),
    (".pdparams", "model_state.pdparams.index.json", "in-out"),
]


@pytest.mark.parametrize("suffix, name, layout", KINDS)
def test_several_files(suffix, name, layout, tmp_path, monkeypatch):
    path = index(tmp_path / name, shards(tmp_path, suffix))
    opened = []
    monkeypatch.setattr(checkpoint_files, "read", lambda path: opened.append(path.name) or read(path))
    found = read(path)
    same(found.arrays, {"a": FLOATS.reshape(2, 3), "b": FLOATS.reshape(2, 3), "c": FLOATS.reshape(2, 3) + 1})
    assert found.layout == layout and found.metadata == (None if suffix == ".bin" else {"format": "pt"})
    assert sorted(opened) == sorted(set(opened)) and len(opened) == 2


@pytest.mark.parametrize("suffix, name, layout", KINDS)
def test_several_files_that_do_not_fit(suffix, name, layout, tmp_path):
    path, places = tmp_path / name, shards(tmp_path, suffix)
    first = places["a"]
    refused(index(path, {**places, "d": first}), f"d is missing in {first}")
    refused(index(path, {key: places[key] for key in "ab"}), f"c is not in its weight_map, but in {first}")
    refused(index(path, {**places, "b": first}), f"b is missing in {first}")
    message = f"{tmp_path / 'no'}{suffix}: no such file"
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        read(index(path, {**places, "d": f"no{suffix}"}))
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / first).write_bytes((tmp_path / first).read_bytes())
    for outside in (
        f"../{tmp_path.name}/{first}",
        str(tmp_path / first),
        f"inner/{first}",
        f"..\\{first}",
        "..",
        "",
        f"a\0{suffix}",
    ):
        refused(
            index(path, {**places, "a": outside, "c": outside}),
            "is not in the index's own folder" if outside not in ("..", "") else "",
        )
    refused(index(path, {**places, "d": name}), "is of no kind that can be read")
    (tmp_path / first).write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=f"{first}: can't be read as {suffix}"):
        read(index(path, places))


def test_indices_that_are_none(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    for content in (
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": ["a"]}',
        b'{"weight_map": {"a": 1}}',
    ):
        path.write_bytes(content)
        refused(path, "can't be read as .index.json")
    path.write_bytes(b'{"weight_map": {"a": "b.bin", "a": "c.bin"}}')
    refused(path, "a stands in it twice")
    path.write_bytes(b"[" * 100000)
    refused(path)
    refused(tmp_path / "no.bin.index.json", "no such file")
    with pytest.raises(
        CheckpointError, match="expected a name that ends in .pdparams, .safetensors, .bin, .pt, .pth or .index.json"
    ):
        read(tmp_path / "config.json")


def test_metadata_of_several_files(tmp_path):
    """What is the same in all is kept; files of different formats are no checkpoint."""
    path = tmp_path / "model.safetensors.index.json"
    own = "paddle_fused_attention.layout"
    for each, expected in (
        ((None, None), None),
        (({}, None), {}),
        (({"format": "pt"}, None), {"format": "pt"}),
        (({"a": "1", "b": "1"}, {"a": "1", "b": "2", "c": "3"}), {"a": "1", "c": "3"}),
    ):
        found = read(index(path, shards(tmp_path, ".safetensors", each)))
        assert found.metadata == expected and found.layout == ("out-in" if expected == {"format": "pt"} else None)
    for each in (({"format": "pt"}, {"format": "np"}), ({own: "in-out"}, {own: "out-in"})):
        refused(index(path, shards(tmp_path, ".safetensors", each)), "its files disagree about")
    refused(index(path, shards(tmp_path, ".safetensors", ({"format": "pt"}, {own: "in-out"}))), "disagree about the layout")


# Layouts


@pytest.mark.parametrize(
    "metadata, expected",
    [
        (None, None),
        ({"format": "pt"}, "out-in"),
        ({"format": "pd"}, "in-out"),
        ({"format": "paddle"}, "in-out"),
        ({"format": "np"}, None),
        ({"format": "pt", "paddle_fused_attention.layout": "in-out"}, "in-out"),
        ({"paddle_fused_attention.layout": "out-in"}, "out-in"),
    ],
)
def test_layout(metadata, expected, tmp_path):
    """Of .safetensors the metadata tells; of .pdparams its kind, unless the package's own key says otherwise."""
    write(tmp_path / "a.safetensors", Checkpoint(STATE, metadata))
    assert read(tmp_path / "a.safetensors").layout == expected
    write(tmp_path / "a.pdparams", Checkpoint(STATE, metadata))
    own = (metadata or {}).get("paddle_fused_attention.layout")
    assert read(tmp_path / "a.pdparams").layout == (own or "in-out")


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
def test_unknown_layouts(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    write(path, Checkpoint(STATE, {"paddle_fused_attention.layout": "sideways"}))
    refused(path, "paddle_fused_attention.layout", "in-out or out-in", "got sideways")


# Hostile pickles


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
    yield "eval as of a DenseTensor", b"\x80\x02" + evaluate + text(code) + b"}" + text("data") + b"Ns\x86R.", "eval of open("
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
    for behind in (pickle.dumps({}), pickle.dumps(3), pickle.dumps({"paddle_fused_attention.metadata": {"a": 1}}), b"x", whole):
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


def good_files(folder):
    for name in ("torch_zip.bin", "torch_legacy.bin"):
        yield folder / f"a{name}", (DATA / name).read_bytes()
    state = {name: STATE[name] for name in ("layer.weight", "bfloat16", "scalar")}
    for suffix in (".pdparams", ".safetensors"):
        path = folder / f"good{suffix}"
        write(path, Checkpoint(state, {"format": "pt"}))
        yield folder / f"a{suffix}", path.read_bytes()
    for protocol in (2, 4):
        path = folder / f"saved{protocol}.pdparams"
        paddle.save({"model": state_dict(), "optimizer": optimizer_state(), "epoch": 3}, str(path), protocol=protocol)
        yield folder / f"a{protocol}.pdparams", path.read_bytes()


def test_truncated_files(tmp_path):
    """At any length, one line or, where only the metadata is cut off, nothing of it."""
    for path, data in good_files(tmp_path):
        read_at = []
        for length in range(0, len(data), 1 + len(data) // 150):
            path.write_bytes(data[:length])
            try:
                read(path)
                read_at.append(length)
            except CheckpointError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error)
        assert len(read_at) <= (path.name == "a.pdparams"), (path, read_at)


@pytest.mark.filterwarnings("error")
def test_random_changes(tmp_path):
    """A file with a few bytes changed is read, or refused in one line."""
    random = np.random.default_rng(0)
    for path, data in good_files(tmp_path):
        refusals = 0
        for _ in range(100):
            changed = bytearray(data)
            for place in random.integers(0, len(data), random.integers(1, 4)):
                changed[place] = random.integers(0, 256)
            path.write_bytes(changed)
            try:
                read(path)
            except CheckpointError as error:
                refusals += 1
                assert str(error).startswith(str(path)) and "\n" not in str(error) and str(error).isprintable()
        assert refusals > 10


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


# Hostile .safetensors


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
    "offsets that are no integers": ({"a": {**entry(0, 4), "data_offsets": [0, 4.0]}}, 4, "a: its data_offsets are no range"),
    "offsets that are bools": (
        {"a": {**entry(0, 1, [1], "U8"), "data_offsets": [False, True]}},
        1,
        "data_offsets are no range",
    ),
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
    "a name twice": (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": {}}', 1, "a stands in it twice"),
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
    assert found["empty"].shape == (0, 3) and found["end"].shape == (0,) and found["f4"] == RawTensor("F4", (2,), b"\x21")
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
