"""The attention stages alone against float64 in NumPy: no product of cuBLAS's runs, whose kernels racecheck cannot always follow."""

import common
import numpy as np
import pytest
import reference
from common import Case, Mask
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

    added = reference.additive_mask({"attn_mask": mask}, config, case.seq_len)
    factor, _ = reference.drop_factors(config, case.batch, case.seq_len, case.num_heads, case.embed_dim)
    out, kept = reference.attention(qkv.astype(np.float64), added, factor)
    d_qkv = reference.attention_gradient(kept, d_out.astype(np.float64))
    expected = out, d_qkv, d_qkv.sum((0, 1))
    peer = composed(qkv, d_out, added, factor, dtype) if dtype in common.SIXTEEN_BIT else (None, None, None)
    for name, a, e, p in zip(("out", "d_qkv", "d_qkv_bias"), actual, expected, peer):
        common.check_tensor(name, to_numpy(a), e, dtype, p)
