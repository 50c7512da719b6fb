"""Lets ``paddle.quantization`` quantize converted models as it does others.

Where it is asked to quantize a packed projection, the attention gets separate projections again, as Paddle's quantized
layers need them.
"""

from __future__ import annotations

from typing import Any

from paddle import nn
from paddle.quantization.config import DEFAULT_QAT_LAYER_MAPPINGS

from .packed import PackedLinear, separate


def _quantized(layer: Any, config: Any) -> nn.Layer:
    separate(layer._packed_in[0])  # after which it is a Linear, as the attention's others are
    return DEFAULT_QAT_LAYER_MAPPINGS[nn.Linear](layer, config)


DEFAULT_QAT_LAYER_MAPPINGS[PackedLinear] = _quantized
