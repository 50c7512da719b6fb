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

HEADS, EMBED = 4, 16
SUFFIXES = [".pdparams", ".safetensors"]
RANDOM = np.random.default_rng(0)


def draw(*shape, dtype="float32"):
    return RANDOM.standard_normal(shape).astype(dtype)


def linear(prefix, out_in, columns=EMBED, bias=True):
    weight = draw(columns, EMBED) if out_in else draw(EMBED, columns)
    return {f"{prefix}.weight": weight, **({f"{prefix}.bias": draw(columns)} if bias else {})}


def norm(prefix):
    return {f"{prefix}.weight": draw(EMBED), f"{prefix}.bias": draw(EMBED)}


def paddle_block(prefix):
    state = {}
    for name in "qkv":
        state.update(linear(f"{prefix}self_attn.{name}_proj", False))
    return {**state, **linear(f"{prefix}self_attn.out_proj", False), **norm(f"{prefix}norm1"), **norm(f"{prefix}norm2")}


def bert_block(prefix):
    state = {}
    for name in ("query", "key", "value"):
        state.update(linear(f"{prefix}attention.self.{name}", True))
    state.update(linear(f"{prefix}attention.output.dense", True), **norm(f"{prefix}attention.output.LayerNorm"))
    return {**state, **linear(f"{prefix}output.dense", True, 24)}


def vit_block(prefix, bias=True):
    state = norm(f"{prefix}layernorm_before")
    for name in ("query", "key", "value"):
        state.update(linear(f"{prefix}attention.attention.{name}", True, bias=bias))
    return {**state, **linear(f"{prefix}attention.output.dense", True), **norm(f"{prefix}layernorm_after")}


def gpt2_block(prefix):
    state = {**norm(f"{prefix}ln_1"), f"{prefix}attn.bias": np.tril(np.ones((1, 1, 8, 8), "uint8"))}
    return {**state, **linear(f"{prefix}attn.c_attn", False, 3 * EMBED), **linear(f"{prefix}attn.c_proj", False)}


# Checkpoints as their families name them: the state, the packed blocks, the layer norm's place.
FAMILIES = {
    "Paddle": (
        lambda: {**paddle_block("layers.0."), **paddle_block("layers.1.")},
        ["layers.0.self_attn", "layers.1.self_attn"],
        False,
    ),
    "PaddleNLP BERT": (lambda: paddle_block("bert.encoder.layers.0."), ["bert.encoder.layers.0.self_attn"], False),
    "BERT": (lambda: bert_block("bert.encoder.layer.0."), ["bert.encoder.layer.0.attention"], False),
    "ViT": (lambda: vit_block("vit.encoder.layer.7."), ["vit.encoder.layer.7.attention"], True),
    "ViT without qkv_bias": (lambda: vit_block("vit.encoder.layer.7.", bias=False), ["vit.encoder.layer.7.attention"], True),
    "GPT-2": (lambda: gpt2_block("transformer.h.3."), ["transformer.h.3.attn"], True),
}


def family(name):
    make, blocks, normalize_before = FAMILIES[name]
    return {"embeddings.weight": draw(7, EMBED), **make(), "steps": np.array([3], "int64")}, blocks, normalize_before


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


def separate_projections(state, block):
    """Query, key, value and output projection as [in, out] weights and biases, and the layer norm, whatever the family."""
    prefix = block.rpartition(".")[0] + "."
    if block.endswith("self_attn"):
        names, out, transpose = [f"self_attn.{n}_proj" for n in "qkv"], "self_attn.out_proj", False
    elif block.endswith("attn"):
        weights = np.split(state[f"{prefix}attn.c_attn.weight"], 3, 1)
        biases = np.split(state[f"{prefix}attn.c_attn.bias"], 3)
        out = [state[f"{prefix}attn.c_proj.{part}"] for part in ("weight", "bias")]
        return [*zip(weights, biases), out], [state[f"{prefix}ln_1.{part}"] for part in ("weight", "bias")]
    else:
        inner = "self" if f"{prefix}attention.self.query.weight" in state else "attention"
        names, out, transpose = [f"attention.{inner}.{n}" for n in ("query", "key", "value")], "attention.output.dense", True
    pairs = []
    for name in (*names, out):
        weight = state[f"{prefix}{name}.weight"]
        pairs.append((weight.T if transpose else weight, state.get(f"{prefix}{name}.bias")))
    norm_name = next(n for n in ("norm1", "attention.output.LayerNorm", "layernorm_before") if f"{prefix}{n}.weight" in state)
    return pairs, [state[f"{prefix}{norm_name}.{part}"] for part in ("weight", "bias")]


def composed(state, block, normalize_before, x):
    """The block by Paddle's layers."""
    pairs, norm_parts = separate_projections(state, block)
    attention, layer_norm = nn.MultiHeadAttention(EMBED, HEADS), nn.LayerNorm(EMBED)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    for projection, (weight, bias) in zip(projections, pairs):
        projection.weight.set_value(np.ascontiguousarray(weight))
        projection.bias.set_value(np.zeros(EMBED, "float32") if bias is None else bias)
    layer_norm.weight.set_value(norm_parts[0])
    layer_norm.bias.set_value(norm_parts[1])
    return x + attention(layer_norm(x)) if normalize_before else layer_norm(x + attention(x))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_weights_compute_the_same_and_go_back(name, suffix, tmp_path, capsys):
    state, blocks, normalize_before = family(name)
    source = save(tmp_path / f"in{suffix}", state)
    packed_file, back = tmp_path / f"packed{suffix}", tmp_path / f"back{suffix}"
    assert main(["convert", str(source), str(packed_file), "--num-heads", str(HEADS)]) == 0
    output = capsys.readouterr().out
    packed = load(packed_file)
    x = paddle.to_tensor(draw(2, 5, EMBED))
    for block in blocks:
        layer = FusedMultiHeadAttention(
            EMBED, HEADS, 0.0, 0.0, normalize_before=normalize_before, final_layer_norm=not normalize_before
        )
        if f"{block}.qkv_bias" not in packed:
            layer.qkv_bias = None
        parts = {n: packed.pop(f"{block}.{n}") for n in layer.state_dict()}
        missing, unexpected = layer.set_state_dict(parts)
        assert not missing and not unexpected
        expected = composed(state, block, normalize_before, x).numpy().astype("float64")
        common.check_tensor("out", layer(x).numpy().astype("float64"), expected, "float32")
        assert re.search(rf"^{re.escape(block)}: ", output, re.M)
    assert set(packed) <= set(state)
    assert f"{len(blocks)} blocks packed, 0 left alone, {len(packed)} values unchanged" in output
    assert main(["revert", str(packed_file), str(back)]) == 0
    assert f"{len(blocks)} blocks unpacked" in capsys.readouterr().out
    assert_same(load(back), state)


@pytest.mark.parametrize("normalize_before", [False, True])
def test_a_converted_model_loads_it(normalize_before, tmp_path):
    """Keys and numbers are those of convert(model), whose state dict goes back the same way."""
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 24, 0.0, normalize_before=normalize_before)
    model = nn.TransformerEncoder(layer, 2)
    for p in model.parameters():
        p.set_value(draw(*p.shape))
    state, x = model.state_dict(), paddle.to_tensor(draw(2, 5, EMBED))
    expected = model(x).numpy()
    source, packed, back = (str(tmp_path / f"{name}.pdparams") for name in ("in", "packed", "back"))
    paddle.save(state, source)
    arrays = {name: value.numpy() for name, value in state.items()}
    more = ["--normalize-before"] if normalize_before else []
    assert main(["convert", source, packed, "--num-heads", str(HEADS), *more]) == 0
    fused = convert(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 24, 0.0, normalize_before=normalize_before), 2)
    )
    missing, unexpected = fused.set_state_dict(paddle.load(packed))
    assert not missing and not unexpected
    common.check_tensor("out", fused(x).numpy().astype("float64"), expected.astype("float64"), "float32")
    paddle.save(fused.state_dict(), packed)
    assert main(["revert", packed, back]) == 0
    assert_same({name: value.numpy() for name, value in paddle.load(back).items()}, arrays)


@pytest.mark.parametrize("first, second", [SUFFIXES, SUFFIXES[::-1]])
def test_from_one_format_to_the_other(first, second, tmp_path):
    state, _, _ = family("BERT")
    source = save(tmp_path / f"in{first}", state)
    assert main(["convert", str(source), str(tmp_path / f"packed{second}"), "--num-heads", "4"]) == 0
    assert main(["revert", str(tmp_path / f"packed{second}"), str(tmp_path / f"back{first}")]) == 0
    assert_same(load(tmp_path / f"back{first}"), state)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float64", "float16", "uint16"])
def test_dtypes_keep_their_bits(dtype, suffix, tmp_path):
    """uint16 is bfloat16. NaN payloads and negative zeros are bits like others."""
    state = {
        name: RANDOM.integers(0, 2 ** (8 * np.dtype(dtype).itemsize) - 1, a.shape, dtype=f"uint{8 * np.dtype(dtype).itemsize}")
        for name, a in gpt2_block("h.0.").items()
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
    state, _, _ = family("ViT")
    source, packed, back = (tmp_path / f"{name}.safetensors" for name in ("in", "packed", "back"))
    numpy_files.save_file({name: np.ascontiguousarray(a) for name, a in state.items()}, str(source), {"format": "pt"})
    assert main(["convert", str(source), str(packed), "--num-heads", "4"]) == 0
    assert main(["revert", str(packed), str(back)]) == 0
    assert_same(numpy_files.load_file(str(back)), state)
    with safetensors.safe_open(str(packed), "np") as file:
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
    paddle.save({**{n: paddle.to_tensor(a) for n, a in bert_block("").items()}, "epoch": 3}, str(tmp_path / "in.pdparams"))
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


def check_error(arguments, message):
    """Exit status 1, one line."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        assert main([str(argument) for argument in arguments]) == 1
    assert out.getvalue() == "" and error.getvalue().count("\n") == 1
    assert re.match(f"error: .*{message}", error.getvalue()), error.getvalue()


def test_the_command(tmp_path):
    """As a process: exit status, report, one line for an error."""
    source = save(tmp_path / "in.pdparams", paddle_block("encoder.layers.0."))
    target = tmp_path / "out.pdparams"
    status, out, error = run(["convert", source, target, "--num-heads", HEADS])
    assert (status, out.splitlines()) == (
        0,
        ["encoder.layers.0.self_attn: Paddle", f"{target}: 1 blocks packed, 0 left alone, 2 values unchanged"],
    ), error
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

    def without(state, *names):
        return {name: value for name, value in state.items() if name not in names}

    cross = {f"dec.0.cross_attn.{n}_proj.weight": draw(EMBED, EMBED) for n in "qkv"}
    state = {
        **paddle_block("enc.0."),
        **paddle_block("dec.0."),
        **cross,
        **without(paddle_block("a."), "a.norm1.weight"),
        **without(paddle_block("b."), "b.self_attn.k_proj.bias"),
        **{**paddle_block("c."), "c.self_attn.k_proj.weight": draw(8, EMBED)},
        **{**paddle_block("d."), "d.self_attn.v_proj.weight": draw(EMBED, EMBED, dtype="float16")},
        "e.self_attn.in_proj_weight": draw(3 * EMBED, EMBED),
        "f.crossattention.self.query.weight": draw(EMBED, EMBED),
    }
    source = save(tmp_path / "in.safetensors", state)
    assert main(["convert", str(source), str(tmp_path / "out.safetensors"), "--num-heads", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "enc.0.self_attn: Paddle",
        "dec.0.self_attn: left alone, it has cross_attn.q_proj.weight beside it, as in a decoder",
        "dec.0.cross_attn: left alone, its names are not those of a known self-attention",
        "a.self_attn: left alone, a.norm1.weight is missing",
        "b.self_attn: left alone, b.self_attn.k_proj.bias is missing",
        "c.self_attn: left alone, c.self_attn.k_proj.weight has shape [8, 16], not [16, 16]",
        "d.self_attn: left alone, its query, key and value weight are of different dtypes",
        "e.self_attn: left alone, its names are not those of a known self-attention",
        "f.crossattention.self: left alone, its names are not those of a known self-attention",
    ):
        assert line in lines
    found = load(tmp_path / "out.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith(("enc.0.self_attn", "enc.0.norm1"))}
    assert_same({name: value for name, value in found.items() if not name.startswith("enc.0.self_attn")}, kept)


def test_errors(tmp_path):
    source = save(tmp_path / "in.pdparams", paddle_block("enc.0."))
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
        message = f"--num-heads: expected a divisor of 16, the width of enc.0.self_attn, got {count}"
        check_error(["convert", source, out, "--num-heads", count], message)
    check_error(["convert", other, out, *heads], "no attention of a known naming was found")
    check_error(["convert", source, out, *heads, "--names", "dec.*"], r"no attention .* among the names 'dec.\*'")
    check_error(["revert", source, out], "no packed attention was found")
    check_error(["revert", packed, out], "enc.0.self_attn.linear_weight: expected an array beside enc.0.self_attn.qkv_weight")
    both = save(tmp_path / "both.pdparams", {**paddle_block("enc.0."), "enc.0.self_attn.qkv_weight": draw(3)})
    check_error(["convert", both, out, *heads], "enc.0.self_attn.qkv_weight: expected no packed parameter")
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
    source, target = save(tmp_path / f"in{suffix}", bert_block("")), tmp_path / f"out{suffix}"
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
        with pytest.raises(KeyboardInterrupt):
            main([str(argument) for argument in arguments])
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
    source = save(tmp_path / "in.pdparams", {**bert_block("0."), **bert_block("1.")})
    arguments = ["convert", str(source), str(tmp_path / "out.pdparams"), "--num-heads", "4", "--force"]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(arguments) == 0
    error = capsys.readouterr().err
    assert error.endswith(f"\rconvert [{'#' * 30}] 2/2\n") and f"\rconvert [{'#' * 15}{'.' * 15}] 1/2" in error


def test_packed_and_unpacked_arrays_are_contiguous():
    sliced = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in paddle_block("layer.").items()}
    packed, _ = checkpoint.pack(sliced, HEADS)
    unpacked, _ = checkpoint.unpack(packed)
    converted = {name: array for arrays in (packed, unpacked) for name, array in arrays.items() if "attn" in name}
    assert converted and all(array.flags["C_CONTIGUOUS"] for array in converted.values())
