"""Attention by itself on every instruction set, against float64."""

import attention_cases
import common
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
from core_config import config_of
from processes import printed_with_threads

pfa_core = pytest.importorskip("pfa_core", reason="the module pfa_core of CMakeLists.txt is not on PYTHONPATH")

MIXED = FULL.but(
    queries=70, keys=150, heads=4, head_dim=24, mask="B1QK", causal=True, window_left=65, dropout_rate=0.1, seed=2
)
PACKED = FULL.but(lengths=(*LENGTHS, (130, 70)), heads=4, causal=True, dropout_rate=0.1, seed=2)
RANGES = FULL.but(queries=133, keys=133, heads=4, ranges=4, range_heads=2)


ONE = FULL.but(queries=1, keys=200, heads=6, kv_heads=3, head_dim=72)
ONE_QUERY = {
    "plain": ONE,
    "few numbers": ONE.but(head_dim=3, keys=65),
    "many numbers": ONE.but(head_dim=173, keys=130, heads=3),
    "no keys": ONE.but(keys=0),
    "no sequences": ONE.but(batch=0),
    "dropout": ONE.but(dropout_rate=0.3, seed=4),
    "dropout, downscale": ONE.but(dropout_rate=0.3, seed=4, mode="downscale_in_infer"),
    "window": ONE.but(window_left=70, causal=True),
    "mask": ONE.but(mask="BHQK", mask_dtype="float32", content="-inf"),
    "mask of keys": ONE.but(mask="B11K", mask_dtype="bool"),
    "sees nothing": ONE.but(mask="BHQK", mask_dtype="bool", content="rows"),
    "ranges": ONE.but(ranges=4, range_heads=3),
    "scale": ONE.but(scale=-0.2),
    "packed": ONE.but(lengths=((1, 90), (0, 5), (1, 1), (1, 0), (1, 130)), dropout_rate=0.1, seed=3),
    "last of a tile": ONE.but(queries=65, causal=True, dropout_rate=0.1, seed=3),
}


def check(case, isa):
    inputs = make_inputs(case)
    arrays = stored(case, inputs)
    d_out = arrays.pop("d_out")
    config, seed, offset = config_of(case)
    if "attn_mask" in arrays and arrays["attn_mask"].dtype == np.uint16:
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


@pytest.mark.parametrize("isa", pfa_core.instruction_sets())
@pytest.mark.parametrize("case", ONE_QUERY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_query(dtype, case, isa):
    check(ONE_QUERY[case].but(dtype=dtype), isa)


@pytest.mark.parametrize("isa", pfa_core.instruction_sets())
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e6, 1e8])
def test_large_scores_of_one_query(size, dtype, isa):
    """Backward computes the scores again to the last bit: where all keys are equal so are their weights, and the
    values get equal parts of the result's gradient."""
    case = ONE.but(dtype=dtype, kv_heads=6)
    inputs = make_inputs(case)
    inputs["key"][:] = inputs["key"][:, :1]
    inputs["query"] *= size
    arrays = stored(case, inputs)
    d_out = arrays.pop("d_out")
    config, seed, offset = config_of(case)
    out, saved = pfa_core.forward(arrays, config, seed, offset, isa=isa)
    gradients = pfa_core.backward(arrays, config, d_out, saved, ["value"], isa=isa, out=out)
    tolerance = 20 * np.finfo(dtype).eps
    np.testing.assert_allclose(
        gradients["value"], np.broadcast_to(d_out / case.keys, gradients["value"].shape), rtol=tolerance
    )
    np.testing.assert_allclose(out, inputs["value"].mean(1, keepdims=True), rtol=0, atol=tolerance * 5)


def test_bits_of_one_query_do_not_depend_on_threads():
    """How many heads a thread takes at once does."""
    program = (
        "import hashlib; import attention_cases, pfa_core; from core import test_bare_attention as t\n"
        "digest = hashlib.sha1()\n"
        "for dtype in t.DTYPES:\n"
        "    case = t.ONE.but(heads=9, dtype=dtype)\n"
        "    arrays = t.stored(case, t.make_inputs(case))\n"
        "    arrays.pop('d_out')\n"
        "    digest.update(pfa_core.forward(arrays, t.config_of(case)[0])[0].tobytes())\n"
        "print(digest.hexdigest())"
    )
    assert len(printed_with_threads(program, (1, 2, 3, 16))) == 1


ALONG = FULL.but(batch=3, queries=150, keys=130, heads=12, kv_heads=6, head_dim=24, dropout_rate=0.1, seed=2)
MASKS_ALONG = {
    "heads": ALONG.but(mask="1HQK"),
    "all": ALONG.but(mask="BHQK", causal=True),
    "window": ALONG.but(mask="1HQK", window_left=20, window_right=40),
    "hidden": ALONG.but(mask="1HQK", content="-inf"),
    "ranges": ALONG.but(mask="1HQK", ranges=4, range_heads=6),
    "more keys": ALONG.but(mask="1HQK", queries=3, keys=200, kv_heads=12),
    "no sequences": ALONG.but(mask="1HQK", batch=0),
}


@pytest.mark.parametrize("isa", pfa_core.instruction_sets())
@pytest.mark.parametrize("case", MASKS_ALONG)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_mask_of_heads(dtype, case, isa):
    """It is made beside the others, whatever the dtype."""
    check(MASKS_ALONG[case].but(dtype=dtype, mask_dtype="float32"), isa)


@pytest.mark.parametrize("wanted", [["attn_mask"], ["query", "attn_mask"], ["value", "attn_mask"]], ids=str)
def test_gradient_of_a_mask_beside_some(wanted):
    case = MASKS_ALONG["heads"]
    inputs = make_inputs(case)
    arrays = stored(case, inputs)
    d_out = arrays.pop("d_out")
    config, seed, offset = config_of(case)
    out, saved = pfa_core.forward(arrays, config, seed, offset)
    gradients = pfa_core.backward(arrays, config, d_out, saved, wanted, out=out)
    attention_cases.check(case, inputs, out, gradients)


def test_bits_of_a_mask_s_gradient_do_not_depend_on_threads():
    """With many threads it is a pass of its own."""
    program = (
        "import hashlib; import attention_cases, pfa_core; from core import test_bare_attention as t\n"
        "digest = hashlib.sha1()\n"
        "for name in t.MASKS_ALONG:\n"
        "    case = t.MASKS_ALONG[name].but(dtype='float32')\n"
        "    arrays = t.stored(case, t.make_inputs(case))\n"
        "    d_out = arrays.pop('d_out')\n"
        "    config, seed, offset = t.config_of(case)\n"
        "    out, saved = pfa_core.forward(arrays, config, seed, offset)\n"
        "    wanted = ['query', 'key', 'value', 'attn_mask']\n"
        "    for gradient in pfa_core.backward(arrays, config, d_out, saved, wanted, out=out).values():\n"
        "        digest.update(gradient.tobytes())\n"
        "print(digest.hexdigest())"
    )
    assert len(printed_with_threads(program, (1, 2, 3, 16))) == 1


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


@pytest.mark.parametrize("isa", pfa_core.instruction_sets())
@pytest.mark.parametrize("form, name", FORMS_OF_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_tensors(dtype, form, name, isa):
    case = FORM_CASES[name].but(dtype=dtype)
    inputs = make_inputs(case)
    arrays = in_form(form, stored(case, inputs))
    d_out = arrays.pop("d_out")
    config, seed, offset = config_of(case)
    config.update(
        key_behind_query="key" not in arrays, value_behind_key="value" not in arrays, keys_by_head=FORMS[form]
    )
    if "attn_mask" in arrays and arrays["attn_mask"].dtype == np.uint16:
        pytest.skip("NumPy has no bfloat16 masks")
    out, saved = pfa_core.forward(arrays, config, seed, offset, isa=isa)
    wanted = [name for name in attention_cases.differentiable(inputs) if name in arrays]
    gradients = pfa_core.backward(arrays, config, d_out, saved, wanted, isa=isa, out=out)
    attention_cases.check(case, inputs, out, out_of_form(form, gradients, case.heads, case.kv_heads))


@pytest.mark.parametrize("isa", pfa_core.instruction_sets())
@pytest.mark.parametrize("head_dim", (32, 64))
@pytest.mark.parametrize("size", (1e6, 1e8))
def test_probabilities_of_large_scores_add_up_to_one(size, head_dim, isa):
    """Of 64 equal keys each has 1/64 of every query, so the gradient of a value is that of the mean. Both passes scale
    the scores alike."""
    rng = np.random.default_rng(2)
    query, value = rng.standard_normal((2, 1, 64, 2, head_dim))
    key = np.repeat(rng.standard_normal((1, 1, 2, head_dim)), 64, axis=1)
    numbers = {"query": query * size**0.5, "key": key * size**0.5, "value": value}
    arrays = {name: common.to_storage(a, "bfloat16") for name, a in numbers.items()}
    config = dict(block="bare_attention", batch=1, queries=64, keys=64, num_heads=2, num_kv_heads=2)
    config.update(head_dim=head_dim, dtype="bfloat16")
    out, saved = pfa_core.forward(arrays, config, 0, 0, isa=isa)
    d_out = common.to_storage(np.ones_like(value), "bfloat16")
    gradients = pfa_core.backward(arrays, config, d_out, saved, ["value"], isa=isa, out=out)
    assert (common.from_storage(gradients["value"]) == 1).all()
