"""Makes every allocation of some calls fail in turn: those of tensors and workspaces, and those of the operator's own
C++. Run with failing_allocations.cc as a library before all others.

A call must then raise a MemoryError, or give the right bits nevertheless; so must the next one, and nothing may be
kept.

    python allocation_judge.py NAME DTYPE     # prints how many allocations failed, and how many calls with them
"""

import ctypes
import gc
import itertools
import os
import sys

import paddle
from paddle_fused_attention import FusedMultiHeadAttention, _op, attention_functional, incubate
from paddle_fused_attention.functional import fused_bias_dropout_residual_layer_norm, fused_linear_activation

# In backward Paddle 2.6 makes errors of operators OSError.
MEMORY_ERRORS = (MemoryError, OSError) if paddle.__version__.startswith("2.") else MemoryError
BATCH, TOKENS, HEADS, EMBED = 2, 9, 4, 64


def tensor(*shape, dtype, wants_gradient=False):
    made = paddle.randn(shape).astype(dtype)
    made.stop_gradient = not wants_gradient
    return made


def outputs_and_gradients(call, inputs):
    """The bits of a call's result, and of the gradients of the inputs that have one."""
    paddle.seed(3)
    out = call(*inputs)
    if not out.stop_gradient:
        out.sum().backward()
    found = [out.numpy().tobytes()] + [t.grad.numpy().tobytes() for t in inputs if t.grad is not None]
    for t in inputs:
        t.clear_gradient(False)
    return found


def block(dtype, training=True):
    layer = FusedMultiHeadAttention(EMBED, HEADS, 0.1, 0.1, normalize_before=True)
    layer.to(dtype=dtype)
    layer.train() if training else layer.eval()
    inputs = [tensor(BATCH, TOKENS, EMBED, dtype=dtype, wants_gradient=training), *layer.parameters()]
    mask = tensor(BATCH, 1, TOKENS, TOKENS, dtype=dtype)
    return lambda x, *_: layer(x, attn_mask=mask), inputs


def block_without_gradient(dtype):
    call, inputs = block(dtype, training=False)

    def without_gradient(*arguments):
        with paddle.no_grad():
            return call(*arguments)

    return without_gradient, inputs


def block_with_a_cache(dtype):
    layer = FusedMultiHeadAttention(EMBED, HEADS, 0.0, 0.0)
    layer.to(dtype=dtype)
    layer.eval()
    cached = [tensor(BATCH, HEADS, 5, EMBED // HEADS, dtype=dtype) for _ in range(2)]
    cache = paddle.nn.MultiHeadAttention.Cache(*cached)

    def call(x):
        with paddle.no_grad():
            out, longer = layer(x, cache=cache)
            return paddle.concat([out.flatten(), longer.k.flatten(), longer.v.flatten()])

    return call, [tensor(BATCH, TOKENS, EMBED, dtype=dtype)]


def attention(dtype):
    inputs = [tensor(BATCH, TOKENS, HEADS, 16, dtype=dtype, wants_gradient=True) for _ in range(3)]
    return lambda q, k, v: attention_functional.scaled_dot_product_attention(
        q, k, v, dropout_p=0.1, is_causal=True
    ), inputs


def feed_forward(dtype):
    layer = incubate.FusedFeedForward(EMBED, 96, 0.1, activation="gelu")
    layer.to(dtype=dtype)
    return lambda x, *_: layer(x), [tensor(BATCH, TOKENS, EMBED, dtype=dtype, wants_gradient=True), *layer.parameters()]


def linear(dtype):
    shapes = ((BATCH, TOKENS, EMBED), (EMBED, 96), (96,))
    return fused_linear_activation, [tensor(*shape, dtype=dtype, wants_gradient=True) for shape in shapes]


def residual_norm(dtype):
    shapes = ((BATCH, TOKENS, EMBED), (BATCH, TOKENS, EMBED), (EMBED,), (EMBED,), (EMBED,))
    return lambda *inputs: fused_bias_dropout_residual_layer_norm(*inputs, dropout_rate=0.1), [
        tensor(*shape, dtype=dtype, wants_gradient=True) for shape in shapes
    ]


CALLS = (block, block_without_gradient, block_with_a_cache, attention, feed_forward, linear, residual_norm)


def code_of_library():
    """Where the operator's code lies in memory."""
    library = os.path.realpath(_op.library._name)
    with open("/proc/self/maps") as lines:
        found = [line.split()[0].split("-") for line in lines if line.rstrip().endswith(library)]
    return min(int(begin, 16) for begin, _ in found), max(int(end, 16) for _, end in found)


def allocated():
    gc.collect()
    return paddle.base.core.host_memory_stat_current_value("Allocated", 0)


def main(name, dtype):
    paddle.set_flags({"FLAGS_use_system_allocator": True})  # for each tensor
    hooks = ctypes.CDLL(None)
    hooks.fail_allocation.argtypes = (ctypes.c_int64, ctypes.c_size_t, ctypes.c_size_t)
    hooks.count_allocations.restype = ctypes.c_int64
    code = code_of_library()
    paddle.seed(1)
    call, inputs = next(made for made in CALLS if made.__name__ == name)(dtype)
    expected = outputs_and_gradients(call, inputs)
    _op._absent_eager()  # which is kept
    before = allocated()
    raised = 0
    for number in itertools.count():
        found = None
        hooks.fail_allocation(number, *code)
        try:
            found = outputs_and_gradients(call, inputs)
        except MEMORY_ERRORS as error:
            assert isinstance(error, MemoryError) or "ResourceExhausted" in str(error), error
            raised += 1
            print(f"allocation {number}: {str(error).splitlines()[0]}", file=sys.stderr)
        count = hooks.count_allocations()
        assert found in (None, expected), f"allocation {number}: a wrong result"
        if count <= number:
            break
        for t in inputs:
            t.clear_gradient(False)
        assert outputs_and_gradients(call, inputs) == expected, f"after allocation {number}: a wrong result"
        assert allocated() == before, f"after allocation {number}: {allocated() - before} bytes more"
    print(number, raised)


if __name__ == "__main__":
    main(*sys.argv[1:])
