"""The caches of ``paddle.nn.MultiHeadAttention``: keys and values of earlier calls, ``[batch, num_kv_heads, length,
head_dim]`` each.

Those of a Cache come before the ones of the call, whose result has a Cache with both. Those of a StaticCache are all
that there is.
"""

from __future__ import annotations

from typing import Any

from paddle import nn

from . import _op
from ._block import Block
from ._checks import check_tensor
from ._composed_attention import Composed, Source, check_like, composed_attention, weights_of

Cache = nn.MultiHeadAttention.Cache
StaticCache = nn.MultiHeadAttention.StaticCache


def attention_with_cache(block: Block, source: Source, cache: Any, name: str = "cache") -> Composed:
    """:func:`composed_attention` with a cache, which is None or what errors call `name`, and in the result a new one of
    its kind.

    Raises:
        TypeError, ValueError: See :func:`composed_attention`; or the cache does not fit.
    """
    if cache is None:
        return composed_attention(block, source)
    is_static = isinstance(cache, StaticCache)
    if not is_static and not isinstance(cache, Cache):
        raise TypeError(
            f"{name}: expected None or a Cache or StaticCache of paddle.nn.MultiHeadAttention, got "
            f"{type(cache).__name__}"
        )
    names, tensors = (f"{name}.k", f"{name}.v"), (cache.k, cache.v)
    for tensor_name, tensor in zip(names, tensors):
        check_tensor(tensor_name, tensor, required=True)
    _op.check_tensors(names, tensors)
    weights, counts = weights_of(block, source)
    expected = [block.x.shape[0], counts[1], "length", weights[0].shape[1]]
    # Beside 16-bit projections of a float32 x they are of 16 bits too.
    check_like(names[0], cache.k, expected, block.x, "query", any_float=cache.k.dtype == weights[0].dtype)
    check_like(names[1], cache.v, list(cache.k.shape), cache.k, names[0])
    composed = composed_attention(block, source._replace(cache=tensors, is_static=is_static))
    return composed._replace(cache=type(cache)(*composed.cache))
