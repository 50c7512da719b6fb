"""FusedMultiHeadAttention: parameters, switches, modes, state, arguments."""

import copy

import common
import numpy as np
import paddle
import pytest
import reference
from cases import DTYPES
from paddle.nn import initializer
from paddle_fused_attention import FusedMultiHeadAttention, ParallelFusedMultiHeadAttention, convert, incubate
from reference import Config
from runners import static_mode

LAYER_NORMS = {"pre_ln_scale": [24], "pre_ln_bias": [24], "ln_scale": [24], "ln_bias": [24]}
SHAPES = {
    "qkv_weight": [3, 4, 6, 24],
    "qkv_bias": [3, 4, 6],
    "linear_weight": [24, 24],
    "linear_bias": [24],
}


def make_layer(*args, **changes):
    arguments = dict(embed_dim=24, num_heads=4, dropout_rate=0.0, attn_dropout_rate=0.0)
    arguments.update(changes)
    layer = FusedMultiHeadAttention(*args, **arguments)
    rng = np.random.default_rng(2)
    layer.set_state_dict(
        {n: (p.numpy() + 0.2 * rng.standard_normal(p.shape)).astype("float32") for n, p in layer.state_dict().items()}
    )
    return layer


def make_x(batch=2, seq_len=5):
    return np.random.default_rng(3).standard_normal((batch, seq_len, 24)).astype("float32")


def expected(layer, x, config, mask=None):
    inputs = {n: p.numpy().astype(np.float64) for n, p in layer.named_parameters()}
    inputs.update(x=x.astype(np.float64), attn_mask=mask)
    return reference.forward(inputs, config)


def assert_equal(actual, wanted):
    common.check_tensor("out", actual.numpy().astype(np.float64), wanted, "float32")


@pytest.mark.parametrize("normalize_before", [False, True])
@pytest.mark.parametrize("final_layer_norm", [False, True])
def test_parameters(normalize_before, final_layer_norm):
    """The pull request's names and shapes; a layer norm that is off has none."""
    layer = FusedMultiHeadAttention(24, 4, normalize_before=normalize_before, final_layer_norm=final_layer_norm)
    on = {"pre": normalize_before, "ln_": final_layer_norm}
    shapes = dict(SHAPES, **{name: shape for name, shape in LAYER_NORMS.items() if on[name[:3]]})
    assert {name: list(p.shape) for name, p in layer.named_parameters()} == shapes
    assert all(getattr(layer, name) is None for name in LAYER_NORMS if name not in shapes)
    for name, p in layer.named_parameters():
        assert p.dtype == paddle.float32 and not p.stop_gradient, name
        if name.endswith("_bias"):
            assert not p.numpy().any(), name
        if name.endswith("_scale"):
            assert (p.numpy() == 1).all(), name


def test_initial_weights_spread_like_those_of_separate_projections():
    """Xavier's bound for a [3, H, D, E] weight read as a convolution would be far off: it must be that of E x E."""
    paddle.seed(0)
    layer = FusedMultiHeadAttention(256, 8)
    bound = np.sqrt(6 / (256 + 256))
    for name in ("qkv_weight", "linear_weight"):
        values = np.abs(getattr(layer, name).numpy())
        assert 0.5 * bound < values.max() < 2 * bound, name


class Counting(initializer.Initializer):
    """A user's own: element (i, o) of a weight [in, out] is i * out + o."""

    def __call__(self, param, block=None):
        shape = list(param.shape)
        return initializer.Assign(np.arange(np.prod(shape), dtype="float32").reshape(shape))(param, block)


def by_argument(make):
    return FusedMultiHeadAttention(64, 4, weight_attr=make())


def by_global_initializer(make):
    initializer.set_global_initializer(make())
    try:
        return FusedMultiHeadAttention(64, 4)
    finally:
        initializer.set_global_initializer(None)


def parallel_by_argument(make):
    return ParallelFusedMultiHeadAttention(64, 4, weight_attr=paddle.ParamAttr(initializer=make()))


def lazily(make):
    with paddle.LazyGuard():
        layer = by_argument(make)
    for parameter in layer.parameters():
        parameter.initialize()
    return layer


def initial_values(way, make, static):
    """qkv_weight as three [in, out], and linear_weight."""
    if not static:
        layer = way(make)
        weights = layer.qkv_weight.numpy(), layer.linear_weight.numpy()
    else:
        main, startup, scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
        with static_mode(), paddle.static.program_guard(main, startup), paddle.static.scope_guard(scope):
            layer = way(make)
            executor = paddle.static.Executor(paddle.CPUPlace())
            executor.run(startup)
            weights = executor.run(main, fetch_list=[layer.qkv_weight, layer.linear_weight])
    return [part.reshape(64, 64).T for part in weights[0]], weights[1]


@pytest.mark.parametrize("static", [False, True], ids=["dygraph", "static"])
@pytest.mark.parametrize("way", [by_argument, by_global_initializer, parallel_by_argument])
@pytest.mark.parametrize("name", ["XavierNormal", "XavierUniform", "KaimingNormal", "KaimingUniform"])
def test_initializers_see_the_fans_of_separate_projections(name, way, static):
    paddle.seed(3)
    parts, linear = initial_values(way, getattr(initializer, name), static)
    deviation = np.sqrt(2 / (64 + 64) if name.startswith("Xavier") else 2 / 64)
    for part in (*parts, linear):
        assert abs(part.std() / deviation - 1) < 0.1
    assert not np.array_equal(parts[0], parts[1]) and not np.array_equal(parts[1], parts[2])


@pytest.mark.parametrize("static", [False, True], ids=["dygraph", "static"])
@pytest.mark.parametrize("way", [by_argument, by_global_initializer, parallel_by_argument])
def test_each_projection_is_orthogonal(way, static):
    parts, linear = initial_values(way, initializer.Orthogonal, static)
    for part in (*parts, linear):
        np.testing.assert_allclose(part @ part.T, np.eye(64), atol=1e-5)
    assert not np.array_equal(parts[0], parts[1]) and not np.array_equal(parts[1], parts[2])


@pytest.mark.parametrize("static", [False, True], ids=["dygraph", "static"])
@pytest.mark.parametrize(
    "make", [Counting, lambda: initializer.Assign(np.arange(64.0 * 64).reshape(64, 64))], ids=["own", "Assign"]
)
def test_what_is_named_for_one_projection_is_for_each(make, static):
    parts, linear = initial_values(by_argument, make, static)
    for part in (*parts, linear):
        np.testing.assert_array_equal(part, np.arange(64.0 * 64).reshape(64, 64))


@pytest.mark.parametrize(
    "make", [initializer.XavierNormal, Counting, initializer.Normal], ids=["XavierNormal", "own", "Normal"]
)
def test_lazy_initialization(make):
    parts, _ = initial_values(lazily, make, False)
    if make is Counting:
        np.testing.assert_array_equal(parts[1], np.arange(64.0 * 64).reshape(64, 64))
    else:
        assert abs(parts[1].std() / (1.0 if make is initializer.Normal else 0.125) - 1) < 0.1


def test_initializers_of_biases():
    layer = FusedMultiHeadAttention(24, 4, bias_attr=Counting())
    np.testing.assert_array_equal(layer.qkv_bias.numpy().reshape(3, 24), [np.arange(24)] * 3)
    np.testing.assert_array_equal(layer.linear_bias.numpy(), np.arange(24))
    deviation = FusedMultiHeadAttention(1024, 4, bias_attr=initializer.XavierNormal()).qkv_bias.numpy().std()
    assert abs(deviation / np.sqrt(2 / 2048) - 1) < 0.1


@pytest.mark.parametrize(
    "name, make", [("Normal", lambda: initializer.Normal(1.0, 0.5)), ("Uniform", initializer.Uniform)]
)
def test_initializers_of_each_element_draw_the_parameter_at_once(name, make):
    paddle.seed(9)
    expected = paddle.create_parameter([3, 4, 16, 64], "float32", attr=paddle.ParamAttr(initializer=make()))
    paddle.seed(9)
    assert np.array_equal(by_argument(make).qkv_weight.numpy(), expected.numpy())


@pytest.mark.parametrize(
    "argument, value, error, words",
    [
        ("weight_attr", False, ValueError, ["False"]),
        ("weight_attr", 3, TypeError, ["ParamAttr", "int"]),
        ("weight_attr", [None], TypeError, ["ParamAttr", "list"]),
        ("bias_attr", 0.5, TypeError, ["ParamAttr", "float"]),
        ("weight_attr", initializer.Assign(np.zeros((3, 24, 24))), ValueError, ["[24, 24]", "[3, 24, 24]"]),
        (
            "weight_attr",
            initializer.Assign(np.zeros((3, 4, 6, 24))),
            ValueError,
            ["[24, 24]", "[3, 4, 6, 24]", "linear_weight"],
        ),
        ("bias_attr", initializer.Assign(np.zeros(72)), ValueError, ["[24]", "[72]"]),
    ],
)
def test_bad_attributes(argument, value, error, words):
    with pytest.raises(error) as raised:
        FusedMultiHeadAttention(24, 4, **{argument: value})
    assert str(raised.value).startswith(f"{argument}:")
    for word in words:
        assert word in str(raised.value), raised.value


def test_attributes_and_initializers():
    layer = FusedMultiHeadAttention(
        24,
        4,
        weight_attr=paddle.ParamAttr(initializer=paddle.nn.initializer.Constant(0.25), learning_rate=0.5),
        bias_attr=paddle.ParamAttr(initializer=paddle.nn.initializer.Constant(-2.0)),
    )
    assert (layer.qkv_weight.numpy() == 0.25).all() and (layer.linear_weight.numpy() == 0.25).all()
    assert (layer.qkv_bias.numpy() == -2).all() and (layer.linear_bias.numpy() == -2).all()


def test_without_biases():
    layer = make_layer(bias_attr=False)
    names = {name for name, _ in layer.named_parameters()}
    assert layer.qkv_bias is None and layer.linear_bias is None
    assert {"qkv_weight", "linear_weight"} <= names and not {"qkv_bias", "linear_bias"} & names
    x = make_x()
    assert_equal(layer(paddle.to_tensor(x)), expected(layer, x, Config()))


@pytest.mark.parametrize("normalize_before", [False, True])
@pytest.mark.parametrize("final_layer_norm", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_switches(normalize_before, final_layer_norm, causal):
    layer = make_layer(
        normalize_before=normalize_before, final_layer_norm=final_layer_norm, causal=causal, epsilon=1e-2
    )
    x = make_x()
    config = Config(
        pre_layer_norm=normalize_before,
        final_layer_norm=final_layer_norm,
        causal=causal,
        pre_ln_epsilon=1e-2,
        ln_epsilon=1e-2,
    )
    assert_equal(layer(paddle.to_tensor(x)), expected(layer, x, config))


def test_mask_and_query_as_key_and_value():
    layer = make_layer()
    x = paddle.to_tensor(make_x())
    mask = np.random.default_rng(0).random((2, 1, 5, 5)) < 0.7
    wanted = expected(layer, x.numpy(), Config(), mask)
    t = paddle.to_tensor(mask)
    for out in (layer(x, attn_mask=t), layer(x, x, x, t), layer(x, key=x, attn_mask=t), layer(x, None, x, attn_mask=t)):
        assert_equal(out, wanted)


def test_train_and_eval():
    layer = make_layer(dropout_rate=0.5, attn_dropout_rate=0.5)
    x = make_x()
    t = paddle.to_tensor(x)
    assert not np.array_equal(layer(t).numpy(), layer(t).numpy())
    layer.eval()
    assert_equal(layer(t), expected(layer, x, Config()))
    layer.train()
    paddle.seed(8)
    seeded = layer(t).numpy()
    paddle.seed(8)
    assert np.array_equal(layer(t).numpy(), seeded)


def test_default_dropout_is_one_half():
    layer = FusedMultiHeadAttention(24, 4)
    assert layer.training
    x = paddle.to_tensor(make_x())
    assert not np.array_equal(layer(x).numpy(), layer(x).numpy())


def test_training_by_backward():
    """Every parameter that the switches use gets its gradient, the same as the reference's."""
    layer = make_layer(normalize_before=True)
    x = make_x()
    d_out = np.random.default_rng(5).standard_normal(x.shape).astype("float32")
    layer(paddle.to_tensor(x)).backward(paddle.to_tensor(d_out))
    inputs = {n: p.numpy().astype(np.float64) for n, p in layer.named_parameters()}
    gradients = reference.backward(
        dict(inputs, x=x.astype(np.float64)), Config(pre_layer_norm=True), d_out.astype(float)
    )
    for name, p in layer.named_parameters():
        common.check_tensor(name, p.grad.numpy().astype(np.float64), gradients[name], "float32")


def test_a_weight_that_is_no_parameter():
    layer = make_layer()
    x = make_x()
    wanted = expected(layer, x, Config())
    paddle.nn.utils.weight_norm(layer, "linear_weight", dim=0)
    out = layer(paddle.to_tensor(x))
    assert_equal(out, wanted)
    out[0, 0, 0].backward()
    assert layer.linear_weight_g.grad.numpy().any()


def test_state_dict_round_trip(tmp_path):
    layer, other = make_layer(normalize_before=True), FusedMultiHeadAttention(24, 4, 0.0, 0.0, normalize_before=True)
    x = paddle.to_tensor(make_x())
    assert set(layer.state_dict()) == set(SHAPES) | set(LAYER_NORMS)
    assert not np.array_equal(layer(x).numpy(), other(x).numpy())
    paddle.save(layer.state_dict(), str(tmp_path / "layer.pdparams"))
    other.set_state_dict(paddle.load(str(tmp_path / "layer.pdparams")))
    assert np.array_equal(layer(x).numpy(), other(x).numpy())


def encoder_layer():
    return convert(paddle.nn.TransformerEncoderLayer(24, 4, 32))


LOADERS = {
    "layer": lambda: FusedMultiHeadAttention(24, 4, normalize_before=True),
    "parallel": lambda: ParallelFusedMultiHeadAttention(24, 4, normalize_before=True),
    "incubate": lambda: incubate.FusedMultiHeadAttention(24, 4),
    "converted": lambda: encoder_layer().self_attn,
}


@pytest.mark.parametrize("as_arrays", [False, True], ids=["tensors", "arrays"])
@pytest.mark.parametrize("nested", [False, True], ids=["itself", "nested"])
@pytest.mark.parametrize("own", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", LOADERS)
def test_state_dicts_of_other_dtypes_are_cast(kind, own, nested, as_arrays):
    layer = LOADERS[kind]()
    root = paddle.nn.Sequential(paddle.nn.ReLU(), paddle.nn.Sequential(layer)) if nested else layer
    root.to(dtype=own)
    dtypes = {name: p.dtype for name, p in root.state_dict().items()}
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        numbers = {
            name: reference.round_to(rng.standard_normal(p.shape), "bfloat16") for name, p in root.state_dict().items()
        }
        state = {name: paddle.to_tensor(common.to_storage(a, dtype)) for name, a in numbers.items()}
        if as_arrays:
            state = {name: value.numpy() for name, value in state.items()}
        missing, unexpected = root.set_state_dict(state)
        assert not missing and not unexpected
        for name, p in root.state_dict().items():
            assert p.dtype == dtypes[name] and isinstance(p, paddle.Tensor) and not p.stop_gradient
            assert np.abs(p.astype("float64").numpy() - numbers[name]).max() < 1e-3, (name, dtype)


@pytest.mark.parametrize("dtype", ["int64", "complex64", "bool"])
def test_state_dicts_of_numbers_that_are_no_floats_are_refused(dtype):
    layer = make_layer()
    before = layer.qkv_weight.numpy()
    with pytest.raises(Exception, match="dtype"):
        layer.set_state_dict({name: p.astype(dtype) for name, p in layer.state_dict().items()})
    assert np.array_equal(layer.qkv_weight.numpy(), before)


def test_state_dicts_hold_the_parameters_themselves():
    layer = make_layer()
    network = paddle.nn.Sequential(layer)
    for state in (
        network.state_dict(),
        network.state_dict(use_hook=False),
        network.to_static_state_dict(use_hook=False),
    ):
        assert state["0.qkv_weight"] is layer.qkv_weight


def test_deepcopy():
    layer = make_layer()
    twin = copy.deepcopy(layer)
    x = paddle.to_tensor(make_x())
    before = layer(x).numpy()
    assert np.array_equal(twin(x).numpy(), before)
    twin.qkv_weight.set_value(twin.qkv_weight.numpy() * 2)
    assert np.array_equal(layer(x).numpy(), before) and not np.array_equal(twin(x).numpy(), before)


def test_extra_repr():
    text = repr(make_layer(dropout_rate=0.125, attn_dropout_rate=0.25, normalize_before=True, causal=True))
    assert text.startswith("FusedMultiHeadAttention(")
    for part in ("embed_dim=24", "num_heads=4", "0.125", "0.25", "normalize_before=True", "causal=True"):
        assert part in text, part


def test_other_dtypes():
    for dtype in ("float64", "float16", "bfloat16"):
        layer = FusedMultiHeadAttention(24, 4, 0.0, 0.0)
        layer.to(dtype=dtype)
        x = common.to_storage(make_x(), dtype)
        out = layer(paddle.to_tensor(x))
        assert str(out.dtype).endswith(dtype) and np.isfinite(common.from_storage(out.numpy())).all()


def test_inside_another_network():
    """Parameters are found through the parent, and train() and eval() reach the layer."""
    network = paddle.nn.Sequential(paddle.nn.Linear(24, 24), make_layer(dropout_rate=0.5), paddle.nn.Linear(24, 1))
    assert len(network.parameters()) == 4 + len(SHAPES) + 2
    network.eval()
    x = paddle.to_tensor(make_x())
    assert np.array_equal(network(x).numpy(), network(x).numpy())
    network.train()
    assert not np.array_equal(network(x).numpy(), network(x).numpy())


BAD_ARGUMENTS = [
    (dict(embed_dim=24, num_heads=5), ValueError, ["embed_dim", "24", "5"]),
    (dict(embed_dim=0, num_heads=1), ValueError, ["embed_dim", "0"]),
    (dict(embed_dim=24, num_heads=0), ValueError, ["num_heads", "0"]),
    (dict(embed_dim=24, num_heads=-4), ValueError, ["num_heads", "-4"]),
    (dict(embed_dim=24, num_heads=4, dropout_rate=1.5), ValueError, ["dropout_rate", "1.5"]),
    (dict(embed_dim=24, num_heads=4, attn_dropout_rate=-0.5), ValueError, ["attn_dropout_rate", "-0.5"]),
    (dict(embed_dim=24, num_heads=4, kdim=0), ValueError, ["kdim", "1", "0"]),
    (dict(embed_dim=24, num_heads=4, vdim="32"), TypeError, ["vdim", "int", "32"]),
    (dict(embed_dim=24, num_heads=4, kdim=32, normalize_before=True), ValueError, ["normalize_before", "24", "32"]),
    (dict(embed_dim=24, num_heads=4, num_kv_heads=3), ValueError, ["num_kv_heads", "4", "3"]),
    (dict(embed_dim=24, num_heads=4, num_kv_heads=2.0), TypeError, ["num_kv_heads", "2.0"]),
    (dict(embed_dim=24, num_heads=4, window_size=-2), ValueError, ["window_size", "-2"]),
    (dict(embed_dim=24, num_heads=4, scale="1"), TypeError, ["scale", "'1'"]),
    (dict(embed_dim=24.0, num_heads=4), TypeError, ["embed_dim", "int", "24.0"]),
    (dict(embed_dim=10**400, num_heads=4), ValueError, ["embed_dim", "2^31"]),
    (dict(embed_dim=24, num_heads=np.bool_(True)), TypeError, ["num_heads", "int", "True"]),
    (dict(embed_dim=24, num_heads="4"), TypeError, ["num_heads", "int", "'4'"]),
    (dict(embed_dim=24, num_heads=4, dropout_rate=np.str_("0.1")), TypeError, ["dropout_rate", "0.1"]),
    (dict(embed_dim=24, num_heads=4, epsilon=10**400), ValueError, ["epsilon", "1000"]),
    (dict(embed_dim=24, num_heads=4, causal="False"), TypeError, ["causal", "bool", "'False'"]),
    (dict(embed_dim=24, num_heads=4, normalize_before=None), TypeError, ["normalize_before", "bool", "None"]),
    (dict(embed_dim=24, num_heads=4, need_weights="yes"), TypeError, ["need_weights", "yes"]),
]


@pytest.mark.parametrize("arguments, error, words", BAD_ARGUMENTS, ids=[str(row[0]) for row in BAD_ARGUMENTS])
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error) as raised:
        FusedMultiHeadAttention(**arguments)
    for word in words:
        assert word in str(raised.value), str(raised.value)


def test_sizes_of_numpy_are_welcome():
    layer = FusedMultiHeadAttention(np.int64(24), np.int32(4), np.float32(0.5), final_layer_norm=np.bool_(False))
    assert type(layer.embed_dim) is type(layer.head_dim) is int and layer.dropout_rate == 0.5 and layer.ln_scale is None


def test_kdim_and_vdim_may_be_the_embed_dim():
    FusedMultiHeadAttention(24, 4, kdim=24, vdim=24)


@pytest.mark.parametrize("argument", ["key", "value", "cache"])
def test_keys_and_values_of_two_lengths_and_caches_are_refused(argument):
    layer = make_layer()
    x = paddle.to_tensor(make_x())
    other = paddle.to_tensor(make_x(seq_len=9))
    with pytest.raises((ValueError, TypeError)) as raised:
        layer(x, **{argument: other})
    assert argument in str(raised.value)


def test_query_of_another_width():
    with pytest.raises(ValueError) as raised:
        make_layer()(paddle.to_tensor(np.zeros((2, 5, 16), "float32")))
    assert "24" in str(raised.value) and "16" in str(raised.value)
