"""The caches of ``paddle.nn.MultiHeadAttention``: keys and values of earlier calls, ``[batch, num_kv_heads, length,
head_dim]`` each.

Those of a Cache come before the ones of the call, whose result has a Cache with both. Those of a StaticCache are all
that there is.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn

from . import _op
from ._block import Block
from ._checks import check_tensor
from ._composed_attention import Composed, Source, composed_attention

Cache = nn.MultiHeadAttention.Cache
StaticCache = nn.MultiHeadAttention.StaticCache


@paddle.jit.not_to_static
def attention_with_cache(block: Block, source: Source, cache: Any) -> Composed:
    """:func:`composed_attention` with a cache or None, and in the result a new one of its kind.

    Raises:
        TypeError, ValueError: See :func:`composed_attention`; or the cache does not fit.
    """
    if cache is None:
        return composed_attention(block, source)
    is_static = isinstance(cache, StaticCache)
    if not is_static and not isinstance(cache, Cache):
        raise TypeError(
            f"cache: expected None or a Cache or StaticCache of paddle.nn.MultiHeadAttention, got "
            f"{type(cache).__name__}"
        )
    names, tensors = ("cache.k", "cache.v"), (cache.k, cache.v)
    for name, tensor in zip(names, tensors):
        check_tensor(name, tensor, required=True)
    _op.check_tensors(names, tensors)
    composed = composed_attention(block, source._replace(cache=tensors, is_static=is_static))
    return composed._replace(cache=type(cache)(*composed.cache))
