"""The adapters by class, and the conditions on which an adapter serves an attention."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import paddle
from paddle import nn

from .._parts import is_plain, is_plain_dropout, reason_against_class, reason_against_linear
from .adapters import AttentionAdapter, PaddleAdapter, PaddleNLPGPTAdapter, VisionTransformerAdapter
from .packed import pack, training_attributes

PADDLE_ADAPTER = PaddleAdapter()

# By class, or by name for classes of packages that may not be there.
_adapters: dict[Any, AttentionAdapter] = {
    "paddlenlp.transformers.gpt.modeling.MultiHeadAttention": PaddleNLPGPTAdapter(),
    "ppcls.arch.backbone.model_zoo.vision_transformer.Attention": VisionTransformerAdapter(),
    "paddleclas.ppcls.arch.backbone.model_zoo.vision_transformer.Attention": VisionTransformerAdapter(),
}

_DOTTED_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def register_adapter(attention_class: type | str, adapter: AttentionAdapter) -> None:
    """Makes :func:`convert` serve the layers of a class.

    Args:
        attention_class: A subclass of ``paddle.nn.Layer``, or its full name, such as ``"my_package.vision.Attention"``.
            Derived classes are not meant. A new adapter replaces the class's old one.
        adapter: An :class:`AttentionAdapter`.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The class is one that the package knows by itself.
    """
    if isinstance(attention_class, str):
        if not _DOTTED_NAME.fullmatch(attention_class):
            raise ValueError(
                "attention_class: expected a class or its full name, as 'package.module.Class', got "
                f"{attention_class!r}"
            )
    elif not isinstance(attention_class, type) or not issubclass(attention_class, nn.Layer):
        raise TypeError(
            f"attention_class: expected a subclass of paddle.nn.Layer or its full name, got {attention_class!r}"
        )
    if attention_class is nn.MultiHeadAttention or attention_class == full_name(nn.MultiHeadAttention):
        raise ValueError(
            "attention_class: expected a class of your own or of another library, got paddle.nn.MultiHeadAttention"
        )
    if not isinstance(adapter, AttentionAdapter):
        raise TypeError(f"adapter: expected an AttentionAdapter, got {type(adapter).__name__}")
    _adapters[attention_class] = adapter


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def adapter_for(kind: type) -> AttentionAdapter | None:
    """The adapter of a class."""
    if kind is nn.MultiHeadAttention:
        return PADDLE_ADAPTER
    return _adapters.get(kind) or _adapters.get(full_name(kind))


def reason_against(attention: Any, adapter: AttentionAdapter, uses: dict, prefix: str = "") -> str | None:
    """Why an attention can't be packed; None if it can. `uses` says in how many places each layer and parameter is;
    `prefix` comes before the names of parts."""
    reason = adapter.reason_against(attention)
    if reason is not None:
        return reason
    projections, _ = adapter.layout(attention)
    names = (*projections, adapter.output)
    for name in names:
        reason = reason_against_linear(prefix + name, getattr(attention, name, None))
        if reason is not None:
            return reason
    reason = reason_against_class(nn.Dropout) if adapter.dropouts() else None
    if reason is not None:
        return reason
    for name in adapter.dropouts():
        part = getattr(attention, name, None)
        if not isinstance(part, nn.Dropout) or not is_plain_dropout(part):
            return (
                f"its {prefix}{name} is a {type(part).__name__}, not a paddle.nn.Dropout of mode 'upscale_in_train' "
                "without hooks"
            )
    layers = [getattr(attention, name) for name in projections]
    reason = _reason_against_shapes(adapter.num_heads(attention), layers, getattr(attention, adapter.output))
    if reason is not None:
        return reason
    if len({layer.bias is None for layer in layers}) > 1:
        return "only some of its projections have a bias"
    for kind in ("weight", "bias"):
        parameters = [getattr(layer, kind) for layer in layers]
        for parameter in parameters:
            if parameter is not None and (parameter.is_dist() or not parameter._is_initialized()):
                found = (
                    "spread over devices" if parameter.is_dist() else "without values, as paddle.LazyGuard leaves it"
                )
                return f"the {kind} of a projection is {found}"
        if parameters[0] is not None and len({repr(training_attributes(p)) for p in parameters}) > 1:
            return f"the {kind} of {', '.join(projections)} differ in dtype or in how they are trained"
    for part in (attention, *layers):
        for child in (part, *part._parameters.values()):
            if child is not None and uses[id(child)] > 1:
                return f"it shares its {type(part).__name__} or a parameter of it with another layer"
    return None


def _reason_against_shapes(num_heads: int, layers: list, output: Any) -> str | None:
    embed_dim = layers[0].weight.shape[0]
    columns = 3 * embed_dim // len(layers)
    for layer in layers:
        if list(layer.weight.shape) != [embed_dim, columns]:
            return f"a projection has a weight of shape {list(layer.weight.shape)}, not [{embed_dim}, {columns}]"
    if list(output.weight.shape) != [embed_dim, embed_dim]:
        return (
            f"its output projection has a weight of shape {list(output.weight.shape)}, not [{embed_dim}, {embed_dim}]"
        )
    if num_heads < 1 or embed_dim % num_heads:
        return f"its width {embed_dim} is no multiple of its {num_heads} heads"
    return None


def reason_against_adapted(attention: Any, adapter: AttentionAdapter, uses: dict) -> str | None:
    """As :func:`reason_against`, for classes other than Paddle's: the adapter must name everything in the layer, and a
    packed copy must give the numbers of the class's own forward."""
    if not is_plain(attention, type(attention)):
        return "it has hooks or a forward of its own"
    reason = reason_against(attention, adapter, uses)
    if reason is not None:
        return reason
    known = {*adapter.layout(attention)[0], adapter.output, *adapter.dropouts(), *adapter.ignored}
    for name in (*attention._sub_layers, *attention._parameters, *attention._buffers):
        if name not in known:
            return f"it has {name}, which its adapter does not name"
    return _reason_against_numbers(attention, adapter)


def _reason_against_numbers(attention: Any, adapter: AttentionAdapter) -> str | None:
    copied = copy.deepcopy(attention)
    copied.to(dtype="float32")
    copied.eval()
    embed_dim = getattr(copied, adapter.output).weight.shape[0]
    numbers = np.random.default_rng(0).standard_normal((2, 5, embed_dim)).astype("float32")
    x = paddle.to_tensor(numbers, place=getattr(copied, adapter.output).weight.place)
    arguments = adapter.example(x)
    with paddle.no_grad():
        try:
            expected = copied(*arguments)
        except Exception as error:
            return f"its forward could not be tried: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        pack(copied, adapter)
        if adapter.inputs(copied, *arguments) is None:
            return "its adapter does not serve its example"
        actual = copied(*arguments)
    expected, actual = (result if isinstance(result, (tuple, list)) else (result,) for result in (expected, actual))
    if list(map(_shape_of, expected)) != list(map(_shape_of, actual)) or _shape_of(actual[0]) != x.shape:
        return "its forward returns something else than the operator"
    for wanted, found in zip(expected, actual):
        size, difference = float(wanted.abs().max()), float((found - wanted).abs().max())
        if not difference <= 1e-4 * size:
            return (
                f"its forward gives other numbers than the operator: they differ by {difference:.2g} where the "
                f"largest is {size:.2g}"
            )
    return None


def _shape_of(result: Any) -> Any:
    return result.shape if isinstance(result, paddle.Tensor) else None
