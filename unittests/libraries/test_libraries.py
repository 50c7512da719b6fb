"""Models of PaddleNLP and PaddleClas, and ONNX files: the same numbers after convert(), by whatever way the libraries
go.

In an environment of their own: `make test-libraries`. Weights are random and small; nothing is downloaded.
"""

import copy
import importlib
import importlib.util
import os
import sys
import types

import numpy as np
import onnxruntime
import paddle
import paddlenlp.transformers as library
import pytest
import runners
from paddle import nn
from paddle_fused_attention import (
    FusedMultiHeadAttention,
    _op,
    convert,
    pack_optimizer_state,
    revert,
    separate_state_dict,
)
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.transformers.distill_utils import to_distill

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
IDS = np.random.default_rng(0).integers(4, 60, (2, 9))
PADDING = np.array([[1] * 9, [1] * 6 + [0] * 3], "int64")


@pytest.fixture
def calls(monkeypatch):
    found, call = [], _op.fused_attention
    monkeypatch.setattr(_op, "fused_attention", lambda *a, **k: found.append(k) or call(*a, **k))
    return found


@pytest.fixture
def feed_forwards():
    with runners.feed_forward_calls() as found:
        yield found


def make(name, **changes):
    paddle.seed(1)
    config = {**SMALL, **({"embedding_size": 16} if name == "Albert" else {}), **changes}
    model = getattr(library, f"{name}Model")(getattr(library, f"{name}Config")(**config))
    for p in model.parameters():
        p.set_value(p + 0.1 * paddle.randn(p.shape))
    model.eval()
    return model


def tensors(result):
    if isinstance(result, paddle.Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result if isinstance(result, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors(value)]


def assert_same(actual, expected, tolerance=2e-5):
    actual, expected = tensors(actual), tensors(expected)
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected):
        assert a.shape == b.shape
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=tolerance * max(1.0, float(b.abs().max())))


def gradients(model, *inputs, **more):
    model.clear_gradients()
    sum(t.square().sum() for t in tensors(model(*inputs, **more))).backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


ENCODERS = ["Bert", "Ernie", "Roberta", "Electra", "DistilBert", "Skep", "TinyBert", "ErnieM", "LayoutLM"]


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, calls, feed_forwards):
    """Whole layers: their attention and their feed-forward."""
    model = make(name)
    converted, report = convert(copy.deepcopy(model), return_report=True)
    assert list(report.converted.values()) == ["post-layer-norm encoder layer, attention and feed-forward"] * 2
    assert not report.left_alone
    ids = paddle.to_tensor(IDS)
    arguments = {} if name in ("TinyBert", "LayoutLM") else {"attention_mask": paddle.to_tensor(PADDING)}
    expected, reference = model(ids, **arguments), gradients(model, ids, **arguments)
    assert not calls and not feed_forwards
    assert_same(converted(ids, **arguments), expected)
    assert len(calls) == len(feed_forwards) == 2
    found = gradients(converted, ids, **arguments)
    for part, g in reference.items():
        if part in found:
            np.testing.assert_allclose(found[part], g, atol=1e-4 * np.abs(g).max(), err_msg=part)
    assert len(found) == len(reference) - 2 * 4
    assert list(separate_state_dict(converted)) == list(model.state_dict())
    assert_same(revert(converted)(ids, **arguments), expected)


@pytest.mark.parametrize("act", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("name", ["Bert", "Ernie"])
def test_activations_of_configs(name, act, calls, feed_forwards):
    model = make(name, hidden_act=act)
    converted, report = convert(copy.deepcopy(model), return_report=True)
    ids = paddle.to_tensor(IDS)
    assert_same(converted(ids), model(ids))
    assert (len(calls), len(feed_forwards)) == (2, 0 if act == "tanh" else 2)
    reasons = ["feed-forward: its activation is tanh, not relu, gelu or silu"] * 2 if act == "tanh" else []
    assert list(report.left_alone.values()) == reasons


@pytest.mark.parametrize("name", ["Bert", "Ernie", "Roberta"])
def test_attention_weights_and_hidden_states(name):
    model = make(name)
    converted = convert(copy.deepcopy(model))
    ids = paddle.to_tensor(IDS)
    for more in (
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"output_attentions": True, "return_dict": True},
        {},
    ):
        assert_same(converted(ids, **more), model(ids, **more))
    assert not model.encoder.layers[0].self_attn.need_weights
    model(ids, output_attentions=True)  # leaves its mark on the layers
    _, report = convert(copy.deepcopy(model), return_report=True)
    assert len(report.converted) == 2


def test_recompute():
    model = make("Bert")
    converted = convert(copy.deepcopy(model))
    for m in (model, converted):
        m.train()
        for layer in m.sublayers():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
            if isinstance(layer, nn.MultiHeadAttention):
                layer.dropout = 0.0
    ids = paddle.to_tensor(IDS)
    plain = gradients(converted, ids)
    reference = gradients(model, ids)
    converted.encoder.enable_recompute = True
    recomputed = gradients(converted, ids)
    for part, g in plain.items():
        np.testing.assert_array_equal(recomputed[part], g, part)
        if part in reference:
            np.testing.assert_allclose(g, reference[part], atol=1e-4 * np.abs(reference[part]).max(), err_msg=part)


@pytest.mark.parametrize("fused", [False, True])
def test_gpt(fused, calls):
    model = make("GPT", fuse_attention_qkv=fused)
    converted, report = convert(copy.deepcopy(model), return_report=True)
    assert len(report.converted) == 2 and not report.left_alone
    ids = paddle.to_tensor(IDS)
    expected = model(ids)
    calls.clear()
    assert_same(converted(ids), expected)
    assert len(calls) == 2
    mask = paddle.to_tensor(PADDING)
    assert_same(converted(ids, attention_mask=mask), model(ids, attention_mask=mask))
    assert_same(converted(ids, use_cache=True), model(ids, use_cache=True))
    past, past_too = model(ids[:, :5], use_cache=True)[1], converted(ids[:, :5], use_cache=True)[1]
    assert_same(past_too, past)
    assert_same(
        converted(ids[:, 5:6], use_cache=True, past_key_values=past_too),
        model(ids[:, 5:6], use_cache=True, past_key_values=past),
    )
    reference, found = gradients(model, ids), gradients(converted, ids)
    np.testing.assert_allclose(
        found["embeddings.word_embeddings.weight"],
        reference["embeddings.word_embeddings.weight"],
        atol=1e-4 * np.abs(reference["embeddings.word_embeddings.weight"]).max(),
    )
    assert_same(revert(converted)(ids), expected)


LEFT_ALONE = {
    "RoFormer": "a subclass of paddle.nn.TransformerEncoderLayer",
    "ConvBert": "a subclass of paddle.nn.TransformerEncoderLayer",
    "MPNet": "MPNetAttention, for which there is no adapter",
    "Albert": "AlbertAttention, for which there is no adapter",
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_the_operator_does_not_compute_is_named(name):
    model = make(name)
    ids = paddle.to_tensor(IDS)
    expected = model(ids)
    model, report = convert(model, return_report=True)
    assert not report.converted and report.left_alone
    assert all(LEFT_ALONE[name] in reason for reason in report.left_alone.values())
    assert_same(model(ids), expected, 0)


def test_llama_and_t5_are_reported():
    llama = library.LlamaModel(
        library.LlamaConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
        )
    )
    _, report = convert(llama, return_report=True)
    assert "LlamaAttention, for which there is no adapter" in report.left_alone["layers.0.self_attn"]
    assert report.left_alone["layers.0.mlp"] == "its gate_proj and up_proj are separate"
    t5 = library.T5Model(library.T5Config(vocab_size=64, d_model=32, num_layers=1, num_heads=4, d_kv=8, d_ff=48))
    t5.eval()
    ids = paddle.to_tensor(IDS)
    expected = t5(input_ids=ids, decoder_input_ids=ids)
    _, report = convert(t5, return_report=True)
    assert all("T5" in reason and "no adapter" in reason for reason in report.left_alone.values()) and report.left_alone
    assert len(report.converted) == 2 and all(name.endswith("DenseReluDense") for name in report.converted)
    with runners.feed_forward_calls() as calls:
        assert_same(t5(input_ids=ids, decoder_input_ids=ids), expected)
    assert len(calls) == 2


CONFIG = types.SimpleNamespace(
    hidden_size=32,
    intermediate_size=48,
    hidden_act="gelu",
    n_embd=32,
    n_inner=None,
    activation_function="gelu_new",
    resid_pdrop=0.1,
    d_model=32,
    d_ff=48,
    dropout_rate=0.1,
    dropout_prob=0.1,
    activation_dropout=0.2,
    hidden_dropout=0.1,
    tensor_parallel_degree=1,
    fuse_attention_ffn=True,
    sequence_parallel=False,
)
FEED_FORWARDS = {
    "blip.modeling.BlipMLP": (CONFIG,),
    "blip_2.modeling.Blip2MLP": (CONFIG,),
    "clipseg.modeling.CLIPSegMLP": (CONFIG,),
    "codegen.modeling.CodeGenMLP": (CONFIG,),
    "ernie_doc.modeling.PointwiseFFN": (48, 32, 0.1, "gelu"),
    "ernie_gen.modeling.PositionwiseFeedForwardLayer": (
        {"initializer_range": 0.1, "hidden_size": 32, "hidden_act": "relu", "intermediate_dropout_prob": 0.2},
    ),
    "gptj.modeling.GPTJMLP": (48, CONFIG),
    "llama.modeling.LlamaMLP": (CONFIG,),
    "mt5.modeling.MT5DenseReluDense": (CONFIG,),
    "speecht5.modeling.SpeechT5FeedForward": (CONFIG, 48),
    "t5.modeling.T5DenseReluDense": (CONFIG,),
    "xlm.modeling.TransformerFFN": (32, 48, 32, CONFIG),
}


def check_feed_forward(kind, *arguments):
    """The same numbers and gradients by the operator, and the dropouts that the class has."""
    paddle.seed(1)
    layer = kind(*arguments)
    for p in layer.parameters():
        p.set_value(p + 0.1 * paddle.randn(p.shape))
    layer.eval()
    converted, report = convert(nn.Sequential(copy.deepcopy(layer)), return_report=True)
    assert len(report.converted) == 1 and not report.left_alone
    x = paddle.randn([2, 5, 32])
    with runners.feed_forward_calls() as calls:
        assert_same(converted(x), layer(x))
        found, reference = gradients(converted, x), gradients(layer, x)
        converted.train()
        converted(x)
    assert len(calls) == 3
    for name, g in reference.items():
        np.testing.assert_allclose(found[f"0.{name}"], g, atol=1e-4 * np.abs(g).max(), err_msg=name)
    return calls[-1].dropout1_rate, calls[-1].dropout2_rate


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_feed_forwards_of_paddlenlp(name):
    module, _, kind = name.rpartition(".")
    module = importlib.import_module(f"paddlenlp.transformers.{module}")
    rates = {
        "PointwiseFFN": (0.1, 0.0),
        "PositionwiseFeedForwardLayer": (0.2, 0.0),
        "SpeechT5FeedForward": (0.2, 0.1),
        "T5DenseReluDense": (0.1, 0.0),
        "MT5DenseReluDense": (0.1, 0.0),
        "CodeGenMLP": (0.0, 0.1),
        "GPTJMLP": (0.0, 0.1),
        "TransformerFFN": (0.0, 0.1),
    }.get(kind, (0.0, 0.0))
    assert check_feed_forward(getattr(module, kind), *FEED_FORWARDS[name]) == rates


@pytest.mark.parametrize("safe", [False, True])
def test_save_pretrained(safe, tmp_path):
    model = library.BertForSequenceClassification(library.BertConfig(**SMALL, num_labels=3))
    model.eval()
    ids = paddle.to_tensor(IDS)
    expected = model(ids)
    convert(model).save_pretrained(str(tmp_path), safe_serialization=safe)
    assert "bert.encoder.layers.0.self_attn.qkv_weight" in model.state_dict()
    loaded = library.BertForSequenceClassification.from_pretrained(str(tmp_path))
    loaded.eval()
    assert_same(loaded(ids), expected, 0)


def test_low_rank_adaptation():
    """Of what is packed it is refused, by name; of other projections it works; and its layers are left alone."""
    model = library.BertForSequenceClassification(library.BertConfig(**SMALL))
    model.eval()
    ids = paddle.to_tensor(IDS)
    expected = model(ids)
    with pytest.raises(RuntimeError, match=r"weight: expected a projection of its own.*revert\(model\) first"):
        LoRAModel(convert(copy.deepcopy(model)), LoRAConfig(target_modules=[".*q_proj.*"], r=4, lora_alpha=8))
    adapted = LoRAModel(
        convert(copy.deepcopy(model)), LoRAConfig(target_modules=[".*out_proj.*", ".*linear1.*"], r=4, lora_alpha=8)
    )
    adapted.mark_only_lora_as_trainable()
    adapted.eval()
    assert_same(adapted(ids), expected)
    with runners.feed_forward_calls() as feed_forwards:
        found = gradients(adapted, ids)
    assert not feed_forwards and sum("linear1.lora" in name for name in found) == 4
    assert sum("out_proj.lora" in name for name in found) == 4 and all("lora" in name for name in found)
    adapted = LoRAModel(model, LoRAConfig(target_modules=[".*q_proj.*"], r=4, lora_alpha=8))
    with pytest.warns(UserWarning, match="its self_attn.q_proj is a LoRALinear, not a paddle.nn.Linear"):
        convert(adapted)


def test_distillation():
    model = library.BertForSequenceClassification(library.BertConfig(**SMALL))
    model.eval()
    ids, found = paddle.to_tensor(IDS), []
    for m in (copy.deepcopy(model), convert(copy.deepcopy(model))):
        m = to_distill(m, return_qkv=True, return_attentions=True, return_layer_outputs=True, layer_index=1)
        out = m(ids)
        encoder = m.bert.encoder
        found.append((out, encoder.q, encoder.k, encoder.v, encoder.attentions, encoder.hidden_states))
    assert_same(found[1], found[0])


def test_an_optimizer_goes_on():
    """From a checkpoint of a run without conversion."""
    ids = paddle.to_tensor(IDS)

    def step(model, optimizer):
        sum(t.square().mean() for t in tensors(model(ids))).backward()
        optimizer.step()
        optimizer.clear_grad()

    with paddle.utils.unique_name.guard():
        model = make("Bert")
        optimizer = paddle.optimizer.AdamW(1e-3, parameters=model.parameters())
        step(model, optimizer)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        state = {name: v.clone() if isinstance(v, paddle.Tensor) else v for name, v in optimizer.state_dict().items()}
        step(model, optimizer)
    with paddle.utils.unique_name.guard():
        converted = convert(make("Bert"))
        converted.set_state_dict(weights)
        optimizer = paddle.optimizer.AdamW(1e-3, parameters=converted.parameters())
        optimizer.set_state_dict(pack_optimizer_state(converted, state))
        step(converted, optimizer)
    for name, value in separate_state_dict(converted).items():
        if not name.endswith("k_proj.bias"):
            np.testing.assert_allclose(value.numpy(), model.state_dict()[name].numpy(), atol=1e-4, err_msg=name)


def backbone(name):
    """A module of PaddleClas, without what its packages import beside it."""
    if "paddleclas" not in sys.modules:
        (root,) = importlib.util.find_spec("paddleclas").submodule_search_locations
        zoos = [f".ppcls.arch.backbone.{zoo}" for zoo in ("model_zoo", "legendary_models", "base")]
        for part in ("", ".ppcls", ".ppcls.arch", ".ppcls.arch.backbone", ".ppcls.utils", *zoos):
            package = types.ModuleType("paddleclas" + part)
            package.__path__ = [os.path.join(root, *part.split("."))]
            sys.modules["paddleclas" + part] = package
    return importlib.import_module(f"paddleclas.ppcls.arch.backbone.{name}")


@pytest.mark.parametrize("qk_scale", [None, 32**-0.5])
def test_paddleclas_vision_transformer(qk_scale, calls, feed_forwards):
    """Attention and feed-forward of each block."""
    paddle.seed(1)
    model = backbone("model_zoo.vision_transformer").VisionTransformer(
        img_size=32, patch_size=8, class_num=10, embed_dim=32, depth=2, num_heads=4, qkv_bias=True, qk_scale=qk_scale
    )
    for p in model.parameters():
        p.set_value(p + 0.1 * paddle.randn(p.shape))
    model.eval()
    images = paddle.randn([2, 3, 32, 32])
    converted, report = convert(copy.deepcopy(model), return_report=True)
    assert list(report.converted) == [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")]
    assert not report.left_alone
    calls.clear()
    feed_forwards.clear()
    assert_same(converted(images), model(images))
    assert len(calls) == len(feed_forwards) == 2
    reference, found = gradients(model, images), gradients(converted, images)
    for part, g in reference.items():
        if part in found:
            np.testing.assert_allclose(found[part], g, atol=1e-4 * np.abs(g).max(), err_msg=part)
    assert len(found) == len(reference)  # one packed projection for one
    assert list(separate_state_dict(converted)) == list(model.state_dict())
    assert_same(revert(converted)(images), model(images))


MLPS = {
    "legendary_models.swin_transformer": (32, 48, None, nn.GELU, 0.1),
    "model_zoo.cae": (32, 48, None, nn.GELU, 0.1),
    "model_zoo.cswin_transformer": (32, 48, 0.1),
    "model_zoo.cvt": (32, 48, None, nn.GELU, 0.1),
    "model_zoo.mobilevit": (32, 2.0, 0.1),
    "model_zoo.svtrnet": (32, 48, None, nn.GELU, 0.1),
    "model_zoo.swin_transformer_v2": (32, 48, None, nn.GELU, 0.1),
    "model_zoo.tnt": (32, 48, None, nn.GELU, 0.1),
    "model_zoo.vision_transformer": (32, 48, None, nn.GELU, 0.1),
}


@pytest.mark.parametrize("name", MLPS)
def test_feed_forwards_of_paddleclas(name):
    """Those of CAE drop at the end only."""
    rates = (0.0 if name.endswith("cae") else 0.1, 0.1)
    assert check_feed_forward(backbone(name).Mlp, *MLPS[name]) == rates


@pytest.mark.parametrize("kind", ["layer", "model", "model and mask"])
def test_onnx(kind, tmp_path):
    """The export is made of ordinary ops, for any batch and length."""
    paddle.seed(1)
    if kind == "layer":
        model = FusedMultiHeadAttention(16, 4, causal=True)
    else:
        model = convert(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, normalize_before=True), 2))
    model.eval()
    spec = [paddle.static.InputSpec([None, None, 16], "float32", "x")]
    if kind == "model and mask":
        spec.append(paddle.static.InputSpec([None, 1, None, None], "bool", "mask"))
    paddle.onnx.export(model, str(tmp_path / "model"), input_spec=spec, opset_version=17)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for batch, seq_len in ((2, 7), (1, 3)):
        arrays = [paddle.randn([batch, seq_len, 16]), paddle.rand([batch, 1, seq_len, seq_len]) > 0.3][: len(spec)]
        (out,) = session.run(None, {i.name: a.numpy() for i, a in zip(session.get_inputs(), arrays)})
        np.testing.assert_allclose(out, model(*arrays).numpy(), atol=2e-5)
