"""Which activation of the operator a function or a layer computes.

A function is known by being Paddle's very own one, a layer by its class. Whatever else may compute the same is not
known, and runs as it is.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

import paddle.nn.functional as F
from paddle import nn

from .._parts import is_plain, reason_against_class

# What another package put in the place of Paddle's function is not known.
_FUNCTIONS = {
    function: name
    for function, name in ((F.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu"), (F.swish, "silu"))
    if function.__module__.startswith("paddle.")
}
_LAYERS = {nn.ReLU: "relu", nn.Silu: "silu", nn.Swish: "silu"}
# Classes of packages that may not be there.
_LIBRARY = "paddlenlp.transformers.activations"
_LIBRARY_LAYERS = {"FastGELUActivation": "gelu_tanh", "NewGELUActivation": "gelu_tanh", "SiLUActivation": "silu"}


def activation_name(activation: Any) -> str | None:
    """The operator's name of an activation, a function or a layer; None if the operator does not have it. Every call of
    a layer asks, so the usual kinds come first."""
    kind = type(activation)
    if kind is FunctionType:
        return _FUNCTIONS.get(activation)
    if kind is nn.GELU:
        return _gelu(activation._approximate) if is_plain(activation, kind) else None
    if isinstance(activation, nn.Layer):
        return _name_of_layer(activation, kind) if is_plain(activation, kind) else None
    if kind is functools.partial and activation.func is F.gelu and F.gelu in _FUNCTIONS and not activation.args:
        approximate = activation.keywords.get("approximate", False)
        return _gelu(approximate) if set(activation.keywords) <= {"approximate", "name"} else None
    return None


def _gelu(approximate: Any) -> str | None:
    if approximate is False or approximate == "none":
        return "gelu"
    return "gelu_tanh" if approximate is True or approximate == "tanh" else None


def _name_of_layer(layer: Any, kind: Any) -> str | None:
    known = _LAYERS.get(kind)
    if known is not None or kind.__module__ != _LIBRARY:
        return known
    if kind.__name__ == "GELUActivation":  # of a function that is an attribute
        return _FUNCTIONS.get(layer.__dict__.get("act")) if layer.__dict__.get("act") is F.gelu else None
    return _LIBRARY_LAYERS.get(kind.__name__)


def reason_against_activation(name: str, activation: Any) -> str | None:
    """Why the activation called `name` is none of the operator's; None if it is one."""
    kind = type(activation)
    if kind is nn.GELU or kind in _LAYERS:
        reason = reason_against_class(kind)
        if reason is not None:
            return reason
    if activation_name(activation) is not None:
        return None
    if isinstance(activation, nn.Layer):
        what = kind.__name__
        if not is_plain(activation, kind):
            return f"its {name} has hooks or a forward of its own"
    else:
        what = getattr(activation, "__name__", "").lstrip("_") or repr(activation)
    return f"its {name} is {what}, not relu, gelu or silu"
