"""The masks of the operator's dropout, for ordinary ops that must drop the same elements. The operator itself makes
them, in dygraph."""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np
import paddle
from paddle.base import core

from . import _op
from ._amp import without_auto_cast
from ._block import Block

_WIDEST_HEAD = 64


def generator_of(x: paddle.Tensor) -> Any:
    """Paddle's generator of a tensor's device, which the operator draws from."""
    return (
        core.default_cpu_generator() if x.place.is_cpu_place() else core.default_cuda_generator(x.place.gpu_device_id())
    )


@paddle.no_grad()
def _operator_result(block: Block, x: Any, qkv_weight: Any, linear_weight: Any, **others: Any) -> paddle.Tensor:
    """The operator's result for other tensors with a block's seed, without residual and final layer norm."""
    with without_auto_cast():
        inner = Block(
            x, qkv_weight, linear_weight, **others, seed=block.seed, add_residual=False, final_layer_norm=False
        )
        return _op.fused_attention(inner)


def kept_scores(block: Block, shape: Sequence[int], first_head: int = 0, total_heads: int = 0) -> paddle.Tensor | None:
    """The probabilities that the operator's dropout keeps, as bool [batch, num_heads, queries, keys]; None if it keeps
    all.

    The mask is of the heads from `first_head` on of `total_heads`. The generator moves on as by one call. The operator
    gets equal scores, and rows of the identity for values, so that its heads' outputs show what dropout keeps.
    """
    rate, like = block.attn_dropout_rate, block.x
    if rate == 0.0 or 0 in shape:
        return None
    batch, num_heads, queries, keys = shape
    heads = total_heads or num_heads
    tokens = max(queries, keys)
    width = min(keys, _WIDEST_HEAD)
    embed_dim = heads * width
    weight = np.zeros((3, heads, width, embed_dim), "float32")
    weight[2] = np.eye(embed_dim, dtype="float32").reshape(heads, width, embed_dim)
    weight, linear_weight = (
        paddle.to_tensor(array, place=like.place) for array in (weight, np.eye(embed_dim, dtype="float32"))
    )
    state = generator_of(like).get_state()
    parts = []
    for start in range(0, keys, width):
        x = np.zeros((batch, tokens, heads, width), "float32")
        for column in range(min(width, keys - start)):
            x[:, start + column, :, column] = 1.0
        generator_of(like).set_state(state)
        x = paddle.to_tensor(x.reshape(batch, tokens, embed_dim), place=like.place)
        out = _operator_result(block, x, weight, linear_weight, attn_dropout_rate=rate)
        parts.append((out > 0.0).reshape([batch, tokens, heads, width]))
    kept = paddle.concat(parts, axis=-1).transpose([0, 2, 1, 3])
    return kept[:, first_head : first_head + num_heads, :queries, :keys]


def kept_output(block: Block) -> paddle.Tensor:
    """The elements of the output projection that the operator's dropout keeps, as bool. The generator moves on as by
    one call."""
    x = block.x
    embed_dim = x.shape[-1]
    zeros = [paddle.zeros(shape, "float32") for shape in (x.shape, block.qkv_weight.shape, [embed_dim, embed_dim])]
    tensors = [tensor._copy_to(x.place, True) for tensor in (*zeros, paddle.ones([embed_dim], "float32"))]
    rates = {"dropout_rate": block.dropout_rate, "attn_dropout_rate": block.attn_dropout_rate}
    inputs, weight, linear_weight, linear_bias = tensors
    return _operator_result(block, inputs, weight, linear_weight, linear_bias=linear_bias, **rates) > 0.0
