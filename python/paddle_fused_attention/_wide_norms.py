"""Layers of 16 bits whose layer norms stay float32."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn
from paddle.base.data_feeder import convert_dtype

_SIXTEEN_BIT = ("float16", "bfloat16", "uint16")  # Paddle's name for bfloat16 in NumPy is uint16


class WideNorms(nn.Layer):
    """A layer whose layer-norm parameters, `_norm_parameters`, become float32 when the layer becomes 16-bit."""

    _parameters: dict[str, Any]
    _norm_parameters: tuple[str, ...] = ()

    def _apply(self, func: Any, device: Any, dtype: Any, blocking: Any, include_sublayers: bool = True) -> None:
        """Moves or casts the layer, for Paddle's to(), float16(), bfloat16() and amp.decorate."""
        if dtype is None or convert_dtype(dtype) not in _SIXTEEN_BIT:
            super()._apply(func, device, dtype, blocking, include_sublayers)
            return
        parameters = self._parameters
        self._parameters = {name: p for name, p in parameters.items() if name not in self._norm_parameters}
        try:
            super()._apply(func, device, dtype, blocking, include_sublayers)
        finally:
            self._parameters = parameters
        with paddle.no_grad():
            for parameter in (parameters.get(name) for name in self._norm_parameters):
                if parameter is None:
                    continue
                func(parameter, device, "float32", blocking)
                if parameter.grad is not None:
                    func(parameter._grad_ivar(), device, "float32", blocking)
