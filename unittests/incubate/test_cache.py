"""Attention with a cache: outputs, the new cache, masks and generation step by step."""

import common
import numpy as np
import paddle
import pytest
from built_in import BATCH, EMBED, HEAD_DIM, HEADS, NORM, SEQ, check, composed, draw_arrays, to_tensors
from paddle_fused_attention import incubate
from paddle_fused_attention.incubate.functional import fused_multi_head_attention


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cached", [0, 1, 6])
@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_cache(pre_layer_norm, cached, dtype):
    arrays = draw_arrays(dtype)
    rng = np.random.default_rng(3)
    cache = paddle.to_tensor(rng.standard_normal((2, BATCH, HEADS, cached, HEAD_DIM)).astype(dtype))
    mask = paddle.to_tensor(rng.standard_normal((BATCH, 1, SEQ, cached + SEQ)).astype(dtype))
    switches = dict(pre_layer_norm=pre_layer_norm, attn_mask=mask, cache_kv=cache)
    out, new_cache = fused_multi_head_attention(**to_tensors(arrays), **switches, training=False)
    expected, expected_cache = composed(**to_tensors(arrays), **switches)
    assert new_cache.shape == [2, BATCH, HEADS, cached + SEQ, HEAD_DIM]
    check("out", out.numpy(), expected.numpy(), dtype)
    check("cache", new_cache.numpy(), expected_cache.numpy(), dtype)


@pytest.mark.parametrize("transpose_qkv_wb", [False, True])
def test_generation_step_by_step(transpose_qkv_wb):
    """A sequence fed in pieces, each attending to what came before, is the operator on all of it with a causal mask."""
    paddle.seed(5)
    layer = incubate.FusedMultiHeadAttention(EMBED, HEADS, transpose_qkv_wb=transpose_qkv_wb)
    layer.eval()
    x = paddle.to_tensor(draw_arrays("float32")["x"])
    causal = paddle.tril(paddle.ones([SEQ, SEQ], "bool"))
    whole = layer(x, attn_mask=causal)
    cache = paddle.zeros([2, BATCH, HEADS, 0, HEAD_DIM])
    pieces = []
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        out, cache = layer(x[:, start:stop], attn_mask=causal[start:stop, :stop], cache=cache)
        pieces.append(out)
    check("out", paddle.concat(pieces, 1).numpy(), whole.numpy(), "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cache_16_bit(dtype):
    tensors = {name: paddle.cast(t, dtype) for name, t in to_tensors(draw_arrays("float32")).items()}
    cache = paddle.cast(
        paddle.to_tensor(np.random.default_rng(3).standard_normal((2, BATCH, HEADS, 3, HEAD_DIM))), dtype
    )
    out, new_cache = fused_multi_head_attention(**tensors, cache_kv=cache, training=False)
    assert out.dtype == new_cache.dtype == cache.dtype
    wide = {name: paddle.cast(t, "float64") for name, t in tensors.items()}
    expected, expected_cache = composed(**wide, cache_kv=paddle.cast(cache, "float64"))
    unit = 2 * common.UNIT_ROUNDOFF[dtype]  # Paddle 2.6 casts without rounding
    for actual, wanted in ((out, expected), (new_cache, expected_cache)):
        wanted = wanted.numpy()
        assert np.abs(paddle.cast(actual, "float64").numpy() - wanted).max() <= 1.01 * unit * np.abs(wanted).max()


def test_cache_with_hard_masks():
    """A query that may see neither the cache nor itself gives zeros before the bias, as without a cache."""
    arrays = draw_arrays(absent=NORM)
    keep = np.random.default_rng(2).random((BATCH, HEADS, SEQ, SEQ + 2)) < 0.5
    keep[..., 0] = True
    keep[:, :, 1] = False
    cache = np.random.default_rng(3).standard_normal((2, BATCH, HEADS, 2, HEAD_DIM))
    results = []
    for mask in (keep, keep.astype("int32"), np.where(keep, 0.0, -np.inf)):
        out, _ = fused_multi_head_attention(
            **to_tensors(arrays),
            cache_kv=paddle.to_tensor(cache),
            attn_mask=paddle.to_tensor(mask),
            training=False,
            pre_layer_norm=True,
        )
        results.append(out.numpy())
    check("out", results[0][:, 1], arrays["x"][:, 1] + arrays["linear_bias"])
    finite = composed(
        **to_tensors(arrays),
        cache_kv=paddle.to_tensor(cache),
        attn_mask=paddle.to_tensor(np.where(keep, 0.0, -1e9)),
        pre_layer_norm=True,
    )[0].numpy()
    rows = [0, 2, 3, 4]
    check("out", results[0][:, rows], finite[:, rows])
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
