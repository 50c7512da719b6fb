"""`convert --whole-layers`: both halves of a layer under the names of Paddle's FusedTransformerEncoderLayer."""

import json
import re

import common
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
    linear,
    load,
    norm,
    out_in,
    packed_by,
    packed_vocabulary,
    paddle_block,
    save,
    vit_block,
    without,
)
from paddle import nn
from paddle.incubate.nn import FusedTransformerEncoderLayer
from paddle_fused_attention import checkpoint, checkpoint_files, incubate
from paddle_fused_attention.__main__ import main
from paddle_fused_attention.checkpoint import CheckpointError

HIDDEN = 24

# For each word that a family's attention has in its name, the parts of paddle.nn.TransformerEncoderLayer in its names.
PARTS = {
    "self_attn": {
        "self_attn.out_proj": "self_attn.out_proj",
        **{f"self_attn.{n}_proj": f"self_attn.{n}_proj" for n in "qkv"},
        **{n: n for n in ("linear1", "linear2", "norm1", "norm2")},
    },
    "attn": {
        "self_attn.out_proj": "attn.c_proj",
        **{"linear1": "mlp.c_fc", "linear2": "mlp.c_proj", "norm1": "ln_1", "norm2": "ln_2"},
    },
    "attention": {
        "self_attn.out_proj": "attention.output.dense",
        **{f"self_attn.{n[0]}_proj": f"attention.self.{n}" for n in ("query", "key", "value")},
        **{"linear1": "intermediate.dense", "linear2": "output.dense"},
        **{"norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm"},
    },
    "vit": {
        "self_attn.out_proj": "attention.output.dense",
        **{f"self_attn.{n[0]}_proj": f"attention.attention.{n}" for n in ("query", "key", "value")},
        **{"linear1": "intermediate.dense", "linear2": "output.dense"},
        **{"norm1": "layernorm_before", "norm2": "layernorm_after"},
    },
}


def order_said(name):
    """What has to be said of the layer norms' place: Paddle's names never tell it."""
    _, _, normalize_before, said = FAMILIES[name]
    return [f"--normalize-{'before' if normalize_before else 'after'}"] if name.startswith("Paddle") else [*said]


def separate_layer(state, block, normalize_before, transpose):
    """A layer of Paddle with the values of a family's layer."""
    prefix, _, word = block.rpartition(".")
    kind = "vit" if f"{prefix}.layernorm_before.weight" in state else word
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, HIDDEN, 0.0, "gelu", normalize_before=normalize_before)
    values = {}
    for part, name in PARTS[kind].items():
        for parameter, named in (("weight", ("weight", "gamma")), ("bias", ("bias", "beta"))):
            value = next((state[f"{prefix}.{name}.{n}"] for n in named if f"{prefix}.{name}.{n}" in state), None)
            value = np.zeros(EMBED, "float32") if value is None else value
            values[f"{part}.{parameter}"] = np.ascontiguousarray(value.T) if transpose and value.ndim == 2 else value
    if kind == "attn":
        for parameter in ("weight", "bias"):
            columns = np.split(state[f"{prefix}.attn.c_attn.{parameter}"], 3, -1)
            values.update((f"self_attn.{n}_proj.{parameter}", np.ascontiguousarray(c)) for n, c in zip("qkv", columns))
    assert layer.set_state_dict(values) == ([], [])
    layer.eval()
    return layer


def described_layer(report):
    """The layer that a line of the report is for, with the model's activation, which it leaves open."""
    arguments = re.search(r"for FusedTransformerEncoderLayer\((.*?)\)", report).group(1)
    layer = eval(f"layer({arguments}, activation='gelu')", {"layer": incubate.FusedTransformerEncoderLayer})
    layer.eval()
    return layer


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_layers_compute_the_same_and_go_back(name, suffix, tmp_path, capsys):
    """In the layer that the report names; and the metadata of the file are those of before."""
    state, blocks, normalize_before, _ = family(name)
    said = order_said(name)
    if suffix == ".pdparams" and out_in(name):
        said += ["--layout", "out-in"]
    metadata = {"format": "pt"} if suffix == ".safetensors" and out_in(name) else None
    source = save(tmp_path / f"in{suffix}", state, metadata)
    packed_file, back = tmp_path / f"packed{suffix}", tmp_path / f"back{suffix}"
    words = ["convert", str(source), str(packed_file), "--num-heads", str(HEADS), "--whole-layers", *said]
    assert main(words) == 0
    output, packed = capsys.readouterr().out, load(packed_file)
    x = paddle.to_tensor(draw(2, 5, EMBED))
    for block in blocks:
        prefix = block.rpartition(".")[0] + "."
        report = re.search(rf"^{re.escape(block)}: (.*)", output, re.M).group(1)
        assert f"weights {'[out, in]' if out_in(name) else '[in, out]'}, norm " in report
        assert report.count("normalize_before=True") == normalize_before
        assert ("with the model's activation, the model's epsilon" in report) and (
            ("a causal mask" in report.split(", ")) == name.startswith("GPT")
        )
        layer = described_layer(report)
        assert ("whose fused_attn.qkv_bias is None" in report) == (f"{prefix}fused_attn.qkv_bias" not in packed)
        if f"{prefix}fused_attn.qkv_bias" not in packed:
            layer.fused_attn.qkv_bias = None
        parts = {part: packed.pop(prefix + part) for part in layer.state_dict()}
        assert layer.set_state_dict(parts) == ([], [])
        expected = separate_layer(state, block, normalize_before, out_in(name))
        mask = paddle.tril(paddle.ones([5, 5], "bool")) if name.startswith("GPT") else None
        actual = layer(x, mask)
        common.check_tensor(
            "out", actual.numpy().astype("float64"), expected(x, mask).numpy().astype("float64"), "float32"
        )
        assert [n for n in packed if n.startswith(prefix)] == [prefix + "attn.bias"] * name.startswith("GPT")
    assert set(packed) <= set(state)
    assert f"{len(blocks)} blocks packed, 0 left alone, {len(packed)} values unchanged" in output
    assert main(["revert", str(packed_file), str(back)]) == 0
    assert f"{len(blocks)} blocks unpacked" in capsys.readouterr().out
    assert_same(load(back), state)
    if metadata is not None:
        assert checkpoint_files.read(back).metadata == metadata


@pytest.mark.parametrize("first, second", [SUFFIXES, SUFFIXES[::-1]])
@pytest.mark.parametrize("dtype", ["float64", "float16", "uint16"])
def test_bits_and_norms_names_come_back(dtype, first, second, tmp_path):
    """From one kind of file to the other, in a layer whose two norms are named in either way."""
    state = bert_block("a.0.", norm_names=("gamma", "beta"))
    state.update(norm("a.0.output.LayerNorm"))
    del state["a.0.output.LayerNorm.gamma"], state["a.0.output.LayerNorm.beta"]
    state.update(bert_block("a.1.", hidden=EMBED))
    unsigned = f"uint{8 * np.dtype(dtype).itemsize}"
    largest = np.iinfo(unsigned).max
    state = {n: RANDOM.integers(0, largest, a.shape, unsigned).view(dtype) for n, a in state.items()}
    files = [tmp_path / f"{i}{suffix}" for i, suffix in enumerate((first, second, first))]
    save(files[0], state)
    words = ["--num-heads", "2", "--whole-layers", "--layout", "out-in"]
    assert main(["convert", *map(str, files[:2]), *words]) == 0
    assert main(["revert", *map(str, files[1:])]) == 0
    found = load(files[2])
    assert sorted(found) == sorted(state)
    for name, value in state.items():
        assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), name


def test_only_contiguous_arrays_are_made():
    state = {**paddle_block("a."), **bert_block("b.", False)}
    sliced = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in state.items()}
    packed, report = checkpoint.pack(sliced, HEADS, whole_layers=True, normalize_before=True)
    unpacked, _ = checkpoint.unpack(packed, metadata=report.metadata)
    made = [array for name, array in packed.items() if name not in sliced]
    made += [array for name, array in unpacked.items() if name not in packed]
    assert len(made) == 12 + 12 + 16 + 16 and all(array.flags["C_CONTIGUOUS"] for array in made)


# What is wrong with a layer, and the reason that is given for leaving it alone.
WRONG = {
    "an unknown part": (
        lambda: {**bert_block("a."), "a.output.adapter.weight": draw(2)},
        "there is a.output.adapter.weight, which is no part of a FusedTransformerEncoderLayer",
    ),
    "a scale of the layer": (
        lambda: {**vit_block("a."), "a.layer_scale1.lambda1": draw(EMBED)},
        "there is a.layer_scale1.lambda1, which is no part of a FusedTransformerEncoderLayer",
    ),
    "cross-attention": (
        lambda: {**gpt_block("a."), **linear("a.crossattention.q_attn", False), **norm("ln_f")},
        "there is a.crossattention.q_attn.weight, which is no part of a FusedTransformerEncoderLayer",
    ),
    "a packed name": (
        lambda: {**bert_block("a."), "a.ffn._linear1_weight": draw(2)},
        "there is a.ffn._linear1_weight, which is no part of a FusedTransformerEncoderLayer",
    ),
    "no second norm": (
        lambda: without(bert_block("a."), "a.output.LayerNorm.weight", "a.output.LayerNorm.bias"),
        "a.output.LayerNorm.weight is missing",
    ),
    "no first norm": (
        lambda: without(paddle_block("a."), "a.norm1.weight", "a.norm1.bias"),
        "a.norm1.weight is missing",
    ),
    "no second matrix": (
        lambda: without(bert_block("a."), "a.output.dense.weight"),
        "a.output.dense.weight is missing",
    ),
    "a gated feed-forward": (
        lambda: {**bert_block("a."), **linear("a.intermediate.dense", True, 2 * HIDDEN)},
        "a.output.dense.weight has shape [16, 24], not [48, 16]",
    ),
    "another width": (
        lambda: {**bert_block("a."), "a.intermediate.dense.weight": draw(HIDDEN, 8)},
        "a.intermediate.dense.weight has shape [24, 8], not [16, dim_feedforward]",
    ),
    "no matrix": (
        lambda: {**bert_block("a."), "a.intermediate.dense.weight": draw(HIDDEN)},
        "a.intermediate.dense.weight has shape [24], not [16, dim_feedforward]",
    ),
    "nothing hidden": (
        lambda: {**bert_block("a.", hidden=0)},
        "a.intermediate.dense.weight is empty",
    ),
    "another bias": (
        lambda: {**bert_block("a."), "a.intermediate.dense.bias": draw(EMBED)},
        "a.intermediate.dense.bias has shape [16], not [24]",
    ),
    "another second bias": (
        lambda: {**bert_block("a."), "a.output.dense.bias": draw(HIDDEN)},
        "a.output.dense.bias has shape [24], not [16]",
    ),
    "another norm": (
        lambda: {**bert_block("a."), "a.output.LayerNorm.bias": draw(HIDDEN)},
        "a.output.LayerNorm.bias has shape [24], not [16]",
    ),
    "integers": (
        lambda: {**bert_block("a."), "a.output.dense.weight": np.zeros((EMBED, HIDDEN), "int8")},
        "a.output.dense.weight has dtype int8, which is no float of 16, 32 or 64 bits",
    ),
    "a decoder": (
        lambda: {**paddle_block("a."), **linear("a.cross_attn.q_proj", False)},
        "it has cross_attn.q_proj.weight beside it, as in a decoder",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_left_alone(what):
    """A layer that is not known is, with the reason, and another is packed."""
    make, reason = WRONG[what]
    state = {**make(), **vit_block("other.0.")}
    packed, report = packed_by(state, whole_layers=True, file_layout=None)
    assert list(report.converted) == ["other.0.attention"]
    name = next(name for name in report.left_alone if name.startswith("a."))
    assert report.left_alone[name] == reason
    kept = {n: a for n, a in state.items() if n.startswith("a.")}
    assert_same({n: a for n, a in packed.items() if n.startswith("a.")}, kept)


def test_a_layer_that_is_the_whole_checkpoint():
    """Without a prefix other things may stand beside the layer, but not in its parts."""
    state = vit_block("")
    packed, report = packed_by(state, whole_layers=True)
    assert {"fused_attn.qkv_weight", "ffn._ln1_scale"} <= set(packed)
    assert_same(checkpoint.unpack(packed, metadata=report.metadata)[0], {**packed_vocabulary(packed), **state})
    with pytest.raises(CheckpointError, match="there is output.more.weight, which is no part of a Fused"):
        packed_by({**state, "output.more.weight": draw(3)}, whole_layers=True)
    both = {**paddle_block(""), **bert_block("", False)}
    with pytest.raises(
        CheckpointError, match="attention: expected one attention in its layer, found another beside it"
    ):
        packed_by(both, whole_layers=True, file_layout=None, normalize_before=True)


def test_the_norms_place_is_asked_for(tmp_path):
    """With Paddle's names, which do not tell it; the packed names do."""
    state = paddle_block("layers.0.")
    source, out = save(tmp_path / "in.pdparams", state), tmp_path / "out.pdparams"
    words = ["convert", source, out, "--num-heads", HEADS, "--whole-layers"]
    check_error(words, "layers.0.self_attn: nothing tells whether its layer norm stands before the attention")
    for side, attention, feed_forward in (("before", "pre_ln", "_ln1"), ("after", "ln", "_ln2")):
        assert main([str(word) for word in (*words, f"--normalize-{side}", "--force")]) == 0
        packed = load(out)
        norms = [f"layers.0.fused_attn.{attention}", f"layers.0.ffn.{feed_forward}"]
        assert sorted(n for n in packed if "ln" in n) == sorted(f"{n}_{p}" for n in norms for p in ("scale", "bias"))
    source = save(tmp_path / "in.pdparams", bert_block("a.", False))
    message = "--normalize-before: expected a block whose names don't tell .*: a.attention has it after, by its names"
    check_error([*words, "--normalize-before", "--force"], message)


@pytest.mark.parametrize(
    "key, value, name",
    [("hidden_act", "gelu", "gelu"), ("hidden_act", "relu", "relu"), ("hidden_act", "gelu_new", "gelu_tanh"),
     ("hidden_act", "swish", "silu"), ("hidden_act", None, None), ("afn", "gelu", None)],
)  # fmt: skip
def test_what_a_config_tells_of_bert(key, value, name):
    report = packed_by(bert_block("a."), whole_layers=True, config={key: value, "layer_norm_eps": 1e-12})[1]
    line = report.converted["a.attention"]
    activation, told = (f", activation={name!r}", "") if name else ("", "the model's activation, ")
    incubate.FusedTransformerEncoderLayer(EMBED, HEADS, HIDDEN, activation=name or "relu")  # it knows the name
    assert line.endswith(
        f"FusedTransformerEncoderLayer(16, 4, 24{activation}), with {told}epsilon 1e-12, in a decoder a causal mask"
    )


@pytest.mark.parametrize("key, name", [("activation_function", "gelu"), ("afn", "gelu_tanh")])
def test_what_a_config_tells_of_gpt(key, name):
    """OpenAI's GPT means the approximation by gelu, GPT-2 what it says."""
    config = {key: "gelu", "layer_norm_epsilon": 1e-5}
    report = packed_by({**gpt_block("h.0."), **norm("ln_f")}, whole_layers=True, config=config)[1]
    assert report.converted["h.0.attn"].endswith(
        f"(16, 4, 24, activation={name!r}, normalize_before=True), with epsilon 1e-05, a causal mask"
    )


@pytest.mark.parametrize("value", ["quick_gelu", "gelu_10", 3, ["relu"]])
def test_activations_that_the_layer_does_not_have(value, tmp_path):
    """They don't matter to the attention alone."""
    state = bert_block("a.", False)
    source, out = save(tmp_path / "in.pdparams", state), tmp_path / "out.pdparams"
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": value}))
    words = ["convert", source, out, "--num-heads", HEADS]
    message = f"no attention .*: left alone, its config.json says hidden_act {re.escape(repr(value))}, an activation"
    check_error([*words, "--whole-layers"], message)
    assert not out.exists() and main([str(word) for word in words]) == 0


def test_missing_biases_are_told():
    """Each is optional in the layer."""
    state = without(bert_block("a."), "a.intermediate.dense.bias", "a.attention.output.dense.bias")
    packed, report = packed_by(state, whole_layers=True)
    absent = "whose fused_attn.linear_bias and ffn._linear1_bias is None"
    assert report.converted["a.attention"].endswith(absent) and "a.ffn._linear2_bias" in packed
    assert_same(checkpoint.unpack(packed, metadata=report.metadata)[0], {**packed_vocabulary(packed), **state})


@pytest.mark.parametrize("normalize_before", [False, True])
def test_state_dicts_of_paddle_s_own_layer(normalize_before, tmp_path, capsys):
    """Without metadata the names are those of paddle.nn.TransformerEncoderLayer, and the numbers the same."""
    sizes, options = (EMBED, HEADS, HIDDEN, 0.0, "gelu"), dict(normalize_before=normalize_before)
    built_in = nn.LayerList([FusedTransformerEncoderLayer(*sizes, **options)])
    for parameter in built_in.parameters():
        parameter.set_value(draw(*parameter.shape))
    source, back = tmp_path / "in.pdparams", tmp_path / "back.pdparams"
    paddle.save(built_in.state_dict(), str(source))
    assert main(["revert", str(source), str(back)]) == 0
    assert "0.fused_attn: Paddle, weights [in, out]" in capsys.readouterr().out
    layers = nn.LayerList([nn.TransformerEncoderLayer(*sizes, **options)])
    assert layers.set_state_dict(paddle.load(str(back))) == ([], [])
    fused = incubate.FusedTransformerEncoderLayer(*sizes, **options)
    assert fused.set_state_dict(built_in[0].state_dict()) == ([], [])
    x = paddle.to_tensor(draw(2, 5, EMBED))
    common.check_tensor("out", layers[0](x).numpy().astype("float64"), fused(x).numpy().astype("float64"), "float32")
    again, order = tmp_path / "again.pdparams", f"--normalize-{'before' if normalize_before else 'after'}"
    assert main(["convert", str(back), str(again), "--num-heads", str(HEADS), "--whole-layers", order]) == 0
    assert_same(load(again), load(source))
    assert main(["revert", str(source), str(back), "--layout", "out-in", "--force"]) == 0
    assert load(back)["0.linear1.weight"].shape == (HIDDEN, EMBED)


def test_a_second_pass(tmp_path, capsys):
    """Whole layers and attentions alone can stand in one file."""
    state = {**bert_block("a.0."), **bert_block("b.0."), **vit_block("c.0.")}
    files = [tmp_path / f"{i}.safetensors" for i in range(5)]
    save(files[0], state, {"format": "pt"})
    heads = ["--num-heads", "4"]
    assert main(["convert", *map(str, files[:2]), *heads, "--whole-layers", "--names", "a.*"]) == 0
    assert main(["convert", *map(str, files[1:3]), *heads, "--names", "b.*"]) == 0
    assert "a.0.fused_attn: left alone, packed already" in capsys.readouterr().out
    assert main(["convert", *map(str, files[2:4]), *heads, "--whole-layers"]) == 0
    output = capsys.readouterr().out
    assert all(f"{name}: left alone, packed already" in output for name in ("a.0.fused_attn", "b.0.attention"))
    assert {"a.0.ffn._ln2_bias", "b.0.attention.ln_scale", "c.0.ffn._ln1_bias"} <= set(load(files[3]))
    assert main(["revert", *map(str, files[3:])]) == 0
    assert_same(load(files[4]), state)
    assert checkpoint_files.read(files[4]).metadata == {"format": "pt"}


@pytest.mark.parametrize("known", [True, False])
def test_packed_parts_that_do_not_fit(known):
    packed, report = packed_by(bert_block("a."), whole_layers=True)
    metadata = report.metadata if known else None
    for part, value, message in (
        ("ffn._linear1_weight", draw(8, HIDDEN), "a.ffn._linear1_weight has shape [8, 24], not [16, dim_feedforward]"),
        ("ffn._linear1_weight", draw(EMBED), "a.ffn._linear1_weight has shape [16], not [16, dim_feedforward]"),
        ("ffn._linear1_weight", draw(EMBED, 0), "a.ffn._linear1_weight is empty"),
        ("ffn._linear1_weight", draw(EMBED, 2 * HIDDEN), "a.ffn._linear1_bias has shape [24], not [48]"),
        ("ffn._linear2_weight", draw(EMBED, HIDDEN), "a.ffn._linear2_weight has shape [16, 24], not [24, 16]"),
        ("ffn._linear2_weight", None, "a.ffn._linear2_weight is missing"),
        ("ffn._linear2_bias", 3, "a.ffn._linear2_bias is not an array of numbers"),
        ("ffn._ln2_scale", None, "a.ffn._ln2_scale is missing"),
        ("ffn._ln2_bias", draw(4), "a.ffn._ln2_bias has shape [4], not [16]"),
        ("ffn._ln1_scale", draw(EMBED), "there are both a.ffn._ln1_scale and a.ffn._ln2_scale, of which it has one"),
        (
            "fused_attn.pre_ln_scale",
            draw(EMBED),
            "there are both a.fused_attn.pre_ln_scale and a.fused_attn.ln_scale, of which it has one",
        ),
        ("fused_attn.ln_scale", None, "a.fused_attn.ln_scale is missing"),
        ("fused_attn.linear_weight", None, "a.fused_attn.linear_weight is missing"),
        ("ffn.adapter", draw(EMBED), "there is a.ffn.adapter, which is no part of a FusedTransformerEncoderLayer"),
    ):
        broken = {**packed, f"a.{part}": value}
        if value is None:
            del broken[f"a.{part}"]
        with pytest.raises(CheckpointError, match=f"^a.fused_attn: {re.escape(message)}"):
            checkpoint.unpack(broken, metadata=metadata)
    broken = without(packed, *(name for name in packed if ".ffn." in name))
    why = "a.ffn._linear1_weight is missing" if known else "left alone, its names are not those"
    with pytest.raises(CheckpointError, match=f"a.fused_attn: {why}"):
        checkpoint.unpack(broken, metadata=metadata)
    with pytest.raises(CheckpointError, match="expected no separate parameter beside a.fused_attn.qkv_weight"):
        taken = "a.output.dense.weight" if known else "a.linear2.weight"
        checkpoint.unpack({**packed, taken: draw(2)}, metadata=metadata)


def test_an_order_that_its_family_does_not_have():
    packed, report = packed_by(bert_block("a."), whole_layers=True)
    renamed = {
        name.replace("fused_attn.ln", "fused_attn.pre_ln").replace("_ln2", "_ln1"): a for name, a in packed.items()
    }
    with pytest.raises(CheckpointError, match="a.fused_attn: a.fused_attn.ln_scale is missing"):
        checkpoint.unpack(renamed, metadata=report.metadata)


@pytest.mark.parametrize("names", [3, ["gamma", "bias"], "weight"])
def test_broken_metadata(names):
    packed, report = packed_by(bert_block("a."), whole_layers=True)
    records = json.loads(report.metadata[checkpoint.METADATA_BLOCKS])
    records["a.fused_attn"]["feed_forward_norm"] = names
    broken = {checkpoint.METADATA_BLOCKS: json.dumps(records)}
    with pytest.raises(CheckpointError, match="expected JSON as convert writes it"):
        checkpoint.unpack(packed, metadata=broken)


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_whole_layers_is_a_bool(value):
    with pytest.raises(CheckpointError, match="whole_layers: expected a bool, got"):
        packed_by(bert_block("a."), whole_layers=value)
