"""What the attention block takes beside whole sequences of as many keys as queries: masks that want a gradient, packed
sequences, windows, a scale, grouped heads."""

from dataclasses import replace

import attention_reference
import numpy as np
import paddle
import pytest
from paddle_fused_attention import fused_multi_head_attention
from reference import Config
from runners import call, run_dygraph, run_static, static_mode

BATCH, SEQ_LEN, HEADS, HEAD_DIM = 2, 70, 4, 8
WIDTH = HEADS * HEAD_DIM
LENGTHS = (3, 0, 70, 1, 129)
TOKENS = sum(LENGTHS)
PARAMETERS = ("x", "qkv_weight", "linear_weight", "pre_ln_scale", "qkv_bias", "linear_bias")
MASKS = (
    [BATCH, HEADS, SEQ_LEN, SEQ_LEN],
    [1, HEADS, SEQ_LEN, SEQ_LEN],
    [BATCH, 1, 1, SEQ_LEN],
    [SEQ_LEN],
    [SEQ_LEN, 1],
)


def make_arrays(kv_heads=HEADS, mask=None, packed=False, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (TOKENS, WIDTH) if packed else (BATCH, SEQ_LEN, WIDTH),
        "qkv_weight": (3, HEADS, HEAD_DIM, WIDTH) if kv_heads == HEADS else (HEADS + 2 * kv_heads, HEAD_DIM, WIDTH),
        "linear_weight": (WIDTH, WIDTH),
        "pre_ln_scale": (WIDTH,),
        "qkv_bias": (3, HEADS, HEAD_DIM) if kv_heads == HEADS else (HEADS + 2 * kv_heads, HEAD_DIM),
        "linear_bias": (WIDTH,),
    }
    if mask is not None:
        shapes["attn_mask"] = tuple(mask)
    shapes["d_out"] = shapes["x"]
    return {name: (rng.standard_normal(shape) / 2).astype(dtype) for name, shape in shapes.items()}


def starts():
    return np.cumsum([0, *LENGTHS]).astype("int32")


def expected(arrays, causal=False, window=(-1, -1), scale=None):
    """Result and gradients in float64, from those of attention by itself."""
    x, weight, d_out = arrays["x"], arrays["qkv_weight"].reshape([-1, WIDTH]), arrays["d_out"]
    kv_heads = (len(weight) // HEAD_DIM - HEADS) // 2
    rstd = 1.0 / np.sqrt(x.var(-1, keepdims=True) + PLAIN.pre_ln_epsilon)
    normed = (x - x.mean(-1, keepdims=True)) * rstd
    h = normed * arrays["pre_ln_scale"]
    qkv = (h @ weight.T + arrays["qkv_bias"].reshape(-1)).reshape([*x.shape[:-1], -1, HEAD_DIM])
    inputs = dict(zip(("query", "key", "value"), np.split(qkv, [HEADS, HEADS + kv_heads], axis=-2)))
    if "attn_mask" in arrays:
        inputs["attn_mask"] = arrays["attn_mask"]
    if "cu_seqlens" in arrays:
        inputs["cu_seqlens_q"] = inputs["cu_seqlens_k"] = arrays["cu_seqlens"]
    config = attention_reference.Config(scale, causal=causal, window_left=window[0], window_right=window[1])
    o = attention_reference.forward(inputs, config).reshape(x.shape)
    out = x + o @ arrays["linear_weight"] + arrays["linear_bias"]

    d_o = d_out @ arrays["linear_weight"].T
    of_attention = attention_reference.backward(inputs, config, d_o.reshape([*x.shape[:-1], HEADS, HEAD_DIM]))
    d_qkv = np.concatenate([of_attention[name] for name in ("query", "key", "value")], axis=-2)
    d_qkv = d_qkv.reshape([*x.shape[:-1], -1])
    d_h = d_qkv @ weight
    d_normed = d_h * arrays["pre_ln_scale"]
    d_x = rstd * (d_normed - d_normed.mean(-1, keepdims=True) - normed * (d_normed * normed).mean(-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    gradients = {
        "x": d_out + d_x,
        "qkv_weight": np.tensordot(d_qkv, h, (rows, rows)).reshape(arrays["qkv_weight"].shape),
        "linear_weight": np.tensordot(o, d_out, (rows, rows)),
        "pre_ln_scale": (d_h * normed).sum(rows),
        "qkv_bias": d_qkv.sum(rows).reshape(arrays["qkv_bias"].shape),
        "linear_bias": d_out.sum(rows),
    }
    if "attn_mask" in arrays:
        gradients["attn_mask"] = of_attention["attn_mask"]
    return out, gradients


PLAIN = Config(pre_layer_norm=True, final_layer_norm=False, dropout_rate=0.0, attn_dropout_rate=0.0)


def check(arrays, place, runner, *, packed=False, causal=False, **changes):
    wanted = [name for name in (*PARAMETERS, "attn_mask") if name in arrays]
    config = replace(PLAIN, causal=causal)
    given = dict(arrays, cu_seqlens=starts()) if packed else arrays
    window = changes.get("window_size", (-1, -1))
    if isinstance(window, int):
        window = (window, window)
    out, gradients = runner(given, config, place, wanted, **changes)
    want_out, want = expected(
        {n: a.astype("float64") if a.dtype == "float32" else a for n, a in given.items()},
        causal,
        window,
        changes.get("scale"),
    )
    tolerance = {"float64": 1e-9, "float32": 2e-5}[str(arrays["x"].dtype)]
    np.testing.assert_allclose(out, want_out, atol=tolerance * np.abs(want_out).max(), rtol=0)
    for name in wanted:
        assert gradients[name].shape == arrays[name].shape, name
        limit = tolerance * max(np.abs(want[name]).max(), 1e-2)
        np.testing.assert_allclose(gradients[name], want[name], atol=limit, rtol=0, err_msg=name)


RUNNERS = pytest.mark.parametrize("runner", [run_dygraph, run_static], ids=["dygraph", "static"])


@RUNNERS
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_gradient_of_a_mask(mask, kv_heads, runner, place):
    check(make_arrays(kv_heads, mask), place, runner, causal=kv_heads == 2)


@RUNNERS
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_grouped_heads(kv_heads, dtype, runner, place):
    check(make_arrays(kv_heads, dtype=dtype), place, runner, causal=True)


@RUNNERS
@pytest.mark.parametrize(
    "changes", [{"window_size": 5}, {"window_size": (20, -1)}, {"window_size": (-1, 3)}, {"scale": 0.7}], ids=str
)
@pytest.mark.parametrize("causal", [False, True])
def test_windows_and_scale(changes, causal, runner, place):
    check(make_arrays(), place, runner, causal=causal, **changes)


@RUNNERS
@pytest.mark.parametrize("kv_heads", [2, HEADS])
@pytest.mark.parametrize("changes", [{}, {"window_size": (40, 2)}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(kv_heads, changes, causal, runner, place):
    check(make_arrays(kv_heads, packed=True), place, runner, packed=True, causal=causal, max_seqlen=129, **changes)


@pytest.mark.usefixtures("needs_paddle")
def test_the_longest_sequence_is_found(place):
    check(make_arrays(packed=True), place, run_dygraph, packed=True)


NAMES = (*PARAMETERS, "attn_mask")


def forward_in_window(tensors):
    """Of the module: on Paddle 2.6 to_static knows no names of a function around it."""
    return call(dict(zip(NAMES, tensors)), PLAIN, window_size=9)


def test_full_graph(place):
    """to_static gives dygraph's bits, the mask's gradient among them."""
    arrays = make_arrays(2, MASKS[1])
    results = []
    for function in (forward_in_window, paddle.jit.to_static(forward_in_window, full_graph=True)):
        tensors = [paddle.to_tensor(arrays[name], place=place, stop_gradient=False) for name in NAMES]
        out = function(tensors)
        out.backward(paddle.to_tensor(arrays["d_out"], place=place))
        results.append([out.numpy(), *[tensor.grad.numpy() for tensor in tensors]])
    for a, b in zip(*results):
        assert np.array_equal(a, b)


def test_a_constant_mask_costs_no_operator(place):
    """A program whose mask is constant has the operator that saved programs know."""
    arrays = make_arrays(mask=MASKS[2])
    types = {}
    for stops in (True, False):
        with static_mode():
            main = paddle.static.Program()
            with paddle.static.program_guard(main, paddle.static.Program()):
                variables = {n: paddle.static.data(n, a.shape, "float64") for n, a in arrays.items() if n != "d_out"}
                variables["attn_mask"].stop_gradient = stops
                call(variables, PLAIN)
            types[stops] = "custom_fused_attention_general" in str(main)
    assert types == {True: False, False: True}


def test_dropout_of_packed_sequences(place):
    """Its masks are those of the sequences as a batch."""
    arrays = make_arrays()
    rates = replace(PLAIN, attn_dropout_rate=0.3, seed=5)
    whole = run_dygraph(arrays, rates, place)[0]
    packed = {n: a.reshape([-1, WIDTH]) if n in ("x", "d_out") else a for n, a in arrays.items()}
    packed["cu_seqlens"] = np.array([0, SEQ_LEN, 2 * SEQ_LEN], "int32")
    out = run_dygraph(packed, rates, place, max_seqlen=SEQ_LEN)[0]
    assert np.array_equal(out.reshape(whole.shape), whole)


def refused(arrays, **changes):
    tensors = {n: paddle.to_tensor(a, place=paddle.CPUPlace()) for n, a in arrays.items() if n != "d_out"}
    return fused_multi_head_attention(**tensors, **changes)


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"scale": float("nan")}, ValueError, "scale: expected"),
        ({"scale": "big"}, TypeError, "scale: expected"),
        ({"window_size": -2}, ValueError, "window_size: expected"),
        ({"window_size": (1, 2, 3)}, TypeError, "window_size: expected"),
        ({"window_size": 1.5}, TypeError, "window_size: expected"),
        ({"max_seqlen": 7}, ValueError, "max_seqlen: expected None without cu_seqlens"),
        ({"cu_seqlens": [0, 70]}, TypeError, "cu_seqlens: expected a Tensor"),
    ],
    ids=str,
)
def test_bad_arguments(changes, error, words):
    with pytest.raises(error, match=words):
        refused(make_arrays(), **changes)


@pytest.mark.parametrize(
    "values, words",
    [
        ([1, TOKENS], "a first value of 0"),
        ([0, 80, 70, TOKENS], "ascending values"),
        ([0, 100, TOKENS - 1], "a last value that is the number of tokens"),
        ([0, TOKENS], "no sequence longer than max_seqlen = 129"),
        ([], "shape \\[batch \\+ 1\\]"),
    ],
    ids=str,
)
def test_bad_borders(values, words):
    arrays = make_arrays(packed=True)
    arrays["cu_seqlens"] = np.array(values, "int32")
    with pytest.raises(ValueError, match=f"cu_seqlens: expected {words}"):
        refused(arrays, max_seqlen=129)
    arrays["cu_seqlens"] = starts().astype("int64")
    with pytest.raises(TypeError, match="cu_seqlens: expected int32"):
        refused(arrays, max_seqlen=129)


def test_bad_packed_shapes():
    arrays = make_arrays(packed=True, mask=MASKS[2])
    arrays["cu_seqlens"] = starts()
    with pytest.raises(ValueError, match="attn_mask: expected none with cu_seqlens"):
        refused(arrays, max_seqlen=129)
    arrays = dict(make_arrays(), cu_seqlens=starts())
    with pytest.raises(ValueError, match="x: expected shape \\[tokens, embed_dim\\]"):
        refused(arrays, max_seqlen=129)


@pytest.mark.parametrize("heads", [5, 7, 10, 13], ids=str)
def test_bad_groups(heads):
    arrays = make_arrays()
    arrays["qkv_weight"] = np.zeros((heads, HEAD_DIM, WIDTH))
    arrays["qkv_bias"] = np.zeros((heads, HEAD_DIM))
    with pytest.raises(ValueError, match="qkv_weight: expected shape \\[num_heads \\+ 2 \\* num_kv_heads"):
        refused(arrays)
