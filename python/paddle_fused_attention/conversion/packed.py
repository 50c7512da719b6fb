"""Attention layers whose query, key and value projections are packed into the operator's parameters.

Such a layer stays the same object, of a class derived from its own. ``qkv_weight`` [3, num_heads, head_dim, embed_dim]
and ``qkv_bias`` [3, num_heads, head_dim] hold the projections' parameters. The projections stay as PackedLinear and
compute with their part of these. Everything else (output projection, dropouts, attributes, hooks) stays as it is. A
call runs the operator if that serves it, else the class's own forward, so that no later change of a part is passed
over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import paddle
from paddle import nn
from paddle.hapi.dynamic_flops import register_hooks

from .._loading import OwnEntries
from .._parts import is_plain, is_plain_dropout, parameters_of
from ..functional import fused_multi_head_attention
from ..state_dicts import translate_state_dict
from ..weights import KINDS, QKV_PARAMETERS, pack_projections, projection_rows, projection_shape, separate_projections
from .adapters import AttentionAdapter

# How a parameter is trained, beside its dtype.
_TRAINING_ATTRIBUTES = ("stop_gradient", "optimize_attr", "regularizer", "need_clip")


@dataclass(frozen=True)
class Packing:
    """How projections are packed.

    Attributes:
        projections: The names of three layers, or of one with the columns of query, key and value in turn.
        interleaved: Whether these columns are in turn for each head and not for all heads.
        parameter_names: Paddle's names of the layers' parameters, by layer and "weight" or "bias".
    """

    projections: tuple[str, ...]
    interleaved: bool
    num_heads: int
    parameter_names: dict[tuple[str, str], str]

    def pack(self, parameters: list[Any]) -> Any:
        """The packed parameter of the projections' weights [embed_dim, columns] or biases [columns]."""
        return pack_projections(parameters, self.num_heads, self.interleaved)

    def separate(self, packed: Any) -> list[Any]:
        """The inverse of :meth:`pack`, as copies."""
        return separate_projections(packed, len(self.projections), self.interleaved)

    def shape(self, packed: Any) -> list[int]:
        """The shape of one projection's part of a packed parameter."""
        return projection_shape(packed.shape, len(self.projections))

    def rows(self, packed: Any, part: int | None) -> Any:
        """What one projection computes with: the weight [columns, embed_dim] or the bias [columns]."""
        return projection_rows(packed, part, self.interleaved)


class PackedLinear(nn.Linear):
    """A projection whose parameters are a part of its attention's ``qkv_weight`` and ``qkv_bias``."""

    _packed_in: tuple  # the attention, in a tuple, so that it does not become a sublayer of this one
    _part: int | None

    def forward(self, input: paddle.Tensor) -> paddle.Tensor:
        (attention,) = self._packed_in
        packing = attention._packing
        out = paddle.matmul(input, packing.rows(attention.qkv_weight, self._part), transpose_y=True)
        bias = attention.qkv_bias
        return out if bias is None else out + packing.rows(bias, self._part)

    @property
    def weight(self) -> paddle.Tensor:
        raise self._refusal("weight")

    @property
    def bias(self) -> paddle.Tensor:
        raise self._refusal("bias")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in KINDS:
            raise self._refusal(name)
        super().__setattr__(name, value)

    def add_parameter(self, name: str, parameter: Any) -> Any:
        if name in KINDS:
            raise self._refusal(name)
        return super().add_parameter(name, parameter)

    def _refusal(self, name: str) -> RuntimeError:
        # Not an AttributeError: hasattr() must not make this look like a layer without weights.
        return RuntimeError(
            f"{name}: expected a projection of its own, got one that paddle_fused_attention.convert packed into its "
            f"attention's qkv_{name}; paddle_fused_attention.revert(model) first, or use qkv_{name}"
        )

    def extra_repr(self) -> str:
        return "packed"


def active_rate(dropout: Any) -> float:
    """The rate at which a dropout layer drops in the mode it is in."""
    return dropout.p if dropout.training else 0.0


class PackedAttention(OwnEntries):
    """The base that a packed attention's class has beside the attention's own. It sets ``_adapter`` and ``_original``,
    the attention's own class."""

    _adapter: AttentionAdapter
    _original: type[Any]
    _packing: Packing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self._inputs(args, kwargs)
        if inputs is None:
            return self._original.forward(self, *args, **kwargs)
        return self._adapter.result(self, self._run(*inputs))

    @paddle.jit.not_to_static
    def _inputs(self, args: tuple, kwargs: dict) -> tuple | None:
        if self._is_untouched():
            return self._adapter.inputs(self, *args, **kwargs)
        self._check_not_half_quantized()
        return None

    def _check_not_half_quantized(self) -> None:
        """Refuses a quantization of the type paddle.nn.Linear, which finds the output projection only."""
        output = self._sub_layers.get(self._adapter.output)
        if type(output).__module__.startswith("paddle.nn.quant") and _packed_parts(self):
            raise RuntimeError(
                f"{self._adapter.output}: expected all projections of an attention quantized or none, got packed "
                f"query, key and value projections beside a {type(output).__name__}; "
                "paddle_fused_attention.revert(model) before it is quantized"
            )

    @paddle.jit.not_to_static
    def _run(self, x: Any, mask: Any, causal: bool) -> Any:
        adapter = self._adapter
        weight, bias = parameters_of(self._sub_layers[adapter.output], KINDS)
        qkv_weight, qkv_bias = parameters_of(self, QKV_PARAMETERS)
        scale, usual = adapter.scale(self), qkv_weight.shape[2] ** -0.5
        if scale is not None and scale != usual:
            factor = scale / usual
            qkv_weight = _scale_query(qkv_weight, factor)
            qkv_bias = None if qkv_bias is None else _scale_query(qkv_bias, factor)
        dropout_rate = 0.0 if adapter.dropout is None else active_rate(getattr(self, adapter.dropout))
        attn_dropout_rate = adapter.attn_dropout_rate(self)
        return fused_multi_head_attention(
            x,
            qkv_weight,
            weight,
            qkv_bias=qkv_bias,
            linear_bias=bias,
            attn_mask=mask,
            dropout_rate=dropout_rate,
            attn_dropout_rate=attn_dropout_rate,
            training=self.training or dropout_rate > 0.0 or attn_dropout_rate > 0.0,
            final_layer_norm=False,
            add_residual=False,
            causal=causal,
        )

    def _is_untouched(self) -> bool:
        """Whether the operator may compute what the parts would."""
        parts, adapter = self._sub_layers, self._adapter
        return (
            all(is_plain(parts.get(name), PackedLinear) for name in self._packing.projections)
            and is_plain(parts.get(adapter.output), nn.Linear)
            and all(is_plain_dropout(parts.get(name)) for name in adapter.dropouts())
        )

    def _own_entries(self, state: dict, prefix: str) -> dict:
        return translate_state_dict(self, state, prefix)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickle finds no class by name that is made at run time.
        return _new_packed, (self._original,), self.__dict__


_classes: dict[type, type[Any]] = {}


def derived_class(base: type, original: type, adapter: Any, prefix: str, what: str) -> type[Any]:
    """The class of the converted layers of a class, always the same one for the same adapter."""
    known = _classes.get(original)
    if known is None or known._adapter is not adapter:
        known = type(
            f"{prefix}{original.__name__}",
            (base, original),
            {"_adapter": adapter, "_original": original, "__doc__": f"A {original.__name__} {what}."},
        )
        _classes[original] = known
    return known


def register_class(original: type, known: type) -> None:
    """Makes a written class the one of a class's converted layers."""
    _classes[original] = known


def packed_class(original: type, adapter: AttentionAdapter) -> type[Any]:
    return derived_class(PackedAttention, original, adapter, "Packed", "with packed projections")


def adapter_of_pickle(original: type, kind: type) -> Any:
    """The adapter, of the class `kind`, of a layer that is unpickled."""
    from .registry import adapter_for

    adapter = adapter_for(original)
    if not isinstance(adapter, kind):
        raise TypeError(
            f"expected an adapter for {original.__module__}.{original.__qualname__}, as register_adapter takes, got "
            f"{'none' if adapter is None else f'a {type(adapter).__name__}'}"
        )
    return adapter


def _new_packed(original: type) -> Any:
    kind: Any = packed_class(original, adapter_of_pickle(original, AttentionAdapter))
    return kind.__new__(kind)


def _scale_query(packed: Any, factor: float) -> Any:
    return paddle.concat([packed[:1] * factor, packed[1:]])


def training_attributes(parameter: Any) -> tuple[Any, ...]:
    """How a parameter is trained. Parameters that are packed into one must agree in it."""
    return (*(getattr(parameter, name) for name in _TRAINING_ATTRIBUTES), parameter.dtype)


def _new_parameter(owner: nn.Layer, value: Any, like: Any, is_bias: bool, name: str | None = None) -> Any:
    """A parameter with a value, trained as the parameter `like`."""
    parameter = owner.create_parameter(
        value.shape,
        dtype=like.dtype,
        is_bias=is_bias,
        default_initializer=nn.initializer.Constant(0.0),
    )
    if name is not None:  # Paddle makes no parameter with a name that was used before
        parameter.name = name
    if str(parameter.place) == str(value.place):
        parameter.set_value(value)
    else:  # the model is not on the current device
        value = value.contiguous()
        parameter.get_tensor()._share_data_with(value.get_tensor())
    for attribute in _TRAINING_ATTRIBUTES:
        setattr(parameter, attribute, getattr(like, attribute))
    return parameter


def _packed_parts(attention: Any) -> dict[str, PackedLinear]:
    """The projections, by name, that no other layer has replaced."""
    parts = {name: attention._sub_layers.get(name) for name in attention._packing.projections}
    return {name: part for name, part in parts.items() if type(part) is PackedLinear}


def pack(attention: nn.Layer, adapter: AttentionAdapter) -> None:
    """Packs, in place, a layer that :func:`reason_against` has nothing against."""
    projections, interleaved = adapter.layout(attention)
    layers = [getattr(attention, name) for name in projections]
    names = {
        (name, kind): getattr(layer, kind).name
        for name, layer in zip(projections, layers)
        for kind in KINDS
        if getattr(layer, kind) is not None
    }
    packing = Packing(tuple(projections), interleaved, adapter.num_heads(attention), names)
    with paddle.no_grad():
        packed: dict[str, Any] = {}
        for kind in KINDS:
            values = [getattr(layer, kind) for layer in layers]
            packed[kind] = None
            if values[0] is not None:
                packed[kind] = _new_parameter(attention, packing.pack(values), values[0], kind == "bias")
    for part, layer in enumerate(layers):
        for kind in KINDS:
            layer._parameters.pop(kind, None)
        layer.__dict__["_packed_in"] = (attention,)
        layer.__dict__["_part"] = part if len(layers) == 3 else None
        layer.__class__ = PackedLinear
    attention.__dict__["_packing"] = packing
    attention.__class__ = packed_class(type(attention), adapter)
    for kind in KINDS:
        attention._parameters[f"qkv_{kind}"] = packed[kind]


def separate(attention: Any) -> None:
    """The inverse of :func:`pack`, in place: the projections get parameters of their own, with the names that they
    had."""
    packing, parts = attention._packing, _packed_parts(attention)
    with paddle.no_grad():
        for kind in KINDS:
            packed = attention._parameters.pop(f"qkv_{kind}")
            values = {} if packed is None else dict(zip(packing.projections, packing.separate(packed)))
            for name, layer in parts.items():
                layer._parameters[kind] = (
                    _new_parameter(attention, values[name], packed, kind == "bias", packing.parameter_names[name, kind])
                    if values
                    else None
                )
    for layer in parts.values():
        layer.__class__ = nn.Linear  # type: ignore[assignment]
        del layer.__dict__["_packed_in"], layer.__dict__["_part"]
    attention.__class__ = attention._original
    del attention.__dict__["_packing"]


def _count_flops(layer: Any, inputs: Any, output: Any) -> None:
    """Counts as paddle.flops does for a Linear."""
    layer.total_ops += inputs[0].shape[-1] * output.numel()


register_hooks[PackedLinear] = _count_flops
