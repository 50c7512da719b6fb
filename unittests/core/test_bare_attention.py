"""Attention by itself on every instruction set, against float64."""

import attention_cases
import numpy as np
import pytest
from attention_cases import DTYPES, FEATURES, FULL, LENGTHS, make_inputs, stored
from core_config import config_of

pfa_core = pytest.importorskip("pfa_core", reason="the module pfa_core of CMakeLists.txt is not on PYTHONPATH")

MIXED = FULL.but(
    queries=70, keys=150, heads=4, head_dim=24, mask="B1QK", causal=True, window_left=65, dropout_rate=0.1, seed=2
)
PACKED = FULL.but(lengths=(*LENGTHS, (130, 70)), heads=4, causal=True, dropout_rate=0.1, seed=2)
RANGES = FULL.but(queries=133, keys=133, heads=4, ranges=4, range_heads=2)


def check(case, isa):
    inputs = make_inputs(case)
    arrays = stored(case, inputs)
    d_out = arrays.pop("d_out")
    config, seed, offset = config_of(case)
    if arrays.get("attn_mask", d_out).dtype == np.uint16:
        pytest.skip("NumPy has no bfloat16 masks")
    out, saved = pfa_core.forward(arrays, config, seed, offset, isa=isa)
    wanted = attention_cases.differentiable(inputs)
    gradients = pfa_core.backward(arrays, config, d_out, saved, wanted, isa=isa, out=out)
    attention_cases.check(case, inputs, out, gradients)
    again, _ = pfa_core.forward(arrays, config, seed, offset, saves=False, isa=isa)
    assert np.array_equal(again, out)


@pytest.mark.parametrize("isa", pfa_core.instruction_sets())
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, isa):
    check(FEATURES[feature], isa)


@pytest.mark.parametrize("isa", pfa_core.instruction_sets())
@pytest.mark.parametrize("case", [MIXED, PACKED, RANGES], ids=["mixed", "packed", "ranges"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, case, isa):
    check(case.but(dtype=dtype, mask_dtype=case.mask and "float32"), isa)


def test_bad_configurations():
    inputs = make_inputs(FULL)
    arrays = stored(FULL, inputs)
    d_out = arrays.pop("d_out")
    config, _, _ = config_of(FULL)
    with pytest.raises(ValueError, match="num_kv_heads"):
        pfa_core.forward(arrays, dict(config, num_kv_heads=3))
    with pytest.raises(ValueError, match="query: expected shape"):
        pfa_core.forward(arrays, dict(config, queries=9))
    with pytest.raises(TypeError, match="cu_seqlens_q"):
        pfa_core.forward(dict(arrays, cu_seqlens_q=np.zeros(3)), config)
    out, saved = pfa_core.forward(arrays, config)
    with pytest.raises(TypeError, match="out"):
        pfa_core.backward(arrays, config, d_out, saved, ["query"])
