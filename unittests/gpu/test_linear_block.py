"""A linear layer by itself on the GPU against the float64 reference."""

import math

import cases
import common
import numpy as np
import pytest
import reference
from cases import DTYPES, FULL_LINEAR, LINEAR_FEATURES, LinearCase
from checks import check, check_deterministic, check_empty, check_forward_alone, check_graph, offset_of
from device import run_case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", LINEAR_FEATURES)
def test_feature(feature, dtype):
    check(LINEAR_FEATURES[feature].but(dtype=dtype))


@pytest.mark.parametrize("dtype", ("float32", "float64"))
@pytest.mark.parametrize("case", [case for case in cases.LINEAR_SIZES if 0 not in case.shape], ids=str)
def test_size(case, dtype):
    check(case.but(dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transpose_x", (False, True))
@pytest.mark.parametrize("transpose_weight", (False, True))
@pytest.mark.parametrize("sizes", ((37, 24, 40), (7, 33, 65), (129, 40, 65), (200, 96, 8)), ids=str)
def test_transposed(sizes, transpose_weight, transpose_x, dtype):
    rows, width, out_width = sizes
    case = LinearCase(shape=(rows,), width=width, out_width=out_width, dtype=dtype)
    check(case.but(transpose_x=transpose_x, transpose_weight=transpose_weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation,transpose", ((None, False), (None, True), ("relu", False), ("gelu", True)))
@pytest.mark.parametrize(
    "wanted", [[], *([name] for name in ("x", "weight", "bias")), ["x", "bias"], ["weight", "bias"]], ids=str
)
def test_wanted_gradients(wanted, activation, transpose, dtype):
    case = LinearCase(shape=(37,), dtype=dtype)
    check(case.but(activation=activation, transpose_x=transpose, transpose_weight=transpose), wanted=wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", LINEAR_FEATURES)
def test_forward_alone_has_the_same_bits(feature, dtype):
    check_forward_alone(LINEAR_FEATURES[feature].but(dtype=dtype, shape=(130,), width=40, out_width=96))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", (None, "relu", "gelu"))
def test_unaligned(activation, dtype):
    check(LinearCase(shape=(37,), dtype=dtype).but(activation=activation), offset=offset_of(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic(dtype):
    check_deterministic(FULL_LINEAR.but(dtype=dtype, shape=(1200,), width=128, out_width=512))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", (None, "gelu"))
def test_empty(activation, dtype):
    check_empty(LinearCase(shape=(0, 7), dtype=dtype).but(activation=activation))


@pytest.mark.parametrize("dtype", ("float16", "float32"))
def test_cuda_graph(dtype):
    check_graph(FULL_LINEAR.but(dtype=dtype, shape=(65,)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("saves", (False, True))
def test_nan_passes_relu(saves, dtype):
    case = LinearCase(shape=(9,), dtype=dtype).but(activation="relu")
    inputs = common.make_inputs(case)
    inputs["x"][3] = np.nan
    out, _ = run_case(case, inputs, wanted=[], saves=saves)
    assert np.isnan(out[3]).all() and np.isfinite(np.delete(out, 3, axis=0)).all()


# Of a result's size: what rounding it leaves open, or, in float32 and float64, rounding an exponential's argument.
DIGITS = {"float64": 1e-11, "float32": 4e-5, "float16": 1.1 * 2.0**-11, "bfloat16": 1.1 * 2.0**-8}
SMALLEST = {"float64": 1e-290, "float32": 1e-35, "float16": 2.0**-14, "bfloat16": 1e-35}


def sigmoid(z):
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def distribution(activation, x):
    """The function of x that the activation multiplies x by, between 0 and 1, and its derivative."""
    if activation == "gelu":
        return 0.5 * math.erfc(-x * math.sqrt(0.5)), math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    factor, inner = (1.0, 0.0) if activation == "silu" else (2 * math.sqrt(2 / math.pi), 0.044715)
    z = factor * (x + inner * x**3)
    return sigmoid(z), sigmoid(z) * sigmoid(-z) * factor * (1 + 3 * inner * x * x)


def run_on_numbers(activation, dtype, numbers):
    """The activation and its slope of every number, and the gradient of the bias, where all columns are the numbers and
    the first one alone has a gradient.
    """
    case = LinearCase(shape=(len(numbers),), width=8, out_width=8, dtype=dtype).but(activation=activation)
    inputs = {name: np.zeros_like(a) for name, a in common.make_inputs(case).items()}
    inputs["x"][:, 0] = numbers
    inputs["weight"][0] = 1
    inputs["d_out"][:, 0] = 1
    out, gradients = run_case(case, inputs, wanted=["x", "bias"])
    return out[:, 0], gradients["x"][:, 0], gradients["bias"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh", "silu"))
def test_digits_far_from_zero(activation, dtype):
    """Values and slopes are right in relation to their size, however small, as long as the dtype holds their digits."""
    numbers = reference.round_to(10 ** np.linspace(-4, 1.9, 1500), dtype).astype(np.float64)
    numbers = np.concatenate([numbers, -numbers])
    below, density = np.array([distribution(activation, x) for x in numbers]).T
    value, slope, d_bias = run_on_numbers(activation, dtype, numbers)
    moment = numbers * density
    for actual, expected, size in (
        (value, numbers * below, abs(numbers * below)),
        (slope, below + moment, abs(below) + abs(moment)),
    ):
        digits = size > SMALLEST[dtype]
        error = abs(actual - expected)[digits] / size[digits]
        assert error.max() <= DIGITS[dtype], f"{error.max():.3g} at {numbers[digits][error.argmax()]:.6g}"
    np.testing.assert_allclose(d_bias[0], (below + moment).sum(), rtol=DIGITS[dtype])
    assert (d_bias[1:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh", "silu"))
def test_numbers_without_end(activation, dtype):
    """Limits at infinity and at the largest numbers, where squares are infinite; NaN stays NaN in value and slope."""
    largest = 6e4 if dtype == "float16" else 1e30
    value, slope, _ = run_on_numbers(activation, dtype, np.array([np.inf, -np.inf, largest, -largest, np.nan, 0.5]))
    assert value[0] == np.inf and (slope[[0, 2]] == 1).all()
    assert (value[[1, 3]] == 0).all() and (slope[[1, 3]] == 0).all()
    np.testing.assert_allclose(value[2], largest, rtol=2.0**-8)
    assert np.isnan([value[4], slope[4]]).all() and np.isfinite([value[5], slope[5]]).all()
