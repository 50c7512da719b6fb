"""incubate's feed-forward block, tail, linear and encoder layers against Paddle's: signatures, parameters, results."""

import inspect

import numpy as np
import paddle
import paddle.incubate.nn
import paddle.nn.functional as F
import pytest
from built_in import EMBED, HEADS, SEQ, check, composed
from paddle_fused_attention import incubate

HIDDEN = 20
BUILT_IN = {name: getattr(paddle.incubate.nn, name) for name in incubate.__all__ if name != "functional"}
BUILT_IN_FUNCTIONS = {name: getattr(paddle.incubate.nn.functional, name) for name in incubate.functional.__all__}
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate=True)}


def form(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", BUILT_IN_FUNCTIONS)
def test_signatures_of_functions(name):
    assert form(getattr(incubate.functional, name)) == form(BUILT_IN_FUNCTIONS[name])


@pytest.mark.parametrize("name", BUILT_IN)
def test_signatures_of_layers(name):
    ours, theirs = getattr(incubate, name), BUILT_IN[name]
    assert form(ours) == form(theirs) and form(ours.forward) == form(theirs.forward)
    assert issubclass(ours, theirs) and ours.__name__ == theirs.__name__


LAYERS = [
    ("FusedFeedForward", (EMBED, HIDDEN), {}),
    ("FusedFeedForward", (EMBED, HIDDEN), dict(normalize_before=True, activation="gelu", epsilon=1e-3, name="ffn")),
    ("FusedFeedForward", (EMBED, HIDDEN, 0.3), dict(linear1_bias_attr=False, ln2_bias_attr=False)),
    ("FusedBiasDropoutResidualLayerNorm", (EMBED,), {}),
    ("FusedBiasDropoutResidualLayerNorm", (EMBED, 0.2), dict(bias_attr=False, epsilon=1e-3)),
    ("FusedLinear", (EMBED, HIDDEN), {}),
    ("FusedLinear", (EMBED, HIDDEN), dict(transpose_weight=True, bias_attr=False)),
    ("FusedTransformerEncoderLayer", (EMBED, HEADS, HIDDEN), {}),
    ("FusedTransformerEncoderLayer", (EMBED, HEADS, HIDDEN, 0.2, "gelu", 0.1, 0.3, True), {}),
    ("FusedTransformerEncoderLayer", (EMBED, HEADS, HIDDEN), dict(weight_attr=[None, None], bias_attr=[None, False])),
]
EACH_LAYER = pytest.mark.parametrize("name, sizes, arguments", LAYERS, ids=str)


@EACH_LAYER
def test_layers_have_the_built_in_parameters(name, sizes, arguments):
    """The same initial values, names, shapes and attributes; the built-in's checkpoint loads, in other dtypes too."""
    layers = []
    for kind in (BUILT_IN[name], getattr(incubate, name)):
        paddle.seed(21)
        layers.append(kind(*sizes, **arguments))
    theirs, ours = layers
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for key, value in ours.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[key].numpy(), key)
        assert value.stop_gradient == state[key].stop_gradient
    if name != "FusedBiasDropoutResidualLayerNorm":  # Paddle's own repr of which raises
        assert repr(ours) == repr(theirs)
    assert "embed_dim" in repr(ours) or "d_model" in repr(ours) or name == "FusedLinear"
    for dtype in ("float32", "float64"):
        state = {key: (value + 1.0).astype(dtype) for key, value in state.items()}
        missing, unexpected = ours.set_state_dict(state)
        assert not missing and not unexpected
        for key, value in ours.state_dict().items():
            np.testing.assert_array_equal(value.numpy(), state[key].numpy(), key)


def draw(*shape, seed=0, dtype="float64"):
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype(dtype), stop_gradient=False)


def parameters_of_feed_forward(pre_layer_norm=False):
    shapes = dict(
        linear1_weight=(EMBED, HIDDEN), linear2_weight=(HIDDEN, EMBED), linear1_bias=(HIDDEN,), linear2_bias=(EMBED,),
        ln1_scale=(EMBED,), ln1_bias=(EMBED,), ln2_scale=(EMBED,), ln2_bias=(EMBED,),
    )  # fmt: skip
    unused = "ln2" if pre_layer_norm else "ln1"
    return {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items()) if not name.startswith(unused)}


def composed_feed_forward(x, p, pre_layer_norm, activation, add_residual=True, scales=(1.0, 1.0)):
    h = F.layer_norm(x, [EMBED], p["ln1_scale"], p["ln1_bias"]) if pre_layer_norm else x
    u = ACTIVATIONS[activation](F.linear(h, p["linear1_weight"], p["linear1_bias"])) * scales[0]
    z = F.linear(u, p["linear2_weight"], p["linear2_bias"]) * scales[1]
    z = x + z if add_residual else z
    return z if pre_layer_norm else F.layer_norm(z, [EMBED], p["ln2_scale"], p["ln2_bias"])


def check_gradients(out, expected, tensors):
    d_out = paddle.to_tensor(np.random.default_rng(7).standard_normal(out.shape))
    check("out", out.numpy(), expected.numpy())
    found = paddle.grad([out], list(tensors.values()), [d_out])
    wanted = paddle.grad([expected], list(tensors.values()), [d_out])
    for name, a, b in zip(tensors, found, wanted):
        check(name, a.numpy(), b.numpy())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("add_residual", [True, False])
@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_fused_feedforward(pre_layer_norm, add_residual, activation):
    x, p = draw(2, SEQ, EMBED, seed=9), parameters_of_feed_forward(pre_layer_norm)
    out = incubate.functional.fused_feedforward(
        x, **p, dropout1_rate=0.0, dropout2_rate=0.0, activation=activation, pre_layer_norm=pre_layer_norm,
        add_residual=add_residual,
    )  # fmt: skip
    expected = composed_feed_forward(x, p, pre_layer_norm, activation, add_residual)
    check_gradients(out, expected, {"x": x, **p})


@pytest.mark.parametrize("mode", ["upscale_in_train", "downscale_in_infer"])
def test_modes_of_feedforward(mode):
    """Outside training nothing is dropped, and the second mode scales what both dropouts let through."""
    x, p = draw(2, SEQ, EMBED, seed=9), parameters_of_feed_forward()
    out = incubate.functional.fused_feedforward(
        x, **p, dropout1_rate=0.25, dropout2_rate=0.5, training=False, mode=mode
    )
    scales = (1.0, 1.0) if mode == "upscale_in_train" else (0.75, 0.5)
    check("out", out.numpy(), composed_feed_forward(x, p, False, "relu", scales=scales).numpy())


def test_random_seed_of_the_program():
    """As Paddle's functions, ours take the default program's seed for their own if there is one."""
    x, p = draw(2, SEQ, EMBED, seed=9), parameters_of_feed_forward()
    calls = (
        lambda: incubate.functional.fused_feedforward(x, **p).numpy(),
        lambda: incubate.functional.fused_bias_dropout_residual_layer_norm(x, x).numpy(),
    )
    program = paddle.static.default_main_program()
    for call in calls:
        try:
            program.random_seed = 11
            first, second = call(), call()
            program.random_seed = 12
            third = call()
        finally:
            program.random_seed = 0
        np.testing.assert_array_equal(first, second)
        assert (first != third).any()
        assert (call() != call()).any()


def test_fused_bias_dropout_residual_layer_norm():
    x, residual, bias = draw(2, SEQ, EMBED), draw(2, SEQ, EMBED, seed=1), draw(EMBED, seed=2)
    scale, shift = draw(EMBED, seed=3), draw(EMBED, seed=4)
    out = incubate.functional.fused_bias_dropout_residual_layer_norm(
        x, residual, bias, scale, shift, 0.0, 1e-4, True, "upscale_in_train", None
    )
    expected = F.layer_norm(residual + x + bias, [EMBED], scale, shift, 1e-4)
    tensors = {"x": x, "residual": residual, "bias": bias, "ln_scale": scale, "ln_bias": shift}
    check_gradients(out, expected, tensors)
    dropped = incubate.functional.fused_bias_dropout_residual_layer_norm(x, residual, dropout_rate=0.3, training=False)
    check("out", dropped.numpy(), F.layer_norm(residual + x, [EMBED]).numpy())


@pytest.mark.parametrize("activation", [None, "none", *ACTIVATIONS])
@pytest.mark.parametrize("trans_x, trans_y", [(False, False), (False, True), (True, False), (True, True)])
def test_fused_linear_activation(trans_x, trans_y, activation):
    x, y, bias = draw(*((4, 7) if trans_x else (7, 4))), draw(*((5, 4) if trans_y else (4, 5)), seed=1), draw(5, seed=2)
    out = incubate.functional.fused_linear_activation(x, y, bias, trans_x, trans_y, activation)
    expected = paddle.matmul(x, y, trans_x, trans_y) + bias
    expected = ACTIVATIONS.get(activation, lambda a: a)(expected)
    check_gradients(out, expected, {"x": x, "y": y, "bias": bias})


def test_transposed_x_of_a_higher_rank():
    """With a bias it is read as [K, M], as Paddle's operator does."""
    x, y, bias = draw(4, 2, 3), draw(4, 5, seed=1), draw(5, seed=2)
    expected = paddle.matmul(x.reshape([4, 6]), y, True) + bias
    for out in (
        incubate.functional.fused_matmul_bias(x, y, bias, True),
        incubate.functional.fused_linear_activation(x, y, bias, True),
    ):
        assert out.shape == [2, 3, 5]
        check_gradients(out.reshape([6, 5]), expected, {"x": x, "y": y, "bias": bias})


@pytest.mark.parametrize(
    "x_shape, y_shape, transpose_x, transpose_y",
    [
        ((2, 3, 4), (4, 5), False, False),
        ((2, 3, 4), (2, 4, 5), False, False),
        ((2, 4, 3), (4, 5), True, False),
        ((4,), (4, 5), False, False),
        ((3, 4), (4,), False, False),
        ((2, 3, 4), (2, 5, 4), False, True),
    ],
)
def test_fused_matmul_bias_without_one_is_matmul(x_shape, y_shape, transpose_x, transpose_y):
    x, y = draw(*x_shape), draw(*y_shape, seed=1)
    out = incubate.functional.fused_matmul_bias(x, y, None, transpose_x, transpose_y)
    check_gradients(out, paddle.matmul(x, y, transpose_x, transpose_y), {"x": x, "y": y})


@pytest.mark.parametrize("transpose_weight", [False, True])
def test_fused_linear(transpose_weight):
    layer = incubate.FusedLinear(EMBED, HIDDEN, transpose_weight=transpose_weight)
    layer.to(dtype="float64")
    x = draw(2, 3, EMBED)
    weight = layer.weight.T if transpose_weight else layer.weight
    tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
    check_gradients(layer(x), F.linear(x, weight, layer.bias), tensors)


@pytest.mark.parametrize("normalize_before", [False, True])
def test_encoder_layer(normalize_before):
    paddle.seed(2)
    layer = incubate.FusedTransformerEncoderLayer(EMBED, HEADS, HIDDEN, 0.0, "gelu", normalize_before=normalize_before)
    layer.to(dtype="float64")
    assert type(layer.fused_attn) is incubate.FusedMultiHeadAttention and type(layer.ffn) is incubate.FusedFeedForward
    x = draw(2, SEQ, EMBED)
    keep = np.random.default_rng(4).random((2, 1, SEQ, SEQ)) < 0.7
    mask = paddle.to_tensor((keep - 1.0) * 1e9)
    attended, _ = composed(
        x, **dict(layer.fused_attn.named_parameters()), pre_layer_norm=normalize_before, attn_mask=mask
    )
    p = {name[1:]: value for name, value in layer.ffn.named_parameters()}
    expected = composed_feed_forward(attended, p, normalize_before, "gelu")
    tensors = {"x": x, **dict(layer.named_parameters())}
    check_gradients(layer(x, paddle.to_tensor(keep)), expected, tensors)
    layer.eval()
    cache = paddle.zeros([2, 2, HEADS, 0, EMBED // HEADS], "float64")
    out, cache = layer(x, paddle.to_tensor(keep), cache)
    check("out", out.numpy(), expected.numpy())
    assert cache.shape == [2, 2, HEADS, SEQ, EMBED // HEADS]


def test_encoder_layers_are_copied_by_paddles_encoder():
    layer = incubate.FusedTransformerEncoderLayer(EMBED, HEADS, HIDDEN, 0.1, normalize_before=True)
    encoder = paddle.nn.TransformerEncoder(layer, 3)
    assert [type(each) for each in encoder.layers] == [incubate.FusedTransformerEncoderLayer] * 3
    encoder(paddle.ones([2, SEQ, EMBED])).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize(
    "name, arguments, error, message",
    [
        ("FusedFeedForward", dict(d_model=0, dim_feedforward=4), ValueError, "d_model: expected at least 1, got 0"),
        ("FusedFeedForward", dict(d_model=4, dim_feedforward=2.0), TypeError, "dim_feedforward: expected an int"),
        ("FusedFeedForward", dict(d_model=4, dim_feedforward=4, dropout_rate=2), ValueError, "dropout_rate: expected"),
        ("FusedFeedForward", dict(d_model=4, dim_feedforward=4, act_dropout_rate="a"), TypeError, "act_dropout_rate"),
        (
            "FusedFeedForward", dict(d_model=4, dim_feedforward=4, activation="tanh"), ValueError,
            "activation: expected one of 'relu', 'gelu', 'gelu_tanh', 'silu', got 'tanh'",
        ),
        ("FusedFeedForward", dict(d_model=4, dim_feedforward=4, nranks=2), ValueError, "nranks: expected 1"),
        (
            "FusedFeedForward", dict(d_model=4, dim_feedforward=4, linear1_weight_attr=False), ValueError,
            "linear1_weight_attr: expected a ParamAttr, what makes one, or None, got False",
        ),
        ("FusedLinear", dict(in_features=0, out_features=3), ValueError, "in_features: expected at least 1"),
        ("FusedLinear", dict(in_features=2, out_features=3, weight_attr=False), ValueError, "weight_attr: expected"),
        ("FusedBiasDropoutResidualLayerNorm", dict(embed_dim=-1), ValueError, "embed_dim: expected at least 1"),
        ("FusedBiasDropoutResidualLayerNorm", dict(embed_dim=4, epsilon=-1.0), ValueError, "epsilon: expected"),
        (
            "FusedTransformerEncoderLayer", dict(d_model=4, nhead=3, dim_feedforward=8), ValueError,
            "nhead: expected a divisor of d_model 4, got 3",
        ),
        (
            "FusedTransformerEncoderLayer", dict(d_model=4, nhead=2, dim_feedforward=8, bias_attr=[None] * 3),
            ValueError, "bias_attr: expected one attribute, or two for attention and the feed-forward block, got 3",
        ),
    ],
)  # fmt: skip
def test_errors_of_layers(name, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(incubate, name)(**arguments)
