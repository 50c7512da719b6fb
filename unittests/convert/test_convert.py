"""convert() and revert() of whole models against the models as Paddle computes them."""

import copy
import pickle
import warnings

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
import runners
from encoders import (
    BATCH,
    EMBED,
    HEADS,
    SEQ,
    check,
    encoder,
    encoder_layer,
    gradients,
    make_mask,
    make_x,
    replace,
    shake,
    state_of,
)
from paddle import nn
from paddle_fused_attention import convert, revert


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(request.param)
    yield request.param
    paddle.set_default_dtype(before)


def converted(model):
    model, report = convert(model, return_report=True)
    assert report.converted and not report.left_alone
    assert all(
        what.endswith("-layer-norm encoder layer, attention and feed-forward") for what in report.converted.values()
    )
    attentions = [layer for layer in model.sublayers() if isinstance(layer, nn.MultiHeadAttention)]
    assert attentions and all("qkv_weight" in layer._parameters for layer in attentions)
    return model


def packed_gradients(found):
    """Gradients of the names of Paddle's layers from those of converted ones."""
    result = {}
    for name, g in found.items():
        prefix, _, part = name.rpartition("self_attn.")
        if not prefix:
            result[name] = g
        elif part == "qkv_weight":
            for letter, piece in zip("qkv", g):
                result[f"{prefix}self_attn.{letter}_proj.weight"] = piece.reshape(EMBED, EMBED).T
        elif part == "qkv_bias":
            for letter, piece in zip("qkv", g):
                result[f"{prefix}self_attn.{letter}_proj.bias"] = piece.reshape(EMBED)
        else:
            result[name] = g
    return result


@pytest.mark.parametrize("kind", ["none", "bool", "int64", "int32", "float"])
@pytest.mark.parametrize("normalize_before", [False, True])
def test_outputs_are_those_of_paddles_layers(normalize_before, kind, dtype):
    model = (
        encoder(normalize_before, dropout=0.3, layer_norm_eps=1e-4) if has_epsilon() else encoder(normalize_before, 0.3)
    )
    model.eval()
    x, mask = make_x(dtype), make_mask(kind, dtype)
    expected, expected_layer = model(x, mask).numpy(), model.layers[0](x, mask).numpy()
    model = converted(model)
    assert not any(layer.training for layer in model.sublayers(include_self=True))
    with runners.operator_calls() as calls, runners.feed_forward_calls() as feed_forwards:
        check("out", model(x, mask).numpy(), expected, dtype)
    assert len(calls) == len(feed_forwards) == 2
    check("layer", model.layers[0](x, mask).numpy(), expected_layer, dtype)
    assert str(model(x, mask).dtype).endswith(dtype)


def has_epsilon():
    return not paddle.__version__.startswith("2.")


def check_gradients(normalize_before, dtype, mask):
    model = encoder(normalize_before)
    x = make_x(dtype)
    expected_x, expected = gradients(copy.deepcopy(model), x, mask)
    model = converted(model)
    assert all(layer.training for layer in model.sublayers())
    actual_x, actual = gradients(model, x, mask)
    check("x", actual_x, expected_x, dtype)
    actual = packed_gradients(actual)
    assert sorted(actual) == sorted(expected)
    for name, g in expected.items():
        if not name.endswith("k_proj.bias"):  # zero but for rounding
            check(name, actual[name], g, dtype)


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("normalize_before", [False, True])
def test_gradients_are_those_of_paddles_layers(normalize_before, kind, dtype):
    check_gradients(normalize_before, dtype, make_mask(kind, dtype, sees_none=False))


@pytest.mark.parametrize("normalize_before", [False, True])
def test_gradients_where_a_query_sees_no_key(normalize_before):
    """In float32 -1e9 leaves nothing of a score, so that such a query attends to all keys alike."""
    check_gradients(normalize_before, "float32", make_mask("bool", "float32"))


def test_dropout_rates():
    """Each of the rates goes to its place, and drops."""
    layer = convert(encoder_layer(dropout=0.25, attn_dropout=0.5, act_dropout=0.125))
    with runners.operator_calls() as calls, runners.feed_forward_calls() as feed_forwards:
        x = make_x()
        assert (layer(x).numpy() != layer(x).numpy()).any()
    assert [(block.dropout_rate, block.attn_dropout_rate) for block in calls] == [(0.25, 0.5)] * 2
    assert [(half.dropout1_rate, half.dropout2_rate) for half in feed_forwards] == [(0.125, 0.25)] * 2
    layer = revert(layer)
    assert (layer.dropout1.p, layer.self_attn.dropout, layer.dropout1.mode) == (0.25, 0.5, "upscale_in_train")


@pytest.mark.parametrize("bias", [None, False])
@pytest.mark.parametrize("normalize_before", [False, True])
def test_round_trip(normalize_before, bias, dtype):
    """The bits, names, order and classes from before, in whatever mode the model was converted."""
    model = encoder(normalize_before, dropout=0.1, bias_attr=bias)
    model.eval()
    before, classes = state_of(model), [type(layer) for layer in model.sublayers()]
    description, x = repr(model), make_x(dtype)
    expected = model(x).numpy()
    with paddle.no_grad():
        model = converted(model)
    assert (model.layers[0].self_attn.qkv_bias is None) == (bias is False)
    check("out", model(x).numpy(), expected, dtype)
    assert revert(model) is model
    after = state_of(model)
    assert list(after) == list(before)
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        np.testing.assert_array_equal(after[name], value, name)
    assert [type(layer) for layer in model.sublayers()] == classes
    assert repr(model) == description
    assert not any(layer.training for layer in model.sublayers(include_self=True))
    assert not any(p.stop_gradient for p in model.parameters())
    np.testing.assert_array_equal(model(x).numpy(), expected)


def test_what_is_trained_is_kept():
    model = encoder(weight_attr=paddle.ParamAttr(learning_rate=0.5, need_clip=False))
    frozen = {
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.out_proj.bias",
        "norm1.weight",
    }
    first = model.layers[0]
    for name, p in first.named_parameters():
        p.stop_gradient = name in frozen
    attributes = {n: (p.stop_gradient, p.optimize_attr, p.need_clip) for n, p in model.named_parameters()}
    converted(model)
    now = {name: p.stop_gradient for name, p in first.named_parameters()}
    assert {name for name, stop in now.items() if stop} == {
        "self_attn.qkv_weight",
        "self_attn.out_proj.bias",
        "norm1.weight",
    }
    assert (
        first.self_attn.qkv_weight.optimize_attr == {"learning_rate": 0.5} and not first.self_attn.qkv_weight.need_clip
    )
    assert first.self_attn.qkv_bias.need_clip
    revert(model)
    assert {n: (p.stop_gradient, p.optimize_attr, p.need_clip) for n, p in model.named_parameters()} == attributes


def test_training_ends_in_the_same_parameters():
    """Ten steps of AdamW end in the same parameters, up to rounding."""
    states, losses = [], []
    for change in (lambda model: model, converted):
        paddle.seed(8)
        model = change(encoder(normalize_before=True))
        optimizer = paddle.optimizer.AdamW(1e-2, parameters=model.parameters())
        losses.append([])
        for step in range(10):
            loss = (model(make_x(seed=step)) - make_x(seed=100 + step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
            losses[-1].append(float(loss))
        states.append(state_of(revert(model)))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[0][-1] != pytest.approx(losses[0][0], rel=0.05)
    for name, value in states[0].items():
        if not name.endswith("k_proj.bias"):
            np.testing.assert_allclose(states[1][name], value, atol=2e-3, err_msg=name)


@pytest.mark.parametrize("normalize_before", [False, True])
def test_outputs_and_caches_step_by_step(normalize_before, dtype):
    """Step by step with Paddle's caches: the same outputs and the same caches."""
    model = encoder(normalize_before)
    model.eval()
    x = make_x(dtype)
    causal = paddle.tril(paddle.ones([SEQ, SEQ], "bool"))

    def generate():
        outs, cache = [], model.gen_cache(x)
        for start, stop in ((0, 3), (3, 4), (4, SEQ)):
            out, cache = model(x[:, start:stop], causal[start:stop, :stop], cache)
            outs.append(out)
        return paddle.concat(outs, 1).numpy(), [t.numpy() for layer in cache for t in layer], cache

    expected, expected_cache, cache = generate()
    whole = model(x, causal).numpy()
    converted(model)
    out, new_cache, other = generate()
    assert [type(a) is type(b) for a, b in zip(cache, other)] == [True, True]
    check("out", out, expected, dtype)
    check("whole", out, whole, dtype)
    for actual, wanted in zip(new_cache, expected_cache):
        check("cache", actual, wanted, dtype)
    static = nn.MultiHeadAttention.StaticCache(*cache[0])
    out, same = model.layers[0](x, None, static)
    assert same.k is static.k and same.v is static.v
    revert(model)
    check("static", out.numpy(), model.layers[0](x, None, static)[0].numpy(), dtype)


class Nested(nn.Layer):
    """Encoder layers here and there, one of them twice, beside other layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(EMBED, EMBED)
        self.shared = encoder_layer()
        self.blocks = nn.LayerList([self.shared, nn.Sequential(encoder_layer(normalize_before=True)), self.shared])
        self.named = nn.LayerDict({"last": encoder_layer()})

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.named["last"](self.shared(x))


def test_nested_and_shared():
    model = shake(Nested())
    x, names = make_x(), list(model.state_dict())
    expected, shared = model(x).numpy(), model.shared
    model, report = convert(model, return_report=True)
    assert list(report.converted) == ["shared", "blocks.1.0", "named.last"]
    assert "pre-" in report.converted["blocks.1.0"] and "post-" in report.converted["shared"]
    assert model.shared is shared is model.blocks[0] is model.blocks[2]
    check("out", model(x).numpy(), expected, "float32")
    again, report = convert(model, return_report=True)
    assert again is model and not report.converted and not report.left_alone
    check("out", model(x).numpy(), expected, "float32")
    assert sorted(revert(model).state_dict()) == sorted(names)
    np.testing.assert_array_equal(model(x).numpy(), expected)
    assert revert(model) is model


def test_the_layer_itself():
    layer = shake(encoder_layer())
    x = make_x()
    expected = layer(x).numpy()
    layer.note = "kept"
    calls = []
    layer.register_forward_post_hook(lambda *arguments: calls.append(1))
    assert convert(layer) is layer and isinstance(layer, nn.TransformerEncoderLayer)
    check("out", layer(x).numpy(), expected, "float32")
    assert layer.note == "kept" and len(calls) == 1
    assert type(revert(layer)) is nn.TransformerEncoderLayer


def test_encoder_of_converted_layers():
    """paddle.nn.TransformerEncoder copies its layer by class and arguments."""
    model = nn.TransformerEncoder(convert(encoder_layer()), 3)
    with runners.operator_calls() as calls:
        assert model(make_x()).shape == [BATCH, SEQ, EMBED]
    assert len(calls) == 3
    assert all(type(layer) is nn.TransformerEncoderLayer for layer in revert(model).layers)


def test_deepcopy_and_pickle():
    model = converted(encoder())
    x = make_x()
    expected = model(x).numpy()
    np.testing.assert_array_equal(copy.deepcopy(model)(x).numpy(), expected)
    state = pickle.loads(pickle.dumps(state_of(model)))
    other = converted(encoder())
    for p in other.parameters():
        p.set_value(paddle.zeros_like(p))
    missing, unexpected = other.set_state_dict(state)
    assert not missing and not unexpected
    np.testing.assert_array_equal(other(x).numpy(), expected)


def test_sixteen_bit_parameters_keep_their_dtypes():
    """As after AMP's decorator: 16-bit projections, float32 layer norms."""
    model = shake(encoder_layer())
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        getattr(model.self_attn, name).to(dtype="bfloat16")
    model.linear1.to(dtype="bfloat16")
    model.linear2.to(dtype="bfloat16")
    before = {name: (value.dtype, value.numpy()) for name, value in model.state_dict().items()}
    converted(model)
    assert model.self_attn.qkv_weight.dtype == model.self_attn.out_proj.bias.dtype == paddle.bfloat16
    assert model.norm1.weight.dtype == paddle.float32
    with runners.operator_calls() as calls, runners.feed_forward_calls() as feed_forwards:
        assert model(make_x()).dtype == paddle.float32
    assert len(calls) == len(feed_forwards) == 1
    for name, value in revert(model).state_dict().items():
        assert value.dtype == before[name][0], name
        np.testing.assert_array_equal(value.numpy(), before[name][1], name)


class OwnEncoderLayer(nn.TransformerEncoderLayer):
    pass


class OwnLinear(nn.Linear):
    pass


def changed(change):
    layer = encoder_layer()
    change(layer)
    return layer


def freeze_query(layer):
    layer.self_attn.q_proj.weight.stop_gradient = True


def tie(model):
    model[1].self_attn = model[0].self_attn
    return model


LEFT_ALONE = {
    "subclass": (lambda: OwnEncoderLayer(EMBED, HEADS, 24), "a subclass of"),
    "need_weights": (lambda: changed(replace("self_attn.need_weights", True)), "its self_attn has need_weights=True"),
    "forward": (lambda: changed(lambda layer: setattr(layer, "forward", layer.forward)), "its forward was replaced"),
    "both halves": (
        lambda: changed(lambda layer: (replace("norm1", nn.Identity())(layer), replace("norm2", nn.Identity())(layer))),
        "attention: its norm1 is a Identity, not a paddle.nn.LayerNorm; feed-forward: its norm2 is a Identity, not",
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case):
    make, reason = LEFT_ALONE[case]
    layer = make()
    names, kind = list(layer.state_dict()), type(layer)
    with pytest.warns(UserWarning, match=f"convert: encoder: left alone, {reason}"):
        model = convert(nn.Sequential(("encoder", layer)))
    assert model.encoder is layer and type(layer) is kind and list(layer.state_dict()) == names


ONE_HALF = {
    "kdim": (
        "attention",
        replace("self_attn", nn.MultiHeadAttention(EMBED, HEADS, kdim=8)),
        "its self_attn has kdim=8 and vdim=16",
    ),
    "vdim": (
        "attention",
        replace("self_attn", nn.MultiHeadAttention(EMBED, HEADS, vdim=8)),
        "its self_attn has kdim=16 and vdim=8",
    ),
    "norm1": ("attention", replace("norm1", nn.Identity()), "its norm1 is a Identity"),
    "norm1 shape": ("attention", replace("norm1", nn.LayerNorm([SEQ, EMBED])), "its norm1 is over [6, 16]"),
    "dropout1": (
        "attention",
        replace("dropout1", nn.Dropout(0.1, mode="downscale_in_infer")),
        "its dropout1 has mode='downscale_in_infer' and axis=None",
    ),
    "dropout1 axis": ("attention", replace("dropout1", nn.Dropout(0.1, axis=0)), "axis=0"),
    "projection": (
        "attention",
        replace("self_attn.q_proj", OwnLinear(EMBED, EMBED)),
        "self_attn.q_proj is a OwnLinear",
    ),
    "some biases": (
        "attention",
        replace("self_attn.k_proj", nn.Linear(EMBED, EMBED, bias_attr=False)),
        "only some of its projections",
    ),
    "hook in attention": (
        "attention",
        lambda layer: layer.self_attn.q_proj.register_forward_post_hook(lambda *_: None),
        "its self_attn.q_proj has hooks",
    ),
    "frozen query": ("attention", freeze_query, "differ in dtype or in how they are trained"),
    "norm2": ("feed-forward", replace("norm2", nn.Identity()), "its norm2 is a Identity"),
    "norm2 shape": ("feed-forward", replace("norm2", nn.LayerNorm([SEQ, EMBED])), "its norm2 is over [6, 16], other"),
    "norm2 hook": (
        "feed-forward",
        lambda layer: layer.norm2.register_forward_post_hook(lambda *_: None),
        "its norm2 has hooks",
    ),
    "dropout": (
        "feed-forward",
        replace("dropout", nn.Dropout(0.1, mode="downscale_in_infer")),
        "its dropout is a Dropout, not a paddle.nn.Dropout of mode 'upscale_in_train'",
    ),
    "dropout2": ("feed-forward", replace("dropout2", nn.Dropout(0.1, axis=0)), "its dropout2 is a Dropout, not"),
    "linear1": ("feed-forward", replace("linear1", OwnLinear(EMBED, 24)), "its linear1 is a OwnLinear, not"),
    "linear2": (
        "feed-forward",
        lambda layer: layer.linear2.register_buffer("scale", paddle.ones([1])),
        "its linear2 has scale beside its weight and bias",
    ),
    "width": ("feed-forward", replace("linear2", nn.Linear(24, 1)), "its linear2 has a weight of shape [24, 1], not"),
    "activation": ("feed-forward", replace("activation", F.tanh), "its activation is tanh, not relu, gelu or silu"),
}


@pytest.mark.parametrize("case", ONE_HALF)
def test_the_other_half_is_converted(case):
    """Each half decides by itself; the report names both, and revert takes both back."""
    half, change, reason = ONE_HALF[case]
    layer = encoder_layer()
    change(layer)
    layer.eval()
    usable = case not in ("kdim", "vdim")  # which self-attention can't have
    names, x = list(layer.state_dict()), make_x()
    expected = layer(x).numpy() if usable else None
    model, report = convert(nn.Sequential(("encoder", layer)), return_report=True)
    (other,) = {"attention", "feed-forward"} - {half}
    assert report.converted == {"encoder": f"post-layer-norm encoder layer, {other}"}
    assert report.left_alone["encoder"].startswith(f"{half}: ") and reason in report.left_alone["encoder"]
    assert ("self_attn.qkv_weight" in layer.state_dict()) == (half == "feed-forward")
    if usable:
        with runners.operator_calls() as calls, runners.feed_forward_calls() as feed_forwards:
            check("out", layer(x).numpy(), expected, "float32")
        assert (len(calls), len(feed_forwards)) == ((0, 1) if half == "attention" else (1, 0))
    assert revert(model).encoder is layer
    assert type(layer) is nn.TransformerEncoderLayer and list(layer.state_dict()) == names


def test_shared_parts_are_left_alone():
    model = tie(nn.Sequential(encoder_layer(), encoder_layer(), encoder_layer()))
    model, report = convert(model, return_report=True)
    assert list(report.left_alone) == ["0", "1"] and all(
        why.startswith("attention: it shares its MultiHeadAttention") for why in report.left_alone.values()
    )
    assert [what.rpartition(", ")[2] for what in report.converted.values()] == [
        "feed-forward",
        "feed-forward",
        "attention and feed-forward",
    ]
    model = nn.Sequential(encoder_layer(), nn.Linear(EMBED, EMBED))
    model[1].weight = model[0].self_attn.k_proj.weight
    model, report = convert(model, return_report=True)
    assert "shares its Linear" in report.left_alone["0"]


def test_only_a_model_without_attention_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(encoder())
    with pytest.warns(UserWarning, match="convert: found no attention and no feed-forward"):
        convert(nn.Linear(2, 2))


def test_errors():
    for function in (convert, revert):
        with pytest.raises(TypeError, match="model: expected a paddle.nn.Layer, got dict"):
            function({})
        paddle.enable_static()
        try:
            with pytest.raises(RuntimeError, match=f"{function.__name__}: expected dygraph mode"):
                function(nn.Linear(2, 2))
        finally:
            paddle.disable_static()


def test_to_static():
    """Dygraph and static graphs agree after the conversion."""
    model = converted(encoder(normalize_before=True))
    model.eval()
    x, mask = make_x(), make_mask("bool", "float32")
    expected = model(x, mask).numpy()
    for full_graph in (True, False):
        static = paddle.jit.to_static(converted(shake(encoder(normalize_before=True))), full_graph=full_graph)
        static.set_state_dict(model.state_dict())
        static.eval()
        with runners.operator_calls() as calls, runners.feed_forward_calls() as feed_forwards:
            check("out", static(x, mask).numpy(), expected, "float32")
        assert len(calls) == len(feed_forwards) > 0


def test_masks_that_are_none():
    layer = convert(encoder_layer())
    cache = layer.gen_cache(make_x())
    for mask, word in ((paddle.ones([SEQ, SEQ], "complex64"), "complex64"), (np.ones((SEQ, SEQ)), "ndarray")):
        for arguments in ((), (cache,)):
            with pytest.raises(TypeError) as raised:
                layer(make_x(), mask, *arguments)
            assert str(raised.value).startswith("src_mask:") and word in str(raised.value)


def test_inputs_and_caches_that_do_not_fit():
    layer = convert(encoder_layer())
    cache = layer.gen_cache(make_x())
    for arguments, error, start in (
        ((np.ones((BATCH, SEQ, EMBED)),), TypeError, "src:"),
        ((make_x(), None, cache._replace(k=cache.k[:, :1])), ValueError, "cache.k:"),
        ((make_x(), None, cache._replace(v=paddle.zeros([BATCH, HEADS, 1, EMBED // HEADS]))), ValueError, "cache.v:"),
        ((make_x(), None, cache._replace(k=cache.k.astype("float64"))), TypeError, "cache.k:"),
        ((make_x(), None, cache._replace(v=None)), TypeError, "cache.v:"),
        ((make_x(), None, tuple(cache)), TypeError, "cache:"),
    ):
        with pytest.raises(error) as raised:
            layer(*arguments)
        assert str(raised.value).startswith(start), raised.value
