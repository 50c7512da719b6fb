"""Packed weights compute what the separate ones do, in the layer that the report names and in converted models."""

import re

import common
import numpy as np
import paddle
import pytest
from families import EMBED, FAMILIES, HEADS, SUFFIXES, assert_same, draw, family, load, out_in, save
from paddle import nn
from paddle_fused_attention import FusedMultiHeadAttention, convert
from paddle_fused_attention.__main__ import main


def separate_projections(state, block, transpose):
    """Query, key, value and output projection as [in, out] weights and biases, and the layer norm, of any family."""
    prefix = block.rpartition(".")[0] + "."

    def pair(name):
        weight = state[f"{prefix}{name}.weight"]
        return weight.T if transpose else weight, state.get(f"{prefix}{name}.bias")

    if f"{prefix}attn.c_attn.weight" in state:
        weight, bias = pair("attn.c_attn")
        qkv = zip(np.split(weight, 3, 1), np.split(bias, 3))
        return [*qkv, pair("attn.c_proj")], [state[f"{prefix}ln_1.{part}"] for part in ("weight", "bias")]
    inner = "self" if f"{prefix}attention.self.query.weight" in state else "attention"
    names = [*(f"attention.{inner}.{n}" for n in ("query", "key", "value")), "attention.output.dense"]
    norms = ["attention.output.LayerNorm", "layernorm_before"]
    parts = [f"{prefix}{n}.{part}" for n in norms for part in ("weight", "gamma", "bias", "beta")]
    return [pair(name) for name in names], [state[name] for name in parts if name in state]


def composed(state, block, normalize_before, transpose, causal, x):
    """The block by Paddle's layers."""
    pairs, norm_parts = separate_projections(state, block, transpose)
    attention, layer_norm = nn.MultiHeadAttention(EMBED, HEADS), nn.LayerNorm(EMBED)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    for projection, (weight, bias) in zip(projections, pairs):
        projection.weight.set_value(np.ascontiguousarray(weight))
        projection.bias.set_value(np.zeros(EMBED, "float32") if bias is None else bias)
    layer_norm.weight.set_value(norm_parts[0])
    layer_norm.bias.set_value(norm_parts[1])
    mask = paddle.to_tensor(np.tril(np.ones((x.shape[1], x.shape[1]), bool))) if causal else None
    if normalize_before:
        h = layer_norm(x)
        return x + attention(h, h, h, mask)
    return layer_norm(x + attention(x, x, x, mask))


def layer_of(report):
    """The layer that a line of the report is for."""
    name, _, arguments = re.search(r"for (\w+)(\()(.*)\)", report).groups()
    assert name == "FusedMultiHeadAttention"
    return eval(f"layer({arguments})", {"layer": FusedMultiHeadAttention})


def encoder_layer(state, prefix, normalize_before, transpose, change):
    """A layer of Paddle that `change` is done to, with the entries of a state that belong to it."""
    layer = change(nn.TransformerEncoderLayer(EMBED, HEADS, 24, 0.0, normalize_before=normalize_before))
    parts = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    if transpose:
        parts = {name: np.ascontiguousarray(value.T) if value.ndim == 2 else value for name, value in parts.items()}
    assert layer.set_state_dict(parts) == ([], [])
    return layer


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_weights_compute_the_same_and_go_back(name, suffix, tmp_path, capsys):
    """The layer is the one that the report names."""
    state, blocks, normalize_before, said = family(name)
    if suffix == ".pdparams" and out_in(name):
        said += ["--layout", "out-in"]
    source = save(tmp_path / f"in{suffix}", state)
    packed_file, back = tmp_path / f"packed{suffix}", tmp_path / f"back{suffix}"
    assert main(["convert", str(source), str(packed_file), "--num-heads", str(HEADS), *said]) == 0
    output = capsys.readouterr().out
    packed = load(packed_file)
    x = paddle.to_tensor(draw(2, 5, EMBED))
    for block in blocks:
        report = re.search(rf"^{re.escape(block)}: (.*)", output, re.M).group(1)
        assert f"weights {'[out, in]' if out_in(name) else '[in, out]'}" in report
        if block.endswith("self_attn"):
            use = "for a model after paddle_fused_attention.convert(model) (an encoder layer)"
            stay = ", once its other linear weights, [out, in] here too, are transposed" if out_in(name) else ""
            assert report.endswith(use + stay)
            order = (block[: -len("self_attn")], normalize_before, out_in(name))
            actual, expected = encoder_layer(packed, *order, convert), encoder_layer(state, *order, lambda layer: layer)
            common.check_tensor(
                "out", actual(x).numpy().astype("float64"), expected(x).numpy().astype("float64"), "float32"
            )
            del packed[f"{block}.qkv_weight"], packed[f"{block}.qkv_bias"]
            continue
        layer = layer_of(report)
        layer.eval()
        assert ("whose qkv_bias is None" in report) == (f"{block}.qkv_bias" not in packed)
        if f"{block}.qkv_bias" not in packed:
            layer.qkv_bias = None
        parts = {n: packed.pop(f"{block}.{n}") for n in layer.state_dict()}
        missing, unexpected = layer.set_state_dict(parts)
        assert not missing and not unexpected
        expected = composed(state, block, normalize_before, out_in(name), name.startswith("GPT"), x)
        common.check_tensor("out", layer(x).numpy().astype("float64"), expected.numpy().astype("float64"), "float32")
    assert set(packed) <= set(state)
    assert f"{len(blocks)} blocks packed, 0 left alone, {len(packed)} values unchanged" in output
    assert main(["revert", str(packed_file), str(back)]) == 0
    assert f"{len(blocks)} blocks unpacked" in capsys.readouterr().out
    assert_same(load(back), state)


@pytest.mark.parametrize("bias", [None, False])
@pytest.mark.parametrize("normalize_before", [False, True])
def test_a_converted_model_loads_it(normalize_before, bias, tmp_path):
    """Keys, their order and numbers are those of convert(model), whose state dict goes back the same way."""

    def encoder():
        layer = nn.TransformerEncoderLayer(EMBED, HEADS, 24, 0.0, normalize_before=normalize_before, bias_attr=bias)
        return nn.TransformerEncoder(layer, 2, nn.LayerNorm(EMBED))

    model = encoder()
    for p in model.parameters():
        p.set_value(draw(*p.shape))
    state, x = model.state_dict(), paddle.to_tensor(draw(2, 5, EMBED))
    expected = model(x).numpy()
    source, packed, saved, back = (str(tmp_path / f"{name}.pdparams") for name in ("in", "packed", "saved", "back"))
    paddle.save(state, source)
    arrays = {name: value.numpy() for name, value in state.items()}
    assert main(["convert", source, packed, "--num-heads", str(HEADS)]) == 0
    fused = convert(encoder())
    assert list(paddle.load(packed)) == list(fused.state_dict())
    assert fused.set_state_dict(paddle.load(packed)) == ([], [])
    common.check_tensor("out", fused(x).numpy().astype("float64"), expected.astype("float64"), "float32")
    converted = convert(model).state_dict()
    assert_same(load(packed), {name: value.numpy() for name, value in converted.items()})
    paddle.save(converted, saved)
    for file in (packed, saved):
        assert main(["revert", file, back, "--force"]) == 0
        assert_same({name: value.numpy() for name, value in paddle.load(back).items()}, arrays)
    model = encoder()
    assert model.set_state_dict(paddle.load(back)) == ([], [])
    common.check_tensor("out", model(x).numpy().astype("float64"), expected.astype("float64"), "float32")
