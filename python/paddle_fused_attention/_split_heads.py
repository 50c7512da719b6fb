"""The attention block with its heads spread over processes. The operator gives each process its heads' part of a sum,
and what comes after the sum is an operator of its own.

The processes are those of a communication group, or of one dimension of a mesh in Paddle's auto-parallel engine.
"""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import paddle
import paddle.distributed as dist

from . import _op
from ._amp import without_auto_cast
from ._block import Block
from ._ordinary_ops import attention_before_tail, result_dtype
from ._ordinary_parts import is_auto_parallel
from ._residual_norm import residual_norm, residual_tail, tail_of


def mesh_axis_of_heads(x: Any, qkv_weight: Any) -> int | None:
    """The dimension of the mesh over which an auto-parallel weight [3, num_heads, head_dim, embed_dim] is sharded by
    heads, in dygraph; None if there is none.

    Raises:
        NotImplementedError: A tensor is auto-parallel on Paddle 2, whose custom operators take no such tensors.
    """
    if not is_auto_parallel(x, qkv_weight):
        return None
    if qkv_weight.is_dist() and len(qkv_weight.shape) == 4:
        for axis, placement in enumerate(qkv_weight.placements):
            if placement.is_shard(1):
                return axis
    return None


def attention_over_mesh(block: Block, axis: int) -> Any:
    """Computes a checked block whose qkv_weight is sharded by heads over dimension `axis` of its mesh, and the other
    tensors accordingly."""
    mesh = block.qkv_weight.process_mesh
    size = mesh.shape[axis]
    total_heads = block.qkv_weight.shape[1]
    if total_heads % size:
        raise ValueError(
            f"qkv_weight: expected a multiple of the mesh's {size} processes as its number of heads, got {total_heads}"
        )
    position = np.argwhere(np.array(mesh.process_ids).reshape(mesh.shape) == dist.get_rank())
    # A process outside the mesh computes nothing.
    first_head = 0 if len(position) == 0 else int(position[0][axis]) * (total_heads // size)

    def all_reduce(y: Any) -> Any:
        placements = [dist.Replicate() if placement.is_partial() else placement for placement in y.placements]
        return dist.reshard(y, y.process_mesh, placements)

    return attention_over_processes(block, first_head, total_heads, all_reduce)


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
    own heads, and returns it with a gradient that is summed. A seed of the block fixes the masks of the attention.
    `key_value` are a key and a value other than x, which the operator does not serve.
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
    y = attention_before_tail(
        part, key_value if sum_gradient is None else tuple(map(sum_gradient, key_value)), first_head, total_heads
    )
    dtype = result_dtype(block.x)
    with without_auto_cast():
        return residual_tail(tail_of(block, all_reduce(y)), dtype)
