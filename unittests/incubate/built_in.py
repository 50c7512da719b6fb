"""Paddle's own layer and function of paddle.incubate.nn, and what they document, composed of ordinary ops."""

import common
import numpy as np
import paddle
import paddle.nn.functional as F

BATCH, SEQ, HEADS, HEAD_DIM, EMBED = 2, 5, 3, 4, 12
BUILT_IN = paddle.incubate.nn.FusedMultiHeadAttention
BUILT_IN_FUNCTION = paddle.incubate.nn.functional.fused_multi_head_attention
NORM = ("pre_ln_scale", "pre_ln_bias", "ln_scale", "ln_bias")


def draw_arrays(dtype="float64", seed=0, absent=()):
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (BATCH, SEQ, EMBED),
        "qkv_weight": (3, HEADS, HEAD_DIM, EMBED),
        "qkv_bias": (3, HEADS, HEAD_DIM),
        "linear_weight": (EMBED, EMBED),
        "linear_bias": (EMBED,),
        **{name: (EMBED,) for name in NORM},
    }
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items() if name not in absent}


def to_tensors(arrays):
    return {name: paddle.to_tensor(a, stop_gradient=False) for name, a in arrays.items()}


def composed(
    x, qkv_weight, linear_weight, pre_layer_norm=False, qkv_bias=None, linear_bias=None, attn_mask=None, cache_kv=None,
    pre_ln_scale=None, pre_ln_bias=None, ln_scale=None, ln_bias=None, add_residual=True, ln_epsilon=1e-5,
    pre_ln_epsilon=1e-5,
):  # fmt: skip
    """The pseudo code of Paddle's documentation, without dropout; the new keys and values come along."""
    out = F.layer_norm(x, [EMBED], pre_ln_scale, pre_ln_bias, pre_ln_epsilon) if pre_layer_norm else x
    out = paddle.einsum("bse,thde->tbhsd", out, qkv_weight)
    if qkv_bias is not None:
        out = out + qkv_bias.unsqueeze([1, 3])
    q, k, v = paddle.unbind(out)
    if cache_kv is not None:
        k, v = paddle.concat([cache_kv[0], k], 2), paddle.concat([cache_kv[1], v], 2)
    scores = paddle.einsum("bhsd,bhtd->bhst", q * HEAD_DIM**-0.5, k)
    if attn_mask is not None:
        scores = scores + attn_mask
    out = paddle.einsum("bhst,bhtd->bshd", F.softmax(scores), v).reshape([0, 0, EMBED])
    out = F.linear(out, linear_weight, linear_bias)
    if add_residual:
        out = x + out
    if not pre_layer_norm:
        out = F.layer_norm(out, [EMBED], ln_scale, ln_bias, ln_epsilon)
    return out, paddle.stack([k, v])


def check(name, actual, expected, dtype="float64"):
    common.check_tensor(name, np.asarray(actual, np.float64), np.asarray(expected, np.float64), dtype)
