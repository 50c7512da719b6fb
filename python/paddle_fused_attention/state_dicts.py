"""States of converted models under the names from before the conversion, and back.

A converted model's own state dict has ``qkv_weight`` and ``qkv_bias`` in place of the parameters of separate
projections. Loading takes both kinds of names, and those of earlier versions of this package. State dicts for the model
as it was, and optimizer states, are made here too.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from types import FrameType
from typing import Any, Iterator

import numpy as np
import paddle
from paddle import nn

from ._checks import check_model, shown
from ._loading import CastingTarget, cast, state_being_loaded
from .weights import KINDS

# Checkpoints of these libraries are read into models that are not converted.
_SAVING_LIBRARIES = ("paddlenlp.", "paddleformers.")


def separate_state_dict(model: nn.Layer) -> dict[str, paddle.Tensor]:
    """A state dict of a converted model as it was before :func:`convert`: the same names, shapes, bits and order.

    The projections' parameters are copies, all others the model's own tensors, as in its ``state_dict()``.
    ``model.set_state_dict`` takes these names, too.

    Raises:
        TypeError: ``model`` is not a layer.
    """
    check_model(model)
    return model.state_dict()


def translate_state_dict(attention: Any, state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of a packed attention, which begin with `prefix`, under the names that the caller of state_dict
    wants."""
    loaded = state_being_loaded()
    if loaded is not None:
        state = _with_entries_replaced(
            state, attention, prefix, lambda kind, packed: _loading_targets(attention, kind, packed, prefix, loaded)
        )
        return {
            name: CastingTarget(value) if isinstance(value, paddle.Tensor) else value for name, value in state.items()
        }
    if _wants_separate():
        return _with_entries_replaced(
            state, attention, prefix, lambda kind, packed: _separate_entries(attention, kind, packed)
        )
    return state


def _with_entries_replaced(state: dict, attention: Any, prefix: str, replacement: Any) -> dict:
    """Puts other entries in the place of the packed parameters, the weight and the bias of one projection side by
    side."""
    entries: dict[str, Any] = {}
    for kind in KINDS:
        packed = attention._parameters[f"qkv_{kind}"]
        if packed is not None:
            entries.update(replacement(kind, packed))
    names = [f"{name}.{kind}" for name in attention._packing.projections for kind in KINDS]
    names = [name for name in names if name in entries] + [name for name in entries if name not in names]
    ours = {f"{prefix}qkv_{kind}" for kind in KINDS}
    result: dict[str, Any] = OrderedDict()
    for name, value in state.items():
        if name in ours:
            result.update({prefix + new: entries[new] for new in names})
        else:
            result[name] = value
    return result


def _separate_entries(attention: Any, kind: str, packed: Any) -> dict:
    packing = attention._packing
    with paddle.no_grad():
        values = packing.separate(packed)
    for name, value in zip(packing.projections, values):
        value.name = packing.parameter_names[name, kind]
        value.stop_gradient = packed.stop_gradient
    return {f"{name}.{kind}": value for name, value in zip(packing.projections, values)}


def _loading_targets(attention: Any, kind: str, packed: Any, prefix: str, loaded: dict) -> dict:
    packing = attention._packing
    separate = [f"{name}.{kind}" for name in packing.projections]
    names = {prefix + name for name in separate} | {packing.parameter_names[name, kind] for name in packing.projections}
    if f"{prefix}qkv_{kind}" in loaded or names.isdisjoint(loaded):
        return {f"qkv_{kind}": CastingTarget(packed)}
    return {name: _ProjectionTarget(attention, kind, i) for i, name in enumerate(separate)}


class _ProjectionTarget:
    """Stands for a separate projection's parameter in set_state_dict; its set_value fills the part in the packed
    one."""

    def __init__(self, attention: Any, kind: str, index: int) -> None:
        self._attention, self._kind, self._index = attention, kind, index
        packing = attention._packing
        self.shape = packing.shape(attention._parameters[f"qkv_{kind}"])
        self.name = packing.parameter_names[packing.projections[index], kind]

    def __len__(self) -> int:
        return self.shape[0]

    def set_value(self, value: Any) -> None:
        packed, packing = self._attention._parameters[f"qkv_{self._kind}"], self._attention._packing
        value = cast(value, packed.dtype)
        if not isinstance(value, paddle.Tensor):
            value = paddle.to_tensor(np.asarray(value))
        with paddle.no_grad():
            values = packing.separate(packed)
            if value.dtype != packed.dtype:
                raise ValueError(f"{self.name}: expected {packed.dtype}, got {value.dtype}")
            values[self._index] = value.detach()
            packed.set_value(packing.pack(values))


# Names in a converted encoder layer, by those that earlier versions of this package gave.
_OLD_NAMES = {
    "self_attn.linear_weight": "self_attn.out_proj.weight",
    "self_attn.linear_bias": "self_attn.out_proj.bias",
    "self_attn.ln_scale": "norm1.weight",
    "self_attn.ln_bias": "norm1.bias",
    "self_attn.pre_ln_scale": "norm1.weight",
    "self_attn.pre_ln_bias": "norm1.bias",
}


def with_old_names(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of a converted encoder layer, which begin with `prefix`, under their old names if set_state_dict asks
    and what it loads has these."""
    loaded = state_being_loaded()
    if loaded is None:
        return state
    renamed = {
        prefix + new: prefix + old
        for old, new in _OLD_NAMES.items()
        if prefix + old in loaded and prefix + new not in loaded and prefix + new in state
    }
    norm = prefix + "norm1."
    return OrderedDict(
        (renamed.get(name, name), CastingTarget(value) if name.startswith(norm) else value)
        for name, value in state.items()
    )


def _wants_separate() -> bool:
    """Whether separate_state_dict asks, or a library that saves a model for others to load."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if frame.f_code is separate_state_dict.__code__:
            return True
        if name == "to_static_state_dict":  # a program is saved with the parameters that it has
            return False
        if "save" in name and str(frame.f_globals.get("__name__")).startswith(_SAVING_LIBRARIES):
            return True
        frame = frame.f_back
    return False


def _packed_parameters(model: nn.Layer, state: dict) -> Iterator[tuple[Any, Any, list[str], dict]]:
    """For every packed parameter of a model and every dict of a state: the packing, the parameter, Paddle's names of
    the parameters that it was made of, and the dict."""
    for layer in model.sublayers(include_self=True):
        packing: Any = getattr(layer, "_packing", None)
        for kind in KINDS if packing is not None else ():
            packed = layer._parameters[f"qkv_{kind}"]
            if packed is not None:
                names = [packing.parameter_names[name, kind] for name in packing.projections]
                yield from ((packing, packed, names, group) for group in _dicts_by_parameter(state))


def pack_optimizer_state(model: nn.Layer, state: dict[str, Any]) -> dict[str, Any]:
    """Makes the state of an unconverted model's optimizer one for the same model's optimizer after :func:`convert`.

    Moments and master weights, which have their parameter's shape, are packed as the parameters were. Numbers, such as
    powers of beta, must be the same for the three projections, and one is kept. Optimizers that treat every element by
    itself, such as SGD, Momentum, Adam and AdamW, then make the same steps as without conversion. Lamb and Lars take
    norms of whole parameters, and see the three projections as one.

    Args:
        model: A converted model. The keys of the state begin with its parameters' names from before the conversion.
        state: The result of ``optimizer.state_dict()``, or of ``paddle.load`` of its file. It is not changed.

    Returns:
        A new dict, for ``optimizer.set_state_dict``.

    Raises:
        TypeError: An argument is of the wrong type, or the projections' states are of several dtypes.
        ValueError: A state of a projection has another shape than its parameter, or is missing, or numbers differ.
    """
    _check_optimizer_arguments(model, state)
    result = dict(state)
    for packing, packed, names, group in _packed_parameters(model, result):
        for rest in [key[len(names[0]) :] for key in group if _is_key_of(key, names[0])]:
            values = []
            for name in names:
                if name + rest not in group:
                    raise ValueError(f"state: expected {name + rest} beside {names[0] + rest}, found none")
                values.append(_tensor(name + rest, group.pop(name + rest)))
            group[packed.name + rest] = _pack_state(packing, packed, values, names[0] + rest)
    return result


def separate_optimizer_state(model: nn.Layer, state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`pack_optimizer_state`: the state of a converted model's optimizer, for one of the model as
    it was before.

    Args:
        model: The converted model, before :func:`revert`.
        state: The result of ``optimizer.state_dict()``, or of ``paddle.load`` of its file. It is not changed.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A state of a packed parameter has another shape.
    """
    _check_optimizer_arguments(model, state)
    result = dict(state)
    for packing, packed, names, group in _packed_parameters(model, result):
        for rest in [key[len(packed.name) :] for key in group if _is_key_of(key, packed.name)]:
            value = _tensor(packed.name + rest, group.pop(packed.name + rest))
            if list(value.shape) == list(packed.shape):
                with paddle.no_grad():
                    values = packing.separate(value)
            elif value.size == 1:
                values = [value.clone() for _ in names]
            else:
                raise ValueError(
                    f"state: expected {packed.name + rest} of shape {list(packed.shape)} or one number, got "
                    f"{list(value.shape)}"
                )
            group.update({name + rest: value for name, value in zip(names, values)})
    return result


def _check_optimizer_arguments(model: Any, state: Any) -> None:
    check_model(model)
    if not isinstance(state, dict):
        raise TypeError(f"state: expected a dict as optimizer.state_dict() gives it, got {type(state).__name__}")


def _dicts_by_parameter(state: dict) -> list[dict]:
    """The state itself and a copy of its master weights, which may be changed."""
    if isinstance(state.get("master_weights"), dict):
        state["master_weights"] = dict(state["master_weights"])
        return [state, state["master_weights"]]
    return [state]


def _is_key_of(key: Any, name: str) -> bool:
    """Whether a key is a parameter's name, or begins with it and an underscore."""
    return isinstance(key, str) and (key == name or key.startswith(name + "_"))


def _tensor(name: str, value: Any) -> paddle.Tensor:
    """The value of an optimizer's state."""
    if isinstance(value, paddle.Tensor):
        return value
    if not isinstance(value, (np.ndarray, np.generic, int, float)) or np.asarray(value).dtype.kind not in "biuf":
        raise TypeError(f"state: expected a Tensor, an array or a number as {name}, got {shown(value)}")
    return paddle.to_tensor(np.asarray(value))


def _pack_state(packing: Any, packed: Any, values: list, name: str) -> paddle.Tensor:
    shape = packing.shape(packed)
    if any(value.dtype != values[0].dtype for value in values):
        raise TypeError(f"state: expected {name} and its like of one dtype, got {[str(v.dtype) for v in values]}")
    if all(list(value.shape) == shape for value in values):
        with paddle.no_grad():
            return packing.pack(values)
    if any(value.size != 1 for value in values):
        raise ValueError(
            f"state: expected {name} and its like of shape {shape} or one number, got {[list(v.shape) for v in values]}"
        )
    numbers = [value.item() for value in values]
    if any(number != numbers[0] for number in numbers):
        raise ValueError(f"state: expected the same number in {name} and its like, got {numbers}")
    return values[0]
