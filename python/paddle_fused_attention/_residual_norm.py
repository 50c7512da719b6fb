"""What comes after a projection: [layer norm of] residual + dropout(x + bias), as one operator or of ordinary ops."""

from __future__ import annotations

from typing import Any, NamedTuple

import paddle
import paddle.nn.functional as F
from paddle.framework import in_dynamic_mode

from . import _op
from ._amp import without_auto_cast
from ._block import Block
from ._descriptions import MODES, checked_fields, without_fields
from ._meshes import is_auto_parallel
from ._ordinary_parts import cast_all, compute_dtype, is_exported_to_onnx, layer_norm
from ._types import Mode


class ResidualNorm(NamedTuple):
    """The arguments of :func:`paddle_fused_attention.fused_bias_dropout_residual_layer_norm`, which says what they
    mean. Only the result of :meth:`checked` is handed on; see :class:`Block`."""

    # The operator's inputs, in its order.
    x: Any
    residual: Any = None
    bias: Any = None
    ln_scale: Any = None
    ln_bias: Any = None

    ln_epsilon: float = 1e-5
    dropout_rate: float = 0.0

    training: bool = True
    final_layer_norm: bool = True

    mode: Mode = MODES[0]
    seed: int | None = None

    @property
    def tensors(self) -> tuple[Any, ...]:
        fields: Any = self
        return fields[_OF_TENSORS]

    def cast(self, dtype: str) -> ResidualNorm:
        """The description with all tensors of one dtype."""
        fields: Any = self
        return ResidualNorm._make((*cast_all(self.tensors, dtype), *fields[_OF_TENSORS.stop :]))

    def checked(self) -> ResidualNorm:
        """The description with floats for numbers, bools for switches, and without the parameters of a layer norm that
        is off.

        Raises:
            TypeError, ValueError: A field is of the wrong type, or a number is out of its range. Whatever computes it
                checks shapes and dtypes.
        """
        checked = checked_fields(self, 1, _OF_NUMBERS, _OF_SWITCHES)
        if not checked.final_layer_norm and not (checked.ln_scale is checked.ln_bias is None):
            return without_fields(checked, "ln_scale", "ln_bias")
        return checked


_OF_TENSORS = slice(0, ResidualNorm._fields.index("ln_epsilon"))
_OF_NUMBERS = slice(_OF_TENSORS.stop, ResidualNorm._fields.index("training"))
_OF_SWITCHES = slice(_OF_NUMBERS.stop, ResidualNorm._fields.index("mode"))

RESIDUAL_NORM = _op.Operator(
    "custom_residual_norm",
    ResidualNorm._fields[_OF_TENSORS],
    ("X", "Residual", "Bias", "LnScale", "LnBias"),
    numbers=ResidualNorm._fields[_OF_NUMBERS],
    integers=("seed",),
    norms=("ln_scale", "ln_bias"),
    residual=("x", "residual"),
    like_residual=("bias",),
)
_FLOAT32 = paddle.float32.value
_SIXTEEN_BIT = (paddle.float16.value, paddle.bfloat16.value)


def _arguments(description: ResidualNorm) -> tuple:
    fields: Any = description
    switches = _op.FIXED_SEED if description.seed is not None else 0
    if description.final_layer_norm:
        switches |= _op.FINAL_LAYER_NORM
    if description.residual is not None:
        switches |= _op.ADD_RESIDUAL
    if description.mode == MODES[0]:
        switches |= _op.UPSCALE_IN_TRAIN
    return fields[_OF_TENSORS], description.training, switches, fields[_OF_NUMBERS], (description.seed or 0,)


@paddle.jit.not_to_static
def residual_norm(description: ResidualNorm) -> Any:
    """Computes a checked description by the operator wherever that serves.

    Raises:
        NotImplementedError: There are auto-parallel tensors on Paddle 2.
    """
    description = _with_bias_like_x(description)
    if in_dynamic_mode():
        is_auto_parallel(description.x, description.residual)  # raises on Paddle 2; else the operator serves them too
    elif is_exported_to_onnx():
        return _residual_norm_of_ordinary_ops(description)
    return RESIDUAL_NORM.call(*_arguments(description))


def _with_bias_like_x(description: ResidualNorm) -> ResidualNorm:
    """The description with a float32 bias where a 16-bit one comes beside a float32 x, of which the operator takes one
    dtype."""
    bias = description.bias
    if bias is None or description.x.dtype.value != _FLOAT32 or bias.dtype.value not in _SIXTEEN_BIT:
        return description
    _op.check_tensors(("bias",), (bias,))
    return description._replace(bias=paddle.cast(bias, "float32"))


def _residual_norm_of_ordinary_ops(description: ResidualNorm) -> Any:
    tensors = RESIDUAL_NORM.checked_inputs(*_arguments(description))
    with without_auto_cast():
        return residual_tail(ResidualNorm._make((*tensors, *description[_OF_TENSORS.stop :])), tensors[0].dtype)


def tail_of(block: Block, y: Any) -> ResidualNorm:
    """What comes after the output projection of an attention block, y without its bias."""
    # fmt: off
    return ResidualNorm._make((
        y, block.x if block.add_residual else None, block.linear_bias, block.ln_scale, block.ln_bias,
        block.ln_epsilon, block.dropout_rate, block.training, block.final_layer_norm, block.mode, block.seed,
    ))
    # fmt: on


def residual_tail(description: ResidualNorm, dtype: Any) -> Any:
    """Computes a checked description, of tensors of any float dtypes, by ordinary ops, as `dtype`: in float32 at least,
    as in the operator, with Paddle's own dropout."""
    d = description
    z, residual, bias, ln_scale, ln_bias = cast_all(d.tensors, compute_dtype(d.x if d.residual is None else d.residual))
    if bias is not None:
        z = z + bias
    z = F.dropout(z, d.dropout_rate, training=d.training, mode=d.mode)
    if residual is not None:
        z = residual + z
    if d.final_layer_norm:
        z = layer_norm(z, ln_scale, ln_bias, d.ln_epsilon)
    return paddle.cast(z, dtype)
