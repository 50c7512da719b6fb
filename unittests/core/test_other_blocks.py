"""The feed-forward block, the tail by itself and a linear layer in the core on NumPy arrays, without Paddle: every
instruction set that this processor has, against the reference."""

import functools
import math

import cases
import common
import numpy as np
import pytest
from cases import DTYPES, SIXTEEN_BIT
from core_config import config_of
from processes import printed_with_threads

pfa_core = pytest.importorskip("pfa_core", reason="the module pfa_core of CMakeLists.txt is not on PYTHONPATH")

# The topmost decorator, so that a case's results in every set follow one another, and the reference computes once.
EVERY_ISA = pytest.mark.parametrize("isa", pfa_core.instruction_sets())


def as_rows(a):
    return a.reshape(-1, a.shape[-1]) if a.ndim > 1 else a


def as_core_takes(case, arrays):
    """Arrays without the dimensions before the last, which the core does not know."""
    transposes = getattr(case.config, "transpose_x", False)
    return {
        name: a.reshape(a.shape[0], -1) if transposes and name == "x" else a if "weight" in name else as_rows(a)
        for name, a in arrays.items()
        if name != "d_out"
    }


def run(case, arrays, wanted, isa="", saves=True):
    config, seed, offset = config_of(case)
    inputs = as_core_takes(case, arrays)
    out, saved = pfa_core.forward(inputs, config, seed=seed, offset=offset, saves=saves, isa=isa)
    if not saves:
        assert saved is None
        return out, {}
    gradients = pfa_core.backward(inputs, config, as_rows(arrays["d_out"]), saved, wanted, isa=isa)
    return out, {name: g.reshape(arrays[name].shape) for name, g in gradients.items()}


@functools.lru_cache(maxsize=4)
def inputs_and_expected(case):
    inputs = common.make_inputs(case)
    return inputs, common.expect(case, inputs)


def check_case(case, isa="", wanted=None):
    inputs, expected = inputs_and_expected(case)
    arrays = common.stored_inputs(case, inputs)
    wanted = common.differentiable(inputs) if wanted is None else list(wanted)
    out, gradients = run(case, arrays, wanted, isa)
    assert sorted(gradients) == sorted(wanted)
    shaped = common.from_storage(out).reshape(expected.out.shape)
    common.check(case, expected, shaped, {name: common.from_storage(g) for name, g in gradients.items()})
    alone, _ = run(case, arrays, [], isa, saves=False)
    assert np.array_equal(alone, out)


@EVERY_ISA
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", cases.FEED_FORWARD_FEATURES)
def test_feed_forward(feature, dtype, isa):
    check_case(cases.FEED_FORWARD_FEATURES[feature].but(dtype=dtype), isa)


@EVERY_ISA
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("feature", cases.FEED_FORWARD_FEATURES)
def test_feed_forward_of_float32_residual(feature, dtype, isa):
    check_case(cases.FEED_FORWARD_FEATURES[feature].but(dtype=dtype, residual_dtype="float32"), isa)


@EVERY_ISA
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.FEED_FORWARD_SIZES + cases.FEED_FORWARD_EMPTY, ids=str)
def test_sizes_of_feed_forward(case, dtype, isa):
    check_case(case.but(dtype=dtype), isa)


@EVERY_ISA
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", cases.FEED_FORWARD_SMALL, ids=str)
def test_small_sizes_of_feed_forward(case, dtype, isa):
    check_case(case.but(dtype=dtype), isa)


@pytest.mark.parametrize("case", cases.FEED_FORWARD_SEEDS + cases.FEED_FORWARD_RATES, ids=str)
def test_dropout_of_feed_forward(case):
    check_case(case.but(offset=3))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("first", [0, 3, 8, 13])
def test_a_part_of_the_hidden_numbers(first, gated):
    """Dropout counts them among all."""
    check_case(cases.FULL_FEED_FORWARD.but(hidden=11, gated=gated, first_hidden=first, total_hidden=29))


@pytest.mark.parametrize(("case", "wanted"), cases.FEED_FORWARD_SUBSETS, ids=str)
def test_subsets_of_gradients(case, wanted):
    check_case(case, wanted=wanted)


@EVERY_ISA
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", cases.RESIDUAL_NORM_FEATURES)
def test_residual_norm(feature, dtype, isa):
    check_case(cases.RESIDUAL_NORM_FEATURES[feature].but(dtype=dtype), isa)


@pytest.mark.parametrize("feature", ["full", "no-norm", "eval", "plain"])
def test_subsets_of_gradients_of_residual_norm(feature):
    for case, wanted in cases.gradient_subsets(cases.RESIDUAL_NORM_FEATURES[feature]):
        check_case(case, wanted=wanted)


@EVERY_ISA
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(cases.LINEAR_FEATURES.values()) + cases.LINEAR_SIZES, ids=str)
def test_linear(case, dtype, isa):
    check_case(case.but(dtype=dtype), isa)


# Few rows and many, whole panels and parts of them, rows of the weight that are 4096 bytes apart.
@EVERY_ISA
@pytest.mark.parametrize("transpose_weight", [False, True], ids=["in-out", "out-in"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 12, 16, 31, 64, 65, 200])
def test_rows_and_widths_of_linear(rows, dtype, transpose_weight, isa):
    for width, out_width in ((40, 33), (300, 128), (800, 96), (17, 1024)):
        case = cases.LinearCase(shape=(rows,), width=width, out_width=out_width, dtype=dtype)
        check_case(case.but(transpose_weight=transpose_weight, activation="gelu"), isa)


@EVERY_ISA
@pytest.mark.parametrize("transpose_weight", [False, True], ids=["in-out", "out-in"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_beside_any_number_of_others(dtype, transpose_weight, isa):
    """Few rows read a weight where it lies, many from panels."""
    for width, out_width in ((40, 33), (805, 96), (23, 1027)):
        case = cases.LinearCase(shape=(70,), width=width, out_width=out_width, dtype=dtype)
        case = case.but(transpose_weight=transpose_weight)
        arrays = common.stored_inputs(case, common.make_inputs(case))
        expected, _ = run(case, arrays, [], isa, saves=False)
        for rows in (1, 2, 3, 8, 9, 16, 17):
            found, _ = run(case.but(shape=(rows,)), {**arrays, "x": arrays["x"][:rows]}, [], isa, saves=False)
            np.testing.assert_array_equal(found, expected[:rows])


def test_activations_far_out():
    """Values and slopes where exponentials underflow, and in between to the last digits."""
    x = np.concatenate([np.linspace(-45.0, 45.0, 4001), [-1e4, 1e4, 0.0, -0.0, 1e-30, -1e-30]])[:, None]
    weight = np.ones((1, 1))
    cdf = np.vectorize(math.erfc)(-x / np.sqrt(2)) / 2

    def sigmoid(a):
        e = np.exp(-np.abs(a))
        return np.where(a < 0, e, 1.0) / (1.0 + e)

    bell = np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    s = sigmoid(2 * inner)
    slopes = {
        "gelu": (x * cdf, cdf + x * bell),
        "gelu_tanh": (x * s, s + 2 * x * s * (1 - s) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)),
        "silu": (x * sigmoid(x), sigmoid(x) + x * sigmoid(x) * sigmoid(-x)),
        "relu": (np.maximum(x, 0), (x > 0) * 1.0),
    }
    for isa in pfa_core.instruction_sets():
        for name, (value, slope) in slopes.items():
            for dtype, tolerance in (("float64", 2e-15), ("float32", 1e-6)):
                config = dict(block="linear", rows=len(x), in_features=1, out_features=1, dtype=dtype, activation=name)
                inputs = {"x": x.astype(dtype), "weight": weight.astype(dtype)}
                out, saved = pfa_core.forward(inputs, config, isa=isa)
                gradient = pfa_core.backward(inputs, config, np.ones_like(out), saved, ["x"], isa=isa)["x"]
                np.testing.assert_allclose(out, value, rtol=tolerance, atol=tolerance)
                np.testing.assert_allclose(gradient, slope, rtol=tolerance, atol=tolerance)


def test_bits_do_not_depend_on_threads():
    program = (
        "import hashlib, sys; import numpy as np; import common, cases; from core import test_other_blocks as t\n"
        "digest = hashlib.sha1()\n"
        "for dtype in cases.DTYPES:\n"
        "    for gated, rows, width in ((False, 333, 96), (True, 333, 96), (False, 50, 1600)):\n"
        "        case = cases.FULL_FEED_FORWARD.but(shape=(rows,), width=width, hidden=200, dtype=dtype, gated=gated)\n"
        "        inputs = common.make_inputs(case)\n"
        "        out, g = t.run(case, common.stored_inputs(case, inputs), common.differentiable(inputs))\n"
        "        digest.update(out.tobytes()); [digest.update(g[n].tobytes()) for n in sorted(g)]\n"
        "print(digest.hexdigest())"
    )
    assert len(printed_with_threads(program, (1, 2, 5))) == 1


@EVERY_ISA
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_without_end(activation, dtype, isa):
    """Limits at infinity and at the largest numbers, where squares are infinite; NaN stays NaN in value and slope."""
    x = np.array([np.inf, -np.inf, 1e30, -1e30, np.nan, 0.5], dtype)
    config = dict(block="linear", rows=x.size, in_features=1, out_features=1, dtype=dtype, activation=activation)
    inputs = {"x": x[:, None], "weight": np.ones((1, 1), dtype)}
    value, saved = pfa_core.forward(inputs, config, isa=isa)
    slope = pfa_core.backward(inputs, config, np.ones_like(value), saved, ["x"], isa=isa)["x"][:, 0]
    value = value[:, 0]
    assert value[0] == np.inf and value[2] == x[2] and (slope[[0, 2]] == 1).all()
    assert (value[[1, 3]] == 0).all() and (slope[[1, 3]] == 0).all()
    assert np.isnan(value[4]) and np.isfinite([value[5], slope[5]]).all()
    assert activation == "relu" or np.isnan(slope[4])
