"""Models whose weights lie as the CPU's kernels read them, for inference."""

from __future__ import annotations

from collections import Counter
from typing import Any, Iterator

import paddle
from paddle import nn

from . import _arranged
from ._checks import check_model
from ._parts import is_plain
from ._types import Model
from .conversion.feed_forward import FusedFeedForward
from .conversion.multi_head_attention import PackedMultiHeadAttention
from .conversion.transformer_layer import TransformerLayer
from .incubate.feed_forward import FusedFeedForward as IncubateFeedForward
from .layer import FusedMultiHeadAttention

_DTYPES = (paddle.float32, paddle.float64, paddle.float16, paddle.bfloat16)


def arrange_weights(model: nn.Layer) -> list[str]:
    """Puts the weights of a model's fused layers, in place, into the order in which the CPU's kernels read them.

    That is for inference: calls of few tokens are faster, since nothing is packed in them, and so are programs that
    ``paddle.jit.save`` makes of the model afterwards, which hold the weights as they lie then. Results have the same
    bits. There is no gradient, and ``state_dict`` and ``set_state_dict`` of the fused layers refuse until
    :func:`restore_weights`.

    Arranged are, on the CPU, every ``paddle.nn.MultiHeadAttention`` with packed projections after :func:`convert`, so
    also those of encoder and decoder layers, with other keys, caches and attention weights; the feed-forward of these
    and of other converted layers; and the layers :class:`FusedMultiHeadAttention` and ``incubate.FusedFeedForward``;
    where the sizes that are multiplied are multiples of 32, and no other layer has the same parameter. Attentions of
    other classes stay as they are, as do projections of different widths. Keys or values of other tensors are refused
    where their part of a packed weight does not begin and end with a multiple of 32 rows.

    Args:
        model: A layer, in dygraph. Its dtype must stay: call ``to(dtype=...)`` before.

    Returns:
        The names of the parameters that are arranged now, as ``model.named_parameters()`` gives them.

    Raises:
        TypeError: ``model`` is not a layer.
        RuntimeError: Static-graph mode is on.
    """
    _check_model("arrange_weights", model)
    layers = model.sublayers(include_self=True)
    owners = Counter(id(parameter) for layer in layers for parameter in layer._parameters.values())
    for layer in layers:
        for weights in _weights_of_operators(layer):
            if all(_serves(owner, name, axis, owners) for owner, name, axis in weights):
                for owner, name, axis in weights:
                    _arrange(owner, name, axis)
    marked = {id(layer._parameters[name]) for layer in layers for name in _arranged.marks_of(layer)}
    return [name for name, parameter in model.named_parameters() if id(parameter) in marked]


def restore_weights(model: Model) -> Model:
    """The inverse of :func:`arrange_weights`, in place: every parameter has its values and its ``stop_gradient`` again.

    Raises:
        TypeError: ``model`` is not a layer.
        RuntimeError: Static-graph mode is on.
    """
    _check_model("restore_weights", model)
    for layer in model.sublayers(include_self=True):
        for name, mark in _arranged.marks_of(layer).items():
            parameter = layer._parameters[name]
            _replace(parameter, _arranged.plain(parameter.detach(), mark.in_axis))
            parameter.stop_gradient = mark.stop_gradient
        _arranged.set_marks(layer, {})
    return model


def _check_model(function: str, model: Any) -> None:
    check_model(model)
    if not paddle.in_dynamic_mode():
        raise RuntimeError(f"{function}: expected dygraph mode, got static-graph mode; {function} before")


def _weights_of_operators(layer: Any) -> Iterator[list]:
    """For every operator that a layer runs, its weights: a layer, the name of its parameter, and the dimension that is
    multiplied with the input. An operator takes arranged weights only, or none."""
    if isinstance(layer, TransformerLayer):
        if layer._serves_feed_forward:
            yield from _linear_layers(layer, layer._feed_forward_part.adapter)
    elif is_plain(layer, PackedMultiHeadAttention):
        if layer._is_untouched():
            yield [(layer, "qkv_weight", -1), (layer._sub_layers["out_proj"], "weight", 0)]
    elif isinstance(layer, FusedFeedForward):
        yield from _linear_layers(layer, layer._adapter)
    elif isinstance(layer, IncubateFeedForward):
        if layer._ring_id == -1:
            yield [(layer, "_linear1_weight", 0), (layer, "_linear2_weight", 0)]
    elif type(layer) is FusedMultiHeadAttention and layer.qkv_weight is not None:
        yield [(layer, "qkv_weight", -1), (layer, "linear_weight", 0)]


def _linear_layers(layer: Any, adapter: Any) -> Iterator[list]:
    parts = [layer._sub_layers.get(name) for name in (adapter.linear1, adapter.linear2)]
    if all(is_plain(part, nn.Linear) for part in parts):
        yield [(part, "weight", 0) for part in parts]


def _serves(owner: Any, name: str, in_axis: int, owners: Counter) -> bool:
    parameter = owner._parameters.get(name)
    return (
        parameter is not None
        and name not in _arranged.marks_of(owner)
        and owners[id(parameter)] == 1
        and not parameter.is_dist()
        and parameter.place.is_cpu_place()
        and parameter.dtype in _DTYPES
        and _arranged.can_be_arranged(parameter.shape, in_axis)
    )


def _arrange(owner: Any, name: str, in_axis: int) -> None:
    parameter = owner._parameters[name]
    value, stop_gradient = _arranged.arranged(parameter.detach(), in_axis), parameter.stop_gradient
    _replace(parameter, value)
    parameter.stop_gradient = True
    mark = _arranged.Mark(in_axis, stop_gradient, list(value.shape))
    _arranged.set_marks(owner, {**_arranged.marks_of(owner), name: mark})


def _replace(parameter: Any, value: Any) -> None:
    value = value.contiguous()  # not a view, of which programs would hold the memory as it lies
    parameter.get_tensor()._share_data_with(value.get_tensor())
