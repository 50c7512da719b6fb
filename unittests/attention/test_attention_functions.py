"""The functions with Paddle's signatures: each against float64 in every graph mode, and against Paddle's own where that
runs on the CPU.
"""

import inspect

import attention_reference
import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from attention_cases import FEATURES, FULL, LENGTHS, differentiable, make_inputs, stored
from graphs import GRAPHS, check_case, run
from paddle.incubate.nn import attn_bias as biases
from paddle.incubate.nn import memory_efficient_attention as paddle_memory_efficient
from paddle_fused_attention import functional
from paddle_fused_attention.functional import (
    flash_attention,
    flash_attn_qkvpacked,
    flash_attn_unpadded,
    flash_attn_varlen_qkvpacked,
    flashmask_attention,
    memory_efficient_attention,
    scaled_dot_product_attention,
)

VERSION = tuple(map(int, paddle.__version__.split(".")[:2]))
DROPOUT = {"dropout_rate": 0.3, "seed": 6}


def first(call):
    """The first of a pair that a function returns, whose second is None."""

    def of_pair(tensors):
        out, softmax = call(tensors)
        assert softmax is None
        return out

    return of_pair


# What each function is to compute, in the reference's words, and how it is called.
CALLS = {
    "sdpa": (
        FULL.but(heads=4, keys=11, mask="B1QK", **DROPOUT),
        lambda t: scaled_dot_product_attention(**t, dropout_p=0.3, seed=6),
    ),
    "sdpa, scale": (FULL.but(scale=0.5), lambda t: scaled_dot_product_attention(**t, scale=0.5)),
    "sdpa, causal": (
        FULL.but(queries=19, keys=19, mask="BHQK", causal=True),
        lambda t: scaled_dot_product_attention(**t, is_causal=True),
    ),
    "sdpa, window": (
        FULL.but(queries=19, keys=30, window_left=4, window_right=2),
        lambda t: scaled_dot_product_attention(**t, window_size=(4, 2)),
    ),
    "sdpa, evaluation": (FULL, lambda t: scaled_dot_product_attention(**t, dropout_p=0.5, training=False)),
    "flash": (
        FULL.but(heads=4, queries=9, keys=20, causal=True, scale=0.7, **DROPOUT),
        first(lambda t: flash_attention(**t, dropout=0.3, causal=True, softmax_scale=0.7, seed=6)),
    ),
    "flash, window": (
        FULL.but(queries=19, keys=30, window_left=5, window_right=5),
        first(lambda t: flash_attention(**t, window_size=5)),
    ),
    "unpadded": (
        FULL.but(lengths=LENGTHS, heads=4, causal=True, scale=0.6, **DROPOUT),
        first(
            lambda t: flash_attn_unpadded(
                **t, max_seqlen_q=19, max_seqlen_k=64, scale=0.6, dropout=0.3, causal=True, seed=6
            )
        ),
    ),
    "unpadded, window": (
        FEATURES["packed, window"],
        first(lambda t: flash_attn_unpadded(**t, max_seqlen_q=19, max_seqlen_k=19, scale=None, window_size=(4, 1))),
    ),
    "flashmask": (
        FULL.but(ranges=1, causal=True, queries=21, keys=21, scale=0.9, **DROPOUT),
        lambda t: flashmask_attention(**t, causal=True, dropout=0.3, softmax_scale=0.9, seed=6),
    ),
    "flashmask, 4": (
        FULL.but(ranges=4, range_heads=2, heads=4, queries=21, keys=21),
        lambda t: flashmask_attention(**t),
    ),
    "flashmask, none": (FULL, lambda t: flashmask_attention(**t)),
    "flashmask, window": (
        FULL.but(queries=21, keys=21, window_left=3, window_right=1),
        lambda t: flashmask_attention(**t, window_size=(3, 1)),
    ),
    "flashmask, causal window": (
        FULL.but(queries=21, keys=21, causal=True, window_left=3),
        lambda t: flashmask_attention(**t, causal=True, window_size=3),
    ),
    "memory_efficient": (
        FULL.but(scale=0.4, heads=4, **DROPOUT),
        lambda t: memory_efficient_attention(**t, p=0.3, scale=0.4, seed=6),
    ),
    "memory_efficient, bias": (
        FULL.but(mask="BHQK", keys=9),
        lambda t: memory_efficient_attention(t["query"], t["key"], t["value"], t["attn_mask"]),
    ),
    "memory_efficient, triangle": (
        FULL.but(queries=9, keys=9, causal=True),
        lambda t: memory_efficient_attention(**t, attn_bias=biases.LowerTriangularMask()),
    ),
    "memory_efficient, triangle and bias": (
        FULL.but(queries=9, keys=9, causal=True, mask="BHQK"),
        lambda t: memory_efficient_attention(
            t["query"], t["key"], t["value"], biases.LowerTriangularMask().add_bias(t["attn_mask"])
        ),
    ),
}


@GRAPHS
@pytest.mark.parametrize("name", CALLS)
def test_functions(name, graph, place):
    case, function = CALLS[name]
    check_case(case, place, graph, function)


@pytest.mark.parametrize("queries, keys", [(5, 9), (9, 5), (1, 6), (6, 1)])
@pytest.mark.parametrize("unknown", [(), (1,)], ids=["known", "unknown"])
@GRAPHS
@pytest.mark.usefixtures("needs_paddle")
def test_causal_from_the_start(graph, unknown, queries, keys, place):
    """Where there are more keys than queries, or fewer, query i of scaled_dot_product_attention and of a triangular
    mask sees the keys up to i."""
    if unknown and graph != "program":
        return
    case = FULL.but(queries=queries, keys=keys, mask="BHQK", heads=4)
    inputs = make_inputs(case)
    hidden = np.triu(np.full((queries, keys), -np.inf), 1)
    arrays = {n: a for n, a in inputs.items() if n != "d_out"}
    arrays["attn_mask"] = arrays["attn_mask"] + hidden
    expected = attention_reference.forward(arrays, case.config)
    gradients = attention_reference.backward(arrays, case.config, inputs["d_out"])
    triangle = biases.LowerTriangularMask()
    for function in (
        lambda t: scaled_dot_product_attention(**t, is_causal=True),
        lambda t: memory_efficient_attention(t["query"], t["key"], t["value"], triangle.add_bias(t["attn_mask"])),
    ):
        wanted = differentiable(inputs)
        out, found = run(graph, function, stored(case, inputs), wanted, place, unknown)
        np.testing.assert_allclose(out, expected, atol=1e-12)
        for name in wanted:
            np.testing.assert_allclose(found[name], gradients[name], atol=1e-12)


@GRAPHS
@pytest.mark.usefixtures("needs_paddle")
def test_without_a_batch(graph, place):
    case = FULL.but(batch=1, keys=9, heads=4)
    inputs = make_inputs(case)
    arrays = {name: a[0] for name, a in stored(case, inputs).items()}
    out, found = run(graph, lambda t: scaled_dot_product_attention(**t), arrays, ["query", "key", "value"], place)
    np.testing.assert_allclose(out, attention_reference.forward(inputs, case.config)[0], atol=1e-12)
    for name, gradient in attention_reference.backward(inputs, case.config, inputs["d_out"]).items():
        np.testing.assert_allclose(found[name], gradient[0], atol=1e-12)


def packed_qkv(inputs):
    """[..., group + 2, num_kv_heads, head_dim] of query, key and value."""
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    heads, kv_heads = query.shape[-2], key.shape[-2]
    query = query.reshape(*query.shape[:-2], heads // kv_heads, kv_heads, query.shape[-1])
    return np.concatenate([query, key[..., None, :, :], value[..., None, :, :]], axis=-3)


def check_packed(case, function, inputs, arrays, graph, place):
    gradients = attention_reference.backward(inputs, case.config, inputs["d_out"])
    out, found = run(graph, function, arrays, ["qkv"], place)
    np.testing.assert_allclose(out, attention_reference.forward(inputs, case.config), atol=1e-12)
    np.testing.assert_allclose(found["qkv"], packed_qkv(gradients), atol=1e-12)


@GRAPHS
@pytest.mark.usefixtures("needs_paddle")
@pytest.mark.parametrize("heads", [2, 6])
def test_qkvpacked(heads, graph, place):
    case = FULL.but(heads=heads, queries=9, keys=9, causal=True, scale=0.3, **DROPOUT)
    inputs = make_inputs(case)
    arrays = {"qkv": packed_qkv(inputs), "d_out": inputs["d_out"]}
    function = first(lambda t: flash_attn_qkvpacked(t["qkv"], 0.3, True, scale=0.3, seed=6))
    check_packed(case, function, inputs, arrays, graph, place)


@GRAPHS
@pytest.mark.usefixtures("needs_paddle")
@pytest.mark.parametrize("heads", [2, 6])
def test_varlen_qkvpacked(heads, graph, place):
    case = FULL.but(lengths=LENGTHS, heads=heads, causal=True, scale=0.3, **DROPOUT)
    inputs = make_inputs(case)
    arrays = {"qkv": packed_qkv(inputs), **{n: inputs[n] for n in ("cu_seqlens_q", "cu_seqlens_k", "d_out")}}
    function = first(
        lambda t: flash_attn_varlen_qkvpacked(
            t["qkv"], t["cu_seqlens_q"], t["cu_seqlens_k"], 19, 19, 0.3, 0.3, True, varlen_padded=False, seed=6
        )
    )
    check_packed(case, function, inputs, arrays, graph, place)


@GRAPHS
@pytest.mark.usefixtures("needs_paddle")
@pytest.mark.parametrize("unknown", [(), (0,)], ids=["known", "unknown"])
def test_varlen_qkvpacked_with_padding(unknown, graph, place):
    """Padding gives zeros and gets zero gradients, whatever it holds."""
    if unknown and graph != "program":
        return
    case = FULL.but(lengths=LENGTHS, heads=4, causal=True, dropout_rate=0.3, seed=6)
    inputs = make_inputs(case)
    longest = 19
    used = np.concatenate([np.arange(b * longest, b * longest + n) for b, (n, _) in enumerate(LENGTHS)])

    def padded(a, fill):
        whole = np.full((len(LENGTHS) * longest, *a.shape[1:]), fill)
        whole[used] = a
        return whole

    arrays = {n: inputs[n] for n in ("cu_seqlens_q", "cu_seqlens_k")}
    arrays.update(qkv=padded(packed_qkv(inputs), np.nan), d_out=padded(inputs["d_out"], np.nan))
    function = first(
        lambda t: flash_attn_varlen_qkvpacked(
            t["qkv"], t["cu_seqlens_q"], t["cu_seqlens_k"], longest, longest, None, 0.3, True, seed=6
        )
    )
    out, found = run(graph, function, arrays, ["qkv"], place, unknown)
    gradients = attention_reference.backward(inputs, case.config, inputs["d_out"])
    np.testing.assert_allclose(out, padded(attention_reference.forward(inputs, case.config), 0.0), atol=1e-12)
    np.testing.assert_allclose(found["qkv"], padded(packed_qkv(gradients), 0.0), atol=1e-12)


@pytest.mark.usefixtures("needs_paddle")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_padding_in_every_dtype(dtype, place):
    qkv = paddle.cast(paddle.to_tensor(np.ones((8, 3, 2, 4), "float32"), place=place), dtype)
    starts = paddle.to_tensor(np.array([0, 3, 4], "int32"), place=place)
    qkv.stop_gradient = False
    out, _ = flash_attn_varlen_qkvpacked(qkv, starts, starts, 4, 4, None)
    assert out.dtype == qkv.dtype
    np.testing.assert_allclose(out.astype("float32")[:, 0, 0].numpy(), [1, 1, 1, 0, 1, 0, 0, 0], rtol=1e-6)
    out.astype("float32").sum().backward()
    assert qkv.grad.dtype == qkv.dtype
    np.testing.assert_allclose(qkv.grad.astype("float32")[:, 2, 0, 0].numpy(), [1, 1, 1, 0, 1, 0, 0, 0], rtol=1e-2)


@pytest.mark.usefixtures("needs_paddle")
@pytest.mark.parametrize("causal", [False, True])
def test_block_diagonals(causal, place):
    """Sequences in one row of a batch of 1."""
    lengths = LENGTHS if causal else ((5, 9), (1, 17), (6, 2))
    case = FULL.but(lengths=lengths, heads=4, causal=causal)
    inputs = make_inputs(case)
    bias = biases.BlockDiagonalMask.from_seqlens(*(list(side) for side in zip(*lengths)))
    bias = bias.make_causal() if causal else bias
    for info in (bias.q_seqinfo, bias.k_seqinfo):
        info.seqstart = info.seqstart._copy_to(place, True)
    arrays = {n: inputs[n][None] for n in ("query", "key", "value", "d_out")}
    out, found = run(
        "dygraph", lambda t: memory_efficient_attention(**t, attn_bias=bias), arrays, ["query", "key", "value"], place
    )
    np.testing.assert_allclose(out[0], attention_reference.forward(inputs, case.config), atol=1e-12)
    for name, gradient in attention_reference.backward(inputs, case.config, inputs["d_out"]).items():
        np.testing.assert_allclose(found[name][0], gradient, atol=1e-12)


def tensors_of(case):
    arrays = stored(case, make_inputs(case))
    return {
        name: paddle.to_tensor(a, place=paddle.CPUPlace(), stop_gradient=name.startswith("cu"))
        for name, a in arrays.items()
        if name != "d_out"
    }


@pytest.mark.skipif(VERSION < (3, 3), reason="Paddle's own takes no such masks or groups on the CPU before 3.3")
@pytest.mark.parametrize(
    "case, options",
    [
        (FULL.but(keys=11), {}),
        (FULL.but(queries=9, keys=9), {"is_causal": True}),
        (FULL.but(queries=9, keys=5), {"is_causal": True}),
        (FULL.but(queries=5, keys=9), {"is_causal": True}),
        (FULL.but(mask="BHQK"), {"scale": 0.3}),
        (FULL.but(mask="B11K", mask_dtype="bool", heads=6), {}),
        (FULL.but(mask="QK", heads=4), {"dropout_p": 0.5, "training": False}),
    ],
    ids=str,
)
def test_as_paddle_s_own(case, options):
    """Values and gradients on the CPU."""
    results = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        tensors = tensors_of(case.but(dtype="float64"))
        out = function(**tensors, **options)
        paddle.seed(1)
        (out * paddle.randn(out.shape, "float64")).sum().backward()
        gradients = [t.grad.numpy() for t in tensors.values() if t.dtype == paddle.float64]
        results.append([out.numpy(), *gradients])
    for ours, theirs in zip(*results):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


def built_in(name):
    modules = F, inspect.getmodule(F.flash_attention.flash_attention), paddle_memory_efficient
    return next((getattr(m, name) for m in modules if callable(getattr(m, name, None))), None)


NAMES = [name for name in functional.__all__ if not name.startswith("fused")]


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    """Paddle's parameters with their names, order and defaults; what is ours is keyword-only and optional."""
    theirs = built_in(name)
    if theirs is None:
        pytest.skip(f"Paddle {paddle.__version__} has no {name}")
    ours = dict(inspect.signature(getattr(functional, name)).parameters)
    found = inspect.signature(theirs).parameters
    if VERSION >= (3, 3):
        assert list(ours)[: len(found)] == list(found)
    for parameter in found.values():
        if VERSION >= (3, 3):
            assert ours[parameter.name].kind == parameter.kind, parameter.name
        assert ours.pop(parameter.name).default == parameter.default, parameter.name
    if VERSION >= (3, 3):
        assert all(p.kind == p.KEYWORD_ONLY and p.default is None for p in ours.values()), ours
        assert set(ours) <= {"window_size", "seed", "scale"}


def test_two_calls_of_a_program_draw_anew():
    """Equal calls in one graph have masks of their own, and seeds that are given are kept."""
    tensors = tensors_of(FULL.but(dtype="float32", queries=30, keys=30))

    @paddle.jit.to_static(full_graph=True)
    def several(query, key, value):
        free = [scaled_dot_product_attention(query, key, value, None, 0.5) for _ in range(2)]
        return [*free, *(scaled_dot_product_attention(query, key, value, None, 0.5, seed=3) for _ in range(2))]

    free, other, fixed, same = (out.numpy() for out in several(**tensors))
    assert not np.array_equal(free, other) and np.array_equal(fixed, same)


@pytest.mark.parametrize("black", [False, True])
def test_auto_cast(black, monkeypatch):
    """The operator is white-listed by its name; a float32 mask stays, and its gradient is float32. On the CPU Paddle
    switches auto_cast off, which the state of the tracer undoes."""
    from paddle.base.framework import _dygraph_tracer
    from paddle_fused_attention import _amp

    seen = []
    original = _amp.cast_inputs

    def cast_inputs(*arguments):
        seen.extend(original(*arguments))
        return seen

    monkeypatch.setattr(_amp, "cast_inputs", cast_inputs)
    monkeypatch.setattr(_amp, "target_dtype", lambda *_: paddle.float32 if black else paddle.bfloat16)
    assert _dygraph_tracer() is not None
    tensors = tensors_of(FULL.but(dtype="float32", mask="BHQK"))
    out = scaled_dot_product_attention(**tensors)
    wanted = paddle.float32 if black else paddle.bfloat16
    assert out.dtype == wanted and [t.dtype for t in seen[:4]] == [wanted] * 3 + [paddle.float32]
    out.astype("float32").sum().backward()
    assert all(t.grad.dtype == paddle.float32 for t in tensors.values())


def test_stop_gradient():
    """Who gets a gradient in dygraph: nobody under no_grad, and no mask of integers."""
    tensors = tensors_of(FULL.but(mask="BHQK", mask_dtype="int32"))
    for name in ("query", "key", "value"):
        tensors[name].stop_gradient = True
    assert scaled_dot_product_attention(**tensors).stop_gradient
    tensors = tensors_of(FULL.but(mask="BHQK"))
    with paddle.no_grad():
        assert scaled_dot_product_attention(**tensors).stop_gradient
    for name in ("query", "key", "value"):
        tensors[name].stop_gradient = True
    out = scaled_dot_product_attention(**tensors)
    assert not out.stop_gradient
    out.sum().backward()
    assert tensors["attn_mask"].grad is not None and tensors["query"].grad is None


@pytest.mark.skipif(VERSION < (3, 0), reason="Paddle 2.6 has no no_grad in static graphs")
def test_no_grad_in_a_full_graph():
    tensors = tensors_of(FULL.but(dtype="float32"))

    @paddle.jit.to_static(full_graph=True)
    def forward(query, key, value):
        with paddle.no_grad():
            kept = scaled_dot_product_attention(query, key, value)
        return query * kept

    forward(**tensors).sum().backward()
    assert tensors["key"].grad is None or not tensors["key"].grad.numpy().any()
    expected = scaled_dot_product_attention(**tensors).numpy()
    np.testing.assert_allclose(tensors["query"].grad.numpy(), expected, atol=1e-6)
