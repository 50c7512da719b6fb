"""Attention by itself of ordinary Paddle ops, which store the scores: for graphs that may hold no operator of ours, and
where the weights of the values are asked for."""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F

from ._amp import without_auto_cast
from ._ordinary_parts import compute_dtype


def attention_of_ordinary_ops(d: Any) -> tuple:
    """Computes a checked :class:`paddle_fused_attention._attention.Attention` whose query, key and value are each by
    itself, with Paddle's own dropout. Returns the
    result and, after dropout, the weights ``[batch, num_heads, queries, keys]`` of the values, of packed sequences
    ``[1, num_heads, queries of all, keys of all]``; in float32 at least."""
    packed = d.cu_seqlens_q is not None
    with without_auto_cast():
        q, k, v = (paddle.cast(t, compute_dtype(d.query)) for t in (d.query, d.key, d.value))
        if packed:
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
        q = q.transpose([0, 2, 1, 3])
        if not d.keys_by_head:
            k, v = (t.transpose([0, 2, 1, 3]) for t in (k, v))
        group = q.shape[1] // k.shape[1]
        k, v = _of_query_heads(k, group), _of_query_heads(v, group)
        scores = _masked(paddle.matmul(q * d.scale, k, transpose_y=True), d.attn_mask)
        scores = _masked(scores, _seen_by_position(d, scores))
        if d.startend_row_indices is not None:
            hidden = paddle.cast(_hidden_by_ranges(d, scores), "int32")  # expand and its like know no bool everywhere
            if hidden.shape[1] != 1:
                hidden = _of_query_heads(hidden, group)
            scores = _masked(scores, 1 - hidden)
        weights = F.dropout(_softmax(scores), d.dropout_rate, training=d.training, mode=d.mode)
        o = paddle.cast(paddle.matmul(weights, v).transpose([0, 2, 1, 3]), d.query.dtype)
        return (o.squeeze(0) if packed else o), weights


def _of_query_heads(tensor: Any, group: int) -> Any:
    """[batch, num_kv_heads, ...] as the [batch, num_heads, ...] that the query heads read."""
    if group == 1:
        return tensor
    return paddle.stack([tensor] * group, axis=2).flatten(1, 2)


def _positions(count: Any, starts: Any, other_starts: Any) -> tuple:
    """Of packed tokens, the number of each one's sequence, its place there, and by how much the other sequence of that
    number is longer."""
    tokens = paddle.arange(0, count, dtype="int64")
    starts, other_starts = paddle.cast(starts, "int64"), paddle.cast(other_starts, "int64")
    sequence = paddle.cast(tokens.unsqueeze(1) >= starts[1:].unsqueeze(0), "int64").sum(axis=1)
    lengths, other_lengths = starts[1:] - starts[:-1], other_starts[1:] - other_starts[:-1]
    place = tokens - paddle.gather(starts, sequence)
    return sequence, place, paddle.gather(other_lengths - lengths, sequence)


def _seen_by_position(d: Any, scores: Any) -> Any:
    """Whether a query sees a key by their places in their sequences, as bool [1, 1, queries, keys]; None if all do."""
    packed = d.cu_seqlens_q is not None
    if not packed and not d.causal and d.window_left < 0 and d.window_right < 0:
        return None
    shape = paddle.shape(scores)
    if packed:
        of_query, query_place, ahead = _positions(shape[2], d.cu_seqlens_q, d.cu_seqlens_k)
        of_key, key_place, _ = _positions(shape[3], d.cu_seqlens_k, d.cu_seqlens_q)
    else:
        query_place, key_place = (paddle.arange(0, shape[axis], dtype="int64") for axis in (2, 3))
        ahead = paddle.cast(shape[3] - shape[2], "int64")
    behind = key_place.unsqueeze(0) - (query_place + ahead).unsqueeze(1)
    seen = behind >= -d.window_left if d.window_left >= 0 else behind == behind
    after = 0 if d.causal else d.window_right
    if after >= 0:
        seen = paddle.logical_and(seen, behind <= after)
    if packed:
        seen = paddle.logical_and(seen, of_query.unsqueeze(1) == of_key.unsqueeze(0))
    return seen.unsqueeze([0, 1])


def _hidden_by_ranges(d: Any, scores: Any) -> Any:
    """Whether the ranges hide a key from a query, as bool [batch, num_kv_heads or 1, queries, keys]."""
    query = paddle.arange(0, paddle.shape(scores)[2], dtype="int32").unsqueeze(1)
    columns = [column.unsqueeze(2) for column in paddle.unbind(d.startend_row_indices, axis=3)]
    if len(columns) == 1:
        return query >= columns[0]
    if len(columns) == 2 and not d.causal:
        return paddle.logical_or(query >= columns[0], query < columns[1])
    hidden = paddle.logical_and(query >= columns[0], query < columns[1])
    if len(columns) == 4:
        hidden = paddle.logical_or(hidden, paddle.logical_and(query >= columns[2], query < columns[3]))
    return hidden


def _filled_where(condition: Any, value: float, tensor: Any) -> Any:
    """The tensor with `value` where the condition, which broadcasts to it, holds."""
    condition.stop_gradient = True  # legacy programs expand no other bool
    return paddle.where(paddle.expand(condition, paddle.shape(tensor)), paddle.full_like(tensor, value), tensor)


def _masked(scores: Any, mask: Any) -> Any:
    if mask is None:
        return scores
    if paddle.is_floating_point(mask):
        return scores + paddle.cast(mask, scores.dtype)
    return _filled_where(paddle.logical_not(paddle.cast(mask, "bool")), float("-inf"), scores)


def _softmax(scores: Any) -> Any:
    """The softmax, with zeros, not NaN, for a query that may see no key."""
    sees_none = scores.max(axis=-1, keepdim=True) == float("-inf")
    return _filled_where(sees_none, 0.0, F.softmax(_filled_where(sees_none, 0.0, scores)))
