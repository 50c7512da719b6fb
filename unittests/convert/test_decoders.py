"""Decoder layers, whole transformers and attentions by themselves, converted: against Paddle's own."""

import copy
import types

import numpy as np
import paddle
import pytest
from encoders import BATCH, EMBED, HEADS, SEQ, check, make_mask, make_x, replace, shake, state_of
from paddle import nn
from paddle_fused_attention import convert, revert
from runners import attention_calls, feed_forward_calls, operator_calls

KEYS = 9
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
ORDERS = pytest.mark.parametrize("normalize_before", [False, True])


def decoder_layer(normalize_before=False, dropout=0.0, **arguments):
    return nn.TransformerDecoderLayer(EMBED, HEADS, 24, dropout, "gelu", normalize_before=normalize_before, **arguments)


def decoder(normalize_before=False, dropout=0.0):
    norm = nn.LayerNorm(EMBED) if normalize_before else None
    return shake(nn.TransformerDecoder(decoder_layer(normalize_before, dropout), 2, norm))


def pair(make, *arguments, dtype="float32"):
    """A layer and a converted copy."""
    layer = shake(make(*arguments))
    layer.to(dtype=dtype)
    return layer, convert(copy.deepcopy(layer))


def make_masks(kind, dtype):
    tgt = make_mask(kind, dtype)
    return tgt, make_mask(kind, dtype, (BATCH, 1, SEQ, KEYS))


def results(model, dtype, *others):
    """The result, and every gradient by name."""
    tensors = {"tgt": make_x(dtype), "memory": make_x(dtype, KEYS, seed=2)}
    for tensor in tensors.values():
        tensor.stop_gradient = False
    out = model(*tensors.values(), *others)
    out.backward(make_x(dtype, out.shape[1], seed=9))
    found = {name: p.grad.numpy() for name, p in model.named_parameters()}
    model.clear_gradients()
    return {"out": out.numpy(), **{name: tensor.grad.numpy() for name, tensor in tensors.items()}, **found}


def compare(plain, converted, dtype, *others):
    expected, actual = results(plain, dtype, *others), results(converted, dtype, *others)
    packed = {name for name in expected if "q_proj" in name or "k_proj" in name or "v_proj" in name}
    for name in expected.keys() - packed:
        check(name, actual[name], expected[name], dtype)
    for name in packed:
        if "q_proj" not in name:
            continue
        parts = [expected[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
        parts = [part.T for part in parts]
        attention, kind = name.rsplit(".", 2)[0], name.rsplit(".", 1)[1]
        whole = actual[f"{attention}.qkv_{kind}"]
        check(name, whole, np.stack(parts).reshape(whole.shape), dtype)


@DTYPES
@pytest.mark.parametrize("kind", ["none", "bool", "int64", "float"])
@ORDERS
def test_decoder_layers(normalize_before, kind, dtype):
    plain, converted = pair(decoder_layer, normalize_before, dtype=dtype)
    with operator_calls() as blocks, attention_calls() as attentions, feed_forward_calls() as feed_forwards:
        compare(plain, converted, dtype, *make_masks(kind, dtype))
    assert len(blocks) == len(feed_forwards) == 1 and len(attentions) == 1
    # One product for the key and the value, which are both the memory.
    assert attentions[0].value is None and attentions[0].key.shape == [BATCH, KEYS, 2 * HEADS, EMBED // HEADS]


@ORDERS
def test_gradients_of_masks(normalize_before):
    plain, converted = pair(decoder_layer, normalize_before, dtype="float64")
    found = []
    for layer in (plain, converted):
        masks = make_masks("float", "float64")
        masks = [paddle.to_tensor(mask.numpy() * 0.01, stop_gradient=False) for mask in masks]
        layer(make_x("float64"), make_x("float64", KEYS, seed=2), *masks).square().sum().backward()
        found.append([mask.grad.numpy() for mask in masks])
    for expected, actual in zip(*found):
        assert np.abs(expected).max() > 0
        check("d_mask", actual, expected, "float64")


@DTYPES
@ORDERS
def test_whole_transformers(normalize_before, dtype):
    def make():
        return nn.Transformer(EMBED, HEADS, 1, 2, 24, 0.0, normalize_before=normalize_before)

    plain = shake(make())
    plain.to(dtype=dtype)
    converted, report = convert(copy.deepcopy(plain), return_report=True)
    order = "pre" if normalize_before else "post"
    assert report.converted == {
        "encoder.layers.0": f"{order}-layer-norm encoder layer, attention and feed-forward",
        "decoder.layers.0": f"{order}-layer-norm decoder layer, self-attention, cross-attention and feed-forward",
        "decoder.layers.1": f"{order}-layer-norm decoder layer, self-attention, cross-attention and feed-forward",
    }
    assert not report.left_alone
    src, tgt = make_x(dtype, KEYS), make_x(dtype)
    mask = converted.generate_square_subsequent_mask(SEQ).astype(dtype)
    memory_mask = make_mask("bool", dtype, (BATCH, 1, SEQ, KEYS))
    check("out", converted(src, tgt, None, mask, memory_mask).numpy(), plain(src, tgt, None, mask, memory_mask), dtype)
    before = state_of(plain)
    after = state_of(revert(converted))
    assert list(before) == list(after)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert {type(layer) for layer in converted.sublayers()} == {type(layer) for layer in plain.sublayers()}
    check("reverted", converted(src, tgt).numpy(), plain(src, tgt).numpy(), dtype)


@pytest.mark.parametrize("do_zip", [False, True])
@ORDERS
def test_generation_step_by_step(normalize_before, do_zip):
    """With the caches of TransformerDecoder, made by the converted model itself."""
    plain = decoder(normalize_before)
    plain.eval()
    converted = convert(copy.deepcopy(plain))
    tgt, memory = make_x(), make_x(seq_len=KEYS, seed=2)
    memory_mask = make_mask("bool", "float32", (BATCH, 1, 1, KEYS), sees_none=False)
    caches = [model.gen_cache(memory) for model in (plain, converted)]
    for step in range(SEQ):
        outs = []
        for i, model in enumerate((plain, converted)):
            out, caches[i] = model(tgt[:, step : step + 1], memory, None, memory_mask, caches[i])
            outs.append(out.numpy())
        check("out", outs[1], outs[0], "float32")
        for expected, actual in zip(*caches):
            for wanted, found in zip(expected, actual):
                assert type(found) is type(wanted)
                check("keys", found.k.numpy(), wanted.k.numpy(), "float32")
                check("values", found.v.numpy(), wanted.v.numpy(), "float32")
    zipped = converted.gen_cache(memory, do_zip=do_zip)
    assert len(zipped) == 2


def test_the_same_cache_is_read_at_every_step():
    """A StaticCache is not projected or copied again."""
    _, layer = pair(decoder_layer)
    layer.eval()
    tgt, memory = make_x(seq_len=1), make_x(seq_len=KEYS, seed=2)
    cache = layer.gen_cache(memory)
    with attention_calls() as calls:
        _, (_, static) = layer(tgt, memory, cache=cache)
    assert static.k is cache[1].k and calls[1].key is cache[1].k and calls[1].keys_by_head


def test_dropout_rates():
    layer = convert(decoder_layer(dropout=0.25, attn_dropout=0.5, act_dropout=0.125))
    with operator_calls() as blocks, attention_calls() as attentions, feed_forward_calls() as feed_forwards:
        layer(make_x(), make_x(seq_len=KEYS))
    assert (blocks[0].dropout_rate, blocks[0].attn_dropout_rate) == (0.25, 0.5)
    assert attentions[0].dropout_rate == 0.5
    assert (feed_forwards[0].dropout1_rate, feed_forwards[0].dropout2_rate) == (0.125, 0.25)
    layer.eval()
    outs = [layer(make_x(), make_x(seq_len=KEYS)).numpy() for _ in range(2)]
    assert np.array_equal(*outs)


PARTS = {
    "self-attention": (replace("norm1", nn.Identity()), "its norm1 is a Identity"),
    "cross-attention": (replace("cross_attn", nn.MultiHeadAttention(EMBED, HEADS, kdim=EMBED, vdim=8)), "vdim=8"),
    "feed-forward": (replace("activation", nn.functional.tanh), "its activation is tanh"),
}


@pytest.mark.parametrize("part", PARTS)
def test_the_other_parts_are_converted(part):
    change, reason = PARTS[part]
    plain = shake(decoder_layer())
    change(plain)
    converted, report = convert(copy.deepcopy(plain), return_report=True)
    others = [name for name in PARTS if name != part]
    assert report.converted == {"": f"post-layer-norm decoder layer, {others[0]} and {others[1]}"}
    assert report.left_alone[""].startswith(f"{part}: ") and reason in report.left_alone[""]
    if part != "cross-attention":  # of which Paddle's own forward fails, since key and value are one
        check(
            "out", converted(make_x(), make_x(seq_len=KEYS)).numpy(), plain(make_x(), make_x(seq_len=KEYS)), "float32"
        )
    assert state_of(revert(converted)).keys() == state_of(plain).keys()


class OwnDecoderLayer(nn.TransformerDecoderLayer):
    pass


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda layer: setattr(layer.cross_attn, "need_weights", True), "its cross_attn has need_weights=True"),
        (lambda layer: setattr(layer, "forward", layer.forward), "its forward was replaced"),
        (lambda layer: setattr(layer, "__class__", OwnDecoderLayer), "a subclass of paddle.nn.TransformerDecoderLayer"),
    ],
)
def test_left_alone(change, reason):
    layer = decoder_layer()
    change(layer)
    kind = type(layer)
    _, report = convert(nn.Sequential(layer), return_report=True)
    assert not report.converted and report.left_alone["0"].startswith(reason) and type(layer) is kind


@pytest.mark.parametrize("path", ["self_attn", "cross_attn.q_proj", "norm2", "dropout2", "linear1", "norm3"])
def test_hooks_that_come_later(path):
    """They run, and the parts that have none stay with their operators."""
    plain, converted = pair(decoder_layer)
    calls = []
    for layer in (plain, converted):
        for name in path.split("."):
            layer = getattr(layer, name)
        layer.register_forward_post_hook(lambda _, __, out: calls.append(1) or out)
    with operator_calls() as blocks, attention_calls() as attentions, feed_forward_calls() as feed_forwards:
        compare(plain, converted, "float32")
    assert len(calls) == 2
    assert len(blocks) == 1 and len(feed_forwards) == (path not in ("linear1", "norm3"))
    assert len(attentions) == (path != "cross_attn.q_proj")


def test_forwards_of_known_libraries(monkeypatch):
    """PaddleNLP's forward takes no memory, too, and gives attention weights."""
    plain, converted = pair(decoder_layer)
    x, memory = make_x(), make_x(seq_len=KEYS, seed=2)
    with pytest.raises(TypeError, match="memory: expected a Tensor"):
        converted(x, None)
    library = types.ModuleType("paddlenlp.transformers.model_outputs")
    exec("def forward(self, tgt, memory, *others):\n    raise AssertionError", library.__dict__)
    expected = plain(x, memory).numpy()
    hidden = plain.norm1(x + plain.self_attn(x))
    monkeypatch.setattr(nn.TransformerDecoderLayer, "forward", library.forward)
    out, of_itself, of_memory = converted(x, memory, output_attentions=True)
    check("out", out.numpy(), expected, "float32")
    assert of_itself.shape == [BATCH, HEADS, SEQ, SEQ] and of_memory.shape == [BATCH, HEADS, SEQ, KEYS]
    plain.cross_attn.need_weights = True
    check("weights", of_memory.numpy(), plain.cross_attn(hidden, memory, memory)[1].numpy(), "float32")
    out, of_itself, nothing = converted(x, None, output_attentions=True)
    assert nothing is None and out.shape == x.shape
    wanted = plain.norm3(hidden + plain.linear2(plain.activation(plain.linear1(hidden))))
    check("alone", out.numpy(), wanted.numpy(), "float32")
    model, report = convert(nn.Sequential(decoder_layer()), return_report=True)
    assert list(report.converted) == ["0"] and not report.left_alone


def test_copies_and_new_layers():
    plain, converted = pair(decoder_layer)
    x, memory = make_x(), make_x(seq_len=KEYS, seed=2)
    expected = plain(x, memory).numpy()
    check("out", copy.deepcopy(converted)(x, memory).numpy(), expected, "float32")
    assert list(revert(copy.deepcopy(converted)).state_dict()) == list(plain.state_dict())
    stacked = nn.TransformerDecoder(converted, 2)  # which makes new layers of the class
    with operator_calls() as blocks, attention_calls() as attentions:
        stacked(x, memory)
    assert len(blocks) == len(attentions) == 2


@pytest.mark.parametrize("graph", ["full_graph", "saved"])
def test_graphs(graph, tmp_path):
    plain = shake(decoder_layer())
    converted = convert(copy.deepcopy(plain))
    converted.eval()
    x, memory = make_x(), make_x(seq_len=KEYS, seed=2)
    expected = plain(x, memory).numpy()
    if graph == "full_graph":
        out = paddle.jit.to_static(converted, full_graph=True)(x, memory).numpy()
    else:
        spec = [paddle.static.InputSpec([None, None, EMBED], "float32", name) for name in ("tgt", "memory")]
        paddle.jit.save(converted, str(tmp_path / "layer"), input_spec=spec)
        out = paddle.jit.load(str(tmp_path / "layer"))(x, memory).numpy()
    check("out", out, expected, "float32")


class Detector(nn.Layer):
    """An attention of its own, as detection transformers call it."""

    def __init__(self, need_weights=False, **arguments):
        super().__init__()
        self.attention = nn.MultiHeadAttention(EMBED, HEADS, need_weights=need_weights, **arguments)

    def forward(self, tgt, memory):
        query = tgt + 0.5
        found = self.attention(query, memory * 2.0, memory)
        return found[0] + found[1].sum() if self.attention.need_weights else found


@DTYPES
@pytest.mark.parametrize("need_weights", [False, True])
def test_attentions_by_themselves(need_weights, dtype):
    plain = shake(Detector(need_weights))
    plain.to(dtype=dtype)
    converted, report = convert(copy.deepcopy(plain), return_report=True)
    assert report.converted == {"attention": "paddle.nn.layer.transformer.MultiHeadAttention"}
    compare(plain, converted, dtype)
    assert list(state_of(revert(converted))) == list(state_of(plain))


class OfOtherWidths(nn.Layer):
    def __init__(self, need_weights=False, bias_attr=None):
        super().__init__()
        self.attention = nn.MultiHeadAttention(
            EMBED, HEADS, kdim=8, vdim=12, need_weights=need_weights, bias_attr=bias_attr
        )

    def forward(self, tgt, memory, *others):
        found = self.attention(tgt, memory[:, :, :8], memory[:, :, :12], *others)
        return found[0] + found[1].sum() if self.attention.need_weights else found


@DTYPES
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("bias_attr", [None, False])
def test_attentions_of_other_widths(bias_attr, need_weights, dtype):
    """Nothing is packed, so that everything has its name all the time."""
    plain = shake(OfOtherWidths(need_weights, bias_attr))
    plain.to(dtype=dtype)
    converted, report = convert(copy.deepcopy(plain), return_report=True)
    assert list(report.converted) == ["attention"]
    with attention_calls() as attentions:
        expected, actual = (results(model, dtype, make_masks("float", dtype)[1]) for model in (plain, converted))
    assert len(attentions) == 1
    assert list(actual) == list(expected)
    for name, wanted in expected.items():
        if name.endswith("k_proj.bias"):  # softmax does not see it
            assert max(np.abs(wanted).max(), np.abs(actual[name]).max()) < (1e-4 if dtype == "float32" else 1e-12)
        else:
            check(name, actual[name], wanted, dtype)
    key, value = make_x(dtype, KEYS)[:, :, :8], make_x(dtype, KEYS)[:, :, :12]
    caches = [model.attention.gen_cache(key, value, nn.MultiHeadAttention.StaticCache) for model in (plain, converted)]
    check("keys", caches[1].k.numpy(), caches[0].k.numpy(), dtype)
    outs = [model.attention(make_x(dtype), cache=cache)[0] for model, cache in zip((plain, converted), caches)]
    check("static", outs[1].numpy(), outs[0].numpy(), dtype)
    converted.attention.v_proj.register_forward_post_hook(lambda *_: None)
    with attention_calls() as attentions:
        check(
            "hook",
            converted(make_x(dtype), make_x(dtype, KEYS)).numpy(),
            plain(make_x(dtype), make_x(dtype, KEYS)),
            dtype,
        )
    assert not attentions
    assert type(revert(converted).attention) is nn.MultiHeadAttention


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda layer: layer.register_forward_post_hook(lambda *_: None), "it has hooks or a forward of its own"),
        (lambda layer: setattr(layer, "q_proj", nn.Identity()), "its q_proj is a Identity, not a paddle.nn.Linear"),
        (lambda layer: setattr(layer, "more", nn.Linear(2, 2)), "it has more beside its projections"),
    ],
)
def test_attentions_that_are_left_alone(change, reason):
    model = Detector()
    change(model.attention)
    _, report = convert(model, return_report=True)
    assert not report.converted and report.left_alone == {"attention": reason}


BAD = [
    (lambda x, m: (3, m), TypeError, "tgt:"),
    (lambda x, m: (x, 3), TypeError, "memory:"),
    (lambda x, m: (x, m[:1]), ValueError, "memory:"),
    (lambda x, m: (x, m[:, :, :8]), ValueError, "memory:"),
    (lambda x, m: (x, m.astype("float64")), TypeError, "memory:"),
    (lambda x, m: (x, m, np.ones([SEQ, SEQ])), TypeError, "tgt_mask:"),
    (lambda x, m: (x, m, None, paddle.ones([SEQ, SEQ], "bool")), ValueError, "memory_mask:"),
    (lambda x, m: (x[:, :, :8], m), ValueError, "tgt:"),
    (lambda x, m: (x, m, paddle.ones([SEQ, KEYS], "bool")), ValueError, "tgt_mask:"),
    (lambda x, m: (x, m, None, None, 3), TypeError, "cache:"),
    (lambda x, m: (x, m, None, None, (None, 3)), TypeError, "cache:"),
]


@pytest.mark.parametrize("arguments, error, start", BAD, ids=lambda v: "")
def test_bad_arguments(arguments, error, start):
    _, layer = pair(decoder_layer)
    with pytest.raises(error) as raised:
        layer(*arguments(make_x(), make_x(seq_len=KEYS)))
    assert str(raised.value).startswith(start), raised.value
