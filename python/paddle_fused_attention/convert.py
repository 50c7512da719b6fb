"""Whole models: the attention of every ``paddle.nn.TransformerEncoderLayer`` to the fused layer, and back.

In an encoder layer ``self_attn``, ``norm1``, ``dropout1`` and the residual become one FusedMultiHeadAttention, which takes
the place of ``self_attn``. The encoder layer itself stays the same object, of another class, so that hooks, attributes and
other layers that refer to it keep their hold on it.
"""

from __future__ import annotations

import warnings
from typing import Any, Iterator

import paddle
from paddle import nn

from ._composed import additive_mask, attention_with_cache
from .functional import TENSOR_ARGUMENTS, _check_tensor
from .layer import FusedMultiHeadAttention
from .report import Report
from .weights import pack_qkv_bias, pack_qkv_weight, unpack_qkv_bias, unpack_qkv_weight

_PARTS = ("self_attn", "norm1", "dropout1")
# The order in which paddle.nn.TransformerEncoderLayer makes its sublayers, which is that of its state dict.
_ORDER = ("self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class ConvertedEncoderLayer(nn.TransformerEncoderLayer):
    """A ``paddle.nn.TransformerEncoderLayer`` whose ``self_attn`` is a FusedMultiHeadAttention that does the work of ``norm1``,
    ``dropout1`` and the first residual too; there are no such sublayers. Arguments and results are those of the base class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _fuse(self)

    def forward(self, src: paddle.Tensor, src_mask: paddle.Tensor | None = None, cache: Any = None) -> Any:
        _check_tensor("src", src, required=True)
        src_mask = additive_mask("src_mask", src_mask, src)
        if cache is None:
            return self._feed_forward(self.self_attn(src, attn_mask=src_mask))
        attended, new_cache = self._attend_with_cache(src, src_mask, cache)
        return self._feed_forward(attended), new_cache

    def _feed_forward(self, src: paddle.Tensor) -> paddle.Tensor:
        hidden = self.norm2(src) if self.normalize_before else src
        hidden = self.linear2(self.dropout(self.activation(self.linear1(hidden))))
        out = src + self.dropout2(hidden)
        return out if self.normalize_before else self.norm2(out)

    def _attend_with_cache(self, src: paddle.Tensor, src_mask: paddle.Tensor | None, cache: Any) -> tuple:
        if not isinstance(cache, nn.MultiHeadAttention.Cache):
            raise NotImplementedError(
                f"cache: expected None or a paddle.nn.MultiHeadAttention.Cache, got {type(cache).__name__}"
            )
        for name in ("k", "v"):
            _check_tensor(f"cache.{name}", getattr(cache, name), required=True)
        fused = self.self_attn
        inputs = (src, *(getattr(fused, name) for name in TENSOR_ARGUMENTS[1:-1]), src_mask)
        out, k, v = attention_with_cache(
            inputs,
            cache.k,
            cache.v,
            numbers=(fused.epsilon, fused.epsilon, fused.dropout_rate, fused.attn_dropout_rate),
            pre_layer_norm=fused.normalize_before,
            final_layer_norm=fused.final_layer_norm,
            training=fused.training,
        )
        return out, nn.MultiHeadAttention.Cache(k, v)

    def gen_cache(self, src: paddle.Tensor) -> Any:
        """An empty cache for sequences like ``src``."""
        shape = [src.shape[0], self.self_attn.num_heads, 0, self.self_attn.head_dim]
        return nn.MultiHeadAttention.Cache(paddle.zeros(shape, src.dtype), paddle.zeros(shape, src.dtype))


def convert(model: nn.Layer, return_report: bool = False) -> Any:
    """Replaces the attention of every ``paddle.nn.TransformerEncoderLayer`` in a model, with its layer norm, dropout and
    residual, by one :class:`FusedMultiHeadAttention`, in both norm orders. Outputs and gradients are the same, up to
    rounding; dropout draws other masks.

    The model is changed in place (``copy.deepcopy`` it first to keep it), the modes of its layers are kept, and so is which
    of its parameters are trained. The parameters of the attention are new ones: make the optimizer afterwards, and load
    checkpoints of the old names before, or convert them with ``python -m paddle_fused_attention convert``;
    ``paddle.jit.to_static`` comes afterwards too. ``bool`` and ``int`` masks are read as Paddle does: a query that may see no
    key attends to all alike. A mask gets no gradient. A cache is served by ordinary ops, for inference.

    Layers that the operator can't stand for are left alone: attention outside an encoder layer, as in decoders; subclasses of
    Paddle's layers; ``kdim``, ``vdim``, ``need_weights``; sublayers that were replaced, have hooks, or share parameters with
    others.

    Args:
        model: A layer, of dygraph. An encoder layer that is used several times is converted once.
        return_report: Whether to return what was converted and what was left alone. Otherwise there is a warning if some
            attention was left alone or none was found.

    Returns:
        The model; with ``return_report`` a tuple of the model and a Report with ``converted`` and ``left_alone``, dicts by
        layer name.

    Raises:
        TypeError: ``model`` is not a layer.
        RuntimeError: Static-graph mode is on.
    """
    _check_model("convert", model)
    owners = _owners(model)
    report = Report()
    layers = list(model.named_sublayers(include_self=True))
    inside = {id(getattr(layer, "self_attn", None)) for _, layer in layers if isinstance(layer, nn.TransformerEncoderLayer)}
    with paddle.no_grad():
        for name, layer in layers:
            if isinstance(layer, ConvertedEncoderLayer):
                continue
            if isinstance(layer, nn.TransformerEncoderLayer):
                reason = _reason_against(layer, owners)
                if reason is None:
                    _fuse(layer)
                    report.converted[name] = f"{'pre' if layer.normalize_before else 'post'}-layer-norm encoder layer"
                else:
                    report.left_alone[name] = reason
            elif isinstance(layer, nn.MultiHeadAttention) and id(layer) not in inside:
                report.left_alone[name] = "not part of a paddle.nn.TransformerEncoderLayer"
    if return_report:
        return model, report
    if report.left_alone or not report.converted:
        found = str(Report(left_alone=report.left_alone)) or "found no paddle.nn.TransformerEncoderLayer"
        warnings.warn(f"convert: {found}", stacklevel=2)
    return model


def revert(model: nn.Layer) -> nn.Layer:
    """The inverse of :func:`convert`, in place: every converted layer is a ``paddle.nn.TransformerEncoderLayer`` again, with
    the same values in its parameters, which are new ones, and the names that they had.

    Raises:
        TypeError: ``model`` is not a layer.
        ValueError: A converted layer was changed to one that Paddle's layer can't stand for.
        RuntimeError: Static-graph mode is on.
    """
    _check_model("revert", model)
    found = [
        (name, layer) for name, layer in model.named_sublayers(include_self=True) if isinstance(layer, ConvertedEncoderLayer)
    ]
    for name, layer in found:
        fused = layer.self_attn
        if fused.causal or not fused.add_residual or fused.normalize_before == fused.final_layer_norm:
            raise ValueError(
                f"revert: expected {name or 'the model'} with causal=False, add_residual=True and one layer norm, "
                f"got causal={fused.causal}, add_residual={fused.add_residual}, normalize_before={fused.normalize_before}, "
                f"final_layer_norm={fused.final_layer_norm}"
            )
    with paddle.no_grad():
        for _, layer in found:
            _separate(layer)
    return model


def _check_model(function: str, model: Any) -> None:
    if not isinstance(model, nn.Layer):
        raise TypeError(f"model: expected a paddle.nn.Layer, got {type(model).__name__}")
    if not paddle.in_dynamic_mode():
        raise RuntimeError(
            f"{function}: expected dygraph mode, got static-graph mode; {function} the model before the graph is built"
        )


def _owners(model: nn.Layer) -> dict:
    """In how many places each sublayer and parameter of the model is."""
    counts: dict = {}
    for layer in model.sublayers(include_self=True):
        for child in (*layer._sub_layers.values(), *layer._parameters.values()):
            if child is not None:
                counts[id(child)] = counts.get(id(child), 0) + 1
    return counts


def _training_of(parameter: Any) -> tuple:
    """How a parameter is trained; what is packed into one parameter must agree in it."""
    return (parameter.stop_gradient, parameter.optimize_attr, parameter.regularizer, parameter.need_clip, parameter.dtype)


def _reason_against(layer: nn.Layer, owners: dict) -> str | None:
    """Why an encoder layer can't be converted; None if it can."""
    if type(layer) is not nn.TransformerEncoderLayer:
        return f"a subclass of paddle.nn.TransformerEncoderLayer, {type(layer).__name__}"
    if "forward" in vars(layer):
        return "its forward was replaced, as by paddle.jit.to_static"
    attention, norm, dropout = (getattr(layer, name) for name in _PARTS)
    expected = ((attention, nn.MultiHeadAttention), (norm, nn.LayerNorm), (dropout, nn.Dropout))
    for name, (part, kind) in zip(_PARTS, expected):
        if type(part) is not kind:
            return f"its {name} is a {type(part).__name__}, not a paddle.nn.{kind.__name__}"
    for name in _PROJECTIONS:
        if type(getattr(attention, name)) is not nn.Linear:
            return f"its self_attn.{name} is a {type(getattr(attention, name)).__name__}, not a paddle.nn.Linear"
    if attention.need_weights:
        return "its self_attn has need_weights=True"
    for name in ("kdim", "vdim"):
        if getattr(attention, name) != attention.embed_dim:
            return f"its self_attn has {name}={getattr(attention, name)}, other than embed_dim {attention.embed_dim}"
    if list(norm._normalized_shape) != [attention.embed_dim]:
        return f"its norm1 is over {list(norm._normalized_shape)}, other than embed_dim {attention.embed_dim}"
    if dropout.mode != "upscale_in_train" or dropout.axis is not None:
        return f"its dropout1 has mode={dropout.mode!r} and axis={dropout.axis}"
    if dropout.training != attention.training:
        return "its self_attn and dropout1 are not in the same mode"
    projections = [getattr(attention, name) for name in _PROJECTIONS]
    for part in (attention, norm, dropout, *projections):
        if part._forward_pre_hooks or part._forward_post_hooks:
            return f"its {type(part).__name__} has hooks"
    if len({projection.bias is None for projection in projections}) > 1:
        return "only some of its projections have a bias"
    for name in ("weight", "bias"):
        q, k, v = (getattr(projection, name) for projection in projections[:3])
        if q is not None and not _training_of(q) == _training_of(k) == _training_of(v):
            return f"the {name} of q_proj, k_proj and v_proj differ in dtype or in how they are trained"
    for part in (attention, norm, dropout, *projections):
        for child in (part, *part._parameters.values()):
            if child is not None and owners[id(child)] > 1:
                return f"it shares its {type(part).__name__} or a parameter of it with another layer"
    return None


def _set_parameter(owner: nn.Layer, name: str, value: Any, like: Any) -> None:
    """Gives a layer a new parameter, trained like another one; None for none."""
    if value is None:
        setattr(owner, name, None)
        return
    parameter = owner.create_parameter(value.shape, dtype=like.dtype, default_initializer=nn.initializer.Constant(0.0))
    parameter.set_value(value)
    parameter.stop_gradient = like.stop_gradient
    for attribute in ("optimize_attr", "regularizer", "need_clip"):
        setattr(parameter, attribute, getattr(like, attribute))
    setattr(owner, name, parameter)


def _fuse(layer: nn.TransformerEncoderLayer) -> None:
    attention, norm, dropout = (getattr(layer, name) for name in _PARTS)
    q, k, v, out = (getattr(attention, name) for name in _PROJECTIONS)
    fused = FusedMultiHeadAttention(
        attention.embed_dim,
        attention.num_heads,
        dropout.p,
        attention.dropout or 0.0,
        normalize_before=layer.normalize_before,
        epsilon=norm._epsilon,
        final_layer_norm=not layer.normalize_before,
    )
    qkv_bias = None if q.bias is None else pack_qkv_bias(q.bias, k.bias, v.bias, attention.num_heads)
    prefix = "pre_ln" if layer.normalize_before else "ln"
    for name, value, like in (
        ("qkv_weight", pack_qkv_weight(q.weight, k.weight, v.weight, attention.num_heads), q.weight),
        ("qkv_bias", qkv_bias, q.bias),
        ("linear_weight", out.weight, out.weight),
        ("linear_bias", out.bias, out.bias),
        (f"{prefix}_scale", norm.weight, norm.weight),
        (f"{prefix}_bias", norm.bias, norm.bias),
    ):
        _set_parameter(fused, name, value, like)
    fused._dtype = q._dtype
    fused.training = attention.training
    for name in _PARTS:
        delattr(layer, name)
    _arrange(layer, {"self_attn": fused})
    layer.__class__ = ConvertedEncoderLayer


def _separate(layer: ConvertedEncoderLayer) -> None:
    fused = layer.self_attn
    attention = nn.MultiHeadAttention(
        fused.embed_dim, fused.num_heads, fused.attn_dropout_rate, bias_attr=None if fused.linear_bias is not None else False
    )
    scale, bias = (fused.pre_ln_scale, fused.pre_ln_bias) if fused.normalize_before else (fused.ln_scale, fused.ln_bias)
    norm = nn.LayerNorm(
        fused.embed_dim,
        fused.epsilon,
        weight_attr=None if scale is not None else False,
        bias_attr=None if bias is not None else False,
    )
    dropout = nn.Dropout(fused.dropout_rate, mode="upscale_in_train")
    _set_parameter(norm, "weight", scale, scale)
    _set_parameter(norm, "bias", bias, bias)
    projections = [getattr(attention, name) for name in _PROJECTIONS]
    for name, values, like in (
        ("weight", unpack_qkv_weight(fused.qkv_weight), fused.qkv_weight),
        ("bias", [None] * 3 if fused.qkv_bias is None else unpack_qkv_bias(fused.qkv_bias), fused.qkv_bias),
    ):
        for projection, value in zip(projections, values):
            _set_parameter(projection, name, value, like)
    _set_parameter(attention.out_proj, "weight", fused.linear_weight, fused.linear_weight)
    _set_parameter(attention.out_proj, "bias", fused.linear_bias, fused.linear_bias)
    for projection in projections:
        projection._dtype = fused._dtype
    for part in (attention, norm, dropout, *projections):
        part.training = fused.training
    _arrange(layer, {"self_attn": attention, "norm1": norm, "dropout1": dropout})
    layer.__class__ = nn.TransformerEncoderLayer


def _arrange(layer: nn.Layer, new: dict) -> None:
    """Puts sublayers into a layer, in Paddle's order."""
    sublayers = {**layer._sub_layers, **new}
    for name in _in_order(sublayers):
        if name in layer._sub_layers:
            delattr(layer, name)
        layer.add_sublayer(name, sublayers[name])


def _in_order(names: Any) -> Iterator[str]:
    yield from (name for name in _ORDER if name in names)
    yield from (name for name in names if name not in _ORDER)
