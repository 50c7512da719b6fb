"""Tensors of Paddle's auto-parallel engine, in dygraph: what of a block is spread over a dimension of their mesh."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist


def is_auto_parallel(*tensors: Any) -> bool:
    """Whether one of the tensors is auto-parallel. They may be None.

    Raises:
        NotImplementedError: There is one on Paddle 2, whose custom operators take no such tensors.
    """
    try:
        for tensor in tensors:
            if tensor is not None and tensor.is_dist():
                break
        else:
            return False
    except AttributeError:  # a variable of a static graph on Paddle 2, which the operator's call refuses
        return False
    if paddle.__version__.startswith("2."):
        raise NotImplementedError(
            f"x: expected ordinary tensors, since auto-parallel ones need Paddle 3, got them on {paddle.__version__}"
        )
    return True


def mesh_axis_of(weight: Any, rank: int, dimension: int) -> int | None:
    """The dimension of the mesh over which a dimension of a weight of that rank is sharded; None if there is none."""
    if weight.is_dist() and len(weight.shape) == rank:
        for axis, placement in enumerate(weight.placements):
            if placement.is_shard(dimension):
                return axis
    return None


def first_of_process(name: str, weight: Any, axis: int, count: int, what: str) -> int:
    """Of `count` parts of a weight, spread over dimension `axis` of its mesh, the first that this process has; 0 for a
    process outside the mesh, which computes nothing.

    Raises:
        ValueError: They can't be spread evenly; the error calls the weight `name` and its parts `what`.
    """
    mesh = weight.process_mesh
    size = mesh.shape[axis]
    if count % size:
        raise ValueError(
            f"{name}: expected a multiple of the mesh's {size} processes as its number of {what}, got {count}"
        )
    position = np.argwhere(np.array(mesh.process_ids).reshape(mesh.shape) == dist.get_rank())
    return 0 if len(position) == 0 else int(position[0][axis]) * (count // size)


def sum_over_mesh(y: Any) -> Any:
    """The sum of which every process has a part."""
    placements = [dist.Replicate() if placement.is_partial() else placement for placement in y.placements]
    return dist.reshard(y, y.process_mesh, placements)
