"""Whole models: every attention and feed-forward that an operator can serve, and back."""

from __future__ import annotations

import gc
import re
import warnings
from dataclasses import dataclass, field
from typing import Any, Iterable, Literal, overload

import paddle
from paddle import nn

from .._arranged import check_all_plain
from .._checks import check_model, check_switches
from .._types import Model
from ..report import Report
from .adapters import AttentionAdapter
from .decoder_layer import ConvertedDecoderLayer
from .encoder_layer import ConvertedEncoderLayer
from .feed_forward import FusedFeedForward, fuse_feed_forward, unfuse_feed_forward
from .multi_head_attention import (
    WideMultiHeadAttention,
    fuse_attention,
    is_wide,
    reason_against_bare,
    unfuse_attention,
)
from .packed import PackedAttention, pack
from .registry import adapter_for, full_name, reason_against_adapted
from .transformer_layer import TransformerLayer, fuse, reason_against_layer, reasons_against_parts, unfuse

_OUR_MODULES = __package__.rpartition(".")[0] + "."
_TRANSFORMER_LAYERS: dict[type[Any], type[Any]] = {
    nn.TransformerEncoderLayer: ConvertedEncoderLayer,
    nn.TransformerDecoderLayer: ConvertedDecoderLayer,
}
# An attention is known by the name of its class or by the names of sublayers.
_ATTENTION_CLASS = re.compile(r"attention|attn", re.IGNORECASE)
_PROJECTIONS = (
    {"q_proj", "k_proj"},
    {"query", "key"},
    {"to_q", "to_k"},
    {"qkv"},
    {"qkv_proj"},
    {"c_attn"},
    {"query_key_value"},
)


@overload
def convert(model: Model, return_report: Literal[False] = False) -> Model: ...
@overload
def convert(model: Model, return_report: Literal[True]) -> tuple[Model, Report]: ...
@overload
def convert(model: Model, return_report: bool) -> Model | tuple[Model, Report]: ...
def convert(model: Model, return_report: bool = False) -> Model | tuple[Model, Report]:
    """Makes a model run the operators for every attention and feed-forward that they can serve. These are all parts of
    each ``paddle.nn.TransformerEncoderLayer`` and ``TransformerDecoderLayer``, of either norm order, with their layer
    norm, dropout and residual, each other ``paddle.nn.MultiHeadAttention``, and each layer whose class has an adapter
    (:func:`register_adapter`). Other keys and values, caches and attention weights are served as well. Outputs and
    gradients are the same, up to rounding; dropout draws other masks.

    The model is changed in place (``copy.deepcopy`` it first to keep it). The parameters of the query, key and value
    projections become ``qkv_weight`` and ``qkv_bias`` of their attention, new parameters that are trained as those
    were. Everything else stays the same object: other parameters, all those of a feed-forward among them, sublayers,
    modes, hooks. Later changes take effect: dropout rates, modes, hooks, replaced sublayers and activations, attention
    weights that are asked for. If an operator does not serve such a call, the class's own forward runs, of a
    transformer layer that of the part. The packed projections stay as sublayers without ``weight`` and ``bias``.
    Gradient hooks (``Tensor.register_hook``) of their parameters are lost, since Paddle does not tell of them.

    Convert first, then make the optimizer, and only then ``paddle.DataParallel``, fleet's wrappers and
    ``paddle.jit.to_static``. Checkpoints of either naming load; :func:`separate_state_dict` gives one under the names
    from before.

    ``bool`` and ``int`` masks of Paddle's layers are read as Paddle does: a query that may see no key attends to all
    alike.

    What an operator can't serve is left alone, of a transformer layer only that part: attention of other classes,
    subclasses; ``kdim``, ``vdim`` and ``need_weights`` in a transformer layer, with which Paddle's own forward fails;
    activations other than relu, gelu and silu; parts that were replaced, have hooks or a forward of their own, or whose
    packed parameters others share; classes whose forward was replaced by anything but PaddleNLP and PaddleFormers.

    Args:
        model: A layer in dygraph. A sublayer that is used several times is converted once.
        return_report: Whether to return what was converted and what was left alone. Otherwise there is a warning if
            something was left alone or nothing was found.

    Returns:
        The model; with ``return_report`` a tuple of the model and a Report with ``converted`` and ``left_alone``, dicts
            by layer name. A transformer layer of which a part was converted is in both, with the names of the parts.

    Raises:
        TypeError: ``model`` is not a layer.
        RuntimeError: Static-graph mode is on, or the model is in use already: an optimizer holds a parameter that would
            be packed, or the model is wrapped for several devices or made static.
    """
    _check_model("convert", model)
    check_switches(return_report=return_report)
    report = Report()
    found = _find(model, report)
    packed = [
        getattr(layer, part.attention)
        for layer, served in found.transformer_layers
        for name, part in _TRANSFORMER_LAYERS[type(layer)]._attentions.items()
        if name in served
    ]
    packed += [layer for layer in found.attentions if not (type(layer) is nn.MultiHeadAttention and is_wide(layer))]
    changed = [*(layer for layer, _ in found.transformer_layers), *found.attentions, *found.feed_forwards]
    _check_not_in_use("convert", changed, _separate_parameters(packed))
    for layer, served in found.transformer_layers:
        fuse(layer, _TRANSFORMER_LAYERS[type(layer)], served)
    for layer in found.attentions:
        if type(layer) is nn.MultiHeadAttention:
            fuse_attention(layer)
        else:
            pack(layer, adapter_for(type(layer)))
    for layer in found.feed_forwards:
        fuse_feed_forward(layer, adapter_for(type(layer)))
    if return_report:
        return model, report
    if report.left_alone or not report.converted:
        lines = "\n".join(report.lines_of_left_alone()) or "found no attention and no feed-forward"
        warnings.warn(f"convert: {lines}", stacklevel=2)
    return model


def revert(model: Model) -> Model:
    """The inverse of :func:`convert`, in place. The projections get parameters of their own again: new ones with the
    packed values, the old names and Paddle's old names (``Parameter.name``).

    Raises:
        TypeError: ``model`` is not a layer.
        RuntimeError: Static-graph mode is on, or the model is wrapped for several devices or made static
            (:func:`separate_state_dict` saves such a model under the names from before), or its weights are arranged.
            If an optimizer holds packed parameters, there is a warning.
    """
    _check_model("revert", model)
    check_all_plain("revert", model)
    layers = model.sublayers(include_self=True)
    transformer_layers = [layer for layer in layers if isinstance(layer, TransformerLayer)]
    inside = {
        id(layer._sub_layers.get(part.attention)) for layer in transformer_layers for part in layer._attentions.values()
    }
    kinds = (PackedAttention, WideMultiHeadAttention)
    attentions = [layer for layer in layers if isinstance(layer, kinds) and id(layer) not in inside]
    feed_forwards = [layer for layer in layers if isinstance(layer, FusedFeedForward)]
    packed = [layer for layer in layers if isinstance(layer, PackedAttention)]
    parameters = {id(p): name for layer in packed for name, p in layer._parameters.items() if name.startswith("qkv_")}
    _check_not_in_use("revert", [*transformer_layers, *attentions, *feed_forwards], parameters)
    for layer in transformer_layers:
        unfuse(layer, next(kind for kind, converted in _TRANSFORMER_LAYERS.items() if type(layer) is converted))
    for attention in attentions:
        unfuse_attention(attention)
    for feed_forward in feed_forwards:
        unfuse_feed_forward(feed_forward)
    return model


def _check_model(function: str, model: Any) -> None:
    check_model(model)
    if not paddle.in_dynamic_mode():
        raise RuntimeError(
            f"{function}: expected dygraph mode, got static-graph mode; {function} the model before the graph is built"
        )


@dataclass
class _Found:
    """The layers to convert.

    Attributes:
        transformer_layers: Each with the names of the parts that are served.
    """

    transformer_layers: list = field(default_factory=list)
    attentions: list = field(default_factory=list)
    feed_forwards: list = field(default_factory=list)


def _find(model: nn.Layer, report: Report) -> _Found:
    """The layers to convert; they and what is left alone are reported."""
    uses = _count_uses(model)
    layers = list(model.named_sublayers(include_self=True))
    found = _Found()
    settled: set = set()  # layers that are reported, or lie in one that is
    for name, layer in layers:
        if id(layer) in settled:
            continue
        if _is_ours(layer):
            settled.update(map(id, layer.sublayers()))
            continue
        if isinstance(layer, tuple(_TRANSFORMER_LAYERS)):
            _look_at_transformer_layer(name, layer, uses, found, report)
            settled.update(map(id, layer.sublayers()))
            continue
        adapter = adapter_for(type(layer))
        if adapter is None and not _is_attention(layer):
            continue
        settled.update(map(id, layer.sublayers()))
        if type(layer) is nn.MultiHeadAttention:
            reason = reason_against_bare(layer, uses)
        else:
            reason = _reason_without_adapter(layer) if adapter is None else reason_against_adapted(layer, adapter, uses)
        if reason is not None:
            report.left_alone[name] = reason
            continue
        report.converted[name] = full_name(type(layer))
        (found.attentions if isinstance(adapter, AttentionAdapter) else found.feed_forwards).append(layer)
    return found


def _look_at_transformer_layer(name: str, layer: Any, uses: dict[int, int], found: _Found, report: Report) -> None:
    kind = next(kind for kind in _TRANSFORMER_LAYERS if isinstance(layer, kind))
    converted = _TRANSFORMER_LAYERS[kind]
    reason = reason_against_layer(layer, kind, converted._attentions)
    if reason is not None:
        report.left_alone[name] = reason
        return
    reasons = reasons_against_parts(layer, converted, uses)
    served = [part for part, reason in reasons.items() if reason is None]
    if served:
        order, what = "pre" if layer.normalize_before else "post", kind.__name__[len("Transformer") : -len("Layer")]
        parts = ", ".join(served[:-1]) + " and " + served[-1] if len(served) > 1 else served[0]
        report.converted[name] = f"{order}-layer-norm {what.lower()} layer, {parts}"
        found.transformer_layers.append((layer, served))
    against = {part: reason for part, reason in reasons.items() if reason is not None}
    if len(set(against.values())) == 1 and not served:
        report.left_alone[name] = next(iter(against.values()))
    elif against:
        report.left_alone[name] = "; ".join(f"{part}: {reason}" for part, reason in against.items())


def _is_ours(layer: nn.Layer) -> bool:
    return isinstance(layer, (TransformerLayer, PackedAttention, WideMultiHeadAttention, FusedFeedForward)) or type(
        layer
    ).__module__.startswith(_OUR_MODULES)


def _is_attention(layer: nn.Layer) -> bool:
    """Whether a layer without an adapter seems to be an attention."""
    kind = type(layer)
    if not layer._parameters and not layer._sub_layers:
        return False
    # A whole model may have such a name itself; then its parts count.
    if any(
        _is_ours(part) or isinstance(part, tuple(_TRANSFORMER_LAYERS)) or adapter_for(type(part)) is not None
        for part in layer.sublayers()
    ):
        return False
    return bool(_ATTENTION_CLASS.search(kind.__name__)) or any(
        names <= set(layer._sub_layers) for names in _PROJECTIONS
    )


def _reason_without_adapter(layer: nn.Layer) -> str:
    if type(layer).__module__.startswith("paddle.incubate.nn"):
        return f"a paddle.incubate.nn.{type(layer).__name__}, which paddle_fused_attention.patch() serves"
    return f"a {full_name(type(layer))}, for which there is no adapter"


def _count_uses(model: nn.Layer) -> dict[int, int]:
    """In how many places each sublayer and parameter of the model is."""
    counts: dict[int, int] = {}
    for layer in model.sublayers(include_self=True):
        for child in (*layer._sub_layers.values(), *layer._parameters.values()):
            if child is not None:
                counts[id(child)] = counts.get(id(child), 0) + 1
    return counts


def _separate_parameters(attentions: list) -> dict:
    """The names of the parameters that would be packed, by id."""
    found = {}
    for attention in attentions:
        for name in adapter_for(type(attention)).layout(attention)[0]:
            for kind, parameter in getattr(attention, name)._parameters.items():
                if parameter is not None:
                    found[id(parameter)] = f"{name}.{kind}"
    return found


def _check_not_in_use(function: str, changed: list, parameters: dict) -> None:
    """Refuses if an optimizer, a wrapper or a static graph already holds what would change. Layers do not know what
    holds them, so all living objects are looked through."""
    if not changed:
        return
    ours = {id(layer) for layer in changed}
    gc.collect()  # what is deleted may still be there
    for holder in gc.get_objects():
        kind = type(holder)
        if issubclass(kind, paddle.optimizer.Optimizer):
            held = [parameters[id(p)] for p in _parameters_of_optimizer(holder) if id(p) in parameters]
            if held:
                _refuse_optimizer(function, kind.__name__, held[0])
        elif (
            issubclass(kind, nn.Layer)
            and _is_wrapped_or_static(holder)
            and not ours.isdisjoint(map(id, holder.sublayers(include_self=True)))
        ):
            what = "wrapped by" if _is_wrapper(holder) else "made static by paddle.jit.to_static in"
            raise RuntimeError(
                f"{function}: expected a model that is not in use yet, got one that is {what} a {kind.__name__}; "
                f"{function} first, then make the optimizer, then paddle.DataParallel or fleet.distributed_model, "
                "then paddle.jit.to_static"
            )


def _refuse_optimizer(function: str, optimizer: str, parameter: str) -> None:
    if function == "convert":
        raise RuntimeError(
            f"convert: expected a model whose optimizer is still to be made, got one of which a {optimizer} holds "
            f"{parameter}, which would be replaced; delete that optimizer, and make it after convert"
        )
    warnings.warn(
        f"revert: a {optimizer} holds {parameter}, which is no longer the model's; make a new optimizer to train it "
        "on, with the state that separate_optimizer_state gives before revert",
        stacklevel=4,
    )


def _parameters_of_optimizer(optimizer: Any) -> Iterable:
    for entry in getattr(optimizer, "_parameter_list", None) or ():
        yield from entry["params"] if isinstance(entry, dict) else (entry,)


def _is_wrapper(layer: nn.Layer) -> bool:
    return isinstance(layer, paddle.DataParallel) or type(layer).__module__.startswith(
        "paddle.distributed.fleet.meta_parallel"
    )


def _is_wrapped_or_static(layer: Any) -> bool:
    if "_sub_layers" not in layer.__dict__:  # half made
        return False
    return (
        _is_wrapper(layer)
        or bool(layer.__dict__.get("_original_funcs"))
        or "StaticFunction" in type(layer.__dict__.get("forward")).__name__
    )
