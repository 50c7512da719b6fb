"""The attention stages alone against float64 in NumPy: no product of cuBLAS's runs, whose kernels racecheck cannot always follow."""

import common
import numpy as np
import pytest
import reference
from common import Case, Mask
from device import run_attention, to_device, to_numpy
from reference import Config

# Of the largest number; eight units in the last place of a 16-bit number below 1.
LIMIT = {"float64": 1e-9, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3.2e-2}

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


def attention(qkv, d_out, mask, config):
    """Result [B, S, H, D] and the gradient of qkv [B, S, 3, H, D], by section 2 of DESIGN.md."""
    batch, seq_len, _, heads, head_dim = qkv.shape
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    d_o = d_out.transpose(0, 2, 1, 3)
    p = reference.softmax(
        q * head_dim**-0.5 @ k.swapaxes(-1, -2) + reference.additive_mask({"attn_mask": mask}, config, seq_len)
    )
    factor, _ = reference.drop_factors(config, batch, seq_len, heads, heads * head_dim)
    d_p = d_o @ v.swapaxes(-1, -2) * factor
    d_scores = p * (d_p - (p * d_p).sum(-1, keepdims=True)) * head_dim**-0.5
    gradients = d_scores @ k, d_scores.swapaxes(-1, -2) @ q, (p * factor).swapaxes(-1, -2) @ d_o
    return (p * factor @ v).transpose(0, 2, 1, 3), np.stack(gradients).transpose(1, 3, 0, 2, 4)


@pytest.mark.parametrize("dtype", common.DTYPES)
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
    expected = attention(qkv.astype(np.float64), d_out.astype(np.float64), mask, config)
    for name, a, e in zip(("out", "d_qkv"), actual, expected):
        error = np.abs(to_numpy(a) - e).max() / np.abs(e).max()
        assert error <= LIMIT[dtype], f"{name}: relative error {error:.3g}"
