"""activation(x @ weight + bias) as one operator, or of ordinary ops where that does not serve."""

from __future__ import annotations

from typing import Any

import paddle
from paddle.framework import in_dynamic_mode

from . import _op
from ._amp import without_auto_cast
from ._arranged import check_plain, is_arranged
from ._checks import check_switches, check_tensor, renamed
from ._descriptions import USUAL_TYPES
from ._feed_forward import ACTIVATIONS, activate, check_activation
from ._meshes import is_auto_parallel
from ._ordinary_parts import cast_all, compute_dtype, is_exported_to_onnx

_TENSORS = ("x", "weight", "bias")
LINEAR = _op.Operator("custom_fused_linear", _TENSORS, ("X", "Weight", "Bias"), numbers=(), integers=("activation",))


@paddle.jit.not_to_static
def linear(
    x: Any,
    weight: Any,
    bias: Any,
    transpose_x: bool,
    transpose_weight: bool,
    activation: str | None = None,
    names: tuple[str, str, str] = _TENSORS,
    switch_names: tuple[str, str] = ("transpose_x", "transpose_weight"),
) -> Any:
    """Computes activation(x @ weight + bias) by the operator wherever that serves.

    Args:
        x: ``[..., K]``, with ``transpose_x`` ``[K, M]``.
        weight: ``[K, N]``, with ``transpose_weight`` ``[N, K]``.
        bias: ``[N]`` or None.
        activation: One of ACTIVATIONS, or None.
        names, switch_names: What errors call the arguments.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, or does not fit.
    """
    if x is None or weight is None or not USUAL_TYPES.issuperset((type(x), type(weight), type(bias))):
        for name, value, required in zip(names, (x, weight, bias), (True, True, False)):
            check_tensor(name, value, required)
    if not type(transpose_x) is type(transpose_weight) is bool:
        check_switches(**dict(zip(switch_names, (transpose_x, transpose_weight))))
    if activation is not None:
        check_activation(activation)
    try:
        return _linear(x, weight, bias, bool(transpose_x), bool(transpose_weight), activation)
    except (TypeError, ValueError, MemoryError) as error:
        raise renamed(error, dict(zip(_TENSORS, names))) from None


def _linear(x: Any, weight: Any, bias: Any, transpose_x: bool, transpose_weight: bool, activation: str | None) -> Any:
    switches = (_op.TRANSPOSE_X if transpose_x else 0) | (_op.TRANSPOSE_WEIGHT if transpose_weight else 0)
    integers = (0 if activation is None else ACTIVATIONS[activation],)
    # Of an arranged weight there is no gradient, whether a graph is in training or not.
    arguments: tuple = ((x, weight, bias), not is_arranged(weight), switches, (), integers)
    # Auto-parallel weights may be sharded, which the operator would gather.
    if not (is_auto_parallel(x, weight) if in_dynamic_mode() else is_exported_to_onnx()):
        return LINEAR.call(*arguments)
    check_plain("weight", weight)
    inputs = LINEAR.checked_inputs(*arguments)
    with without_auto_cast():
        x, weight, bias = cast_all(inputs, compute_dtype(inputs[0]))
        out = paddle.matmul(x, weight, transpose_x, transpose_weight)
        out = out if bias is None else out + bias
        return paddle.cast(out if activation is None else activate(activation, out), inputs[0].dtype)
