"""Attention out of ordinary Paddle ops, where the operator does not reach: queries that attend to cached keys and values.

The operator takes its keys and values from x alone, so the block with a cache is composed here, for step-by-step generation.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F

from ._op import TENSOR_ARGUMENTS, check_tensors


def additive_mask(mask: Any, dtype: Any) -> Any:
    """The mask as ``paddle.nn.MultiHeadAttention`` adds it to the scores of x, which is of `dtype`.

    Paddle makes a bool or integer mask (mask - 1) * 1e9, so that a query that may see no key attends to all alike instead of
    giving zeros. Float masks are left as they are. 1e9 needs float32 at least: in float16 Paddle's own product is 0 * inf.
    """
    if mask is None or paddle.is_floating_point(mask):
        return mask
    check_tensors(("attn_mask",), (mask,))
    return (paddle.cast(mask, "float64" if dtype == paddle.float64 else "float32") - 1.0) * 1e9


def _check_like_x(name: str, tensor: Any, expected: list, x: Any) -> None:
    """Checks dtype and shape; names in `expected` stand for any size."""
    shape = list(tensor.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(wanted, str) or wanted == size or -1 in (wanted, size) for wanted, size in zip(expected, shape)
    )
    if not fits:
        raise ValueError(
            f"{name}: expected shape [{', '.join(map(str, expected))}] for x of shape {list(x.shape)}, got {shape}"
        )
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")


def _masked(scores: Any, mask: Any) -> Any:
    if mask is None:
        return scores
    if paddle.is_floating_point(mask):
        return scores + paddle.cast(mask, scores.dtype)
    keep = paddle.expand(paddle.cast(mask, "bool"), paddle.shape(scores))
    return paddle.where(keep, scores, paddle.full_like(scores, float("-inf")))


def _softmax(scores: Any) -> Any:
    """Zeros, not NaN, for a query that may see no key."""
    sees_none = scores.max(axis=-1, keepdim=True) == float("-inf")
    sees_none.stop_gradient = True  # which Paddle 2.6's expand_as asks for
    sees_none = paddle.expand_as(sees_none, scores)
    zeros = paddle.zeros_like(scores)
    return paddle.where(sees_none, zeros, F.softmax(paddle.where(sees_none, zeros, scores)))


def _layer_norm(x: Any, scale: Any, bias: Any, epsilon: float) -> Any:
    """Paddle's own takes no epsilon above 0.001, and its gradient is wrong for a frozen scale on the CPU."""
    centred = x - x.mean(axis=-1, keepdim=True)
    out = centred * paddle.rsqrt((centred * centred).mean(axis=-1, keepdim=True) + epsilon)
    out = out if scale is None else out * scale
    return out if bias is None else out + bias


@paddle.jit.not_to_static
def attention_with_cache(
    x: Any,
    qkv_weight: Any,
    linear_weight: Any,
    cache_k: Any,
    cache_v: Any,
    *,
    pre_layer_norm: bool,
    final_layer_norm: bool,
    pre_ln_scale: Any = None,
    pre_ln_bias: Any = None,
    ln_scale: Any = None,
    ln_bias: Any = None,
    pre_ln_epsilon: float = 1e-5,
    ln_epsilon: float = 1e-5,
    qkv_bias: Any = None,
    linear_bias: Any = None,
    attn_mask: Any = None,
    dropout_rate: float = 0.0,
    attn_dropout_rate: float = 0.0,
    training: bool = False,
    mode: str = "upscale_in_train",
    add_residual: bool = True,
    cache_name: str = "cache",
) -> tuple:
    """The block, in which every query attends to the cached keys and values and, after them, to those of x itself.

    For inference: the scores are stored and nothing is fused; 16-bit tensors are computed in float32, since Paddle multiplies
    no such matrices on the CPU. Among themselves the queries are masked by `attn_mask` alone, as in Paddle.

    Args:
        x: ``[batch, seq_len, embed_dim]``.
        cache_k, cache_v: ``[batch, num_heads, cached_len, head_dim]``, dtype of x; cached_len may be 0.
        attn_mask: Broadcasts to ``[batch, num_heads, seq_len, cached_len + seq_len]``.
        cache_name: What errors call the cache.
        The rest: as in :func:`paddle_fused_attention.fused_multi_head_attention`.

    Returns:
        The result, like x, and the keys and the values of the cache and of x, each
        ``[batch, num_heads, cached_len + seq_len, head_dim]``.

    Raises:
        TypeError, ValueError: The packed weight or the cache does not fit x.
    """
    tensors = (x, qkv_weight, linear_weight, pre_ln_scale, pre_ln_bias, ln_scale, ln_bias, qkv_bias, linear_bias, attn_mask)
    check_tensors((*TENSOR_ARGUMENTS, cache_name, cache_name), (*tensors, cache_k, cache_v))
    embed_dim = x.shape[2]
    if embed_dim < 0 and len(qkv_weight.shape) == 4:  # unknown in a static graph, where the weight's is known
        embed_dim = qkv_weight.shape[3]
    _check_like_x("qkv_weight", qkv_weight, [3, "num_heads", "head_dim", embed_dim], x)
    _, num_heads, head_dim, _ = qkv_weight.shape
    for cache in (cache_k, cache_v):
        _check_like_x(cache_name, cache, [x.shape[0], num_heads, "cached_len", head_dim], x)
    dtype = x.dtype
    compute = "float64" if dtype == paddle.float64 else "float32"

    def cast(*tensors: Any) -> Any:
        return [None if tensor is None else paddle.cast(tensor, compute) for tensor in tensors]

    residual, weight, linear_weight, qkv_bias, linear_bias = cast(x, qkv_weight, linear_weight, qkv_bias, linear_bias)
    h = residual
    if pre_layer_norm:
        h = _layer_norm(h, *cast(pre_ln_scale, pre_ln_bias), pre_ln_epsilon)
    qkv = paddle.matmul(h, weight.reshape([3 * embed_dim, embed_dim]), transpose_y=True)
    if qkv_bias is not None:
        qkv = qkv + qkv_bias.reshape([3 * embed_dim])
    q, k, v = paddle.unbind(qkv.reshape([0, 0, 3, num_heads, head_dim]).transpose([2, 0, 3, 1, 4]))
    k = paddle.concat([*cast(cache_k), k], axis=2)
    v = paddle.concat([*cast(cache_v), v], axis=2)

    scores = paddle.matmul(q * head_dim**-0.5, k, transpose_y=True)
    p = F.dropout(_softmax(_masked(scores, attn_mask)), attn_dropout_rate, training=training, mode=mode)
    o = paddle.matmul(p, v).transpose([0, 2, 1, 3]).reshape([0, 0, embed_dim])
    y = paddle.matmul(o, linear_weight)
    if linear_bias is not None:
        y = y + linear_bias
    z = F.dropout(y, dropout_rate, training=training, mode=mode)
    if add_residual:
        z = residual + z
    if final_layer_norm:
        z = _layer_norm(z, *cast(ln_scale, ln_bias), ln_epsilon)
    return paddle.cast(z, dtype), paddle.cast(k, dtype), paddle.cast(v, dtype)
