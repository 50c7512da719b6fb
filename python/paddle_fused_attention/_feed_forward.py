"""The description of a feed-forward block, and its computation: by one operator, or of ordinary ops where that does not
serve.

As with attention, a function or a layer makes and checks the description, which is handed on whole.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import paddle
import paddle.nn.functional as F
from paddle.framework import in_dynamic_mode

from . import _op
from ._amp import without_auto_cast
from ._arranged import check_plain
from ._checks import shown
from ._descriptions import MODES, checked_fields, without_fields
from ._meshes import first_of_process, is_auto_parallel, mesh_axis_of, sum_over_mesh
from ._ordinary_parts import cast_all, compute_dtype, is_exported_to_onnx, layer_norm
from ._residual_norm import ResidualNorm, residual_norm, residual_tail
from ._types import Activation, Mode

# The operators' numbers for activations.
ACTIVATIONS = {"relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


class FeedForward(NamedTuple):
    """The arguments of :func:`paddle_fused_attention.fused_feedforward`, which says what they mean.

    Only the result of :meth:`checked` is handed on. Code that may be traced makes it by `_make`; see :class:`Block`.
    """

    # The operator's inputs, in its order.
    x: Any
    linear1_weight: Any
    linear2_weight: Any
    ln1_scale: Any = None
    ln1_bias: Any = None
    ln2_scale: Any = None
    ln2_bias: Any = None
    linear1_bias: Any = None
    linear2_bias: Any = None

    ln1_epsilon: float = 1e-5
    ln2_epsilon: float = 1e-5
    dropout1_rate: float = 0.0
    dropout2_rate: float = 0.0

    pre_layer_norm: bool = False
    training: bool = True
    final_layer_norm: bool = True
    add_residual: bool = True
    gated: bool = False

    activation: Activation = "relu"
    mode: Mode = MODES[0]
    seed: int | None = None

    @property
    def tensors(self) -> tuple[Any, ...]:
        fields: Any = self
        return fields[_OF_TENSORS]

    def checked(self) -> FeedForward:
        """The description with floats for numbers, bools for switches, and without the parameters of a layer norm that
        is off.

        Raises:
            TypeError, ValueError: A field is of the wrong type, or a number is out of its range. Whatever computes the
                block checks shapes and dtypes.
        """
        check_activation(self.activation)
        checked = checked_fields(self, 3, _OF_NUMBERS, _OF_SWITCHES)
        if not checked.pre_layer_norm and not (checked.ln1_scale is checked.ln1_bias is None):
            checked = without_fields(checked, "ln1_scale", "ln1_bias")
        if not checked.final_layer_norm and not (checked.ln2_scale is checked.ln2_bias is None):
            checked = without_fields(checked, "ln2_scale", "ln2_bias")
        return checked


_OF_TENSORS = slice(0, FeedForward._fields.index("ln1_epsilon"))
_OF_NUMBERS = slice(_OF_TENSORS.stop, FeedForward._fields.index("pre_layer_norm"))
_OF_SWITCHES = slice(_OF_NUMBERS.stop, FeedForward._fields.index("activation"))

FEED_FORWARD = _op.Operator(
    "custom_fused_feedforward",
    FeedForward._fields[_OF_TENSORS],
    (
        "X",
        "Linear1Weight",
        "Linear2Weight",
        "Ln1Scale",
        "Ln1Bias",
        "Ln2Scale",
        "Ln2Bias",
        "Linear1Bias",
        "Linear2Bias",
    ),
    numbers=FeedForward._fields[_OF_NUMBERS],
    integers=("seed", "activation", "first_hidden", "total_hidden"),
    norms=("ln1_scale", "ln1_bias", "ln2_scale", "ln2_bias"),
    residual=("x",),
)


def check_activation(activation: Any) -> None:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation: expected one of {names}, got {shown(activation)}")


def _arguments(description: FeedForward, first_hidden: int, total_hidden: int) -> tuple:
    fields: Any = description
    switches = _op.switches_of_block(description) | (_op.GATED if description.gated else 0)
    integers = (description.seed or 0, ACTIVATIONS[description.activation], first_hidden, total_hidden)
    return fields[_OF_TENSORS], description.training, switches, fields[_OF_NUMBERS], integers


@paddle.jit.not_to_static
def feed_forward(description: FeedForward) -> Any:
    """Computes a checked description by the operator wherever that serves.

    Raises:
        NotImplementedError: There are auto-parallel tensors on Paddle 2.
    """
    if in_dynamic_mode():
        if is_auto_parallel(description.x, description.linear1_weight):
            return _feed_forward_over_mesh(description)
    elif is_exported_to_onnx():
        return _feed_forward_of_ordinary_ops(description)
    return FEED_FORWARD.call(*_arguments(description, 0, 0))


def _feed_forward_over_mesh(d: FeedForward) -> Any:
    """Where the columns of linear1_weight are sharded over a dimension of its mesh, every process computes its own
    hidden numbers; but not those of gated blocks, whose halves lie apart."""
    weight = d.linear1_weight
    axis = None if d.gated else mesh_axis_of(weight, 2, 1)
    if axis is None:
        return FEED_FORWARD.call(*_arguments(d, 0, 0))
    total = weight.shape[1]
    first = first_of_process("linear1_weight", weight, axis, total, "columns")
    return feed_forward_over_processes(d, first, total, sum_over_mesh)


@paddle.jit.not_to_static
def feed_forward_over_processes(
    description: FeedForward,
    first_hidden: int,
    total_hidden: int,
    all_reduce: Callable,
    sum_gradient: Callable | None = None,
) -> Any:
    """Computes a checked description of which this process holds the hidden numbers from `first_hidden` on of
    `total_hidden`: columns of ``linear1_weight`` and ``linear1_bias``, with ``gated`` of both their halves, and rows of
    ``linear2_weight``.

    Args:
        all_reduce: Sums over the processes.
        sum_gradient: Takes each tensor that all processes use for their own hidden numbers, or None, and returns it
            with a gradient that is summed. None: the gradients are.

    A seed fixes both dropouts' masks.
    """
    # Bias, residual and final layer norm come once, after the sum.
    d = description
    part = without_fields(d, "ln2_scale", "ln2_bias")._replace(
        linear2_bias=None, dropout2_rate=0.0, add_residual=False, final_layer_norm=False
    )
    if sum_gradient is not None:
        part = part._replace(**{name: sum_gradient(getattr(d, name)) for name in ("x", "ln1_scale", "ln1_bias")})
    y = FEED_FORWARD.call(*_arguments(part, first_hidden, total_hidden))
    return residual_norm(_tail_of(d, all_reduce(y)))


def _tail_of(d: FeedForward, y: Any) -> ResidualNorm:
    """What comes after the second projection, y without its bias."""
    # fmt: off
    return ResidualNorm._make((
        y, d.x if d.add_residual else None, d.linear2_bias, d.ln2_scale, d.ln2_bias,
        d.ln2_epsilon, d.dropout2_rate, d.training, d.final_layer_norm, d.mode, d.seed,
    ))
    # fmt: on


def activate(name: str, x: Any) -> Any:
    """The activation by ordinary ops."""
    if name == "gelu_tanh":
        return F.gelu(x, approximate=True)
    return {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}[name](x)


def _feed_forward_of_ordinary_ops(description: FeedForward) -> Any:
    """With Paddle's own dropout."""
    check_plain("linear2_weight", description.linear2_weight)
    tensors = FEED_FORWARD.checked_inputs(*_arguments(description, 0, 0))
    dtype = tensors[0].dtype
    d = FeedForward._make((*tensors, *description[_OF_TENSORS.stop :]))
    with without_auto_cast():
        h, weight1, weight2, ln1_scale, ln1_bias, _, _, bias1, _ = cast_all(tensors, compute_dtype(d.x))
        if d.pre_layer_norm:
            h = layer_norm(h, ln1_scale, ln1_bias, d.ln1_epsilon)
        u = paddle.matmul(h, weight1)
        if bias1 is not None:
            u = u + bias1
        if d.gated:
            u, factor = paddle.split(u, 2, axis=-1)
            u = activate(d.activation, u) * factor
        else:
            u = activate(d.activation, u)
        u = F.dropout(u, d.dropout1_rate, training=d.training, mode=d.mode)
        return residual_tail(_tail_of(d, paddle.matmul(u, weight2)), dtype)
