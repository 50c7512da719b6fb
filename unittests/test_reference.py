"""The reference is checked by itself: known Philox numbers, finite differences, Paddle's ordinary ops in float64."""

import common
import numpy as np
import pytest
import reference
from cases import (
    FEED_FORWARD_FEATURES,
    FULL_FEED_FORWARD,
    FULL_LINEAR,
    FULL_RESIDUAL_NORM,
    LINEAR_FEATURES,
    OPTIONAL,
    RESIDUAL_NORM_FEATURES,
    SIXTEEN_BIT,
    Case,
    FeedForwardCase,
    Mask,
)

KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    assert [int(w) for w in reference.philox4x32(words(counter), words(key))] == words(answer)


def test_attention_numbers_element_by_element():
    seed, offset = (5 << 40) + 3, (1 << 33) + 7
    batch, num_heads, seq_len = 2, 3, 37
    numbers = reference.attention_random(seed, offset, batch, num_heads, seq_len)
    key, c3 = reference.philox_stage(seed, offset, 0)
    assert key == (3, (5 << 8) + (2 * offset >> 32)) and c3 == (2 * offset) & 0xFFFFFFFF
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 36, 35), (0, 1, 9, 8), (1, 0, 16, 23), (0, 2, 31, 7), (1, 1, 5, 33)]:
        counter = (j // 16 * 4 + j % 8 // 2, i // 16 * 8 + i % 8, b * num_heads + h, c3)
        word = reference.philox4x32(counter, key)[i % 16 // 8 * 2 + j % 16 // 8]
        assert numbers[b, h, i, j] == (int(word) >> 16 * (j % 2)) & 0xFFFF


def test_output_numbers_element_by_element():
    seed, offset, rows, embed_dim = 11, 2, 5, 13
    numbers = reference.output_random(seed, offset, rows, embed_dim)
    key, c3 = reference.philox_stage(seed, offset, 1)
    assert key == (11, 0) and c3 == 5
    for row in range(rows):
        for column in range(embed_dim):
            e = row * embed_dim + column
            word = reference.philox4x32((e // 8, 0, 0, c3), key)[e % 8 // 2]
            assert numbers[row, column] == (int(word) >> 16 * (e % 2)) & 0xFFFF


def test_hidden_numbers_element_by_element():
    """Those of some columns are those of the whole at these columns, also with columns that another process has."""
    key, c3 = reference.philox_stage(11, 2, 0)
    assert key == (11, 0) and c3 == 4
    case = FeedForwardCase(shape=(5,), width=3, hidden=4).but(
        final_layer_norm=False, add_residual=False, dropout1_rate=0.5, seed=11, offset=2, first_hidden=6,
        total_hidden=13,
    )  # fmt: skip
    # Every hidden number goes to a column of its own, and is 1 where it is kept.
    inputs = {"x": np.ones((5, 4)), "linear1_weight": np.eye(4), "linear2_weight": np.eye(4)}
    kept = reference.forward_of(inputs, case.config)
    for row in range(5):
        for column in range(4):
            e = row * 13 + 6 + column
            word = reference.philox4x32((e // 8, 0, 0, c3), key)[e % 8 // 2]
            number = (int(word) >> 16 * (e % 2)) & 0xFFFF
            assert kept[row, column] == (2.0 if number >= 32768 else 0.0)


def test_random_numbers_are_all_different_elements():
    """No two elements of a tensor may share a number, and no two stages: equal 64-bit windows would show it."""
    numbers = reference.attention_random(1, 0, 1, 1, 64).reshape(-1)
    output = reference.output_random(1, 0, 64, 64).reshape(-1)
    for a in (numbers, output):
        counts = np.bincount(a, minlength=65536)
        assert counts.max() <= 5  # 4096 draws of 65536
    assert not np.array_equal(numbers, output)


GRADIENT_CASES = [
    Case(mask=Mask("B1SS", "float64")).but(pre_layer_norm=True, dropout_rate=0.3, attn_dropout_rate=0.2, seed=4),
    Case(mask=Mask("SS", "bool", "rows")).but(causal=True, final_layer_norm=False, attn_dropout_rate=0.5),
    Case(mask=Mask("BHSS", "int64")).but(
        pre_layer_norm=True, add_residual=False, mode="downscale_in_infer", dropout_rate=0.5
    ),
    Case(absent=OPTIONAL).but(pre_layer_norm=True),
    Case().but(training=False, mode="downscale_in_infer", dropout_rate=0.4, attn_dropout_rate=0.3),
    Case(mask=Mask("B11S", "float64", "-inf")).but(dropout_rate=1.0),
    *FEED_FORWARD_FEATURES.values(),
    *RESIDUAL_NORM_FEATURES.values(),
    *LINEAR_FEATURES.values(),
]


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_backward_is_the_derivative_of_forward(case):
    inputs = common.make_inputs(case)
    d_out = inputs.pop("d_out")
    gradients = reference.backward_of(inputs, case.config, d_out)
    rng = np.random.default_rng(0)
    step = 1e-6
    for name, gradient in gradients.items():
        assert gradient.shape == inputs[name].shape
        for _ in range(3):
            direction = rng.standard_normal(gradient.shape)
            ends = [
                (
                    reference.forward_of(dict(inputs, **{name: inputs[name] + sign * step * direction}), case.config)
                    * d_out
                ).sum()
                for sign in (1, -1)
            ]
            slope = (ends[0] - ends[1]) / (2 * step)
            scale = np.sqrt((gradient**2).sum()) + 1e-3
            assert abs(slope - (gradient * direction).sum()) <= 1e-6 * scale, name


def test_rows_without_a_key_give_zeros():
    case = Case(mask=Mask("SS", "bool", "none"), absent=("linear_bias",)).but(
        final_layer_norm=False, add_residual=False
    )
    inputs = common.make_inputs(case)
    d_out = inputs.pop("d_out")
    assert not reference.forward(inputs, case.config).any()
    assert not any(g.any() for g in reference.backward(inputs, case.config, d_out).values())


@pytest.mark.parametrize("pre_layer_norm", [False, True])
def test_reference_agrees_with_ordinary_paddle_ops(pre_layer_norm):
    paddle = pytest.importorskip("paddle")
    functional = paddle.nn.functional
    case = Case(mask=Mask("B1SS", "float64")).but(pre_layer_norm=pre_layer_norm)
    inputs = common.make_inputs(case)
    d_out = inputs.pop("d_out")
    t = {n: paddle.to_tensor(a, place=paddle.CPUPlace(), stop_gradient=n == "attn_mask") for n, a in inputs.items()}
    b, s, h, d, e = case.batch, case.seq_len, case.num_heads, case.head_dim, case.embed_dim
    hidden = functional.layer_norm(t["x"], [e], t["pre_ln_scale"], t["pre_ln_bias"]) if pre_layer_norm else t["x"]
    qkv = paddle.matmul(hidden, t["qkv_weight"].reshape([3 * e, e]), transpose_y=True) + t["qkv_bias"].reshape([-1])
    q, k, v = (a.squeeze(0) for a in qkv.reshape([b, s, 3, h, d]).transpose([2, 0, 3, 1, 4]).split(3))
    p = functional.softmax(paddle.matmul(q * d**-0.5, k, transpose_y=True) + t["attn_mask"])
    o = paddle.matmul(p, v).transpose([0, 2, 1, 3]).reshape([b, s, e])
    z = t["x"] + paddle.matmul(o, t["linear_weight"]) + t["linear_bias"]
    out = functional.layer_norm(z, [e], t["ln_scale"], t["ln_bias"])
    names = common.differentiable(inputs)
    gradients = paddle.grad(
        [out], [t[n] for n in names], grad_outputs=[paddle.to_tensor(d_out, place=paddle.CPUPlace())]
    )
    common.check(
        case,
        common.expect(case, dict(inputs, d_out=d_out)),
        out.numpy(),
        {n: g.numpy() for n, g in zip(names, gradients)},
    )


ORDINARY = {
    "relu": lambda functional, a: functional.relu(a),
    "gelu": lambda functional, a: functional.gelu(a),
    "gelu_tanh": lambda functional, a: functional.gelu(a, approximate=True),
    "silu": lambda functional, a: functional.silu(a),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", list(ORDINARY))
def test_feed_forward_agrees_with_ordinary_paddle_ops(activation, gated):
    paddle = pytest.importorskip("paddle")
    functional = paddle.nn.functional
    case = FULL_FEED_FORWARD.but(activation=activation, gated=gated, dropout1_rate=0.0, dropout2_rate=0.0)
    case = case.but(ln1_epsilon=1e-5, ln2_epsilon=1e-5)
    inputs = common.make_inputs(case)
    t = {n: paddle.to_tensor(a, place=paddle.CPUPlace(), stop_gradient=False) for n, a in inputs.items()}
    h = functional.layer_norm(t["x"], [case.width], t["ln1_scale"], t["ln1_bias"])
    a = functional.linear(h, t["linear1_weight"], t["linear1_bias"])
    if gated:
        a, b = a.split(2, axis=-1)
        u = ORDINARY[activation](functional, a) * b
    else:
        u = ORDINARY[activation](functional, a)
    z = t["x"] + functional.linear(u, t["linear2_weight"], t["linear2_bias"])
    out = functional.layer_norm(z, [case.width], t["ln2_scale"], t["ln2_bias"])
    names = common.differentiable(inputs)
    gradients = paddle.grad([out], [t[n] for n in names], grad_outputs=[t["d_out"]])
    found = {n: g.numpy() for n, g in zip(names, gradients)}
    common.check(case, common.expect(case, inputs), out.numpy(), found)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_composed_16bit_keeps_a_float32_residual(dtype):
    """With nothing of the branch left x and its gradient pass as they are, which no 16-bit number is."""
    case = Case(dtype=dtype, residual_dtype="float32").but(final_layer_norm=False, dropout_rate=1.0)
    inputs = common.make_inputs(case)
    expected = common.expect(case, inputs)
    assert np.array_equal(expected.peer_out, inputs["x"])
    assert np.array_equal(expected.peer_gradients["x"], inputs["d_out"])
    assert not np.array_equal(reference.round_to(inputs["x"], dtype), inputs["x"])


def test_bfloat16_rounds_to_nearest_even():
    values = np.array([1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8 + 2.0**-20), np.inf, -np.inf, 0.0], np.float32)
    expected = np.array([1.0, 1.0, 1 + 2.0**-6, -(1 + 2.0**-7), np.inf, -np.inf, 0.0], np.float32)
    assert np.array_equal(reference.round_to(values, "bfloat16"), expected)
    assert np.isnan(reference.round_to(np.array([np.nan], np.float32), "bfloat16")).all()


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("residual_dtype", (None, "float32"))
@pytest.mark.parametrize("pre", (False, True))
def test_composed_16bit_is_near_the_reference(pre, residual_dtype, dtype):
    """Its error is a few roundings: were it wrong, or sloppy, a comparison with it would prove nothing."""
    case = Case(dtype=dtype, residual_dtype=residual_dtype, mask=Mask("B1SS", "bool")).but(
        pre_layer_norm=pre, dropout_rate=0.1, attn_dropout_rate=0.1, seed=3
    )
    inputs = common.make_inputs(case)
    expected = common.expect(case, inputs)
    u = common.UNIT_ROUNDOFF[dtype]
    assert 0 < np.abs(expected.peer_out - expected.out).max() <= 8 * u * np.abs(expected.out).max()
    for name, gradient in expected.gradients.items():
        error = np.abs(expected.peer_gradients[name] - gradient).max()
        assert error <= 16 * u * np.abs(gradient).max(), name


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize(
    "case",
    [
        *(
            FULL_FEED_FORWARD.but(gated=gated, residual_dtype=wide)
            for gated in (False, True)
            for wide in (None, "float32")
        ),
        FULL_RESIDUAL_NORM,
        FULL_LINEAR,
    ],
    ids=str,
)
def test_composed_16bit_of_other_blocks_is_near_the_reference(case, dtype):
    case = case.but(dtype=dtype)
    inputs = common.make_inputs(case)
    expected = common.expect(case, inputs)
    u = common.UNIT_ROUNDOFF[dtype]
    assert 0 < np.abs(expected.peer_out - expected.out).max() <= 8 * u * np.abs(expected.out).max()
    for name, gradient in expected.gradients.items():
        error = np.abs(expected.peer_gradients[name] - gradient).max()
        assert error <= 16 * u * np.abs(gradient).max(), name
