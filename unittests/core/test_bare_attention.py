"""Attention by itself on every instruction set, against float64."""

import attention_cases
import numpy as np
import pytest
from attention_cases import (
    DTYPES,
    FEATURES,
    FORM_CASES,
    FORMS,
    FORMS_OF_CASES,
    FULL,
    LENGTHS,
    in_form,
    make_inputs,
    out_of_form,
    stored,
)

pfa_core = pytest.importorskip("pfa_core", reason="the module pfa_core of CMakeLists.txt is not on PYTHONPATH")

MIXED = FULL.but(
    queries=70, keys=150, heads=4, head_dim=24, mask="B1QK", causal=True, window_left=65, dropout_rate=0.1, seed=2
)
PACKED = FULL.but(lengths=(*LENGTHS, (130, 70)), heads=4, causal=True, dropout_rate=0.1, seed=2)
RANGES = FULL.but(queries=133, keys=133, heads=4, ranges=4, range_heads=2)


def config_of(case):
    given = case.config
    config = dict(
        block="bare_attention",
        batch=len(case.lengths) or case.batch,
        queries=case.longest[0] if case.lengths else case.queries,
        keys=case.longest[1] if case.lengths else case.keys,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
    )
    for name in ("dropout_rate", "training", "mode", "causal", "window_left", "window_right"):
        config[name] = getattr(given, name)
    if given.scale is not None:
        config["scale"] = given.scale
    if case.lengths:
        config["packed_queries"], config["packed_keys"] = (sum(side) for side in zip(*case.lengths))
    return config


def check(case, isa):
    inputs = make_inputs(case)
    arrays = stored(case, inputs)
    d_out = arrays.pop("d_out")
    config, seed = config_of(case), case.config.seed % 2**64
    if arrays.get("attn_mask", d_out).dtype == np.uint16:
        pytest.skip("NumPy has no bfloat16 masks")
    out, saved = pfa_core.forward(arrays, config, seed, case.config.offset, isa=isa)
    wanted = attention_cases.differentiable(inputs)
    gradients = pfa_core.backward(arrays, config, d_out, saved, wanted, isa=isa, out=out)
    attention_cases.check(case, inputs, out, gradients)
    again, _ = pfa_core.forward(arrays, config, seed, case.config.offset, saves=False, isa=isa)
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
    config = config_of(FULL)
    with pytest.raises(ValueError, match="num_kv_heads"):
        pfa_core.forward(arrays, dict(config, num_kv_heads=3))
    with pytest.raises(ValueError, match="query: expected shape"):
        pfa_core.forward(arrays, dict(config, queries=9))
    with pytest.raises(TypeError, match="cu_seqlens_q"):
        pfa_core.forward(dict(arrays, cu_seqlens_q=np.zeros(3)), config)
    out, saved = pfa_core.forward(arrays, config)
    with pytest.raises(TypeError, match="out"):
        pfa_core.backward(arrays, config, d_out, saved, ["query"])


@pytest.mark.parametrize("isa", pfa_core.instruction_sets())
@pytest.mark.parametrize("form, name", FORMS_OF_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_tensors(dtype, form, name, isa):
    case = FORM_CASES[name].but(dtype=dtype)
    inputs = make_inputs(case)
    arrays = in_form(form, stored(case, inputs))
    d_out = arrays.pop("d_out")
    config, seed = config_of(case), case.config.seed % 2**64
    config.update(
        key_behind_query="key" not in arrays, value_behind_key="value" not in arrays, keys_by_head=FORMS[form]
    )
    if arrays.get("attn_mask", d_out).dtype == np.uint16:
        pytest.skip("NumPy has no bfloat16 masks")
    out, saved = pfa_core.forward(arrays, config, seed, case.config.offset, isa=isa)
    wanted = [name for name in attention_cases.differentiable(inputs) if name in arrays]
    gradients = pfa_core.backward(arrays, config, d_out, saved, wanted, isa=isa, out=out)
    attention_cases.check(case, inputs, out, out_of_form(form, gradients, case))
