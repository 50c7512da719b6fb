"""The whole block on the GPU against the float64 reference: dtypes, features, sizes, dropout."""

import cases
import common
import numpy as np
import pytest
import reference
from cases import DTYPES, FEATURES, SIXTEEN_BIT, Case, Mask
from checks import check, check_deterministic, check_empty, check_forward_alone, check_graph, offset_of
from device import run_case
from reference import Config


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature, dtype):
    check(FEATURES[feature].but(dtype=dtype, seq_len=37, head_dim=24))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_norm_parameters_of_x_dtype(dtype):
    case = Case(dtype=dtype, norm_dtype=dtype, seq_len=100, num_heads=4, head_dim=24)
    check(case.but(pre_layer_norm=True, dropout_rate=0.1))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("feature", FEATURES)
def test_float32_residual(feature, dtype):
    check(FEATURES[feature].but(dtype=dtype, residual_dtype="float32", seq_len=37, head_dim=24))


# Rows that are read by vectors, and not; test_rows.py has those that no group of threads holds.
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("feature", ("plain", "pre", "no-norm", "dropout", "dropout-pre"))
@pytest.mark.parametrize("sizes", ((1, 5, 8, 128), (2, 37, 3, 11), (3, 257, 4, 64)), ids=str)
def test_float32_residual_of_all_widths(sizes, feature, dtype):
    batch, seq_len, num_heads, head_dim = sizes
    case = FEATURES[feature].but(dtype=dtype, residual_dtype="float32", batch=batch, seq_len=seq_len)
    check(case.but(num_heads=num_heads, head_dim=head_dim))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("feature", ("plain", "pre", "no-norm", "dropout"))
def test_float32_residual_unaligned(feature, dtype):
    check(FEATURES[feature].but(dtype=dtype, residual_dtype="float32", seq_len=37), offset=4)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("feature", ("plain", "pre", "no-norm", "dropout", "dropout-pre", "eval-downscale"))
def test_float32_residual_forward_alone_has_the_same_bits(feature, dtype):
    check_forward_alone(FEATURES[feature].but(dtype=dtype, residual_dtype="float32", seq_len=130, head_dim=40))


def test_float32_residual_is_not_rounded():
    """With every element of the branch dropped, x comes out as it went in, and so does its gradient but for what
    attention adds.
    """
    case = Case(dtype="bfloat16", residual_dtype="float32", config=Config(final_layer_norm=False, dropout_rate=1.0))
    inputs = common.make_inputs(case)
    out, gradients = run_case(case, inputs)
    assert (out == inputs["x"]).all() and (gradients["x"] == inputs["d_out"]).all()


def test_float32_residual_beyond_float16():
    """x may be larger than any float16 where a layer norm comes before the projection."""
    case = Case(
        dtype="float16",
        residual_dtype="float32",
        seq_len=37,
        config=Config(pre_layer_norm=True, final_layer_norm=False),
    )
    inputs = common.make_inputs(case)
    inputs["x"] = reference.round_to(inputs["x"] * 7e4, "float32").astype(np.float64)
    assert abs(inputs["x"]).max() > 65504
    common.check(case, common.expect(case, inputs), *run_case(case, inputs))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_many_layers_with_float32_residual(dtype):
    """The error of 24 pre-norm layers is that of their products, not of a sum that is rounded 24 times."""
    config = Config(pre_layer_norm=True, final_layer_norm=False)
    x = common.make_inputs(Case(dtype="float32", seq_len=32, num_heads=4, head_dim=16))["x"]
    actual, expected, composed, rounded = x, x, x, reference.round_to(x, dtype)
    for layer in range(24):
        case = Case(dtype=dtype, residual_dtype="float32", seq_len=32, num_heads=4, head_dim=16, config=config).but(
            seed=layer
        )
        weights = common.make_inputs(case)
        d_out = weights.pop("d_out")
        actual, _ = run_case(case, dict(weights, x=actual, d_out=d_out), wanted=[])
        expected = reference.forward(dict(weights, x=expected), config)
        composed, _ = reference.composed_16bit(dict(weights, x=composed), config, d_out, dtype, "float32")
        rounded, _ = reference.composed_16bit(dict(weights, x=rounded), config, d_out, dtype)
    error = [np.sqrt(((result - expected) ** 2).mean()) for result in (actual, composed, rounded)]
    assert error[0] <= 1.5 * error[1] and error[0] < 0.6 * error[2], error


@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("head_dim", (20, 64, 72, 128, 136))
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_what_all_keys_have_in_common(dtype, head_dim, causal, deterministic):
    case, inputs = common.rows_with_much_in_common(dtype, head_dim=head_dim, causal=causal)
    _, gradients = run_case(case, inputs, deterministic=deterministic)
    common.check_as_exact(common.expect(case, inputs), gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", cases.MASKS_FOR_EVERY_DTYPE + cases.HARD_MASKS, ids=str)
def test_mask(mask, dtype):
    check(Case(dtype=dtype, seq_len=70, mask=mask))


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("mask", cases.MASKS, ids=str)
def test_mask_of_every_shape(mask, causal):
    check(Case(dtype="float32", seq_len=70, num_heads=3, mask=mask, config=Config(causal=causal)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", cases.HARD_MASKS, ids=str)
def test_bare_attention_under_hard_masks(mask, dtype):
    check(cases.bare(mask, dtype=dtype))


@pytest.mark.parametrize("case", cases.ABSENT_PAIRS + cases.NORM_PARAMETERS_IN_16_BIT, ids=str)
def test_absent_inputs_and_16_bit_norms(case):
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.DROPOUT, ids=str)
def test_dropout(case, dtype):
    check(case.but(dtype=dtype))


@pytest.mark.parametrize("case", cases.SEEDS + cases.RATES_BETWEEN_STEPS, ids=str)
def test_seeds_and_rates(case):
    check(case)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("case", cases.SIZES, ids=str)
def test_sizes(case, dtype):
    case = case.but(dtype=dtype)
    if case.head_dim > 256:
        with pytest.raises(RuntimeError, match=f"head_dim up to 256 is expected, got {case.head_dim}"):
            check(case)
    else:
        check(case)


@pytest.mark.parametrize("low", common.FAR_DOWN)
@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("deterministic", (False, True))
def test_rows_whose_every_key_is_far_down(deterministic, dtype, low):
    case, inputs = common.rows_far_down(dtype, low)
    common.check_by_ordinary_ops(case, inputs, *run_case(case, inputs, deterministic=deterministic))


@pytest.mark.parametrize("size", (1e6, 1e7, 1e8))
@pytest.mark.parametrize("dtype", ("float32", "float64"))
def test_equal_keys_of_large_scores(dtype, size):
    case, inputs = common.equal_keys(dtype, size)
    common.check_equal_keys(case, inputs, *run_case(case, inputs, wanted=["qkv_weight", "qkv_bias"]))


# Over several tiles of keys, in lengths whose rows the copy engine can read (528) and cannot.
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("seq_len,causal", ((528, False), (515, True)))
@pytest.mark.parametrize("mask", cases.MASKS_OVER_TILES, ids=str)
def test_mask_over_tiles(mask, seq_len, causal, head_dim, dtype):
    check(Case(dtype=dtype, seq_len=seq_len, head_dim=head_dim, mask=mask, config=Config(causal=causal)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_causal_dropout(dtype):
    config = Config(causal=True, attn_dropout_rate=0.2, dropout_rate=0.2, seed=11)
    check(Case(dtype=dtype, seq_len=133, mask=Mask("1HSS", "float32", "-inf"), config=config))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("seed", range(6))
def test_few_rows(seed, dtype):
    """Matrix products of few rows and columns may be split along their sums."""
    config = Config(pre_layer_norm=True, dropout_rate=0.3, attn_dropout_rate=0.2, seed=seed)
    check(Case(dtype=dtype, config=config))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_many_heads(dtype):
    """More heads than a kernel has sums of d_q for."""
    check(Case(dtype=dtype, batch=16, num_heads=8, seq_len=257, head_dim=16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.LENGTHS + cases.LONG, ids=str)
def test_length(case, dtype):
    check(case.but(dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.HEAD_DIMS, ids=str)
def test_head_dim(case, dtype):
    check(case.but(dtype=dtype))


@pytest.mark.parametrize("case, wanted", cases.subsets(cases.FULL, cases.PAIRS), ids=cases.name_of_subset)
def test_pairs_of_gradients(case, wanted):
    check(case.but(dtype="float32"), wanted=wanted)


@pytest.mark.parametrize(
    "dtype,residual_dtype",
    [(dtype, None) for dtype in DTYPES] + [(dtype, "float32") for dtype in SIXTEEN_BIT],
    ids=str,
)
@pytest.mark.parametrize("wanted", cases.WANTED, ids=cases.name_of_subset)
@pytest.mark.parametrize("rate", (0.0, 0.3))
@pytest.mark.parametrize("final", (False, True))
def test_wanted_gradients(wanted, rate, final, dtype, residual_dtype):
    if not final and any(name.startswith("ln_") for name in wanted):
        pytest.skip("there is no final layer norm")
    pre = "pre_ln_scale" in wanted or "pre_ln_bias" in wanted
    config = Config(pre_layer_norm=pre, final_layer_norm=final, dropout_rate=rate)
    check(Case(dtype=dtype, residual_dtype=residual_dtype, config=config), wanted=wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", ("plain", "pre", "dropout", "dropout-pre", "eval-downscale"))
def test_forward_alone_has_the_same_bits(feature, dtype):
    check_forward_alone(FEATURES[feature].but(dtype=dtype, seq_len=130, head_dim=40))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned(dtype):
    case = Case(dtype=dtype, seq_len=37, config=Config(pre_layer_norm=True, dropout_rate=0.2))
    check(case, offset=offset_of(dtype))


# Masks that hide whole tiles of keys, as padding does, have a way of their own.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("mask", (None, "B11S start", "B11S sides", "1H1S end", "B1SS random"), ids=str)
def test_deterministic(mask, head_dim, dtype):
    shape, content = mask.split() if mask else ("", "")
    case = Case(3, 700, 6, head_dim, dtype, mask=Mask(shape, "bool", content) if mask else None)
    case = case.but(causal=mask != "1H1S end", dropout_rate=0.1, attn_dropout_rate=0.1)
    check(case, deterministic=True)
    check_deterministic(case)


@pytest.mark.parametrize(
    "dtype,residual_dtype", [(dtype, None) for dtype in DTYPES] + [("float16", "float32")], ids=str
)
@pytest.mark.parametrize("pre", (False, True))
@pytest.mark.parametrize("shape", ((0, 5), (3, 0)))
def test_empty(shape, pre, dtype, residual_dtype):
    config = Config(pre_layer_norm=pre, dropout_rate=0.1)
    case = Case(batch=shape[0], seq_len=shape[1], dtype=dtype, residual_dtype=residual_dtype, config=config)
    check_empty(case)


@pytest.mark.parametrize("dtype", ("float16", "float32"))
def test_cuda_graph(dtype):
    case = Case(dtype=dtype, seq_len=65, head_dim=64, config=Config(dropout_rate=0.1, attn_dropout_rate=0.1, seed=3))
    check_graph(case, {"float16": 2e-3, "float32": 1e-5}[dtype])


def test_tf32_is_off_unless_asked_for():
    case = Case(dtype="float32", seq_len=64, head_dim=64)
    inputs = common.make_inputs(case)
    check(case)
    exact, _ = run_case(case, inputs, wanted=[])
    rounded, _ = run_case(case, inputs, wanted=[], allow_tf32=True)
    error = abs(exact - rounded).max()
    assert 1e-5 < error < 2e-2
