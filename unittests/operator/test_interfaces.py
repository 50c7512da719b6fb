"""The operators as programs know them, called without the package's functions: names, checks, attributes, gradients."""

import ctypes
import os
import socket
import struct

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
import reference
from paddle_fused_attention import _op
from paddle_fused_attention._attention import Attention, attention, attention_with_weights

PRE_LAYER_NORM, FINAL_LAYER_NORM, ADD_RESIDUAL, UPSCALE, SAVE, FIXED_SEED = 1, 2, 4, 16, 32, 64
NEEDS_GRAD_HOLDS, GATED, TRANSPOSE_X, TRANSPOSE_WEIGHT = 128, 256, 512, 1024
COMMON = ("is_test", "switches", "present", "needs_grad")

# Saved programs know inputs and attributes by these names, in this order.
OPERATORS = {
    "custom_fused_attention": (
        "X QKVWeight LinearWeight PreLnScale PreLnBias LnScale LnBias QKVBias LinearBias AttnMask",
        "pre_ln_epsilon ln_epsilon dropout_rate attn_dropout_rate seed first_head total_heads",
    ),
    "custom_fused_attention_general": (
        "X QKVWeight LinearWeight PreLnScale PreLnBias LnScale LnBias QKVBias LinearBias AttnMask CuSeqlens",
        "pre_ln_epsilon ln_epsilon dropout_rate attn_dropout_rate seed first_head total_heads scale window_left "
        "window_right max_seqlen",
    ),
    "custom_attention": (
        "Query Key Value AttnMask CuSeqlensQ CuSeqlensK StartendRowIndices",
        "scale dropout_rate seed window_left window_right max_seqlen_q max_seqlen_k first_head total_heads "
        "num_kv_heads",
    ),
    "custom_fused_feedforward": (
        "X Linear1Weight Linear2Weight Ln1Scale Ln1Bias Ln2Scale Ln2Bias Linear1Bias Linear2Bias",
        "ln1_epsilon ln2_epsilon dropout1_rate dropout2_rate seed activation first_hidden total_hidden",
    ),
    "custom_residual_norm": ("X Residual Bias LnScale LnBias", "ln_epsilon dropout_rate seed"),
    "custom_fused_linear": ("X Weight Bias", "activation"),
}
INPUTS = {op: inputs.split() for op, (inputs, _) in OPERATORS.items()}
ATTRIBUTES = {op: (*COMMON, *attributes.split()) for op, (_, attributes) in OPERATORS.items()}
REQUIRED = {
    "custom_fused_attention": 3,
    "custom_fused_attention_general": 3,
    "custom_attention": 1,  # key and value may lie behind query
    "custom_fused_feedforward": 3,
    "custom_residual_norm": 1,
    "custom_fused_linear": 2,
}
ACTIVATIONS = {
    0: lambda x: x,
    1: F.relu,
    2: F.gelu,
    3: lambda x: F.gelu(x, approximate=True),
    4: F.silu,
}


def bits(number):
    return struct.unpack("<q", struct.pack("<d", number))[0]


def attributes_of(op, present, **values):
    values = {"present": sum(1 << i for i, there in enumerate(present) if there), **values}
    numbers = [values.get(name, 0) for name in ATTRIBUTES[op]]
    return [bits(n) if isinstance(n, float) else n for n in numbers]


def call(op, tensors, **values):
    """The operator in dygraph, of tensors or None in order."""
    numbers = attributes_of(op, [tensor is not None for tensor in tensors], **values)
    absent = paddle.to_tensor([0.0], dtype="float32")
    tensors = [absent if tensor is None else tensor for tensor in tensors]
    return _op._run_custom_op(op, *tensors, bool(numbers[0]), *numbers[1:])[0]


def refusal(op, shapes, dtypes=None, **values):
    """What the library's check says of shapes, None for an absent input; None if nothing."""
    check = getattr(_op.library, f"{op}_check")
    check.restype = ctypes.c_char_p
    dtypes = dtypes or ["float32"] * len(shapes)
    names = [b"" if shape is None else dtype.encode() for shape, dtype in zip(shapes, dtypes)]
    sizes = [size for shape in shapes for size in shape or ()]
    numbers = attributes_of(op, [shape is not None for shape in shapes], **values)
    message = check(
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_int32 * len(shapes))(*[len(shape or ()) for shape in shapes]),
        (ctypes.c_char_p * len(names))(*names),
        (ctypes.c_int64 * len(numbers))(*numbers),
    )
    return message and message.decode()


def tensors_of(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [
        None if shape is None else paddle.to_tensor(rng.standard_normal(shape), dtype="float64", stop_gradient=False)
        for shape in shapes
    ]


def check_like(out, expected, tensors):
    """Out and all gradients of the given tensors are like those of ordinary operators."""
    tensors = [tensor for tensor in tensors if tensor is not None]
    d_out = paddle.to_tensor(np.random.default_rng(9).standard_normal(expected.shape), dtype="float64")
    wanted = paddle.grad([expected], tensors, [d_out])
    got = paddle.grad([out], tensors, [d_out])
    np.testing.assert_allclose(out.numpy(), expected.numpy(), rtol=1e-9, atol=1e-10)
    for a, b in zip(got, wanted):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("op", OPERATORS)
def test_names_and_order_stay(op):
    proto = paddle.base.framework.OpProtoHolder.instance().get_op_proto(op)
    assert [entry.name for entry in proto.inputs] == INPUTS[op]
    assert [entry.name for entry in proto.outputs] == ["Out", "Saved"]
    assert tuple(entry.name for entry in proto.attrs)[: len(ATTRIBUTES[op])] == ATTRIBUTES[op]


KEYS_BY_HEAD = 2048
SHARED = [  # shapes of query, key and value, and what the message must hold
    (((2, 5, 7, 4), None, None), {}, "num_heads + 2 * num_kv_heads"),
    (((2, 5, 6, 4), None, None), {"num_kv_heads": 3}, "num_heads + 2 * num_kv_heads"),
    (((2, 5, 7, 4), None, None), {"num_kv_heads": 2}, "num_heads + 2 * num_kv_heads"),
    (((2, 5, 6, 4), None, None), {"num_kv_heads": -1}, "num_kv_heads: expected 0 or more"),
    (((2, 5, 6, 4), None, None), {"num_kv_heads": 2**31}, "num_kv_heads: expected 0 or more"),
    (((2, 5, 6, 4), None, None), {"num_kv_heads": 2**63 - 1}, "num_kv_heads: expected 0 or more"),
    (((2, 5, 6, 4), None, None), {"num_kv_heads": 2**31 - 1}, "num_heads + 2 * num_kv_heads"),
    (((2, 5, 6, 4), None, None), {"num_kv_heads": 4}, "num_heads + 2 * num_kv_heads"),
    (((2, 5, 4, 4), None, (2, 5, 3, 4)), {}, "num_heads + num_kv_heads"),
    (((2, 5, 4, 4), None, (2, 5, 6, 4)), {}, "num_heads + num_kv_heads"),
    (((2, 5, 4, 4), None, (2, 6, 2, 4)), {}, "value: expected shape [batch, keys, num_kv_heads, head_dim]"),
    (((2, 5, 4, 4), (2, 6, 3, 4), None), {}, "key: expected shape [batch, keys, 2 * num_kv_heads, head_dim]"),
    (((2, 5, 4, 4), (2, 3, 6, 4), (2, 3, 6, 4)), {"switches": KEYS_BY_HEAD}, "[batch, num_kv_heads, keys, head_dim]"),
    (((2, 5, 6, 4), None, None), {"switches": KEYS_BY_HEAD}, "key: expected a tensor of its own"),
    (((2, 5, 4, 4), (2, 6, 2, 4), (2, 6, 2, 4)), {"first_head": 2}, "first_head"),
    (((2, 5, 4, 4), (2, 6, 2, 4), (2, 6, 2, 4)), {"first_head": 2, "total_heads": 5}, "first_head"),
    (((2, 5, 4, 4), (2, 6, 2, 4), (2, 6, 2, 4)), {"first_head": 2**62, "total_heads": 2**62}, "first_head"),
]


@pytest.mark.parametrize("shapes, values, words", SHARED, ids=str)
def test_tensors_that_cannot_be_shared_out(shapes, values, words):
    assert words in refusal("custom_attention", [*shapes, *[None] * 4], **values)


@pytest.mark.parametrize(
    "shapes, values",
    [
        (((2, 5, 9, 4), None, None), {}),
        (((-1, -1, 9, 4), None, None), {}),
        (((2, 5, 10, 4), None, None), {"num_kv_heads": 1}),
        (((2, 5, 6, 4), None, (2, 5, 2, 4)), {}),
        (((2, -1, 4, 4), (2, -1, 4, 4), None), {}),
        (((2, 5, 4, 4), (2, 2, 6, 4), (2, 2, 6, 4)), {"switches": KEYS_BY_HEAD}),
        (((2, 5, 4, 4), (2, 6, 2, 4), (2, 6, 2, 4)), {"first_head": 4, "total_heads": 8}),
    ],
    ids=str,
)
def test_tensors_that_are_shared_out(shapes, values):
    assert refusal("custom_attention", [*shapes, *[None] * 4], **values) is None


@pytest.mark.parametrize(("op", "i"), [(op, i) for op, count in REQUIRED.items() for i in range(count)])
def test_an_absent_required_input_is_refused(op, i):
    given = {
        "custom_fused_attention": [(2, 3, 8), (3, 2, 4, 8), (8, 8)],
        "custom_fused_attention_general": [(2, 3, 8), (3, 2, 4, 8), (8, 8)],
        "custom_attention": [(2, 3, 2, 4), (2, 5, 1, 4), (2, 5, 1, 4)],
        "custom_fused_feedforward": [(2, 3, 8), (8, 16), (16, 8)],
        "custom_residual_norm": [(2, 3, 8)],
        "custom_fused_linear": [(2, 3, 8), (8, 4)],
    }[op]
    shapes = [*given, *[None] * (len(INPUTS[op]) - len(given))]
    assert refusal(op, shapes, activation=1) is None
    shapes[i] = None
    assert f"[{op}] TypeError: " in refusal(op, shapes, activation=1)
    with pytest.raises(Exception, match=r"expected a tensor, got none"):
        call(op, tensors_of(*shapes), activation=1)


X, W1, W2 = (2, 3, 8), (8, 16), (16, 8)


@pytest.mark.parametrize(
    ("op", "shapes", "values", "message"),
    [
        ("custom_fused_feedforward", [(), W1, W2], {}, "ValueError: x: expected shape [..., embed_dim], got []"),
        (
            "custom_fused_feedforward",
            [(2, 0), W1, W2],
            {},
            "ValueError: x: expected embed_dim of at least 1, got [2, 0]",
        ),
        (
            "custom_fused_feedforward",
            [X, (7, 16), W2],
            {},
            "ValueError: linear1_weight: expected shape [8, hidden_dim] with hidden_dim of at least 1 for x of shape "
            "[2, 3, 8], got [7, 16]",
        ),
        (
            "custom_fused_feedforward",
            [X, (8, 15), W2],
            {"switches": GATED},
            "ValueError: linear1_weight: expected shape [8, 2 * hidden_dim] of both halves of a gated activation with "
            "hidden_dim of at least 1 for x of shape [2, 3, 8], got [8, 15]",
        ),
        (
            "custom_fused_feedforward",
            [X, W1, W2],
            {"switches": GATED},
            "ValueError: linear2_weight: expected shape [8, 8] for x of shape [2, 3, 8] and linear1_weight of shape "
            "[8, 16], got [16, 8]",
        ),
        (
            "custom_fused_feedforward",
            [X, W1, W2],
            {"first_hidden": 20, "total_hidden": 32},
            "ValueError: linear1_weight: expected hidden numbers among the 32 in all, got 16 from number 20",
        ),
        (
            "custom_fused_feedforward",
            [X, W1, W2],
            {"activation": 5},
            "ValueError: activation: expected a number from 1 to 4, got 5",
        ),
        (
            "custom_residual_norm",
            [X, (2, 3, 7)],
            {},
            "ValueError: residual: expected shape [2, 3, 8] for x of shape [2, 3, 8], got [2, 3, 7]",
        ),
        (
            "custom_residual_norm",
            [X, X, (7,)],
            {},
            "ValueError: bias: expected shape [8] for x of shape [2, 3, 8], got [7]",
        ),
        (
            "custom_fused_linear",
            [X, (8, 4)],
            {"switches": TRANSPOSE_WEIGHT},
            "ValueError: weight: expected shape [out_features, 8], as it is transposed, with out_features of at least "
            "1 for x of shape [2, 3, 8], got [8, 4]",
        ),
        (
            "custom_fused_linear",
            [X, (8, 4)],
            {"switches": TRANSPOSE_X},
            "ValueError: x: expected shape [in_features, rows], as it is transposed, got [2, 3, 8]",
        ),
        (
            "custom_fused_linear",
            [X, (8, 4), (5,)],
            {},
            "ValueError: bias: expected shape [4] for x of shape [2, 3, 8] and weight of shape [8, 4], got [5]",
        ),
        ("custom_fused_linear", [X, (8, 4)], {"activation": -1}, "activation: expected a number from 0 to 4, got -1"),
    ],
)
def test_shapes_are_refused(op, shapes, values, message):
    values = {"activation": 1, **values}
    shapes = [*shapes, *[None] * (len(INPUTS[op]) - len(shapes))]
    assert message in refusal(op, shapes, **values)
    if None not in (shapes[0] or [None]):
        with pytest.raises(Exception) as error:
            call(op, tensors_of(*shapes), **values)
        assert message in str(error.value).replace("\n", " ")


@pytest.mark.parametrize(
    ("op", "shapes", "dtypes", "message"),
    [
        (
            "custom_fused_feedforward",
            [X, W1, W2],
            ["float32", "float64", "float64"],
            "TypeError: linear1_weight: expected float32 like x, float16 or bfloat16, got float64",
        ),
        (
            "custom_fused_feedforward",
            [X, W1, W2],
            ["float32", "float16", "bfloat16"],
            "TypeError: linear2_weight: expected float16 like linear1_weight, got bfloat16",
        ),
        (
            "custom_residual_norm",
            [X, X],
            ["float16", "float32"],
            "TypeError: residual: expected float16 like x, got float32",
        ),
        (
            "custom_fused_linear",
            [X, (8, 4)],
            ["float32", "float16"],
            "TypeError: weight: expected float32 like x, got float16",
        ),
        (
            "custom_fused_linear",
            [X, (8, 4)],
            ["int32"] * 2,
            "x: expected float32, float64, float16 or bfloat16, got int32",
        ),
    ],
)
def test_dtypes_are_refused(op, shapes, dtypes, message):
    padding = [None] * (len(INPUTS[op]) - len(shapes))
    assert message in refusal(op, [*shapes, *padding], [*dtypes, *[""] * len(padding)], activation=1)


def test_unknown_dimensions_agree_with_anything():
    assert refusal("custom_fused_feedforward", [(-1, -1, 8), (8, -1), (-1, 8)] + [None] * 6, activation=1) is None
    assert refusal("custom_fused_feedforward", [(-1, -1, -1), W1, W2] + [None] * 6, activation=1) is None
    assert refusal("custom_residual_norm", [(-1, 8), (4, 8), (8,), (-1,), None]) is None
    assert refusal("custom_fused_linear", [(-1, -1), (8, 4), (4,)], switches=TRANSPOSE_X) is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("transposes", [0, TRANSPOSE_X, TRANSPOSE_WEIGHT, TRANSPOSE_X | TRANSPOSE_WEIGHT])
@pytest.mark.parametrize("switches", [NEEDS_GRAD_HOLDS | SAVE, NEEDS_GRAD_HOLDS, 0])
def test_linear(activation, transposes, switches):
    x, weight, bias = tensors = tensors_of(
        (6, 5) if transposes & TRANSPOSE_X else (5, 6), (3, 6) if transposes & TRANSPOSE_WEIGHT else (6, 3), (3,)
    )
    product = paddle.matmul(x, weight, bool(transposes & TRANSPOSE_X), bool(transposes & TRANSPOSE_WEIGHT))
    out = call("custom_fused_linear", tensors, switches=switches | transposes, needs_grad=7, activation=activation)
    check_like(out, ACTIVATIONS[activation](product + bias), tensors)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 4, 6)])
def test_linear_of_any_rank(shape):
    tensors = tensors_of(shape, (6, 3), None)
    out = call("custom_fused_linear", tensors, switches=SAVE | NEEDS_GRAD_HOLDS, needs_grad=3)
    assert out.shape == [*shape[:-1], 3]
    check_like(out, paddle.matmul(tensors[0], tensors[1]), tensors)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_of_no_rows(activation):
    tensors = tensors_of((2, 0, 6), (6, 3), (3,))
    out = call("custom_fused_linear", tensors, switches=SAVE, activation=activation)
    assert out.shape == [2, 0, 3]
    d_x, d_weight, d_bias = paddle.grad([out], tensors, [paddle.zeros_like(out)])
    assert d_x.shape == [2, 0, 6]
    np.testing.assert_array_equal(d_weight.numpy(), np.zeros((6, 3)))
    np.testing.assert_array_equal(d_bias.numpy(), np.zeros(3))


def feed_forward(tensors, gated, activation, switches):
    x, w1, w2, s1, b1, s2, b2, bias1, bias2 = tensors
    h = F.layer_norm(x, [8], s1, b1, 2**-10) if switches & PRE_LAYER_NORM else x
    u = paddle.matmul(h, w1) + bias1
    if gated:
        a, b = paddle.split(u, 2, axis=-1)
        u = ACTIVATIONS[activation](a) * b
    else:
        u = ACTIVATIONS[activation](u)
    z = paddle.matmul(u, w2) + bias2
    if switches & ADD_RESIDUAL:
        z = z + x
    return F.layer_norm(z, [8], s2, b2, 2**-13) if switches & FINAL_LAYER_NORM else z


@pytest.mark.parametrize("activation", [1, 2, 3, 4])
@pytest.mark.parametrize("gated", [0, GATED])
@pytest.mark.parametrize("norms", [PRE_LAYER_NORM, FINAL_LAYER_NORM | ADD_RESIDUAL, 7])
def test_feed_forward(activation, gated, norms):
    width = 32 if gated else 16
    tensors = tensors_of(X, (8, width), W2, (8,), (8,), (8,), (8,), (width,), (8,))
    if not norms & PRE_LAYER_NORM:
        given = [*tensors[:3], None, None, *tensors[5:]]
    elif not norms & FINAL_LAYER_NORM:
        given = [*tensors[:5], None, None, *tensors[7:]]
    else:
        given = tensors
    switches = norms | gated | UPSCALE | SAVE
    out = call(
        "custom_fused_feedforward",
        given,
        switches=switches,
        activation=activation,
        ln1_epsilon=2**-10,
        ln2_epsilon=2**-13,
        dropout1_rate=0.0,
        dropout2_rate=0.0,
    )
    check_like(out, feed_forward(tensors, gated, activation, norms), given)


@pytest.mark.parametrize("gated", [0, GATED])
def test_parts_of_the_hidden_numbers_sum_to_the_whole(gated):
    """With dropout: its numbers are those of the whole."""
    x, w1, w2 = tensors_of(X, (8, 32 if gated else 16), W2)
    values = {"switches": UPSCALE | SAVE | FIXED_SEED | gated, "activation": 2, "seed": 5, "dropout1_rate": 0.5}
    whole = call("custom_fused_feedforward", [x, w1, w2] + [None] * 6, **values)
    halves = paddle.split(w1, 2, axis=1) if gated else [w1]
    parts = 0
    for first, last in ((0, 6), (6, 16)):
        columns = paddle.concat([half[:, first:last] for half in halves], axis=1)
        parts += call(
            "custom_fused_feedforward",
            [x, columns, w2[first:last]] + [None] * 6,
            first_hidden=first,
            total_hidden=16,
            **values,
        )
    np.testing.assert_allclose(parts.numpy(), whole.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", [31, 1, 3, 5, 29])
@pytest.mark.parametrize("norm", [0, FINAL_LAYER_NORM])
@pytest.mark.parametrize("saves", [0, SAVE])
def test_residual_norm(given, norm, saves):
    shapes = [(2, 3, 8), (2, 3, 8), (8,), (8,), (8,)]
    if not norm:
        given &= 7
    tensors = tensors_of(*[shape if given >> i & 1 else None for i, shape in enumerate(shapes)])
    x, residual, bias, scale, shift = tensors
    out = call(
        "custom_residual_norm",
        tensors,
        switches=norm | UPSCALE | saves | FIXED_SEED,
        seed=11,
        ln_epsilon=2**-10,
        dropout_rate=0.25,
    )
    kept = (reference.output_random(11, 0, 6, 8) >= 16384).reshape(2, 3, 8) / 0.75
    z = (x if bias is None else x + bias) * paddle.to_tensor(kept, dtype="float64")
    if residual is not None:
        z = z + residual
    check_like(out, F.layer_norm(z, [8], scale, shift, 2**-10) if norm else z, tensors)


@pytest.mark.parametrize("op", ["custom_fused_feedforward", "custom_residual_norm", "custom_fused_linear"])
def test_second_order_gradients_are_refused(op):
    shapes = {
        "custom_fused_feedforward": [X, W1, W2] + [None] * 6,
        "custom_residual_norm": [X, X, None, None, None],
        "custom_fused_linear": [X, (8, 4), None],
    }[op]
    tensors = tensors_of(*shapes)
    out = call(op, tensors, switches=SAVE, activation=1, dropout1_rate=0.0)
    (gradient,) = paddle.grad([out], [tensors[0]], create_graph=True)
    with pytest.raises(Exception, match=f"{op} has no second-order gradient"):
        paddle.grad([gradient.sum()], [tensors[0]])


@pytest.mark.parametrize("op", ["custom_fused_feedforward", "custom_residual_norm", "custom_fused_linear"])
def test_the_twin_gives_the_same_bits(op):
    shapes = {
        "custom_fused_feedforward": [X, W1, W2] + [None] * 6,
        "custom_residual_norm": [X, X, None, None, None],
        "custom_fused_linear": [X, (8, 4), None],
    }[op]
    tensors = tensors_of(*shapes)
    numbers = attributes_of(op, [shape is not None for shape in shapes], switches=SAVE | FIXED_SEED, activation=2)
    absent = paddle.to_tensor([0.0], dtype="float32")
    filled = [absent if tensor is None else tensor for tensor in tensors]
    twin = _op._run_custom_op(f"{op}_forward", *filled, bool(numbers[0]), *numbers[1:])[0]
    assert twin.stop_gradient
    out = call(op, tensors, switches=SAVE | FIXED_SEED, activation=2)
    np.testing.assert_array_equal(twin.numpy(), out.numpy())


has_sharding_rules = os.path.exists(f"{paddle.sysconfig.get_include()}/paddle/phi/api/ext/spmd_infer.h")


@pytest.fixture
def mesh(monkeypatch):
    """Of one process, with two axes."""
    from paddle import distributed

    # Paddle 3.0 reads these before it sums over an axis, though that has one process only.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", address)
    monkeypatch.setenv("PADDLE_CURRENT_ENDPOINT", address)
    return distributed.ProcessMesh([[0]], dim_names=["rows", "parts"])


HEADS = (2, 3, 4, 8)


@pytest.mark.skipif(not has_sharding_rules, reason="this Paddle has no sharding rules for custom operators")
@pytest.mark.parametrize(
    ("op", "shapes", "placed", "values", "wanted"),
    [
        (
            "custom_attention",
            [HEADS, HEADS, HEADS, (2, 1, 3, 3), None, None, None],
            [(0, None), (), (), (), (), (), ()],
            {"switches": SAVE | NEEDS_GRAD_HOLDS, "needs_grad": 15, "scale": 0.5},
            [(0, None), (0, None), (0, None), (0, None), (0, None)],
        ),
        (
            "custom_fused_attention_general",
            [X, (3, 2, 4, 8), (8, 8), None, None, None, None, (3, 2, 4), None, (2, 1, 3, 3), None],
            [(0, None), (), (), (), (), (), (), (), (), (), ()],
            {"switches": SAVE | NEEDS_GRAD_HOLDS, "needs_grad": 1 | 2 | 4 | 128 | 512, "scale": 0.5},
            [(0, None), (0, None), ("+", None), ("+", None), ("+", None), (0, None)],
        ),
        (  # a mask of all sequences
            "custom_attention",
            [HEADS, HEADS, HEADS, (4, 3, 3), None, None, None],
            [(0, None), (), (), (), (), (), ()],
            {"switches": SAVE | NEEDS_GRAD_HOLDS, "needs_grad": 15, "scale": 0.5},
            [(0, None), (0, None), (0, None), (0, None), ("+", None)],
        ),
        (
            "custom_fused_feedforward",
            [X, W1, W2, (8,), (8,), None, None, (16,), None],
            [(0, None), (None, 1), (None, 0), (), (), (), (), (None, 0), ()],
            {"switches": SAVE | PRE_LAYER_NORM, "total_hidden": 32},
            [(0, "+"), (0, "+"), ("+", 1), ("+", 0), ("+", "+"), ("+", "+"), ("+", 0)],
        ),
        (  # the weights hold all hidden numbers
            "custom_fused_feedforward",
            [X, W1, W2, None, None, None, None, None, None],
            [(1, None), (None, 1), (None, 0), (), (), (), (), (), ()],
            {"switches": SAVE},
            [(1, None), (1, None), ("+", None), ("+", None)],
        ),
        (
            "custom_residual_norm",
            [X, X, (8,), None, None],
            [(1, None), (), (), (), ()],
            {"switches": SAVE},
            [(1, None), (1, None), (1, None), ("+", None)],
        ),
        (
            "custom_fused_linear",
            [(6, 5), (6, 3), (3,)],
            [(1, None), (None, 1), ()],
            {"switches": SAVE | TRANSPOSE_X},
            [(0, None), (1, None), ("+", None), ("+", None)],
        ),
        (
            "custom_fused_linear",
            [X, (8, 4), (4,)],
            [(0, 2), (), ()],
            {"switches": SAVE},
            [(0, None), (0, None), ("+", None), ("+", None)],
        ),
    ],
)
def test_what_stays_spread_over_a_mesh(op, shapes, placed, values, wanted, mesh):
    """`wanted` is of Out and of each gradient: the dimension that is sharded, or a part of a sum, on both axes."""
    from paddle import distributed

    whole = [distributed.Replicate(), distributed.Replicate()]
    tensors = []
    for tensor, axes in zip(tensors_of(*shapes), placed):
        if tensor is not None:
            placements = [distributed.Replicate() if axis is None else distributed.Shard(axis) for axis in axes]
            tensor = distributed.shard_tensor(tensor, mesh, placements or whole, stop_gradient=False)
        tensors.append(tensor)
    out = call(op, tensors, activation=2, **values)
    d_out = distributed.shard_tensor(paddle.ones(out.shape, dtype="float64"), mesh, whole)
    gradients = paddle.grad([out], [tensor for tensor in tensors if tensor is not None], [d_out])

    def on_axis(placement):
        return "+" if placement.is_partial() else placement.get_dim() if placement.is_shard() else None

    assert [tuple(map(on_axis, tensor.placements)) for tensor in (out, *gradients)] == wanted


@pytest.mark.skipif(not has_sharding_rules, reason="this Paddle has no sharding rules for custom operators")
def test_attention_and_its_weights_over_a_mesh(mesh):
    """The same numbers, recorded or not."""
    from paddle import distributed

    def results(placed):
        tensors = [placed(tensor) for tensor in tensors_of(HEADS, HEADS, HEADS)]
        description = Attention(*tensors, scale=0.5).checked()
        out, weights = attention_with_weights(description)
        gradients = paddle.grad([(out * out).sum() + (weights * weights).sum()], tensors)
        with paddle.no_grad():
            return [out, weights, *gradients, attention(description), *attention_with_weights(description)]

    placements = [distributed.Shard(0), distributed.Replicate()]
    spread = results(lambda tensor: distributed.shard_tensor(tensor, mesh, placements, stop_gradient=False))
    for tensor, expected in zip(spread, results(lambda tensor: tensor)):
        assert tensor.placements == placements
        np.testing.assert_array_equal(tensor._local_value().numpy(), expected.numpy())
