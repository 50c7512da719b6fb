"""The operators of a block's tail and of linear layers against the reference in dygraph."""

import cases
import common
import numpy as np
import paddle
import pytest
import reference
from cases import DTYPES, FULL_LINEAR, FULL_RESIDUAL_NORM, LINEAR_FEATURES, RESIDUAL_NORM_FEATURES, SIXTEEN_BIT
from paddle_fused_attention import (
    fused_bias_dropout_residual_layer_norm,
    fused_linear,
    fused_linear_activation,
    fused_matmul_bias,
)
from runners import call, check_case, check_stored, paddle_computes_on, run_dygraph, to_tensors

FEATURES = {**RESIDUAL_NORM_FEATURES, **{f"linear-{name}": case for name, case in LINEAR_FEATURES.items()}}
BLOCKS = pytest.mark.parametrize("case", [FULL_RESIDUAL_NORM, FULL_LINEAR], ids=["residual_norm", "linear"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, dtype, place):
    check_case(FEATURES[feature].but(dtype=dtype), place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.RESIDUAL_NORM_SIZES + cases.LINEAR_SIZES, ids=str)
def test_sizes(case, dtype, place):
    check_case(case.but(dtype=dtype), place)


@pytest.mark.parametrize(
    "case, wanted",
    [subset for case in (FULL_RESIDUAL_NORM, FULL_LINEAR) for subset in cases.gradient_subsets(case)],
    ids=lambda value: str(value)[:90],
)
def test_frozen_parameters(case, wanted, place):
    check_case(case, place, wanted=wanted)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_norm_parameters_in_16_bit(dtype, place):
    check_case(FULL_RESIDUAL_NORM.but(dtype=dtype, norm_dtype=dtype), place)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_16_bit_bias_beside_float32(dtype, place):
    """All else is float32, and so is the result's precision; the bias's gradient has its dtype."""
    if not paddle_computes_on(place):
        pytest.skip("Paddle's own kernels, which cast the bias, do nothing on this GPU")
    case = FULL_RESIDUAL_NORM.but(dtype="float32")
    inputs = common.make_inputs(case)
    inputs["bias"] = reference.round_to(inputs["bias"], dtype).astype(np.float64)
    arrays = {**common.stored_inputs(case, inputs), "bias": common.to_storage(inputs["bias"], dtype)}
    out, gradients = run_dygraph(arrays, case.config, place, common.differentiable(inputs))
    expected = common.expect(case, inputs)
    bias = common.from_storage(gradients.pop("bias"))
    common.check(case, expected, common.from_storage(out), {n: common.from_storage(g) for n, g in gradients.items()})
    error = np.abs(bias - expected.gradients["bias"]).max()
    assert error <= 2 * common.UNIT_ROUNDOFF[dtype] * np.abs(expected.gradients["bias"]).max()


@BLOCKS
def test_no_grad_and_same_bits(case, place):
    arrays = common.stored_inputs(case, common.make_inputs(case))
    wanted = [name for name in arrays if name != "d_out"]
    first = run_dygraph(arrays, case.config, place, wanted)
    again = run_dygraph(arrays, case.config, place, wanted)
    assert np.array_equal(first[0], run_dygraph(arrays, case.config, place)[0])
    assert np.array_equal(first[0], again[0])
    for name in wanted if isinstance(place, paddle.CPUPlace) else []:
        assert np.array_equal(first[1][name], again[1][name]), name
    assert call(to_tensors(arrays, place), case.config).stop_gradient


@BLOCKS
def test_second_order_gradients_are_refused(case, place):
    arrays = common.stored_inputs(case, common.make_inputs(case))
    tensors = to_tensors(arrays, place, ["x"])
    out = call(tensors, case.config)
    d_out = paddle.to_tensor(arrays["d_out"], place=place)
    (d_x,) = paddle.grad([out], [tensors["x"]], grad_outputs=[d_out], create_graph=True)
    with pytest.raises(Exception, match="second-order"):
        paddle.grad([d_x], [tensors["x"]], grad_outputs=[d_out])


def test_the_generator_draws(place):
    case = FULL_RESIDUAL_NORM
    arrays = common.stored_inputs(case, common.make_inputs(case))

    def run(**changes):
        return run_dygraph(arrays, case.config, place, seed=None, **changes)[0]

    paddle.seed(8)
    first, second = run(), run()
    assert not np.array_equal(first, second)
    paddle.seed(8)
    assert np.array_equal(run(), first)
    run(training=False)
    run(dropout_rate=0.0)
    assert np.array_equal(run(), second)


def test_one_tensor_for_two_inputs(place):
    """Its gradient is the sum of both."""
    if not paddle_computes_on(place):
        pytest.skip("Paddle's own kernels, which add up gradients, do nothing on this GPU")
    case = FULL_RESIDUAL_NORM.but(dropout_rate=0.0)
    inputs = common.make_inputs(case)
    inputs["residual"] = inputs["x"]
    t = to_tensors(common.stored_inputs(case, inputs), place, ["x"])
    out = fused_bias_dropout_residual_layer_norm(
        t["x"], t["x"], t["bias"], t["ln_scale"], t["ln_bias"], 0.0, case.config.ln_epsilon
    )
    expected = common.expect(case, inputs)
    d_out = paddle.to_tensor(inputs["d_out"], place=place)
    (gradient,) = paddle.grad([out], [t["x"]], [d_out])
    common.check_tensor("out", out.numpy(), expected.out, "float64")
    total = expected.gradients["x"] + expected.gradients["residual"]
    common.check_tensor("x", gradient.numpy(), total, "float64")


def test_functions_of_linear(place):
    """The three functions say the same in different words."""
    case = LINEAR_FEATURES["plain"].but(transpose_weight=True)
    inputs = common.make_inputs(case)
    t = to_tensors(common.stored_inputs(case, inputs), place)
    expected = common.expect(case, inputs)
    x, weight, bias = t["x"], t["weight"], t["bias"]
    for out in (
        fused_linear(x, weight, bias, True),
        fused_linear(x, weight, bias=bias, transpose_weight=True, name="linear"),
        fused_matmul_bias(x, weight, bias, False, True),
        fused_linear_activation(x, weight, bias, False, True),
        fused_linear_activation(x, weight, bias, trans_y=True, activation=None),
    ):
        check_stored(case, expected, out.numpy(), {})
