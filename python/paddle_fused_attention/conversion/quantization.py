"""Lets ``paddle.quantization`` quantize converted models as it does others.

When it quantizes a packed projection, the attention gets separate projections again, which Paddle's quantized layers
need.
"""

from __future__ import annotations

from typing import Any

from paddle import nn
from paddle.quantization.config import DEFAULT_QAT_LAYER_MAPPINGS

from .packed import PackedLinear, separate


def _quantized(layer: Any, config: Any) -> nn.Layer:
    separate(layer._packed_in[0])  # now this and the attention's other projections are Linear
    return DEFAULT_QAT_LAYER_MAPPINGS[nn.Linear](layer, config)


DEFAULT_QAT_LAYER_MAPPINGS[PackedLinear] = _quantized
