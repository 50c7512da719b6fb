"""Bias, dropout, residual and layer norm by themselves on the GPU against the float64 reference."""

import cases
import common
import numpy as np
import pytest
from cases import DTYPES, FULL_RESIDUAL_NORM, RESIDUAL_NORM_FEATURES, SIXTEEN_BIT, ResidualNormCase
from checks import check, check_deterministic, check_empty, check_forward_alone, check_graph, offset_of
from device import run_case
from test_rows import COLS

PLAIN = ResidualNormCase()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("feature", RESIDUAL_NORM_FEATURES)
def test_feature(feature, residual, dtype):
    case = RESIDUAL_NORM_FEATURES[feature].but(dtype=dtype, shape=(2, 37))
    check(case if residual else case.but(absent=(*case.absent, "residual")))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("case", (PLAIN, FULL_RESIDUAL_NORM), ids=str)
def test_norm_parameters_of_x_dtype(case, dtype):
    check(case.but(dtype=dtype, norm_dtype=dtype, shape=(100,)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in cases.RESIDUAL_NORM_SIZES if 0 not in case.shape], ids=str)
def test_size(case, dtype):
    check(case.but(dtype=dtype))
    check(case.but(dtype=dtype, dropout_rate=0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", (0.0, 0.3))
@pytest.mark.parametrize("final", (False, True))
@pytest.mark.parametrize("width", COLS)
def test_width(width, final, rate, dtype):
    check(PLAIN.but(dtype=dtype, shape=(37,), width=width, dropout_rate=rate, final_layer_norm=final))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", (0.0, 0.3))
@pytest.mark.parametrize("final", (False, True))
@pytest.mark.parametrize(
    "wanted",
    [wanted for _, wanted in cases.gradient_subsets(PLAIN)] + [["bias", "ln_bias"], ["bias", "residual", "ln_scale"]],
    ids=str,
)
def test_wanted_gradients(wanted, final, rate, dtype):
    if not final and any(name.startswith("ln_") for name in wanted):
        pytest.skip("there is no layer norm")
    check(PLAIN.but(dtype=dtype, shape=(37,), dropout_rate=rate, final_layer_norm=final), wanted=wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (96, 1023, 20000))
@pytest.mark.parametrize("feature", RESIDUAL_NORM_FEATURES)
def test_forward_alone_has_the_same_bits(feature, width, dtype):
    check_forward_alone(RESIDUAL_NORM_FEATURES[feature].but(dtype=dtype, shape=(37,), width=width))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", (0.0, 0.3))
def test_unaligned(rate, dtype):
    check(PLAIN.but(dtype=dtype, shape=(37,), width=768, dropout_rate=rate), offset=offset_of(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", (0.0, 0.3))
def test_deterministic(rate, dtype):
    check_deterministic(PLAIN.but(dtype=dtype, shape=(5000,), width=768, dropout_rate=rate))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", (0.0, 0.3))
@pytest.mark.parametrize("final", (False, True))
def test_empty(final, rate, dtype):
    check_empty(PLAIN.but(dtype=dtype, shape=(0, 7), dropout_rate=rate, final_layer_norm=final))


@pytest.mark.parametrize("dtype", ("float16", "float32"))
@pytest.mark.parametrize("rate", (0.0, 0.3))
def test_cuda_graph(rate, dtype):
    check_graph(PLAIN.but(dtype=dtype, shape=(65,), width=96, dropout_rate=rate))


def test_residual_that_gets_nothing_is_not_rounded():
    case = PLAIN.but(dtype="float32", final_layer_norm=False, dropout_rate=1.0)
    inputs = common.make_inputs(case)
    out, gradients = run_case(case, inputs)
    assert (out == inputs["residual"]).all() and (gradients["residual"] == inputs["d_out"]).all()
    assert not np.any(gradients["x"])
