"""incubate.functional.fused_multi_head_attention against Paddle's signature and documented meaning."""

import inspect

import numpy as np
import paddle
import pytest
import runners
from built_in import (
    BATCH,
    BUILT_IN,
    BUILT_IN_FUNCTION,
    EMBED,
    HEAD_DIM,
    HEADS,
    NORM,
    SEQ,
    check,
    composed,
    draw_arrays,
    to_tensors,
)
from paddle_fused_attention import incubate
from paddle_fused_attention.incubate.functional import fused_multi_head_attention


def gradients_of(out, tensors, names):
    rng = np.random.default_rng(7)
    d_out = paddle.to_tensor(rng.standard_normal(out.shape).astype(str(out.dtype).split(".")[-1]))
    found = paddle.grad([out], [tensors[name] for name in names], grad_outputs=[d_out], allow_unused=True)
    return dict(zip(names, found))


@pytest.mark.parametrize(
    "ours, theirs", [(fused_multi_head_attention, BUILT_IN_FUNCTION), (incubate.FusedMultiHeadAttention, BUILT_IN)]
)
def test_signatures(ours, theirs):
    def form(parameters):
        return [(p.name, p.kind, p.default) for p in parameters.values()]

    assert form(inspect.signature(ours).parameters) == form(inspect.signature(theirs).parameters)
    if inspect.isclass(ours):
        assert form(inspect.signature(ours.forward).parameters) == form(inspect.signature(theirs.forward).parameters)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("add_residual", [True, False])
@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_function(pre_layer_norm, add_residual, dtype):
    """One layer norm, where pre_layer_norm says; the other's parameters are unused."""
    arrays = draw_arrays(dtype)
    mask = np.random.default_rng(1).standard_normal((BATCH, 1, SEQ, SEQ)).astype(dtype)
    switches = dict(pre_layer_norm=pre_layer_norm, add_residual=add_residual, pre_ln_epsilon=1e-3, ln_epsilon=5e-4)
    wanted = [name for name in arrays if name not in (NORM[2:] if pre_layer_norm else NORM[:2])]
    results = []
    for function, more in ((fused_multi_head_attention, dict(dropout_rate=0.0, attn_dropout_rate=0.0)), (composed, {})):
        tensors = to_tensors(arrays)
        out = function(**tensors, attn_mask=paddle.to_tensor(mask), **switches, **more)
        out = out if isinstance(out, paddle.Tensor) else out[0]
        results.append((out, gradients_of(out, tensors, wanted)))
    (out, gradients), (expected, expected_gradients) = results
    check("out", out.numpy(), expected.numpy(), dtype)
    for name in wanted:
        check(name, gradients[name].numpy(), expected_gradients[name].numpy(), dtype)


def test_positional_arguments():
    a = to_tensors(draw_arrays())
    mask = paddle.to_tensor(np.random.default_rng(1).standard_normal((BATCH, HEADS, SEQ, SEQ)))
    out = fused_multi_head_attention(
        a["x"], a["qkv_weight"], a["linear_weight"], False, None, None, a["ln_scale"], a["ln_bias"], 1e-5,
        a["qkv_bias"], a["linear_bias"], None, mask, 0.3, 0.3, 1e-5, False, "upscale_in_train", -1, True, -1, False,
        None,
    )  # fmt: skip
    used = {name: t for name, t in a.items() if not name.startswith("pre_")}
    check("out", out.numpy(), composed(**used, attn_mask=mask)[0].numpy())


@pytest.mark.parametrize("absent", [(), ("qkv_bias",)])
def test_transpose_qkv_wb(absent):
    """[E, 3E] and [3E], with columns in the order 3, H, D; their gradients have that form too."""
    arrays = draw_arrays(absent=("pre_ln_scale", "pre_ln_bias", *absent))
    packed, flat = to_tensors(arrays), dict(arrays)
    flat["qkv_weight"] = np.ascontiguousarray(arrays["qkv_weight"].reshape(3 * EMBED, EMBED).T)
    if "qkv_bias" in flat:
        flat["qkv_bias"] = arrays["qkv_bias"].reshape(3 * EMBED)
    flat = to_tensors(flat)
    out = fused_multi_head_attention(
        **flat, num_heads=HEADS, transpose_qkv_wb=True, dropout_rate=0.0, attn_dropout_rate=0.0
    )
    expected, _ = composed(**packed)
    check("out", out.numpy(), expected.numpy())
    gradients = gradients_of(out, flat, list(flat))
    for name, gradient in gradients_of(expected, packed, list(packed)).items():
        gradient = gradient.numpy()
        if name == "qkv_weight":
            gradient = gradient.reshape(3 * EMBED, EMBED).T
        check(name, gradients[name].numpy(), gradient.reshape(gradients[name].shape))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("mode", ["upscale_in_train", "downscale_in_infer"])
def test_modes(mode, cached):
    """Outside training the second mode scales what both dropouts let through."""
    tensors = to_tensors(draw_arrays(absent=NORM))
    arguments = dict(pre_layer_norm=True, add_residual=False)
    if cached:
        arguments["cache_kv"] = paddle.zeros([2, BATCH, HEADS, 0, HEAD_DIM], "float64")
    out = fused_multi_head_attention(
        **tensors, **arguments, dropout_rate=0.25, attn_dropout_rate=0.5, training=False, mode=mode
    )
    out = out[0] if cached else out
    bias = tensors.pop("linear_bias")
    heads, _ = composed(**tensors, pre_layer_norm=True, add_residual=False)
    expected = heads + bias if mode == "upscale_in_train" else 0.75 * (0.5 * heads + bias)
    check("out", out.numpy(), expected.numpy())


def test_training_drops_and_evaluation_does_not():
    tensors = to_tensors(draw_arrays(absent=NORM))
    arguments = dict(pre_layer_norm=True, attn_dropout_rate=0.0, dropout_rate=0.5)
    kept, _ = composed(**tensors, pre_layer_norm=True, add_residual=False)
    paddle.seed(1)
    dropped = (fused_multi_head_attention(**tensors, **arguments) - tensors["x"]).numpy()
    is_kept = np.isclose(dropped, 2 * kept.numpy())
    assert 0.3 < is_kept.mean() < 0.7 and np.abs(dropped[~is_kept]).max() < 1e-12
    paddle.seed(1)
    again = fused_multi_head_attention(**tensors, **arguments) - tensors["x"]
    np.testing.assert_array_equal(dropped, again.numpy())
    cached, _ = fused_multi_head_attention(
        **tensors, **arguments, cache_kv=paddle.zeros([2, BATCH, HEADS, 0, HEAD_DIM], "float64")
    )
    is_kept = np.isclose((cached - tensors["x"]).numpy(), 2 * kept.numpy())
    assert 0.3 < is_kept.mean() < 0.7


def test_random_seed_of_the_program():
    """As Paddle's function, ours takes the default program's seed for its own if there is one."""
    tensors = to_tensors(draw_arrays(absent=NORM))
    program = paddle.static.default_main_program()
    assert program.random_seed == 0
    try:
        program.random_seed = 11
        first, second = (fused_multi_head_attention(**tensors).numpy() for _ in range(2))
        program.random_seed = 12
        third = fused_multi_head_attention(**tensors).numpy()
    finally:
        program.random_seed = 0
    np.testing.assert_array_equal(first, second)
    assert (first != third).any()
    assert (fused_multi_head_attention(**tensors).numpy() != fused_multi_head_attention(**tensors).numpy()).any()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("transpose_qkv_wb", [False, True])
def test_static(transpose_qkv_wb, cached):
    arrays = draw_arrays()
    if transpose_qkv_wb:
        arrays["qkv_weight"] = np.ascontiguousarray(arrays["qkv_weight"].reshape(3 * EMBED, EMBED).T)
        arrays["qkv_bias"] = arrays["qkv_bias"].reshape(3 * EMBED)
    arguments = dict(training=False, num_heads=HEADS, transpose_qkv_wb=transpose_qkv_wb)
    if cached:
        arrays["cache_kv"] = np.random.default_rng(3).standard_normal((2, BATCH, HEADS, 4, HEAD_DIM))
    arrays["attn_mask"] = np.random.default_rng(4).random((SEQ, SEQ + 4 * cached)) < 0.7
    expected = fused_multi_head_attention(**to_tensors(arrays), **arguments)
    unknown = {"x": (0, 1), "cache_kv": (1, 3), "attn_mask": (0, 1)}
    with runners.static_mode():
        program = paddle.static.Program()
        with paddle.static.program_guard(program, paddle.static.Program()):
            variables = {}
            for name, a in arrays.items():
                shape = [-1 if axis in unknown.get(name, ()) else n for axis, n in enumerate(a.shape)]
                variables[name] = paddle.static.data(name, shape, str(a.dtype))
            out = fused_multi_head_attention(**variables, **arguments)
        found = paddle.static.Executor(paddle.CPUPlace()).run(
            program, feed=arrays, fetch_list=list(out) if cached else [out]
        )
    for actual, wanted in zip(found, expected if cached else [expected]):
        check("out", actual, wanted.numpy())


ERRORS = [
    (dict(ring_id=99), ValueError, "ring_id: expected -1 or the id of a group of paddle.distributed.new_group, got 99"),
    (dict(mode="up"), ValueError, "mode: expected"),
    (dict(x=None), TypeError, "x: expected a Tensor"),
    (dict(x=np.zeros([BATCH, EMBED])), ValueError, r"x: expected shape \[batch, seq_len, embed_dim\], got \[2, 12\]"),
    (
        dict(transpose_qkv_wb=True),
        ValueError,
        "num_heads: expected a divisor of embed_dim 12 with transpose_qkv_wb, got -1",
    ),
    (dict(transpose_qkv_wb=True, num_heads="3"), TypeError, "num_heads: expected an int"),
    (
        dict(transpose_qkv_wb=True, num_heads=3),
        ValueError,
        r"qkv_weight: expected shape \[12, 36\] .* got \[3, 3, 4, 12\]",
    ),
    (
        dict(transpose_qkv_wb=True, num_heads=3, qkv_weight=np.zeros([13, 36])),
        ValueError,
        r"qkv_weight: expected shape \[12, 36\] .* got \[13, 36\]",
    ),
    (
        dict(transpose_qkv_wb=True, num_heads=5, qkv_weight=np.zeros([15, 45])),
        ValueError,
        rf"x: expected shape \[batch, seq_len, 15\] for qkv_weight of shape \[15, 45\] .* got \[2, {SEQ}, 12\]",
    ),
    (
        dict(cache_kv=np.zeros([2, BATCH, HEADS, 4])),
        ValueError,
        r"cache_kv: expected shape \[2, 2, 3, length, 4\] .* got \[2, 2, 3, 4\]",
    ),
    (
        dict(cache_kv=np.zeros([2, BATCH, HEADS, 1, HEAD_DIM + 1])),
        ValueError,
        r"cache_kv: expected shape \[2, 2, 3, length, 4\] .* got \[2, 2, 3, 1, 5\]",
    ),
    (
        dict(cache_kv=np.zeros([2, BATCH, HEADS, 1, HEAD_DIM], "float32")),
        TypeError,
        r"cache_kv: expected x's dtype",
    ),
    (dict(cache_kv=(1, 2)), TypeError, "cache_kv: expected a Tensor or None, got tuple"),
    (
        dict(cache_kv=np.zeros([2, BATCH, HEADS, 1, HEAD_DIM]), qkv_weight=np.zeros([3, HEADS, HEAD_DIM, 7])),
        ValueError,
        r"qkv_weight: expected shape \[3, 3, 4, 12\]",
    ),
]


@pytest.mark.parametrize("changes, error, message", ERRORS, ids=lambda value: value if isinstance(value, str) else "")
def test_function_errors(changes, error, message):
    arguments = {**draw_arrays(absent=NORM), **changes}
    arguments = {n: paddle.to_tensor(a) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}
    with pytest.raises(error, match=message):
        fused_multi_head_attention(**arguments)
