"""What paddle.save writes is read as paddle.load reads it."""

import pickle
from collections import OrderedDict

import numpy as np
import paddle
import pytest
from file_bytes import DTYPES, optimizer_state, refused, same, state_dict
from paddle_fused_attention.checkpoint_files import load_state, read


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
    "both": lambda: {
        "model": state_dict(),
        "optimizer": optimizer_state(),
        "step": 7,
        "losses": np.arange(3, dtype="float32"),
    },
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
        long, short = (
            b"\x8c" + bytes([len(name)]) + name for name in (b"numpy._core.multiarray", b"numpy.core.multiarray")
        )
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
