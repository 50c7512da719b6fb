"""The public layers, made and called, each with a valid call and the kinds of its arguments."""

from typing import Any, Dict

import paddle
import paddle_fused_attention as pfa
from bad_values import FLOATS, Choice, Exactly, Given, Integer, Longest, Number, Starts, Tensor, Window, rate
from call_kinds import (
    FEWER,
    MASKS,
    OF_GROUP,
    RING,
    D,
    E,
    F,
    H,
    Target,
    attribute,
    attribute_name,
    block_scale,
    caches_of,
    epsilon,
    flag,
    mask,
    zeros,
)
from paddle_fused_attention import incubate


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
    return Tensor(shape, optional=True, dtype_group="mask", accepts=FLOATS, also=MASKS, without=FEWER)


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
