"""The weights that attention gives to its values, and their gradients, on the GPU against float64 in NumPy."""

import attention_cases
import common
import numpy as np
import pytest
import torch
from attention_cases import DTYPES, FEATURES, FEATURES_OF_WEIGHTS, FULL, make_inputs_of_weights
from core_config import config_of
from device import Memory, mask_argument, to_device, to_numpy
from pfa_core import CudaBlock

SEVERAL_TILES = FULL.but(queries=140, keys=133, heads=6, kv_heads=2, head_dim=40, dropout_rate=0.2, seed=7)
CASES = {
    "mask": SEVERAL_TILES.but(mask="1HQK", mask_dtype="float32"),
    "causal": SEVERAL_TILES.but(causal=True, head_dim=128),
    "window": SEVERAL_TILES.but(causal=True, window_left=30, head_dim=200),
    "ranges": SEVERAL_TILES.but(ranges=4, range_heads=2, head_dim=64),
    "sees nothing": SEVERAL_TILES.but(mask="BHQK", mask_dtype="bool", content="rows"),
    "no keys": SEVERAL_TILES.but(keys=0),
    "no queries": SEVERAL_TILES.but(queries=0),
}


def compute(case, inputs, wanted):
    """The weights by the statistics of whatever kernels serve the attention, and gradients, of the case's dtypes."""
    config, seed, offset = config_of(case)
    memory, stream = Memory(), torch.cuda.current_stream().cuda_stream
    floats = {name: inputs[name] for name in ("query", "key", "attn_mask") if name in inputs}
    tensors = {name: to_device(a, case.dtype_of(name)) for name, a in floats.items()}
    d_weights = to_device(inputs["d_out"].swapaxes(1, 2), case.dtype)
    arrays = {name: tensors[name].data_ptr() for name in ("query", "key")}
    if "attn_mask" in tensors:
        arrays["mask"] = mask_argument(tensors["attn_mask"], (case.batch, case.heads, case.queries, case.keys))
    if "startend_row_indices" in inputs:
        ranges = torch.from_numpy(inputs["startend_row_indices"]).cuda()
        arrays["startend_row_indices"] = (ranges.data_ptr(), *ranges.shape[1::2])
    value = torch.zeros_like(tensors["key"])
    attention = CudaBlock(config)
    out = memory.empty(tensors["query"].shape, tensors["query"].dtype)
    of_attention = dict(arrays, value=value.data_ptr(), out=out.data_ptr())
    saved = memory.bytes(attention.saved_bytes(of_attention))
    workspace = memory.bytes(attention.forward_workspace_bytes(of_attention, True))
    attention.forward(of_attention, saved.data_ptr(), workspace.data_ptr(), stream, seed, offset)

    block = CudaBlock(dict(config, block="attention_weights"))
    weights = memory.empty(d_weights.shape, d_weights.dtype)
    arrays.update(statistics=saved.data_ptr(), out=weights.data_ptr())
    block.forward(arrays, None, memory.bytes(block.forward_workspace_bytes(arrays, False)).data_ptr(), stream, 0, 0)
    gradients = {name: memory.empty(tensors[name].shape, tensors[name].dtype) for name in wanted}
    arrays.update({"d_" + name: tensor.data_ptr() for name, tensor in gradients.items()}, d_out=d_weights.data_ptr())
    workspace = memory.bytes(block.backward_workspace_bytes(arrays))
    block.backward(arrays, None, workspace.data_ptr(), stream)
    torch.cuda.synchronize()
    memory.check()
    return to_numpy(weights), {name: to_numpy(gradient) for name, gradient in gradients.items()}


def check(case, wanted=None):
    inputs = make_inputs_of_weights(case)
    if wanted is None:
        wanted = [name for name in attention_cases.differentiable(inputs) if name != "value"]
    weights, gradients = compute(case, inputs, wanted)

    def as_stored(name, a):
        return common.to_storage(a, case.dtype_of(name))

    attention_cases.check(
        case,
        inputs,
        as_stored("out", weights.swapaxes(1, 2)),
        {name: as_stored(name, a) for name, a in gradients.items()},
    )


@pytest.mark.parametrize("feature", FEATURES_OF_WEIGHTS)
def test_features(feature):
    check(FEATURES[feature])


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
    inputs = make_inputs_of_weights(case)
    wanted = ["query", "key", "attn_mask"]
    first, second = (compute(case, inputs, wanted) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert all(np.array_equal(first[1][name], second[1][name]) for name in wanted)
