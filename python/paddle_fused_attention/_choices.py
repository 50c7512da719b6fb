"""What a checkpoint can't always tell, from the words of who packs it: heads, the layer norm's place, and the layout of weights.

A word that contradicts what names or shapes tell is refused, and so is one number, or one place of the norm, for blocks that may
differ in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Iterable, TypeVar

import numpy as np

from ._namings import LAYOUTS, Block, Signs, layout_by_shapes

Word = TypeVar("Word", int, bool)


class CheckpointError(Exception):
    """What is wrong with a checkpoint or a request, in one line."""


def check_layout(argument: str, layout: str | None) -> None:
    if layout is not None and layout not in LAYOUTS:
        raise CheckpointError(f"{argument}: expected {' or '.join(LAYOUTS)}, got {layout!r}")


def form(layout: str) -> str:
    return "[in, out]" if layout == "in-out" else "[out, in]"


def check_patterns(argument: str, words: Any, names: Iterable[str]) -> None:
    """A pattern that fits none of the blocks there are is a slip."""
    names = list(names)
    for pattern in words if isinstance(words, Mapping) else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CheckpointError(f"{argument}: there is no block with a name like {pattern!r}")


def _by_pattern(words: Mapping[str, Word], blocks: Iterable[Block]) -> dict[str, Word]:
    """The word for every block that a pattern fits, by the first that does."""
    found = {}
    for block in blocks:
        fits = [word for pattern, word in words.items() if fnmatchcase(block.name, pattern)]
        if fits:
            found[block.name] = fits[0]
    return found


def heads_of(num_heads: int | Mapping[str, int], arrays: dict[Any, Any], blocks: list[Block]) -> dict[str, int]:
    widths = {block.name: arrays[block.names("weight")[-1]].shape[0] for block in blocks}
    if isinstance(num_heads, Mapping):
        heads = _by_pattern(num_heads, blocks)
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
                    f"--num-heads: expected a number for each width, as PATTERN=H, since {first} is {widths[first]} wide and "
                    f"{name} is {width}; got {num_heads}"
                )
    for name, width in widths.items():
        count = heads[name]
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1 or width % count:
            raise CheckpointError(f"--num-heads: expected a divisor of {width}, the width of {name}, got {count}")
    return heads


def orders_of(normalize_before: bool | Mapping[str, bool] | None, blocks: list[Block], signs: Signs) -> dict[str, bool]:
    """Whether the layer norm stands before the attention, for every block."""
    told = {block.name: signs.normalize_before(block.prefix, block.naming) for block in blocks}
    stacks = sorted({re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name, order in told.items() if order is None})
    if isinstance(normalize_before, Mapping):
        said = _by_pattern(normalize_before, blocks)
    elif normalize_before is None:
        said = {}
    else:
        said = dict.fromkeys(told, normalize_before)
        if len(stacks) > 1:
            raise CheckpointError(
                f"--normalize-{'before' if normalize_before else 'after'}: expected patterns that say it of {stacks[0]} and "
                f"{stacks[1]}, which may differ; '*' says it of all"
            )
    orders: dict[str, bool] = {}
    for name, order in told.items():
        word = said.get(name)
        if word is not None and not isinstance(word, (bool, np.bool_)):
            raise CheckpointError(f"normalize_before: expected a bool, got {word!r}")
        if order is None and word is None:
            raise CheckpointError(
                f"{name}: nothing tells whether its layer norm stands before the attention or after the residual: "
                "--normalize-before or --normalize-after is needed"
            )
        if order is not None and word is not None and order != word:
            raise CheckpointError(
                f"--normalize-{'before' if word else 'after'}: {name} has its layer norm {'before' if order else 'after'}, by its names"
            )
        orders[name] = bool(word if order is None else order)
    return orders


def layout_of(arrays: dict[Any, Any], block: Block, layout: str | None, file_layout: str | None) -> str:
    told = layout_by_shapes(arrays, block, arrays[block.names("weight")[-1]].shape[0])
    by_shape = set(told.values())
    name, naming = next(iter(told), ""), block.naming
    if len(by_shape) > 1:
        other = next(other for other in told if told[other] != told[name])
        raise CheckpointError(
            f"{block.name}: by their shapes {name} is stored {form(told[name])} and {other} {form(told[other])}"
        )
    seen = f"by its shape {name} is stored {form(told[name])}" if told else ""
    if layout is not None and told and layout != told[name]:
        raise CheckpointError(f"--layout {layout}: {seen}")
    if naming.fixed_layout and layout is None and told[name] != naming.layout:
        raise CheckpointError(
            f"{block.name}: {seen}, so that query, key and value may not follow one another there: "
            f"--layout {told[name]} says that they do"
        )
    if layout is None and told and not naming.fixed_layout and file_layout is not None and file_layout != told[name]:
        raise CheckpointError(
            f"{block.name}: its file's kind stores weights {form(file_layout)}, but {seen}: --layout is needed"
        )
    found = layout or (told[name] if told else file_layout)
    if found is None:
        raise CheckpointError(
            f"{block.name}: nothing tells whether its weights are stored [in, out] or [out, in]: --layout is needed"
        )
    return found
