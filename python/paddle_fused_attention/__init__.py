"""Fused multi-head attention for PaddlePaddle: a whole attention block as one operator, on CPU and GPU.

Importing it registers the operator with Paddle. A saved model holds the operator by its name, so import this package
before paddle.jit.load or a predictor loads such a model. Otherwise Paddle 2.6 says that the operator is not registered,
and Paddle 3 that "op [] kernel output args (0) defs should equal op outputs (2)". Since 3.1 a loaded model whose result
is the operator's own ends in a segmentation fault when it is called.
"""

from . import incubate
from ._explain import explain
from ._flops import count_flops
from .arranging import arrange_weights, restore_weights
from .conversion import (
    AttentionAdapter,
    FeedForwardAdapter,
    VisionTransformerAdapter,
    VisionTransformerMlpAdapter,
    convert,
    register_adapter,
    revert,
)
from .feed_forward import fused_feedforward
from .functional import (
    fused_bias_dropout_residual_layer_norm,
    fused_linear,
    fused_linear_activation,
    fused_matmul_bias,
    fused_multi_head_attention,
)
from .layer import FusedMultiHeadAttention
from .packing import Packed, pad, unpad
from .parallel import (
    ParallelClipGradByGlobalNorm,
    ParallelFusedFeedForward,
    ParallelFusedMultiHeadAttention,
    full_state_dict,
    load_full_state_dict,
)
from .patching import patch, unpatch
from .state_dicts import pack_optimizer_state, separate_optimizer_state, separate_state_dict
from .weights import pack_qkv_bias, pack_qkv_weight, unpack_qkv_bias, unpack_qkv_weight

__version__ = "0.1.0"

__all__ = [
    "AttentionAdapter",
    "FeedForwardAdapter",
    "FusedMultiHeadAttention",
    "Packed",
    "ParallelClipGradByGlobalNorm",
    "ParallelFusedFeedForward",
    "ParallelFusedMultiHeadAttention",
    "VisionTransformerAdapter",
    "VisionTransformerMlpAdapter",
    "arrange_weights",
    "convert",
    "count_flops",
    "explain",
    "full_state_dict",
    "fused_bias_dropout_residual_layer_norm",
    "fused_feedforward",
    "fused_linear",
    "fused_linear_activation",
    "fused_matmul_bias",
    "fused_multi_head_attention",
    "incubate",
    "load_full_state_dict",
    "pack_optimizer_state",
    "pack_qkv_bias",
    "pack_qkv_weight",
    "pad",
    "patch",
    "register_adapter",
    "restore_weights",
    "revert",
    "separate_optimizer_state",
    "separate_state_dict",
    "unpack_qkv_bias",
    "unpack_qkv_weight",
    "unpad",
    "unpatch",
]
