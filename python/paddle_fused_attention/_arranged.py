"""What an arranged weight looks like, and who can't take one. `arranging.py` makes them.

A weight W ``[in, out]`` becomes panels ``[out / 32, in, 32]`` of its columns; of bfloat16, whose products take two
numbers of a column at once, ``[out / 32, in / 2, 32, 2]``. The tensor keeps the weight's shape with ``[1, 1]`` behind
it; of bfloat16 ``in`` is halved, and ``[2, 1]`` stand behind. So the operators know such a weight, and nothing that
multiplies by plain ones takes it for one.
"""

from __future__ import annotations

from typing import Any, Sequence

import paddle

COLUMNS = 32


def can_be_arranged(shape: Sequence[int], in_axis: int) -> bool:
    columns = 1
    for size in shape:
        columns *= size
    columns //= max(1, shape[in_axis])
    return columns > 0 and columns % COLUMNS == 0 and shape[in_axis] > 0 and shape[in_axis] % COLUMNS == 0


def _numbers(weight: Any) -> int:
    return 2 if weight.dtype == paddle.bfloat16 else 1


def arranged(weight: Any, in_axis: int) -> Any:
    """The weight in the kernels' order. `in_axis` is its first dimension or its last."""
    shape, numbers = list(weight.shape), _numbers(weight)
    size = shape[in_axis]
    matrix = weight.reshape([size, -1]) if in_axis == 0 else weight.reshape([-1, size]).transpose([1, 0])
    panels = matrix.reshape([size // numbers, numbers, -1, COLUMNS]).transpose([2, 0, 3, 1])
    shape[in_axis] = size // numbers
    return panels.reshape([*shape, numbers, 1])


def plain(weight: Any, in_axis: int) -> Any:
    """The inverse of :func:`arranged`; `in_axis` is that of the plain weight."""
    shape, numbers = list(weight.shape[:-2]), _numbers(weight)
    shape[in_axis] *= numbers
    size = shape[in_axis]
    panels = weight.reshape([-1, size // numbers, COLUMNS, numbers])
    matrix = panels.transpose([1, 3, 0, 2]).reshape([size, -1])
    return (matrix if in_axis == 0 else matrix.transpose([1, 0])).reshape(shape)


def check_plain(name: str, weight: Any, rank: int = 2) -> None:
    """Refuses an arranged weight where ordinary ops, or operators for parts of a block, compute.

    Raises:
        NotImplementedError: It is one.
    """
    if weight is not None and len(weight.shape) > rank:
        raise NotImplementedError(
            f"{name}: expected a plain weight here, got one that arrange_weights has arranged, which serves "
            "self-attention without a cache or attention weights, and feed-forward, by their operators; "
            "restore_weights(model) first"
        )


def check_all_plain(what: str, parameters: Sequence[Any]) -> None:
    """
    Raises:
        RuntimeError: One of the parameters is arranged.
    """
    for parameter in parameters:
        if getattr(parameter, "plain_axis", None) is not None:
            raise RuntimeError(
                f"{what}: expected plain weights, got {parameter.name}, which arrange_weights has arranged; "
                "restore_weights(model) first"
            )
