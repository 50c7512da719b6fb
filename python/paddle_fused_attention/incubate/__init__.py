"""``paddle.incubate.nn``'s fused layers and functions on this package's operators, with the same signatures, parameters
and meaning.

Unlike in ``paddle_fused_attention.fused_multi_head_attention``, the result is layer-normalised only where the input is
not.
"""

from . import functional
from .feed_forward import FusedFeedForward, FusedTransformerEncoderLayer
from .layer import FusedMultiHeadAttention
from .linear import FusedBiasDropoutResidualLayerNorm, FusedLinear

__all__ = [
    "FusedBiasDropoutResidualLayerNorm",
    "FusedFeedForward",
    "FusedLinear",
    "FusedMultiHeadAttention",
    "FusedTransformerEncoderLayer",
    "functional",
]
