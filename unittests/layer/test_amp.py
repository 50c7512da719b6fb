"""Mixed precision: auto_cast, decorate, GradScaler, recompute under auto_cast, casts of the layer.

Paddle switches auto_cast off on the CPU, and its own CPU operators never cast. The tests replace the place that
auto_cast sees, and nothing else, so that its real state reaches the operator. Matrix products of Paddle's own layers
stay float32 then.
"""

import sys

import common
import numpy as np
import paddle
import pytest
from blocks import DTYPES, IS_PADDLE_2, NORMS, as_float, gradients, make_layer, make_x
from paddle.distributed.fleet.utils import recompute
from paddle_fused_attention import (
    FusedMultiHeadAttention,
    fused_bias_dropout_residual_layer_norm,
    fused_feedforward,
    fused_linear,
    fused_multi_head_attention,
)


class GpuPlace:
    def is_gpu_place(self):
        return True

    def is_xpu_place(self):
        return False

    def is_custom_place(self):
        return False


class TracerOnGpu:
    """Paddle's tracer, but for its place."""

    _expected_place = GpuPlace()

    def __init__(self, tracer):
        object.__setattr__(self, "tracer", tracer)

    def __getattr__(self, name):
        return getattr(self.tracer, name)

    def __setattr__(self, name, value):
        setattr(self.tracer, name, value)


@pytest.fixture
def amp(monkeypatch):
    auto_cast, grad_scaler = (sys.modules[f"paddle.amp.{name}"] for name in ("auto_cast", "grad_scaler"))
    find_tracer = paddle.base.framework._dygraph_tracer

    def tracer_on_gpu():
        return TracerOnGpu(find_tracer()) if find_tracer() else None

    for module in (auto_cast, grad_scaler):
        monkeypatch.setattr(module, "_dygraph_tracer", tracer_on_gpu)
    for name in DTYPES:
        monkeypatch.setattr(auto_cast, f"_is_gpu_{name}_supported", lambda: True)
    return paddle.amp


def by_hand(layer, x, dtype, **changes):
    """What auto_cast should compute: everything but x and layer-norm parameters cast."""
    arguments = {n: p if n in NORMS else p.astype(dtype) for n, p in layer.named_parameters()}
    arguments.update(dropout_rate=0.0, attn_dropout_rate=0.0, pre_layer_norm=True, **changes)
    return fused_multi_head_attention(x, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_auto_cast(amp, level, dtype):
    """Bit for bit as if cast by hand; the result and the gradients are float32, like x and the parameters."""
    layer = make_layer()
    x = paddle.to_tensor(make_x(), stop_gradient=False)
    mask = paddle.to_tensor(np.random.default_rng(0).standard_normal((7, 7)).astype("float32"))
    expected = by_hand(layer, x, dtype, attn_mask=mask)
    expected.square().mean().backward()
    wanted = dict(gradients(layer), x=x.grad.numpy())
    layer.clear_gradients()
    x.clear_gradient()
    with amp.auto_cast(level=level, dtype=dtype):
        out = layer(x, attn_mask=mask)
        with amp.auto_cast(enable=False):
            assert layer(x).dtype == paddle.float32
    assert out.dtype == paddle.float32
    out.square().mean().backward()
    assert np.array_equal(out.numpy(), expected.numpy()) and not np.array_equal(
        out.numpy(), layer(x, attn_mask=mask).numpy()
    )
    for name, p in [*layer.named_parameters(), ("x", x)]:
        assert p.dtype == paddle.float32 and p.grad.dtype == paddle.float32, name
        assert np.array_equal(p.grad.numpy(), wanted[name]), name
        assert wanted[name].any(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_cast_of_16_bit_x(amp, dtype):
    """As what Paddle's own white-listed operators hand on: all in its dtype, or in auto_cast's if x is of the other."""
    layer, x = make_layer(), paddle.to_tensor(make_x())
    expected = by_hand(layer, x.astype(dtype), dtype)
    with amp.auto_cast(dtype=dtype):
        out = layer(x.astype(dtype))
        for other in DTYPES:
            assert layer(x.astype(other)).dtype == DTYPES[dtype]
    assert out.dtype == DTYPES[dtype] and np.array_equal(as_float(out), as_float(expected))


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_cast_keeps_the_residual_stream(amp, dtype, level):
    """Through 24 pre-norm layers the error is that of their products, not of a sum rounded 24 times; x may be beyond
    float16.
    """
    paddle.seed(0)
    layers = [
        FusedMultiHeadAttention(64, 4, 0.0, 0.0, normalize_before=True, final_layer_norm=False) for _ in range(24)
    ]
    # The stream of a deep model is larger than what a layer adds.
    x = paddle.to_tensor(8 * np.random.default_rng(0).standard_normal((2, 32, 64)).astype("float32"))

    def run(x):
        for layer in layers:
            x = layer(x)
        return x

    expected = run(x).numpy()
    with amp.auto_cast(level=level, dtype=dtype):
        kept, rounded = (np.linalg.norm(as_float(run(start)) - expected) for start in (x, x.astype(dtype)))
        large = layers[0](x * 7e4).numpy()
    assert kept < 0.6 * rounded, (kept, rounded)
    np.testing.assert_allclose(large, layers[0](x * 7e4).numpy(), rtol=1e-6, atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_cast_of_frozen_parameters_and_16_bit_norms(amp, dtype):
    """Frozen parameters stay without gradients; 16-bit layer-norm parameters go in as float32."""
    layer = make_layer()
    layer.qkv_weight.stop_gradient = True
    arguments = {n: p.astype(dtype) if n in NORMS else p for n, p in layer.named_parameters()}
    x = paddle.to_tensor(make_x())
    with amp.auto_cast(dtype=dtype):
        out = fused_multi_head_attention(x, pre_layer_norm=True, dropout_rate=0.0, attn_dropout_rate=0.0, **arguments)
    rounded = {
        n: p.astype(dtype).astype("float32") if n in NORMS else p.astype(dtype) for n, p in layer.named_parameters()
    }
    expected = fused_multi_head_attention(x, pre_layer_norm=True, dropout_rate=0.0, attn_dropout_rate=0.0, **rounded)
    assert np.array_equal(out.numpy(), expected.numpy())
    out.sum().backward()
    assert layer.qkv_weight.grad is None and layer.linear_weight.grad is not None


def test_black_list_and_float64(amp):
    layer, x = make_layer(), paddle.to_tensor(make_x())
    expected = layer(x).numpy()
    with amp.auto_cast(dtype="bfloat16", custom_black_list={"custom_fused_attention"}):
        assert np.array_equal(layer(x).numpy(), expected)
        assert layer(x.astype("bfloat16")).dtype == paddle.float32
    layer.to(dtype="float64")
    with amp.auto_cast(dtype="bfloat16"):
        assert layer(x.astype("float64")).dtype == paddle.float64


def test_packed_sequences(amp):
    """The operator of packed sequences is cast, and listed, as that of most blocks."""
    layer, x = make_layer(), paddle.to_tensor(make_x())
    tokens = x.reshape([-1, x.shape[-1]])
    starts = paddle.arange(0, tokens.shape[0] + 1, x.shape[1], dtype="int32")
    packed = dict(cu_seqlens=starts, max_seqlen=x.shape[1])
    with amp.auto_cast(dtype="bfloat16"):
        assert np.array_equal(layer(tokens, **packed).numpy(), layer(x).reshape(tokens.shape).numpy())
    with amp.auto_cast(dtype="bfloat16", custom_black_list={"custom_fused_attention"}):
        assert np.array_equal(layer(tokens, **packed).numpy(), layer(x).reshape(tokens.shape).numpy())


def run_to_static(layer, x, dtype, full_graph):
    static = paddle.jit.to_static(layer, full_graph=full_graph)
    with paddle.amp.auto_cast(dtype=dtype):
        out = static(x)
    out.square().mean().backward()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full_graph", [True, False], ids=["full_graph", "sot"])
def test_auto_cast_in_to_static(amp, dtype, full_graph):
    if IS_PADDLE_2 and full_graph:
        pytest.skip(
            "auto_cast rewrites whole programs of Paddle 2.6 by lists of Paddle's own operators: this one stays float32"
        )
    layer, x = make_layer(), paddle.to_tensor(make_x())
    expected = by_hand(layer, x, dtype)
    expected.square().mean().backward()
    wanted = gradients(layer)
    layer.clear_gradients()
    out = run_to_static(layer, x, dtype, full_graph)
    assert out.dtype == paddle.float32 and np.array_equal(out.numpy(), expected.numpy())
    for name, gradient in gradients(layer).items():
        assert np.array_equal(gradient, wanted[name]), name


@pytest.mark.skipif(IS_PADDLE_2, reason="auto_cast acts on dygraph alone in Paddle 2.6")
@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_cast_in_static_graphs(amp, dtype):
    layer = make_layer()
    expected = by_hand(layer, paddle.to_tensor(make_x()), dtype).numpy()
    state = {name: p.numpy() for name, p in layer.named_parameters()}
    paddle.enable_static()
    try:
        main, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(main, startup):
            data = paddle.static.data("x", [-1, -1, 24])
            inputs = {name: paddle.static.data(name, array.shape, "float32") for name, array in state.items()}
            with paddle.amp.auto_cast(dtype=dtype):
                out = fused_multi_head_attention(
                    data, pre_layer_norm=True, dropout_rate=0.0, attn_dropout_rate=0.0, **inputs
                )
            assert out.dtype == paddle.float32
        (result,) = paddle.static.Executor(paddle.CPUPlace()).run(main, feed=dict(state, x=make_x()), fetch_list=[out])
    finally:
        paddle.disable_static()
    assert np.array_equal(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decorate(amp, dtype):
    """O2 makes the projections 16-bit and leaves the layer norms, also those of an outer model's layers."""
    layer = make_layer()
    before = {name: p.numpy() for name, p in layer.named_parameters()}
    model = amp.decorate(models=paddle.nn.Sequential(layer), level="O2", dtype=dtype)
    for name, p in layer.named_parameters():
        assert p.dtype == (paddle.float32 if name in NORMS else DTYPES[dtype]), name
        wanted = before[name] if name in NORMS else as_float(paddle.to_tensor(before[name]).astype(dtype))
        assert np.array_equal(as_float(p), wanted), name
    with amp.auto_cast(level="O2", dtype=dtype):
        assert model(paddle.to_tensor(make_x()).astype(dtype)).dtype == DTYPES[dtype]
        out = model(paddle.to_tensor(make_x()))
    assert out.dtype == paddle.float32  # as x is
    out.square().mean().backward()
    for name, p in layer.named_parameters():
        assert p.grad.dtype == p.dtype and np.isfinite(as_float(p.grad)).all(), name


def test_layers_are_cast_with_their_gradients():
    layer = make_layer()
    order = [name for name, _ in layer.named_parameters()]
    layer(paddle.to_tensor(make_x())).mean().backward()
    outer = paddle.nn.Sequential(layer)
    for dtype in ("bfloat16", paddle.float16, np.float64, "float32"):
        outer.to(dtype=dtype)
        name_of = str(np.dtype(dtype)) if dtype is np.float64 else str(dtype).split(".")[-1].lower()
        sixteen_bit = name_of not in ("float32", "float64")
        for name, p in layer.named_parameters():
            wanted = "float32" if sixteen_bit and name in NORMS else name_of
            wanted = {"fp16": "float16"}.get(wanted, wanted)
            assert p.dtype == getattr(paddle, wanted) and p.grad.dtype == p.dtype, (dtype, name)
    assert [name for name, _ in layer.named_parameters()] == order


def test_grad_scaler(amp):
    """A step by scaled gradients is one by plain ones. (Paddle's CPU operator that looks for infinite ones never finds
    any.)
    """
    layer, twin = make_layer(), make_layer()
    x = paddle.to_tensor(make_x())
    scaler = amp.GradScaler(init_loss_scaling=1024.0)
    assert scaler.is_enable()
    for network, scale in ((layer, scaler), (twin, None)):
        optimizer = paddle.optimizer.Adam(0.1, epsilon=1e-2, parameters=network.parameters())
        with amp.auto_cast(dtype="bfloat16"):
            loss = network(x).astype("float32").square().mean()
        if scale is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    start = dict(make_layer().named_parameters())
    for (name, p), q in zip(layer.named_parameters(), twin.parameters()):
        np.testing.assert_allclose(p.numpy(), q.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
        assert not np.array_equal(p.numpy(), start[name].numpy()), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_recompute_under_auto_cast(amp, dtype):
    """The second forward pass, which happens outside auto_cast, casts as the first."""
    layer = make_layer(0.3)
    results = []
    for call in (lambda net, x: net(x), lambda net, x: recompute(net, x)):
        paddle.seed(5)
        x = paddle.to_tensor(make_x(), stop_gradient=False)
        with amp.auto_cast(dtype=dtype):
            out = call(layer, x)
        out.astype("float32").square().mean().backward()
        results.append([as_float(out), x.grad.numpy(), *gradients(layer).values()])
        layer.clear_gradients()
    for result, wanted in zip(*results):
        assert np.array_equal(result, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_recompute_of_key_and_value_under_auto_cast(amp, dtype):
    """The second pass, of three tensors with gradients of their own, is composed of smaller operators: up to the
    rounding of 16 bits the same.
    """
    layer = make_layer(0.3)
    results = []
    d_out = paddle.to_tensor(make_x(seed=9))  # a mean of squares would be the same whatever the layer norm is given
    for call in (
        lambda net, x: net(x),
        lambda net, x: recompute(net, x, x, x),
        lambda net, x: net(x * 1.0, x * 1.0, x * 1.0),
    ):
        paddle.seed(5)
        x = paddle.to_tensor(make_x(), stop_gradient=False)
        with amp.auto_cast(dtype=dtype):
            out = call(layer, x)
        results.append([out.dtype])
        out.astype("float32").backward(d_out)
        results[-1] += [as_float(out), x.grad.numpy(), *gradients(layer).values()]
        layer.clear_gradients()
    for found in results[1:]:
        assert found[0] == results[0][0]
        for result, wanted in zip(found[1:], results[0][1:]):
            assert np.abs(result - wanted).max() < (0.01 if dtype == "float16" else 0.06) * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kdim, vdim", [(24, 24), (16, 10)])
def test_auto_cast_of_other_keys(amp, kdim, vdim, dtype):
    """float32 tensors go through 16-bit products, whatever float dtype each is of, and the result stays float32 as the
    residual is. A black list keeps all in float32."""
    layer = FusedMultiHeadAttention(24, 4, 0.0, 0.0, kdim, vdim)
    rng = np.random.default_rng(0)
    x, key, value = (
        paddle.to_tensor(rng.standard_normal(shape).astype("float32"), stop_gradient=False)
        for shape in ((2, 5, 24), (2, 9, kdim), (2, 9, vdim))
    )
    expected = layer(x, key, value)
    with paddle.amp.auto_cast(dtype=dtype):
        found = [layer(x, key, value), layer(x, key.astype(dtype), value)]
    with paddle.amp.auto_cast(dtype=dtype, custom_black_list={"custom_fused_attention"}):
        black = layer(x, key, value)
    assert np.array_equal(black.numpy(), expected.numpy())
    for out in found:
        assert out.dtype == paddle.float32
        assert 0 < float((out - expected).abs().max()) <= 8 * common.UNIT_ROUNDOFF[dtype] * float(expected.abs().max())
    found[0].sum().backward()
    assert all(t.grad.dtype == paddle.float32 for t in (x, key, value, *layer.parameters()))


def blocks_under_auto_cast(dtype):
    """Calls of the other operators, with float32 parameters, and what auto_cast should make of them: the arguments that
    are cast to 16 bits where x is of `dtype`."""
    rng = np.random.default_rng(0)

    def tensor(*shape, dtype="float32"):
        return paddle.to_tensor(rng.standard_normal(shape).astype("float32")).astype(dtype)

    x, norm = tensor(2, 5, 8, dtype=dtype), {"scale": tensor(8), "bias": tensor(8)}
    weights = {
        "linear1_weight": tensor(8, 12),
        "linear2_weight": tensor(12, 8),
        "linear1_bias": tensor(12),
        "linear2_bias": tensor(8),
    }
    ln = {f"ln2_{name}": value for name, value in norm.items()}
    tail_ln = {f"ln_{name}": value for name, value in norm.items()}
    narrow = dtype != "float32"
    return [
        (fused_feedforward, {"x": x, **weights, **ln}, [*weights], dict(dropout1_rate=0.2, dropout2_rate=0.2, seed=3)),
        (
            fused_bias_dropout_residual_layer_norm,
            {"x": x, "residual": tensor(2, 5, 8, dtype=dtype), "bias": tensor(8), **tail_ln},
            ["bias"] if narrow else [],
            dict(dropout_rate=0.2, seed=3),
        ),
        (fused_linear, {"x": x, "weight": tensor(8, 12), "bias": tensor(12)}, ["x", "weight", "bias"], {}),
    ]


@pytest.mark.parametrize("x_is_float32", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_blocks(amp, dtype, x_is_float32):
    """Products are 16-bit; a residual stays float32 if it is, and layer-norm parameters stay so anyway."""
    for function, tensors, cast, others in blocks_under_auto_cast("float32" if x_is_float32 else dtype):
        with amp.auto_cast(dtype=dtype):
            out = function(**tensors, **others)
        by_hand = {name: t.astype(dtype) if name in cast else t for name, t in tensors.items()}
        expected = function(**by_hand, **others)
        assert out.dtype == expected.dtype
        np.testing.assert_array_equal(as_float(out), as_float(expected))
        name = {"fused_feedforward": "custom_fused_feedforward", "fused_linear": "custom_fused_linear"}.get(
            function.__name__, "custom_residual_norm"
        )
        with amp.auto_cast(dtype=dtype, custom_black_list=[name]):
            out = function(**tensors, **others)
        assert out.dtype == paddle.float32
        wide = function(**{name: t.astype("float32") for name, t in tensors.items()}, **others)
        np.testing.assert_array_equal(as_float(out), as_float(wide))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tail_of_two_dtypes(amp, dtype):
    """A float32 residual beside a 16-bit x, as a linear layer leaves it, is added in float32."""
    rng = np.random.default_rng(0)
    x, residual = (paddle.to_tensor(rng.standard_normal((2, 8)).astype("float32")) for _ in range(2))
    narrow = x.astype(dtype)
    with amp.auto_cast(dtype=dtype):
        out = fused_bias_dropout_residual_layer_norm(narrow, residual, dropout_rate=0.0)
    expected = fused_bias_dropout_residual_layer_norm(narrow.astype("float32"), residual, dropout_rate=0.0)
    assert out.dtype == paddle.float32
    np.testing.assert_array_equal(out.numpy(), expected.numpy())
