"""The feed-forward block on the GPU against the float64 reference: dtypes, features, sizes, dropout."""

import cases
import common
import numpy as np
import pytest
from cases import DTYPES, FEED_FORWARD_FEATURES, FULL_FEED_FORWARD, SIXTEEN_BIT, FeedForwardCase
from checks import check, check_deterministic, check_empty, check_forward_alone, check_graph, offset_of
from device import Run, run_case

# Enough numbers for a fair comparison of 16-bit errors.
WIDE = dict(shape=(130,), width=96)
# Hidden numbers that are taken by eights, and not.
WIDTHS = (1, 7, 8, 129, 1000, 4096)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEED_FORWARD_FEATURES)
def test_feature(feature, dtype):
    check(FEED_FORWARD_FEATURES[feature].but(dtype=dtype, **WIDE))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("feature", FEED_FORWARD_FEATURES)
def test_float32_residual(feature, dtype):
    check(FEED_FORWARD_FEATURES[feature].but(dtype=dtype, residual_dtype="float32", **WIDE))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_norm_parameters_of_x_dtype(dtype):
    check(FULL_FEED_FORWARD.but(dtype=dtype, norm_dtype=dtype, **WIDE))


@pytest.mark.parametrize("dtype", ("float32", "float64"))
@pytest.mark.parametrize("case", cases.FEED_FORWARD_SIZES, ids=str)
def test_size(case, dtype):
    check(case.but(dtype=dtype))


@pytest.mark.parametrize(
    "hidden,dtype", [(n, dtype) for n in WIDTHS for dtype in DTYPES if n > 1 or dtype not in SIXTEEN_BIT]
)
@pytest.mark.parametrize("gated", (False, True))
def test_hidden_dim(hidden, gated, dtype):
    check(FULL_FEED_FORWARD.but(dtype=dtype, hidden=hidden, gated=gated, **WIDE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation,gated", (("relu", False), ("gelu", False), ("silu", True)))
@pytest.mark.parametrize("hidden", (129, 136))
def test_many_rows(hidden, activation, gated, dtype):
    """More rows than the threads of all thread blocks take at a time."""
    case = FULL_FEED_FORWARD.but(dtype=dtype, shape=(12000,), width=16, hidden=hidden)
    check(case.but(activation=activation, gated=gated))


@pytest.mark.parametrize("dtype", ("float32", "float64"))
@pytest.mark.parametrize("dropout", (0.0, 0.3))
@pytest.mark.parametrize("hidden", WIDTHS)
def test_hidden_dim_of_relu(hidden, dropout, dtype):
    check(FeedForwardCase(dtype=dtype, shape=(37,), hidden=hidden).but(dropout1_rate=dropout))


@pytest.mark.parametrize("case", cases.FEED_FORWARD_SEEDS + cases.FEED_FORWARD_RATES, ids=str)
def test_seeds_and_rates(case):
    check(case.but(dtype="float32"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize(
    "first,hidden,total", ((0, 8, 24), (8, 8, 24), (16, 8, 24), (5, 7, 24), (8, 8, 23), (5, 16, 24), (2, 3, 7))
)
def test_part_of_the_hidden_numbers(first, hidden, total, gated, dtype):
    """Dropout counts the hidden numbers of the whole layer."""
    case = FULL_FEED_FORWARD.but(dtype=dtype, hidden=hidden, gated=gated, **WIDE)
    check(case.but(first_hidden=first, total_hidden=total))


@pytest.mark.parametrize("dtype,residual_dtype", (("float32", None), ("bfloat16", None), ("float16", "float32")))
@pytest.mark.parametrize("case, wanted", cases.FEED_FORWARD_SUBSETS, ids=lambda value: str(value)[:90])
def test_wanted_gradients(case, wanted, dtype, residual_dtype):
    check(case.but(dtype=dtype, residual_dtype=residual_dtype, **WIDE), wanted=wanted)


@pytest.mark.parametrize("dtype,residual_dtype", (("float32", None), ("bfloat16", None), ("float16", "float32")))
@pytest.mark.parametrize("final", (False, True))
@pytest.mark.parametrize(
    "wanted", (["x"], ["linear1_weight"], ["linear1_bias"], ["linear2_weight"], ["linear2_bias"]), ids=str
)
def test_wanted_gradients_of_relu_without_dropout(wanted, final, dtype, residual_dtype):
    case = FeedForwardCase(dtype=dtype, residual_dtype=residual_dtype, **WIDE).but(final_layer_norm=final)
    check(case, wanted=wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEED_FORWARD_FEATURES)
def test_forward_alone_has_the_same_bits(feature, dtype):
    check_forward_alone(FEED_FORWARD_FEATURES[feature].but(dtype=dtype, shape=(130,), width=40, hidden=96))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("final", (False, True))
@pytest.mark.parametrize("activation", ("relu", "gelu"))
def test_unaligned(activation, final, gated, dtype):
    case = FULL_FEED_FORWARD.but(dtype=dtype, activation=activation, gated=gated, final_layer_norm=final, **WIDE)
    check(case, offset=offset_of(dtype))


@pytest.mark.parametrize("dtype,rows", (("float16", 512), ("float64", 128)))
@pytest.mark.parametrize("gated", (False, True))
def test_hidden_numbers_in_parts(gated, dtype, rows):
    """So many that backward makes them in two parts, and needs less memory than for a row less, where it makes one."""
    case = FULL_FEED_FORWARD.but(dtype=dtype, gated=gated, shape=(rows,), width=256, hidden=2**15)
    inputs = common.make_inputs(case)
    common.check(case, common.expect(case, inputs), *run_case(case, inputs))
    sizes = []
    for count in (rows, rows - 1):
        part = case.but(shape=(count,))
        run = Run(part, common.make_inputs(part))
        run.forward()
        run.backward(["linear1_bias", "linear2_weight"])
        sizes.append(run.backward_workspace.numel())
    assert sizes[0] < sizes[1]


def test_gradient_of_the_product_waits_where_d_x_will_be():
    rows, width = 1000, 64
    case = FULL_FEED_FORWARD.but(dtype="float16", shape=(rows,), width=width, hidden=width, final_layer_norm=False)
    inputs = common.make_inputs(case)
    wanted = common.differentiable(inputs)
    sizes = []
    for names in (wanted, [name for name in wanted if name != "x"]):
        run = Run(case, inputs)
        run.forward()
        run.backward(names)
        sizes.append(run.backward_workspace.numel())
    assert sizes[0] == sizes[1] - 2 * rows * width


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", (False, True))
def test_deterministic(gated, dtype):
    check_deterministic(FULL_FEED_FORWARD.but(dtype=dtype, shape=(1200,), width=128, hidden=512, gated=gated))


@pytest.mark.parametrize("dtype,residual_dtype", [(dtype, None) for dtype in DTYPES] + [("float16", "float32")])
@pytest.mark.parametrize("case", cases.FEED_FORWARD_EMPTY, ids=str)
def test_empty(case, dtype, residual_dtype):
    check_empty(case.but(dtype=dtype, residual_dtype=residual_dtype))
    check_empty(FeedForwardCase(shape=case.shape, dtype=dtype, residual_dtype=residual_dtype))


@pytest.mark.parametrize("dtype", ("float16", "float32"))
@pytest.mark.parametrize("changes", ({}, {"gated": True}, {"pre_layer_norm": False, "dropout1_rate": 0.0}), ids=str)
def test_cuda_graph(changes, dtype):
    check_graph(FULL_FEED_FORWARD.but(dtype=dtype, shape=(65,), width=64, hidden=96, **changes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_nan_and_large_arguments(activation, dtype):
    """NaN comes out where it went in, relu included, and none where the square of an argument is infinite."""
    case = FeedForwardCase(dtype=dtype, shape=(9,), width=8, hidden=16).but(
        activation=activation, add_residual=False, final_layer_norm=False
    )
    inputs = common.make_inputs(case)
    inputs["x"][3] = np.nan
    inputs["x"][5] *= 2e3 if dtype == "float16" else 1e20
    out, _ = run_case(case, inputs, wanted=[])
    assert np.isnan(out[3]).all() and np.isfinite(np.delete(out, 3, axis=0)).all()


def test_more_numbers_than_32_bits_count():
    """Rows that are the same give the same, also beyond element 2^31."""
    case = FeedForwardCase(dtype="bfloat16", shape=(262400,), width=8, hidden=8200).but(activation="gelu")
    assert case.shape[0] * case.hidden > 2**31
    inputs = common.make_inputs(case)
    for name in ("x", "d_out"):
        inputs[name][-200:] = inputs[name][:200]
    out, gradients = run_case(case, inputs, wanted=["x"])
    for result in (out, gradients["x"]):
        np.testing.assert_allclose(result[-200:], result[:200], rtol=0, atol=2.0**-6 * abs(result[:200]).max())
