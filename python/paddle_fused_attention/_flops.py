"""Lets paddle.flops count the fused layers. Layers that Paddle doesn't know count as zero."""

from __future__ import annotations

import math
from typing import Any

import paddle
from paddle.hapi.dynamic_flops import register_hooks

from . import incubate
from ._caches import StaticCache
from ._checks import shown
from .layer import FusedMultiHeadAttention


def count_flops(layer: Any, inputs: Any, output: Any) -> None:
    """Adds the multiply-accumulates of one call to ``layer.total_ops``, as Paddle counts its Linear.

    They are those of the four projections and of both products of attention, of which only the pairs of a query and a
    key that it may see by its place are counted. For a subclass:
    ``paddle.flops(net, size, custom_ops={Subclass: count_flops})``.

    Args:
        layer: The layer, with a ``total_ops``, as paddle.flops makes it.
        inputs: The layer's arguments by position: query, and where they are given key, value, mask, cache and
            cu_seqlens.
        output: Not used.

    Raises:
        TypeError: layer is no fused attention, or inputs are no tuple that begins with a Tensor.
        ValueError: The query has another rank, or is packed and there is no cu_seqlens among the arguments.
    """
    if not isinstance(layer, (FusedMultiHeadAttention, incubate.FusedMultiHeadAttention)):
        raise TypeError(f"layer: expected a FusedMultiHeadAttention, got {type(layer).__name__}")
    if not isinstance(inputs, (tuple, list)) or not inputs or not isinstance(inputs[0], paddle.Tensor):
        raise TypeError(f"inputs: expected a tuple that begins with a Tensor, got {shown(inputs)}")
    given: Any = [*inputs, *[None] * 6]
    query, key, value, _, cache, starts = given[:6]
    if len(query.shape) not in (2, 3):
        raise ValueError(f"inputs: expected a query of 2 or 3 dimensions, got shape {list(query.shape)}")
    embed_dim = query.shape[-1]
    if len(query.shape) == 2:
        if starts is None:
            raise ValueError(f"cu_seqlens: expected a Tensor beside a query of shape {list(query.shape)}, got none")
        bounds = starts.tolist()
        lengths = [(end - begin, end - begin) for begin, end in zip(bounds, bounds[1:])]
        batch, queries = 1, query.shape[0]
    else:
        batch, queries, _ = query.shape
        lengths = []
    heads_dim = embed_dim // layer.num_heads * (getattr(layer, "num_kv_heads", None) or layer.num_heads)
    keys, widths = queries, 2 * embed_dim
    if isinstance(cache, StaticCache):
        keys, widths = 0, 0
    elif key is not None or value is not None:
        key, value = (query if tensor is None else tensor for tensor in (key, value))
        keys, widths = key.shape[1], key.shape[2] + value.shape[2]
    projections = 2 * queries * embed_dim * embed_dim + keys * widths * heads_dim
    if cache is not None:
        keys += (cache.k if hasattr(cache, "k") else cache[0]).shape[2]
    pairs = sum(_seen_pairs(layer, *pair) for pair in lengths or [(queries, keys)])
    layer.total_ops += batch * (projections + 2 * embed_dim * pairs)


def _seen_pairs(layer: Any, queries: int, keys: int) -> int:
    """How many pairs of a query and a key see each other by their places, which are aligned at the end."""
    left, right = getattr(layer, "window_size", None) or (-1, -1)
    if getattr(layer, "causal", False):
        right = 0
    seen = 0
    for place in range(keys - queries, keys):
        first = max(0, place - left) if left >= 0 else 0
        last = min(keys - 1, place + right) if right >= 0 else keys - 1
        seen += max(0, last - first + 1)
    return seen


def _count_feed_forward(layer: Any, inputs: Any, output: Any) -> None:
    """Those of both projections."""
    layer.total_ops += 2 * math.prod(inputs[0].shape[:-1]) * math.prod(layer._linear2_weight.shape)


def _count_linear(layer: Any, inputs: Any, output: Any) -> None:
    layer.total_ops += math.prod(inputs[0].shape) * layer.weight.shape[0 if layer.transpose_weight else 1]


for _layer in (FusedMultiHeadAttention, incubate.FusedMultiHeadAttention):
    register_hooks[_layer] = count_flops
register_hooks[incubate.FusedFeedForward] = _count_feed_forward
register_hooks[incubate.FusedLinear] = _count_linear
