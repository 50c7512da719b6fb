"""The attention block where a process holds a part of the heads only: the operator gives their part of a sum over processes, and what
comes after the sum is made of Paddle's ordinary ops.

The processes are those of a communication group, or of one dimension of a mesh in Paddle's auto-parallel engine.
"""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.framework import in_dynamic_mode

from . import _op
from ._composed import attention_part, residual_tail, result_dtype, without_auto_cast


def mesh_axis_of_heads(x: Any, qkv_weight: Any) -> int | None:
    """The mesh's dimension that an auto-parallel weight [3, num_heads, head_dim, embed_dim] is sharded over by heads; None: none.

    Raises:
        NotImplementedError: A tensor of the auto-parallel engine on Paddle 2, whose custom operators take none.
    """
    if not in_dynamic_mode():
        return None
    try:
        if not (x.is_dist() or qkv_weight.is_dist()):
            return None
    except AttributeError:  # a variable of a static graph on Paddle 2, which the operator's call refuses
        return None
    if paddle.__version__.startswith("2."):
        raise NotImplementedError(
            f"x: expected ordinary tensors, since auto-parallel ones need Paddle 3, got them on {paddle.__version__}"
        )
    if qkv_weight.is_dist() and len(qkv_weight.shape) == 4:
        for axis, placement in enumerate(qkv_weight.placements):
            if placement.is_shard(1):
                return axis
    return None


def attention_over_mesh(inputs: Sequence[Any], *, axis: int, **arguments: Any) -> Any:
    """The block with a weight that is sharded by heads over dimension `axis` of its mesh; the others are sharded as that asks for."""
    qkv_weight = inputs[1]
    mesh = qkv_weight.process_mesh
    size = mesh.shape[axis]
    total_heads = qkv_weight.shape[1]
    if total_heads % size:
        raise ValueError(
            f"qkv_weight: expected a multiple of the mesh's {size} processes as its number of heads, got {total_heads}"
        )
    position = np.argwhere(np.array(mesh.process_ids).reshape(mesh.shape) == dist.get_rank())
    # A process outside the mesh computes nothing.
    first_head = 0 if len(position) == 0 else int(position[0][axis]) * (total_heads // size)

    def add_up(y: Any) -> Any:
        placements = [dist.Replicate() if placement.is_partial() else placement for placement in y.placements]
        return dist.reshard(y, y.process_mesh, placements)

    return attention_of_part(inputs, first_head=first_head, total_heads=total_heads, add_up=add_up, **arguments)


@paddle.jit.not_to_static
def attention_of_part(
    inputs: Sequence[Any],
    *,
    first_head: int,
    total_heads: int,
    add_up: Any,
    share: Any = None,
    keys: tuple | None = None,
    draw: Any = None,
    pre_layer_norm: bool,
    numbers: tuple[float, float, float, float],
    training: bool,
    mode: str,
    final_layer_norm: bool,
    add_residual: bool,
    causal: bool,
    seed: int | None,
) -> Any:
    """:func:`fused_multi_head_attention` with weights that hold the heads from `first_head` on of `total_heads`.

    `inputs` are those of the operator, the mask that of these heads; `numbers` what check_arguments returns. `add_up` sums what the
    processes have; `share`, if given, is what a tensor goes through that all of them use for their own heads. `seed` fixes the masks of
    the attention. `keys` are a key and a value other than x, which the operator does not serve, and `draw` as for ``attention_part``.
    """
    x, qkv_weight, linear_weight, pre_ln_scale, pre_ln_bias, ln_scale, ln_bias, qkv_bias, linear_bias, attn_mask = inputs
    pre_ln_epsilon, ln_epsilon, dropout_rate, attn_dropout_rate = numbers
    switches = _op.UPSCALE_IN_TRAIN if mode == "upscale_in_train" else 0
    used = [x, pre_ln_scale, pre_ln_bias] if pre_layer_norm else [x, None, None]
    if share is not None:
        used = [share(tensor) for tensor in used]
    if pre_layer_norm:
        switches |= _op.PRE_LAYER_NORM
    if causal:
        switches |= _op.CAUSAL
    if seed is not None:
        switches |= _op.FIXED_SEED
    # Not in the operator: bias, dropout, residual and final layer norm come once, after the sum.
    part = (used[0], qkv_weight, linear_weight, used[1], used[2], None, None, qkv_bias, None, attn_mask)
    if keys is None:
        y = _op.fused_attention(
            part,
            is_test=not training,
            switches=switches,
            numbers=(pre_ln_epsilon, ln_epsilon, 0.0, attn_dropout_rate),
            seed=0 if seed is None else int(seed),
            first_head=first_head,
            total_heads=total_heads,
        )
        dtype = y.dtype
    else:
        y = attention_part(
            part,
            keys if share is None else tuple(map(share, keys)),
            pre_layer_norm=pre_layer_norm,
            numbers=numbers,
            training=training,
            mode=mode,
            causal=causal,
            draw=draw,
            first_head=first_head,
            total_heads=total_heads,
        )
        dtype = result_dtype(x)
    with without_auto_cast():
        return residual_tail(
            x,
            add_up(y),
            linear_bias,
            ln_scale,
            ln_bias,
            ln_epsilon,
            dropout_rate=dropout_rate,
            training=training,
            mode=mode,
            add_residual=add_residual,
            final_layer_norm=final_layer_norm,
            dtype=dtype,
        )
