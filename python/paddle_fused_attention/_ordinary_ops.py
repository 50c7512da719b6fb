"""Attention of ordinary Paddle ops, for queries that attend to cached keys and values or to other tensors: the operator
takes keys and values from x only.

Nothing is fused and the scores are stored. 16-bit tensors are computed in float32, since Paddle multiplies no 16-bit
matrices on the CPU.
"""

from __future__ import annotations

from typing import Any, Sequence

import paddle
import paddle.nn.functional as F
from paddle.base.framework import _dygraph_tracer
from paddle.framework import in_dynamic_mode

from . import _amp, _op
from ._amp import without_auto_cast
from ._block import PLAIN_SCORES, TENSORS, Block
from ._checks import dtype_name
from ._dropout_masks import kept_scores
from ._ordinary_parts import cast_all, compute_dtype, dropout, layer_norm
from ._residual_norm import residual_tail, tail_of


@paddle.jit.not_to_static
def additive_mask(name: str, mask: Any, x: Any) -> Any:
    """The mask as ``paddle.nn.MultiHeadAttention`` adds it to the scores of x; errors call it `name`.

    Paddle turns a bool or integer mask into (mask - 1) * 1e9: a query that may see no key attends to all alike and does
    not give zeros. Float masks stay as they are. 1e9 needs float32 at least: in float16 it is inf, and Paddle's own
    product NaN.
    """
    if mask is None:
        return None
    if not hasattr(mask, "stop_gradient"):
        raise TypeError(f"{name}: expected a Tensor or None, got {type(mask).__name__}")
    _op.check_tensors((name,), (mask,))
    if paddle.is_floating_point(mask):
        return mask
    _check_mask_dtype(name, mask)
    return (paddle.cast(mask, "float64" if x.dtype == paddle.float64 else "float32") - 1.0) * 1e9


# The dtypes that the operator takes.
_MASK_DTYPES = ("float32", "float64", "float16", "bfloat16", "bool", "uint8", "int8", "int16", "int32", "int64")


def _size_agrees(wanted: Any, size: int) -> bool:
    """Whether a size is as expected. A name stands for any size, -1 for one that is not known yet."""
    return isinstance(wanted, str) or wanted == size or -1 in (wanted, size)


def _check_like(name: str, tensor: Any, expected: Sequence, other: Any, other_name: str = "x") -> None:
    shape = list(tensor.shape)
    if len(shape) != len(expected) or not all(map(_size_agrees, expected, shape)):
        raise ValueError(
            f"{name}: expected shape [{', '.join(map(str, expected))}] for {other_name} of shape {list(other.shape)}, "
            f"got {shape}"
        )
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other_name}'s dtype {dtype_name(other)}, got {dtype_name(tensor)}")


def _check_mask_dtype(name: str, mask: Any) -> None:
    if dtype_name(mask) not in _MASK_DTYPES:
        raise TypeError(
            f"{name}: expected a float dtype, bool, uint8 or a signed integer dtype, got {dtype_name(mask)}"
        )


def _check_mask(mask: Any, scores: Sequence[int]) -> None:
    """Checks shape and dtype as the operator does; `scores` is [batch, num_heads, queries, keys]."""
    if mask is None:
        return
    shape = list(mask.shape)
    if len(shape) > 4 or not all(
        n == 1 or _size_agrees(wanted, n) for n, wanted in zip(reversed(shape), reversed(scores))
    ):
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to [batch, num_heads, queries, keys] = {list(scores)}, got "
            f"{shape}"
        )
    _check_mask_dtype("attn_mask", mask)


def _check_block(block: Block, first_head: int = 0, total_heads: int = 0) -> None:
    """Checks the inputs as the operator does, but for the mask, which has another shape here.

    Raises:
        NotImplementedError: There is something that these ops do not compute.
    """
    if block.scores is not PLAIN_SCORES or len(block.qkv_weight.shape) == 3:
        raise NotImplementedError(
            "fused_multi_head_attention: expected no scale, window_size, cu_seqlens or grouped heads where ordinary "
            "ops stand in the operator's place (keys of other tensors, caches, export to ONNX)"
        )
    _op.check_attention(block._replace(attn_mask=None), first_head, total_heads)


def _filled_where(condition: Any, value: float, tensor: Any) -> Any:
    """The tensor with `value` where the condition, which broadcasts to it, holds."""
    condition.stop_gradient = True  # legacy programs expand no other bool
    return paddle.where(paddle.expand(condition, paddle.shape(tensor)), paddle.full_like(tensor, value), tensor)


def masked(scores: Any, mask: Any) -> Any:
    if mask is None:
        return scores
    if paddle.is_floating_point(mask):
        return scores + paddle.cast(mask, scores.dtype)
    return _filled_where(paddle.logical_not(paddle.cast(mask, "bool")), float("-inf"), scores)


def _causal_mask(scores: Any) -> Any:
    """Query i sees the keys up to i + keys - queries."""
    shape = paddle.shape(scores)
    queries, keys = (paddle.arange(0, shape[axis], dtype="int64") for axis in (2, 3))
    ahead = paddle.cast(shape[3] - shape[2], "int64")
    return (keys.unsqueeze(0) <= queries.unsqueeze(1) + ahead).unsqueeze([0, 1])


def softmax(scores: Any) -> Any:
    """The softmax, with zeros, not NaN, for a query that may see no key."""
    sees_none = scores.max(axis=-1, keepdim=True) == float("-inf")
    return _filled_where(sees_none, 0.0, F.softmax(_filled_where(sees_none, 0.0, scores)))


def _project(h: Any, weight: Any, bias: Any) -> Any:
    """Projects [batch, tokens, embed_dim] by [n, num_heads, head_dim, embed_dim] to
    [n, batch, num_heads, tokens, head_dim]."""
    n, num_heads, head_dim, embed_dim = weight.shape
    width = n * num_heads * head_dim
    out = paddle.matmul(h, weight.reshape([width, embed_dim]), transpose_y=True)
    if bias is not None:
        out = out + bias.reshape([width])
    return out.reshape([0, 0, n, num_heads, head_dim]).transpose([2, 0, 3, 1, 4])


def _attend(block: Block, q: Any, k: Any, v: Any, causal: bool, keep: Any = None) -> Any:
    """Attention of three [batch, num_heads, tokens, head_dim] with the block's mask and dropout, as
    [batch, queries, num_heads * head_dim]."""
    num_heads, head_dim = q.shape[1], q.shape[3]
    scores = masked(paddle.matmul(q * head_dim**-0.5, k, transpose_y=True), block.attn_mask)
    if causal:
        scores = masked(scores, _causal_mask(scores))
    o = paddle.matmul(dropout(softmax(scores), block.attn_dropout_rate, block.training, block.mode, keep), v)
    return o.transpose([0, 2, 1, 3]).reshape([0, 0, num_heads * head_dim])


@paddle.jit.not_to_static
def attention_with_cache(block: Block, cache_k: Any, cache_v: Any, cache_name: str = "cache") -> tuple:
    """Computes a checked block in which every query attends to cached keys and values and, after them, to those of x.

    For inference. Only the mask hides the keys of x from its queries, as in Paddle: `causal` is not read.

    Args:
        block: Its mask broadcasts to ``[batch, num_heads, seq_len, cached_len + seq_len]``.
        cache_k, cache_v: ``[batch, num_heads, cached_len, head_dim]``, dtype of x; cached_len may be 0.
        cache_name: What errors call the cache.

    Returns:
        The result, like x, and the keys and the values of the cache and of x, each
        ``[batch, num_heads, cached_len + seq_len, head_dim]``.

    Raises:
        TypeError, ValueError: A tensor does not fit the others.
    """
    _op.check_tensors((*TENSORS, cache_name, cache_name), (*block.tensors, cache_k, cache_v))
    _check_block(block)
    x = block.x
    batch, seq_len, _ = x.shape
    _, num_heads, head_dim, _ = block.qkv_weight.shape
    _check_like(cache_name, cache_k, [batch, num_heads, "cached_len", head_dim], x)
    _check_like(cache_name, cache_v, [batch, num_heads, cache_k.shape[2], head_dim], x)
    cached_len = cache_k.shape[2]
    num_keys = -1 if -1 in (cached_len, seq_len) else cached_len + seq_len
    _check_mask(block.attn_mask, [batch, num_heads, seq_len, num_keys])

    dtype, compute = x.dtype, compute_dtype(x)
    with without_auto_cast():
        h, weight, bias, linear_weight = cast_all((x, block.qkv_weight, block.qkv_bias, block.linear_weight), compute)
        if block.pre_layer_norm:
            scale, shift = cast_all((block.pre_ln_scale, block.pre_ln_bias), compute)
            h = layer_norm(h, scale, shift, block.pre_ln_epsilon)
        q, k, v = paddle.unbind(_project(h, weight, bias))
        k, v = (
            paddle.concat([cached, new], axis=2) for cached, new in zip(cast_all((cache_k, cache_v), compute), (k, v))
        )
        o = _attend(block, q, k, v, causal=False)
        out = residual_tail(tail_of(block, paddle.matmul(o, linear_weight)), dtype)
        return out, paddle.cast(k, dtype), paddle.cast(v, dtype)


def result_dtype(x: Any) -> Any:
    """The dtype of the operator's result for x, also under auto_cast."""
    dtype = _amp.target_dtype(_op.ATTENTION.type, _dygraph_tracer())
    return x.dtype if dtype is None or x.dtype in (paddle.float64, paddle.float32) else dtype


@paddle.jit.not_to_static
def attention_before_tail(block: Block, key_value: tuple, first_head: int = 0, total_heads: int = 0) -> Any:
    """Computes a checked block up to the output projection, without its bias, in float32 at least. Keys and values come
    from other tensors than x; the first layer norm normalises them as it does x.

    In dygraph dropout drops the same elements as the operator.

    Args:
        block: Its mask broadcasts to ``[batch, num_heads, queries, keys]``.
        key_value: A key and a value ``[batch, keys, embed_dim]``.
        first_head, total_heads: As for the operator.

    Raises:
        TypeError, ValueError: A tensor does not fit the others.
    """
    auto_cast = _amp.target_dtype(_op.ATTENTION.type, _dygraph_tracer()) is not None
    with without_auto_cast():
        if auto_cast:  # the operator then takes several float dtypes
            cast = {name: _as_float32(tensor) for name, tensor in zip(TENSORS, block.tensors) if name != "attn_mask"}
            block, key_value = block._replace(**cast), tuple(map(_as_float32, key_value))
        _check_block(block, first_head, total_heads)
        x, (key, value) = block.x, key_value
        _check_like("key", key, [x.shape[0], "keys", x.shape[2]], x, "query")
        _check_like("value", value, list(key.shape), key, "key")
        scores = [x.shape[0], block.qkv_weight.shape[1], x.shape[1], key.shape[1]]
        _check_mask(block.attn_mask, scores)

        compute = compute_dtype(x)
        if 0 in x.shape:
            return paddle.zeros(x.shape, compute)
        if key.shape[1] == 0:  # Paddle multiplies no empty matrix: a hidden key takes its place
            key = value = paddle.zeros([*key.shape[:1], 1, *key.shape[2:]], key.dtype)
            block = block._replace(attn_mask=paddle.zeros([1, 1], "bool"))
        weight, bias, linear_weight, scale, shift = cast_all(
            (block.qkv_weight, block.qkv_bias, block.linear_weight, block.pre_ln_scale, block.pre_ln_bias), compute
        )
        projected = []
        for i, tensor in enumerate((x, key, value)):
            h = paddle.cast(tensor, compute)
            if block.pre_layer_norm:
                h = layer_norm(h, scale, shift, block.pre_ln_epsilon)
            projected.append(_project(h, weight[i : i + 1], None if bias is None else bias[i : i + 1])[0])
        keep = None
        if in_dynamic_mode() and block.training:
            keep = kept_scores(block, [*scores[:3], key.shape[1]], first_head, total_heads)
        q, k, v = projected
        o = _attend(block, q, k, v, causal=block.causal, keep=keep)
        return paddle.matmul(o, linear_weight)


def _as_float32(tensor: Any) -> Any:
    if tensor is None or dtype_name(tensor) not in ("float32", "float16", "bfloat16"):
        return tensor
    return paddle.cast(tensor, "float32")
