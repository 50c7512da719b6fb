"""Static graphs give what dygraph gives: PIR programs on Paddle 3, legacy programs on 2.6."""

import os

import cases
import common
import numpy as np
import paddle
import pytest
from cases import DTYPES, FEATURES, FULL, Case, Mask
from paddle_fused_attention import FusedMultiHeadAttention
from runners import (
    as_called,
    call,
    check_case,
    check_stored,
    legacy_programs,
    paddle_computes_on,
    run_dygraph,
    run_static,
    static_mode,
)

IS_PADDLE_2 = paddle.__version__.startswith("2.")


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


# The operator and its bindings are dygraph's, so that a feature or a mask in one dtype says as much as in every one.
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, place):
    check_equal(FEATURES[feature], place)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, place):
    check_equal(FULL.but(dtype=dtype), place)


@pytest.mark.parametrize("mask", cases.MASKS_FOR_EVERY_DTYPE + cases.HARD_MASKS, ids=str)
def test_masks(mask, place):
    if mask.dtype == "int16" and not paddle_computes_on(place):
        pytest.skip("Paddle's own kernels, which cast an int16 mask of a program, do nothing on this GPU")
    check_equal(FULL.but(dtype="float32", mask=mask), place)


@pytest.mark.parametrize("case", cases.LENGTHS, ids=str)
def test_lengths(case, place):
    check_equal(case.but(dtype="float32", mask=Mask("BHSS", "bool")), place)


@pytest.mark.parametrize("wanted", cases.WANTED, ids=cases.name_of_subset)
def test_partial_gradients(wanted, place):
    check_case(FULL, place, run_static, wanted)


@pytest.mark.parametrize("mask", [None, Mask("B11S", "bool"), Mask("B1SS", "float64"), Mask("BHSS", "int64")], ids=str)
@pytest.mark.parametrize("unknown", [(0,), (1,), (0, 1)], ids=str)
def test_unknown_sizes(unknown, mask, place):
    for batch, seq_len in ((2, 7), (3, 33)):
        case = FULL.but(batch=batch, seq_len=seq_len, mask=mask)
        inputs = common.make_inputs(case)
        wanted = common.differentiable(inputs)
        results = run_static(common.stored_inputs(case, inputs), case.config, place, wanted, unknown)
        check_stored(case, common.expect(case, inputs), *results)


def test_one_program_many_sizes(place):
    """A program with unknown batch and sequence runs at several sizes; a declared shape keeps its -1."""
    case = FULL.but(mask=None, absent=("attn_mask",))
    inputs = common.make_inputs(case)
    arrays = common.stored_inputs(case, inputs)
    with static_mode():
        main = paddle.static.Program()
        with paddle.static.program_guard(main, paddle.static.Program()):
            variables = {
                n: paddle.static.data(n, [-1, -1, case.embed_dim] if n == "x" else a.shape, str(a.dtype))
                for n, a in arrays.items()
                if n != "d_out"
            }
            out = call(variables, case.config)
        assert list(out.shape) == [-1, -1, case.embed_dim]
        executor = paddle.static.Executor(place)
        for batch, seq_len in ((1, 1), (2, 7), (4, 50), (1, 129)):
            sized = common.make_inputs(case.but(batch=batch, seq_len=seq_len))
            now = dict(inputs, x=sized["x"], d_out=sized["d_out"])
            feed = {n: a for n, a in common.stored_inputs(case, now).items() if n != "d_out"}
            (result,) = executor.run(main, feed=feed, fetch_list=[out])
            common.check(case, common.expect(case, now), result, {})


def test_declared_shape_and_dtype(place):
    with static_mode():
        with paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
            for dtype in DTYPES:
                x = paddle.static.data("x_" + dtype, [3, 5, 16], dtype)
                weights = [
                    paddle.static.data(name + dtype, shape, dtype)
                    for name, shape in (("qkv", [3, 2, 8, 16]), ("linear", [16, 16]))
                ]
                out = call({"x": x, "qkv_weight": weights[0], "linear_weight": weights[1]}, FULL.config)
                assert list(out.shape) == [3, 5, 16] and out.dtype == x.dtype


def generated(case, place, runs):
    """Results of several runs of one program with seed=None."""
    arrays = common.stored_inputs(case, common.make_inputs(case))
    with static_mode():
        main = paddle.static.Program()
        with paddle.static.program_guard(main, paddle.static.Program()):
            variables = {n: paddle.static.data(n, a.shape, str(a.dtype)) for n, a in arrays.items() if n != "d_out"}
            out = call(variables, case.config, seed=None)
        executor = paddle.static.Executor(place)
        feed = {n: a for n, a in arrays.items() if n != "d_out"}
        return [executor.run(main, feed=feed, fetch_list=[out])[0] for _ in range(runs)]


def test_every_run_draws_anew(place):
    """As in dygraph, seed=None draws from the generator at every run, and paddle.seed repeats the draws."""
    paddle.seed(77)
    first = generated(FULL, place, 2)
    assert not np.array_equal(first[0], first[1])
    paddle.seed(77)
    again = generated(FULL, place, 2)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    paddle.seed(77)
    arrays = common.stored_inputs(FULL, common.make_inputs(FULL))
    assert np.array_equal(first[0], run_dygraph(arrays, FULL.config, place, seed=None)[0])


# Programs with parameters, losses and optimizers use Paddle's own ops, so they run on the CPU alone.

LAYER = dict(embed_dim=16, num_heads=2, dropout_rate=0.3, attn_dropout_rate=0.2)
STEPS = 4


def training_data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((3, 9, 16)).astype("float32"), rng.standard_normal((3, 9, 16)).astype("float32")


def initial_state():
    paddle.seed(5)
    layer = FusedMultiHeadAttention(**LAYER, normalize_before=True)
    rng = np.random.default_rng(1)
    return {
        n: (a.numpy() + 0.1 * rng.standard_normal(a.shape)).astype("float32") for n, a in layer.state_dict().items()
    }


def set_parameters(layer, state):
    """Puts values into the parameters of a layer of a static program, which has run its startup program."""
    for name, parameter in layer.named_parameters():
        paddle.static.global_scope().find_var(parameter.name).get_tensor().set(state[name], paddle.CPUPlace())


def get_parameters(layer):
    scope = paddle.static.global_scope()
    return {name: np.array(scope.find_var(p.name).get_tensor()) for name, p in layer.named_parameters()}


def dygraph_training(state, make_optimizer):
    layer = FusedMultiHeadAttention(**LAYER, normalize_before=True)
    layer.set_state_dict(state)
    optimizer = make_optimizer(layer.parameters())
    x, target = (paddle.to_tensor(a) for a in training_data())
    paddle.seed(99)
    losses = []
    for _ in range(STEPS):
        loss = ((layer(x) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    layer.eval()
    return losses, layer(x).numpy()


def static_training(state, make_optimizer):
    with static_mode():
        main, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(main, startup):
            x = paddle.static.data("x", [-1, -1, 16], "float32")
            target = paddle.static.data("target", [-1, -1, 16], "float32")
            layer = FusedMultiHeadAttention(**LAYER, normalize_before=True)
            loss = ((layer(x) - target) ** 2).mean()
            layer.eval()
            evaluated = layer(x)
            make_optimizer(None).minimize(loss)
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        set_parameters(layer, state)
        feed = dict(zip(("x", "target"), training_data()))
        paddle.seed(99)
        losses = [float(executor.run(main, feed=feed, fetch_list=[loss])[0]) for _ in range(STEPS)]
        (result,) = executor.run(main, feed=feed, fetch_list=[evaluated])  # before the optimizer's next step
    return losses, result


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_minimize_trains_as_dygraph_does(optimizer):
    """A few steps with dropout on, then a forward pass without."""

    def make(parameters):
        return getattr(paddle.optimizer, optimizer)(learning_rate=0.05, parameters=parameters)

    state = initial_state()
    dygraph = dygraph_training(state, make)
    static = static_training(state, make)
    np.testing.assert_allclose(static[0], dygraph[0], rtol=1e-5)
    np.testing.assert_allclose(static[1], dygraph[1], rtol=1e-4, atol=1e-5)
    assert dygraph[0][-1] < dygraph[0][0]


def test_append_backward():
    """Every parameter that is not frozen gets its gradient, that of dygraph."""
    state = initial_state()
    data = training_data()
    layer = FusedMultiHeadAttention(**LAYER, normalize_before=True)
    layer.set_state_dict(state)
    layer.eval()
    layer.linear_bias.stop_gradient = True
    (layer(paddle.to_tensor(data[0])) * paddle.to_tensor(data[1])).sum().backward()
    expected = {n: p.grad.numpy() for n, p in layer.named_parameters() if p.grad is not None}
    assert "linear_bias" not in expected and len(expected) == 7
    with static_mode():
        main, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(main, startup):
            x = paddle.static.data("x", [-1, -1, 16], "float32")
            weight = paddle.static.data("weight", [-1, -1, 16], "float32")
            layer = FusedMultiHeadAttention(**LAYER, normalize_before=True)
            layer.eval()
            layer.linear_bias.stop_gradient = True
            pairs = paddle.static.append_backward((layer(x) * weight).sum())
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        names = {parameter.name: name for name, parameter in layer.named_parameters()}
        set_parameters(layer, state)
        gradients = {names[p.name]: g for p, g in pairs if not p.stop_gradient}
        found = executor.run(main, feed=dict(zip(("x", "weight"), data)), fetch_list=list(gradients.values()))
    assert gradients.keys() == expected.keys()
    for name, gradient in zip(gradients, found):
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-5, atol=1e-5 * np.abs(expected[name]).max())


@pytest.mark.parametrize(
    "frozen", [["linear_bias", "qkv_bias", "ln_scale"], ["qkv_weight", "linear_weight"]], ids="+".join
)
def test_frozen_parameters_stay(frozen):
    """minimize moves every other parameter, and those as in dygraph."""

    def freeze(layer):
        for name in frozen:
            getattr(layer, name).stop_gradient = True

    def make(parameters):
        return paddle.optimizer.SGD(learning_rate=0.1, parameters=parameters)

    state = initial_state()
    x, target = training_data()
    layer = FusedMultiHeadAttention(**LAYER)
    layer.set_state_dict(state)
    freeze(layer)
    layer.eval()
    (((layer(paddle.to_tensor(x)) - paddle.to_tensor(target)) ** 2).mean()).backward()
    make(layer.parameters()).step()
    with static_mode():
        main, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(main, startup):
            static_layer = FusedMultiHeadAttention(**LAYER)
            freeze(static_layer)
            static_layer.eval()
            difference = static_layer(paddle.static.data("x", x.shape)) - paddle.static.data("target", x.shape)
            make(None).minimize((difference**2).mean())
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        set_parameters(static_layer, state)
        executor.run(main, feed={"x": x, "target": target})
        after = get_parameters(static_layer)
    for name, p in layer.named_parameters():
        assert np.array_equal(after[name], state[name]) == (name in frozen), name
        np.testing.assert_allclose(after[name], p.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["upscale_in_train", "downscale_in_infer"])
def test_clone_for_test_turns_dropout_off(mode):
    """A legacy program for training becomes one for testing."""
    case = FULL.but(mode=mode)
    inputs = common.make_inputs(case)
    arrays = common.stored_inputs(case, inputs)
    with legacy_programs(), static_mode():
        main = paddle.static.Program()
        with paddle.static.program_guard(main, paddle.static.Program()):
            variables = {n: paddle.static.data(n, a.shape, str(a.dtype)) for n, a in arrays.items() if n != "d_out"}
            out = call(variables, case.config, seed=None)
            for_test = main.clone(for_test=True)
        feed = {n: a for n, a in arrays.items() if n != "d_out"}
        executor = paddle.static.Executor(paddle.CPUPlace())
        train = executor.run(main, feed=feed, fetch_list=[out])[0]
        test = executor.run(for_test, feed=feed, fetch_list=[out.name])[0]
    common.check(case, common.expect(case.but(training=False), inputs), test, {})
    assert not np.allclose(train, test)


@pytest.mark.skipif(IS_PADDLE_2, reason="Paddle 2.6 makes legacy programs")
@pytest.mark.parametrize("mode", ["upscale_in_train", "downscale_in_infer"])
def test_is_test_turns_dropout_off(mode):
    """The same in PIR, whose clone() knows no for_test: there set_is_test_attr() follows it."""
    case = FULL.but(mode=mode)
    inputs = common.make_inputs(case)
    feed = {n: a for n, a in common.stored_inputs(case, inputs).items() if n != "d_out"}
    with static_mode():
        main = paddle.static.Program()
        with paddle.static.program_guard(main, paddle.static.Program()):
            out = call(
                {n: paddle.static.data(n, a.shape, str(a.dtype)) for n, a in feed.items()}, case.config, seed=None
            )
        for_test = main.clone()
        for_test.set_is_test_attr()
        test_out = next(
            op for op in for_test.global_block().ops if op.name().endswith("custom_fused_attention")
        ).result(0)
        executor = paddle.static.Executor(paddle.CPUPlace())
        train = executor.run(main, feed=feed, fetch_list=[out])[0]
        test = executor.run(for_test, feed=feed, fetch_list=[test_out])[0]
    common.check(case, common.expect(case.but(training=False), inputs), test, {})
    assert not np.allclose(train, test)


def no_dropout_layer(training):
    layer = FusedMultiHeadAttention(**dict(LAYER, dropout_rate=0.0, attn_dropout_rate=0.0), normalize_before=True)
    if not training:
        layer.eval()
    return layer


@pytest.mark.parametrize("full_graph", [False, True], ids=["partial", "full"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_to_static(training, full_graph):
    """The layer under paddle.jit.to_static: its result, and in training the gradients of its parameters."""
    layer = no_dropout_layer(training)
    x, d_out = (paddle.to_tensor(a) for a in training_data())
    expected = layer(x)
    expected.backward(d_out)
    gradients = {name: p.grad.numpy() for name, p in layer.named_parameters()}
    layer.clear_gradients()
    out = paddle.jit.to_static(layer, full_graph=full_graph)(x)
    np.testing.assert_allclose(out.numpy(), expected.numpy(), rtol=1e-6, atol=1e-6)
    if not training:
        return
    out.backward(d_out)
    for name, p in layer.named_parameters():
        np.testing.assert_allclose(
            p.grad.numpy(), gradients[name], rtol=1e-5, atol=1e-5 * np.abs(gradients[name]).max()
        )


def test_jit_save_load_and_predictor(tmp_path):
    """A saved layer, of unknown batch and sequence, gives the same when it is loaded and in the inference predictor."""
    layer = no_dropout_layer(False)
    path = str(tmp_path / "layer")
    paddle.jit.save(layer, path, input_spec=[paddle.static.InputSpec([None, None, 16], "float32", "x")])
    loaded = paddle.jit.load(path)
    model = next(path + ending for ending in (".json", ".pdmodel") if os.path.exists(path + ending))
    predictor = paddle.inference.create_predictor(paddle.inference.Config(model, path + ".pdiparams"))
    for x in (training_data()[0], training_data()[0][:1, :4]):
        expected = layer(paddle.to_tensor(x)).numpy()
        np.testing.assert_allclose(loaded(paddle.to_tensor(x)).numpy(), expected, rtol=1e-6, atol=1e-6)
        predictor.get_input_handle(predictor.get_input_names()[0]).copy_from_cpu(np.ascontiguousarray(x))
        predictor.run()
        result = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)


def test_second_order_gradients_are_reported_missing(place):
    """A static graph with one can't be built: Paddle says that there is none."""
    case = Case()
    arrays = common.stored_inputs(case, common.make_inputs(case))
    with static_mode(), paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
        variables = {n: paddle.static.data(n, a.shape, str(a.dtype)) for n, a in arrays.items()}
        variables["x"].stop_gradient = variables["qkv_weight"].stop_gradient = False
        out = call(variables, case.config)
        (d_x,) = paddle.static.gradients([out], [variables["x"]], target_gradients=[variables["d_out"]])
        second = paddle.static.gradients([d_x], [variables["x"]], target_gradients=[variables["d_out"]])
    assert [gradient for gradient in second if gradient is not None] == []
