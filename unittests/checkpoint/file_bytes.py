"""Files of checkpoints as bytes: of paddle.save, of torch.save and of safetensors, good and bad ones, and how what is
read from them is compared.
"""

import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle_fused_attention.checkpoint_files import CheckpointError, read

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


DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"]
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


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def numbers(values):
    return b"(" + b"".join(number(value) for value in values) + b"t"


def torch_tensor(key, count, offset, shape, strides, kind="FloatStorage"):
    """The pickle of a tensor in a storage of `count` elements."""
    storage = (
        b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + number(count) + b"tQ"
    )
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + number(offset)
        + numbers(shape)
        + numbers(strides)
        + b"\x89NtR"
    )


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
