"""incubate.FusedMultiHeadAttention against Paddle's layer: parameters, results, saved models, errors."""

import numpy as np
import paddle
import pytest
from built_in import BATCH, BUILT_IN, EMBED, HEAD_DIM, HEADS, SEQ, check, composed, draw_arrays
from paddle_fused_attention import incubate

LAYERS = [
    {},
    dict(normalize_before=True),
    dict(transpose_qkv_wb=True),
    dict(qkv_bias_attr=False, linear_bias_attr=False, ln_bias_attr=False),
    dict(normalize_before=True, pre_ln_scale_attr=False, epsilon=1e-3, name="block"),
]


@pytest.mark.parametrize("arguments", LAYERS, ids=str)
def test_layer_has_the_built_in_parameters(arguments):
    """The same initial values, names, shapes and attributes; the built-in's checkpoint loads."""
    layers = []
    for kind in (BUILT_IN, incubate.FusedMultiHeadAttention):
        paddle.seed(21)
        layers.append(kind(EMBED, HEADS, **arguments))
    theirs, ours = layers
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for name, value in ours.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[name].numpy(), name)
        assert value.stop_gradient == state[name].stop_gradient
    for name in (
        "embed_dim",
        "num_heads",
        "head_dim",
        "kdim",
        "vdim",
        "normalize_before",
        "need_weights",
        "dropout_rate",
    ):
        assert getattr(ours, name) == getattr(theirs, name)
    assert repr(ours) == repr(theirs)
    state = {name: value + 1.0 for name, value in state.items()}
    missing, unexpected = ours.set_state_dict(state)
    assert not missing and not unexpected
    for name, value in ours.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[name].numpy(), name)


@pytest.mark.parametrize("kind", ["none", "bool", "int64", "uint8", "float32"])
@pytest.mark.parametrize("arguments", LAYERS, ids=str)
def test_layer(arguments, kind):
    paddle.seed(22)
    layer = incubate.FusedMultiHeadAttention(EMBED, HEADS, dropout_rate=0.0, attn_dropout_rate=0.0, **arguments)
    x = paddle.to_tensor(draw_arrays("float32")["x"])
    rng = np.random.default_rng(6)
    keep = rng.random((BATCH, 1, SEQ, SEQ)) < 0.6
    keep[:, :, 2] = False  # Paddle's masks let a query that may see no key attend to all alike
    if kind == "none":
        mask = added = None
    elif kind == "float32":
        mask = added = keep * np.float32(1.5)
    else:
        mask, added = keep.astype(kind), (keep.astype("float32") - 1) * np.float32(1e9)
    out = layer(x, attn_mask=None if mask is None else paddle.to_tensor(mask))
    parameters = dict(layer.named_parameters())
    if layer.transpose_qkv_wb:
        shape = [3, HEADS, HEAD_DIM]
        parameters["qkv_weight"] = layer.qkv_weight.T.reshape([*shape, EMBED])
        parameters["qkv_bias"] = layer.qkv_bias.reshape(shape)
    expected, _ = composed(
        x,
        **parameters,
        pre_layer_norm=layer.normalize_before,
        attn_mask=None if added is None else paddle.to_tensor(added),
        pre_ln_epsilon=arguments.get("epsilon", 1e-5),
    )
    check("out", out.numpy(), expected.numpy(), "float32")
    assert out.shape == [BATCH, SEQ, EMBED]
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("arguments", [{}, dict(normalize_before=True), dict(transpose_qkv_wb=True)], ids=str)
def test_layer_exported(arguments, tmp_path):
    """to_static in both modes, and a saved layer, give what dygraph gives."""
    paddle.seed(23)
    layer = incubate.FusedMultiHeadAttention(EMBED, HEADS, **arguments)
    layer.eval()
    x = paddle.to_tensor(draw_arrays("float32")["x"])
    mask = paddle.to_tensor(np.random.default_rng(4).random((BATCH, 1, SEQ, SEQ)) < 0.7)
    expected = layer(x, attn_mask=mask).numpy()
    specs = [
        paddle.static.InputSpec([None, None, EMBED]),
        None,
        None,
        paddle.static.InputSpec([None, 1, None, None], "bool"),
    ]
    paddle.jit.save(layer, str(tmp_path / "layer"), input_spec=specs)
    check("saved", paddle.jit.load(str(tmp_path / "layer"))(x, mask).numpy(), expected, "float32")
    for full_graph in (True, False):
        static = paddle.jit.to_static(layer, full_graph=full_graph)
        check("out", static(x, attn_mask=mask).numpy(), expected, "float32")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(num_heads=5), ValueError, "num_heads: expected a divisor of embed_dim 12, got 5"),
        (dict(embed_dim=0), ValueError, "embed_dim: expected at least 1, got 0"),
        (dict(need_weights=True), ValueError, "need_weights: expected False"),
        (dict(nranks=3), ValueError, "nranks: expected 1, the number of processes of ring_id -1, got 3"),
        (dict(nranks=3, ring_id=99), ValueError, "ring_id: expected -1 or the id of a group"),
    ],
)
def test_layer_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        incubate.FusedMultiHeadAttention(**{"embed_dim": EMBED, "num_heads": HEADS, **arguments})


@pytest.mark.parametrize("shape", [[None, None, None], [None, None, 16], [2, 5, None]], ids=str)
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "packed"])
@pytest.mark.parametrize("with_cache", [False, True], ids=["alone", "cache"])
def test_saved_with_unknown_sizes(with_cache, transposed, shape, tmp_path):
    layer = incubate.FusedMultiHeadAttention(16, 2, 0.0, 0.0, transpose_qkv_wb=transposed)
    layer.eval()
    spec = paddle.static.InputSpec

    class Network(paddle.nn.Layer):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, cache=None):
            out = self.layer(x, cache=cache)
            return out if cache is None else out[0]

    x = paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 5, 16)), dtype="float32")
    cache = paddle.to_tensor(np.random.default_rng(1).standard_normal((2, 2, 2, 3, 8)), dtype="float32")
    inputs = [x, cache] if with_cache else [x]
    specs = [spec(shape, "float32", "x")] + [spec([2, None, 2, None, 8], "float32", "cache")] * with_cache
    expected = Network()(*inputs).numpy()
    paddle.jit.save(Network(), str(tmp_path / "layer"), input_spec=specs)
    loaded = paddle.jit.load(str(tmp_path / "layer"))
    np.testing.assert_allclose(loaded(*inputs).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_layer_refuses_what_is_no_mask_or_no_query():
    layer = incubate.FusedMultiHeadAttention(EMBED, HEADS)
    x = paddle.to_tensor(draw_arrays("float32")["x"])
    cache = paddle.zeros([2, BATCH, HEADS, 0, HEAD_DIM])
    for mask, word in ((paddle.ones([SEQ, SEQ], "complex64"), "complex64"), (np.ones((SEQ, SEQ)), "ndarray")):
        for more in ({}, {"cache": cache}, {"key": x + 1, "value": x + 1}):
            with pytest.raises(TypeError, match=f"^attn_mask: .*{word}"):
                layer(x, attn_mask=mask, **more)
    with pytest.raises(TypeError, match="^query: .*ndarray"):
        layer(x.numpy(), attn_mask=paddle.ones([SEQ, SEQ], "bool"))


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("embed_dim", "12", TypeError),
        ("num_heads", 3.0, TypeError),
        ("dropout_rate", np.str_("0.1"), TypeError),
        ("attn_dropout_rate", 10**400, ValueError),
        ("epsilon", np.complex64(1), TypeError),
        ("epsilon", float("nan"), ValueError),
        ("normalize_before", "False", TypeError),
        ("transpose_qkv_wb", None, TypeError),
        ("nranks", 1.0, TypeError),
        ("ring_id", "0", TypeError),
        ("ring_id", None, TypeError),
    ],
    ids=str,
)
def test_bad_arguments_of_the_layer(argument, value, error):
    with pytest.raises(error, match=f"^{argument}: expected .*, got "):
        incubate.FusedMultiHeadAttention(**{**dict(embed_dim=EMBED, num_heads=HEADS), argument: value})
