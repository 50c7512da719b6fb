"""patch() and unpatch() of paddle.incubate.nn."""

import subprocess
import sys

import paddle
import paddle.incubate.nn
import paddle.nn.functional as F
import paddle_fused_attention
import pytest
from built_in import BUILT_IN, EMBED, HEADS, check, composed, draw_arrays
from paddle_fused_attention import incubate, patch, unpatch
from paddle_fused_attention.incubate.functional import fused_multi_head_attention

LAYERS = [name for name in incubate.__all__ if name != "functional"]
FUNCTIONS = incubate.functional.__all__


def places_of_the_built_in():
    """Of each layer and function the public place, and the module of Paddle that defines it."""
    layers = [getattr(paddle.incubate.nn, name) for name in LAYERS]
    functions = [getattr(paddle.incubate.nn.functional, name) for name in FUNCTIONS]
    return [
        *layers,
        *(getattr(sys.modules[module], name) for module, name in zip(MODULES[: len(LAYERS)], LAYERS)),
        *functions,
        *(getattr(sys.modules[module], name) for module, name in zip(MODULES[len(LAYERS) :], FUNCTIONS)),
    ]


MODULES = [getattr(paddle.incubate.nn, name).__module__ for name in LAYERS]
MODULES += [getattr(paddle.incubate.nn.functional, name).__module__ for name in FUNCTIONS]
THEIRS = places_of_the_built_in()
OURS = [getattr(incubate, name) for name in LAYERS] * 2 + [getattr(incubate.functional, name) for name in FUNCTIONS] * 2


def is_same(found, wanted):
    return all(a is b for a, b in zip(found, wanted)) and len(found) == len(wanted)


def test_patch_and_unpatch():
    assert is_same(places_of_the_built_in(), THEIRS)
    patch()
    try:
        assert is_same(places_of_the_built_in(), OURS)
    finally:
        unpatch()
    assert is_same(places_of_the_built_in(), THEIRS)
    with pytest.raises(RuntimeError, match="unpatch: expected a patch"):
        unpatch()
    assert is_same(places_of_the_built_in(), THEIRS)


def test_patches_nest():
    with patch():
        with patch():
            assert is_same(places_of_the_built_in(), OURS)
        assert is_same(places_of_the_built_in(), OURS)
        patch()
        unpatch()
        assert is_same(places_of_the_built_in(), OURS)
    assert is_same(places_of_the_built_in(), THEIRS)
    with pytest.raises(ZeroDivisionError), patch():
        raise ZeroDivisionError
    assert is_same(places_of_the_built_in(), THEIRS)
    context = patch()
    with context:
        pass
    with pytest.raises(RuntimeError, match="patch: expected a new patch"), context:
        pass
    assert is_same(places_of_the_built_in(), THEIRS)


def test_layers_from_before_the_patch():
    """Paddle's own layers compute by our functions under the patch, on the CPU too."""
    before = paddle.incubate.nn.FusedTransformerEncoderLayer(EMBED, HEADS, 20, 0.0)
    linear = paddle.incubate.nn.FusedLinear(EMBED, 5)
    tail = paddle.incubate.nn.FusedBiasDropoutResidualLayerNorm(EMBED, 0.0)
    x = paddle.to_tensor(draw_arrays("float32")["x"])
    with patch():
        found = before(x), linear(x), tail(x, x)
        assert type(paddle.incubate.nn.FusedTransformerEncoderLayer(EMBED, HEADS, 20)) is OURS_ENCODER
    attended, _ = composed(x, **dict(before.fused_attn.named_parameters()))
    ffn = before.ffn
    u = F.relu(F.linear(attended, ffn._linear1_weight, ffn._linear1_bias))
    z = attended + F.linear(u, ffn._linear2_weight, ffn._linear2_bias)
    expected = (
        F.layer_norm(z, [EMBED], ffn._ln2_scale, ffn._ln2_bias),
        F.linear(x, linear.weight, linear.bias),
        F.layer_norm(x + x + tail.linear_bias, [EMBED], tail.ln_scale, tail.ln_bias),
    )
    for actual, wanted in zip(found, expected):
        check("out", actual.numpy(), wanted.numpy(), "float32")
    assert type(before.fused_attn) is BUILT_IN
    assert isinstance(OURS_ENCODER(EMBED, HEADS, 20).fused_attn, BUILT_IN)


OURS_ENCODER = incubate.FusedTransformerEncoderLayer


def test_code_that_imports_the_built_in_runs():
    code = """
import paddle, paddle_fused_attention
paddle_fused_attention.patch()
from paddle.incubate.nn import FusedMultiHeadAttention
from paddle.incubate.nn.functional import fused_multi_head_attention
import paddle.incubate.nn.functional as F
from paddle.incubate.nn import FusedTransformerEncoderLayer
encoder = paddle.nn.TransformerEncoder(FusedTransformerEncoderLayer(8, 2, 12, activation="gelu"), 2)
mask = paddle.to_tensor([[True, True, False]])
encoder(paddle.ones([1, 3, 8]), mask).sum().backward()
assert all(p.grad is not None for p in encoder.parameters())
layer = FusedMultiHeadAttention(8, 2)
out = layer(paddle.ones([1, 3, 8]))
out.sum().backward()
assert out.shape == [1, 3, 8] and layer.qkv_weight.grad is not None
assert F.fused_multi_head_attention is fused_multi_head_attention
paddle_fused_attention.unpatch()
assert paddle.incubate.nn.FusedMultiHeadAttention is not FusedMultiHeadAttention
print("ran")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("ran"), done.stderr


def test_public_names():
    assert set(paddle_fused_attention.__all__) <= set(dir(paddle_fused_attention))
    assert paddle_fused_attention.incubate.functional.fused_multi_head_attention is fused_multi_head_attention
