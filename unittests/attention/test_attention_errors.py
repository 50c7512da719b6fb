"""Bad input of the functions of attention: an error names the argument, in dygraph and before a static graph has
values.
"""

import numpy as np
import paddle
import pytest
from paddle.incubate.nn import attn_bias as biases
from paddle_fused_attention.functional import (
    flash_attention,
    flash_attn_qkvpacked,
    flash_attn_unpadded,
    flash_attn_varlen_qkvpacked,
    flashmask_attention,
    memory_efficient_attention,
    scaled_dot_product_attention,
)
from runners import static_mode

B, S, T, H, D = 2, 5, 7, 4, 8  # batch, queries, keys, heads, head_dim
NAN = float("nan")


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


def starts(*values, dtype="int32"):
    return np.array(values, dtype)


QKV = {"query": zeros(B, S, H, D), "key": zeros(B, T, 2, D), "value": zeros(B, T, 2, D)}
PACKED = {"query": zeros(S, H, D), "key": zeros(T, 2, D), "value": zeros(T, 2, D)}
STARTS = {"cu_seqlens_q": starts(0, 2, 5), "cu_seqlens_k": starts(0, 3, 7)}

# Arrays for a call that works, and what goes with them.
GOOD = {
    scaled_dot_product_attention: ({**QKV, "attn_mask": zeros(B, 1, S, T)}, {}),
    flash_attention: (QKV, {}),
    flash_attn_qkvpacked: ({"qkv": zeros(B, S, 4, 2, D)}, {}),
    flash_attn_unpadded: ({**PACKED, **STARTS}, {"max_seqlen_q": 3, "max_seqlen_k": 4, "scale": 1.0}),
    flash_attn_varlen_qkvpacked: (
        {"qkv": zeros(6, 4, 2, D), "cu_seqlens_q": starts(0, 2, 5), "cu_seqlens_k": starts(0, 2, 5)},
        {"max_seqlen_q": 3, "max_seqlen_k": 3, "scale": None},
    ),
    flashmask_attention: ({**QKV, "startend_row_indices": zeros(B, 2, T, 2, dtype="int32")}, {}),
    memory_efficient_attention: ({**QKV, "attn_bias": zeros(B, H, S, T)}, {}),
}

# function, argument, what comes, the error, and what the message must hold beside the argument's name
BAD_TENSORS = [
    (scaled_dot_product_attention, "query", zeros(B, S, H, D, dtype="int32"), TypeError, ["int32"]),
    (scaled_dot_product_attention, "query", zeros(B, S, H, D, 1), ValueError, ["[2, 5, 4, 8, 1]"]),
    (scaled_dot_product_attention, "query", zeros(S, D), ValueError, ["[5, 8]"]),
    (scaled_dot_product_attention, "query", zeros(B, S, H, 0), ValueError, ["at least 1", "0"]),
    (scaled_dot_product_attention, "key", zeros(B, T, 3, D), ValueError, ["divides", "[2, 5, 4, 8]", "[2, 7, 3, 8]"]),
    (scaled_dot_product_attention, "key", zeros(B, T, 8, D), ValueError, ["divides"]),
    (scaled_dot_product_attention, "key", zeros(B, T, 0, D), ValueError, ["divides"]),
    (scaled_dot_product_attention, "key", zeros(B + 1, T, 2, D), ValueError, ["[3, 7, 2, 8]"]),
    (scaled_dot_product_attention, "key", zeros(B, T, 2, D + 1), ValueError, ["[2, 7, 2, 9]"]),
    (scaled_dot_product_attention, "key", zeros(T, 2, D), ValueError, ["[7, 2, 8]"]),
    (scaled_dot_product_attention, "key", zeros(B, T, 2, D, dtype="float64"), TypeError, ["float32", "float64"]),
    (scaled_dot_product_attention, "value", zeros(B, T + 1, 2, D), ValueError, ["[2, 7, 2, 8]", "[2, 8, 2, 8]"]),
    (scaled_dot_product_attention, "value", zeros(B, T, 2, D + 1), ValueError, ["[2, 7, 2, 9]"]),
    (scaled_dot_product_attention, "value", zeros(B, T, 2, D, dtype="float16"), TypeError, ["float16"]),
    (scaled_dot_product_attention, "attn_mask", zeros(B, 1, S, T + 1), ValueError, ["[2, 4, 5, 7]", "[2, 1, 5, 8]"]),
    (scaled_dot_product_attention, "attn_mask", zeros(1, B, 1, S, T), ValueError, ["[1, 2, 1, 5, 7]"]),
    (scaled_dot_product_attention, "attn_mask", zeros(S, T, dtype="complex64"), TypeError, ["complex64"]),
    (flash_attention, "key", zeros(B, T, 3, D), ValueError, ["divides"]),
    (flash_attn_qkvpacked, "qkv", zeros(B, S, 2, 2, D), ValueError, ["[2, 5, 2, 2, 8]"]),
    (flash_attn_qkvpacked, "qkv", zeros(S, 4, 2, D), ValueError, ["[5, 4, 2, 8]"]),
    (flash_attn_qkvpacked, "qkv", zeros(B, S, 4, 2, D, dtype="int64"), TypeError, ["int64"]),
    (flash_attn_unpadded, "query", zeros(1, S, H, D), ValueError, ["[1, 5, 4, 8]"]),
    (flash_attn_unpadded, "key", zeros(1, T, 2, D), ValueError, ["[1, 7, 2, 8]"]),
    (flash_attn_unpadded, "value", zeros(T - 1, 2, D), ValueError, ["[6, 2, 8]"]),
    (flash_attn_unpadded, "cu_seqlens_q", starts(0, 2, 5, dtype="int64"), TypeError, ["int32", "int64"]),
    (flash_attn_unpadded, "cu_seqlens_q", zeros(1, 3, dtype="int32"), ValueError, ["[1, 3]"]),
    (flash_attn_unpadded, "cu_seqlens_k", starts(0, 7), ValueError, ["[3]", "[2]"]),
    (flash_attn_varlen_qkvpacked, "qkv", zeros(6, 2, 2, D), ValueError, ["[6, 2, 2, 8]"]),
    (flash_attn_varlen_qkvpacked, "cu_seqlens_q", zeros(3, 1, dtype="int32"), ValueError, ["[3, 1]"]),
    (flash_attn_varlen_qkvpacked, "cu_seqlens_k", starts(0, 2, 5, dtype="int64"), TypeError, ["int64"]),
    (flashmask_attention, "startend_row_indices", zeros(B, 2, T, 1, dtype="int32"), ValueError, ["2 or 4", "1]"]),
    (flashmask_attention, "startend_row_indices", zeros(B, 2, T, 3, dtype="int32"), ValueError, ["2 or 4"]),
    (flashmask_attention, "startend_row_indices", zeros(B, 3, T, 2, dtype="int32"), ValueError, ["[2, 3, 7, 2]"]),
    (flashmask_attention, "startend_row_indices", zeros(1, 2, T, 2, dtype="int32"), ValueError, ["[1, 2, 7, 2]"]),
    (flashmask_attention, "startend_row_indices", zeros(B, 2, S, 2, dtype="int32"), ValueError, ["[2, 2, 5, 2]"]),
    (flashmask_attention, "startend_row_indices", zeros(B, T, 2, dtype="int32"), ValueError, ["[2, 7, 2]"]),
    (flashmask_attention, "startend_row_indices", zeros(B, 2, T, 2, dtype="int64"), TypeError, ["int32", "int64"]),
    (memory_efficient_attention, "attn_bias", zeros(B, H, T, S), ValueError, ["[2, 4, 5, 7]", "[2, 4, 7, 5]"]),
    (memory_efficient_attention, "attn_bias", zeros(S, T, dtype="complex64"), TypeError, ["complex64"]),
]
IDS = dict(ids=lambda value: getattr(value, "__name__", value) if isinstance(value, str) or callable(value) else "")


def check_message(raised, name, parts):
    message = str(raised.value)
    assert message.startswith(f"{name}: expected") and "\n" not in message, message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("function, name, array, error, parts", BAD_TENSORS, **IDS)
def test_tensors(function, name, array, error, parts, place):
    arrays, options = GOOD[function]
    tensors = {n: paddle.to_tensor(a, place=place) for n, a in {**arrays, name: array}.items()}
    with pytest.raises(error) as raised:
        function(**tensors, **options)
    check_message(raised, name, parts)


@pytest.mark.parametrize("function, name, array, error, parts", BAD_TENSORS, **IDS)
def test_variables_of_a_static_graph(function, name, array, error, parts):
    """The same messages, before there are values."""
    arrays, options = GOOD[function]
    with static_mode(), paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
        variables = {n: paddle.static.data(n, a.shape, str(a.dtype)) for n, a in {**arrays, name: array}.items()}
        with pytest.raises(error) as raised:
            function(**variables, **options)
    check_message(raised, name, parts)


def tensors_for(function, place=None):
    place = place or paddle.CPUPlace()
    return {n: paddle.to_tensor(a, place=place) for n, a in GOOD[function][0].items()}


@pytest.mark.usefixtures("needs_paddle")
@pytest.mark.parametrize("function", GOOD, **IDS)
def test_good_arguments_work(function, place):
    function(**tensors_for(function, place), **GOOD[function][1])


PAIR = [flash_attention, flash_attn_qkvpacked, flash_attn_unpadded, flash_attn_varlen_qkvpacked]
FLASH = [*PAIR, flashmask_attention]


def of_all(functions, *rows):
    return [(function, *row) for function in functions for row in rows]


OTHERS = [
    *of_all(
        GOOD,
        (dict(training=2), TypeError, "training: expected a bool, got 2"),
        (dict(seed=0.5), TypeError, "seed: expected an int or None, got 0.5"),
        (dict(seed=2**64), ValueError, "seed: expected an int of 64 bits"),
        (dict(window_size=-2), ValueError, "window_size: expected at least -1"),
        (dict(window_size=(1, 2, 3)), TypeError, "window_size: expected an int"),
        (dict(window_size=0.5), TypeError, "window_size: expected an int"),
    ),
    *of_all(
        FLASH,
        (dict(dropout=1.5), ValueError, r"dropout: expected a number in \[0, 1\], got 1.5"),
        (dict(dropout=NAN), ValueError, "dropout: expected a number in .* got nan"),
        (dict(dropout=True), TypeError, "dropout: expected a number in .* got True"),
        (dict(causal="yes"), TypeError, "causal: expected a bool, got 'yes'"),
        (dict(rng_name=1), TypeError, "rng_name: expected a str, got int"),
        (dict(rng_name="local_seed", dropout=0.5), NotImplementedError, "rng_name: expected '' .* got 'local_seed'"),
        (dict(fixed_seed_offset=(None,), dropout=0.5), NotImplementedError, "fixed_seed_offset: expected None"),
    ),
    *of_all(PAIR, (dict(return_softmax=True), NotImplementedError, "return_softmax: expected False")),
    *of_all(PAIR, (dict(return_softmax=None), TypeError, "return_softmax: expected a bool, got None")),
    *of_all(
        [scaled_dot_product_attention, flash_attn_qkvpacked, flash_attn_unpadded, memory_efficient_attention],
        (dict(scale=0.0), ValueError, "scale: expected a number above 0, got 0"),
        (dict(scale=-1.0), ValueError, "scale: expected a number of at least 0, got -1.0"),
        (dict(scale=NAN), ValueError, "scale: expected a number .* got nan"),
        (dict(scale="1"), TypeError, "scale: expected a number .* got '1'"),
    ),
    *of_all(
        [flash_attention, flashmask_attention],
        (dict(softmax_scale=0), ValueError, "softmax_scale: expected a number above 0"),
        (dict(softmax_scale=float("inf")), ValueError, "softmax_scale: expected a number"),
    ),
    *of_all(
        [flash_attn_unpadded, flash_attn_varlen_qkvpacked],
        (dict(max_seqlen_q=0), ValueError, "max_seqlen_q: expected at least 1"),
        (dict(max_seqlen_k=2.5), TypeError, "max_seqlen_k: expected an int, got 2.5"),
        (dict(max_seqlen_k=2**31), ValueError, "max_seqlen_k: expected at least 1 and less than 2\\^31"),
        (dict(cu_seqlens_q=None), TypeError, "cu_seqlens_q: expected a Tensor, got None"),
        (dict(cu_seqlens_k=[0, 5]), TypeError, "cu_seqlens_k: expected a Tensor, got list"),
    ),
    *of_all(
        [scaled_dot_product_attention, flash_attention, flash_attn_unpadded, flashmask_attention],
        (dict(query=None), TypeError, "query: expected a Tensor, got None"),
        (dict(key=[1.0]), TypeError, "key: expected a Tensor, got list"),
        (dict(value=1), TypeError, "value: expected a Tensor, got int"),
    ),
    *of_all([flash_attn_qkvpacked, flash_attn_varlen_qkvpacked], (dict(qkv=None), TypeError, "qkv: expected a Tensor")),
    (scaled_dot_product_attention, dict(attn_mask=1.0), TypeError, "attn_mask: expected a Tensor or None, got float"),
    (scaled_dot_product_attention, dict(dropout_p=-0.5), ValueError, r"dropout_p: expected a number in \[0, 1\]"),
    (scaled_dot_product_attention, dict(is_causal=2), TypeError, "is_causal: expected a bool, got 2"),
    (scaled_dot_product_attention, dict(enable_gqa=False), ValueError, "key: expected 4 heads, .* got 2"),
    (scaled_dot_product_attention, dict(enable_gqa=None), TypeError, "enable_gqa: expected a bool, got None"),
    (scaled_dot_product_attention, dict(backend="math"), ValueError, "backend: expected None or 'p2p', got 'math'"),
    (scaled_dot_product_attention, dict(is_causal=True, window_size=1), ValueError, "window_size: expected None in"),
    (flash_attn_varlen_qkvpacked, dict(max_seqlen_q=4), ValueError, "max_seqlen_q: expected 2 sequences .* got 4"),
    (flash_attn_varlen_qkvpacked, dict(max_seqlen_k=4), ValueError, "max_seqlen_k: expected 2 sequences .* got 4"),
    (flash_attn_varlen_qkvpacked, dict(varlen_padded=None), TypeError, "varlen_padded: expected a bool, got None"),
    (flashmask_attention, dict(startend_row_indices=1), TypeError, "startend_row_indices: expected a Tensor or None"),
    (flashmask_attention, dict(window_size=2), ValueError, "window_size: expected None beside startend_row_indices"),
    (flashmask_attention, dict(return_softmax_lse=True), NotImplementedError, "return_softmax_lse: expected False"),
    (flashmask_attention, dict(return_seed_offset=True), NotImplementedError, "return_seed_offset: expected False"),
    (flashmask_attention, dict(block_mask=1), NotImplementedError, "block_mask: expected None, got a int"),
    (memory_efficient_attention, dict(attn_bias=[1]), TypeError, "attn_bias: expected a Tensor or None, got list"),
    (memory_efficient_attention, dict(p=1.5), ValueError, r"p: expected a number in \[0, 1\], got 1.5"),
    (
        memory_efficient_attention,
        dict(attn_bias=biases.LowerTriangularMaskWithTensorBias([1])),
        TypeError,
        "attn_bias: expected a Tensor",
    ),
    (
        memory_efficient_attention,
        dict(attn_bias=biases.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([2], 4, [3])),
        NotImplementedError,
        "attn_bias: expected .* got a BlockDiagonalCausalWithOffsetPaddedKeysMask",
    ),
    (
        memory_efficient_attention,
        dict(attn_bias=biases.BlockDiagonalMask.from_seqlens([2, 3], [3, 4])),
        ValueError,
        r"query: expected shape \[1, tokens, heads, head_dim\], got \[2, 5, 4, 8\]",
    ),
    (
        memory_efficient_attention,
        dict(attn_bias=biases.BlockDiagonalMask.from_seqlens([2, 3], [3, 4]).make_causal()),
        NotImplementedError,
        "attn_bias: expected sequences of as many keys as queries",
    ),
]


@pytest.mark.parametrize("function, changes, error, message", OTHERS, **IDS)
def test_other_arguments(function, changes, error, message):
    options = {**tensors_for(function), **GOOD[function][1], **changes}
    with pytest.raises(error, match=f"^({message})") as raised:
        function(**options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shape", [(S, S), (S, T + 1), (B + 1, 1, S, T), (S + 1, T)], ids=str)
def test_masks_beside_is_causal(shape):
    """A mask is of all keys, also of those that no query sees."""
    tensors = {**tensors_for(scaled_dot_product_attention), "attn_mask": paddle.zeros(shape)}
    with pytest.raises(ValueError, match="^attn_mask: expected"):
        scaled_dot_product_attention(**tensors, is_causal=True)


@pytest.mark.parametrize("function", FLASH, **IDS)
def test_what_means_nothing_without_dropout(function):
    """Generators of Paddle's are accepted where nothing is dropped."""
    for options in (dict(dropout=0.0), dict(dropout=0.5, training=False)):
        tensors = tensors_for(function)
        function(**tensors, **GOOD[function][1], **options, rng_name="local_seed", fixed_seed_offset=(None,), name="a")


BAD_STARTS = [
    ((1, 2, 5), "a first value of 0, got 1"),
    ((-1, 2, 5), "a first value of 0, got -1"),
    ((0, 6, 5), None),
    ((0, -2, 5), None),
    ((0, 2, 4), "a last value .* 5, got 4"),
    ((0, 3, 6), "a last value .* 5, got 6"),
    ((0, 1, 5), "no sequence longer than max_seqlen_q = 3, got 4"),
]


@pytest.mark.parametrize("values, message", BAD_STARTS)
@pytest.mark.parametrize("graph", ["dygraph", "program"])
def test_what_cu_seqlens_hold(graph, values, message):
    """Checked on the CPU before any work, in a program when it runs."""
    arrays, options = GOOD[flash_attn_unpadded]
    arrays = {**arrays, "cu_seqlens_q": starts(*values)}
    expected = f"cu_seqlens_q: expected {message or '.*, got'}"
    if graph == "dygraph":
        tensors = {n: paddle.to_tensor(a, place=paddle.CPUPlace()) for n, a in arrays.items()}
        with pytest.raises(ValueError, match=f"^{expected}"):
            flash_attn_unpadded(**tensors, **options)
        return
    with static_mode():
        main = paddle.static.Program()
        with paddle.static.program_guard(main, paddle.static.Program()):
            variables = {n: paddle.static.data(n, a.shape, str(a.dtype)) for n, a in arrays.items()}
            out, _ = flash_attn_unpadded(**variables, **options)
        with pytest.raises(Exception, match=expected):
            paddle.static.Executor(paddle.CPUPlace()).run(main, feed=arrays, fetch_list=[out])


@pytest.mark.parametrize("values", [(1, 2, 5), (0, 4, 5), (0, 3, 2), (0, -1, 5), (0, 3, 7)])
def test_lengths_of_padded_sequences(values):
    tensors, options = tensors_for(flash_attn_varlen_qkvpacked), GOOD[flash_attn_varlen_qkvpacked][1]
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            flash_attn_varlen_qkvpacked(
                **{**tensors, name: paddle.to_tensor(starts(*values), place=paddle.CPUPlace())}, **options
            )


@pytest.mark.parametrize("function", GOOD, **IDS)
def test_tensors_without_memory(function):
    for name in GOOD[function][0]:
        tensors = tensors_for(function)
        tensors[name]._clear_data()
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor with values"):
            function(**tensors, **GOOD[function][1])


@pytest.mark.parametrize("name", QKV)
def test_sparse_tensors(name):
    for function in (scaled_dot_product_attention, flash_attention, memory_efficient_attention):
        tensors = {n: paddle.to_tensor(a, place=paddle.CPUPlace()) for n, a in QKV.items()}
        tensors[name] = tensors[name].to_sparse_coo(2)
        with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor"):
            function(**tensors)


def test_dygraph_tensors_in_a_static_graph():
    tensors = {n: paddle.to_tensor(a, place=paddle.CPUPlace()) for n, a in QKV.items()}
    with static_mode(), pytest.raises(TypeError, match="^query: expected a variable of the static graph"):
        scaled_dot_product_attention(**tensors)


def test_no_second_gradient():
    query = paddle.to_tensor(zeros(1, 3, 2, 4), place=paddle.CPUPlace(), stop_gradient=False)
    out = scaled_dot_product_attention(query, query, query)
    (gradient,) = paddle.grad([out], [query], create_graph=True)
    with pytest.raises(Exception, match="custom_attention has no second-order gradient"):
        gradient.sum().backward()
