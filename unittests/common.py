"""Inputs of a case, and how results are compared with the reference; shared by all suites, NumPy only.

`make_inputs` draws the inputs of a case as float64 numbers that its dtypes hold exactly, so that the reference and the
implementation compute on the same numbers. `to_storage` turns them into arrays as Paddle shows them in NumPy, bfloat16
as uint16.
"""

import zlib
from dataclasses import dataclass
from typing import Dict, Optional

import numpy as np
import reference
from cases import SIXTEEN_BIT, Case, Mask

TOLERANCE = {"float64": 1e-9, "float32": 2e-5}
PEER_FACTOR = {"out": 2.0, "gradient": 3.0}
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def make_mask(case, rng):
    mask, seq_len = case.mask, case.seq_len
    sizes = {"B": case.batch, "H": case.num_heads, "S": seq_len, "1": 1}
    shape = tuple(sizes[letter] for letter in mask.shape)
    keep = rng.random(shape) < 0.6
    if mask.content == "rows":
        keep[..., ::3, :] = False
    if mask.content == "none":
        keep[...] = False
    if mask.content in ("start", "end", "sides"):
        third = np.arange(seq_len) * 3 // seq_len
        keep[...] = {"start": third == 0, "end": third == 2, "sides": third != 1}[mask.content]
    dtype = case.dtype_of("attn_mask")
    if dtype == "bool":
        return keep
    if "float" in dtype:
        values = reference.round_to(rng.standard_normal(shape), dtype).astype(np.float64)
        return values if mask.content == "random" else np.where(keep, values, -np.inf)
    # Nonzero is what counts: also negative numbers, and those whose low bytes are zero.
    dtype = np.dtype(dtype)
    values = np.array([1, 2, -1, 1 << (8 * dtype.itemsize - 2)]).astype(dtype)
    return np.where(keep, values[rng.integers(0, 4, shape)], np.zeros((), dtype))


def _draw(case, name, rng):
    shape, scale, centre = case.drawn()[name]
    return reference.round_to(centre + scale * rng.standard_normal(shape), case.dtype_of(name)).astype(np.float64)


def _keep_off_the_kink(case, inputs, rng):
    """Draws rows of x anew until relu is smooth where they are: at 0 a rounding turns a gradient on or off, and which
    is chance, for ordinary ops too."""
    x = reference.rows(inputs["x"])
    for _ in range(2000):
        close = (np.abs(reference.pre_activation(inputs, case.config)) < 0.03).any(axis=1)
        if not close.any():
            return
        x[close] = reference.rows(_draw(case, "x", rng))[close]
    raise ValueError(f"{case}: of so many hidden numbers one is always near 0; ask for fewer")


def make_inputs(case):
    """Inputs and the gradient of the result ("d_out"), as float64 (the mask: float64, bool or int) arrays by name."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    if not isinstance(case, Case):
        inputs = {name: _draw(case, name, rng) for name in case.drawn() if name not in case.absent}
        if getattr(case.config, "activation", None) == "relu" and case.dtype in SIXTEEN_BIT:
            _keep_off_the_kink(case, inputs, rng)
        return inputs
    b, s, h, d, e = case.batch, case.seq_len, case.num_heads, case.head_dim, case.embed_dim

    def draw(name, shape, scale=1.0, centre=0.0):
        values = centre + scale * rng.standard_normal(shape)
        return reference.round_to(values, case.dtype_of(name)).astype(np.float64)

    inputs = {
        "x": draw("x", (b, s, e)),
        "qkv_weight": draw("qkv_weight", (3, h, d, e), e**-0.5),
        "linear_weight": draw("linear_weight", (e, e), e**-0.5),
        "pre_ln_scale": draw("pre_ln_scale", (e,), 0.2, 1.0),
        "pre_ln_bias": draw("pre_ln_bias", (e,), 0.2),
        "ln_scale": draw("ln_scale", (e,), 0.2, 1.0),
        "ln_bias": draw("ln_bias", (e,), 0.2),
        "qkv_bias": draw("qkv_bias", (3, h, d), 0.3),
        "linear_bias": draw("linear_bias", (e,), 0.3),
        "d_out": draw("d_out", (b, s, e)),
    }
    if case.mask and "attn_mask" not in case.absent:
        inputs["attn_mask"] = make_mask(case, rng)
    unused = [] if case.config.pre_layer_norm else ["pre_ln_scale", "pre_ln_bias"]
    unused += [] if case.config.final_layer_norm else ["ln_scale", "ln_bias"]
    return {name: a for name, a in inputs.items() if name not in case.absent and name not in unused}


def to_storage(a, dtype):
    """The array as Paddle takes it: of the NumPy type `dtype`, bfloat16 as uint16."""
    if dtype == "bfloat16":
        return reference.float32_to_bfloat16(a)
    return np.asarray(a).astype(dtype)


def from_storage(a):
    """A floating-point array as Paddle gives it, in float64."""
    if a.dtype == np.uint16:
        a = reference.bfloat16_to_float32(a)
    return a.astype(np.float64)


def stored_inputs(case, inputs):
    return {name: to_storage(a, case.dtype_of(name)) for name, a in inputs.items()}


def differentiable(inputs):
    return [name for name in inputs if name not in ("attn_mask", "d_out")]


@dataclass
class Expected:
    out: np.ndarray
    gradients: Dict[str, np.ndarray]
    peer_out: Optional[np.ndarray] = None
    peer_gradients: Optional[Dict[str, np.ndarray]] = None


def expect(case, inputs):
    """What the reference gives, and for 16-bit dtypes what the composed ops give."""
    arrays = {name: a for name, a in inputs.items() if name != "d_out"}
    out = reference.forward_of(arrays, case.config)
    gradients = reference.backward_of(arrays, case.config, inputs["d_out"])
    if case.dtype not in SIXTEEN_BIT:
        return Expected(out, gradients)
    peer = reference.composed_16bit_of(arrays, case.config, inputs["d_out"], case.dtype, case.residual_dtype)
    return Expected(out, gradients, *peer)


def check_tensor(name, actual, expected, dtype, peer=None, stored=None):
    """Compares within the tolerance of `dtype` (docs/design.md, section 4).

    16-bit: the largest error and the root mean square of the errors are each at most 2 (result) or 3 (gradients) times
    the peer's. Where the peer happens to be exact, half a unit in the last place of the tensor's largest number
    remains; or, where the tensor is `stored` in float32, what float32 is allowed.
    """
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    if expected.size == 0:
        return
    assert np.isfinite(actual).all(), f"{name}: not finite"
    scale = np.abs(expected).max()
    error = np.abs(actual - expected)
    if dtype not in SIXTEEN_BIT:
        limit = TOLERANCE[dtype] * scale
        assert error.max() <= limit, f"{name}: error {error.max():.3g} at scale {scale:.3g}, allowed {limit:.3g}"
        return
    factor = PEER_FACTOR["out" if name == "out" else "gradient"]
    peer_error = np.abs(peer - expected)
    floor = UNIT_ROUNDOFF.get(stored or dtype, TOLERANCE["float32"]) * scale
    for kind, own, other in (
        ("largest", error.max(), peer_error.max()),
        ("rms", np.sqrt((error**2).mean()), np.sqrt((peer_error**2).mean())),
    ):
        assert own <= max(factor * other, floor), (
            f"{name}: {kind} error {own:.3g}, composed ops {other:.3g}, scale {scale:.3g}"
        )


def check(case, expected, out, gradients):
    """Compares a result and those gradients that were asked for; every gradient is checked before it complains."""
    complaints = []
    pairs = [("out", out, expected.out, expected.peer_out)]
    for name, actual in gradients.items():
        peer = expected.peer_gradients[name] if expected.peer_gradients else None
        pairs.append((name, actual, expected.gradients[name], peer))
    for name, actual, reference_value, peer in pairs:
        try:
            check_tensor(
                name,
                actual,
                reference_value,
                case.dtype,
                peer,
                case.residual_dtype if name in ("out", "x", "residual") else None,
            )
        except AssertionError as error:
            complaints.append(str(error))
    assert not complaints, "{}\n{}".format(case, "\n".join(complaints))


FAR_DOWN = ("-1e4", "-1e9", "lowest")
LOWEST = {"float32": float(np.finfo(np.float32).min), "float16": -65504.0, "bfloat16": -3.3895314e38}


def rows_far_down(dtype, low):
    """A case and inputs where a float mask of `low`, one of FAR_DOWN, lies on every key of some queries.

    It hides none of them: beside it the scores themselves lose their last digits, or all, but the probabilities must
    still add up to one, in the gradient too. So ordinary ops are the measure (check_by_ordinary_ops).
    """
    case = Case(2, 30, 2, 8, dtype, mask=Mask("B1SS", dtype)).but(attn_dropout_rate=0.1)
    inputs = make_inputs(case)
    value = LOWEST[dtype] if low == "lowest" else max(float(low), LOWEST[dtype])
    inputs["attn_mask"][:, :, ::3, :] = reference.round_to(value, dtype)
    return case, inputs


def rows_with_much_in_common(dtype, **changes):
    """A case and inputs where all rows of x have much in common, and all keys as much again by their bias.

    None of that changes the probabilities. What rounding leaves of sums that ought to cancel is multiplied by it.
    """
    case = Case(2, 256, 2, 64, dtype).but(final_layer_norm=False, **changes)
    inputs = make_inputs(case)
    rng = np.random.default_rng(5)
    for name in ("x", "qkv_bias"):
        common = 3.0 * rng.standard_normal(inputs[name].shape[-1])
        part = inputs[name] if name == "x" else inputs[name][1]
        part[...] = reference.round_to(part + common, dtype)
    return case, inputs


def check_as_exact(expected, gradients):
    """The errors of the gradients of x and of the QKV weight are, by their norms, at most 1.5 times those of ordinary
    ops, and the gradient of the key bias is zero.
    """
    for name in ("x", "qkv_weight"):
        ours, peer = (
            np.linalg.norm(of[name] - expected.gradients[name]) for of in (gradients, expected.peer_gradients)
        )
        assert ours <= 1.5 * peer, f"{name}: error {ours:.3g}, of composed ops {peer:.3g}"
    assert (gradients["qkv_bias"][1] == 0).all()


def equal_keys(dtype, size):
    """A case and inputs where 64 tokens have one key and scores of up to about `size`, without a mask; dtype float32 or
    float64.

    Of such scores the last digits are worth more than one, but the probabilities must add up to one, in the gradient
    too. Ordinary ops are no measure: they may round equal scores differently. The keys come of a feature that all
    tokens share.
    """
    case = Case(2, 64, 2, 8, dtype).but(final_layer_norm=False)
    inputs = make_inputs(case)
    inputs["x"][..., 0] = 1.0
    query, key = inputs["qkv_weight"][:2]
    query *= size**0.5
    key[..., 0] *= size**0.5
    key[..., 1:] = 0.0
    inputs["qkv_bias"][1] = 0.0
    for name in ("x", "qkv_weight", "qkv_bias"):
        inputs[name] = reference.round_to(inputs[name], case.dtype_of(name)).astype(np.float64)
    return case, inputs


def check_equal_keys(case, inputs, out, gradients):
    """Compares float64 arrays with the reference: the result, and the gradients of the values, whose weights are the
    probabilities.
    """
    arrays = {name: a for name, a in inputs.items() if name != "d_out"}
    expected = reference.backward(arrays, case.config, inputs["d_out"])
    check_tensor("out", out, reference.forward(arrays, case.config), case.dtype)
    for name in ("qkv_weight", "qkv_bias"):
        check_tensor(name, gradients[name][2], expected[name][2], case.dtype)


def check_by_ordinary_ops(case, inputs, out, gradients):
    """Compares float64 arrays with the reference by the error of ordinary ops in the case's dtype, also in float32."""
    arrays = {name: a for name, a in inputs.items() if name != "d_out"}
    expected = dict(
        reference.backward(arrays, case.config, inputs["d_out"]), out=reference.forward(arrays, case.config)
    )
    peer_out, peers = reference.composed_16bit(arrays, case.config, inputs["d_out"], case.dtype, case.residual_dtype)
    for name, actual in dict(gradients, out=out).items():
        peer_error = np.abs(dict(peers, out=peer_out)[name] - expected[name]).max()
        limit = max(3 * peer_error, 2e-5 * np.abs(expected[name]).max())
        assert np.abs(actual - expected[name]).max() <= limit, name
