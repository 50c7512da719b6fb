"""Conversion of weights: the packed layout, its inverse, and paddle.nn.MultiHeadAttention there and back."""

import numpy as np
import paddle
import pytest
from paddle_fused_attention import (
    FusedMultiHeadAttention,
    convert,
    pack_qkv_bias,
    pack_qkv_weight,
    revert,
    unpack_qkv_bias,
    unpack_qkv_weight,
)

HEADS, DIM = 4, 6
EMBED = HEADS * DIM


def matrices(count, shape, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("wrap", [lambda a: a, paddle.to_tensor], ids=["numpy", "tensor"])
def test_pack_weight(wrap, dtype):
    """W[i, h, d, e] is column h*D + d of the Linear weight [in, out]; what goes in comes out, of the same kind."""
    separate = matrices(3, (EMBED, EMBED), dtype)
    packed = pack_qkv_weight(*map(wrap, separate), HEADS)
    assert type(packed) is type(wrap(separate[0]))
    numbers = np.asarray(packed)
    assert numbers.shape == (3, HEADS, DIM, EMBED) and numbers.dtype == dtype
    for i, w in enumerate(separate):
        for h in range(HEADS):
            for d in range(DIM):
                assert np.array_equal(numbers[i, h, d], w[:, h * DIM + d])
    for w, back in zip(separate, unpack_qkv_weight(packed)):
        assert type(back) is type(packed) and np.array_equal(np.asarray(back), w)


@pytest.mark.parametrize("wrap", [lambda a: a, paddle.to_tensor], ids=["numpy", "tensor"])
def test_pack_bias(wrap):
    separate = matrices(3, (EMBED,))
    packed = pack_qkv_bias(*map(wrap, separate), HEADS)
    assert type(packed) is type(wrap(separate[0]))
    assert np.array_equal(np.asarray(packed), np.stack(separate).reshape(3, HEADS, DIM))
    for b, back in zip(separate, unpack_qkv_bias(packed)):
        assert type(back) is type(packed) and np.array_equal(np.asarray(back), b)


@pytest.mark.parametrize("wrap", [lambda a: a, paddle.to_tensor], ids=["numpy", "tensor"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_fewer_heads_of_keys(kv_heads, wrap):
    """Row h*D + d of the packed heads is column h*D + d of wq, wk and wv in turn."""
    width = kv_heads * DIM
    weights = [*matrices(1, (EMBED, EMBED)), *matrices(2, (EMBED, width), seed=1)]
    biases = [*matrices(1, (EMBED,)), *matrices(2, (width,), seed=1)]
    packed = pack_qkv_weight(*map(wrap, weights), HEADS)
    assert np.array_equal(np.asarray(packed), np.hstack(weights).T.reshape(HEADS + 2 * kv_heads, DIM, EMBED))
    packed_bias = pack_qkv_bias(*map(wrap, biases), HEADS)
    assert np.array_equal(np.asarray(packed_bias), np.hstack(biases).reshape(HEADS + 2 * kv_heads, DIM))
    for found, wanted in ((unpack_qkv_weight(packed), weights), (unpack_qkv_bias(packed_bias, HEADS), biases)):
        for back, original in zip(found, wanted):
            assert type(back) is type(packed) and np.array_equal(np.asarray(back), original)


def test_unpack_then_pack():
    (weight,) = matrices(1, (3, HEADS, DIM, EMBED))
    (bias,) = matrices(1, (3, HEADS, DIM))
    assert np.array_equal(pack_qkv_weight(*unpack_qkv_weight(weight), HEADS), weight)
    assert np.array_equal(pack_qkv_bias(*unpack_qkv_bias(bias), HEADS), bias)


def test_the_packed_weight_is_a_copy():
    separate = matrices(3, (EMBED, EMBED))
    packed = pack_qkv_weight(*separate, HEADS)
    before = packed.copy()
    separate[0][:] = 0
    assert np.array_equal(packed, before) and packed.flags.c_contiguous


@pytest.mark.parametrize("wrap", [lambda a: a, paddle.to_tensor], ids=["numpy", "tensor"])
def test_what_is_unpacked_is_contiguous_and_a_copy(wrap):
    """Writers of files take the memory as it lies."""
    packed = [wrap(a) for a in (*matrices(1, (3, HEADS, DIM, EMBED)), *matrices(1, (3, HEADS, DIM)))]
    parts = [*unpack_qkv_weight(packed[0]), *unpack_qkv_bias(packed[1])]
    assert all(part.flags.c_contiguous if isinstance(part, np.ndarray) else part.is_contiguous() for part in parts)
    before = [np.array(part) for part in parts]
    for whole in packed:
        if isinstance(whole, np.ndarray):
            whole[...] = 0
        else:
            whole.zero_()
    for part, wanted in zip(parts, before):
        assert np.array_equal(np.asarray(part), wanted)


def test_unpacking_passes_gradients_on():
    weight = paddle.to_tensor(matrices(1, (3, HEADS, DIM, EMBED))[0], stop_gradient=False)
    unpack_qkv_weight(weight)[1][:, 0].sum().backward()
    wanted = np.zeros(weight.shape)
    wanted[1, 0, 0] = 1
    assert np.array_equal(weight.grad.numpy(), wanted)


def test_all_parameters_that_are_handed_out_are_contiguous():
    layers = [FusedMultiHeadAttention(EMBED, HEADS)]
    layers += layers[0].to_multi_head_attention()
    layers.append(FusedMultiHeadAttention.from_multi_head_attention(*layers[1:]))
    states = [layer.state_dict() for layer in layers]
    encoder = convert(paddle.nn.TransformerEncoderLayer(EMBED, HEADS, 8))
    states += [encoder.state_dict(), revert(encoder).state_dict()]
    for state in states:
        for name, value in state.items():
            assert value.is_contiguous(), name


def square(*shape):
    return np.zeros(shape, "float32")


BAD_SHAPES = [
    (pack_qkv_weight, (square(24, 24), square(24, 16), square(24, 24), 4), ValueError, ["wk", "[24, 24]", "[24, 16]"]),
    (pack_qkv_weight, (square(24, 16), square(24, 24), square(24, 24), 4), ValueError, ["wq", "[24, 16]"]),
    (pack_qkv_weight, (square(24), square(24), square(24), 4), ValueError, ["wq", "[24]"]),
    (pack_qkv_weight, (square(24, 24), square(24, 24), square(32, 32), 4), ValueError, ["wv", "[24, 24]", "[32, 32]"]),
    (pack_qkv_weight, (square(24, 24),) * 3 + (5,), ValueError, ["num_heads", "24", "5"]),
    (pack_qkv_weight, (square(24, 24),) * 3 + (0,), ValueError, ["num_heads", "0"]),
    (pack_qkv_weight, (None, square(24, 24), square(24, 24), 4), TypeError, ["wq", "None"]),
    (pack_qkv_weight, (square(24, 24), [1, 2], square(24, 24), 4), TypeError, ["wk", "list"]),
    (pack_qkv_bias, (square(24), square(24), square(25), 4), ValueError, ["bv", "[24]", "[25]"]),
    (pack_qkv_bias, (square(2, 12), square(24), square(24), 4), ValueError, ["bq", "[2, 12]"]),
    (pack_qkv_bias, (square(24),) * 3 + (5,), ValueError, ["num_heads", "24", "5"]),
    (pack_qkv_weight, (square(24, 24), square(24, 18), square(24, 18), 4), ValueError, ["wk", "6", "[24, 18]"]),
    (pack_qkv_weight, (square(24, 24), square(24, 12), square(24, 24), 4), ValueError, ["wv", "[24, 12]", "[24, 24]"]),
    (pack_qkv_weight, (square(24, 24), square(20, 12), square(20, 12), 4), ValueError, ["wk", "[20, 12]"]),
    (unpack_qkv_weight, (square(7, 6, 24),), ValueError, ["qkv_weight", "[7, 6, 24]"]),
    (unpack_qkv_weight, (square(10, 6, 24),), ValueError, ["qkv_weight", "[10, 6, 24]"]),
    (unpack_qkv_bias, (square(8, 6),), ValueError, ["num_heads", "[8, 6]", "None"]),
    (unpack_qkv_bias, (square(8, 6), 3), ValueError, ["qkv_bias", "[8, 6]"]),
    (unpack_qkv_weight, (square(3, 4, 6, 23),), ValueError, ["qkv_weight", "[3, 4, 6, 24]", "[3, 4, 6, 23]"]),
    (unpack_qkv_weight, (square(2, 4, 6, 24),), ValueError, ["qkv_weight", "[2, 4, 6, 24]"]),
    (unpack_qkv_weight, (square(72, 24),), ValueError, ["qkv_weight", "[72, 24]"]),
    (unpack_qkv_bias, (square(2, 4, 6),), ValueError, ["qkv_bias", "[2, 4, 6]"]),
    (unpack_qkv_bias, (square(72),), ValueError, ["qkv_bias", "[72]"]),
]


@pytest.mark.parametrize("function, arguments, error, words", BAD_SHAPES, ids=lambda v: getattr(v, "__name__", ""))
def test_bad_shapes(function, arguments, error, words):
    with pytest.raises(error) as raised:
        function(*arguments)
    for word in words:
        assert word in str(raised.value), str(raised.value)


def attention_and_norm(bias_attr=None):
    """Paddle's layers with every parameter moved off its initial value."""
    attention = paddle.nn.MultiHeadAttention(EMBED, HEADS, bias_attr=bias_attr)
    norm = paddle.nn.LayerNorm(EMBED, epsilon=1e-4)
    rng = np.random.default_rng(4)
    for layer in (attention, norm):
        for p in layer.parameters():
            p.set_value((p.numpy() + 0.2 * rng.standard_normal(p.shape)).astype("float32"))
    return attention, norm


@pytest.mark.parametrize("bias_attr", [None, False], ids=["biases", "no_biases"])
@pytest.mark.parametrize("with_norm", [False, True], ids=["bare", "norm"])
@pytest.mark.parametrize("normalize_before", [False, True], ids=["post", "pre"])
def test_from_multi_head_attention(normalize_before, with_norm, bias_attr):
    attention, norm = attention_and_norm(bias_attr)
    fused = FusedMultiHeadAttention.from_multi_head_attention(attention, norm if with_norm else None, normalize_before)
    fused.eval()
    x = paddle.to_tensor(matrices(1, (2, 7, EMBED))[0])
    mask = paddle.to_tensor(np.random.default_rng(0).random((2, 1, 7, 7)) < 0.8)
    h = norm(x) if normalize_before and with_norm else x
    expected = x + attention(h, h, h, mask)
    if with_norm and not normalize_before:
        expected = norm(expected)
    np.testing.assert_allclose(fused(x, attn_mask=mask).numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_from_multi_head_attention_keeps_dropout():
    attention = paddle.nn.MultiHeadAttention(EMBED, HEADS, dropout=0.25)
    fused = FusedMultiHeadAttention.from_multi_head_attention(attention, dropout_rate=0.5, causal=True)
    assert (fused.attn_dropout_rate, fused.dropout_rate, fused.causal) == (0.25, 0.5, True)


@pytest.mark.parametrize("bias_attr", [None, False], ids=["biases", "no_biases"])
@pytest.mark.parametrize("normalize_before", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("with_norm", [False, True], ids=["bare", "norm"])
def test_to_multi_head_attention(with_norm, normalize_before, bias_attr):
    attention, norm = attention_and_norm(bias_attr)
    fused = FusedMultiHeadAttention.from_multi_head_attention(attention, norm if with_norm else None, normalize_before)
    attention_back, norm_back = fused.to_multi_head_attention()
    assert isinstance(attention_back, paddle.nn.MultiHeadAttention)
    pairs = [(attention_back, attention)]
    if with_norm:
        assert isinstance(norm_back, paddle.nn.LayerNorm) and norm_back._epsilon == norm._epsilon
        pairs.append((norm_back, norm))
    else:
        assert norm_back is None
    for layer, original in pairs:
        state, wanted = layer.state_dict(), original.state_dict()
        assert state.keys() == wanted.keys()
        for name in wanted:
            assert np.array_equal(state[name].numpy(), wanted[name].numpy()), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("kdim", [None, 8])
def test_dtypes_are_kept(kdim, dtype):
    attention, norm = paddle.nn.MultiHeadAttention(EMBED, HEADS, kdim=kdim), paddle.nn.LayerNorm(EMBED)
    attention.to(dtype=dtype)
    fused = FusedMultiHeadAttention.from_multi_head_attention(attention, norm)
    assert fused.linear_weight.dtype == attention.out_proj.weight.dtype
    attention_back, norm_back = fused.to_multi_head_attention()
    for layer, original in ((attention_back, attention), (norm_back, norm)):
        state, wanted = layer.state_dict(), original.state_dict()
        for name in wanted:
            assert state[name].dtype == wanted[name].dtype, name
            assert np.array_equal(state[name].numpy(), wanted[name].numpy()), name


def test_two_layer_norms_have_no_separate_form():
    with pytest.raises(ValueError) as raised:
        FusedMultiHeadAttention(EMBED, HEADS, normalize_before=True).to_multi_head_attention()
    assert "normalize_before" in str(raised.value) and "final_layer_norm" in str(raised.value)


def test_from_multi_head_attention_copies():
    attention, norm = attention_and_norm()
    fused = FusedMultiHeadAttention.from_multi_head_attention(attention, norm)
    before = {n: p.numpy() for n, p in fused.named_parameters()}
    for p in attention.parameters() + norm.parameters():
        p.set_value(p.numpy() * 0)
    for name, p in fused.named_parameters():
        assert np.array_equal(p.numpy(), before[name]), name


def test_from_multi_head_attention_refuses():
    other = paddle.nn.MultiHeadAttention(EMBED, HEADS, kdim=12, vdim=12)
    with pytest.raises(ValueError) as raised:
        FusedMultiHeadAttention.from_multi_head_attention(other, paddle.nn.LayerNorm(EMBED), normalize_before=True)
    assert "kdim" in str(raised.value)
    with pytest.raises(TypeError) as raised:
        FusedMultiHeadAttention.from_multi_head_attention(paddle.nn.Linear(3, 3))
    assert "Linear" in str(raised.value)
    attention, _ = attention_and_norm()
    with pytest.raises(ValueError) as raised:
        FusedMultiHeadAttention.from_multi_head_attention(attention, paddle.nn.LayerNorm(EMBED + 1))
    assert str(EMBED) in str(raised.value) and str(EMBED + 1) in str(raised.value)
    with pytest.raises(TypeError):
        FusedMultiHeadAttention.from_multi_head_attention(attention, paddle.nn.Linear(3, 3))


class OwnLinear(paddle.nn.Linear):
    pass


class OwnAttention(paddle.nn.MultiHeadAttention):
    pass


def change_projection(attention):
    attention.k_proj = OwnLinear(EMBED, EMBED)


def change_forward(attention):
    attention.out_proj.forward = attention.out_proj.forward


NOT_TAKEN = {
    "projection": (change_projection, TypeError, "mha: .*its k_proj is a OwnLinear, not a paddle.nn.Linear"),
    "hook": (lambda mha: mha.q_proj.register_forward_pre_hook(print), ValueError, "mha: .*its q_proj has hooks"),
    "hook on it": (
        lambda mha: mha.register_forward_post_hook(print),
        ValueError,
        "mha: expected a layer without hooks",
    ),
    "forward": (change_forward, ValueError, "mha: .*its out_proj has hooks or a forward of its own"),
    "weight norm": (lambda mha: paddle.nn.utils.weight_norm(mha.v_proj), ValueError, "mha: .*its v_proj has"),
    "buffer": (
        lambda mha: mha.register_buffer("table", paddle.ones([2])),
        ValueError,
        "mha: .*has table beside its parts",
    ),
}


@pytest.mark.parametrize("case", NOT_TAKEN)
def test_layers_that_compute_something_else_are_refused(case):
    change, error, message = NOT_TAKEN[case]
    attention = paddle.nn.MultiHeadAttention(EMBED, HEADS)
    change(attention)
    with pytest.raises(error, match=message):
        FusedMultiHeadAttention.from_multi_head_attention(attention)


def test_subclasses_are_refused():
    with pytest.raises(TypeError, match="mha: expected a paddle.nn.MultiHeadAttention, got OwnAttention"):
        FusedMultiHeadAttention.from_multi_head_attention(OwnAttention(EMBED, HEADS))
    norm = type("OwnNorm", (paddle.nn.LayerNorm,), {})(EMBED)
    with pytest.raises(TypeError, match="norm: expected a paddle.nn.LayerNorm or None, got OwnNorm"):
        FusedMultiHeadAttention.from_multi_head_attention(paddle.nn.MultiHeadAttention(EMBED, HEADS), norm)
