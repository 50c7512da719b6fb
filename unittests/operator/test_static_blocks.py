"""Static graphs of the feed-forward block, of a block's tail and of linear give what dygraph gives: PIR programs on
Paddle 3, legacy programs on 2.6, to_static and saved models.
"""

import contextlib

import cases
import common
import numpy as np
import paddle
import pytest
from cases import DTYPES, FEED_FORWARD_FEATURES, FULL_FEED_FORWARD, FULL_LINEAR, FULL_RESIDUAL_NORM
from paddle_fused_attention import incubate
from runners import as_called, call, check_case, check_stored, legacy_programs, run_dygraph, run_static, static_mode

IS_PADDLE_2 = paddle.__version__.startswith("2.")

FEATURES = {
    **FEED_FORWARD_FEATURES,
    **{f"tail-{name}": case for name, case in cases.RESIDUAL_NORM_FEATURES.items()},
    **{f"linear-{name}": case for name, case in cases.LINEAR_FEATURES.items()},
}
BLOCKS = pytest.mark.parametrize(
    "case", [FULL_FEED_FORWARD, FULL_RESIDUAL_NORM, FULL_LINEAR], ids=["feed_forward", "residual_norm", "linear"]
)


def check_equal(case, place):
    """A program gives the bits of dygraph, and both what the reference gives."""
    case = as_called(case)
    inputs = common.make_inputs(case)
    arrays = common.stored_inputs(case, inputs)
    wanted = common.differentiable(inputs)
    static = run_static(arrays, case.config, place, wanted)
    check_stored(case, common.expect(case, inputs), *static)
    dygraph = run_dygraph(arrays, case.config, place, wanted)
    assert np.array_equal(static[0], dygraph[0])
    if isinstance(place, paddle.CPUPlace):
        for name in wanted:
            assert np.array_equal(static[1][name], dygraph[1][name]), name


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, place):
    check_equal(FEATURES[feature], place)


@BLOCKS
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, case, place):
    check_equal(case.but(dtype=dtype), place)


@pytest.mark.parametrize(
    "case, wanted",
    [
        subset
        for case in (FULL_FEED_FORWARD, FULL_RESIDUAL_NORM, FULL_LINEAR)
        for subset in cases.gradient_subsets(case)
        if len(subset[1]) < 2
    ],
    ids=lambda value: str(value)[:90],
)
def test_partial_gradients(case, wanted, place):
    check_case(case, place, run_static, wanted)


@BLOCKS
@pytest.mark.parametrize("unknown", [(0,), (1,), (0, 1)], ids=str)
def test_unknown_sizes(unknown, case, place):
    for shape in ((2, 7), (3, 33)):
        sized = case.but(shape=shape)
        inputs = common.make_inputs(sized)
        wanted = common.differentiable(inputs)
        results = run_static(common.stored_inputs(sized, inputs), sized.config, place, wanted, unknown)
        check_stored(sized, common.expect(sized, inputs), *results)


@BLOCKS
def test_declared_shape_and_dtype(case, place):
    with static_mode(), paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
        for dtype in DTYPES:
            variables = {
                name: paddle.static.data(
                    f"{name}_{dtype}", [-1, -1, case.width] if name in ("x", "residual") else shape,
                    case.but(dtype=dtype).dtype_of(name),
                )
                for name, (shape, _, _) in case.drawn().items()
                if name != "d_out"
            }  # fmt: skip
            out = call(variables, case.config)
            assert list(out.shape) == [-1, -1, getattr(case, "out_width", case.width)]
            assert out.dtype == variables["x"].dtype


@pytest.mark.parametrize("case", [FULL_FEED_FORWARD, FULL_RESIDUAL_NORM], ids=["feed_forward", "residual_norm"])
def test_every_run_draws_anew_and_calls_differ(case, place):
    """seed=None draws from the generator at every run, as in dygraph, and two equal calls have masks of their own."""
    arrays = common.stored_inputs(case, common.make_inputs(case))
    feed = {n: a for n, a in arrays.items() if n != "d_out"}
    with static_mode():
        main = paddle.static.Program()
        with paddle.static.program_guard(main, paddle.static.Program()):
            variables = {n: paddle.static.data(n, a.shape, str(a.dtype)) for n, a in feed.items()}
            outs = [call(variables, case.config, seed=None) for _ in range(2)]
        executor = paddle.static.Executor(place)
        paddle.seed(77)
        first, second = (executor.run(main, feed=feed, fetch_list=outs) for _ in range(2))
        paddle.seed(77)
        again = executor.run(main, feed=feed, fetch_list=outs)
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[0], second[0])
    paddle.seed(77)
    dygraph = [run_dygraph(arrays, case.config, place, seed=None)[0] for _ in range(2)]
    # Paddle may run the two calls in either order.
    assert sorted(a.sum() for a in dygraph) == sorted(a.sum() for a in again) == sorted(a.sum() for a in first)


class Network(paddle.nn.Layer):
    """All four layers in a row."""

    def __init__(self):
        super().__init__()
        self.first = incubate.FusedLinear(16, 16)
        self.feed_forward = incubate.FusedFeedForward(16, 24, 0.3, activation="gelu", act_dropout_rate=0.2)
        self.tail = incubate.FusedBiasDropoutResidualLayerNorm(16, 0.3)
        self.encoder = incubate.FusedTransformerEncoderLayer(16, 2, 24, 0.1, normalize_before=True)

    def forward(self, x):
        y = self.first(x)
        return self.encoder(self.tail(self.feed_forward(y), y))


@pytest.mark.parametrize("full_graph", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_to_static(training, full_graph):
    results = []
    for static in (False, True):
        paddle.seed(3)
        network = Network()
        network.train() if training else network.eval()
        model = paddle.jit.to_static(network, full_graph=full_graph) if static else network
        x = paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 5, 16)).astype("float32"))
        paddle.seed(9)
        out = model(x)
        results.append([out.numpy()])
        if training:  # Paddle makes no gradients of a whole graph in evaluation mode
            (out * paddle.arange(16, dtype="float32")).mean().backward()
            results[-1] += [p.grad.numpy() for p in network.parameters()]
    for dygraph, static in zip(*results):
        np.testing.assert_allclose(static, dygraph, rtol=1e-5, atol=1e-6)


def test_jit_save_load_and_predictor(tmp_path):
    network = Network()
    network.eval()
    path = str(tmp_path / "network")
    paddle.jit.save(network, path, input_spec=[paddle.static.InputSpec([None, None, 16], "float32", "x")])
    loaded = paddle.jit.load(path)
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal((3, 6, 16)).astype("float32"))
    expected = network(x).numpy()
    np.testing.assert_allclose(loaded(x).numpy(), expected, rtol=1e-5, atol=1e-6)
    program = path + (".pdmodel" if IS_PADDLE_2 else ".json")
    predictor = paddle.inference.create_predictor(paddle.inference.Config(program, path + ".pdiparams"))
    predictor.get_input_handle("x").copy_from_cpu(x.numpy())
    predictor.run()
    found = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [FULL_FEED_FORWARD, FULL_RESIDUAL_NORM], ids=["feed_forward", "residual_norm"])
def test_is_test_turns_dropout_off(case):
    """A program for training becomes one for testing: clone(for_test=True) before PIR, set_is_test_attr() in it."""
    inputs = common.make_inputs(case)
    feed = {n: a for n, a in common.stored_inputs(case, inputs).items() if n != "d_out"}
    expected = common.expect(case.but(training=False), inputs)
    for legacy in (True, False):
        if not legacy and IS_PADDLE_2:
            continue
        with legacy_programs() if legacy else contextlib.nullcontext(), static_mode():
            main = paddle.static.Program()
            with paddle.static.program_guard(main, paddle.static.Program()):
                variables = {n: paddle.static.data(n, a.shape, str(a.dtype)) for n, a in feed.items()}
                out = call(variables, case.config, seed=None)
                for_test = main.clone(for_test=True) if legacy else main.clone()
            if legacy:
                fetched = out.name
            else:
                for_test.set_is_test_attr()
                fetched = next(op for op in for_test.global_block().ops if ".custom_" in op.name()).result(0)
            executor = paddle.static.Executor(paddle.CPUPlace())
            (test,) = executor.run(for_test, feed=feed, fetch_list=[fetched])
        common.check(case, expected, test, {})


@pytest.mark.parametrize("feature", [name for name in FEATURES if "dropout" not in name])
def test_ordinary_ops_for_onnx(feature):
    """Where Paddle's exporter builds the graph, there is none of our operators in it, and the numbers are the same."""
    case = FEATURES[feature].but(dtype="float32")
    if getattr(case.config, "training", True):
        rates = [name for name in case.config.__dataclass_fields__ if name.endswith("_rate")]
        case = case.but(**dict.fromkeys(rates, 0.0))
    inputs = common.make_inputs(case)
    feed = {n: a for n, a in common.stored_inputs(case, inputs).items() if n != "d_out"}
    exporter = {"__name__": "paddle2onnx.convert"}
    exec("def export(build):\n    return build()", exporter)
    with static_mode():
        main = paddle.static.Program()
        with paddle.static.program_guard(main, paddle.static.Program()):
            variables = {n: paddle.static.data(n, a.shape, str(a.dtype)) for n, a in feed.items()}
            out = exporter["export"](lambda: call(variables, case.config))
        assert "custom_" not in str(main)
        (found,) = paddle.static.Executor(paddle.CPUPlace()).run(main, feed=feed, fetch_list=[out])
    common.check(case, common.expect(case, inputs), common.from_storage(found), {})
