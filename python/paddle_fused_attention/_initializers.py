"""Applies the user's initializers to packed parameters as if each of the projections had its own."""

from __future__ import annotations

import copy
from typing import Any, Sequence

import paddle
from paddle.base import framework, unique_name
from paddle.base.initializer import _global_bias_initializer, _global_weight_initializer
from paddle.framework import in_dynamic_mode, in_dynamic_or_pir_mode
from paddle.nn.initializer.assign import NumpyArrayInitializer
from paddle.nn.initializer.constant import ConstantInitializer
from paddle.nn.initializer.initializer import Initializer
from paddle.nn.initializer.kaiming import MSRAInitializer
from paddle.nn.initializer.normal import NormalInitializer, TruncatedNormalInitializer
from paddle.nn.initializer.uniform import UniformInitializer
from paddle.nn.initializer.xavier import XavierInitializer

from .weights import pack_rows

_EXPECTED = "expected a ParamAttr, what makes one, or None, got"
_ELEMENTWISE = (ConstantInitializer, NormalInitializer, TruncatedNormalInitializer, UniformInitializer)


def check_attr(argument: str, attr: Any, shape: Sequence[int] | None = None, is_needed: bool = False) -> None:
    """Refuses what makes no ParamAttr for one parameter, or assigns an array of another shape if `shape` is given."""
    attr = _checked_attr(argument, attr, is_needed)
    initializer = attr.initializer if attr is not False and shape is not None else None
    if isinstance(initializer, NumpyArrayInitializer) and list(initializer._value.shape) != shape:
        raise ValueError(
            f"{argument}: expected an array of shape {shape} to assign, got {list(initializer._value.shape)}"
        )


def _checked_attr(argument: str, attr: Any, is_needed: bool) -> Any:
    """The ParamAttr that `attr` makes, or False."""
    if isinstance(attr, (list, tuple)):
        raise TypeError(f"{argument}: {_EXPECTED} {type(attr).__name__}")
    try:
        attr = paddle.ParamAttr._to_attr(attr)
    except TypeError:
        raise TypeError(f"{argument}: {_EXPECTED} {type(attr).__name__}") from None
    if attr is False and is_needed:
        raise ValueError(f"{argument}: {_EXPECTED} False: the weights are needed")
    return attr


def param_attr_of(
    argument: str,
    attr: Any,
    name: str,
    shape: Sequence[int],
    is_bias: bool = False,
    columns: Sequence[int] | None = None,
    default: Any = None,
) -> Any:
    """The ParamAttr of a layer's parameter `name` of `shape`, from the `attr` of several parameters; False for no
    parameter.

    A name in `attr` gets the parameter's as a suffix, since names must be unique. A parameter that holds the heads of
    one projection or several, [..., head_dim, width] or [..., head_dim], has so many `columns` of each: then an
    initializer, also Paddle's global one, is applied as to parameters [width, columns] (in, out) or [columns].
    `default` is the initializer where there is none.

    Raises:
        TypeError, ValueError: `attr` makes no ParamAttr, or assigns an array of another shape; errors call it
            `argument`.
    """
    attr = _checked_attr(argument, attr, is_needed=not is_bias)
    if attr is False:
        return False
    attr = copy.copy(attr)
    if attr.name is not None:
        attr.name = f"{attr.name}.{name}"
    initializer = (
        attr.initializer or (_global_bias_initializer() if is_bias else _global_weight_initializer()) or default
    )
    separate = [[count] if is_bias else [shape[-1], count] for count in columns or ()] or [list(shape)]
    for_each = columns is not None and initializer is not None
    if isinstance(initializer, NumpyArrayInitializer):
        found = list(initializer._value.shape)
        if found != list(shape) and any(found != one for one in separate):
            raise ValueError(f"{argument}: expected an array of shape {separate[0]} to assign to {name}, got {found}")
        for_each = for_each and found != list(shape)
    if for_each:
        initializer = _for_each_projection(initializer, separate, list(shape))
    attr.initializer = initializer
    return attr


def _for_each_projection(initializer: Any, separate: list[list[int]], shape: list[int]) -> Any:
    own, alike = type(initializer).__module__.startswith("paddle."), all(one == separate[0] for one in separate)
    if own and alike and isinstance(initializer, (XavierInitializer, MSRAInitializer)):
        initializer = copy.copy(initializer)
        initializer._compute_fans = lambda _: (separate[0][0], separate[0][-1])
        return initializer
    if own and isinstance(initializer, _ELEMENTWISE) and not getattr(initializer, "_diag_num", 0):
        return initializer
    return _ForEachProjection(initializer, separate, shape)


class _ForEachProjection(Initializer):
    """Applies an initializer to parameters of the shapes `separate` and packs them to one of `shape`."""

    def __init__(self, initializer: Any, separate: list[list[int]], shape: list[int]) -> None:
        super().__init__()
        self._initializer = initializer
        self._separate = separate
        self._shape = shape

    def forward(self, param: Any, block: Any = None) -> Any:
        block = self._check_block(block)
        if not in_dynamic_or_pir_mode():
            with paddle.static.program_guard(block.program):
                parts = [self._startup_variable(shape, param.dtype, block) for shape in self._separate]
                paddle.assign(pack_rows(parts, self._shape), param)
            return None
        if not in_dynamic_mode():
            metas = [type(param)(shape, param.dtype) for shape in self._separate]
            return pack_rows([self._initializer(meta, block) for meta in metas], self._shape)
        with paddle.no_grad():
            parts = [framework.EagerParamBase(shape=shape, dtype=param.dtype) for shape in self._separate]
            for part in parts:
                self._initializer(part, block)
            pack_rows(parts, self._shape)._share_underline_tensor_to(param)
        return None

    def _startup_variable(self, shape: list[int], dtype: Any, startup_block: Any) -> Any:
        """A variable of a legacy startup program. Initializers ask for a parameter, which becomes a plain variable
        afterwards, so that no scope keeps it."""
        name = unique_name.generate("packed_part")
        parameter = framework.Parameter(startup_block, shape, dtype, name=name)
        self._initializer(parameter, startup_block)
        parameter.desc.set_is_parameter(False)
        parameter.persistable = False
        return framework.Variable(startup_block, name=name, shape=shape, dtype=dtype, persistable=False)
