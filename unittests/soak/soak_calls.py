"""Calls that are made over and over, on Paddle's current device: what each gives, and what memory the process keeps.

Tensors come from NumPy, and only the package's operators compute with them, for a GPU on which Paddle's own do nothing
(`runners.paddle_computes_on`).
"""

import ctypes
import gc
import resource
import time
import zlib
from typing import NamedTuple

import common
import numpy as np
import paddle
import runners
from paddle_fused_attention import FusedMultiHeadAttention, fused_feedforward, fused_multi_head_attention
from paddle_fused_attention.functional import flash_attn_unpadded, scaled_dot_product_attention
from paddle_fused_attention.incubate.functional import fused_linear_activation

SAMPLES = 40  # of memory, in a long run
MEBIBYTE = 1 << 20


class Sizes(NamedTuple):
    batch: int
    seq_len: int
    num_heads: int
    head_dim: int

    @property
    def embed_dim(self):
        return self.num_heads * self.head_dim


SMALL = [Sizes(1, 4, 2, 8), Sizes(2, 7, 1, 24)]


def mixed_sizes(count, seed):
    """From one token to some thousand."""
    rng = np.random.default_rng(seed)
    draw = lambda: [int(2 ** rng.uniform(0, most)) for most in (3, 9, 3, 6)]  # noqa: E731
    return [Sizes(*draw()) for _ in range(count)]


def _inputs(shapes, dtype):
    rng = np.random.default_rng(len(shapes))
    draw = lambda shape: common.to_storage(rng.standard_normal(shape), dtype)  # noqa: E731
    return [paddle.to_tensor(draw(shape), stop_gradient=False) for shape in shapes]


def _with_gradients(call, inputs):
    def run():
        out = call(*inputs)
        return [out, *paddle.grad([out], inputs, [out])]

    return run


def _block(sizes, dtype):
    e = sizes.embed_dim
    shapes = [(sizes.batch, sizes.seq_len, e), (3, sizes.num_heads, sizes.head_dim, e), (e, e)]

    def call(x, qkv_weight, linear_weight):
        return fused_multi_head_attention(
            x, qkv_weight, linear_weight, causal=True, dropout_rate=0.1, attn_dropout_rate=0.1, seed=5
        )

    return _with_gradients(call, _inputs(shapes, dtype))


def _feed_forward(sizes, dtype):
    e = sizes.embed_dim
    shapes = [(sizes.batch, sizes.seq_len, e), (e, 2 * e), (2 * e, e)]

    def call(*inputs):
        return fused_feedforward(*inputs, activation="gelu", dropout1_rate=0.1, dropout2_rate=0.1, seed=6)

    return _with_gradients(call, _inputs(shapes, dtype))


def _attention(sizes, dtype):
    b, s, h, d = sizes
    mask = (1, h, s, s)

    def call(*inputs):
        return scaled_dot_product_attention(*inputs, dropout_p=0.1, seed=7)

    return _with_gradients(call, _inputs([(b, s, h, d), (b, s, 1, d), (b, s, 1, d), mask], dtype))


def _packed(sizes, dtype):
    b, s, h, d = sizes
    starts = paddle.to_tensor(np.arange(0, (b + 1) * s, s, dtype="int32"))

    def call(*inputs):
        return flash_attn_unpadded(*inputs, starts, starts, s, s, d**-0.5, causal=True)[0]

    return _with_gradients(call, _inputs([(b * s, h, d)] * 3, dtype))


def _linear(sizes, dtype):
    e = sizes.embed_dim
    inputs = _inputs([(sizes.batch, sizes.seq_len, e), (e, e), (e,)], dtype)
    return _with_gradients(lambda *given: fused_linear_activation(*given, activation="relu"), inputs)


def _decoding(sizes, dtype):
    """Without gradients: a token after those that a cache holds."""
    paddle.seed(1)
    layer = FusedMultiHeadAttention(sizes.embed_dim, sizes.num_heads)
    layer.eval()
    (x,) = _inputs([(sizes.batch, 1, sizes.embed_dim)], "float32")
    (past,) = _inputs([(sizes.batch, sizes.num_heads, sizes.seq_len, sizes.head_dim)], "float32")

    def run():
        with paddle.no_grad():
            out, cache = layer(x, cache=layer.Cache(past, past))
        return [out, cache.k]

    return run


def make_calls(all_sizes, dtypes=("float32", "bfloat16")):
    """By name: functions of nothing that give tensors."""
    kinds = [(kind, dtype) for kind in (_block, _feed_forward, _attention, _packed, _linear) for dtype in dtypes]
    if runners.paddle_computes_on(paddle.to_tensor(0).place):  # its caches are Paddle's work
        kinds.append((_decoding, "float32"))
    name = lambda kind, *of: " ".join([kind.__name__[1:], *map(str, of)])  # noqa: E731
    return {name(kind, dtype, tuple(s)): kind(s, dtype) for s in all_sizes for kind, dtype in kinds}


def digest(tensors):
    result = 0
    for tensor in tensors:
        result = zlib.crc32(tensor.numpy().tobytes(), result)
    return result


def kept_bytes():
    """What the process has in memory, when all has been given back that can be; of a GPU's that of tensors."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        on_host = int(file.read().split()[1]) * resource.getpagesize()
    return on_host + (paddle.device.cuda.memory_allocated() if paddle.get_device().startswith("gpu") else 0)


class Report(NamedTuple):
    calls: int
    seconds: float
    differing: list  # names of calls whose result was not that of the first time
    grown: int  # bytes, in the last quarter of the run


def grown_bytes(samples):
    """Of samples of memory the most of the last quarter beyond the most of the one before: until then caches fill."""
    quarter = len(samples) // 4
    return max(samples[-quarter:]) - max(samples[-2 * quarter : -quarter])


def repeat(calls, count, seconds=float("inf"), samples=SAMPLES, say=lambda text: None):
    """Makes the calls in turn, `count` in all or for so many seconds, and compares each result with its first; looks at
    the memory `samples` times."""
    expected = {name: digest(call()) for name, call in calls.items()}
    names = list(calls)
    differing, kept = [], []
    start, done = time.monotonic(), 0
    while done < count and time.monotonic() - start < seconds:
        name = names[done % len(names)]
        if digest(calls[name]()) != expected[name]:
            differing.append(name)
        done += 1
        part = max(done / count, (time.monotonic() - start) / seconds)
        if part * samples >= len(kept) + 1:
            kept.append(kept_bytes())
            say(f"{done} calls, {kept[-1] / MEBIBYTE:.1f} MiB, {len(differing)} differ")
    return Report(done, time.monotonic() - start, differing, grown_bytes(kept))
