"""A process whose address space has an end (RLIMIT_AS): a call that does not fit raises MemoryError, and the next one
that does is right."""

import sys

import pytest
from processes import run_python

CALLS = """
import resource
import numpy as np
import paddle
from paddle_fused_attention import fused_feedforward, fused_multi_head_attention
from paddle_fused_attention.functional import scaled_dot_product_attention

MEBIBYTE = 1 << 20
ROOMS = (0, 8, 30, 60, 120, 250)


def tensor(*shape):
    result = paddle.to_tensor(np.random.default_rng(1).standard_normal(shape).astype("float32"))
    result.stop_gradient = False
    return result


qkv_weight, weight, up, down = tensor(3, 4, 32, 128), tensor(128, 128), tensor(128, 512), tensor(512, 128)


def block(x):
    return fused_multi_head_attention(x, qkv_weight, weight, dropout_rate=0.1, attn_dropout_rate=0.1, seed=1)


def feed_forward(x):
    return fused_feedforward(x, up, down, activation="gelu", dropout1_rate=0.1, dropout2_rate=0.1, seed=1)


def attention(x):
    heads = x.reshape([x.shape[0], x.shape[1], 4, 32])
    return scaled_dot_product_attention(heads, heads, heads, dropout_p=0.1, seed=1)


def gradients(call, x):
    out = call(x)
    return [out, *paddle.grad([out], [x], [out])]


def limit(room=None):
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (hard if room is None else taken + room * MEBIBYTE, hard))


small, large = tensor(1, 8, 128), tensor(32, 512, 128)
counts = {"fits": 0, "does not": 0}
for call in (block, feed_forward, attention):
    expected = [result.numpy().tobytes() for result in gradients(call, small)]
    gradients(call, tensor(8, 512, 128))  # what Paddle loads when it is first used
    for room in ROOMS:
        limit(room)
        try:
            results = gradients(call, large)
            counts["fits"] += 1
            del results
        except MemoryError:
            counts["does not"] += 1
        finally:
            limit()
        assert [result.numpy().tobytes() for result in gradients(call, small)] == expected, (call.__name__, room)
print(*counts.values())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what a process has taken is read from /proc")
def test_calls_that_do_not_fit():
    end = run_python(CALLS)
    assert end.returncode == 0, end.stderr[-2000:]
    fits, does_not = map(int, end.stdout.split()[-2:])
    assert fits and does_not >= 6
