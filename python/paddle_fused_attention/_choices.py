"""The user's options for what a checkpoint can't always tell: heads, the layer norm's place, and the layout of weights.

An option is refused if nothing asks for it or if it contradicts shapes. So is one number of heads, or one place of the
norm, for blocks that may differ in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Iterable

import numpy as np

from ._checks import one_line, shown
from ._namings import LAYOUTS, NamedBlock, Signs, layout_by_shapes
from ._types import Layout


class CheckpointError(Exception):
    """What is wrong with a checkpoint or a request, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def check_layout(argument: str, layout: Layout | None) -> None:
    if layout is not None and not (isinstance(layout, str) and layout in LAYOUTS):
        raise CheckpointError(f"{argument}: expected {' or '.join(LAYOUTS)}, got {shown(layout)}")


def shown_layout(layout: Layout) -> str:
    return "[in, out]" if layout == "in-out" else "[out, in]"


def check_patterns(num_heads: Any, names: Iterable[str]) -> None:
    """Refuses a pattern that fits no block's name."""
    names = list(names)
    for pattern in num_heads if isinstance(num_heads, Mapping) else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CheckpointError(f"--num-heads: there is no block with a name like {pattern!r}")


def heads_of(num_heads: int | Mapping[str, int], arrays: dict[Any, Any], blocks: list[NamedBlock]) -> dict[str, int]:
    widths = {block.name: arrays[block.names("weight")[-1]].shape[0] for block in blocks}
    if isinstance(num_heads, Mapping):
        heads: dict[str, int] = {}
        for pattern, count in num_heads.items():
            for name in widths:
                if fnmatchcase(name, pattern):
                    heads.setdefault(name, count)
        for name in widths:
            if name not in heads:
                patterns = ", ".join(map(repr, num_heads))
                raise CheckpointError(f"--num-heads: expected a pattern that fits {name}, got {patterns}")
    else:
        heads = dict.fromkeys(widths, num_heads)
        first = next(iter(widths))
        for name, width in widths.items():
            if width != widths[first]:
                raise CheckpointError(
                    f"--num-heads: expected a number for each width, as PATTERN=H, since {first} is {widths[first]} "
                    f"wide and {name} is {width}; got {num_heads}"
                )
    for name, width in widths.items():
        count = heads[name]
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1 or width % count:
            raise CheckpointError(
                f"--num-heads: expected a divisor of {width}, the width of {name}, got {shown(count)}"
            )
    return heads


def orders_of(normalize_before: bool | None, blocks: list[NamedBlock], signs: Signs) -> dict[str, bool]:
    """Whether the layer norm stands before the attention, by name, for the blocks that are packed with it."""
    if normalize_before is not None and not isinstance(normalize_before, (bool, np.bool_)):
        raise CheckpointError(f"normalize_before: expected a bool or None, got {shown(normalize_before)}")
    option = f"--normalize-{'before' if normalize_before else 'after'}"
    told = {block.name: signs.normalize_before(block.prefix, block.naming) for block in blocks if not block.only_qkv}
    open_ones = [name for name, order in told.items() if order is None]
    if normalize_before is None and open_ones:
        raise CheckpointError(
            f"{open_ones[0]}: nothing tells whether its layer norm stands before the attention or after the residual: "
            "--normalize-before or --normalize-after is needed"
        )
    if normalize_before is not None and not open_ones:
        name = blocks[0].name
        why = f"has it {'before' if told[name] else 'after'}, by its names" if name in told else "is packed without it"
        raise CheckpointError(
            f"{option}: expected a block whose names don't tell the layer norm's place, found none: {name} {why}"
        )
    stacks = sorted({re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in open_ones})
    if len(stacks) > 1:
        raise CheckpointError(
            f"{option}: expected one stack of layers, found {stacks[0]} and {stacks[1]}, which may differ: pack them "
            "one after the other, by --names"
        )
    return {name: bool(normalize_before if order is None else order) for name, order in told.items()}


def layout_of(arrays: dict[Any, Any], block: NamedBlock, layout: Layout | None, file_layout: Layout | None) -> Layout:
    told = layout_by_shapes(arrays, block, arrays[block.names("weight")[-1]].shape[0])
    by_shape = set(told.values())
    name, naming = next(iter(told), ""), block.naming
    if len(by_shape) > 1:
        other = next(other for other in told if told[other] != told[name])
        raise CheckpointError(
            f"{block.name}: by their shapes {name} is stored {shown_layout(told[name])} and {other} "
            f"{shown_layout(told[other])}"
        )
    seen = f"by its shape {name} is stored {shown_layout(told[name])}" if told else ""
    if layout is not None and told and layout != told[name]:
        raise CheckpointError(f"--layout {layout}: {seen}")
    if naming.fixed_layout and layout is None and told[name] != naming.layout:
        raise CheckpointError(
            f"{block.name}: {seen}, so that query, key and value may not follow one another there: "
            f"--layout {told[name]} says that they do"
        )
    if layout is None and told and not naming.fixed_layout and file_layout is not None and file_layout != told[name]:
        raise CheckpointError(
            f"{block.name}: its file's kind stores weights {shown_layout(file_layout)}, but {seen}: --layout is needed"
        )
    found = layout or (told[name] if told else file_layout)
    if found is None:
        raise CheckpointError(
            f"{block.name}: nothing tells whether its weights are stored [in, out] or [out, in]: --layout is needed"
        )
    return found
