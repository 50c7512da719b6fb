"""The parts of layers: whether they compute what their classes do, and nothing else; and their parameters."""

from __future__ import annotations

from typing import Any, Sequence

from paddle import nn
from paddle.framework import in_dynamic_mode


def is_plain(layer: Any, kind: type[Any]) -> bool:
    """Whether a layer is of exactly that class, without hooks or a forward of its own."""
    return (
        type(layer) is kind
        and not layer._forward_pre_hooks
        and not layer._forward_post_hooks
        and "forward" not in layer.__dict__
    )


def is_plain_dropout(layer: Any) -> bool:
    """Whether a layer is a ``paddle.nn.Dropout`` that drops as the operator does: each element by itself, at a rate
    that is a number."""
    return (
        is_plain(layer, nn.Dropout)
        and layer.mode == "upscale_in_train"
        and layer.axis is None
        and isinstance(layer.p, (int, float))
    )


def reason_against_linear(name: str, layer: Any) -> str | None:
    """Why the layer called `name` is no ``paddle.nn.Linear`` as Paddle makes it; None if it is one."""
    if type(layer) is not nn.Linear:
        return f"its {name} is a {type(layer).__name__}, not a paddle.nn.Linear"
    if not is_plain(layer, nn.Linear):
        return f"its {name} has hooks or a forward of its own"
    reason = reason_against_class(nn.Linear)
    if reason is not None:
        return reason
    extra = sorted({*layer._parameters, *layer._buffers, *layer._sub_layers} - {"weight", "bias"})
    return f"its {name} has {extra[0]} beside its weight and bias" if extra else None


def parameters_of(layer: Any, names: Sequence[str]) -> list:
    """Parameters of a layer. Paddle takes several microseconds to find each as an attribute, which only static graphs
    need: they have other values behind the attributes."""
    known = layer._parameters if in_dynamic_mode() else {}
    return [known[name] if name in known else getattr(layer, name) for name in names]


def origin_of_forward(kind: Any) -> str | None:
    """The module that wrote the forward of one of Paddle's classes; None if that is Paddle."""
    module = getattr(kind.forward, "__globals__", {}).get("__name__") or f"a {type(kind.forward).__name__}"
    return None if str(module).startswith("paddle.") else str(module)


def reason_against_class(kind: Any, *known: str) -> str | None:
    """Why a class of ``paddle.nn`` may compute something else than Paddle's; None if its forward is Paddle's own or
    from one of the `known` modules."""
    origin = origin_of_forward(kind)
    return (
        None
        if origin is None or origin in known
        else f"paddle.nn.{kind.__name__}.forward was replaced by one of {origin}"
    )
