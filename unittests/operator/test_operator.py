"""The operator against the reference in dygraph: result and every gradient, by switches, dtypes, inputs, masks and
sizes.
"""

from concurrent.futures import ThreadPoolExecutor

import cases
import common
import numpy as np
import paddle
import pytest
import reference
from cases import DTYPES, FEATURES, FULL, SIXTEEN_BIT, Case, Mask
from runners import call, check_case, check_stored, paddle_computes_on, run_dygraph, to_tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, dtype, place):
    check_case(FEATURES[feature].but(dtype=dtype), place)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("feature", FEATURES)
def test_float32_x_beside_16_bit_weights(feature, dtype, place):
    """x, the residual sum and the result stay float32; the products and attention are 16-bit."""
    case = FEATURES[feature].but(dtype=dtype, residual_dtype="float32", seq_len=37, head_dim=24)
    check_case(case, place)
    if case.config.dropout_rate:
        check_case(case.but(dropout_rate=0.0), place)


@pytest.mark.parametrize("case", cases.ABSENT_PAIRS + cases.NORM_PARAMETERS_IN_16_BIT, ids=str)
def test_pairs_of_absent_inputs_and_16_bit_norms(case, place):
    check_case(case, place)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", cases.MASKS, ids=str)
def test_masks(mask, causal, place):
    check_case(Case(num_heads=3, dtype="float32", mask=mask).but(causal=causal), place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", cases.MASKS_FOR_EVERY_DTYPE + cases.MASKS_OVER_TILES, ids=str)
def test_masks_for_every_dtype(mask, dtype, place):
    """Also float masks of another float dtype than x."""
    check_case(Case(dtype=dtype, mask=mask).but(attn_dropout_rate=0.1), place)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", cases.HARD_MASKS, ids=str)
def test_hard_masks(mask, dtype, causal, place):
    check_case(Case(dtype=dtype, mask=mask).but(causal=causal), place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", cases.HARD_MASKS, ids=str)
def test_rows_that_see_no_key(mask, dtype, place):
    """They give zeros, as do their gradients, and no NaN reaches anything."""
    case = cases.bare(mask, dtype=dtype)
    check_case(case, place)
    inputs = common.make_inputs(case)
    out, gradients = run_dygraph(common.stored_inputs(case, inputs), case.config, place, common.differentiable(inputs))
    if mask.content == "none":
        assert not out.any() and not any(g.any() for g in gradients.values())


def test_causal_is_the_lower_triangle(place):
    """Causal gives what a bool mask of the lower triangle gives, on the CPU bit for bit."""
    case = Case(seq_len=21)
    arrays = common.stored_inputs(case, common.make_inputs(case))
    wanted = [n for n in arrays if n != "d_out"]
    causal = run_dygraph(arrays, case.config, place, wanted, causal=True)
    masked = run_dygraph(dict(arrays, attn_mask=np.tri(21, dtype=bool)), case.config, place, wanted)
    np.testing.assert_allclose(causal[0], masked[0], rtol=1e-12, atol=1e-12)
    for name in wanted:
        np.testing.assert_allclose(causal[1][name], masked[1][name], rtol=1e-9, atol=1e-9)
    if isinstance(place, paddle.CPUPlace):
        assert np.array_equal(causal[0], masked[0])
        assert all(np.array_equal(causal[1][name], masked[1][name]) for name in wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.SIZES, ids=str)
def test_sizes(case, dtype, place):
    case = case.but(dtype=dtype)
    if isinstance(place, paddle.CUDAPlace) and case.head_dim > 256:
        with pytest.raises(
            ValueError, match=f"qkv_weight: expected head_dim of at most 256 on a GPU, got {case.head_dim}"
        ):
            check_case(case, place)
    else:
        check_case(case, place)


# In one dtype: what depends on both is the core's, whose suites run these in every one.
@pytest.mark.parametrize("case", cases.LENGTHS + cases.HEAD_DIMS, ids=str)
def test_lengths_and_head_dims(case, place):
    check_case(case.but(dtype="float32"), place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.LONG, ids=str)
def test_a_thousand_positions(case, dtype, place):
    check_case(case.but(dtype=dtype), place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.EMPTY, ids=str)
def test_zero_sizes(case, dtype, place):
    """Empty results, empty gradients for x, zeros for the parameters."""
    case = case.but(dtype=dtype)
    check_case(case, place)
    inputs = common.make_inputs(case)
    _, gradients = run_dygraph(common.stored_inputs(case, inputs), case.config, place, common.differentiable(inputs))
    for name, gradient in gradients.items():
        assert gradient.shape == inputs[name].shape and not gradient.any(), name


def test_large_scores_do_not_overflow(place):
    """Scores of many hundreds, and rows where only one key counts."""
    case = Case(seq_len=40, dtype="float32")
    inputs = common.make_inputs(case)
    inputs["qkv_bias"] = reference.round_to(inputs["qkv_bias"] * 200, "float32").astype(np.float64)
    expected = common.expect(case, inputs)
    out, _ = run_dygraph(common.stored_inputs(case, inputs), case.config, place)
    assert np.isfinite(out).all()
    assert np.abs(out - expected.out).max() <= 1e-3 * np.abs(expected.out).max()


def transposed_view(a, place):
    """A tensor that reads `a` through swapped last axes."""
    axes = list(range(a.ndim - 2)) + [a.ndim - 1, a.ndim - 2]
    base = paddle.to_tensor(np.ascontiguousarray(a.transpose(axes)), place=place)
    return base.transpose(axes)


def sliced_view(a, place):
    """A tensor that reads every other element of the first axis and all but three of the last of a larger one."""
    padded = np.zeros((2 * a.shape[0],) + a.shape[1:-1] + (a.shape[-1] + 3,), a.dtype)
    padded[::2, ..., 2:-1] = a
    padded[1::2] = 99
    return paddle.to_tensor(padded, place=place)[::2, ..., 2:-1]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("view", [transposed_view, sliced_view])
@pytest.mark.parametrize("mask", [Mask("BHSS", "bool"), Mask("B1SS", "float32"), Mask("SS", "int64")], ids=str)
def test_non_contiguous_inputs(mask, view, dtype, place):
    if not paddle_computes_on(place):
        pytest.skip("Paddle's own kernels, which make tensors contiguous, do nothing on this GPU")
    case = Case(dtype=dtype, seq_len=9, mask=mask).but(pre_layer_norm=True)
    inputs = common.make_inputs(case)
    arrays = common.stored_inputs(case, inputs)
    wanted = common.differentiable(inputs)
    tensors = to_tensors(arrays, place, wanted)
    for name in ("x", "qkv_weight", "linear_weight", "qkv_bias", "attn_mask"):
        tensors[name] = view(arrays[name], place)
        tensors[name].stop_gradient = name == "attn_mask"
        assert not tensors[name].is_contiguous()
    d_out = view(arrays["d_out"], place)
    out = call(tensors, case.config)
    gradients = paddle.grad([out], [tensors[n] for n in wanted], grad_outputs=[d_out])
    check_stored(case, common.expect(case, inputs), out.numpy(), {n: g.numpy() for n, g in zip(wanted, gradients)})


SUBSETS = pytest.mark.parametrize(
    "case, wanted", cases.subsets(FULL, cases.WANTED + cases.PAIRS), ids=cases.name_of_subset
)


@SUBSETS
def test_frozen_parameters(case, wanted, place):
    """Only `wanted` need a gradient; everything else has stop_gradient=True."""
    check_case(case, place, wanted=wanted)


@SUBSETS
def test_partial_gradients(case, wanted, place):
    """Every input may have a gradient, but only `wanted` are asked for."""
    if not wanted:
        pytest.skip("paddle.grad asks for one input at least")
    inputs = common.make_inputs(case)
    arrays = common.stored_inputs(case, inputs)
    tensors = to_tensors(arrays, place, common.differentiable(inputs))
    out = call(tensors, case.config)
    d_out = paddle.to_tensor(arrays["d_out"], place=place)
    gradients = paddle.grad([out], [tensors[name] for name in wanted], grad_outputs=[d_out])
    check_stored(case, common.expect(case, inputs), out.numpy(), {n: g.numpy() for n, g in zip(wanted, gradients)})
    assert all(t.grad is None for t in tensors.values())


def test_backward_fills_grad_of_what_is_not_frozen(place):
    inputs = common.make_inputs(FULL)
    arrays = common.stored_inputs(FULL, inputs)
    wanted = ["x", "qkv_weight", "linear_bias", "pre_ln_scale"]
    tensors = to_tensors(arrays, place, wanted)
    out = call(tensors, FULL.config)
    out.backward(paddle.to_tensor(arrays["d_out"], place=place), retain_graph=True)
    first = {name: tensors[name].grad.numpy() for name in wanted}
    check_stored(FULL, common.expect(FULL, inputs), out.numpy(), first)
    assert all(t.grad is None for name, t in tensors.items() if name not in wanted)
    for t in tensors.values():
        t.clear_gradient(False)
    out.backward(paddle.to_tensor(arrays["d_out"], place=place))
    for name in wanted:
        assert np.array_equal(tensors[name].grad.numpy(), first[name]), name


def test_inputs_that_the_switches_do_not_use(place):
    """Layer-norm parameters of a norm that is switched off may be given: they change nothing and get no gradient, or
    zeros.
    """
    case = Case().but(final_layer_norm=False)
    inputs = common.make_inputs(case)
    arrays = common.stored_inputs(case, inputs)
    arrays.update({name: np.full(case.embed_dim, 3.0) for name in reference.NORM_PARAMETERS})
    tensors = to_tensors(arrays, place, [n for n in arrays])
    out = call(tensors, case.config)
    out.backward(paddle.to_tensor(arrays["d_out"], place=place))
    gradients = {n: tensors[n].grad.numpy() for n in common.differentiable(inputs)}
    check_stored(case, common.expect(case, inputs), out.numpy(), gradients)
    for name in reference.NORM_PARAMETERS:
        assert tensors[name].grad is None or not tensors[name].grad.numpy().any(), name


def test_no_gradient_needed(place):
    inputs = common.make_inputs(FULL)
    tensors = to_tensors(common.stored_inputs(FULL, inputs), place)
    assert call(tensors, FULL.config).stop_gradient
    with paddle.no_grad():
        for t in tensors.values():
            t.stop_gradient = False
        out = call(tensors, FULL.config)
    assert out.stop_gradient
    common.check(FULL, common.expect(FULL, inputs), out.numpy(), {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_no_grad_gives_the_same_bits(training, dtype, place):
    case = Case(dtype=dtype).but(pre_layer_norm=True, causal=True, dropout_rate=0.3, attn_dropout_rate=0.2)
    tensors = to_tensors(common.stored_inputs(case, common.make_inputs(case)), place, wanted=("x", "qkv_weight"))
    outs = []
    for grad in (True, False):
        paddle.seed(4)
        with paddle.set_grad_enabled(grad):
            outs.append(call(tensors, case.config, training=training, seed=None))
    assert [out.stop_gradient for out in outs] == [False, True]
    assert np.array_equal(*(out.numpy() for out in outs))


def test_inputs_are_left_alone(place):
    """Neither pass writes to an input, nor to the gradient that it is given."""
    case = FULL.but(final_layer_norm=False, attn_dropout_rate=0.0, dropout_rate=0.0)
    arrays = common.stored_inputs(case, common.make_inputs(case))
    tensors = to_tensors(arrays, place, [n for n in arrays if n != "attn_mask"])
    d_out = paddle.to_tensor(arrays["d_out"], place=place)
    out = call(tensors, case.config)
    kept = out.numpy()
    paddle.grad([out], [tensors["x"], tensors["qkv_weight"]], grad_outputs=[d_out])
    for name, a in arrays.items():
        assert np.array_equal((d_out if name == "d_out" else tensors[name]).numpy(), a), name
    assert np.array_equal(out.numpy(), kept)


NUMERICAL = [
    FULL,
    FULL.but(mask=Mask("SS", "bool", "rows"), causal=True, final_layer_norm=False),
    FULL.but(mask=None, absent=("qkv_bias", "ln_scale"), pre_layer_norm=False, add_residual=False),
]


@pytest.mark.parametrize("case", NUMERICAL, ids=str)
def test_numerical_gradient(case, place):
    """The operator's gradient is the slope of the operator itself; the reference takes no part."""
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(dtype, place):
    """The forward pass everywhere, whether or not a gradient is needed; on the CPU the gradients too."""
    case = Case(2, 100, 4, 16, dtype, mask=Mask("B1SS", "float32")).but(
        pre_layer_norm=True, attn_dropout_rate=0.1, dropout_rate=0.1
    )
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


def test_calls_from_several_threads(place):
    """Python threads that serve at the same time get what one alone gets. Paddle's autograd is not made for threads."""
    cases = [Case(2, 60, 2, 16, "float32").but(causal=True, attn_dropout_rate=0.1, seed=seed) for seed in range(4)]
    arrays = common.stored_inputs(cases[0], common.make_inputs(cases[0]))

    def run(case):
        return [run_dygraph(arrays, case.config, place)[0] for _ in range(10)]

    alone = [run(case)[0] for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        for expected, results in zip(alone, pool.map(run, cases)):
            assert all(np.array_equal(result, expected) for result in results)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_a_number_stays_in_its_sequence(value, place):
    """As with ordinary ops: it reaches what its own sequence computes, and no other sequence."""
    case = Case(2, 40, 2, 8, "float32").but(causal=True, pre_layer_norm=True)
    arrays = common.stored_inputs(case, common.make_inputs(case))
    good, _ = run_dygraph(arrays, case.config, place)
    arrays["x"][0, 20, 3] = value
    bad, _ = run_dygraph(arrays, case.config, place)
    assert np.array_equal(bad[1], good[1])
    assert not np.isfinite(bad[0, 20]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_negative_numbers_as_a_mask(dtype, place):
    """What many models use for -inf: finite numbers beside which the score itself vanishes."""
    case = Case(2, 30, 2, 8, dtype, mask=Mask("BHSS", dtype, "-inf")).but(attn_dropout_rate=0.1)
    inputs = common.make_inputs(case)
    low = -60000.0 if dtype == "float16" else reference.round_to(-1e30, dtype)
    hidden = np.isinf(inputs["attn_mask"]) & ~np.eye(30, dtype=bool)
    inputs["attn_mask"] = np.where(hidden, low, np.where(np.isinf(inputs["attn_mask"]), 0.0, inputs["attn_mask"]))
    wanted = common.differentiable(inputs)
    out, gradients = run_dygraph(common.stored_inputs(case, inputs), case.config, place, wanted)
    check_stored(case, common.expect(case, inputs), out, gradients)


@pytest.mark.parametrize("low", common.FAR_DOWN)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_whose_every_key_is_far_down(dtype, low, place):
    case, inputs = common.rows_far_down(dtype, low)
    out, gradients = run_dygraph(common.stored_inputs(case, inputs), case.config, place, common.differentiable(inputs))
    gradients = {name: common.from_storage(g) for name, g in gradients.items()}
    common.check_by_ordinary_ops(case, inputs, common.from_storage(out), gradients)


def test_numbers_of_numpy_are_numbers(place):
    case = FULL.but(seed=3)
    arrays = common.stored_inputs(case, common.make_inputs(case))
    rates = {
        name: np.float64(getattr(case.config, name)) for name in ("dropout_rate", "attn_dropout_rate", "ln_epsilon")
    }
    out, _ = run_dygraph(arrays, case.config, place, seed=np.int32(3), causal=np.bool_(False), **rates)
    assert np.array_equal(out, run_dygraph(arrays, case.config, place)[0])


def test_second_order_gradients_are_refused(place):
    """The operator has none: asking for one must raise, not leave it out."""
    case = Case()
    arrays = common.stored_inputs(case, common.make_inputs(case))
    tensors = to_tensors(arrays, place, ["x"])
    out = call(tensors, case.config)
    d_out = paddle.to_tensor(arrays["d_out"], place=place)
    (d_x,) = paddle.grad([out], [tensors["x"]], grad_outputs=[d_out], create_graph=True)
    with pytest.raises(Exception, match="second-order"):
        paddle.grad([d_x], [tensors["x"]], grad_outputs=[d_out])
