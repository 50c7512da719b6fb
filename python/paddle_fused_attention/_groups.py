"""Communication groups of tensor parallelism: which one is meant, what holds on all its processes, and sums over it."""

from __future__ import annotations

import warnings
from numbers import Integral
from typing import Any, Sequence

import paddle
import paddle.distributed as dist
from paddle.base import core
from paddle.framework import in_dynamic_mode

from ._checks import shown
from ._op import check_tensors
from ._types import Group


def resolve_group(group: Group | None) -> Group | None:
    """The group, or that of all processes for None; None if it has no other process."""
    if group is None:
        if not dist.is_initialized():
            return None
        group = dist.get_group(0)
    if not isinstance(group, dist.communication.group.Group):
        raise TypeError(f"group: expected a group of paddle.distributed.new_group or None, got {type(group).__name__}")
    # Not by group.rank, which is -1 in groups of one too.
    if dist.get_rank() not in group.ranks:
        raise ValueError(
            f"group: expected a group that this process belongs to, got one of ranks {group.ranks} on rank "
            f"{dist.get_rank()}"
        )
    return group if group.nranks > 1 else None


def group_of_ring(ring_id: int, nranks: int | None = None) -> Group | None:
    """The group that Paddle's ``ring_id`` stands for; None for -1, or if it has no other process.

    Raises:
        TypeError: ring_id or nranks is not an int.
        ValueError: There is no such group, this process is not in it, or it does not have `nranks` processes.
    """
    for name, value in (("ring_id", ring_id), ("nranks", 1 if nranks is None else nranks)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}: expected an int, got {shown(value)}")
    group = None
    if ring_id != -1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Paddle warns of what is raised below
            group = dist.get_group(ring_id) if 0 <= ring_id < 2**31 else None
        if group is None:
            raise ValueError(
                f"ring_id: expected -1 or the id of a group of paddle.distributed.new_group, got {shown(ring_id)}"
            )
    size = 1 if group is None else group.nranks
    if nranks is not None and nranks != size:
        raise ValueError(f"nranks: expected {size}, the number of processes of ring_id {ring_id}, got {shown(nranks)}")
    return None if group is None else resolve_group(group)


@paddle.no_grad()
def _all_reduce(tensor: paddle.Tensor, group: Group) -> paddle.Tensor:
    """Sums over the group in place, unseen by autograd, and returns the tensor. gloo's own sums of float16 are
    wrong."""
    data = tensor.detach()
    if group.backend == "GLOO" and data.dtype in (paddle.float16, paddle.bfloat16):
        total = data.astype("float32")
        dist.all_reduce(total, group=group)
        paddle.assign(total.astype(data.dtype), data)
    else:
        dist.all_reduce(data, group=group)
    return tensor


def _with_summed_gradient(tensor: paddle.Tensor | None, group: Group | None) -> paddle.Tensor | None:
    """A tensor that every process uses for its own part, with a gradient that is summed over the group."""
    if tensor is None or group is None or tensor.stop_gradient or not paddle.is_grad_enabled():
        return tensor
    # A new tensor, so that the hook sees the gradient of this use alone. A PyLayer would have to copy it, and reshape
    # to the same shape returns the tensor itself.
    view = tensor.unsqueeze(0).squeeze(0)
    view.register_hook(lambda gradient: _all_reduce(gradient, group))
    return view


def sums_over(group: Group | None) -> dict[str, Any]:
    """The sums of results and of gradients over the group; None: nothing is summed."""
    return {
        # In place: the gradient of every part is that of the sum, and the operator's backward does not read its result.
        "all_reduce": lambda y: y if group is None else _all_reduce(y, group),
        "sum_gradient": lambda tensor: _with_summed_gradient(tensor, group),
    }


def check_dygraph(group: Group | None, names: Sequence[str], tensors: Sequence) -> None:
    """Refuses what can't be summed over the group before the operator runs on any process."""
    if group is None:
        return
    if not in_dynamic_mode():
        raise NotImplementedError(
            "tensor parallelism: expected dygraph, since the sum over the group is taken between operators, got a "
            "static graph"
        )
    check_tensors(names, tensors)


def check_seeds(group: Group) -> None:
    """Refuses different seeds. They would give each process other initial values and dropout masks, which nothing later
    would notice."""
    generator = core.default_cpu_generator()
    if paddle.get_device().startswith("gpu"):
        generator = core.default_cuda_generator(int(paddle.get_device().split(":")[1]))
    seeds: list[paddle.Tensor] = []
    # Halves, because seeds may use all 64 bits.
    seed = generator.initial_seed()
    dist.all_gather(seeds, paddle.to_tensor([seed >> 32, seed & 0xFFFFFFFF], dtype="int64"), group=group)
    found = [(int(high) << 32) | int(low) for high, low in (pair.numpy() for pair in seeds)]
    if len(set(found)) > 1:
        raise ValueError(f"paddle.seed: expected the same seed on every process of the group, got {found}")
