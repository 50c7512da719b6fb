"""The public functions, layers and commands of the package, each with a valid call and the kinds of its arguments."""

import contextlib
import functools
import io
import os
import tempfile
import types
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple

import numpy as np
import paddle
import paddle_fused_attention as pfa
from bad_values import (
    ANY,
    DTYPES,
    FLOATS,
    REFUSED,
    SIZES,
    Choice,
    Exactly,
    Given,
    Integer,
    Longest,
    Name,
    Number,
    Starts,
    Switch,
    Tensor,
    Variant,
    Window,
    rate,
    seed,
    to_value,
)
from paddle.incubate.nn import attn_bias
from paddle_fused_attention import checkpoint, checkpoint_files, functional, incubate
from paddle_fused_attention.__main__ import main

_FEWER = ("no dimension", "one dimension less")  # shapes that broadcast
_ODD_NAMES = ("empty str", "line breaks", "long str", "str of a number")
E, H, D, F = (SIZES[letter] for letter in "EHDF")
MASKS = tuple(dtype for dtype in DTYPES if not dtype.startswith("complex"))


class Target(NamedTuple):
    call: Callable  # by keywords
    kinds: Dict[str, Any]  # of its arguments, by name
    in_graphs: bool = False  # whether static graphs are built by it too
    called: Dict[str, tuple] = {}  # what errors may call an argument beside its name


def weight(shape, **options):
    return Tensor(shape, **options)


def optional(shape, **options):
    return Tensor(shape, optional=True, **options)


def mask(shape, **options):
    return Tensor(shape, optional=True, dtype_group="mask", accepts=MASKS, without=_FEWER, **options)


def flag(value=False):
    return Switch(value)


def mode():
    return Choice("upscale_in_train")


def epsilon():
    return Number(1e-5)


NORMS = {f"{norm}_{part}": optional("E") for norm in ("pre_ln", "ln") for part in ("scale", "bias")}
BLOCK = {
    "x": Tensor("B S E"),
    "qkv_weight": weight("3 H D E"),
    "linear_weight": weight("E E"),
    "pre_layer_norm": flag(True),
    **NORMS,
    "pre_ln_epsilon": epsilon(),
    "qkv_bias": optional("3 H D"),
    "linear_bias": optional("E"),
    "attn_mask": mask("B 1 S S"),
    "dropout_rate": rate(),
    "attn_dropout_rate": rate(),
    "ln_epsilon": epsilon(),
    "training": flag(True),
    "mode": mode(),
    "add_residual": flag(True),
    "name": Name(),
}
OWN_BLOCK = {**BLOCK, "final_layer_norm": flag(True), "causal": flag(), "seed": seed()}
FEED_FORWARD = {
    "x": Tensor("b s F", leading=True),
    "linear1_weight": weight("F E"),
    "linear2_weight": weight("E F"),
    "linear1_bias": optional("E"),
    "linear2_bias": optional("F"),
    **{f"ln{i}_{part}": optional("F") for i in (1, 2) for part in ("scale", "bias")},
    "dropout1_rate": rate(),
    "dropout2_rate": rate(),
    "activation": Choice("gelu"),
    "ln1_epsilon": epsilon(),
    "ln2_epsilon": epsilon(),
    "pre_layer_norm": flag(True),
    "training": flag(True),
    "mode": mode(),
    "ring_id": Integer(-1, -1, 2**31 - 1, bad=(7,)),
    "add_residual": flag(True),
    "name": Name(),
}
RESIDUAL_NORM = {
    "x": Tensor("B S E", leading=True),
    "residual": Tensor("B S E", leading=True),
    "bias": optional("E", accepts=("float16", "bfloat16")),
    "ln_scale": optional("E"),
    "ln_bias": optional("E"),
    "dropout_rate": rate(),
    "ln_epsilon": epsilon(),
    "training": flag(True),
    "mode": mode(),
    "name": Name(),
}
LINEAR = {
    "x": Tensor("b s E", leading=True),
    "weight": weight("E F"),
    "bias": optional("F"),
    "transpose_weight": Switch(False),
    "name": Name(),
}
LINEAR_ACTIVATION = {
    "x": Tensor("b s E", leading=True),
    "y": weight("E F"),
    "bias": optional("F"),
    "trans_x": flag(),
    "trans_y": flag(),
    "activation": Choice("silu", optional=True),
}
MATMUL_BIAS = {
    "x": Tensor("b s E", leading=True),
    "y": weight("E F"),
    "bias": optional("F"),
    "transpose_x": flag(),
    "transpose_y": flag(),
    "name": Name(),
}


def scale():
    return Number(0.5, open_at=0, optional=True)


def block_scale():
    return Number(0.5, -1e308, optional=True)


def attention(query, key, **more):
    """The arguments of a function of query, key and value."""
    return {"query": Tensor(query), "key": Tensor(key), "value": Tensor(key), **more}


def packed_qkv(shape, **options):
    """Of one tensor the numbers of query heads, of key heads and of numbers of a head are free."""
    first = len(shape.split()) - 3
    sizes = [(first, ("more",)), (first + 1, ("more", "less")), (first + 2, ("more", "less"))]
    return Tensor(
        shape, without=[f"one {word} of dimension {axis}" for axis, words in sizes for word in words], **options
    )


FLASH = {
    "dropout": rate(),
    "causal": flag(),
    "rng_name": Exactly(str, takes=("str", "numpy str", *_ODD_NAMES)),
    "training": flag(True),
    "name": Name(),
}
WINDOW_AND_SEED = {"window_size": Window(), "seed": seed()}
LONGEST = {"max_seqlen_q": Longest(4, bad=(1,)), "max_seqlen_k": Longest(5, bad=(1,))}
UNPADDED_FLASH = {**FLASH, "scale": scale(), "return_softmax": flag(), **WINDOW_AND_SEED}


def zeros(*shape, dtype="float32"):
    return now(np.zeros(shape), dtype)


def now(array, dtype="float32"):
    """A Tensor of an array's numbers, or while a graph is built a variable like it."""
    return to_value(array, dtype, not paddle.in_dynamic_mode())


def attribute_name():
    """The name of a layer."""
    return Exactly(lambda: None, optional=True, takes=("str", "numpy str", *_ODD_NAMES))


def caches_of(kind, heads, head_dim):
    """Wrong caches of a class of paddle.nn.MultiHeadAttention, for a batch of three."""
    shapes = {
        "cache of one head more": (3, heads + 1, 3, head_dim),
        "cache of another batch": (2, heads, 3, head_dim),
        "cache of another head_dim": (3, heads, 3, head_dim + 1),
        "cache of three dimensions": (heads, 3, head_dim),
        "cache of no dimension": (),
    }

    def good():
        return zeros(3, heads, 3, head_dim)

    found = {label: lambda _, s=shape: kind(zeros(*s), zeros(*s)) for label, shape in shapes.items()}
    for what, make in (("None", lambda: None), ("str", lambda: "text"), ("array", lambda: np.zeros((2, 2)))):
        found[f"cache of {what}"] = lambda _, m=make: kind(m(), m())
        found[f"cache and {what}"] = lambda _, m=make: kind(good(), m())
    found["cache of lengths that differ"] = lambda _: kind(good(), zeros(3, heads, 4, head_dim))
    for dtype in ("float64", "int32", "bool"):
        found[f"cache of {dtype}"] = lambda _, d=dtype: kind(*[zeros(3, heads, 3, head_dim, dtype=d)] * 2)
        found[f"cache and {dtype}"] = lambda _, d=dtype: kind(good(), zeros(3, heads, 3, head_dim, dtype=d))
    return [Variant(label, make, blames_others=True) for label, make in found.items()]


def attribute(needed=True, takes=()):
    """What makes a ParamAttr. False leaves a parameter out that is not needed."""
    more = [Variant("False", lambda _: False, REFUSED if needed else ANY)]
    more += [
        Variant("Assign of another shape", lambda _: paddle.nn.initializer.Assign(np.zeros((3, 5), "float32"))),
        Variant("pair of numbers", lambda _: [3, 4]),
    ]
    return Exactly(lambda: None, more, optional=True, takes=("str", "numpy str", "True", *_ODD_NAMES, *takes))


QKV = attention("B S H D", "B T G D", value=Tensor("B T G D"))
PACKED_QKV = {name: Tensor(f"N {h} D", packed=True) for name, h in (("query", "H"), ("key", "G"), ("value", "G"))}
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


RING = Integer(-1, -1, 2**31 - 1, bad=(7,))
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


def made(kind, *inputs):
    """A layer's constructor, whose result is what it is, its parameters, and what it gives for an input."""

    def make(**arguments):
        layer = kind(**arguments)
        layer.eval()
        return [layer.extra_repr(), *layer.parameters(), layer(*[zeros(*shape) + 0.5 for shape in inputs])]

    return make


ATTENTION_LAYER = {
    "embed_dim": Integer(E, bad=(33, 6)),
    "num_heads": Integer(H, bad=(5, 64)),
    "dropout_rate": rate(),
    "attn_dropout_rate": rate(),
    "kdim": Integer(E, optional=True),
    "vdim": Integer(E, optional=True),
    "normalize_before": flag(True),
    "need_weights": flag(),
}
OWN_LAYER = {
    **ATTENTION_LAYER,
    "weight_attr": attribute(),
    "bias_attr": attribute(needed=False),
    "name": attribute_name(),
    "epsilon": epsilon(),
    "final_layer_norm": flag(True),
    "causal": flag(),
    "add_residual": flag(True),
    "window_size": Window(),
    "scale": block_scale(),
}
OF_GROUP = Exactly(lambda: None, optional=True)
OF_INCUBATE_LAYER = {
    "epsilon": epsilon(),
    "nranks": Integer(1, 1, bad=(2,)),
    "ring_id": RING,
    "name": attribute_name(),
}
FEED_FORWARD_LAYER = {
    "d_model": Integer(E),
    "dim_feedforward": Integer(F),
    "dropout_rate": rate(),
    "activation": Choice("gelu"),
    "act_dropout_rate": rate(optional=True),
    "normalize_before": flag(True),
}
CONSTRUCTORS = {
    "FusedMultiHeadAttention": Target(
        made(pfa.FusedMultiHeadAttention, (2, 5, E)),
        {**OWN_LAYER, "num_kv_heads": Integer(2, optional=True, bad=(3,))},
        True,
    ),
    "ParallelFusedMultiHeadAttention": Target(
        made(pfa.ParallelFusedMultiHeadAttention, (2, 5, E)), {**OWN_LAYER, "group": OF_GROUP}
    ),
    "ParallelFusedFeedForward": Target(
        made(pfa.ParallelFusedFeedForward, (2, 5, E)),
        {
            **FEED_FORWARD_LAYER,
            "epsilon": epsilon(),
            "weight_attr": attribute(),
            "bias_attr": attribute(needed=False),
            "name": attribute_name(),
            "add_residual": flag(True),
            "gated": flag(),
            "group": OF_GROUP,
        },
    ),
    "ParallelClipGradByGlobalNorm": Target(
        lambda **arguments: str(pfa.ParallelClipGradByGlobalNorm(**arguments)),
        {"clip_norm": Number(1.0), "group": OF_GROUP},
    ),
    "incubate FusedMultiHeadAttention": Target(
        made(incubate.FusedMultiHeadAttention, (2, 5, E)),
        {
            **ATTENTION_LAYER,
            **{
                f"{part}_attr": attribute(needed=part.endswith("weight"))
                for part in ("qkv_weight", "qkv_bias", "linear_weight", "linear_bias", "pre_ln_scale", "ln_bias")
            },
            **OF_INCUBATE_LAYER,
            "transpose_qkv_wb": flag(),
        },
        True,
    ),
    "incubate FusedFeedForward": Target(
        made(incubate.FusedFeedForward, (2, 5, E)),
        {
            **FEED_FORWARD_LAYER,
            **{
                f"{part}_attr": attribute(needed=part.endswith("weight"))
                for part in (
                    "linear1_weight",
                    "linear1_bias",
                    "linear2_weight",
                    "linear2_bias",
                    "ln1_scale",
                    "ln2_bias",
                )
            },
            **OF_INCUBATE_LAYER,
        },
    ),
    "incubate FusedTransformerEncoderLayer": Target(
        made(incubate.FusedTransformerEncoderLayer, (2, 5, E)),
        {
            "d_model": Integer(E, bad=(33,)),
            "nhead": Integer(H, bad=(5,)),
            "dim_feedforward": Integer(F),
            "dropout_rate": rate(),
            "activation": Choice("gelu"),
            "attn_dropout_rate": rate(optional=True),
            "act_dropout_rate": rate(optional=True),
            "normalize_before": flag(),
            "weight_attr": attribute(takes=("list of None",)),
            "bias_attr": attribute(needed=False, takes=("list of None",)),
        },
    ),
    "incubate FusedLinear": Target(
        made(incubate.FusedLinear, (2, 5, E)),
        {
            "in_features": Integer(E),
            "out_features": Integer(F),
            "weight_attr": attribute(),
            "bias_attr": attribute(needed=False),
            "transpose_weight": flag(True),
            "name": attribute_name(),
        },
    ),
    "incubate FusedBiasDropoutResidualLayerNorm": Target(
        made(incubate.FusedBiasDropoutResidualLayerNorm, (2, 5, E), (2, 5, E)),
        {
            "embed_dim": Integer(E),
            "dropout_rate": rate(),
            "weight_attr": attribute(needed=False),
            "bias_attr": attribute(needed=False),
            "epsilon": epsilon(),
            "name": attribute_name(),
        },
    ),
}

_layers: Dict[str, Any] = {}


def layer_of(make):
    """A call of a layer, which is made at the first."""

    def call(**arguments):
        key = (id(make), paddle.in_dynamic_mode())
        if key not in _layers or not paddle.in_dynamic_mode():
            _layers[key] = make()
            _layers[key].eval()
        return _layers[key](**arguments)

    return call


def cache_argument(heads, head_dim):
    kinds = (paddle.nn.MultiHeadAttention.Cache, paddle.nn.MultiHeadAttention.StaticCache)
    variants = [
        variant._replace(label=f"{kind.__name__}: {variant.label}")
        for kind in kinds
        for variant in caches_of(kind, heads, head_dim)
    ]
    return Exactly(lambda: None, variants, optional=True)


def encoder_layer():
    return pfa.convert(paddle.nn.TransformerEncoderLayer(E, H, F, dropout=0.0))


def decoder_layer():
    return pfa.convert(paddle.nn.TransformerDecoderLayer(E, H, F, dropout=0.0))


def given(shape, **options):
    """An input of a layer, of its parameters' dtype."""
    return Tensor(shape, dtype_group="layer", **options)


def paddle_mask(shape):
    """A mask as Paddle's layers read it, which add (mask - 1) * 1e9 for an integer one."""
    return Tensor(shape, optional=True, dtype_group="mask", accepts=FLOATS, also=MASKS, without=_FEWER)


OTHER_KEYS = {"query": given("B S E"), "key": given("B T E", optional=True), "value": given("B T E", optional=True)}
CALLS = {
    "FusedMultiHeadAttention call": Target(
        layer_of(lambda: pfa.FusedMultiHeadAttention(E, H, 0.0, 0.0)),
        {"query": given("B S E"), "attn_mask": mask("B 1 S S"), "cache": cache_argument(H, D)},
        True,
        {"query": ("x",)},
    ),
    "FusedMultiHeadAttention call with other keys": Target(
        layer_of(lambda: pfa.FusedMultiHeadAttention(E, H, 0.0, 0.0, need_weights=True)),
        {**OTHER_KEYS, "attn_mask": mask("B 1 S T")},
        True,
        {"query": ("x",)},
    ),
    "FusedMultiHeadAttention call with packed sequences": Target(
        layer_of(lambda: pfa.FusedMultiHeadAttention(E, H, 0.0, 0.0)),
        {
            "query": given("N E", packed=True),
            "cu_seqlens": Starts(0, 2, 6),
            "max_seqlen": Longest(4, 0, optional=True, bad=(1, 3)),
        },
        True,
        {"query": ("x",)},
    ),
    "FusedMultiHeadAttention.gen_cache": Target(
        lambda **arguments: tuple(pfa.FusedMultiHeadAttention(E, H).gen_cache(**arguments)),
        {
            "key": given("B T E"),
            "value": given("B T E", optional=True),
            "type": Exactly(lambda: paddle.nn.MultiHeadAttention.StaticCache),
        },
        True,
    ),
    "ParallelFusedMultiHeadAttention call": Target(
        layer_of(lambda: pfa.ParallelFusedMultiHeadAttention(E, H, 0.0, 0.0)),
        {**OTHER_KEYS, "attn_mask": mask("B 1 S T")},
        True,
        {"query": ("x",)},
    ),
    "ParallelFusedFeedForward call": Target(
        layer_of(lambda: pfa.ParallelFusedFeedForward(E, F, 0.0)), {"x": given("b s E", leading=True)}, True
    ),
    "incubate FusedMultiHeadAttention call": Target(
        layer_of(lambda: incubate.FusedMultiHeadAttention(E, H, 0.0, 0.0)),
        {"query": given("B S E"), "attn_mask": paddle_mask("B 1 S 8"), "cache": given("2 B H K D", optional=True)},
        True,
        {"query": ("x",), "cache": ("cache_kv",)},
    ),
    "incubate FusedMultiHeadAttention call with other keys": Target(
        layer_of(lambda: incubate.FusedMultiHeadAttention(E, H, 0.0, 0.0)),
        {**OTHER_KEYS, "attn_mask": paddle_mask("B 1 S T")},
        True,
        {"query": ("x",)},
    ),
    "incubate FusedFeedForward call": Target(
        layer_of(lambda: incubate.FusedFeedForward(E, F, 0.0)),
        {"src": given("b s E", leading=True)},
        True,
        {"src": ("x",)},
    ),
    "incubate FusedTransformerEncoderLayer call": Target(
        layer_of(lambda: incubate.FusedTransformerEncoderLayer(E, H, F, 0.0)),
        {"src": given("B S E"), "src_mask": paddle_mask("B 1 S 8"), "cache": given("2 B H K D", optional=True)},
        True,
        {"src": ("x", "query"), "src_mask": ("attn_mask",), "cache": ("cache_kv",)},
    ),
    "incubate FusedLinear call": Target(
        layer_of(lambda: incubate.FusedLinear(E, F)), {"input": given("b s E", leading=True)}, True, {"input": ("x",)}
    ),
    "incubate FusedBiasDropoutResidualLayerNorm call": Target(
        layer_of(lambda: incubate.FusedBiasDropoutResidualLayerNorm(E, 0.0)),
        {"x": given("B S E", leading=True), "residual": given("B S E", leading=True)},
        True,
    ),
    "converted encoder layer": Target(
        layer_of(encoder_layer),
        {
            "src": given("B S E"),
            "src_mask": paddle_mask("B 1 S S"),
            "cache": cache_argument(H, D),
            "output_attentions": Given(lambda: False),
        },
    ),
    "converted encoder layer with packed sequences": Target(
        layer_of(encoder_layer),
        {"src": given("N E"), "cu_seqlens": Starts(0, 2, 6), "max_seqlen": Longest(4, 0, optional=True, bad=(1, 3))},
    ),
    "converted decoder layer": Target(
        layer_of(decoder_layer),
        {
            "tgt": given("B S E"),
            "memory": given("B T E"),
            "tgt_mask": paddle_mask("B 1 S S"),
            "memory_mask": paddle_mask("B 1 S T"),
            "cache": Exactly(lambda: None, optional=True, takes=("list of None",)),
        },
    ),
    "converted attention": Target(
        layer_of(lambda: pfa.convert(paddle.nn.MultiHeadAttention(E, H))),
        {**OTHER_KEYS, "attn_mask": paddle_mask("B 1 S T"), "cache": Exactly(lambda: None, optional=True)},
        called={"query": ("x",)},
    ),
}


def model(make):
    """The argument of a function of models, which is made once."""
    return Exactly(functools.lru_cache(maxsize=None)(make), takes=("layer",))


def converted_model():
    return model(encoder_layer)


def moments(value):
    """An optimizer's state of the first projection alone, for whatever model."""
    return lambda valid: {**valid, next(iter(valid)): value}


def state_of_optimizer(names):
    shapes = {"weight": (E, E), "bias": (E,)}
    return {f"{name}_moment1_0": zeros(*shapes[name.split(".")[-1]]) for name in names}


def with_state(function, converted):
    """`function` of a model and an optimizer's state, in which `state` replaces what its parameters ask for."""

    def call(model, state):
        if isinstance(model, paddle.nn.Layer) and hasattr(model, "self_attn"):
            packing = model.self_attn._packing
            names = [model.self_attn.qkv_weight.name] if converted else [*packing.parameter_names.values()][:6:2]
            shape = model.self_attn.qkv_weight.shape if converted else [E, E]
            good = {f"{name}_moment1_0": zeros(*shape) for name in names}
            state = state(good) if isinstance(state, types.FunctionType) else state
        return function(model, state)

    return call


STATE = Exactly(
    dict,
    [
        Variant(label, lambda _, v=value: lambda good: {name: v() for name in good})
        for label, value in {
            "of str": lambda: "text",
            "of None": lambda: None,
            "of dict": dict,
            "of objects": object,
            "of another shape": lambda: zeros(3, 3),
            "of arrays of objects": lambda: np.array([None]),
        }.items()
    ],
    takes=("dict", "empty dict", "function"),
)
MODELS = {
    "convert": Target(
        lambda **arguments: repr(pfa.convert(**arguments)),
        {"model": model(lambda: paddle.nn.TransformerEncoderLayer(E, H, F)), "return_report": flag(False)},
    ),
    "revert": Target(lambda **arguments: repr(pfa.revert(**arguments)), {"model": converted_model()}),
    "separate_state_dict": Target(pfa.separate_state_dict, {"model": converted_model()}),
    "full_state_dict": Target(pfa.full_state_dict, {"model": converted_model()}),
    "load_full_state_dict": Target(
        pfa.load_full_state_dict,
        {
            "model": converted_model(),
            "state_dict": Exactly(
                lambda: {"linear2.bias": now(np.zeros(E))},
                [
                    Variant("of str", lambda _: {"linear2.bias": "text"}),
                    Variant("of None", lambda _: {"linear2.bias": None}),
                    Variant("of objects", lambda _: {"linear2.bias": object()}),
                    Variant("of another shape", lambda _: {"linear2.bias": zeros(3)}, ANY),  # Paddle warns
                ],
                takes=("dict", "empty dict"),
            ),
        },
        called={"state_dict": ("linear2.bias",)},
    ),
    "pack_optimizer_state": Target(
        with_state(pfa.pack_optimizer_state, False), {"model": converted_model(), "state": STATE}
    ),
    "separate_optimizer_state": Target(
        with_state(pfa.separate_optimizer_state, True), {"model": converted_model(), "state": STATE}
    ),
    "arrange_weights": Target(pfa.arrange_weights, {"model": converted_model()}),
    "restore_weights": Target(lambda **arguments: repr(pfa.restore_weights(**arguments)), {"model": converted_model()}),
    "register_adapter": Target(
        pfa.register_adapter,
        {
            "layer_class": Exactly(
                lambda: "a.package.Attention", [Variant("class of Paddle", lambda _: paddle.nn.MultiHeadAttention)]
            ),
            "adapter": Exactly(pfa.VisionTransformerAdapter),
        },
    ),
    "FusedMultiHeadAttention.from_multi_head_attention": Target(
        lambda **arguments: repr(pfa.FusedMultiHeadAttention.from_multi_head_attention(**arguments)),
        {
            "mha": Exactly(lambda: paddle.nn.MultiHeadAttention(E, H)),
            "norm": Exactly(
                lambda: paddle.nn.LayerNorm(E),
                [Variant("other width", lambda _: paddle.nn.LayerNorm(3))],
                optional=True,
            ),
            "normalize_before": flag(False),
            "dropout_rate": rate(),
            "causal": flag(),
            "add_residual": flag(True),
        },
    ),
    "ParallelFusedMultiHeadAttention.from_full": Target(
        lambda **arguments: repr(pfa.ParallelFusedMultiHeadAttention.from_full(**arguments)),
        {"layer": Exactly(lambda: pfa.FusedMultiHeadAttention(E, H)), "group": OF_GROUP},
    ),
    "patch": Target(lambda **arguments: _patched(**arguments), {"attention": flag(False)}),
    "explain": Target(
        lambda **arguments: str(pfa.explain(**arguments)),
        {
            "head_dim": Integer(64),
            "dtype": Choice("float32", optional=True, takes=("dtype", "upper case")),
            "device": Choice("cpu", optional=True),
        },
    ),
    "count_flops": Target(
        lambda layer, inputs: _flops(layer, inputs),
        {
            "layer": Exactly(lambda: pfa.FusedMultiHeadAttention(E, H)),
            "inputs": Exactly(
                lambda: (zeros(2, 5, E),),
                [
                    Variant("of str", lambda _: ("text",)),
                    Variant("of a vector", lambda _: (zeros(5),)),
                    Variant("packed without bounds", lambda _: (zeros(5, E),)),
                ],
            ),
        },
        called={"inputs": ("query", "cu_seqlens")},
    ),
}


def _patched(attention):
    with pfa.patch(attention):
        return "patched"


def _flops(layer, inputs):
    if isinstance(layer, paddle.nn.Layer):
        layer.total_ops = paddle.zeros([1])
    pfa.count_flops(layer, inputs, None)
    return float(layer.total_ops.sum())


def square(**options):
    return Tensor("E E", any_dtype=True, arrays=True, **options)


PACKING = {
    "pack_qkv_weight": Target(
        pfa.pack_qkv_weight,
        {"wq": Tensor("E E"), "wk": Tensor("E E"), "wv": Tensor("E E"), "num_heads": Integer(H, bad=(5, 64))},
    ),
    "pack_qkv_weight of arrays": Target(
        lambda num_heads: pfa.pack_qkv_weight(*[np.zeros((E, E))] * 3, num_heads),
        {"num_heads": Integer(H, bad=(5, 64))},
    ),
    "pack_qkv_bias": Target(
        pfa.pack_qkv_bias,
        {"bq": Tensor("E"), "bk": Tensor("E"), "bv": Tensor("E"), "num_heads": Integer(H, bad=(5, 64))},
    ),
    "unpack_qkv_weight": Target(pfa.unpack_qkv_weight, {"qkv_weight": Tensor("3 H D E", any_dtype=True, arrays=True)}),
    "unpack_qkv_bias": Target(
        pfa.unpack_qkv_bias,
        {
            "qkv_bias": Tensor(
                "8 D", any_dtype=True, arrays=True, without=("one more of dimension 1", "one less of dimension 1")
            ),
            "num_heads": Integer(H, bad=(3, 8)),
        },
    ),
    "unpack_qkv_bias of an odd head_dim": Target(
        pfa.unpack_qkv_bias,
        {"qkv_bias": Given(lambda: zeros(6, 7) + 0.5), "num_heads": Integer(4, bad=(3, 5, 6))},
    ),
    "unpad": Target(
        pfa.unpad,
        {
            "x": Tensor("B S E", without=[f"{size} of dimension 2" for size in ("one more", "one less", "none")]),
            "keep": Tensor("B S", "bool", np.ones((3, 5), bool), dtype_group="keep", accepts=MASKS[4:]),
        },
    ),
    "pad": Target(
        pfa.pad,
        {
            "tokens": Tensor("N e"),
            "indices": Tensor("N", "int64", np.arange(6), dtype_group="indices", also=("int32",)),
            "batch": Integer(3),
            "seq_len": Integer(5, bad=(1,)),
        },
        True,
    ),
}


def state_of_attention():
    """Arrays of an attention in a layer as paddle.nn.TransformerEncoderLayer has them."""
    state = paddle.nn.TransformerEncoderLayer(E, H, F).state_dict()
    return {f"encoder.layers.0.{name}": tensor.numpy() for name, tensor in state.items()}


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def command(kind):
    """The command line on a checkpoint in a folder of its own; `{}` in an argument stands for that folder."""

    def run(**options):
        with folder() as path:
            arrays = state_of_attention()
            if kind == "revert":
                arrays = checkpoint.pack(arrays, H)[0]
            checkpoint_files.write(path / "in.safetensors", checkpoint_files.Checkpoint(arrays))
            (path / "taken.safetensors").write_bytes(b"")
            (path / "empty.safetensors").write_bytes(b"")
            (path / "text.safetensors").write_text("text" * 100)
            (path / "text.bin").write_text("text" * 100)
            (path / "text.pdparams").write_text("text" * 100)
            (path / "list.index.json").write_text("[]")
            (path / "folder.safetensors").mkdir()
            arguments = [kind]
            for name, value in options.items():
                if name in ("input", "output"):
                    arguments.append(value.replace("{}", str(path)))
                elif value is True:
                    arguments.append("--" + name.replace("_", "-"))
                elif value not in (None, False):
                    arguments += ["--" + name.replace("_", "-"), value]
            err = io.StringIO()
            with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
                try:
                    status = main(arguments)
                except SystemExit as end:
                    status = end.code
            if status:
                lines = err.getvalue().strip().splitlines()
                raise ValueError(lines[-1].replace(str(path), "{}") if lines else f"no message, status {status}")
            return sorted(checkpoint_files.read(Path(options["output"].replace("{}", str(path)))).arrays.items())

    return run


def text(default, bad=(), good=()):
    found = [Variant(repr(value)[:60], lambda _, v=value: v) for value in bad]
    return Given(lambda: default, [*found, *(Variant(repr(v), lambda _, v=v: v, lambda valid: valid) for v in good)])


_folder = tempfile.TemporaryDirectory()


def _stored():
    path = Path(_folder.name) / "state.pdparams"
    paddle.save({"a": paddle.zeros([2])}, str(path))
    return path


FILES = {
    "input": text(
        "{}/in.safetensors",
        [
            *("", "{}", "{}/missing.safetensors", "{}/empty.safetensors", "{}/text.safetensors", "{}/text.bin"),
            *("{}/text.pdparams", "{}/list.index.json", "{}/folder.safetensors", "{}/a\0b.safetensors", "{}/in.txt"),
            *("{}/" + "x" * 300 + ".safetensors", "{}/in.safetensors/in.safetensors", "/dev/null", "-", "{}/a\nb.bin"),
        ],
    ),
    "output": text(
        "{}/out.safetensors",
        [
            *("", "{}", "{}/taken.safetensors", "{}/out.txt", "{}/missing/out.safetensors", "{}/folder.safetensors"),
            *("{}/a\0b.safetensors", "{}/" + "x" * 300 + ".safetensors", "{}/in.safetensors/out.safetensors", "-"),
        ],
    ),
}
OPTIONS = {
    "layout": text(None, ["", "in", "OUT-IN", "out-in "], ["in-out"]),
    "names": text(None, ["", "text", "[", "*\n*", "encoder"], ["*", "encoder.layers.*"]),
}
NUMBERS_OF_HEADS = (
    "",
    "0",
    "-1",
    "5",
    "1.5",
    "nan",
    "text",
    "=",
    "=4",
    "a=b",
    "9" * 400,
    "9" * 5000,
    "text=4",
    "4 5",
    "0x4",
)
FILE_NAMES = {"input": ("{}", "IN", "-", "/dev/null"), "output": ("{}", "OUT", "-")}
# What an error says of a file, behind its name.
FILE_ENDS = ("expected a name that ends", "no such file", "File name too long")
NO_ATTENTION = [Variant("dict", lambda _: {"a": 1}), Variant("empty dict", lambda _: {})]
NUL = [Variant("NUL", lambda _: "a\0.pdparams")]
CALLABLE = ("function", "class", "layer")
CHECKPOINTS = {
    "command convert": Target(
        command("convert"),
        {**FILES, "num_heads": text("4", NUMBERS_OF_HEADS, ["*=4", "encoder.*=4"]), **OPTIONS},
        called={**FILE_NAMES, "num_heads": ("--num-heads",), "layout": ("--layout",), "names": ("--names",)},
    ),
    "command revert": Target(
        command("revert"),
        {**FILES, **OPTIONS},
        called={**FILE_NAMES, "layout": ("--layout",), "names": ("--names",)},
    ),
    "checkpoint.pack": Target(
        lambda **arguments: sorted(checkpoint.pack(**arguments)[0].items()),
        {
            "arrays": Exactly(state_of_attention, takes=("dict", "empty dict"), variants=NO_ATTENTION),
            "num_heads": Integer(H, bad=(5, 64)),
            "names": Choice("*", takes=("numpy str", "upper case")),
            "normalize_before": Exactly(lambda: None, [Variant("True", lambda _: True)], optional=True),
            "progress": Exactly(lambda: _no_progress, takes=CALLABLE),
            "layout": Choice("in-out", optional=True),
            "file_layout": Choice("in-out", optional=True),
            "metadata": Exactly(dict, optional=True, takes=("empty dict", "dict")),
            "config": Exactly(dict, optional=True, takes=("empty dict", "dict")),
            "whole_layers": Exactly(lambda: False, takes=("True", "numpy bool")),
        },
        called={
            "arrays": ("no attention",),
            "num_heads": ("--num-heads",),
            "normalize_before": ("--normalize-before", "--normalize-after"),
            "names": ("--names",),
            "layout": ("--layout",),
        },
    ),
    "checkpoint.unpack": Target(
        lambda **arguments: sorted(checkpoint.unpack(**arguments)[0].items()),
        {
            "arrays": Exactly(
                lambda: checkpoint.pack(state_of_attention(), H)[0], takes=("dict", "empty dict"), variants=NO_ATTENTION
            ),
            "names": Choice("*", takes=("numpy str", "upper case")),
            "progress": Exactly(lambda: _no_progress, takes=CALLABLE),
            "layout": Choice("in-out", optional=True),
            "metadata": Exactly(dict, optional=True, takes=("empty dict", "dict")),
        },
        called={"arrays": ("no packed attention",), "names": ("--names",), "layout": ("--layout",)},
    ),
    "checkpoint_files.read": Target(
        lambda path: checkpoint_files.read(path).arrays, {"path": Exactly(_stored, NUL)}, called={"path": FILE_ENDS}
    ),
    "checkpoint_files.load_state": Target(
        lambda path, return_numpy: checkpoint_files.load_state(path, return_numpy),
        {"path": Exactly(_stored, NUL), "return_numpy": flag(True)},
        called={"path": FILE_ENDS},
    ),
    "checkpoint_files.write": Target(
        checkpoint_files.write,
        {
            "path": Exactly(lambda: Path(_folder.name) / "target.pdparams", NUL),
            "checkpoint": Exactly(lambda: checkpoint_files.Checkpoint({"a": np.zeros(2)})),
        },
        called={"path": FILE_ENDS},
    ),
}


def _no_progress(done, total):
    """Shows nothing."""


def _abort(x):
    if x == 2:
        os.abort()
    return float(x)


def _raise(error):
    def call(x):
        if x == 2:
            raise error
        return float(x)

    return call


# What must be found out: the verdicts on a call with 2, and on one with 1.0, which stands for 1.
_X = {"x": Given(lambda: 1, [Variant("2", lambda _: 2), Variant("1.0", lambda _: 1.0, lambda _: 1)])}
FAULTS = {
    "crash, right": Target(_abort, _X),
    "silent, right": Target(lambda x: float(x), _X),
    "silent, wrong": Target(lambda x: repr(x), _X),
    "unclear, right, by what it says": Target(_raise(ValueError("expected 1, got 2")), _X),
    "unclear, right, by its type": Target(_raise(AttributeError("x: expected 1, got 2")), _X),
    "unclear, right, by its lines": Target(_raise(ValueError("x: expected 1\ngot 2")), _X),
    "refused, right": Target(_raise(ValueError("x: expected 1, got 2")), _X),
}

TARGETS = {
    **FUNCTIONS,
    **ATTENTION,
    **OF_INCUBATE,
    **CONSTRUCTORS,
    **CALLS,
    **MODELS,
    **PACKING,
    **CHECKPOINTS,
}
