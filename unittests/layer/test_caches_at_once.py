"""A block with a cache where nobody wants a gradient: one call of the library, with what the smaller operators give."""

import common
import numpy as np
import paddle
import pytest
from blocks import DTYPES
from paddle import nn
from paddle_fused_attention import FusedMultiHeadAttention, _op, arrange_weights, convert, incubate

BATCH, HEADS, EMBED, CACHED = 2, 4, 64, 5
HEAD_DIM = EMBED // HEADS
Cache, StaticCache = nn.MultiHeadAttention.Cache, nn.MultiHeadAttention.StaticCache


def draw(*shape, dtype="float32", seed=0):
    numbers = np.random.default_rng(seed).standard_normal(shape).astype("float32")
    return paddle.to_tensor(numbers, place=paddle.CPUPlace()).astype(dtype)


def pair(num_kv_heads=HEADS, dtype="float32", cached=CACHED):
    return [draw(BATCH, num_kv_heads, cached, HEAD_DIM, dtype=dtype, seed=seed) for seed in (1, 2)]


def layer_of(dtype="float32", **others):
    paddle.seed(0)
    layer = FusedMultiHeadAttention(EMBED, HEADS, 0.0, 0.0, **others)
    layer.to(dtype=dtype)
    layer.eval()
    return layer


@pytest.fixture
def served(monkeypatch):
    """Of each block with a cache, whether one call served it."""
    found = []
    call = _op.fused_attention_with_cache

    def recorded(*arguments):
        result = call(*arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr(_op, "fused_attention_with_cache", recorded)
    return found


def flat(found):
    """The tensors of a result."""
    if isinstance(found, paddle.Tensor):
        return [found]
    return [tensor for part in found for tensor in flat(part)]


def check_both_ways(call, served, monkeypatch):
    """That one call serves, with the bits that the smaller operators give. Returns its result."""
    with paddle.no_grad():
        found = call()
        assert served == [True] * len(served) and served
        with monkeypatch.context() as patch:
            patch.setattr(_op, "fused_attention_with_cache", lambda *arguments: None)
            expected = call()
    assert len(flat(found)) == len(flat(expected))
    for actual, other in zip(flat(found), flat(expected)):
        assert (actual.dtype, actual.shape, actual.stop_gradient) == (other.dtype, other.shape, True)
        np.testing.assert_array_equal(actual.numpy(), other.numpy())
    return found


@pytest.mark.parametrize("arranged", [False, True])
@pytest.mark.parametrize("num_kv_heads", [HEADS, 2])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_growing(dtype, tokens, num_kv_heads, arranged, served, monkeypatch):
    layer = layer_of(dtype, num_kv_heads=num_kv_heads, normalize_before=True)
    if arranged:
        arrange_weights(layer)
    x, (key, value) = draw(BATCH, tokens, EMBED, dtype=dtype), pair(num_kv_heads, dtype)
    _, cache = check_both_ways(lambda: layer(x, cache=Cache(key, value)), served, monkeypatch)
    assert isinstance(cache, Cache)
    for old, new in zip((key, value), cache):
        assert new.shape == [BATCH, num_kv_heads, CACHED + tokens, HEAD_DIM]
        np.testing.assert_array_equal(new[:, :, :CACHED].numpy(), old.numpy())


@pytest.mark.parametrize("arranged", [False, True])
@pytest.mark.parametrize("num_kv_heads", [HEADS, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_static(dtype, num_kv_heads, arranged, served, monkeypatch):
    layer = layer_of(dtype, num_kv_heads=num_kv_heads)
    if arranged:
        arrange_weights(layer)
    x, cache = draw(BATCH, 3, EMBED, dtype=dtype), StaticCache(*pair(num_kv_heads, dtype))
    _, same = check_both_ways(lambda: layer(x, cache=cache), served, monkeypatch)
    assert same.k is cache.k and same.v is cache.v


@pytest.mark.parametrize("kind", [Cache, StaticCache])
def test_a_float32_query_beside_16_bit_projections(kind, served, monkeypatch):
    """One call rounds the output projection once less."""
    layer, x = layer_of("bfloat16"), draw(BATCH, 3, EMBED)
    with paddle.no_grad():
        found = layer(x, cache=kind(*pair(dtype="bfloat16")))[0]
        monkeypatch.setattr(_op, "fused_attention_with_cache", lambda *arguments: None)
        composed = layer(x, cache=kind(*pair(dtype="bfloat16")))[0]
        layer.to(dtype="float64")
        cache = kind(*(t.astype("float64") for t in pair(dtype="bfloat16")))
        expected = layer(x.astype("float64"), cache=cache)[0].numpy()
    assert served == [True] and found.dtype == paddle.float32
    error, other = (np.sqrt(np.mean((out.numpy() - expected) ** 2)) for out in (found, composed))
    assert error <= other < 0.01


@pytest.mark.parametrize("kind", [Cache, StaticCache])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask_dtype", [None, "float32", "bool"])
def test_masks(mask_dtype, causal, kind, served, monkeypatch):
    layer = layer_of(causal=causal, window_size=(4, 2))
    x = draw(BATCH, 3, EMBED)
    keys = CACHED + (3 if kind is Cache else 0)
    mask = None if mask_dtype is None else (draw(BATCH, 1, 3, keys, seed=3) > 0.0).astype(mask_dtype)
    out, _ = check_both_ways(lambda: layer(x, attn_mask=mask, cache=kind(*pair())), served, monkeypatch)
    if mask is not None:
        with paddle.no_grad():
            assert not np.array_equal(out.numpy(), layer(x, cache=kind(*pair()))[0].numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_in_one_tensor(dtype, served, monkeypatch):
    x, cache = draw(BATCH, 3, EMBED, dtype=dtype), paddle.stack(pair(dtype=dtype))
    weights = draw(3, HEADS, HEAD_DIM, EMBED, dtype=dtype) / 8, draw(EMBED, EMBED, dtype=dtype, seed=4) / 8

    def call():
        return incubate.functional.fused_multi_head_attention(x, *weights, cache_kv=cache, training=False)

    _, longer = check_both_ways(call, served, monkeypatch)
    assert longer.shape == [2, BATCH, HEADS, CACHED + 3, HEAD_DIM]


@pytest.mark.parametrize("before", [False, True])
def test_converted_decoders(before, served, monkeypatch):
    """Step by step: both attentions of every layer are one call each, and Paddle's own layers give the same."""
    paddle.seed(1)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(EMBED, HEADS, 96, normalize_before=before), 2)
    model.eval()
    start, *tokens = draw(BATCH, 2, EMBED), draw(BATCH, 1, EMBED, seed=2), draw(BATCH, 1, EMBED, seed=3)
    memory = draw(BATCH, 7, EMBED, seed=1)

    def steps():
        caches, outs = model.gen_cache(memory), []
        for x in (start, *tokens):
            out, caches = model(x, memory, cache=caches)
            outs.append(out)
        return outs

    with paddle.no_grad():
        expected = steps()
        convert(model)
        found = steps()
    # Paddle's CPU may give an empty cache no memory; the first step is then left to the smaller operators.
    assert len(served) == 3 * 2 * 2 and all(served[4:])
    for actual, other in zip(found, expected):
        common.check_tensor("out", actual.numpy(), other.numpy(), "float32")


def test_what_wants_a_gradient_gets_it(served):
    layer = layer_of()
    x = draw(BATCH, 3, EMBED)
    x.stop_gradient = False
    out, _ = layer(x, cache=Cache(*pair()))
    out.sum().backward()
    assert served == [False] and x.grad is not None


def test_what_is_dropped_is_left_to_the_operators(served):
    layer = layer_of()
    layer.train()
    layer.attn_dropout_rate = layer.dropout_rate = 0.5
    with paddle.no_grad():
        layer(draw(BATCH, 3, EMBED), cache=Cache(*pair()))
    assert served == [False]


def test_a_token_of_several_sequences(served, monkeypatch):
    """A view with strides, which on Paddle 2.6 is none."""
    layer, x = layer_of(), draw(BATCH, 3, EMBED)
    check_both_ways(lambda: layer(x[:, 1:2], cache=Cache(*pair())), served, monkeypatch)


def test_views_of_caches(served):
    """They are Paddle's to copy."""
    layer, x = layer_of(), draw(BATCH, 3, EMBED)
    views = [t.transpose([0, 2, 1, 3]).contiguous().transpose([0, 2, 1, 3]) for t in pair()]
    with paddle.no_grad():
        expected = layer(x, cache=Cache(*pair()))
        found = layer(x, cache=Cache(*views))
    assert served == [True, views[0].is_contiguous()]
    for actual, other in zip(flat(found), flat(expected)):
        np.testing.assert_array_equal(actual.numpy(), other.numpy())


@pytest.mark.parametrize(
    "change, error, start",
    [
        (lambda x, k, v: (x, k[:, :1], v), ValueError, "cache.k: expected shape"),
        (lambda x, k, v: (x, k, v[:, :, :2]), ValueError, "cache.v: expected shape"),
        (lambda x, k, v: (x, k, v.astype("float64")), TypeError, "cache.v: expected cache.k's dtype"),
        (lambda x, k, v: (x[..., :8], k, v), ValueError, "x: expected shape"),
        (lambda x, k, v: (x, k[0], v[0]), ValueError, "cache.k: expected shape"),
    ],
)
def test_bad_caches(change, error, start, served):
    x, key, value = change(draw(BATCH, 3, EMBED), *pair())
    with paddle.no_grad(), pytest.raises(error, match=f"^{start}"):
        layer_of()(x, cache=Cache(key, value))
    assert True not in served


@pytest.mark.parametrize(
    "change, error",
    [(lambda cache: cache[0], ValueError), (lambda cache: cache.astype("complex64"), TypeError)],
    ids=["keys alone", "complex"],
)
def test_bad_tensors_of_both(change, error, served):
    weights = draw(3, HEADS, HEAD_DIM, EMBED), draw(EMBED, EMBED)
    with paddle.no_grad(), pytest.raises(error, match="^cache_kv: expected"):
        incubate.functional.fused_multi_head_attention(
            draw(BATCH, 3, EMBED), *weights, cache_kv=change(paddle.stack(pair())), training=False
        )
    assert served == [False]


def test_bad_masks(served):
    with paddle.no_grad(), pytest.raises(ValueError, match="^attn_mask: "):
        layer_of()(draw(BATCH, 3, EMBED), attn_mask=draw(3, 3), cache=Cache(*pair()))
    assert served == [False]
