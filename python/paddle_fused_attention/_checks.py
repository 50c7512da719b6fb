"""Checks of the types and ranges of arguments. Errors name the argument."""

from __future__ import annotations

import re
from numbers import Integral, Real
from typing import Any

import numpy as np
import paddle

INFINITY = float("inf")
# An argument beside the one that an error is of: "like x", "for x of shape", "x [2, 5, 24]".
_MENTION = re.compile(r"(?:(?<=like )|(?<=for ))\w+\b|\b\w+(?= \[)")


def _tensor_types() -> tuple:
    types = [paddle.Tensor, paddle.static.Variable]
    pir: Any = getattr(paddle, "pir", None)
    if hasattr(pir, "Value"):
        types.append(pir.Value)
    return tuple(types)


TENSOR_TYPES = _tensor_types()


def check_tensor(name: str, value: Any, required: bool = False) -> None:
    if value is None:
        if required:
            raise TypeError(f"{name}: expected a Tensor, got None")
        return
    if not isinstance(value, TENSOR_TYPES):
        raise TypeError(f"{name}: expected a Tensor{'' if required else ' or None'}, got {type(value).__name__}")


def check_model(model: Any) -> None:
    if not isinstance(model, paddle.nn.Layer):
        raise TypeError(f"model: expected a paddle.nn.Layer, got {type(model).__name__}")


def dtype_name(tensor: Any) -> str:
    """The dtype of a Tensor or a variable of any kind of graph, such as "float32"."""
    return str(tensor.dtype).split(".")[-1].lower()


def shown(value: Any) -> str:
    """A value as errors show it: in one line that is not long."""
    if isinstance(value, TENSOR_TYPES):
        return f"a {type(value).__name__}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # Python refuses to print an int of thousands of digits; other classes may fail anyhow
        return f"an int of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:150]}[...]{text[-45:]}"


def one_line(text: str) -> str:
    """A text with unprintable characters escaped, cut if it is long."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 1000 else f"{text[:600]}[...]{text[-395:]}"


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """Returns a number, which must be finite and in [low, high], as a float."""
    if type(value) is float and low <= value <= high and value != INFINITY:
        return value
    expected = f"a number in [{low:g}, {high:g}]" if high != INFINITY else f"a number of at least {low:g}"
    # float() also takes strings, bools, and complex numbers and arrays of NumPy.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = INFINITY
    if not low <= number <= high or number == INFINITY:
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    return number


def check_count(name: str, value: Any) -> int:
    """Returns a size, which must be at least 1 and less than 2^31, as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {shown(value)}")
    if not 1 <= value < 2**31:
        raise ValueError(f"{name}: expected at least 1{' and less than 2^31' if value > 0 else ''}, got {shown(value)}")
    return int(value)


def check_heads(embed_dim: Any, num_heads: Any, names: tuple[str, str] = ("embed_dim", "num_heads")) -> tuple[int, int]:
    """Returns a layer's width and its number of heads, which must divide it, as ints; errors call them `names`."""
    embed_dim, num_heads = check_count(names[0], embed_dim), check_count(names[1], num_heads)
    if embed_dim % num_heads:
        raise ValueError(f"{names[1]}: expected a divisor of {names[0]} {embed_dim}, got {num_heads}")
    return embed_dim, num_heads


def check_text(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name}: expected a str or None, got {shown(value)}")


def check_seed(name: str, value: Any) -> int:
    """Returns a seed, which must be an int of 64 bits, as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int or None, got {shown(value)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int of 64 bits, got {shown(value)}")
    return int(value)


def renamed(error: Exception, names: dict[str, str]) -> Exception:
    """The error with other names for arguments, the one that it begins with and those that this does not fit, if
    `names` has them."""
    text = str(error)
    name, _, message = text.partition(":")
    changed = f"{names.get(name, name)}:{_MENTION.sub(lambda found: names.get(found[0], found[0]), message)}"
    return error if changed == text or not message else type(error)(changed)


def check_window(name: str, value: Any) -> tuple[int, int]:
    """How many keys before and after a query sees, of None, an int for both, or one for each; -1: all."""
    if value is None:
        return -1, -1
    sides = value if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, Integral) for side in sides):
        raise TypeError(f"{name}: expected an int, two ints or None, got {shown(value)}")
    first, last = int(sides[0]), int(sides[1])
    if not (-1 <= first < 2**31 and -1 <= last < 2**31):
        raise ValueError(f"{name}: expected at least -1 and less than 2^31, got {shown(value)}")
    return first, last


def check_switches(**switches: Any) -> None:
    """Accepts True, False, 1 and 0."""
    for name, value in switches.items():
        if not isinstance(value, (bool, np.bool_)) and not (isinstance(value, Integral) and value in (0, 1)):
            raise TypeError(f"{name}: expected a bool, got {shown(value)}")
