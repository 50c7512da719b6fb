"""What is done to models, their states, weights and tensors, each with a valid call and the kinds of its arguments."""

import functools
import types

import numpy as np
import paddle
import paddle_fused_attention as pfa
from bad_values import ANY, Choice, Exactly, Given, Integer, Tensor, Variant, rate
from call_kinds import MASKS, OF_GROUP, E, F, H, Target, flag, now, zeros
from calls_of_layers import encoder_layer


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
