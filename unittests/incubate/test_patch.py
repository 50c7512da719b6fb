"""patch() and unpatch() of paddle.incubate.nn."""

import subprocess
import sys

import paddle
import paddle_fused_attention
import pytest
from built_in import BUILT_IN, BUILT_IN_FUNCTION, EMBED, HEADS, check, composed, draw_arrays
from paddle_fused_attention import incubate, patch, unpatch
from paddle_fused_attention.incubate.functional import fused_multi_head_attention


def places_of_the_built_in():
    return [
        paddle.incubate.nn.FusedMultiHeadAttention,
        paddle.incubate.nn.layer.fused_transformer.FusedMultiHeadAttention,
        paddle.incubate.nn.functional.fused_multi_head_attention,
        sys.modules["paddle.incubate.nn.functional.fused_transformer"].fused_multi_head_attention,
    ]


THEIRS = [BUILT_IN, BUILT_IN, BUILT_IN_FUNCTION, BUILT_IN_FUNCTION]
OURS = [incubate.FusedMultiHeadAttention] * 2 + [fused_multi_head_attention] * 2


def is_same(found, wanted):
    return [a is b for a, b in zip(found, wanted)] == [True] * 4


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


def test_encoder_layer_of_paddle():
    """Its attention, which Paddle constructs, is ours under the patch, and computes; so do layers from before the
    patch.
    """
    before = paddle.incubate.nn.FusedTransformerEncoderLayer(EMBED, HEADS, 20, 0.0)
    x = paddle.to_tensor(draw_arrays("float32")["x"])
    with patch():
        layer = paddle.incubate.nn.FusedTransformerEncoderLayer(EMBED, HEADS, 20, 0.0)
        assert type(layer.fused_attn) is incubate.FusedMultiHeadAttention
        for attention in (layer.fused_attn, before.fused_attn):
            expected, _ = composed(x, **dict(attention.named_parameters()))
            check("out", attention(x).numpy(), expected.numpy(), "float32")
    assert type(before.fused_attn) is BUILT_IN
    assert isinstance(layer.fused_attn, BUILT_IN)


def test_code_that_imports_the_built_in_runs():
    code = """
import paddle, paddle_fused_attention
paddle_fused_attention.patch()
from paddle.incubate.nn import FusedMultiHeadAttention
from paddle.incubate.nn.functional import fused_multi_head_attention
import paddle.incubate.nn.functional as F
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
