"""Sequences without their padding: pad, unpad, and layers on what these give."""

import numpy as np
import paddle
import pytest
from paddle_fused_attention import FusedMultiHeadAttention, pad, unpad
from runners import static_mode

BATCH, SEQ_LEN, WIDTH = 3, 70, 16
LENGTHS = (70, 1, 33)


pytestmark = pytest.mark.usefixtures("needs_paddle", "on_place")


@pytest.fixture
def on_place(place):
    """Tensors and layers are made on the place."""
    before = paddle.get_device()
    paddle.set_device("cpu" if isinstance(place, paddle.CPUPlace) else "gpu")
    yield
    paddle.set_device(before)


def make(dtype="float64"):
    rng = np.random.default_rng(1)
    x = paddle.to_tensor(rng.standard_normal((BATCH, SEQ_LEN, WIDTH)), dtype=dtype, stop_gradient=False)
    keep = paddle.to_tensor(np.arange(SEQ_LEN)[None] < np.array(LENGTHS)[:, None])
    return x, keep


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_there_and_back(dtype):
    """What is kept comes back with zeros beside it; the gradient reaches what is kept only."""
    x, keep = make(dtype)
    packed = unpad(x, keep)
    assert packed.max_seqlen == 70 and packed.tokens.dtype == x.dtype
    np.testing.assert_array_equal(packed.cu_seqlens.numpy(), [0, 70, 71, 104])
    assert str(packed.cu_seqlens.dtype).endswith("int32")
    whole = pad(packed.tokens, packed.indices, BATCH, SEQ_LEN)
    kept = keep.numpy()[..., None]
    expected = np.where(kept, x.astype("float64").numpy(), 0.0)
    np.testing.assert_array_equal(whole.astype("float64").numpy(), expected)
    (gradient,) = paddle.grad([whole], [x], [paddle.ones_like(whole)])
    np.testing.assert_array_equal(gradient.astype("float64").numpy(), np.broadcast_to(kept, x.shape).astype("float64"))


def test_padding_anywhere_and_empty_sequences():
    x, _ = make()
    keep = np.zeros((BATCH, SEQ_LEN), "int64")
    keep[0, 5::2] = 3
    keep[2, :7] = 1
    packed = unpad(x, paddle.to_tensor(keep))
    np.testing.assert_array_equal(packed.tokens.numpy(), x.numpy()[keep != 0])
    np.testing.assert_array_equal(packed.cu_seqlens.numpy(), [0, 33, 33, 40])
    assert packed.max_seqlen == 33


@pytest.mark.parametrize("causal", [False, True])
def test_a_layer_without_padding(causal):
    """Results and gradients of the layer with a mask of the padding."""
    x, keep = make()
    paddle.seed(2)
    layer = FusedMultiHeadAttention(WIDTH, 2, 0.0, 0.0, causal=causal)
    layer.to(dtype="float64")
    d_out = paddle.to_tensor(np.random.default_rng(3).standard_normal(x.shape)) * keep.astype("float64").unsqueeze(-1)
    results = []
    for is_packed in (False, True):
        if is_packed:
            packed = unpad(x, keep)
            out = layer(packed.tokens, cu_seqlens=packed.cu_seqlens, max_seqlen=packed.max_seqlen)
            out = pad(out, packed.indices, BATCH, SEQ_LEN)
        else:
            out = layer(x, attn_mask=keep.unsqueeze([1, 2])) * keep.astype("float64").unsqueeze(-1)
        tensors = [x, *layer.parameters()]
        results.append([out, *paddle.grad([out], tensors, [d_out])])
    for a, b in zip(*results):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9, atol=1e-11)


def test_packed_sequences_have_no_other_keys():
    x, keep = make()
    packed = unpad(x.detach(), keep)
    layer = FusedMultiHeadAttention(WIDTH, 2)
    layer.to(dtype="float64")
    with pytest.raises(NotImplementedError, match="cu_seqlens"):
        layer(packed.tokens, packed.tokens * 2.0, cu_seqlens=packed.cu_seqlens)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda x, keep: (x, keep[:, :-1]), ValueError, "keep: expected shape"),
        (lambda x, keep: (x, x[..., 0]), TypeError, "keep: expected bool or integers"),
        (lambda x, keep: (keep, keep), TypeError, "x: expected a float dtype"),
        (lambda x, keep: (x, None), TypeError, "keep: expected a Tensor"),
        (lambda x, keep: (x.numpy(), keep), TypeError, "x: expected a Tensor"),
    ],
)
def test_bad_arguments_of_unpad(change, error, words):
    with pytest.raises(error, match=words):
        unpad(*change(*make()))


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"indices": [0, 1]}, ValueError, "indices: expected shape"),
        ({"indices": [0, 1, 210]}, ValueError, "indices: expected numbers from 0"),
        ({"indices": [0, -1, 2]}, ValueError, "indices: expected numbers from 0"),
        ({"indices": [0.0, 1.0, 2.0]}, TypeError, "indices: expected int32 or int64"),
        ({"batch": 0}, ValueError, "batch: expected"),
        ({"seq_len": 2.5}, TypeError, "seq_len: expected"),
    ],
    ids=str,
)
def test_bad_arguments_of_pad(changes, error, words):
    arguments = {"indices": [0, 1, 2], "batch": BATCH, "seq_len": SEQ_LEN, **changes}
    arguments["indices"] = paddle.to_tensor(arguments["indices"])
    with pytest.raises(error, match=words):
        pad(paddle.ones([3, WIDTH]), **arguments)


def test_graphs_are_refused():
    with static_mode():
        with paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
            x, keep = paddle.static.data("x", [2, 3, 4]), paddle.static.data("keep", [2, 3], "bool")
            with pytest.raises(NotImplementedError, match="unpad: expected dygraph"):
                unpad(x, keep)
