"""What an arranged weight looks like, and who can't take one. `arranging.py` makes them.

A weight W ``[in, out]`` becomes panels ``[out / 32, in, 32]`` of its columns; of bfloat16, whose products take two
numbers of a column at once, ``[out / 32, in / 2, 32, 2]``. The tensor keeps the weight's shape with ``[1, 1]`` behind
it; of bfloat16 ``in`` is halved, and ``[2, 1]`` stand behind. So the operators know such a weight, and nothing that
multiplies by plain ones takes it for one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Sequence

import paddle

COLUMNS = 32


def can_be_arranged(shape: Sequence[int], in_axis: int) -> bool:
    size, total = shape[in_axis], math.prod(shape)
    return total > 0 and size % COLUMNS == 0 and total // size % COLUMNS == 0


def arranged(weight: Any, in_axis: int) -> Any:
    """The weight in the kernels' order. `in_axis` is its first dimension or its last."""
    shape, numbers = list(weight.shape), 2 if weight.dtype == paddle.bfloat16 else 1
    size = shape[in_axis]
    matrix = weight.reshape([size, -1]) if in_axis == 0 else weight.reshape([-1, size]).transpose([1, 0])
    panels = matrix.reshape([size // numbers, numbers, -1, COLUMNS]).transpose([2, 0, 3, 1])
    shape[in_axis] = size // numbers
    return panels.reshape([*shape, numbers, 1])


def plain(weight: Any, in_axis: int) -> Any:
    """The inverse of :func:`arranged`, also of what was cast since; `in_axis` is that of the plain weight."""
    shape, numbers = plain_shape(weight, in_axis), weight.shape[-2]
    size = shape[in_axis]
    panels = weight.reshape([-1, size // numbers, COLUMNS, numbers])
    matrix = panels.transpose([1, 3, 0, 2]).reshape([size, -1])
    return (matrix if in_axis == 0 else matrix.transpose([1, 0])).reshape(shape)


def is_arranged(weight: Any) -> bool:
    """Whether a weight ``[in, out]``, or ``[out, in]``, is arranged. Others of its block are then too."""
    return len(weight.shape) > 2


def plain_shape(weight: Any, in_axis: int) -> list:
    """The shape that an arranged weight has plain. `in_axis` is its first dimension or its last."""
    *shape, numbers, _ = weight.shape
    shape[in_axis] = shape[in_axis] * numbers if shape[in_axis] >= 0 else -1
    return shape


def rows_of(weight: Any, first: int, end: int) -> Any:
    """Rows of an arranged weight ``[out, in]``.

    Raises:
        NotImplementedError: They are not whole panels.
    """
    if first % COLUMNS or end % COLUMNS:
        raise NotImplementedError(
            "qkv_weight: expected a plain weight here, got one that arrange_weights has arranged, of which rows "
            f"{first} to {end} do not begin and end with multiples of {COLUMNS}; restore_weights(model) first"
        )
    return weight[first:end]


def check_plain(name: str, weight: Any) -> None:
    """Refuses an arranged weight ``[in, out]`` where ordinary ops compute.

    Raises:
        NotImplementedError: It is one.
    """
    if weight is not None and is_arranged(weight):
        raise NotImplementedError(
            f"{name}: expected a plain weight here, got one that arrange_weights has arranged, which serves the "
            "operators; restore_weights(model) first"
        )


class Mark(NamedTuple):
    """What a layer remembers of a parameter that is arranged. Unlike a parameter's attributes it is in pickles too."""

    in_axis: int
    stop_gradient: bool
    shape: list  # as it is arranged; a parameter of another shape has taken its place


def marks_of(layer: Any) -> dict[str, Mark]:
    """Those of the layer's own parameters, by name."""
    marks = layer.__dict__.get("_arranged_weights", {})
    found = {name: layer._parameters.get(name) for name in marks}
    return {name: marks[name] for name, p in found.items() if p is not None and list(p.shape) == marks[name].shape}


def set_marks(layer: Any, marks: dict[str, Mark]) -> None:
    layer.__dict__["_arranged_weights"] = marks


def check_all_plain(what: str, model: Any) -> None:
    """
    Raises:
        RuntimeError: A parameter of the model is arranged.
    """
    for layer in model.sublayers(include_self=True):
        for name in marks_of(layer):
            raise RuntimeError(
                f"{what}: expected plain weights, got the {name} of a {type(layer).__name__}, which arrange_weights "
                "has arranged; restore_weights(model) first"
            )
