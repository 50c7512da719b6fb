"""The weights that attention gives to its values, by pfa_core on NumPy arrays."""

import numpy as np
import pfa_core
from attention_cases import stored
from core_config import config_of


def compute(case, inputs, wanted, isa="", change=lambda arrays: arrays):
    """The weights [batch, queries, heads, keys] and the `wanted` gradients, as stored. `change` changes the arrays that
    the core is given."""
    arrays = change(stored(case, inputs))
    d_weights = np.ascontiguousarray(arrays.pop("d_out").swapaxes(1, 2))
    config, seed, offset = config_of(case)
    values = np.zeros_like(arrays["key"])
    _, arrays["statistics"] = pfa_core.forward({**arrays, "value": values}, config, seed, offset, isa=isa)
    del arrays["value"]
    config["block"] = "attention_weights"
    weights, _ = pfa_core.forward(arrays, config, isa=isa)
    nothing = np.zeros(0, np.uint8)
    gradients = pfa_core.backward(arrays, config, d_weights, nothing, list(wanted), isa=isa, out=weights)
    return np.ascontiguousarray(weights.swapaxes(1, 2)), gradients
