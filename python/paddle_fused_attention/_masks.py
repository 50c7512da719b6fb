"""Masks as ``paddle.nn.MultiHeadAttention`` reads them."""

from __future__ import annotations

from typing import Any

import paddle

from . import _op
from ._checks import check_tensor, dtype_name

# The dtypes that the operators take.
_DTYPES = ("float32", "float64", "float16", "bfloat16", "bool", "uint8", "int8", "int16", "int32", "int64")


@paddle.jit.not_to_static
def additive_mask(name: str, mask: Any, x: Any) -> Any:
    """The mask as ``paddle.nn.MultiHeadAttention`` adds it to the scores of x; errors call it `name`.

    Paddle turns a bool or integer mask into (mask - 1) * 1e9: a query that may see no key attends to all alike and does
    not give zeros. Float masks stay as they are. 1e9 needs float32 at least: in float16 it is inf, and Paddle's own
    product NaN.
    """
    if mask is None:
        return None
    check_tensor(name, mask)
    _op.check_tensors((name,), (mask,))
    if paddle.is_floating_point(mask):
        return mask
    if dtype_name(mask) not in _DTYPES:
        raise TypeError(
            f"{name}: expected a float dtype, bool, uint8 or a signed integer dtype, got {dtype_name(mask)}"
        )
    return (paddle.cast(mask, "float64" if x.dtype == paddle.float64 else "float32") - 1.0) * 1e9
