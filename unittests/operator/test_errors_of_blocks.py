"""Bad input of the feed-forward block, a block's tail and linear: a TypeError or ValueError names the argument, in
dygraph and before a static graph has values.
"""

import numpy as np
import paddle
import pytest
from paddle_fused_attention import (
    fused_bias_dropout_residual_layer_norm,
    fused_feedforward,
    fused_linear,
    fused_linear_activation,
    fused_matmul_bias,
)
from runners import static_mode

B, S, E, HIDDEN = 2, 5, 12, 20
NAN = float("nan")


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


def good(function):
    """Arrays for a call that works, with every tensor given, and what goes with them."""
    norms = {"ln_scale": zeros(E), "ln_bias": zeros(E)}
    if function is fused_feedforward:
        weights = {"linear1_weight": zeros(E, HIDDEN), "linear2_weight": zeros(HIDDEN, E)}
        biases = {"linear1_bias": zeros(HIDDEN), "linear2_bias": zeros(E)}
        norms = {f"ln{i}_{kind}": zeros(E) for i in (1, 2) for kind in ("scale", "bias")}
        arrays = {"x": zeros(B, S, E), **weights, **biases, **norms}
        return arrays, dict(pre_layer_norm=True, final_layer_norm=True)
    if function is fused_bias_dropout_residual_layer_norm:
        return {"x": zeros(B, S, E), "residual": zeros(B, S, E), "bias": zeros(E), **norms}, {}
    second = "weight" if function is fused_linear else "y"
    return {"x": zeros(B, S, E), second: zeros(E, HIDDEN), "bias": zeros(HIDDEN)}, {}


# function, argument, what comes, the error, and what the message must hold beside the argument's name
BAD_TENSORS = [
    (fused_feedforward, "x", zeros(B, S, 0), ValueError, ["0"]),
    (fused_feedforward, "x", zeros(B, S, E, dtype="int32"), TypeError, ["int32"]),
    (fused_feedforward, "linear1_weight", zeros(E), ValueError, ["[12]"]),
    (fused_feedforward, "linear1_weight", zeros(E + 1, HIDDEN), ValueError, ["12", "[13, 20]"]),
    (fused_feedforward, "linear1_weight", zeros(E, HIDDEN, dtype="float64"), TypeError, ["float32", "float64"]),
    (fused_feedforward, "linear2_weight", zeros(HIDDEN, E + 1), ValueError, ["[20, 12]", "[20, 13]"]),
    (fused_feedforward, "linear2_weight", zeros(HIDDEN, E, dtype="int64"), TypeError, ["float32", "int64"]),
    (fused_feedforward, "linear1_bias", zeros(HIDDEN + 1), ValueError, ["[20]", "[21]"]),
    (fused_feedforward, "linear2_bias", zeros(1, E), ValueError, ["[12]", "[1, 12]"]),
    (fused_feedforward, "linear2_bias", zeros(E, dtype="float64"), TypeError, ["float32", "float64"]),
    (fused_feedforward, "ln1_scale", zeros(1), ValueError, ["[12]", "[1]"]),
    (fused_feedforward, "ln1_bias", zeros(E, dtype="float64"), TypeError, ["float32", "float64"]),
    (fused_feedforward, "ln2_scale", zeros(2, E), ValueError, ["[12]", "[2, 12]"]),
    (fused_feedforward, "ln2_bias", zeros(E, dtype="int32"), TypeError, ["float32", "int32"]),
    (fused_bias_dropout_residual_layer_norm, "x", zeros(B, S, E, dtype="int32"), TypeError, ["int32"]),
    (fused_bias_dropout_residual_layer_norm, "residual", zeros(B, 1, E), ValueError, ["[2, 5, 12]", "[2, 1, 12]"]),
    (fused_bias_dropout_residual_layer_norm, "residual", zeros(B, S, E, dtype="float16"), TypeError, ["float16"]),
    (fused_bias_dropout_residual_layer_norm, "bias", zeros(E + 1), ValueError, ["[12]", "[13]"]),
    (fused_bias_dropout_residual_layer_norm, "bias", zeros(E, dtype="float64"), TypeError, ["float32", "float64"]),
    (fused_bias_dropout_residual_layer_norm, "ln_scale", zeros(1, E), ValueError, ["[12]", "[1, 12]"]),
    (fused_bias_dropout_residual_layer_norm, "ln_bias", zeros(E, dtype="int32"), TypeError, ["float32", "int32"]),
    (fused_linear, "x", zeros(B, S, E, dtype="bool"), TypeError, ["bool"]),
    (fused_linear, "weight", zeros(E + 1, HIDDEN), ValueError, ["12", "[13, 20]"]),
    (fused_linear, "weight", zeros(1, E, HIDDEN), ValueError, ["[1, 12, 20]"]),
    (fused_linear, "bias", zeros(E), ValueError, ["[20]", "[12]"]),
    (fused_linear_activation, "y", zeros(E + 1, HIDDEN), ValueError, ["12", "[13, 20]"]),
    (fused_linear_activation, "y", zeros(E, HIDDEN, dtype="float64"), TypeError, ["float32", "float64"]),
    (fused_matmul_bias, "y", zeros(HIDDEN), ValueError, ["[20]"]),
    (fused_matmul_bias, "bias", zeros(HIDDEN, dtype="float64"), TypeError, ["float32", "float64"]),
]
IDS = dict(ids=lambda value: getattr(value, "__name__", value) if isinstance(value, str) or callable(value) else "")


@pytest.mark.parametrize("function, name, array, error, parts", BAD_TENSORS, **IDS)
def test_tensors(function, name, array, error, parts, place):
    arrays, switches = good(function)
    tensors = {n: paddle.to_tensor(a, place=place) for n, a in {**arrays, name: array}.items()}
    with pytest.raises(error) as raised:
        function(**tensors, **switches)
    check_message(raised, name, parts)


@pytest.mark.parametrize("function, name, array, error, parts", BAD_TENSORS, **IDS)
def test_variables_of_a_static_graph(function, name, array, error, parts):
    """The same messages, before there are values."""
    arrays, switches = good(function)
    with static_mode(), paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
        variables = {n: paddle.static.data(n, list(a.shape), str(a.dtype)) for n, a in {**arrays, name: array}.items()}
        with pytest.raises(error) as raised:
            function(**variables, **switches)
    check_message(raised, name, parts)


def check_message(raised, name, parts):
    message = str(raised.value)
    assert message.startswith(f"{name}: expected") and "\n" not in message, message
    for part in parts:
        assert part in message, message


OTHERS = [
    (fused_feedforward, dict(x=None), TypeError, "x: expected a Tensor, got None"),
    (fused_feedforward, dict(linear2_weight=[1.0]), TypeError, "linear2_weight: expected a Tensor, got list"),
    (fused_feedforward, dict(ln1_scale=1.0), TypeError, "ln1_scale: expected a Tensor or None, got float"),
    (fused_feedforward, dict(dropout1_rate=1.5), ValueError, r"dropout1_rate: expected a number in \[0, 1\], got 1.5"),
    (fused_feedforward, dict(dropout2_rate=NAN), ValueError, "dropout2_rate: expected a number in .* got nan"),
    (fused_feedforward, dict(dropout2_rate=True), TypeError, "dropout2_rate: expected a number in .* got True"),
    (fused_feedforward, dict(ln1_epsilon=-1.0), ValueError, "ln1_epsilon: expected a number of at least 0, got -1.0"),
    (fused_feedforward, dict(ln2_epsilon=float("inf")), ValueError, "ln2_epsilon: expected"),
    (fused_feedforward, dict(activation="tanh"), ValueError, "activation: expected one of 'relu', .* got 'tanh'"),
    (fused_feedforward, dict(activation=None), ValueError, "activation: expected one of 'relu', .* got None"),
    (fused_feedforward, dict(mode="up"), ValueError, "mode: expected 'upscale_in_train' or .* got 'up'"),
    (fused_feedforward, dict(seed=0.5), TypeError, "seed: expected an int or None, got 0.5"),
    (fused_feedforward, dict(seed=2**64), ValueError, "seed: expected an int of 64 bits"),
    (fused_feedforward, dict(gated="yes"), TypeError, "gated: expected a bool, got 'yes'"),
    (fused_feedforward, dict(gated=True), ValueError, r"linear\d_\w+: expected shape"),
    (fused_bias_dropout_residual_layer_norm, dict(residual=None), TypeError, "residual: expected a Tensor, got None"),
    (fused_bias_dropout_residual_layer_norm, dict(dropout_rate=-1), ValueError, "dropout_rate: expected a number in"),
    (fused_bias_dropout_residual_layer_norm, dict(training=2), TypeError, "training: expected a bool, got 2"),
    (fused_linear, dict(weight=None), TypeError, "weight: expected a Tensor, got None"),
    (fused_linear, dict(transpose_weight="no"), TypeError, "transpose_weight: expected a bool, got 'no'"),
    (fused_linear_activation, dict(y=None), TypeError, "y: expected a Tensor, got None"),
    (fused_linear_activation, dict(activation="none"), ValueError, "activation: expected one of"),
    (fused_linear_activation, dict(trans_x=None), TypeError, "trans_x: expected a bool, got None"),
    (fused_linear_activation, dict(trans_x=True), ValueError, r"x: expected shape"),
    (fused_matmul_bias, dict(transpose_y=3), TypeError, "transpose_y: expected a bool, got 3"),
]


@pytest.mark.parametrize("function, changes, error, message", OTHERS, **IDS)
def test_other_arguments(function, changes, error, message):
    arrays, switches = good(function)
    tensors = {n: paddle.to_tensor(a, place=paddle.CPUPlace()) for n, a in arrays.items()}
    with pytest.raises(error, match=message):
        function(**{**tensors, **switches, **changes})


@pytest.mark.parametrize(
    "function", [fused_feedforward, fused_bias_dropout_residual_layer_norm, fused_linear, fused_linear_activation]
)
def test_a_tensor_without_memory(function):
    arrays, switches = good(function)
    tensors = {n: paddle.to_tensor(a, place=paddle.CPUPlace()) for n, a in arrays.items()}
    last = list(tensors)[1]
    tensors[last]._clear_data()
    with pytest.raises(ValueError, match=f"{last}: expected a tensor with values"):
        function(**tensors, **switches)
