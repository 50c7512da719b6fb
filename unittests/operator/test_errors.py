"""Bad input: a ValueError, TypeError or NotImplementedError names the argument, what was expected and what came."""

import numpy as np
import paddle
import paddle_fused_attention as pfa
import pytest
from paddle_fused_attention import full_state_dict, fused_multi_head_attention, incubate, load_full_state_dict
from runners import static_mode

B, S, H, D = 2, 5, 4, 6
E = H * D


def good():
    """Arrays for a call that works, with every tensor given."""
    return {
        "x": np.zeros((B, S, E), "float32"),
        "qkv_weight": np.zeros((3, H, D, E), "float32"),
        "linear_weight": np.zeros((E, E), "float32"),
        "pre_ln_scale": np.ones(E, "float32"),
        "pre_ln_bias": np.zeros(E, "float32"),
        "ln_scale": np.ones(E, "float32"),
        "ln_bias": np.zeros(E, "float32"),
        "qkv_bias": np.zeros((3, H, D), "float32"),
        "linear_bias": np.zeros(E, "float32"),
        "attn_mask": np.ones((B, 1, S, S), "bool"),
    }


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


# argument, what comes, the error, and what the message must hold beside the argument's name
BAD_TENSORS = [
    # ranks and shapes
    ("x", zeros(S, E), ValueError, ["[5, 24]"]),
    ("x", zeros(B, S, 1, E), ValueError, ["[2, 5, 1, 24]"]),
    ("x", zeros(B, S, 16), ValueError, ["24", "16"]),
    ("x", zeros(B, S, 0), ValueError, ["0"]),
    ("qkv_weight", zeros(3 * E, E), ValueError, ["[72, 24]"]),
    ("qkv_weight", zeros(2, H, D, E), ValueError, ["[3, ", "[2, 4, 6, 24]"]),
    ("qkv_weight", zeros(3, H, D, 16), ValueError, ["[3, 4, 6, 24]", "[3, 4, 6, 16]"]),
    ("qkv_weight", zeros(3, 5, D, E), ValueError, ["24", "[3, 5, 6, 24]"]),
    ("qkv_weight", zeros(3, H, 5, E), ValueError, ["24", "[3, 4, 5, 24]"]),
    ("qkv_weight", zeros(3, 0, D, E), ValueError, ["[3, 0, 6, 24]"]),
    ("linear_weight", zeros(E), ValueError, ["[24, 24]", "[24]"]),
    ("linear_weight", zeros(E, 16), ValueError, ["[24, 24]", "[24, 16]"]),
    ("linear_weight", zeros(16, E), ValueError, ["[24, 24]", "[16, 24]"]),
    ("qkv_bias", zeros(3 * E), ValueError, ["[3, 4, 6]", "[72]"]),
    ("qkv_bias", zeros(3, H, 5), ValueError, ["[3, 4, 6]", "[3, 4, 5]"]),
    ("linear_bias", zeros(16), ValueError, ["[24]", "[16]"]),
    ("linear_bias", zeros(1, E), ValueError, ["[24]", "[1, 24]"]),
    ("pre_ln_scale", zeros(1), ValueError, ["[24]", "[1]"]),
    ("pre_ln_bias", zeros(25), ValueError, ["[24]", "[25]"]),
    ("ln_scale", zeros(2, E), ValueError, ["[24]", "[2, 24]"]),
    ("ln_bias", zeros(23), ValueError, ["[24]", "[23]"]),
    # masks that do not broadcast to [2, 4, 5, 5]
    ("attn_mask", zeros(S, 4), ValueError, ["[2, 4, 5, 5]", "[5, 4]"]),
    ("attn_mask", zeros(3, 1, S, S), ValueError, ["[2, 4, 5, 5]", "[3, 1, 5, 5]"]),
    ("attn_mask", zeros(B, 3, S, S), ValueError, ["[2, 4, 5, 5]", "[2, 3, 5, 5]"]),
    ("attn_mask", zeros(B, S, S), ValueError, ["[2, 4, 5, 5]", "[2, 5, 5]"]),
    ("attn_mask", zeros(1, B, H, S, S), ValueError, ["[2, 4, 5, 5]", "[1, 2, 4, 5, 5]"]),
    ("attn_mask", zeros(B, 1, 0, S), ValueError, ["[2, 4, 5, 5]", "[2, 1, 0, 5]"]),
    # dtypes
    ("x", zeros(B, S, E, dtype="int32"), TypeError, ["int32", "float"]),
    ("x", zeros(B, S, E, dtype="int64"), TypeError, ["int64", "float"]),
    ("x", zeros(B, S, E, dtype="bool"), TypeError, ["bool", "float"]),
    ("x", zeros(B, S, E, dtype="complex64"), TypeError, ["complex64", "float"]),
    ("qkv_weight", zeros(3, H, D, E, dtype="float64"), TypeError, ["float32", "float64"]),
    ("qkv_weight", zeros(3, H, D, E, dtype="float16"), TypeError, ["float32", "float16"]),
    ("linear_weight", zeros(E, E, dtype="int32"), TypeError, ["float32", "int32"]),
    ("qkv_bias", zeros(3, H, D, dtype="float64"), TypeError, ["float32", "float64"]),
    ("linear_bias", zeros(E, dtype="float16"), TypeError, ["float32", "float16"]),
    ("pre_ln_scale", zeros(E, dtype="float64"), TypeError, ["float32", "float64"]),
    ("pre_ln_bias", zeros(E, dtype="float16"), TypeError, ["float32", "float16"]),
    ("ln_scale", zeros(E, dtype="int64"), TypeError, ["float32", "int64"]),
    ("ln_bias", zeros(E, dtype="float64"), TypeError, ["float32", "float64"]),
    ("attn_mask", zeros(B, 1, S, S, dtype="complex64"), TypeError, ["complex64"]),
]

# what is no tensor at all
BAD_OBJECTS = [
    ("x", None, ["None"]),
    ("qkv_weight", None, ["None"]),
    ("linear_weight", None, ["None"]),
    ("x", zeros(B, S, E), ["ndarray"]),
    ("qkv_weight", [1.0, 2.0], ["list"]),
    ("linear_weight", 3, ["int"]),
    ("qkv_bias", "bias", ["str"]),
    ("linear_bias", 0.0, ["float"]),
    ("attn_mask", True, ["bool"]),
    ("ln_scale", 1.0, ["float"]),
    ("pre_ln_bias", (0.0,), ["tuple"]),
]

NAN = float("nan")
BAD_SWITCHES = [
    ("dropout_rate", -0.1, ValueError, ["[0, 1]", "-0.1"]),
    ("dropout_rate", 1.0001, ValueError, ["[0, 1]", "1.0001"]),
    ("dropout_rate", NAN, ValueError, ["[0, 1]", "nan"]),
    ("dropout_rate", "half", TypeError, ["[0, 1]", "'half'"]),
    ("dropout_rate", None, TypeError, ["[0, 1]", "None"]),
    ("dropout_rate", True, TypeError, ["[0, 1]", "True"]),
    ("attn_dropout_rate", -1e-9, ValueError, ["[0, 1]", "-1e-09"]),
    ("attn_dropout_rate", 2, ValueError, ["[0, 1]", "2"]),
    ("attn_dropout_rate", NAN, ValueError, ["[0, 1]", "nan"]),
    ("attn_dropout_rate", [0.1], TypeError, ["[0, 1]", "[0.1]"]),
    ("mode", "downgrade_in_infer", ValueError, ["upscale_in_train", "downscale_in_infer", "downgrade_in_infer"]),
    ("mode", None, (ValueError, TypeError), ["upscale_in_train", "downscale_in_infer", "None"]),
    ("pre_ln_epsilon", -1e-5, ValueError, ["-1e-05"]),
    ("pre_ln_epsilon", NAN, ValueError, ["nan"]),
    ("ln_epsilon", -1.0, ValueError, ["-1.0"]),
    ("ln_epsilon", float("inf"), ValueError, ["inf"]),
    ("ln_epsilon", "small", TypeError, ["'small'"]),
    ("seed", 1.5, TypeError, ["int", "1.5"]),
    ("seed", "one", TypeError, ["int", "'one'"]),
    ("dropout_rate", 10**400, ValueError, ["[0, 1]", "1000"]),
    ("dropout_rate", 10**5000, ValueError, ["[0, 1]", "bits"]),
    ("dropout_rate", -(10**400), ValueError, ["[0, 1]", "-1000"]),
    ("dropout_rate", np.str_("0.1"), TypeError, ["[0, 1]", "0.1"]),
    ("dropout_rate", np.bool_(True), TypeError, ["[0, 1]", "True"]),
    ("dropout_rate", np.complex64(0.1), TypeError, ["[0, 1]", "0.1"]),
    ("dropout_rate", 0.1j, TypeError, ["[0, 1]", "0.1j"]),
    ("dropout_rate", np.array([0.1]), TypeError, ["[0, 1]", "0.1"]),
    ("dropout_rate", np.float32("nan"), ValueError, ["[0, 1]", "nan"]),
    ("attn_dropout_rate", paddle.to_tensor(0.5), TypeError, ["[0, 1]", "Tensor"]),
    ("attn_dropout_rate", np.bytes_(b"0.5"), TypeError, ["[0, 1]", "0.5"]),
    ("ln_epsilon", 10**400, ValueError, ["at least 0", "1000"]),
    ("ln_epsilon", np.str_("1e-5"), TypeError, ["at least 0", "1e-5"]),
    ("pre_ln_epsilon", np.bool_(False), TypeError, ["at least 0", "False"]),
    ("pre_ln_epsilon", np.complex128(1), TypeError, ["at least 0", "1"]),
    ("mode", ["upscale_in_train"], ValueError, ["upscale_in_train", "downscale_in_infer"]),
    ("mode", np.array(["upscale_in_train", "x"]), ValueError, ["upscale_in_train", "downscale_in_infer"]),
    ("mode", 0, ValueError, ["upscale_in_train", "0"]),
    ("seed", paddle.to_tensor(3), TypeError, ["int", "Tensor"]),
    ("seed", np.array(1.5), TypeError, ["int", "1.5"]),
    ("seed", np.array(3), TypeError, ["int", "3"]),
    ("seed", np.float64(3), TypeError, ["int", "3"]),
    ("seed", np.bool_(True), TypeError, ["int", "True"]),
    ("seed", 10**5000, ValueError, ["64 bits"]),
    ("causal", "False", TypeError, ["bool", "'False'"]),
    ("training", paddle.to_tensor(True), TypeError, ["bool", "Tensor"]),
    ("training", None, TypeError, ["bool", "None"]),
    ("pre_layer_norm", 2, TypeError, ["bool", "2"]),
    ("final_layer_norm", np.array([True, False]), TypeError, ["bool"]),
    ("add_residual", 1.0, TypeError, ["bool", "1.0"]),
    ("seed", 2**63, ValueError, ["64 bits", str(2**63)]),
    ("seed", -(2**63) - 1, ValueError, ["64 bits", str(2**63 + 1)]),
]


def labels(table):
    def text(value):
        if isinstance(value, int) and abs(value) > 2**64:
            return f"of_{value.bit_length()}_bits"
        if isinstance(value, paddle.Tensor):
            return "Tensor"
        if isinstance(value, np.ndarray):
            return "x".join(map(str, value.shape)) + "_" + str(value.dtype)
        return repr(value)

    return [f"{row[0]}={text(row[1])}" for row in table]


def to_tensor(value):
    return paddle.to_tensor(value, place=paddle.CPUPlace())


def check_message(raised, argument, words):
    message = str(raised.value)
    assert message.startswith(argument + ":"), message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("argument, value, error, words", BAD_TENSORS, ids=labels(BAD_TENSORS))
def test_bad_tensors(argument, value, error, words, grad):
    tensors = {name: to_tensor(a) for name, a in dict(good(), **{argument: value}).items()}
    with paddle.set_grad_enabled(grad), pytest.raises(error) as raised:
        fused_multi_head_attention(**tensors, pre_layer_norm=True)
    if argument == "x" and "24" in words:  # x and the weights disagree: either may be blamed
        assert "qkv_weight" in str(raised.value) or str(raised.value).startswith("x:")
    else:
        check_message(raised, argument, words)


@pytest.mark.parametrize("argument, value, error, words", BAD_TENSORS, ids=labels(BAD_TENSORS))
def test_bad_variables(argument, value, error, words):
    """The same when a static graph is built, where all shapes are known."""
    with static_mode():
        with paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
            variables = {
                name: paddle.static.data(name, a.shape, str(a.dtype))
                for name, a in dict(good(), **{argument: value}).items()
            }
            with pytest.raises(error) as raised:
                fused_multi_head_attention(**variables, pre_layer_norm=True)
    if not (argument == "x" and "24" in words):
        check_message(raised, argument, words)


@pytest.mark.parametrize("argument, value, words", BAD_OBJECTS, ids=labels(BAD_OBJECTS))
def test_bad_objects(argument, value, words):
    tensors = {name: to_tensor(a) for name, a in good().items()}
    tensors[argument] = value
    with pytest.raises(TypeError) as raised:
        fused_multi_head_attention(**tensors)
    check_message(raised, argument, ["Tensor"] + words)


@pytest.mark.parametrize("argument, value, words", BAD_OBJECTS, ids=labels(BAD_OBJECTS))
def test_bad_objects_in_static_graphs(argument, value, words):
    with static_mode():
        with paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
            variables = {name: paddle.static.data(name, a.shape, str(a.dtype)) for name, a in good().items()}
            variables[argument] = value
            with pytest.raises(TypeError) as raised:
                fused_multi_head_attention(**variables)
    check_message(raised, argument, words)


@pytest.mark.parametrize("argument, value, error, words", BAD_SWITCHES, ids=labels(BAD_SWITCHES))
def test_bad_switches(argument, value, error, words):
    tensors = {name: to_tensor(a) for name, a in good().items()}
    with pytest.raises(error) as raised:
        fused_multi_head_attention(**tensors, **{argument: value})
    check_message(raised, argument, words)


OF_INCUBATE = [row for row in BAD_SWITCHES if row[0] not in ("seed", "causal", "final_layer_norm")]


@pytest.mark.parametrize("argument, value, error, words", OF_INCUBATE, ids=labels(OF_INCUBATE))
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_bad_switches_of_incubate(cached, argument, value, error, words):
    tensors = {name: to_tensor(a) for name, a in good().items()}
    cache = to_tensor(zeros(2, B, H, 0, D)) if cached else None
    with pytest.raises(error) as raised:
        incubate.functional.fused_multi_head_attention(**tensors, cache_kv=cache, **{argument: value})
    check_message(raised, argument, words)


def test_numbers_of_numpy_are_welcome():
    tensors = {name: to_tensor(a) for name, a in good().items()}
    more = dict(
        training=np.bool_(True), causal=1, seed=np.int64(3), ln_epsilon=np.float32(1e-5), dropout_rate=np.float64(0.5)
    )
    out = fused_multi_head_attention(**tensors, **more, attn_dropout_rate=np.int32(0))
    more = dict(training=True, causal=True, seed=3, ln_epsilon=float(np.float32(1e-5)), dropout_rate=0.5)
    assert np.array_equal(out.numpy(), fused_multi_head_attention(**tensors, **more, attn_dropout_rate=0.0).numpy())


BAD_WITH_CACHE = [row for row in BAD_TENSORS if row[0] not in ("x", "attn_mask")] + [
    ("attn_mask", zeros(S, 4), ValueError, ["[2, 4, 5, 8]", "[5, 4]"]),
    ("attn_mask", zeros(B, 1, S, S), ValueError, ["[2, 4, 5, 8]", "[2, 1, 5, 5]"]),
    ("attn_mask", zeros(1, B, H, S, S + 3), ValueError, ["[2, 4, 5, 8]", "[1, 2, 4, 5, 8]"]),
    ("attn_mask", zeros(B, 1, S, S + 3, dtype="complex64"), TypeError, ["complex64"]),
    ("x", zeros(B, S, E, dtype="int32"), TypeError, ["int32", "float"]),
    ("x", zeros(B, S, E, dtype="complex64"), TypeError, ["complex64", "float"]),
]


@pytest.mark.parametrize("argument, value, error, words", BAD_WITH_CACHE, ids=labels(BAD_WITH_CACHE))
def test_bad_tensors_with_a_cache(argument, value, error, words):
    """The way of ordinary ops checks what the operator does."""
    arrays = {**good(), "attn_mask": np.ones((B, 1, S, S + 3), "bool"), argument: value}
    if argument.startswith("pre_"):
        arrays = {name: a for name, a in arrays.items() if not name.startswith("ln_")}
    tensors = {name: to_tensor(a) for name, a in arrays.items()}
    with pytest.raises(error) as raised:
        incubate.functional.fused_multi_head_attention(
            **tensors, cache_kv=to_tensor(zeros(2, B, H, 3, D)), pre_layer_norm=argument.startswith("pre_")
        )
    check_message(raised, argument, words)


def test_16_bit_x():
    """float32 layer-norm parameters are welcome with it; other dtypes are not, nor float32 biases."""
    tensors = {name: to_tensor(a) for name, a in good().items()}
    for name in ("x", "qkv_weight", "linear_weight", "qkv_bias", "linear_bias"):
        tensors[name] = to_tensor(good()[name].astype("float16"))
    assert fused_multi_head_attention(**tensors).dtype == paddle.float16
    for name, dtype in (("ln_scale", "float64"), ("ln_bias", "uint16"), ("qkv_bias", "float32")):
        with pytest.raises(TypeError) as raised:
            fused_multi_head_attention(**dict(tensors, **{name: to_tensor(good()[name].astype(dtype))}))
        check_message(raised, name, ["float16", "bfloat16" if dtype == "uint16" else dtype])


@pytest.mark.parametrize("model", [None, {}, np.zeros(3), "model"], ids=str)
def test_full_state_dicts_of_no_layer(model):
    for call in (full_state_dict, lambda model: load_full_state_dict(model, {})):
        with pytest.raises(TypeError) as raised:
            call(model)
        check_message(raised, "model", ["paddle.nn.Layer", type(model).__name__])
    with pytest.raises(TypeError) as raised:
        load_full_state_dict(paddle.nn.Linear(2, 2), [("weight", 1)])
    check_message(raised, "state_dict", ["dict", "list"])


def test_layer_norm_parameters_share_a_dtype():
    tensors = {name: to_tensor(a) for name, a in good().items()}
    for name in ("x", "qkv_weight", "linear_weight", "qkv_bias", "linear_bias", "ln_scale"):
        tensors[name] = to_tensor(good()[name].astype("float16"))
    with pytest.raises(TypeError) as raised:
        fused_multi_head_attention(**tensors)
    assert "float16" in str(raised.value) and "float32" in str(raised.value)


def test_wrong_shapes_found_when_a_program_runs():
    """Unknown sizes are checked when they are known: an error then too, not a crash."""
    with static_mode():
        main = paddle.static.Program()
        with paddle.static.program_guard(main, paddle.static.Program()):
            arrays = good()
            variables = {name: paddle.static.data(name, a.shape, str(a.dtype)) for name, a in arrays.items()}
            variables["x"] = paddle.static.data("open_x", [-1, -1, E], "float32")
            variables["attn_mask"] = paddle.static.data("open_mask", [-1, 1, -1, -1], "bool")
            out = fused_multi_head_attention(**variables)
        feed = dict(arrays, open_x=arrays["x"], open_mask=np.ones((B, 1, S, S + 1), bool))
        with pytest.raises(Exception) as raised:
            paddle.static.Executor(paddle.CPUPlace()).run(main, feed=feed, fetch_list=[out])
    assert (
        "attn_mask" in str(raised.value) and "[2, 4, 5, 5]" in str(raised.value) and "[2, 1, 5, 6]" in str(raised.value)
    )


def test_the_call_itself_is_good():
    tensors = {name: to_tensor(a) for name, a in good().items()}
    assert list(fused_multi_head_attention(**tensors).shape) == [B, S, E]
    assert list(fused_multi_head_attention(*list(tensors.values())[:3]).shape) == [B, S, E]


def test_positional_arguments_are_those_of_the_pull_request():
    t = {name: to_tensor(a) for name, a in good().items()}
    out = fused_multi_head_attention(
        t["x"], t["qkv_weight"], t["linear_weight"], True, t["pre_ln_scale"], t["pre_ln_bias"], t["ln_scale"],
        t["ln_bias"], 1e-5, t["qkv_bias"], t["linear_bias"], t["attn_mask"], 0.5, 0.5, 1e-5, "name",
    )  # fmt: skip
    assert list(out.shape) == [B, S, E]
    with pytest.raises(TypeError):
        fused_multi_head_attention(*t.values(), 1e-5, None, None, None, 0.5, 0.5, 1e-5, "name", True)


def sparse(tensor):
    return tensor.detach().to_sparse_coo(len(tensor.shape))


def selected_rows(rows, columns):
    """The sparse gradient of an embedding."""
    embedding = paddle.nn.Embedding(rows, columns, sparse=True)
    embedding(paddle.to_tensor([1, 2])).sum().backward()
    return embedding.weight.grad


def cleared(tensor):
    tensor = tensor.detach().clone()
    tensor._clear_data()
    return tensor


def reset(tensor):
    tensor = tensor.detach().clone()
    tensor._clear()
    return tensor


NOT_DENSE = {
    "sparse": (sparse, TypeError, "dense"),
    "selected_rows": (lambda tensor: selected_rows(E, E), TypeError, "dense"),
    "cleared": (cleared, ValueError, "memory"),
    "reset": (reset, ValueError, "memory"),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("argument", ["x", "qkv_weight", "linear_weight", "ln_scale", "qkv_bias", "attn_mask"])
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_tensors_that_are_not_dense_or_have_no_memory(kind, argument, grad):
    make, error, word = NOT_DENSE[kind]
    tensors = {name: to_tensor(a) for name, a in dict(good(), attn_mask=zeros(S, S)).items()}
    tensors[argument] = make(tensors[argument])
    with paddle.set_grad_enabled(grad), pytest.raises(error) as raised:
        fused_multi_head_attention(**tensors)
    check_message(raised, argument, [word])


@pytest.mark.parametrize("kind", ["sparse", "cleared", "reset"])
def test_the_same_under_auto_cast(kind):
    make, error, word = NOT_DENSE[kind]
    tensors = {name: to_tensor(a) for name, a in good().items()}
    with paddle.amp.auto_cast(dtype="bfloat16"), pytest.raises(error) as raised:
        fused_multi_head_attention(**dict(tensors, linear_weight=make(tensors["linear_weight"])))
    check_message(raised, "linear_weight", [word])


@pytest.mark.parametrize("kind", ["sparse", "cleared", "reset"])
def test_the_same_from_layers(kind):
    """Also where a mask or a weight goes through Paddle's own operators first."""
    make, error, word = NOT_DENSE[kind]
    x = to_tensor(zeros(B, S, E))
    keep = to_tensor(np.ones((S, S), "int32"))
    incubate = pfa.incubate.FusedMultiHeadAttention(E, H)
    encoder = pfa.convert(paddle.nn.TransformerEncoderLayer(E, H, 32))
    weight, bias = to_tensor(zeros(E, 3 * E)), to_tensor(zeros(3 * E))
    cache = to_tensor(zeros(2, B, H, 3, D))

    def transposed(weight, bias):
        return pfa.incubate.functional.fused_multi_head_attention(
            x, weight, incubate.linear_weight, qkv_bias=bias, num_heads=H, transpose_qkv_wb=True
        )

    calls = [
        ("x", lambda: pfa.FusedMultiHeadAttention(E, H)(make(x))),
        ("x", lambda: pfa.ParallelFusedMultiHeadAttention(E, H)(make(x))),
        ("x", lambda: incubate(make(x))),
        ("src", lambda: encoder(make(x))),
        ("attn_mask", lambda: incubate(x, attn_mask=make(keep))),
        ("src_mask", lambda: encoder(x, make(keep))),
        ("qkv_weight", lambda: transposed(make(weight), bias)),
        ("qkv_bias", lambda: transposed(weight, make(bias))),
        ("cache_kv", lambda: incubate(x, cache=make(cache))),
        ("cache.k", lambda: encoder(x, None, paddle.nn.MultiHeadAttention.Cache(make(cache[0]), cache[1]))),
    ]
    for argument, run in calls:
        with pytest.raises(error) as raised:
            run()
        check_message(raised, argument, [] if kind == "reset" else [word])  # what was reset has no shape either


def test_a_sparse_gradient_of_the_result():
    tensors = {name: to_tensor(a) for name, a in good().items()}
    tensors["x"].stop_gradient = False
    out = fused_multi_head_attention(**tensors)
    # Paddle 2.6 raises what comes out of a custom operator's backward as OSError.
    with pytest.raises((ValueError, OSError), match=r"Grad\(Out\): expected a dense tensor"):
        out.backward(sparse(out))


GIVEN_IN_STATIC_MODE = {
    "block": lambda: pfa.FusedMultiHeadAttention(E, H),
    "parallel": lambda: pfa.ParallelFusedMultiHeadAttention(E, H),
    "incubate": lambda: pfa.incubate.FusedMultiHeadAttention(E, H),
    "transposed": lambda: pfa.incubate.FusedMultiHeadAttention(E, H, transpose_qkv_wb=True),
    "converted": lambda: pfa.convert(paddle.nn.TransformerEncoderLayer(E, H, 32)),
}


@pytest.mark.parametrize("kind", GIVEN_IN_STATIC_MODE)
def test_dygraph_layers_in_static_mode(kind):
    layer = GIVEN_IN_STATIC_MODE[kind]()
    mask = to_tensor(np.ones((S, S), "bool"))
    with static_mode(), paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
        x = paddle.static.data("x", [B, S, E])
        with pytest.raises(TypeError) as raised:
            layer(x)
        check_message(raised, "qkv_weight", ["static graph", "dygraph"])
        if kind in ("incubate", "converted"):
            with pytest.raises(TypeError) as raised:
                layer(x, None, None, mask) if kind == "incubate" else layer(x, mask)
            name = "attn_mask" if kind == "incubate" else "src_mask"
            check_message(raised, name, ["static graph", "dygraph"])


@pytest.mark.parametrize("argument", list(good()))
def test_one_dygraph_tensor_in_static_mode(argument):
    tensor = to_tensor(good()[argument])
    with static_mode(), paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
        variables = {name: paddle.static.data(name, a.shape, str(a.dtype)) for name, a in good().items()}
        with pytest.raises(TypeError) as raised:
            fused_multi_head_attention(**dict(variables, **{argument: tensor}), pre_layer_norm=True)
        check_message(raised, argument, ["static graph", "dygraph"])


@pytest.mark.parametrize("argument", ["x", "linear_weight", "attn_mask"])
def test_a_variable_in_dygraph(argument):
    tensors = {name: to_tensor(a) for name, a in good().items()}
    with static_mode(), paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
        a = good()[argument]
        variable = paddle.static.data(argument, a.shape, str(a.dtype))
        paddle.disable_static()
        with pytest.raises(TypeError) as raised:
            fused_multi_head_attention(**dict(tensors, **{argument: variable}))
    check_message(raised, argument, ["dygraph", "static graph"])


@pytest.mark.skipif(not hasattr(paddle, "as_strided"), reason="this Paddle makes no such views")
def test_more_numbers_than_can_be_counted():
    """Paddle's count of them wraps around to 0."""
    x = paddle.as_strided(to_tensor(good()["x"]), [2**40, 2**40, E], [0, 0, 0])
    weights = {name: to_tensor(a) for name, a in good().items() if name != "x"}
    with pytest.raises(
        ValueError, match=r"^x: expected a tensor of less than 2\^63 numbers, got shape \[1099511627776, "
    ):
        fused_multi_head_attention(x, **dict(weights, attn_mask=None))


def test_a_predictor_that_was_given_nothing(tmp_path):
    layer = pfa.FusedMultiHeadAttention(E, H)
    layer.eval()
    path = str(tmp_path / "layer")
    paddle.jit.save(layer, path, input_spec=[paddle.static.InputSpec([None, None, E], "float32", "x")])
    model = path + (".pdmodel" if paddle.__version__.startswith("2.") else ".json")
    predictor = paddle.inference.create_predictor(paddle.inference.Config(model, path + ".pdiparams"))
    with pytest.raises(ValueError, match=r"x: expected|tensor \(X\) is not initialized"):  # the latter on Paddle 2.6
        predictor.run()
