"""Files that this package writes: what they hold, their metadata and layouts, and that paddle.load reads them."""

import io
from collections import OrderedDict

import numpy as np
import paddle
import pytest
from file_bytes import STATE, refused, same
from paddle_fused_attention.checkpoint_files import Checkpoint, CheckpointError, RawTensor, read, write


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
        path,
        Checkpoint(
            {"w": STATE["layer.weight"], "epoch": 3, "more": OrderedDict(x=[inner, "text", None], y=(inner, 1.5))}
        ),
    )
    loaded = paddle.load(str(path))
    assert isinstance(loaded["w"], paddle.Tensor) and loaded["epoch"] == 3 and isinstance(loaded["more"], OrderedDict)
    (x, text, nothing), (y, number) = loaded["more"]["x"], loaded["more"]["y"]
    assert x.numpy().tolist() == y.numpy().tolist() == [0, 1, 2] and (text, nothing, number) == ("text", None, 1.5)
    same(read(path).arrays["more"], OrderedDict(x=[inner, "text", None], y=(inner, 1.5)))


@pytest.mark.parametrize(
    "metadata", [None, {}, {"format": "pt", "paddle_fused_attention.layout": "in-out", "\u540d": ""}]
)
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
