"""Fused multi-head attention for PaddlePaddle: a whole attention block as one operator, on CPU and GPU, in dygraph and static graphs."""

from .functional import fused_multi_head_attention
from .layer import FusedMultiHeadAttention
from .weights import pack_qkv_bias, pack_qkv_weight, unpack_qkv_bias, unpack_qkv_weight

__version__ = "0.1.0"

__all__ = [
    "FusedMultiHeadAttention",
    "fused_multi_head_attention",
    "pack_qkv_bias",
    "pack_qkv_weight",
    "unpack_qkv_bias",
    "unpack_qkv_weight",
]
