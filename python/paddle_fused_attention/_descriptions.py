"""Checks of the fields of a description: a named tuple of tensors, numbers, switches and settings, in this order, that
a function or a layer makes of the user's arguments."""

from __future__ import annotations

from typing import Any, get_args

import paddle
from paddle.base.framework import EagerParamBase

from ._checks import INFINITY, check_number, check_seed, check_switches, check_tensor, shown
from ._types import Mode

MODES: tuple[Mode, ...] = get_args(Mode)
_NONE = type(None)
USUAL_TYPES = frozenset((_NONE, paddle.Tensor, EagerParamBase))
_BOOL = frozenset((bool,))


def checked_fields(description: Any, required: int, of_numbers: slice, of_switches: slice) -> Any:
    """The description with floats for numbers, bools for switches and an int for the seed.

    Args:
        description: It has a `mode` and a `seed`.
        required: How many of its tensors, the first, must not be None.
        of_numbers: Where its numbers stand. Rates, whose names say so, are at most 1.
        of_switches: Where its switches stand.

    Raises:
        TypeError, ValueError: A field is of the wrong type, or a number is out of its range.
    """
    # Each check tries the usual types first, to keep a call in dygraph at a few microseconds.
    changes: dict[str, Any] = {}
    types = tuple(map(type, description[: of_numbers.start]))
    if not USUAL_TYPES.issuperset(types) or _NONE in types[:required]:
        for i, value in enumerate(description[: of_numbers.start]):
            check_tensor(description._fields[i], value, required=i < required)
    for value in description[of_numbers]:
        if type(value) is not float or not 0.0 <= value <= 1.0:
            for name, number in zip(description._fields[of_numbers], description[of_numbers]):
                changes[name] = check_number(name, number, 0.0, 1.0 if name.endswith("_rate") else INFINITY)
            break
    mode, seed = description.mode, description.seed
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"mode: expected {MODES[0]!r} or {MODES[1]!r}, got {shown(mode)}")
    if seed is not None and check_seed("seed", seed) is not seed:
        changes["seed"] = int(seed)
    if not _BOOL.issuperset(map(type, description[of_switches])):
        named = dict(zip(description._fields[of_switches], description[of_switches]))
        check_switches(**named)
        changes.update((name, bool(value)) for name, value in named.items())
    return description._replace(**changes) if changes else description


def without_fields(description: Any, first: str, last: str) -> Any:
    """The description with None for the fields from `first` to `last`, in a fraction of the time that _replace
    takes."""
    start, stop = description._fields.index(first), description._fields.index(last) + 1
    return description._make((*description[:start], *[None] * (stop - start), *description[stop:]))
