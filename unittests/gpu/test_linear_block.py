"""A linear layer by itself on the GPU against the float64 reference."""

import cases
import common
import numpy as np
import pytest
from cases import DTYPES, FULL_LINEAR, LINEAR_FEATURES, LinearCase
from checks import check, check_deterministic, check_empty, check_forward_alone, check_graph, offset_of
from device import run_case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", LINEAR_FEATURES)
def test_feature(feature, dtype):
    check(LINEAR_FEATURES[feature].but(dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in cases.LINEAR_SIZES if 0 not in case.shape], ids=str)
def test_size(case, dtype):
    check(case.but(dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transpose_x", (False, True))
@pytest.mark.parametrize("transpose_weight", (False, True))
@pytest.mark.parametrize("sizes", ((37, 24, 40), (1, 33, 7), (129, 1, 65), (200, 96, 1)), ids=str)
def test_transposed(sizes, transpose_weight, transpose_x, dtype):
    rows, width, out_width = sizes
    case = LinearCase(shape=(rows,), width=width, out_width=out_width, dtype=dtype)
    check(case.but(transpose_x=transpose_x, transpose_weight=transpose_weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transpose", (False, True))
@pytest.mark.parametrize("activation", (None, "relu", "gelu"))
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
