"""patch(attention=True): Paddle's functions of attention are ours wherever Paddle has them."""

import subprocess
import sys

import numpy as np
import paddle
import paddle.incubate.nn.memory_efficient_attention
import paddle.nn.functional as F
import paddle.nn.functional.flash_attention
import pytest
from paddle_fused_attention import functional, patch, unpatch

NAMES = [name for name in functional.__all__ if not name.startswith("fused")]
MODULES = [
    sys.modules[f"paddle.{name}"]
    for name in ("nn.functional", "nn.functional.flash_attention", "incubate.nn.memory_efficient_attention")
]


def found():
    """The functions in Paddle's modules, by module and name."""
    places = {(m.__name__, name): getattr(m, name, None) for m in MODULES for name in NAMES}
    return {place: value for place, value in places.items() if callable(value)}


THEIRS = found()


def is_ours():
    return all(value is getattr(functional, name) for (_, name), value in found().items())


def is_theirs():
    return all(value is THEIRS[place] for place, value in found().items()) and len(found()) == len(THEIRS)


def test_what_paddle_has():
    names = {name for _, name in THEIRS}
    assert {
        "scaled_dot_product_attention",
        "flash_attention",
        "flash_attn_unpadded",
        "memory_efficient_attention",
    } <= names
    if paddle.__version__.startswith("3.3"):
        assert names == set(NAMES)


def test_patch_and_undo():
    with patch():
        assert is_theirs()
    with patch(attention=True):
        assert is_ours() and found().keys() == THEIRS.keys()
        module = sys.modules["paddle.nn.functional.flash_attention"]
        assert F.flash_attention is module  # the module of the name stays
    assert is_theirs()


def test_patches_of_both_kinds_nest():
    patch()
    with patch(attention=True):
        with patch():
            assert is_ours()
        with patch(attention=True):
            assert is_ours()
        assert is_ours()
    assert is_theirs()
    assert paddle.incubate.nn.FusedLinear.__module__.startswith("paddle_fused_attention")
    unpatch()
    assert not paddle.incubate.nn.FusedLinear.__module__.startswith("paddle_fused_attention")
    with pytest.raises(RuntimeError, match="unpatch: expected a patch"):
        unpatch()


@pytest.mark.parametrize("value", ["yes", None, 2])
def test_what_attention_may_be(value):
    with pytest.raises(TypeError, match="attention: expected a bool"):
        patch(attention=value)
    assert is_theirs()


def test_paddle_computes_by_our_functions():
    """float32 flash attention on the CPU, of which Paddle has none, with the arguments that Paddle's own takes."""
    rng = np.random.default_rng(0)
    query, key, value = (paddle.to_tensor(rng.standard_normal((2, 5, 2, 8)).astype("float32")) for _ in range(3))
    starts = paddle.to_tensor(np.array([0, 5, 10], "int32"))
    packed = [tensor.reshape([10, 2, 8]) for tensor in (query, key, value)]
    module = sys.modules["paddle.nn.functional.flash_attention"]
    with patch(attention=True):
        out = F.scaled_dot_product_attention(query, key, value, None, 0.0, True)
        flash, softmax = module.flash_attention(query, key, value, causal=True)
        unpadded, _ = module.flash_attn_unpadded(*packed, starts, starts, 5, 5, 8**-0.5, causal=True)
    assert softmax is None
    np.testing.assert_allclose(flash.numpy(), out.numpy(), atol=1e-6)
    np.testing.assert_allclose(unpadded.numpy().reshape(2, 5, 2, 8), out.numpy(), atol=1e-6)


def test_code_that_imports_paddle_s_functions():
    code = """
import paddle, paddle_fused_attention
paddle_fused_attention.patch(attention=True)
from paddle.nn.functional import scaled_dot_product_attention
from paddle.nn.functional.flash_attention import flash_attention
from paddle.incubate.nn.memory_efficient_attention import memory_efficient_attention
q = paddle.ones([1, 3, 2, 4])
q.stop_gradient = False
functions = scaled_dot_product_attention, flash_attention, memory_efficient_attention
assert all(function.__module__.startswith("paddle_fused_attention") for function in functions)
outs = [function(q, q, q) for function in functions]
for out in (outs[0], outs[1][0], outs[2]):
    out.sum().backward()
assert q.grad.shape == q.shape
print("ran")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("ran"), done.stderr
