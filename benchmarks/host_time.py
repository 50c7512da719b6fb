"""Host time of the operator in Paddle's dygraph: what a call takes until it returns, with paddle.matmul beside it.

    python benchmarks/host_time.py [--device gpu]

On a GPU the shapes are 8 x 128 x 1024 with 16 heads in float16, and the queued work is waited for outside of the times.
On the CPU a call works before it returns, so the shapes are tiny: 1 x 2 x 8 with 2 heads in float32. All calls take
turns; a result is the median over turns of the time per call.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import paddle
from paddle import nn
from paddle_fused_attention import FusedMultiHeadAttention, convert, fused_multi_head_attention

SHAPES = {"gpu": (8, 128, 1024, 16, "float16"), "cpu": (1, 2, 8, 2, "float32")}


def make_calls(device):
    batch, seq_len, embed_dim, num_heads, dtype = SHAPES[device]
    place = paddle.CUDAPlace(0) if device == "gpu" else paddle.CPUPlace()
    generator = np.random.default_rng(0)

    def tensor(*shape, stop_gradient=False):
        values = (0.1 * generator.standard_normal(shape)).astype(dtype)
        return paddle.to_tensor(values, place=place, stop_gradient=stop_gradient)

    x, d_out = tensor(batch, seq_len, embed_dim), tensor(batch, seq_len, embed_dim, stop_gradient=True)
    parameters = {
        "qkv_weight": tensor(3, num_heads, embed_dim // num_heads, embed_dim),
        "linear_weight": tensor(embed_dim, embed_dim),
        "qkv_bias": tensor(3, num_heads, embed_dim // num_heads),
        "linear_bias": tensor(embed_dim),
        "ln_scale": tensor(embed_dim),
        "ln_bias": tensor(embed_dim),
    }
    layer = FusedMultiHeadAttention(embed_dim, num_heads, dropout_rate=0.1, attn_dropout_rate=0.1)
    for name, value in parameters.items():
        parameter = paddle.create_parameter(value.shape, dtype)
        value._share_buffer_to(parameter)
        setattr(layer, name, parameter)

    def function(training=True):
        return fused_multi_head_attention(x, **parameters, dropout_rate=0.1, attn_dropout_rate=0.1, training=training)

    def inference():
        with paddle.no_grad():
            return function(training=False)

    def training_step():
        return paddle.grad([function()], [x, *parameters.values()], [d_out])

    def decoder(converted):
        """A step of a decoder of one layer, after seq_len cached tokens."""
        model = nn.TransformerDecoder(nn.TransformerDecoderLayer(embed_dim, num_heads, 4 * embed_dim), 1)
        if converted:
            convert(model)
        model.to(device=place, dtype=dtype)
        model.eval()
        with paddle.no_grad():
            memory = x.detach()
            _, caches = model(memory, memory, cache=model.gen_cache(memory))
        token = memory[:, :1].contiguous()

        def step():
            with paddle.no_grad():
                return model(token, memory, cache=caches)

        return step

    return {
        "function, training": function,
        "layer, training": lambda: layer(x),
        "function, no_grad": inference,
        "function and its gradient": training_step,
        "decoder layer, one token": decoder(True),
        "Paddle's decoder layer": decoder(False),
        "paddle.matmul": lambda: paddle.matmul(x, parameters["linear_weight"]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(SHAPES), default="gpu" if paddle.is_compiled_with_cuda() else "cpu")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--calls", type=int, default=10, help="in a turn")
    options = parser.parse_args()

    def synchronize():
        if options.device == "gpu":
            paddle.device.cuda.synchronize()

    calls = make_calls(options.device)
    times = {name: [] for name in calls}
    for turn in range(-3, options.turns):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(options.calls):
                call()
            if turn >= 0:
                times[name].append((time.perf_counter() - start) / options.calls)
    print(f"Paddle {paddle.__version__}, {options.device}: microseconds of host time per call")
    for name, values in times.items():
        print(f"  {name:28}{1e6 * statistics.median(values):8.1f}   least {1e6 * min(values):8.1f}")


if __name__ == "__main__":
    main()
