"""paddle_fused_attention.incubate against Paddle's signatures, parameters and documented meaning, composed of ordinary ops;
patch() and unpatch()."""

import inspect
import subprocess
import sys

import common
import numpy as np
import paddle
import paddle.nn.functional as F
import paddle_fused_attention
import pytest
import runners
from paddle_fused_attention import incubate, patch, unpatch
from paddle_fused_attention.incubate.functional import fused_multi_head_attention

BATCH, SEQ, HEADS, HEAD_DIM, EMBED = 2, 5, 3, 4, 12
BUILT_IN = paddle.incubate.nn.FusedMultiHeadAttention
BUILT_IN_FUNCTION = paddle.incubate.nn.functional.fused_multi_head_attention
NORM = ("pre_ln_scale", "pre_ln_bias", "ln_scale", "ln_bias")


def draw_arrays(dtype="float64", seed=0, absent=()):
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (BATCH, SEQ, EMBED),
        "qkv_weight": (3, HEADS, HEAD_DIM, EMBED),
        "qkv_bias": (3, HEADS, HEAD_DIM),
        "linear_weight": (EMBED, EMBED),
        "linear_bias": (EMBED,),
        **{name: (EMBED,) for name in NORM},
    }
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items() if name not in absent}


def to_tensors(arrays):
    return {name: paddle.to_tensor(a, stop_gradient=False) for name, a in arrays.items()}


def composed(
    x, qkv_weight, linear_weight, pre_layer_norm=False, qkv_bias=None, linear_bias=None, attn_mask=None, cache_kv=None,
    pre_ln_scale=None, pre_ln_bias=None, ln_scale=None, ln_bias=None, add_residual=True, ln_epsilon=1e-5, pre_ln_epsilon=1e-5,
):  # fmt: skip
    """The pseudo code of Paddle's documentation, without dropout; the new keys and values come along."""
    out = F.layer_norm(x, [EMBED], pre_ln_scale, pre_ln_bias, pre_ln_epsilon) if pre_layer_norm else x
    out = paddle.einsum("bse,thde->tbhsd", out, qkv_weight)
    if qkv_bias is not None:
        out = out + qkv_bias.unsqueeze([1, 3])
    q, k, v = paddle.unbind(out)
    if cache_kv is not None:
        k, v = paddle.concat([cache_kv[0], k], 2), paddle.concat([cache_kv[1], v], 2)
    scores = paddle.einsum("bhsd,bhtd->bhst", q * HEAD_DIM**-0.5, k)
    if attn_mask is not None:
        scores = scores + attn_mask
    out = paddle.einsum("bhst,bhtd->bshd", F.softmax(scores), v).reshape([0, 0, EMBED])
    out = F.linear(out, linear_weight, linear_bias)
    if add_residual:
        out = x + out
    if not pre_layer_norm:
        out = F.layer_norm(out, [EMBED], ln_scale, ln_bias, ln_epsilon)
    return out, paddle.stack([k, v])


def check(name, actual, expected, dtype="float64"):
    common.check_tensor(name, np.asarray(actual, np.float64), np.asarray(expected, np.float64), dtype)


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
        a["x"], a["qkv_weight"], a["linear_weight"], False, None, None, a["ln_scale"], a["ln_bias"], 1e-5, a["qkv_bias"],
        a["linear_bias"], None, mask, 0.3, 0.3, 1e-5, False, "upscale_in_train", -1, True, -1, False, None,
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
    out = fused_multi_head_attention(**flat, num_heads=HEADS, transpose_qkv_wb=True, dropout_rate=0.0, attn_dropout_rate=0.0)
    expected, _ = composed(**packed)
    check("out", out.numpy(), expected.numpy())
    gradients = gradients_of(out, flat, list(flat))
    for name, gradient in gradients_of(expected, packed, list(packed)).items():
        gradient = gradient.numpy()
        if name == "qkv_weight":
            gradient = gradient.reshape(3 * EMBED, EMBED).T
        check(name, gradients[name].numpy(), gradient.reshape(gradients[name].shape))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cached", [0, 1, 6])
@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_cache(pre_layer_norm, cached, dtype):
    arrays = draw_arrays(dtype)
    rng = np.random.default_rng(3)
    cache = paddle.to_tensor(rng.standard_normal((2, BATCH, HEADS, cached, HEAD_DIM)).astype(dtype))
    mask = paddle.to_tensor(rng.standard_normal((BATCH, 1, SEQ, cached + SEQ)).astype(dtype))
    switches = dict(pre_layer_norm=pre_layer_norm, attn_mask=mask, cache_kv=cache)
    out, new_cache = fused_multi_head_attention(**to_tensors(arrays), **switches, training=False)
    expected, expected_cache = composed(**to_tensors(arrays), **switches)
    assert new_cache.shape == [2, BATCH, HEADS, cached + SEQ, HEAD_DIM]
    check("out", out.numpy(), expected.numpy(), dtype)
    check("cache", new_cache.numpy(), expected_cache.numpy(), dtype)


@pytest.mark.parametrize("transpose_qkv_wb", [False, True])
def test_generation_step_by_step(transpose_qkv_wb):
    """A sequence fed in pieces, each attending to what came before, is the operator on all of it with a causal mask."""
    paddle.seed(5)
    layer = incubate.FusedMultiHeadAttention(EMBED, HEADS, transpose_qkv_wb=transpose_qkv_wb)
    layer.eval()
    x = paddle.to_tensor(draw_arrays("float32")["x"])
    causal = paddle.tril(paddle.ones([SEQ, SEQ], "bool"))
    whole = layer(x, attn_mask=causal)
    cache = paddle.zeros([2, BATCH, HEADS, 0, HEAD_DIM])
    pieces = []
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        out, cache = layer(x[:, start:stop], attn_mask=causal[start:stop, :stop], cache=cache)
        pieces.append(out)
    check("out", paddle.concat(pieces, 1).numpy(), whole.numpy(), "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cache_16_bit(dtype):
    tensors = {name: paddle.cast(t, dtype) for name, t in to_tensors(draw_arrays("float32")).items()}
    cache = paddle.cast(paddle.to_tensor(np.random.default_rng(3).standard_normal((2, BATCH, HEADS, 3, HEAD_DIM))), dtype)
    out, new_cache = fused_multi_head_attention(**tensors, cache_kv=cache, training=False)
    assert out.dtype == new_cache.dtype == cache.dtype
    wide = {name: paddle.cast(t, "float64") for name, t in tensors.items()}
    expected, expected_cache = composed(**wide, cache_kv=paddle.cast(cache, "float64"))
    unit = 2 * common.UNIT_ROUNDOFF[dtype]  # Paddle 2.6 casts without rounding
    for actual, wanted in ((out, expected), (new_cache, expected_cache)):
        wanted = wanted.numpy()
        assert np.abs(paddle.cast(actual, "float64").numpy() - wanted).max() <= 1.01 * unit * np.abs(wanted).max()


def test_cache_with_hard_masks():
    """A query that may see neither the cache nor itself gives zeros before the bias, as without a cache."""
    arrays = draw_arrays(absent=NORM)
    keep = np.random.default_rng(2).random((BATCH, HEADS, SEQ, SEQ + 2)) < 0.5
    keep[..., 0] = True
    keep[:, :, 1] = False
    cache = np.random.default_rng(3).standard_normal((2, BATCH, HEADS, 2, HEAD_DIM))
    results = []
    for mask in (keep, keep.astype("int32"), np.where(keep, 0.0, -np.inf)):
        out, _ = fused_multi_head_attention(
            **to_tensors(arrays),
            cache_kv=paddle.to_tensor(cache),
            attn_mask=paddle.to_tensor(mask),
            training=False,
            pre_layer_norm=True,
        )
        results.append(out.numpy())
    check("out", results[0][:, 1], arrays["x"][:, 1] + arrays["linear_bias"])
    finite = composed(
        **to_tensors(arrays),
        cache_kv=paddle.to_tensor(cache),
        attn_mask=paddle.to_tensor(np.where(keep, 0.0, -1e9)),
        pre_layer_norm=True,
    )[0].numpy()
    rows = [0, 2, 3, 4]
    check("out", results[0][:, rows], finite[:, rows])
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


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
        found = paddle.static.Executor(paddle.CPUPlace()).run(program, feed=arrays, fetch_list=list(out) if cached else [out])
    for actual, wanted in zip(found, expected if cached else [expected]):
        check("out", actual, wanted.numpy())


LAYERS = [
    {},
    dict(normalize_before=True),
    dict(transpose_qkv_wb=True),
    dict(qkv_bias_attr=False, linear_bias_attr=False, ln_bias_attr=False),
    dict(normalize_before=True, pre_ln_scale_attr=False, epsilon=1e-3, name="block"),
]


@pytest.mark.parametrize("arguments", LAYERS, ids=str)
def test_layer_has_the_built_in_parameters(arguments):
    """The same initial values, names, shapes and attributes; the built-in's checkpoint loads."""
    layers = []
    for kind in (BUILT_IN, incubate.FusedMultiHeadAttention):
        paddle.seed(21)
        layers.append(kind(EMBED, HEADS, **arguments))
    theirs, ours = layers
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for name, value in ours.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[name].numpy(), name)
        assert value.stop_gradient == state[name].stop_gradient
    for name in ("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "normalize_before", "need_weights", "dropout_rate"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert repr(ours) == repr(theirs)
    state = {name: value + 1.0 for name, value in state.items()}
    missing, unexpected = ours.set_state_dict(state)
    assert not missing and not unexpected
    for name, value in ours.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[name].numpy(), name)


@pytest.mark.parametrize("kind", ["none", "bool", "int64", "uint8", "float32"])
@pytest.mark.parametrize("arguments", LAYERS, ids=str)
def test_layer(arguments, kind):
    paddle.seed(22)
    layer = incubate.FusedMultiHeadAttention(EMBED, HEADS, dropout_rate=0.0, attn_dropout_rate=0.0, **arguments)
    x = paddle.to_tensor(draw_arrays("float32")["x"])
    rng = np.random.default_rng(6)
    keep = rng.random((BATCH, 1, SEQ, SEQ)) < 0.6
    keep[:, :, 2] = False  # Paddle's masks let a query that may see no key attend to all alike
    if kind == "none":
        mask = added = None
    elif kind == "float32":
        mask = added = keep * np.float32(1.5)
    else:
        mask, added = keep.astype(kind), (keep.astype("float32") - 1) * np.float32(1e9)
    out = layer(x, attn_mask=None if mask is None else paddle.to_tensor(mask))
    parameters = dict(layer.named_parameters())
    if layer.transpose_qkv_wb:
        shape = [3, HEADS, HEAD_DIM]
        parameters["qkv_weight"] = layer.qkv_weight.T.reshape([*shape, EMBED])
        parameters["qkv_bias"] = layer.qkv_bias.reshape(shape)
    expected, _ = composed(
        x,
        **parameters,
        pre_layer_norm=layer.normalize_before,
        attn_mask=None if added is None else paddle.to_tensor(added),
        pre_ln_epsilon=arguments.get("epsilon", 1e-5),
    )
    check("out", out.numpy(), expected.numpy(), "float32")
    assert out.shape == [BATCH, SEQ, EMBED]
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("arguments", [{}, dict(normalize_before=True), dict(transpose_qkv_wb=True)], ids=str)
def test_layer_exported(arguments, tmp_path):
    """to_static in both modes, and a saved layer, give what dygraph gives."""
    paddle.seed(23)
    layer = incubate.FusedMultiHeadAttention(EMBED, HEADS, **arguments)
    layer.eval()
    x = paddle.to_tensor(draw_arrays("float32")["x"])
    mask = paddle.to_tensor(np.random.default_rng(4).random((BATCH, 1, SEQ, SEQ)) < 0.7)
    expected = layer(x, attn_mask=mask).numpy()
    specs = [paddle.static.InputSpec([None, None, EMBED]), None, None, paddle.static.InputSpec([None, 1, None, None], "bool")]
    paddle.jit.save(layer, str(tmp_path / "layer"), input_spec=specs)
    check("saved", paddle.jit.load(str(tmp_path / "layer"))(x, mask).numpy(), expected, "float32")
    for full_graph in (True, False):
        static = paddle.jit.to_static(layer, full_graph=full_graph)
        check("out", static(x, attn_mask=mask).numpy(), expected, "float32")


ERRORS = [
    (dict(ring_id=99), ValueError, "ring_id: expected -1 or the id of a group of paddle.distributed.new_group, got 99"),
    (dict(mode="up"), ValueError, "mode: expected"),
    (dict(x=None), TypeError, "x: expected a Tensor"),
    (dict(x=np.zeros([BATCH, EMBED])), ValueError, r"x: expected shape \[batch, seq_len, embed_dim\], got \[2, 12\]"),
    (dict(transpose_qkv_wb=True), ValueError, "num_heads: expected a divisor of embed_dim 12 with transpose_qkv_wb, got -1"),
    (dict(transpose_qkv_wb=True, num_heads="3"), TypeError, "num_heads: expected an int"),
    (dict(transpose_qkv_wb=True, num_heads=3), ValueError, r"qkv_weight: expected shape \[12, 36\] .* got \[3, 3, 4, 12\]"),
    (dict(cache_kv=np.zeros([2, BATCH, HEADS, 4])), ValueError, r"cache_kv: expected shape \[2, batch, .* got \[2, 2, 3, 4\]"),
    (
        dict(cache_kv=np.zeros([2, BATCH, HEADS, 1, HEAD_DIM + 1])),
        ValueError,
        r"cache_kv\[0\]: expected shape \[2, 3, cached_len, 4\] .* got \[2, 3, 1, 5\]",
    ),
    (dict(cache_kv=np.zeros([2, BATCH, HEADS, 1, HEAD_DIM], "float32")), TypeError, r"cache_kv\[0\]: expected x's dtype"),
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


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(num_heads=5), ValueError, "num_heads: expected a divisor of embed_dim 12, got 5"),
        (dict(embed_dim=0), ValueError, "embed_dim: expected at least 1, got 0"),
        (dict(need_weights=True), ValueError, "need_weights: expected False"),
        (dict(nranks=3), ValueError, "nranks: expected 1, the number of processes of ring_id -1, got 3"),
        (dict(nranks=3, ring_id=99), ValueError, "ring_id: expected -1 or the id of a group"),
    ],
)
def test_layer_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        incubate.FusedMultiHeadAttention(**{"embed_dim": EMBED, "num_heads": HEADS, **arguments})


def places_of_the_built_in():
    return [
        paddle.incubate.nn.FusedMultiHeadAttention,
        paddle.incubate.nn.layer.fused_transformer.FusedMultiHeadAttention,
        paddle.incubate.nn.functional.fused_multi_head_attention,
        sys.modules["paddle.incubate.nn.functional.fused_transformer"].fused_multi_head_attention,
    ]


THEIRS = [BUILT_IN, BUILT_IN, BUILT_IN_FUNCTION, BUILT_IN_FUNCTION]
OURS = [incubate.FusedMultiHeadAttention] * 2 + [fused_multi_head_attention] * 2


def is_same(found, wanted):
    return [a is b for a, b in zip(found, wanted)] == [True] * 4


def test_patch_and_unpatch():
    assert is_same(places_of_the_built_in(), THEIRS)
    patch()
    try:
        assert is_same(places_of_the_built_in(), OURS)
    finally:
        unpatch()
    assert is_same(places_of_the_built_in(), THEIRS)
    with pytest.raises(RuntimeError, match="unpatch: expected a patch"):
        unpatch()
    assert is_same(places_of_the_built_in(), THEIRS)


def test_patches_nest():
    with patch():
        with patch():
            assert is_same(places_of_the_built_in(), OURS)
        assert is_same(places_of_the_built_in(), OURS)
        patch()
        unpatch()
        assert is_same(places_of_the_built_in(), OURS)
    assert is_same(places_of_the_built_in(), THEIRS)
    with pytest.raises(ZeroDivisionError), patch():
        raise ZeroDivisionError
    assert is_same(places_of_the_built_in(), THEIRS)
    context = patch()
    with context:
        pass
    with pytest.raises(RuntimeError, match="patch: expected a new patch"), context:
        pass
    assert is_same(places_of_the_built_in(), THEIRS)


def test_encoder_layer_of_paddle():
    """Its attention, which Paddle constructs, is ours under the patch, and computes; so do layers from before the patch."""
    before = paddle.incubate.nn.FusedTransformerEncoderLayer(EMBED, HEADS, 20, 0.0)
    x = paddle.to_tensor(draw_arrays("float32")["x"])
    with patch():
        layer = paddle.incubate.nn.FusedTransformerEncoderLayer(EMBED, HEADS, 20, 0.0)
        assert type(layer.fused_attn) is incubate.FusedMultiHeadAttention
        for attention in (layer.fused_attn, before.fused_attn):
            expected, _ = composed(x, **dict(attention.named_parameters()))
            check("out", attention(x).numpy(), expected.numpy(), "float32")
    assert type(before.fused_attn) is BUILT_IN
    assert isinstance(layer.fused_attn, BUILT_IN)


def test_code_that_imports_the_built_in_runs():
    code = """
import paddle, paddle_fused_attention
paddle_fused_attention.patch()
from paddle.incubate.nn import FusedMultiHeadAttention
from paddle.incubate.nn.functional import fused_multi_head_attention
import paddle.incubate.nn.functional as F
layer = FusedMultiHeadAttention(8, 2)
out = layer(paddle.ones([1, 3, 8]))
out.sum().backward()
assert out.shape == [1, 3, 8] and layer.qkv_weight.grad is not None
assert F.fused_multi_head_attention is fused_multi_head_attention
paddle_fused_attention.unpatch()
assert paddle.incubate.nn.FusedMultiHeadAttention is not FusedMultiHeadAttention
print("ran")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("ran"), done.stderr


def test_public_names():
    assert set(paddle_fused_attention.__all__) <= set(dir(paddle_fused_attention))
    assert paddle_fused_attention.incubate.functional.fused_multi_head_attention is fused_multi_head_attention


@pytest.mark.parametrize("shape", [[None, None, None], [None, None, 16], [2, 5, None]], ids=str)
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "packed"])
@pytest.mark.parametrize("with_cache", [False, True], ids=["alone", "cache"])
def test_saved_with_unknown_sizes(with_cache, transposed, shape, tmp_path):
    layer = incubate.FusedMultiHeadAttention(16, 2, 0.0, 0.0, transpose_qkv_wb=transposed)
    layer.eval()
    spec = paddle.static.InputSpec

    class Network(paddle.nn.Layer):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, cache=None):
            out = self.layer(x, cache=cache)
            return out if cache is None else out[0]

    x = paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 5, 16)), dtype="float32")
    cache = paddle.to_tensor(np.random.default_rng(1).standard_normal((2, 2, 2, 3, 8)), dtype="float32")
    inputs = [x, cache] if with_cache else [x]
    specs = [spec(shape, "float32", "x")] + [spec([2, None, 2, None, 8], "float32", "cache")] * with_cache
    expected = Network()(*inputs).numpy()
    paddle.jit.save(Network(), str(tmp_path / "layer"), input_spec=specs)
    loaded = paddle.jit.load(str(tmp_path / "layer"))
    np.testing.assert_allclose(loaded(*inputs).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_layer_refuses_what_is_no_mask_or_no_query():
    layer = incubate.FusedMultiHeadAttention(EMBED, HEADS)
    x = paddle.to_tensor(draw_arrays("float32")["x"])
    cache = paddle.zeros([2, BATCH, HEADS, 0, HEAD_DIM])
    for mask, word in ((paddle.ones([SEQ, SEQ], "complex64"), "complex64"), (np.ones((SEQ, SEQ)), "ndarray")):
        for more in ({}, {"cache": cache}, {"key": x + 1, "value": x + 1}):
            with pytest.raises(TypeError, match=f"^attn_mask: .*{word}"):
                layer(x, attn_mask=mask, **more)
    with pytest.raises(TypeError, match="^query: .*ndarray"):
        layer(x.numpy(), attn_mask=paddle.ones([SEQ, SEQ], "bool"))


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("embed_dim", "12", TypeError),
        ("num_heads", 3.0, TypeError),
        ("dropout_rate", np.str_("0.1"), TypeError),
        ("attn_dropout_rate", 10**400, ValueError),
        ("epsilon", np.complex64(1), TypeError),
        ("epsilon", float("nan"), ValueError),
        ("normalize_before", "False", TypeError),
        ("transpose_qkv_wb", None, TypeError),
        ("nranks", 1.0, TypeError),
        ("ring_id", "0", TypeError),
        ("ring_id", None, TypeError),
    ],
    ids=str,
)
def test_bad_arguments_of_the_layer(argument, value, error):
    with pytest.raises(error, match=f"^{argument}: expected .*, got "):
        incubate.FusedMultiHeadAttention(**{**dict(embed_dim=EMBED, num_heads=HEADS), argument: value})
