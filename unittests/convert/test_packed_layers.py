"""Converted encoder layers on packed sequences: the numbers are those of padded ones, in every graph mode, and a layer
that cannot compute them says so."""

import warnings

import common
import numpy as np
import paddle
import pytest
from encoders import EMBED, HEADS, check, encoder, encoder_layer, shake
from paddle import nn
from paddle.static import InputSpec
from paddle_fused_attention import convert, pad, unpad

LENGTHS = (9, 1, 0, 4)
LONGEST = max(LENGTHS)
BATCH = len(LENGTHS)


class Stack(nn.Layer):
    """The layers of a paddle.nn.TransformerEncoder on packed sequences no longer than a number that is known."""

    def __init__(self, layers, longest):
        super().__init__()
        self.layers = layers
        self.longest = longest

    def forward(self, tokens, cu_seqlens):
        for layer in self.layers:
            tokens = layer(tokens, cu_seqlens=cu_seqlens, max_seqlen=self.longest)
        return tokens


def make_padded(dtype="float64"):
    x = np.random.default_rng(1).standard_normal((BATCH, LONGEST, EMBED))
    return paddle.to_tensor(x, dtype=dtype), paddle.to_tensor(np.arange(LONGEST) < np.array(LENGTHS)[:, None])


def make_packed(dtype="float64"):
    x, keep = make_padded(dtype)
    return unpad(x, keep)


def converted(normalize_before=False, dtype="float64", dropout=0.0):
    paddle.seed(1)
    model = convert(encoder(normalize_before, dropout))
    model.to(dtype=dtype)
    return model


@pytest.mark.parametrize("normalize_before", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_padded_and_packed(normalize_before, dtype):
    """Results, and gradients of the input and of every parameter."""
    model = converted(normalize_before, dtype)
    x, keep = make_padded(dtype)
    x.stop_gradient = False
    kept = keep.astype(dtype).unsqueeze(-1)
    d_out = paddle.to_tensor(np.random.default_rng(2).standard_normal(x.shape), dtype=dtype)
    results = []
    for is_packed in (False, True):
        if is_packed:
            packed = unpad(x, keep)
            out = Stack(model.layers, packed.max_seqlen)(packed.tokens, packed.cu_seqlens)
            assert out.shape == [sum(LENGTHS), EMBED]
            out = pad(out, packed.indices, BATCH, LONGEST)
        else:
            out = x
            for layer in model.layers:
                out = layer(out, keep.unsqueeze([1, 2]))
            out = out * kept
        parameters = dict(model.layers.named_parameters())
        gradients = paddle.grad([out], [x, *parameters.values()], [d_out])
        results.append([out, *gradients])
    for name, padded, packed in zip(("out", "x", *parameters), *results):
        check(name, packed.numpy(), padded.numpy(), dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits(dtype):
    """No worse than padded ones, both compared with float64."""
    layer, exact = converted(dtype=dtype).layers[0], converted().layers[0]
    exact.set_state_dict({name: value.astype("float64") for name, value in layer.state_dict().items()})
    x, keep = make_padded(dtype)
    packed = unpad(x, keep)
    expected = exact(packed.tokens.astype("float64"), cu_seqlens=packed.cu_seqlens).numpy()
    out = layer(packed.tokens, cu_seqlens=packed.cu_seqlens)
    assert out.dtype == x.dtype
    peer = unpad(layer(x, keep.unsqueeze([1, 2])), keep).tokens
    out, peer = (t.astype("float64").numpy() for t in (out, peer))
    common.check_tensor("out", out, expected, dtype, peer)


def test_a_sequence_knows_nothing_of_its_neighbours():
    """Its bits stay the same when all others change."""
    layer = converted(dtype="float32").layers[0]
    packed = make_packed("float32")
    outs = []
    for shift in (0.0, 5.0):
        tokens = packed.tokens.clone()
        tokens[LENGTHS[0] :] += shift
        outs.append(layer(tokens, cu_seqlens=packed.cu_seqlens, max_seqlen=packed.max_seqlen).numpy())
    np.testing.assert_array_equal(outs[0][: LENGTHS[0]], outs[1][: LENGTHS[0]])
    assert (outs[0][LENGTHS[0] :] != outs[1][LENGTHS[0] :]).any()


def test_dropout_of_one_sequence_is_that_of_a_batch_of_one():
    layer = converted(dropout=0.4).layers[0]
    layer.train()
    tokens = make_packed().tokens
    paddle.seed(7)
    expected = layer(tokens.unsqueeze(0))[0]
    paddle.seed(7)
    starts = paddle.to_tensor([0, tokens.shape[0]], dtype="int32")
    out = layer(tokens, cu_seqlens=starts)
    check("out", out.numpy(), expected.numpy(), "float64")
    paddle.seed(8)
    assert (layer(tokens, cu_seqlens=starts).numpy() != out.numpy()).any()


@pytest.mark.parametrize("full_graph", [False, True])
def test_to_static(full_graph):
    """One program, made for a bound on the lengths, serves any numbers of tokens and sequences."""
    stack = Stack(converted(dtype="float32").layers, LONGEST + 3)
    packed = make_packed("float32")
    expected = stack(packed.tokens, packed.cu_seqlens).numpy()
    first = stack(packed.tokens[: LENGTHS[0]], packed.cu_seqlens[:2]).numpy()
    specs = [InputSpec([None, EMBED], "float32", "tokens"), InputSpec([None], "int32", "cu_seqlens")]
    forward = paddle.jit.to_static(stack.forward, specs if full_graph else None, full_graph=full_graph)
    check("out", forward(packed.tokens, packed.cu_seqlens).numpy(), expected, "float32")
    check("out", forward(packed.tokens[: LENGTHS[0]], packed.cu_seqlens[:2]).numpy(), first, "float32")


def test_saved_program(tmp_path):
    stack = Stack(converted(dtype="float32").layers, LONGEST)
    stack.eval()
    packed = make_packed("float32")
    expected = stack(packed.tokens, packed.cu_seqlens).numpy()
    specs = [InputSpec([None, EMBED], "float32", "tokens"), InputSpec([None], "int32", "cu_seqlens")]
    paddle.jit.save(stack, str(tmp_path / "stack"), input_spec=specs)
    loaded = paddle.jit.load(str(tmp_path / "stack"))
    check("out", loaded(packed.tokens, packed.cu_seqlens).numpy(), expected, "float32")


def test_max_seqlen_must_be_known_in_a_graph():
    stack = Stack(converted(dtype="float32").layers, None)
    specs = [InputSpec([None, EMBED], "float32", "tokens"), InputSpec([None], "int32", "cu_seqlens")]
    with pytest.raises(ValueError, match="max_seqlen: expected an int beside cu_seqlens while a graph is built"):
        paddle.jit.to_static(stack.forward, specs, full_graph=True).concrete_program  # noqa: B018


def hook(layer, name):
    getattr(layer, name).register_forward_post_hook(lambda layer, inputs, output: output)


def drop_rows(layer, name):
    setattr(layer, name, nn.Dropout(0.5, axis=0))


def replace_attention(layer, name):
    setattr(layer, name, nn.MultiHeadAttention(EMBED, HEADS))


def replace_activation(layer, name):
    setattr(layer, name, paddle.nn.functional.elu)


@pytest.mark.parametrize(
    "change, name, half",
    [
        (hook, "self_attn", "attention"),
        (hook, "norm1", "attention"),
        (drop_rows, "dropout1", "attention"),
        (replace_attention, "self_attn", "attention"),
        (hook, "linear1", "feed-forward"),
        (hook, "norm2", "feed-forward"),
        (drop_rows, "dropout", "feed-forward"),
        (drop_rows, "dropout2", "feed-forward"),
        (replace_activation, "activation", "feed-forward"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_layer_with_a_changed_part_is_refused(change, name, half):
    """It computes padded sequences as before."""
    layer = converted(dtype="float32").layers[0]
    change(layer, name)
    packed = make_packed("float32")
    with pytest.raises(NotImplementedError, match=f"cu_seqlens: .* whose {half} was not converted, or has a part"):
        layer(packed.tokens, cu_seqlens=packed.cu_seqlens, max_seqlen=packed.max_seqlen)
    x, keep = make_padded("float32")
    layer(x, keep.unsqueeze([1, 2]))


@pytest.mark.parametrize("half", ["attention", "feed-forward"])
def test_a_layer_half_converted_is_refused(half):
    layer = shake(encoder_layer())
    if half == "attention":
        layer.dropout1 = nn.Dropout(0.5, axis=0)
    else:
        layer.activation = nn.functional.elu
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which name what was left alone
        layer = convert(nn.Sequential(layer))[0]
    assert "ConvertedEncoderLayer" in type(layer).__name__
    packed = make_packed("float32")
    with pytest.raises(NotImplementedError, match=f"cu_seqlens: .* whose {half} was not converted"):
        layer(packed.tokens, cu_seqlens=packed.cu_seqlens)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"src_mask": paddle.ones([1, 1, 1, LONGEST], dtype="bool")}, "src_mask: expected none beside cu_seqlens"),
        ({"cache": object()}, "cache: expected none beside cu_seqlens, got object"),
        ({"output_attentions": True}, "need_weights: expected none beside cu_seqlens"),
    ],
    ids=["src_mask", "cache", "output_attentions"],
)
def test_what_packed_sequences_have_not(arguments, words):
    layer = converted(dtype="float32").layers[0]
    packed = make_packed("float32")
    with pytest.raises(NotImplementedError, match=words):
        layer(packed.tokens, cu_seqlens=packed.cu_seqlens, **arguments)
    layer.self_attn.need_weights = True
    with pytest.raises(NotImplementedError, match="need_weights: expected none beside cu_seqlens"):
        layer(packed.tokens, cu_seqlens=packed.cu_seqlens)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda x, starts: (x, None, 9), ValueError, "max_seqlen: expected None without cu_seqlens, got 9"),
        (lambda x, starts: (x, starts.numpy(), 9), TypeError, "cu_seqlens: expected a Tensor"),
        (lambda x, starts: (x, starts.astype("int64"), 9), TypeError, "cu_seqlens: expected int32"),
        (lambda x, starts: (x, starts[:-1], 9), ValueError, "cu_seqlens: expected a last value that is the number"),
        (lambda x, starts: (x, starts, 8), ValueError, "cu_seqlens: expected no sequence longer than max_seqlen = 8"),
        (lambda x, starts: (x, starts, 9.0), ValueError, "max_seqlen: expected an int"),
        (lambda x, starts: (x.unsqueeze(0), starts, 9), ValueError, r"src: expected shape \[tokens, embed_dim\]"),
        (lambda x, starts: (x[:, :-1], starts, 9), ValueError, "expected shape"),
        (lambda x, starts: (x.numpy(), starts, 9), TypeError, "src: expected a Tensor"),
    ],
)
def test_bad_arguments(change, error, words):
    layer = converted(dtype="float32").layers[0]
    packed = make_packed("float32")
    src, starts, longest = change(packed.tokens, packed.cu_seqlens)
    with pytest.raises(error, match=words):
        layer(src, cu_seqlens=starts, max_seqlen=longest)
