"""The attention block in all its generality: a case, its inputs, and the block in float64 or as a chain of 16-bit ops,
of a layer norm, products, attention by itself (attention_reference.py) and a tail (reference.py)."""

import zlib
from dataclasses import dataclass
from typing import Optional, Tuple

import attention_reference
import cases
import common
import numpy as np
import reference


@dataclass(frozen=True)
class AttentionBlockCase(cases.Case):
    """`lengths`, pairs of equal numbers, are those of packed sequences. `width` is embed_dim."""

    kv_heads: int = 2
    width: int = 16
    lengths: Tuple[Tuple[int, int], ...] = ()
    scale: Optional[float] = None
    window_left: int = -1
    window_right: int = -1

    @property
    def embed_dim(self):
        return self.width

    def dtype_of(self, name):
        return "int32" if name == "cu_seqlens" else super().dtype_of(name)

    def __str__(self):
        general = ("kv_heads", "width", "lengths", "scale", "window_left", "window_right")
        return "-".join([super().__str__(), *(f"{name}={getattr(self, name)}" for name in general)])

    def switches(self):
        """What the core's config has beside that of the first block."""
        found = dict(num_kv_heads=self.kv_heads, window_left=self.window_left, window_right=self.window_right)
        if self.scale is not None:
            found["scale"] = self.scale
        if self.lengths:
            found["packed_rows"] = sum(n for n, _ in self.lengths)
        return found


def _shapes(case):
    """Of the inputs that the case has but the mask, and of d_out: shape, scale and centre."""
    heads_dim, width = case.num_heads * case.head_dim, case.width
    parts = (3, case.num_heads) if case.kv_heads == case.num_heads else (case.num_heads + 2 * case.kv_heads,)
    leading = (sum(n for n, _ in case.lengths),) if case.lengths else (case.batch, case.seq_len)
    shapes = {
        "x": ((*leading, width), 1.0, 0.0),
        "qkv_weight": ((*parts, case.head_dim, width), width**-0.5, 0.0),
        "linear_weight": ((heads_dim, width), heads_dim**-0.5, 0.0),
        "qkv_bias": ((*parts, case.head_dim), 0.3, 0.0),
        "linear_bias": ((width,), 0.3, 0.0),
        "d_out": ((*leading, width), 1.0, 0.0),
    }
    for norm, is_there in (("pre_ln", case.config.pre_layer_norm), ("ln", case.config.final_layer_norm)):
        if is_there:
            shapes.update({norm + "_scale": ((width,), 0.2, 1.0), norm + "_bias": ((width,), 0.2, 0.0)})
    return {name: shape for name, shape in shapes.items() if name not in case.absent}


def differentiable(case):
    names = [name for name in _shapes(case) if name != "d_out"]
    has_float_mask = case.mask and "float" in case.dtype_of("attn_mask")
    return [*names, "attn_mask"] if has_float_mask else names


def make_inputs(case):
    """As common.make_inputs."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    inputs = {}
    for name, (shape, scale, centre) in _shapes(case).items():
        values = centre + scale * rng.standard_normal(shape)
        inputs[name] = reference.round_to(values, case.dtype_of(name)).astype(np.float64)
    if case.mask:
        inputs["attn_mask"] = common.make_mask(case, rng)
    if case.lengths:
        inputs["cu_seqlens"] = np.cumsum([0, *(n for n, _ in case.lengths)]).astype("int32")
    return inputs


def _run(case, inputs, rounding, rounds):
    """The result, and the gradients by name."""
    config, narrow, rows = case.config, rounding.narrow, reference.rows
    described = {name: inputs[name] for name in ("attn_mask", "cu_seqlens") if name in inputs}
    f = rounding.floats({name: a for name, a in inputs.items() if name not in described})
    leading, (heads, kv_heads, head_dim) = f["x"].shape[:-1], (case.num_heads, case.kv_heads, case.head_dim)
    x, weight = rows(f["x"]), rows(f["qkv_weight"])
    h = x
    if config.pre_layer_norm:
        h, normalised, rstd = reference.layer_norm(
            x, f.get("pre_ln_scale"), f.get("pre_ln_bias"), config.pre_ln_epsilon
        )
    h = narrow(h)
    qkv = narrow(h @ weight.T)
    if "qkv_bias" in f:
        qkv = narrow(qkv + f["qkv_bias"].reshape(-1))

    parts = np.split(qkv.reshape(*leading, heads + 2 * kv_heads, head_dim), [heads, heads + kv_heads], axis=-2)
    arrays = dict(zip(("query", "key", "value"), parts))
    if case.lengths:
        arrays["cu_seqlens_q"] = arrays["cu_seqlens_k"] = described["cu_seqlens"]
    if case.mask:
        arrays["attn_mask"] = described["attn_mask"]
    switches = {name: getattr(config, name) for name in ("training", "mode", "causal", "seed", "offset")}
    attention = attention_reference.Config(
        case.scale, config.attn_dropout_rate, window_left=case.window_left, window_right=case.window_right, **switches
    )
    o, _ = attention_reference.run(arrays, attention, None, rounds)
    o = np.asarray(o, rounding.type).reshape(len(x), heads * head_dim)

    y = narrow(o @ f["linear_weight"])
    norm = (f.get("ln_scale"), f.get("ln_bias")) if config.final_layer_norm else None
    factor = reference.dropped_rows(config.dropout_rate, config, len(x), case.width, 1)
    out, tail_gradient = reference.tail(
        y,
        x if config.add_residual else None,
        f.get("linear_bias"),
        norm,
        config.ln_epsilon,
        np.asarray(factor, rounding.type),
        rounding,
    )

    g = {}
    d_y, d_z, g["linear_bias"], g["ln_scale"], g["ln_bias"] = tail_gradient(rows(f["d_out"]))
    g["linear_weight"] = narrow(o.T @ d_y)
    d_o = narrow(d_y @ f["linear_weight"].T).reshape(*leading, heads, head_dim)
    _, of_attention = attention_reference.run(arrays, attention, d_o, rounds)
    d_qkv = np.concatenate([of_attention[name] for name in ("query", "key", "value")], axis=-2)
    d_qkv = np.asarray(d_qkv, rounding.type).reshape(len(x), len(weight))
    g["attn_mask"] = of_attention.get("attn_mask")
    g["qkv_bias"] = narrow(d_qkv.sum(0)).reshape(f["qkv_weight"].shape[:-1])
    g["qkv_weight"] = narrow(d_qkv.T @ h).reshape(f["qkv_weight"].shape)
    d_x = narrow(d_qkv @ weight)
    if config.pre_layer_norm:
        d_x, g["pre_ln_scale"], g["pre_ln_bias"] = reference.layer_norm_gradient(
            d_x, normalised, rstd, f.get("pre_ln_scale")
        )
        d_x = rounding.wide(d_x)
    g["x"] = (rounding.wide(d_x + d_z) if config.add_residual else d_x).reshape(f["x"].shape)
    return out.reshape(f["x"].shape), {name: g[name] for name in differentiable(case)}


def expect(case, inputs):
    """As common.expect."""
    found = common.Expected(*_run(case, inputs, reference.Rounding(), attention_reference.exact))
    if case.dtype in cases.SIXTEEN_BIT:
        rounding = reference.Rounding(case.dtype, case.residual_dtype)
        found.peer_out, found.peer_gradients = _run(case, inputs, rounding, rounding.narrow)
    return found
