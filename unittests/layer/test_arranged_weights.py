"""Arranged weights: the bits of results stay, and whatever can't take them says so."""

import copy
import pickle

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.hapi.dynamic_flops import register_hooks
from paddle_fused_attention import (
    FusedMultiHeadAttention,
    _amp,
    arrange_weights,
    convert,
    fused_multi_head_attention,
    incubate,
    restore_weights,
    revert,
)
from paddle_fused_attention._arranged import arranged, plain

DTYPES = ["float32", "float64", "float16", "bfloat16"]
SHAPES = [(1, 1), (1, 7), (2, 40), (3, 64)]  # few rows, and more than products of few rows have


@pytest.fixture(autouse=True)
def on_cpu():
    device = paddle.get_device()
    paddle.set_device("cpu")
    yield
    paddle.set_device(device)


def encoder(dtype="float32", before=False, hidden=96):
    paddle.seed(3)
    layer = nn.TransformerEncoderLayer(64, 2, hidden, dropout=0.1, activation="gelu", normalize_before=before)
    model = nn.TransformerEncoder(layer, 2)
    convert(model)
    model.to(dtype=dtype)
    model.eval()
    return model


def draw(*shape, dtype="float32"):
    array = np.random.default_rng(0).standard_normal(shape).astype("float32")
    return paddle.to_tensor(array).astype(dtype)


def bits(tensor):
    return tensor.numpy().tobytes()


def values(model):
    return {name: bits(parameter) for name, parameter in model.named_parameters()}


def call(model, *arguments, **more):
    with paddle.no_grad():
        return model(*arguments, **more)


@pytest.mark.parametrize("dtype", DTYPES)
def test_order(dtype):
    weight = paddle.to_tensor(np.arange(64 * 96).reshape(64, 96).astype("float32")).astype(dtype)
    panels = arranged(weight, 0)
    numbers = 2 if dtype == "bfloat16" else 1
    assert panels.shape == [64 // numbers, 96, numbers, 1]
    expected = weight.numpy().reshape(64 // numbers, numbers, 3, 32).transpose(2, 0, 3, 1)
    assert bits(panels) == np.ascontiguousarray(expected).tobytes()
    assert bits(plain(panels, 0)) == bits(weight)
    assert bits(arranged(weight.transpose([1, 0]), -1)) == bits(panels)
    assert bits(plain(arranged(weight.transpose([1, 0]), -1), -1)) == bits(weight.transpose([1, 0]))


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_encoder_has_the_same_bits(dtype, before):
    model = encoder(dtype, before)
    original = values(model)
    inputs = [draw(*shape, 64, dtype=dtype) for shape in SHAPES]
    expected = [bits(call(model, x)) for x in inputs]
    names = arrange_weights(model)
    per_layer = ("self_attn.qkv_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert sorted(names) == sorted(f"layers.{i}.{name}" for i in range(2) for name in per_layer)
    assert arrange_weights(model) == names
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert [bits(call(model, x)) for x in inputs] == expected
    restore_weights(model)
    assert values(model) == original
    assert [bits(call(model, x)) for x in inputs] == expected


@pytest.mark.parametrize("hidden", [1024, 1056])  # sums in several runs, of rows 4 KB apart or not
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_have_the_same_bits(dtype, hidden):
    model = encoder(dtype, hidden=hidden)
    inputs = [draw(*shape, 64, dtype=dtype) for shape in [(1, 1), (2, 1), (1, 5), (1, 13), (1, 64), (3, 64)]]
    expected = [bits(call(model, x)) for x in inputs]
    arrange_weights(model)
    assert [bits(call(model, x)) for x in inputs] == expected


@pytest.mark.parametrize("num_kv_heads", [None, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_has_the_same_bits(dtype, num_kv_heads):
    paddle.seed(0)
    layer = FusedMultiHeadAttention(64, 4, 0.0, 0.0, num_kv_heads=num_kv_heads)
    layer.to(dtype=dtype)
    layer.eval()
    inputs = [draw(*shape, 64, dtype=dtype) for shape in SHAPES]
    expected = [bits(call(layer, x)) for x in inputs]
    assert arrange_weights(layer) == ["qkv_weight", "linear_weight"]
    assert [bits(call(layer, x)) for x in inputs] == expected
    packed = draw(10, 64, dtype=dtype)
    starts = paddle.to_tensor([0, 3, 10], dtype="int32")
    found = bits(call(layer, packed, cu_seqlens=starts))
    restore_weights(layer)
    assert found == bits(call(layer, packed, cu_seqlens=starts))


def test_residual_wider_than_the_weights():
    paddle.seed(0)
    layer = FusedMultiHeadAttention(64, 4, 0.0, 0.0)
    layer.eval()
    layer.to(dtype="bfloat16")
    x = draw(2, 5, 64)
    expected = bits(call(layer, x))
    arrange_weights(layer)
    assert bits(call(layer, x)) == expected


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_feed_forward_of_incubate(activation):
    layer = incubate.FusedFeedForward(32, 64, activation=activation)
    layer.eval()
    x = draw(2, 5, 32)
    expected = bits(call(layer, x))
    assert arrange_weights(layer) == ["_linear1_weight", "_linear2_weight"]
    assert bits(call(layer, x)) == expected


def converted_decoder(dtype="float32"):
    paddle.seed(1)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 2, 96), 2)
    convert(model)
    model.to(dtype=dtype)
    model.eval()
    return model


def empty_caches(model, memory):
    """As model.gen_cache(memory); empty keys made here, since before 3.1 Paddle's CPU makes none of 16 bits."""

    def caches(layer):
        attention = layer.self_attn
        empty = paddle.zeros([memory.shape[0], attention.num_heads, 0, attention.head_dim], memory.dtype)
        static = layer.cross_attn.gen_cache(memory, memory, layer.cross_attn.StaticCache)
        return attention.Cache(empty, empty), static

    return [caches(layer) for layer in model.layers]


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoder_has_the_same_bits(dtype):
    """With a memory, and token by token with caches."""
    model = converted_decoder(dtype)
    x, memory = draw(2, 5, 64, dtype=dtype), draw(2, 7, 64, dtype=dtype)

    def results():
        cache = call(empty_caches, model, memory)
        found = [call(model, x, memory)]
        for token in range(3):
            out, cache = call(model, x[:, token : token + 1], memory, cache=cache)
            found.append(out)
        return [bits(out) for out in found]

    expected = results()
    attentions = [f"{of}.{name}" for of in ("self_attn", "cross_attn") for name in ("qkv_weight", "out_proj.weight")]
    names = {*attentions, "linear1.weight", "linear2.weight"}
    assert set(arrange_weights(model)) == {f"layers.{i}.{name}" for i in range(2) for name in names}
    assert results() == expected
    restore_weights(model)
    assert results() == expected


@pytest.mark.parametrize("num_kv_heads", [None, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_keys_caches_and_weights(dtype, num_kv_heads):
    paddle.seed(0)
    layer = FusedMultiHeadAttention(
        64, 4, 0.0, 0.0, num_kv_heads=num_kv_heads, need_weights=True, normalize_before=True
    )
    layer.to(dtype=dtype)
    layer.eval()
    x, key, value = (draw(2, length, 64, dtype=dtype) for length in (3, 5, 5))

    def results():
        found = [*call(layer, x), *call(layer, x, key, key), *call(layer, x, key, value)]
        for cache in (call(layer.gen_cache, x), call(layer.gen_cache, key, type=layer.StaticCache)):
            out, weights, cache = call(layer, x, cache=cache)
            found += [out, weights, *cache]
        return [bits(tensor) for tensor in found]

    expected = results()
    assert arrange_weights(layer) == ["qkv_weight", "linear_weight"]
    assert results() == expected


def test_other_keys_in_part_of_a_panel_are_refused():
    layer = FusedMultiHeadAttention(64, 4, num_kv_heads=1)  # keys are rows 64 to 80 of the packed weight
    layer.eval()
    x, key, value = draw(2, 3, 64), draw(2, 5, 64), draw(2, 5, 64)
    expected = bits(call(layer, x, key, key))
    assert arrange_weights(layer)
    assert bits(call(layer, x, key, key)) == expected
    with pytest.raises(NotImplementedError, match="qkv_weight: expected a plain weight here, .* rows 64 to 80 do not"):
        call(layer, x, key, value)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_operator(dtype, activation, transposed):
    fused = incubate.functional.fused_linear_activation
    weight, bias = draw(96, 64, dtype=dtype), draw(64, dtype=dtype)
    panels = arranged(weight.transpose([1, 0]), -1) if transposed else arranged(weight, 0)
    weight = weight.transpose([1, 0]).contiguous() if transposed else weight
    for rows in (1, 2, 3, 40, 200):
        x = draw(rows, 96, dtype=dtype)
        found, expected = (fused(x, w, bias, False, transposed, activation) for w in (panels, weight))
        assert bits(found) == bits(expected)


def test_bad_weights_of_the_linear_operator():
    fused = incubate.functional.fused_linear
    weight = arranged(draw(96, 64), 0)
    x = draw(3, 96)
    with pytest.raises(ValueError, match=r"weight: expected shape \[64, out_features\]"):
        fused(draw(3, 64), weight)
    with pytest.raises(ValueError, match="weight: expected a shape that ends in"):
        fused(x, weight.reshape([48, 64, 2, 1]))
    with pytest.raises(ValueError, match="weight: expected an arranged weight, with multiples of 32"):
        fused(x, arranged(draw(96, 64), 0)[:, :48])
    x.stop_gradient = False
    with pytest.raises(ValueError, match="weight: expected a weight that is not arranged, where a gradient is wanted"):
        fused(x, weight).sum().backward()


def test_other_sizes_stay_as_they_are():
    model = encoder(hidden=80)
    assert all("self_attn" in name for name in arrange_weights(model))
    layer = FusedMultiHeadAttention(48, 4)
    assert arrange_weights(layer) == []


def test_shared_parameters_stay_as_they_are():
    class Both(nn.Layer):
        def __init__(self):
            super().__init__()
            self.first = FusedMultiHeadAttention(64, 2)
            self.second = nn.Linear(64, 64)
            self.second.weight = self.first.linear_weight

    model = Both()
    assert arrange_weights(model) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flops(dtype):
    layers = [FusedMultiHeadAttention(64, 4), incubate.FusedFeedForward(64, 96, 0.0)]
    counts = []
    for arranges in (False, True):
        for layer in layers:
            layer.to(dtype=dtype)
            assert not arranges or len(arrange_weights(layer)) == 2
            layer.total_ops = 0
            register_hooks[type(layer)](layer, [draw(2, 5, 64)], None)
        counts.append([layer.total_ops for layer in layers])
    assert counts[0] == counts[1] == [2 * 5 * 64 * 64 * 4 + 2 * 2 * 64 * 25, 2 * 5 * 64 * 96 * 2]


def test_several_threads_give_the_same_bits():
    model = encoder()
    arrange_weights(model)
    x = draw(1, 50, 64)
    assert len({bits(call(model, x)) for _ in range(5)}) == 1


def test_gradients_are_refused():
    model = encoder()
    arrange_weights(model)
    assert all(p.stop_gradient for name, p in model.named_parameters() if len(p.shape) > 3)
    with pytest.raises(ValueError, match="weight: expected a weight that is not arranged, where a gradient is wanted"):
        model(draw(1, 3, 64))
    restore_weights(model)
    model(draw(1, 3, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def bare_attention():
    paddle.seed(2)
    model = nn.Sequential(nn.MultiHeadAttention(64, 4))
    convert(model)
    model.eval()
    return model


@pytest.mark.parametrize(
    "make, attention",
    [
        (encoder, "layers.0.self_attn"),
        (converted_decoder, "layers.0.cross_attn"),
        (bare_attention, "0"),
    ],
)
def test_state_dicts_are_refused(make, attention):
    model = make()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    arrange_weights(model)
    for refused in (model.state_dict, lambda: model.set_state_dict(state), lambda: revert(model)):
        with pytest.raises(RuntimeError, match="which arrange_weights has arranged; restore_weights"):
            refused()
    with pytest.raises(RuntimeError, match="state_dict: expected plain weights"):
        dict(model.named_sublayers())[attention].state_dict()
    restore_weights(model)
    assert {name: bits(value) for name, value in model.state_dict().items()} == {
        name: bits(value) for name, value in state.items()
    }
    revert(model)


def test_frozen_parameters_stay_frozen():
    layer = FusedMultiHeadAttention(64, 4)
    layer.linear_weight.stop_gradient = True
    restore_weights((arrange_weights(layer), layer)[1])
    assert layer.linear_weight.stop_gradient
    assert not layer.qkv_weight.stop_gradient


def test_another_dtype_is_refused():
    layer = FusedMultiHeadAttention(64, 4)
    layer.eval()
    arrange_weights(layer)
    layer.to(dtype="bfloat16")
    with pytest.raises(ValueError, match=r"shape that ends in \[2, 1\], as that of a weight arranged in bfloat16"):
        call(layer, draw(1, 3, 64, dtype="bfloat16"))


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_restored_after_a_cast(dtypes):
    layer, same = FusedMultiHeadAttention(64, 4), FusedMultiHeadAttention(64, 4)
    same.set_state_dict(layer.state_dict())
    for dtype in dtypes:
        for each in (layer, same):
            each.to(dtype=dtype)
        if dtype == dtypes[0]:
            arrange_weights(layer)
    restore_weights(layer)
    assert values(layer) == values(same)


def test_auto_cast_is_refused(monkeypatch):
    monkeypatch.setattr(_amp, "target_dtype", lambda *_: paddle.bfloat16)  # on the CPU Paddle switches auto_cast off
    layer = FusedMultiHeadAttention(64, 4)
    layer.eval()
    arrange_weights(layer)
    with pytest.raises(ValueError, match="arranged in bfloat16"):
        call(layer, draw(1, 3, 64))


def test_they_belong_to_the_cpu(place):
    layer = FusedMultiHeadAttention(64, 4)
    x = draw(1, 3, 64)
    weights = layer.qkv_weight.detach(), layer.linear_weight.detach()

    def result(*tensors):
        on_place = [paddle.to_tensor(tensor.numpy(), place=place) for tensor in tensors]
        with paddle.no_grad():
            return fused_multi_head_attention(*on_place, training=False)

    panels = [arranged(weight, axis) for weight, axis in zip(weights, (-1, 0))]
    if isinstance(place, paddle.CUDAPlace):
        with pytest.raises(ValueError, match="linear_weight: expected a weight that is arranged for the CPU there"):
            result(x, *panels)
    else:
        assert bits(result(x, *panels)) == bits(result(x, *weights))


def test_only_one_weight_is_refused():
    layer = FusedMultiHeadAttention(64, 4)
    x = draw(1, 3, 64)
    qkv, linear = layer.qkv_weight.detach(), layer.linear_weight.detach()
    for weights in ((arranged(qkv, -1), linear), (qkv, arranged(linear, 0))):
        with pytest.raises(ValueError, match="weight: expected"), paddle.no_grad():
            fused_multi_head_attention(x, *weights, training=False)


def test_a_linear_layer_does_not_take_one():
    linear = nn.Linear(64, 64)
    x = draw(1, 3, 64)
    weight = arranged(linear.weight.detach(), 0)
    linear.weight.get_tensor()._share_data_with(weight.get_tensor())
    with pytest.raises(ValueError):
        call(linear, x)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copies", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
def test_copies(copies):
    if copies is by_pickle and (int(paddle.version.major), int(paddle.version.minor)) < (3, 3):
        pytest.skip("parameters can be pickled since Paddle 3.3")
    model = encoder()
    original = values(model)
    x = draw(1, 3, 64)
    expected = bits(call(model, x))
    names = arrange_weights(model)
    copied = copies(model)
    assert arrange_weights(copied) == names
    assert bits(call(copied, x)) == expected
    with pytest.raises(RuntimeError, match="state_dict: expected plain weights"):
        copied.state_dict()
    restore_weights(copied)
    assert bits(call(copied, x)) == expected
    assert values(copied) == original


def test_parameter_that_was_replaced_is_plain():
    layer = FusedMultiHeadAttention(64, 4)
    arrange_weights(layer)
    for name, shape in (("qkv_weight", [3, 4, 16, 64]), ("linear_weight", [64, 64])):
        setattr(layer, name, layer.create_parameter(shape))
    original = values(layer)
    layer.state_dict()
    restore_weights(layer)
    assert values(layer) == original


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_programs(tmp_path, dtype):
    model = encoder(dtype)
    x = draw(2, 9, 64, dtype=dtype)
    expected = bits(call(model, x))
    arrange_weights(model)
    path = str(tmp_path / "encoder")
    paddle.jit.save(model, path, [paddle.static.InputSpec([None, None, 64], dtype, "x")])
    restore_weights(model)
    assert bits(call(model, x)) == expected
    loaded = paddle.jit.load(path)
    loaded.eval()
    assert bits(call(loaded, x)) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_program_with_other_keys(tmp_path, dtype):
    model = converted_decoder(dtype)
    x, memory = draw(2, 4, 64, dtype=dtype), draw(2, 9, 64, dtype=dtype)
    expected = bits(call(model, x, memory))
    arrange_weights(model)
    path = str(tmp_path / "decoder")
    specs = [paddle.static.InputSpec([None, None, 64], dtype, name) for name in ("tgt", "memory")]
    paddle.jit.save(model, path, specs)
    loaded = paddle.jit.load(path)
    loaded.eval()
    assert bits(call(loaded, x, memory)) == expected


def test_bare_attention_has_the_same_bits():
    model = bare_attention()
    x, key = draw(2, 3, 64), draw(2, 5, 64)
    arguments = [(x,), (x, key, key)]
    expected = [bits(call(model[0], *tensors)) for tensors in arguments]
    assert arrange_weights(model) == ["0.qkv_weight", "0.out_proj.weight"]
    assert [bits(call(model[0], *tensors)) for tensors in arguments] == expected


def test_gradient_of_a_saved_program_is_refused(tmp_path):
    model = encoder()
    x = draw(2, 9, 64)
    arrange_weights(model)
    path = str(tmp_path / "encoder")
    paddle.jit.save(model, path, [paddle.static.InputSpec([None, None, 64], "float32", "x")])
    loaded = paddle.jit.load(path)
    loaded.train()
    x.stop_gradient = False
    with pytest.raises(Exception, match="arranged"):
        loaded(x).sum().backward()


def test_bad_arguments():
    for function in (arrange_weights, restore_weights):
        with pytest.raises(TypeError, match="model: expected a paddle.nn.Layer, got int"):
            function(3)
    paddle.enable_static()
    try:
        with pytest.raises(RuntimeError, match="arrange_weights: expected dygraph mode"):
            arrange_weights(nn.Linear(2, 2))
    finally:
        paddle.disable_static()
