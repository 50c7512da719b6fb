"""A whole encoder on the CPU on texts of very different lengths: packed one after another against padded with a mask.

    python benchmarks/packed_encoder.py [--threads 2] [--turns 9] [--dtype float32] [--batch 32] [--longest 128]

The encoder has all-MiniLM-L6-v2's shape: six layers, 384 wide, 12 heads. It is Paddle's after
paddle_fused_attention.convert, in eval mode without gradients. The lengths are skewed: their mean is a third of the
longest. Both ways take turns in one process; printed are their medians and the ratio, packed with and without `unpad`
and `pad` around the layers. Before that the results are compared; if they differ, the benchmark ends.
"""

import argparse
import os
import time

import numpy as np
import peers

EMBED, HEADS, HIDDEN, LAYERS = 384, 12, 1536, 6


def draw_lengths(batch, longest):
    """Batch lengths from 1 to the longest with a mean of a third of it: few are long."""
    quantiles = (np.arange(batch) + 0.5) / batch
    lengths = np.maximum(1, np.round(longest * quantiles**2)).astype(int)
    lengths[-1] = longest
    return np.random.default_rng(0).permutation(lengths)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--dtype", choices=peers.DTYPES, default="float32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--longest", type=int, default=128)
    arguments = parser.parse_args()
    for name in ("threads", "turns", "batch", "longest"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # which Paddle reads as it is imported
    import paddle
    from paddle_fused_attention import convert, pad, unpad

    paddle.set_device("cpu")
    paddle.seed(0)
    layer = paddle.nn.TransformerEncoderLayer(EMBED, HEADS, HIDDEN, activation="gelu")
    encoder = convert(paddle.nn.TransformerEncoder(layer, LAYERS))
    encoder.to(dtype=arguments.dtype)
    encoder.eval()

    batch, longest = arguments.batch, arguments.longest
    lengths = draw_lengths(batch, longest)
    x = np.random.default_rng(1).standard_normal((batch, longest, EMBED), np.float32)
    x = paddle.to_tensor(x).astype(arguments.dtype)
    keep = paddle.to_tensor(np.arange(longest) < lengths[:, None])
    mask = keep.unsqueeze([1, 2])
    packed = unpad(x, keep)

    def run_padded():
        return encoder(x, mask)

    def run_layers(tokens):
        for layer in encoder.layers:
            tokens = layer(tokens, cu_seqlens=packed.cu_seqlens, max_seqlen=packed.max_seqlen)
        return tokens

    def run_packed():
        return run_layers(packed.tokens)

    def run_both_ways():
        there = unpad(x, keep)
        return pad(run_layers(there.tokens), there.indices, batch, longest)

    ways = {"padded": run_padded, "packed": run_packed, "unpad, packed, pad": run_both_ways}
    with paddle.no_grad():
        expected = run_padded().astype("float64").numpy()[keep.numpy()]
        difference = run_packed().astype("float64").numpy() - expected
        error = np.linalg.norm(difference) / np.linalg.norm(expected)
        tolerance = peers.TOLERANCES[arguments.dtype]
        if not error < tolerance:
            raise SystemExit(f"packed differs from padded by {error:.1e}, allowed is {tolerance}")
        seconds = {name: [] for name in ways}
        for turn in range(arguments.turns + 1):  # the first is not counted
            for name, run in ways.items():
                start = time.perf_counter()
                run()
                if turn:
                    seconds[name].append(time.perf_counter() - start)

    print(
        f"{batch} texts of 1 to {longest} tokens, {lengths.sum()} in all, mean {lengths.mean():.1f}; "
        f"{arguments.dtype}, {arguments.threads} threads, {arguments.turns} turns; difference {error:.1e}\n"
    )
    print(f"{'':20} {'ms':>8} {'least':>8} {'most':>8} {'padded / this':>14}")
    padded = np.median(seconds["padded"])
    for name, times in seconds.items():
        median, least, most = (1e3 * f(times) for f in (np.median, np.min, np.max))
        print(f"{name:20} {median:8.1f} {least:8.1f} {most:8.1f} {1e3 * padded / median:14.2f}")


if __name__ == "__main__":
    main()
