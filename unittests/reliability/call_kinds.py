"""What the tables of calls share: a callable with its arguments, and the kinds of these."""

from typing import Any, Callable, Dict, NamedTuple

import numpy as np
import paddle
from bad_values import (
    ANY,
    DTYPES,
    REFUSED,
    SIZES,
    Choice,
    Exactly,
    Integer,
    Longest,
    Name,
    Number,
    Switch,
    Tensor,
    Variant,
    Window,
    rate,
    seed,
    to_value,
)

FEWER = ("no dimension", "one dimension less")  # shapes that broadcast
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
    return Tensor(shape, optional=True, dtype_group="mask", accepts=MASKS, without=FEWER, **options)


def flag(value=False):
    return Switch(value)


def mode():
    return Choice("upscale_in_train")


def epsilon():
    return Number(1e-5)


RING = Integer(-1, -1, 2**31 - 1, bad=(7,))
OF_GROUP = Exactly(lambda: None, optional=True)
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
    "ring_id": RING,
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
_PRODUCT = {"x": Tensor("b s E", leading=True), "y": weight("E F"), "bias": optional("F")}
LINEAR_ACTIVATION = {
    **_PRODUCT,
    "trans_x": flag(),
    "trans_y": flag(),
    "activation": Choice("silu", optional=True),
}
MATMUL_BIAS = {**_PRODUCT, "transpose_x": flag(), "transpose_y": flag(), "name": Name()}


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
