"""Encoders of Paddle's layers, inputs and masks for them, and how converted ones are compared with them."""

import common
import numpy as np
import paddle
from paddle import nn

BATCH, SEQ, HEADS, EMBED = 2, 6, 4, 16


def shake(model, seed=3):
    """Gives every parameter a random part, so that no scale is 1 and no bias is 0."""
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        p.set_value(p.numpy() + 0.2 * rng.standard_normal(p.shape).astype(p.numpy().dtype))
    return model


def replace(path, value):
    """What gives a layer another part, or value, at a path such as ``self_attn.q_proj``."""

    def change(layer):
        *parents, name = path.split(".")
        for parent in parents:
            layer = getattr(layer, parent)
        setattr(layer, name, value)

    return change


def encoder_layer(normalize_before=False, dropout=0.0, **arguments):
    return nn.TransformerEncoderLayer(EMBED, HEADS, 24, dropout, "gelu", normalize_before=normalize_before, **arguments)


def encoder(normalize_before=False, dropout=0.0, **arguments):
    layer = encoder_layer(normalize_before, dropout, **arguments)
    return shake(nn.TransformerEncoder(layer, 2, nn.LayerNorm(EMBED) if normalize_before else None))


def make_x(dtype="float32", seq_len=SEQ, seed=1):
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal((BATCH, seq_len, EMBED)).astype(dtype))


def make_mask(kind, dtype, shape=(BATCH, 1, SEQ, SEQ), sees_none=True):
    """With `sees_none` query 1 may see no key, which to Paddle's bool and int masks means all alike."""
    rng = np.random.default_rng(5)
    keep = rng.random(shape) < 0.6
    keep[..., 0] = True
    if kind == "float":
        return paddle.to_tensor(np.where(keep, rng.standard_normal(shape), -1e4).astype(dtype))
    if sees_none:
        keep[:, :, 1] = False
    return None if kind == "none" else paddle.to_tensor(keep.astype(kind))


def state_of(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def check(name, actual, expected, dtype):
    expected = np.asarray(expected, np.float64)
    common.check_tensor(name, np.asarray(actual, np.float64), expected, dtype)


def gradients(model, x, mask):
    x = x.clone()
    x.stop_gradient = False
    out = model(x, mask)
    d_out = paddle.to_tensor(np.random.default_rng(9).standard_normal(out.shape).astype(out.numpy().dtype))
    out.backward(d_out)
    return x.grad.numpy(), {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
