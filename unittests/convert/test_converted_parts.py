"""What is done to a converted model's parts afterwards holds: hooks, modes, rates, replaced layers, names,
quantization, wrappers.

The yardstick is the same model without conversion, to which the same is done.
"""

import copy
import gc
import types

import numpy as np
import paddle
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
    make_mask,
    make_x,
    shake,
)
from paddle import nn
from paddle_fused_attention import FusedMultiHeadAttention, convert, incubate, revert, separate_state_dict
from paddle_fused_attention.conversion.packed import PackedAttention

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def pair(normalize_before=False, dropout=0.0, **arguments):
    """An encoder layer as Paddle makes it and its converted copy."""
    layer = shake(encoder_layer(normalize_before, dropout, **arguments))
    return layer, convert(copy.deepcopy(layer))


def part_of(layer, path):
    for name in path.split("."):
        layer = getattr(layer, name)
    return layer


def check_both(plain, converted, calls, mask=None, feed_forwards=1):
    """The same outputs and gradients, with so many calls of the operators."""
    x = make_x()
    d_out = paddle.to_tensor(np.random.default_rng(4).standard_normal(x.shape).astype("float32"))
    found = []
    for layer in (plain, converted):
        inputs = x.clone()
        inputs.stop_gradient = False
        with runners.operator_calls() as made, runners.feed_forward_calls() as halves:
            out = layer(inputs, mask)
        out.backward(d_out)
        found.append((out.numpy(), inputs.grad.numpy(), len(made), len(halves)))
    assert [entry[2:] for entry in found] == [(0, 0), (calls, feed_forwards)]
    check("out", found[1][0], found[0][0], "float32")
    check("d_x", found[1][1], found[0][1], "float32")


@pytest.mark.parametrize("normalize_before", [False, True])
def test_only_query_key_and_value_are_packed(normalize_before):
    layer = encoder_layer(normalize_before)
    kept = {
        name: p
        for name, p in layer.named_parameters()
        if not name.startswith(("self_attn.q", "self_attn.k", "self_attn.v"))
    }
    parts = dict(layer.named_sublayers())
    convert(layer)
    now = dict(layer.named_parameters())
    assert sorted(now) == sorted([*kept, "self_attn.qkv_weight", "self_attn.qkv_bias"])
    assert all(now[name] is p for name, p in kept.items())
    assert {name: id(part) for name, part in layer.named_sublayers()} == {
        name: id(part) for name, part in parts.items()
    }


FEED_FORWARD_PARTS = ["linear1", "dropout", "linear2", "dropout2", "norm2"]
PARTS = ["self_attn", "norm1", "dropout1", *(f"self_attn.{name}" for name in PROJECTIONS), *FEED_FORWARD_PARTS]


@pytest.mark.parametrize("path", PARTS)
@pytest.mark.parametrize("kind", ["pre", "post", "forward"])
def test_hooks_and_forwards_that_come_later(kind, path):
    """They run, and what they change counts."""
    plain, converted = pair()
    for layer in (plain, converted):
        part = part_of(layer, path)
        if kind == "pre":
            part.register_forward_pre_hook(
                lambda _, inputs: tuple(i if i is None else 1.5 * i for i in inputs[:1]) + inputs[1:]
            )
        elif kind == "post":
            part.register_forward_post_hook(lambda _, inputs, out: 1.5 * out)
        else:
            whole = part.forward
            part.forward = lambda *inputs, whole=whole: 1.5 * whole(*inputs)
    # Around its attention the layer goes by parts; attention alone is the operator's still, unless it is its part that
    # changed.
    is_inside = path.startswith("self_attn.") or (path, kind) == ("self_attn", "pre")
    x = make_x()
    with runners.operator_calls() as calls, runners.feed_forward_calls() as feed_forwards:
        actual = converted(x).numpy()
    check("out", actual, plain(x).numpy(), "float32")
    assert (len(calls), len(feed_forwards)) == (0 if is_inside else 1, 0 if path in FEED_FORWARD_PARTS else 1)


def test_parts_that_are_replaced_later():
    for path in ("self_attn.q_proj", "self_attn.out_proj", "norm1", "dropout1", "self_attn"):
        plain, converted = pair()
        parent, _, name = path.rpartition(".")
        for layer in (plain, converted):
            paddle.seed(5)
            new = {
                "norm1": lambda: shake(nn.LayerNorm(EMBED, epsilon=1e-4)),
                "dropout1": lambda: nn.Identity(),
                "self_attn": lambda: shake(nn.MultiHeadAttention(EMBED, HEADS)),
            }.get(path, lambda: shake(nn.Sequential(nn.Linear(EMBED, EMBED))))()
            setattr(part_of(layer, parent) if parent else layer, name, new)
        check_both(plain, converted, calls=1 if path in ("norm1", "dropout1") else 0)


FEED_FORWARD_CHANGES = {
    "linear1": (lambda: shake(nn.Sequential(nn.Linear(EMBED, 24))), 0),
    "linear2": (lambda: shake(nn.Sequential(nn.Linear(24, EMBED))), 0),
    "norm2": (lambda: shake(nn.LayerNorm(EMBED, epsilon=1e-4)), 1),
    "norm2 over more axes": (lambda: nn.LayerNorm([SEQ, EMBED], weight_attr=False, bias_attr=False), 0),
    "dropout": (lambda: nn.Identity(), 0),
    "dropout2": (lambda: nn.Dropout(0.0, mode="downscale_in_infer"), 0),
    "activation": (lambda: nn.functional.relu, 1),
    "activation that is not the operator's": (lambda: nn.functional.tanh, 0),
    "activation of a user": (lambda: lambda x: nn.functional.gelu(x) * 2.0, 0),
    "activation as a layer": (lambda: nn.Silu(), 1),
    "activation as another layer": (lambda: nn.Tanh(), 0),
}


@pytest.mark.parametrize("normalize_before", [False, True])
@pytest.mark.parametrize("change", FEED_FORWARD_CHANGES)
def test_parts_of_the_feed_forward_that_are_replaced_later(change, normalize_before):
    make, feed_forwards = FEED_FORWARD_CHANGES[change]
    plain, converted = pair(normalize_before)
    for layer in (plain, converted):
        paddle.seed(5)
        setattr(layer, change.partition(" ")[0], make())
    check_both(plain, converted, calls=1, feed_forwards=feed_forwards)


def test_hooks_of_an_activation_that_is_a_layer():
    plain, converted = pair()
    for layer in (plain, converted):
        layer.activation = nn.GELU(approximate=True)
    check_both(plain, converted, calls=1)
    for layer in (plain, converted):
        layer.activation.register_forward_post_hook(lambda _, inputs, out: 1.5 * out)
    check_both(plain, converted, calls=1, feed_forwards=0)


class LowRankLinear(nn.Linear):
    """As libraries for low-rank adaptation make of a projection."""

    def forward(self, x):
        return super().forward(x) + 0.1 * x.sum(axis=-1, keepdim=True)


def test_projections_whose_class_changes_later():
    for name in ("linear1", "linear2"):
        plain, converted = pair()
        for layer in (plain, converted):
            getattr(layer, name).__class__ = LowRankLinear
        check_both(plain, converted, calls=1, feed_forwards=0)


def test_weight_normalization_that_comes_later():
    plain, converted = pair()
    for layer in (plain, converted):
        nn.utils.weight_norm(layer.linear1)
    check_both(plain, converted, calls=1, feed_forwards=0)


def test_the_norm_order_may_change_later():
    plain, converted = pair()
    plain.normalize_before = converted.normalize_before = True
    check_both(plain, converted, calls=1)


def test_recompute():
    """The same bits, dropout included."""
    from paddle.distributed.fleet.utils import recompute

    _, layer = pair(dropout=0.3)
    found = []
    for run in (layer, lambda x: recompute(layer, x)):
        x = make_x()
        x.stop_gradient = False
        layer.clear_gradients()
        paddle.seed(7)
        out = run(x)
        out.square().sum().backward()
        found.append([out.numpy(), x.grad.numpy(), *(p.grad.numpy() for p in layer.parameters())])
    for plain, recomputed in zip(*found):
        np.testing.assert_array_equal(recomputed, plain)


def test_methods_that_libraries_put_on_layers():
    """As PaddleNLP's distillation does: forwards of their own on the attention and the layer, which use its parts."""
    plain, converted = pair()

    def attend(self, query, key, value, attn_mask=None, cache=None):
        q, k, v = self._prepare_qkv(query, key, value, cache)
        self.scores = paddle.matmul(q, k, transpose_y=True) / self.head_dim**0.5
        o = paddle.matmul(nn.functional.softmax(self.scores + attn_mask), v)
        return self.out_proj(o.transpose([0, 2, 1, 3]).reshape([0, 0, EMBED]))

    def layer_forward(self, src, src_mask=None):
        src = self.norm1(src + self.dropout1(self.self_attn(src, src, src, src_mask)))
        return self.norm2(src + self.linear2(self.activation(self.linear1(src))))

    mask = make_mask("float", "float32")
    for layer in (plain, converted):
        layer.self_attn.forward = types.MethodType(attend, layer.self_attn)
    check_both(plain, converted, 0, mask)
    check("scores", converted.self_attn.scores.numpy(), plain.self_attn.scores.numpy(), "float32")
    for layer in (plain, converted):
        layer.forward = types.MethodType(layer_forward, layer)
    check_both(plain, converted, 0, mask, feed_forwards=0)


@pytest.mark.parametrize("normalize_before", [False, True])
@pytest.mark.parametrize("way", ["keyword", "position", "attribute"])
def test_attention_weights(way, normalize_before):
    """As PaddleNLP's and PaddleFormers' encoders ask for them, also beside a cache."""
    plain, converted = pair(normalize_before)
    x, mask = make_x(), make_mask("bool", "float32")
    hidden = plain.norm1(x) if normalize_before else x
    plain.self_attn.need_weights = True
    _, expected = plain.self_attn(hidden, hidden, hidden, mask)
    if way == "attribute":
        converted.self_attn.need_weights = True
    arguments, keywords = {
        "keyword": ((), {"output_attentions": True}),
        "position": ((None, True), {}),
        "attribute": ((), {}),
    }[way]
    out, weights = converted(x, mask, *arguments, **keywords)
    plain.self_attn.need_weights = False
    check("out", out.numpy(), plain(x, mask).numpy(), "float32")
    check("weights", weights.numpy(), expected.numpy(), "float32")
    assert converted.self_attn.need_weights == (way == "attribute")
    if way == "attribute":
        return
    out, cache, weights = converted(x, None, converted.gen_cache(x), True)
    assert cache.k.shape == [BATCH, HEADS, SEQ, EMBED // HEADS] and weights.shape == [BATCH, HEADS, SEQ, SEQ]
    check("out", out.numpy(), plain(x).numpy(), "float32")
    assert isinstance(converted(x, mask, None, False), paddle.Tensor)


def test_the_attention_by_itself():
    """What calls self_attn alone gets what Paddle's layer gives, other keys and caches included."""
    plain, converted = pair()
    plain, converted = plain.self_attn, converted.self_attn
    x, y, mask = make_x(), make_x(seq_len=4, seed=8), make_mask("bool", "float32")
    with runners.operator_calls() as calls:
        check("self", converted(x, x, x, mask).numpy(), plain(x, x, x, mask).numpy(), "float32")
        check("no key", converted(x).numpy(), plain(x).numpy(), "float32")
    assert len(calls) == 2
    check("keys", converted(x, y, y).numpy(), plain(x, y, y).numpy(), "float32")
    static, static_too = (layer.gen_cache(y, y, nn.MultiHeadAttention.StaticCache) for layer in (plain, converted))
    check(
        "static cache",
        converted(x, x, x, None, static_too)[0].numpy(),
        plain(x, x, x, None, static)[0].numpy(),
        "float32",
    )


def test_masks_that_want_a_gradient_get_it():
    plain, converted = pair()
    found = []
    for layer in (plain, converted):
        mask = paddle.to_tensor(make_mask("float", "float32").numpy() * 0.01, stop_gradient=False)
        layer(make_x(), mask).square().sum().backward()
        found.append(mask.grad.numpy())
    assert np.abs(found[0]).max() > 0
    check("d_mask", found[1], found[0], "float32")


def test_packed_weights_cannot_be_taken_for_others():
    """Tools that read or set the weights of every Linear (LoRA, initialisation) are told, and do not pass them over."""
    _, layer = pair()
    linear = layer.self_attn.q_proj
    assert isinstance(linear, nn.Linear) and not list(linear.parameters())
    for use in (
        lambda: linear.weight,
        lambda: linear.bias,
        lambda: hasattr(linear, "weight"),
        lambda: setattr(linear, "weight", layer.self_attn.out_proj.weight),
        lambda: linear.add_parameter("bias", layer.self_attn.out_proj.bias),
    ):
        with pytest.raises(
            RuntimeError, match=r"(weight|bias): expected a projection of its own.*revert\(model\) first"
        ):
            use()
    x = make_x()
    plain = revert(copy.deepcopy(layer))
    check("q_proj", linear(x).numpy(), plain.self_attn.q_proj(x).numpy(), "float32")
    assert "packed" in repr(linear)


def test_rates_and_modes_that_are_set_later():
    _, converted = pair(dropout=0.4)
    x = make_x()
    expected = copy.deepcopy(converted)
    expected.eval()
    expected = expected(x).numpy()
    for layer in converted.sublayers():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    assert (converted(x).numpy() != converted(x).numpy()).any()  # the attention's own
    converted.self_attn.dropout = 0.0
    check("out", converted(x).numpy(), expected, "float32")
    _, converted = pair(dropout=0.4)
    converted.eval()
    check("out", converted(x).numpy(), converted(x).numpy(), "float32")
    converted.dropout1.train()  # Monte Carlo dropout
    with runners.operator_calls() as calls:
        assert (converted(x).numpy() != converted(x).numpy()).any()
    assert [(block.dropout_rate, block.attn_dropout_rate) for block in calls] == [(0.4, 0.0)] * 2
    _, converted = pair(dropout=0.4)
    for layer in (converted.dropout, converted.dropout1, converted.dropout2):
        layer.eval()
    with runners.operator_calls() as calls, runners.feed_forward_calls() as feed_forwards:
        converted(x)
        converted.dropout2.train()
        converted.dropout2.p = 1
        converted(x)
    assert [(block.dropout_rate, block.attn_dropout_rate) for block in calls] == [(0.0, 0.4)] * 2
    assert [(half.dropout1_rate, half.dropout2_rate) for half in feed_forwards] == [(0.0, 0.0), (0.0, 1.0)]
    converted.eval()
    converted.dropout.train()
    with runners.feed_forward_calls() as feed_forwards:
        assert (converted(x).numpy() != converted(x).numpy()).any()
    assert [(half.dropout1_rate, half.dropout2_rate, half.training) for half in feed_forwards] == [(0.4, 0.0, True)] * 2


def test_conversion_keeps_modes_that_differ():
    layer = encoder_layer(dropout=0.5, attn_dropout=0.0, act_dropout=0.0)
    layer.dropout1.eval()
    layer.dropout2.eval()
    plain = copy.deepcopy(layer)
    convert(layer)
    check_both(plain, layer, 1)


def test_what_is_kept_beside_the_parts():
    """Buffers, sublayers and parameters that someone put there stay, in the state dict too, and after revert."""
    layer = encoder_layer()
    attention = layer.self_attn
    attention.register_buffer("steps", paddle.to_tensor([3.0]))
    attention.probe = nn.Linear(2, 2)
    attention.gate = attention.create_parameter([1])
    layer.norm1.register_buffer("seen", paddle.to_tensor([1.0]))
    names = list(layer.state_dict())
    convert(layer)
    for name in ("self_attn.steps", "self_attn.probe.weight", "self_attn.gate", "norm1.seen"):
        assert name in layer.state_dict()
    assert sorted(revert(layer).state_dict()) == sorted(names)


def decay_of(name):
    return not any(word in name for word in ("bias", "norm"))


@pytest.mark.parametrize("by", ["structured", "name"])
def test_weight_decay_by_name(by):
    """The usual exclusions of biases and layer norms mean the same parameters."""
    states, losses = [], []
    for change in (lambda model: model, convert):
        paddle.seed(8)
        model = change(encoder(normalize_before=True))
        if by == "structured":
            decayed = {p.name for name, p in model.named_parameters() if decay_of(name)}
            decays = decayed.__contains__
        else:
            decays = lambda name: not any(word in name for word in (".b_", "norm"))  # noqa: E731
        optimizer = paddle.optimizer.AdamW(
            1e-2, weight_decay=0.5, parameters=model.parameters(), apply_decay_param_fun=decays
        )
        for step in range(8):
            loss = (model(make_x(seed=step)) - make_x(seed=100 + step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
        losses.append(float(loss))
        del optimizer
        gc.collect()
        states.append({name: value.numpy() for name, value in revert(model).state_dict().items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, value in states[0].items():
        if not name.endswith("k_proj.bias"):
            np.testing.assert_allclose(states[1][name], value, atol=2e-3, err_msg=name)


def test_names_of_parameters_come_back():
    model = encoder()
    names = {name: p.name for name, p in model.named_parameters()}
    convert(model)
    assert all(".b_" in p.name for name, p in model.named_parameters() if name.endswith("bias"))
    revert(model)
    assert {name: p.name for name, p in model.named_parameters()} == names


@pytest.mark.parametrize("how", ["quantization-aware", "post-training"])
def test_quantization(how):
    """With a config for all layers the model runs as it does without conversion."""
    quantization = pytest.importorskip("paddle.quantization")
    from paddle.quantization.observers import AbsmaxObserver
    from paddle.quantization.quanters import FakeQuanterWithAbsMaxObserver

    outs = []
    for change in (lambda model: model, convert):
        paddle.seed(3)
        model = change(encoder())
        if how == "quantization-aware":
            quanter = FakeQuanterWithAbsMaxObserver(moving_rate=0.9)
            quantizer = quantization.QAT(quantization.QuantConfig(activation=quanter, weight=quanter))
        else:
            model.eval()
            observer = AbsmaxObserver(quant_bits=8)
            quantizer = quantization.PTQ(quantization.QuantConfig(activation=observer, weight=observer))
        quantized = quantizer.quantize(model)
        kinds = [type(getattr(layer.self_attn, name)).__name__ for layer in quantized.layers for name in PROJECTIONS]
        kinds += [type(layer).__name__ for half in quantized.layers for layer in (half.linear1, half.linear2)]
        assert set(kinds) == {"QuantedLinear"}
        with runners.feed_forward_calls() as feed_forwards:
            for seed in (1, 2):
                out = quantized(make_x(seed=seed), make_mask("bool", "float32"))
        assert not feed_forwards
        outs.append(out.numpy())
        if change is convert:
            assert all(isinstance(layer.self_attn, PackedAttention) for layer in model.layers)  # the copy was quantized
    check("out", outs[1], outs[0], "float32")


def test_quantization_that_misses_the_packed_projections():
    quantization = pytest.importorskip("paddle.quantization")
    from paddle.quantization.quanters import FakeQuanterWithAbsMaxObserver

    quanter = FakeQuanterWithAbsMaxObserver(moving_rate=0.9)
    config = quantization.QuantConfig(activation=None, weight=None)
    config.add_type_config(nn.Linear, activation=quanter, weight=quanter)
    quantized = quantization.QAT(config).quantize(convert(encoder()))
    with pytest.raises(
        RuntimeError, match=r"out_proj: expected all projections of an attention quantized or none.*revert\(model\)"
    ):
        quantized(make_x())


def test_wrong_orders_are_refused():
    model = encoder()
    optimizer = paddle.optimizer.SGD(parameters=model.parameters())
    with pytest.raises(RuntimeError, match="convert: .* a SGD holds q_proj.weight.*make it after convert"):
        convert(model)
    del optimizer
    gc.collect()
    groups = paddle.optimizer.AdamW(parameters=[{"params": list(model.parameters())}])
    with pytest.raises(RuntimeError, match="convert: .* a AdamW holds q_proj.weight"):
        convert(model)
    del groups
    gc.collect()

    wrapped = paddle.DataParallel(model)
    for whole in (model, wrapped, model.layers[0]):
        with pytest.raises(RuntimeError, match="convert: .*wrapped by a DataParallel; convert first"):
            convert(whole)
    del wrapped
    gc.collect()

    outer = nn.Sequential(model)
    static = paddle.jit.to_static(outer)
    for whole in (static, model):
        with pytest.raises(
            RuntimeError, match="convert: .*made static by paddle.jit.to_static in a Sequential; convert first"
        ):
            convert(whole)
    del static, outer
    gc.collect()

    convert(model)
    optimizer = paddle.optimizer.SGD(parameters=model.parameters())
    wrapped = paddle.DataParallel(model)
    with pytest.raises(RuntimeError, match="revert: .*wrapped by a DataParallel; revert first"):
        revert(model)
    del wrapped
    gc.collect()
    with pytest.warns(UserWarning, match="revert: a SGD holds qkv_weight"):
        revert(model)
    del optimizer


class Decorated(nn.Layer):
    def __init__(self):
        super().__init__()
        self.layer = encoder_layer()

    @paddle.jit.to_static
    def forward(self, x):
        return self.layer(x)


def test_a_method_that_is_static_by_decoration():
    """It may be converted until it has run, when a program of the layer as it was is kept."""
    model = Decorated()
    x = make_x()
    expected = model.layer(x).numpy()
    convert(model)
    check("out", model(x).numpy(), expected, "float32")
    model = Decorated()
    model(x)
    with pytest.raises(RuntimeError, match="made static by paddle.jit.to_static in a Decorated"):
        convert(model)


def unknown_forward(self, src, src_mask=None, cache=None):
    return src


@pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "MultiHeadAttention", "LayerNorm", "Dropout", "Linear"])
def test_classes_whose_forward_was_replaced(kind, monkeypatch):
    monkeypatch.setattr(getattr(nn, kind), "forward", unknown_forward)
    _, report = convert(nn.Sequential(encoder_layer()), return_report=True)
    reason = f"paddle.nn.{kind}.forward was replaced by one of {__name__}"
    if kind == "MultiHeadAttention":
        assert report.converted == {"0": "post-layer-norm encoder layer, feed-forward"}
        assert report.left_alone == {"0": f"attention: {reason}"}
    else:
        assert not report.converted and report.left_alone == {"0": reason}


@pytest.mark.parametrize("kind", ["GELU", "Silu"])
def test_activations_whose_forward_was_replaced(kind, monkeypatch):
    layer = encoder_layer()
    layer.activation = getattr(nn, kind)()
    monkeypatch.setattr(getattr(nn, kind), "forward", lambda self, x: x)
    _, report = convert(nn.Sequential(layer), return_report=True)
    assert report.left_alone == {"0": f"feed-forward: paddle.nn.{kind}.forward was replaced by one of {__name__}"}
    with runners.feed_forward_calls() as feed_forwards:
        layer(make_x())
    assert not feed_forwards


def test_forwards_of_known_libraries(monkeypatch):
    """PaddleNLP puts a forward of its own on Paddle's class, which asks for attention weights."""
    plain, _ = pair()
    expected = plain(make_x()).numpy()
    library = types.ModuleType("paddlenlp.transformers.model_outputs")
    exec(
        "def forward(self, src, src_mask=None, cache=None, output_attentions=False):\n    raise AssertionError",
        library.__dict__,
    )
    monkeypatch.setattr(nn.TransformerEncoderLayer, "forward", library.forward)
    plain.self_attn.need_weights = True  # as it leaves it after a call that asks for them
    model, report = convert(nn.Sequential(plain), return_report=True)
    assert list(report.converted) == ["0"]
    check("out", model(make_x()).numpy(), expected, "float32")


def test_flops_are_those_of_the_layers():
    plain, converted = pair()
    try:
        expected = paddle.flops(nn.Sequential(plain), [BATCH, SEQ, EMBED])
    except TypeError as error:
        pytest.skip(f"paddle.flops fails for Paddle's own layers with this NumPy: {error}")
    assert paddle.flops(nn.Sequential(converted), [BATCH, SEQ, EMBED]) == expected > 0


def test_layers_without_values_are_left_alone():
    with paddle.LazyGuard():
        layer = encoder_layer()
    _, report = convert(nn.Sequential(layer), return_report=True)
    reason = "the weight of a projection is without values, as paddle.LazyGuard leaves it"
    assert report.left_alone == {"0": f"attention: {reason}"}


def test_fused_layers_are_no_concern_of_convert():
    """Those of this package are not reported."""
    layers = (FusedMultiHeadAttention(EMBED, HEADS), incubate.FusedMultiHeadAttention(EMBED, HEADS))
    _, report = convert(nn.Sequential(encoder_layer(), *layers), return_report=True)
    assert list(report.converted) == ["0"] and not report.left_alone


@pytest.mark.skipif(not paddle.is_compiled_with_cuda(), reason="needs a GPU")
def test_gpu_is_not_where_a_model_on_the_cpu_goes():
    """Whatever device is current, a model stays on its own."""
    paddle.set_device("cpu")
    model = encoder()
    before = {name: value.numpy() for name, value in model.state_dict().items()}
    paddle.set_device("gpu")
    try:
        for change in (convert, revert):
            change(model)
            assert all(p.place.is_cpu_place() for p in model.parameters())
            for name, value in separate_state_dict(model).items():
                np.testing.assert_array_equal(value.numpy(), before[name], name)
    finally:
        paddle.set_device("cpu")


def test_a_norm_over_more_axes_that_comes_later():
    """Without parameters only its shape tells."""
    plain, converted = pair()
    for layer in (plain, converted):
        layer.norm1 = nn.LayerNorm([SEQ, EMBED], weight_attr=False, bias_attr=False)
    check_both(plain, converted, calls=1)
