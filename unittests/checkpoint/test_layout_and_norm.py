"""What tells the layout of the weights and the place of the layer norm, and when it is asked for."""

import numpy as np
import pytest
from families import (
    EMBED,
    assert_same,
    bert_block,
    check_error,
    draw,
    gpt_block,
    load,
    norm,
    packed_by,
    packed_vocabulary,
    paddle_block,
    save,
)
from paddle_fused_attention import checkpoint
from paddle_fused_attention.__main__ import main
from paddle_fused_attention.checkpoint import CheckpointError


def test_gpt_of_either_norm_order():
    """By the norm after GPT-2's last layer or the name of GPT's embeddings; where neither is there, or both, it has to
    be said.
    """
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
                assert_same(
                    checkpoint.unpack(packed, metadata=report.metadata)[0], {**packed_vocabulary(packed), **state}
                )
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
    with pytest.raises(
        CheckpointError, match="by their shapes a.intermediate.* is stored .out, in. and a.output.* .in, out."
    ):
        packed_by(mixed)
    with pytest.raises(CheckpointError, match="layout: expected in-out or out-in, got 'pt'"):
        packed_by(mixed, layout="pt")


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
    transposed = {
        name: value.T if name.startswith("h.") and value.ndim == 2 else value for name, value in state.items()
    }
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
        stacks = r"text.h.\*.attn and vision.h.\*.attn, which may differ"
        message = f"--normalize-{side}: expected one stack of layers, found {stacks}"
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
        check_error(
            ["convert", source, tmp_path / "out.pdparams", "--num-heads", 4, f"--normalize-{side}"], message + why
        )
    assert not (tmp_path / "out.pdparams").exists()
    state = {**bert_block("a.", False), **gpt_block("b.h.0."), **paddle_block("c.")}
    packed = packed_by(state, file_layout=None, normalize_before=side == "before")[0]
    assert "a.attention.ln_scale" in packed and f"b.h.0.attn.{'pre_ln' if side == 'before' else 'ln'}_scale" in packed
    for word in (1, "before", {"*": True}):
        with pytest.raises(CheckpointError, match="normalize_before: expected a bool or None, got"):
            packed_by(state, file_layout=None, normalize_before=word)
