"""Checks of the types and ranges of arguments. Errors name the argument."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
import paddle

INFINITY = float("inf")


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


def _shown(value: Any) -> str:
    if isinstance(value, TENSOR_TYPES):
        return f"a {type(value).__name__}"
    try:
        return repr(value)
    except ValueError:  # Python refuses to print an int of thousands of digits
        return f"an int of {value.bit_length()} bits"


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """Returns a number, which must be finite and in [low, high], as a float."""
    if type(value) is float and low <= value <= high and value != INFINITY:
        return value
    expected = f"a number in [{low:g}, {high:g}]" if high != INFINITY else f"a number of at least {low:g}"
    # float() also takes strings, bools, and complex numbers and arrays of NumPy.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = INFINITY
    if not low <= number <= high or number == INFINITY:
        raise ValueError(f"{name}: expected {expected}, got {_shown(value)}")
    return number


def check_count(name: str, value: Any) -> int:
    """Returns a size, which must be at least 1 and less than 2^31, as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {_shown(value)}")
    if not 1 <= value < 2**31:
        raise ValueError(
            f"{name}: expected at least 1{' and less than 2^31' if value > 0 else ''}, got {_shown(value)}"
        )
    return int(value)


def check_heads(embed_dim: Any, num_heads: Any) -> tuple[int, int]:
    """Returns a layer's width and its number of heads, which must divide it, as ints."""
    embed_dim, num_heads = check_count("embed_dim", embed_dim), check_count("num_heads", num_heads)
    if embed_dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of embed_dim {embed_dim}, got {num_heads}")
    return embed_dim, num_heads


def check_seed(name: str, value: Any) -> int:
    """Returns a seed, which must be an int of 64 bits, as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int or None, got {_shown(value)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int of 64 bits, got {_shown(value)}")
    return int(value)


def renamed(error: Exception, names: dict[str, str]) -> Exception:
    """The error with another name for the argument that it begins with, if `names` has one."""
    name, _, message = str(error).partition(":")
    return type(error)(f"{names[name]}:{message}") if name in names else error


def check_window(name: str, value: Any) -> tuple[int, int]:
    """How many keys before and after a query sees, of None, an int for both, or one for each; -1: all."""
    if value is None:
        return -1, -1
    sides = value if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, Integral) for side in sides):
        raise TypeError(f"{name}: expected an int, two ints or None, got {_shown(value)}")
    first, last = int(sides[0]), int(sides[1])
    if not (-1 <= first < 2**31 and -1 <= last < 2**31):
        raise ValueError(f"{name}: expected at least -1 and less than 2^31, got {_shown(value)}")
    return first, last


def check_switches(**switches: Any) -> None:
    """Accepts True, False, 1 and 0."""
    for name, value in switches.items():
        if not isinstance(value, (bool, np.bool_)) and not (isinstance(value, Integral) and value in (0, 1)):
            raise TypeError(f"{name}: expected a bool, got {_shown(value)}")
