"""Training features of Paddle with the operator: auto_cast, decorate, GradScaler, recompute, accumulation, clipping,
DataParallel, Model, summary, flops, copies.

Paddle switches auto_cast off on the CPU, and its own CPU operators never cast. The tests replace the place that auto_cast sees,
and nothing else, so that its real state reaches the operator; matrix products of Paddle's own layers stay float32 then.
"""

import copy
import os
import pickle
import subprocess
import sys

import data_parallel
import numpy as np
import paddle
import pytest
from paddle.distributed.fleet.utils import recompute
from paddle_fused_attention import FusedMultiHeadAttention, count_flops, fused_multi_head_attention, incubate

IS_PADDLE_2 = paddle.__version__.startswith("2.")
NORMS = ("pre_ln_scale", "pre_ln_bias", "ln_scale", "ln_bias")
DTYPES = {"float16": paddle.float16, "bfloat16": paddle.bfloat16}


def make_layer(dropout_rate=0.0, seed=1, **arguments):
    """All eight parameters, none of them with its initial value."""
    paddle.seed(seed)
    layer = FusedMultiHeadAttention(24, 4, dropout_rate, dropout_rate, **dict(dict(normalize_before=True), **arguments))
    rng = np.random.default_rng(seed)
    layer.set_state_dict(
        {n: (p.numpy() + 0.2 * rng.standard_normal(p.shape)).astype("float32") for n, p in layer.state_dict().items()}
    )
    return layer


def make_x(batch=4, seq_len=7, seed=3):
    return np.random.default_rng(seed).standard_normal((batch, seq_len, 24)).astype("float32")


def as_float(tensor):
    return tensor.astype("float32").numpy()


def gradients(layer):
    return {name: as_float(p.grad) for name, p in layer.named_parameters()}


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
    assert np.array_equal(out.numpy(), expected.numpy()) and not np.array_equal(out.numpy(), layer(x, attn_mask=mask).numpy())
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
    """Through 24 pre-norm layers the error is that of their products, not of a sum rounded 24 times; x may be beyond float16."""
    paddle.seed(0)
    layers = [FusedMultiHeadAttention(64, 4, 0.0, 0.0, normalize_before=True, final_layer_norm=False) for _ in range(24)]
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
    rounded = {n: p.astype(dtype).astype("float32") if n in NORMS else p.astype(dtype) for n, p in layer.named_parameters()}
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
            "auto_cast rewrites the whole programs of Paddle 2.6 by lists of Paddle's own operators: this one stays float32"
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
                out = fused_multi_head_attention(data, pre_layer_norm=True, dropout_rate=0.0, attn_dropout_rate=0.0, **inputs)
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
    """A step by scaled gradients is one by plain ones. (Paddle's CPU operator that looks for infinite ones never finds any.)"""
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


def run_twice(network, call):
    """Output and all gradients for a fixed state of the generator, which goes on as it was."""
    paddle.seed(5)
    x = paddle.to_tensor(make_x(), stop_gradient=False)
    out = call(network, x)
    out.square().mean().backward()
    results = [out.numpy(), x.grad.numpy(), *(p.grad.numpy() for p in network.parameters())]
    network.clear_gradients()
    return results + [paddle.rand([3]).numpy()]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recompute(use_reentrant):
    if IS_PADDLE_2 and not use_reentrant:
        pytest.skip("Paddle 2.6 has recompute with use_reentrant=False on GPUs alone")
    network = paddle.nn.Sequential(make_layer(0.3), make_layer(0.2, seed=2, causal=True))
    expected = run_twice(network, lambda net, x: net(x))
    results = run_twice(network, lambda net, x: recompute(net[1], recompute(net[0], x, use_reentrant=use_reentrant)))
    for result, wanted in zip(results, expected):
        assert np.array_equal(result, wanted)


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
    """The second pass, of three tensors with gradients of their own, is of ordinary ops: up to the rounding of 16 bits the same."""
    layer = make_layer(0.3)
    results = []
    for call in (lambda net, x: net(x), lambda net, x: recompute(net, x, x, x), lambda net, x: net(x * 1.0, x * 1.0, x * 1.0)):
        paddle.seed(5)
        x = paddle.to_tensor(make_x(), stop_gradient=False)
        with amp.auto_cast(dtype=dtype):
            out = call(layer, x)
        results.append([out.dtype])
        out.astype("float32").square().mean().backward()
        results[-1] += [as_float(out), x.grad.numpy(), *gradients(layer).values()]
        layer.clear_gradients()
    for found in results[1:]:
        assert found[0] == results[0][0]
        for result, wanted in zip(found[1:], results[0][1:]):
            assert np.abs(result - wanted).max() < (0.01 if dtype == "float16" else 0.06) * np.abs(wanted).max()


def test_gradient_accumulation():
    """Two halves of a batch give the gradients of the whole."""
    layer, x = make_layer(), make_x()
    layer(paddle.to_tensor(x)).square().mean().backward()
    expected = gradients(layer)
    layer.clear_gradients()
    for half in (x[:2], x[2:]):
        (layer(paddle.to_tensor(half)).square().mean() / 2).backward()
    for name, gradient in gradients(layer).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-5 * np.abs(expected[name]).max() + 1e-8)


@pytest.mark.parametrize("clip", ["ClipGradByGlobalNorm", "ClipGradByNorm", "ClipGradByValue"])
def test_gradient_clipping(clip):
    layer = make_layer()
    limit = 0.01
    layer(paddle.to_tensor(make_x())).square().sum().backward()
    before = {name: p.numpy() for name, p in layer.named_parameters()}
    found = {name: g.astype(np.float64) for name, g in gradients(layer).items()}
    total = np.sqrt(sum((g**2).sum() for g in found.values()))
    assert total > limit
    optimizer = paddle.optimizer.SGD(1.0, parameters=layer.parameters(), grad_clip=getattr(paddle.nn, clip)(limit))
    optimizer.step()
    for name, p in layer.named_parameters():
        norm = np.sqrt((found[name] ** 2).sum())
        wanted = {
            "ClipGradByGlobalNorm": found[name] * limit / total,
            "ClipGradByNorm": found[name] * min(1.0, limit / norm),
            "ClipGradByValue": np.clip(found[name], -limit, limit),
        }[clip]
        np.testing.assert_allclose(before[name] - p.numpy(), wanted, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_data_parallel(tmp_path):
    """Two processes with half of each batch train as one process with all of it."""
    path = tmp_path / "parameters.npz"
    script = data_parallel.__file__
    result = subprocess.run(
        [sys.executable, script, str(path)],
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    network = data_parallel.make_network()
    start = {name: p.numpy() for name, p in network.named_parameters()}
    data_parallel.train(network, data_parallel.make_batches())
    found = np.load(path)
    for name, p in network.named_parameters():
        np.testing.assert_allclose(found[name], p.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
        assert not np.array_equal(found[name], start[name]), name


class Labelled(paddle.io.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return make_x(seed=i)[0], np.array([i % 3])


class Classifier(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.attention = make_layer(0.1)
        self.linear = paddle.nn.Linear(24, 3)

    def forward(self, x):
        return self.linear(self.attention(x).mean(axis=1))


def test_model_fit(tmp_path):
    """paddle.Model trains as a loop by hand, with accumulation and clipping, and its checkpoint goes on."""

    def make():
        paddle.seed(0)
        network = Classifier()
        clip = paddle.nn.ClipGradByGlobalNorm(1.0)
        return network, paddle.optimizer.AdamW(1e-2, parameters=network.parameters(), grad_clip=clip)

    network, optimizer = make()
    model = paddle.Model(network)
    model.prepare(optimizer, paddle.nn.CrossEntropyLoss(), paddle.metric.Accuracy())
    paddle.seed(7)
    model.fit(Labelled(), epochs=2, batch_size=4, shuffle=False, verbose=0, accumulate_grad_batches=2)
    twin, optimizer = make()
    paddle.seed(7)
    for _ in range(2):
        for step, (x, label) in enumerate(paddle.io.DataLoader(Labelled(), batch_size=4)):
            paddle.nn.CrossEntropyLoss()(twin(x), label).backward()
            if step % 2:
                optimizer.step()
                optimizer.clear_grad()
    for (name, p), q in zip(network.named_parameters(), twin.parameters()):
        np.testing.assert_allclose(p.numpy(), q.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
    model.save(str(tmp_path / "model"))
    other = paddle.Model(Classifier())
    other.prepare(None, paddle.nn.CrossEntropyLoss(), paddle.metric.Accuracy())
    other.load(str(tmp_path / "model"))
    assert other.evaluate(Labelled(), verbose=0) == model.evaluate(Labelled(), verbose=0)
    assert len(model.predict(Labelled(), batch_size=4, verbose=0)[0]) == 4


def test_summary(capsys):
    layer = make_layer()
    count = sum(int(np.prod(p.shape)) for p in layer.parameters())
    assert paddle.summary(layer, (2, 7, 24)) == {"total_params": count, "trainable_params": count}
    assert "[2, 7, 24]" in capsys.readouterr().out


def expected_flops(batch, seq_len, pairs):
    return 4 * batch * seq_len * 24 * 24 + 2 * batch * pairs * 24


def test_flops():
    for causal, pairs in ((False, 7 * 7), (True, 7 * 8 // 2)):
        layer = make_layer(causal=causal)
        layer.total_ops = 5
        count_flops(layer, (paddle.zeros([2, 7, 24]),), None)
        assert layer.total_ops == 5 + expected_flops(2, 7, pairs)
    layer = incubate.FusedMultiHeadAttention(24, 4)
    layer.total_ops = 0
    count_flops(layer, (paddle.zeros([2, 7, 24]),), None)
    assert layer.total_ops == expected_flops(2, 7, 49)


def test_paddle_flops(capsys):
    network = paddle.nn.Sequential(make_layer(), paddle.nn.Linear(24, 8))
    try:
        paddle.flops(paddle.nn.Sequential(paddle.nn.Linear(24, 8)), [2, 7, 24])
    except TypeError as error:
        pytest.skip(f"paddle.flops fails for Paddle's own Linear with this NumPy: {error}")
    assert paddle.flops(network, [2, 7, 24]) == expected_flops(2, 7, 49) + 2 * 7 * 24 * 8
    assert "zero FLOPs" not in capsys.readouterr().out


def by_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("clone", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
def test_copies(clone):
    """A copy has its own parameters, and the switches and the mode of its original."""
    if clone is by_pickle and (int(paddle.version.major), int(paddle.version.minor)) < (3, 3):
        with pytest.raises(TypeError, match="cannot pickle"):
            clone(paddle.nn.Linear(2, 2))
        pytest.skip("parameters can be pickled since Paddle 3.3")
    layer = make_layer(0.3, causal=True, final_layer_norm=False, epsilon=1e-3)
    layer.linear_bias.stop_gradient = True
    layer.eval()
    twin = clone(layer)
    x = paddle.to_tensor(make_x())
    before = layer(x).numpy()
    assert repr(twin) == repr(layer) and not twin.training and twin.linear_bias.stop_gradient
    assert np.array_equal(twin(x).numpy(), before)
    twin.train()
    twin(x).mean().backward()
    paddle.optimizer.SGD(1.0, parameters=twin.parameters()).step()
    twin.eval()
    assert not np.array_equal(twin(x).numpy(), before)
    assert np.array_equal(layer(x).numpy(), before) and layer.qkv_weight.grad is None
