"""The weights that attention gives to its values, on every instruction set, against float64."""

import attention_cases
import numpy as np
import pytest
from attention_cases import DTYPES, FEATURES_OF_WEIGHTS, FULL, make_inputs, of_weights, stored
from core_config import config_of
from processes import printed_with_threads

pfa_core = pytest.importorskip("pfa_core", reason="the module pfa_core of CMakeLists.txt is not on PYTHONPATH")

import core_weights  # noqa: E402

SEVERAL_TILES = of_weights(FULL.but(queries=70, keys=133, heads=6, kv_heads=2, head_dim=40, dropout_rate=0.2, seed=7))
CASES = {
    "mask": SEVERAL_TILES.but(mask="1HQK", mask_dtype="float32"),
    "window": SEVERAL_TILES.but(causal=True, window_left=30),
    "ranges": SEVERAL_TILES.but(ranges=4, range_heads=2),
    "far keys": SEVERAL_TILES.but(queries=140, keys=40, causal=True),
    "keys beyond the window": SEVERAL_TILES.but(queries=20, keys=200, window_left=10, window_right=10),
    "sees nothing": SEVERAL_TILES.but(mask="BHQK", mask_dtype="bool", content="rows"),
    "no keys": SEVERAL_TILES.but(keys=0),
    "no queries": SEVERAL_TILES.but(queries=0),
    "downscale in evaluation": SEVERAL_TILES.but(mode="downscale_in_infer", training=False),
}


def check(case, isa="", wanted=None):
    inputs = make_inputs(case)
    if wanted is None:
        wanted = attention_cases.differentiable_of_weights(inputs)
    attention_cases.check(case, inputs, *core_weights.compute(case, inputs, wanted, isa))


@pytest.mark.parametrize("isa", pfa_core.instruction_sets())
@pytest.mark.parametrize("feature", FEATURES_OF_WEIGHTS)
def test_features(feature, isa):
    check(FEATURES_OF_WEIGHTS[feature], isa)


@pytest.mark.parametrize("isa", pfa_core.instruction_sets())
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles(dtype, case, isa):
    check(CASES[case].but(dtype=dtype), isa)


@pytest.mark.parametrize("wanted", [[], ["query"], ["key"], ["attn_mask"], ["key", "attn_mask"]], ids=str)
def test_subsets_of_gradients(wanted):
    check(CASES["mask"], wanted=wanted)


def test_bits_do_not_depend_on_threads():
    program = (
        "import hashlib; from core import test_core_weights as t\n"
        "digest = hashlib.sha1()\n"
        "for name in t.CASES:\n"
        "    case = t.CASES[name].but(dtype='float32')\n"
        "    inputs = t.make_inputs(case)\n"
        "    wanted = t.attention_cases.differentiable_of_weights(inputs)\n"
        "    weights, gradients = t.core_weights.compute(case, inputs, wanted)\n"
        "    for array in (weights, *gradients.values()):\n"
        "        digest.update(array.tobytes())\n"
        "print(digest.hexdigest())"
    )
    assert len(printed_with_threads(program, (1, 2, 3, 16))) == 1


def test_statistics_of_another_attention_are_refused():
    arrays = stored(FULL, make_inputs(FULL))
    del arrays["d_out"], arrays["value"]
    config = dict(config_of(FULL)[0], block="attention_weights")
    with pytest.raises(ValueError, match="statistics"):
        pfa_core.forward({**arrays, "statistics": np.zeros(8, np.uint8)}, config)
