"""Applies the user's initializers to packed parameters as if each of the three projections had its own."""

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

from .weights import QKV_PARAMETERS, pack_projections

_ELEMENTWISE = (ConstantInitializer, NormalInitializer, TruncatedNormalInitializer, UniformInitializer)


def param_attr_of(argument: str, attr: Any, name: str, shape: Sequence[int], is_bias: bool = False) -> Any:
    """The ParamAttr of a layer's parameter `name` of `shape`, from the `attr` of several parameters; False for no
    parameter.

    A name in `attr` gets the parameter's as a suffix, since names must be unique. An initializer, also Paddle's global
    one, is applied to ``qkv_weight`` and ``qkv_bias`` as to three parameters [embed_dim, embed_dim] (in, out) or
    [embed_dim].

    Raises:
        TypeError, ValueError: `attr` makes no ParamAttr, or assigns an array of another shape; errors call it
            `argument`.
    """
    if isinstance(attr, (list, tuple)):
        raise TypeError(f"{argument}: expected a ParamAttr, what makes one, or None, got {type(attr).__name__}")
    try:
        attr = paddle.ParamAttr._to_attr(attr)
    except TypeError:
        raise TypeError(
            f"{argument}: expected a ParamAttr, what makes one, or None, got {type(attr).__name__}"
        ) from None
    if attr is False:
        if is_bias:
            return False
        raise ValueError(
            f"{argument}: expected a ParamAttr, what makes one, or None, got False: the weights are needed"
        )
    attr = copy.copy(attr)
    if attr.name is not None:
        attr.name = f"{attr.name}.{name}"
    initializer = attr.initializer or (_global_bias_initializer() if is_bias else _global_weight_initializer())
    packed = name in QKV_PARAMETERS
    size = shape[1] * shape[2] if packed else shape[0]
    separate = list(shape) if not packed else [size] if is_bias else [size, size]
    if isinstance(initializer, NumpyArrayInitializer):
        found = list(initializer._value.shape)
        if found not in (list(shape), separate):
            raise ValueError(f"{argument}: expected an array of shape {separate} to assign to {name}, got {found}")
        packed = packed and found == separate
    if packed and initializer is not None:
        initializer = _for_each_projection(initializer, separate, shape[1])
    attr.initializer = initializer
    return attr


def _for_each_projection(initializer: Any, shape: list[int], num_heads: int) -> Any:
    own = type(initializer).__module__.startswith("paddle.")
    if own and isinstance(initializer, (XavierInitializer, MSRAInitializer)):
        initializer = copy.copy(initializer)
        initializer._compute_fans = lambda _: (shape[0], shape[0])
        return initializer
    if own and isinstance(initializer, _ELEMENTWISE) and not getattr(initializer, "_diag_num", 0):
        return initializer
    return _ForEachProjection(initializer, shape, num_heads)


class _ForEachProjection(Initializer):
    """Applies an initializer to three parameters of `shape` and packs them."""

    def __init__(self, initializer: Any, shape: list[int], num_heads: int) -> None:
        super().__init__()
        self._initializer = initializer
        self._shape = shape
        self._num_heads = num_heads

    def forward(self, param: Any, block: Any = None) -> Any:
        block = self._check_block(block)
        if not in_dynamic_or_pir_mode():
            with paddle.static.program_guard(block.program):
                paddle.assign(
                    pack_projections([self._startup_variable(param.dtype, block) for _ in range(3)], self._num_heads),
                    param,
                )
            return None
        if not in_dynamic_mode():
            meta = type(param)(self._shape, param.dtype)
            return pack_projections([self._initializer(meta, block) for _ in range(3)], self._num_heads)
        with paddle.no_grad():
            parts = [framework.EagerParamBase(shape=self._shape, dtype=param.dtype) for _ in range(3)]
            for part in parts:
                self._initializer(part, block)
            pack_projections(parts, self._num_heads)._share_underline_tensor_to(param)
        return None

    def _startup_variable(self, dtype: Any, startup_block: Any) -> Any:
        """A variable of a legacy startup program. Initializers ask for a parameter, which becomes a plain variable
        afterwards, so that no scope keeps it."""
        name = unique_name.generate("packed_part")
        parameter = framework.Parameter(startup_block, self._shape, dtype, name=name)
        self._initializer(parameter, startup_block)
        parameter.desc.set_is_parameter(False)
        parameter.persistable = False
        return framework.Variable(startup_block, name=name, shape=self._shape, dtype=dtype, persistable=False)
