"""The public functions, incubate's too, each with a valid call and the kinds of its arguments."""

import numpy as np
import paddle_fused_attention as pfa
from bad_values import Choice, Given, Integer, Longest, Name, Starts, Switch, Tensor, Variant, rate, seed
from call_kinds import (
    BLOCK,
    FEED_FORWARD,
    FLASH,
    LINEAR,
    LINEAR_ACTIVATION,
    LONGEST,
    MATMUL_BIAS,
    OWN_BLOCK,
    PACKED_QKV,
    QKV,
    RESIDUAL_NORM,
    RING,
    UNPADDED_FLASH,
    WINDOW_AND_SEED,
    H,
    Target,
    attention,
    block_scale,
    flag,
    mask,
    optional,
    packed_qkv,
    scale,
    weight,
    zeros,
)
from paddle.incubate.nn import attn_bias
from paddle_fused_attention import functional, incubate

FUNCTIONS = {
    "fused_multi_head_attention": Target(pfa.fused_multi_head_attention, OWN_BLOCK, True),
    "fused_multi_head_attention of packed sequences": Target(
        pfa.fused_multi_head_attention,
        {
            "x": Tensor("N E", packed=True),
            "qkv_weight": weight("8 D E"),
            "linear_weight": weight("E E"),
            "qkv_bias": optional("8 D"),
            "cu_seqlens": Starts(0, 2, 6),
            "max_seqlen": Longest(4, 0, optional=True, bad=(1, 3)),
            "scale": block_scale(),
            **WINDOW_AND_SEED,
            "dropout_rate": rate(),
            "attn_dropout_rate": rate(),
            "attn_mask": Given(lambda: None, [Variant("mask", lambda _: zeros(1, 1, 6, 6))]),
        },
        True,
    ),
    "fused_feedforward": Target(
        pfa.fused_feedforward,
        {**FEED_FORWARD, "final_layer_norm": Switch(True, optional=True), "seed": seed()},
        True,
    ),
    "fused_bias_dropout_residual_layer_norm": Target(
        pfa.fused_bias_dropout_residual_layer_norm,
        {**RESIDUAL_NORM, "final_layer_norm": flag(True), "seed": seed()},
        True,
    ),
    "fused_linear": Target(pfa.fused_linear, LINEAR, True),
    "fused_linear_activation": Target(pfa.fused_linear_activation, LINEAR_ACTIVATION, True),
    "fused_matmul_bias": Target(pfa.fused_matmul_bias, MATMUL_BIAS, True),
}
ATTENTION = {
    "scaled_dot_product_attention": Target(
        functional.scaled_dot_product_attention,
        {
            **QKV,
            "attn_mask": mask("B 1 S T"),
            "dropout_p": rate(),
            "is_causal": flag(),
            "training": flag(True),
            "backend": Choice(None, optional=True),
            "scale": scale(),
            "enable_gqa": flag(True),
            "name": Name(),
            **WINDOW_AND_SEED,
        },
        True,
    ),
    "causal scaled_dot_product_attention": Target(
        lambda **arguments: functional.scaled_dot_product_attention(is_causal=True, training=False, **arguments),
        {**QKV, "attn_mask": mask("B 1 S T")},
        True,
    ),
    "scaled_dot_product_attention without a batch": Target(
        functional.scaled_dot_product_attention, attention("s H D", "T G D", value=Tensor("T G D")), True
    ),
    "flash_attention": Target(
        functional.flash_attention,
        {
            **QKV,
            "query": Tensor("B s H D"),
            **FLASH,
            "return_softmax": flag(),
            "softmax_scale": scale(),
            **WINDOW_AND_SEED,
        },
        True,
    ),
    "flash_attn_qkvpacked": Target(
        functional.flash_attn_qkvpacked,
        {"qkv": packed_qkv("b s 3 G D"), **FLASH, "return_softmax": flag(), "scale": scale(), **WINDOW_AND_SEED},
        True,
    ),
    "flash_attn_unpadded": Target(
        functional.flash_attn_unpadded,
        {**PACKED_QKV, "cu_seqlens_q": Starts(0, 2, 6), "cu_seqlens_k": Starts(0, 1, 6), **LONGEST, **UNPADDED_FLASH},
        True,
    ),
    "flash_attn_varlen_qkvpacked": Target(
        functional.flash_attn_varlen_qkvpacked,
        {
            "qkv": packed_qkv("N 3 G D", packed=True),
            "cu_seqlens_q": Starts(0, 2, 6),
            "cu_seqlens_k": Starts(0, 2, 6),
            "max_seqlen_q": Longest(4, bad=(1,)),
            "max_seqlen_k": Longest(4, bad=(1,)),
            **UNPADDED_FLASH,
            "varlen_padded": Given(lambda: False),
        },
        True,
    ),
    "flash_attn_varlen_qkvpacked of padded sequences": Target(
        functional.flash_attn_varlen_qkvpacked,
        {
            "qkv": packed_qkv("N 3 G D", packed=True),
            "cu_seqlens_q": Tensor("3", "int32", array=(0, 2, 5), dtype_group="starts"),
            "cu_seqlens_k": Tensor("3", "int32", array=(0, 2, 5), dtype_group="starts"),
            "max_seqlen_q": Integer(3, bad=(1, 2, 4)),
            "max_seqlen_k": Integer(3, bad=(1, 2, 4)),
            **UNPADDED_FLASH,
            "varlen_padded": flag(True),
        },
        True,
    ),
    "flashmask_attention": Target(
        functional.flashmask_attention,
        {
            **QKV,
            "query": Tensor("B s H D"),
            "startend_row_indices": Tensor(
                *("B G T 2", "int32", np.full((3, 2, 7, 2), 5)),
                optional=True,
                dtype_group="indices",
                without=("one less of dimension 1",),
            ),
            **FLASH,
            "return_softmax_lse": flag(),
            "return_seed_offset": flag(),
            "softmax_scale": scale(),
            "block_mask": Given(
                lambda: None, [Variant("tensor", lambda _: zeros(2, 2)), Variant("str", lambda _: "a")]
            ),
            "seed": seed(),
        },
        True,
    ),
    "memory_efficient_attention": Target(
        functional.memory_efficient_attention,
        {
            **QKV,
            "attn_bias": mask("B 1 S T"),
            "p": rate(),
            "scale": scale(),
            "training": flag(True),
            **WINDOW_AND_SEED,
        },
        True,
    ),
    "memory_efficient_attention with a bias of its own kind": Target(
        functional.memory_efficient_attention,
        {
            "query": Tensor("1 N H D"),
            "key": Tensor("1 N G D"),
            "value": Tensor("1 N G D"),
            "attn_bias": Given(
                lambda: attn_bias.BlockDiagonalMask.from_seqlens([2, 4]),
                [
                    Variant("class", lambda _: attn_bias.BlockDiagonalMask),
                    Variant("short", lambda _: attn_bias.BlockDiagonalMask.from_seqlens([2, 3])),
                    Variant("of str", lambda _: attn_bias.BlockDiagonalMask("a", "b")),
                    Variant("triangle of str", lambda _: attn_bias.LowerTriangularMaskWithTensorBias("a")),
                    Variant("triangle", lambda _: attn_bias.LowerTriangularMaskWithTensorBias(zeros(2, 2))),
                    Variant("padded", lambda _: _padded_bias()),
                ],
            ),
        },
    ),
}


def without_second_norm(kinds, norm):
    """Those of incubate, whose second layer norm is off where the first is on."""
    return {name: kind for name, kind in kinds.items() if name not in (f"{norm}_scale", f"{norm}_bias")}


def _padded_bias():
    info = attn_bias.BlockDiagonalMask.from_seqlens([2, 4]).q_seqinfo
    return attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask(info, info)


OF_INCUBATE = {
    "incubate fused_multi_head_attention": Target(
        incubate.functional.fused_multi_head_attention,
        {
            **without_second_norm(BLOCK, "ln"),
            "num_heads": Given(lambda: -1),
            "ring_id": RING,
            "transpose_qkv_wb": Switch(False),
        },
        True,
    ),
    "incubate fused_multi_head_attention with a cache": Target(
        lambda **arguments: incubate.functional.fused_multi_head_attention(**arguments, pre_layer_norm=True),
        {
            **{
                name: BLOCK[name]
                for name in ("x", "qkv_weight", "linear_weight", "qkv_bias", "linear_bias", "pre_ln_scale")
            },
            "cache_kv": Tensor("2 B H K D", optional=True),
            "attn_mask": mask("B 1 S 8"),
            "dropout_rate": rate(),
            "attn_dropout_rate": rate(),
        },
        True,
    ),
    "incubate fused_multi_head_attention transposed": Target(
        incubate.functional.fused_multi_head_attention,
        {
            "x": Tensor("b s E"),
            "qkv_weight": weight("E 96"),
            "linear_weight": weight("E E"),
            "qkv_bias": optional("96"),
            "num_heads": Integer(H, bad=(5, -1)),
            "dropout_rate": rate(),
            "attn_dropout_rate": rate(),
            "transpose_qkv_wb": Given(lambda: True),
        },
        True,
    ),
    "incubate fused_feedforward": Target(
        incubate.functional.fused_feedforward, without_second_norm(FEED_FORWARD, "ln2"), True
    ),
    "incubate fused_bias_dropout_residual_layer_norm": Target(
        incubate.functional.fused_bias_dropout_residual_layer_norm, RESIDUAL_NORM, True
    ),
    "incubate fused_linear": Target(incubate.functional.fused_linear, LINEAR, True),
    "incubate fused_linear_activation": Target(incubate.functional.fused_linear_activation, LINEAR_ACTIVATION, True),
    "incubate fused_matmul_bias": Target(incubate.functional.fused_matmul_bias, MATMUL_BIAS, True),
    "incubate fused_matmul_bias of batches": Target(
        incubate.functional.fused_matmul_bias,
        {
            "x": Tensor("B s E", without=("one more dimension", "one dimension less")),
            "y": Tensor("B E f", without=("one more dimension", "one dimension less")),
        },
        True,
    ),
}
