"""Layers that are given a key and a value: self-attention in whatever form it comes, and other keys and values."""

import common
import numpy as np
import paddle
import pytest
import reference
from blocks import composed_attention
from paddle import nn
from paddle.distributed.fleet.utils import recompute
from paddle_fused_attention import FusedMultiHeadAttention, ParallelFusedMultiHeadAttention, incubate
from paddle_fused_attention._keys import other_keys
from runners import static_mode

BATCH, SEQ, KEYS, HEADS, EMBED = 2, 5, 9, 4, 24

MAKERS = {
    "layer": lambda *rates: FusedMultiHeadAttention(EMBED, HEADS, *rates),
    "pre_norm": lambda *rates: FusedMultiHeadAttention(EMBED, HEADS, *rates, normalize_before=True, causal=True),
    "parallel": lambda *rates: ParallelFusedMultiHeadAttention(EMBED, HEADS, *rates),
    "incubate": lambda *rates: incubate.FusedMultiHeadAttention(EMBED, HEADS, *rates),
    "incubate_flat": lambda *rates: incubate.FusedMultiHeadAttention(
        EMBED, HEADS, *rates, normalize_before=True, transpose_qkv_wb=True
    ),
}


def draw(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def make_layer(kind, *rates):
    layer = MAKERS[kind](*rates or (0.0, 0.0))
    for seed, p in enumerate(layer.parameters()):
        p.set_value(p.numpy() + 0.2 * draw(*p.shape, seed=seed))
    return layer


def close(name, actual, expected, dtype="float32"):
    common.check_tensor(name, np.asarray(actual, np.float64), np.asarray(expected, np.float64), dtype)


def cast_inputs(layer):
    """A hook that makes new tensors of the inputs, as one that casts them does."""
    return layer.register_forward_pre_hook(lambda _, inputs: tuple(tensor * 1.0 for tensor in inputs))


def with_hook(layer, x):
    hook = cast_inputs(layer)
    out = layer(x, x, x)
    hook.remove()
    return out


FORMS = {
    "itself": lambda layer, x: layer(x, x, x),
    "key": lambda layer, x: layer(x, x),
    "value": lambda layer, x: layer(x, None, x),
    "recompute": lambda layer, x: recompute(layer, x, x, x),
    "hook": with_hook,
    "recompute_hook": lambda layer, x: recompute(lambda a, b, c: with_hook_once(layer, a, b, c), x, x, x),
    "recompute_block": lambda layer, x: recompute(lambda h: layer(h, h, h), x),
}


def with_hook_once(layer, *inputs):
    return layer(*(tensor * 1.0 for tensor in inputs))


def trained(layer, form, rates_seed=5):
    """Result, gradients, and what the generator gives next."""
    layer.clear_gradients()
    paddle.seed(rates_seed)
    x = paddle.to_tensor(draw(BATCH, SEQ, EMBED, seed=1), stop_gradient=False)
    out = form(layer, x)
    next_number = paddle.rand([1]).numpy()
    out.backward(paddle.to_tensor(draw(BATCH, SEQ, EMBED, seed=2)))
    found = {name: p.grad.numpy() for name, p in layer.named_parameters()}
    return dict(found, out=out.numpy(), x=x.grad.numpy(), next_number=next_number)


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.4), (0.3, 0.4)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", MAKERS)
def test_self_attention_in_every_form(kind, form, rates):
    """Each is the operator's: result, gradients, dropout, and what is drawn of the generator."""
    layer = make_layer(kind, *rates)
    expected = trained(layer, lambda layer, x: layer(x))
    actual = trained(layer, FORMS[form])
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        close(name, actual[name], wanted)


@pytest.mark.parametrize("kind", MAKERS)
def test_tensors_of_one_array(kind):
    """As the pull request's own test makes them."""
    layer = make_layer(kind)
    array = draw(BATCH, SEQ, EMBED)
    query, key, value = (paddle.to_tensor(array) for _ in range(3))
    assert np.array_equal(layer(query, key, value).numpy(), layer(query).numpy())
    wants = [paddle.to_tensor(array, stop_gradient=False) for _ in range(3)]
    close("out", layer(*wants).numpy(), layer(query).numpy())


def test_long_dropout_masks():
    """Longer than what is asked of the operator at a time."""
    layer = FusedMultiHeadAttention(4, 2, 0.2, 0.3)
    results = []
    for form in (lambda x: layer(x), lambda x: layer(x * 1.0, x * 1.0, x * 1.0)):
        paddle.seed(3)
        results.append(form(paddle.to_tensor(draw(2, 150, 4), stop_gradient=False)).numpy())
    close("out", results[1], results[0])


def test_what_counts_as_the_query():
    x = paddle.to_tensor(draw(BATCH, SEQ, EMBED))
    assert other_keys(x, None, None) is None and other_keys(x, x, None) is None
    assert other_keys(x, x.clone(), x.detach()) is None
    with_nan = draw(BATCH, SEQ, EMBED)
    with_nan[0, 1] = np.nan
    assert other_keys(paddle.to_tensor(with_nan), paddle.to_tensor(with_nan), None) is None
    assert other_keys(x, paddle.to_tensor(with_nan), None) is not None
    other = draw(BATCH, SEQ, EMBED)
    other[-1, -1, -1] += 1
    other = paddle.to_tensor(other)
    assert other_keys(x, None, other) == (x, other) and other_keys(x, other, None) == (other, x)
    for dtype in ("float16", "bfloat16", "float64"):
        assert other_keys(x.astype(dtype), x.astype(dtype), None) is None
        assert other_keys(x.astype(dtype), other.astype(dtype), None) is not None
    assert other_keys(paddle.zeros([0, SEQ, EMBED]), paddle.zeros([0, SEQ, EMBED]), None) is None
    # A transposed tensor shares its memory with another that it does not equal.
    square = paddle.to_tensor(draw(SEQ, SEQ, SEQ))
    assert other_keys(square, square.transpose([1, 0, 2]), None) is not None


def test_tensors_that_want_their_own_gradients_are_not_the_query():
    x = paddle.to_tensor(draw(BATCH, SEQ, EMBED), stop_gradient=False)
    assert other_keys(x, x, x) is None
    assert other_keys(x, x.detach(), None) is not None
    assert other_keys(x.detach(), x, None) is not None
    with paddle.no_grad():
        assert other_keys(x, x.detach(), None) is None


def separate(normalize_before, dtype):
    attention, norm = nn.MultiHeadAttention(EMBED, HEADS), nn.LayerNorm(EMBED)
    for part in (attention, norm):
        part.to(dtype=dtype)
        for seed, p in enumerate(part.parameters()):
            p.set_value(p.numpy() + 0.2 * draw(*p.shape, seed=seed, dtype=dtype))

    def composed(query, key, value, mask):
        tensors = [norm(t) if normalize_before else t for t in (query, key, value)]
        out = query + attention(*tensors, mask)
        return out if normalize_before else norm(out)

    return (
        FusedMultiHeadAttention.from_multi_head_attention(attention, norm, normalize_before),
        composed,
        attention,
        norm,
    )


def make_mask(kind, keys=KEYS):
    keep = np.random.default_rng(4).random((BATCH, 1, SEQ, keys)) < 0.6
    keep[..., 0] = True
    return {
        "none": None,
        "bool": keep,
        "int64": keep.astype("int64"),
        "float": draw(HEADS, SEQ, keys, dtype="float64"),
    }[kind]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["none", "bool", "int64", "float"])
@pytest.mark.parametrize("normalize_before", [False, True])
def test_other_keys_and_values(normalize_before, kind, dtype):
    """Results and every gradient are those of Paddle's layers."""
    layer, composed, attention, norm = separate(normalize_before, dtype)
    mask = make_mask(kind)
    mask = None if mask is None else paddle.to_tensor(mask.astype(dtype) if kind == "float" else mask)
    arrays = [draw(BATCH, n, EMBED, seed=seed, dtype=dtype) for seed, n in enumerate((SEQ, KEYS, KEYS))]
    found = []
    for call in (layer, composed):
        tensors = [paddle.to_tensor(a, stop_gradient=False) for a in arrays]
        out = call(*tensors, mask)
        out.backward(paddle.to_tensor(draw(BATCH, SEQ, EMBED, seed=8, dtype=dtype)))
        found.append([out.numpy(), *(t.grad.numpy() for t in tensors)])
    for name, actual, expected in zip(("out", "query", "key", "value"), *found):
        close(name, actual, expected, dtype)
    weights = [
        p.weight.grad.numpy().T.reshape(HEADS, -1, EMBED)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    close("qkv_weight", layer.qkv_weight.grad.numpy(), np.stack(weights), dtype)
    close("linear_weight", layer.linear_weight.grad.numpy(), attention.out_proj.weight.grad.numpy(), dtype)
    scale = layer.pre_ln_scale if normalize_before else layer.ln_scale
    close("scale", scale.grad.numpy(), norm.weight.grad.numpy(), dtype)


def test_gradient_of_a_detached_key():
    """The query's is that through the query alone."""
    layer, composed, _, _ = separate(False, "float64")
    found = []
    for call in (layer, composed):
        x = paddle.to_tensor(draw(BATCH, SEQ, EMBED, dtype="float64"), stop_gradient=False)
        key = x.detach()
        call(x, key, key, None).backward(paddle.to_tensor(draw(BATCH, SEQ, EMBED, seed=8, dtype="float64")))
        found.append(x.grad.numpy())
    close("x", *found, "float64")


@pytest.mark.parametrize("keys", [3, KEYS])
def test_causal_is_aligned_at_the_end(keys):
    """Query i sees the keys up to i + keys - queries. Where keys are fewer, the first see none and give zeros."""
    causal = FusedMultiHeadAttention(EMBED, HEADS, 0.0, 0.0, causal=True)
    plain = FusedMultiHeadAttention(EMBED, HEADS, 0.0, 0.0)
    plain.set_state_dict(causal.state_dict())
    x, key = paddle.to_tensor(draw(BATCH, SEQ, EMBED)), paddle.to_tensor(draw(BATCH, keys, EMBED, seed=1))
    visible = np.arange(keys) <= np.arange(SEQ)[:, None] + keys - SEQ
    out = causal(x, key, key)
    close("out", out.numpy(), plain(x, key, key, paddle.to_tensor(visible)).numpy())
    nothing = plain(x, key, key, paddle.zeros([1, keys], "bool"))
    if keys < SEQ:
        close("first", out.numpy()[:, : SEQ - keys], nothing.numpy()[:, : SEQ - keys])
    close("no keys", plain(x, key[:, :0], key[:, :0]).numpy(), nothing.numpy())


def test_downscale_and_dropout_of_other_keys():
    """Twice the same seed gives the same, another seed something else; without training nothing is dropped."""
    layer = make_layer("layer", 0.3, 0.4)
    x, key = paddle.to_tensor(draw(BATCH, SEQ, EMBED)), paddle.to_tensor(draw(BATCH, KEYS, EMBED, seed=1))
    results = []
    for seed in (1, 1, 2):
        paddle.seed(seed)
        results.append(layer(x, key, key).numpy())
    assert np.array_equal(results[0], results[1]) and not np.array_equal(results[0], results[2])
    layer.eval()
    assert np.array_equal(layer(x, key, key).numpy(), layer(x, key, key).numpy())


def test_dropout_of_other_keys_whatever_the_default_dtype():
    layer = make_layer("layer", 0.3, 0.4)
    x, key = paddle.to_tensor(draw(BATCH, SEQ, EMBED)), paddle.to_tensor(draw(BATCH, KEYS, EMBED, seed=1))
    results = []
    for dtype in ("float32", "float64"):
        paddle.set_default_dtype(dtype)
        try:
            paddle.seed(1)
            results.append(layer(x, key, key).numpy())
        finally:
            paddle.set_default_dtype("float32")
    assert np.array_equal(*results)


def composed(x, key, parameters, r):
    """The layer in NumPy, as a chain of ordinary ops whose results are rounded by `r`."""
    p = parameters
    weights, biases = p["qkv_weight"].reshape(3, EMBED, EMBED), p["qkv_bias"].reshape(3, EMBED)
    projections = [*((w.T, b) for w, b in zip(weights, biases)), (p["linear_weight"], p["linear_bias"])]
    y = composed_attention(x, key, projections, HEADS, r)
    return r(reference.layer_norm(r(x + y), p["ln_scale"], p["ln_bias"], 1e-5)[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_keys_in_16_bits(dtype):
    layer = make_layer("layer")
    layer.to(dtype=dtype)
    tensors = [paddle.to_tensor(draw(BATCH, n, EMBED, seed=n)).astype(dtype) for n in (SEQ, KEYS)]
    out = layer(tensors[0], tensors[1], tensors[1])
    assert out.dtype == tensors[0].dtype
    arrays = [t.astype("float32").numpy() for t in tensors]
    parameters = {name: p.astype("float32").numpy() for name, p in layer.state_dict().items()}
    peer = composed(*arrays, parameters, lambda a: reference.round_to(a, dtype))
    wide = {name: a.astype("float64") for name, a in parameters.items()}
    expected = composed(*(a.astype("float64") for a in arrays), wide, lambda a: a)
    found = out.astype("float32").numpy().astype("float64")
    common.check_tensor("out", found, expected, dtype, peer.astype("float64"))


@pytest.mark.parametrize("full_graph", [True, False])
@pytest.mark.parametrize("kind", MAKERS)
def test_to_static(kind, full_graph):
    """Three inputs of a graph may be anything when it runs."""
    layer = make_layer(kind)
    layer.eval()
    x, key, value = (paddle.to_tensor(draw(BATCH, SEQ, EMBED, seed=seed)) for seed in range(3))
    expected = [layer(x).numpy(), layer(x, key, value).numpy()]
    assert np.abs(expected[0] - expected[1]).max() > 0.1
    static = paddle.jit.to_static(layer, full_graph=full_graph)
    for inputs, wanted in (((x, x, x), expected[0]), ((x, key, value), expected[1]), ((x,), expected[0])):
        close("out", static(*inputs).numpy(), wanted)


def test_gradients_in_a_full_graph():
    layer = make_layer("layer")
    network = make_layer("layer")
    network.set_state_dict(layer.state_dict())
    network = paddle.jit.to_static(network, full_graph=True)
    arrays = [draw(BATCH, n, EMBED, seed=seed) for seed, n in enumerate((SEQ, KEYS, KEYS))]
    found = []
    for call in (layer, network):
        tensors = [paddle.to_tensor(a, stop_gradient=False) for a in arrays]
        call(*tensors).backward(paddle.to_tensor(draw(BATCH, SEQ, EMBED, seed=8)))
        inputs = dict(zip(("query", "key", "value"), tensors))
        found.append({name: t.grad.numpy() for name, t in (*inputs.items(), *call.named_parameters())})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        close(name, found[1][name], expected)


def test_two_passes_of_a_full_graph_drop_other_elements():
    class Twice(nn.Layer):
        def __init__(self):
            super().__init__()
            self.block = make_layer("layer", 0.5, 0.5)

        def forward(self, x, key):
            return self.block(x, key, key), self.block(x, key, key)

    x, key = (paddle.to_tensor(draw(BATCH, SEQ, EMBED, seed=seed)) for seed in range(2))
    first, second = paddle.jit.to_static(Twice(), full_graph=True)(x, key)
    assert not np.array_equal(first.numpy(), second.numpy())


def test_static_program():
    layer = make_layer("layer")
    arrays = {"query": draw(BATCH, SEQ, EMBED), "key": draw(BATCH, KEYS, EMBED, seed=1)}
    expected = layer(*(paddle.to_tensor(arrays[name]) for name in ("query", "key", "key"))).numpy()
    state = {name: p.numpy() for name, p in layer.state_dict().items()}
    with static_mode():
        main, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(main, startup):
            query, key = (paddle.static.data(name, [-1, -1, EMBED], "float32") for name in arrays)
            static = MAKERS["layer"](0.0, 0.0)
            itself, other = static(query, query, query), static(query, key, key)
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        static.set_state_dict(state)
        out, from_itself = executor.run(main, feed=arrays, fetch_list=[other, itself])
    close("out", out, expected)
    close("itself", from_itself, layer(paddle.to_tensor(arrays["query"])).numpy())


def test_saved(tmp_path):
    layer = make_layer("pre_norm")
    layer.eval()
    path = str(tmp_path / "layer")
    spec = [paddle.static.InputSpec([None, None, EMBED], "float32", name) for name in ("query", "key", "value")]
    x, key = paddle.to_tensor(draw(BATCH, SEQ, EMBED)), paddle.to_tensor(draw(BATCH, KEYS, EMBED, seed=1))
    expected = layer(x, key, key).numpy()
    itself = layer(x).numpy()
    paddle.jit.save(layer, path, input_spec=spec)
    loaded = paddle.jit.load(path)
    close("out", loaded(x, key, key).numpy(), expected)
    close("itself", loaded(x, x, x).numpy(), itself)


def bad(*shape, dtype="float32"):
    return paddle.zeros(shape, dtype)


def without_memory():
    tensor = bad(BATCH, SEQ, EMBED)
    tensor._clear()
    return tensor


BAD = [
    ("key", lambda: (bad(BATCH, KEYS, EMBED + 1), None), ValueError, ["[2, keys, 24]", "[2, 9, 25]"]),
    ("key", lambda: (bad(BATCH + 1, KEYS, EMBED), None), ValueError, ["[2, keys, 24]", "[3, 9, 24]"]),
    ("key", lambda: (bad(KEYS, EMBED), None), ValueError, ["[2, keys, 24]", "[9, 24]"]),
    ("value", lambda: (bad(BATCH, KEYS, EMBED), None), ValueError, ["key", "[2, 9, 24]", "[2, 5, 24]"]),
    ("value", lambda: (None, bad(BATCH, KEYS, EMBED)), ValueError, ["key", "[2, 5, 24]", "[2, 9, 24]"]),
    ("key", lambda: (bad(BATCH, KEYS, EMBED, dtype="float64"), None), TypeError, ["float32", "float64"]),
    ("key", lambda: (bad(BATCH, SEQ, EMBED, dtype="int64"), None), TypeError, ["float32", "int64"]),
    (
        "value",
        lambda: (bad(BATCH, KEYS, EMBED), bad(BATCH, KEYS, EMBED, dtype="float16")),
        TypeError,
        ["float32", "float16"],
    ),
    ("key", lambda: (np.zeros((BATCH, SEQ, EMBED), "float32"), None), TypeError, ["Tensor", "ndarray"]),
    ("value", lambda: (None, 3), TypeError, ["Tensor", "int"]),
    ("key", lambda: (bad(BATCH, SEQ, EMBED).to_sparse_coo(3), None), TypeError, ["dense", "sparse"]),
    ("value", lambda: (None, without_memory()), TypeError, ["dense", "none"]),
]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("argument, others, error, words", BAD, ids=lambda v: "")
def test_bad_keys(argument, others, error, words, kind):
    layer = make_layer(kind)
    with pytest.raises(error) as raised:
        layer(paddle.to_tensor(draw(BATCH, SEQ, EMBED)), *others())
    assert str(raised.value).startswith(f"{argument}:"), raised.value
    for word in words:
        assert word in str(raised.value), raised.value


def test_tensors_of_the_other_mode():
    layer, x = make_layer("layer"), paddle.to_tensor(draw(BATCH, SEQ, EMBED))
    with static_mode(), paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
        variable = paddle.static.data("x", [BATCH, SEQ, EMBED], "float32")
        with pytest.raises(TypeError) as raised:
            layer(variable, x)
    assert str(raised.value).startswith("key:")
    with pytest.raises(TypeError) as raised:
        layer(x, None, variable)
    assert str(raised.value).startswith("value:")


@pytest.mark.parametrize(
    "shape, dtype", [((SEQ, SEQ), "bool"), ((3, 1, SEQ, KEYS), "bool"), ((SEQ, KEYS), "complex64")]
)
def test_bad_masks(shape, dtype):
    key = paddle.to_tensor(draw(BATCH, KEYS, EMBED))
    with pytest.raises(TypeError if dtype == "complex64" else ValueError) as raised:
        make_layer("layer")(paddle.to_tensor(draw(BATCH, SEQ, EMBED)), key, key, paddle.zeros(shape, dtype))
    assert str(raised.value).startswith("attn_mask:"), raised.value


def test_a_cache_and_another_key():
    cache = paddle.zeros([2, BATCH, HEADS, 1, EMBED // HEADS])
    layer, x, key = (
        make_layer("incubate"),
        paddle.to_tensor(draw(BATCH, SEQ, EMBED)),
        paddle.to_tensor(draw(BATCH, KEYS, EMBED)),
    )
    with pytest.raises(NotImplementedError) as raised:
        layer(x, key, key, cache=cache)
    assert str(raised.value).startswith("cache:")
