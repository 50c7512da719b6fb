"""The adapters by class, and the conditions on which an adapter serves a layer."""

from __future__ import annotations

import copy
import re
from typing import Any, Callable

import numpy as np
import paddle
from paddle import nn

from .._checks import shown
from .._parts import is_plain, is_plain_dropout, reason_against_class, reason_against_linear
from .adapters import (
    PADDLE_ADAPTER,
    AttentionAdapter,
    FeedForwardAdapter,
    PaddleNLPFusedLlamaAdapter,
    PaddleNLPGPTAdapter,
    PaddleNLPReluAdapter,
    VisionTransformerAdapter,
    VisionTransformerMlpAdapter,
    adapter_of_names,
)
from .feed_forward import fuse_feed_forward, reason_against_feed_forward, unfuse_feed_forward
from .packed import pack, training_attributes

_OF_PADDLENLP: dict[str, Any] = {
    "blip.modeling.BlipMLP": adapter_of_names("fc1", "fc2", "activation_fn"),
    "blip_2.modeling.Blip2MLP": adapter_of_names("fc1", "fc2", "activation_fn"),
    "clipseg.modeling.CLIPSegMLP": adapter_of_names("fc1", "fc2", "activation_fn"),
    "codegen.modeling.CodeGenMLP": adapter_of_names("fc_in", "fc_out", "act", None, "dropout"),
    "ernie_doc.modeling.PointwiseFFN": adapter_of_names("linear1", "linear2", "activation", "dropout"),
    "ernie_gen.modeling.PositionwiseFeedForwardLayer": adapter_of_names("i", "o", "act", "dropout"),
    "gpt.modeling.MultiHeadAttention": PaddleNLPGPTAdapter(),
    "gptj.modeling.GPTJMLP": adapter_of_names("fc_in", "fc_out", "act", None, "dropout"),
    "llama.modeling.LlamaMLP": PaddleNLPFusedLlamaAdapter(),
    "mt5.modeling.MT5DenseReluDense": PaddleNLPReluAdapter(),
    "speecht5.modeling.SpeechT5FeedForward": adapter_of_names(
        "intermediate_dense", "output_dense", "intermediate_act_fn", "intermediate_dropout", "output_dropout"
    ),
    "t5.modeling.T5DenseReluDense": PaddleNLPReluAdapter(),
    "xlm.modeling.TransformerFFN": adapter_of_names("lin1", "lin2", "act", None, "dropout"),
}
_OF_PADDLECLAS: dict[str, Any] = {
    "legendary_models.swin_transformer.Mlp": VisionTransformerMlpAdapter(),
    "model_zoo.cae.Mlp": adapter_of_names("fc1", "fc2", "act", None, "drop"),
    "model_zoo.cswin_transformer.Mlp": adapter_of_names("fc1", "fc2", "act", "dropout", "dropout"),
    "model_zoo.cvt.Mlp": VisionTransformerMlpAdapter(),
    "model_zoo.mobilevit.Mlp": adapter_of_names("fc1", "fc2", "act", "dropout1", "dropout2"),
    "model_zoo.svtrnet.Mlp": VisionTransformerMlpAdapter(),
    "model_zoo.swin_transformer_v2.Mlp": VisionTransformerMlpAdapter(),
    "model_zoo.tnt.Mlp": VisionTransformerMlpAdapter(),
    "model_zoo.vision_transformer.Attention": VisionTransformerAdapter(),
    "model_zoo.vision_transformer.Mlp": VisionTransformerMlpAdapter(),
}
# By class, or by name for classes of packages that may not be there.
_adapters: dict[Any, Any] = {
    **{f"paddlenlp.transformers.{name}": adapter for name, adapter in _OF_PADDLENLP.items()},
    # PaddleClas is used as a checkout or as a package.
    **{f"ppcls.arch.backbone.{name}": adapter for name, adapter in _OF_PADDLECLAS.items()},
    **{f"paddleclas.ppcls.arch.backbone.{name}": adapter for name, adapter in _OF_PADDLECLAS.items()},
}

_DOTTED_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def register_adapter(layer_class: type[nn.Layer] | str, adapter: AttentionAdapter | FeedForwardAdapter) -> None:
    """Makes :func:`convert` serve the layers of a class.

    Args:
        layer_class: A subclass of ``paddle.nn.Layer``, or its full name, such as ``"my_package.vision.Attention"``.
            Derived classes are not meant. A new adapter replaces the class's old one.
        adapter: An :class:`AttentionAdapter` or a :class:`FeedForwardAdapter`.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The class is one that the package knows by itself.
    """
    if isinstance(layer_class, str):
        if not _DOTTED_NAME.fullmatch(layer_class):
            raise ValueError(
                f"layer_class: expected a class or its full name, as 'package.module.Class', got {shown(layer_class)}"
            )
    elif not isinstance(layer_class, type) or not issubclass(layer_class, nn.Layer):
        raise TypeError(
            f"layer_class: expected a subclass of paddle.nn.Layer or its full name, got {shown(layer_class)}"
        )
    for known in (nn.MultiHeadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        if layer_class is known or layer_class == full_name(known):
            raise ValueError(
                f"layer_class: expected a class of your own or of another library, got paddle.nn.{known.__name__}"
            )
    if not isinstance(adapter, (AttentionAdapter, FeedForwardAdapter)):
        raise TypeError(f"adapter: expected an AttentionAdapter or a FeedForwardAdapter, got {type(adapter).__name__}")
    _adapters[layer_class] = adapter


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def adapter_for(kind: type) -> Any:
    """The adapter of a class, of attention or of a feed-forward; None if there is none."""
    if kind is nn.MultiHeadAttention:
        return PADDLE_ADAPTER
    return _adapters.get(kind) or _adapters.get(full_name(kind))


def reason_against(attention: Any, adapter: AttentionAdapter, uses: dict[int, int], prefix: str = "") -> str | None:
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
            if child is not None and uses.get(id(child), 0) > 1:
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


def reason_against_adapted(layer: Any, adapter: Any, uses: dict[int, int]) -> str | None:
    """Why a layer of another class than Paddle's can't be converted; None if it can. The adapter must name everything
    in it, and a converted copy must give the numbers of the class's own forward."""
    if not is_plain(layer, type(layer)):
        return "it has hooks or a forward of its own"
    if isinstance(adapter, AttentionAdapter):
        reason = reason_against(layer, adapter, uses)
        named = [*adapter.layout(layer)[0], adapter.output] if reason is None else []
    else:
        reason = reason_against_feed_forward(layer, adapter)
        named = [adapter.linear1, adapter.linear2, adapter.activation]
    if reason is not None:
        return reason
    known = {*named, *adapter.dropouts(), *adapter.ignored}
    for name in (*layer._sub_layers, *layer._parameters, *layer._buffers):
        if name not in known:
            return f"it has {name}, which its adapter does not name"
    return (_reason_against_numbers if isinstance(adapter, AttentionAdapter) else _reason_against_trials)(
        layer, adapter
    )


def _reason_against_numbers(attention: Any, adapter: AttentionAdapter) -> str | None:
    copied = copy.deepcopy(attention)
    copied.to(dtype="float32")
    copied.eval()
    x = _example(getattr(copied, adapter.output).weight)
    return _reason_against_change(copied, adapter, x, lambda: pack(copied, adapter))


def _reason_against_trials(layer: Any, adapter: FeedForwardAdapter) -> str | None:
    """Tries a feed-forward in evaluation mode, and in training mode with nothing dropped; the order in which it calls
    its parts tells where its dropouts stand."""
    for name in (adapter.linear1, adapter.linear2):
        for parameter in getattr(layer, name)._parameters.values():
            if parameter is not None and (parameter.is_dist() or not parameter._is_initialized()):
                found = (
                    "spread over devices" if parameter.is_dist() else "without values, as paddle.LazyGuard leaves it"
                )
                return f"a parameter of its {name} is {found}"
    tried = copy.deepcopy(layer)
    tried.to(dtype="float32")
    for name in adapter.dropouts():
        getattr(tried, name).p = 0.0
    x = _example(getattr(tried, adapter.linear1).weight)
    state = paddle.get_rng_state()  # in training mode a forward may draw something
    try:
        for training in (False, True):
            tried.train() if training else tried.eval()
            reason = _reason_against_change(tried, adapter, x, lambda: fuse_feed_forward(tried, adapter))
            if reason is not None:
                return f"{reason}, in training mode" if training else reason
            unfuse_feed_forward(tried)
        return _reason_against_order(tried, adapter, x)
    finally:
        paddle.set_rng_state(state)


def _reason_against_order(layer: Any, adapter: FeedForwardAdapter, x: Any) -> str | None:
    names = (adapter.linear1, adapter.activation, adapter.dropout1, adapter.linear2, adapter.dropout2)
    expected = [name for name in names if name is not None and name in layer._sub_layers]
    order: list[str] = []
    hooks = [
        layer._sub_layers[name].register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name in dict.fromkeys(expected)
    ]
    with paddle.no_grad():
        layer(*adapter.example(x))
    for hook in hooks:
        hook.remove()
    return None if order == expected else f"its forward calls {', '.join(order)}, and not {', '.join(expected)}"


def _example(weight: Any) -> Any:
    """x for a trial, on the device of a weight with as many rows as x has columns."""
    numbers = np.random.default_rng(0).standard_normal((2, 5, weight.shape[0])).astype("float32")
    return paddle.to_tensor(numbers, place=weight.place)


def _reason_against_change(layer: Any, adapter: Any, x: Any, change: Callable) -> str | None:
    """What tells against converting a layer, a copy, by `change`: the numbers that it gives before and after."""
    arguments = adapter.example(x)
    with paddle.no_grad():
        try:
            expected = layer(*arguments)
        except Exception as error:
            return f"its forward could not be tried: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        change()
        if adapter.inputs(layer, *arguments) is None:
            return "its adapter does not serve its example"
        actual = layer(*arguments)
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
