"""Which blocks are packed, and which are left alone for what reason."""

import json
import re

import numpy as np
import pytest
from families import (
    EMBED,
    assert_same,
    bert_block,
    bert_embeddings,
    check_error,
    draw,
    gpt_block,
    load,
    norm,
    packed_by,
    packed_vocabulary,
    paddle_block,
    save,
    vit_block,
    without,
)
from paddle_fused_attention import checkpoint
from paddle_fused_attention.__main__ import main
from paddle_fused_attention.checkpoint import CheckpointError


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
        "enc.0.self_attn: Paddle, weights [in, out], "
        "for a model after paddle_fused_attention.convert(model) (an encoder layer)",
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
    state = without(
        paddle_block("gpt.decoder.layers.0."), *(f"gpt.decoder.layers.0.norm1.{n}" for n in ("weight", "bias"))
    )
    packed, report = packed_by(state, file_layout=None)
    assert report.converted["gpt.decoder.layers.0.self_attn"].endswith(
        "(an attention with an adapter, as PaddleNLP's GPT's)"
    )
    assert_same(checkpoint.unpack(packed, metadata=report.metadata)[0], {**packed_vocabulary(packed), **state})


RELATIVE = "relative positions are added to the scores"
BERT_LAYER = "bert.encoder.layer.0."
# By what tells it: a layer, what stands beside it, and why it is left alone.
OTHERS = {
    "distance_embedding": (
        bert_block,
        BERT_LAYER + "attention.self.distance_embedding.weight",
        "no part of the operator",
    ),
    "adapters": (bert_block, BERT_LAYER + "attention.self.query.lora_A.weight", "no part of the operator"),
    "scales of int8": (bert_block, BERT_LAYER + "attention.output.dense.SCB", "no part of the operator"),
    "a second norm": (bert_block, BERT_LAYER + "attention.output.LayerNorm.gamma", "no part of the operator"),
    "q_bias": (vit_block, "vit.encoder.layer.0.attention.attention.q_bias", "no part of the operator"),
    "layer scale": (vit_block, "vit.encoder.layer.0.lambda_1", "no part of the operator"),
    "rel_pos_bias": (bert_block, "bert.encoder.rel_pos_bias.weight", RELATIVE),
    "relative_position_bias_table": (
        vit_block,
        "vit.encoder.relative_position_bias.relative_position_bias_table",
        RELATIVE,
    ),
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
    """MRA, YOSO and Nystromformer count positions from 2, of tables with two rows more; RoBERTa has such a table, but
    counts from 0.
    """
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
    check_error(
        ["convert", source, out, *heads, "--force"], f"no attention .*: left alone, its config.json says {model}: "
    )


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
