"""The attention stages alone against float64 in NumPy: no product of cuBLAS's runs, whose kernels racecheck cannot
always follow.
"""

import common
import numpy as np
import pytest
import reference
from cases import DTYPES, SIXTEEN_BIT, Case, Mask
from device import run_attention, to_device, to_numpy
from reference import Config

DROPOUT = Config(attn_dropout_rate=0.2, seed=11, offset=3)
CASES = (
    Case(2, 37, 2, 24),
    Case(2, 257, 2, 64, config=DROPOUT),
    Case(2, 257, 2, 128, config=Config(causal=True, attn_dropout_rate=0.1, seed=5)),
    Case(2, 200, 90, 64, config=Config(causal=True)),  # more tiles than multiprocessors
    Case(1, 130, 140, 128),
    Case(2, 300, 2, 64, mask=Mask("B11S"), config=DROPOUT),
    Case(2, 300, 2, 128, mask=Mask("B11S", content="sides")),
    Case(2, 256, 2, 64, mask=Mask("1HSS", "float32"), config=Config(causal=True)),
    Case(2, 256, 2, 128, mask=Mask("BHSS"), config=DROPOUT),
    Case(2, 201, 2, 64, mask=Mask("BHSS", "int64")),
    Case(2, 70, 2, 200, mask=Mask("B1SS", "float32", "-inf")),
)


def composed(qkv, d_out, added, factor, dtype):
    out, kept = reference.composed_attention_16bit(qkv, added.astype(np.float32), np.float32(factor), dtype)
    d_qkv = reference.composed_attention_16bit_gradient(kept, d_out, dtype)
    return out, d_qkv, reference.round_to(d_qkv.astype(np.float32).sum((0, 1)), dtype)


LIMIT = {"float64": 1e-11, "float32": 2e-5, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 1.6e-2}


def check_two_keys(dtype, size, seq_len, head_dim, small_rows=False, causal=False, **switches):
    """Attention where every key is one or its opposite, and scores are some times `size`, or without it in every third
    of `small_rows`.

    The last digits of such scores are worth more than one, but the sums of queries and keys are the same whenever they
    are formed: so a row's probabilities are equal among the keys that win, and add up to one.
    """
    rng = np.random.default_rng(head_dim)
    qkv = 0.2 * rng.standard_normal((1, seq_len, 3, 2, head_dim))
    key = rng.standard_normal((2, head_dim))
    sign = rng.choice([1.0, -1.0], (2, 1, seq_len, 1, 1))
    qkv[:, :, 0] = (qkv[:, :, 0] + key) * sign[0] * rng.uniform(0.5, 1.0, sign[0].shape) * size**0.5
    qkv[:, :, 1] = key * sign[1] * size**0.5
    if small_rows:
        qkv[:, ::3, 0] /= size
    qkv = reference.round_to(qkv, dtype).astype(np.float64)
    d_out = reference.round_to(0.1 * rng.standard_normal((1, seq_len, 2, head_dim)), dtype).astype(np.float64)
    actual = run_attention(to_device(qkv, dtype), to_device(d_out, dtype), causal=causal, **switches)

    out, kept = reference.attention(qkv, reference.additive_mask({}, Config(causal=causal), seq_len), 1.0)
    d_qkv = reference.attention_gradient(kept, d_out)
    q, k, v, p, _ = kept
    d_o = d_out.transpose(0, 2, 1, 3)
    d_p = d_o @ v.swapaxes(-1, -2)
    d_scores = abs(p * (d_p - (p * d_p).sum(-1, keepdims=True)))
    # What the sums would be if nothing in them cancelled.
    sizes = d_scores @ abs(k) * head_dim**-0.5, d_scores.swapaxes(-1, -2) @ abs(q), p.swapaxes(-1, -2) @ abs(d_o)
    limit = LIMIT["tf32" if switches.get("allow_tf32") else dtype]
    actual_d_qkv = to_numpy(actual[1])
    for i, name in enumerate(("d_q", "d_k", "d_v")):
        error = abs(actual_d_qkv[:, :, i] - d_qkv[:, :, i]).max() / sizes[i].max()
        assert error <= limit, f"{name}: error {error:.3g} of what is summed"
    error = abs(to_numpy(actual[0]) - out).max() / (p @ abs(v)).max()
    assert error <= limit, f"out: error {error:.3g} of what is summed"


# Head dims for every family of kernels.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (64, 128, 30, 160))
@pytest.mark.parametrize("seq_len", (64, 200))
@pytest.mark.parametrize("size", (1.0, 300.0, 1e6, 1e7))
def test_large_scores(size, seq_len, head_dim, dtype):
    check_two_keys(dtype, size, seq_len, head_dim)


# Not in 16 bits: there the highest probability, before it is divided by the sum, is a power of two that rounds, and no
# longer 1.
@pytest.mark.parametrize("dtype", ("float32", "float64"))
@pytest.mark.parametrize("head_dim", (64, 30))
def test_larger_scores(head_dim, dtype):
    check_two_keys(dtype, 1e8, 200, head_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (64, 128, 30, 160))
@pytest.mark.parametrize("causal", (False, True))
def test_large_scores_beside_small(causal, head_dim, dtype):
    check_two_keys(dtype, 1e7, 200, head_dim, small_rows=True, causal=causal)


@pytest.mark.parametrize("head_dim", (64, 128))
def test_large_scores_in_tf32(head_dim):
    check_two_keys("float32", 1e7, 200, head_dim, small_rows=True, allow_tf32=True)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("head_dim", (64, 128))
def test_large_scores_deterministic(head_dim, dtype):
    check_two_keys(dtype, 1e7, 200, head_dim, small_rows=True, deterministic=True)


@pytest.mark.parametrize("dtype", ("float32", *SIXTEEN_BIT))
@pytest.mark.parametrize("head_dim", (64, 128, 160))
@pytest.mark.parametrize("size", (1e6, 1e8))
def test_probabilities_of_large_scores_add_up_to_one(size, head_dim, dtype):
    """Of 64 equal keys each has 1/64 of every query, so the gradient of a value is that of the mean."""
    rng = np.random.default_rng(2)
    qkv = rng.standard_normal((1, 64, 3, 2, head_dim))
    qkv[:, :, :2] *= size**0.5
    qkv[:, :, 1] = qkv[:, :1, 1]
    d_out = np.ones((1, 64, 2, head_dim))
    _, d_qkv, _ = run_attention(to_device(qkv, dtype), to_device(d_out, dtype))
    assert abs(to_numpy(d_qkv[:, :, 2]) - 1.0).max() <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case, dtype):
    case = case.but(dtype=dtype)
    rng = np.random.default_rng(1)
    shape = case.batch, case.seq_len, case.num_heads, case.head_dim
    qkv, d_out = (reference.round_to(rng.standard_normal(s), dtype) for s in ((*shape[:2], 3, *shape[2:]), shape))
    mask = common.make_mask(case, rng) if case.mask else None
    config = case.config
    device_mask = to_device(mask, case.mask.dtype) if case.mask else None
    dropout = dict(attn_dropout_rate=config.attn_dropout_rate, seed=config.seed, offset=config.offset)
    actual = run_attention(to_device(qkv, dtype), to_device(d_out, dtype), device_mask, causal=config.causal, **dropout)

    added = reference.additive_mask({"attn_mask": mask}, config, case.seq_len)
    factor, _ = reference.drop_factors(config, case.batch, case.seq_len, case.num_heads, case.embed_dim)
    out, kept = reference.attention(qkv.astype(np.float64), added, factor)
    d_qkv = reference.attention_gradient(kept, d_out.astype(np.float64))
    expected = out, d_qkv, d_qkv.sum((0, 1))
    peer = composed(qkv, d_out, added, factor, dtype) if dtype in SIXTEEN_BIT else (None, None, None)
    for name, a, e, p in zip(("out", "d_qkv", "d_qkv_bias"), actual, expected, peer):
        common.check_tensor(name, to_numpy(a), e, dtype, p)
