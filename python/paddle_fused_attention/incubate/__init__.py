"""``paddle.incubate.nn``'s fused attention on this package's operator, with the same signatures, parameters and
meaning.

Unlike in ``paddle_fused_attention`` itself, the result is layer-normalised only where the input is not.
"""

from . import functional
from .layer import FusedMultiHeadAttention

__all__ = ["FusedMultiHeadAttention", "functional"]
