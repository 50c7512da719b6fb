"""Casts the operators' inputs under auto_cast, as Paddle does for its own operators but not for custom ones.

The operators count as white-listed. Wherever auto_cast is on, in dygraph or while a PIR program is built, the weights
and biases of projections are cast to the 16-bit dtype. So is x, unless it is float32 and a residual that is added: then
the residual sum and the result are float32 too, and x is rounded for the products only. If the user's black list names
an operator, all its inputs are cast to float32. Layer-norm parameters always stay or become float32. Masks are taken in
any dtype. float64 is left alone, as by Paddle.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Sequence

import paddle
from paddle.base import core
from paddle.framework import in_dynamic_or_pir_mode

_DTYPES = {"float16": paddle.float16, "bfloat16": paddle.bfloat16}
# Comparing Paddle's enumerations takes up to a microsecond, comparing their values a fraction of it.
_OFF = core.AmpLevel.O0.value
_FLOAT32 = paddle.float32.value
_CASTABLE = frozenset(dtype.value for dtype in (paddle.float32, paddle.float16, paddle.bfloat16))


def without_auto_cast() -> Any:
    # Legacy programs have no auto_cast.
    return paddle.amp.auto_cast(enable=False) if in_dynamic_or_pir_mode() else nullcontext()


def target_dtype(op_type: str, tracer: Any) -> Any:
    """The dtype that auto_cast wants for the operator, or None where it is off. `tracer` is dygraph's, None in static
    graphs."""
    if tracer is None and not in_dynamic_or_pir_mode():
        return None
    state = tracer or core._get_amp_attrs()
    # The dtype first: reading the level takes longer, and where auto_cast is off the dtype is float32.
    dtype = _DTYPES.get(state._amp_dtype)
    if dtype is None or state._amp_level.value == _OFF:
        return None
    _, black_list = tracer._get_amp_op_list() if tracer else core._get_amp_op_list()
    return paddle.float32 if op_type in black_list else dtype


def cast_inputs(
    inputs: Sequence[Any],
    norms: Sequence[int],
    residual: Sequence[int],
    like_residual: Sequence[int],
    mask: int | None,
    dtype: Any,
) -> list[Any]:
    """Casts an operator's inputs, which may be None, to `dtype`; those at `norms` to float32; those at `residual` and
    `like_residual` to float32 if one of the former is that. The mask is left alone."""
    cast = list(inputs)
    if inputs[0].dtype.value not in _CASTABLE:
        return cast
    float32 = set(norms)
    if any(inputs[i] is not None and inputs[i].dtype.value == _FLOAT32 for i in residual):
        float32.update(residual, like_residual)
    for i, tensor in enumerate(inputs):
        if tensor is None or i == mask:
            continue
        wanted, value = (paddle.float32, _FLOAT32) if i in float32 else (dtype, dtype.value)
        found = tensor.dtype.value
        if found != value and found in _CASTABLE:
            cast[i] = paddle.cast(tensor, wanted)
    return cast
