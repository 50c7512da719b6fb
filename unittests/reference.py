"""The blocks in float64 NumPy, straight from their definitions: what every implementation is compared with. Attention:

h      = layer_norm(x; pre_ln_scale, pre_ln_bias, pre_ln_epsilon)  if pre_layer_norm else x
qkv    = h @ W^T + qkv_bias
scores = (q * D^-0.5) @ k^T + mask
p      = softmax(scores); a row that may see no key gives zeros
o      = dropout(p, attn_dropout_rate) @ v
y      = o @ linear_weight
z      = (x if add_residual) + dropout(y + linear_bias, dropout_rate)
out    = layer_norm(z; ln_scale, ln_bias, ln_epsilon)  if final_layer_norm else z

The feed-forward block, which may be gated, of a and b the halves of the columns:

h      = layer_norm(x; ln1_scale, ln1_bias, ln1_epsilon)  if pre_layer_norm else x
a      = h @ linear1_weight + linear1_bias
u      = dropout(activation(a), dropout1_rate), gated: dropout(activation(a) * b, dropout1_rate)
z      = (x if add_residual) + dropout(u @ linear2_weight + linear2_bias, dropout2_rate)
out    = layer_norm(z; ln2_scale, ln2_bias, ln2_epsilon)  if final_layer_norm else z

A block's tail: layer_norm(residual + dropout(x + bias)). Linear: activation(x @ weight + bias).

`Config` holds the switches of attention, `FeedForwardConfig` and its like those of the others. `forward` and `backward`
take a dict of float64 arrays under the names of the public function's arguments (an absent input is missing or None).
`composed_16bit` is the same block as a chain of 16-bit ops. `forward_of` and its like do this for any block, by its
switches. The attention stands alone too. Dropout masks are Philox4x32-7 numbers; their layout is that of
custom_ops/core/philox.h, written here a second time.
"""

import math
from dataclasses import dataclass
from typing import Optional

import numpy as np

TENSORS = (
    "x",
    "qkv_weight",
    "linear_weight",
    "pre_ln_scale",
    "pre_ln_bias",
    "ln_scale",
    "ln_bias",
    "qkv_bias",
    "linear_bias",
    "attn_mask",
)
DIFFERENTIABLE = tuple(name for name in TENSORS if name != "attn_mask")
NORM_PARAMETERS = ("pre_ln_scale", "pre_ln_bias", "ln_scale", "ln_bias")


@dataclass(frozen=True)
class Config:
    """The switches of the block, named as in the public function; `offset` counts draws of the random generator."""

    pre_layer_norm: bool = False
    pre_ln_epsilon: float = 1e-5
    dropout_rate: float = 0.0
    attn_dropout_rate: float = 0.0
    ln_epsilon: float = 1e-5
    training: bool = True
    mode: str = "upscale_in_train"
    final_layer_norm: bool = True
    add_residual: bool = True
    causal: bool = False
    seed: int = 0
    offset: int = 0


# Random numbers


def philox4x32(counter, key):
    """Philox4x32-7: four uint32 arrays of counters and two of keys (broadcast) to four uint32 arrays."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = (np.asarray(k, np.uint64) for k in key)
    for _ in range(7):
        product0 = np.uint64(0xD2511F53) * c0
        product1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ k0,
            product1 & low,
            (product0 >> shift) ^ c3 ^ k1,
            product0 & low,
        )
        k0 = (k0 + np.uint64(0x9E3779B9)) & low
        k1 = (k1 + np.uint64(0xBB67AE85)) & low
    return tuple(c.astype(np.uint32) for c in np.broadcast_arrays(c0, c1, c2, c3))


def philox_stage(seed, offset, stage):
    """The key (two words) and the last counter word of a dropout stage: 0 for attention or hidden numbers, 1 for the
    output.
    """
    seed %= 1 << 64
    n = (2 * offset + stage) % (1 << 64)
    key = (seed & 0xFFFFFFFF, ((seed >> 32) + (n >> 32)) & 0xFFFFFFFF)
    return key, n & 0xFFFFFFFF


def attention_random(seed, offset, batch, num_heads, seq_len):
    """The 16-bit numbers of the attention probabilities, [B, H, S, S]."""
    key, c3 = philox_stage(seed, offset, 0)
    i = np.arange(seq_len)
    c0 = (i // 16) * 4 + (i % 8) // 2
    c1 = (i // 16) * 8 + i % 8
    tiles = -(-seq_len // 16)
    bh = np.arange(batch * num_heads)
    words = philox4x32((np.arange(tiles * 4), np.arange(tiles * 8)[:, None], bh[:, None, None], c3), key)
    word = ((i % 16) // 8 * 2)[:, None] + (i % 16) // 8
    numbers = np.stack(words)[word, bh[:, None, None], c1[:, None], c0]
    numbers = (numbers >> (16 * (i % 2)).astype(np.uint32)) & np.uint32(0xFFFF)
    return numbers.reshape(batch, num_heads, seq_len, seq_len)


def output_random(seed, offset, rows, width, stage=1):
    """The 16-bit numbers of the output dropout, [rows, width], or of another stage with the same order of elements."""
    key, c3 = philox_stage(seed, offset, stage)
    count = rows * width
    calls = np.arange(-(-count // 8), dtype=np.uint64)
    words = np.stack(philox4x32((calls & np.uint64(0xFFFFFFFF), calls >> np.uint64(32), 0, c3), key), axis=-1)
    halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=-1)
    return halves.reshape(-1)[:count].reshape(rows, width)


def drop_factor(rate, config, draw):
    """What an element is multiplied by: 0 where it is dropped, else the scale of the mode."""
    if not config.training:
        return 1.0 - rate if config.mode == "downscale_in_infer" else 1.0
    if rate == 0.0:
        return 1.0
    keep = draw() >= int(np.floor(rate * 65536 + 0.5))
    if config.mode == "downscale_in_infer":
        return keep * 1.0
    return keep / (1.0 - rate) if rate < 1.0 else keep * 0.0


def drop_factors(config, batch, seq_len, num_heads, embed_dim):
    """Factors for the attention probabilities [B, H, S, S] and for the output [B, S, E], arrays or plain numbers."""
    attention = drop_factor(
        config.attn_dropout_rate,
        config,
        lambda: attention_random(config.seed, config.offset, batch, num_heads, seq_len),
    )
    output = drop_factor(
        config.dropout_rate,
        config,
        lambda: output_random(config.seed, config.offset, batch * seq_len, embed_dim).reshape(
            batch, seq_len, embed_dim
        ),
    )
    return attention, output


# The block


def additive_mask(inputs, config, seq_len):
    """The mask as one float64 array that broadcasts to [B, H, S, S]: -inf where a key may not be seen."""
    mask = inputs.get("attn_mask")
    if mask is None:
        added = np.zeros((seq_len, seq_len))
    elif mask.dtype.kind == "f":
        added = mask.astype(np.float64)
    else:
        added = np.where(mask != 0, 0.0, -np.inf)
    if config.causal:
        added = np.where(np.tri(seq_len, dtype=bool), added, -np.inf)
    return added


def softmax(scores):
    """Softmax over the last axis; a row of -inf gives zeros."""
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    exps = np.exp(scores - np.where(top == -np.inf, 0.0, top))
    total = exps.sum(-1, keepdims=True)
    return exps / np.where(total == 0.0, 1.0, total)


def layer_norm(x, scale, bias, epsilon):
    """Returns the result, and the normalised x and 1/deviation for the gradient."""
    centred = x - x.mean(-1, keepdims=True)
    rstd = 1.0 / np.sqrt((centred * centred).mean(-1, keepdims=True) + epsilon)
    normalised = centred * rstd
    result = normalised if scale is None else normalised * scale
    return (result if bias is None else result + bias), normalised, rstd


def layer_norm_gradient(d_result, normalised, rstd, scale):
    """Gradients of x, scale and bias."""
    d = d_result if scale is None else d_result * scale
    d_x = rstd * (d - d.mean(-1, keepdims=True) - normalised * (d * normalised).mean(-1, keepdims=True))
    rows = tuple(range(d_result.ndim - 1))
    return d_x, (d_result * normalised).sum(rows), d_result.sum(rows)


def attention(qkv, added, factor):
    """The attention of qkv [B, S, 3, H, D], with `added` to the scores and the probabilities times `factor`: the
    result, [B, S, H, D], and what the gradient takes.
    """
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    q = q * qkv.shape[-1] ** -0.5
    p = softmax(q @ k.swapaxes(-1, -2) + added)
    o = (p * factor) @ v
    return o.transpose(0, 2, 1, 3), (q, k, v, p, factor)


def attention_gradient(kept, d_result):
    """The gradient of qkv."""
    q, k, v, p, factor = kept
    d_o = d_result.transpose(0, 2, 1, 3)
    d_v = (p * factor).swapaxes(-1, -2) @ d_o
    d_p = (d_o @ v.swapaxes(-1, -2)) * factor
    d_scores = p * (d_p - (p * d_p).sum(-1, keepdims=True))
    d_q = (d_scores @ k) * q.shape[-1] ** -0.5
    d_k = d_scores.swapaxes(-1, -2) @ q
    return np.stack([d_q, d_k, d_v]).transpose(1, 3, 0, 2, 4)


def _block(inputs, config):
    """Every intermediate of the forward pass, by name."""
    x, weight = inputs["x"], inputs["qkv_weight"]
    batch, seq_len, embed_dim = x.shape
    _, num_heads, head_dim, _ = weight.shape
    v = {}
    v["h"] = x
    if config.pre_layer_norm:
        v["h"], v["h_normalised"], v["h_rstd"] = layer_norm(
            x, inputs.get("pre_ln_scale"), inputs.get("pre_ln_bias"), config.pre_ln_epsilon
        )
    qkv = v["h"] @ weight.reshape(3 * embed_dim, embed_dim).T
    if inputs.get("qkv_bias") is not None:
        qkv = qkv + inputs["qkv_bias"].reshape(-1)
    attention_factor, v["output_factor"] = drop_factors(config, batch, seq_len, num_heads, embed_dim)
    qkv = qkv.reshape(batch, seq_len, 3, num_heads, head_dim)
    o, v["attention"] = attention(qkv, additive_mask(inputs, config, seq_len), attention_factor)
    v["o"] = o.reshape(batch, seq_len, embed_dim)
    y = v["o"] @ inputs["linear_weight"]
    if inputs.get("linear_bias") is not None:
        y = y + inputs["linear_bias"]
    z = y * v["output_factor"]
    v["out"] = v["z"] = x + z if config.add_residual else z
    if config.final_layer_norm:
        v["out"], v["z_normalised"], v["z_rstd"] = layer_norm(
            v["z"], inputs.get("ln_scale"), inputs.get("ln_bias"), config.ln_epsilon
        )
    return v


def forward(inputs, config):
    """The result, [B, S, E]."""
    return _block(inputs, config)["out"]


def backward(inputs, config, d_out):
    """The gradient of every differentiable input that is present, by name."""
    v = _block(inputs, config)
    x, weight = inputs["x"], inputs["qkv_weight"]
    batch, seq_len, embed_dim = x.shape
    _, num_heads, head_dim, _ = weight.shape
    g = {name: np.zeros(inputs[name].shape) for name in DIFFERENTIABLE if inputs.get(name) is not None}

    def rows(a):
        return a.reshape(-1, a.shape[-1])

    d_z = d_out
    if config.final_layer_norm:
        d_z, g["ln_scale"], g["ln_bias"] = layer_norm_gradient(
            d_out, v["z_normalised"], v["z_rstd"], inputs.get("ln_scale")
        )
    d_y = d_z * v["output_factor"]
    g["linear_bias"] = d_y.sum((0, 1))
    g["linear_weight"] = rows(v["o"]).T @ rows(d_y)
    d_o = (d_y @ inputs["linear_weight"].T).reshape(batch, seq_len, num_heads, head_dim)
    d_qkv = attention_gradient(v["attention"], d_o).reshape(batch, seq_len, 3 * embed_dim)
    g["qkv_bias"] = d_qkv.sum((0, 1)).reshape(3, num_heads, head_dim)
    g["qkv_weight"] = (rows(d_qkv).T @ rows(v["h"])).reshape(weight.shape)
    d_x = d_qkv @ weight.reshape(3 * embed_dim, embed_dim)
    if config.pre_layer_norm:
        d_x, g["pre_ln_scale"], g["pre_ln_bias"] = layer_norm_gradient(
            d_x, v["h_normalised"], v["h_rstd"], inputs.get("pre_ln_scale")
        )
    g["x"] = d_x + d_z if config.add_residual else d_x
    return {name: g[name] for name in DIFFERENTIABLE if inputs.get(name) is not None}


# 16-bit peers


def round_to(a, dtype):
    """The nearest numbers of "float16", "bfloat16", "float32" or "float64" (ties to even), as float32 or float64."""
    if dtype == "float64":
        return np.asarray(a, np.float64)
    a = np.asarray(a, np.float32)
    if dtype == "float16":
        return a.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        return bfloat16_to_float32(float32_to_bfloat16(a))
    return a


def float32_to_bfloat16(a):
    """The upper halves, as uint16, of float32 numbers rounded to nearest even: how Paddle shows bfloat16 in NumPy."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.where(np.isnan(a), bits | np.uint32(0x400000), rounded)
    return (rounded >> np.uint32(16)).astype(np.uint16)


def bfloat16_to_float32(a):
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)


def composed_attention_16bit(qkv, added, factor, dtype):
    """`attention` as composed_16bit has it."""

    def r(a):
        return round_to(a, dtype)

    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    q = r(q * np.float32(qkv.shape[-1] ** -0.5))
    scores = r(r(q @ k.swapaxes(-1, -2)) + added)
    p = r(softmax(scores))
    p_dropped = r(p * factor)
    return r(p_dropped @ v).transpose(0, 2, 1, 3), (q, k, v, p, p_dropped, factor)


def composed_attention_16bit_gradient(kept, d_result, dtype):
    def r(a):
        return round_to(a, dtype)

    q, k, v, p, p_dropped, factor = kept
    d_o = d_result.transpose(0, 2, 1, 3)
    d_v = r(p_dropped.swapaxes(-1, -2) @ d_o)
    d_p = r(r(d_o @ v.swapaxes(-1, -2)) * factor)
    d_scores = r(p * (d_p - (p * d_p).sum(-1, keepdims=True)))
    d_q = r(r(d_scores @ k) * np.float32(q.shape[-1] ** -0.5))
    d_k = r(d_scores.swapaxes(-1, -2) @ q)
    return np.stack([d_q, d_k, d_v]).transpose(1, 3, 0, 2, 4)


def composed_16bit(inputs, config, d_out, dtype, residual_dtype=None):
    """Result and gradients of the block as a chain of ordinary ops on tensors of `dtype`: what a user has without it.

    With residual_dtype "float32" x, d_out, what is added to x and the layer norms are float32: x is cast for the
    projection alone.

    A fair stand-in for Paddle's or PyTorch's 16-bit ops, many of which the CPU build of Paddle lacks: there each op
    reads 16-bit tensors, computes in float32 inside (matmul sums, softmax and layer-norm statistics included,
    layer-norm scale and bias held in float32) and rounds once, when it writes its result; the gradient ops do the same,
    and two gradients of one tensor are added by an op of their own. So this does exactly that, in the order that
    Paddle's layers do it, and is kinder to the peer than real kernels in one respect: sums are in an order that NumPy
    chose for accuracy.
    """

    def r(a):
        return round_to(a, dtype)

    def wide(a):
        return round_to(a, residual_dtype or dtype)

    f = {n: np.asarray(a, np.float32) for n, a in inputs.items() if a is not None and n != "attn_mask"}
    x, weight = f["x"], f["qkv_weight"]
    batch, seq_len, embed_dim = x.shape
    _, num_heads, head_dim, _ = weight.shape
    flat_weight = weight.reshape(3 * embed_dim, embed_dim)
    attention_factor, output_factor = (
        np.float32(factor) for factor in drop_factors(config, batch, seq_len, num_heads, embed_dim)
    )
    mask = additive_mask(inputs, config, seq_len).astype(np.float32)

    h = x
    if config.pre_layer_norm:
        h, h_normalised, h_rstd = layer_norm(x, f.get("pre_ln_scale"), f.get("pre_ln_bias"), config.pre_ln_epsilon)
    h = r(h)
    qkv = r(h @ flat_weight.T)
    if "qkv_bias" in f:
        qkv = r(qkv + f["qkv_bias"].reshape(-1))
    qkv = qkv.reshape(batch, seq_len, 3, num_heads, head_dim)
    o, kept = composed_attention_16bit(qkv, mask, attention_factor, dtype)
    o = o.reshape(batch, seq_len, embed_dim)
    y = r(o @ f["linear_weight"])
    if "linear_bias" in f:
        y = r(y + f["linear_bias"])
    z = r(y * output_factor)
    if config.add_residual:
        z = wide(x + z)
    out = z
    if config.final_layer_norm:
        out, z_normalised, z_rstd = layer_norm(z, f.get("ln_scale"), f.get("ln_bias"), config.ln_epsilon)
        out = wide(out)

    g = {}

    def rows(a):
        return a.reshape(-1, a.shape[-1])

    d_z = np.asarray(d_out, np.float32)
    if config.final_layer_norm:
        d_z, g["ln_scale"], g["ln_bias"] = layer_norm_gradient(d_z, z_normalised, z_rstd, f.get("ln_scale"))
        d_z = wide(d_z)
    d_y = r(d_z * output_factor)
    g["linear_bias"] = r(d_y.sum((0, 1)))
    g["linear_weight"] = r(rows(o).T @ rows(d_y))
    d_o = r(d_y @ f["linear_weight"].T).reshape(batch, seq_len, num_heads, head_dim)
    d_qkv = composed_attention_16bit_gradient(kept, d_o, dtype).reshape(batch, seq_len, 3 * embed_dim)
    g["qkv_bias"] = r(d_qkv.sum((0, 1))).reshape(3, num_heads, head_dim)
    g["qkv_weight"] = r(rows(d_qkv).T @ rows(h)).reshape(weight.shape)
    d_x = r(d_qkv @ flat_weight)
    if config.pre_layer_norm:
        d_x, g["pre_ln_scale"], g["pre_ln_bias"] = layer_norm_gradient(d_x, h_normalised, h_rstd, f.get("pre_ln_scale"))
        d_x = wide(d_x)
    g["x"] = wide(d_x + d_z) if config.add_residual else d_x
    return out, {name: g[name] for name in DIFFERENTIABLE if name in f}


# The feed-forward block, a block's tail, linear


FEED_FORWARD_TENSORS = (
    "x",
    "linear1_weight",
    "linear2_weight",
    "ln1_scale",
    "ln1_bias",
    "ln2_scale",
    "ln2_bias",
    "linear1_bias",
    "linear2_bias",
)
RESIDUAL_NORM_TENSORS = ("x", "residual", "bias", "ln_scale", "ln_bias")
LINEAR_TENSORS = ("x", "weight", "bias")


@dataclass(frozen=True)
class FeedForwardConfig:
    """The switches of fused_feedforward. The weights hold the hidden numbers from first_hidden on of total_hidden; 0:
    all.
    """

    pre_layer_norm: bool = False
    ln1_epsilon: float = 1e-5
    ln2_epsilon: float = 1e-5
    dropout1_rate: float = 0.0
    dropout2_rate: float = 0.0
    activation: str = "relu"
    gated: bool = False
    training: bool = True
    mode: str = "upscale_in_train"
    final_layer_norm: bool = True
    add_residual: bool = True
    seed: int = 0
    offset: int = 0
    first_hidden: int = 0
    total_hidden: int = 0


@dataclass(frozen=True)
class ResidualNormConfig:
    """The switches of fused_bias_dropout_residual_layer_norm."""

    ln_epsilon: float = 1e-5
    dropout_rate: float = 0.0
    training: bool = True
    mode: str = "upscale_in_train"
    final_layer_norm: bool = True
    seed: int = 0
    offset: int = 0


@dataclass(frozen=True)
class LinearConfig:
    """The switches of fused_linear_activation."""

    transpose_x: bool = False
    transpose_weight: bool = False
    activation: Optional[str] = None


def rows(a):
    return a.reshape(-1, a.shape[-1])


def _normal_density(x):
    return np.exp(-0.5 * x * x) / np.sqrt(2.0 * np.pi)


def _erf(x):
    return np.vectorize(math.erf, otypes=[np.float64])(np.asarray(x, np.float64))


def activate(name, x):
    """The activation and its slope, in the dtype of x."""
    one = x.dtype.type(1)
    if name is None:
        return x, np.ones_like(x)
    if name == "relu":
        return np.maximum(x, 0), (x > 0).astype(x.dtype)
    if name == "gelu":
        below = (0.5 * (1.0 + _erf(x / np.sqrt(2.0)))).astype(x.dtype)
        return x * below, below + x * _normal_density(x)
    if name == "silu":
        below = one / (one + np.exp(-x))
        return x * below, below * (one + x * (one - below))
    assert name == "gelu_tanh"
    scale = x.dtype.type(np.sqrt(2.0 / np.pi))
    t = np.tanh(scale * (x + x.dtype.type(0.044715) * x**3))
    slope = scale * (one + x.dtype.type(3 * 0.044715) * x * x)
    return x * (one + t) / 2, (one + t) / 2 + x * (one - t * t) * slope / 2


def _exact(a):
    return a


class Rounding:
    """How a chain of ordinary ops rounds its results: not at all, or to `dtype` where an op ends, and to `wide`, the
    residual's, where the residual runs.
    """

    def __init__(self, dtype=None, wide=None):
        self.narrow = _exact if dtype is None else lambda a: round_to(a, dtype)
        self.wide = _exact if dtype is None else lambda a: round_to(a, wide or dtype)
        self.type = np.float64 if dtype is None else np.float32

    def floats(self, inputs):
        return {n: np.asarray(a, self.type) for n, a in inputs.items() if a is not None}


def dropped_rows(rate, config, count, width, stage, first=0, total=0):
    """Factors for the first `count` rows of a stage, of the columns from `first` on of `total`."""
    total = total or width
    return drop_factor(
        rate,
        config,
        lambda: output_random(config.seed, config.offset, count, total, stage)[:, first : first + width],
    )


def tail(y, x, bias, norm, epsilon, factor, rounding):
    """[layer norm of] x + factor * (y + bias), and a function from d_out to the gradients of y, x, bias and the norm's
    scale and bias. `norm` is None, or these two.
    """
    narrow, wide = rounding.narrow, rounding.wide
    z = y if bias is None else narrow(y + bias)
    z = narrow(z * factor)
    z = z if x is None else wide(x + z)
    out, normalised, rstd = z, None, None
    if norm is not None:
        out, normalised, rstd = layer_norm(z, *norm, epsilon)
        out = wide(out)

    def gradient(d_out):
        d_z, d_scale, d_shift = np.asarray(d_out, rounding.type), None, None
        if norm is not None:
            d_z, d_scale, d_shift = layer_norm_gradient(d_z, normalised, rstd, norm[0])
            d_z = wide(d_z)
        d_y = narrow(d_z * factor)
        return d_y, d_z, narrow(d_y.sum(0)), d_scale, d_shift

    return out, gradient


def _feed_forward(inputs, config, rounding, d_out=None):
    """The result, and the gradients if there is d_out."""
    narrow = rounding.narrow
    shape = inputs["x"].shape
    f = rounding.floats(inputs)
    x = f["x"] = rows(f["x"])
    count, hidden = len(x), f["linear2_weight"].shape[0]
    factor1 = np.asarray(
        dropped_rows(config.dropout1_rate, config, count, hidden, 0, config.first_hidden, config.total_hidden),
        rounding.type,
    )
    factor2 = np.asarray(dropped_rows(config.dropout2_rate, config, count, shape[-1], 1), rounding.type)
    h = x
    if config.pre_layer_norm:
        h, h_normalised, h_rstd = layer_norm(x, f.get("ln1_scale"), f.get("ln1_bias"), config.ln1_epsilon)
    h = narrow(h)
    a = narrow(h @ f["linear1_weight"])
    if "linear1_bias" in f:
        a = narrow(a + f["linear1_bias"])
    b = None
    if config.gated:
        a, b = a[:, :hidden], a[:, hidden:]
    activated, slope = activate(config.activation, a)
    activated = narrow(activated)
    u = activated if b is None else narrow(activated * b)
    dropped = narrow(u * factor1)
    y = narrow(dropped @ f["linear2_weight"])
    norm = (f.get("ln2_scale"), f.get("ln2_bias")) if config.final_layer_norm else None
    out, tail_gradient = tail(
        y, x if config.add_residual else None, f.get("linear2_bias"), norm, config.ln2_epsilon, factor2, rounding
    )
    if d_out is None:
        return out.reshape(shape), None

    g = {}
    d_y, d_z, g["linear2_bias"], g["ln2_scale"], g["ln2_bias"] = tail_gradient(rows(d_out))
    g["linear2_weight"] = narrow(dropped.T @ d_y)
    d_u = narrow(narrow(d_y @ f["linear2_weight"].T) * factor1)
    if b is not None:
        d_b = narrow(d_u * activated)
        d_u = narrow(d_u * b)
    d_a = narrow(d_u * slope)
    if b is not None:
        d_a = np.concatenate([d_a, d_b], axis=1)
    g["linear1_bias"] = narrow(d_a.sum(0))
    g["linear1_weight"] = narrow(h.T @ d_a)
    d_x = narrow(d_a @ f["linear1_weight"].T)
    if config.pre_layer_norm:
        d_x, g["ln1_scale"], g["ln1_bias"] = layer_norm_gradient(d_x, h_normalised, h_rstd, f.get("ln1_scale"))
        d_x = rounding.wide(d_x)
    g["x"] = (rounding.wide(d_x + d_z) if config.add_residual else d_x).reshape(shape)
    return out.reshape(shape), {name: g[name] for name in FEED_FORWARD_TENSORS if name in f}


def _residual_norm(inputs, config, rounding, d_out=None):
    shape = inputs["x"].shape
    f = rounding.floats(inputs)
    x = rows(f["x"])
    factor = np.asarray(dropped_rows(config.dropout_rate, config, len(x), shape[-1], 1), rounding.type)
    norm = (f.get("ln_scale"), f.get("ln_bias")) if config.final_layer_norm else None
    residual = rows(f["residual"]) if "residual" in f else None
    out, tail_gradient = tail(x, residual, f.get("bias"), norm, config.ln_epsilon, factor, rounding)
    if d_out is None:
        return out.reshape(shape), None
    g = dict(zip(RESIDUAL_NORM_TENSORS, tail_gradient(rows(d_out))))
    g["x"], g["residual"] = g["x"].reshape(shape), g["residual"].reshape(shape)
    return out.reshape(shape), {name: g[name] for name in RESIDUAL_NORM_TENSORS if name in f}


def _linear(inputs, config, rounding, d_out=None):
    narrow = rounding.narrow
    f = rounding.floats(inputs)
    x = f["x"].T if config.transpose_x else rows(f["x"])
    weight = f["weight"].T if config.transpose_weight else f["weight"]
    a = narrow(x @ weight)
    if "bias" in f:
        a = narrow(a + f["bias"])
    activated, slope = activate(config.activation, a)
    leading = x.shape[:1] if config.transpose_x else inputs["x"].shape[:-1]
    out = narrow(activated).reshape(*leading, weight.shape[1])
    if d_out is None:
        return out, None
    d_a = narrow(rows(np.asarray(d_out, rounding.type)) * slope)
    d_x, d_weight = narrow(d_a @ weight.T), narrow(x.T @ d_a)
    g = {
        "x": d_x.T if config.transpose_x else d_x.reshape(inputs["x"].shape),
        "weight": d_weight.T if config.transpose_weight else d_weight,
        "bias": narrow(d_a.sum(0)),
    }
    return out, {name: g[name] for name in LINEAR_TENSORS if name in f}


def pre_activation(inputs, config):
    """What the activation of a feed-forward or a linear block takes, [rows, columns]."""
    x = rows(inputs["x"])
    if isinstance(config, LinearConfig):
        weight = inputs["weight"].T if config.transpose_weight else inputs["weight"]
        return x @ weight + inputs.get("bias", 0.0)
    h = x
    if config.pre_layer_norm:
        h, _, _ = layer_norm(x, inputs.get("ln1_scale"), inputs.get("ln1_bias"), config.ln1_epsilon)
    return (h @ inputs["linear1_weight"] + inputs.get("linear1_bias", 0.0))[:, : inputs["linear2_weight"].shape[0]]


_BLOCKS = {FeedForwardConfig: _feed_forward, ResidualNormConfig: _residual_norm, LinearConfig: _linear}


def forward_of(inputs, config):
    """The result of the block whose switches `config` holds, of any of the four."""
    if isinstance(config, Config):
        return forward(inputs, config)
    return _BLOCKS[type(config)](inputs, config, Rounding())[0]


def backward_of(inputs, config, d_out):
    """The gradient of every differentiable input that is present, by name."""
    if isinstance(config, Config):
        return backward(inputs, config, d_out)
    return _BLOCKS[type(config)](inputs, config, Rounding(), d_out)[1]


def composed_16bit_of(inputs, config, d_out, dtype, residual_dtype=None):
    """Result and gradients as `composed_16bit` has them."""
    if isinstance(config, Config):
        return composed_16bit(inputs, config, d_out, dtype, residual_dtype)
    return _BLOCKS[type(config)](inputs, config, Rounding(dtype, residual_dtype), d_out)
