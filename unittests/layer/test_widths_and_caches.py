"""The layer with keys and values of other widths, fewer heads of these, windows, attention weights and caches: against
paddle.nn.MultiHeadAttention, and against the function."""

import common
import numpy as np
import paddle
import pytest
import reference
from blocks import DTYPES, as_float, composed_attention
from paddle import nn
from paddle_fused_attention import FusedMultiHeadAttention, ParallelFusedMultiHeadAttention, fused_multi_head_attention
from runners import static_mode

BATCH, SEQ, KEYS, HEADS, EMBED = 2, 5, 9, 4, 24
HEAD_DIM = EMBED // HEADS
WIDTHS = [(EMBED, EMBED), (16, 16), (EMBED, 10), (40, EMBED), (7, 11)]
Cache, StaticCache = nn.MultiHeadAttention.Cache, nn.MultiHeadAttention.StaticCache


def draw(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def tensor(*shape, seed=0, dtype="float64"):
    return paddle.to_tensor(draw(*shape, seed=seed, dtype=dtype), stop_gradient=False)


def close(name, actual, expected, dtype="float64"):
    common.check_tensor(name, actual.numpy(), expected.numpy(), dtype)


def attention(kdim=None, vdim=None, need_weights=False, dropout=0.0, dtype="float64", bias_attr=None):
    layer = nn.MultiHeadAttention(EMBED, HEADS, dropout, kdim, vdim, need_weights, bias_attr=bias_attr)
    layer.to(dtype=dtype)
    for seed, p in enumerate(layer.parameters()):
        p.set_value(p.numpy() + 0.2 * draw(*p.shape, seed=seed, dtype=dtype))
    return layer


def fused(layer, **others):
    """The same without layer norm and residual."""
    return FusedMultiHeadAttention.from_multi_head_attention(layer, add_residual=False, **others)


def results_of(layer, inputs, *others):
    found = layer(*inputs, *others)
    out, *more = found if isinstance(found, tuple) else (found,)
    out.backward(tensor(*out.shape, seed=9, dtype=str(inputs[0].dtype).split(".")[-1]))
    gradients = [t.grad for t in inputs]
    for t in inputs:
        t.clear_grad()
    return [out, *more, *gradients]


@pytest.mark.parametrize("bias_attr", [None, False])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kdim, vdim", WIDTHS)
def test_widths_and_weights(kdim, vdim, need_weights, bias_attr):
    """Results, attention weights and every gradient are those of Paddle's layer."""
    layer = attention(kdim, vdim, need_weights, bias_attr=bias_attr)
    ours = fused(layer)
    assert (ours.qkv_weight is None) == (kdim != EMBED or vdim != EMBED)
    mask = paddle.to_tensor(draw(BATCH, 1, SEQ, KEYS, seed=5))
    inputs = [
        tensor(BATCH, n, width, seed=i) for i, (n, width) in enumerate(((SEQ, EMBED), (KEYS, kdim), (KEYS, vdim)))
    ]
    expected, actual = results_of(layer, inputs, mask), results_of(ours, inputs, mask)
    assert len(expected) == len(actual) == 4 + need_weights
    for i, (found, wanted) in enumerate(zip(actual, expected)):
        close(f"result {i}", found, wanted)
    back, _ = ours.to_multi_head_attention()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    for name, p in back.named_parameters():
        assert np.array_equal(p.numpy(), dict(layer.named_parameters())[name].numpy()), name
    if ours.qkv_weight is None:
        for ours_name, name in (("q_weight", "q_proj"), ("k_weight", "k_proj"), ("v_weight", "v_proj")):
            close(ours_name, getattr(ours, ours_name).grad, gradients[f"{name}.weight"])
    close("linear_weight", ours.linear_weight.grad, gradients["out_proj.weight"])


def test_gradients_of_weights():
    """Those that want to be differentiated."""
    layer = attention(need_weights=True)
    ours = fused(layer)
    found = []
    for call in (layer, ours):
        x = tensor(BATCH, SEQ, EMBED)
        call(x)[1][:, :, 0].square().sum().backward()
        found.append(x.grad)
    close("x", found[1], found[0])


def test_dropout_beside_weights():
    """The weights are those after dropout, by which the values were multiplied."""
    ours = fused(attention(need_weights=True, dropout=0.5, bias_attr=False))
    x = tensor(BATCH, SEQ, EMBED)
    out, weights = ours(x)
    dropped = float((weights == 0).astype("float64").mean())
    assert 0.2 < dropped < 0.8
    value = paddle.matmul(x, ours.qkv_weight[2].flatten(0, 1), transpose_y=True)
    value = value.reshape([BATCH, SEQ, HEADS, HEAD_DIM]).transpose([0, 2, 1, 3])
    mixed = paddle.matmul(weights, value).transpose([0, 2, 1, 3]).flatten(2)
    close("out", out, paddle.matmul(mixed, ours.linear_weight))


def test_weights_change_nothing_else():
    """The result and what is drawn are the same, in training too."""
    ours = fused(attention(dropout=0.5))
    x, key = tensor(BATCH, SEQ, EMBED), tensor(BATCH, KEYS, EMBED, seed=3)
    for keys in ((), (key, key)):
        found = []
        for needs in (False, True):
            ours.need_weights = needs
            paddle.seed(7)
            results = ours(x, *keys)
            found.append((results[0] if needs else results, paddle.rand([1]).item()))
        close("out", found[1][0], found[0][0])
        assert found[1][1] == found[0][1]


def test_weights_of_packed_sequences_are_refused():
    ours = fused(attention(need_weights=True))
    starts = paddle.to_tensor([0, 3, SEQ], "int32")
    with pytest.raises(NotImplementedError, match="need_weights: expected none beside cu_seqlens"):
        ours(tensor(SEQ, EMBED), cu_seqlens=starts, max_seqlen=SEQ)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("width", [16, EMBED])
def test_other_widths_in_other_dtypes(width, dtype):
    ours = fused(attention(width, width, dtype="float32"))
    ours.to(dtype=dtype)
    tensors = [tensor(BATCH, n, w, seed=n, dtype="float32").astype(dtype) for n, w in ((SEQ, EMBED), (KEYS, width))]
    out = ours(tensors[0], tensors[1], tensors[1])
    assert out.dtype == tensors[0].dtype
    separate, _ = ours.to_multi_head_attention()
    values = [as_float(t) for t in (*tensors, *separate.parameters())]

    def compute(values, r):
        query, key, *parameters = values
        return composed_attention(query, key, list(zip(parameters[::2], parameters[1::2])), HEADS, r)

    peer = compute(values, lambda a: reference.round_to(a, dtype)) if dtype in DTYPES else None
    expected = compute([a.astype("float64") for a in values], lambda a: a)
    common.check_tensor("out", as_float(out), expected, dtype, peer)


def test_a_float32_query_beside_16_bit_projections():
    ours = fused(attention(16, 16, dtype="float32"))
    ours.to(dtype="bfloat16")
    x, key = tensor(BATCH, SEQ, EMBED, dtype="float32"), tensor(BATCH, KEYS, 16, dtype="float32")
    out = ours(x, key, key)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == key.grad.dtype == paddle.float32


@pytest.mark.parametrize("graph", ["full_graph", "program"])
@pytest.mark.parametrize("kdim, vdim, need_weights", [(16, 16, False), (EMBED, 10, True), (EMBED, EMBED, True)])
def test_graphs(kdim, vdim, need_weights, graph, tmp_path):
    ours = fused(attention(kdim, vdim, need_weights, dtype="float32"))
    ours.eval()
    arrays = [
        draw(BATCH, n, w, seed=i, dtype="float32")
        for i, (n, w) in enumerate(((SEQ, EMBED), (KEYS, kdim), (KEYS, vdim)))
    ]
    expected = ours(*map(paddle.to_tensor, arrays))
    expected = expected if need_weights else [expected]
    if graph == "full_graph":
        static = paddle.jit.to_static(ours, full_graph=True)
        found = static(*map(paddle.to_tensor, arrays))
        found = [t.numpy() for t in (found if need_weights else [found])]
    else:
        state = {name: p.numpy() for name, p in ours.state_dict().items()}
        with static_mode():
            main, startup = paddle.static.Program(), paddle.static.Program()
            with paddle.static.program_guard(main, startup):
                names = ("query", "key", "value")
                variables = [
                    paddle.static.data(name, [-1, -1, a.shape[-1]], "float32") for name, a in zip(names, arrays)
                ]
                static = FusedMultiHeadAttention(
                    EMBED,
                    HEADS,
                    0.0,
                    0.0,
                    kdim,
                    vdim,
                    need_weights=need_weights,
                    final_layer_norm=False,
                    add_residual=False,
                )
                static.eval()
                results = static(*variables)
            executor = paddle.static.Executor(paddle.CPUPlace())
            executor.run(startup)
            static.set_state_dict(state)
            fetched = list(results) if need_weights else [results]
            found = executor.run(main, feed=dict(zip(names, arrays)), fetch_list=fetched)
    for actual, wanted in zip(found, expected):
        common.check_tensor("result", actual.astype("float64"), wanted.numpy().astype("float64"), "float32")


def test_parameters_begin_as_separate_ones():
    """Xavier's bounds are those of each weight [width, columns]."""
    paddle.seed(1)
    layer = FusedMultiHeadAttention(64, 4, kdim=16, vdim=256, num_kv_heads=2)
    for name, fans in (("q_weight", 64 + 64), ("k_weight", 16 + 32), ("v_weight", 256 + 32), ("linear_weight", 128)):
        bound = (6 / fans) ** 0.5
        assert 0.9 * bound < float(getattr(layer, name).abs().max()) <= bound, name
    grouped = FusedMultiHeadAttention(64, 4, num_kv_heads=1)
    for part, columns in ((grouped.qkv_weight[:4], 64), (grouped.qkv_weight[4:], 16)):
        bound = (6 / (64 + columns)) ** 0.5
        assert 0.9 * bound < float(part.abs().max()) <= bound
    array = draw(64, 16)
    assigned = FusedMultiHeadAttention(
        64, 4, kdim=64, vdim=16, weight_attr=nn.initializer.Constant(0.5), bias_attr=nn.initializer.Constant(0.25)
    )
    assert all(float(p.min()) == float(p.max()) == 0.5 for p in (assigned.q_weight, assigned.v_weight))
    assert all(float(p.min()) == float(p.max()) == 0.25 for p in (assigned.q_bias, assigned.v_bias, assigned.ln_bias))
    with pytest.raises(ValueError, match="weight_attr: expected an array of shape"):
        FusedMultiHeadAttention(64, 4, weight_attr=nn.initializer.Assign(array))


@pytest.mark.parametrize(
    "others", [{}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "window_size": (2, 1)}, {"scale": 0.3}]
)
def test_settings_are_the_function_s(others):
    layer = FusedMultiHeadAttention(EMBED, HEADS, 0.0, 0.0, causal=True, **others)
    layer.to(dtype="float64")
    x = tensor(BATCH, SEQ, EMBED)
    given = {name: others[name] for name in ("window_size", "scale") if name in others}
    expected = fused_multi_head_attention(
        x,
        layer.qkv_weight,
        layer.linear_weight,
        ln_scale=layer.ln_scale,
        ln_bias=layer.ln_bias,
        qkv_bias=layer.qkv_bias,
        linear_bias=layer.linear_bias,
        dropout_rate=0.0,
        attn_dropout_rate=0.0,
        causal=True,
        **given,
    )
    assert np.array_equal(layer(x).numpy(), expected.numpy())
    # Composed of the smaller operators: another tensor of the same values.
    close("composed", layer(x, x * 1.0, x * 1.0), expected)
    assert all(f"{name}=" in repr(layer) for name in others)
    again = FusedMultiHeadAttention(**layer._settings())
    again.to(dtype="float64")
    again.set_state_dict(layer.state_dict())
    assert np.array_equal(again(x).numpy(), layer(x).numpy()) or layer.dropout_rate
    if others:
        with pytest.raises(ValueError, match="to_multi_head_attention: expected a layer without"):
            layer.to_multi_head_attention()


@pytest.mark.parametrize("need_weights", [False, True])
def test_generation_step_by_step(need_weights):
    """The same results and caches as Paddle's layer; a causal layer needs no mask for them."""
    layer = attention(need_weights=need_weights)
    ours, causal = fused(layer), fused(layer, causal=True)
    x = tensor(BATCH, SEQ, EMBED)
    mask = paddle.tril(paddle.ones([SEQ, SEQ], "bool"))
    caches = [one.gen_cache(x) for one in (layer, ours, causal)]
    assert all(type(cache) is Cache and cache.k.shape == [BATCH, HEADS, 0, HEAD_DIM] for cache in caches)
    for start, stop in ((0, 2), (2, 3), (3, SEQ)):
        step = x[:, start:stop]
        # Paddle adds (mask - 1) * 1e9; ours hides.
        expected = layer(step, attn_mask=mask[start:stop, :stop], cache=caches[0])
        actual = ours(step, attn_mask=mask[start:stop, :stop], cache=caches[1])
        without = causal(step, cache=caches[2])
        assert len(expected) == len(actual) == 2 + need_weights
        for found, plain, wanted in zip(actual[:-1], without[:-1], expected[:-1]):
            close("result", found, wanted)
            close("causal", plain, wanted)
        caches = [expected[-1], actual[-1], without[-1]]
        for cache in caches[1:]:
            close("keys", cache.k, caches[0].k)
            close("values", cache.v, caches[0].v)


@pytest.mark.parametrize("kdim, vdim", [(EMBED, EMBED), (16, 10)])
def test_static_caches(kdim, vdim):
    layer = attention(kdim, vdim)
    ours = fused(layer)
    key, value = tensor(BATCH, KEYS, kdim), tensor(BATCH, KEYS, vdim)
    expected, cache = layer.gen_cache(key, value, StaticCache), ours.gen_cache(key, value, StaticCache)
    assert type(cache) is StaticCache
    close("keys", cache.k, expected.k)
    close("values", cache.v, expected.v)
    x = tensor(BATCH, SEQ, EMBED)
    out, same = ours(x, cache=cache)
    assert same.k is cache.k and same.v is cache.v
    close("out", out, layer(x, key, value))
    given = ours.gen_cache(cache.k, cache.v)
    assert type(given) is Cache and given.k is cache.k and given.v is cache.v


def test_caches_normalise_as_the_layer_does():
    layer = FusedMultiHeadAttention(EMBED, HEADS, 0.0, 0.0, normalize_before=True, num_kv_heads=2)
    layer.to(dtype="float64")
    layer.pre_ln_scale.set_value(draw(EMBED, seed=3))
    x, key = tensor(BATCH, SEQ, EMBED), tensor(BATCH, KEYS, EMBED, seed=1)
    cache = layer.gen_cache(key, None, StaticCache)
    assert cache.k.shape == [BATCH, 2, KEYS, HEAD_DIM]
    close("out", layer(x, cache=cache)[0], layer(x, key, key))
    whole = layer(x, attn_mask=paddle.tril(paddle.ones([SEQ, SEQ], "bool")))
    first, cache = layer(x[:, :3], attn_mask=paddle.tril(paddle.ones([3, 3], "bool")), cache=layer.gen_cache(x))
    mask = paddle.tril(paddle.ones([SEQ, SEQ], "bool"))[3:]
    second, _ = layer(x[:, 3:], attn_mask=mask, cache=cache)
    close("steps", paddle.concat([first, second], 1), whole)


def test_detection_transformers():
    """query = key = x + position, value = x: as Paddle's layer, with two products for the three projections."""
    layer = attention()
    ours = fused(layer)
    x, position = tensor(BATCH, SEQ, EMBED), tensor(1, SEQ, EMBED, seed=1)
    found = []
    for call in (layer, ours):
        q = x + position
        out = call(q, q, x)
        out.sum().backward()
        found.append((out, x.grad, position.grad))
        x.clear_grad()
        position.clear_grad()
    for actual, wanted in zip(found[1], found[0]):
        close("result", actual, wanted)


BAD_CACHES = [
    (lambda: 3, TypeError, "cache:"),
    (lambda: (paddle.zeros([1]), paddle.zeros([1])), TypeError, "cache:"),
    (lambda: Cache(None, paddle.zeros([BATCH, HEADS, 1, HEAD_DIM], "float64")), TypeError, "cache.k:"),
    (lambda: Cache(*[paddle.zeros([BATCH, HEADS, HEAD_DIM], "float64")] * 2), ValueError, "cache.k:"),
    (lambda: Cache(*[paddle.zeros([BATCH, HEADS + 1, 1, HEAD_DIM], "float64")] * 2), ValueError, "cache.k:"),
    (lambda: Cache(*[paddle.zeros([BATCH + 1, HEADS, 1, HEAD_DIM], "float64")] * 2), ValueError, "cache.k:"),
    (lambda: Cache(*[paddle.zeros([BATCH, HEADS, 1, HEAD_DIM], "float32")] * 2), TypeError, "cache.k:"),
    (
        lambda: StaticCache(*[paddle.zeros([BATCH, HEADS, n, HEAD_DIM], "float64") for n in (3, 4)]),
        ValueError,
        "cache.v:",
    ),
]


@pytest.mark.parametrize("cache, error, start", BAD_CACHES, ids=lambda v: "")
def test_bad_caches(cache, error, start):
    ours = fused(attention())
    with pytest.raises(error) as raised:
        ours(tensor(BATCH, SEQ, EMBED), cache=cache())
    assert str(raised.value).startswith(start), raised.value


def test_bad_arguments_of_gen_cache():
    ours = fused(attention(16, 16))
    key = tensor(BATCH, KEYS, 16)
    for arguments, error, start in (
        ((None,), TypeError, "key:"),
        ((key, 3), TypeError, "value:"),
        ((key, key, dict), TypeError, "type:"),
        ((tensor(BATCH, KEYS, 17), None, StaticCache), ValueError, "key:"),
        ((key, tensor(BATCH, KEYS + 1, 16), StaticCache), ValueError, "value:"),
        ((key.astype("float32"), None, StaticCache), TypeError, "key:"),
    ):
        with pytest.raises(error) as raised:
            ours.gen_cache(*arguments)
        assert str(raised.value).startswith(start), raised.value


def test_bad_keys_of_other_widths():
    ours = fused(attention(16, 10))
    x, key, value = tensor(BATCH, SEQ, EMBED), tensor(BATCH, KEYS, 16), tensor(BATCH, KEYS, 10)
    for arguments, error, start in (
        ((x,), ValueError, "key:"),
        ((x, key), ValueError, "value:"),
        ((tensor(BATCH, SEQ, 16), key, value), ValueError, "query:"),
        ((x, tensor(BATCH, KEYS, 17), value), ValueError, "key:"),
        ((x, key, tensor(BATCH, KEYS, 16)), ValueError, "value:"),
        ((x, key, tensor(BATCH, KEYS + 1, 10)), ValueError, "value:"),
        ((x, tensor(BATCH + 1, KEYS, 16), value), ValueError, "key:"),
        ((x, key.astype("float32"), value), TypeError, "key:"),
        ((x, key, value.astype("int64")), TypeError, "value:"),
        ((x.astype("float32"), key, value), TypeError, "query:"),
    ):
        with pytest.raises(error) as raised:
            ours(*arguments)
        assert str(raised.value).startswith(start), raised.value


def test_what_spread_layers_refuse():
    for argument, value in (("kdim", 16), ("vdim", 16), ("need_weights", True)):
        with pytest.raises(NotImplementedError, match=f"{argument}: expected"):
            ParallelFusedMultiHeadAttention(EMBED, HEADS, **{argument: value})
    with pytest.raises(NotImplementedError, match="layer: expected as many heads of keys"):
        ParallelFusedMultiHeadAttention.from_full(FusedMultiHeadAttention(EMBED, HEADS, num_kv_heads=2))
    layer = ParallelFusedMultiHeadAttention(EMBED, HEADS, 0.0, 0.0, window_size=1, scale=0.5)
    x = tensor(BATCH, SEQ, EMBED, dtype="float32")
    with pytest.raises(NotImplementedError, match="cache: expected None where heads are spread"):
        layer(x, cache=Cache(*[paddle.zeros([BATCH, HEADS, 1, HEAD_DIM])] * 2))
    with pytest.raises(NotImplementedError, match="gen_cache: expected a layer whose heads"):
        layer.gen_cache(x)
    common.check_tensor("out", layer(x).numpy(), layer.to_full()(x).numpy(), "float32")
