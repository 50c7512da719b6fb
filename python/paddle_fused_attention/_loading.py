"""Loading of state dicts of another float dtype than a layer's parameters: their values are cast, whatever layer
set_state_dict is called on."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.framework import in_dynamic_mode

from ._arranged import check_all_plain

# The functions on the stack between set_state_dict and the layer whose entries it wants.
_CALLS_IN_BETWEEN = (
    *("_state_dict_impl", "state_dict", "_own_entries"),
    *("state_being_loaded", "translate_state_dict", "with_old_names"),
)
_FLOAT_DTYPES = (paddle.float32, paddle.float64, paddle.float16, paddle.bfloat16)


class OwnEntries(nn.Layer):
    """A layer that decides what its state dict holds, also as a part of another layer's."""

    def _own_entries(self, state: dict, prefix: str) -> dict:
        """The entries that take the place of `state`, the layer's own, whose names begin with `prefix`."""
        raise NotImplementedError

    def _state_dict_impl(
        self,
        destination: Any = None,
        include_sublayers: bool = True,
        structured_name_prefix: str = "",
        *rest: Any,
        **more: Any,
    ) -> Any:
        # With buffers that do not persist it is asked for by what saves programs, which hold weights as they lie.
        if not (rest[0] if rest else more.get("include_non_persistable_buffer", False)):
            check_all_plain("state_dict", self)
        # In a dict of its own: Paddle 2.6 keeps everything that the dict which it hands on has ever held.
        state = super()._state_dict_impl(None, include_sublayers, structured_name_prefix, *rest, **more)
        state = self._own_entries(state, structured_name_prefix)
        if destination is None:
            return state
        destination.update(state)
        return destination


class LoadsAnyFloat(OwnEntries):
    """A layer whose parameters take any float dtype from ``set_state_dict``, called on it or on its owner, in dygraph.

    Paddle's layers refuse every dtype but their own. But layer-norm parameters are float32 after
    ``to(dtype="bfloat16")``, and checkpoints may be bfloat16 as a whole.
    """

    def _own_entries(self, state: dict, prefix: str) -> dict:
        if state_being_loaded() is not None:
            for name, parameter in self._parameters.items():
                if parameter is not None:
                    state[prefix + name] = CastingTarget(parameter)
        return state


def state_being_loaded() -> dict | None:
    """The dict that set_state_dict was given, if that asks for the layer's state dict, in dygraph; else None. Only the
    stack tells."""
    if not in_dynamic_mode():
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "set_state_dict":
        if frame.f_code.co_name not in _CALLS_IN_BETWEEN:
            return None
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("state_dict")


class CastingTarget:
    """Stands for a parameter in set_state_dict; its set_value casts."""

    def __init__(self, parameter: paddle.Tensor) -> None:
        self._parameter = parameter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parameter, name)

    def __len__(self) -> int:
        return len(self._parameter)

    def set_value(self, value: Any) -> None:
        self._parameter.set_value(cast(value, self._parameter.dtype))


def cast(value: Any, dtype: Any) -> Any:
    """The value, cast to `dtype` if it is of another float dtype, else as it is, for Paddle to judge. bfloat16 is
    uint16 in NumPy."""
    if isinstance(value, np.ndarray) and (np.issubdtype(value.dtype, np.floating) or value.dtype == np.uint16):
        tensor = paddle.to_tensor(value, place=paddle.CPUPlace())
    elif isinstance(value, paddle.Tensor):
        tensor = value
    else:
        return value
    if tensor.dtype == dtype or tensor.dtype not in _FLOAT_DTYPES or dtype not in _FLOAT_DTYPES:
        return value
    return paddle.cast(tensor.detach(), dtype)
