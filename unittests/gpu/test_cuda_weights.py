"""The weights that attention gives to its values, and their gradients, on the GPU against float64 in NumPy."""

import attention_cases
import common
import pytest
from attention_cases import DTYPES, FEATURES_OF_WEIGHTS, FULL, make_inputs, of_weights
from device import run_weights, to_numpy

SEVERAL_TILES = of_weights(FULL.but(queries=140, keys=133, heads=6, kv_heads=2, head_dim=40, dropout_rate=0.2, seed=7))
CASES = {
    "mask": SEVERAL_TILES.but(mask="1HQK", mask_dtype="float32"),
    "causal": SEVERAL_TILES.but(causal=True, head_dim=128),
    "window": SEVERAL_TILES.but(causal=True, window_left=30, head_dim=200),
    "ranges": SEVERAL_TILES.but(ranges=4, range_heads=2, head_dim=64),
    "sees nothing": SEVERAL_TILES.but(mask="BHQK", mask_dtype="bool", content="rows"),
    "no keys": SEVERAL_TILES.but(keys=0),
    "no queries": SEVERAL_TILES.but(queries=0),
}


def check(case, wanted=None):
    inputs = make_inputs(case)
    if wanted is None:
        wanted = attention_cases.differentiable_of_weights(inputs)
    weights, gradients, memory = run_weights(case, inputs, wanted)
    memory.check()

    def stored(name, tensor):
        return common.to_storage(to_numpy(tensor), case.dtype_of(name))

    found = {name: stored(name, tensor) for name, tensor in gradients.items()}
    attention_cases.check(case, inputs, stored("out", weights), found)


@pytest.mark.parametrize("feature", FEATURES_OF_WEIGHTS)
def test_features(feature):
    check(FEATURES_OF_WEIGHTS[feature])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles(dtype, case):
    check(CASES[case].but(dtype=dtype))


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("wanted", [[], ["query"], ["key"], ["attn_mask"], ["key", "attn_mask"]], ids=str)
def test_subsets_of_gradients(wanted, dtype):
    check(CASES["mask"].but(dtype=dtype), wanted)


def test_bits_are_the_same_each_time():
    case = CASES["mask"].but(dtype="bfloat16")
    inputs = make_inputs(case)
    first, second = (run_weights(case, inputs, ["query", "key", "attn_mask"]) for _ in range(2))
    assert (first[0] == second[0]).all()
    assert all((gradient == second[1][name]).all() for name, gradient in first[1].items())
