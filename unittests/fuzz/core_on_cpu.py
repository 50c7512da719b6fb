"""Runs a random case by pfa_core on NumPy arrays, on every instruction set of the processor."""

import attention_cases
import cases
import common
import core_weights
import numpy as np
import pfa_core
from block_cases import AttentionBlockCase
from core_config import config_of


def ways():
    return pfa_core.instruction_sets()


def why_not(drawn):
    """Why the core has no way for a case; None if it has one."""
    return None


def _through_strides(a):
    """The same numbers, no two of them beside each other."""
    apart = np.zeros((*a.shape, 3), a.dtype)
    apart[..., 1] = a
    return apart[..., 1]


def stored(case, inputs):
    """The arrays as the core takes them: x of a feed-forward as rows, that of packed sequences which are all of one
    length as the padded ones that they are too."""
    arrays = {n: common.to_storage(a, case.dtype_of(n)) if a.dtype == np.float64 else a for n, a in inputs.items()}
    if isinstance(case, cases.FeedForwardCase):
        for name in ("x", "d_out"):
            arrays[name] = arrays[name].reshape(-1, case.width)
    elif isinstance(case, AttentionBlockCase) and len(set(case.lengths)) == 1:
        for name in ("x", "d_out"):
            arrays[name] = arrays[name].reshape(case.batch, case.seq_len, case.width)
    return arrays


def run(drawn, inputs, way):
    """Result and gradients as float64 arrays, and what is wrong with them already."""
    if isinstance(drawn.case, attention_cases.WeightsCase):
        return _run_weights(drawn, inputs, way)
    case = drawn.case
    arrays = stored(case, inputs)
    d_out = arrays.pop("d_out")
    if drawn.strides_mask:
        arrays["attn_mask"] = _through_strides(arrays["attn_mask"])
    config, seed, offset = config_of(case)
    config.update(getattr(case, "switches", dict)())
    out, saved = pfa_core.forward(arrays, config, seed, offset, isa=way)
    alone, _ = pfa_core.forward(arrays, config, seed, offset, saves=False, isa=way)
    broken = [] if alone.tobytes() == out.tobytes() else ["out: other bits when nothing is saved"]
    reads_out = isinstance(case, attention_cases.Case)
    gradients = pfa_core.backward(
        arrays, config, d_out, saved, list(drawn.wanted), isa=way, out=out if reads_out else None
    )
    for name, gradient in gradients.items():
        if gradient.dtype != arrays[name].dtype:
            broken.append(f"{name}: a gradient of {gradient.dtype}")
    return (
        common.from_storage(out).reshape(inputs["d_out"].shape),
        {name: common.from_storage(g).reshape(inputs[name].shape) for name, g in gradients.items()},
        broken,
    )


def _run_weights(drawn, inputs, way):
    def change(arrays):
        if drawn.strides_mask:
            arrays["attn_mask"] = _through_strides(arrays["attn_mask"])
        return arrays

    weights, gradients = core_weights.compute(drawn.case, inputs, drawn.wanted, way, change)
    return common.from_storage(weights), {n: common.from_storage(g) for n, g in gradients.items()}, []
