"""The fused attention block as a function."""

from __future__ import annotations

import sys
from numbers import Integral, Real
from types import FrameType
from typing import Any, Sequence

import numpy as np
import paddle
from paddle.framework import in_dynamic_mode

from . import _op
from ._op import TENSOR_ARGUMENTS
from ._split import attention_over_mesh, mesh_axis_of_heads

_INFINITY = float("inf")
_MODES = ("upscale_in_train", "downscale_in_infer")
_SEED_RANGE = (-(2**63), 2**63)


def _check_tensor(name: str, value: Any, required: bool = False) -> None:
    if value is None:
        if required:
            raise TypeError(f"{name}: expected a Tensor, got None")
        return
    if not isinstance(value, _TENSOR_TYPES):
        raise TypeError(f"{name}: expected a Tensor{'' if required else ' or None'}, got {type(value).__name__}")


def _tensor_types() -> tuple:
    types = [paddle.Tensor, paddle.static.Variable]
    pir: Any = getattr(paddle, "pir", None)
    if hasattr(pir, "Value"):
        types.append(pir.Value)
    return tuple(types)


_TENSOR_TYPES = _tensor_types()
_OPTIONAL_TENSOR_TYPES = (type(None), *_TENSOR_TYPES)


def _shown(value: Any) -> str:
    if isinstance(value, _TENSOR_TYPES):
        return f"a {type(value).__name__}"
    try:
        return repr(value)
    except ValueError:  # Python writes out no int of thousands of digits
        return f"an int of {value.bit_length()} bits"


def _check_number(name: str, value: Any, low: float, high: float) -> float:
    if type(value) is float and low <= value <= high and value != _INFINITY:
        return value
    expected = f"a number in [{low:g}, {high:g}]" if high != _INFINITY else f"a number of at least {low:g}"
    # Strings, bools, complex numbers and arrays of NumPy have a __float__ too.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = _INFINITY
    if not low <= number <= high or number == _INFINITY:
        raise ValueError(f"{name}: expected {expected}, got {_shown(value)}")
    return number


def check_count(name: str, value: Any) -> int:
    """A size as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {_shown(value)}")
    if not 1 <= value < 2**31:
        raise ValueError(f"{name}: expected at least 1{' and less than 2^31' if value > 0 else ''}, got {_shown(value)}")
    return int(value)


def check_switches(**switches: Any) -> None:
    """What is to be True or False; 1 and 0 are welcome."""
    for name, value in switches.items():
        if not isinstance(value, (bool, np.bool_)) and not (isinstance(value, Integral) and value in (0, 1)):
            raise TypeError(f"{name}: expected a bool, got {_shown(value)}")


def check_arguments(
    inputs: Sequence[Any],
    pre_ln_epsilon: Any,
    ln_epsilon: Any,
    dropout_rate: Any,
    attn_dropout_rate: Any,
    mode: Any,
    seed: Any,
) -> tuple[float, float, float, float]:
    """Checks the types of the operator's inputs, and the numbers; returns the epsilons and rates."""
    for i, value in enumerate(inputs):
        if not isinstance(value, _OPTIONAL_TENSOR_TYPES) or (value is None and i < 3):
            _check_tensor(TENSOR_ARGUMENTS[i], value, required=i < 3)
    numbers = (
        _check_number("pre_ln_epsilon", pre_ln_epsilon, 0.0, _INFINITY),
        _check_number("ln_epsilon", ln_epsilon, 0.0, _INFINITY),
        _check_number("dropout_rate", dropout_rate, 0.0, 1.0),
        _check_number("attn_dropout_rate", attn_dropout_rate, 0.0, 1.0),
    )
    if not isinstance(mode, str) or mode not in _MODES:
        raise ValueError(f"mode: expected {_MODES[0]!r} or {_MODES[1]!r}, got {mode!r}")
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, Integral):
            raise TypeError(f"seed: expected an int or None, got {_shown(seed)}")
        if not _SEED_RANGE[0] <= seed < _SEED_RANGE[1]:
            raise ValueError(f"seed: expected an int of 64 bits, got {_shown(seed)}")
    return numbers


def _is_exported_to_onnx() -> bool:
    """Whether the graph that is built is for ``paddle.onnx.export``. ONNX has no such operator, and the exporter ends the process
    at one
    that it does not know: it gets ordinary ops."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("paddle2onnx."):
            return True
        frame = frame.f_back
    return False


@paddle.jit.not_to_static
def fused_multi_head_attention(
    x: paddle.Tensor,
    qkv_weight: paddle.Tensor,
    linear_weight: paddle.Tensor,
    pre_layer_norm: bool = False,
    pre_ln_scale: paddle.Tensor | None = None,
    pre_ln_bias: paddle.Tensor | None = None,
    ln_scale: paddle.Tensor | None = None,
    ln_bias: paddle.Tensor | None = None,
    pre_ln_epsilon: float = 1e-5,
    qkv_bias: paddle.Tensor | None = None,
    linear_bias: paddle.Tensor | None = None,
    attn_mask: paddle.Tensor | None = None,
    dropout_rate: float = 0.5,
    attn_dropout_rate: float = 0.5,
    ln_epsilon: float = 1e-5,
    name: str | None = None,
    *,
    training: bool = True,
    mode: str = "upscale_in_train",
    final_layer_norm: bool = True,
    add_residual: bool = True,
    causal: bool = False,
    seed: int | None = None,
) -> paddle.Tensor:
    """Self-attention with everything around it as one operator, differentiable, in dygraph and in static graphs.

    With W the ``qkv_weight`` read as ``[3 * num_heads * head_dim, embed_dim]``::

        h   = layer_norm(x; pre_ln_*) if pre_layer_norm else x
        qkv = h @ W^T + qkv_bias
        p   = softmax(q @ k^T / sqrt(head_dim) + attn_mask)
        y   = dropout(p, attn_dropout_rate) @ v @ linear_weight + linear_bias
        z   = (x if add_residual else 0) + dropout(y, dropout_rate)
        out = layer_norm(z; ln_*) if final_layer_norm else z

    The parameters up to ``name`` are those of Paddle's pull request #36498, which always has the final layer norm.

    Args:
        x: ``[batch, seq_len, embed_dim]``, float32, float64, float16 or bfloat16.
        qkv_weight: ``[3, num_heads, head_dim, embed_dim]`` with ``num_heads * head_dim = embed_dim``, dtype of x; beside a float32 x
            also float16 or bfloat16: then the products and attention are in that dtype, all else in float32.
        linear_weight: ``[embed_dim, embed_dim]``, dtype of qkv_weight.
        pre_layer_norm: Whether x is layer-normalised before the QKV projection.
        pre_ln_scale, pre_ln_bias: ``[embed_dim]``, dtype of x, or float32 for a 16-bit x. None: 1 and 0. Unused without
            ``pre_layer_norm``.
        ln_scale, ln_bias: The same for the final layer norm. Unused without ``final_layer_norm``.
        pre_ln_epsilon, ln_epsilon: Added to the variance.
        qkv_bias: ``[3, num_heads, head_dim]``, dtype of qkv_weight, or None.
        linear_bias: ``[embed_dim]``, dtype of qkv_weight, or None.
        attn_mask: Any shape that broadcasts to ``[batch, num_heads, seq_len, seq_len]``, read in place. A float mask, of any float
            dtype, is added to the scores; True or a nonzero integer keeps a key and False or 0 hides it, as -inf does. A query that
            may see no key gives zeros. The mask gets no gradient.
        dropout_rate, attn_dropout_rate: The probability of dropping an element, in [0, 1], exact to 2^-16.
        name: Unused; there for the sake of Paddle's convention.
        training: Without it nothing is dropped and nothing is kept for the gradient, which is then computed from x anew.
        mode: "upscale_in_train": what is kept is divided by ``1 - rate`` in training. "downscale_in_infer": everything is
            multiplied by ``1 - rate`` outside training.
        final_layer_norm: Whether the sum is layer-normalised.
        add_residual: Whether x is added.
        causal: Whether query i sees the keys up to i only; together with a mask, both apply.
        seed: Fixes the dropout masks; None draws from Paddle's generator, which ``paddle.seed`` sets.

    Returns:
        ``[batch, seq_len, embed_dim]``, dtype of x.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape or a number does not fit.
    """
    if not in_dynamic_mode() and _is_exported_to_onnx():
        from ._keys import attention_to_keys

        return attention_to_keys(
            *(x, qkv_weight, linear_weight, pre_layer_norm, pre_ln_scale, pre_ln_bias, ln_scale, ln_bias, pre_ln_epsilon),
            *(qkv_bias, linear_bias, attn_mask, dropout_rate, attn_dropout_rate, ln_epsilon),
            keys=(x, x),
            training=training,
            mode=mode,
            final_layer_norm=final_layer_norm,
            add_residual=add_residual,
            causal=causal,
            seed=seed,
        )
    inputs = (x, qkv_weight, linear_weight, pre_ln_scale, pre_ln_bias, ln_scale, ln_bias, qkv_bias, linear_bias, attn_mask)
    numbers = check_arguments(inputs, pre_ln_epsilon, ln_epsilon, dropout_rate, attn_dropout_rate, mode, seed)
    if not (type(pre_layer_norm) is type(training) is type(final_layer_norm) is type(add_residual) is type(causal) is bool):
        check_switches(
            pre_layer_norm=pre_layer_norm,
            training=training,
            final_layer_norm=final_layer_norm,
            add_residual=add_residual,
            causal=causal,
        )

    mesh_axis = mesh_axis_of_heads(x, qkv_weight)
    if mesh_axis is not None:
        return attention_over_mesh(
            inputs,
            axis=mesh_axis,
            pre_layer_norm=pre_layer_norm,
            numbers=numbers,
            training=training,
            mode=mode,
            final_layer_norm=final_layer_norm,
            add_residual=add_residual,
            causal=causal,
            seed=seed,
        )

    switches = 0
    if pre_layer_norm:
        switches |= _op.PRE_LAYER_NORM
    elif pre_ln_scale is not None or pre_ln_bias is not None:
        inputs = (*inputs[:3], None, None, *inputs[5:])
    if final_layer_norm:
        switches |= _op.FINAL_LAYER_NORM
    elif ln_scale is not None or ln_bias is not None:
        inputs = (*inputs[:5], None, None, *inputs[7:])
    if add_residual:
        switches |= _op.ADD_RESIDUAL
    if causal:
        switches |= _op.CAUSAL
    if mode == "upscale_in_train":
        switches |= _op.UPSCALE_IN_TRAIN
    if seed is not None:
        switches |= _op.FIXED_SEED

    return _op.fused_attention(
        inputs, is_test=not training, switches=switches, numbers=numbers, seed=0 if seed is None else int(seed)
    )
