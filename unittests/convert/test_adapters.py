"""Attention classes that convert() serves by adapters: built in, of users, and what is left alone."""

import copy
import pickle
import re
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
import runners
from encoders import EMBED, HEADS, SEQ, check, encoder, gradients, make_mask, make_x, shake, state_of
from paddle import nn
from paddle_fused_attention import (
    AttentionAdapter,
    VisionTransformerAdapter,
    convert,
    register_adapter,
    revert,
    separate_state_dict,
)
from paddle_fused_attention.conversion import registry
from paddle_fused_attention.conversion.adapters import PaddleNLPGPTAdapter


class ViTAttention(nn.Layer):
    """As vision transformers write it."""

    def __init__(self, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads = HEADS
        self.scale = qk_scale or (EMBED // HEADS) ** -0.5
        self.qkv = nn.Linear(EMBED, 3 * EMBED, bias_attr=None if qkv_bias else False)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(EMBED, EMBED)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape([0, 0, 3, HEADS, EMBED // HEADS]).transpose([2, 0, 3, 1, 4])
        weights = self.attn_drop(F.softmax(paddle.matmul(q, k, transpose_y=True) * self.scale))
        return self.proj_drop(self.proj(paddle.matmul(weights, v).transpose([0, 2, 1, 3]).reshape([0, 0, EMBED])))


class ViTBlock(nn.Layer):
    def __init__(self, **arguments):
        super().__init__()
        self.norm1 = nn.LayerNorm(EMBED)
        self.attn = ViTAttention(**arguments)
        self.norm2 = nn.LayerNorm(EMBED)
        self.mlp = nn.Sequential(nn.Linear(EMBED, 24), nn.GELU(), nn.Linear(24, EMBED))

    def forward(self, x, mask=None):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPTConfig:
    fuse_attention_qkv = False
    use_flash_attention = sequence_parallel = False
    attention_probs_dropout_prob = 0.0
    scale_qk_coeff = 1.0

    def __init__(self, **changes):
        vars(self).update(changes)


class GPTAttention(nn.Layer):
    """As PaddleNLP's GPT writes it: causal without a mask, else as the mask says."""

    def __init__(self, config):
        super().__init__()
        self.config, self.num_attention_heads, self.head_dim = config, HEADS, EMBED // HEADS
        if config.fuse_attention_qkv:
            self.qkv_proj = nn.Linear(EMBED, 3 * EMBED)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(EMBED, EMBED) for _ in range(3))
        self.out_proj = nn.Linear(EMBED, EMBED)

    def forward(
        self, query, key, value, attention_mask=None, use_cache=False, past_key_value=None, output_attentions=False
    ):
        if self.config.fuse_attention_qkv:
            q, k, v = self.qkv_proj(query).reshape([0, 0, HEADS, 3 * self.head_dim]).split(3, axis=-1)
        else:
            key, value = query if key is None else key, query if value is None else value
            q, k, v = (
                layer(x).reshape([0, 0, HEADS, self.head_dim])
                for layer, x in zip((self.q_proj, self.k_proj, self.v_proj), (query, key, value))
            )
        if past_key_value is not None:
            k, v = (paddle.concat([past, new], 1) for past, new in zip(past_key_value, (k, v)))
        cache = (k, v)
        q, k, v = (x.transpose([0, 2, 1, 3]) for x in (q, k, v))
        scores = paddle.matmul(q * (self.config.scale_qk_coeff * self.head_dim) ** -0.5, k, transpose_y=True)
        scores = scores * self.config.scale_qk_coeff
        if attention_mask is None:
            attention_mask = paddle.triu(paddle.full([scores.shape[2], scores.shape[3]], -np.inf), 1)
        weights = F.softmax(scores + attention_mask.astype(scores.dtype))
        out = self.out_proj(paddle.matmul(weights, v).transpose([0, 2, 1, 3]).reshape([0, 0, EMBED]))
        more = ([weights] if output_attentions else []) + ([cache] if use_cache else [])
        return (out, *more) if more else out


class GPTLayer(nn.Layer):
    def __init__(self, **config):
        super().__init__()
        self.norm1, self.self_attn = nn.LayerNorm(EMBED), GPTAttention(GPTConfig(**config))

    def forward(self, x, mask=None):
        return x + self.self_attn(self.norm1(x), None, None, mask)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))
    register_adapter(ViTAttention, VisionTransformerAdapter())
    register_adapter(f"{__name__}.GPTAttention", PaddleNLPGPTAdapter())


MODELS = {
    "ViT": lambda: ViTBlock(),
    "ViT without bias": lambda: ViTBlock(qkv_bias=False),
    "ViT of another scale": lambda: ViTBlock(qk_scale=EMBED**-0.5),
    "GPT": lambda: GPTLayer(),
    "GPT fused": lambda: GPTLayer(fuse_attention_qkv=True),
    "GPT of another scale": lambda: GPTLayer(scale_qk_coeff=3.0),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_the_way_back(name, masked):
    plain = shake(nn.Sequential(MODELS[name]()))
    plain, model = plain[0], nn.Sequential(copy.deepcopy(plain[0]))
    mask = make_mask("float", "float32") if masked and "GPT" in name else None
    x, before = make_x(), state_of(model)
    expected = gradients(plain, x, mask)
    model, report = convert(model, return_report=True)
    assert len(report.converted) == 1 and not report.left_alone
    with runners.operator_calls() as calls:
        out, found = model[0](x, mask), gradients(model[0], x, mask)
    assert len(calls) == 2
    check("out", out.numpy(), plain(x, mask).numpy(), "float32")
    check("d_x", found[0], expected[0], "float32")
    for name, g in expected[1].items():
        if name in found[1]:
            check(name, found[1][name], g, "float32")
    # Of the packed parameters by those of the ones they were made of.
    for p in model.parameters():
        p.set_value(p.grad if p.grad is not None else p)
    separate = {name.partition(".")[2]: value.numpy() for name, value in separate_state_dict(model).items()}
    for name, g in expected[1].items():
        if name not in ("self_attn.k_proj.bias", "self_attn.qkv_proj.bias", "attn.qkv.bias"):
            check(name, separate[name], g, "float32")
    model.set_state_dict(before)
    assert list(state_of(revert(model))) == list(before)
    for name, value in state_of(model).items():
        np.testing.assert_array_equal(value, before[name], name)
    check("out again", model[0](x, mask).numpy(), plain(x, mask).numpy(), "float32")


def test_calls_that_the_operator_does_not_serve():
    """A cache, attention weights, other keys: the class's own forward, with the packed parameters."""
    plain = shake(GPTLayer())
    model = convert(copy.deepcopy(plain))
    plain, converted = plain.self_attn, model.self_attn
    x, y = make_x(), make_x(seed=6)
    assert isinstance(converted, GPTAttention)
    for arguments in ((None, None, None, True), (None, None, None, False, None, True), (y, y)):
        for found, expected in zip(converted(x, *(arguments or ())), plain(x, *(arguments or ()))):
            for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, expected))):
                check("result", a.numpy(), b.numpy(), "float32")
    _, cache = converted(x[:, :3], None, None, None, True)
    rows = paddle.triu(paddle.full([SEQ, SEQ], -np.inf), 1)[3:]
    check(
        "step",
        converted(x[:, 3:], None, None, rows, False, cache).numpy(),
        plain(x, None, None)[:, 3:].numpy(),
        "float32",
    )


def test_dropout_of_adapters():
    model = convert(nn.Sequential(ViTBlock(attn_drop=0.3, proj_drop=0.2)))
    x = make_x()
    with runners.operator_calls() as calls:
        model(x)
        model.eval()
        model(x)
        model[0].attn.attn_drop.train()
        model(x)
    assert [(block.dropout_rate, block.attn_dropout_rate) for block in calls] == [(0.2, 0.3), (0.0, 0.0), (0.0, 0.3)]


def test_copies_and_pickles():
    model = convert(shake(nn.Sequential(ViTBlock())))
    x = make_x()
    expected = model(x).numpy()
    clones = [copy.deepcopy(model)]
    if (int(paddle.version.major), int(paddle.version.minor)) >= (3, 3):  # no earlier one pickles parameters
        clones.append(pickle.loads(pickle.dumps(model)))
    for clone in clones:
        np.testing.assert_array_equal(clone(x).numpy(), expected)
        assert type(clone[0].attn) is type(model[0].attn)
        clone[0].attn.qkv_weight.set_value(clone[0].attn.qkv_weight * 2)
        clone[0].attn.qkv.register_forward_post_hook(lambda *_: None)  # by the class's own forward
        assert np.abs(clone(x).numpy() - expected).max() > 1e-3
    np.testing.assert_array_equal(model(x).numpy(), expected)


def test_static_graphs():
    model = convert(shake(nn.Sequential(ViTBlock(qk_scale=0.1), GPTLayer())))
    model.eval()
    x = make_x()
    expected = model(x).numpy()
    for full_graph in (True, False):
        static = paddle.jit.to_static(copy.deepcopy(model), full_graph=full_graph)
        check("out", static(x).numpy(), expected, "float32")


class Derived(ViTAttention):
    pass


class WithTable(ViTAttention):
    def __init__(self):
        super().__init__()
        self.table = self.create_parameter([4])


class Normalised(ViTAttention):
    def forward(self, x):
        return super().forward(x) * 1.01


class Failing(ViTAttention):
    def forward(self, x):
        raise KeyError("not today")


def drop_down(layer):
    layer.attn_drop = nn.Dropout(0.1, mode="downscale_in_infer")


def hook(layer):
    layer.qkv.register_forward_post_hook(print)


LEFT_ALONE = {
    "derived": (Derived, None, "a test_adapters.Derived, for which there is no adapter"),
    "more": (WithTable, None, "it has table, which its adapter does not name"),
    "other": (Normalised, None, "its forward gives other numbers than the operator: they differ by"),
    "failing": (Failing, None, "its forward could not be tried: 'not today'"),
    "dropout": (ViTAttention, drop_down, "its attn_drop is a Dropout, not a paddle.nn.Dropout of mode"),
    "hook": (ViTAttention, hook, "its qkv has hooks or a forward of its own"),
    "forward": (
        ViTAttention,
        lambda layer: setattr(layer, "forward", layer.forward),
        "it has hooks or a forward of its own",
    ),
    "linear": (
        ViTAttention,
        lambda layer: setattr(layer, "proj", nn.Identity()),
        "its proj is a Identity, not a paddle.nn.Linear",
    ),
    "width": (
        ViTAttention,
        lambda layer: setattr(layer, "proj", nn.Linear(EMBED, 8)),
        "its output projection has a weight of shape",
    ),
    "heads": (ViTAttention, lambda layer: setattr(layer, "num_heads", 3), "its width 16 is no multiple of its 3 heads"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case):
    kind, change, reason = LEFT_ALONE[case]
    if kind not in (ViTAttention, Derived):
        register_adapter(kind, VisionTransformerAdapter())
    layer = kind()
    if change is not None:
        change(layer)
    names = list(layer.state_dict())
    model, report = convert(nn.Sequential(("block", nn.Sequential(("attn", layer)))), return_report=True)
    assert not report.converted and list(report.left_alone) == ["block.attn"]
    assert report.left_alone["block.attn"].startswith(reason)
    assert model.block.attn is layer and type(layer) is kind and list(layer.state_dict()) == names


class T5Attention(nn.Layer):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(EMBED, EMBED)


class Unnamed(nn.Layer):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(EMBED, EMBED)
        self.key = nn.Linear(EMBED, EMBED)


def test_attention_of_unknown_classes_is_reported():
    model = nn.Sequential(
        ("t5", nn.Sequential(("attention", T5Attention()))), ("other", Unnamed()), ("mlp", nn.Linear(2, 2))
    )
    _, report = convert(model, return_report=True)
    assert report.left_alone == {
        "t5.attention": f"a {__name__}.T5Attention, for which there is no adapter",
        "other": f"a {__name__}.Unnamed, for which there is no adapter",
    }
    fused = nn.Sequential(paddle.incubate.nn.FusedMultiHeadAttention(EMBED, HEADS))
    _, report = convert(fused, return_report=True)
    assert report.left_alone["0"].endswith("which paddle_fused_attention.patch() serves")
    with pytest.warns(UserWarning, match="convert: other: left alone, a .*Unnamed, for which there is no adapter"):
        convert(nn.Sequential(("other", Unnamed())))


class AttentionModel(nn.Layer):
    def __init__(self):
        super().__init__()
        self.encoder, self.vision, self.query, self.key = encoder(), ViTBlock(), nn.Linear(2, 2), nn.Linear(2, 2)


def test_a_model_with_the_name_of_an_attention():
    """What it holds is converted all the same."""
    _, report = convert(AttentionModel(), return_report=True)
    assert list(report.converted) == ["encoder.layers.0", "encoder.layers.1", "vision.attn"] and not report.left_alone


@pytest.mark.parametrize("kind", ["Linear", "Dropout"])
def test_classes_whose_forward_was_replaced(kind, monkeypatch):
    whole = getattr(nn, kind).forward
    monkeypatch.setattr(getattr(nn, kind), "forward", lambda self, x: whole(self, x))
    _, report = convert(ViTBlock(), return_report=True)
    assert report.left_alone == {"attn": f"paddle.nn.{kind}.forward was replaced by one of {__name__}"}


def test_quantization_that_misses_the_packed_projection():
    quantization = pytest.importorskip("paddle.quantization")
    from paddle.quantization.quanters import FakeQuanterWithAbsMaxObserver

    quanter = FakeQuanterWithAbsMaxObserver(moving_rate=0.9)
    config = quantization.QuantConfig(activation=None, weight=None)
    config.add_type_config(nn.Linear, activation=quanter, weight=quanter)
    quantized = quantization.QAT(config).quantize(convert(nn.Sequential(ViTBlock())))
    with pytest.raises(
        RuntimeError, match=r"proj: expected all projections of an attention quantized or none.*revert\(model\)"
    ):
        quantized(make_x())


class OwnAdapter(AttentionAdapter):
    projections = ("to_q", "to_k", "to_v")
    output = "to_out"

    def num_heads(self, attention):
        return 2

    def inputs(self, attention, x, mask=None):
        return x, mask, False

    def result(self, attention, out):
        return (out,)


class OwnAttention(nn.Layer):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(EMBED, EMBED, bias_attr=False) for _ in range(4))

    def forward(self, x, mask=None):
        q, k, v = (f(x).reshape([0, 0, 2, -1]).transpose([0, 2, 1, 3]) for f in (self.to_q, self.to_k, self.to_v))
        weights = F.softmax(paddle.matmul(q, k, transpose_y=True) * q.shape[-1] ** -0.5)
        return (self.to_out(paddle.matmul(weights, v).transpose([0, 2, 1, 3]).reshape([0, 0, EMBED])),)


def test_an_adapter_of_a_user():
    register_adapter(OwnAttention, OwnAdapter())
    layer = OwnAttention()
    (expected,) = layer(make_x())
    convert(nn.Sequential(layer))
    with runners.operator_calls() as calls:
        (out,) = layer(make_x())
    check("out", out.numpy(), expected.numpy(), "float32")
    assert len(calls) == 1


def test_errors():
    adapter = VisionTransformerAdapter()
    with pytest.raises(TypeError, match="layer_class: expected a subclass of paddle.nn.Layer or its full name, got 3"):
        register_adapter(3, adapter)
    with pytest.raises(
        ValueError, match="layer_class: expected a class or its full name, as 'package.module.Class', got 'Name'"
    ):
        register_adapter("Name", adapter)
    with pytest.raises(TypeError, match="adapter: expected an AttentionAdapter or a FeedForwardAdapter, got type"):
        register_adapter(ViTAttention, VisionTransformerAdapter)
    for name in (nn.MultiHeadAttention, "paddle.nn.layer.transformer.MultiHeadAttention"):
        with pytest.raises(ValueError, match="layer_class: .* got paddle.nn.MultiHeadAttention"):
            register_adapter(name, adapter)


def test_the_random_state_stays():
    model = shake(nn.Sequential(ViTBlock()))
    paddle.seed(4)
    expected = paddle.randn([3]).numpy()
    paddle.seed(4)
    convert(model)
    np.testing.assert_array_equal(paddle.randn([3]).numpy(), expected)


def test_readme():
    """Its section on whole models, as it stands there."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall("```python\n(.*?)```", readme.split("## Whole models")[1].split("\n## ")[0], re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        variables = {"__name__": "readme"}
        exec(block, variables)
    assert "qkv_weight" in variables["model"][0].state_dict()
