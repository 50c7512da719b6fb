"""Conversion of whole models to the operators, and back."""

from . import quantization as _quantization  # noqa: F401  tells Paddle of PackedLinear
from .adapters import AttentionAdapter, FeedForwardAdapter, VisionTransformerAdapter, VisionTransformerMlpAdapter
from .model import convert, revert
from .registry import register_adapter

__all__ = [
    "AttentionAdapter",
    "FeedForwardAdapter",
    "VisionTransformerAdapter",
    "VisionTransformerMlpAdapter",
    "convert",
    "register_adapter",
    "revert",
]
