"""The attention block with its heads spread over processes. The operator gives each process its heads' part of a sum,
and what comes after the sum is an operator of its own.

The processes are those of a communication group, or of one dimension of a mesh in Paddle's auto-parallel engine.
"""

from __future__ import annotations

from typing import Any, Callable

import paddle

from . import _op
from ._block import Block
from ._composed_attention import Source, composed_before_tail, with_tail
from ._meshes import first_of_process, mesh_axis_of, sum_over_mesh
from ._residual_norm import residual_norm, tail_of


def attention_over_mesh(block: Block) -> Any:
    """Computes a checked block of auto-parallel tensors. Where qkv_weight is sharded by heads over a dimension of its
    mesh, every process computes its own heads."""
    weight = block.qkv_weight
    axis = mesh_axis_of(weight, 4, 1)
    if axis is None:
        return _op.fused_attention(block)
    total_heads = weight.shape[1]
    first_head = first_of_process("qkv_weight", weight, axis, total_heads, "heads")
    return attention_over_processes(block, first_head, total_heads, sum_over_mesh)


@paddle.jit.not_to_static
def attention_over_processes(
    block: Block,
    first_head: int,
    total_heads: int,
    all_reduce: Callable,
    sum_gradient: Callable | None = None,
    key_value: tuple | None = None,
) -> Any:
    """Computes a checked block whose weights and mask hold the heads from `first_head` on of `total_heads`.

    `all_reduce` sums over the processes. `sum_gradient`, if given, takes each tensor that all processes use for their
    own heads, and returns it with a gradient that is summed. A seed of the block fixes both dropouts' masks.
    `key_value` are a key and a value other than x.
    """
    # Bias, dropout, residual and final layer norm come once, after the sum.
    part = block._replace(
        linear_bias=None, ln_scale=None, ln_bias=None, dropout_rate=0.0, add_residual=False, final_layer_norm=False
    )
    if sum_gradient is not None:
        part = part._replace(
            **{name: sum_gradient(getattr(part, name)) for name in ("x", "pre_ln_scale", "pre_ln_bias")}
        )
    if key_value is None:
        return residual_norm(tail_of(block, all_reduce(_op.fused_attention(part, first_head, total_heads))))
    source = Source(*(key_value if sum_gradient is None else map(sum_gradient, key_value)))
    return with_tail(block, all_reduce(composed_before_tail(part, source, first_head, total_heads)))
