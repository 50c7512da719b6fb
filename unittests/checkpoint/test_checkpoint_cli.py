"""`python -m paddle_fused_attention` on files: what the packed weights compute, bits, names, reports, errors."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys

import common
import numpy as np
import paddle
import pytest
from paddle import nn
from paddle_fused_attention import FusedMultiHeadAttention, checkpoint, checkpoint_files, convert
from paddle_fused_attention.__main__ import main
from paddle_fused_attention.checkpoint import CheckpointError

HEADS, EMBED = 4, 16
SUFFIXES = [".pdparams", ".safetensors"]
RANDOM = np.random.default_rng(0)


def draw(*shape, dtype="float32"):
    return RANDOM.standard_normal(shape).astype(dtype)


def linear(prefix, out_in, columns=EMBED, bias=True, rows=EMBED):
    weight = draw(columns, rows) if out_in else draw(rows, columns)
    return {f"{prefix}.weight": weight, **({f"{prefix}.bias": draw(columns)} if bias else {})}


def norm(prefix, scale="weight", shift="bias"):
    return {f"{prefix}.{scale}": draw(EMBED), f"{prefix}.{shift}": draw(EMBED)}


def feed_forward(up, down, out_in, hidden=24):
    return {**linear(up, out_in, hidden), **linear(down, out_in, rows=hidden)}


def paddle_block(prefix, out_in=False, hidden=24):
    state = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        state.update(linear(f"{prefix}self_attn.{name}", out_in))
    state.update(feed_forward(f"{prefix}linear1", f"{prefix}linear2", out_in, hidden))
    return {**state, **norm(f"{prefix}norm1"), **norm(f"{prefix}norm2")}


def bert_block(prefix, out_in=True, hidden=24, norm_names=("weight", "bias")):
    state = {}
    for name in ("query", "key", "value"):
        state.update(linear(f"{prefix}attention.self.{name}", out_in))
    state.update(linear(f"{prefix}attention.output.dense", out_in))
    state.update(norm(f"{prefix}attention.output.LayerNorm", *norm_names), **norm(f"{prefix}output.LayerNorm", *norm_names))
    return {**state, **feed_forward(f"{prefix}intermediate.dense", f"{prefix}output.dense", out_in, hidden)}


def vit_block(prefix, bias=True):
    state = norm(f"{prefix}layernorm_before")
    for name in ("query", "key", "value"):
        state.update(linear(f"{prefix}attention.attention.{name}", True, bias=bias))
    state.update(feed_forward(f"{prefix}intermediate.dense", f"{prefix}output.dense", True))
    return {**state, **linear(f"{prefix}attention.output.dense", True), **norm(f"{prefix}layernorm_after")}


def gpt_block(prefix, out_in=False):
    state = {**norm(f"{prefix}ln_1"), f"{prefix}attn.bias": np.tril(np.ones((1, 1, 8, 8), "uint8")), **norm(f"{prefix}ln_2")}
    state.update(feed_forward(f"{prefix}mlp.c_fc", f"{prefix}mlp.c_proj", out_in))
    return {**state, **linear(f"{prefix}attn.c_attn", out_in, 3 * EMBED), **linear(f"{prefix}attn.c_proj", out_in)}


def bert_embeddings(prefix=""):
    return {f"{prefix}embeddings.{name}_embeddings.weight": draw(7, EMBED) for name in ("word", "position")}


# Checkpoints as their families name them: the state, the packed blocks, the layer norm's place, what has to be said.
FAMILIES = {
    "Paddle": (
        lambda: {**paddle_block("layers.0."), **paddle_block("layers.1.")},
        ["layers.0.self_attn", "layers.1.self_attn"],
        False,
        (),
    ),
    "Paddle, pre-norm": (lambda: paddle_block("layers.0."), ["layers.0.self_attn"], True, ()),
    "PaddleNLP BERT": (lambda: paddle_block("bert.encoder.layers.0."), ["bert.encoder.layers.0.self_attn"], False, ()),
    "Paddle's names by PyTorch": (lambda: paddle_block("layers.0.", out_in=True), ["layers.0.self_attn"], False, ()),
    "BERT": (
        lambda: {**bert_embeddings("bert."), **bert_block("bert.encoder.layer.0.")},
        ["bert.encoder.layer.0.attention"],
        False,
        (),
    ),
    "BERT, gamma and beta": (
        lambda: bert_block("bert.encoder.layer.0.", norm_names=("gamma", "beta")),
        ["bert.encoder.layer.0.attention"],
        False,
        (),
    ),
    "BERT's names by Paddle": (lambda: bert_block("encoder.layer.0.", out_in=False), ["encoder.layer.0.attention"], False, ()),
    "ViT": (lambda: vit_block("vit.encoder.layer.7."), ["vit.encoder.layer.7.attention"], True, ()),
    "ViT without qkv_bias": (
        lambda: vit_block("vit.encoder.layer.7.", bias=False),
        ["vit.encoder.layer.7.attention"],
        True,
        (),
    ),
    "GPT-2": (lambda: {**gpt_block("transformer.h.3."), **norm("transformer.ln_f")}, ["transformer.h.3.attn"], True, ()),
    "GPT": (
        lambda: {**gpt_block("transformer.h.3."), "transformer.tokens_embed.weight": draw(7, EMBED)},
        ["transformer.h.3.attn"],
        False,
        (),
    ),
    "GPT's layers alone": (lambda: gpt_block("transformer.h.3."), ["transformer.h.3.attn"], False, ("--normalize-after",)),
}


def out_in(name):
    return not name.startswith(("Paddle", "GPT", "BERT's names by Paddle")) or name.endswith("PyTorch")


def family(name):
    make, blocks, normalize_before, said = FAMILIES[name]
    return {"vocabulary.weight": draw(7, EMBED), **make(), "steps": np.array([3], "int64")}, blocks, normalize_before, [*said]


def save(path, arrays, metadata=None):
    checkpoint_files.write(path, checkpoint_files.Checkpoint(dict(arrays), metadata))
    return path


def load(path):
    return checkpoint_files.read(path).arrays


def assert_same(actual, expected):
    assert sorted(actual) == sorted(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name
        np.testing.assert_array_equal(actual[name], value, name)


def separate_projections(state, block, transpose):
    """Query, key, value and output projection as [in, out] weights and biases, and the layer norm, whatever the family."""
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
            common.check_tensor("out", actual(x).numpy().astype("float64"), expected(x).numpy().astype("float64"), "float32")
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


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("normalize_before", [False, True])
def test_what_versions_before_packed_goes_back(normalize_before, transposed, suffix, tmp_path):
    """With Paddle's names, output projection and layer norm were packed too; with metadata and without."""
    state, prefix, scale = paddle_block("a.", transposed), "a.self_attn.", "pre_ln" if normalize_before else "ln"
    packed = dict(checkpoint.pack(state, HEADS)[0])
    out = packed.pop(f"{prefix}out_proj.weight")
    packed[f"{prefix}linear_weight"] = np.ascontiguousarray(out.T) if transposed else out
    packed[f"{prefix}linear_bias"] = packed.pop(f"{prefix}out_proj.bias")
    packed[f"{prefix}{scale}_scale"], packed[f"{prefix}{scale}_bias"] = (packed.pop(f"a.norm1.{n}") for n in ("weight", "bias"))
    layout = "out-in" if transposed else "in-out"
    source, back = save(tmp_path / f"in{suffix}", packed), tmp_path / f"back{suffix}"
    assert main(["revert", str(source), str(back), *(["--layout", layout] if transposed else [])]) == 0
    assert_same(load(back), state)
    for names in (("weight", "bias"), ("gamma", "beta")):
        memory = {"a.self_attn": {"naming": "Paddle", "layout": layout, "norm": names}}
        save(source, packed, {checkpoint.METADATA_BLOCKS: json.dumps(memory)})
        assert main(["revert", str(source), str(back), "--force"]) == 0
        renamed = {f"a.norm1.{new}": state[f"a.norm1.{old}"] for new, old in zip(names, ("weight", "bias"))}
        assert_same(load(back), {**without(state, "a.norm1.weight", "a.norm1.bias"), **renamed})
    for part in ("linear_weight", f"{scale}_bias"):
        save(source, without(packed, prefix + part))
        check_error(
            ["revert", source, back, "--force"], f"{prefix}{part}: expected an array beside {prefix}qkv_weight, found none"
        )


@pytest.mark.parametrize("first, second", [SUFFIXES, SUFFIXES[::-1]])
@pytest.mark.parametrize("name", FAMILIES)
def test_from_one_format_to_the_other(name, first, second, tmp_path):
    """Layout and names come back, whichever formats they go through, and the metadata are those of before."""
    state, _, _, said = family(name)
    layout = "out-in" if out_in(name) else "in-out"
    metadata = {"format": "pt"} if out_in(name) and first == ".safetensors" else None
    source = save(tmp_path / f"in{first}", state, metadata)
    packed, back, again = tmp_path / f"packed{second}", tmp_path / f"back{first}", tmp_path / f"again{second}"
    told = first == ".safetensors" or layout == "in-out"
    said += [] if told else ["--layout", layout]
    assert main(["convert", str(source), str(packed), "--num-heads", "4", *said]) == 0
    assert main(["revert", str(packed), str(back)]) == 0
    assert_same(load(back), state)
    if told and first == ".safetensors" and metadata:
        assert checkpoint_files.read(back).metadata == metadata
    # The file knows of its layout, whatever its format says.
    said = [word for word in said if word not in ("--layout", layout)]
    assert main(["convert", str(back), str(again), "--num-heads", "4", "--force", *said]) == 0
    assert main(["revert", str(again), str(back), "--force"]) == 0
    assert_same(load(back), state)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float64", "float16", "uint16"])
def test_dtypes_keep_their_bits(dtype, suffix, tmp_path):
    """uint16 is bfloat16. NaN payloads and negative zeros are bits like others."""
    state = {
        name: RANDOM.integers(0, 2 ** (8 * np.dtype(dtype).itemsize) - 1, a.shape, dtype=f"uint{8 * np.dtype(dtype).itemsize}")
        for name, a in {**gpt_block("h.0."), **norm("ln_f")}.items()
    }
    state = {name: a if name.endswith("attn.bias") and a.ndim > 1 else a.view(dtype) for name, a in state.items()}
    state["h.0.attn.bias"] = np.ones((1, 1, 4, 4), "uint8")
    source = save(tmp_path / f"in{suffix}", state)
    assert main(["convert", str(source), str(tmp_path / f"packed{suffix}"), "--num-heads", "2"]) == 0
    packed = load(tmp_path / f"packed{suffix}")
    assert packed["h.0.attn.qkv_weight"].dtype == dtype and packed["h.0.attn.qkv_weight"].shape == (3, 2, 8, EMBED)
    assert main(["revert", str(tmp_path / f"packed{suffix}"), str(tmp_path / f"back{suffix}")]) == 0
    back = load(tmp_path / f"back{suffix}")
    assert sorted(back) == sorted(state)
    for name, value in state.items():
        assert back[name].dtype == value.dtype and back[name].tobytes() == value.tobytes(), name


def test_safetensors_files_of_the_library(tmp_path):
    """What the safetensors package writes is read, and the other way round; metadata stays."""
    numpy_files = pytest.importorskip("safetensors.numpy")
    safetensors = pytest.importorskip("safetensors")
    state, _, _, _ = family("ViT")
    source, packed, back = (tmp_path / f"{name}.safetensors" for name in ("in", "packed", "back"))
    numpy_files.save_file({name: np.ascontiguousarray(a) for name, a in state.items()}, str(source), {"format": "pt"})
    assert main(["convert", str(source), str(packed), "--num-heads", "4"]) == 0
    assert main(["revert", str(packed), str(back)]) == 0
    assert_same(numpy_files.load_file(str(back)), state)
    with safetensors.safe_open(str(packed), "np") as file:
        assert {**file.metadata(), "format": "pt"} == file.metadata()
    with safetensors.safe_open(str(back), "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_values_that_are_no_arrays(tmp_path):
    """8-bit floats in .safetensors and Python objects in .pdparams pass through; neither fits the other format."""
    raw = checkpoint_files.RawTensor("F8_E4M3", (2, 2), b"\x01\x80\x7f\xff")
    source = save(tmp_path / "in.safetensors", {**bert_block(""), "scale": raw, "scalar": np.array(2.5)})
    assert main(["convert", str(source), str(tmp_path / "out.safetensors"), "--num-heads", "4"]) == 0
    found = load(tmp_path / "out.safetensors")
    assert found["scale"] == raw and found["scalar"].shape == () and found["scalar"] == 2.5
    check_error(
        ["convert", source, tmp_path / "out.pdparams", "--num-heads", 4], "scale: .* F8_E4M3 can't be stored in .pdparams"
    )
    paddle.save(
        {**{n: paddle.to_tensor(a) for n, a in bert_block("", False).items()}, "epoch": 3}, str(tmp_path / "in.pdparams")
    )
    assert main(["convert", str(tmp_path / "in.pdparams"), str(tmp_path / "out.pdparams"), "--num-heads", "4"]) == 0
    assert load(tmp_path / "out.pdparams")["epoch"] == 3
    message = "epoch: a value of type int can't be stored in .safetensors"
    check_error(["convert", tmp_path / "in.pdparams", tmp_path / "o.safetensors", "--num-heads", 4], message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.pdparams", "in.safetensors", "out.pdparams", "out.safetensors"]


def run(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "paddle_fused_attention", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def check_error(arguments, message, status=1, start="error: .*"):
    """Exit status, and one line of which `message` is a pattern."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        assert main([str(argument) for argument in arguments]) == status
    assert out.getvalue() == "" and error.getvalue().count("\n") == 1
    assert re.match(f"{start}{message}", error.getvalue()), error.getvalue()


def test_the_command(tmp_path):
    """As a process: exit status, report, one line for an error."""
    source = save(tmp_path / "in.pdparams", paddle_block("encoder.layers.0."))
    target = tmp_path / "out.pdparams"
    status, out, error = run(["convert", source, target, "--num-heads", HEADS])
    report = "encoder.layers.0.self_attn: Paddle, weights [in, out], for a model after paddle_fused_attention.convert(model) "
    counts = f"{target}: 1 blocks packed, 0 left alone, 10 values unchanged"
    assert (status, out.splitlines()) == (0, [report + "(an encoder layer)", counts]), error
    status, out, error = run(["convert", source, target, "--num-heads", HEADS])
    assert status == 1 and out == "" and error.splitlines()[-1] == f"error: {target}: exists already; --force replaces it"
    assert "Traceback" not in error
    status, _, error = run(["convert", source, target])
    assert status == 2 and "--num-heads" in error
    status, out, _ = run(["--help"])
    assert status == 0 and "convert" in out and "revert" in out


def test_names(tmp_path, capsys):
    state = {**paddle_block("encoder.layers.0."), **paddle_block("encoder.layers.1."), **paddle_block("other.0.")}
    source, packed, back = save(tmp_path / "in.pdparams", state), tmp_path / "packed.pdparams", tmp_path / "back.pdparams"
    assert main(["convert", str(source), str(packed), "--num-heads", "4", "--names", "encoder.*.1.*"]) == 0
    output = capsys.readouterr().out
    assert "encoder.layers.0.self_attn: left alone, it is not among the names 'encoder.*.1.*'" in output
    assert "1 blocks packed, 2 left alone" in output
    found = load(packed)
    assert [name for name in found if name.endswith("qkv_weight")] == ["encoder.layers.1.self_attn.qkv_weight"]
    assert main(["revert", str(packed), str(back)]) == 0
    assert_same(load(back), state)


def test_left_alone(tmp_path, capsys):
    """Blocks that don't fit are reported with the reason, and their values kept."""

    cross = {f"dec.0.cross_attn.{n}_proj.weight": draw(EMBED, EMBED) for n in "qkv"}
    state = {
        **paddle_block("enc.0."),
        **paddle_block("dec.0."),
        **cross,
        **without(paddle_block("a."), "a.self_attn.out_proj.weight"),
        **without(paddle_block("b."), "b.self_attn.k_proj.bias"),
        **{**paddle_block("c."), "c.self_attn.k_proj.weight": draw(8, EMBED)},
        **{**paddle_block("d."), "d.self_attn.v_proj.weight": draw(EMBED, EMBED, dtype="float16")},
        "e.self_attn.in_proj_weight": draw(3 * EMBED, EMBED),
        "f.crossattention.self.query.weight": draw(EMBED, EMBED),
        **{**paddle_block("g."), "g.self_attn.out_proj.weight": draw(EMBED, 8)},
        **{**paddle_block("h."), "h.norm1.bias": draw(8)},
        **{**paddle_block("i."), "i.norm1.gamma": draw(EMBED)},
        **{**paddle_block("j."), "j.self_attn.out_proj.weight": np.array(2.5)},
        **without(paddle_block("m."), "m.norm1.weight"),
        "m.self_attn.out_proj.weight": draw(0, 0),
        **bert_block("k."),
        "k.attention.output.LayerNorm.bias": draw(8),
        **without(bert_block("l."), "l.attention.output.LayerNorm.bias"),
    }
    source = save(tmp_path / "in.safetensors", state)
    assert main(["convert", str(source), str(tmp_path / "out.safetensors"), "--num-heads", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "enc.0.self_attn: Paddle, weights [in, out], for a model after paddle_fused_attention.convert(model) (an encoder layer)",
        "dec.0.self_attn: left alone, it has cross_attn.q_proj.weight beside it, as in a decoder",
        "dec.0.cross_attn: left alone, its names are not those of a known self-attention",
        "a.self_attn: left alone, a.self_attn.out_proj.weight is missing",
        "b.self_attn: left alone, b.self_attn.k_proj.bias is missing",
        "c.self_attn: left alone, c.self_attn.k_proj.weight has shape [8, 16], not [16, 16]",
        "d.self_attn: left alone, its query, key and value weight are of different dtypes",
        "e.self_attn: left alone, its names are not those of a known self-attention",
        "f.crossattention.self: left alone, its names are not those of a known self-attention",
        "g.self_attn: left alone, g.self_attn.out_proj.weight has shape [16, 8], not [16, 16]",
        "h.self_attn: left alone, h.norm1.bias has shape [8], not [16]",
        "i.self_attn: left alone, there is i.norm1.gamma, which is no part of the operator's attention",
        "j.self_attn: left alone, j.self_attn.out_proj.weight has shape [], not [16, 16]",
        "m.self_attn: left alone, m.self_attn.out_proj.weight is empty",
        "k.attention: left alone, k.attention.output.LayerNorm.bias has shape [8], not [16]",
        "l.attention: left alone, l.attention.output.LayerNorm.bias is missing",
    ):
        assert line in lines
    found = load(tmp_path / "out.safetensors")
    kept = {name: value for name, value in state.items() if not re.match(r"enc\.0\.self_attn\.[qkv]_proj", name)}
    assert_same({name: value for name, value in found.items() if not name.startswith("enc.0.self_attn.qkv")}, kept)


def test_a_layer_without_norm1_is_packed():
    """Where it stands does not matter with Paddle's names; that of models like GPT is told to need an adapter."""
    state = without(paddle_block("gpt.decoder.layers.0."), *(f"gpt.decoder.layers.0.norm1.{n}" for n in ("weight", "bias")))
    packed, report = packed_by(state, file_layout=None)
    assert report.converted["gpt.decoder.layers.0.self_attn"].endswith("(an attention with an adapter, as PaddleNLP's GPT's)")
    assert_same(checkpoint.unpack(packed, metadata=report.metadata)[0], {**packed_vocabulary(packed), **state})


def test_errors(tmp_path):
    source = save(tmp_path / "in.pdparams", bert_block("enc.0.", False))
    packed, other = tmp_path / "packed.pdparams", tmp_path / "other.pdparams"
    save(packed, {"enc.0.self_attn.qkv_weight": draw(3, 4, 4, EMBED), "enc.0.self_attn.ln_scale": draw(EMBED)})
    save(other, {"x.weight": draw(3)})
    out = tmp_path / "out.pdparams"
    heads = ["--num-heads", 4]
    check_error(["convert", tmp_path / "no.pdparams", out, *heads], "no.pdparams: no such file")
    check_error(
        ["convert", source, tmp_path / "out.bin", *heads], r"out.bin: expected a name that ends in .pdparams or .safetensors"
    )
    check_error(["convert", source, source, *heads], "in.pdparams: exists already; --force replaces it")
    for count in (5, 0, -4):
        message = f"--num-heads: expected a divisor of 16, the width of enc.0.attention, got {count}"
        check_error(["convert", source, out, "--num-heads", count], message)
    check_error(["convert", other, out, *heads], "no attention of a known naming was found")
    check_error(["convert", source, out, *heads, "--names", "dec.*"], r"no attention .* among the names 'dec.\*'")
    check_error(["revert", source, out], "no packed attention was found")
    check_error(["revert", packed, out], "enc.0.self_attn.linear_weight: expected an array beside enc.0.self_attn.qkv_weight")
    both = save(tmp_path / "both.pdparams", {**bert_block("enc.0.", False), "enc.0.attention.qkv_weight": draw(3)})
    check_error(["convert", both, out, *heads], "enc.0.attention.qkv_weight: expected no packed parameter")
    check_error(["convert", source, tmp_path / "no" / "out.pdparams", *heads], "out.pdparams: can't be written: no such folder")
    paddle.save([1, 2], str(tmp_path / "list.pdparams"))
    check_error(["convert", tmp_path / "list.pdparams", out, *heads], "list.pdparams: expected a state dict, got list")
    assert not out.exists() and not [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"\x00\x01", b"not a checkpoint at all", b"\xff" * 64, b"\x40" + b"\x00" * 7 + b"{}"])
def test_broken_files(content, suffix, tmp_path):
    source = tmp_path / f"in{suffix}"
    source.write_bytes(content)
    check_error(["convert", source, tmp_path / f"out{suffix}", "--num-heads", 4], f"in{suffix}: can't be read as {suffix}")
    assert list(tmp_path.iterdir()) == [source]


def test_truncated_safetensors(tmp_path):
    source = save(tmp_path / "in.safetensors", bert_block(""))
    whole = source.read_bytes()
    source.write_bytes(whole[:-1])
    check_error(["convert", source, tmp_path / "out.safetensors", "--num-heads", 4], "lies beyond its end")
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(whole) - 8 - int.from_bytes(whole[:8], "little")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_never_half_written(suffix, tmp_path, monkeypatch):
    """An error in the middle of writing leaves the old file and nothing beside it."""
    source, target = save(tmp_path / f"in{suffix}", bert_block("", suffix != ".pdparams")), tmp_path / f"out{suffix}"
    target.write_bytes(b"old")
    arguments = ["convert", source, target, "--num-heads", 4, "--force"]

    def fail_after_a_part(values, path, *_):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    writer = "_write_pdparams" if suffix == ".pdparams" else "_write_safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_files, writer, lambda path, found: fail_after_a_part(found, path))
        check_error(arguments, f"out{suffix}: can't be written: No space left on device")
        assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2

        def interrupted(path, found):
            path.write_bytes(b"half")
            raise KeyboardInterrupt

        patched.setattr(checkpoint_files, writer, interrupted)
        check_error(arguments, "interrupted", status=130, start="")
        assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    assert main([str(argument) for argument in arguments]) == 0
    assert "attention.qkv_weight" in load(target)
    assert (target.stat().st_mode & 0o777) == (0o666 & ~current_umask())


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_progress_bar(capsys, monkeypatch, tmp_path):
    """On a terminal only, on stderr."""
    source = save(tmp_path / "in.pdparams", {**bert_block("0.", False), **bert_block("1.", False)})
    arguments = ["convert", str(source), str(tmp_path / "out.pdparams"), "--num-heads", "4", "--force"]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(arguments) == 0
    error = capsys.readouterr().err
    assert error.endswith(f"\rconvert [{'#' * 30}] 2/2\n") and f"\rconvert [{'#' * 15}{'.' * 15}] 1/2" in error


def test_packed_and_unpacked_arrays_are_contiguous():
    state = {**paddle_block("a."), **bert_block("b.", False)}
    sliced = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in state.items()}
    packed, report = checkpoint.pack(sliced, HEADS)
    unpacked, _ = checkpoint.unpack(packed, metadata=report.metadata)
    made = [array for name, array in packed.items() if name not in sliced]
    made += [array for name, array in unpacked.items() if name not in packed]
    assert len(made) == 2 + 6 + 6 + 10 and all(array.flags["C_CONTIGUOUS"] for array in made)


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


def packed_by(state, num_heads=HEADS, **options):
    """The new arrays and the report, from Python."""
    return checkpoint.pack({"vocabulary.weight": draw(7, EMBED), **state}, num_heads, **{"file_layout": "out-in", **options})


RELATIVE = "relative positions are added to the scores"
BERT_LAYER = "bert.encoder.layer.0."
# By what tells it: a layer, what stands beside it, and why it is left alone.
OTHERS = {
    "distance_embedding": (bert_block, BERT_LAYER + "attention.self.distance_embedding.weight", "no part of the operator"),
    "adapters": (bert_block, BERT_LAYER + "attention.self.query.lora_A.weight", "no part of the operator"),
    "scales of int8": (bert_block, BERT_LAYER + "attention.output.dense.SCB", "no part of the operator"),
    "a second norm": (bert_block, BERT_LAYER + "attention.output.LayerNorm.gamma", "no part of the operator"),
    "q_bias": (vit_block, "vit.encoder.layer.0.attention.attention.q_bias", "no part of the operator"),
    "layer scale": (vit_block, "vit.encoder.layer.0.lambda_1", "no part of the operator"),
    "rel_pos_bias": (bert_block, "bert.encoder.rel_pos_bias.weight", RELATIVE),
    "relative_position_bias_table": (vit_block, "vit.encoder.relative_position_bias.relative_position_bias_table", RELATIVE),
    "inv_freq": (paddle_block, "model.encoder.rotary_embeddings.inv_freq", "rotated"),
    "embed_positions": (bert_block, "bert.encoder.embed_positions.weight", "rotated"),
    "no positions": (bert_block, "bert.embeddings.word_embeddings.weight", "positions enter elsewhere"),
    "BigBird": (bert_block, "bert.pooler.weight", "sparse"),
    "GIT": (bert_block, "bert.visual_projection.visual_projection.0.bias", "text sees all of an image"),
    "pre-norm": (bert_block, "bert.encoder.LayerNorm.weight", "norms stand before"),
    "a decoder": (bert_block, BERT_LAYER + "crossattention.self.query.weight", "as in a decoder"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_operator_does_not_compute_is_left_alone(name):
    block, beside, reason = OTHERS[name]
    prefix = {bert_block: BERT_LAYER, vit_block: "vit.encoder.layer.0.", paddle_block: "model.encoder.layers.0."}[block]
    state = {**block(prefix), beside: draw(EMBED), **vit_block("other.layer.0.")}
    _, report = packed_by(state, file_layout=None)
    assert list(report.converted) == ["other.layer.0.attention"]
    assert reason in report.left_alone[prefix + ("self_attn" if block is paddle_block else "attention")]
    _, report = packed_by(without(state, beside), file_layout=None)
    assert len(report.converted) == 2


@pytest.mark.parametrize("prefix", ["", "model."])
def test_position_ids_tell_of_models_with_bert_s_names(prefix):
    """MRA, YOSO and Nystromformer count positions from 2, of tables with two rows more; RoBERTa has such a table, but counts from 0."""
    table = {f"{prefix}embeddings.position_embeddings.weight": draw(514, EMBED)}
    state = {**bert_embeddings(prefix), **table, **bert_block(f"{prefix}encoder.layer.0.")}
    numbers = f"{prefix}embeddings.position_ids"
    with pytest.raises(CheckpointError, match=f"{numbers} begin at 2, as those of MRA, YOSO and Nystromformer"):
        packed_by({**state, numbers: np.arange(2, 514)[None]})
    for beside in ({}, {numbers: np.arange(514)[None]}, {numbers: np.zeros((1, 0), "int64")}):
        assert packed_by({**state, **beside})[1].converted


@pytest.mark.parametrize(
    "model", ["roformer", "big_bird", "bigbird", "layoutxlm", "ernie_layout", "nystromformer", "longformer"]
)
@pytest.mark.parametrize("block", [bert_block, paddle_block])
def test_models_that_compute_something_else(model, block, tmp_path):
    """By the first part of their names, or, where there is none, by the config.json beside the file."""
    state = block(f"{model}.encoder.layer.0.", False)
    heads = ["--num-heads", 4]
    source, out = save(tmp_path / "in.pdparams", state), tmp_path / "out.pdparams"
    check_error(["convert", source, out, *heads], f"no attention .*: left alone, it is of {model}: ")
    save(source, block("encoder.layer.0.", False))
    for content in ('{"model_type": "bert"}', "[1]", "no JSON", '{"model_type": 3}'):
        (tmp_path / "config.json").write_text(content)
        assert main([str(word) for word in ("convert", source, out, *heads, "--force")]) == 0
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    check_error(["convert", source, out, *heads, "--force"], f"no attention .*: left alone, its config.json says {model}: ")


def test_scores_that_are_scaled_otherwise():
    state = {**gpt_block("h.0."), **norm("ln_f")}
    for config in ({"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}):
        with pytest.raises(CheckpointError, match=f"its config.json says {next(iter(config))}"):
            packed_by(state, config=config)
    assert packed_by(state, config={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False})[1].converted


@pytest.mark.parametrize("dtype", ["int8", "int64", "bool", "complex64"])
@pytest.mark.parametrize(
    "part", ["attention.self.key.weight", "attention.output.dense.bias", "attention.output.LayerNorm.weight"]
)
def test_only_floats_are_packed(dtype, part):
    state = bert_block("a.")
    with pytest.raises(CheckpointError, match=f"a.{part} has dtype {dtype}, which is no float"):
        packed_by({**state, f"a.{part}": state[f"a.{part}"].astype(dtype)})


def test_gpt_of_either_norm_order():
    """By the norm after GPT-2's last layer or the name of GPT's embeddings; where neither is there, or both, it has to be said."""
    layer, last, first = gpt_block("h.0."), norm("ln_f"), {"tokens_embed.weight": draw(7, EMBED)}
    assert "norm before" in packed_by({**layer, **last})[1].converted["h.0.attn"]
    assert "norm after" in packed_by({**layer, **first})[1].converted["h.0.attn"]
    for state in (layer, {**layer, **last, **first}):
        with pytest.raises(CheckpointError, match="h.0.attn: nothing tells whether its layer norm stands before"):
            packed_by(state)
        assert "norm before" in packed_by(state, normalize_before=True)[1].converted["h.0.attn"]


def test_layout(tmp_path):
    """The shapes of the feed-forward's matrices tell it, then the file; a word must not contradict the former."""
    for make, layout in ((paddle_block, "in-out"), (bert_block, "out-in")):
        other = "in-out" if layout == "out-in" else "out-in"
        for true in (layout, other):
            state = make("a.", true == "out-in")
            for told in (None, true):
                packed, report = packed_by(state, file_layout=told)
                assert_same(checkpoint.unpack(packed, metadata=report.metadata)[0], {**packed_vocabulary(packed), **state})
            wrong = "in-out" if true == "out-in" else "out-in"
            with pytest.raises(
                CheckpointError, match="its file's kind stores weights .*, but by its shape a.* --layout is needed"
            ):
                packed_by(state, file_layout=wrong)
            packed_by(state, file_layout=wrong, layout=true)
            with pytest.raises(CheckpointError, match=f"--layout {wrong}: by its shape a.* is stored"):
                packed_by(state, layout=wrong)
            square = make("a.", true == "out-in", EMBED)
            with pytest.raises(CheckpointError, match="nothing tells whether its weights are stored"):
                packed_by(square, file_layout=None)
            expected = packed_by(square, file_layout=true)[0]
            for told in (None, true, wrong):
                actual = packed_by(square, file_layout=told, layout=true)[0]
                assert all((actual[n] == expected[n]).all() for n in expected if n.startswith("a."))
    mixed = {**bert_block("a."), "a.output.dense.weight": draw(24, EMBED)}
    with pytest.raises(CheckpointError, match="by their shapes a.intermediate.* is stored .out, in. and a.output.* .in, out."):
        packed_by(mixed)
    with pytest.raises(CheckpointError, match="layout: expected in-out or out-in, got 'pt'"):
        packed_by(mixed, layout="pt")


def packed_vocabulary(packed):
    return {"vocabulary.weight": packed["vocabulary.weight"]}


def test_a_single_projection_tells_its_layout():
    """In GPT-2's files it is [in, out] whoever wrote them. Another may hold query, key and value head by head."""
    last = norm("ln_f")
    for told in (None, "in-out", "out-in"):
        assert "[in, out]" in packed_by({**gpt_block("h.0."), **last}, file_layout=told)[1].converted["h.0.attn"]
    state = {**gpt_block("h.0.", out_in=True), **last}
    with pytest.raises(CheckpointError, match="query, key and value may not follow one another"):
        packed_by(state)
    packed, report = packed_by(state, layout="out-in")
    assert "[out, in]" in report.converted["h.0.attn"]
    transposed = {name: value.T if name.startswith("h.") and value.ndim == 2 else value for name, value in state.items()}
    expected = packed_by(transposed)[0]
    for name in ("h.0.attn.qkv_weight", "h.0.attn.qkv_bias", "h.0.attn.linear_weight"):
        np.testing.assert_array_equal(packed[name], expected[name])
    assert_same(checkpoint.unpack(packed, metadata=report.metadata)[0], {**packed_vocabulary(packed), **state})


def test_the_norm_s_place_is_asked_for(tmp_path, capsys):
    """Where GPT's layers stand alone; two stacks of layers may differ in it. Before or after the files."""
    towers = {**gpt_block("text.h.0."), **gpt_block("text.h.1."), **gpt_block("vision.h.0.")}
    source, out, both = save(tmp_path / "in.pdparams", towers), tmp_path / "out.pdparams", tmp_path / "both.pdparams"
    command = ["convert", source, out, "--num-heads", 4]
    check_error(command, "text.h.0.attn: nothing tells whether its layer norm .* --normalize-after is needed")
    for side in ("before", "after"):
        message = (
            rf"--normalize-{side}: expected one stack of layers, found text.h.\*.attn and vision.h.\*.attn, which may differ"
        )
        check_error([*command, f"--normalize-{side}"], message)
    with pytest.raises(SystemExit, match="2"):
        main([str(word) for word in (*command, "--normalize-before", "--normalize-after")])
    assert "not allowed with argument --normalize-before" in capsys.readouterr().err and not out.exists()
    words = ("convert", "--normalize-before", source, out, "--num-heads", 4, "--names", "text.*")
    assert main([str(word) for word in words]) == 0
    assert "text.h.1.attn: GPT, weights [in, out], norm before" in capsys.readouterr().out
    assert main([str(word) for word in ("convert", out, both, "--num-heads", 4, "--normalize-after")]) == 0
    assert "vision.h.0.attn: GPT, weights [in, out], norm after" in capsys.readouterr().out
    assert {"text.h.0.attn.pre_ln_scale", "text.h.1.attn.pre_ln_scale", "vision.h.0.attn.ln_scale"} <= set(load(both))


@pytest.mark.parametrize("side", ["before", "after"])
def test_the_norm_s_place_is_not_said_in_vain(side, tmp_path):
    """It holds for blocks whose names don't tell it, and is refused where there is none."""
    message = f"--normalize-{side}: expected a block whose names don't tell the layer norm's place, found none: "
    for state, why in (
        (paddle_block("a."), "a.self_attn is packed without it"),
        (bert_block("a.", False), "a.attention has it after, by its names"),
        ({**gpt_block("h.0."), **norm("ln_f")}, "h.0.attn has it before, by its names"),
    ):
        source = save(tmp_path / "in.pdparams", state)
        check_error(["convert", source, tmp_path / "out.pdparams", "--num-heads", 4, f"--normalize-{side}"], message + why)
    assert not (tmp_path / "out.pdparams").exists()
    state = {**bert_block("a.", False), **gpt_block("b.h.0."), **paddle_block("c.")}
    packed = packed_by(state, file_layout=None, normalize_before=side == "before")[0]
    assert "a.attention.ln_scale" in packed and f"b.h.0.attn.{'pre_ln' if side == 'before' else 'ln'}_scale" in packed
    for word in (1, "before", {"*": True}):
        with pytest.raises(CheckpointError, match="normalize_before: expected a bool or None, got"):
            packed_by(state, file_layout=None, normalize_before=word)


def test_heads_by_pattern(tmp_path):
    """One number is not for blocks of several widths."""
    wide = {name: np.concatenate([np.concatenate([a, a])] * 2, -1) if a.ndim == 2 else np.concatenate([a, a])
            for name, a in bert_block("wide.0.", False).items()}  # fmt: skip
    state = {**bert_block("text.0.", False), **wide}
    source, out = save(tmp_path / "in.pdparams", state), tmp_path / "out.pdparams"
    command = ["convert", source, out, "--force"]
    message = "--num-heads: expected a number for each width, .* text.0.attention is 16 wide and wide.0.attention is 32; got 4"
    check_error([*command, "--num-heads", 4], message)
    check_error([*command, "--num-heads", "text.*=4"], "--num-heads: expected a pattern that fits wide.0.attention, got 'text")
    check_error([*command, "--num-heads", "text.*=5", "--num-heads", "*=8"], "--num-heads: expected a divisor of 16")
    check_error(
        [*command, "--num-heads", "*=4", "--num-heads", "texts.*=4"], "--num-heads: there is no block with a name like 'texts"
    )
    check_error(
        [*command, "--num-heads", "4", "--num-heads", "8"], "--num-heads: expected it once, or each time with a pattern"
    )
    for words in (["text.*=4", "*=8"], ["text.*=4", "wide.*=8"]):
        assert main([str(word) for word in command] + [word for text in words for word in ("--num-heads", text)]) == 0
        found = load(out)
        assert found["text.0.attention.qkv_weight"].shape == (3, 4, 4, 16)
        assert found["wide.0.attention.qkv_weight"].shape == (3, 8, 4, 32)
    assert main([str(word) for word in (*command, "--num-heads", 2, "--names", "wide.*")]) == 0
    for text in ("x", "*=", "*=x", "4.0"):
        with pytest.raises(SystemExit, match="2"):
            main([*map(str, command), "--num-heads", text])
    for count in (True, "4", 2.0, None):
        with pytest.raises(CheckpointError, match="--num-heads: expected a divisor of 16"):
            packed_by(bert_block("a."), count)


def test_a_second_pass(tmp_path, capsys):
    """It knows what the first has packed, also what that was before."""
    state = {**bert_block("a.0.", norm_names=("gamma", "beta")), **bert_block("b.0.")}
    files = [tmp_path / f"{i}.safetensors" for i in range(5)]
    save(files[0], state, {"format": "pt"})
    for i, (pattern, heads) in enumerate((("a.*", "4"), ("b.*", "2"))):
        assert main(["convert", *map(str, files[i : i + 2]), "--num-heads", heads, "--names", pattern]) == 0
    assert "a.0.attention: left alone, packed already" in capsys.readouterr().out
    check_error(["convert", *files[2:4], "--num-heads", 4], "no attention .* a.0.attention: left alone, packed already")
    assert load(files[2])["b.0.attention.qkv_bias"].shape == (3, 2, 8)
    assert main(["revert", *map(str, files[2:4]), "--names", "b.*"]) == 0
    assert main(["revert", *map(str, files[3:5])]) == 0
    assert_same(load(files[4]), state)
    assert checkpoint_files.read(files[4]).metadata == {"format": "pt"}


def test_without_the_metadata_of_convert(tmp_path):
    """As a model's state dict is: the layout is its family's, unless the feed-forward's matrices say otherwise."""
    for make, transposed in ((bert_block, False), (paddle_block, True)):
        state = make("a.", not transposed)
        packed = packed_by(state, file_layout=None)[0]
        if make is bert_block:
            assert_same(checkpoint.unpack(packed)[0], {**packed_vocabulary(packed), **state})
        state = make("a.", make is paddle_block)
        packed, report = packed_by(state, file_layout=None)
        with pytest.raises(CheckpointError, match="weights are stored .*, but by its shape a.* --layout is needed"):
            checkpoint.unpack(packed)
        layout = "out-in" if make is paddle_block else "in-out"
        assert_same(checkpoint.unpack(packed, layout=layout)[0], {**packed_vocabulary(packed), **state})
        wrong = "in-out" if layout == "out-in" else "out-in"
        with pytest.raises(CheckpointError, match=f"--layout {wrong}: by its shape"):
            checkpoint.unpack(packed, layout=wrong)
        with pytest.raises(CheckpointError, match=f"--layout {wrong}: a.* was stored .*, by the file's metadata"):
            checkpoint.unpack(packed, layout=wrong, metadata=report.metadata)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", '{"a.attention": 1}', '{"a.attention": {}}', "[" * 100000,
     '{"a.attention": {"naming": [], "layout": "in-out", "norm": ["gamma", "beta"]}}',
     '{"a.attention": {"naming": "Hugging Face BERT", "layout": "in-out", "norm": ["gamma", "bias"]}}'],
)  # fmt: skip
def test_broken_metadata(text):
    packed, report = packed_by(bert_block("a."))
    broken = {**report.metadata, checkpoint.METADATA_BLOCKS: text}
    with pytest.raises(CheckpointError, match="metadata paddle_fused_attention.blocks: expected JSON as convert writes it"):
        checkpoint.unpack(packed, metadata=broken)
    with pytest.raises(CheckpointError, match="metadata paddle_fused_attention.blocks: expected JSON as convert writes it"):
        packed_by(bert_block("b."), metadata=broken)


def test_packed_parts_that_do_not_fit():
    packed, report = packed_by(bert_block("a."))
    for part, value, message in (
        ("qkv_weight", draw(3, 4, 4, 8), r"qkv_weight: expected shape \[3, H, D, H \* D\]"),
        ("qkv_bias", draw(3, 16), r"qkv_bias: expected shape \[3, 4, 4\], got \[3, 16\]"),
        ("linear_weight", draw(16), r"linear_weight: expected shape \[16, 16\]"),
        ("linear_bias", 3, "linear_bias: expected an array"),
        ("ln_bias", draw(4), r"ln_bias: expected shape \[16\]"),
        ("pre_ln_scale", draw(16), "expected either pre_ln_scale or ln_scale"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.unpack({**packed, f"a.attention.{part}": value}, metadata=report.metadata)


def test_other_keys_and_strange_names(tmp_path, capsys):
    """Keys that are no strings pass through; what is printed stays one line of a bearable length."""
    strange = "x\n\x1b[31mred\u202e." + "y" * 5000 + ".self_attn.q_proj.weight"
    state = {**bert_block("a.", False), strange: draw(2, 2), "\x07.attn.c_attn.weight": draw(2), 5: draw(2), None: draw(3)}
    packed, report = checkpoint.pack(state, HEADS)
    assert {5, None} <= set(packed) and list(report.converted) == ["a.attention"]
    unpacked, _ = checkpoint.unpack(packed, metadata=report.metadata)
    assert set(unpacked) == set(state)
    source = save(tmp_path / "in.pdparams", {name: a for name, a in state.items() if isinstance(name, str)})
    assert main(["convert", str(source), str(tmp_path / "out.pdparams"), "--num-heads", "4"]) == 0
    lines = capsys.readouterr().out.split("\n")[:-1]
    assert len(lines) == 4 and all(line.isprintable() and len(line) < 1100 for line in lines)
    assert any(line.startswith(r"x\n\x1b[31mred\u202e.yyy") for line in lines)
    source = save(tmp_path / "in.pdparams", {strange: draw(2, 2)})
    check_error(["convert", source, tmp_path / "out.pdparams", "--num-heads", 4, "--force"], r"no attention .*x\\n\\x1b")


def test_an_interrupt_is_one_line(tmp_path, monkeypatch):
    source, out = save(tmp_path / "in.pdparams", bert_block("a.", False)), tmp_path / "out.pdparams"

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "pack", interrupted)
    check_error(["convert", source, out, "--num-heads", 4], "interrupted$", status=130, start="")
    assert not out.exists()
