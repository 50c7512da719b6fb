"""State dicts with the names of known families of models, their files, and what is asked of the command on them."""

import contextlib
import io
import re

import numpy as np
from paddle_fused_attention import checkpoint, checkpoint_files
from paddle_fused_attention.__main__ import main

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
    state.update(
        norm(f"{prefix}attention.output.LayerNorm", *norm_names), **norm(f"{prefix}output.LayerNorm", *norm_names)
    )
    return {**state, **feed_forward(f"{prefix}intermediate.dense", f"{prefix}output.dense", out_in, hidden)}


def vit_block(prefix, bias=True):
    state = norm(f"{prefix}layernorm_before")
    for name in ("query", "key", "value"):
        state.update(linear(f"{prefix}attention.attention.{name}", True, bias=bias))
    state.update(feed_forward(f"{prefix}intermediate.dense", f"{prefix}output.dense", True))
    return {**state, **linear(f"{prefix}attention.output.dense", True), **norm(f"{prefix}layernorm_after")}


def gpt_block(prefix, out_in=False):
    state = {
        **norm(f"{prefix}ln_1"),
        f"{prefix}attn.bias": np.tril(np.ones((1, 1, 8, 8), "uint8")),
        **norm(f"{prefix}ln_2"),
    }
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
    "PaddleNLP ERNIE": (
        lambda: paddle_block("ernie.encoder.layers.0."),
        ["ernie.encoder.layers.0.self_attn"],
        False,
        (),
    ),
    "Paddle's names by PyTorch": (lambda: paddle_block("layers.0.", out_in=True), ["layers.0.self_attn"], False, ()),
    "BERT": (
        lambda: {**bert_embeddings("bert."), **bert_block("bert.encoder.layer.0.")},
        ["bert.encoder.layer.0.attention"],
        False,
        (),
    ),
    "RoBERTa": (
        lambda: {**bert_embeddings("roberta."), **bert_block("roberta.encoder.layer.0.")},
        ["roberta.encoder.layer.0.attention"],
        False,
        (),
    ),
    "MiniLM": (
        lambda: {
            **bert_embeddings(),
            "embeddings.position_ids": np.arange(7)[None],
            **bert_block("encoder.layer.0."),
            **bert_block("encoder.layer.1."),
            "pooler.dense.weight": draw(EMBED, EMBED),
        },
        ["encoder.layer.0.attention", "encoder.layer.1.attention"],
        False,
        (),
    ),
    "BERT, gamma and beta": (
        lambda: bert_block("bert.encoder.layer.0.", norm_names=("gamma", "beta")),
        ["bert.encoder.layer.0.attention"],
        False,
        (),
    ),
    "BERT's names by Paddle": (
        lambda: bert_block("encoder.layer.0.", out_in=False),
        ["encoder.layer.0.attention"],
        False,
        (),
    ),
    "ViT": (lambda: vit_block("vit.encoder.layer.7."), ["vit.encoder.layer.7.attention"], True, ()),
    "ViT without qkv_bias": (
        lambda: vit_block("vit.encoder.layer.7.", bias=False),
        ["vit.encoder.layer.7.attention"],
        True,
        (),
    ),
    "GPT-2": (
        lambda: {**gpt_block("transformer.h.3."), **norm("transformer.ln_f")},
        ["transformer.h.3.attn"],
        True,
        (),
    ),
    "GPT": (
        lambda: {**gpt_block("transformer.h.3."), "transformer.tokens_embed.weight": draw(7, EMBED)},
        ["transformer.h.3.attn"],
        False,
        (),
    ),
    "GPT's layers alone": (
        lambda: gpt_block("transformer.h.3."),
        ["transformer.h.3.attn"],
        False,
        ("--normalize-after",),
    ),
}


def out_in(name):
    return not name.startswith(("Paddle", "GPT", "BERT's names by Paddle")) or name.endswith("PyTorch")


def family(name):
    make, blocks, normalize_before, said = FAMILIES[name]
    return (
        {"vocabulary.weight": draw(7, EMBED), **make(), "steps": np.array([3], "int64")},
        blocks,
        normalize_before,
        [*said],
    )


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


def check_error(arguments, message, status=1, start="error: .*"):
    """Exit status, and one line of which `message` is a pattern."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        assert main([str(argument) for argument in arguments]) == status
    assert out.getvalue() == "" and error.getvalue().count("\n") == 1
    assert re.match(f"{start}{message}", error.getvalue()), error.getvalue()


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


def packed_by(state, num_heads=HEADS, **options):
    """The new arrays and the report, from Python."""
    return checkpoint.pack(
        {"vocabulary.weight": draw(7, EMBED), **state}, num_heads, **{"file_layout": "out-in", **options}
    )


def packed_vocabulary(packed):
    return {"vocabulary.weight": packed["vocabulary.weight"]}
