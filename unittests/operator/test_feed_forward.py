"""The feed-forward operator against the reference in dygraph: result and every gradient, by switches, dtypes, inputs,
sizes and dropout.
"""

import cases
import common
import numpy as np
import paddle
import pytest
import reference
from cases import DTYPES, FEED_FORWARD_FEATURES, FULL_FEED_FORWARD, SIXTEEN_BIT, FeedForwardCase
from paddle_fused_attention import fused_feedforward
from paddle_fused_attention._feed_forward import FeedForward, feed_forward_over_processes
from runners import call, check_case, check_stored, paddle_computes_on, run_dygraph, to_tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEED_FORWARD_FEATURES)
def test_features(feature, dtype, place):
    check_case(FEED_FORWARD_FEATURES[feature].but(dtype=dtype), place)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("feature", FEED_FORWARD_FEATURES)
def test_float32_x_beside_16_bit_weights(feature, dtype, place):
    """x, the residual sum and the result stay float32; the products are 16-bit."""
    check_case(FEED_FORWARD_FEATURES[feature].but(dtype=dtype, residual_dtype="float32", shape=(3, 31)), place)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_norm_parameters_in_16_bit(dtype, place):
    check_case(FULL_FEED_FORWARD.but(dtype=dtype, norm_dtype=dtype), place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.FEED_FORWARD_SIZES, ids=str)
def test_sizes(case, dtype, place):
    check_case(case.but(dtype=dtype), place)


# In 16 bits there is no saying how much better than ordinary ops a handful of numbers should come out.
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", cases.FEED_FORWARD_SMALL, ids=str)
def test_small_sizes(case, dtype, place):
    check_case(case.but(dtype=dtype), place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.FEED_FORWARD_EMPTY, ids=str)
def test_zero_rows(case, dtype, place):
    """Empty results, empty gradients for x, zeros for the parameters."""
    case = case.but(dtype=dtype)
    check_case(case, place)
    inputs = common.make_inputs(case)
    _, gradients = run_dygraph(common.stored_inputs(case, inputs), case.config, place, common.differentiable(inputs))
    for name, gradient in gradients.items():
        assert gradient.shape == inputs[name].shape and not gradient.any(), name


@pytest.mark.parametrize("case", cases.FEED_FORWARD_SEEDS + cases.FEED_FORWARD_RATES, ids=str)
def test_masks_of_a_known_seed(case, place):
    check_case(case, place)


@pytest.mark.parametrize("case, wanted", cases.FEED_FORWARD_SUBSETS, ids=lambda value: str(value)[:90])
def test_frozen_parameters(case, wanted, place):
    """Only `wanted` need a gradient; everything else has stop_gradient=True."""
    check_case(case, place, wanted=wanted)


@pytest.mark.parametrize("wanted", [["x"], ["linear2_weight"], ["ln1_scale", "linear1_bias"]], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_partial_gradients(training, wanted, place):
    """Every input may have a gradient, but only `wanted` are asked for."""
    case = FULL_FEED_FORWARD.but(training=training)
    inputs = common.make_inputs(case)
    arrays = common.stored_inputs(case, inputs)
    tensors = to_tensors(arrays, place, common.differentiable(inputs))
    out = call(tensors, case.config)
    d_out = paddle.to_tensor(arrays["d_out"], place=place)
    gradients = paddle.grad([out], [tensors[name] for name in wanted], grad_outputs=[d_out])
    check_stored(case, common.expect(case, inputs), out.numpy(), {n: g.numpy() for n, g in zip(wanted, gradients)})
    assert all(t.grad is None for t in tensors.values())


def sliced_view(a, place):
    """A tensor that reads every other element of the first axis of a larger one."""
    padded = np.full((2 * a.shape[0], *a.shape[1:]), 99, a.dtype)
    padded[::2] = a
    return paddle.to_tensor(padded, place=place)[::2]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_non_contiguous_inputs(dtype, place):
    if not paddle_computes_on(place):
        pytest.skip("Paddle's own kernels, which make tensors contiguous, do nothing on this GPU")
    case = FULL_FEED_FORWARD.but(dtype=dtype)
    inputs = common.make_inputs(case)
    arrays = common.stored_inputs(case, inputs)
    wanted = common.differentiable(inputs)
    tensors = {name: sliced_view(arrays[name], place) for name in wanted}
    for tensor in tensors.values():
        tensor.stop_gradient = False
        assert not tensor.is_contiguous()
    out = call(tensors, case.config)
    gradients = paddle.grad([out], [tensors[n] for n in wanted], grad_outputs=[sliced_view(arrays["d_out"], place)])
    check_stored(case, common.expect(case, inputs), out.numpy(), {n: g.numpy() for n, g in zip(wanted, gradients)})


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_numerical_gradient(activation, gated, place):
    """The operator's gradient is the slope of the operator itself; the reference takes no part."""
    case = FULL_FEED_FORWARD.but(activation=activation, gated=gated)
    inputs = common.make_inputs(case)
    arrays = common.stored_inputs(case, inputs)
    wanted = common.differentiable(inputs)
    _, gradients = run_dygraph(arrays, case.config, place, wanted)
    rng = np.random.default_rng(1)
    step = 1e-6
    for name in wanted:
        direction = rng.standard_normal(arrays[name].shape)
        ends = [
            run_dygraph(dict(arrays, **{name: arrays[name] + sign * step * direction}), case.config, place)[0]
            for sign in (1, -1)
        ]
        slope = ((ends[0] - ends[1]) * arrays["d_out"]).sum() / (2 * step)
        scale = np.sqrt((gradients[name] ** 2).sum())
        assert abs(slope - (gradients[name] * direction).sum()) <= 1e-6 * scale, name


def test_defaults(place):
    """As Paddle's function: relu, both rates a half, and the final layer norm where there is no first one."""
    case = FeedForwardCase().but(dropout1_rate=0.5, dropout2_rate=0.5, seed=3)
    for pre in (False, True):
        case = case.but(pre_layer_norm=pre, final_layer_norm=not pre)
        inputs = common.make_inputs(case)
        tensors = to_tensors(common.stored_inputs(case, inputs), place)
        out = fused_feedforward(**tensors, pre_layer_norm=pre, seed=3)
        check_stored(case, common.expect(case, inputs), out.numpy(), {})


def test_positional_arguments(place):
    case = FULL_FEED_FORWARD
    inputs = common.make_inputs(case)
    t = to_tensors(common.stored_inputs(case, inputs), place)
    out = fused_feedforward(
        t["x"], t["linear1_weight"], t["linear2_weight"], t["linear1_bias"], t["linear2_bias"], t["ln1_scale"],
        t["ln1_bias"], t["ln2_scale"], t["ln2_bias"], 0.2, 0.3, "gelu", 1e-3, 1e-4, True, True, "upscale_in_train", -1,
        True, None, final_layer_norm=True, seed=17,
    )  # fmt: skip
    check_stored(case, common.expect(case, inputs), out.numpy(), {})


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_the_hidden_numbers(parts, gated, place):
    """Operators that have some of the hidden numbers each: their sum is the whole, dropout included."""
    case = FULL_FEED_FORWARD.but(
        hidden=30, gated=gated, final_layer_norm=False, add_residual=False, absent=("linear2_bias",), dropout2_rate=0.0
    )
    inputs = common.make_inputs(case)
    whole = {n: a for n, a in inputs.items() if n != "d_out"}
    expected = reference.forward_of(whole, case.config)
    size = case.hidden // parts
    total = 0.0
    for first in range(0, case.hidden, size):
        columns = [*range(first, first + size)]
        columns += [case.hidden + column for column in columns] if gated else []
        part = {
            **whole,
            "linear1_weight": whole["linear1_weight"][:, columns],
            "linear1_bias": whole["linear1_bias"][columns],
            "linear2_weight": whole["linear2_weight"][first : first + size],
        }
        own = case.but(hidden=size, first_hidden=first, total_hidden=case.hidden)
        tensors = to_tensors(part, place, list(part))
        c = own.config
        description = FeedForward(
            **tensors, ln1_epsilon=c.ln1_epsilon, dropout1_rate=c.dropout1_rate, pre_layer_norm=True, gated=gated,
            final_layer_norm=False, add_residual=False, activation=c.activation, seed=c.seed,
        ).checked()  # fmt: skip
        out = feed_forward_over_processes(description, first, case.hidden, lambda y: y)
        gradients = paddle.grad([out], list(tensors.values()), [paddle.to_tensor(inputs["d_out"], place=place)])
        common.check_tensor("part", out.numpy(), reference.forward_of(part, c), "float64")
        wanted = reference.backward_of(part, c, inputs["d_out"])
        for name, gradient in zip(tensors, gradients):
            common.check_tensor(name, gradient.numpy(), wanted[name], "float64")
        total = total + out.numpy()
    common.check_tensor("sum", total, expected, "float64")


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(dtype, place):
    """The forward pass everywhere, whether or not a gradient is needed; on the CPU the gradients too."""
    case = FULL_FEED_FORWARD.but(shape=(100,), width=40, hidden=120, dtype=dtype, gated=True)
    inputs = common.make_inputs(case)
    arrays = common.stored_inputs(case, inputs)
    wanted = common.differentiable(inputs)
    first = run_dygraph(arrays, case.config, place, wanted)
    assert np.array_equal(first[0], run_dygraph(arrays, case.config, place)[0])
    for _ in range(3):
        again = run_dygraph(arrays, case.config, place, wanted)
        assert np.array_equal(first[0], again[0])
        for name in wanted if isinstance(place, paddle.CPUPlace) else []:
            assert np.array_equal(first[1][name], again[1][name]), name


@pytest.mark.parametrize("training", [True, False])
def test_no_grad_gives_the_same_bits(training, place):
    case = FULL_FEED_FORWARD.but(training=training)
    tensors = to_tensors(common.stored_inputs(case, common.make_inputs(case)), place, ("x", "linear1_weight"))
    outs = []
    for grad in (True, False):
        paddle.seed(4)
        with paddle.set_grad_enabled(grad):
            outs.append(call(tensors, case.config, seed=None))
    assert [out.stop_gradient for out in outs] == [False, True]
    assert np.array_equal(*(out.numpy() for out in outs))


def test_the_generator_draws(place):
    """Without a seed every call draws anew, paddle.seed repeats it, and where nothing is dropped nothing is drawn."""
    case = FULL_FEED_FORWARD
    arrays = common.stored_inputs(case, common.make_inputs(case))

    def run(**changes):
        return run_dygraph(arrays, case.config, place, seed=None, **changes)[0]

    paddle.seed(8)
    first, second = run(), run()
    assert not np.array_equal(first, second)
    paddle.seed(8)
    assert np.array_equal(run(), first)
    run(training=False)
    run(dropout1_rate=0.0, dropout2_rate=0.0)
    assert np.array_equal(run(), second)


def test_recompute(place):
    """fleet's recompute drops the same elements again."""
    if not paddle_computes_on(place):
        pytest.skip("Paddle's own kernels, which recompute uses, do nothing on this GPU")
    recompute = pytest.importorskip("paddle.distributed.fleet.utils").recompute
    case = FULL_FEED_FORWARD
    arrays = common.stored_inputs(case, common.make_inputs(case))
    names = [name for name in arrays if name != "d_out"]

    def block(*values):
        return call(dict(zip(names, values)), case.config, seed=None)

    results = []
    for run in (block, lambda *values: recompute(block, *values)):
        tensors = to_tensors(arrays, place, ("x", "linear1_weight"))
        paddle.seed(6)
        out = run(*(tensors[name] for name in names))
        out.backward(paddle.to_tensor(arrays["d_out"], place=place))
        results.append([out.numpy(), tensors["x"].grad.numpy(), tensors["linear1_weight"].grad.numpy()])
    for plain, again in zip(*results):
        assert np.array_equal(plain, again)


def test_inputs_are_left_alone(place):
    """Neither pass writes to an input, nor to the gradient that it is given."""
    case = FULL_FEED_FORWARD.but(final_layer_norm=False, dropout1_rate=0.0, dropout2_rate=0.0)
    arrays = common.stored_inputs(case, common.make_inputs(case))
    tensors = to_tensors(arrays, place, list(arrays))
    d_out = paddle.to_tensor(arrays["d_out"], place=place)
    out = call(tensors, case.config)
    kept = out.numpy()
    paddle.grad([out], list(tensors.values()), grad_outputs=[d_out])
    for name, a in arrays.items():
        assert np.array_equal((d_out if name == "d_out" else tensors[name]).numpy(), a), name
    assert np.array_equal(out.numpy(), kept)


def test_backward_twice(place):
    """With retain_graph both give the same."""
    case = FULL_FEED_FORWARD
    arrays = common.stored_inputs(case, common.make_inputs(case))
    tensors = to_tensors(arrays, place, list(arrays))
    out = call(tensors, case.config)
    d_out = [paddle.to_tensor(arrays["d_out"], place=place)]
    first = paddle.grad([out], list(tensors.values()), d_out, retain_graph=True)
    second = paddle.grad([out], list(tensors.values()), d_out)
    for a, b in zip(first, second):
        assert np.array_equal(a.numpy(), b.numpy())


def test_second_order_gradients_are_refused(place):
    case = FULL_FEED_FORWARD
    arrays = common.stored_inputs(case, common.make_inputs(case))
    tensors = to_tensors(arrays, place, ["x"])
    out = call(tensors, case.config)
    d_out = paddle.to_tensor(arrays["d_out"], place=place)
    (d_x,) = paddle.grad([out], [tensors["x"]], grad_outputs=[d_out], create_graph=True)
    with pytest.raises(Exception, match="second-order"):
        paddle.grad([d_x], [tensors["x"]], grad_outputs=[d_out])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_a_number_stays_in_its_row(value, place):
    case = FULL_FEED_FORWARD.but(dtype="float32")
    arrays = common.stored_inputs(case, common.make_inputs(case))
    good, _ = run_dygraph(arrays, case.config, place)
    arrays["x"][1, 4, 3] = value
    bad, _ = run_dygraph(arrays, case.config, place)
    assert not np.isfinite(bad[1, 4]).any()
    bad[1, 4] = good[1, 4]
    assert np.array_equal(bad, good)
