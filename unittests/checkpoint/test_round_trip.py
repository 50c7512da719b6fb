"""`convert` and then `revert` give back names, bits, layouts and metadata, through every kind of file."""

import json
import re

import numpy as np
import paddle
import pytest
from families import (
    EMBED,
    FAMILIES,
    HEADS,
    RANDOM,
    SUFFIXES,
    assert_same,
    bert_block,
    check_error,
    draw,
    family,
    gpt_block,
    load,
    norm,
    out_in,
    packed_by,
    packed_vocabulary,
    paddle_block,
    save,
    without,
)
from paddle_fused_attention import checkpoint, checkpoint_files
from paddle_fused_attention.__main__ import main
from paddle_fused_attention.checkpoint import CheckpointError


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
    packed[f"{prefix}{scale}_scale"], packed[f"{prefix}{scale}_bias"] = (
        packed.pop(f"a.norm1.{n}") for n in ("weight", "bias")
    )
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
            ["revert", source, back, "--force"],
            f"a.self_attn: {prefix}{part} is missing",
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
        name: RANDOM.integers(
            0, 2 ** (8 * np.dtype(dtype).itemsize) - 1, a.shape, dtype=f"uint{8 * np.dtype(dtype).itemsize}"
        )
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
        ["convert", source, tmp_path / "out.pdparams", "--num-heads", 4],
        "scale: .* F8_E4M3 can't be stored in .pdparams",
    )
    paddle.save(
        {**{n: paddle.to_tensor(a) for n, a in bert_block("", False).items()}, "epoch": 3},
        str(tmp_path / "in.pdparams"),
    )
    assert main(["convert", str(tmp_path / "in.pdparams"), str(tmp_path / "out.pdparams"), "--num-heads", "4"]) == 0
    assert load(tmp_path / "out.pdparams")["epoch"] == 3
    message = "epoch: a value of type int can't be stored in .safetensors"
    check_error(["convert", tmp_path / "in.pdparams", tmp_path / "o.safetensors", "--num-heads", 4], message)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "in.pdparams",
        "in.safetensors",
        "out.pdparams",
        "out.safetensors",
    ]


def test_packed_and_unpacked_arrays_are_contiguous():
    state = {**paddle_block("a."), **bert_block("b.", False)}
    sliced = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in state.items()}
    packed, report = checkpoint.pack(sliced, HEADS)
    unpacked, _ = checkpoint.unpack(packed, metadata=report.metadata)
    made = [array for name, array in packed.items() if name not in sliced]
    made += [array for name, array in unpacked.items() if name not in packed]
    assert len(made) == 2 + 6 + 6 + 10 and all(array.flags["C_CONTIGUOUS"] for array in made)


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
    with pytest.raises(
        CheckpointError, match="metadata paddle_fused_attention.blocks: expected JSON as convert writes it"
    ):
        checkpoint.unpack(packed, metadata=broken)
    with pytest.raises(
        CheckpointError, match="metadata paddle_fused_attention.blocks: expected JSON as convert writes it"
    ):
        packed_by(bert_block("b."), metadata=broken)


def test_packed_parts_that_do_not_fit():
    packed, report = packed_by(bert_block("a."))
    for part, value, message in (
        ("qkv_weight", draw(3, 4, 4, 8), "qkv_weight has shape [3, 4, 4, 8], not [3, H, D, H * D]"),
        ("qkv_weight", draw(3, 0, 4, 0), "qkv_weight is empty"),
        ("qkv_weight", np.ones((3, 4, 4, 16), "int64"), "qkv_weight has dtype int64, which is no float"),
        ("qkv_weight", 3, "qkv_weight is not an array of numbers"),
        ("qkv_bias", draw(3, 16), "qkv_bias has shape [3, 16], not [3, 4, 4]"),
        ("linear_weight", draw(16), "linear_weight has shape [16], not [16, 16]"),
        ("linear_weight", draw(16, 16).astype("complex64"), "linear_weight has dtype complex64, which is no float"),
        ("linear_bias", 3, "linear_bias is not an array of numbers"),
        ("ln_bias", draw(4), "ln_bias has shape [4], not [16]"),
        ("ln_bias", np.ones(16, "bool"), "ln_bias has dtype bool, which is no float"),
    ):
        broken = {**packed, f"a.attention.{part}": value}
        with pytest.raises(CheckpointError, match=re.escape(f"a.attention: a.attention.{message}")):
            checkpoint.unpack(broken, metadata=report.metadata)
    for part in ("pre_ln_scale", "pre_ln_bias"):
        with pytest.raises(CheckpointError, match="both a.attention.pre_ln_.* and a.attention.ln_.*, of which it has"):
            checkpoint.unpack({**packed, f"a.attention.{part}": draw(16)}, metadata=report.metadata)
    with pytest.raises(CheckpointError, match="there is a.attention.lora_A, which is no part of the operator's attent"):
        checkpoint.unpack({**packed, "a.attention.lora_A": draw(16)}, metadata=report.metadata)


def test_revert_refuses_what_convert_refuses():
    """A part of another kind, in the separate block or in the packed one, is told in the same words."""
    separate = bert_block("a.")
    packed, report = packed_by(separate)
    for value, words in (
        (draw(4), "has shape [4], not [16]"),
        (np.ones(16, "int32"), "has dtype int32, which is no float of 16, 32 or 64 bits"),
        ("text", "is not an array of numbers"),
        (None, "is missing"),
    ):
        for state, name in ((separate, "a.attention.output.LayerNorm.bias"), (packed, "a.attention.ln_bias")):
            broken = without(state, name) if value is None else {**state, name: value}
            with pytest.raises(CheckpointError, match=re.escape(f"{name} {words}")):
                if state is separate:
                    packed_by(broken)
                else:
                    checkpoint.unpack(broken, metadata=report.metadata)


def test_two_blocks_of_the_same_separate_names():
    """Neither is lost: a layer has one attention."""
    layer, report = packed_by(bert_block("a."), whole_layers=True)
    attention, _ = packed_by(bert_block("a."))
    both = {**layer, **{name: array for name, array in attention.items() if name.startswith("a.attention.")}}
    with pytest.raises(CheckpointError, match="a.attention: expected one attention in its layer, found another beside"):
        checkpoint.unpack(both, metadata=report.metadata)


def test_metadata_that_contradict_shapes():
    """As of convert's --layout, no shape in the layer may tell another layout than the metadata."""
    packed, report = packed_by(bert_block("a."))
    transposed = {name: a.T if "dense.weight" in name else a for name, a in packed.items()}
    with pytest.raises(
        CheckpointError,
        match=r"a.attention: it was stored \[out, in\], by the file's metadata, but by its shape "
        r"a.intermediate.dense.weight is stored \[in, out\]",
    ):
        checkpoint.unpack(transposed, metadata=report.metadata)
