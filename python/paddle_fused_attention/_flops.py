"""Lets paddle.flops count the fused layers. Layers that Paddle doesn't know count as zero."""

from __future__ import annotations

import math
from typing import Any

from paddle.hapi.dynamic_flops import register_hooks

from . import incubate
from .layer import FusedMultiHeadAttention


def count_flops(layer: Any, inputs: Any, output: Any) -> None:
    """Adds the multiply-accumulates of one call to ``layer.total_ops``, as Paddle counts its Linear.

    They are those of the four projections and of both products of attention. A causal layer counts only the pairs of a
    query and a key that it may see. For a subclass: ``paddle.flops(net, size, custom_ops={Subclass: count_flops})``.

    Args:
        layer: The layer, with a ``total_ops``, as paddle.flops makes it.
        inputs: The layer's arguments, of which the first is ``[batch, seq_len, embed_dim]``.
        output: Not used.
    """
    batch, seq_len, embed_dim = inputs[0].shape
    pairs = seq_len * (seq_len + 1) // 2 if getattr(layer, "causal", False) else seq_len * seq_len
    layer.total_ops += batch * embed_dim * (4 * seq_len * embed_dim + 2 * pairs)


def _count_feed_forward(layer: Any, inputs: Any, output: Any) -> None:
    """Those of both projections."""
    layer.total_ops += 2 * math.prod(inputs[0].shape) * layer._linear2_weight.shape[0]


def _count_linear(layer: Any, inputs: Any, output: Any) -> None:
    layer.total_ops += math.prod(inputs[0].shape) * layer.weight.shape[0 if layer.transpose_weight else 1]


for _layer in (FusedMultiHeadAttention, incubate.FusedMultiHeadAttention):
    register_hooks[_layer] = count_flops
register_hooks[incubate.FusedFeedForward] = _count_feed_forward
register_hooks[incubate.FusedLinear] = _count_linear
