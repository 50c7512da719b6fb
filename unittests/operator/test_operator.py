"""The operator against the reference in dygraph: result and every gradient, by switches, dtypes, inputs, masks and
sizes.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import common
import numpy as np
import paddle
import pytest
import reference
from common import Case, Mask
from runners import call, check_case, check_stored, paddle_computes_on, run_dygraph, to_tensors

FULL = Case(mask=Mask("B1SS", "float64")).but(
    pre_layer_norm=True, attn_dropout_rate=0.2, dropout_rate=0.3, pre_ln_epsilon=1e-3, ln_epsilon=1e-4, seed=17
)


def with_dtype(case, dtype):
    """The case in another dtype, with the float mask in that dtype too."""
    mask = case.mask
    if mask and mask.dtype == case.dtype:
        mask = Mask(mask.shape, dtype, mask.content)
    return case.but(dtype=dtype, mask=mask)


SWITCHES = [
    with_dtype(FULL, dtype).but(pre_layer_norm=pre, final_layer_norm=final, add_residual=residual)
    for dtype in common.DTYPES
    for pre, final, residual in itertools.product([False, True], repeat=3)
]


@pytest.mark.parametrize("case", SWITCHES, ids=str)
def test_switches_and_dtypes(case, place):
    check_case(case, place)


@pytest.mark.parametrize("dtype", common.SIXTEEN_BIT)
def test_layer_norm_parameters_in_16_bit(dtype, place):
    check_case(with_dtype(FULL, dtype).but(norm_dtype=dtype), place)


@pytest.mark.parametrize("dtype", common.SIXTEEN_BIT)
@pytest.mark.parametrize("pre, final, residual", list(itertools.product([False, True], repeat=3)))
def test_float32_x_beside_16_bit_weights(pre, final, residual, dtype, place):
    """x, the residual sum and the result stay float32; the products and attention are 16-bit."""
    case = with_dtype(FULL, dtype).but(pre_layer_norm=pre, final_layer_norm=final, add_residual=residual)
    case = case.but(seq_len=37, head_dim=24)
    check_case(case.but(residual_dtype="float32"), place)
    check_case(case.but(residual_dtype="float32", dropout_rate=0.0), place)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("absent", [(name,) for name in common.OPTIONAL] + [common.OPTIONAL], ids="+".join)
def test_absent_inputs(absent, dtype, place):
    check_case(with_dtype(FULL, dtype).but(absent=absent), place)


@pytest.mark.parametrize("absent", list(itertools.combinations(common.OPTIONAL, 2)), ids="+".join)
def test_pairs_of_absent_inputs(absent, place):
    check_case(FULL.but(absent=absent), place)


MASK_SHAPES = ["SS", "1S", "S", "S1", "11", "B11S", "B1SS", "1HSS", "BHSS", "BHS1", "BH1S", "HSS", "11SS", "1111", ""]
MASK_DTYPES = ["bool", "int32", "int64", "float32"]
OTHER_MASK_DTYPES = ["uint8", "int8", "int16", "float64", "float16", "bfloat16"]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", MASK_SHAPES)
@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_masks(dtype, shape, causal, place):
    check_case(Case(num_heads=3, dtype="float32", mask=Mask(shape, dtype)).but(causal=causal), place)


@pytest.mark.parametrize("dtype", common.DTYPES)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES + OTHER_MASK_DTYPES)
def test_mask_dtypes(mask_dtype, dtype, place):
    """Also float masks of another float dtype than x."""
    check_case(Case(dtype=dtype, mask=Mask("B1SS", mask_dtype)).but(attn_dropout_rate=0.1), place)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", common.DTYPES)
def test_minus_infinity_is_hard(dtype, causal, place):
    check_case(Case(dtype=dtype, mask=Mask("BHSS", dtype, "-inf")).but(causal=causal), place)


@pytest.mark.parametrize("dtype", common.DTYPES)
@pytest.mark.parametrize("mask_dtype", ["bool", "int64", "float"])
@pytest.mark.parametrize("content", ["rows", "none"])
def test_rows_that_see_no_key(content, mask_dtype, dtype, place):
    """They give zeros, as do their gradients, and no NaN reaches anything."""
    mask = Mask("BHSS" if content == "rows" else "SS", dtype if mask_dtype == "float" else mask_dtype, content)
    case = Case(dtype=dtype, seq_len=19, mask=mask, absent=("linear_bias",)).but(
        final_layer_norm=False, add_residual=False, attn_dropout_rate=0.2
    )
    check_case(case, place)
    inputs = common.make_inputs(case)
    out, gradients = run_dygraph(common.stored_inputs(case, inputs), case.config, place, common.differentiable(inputs))
    if content == "none":
        assert not out.any() and not any(g.any() for g in gradients.values())


def test_causal_is_the_lower_triangle(place):
    """By the public call alone: causal equals a bool mask of the lower triangle, bit for bit."""
    case = Case(seq_len=21)
    arrays = common.stored_inputs(case, common.make_inputs(case))
    wanted = [n for n in arrays if n != "d_out"]
    causal = run_dygraph(arrays, case.config, place, wanted, causal=True)
    masked = run_dygraph(dict(arrays, attn_mask=np.tri(21, dtype=bool)), case.config, place, wanted)
    np.testing.assert_allclose(causal[0], masked[0], rtol=1e-12, atol=1e-12)
    for name in wanted:
        np.testing.assert_allclose(causal[1][name], masked[1][name], rtol=1e-9, atol=1e-9)


SIZES = [
    # batch, seq_len, num_heads, head_dim
    (2, 1, 2, 40),
    (1, 7, 6, 1),
    (2, 7, 3, 80),
    (3, 129, 1, 40),
    (1, 129, 2, 64),
    (1, 129, 1, 128),
    (1, 130, 2, 72),
    (2, 33, 2, 256),
    (1, 16, 5, 3),
    (2, 300, 2, 16),
    (3, 100, 5, 80),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", common.DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_sizes(sizes, dtype, place):
    case = Case(*sizes, dtype=dtype, mask=Mask("B1SS", "bool")).but(
        pre_layer_norm=True, attn_dropout_rate=0.1, dropout_rate=0.1, seed=3
    )
    check_case(case, place)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_thousand_positions(dtype, causal, place):
    case = Case(1, 1000, 2, 64 if causal else 40, dtype, mask=None if causal else Mask("B11S", "bool")).but(
        causal=causal, attn_dropout_rate=0.1
    )
    check_case(case, place)


@pytest.mark.parametrize("head_dim", [8, 80])
@pytest.mark.parametrize("dtype", common.DTYPES)
@pytest.mark.parametrize("batch, seq_len", [(0, 7), (2, 0), (0, 0)])
def test_zero_sizes(batch, seq_len, head_dim, dtype, place):
    """Empty results, empty gradients for x, zeros for the parameters."""
    case = with_dtype(FULL, dtype).but(batch=batch, seq_len=seq_len, head_dim=head_dim)
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


WANTED = [(name,) for name in reference.DIFFERENTIABLE] + [
    ("x", "linear_bias"),
    ("qkv_bias", "pre_ln_scale"),
    ("ln_scale", "ln_bias"),
    ("linear_weight", "ln_bias"),
    ("pre_ln_scale", "pre_ln_bias"),
    ("qkv_weight", "linear_weight"),
]
SUBSETS = [(FULL, wanted) for wanted in WANTED]
SUBSETS += [(FULL.but(pre_layer_norm=False), w) for w in WANTED if not any(name.startswith("pre_ln") for name in w)]
SUBSETS += [(FULL.but(final_layer_norm=False), w) for w in WANTED if not any(name.startswith("ln") for name in w)]
SUBSET_IDS = ["+".join(w) + str(case)[len(str(FULL)) :] for case, w in SUBSETS]


@pytest.mark.parametrize("case, wanted", SUBSETS, ids=SUBSET_IDS)
def test_frozen_parameters(case, wanted, place):
    """Only `wanted` need a gradient; everything else has stop_gradient=True."""
    check_case(case, place, wanted=wanted)


@pytest.mark.parametrize("case, wanted", SUBSETS, ids=SUBSET_IDS)
def test_partial_gradients(case, wanted, place):
    """Every input may have a gradient, but only `wanted` are asked for."""
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


@pytest.mark.parametrize("dtype", common.DTYPES)
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


@pytest.mark.parametrize("mode", ["upscale_in_train", "downscale_in_infer"])
@pytest.mark.parametrize("pre_layer_norm", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("dtype", common.DTYPES)
def test_eval_mode(dtype, pre_layer_norm, mode, place):
    """Nothing is dropped, and gradients are those of what was computed."""
    check_case(with_dtype(FULL, dtype).but(training=False, mode=mode, pre_layer_norm=pre_layer_norm), place)


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


@pytest.mark.parametrize("dtype", common.DTYPES)
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


@pytest.mark.parametrize("dtype", common.DTYPES)
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
