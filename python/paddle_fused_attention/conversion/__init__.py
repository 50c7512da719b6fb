"""Conversion of whole models to the operator, and back."""

from . import quantization as _quantization  # noqa: F401  tells Paddle of PackedLinear
from .adapters import AttentionAdapter, VisionTransformerAdapter
from .model import convert, revert
from .registry import register_adapter

__all__ = ["AttentionAdapter", "VisionTransformerAdapter", "convert", "register_adapter", "revert"]
