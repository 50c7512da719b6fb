"""Casts the operator's inputs under auto_cast, as Paddle does for its own operators but not for custom ones.

The operator counts as white-listed. Wherever auto_cast is on, in dygraph or while a PIR program is built, the weights
and biases of the projections are cast to the 16-bit dtype. So is x, unless it is float32: then the residual sum and the
result are float32 too, and x is rounded for the products only. If the user's black list names the operator, all inputs
are cast to float32. Layer-norm parameters always stay or become float32. Masks are taken in any dtype. float64 is left
alone, as by Paddle.
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


def cast_inputs(inputs: Sequence[Any], norm_indices: Sequence[int], mask_index: int, dtype: Any) -> list[Any]:
    """Casts the operator's inputs to `dtype`, those at `norm_indices` to float32. Inputs may be None. The first is x,
    which stays float32 if it is."""
    cast = list(inputs)
    x_dtype = inputs[0].dtype.value
    if x_dtype not in _CASTABLE:
        return cast
    for_norms, for_others = (paddle.float32, _FLOAT32), (dtype, dtype.value)
    for i, tensor in enumerate(inputs):
        if tensor is None or i == mask_index or (i == 0 and x_dtype == _FLOAT32):
            continue
        wanted, value = for_norms if i in norm_indices else for_others
        found = tensor.dtype.value
        if found != value and found in _CASTABLE:
            cast[i] = paddle.cast(tensor, wanted)
    return cast
